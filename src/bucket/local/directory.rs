//! A directory and what is beneath it: every path is opened by the kernel (openat2 with RESOLVE_BENEATH), so that no symbolic
//! link leads out.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};

use crate::bucket::key::Unshown;
use crate::error::{Error, ErrorKind, Result};

/// The directory of a bucket.
pub(super) struct Directory {
    pub(super) root: OwnedFd,
    pub(super) unshown: Unshown,
}

impl Directory {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let file = File::open(path)
            .map_err(|e| Error::from_io("cannot open the bucket's directory", e).in_file(&place))?;
        if !file.metadata().is_ok_and(|m| m.is_dir()) {
            return Err(Error::new(ErrorKind::NotDirectory, "the bucket is not a directory").in_file(place));
        }
        Ok(Self { root: file.into(), unshown: Unshown::default() })
    }

    /// Opens a path beneath the root.
    pub(super) fn open_at(&self, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(if flags.contains(OFlag::O_CREAT) {
                Mode::from_bits_truncate(0o644)
            } else {
                Mode::empty()
            })
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(self.root.as_fd(), path, how)
    }

    /// Opens the directory that holds `path`'s last segment, making the ones that are missing if `create`.
    pub(super) fn parent<'a>(&self, path: &'a str, create: bool) -> Result<(OwnedFd, &'a str)> {
        let Some((parent, name)) = path.rsplit_once('/') else {
            return Ok((self.root.try_clone().map_err(|e| failed("cannot open the bucket", e))?, path));
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let opened = match self.open_at(parent, flags) {
            Err(Errno::ENOENT) if create => {
                self.create_directories(parent)?;
                self.open_at(parent, flags)
            }
            opened => opened,
        };
        Ok((opened.map_err(|e| failed("cannot open the directory", e))?, name))
    }

    /// Makes a directory and those above it that are missing, durably.
    pub(super) fn create_directories(&self, path: &str) -> Result<()> {
        for end in path.match_indices('/').map(|(at, _)| at).chain([path.len()]) {
            let (parent, name) = self.parent(&path[..end], false)?;
            match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => {
                    let synced = File::from(parent).sync_all();
                    synced.map_err(|e| failed("cannot sync a new directory", e))?;
                }
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(failed("cannot create a directory", errno)),
            }
        }
        Ok(())
    }

    /// The lock of a file, which is made if need be. Not waited for: `None` when somebody else has it, or has just taken the
    /// file away.
    pub(super) fn try_lock(&self, path: &str) -> Result<Option<Flock<File>>> {
        let failed = |e| failed("cannot take a lock of the bucket", e);
        // Over NFS only who may write can have the lock alone; and nobody waits for the other end of a pipe.
        let flags = OFlag::O_CREAT | OFlag::O_NONBLOCK;
        let file = match self.open_at(path, flags | OFlag::O_RDWR) {
            Err(Errno::EACCES) => self.open_at(path, flags | OFlag::O_RDONLY),
            opened => opened,
        };
        match Flock::lock(File::from(file.map_err(failed)?), FlockArg::LockExclusiveNonblock) {
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
            Err((_, errno)) => Err(failed(errno)),
            Ok(locked) => {
                let inode = fstat(&*locked).map_err(failed)?.st_ino;
                let is_there = self.stat(path)?.is_some_and(|stat| stat.st_ino == inode);
                Ok(is_there.then_some(locked))
            }
        }
    }

    /// The names in a directory, sorted; none where there is no directory.
    pub(super) fn names(&self, path: &str) -> Result<Vec<String>> {
        let opened = match self.open_at(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            // As in a store: below a key that nobody used there is nothing.
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
            opened => opened.map_err(|e| failed("cannot list", e))?,
        };
        let mut directory = Dir::from_fd(opened).map_err(|e| failed("cannot list", e))?;
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(|e| failed("cannot list", e))?;
            match entry.file_name().to_str() {
                Ok("." | "..") => {}
                Ok(name) => names.push(name.to_owned()),
                Err(_) => self.unshown.note(&entry.file_name().to_string_lossy()),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    pub(super) fn stat(&self, path: &str) -> Result<Option<FileStat>> {
        match self.open_at(path, OFlag::O_PATH) {
            Ok(file) => fstat(&file).map(Some).map_err(|e| failed("cannot stat", e)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(failed("cannot look up", errno)),
        }
    }
}

pub(super) fn failed(what: &str, error: impl Into<std::io::Error>) -> Error {
    let error = error.into();
    match error.raw_os_error() {
        Some(libc::EXDEV) => {
            Error::new(ErrorKind::PermissionDenied, "a symbolic link leads out of the bucket").because(error)
        }
        _ => Error::from_io(what, error),
    }
}

fn has_type(stat: &FileStat, wanted: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == wanted
}

pub(super) fn is_file(stat: &FileStat) -> bool {
    has_type(stat, SFlag::S_IFREG)
}

pub(super) fn is_directory(stat: &FileStat) -> bool {
    has_type(stat, SFlag::S_IFDIR)
}

/// When it was last written.
pub(super) fn modified(stat: &FileStat) -> SystemTime {
    let since = Duration::new(
        u64::try_from(stat.st_mtime).unwrap_or(0),
        u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
    );
    SystemTime::UNIX_EPOCH + since
}
