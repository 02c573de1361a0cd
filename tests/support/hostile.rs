//! Damaged images: opened and read from memory, they give content or an error and nothing else.

use std::ops::Range;
use std::sync::Arc;

use freightfs::error::Result;
use freightfs::format::ImageFormat;
use freightfs::image::{ClosedGate, DiskImage, ReferenceGate, open_image};
use freightfs::storage::{MemoryStorage, Storage};
use freightfs::units::VirtualOffset;

use super::images::Random;
use super::reasons::REASONS;

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
        let extent = image.extent_at(at, size - at.bytes())?;
        assert!(extent.length > 0 && at.bytes() + extent.length <= size);
        at += extent.length;
    }
    Ok(content)
}

/// Damages `image` in many ways where its tables are, which is where anything but zeros is near in these bytes. Each gives content or one of [`REASONS`], and nothing panics. Damage that is
/// never refused tests nothing.
pub fn damage(format: ImageFormat, image: &[u8], tables: Range<usize>) {
    let mut random = Random(6);
    let is_near =
        |at: usize| image[at.saturating_sub(8)..image.len().min(at + 8)].iter().any(|&byte| byte != 0);
    let places: Vec<_> = tables.filter(|&at| at < image.len() && is_near(at)).collect();
    let (mut read, mut refused) = (0, 0);
    let mut try_one = |damaged: Vec<u8>, how: &str| match read_all(format, damaged) {
        Ok(_) => read += 1,
        Err(error) => {
            assert!(
                REASONS.contains(&error.kind()),
                "{format:?}, {how}: {:?} {}",
                error.kind(),
                error.report()
            );
            refused += 1;
        }
    };
    for (number, &at) in places.iter().enumerate() {
        // All of the first headers, then a sample.
        if number > 600 && random.below(40) != 0 {
            continue;
        }
        let mut damaged = image.to_vec();
        damaged[at] ^= 1 << random.below(8);
        try_one(damaged, &format!("one bit of byte {at}"));
    }
    for round in 0..1000 {
        let mut damaged = image.to_vec();
        for _ in 0..1 + random.below(8) {
            damaged[places[random.below(places.len() as u64) as usize]] = random.next() as u8;
        }
        try_one(damaged, &format!("round {round}"));
    }
    assert!(refused >= 20, "{format:?}: {read} were read and {refused} refused");
}
