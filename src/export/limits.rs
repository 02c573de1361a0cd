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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_of_a_second_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rate.toml");
        let policy = |word: &str| {
            let text = format!("[limits]\nrequests_per_second = 2\non_limit = '{word}'\n");
            std::fs::write(&path, text).unwrap();
            Policy::load(path.to_str().unwrap()).unwrap()
        };
        let begin = Instant::now();
        let accepted = |policy: &Policy| -> Vec<bool> {
            let mut asked = VecDeque::new();
            let at = [0, 1, 999, 1000, 1000, 1001, 3000].map(Duration::from_millis);
            at.iter().map(|at| check(policy, "i", &[], &mut asked, begin + *at).is_ok()).collect()
        };
        // What was refused does not count, and what is a second old does not either.
        assert_eq!(accepted(&policy("fail")), [true, true, false, true, false, true, true]);
        assert_eq!(accepted(&policy("queue")), [true; 7]);
    }

    #[test]
    fn exports_under_way_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs.toml");
        std::fs::write(&path, "[limits]\njobs = 2\njobs_of_image = 1\non_limit = 'fail'\n").unwrap();
        let policy = Policy::load(path.to_str().unwrap()).unwrap();
        let refused = |active: &[&str]| {
            let active: Vec<_> = active.iter().map(|&id| id.to_owned()).collect();
            check(&policy, "i", &active, &mut VecDeque::new(), Instant::now()).err().map(|e| e.kind())
        };
        assert_eq!(refused(&["a"]), None);
        assert_eq!(refused(&["i"]), Some(ErrorKind::Busy));
        assert_eq!(refused(&["a", "b"]), Some(ErrorKind::TooManyJobs));
    }
}
