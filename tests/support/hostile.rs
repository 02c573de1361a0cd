//! Damaged images: opened and read from memory, they give content or an error and nothing else.

use std::sync::Arc;

use freightfs::error::Result;
use freightfs::format::ImageFormat;
use freightfs::image::{ClosedGate, DiskImage, ReferenceGate, open_image};
use freightfs::storage::{MemoryStorage, Storage};
use freightfs::units::VirtualOffset;

use super::images::Random;

/// Opens an image that may refer to nothing.
pub fn open(format: ImageFormat, storage: Arc<dyn Storage>) -> Result<Arc<dyn DiskImage>> {
    let gate: Arc<dyn ReferenceGate> = Arc::new(ClosedGate);
    open_image(format, storage, &gate, 0)
}

/// Reads an image whose bytes are in memory: its start, or the error.
pub fn read_all(format: ImageFormat, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let image = open(format, Arc::new(MemoryStorage::new("image", bytes)))?;
    // A damaged size may be huge and sparse: the start and the end are read.
    let size = image.virtual_size();
    let mut content = vec![0; size.min(1 << 20) as usize];
    image.read_at(VirtualOffset(0), &mut content)?;
    let mut end = vec![0; size.min(1 << 16) as usize];
    image.read_at(VirtualOffset(size - end.len() as u64), &mut end)?;
    let mut at = VirtualOffset(0);
    for _ in 0..1000 {
        if at.bytes() >= size {
            break;
        }
        let extent = image.extent_at(at)?;
        assert!(extent.length > 0 && at.bytes() + extent.length <= size);
        at += extent.length;
    }
    Ok(content)
}

/// Damages `image` in many ways, mostly where its tables are; nothing may panic.
pub fn damage(format: ImageFormat, image: &[u8], tables: usize) {
    let mut random = Random(6);
    let tables = image.len().min(tables);
    for at in 0..tables {
        // All of the first header, then a sample.
        if at > 600 && random.below(40) != 0 {
            continue;
        }
        let mut damaged = image.to_vec();
        damaged[at] ^= 1 << random.below(8);
        let _ = read_all(format, damaged);
    }
    for _ in 0..1000 {
        let mut damaged = image.to_vec();
        for _ in 0..1 + random.below(8) {
            damaged[random.below(tables as u64) as usize] = random.next() as u8;
        }
        let _ = read_all(format, damaged);
    }
}
