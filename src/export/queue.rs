//! The queue: accepts jobs durably, runs a bounded number of them, and takes up those of a daemon that died.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{error, info, warn};

use super::early::EarlyUpload;
use super::job::{Job, JobRequest, JobSource, RecordedFile, Stop};
use super::journal::{Journal, Record};
use super::part_log::{PartLog, UploadName};
use super::retry::Retries;
use super::status::{JobState, Status, StatusImage};
use super::upload::{Attempt, Uploaded};
use crate::bucket::{Bucket, ObjectKey, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::policy::Policy;
use crate::vfile::VirtualFile;

/// How often, at most, a running job's status is written into the bucket.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How long writing a status may take; the job's end does not wait longer for it.
const STATUS_LIMIT: Duration = Duration::from_secs(30);

/// How long a refusal waits for its status to be in the bucket.
const REFUSAL_LIMIT: Duration = Duration::from_secs(5);

/// Files that are sent while they are written, at once. Others are sent when they are closed.
const EARLY_UPLOADS: usize = 4;

/// How long the end of the mount waits until these have been given up.
const EARLY_LIMIT: Duration = Duration::from_secs(10);

/// Ended jobs that stay in memory; the oldest go first.
const ENDED_KEPT: usize = 1000;

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
    /// How jobs go on whose store is not reached or is broken.
    pub retries: Retries,
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self { running: 4, lease: None, policy: Arc::default(), retries: Retries::default() }
    }
}

/// The jobs of a mount.
#[derive(Clone)]
pub struct JobQueue {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    buckets: BTreeMap<String, Bucket>,
    pub(super) journal: Journal,
    metrics: Arc<Metrics>,
    /// Rights to run, of each bucket: one that does not answer slows no other.
    running: BTreeMap<String, Arc<Semaphore>>,
    /// Rights to run over all buckets, where the policy limits them.
    allowed: Arc<Semaphore>,
    /// Held by every task of a job: the end of the mount waits until nobody else does.
    tasks: Arc<()>,
    early: Arc<Semaphore>,
    pub(super) policy: Arc<Policy>,
    pub(super) lease: Option<Duration>,
    retries: Retries,
    runtime: Handle,
    table: Mutex<Table>,
}

