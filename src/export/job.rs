//! A job: a value to display and to wait for. The work is its run's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Notify, watch};

use super::job_id::JobId;
use super::multipart::parts::{Observer, Share};
use super::progress::{progress, seconds_left};
use super::request::JobRequest;
use super::status::{JobState, STATUS_VALID, STATUS_VERSION, Status, now};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::vfile::VirtualFile;

/// Why a running job is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It is not.
    No,
    /// The user cancelled it: it ends, and nothing of it stays.
    Cancel,
    /// The daemon ends: it stays recorded, and the next one resumes it.
    Shutdown,
}

/// Where the newest status of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Holds {
    /// Here, until it has ended; then in the bucket.
    UntilEnd,
    /// Here: the bucket's is older, because it could not be written.
    Always,
    /// In the bucket, or nowhere but in jobs/: another host makes the object, the key has no sidecars, or a user's object
    /// stands in the status's place.
    Never,
}

/// A job of this process's queue.
pub struct Job {
    request: JobRequest,
    id: String,
    state: Mutex<State>,
    ended: Condvar,
    /// The same for tasks.
    ended_async: Notify,
    holds: AtomicU8,
    pub(super) stop: watch::Sender<Stop>,
    metrics: Arc<Metrics>,
}

struct State {
    status: Status,
    /// The error as it happened, for waiters; the status has it in words.
    failure: Option<Error>,
    /// Why it is not known whether the object is in place: who waits is told of that instead of the end.
    doubt: Option<Error>,
    file: Option<Arc<dyn VirtualFile>>,
    attempt: Option<Attempt>,
}

#[derive(Clone, Copy)]
struct Attempt {
    started: Instant,
    /// Whether the file's size was not known then.
    unsized_then: bool,
}

