//! A local directory as a bucket.
//!
//! Written on the system's calls rather than on object_store's LocalFileSystem, which hides and refuses names
//! such as `a#1`, escapes others, and has no uploads that outlive a process. Every path is opened beneath the
//! bucket's root by the kernel (openat2 with RESOLVE_BENEATH), so that a symbolic link cannot lead out of it.
//!
//! Uploads and puts are files under `.freightfs/uploads/`, renamed to their key when they are whole and synced.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{
    FallocateFlags, Flock, FlockArg, OFlag, OpenHow, ResolveFlag, fallocate, openat2, renameat,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::checksum::Checksum;
use super::client::Tries;
use super::key::{CONTROL_PREFIX, ObjectKey, Unshown, unique};
use super::replaces::{Conditions, Replaces};
use super::reply::conflict;
use super::store::{Abilities, Listing, ObjectMeta, Put, PutPart, Store, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::units::KIB;

/// Blocks of zeros of this size are left as holes.
const ZERO_BLOCK: usize = 64 * KIB as usize;

/// The file below [`CONTROL_PREFIX`] that is locked while an object gets its name.
const LOCK: &str = "lock";

/// The directory of a bucket.
#[derive(Clone)]
pub(super) struct LocalStore {
    root: Arc<OwnedFd>,
    unshown: Arc<Unshown>,
}

impl LocalStore {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let file = File::open(path)
            .map_err(|e| Error::from_io("cannot open the bucket's directory", e).in_file(&place))?;
        if !file.metadata().is_ok_and(|m| m.is_dir()) {
            return Err(Error::new(ErrorKind::NotDirectory, "the bucket is not a directory").in_file(place));
        }
        Ok(Self { root: Arc::new(file.into()), unshown: Arc::default() })
    }

    fn sweep_now(&self, kept: &[String]) {
        let Ok(opened) = self.open_at(&uploads(), OFlag::O_RDONLY | OFlag::O_DIRECTORY) else { return };
        let Ok(mut directory) = Dir::from_fd(opened) else { return };
        let own = host_prefix();
        for entry in directory.iter().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process = name.strip_prefix(&own).and_then(|rest| rest.split('-').next());
            let dead = process.is_some_and(has_ended);
            if dead && !kept.contains(&name) {
                let _ = self.remove_upload(&name);
            }
        }
    }

    /// Runs `work` where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.clone();
        let joined = tokio::task::spawn_blocking(move || work(&store)).await;
        joined.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the bucket panicked").because(e))?
    }

    /// Opens a path beneath the root.
    fn open_at(&self, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
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
    fn parent<'a>(&self, path: &'a str, create: bool) -> Result<(OwnedFd, &'a str)> {
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

    fn create_directories(&self, path: &str) -> Result<()> {
        for end in path.match_indices('/').map(|(at, _)| at).chain([path.len()]) {
            let (parent, name) = self.parent(&path[..end], false)?;
            match mkdirat(parent, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(failed("cannot create a directory", errno)),
            }
        }
        Ok(())
    }

    fn stat(&self, path: &str) -> Result<Option<FileStat>> {
        match self.open_at(path, OFlag::O_PATH) {
            Ok(file) => fstat(&file).map(Some).map_err(|e| failed("cannot stat", e)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(failed("cannot look up", errno)),
        }
    }

    fn list_now(&self, prefix: Option<&ObjectKey>) -> Result<Listing> {
        let mut listing = Listing::default();
        let path = prefix.map_or(".", ObjectKey::as_str);
        let opened = match self.open_at(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            // As in a store: below a key that nobody used there is nothing.
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(listing),
            opened => opened.map_err(|e| failed("cannot list", e))?,
        };
        let mut directory = Dir::from_fd(opened).map_err(|e| failed("cannot list", e))?;
        let names: Vec<_> = directory.iter().flatten().map(|entry| entry.file_name().to_owned()).collect();
        for name in names {
            let Ok(name) = name.to_str() else {
                self.unshown.note(&name.to_string_lossy());
                continue;
            };
            if name == "." || name == ".." || prefix.is_none() && name == CONTROL_PREFIX {
                continue;
            }
            let Ok(key) = prefix.map_or_else(|| ObjectKey::parse(name), |prefix| prefix.child(name)) else {
                self.unshown.note(name);
                continue;
            };
            // Links that lead out, and what vanished meanwhile, are not shown.
            let Ok(Some(stat)) = self.stat(key.as_str()) else { continue };
            if is_directory(&stat) {
                listing.prefixes.push(name.to_owned());
            } else if is_file(&stat) {
                listing.objects.push(meta(key, &stat));
            }
        }
        listing.objects.sort_by(|a, b| a.key.cmp(&b.key));
        listing.prefixes.sort();
        Ok(listing)
    }

    /// An upload's id holds its part size, so that a part's place follows from its index alone.
    fn create_upload(&self, part_size: u64) -> Result<String> {
        let upload = format!("{}{}-{part_size}", host_prefix(), unique());
        let path = upload_path(&upload)?;
        self.create_directories(&uploads())?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY;
        self.open_at(&path, flags).map_err(|e| failed("cannot create the upload", e))?;
        Ok(upload)
    }

    /// The upload's file and its part size.
    fn open_upload(&self, upload: &str) -> Result<(File, u64)> {
        let part_size = upload.rsplit_once('-').and_then(|(_, size)| size.parse().ok());
        let part_size = part_size.ok_or_else(|| Error::new(ErrorKind::Malformed, "not an upload's id"))?;
        let opened = self.open_at(&upload_path(upload)?, OFlag::O_WRONLY);
        Ok((opened.map_err(|e| failed("cannot open the upload", e))?.into(), part_size))
    }

    /// Writes a part at its place. Blocks of zeros are holes, also where an earlier version of the part had data.
    fn write_part(&self, upload: &str, index: usize, part: &[u8]) -> Result<()> {
        let (file, part_size) = self.open_upload(upload)?;
        let start = part_size
            .checked_mul(index as u64)
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "too many parts"))?;
        if file.metadata().map_err(|e| failed("cannot stat the upload", e))?.len() > start {
            punch_hole(&file, start, part.len() as u64)?;
        }
        let mut run = 0;
        let mut at = 0;
        let write = |from: usize, to: usize| {
            let written =
                if from < to { file.write_all_at(&part[from..to], start + from as u64) } else { Ok(()) };
            written.map_err(|e| failed("cannot write the part", e))
        };
        for block in part.chunks(ZERO_BLOCK) {
            if block.len() == ZERO_BLOCK && block.iter().all(|&b| b == 0) {
                write(run, at)?;
                run = at + block.len();
            }
            at += block.len();
        }
        write(run, at)
    }

    /// Waits until nobody else, in this process or another one of this host, gives names to objects or takes them away.
    fn lock(&self) -> Result<Flock<File>> {
        let failed = |e| failed("cannot lock the bucket", e);
        self.create_directories(CONTROL_PREFIX)?;
        let file = self.open_at(&format!("{CONTROL_PREFIX}/{LOCK}"), OFlag::O_CREAT | OFlag::O_RDONLY);
        Flock::lock(File::from(file.map_err(failed)?), FlockArg::LockExclusive).map_err(|(_, e)| failed(e))
    }

    /// Gives an upload its size and its name, durably, where that replaces what it is to replace. Returns the object's tag.
    fn publish(&self, upload: &str, key: &ObjectKey, size: u64, replaces: &Replaces) -> Result<String> {
        let (file, _) = self.open_upload(upload)?;
        resize(&file, size)?;
        file.sync_all().map_err(|e| failed("cannot sync the object", e))?;
        let (parent, name) = self.parent(key.as_str(), true)?;
        let stat = fstat(&file).map_err(|e| failed("cannot stat the upload", e))?;
        let locked = self.lock()?;
        check(replaces, self.stat(key.as_str())?.as_ref())?;
        renameat(self.root.as_fd(), upload_path(upload)?.as_str(), &parent, name)
            .map_err(|e| failed("cannot put the object in place", e))?;
        drop(locked);
        File::from(parent).sync_all().map_err(|e| failed("cannot sync the object's directory", e))?;
        Ok(tag(&stat))
    }

    fn remove_upload(&self, upload: &str) -> Result<()> {
        match unlinkat(self.root.as_fd(), upload_path(upload)?.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(failed("cannot remove the upload", errno)),
        }
    }
}

