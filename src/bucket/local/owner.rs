//! Whose the temporary files of a local bucket are, and which of them nobody will ever need.
//!
//! Each process that uses the bucket holds a lock on a file of its own, `.freightfs/locks/OWNER`, and its temporary files are
//! named after it. A process id is no identity: containers have the same one at each start. Who can take the lock knows that
//! the owner is dead; a filesystem that several hosts mount may not say so, and there only age tells.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::unistd::{UnlinkatFlags, unlinkat};
use parking_lot::Mutex;

use super::directory::{Directory, failed, modified};
use crate::bucket::key::{CONTROL_PREFIX, random};
use crate::error::{Error, ErrorKind, Result};

/// How long nothing has been written to a temporary file that goes although it is not known whether its owner lives, or
/// whether a job of another state directory continues it.
const ABANDONED: Duration = Duration::from_secs(7 * 24 * 3600);

/// How far the clocks of who serves the directory and of this host may be apart.
const CLOCKS_APART: Duration = Duration::from_secs(24 * 3600);

/// What the names of those temporary files have after their owner that only one request uses: no job continues them.
const PUT: &str = "put";

/// Largest lock file that is read.
const MAX_LOCK: u64 = 4096;

/// This process as an owner.
#[derive(Default)]
pub(super) struct Owner {
    /// The state directory that continues its uploads, once that is known.
    state: Mutex<String>,
    held: Mutex<Option<Held>>,
}

/// The name of an owner, and its lock.
struct Held {
    name: String,
    lock: Flock<File>,
}

/// What is known of the owner of temporary files. Its lock is held as long as this is, so that it is not taken meanwhile.
enum Fate {
    Alive,
    /// Dead, and this state directory continues its uploads.
    Dead {
        state: String,
        _lock: Flock<File>,
    },
    /// Of another host, or of a time before the last boot; perhaps without locks at all.
    Unknown {
        _lock: Option<Flock<File>>,
    },
}

impl Owner {
    /// A name for the file of one request.
    pub(super) fn put_name(&self, directory: &Directory, size: u64) -> Result<String> {
        Ok(format!("{}-{PUT}-{:016x}-{size}", self.claim(directory)?, random()))
    }

    /// A name for the file of an upload.
    pub(super) fn upload_name(&self, directory: &Directory, part_size: u64) -> Result<String> {
        Ok(format!("{}-{:016x}-{part_size}", self.claim(directory)?, random()))
    }

    /// This process's name, whose lock it takes unless it has it.
    fn claim(&self, directory: &Directory) -> Result<String> {
        let mut held = self.held.lock();
        if let Some(held) = &*held {
            return Ok(held.name.clone());
        }
        directory.create_directories(&locks())?;
        loop {
            let name = format!("{:016x}", random());
            // Somebody who sweeps may be faster, and takes the file away.
            if let Some(lock) = directory.try_lock(&format!("{}/{name}", locks()))? {
                describe(&lock, &self.state.lock())?;
                *held = Some(Held { name: name.clone(), lock });
                return Ok(name);
            }
        }
    }

