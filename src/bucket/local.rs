//! A local directory as a bucket.
//!
//! Written on the system's calls rather than on object_store's LocalFileSystem, which hides and refuses names
//! such as `a#1`, escapes others, and has no uploads that outlive a process.
//!
//! Uploads and puts are files under `.freightfs/uploads/`, renamed to their key when they are whole and synced.
//!
//! A directory may hang, as those of NFS do when their server is gone. Nothing can end a thread that waits for it, so each
//! has a share of its request's place in a lane, and nobody else gets the place before the thread has ended.

mod directory;
mod names;
mod owner;
mod parts;
mod rename;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::{FileStat, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use self::directory::{Directory, failed, is_directory, is_file, modified};
use self::names::{NamesLock, Naming};
pub(super) use self::owner::boot;
use self::owner::{Owner, remove_upload, upload_path, uploads};
use super::checksum::Checksum;
use super::client::Tries;
use super::key::{CONTROL_PREFIX, ObjectKey};
use super::limits::place;
use super::replaces::{Conditions, Replaces};
use super::reply::conflict;
use super::store::{Abilities, CopiedPart, CopyPart, Listing, ObjectMeta, Put, PutPart, Store, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::units::KIB;

/// Parts may be of any size; smaller ones are not worth a request.
const LEAST_PART: u64 = 64 * KIB;

/// Names that are looked up for one page of a listing.
const PAGE: usize = 10_000;

/// The directory of a bucket.
#[derive(Clone)]
pub(super) struct LocalStore {
    directory: Arc<Directory>,
    owner: Arc<Owner>,
    /// Of a request: gone when it was given up.
    waiting: Weak<()>,
    names: Arc<NamesLock>,
}

impl LocalStore {
    /// A store whose lock is waited for no longer than `timeout`.
    pub(super) fn open(path: &Path, timeout: Duration) -> Result<Self> {
        Ok(Self {
            directory: Arc::new(Directory::open(path)?),
            owner: Arc::default(),
            waiting: Weak::new(),
            names: Arc::new(NamesLock::new(path, timeout)),
        })
    }

    /// Runs `work` where it may block. Its store knows whether anybody still waits for it.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (waiting, place) = (Arc::new(()), place());
        let store = Self { waiting: Arc::downgrade(&waiting), ..self.clone() };
        let working = move || {
            let result = work(&store);
            drop(place);
            result
        };
        let joined = tokio::task::spawn_blocking(working).await;
        drop(waiting);
        joined.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the bucket panicked").because(e))?
    }

    /// The right to change names. What was given up meanwhile changes none: others may have by now.
    fn lock_names(&self) -> Result<Naming<'_>> {
        let locked = self.names.lock(&self.directory)?;
        match self.waiting.strong_count() {
            0 => Err(Error::new(ErrorKind::TimedOut, "the request was given up").transient()),
            _ => Ok(locked),
        }
    }

    /// What some names of a directory are.
    fn look_up(&self, prefix: Option<&ObjectKey>, names: &[&str]) -> Listing {
        let mut listing = Listing::default();
        for &name in names {
            let Ok(key) = prefix.map_or_else(|| ObjectKey::parse(name), |prefix| prefix.child(name)) else {
                self.directory.unshown.note(name);
                continue;
            };
            // Links that lead out, and what vanished meanwhile, are not shown.
            let Ok(Some(stat)) = self.directory.stat(key.as_str()) else { continue };
            if is_directory(&stat) {
                listing.prefixes.push(name.to_owned());
            } else if is_file(&stat) {
                listing.objects.push(meta(key, &stat));
            }
        }
        listing
    }

    fn create_upload(&self, upload: String) -> Result<String> {
        let path = upload_path(&upload)?;
        self.directory.create_directories(&uploads())?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY;
        self.directory.open_at(&path, flags).map_err(|e| failed("cannot create the upload", e))?;
        Ok(upload)
    }

    fn open_upload(&self, upload: &str, flags: OFlag) -> Result<File> {
        let opened = self.directory.open_at(&upload_path(upload)?, flags);
        Ok(opened.map_err(|e| failed("cannot open the upload", e))?.into())
    }

    /// Gives an upload its size and its name, durably, where that replaces what it is to replace. Returns the object's tag.
    fn publish(&self, upload: &str, key: &ObjectKey, size: u64, replaces: &Replaces) -> Result<String> {
        let file = self.open_upload(upload, OFlag::O_WRONLY)?;
        resize(&file, size)?;
        file.sync_all().map_err(|e| failed("cannot sync the object", e))?;
        let stat = fstat(&file).map_err(|e| failed("cannot stat the upload", e))?;
        let locked = self.lock_names()?;
        // Whoever makes a directory has the lock until it is synced.
        let (parent, name) = self.directory.parent(key.as_str(), true)?;
        check(replaces, self.directory.stat(key.as_str())?.as_ref())?;
        renameat(&self.directory.root, upload_path(upload)?.as_str(), &parent, name)
            .map_err(|e| failed("cannot put the object in place", e))?;
        drop(locked);
        File::from(parent).sync_all().map_err(|e| failed("cannot sync the object's directory", e))?;
        Ok(tag(&stat))
    }
}