#[derive(Default)]
pub(super) struct Table {
    /// By id, so by time.
    pub(super) jobs: BTreeMap<String, Arc<Job>>,
    /// The newest job of each key.
    newest: HashMap<(String, ObjectKey), Arc<Job>>,
    /// When exports were asked for in the last second.
    pub(super) asked: VecDeque<Instant>,
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
        let per_bucket = |name: &String| (name.clone(), Arc::new(Semaphore::new(settings.running.max(1))));
        let running = buckets.keys().map(per_bucket).collect();
        let allowed = settings.policy.limits.jobs.unwrap_or(Semaphore::MAX_PERMITS);
        let inner = Inner {
            buckets,
            journal,
            metrics,
            running,
            allowed: Arc::new(Semaphore::new(allowed.clamp(1, Semaphore::MAX_PERMITS))),
            tasks: Arc::default(),
            early: Arc::new(Semaphore::new(EARLY_UPLOADS)),
            lease: settings.lease,
            retries: settings.retries,
            policy: settings.policy,
            runtime,
            table: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Records a job durably and starts it. From the return of this call on, a crash does not lose it. What was sent of
    /// the file while it was written, `begun`, is taken when the job is accepted.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) while another job makes the same key.
    pub fn submit(
        &self,
        request: JobRequest,
        file: Arc<dyn VirtualFile>,
        begun: &mut Option<EarlyUpload>,
    ) -> Result<Arc<Job>> {
        let job = self.enter(request, Some(file))?;
        let mut record = Record::new(job.request().clone(), job.status());
        let begun = begun.take().filter(|early| *early.key() == record.request.key);
        record.upload_log = begun.as_ref().map(|early| early.log_id().to_owned());
        if let Err(error) = self.inner.journal.save(&record) {
            let mut last = job.status();
            last.fail(&error);
            job.end(last, Some(&error));
            return Err(error);
        }
        job.set_early_upload(begun);
        self.inner.metrics.jobs_submitted.add(1);
        self.spawn(Arc::clone(&job));
        Ok(job)
    }

    /// Records that a copy was refused before a job could start, so that its status file says why: when this returns,
    /// unless the store takes longer than people wait for a refusal.
    pub async fn record_refusal(&self, request: JobRequest, error: &Error) -> Result<()> {
        let job = self.enter(request, None)?;
        self.inner.metrics.jobs_submitted.add(1);
        let inner = Arc::clone(&self.inner);
        let (error, refused) = (error.clone(), Arc::clone(&job));
        self.inner.runtime.spawn(async move { inner.end(&refused, Err(error)).await });
        // The failure is the caller's own.
        let _ = job.ended(REFUSAL_LIMIT).await;
        Ok(())
    }

    /// Notes that what a job does or did was asked for again.
    pub async fn repeat(&self, job: &Arc<Job>) {
        job.update(|s| s.repeated += 1);
        let status = job.status();
        if !status.status.is_final() {
            return;
        }
        let written = self.inner.put_status(job, status.to_json()).await;
        if let Err(error) = self.inner.journal.save(&Record::new(job.request().clone(), status.clone())) {
            warn!(job = status.job_id, "{}", error.report());
        }
        self.inner.note_written(job, &status, written);
    }

    /// Takes up the jobs in the journal that have not ended, and remembers those that have. `resolver` finds the
    /// bytes of an image again, or fails when the source is not what was recorded any more.
    pub fn resume(&self, resolver: impl Fn(&StatusImage) -> Result<RecordedFile>) -> Result<()> {
        let (records, errors) = self.inner.journal.load()?;
        for error in errors {
            warn!("a job's record cannot be used: {}", error.report());
        }
        let mut logs: BTreeMap<_, _> = self.inner.journal.load_uploads()?.into_iter().collect();
        let kept: Vec<_> = logs.values().map(|log| log.name().id.clone()).collect();
        for bucket in self.inner.buckets.values() {
            let (bucket, kept) = (bucket.clone(), kept.clone());
            self.inner.runtime.spawn(async move { bucket.sweep(kept).await });
        }
        for mut record in records {
            let mut log = None;
            let source = (!record.status.status.is_final()).then(|| {
                log = logs.remove(record.upload_log.as_ref().unwrap_or(&record.status.job_id));
                self.recorded_source(&mut record, &mut log, &resolver)
            });
            let job = Arc::new(Job::from_record(record.request.clone(), record.status.clone(), None));
            self.inner.table.lock().insert(&job);
            if let Some(file) = source {
                job.set_upload(log.map(Arc::new));
                self.take_up(job, record, file);
            } else if record.status_unwritten {
                job.set_status_unwritten(true);
                let inner = Arc::clone(&self.inner);
                self.inner.runtime.spawn(async move {
                    let last = job.status();
                    let written = inner.put_status(&job, last.to_json()).await;
                    inner.note_written(&job, &last, written);
                });
            }
        }
        for log in logs.into_values() {
            let inner = Arc::clone(&self.inner);
            self.inner.runtime.spawn(async move { inner.abort(&log).await });
        }
        Ok(())
    }

    /// The bytes of a recorded job. Where they may be others than those of its upload, that is given up, and only then
    /// it is recorded what they are known by now.
    fn recorded_source(
        &self,
        record: &mut Record,
        log: &mut Option<PartLog>,
        resolver: impl Fn(&StatusImage) -> Result<RecordedFile>,
    ) -> Result<Arc<dyn VirtualFile>> {
        let found = match &record.request.source {
            JobSource::Image(image) => resolver(image)?,
            JobSource::Staged(path) => return super::staged_file(path),
        };
        if !found.continues
            && let Some(given_up) = log.take()
        {
            given_up.set_aside()?;
            let inner = Arc::clone(&self.inner);
            self.inner.runtime.spawn(async move { inner.abort(&given_up).await });
        }
        if record.status.image.as_ref() != Some(&found.image) {
            record.request.source = JobSource::Image(found.image.clone());
            record.status.image = Some(found.image);
            self.inner.journal.save(record)?;
        }
        Ok(found.file)
    }

    /// Goes on with a job of an earlier process.
    fn take_up(&self, job: Arc<Job>, record: Record, file: Result<Arc<dyn VirtualFile>>) {
        info!(job = job.id(), key = %record.request.key, "taking up a job");
        let inner = Arc::clone(&self.inner);
        if let Some(upload) = record.upload {
            let request = record.request;
            // What version 1 recorded of an upload does not say which parts there are.
            self.inner.runtime.spawn(async move {
                if let Ok(bucket) = inner.bucket(&request.bucket) {
                    let _ = bucket.abort_upload(&request.key, &upload).await;
                }
            });
        }
        match file {
            Ok(file) => {
                job.set_file(file);
                self.spawn(job);
            }
            Err(error) => {
                let inner = Arc::clone(&self.inner);
                self.inner.runtime.spawn(async move { inner.end(&job, Err(error)).await });
            }
        }
    }

    /// The newest job of that key, ended or not.
    pub fn newest(&self, bucket: &str, key: &ObjectKey) -> Option<Arc<Job>> {
        self.inner.table.lock().newest.get(&(bucket.to_owned(), key.clone())).cloned()
    }

    /// The job of that key that has not ended.
    pub fn active(&self, bucket: &str, key: &ObjectKey) -> Option<Arc<Job>> {
        self.newest(bucket, key).filter(|job| !job.status().status.is_final())
    }

    /// The newest jobs of a bucket's keys whose status the bucket does not have.
    pub fn shown_in(&self, bucket: &str) -> Vec<Arc<Job>> {
        let table = self.inner.table.lock();
        let shown = table.newest.iter().filter(|((b, _), job)| b == bucket && job.holds_status());
        shown.map(|(_, job)| Arc::clone(job)).collect()
    }

    /// The job with that id.
    pub fn job(&self, id: &str) -> Option<Arc<Job>> {
        self.inner.table.lock().jobs.get(id).cloned()
    }

    /// All jobs that this mount knows, oldest first.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.inner.table.lock().jobs.values().cloned().collect()
    }

