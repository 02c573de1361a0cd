//! What is set on files of a bucket and stores have no place for: modes, owners, times, extended attributes.
//!
//! They are kept in the bucket itself, one JSON object for each directory among freightfs's own files, so that they
//! last over mounts and other hosts see them. Changes are written at most once a second, and at the end.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

use super::{AttrChange, ObjectName, Vfs};
use crate::bucket::{Bucket, ObjectKey, Replaces};
use crate::error::{Error, ErrorKind, Result};

/// How long attributes that were read from a bucket are believed: other hosts may change them.
const AGE: Duration = Duration::from_secs(30);

/// Directories whose attributes are kept in memory, besides those with changes.
const DIRECTORIES_KEPT: usize = 256;

/// How often changes are written.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of all extended attributes of a file, names and values (Linux: XATTR_SIZE_MAX).
const MAX_XATTRS: usize = 64 << 10;

/// Where extended attributes that users set begin; ours are not set.
const USER_PREFIX: &str = "user.";
const OWN_PREFIX: &str = "user.freightfs.";

/// A bucket, and a directory in it or its top.
type DirectoryName = (String, Option<ObjectKey>);

/// What is set on one file or directory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct FileAttributes {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) mode: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) modified: Option<Timestamp>,
    /// Values in hexadecimal.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    /// The object's tag, once it is known: attributes of an object that somebody replaced are not the new one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
}

/// A directory's document.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Document {
    version: u32,
    directory: String,
    /// By name; directories end with `/`.
    files: BTreeMap<String, FileAttributes>,
}

struct Directory {
    files: BTreeMap<String, FileAttributes>,
    loaded: Instant,
    dirty: bool,
}

/// The attributes of all buckets, as far as they were asked for.
#[derive(Default)]
pub(super) struct Attributes {
    directories: Mutex<HashMap<DirectoryName, Directory>>,
}

impl Attributes {
    /// Changes what is known of a file already, if anything is set on it.
    fn change_known(&self, object: &ObjectName, change: impl FnOnce(&mut FileAttributes) -> bool) {
        let (directory, name) = place(object, false);
        let mut directories = self.directories.lock();
        if let Some(directory) = directories.get_mut(&directory)
            && let Some(file) = directory.files.get_mut(&name)
        {
            directory.dirty |= change(file);
        }
    }

    /// Bytes were written: a time that was set before does not hold any more.
    pub(super) fn written_after(&self, object: &ObjectName) {
        self.change_known(object, |file| file.modified.take().is_some());
    }

