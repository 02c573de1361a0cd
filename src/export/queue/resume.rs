//! What a queue makes of the state directory that an earlier process left.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tracing::{info, warn};

use super::JobQueue;
use crate::bucket::{Bucket, ObjectKey};
use crate::error::{Error, ErrorKind, Result};
use crate::export::context::Context;
use crate::export::job::{Holds, Job};
use crate::export::lease;
use crate::export::multipart::log::UploadLog;
use crate::export::multipart::uploads::{Left, abort};
use crate::export::orphans;
use crate::export::request::RecordedFile;
use crate::export::run::{Begin, Run};
use crate::export::sidecars::{self, Beside, Sidecar};
use crate::export::stage::{Facts, Recovery, Stage};
use crate::export::state_dir::{DamagedRecord, Loaded, Record};
use crate::export::status::{Status, StatusImage};

/// The logs that earlier processes left, by their ids.
type Logs = BTreeMap<String, UploadLog>;

impl JobQueue {
    /// Resumes the jobs in the journal that have not ended, and remembers those that have. `resolver` finds the bytes of
    /// an image again, or fails when the source is not what was recorded any more; it is asked when a job's turn comes,
    /// from a thread that may block. Called once, before anything is written into the state directory.
    ///
    /// # Errors
    /// When the state directory cannot be listed. What is damaged in it costs no more than one job, and is reported.
    pub fn resume(
        &self,
        resolver: impl Fn(&StatusImage) -> Result<RecordedFile> + Send + Sync + 'static,
    ) -> Result<()> {
        *self.context.resolver.lock() = Some(Arc::new(resolver));
        let Loaded { records, damaged, is_partial } = self.context.journal.load()?;
        if !is_partial {
            self.context.journal.sweep_staging(&records, &damaged);
        }
        self.resume_moves();
        let Left { logs, intents } = self.context.uploads.load()?;
        let mut logs: Logs = logs.into_iter().collect();
        for intent in intents {
            let context = Arc::clone(&self.context);
            self.spawn_counted(async move { orphans::settle_found(&context, intent).await });
        }
        let kept: Vec<_> = logs.values().map(|log| log.name().id.clone()).collect();
        let state = self.context.journal.identity();
        for mounted in self.context.buckets.values() {
            let (bucket, state, kept) = (mounted.bucket.clone(), state.to_owned(), kept.clone());
            let is_shared = self.context.settings.lease.is_some();
            self.context.runtime.spawn(async move {
                if let Err(error) = sweep(&bucket, &state, kept, is_shared).await {
                    warn!(bucket = bucket.name(), "what is left over stays: {}", error.report());
                }
            });
        }
        for record in damaged {
            self.end_damaged(record, &logs);
        }
        let newest: HashMap<_, _> =
            records.iter().map(|record| (object_of(record), record.status.job_id.clone())).collect();
        for record in records {
            let is_newest = newest[&object_of(&record)] == record.status.job_id;
            self.resume_job(record, &mut logs, is_newest);
        }
        // What cannot be read now may need them.
        for (id, log) in logs.into_iter().filter(|_| !is_partial) {
            let context = Arc::clone(&self.context);
            // Counted: a mount that ends at once gives up first what the one before left.
            self.spawn_counted(async move { give_up(&context, &id, &log).await });
        }
        Ok(())
    }

    fn resume_job(&self, record: Record, logs: &mut Logs, is_newest: bool) {
        let log = match record.status.status.is_final() {
            true => None,
            false => take_log(&record, logs),
        };
        let recovery = Stage::of(facts(&record, log.as_deref())).recovery();
        let known = record.status.size;
        let file = known.filter(|_| !record.status.status.is_final());
        let file = file.map(|size| self.deferred(&record.request.source, size, known));
        let metrics = Arc::clone(&self.context.metrics);
        let job = Arc::new(Job::from_record(record.request.clone(), record.status.clone(), file, metrics));
        if recovery == Recovery::Tell {
            job.set_holds(Holds::Always);
        }
        self.add(&mut self.context.table.lock(), &job);
        if let Some(upload) = record.upload.clone() {
            self.abort_of_version_1(record.request.bucket.clone(), record.request.key.clone(), upload);
        }
        let begin = Begin { record, upload: log, early: None, is_deferred: true, is_resumed: true };
        let run = Run::new(Arc::clone(&self.context), Arc::clone(&job), begin);
        match recovery {
            Recovery::Remember => {}
            Recovery::Tell => {
                self.spawn_counted(async move { run.settle_found().await });
            }
            _ if !is_newest => {
                let what = "a later job has the key, and how this one ended could not be recorded";
                let error = Error::new(ErrorKind::Conflict, what).in_file(job.status().url);
                let result = run.placed().ok_or(error);
                self.spawn_counted(async move { run.end(result).await });
            }
            _ => {
                info!(job = job.id(), key = %job.request().key, "resuming a job");
                self.spawn(run, recovery);
            }
        }
    }

