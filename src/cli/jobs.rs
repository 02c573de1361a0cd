//! `freightfs status`, `jobs` and `cancel`: what jobs there are, how far they are, and their end.

use std::path::{Path, PathBuf};

use super::mount_table::mount_table;
use super::silence::{self, silent_since};
use super::{CancelArguments, FAILED, JobsArguments, OK, StatusArguments, complain};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobState, Status};
use crate::units::human_bytes;
use crate::whole_file;

/// The file that tells a mount's root.
const MARK: &str = ".freightfs/version";

/// Largest status that is read, in bytes.
const MAX_STATUS: u64 = 1 << 20;

/// The status files of some objects.
pub(super) fn status(arguments: &StatusArguments) -> Result<u8> {
    let mut code = OK;
    let mut found = Vec::new();
    for file in &arguments.files {
        match read_status(file) {
            Ok(status) => found.push(status),
            Err(error) => {
                complain(&error);
                code = FAILED;
            }
        }
    }
    if arguments.files.is_empty() {
        for mount in mounts()? {
            found.extend(jobs_of(&mount)?);
        }
    }
    show(&found, arguments.json);
    let is_lost =
        |s: &Status| matches!(s.status, JobState::Fail | JobState::Cancelled) || silent_since(s).is_some();
    if !arguments.files.is_empty() && found.iter().any(is_lost) {
        code = FAILED;
    }
    Ok(code)
}

/// The jobs of a mount, or of all.
pub(super) fn jobs(arguments: &JobsArguments) -> Result<u8> {
    let roots = match &arguments.mountpoint {
        Some(path) => vec![root_of(path)?],
        None => mounts()?,
    };
    let mut found = Vec::new();
    for root in roots {
        found.extend(jobs_of(&root)?);
    }
    found.retain(|status| arguments.all || !status.status.is_final());
    show(&found, arguments.json);
    Ok(OK)
}

/// Ends the jobs that make some objects.
pub(super) fn cancel(arguments: &CancelArguments) -> Result<u8> {
    let mut code = OK;
    for file in &arguments.files {
        match cancel_one(file) {
            Ok(()) => println!("{}: CANCELLED", file.display()),
            Err(error) => {
                complain(&error);
                code = FAILED;
            }
        }
    }
    Ok(code)
}

fn cancel_one(file: &Path) -> Result<()> {
    let status = read_status(file)?;
    let place = file.display().to_string();
    if status.status.is_final() {
        let what = format!("the job has ended already: {}", word(status.status));
        return Err(Error::new(ErrorKind::NotFound, what).in_file(place));
    }
    // Not the object's own name: it could be complete by now, and would be removed.
    let job = root_of(file)?.join("jobs").join(format!("{}.json", status.job_id));
    std::fs::remove_file(job).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY | libc::EROFS) => {
            Error::new(ErrorKind::Busy, "the job ended before it could be cancelled").in_file(&place)
        }
        _ => Error::from_io("cannot cancel the job", e).in_file(&place),
    })
}

/// Reads the status file that is, or stands beside, `file`. A file of a mount that has none, because its name is no disk
/// image's, has its state in jobs/.
pub(super) fn read_status(file: &Path) -> Result<Status> {
    match status_beside(file) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NameTooLong) => {
            newest_job(file).ok_or(error)
        }
        read => read,
    }
}

/// The newest job that a file's mount knows for it.
fn newest_job(file: &Path) -> Option<Status> {
    let root = root_of(file).ok()?;
    let absolute = std::path::absolute(file).ok()?;
    let object = absolute.strip_prefix(&root).ok()?.strip_prefix("buckets").ok()?.to_str()?.to_owned();
    let mut jobs = jobs_of(&root).ok()?.into_iter().rev();
    jobs.find(|status| object == format!("{}/{}", status.bucket, status.key))
}

fn status_beside(file: &Path) -> Result<Status> {
    let path = if file.extension().is_some_and(|e| e == "status") {
        file.to_owned()
    } else {
        let mut name = file.as_os_str().to_owned();
        name.push(".status");
        PathBuf::from(name)
    };
    let place = path.display().to_string();
    let json = whole_file::read(&path, MAX_STATUS).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            Error::new(ErrorKind::NotFound, "there is no status: nothing was written to this name")
                .in_file(&place)
        }
        _ => Error::new(e.kind(), "cannot read the status file").because(e),
    })?;
    serde_json::from_slice(&json)
        .map_err(|e| Error::new(ErrorKind::Malformed, "is not a status file").in_file(place).because(e))
}

/// The jobs that a mount knows, oldest first.
fn jobs_of(root: &Path) -> Result<Vec<Status>> {
    let directory = root.join("jobs");
    let place = directory.display().to_string();
    let entries = std::fs::read_dir(&directory)
        .map_err(|e| Error::from_io("cannot list the jobs", e).in_file(place))?;
    let mut found: Vec<Status> = entries
        .flatten()
        // A job may be forgotten between its listing and its reading.
        .filter_map(|entry| serde_json::from_slice(&whole_file::read(&entry.path(), MAX_STATUS).ok()?).ok())
        .collect();
    found.sort_by(|a, b| a.job_id.cmp(&b.job_id));
    Ok(found)
}

/// The mount that a path lies in.
pub(super) fn root_of(path: &Path) -> Result<PathBuf> {
    let place = path.display().to_string();
    let absolute = std::path::absolute(path)
        .map_err(|e| Error::from_io("cannot resolve the path", e).in_file(&place))?;
    let found = absolute.ancestors().find(|directory| directory.join(MARK).is_file());
    let missing = || Error::new(ErrorKind::NotFound, "this is in no freightfs mount").in_file(&place);
    found.map(Path::to_owned).ok_or_else(missing)
}

/// All mounts of this host that this user can look into.
fn mounts() -> Result<Vec<PathBuf>> {
    let ours = mount_table()?.into_iter().filter(|mount| mount.kind == "fuse.freightfs");
    Ok(ours.map(|mount| mount.path).filter(|root| root.join(MARK).is_file()).collect())
}

fn word(state: JobState) -> &'static str {
    match state {
        JobState::Init => "INIT",
        JobState::Running => "RUNNING",
        JobState::Success => "SUCCESS",
        JobState::Fail => "FAIL",
        JobState::Cancelled => "CANCELLED",
    }
}

fn show(found: &[Status], json: bool) {
    if json {
        let text =
            serde_json::to_string_pretty(found).expect("a status has only string keys and finite numbers");
        println!("{text}");
        return;
    }
    let width = found.iter().map(|s| s.bucket.len() + s.key.len() + 1).max().unwrap_or(0).clamp(6, 48);
    if !found.is_empty() {
        println!("{:width$}  {:9}  {:>4}  {:>9}  {:>7}", "OBJECT", "STATUS", "%", "SIZE", "LEFT");
    }
    for status in found {
        let object = format!("{}/{}", status.bucket, status.key);
        let size = status.size.map_or("-".to_owned(), human_bytes);
        let left = status.eta_seconds.map_or("-".to_owned(), |seconds| format!("{seconds} s"));
        println!("{object:width$}  {:9}  {:>3}%  {size:>9}  {left:>7}", word(status.status), status.progress);
        if let Some(since) = silent_since(status) {
            println!("  {}", silence::sentence(status, since));
        }
        status.waiting.iter().for_each(|waiting| println!("  waits: {waiting}"));
        status.notes.iter().for_each(|note| println!("  {note}"));
        if let Some(error) = &status.error {
            let code = error.cloud_code.as_ref().map(|code| format!(", {code}")).unwrap_or_default();
            println!("  {}{code}: {}", error.code, error.details);
        }
    }
}