impl Job {
    /// A job that is about to be recorded.
    pub(super) fn new(
        id: JobId,
        request: JobRequest,
        url: String,
        file: Option<Arc<dyn VirtualFile>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let size = file.as_ref().and_then(|f| f.known_size());
        let status = Status {
            version: STATUS_VERSION,
            job_id: id,
            status: JobState::Init,
            progress: 0,
            image: request.source.image().cloned(),
            bucket: request.bucket.clone(),
            key: request.key.to_string(),
            url,
            size,
            bytes_done: 0,
            bytes_uploaded: 0,
            bytes_sent: 0,
            bytes_reused: 0,
            bytes_zero: 0,
            begin_time: now(),
            end_time: None,
            eta_seconds: None,
            md5: None,
            sha256: None,
            crc64nvme: None,
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
        Self::from_record(request, status, file, metrics)
    }

    /// A job as its record has it.
    pub(super) fn from_record(
        request: JobRequest,
        status: Status,
        file: Option<Arc<dyn VirtualFile>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let id = status.job_id.to_string();
        Self {
            request,
            id,
            state: Mutex::new(State { status, failure: None, doubt: None, file, attempt: None }),
            ended: Condvar::new(),
            ended_async: Notify::new(),
            holds: AtomicU8::new(Holds::UntilEnd as u8),
            stop: watch::Sender::new(Stop::No),
            metrics,
        }
    }

    /// What was asked for.
    pub fn request(&self) -> &JobRequest {
        &self.request
    }

    /// The job's id.
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// A snapshot of the job's status.
    pub fn status(&self) -> Status {
        let (mut status, file, attempt) = {
            let state = self.state.lock();
            (state.status.clone(), state.file.clone(), state.attempt)
        };
        if !status.status.is_final() {
            (status.updated, status.valid_seconds) = (Some(now()), Some(STATUS_VALID.as_secs()));
        }
        if status.status == JobState::Running
            && let Some(attempt) = attempt
        {
            let work = file.filter(|_| attempt.unsized_then).and_then(|file| file.preparation());
            status.progress = progress(&status, work);
            status.eta_seconds = seconds_left(&status, attempt.started.elapsed(), attempt.unsized_then);
        }
        status
    }

    /// Whether the job has ended.
    pub fn has_ended(&self) -> bool {
        self.state.lock().status.status.is_final()
    }

    /// Whether the job waits for what is not in this mount, and may do so for ever.
    pub fn is_waiting(&self) -> bool {
        self.state.lock().status.waiting.is_some()
    }

    /// The bytes that the job exports, as long as it has not ended.
    pub fn file(&self) -> Option<Arc<dyn VirtualFile>> {
        self.state.lock().file.clone()
    }

    /// Waits until the job has ended, at most `limit`.
    ///
    /// # Errors
    /// The job's own failure, or [`TimedOut`](ErrorKind::TimedOut).
    pub fn wait(&self, limit: Duration) -> Result<Status> {
        let deadline = Instant::now() + limit;
        let mut state = self.state.lock();
        while !state.status.status.is_final() {
            if let Some(doubt) = &state.doubt {
                return Err(doubt.clone());
            }
            if self.ended.wait_until(&mut state, deadline).timed_out() && !state.status.status.is_final() {
                return Err(timed_out(&state.status, limit));
            }
        }
        let status = state.status.clone();
        drop(state);
        self.outcome(&status).map(|()| status)
    }

    /// The same for tasks: no thread waits.
    ///
    /// # Errors
    /// As [`wait`](Self::wait), and that of a store that does not say whether the object is in place, while the job goes on.
    pub async fn ended(&self, limit: Duration) -> Result<Status> {
        let ended = async {
            let mut ended = std::pin::pin!(self.ended_async.notified());
            // Waited for from here on, so that an end between the look and the wait wakes it.
            ended.as_mut().enable();
            if !self.has_ended() && self.doubt().is_none() {
                ended.await;
            }
        };
        let is_late = tokio::time::timeout(limit, ended).await.is_err();
        if let Some(doubt) = self.doubt().filter(|_| !self.has_ended()) {
            return Err(doubt);
        }
        let status = self.state.lock().status.clone();
        if is_late && !status.status.is_final() {
            return Err(timed_out(&status, limit));
        }
        self.outcome(&status).map(|()| status)
    }

    fn doubt(&self) -> Option<Error> {
        self.state.lock().doubt.clone()
    }

    /// Tells who waits that it is not known whether the object is in place, and why; or that it is known again.
    pub(super) fn set_doubt(&self, doubt: Option<&Error>) {
        self.state.lock().doubt = doubt.cloned();
        if doubt.is_some() {
            self.ended.notify_all();
            self.ended_async.notify_waiters();
        }
    }

    /// The failure of a job that has failed.
    pub fn outcome(&self, status: &Status) -> Result<()> {
        if matches!(status.status, JobState::Fail | JobState::Cancelled) {
            let unknown = || {
                let text = status.error.as_ref().map_or("the job failed", |e| e.description.as_str());
                Error::new(ErrorKind::UploadFailed, text).in_file(status.url.clone())
            };
            return Err(self.state.lock().failure.clone().unwrap_or_else(unknown));
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

    /// Whether the status has to be taken from here, because the bucket's file is not the newest.
    pub fn holds_status(&self) -> bool {
        let holds = self.holds.load(Ordering::Relaxed);
        holds == Holds::Always as u8 || holds == Holds::UntilEnd as u8 && !self.has_ended()
    }

    pub(super) fn set_holds(&self, holds: Holds) {
        self.holds.store(holds as u8, Ordering::Relaxed);
    }

    /// Changes the status under its lock.
    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.state.lock().status);
    }

    /// What the job waits for, or that it does not wait any more.
    pub(super) fn set_waiting(&self, reason: Option<String>) {
        self.update(|s| s.waiting = reason);
    }

    /// Notes for people what is the same at every attempt, once.
    pub(super) fn note(&self, note: String) {
        self.update(|s| {
            if !s.notes.contains(&note) {
                s.notes.push(note);
            }
        });
    }

    /// Begins an attempt.
    pub(super) fn start(&self, file: Arc<dyn VirtualFile>) {
        let size = file.known_size();
        let mut state = self.state.lock();
        state.file = Some(file);
        state.attempt = Some(Attempt { started: Instant::now(), unsized_then: size.is_none() });
        let status = &mut state.status;
        status.status = JobState::Running;
        status.attempt = status.attempt.saturating_add(1);
        status.size = size;
        (status.bytes_done, status.bytes_uploaded, status.progress) = (0, 0, 0);
        (status.bytes_sent, status.bytes_reused, status.bytes_zero) = (0, 0, 0);
        status.waiting = None;
    }

    /// Ends the job: `last` is its status for ever, `error` is kept for waiters, all of them are woken.
    pub(super) fn end(&self, last: Status, error: Option<&Error>) {
        let mut state = self.state.lock();
        state.failure = error.cloned();
        state.file = None;
        state.status = last;
        drop(state);
        self.ended.notify_all();
        self.ended_async.notify_waiters();
    }
}

impl Observer for Job {
    fn read(&self, up_to: u64) {
        let size = self.file().and_then(|file| file.known_size());
        self.update(|s| {
            s.bytes_done = up_to;
            s.size = s.size.or(size);
        });
    }

