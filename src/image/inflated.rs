//! Inflated units (clusters, grains, blocks) that are kept for readers of small pieces: one bound for all images.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use lru::LruCache;
use parking_lot::Mutex;

use crate::units::MIB;

/// Bytes of inflated units that are kept, of all images of the process together. What is being inflated comes on top:
/// a unit of at most 4 MiB and its compressed form for each thread that reads.
pub const INFLATED_MEMORY: u64 = 64 * MIB;

/// Bytes of windows that are kept, of all images of the process together: the 32 KiB before a place in a stream, from which
/// what follows can be inflated. Apart from the units, of which a few would take the place of all of an image's windows, and
/// then each read would begin at the start of the stream.
pub const WINDOW_MEMORY: u64 = 32 * MIB;

/// An image's number in this process, and what the image knows the unit by.
type UnitName = (u64, u64);

struct Kept {
    by_name: LruCache<UnitName, Arc<Vec<u8>>>,
    bytes: u64,
    limit: u64,
}

impl Kept {
    fn within(limit: u64) -> Mutex<Self> {
        Mutex::new(Self { by_name: LruCache::unbounded(), bytes: 0, limit })
    }
}

// Images are opened in many places and none of them knows of the others; the memory is the process's.
static UNITS: LazyLock<Mutex<Kept>> = LazyLock::new(|| Kept::within(INFLATED_MEMORY));
static WINDOWS: LazyLock<Mutex<Kept>> = LazyLock::new(|| Kept::within(WINDOW_MEMORY));

/// Bytes of inflated units and of windows that are kept now.
pub fn memory() -> u64 {
    UNITS.lock().bytes.saturating_add(WINDOWS.lock().bytes)
}

/// The inflated units of one image, or its windows.
pub(super) struct InflatedUnits {
    image: u64,
    kept: &'static LazyLock<Mutex<Kept>>,
}

impl InflatedUnits {
    pub(super) fn new() -> Self {
        Self::kept_in(&UNITS)
    }

    pub(super) fn windows() -> Self {
        Self::kept_in(&WINDOWS)
    }

    fn kept_in(kept: &'static LazyLock<Mutex<Kept>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { image: NEXT.fetch_add(1, Ordering::Relaxed), kept }
    }

    pub(super) fn get(&self, unit: u64) -> Option<Arc<Vec<u8>>> {
        self.kept.lock().by_name.get(&(self.image, unit)).cloned()
    }

    /// Keeps a unit; the ones of any image that were not read for longest go.
    pub(super) fn put(&self, unit: u64, bytes: Arc<Vec<u8>>) {
        let mut kept = self.kept.lock();
        kept.bytes = kept.bytes.saturating_add(bytes.len() as u64);
        if let Some(old) = kept.by_name.put((self.image, unit), bytes) {
            kept.bytes = kept.bytes.saturating_sub(old.len() as u64);
        }
        while kept.bytes > kept.limit {
            let Some((_, old)) = kept.by_name.pop_lru() else { break };
            kept.bytes = kept.bytes.saturating_sub(old.len() as u64);
        }
    }
}

impl Drop for InflatedUnits {
    fn drop(&mut self) {
        let mut kept = self.kept.lock();
        let names: Vec<_> =
            kept.by_name.iter().map(|(name, _)| *name).filter(|(image, _)| *image == self.image).collect();
        for name in names {
            if let Some(old) = kept.by_name.pop(&name) {
                kept.bytes = kept.bytes.saturating_sub(old.len() as u64);
            }
        }
    }
}
