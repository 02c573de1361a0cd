//! Our own files in a bucket: leases, attributes, what a probe writes.

use bytes::Bytes;

use super::key::{CONTROL_PREFIX, ObjectKey};
use super::{Bucket, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;

/// Largest of our own files that is read: the attributes of about a million files.
const MAX_OWN_FILE: u64 = 128 * MIB;

/// One of our own files in a bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnFile {
    /// What is in it.
    pub bytes: Bytes,
    /// Its entity tag, which its next version can be made to replace.
    pub etag: Option<String>,
}

impl OwnFile {
    /// What the next version of a file replaces that was read as this, or was not there.
    pub fn replaced(file: Option<&Self>) -> Replaces {
        Replaces::found(file.map(|file| file.etag.as_deref()))
    }
}

/// The key of one of our own files, by its name below [`CONTROL_PREFIX`].
pub(super) fn own_key(name: &str) -> ObjectKey {
    ObjectKey::internal(&format!("{CONTROL_PREFIX}/{name}"))
}

impl Bucket {
    /// The key of one of our own files, by its name below [`CONTROL_PREFIX`].
    pub fn control_key(name: &str) -> ObjectKey {
        own_key(name)
    }

    /// Reads one of our own files, by its name below [`CONTROL_PREFIX`]; `None` when it is not there.
    pub async fn read_control(&self, name: &str) -> Result<Option<OwnFile>> {
        self.read_control_within(name, MAX_OWN_FILE).await
    }

    /// The same of a file of at most `limit` bytes.
    ///
    /// # Errors
    /// [`TooLarge`](ErrorKind::TooLarge) for a larger one.
    pub async fn read_control_within(&self, name: &str, limit: u64) -> Result<Option<OwnFile>> {
        let key = own_key(name);
        match self.head(&key).await? {
            Some(meta) if meta.object_size == 0 => Ok(Some(OwnFile { bytes: Bytes::new(), etag: meta.etag })),
            Some(meta) if meta.object_size > limit => {
                let what = format!("one of freightfs's own files has {} bytes", meta.object_size);
                Err(self.named(Error::new(ErrorKind::TooLarge, what), &key))
            }
            Some(meta) => {
                let bytes = self.read(&key, 0..meta.object_size, meta.etag.as_deref()).await?;
                Ok(Some(OwnFile { bytes, etag: meta.etag }))
            }
            None => Ok(None),
        }
    }

    /// Writes one of our own files; returns its entity tag.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_control(&self, name: &str, bytes: Bytes, replaces: &Replaces) -> Result<Option<String>> {
        self.put(&own_key(name), bytes, replaces).await
    }

    /// Writes one of our own files unless it is there with another content; says whether it is there with this one.
    pub async fn create_control(&self, name: &str, bytes: Bytes) -> Result<bool> {
        match self.put_control(name, bytes, &Replaces::Nothing).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The names of our own files in a directory of them.
    pub async fn list_control(&self, name: &str) -> Result<Vec<String>> {
        let key = own_key(name);
        self.store().list_names(&key).await.map_err(|e| self.named(e, &key))
    }

    /// Removes one of our own files, whatever is in it.
    pub async fn delete_control(&self, name: &str) -> Result<()> {
        self.delete_control_if(name, &Replaces::Anything).await
    }

    /// Removes one of our own files that has a tag.
    ///
    /// # Errors
    /// As [`delete_if`](Self::delete_if).
    pub async fn delete_control_if(&self, name: &str, replaces: &Replaces) -> Result<()> {
        self.delete_if(&own_key(name), replaces).await
    }
}
