//! An object as a file: positional reads in blocks, several of which are read ahead at once while a program reads on.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::block_cache::{BLOCK, BlockCell, ContentId};
use super::{Bucket, ObjectMeta};
use crate::error::Result;
use crate::extent::{Extent, ExtentKind};
use crate::units::FileOffset;
use crate::vfile::{VirtualFile, readable};

/// Blocks that are read ahead at most. It begins with one and doubles with each block that is read on.
const LARGEST_AHEAD: u64 = 16;

/// How far behind the newest block a read still counts as reading on: a program's parallel requests arrive in any order.
const SLACK: u64 = 3;

/// Places of a file at which somebody reads on: several programs, or data between an image's tables.
const STREAMS: usize = 8;

/// One content of an object, known by its tag. Its blocks are in the bucket's [`BlockCache`](super::BlockCache).
///
/// Reads block on the runtime and so must not be made on its own worker threads.
pub struct ObjectFile {
    bucket: Bucket,
    meta: ObjectMeta,
    content: ContentId,
    runtime: Handle,
    streams: Mutex<Streams>,
}

/// Where a file is read on, the least recently read place first.
#[derive(Default)]
struct Streams(Vec<Stream>);

struct Stream {
    /// The furthest block that was read.
    last: u64,
    ahead: u64,
}

impl ObjectFile {
    /// The object that `meta` was asked of.
    pub fn new(bucket: Bucket, meta: ObjectMeta, runtime: Handle) -> Self {
        let content = match &meta.etag {
            Some(etag) if bucket.is_remote() => ContentId::tagged(bucket.inner.number, &meta.key, etag),
            // A local file's tag is its time, which may not tell two contents of one moment apart.
            _ => ContentId::unique(),
        };
        Self { bucket, meta, content, runtime, streams: Mutex::default() }
    }

    fn block(&self, number: u64) -> Result<Bytes> {
        let ahead = self.streams.lock().read_on(number);
        let cache = self.bucket.blocks();
        let cell = cache.wanted(&self.content, number);
        let last = self.meta.object_size.saturating_sub(1) / BLOCK;
        for next in number + 1..=last.min(number + ahead) {
            let Some(cell) = cache.ahead(&self.content, next) else { continue };
            let fetch = fetch(self.bucket.clone(), self.meta.clone(), next, cell);
            // A failure ahead of the reader is met again, and reported, when the reader gets there.
            self.runtime.spawn(async move { fetch.await.map(drop) });
        }
        match cell.get() {
            Some(bytes) => Ok(bytes.clone()),
            None => self.runtime.block_on(fetch(
                self.bucket.clone(),
                self.meta.clone(),
                number,
                Arc::clone(&cell),
            )),
        }
    }
}

impl Streams {
    /// Notes a read; returns how many blocks are to be there after it.
    fn read_on(&mut self, number: u64) -> u64 {
        let goes_on = |stream: &Stream| number <= stream.last + 1 && number + SLACK >= stream.last;
        let mut stream = match self.0.iter().rposition(goes_on) {
            Some(known) => self.0.remove(known),
            None if number == 0 => Stream { last: 0, ahead: 1 },
            None => Stream { last: number, ahead: 0 },
        };
        if number == stream.last + 1 {
            stream = Stream { last: number, ahead: (stream.ahead * 2).clamp(1, LARGEST_AHEAD) };
        }
        let ahead = stream.ahead;
        self.0.push(stream);
        if self.0.len() > STREAMS {
            self.0.remove(0);
        }
        ahead
    }
}

async fn fetch(bucket: Bucket, meta: ObjectMeta, block: u64, cell: BlockCell) -> Result<Bytes> {
    let range = block * BLOCK..((block + 1) * BLOCK).min(meta.object_size);
    cell.get_or_try_init(|| bucket.read(&meta.key, range, meta.etag.as_deref())).await.cloned()
}

impl VirtualFile for ObjectFile {
    fn file_size(&self) -> u64 {
        self.meta.object_size
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let length = readable(self.file_size(), at, buf.len());
        let mut done = 0;
        while done < length {
            let here = at.bytes() + done as u64;
            let bytes = self.block(here / BLOCK)?;
            let start = (here % BLOCK) as usize;
            let piece = (bytes.len() - start).min(length - done);
            buf[done..done + piece].copy_from_slice(&bytes[start..start + piece]);
            done += piece;
        }
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
        let mut streams = Streams::default();
        let ahead: Vec<_> = [0, 0, 1, 2, 1, 3, 4, 5, 6].map(|number| streams.read_on(number)).to_vec();
        assert_eq!(ahead, [1, 1, 2, 4, 4, 8, 16, 16, 16]);
        assert_eq!([100, 5000, 5001].map(|number| streams.read_on(number)), [0, 0, 1]);
        // What was read between does not end the first.
        assert_eq!([7, 5002, 8, 101].map(|number| streams.read_on(number)), [16, 2, 16, 1]);
    }
}
