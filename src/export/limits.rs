//! The policy's limits on exports that are asked for.

use std::time::{Duration, Instant};

use super::job::JobRequest;
use super::queue::{Inner, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::policy::OnLimit;

impl Inner {
    /// The limits of the policy on exports of images, before one more is accepted.
    pub(super) fn check_limits(&self, table: &mut Table, request: &JobRequest) -> Result<()> {
        let Some(image) = request.source.image() else { return Ok(()) };
        let limits = &self.policy.limits;
        let active = table.jobs.values().filter(|job| !job.status().status.is_final());
        let images: Vec<_> =
            active.filter_map(|job| Some(job.request().source.image()?.id.clone())).collect();
        let of_image = images.iter().filter(|id| **id == image.id).count();
        if limits.jobs_of_image.is_some_and(|limit| of_image >= limit) {
            let what =
                format!("image {:?} is being exported already (policy {})", image.id, self.policy.name);
            return Err(self.policy.with_cloud_code(Error::new(ErrorKind::Busy, what)));
        }
        let fails = limits.on_limit == Some(OnLimit::Fail);
        let too_many = |what: String| {
            let what = format!("{what} (policy {})", self.policy.name);
            self.policy.with_cloud_code(Error::new(ErrorKind::TooManyJobs, what))
        };
        if let Some(limit) = limits.jobs.filter(|&limit| fails && images.len() >= limit) {
            return Err(too_many(format!("{limit} exports are under way, and no more are allowed")));
        }
        if let Some(limit) = limits.requests_per_second {
            let now = Instant::now();
            table.asked.retain(|at| now.duration_since(*at) < Duration::from_secs(1));
            if fails && table.asked.len() >= limit as usize {
                return Err(too_many(format!("{limit} exports were asked for within a second")));
            }
            table.asked.push_back(now);
        }
        Ok(())
    }
}
