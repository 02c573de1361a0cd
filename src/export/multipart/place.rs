//! Putting an object in place, once, over what it replaces and nothing else; and finding it there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::digests::{Digests, Hashes, Wanted};
use super::log::{DigestName, Placed, UploadLog};
use super::uploads::{Uploads, abort, blocking};
use crate::bucket::{Bucket, ObjectKey, ObjectMeta, Replaces, Tags, random};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::units::MIB;

/// How many times a small object is sent whose store does not answer.
const PUT_TRIES: u32 = 2;

/// Bytes of an object that are read at once, to compare it with what was sent.
const PIECE: u64 = 8 * MIB;

/// All bytes of an object, hashed, and at the store or in memory.
pub(in crate::export) struct Sent {
    pub(in crate::export) size: u64,
    pub(in crate::export) hashes: Hashes,
    pub(in crate::export) body: Body,
}

/// Where they are.
pub(in crate::export) enum Body {
    /// So few that one put sends them.
    Whole(Bytes),
    /// At the store, in so many parts.
    Parts(Arc<UploadLog>, usize),
}

/// Where an object goes.
pub(in crate::export) struct Target<'a> {
    pub(in crate::export) bucket: &'a Bucket,
    pub(in crate::export) uploads: &'a Uploads,
    pub(in crate::export) key: &'a ObjectKey,
    pub(in crate::export) tags: &'a Tags,
    pub(in crate::export) replaces: &'a Replaces,
    /// Whether the store was asked to put the object in place.
    pub(in crate::export) is_tried: AtomicBool,
}

impl Sent {
    fn placed(&self, meta: ObjectMeta) -> Placed {
        self.hashes.clone().placed(self.size, meta.etag)
    }
}

