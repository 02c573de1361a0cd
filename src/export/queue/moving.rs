//! Renames and removals of objects, and what an earlier mount left of them.

use std::sync::Arc;
use std::time::Duration;

use super::JobQueue;
use crate::bucket::{Bucket, ObjectKey};
use crate::error::{Error, ErrorKind, Result};
use crate::export::moves::{Move, Renamed};
use crate::export::multipart::reused::remove_index;

impl JobQueue {
    /// Gives an object another name, in place of what has that; `exclusive` says that nothing may have it. What stands
    /// beside it follows. What a crash or a store leaves undone is done later.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound), [`AlreadyExists`](ErrorKind::AlreadyExists), and the store's.
    pub async fn rename(
        &self,
        bucket: &Bucket,
        from: &ObjectKey,
        to: &ObjectKey,
        exclusive: bool,
    ) -> Result<Renamed> {
        let (renamed, left) = self.context.moves.rename(bucket, from, to, exclusive).await;
        self.settle_later(bucket, left);
        if let Ok(Renamed { from: object, .. }) = &renamed {
            remove_index(bucket, from, object.object_size).await;
        }
        renamed
    }

    /// Removes an object and what stands beside it. Says whether there was one.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when somebody replaced it meanwhile, which stays; and the store's.
    pub async fn remove(&self, bucket: &Bucket, key: &ObjectKey) -> Result<bool> {
        let (removed, left) = self.context.moves.remove(bucket, key).await;
        self.settle_later(bucket, left);
        removed
    }

    /// Waits until no rename or removal is under way, or left undone, that is about this key.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) when one is after that time.
    pub async fn check_moved(&self, bucket: &str, key: &ObjectKey, limit: Duration) -> Result<()> {
        let settled = tokio::time::timeout(limit, self.context.moves.log().settled(bucket, key)).await;
        let busy = |_| {
            let what = "a rename or a removal of it is not over";
            Error::new(ErrorKind::Busy, what).in_file(key.as_str())
        };
        settled.map_err(busy)
    }

    /// Finishes the renames and removals that an earlier mount left, as far as their buckets are in this one.
    pub(super) fn resume_moves(&self) {
        for left in self.context.moves.log().load() {
            if let Ok(mounted) = self.context.mounted(left.bucket()) {
                let bucket = mounted.bucket.clone();
                self.settle_later(&bucket, Some(left));
            }
        }
    }

    fn settle_later(&self, bucket: &Bucket, left: Option<Move>) {
        let Some(left) = left else { return };
        let (moves, bucket) = (Arc::clone(&self.context.moves), bucket.clone());
        let (retries, stopping) = (self.context.settings.retries, self.context.stopping.subscribe());
        self.spawn_counted(async move { moves.settle(&bucket, left, retries, stopping).await });
    }
}
