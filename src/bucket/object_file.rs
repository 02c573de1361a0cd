//! An object as a file: positional reads in blocks, several of which are read ahead at once while a program reads on.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, OwnedSemaphorePermit};

use super::{Bucket, ObjectMeta};
use crate::error::Result;
use crate::extent::{Extent, ExtentKind};
use crate::units::{FileOffset, MIB};
use crate::vfile::{VirtualFile, readable};

/// Bytes that are fetched at once: little enough that a read of one sector somewhere does not cost much.
const BLOCK: u64 = MIB;

/// Blocks that are read ahead at most. It begins with one and doubles with each block that is read on.
const LARGEST_AHEAD: u64 = 16;

/// Blocks that an open file keeps: those ahead, and some behind for readers that are not quite in order.
const BLOCKS_KEPT: usize = LARGEST_AHEAD as usize + 4;

/// How far behind the newest block a read still counts as reading on: a program's parallel requests arrive in any order.
const SLACK: u64 = 3;

/// Blocks read ahead that all open files of a bucket keep together, see [`Bucket`].
pub(super) const AHEAD_BLOCKS: usize = 256;

/// One content of an object, known by its tag. Memory: 20 blocks of 1 MiB at most, and 256 blocks read ahead over all
/// open files of the bucket.
///
/// Reads block on the runtime and so must not be made on its own worker threads.
pub struct ObjectFile {
    bucket: Bucket,
    meta: ObjectMeta,
    runtime: Handle,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    kept: VecDeque<Block>,
    /// The furthest block that was read on.
    last: Option<u64>,
    ahead: u64,
}

struct Block {
    number: u64,
    bytes: Arc<OnceCell<Bytes>>,
    /// The right to keep it although nobody has asked for it yet.
    _permit: Option<OwnedSemaphorePermit>,
}

impl ObjectFile {
    /// The object that `meta` was asked of.
    pub fn new(bucket: Bucket, meta: ObjectMeta, runtime: Handle) -> Self {
        Self { bucket, meta, runtime, blocks: Mutex::default() }
    }

    fn block(&self, number: u64) -> Result<Bytes> {
        let (cell, ahead) = {
            let mut blocks = self.blocks.lock();
            let ahead = blocks.read_on(number);
            let last = self.meta.object_size.saturating_sub(1) / BLOCK;
            let cell = blocks.find(number).unwrap_or_else(|| blocks.keep(number, None));
            let missing: Vec<_> =
                (number + 1..=last.min(number + ahead)).filter(|&next| blocks.find(next).is_none()).collect();
            let ahead = missing
                .into_iter()
                .map_while(|next| Some((next, blocks.keep(next, Some(self.bucket.ahead_permit()?)))));
            (cell, ahead.collect::<Vec<_>>())
        };
        for (next, cell) in ahead {
            let fetch = fetch(self.bucket.clone(), self.meta.clone(), next, cell);
            // A failure ahead of the reader is met again, and reported, when the reader gets there.
            self.runtime.spawn(async move { fetch.await.map(drop) });
        }
        self.runtime.block_on(fetch(self.bucket.clone(), self.meta.clone(), number, cell))
    }
}

impl Blocks {
    /// Notes a read; returns how many blocks are to be there after it.
    fn read_on(&mut self, number: u64) -> u64 {
        match self.last {
            None if number == 0 => self.ahead = 1,
            Some(last) if number == last + 1 => self.ahead = (self.ahead * 2).clamp(1, LARGEST_AHEAD),
            // The same block again, or one that parallel requests passed.
            Some(last) if number <= last && number + SLACK >= last => return self.ahead,
            _ => self.ahead = 0,
        }
        self.last = Some(number);
        self.ahead
    }

    fn find(&self, number: u64) -> Option<Arc<OnceCell<Bytes>>> {
        self.kept.iter().find(|block| block.number == number).map(|block| Arc::clone(&block.bytes))
    }

    fn keep(&mut self, number: u64, permit: Option<OwnedSemaphorePermit>) -> Arc<OnceCell<Bytes>> {
        let bytes = Arc::new(OnceCell::new());
        self.kept.push_back(Block { number, bytes: Arc::clone(&bytes), _permit: permit });
        if self.kept.len() > BLOCKS_KEPT {
            self.kept.pop_front();
        }
        bytes
    }
}

async fn fetch(bucket: Bucket, meta: ObjectMeta, block: u64, cell: Arc<OnceCell<Bytes>>) -> Result<Bytes> {
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
        let mut blocks = Blocks::default();
        let ahead: Vec<_> = [0, 0, 1, 2, 1, 3, 4, 5, 6].map(|number| blocks.read_on(number)).to_vec();
        assert_eq!(ahead, [1, 1, 2, 4, 4, 8, 16, 16, 16]);
        assert_eq!([100, 5000, 5001].map(|number| blocks.read_on(number)), [0, 0, 1]);
    }
}
