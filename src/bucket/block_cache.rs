//! Blocks of objects that were read or are read ahead: one bounded cache for all open files of all buckets.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use super::key::ObjectKey;
use crate::error::Result;
use crate::units::MIB;

/// Bytes that are kept or dropped at once: little enough that a read of one sector somewhere does not cost much.
pub(super) const BLOCK: u64 = MIB;

/// A block, whose bytes one of those who want it fetches.
#[derive(Debug, Default)]
pub(super) struct BlockCell {
    bytes: OnceLock<Bytes>,
    /// Held by who fetches it.
    flight: Arc<tokio::sync::Mutex<()>>,
}

/// A block that somebody has begun to fetch. When this is dropped without bytes, the next who wants it fetches it.
pub(super) struct InFlight {
    cell: Arc<BlockCell>,
    _flight: OwnedMutexGuard<()>,
}

impl BlockCell {
    /// The bytes, if they are there.
    pub(super) fn get(&self) -> Option<Bytes> {
        self.bytes.get().cloned()
    }

    /// The bytes, waited for where somebody fetches them, else fetched.
    pub(super) async fn get_or_fetch(&self, fetch: impl Future<Output = Result<Bytes>>) -> Result<Bytes> {
        let _flight = self.flight.lock().await;
        if let Some(bytes) = self.get() {
            return Ok(bytes);
        }
        let bytes = fetch.await?;
        Ok(self.bytes.get_or_init(|| bytes).clone())
    }
}

impl InFlight {
    /// The block has come.
    pub(super) fn arrived(self, bytes: Bytes) {
        let _ = self.cell.bytes.set(bytes);
    }
}

/// Blocks of objects by content and number, the least recently used of which go first.
///
/// Memory: the bytes it was made for; readers that wait for a block while others push it out hold it as long.
#[derive(Debug)]
pub struct BlockCache {
    blocks: Mutex<LruCache<(ContentId, u64), Block>>,
    /// Rights to keep blocks that nobody has asked for yet: not so many that they push out what is read.
    ahead: Arc<Semaphore>,
}

/// One content of one object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ContentId(Arc<str>);

#[derive(Debug)]
struct Block {
    cell: Arc<BlockCell>,
    /// The right to keep it although nobody has asked for it yet.
    unread: Option<OwnedSemaphorePermit>,
}

/// A number that nobody else has.
pub(super) fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl ContentId {
    /// What an object has under an entity tag: the same for all who open it in this bucket.
    pub(super) fn tagged(bucket: u64, key: &ObjectKey, etag: &str) -> Self {
        // No key has a line feed.
        Self(format!("{bucket}\n{key}\n{etag}").into())
    }

    /// A content that nobody else shares, because nothing tells whether it is the same.
    pub(super) fn unique() -> Self {
        Self(next_number().to_string().into())
    }
}

impl BlockCache {
    /// A cache of so many bytes, in blocks of 1 MiB; of two blocks at least.
    pub fn new(bytes: u64) -> Self {
        let blocks = usize::try_from(bytes / BLOCK).unwrap_or(usize::MAX).clamp(2, Semaphore::MAX_PERMITS);
        let capacity = NonZeroUsize::new(blocks).expect("it is two at least");
        Self { blocks: Mutex::new(LruCache::sparse(capacity)), ahead: Arc::new(Semaphore::new(blocks / 2)) }
    }

    /// The block that is to be read now.
    pub(super) fn wanted(&self, content: &ContentId, number: u64) -> Arc<BlockCell> {
        let id = (content.clone(), number);
        let mut blocks = self.blocks.lock();
        if let Some(block) = blocks.get_mut(&id) {
            block.unread = None;
            return Arc::clone(&block.cell);
        }
        let cell = Arc::<BlockCell>::default();
        blocks.put(id, Block { cell: Arc::clone(&cell), unread: None });
        cell
    }

    /// A block that will be read, to be fetched by the caller: `None` where it is there already or has no room.
    pub(super) fn ahead(&self, content: &ContentId, number: u64) -> Option<InFlight> {
        let id = (content.clone(), number);
        let mut blocks = self.blocks.lock();
        if blocks.contains(&id) {
            return None;
        }
        let unread = Some(Arc::clone(&self.ahead).try_acquire_owned().ok()?);
        let cell = Arc::<BlockCell>::default();
        let flight = Arc::clone(&cell.flight).try_lock_owned().expect("nobody else has the cell yet");
        blocks.put(id, Block { cell: Arc::clone(&cell), unread });
        Some(InFlight { cell, _flight: flight })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    #[test]
    fn blocks_are_shared_by_content_and_the_cache_is_bounded() {
        let cache = BlockCache::new(8 * BLOCK);
        let key = ObjectKey::parse("a").unwrap();
        let (one, other) = (ContentId::tagged(1, &key, "e"), ContentId::tagged(1, &key, "f"));
        cache.ahead(&one, 0).unwrap().arrived(Bytes::from_static(b"x"));
        assert!(cache.wanted(&ContentId::tagged(1, &key, "e"), 0).get().is_some());
        assert!(cache.wanted(&other, 0).get().is_none());
        assert!(cache.wanted(&ContentId::tagged(2, &key, "e"), 0).get().is_none());
        assert_ne!(ContentId::unique(), ContentId::unique());
        (0..100).for_each(|number| drop(cache.wanted(&other, number)));
        assert!(cache.wanted(&one, 0).get().is_none());
        assert!(cache.blocks.lock().len() <= 8);
    }

    #[test]
    fn half_of_the_cache_may_be_read_ahead_and_what_was_read_makes_room() {
        let cache = BlockCache::new(8 * BLOCK);
        let content = ContentId::unique();
        let ahead: Vec<_> = (1..9).filter(|&number| cache.ahead(&content, number).is_some()).collect();
        assert_eq!(ahead, [1, 2, 3, 4]);
        assert!(cache.ahead(&content, 1).is_none(), "it is there");
        drop(cache.wanted(&content, 1));
        assert!(cache.ahead(&content, 5).is_some());
    }

    #[tokio::test]
    async fn a_block_is_fetched_once_and_again_when_that_failed() {
        let cache = BlockCache::new(8 * BLOCK);
        let content = ContentId::unique();
        let never = || async { panic!("fetched twice") };
        let arriving = cache.ahead(&content, 0).unwrap();
        let cell = cache.wanted(&content, 0);
        let waiting = cell.get_or_fetch(never());
        arriving.arrived(Bytes::from_static(b"a"));
        assert_eq!(waiting.await.unwrap(), "a");
        drop(cache.ahead(&content, 1).unwrap());
        let cell = cache.wanted(&content, 1);
        let failed = cell.get_or_fetch(async { Err(Error::new(ErrorKind::Io, "no")) });
        failed.await.unwrap_err();
        assert_eq!(cell.get_or_fetch(async { Ok(Bytes::from_static(b"b")) }).await.unwrap(), "b");
        assert_eq!(cell.get_or_fetch(never()).await.unwrap(), "b");
    }
}
