//! How a queue works, as the mount's options say.

use std::sync::Arc;
use std::time::Duration;

use super::retry::Retries;
use crate::policy::Policy;

/// How often, at most, a running job's status is written into the bucket.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How a queue works.
#[derive(Clone, Debug)]
pub struct QueueSettings {
    /// Jobs of each bucket that run at once; the others wait in the order in which they came.
    pub running: usize,
    /// How long a host that shares the buckets may be silent before others take its jobs over; `None` when this host
    /// has the buckets for itself.
    pub lease: Option<Duration>,
    /// The policy in force: its limits, and the cloud's codes.
    pub policy: Arc<Policy>,
    /// How exports are resumed after transient store errors.
    pub retries: Retries,
    /// Whether every object has sidecars, and not only those whose name ends like a disk format.
    pub all_sidecars: bool,
    /// Whether stores copy what they have already of an object, instead of being sent it again.
    pub incremental: bool,
    /// How often, at most, a running job's status is written into the bucket. When nothing moves, it is written at every
    /// third of these times.
    pub status_interval: Duration,
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            running: 4,
            lease: None,
            policy: Arc::default(),
            retries: Retries::default(),
            all_sidecars: false,
            incremental: true,
            status_interval: status_interval(),
        }
    }
}

/// Builds with debug assertions take the milliseconds of `FREIGHTFS_STATUS_INTERVAL` instead, so that tests see a status
/// that is written again.
fn status_interval() -> Duration {
    let wanted = || std::env::var("FREIGHTFS_STATUS_INTERVAL").ok()?.parse().ok();
    let wanted = if cfg!(debug_assertions) { wanted() } else { None };
    wanted.map_or(STATUS_INTERVAL, Duration::from_millis)
}
