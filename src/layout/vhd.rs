//! VHD, dynamic and fixed.
//!
//! Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0. A dynamic disk is a copy of the
//! footer, the dynamic header, the block allocation table padded with ones to a sector, the allocated blocks, each
//! 512 bytes of bitmap (all ones) and 2 MiB of data, and the footer. A fixed disk is the disk and the footer.
//!
//! The creator is `win `, for which every reader takes the current size and not the geometry's product.

use std::sync::Arc;

use super::{Layout, LayoutInput, Region, RegionSource, copy_overlap, fill_table};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header::vhd::{
    DYNAMIC_COOKIE, FOOTER_COOKIE, TYPE_DYNAMIC, TYPE_FIXED, VhdDynamicHeader, VhdFooter, checksum, geometry,
};
use crate::units::{FileOffset, GIB, MIB, SECTOR, VirtualOffset, round_up};

/// Bytes of data in a block (the specification's default).
pub const BLOCK_SIZE: u64 = 2 * MIB;

/// Bytes of a block's bitmap: a bit for each of its 4096 sectors.
const BITMAP_SIZE: u64 = 512;

/// Largest disk ("Dynamic Hard Disk Image": 2040 GiB).
const MAX_VIRTUAL_SIZE: u64 = 2040 * GIB;

/// Where the block allocation table is: behind the footer's copy and the dynamic header.
const TABLE_OFFSET: FileOffset = FileOffset(1536);

/// The arrangement of a dynamic VHD.
#[derive(Debug)]
pub struct VhdLayout {
    footer: [u8; VhdFooter::LENGTH],
    header: [u8; VhdDynamicHeader::LENGTH],
    map: Arc<AllocationMap>,
    blocks: FileOffset,
}

/// The arrangement of a fixed VHD.
#[derive(Debug)]
pub struct FixedVhdLayout {
    footer: [u8; VhdFooter::LENGTH],
    virtual_size: u64,
}

impl VhdLayout {
    /// For a disk that is rounded up to a sector. The map's units are the blocks.
    pub fn new(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        let footer = footer(input, TYPE_DYNAMIC, 512)?;
        let mut header = VhdDynamicHeader {
            cookie: DYNAMIC_COOKIE,
            data_offset: u64::MAX,
            table_offset: TABLE_OFFSET.bytes(),
            header_version: 0x0001_0000,
            // Azure rejects a table with one entry more than the disk has blocks.
            max_table_entries: map.units() as u32,
            block_size: BLOCK_SIZE as u32,
            checksum: 0,
            parent_unique_id: [0; 16],
            parent_name: [0; 512],
            parent_locators: [0; 192],
        };
        header.checksum = checksum(&header.encode(), 36);
        let blocks = TABLE_OFFSET + round_up(4 * map.units(), SECTOR);
        Ok(Self { footer, header: header.encode(), map, blocks })
    }

    fn last_footer(&self) -> FileOffset {
        self.blocks + self.map.allocated() * (BITMAP_SIZE + BLOCK_SIZE)
    }
}

impl FixedVhdLayout {
    /// For a disk that is rounded up to a sector.
    pub fn new(input: &LayoutInput) -> Result<Self> {
        if input.virtual_size == 0 {
            // Readers look for a dynamic header where there are no bytes.
            return Err(Error::unsupported("a disk of 0 bytes cannot be a fixed VHD"));
        }
        let footer = footer(input, TYPE_FIXED, u64::MAX)?;
        Ok(Self { footer, virtual_size: round_up(input.virtual_size, SECTOR) })
    }
}

