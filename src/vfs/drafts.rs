//! The drafts of a mount: who opens and closes them, and what comes before and after.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::warn;

use super::draft::Draft;
use super::{ObjectName, Vfs};
use crate::bucket::Tags;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobRequest, JobSource, StatusImage};

/// How often a job may begin just after the one before was waited for.
const SETTLE_ATTEMPTS: usize = 5;

/// How long a new writer waits for the job of the one before.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

impl Vfs {
    /// The draft of a key for one more writer: the one there is, or a new one over what the bucket has.
    pub(super) async fn open_draft(&self, object: &ObjectName, truncate: bool) -> Result<Arc<Draft>> {
        self.check_settled(object).await?;
        if self.status_job(&object.0, &object.1).is_some() {
            return Err(Error::new(ErrorKind::Busy, "the job is running and writes this file")
                .in_file(object.1.as_str()));
        }
        let published = match self.draft(object) {
            Some(_) => None,
            None if truncate => None,
            None => {
                let bucket = self.bucket(&object.0)?;
                bucket.head(&object.1).await?.map(|meta| meta.object_size)
            }
        };
        let mut drafts = self.drafts.lock();
        let draft =
            drafts.entry(object.clone()).or_insert_with(|| Arc::new(Draft::new(object.clone(), published)));
        // Somebody else writes what rsync left of a transfer: it is an ordinary file from now on.
        draft.unpark();
        draft.open_handle();
        Ok(Arc::clone(draft))
    }

    /// The draft of a key that has bytes which are not published, for one more reader.
    pub(super) fn open_draft_to_read(&self, object: &ObjectName) -> Option<Arc<Draft>> {
        let drafts = self.drafts.lock();
        let draft = drafts.get(object).filter(|draft| !draft.is_published())?;
        draft.open_handle();
        Some(Arc::clone(draft))
    }

    /// One handle fewer. The last one publishes and takes the draft away; who opens the key meanwhile shares it.
    pub(super) async fn close_draft(self: &Arc<Self>, draft: &Arc<Draft>) {
        loop {
            {
                // Handles are counted under this lock, so that nobody opens a draft that is being taken away.
                let mut drafts = self.drafts.lock();
                let is_last = draft.handles.load(Ordering::SeqCst) == 1;
                if !is_last || draft.is_parked() || !draft.is_unpublished() {
                    draft.handles.fetch_sub(1, Ordering::SeqCst);
                    let known = drafts.get(&draft.object()).is_some_and(|known| Arc::ptr_eq(known, draft));
                    if is_last && known && !draft.is_parked() {
                        drafts.remove(&draft.object());
                    }
                    return;
                }
            }
            draft.publish_last(self).await;
        }
    }

    /// The mount has ended: what is being written is not published any more.
    pub async fn end_drafts(&self) {
        let drafts: Vec<_> = self.drafts.lock().drain().map(|(_, draft)| draft).collect();
        for draft in drafts {
            draft.give_up_early_upload().await;
        }
    }

    /// Leaves a FAIL status beside a key whose writer ended before its end.
    pub(super) async fn record_incomplete(&self, draft: &Draft, error: &Error) {
        let (bucket, key) = draft.object();
        let source = JobSource::Staged(std::path::PathBuf::new());
        let request = JobRequest { bucket, key, source, client_token: None, tags: Tags::new() };
        if let Err(error) = self.jobs.record_refusal(request, error).await {
            warn!("an incomplete file could not be recorded: {}", error.report());
        }
    }

    /// Waits for a job that publishes bytes that were written: the store has them all already, or soon. Jobs of
    /// images take longer, and are not waited for.
    pub(super) async fn settle(&self, object: &ObjectName) {
        let deadline = Instant::now() + SETTLE_LIMIT;
        // Another one may follow: that of a handle whose last close came late.
        while let Some(job) = self.jobs.active(&object.0, &object.1)
            && matches!(job.request().source, JobSource::Staged(_))
            && Instant::now() < deadline
        {
            // How it ends is for those who asked for it.
            let _ = job.ended(deadline.saturating_duration_since(Instant::now())).await;
        }
    }

    /// Refuses to touch what a job is making; one that publishes what a program wrote is waited for.
    pub(super) async fn check_settled(&self, object: &ObjectName) -> Result<()> {
        for _ in 0..SETTLE_ATTEMPTS {
            self.settle(object).await;
            match self.jobs.active(&object.0, &object.1) {
                None => return Ok(()),
                Some(job) if self.is_asked_again(object, &job) => return Ok(()),
                Some(job) if matches!(job.request().source, JobSource::Image(_)) => break,
                Some(_) => {}
            }
        }
        let busy = Error::new(ErrorKind::Busy, "a job is making this object");
        Err(busy.in_file(object.1.as_str()))
    }

    /// Leaves a FAIL status beside a key whose copy was refused, so that the reason can be read later.
    pub(super) async fn record_refusal(&self, draft: &Draft, image: &StatusImage, error: &Error) {
        let (bucket, key) = draft.object();
        let request = JobRequest {
            bucket,
            key,
            source: JobSource::Image(image.clone()),
            client_token: None,
            tags: Tags::new(),
        };
        if let Err(error) = self.jobs.record_refusal(request, error).await {
            warn!("a refusal could not be recorded: {}", error.report());
        }
    }
}