#[async_trait::async_trait]
impl Store for LocalStore {
    fn abilities(&self) -> Abilities {
        let conditions = Conditions::ALL;
        Abilities {
            largest_copy: u64::MAX,
            conditions,
            returns_tags: true,
            copies_parts: true,
            least_part: LEAST_PART,
            ..Abilities::default()
        }
    }

    async fn sweep(&self, state: &str, kept: Vec<String>) -> Result<()> {
        let state = state.to_owned();
        self.blocking(move |store| store.owner.sweep(&store.directory, &state, &kept)).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        let key = key.clone();
        self.blocking(move |store| {
            Ok(store.directory.stat(key.as_str())?.filter(is_file).map(|stat| meta(key, &stat)))
        })
        .await
    }

    async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        let key = key.clone();
        self.blocking(move |store| {
            Ok(store.directory.stat(key.as_str())?.is_some_and(|stat| is_directory(&stat)))
        })
        .await
    }

    async fn list_page(
        &self,
        prefix: Option<&ObjectKey>,
        page: Option<String>,
    ) -> Result<(Listing, Option<String>)> {
        let prefix = prefix.cloned();
        // A page's token is the names that are left: no name has a slash.
        self.blocking(move |store| {
            let left = match page {
                Some(names) => names,
                None => store.directory.names(prefix.as_ref().map_or(".", ObjectKey::as_str))?.join("/"),
            };
            let is_own = |name: &&str| prefix.is_none() && *name == CONTROL_PREFIX;
            let mut names: Vec<_> = left.split_terminator('/').filter(|name| !is_own(name)).collect();
            let next = names.split_off(PAGE.min(names.len())).join("/");
            Ok((store.look_up(prefix.as_ref(), &names), (!next.is_empty()).then_some(next)))
        })
        .await
    }

    async fn list_all(&self, _: usize) -> Result<Option<Vec<ObjectMeta>>> {
        Ok(None)
    }

    async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>> {
        let key = key.clone();
        self.blocking(move |store| store.directory.names(key.as_str())).await
    }

    async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let (key, etag) = (key.clone(), etag.map(str::to_owned));
        self.blocking(move |store| {
            let opened = store.directory.open_at(key.as_str(), OFlag::O_RDONLY | OFlag::O_NONBLOCK);
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
            let upload = store.create_upload(store.owner.put_name(&store.directory, size)?)?;
            let written = store
                .open_upload(&upload, OFlag::O_WRONLY)
                .and_then(|file| parts::write(&file, 0, &put.bytes))
                .and_then(|()| store.publish(&upload, &key, size, &put.replaces));
            let written = written.inspect_err(|_| {
                let _ = remove_upload(&store.directory, &upload);
            });
            written.map(Some)
        })
        .await
    }

    async fn delete(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        let (key, replaces) = (key.clone(), replaces.clone());
        self.blocking(move |store| {
            let _locked = store.lock_names()?;
            let object = store.directory.stat(key.as_str())?;
            if object.is_some() {
                check(&replaces, object.as_ref())?;
            }
            let parent = store.directory.parent(key.as_str(), false);
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
                .directory
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
            let upload = store.create_upload(store.owner.put_name(&store.directory, size)?)?;
            let copied = store.open_upload(&upload, OFlag::O_WRONLY).and_then(|mut file| {
                // The standard library copies within the kernel where that is possible.
                std::io::copy(&mut source, &mut file).map_err(|e| failed("cannot copy the object", e))
            });
            copied.and_then(|_| store.publish(&upload, &to, size, &replaces).map(drop)).inspect_err(|_| {
                let _ = remove_upload(&store.directory, &upload);
            })
        })
        .await
    }

    async fn rename(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<bool> {
        let (from, to) = (from.clone(), to.clone());
        let (etag, replaces) = (etag.map(str::to_owned), replaces.clone());
        self.blocking(move |store| store.rename_now(&from, etag.as_deref(), &to, &replaces)).await
    }

    async fn make_directory(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        self.blocking(move |store| {
            let _locked = store.lock_names()?;
            store.directory.create_directories(key.as_str())
        })
        .await
    }

    async fn remove_directory(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        self.blocking(move |store| {
            let (parent, name) = store.directory.parent(key.as_str(), false)?;
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
        self.blocking(move |store| store.create_upload(store.owner.upload_name(&store.directory, part_size)?))
            .await
    }

    async fn put_part(&self, _: &ObjectKey, upload: &str, part: PutPart) -> Result<String> {
        let upload = upload.to_owned();
        let index = part.index;
        self.blocking(move |store| {
            let file = store.open_upload(&upload, OFlag::O_WRONLY)?;
            parts::write(&file, part.offset, &part.bytes)
        })
        .await?;
        Ok(index.to_string())
    }

    async fn copy_part(&self, _: &ObjectKey, upload: &str, part: CopyPart) -> Result<CopiedPart> {
        let upload = upload.to_owned();
        self.blocking(move |store| store.copy_part_now(&upload, &part)).await
    }

    async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        _: Vec<String>,
        size: u64,
        replaces: &Replaces,
        _: Option<u64>,
    ) -> Result<Option<String>> {
        let (key, upload, replaces) = (key.clone(), upload.to_owned(), replaces.clone());
        self.blocking(move |store| store.publish(&upload, &key, size, &replaces).map(Some)).await
    }

    /// The file stays what it is when it gets its name. Its inode alone would not do: filesystems give it to the next file.
    async fn expected_etag_prefix(&self, upload: &str, _: &[String], size: u64) -> Result<Option<String>> {
        let upload = upload.to_owned();
        self.blocking(move |store| {
            let file = store.open_upload(&upload, OFlag::O_WRONLY)?;
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
        self.blocking(move |store| remove_upload(&store.directory, &upload)).await
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
    ObjectMeta {
        key,
        object_size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: modified(stat),
        etag: Some(tag(stat)),
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::bucket::limits::in_lane;

    #[tokio::test]
    async fn what_was_given_up_changes_no_name_when_its_turn_comes() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::open(directory.path(), Duration::MAX).unwrap();
        let (key, other) = (ObjectKey::parse("k").unwrap(), ObjectKey::parse("other").unwrap());
        let put = || Put { bytes: Bytes::from_static(b"bytes"), ..Put::default() };
        store.put(&key, put()).await.unwrap();
        let upload = store.start_upload(&other, 5, &Tags::new(), None, &Tries::default()).await.unwrap();
        let locked = store.names.lock(&store.directory).unwrap();
        let anything = &Replaces::Anything;
        assert!(store.delete(&key, anything).now_or_never().is_none());
        assert!(store.put(&other, put()).now_or_never().is_none());
        assert!(
            store.complete_upload(&other, &upload, Vec::new(), 5, anything, None).now_or_never().is_none()
        );
        assert!(store.rename(&key, None, &other, anything).now_or_never().is_none());
        drop(locked);
        // Each thread has a store.
        while Arc::strong_count(&store.names) > 1 {
            tokio::task::yield_now().await;
        }
        assert!(store.head(&key).await.unwrap().is_some());
        assert_eq!(store.head(&other).await.unwrap(), None);
        assert_eq!(store.directory.names(&uploads()).unwrap(), [upload]);
    }

    #[tokio::test]
    async fn links_are_copied_instead_of_renamed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let store = LocalStore::open(directory.path(), Duration::MAX).unwrap();
        std::fs::create_dir(path("d")).unwrap();
        std::fs::write(path("one"), "bytes").unwrap();
        std::os::unix::fs::symlink("one", path("link")).unwrap();
        let key = |text| ObjectKey::parse(text).unwrap();
        let is_renamed =
            async |from, to| store.rename(&key(from), None, &key(to), &Replaces::Anything).await.unwrap();
        assert!(!is_renamed("link", "d/link").await);
        std::fs::hard_link(path("one"), path("two")).unwrap();
        assert!(!is_renamed("one", "two").await);
        std::fs::remove_file(path("two")).unwrap();
        assert!(is_renamed("one", "d/one").await);
        assert_eq!(std::fs::read_to_string(path("d/one")).unwrap(), "bytes");
    }

    #[tokio::test]
    async fn a_thread_that_nobody_waits_for_any_more_keeps_its_place() {
        let directory = std::env::temp_dir();
        let store = LocalStore::open(&directory, Duration::MAX).unwrap();
        let lane = Arc::new(Semaphore::new(1));
        let (release, hold) = std::sync::mpsc::channel::<()>();
        let hanging = store.blocking(move |_| {
            let _ = hold.recv();
            Ok(())
        });
        assert!(in_lane(&lane, hanging).now_or_never().is_none(), "it does not hang");
        assert_eq!(lane.available_permits(), 0);
        drop(release);
        in_lane(&lane, store.blocking(|_| Ok(()))).await.unwrap();
    }
}
