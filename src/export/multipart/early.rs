//! Uploads of files that a program is still writing: parts that it has passed are sent and hashed meanwhile.
//!
//! A part is sent early at most once. One that is written again after that is sent again at the end, by the job that
//! takes the upload over; so a header that is rewritten all the time costs one part.

use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::task::{JoinHandle, JoinSet};
use tracing::debug;

use super::digests::{Digests, Wanted, joined};
use super::log::{Part, UploadLog};
use super::memory::PartMemory;
use super::reused::Reused;
use super::uploads::{Uploads, abort};
use crate::bucket::{Bucket, MAX_PARTS, ObjectKey, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::export::reuse::ChunkSizes;
use crate::extent::{Extent, ExtentKind};
use crate::failpoint::{self, Step};
use crate::units::FileOffset;
use crate::vfile::VirtualFile;

/// Parts of one file that are sent at once while it is written.
const PARTS_IN_FLIGHT: usize = 2;

/// How much larger the file may become before its parts are too small and all of it is sent again.
const GROWTH: u64 = 8;

/// The upload of a file that is being written. Given up when it is dropped before a job has taken it.
pub struct EarlyUpload {
    shared: Arc<Shared>,
    key: ObjectKey,
    tags: Tags,
    part_size: u64,
    log_id: String,
    task: Option<JoinHandle<Option<Arc<UploadLog>>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    parts: Vec<PartState>,
    /// Parts that were sent and then written again, and are not yet marked in the log.
    stale: Vec<usize>,
    /// Whether every write so far began at or after the end of the one before.
    is_monotonic: bool,
    high_water: u64,
    ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    HandOver,
    GiveUp,
}

#[derive(Clone, Copy, Debug, Default)]
struct PartState {
    /// Bytes that were written into it.
    written: u64,
    /// Whether it has been read to be sent.
    taken: bool,
    /// Whether it was written after that.
    rewritten: bool,
}

/// A file that is sent while it is written.
pub(in crate::export) struct EarlySource {
    pub(in crate::export) bucket: Bucket,
    pub(in crate::export) key: ObjectKey,
    pub(in crate::export) tags: Tags,
    pub(in crate::export) file: File,
    /// Bytes that were written from its start to its end.
    pub(in crate::export) file_size: u64,
    /// The name of the upload's log.
    pub(in crate::export) log_id: String,
    /// Whether the store is to copy what it has already.
    pub(in crate::export) incremental: bool,
}

impl EarlyUpload {
    /// Begins to send a file, until `permit`, the right to do so, is dropped with the task. `None` for a file that is too
    /// large.
    pub(in crate::export) fn begin(
        source: EarlySource,
        uploads: Uploads,
        memory: PartMemory,
        permit: OwnedSemaphorePermit,
        runtime: &Handle,
    ) -> Option<Self> {
        let EarlySource { bucket, key, tags, file, file_size, log_id, incremental } = source;
        let part_size = bucket.part_size_for(file_size.saturating_mul(GROWTH)).ok()?;
        let state = State {
            parts: Vec::new(),
            stale: Vec::new(),
            is_monotonic: true,
            high_water: file_size,
            ending: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Notify::new() });
        let sender = Sender {
            uploads,
            memory,
            log_id: log_id.clone(),
            bucket,
            key: key.clone(),
            tags: tags.clone(),
            file: Arc::new(Growing(file)),
            part_size,
            incremental,
            shared: Arc::clone(&shared),
            _permit: permit,
        };
        let task = Some(runtime.spawn(sender.run()));
        Some(Self { shared, key, tags, part_size, log_id, task })
    }

    /// Bytes of the file were written, and are there by now.
    pub fn wrote(&self, at: u64, length: u64) {
        let mut state = self.shared.state.lock();
        let end = at + length;
        state.is_monotonic &= at >= state.high_water;
        state.high_water = state.high_water.max(end);
        let mut index = at / self.part_size;
        while index * self.part_size < end {
            let start = index * self.part_size;
            let within = end.min(start + self.part_size) - at.max(start);
            state.touch(index as usize, within);
            index += 1;
        }
        drop(state);
        self.shared.changed.notify_one();
    }

    /// The file was cut or extended.
    pub fn resized(&self, file_size: u64) {
        let mut state = self.shared.state.lock();
        if file_size < state.high_water {
            let first = (file_size / self.part_size) as usize;
            (first..state.parts.len()).for_each(|index| state.touch(index, 0));
            state.is_monotonic = false;
        }
    }

    /// Whether the file has grown beyond what this many parts of this size hold.
    pub fn is_outgrown(&self, file_size: u64) -> bool {
        file_size.div_ceil(self.part_size) > MAX_PARTS as u64
    }

    /// What the object will be.
    pub(in crate::export) fn key(&self) -> &ObjectKey {
        &self.key
    }

    /// The object's tags.
    pub fn tags(&self) -> &Tags {
        &self.tags
    }

    /// The parts that were written again after they were sent, whether or not the log says so by now. Nobody writes any
    /// more.
    pub(in crate::export) fn rewritten(&self) -> Vec<usize> {
        let state = self.shared.state.lock();
        let rewritten = state.parts.iter().enumerate().filter(|(_, part)| part.rewritten);
        rewritten.map(|(index, _)| index).collect()
    }

    /// The name of the upload's log.
    pub(in crate::export) fn log_id(&self) -> &str {
        &self.log_id
    }

    /// Stops sending, and hands what there is to the job that makes the object out of the whole file. `None` when
    /// sending has failed. Given up when this is dropped.
    pub(in crate::export) async fn finish(mut self) -> Option<Arc<UploadLog>> {
        self.end(Ending::HandOver);
        let task = self.task.as_mut()?;
        joined(task.await).ok().flatten()
    }

    fn end(&self, ending: Ending) {
        self.shared.state.lock().ending = Some(ending);
        self.shared.changed.notify_one();
    }
}

