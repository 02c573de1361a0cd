//! A job: what was asked for, how far it is, and those who wait for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::early::EarlyUpload;
use super::lease::Lease;
use super::part_log::PartLog;
use super::status::{JobState, STATUS_VERSION, Status, StatusImage};
use crate::bucket::{ObjectKey, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::vfile::VirtualFile;

/// Where a job's bytes come from, in words that a later process understands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobSource {
    /// A file of the catalog.
    Image(StatusImage),
    /// A file in the staging directory, complete and synced, removed when the job ends.
    Staged(PathBuf),
}

/// The bytes of a recorded job's image, found again.
pub struct RecordedFile {
    /// The bytes.
    pub file: Arc<dyn VirtualFile>,
    /// What they are known by now.
    pub image: StatusImage,
    /// Whether they certainly are those that were recorded, so that an upload of them can be continued; else it is
    /// made anew.
    pub continues: bool,
}

impl JobSource {
    /// The image, where it is one; what a program wrote is none.
    pub fn image(&self) -> Option<&StatusImage> {
        match self {
            Self::Image(image) => Some(image),
            Self::Staged(_) => None,
        }
    }
}

/// What is to be exported, and where to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRequest {
    /// The bucket's name in the mount.
    pub bucket: String,
    /// The object's key.
    pub key: ObjectKey,
    /// The bytes.
    pub source: JobSource,
    /// The client's token.
    pub client_token: Option<String>,
    /// The object's tags.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
}

/// Why a running job is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Go on.
    No,
    /// The user cancelled it: it ends, and nothing of it stays.
    Cancel,
    /// The daemon ends: it stays recorded and is taken up by the next one.
    Shutdown,
}

/// A job of this process's queue.
pub struct Job {
    request: JobRequest,
    status: Mutex<Status>,
    ended: Condvar,
    /// The same for tasks.
    ended_async: Notify,
    /// The error as it happened, for waiters; the status has it in words.
    failure: Mutex<Option<Error>>,
    file: Mutex<Option<Arc<dyn VirtualFile>>>,
    started: Mutex<Option<Instant>>,
    /// Whether the file's size was not known when the job was started.
    begun_unsized: AtomicBool,
    /// The multipart upload under way.
    upload: Mutex<Option<Arc<PartLog>>>,
    /// What was sent while a program wrote the file.
    early_upload: Mutex<Option<EarlyUpload>>,
    /// Whether the bucket has an older status than this job: it could not be written there at the end.
    status_unwritten: AtomicBool,
    pub(super) stop: watch::Sender<Stop>,
    /// The right to make the object, where hosts share the bucket.
    lease: Mutex<Option<Arc<Lease>>>,
    /// Whether another host makes the object, and its status is the one in the bucket.
    following: AtomicBool,
    /// Whether the object is being put in place, which cannot be taken back.
    publishing: AtomicBool,
    /// Held by a step that must not be cut off half-way; the job ends after it.
    pub(super) step: Arc<tokio::sync::Mutex<()>>,
}

impl Job {
    /// A job that is about to be recorded.
    pub(super) fn new(request: JobRequest, url: String, file: Option<Arc<dyn VirtualFile>>) -> Self {
        let size = file.as_ref().and_then(|f| f.known_size());
        let status = Status {
            version: STATUS_VERSION,
            job_id: new_job_id(),
            status: JobState::Init,
            progress: 0,
            image: request.source.image().cloned(),
            bucket: request.bucket.clone(),
            key: request.key.to_string(),
            url,
            size,
            bytes_done: 0,
            bytes_uploaded: 0,
            begin_time: now(),
            end_time: None,
            eta_seconds: None,
            md5: None,
            sha256: None,
            etag: None,
            client_token: request.client_token.clone(),
            repeated: 0,
            host: nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default(),
            attempt: 0,
            error: None,
            updated: None,
            valid_seconds: None,
            waiting: None,
            notes: Vec::new(),
        };
        Self::from_record(request, status, file)
    }