fn footer(input: &LayoutInput, disk_type: u32, data_offset: u64) -> Result<[u8; VhdFooter::LENGTH]> {
    if input.virtual_size > MAX_VIRTUAL_SIZE {
        let what = format!("a VHD holds at most 2040 GiB, the disk has {} bytes", input.virtual_size);
        return Err(Error::new(ErrorKind::TooLarge, what));
    }
    let size = round_up(input.virtual_size, SECTOR);
    let (cylinders, heads, sectors) = geometry(size / SECTOR);
    let mut footer = VhdFooter {
        cookie: FOOTER_COOKIE,
        features: 2,
        version: 0x0001_0000,
        data_offset,
        timestamp: 0,
        creator_application: *b"win ",
        creator_version: 0x000a_0000,
        creator_os: *b"Wi2k",
        original_size: size,
        current_size: size,
        cylinders,
        heads,
        sectors,
        disk_type,
        checksum: 0,
        unique_id: input.seed,
        saved_state: 0,
    };
    footer.checksum = checksum(&footer.encode(), 64);
    Ok(footer.encode())
}

impl Layout for VhdLayout {
    fn file_size(&self) -> u64 {
        self.last_footer().bytes() + SECTOR
    }

    fn region_at(&self, at: FileOffset) -> Region {
        let metadata = |end: FileOffset| Region { source: RegionSource::Metadata, length: end - at };
        if at < self.blocks {
            return metadata(self.blocks);
        }
        if at >= self.last_footer() {
            return metadata(FileOffset(self.file_size()));
        }
        let stride = BITMAP_SIZE + BLOCK_SIZE;
        let (rank, within) = ((at - self.blocks) / stride, (at - self.blocks) % stride);
        if within < BITMAP_SIZE {
            return metadata(at + (BITMAP_SIZE - within));
        }
        let block = self.map.select(rank).expect("the file has as many blocks as are allocated");
        let from = VirtualOffset(block * BLOCK_SIZE + within - BITMAP_SIZE);
        Region { source: RegionSource::Guest(from), length: stride - within }
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        // Bitmaps and the end of the table are ones; what is not is written over.
        buf.fill(0xff);
        copy_overlap(&self.footer, FileOffset(0), at, buf);
        copy_overlap(&self.header, FileOffset(512), at, buf);
        let stride = BITMAP_SIZE + BLOCK_SIZE;
        fill_table(TABLE_OFFSET..TABLE_OFFSET + 4 * self.map.units(), at, buf, |indices| {
            self.map.ranked(indices).map(|rank| match rank {
                Some(rank) => (((self.blocks.bytes() + rank * stride) / SECTOR) as u32).to_be_bytes(),
                None => [0xff; 4],
            })
        });
        copy_overlap(&self.footer, self.last_footer(), at, buf);
    }
}

impl Layout for FixedVhdLayout {
    fn file_size(&self) -> u64 {
        self.virtual_size + SECTOR
    }

    fn region_at(&self, at: FileOffset) -> Region {
        if at.bytes() < self.virtual_size {
            let source = RegionSource::Guest(VirtualOffset(at.bytes()));
            return Region { source, length: self.virtual_size - at.bytes() };
        }
        Region { source: RegionSource::Metadata, length: self.file_size() - at.bytes() }
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        copy_overlap(&self.footer, FileOffset(self.virtual_size), at, buf);
    }
}

#[cfg(test)]
mod tests {
    use super::super::LayoutOptions;
    use super::super::tests::map;
    use super::*;

    fn input(virtual_size: u64) -> LayoutInput {
        LayoutInput {
            virtual_size,
            seed: [3; 16],
            file_name: String::new(),
            options: LayoutOptions::default(),
        }
    }

    #[test]
    fn sizes_follow_the_formula() {
        let size = 10 * GIB;
        let layout =
            VhdLayout::new(&input(size), map(size, BLOCK_SIZE, &[(0, 1), (5 * GIB, 3 * MIB)])).unwrap();
        assert_eq!(layout.file_size(), 1536 + 20480 + 3 * 2_097_664 + 512);
        assert_eq!(FixedVhdLayout::new(&input(1)).unwrap().file_size(), 1024);
    }

    #[test]
    fn a_disk_above_2040_gib_is_refused() {
        for size in [2040 * GIB, 2040 * GIB + 1] {
            let result = FixedVhdLayout::new(&input(size));
            assert_eq!(result.is_ok(), size == 2040 * GIB);
            assert!(result.err().is_none_or(|e| e.kind() == ErrorKind::TooLarge));
        }
    }
}
