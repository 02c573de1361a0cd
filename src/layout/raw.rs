//! Raw: the file is the disk.

use super::{Layout, Region, RegionSource};
use crate::units::{FileOffset, VirtualOffset};

/// The layout of a raw file.
#[derive(Debug)]
pub struct RawLayout {
    virtual_size: u64,
}

impl RawLayout {
    /// For a disk of `virtual_size` bytes.
    pub fn new(virtual_size: u64) -> Self {
        Self { virtual_size }
    }
}

impl Layout for RawLayout {
    fn file_size(&self) -> u64 {
        self.virtual_size
    }

    fn region_at(&self, at: FileOffset) -> Region {
        Region {
            source: RegionSource::Guest(VirtualOffset(at.bytes())),
            length: self.virtual_size - at.bytes(),
        }
    }

    fn metadata(&self, _at: FileOffset, _buf: &mut [u8]) {}
}