    fn sized(&self, size: u64) {
        self.update(|s| s.size = Some(size));
    }

    fn stored(&self, bytes: Share, is_new: bool) {
        self.update(|s| {
            s.bytes_uploaded = s.bytes_uploaded.saturating_add(bytes.bytes());
            s.bytes_sent = s.bytes_sent.saturating_add(bytes.sent);
            s.bytes_reused = s.bytes_reused.saturating_add(bytes.reused);
            s.bytes_zero = s.bytes_zero.saturating_add(bytes.zero);
        });
        if is_new {
            self.metrics.uploaded_bytes.add(bytes.sent);
            self.metrics.reused_bytes.add(bytes.reused);
            self.metrics.zero_bytes.add(bytes.zero);
        }
    }
}

fn timed_out(status: &Status, limit: Duration) -> Error {
    let what = format!("the job has not ended within {} seconds; it goes on", limit.as_secs());
    Error::new(ErrorKind::TimedOut, what).in_file(status.url.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    use crate::bucket::ObjectKey;
    use crate::export::request::JobSource;
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
            replaces: None,
        };
        for (is_first, expected) in [(true, [0, 25, 50, 75, 99]), (false, [0, 25, 25, 75, 99])] {
            let work = Preparation { done: 0, total: 10, bytes: 0, is_first };
            let file = Arc::new(Prepared { size: Mutex::default(), work: Mutex::new(work) });
            let job = Job::new(JobId::new(), request(), String::new(), Some(file.clone()), Arc::default());
            job.start(file.clone());
            let progress = || job.status().progress;
            let mut seen = vec![progress()];
            *file.work.lock() = Preparation { done: 5, bytes: 500, ..work };
            if !is_first {
                job.stored(Share::sent(250), true);
            }
            seen.push(progress());
            file.work.lock().done = 10;
            *file.size.lock() = Some(1000);
            job.update(|s| s.size = Some(1000));
            seen.push(progress());
            job.stored(Share::sent(500), true);
            seen.push(progress());
            job.stored(Share::sent(500), true);
            seen.push(progress());
            assert_eq!(seen, expected);
        }
        // What was known at the start is uploaded only.
        let work = Preparation { done: 10, total: 10, bytes: 1000, is_first: true };
        let file = Arc::new(Prepared { size: Mutex::new(Some(1000)), work: Mutex::new(work) });
        let job = Job::new(JobId::new(), request(), String::new(), Some(file.clone()), Arc::default());
        job.start(file);
        job.stored(Share::sent(300), true);
        assert_eq!(job.status().progress, 30);
    }
}
