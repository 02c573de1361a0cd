//! A directory of this machine as a catalog.
//!
//! Every path is opened beneath the directory by the kernel (openat2 with RESOLVE_BENEATH): whoever can put a link into a
//! catalog does not have the daemon read what they cannot. What a path leads to is looked at before it is opened for
//! reading, so that no device is opened, and no FIFO waited for, because of its name.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, Metadata};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use parking_lot::Mutex;
use tracing::warn;

use super::store::{CatalogStore, Entry, lexically_normal};
use crate::error::{Error, ErrorKind, Result, shown};
use crate::format::ImageFormat;
use crate::storage::{FileStorage, Generation, Storage, generation_of};
use crate::whole_file;

/// How much later than a change a file's time may be read from the clock: filesystems take times of the last tick.
const TICK: Duration = Duration::from_millis(20);

/// How often a file is tried to open that others are about to give up, a millisecond apart.
const TRIES: usize = 64;

/// Names of which the log says that they are not shown or not followed: each once, and no more than this many.
const SAID: usize = 1000;

/// Files of this machine.
#[derive(Debug)]
pub struct LocalFiles {
    root: PathBuf,
    /// The directory as it was named, by which sidecars may name its files too.
    named: PathBuf,
    follows_links: bool,
    /// No catalog: what a program is told to read is read, whatever it takes.
    is_anywhere: bool,
    said: Mutex<HashSet<PathBuf>>,
}

impl LocalFiles {
    /// The directory `root`, which must be one that can be listed.
    pub fn open(root: &Path) -> Result<Self> {
        let failed = |e| Error::from_io("cannot open the catalog", e).in_file(root.display().to_string());
        let named = std::path::absolute(root).map_err(failed)?;
        let files = Self::new(root.canonicalize().map_err(failed)?, named, false);
        if !files.root.is_dir() {
            let what = "the catalog is not a directory";
            return Err(Error::new(ErrorKind::NotDirectory, what).in_file(root.display().to_string()));
        }
        std::fs::read_dir(&files.root).map_err(|e| files.cannot_list(e))?;
        files.open_path(&files.root, OFlag::O_PATH).map_err(|e| {
            let what = "the catalog cannot be opened by openat2(2), which Linux has from 5.6 on and a container may refuse";
            Error::new(e.kind(), what).in_file(root.display().to_string()).because(e)
        })?;
        Ok(files)
    }

    /// No catalog, but files that are named one by one: links are followed, as any program does.
    pub fn anywhere() -> Self {
        Self { is_anywhere: true, ..Self::new(PathBuf::from("/"), PathBuf::from("/"), true) }
    }

    /// The same directory; with `follows_links` links and names in it may lead out of it.
    #[must_use]
    pub fn following_links(self, follows_links: bool) -> Self {
        Self { follows_links, ..self }
    }

    fn new(root: PathBuf, named: PathBuf, follows_links: bool) -> Self {
        Self { root, named, follows_links, is_anywhere: false, said: Mutex::default() }
    }

    fn cannot_list(&self, error: std::io::Error) -> Error {
        Error::from_io("cannot list the catalog", error).in_file(self.place(&self.root))
    }

    /// Opens a path, beneath the catalog unless links are followed. Messages name the path.
    fn open_path(&self, path: &Path, flags: OFlag) -> Result<File> {
        let opened = match self.follows_links {
            true => openat(AT_FDCWD, path, flags | OFlag::O_CLOEXEC, Mode::empty()),
            false => self.open_beneath(path, flags),
        };
        match opened {
            Ok(file) => Ok(file.into()),
            Err(Errno::EXDEV) => Err(self.leads_out(path)),
            // A program has a lease on the file, or its directory is being renamed.
            Err(errno @ Errno::EAGAIN) => {
                let error = Error::from_io("is in use", errno.into()).in_file(self.place(path));
                Err(Error::new(ErrorKind::Busy, "cannot be opened now").because(error).transient())
            }
            Err(errno) => Err(Error::from_io("cannot open", errno.into()).in_file(self.place(path))),
        }
    }

