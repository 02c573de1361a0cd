//! Blocks of objects that were read or are read ahead: one bounded cache for all open files of all buckets.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::ObjectKey;
use crate::units::MIB;

/// Bytes that are fetched at once: little enough that a read of one sector somewhere does not cost much.
pub(super) const BLOCK: u64 = MIB;

/// A block's bytes, once somebody has fetched them.
pub(super) type BlockCell = Arc<OnceCell<Bytes>>;

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
    cell: BlockCell,
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
        Self(format!("{bucket} {key} {etag}").into())
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
    pub(super) fn wanted(&self, content: &ContentId, number: u64) -> BlockCell {
        let id = (content.clone(), number);
        let mut blocks = self.blocks.lock();
        if let Some(block) = blocks.get_mut(&id) {
            block.unread = None;
            return Arc::clone(&block.cell);
        }
        let cell = BlockCell::default();
        blocks.put(id, Block { cell: Arc::clone(&cell), unread: None });
        cell
    }

    /// A block that will be read: `None` where it is there already or has no room.
    pub(super) fn ahead(&self, content: &ContentId, number: u64) -> Option<BlockCell> {
        let id = (content.clone(), number);
        let mut blocks = self.blocks.lock();
        if blocks.contains(&id) {
            return None;
        }
        let unread = Some(Arc::clone(&self.ahead).try_acquire_owned().ok()?);
        let cell = BlockCell::default();
        blocks.put(id, Block { cell: Arc::clone(&cell), unread });
        Some(cell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_shared_by_content_and_the_cache_is_bounded() {
        let cache = BlockCache::new(8 * BLOCK);
        let key = ObjectKey::parse("a").unwrap();
        let (one, other) = (ContentId::tagged(1, &key, "e"), ContentId::tagged(1, &key, "f"));
        cache.wanted(&one, 0).set(Bytes::from_static(b"x")).unwrap();
        assert!(cache.wanted(&ContentId::tagged(1, &key, "e"), 0).initialized());
        assert!(!cache.wanted(&other, 0).initialized());
        assert!(!cache.wanted(&ContentId::tagged(2, &key, "e"), 0).initialized());
        assert_ne!(ContentId::unique(), ContentId::unique());
        (0..100).for_each(|number| drop(cache.wanted(&other, number)));
        assert!(!cache.wanted(&one, 0).initialized());
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
}