    /// A new content is being published: its tag is not known yet.
    pub(super) fn republished(&self, object: &ObjectName) {
        self.change_known(object, |file| file.etag.take().is_some());
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

impl Vfs {
    /// What is set on a file or directory; reads the directory's document when it is not known or old.
    async fn file_attributes(
        &self,
        object: &ObjectName,
        is_directory: bool,
    ) -> Result<Option<FileAttributes>> {
        let (directory, name) = place(object, is_directory);
        self.load(&directory).await?;
        let directories = self.attributes.directories.lock();
        Ok(directories.get(&directory).and_then(|d| d.files.get(&name).cloned()))
    }

    /// Changes what is set on a file or directory.
    async fn change_attributes(
        &self,
        object: &ObjectName,
        is_directory: bool,
        change: impl FnOnce(&mut FileAttributes),
    ) -> Result<()> {
        self.bucket(&object.0)?.check_writable()?;
        let (directory, name) = place(object, is_directory);
        self.load(&directory).await?;
        let mut directories = self.attributes.directories.lock();
        if let Some(directory) = directories.get_mut(&directory) {
            change(directory.files.entry(name.clone()).or_default());
            directory.files.retain(|n, file| *n != name || *file != FileAttributes::default());
            directory.dirty = true;
        }
        Ok(())
    }

    async fn load(&self, name: &DirectoryName) -> Result<()> {
        let known = |directories: &HashMap<DirectoryName, Directory>| {
            directories.get(name).is_some_and(|d| d.dirty || d.loaded.elapsed() < AGE)
        };
        if known(&self.attributes.directories.lock()) {
            return Ok(());
        }
        let bucket = self.bucket(&name.0)?;
        let file = bucket.read_control(&document_name(name.1.as_ref())).await?;
        let files = match file.map(|file| serde_json::from_slice::<Document>(&file.bytes)) {
            None => BTreeMap::new(),
            Some(Ok(document)) => document.files,
            Some(Err(error)) => {
                warn!(bucket = name.0, "attributes of a directory are damaged and not used: {error}");
                BTreeMap::new()
            }
        };
        let mut directories = self.attributes.directories.lock();
        if !known(&directories) {
            if directories.len() >= DIRECTORIES_KEPT {
                directories.retain(|_, d| d.dirty || d.loaded.elapsed() < AGE / 2);
            }
            directories.insert(name.clone(), Directory { files, loaded: Instant::now(), dirty: false });
        }
        Ok(())
    }

    /// Puts what was set on a file over `attr`. What cannot be read is not put there.
    pub(super) async fn overridden(&self, object: &ObjectName, attr: super::Attr) -> super::Attr {
        self.overlaid(object, false, attr).await
    }

    /// The same for an object that the store has with this tag.
    pub(super) async fn overridden_object(
        &self,
        object: &ObjectName,
        etag: Option<&str>,
        attr: super::Attr,
    ) -> super::Attr {
        let over = self.overlaid(object, false, attr.clone()).await;
        let mut replaced = false;
        self.attributes.change_known(object, |file| {
            let known = file.etag.as_deref();
            replaced = known.is_some() && known != etag;
            let learnt = known.is_none() && etag.is_some();
            if learnt {
                file.etag = etag.map(str::to_owned);
            }
            learnt
        });
        if replaced {
            self.forget_attributes(object, false).await;
            return attr;
        }
        over
    }

    /// What was set on a directory.
    pub(super) async fn overridden_directory(&self, object: &ObjectName, attr: super::Attr) -> super::Attr {
        self.overlaid(object, true, attr).await
    }

    async fn overlaid(&self, object: &ObjectName, is_directory: bool, mut attr: super::Attr) -> super::Attr {
        match self.file_attributes(object, is_directory).await {
            Ok(Some(set)) => {
                attr.mode = set.mode.unwrap_or(attr.mode);
                attr.uid = set.uid.unwrap_or(attr.uid);
                attr.gid = set.gid.unwrap_or(attr.gid);
                attr.modified = set.modified.map_or(attr.modified, SystemTime::from);
            }
            Ok(None) => {}
            Err(error) => warn!(key = %object.1, "attributes cannot be read: {}", error.report()),
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
        let forgotten =
            self.change_attributes(object, is_directory, |set| *set = FileAttributes::default()).await;
        if let Err(error) = forgotten {
            warn!(key = %object.1, "attributes cannot be removed: {}", error.report());
        }
    }

    /// A file has another name now.
    pub(super) async fn move_attributes(&self, from: &ObjectName, to: &ObjectName) -> Result<()> {
        let set = self.file_attributes(from, false).await?.unwrap_or_default();
        self.change_attributes(to, false, |target| *target = FileAttributes { etag: None, ..set }).await?;
        self.change_attributes(from, false, |source| *source = FileAttributes::default()).await
    }

    /// Whether a file bears the time by which rsync marks what it keeps of an interrupted transfer.
    pub(super) async fn is_marked_partial(&self, object: &ObjectName) -> Result<bool> {
        let set = self.file_attributes(object, false).await?;
        Ok(set.and_then(|set| set.modified).is_some_and(|modified| modified.as_second() == 0))
    }

    /// The value of an extended attribute that a user set.
    pub(super) async fn user_xattr(
        &self,
        object: &ObjectName,
        is_directory: bool,
        name: &str,
    ) -> Result<Option<Vec<u8>>> {
        let set = self.file_attributes(object, is_directory).await?;
        Ok(set.and_then(|set| hex::decode(set.xattrs.get(name)?).ok()))
    }

    /// The names of the extended attributes that users set.
    pub(super) async fn user_xattr_names(
        &self,
        object: &ObjectName,
        is_directory: bool,
    ) -> Result<Vec<String>> {
        let set = self.file_attributes(object, is_directory).await?;
        Ok(set.map(|set| set.xattrs.into_keys().collect()).unwrap_or_default())
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
        if !name.starts_with(USER_PREFIX) || name.starts_with(OWN_PREFIX) {
            let what =
                format!("the extended attribute {name:?} cannot be set; those that begin with user. can");
            return Err(Error::unsupported(what));
        }
        let set = self.file_attributes(object, is_directory).await?.unwrap_or_default();
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

    /// Writes what was changed, now.
    pub async fn save_attributes(&self) {
        let dirty: Vec<DirectoryName> = {
            let directories = self.attributes.directories.lock();
            directories.iter().filter(|(_, d)| d.dirty).map(|(name, _)| name.clone()).collect()
        };
        for name in dirty {
            let Ok(bucket) = self.bucket(&name.0) else { continue };
            let Some(files) = self.taken_for_saving(&name) else { continue };
            if let Err(error) = save(bucket, name.1.as_ref(), files).await {
                warn!(bucket = name.0, "attributes could not be written: {}", error.report());
                if let Some(directory) = self.attributes.directories.lock().get_mut(&name) {
                    directory.dirty = true;
                }
            }
        }
    }

    /// The files of a directory, which counts as saved from now on.
    fn taken_for_saving(&self, name: &DirectoryName) -> Option<BTreeMap<String, FileAttributes>> {
        let mut directories = self.attributes.directories.lock();
        let directory = directories.get_mut(name)?;
        (directory.dirty, directory.loaded) = (false, Instant::now());
        Some(directory.files.clone())
    }

    /// Writes changes every second, for ever.
    pub async fn keep_saving_attributes(&self) {
        loop {
            tokio::time::sleep(SAVE_INTERVAL).await;
            self.save_attributes().await;
        }
    }
}

async fn save(
    bucket: &Bucket,
    directory: Option<&ObjectKey>,
    files: BTreeMap<String, FileAttributes>,
) -> Result<()> {
    let name = document_name(directory);
    if files.is_empty() {
        return bucket.delete_control(&name).await;
    }
    let directory = directory.map_or_else(String::new, |key| key.as_str().to_owned());
    let document = Document { version: 1, directory, files };
    let json = serde_json::to_vec(&document)
        .map_err(|e| Error::new(ErrorKind::Internal, "attributes cannot be encoded").because(e))?;
    bucket.put_control(&name, Bytes::from(json), &Replaces::Anything).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_survive_and_names_do_not_collide() {
        let set = FileAttributes {
            mode: Some(0o640),
            modified: Some("2021-03-04T05:06:07.123456789Z".parse().unwrap()),
            xattrs: BTreeMap::from([("user.a".to_owned(), "00ff".to_owned())]),
            ..FileAttributes::default()
        };
        let document = Document {
            version: 1,
            directory: "a".into(),
            files: BTreeMap::from([("f".into(), set.clone())]),
        };
        let json = serde_json::to_vec(&document).unwrap();
        assert_eq!(serde_json::from_slice::<Document>(&json).unwrap().files["f"], set);
        let key = |text| ObjectKey::parse(text).unwrap();
        let names = [document_name(None), document_name(Some(&key("a"))), document_name(Some(&key("a/b")))];
        assert!(names.iter().all(|name| name.len() < 60) && names[0] != names[1] && names[1] != names[2]);
    }
}
