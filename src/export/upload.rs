//! One attempt of one job: source to object, part by part, hashed on the way, in bounded memory.
//!
//! Parts are read in order, each hashed by two threads (SHA-256 and MD5) while it is uploaded. At most
//! [`MAX_PARTS_IN_FLIGHT`] uploads run at once, and as many parts again may wait for the hashes, so a job holds
//! at most 2 × [`MAX_PARTS_IN_FLIGHT`] + 2 parts. What an earlier process sent or hashed is neither sent nor read again.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::{JoinHandle, JoinSet};

use super::digests::Digests;
use super::job::Job;
use super::part_log::{Part, PartLog};
use crate::bucket::{Bucket, ObjectKey, ObjectMeta, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::units::{FileOffset, MIB};
use crate::vfile::VirtualFile;

/// Uploads of one job that run at once; fewer when parts are so large that they would hold more than
/// [`PART_MEMORY`].
pub(super) const MAX_PARTS_IN_FLIGHT: usize = 4;

/// Bytes of parts in flight that one job may hold.
const PART_MEMORY: u64 = 64 * MIB;

/// What an attempt gave.
pub(super) struct Uploaded {
    pub(super) meta: ObjectMeta,
    pub(super) sha256: String,
    pub(super) md5: String,
}

/// One attempt to bring `file` into `bucket` as `key`.
pub(super) struct Attempt<'a> {
    pub(super) bucket: &'a Bucket,
    pub(super) key: &'a ObjectKey,
    pub(super) file: Arc<dyn VirtualFile>,
    pub(super) job: &'a Job,
    pub(super) metrics: &'a Metrics,
}

/// A part that is being read ahead: where, and its bytes.
type ReadAhead = Option<(u64, JoinHandle<Result<Bytes>>)>;

