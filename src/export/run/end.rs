//! The end of a run, and what is told of it: record, checksums, status, waiters.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tracing::{error, info, warn};

use super::{Run, Told};
use crate::bucket::{Bucket, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::export::job::Holds;
use crate::export::lease;
use crate::export::multipart::log::{Placed, UploadLog};
use crate::export::multipart::reused;
use crate::export::multipart::uploads::abort;
use crate::export::request::JobSource;
use crate::export::sidecars::{self, Beside, Sidecar, Written, checksum_line};
use crate::export::status::{JobState, Order, Status};
use crate::failpoint::{self, Step};

/// How long writing a status may take; the job's end does not wait longer for it.
const STATUS_LIMIT: Duration = Duration::from_secs(30);

impl Run {
    /// Ends a job for good: leaves nothing of a failed upload, writes record and status file, wakes who waits.
    pub(in crate::export) async fn end(self: &Arc<Self>, result: Result<Placed>) {
        drop(self.step.lock().await);
        if let (Err(_), Some(log)) = (&result, self.upload()) {
            self.give_up(&log).await;
        }
        let last = self.last_status(&result);
        let tells = self.tells();
        self.record.lock().status = last.clone();
        let owes = tells || self.lease().is_some();
        let recorded = self.record_end(owes).await;
        let told = !tells || self.tell_end(&last).await;
        self.end_lease(&last).await;
        if recorded && owes && told {
            self.confirm_end().await;
        }
        let last = Status { notes: self.job.status().notes, ..last };
        if !told {
            self.job.set_holds(Holds::Always);
        }
        self.job.end(last, result.as_ref().err());
        if !recorded || !told {
            let run = Arc::clone(self);
            let task = Arc::clone(&self.context.tasks);
            tokio::spawn(async move {
                run.settle(recorded, told).await;
                drop(task);
            });
        }
    }

    /// Tells hosts that share the bucket that the job has ended, and how where no status beside the key says it.
    async fn end_lease(&self, last: &Status) {
        if let Some(lease) = self.lease() {
            lease.end((!self.has_status).then(|| last.clone())).await;
        }
    }

    /// Gives up what is left of an upload, unless another host that has taken the job over goes on with it.
    async fn give_up(&self, log: &UploadLog) {
        let Ok(mounted) = self.context.mounted(&log.name().bucket) else { return };
        let (lease, id) = (self.lease(), &log.name().id);
        let is_inherited = match &lease {
            Some(lease) => lease.is_inherited(id).await,
            None if self.context.settings.lease.is_none() => Ok(false),
            // An earlier process held it, or this one before it was overtaken.
            None => lease::is_inherited_from(&mounted.bucket, &log.name().key, &self.job.id(), id).await,
        };
        match is_inherited {
            Ok(true) => log.remove(),
            Ok(false) => abort(&mounted.bucket, log).await,
            Err(error) => warn!(job = self.job.id(), "its upload stays for now: {}", error.report()),
        }
    }

    /// The job's status for ever, which is counted.
    fn last_status(&self, result: &Result<Placed>) -> Status {
        let metrics = &self.context.metrics;
        let mut last = self.job.status();
        match result {
            Ok(placed) => {
                last.succeed(placed);
                metrics.jobs_succeeded.add(1);
                info!(job = %last.job_id, url = last.url, "export succeeded");
            }
            Err(error) => {
                last.fail(&self.context.settings.policy.with_cloud_code(error.clone()));
                match last.status {
                    JobState::Cancelled => metrics.jobs_cancelled.add(1),
                    _ => metrics.jobs_failed.add(1),
                }
                error!(job = %last.job_id, url = last.url, "export ended: {}", error.report());
            }
        }
        last
    }

    /// Records how the job ended, and then removes what only an unfinished one needs. Says whether it could: else all of
    /// that stays, and the next mount finds out again.
    async fn record_end(&self, untold: bool) -> bool {
        let saved = self.save(Step::EndRecord, |record| record.status_unwritten = untold).await;
        if let Err(error) = &saved {
            error!(job = self.job.id(), "{}", error.report());
            return false;
        }
        let succeeded = self.record.lock().status.status == JobState::Success;
        let left = self.upload.lock().take_if(|_| succeeded);
        if let Some(log) = left {
            // The object may have come otherwise: from another host, or from an upload before this one.
            self.give_up(&log).await;
        }
        if let JobSource::Staged(path) = &self.job.request().source
            && path != Path::new("")
            && failpoint::pass(Step::StageRemove).is_ok()
        {
            let _ = std::fs::remove_file(path);
        }
        true
    }

    /// The bucket has the final status: the next mount has nothing to do.
    async fn confirm_end(&self) {
        if let Err(error) = self.save(Step::EndConfirm, |record| record.status_unwritten = false).await {
            warn!(job = self.job.id(), "{}", error.report());
        }
    }

    /// Tells an end that an earlier process has recorded and perhaps not told.
    pub(in crate::export) async fn settle_found(self: &Arc<Self>) {
        if let Ok(mounted) = self.context.mounted(&self.job.request().bucket) {
            self.take_lease_back(&mounted.bucket).await;
        }
        self.settle(true, false).await;
    }

    /// Records and tells an end that could not be, with back-off, until the mount ends or a later job has the key.
    pub(in crate::export) async fn settle(self: &Arc<Self>, mut recorded: bool, mut told: bool) {
        let mut stopping = self.context.stopping.subscribe();
        for failures in 0.. {
            if recorded && self.context.mounted(&self.job.request().bucket).is_err() {
                // The mount that has the bucket tells it.
                return;
            }
            told = told || !self.tells();
            recorded = recorded || self.record_end(!told).await;
            if !told {
                let last = self.record.lock().status.clone();
                told = self.tell_end(&last).await;
            }
            if recorded && told {
                let last = self.record.lock().status.clone();
                self.end_lease(&last).await;
                self.confirm_end().await;
                if self.has_status {
                    self.job.set_holds(Holds::UntilEnd);
                }
                return;
            }
            tokio::select! {
                _ = stopping.wait_for(|stopping| *stopping) => return,
                () = tokio::time::sleep(self.context.settings.retries.pause(failures)) => {}
            }
            if let Ok(mounted) = self.context.mounted(&self.job.request().bucket) {
                let _ = mounted.bucket.probe_again().await;
            }
        }
    }

    /// Tells an end that was told before once more, because something in its status has changed.
    pub(in crate::export) async fn tell_again(self: &Arc<Self>) {
        let last = self.job.status();
        self.record.lock().status = last.clone();
        let told = self.tell_end(&last).await;
        if let Err(error) = self.save(Step::EndRecord, |record| record.status_unwritten = !told).await {
            warn!(job = %last.job_id, "{}", error.report());
        }
    }

    /// Puts the final status into the bucket; says whether it is there, or is not to be.
    async fn tell_end(self: &Arc<Self>, last: &Status) -> bool {
        self.tell(Step::StatusEnd, last.clone()).await
    }

    /// Puts the status into the bucket, for other hosts and plain clients. A failure is logged: the mount and the journal
    /// have the status all the same.
    pub(super) async fn announce(self: &Arc<Self>, step: Step) {
        self.is_announced.store(true, Ordering::SeqCst);
        self.tell(step, self.job.status()).await;
    }

    async fn tell(self: &Arc<Self>, step: Step, status: Status) -> bool {
        if !self.tells() {
            return true;
        }
        let run = Arc::clone(self);
        let put = async move { run.put_status(step, &status).await };
        let late = |_| Err(Error::new(ErrorKind::TimedOut, "the store did not answer in time"));
        let limited = async move { tokio::time::timeout(STATUS_LIMIT, put).await.unwrap_or_else(late) };
        let result = self.whole_step(limited).await.and_then(|result| result);
        if let Err(error) = &result {
            let job = self.job.id();
            warn!(job, "the status file could not be written into the bucket: {}", error.report());
        }
        result.is_ok()
    }

    async fn put_status(&self, step: Step, status: &Status) -> Result<()> {
        let mut told = self.told.lock().await;
        let Told::Ours(known) = &*told else { return Ok(()) };
        failpoint::pass(step)?;
        let request = self.job.request();
        let bucket = &self.context.mounted(&request.bucket)?.bucket;
        let (json, known) = (Bytes::from(status.to_json()), known.clone());
        let was_there = known != Replaces::Nothing;
        if !was_there && self.is_late(bucket, status).await? {
            return Ok(());
        }
        let may = |there| self.may_tell(bucket, status, there, was_there);
        match sidecars::write(bucket, &request.key, Sidecar::Status, json, known, may).await? {
            Written::Done(replaces) => *told = Told::Ours(replaces),
            Written::Superseded => info!(job = self.job.id(), "a newer status is there, and stays"),
            Written::Foreign => {
                *told = Told::Foreign;
                self.note_foreign(Sidecar::Status);
                self.job.set_holds(Holds::Never);
            }
        }
        Ok(())
    }

    /// Whether a success is told so late that another object is there by then, and nothing of this job beside it.
    async fn is_late(&self, bucket: &Bucket, status: &Status) -> Result<bool> {
        if status.status != JobState::Success || status.is_of(self.object(bucket).await?.as_deref()) {
            return Ok(false);
        }
        match sidecars::look(bucket, &self.job.request().key, Sidecar::Status).await? {
            Beside::Ours { bytes, .. } => {
                Ok(status_in(&bytes).is_none_or(|there| there.job_id != status.job_id))
            }
            Beside::Nothing | Beside::Foreign => Ok(true),
        }
    }

    /// Whether a status may take the place of what is there, of which this run has not known.
    async fn may_tell(
        &self,
        bucket: &Bucket,
        status: &Status,
        there: Option<Bytes>,
        was_there: bool,
    ) -> Result<bool> {
        if !self.is_newest() || !self.is_holder().await? {
            return Ok(false);
        }
        match there.as_ref().and_then(status_in) {
            Some(there) if there.job_id == status.job_id => Ok(true),
            Some(there) => {
                let order = match (self.is_latest(), was_there || self.is_overtaken.load(Ordering::SeqCst)) {
                    (_, true) => Order::Before,
                    (true, _) => Order::After,
                    _ => Order::ByTime,
                };
                Ok(status.may_replace(&there, self.object(bucket).await?.as_deref(), order))
            }
            // It was removed, perhaps with its object.
            None => {
                Ok(status.status != JobState::Success || status.is_of(self.object(bucket).await?.as_deref()))
            }
        }
    }

    /// The entity tag of the object that is at the key.
    async fn object(&self, bucket: &Bucket) -> Result<Option<String>> {
        Ok(bucket.head(&self.job.request().key).await?.and_then(|meta| meta.etag))
    }

    /// Whether what stands beside the object is this job's to write: the object is its own still, and no later job or other
    /// host has the key.
    async fn is_ours(&self, bucket: &Bucket, placed: &Placed) -> Result<bool> {
        let is_ours = self.is_newest() && self.is_holder().await?;
        Ok(is_ours && (placed.etag.is_none() || self.object(bucket).await? == placed.etag))
    }

    /// `KEY.sha256` and `KEY.md5`, as `sha256sum -c` and `md5sum -c` read them in the object's directory.
    ///
    /// The object is in place by now, so a failure here does not fail the job, whose status has the digests. But an
    /// older object's checksum must not stay beside the new one.
    pub(super) async fn put_checksums(&self, bucket: &Bucket, placed: &Placed) {
        // Before anything is replaced that may be another's, it is asked again.
        if matches!(self.is_ours(bucket, placed).await, Ok(false)) {
            info!(job = self.job.id(), "another object is there by now; what stands beside it stays");
            return;
        }
        self.put_index(bucket, placed).await;
        if !self.has_status {
            self.remove_old_sidecars(bucket).await;
            return;
        }
        for (sidecar, digest) in [(Sidecar::Sha256, &placed.sha256), (Sidecar::Md5, &placed.md5)] {
            match self.put_checksum(bucket, placed, sidecar, digest).await {
                Ok(Written::Done(_) | Written::Superseded) => {}
                Ok(Written::Foreign) => self.note_foreign(sidecar),
                Err(error) => {
                    warn!(job = self.job.id(), "a checksum file could not be written: {}", error.report());
                    let removed = self.remove_old_checksum(bucket, placed, sidecar).await;
                    if removed.is_err() {
                        self.job
                            .note(format!("KEY{} could not be written, and may be old", sidecar.suffix()));
                    }
                }
            }
        }
    }

    /// What the next export of the key finds of this one.
    async fn put_index(&self, bucket: &Bucket, placed: &Placed) {
        let (Some(log), Some(etag)) = (self.upload(), &placed.etag) else { return };
        if !self.context.settings.incremental {
            return;
        }
        let put = async {
            failpoint::pass(Step::IndexPut)?;
            reused::put_index(bucket, &log, placed.size, etag).await
        };
        if let Err(error) = put.await {
            info!(job = self.job.id(), "the next export of this key sends everything: {}", error.report());
        }
    }

    async fn put_checksum(
        &self,
        bucket: &Bucket,
        placed: &Placed,
        sidecar: Sidecar,
        digest: &str,
    ) -> Result<Written> {
        failpoint::pass(Step::ChecksumPut)?;
        let key = &self.job.request().key;
        let line = Bytes::from(checksum_line(digest, key.file_name()));
        let may = |_| self.is_ours(bucket, placed);
        sidecars::write(bucket, key, sidecar, line, Replaces::Nothing, may).await
    }

    async fn remove_old_checksum(&self, bucket: &Bucket, placed: &Placed, sidecar: Sidecar) -> Result<()> {
        let key = &self.job.request().key;
        match sidecars::look(bucket, key, sidecar).await? {
            Beside::Ours { replaces, .. } if self.is_ours(bucket, placed).await? => {
                bucket.delete_if(&sidecar.key_for(key)?, &replaces).await
            }
            _ => Ok(()),
        }
    }

    /// What an earlier version, or a mount with another setting, wrote beside the object that was replaced.
    async fn remove_old_sidecars(&self, bucket: &Bucket) {
        let key = &self.job.request().key;
        let replaced = {
            let record = self.record.lock();
            record.request.replaces.clone().or_else(|| record.replaces.clone())
        };
        if Sidecar::parse(key).is_some() || replaced == Some(Replaces::Nothing) {
            return;
        }
        if let Ok(Beside::Ours { .. }) = sidecars::look(bucket, key, Sidecar::Status).await
            && let Err(error) = sidecars::remove(bucket, key).await
        {
            warn!(job = self.job.id(), "old sidecars could not be removed: {}", error.report());
        }
    }

    fn note_foreign(&self, sidecar: Sidecar) {
        let (key, suffix) = (&self.job.request().key, sidecar.suffix());
        self.job.note(format!("{key}{suffix} was not written by freightfs and was left alone"));
    }
}

fn status_in(bytes: &Bytes) -> Option<Status> {
    Status::parse(bytes).ok()
}
