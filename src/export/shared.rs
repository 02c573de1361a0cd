//! Jobs of hosts that share their buckets.

use std::sync::Arc;

use tracing::warn;

use super::job::Job;
use super::lease::{self, Claimed};
use super::part_log::PartLog;
use super::queue::Inner;
use super::status::Status;
use super::upload::Uploaded;
use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind, Result};

impl Inner {
    /// Makes the object, or waits until another host that shares the bucket has made it.
    pub(super) async fn make(self: &Arc<Self>, job: &Arc<Job>) -> Result<Uploaded> {
        let Some(lease) = self.lease else { return self.upload(job).await };
        let bucket = self.bucket(&job.request().bucket)?;
        // Uploads of this host that another one may have gone on with.
        let mut lost: Vec<Arc<PartLog>> = Vec::new();
        loop {
            let claimed = lease::claim(bucket, job, lease).await?;
            for log in lost.drain(..) {
                // That one has completed it, or has never known of it; or it comes back to this host.
                let inherited = match &claimed {
                    Claimed::Held(_, Some(before)) => before.upload.contains(&log.name().id),
                    _ => false,
                };
                if !inherited {
                    self.abort(&log).await;
                }
            }
            let (held, before) = match claimed {
                Claimed::Held(held, before) => (Arc::new(held), before),
                Claimed::Done(status) => {
                    job.set_following(true);
                    return self.done_elsewhere(bucket, job, *status).await;
                }
            };
            job.set_following(false);
            if let Some(before) = before {
                let log = PartLog::adopt(&self.journal.upload_path(&job.id()), &before.upload)?.map(Arc::new);
                match log {
                    Some(log) if !before.is_same => self.abort(&log).await,
                    log => job.set_upload(log),
                }
            }
            job.set_lease(Some(Arc::clone(&held)));
            let uploaded = {
                let mut upload = std::pin::pin!(self.upload(job));
                let log = || job.upload().and_then(|log| log.text());
                tokio::select! {
                    uploaded = &mut upload => uploaded,
                    () = held.keep(log) => upload.await,
                }
            };
            // When the store does not tell, the failure's own reason is the one to report.
            if uploaded.is_err() && matches!(held.is_newest().await, Ok(false)) {
                lost.extend(job.upload());
                job.set_upload(None);
                job.set_lease(None);
                warn!(job = job.id(), "another host has taken the job over");
                continue;
            }
            return uploaded;
        }
    }

    /// The end of a job that another host has done.
    async fn done_elsewhere(&self, bucket: &Bucket, job: &Job, status: Status) -> Result<Uploaded> {
        if let Some(error) = status.error {
            let kind = ErrorKind::ALL.into_iter().find(|kind| kind.code() == error.code);
            let error = Error::new(kind.unwrap_or(ErrorKind::UploadFailed), error.description);
            return Err(error.in_file(format!("{}, on host {}", status.url, status.host)));
        }
        let key = &job.request().key;
        let gone = || Error::new(ErrorKind::NotFound, "the object is gone").in_file(bucket.url_of(key));
        let meta = bucket.head(key).await?.ok_or_else(gone)?;
        job.update(|s| {
            s.size = status.size;
            (s.bytes_done, s.repeated) = (status.bytes_done, s.repeated + 1);
        });
        let (sha256, md5) = (status.sha256.unwrap_or_default(), status.md5.unwrap_or_default());
        Ok(Uploaded { meta, sha256, md5 })
    }
}