    /// A job as a record tells it.
    pub(super) fn from_record(
        request: JobRequest,
        status: Status,
        file: Option<Arc<dyn VirtualFile>>,
    ) -> Self {
        Self {
            request,
            status: Mutex::new(status),
            ended: Condvar::new(),
            ended_async: Notify::new(),
            failure: Mutex::default(),
            file: Mutex::new(file),
            started: Mutex::default(),
            begun_unsized: AtomicBool::new(false),
            upload: Mutex::default(),
            early_upload: Mutex::default(),
            status_unwritten: AtomicBool::new(false),
            stop: watch::Sender::new(Stop::No),
            lease: Mutex::default(),
            following: AtomicBool::new(false),
            publishing: AtomicBool::new(false),
            step: Arc::default(),
        }
    }

    /// What was asked for.
    pub fn request(&self) -> &JobRequest {
        &self.request
    }

    /// The job's id.
    pub fn id(&self) -> String {
        self.status.lock().job_id.clone()
    }

    /// A snapshot of the job's status.
    pub fn status(&self) -> Status {
        let mut status = self.status.lock().clone();
        if status.status == JobState::Running && !self.is_following() {
            status.progress = self.progress(&status);
            status.eta_seconds = self.eta(&status);
        }
        status
    }

    /// The bytes that the job exports, as long as it has not ended.
    pub fn file(&self) -> Option<Arc<dyn VirtualFile>> {
        self.file.lock().clone()
    }

    /// Waits until the job has ended, at most `limit`.
    ///
    /// # Errors
    /// The job's own failure, or [`TimedOut`](ErrorKind::TimedOut).
    pub fn wait(&self, limit: Duration) -> Result<Status> {
        let deadline = Instant::now() + limit;
        let mut status = self.status.lock();
        while !status.status.is_final() {
            if self.ended.wait_until(&mut status, deadline).timed_out() && !status.status.is_final() {
                let what = format!("the job has not ended within {} seconds; it goes on", limit.as_secs());
                return Err(Error::new(ErrorKind::TimedOut, what).in_file(status.url.clone()));
            }
        }
        let status = status.clone();
        self.outcome(&status).map(|()| status)
    }

