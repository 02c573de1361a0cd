//! An object as a file: positional reads in blocks, with one block read ahead.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::OnceCell;

use super::{Bucket, ObjectMeta};
use crate::error::Result;
use crate::extent::{Extent, ExtentKind};
use crate::units::{FileOffset, MIB};
use crate::vfile::{VirtualFile, readable};

/// Bytes that are fetched at once.
const BLOCK: u64 = 4 * MIB;

/// Blocks that an open file keeps.
const BLOCKS_KEPT: usize = 4;

/// One content of an object, known by its tag. Memory: at most 4 blocks of 4 MiB.
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
    kept: VecDeque<(u64, Arc<OnceCell<Bytes>>)>,
    last: Option<u64>,
}

impl ObjectFile {
    /// The object that `meta` was asked of.
    pub fn new(bucket: Bucket, meta: ObjectMeta, runtime: Handle) -> Self {
        Self { bucket, meta, runtime, blocks: Mutex::default() }
    }

    /// The block's cell, new or kept; the second value says whether the block before it was read last.
    fn cell(&self, block: u64, is_read: bool) -> (Arc<OnceCell<Bytes>>, bool) {
        let mut blocks = self.blocks.lock();
        let follows = blocks.last.is_some_and(|last| last + 1 == block || last == block) || block == 0;
        if is_read {
            blocks.last = Some(block);
        }
        if let Some((_, cell)) = blocks.kept.iter().find(|(b, _)| *b == block) {
            return (Arc::clone(cell), follows);
        }
        let cell = Arc::new(OnceCell::new());
        blocks.kept.push_back((block, Arc::clone(&cell)));
        if blocks.kept.len() > BLOCKS_KEPT {
            blocks.kept.pop_front();
        }
        (cell, follows)
    }

    fn block(&self, block: u64) -> Result<Bytes> {
        let (cell, follows) = self.cell(block, true);
        let next = block + 1;
        if follows && next * BLOCK < self.meta.object_size {
            let (ahead, _) = self.cell(next, false);
            let fetch = fetch(self.bucket.clone(), self.meta.clone(), next, ahead);
            // A failure ahead of the reader is met again, and reported, when the reader gets there.
            self.runtime.spawn(async move { fetch.await.map(drop) });
        }
        self.runtime.block_on(fetch(self.bucket.clone(), self.meta.clone(), block, cell))
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
