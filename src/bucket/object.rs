//! Objects of a bucket: looked up, listed, read, written, removed, copied.

use std::ops::Range;

use bytes::Bytes;
use tracing::warn;

use super::checksum::{SentTags, md5_etag};
use super::key::CONTROL_PREFIX;
use super::reply::conflict;
use super::store::Put;
use super::{Bucket, Listing, ObjectKey, ObjectMeta, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;

/// Bytes of an object that are read at once to be compared.
const PIECE: u64 = 8 * MIB;

/// How many times bytes are sent that arrive damaged.
pub(super) const SENDINGS: u32 = 4;

impl Bucket {
    /// What is known of an object; `None` when it is not there.
    pub async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        self.store().head(key).await.map_err(|e| self.named(e, key))
    }

    /// Whether there is any object below `key/`.
    pub async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        self.store().has_prefix(key).await.map_err(|e| self.named(e, key))
    }

    /// One level below `prefix`, or of the whole bucket. Our own files are left out.
    pub async fn list(&self, prefix: Option<&ObjectKey>) -> Result<Listing> {
        let mut whole = Listing::default();
        let mut page = None;
        loop {
            let (listing, next) = self.list_page(prefix, page).await?;
            whole.objects.extend(listing.objects);
            whole.prefixes.extend(listing.prefixes);
            if next.is_none() {
                return Ok(whole);
            }
            page = next;
        }
    }

    /// A page of [`list`](Self::list): the first one, or the one that the page before named. `None` names no further one.
    pub async fn list_page(
        &self,
        prefix: Option<&ObjectKey>,
        page: Option<String>,
    ) -> Result<(Listing, Option<String>)> {
        let listed = self.store().list_page(prefix, page).await;
        let (mut listing, next) =
            listed.map_err(|e| e.in_file(prefix.map_or(self.url().to_owned(), |p| self.url_of(p))))?;
        if prefix.is_none() {
            listing.prefixes.retain(|name| name != CONTROL_PREFIX);
        }
        Ok((listing, next))
    }

    /// All objects of the bucket by few requests, at whatever level; `None` when they are more than `limit`, or where the
    /// store has directories. Our own files are left out.
    pub async fn list_all(&self, limit: usize) -> Result<Option<Vec<ObjectMeta>>> {
        self.store().list_all(limit).await.map_err(|e| e.in_file(self.url()))
    }

    /// Bytes of an object, which must still have the tag `etag` when one is given.
    ///
    /// # Errors
    /// [`SourceChanged`](ErrorKind::SourceChanged) when it has another one.
    pub async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let wanted = range.end - range.start;
        let bytes = self.store().read(key, range, etag).await.map_err(|e| self.named(e, key))?;
        if bytes.len() as u64 != wanted {
            let what = format!("the store gave {} bytes instead of {wanted}", bytes.len());
            return Err(self.named(Error::new(ErrorKind::Io, what), key));
        }
        Ok(bytes)
    }

    /// The same by one request, handed over in pieces of so many bytes as they come, the last one with what is left.
    pub(super) async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        mut take: impl FnMut(Bytes) + Send,
    ) -> Result<()> {
        let read = self.store().read_pieces(key, range, etag, piece, &mut take).await;
        read.map_err(|e| self.named(e, key))
    }

    /// Writes a small object at once; for what is about objects, which waits for nothing. Returns its entity tag.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when there is something else than what is to be replaced.
    pub async fn put(&self, key: &ObjectKey, bytes: Bytes, replaces: &Replaces) -> Result<Option<String>> {
        self.put_now(key, bytes, &Tags::new(), replaces).await
    }

    /// Writes an object with these tags at once, when the limit on uploads allows it, and asks the store whether it is
    /// what was sent. Damaged bytes never take the place of what was there, where the store looks; where it does not,
    /// [`puts_by_upload`](Self::puts_by_upload) says so.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_tagged(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        tags: &Tags,
        replaces: &Replaces,
    ) -> Result<ObjectMeta> {
        let abilities = self.abilities();
        self.throttle(bytes.len()).await;
        let size = bytes.len() as u64;
        let etag = abilities.has_md5_etags.then(|| md5_etag(&bytes));
        let returned = self.put_now(key, bytes, tags, replaces).await?;
        let tags = SentTags { sent: etag, returned: returned.filter(|_| abilities.returns_tags) };
        self.verify(key, size, &tags).await
    }

    async fn put_now(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        tags: &Tags,
        replaces: &Replaces,
    ) -> Result<Option<String>> {
        self.check_writable()?;
        let abilities = self.abilities();
        let checksum = abilities.checks_puts.map(|checksum| (checksum, checksum.of(&bytes)));
        let replaces = self.looked_for(key, replaces, abilities.conditions.of_put(replaces)).await?;
        let put = Put { bytes, tags: tags.clone(), replaces, checksum };
        let mut sending = 0;
        loop {
            sending += 1;
            match self.store().put(key, put.clone()).await {
                Err(error) if error.kind() == ErrorKind::Damaged && sending < SENDINGS => {
                    warn!("{key} is sent again: {}", error.report());
                }
                // The answer to an earlier try of the same put may have been lost.
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    return match self.same_content(key, &put.bytes).await {
                        Ok(Some(meta)) => Ok(meta.etag),
                        _ => Err(self.named(error, key)),
                    };
                }
                put => return put.map_err(|e| self.named(e, key)),
            }
        }
    }

    /// The object, if it has these bytes.
    async fn same_content(&self, key: &ObjectKey, bytes: &Bytes) -> Result<Option<ObjectMeta>> {
        let Some(meta) = self.head(key).await?.filter(|meta| meta.object_size == bytes.len() as u64) else {
            return Ok(None);
        };
        let is_same =
            bytes.is_empty() || self.read(key, 0..meta.object_size, meta.etag.as_deref()).await? == *bytes;
        Ok(is_same.then_some(meta))
    }

    /// What the store is to be asked to replace: all of it where it looks itself, else anything, after we have looked.
    pub(super) async fn looked_for(
        &self,
        key: &ObjectKey,
        replaces: &Replaces,
        store_looks: bool,
    ) -> Result<Replaces> {
        if store_looks || *replaces == Replaces::Anything {
            return Ok(replaces.clone());
        }
        let meta = self.head(key).await?;
        if replaces.allows(meta.as_ref().map(|meta| meta.etag.as_deref())) {
            return Ok(Replaces::Anything);
        }
        Err(self.named(conflict("cannot write the object"), key))
    }

    /// Removes an object, whatever it is; one that is not there is no failure.
    pub async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.delete_if(key, &Replaces::Anything).await
    }

    /// Removes an object that has a tag; one that is not there is no failure.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when it has another tag.
    pub async fn delete_if(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        self.check_writable()?;
        let removed = async {
            let looks = self.abilities().conditions.removals;
            let replaces = self.looked_for(key, replaces, looks).await?;
            self.store().delete(key, &replaces).await
        };
        match removed.await {
            // Gone already, which is what was wanted.
            Err(error) if error.kind() == ErrorKind::Conflict && self.head(key).await?.is_none() => Ok(()),
            removed => removed.map_err(|e| self.named(e, key)),
        }
    }

    /// Copies an object within the bucket, by one request to the store.
    ///
    /// # Errors
    /// [`SourceChanged`](ErrorKind::SourceChanged) when it has another tag than `from` says,
    /// [`Conflict`](ErrorKind::Conflict) when there is something else than what is to be replaced.
    pub async fn copy(&self, from: &ObjectMeta, to: &ObjectKey, replaces: &Replaces) -> Result<ObjectMeta> {
        self.check_writable()?;
        let (size, etag) = (from.object_size, from.etag.as_deref());
        let looks = self.abilities().conditions.copies;
        if !looks {
            self.check_source(from).await?;
        }
        let copied = async {
            let replaces = self.looked_for(to, replaces, looks).await?;
            self.store().copy(&from.key, etag, to, &replaces).await
        };
        if let Err(error) = copied.await {
            if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::SourceChanged) {
                self.check_source(from).await?;
                // The answer to an earlier try of the same copy may have been lost.
                if let Some(meta) = self.head(to).await?.filter(|meta| !replaces.is(meta.etag.as_deref()))
                    && self.is_copy(from, &meta).await?
                {
                    return Ok(meta);
                }
            }
            return Err(self.named(error, &from.key));
        }
        self.verify(to, size, &SentTags::default()).await
    }

    /// Gives an object another name in one step, where the store has such a step; `None`, and nothing done, elsewhere.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub async fn rename(
        &self,
        from: &ObjectMeta,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<Option<ObjectMeta>> {
        self.check_writable()?;
        let renamed = self.store().rename(&from.key, from.etag.as_deref(), to, replaces).await;
        let is_renamed = renamed.map_err(|e| self.named(e, &from.key))?;
        Ok(is_renamed.then(|| ObjectMeta { key: to.clone(), ..from.clone() }))
    }

    /// Whether two objects have the same bytes. A copy of an object that was made of parts has another tag than that.
    pub async fn is_copy(&self, one: &ObjectMeta, other: &ObjectMeta) -> Result<bool> {
        if one.object_size != other.object_size || one.etag.is_some() && one.etag == other.etag {
            return Ok(one.object_size == other.object_size);
        }
        for range in pieces(one.object_size) {
            let (a, b) = tokio::try_join!(
                self.read(&one.key, range.clone(), one.etag.as_deref()),
                self.read(&other.key, range, other.etag.as_deref())
            )?;
            if a != b {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fails unless an object is still what it was.
    async fn check_source(&self, source: &ObjectMeta) -> Result<()> {
        match self.head(&source.key).await? {
            Some(meta) if meta.etag == source.etag => Ok(()),
            Some(_) => {
                let what = "the object changed since it was looked up";
                Err(self.named(Error::new(ErrorKind::SourceChanged, what), &source.key))
            }
            None => Err(self.named(Error::new(ErrorKind::NotFound, "the object is gone"), &source.key)),
        }
    }

    /// Makes an empty directory where the store has directories; elsewhere there is nothing to do.
    pub async fn make_directory(&self, key: &ObjectKey) -> Result<()> {
        self.check_writable()?;
        self.store().make_directory(key).await.map_err(|e| self.named(e, key))
    }

    /// Removes an empty directory where the store has directories.
    pub async fn remove_directory(&self, key: &ObjectKey) -> Result<()> {
        self.check_writable()?;
        self.store().remove_directory(key).await.map_err(|e| self.named(e, key))
    }
}

/// An object's bytes in the ranges in which they are read.
fn pieces(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size.div_ceil(PIECE)).map(move |n| n * PIECE..size.min((n + 1) * PIECE))
}
