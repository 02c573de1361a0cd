//! The objects of splices: parts of which the store has the beginning, while they are put together. Their names follow from
//! the upload, so that whoever ends it can remove them.

use std::sync::atomic::Ordering;

use futures::{StreamExt, stream};
use tracing::debug;

use super::log::{Making, UploadLog};
use crate::bucket::{Bucket, ObjectKey, random};
use crate::failpoint::{self, Step};

/// Objects that are removed at once.
const REMOVED_AT_ONCE: usize = 4;

/// The object of a part, which nobody else has: the ids of uploads are the store's.
pub(super) fn key(log: &UploadLog, index: usize) -> ObjectKey {
    Bucket::control_key(&format!("splices/{}", name(log, index)))
}

/// The log of its upload, which no later process goes on with.
pub(super) fn log_id(log: &UploadLog, index: usize) -> String {
    // One that was left, because its upload could not be given up, stays for the next mount.
    format!("splice-{}-{:016x}", name(log, index), random())
}

fn name(log: &UploadLog, index: usize) -> String {
    let upload = blake3::hash(log.name().id.as_bytes()).to_hex();
    format!("{}-{index}", &upload[..32])
}

/// Removes what an earlier process may have left, or one that gives the upload up.
pub(super) async fn remove_all(bucket: &Bucket, log: &UploadLog) {
    if log.splices().load(Ordering::SeqCst) == 0 {
        return;
    }
    let plans = log.plans();
    let spliced = plans.iter().enumerate().filter(|(_, plan)| matches!(plan.making, Making::Splice(_)));
    let removing: Vec<_> = spliced.map(|(index, _)| remove(bucket.clone(), key(log, index))).collect();
    let removed: Vec<bool> = stream::iter(removing).buffer_unordered(REMOVED_AT_ONCE).collect().await;
    if removed.into_iter().all(|removed| removed) {
        log.splices().store(0, Ordering::SeqCst);
    }
}

/// An object is about to be made.
pub(super) fn begin(log: &UploadLog) {
    log.splices().fetch_add(1, Ordering::SeqCst);
}

/// Removes an object that is not needed any more.
pub(super) async fn end(bucket: &Bucket, log: &UploadLog, key: ObjectKey) {
    if remove(bucket.clone(), key).await {
        log.splices().fetch_sub(1, Ordering::SeqCst);
    }
}

/// Removes one. Where that fails it is tried again when the upload is resumed or given up; the next try of the same part
/// replaces it.
async fn remove(bucket: Bucket, key: ObjectKey) -> bool {
    let removed = async {
        failpoint::pass(Step::SpliceRemove)?;
        bucket.delete(&key).await
    };
    if let Err(error) = removed.await {
        debug!("the object of a splice could not be removed: {}", error.report());
        return false;
    }
    true
}
