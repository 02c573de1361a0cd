//! The state directory: one durable record for each job, and a lock that one daemon holds.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::job::JobRequest;
use super::part_log::PartLog;
use super::status::Status;
use crate::error::{Error, ErrorKind, Result};

/// Version of the record's fields. Version 1 kept the upload's id in the record, and is read too.
const RECORD_VERSION: u32 = 2;
const OLDEST_VERSION: u32 = 1;

/// How often, and after which pauses, the lock is tried: two seconds together.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Records of ended jobs that are kept; the oldest go first.
const ENDED_KEPT: usize = 1000;

/// What is known of a job after a crash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
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
    /// Whether the final status could not be written into the bucket yet.
    #[serde(default)]
    pub status_unwritten: bool,
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
        }
    }
}

/// A state directory that this process holds.
///
/// Layout: `lock`; `jobs/ID.json`, replaced atomically; `uploads/ID.parts`, logs of uploads under way; `staging/`, files
/// that writers are filling; `lengths/`, what compressed files keep.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
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
        Ok(Self { path: path.to_owned(), _lock: lock })
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
        Journal { directory: self.path.join("jobs"), uploads: self.path.join("uploads") }
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
}

impl Journal {
    fn path(&self, job_id: &str) -> PathBuf {
        self.directory.join(format!("{job_id}.json"))
    }

    /// Where the log of an upload is: that of a job by its id.
    pub(super) fn upload_path(&self, id: &str) -> PathBuf {
        self.uploads.join(format!("{id}.parts"))
    }

    /// The logs of all uploads that earlier processes left, by the ids of their jobs. What is no log is removed.
    pub(super) fn load_uploads(&self) -> Result<Vec<(String, PartLog)>> {
        let place = self.uploads.display().to_string();
        let entries = fs::read_dir(&self.uploads)
            .map_err(|e| Error::from_io("cannot list the journal's uploads", e).in_file(&place))?;
        let mut logs = Vec::new();
        for path in entries.flatten().map(|e| e.path()) {
            match (path.file_stem().and_then(|stem| stem.to_str()), PartLog::open(&path)?) {
                (Some(id), Some(log)) => logs.push((id.to_owned(), log)),
                _ => drop(fs::remove_file(&path)),
            }
        }
        Ok(logs)
    }

    /// Writes a record so that it survives a crash from the return of this call on.
    pub fn save(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.status.job_id);
        let failed =
            |e| Error::from_io("cannot write the job's record", e).in_file(path.display().to_string());
        let json =
            serde_json::to_vec_pretty(record).expect("a record has only string keys and finite numbers");
        let mut file =
            tempfile::Builder::new().prefix(".new-").tempfile_in(&self.directory).map_err(failed)?;
        file.write_all(&json).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        File::open(&self.directory).and_then(|d| d.sync_all()).map_err(failed)
    }

    /// All records, oldest first. What cannot be read is left in place and reported in the second list.
    pub fn load(&self) -> Result<(Vec<Record>, Vec<Error>)> {
        let place = self.directory.display().to_string();
        let entries = fs::read_dir(&self.directory)
            .map_err(|e| Error::from_io("cannot list the journal", e).in_file(&place))?;
        let (mut records, mut errors) = (Vec::new(), Vec::new());
        for path in entries.flatten().map(|e| e.path()) {
            if path.extension().is_none_or(|e| e != "json") {
                // What a crash left between writing and renaming: never a record.
                let _ = fs::remove_file(&path);
                continue;
            }
            match read_record(&path) {
                Ok(record) => records.push(record),
                Err(error) => errors.push(error),
            }
        }
        records.sort_by(|a, b| a.status.job_id.cmp(&b.status.job_id));
        self.forget_old(&mut records);
        Ok((records, errors))
    }

    fn forget_old(&self, records: &mut Vec<Record>) {
        let ended = records.iter().filter(|r| r.status.status.is_final()).count();
        let mut surplus = ended.saturating_sub(ENDED_KEPT);
        records.retain(|record| {
            let forget = surplus > 0 && record.status.status.is_final();
            if forget {
                surplus -= 1;
                let _ = fs::remove_file(self.path(&record.status.job_id));
            }
            !forget
        });
    }
}

fn read_record(path: &Path) -> Result<Record> {
    let place = path.display().to_string();
    let json =
        fs::read(path).map_err(|e| Error::from_io("cannot read the job's record", e).in_file(&place))?;
    let damaged =
        |e| Error::new(ErrorKind::Malformed, "the job's record is damaged").in_file(&place).because(e);
    let value: serde_json::Value = serde_json::from_slice(&json).map_err(damaged)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if (u64::from(OLDEST_VERSION)..=u64::from(RECORD_VERSION)).contains(&version) => {
            serde_json::from_value(value).map_err(damaged)
        }
        version => {
            let what = format!(
                "the job's record has version {version:?}, this freightfs reads {OLDEST_VERSION} to {RECORD_VERSION}"
            );
            Err(Error::unsupported(what).in_file(place))
        }
    }
}
