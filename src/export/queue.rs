//! The queue: accepts jobs durably, starts their runs, and resumes those of a daemon that died.

mod moving;
mod resume;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::context::Context;
use super::deferred::DeferredFile;
use super::job::{Holds, Job, Stop};
use super::job_id::JobId;
use super::limits;
use super::multipart::early::{EarlySource, EarlyUpload};
use super::orphans;
use super::queue_settings::QueueSettings;
use super::request::{JobRequest, JobSource};
use super::run::{Begin, Run};
use super::sidecars::{self, has_sidecars};
use super::stage::Recovery;
use super::state_dir::{Journal, Record};
use crate::bucket::{Bucket, ObjectKey, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::Step;
use crate::metrics::Metrics;
use crate::vfile::VirtualFile;

/// How long a refusal waits for its status to be in the bucket.
const REFUSAL_LIMIT: Duration = Duration::from_secs(5);

/// Files that are sent while they are written, at once. Others are sent when they are closed.
const EARLY_UPLOADS: usize = 4;

/// How long the end of the mount waits until these have been given up.
const EARLY_LIMIT: Duration = Duration::from_secs(10);

/// Jobs that have not ended whose sources are held open; those of further ones are opened when their turn comes.
const OPEN_SOURCES: usize = 128;

/// How often it is looked whether a job still has to be waited for.
const DRAIN_LOOK: Duration = Duration::from_secs(2);

/// The jobs of a mount.
#[derive(Clone)]
pub struct JobQueue {
    context: Arc<Context>,
}

impl JobQueue {
    /// An empty queue that exports into `buckets` and runs on `runtime`.
    pub fn new(
        buckets: BTreeMap<String, Bucket>,
        journal: Journal,
        metrics: Arc<Metrics>,
        settings: QueueSettings,
        runtime: Handle,
    ) -> Self {
        let (uploads, doubtful) = journal.uploads();
        let context = Context::new(buckets, journal, uploads, metrics, settings, (EARLY_UPLOADS, runtime));
        let context = Arc::new(context);
        context.runtime.spawn(orphans::settle_all(Arc::downgrade(&context), doubtful));
        Self { context }
    }

    /// Records a job durably and starts it. From the return of this call on, a crash does not lose it. What was sent of
    /// the file while it was written, `begun`, is taken when the job is accepted. Blocks while the record is synced.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) while another job makes the same key.
    pub fn submit(
        &self,
        request: JobRequest,
        file: Arc<dyn VirtualFile>,
        begun: &mut Option<EarlyUpload>,
    ) -> Result<Arc<Job>> {
        let (job, is_deferred) = self.enter(request, Some(file))?;
        let mut record = Record::new(job.request().clone(), job.status());
        record.has_sidecars = Some(self.has_sidecars(&record.request.key));
        let early = begun.take().filter(|early| *early.key() == record.request.key);
        if let Some(early) = &early {
            record.upload_log = Some(early.log_id().to_owned());
            // The log may not say it yet, or not durably.
            record.stale = early.rewritten();
        }
        if let Err(error) = self.context.journal.save(Step::JobRecord, &record) {
            // It may be there all the same, and nobody has been told that the job is accepted.
            self.context.journal.forget(&job.id());
            let mut last = job.status();
            last.fail(&error);
            job.end(last, Some(&error));
            return Err(error);
        }
        self.context.metrics.jobs_submitted.add(1);
        let begin = Begin { record, upload: None, early, is_deferred, is_resumed: false };
        self.spawn(Run::new(Arc::clone(&self.context), Arc::clone(&job), begin), Recovery::Begin);
        Ok(job)
    }

    /// Records that a copy was refused before a job could start, so that its status file says why: when this returns,
    /// unless the store takes longer than people wait for a refusal.
    pub async fn record_refusal(&self, request: JobRequest, error: &Error) -> Result<()> {
        let (job, _) = self.enter(request, None)?;
        self.context.metrics.jobs_submitted.add(1);
        let run = self.run_of(&job);
        let error = error.clone();
        self.context.runtime.spawn(async move { run.end(Err(error)).await });
        // The failure is the caller's own.
        let _ = job.ended(REFUSAL_LIMIT).await;
        Ok(())
    }

    /// Notes that what a job does or did was asked for again.
    pub async fn repeat(&self, job: &Arc<Job>) {
        job.update(|s| s.repeated = s.repeated.saturating_add(1));
        if job.has_ended() {
            self.run_of(job).tell_again().await;
        }
    }

    /// The newest job of that key, ended or not.
    pub fn newest(&self, bucket: &str, key: &ObjectKey) -> Option<Arc<Job>> {
        self.context.table.lock().newest(bucket, key).cloned()
    }

    /// The job of that key that has not ended.
    pub fn active(&self, bucket: &str, key: &ObjectKey) -> Option<Arc<Job>> {
        self.newest(bucket, key).filter(|job| !job.has_ended())
    }

    /// The newest jobs of a bucket's keys whose status the bucket does not have.
    pub fn shown_in(&self, bucket: &str) -> Vec<Arc<Job>> {
        let table = self.context.table.lock();
        table.newest_in(bucket).filter(|job| job.holds_status() || !job.has_ended()).cloned().collect()
    }

    /// The job with that id.
    pub fn job(&self, id: &str) -> Option<Arc<Job>> {
        self.context.table.lock().job(id).cloned()
    }

    /// All jobs that this mount knows, oldest first.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.context.table.lock().jobs().cloned().collect()
    }

    /// Forgets the ended job of a key, after its status file was removed.
    pub fn forget(&self, bucket: &str, key: &ObjectKey) {
        self.context.table.lock().forget_newest(bucket, key);
    }

    /// Waits until no job is left that has not ended, but for those that wait for what is not in this mount.
    pub async fn drain(&self) {
        loop {
            let left = self.jobs().into_iter().find(|job| !job.has_ended() && !job.is_waiting());
            let Some(job) = left else { return };
            let _ = job.ended(DRAIN_LOOK).await;
        }
    }

    /// Tells every job to stop where it is and to stay recorded; returns when none touches a store any more.
    pub async fn stop(&self) {
        self.context.stopping.send_replace(true);
        for job in self.jobs() {
            // One that was cancelled stays cancelled.
            job.stop.send_if_modified(|stop| {
                let runs = *stop == Stop::No;
                *stop = if runs { Stop::Shutdown } else { *stop };
                runs
            });
        }
        while Arc::strong_count(&self.context.tasks) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // What is not given up by then is given up by the next mount.
        let early = self.context.early.acquire_many(EARLY_UPLOADS as u32);
        let _ = tokio::time::timeout(EARLY_LIMIT, early).await;
        self.context.resolver.lock().take();
    }

    /// Begins to send `file` as `key` while it is written, if there is room for one more such upload. `file_size`
    /// bytes of it were written from its start to its end.
    pub fn early_upload(
        &self,
        bucket: &str,
        key: &ObjectKey,
        tags: Tags,
        file: File,
        file_size: u64,
    ) -> Option<EarlyUpload> {
        let permit = Arc::clone(&self.context.early).try_acquire_owned().ok()?;
        let mounted = self.context.mounted(bucket).ok()?;
        let (bucket, key) = (mounted.bucket.clone(), key.clone());
        let log_id = format!("early-{}", JobId::new());
        let incremental = self.context.settings.incremental;
        let source = EarlySource { bucket, key, tags, file, file_size, log_id, incremental };
        let (uploads, memory) = (self.context.uploads.clone(), mounted.memory.clone());
        EarlyUpload::begin(source, uploads, memory, permit, &self.context.runtime)
    }

    /// Whether objects of this key have sidecars in this mount.
    pub fn has_sidecars(&self, key: &ObjectKey) -> bool {
        has_sidecars(key, self.context.settings.all_sidecars)
    }

    /// Removes those sidecars of an object that are ours, after the object itself was removed.
    pub async fn remove_sidecars(&self, bucket: &Bucket, object: &ObjectKey) -> Result<()> {
        sidecars::remove(bucket, object).await
    }

    /// A run for a job that has ended, or ends before it begins.
    fn run_of(&self, job: &Arc<Job>) -> Arc<Run> {
        let record = Record::new(job.request().clone(), job.status());
        let begin = Begin { record, upload: None, early: None, is_deferred: false, is_resumed: false };
        Run::new(Arc::clone(&self.context), Arc::clone(job), begin)
    }

    /// Puts a new job into the table unless its key is taken. Says whether its file was put aside, to be opened later.
    fn enter(&self, request: JobRequest, file: Option<Arc<dyn VirtualFile>>) -> Result<(Arc<Job>, bool)> {
        let bucket = &self.context.mounted(&request.bucket)?.bucket;
        let url = bucket.url_of(&request.key);
        let mut table = self.context.table.lock();
        if let Some(other) = table.newest(&request.bucket, &request.key).filter(|job| !job.has_ended()) {
            let what = format!("job {} is making this object", other.id());
            return Err(Error::new(ErrorKind::Busy, what).in_file(url));
        }
        let images = |job: &Arc<Job>| Some(job.request().source.image()?.id.clone());
        let active: Vec<Option<String>> = table.active().map(images).collect();
        if let (Some(_), Some(image)) = (&file, request.source.image()) {
            let of_images: Vec<_> = active.iter().flatten().cloned().collect();
            let checked = limits::check(
                &self.context.settings.policy,
                &image.id,
                &of_images,
                &mut table.asked,
                Instant::now(),
            );
            checked.map_err(|e| e.in_file(&url))?;
        }
        let is_deferred = active.len() >= OPEN_SOURCES && self.can_defer(&request.source);
        let file = match file {
            Some(file) if is_deferred => {
                Some(self.deferred(&request.source, file.file_size(), file.known_size()))
            }
            file => file,
        };
        let job = Arc::new(Job::new(
            JobId::after(table.last_id()),
            request,
            url,
            file,
            Arc::clone(&self.context.metrics),
        ));
        self.add(&mut table, &job);
        Ok((job, is_deferred))
    }

    /// Adds a job to the table. The records of those that are forgotten for it are removed.
    fn add(&self, table: &mut super::table::Table, job: &Arc<Job>) {
        if !self.has_sidecars(&job.request().key) {
            job.set_holds(Holds::Never);
        }
        for id in table.insert(job) {
            self.context.journal.forget(&id);
        }
    }

    /// Whether the source can be opened later.
    fn can_defer(&self, source: &JobSource) -> bool {
        source.image().is_none() || self.context.resolver.lock().is_some()
    }

    /// A source that is opened when somebody reads it.
    fn deferred(&self, source: &JobSource, file_size: u64, known_size: Option<u64>) -> Arc<dyn VirtualFile> {
        let (context, source) = (Arc::downgrade(&self.context), source.clone());
        let ended = || Error::new(ErrorKind::Internal, "the mount has ended");
        let open = move || Ok(context.upgrade().ok_or_else(ended)?.resolve(&source)?.file());
        Arc::new(DeferredFile::new(file_size, known_size, Box::new(open)))
    }

    fn spawn(&self, run: Arc<Run>, recovery: Recovery) {
        let work = self.context.runtime.spawn(Arc::clone(&run).run(recovery));
        self.spawn_counted(async move {
            // A broken invariant costs its job: nobody else would end it.
            match work.await {
                Err(error) if error.is_panic() => {
                    let error =
                        Error::new(ErrorKind::Internal, "a worker of the job panicked").because(error);
                    run.end(Err(error)).await;
                }
                _ => {}
            }
        });
    }

    /// Spawns what the end of the mount waits for.
    fn spawn_counted(&self, work: impl Future<Output = ()> + Send + 'static) {
        let task = Arc::clone(&self.context.tasks);
        self.context.runtime.spawn(async move {
            work.await;
            drop(task);
        });
    }
}
