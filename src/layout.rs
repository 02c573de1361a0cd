//! Layouts: where each byte of a computed file comes from. Pure: an allocation map in, regions out.
//!
//! A layout reads nothing. It turns a disk's virtual size and [`AllocationMap`] into the exact size of a file
//! and, for any place in it, the [`Region`] there: bytes that the layout itself makes up, bytes of the guest's
//! disk, or zeros. [`crate::convert`] joins it with an image.

pub mod raw;

use std::sync::Arc;

use crate::error::Result;
use crate::extent::AllocationMap;
use crate::format::OutputFormat;
use crate::units::{FileOffset, VirtualOffset};

/// Where a run of bytes of a computed file comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionSource {
    /// Headers and tables: [`Layout::metadata`] writes them.
    Metadata,
    /// The guest's disk from this place on; what lies past the disk's end reads as zeros.
    Guest(VirtualOffset),
    /// Zeros.
    Zero,
}

/// A run of bytes of a computed file with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the bytes come from.
    pub source: RegionSource,
    /// How many from the place that was asked for, at least 1; it need not be maximal.
    pub length: u64,
}

/// The arrangement of a file of some format over a disk.
pub trait Layout: Send + Sync {
    /// Exact bytes in the file.
    fn file_size(&self) -> u64;

    /// The region that starts at `at`, which lies inside the file.
    fn region_at(&self, at: FileOffset) -> Region;

    /// Fills `buf` from `at`; all of it lies inside one metadata region.
    fn metadata(&self, at: FileOffset, buf: &mut [u8]);
}

/// What a layout is computed from. Equal inputs give byte-identical files.
#[derive(Clone, Debug)]
pub struct LayoutInput {
    /// Bytes of the guest's disk.
    pub virtual_size: u64,
    /// 16 bytes derived from the source's identity, for everything that other tools make random.
    pub seed: [u8; 16],
    /// The computed file's own name without directories, for formats that store it.
    pub file_name: String,
}

/// How a format cuts a disk: bytes in a cluster, grain or block; `None` where allocation does not matter.
pub fn unit_size(format: OutputFormat) -> Option<u64> {
    match format {
        OutputFormat::Raw => raw::UNIT_SIZE,
        _ => todo!(),
    }
}

/// The layout of `format`. `map` has the units of [`unit_size`]; it is unused where that is `None`.
///
/// # Errors
/// [`TooLarge`](crate::error::ErrorKind::TooLarge) when the disk does not fit the format.
pub fn build(format: OutputFormat, input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Box<dyn Layout>> {
    let _ = map;
    Ok(match format {
        OutputFormat::Raw => Box::new(raw::RawLayout::new(input.virtual_size)),
        _ => todo!(),
    })
}

/// Copies the part of `block`, which stands at `block_at`, that `buf` at `at` overlaps: for layouts that
/// encode a whole header and are asked for a piece of it.
pub(crate) fn copy_overlap(block: &[u8], block_at: FileOffset, at: FileOffset, buf: &mut [u8]) {
    let start = at.bytes().max(block_at.bytes());
    let end = (at.bytes() + buf.len() as u64).min(block_at.bytes() + block.len() as u64);
    if start < end {
        let (from, to) = ((start - block_at.bytes()) as usize, (start - at.bytes()) as usize);
        let length = (end - start) as usize;
        buf[to..to + length].copy_from_slice(&block[from..from + length]);
    }
}
