//! The hashes of an object, made in order while its parts are sent, each on a thread of its own: SHA-256, MD5, and
//! CRC-64/NVME where the store compares it; and its chunks, for the next export of the key.

mod hash;

use std::sync::Arc;

use bytes::Bytes;
use md5::Md5;
use sha2::Sha256;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::log::{DigestName, DigestState, Placed, UploadLog};
use crate::bucket::Crc64;
use crate::error::{Error, ErrorKind, Result};
use crate::export::reuse::{ChunkSizes, Chunker, Cut};
use hash::Hash;

/// Parts that wait for a hash; they count against the bound on memory.
const QUEUED: usize = 4;

/// What is made besides SHA-256 and MD5.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::export) struct Wanted {
    pub(in crate::export) crc64: bool,
    pub(in crate::export) chunks: Option<ChunkSizes>,
}

/// The hashes of an object, hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::export) struct Hashes {
    pub(in crate::export) sha256: String,
    pub(in crate::export) md5: String,
    pub(in crate::export) crc64nvme: Option<String>,
}

impl Hashes {
    /// An object with these hashes that is in place.
    pub(in crate::export) fn placed(self, size: u64, etag: Option<String>) -> Placed {
        let Self { sha256, md5, crc64nvme } = self;
        Placed { size, etag, sha256, md5, crc64nvme }
    }

    /// The CRC-64/NVME as a number.
    pub(in crate::export) fn crc64(&self) -> Option<u64> {
        u64::from_str_radix(self.crc64nvme.as_deref()?, 16).ok()
    }
}

/// The hashes of an object, under way.
pub(in crate::export) struct Digests {
    sha256: Lane,
    md5: Lane,
    crc64: Option<Lane>,
    chunks: Option<ChunkLane>,
}

/// One hash: its thread, and the parts on their way to it.
struct Lane {
    /// Bytes of the object that it has been given, or had when it began.
    given: u64,
    parts: mpsc::Sender<Bytes>,
    thread: JoinHandle<String>,
}

impl Digests {
    /// Begins where the log says that an earlier process was; its new states are recorded there.
    pub(in crate::export) fn start(log: Option<&Arc<UploadLog>>, wanted: Wanted) -> Self {
        let crc64 = || Lane::start::<Crc64>(DigestName::Crc64nvme, log);
        Self {
            sha256: Lane::start::<Sha256>(DigestName::Sha256, log),
            md5: Lane::start::<Md5>(DigestName::Md5, log),
            crc64: wanted.crc64.then(crc64),
            chunks: log.zip(wanted.chunks).map(|(log, sizes)| ChunkLane::start(log, sizes)),
        }
    }

    /// Whether the first `end` bytes have been given to all of them.
    pub(in crate::export) fn cover(&self, end: u64) -> bool {
        self.sha256.given >= end
            && self.md5.given >= end
            && self.crc64.as_ref().is_none_or(|lane| lane.given >= end)
            && self.chunks.as_ref().is_none_or(|lane| lane.given >= end)
    }

    /// Gives the bytes at `at`, which begin where the last ones ended, or before; a hash leaves what it had already.
    pub(in crate::export) async fn add(&mut self, at: u64, part: &Bytes) -> Result<()> {
        // The chunks first: what is sent waits for them.
        if let Some(chunks) = &mut self.chunks {
            chunks.add(at, part).await?;
        }
        self.md5.add(at, part).await?;
        self.sha256.add(at, part).await?;
        match &mut self.crc64 {
            Some(crc64) => crc64.add(at, part).await,
            None => Ok(()),
        }
    }

    /// Whether chunks are made.
    pub(in crate::export) fn cut(&self) -> bool {
        self.chunks.is_some()
    }

    /// Begins with the chunks again at the end of one, at `limit` or before; returns where.
    pub(in crate::export) async fn cut_again(&mut self, limit: u64) -> Result<u64> {
        match &mut self.chunks {
            Some(lane) => lane.start_again(limit).await,
            None => Ok(limit),
        }
    }

