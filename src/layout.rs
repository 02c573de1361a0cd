//! Layouts: where each byte of a computed file comes from. Pure: an allocation map in, regions out.
//!
//! A layout reads nothing. It turns a disk's virtual size and [`AllocationMap`] into the exact size of a file
//! and, for any place in it, the [`Region`] there: bytes that the layout itself makes up, bytes of the guest's
//! disk, or zeros. [`crate::convert`] joins it with an image.
#![deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::panic, clippy::unreachable)]

pub mod compressed;
pub mod compressed_qcow2;
pub mod qcow2;
mod qcow2_frame;
pub mod raw;
pub mod stream_vmdk;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
pub mod zvhd;

use std::ops::Range;
use std::sync::Arc;

pub use compressed::CompressedLayout;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::format::OutputFormat;
use crate::units::{FileOffset, VirtualOffset};

/// Raised when a layout makes other bytes of equal inputs, so that nothing made by an earlier version is continued.
pub const VERSION: u32 = 1;

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
    /// What users may choose.
    pub options: LayoutOptions,
}

/// What users may choose of a file besides its format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LayoutOptions {
    /// Bytes of a qcow2 cluster, a power of two from 512 to 2 MiB; 64 KiB when not given.
    pub cluster_size: Option<u64>,
    /// Level of the compressor; its default when not given.
    pub level: Option<u8>,
    /// Whether zlib clusters of qcow2 refer back up to 32 KiB and not only 4 KiB, the window that QEMU writes.
    pub large_window: bool,
}

impl LayoutOptions {
    /// The options in bytes that differ where the options do.
    pub fn fact(&self) -> Vec<u8> {
        let level = self.level.map_or(i16::from(u8::MAX) + 1, i16::from);
        let mut bytes = self.cluster_size.unwrap_or(0).to_le_bytes().to_vec();
        bytes.extend(level.to_le_bytes());
        bytes.push(self.large_window.into());
        bytes
    }
}

/// A layout of either sort.
pub enum AnyLayout {
    /// Every place is known at once.
    Plain(Box<dyn Layout>),
    /// Places depend on what was compressed before.
    Compressed(Box<dyn CompressedLayout>),
}

/// How a format cuts a disk: bytes in a cluster, grain or block; `None` where allocation does not matter.
pub fn unit_size(format: OutputFormat, options: &LayoutOptions) -> Option<u64> {
    match format {
        OutputFormat::Raw | OutputFormat::FixedVhd => None,
        OutputFormat::Qcow2 | OutputFormat::ZlibQcow2 | OutputFormat::ZstdQcow2 => {
            Some(options.cluster_size.unwrap_or(1 << qcow2::DEFAULT_CLUSTER_BITS))
        }
        OutputFormat::Vhd => Some(vhd::BLOCK_SIZE),
        OutputFormat::Vmdk | OutputFormat::StreamVmdk => Some(vmdk::GRAIN_SIZE),
        OutputFormat::Zvhd | OutputFormat::Zvhd2 => Some(crate::header::zvhd::BLOCK_SIZE),
        OutputFormat::Vhdx => Some(vhdx::BLOCK_SIZE),
        OutputFormat::Vdi => Some(vdi::BLOCK_SIZE),
    }
}

/// The layout of `format`. `map` has the units of [`unit_size`]; it is unused where that is `None`.
///
/// # Errors
/// [`TooLarge`](crate::error::ErrorKind::TooLarge) when the disk does not fit the format.
pub fn build(format: OutputFormat, input: &LayoutInput, map: Arc<AllocationMap>) -> Result<AnyLayout> {
    let plain: Box<dyn Layout> = match format {
        OutputFormat::Raw => Box::new(raw::RawLayout::new(input.virtual_size)),
        OutputFormat::Qcow2 => Box::new(qcow2::Qcow2Layout::new(input.virtual_size, map)?),
        OutputFormat::Vhd => Box::new(vhd::VhdLayout::new(input, map)?),
        OutputFormat::FixedVhd => Box::new(vhd::FixedVhdLayout::new(input)?),
        OutputFormat::Vmdk => Box::new(vmdk::VmdkLayout::new(input, map)?),
        OutputFormat::Vhdx => Box::new(vhdx::VhdxLayout::new(input, map)?),
        OutputFormat::Vdi => Box::new(vdi::VdiLayout::new(input, map)?),
        compressed => return build_compressed(compressed, input, map).map(AnyLayout::Compressed),
    };
    Ok(AnyLayout::Plain(plain))
}