impl Target<'_> {
    /// Puts the object in place, unless it is there already. `may` is the last question before that: whether this host
    /// is still the one that makes it.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when something else than `replaces` is there, which stays.
    pub(in crate::export) async fn place(
        &self,
        sent: &Sent,
        may: impl Future<Output = Result<()>>,
    ) -> Result<Placed> {
        match &sent.body {
            Body::Whole(bytes) => self.put(sent, bytes, may).await,
            Body::Parts(log, count) => {
                let placed = self.complete(sent, log, *count, may).await?;
                let in_place = placed.clone();
                blocking(log, move |log| log.place(in_place)).await?;
                Ok(placed)
            }
        }
    }

    async fn put(&self, sent: &Sent, bytes: &Bytes, may: impl Future<Output = Result<()>>) -> Result<Placed> {
        may.await?;
        failpoint::pass(Step::ObjectPlace)?;
        self.is_tried.store(true, Ordering::SeqCst);
        let mut tries = 1;
        loop {
            let error = match self.put_once(bytes).await {
                Ok(meta) => return Ok(sent.placed(meta)),
                Err(error) => error,
            };
            // An earlier process, or a request whose answer was lost, may have done it.
            match self.has(bytes).await {
                Ok(Some(meta)) => return Ok(sent.placed(meta)),
                // The client does not send a conditional put again: it does not know its bytes.
                Ok(None) if error.is_transient() && self.is_conditional() && tries < PUT_TRIES => tries += 1,
                _ => return Err(error),
            }
        }
    }

    /// Whether the store, or who looks before the request, sees that something else was written meanwhile.
    fn is_conditional(&self) -> bool {
        *self.replaces != Replaces::Anything
    }

    async fn put_once(&self, bytes: &Bytes) -> Result<ObjectMeta> {
        match self.bucket.puts_by_upload(bytes.len() as u64) {
            true => self.put_by_upload(bytes).await,
            false => self.bucket.put_tagged(self.key, bytes.clone(), self.tags, self.replaces).await,
        }
    }

    /// Puts the object by an upload of one part.
    async fn put_by_upload(&self, bytes: &Bytes) -> Result<ObjectMeta> {
        let (bucket, part_size) = (self.bucket, self.bucket.part_size_for(bytes.len() as u64)?);
        // A log of its own: no later process goes on with it.
        let log_id = format!("put-{}", random());
        let log = self.uploads.begin(bucket, self.key, self.tags, part_size, &log_id).await?;
        let put = bucket.put_by_upload(self.key, &log.name().id, bytes.clone(), self.replaces).await;
        match &put {
            Ok(_) => log.remove(),
            Err(_) => abort(bucket, &log).await,
        }
        put
    }

    /// The object, if it has these bytes and is not the one that was to be replaced.
    async fn has(&self, bytes: &Bytes) -> Result<Option<ObjectMeta>> {
        let Some(meta) = self.bucket.head(self.key).await? else { return Ok(None) };
        let before = matches!(self.replaces, Replaces::Tag(tag) if meta.etag.as_ref() == Some(tag));
        if before || *self.replaces == Replaces::Anything || meta.object_size != bytes.len() as u64 {
            return Ok(None);
        }
        if bytes.is_empty() {
            return Ok(Some(meta));
        }
        let there = self.bucket.read(self.key, 0..meta.object_size, meta.etag.as_deref()).await?;
        Ok((there == *bytes).then_some(meta))
    }

    async fn complete(
        &self,
        sent: &Sent,
        log: &Arc<UploadLog>,
        count: usize,
        may: impl Future<Output = Result<()>>,
    ) -> Result<Placed> {
        let ids = log.ids(count)?;
        if let Some(meta) = in_place(self.bucket, log, sent.size).await? {
            return Ok(sent.placed(meta));
        }
        if let Some(mark) = self.bucket.expected_etag_prefix(&log.name().id, &ids, sent.size).await? {
            blocking(log, move |log| log.complete(&mark)).await??;
        }
        may.await?;
        failpoint::pass(Step::ObjectPlace)?;
        self.is_tried.store(true, Ordering::SeqCst);
        let upload = &log.name().id;
        match self
            .bucket
            .complete_upload(self.key, upload, ids, sent.size, self.replaces, sent.hashes.crc64())
            .await
        {
            Ok(meta) => Ok(sent.placed(meta)),
            // The store may have done it, and its answer been lost: asked again, it knows no such upload, or finds
            // another object than the one to replace.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Conflict) => {
                self.outcome(sent).await?.ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The object that is in place, after a request to put it there whose answer says nothing, or was lost.
    pub(in crate::export) async fn outcome(&self, sent: &Sent) -> Result<Option<Placed>> {
        let found = match &sent.body {
            Body::Whole(bytes) => self.has(bytes).await?,
            Body::Parts(log, _) => match in_place(self.bucket, log, sent.size).await? {
                None => self.has_content(sent).await?,
                found => found,
            },
        };
        Ok(found.map(|meta| sent.placed(meta)))
    }

    /// The object, if it has what was sent by its SHA-256 and is not the one that was to be replaced: not every store's entity
    /// tags tell that before.
    async fn has_content(&self, sent: &Sent) -> Result<Option<ObjectMeta>> {
        let before = |meta: &ObjectMeta| matches!(self.replaces, Replaces::Tag(tag) if meta.etag.as_ref() == Some(tag));
        let found = with_content(self.bucket, self.key, sent.size, &sent.hashes.sha256).await?;
        Ok(found.filter(|meta| !before(meta)))
    }
}

/// The object, if it has that content, read in pieces.
pub(in crate::export) async fn with_content(
    bucket: &Bucket,
    key: &ObjectKey,
    size: u64,
    sha256: &str,
) -> Result<Option<ObjectMeta>> {
    let Some(meta) = bucket.head(key).await?.filter(|meta| meta.object_size == size) else {
        return Ok(None);
    };
    let (mut digest, mut at) = (Sha256::new(), 0);
    while at < size {
        let end = size.min(at + PIECE);
        digest.update(bucket.read(key, at..end, meta.etag.as_deref()).await?);
        at = end;
    }
    Ok((hex::encode(digest.finalize()) == sha256).then_some(meta))
}

/// The object that an earlier process put in place by this upload, as far as the log tells without the source.
pub(in crate::export) async fn find(bucket: &Bucket, log: &Arc<UploadLog>) -> Result<Option<Placed>> {
    if let Some(placed) = log.placed() {
        return Ok(Some(placed));
    }
    let Some(size) = log.sent_bytes().filter(|_| log.completing().is_some()) else { return Ok(None) };
    let wanted = Wanted { crc64: log.digest(DigestName::Crc64nvme).bytes == size, chunks: None };
    let digests = Digests::start(Some(log), wanted);
    if !digests.cover(size) {
        return Ok(None);
    }
    let Some(meta) = in_place(bucket, log, size).await? else { return Ok(None) };
    Ok(Some(digests.finish().await?.placed(size, meta.etag)))
}

/// The object, if it is the one that this upload was about to make.
async fn in_place(bucket: &Bucket, log: &UploadLog, size: u64) -> Result<Option<ObjectMeta>> {
    let Some(mark) = log.completing() else { return Ok(None) };
    let is_ours = |meta: &ObjectMeta| {
        meta.object_size == size && meta.etag.as_ref().is_some_and(|etag| etag.starts_with(&mark))
    };
    Ok(bucket.head(&log.name().key).await?.filter(is_ours))
}

/// An object that is not at its key any more.
pub(in crate::export) fn gone(bucket: &Bucket, key: &ObjectKey) -> Error {
    Error::new(ErrorKind::NotFound, "the object is gone").in_file(bucket.url_of(key))
}