impl Drop for EarlyUpload {
    fn drop(&mut self) {
        self.end(Ending::GiveUp);
    }
}

impl State {
    fn touch(&mut self, index: usize, length: u64) {
        if self.parts.len() <= index {
            self.parts.resize(index + 1, PartState::default());
        }
        let part = &mut self.parts[index];
        part.written += length;
        if part.taken && !part.rewritten {
            part.rewritten = true;
            self.stale.push(index);
        }
    }

    /// The next part that is worth sending: all of it was written, and the writer is elsewhere.
    fn take(&mut self, part_size: u64) -> Option<usize> {
        let passed = (self.high_water / part_size) as usize;
        if self.parts.len() < passed {
            self.parts.resize(passed, PartState::default());
        }
        let is_whole = |part: &PartState| self.is_monotonic || part.written >= part_size;
        let index = self.parts[..passed].iter().position(|part| !part.taken && is_whole(part))?;
        self.parts[index].taken = true;
        Some(index)
    }
}

/// The task that sends.
struct Sender {
    uploads: Uploads,
    memory: PartMemory,
    tags: Tags,
    log_id: String,
    bucket: Bucket,
    key: ObjectKey,
    file: Arc<dyn VirtualFile>,
    part_size: u64,
    incremental: bool,
    shared: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
}

/// What a sender has under way.
struct Sent<'a> {
    log: &'a UploadLog,
    /// `None` when a part that was hashed has been written again.
    digests: Option<Digests>,
    hashed: usize,
}

impl Sender {
    async fn run(self) -> Option<Arc<UploadLog>> {
        let reused = match self.incremental {
            true => Reused::look_at(&self.bucket, &self.key, self.file.file_size()).await,
            false => Reused::default(),
        };
        if reused.has_old() {
            // What the store has of it is known when it is whole.
            return None;
        }
        let begun =
            self.uploads.begin(&self.bucket, &self.key, &self.tags, self.part_size, &self.log_id).await;
        let log = match begun {
            Ok(log) => log,
            Err(error) => {
                // The job will try again, and tell.
                debug!(key = %self.key, "nothing is sent while it is written: {}", error.report());
                return None;
            }
        };
        match self.send(&log, reused.sizes(0, None)).await {
            Ok(Ending::HandOver) => Some(log),
            Ok(Ending::GiveUp) => {
                abort(&self.bucket, &log).await;
                None
            }
            Err(error) => {
                debug!(key = %self.key, "what was sent while it was written is given up: {}", error.report());
                abort(&self.bucket, &log).await;
                None
            }
        }
    }

