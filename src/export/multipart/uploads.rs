//! The uploads of a mount: where their logs are, how they begin and how they are given up.

use std::path::PathBuf;
use std::sync::Arc;

use tracing::warn;

use super::log::{UploadLog, UploadName, given_up};
use crate::bucket::{Bucket, ObjectKey, Tags};
use crate::error::{Error, Result};
use crate::failpoint::{self, Step};

/// The directory of the logs: `ID.parts` for each upload.
#[derive(Clone, Debug)]
pub(in crate::export) struct Uploads {
    directory: PathBuf,
}

impl Uploads {
    pub(in crate::export) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Where the log of an upload is: that of a job by its id.
    pub(in crate::export) fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.parts"))
    }

    /// The logs that earlier processes left, by their ids. What holds no upload is removed; what cannot be read costs
    /// itself only.
    pub(in crate::export) fn load(&self) -> Result<Vec<(String, UploadLog)>> {
        let place = self.directory.display().to_string();
        let entries = std::fs::read_dir(&self.directory)
            .map_err(|e| Error::from_io("cannot list the journal's uploads", e).in_file(&place))?;
        let mut logs = Vec::new();
        for path in entries.flatten().map(|e| e.path()) {
            match (path.file_stem().and_then(|stem| stem.to_str()), UploadLog::open(&path)) {
                (Some(id), Ok(Some(log))) => logs.push((id.to_owned(), log)),
                (_, Ok(_)) => drop(std::fs::remove_file(&path)),
                (_, Err(error)) => {
                    // Out of the way of the job's next upload, and read again by the next mount.
                    warn!("the log of an upload cannot be used: {}", error.report());
                    let _ = std::fs::rename(&path, path.with_extension(given_up()));
                }
            }
        }
        Ok(logs)
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
        failpoint::pass(Step::UploadStart)?;
        let id = bucket.start_upload(key, part_size, tags).await?;
        let name = UploadName { bucket: bucket.name().to_owned(), key: key.clone(), id, part_size };
        match UploadLog::create(self.path(log_id), name.clone()) {
            Ok(log) => Ok(Arc::new(log)),
            Err(error) => {
                let _ = std::fs::remove_file(self.path(log_id));
                let _ = bucket.abort_upload(key, &name.id).await;
                Err(error)
            }
        }
    }
}

/// Gives an upload up. Its log stays when that fails, so that the next mount tries again.
pub(in crate::export) async fn abort(bucket: &Bucket, log: &UploadLog) {
    let name = log.name();
    let aborted = async {
        failpoint::pass(Step::UploadAbort)?;
        bucket.abort_upload(&name.key, &name.id).await
    };
    match aborted.await {
        Ok(()) => log.remove(),
        Err(error) => {
            warn!(key = %name.key, "an unfinished upload could not be aborted: {}", error.report());
        }
    }
}
