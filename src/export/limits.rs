//! The policy's limits on exports that are asked for.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::policy::{OnLimit, Policy};

/// Checks the policy's limits before one more export of `image` is accepted, while those of the images `active` are under
/// way. `asked` holds when exports were asked for in the last second, and gets `now`.
///
/// # Errors
/// [`Busy`](ErrorKind::Busy) or [`TooManyJobs`](ErrorKind::TooManyJobs), with the cloud's code.
pub(super) fn check(
    policy: &Policy,
    image: &str,
    active: &[String],
    asked: &mut VecDeque<Instant>,
    now: Instant,
) -> Result<()> {
    let limits = &policy.limits;
    let refused = |kind, what: String| {
        let what = format!("{what} (policy {})", policy.name);
        Err(policy.with_cloud_code(Error::new(kind, what)))
    };
    let of_image = active.iter().filter(|id| *id == image).count();
    if limits.jobs_of_image.is_some_and(|limit| of_image >= limit) {
        return refused(ErrorKind::Busy, format!("image {image:?} is being exported already"));
    }
    let fails = limits.on_limit == Some(OnLimit::Fail);
    if let Some(limit) = limits.jobs.filter(|&limit| fails && active.len() >= limit) {
        let what = format!("{limit} exports are under way, and no more are allowed");
        return refused(ErrorKind::TooManyJobs, what);
    }
    if let Some(limit) = limits.requests_per_second {
        asked.retain(|at| now.duration_since(*at) < Duration::from_secs(1));
        if fails && asked.len() >= limit as usize {
            let what = format!("{limit} exports were asked for within a second");
            return refused(ErrorKind::TooManyJobs, what);
        }
        asked.push_back(now);
    }
    Ok(())
}
