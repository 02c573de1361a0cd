//! Exponential back-off with jitter.

use std::time::Duration;

/// Longest pause between two tries, but for its random part.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How many times an export is resumed after a transient store error, besides the retries of single requests.
#[derive(Clone, Copy, Debug)]
pub struct Retries {
    /// Retries before the job fails.
    pub count: u32,
    /// The pause before the first retry.
    pub pause: Duration,
}

impl Default for Retries {
    /// None.
    fn default() -> Self {
        Self { count: 0, pause: Duration::from_secs(1) }
    }
}

impl Retries {
    /// The pause after so many failures before this one: twice as long each time, and between half and one and a half
    /// of that, so that jobs that failed together do not come back together. `None` when there were too many.
    pub(super) fn pause_after(&self, failures: u32) -> Option<Duration> {
        (failures < self.count).then(|| self.pause(failures))
    }

    /// The same without an end.
    pub(super) fn pause(&self, failures: u32) -> Duration {
        let doubled = self.pause.saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_PAUSE);
        doubled.mul_f64(0.5 + fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let retries = Retries { count: 100, ..Retries::default() };
        for (failures, seconds) in [(0, 1.0), (3, 8.0), (50, 60.0), (99, 60.0)] {
            let pause = retries.pause_after(failures).unwrap().as_secs_f64();
            assert!((seconds * 0.5..seconds * 1.5).contains(&pause), "{failures}: {pause}");
        }
        assert_eq!(retries.pause_after(100), None);
        assert_eq!(Retries::default().pause_after(0), None);
    }
}