    /// The chunks that ended in what was given last.
    pub(in crate::export) async fn cuts(&mut self) -> Result<Vec<Cut>> {
        match &mut self.chunks {
            Some(lane) => lane.received().await,
            None => Ok(Vec::new()),
        }
    }

    /// The last chunks, when everything was given.
    pub(in crate::export) async fn last_cuts(&mut self) -> Result<Vec<Cut>> {
        match &mut self.chunks {
            Some(lane) => {
                lane.send(None).await?;
                lane.received().await
            }
            None => Ok(Vec::new()),
        }
    }

    /// The hashes of all that was given. A chunk that has not ended is none, unless [`last_cuts`](Self::last_cuts) has
    /// made it one.
    pub(in crate::export) async fn finish(self) -> Result<Hashes> {
        if let Some(lane) = self.chunks {
            lane.stop().await?;
        }
        let crc64nvme = match self.crc64 {
            Some(lane) => Some(lane.finish().await?),
            None => None,
        };
        Ok(Hashes { sha256: self.sha256.finish().await?, md5: self.md5.finish().await?, crc64nvme })
    }
}

impl Lane {
    fn start<D: Hash>(name: DigestName, log: Option<&Arc<UploadLog>>) -> Self {
        let begun = log.and_then(|log| resumed::<D>(&log.digest(name)));
        let (mut digest, given) = begun.unwrap_or_else(|| (D::begin(), 0));
        let (parts, mut received) = mpsc::channel::<Bytes>(QUEUED);
        let log = log.cloned();
        let thread = tokio::task::spawn_blocking(move || {
            let mut bytes = given;
            while let Some(part) = received.blocking_recv() {
                digest.take(&part);
                bytes += part.len() as u64;
                if let Some(log) = &log {
                    log.hashed(name, DigestState { bytes, state: hex::encode(digest.state()) });
                }
            }
            digest.end()
        });
        Self { given, parts, thread }
    }

    async fn add(&mut self, at: u64, part: &Bytes) -> Result<()> {
        let Some(part) = rest(&mut self.given, at, part) else { return Ok(()) };
        let gone = |e| Error::new(ErrorKind::Internal, "a hash of the job ended early").because(e);
        self.parts.send(part).await.map_err(gone)
    }

    async fn finish(self) -> Result<String> {
        drop(self.parts);
        joined(self.thread.await)
    }
}

/// What of a part at `at` comes after the `given` bytes, which it is counted among from then on.
fn rest(given: &mut u64, at: u64, part: &Bytes) -> Option<Bytes> {
    let end = at + part.len() as u64;
    if end <= *given {
        return None;
    }
    let part = part.slice((*given - at.min(*given)) as usize..);
    *given = end;
    Some(part)
}

/// The chunks: their thread, what is on its way to it, and what comes back.
struct ChunkLane {
    log: Arc<UploadLog>,
    sizes: ChunkSizes,
    /// Bytes of the object that it has been given, or had when it began.
    given: u64,
    /// `None` for the end of the object.
    parts: mpsc::Sender<Option<Bytes>>,
    cuts: mpsc::UnboundedReceiver<Vec<Cut>>,
    /// Answers that are to come.
    awaited: usize,
    thread: JoinHandle<()>,
}

impl ChunkLane {
    fn start(log: &Arc<UploadLog>, sizes: ChunkSizes) -> Self {
        if log.chunk_average() != Some(sizes.average) {
            log.cut_chunks(0);
        }
        let given = log.chunks_end();
        let (parts, mut received) = mpsc::channel::<Option<Bytes>>(QUEUED);
        let (found, cuts) = mpsc::unbounded_channel();
        let recorded = Arc::clone(log);
        let thread = tokio::task::spawn_blocking(move || {
            let (mut chunker, mut at) = (Chunker::new(sizes), given);
            while let Some(part) = received.blocking_recv() {
                let mut cuts = Vec::new();
                match part {
                    Some(part) => chunker.feed(&part, &mut cuts),
                    None => chunker.finish(&mut cuts),
                }
                if !cuts.is_empty() {
                    recorded.chunked(sizes.average, at, &cuts);
                }
                at += cuts.iter().map(|cut| u64::from(cut.length)).sum::<u64>();
                let _ = found.send(cuts);
            }
        });
        Self { log: Arc::clone(log), sizes, given, parts, cuts, awaited: 0, thread }
    }

