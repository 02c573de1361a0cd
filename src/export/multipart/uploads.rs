//! The uploads of a mount: where their logs are, how they begin and how they are given up.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{debug, warn};

use super::digests::joined;
use super::intents::{self, Intent, RecordedIntent};
use super::log::{UploadLog, UploadName, given_up};
use super::splices;
use crate::bucket::{Bucket, ObjectKey, START_LIMIT, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::whole_file;

/// The directory of the uploads under way: `ID.parts`, the log of each, and `ID-NUMBER.intent` while one begins.
#[derive(Clone, Debug)]
pub(in crate::export) struct Uploads {
    directory: PathBuf,
    gates: Arc<Mutex<Gates>>,
    /// Where intents go for which there may be an upload that is not known.
    doubtful: UnboundedSender<RecordedIntent>,
}

/// Held while an upload of a key is started, and while one is looked for.
type Gate = tokio::sync::Mutex<()>;

/// By the bucket's name in the mount and the key.
type Gates = HashMap<(String, ObjectKey), Weak<Gate>>;

/// What earlier processes left.
#[derive(Debug, Default)]
pub(in crate::export) struct Left {
    /// The logs of uploads, by their ids.
    pub(in crate::export) logs: Vec<(String, UploadLog)>,
    /// Uploads that may have begun unheard.
    pub(in crate::export) intents: Vec<RecordedIntent>,
}

impl Uploads {
    /// The uploads in this directory. Intents for which there may be an upload that is not known go to `doubtful`.
    pub(in crate::export) fn new(directory: PathBuf, doubtful: UnboundedSender<RecordedIntent>) -> Self {
        Self { directory, gates: Arc::default(), doubtful }
    }

    /// Where the log of an upload is: that of a job by its id.
    pub(in crate::export) fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.parts"))
    }

    /// What earlier processes left. What holds no upload is removed; what cannot be read costs itself only.
    pub(in crate::export) fn load(&self) -> Result<Left> {
        let mut left = Left::default();
        for path in self.files()? {
            if path.extension().is_some_and(|e| e == intents::SUFFIX) {
                match RecordedIntent::read(path.clone()) {
                    Ok(recorded) if recorded.intent.is_forgotten() => {
                        warn!(key = %recorded.intent.key, "an upload that may have begun is not looked for any more");
                        recorded.remove();
                    }
                    Ok(intent) => left.intents.push(intent),
                    Err(error) => {
                        warn!("an upload that may have begun is not looked for: {}", error.report());
                        if error.kind() == ErrorKind::Malformed {
                            let _ = std::fs::remove_file(&path);
                        }
                    }
                }
                continue;
            }
            match (path.file_stem().and_then(|stem| stem.to_str()), UploadLog::open(&path)) {
                (Some(id), Ok(Some(log))) => left.logs.push((id.to_owned(), log)),
                (_, Ok(_)) => drop(std::fs::remove_file(&path)),
                (_, Err(error)) => {
                    // Out of the way of the job's next upload, and read again by the next mount.
                    warn!("the log of an upload cannot be used: {}", error.report());
                    let _ = std::fs::rename(&path, path.with_extension(given_up()));
                }
            }
        }
        Ok(left)
    }

    /// The ids of all uploads that have a log. Blocks.
    pub(in crate::export) fn named(&self) -> Result<HashSet<String>> {
        let mut named = HashSet::new();
        for path in self.files()?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "parts")) {
            match UploadLog::open(&path) {
                Ok(log) => named.extend(log.map(|log| log.name().id.clone())),
                // None of ours.
                Err(error) if whole_file::is_unfit(&error) || error.kind() == ErrorKind::Malformed => {}
                Err(error) => return Err(error),
            }
        }
        Ok(named)
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let place = self.directory.display().to_string();
        let entries = std::fs::read_dir(&self.directory)
            .map_err(|e| Error::from_io("cannot list the journal's uploads", e).in_file(place))?;
        Ok(entries.flatten().map(|e| e.path()).collect())
    }

    /// What is to be held while an upload of this key is looked for.
    pub(in crate::export) fn gate(&self, bucket: &str, key: &ObjectKey) -> Arc<Gate> {
        let mut gates = self.gates.lock();
        gates.retain(|_, gate| gate.strong_count() > 0);
        let gate = gates.entry((bucket.to_owned(), key.clone())).or_default();
        gate.upgrade().unwrap_or_else(|| {
            let new = Arc::default();
            *gate = Arc::downgrade(&new);
            new
        })
    }

    /// Starts an upload at the store, and its log: both or neither.
    pub(in crate::export) async fn begin(
        &self,
        bucket: &Bucket,
        key: &ObjectKey,
        tags: &Tags,
        part_size: u64,
        log_id: &str,
    ) -> Result<Arc<UploadLog>> {
        // An upload is not to be without a part for as long as its first one waits for the rate's limit.
        bucket.wait_for_rate().await;
        let gate = self.gate(bucket.name(), key);
        let _guard = gate.lock().await;
        let begin = Instant::now();
        let intent = self.intend(bucket, key, log_id).await?;
        // What is looked for afterwards was started within this time from the look before.
        let limit = START_LIMIT.saturating_sub(begin.elapsed());
        let (started, mut is_doubtful) = match failpoint::pass(Step::UploadStart) {
            Ok(()) => bucket.start_upload_once(key, part_size, tags, limit).await,
            Err(error) => (Err(error), false),
        };
        let begun = match started {
            Ok(id) => {
                let name = UploadName {
                    bucket: bucket.name().to_owned(),
                    key: key.clone(),
                    id,
                    part_size,
                    boot: bucket.boot(),
                };
                let logged = self.log(log_id, name.clone()).await;
                is_doubtful |= logged.is_err() && bucket.abort_upload(key, &name.id).await.is_err();
                logged
            }
            Err(error) => Err(error),
        };
        match intent {
            Some(intent) if is_doubtful => drop(self.doubtful.send(intent)),
            Some(intent) => intent.remove(),
            None => {}
        }
        begun
    }

    /// Records that an upload of a key is about to be started, where the store can be asked about it afterwards.
    async fn intend(&self, bucket: &Bucket, key: &ObjectKey, log_id: &str) -> Result<Option<RecordedIntent>> {
        let pending = match bucket.pending_uploads(key).await {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                debug!("an upload begins without a look at those under way: {}", error.report());
                None
            }
            pending => pending?,
        };
        let Some(pending) = pending else { return Ok(None) };
        let intent = Intent::new(bucket.name(), key, pending, bucket.initiator());
        let (directory, log_id) = (self.directory.clone(), log_id.to_owned());
        let recorded = tokio::task::spawn_blocking(move || intent.record(&directory, &log_id));
        joined(recorded.await)?.map(Some)
    }

    /// Creates the log of an upload, or nothing.
    async fn log(&self, log_id: &str, name: UploadName) -> Result<Arc<UploadLog>> {
        let path = self.path(log_id);
        let created = tokio::task::spawn_blocking(move || {
            let log = UploadLog::create(path.clone(), name);
            if log.as_ref().is_err_and(|error| error.kind() != ErrorKind::AlreadyExists) {
                let _ = std::fs::remove_file(&path);
            }
            log
        });
        joined(created.await)?.map(Arc::new)
    }
}

/// Does with a log what waits for a disk.
pub(in crate::export) async fn blocking<T: Send + 'static>(
    log: &Arc<UploadLog>,
    act: impl FnOnce(&UploadLog) -> T + Send + 'static,
) -> Result<T> {
    let log = Arc::clone(log);
    joined(tokio::task::spawn_blocking(move || act(&log)).await)
}

/// Gives an upload up. Its log stays when that fails, so that the next mount tries again.
pub(in crate::export) async fn abort(bucket: &Bucket, log: &UploadLog) {
    let name = log.name();
    let aborted = async {
        failpoint::pass(Step::UploadAbort)?;
        bucket.abort_upload(&name.key, &name.id).await
    };
    match aborted.await {
        Ok(()) => {
            splices::remove_all(bucket, log).await;
            log.remove();
        }
        Err(error) => {
            warn!(key = %name.key, "an unfinished upload could not be aborted: {}", error.report());
        }
    }
}