impl Attempt<'_> {
    /// Uploads and verifies: on with the job's upload when it has one. `start` starts an upload with parts of a size,
    /// and records it; `progress` is called after each part.
    ///
    /// When this fails after `start`, the upload is left to the caller to abort.
    pub(super) async fn run<S, P>(
        &self,
        start: impl FnOnce(u64) -> S,
        progress: impl Fn() -> P,
    ) -> Result<Uploaded>
    where
        S: Future<Output = Result<Arc<PartLog>>>,
        P: Future<Output = ()>,
    {
        let mut ahead = None;
        let log = match self.job.upload() {
            Some(log) => log,
            None => {
                // The size of a compressed file is known when its last part has been read.
                let part_size = self.bucket.part_size_for(self.file.file_size())?;
                let first = joined(read_part(&self.file, 0, part_size).await)??;
                if (first.len() as u64) < part_size || self.file.known_size() == Some(part_size) {
                    return self.put_whole(first).await;
                }
                ahead = Some((0, tokio::spawn(async move { Ok(first) })));
                start(part_size).await?
            }
        };
        let mut digests = Digests::start(Some(&log));
        let (parts, size) = self.send(&log, &mut digests, ahead, progress).await?;
        self.check_size(size)?;
        let (sha256, md5) = digests.finish().await?;
        let meta = self.complete(&log, parts, size).await?;
        Ok(Uploaded { meta, sha256, md5 })
    }

    /// Sends and hashes what is missing; returns the number of parts and of bytes.
    async fn send<P: Future<Output = ()>>(
        &self,
        log: &Arc<PartLog>,
        digests: &mut Digests,
        mut ahead: ReadAhead,
        progress: impl Fn() -> P,
    ) -> Result<(usize, u64)> {
        let part_size = log.name().part_size;
        let in_flight_limit =
            usize::try_from(PART_MEMORY / part_size).unwrap_or(1).clamp(1, MAX_PARTS_IN_FLIGHT);
        let mut in_flight = JoinSet::new();
        let (mut index, mut at) = (0, 0);
        loop {
            let sent = log.part(index).filter(|part| self.is_whole(part, at, part_size));
            if let Some(part) = sent.as_ref().filter(|part| digests.cover(at + part.length)) {
                self.advance(at + part.length);
                self.job.uploaded(part.length);
                (index, at) = (index + 1, at + part.length);
                continue;
            }
            let part = match ahead.take().filter(|(place, _)| *place == at) {
                Some((_, reading)) => joined(reading.await)??,
                None => joined(read_part(&self.file, at, part_size).await)??,
            };
            if part.is_empty() {
                break;
            }
            let (length, end) = (part.len() as u64, at + part.len() as u64);
            // The next part is read while this one is hashed and sent.
            if !digests.cover(end + 1) || log.part(index + 1).is_none() {
                ahead = Some((end, read_part(&self.file, end, part_size)));
            }
            self.advance(end);
            digests.add(at, &part).await?;
            if sent.is_some_and(|sent| sent.length == length) {
                self.job.uploaded(length);
            } else {
                while in_flight.len() >= in_flight_limit {
                    self.finish_one(&mut in_flight).await?;
                    progress().await;
                }
                in_flight.spawn(put_part(self.bucket.clone(), Arc::clone(log), index, part));
            }
            (index, at) = (index + 1, end);
        }
        while !in_flight.is_empty() {
            self.finish_one(&mut in_flight).await?;
            progress().await;
        }
        Ok((index, at))
    }

    /// Whether a recorded part is what stands at `at`: only the last one is shorter than the others.
    fn is_whole(&self, part: &Part, at: u64, part_size: u64) -> bool {
        let end = at.saturating_add(part.length);
        match self.file.known_size() {
            Some(file_size) => part.length > 0 && end == file_size.min(at.saturating_add(part_size)),
            None => part.length == part_size,
        }
    }

    /// Bytes up to `at` have been read.
    fn advance(&self, at: u64) {
        self.job.update(|s| {
            s.bytes_done = at;
            s.size = s.size.or(self.file.known_size());
        });
    }

    /// Puts the object in place, unless an earlier process did so in its last moment.
    async fn complete(&self, log: &PartLog, parts: usize, size: u64) -> Result<ObjectMeta> {
        self.job.set_publishing();
        let ids = log.ids(parts)?;
        if let Some(meta) = self.in_place(log, size).await? {
            return Ok(meta);
        }
        if let Some(mark) = self.bucket.expected_etag_prefix(&log.name().id, &ids).await? {
            log.complete(&mark)?;
        }
        if let Some(lease) = self.job.lease()
            && !lease.is_newest().await?
        {
            return Err(Error::new(ErrorKind::Busy, "another host has taken the job over"));
        }
        match self.bucket.complete_upload(self.key, &log.name().id, ids, size, &Replaces::Anything).await {
            // The store may have done it, and its answer been lost: asked again, it knows no such upload.
            Err(error) if error.kind() == ErrorKind::NotFound => self.in_place(log, size).await?.ok_or(error),
            completed => completed,
        }
    }

    /// The object, if it is the one that this upload was about to make.
    async fn in_place(&self, log: &PartLog, size: u64) -> Result<Option<ObjectMeta>> {
        let Some(mark) = log.completing() else { return Ok(None) };
        let is_ours = |meta: &ObjectMeta| {
            meta.object_size == size && meta.etag.as_ref().is_some_and(|etag| etag.starts_with(&mark))
        };
        Ok(self.bucket.head(self.key).await?.filter(is_ours))
    }

    /// All bytes have been read; the file must agree.
    fn check_size(&self, read: u64) -> Result<()> {
        if self.file.known_size() == Some(read) {
            self.job.update(|s| s.size = Some(read));
            return Ok(());
        }
        Err(Error::new(ErrorKind::SourceChanged, "the source became shorter").at(read))
    }

    async fn finish_one(&self, in_flight: &mut JoinSet<Result<u64>>) -> Result<()> {
        if let Some(finished) = in_flight.join_next().await {
            let length = joined(finished)??;
            self.job.uploaded(length);
            self.metrics.uploaded_bytes.add(length);
        }
        Ok(())
    }

    /// What fits into one part needs no multipart upload.
    async fn put_whole(&self, bytes: Bytes) -> Result<Uploaded> {
        let size = bytes.len() as u64;
        self.check_size(size)?;
        self.job.update(|s| s.bytes_done = size);
        let mut digests = Digests::start(None);
        digests.add(0, &bytes).await?;
        let (sha256, md5) = digests.finish().await?;
        self.job.set_publishing();
        let tags = &self.job.request().tags;
        let meta = self.bucket.put_tagged(self.key, bytes, tags, &Replaces::Anything).await?;
        self.job.uploaded(size);
        self.metrics.uploaded_bytes.add(size);
        Ok(Uploaded { meta, sha256, md5 })
    }
}

/// Sends a part and records it; returns its bytes.
async fn put_part(bucket: Bucket, log: Arc<PartLog>, index: usize, part: Bytes) -> Result<u64> {
    let length = part.len() as u64;
    let id = bucket.put_part(&log.name().key, &log.name().id, index, part).await?;
    log.finished(index, Part { length, id });
    Ok(length)
}

/// Reads `length` bytes at `at` on a blocking thread; fewer only at the end of the file.
pub(super) fn read_part(file: &Arc<dyn VirtualFile>, at: u64, length: u64) -> JoinHandle<Result<Bytes>> {
    let file = Arc::clone(file);
    tokio::task::spawn_blocking(move || {
        let length = file.known_size().map_or(length, |size| length.min(size.saturating_sub(at)));
        let mut part = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let mut done = 0;
        while done < part.len() {
            match file.read_at(FileOffset(at + done as u64), &mut part[done..])? {
                0 => break,
                read => done += read,
            }
        }
        part.truncate(done);
        Ok(Bytes::from(part))
    })
}

/// A panic in a blocking task is a broken invariant, not a reason to take the daemon down.
pub(super) fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the job panicked").because(e))
}
