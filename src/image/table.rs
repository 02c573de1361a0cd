//! Tables of 32-bit entries in an image, read page by page when they are needed.

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

/// A table in a file. Memory: at most 64 pages of 64 KiB.
pub(super) struct EntryTable {
    storage: Arc<dyn Storage>,
    start: FileOffset,
    entries: u64,
    big_endian: bool,
    pages: Mutex<LruCache<u64, Arc<Vec<u8>>>>,
}

impl EntryTable {
    /// The table of `entries` entries at `start`, all of which must lie inside the file.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        start: FileOffset,
        entries: u64,
        big_endian: bool,
    ) -> Result<Self> {
        let length =
            entries.checked_mul(4).ok_or_else(|| Error::corrupt("a table is too large").at(start))?;
        crate::storage::check_range(&*storage, start, length)?;
        Ok(Self { storage, start, entries, big_endian, pages: Mutex::new(LruCache::new(PAGES_KEPT)) })
    }

    /// The entry at `index`, which is inside the table.
    pub(super) fn get(&self, index: u64) -> Result<u32> {
        let place = index * 4;
        let page = self.page(place / PAGE)?;
        let at = (place % PAGE) as usize;
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&page[at..at + 4]);
        Ok(if self.big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    fn page(&self, page: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(known) = self.pages.lock().get(&page) {
            return Ok(Arc::clone(known));
        }
        let start = page * PAGE;
        let mut bytes = vec![0; PAGE.min(self.entries * 4 - start) as usize];
        self.storage.read_exact_at(self.start + start, &mut bytes)?;
        let bytes = Arc::new(bytes);
        self.pages.lock().put(page, Arc::clone(&bytes));
        Ok(bytes)
    }
}
