//! The objects of splices: parts of which the store has the beginning, while they are put together. Their names follow from
//! the upload, so that whoever ends it can remove them.

use tracing::debug;

use super::log::{Making, UploadLog};
use crate::bucket::{Bucket, ObjectKey};
use crate::failpoint::{self, Step};

/// The object of a part, which nobody else has: the ids of uploads are the store's.
pub(super) fn key(log: &UploadLog, index: usize) -> ObjectKey {
    Bucket::control_key(&format!("splices/{}", name(log, index)))
}

/// The log of its upload, which no later process goes on with.
pub(super) fn log_id(log: &UploadLog, index: usize) -> String {
    format!("splice-{}", name(log, index))
}

fn name(log: &UploadLog, index: usize) -> String {
    let upload = blake3::hash(log.name().id.as_bytes()).to_hex();
    format!("{}-{index}", &upload[..32])
}

/// Removes what an earlier process may have left, or one that gives the upload up.
pub(super) async fn remove_all(bucket: &Bucket, log: &UploadLog) {
    for (index, plan) in log.plans().iter().enumerate() {
        if matches!(plan.making, Making::Splice(_)) {
            remove(bucket, &key(log, index)).await;
        }
    }
}

/// Removes one. Where that fails it is tried again when the upload is resumed or given up; the next try of the same part
/// replaces it.
pub(super) async fn remove(bucket: &Bucket, key: &ObjectKey) {
    let removed = async {
        failpoint::pass(Step::SpliceRemove)?;
        bucket.delete(key).await
    };
    if let Err(error) = removed.await {
        debug!("the object of a splice could not be removed: {}", error.report());
    }
}
