//! How far a job is, and how long it will take: computed from its status and its file's preparation.

use std::time::Duration;

use super::status::Status;
use crate::vfile::Preparation;

/// Percent of the bytes, whose number is estimated where it is not known. A file that cannot be read before it is known
/// is half done then. 100 is for SUCCESS alone. `work` is that of a file whose size was not known at the start.
pub(super) fn progress(status: &Status, work: Option<Preparation>) -> u8 {
    let percent = |done: u64, total: u64| done.saturating_mul(100).checked_div(total).unwrap_or(0).min(100);
    let uploaded = |size| percent(status.bytes_uploaded, size);
    let whole = match (work, status.size) {
        (Some(work), size) if work.is_first => {
            (percent(work.done, work.total) + size.map_or(0, uploaded)) / 2
        }
        (_, Some(size)) => uploaded(size),
        (Some(work), None) => uploaded(work.bytes.saturating_mul(work.total) / work.done.max(1)),
        (None, None) => 0,
    };
    whole.min(99) as u8
}

/// Seconds that are left at the rate so far. Of a file whose size was not known at the start (`is_estimated`) the
/// progress tells, of others the bytes.
pub(super) fn seconds_left(status: &Status, elapsed: Duration, is_estimated: bool) -> Option<u64> {
    let (done, size) = match status.size {
        Some(size) if !is_estimated => (status.bytes_uploaded, size),
        _ => (status.progress.into(), 100),
    };
    let left = size.saturating_sub(done) as f64;
    (done > 0).then(|| (elapsed.as_secs_f64() * left / done as f64).ceil() as u64)
}