#[async_trait::async_trait]
impl Store for LocalStore {
    fn abilities(&self) -> Abilities {
        let conditions = Conditions::ALL;
        Abilities { largest_copy: u64::MAX, conditions, returns_tags: true, ..Abilities::default() }
    }

    async fn sweep(&self, kept: Vec<String>) -> Result<()> {
        self.blocking(move |store| {
            store.sweep_now(&kept);
            Ok(())
        })
        .await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        let key = key.clone();
        self.blocking(move |store| Ok(store.stat(key.as_str())?.filter(is_file).map(|stat| meta(key, &stat))))
            .await
    }

    async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        let key = key.clone();
        self.blocking(move |store| Ok(store.stat(key.as_str())?.is_some_and(|stat| is_directory(&stat))))
            .await
    }

    async fn list_page(
        &self,
        prefix: Option<&ObjectKey>,
        _: Option<String>,
    ) -> Result<(Listing, Option<String>)> {
        let prefix = prefix.cloned();
        self.blocking(move |store| Ok((store.list_now(prefix.as_ref())?, None))).await
    }

    async fn list_all(&self, _: usize) -> Result<Option<Vec<ObjectMeta>>> {
        Ok(None)
    }

    async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>> {
        let key = key.clone();
        self.blocking(move |store| {
            let opened = match store.open_at(key.as_str(), OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
                Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Vec::new()),
                opened => opened.map_err(|e| failed("cannot list", e))?,
            };
            let mut directory = Dir::from_fd(opened).map_err(|e| failed("cannot list", e))?;
            let names =
                directory.iter().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
            Ok(names.collect())
        })
        .await
    }

    async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let (key, etag) = (key.clone(), etag.map(str::to_owned));
        self.blocking(move |store| {
            let opened = store.open_at(key.as_str(), OFlag::O_RDONLY | OFlag::O_NONBLOCK);
            let file = File::from(opened.map_err(|e| failed("cannot open the object", e))?);
            let stat = fstat(&file).map_err(|e| failed("cannot stat the object", e))?;
            if etag.is_some_and(|etag| etag != tag(&stat)) {
                return Err(Error::new(ErrorKind::SourceChanged, "the object changed since it was opened"));
            }
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, range.start).map_err(|e| failed("cannot read the object", e))?;
            Ok(Bytes::from(bytes))
        })
        .await
    }

    async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<()> {
        for start in range.clone().step_by(piece) {
            take(self.read(key, start..range.end.min(start + piece as u64), etag).await?);
        }
        Ok(())
    }

    async fn put(&self, key: &ObjectKey, put: Put) -> Result<Option<String>> {
        let key = key.clone();
        self.blocking(move |store| {
            let size = put.bytes.len() as u64;
            let upload = store.create_upload(size)?;
            let written = store
                .write_part(&upload, 0, &put.bytes)
                .and_then(|()| store.publish(&upload, &key, size, &put.replaces));
            let written = written.inspect_err(|_| {
                let _ = store.remove_upload(&upload);
            });
            written.map(Some)
        })
        .await
    }

    async fn delete(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        let (key, replaces) = (key.clone(), replaces.clone());
        self.blocking(move |store| {
            let _locked = store.lock()?;
            let object = store.stat(key.as_str())?;
            if object.is_some() {
                check(&replaces, object.as_ref())?;
            }
            let parent = store.parent(key.as_str(), false);
            let (parent, name) = match parent {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                parent => parent?,
            };
            match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => Ok(()),
                Err(errno) => Err(failed("cannot remove the object", errno)),
            }
        })
        .await
    }

    async fn copy(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<()> {
        let (from, to) = (from.clone(), to.clone());
        let (etag, replaces) = (etag.map(str::to_owned), replaces.clone());
        self.blocking(move |store| {
            let opened = store
                .open_at(from.as_str(), OFlag::O_RDONLY)
                .map_err(|e| failed("cannot open the object", e))?;
            let stat = fstat(&opened).map_err(|e| failed("cannot stat the object", e))?;
            if etag.is_some_and(|etag| etag != tag(&stat)) {
                return Err(Error::new(
                    ErrorKind::SourceChanged,
                    "the object changed since it was looked up",
                ));
            }
            let mut source = File::from(opened);
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            let upload = store.create_upload(size)?;
            let copied = store.open_upload(&upload).and_then(|(mut file, _)| {
                // The standard library copies within the kernel where that is possible.
                std::io::copy(&mut source, &mut file).map_err(|e| failed("cannot copy the object", e))
            });
            copied.and_then(|_| store.publish(&upload, &to, size, &replaces).map(drop)).inspect_err(|_| {
                let _ = store.remove_upload(&upload);
            })
        })
        .await
    }

    async fn make_directory(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        self.blocking(move |store| store.create_directories(key.as_str())).await
    }

    async fn remove_directory(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        self.blocking(move |store| {
            let (parent, name) = store.parent(key.as_str(), false)?;
            unlinkat(parent, name, UnlinkatFlags::RemoveDir)
                .map_err(|e| failed("cannot remove the directory", e))
        })
        .await
    }

    async fn start_upload(
        &self,
        _: &ObjectKey,
        part_size: u64,
        _: &Tags,
        _: Option<Checksum>,
        _: &Tries,
    ) -> Result<String> {
        self.blocking(move |store| store.create_upload(part_size)).await
    }

    async fn put_part(&self, _: &ObjectKey, upload: &str, part: PutPart) -> Result<String> {
        let upload = upload.to_owned();
        let index = part.index;
        self.blocking(move |store| store.write_part(&upload, index, &part.bytes)).await?;
        Ok(index.to_string())
    }

    async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        _: Vec<String>,
        size: u64,
        replaces: &Replaces,
    ) -> Result<Option<String>> {
        let (key, upload, replaces) = (key.clone(), upload.to_owned(), replaces.clone());
        self.blocking(move |store| store.publish(&upload, &key, size, &replaces).map(Some)).await
    }

    /// The file stays what it is when it gets its name. Its inode alone would not do: filesystems give it to the next file.
    async fn expected_etag_prefix(&self, upload: &str, _: &[String], size: u64) -> Result<Option<String>> {
        let upload = upload.to_owned();
        self.blocking(move |store| {
            let (file, _) = store.open_upload(&upload)?;
            resize(&file, size)?;
            // A filesystem far away decides now when the last bytes were written.
            file.sync_all().map_err(|e| failed("cannot sync the object", e))?;
            let stat = fstat(&file).map_err(|e| failed("cannot stat the upload", e))?;
            Ok(Some(tag(&stat)))
        })
        .await
    }

    async fn abort_upload(&self, _: &ObjectKey, upload: &str) -> Result<()> {
        let upload = upload.to_owned();
        self.blocking(move |store| store.remove_upload(&upload)).await
    }
}

