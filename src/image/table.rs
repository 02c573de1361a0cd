//! Tables of entries in an image, read page by page when they are needed.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::units::{FileOffset, KIB};

/// Bytes of a page.
const PAGE: u64 = 64 * KIB;

/// Pages that are kept: 4 MiB of table.
const PAGES_KEPT: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not 0");

/// What an entry is.
#[derive(Clone, Copy)]
pub(super) enum Entry {
    /// 32 bits, little-endian.
    U32Le,
    /// 32 bits, big-endian.
    U32Be,
    /// 64 bits, little-endian.
    U64Le,
}

impl Entry {
    fn size(self) -> u64 {
        match self {
            Self::U32Le | Self::U32Be => 4,
            Self::U64Le => 8,
        }
    }

    /// The entry at the start of `bytes`.
    fn read(self, bytes: &[u8]) -> u64 {
        let mut array = [0; 8];
        let length = self.size() as usize;
        array[..length].copy_from_slice(&bytes[..length]);
        match self {
            Self::U32Le | Self::U64Le => u64::from_le_bytes(array),
            Self::U32Be => u64::from_be_bytes(array) >> 32,
        }
    }
}

/// A table in a file. Memory: at most 64 pages of 64 KiB.
pub(super) struct EntryTable {
    storage: Arc<dyn Storage>,
    start: FileOffset,
    entries: u64,
    entry: Entry,
    pages: Mutex<LruCache<u64, Arc<Vec<u8>>>>,
}

impl EntryTable {
    /// The table of `entries` entries at `start`, all of which must lie inside the file.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        start: FileOffset,
        entries: u64,
        entry: Entry,
    ) -> Result<Self> {
        let length = entries
            .checked_mul(entry.size())
            .ok_or_else(|| Error::corrupt("a table is too large").at(start))?;
        crate::storage::check_range(&*storage, start, length)?;
        Ok(Self { storage, start, entries, entry, pages: Mutex::new(LruCache::new(PAGES_KEPT)) })
    }

    /// The entry at `index`, which is inside the table.
    pub(super) fn get(&self, index: u64) -> Result<u64> {
        let place = index * self.entry.size();
        let page = self.page(place / PAGE)?;
        Ok(self.entry.read(&page[(place % PAGE) as usize..]))
    }

    fn page(&self, page: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(known) = self.pages.lock().get(&page) {
            return Ok(Arc::clone(known));
        }
        let start = page * PAGE;
        let mut bytes = vec![0; PAGE.min(self.entries * self.entry.size() - start) as usize];
        self.storage.read_exact_at(self.start + start, &mut bytes)?;
        let bytes = Arc::new(bytes);
        self.pages.lock().put(page, Arc::clone(&bytes));
        Ok(bytes)
    }
}