    async fn add(&mut self, at: u64, part: &Bytes) -> Result<()> {
        let Some(part) = rest(&mut self.given, at, part) else { return Ok(()) };
        self.send(Some(part)).await
    }

    async fn send(&mut self, part: Option<Bytes>) -> Result<()> {
        self.awaited += 1;
        self.parts.send(part).await.map_err(|e| ended().because(e))
    }

    async fn received(&mut self) -> Result<Vec<Cut>> {
        let mut all = Vec::new();
        while self.awaited > 0 {
            all.extend(self.cuts.recv().await.ok_or_else(ended)?);
            self.awaited -= 1;
        }
        Ok(all)
    }

    async fn start_again(&mut self, limit: u64) -> Result<u64> {
        let before = self.log.chunks_end();
        let place = self.log.cut_chunks(limit);
        if self.awaited == 0 && (before, place) == (self.given, self.given) {
            return Ok(place);
        }
        // What the thread may still record has to come before it is void.
        self.received().await?;
        let place = self.log.cut_chunks(limit);
        let (log, sizes) = (Arc::clone(&self.log), self.sizes);
        *self = Self::start(&log, sizes);
        Ok(place)
    }

    async fn stop(self) -> Result<()> {
        drop(self.parts);
        joined(self.thread.await)
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Internal, "the chunks of the job ended early")
}

/// A panic in a task is a broken invariant, not a reason to take the daemon down.
pub(in crate::export) fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the job panicked").because(e))
}

/// A hash as an earlier process left it; `None` when it left none that can be read.
fn resumed<D: Hash>(recorded: &DigestState) -> Option<(D, u64)> {
    Some((D::resume(&hex::decode(&recorded.state).ok()?)?, recorded.bytes))
}

#[cfg(test)]
mod tests {
    use sha2::Digest;

    use super::*;
    use crate::bucket::ObjectKey;
    use crate::export::multipart::log::UploadName;

    #[tokio::test]
    async fn a_hash_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.parts");
        let name = UploadName {
            bucket: "b".into(),
            key: ObjectKey::parse("k").unwrap(),
            id: "u".into(),
            part_size: 1 << 20,
            boot: None,
        };
        let content: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        let crc64nvme = format!("{:016x}", crate::bucket::Crc64::of(&content).value());
        let (sha256, md5) = (hex::encode(Sha256::digest(&content)), hex::encode(Md5::digest(&content)));
        let whole = Hashes { sha256, md5, crc64nvme: Some(crc64nvme) };
        let wanted = Wanted { crc64: true, chunks: None };
        UploadLog::create(path.clone(), name).unwrap();
        for (at, part) in content.chunks(100).enumerate() {
            let log = Arc::new(UploadLog::open(&path).unwrap().unwrap());
            let mut digests = Digests::start(Some(&log), wanted);
            assert!(digests.cover(at as u64 * 100) && !digests.cover(at as u64 * 100 + 1));
            digests.add(at as u64 * 100, &Bytes::copy_from_slice(part)).await.unwrap();
            digests.finish().await.unwrap();
        }
        let log = Arc::new(UploadLog::open(&path).unwrap().unwrap());
        assert_eq!(Digests::start(Some(&log), wanted).finish().await.unwrap(), whole);
        log.hashed(DigestName::Md5, DigestState { bytes: 5, state: "zz".into() });
        assert!(!Digests::start(Some(&log), wanted).cover(5));
    }
}
