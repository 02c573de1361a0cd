//! One transfer of a file to the store: part by part, hashed on the way, in bounded memory.
//!
//! The file is read in order, each piece hashed by a thread for each hash while parts of it are sent. Which parts there
//! are follows from what the store has already, and is recorded before a part is made; where it has nothing, they are of one
//! size. At most [`MAX_PARTS_IN_FLIGHT`](super::parts::MAX_PARTS_IN_FLIGHT) of a transfer are in flight; what it holds of
//! parts altogether, the mount's bound on memory limits, but for the bytes whose part is not decided yet: less than two parts
//! and twice the smallest one. What an earlier process sent or hashed is neither sent nor read again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::digests::{Digests, Wanted, joined};
use super::held::Held;
use super::log::{Making, Part, PartPlan, UploadLog};
use super::memory::PartMemory;
use super::parts::{Destination, Observer, Parts, unknown};
use super::place::{Body, Sent};
use super::reused::Reused;
use super::splices;
use super::uploads::Uploads;
use crate::bucket::{Bucket, Crc64};
use crate::error::{Error, ErrorKind, Result};
use crate::export::reuse::{Cut, Planner};
use crate::vfile::VirtualFile;

/// One attempt to bring `file` to the store.
pub(in crate::export) struct Transfer<'a> {
    pub(in crate::export) bucket: &'a Bucket,
    pub(in crate::export) uploads: &'a Uploads,
    pub(in crate::export) file: Arc<dyn VirtualFile>,
    pub(in crate::export) memory: &'a PartMemory,
    pub(in crate::export) observer: &'a dyn Observer,
    /// What the store has already.
    pub(in crate::export) reused: &'a Reused,
    /// Set when the store has not copied what it was asked to, and will not.
    pub(in crate::export) copy_failed: Arc<AtomicBool>,
}

/// A piece that is being read ahead: where, and its bytes.
type ReadAhead = Option<(u64, JoinHandle<Result<Bytes>>)>;

/// A transfer in parts, under way.
struct InParts<'a> {
    transfer: &'a Transfer<'a>,
    log: Arc<UploadLog>,
    digests: Digests,
    parts: Parts<'a>,
    ahead: ReadAhead,
}

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
            Some(log) => {
                // An earlier process may have been killed before it did so.
                splices::remove_all(self.bucket, &log).await;
                if log.name().boot != self.bucket.boot() {
                    log.forget();
                }
                log
            }
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
        let chunks = self.reused.sizes(self.file.file_size(), log.chunk_average());
        let wanted = Wanted { crc64: self.bucket.checks_objects(), chunks };
        let destination = Destination {
            bucket: self.bucket.clone(),
            uploads: self.uploads.clone(),
            log: Arc::clone(&log),
            copy_failed: Arc::clone(&self.copy_failed),
        };
        let mut sending = InParts {
            transfer: self,
            digests: Digests::start(Some(&log), wanted),
            log: Arc::clone(&log),
            parts: Parts::new(destination, self.observer),
            ahead,
        };
        let (parts, size) = sending.send().await?;
        self.check_size(size)?;
        let hashes = sending.digests.finish().await?;
        Ok(Sent { size, hashes, body: Body::Parts(log, parts) })
    }

    /// What fits into one part needs no upload in parts, and is sent when it is put in place.
    async fn whole(&self, bytes: Bytes) -> Result<Sent> {
        let size = bytes.len() as u64;
        self.check_size(size)?;
        self.observer.read(size);
        let mut digests = Digests::start(None, Wanted::default());
        digests.add(0, &bytes).await?;
        Ok(Sent { size, hashes: digests.finish().await?, body: Body::Whole(bytes) })
    }

    /// All bytes have been read; the file must agree.
    fn check_size(&self, read: u64) -> Result<()> {
        if self.file.known_size() == Some(read) {
            self.observer.sized(read);
            return Ok(());
        }
        Err(Error::new(ErrorKind::SourceChanged, "the source became shorter").at(read))
    }
}

