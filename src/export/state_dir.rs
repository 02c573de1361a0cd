//! The state directory: one durable record for each job, and a lock that one daemon holds.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::warn;

use super::multipart::intents::RecordedIntent;
use super::multipart::uploads::Uploads;
use super::request::{JobRequest, JobSource};
use super::status::Status;
use crate::bucket::{ObjectKey, Replaces, random};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::whole_file;

/// Version of the record's fields. Version 1 kept the upload's id in the record, and is read too.
const RECORD_VERSION: u32 = 2;
const OLDEST_VERSION: u32 = 1;

/// Digits of a state directory's identity.
const IDENTITY: usize = 32;

/// How often, and after which pauses, the lock is tried: two seconds together.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Largest record that is read: a status, and the numbers of 10 000 parts, take less.
const MAX_RECORD: u64 = 4 << 20;

/// Damaged records that are kept; further ones are removed.
const DAMAGED_KEPT: usize = 100;

/// The directory of records that cannot be used, beside the others.
const DAMAGED: &str = "damaged";

/// What is known of a job after a crash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The version of these fields.
    pub version: u32,
    /// What was asked for.
    pub request: JobRequest,
    /// The job as it was when the record was written.
    pub status: Status,
    /// Version 1 only: the multipart upload that was under way at the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<String>,
    /// The name of the log of the job's upload, when it is not the job's id.
    #[serde(default)]
    pub upload_log: Option<String>,
    /// Whether the bucket lacks the final status.
    #[serde(default)]
    pub status_unwritten: bool,
    /// What the object replaces, where the request does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Replaces>,
    /// Whether the object has sidecars, which the mount that took the job up decided; earlier versions did not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub has_sidecars: Option<bool>,
    /// Whether it was cancelled while the store did not say whether the object is in place.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_cancelled: bool,
    /// What is about to be put in place by one put, or is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publishing: Option<Publishing>,
    /// Parts of an upload that began while its file was written, and that were written again after they were sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale: Vec<usize>,
}

/// A whole object that is about to be put in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publishing {
    /// Its bytes.
    pub size: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// Its MD5, hexadecimal.
    pub md5: String,
}

/// What is in a journal.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The records, oldest first.
    pub records: Vec<Record>,
    /// What cannot be used, and stays where it is until it is set aside.
    pub damaged: Vec<DamagedRecord>,
    /// Whether some records could not be read now. They stay, with whatever may be theirs.
    pub is_partial: bool,
}

/// A record that cannot be used: damaged, half-written, or of another version.
#[derive(Debug)]
pub struct DamagedRecord {
    /// The job, by the record's name.
    pub job_id: String,
    /// Where it is.
    pub path: PathBuf,
    /// The object that the job was to make, where that can be known.
    pub object: Option<(String, ObjectKey)>,
    /// Why it cannot be used.
    pub error: Error,
}

impl Record {
    /// A record of a job that has no upload under way.
    pub fn new(request: JobRequest, status: Status) -> Self {
        Self {
            version: RECORD_VERSION,
            request,
            status,
            upload: None,
            upload_log: None,
            status_unwritten: false,
            replaces: None,
            has_sidecars: None,
            is_cancelled: false,
            publishing: None,
            stale: Vec::new(),
        }
    }
}

/// A state directory that this process holds.
///
/// Layout: `lock`; `id`, by which local buckets know whose uploads they have; `jobs/ID.json`, replaced atomically; `jobs/damaged/`, records that cannot be used; `uploads/ID.parts`, logs of uploads under way, and `.intent`, those that begin; `staging/`, files
/// that writers are filling; `moves`, renames and removals under way; `lengths/`, what compressed files keep.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    identity: String,
    _lock: Flock<File>,
}

