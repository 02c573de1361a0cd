//! Inflated units (clusters, grains, blocks) that are kept for readers of small pieces: one bound for all images.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use lru::LruCache;
use parking_lot::Mutex;

use crate::units::MIB;

/// Bytes of inflated units that are kept, of all images of the process together. What is being inflated comes on top:
/// a unit of at most 4 MiB and its compressed form for each thread that reads.
pub const INFLATED_MEMORY: u64 = 64 * MIB;

/// An image's number in this process, and what the image knows the unit by.
type UnitName = (u64, u64);

struct Kept {
    by_name: LruCache<UnitName, Arc<Vec<u8>>>,
    bytes: u64,
}

// Images are opened in many places and none of them knows of the others; the memory is the process's.
static KEPT: LazyLock<Mutex<Kept>> =
    LazyLock::new(|| Mutex::new(Kept { by_name: LruCache::unbounded(), bytes: 0 }));

/// Bytes of inflated units that are kept now.
pub fn memory() -> u64 {
    KEPT.lock().bytes
}

/// The inflated units of one image.
pub(super) struct InflatedUnits {
    image: u64,
}

impl InflatedUnits {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { image: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    pub(super) fn get(&self, unit: u64) -> Option<Arc<Vec<u8>>> {
        KEPT.lock().by_name.get(&(self.image, unit)).cloned()
    }

    /// Keeps a unit; the ones of any image that were not read for longest go.
    pub(super) fn put(&self, unit: u64, bytes: Arc<Vec<u8>>) {
        let mut kept = KEPT.lock();
        kept.bytes += bytes.len() as u64;
        if let Some(old) = kept.by_name.put((self.image, unit), bytes) {
            kept.bytes -= old.len() as u64;
        }
        while kept.bytes > INFLATED_MEMORY {
            let Some((_, old)) = kept.by_name.pop_lru() else { break };
            kept.bytes -= old.len() as u64;
        }
    }
}

impl Drop for InflatedUnits {
    fn drop(&mut self) {
        let mut kept = KEPT.lock();
        let names: Vec<_> =
            kept.by_name.iter().map(|(name, _)| *name).filter(|(image, _)| *image == self.image).collect();
        for name in names {
            if let Some(old) = kept.by_name.pop(&name) {
                kept.bytes -= old.len() as u64;
            }
        }
    }
}
