//! Synchronous work, off the tasks: readers of images, allocation maps, files of the staging directory.
//!
//! Each image has a lane of its own with a bounded number of threads, and so have listings of the catalog and
//! staged files: who reads an image that answers slowly takes no thread from anybody else.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::error::{Error, ErrorKind, Result};

/// Threads that work in one lane at once; the others wait without one.
const LANE: usize = 16;

/// Threads that work for images at once, whatever their number: half of the daemon's.
const IMAGES: usize = 512;

/// Lanes that are remembered before those that nobody uses are forgotten.
const LANES_KEPT: usize = 1024;

/// What work is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lane {
    /// Names in the catalog.
    Catalog,
    /// An image, by its id.
    Image(String),
    /// Local files of drafts.
    Staging,
}

/// The lanes of a mount.
pub(super) struct Lanes {
    lanes: Mutex<HashMap<Lane, Arc<Semaphore>>>,
    images: Arc<Semaphore>,
}

impl Default for Lanes {
    fn default() -> Self {
        Self { lanes: Mutex::default(), images: Arc::new(Semaphore::new(IMAGES)) }
    }
}

impl Lanes {
    /// Runs `work` on a thread of its own when its lane has room.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let closed = |e| Error::new(ErrorKind::Internal, "no more work is done").because(e);
        let is_image = matches!(lane, Lane::Image(_));
        let lane = self.lane(lane);
        let own = lane.acquire_owned().await.map_err(closed)?;
        let all = match is_image {
            true => Some(Arc::clone(&self.images).acquire_owned().await.map_err(closed)?),
            false => None,
        };
        let working = tokio::task::spawn_blocking(move || {
            let result = work();
            drop((own, all));
            result
        });
        working.await.map_err(|e| Error::new(ErrorKind::Internal, "the work was not finished").because(e))?
    }

    fn lane(&self, lane: Lane) -> Arc<Semaphore> {
        let mut lanes = self.lanes.lock();
        if lanes.len() > LANES_KEPT {
            lanes.retain(|_, known| Arc::strong_count(known) > 1);
        }
        Arc::clone(lanes.entry(lane).or_insert_with(|| Arc::new(Semaphore::new(LANE))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lane_that_is_full_holds_up_no_other() {
        let lanes = Arc::new(Lanes::default());
        let (release, hold) = std::sync::mpsc::channel::<()>();
        let hold = Arc::new(Mutex::new(hold));
        let slow = |_| {
            let (lanes, hold) = (Arc::clone(&lanes), Arc::clone(&hold));
            tokio::spawn(async move {
                let lane = Lane::Image("slow".to_owned());
                lanes
                    .run(lane, move || {
                        let _ = hold.lock().recv();
                        Ok(())
                    })
                    .await
            })
        };
        let waiting: Vec<_> = (0..4 * LANE).map(slow).collect();
        let other = lanes.run(Lane::Image("other".to_owned()), || Ok(7)).await;
        assert_eq!(other.unwrap(), 7);
        drop(release);
        for waiter in waiting {
            waiter.await.unwrap().unwrap();
        }
    }
}
