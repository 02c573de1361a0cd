//! One transfer of a file to the store: part by part, hashed on the way, in bounded memory.
//!
//! Parts are read in order, each hashed by two threads (SHA-256 and MD5) while it is sent. At most
//! [`MAX_PARTS_IN_FLIGHT`] of a transfer are in flight; what it holds of parts altogether, the mount's bound on memory
//! limits. What an earlier process sent or hashed is neither sent nor read again.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::{JoinHandle, JoinSet};

use super::digests::{Digests, joined};
use super::log::{Part, UploadLog};
use super::memory::PartMemory;
use super::place::{Body, Sent};
use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::vfile::VirtualFile;

/// Parts of one transfer that are in flight at once.
pub(super) const MAX_PARTS_IN_FLIGHT: usize = 4;

/// What is reported of a transfer while it runs.
pub(in crate::export) trait Observer: Send + Sync {
    /// The file has been read up to here.
    fn read(&self, up_to: u64);
    /// The file's size is known.
    fn sized(&self, size: u64);
    /// The store has so many more bytes.
    fn sent(&self, bytes: u64, is_new: bool);
}

/// One attempt to bring `file` to the store.
pub(in crate::export) struct Transfer<'a> {
    pub(in crate::export) bucket: &'a Bucket,
    pub(in crate::export) file: Arc<dyn VirtualFile>,
    pub(in crate::export) memory: &'a PartMemory,
    pub(in crate::export) observer: &'a dyn Observer,
}

/// A part that is being read ahead: where, and its bytes.
type ReadAhead = Option<(u64, JoinHandle<Result<Bytes>>)>;

impl Transfer<'_> {
    /// Sends and hashes everything but what `log` has. Without a log, `begin` starts an upload with parts of a size, unless
    /// one part is enough.
    ///
    /// When this fails after `begin`, the upload is left to the caller to abort.
    pub(in crate::export) async fn send<S>(
        &self,
        log: Option<Arc<UploadLog>>,
        begin: impl FnOnce(u64) -> S,
    ) -> Result<Sent>
    where
        S: Future<Output = Result<Arc<UploadLog>>>,
    {
        let mut ahead = None;
        let log = match log {
            Some(log) => log,
            None => {
                // The size of a compressed file is known when its last part has been read.
                let part_size = self.bucket.part_size_for(self.file.file_size())?;
                let first = joined(self.memory.read(&self.file, 0, part_size).await)??;
                if (first.len() as u64) < part_size || self.file.known_size() == Some(part_size) {
                    return self.whole(first).await;
                }
                ahead = Some((0, tokio::spawn(async move { Ok(first) })));
                begin(part_size).await?
            }
        };
        let mut digests = Digests::start(Some(&log));
        let (parts, size) = self.send_parts(&log, &mut digests, ahead).await?;
        self.check_size(size)?;
        let (sha256, md5) = digests.finish().await?;
        Ok(Sent { size, sha256, md5, body: Body::Parts(log, parts) })
    }

    /// What fits into one part needs no upload in parts, and is sent when it is put in place.
    async fn whole(&self, bytes: Bytes) -> Result<Sent> {
        let size = bytes.len() as u64;
        self.check_size(size)?;
        self.observer.read(size);
        let mut digests = Digests::start(None);
        digests.add(0, &bytes).await?;
        let (sha256, md5) = digests.finish().await?;
        Ok(Sent { size, sha256, md5, body: Body::Whole(bytes) })
    }

    /// Sends and hashes what is missing; returns the number of parts and of bytes.
    async fn send_parts(
        &self,
        log: &Arc<UploadLog>,
        digests: &mut Digests,
        mut ahead: ReadAhead,
    ) -> Result<(usize, u64)> {
        let part_size = log.name().part_size;
        let mut in_flight = JoinSet::new();
        let (mut index, mut at) = (0, 0);
        loop {
            let sent = log.part(index).filter(|part| self.is_whole(part, at, part_size));
            if let Some(part) = sent.as_ref().filter(|part| digests.cover(at + part.length)) {
                self.observer.read(at + part.length);
                self.observer.sent(part.length, false);
                (index, at) = (index + 1, at + part.length);
                continue;
            }
            let part = match ahead.take().filter(|(place, _)| *place == at) {
                Some((_, reading)) => joined(reading.await)??,
                None => joined(self.memory.read(&self.file, at, part_size).await)??,
            };
            if part.is_empty() {
                break;
            }
            let (length, end) = (part.len() as u64, at + part.len() as u64);
            // The next part is read while this one is hashed and sent.
            if !digests.cover(end + 1) || log.part(index + 1).is_none() {
                ahead = Some((end, self.memory.read(&self.file, end, part_size)));
            }
            self.observer.read(end);
            digests.add(at, &part).await?;
            if sent.is_some_and(|sent| sent.length == length) {
                self.observer.sent(length, false);
            } else {
                while in_flight.len() >= MAX_PARTS_IN_FLIGHT {
                    self.finish_one(&mut in_flight).await?;
                }
                in_flight.spawn(put_part(self.bucket.clone(), Arc::clone(log), (index, at), part));
            }
            (index, at) = (index + 1, end);
        }
        while !in_flight.is_empty() {
            self.finish_one(&mut in_flight).await?;
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

    /// All bytes have been read; the file must agree.
    fn check_size(&self, read: u64) -> Result<()> {
        if self.file.known_size() == Some(read) {
            self.observer.sized(read);
            return Ok(());
        }
        Err(Error::new(ErrorKind::SourceChanged, "the source became shorter").at(read))
    }

    async fn finish_one(&self, in_flight: &mut JoinSet<Result<u64>>) -> Result<()> {
        if let Some(finished) = in_flight.join_next().await {
            self.observer.sent(joined(finished)??, true);
        }
        Ok(())
    }
}

/// Sends a part and records it; returns its bytes.
async fn put_part(
    bucket: Bucket,
    log: Arc<UploadLog>,
    (index, at): (usize, u64),
    part: Bytes,
) -> Result<u64> {
    let length = part.len() as u64;
    failpoint::pass(Step::PartSend)?;
    let id = bucket.put_part(&log.name().key, &log.name().id, index, at, part).await?;
    log.finished(index, Part { length, id });
    Ok(length)
}