    async fn send(&self, log: &Arc<UploadLog>, chunks: Option<ChunkSizes>) -> Result<Ending> {
        let wanted = Wanted { crc64: self.bucket.checks_objects(), chunks };
        let mut sent = Sent { log, digests: Some(Digests::start(Some(log), wanted)), hashed: 0 };
        let mut in_flight = JoinSet::new();
        let ending = loop {
            let (ending, stale, next) = {
                let mut state = self.shared.state.lock();
                let next = if in_flight.len() < PARTS_IN_FLIGHT { state.take(self.part_size) } else { None };
                (state.ending, std::mem::take(&mut state.stale), next)
            };
            sent.mark(&stale).await?;
            match (ending, next) {
                (Some(Ending::GiveUp), _) => return Ok(Ending::GiveUp),
                (Some(ending), _) => break ending,
                (None, Some(index)) => {
                    let part = self.read(index).await?;
                    sent.hash(index, index as u64 * self.part_size, &part).await?;
                    in_flight.spawn(put(
                        self.bucket.clone(),
                        Arc::clone(log),
                        (index, index as u64 * self.part_size),
                        part,
                    ));
                }
                (None, None) => tokio::select! {
                    Some(result) = in_flight.join_next() => sent.finished(&self.shared, joined(result)??),
                    () = self.shared.changed.notified() => {}
                },
            }
        };
        while let Some(result) = in_flight.join_next().await {
            sent.finished(&self.shared, joined(result)??);
        }
        // Nobody writes any more: these are the last. The job may have been stopped meanwhile.
        let (ending, stale) = {
            let mut state = self.shared.state.lock();
            (state.ending.unwrap_or(ending), std::mem::take(&mut state.stale))
        };
        sent.mark(&stale).await?;
        if let Some(digests) = sent.digests {
            digests.finish().await?;
        }
        Ok(ending)
    }

    async fn read(&self, index: usize) -> Result<Bytes> {
        let part =
            joined(self.memory.read(&self.file, index as u64 * self.part_size, self.part_size).await)??;
        if (part.len() as u64) < self.part_size {
            return Err(Error::new(
                ErrorKind::SourceChanged,
                "the staged bytes were cut while they were sent",
            ));
        }
        Ok(part)
    }
}

/// A staged file that still grows: its parts that are passed are read in whole.
struct Growing(File);

impl VirtualFile for Growing {
    fn file_size(&self) -> u64 {
        self.0.metadata().map_or(0, |meta| meta.len())
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        use std::os::unix::fs::FileExt;
        self.0.read_at(buf, at.bytes()).map_err(|e| Error::from_io("cannot read the staged bytes", e))
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.file_size().saturating_sub(at.bytes())))
    }
}

async fn put(
    bucket: Bucket,
    log: Arc<UploadLog>,
    (index, offset): (usize, u64),
    part: Bytes,
) -> Result<(usize, Part)> {
    let length = part.len() as u64;
    failpoint::pass(Step::PartSend)?;
    let id = bucket.put_part(&log.name().key, &log.name().id, index, offset, part).await?;
    Ok((index, Part { offset: Some(offset), length, id }))
}

impl Sent<'_> {
    /// Hashes a part when it is the next one.
    async fn hash(&mut self, index: usize, at: u64, part: &Bytes) -> Result<()> {
        if let Some(digests) = self.digests.as_mut().filter(|_| index == self.hashed) {
            digests.add(at, part).await?;
            self.hashed += 1;
        }
        Ok(())
    }

    /// The store has a part. Whether it still is what the file has is looked at under the lock of those who write.
    fn finished(&mut self, shared: &Shared, (index, part): (usize, Part)) {
        let state = shared.state.lock();
        if !state.parts[index].rewritten {
            self.log.finished(index, part);
        }
    }

    /// Parts that were written again: they are sent by the job, and the hashes are made again.
    async fn mark(&mut self, stale: &[usize]) -> Result<()> {
        for &index in stale {
            if index < self.hashed
                && let Some(digests) = self.digests.take()
            {
                // Its last states must not be recorded after the mark.
                digests.finish().await?;
            }
            self.log.stale(index);
        }
        Ok(())
    }
}