    /// The same for tasks: no thread waits.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn ended(&self, limit: Duration) -> Result<Status> {
        let ended = async {
            let mut ended = std::pin::pin!(self.ended_async.notified());
            // Waited for from here on, so that an end between the look and the wait wakes it.
            ended.as_mut().enable();
            if !self.status.lock().status.is_final() {
                ended.await;
            }
        };
        let timed_out = tokio::time::timeout(limit, ended).await.is_err();
        let status = self.status.lock().clone();
        if timed_out && !status.status.is_final() {
            let what = format!("the job has not ended within {} seconds; it goes on", limit.as_secs());
            return Err(Error::new(ErrorKind::TimedOut, what).in_file(status.url));
        }
        self.outcome(&status).map(|()| status)
    }

    /// The failure of a job that has failed.
    pub fn outcome(&self, status: &Status) -> Result<()> {
        if matches!(status.status, JobState::Fail | JobState::Cancelled) {
            let unknown = || {
                let text = status.error.as_ref().map_or("the job failed", |e| e.description.as_str());
                Error::new(ErrorKind::UploadFailed, text).in_file(status.url.clone())
            };
            return Err(self.failure.lock().clone().unwrap_or_else(unknown));
        }
        Ok(())
    }

    /// Asks the job to end; it does when its transfers under way are dropped.
    pub fn cancel(&self) {
        self.stop.send_if_modified(|stop| {
            let first = *stop == Stop::No;
            *stop = if first { Stop::Cancel } else { *stop };
            first
        });
    }

    /// Changes the status under its lock.
    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock());
    }

    /// The bytes of a job that a record tells.
    pub(super) fn set_file(&self, file: Arc<dyn VirtualFile>) {
        *self.file.lock() = Some(file);
    }

    /// Begins an attempt.
    pub(super) fn start(&self, file: Arc<dyn VirtualFile>) {
        *self.started.lock() = Some(Instant::now());
        let size = file.known_size();
        *self.file.lock() = Some(file);
        self.update(|s| {
            s.status = JobState::Running;
            s.attempt += 1;
            s.size = size;
            (s.bytes_done, s.bytes_uploaded, s.progress) = (0, 0, 0);
        });
        self.begun_unsized.store(size.is_none(), Ordering::Relaxed);
    }

    /// Counts bytes that the store confirmed.
    pub(super) fn uploaded(&self, bytes: u64) {
        self.update(|s| s.bytes_uploaded += bytes);
    }

    /// Percent of the bytes, whose number is estimated where it is not known. A file that cannot be read before it is
    /// known is half done then. 100 is for SUCCESS alone.
    fn progress(&self, status: &Status) -> u8 {
        let percent =
            |done: u64, total: u64| done.saturating_mul(100).checked_div(total).unwrap_or(0).min(100);
        let uploaded = |size| percent(status.bytes_uploaded, size);
        let file = self.file().filter(|_| self.begun_unsized.load(Ordering::Relaxed));
        let whole = match (file.and_then(|file| file.preparation()), status.size) {
            (Some(work), size) if work.is_first => {
                (percent(work.done, work.total) + size.map_or(0, uploaded)) / 2
            }
            (_, Some(size)) => uploaded(size),
            (Some(work), None) => uploaded(work.bytes.saturating_mul(work.total) / work.done.max(1)),
            (None, None) => 0,
        };
        whole.min(99) as u8
    }

    /// Whether the status has to be taken from here, because the bucket's file is not the newest.
    pub fn holds_status(&self) -> bool {
        !self.is_following() && !self.status.lock().status.is_final()
            || self.status_unwritten.load(Ordering::Relaxed)
    }

    /// Remembers whether the bucket lacks the final status.
    pub(super) fn set_status_unwritten(&self, unwritten: bool) {
        self.status_unwritten.store(unwritten, Ordering::Relaxed);
    }

    /// Runs a step that a stop of the job does not cut off: its request may have reached the store already. Who
    /// ends the job waits for it by taking `step`.
    pub(super) async fn whole_step<T: Send + 'static>(
        &self,
        step: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        let guard = Arc::clone(&self.step).lock_owned().await;
        let running = tokio::spawn(async move {
            let result = step.await;
            drop(guard);
            result
        });
        running.await.map_err(|e| Error::new(ErrorKind::Internal, "a step of the job panicked").because(e))
    }

    pub(super) fn set_lease(&self, lease: Option<Arc<Lease>>) {
        *self.lease.lock() = lease;
    }

    /// The right to make the object, where hosts share the bucket.
    pub(super) fn lease(&self) -> Option<Arc<Lease>> {
        self.lease.lock().clone()
    }

    pub(super) fn set_following(&self, following: bool) {
        self.following.store(following, Ordering::Relaxed);
    }

    /// Whether another host makes the object.
    pub(super) fn is_following(&self) -> bool {
        self.following.load(Ordering::Relaxed)
    }

    /// From here on a stop waits for the attempt's own end.
    pub(super) fn set_publishing(&self) {
        self.publishing.store(true, Ordering::Relaxed);
    }

    /// Whether the object is being put in place.
    pub(super) fn is_publishing(&self) -> bool {
        self.publishing.load(Ordering::Relaxed)
    }

    /// Remembers the multipart upload under way.
    pub(super) fn set_upload(&self, upload: Option<Arc<PartLog>>) {
        *self.upload.lock() = upload;
    }

    /// The multipart upload under way.
    pub(super) fn upload(&self) -> Option<Arc<PartLog>> {
        self.upload.lock().clone()
    }

    /// Gives the job what was sent while its file was written.
    pub(super) fn set_early_upload(&self, early: Option<EarlyUpload>) {
        *self.early_upload.lock() = early;
    }

    pub(super) fn take_early_upload(&self) -> Option<EarlyUpload> {
        self.early_upload.lock().take()
    }

    /// Ends the job: `last` is its status for ever, `error` is kept for waiters, all of them are woken.
    pub(super) fn end(&self, last: Status, error: Option<&Error>) {
        *self.failure.lock() = error.cloned();
        self.set_early_upload(None);
        *self.file.lock() = None;
        *self.status.lock() = last;
        self.ended.notify_all();
        self.ended_async.notify_waiters();
    }

    fn eta(&self, status: &Status) -> Option<u64> {
        let elapsed = (*self.started.lock())?.elapsed().as_secs_f64();
        let (done, size) = match status.size {
            Some(size) if !self.begun_unsized.load(Ordering::Relaxed) => (status.bytes_uploaded, size),
            _ => (status.progress.into(), 100),
        };
        (done > 0).then(|| (elapsed * size.saturating_sub(done) as f64 / done as f64).ceil() as u64)
    }
}