impl StateDir {
    /// Creates the directory where it is missing (mode 0700) and locks it.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) with the holder's process id when another daemon holds it.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |what: &str, e| Error::from_io(what, e).in_file(path.display().to_string());
        for name in ["", "jobs", "uploads", "staging", "lengths"] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path.join(name))
                .map_err(|e| failed("cannot create the state directory", e))?;
        }
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(path.join("lock"));
        let file = file.map_err(|e| failed("cannot open the state directory's lock", e))?;
        let mut lock = lock_patiently(file).map_err(|(mut file, errno)| {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            if errno == nix::errno::Errno::EWOULDBLOCK {
                let what = format!(
                    "another mount holds this state directory (process {}); it may be finishing its jobs after umount",
                    holder.trim()
                );
                Error::new(ErrorKind::Busy, what).in_file(path.display().to_string())
            } else {
                failed("cannot lock the state directory", errno.into())
            }
        })?;
        let written = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        written.map_err(|e| failed("cannot write the state directory's lock", e))?;
        let identity = identity(path).unwrap_or_default();
        Ok(Self { path: path.to_owned(), identity, _lock: lock })
    }

    /// Where compressed files keep what they computed.
    pub fn lengths(&self) -> PathBuf {
        self.path.join("lengths")
    }

    /// Where writers' files are staged.
    pub fn staging(&self) -> PathBuf {
        self.path.join("staging")
    }

    /// The journal in this directory.
    pub fn journal(&self) -> Journal {
        Journal {
            directory: self.path.join("jobs"),
            uploads: self.path.join("uploads"),
            staging: self.path.join("staging"),
            identity: self.identity.clone(),
            moves: self.path.join("moves"),
        }
    }
}

