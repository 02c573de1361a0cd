//! Copies within a bucket.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};

use super::log::{Part, UploadLog};
use super::memory::PartMemory;
use super::parts::MAX_PARTS_IN_FLIGHT;
use super::uploads::{Uploads, abort};
use crate::bucket::{Bucket, ObjectKey, ObjectMeta, Replaces, Tags};
use crate::error::{Error, Result};
use crate::failpoint::{self, Step};

/// Copies an object to another key of its bucket: within the store where it does that, else in parts that this process
/// reads and sends. What such a copy leaves in a crash, under the log `log_id`, is given up by the next mount. Returns
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
    let log = uploads.begin(bucket, to, &Tags::new(), part_size, log_id).await?;
    match copy_parts((bucket, memory), source, &log, replaces).await {
        Ok(made) => {
            log.remove();
            Ok(made)
        }
        Err(error) => {
            abort(bucket, &log).await;
            Err(error)
        }
    }
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