/// Now, to the second's thousandth: what people and programs read.
pub(super) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// An id that sorts by time and is unique over hosts: milliseconds since 1970 and 64 random bits, hexadecimal.
pub(super) fn new_job_id() -> String {
    use std::hash::{BuildHasher, Hasher};
    // RandomState is seeded by the operating system and differs at each call.
    let random = std::hash::RandomState::new().build_hasher().finish();
    format!("{:012x}-{random:016x}", Timestamp::now().as_millisecond())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::{Extent, ExtentKind};
    use crate::units::FileOffset;
    use crate::vfile::Preparation;

    /// A file that is being prepared.
    struct Prepared {
        size: Mutex<Option<u64>>,
        work: Mutex<Preparation>,
    }

    impl VirtualFile for Prepared {
        fn file_size(&self) -> u64 {
            self.size.lock().unwrap_or(9999)
        }

        fn known_size(&self) -> Option<u64> {
            *self.size.lock()
        }

        fn preparation(&self) -> Option<Preparation> {
            Some(*self.work.lock())
        }

        fn read_at(&self, _: FileOffset, _: &mut [u8]) -> Result<usize> {
            Ok(0)
        }

        fn extent_at(&self, _: FileOffset) -> Result<Extent> {
            Ok(Extent::new(ExtentKind::Data, 1))
        }
    }

    #[test]
    fn progress_is_of_the_whole_work() {
        let request = || JobRequest {
            bucket: "b".to_owned(),
            key: ObjectKey::parse("k").unwrap(),
            source: JobSource::Staged(PathBuf::new()),
            client_token: None,
            tags: Default::default(),
        };
        for (is_first, expected) in [(true, [0, 25, 50, 75, 99]), (false, [0, 25, 25, 75, 99])] {
            let work = Preparation { done: 0, total: 10, bytes: 0, is_first };
            let file = Arc::new(Prepared { size: Mutex::default(), work: Mutex::new(work) });
            let job = Job::new(request(), String::new(), Some(file.clone()));
            job.start(file.clone());
            let progress = || job.status().progress;
            let mut seen = vec![progress()];
            *file.work.lock() = Preparation { done: 5, bytes: 500, ..work };
            if !is_first {
                job.uploaded(250);
            }
            seen.push(progress());
            file.work.lock().done = 10;
            *file.size.lock() = Some(1000);
            job.update(|s| s.size = Some(1000));
            seen.push(progress());
            job.uploaded(500);
            seen.push(progress());
            job.uploaded(500);
            seen.push(progress());
            assert_eq!(seen, expected);
        }
        // What was known at the start is uploaded only.
        let work = Preparation { done: 10, total: 10, bytes: 1000, is_first: true };
        let file = Arc::new(Prepared { size: Mutex::new(Some(1000)), work: Mutex::new(work) });
        let job = Job::new(request(), String::new(), Some(file.clone()));
        job.start(file);
        job.uploaded(300);
        assert_eq!(job.status().progress, 30);
    }
}