    /// Forgets the ended job of a key, after its status file was removed.
    pub fn forget(&self, bucket: &str, key: &ObjectKey) {
        let mut table = self.inner.table.lock();
        let entry = (bucket.to_owned(), key.clone());
        if table.newest.get(&entry).is_some_and(|job| job.status().status.is_final()) {
            table.newest.remove(&entry);
        }
    }

    /// Waits until no job is left that has not ended.
    pub async fn drain(&self) {
        while let Some(job) = self.jobs().into_iter().find(|job| !job.status().status.is_final()) {
            let _ = job.ended(Duration::from_secs(3600)).await;
        }
    }

    /// Tells every job to stop where it is and to stay recorded; returns when none touches a store any more.
    pub async fn stop(&self) {
        for job in self.jobs() {
            job.stop.send_if_modified(|stop| std::mem::replace(stop, Stop::Shutdown) == Stop::No);
        }
        while Arc::strong_count(&self.inner.tasks) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // What is not given up by then is given up by the next mount.
        let early = self.inner.early.acquire_many(EARLY_UPLOADS as u32);
        let _ = tokio::time::timeout(EARLY_LIMIT, early).await;
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Puts a new job into the table unless its key is taken.
    fn enter(&self, request: JobRequest, file: Option<Arc<dyn VirtualFile>>) -> Result<Arc<Job>> {
        let bucket = self.inner.bucket(&request.bucket)?;
        let url = bucket.url_of(&request.key);
        let mut table = self.inner.table.lock();
        let entry = (request.bucket.clone(), request.key.clone());
        if let Some(other) = table.newest.get(&entry).filter(|j| !j.status().status.is_final()) {
            let what = format!("job {} is making this object", other.id());
            return Err(Error::new(ErrorKind::Busy, what).in_file(url));
        }
        if file.is_some() {
            self.inner.check_limits(&mut table, &request).map_err(|e| e.in_file(&url))?;
        }
        let job = Arc::new(Job::new(request, url, file));
        table.insert(&job);
        Ok(job)
    }

    fn spawn(&self, job: Arc<Job>) {
        let inner = Arc::clone(&self.inner);
        let task = Arc::clone(&self.inner.tasks);
        self.inner.runtime.spawn(async move {
            inner.run(&job).await;
            drop(task);
        });
    }
}

impl Table {
    fn insert(&mut self, job: &Arc<Job>) {
        let request = job.request();
        self.newest.insert((request.bucket.clone(), request.key.clone()), Arc::clone(job));
        self.jobs.insert(job.id(), Arc::clone(job));
        let ended: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, j)| j.status().status.is_final())
            .map(|(id, _)| id.clone())
            .collect();
        for id in ended.iter().take(ended.len().saturating_sub(ENDED_KEPT)) {
            if let Some(old) = self.jobs.remove(id) {
                let entry = (old.request().bucket.clone(), old.request().key.clone());
                if self.newest.get(&entry).is_some_and(|newest| Arc::ptr_eq(newest, &old)) {
                    self.newest.remove(&entry);
                }
            }
        }
    }
}

