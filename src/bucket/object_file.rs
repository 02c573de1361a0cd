//! An object as a file: positional reads in blocks, several of which are read ahead at once while a program reads on.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::block_cache::{BLOCK, ContentId, InFlight};
use super::{Bucket, ObjectMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::units::FileOffset;
use crate::vfile::{VirtualFile, readable};

/// Blocks that are read ahead at most. It begins with one and doubles with each block that is read on.
const LARGEST_AHEAD: u64 = 32;

/// Blocks that one request asks for at most, where somebody reads on: as many bytes as a part of an upload has.
const WINDOW: u64 = 8;

/// How far from the newest block a read still counts as reading on: a program's parallel requests arrive in any order,
/// and programs that write an image with several threads leave its clusters in nearly any.
const GAP: u64 = 4;

/// Places of a file at which somebody reads on: several programs, or data between an image's tables.
const PLACES: usize = 8;

/// One content of an object, known by its tag. Its blocks are in the bucket's [`BlockCache`](super::BlockCache).
///
/// Reads block on the runtime and so must not be made on its own worker threads.
pub struct ObjectFile {
    bucket: Bucket,
    meta: ObjectMeta,
    content: ContentId,
    runtime: Handle,
    places: Mutex<ReadAhead>,
}

/// Where a file is read on, the least recently read place first.
#[derive(Default)]
struct ReadAhead(Vec<Stream>);

struct Stream {
    /// The furthest block that was read.
    last: u64,
    ahead: u64,
    /// The first block that was not asked for.
    next: u64,
}

impl ObjectFile {
    /// The object that `meta` was asked of.
    pub fn new(bucket: Bucket, meta: ObjectMeta, runtime: Handle) -> Self {
        let content = match &meta.etag {
            Some(etag) if bucket.abilities().is_remote => {
                ContentId::tagged(bucket.inner.number, &meta.key, etag)
            }
            // A local file's tag is its time, which may not tell two contents of one moment apart.
            _ => ContentId::unique(),
        };
        Self { bucket, meta, content, runtime, places: Mutex::default() }
    }

    /// The entity tag of the content.
    pub fn etag(&self) -> Option<&str> {
        self.meta.etag.as_deref()
    }

    /// Reads up to `length` bytes: fewer only at the end. For tasks: no thread waits.
    ///
    /// # Errors
    /// [`SourceChanged`](ErrorKind::SourceChanged) when the object is another one or gone.
    pub async fn read(&self, at: FileOffset, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; readable(self.file_size(), at, length)];
        self.fill(at, &mut bytes).await.map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::SourceChanged, "the object is gone").because(e),
            _ => e,
        })?;
        Ok(bytes)
    }

    async fn fill(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let here = at.bytes() + done as u64;
            let bytes = self.block(here / BLOCK).await?;
            let start = (here % BLOCK) as usize;
            let piece = (bytes.len() - start).min(buf.len() - done);
            buf[done..done + piece].copy_from_slice(&bytes[start..start + piece]);
            done += piece;
        }
        Ok(())
    }

    async fn block(&self, number: u64) -> Result<Bytes> {
        let ahead = self.places.lock().next(number);
        let cell = self.bucket.inner.limits.blocks.wanted(&self.content, number);
        self.read_ahead(ahead);
        match cell.get() {
            Some(bytes) => Ok(bytes),
            None => {
                let range = self.bytes_of(number, 1);
                let fetch = self.bucket.read(&self.meta.key, range, self.meta.etag.as_deref());
                cell.get_or_fetch(fetch).await
            }
        }
    }

    /// Begins to fetch those of these blocks that nobody has.
    fn read_ahead(&self, blocks: Range<u64>) {
        let end = blocks.end.min(self.meta.object_size.div_ceil(BLOCK));
        let mut first = blocks.start;
        while first < end {
            let run = first..end.min(first + WINDOW);
            let arriving: VecDeque<_> = run
                .map_while(|number| self.bucket.inner.limits.blocks.ahead(&self.content, number))
                .collect();
            let count = arriving.len() as u64;
            if count > 0 {
                let (bucket, meta) = (self.bucket.clone(), self.meta.clone());
                // A failure ahead of the reader is met again, and reported, when the reader gets there.
                self.runtime.spawn(fetch_run(bucket, meta, self.bytes_of(first, count), arriving));
            }
            first += count.max(1);
        }
    }

    /// The bytes of so many blocks.
    fn bytes_of(&self, first: u64, count: u64) -> Range<u64> {
        first * BLOCK..((first + count) * BLOCK).min(self.meta.object_size)
    }
}

