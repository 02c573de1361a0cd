//! The object of zeros of a bucket, made by whoever needs it first.

use super::uploads::{Uploads, abort};
use crate::bucket::{Bucket, CopySource, Tags, Zeros, random};
use crate::error::{ErrorKind, Result};
use crate::units::MIB;

/// The object out of which zeros are copied. What its making leaves in a crash is given up by the next mount.
///
/// # Errors
/// [`Unsupported`](ErrorKind::Unsupported) where there is none, and zeros have to be sent.
#[allow(dead_code, reason = "transfers copy out of it as soon as they copy anything")]
pub(in crate::export) async fn zeros(uploads: &Uploads, bucket: &Bucket) -> Result<CopySource> {
    let _guard = bucket.gate_of_zeros().await;
    let seed = match bucket.zeros().await? {
        Zeros::Whole(source) => return Ok(source),
        Zeros::Seed(seed) => seed,
    };
    let log_id = format!("zeros-{:016x}", random());
    let key = Bucket::zeros_key();
    let log = uploads.begin(bucket, &key, &Tags::new(), 8 * MIB, &log_id).await?;
    let error = match bucket.grow_zeros(&log.name().id, &seed).await {
        Ok(source) => {
            log.remove();
            return Ok(source);
        }
        Err(error) => error,
    };
    abort(bucket, &log).await;
    match bucket.zeros().await {
        // Another host was faster.
        Ok(Zeros::Whole(source)) if error.kind() == ErrorKind::Conflict => Ok(source),
        _ => Err(error),
    }
}
