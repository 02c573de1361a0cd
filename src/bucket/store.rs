//! What every store can do, be it a directory or far away.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;

use super::checksum::Checksum;
use super::client::Tries;
use super::key::ObjectKey;
use super::pending::PendingUploads;
use super::replaces::{Conditions, Replaces};
use crate::error::{Error, Result};

/// Tags of an object: names and values, as S3 has them.
pub type Tags = BTreeMap<String, String>;

/// What is known of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectMeta {
    /// Its key.
    pub key: ObjectKey,
    /// Its bytes.
    pub object_size: u64,
    /// When it was last written.
    pub modified: SystemTime,
    /// Its entity tag: another content has another tag.
    pub etag: Option<String>,
}

/// One level of a bucket's keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    /// The objects at this level.
    pub objects: Vec<ObjectMeta>,
    /// The names, without slashes, below which there are more.
    pub prefixes: Vec<String>,
}

/// What a store can do.
#[derive(Clone, Debug, Default)]
pub(super) struct Abilities {
    /// The header by which it copies only one content of an object.
    pub(super) copies_if: Option<&'static str>,
    /// Whether it is somewhere else, and requests to it can fail.
    pub(super) is_remote: bool,
    /// Whether objects can have tags.
    pub(super) has_tags: bool,
    /// Bytes of the largest object that it copies with one request.
    pub(super) largest_copy: u64,
    /// What it cannot do besides, in words.
    pub(super) lacks: Option<&'static str>,
    /// Checksums that stores of this sort may check.
    pub(super) checksums: &'static [Checksum],
    /// Known after a probe: whether nothing can be written.
    pub(super) is_read_only: bool,
    /// Known after a probe: whether entity tags are MD5s, and those of objects made of parts follow from the parts' tags.
    pub(super) has_md5_etags: bool,
    /// Known after a probe: whether puts and completions return the entity tag that the object is then seen with.
    pub(super) returns_tags: bool,
    /// Known after a probe: whether it lists the uploads under way of a key.
    pub(super) lists_uploads: bool,
    /// Known after a probe: who it says has started our uploads.
    pub(super) initiator: Option<String>,
    /// Known after a probe.
    pub(super) conditions: Conditions,
    /// Known after a probe: by which header it refuses damaged parts.
    pub(super) checks_parts: Option<Checksum>,
    /// Known after a probe: by which header it refuses damaged objects that are sent at once.
    pub(super) checks_puts: Option<Checksum>,
    /// Known after a probe: whether it refuses to put an object together that has not the CRC-64/NVME that is sent with that.
    pub(super) checks_objects: bool,
    /// Known after a probe: whether it copies ranges of objects as parts, and says their CRC-64/NVME.
    pub(super) copies_parts: bool,
    /// Why copied parts are not used any more.
    pub(super) copies_failed: Option<String>,
    /// Bytes of the smallest part that is not the last one.
    pub(super) least_part: u64,
}

impl Abilities {
    /// What the store cannot do, in words.
    pub(super) fn limitation(&self) -> Option<String> {
        if self.is_read_only {
            return Some("read-only: its store denies writing with these credentials".to_owned());
        }
        let unconditional = self.is_remote && !self.conditions.are_all();
        let unconditional = unconditional.then_some(
            "the store does not refuse every write that would replace another host's object, so it is looked for before",
        );
        let unverified = self.is_remote && !self.has_md5_etags && self.checks_parts.is_none();
        let unverified = unverified.then_some("uploads are verified by size only");
        let unlisted = self.has_tags && !self.lists_uploads;
        let unlisted = unlisted.then_some("an upload that begins while the daemon is killed is left over");
        let uncopied = self.copies_failed.as_ref().map(|why| format!("everything is sent: {why}"));
        let words = self.lacks.into_iter().chain(unconditional).chain(unverified).chain(unlisted);
        let words: Vec<_> = words.map(str::to_owned).chain(uncopied).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }
}

/// An object that is to be written at once.
#[derive(Clone, Debug, Default)]
pub(super) struct Put {
    pub(super) bytes: Bytes,
    pub(super) tags: Tags,
    pub(super) replaces: Replaces,
    /// The checksum that is sent with it, in a header.
    pub(super) checksum: Option<(Checksum, String)>,
}

/// A part that is to be sent.
#[derive(Clone, Debug)]
pub(super) struct PutPart {
    /// Counted from 0.
    pub(super) index: usize,
    /// Where it stands in the object.
    pub(super) offset: u64,
    pub(super) bytes: Bytes,
    /// The checksum that is sent with it, in a header.
    pub(super) checksum: Option<(Checksum, String)>,
}

/// A range of an object, which must still have that entity tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopySource {
    /// The object.
    pub key: ObjectKey,
    /// Its entity tag.
    pub etag: String,
    /// The bytes of it.
    pub range: Range<u64>,
}