/// The identity of a state directory, made when it has none.
fn identity(directory: &Path) -> std::io::Result<String> {
    let path = directory.join("id");
    match whole_file::read_text(&path, IDENTITY as u64) {
        Ok(known) if known.len() == IDENTITY && known.bytes().all(|c| c.is_ascii_hexdigit()) => Ok(known),
        _ => {
            let new = format!("{:016x}{:016x}", random(), random());
            let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
            file.write_all(new.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(directory)?.sync_all()?;
            Ok(new)
        }
    }
}

/// Locks the file; a daemon that was just unmounted or killed gets a moment to end.
fn lock_patiently(mut file: File) -> std::result::Result<Flock<File>, (File, nix::errno::Errno)> {
    for _ in 0..LOCK_TRIES {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((returned, nix::errno::Errno::EWOULDBLOCK)) => file = returned,
            result => return result,
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
}

/// The durable records of all jobs.
#[derive(Clone, Debug)]
pub struct Journal {
    directory: PathBuf,
    uploads: PathBuf,
    staging: PathBuf,
    moves: PathBuf,
    identity: String,
}

impl Journal {
    fn path(&self, job_id: &str) -> PathBuf {
        self.directory.join(format!("{job_id}.json"))
    }

    /// Where renames and removals are recorded.
    pub(super) fn moves(&self) -> PathBuf {
        self.moves.clone()
    }

    /// What tells this state directory from every other one; empty where that could not be written.
    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    /// The uploads under way, and where the intents come out for which there may be one that is not known.
    pub(super) fn uploads(&self) -> (Uploads, UnboundedReceiver<RecordedIntent>) {
        let (doubtful, received) = tokio::sync::mpsc::unbounded_channel();
        (Uploads::new(self.uploads.clone(), doubtful), received)
    }

    /// Writes a record so that it survives a crash from the return of this call on.
    pub(super) fn save(&self, step: Step, record: &Record) -> Result<()> {
        failpoint::pass(step)?;
        let path = self.path(&record.status.job_id);
        let failed =
            |e| Error::from_io("cannot write the job's record", e).in_file(path.display().to_string());
        let json =
            serde_json::to_vec_pretty(record).expect("a record has only string keys and finite numbers");
        failpoint::pass(Step::RecordWrite)?;
        let mut file =
            tempfile::Builder::new().prefix(".new-").tempfile_in(&self.directory).map_err(failed)?;
        file.write_all(&json).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        failpoint::pass(Step::RecordRename)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        failpoint::pass(Step::RecordSync)?;
        File::open(&self.directory).and_then(|d| d.sync_all()).map_err(failed)
    }

    /// Forgets a job that has ended.
    pub(super) fn forget(&self, job_id: &str) {
        if failpoint::pass(Step::RecordPrune).is_ok() {
            let _ = fs::remove_file(self.path(job_id));
        }
    }

    /// All records, and what cannot be used.
    pub fn load(&self) -> Result<Loaded> {
        let place = self.directory.display().to_string();
        let entries = fs::read_dir(&self.directory)
            .map_err(|e| Error::from_io("cannot list the journal", e).in_file(&place))?;
        let mut loaded = Loaded::default();
        for path in entries.flatten().map(|e| e.path()) {
            if path.extension().is_none_or(|e| e != "json") {
                // What a crash left between writing and renaming: never a record. The directory of damaged ones stays.
                let _ = fs::remove_file(&path);
                continue;
            }
            match whole_file::read(&path, MAX_RECORD) {
                Ok(json) => match read_record(&path, &json) {
                    Ok(record) => loaded.records.push(self.contained(record)),
                    Err(error) => loaded.damaged.push(damaged(path, &json, error)),
                },
                Err(error) if whole_file::is_unfit(&error) => loaded.damaged.push(damaged(path, b"", error)),
                Err(error) => {
                    warn!("a job's record cannot be read now and is left alone: {}", error.report());
                    loaded.is_partial = true;
                }
            }
        }
        loaded.records.sort_by(|a, b| a.status.job_id.cmp(&b.status.job_id));
        Ok(loaded)
    }

    /// A record whose staged file is one of this directory, whatever it says: that file is removed when the job ends.
    fn contained(&self, mut record: Record) -> Record {
        if let JobSource::Staged(path) = &mut record.request.source
            && let Some(name) = path.file_name()
        {
            *path = self.staging.join(name);
        }
        record
    }

    /// Moves a record out of the way, where somebody can look at it. Returns where it is then.
    pub fn set_aside(&self, record: &DamagedRecord) -> PathBuf {
        let path = &record.path;
        let directory = self.directory.join(DAMAGED);
        let kept = fs::create_dir_all(&directory).and_then(|()| {
            let is_full = fs::read_dir(&directory)?.count() >= DAMAGED_KEPT;
            let aside = directory.join(path.file_name().unwrap_or_default());
            if is_full {
                fs::remove_file(path).map(|()| aside)
            } else {
                fs::rename(path, &aside).map(|()| aside)
            }
        });
        kept.unwrap_or_else(|_| path.clone())
    }

    /// Removes the staged files that no record needs: those of writers that died with their daemon. Nobody writes yet.
    pub(super) fn sweep_staging(&self, records: &[Record], damaged: &[DamagedRecord]) {
        let needed = |path: &Path| {
            let is_named = |record: &Record| match &record.request.source {
                JobSource::Staged(staged) => staged.file_name() == path.file_name(),
                JobSource::Image(_) => false,
            };
            records.iter().any(|record| !record.status.status.is_final() && is_named(record))
        };
        // Somebody may want to look at these bytes as well as at the record.
        let texts: Vec<_> =
            damaged.iter().filter_map(|record| whole_file::read(&record.path, MAX_RECORD).ok()).collect();
        let is_mentioned = |path: &Path| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            texts.iter().any(|text| text.windows(name.len().max(1)).any(|part| part == name))
        };
        for entry in fs::read_dir(&self.staging).into_iter().flatten().flatten() {
            let path = entry.path();
            if !needed(&path) && !is_mentioned(&path) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// The value of a text field that a damaged JSON document has first, if that much of it is whole.
fn text_field(json: &str, name: &str) -> Option<String> {
    let after = json.split_once(&format!("\"{name}\""))?.1.trim_start().strip_prefix(':')?.trim_start();
    serde_json::Deserializer::from_str(after).into_iter::<String>().next()?.ok()
}

/// What can be known of a record that cannot be used.
fn damaged(path: PathBuf, json: &[u8], error: Error) -> DamagedRecord {
    let job_id = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let text = String::from_utf8_lossy(json);
    let object = text_field(&text, "bucket").zip(text_field(&text, "key"));
    let object = object.and_then(|(bucket, key)| Some((bucket, ObjectKey::parse(&key).ok()?)));
    DamagedRecord { job_id, path, object, error }
}

fn read_record(path: &Path, json: &[u8]) -> Result<Record> {
    let place = path.display().to_string();
    let damaged =
        |e| Error::new(ErrorKind::Malformed, "the job's record is damaged").in_file(&place).because(e);
    let value: serde_json::Value = serde_json::from_slice(json).map_err(damaged)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if (u64::from(OLDEST_VERSION)..=u64::from(RECORD_VERSION)).contains(&version) => {
            let record: Record = serde_json::from_value(value).map_err(damaged)?;
            if path.file_stem() != Some(OsStr::new(&*record.status.job_id)) {
                let what = format!("this is a copy of the record of job {}", record.status.job_id);
                return Err(Error::new(ErrorKind::Malformed, what).in_file(place));
            }
            Ok(record)
        }
        version => {
            let what = format!(
                "the job's record has version {version:?}, this freightfs reads {OLDEST_VERSION} to {RECORD_VERSION}"
            );
            Err(Error::unsupported(what).in_file(place))
        }
    }
}
