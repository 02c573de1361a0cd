//! What is set on files of a bucket and stores have no place for: modes, owners, times, extended attributes.
//!
//! They are kept in the bucket itself, one JSON object for each directory among freightfs's own files, so that they
//! last over mounts and other hosts see them. Changes are written at most once a second, and at the end.
//!
//! They belong to the content that they were set for, which its entity tag names. What is set on a content that is being
//! written, or put in place by a job, is pending: it becomes the object's when the job succeeds, under the tag that the
//! object then has, and nobody's when it fails.

mod directory;
mod saving;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tracing::{debug, warn};

pub use self::directory::fuzz_attributes;
use self::directory::{Directory, Document, FileAttributes, Pending};
use super::{Attr, AttrChange, ObjectName, Vfs};
use crate::bucket::ObjectKey;
use crate::error::{Error, ErrorKind, Result};
use crate::export::JobState;
use crate::export::moves::Renamed;

/// How long attributes that were read from a bucket are believed: other hosts may change them.
const AGE: Duration = Duration::from_secs(30);

/// How often what a store answers is asked for again that does not fit together.
const READINGS: u32 = 4;

/// Directories whose attributes are kept in memory, besides those with changes.
const DIRECTORIES_KEPT: usize = 256;

/// Bytes of all extended attributes of a file, names and values (Linux: XATTR_SIZE_MAX).
const MAX_XATTRS: usize = 64 << 10;

/// Bytes of an extended attribute's name (Linux: XATTR_NAME_MAX).
const MAX_XATTR_NAME: usize = 255;

/// Where extended attributes that users set begin; ours are not set.
const USER_PREFIX: &str = "user.";
const OWN_PREFIX: &str = "user.freightfs.";

/// A bucket, and a directory in it or its top.
type DirectoryName = (String, Option<ObjectKey>);

/// The attributes of all buckets, as far as they were asked for.
#[derive(Default)]
pub(super) struct Attributes {
    directories: Mutex<HashMap<DirectoryName, Directory>>,
    /// By bucket, held while its changes are written, so that who waits for it knows that they are.
    saving: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// Whose attributes are changed.
enum Place {
    /// A content that is being written or put in place, by the job.
    Pending(Option<String>),
    /// The object with that tag, or a directory.
    There(Option<String>),
}

impl Place {
    /// Whether it is the place of what is being made now: by a job, or written still.
    fn is_that_of(&self, being_made: Option<Option<String>>) -> bool {
        match self {
            Self::Pending(job) => being_made.as_ref() == Some(job),
            Self::There(_) => being_made.is_none(),
        }
    }
}

/// A file's place: its directory and its name there, with `/` at the end for a directory.
fn place(object: &ObjectName, is_directory: bool) -> (DirectoryName, String) {
    let (bucket, key) = object;
    let name = if is_directory { format!("{}/", key.file_name()) } else { key.file_name().to_owned() };
    ((bucket.clone(), key.parent()), name)
}

/// The name of a directory's document among our own files. Hashed, so that it is short and no directory of its own.
fn document_name(directory: Option<&ObjectKey>) -> String {
    let key = directory.map_or("", ObjectKey::as_str);
    format!("attributes/{}.json", &hex::encode(Sha256::digest(key.as_bytes()))[..32])
}

/// Whether users may set an extended attribute of that name.
fn is_user_xattr(name: &str) -> bool {
    name.starts_with(USER_PREFIX)
        && !name.starts_with(OWN_PREFIX)
        && name.len() <= MAX_XATTR_NAME
        && !name.contains('\0')
}

impl Attributes {
    /// Changes what is set on a content that is being made; `change` tells whether it did. What no job puts in place
    /// yet is in no document.
    fn change_pending(&self, object: &ObjectName, change: impl FnOnce(&mut Pending) -> bool) {
        let (directory, name) = place(object, false);
        let mut directories = self.directories.lock();
        if let Some(directory) = directories.get_mut(&directory)
            && let Some(pending) = directory.pending.get_mut(&name)
            && change(pending)
            && pending.job.is_some()
        {
            directory.mark(&name);
        }
    }

