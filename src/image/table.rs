//! Tables of entries in an image, read page by page when they are needed.

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::extent::is_zero;
use crate::image::{slice, steps};
use crate::storage::{Storage, check_range};
use crate::units::{FileOffset, KIB, Unit, memory_size};

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

    /// The entry at the start of `bytes`, which has all of it.
    fn read(self, bytes: &[u8]) -> u64 {
        let numbers = bytes.iter().take(memory_size(self.size())).map(|&byte| u64::from(byte));
        match self {
            Self::U32Be => numbers.fold(0, |entry, byte| entry << 8 | byte),
            Self::U32Le | Self::U64Le => numbers.rev().fold(0, |entry, byte| entry << 8 | byte),
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

/// Gets an entry, and how many in a row are the same.
pub(super) type EntryVisitor<'a> = dyn FnMut(u64, u64) -> Result<ControlFlow<()>> + 'a;

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
        check_range(&*storage, start, length)?;
        Ok(Self { storage, start, entries, entry, pages: Mutex::new(LruCache::new(PAGES_KEPT)) })
    }

    /// Where the table is.
    pub(super) fn start(&self) -> FileOffset {
        self.start
    }

    /// The entry at `index`, which is inside the table.
    pub(super) fn get(&self, index: u64) -> Result<u64> {
        steps::count(1);
        let place = index.saturating_mul(self.entry.size());
        let page = self.page(place / PAGE)?;
        let bytes = slice(&page, place % PAGE, self.entry.size())?;
        Ok(self.entry.read(bytes))
    }

    /// Tells `visit` the entries of a range, which lies inside the table, in order until it breaks off. What is a hole of
    /// the file is not read, and entries that are alike are one step.
    pub(super) fn visit(&self, entries: Range<u64>, visit: &mut EntryVisitor<'_>) -> Result<ControlFlow<()>> {
        let entry = Unit::of(self.entry.size());
        let mut zeros = KnownZeros::default();
        let (mut at, end) = (entry.start(entries.start), entry.start(entries.end));
        while at < end {
            let absent = entry.index(zeros.length_at(self.start + at).min(end.saturating_sub(at)));
            let flow = if absent > 0 {
                steps::count(1);
                at = at.saturating_add(entry.start(absent));
                visit(0, absent)?
            } else {
                let stop = end.min(at.saturating_add(Unit::of(PAGE).rest(at)));
                let page = self.page(at / PAGE)?;
                let bytes = slice(&page, at % PAGE, stop.saturating_sub(at))?;
                if is_zero(bytes) {
                    zeros.learn(&*self.storage, self.start + at)?;
                }
                at = stop;
                self.visit_runs(bytes, visit)?
            };
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Tells `visit` the entries that `bytes` are.
    fn visit_runs(&self, mut bytes: &[u8], visit: &mut EntryVisitor<'_>) -> Result<ControlFlow<()>> {
        let size = NonZeroUsize::new(memory_size(self.entry.size())).unwrap_or(NonZeroUsize::MIN);
        while let Some((first, rest)) = bytes.split_at_checked(size.get()) {
            // As far as each entry is the one before; the comparison ends where the run does.
            let others = match bytes.get(..rest.len()) == Some(rest) {
                true => rest.len() / size,
                false => rest.chunks_exact(size.get()).take_while(|entry| *entry == first).count(),
            };
            steps::count(1);
            if visit(self.entry.read(first), (others as u64).saturating_add(1))?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            bytes = rest.get(others.saturating_mul(size.get())..).unwrap_or_default();
        }
        Ok(ControlFlow::Continue(()))
    }

    fn page(&self, page: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(known) = self.pages.lock().get(&page) {
            return Ok(Arc::clone(known));
        }
        let start = page.saturating_mul(PAGE);
        let left = self.entries.saturating_mul(self.entry.size()).saturating_sub(start);
        let mut bytes = vec![0; memory_size(PAGE.min(left))];
        self.storage.read_exact_at(self.start + start, &mut bytes)?;
        let bytes = Arc::new(bytes);
        self.pages.lock().put(page, Arc::clone(&bytes));
        Ok(bytes)
    }
}

/// Refuses tables or blocks, each `length` units long, of which two overlap: a walk that goes through one part of the
/// file twice has no bound in the file's size. `what` they are and the bytes in a unit are for the message.
pub(super) fn check_disjoint(mut starts: Vec<u64>, length: u64, what: &str, unit: u64) -> Result<()> {
    starts.sort_unstable();
    let mut pairs = starts.iter().zip(starts.iter().skip(1));
    match pairs.find(|(start, next)| next.saturating_sub(**start) < length) {
        Some((_, next)) => {
            Err(Error::corrupt(format!("{what} is named twice, or two overlap"))
                .at(next.saturating_mul(unit)))
        }
        None => Ok(()),
    }
}

/// Where a walk knows that its file has zeros, so that it does not read tables that are holes.
#[derive(Default)]
pub(super) struct KnownZeros {
    zeros: Range<u64>,
    /// Where it knows that the file has no hole.
    data: Range<u64>,
}

impl KnownZeros {
    /// Whether `length` bytes at `at` are in a hole that is known.
    pub(super) fn contain(&self, at: FileOffset, length: u64) -> bool {
        self.length_at(at) >= length
    }

    /// Bytes of the known hole from `at` on; 0 when there is none.
    fn length_at(&self, at: FileOffset) -> u64 {
        if self.zeros.contains(&at.bytes()) { self.zeros.end.saturating_sub(at.bytes()) } else { 0 }
    }

    /// Notes that the bytes at `at`, which lies inside the file, turned out to be zeros: more may follow.
    pub(super) fn learn(&mut self, storage: &dyn Storage, at: FileOffset) -> Result<()> {
        if self.zeros.contains(&at.bytes()) || self.data.contains(&at.bytes()) {
            return Ok(());
        }
        let extent = storage.extent_at(at)?;
        let range = at.bytes()..at.bytes().saturating_add(extent.length);
        if extent.kind.is_data() {
            self.data = range
        } else {
            self.zeros = range
        }
        Ok(())
    }
}

/// Reads the tables of a walk in its order: neighbours at once, and holes not at all.
pub(super) struct TableWalk<'a> {
    storage: &'a dyn Storage,
    bytes: Vec<u8>,
    start: FileOffset,
    zeros: KnownZeros,
}

impl<'a> TableWalk<'a> {
    pub(super) fn new(storage: &'a dyn Storage) -> Self {
        Self { storage, bytes: Vec::new(), start: FileOffset(0), zeros: KnownZeros::default() }
    }

    /// The table of `length` bytes at `at`; `None` when all of it is zeros.
    pub(super) fn read(&mut self, at: FileOffset, length: u64) -> Result<Option<&[u8]>> {
        check_range(self.storage, at, length)?;
        if self.zeros.contain(at, length) {
            return Ok(None);
        }
        let end = self.start + self.bytes.len() as u64;
        if at < self.start || at + length > end {
            // More than one table is read only when the walk goes from one to its neighbour.
            let wanted = if at == end {
                (self.bytes.len() as u64).saturating_mul(2).clamp(length, PAGE.max(length))
            } else {
                length
            };
            let left = FileOffset(self.storage.file_size()) - at;
            self.bytes.resize(memory_size(wanted.min(left)), 0);
            self.start = at;
            self.storage.read_exact_at(at, &mut self.bytes)?;
        }
        let table = slice(&self.bytes, at - self.start, length)?;
        if is_zero(table) {
            self.zeros.learn(self.storage, at)?;
            return Ok(None);
        }
        Ok(Some(table))
    }
}