impl InParts<'_> {
    /// Sends and hashes what is missing; returns the number of parts and of bytes.
    async fn send(&mut self) -> Result<(usize, u64)> {
        let (index, at) = self.send_planned().await?;
        let sent = match self.digests.cut() {
            true => self.send_cut(index, at).await?,
            false => self.send_regular(index, at).await?,
        };
        self.parts.finish().await?;
        Ok(sent)
    }

    /// What was planned before, as far as it is of this file; returns the next part, and where it begins.
    async fn send_planned(&mut self) -> Result<(usize, u64)> {
        let (mut index, mut at) = (0, 0);
        while let Some((plan, part)) = self.log.planned(index).filter(|(plan, _)| self.fits(plan, index, at))
        {
            let end = plan.end();
            if part.is_some() && self.digests.cover(end) {
                self.transfer.observer.read(end);
                self.parts.known(&plan);
            } else {
                self.send_again(index, plan, part).await?;
            }
            (index, at) = (index + 1, end);
        }
        Ok((index, at))
    }

    /// Whether a part that was planned is what stands at `at`. Of a file whose size is not known, the last one may be a part
    /// that was cut off. A log may be another host's: what no plan of ours would be is not followed.
    fn fits(&self, plan: &PartPlan, index: usize, at: u64) -> bool {
        let size = self.transfer.file.known_size();
        let is_within = match size {
            Some(size) => plan.end() <= size,
            None => self.log.planned(index + 1).is_some(),
        };
        let (least, part_size) = (self.transfer.bucket.least_part(), self.log.name().part_size);
        let is_possible = match &plan.making {
            Making::Send => true,
            Making::Copy(copied) => copied.length == plan.length,
            Making::Splice(copied) => copied.length < plan.length,
        };
        let is_long_enough = plan.length >= least.min(part_size) || Some(plan.end()) == size;
        let most = part_size.saturating_add(least).saturating_mul(2);
        let is_bounded = plan.length - plan.copied() <= most;
        plan.offset == at && plan.length > 0 && is_within && is_possible && is_long_enough && is_bounded
    }

    /// Reads a part again that was planned before, to hash it, and to make it unless the store has it.
    ///
    /// # Errors
    /// When it is not what was to be copied, and everything has to be sent.
    async fn send_again(&mut self, index: usize, plan: PartPlan, part: Option<Part>) -> Result<()> {
        let (end, mut at) = (plan.end(), plan.offset);
        let sent_from = plan.offset + plan.copied();
        let (mut held, mut crc64) = (Held::at(sent_from), Crc64::default());
        let is_missing = part.is_none();
        while at < end {
            let piece = self.read(at, end - at, held.is_empty()).await?;
            if piece.is_empty() {
                return Err(Error::new(ErrorKind::SourceChanged, "the source became shorter").at(at));
            }
            self.digests.add(at, &piece).await?;
            self.digests.cuts().await?;
            let copied = sent_from.saturating_sub(at).min(piece.len() as u64) as usize;
            crc64.add(&piece[..copied]);
            if is_missing {
                held.push(at, &piece);
            }
            at += piece.len() as u64;
            self.transfer.observer.read(at);
        }
        if let Making::Copy(copied) | Making::Splice(copied) = &plan.making
            && copied.crc64 != crc64.value()
        {
            self.transfer.copy_failed.store(true, Ordering::SeqCst);
            return Err(
                Error::new(ErrorKind::Damaged, "a part is not what it was planned as").at(plan.offset)
            );
        }
        if !is_missing {
            self.parts.known(&plan);
            return Ok(());
        }
        let sent = held.range(sent_from, end - sent_from).ok_or_else(unknown)?;
        self.parts.make(index, plan, sent).await
    }

    /// Parts of one size from a place on.
    async fn send_regular(&mut self, mut index: usize, mut at: u64) -> Result<(usize, u64)> {
        let part_size = self.log.name().part_size;
        loop {
            let part = self.read(at, part_size, true).await?;
            if part.is_empty() {
                return Ok((index, at));
            }
            let plan = PartPlan::sent(at, part.len() as u64);
            at = plan.end();
            self.transfer.observer.read(at);
            self.digests.add(plan.offset, &part).await?;
            self.log.plan(index, plan.clone());
            self.parts.make(index, plan, part).await?;
            index += 1;
        }
    }

    /// Parts that follow from the chunks, and from what the store has of them, from a place on.
    async fn send_cut(&mut self, index: usize, start: u64) -> Result<(usize, u64)> {
        // The chunk in which the place is has to be made again from its start.
        let mut at = self.digests.cut_again(start).await?;
        let mut chunk = at;
        let part_size = self.log.name().part_size;
        let size = self.transfer.file.file_size();
        let limits = self.transfer.reused.limits(self.transfer.bucket, part_size, size);
        let old = self.transfer.reused.old_index(&self.log);
        let mut planner = Planner::new(limits, size, (index, start), old);
        let (mut held, mut count, mut end) = (Held::at(start), index, start);
        loop {
            let piece = self.read(at, part_size, held.is_empty()).await?;
            let is_last = piece.is_empty();
            let cuts = if is_last {
                self.digests.last_cuts().await?
            } else {
                self.digests.add(at, &piece).await?;
                held.push(at, &piece);
                at += piece.len() as u64;
                self.transfer.observer.read(at);
                self.digests.cuts().await?
            };
            let mut planned = Vec::new();
            for cut in cuts {
                chunk += u64::from(cut.length);
                if let Some(cut) = cut_from(cut, chunk, start) {
                    planner.add(&cut, &mut planned);
                }
            }
            if is_last {
                planner.finish(&mut planned);
            }
            for part in planned {
                let store = (self.transfer.bucket, self.transfer.uploads);
                // Whatever stands in the way of the zeros, the file can be sent.
                let plan = self.transfer.reused.plan(store, &part).await.inspect_err(|error| {
                    self.transfer.copy_failed.fetch_or(!error.is_transient(), Ordering::SeqCst);
                })?;
                let sent_from = plan.offset + plan.copied();
                let sent = held.range(sent_from, plan.end() - sent_from).ok_or_else(unknown)?;
                (count, end) = (part.index + 1, plan.end());
                self.log.plan(part.index, plan.clone());
                self.parts.make(part.index, plan, sent).await?;
            }
            held.drop_before(planner.held_from());
            if is_last {
                return Ok((count, end));
            }
        }
    }

    /// Up to so many bytes at a place, and none at the end; the next ones are read meanwhile. Who holds bytes whose part
    /// waits for more of them must not wait for others who do the same.
    async fn read(&mut self, at: u64, length: u64, may_wait: bool) -> Result<Bytes> {
        let (memory, file) = (self.transfer.memory, &self.transfer.file);
        let part_size = self.log.name().part_size;
        let piece = match self.ahead.take().filter(|(place, _)| *place == at) {
            Some((_, reading)) => joined(reading.await)??,
            None if may_wait => joined(memory.read(file, at, length.min(part_size)).await)??,
            None => self.read_holding(at, length.min(part_size)).await?,
        };
        let piece = piece.slice(..piece.len().min(usize::try_from(length).unwrap_or(usize::MAX)));
        let end = at + piece.len() as u64;
        if !piece.is_empty() && !self.digests.cover(end + part_size) {
            self.ahead = memory.read_now(file, end, part_size).map(|reading| (end, reading));
        }
        Ok(piece)
    }

    /// Reads while bytes are held. What is in flight ends by itself, and then there may be room; only when there is none after
    /// that, it is read beyond the bound.
    async fn read_holding(&mut self, at: u64, length: u64) -> Result<Bytes> {
        let (memory, file) = (self.transfer.memory, &self.transfer.file);
        loop {
            if let Some(reading) = memory.read_now(file, at, length) {
                return joined(reading.await)?;
            }
            if !self.parts.finish_one().await? {
                return joined(memory.read_beyond(file, at, length).await)?;
            }
        }
    }
}

/// What of a chunk that ends at `end` comes after `start`: a chunk of its own, which nothing is known of.
fn cut_from(cut: Cut, end: u64, start: u64) -> Option<Cut> {
    let length = end.saturating_sub(start).min(u64::from(cut.length)) as u32;
    match length {
        0 => None,
        length if length == cut.length => Some(cut),
        length => Some(Cut { length, digest: [0; 32], crc64: 0, is_zero: false }),
    }
}