    /// Bytes were written: a time that was set before does not hold any more.
    pub(super) fn written_after(&self, object: &ObjectName) {
        self.change_pending(object, |pending| pending.written().modified.take().is_some());
    }

    /// A job puts the content in place that was written, or has done so before: what is set on it is the object's when
    /// it succeeds. `publish` makes the content one that is not written any more, so that nobody finds one without the other.
    pub(super) fn published_by(&self, object: &ObjectName, job: &str, publish: impl FnOnce()) {
        let (directory, name) = place(object, false);
        let mut directories = self.directories.lock();
        publish();
        let Some(directory) = directories.get_mut(&directory) else { return };
        let Some(pending) = directory.pending.get_mut(&name) else { return };
        let set = pending.next.take().unwrap_or_else(|| std::mem::take(&mut pending.set));
        *pending = Pending { job: Some(job.to_owned()), ..Pending::of_written(set) };
        if !pending.set.is_empty() {
            directory.mark(&name);
        }
    }

    /// Moves what is set on a content that is being written.
    pub(super) fn move_pending(&self, from: &ObjectName, to: &ObjectName) {
        let (mut directories, (from, to)) = (self.directories.lock(), (place(from, false), place(to, false)));
        let moved = directories.get_mut(&from.0).and_then(|directory| directory.pending.remove(&from.1));
        if let Some(directory) = directories.get_mut(&to.0) {
            directory.pending.remove(&to.1);
            if let Some(mut pending) = moved {
                pending.set.changed = Some(Timestamp::now());
                directory.pending.insert(to.1, pending);
            }
        }
    }
}

impl Vfs {
    /// Reads a directory's document when it is not known or old.
    async fn load(&self, name: &DirectoryName) -> Result<()> {
        let loaded = || self.attributes.directories.lock().get(name).map(|directory| directory.loaded);
        let before = loaded();
        if before.is_some_and(|at| at.elapsed() < AGE) {
            return Ok(());
        }
        let (document, found) = match self.read_document(name).await {
            // What is set here is known all the same.
            Err(error) if before.is_some() => {
                debug!(bucket = name.0, directory = directory_key(name), "{}", error.report());
                return Ok(());
            }
            read => read?,
        };
        let mut directories = self.attributes.directories.lock();
        match directories.get_mut(name) {
            // Written or read again meanwhile: what was read here may be older.
            Some(known) if Some(known.loaded) != before => {}
            Some(known) => known.merge(document, found),
            None => {
                if directories.len() >= DIRECTORIES_KEPT {
                    directories.retain(|_, d| d.is_needed() || d.loaded.elapsed() < AGE / 2);
                }
                directories.insert(name.clone(), Directory::new(document, found));
            }
        }
        Ok(())
    }

