//! A limit on the bytes that are uploaded in a second.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lets uploads begin so that on average no more bytes than allowed are sent in a second, over all buckets that
/// share it. A part that has begun is sent as fast as it goes.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    /// When the next upload may begin.
    next: Mutex<Instant>,
}

impl RateLimit {
    /// At most so many bytes in a second, which is not 0.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Mutex::new(Instant::now()) }
    }

    /// Waits until `length` bytes may be sent.
    pub(super) async fn throttle(&self, length: u64) {
        let begin = self.reserve(Instant::now(), length);
        tokio::time::sleep_until(begin.into()).await;
    }

    /// When `length` bytes that are ready `now` may be sent; those that come after wait for them.
    fn reserve(&self, now: Instant, length: u64) -> Instant {
        let mut next = self.next.lock();
        let begin = (*next).max(now);
        *next = begin + Duration::from_secs_f64(length as f64 / self.bytes_per_second as f64);
        begin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_wait_for_those_before_them_and_what_was_not_used_is_lost() {
        let limit = RateLimit::new(1000);
        let start = Instant::now() + Duration::from_secs(1);
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        for (ready, length, begins) in
            [(0, 500, 0), (0, 2000, 500), (100, 1, 2500), (3000, 1000, 3000), (3001, 1, 4000)]
        {
            assert_eq!(limit.reserve(at(ready), length), at(begins), "{length} bytes at {ready} ms");
        }
    }
}