/// A part that the store is to copy.
#[derive(Clone, Debug)]
pub(super) struct CopyPart {
    /// Counted from 0.
    pub(super) index: usize,
    /// Where it stands in the object that is made.
    pub(super) offset: u64,
    pub(super) source: CopySource,
    /// Whether the range is all of the source: then it may be smaller than the smallest object of which the store copies
    /// ranges.
    pub(super) is_whole: bool,
}

/// A part that was copied.
#[derive(Clone, Debug)]
pub(super) struct CopiedPart {
    /// By this it is put together.
    pub(super) id: String,
    /// What the store says of its bytes.
    pub(super) crc64: Option<u64>,
}

/// A place of objects by key. Errors do not name the object.
#[async_trait::async_trait]
pub(super) trait Store: Send + Sync {
    /// What it can do, as far as that is known without asking.
    fn abilities(&self) -> Abilities;

    /// What is known of an object; `None` when it is not there.
    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>>;

    /// Whether there is any object below `key/`.
    async fn has_prefix(&self, key: &ObjectKey) -> Result<bool>;

    /// A page of one level below `prefix`, or of the whole store, and the token of the next page.
    async fn list_page(
        &self,
        prefix: Option<&ObjectKey>,
        page: Option<String>,
    ) -> Result<(Listing, Option<String>)>;

    /// All objects, at whatever level; `None` when they are more than `limit`, or where the store has directories.
    async fn list_all(&self, limit: usize) -> Result<Option<Vec<ObjectMeta>>>;

    /// The names of the objects directly below a key.
    async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>>;

    /// Bytes of an object, which must still have the tag `etag` when one is given.
    async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes>;

    /// The same by one request, handed over in pieces of so many bytes as they come, the last one with what is left.
    async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<()>;

    /// Writes an object at once; returns its tag.
    async fn put(&self, key: &ObjectKey, put: Put) -> Result<Option<String>>;

    /// Removes an object; one that is not there is no failure.
    async fn delete(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()>;

    /// Copies an object, which must still have the tag `etag` when one is given, to another key.
    async fn copy(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<()>;

    /// Gives an object, which must still have the tag `etag` when one is given, another name in one step; says whether the
    /// store has such a step. The object keeps its tag.
    async fn rename(
        &self,
        _from: &ObjectKey,
        _etag: Option<&str>,
        _to: &ObjectKey,
        _replaces: &Replaces,
    ) -> Result<bool> {
        Ok(false)
    }

    /// Makes an empty directory, where the store has directories.
    async fn make_directory(&self, key: &ObjectKey) -> Result<()>;

    /// Removes an empty directory, where the store has directories.
    async fn remove_directory(&self, key: &ObjectKey) -> Result<()>;

    /// Starts an upload whose parts will be sent with that checksum; returns its id. `tries` counts the requests that may
    /// each have started one.
    async fn start_upload(
        &self,
        key: &ObjectKey,
        part_size: u64,
        tags: &Tags,
        checksum: Option<Checksum>,
        tries: &Tries,
    ) -> Result<String>;

    /// The uploads under way of exactly this key.
    async fn pending_uploads(&self, _: &ObjectKey) -> Result<PendingUploads> {
        Err(Error::unsupported("this store does not list its uploads"))
    }

    /// Whether a part of an upload has arrived.
    async fn has_part(&self, _: &ObjectKey, _: &str) -> Result<bool> {
        Err(Error::unsupported("this store does not list its uploads"))
    }

    /// Sends a part; returns the id by which it is put together.
    async fn put_part(&self, key: &ObjectKey, upload: &str, part: PutPart) -> Result<String>;

    /// The CRC-64/NVME of an object that has this tag, where the store keeps it.
    async fn crc64(&self, _: &ObjectKey, _: Option<&str>) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Copies a range of an object as a part of another one.
    async fn copy_part(&self, _: &ObjectKey, _: &str, _: CopyPart) -> Result<CopiedPart> {
        Err(Error::unsupported("this store copies no parts"))
    }

    /// What the entity tag of the object begins with that these parts, `size` bytes together, will make, where that is
    /// known before.
    async fn expected_etag_prefix(&self, upload: &str, parts: &[String], size: u64)
    -> Result<Option<String>>;

    /// Makes the object out of its parts; returns its tag. The store compares the CRC-64/NVME of all of it, where one is given.
    async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        parts: Vec<String>,
        object_size: u64,
        replaces: &Replaces,
        crc64: Option<u64>,
    ) -> Result<Option<String>>;

    /// Gives an upload up; one that is not there any more is no failure.
    async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()>;

    /// Removes what dead processes left of uploads, but for those `kept` and those that another state directory than
    /// `state` may continue.
    async fn sweep(&self, state: &str, kept: Vec<String>) -> Result<()>;
}
