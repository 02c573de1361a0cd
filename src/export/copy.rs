//! Copies within a bucket.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};

use super::part_log::{Part, PartLog};
use super::queue::JobQueue;
use super::upload::MAX_PARTS_IN_FLIGHT;
use crate::bucket::{Bucket, ObjectKey, ObjectMeta, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};

impl JobQueue {
    /// Copies an object to another key of its bucket: within the store where it does that, else in parts that this
    /// process reads and sends. What such a copy leaves in a crash is given up by the next mount.
    /// Returns what was copied.
    pub async fn copy(
        &self,
        bucket: &Bucket,
        from: &ObjectKey,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<ObjectMeta> {
        let gone = || Error::new(ErrorKind::NotFound, "the object is gone").in_file(bucket.url_of(from));
        let source = bucket.head(from).await?.ok_or_else(gone)?;
        if bucket.can_copy(source.object_size) {
            bucket.copy(&source, to, replaces).await?;
            return Ok(source);
        }
        let part_size = bucket.part_size_for(source.object_size)?;
        let log_id = format!("copy-{}", super::job::new_job_id());
        let log = self.inner().begin_upload(bucket, to, &Tags::new(), part_size, &log_id).await?;
        match copy_parts(bucket, &source, &log, replaces).await {
            Ok(()) => log.remove(),
            Err(error) => {
                self.inner().abort(&log).await;
                return Err(error);
            }
        }
        Ok(source)
    }
}

async fn copy_parts(
    bucket: &Bucket,
    source: &ObjectMeta,
    log: &Arc<PartLog>,
    replaces: &Replaces,
) -> Result<()> {
    let (part_size, to) = (log.name().part_size, &log.name().key);
    let parts = source.object_size.div_ceil(part_size) as usize;
    stream::iter((0..parts).map(|index| async move {
        let start = index as u64 * part_size;
        let end = (start + part_size).min(source.object_size);
        let bytes = bucket.read(&source.key, start..end, source.etag.as_deref()).await?;
        let id = bucket.put_part(to, &log.name().id, index, bytes).await?;
        log.finished(index, Part { length: end - start, id });
        Ok::<_, Error>(())
    }))
    .buffer_unordered(MAX_PARTS_IN_FLIGHT)
    .try_collect::<()>()
    .await?;
    bucket.complete_upload(to, &log.name().id, log.ids(parts)?, source.object_size, replaces).await.map(drop)
}