fn build_compressed(
    format: OutputFormat,
    input: &LayoutInput,
    map: Arc<AllocationMap>,
) -> Result<Box<dyn CompressedLayout>> {
    use compressed_qcow2::CompressedQcow2Layout;
    Ok(match format {
        OutputFormat::ZlibQcow2 => Box::new(CompressedQcow2Layout::zlib(input, map)?),
        OutputFormat::ZstdQcow2 => Box::new(CompressedQcow2Layout::zstd(input, map)?),
        OutputFormat::StreamVmdk => Box::new(stream_vmdk::StreamVmdkLayout::new(input, map)?),
        OutputFormat::Zvhd => Box::new(zvhd::ZvhdLayout::zvhd(input, map)?),
        OutputFormat::Zvhd2 => Box::new(zvhd::ZvhdLayout::zvhd2(input, map)?),
        plain => {
            return Err(Error::new(ErrorKind::Internal, format!(".{} is not compressed", plain.suffix())));
        }
    })
}

/// Units in a run that one region covers at most, which bounds the search for its end.
const MAX_RUN: u64 = 1 << 14;

/// The region at `at` in a file that has metadata before `data`, and from there on the allocated units one after the
/// other.
fn units_region(map: &AllocationMap, data: FileOffset, at: FileOffset) -> Region {
    if at < data {
        return Region { source: RegionSource::Metadata, length: data - at };
    }
    let unit_size = map.unit_size();
    let (rank, within) = ((at - data) / unit_size, (at - data) % unit_size);
    let unit = map.select(rank).expect("the file has as many units as are allocated");
    let run = map.run_length(unit, MAX_RUN);
    let from = VirtualOffset(unit * unit_size + within);
    Region { source: RegionSource::Guest(from), length: run * unit_size - within }
}

/// Copies the part of `block`, which stands at `block_at`, that `buf` at `at` overlaps: for layouts that
/// encode a whole header and are asked for a piece of it.
fn copy_overlap(block: &[u8], block_at: FileOffset, at: FileOffset, buf: &mut [u8]) {
    let start = at.bytes().max(block_at.bytes());
    let end = (at.bytes() + buf.len() as u64).min(block_at.bytes() + block.len() as u64);
    if start < end {
        let (from, to) = ((start - block_at.bytes()) as usize, (start - at.bytes()) as usize);
        let length = (end - start) as usize;
        let both = buf.get_mut(to..to + length).zip(block.get(from..from + length));
        if let Some((target, source)) = both {
            target.copy_from_slice(source);
        }
    }
}