    /// Notes which state directory continues this process's uploads, and removes what dead processes left, but for the uploads
    /// `kept`. What another state directory may continue stays until it is abandoned.
    pub(super) fn sweep(&self, directory: &Directory, state: &str, kept: &[String]) -> Result<()> {
        state.clone_into(&mut self.state.lock());
        let own = self.claim(directory)?;
        if let Some(held) = &*self.held.lock() {
            describe(&held.lock, state)?;
        }
        // By the clock of who serves the directory, which has just written that.
        let now = directory.stat(&format!("{}/{own}", locks()))?.as_ref().map(modified);
        let known = |owner: String| fate(directory, &owner).map(|fate| (owner, fate));
        let others = directory.names(&locks())?.into_iter().filter(|owner| *owner != own);
        let owners: HashMap<_, _> = others.filter_map(known).collect();
        let mut needed = HashSet::from([own.clone()]);
        for upload in directory.names(&uploads())? {
            let mut words = upload.split('-');
            let owner = words.next().unwrap_or_default();
            let is_continued = |by: &str| !state.is_empty() && by == state;
            let is_left = match owners.get(owner) {
                Some(Fate::Alive) => false,
                _ if owner == own => false,
                Some(Fate::Dead { state, .. }) if words.next() == Some(PUT) || is_continued(state) => true,
                _ => is_abandoned(directory, &format!("{}/{upload}", uploads()), now),
            };
            if !is_left || kept.contains(&upload) || remove_upload(directory, &upload).is_err() {
                needed.insert(owner.to_owned());
            }
        }
        for (owner, fate) in &owners {
            let path = format!("{}/{owner}", locks());
            let is_left = match fate {
                Fate::Alive => false,
                Fate::Dead { .. } => true,
                Fate::Unknown { .. } => is_abandoned(directory, &path, now),
            };
            if is_left && !needed.contains(owner) {
                let _ = unlinkat(&directory.root, path.as_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
        Ok(())
    }
}

/// Writes into a lock which kernel knows whether it is held, and what continues its owner's uploads.
fn describe(lock: &File, state: &str) -> Result<()> {
    let written = lock.write_all_at(format!("{}\n{state}\n", boot()).as_bytes(), 0);
    written.and_then(|()| lock.sync_all()).map_err(|e| failed("cannot write the lock", e))
}

/// What is known of an owner, by its lock; `None` when there is none any more.
fn fate(directory: &Directory, owner: &str) -> Option<Fate> {
    let path = format!("{}/{owner}", locks());
    let file = File::from(directory.open_at(&path, OFlag::O_RDWR | OFlag::O_NONBLOCK).ok()?);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => Some(Fate::Alive),
        Err(_) => Some(Fate::Unknown { _lock: None }),
        Ok(lock) => {
            let mut text = String::new();
            let _ = (&*lock).take(MAX_LOCK).read_to_string(&mut text);
            let mut lines = text.lines();
            // Kernels need not tell each other of such locks.
            let is_here = lines.next().is_some_and(|there| !there.is_empty() && there == boot());
            let state = lines.next().unwrap_or_default().to_owned();
            Some(if is_here {
                Fate::Dead { state, _lock: lock }
            } else {
                Fate::Unknown { _lock: Some(lock) }
            })
        }
    }
}

/// Whether nothing has been written to a file for so long that nobody will.
fn is_abandoned(directory: &Directory, path: &str, now: Option<SystemTime>) -> bool {
    let stat = directory.stat(path).ok().flatten();
    let age = stat.zip(now).and_then(|(stat, now)| now.duration_since(modified(&stat)).ok());
    // Nothing is old where two clocks do not know what time it is.
    let is_sane = now.is_some_and(|now| {
        let ahead = now.duration_since(SystemTime::now()).unwrap_or_else(|e| e.duration());
        ahead < CLOCKS_APART
    });
    is_sane && age.is_some_and(|age| age > ABANDONED)
}

/// The directory of the owners' locks.
fn locks() -> String {
    format!("{CONTROL_PREFIX}/locks")
}

/// What this kernel calls itself since it was booted, the same in all containers (random(4)); empty where it does not say.
pub(in crate::bucket) fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Removes the temporary file of an upload; one that is not there any more is no failure.
pub(super) fn remove_upload(directory: &Directory, upload: &str) -> Result<()> {
    match unlinkat(&directory.root, upload_path(upload)?.as_str(), UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(failed("cannot remove the upload", errno)),
    }
}

/// The directory of uploads and puts under way.
pub(super) fn uploads() -> String {
    format!("{CONTROL_PREFIX}/uploads")
}

/// Where an upload's bytes are. Ids come from journals, which may be damaged.
pub(super) fn upload_path(upload: &str) -> Result<String> {
    if upload.is_empty() || !upload.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Err(Error::new(ErrorKind::Malformed, format!("{upload:?} is not an upload's id")));
    }
    Ok(format!("{}/{upload}", uploads()))
}