    fn open_beneath(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let within = path.strip_prefix(&self.root).or_else(|_| path.strip_prefix(&self.named));
        let within = within.map_err(|_| Errno::EXDEV)?;
        let within = if within.as_os_str().is_empty() { Path::new(".") } else { within };
        // Anew each time: the directory may have been replaced, or be another mount by now.
        let top = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(AT_FDCWD, &self.root, top, Mode::empty())?;
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        for _ in 0..TRIES {
            match openat2(&root, within, how) {
                // A rename on the way of a name with `..`, or a lease that its holder is asked to give up.
                Err(Errno::EAGAIN | Errno::EINTR) => std::thread::sleep(Duration::from_millis(1)),
                opened => return opened,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// What a path leads to, without opening it for reading.
    fn metadata(&self, path: &Path, flags: OFlag) -> Result<Metadata> {
        let file = self.open_path(path, OFlag::O_PATH | flags)?;
        file.metadata().map_err(|e| Error::from_io("cannot stat", e).in_file(self.place(path)))
    }

    /// Opens a regular file for reading.
    fn open_regular(&self, path: &Path, flags: OFlag) -> Result<File> {
        let kind = self.metadata(path, flags)?.file_type();
        whole_file::check_regular(kind).map_err(|e| e.in_file(self.place(path)))?;
        // It may be another one by now: that is waited for no more than this one, and checked by who reads it.
        self.open_path(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | flags)
    }

    fn storage(&self, path: &Path, flags: OFlag) -> Result<Arc<dyn Storage>> {
        let file = FileStorage::of(self.open_regular(path, flags)?, self.place(path))?;
        Ok(Arc::new(file.for_image()?))
    }

    /// The refusal of a path that leads out of the catalog. The log has it once.
    fn leads_out(&self, path: &Path) -> Error {
        let what = "leads out of the catalog, by a link or a name that is absolute or has \"..\"; the mount option \
                    follow_links allows it";
        self.say_once(path, what);
        Error::new(ErrorKind::ReferenceDenied, what).in_file(self.place(path))
    }

    fn say_once(&self, path: &Path, what: &str) {
        let mut said = self.said.lock();
        if said.len() < SAID && said.insert(path.to_owned()) {
            warn!("{}: {what}", shown(&path.display().to_string(), 1024));
        }
    }

    /// What a name leads to that is a symbolic link.
    fn link(&self, path: &Path) -> Entry {
        match self.metadata(path, OFlag::empty()) {
            Ok(meta) if meta.is_dir() => Entry::Directory(self.files_in(path)),
            // It may lead to a directory. Nobody looks: what is there may be another machine's that does not answer.
            Err(error) if error.kind() == ErrorKind::ReferenceDenied && path.extension().is_none() => {
                Entry::Unavailable(error)
            }
            // Opening it says what is wrong with it.
            _ => Entry::File,
        }
    }

    /// The names in a directory that are no directories; none where it cannot be read.
    fn files_in(&self, directory: &Path) -> Vec<String> {
        let opened = self.open_path(directory, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK);
        let Some(mut entries) = opened.ok().and_then(|file| Dir::from_fd(file.into()).ok()) else {
            return Vec::new();
        };
        let is_file = |name: &str, kind| match kind {
            Some(Type::Directory) => false,
            // Links, and what some filesystems do not tell.
            Some(Type::Symlink) | None => {
                !self.metadata(&directory.join(name), OFlag::empty()).is_ok_and(|meta| meta.is_dir())
            }
            Some(_) => true,
        };
        // An error may come again and again.
        let names = entries.iter().map_while(std::result::Result::ok).filter_map(|entry| {
            let name = entry.file_name().to_str().ok()?;
            // Only names of images are looked at, and a directory may have many others.
            let is_image = ImageFormat::from_file_name(name).is_some();
            (is_image && is_file(name, entry.file_type())).then(|| name.to_owned())
        });
        names.collect()
    }
}

impl CatalogStore for LocalFiles {
    fn root(&self) -> &Path {
        &self.root
    }

    fn place(&self, path: &Path) -> String {
        path.display().to_string()
    }

    fn canonical(&self, path: &Path) -> PathBuf {
        let path = lexically_normal(path);
        path.strip_prefix(&self.named).map(|within| self.root.join(within)).unwrap_or(path)
    }

    fn most_files(&self) -> usize {
        if self.is_anywhere {
            return usize::MAX;
        }
        let (most, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, 0));
        usize::try_from(most / 4).unwrap_or(usize::MAX)
    }

    fn entries(&self) -> Result<BTreeMap<String, Entry>> {
        let mut entries = BTreeMap::new();
        for entry in std::fs::read_dir(&self.root).map_err(|e| self.cannot_list(e))? {
            let entry = entry.map_err(|e| self.cannot_list(e))?;
            let path = entry.path();
            let name = match entry.file_name().into_string() {
                Ok(name) if name.starts_with('.') => continue,
                Ok(name) if !name.chars().any(char::is_control) => name,
                _ => {
                    self.say_once(&path, "is not shown: its name is not UTF-8, or has control characters");
                    continue;
                }
            };
            let found = match entry.file_type() {
                Ok(kind) if kind.is_dir() => Entry::Directory(self.files_in(&path)),
                Ok(kind) if kind.is_symlink() => self.link(&path),
                _ => Entry::File,
            };
            entries.insert(name, found);
        }
        Ok(entries)
    }

    fn read_text(&self, path: &Path, limit: u64) -> Result<String> {
        let file = self.open_regular(path, OFlag::empty())?;
        let meta = file.metadata().map_err(|e| Error::from_io("cannot stat", e));
        let text = meta
            .and_then(|meta| whole_file::check_regular(meta.file_type()))
            .and_then(|()| whole_file::read_opened(&file, limit))
            .and_then(whole_file::text);
        text.map_err(|e| e.in_file(self.place(path)))
    }

    fn stat(&self, path: &Path) -> Result<Generation> {
        Ok(generation_of(&self.metadata(path, OFlag::empty())?))
    }

    fn is_current(&self, path: &Path, opened: &Generation) -> bool {
        self.stat(path).is_ok_and(|now| now == *opened)
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.storage(path, OFlag::empty())
    }

    fn open_reference(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        if self.metadata(path, OFlag::O_NOFOLLOW)?.is_symlink() {
            let what = "is a symbolic link, to which no image may refer";
            return Err(Error::new(ErrorKind::Malformed, what).in_file(self.place(path)));
        }
        self.storage(path, OFlag::O_NOFOLLOW)
    }

    fn listing_age(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn may_have_new(&self, id: &str, since: SystemTime) -> bool {
        let is_changed =
            |path: &Path| changed(path).is_some_and(|at| is_recent(at, since, SystemTime::now()));
        is_changed(&self.root) || Path::new(id).components().count() == 1 && is_changed(&self.root.join(id))
    }

    fn is_remote(&self) -> bool {
        false
    }
}

/// When a directory got or lost a name: the time of its last status change, which nobody can set.
fn changed(path: &Path) -> Option<SystemTime> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let (seconds, nanoseconds) = (u64::try_from(meta.ctime()).ok()?, u32::try_from(meta.ctime_nsec()).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}

/// Whether what changed at `at` may have changed since a listing. A time to come is from before the clock was set back, or
/// another machine's.
fn is_recent(at: SystemTime, since: SystemTime, now: SystemTime) -> bool {
    at.checked_add(TICK).is_none_or(|latest| latest >= since) && at <= now + TICK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_before_a_listing_or_is_still_to_come_is_no_change_since() {
        let at = |milliseconds| SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds);
        for (changed, recent) in
            [(0, false), (979, false), (980, true), (1500, true), (2020, true), (2021, false)]
        {
            assert_eq!(is_recent(at(changed), at(1000), at(2000)), recent, "{changed}");
        }
    }
}
