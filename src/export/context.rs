//! What the runs of a mount share: buckets, bounds, journal, and the table of jobs.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::moves::Moves;
use super::multipart::digests::joined;
use super::multipart::memory::PartMemory;
use super::multipart::uploads::Uploads;
use super::queue_settings::QueueSettings;
use super::request::{JobRequest, JobSource, RecordedFile};
use super::staged::staged_file;
use super::state_dir::{Journal, Record};
use super::status::StatusImage;
use super::table::Table;
use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::Step;
use crate::metrics::Metrics;
use crate::policy::Policy;
use crate::vfile::VirtualFile;

/// Finds the bytes of a recorded image again.
pub(super) type Resolver = Arc<dyn Fn(&StatusImage) -> Result<RecordedFile> + Send + Sync>;

/// A bucket of the mount, with its bounds: one that does not answer slows no other.
pub(super) struct MountedBucket {
    pub(super) bucket: Bucket,
    /// Rights to run.
    running: Arc<Semaphore>,
    pub(super) memory: PartMemory,
}

/// What the runs of a mount share.
pub(super) struct Context {
    pub(super) buckets: BTreeMap<String, MountedBucket>,
    pub(super) journal: Journal,
    pub(super) uploads: Uploads,
    pub(super) moves: Arc<Moves>,
    pub(super) metrics: Arc<Metrics>,
    /// Rights to run over all buckets, where the policy limits them.
    allowed: Arc<Semaphore>,
    /// Rights to send a file while it is written.
    pub(super) early: Arc<Semaphore>,
    /// Held by every task: the end of the mount waits until nobody else does.
    pub(super) tasks: Arc<()>,
    /// Whether the mount ends.
    pub(super) stopping: watch::Sender<bool>,
    pub(super) settings: QueueSettings,
    pub(super) runtime: Handle,
    pub(super) table: Mutex<Table>,
    /// Given up when the mount ends.
    pub(super) resolver: Mutex<Option<Resolver>>,
}

/// The right of a job to run.
pub(super) struct Permits {
    _running: OwnedSemaphorePermit,
    _allowed: Option<OwnedSemaphorePermit>,
}

impl Permits {
    /// Waits until there is a place among those that run in a bucket and, where that is asked for, among those that are
    /// allowed over all of them. Nobody holds one while waiting for the other: jobs that the policy lets wait for another
    /// bucket's take no places from plain writes, and a bucket whose places are taken takes nobody's permission.
    async fn wait(running: &Arc<Semaphore>, allowed: Option<&Arc<Semaphore>>) -> Result<Self> {
        let closed = |e| Error::new(ErrorKind::Internal, "queue closed").because(e);
        loop {
            let place = Arc::clone(running).acquire_owned().await.map_err(closed)?;
            let Some(allowed) = allowed else { return Ok(Self { _running: place, _allowed: None }) };
            if let Ok(permission) = Arc::clone(allowed).try_acquire_owned() {
                return Ok(Self { _running: place, _allowed: Some(permission) });
            }
            drop(place);
            let permission = Arc::clone(allowed).acquire_owned().await.map_err(closed)?;
            if let Ok(place) = Arc::clone(running).try_acquire_owned() {
                return Ok(Self { _running: place, _allowed: Some(permission) });
            }
        }
    }
}

impl MountedBucket {
    /// One of `count` buckets, of whose jobs `running` run at once.
    pub(super) fn new(bucket: Bucket, running: usize, count: usize) -> Self {
        let running = Arc::new(Semaphore::new(running.max(1)));
        Self { bucket, running, memory: PartMemory::share_of(count) }
    }
}

impl Context {
    /// Rights to run that the policy allows over all buckets.
    pub(super) fn allowed(policy: &Policy) -> Arc<Semaphore> {
        let allowed = policy.limits.jobs.unwrap_or(Semaphore::MAX_PERMITS);
        Arc::new(Semaphore::new(allowed.clamp(1, Semaphore::MAX_PERMITS)))
    }

