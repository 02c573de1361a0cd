//! Copies within a bucket.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use tracing::debug;

use super::log::{Part, UploadLog};
use super::memory::PartMemory;
use super::parts::MAX_PARTS_IN_FLIGHT;
use super::uploads::{Uploads, abort};
use crate::bucket::{Bucket, CopySource, Crc64, ObjectKey, ObjectMeta, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::units::GIB;

/// How many times as large as parts that are sent those are that the store copies: nothing holds them in memory. Builds with
/// debug assertions make no difference, so that tests need no large objects.
const COPIED_PARTS: u64 = if cfg!(debug_assertions) { 1 } else { 64 };

/// Largest part that a store takes (S3 User Guide, "Amazon S3 multipart upload limits").
const MAX_PART_SIZE: u64 = 5 * GIB;

/// Copies an object to another key of its bucket: within the store where it does that, by one request or in parts, else in
/// parts that this process reads and sends. What such a copy leaves in a crash, under the log `log_id`, is given up by the next mount. Returns
/// what was made.
pub(in crate::export) async fn copy(
    uploads: &Uploads,
    (bucket, memory): (&Bucket, &PartMemory),
    source: &ObjectMeta,
    to: &ObjectKey,
    replaces: &Replaces,
    log_id: &str,
) -> Result<ObjectMeta> {
    if bucket.can_copy(source.object_size) {
        return bucket.copy(source, to, replaces).await;
    }
    let part_size = bucket.part_size_for(source.object_size)?;
    if let Some((etag, crc64)) = known(bucket, source).await? {
        let part_size = (part_size * COPIED_PARTS).min(MAX_PART_SIZE);
        let log = uploads.begin(bucket, to, &Tags::new(), part_size, log_id).await?;
        let made = copy_in_store(bucket, (source, &etag, crc64), &log, replaces).await;
        match ended(bucket, &log, made).await {
            Err(error) if is_worth_reading(&error) => {
                debug!(key = %source.key, "it is read and sent instead of copied: {}", error.report());
            }
            made => return made,
        }
    }
    let log = uploads.begin(bucket, to, &Tags::new(), part_size, log_id).await?;
    let made = copy_parts((bucket, memory), source, &log, replaces).await;
    ended(bucket, &log, made).await
}

/// Removes the log of an upload that was completed, or gives the upload up.
async fn ended(bucket: &Bucket, log: &UploadLog, made: Result<ObjectMeta>) -> Result<ObjectMeta> {
    match &made {
        Ok(_) => log.remove(),
        Err(_) => abort(bucket, log).await,
    }
    made
}

/// The entity tag and the checksum of an object that the store can copy in parts. Without the checksum nobody could say
/// that the copy is one: no byte of it is seen here.
async fn known(bucket: &Bucket, source: &ObjectMeta) -> Result<Option<(String, u64)>> {
    if !bucket.copies_parts() {
        return Ok(None);
    }
    let crc64 = match bucket.crc64_of(source).await {
        // Who may read an object need not be allowed to ask for its checksum, which can take another key.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => None,
        crc64 => crc64?,
    };
    Ok(source.etag.clone().zip(crc64))
}

/// A part has no conflict but that its source is another object by now.
fn source_changed(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Conflict => {
            let what = "the object changed while it was copied";
            Error::new(ErrorKind::SourceChanged, what).because(error)
        }
        _ => error,
    }
}

/// Whether what the store did not copy may be read and sent: not what was in its place, which stays, and not a store that
/// has to be asked again.
fn is_worth_reading(error: &Error) -> bool {
    let is_changed = matches!(error.kind(), ErrorKind::Conflict | ErrorKind::SourceChanged);
    error.kind() == ErrorKind::Damaged || !error.is_transient() && !is_changed
}

/// Makes an object of parts that the store copies, and compares the checksum of all of them.
async fn copy_in_store(
    bucket: &Bucket,
    (source, etag, crc64): (&ObjectMeta, &str, u64),
    log: &Arc<UploadLog>,
    replaces: &Replaces,
) -> Result<ObjectMeta> {
    let (part_size, to) = (log.name().part_size, &log.name().key);
    let (size, parts) = (source.object_size, source.object_size.div_ceil(part_size) as usize);
    let copies = stream::iter((0..parts).map(|index| async move {
        let start = index as u64 * part_size;
        let range = start..size.min(start + part_size);
        let from = CopySource { key: source.key.clone(), etag: etag.to_owned(), range };
        failpoint::pass(Step::PartSend)?;
        let copied = bucket.copy_range(to, &log.name().id, index, start, &from).await;
        let (id, crc64) = copied.map_err(source_changed)?;
        log.finished(index, Part { offset: Some(start), length: crc64.length(), id });
        Ok::<_, Error>(crc64)
    }));
    let copied = copies
        .buffered(MAX_PARTS_IN_FLIGHT)
        .try_fold(Crc64::default(), |whole, part| async move { Ok(whole.then(part)) });
    if copied.await?.value() != crc64 {
        let what = "the store has copied something else than it says to have";
        bucket.forget_copies(what);
        return Err(Error::new(ErrorKind::Damaged, what).in_file(bucket.url_of(&source.key)));
    }
    let ids = log.ids(parts)?;
    bucket.complete_upload(to, &log.name().id, ids, size, replaces, Some(crc64)).await
}

async fn copy_parts(
    (bucket, memory): (&Bucket, &PartMemory),
    source: &ObjectMeta,
    log: &Arc<UploadLog>,
    replaces: &Replaces,
) -> Result<ObjectMeta> {
    let (part_size, to) = (log.name().part_size, &log.name().key);
    let parts = source.object_size.div_ceil(part_size) as usize;
    stream::iter((0..parts).map(|index| async move {
        let start = index as u64 * part_size;
        let end = (start + part_size).min(source.object_size);
        let reading = bucket.read(&source.key, start..end, source.etag.as_deref());
        let bytes = memory.hold(end - start, reading).await?;
        failpoint::pass(Step::PartSend)?;
        let id = bucket.put_part(to, &log.name().id, index, start, bytes).await?;
        log.finished(index, Part { offset: Some(start), length: end - start, id });
        Ok::<_, Error>(())
    }))
    .buffer_unordered(MAX_PARTS_IN_FLIGHT)
    .try_collect::<()>()
    .await?;
    let (ids, size) = (log.ids(parts)?, source.object_size);
    bucket.complete_upload(to, &log.name().id, ids, size, replaces, None).await
}
