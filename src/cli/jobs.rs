//! `freightfs status`, `jobs` and `cancel`: what jobs there are, how far they are, and their end.

use std::path::{Path, PathBuf};

use super::document::read_document;
use super::mount_table::mount_table;
use super::silence::{self, silent_since};
use super::terminal::{plain, say, say_json};
use super::{CancelArguments, FAILED, JobsArguments, OK, StatusArguments, complain};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobState, Status};
use crate::units::human_bytes;

/// Largest status that is read, in bytes. One has some KiB.
const MAX_STATUS: u64 = 1 << 20;

/// The file that tells a mount's root.
const MARK: &str = ".freightfs/version";

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
        Some(path) => vec![within_mount(path)?.0],
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
            Ok(()) => say(format_args!("{}: CANCELLED", file.display())),
            Err(error) => {
                complain(&error);
                code = FAILED;
            }
        }
    }
    Ok(code)
}

/// Ends the job of the file's own mount. Nothing that a bucket says of a job chooses which: others may write there.
fn cancel_one(file: &Path) -> Result<()> {
    let place = file.display().to_string();
    let (root, inner) = within_mount(file)?;
    let Some(status) = newest_job(&root, &inner)? else {
        let elsewhere = status_beside(file).ok().filter(|status| !status.status.is_final());
        let what = match elsewhere {
            Some(status) => format!("no job of this mount makes it: it is made on host {}", status.host),
            None => "no job of this mount makes it".to_owned(),
        };
        return Err(Error::new(ErrorKind::NotFound, what).in_file(place));
    };
    if status.status.is_final() {
        let what = format!("the job has ended already: {}", word(status.status));
        return Err(Error::new(ErrorKind::NotFound, what).in_file(place));
    }
    // Not the object's own name: it could be complete by now, and would be removed.
    let job = root.join("jobs").join(format!("{}.json", status.job_id));
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
            within_mount(file).and_then(|(root, inner)| newest_job(&root, &inner)).ok().flatten().ok_or(error)
        }
        read => read,
    }
}

/// The newest job that the mount `root` knows for a file of it, or for the file whose status that is.
fn newest_job(root: &Path, file: &Path) -> Result<Option<Status>> {
    let Some(name) = file.strip_prefix("buckets").ok().and_then(Path::to_str) else {
        return Ok(None);
    };
    let is_of = |status: &Status, name: &str| name == format!("{}/{}", status.bucket, status.key);
    let mut jobs = jobs_of(root)?;
    jobs.reverse();
    let found = jobs.iter().find(|status| is_of(status, name)).or_else(|| {
        let object = name.strip_suffix(".status")?;
        jobs.iter().find(|status| is_of(status, object))
    });
    Ok(found.cloned())
}

fn status_beside(file: &Path) -> Result<Status> {
    let path = if file.extension().is_some_and(|e| e == "status") {
        file.to_owned()
    } else {
        let mut name = file.as_os_str().to_owned();
        name.push(".status");
        PathBuf::from(name)
    };
    read_document(&path, "status file", MAX_STATUS).map_err(|e: Error| match e.kind() {
        ErrorKind::NotFound => {
            Error::new(ErrorKind::NotFound, "there is no status: nothing was written to this name")
                .in_file(path.display().to_string())
        }
        _ => e,
    })
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
        .filter_map(|entry| read_document(&entry.path(), "status", MAX_STATUS).ok())
        .collect();
    found.sort_by(|a, b| a.job_id.cmp(&b.job_id));
    Ok(found)
}

/// The mount that a path lies in, and the path in it. The kernel says which directories are mounts: one that only looks like
/// it has jobs of whoever made it.
fn within_mount(path: &Path) -> Result<(PathBuf, PathBuf)> {
    let place = path.display().to_string();
    let failed = |e| Error::from_io("cannot resolve the path", e).in_file(&place);
    let absolute = std::path::absolute(path).map_err(failed)?;
    let roots = mount_points()?;
    // Only this mount is looked into: another may not answer.
    let split = |path: &Path| {
        let around =
            roots.iter().filter_map(|root| Some((root.clone(), path.strip_prefix(root).ok()?.to_owned())));
        around.max_by_key(|(root, _)| root.as_os_str().len()).filter(|(root, _)| root.join(MARK).is_file())
    };
    // A symbolic link may lead there from elsewhere; the file itself need not be there.
    let resolved = || {
        let (directory, name) = (absolute.parent()?, absolute.file_name()?);
        split(&directory.canonicalize().ok()?.join(name))
    };
    let found = split(&absolute).or_else(resolved);
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "this is in no freightfs mount").in_file(&place))
}

/// All mounts of this host that this user can look into.
fn mounts() -> Result<Vec<PathBuf>> {
    Ok(mount_points()?.into_iter().filter(|root| root.join(MARK).is_file()).collect())
}

fn mount_points() -> Result<Vec<PathBuf>> {
    let ours = mount_table()?.into_iter().filter(|mount| mount.kind == "fuse.freightfs");
    Ok(ours.map(|mount| mount.path).collect())
}

/// What did not have to be sent, in words.
pub(super) fn saved(status: &Status) -> Option<String> {
    let Status { bytes_sent, bytes_reused, bytes_zero, .. } = *status;
    if status.status != JobState::Success || (bytes_reused, bytes_zero) == (0, 0) {
        return None;
    }
    let (sent, reused, zero) = (human_bytes(bytes_sent), human_bytes(bytes_reused), human_bytes(bytes_zero));
    Some(format!("sent {sent}; the store copied {reused} of the object before, and {zero} of zeros"))
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
        return say_json(&found);
    }
    let object = |status: &Status| plain(format_args!("{}/{}", status.bucket, status.key));
    let width = found.iter().map(|status| object(status).len()).max().unwrap_or(0).clamp(6, 48);
    if !found.is_empty() {
        say(format_args!("{:width$}  {:9}  {:>4}  {:>9}  {:>7}", "OBJECT", "STATUS", "%", "SIZE", "LEFT"));
    }
    for status in found {
        let (object, word, progress) = (object(status), word(status.status), status.progress);
        let size = status.size.map_or("-".to_owned(), human_bytes);
        let left = status.eta_seconds.map_or("-".to_owned(), |seconds| format!("{seconds} s"));
        say(format_args!("{object:width$}  {word:9}  {progress:>3}%  {size:>9}  {left:>7}"));
        if let Some(since) = silent_since(status) {
            say(format_args!("  {}", silence::sentence(status, since)));
        }
        saved(status).iter().for_each(|saved| say(format_args!("  {saved}")));
        status.waiting.iter().for_each(|waiting| say(format_args!("  waits: {waiting}")));
        status.notes.iter().for_each(|note| say(format_args!("  {note}")));
        if let Some(error) = &status.error {
            let code = error.cloud_code.as_ref().map(|code| format!(", {code}")).unwrap_or_default();
            say(format_args!("  {}{code}: {}", error.code, error.details));
        }
    }
}
