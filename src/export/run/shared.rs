//! Runs of hosts that share their buckets.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;

use super::Run;
use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind, Result};
use crate::export::context::MountedBucket;
use crate::export::job::Holds;
use crate::export::lease::{self, Claim, Claimed, Held, Inherited};
use crate::export::multipart::digests::joined;
use crate::export::multipart::log::{Placed, UploadLog};
use crate::export::multipart::place::gone;
use crate::export::multipart::uploads::{abort, blocking};
use crate::export::status::Status;

impl Run {
    /// Makes the object, or waits until another host that shares the bucket has made it.
    pub(super) async fn make(self: &Arc<Self>, mounted: &MountedBucket) -> Result<Placed> {
        let Some(lease) = self.context.settings.lease else { return self.upload_all(mounted).await };
        let (bucket, job) = (&mounted.bucket, &self.job);
        // Uploads of this host that another one may have resumed.
        let mut lost: Vec<Arc<UploadLog>> = Vec::new();
        loop {
            let status = job.status();
            let own = Claim { host: status.host, job_id: status.job_id, image: status.image };
            let follow = || self.set_follows(true);
            let claimed =
                self.retried(|| lease::claim(bucket, &job.request().key, &own, lease, follow)).await?;
            for log in lost.drain(..) {
                // That one has completed it, or has never known of it; or it comes back to this host.
                let inherited = match &claimed {
                    Claimed::Held(Held { inherited: Some(before), .. }) => {
                        before.upload.contains(&log.name().id)
                    }
                    _ => false,
                };
                if !inherited {
                    abort(bucket, &log).await;
                }
            }
            let Held { lease: held, inherited, made } = match claimed {
                Claimed::Held(held) => held,
                Claimed::Done(status) => {
                    self.set_follows(true);
                    return self.done_elsewhere(bucket, *status).await;
                }
            };
            self.set_follows(false);
            if let Some(before) = inherited {
                self.inherit(bucket, before).await?;
            }
            let held = Arc::new(held);
            *self.lease.lock() = Some(Arc::clone(&held));
            if let Some(made) = made.filter(|_| self.is_latest()) {
                self.replaces_made(bucket, made).await?;
            }
            let placed = {
                let mut upload = std::pin::pin!(self.upload_all(mounted));
                let log = async || blocking(&self.upload()?, UploadLog::text).await.ok().flatten();
                tokio::select! {
                    placed = &mut upload => placed,
                    () = held.keep(log) => upload.await,
                }
            };
            // When the store does not say, the failure's own reason is the one to report.
            if placed.is_err() && matches!(held.is_newest().await, Ok(false)) {
                lost.extend(self.upload.lock().take());
                *self.lease.lock() = None;
                self.is_overtaken.store(true, Ordering::SeqCst);
                warn!(job = job.id(), "another host has taken the job over");
                continue;
            }
            return placed;
        }
    }

    /// Goes on with the upload of a host that is silent, if it was of the same; else that is given up.
    async fn inherit(&self, bucket: &Bucket, before: Inherited) -> Result<()> {
        let (path, name) = (self.context.uploads.path(&self.job.id()), bucket.name().to_owned());
        let (key, is_same) = (self.job.request().key.clone(), before.is_same);
        let adopt = move || UploadLog::adopt(&path, &before.upload, &name, &key);
        match joined(tokio::task::spawn_blocking(adopt).await)??.map(Arc::new) {
            Some(log) if !is_same => abort(bucket, &log).await,
            log => *self.upload.lock() = log,
        }
        Ok(())
    }

    fn set_follows(&self, follows: bool) {
        self.follows.store(follows, Ordering::SeqCst);
        self.is_announced.store(false, Ordering::SeqCst);
        self.job.set_holds(if follows || !self.has_status { Holds::Never } else { Holds::UntilEnd });
    }

    /// The end of a job that another host has done.
    async fn done_elsewhere(&self, bucket: &Bucket, status: Status) -> Result<Placed> {
        if let Some(error) = status.error {
            let kind = ErrorKind::ALL.into_iter().find(|kind| kind.code() == error.code);
            let error = Error::new(kind.unwrap_or(ErrorKind::UploadFailed), error.description);
            return Err(error.in_file(format!("{}, on host {}", status.url, status.host)));
        }
        let key = &self.job.request().key;
        let meta = self.retried(|| bucket.head(key)).await?.ok_or_else(|| gone(bucket, key))?;
        self.job.update(|s| {
            s.size = status.size;
            (s.bytes_done, s.repeated) = (status.bytes_done, s.repeated.saturating_add(1));
        });
        let (sha256, md5) = (status.sha256.unwrap_or_default(), status.md5.unwrap_or_default());
        Ok(Placed { size: meta.object_size, etag: meta.etag, sha256, md5, crc64nvme: status.crc64nvme })
    }
}