    /// A mount's context over an empty table. So many files are sent at once while they are written.
    pub(super) fn new(
        buckets: BTreeMap<String, Bucket>,
        journal: Journal,
        uploads: Uploads,
        metrics: Arc<Metrics>,
        settings: QueueSettings,
        (early, runtime): (usize, Handle),
    ) -> Self {
        let count = buckets.len();
        let mounted = |(name, bucket)| (name, MountedBucket::new(bucket, settings.running, count));
        let buckets: BTreeMap<_, _> = buckets.into_iter().map(mounted).collect();
        let memory = |(name, mounted): (&String, &MountedBucket)| (name.clone(), mounted.memory.clone());
        let memory = buckets.iter().map(memory).collect();
        Self {
            buckets,
            moves: Arc::new(Moves::new(journal.moves(), uploads.clone(), memory, settings.all_sidecars)),
            uploads,
            journal,
            metrics,
            allowed: Self::allowed(&settings.policy),
            early: Arc::new(Semaphore::new(early)),
            tasks: Arc::default(),
            stopping: watch::Sender::new(false),
            settings,
            runtime,
            table: Mutex::default(),
            resolver: Mutex::default(),
        }
    }

    /// A bucket by its name in the mount.
    pub(super) fn mounted(&self, name: &str) -> Result<&MountedBucket> {
        self.buckets
            .get(name)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no bucket {name:?} is mounted here")))
    }

    /// Waits for a place among the jobs that run.
    pub(super) async fn permits(&self, request: &JobRequest) -> Result<Permits> {
        let running = &self.mounted(&request.bucket)?.running;
        let allowed = matches!(request.source, JobSource::Image(_)).then_some(&self.allowed);
        Permits::wait(running, allowed).await
    }

    /// Writes a record; durable when this returns.
    pub(super) async fn save(&self, step: Step, record: Record) -> Result<()> {
        let journal = self.journal.clone();
        joined(tokio::task::spawn_blocking(move || journal.save(step, &record)).await)?
    }

    /// The bytes of a source as a later process, or a later moment of this one, finds them. Blocks.
    pub(super) fn resolve(&self, source: &JobSource) -> Result<Resolved> {
        match source {
            JobSource::Staged(path) => Ok(Resolved::Staged(staged_file(path)?)),
            JobSource::Image(image) => {
                let unset = || Error::new(ErrorKind::Internal, "this queue cannot find images again");
                let resolver = self.resolver.lock().clone().ok_or_else(unset)?;
                resolver(image).map(Resolved::Image)
            }
        }
    }
}

/// The bytes of a source, found again.
pub(super) enum Resolved {
    Image(RecordedFile),
    Staged(Arc<dyn VirtualFile>),
}

impl Resolved {
    pub(super) fn file(self) -> Arc<dyn VirtualFile> {
        match self {
            Self::Image(found) => found.file,
            Self::Staged(file) => file,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::Poll;

    use futures::FutureExt;

    use super::*;

    async fn is_pending<T>(waiting: &mut Pin<Box<impl Future<Output = T>>>) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx))).await.is_pending()
    }

    #[tokio::test]
    async fn a_job_that_waits_for_the_policy_takes_no_place_and_one_that_waits_for_a_place_no_permission() {
        let (running, other, allowed) = (Semaphore::new(1), Semaphore::new(1), Semaphore::new(1));
        let (running, other, allowed) = (Arc::new(running), Arc::new(other), Arc::new(allowed));
        let elsewhere = Permits::wait(&other, Some(&allowed)).now_or_never().unwrap().unwrap();
        let mut image = Box::pin(Permits::wait(&running, Some(&allowed)));
        assert!(is_pending(&mut image).await);
        let plain = Permits::wait(&running, None).now_or_never().unwrap().unwrap();
        drop(elsewhere);
        assert!(is_pending(&mut image).await);
        let elsewhere = Permits::wait(&other, Some(&allowed)).now_or_never().unwrap().unwrap();
        drop((plain, elsewhere));
        image.now_or_never().unwrap().unwrap();
    }
}
