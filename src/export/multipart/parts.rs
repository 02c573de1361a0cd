//! The parts of an upload on their way to the store: sent, copied by it, or spliced of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::digests::joined;
use super::log::{Copied, Making, Part, PartPlan, UploadLog};
use super::splices;
use super::uploads::{Uploads, abort};
use crate::bucket::{Bucket, CopySource, Crc64, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};

/// Parts of one transfer that are in flight at once.
pub(super) const MAX_PARTS_IN_FLIGHT: usize = 4;

/// How many bytes came to the store in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::export) struct Share {
    pub(in crate::export) sent: u64,
    /// Copied from the object that is replaced.
    pub(in crate::export) reused: u64,
    /// Copied from the object of zeros.
    pub(in crate::export) zero: u64,
}

impl Share {
    /// So many bytes that were sent.
    pub(in crate::export) fn sent(bytes: u64) -> Self {
        Self { sent: bytes, ..Self::default() }
    }

    /// Those of a part.
    pub(super) fn of(plan: &PartPlan) -> Self {
        match &plan.making {
            Making::Send => Self::sent(plan.length),
            Making::Copy(copied) | Making::Splice(copied) => {
                let sent = plan.length.saturating_sub(copied.length);
                match copied.is_zero {
                    true => Self { sent, zero: copied.length, reused: 0 },
                    false => Self { sent, reused: copied.length, zero: 0 },
                }
            }
        }
    }

    /// All of them.
    pub(in crate::export) fn bytes(self) -> u64 {
        self.sent.saturating_add(self.reused).saturating_add(self.zero)
    }
}

/// What is reported of a transfer while it runs.
pub(in crate::export) trait Observer: Send + Sync {
    /// The file has been read up to here.
    fn read(&self, up_to: u64);
    /// The file's size is known.
    fn sized(&self, size: u64);
    /// The store has more bytes.
    fn stored(&self, bytes: Share, is_new: bool);
}

/// The parts of one upload that are in flight.
pub(super) struct Parts<'a> {
    to: Destination,
    observer: &'a dyn Observer,
    in_flight: JoinSet<Result<Share>>,
}

/// The upload that parts go to.
#[derive(Clone)]
pub(super) struct Destination {
    pub(super) bucket: Bucket,
    pub(super) uploads: Uploads,
    pub(super) log: Arc<UploadLog>,
    /// Set when the store has not copied what it was asked to, and will not.
    pub(super) copy_failed: Arc<AtomicBool>,
}

impl<'a> Parts<'a> {
    pub(super) fn new(to: Destination, observer: &'a dyn Observer) -> Self {
        Self { to, observer, in_flight: JoinSet::new() }
    }

    /// A part that the store has already.
    pub(super) fn known(&self, plan: &PartPlan) {
        self.observer.stored(Share::of(plan), false);
    }

    /// Makes a part when there is room for it; `sent` are the bytes of it that are sent.
    pub(super) async fn make(&mut self, index: usize, plan: PartPlan, sent: Bytes) -> Result<()> {
        while self.in_flight.len() >= MAX_PARTS_IN_FLIGHT {
            self.finish_one().await?;
        }
        let to = self.to.clone();
        self.in_flight.spawn(async move { to.make(index, &plan, sent).await.map(|()| Share::of(&plan)) });
        Ok(())
    }

    /// Waits for all parts.
    pub(super) async fn finish(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            self.finish_one().await?;
        }
        Ok(())
    }

    /// Waits for one part, if there is one.
    pub(super) async fn finish_one(&mut self) -> Result<bool> {
        let Some(finished) = self.in_flight.join_next().await else { return Ok(false) };
        self.observer.stored(joined(finished)??, true);
        Ok(true)
    }
}

impl Destination {
    async fn make(&self, index: usize, plan: &PartPlan, sent: Bytes) -> Result<()> {
        let (key, upload) = (&self.log.name().key, &self.log.name().id);
        let id = match &plan.making {
            Making::Send => {
                failpoint::pass(Step::PartSend)?;
                self.bucket.put_part(key, upload, index, plan.offset, sent).await?
            }
            Making::Copy(copied) => {
                failpoint::pass(Step::PartCopy)?;
                let (from, crc64) = (source(copied), copied.crc64);
                self.copied(self.bucket.copy_part(key, upload, index, plan.offset, &from, crc64).await)?
            }
            Making::Splice(kept) => self.splice(index, plan, kept, sent).await?,
        };
        self.log.finished(index, Part { offset: Some(plan.offset), length: plan.length, id });
        Ok(())
    }

    /// A part of bytes that the store has and of some that it has not: an object of both, of which the last part may be as
    /// short as it is, and then a copy of that.
    async fn splice(&self, index: usize, plan: &PartPlan, kept: &Copied, sent: Bytes) -> Result<String> {
        let key = splices::key(&self.log, index);
        splices::begin(&self.log);
        let crc64 = Crc64::new(kept.crc64, kept.length).then(Crc64::of(&sent)).value();
        let (part_size, log_id) = (self.log.name().part_size, splices::log_id(&self.log, index));
        let log = self.uploads.begin(&self.bucket, &key, &Tags::new(), part_size, &log_id).await?;
        let made = async {
            let id = &log.name().id;
            failpoint::pass(Step::PartCopy)?;
            let first = self.bucket.copy_part(&key, id, 0, 0, &source(kept), kept.crc64).await;
            let first = self.copied(first)?;
            failpoint::pass(Step::PartSend)?;
            let second = self.bucket.put_part(&key, id, 1, kept.length, sent).await?;
            self.bucket
                .complete_upload(&key, id, vec![first, second], plan.length, &Replaces::Anything, Some(crc64))
                .await
        };
        let made = match made.await {
            Ok(made) => made,
            Err(error) => {
                abort(&self.bucket, &log).await;
                return Err(error);
            }
        };
        log.remove();
        let etag = made.etag.unwrap_or_default();
        let whole = CopySource { key: key.clone(), etag, range: 0..plan.length };
        failpoint::pass(Step::PartCopy)?;
        let (to, upload) = (&self.log.name().key, &self.log.name().id);
        let copied = self.bucket.copy_part(to, upload, index, plan.offset, &whole, crc64).await;
        let id = self.copied(copied)?;
        splices::end(&self.bucket, &self.log, key).await;
        Ok(id)
    }

    /// Takes note of a copy that is not worth another try.
    fn copied(&self, copied: Result<String>) -> Result<String> {
        copied.inspect_err(|error| {
            self.copy_failed.fetch_or(is_refusal(error), Ordering::SeqCst);
            if error.kind() == ErrorKind::Damaged {
                self.bucket.forget_copies(error.what());
            }
        })
    }
}

/// Whether a store will not copy this, however often it is asked.
fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Unsupported | ErrorKind::Conflict)
        && !error.is_transient()
}

fn source(copied: &Copied) -> CopySource {
    let range = copied.at..copied.at.saturating_add(copied.length);
    CopySource { key: copied.key.clone(), etag: copied.etag.clone(), range }
}

/// A plan that does not say what is sent.
pub(super) fn unknown() -> Error {
    Error::new(ErrorKind::Internal, "the bytes of a part are not there any more")
}
