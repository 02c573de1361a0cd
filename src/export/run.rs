//! A run: the work of one job, from its record to its end.
//!
//! The states that it goes through are the table of [`stage`](super::stage).

mod end;
mod shared;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tracing::{info, warn};

use super::context::{Context, MountedBucket, Permits, Resolved};
use super::job::{Job, Stop};
use super::lease::{self, Lease};
use super::multipart::digests::joined;
use super::multipart::early::EarlyUpload;
use super::multipart::log::{Placed, UploadLog};
use super::multipart::parts::{Observer, Share};
use super::multipart::place::{self, Body, Sent, Target};
use super::multipart::reused::Reused;
use super::multipart::transfer::Transfer;
use super::multipart::uploads::{abort, blocking};
use super::request::JobSource;
use super::sidecars::has_sidecars;
use super::stage::Recovery;
use super::state_dir::{Publishing, Record};
use crate::bucket::{Bucket, ObjectKey, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::Step;
use crate::vfile::VirtualFile;

/// After so many intervals in which nothing moved a status is written all the same: well before it ceases to hold.
const IDLE_INTERVALS: u32 = 3;

/// What a run knows of the status in the bucket.
enum Told {
    /// What the next put replaces.
    Ours(Replaces),
    /// A user's object is there.
    Foreign,
}

/// The work of a job.
pub(super) struct Run {
    context: Arc<Context>,
    job: Arc<Job>,
    /// What the journal has, and more that the next save writes.
    record: Mutex<Record>,
    /// The upload under way.
    upload: Mutex<Option<Arc<UploadLog>>>,
    /// What was sent while a program wrote the file.
    early: Mutex<Option<EarlyUpload>>,
    /// Whether the job's file stands for one that has to be found again.
    is_deferred: bool,
    /// Whether it is resumed: nobody waits in close(2) for it.
    is_resumed: bool,
    /// The right to make the object, where hosts share the bucket.
    lease: Mutex<Option<Arc<Lease>>>,
    /// Whether a status of this job is beside the key, or is to be.
    has_status: bool,
    told: tokio::sync::Mutex<Told>,
    /// Whether the bucket has a status of this run.
    is_announced: AtomicBool,
    /// Whether another host has taken the job over from this run: what it has made came after this job.
    is_overtaken: AtomicBool,
    /// Whether another host makes the object, and its status is the one in the bucket.
    follows: AtomicBool,
    /// Whether the object is being put in place, which cannot be taken back.
    publishes: AtomicBool,
    /// Whether the mount ends before the store has said whether the object is in place.
    in_doubt: AtomicBool,
    /// Held by a step that must not be cut off half-way; the job ends after it.
    step: Arc<tokio::sync::Mutex<()>>,
}

/// What a run begins with.
pub(super) struct Begin {
    pub(super) record: Record,
    pub(super) upload: Option<Arc<UploadLog>>,
    pub(super) early: Option<EarlyUpload>,
    pub(super) is_deferred: bool,
    pub(super) is_resumed: bool,
}

impl Run {
    /// The run of a job that is recorded, or is about to be.
    pub(super) fn new(context: Arc<Context>, job: Arc<Job>, begin: Begin) -> Arc<Self> {
        let by_name = || has_sidecars(&job.request().key, context.settings.all_sidecars);
        let has_status = begin.record.has_sidecars.unwrap_or_else(by_name);
        Arc::new(Self {
            context,
            job,
            record: Mutex::new(begin.record),
            upload: Mutex::new(begin.upload),
            early: Mutex::new(begin.early),
            is_deferred: begin.is_deferred,
            is_resumed: begin.is_resumed,
            lease: Mutex::default(),
            has_status,
            told: tokio::sync::Mutex::new(Told::Ours(Replaces::Nothing)),
            is_announced: AtomicBool::new(false),
            is_overtaken: AtomicBool::new(false),
            follows: AtomicBool::new(false),
            publishes: AtomicBool::new(false),
            in_doubt: AtomicBool::new(false),
            step: Arc::default(),
        })
    }

    /// Brings the job from where it was found to its end, or to where a stop of the mount leaves it.
    pub(super) async fn run(self: Arc<Self>, recovery: Recovery) {
        let mut stop = self.job.stop.subscribe();
        let result = {
            let mut work = std::pin::pin!(self.work(recovery));
            let result = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop != Stop::No) => None,
                result = &mut work => Some(result),
            };
            match result {
                None if self.publishes.load(Ordering::SeqCst) => Some(work.await),
                result => result,
            }
        };
        let stopped = *stop.borrow();
        if self.in_doubt.load(Ordering::SeqCst) && matches!(result, Some(Err(_))) {
            return self.leave_in_doubt(stopped == Stop::Cancel).await;
        }
        match (result, stopped) {
            (Some(Ok(placed)), _) => self.end(Ok(placed)).await,
            (Some(Err(error)), Stop::No) => self.end(Err(error)).await,
            (_, Stop::Cancel) => {
                let what = Error::new(ErrorKind::Cancelled, "the export was cancelled");
                self.end(Err(what.in_file(self.job.status().url))).await;
            }
            // The record stays as it is: the next daemon resumes the job.
            _ => {
                drop(self.step.lock().await);
                info!(job = self.job.id(), "stopped; the next mount resumes it");
            }
        }
    }

    /// The next mount asks the store what came of the job.
    async fn leave_in_doubt(&self, is_cancelled: bool) {
        drop(self.step.lock().await);
        info!(job = self.job.id(), "stopped; the next mount asks whether the object is in place");
        let saved = self.save(Step::JobRecord, |record| record.is_cancelled |= is_cancelled).await;
        if let Err(error) = saved {
            warn!(job = self.job.id(), "{}", error.report());
        }
    }

    async fn work(self: &Arc<Self>, recovery: Recovery) -> Result<Placed> {
        let Ok(mounted) = self.context.mounted(&self.job.request().bucket) else {
            let what = format!("the bucket {:?} is not in this mount", self.job.request().bucket);
            info!(job = self.job.id(), "waiting: {what}");
            self.job.set_waiting(Some(what));
            return std::future::pending().await;
        };
        let work = async {
            let placed = match recovery {
                Recovery::Find | Recovery::Conclude => self.find(&mounted.bucket).await?,
                _ => None,
            };
            let placed = match placed {
                Some(placed) => {
                    self.take_lease_back(&mounted.bucket).await;
                    placed
                }
                None if self.is_given_up() => {
                    let what = Error::new(ErrorKind::Cancelled, "the export was cancelled");
                    return Err(what.in_file(self.job.status().url));
                }
                None => self.make_when_allowed(mounted).await?,
            };
            if !self.follows() {
                self.put_checksums(&mounted.bucket, &placed).await;
            }
            Ok(placed)
        };
        tokio::select! {
            placed = work => placed,
            never = self.renew_status() => match never {},
        }
    }

    /// Makes the object. A resumed job whose store denies that, with credentials that have expired for instance, waits
    /// visibly until it is allowed, or cancelled.
    async fn make_when_allowed(self: &Arc<Self>, mounted: &MountedBucket) -> Result<Placed> {
        let mut failures = 0;
        loop {
            let made = async {
                // Before it waits for anything: what somebody writes meanwhile stays.
                self.replaces(&mounted.bucket).await?;
                self.make(mounted).await
            };
            let error = match made.await {
                Err(error) if self.is_resumed && is_denial(&error) => error,
                made => return made,
            };
            self.wait_for(&error, failures).await;
            failures += 1;
            let _ = mounted.bucket.probe_again().await;
        }
    }

    /// The object that an earlier process put in place; asked until the store answers.
    async fn find(self: &Arc<Self>, bucket: &Bucket) -> Result<Option<Placed>> {
        // A cancellation waits for the answer: what is in place was not cancelled.
        self.publishes.store(true, Ordering::SeqCst);
        let ask = || async {
            let intent = self.record.lock().publishing.clone();
            let found = match self.upload() {
                Some(log) => place::find(bucket, &log).await?,
                None => None,
            };
            match intent {
                Some(intent) if found.is_none() => self.find_whole(bucket, intent).await,
                _ => Ok(found),
            }
        };
        let found = self.answer(|_| {}, ask).await;
        self.publishes.store(matches!(found, Ok(Some(_))), Ordering::SeqCst);
        found
    }

    /// Holds the lease again under which an earlier process put the object in place, so that it ends with the job. Without
    /// it others wait until it is over.
    pub(super) async fn take_lease_back(&self, bucket: &Bucket) {
        let Some(period) = self.context.settings.lease else { return };
        match lease::held_by(bucket, &self.job.request().key, &self.job.id(), period).await {
            Ok(held) => *self.lease.lock() = held.map(Arc::new),
            Err(error) => warn!(job = self.job.id(), "its lease is not ended: {}", error.report()),
        }
    }

    /// Asks the store again, as often as the job is retried, while its failures may go away; waits visibly meanwhile.
    async fn retried<T, F>(&self, ask: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut failures = 0;
        loop {
            let result = ask().await;
            // Who wrote the bytes waits in close, and gets the error instead.
            let may_wait =
                |error: &Error| error.is_transient() && self.job.request().source.image().is_some();
            let pause = match &result {
                Err(error) if may_wait(error) => self.context.settings.retries.pause_after(failures),
                _ => None,
            };
            self.job.set_waiting(result.as_ref().err().filter(|_| pause.is_some()).map(Error::report));
            let Some(pause) = pause else { return result };
            failures += 1;
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether a job that is not in place is not to be made either.
    fn is_given_up(&self) -> bool {
        *self.job.stop.borrow() != Stop::No || self.record.lock().is_cancelled
    }

    /// Asks the store about an object that may be in place until it answers, and waits visibly meanwhile: neither SUCCESS nor
    /// FAIL would be true before. `missed` is told of every failure.
    ///
    /// # Errors
    /// When the mount ends before that, which leaves the job in doubt.
    async fn answer<T, F>(self: &Arc<Self>, missed: impl Fn(&Error), ask: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut stopping = self.context.stopping.subscribe();
        let mut failures = 0;
        loop {
            let error = match ask().await {
                Ok(answer) => {
                    self.job.set_waiting(None);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            missed(&error);
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stopping| *stopping) => {
                    self.in_doubt.store(true, Ordering::SeqCst);
                    return Err(error);
                }
                () = self.wait_for(&error, failures) => failures += 1,
            }
        }
    }

    /// The object that was put in place, by its bytes.
    async fn find_whole(&self, bucket: &Bucket, intent: Publishing) -> Result<Option<Placed>> {
        let Publishing { size, sha256, md5 } = intent;
        let key = &self.job.request().key;
        let found = place::with_content(bucket, key, size, &sha256).await?;
        Ok(found.map(|meta| Placed { size, etag: meta.etag, sha256, md5, crc64nvme: None }))
    }

    /// Sends what the job exports, when its source is there and it has a place among those that run.
    async fn upload_all(self: &Arc<Self>, mounted: &MountedBucket) -> Result<Placed> {
        let (file, _permits) = self.source().await?;
        self.job.start(Arc::clone(&file));
        info!(job = self.job.id(), url = self.job.status().url, "export started");
        self.announce(Step::StatusBegin).await;
        let early = self.early.lock().take();
        if let Some(early) = early {
            let log = early.finish().await;
            *self.upload.lock() = log;
        }
        let replaces = self.replaces(&mounted.bucket).await?;
        let reused = match self.context.settings.incremental {
            true => Reused::look(&mounted.bucket, &self.job.request().key, &replaces, file.file_size()).await,
            false => Reused::default(),
        };
        self.attempts(mounted, file, &replaces, reused).await
    }

    /// Attempts until one succeeds, or another is of no use.
    async fn attempts(
        self: &Arc<Self>,
        mounted: &MountedBucket,
        file: Arc<dyn VirtualFile>,
        replaces: &Replaces,
        mut reused: Reused,
    ) -> Result<Placed> {
        let (mut failures, mut is_restarted) = (0, false);
        let key = &self.job.request().key;
        loop {
            let copy_failed = Arc::<AtomicBool>::default();
            let attempt = self.attempt(mounted, &file, replaces, (&reused, Arc::clone(&copy_failed)));
            let error = match attempt.await {
                Ok(placed) => return Ok(placed),
                Err(error) => error,
            };
            if *self.job.stop.borrow() != Stop::No || self.in_doubt.load(Ordering::SeqCst) {
                return Err(error);
            }
            if copy_failed.load(Ordering::SeqCst) {
                // Not what another host goes on with, and not for nothing.
                self.fence().await?;
                if matches!(replaces, Replaces::Tag(_)) && found(&mounted.bucket, key).await? != *replaces {
                    return Err(error);
                }
                warn!(job = self.job.id(), "sent again from the start: {}", error.report());
                reused.give_up();
                self.restart().await?;
                self.job.start(Arc::clone(&file));
                continue;
            }
            let lost = self.upload().filter(|_| error.kind() == ErrorKind::NotFound && !is_restarted);
            // Who wrote the bytes waits in close, where nothing can interrupt it, and gets the error instead.
            let may_wait = self.job.request().source.image().is_some() && error.is_transient();
            let pause = self.context.settings.retries.pause_after(failures).filter(|_| may_wait);
            match (lost, pause) {
                (Some(_), _) => {
                    // Somebody, or a rule of the bucket, has aborted the upload; or something else is not there.
                    warn!(job = self.job.id(), "the upload is restarted: {}", error.report());
                    is_restarted = true;
                    self.restart().await?;
                }
                (None, Some(pause)) => {
                    failures += 1;
                    warn!(
                        job = self.job.id(),
                        "retrying in {:.1} s: {}",
                        pause.as_secs_f64(),
                        error.report()
                    );
                    tokio::time::sleep(pause).await;
                }
                (None, None) => return Err(error),
            }
            self.job.start(Arc::clone(&file));
        }
    }

    async fn attempt(
        self: &Arc<Self>,
        mounted: &MountedBucket,
        file: &Arc<dyn VirtualFile>,
        replaces: &Replaces,
        (reused, copy_failed): (&Reused, Arc<AtomicBool>),
    ) -> Result<Placed> {
        let bucket = &mounted.bucket;
        let transfer = Transfer {
            bucket,
            uploads: &self.context.uploads,
            file: Arc::clone(file),
            memory: &mounted.memory,
            observer: &*self.job,
            reused,
            copy_failed,
        };
        let sent = transfer.send(self.upload(), |part_size| self.begin_upload(bucket, part_size)).await?;
        // From here on a stop waits for the end of this.
        self.publishes.store(true, Ordering::SeqCst);
        let placed = self.publish(bucket, &sent, replaces).await;
        self.publishes.store(placed.is_ok(), Ordering::SeqCst);
        placed
    }

    /// Records what is about to be put in place, and puts it there.
    async fn publish(self: &Arc<Self>, bucket: &Bucket, sent: &Sent, replaces: &Replaces) -> Result<Placed> {
        let request = self.job.request();
        let is_whole = matches!(sent.body, Body::Whole(_));
        // Staged bytes are there to be compared with what is in place; an image may be another by then.
        if is_whole && request.source.image().is_some() {
            let intent = intent(sent);
            self.save(Step::PublishRecord, |record| record.publishing = Some(intent)).await?;
        }
        let (key, tags, is_tried) = (&request.key, &request.tags, AtomicBool::new(false));
        let target = Target { bucket, uploads: &self.context.uploads, key, tags, replaces, is_tried };
        let placed = match target.place(sent, self.fence()).await {
            Err(error) if target.is_tried.load(Ordering::SeqCst) => {
                // Who waits in close gets the error now; the job ends when the store has said what came of it.
                let found = self.answer(|_| self.job.set_doubt(Some(&error)), || target.outcome(sent)).await;
                self.job.set_doubt(None);
                if found.is_err() {
                    self.record.lock().publishing = Some(intent(sent));
                }
                found?.ok_or(error)?
            }
            placed => placed?,
        };
        if is_whole {
            self.job.stored(Share::sent(sent.size), true);
        }
        Ok(placed)
    }

    /// Starts the job's upload and its log, both or neither when the job is stopped meanwhile.
    async fn begin_upload(self: &Arc<Self>, bucket: &Bucket, part_size: u64) -> Result<Arc<UploadLog>> {
        let (run, bucket) = (Arc::clone(self), bucket.clone());
        let step = async move {
            let request = run.job.request();
            let uploads = &run.context.uploads;
            let log = uploads.begin(&bucket, &request.key, &request.tags, part_size, &run.job.id()).await?;
            *run.upload.lock() = Some(Arc::clone(&log));
            Ok(log)
        };
        self.whole_step(step).await?
    }

    /// Another host's export of the key has ended since this job was asked for, and has made the object `made`: what hosts
    /// that share a bucket replace, the order of their leases says.
    async fn replaces_made(&self, bucket: &Bucket, made: String) -> Result<()> {
        let replaces = Replaces::Tag(made);
        {
            let record = self.record.lock();
            if record.request.replaces.is_some() || record.replaces.as_ref() == Some(&replaces) {
                return Ok(());
            }
        }
        if self.retried(|| found(bucket, &self.job.request().key)).await? == replaces {
            self.save(Step::JobRecord, |record| record.replaces = Some(replaces)).await?;
        }
        Ok(())
    }

    /// What the object replaces; looked up and recorded where the request does not say it.
    async fn replaces(&self, bucket: &Bucket) -> Result<Replaces> {
        let key = &self.job.request().key;
        let known = {
            let record = self.record.lock();
            record.request.replaces.clone().or_else(|| record.replaces.clone())
        };
        if let Some(known) = known {
            return Ok(known);
        }
        let found = self.retried(|| found(bucket, key)).await?;
        let recorded = found.clone();
        self.save(Step::JobRecord, |record| record.replaces = Some(recorded)).await?;
        Ok(found)
    }

    /// The source, and a place among the jobs that run. Waits for an image that is not there, without a place.
    async fn source(self: &Arc<Self>) -> Result<(Arc<dyn VirtualFile>, Permits)> {
        let mut failures = 0;
        loop {
            let permits = self.context.permits(self.job.request()).await?;
            match self.open().await {
                Ok(file) => return Ok((file, permits)),
                Err(error) if self.may_come_back(&error) => {
                    drop(permits);
                    self.wait_for(&error, failures).await;
                    failures += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether an image may be there again: what a program wrote does not come back.
    fn may_come_back(&self, error: &Error) -> bool {
        let is_absent = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Io) || error.is_transient();
        self.job.request().source.image().is_some() && is_absent
    }

    /// Waits, visibly, before something is tried again.
    async fn wait_for(self: &Arc<Self>, error: &Error, failures: u32) {
        if failures == 0 {
            info!(job = self.job.id(), "waiting: {}", error.report());
        }
        self.job.set_waiting(Some(error.report()));
        self.announce(Step::StatusRenew).await;
        tokio::time::sleep(self.context.settings.retries.pause(failures)).await;
    }

    /// The source as it was given, or found again. Where it may be other bytes than those of the upload, that is given
    /// up, and only then it is recorded what they are known by now.
    async fn open(&self) -> Result<Arc<dyn VirtualFile>> {
        if let Some(file) = self.job.file().filter(|_| !self.is_deferred) {
            return Ok(file);
        }
        let (context, source) = (Arc::clone(&self.context), self.record.lock().request.source.clone());
        let resolved = joined(tokio::task::spawn_blocking(move || context.resolve(&source)).await)??;
        if let Resolved::Image(found) = &resolved {
            if !found.continues {
                self.restart().await?;
            }
            if self.record.lock().status.image.as_ref() != Some(&found.image) {
                let image = found.image.clone();
                self.job.update(|status| status.image = Some(image.clone()));
                self.save(Step::JobRecord, |record| record.request.source = JobSource::Image(image)).await?;
            }
        }
        Ok(resolved.file())
    }

    /// Gives up the upload of an earlier process: it is begun anew.
    async fn restart(&self) -> Result<()> {
        let given_up = self.upload.lock().take();
        if let Some(log) = given_up {
            blocking(&log, UploadLog::set_aside).await??;
            abort(&self.context.mounted(&log.name().bucket)?.bucket, &log).await;
        }
        Ok(())
    }

    /// Changes the record and writes it, with the job's status.
    async fn save(&self, step: Step, change: impl FnOnce(&mut Record)) -> Result<()> {
        let record = {
            let mut record = self.record.lock();
            change(&mut record);
            if !record.status.status.is_final() {
                record.status = self.job.status();
            }
            record.clone()
        };
        self.context.save(step, record).await
    }

    /// Writes the status again and again: while bytes move, and often enough that it holds while nothing does.
    async fn renew_status(self: &Arc<Self>) -> Infallible {
        let (mut shown, mut idle) = (0, 0);
        loop {
            tokio::time::sleep(self.context.settings.status_interval).await;
            if !self.is_announced.load(Ordering::SeqCst) {
                continue;
            }
            let uploaded = self.job.status().bytes_uploaded;
            idle = if uploaded == shown { idle + 1 } else { IDLE_INTERVALS };
            if idle >= IDLE_INTERVALS {
                (shown, idle) = (uploaded, 0);
                self.announce(Step::StatusRenew).await;
            }
        }
    }

    /// Runs a step that a stop of the job does not cut off: its request may have reached the store already. Who ends the
    /// job waits for it by taking `step`.
    async fn whole_step<T: Send + 'static>(
        &self,
        step: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        let guard = Arc::clone(&self.step).lock_owned().await;
        let running = tokio::spawn(async move {
            let result = step.await;
            drop(guard);
            result
        });
        joined(running.await)
    }

    /// The object that is in place, as far as the log tells.
    pub(super) fn placed(&self) -> Option<Placed> {
        self.upload().and_then(|log| log.placed())
    }

    fn upload(&self) -> Option<Arc<UploadLog>> {
        self.upload.lock().clone()
    }

    fn lease(&self) -> Option<Arc<Lease>> {
        self.lease.lock().clone()
    }

    /// Whether this job comes after every other one of its key, by the order of the leases. One that was overtaken, or is
    /// resumed and may have been, comes before some.
    fn is_latest(&self) -> bool {
        self.lease().is_some() && !self.is_resumed && !self.is_overtaken.load(Ordering::SeqCst)
    }

    fn follows(&self) -> bool {
        self.follows.load(Ordering::SeqCst)
    }

    /// The last question before something in the bucket is replaced: whether no other host has taken the job over.
    async fn fence(&self) -> Result<()> {
        match self.is_holder().await? {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Busy, "another host has taken the job over")),
        }
    }

    /// Whether no other host has taken the job over.
    async fn is_holder(&self) -> Result<bool> {
        match self.lease() {
            Some(lease) => lease.is_newest().await,
            None => Ok(true),
        }
    }

    /// Whether the job's end is told beside its key.
    fn tells(&self) -> bool {
        self.has_status && !self.follows() && self.is_newest()
    }

    /// Whether no later job of this mount has the key.
    fn is_newest(&self) -> bool {
        let request = self.job.request();
        let table = self.context.table.lock();
        table.newest(&request.bucket, &request.key).is_none_or(|newest| newest.id() <= self.job.id())
    }
}

/// Whether a store denies access, or did so when it was mounted.
fn is_denial(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly)
}

fn intent(sent: &Sent) -> Publishing {
    let hashes = sent.hashes.clone();
    Publishing { size: sent.size, sha256: hashes.sha256, md5: hashes.md5 }
}

/// What a put replaces that replaces what is there now.
pub(super) async fn found(bucket: &Bucket, key: &ObjectKey) -> Result<Replaces> {
    let meta = bucket.head(key).await?;
    Ok(Replaces::found(meta.as_ref().map(|meta| meta.etag.as_deref())))
}