impl Inner {
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The right to one more upload of a file that is being written.
    pub(super) fn early_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.early).try_acquire_owned().ok()
    }

    pub(super) fn bucket(&self, name: &str) -> Result<&Bucket> {
        self.buckets
            .get(name)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no bucket {name:?} is mounted here")))
    }

    async fn run(self: &Arc<Self>, job: &Arc<Job>) {
        let mut stop = job.stop.subscribe();
        let mut attempt = std::pin::pin!(self.make(job));
        let mut result = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop != Stop::No) => None,
            result = &mut attempt => Some(result),
        };
        if result.is_none() && job.is_publishing() {
            result = Some(attempt.await);
        }
        match result {
            Some(result) => self.end(job, result).await,
            None if *job.stop.borrow() == Stop::Cancel => {
                let error =
                    Error::new(ErrorKind::Cancelled, "the export was cancelled").in_file(job.status().url);
                self.end(job, Err(error)).await;
            }
            // The record stays as it is: the next daemon takes the job up.
            None => {
                drop(job.step.lock().await);
                info!(job = job.id(), "stopped; the next mount goes on");
            }
        }
    }

    /// Sends what the job exports.
    pub(super) async fn upload(self: &Arc<Self>, job: &Arc<Job>) -> Result<Uploaded> {
        let request = job.request();
        let closed = |e| Error::new(ErrorKind::Internal, "queue closed").because(e);
        let running = self.running.get(&request.bucket);
        let running = running.ok_or_else(|| Error::new(ErrorKind::NotFound, "the bucket is not mounted"))?;
        let _permit = running.acquire().await.map_err(closed)?;
        let _allowed = match request.source {
            JobSource::Image(_) => Some(self.allowed.acquire().await.map_err(closed)?),
            JobSource::Staged(_) => None,
        };
        let bucket = self.bucket(&request.bucket)?;
        let file = job.file().ok_or_else(|| Error::new(ErrorKind::Internal, "the job has no source"))?;
        job.start(Arc::clone(&file));
        info!(job = job.id(), url = job.status().url, "export started");
        self.put_status(job, job.status().to_json()).await;
        let written = AtomicI64::new(job.status().begin_time.as_second());
        let attempt = Attempt { bucket, key: &request.key, file, job, metrics: &self.metrics };
        let start = |part_size| self.start_upload(bucket.clone(), job, part_size);
        let progress = || async {
            let now = jiff::Timestamp::now().as_second();
            if now - written.load(Ordering::Relaxed) >= STATUS_INTERVAL.as_secs() as i64 {
                written.store(now, Ordering::Relaxed);
                self.put_status(job, job.status().to_json()).await;
            }
        };
        if let Some(early) = job.take_early_upload() {
            job.set_upload(early.finish().await);
        }
        let uploaded = self.attempts(&attempt, start, progress).await?;
        self.put_checksums(bucket, job, &uploaded).await;
        Ok(uploaded)
    }

    /// Attempts until one succeeds, or another is of no use.
    async fn attempts<S, P>(
        &self,
        attempt: &Attempt<'_>,
        start: impl Fn(u64) -> S,
        progress: impl Fn() -> P,
    ) -> Result<Uploaded>
    where
        S: Future<Output = Result<Arc<PartLog>>>,
        P: Future<Output = ()>,
    {
        let job = attempt.job;
        let (mut failures, mut is_begun_again) = (0, false);
        loop {
            let error = match attempt.run(&start, &progress).await {
                Ok(uploaded) => return Ok(uploaded),
                Err(error) => error,
            };
            let lost = job.upload().filter(|_| error.kind() == ErrorKind::NotFound && !is_begun_again);
            // Who wrote the bytes waits in close, where nothing can interrupt it, and is told instead.
            let may_wait = job.request().source.image().is_some() && error.is_transient();
            let pause = self.retries.pause_after(failures).filter(|_| may_wait);
            match (lost, pause) {
                (Some(log), _) => {
                    // Somebody, or a rule of the bucket, has given up the upload; or something else is not there.
                    warn!(job = job.id(), "the upload is begun again: {}", error.report());
                    is_begun_again = true;
                    job.set_upload(None);
                    self.abort(&log).await;
                    log.remove();
                }
                (None, Some(pause)) => {
                    failures += 1;
                    warn!(job = job.id(), "goes on in {:.1} s: {}", pause.as_secs_f64(), error.report());
                    tokio::time::sleep(pause).await;
                }
                (None, None) => return Err(error),
            }
            job.start(Arc::clone(&attempt.file));
        }
    }

    /// Starts the job's upload and records it, both or neither when the job is stopped meanwhile.
    async fn start_upload(
        self: &Arc<Self>,
        bucket: Bucket,
        job: &Arc<Job>,
        part_size: u64,
    ) -> Result<Arc<PartLog>> {
        let (inner, owned) = (Arc::clone(self), Arc::clone(job));
        let step = async move {
            let request = owned.request();
            let log =
                inner.begin_upload(&bucket, &request.key, &request.tags, part_size, &owned.id()).await?;
            owned.set_upload(Some(Arc::clone(&log)));
            Ok(log)
        };
        job.whole_step(step).await?
    }

    /// Starts an upload and its log.
    pub(super) async fn begin_upload(
        &self,
        bucket: &Bucket,
        key: &ObjectKey,
        tags: &Tags,
        part_size: u64,
        log_id: &str,
    ) -> Result<Arc<PartLog>> {
        let id = bucket.start_upload(key, part_size, tags).await?;
        let name = UploadName { bucket: bucket.name().to_owned(), key: key.clone(), id, part_size };
        match PartLog::create(self.journal.upload_path(log_id), name.clone()) {
            Ok(log) => Ok(Arc::new(log)),
            Err(error) => {
                let _ = bucket.abort_upload(key, &name.id).await;
                Err(error)
            }
        }
    }

    /// Ends a job for good: leaves nothing of a failed upload, writes record and status file, wakes who waits.
    async fn end(self: &Arc<Self>, job: &Arc<Job>, result: Result<Uploaded>) {
        drop(job.step.lock().await);
        if let (Err(_), Some(log)) = (&result, job.upload()) {
            self.abort(&log).await;
        }
        let mut last = job.status();
        match &result {
            Ok(uploaded) => {
                last.succeed(uploaded.meta.etag.clone(), &uploaded.sha256, &uploaded.md5);
                self.metrics.jobs_succeeded.add(1);
                info!(job = last.job_id, url = last.url, "export succeeded");
            }
            Err(error) => {
                last.fail(&self.policy.with_cloud_code(error.clone()));
                if last.status == JobState::Cancelled {
                    self.metrics.jobs_cancelled.add(1);
                } else {
                    self.metrics.jobs_failed.add(1);
                }
                error!(job = last.job_id, url = last.url, "export ended: {}", error.report());
            }
        }
        if let Err(error) = self.journal.save(&Record::new(job.request().clone(), last.clone())) {
            error!(job = last.job_id, "{}", error.report());
        }
        if let (Ok(_), Some(log)) = (&result, job.upload()) {
            log.remove();
        }
        // The bucket has the status before anybody is told of the end, unless the store is full or gone.
        if !job.is_following() {
            let written = self.put_status(job, last.to_json()).await;
            self.note_written(job, &last, written);
        }
        if let Some(lease) = job.lease() {
            lease.end().await;
        }
        job.end(last, result.as_ref().err());
        if let JobSource::Staged(path) = &job.request().source {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Gives up an upload. Its log stays when that fails, so that the next mount tries again.
    pub(super) async fn abort(&self, log: &PartLog) {
        let name = log.name();
        let Ok(bucket) = self.bucket(&name.bucket) else { return };
        match bucket.abort_upload(&name.key, &name.id).await {
            Ok(()) => log.remove(),
            Err(error) => {
                warn!(key = %name.key, "an unfinished upload could not be aborted: {}", error.report());
            }
        }
    }

    /// Writes the status into the bucket, for other hosts and plain clients. A failure is logged: the mount and
    /// the journal have the status all the same. Returns whether it was written.
    async fn put_status(self: &Arc<Self>, job: &Arc<Job>, json: Vec<u8>) -> bool {
        let (inner, owned) = (Arc::clone(self), Arc::clone(job));
        let put = async move {
            let request = owned.request();
            let bucket = inner.bucket(&request.bucket)?;
            bucket
                .put(&request.key.with_suffix(".status")?, Bytes::from(json), &Replaces::Anything)
                .await
                .map(drop)
        };
        let late = |_| Err(Error::new(ErrorKind::TimedOut, "the store did not answer in time"));
        let limited = async move { tokio::time::timeout(STATUS_LIMIT, put).await.unwrap_or_else(late) };
        let result = job.whole_step(limited).await.and_then(|result| result);
        if let Err(error) = &result {
            warn!(job = job.id(), "the status file could not be written into the bucket: {}", error.report());
        }
        result.is_ok()
    }

    /// Remembers, in the journal too, that the bucket lacks a final status: this mount shows its own, and the
    /// next mount tries again.
    fn note_written(&self, job: &Job, last: &Status, written: bool) {
        job.set_status_unwritten(!written);
        if !written {
            let mut record = Record::new(job.request().clone(), last.clone());
            record.status_unwritten = true;
            if let Err(error) = self.journal.save(&record) {
                error!(job = last.job_id, "{}", error.report());
            }
        }
    }

    /// `KEY.sha256` and `KEY.md5`, as `sha256sum -c` and `md5sum -c` read them in the object's directory.
    ///
    /// The object is in place by now, so a failure here does not fail the job, whose status has the digests. But an
    /// older object's checksum must not stay beside the new one.
    async fn put_checksums(&self, bucket: &Bucket, job: &Job, uploaded: &Uploaded) {
        let key = &job.request().key;
        for (suffix, digest) in [(".sha256", &uploaded.sha256), (".md5", &uploaded.md5)] {
            let put = async {
                let line = checksum_line(digest, key.file_name());
                bucket.put(&key.with_suffix(suffix)?, Bytes::from(line), &Replaces::Anything).await
            };
            if let Err(error) = put.await {
                warn!(job = job.id(), "a checksum file could not be written: {}", error.report());
                if let Ok(stale) = key.with_suffix(suffix) {
                    let _ = bucket.delete(&stale).await;
                }
            }
        }
    }
}

/// A line of coreutils' checksum files; names with a backslash or a newline are escaped as coreutils does.
fn checksum_line(digest: &str, name: &str) -> String {
    if name.contains(['\\', '\n', '\r']) {
        let name = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
        return format!("\\{digest}  {name}\n");
    }
    format!("{digest}  {name}\n")
}