/// Gives a file its size: its last blocks may be zeros that were left out. One that has it keeps its mtime.
fn resize(file: &File, size: u64) -> Result<()> {
    let stat = fstat(file).map_err(|e| failed("cannot stat the upload", e))?;
    if u64::try_from(stat.st_size) == Ok(size) {
        return Ok(());
    }
    file.set_len(size).map_err(|e| failed("cannot size the object", e))
}

/// Makes zeros of what is there, without taking room where the filesystem can do that.
fn punch_hole(file: &File, start: u64, length: u64) -> Result<()> {
    let place = |n: u64| {
        i64::try_from(n)
            .map_err(|e| Error::new(ErrorKind::TooLarge, "a part beyond the largest file").because(e))
    };
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, punch, place(start)?, place(length.max(1))?) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP) => {
            let zeros = vec![0; ZERO_BLOCK];
            let end = start + length;
            (start..end).step_by(ZERO_BLOCK).try_for_each(|at| {
                let length = (end - at).min(ZERO_BLOCK as u64) as usize;
                file.write_all_at(&zeros[..length], at).map_err(|e| failed("cannot write the part", e))
            })
        }
        Err(errno) => Err(failed("cannot write the part", errno)),
    }
}

/// The directory of uploads and puts under way.
fn uploads() -> String {
    format!("{CONTROL_PREFIX}/uploads")
}