    /// What version 1 recorded of an upload does not say which parts there are.
    fn abort_of_version_1(&self, bucket: String, key: ObjectKey, upload: String) {
        let context = Arc::clone(&self.context);
        self.context.runtime.spawn(async move {
            if let Ok(mounted) = context.mounted(&bucket) {
                let _ = mounted.bucket.abort_upload(&key, &upload).await;
            }
        });
    }

    /// Ends the status of a job whose record cannot be used, where it can be known which that is.
    fn end_damaged(&self, record: DamagedRecord, logs: &Logs) {
        warn!("a job's record cannot be used: {}: {}", record.path.display(), record.error.report());
        let named = |log: &UploadLog| (log.name().bucket.clone(), log.name().key.clone());
        let object = record.object.clone().or_else(|| logs.get(&record.job_id).map(named));
        let context = Arc::clone(&self.context);
        let Some((bucket, key)) = object else {
            context.journal.set_aside(&record);
            return;
        };
        self.spawn_counted(async move {
            let Ok(mounted) = context.mounted(&bucket) else { return };
            match end_status(&mounted.bucket, &key, &record).await {
                Ok(()) => drop(context.journal.set_aside(&record)),
                // The record stays where it is, and the next mount tries again.
                Err(error) => warn!("its status could not be ended: {}", error.report()),
            }
        });
    }
}

/// Removes what this state directory's earlier processes left of uploads in a local bucket, but for those `kept` and those
/// that other hosts go on with.
async fn sweep(bucket: &Bucket, state: &str, mut kept: Vec<String>, is_shared: bool) -> Result<()> {
    if bucket.has_leftovers() && is_shared {
        let logs = lease::all_uploads(bucket).await?;
        kept.extend(logs.iter().filter_map(|log| UploadLog::id_in(log)));
    }
    bucket.sweep(state, kept).await
}

/// Gives up an upload that no job of this host goes on with, unless another host does.
async fn give_up(context: &Context, log_id: &str, log: &UploadLog) {
    let Ok(mounted) = context.mounted(&log.name().bucket) else { return };
    // What was given up before has more in its name than the job's id.
    let job_id = log_id.split('.').next().unwrap_or_default();
    let (key, upload) = (&log.name().key, &log.name().id);
    let is_inherited = match context.settings.lease {
        Some(_) => lease::is_inherited_from(&mounted.bucket, key, job_id, upload).await,
        None => Ok(false),
    };
    match is_inherited {
        Ok(true) => log.remove(),
        Ok(false) => abort(&mounted.bucket, log).await,
        Err(error) => warn!(%key, "an unfinished upload stays for now: {}", error.report()),
    }
}

/// Writes FAIL over the unfinished status of a job that nobody can resume.
async fn end_status(bucket: &Bucket, key: &ObjectKey, record: &DamagedRecord) -> Result<()> {
    let Beside::Ours { bytes, replaces } = sidecars::look(bucket, key, Sidecar::Status).await? else {
        return Ok(());
    };
    let Ok(mut status) = Status::parse(&bytes) else { return Ok(()) };
    if *status.job_id != *record.job_id || status.status.is_final() {
        return Ok(());
    }
    let what = "the job's record cannot be used any more, so the job cannot be resumed; copy it again";
    let error = Error::new(ErrorKind::Io, what).in_file(record.path.display().to_string());
    status.fail(&error.because(record.error.clone()));
    bucket.put(&Sidecar::Status.key_for(key)?, status.to_json().into(), &replaces).await.map(drop)
}

fn object_of(record: &Record) -> (String, ObjectKey) {
    (record.request.bucket.clone(), record.request.key.clone())
}

/// The log of a job's upload. Parts that were written again after they were sent are not in it.
fn take_log(record: &Record, logs: &mut Logs) -> Option<Arc<UploadLog>> {
    let early = record.upload_log.as_ref().and_then(|id| logs.remove(id));
    // When the object was about to be put in place, those had been sent again, which the log says by then.
    if let Some(log) = early.as_ref().filter(|log| log.completing().is_none()) {
        record.stale.iter().for_each(|&index| log.stale(index));
    }
    early.or_else(|| logs.remove(&*record.status.job_id)).map(Arc::new)
}

fn facts(record: &Record, log: Option<&UploadLog>) -> Facts {
    Facts {
        ended: record.status.status.is_final(),
        untold: record.status_unwritten,
        log: log.is_some(),
        intent: record.publishing.is_some() || log.is_some_and(|log| log.completing().is_some()),
        placed: log.is_some_and(|log| log.placed().is_some()),
    }
}
