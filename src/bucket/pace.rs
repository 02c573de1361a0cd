//! A limit on the bytes that are uploaded in a second.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Lets uploads begin so that on average no more bytes than allowed are sent in a second, over all buckets that
/// share it. A part that has begun is sent as fast as it goes.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When the next upload may begin.
    next: Mutex<Instant>,
}

impl Pace {
    /// At most so many bytes in a second, which is not 0.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Mutex::new(Instant::now()) }
    }

    /// Waits until `length` bytes may be sent.
    pub(super) async fn wait(&self, length: u64) {
        let begin = {
            let mut next = self.next.lock();
            let begin = (*next).max(Instant::now());
            *next = begin + Duration::from_secs_f64(length as f64 / self.bytes_per_second as f64);
            begin
        };
        tokio::time::sleep_until(begin).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn parts_wait_for_those_before_them() {
        let pace = Pace::new(1000);
        let begin = Instant::now();
        let waits = [pace.wait(500), pace.wait(2000), pace.wait(1)];
        let after = futures::future::join_all(waits.map(|wait| async {
            wait.await;
            begin.elapsed().as_millis()
        }));
        assert_eq!(after.await, [0, 500, 2500]);
        tokio::time::sleep(Duration::from_secs(100)).await;
        let begin = Instant::now();
        pace.wait(10).await;
        assert_eq!(begin.elapsed(), Duration::ZERO, "what was not used is no debt");
    }
}