/// Fills the part of `buf` at `at` that a table of entries of `N` bytes at `table_at` covers; `entries` makes the
/// iterator over the entries of a range of indices.
fn fill_table<const N: usize, I: Iterator<Item = [u8; N]>>(
    table: Range<FileOffset>,
    at: FileOffset,
    buf: &mut [u8],
    entries: impl FnOnce(Range<u64>) -> I,
) {
    let start = at.max(table.start);
    let end = (at + buf.len() as u64).min(table.end);
    if start >= end {
        return;
    }
    let size = N as u64;
    let indices = (start - table.start) / size..(end - table.start).div_ceil(size);
    let mut place = table.start + indices.start * size;
    for entry in entries(indices) {
        copy_overlap(&entry, place, at, buf);
        place += size;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A map of that unit size with some marks.
    pub(crate) fn map(virtual_size: u64, unit: u64, marks: &[(u64, u64)]) -> Arc<AllocationMap> {
        let mut builder = AllocationMap::builder(virtual_size, unit);
        let mut marks: Vec<_> = marks.iter().filter(|(start, _)| *start < virtual_size).collect();
        marks.sort_unstable();
        for &(start, length) in marks {
            builder.mark(VirtualOffset(start), length.min(virtual_size - start)).unwrap();
        }
        Arc::new(builder.finish().unwrap())
    }

    fn input(virtual_size: u64) -> LayoutInput {
        LayoutInput {
            virtual_size,
            seed: [7; 16],
            file_name: "disk.vmdk".into(),
            options: LayoutOptions::default(),
        }
    }

    fn layout(format: OutputFormat, virtual_size: u64, marks: &[(u64, u64)]) -> Result<Box<dyn Layout>> {
        let unit = unit_size(format, &LayoutOptions::default()).unwrap_or(virtual_size.max(1));
        match build(format, &input(virtual_size), map(virtual_size, unit, marks))? {
            AnyLayout::Plain(layout) => Ok(layout),
            AnyLayout::Compressed(_) => Err(Error::unsupported("not a plain layout")),
        }
    }

    /// Walks the regions: they tile the file, and guest regions show every allocated byte exactly once, in order.
    fn check_regions(
        format: OutputFormat,
        virtual_size: u64,
        marks: &[(u64, u64)],
    ) -> Result<(), TestCaseError> {
        let Ok(layout) = layout(format, virtual_size, marks) else { return Ok(()) };
        let (mut at, mut guest, mut guest_bytes) = (FileOffset(0), 0, 0);
        while at.bytes() < layout.file_size() {
            let region = layout.region_at(at);
            prop_assert!(region.length > 0);
            // A region that is asked for further on says the same.
            let middle = region.length / 2;
            let inner = layout.region_at(at + middle);
            match (region.source, inner.source) {
                (RegionSource::Guest(outer), RegionSource::Guest(from)) => {
                    prop_assert_eq!(from.bytes(), outer.bytes() + middle);
                    prop_assert!(outer.bytes() >= guest, "guest bytes out of order");
                    guest = outer.bytes() + region.length;
                    guest_bytes += region.length;
                }
                (outer, inner) => prop_assert_eq!(outer, inner),
            }
            at += region.length;
        }
        prop_assert_eq!(at.bytes(), layout.file_size());
        if let Some(unit) = unit_size(format, &LayoutOptions::default()) {
            let allocated = map(virtual_size, unit, marks).allocated();
            prop_assert_eq!(guest_bytes, allocated * unit);
        }
        Ok(())
    }

    /// All metadata, read in one piece and in pieces of `step`.
    fn check_metadata(format: OutputFormat, virtual_size: u64, step: usize) -> Result<(), TestCaseError> {
        let marks = [(virtual_size / 3, virtual_size / 5 + 1)];
        let Ok(layout) = layout(format, virtual_size, &marks) else { return Ok(()) };
        let mut at = FileOffset(0);
        while at.bytes() < layout.file_size() {
            let region = layout.region_at(at);
            if region.source == RegionSource::Metadata && region.length < 4 << 20 {
                let mut whole = vec![0xaa; region.length as usize];
                layout.metadata(at, &mut whole);
                let mut pieces = vec![0x55; region.length as usize];
                let mut done = 0;
                for piece in pieces.chunks_mut(step) {
                    layout.metadata(at + done, piece);
                    done += piece.len() as u64;
                }
                prop_assert!(whole == pieces, "metadata at {at} depends on the split of reads");
            }
            at += region.length;
        }
        Ok(())
    }

    fn sizes() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0u64),
            Just(1),
            1..100_000u64,
            1..(64u64 << 20),
            1..(2u64 << 40),
            1..(8u64 << 40),
            Just(8u64 << 40)
        ]
    }

    fn formats() -> impl Strategy<Value = OutputFormat> {
        prop::sample::select(OutputFormat::ALL.into_iter().filter(|f| !f.is_compressed()).collect::<Vec<_>>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn regions_tile_the_file(
            format in formats(),
            virtual_size in sizes(),
            marks in prop::collection::vec((0u64..1 << 43, 1u64..1 << 30), 0..6),
        ) {
            let size = virtual_size.max(1);
            let marks: Vec<_> = marks.into_iter().map(|(start, length)| (start % size, length)).collect();
            check_regions(format, virtual_size, &marks)?;
        }

        #[test]
        fn metadata_does_not_depend_on_the_split(format in formats(), size in 0u64..1 << 32, step in 1usize..5000) {
            check_metadata(format, size, step)?;
        }
    }
}