    /// A directory's document and its tag, `None` where there is none. One that is damaged is as good as empty, and so that
    /// it is not one that arrived damaged, it is read again.
    async fn read_document(
        &self,
        name: &DirectoryName,
    ) -> Result<(Option<Document>, Option<Option<String>>)> {
        let bucket = self.bucket(&name.0)?;
        let mut readings = 1;
        loop {
            let Some(file) = bucket.read_control(&document_name(name.1.as_ref())).await? else {
                return Ok((None, None));
            };
            match Document::parse(&file.bytes, directory_key(name)) {
                Ok(document) => return Ok((Some(document), Some(file.etag))),
                Err(error) if readings < READINGS => {
                    debug!(directory = directory_key(name), "read again: {}", error.report());
                    readings += 1;
                }
                Err(error) if error.kind() == ErrorKind::Malformed => {
                    warn!(bucket = name.0, directory = directory_key(name), "{}", error.report());
                    return Ok((None, Some(file.etag)));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The job that puts a content in place, or `None` for one that is being written; nothing for what is there.
    fn being_made(&self, object: &ObjectName) -> Option<Option<String>> {
        if self.draft(object).is_some() {
            return Some(None);
        }
        self.jobs.active(&object.0, &object.1).map(|job| Some(job.id()))
    }

    /// The tag of the object that is there.
    async fn tag_of(&self, object: &ObjectName) -> Result<Option<String>> {
        let recent = self.recent.get(object).filter(|_| self.jobs.newest(&object.0, &object.1).is_none());
        let meta = match recent {
            Some(meta) => Some(meta),
            None => self.bucket(&object.0)?.head(&object.1).await?,
        };
        meta.map(|meta| meta.etag).ok_or_else(|| super::tree::no_entry(object.1.as_str()))
    }

    /// The same, of which two look-ups have said one thing: what is set for a tag is lost where the object has another.
    async fn certain_tag_of(&self, object: &ObjectName) -> Result<Option<String>> {
        // What a listing had some seconds ago is not one of them.
        self.recent.forget(object);
        let mut known = self.tag_of(object).await?;
        for _ in 1..READINGS {
            let again = self.tag_of(object).await?;
            if again == known {
                return Ok(known);
            }
            known = again;
        }
        let what = "the object is replaced all the time";
        Err(Error::new(ErrorKind::Conflict, what).in_file(object.1.as_str()))
    }

    /// Whether it is a status that only its job has, which is nobody's to change.
    fn has_live_status(&self, (bucket, key): &ObjectName) -> bool {
        self.status_job(bucket, key).is_some()
    }

    async fn place_of(&self, object: &ObjectName, is_directory: bool) -> Result<Place> {
        if is_directory {
            return Ok(Place::There(None));
        }
        if self.has_live_status(object) {
            return Ok(Place::Pending(None));
        }
        match self.being_made(object) {
            Some(job) => Ok(Place::Pending(job)),
            None => self.certain_tag_of(object).await.map(Place::There),
        }
    }

    /// Gives what succeeded jobs have put in place to the objects, and takes away what is nobody's any more.
    fn settle_pending(&self, name: &DirectoryName) {
        let mut directories = self.attributes.directories.lock();
        let Some(directory) = directories.get_mut(name) else { return };
        for (file, pending) in std::mem::take(&mut directory.pending) {
            let is_open = self.is_open(name, &file);
            let status = pending.job.as_ref().and_then(|id| self.jobs.job(id)).map(|job| job.status());
            match (&pending.job, status.as_ref().map(|status| status.status)) {
                (Some(_), Some(JobState::Success)) => {
                    let etag = status.and_then(|status| status.etag);
                    if is_open {
                        let next = pending.next.unwrap_or_else(|| pending.set.of_new_content());
                        directory.pending.insert(file.clone(), Pending::of_written(next));
                    }
                    directory.commit(file, FileAttributes { etag, ..pending.set });
                }
                (Some(_), Some(state)) if state.is_final() => {
                    directory.mark(&file);
                    if is_open {
                        let next = pending.next.unwrap_or(pending.set);
                        directory.pending.insert(file, Pending::of_written(next));
                    }
                }
                _ => drop(directory.pending.insert(file, pending)),
            }
        }
    }

    /// Takes away what is pending under a name for a job that this mount does not know: another host's, or one that was
    /// forgotten. It is not what is being made here.
    fn drop_foreign(&self, directory: &mut Directory, name: &str) {
        let job = directory.pending.get(name).and_then(|pending| pending.job.as_ref());
        if job.is_some_and(|id| self.jobs.job(id).is_none()) {
            directory.pending.remove(name);
            directory.mark(name);
        }
    }

    /// Whether somebody has a file of a directory open, or waits for its own name.
    fn is_open(&self, directory: &DirectoryName, file: &str) -> bool {
        let key = match &directory.1 {
            Some(prefix) => prefix.child(file),
            None => ObjectKey::parse(file),
        };
        key.is_ok_and(|key| self.drafts.named(&(directory.0.clone(), key)).is_some())
    }

    /// Changes what is set on a file or directory.
    async fn change_attributes(
        &self,
        object: &ObjectName,
        is_directory: bool,
        change: impl Fn(&mut FileAttributes),
    ) -> Result<()> {
        self.bucket(&object.0)?.check_writable()?;
        let (directory, name) = place(object, is_directory);
        self.load(&directory).await?;
        let (place, mut directories) = loop {
            let place = self.place_of(object, is_directory).await?;
            self.settle_pending(&directory);
            let directories = self.attributes.directories.lock();
            // It may have been published since, and then another place is right. Nothing is while this is locked.
            if is_directory || place.is_that_of(self.being_made(object)) || self.has_live_status(object) {
                break (place, directories);
            }
        };
        let Some(directory) = directories.get_mut(&directory) else { return Ok(()) };
        let now = Some(Timestamp::now());
        let apply = |set: &mut FileAttributes| {
            change(set);
            set.changed = now;
        };
        match place {
            Place::Pending(job) => {
                self.drop_foreign(directory, &name);
                let pending = directory.pending.entry(name.clone()).or_default();
                if job.is_none() {
                    apply(pending.written());
                    return Ok(());
                }
                pending.job = pending.job.take().or(job);
                apply(&mut pending.set);
            }
            Place::There(etag) => {
                let set = directory.files.entry(name.clone()).or_default();
                if !set.is_of(etag.as_deref()) {
                    *set = FileAttributes::default();
                }
                apply(set);
                set.etag = etag;
                // Somebody has it open to write and has not begun.
                if let Some(pending) = directory.pending.get_mut(&name) {
                    apply(pending.written());
                }
            }
        }
        directory.mark(&name);
        Ok(())
    }

    /// What is set on a file or directory, for those who ask for more than stat shows.
    async fn file_attributes(&self, object: &ObjectName, is_directory: bool) -> Result<FileAttributes> {
        let (directory, name) = place(object, is_directory);
        self.load(&directory).await?;
        let (being_made, known) = self.known_attributes(object, &directory, &name, is_directory);
        match known {
            known if being_made => Ok(known.unwrap_or_default()),
            Some(set) if is_directory => Ok(set),
            Some(set) if set.is_of(self.tag_of(object).await?.as_deref()) => Ok(set),
            _ => Ok(FileAttributes::default()),
        }
    }

    /// Whether a content of a name is being made, and what is set on that, or else on what is there.
    fn known_attributes(
        &self,
        object: &ObjectName,
        directory: &DirectoryName,
        name: &str,
        is_directory: bool,
    ) -> (bool, Option<FileAttributes>) {
        let being_made = || if is_directory { None } else { self.being_made(object) };
        loop {
            let made = being_made();
            self.settle_pending(directory);
            let directories = self.attributes.directories.lock();
            // A job that has ended meanwhile has left what was pending to be settled.
            if made == being_made() {
                let known = directories.get(directory).and_then(|directory| match &made {
                    Some(job) => directory.pending.get(name).map(|pending| pending.shown(job.is_none())),
                    None => directory.files.get(name),
                });
                return (made.is_some(), known.cloned());
            }
        }
    }

    /// Somebody opens a file to write: until its content is published, what is set on it is pending. A file that is
    /// written anew keeps its mode, owner and extended attributes, as on a disk.
    pub(super) async fn begin_attributes(&self, object: &ObjectName) {
        let (directory, name) = place(object, false);
        let begun = async {
            self.load(&directory).await?;
            self.settle_pending(&directory);
            let known = self.attributes.directories.lock().get_mut(&directory).and_then(|directory| {
                self.drop_foreign(directory, &name);
                (!directory.pending.contains_key(&name)).then(|| directory.files.get(&name).cloned())
            });
            let set = match known {
                None => return Ok(()),
                Some(None) => FileAttributes::default(),
                Some(Some(set)) => match self.certain_tag_of(object).await {
                    Ok(etag) if set.is_of(etag.as_deref()) => set.of_new_content(),
                    Ok(_) => FileAttributes::default(),
                    Err(error) if error.kind() == ErrorKind::NotFound => FileAttributes::default(),
                    Err(error) => return Err(error),
                },
            };
            if let Some(directory) = self.attributes.directories.lock().get_mut(&directory) {
                directory.pending.entry(name).or_insert(Pending::of_written(set));
            }
            Ok(())
        };
        if let Err(error) = begun.await {
            warn!(key = %object.1, "attributes cannot be read: {}", error.report());
        }
    }

    /// The mode that a file gets at its creation. Only one that is not that of all files is kept.
    pub(super) fn set_created_mode(&self, object: &ObjectName, mode: u16) {
        let mode = mode & !self.settings.umask;
        if mode != 0o644 & !self.settings.umask {
            self.attributes.change_pending(object, |pending| {
                pending.written().mode = Some(mode);
                false
            });
        }
    }

    /// The mode that a directory gets at its creation.
    pub(super) async fn set_directory_mode(&self, object: &ObjectName, mode: u16) -> Result<()> {
        let mode = mode & !self.settings.umask;
        if mode == 0o755 & !self.settings.umask {
            return Ok(());
        }
        self.change_attributes(object, true, |set| set.mode = Some(mode)).await
    }

    /// Puts what was set on a content that is being made over `attr`. What cannot be read is not put there.
    pub(super) async fn overridden(&self, object: &ObjectName, attr: Attr) -> Attr {
        self.overlaid(object, false, attr, |directory, name| {
            self.known_attributes(object, directory, name, false).1
        })
        .await
    }

    /// The same for an object that the store has with this tag.
    pub(super) async fn overridden_object(
        &self,
        object: &ObjectName,
        etag: Option<&str>,
        attr: Attr,
    ) -> Attr {
        let of_object = |directory: &DirectoryName, name: &str| {
            self.settle_pending(directory);
            let mut directories = self.attributes.directories.lock();
            let directory = directories.get_mut(directory)?;
            let set = directory.files.get_mut(name).filter(|set| set.is_of(etag))?;
            let is_learnt = set.etag.is_none() && etag.is_some();
            set.etag = etag.map(str::to_owned);
            let set = set.clone();
            if is_learnt {
                directory.mark(name);
            }
            Some(set)
        };
        self.overlaid(object, false, attr, of_object).await
    }

    /// What was set on a directory.
    pub(super) async fn overridden_directory(&self, object: &ObjectName, attr: Attr) -> Attr {
        self.overlaid(object, true, attr, |directory, name| {
            self.known_attributes(object, directory, name, true).1
        })
        .await
    }

    async fn overlaid(
        &self,
        object: &ObjectName,
        is_directory: bool,
        mut attr: Attr,
        find: impl FnOnce(&DirectoryName, &str) -> Option<FileAttributes>,
    ) -> Attr {
        let (directory, name) = place(object, is_directory);
        if let Err(error) = self.load(&directory).await {
            warn!(key = %object.1, "attributes cannot be read: {}", error.report());
            return attr;
        }
        if let Some(set) = find(&directory, &name) {
            attr.mode = set.mode.unwrap_or(attr.mode);
            attr.uid = set.uid.unwrap_or(attr.uid);
            attr.gid = set.gid.unwrap_or(attr.gid);
            attr.modified = set.modified.map_or(attr.modified, SystemTime::from);
            attr.changed = set.changed.map_or(attr.changed, |at| attr.changed.max(at.into()));
        }
        attr
    }

    /// Remembers what was set on a file or directory.
    pub(super) async fn remember(
        &self,
        object: &ObjectName,
        is_directory: bool,
        change: &AttrChange,
    ) -> Result<()> {
        let modified = change.modified.map(Timestamp::try_from).transpose();
        let modified = modified.map_err(|e| Error::new(ErrorKind::Malformed, "not a time").because(e))?;
        if change.mode.is_none() && change.uid.is_none() && change.gid.is_none() && modified.is_none() {
            return Ok(());
        }
        self.change_attributes(object, is_directory, |set| {
            set.mode = change.mode.or(set.mode);
            set.uid = change.uid.or(set.uid);
            set.gid = change.gid.or(set.gid);
            set.modified = modified.or(set.modified);
        })
        .await
    }

    /// A file or directory is gone.
    pub(super) async fn forget_attributes(&self, object: &ObjectName, is_directory: bool) {
        let (directory, name) = place(object, is_directory);
        if let Err(error) = self.load(&directory).await {
            return warn!(key = %object.1, "attributes cannot be removed: {}", error.report());
        }
        if let Some(directory) = self.attributes.directories.lock().get_mut(&directory) {
            let pending = directory.pending.remove(&name);
            if directory.files.remove(&name).is_some() || pending.is_some_and(|p| !p.set.is_empty()) {
                directory.mark(&name);
            }
        }
    }

    /// What is set on an object that is about to be copied to another name; `None` when nothing is.
    pub(super) async fn attributes_to_move(&self, from: &ObjectName) -> Result<Option<FileAttributes>> {
        let set = self.file_attributes(from, false).await?;
        Ok((!set.is_empty()).then_some(set))
    }

    /// An object has got another name, with what was set on it. It keeps its time, which that of a copy is not.
    pub(super) async fn move_attributes(
        &self,
        to: &ObjectName,
        mut set: Option<FileAttributes>,
        renamed: Option<Renamed>,
    ) -> Result<()> {
        self.recent.forget(to);
        // What is to be published under that name has its own already.
        if self.being_made(to).is_some() {
            return Ok(());
        }
        if let Some(Renamed { from, to }) =
            renamed.filter(|renamed| renamed.from.modified != renamed.to.modified)
            && let Ok(modified) = Timestamp::try_from(from.modified)
            && to.etag.is_some()
        {
            set.get_or_insert_default().modified.get_or_insert(modified);
        }
        let Some(set) = set else {
            self.forget_attributes(to, false).await;
            return Ok(());
        };
        self.change_attributes(to, false, |target| *target = set.clone()).await
    }

    /// Makes sure that what is set on files beside `object` is known.
    pub(super) async fn load_attributes(&self, object: &ObjectName) -> Result<()> {
        self.load(&place(object, false).0).await
    }

    /// Whether a file bears the time by which rsync marks what it keeps of an interrupted transfer.
    pub(super) async fn is_marked_partial(&self, object: &ObjectName) -> Result<bool> {
        let set = self.file_attributes(object, false).await?;
        Ok(set.modified.is_some_and(|modified| modified.as_second() == 0))
    }

    /// The value of an extended attribute that a user set.
    pub(super) async fn user_xattr(
        &self,
        object: &ObjectName,
        is_directory: bool,
        name: &str,
    ) -> Result<Option<Vec<u8>>> {
        if !is_user_xattr(name) {
            return Ok(None);
        }
        let set = self.file_attributes(object, is_directory).await?;
        Ok(set.xattrs.get(name).and_then(|value| hex::decode(value).ok()))
    }

    /// The names of the extended attributes that users set.
    pub(super) async fn user_xattr_names(
        &self,
        object: &ObjectName,
        is_directory: bool,
    ) -> Result<Vec<String>> {
        Ok(self.file_attributes(object, is_directory).await?.xattrs.into_keys().collect())
    }

    /// Sets or, without a value, removes an extended attribute. `exists` says whether it must be there (or not).
    /// Returns `false` when it is not there and should be.
    pub(super) async fn change_user_xattr(
        &self,
        object: &ObjectName,
        is_directory: bool,
        name: &str,
        value: Option<&[u8]>,
        exists: Option<bool>,
    ) -> Result<bool> {
        if !is_user_xattr(name) {
            let what =
                format!("the extended attribute {name:?} cannot be set; those that begin with user. can");
            return Err(Error::unsupported(what));
        }
        let set = self.file_attributes(object, is_directory).await?;
        let there = set.xattrs.contains_key(name);
        match exists {
            Some(true) if !there => return Ok(false),
            Some(false) if there => {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("{name:?} is set already")));
            }
            _ => {}
        }
        let others = set.xattrs.iter().filter(|(n, _)| *n != name).map(|(n, v)| n.len() + v.len() / 2);
        if others.sum::<usize>() + name.len() + value.map_or(0, <[u8]>::len) > MAX_XATTRS {
            let what = format!("the extended attributes of a file have at most {MAX_XATTRS} bytes");
            return Err(Error::new(ErrorKind::NoSpace, what));
        }
        self.change_attributes(object, is_directory, |set| match value {
            Some(value) => drop(set.xattrs.insert(name.to_owned(), hex::encode(value))),
            None => drop(set.xattrs.remove(name)),
        })
        .await?;
        Ok(true)
    }
}

/// A directory's key as its document has it; empty for the top.
fn directory_key(name: &DirectoryName) -> &str {
    name.1.as_ref().map_or("", ObjectKey::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_documents_do_not_collide() {
        let key = |text| ObjectKey::parse(text).unwrap();
        let names = [document_name(None), document_name(Some(&key("a"))), document_name(Some(&key("a/b")))];
        assert!(names.iter().all(|name| name.len() < 60) && names[0] != names[1] && names[1] != names[2]);
    }
}