/// Whether a process of this host has ended; one that nobody has reaped yet has.
fn has_ended(process: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process).join("stat")).unwrap_or_default();
    // The state follows the program's name, which is in parentheses (proc_pid_stat(5)).
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, None | Some('Z' | 'X'))
}

/// What names of uploads begin with: the host, so that a bucket on a shared filesystem is swept by the right one.
/// The process's id follows.
fn host_prefix() -> String {
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host: String = host.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).collect();
    format!("{host}-")
}

/// Where an upload's bytes are. Ids come from journals, which may be damaged.
fn upload_path(upload: &str) -> Result<String> {
    if upload.is_empty() || !upload.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Err(Error::new(ErrorKind::Malformed, format!("{upload:?} is not an upload's id")));
    }
    Ok(format!("{}/{upload}", uploads()))
}

fn failed(what: &str, error: impl Into<std::io::Error>) -> Error {
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

fn is_file(stat: &FileStat) -> bool {
    has_type(stat, SFlag::S_IFREG)
}

fn is_directory(stat: &FileStat) -> bool {
    has_type(stat, SFlag::S_IFDIR)
}

/// Whether a file is what is to be replaced.
fn check(replaces: &Replaces, found: Option<&FileStat>) -> Result<()> {
    let etag = found.map(tag);
    if replaces.allows(found.map(|_| etag.as_deref())) {
        return Ok(());
    }
    Err(conflict("cannot put the object in place"))
}

/// Inode, size and mtime: another content has another tag.
fn tag(stat: &FileStat) -> String {
    format!("\"{:x}-{:x}-{:x}.{:x}\"", stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
}

fn meta(key: ObjectKey, stat: &FileStat) -> ObjectMeta {
    let since = Duration::new(
        u64::try_from(stat.st_mtime).unwrap_or(0),
        u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
    );
    ObjectMeta {
        key,
        object_size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: SystemTime::UNIX_EPOCH + since,
        etag: Some(tag(stat)),
    }
}