impl ReadAhead {
    /// Notes a read; returns the blocks that are to be asked for besides.
    fn next(&mut self, number: u64) -> Range<u64> {
        let goes_on = |s: &Stream| number + GAP.max(s.ahead) >= s.last && number <= s.last + GAP.max(s.ahead);
        let known = self.0.iter().rposition(goes_on).map(|at| self.0.remove(at));
        let is_new = known.is_none();
        // Who begins at the start will read on.
        let begun = || Stream { last: number, ahead: u64::from(number == 0), next: number + 1 };
        let mut stream = known.unwrap_or_else(begun);
        let grows = is_new || number > stream.last && stream.ahead < LARGEST_AHEAD;
        if number > stream.last {
            stream.last = number;
            stream.ahead = (stream.ahead * 2).clamp(1, LARGEST_AHEAD);
        }
        let first = stream.next.max(number + 1);
        let missing = (stream.last + 1 + stream.ahead).saturating_sub(first);
        // Whole runs once there is one, so that not every block is a request.
        let asked = if missing < WINDOW && grows { missing } else { missing / WINDOW * WINDOW };
        stream.next = stream.next.max(first + asked);
        self.0.push(stream);
        if self.0.len() > PLACES {
            self.0.remove(0);
        }
        first..first + asked
    }
}

/// Fetches blocks that follow each other by one request, each of which is there as soon as it has come.
async fn fetch_run(bucket: Bucket, meta: ObjectMeta, range: Range<u64>, mut arriving: VecDeque<InFlight>) {
    let take = |bytes| {
        if let Some(block) = arriving.pop_front() {
            block.arrived(bytes);
        }
    };
    let _ = bucket.read_pieces(&meta.key, range, meta.etag.as_deref(), BLOCK as usize, take).await;
}

/// Waits for a request to a store, on a thread that is there for such work: one of a lane, or the program's own.
///
/// Readers and listings of catalogs are synchronous, and this is the only place where they wait. Must not be called on the
/// runtime's worker threads, where it panics.
pub fn wait<T>(runtime: &Handle, request: impl Future<Output = T>) -> T {
    runtime.block_on(request)
}

impl VirtualFile for ObjectFile {
    fn file_size(&self) -> u64 {
        self.meta.object_size
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let length = readable(self.file_size(), at, buf.len());
        wait(&self.runtime, self.fill(at, &mut buf[..length]))?;
        Ok(length)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.file_size() - at.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_on_reads_ahead_and_jumping_does_not() {
        let mut places = ReadAhead::default();
        let asked: Vec<_> = (0..6).map(|number| places.next(number)).collect();
        assert_eq!(asked, [1..2, 2..4, 4..7, 7..12, 12..20, 20..36]);
        // From then on by whole runs, each block once.
        let mut next = 36;
        for number in 6..100 {
            let asked = places.next(number);
            assert!(
                asked.is_empty() || asked.start == next && asked.end == next + WINDOW,
                "{number}: {asked:?}"
            );
            next = next.max(asked.end);
            assert!(next > number && next <= number + 1 + LARGEST_AHEAD);
        }
        // What was read again, and what was read between, does not end it.
        let none = |range: Range<u64>| assert!(range.is_empty(), "{range:?}");
        [97, 5000, 90_000, 99, 70_000].into_iter().for_each(|number| none(places.next(number)));
        assert_eq!(places.next(5001), 5002..5003);
        assert!((100..116).any(|number| !places.next(number).is_empty()));
    }
}
