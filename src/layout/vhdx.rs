//! VHDX, dynamic: identifier, two headers, two region tables, log, BAT, metadata, blocks.
//!
//! Source: [MS-VHDX]. Blocks have 2 MiB. With cr = 2^23 · 512 / block size, every cr entries of the BAT are followed
//! by the entry of a sector bitmap, which a disk without a parent leaves 0; so the BAT has nb + ⌊(nb−1)/cr⌋ entries
//! and block i the entry i + ⌊i/cr⌋. The disk is rounded up to 1 MiB, because readers refuse odd sizes.

use std::sync::Arc;

use super::{Layout, LayoutInput, Region, copy_overlap, fill_table, units_region};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header;
use crate::header::vhdx::{
    FILE_PARAMETERS, FILE_SIGNATURE, Guid, HEADER_SIGNATURE, LOGICAL_SECTOR_SIZE, METADATA_SIGNATURE,
    PAYLOAD_BLOCK_FULLY_PRESENT, PHYSICAL_SECTOR_SIZE, REGION_BAT, REGION_METADATA, REGION_SIGNATURE,
    VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE, VhdxHeader, VhdxMetadataEntry, VhdxRegionEntry,
};
use crate::units::{FileOffset, KIB, MIB, SECTOR, TIB, round_up};

/// Bytes of a block; the same as VHD's, so that both share an allocation map.
pub const BLOCK_SIZE: u64 = 2 * MIB;

/// Blocks whose sectors one bitmap block describes (section 2.5).
const CHUNK_RATIO: u64 = (1 << 23) * SECTOR / BLOCK_SIZE;

/// Largest disk (section 2.6.2.2).
const MAX_VIRTUAL_SIZE: u64 = 64 * TIB;

/// Places that are fixed (section 2.2), and the log and BAT behind them.
const HEADERS: [FileOffset; 2] = [FileOffset(64 * KIB), FileOffset(128 * KIB)];
const REGION_TABLES: [FileOffset; 2] = [FileOffset(192 * KIB), FileOffset(256 * KIB)];
const LOG: FileOffset = FileOffset(MIB);
const BAT: FileOffset = FileOffset(2 * MIB);

/// Bytes of a header, a region table, the log and the metadata region.
const HEADER_SIZE: usize = 4 * KIB as usize;
const REGION_TABLE_SIZE: usize = 64 * KIB as usize;
const LOG_SIZE: u64 = MIB;
const METADATA_SIZE: u64 = MIB;

/// Where items begin in the metadata region (section 2.6.1.2: not below 64 KiB).
const ITEMS: u32 = 64 * KIB as u32;

/// Flags of metadata entries: about the virtual disk, required.
const DISK: u32 = 2;
const REQUIRED: u32 = 4;

/// The arrangement of a dynamic VHDX.
#[derive(Debug)]
pub struct VhdxLayout {
    headers: [Vec<u8>; 2],
    region_table: Vec<u8>,
    metadata_table: Vec<u8>,
    items: Vec<u8>,
    map: Arc<AllocationMap>,
    entries: u64,
    metadata: FileOffset,
    data: FileOffset,
}

impl VhdxLayout {
    /// For a disk that is rounded up to 1 MiB. The map's units are the blocks.
    pub fn new(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        if input.virtual_size > MAX_VIRTUAL_SIZE {
            let what = format!("a VHDX holds at most 64 TiB, the disk has {} bytes", input.virtual_size);
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        if input.virtual_size == 0 {
            return Err(Error::unsupported("a disk of 0 bytes cannot be a VHDX"));
        }
        let entries = map.units() + (map.units() - 1) / CHUNK_RATIO;
        let metadata = BAT + round_up(8 * entries, MIB);
        let (metadata_table, items) = metadata_region(input);
        Ok(Self {
            headers: [header(input, 0), header(input, 1)],
            region_table: region_table(metadata),
            metadata_table,
            items,
            map,
            entries,
            metadata,
            data: metadata + METADATA_SIZE,
        })
    }

    /// The BAT's entries of a range of indices.
    fn bat(&self, indices: std::ops::Range<u64>) -> impl Iterator<Item = [u8; 8]> + '_ {
        let group = CHUNK_RATIO + 1;
        let block = |index: u64| index - index / group;
        let mut ranked = self.map.ranked(block(indices.start)..block(indices.end));
        indices.map(move |index| {
            let is_bitmap = index % group == CHUNK_RATIO;
            let rank = if is_bitmap { None } else { ranked.next().flatten() };
            rank.map_or(0, |rank| (self.data.bytes() + rank * BLOCK_SIZE) | PAYLOAD_BLOCK_FULLY_PRESENT)
                .to_le_bytes()
        })
    }
}

/// Identities differ by one byte from each other; all come from the seed.
fn derived(input: &LayoutInput, mask: u8) -> Guid {
    input.seed.map(|byte| byte ^ mask)
}

/// Puts the CRC-32C of a block, computed with zeros in its place, at byte 4 (sections 2.2.2 and 2.2.3).
fn seal(mut block: Vec<u8>) -> Vec<u8> {
    header::put(&mut block, 4, &[0; 4]);
    let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &block) as u32;
    header::put(&mut block, 4, &checksum.to_le_bytes());
    block
}

fn header(input: &LayoutInput, sequence_number: u64) -> Vec<u8> {
    let header = VhdxHeader {
        signature: HEADER_SIGNATURE,
        checksum: 0,
        sequence_number,
        file_write_guid: derived(input, 1),
        data_write_guid: derived(input, 2),
        log_guid: [0; 16],
        log_version: 0,
        version: 1,
        log_length: LOG_SIZE as u32,
        log_offset: LOG.bytes(),
    };
    let mut block = header.encode().to_vec();
    block.resize(HEADER_SIZE, 0);
    seal(block)
}

fn region_table(metadata: FileOffset) -> Vec<u8> {
    let regions = [(REGION_BAT, BAT, metadata - BAT), (REGION_METADATA, metadata, METADATA_SIZE)];
    let mut table = REGION_SIGNATURE.to_vec();
    table.extend([0; 4]);
    table.extend((regions.len() as u32).to_le_bytes());
    table.extend([0; 4]);
    for (guid, offset, length) in regions {
        let entry = VhdxRegionEntry { guid, file_offset: offset.bytes(), length: length as u32, required: 1 };
        table.extend(entry.encode());
    }
    table.resize(REGION_TABLE_SIZE, 0);
    seal(table)
}

/// The metadata table and the items that it points to.
fn metadata_region(input: &LayoutInput) -> (Vec<u8>, Vec<u8>) {
    let mut parameters = (BLOCK_SIZE as u32).to_le_bytes().to_vec();
    parameters.extend([0; 4]);
    let sector_size = (SECTOR as u32).to_le_bytes().to_vec();
    let items = [
        (FILE_PARAMETERS, REQUIRED, parameters),
        (VIRTUAL_DISK_SIZE, REQUIRED | DISK, round_up(input.virtual_size, MIB).to_le_bytes().to_vec()),
        (VIRTUAL_DISK_ID, REQUIRED | DISK, derived(input, 3).to_vec()),
        (LOGICAL_SECTOR_SIZE, REQUIRED | DISK, sector_size.clone()),
        (PHYSICAL_SECTOR_SIZE, REQUIRED | DISK, sector_size),
    ];
    let mut table = METADATA_SIGNATURE.to_vec();
    table.extend([0; 2]);
    table.extend((items.len() as u16).to_le_bytes());
    table.extend([0; 20]);
    let mut values = Vec::new();
    for (guid, flags, value) in items {
        let (offset, length) = (ITEMS + values.len() as u32, value.len() as u32);
        table.extend(VhdxMetadataEntry { guid, offset, length, flags }.encode());
        values.extend(value);
    }
    (table, values)
}

impl Layout for VhdxLayout {
    fn file_size(&self) -> u64 {
        self.data.bytes() + self.map.allocated() * BLOCK_SIZE
    }

    fn region_at(&self, at: FileOffset) -> Region {
        units_region(&self.map, self.data, at)
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        copy_overlap(&FILE_SIGNATURE, FileOffset(0), at, buf);
        for (place, header) in HEADERS.into_iter().zip(&self.headers) {
            copy_overlap(header, place, at, buf);
        }
        for place in REGION_TABLES {
            copy_overlap(&self.region_table, place, at, buf);
        }
        fill_table(BAT..BAT + 8 * self.entries, at, buf, |indices| self.bat(indices));
        copy_overlap(&self.metadata_table, self.metadata, at, buf);
        copy_overlap(&self.items, self.metadata + u64::from(ITEMS), at, buf);
    }
}

#[cfg(test)]
mod tests {
    use super::super::LayoutOptions;
    use super::super::tests::map;
    use super::*;

    fn layout(size: u64, marks: &[(u64, u64)]) -> VhdxLayout {
        let input = LayoutInput {
            virtual_size: size,
            seed: [9; 16],
            file_name: String::new(),
            options: LayoutOptions::default(),
        };
        VhdxLayout::new(&input, map(size, BLOCK_SIZE, marks)).unwrap()
    }

    #[test]
    fn sizes_follow_the_formula() {
        assert_eq!(layout(10 << 30, &[(0, 1), (5 << 30, 3 * MIB)]).file_size(), 4 * MIB + 3 * BLOCK_SIZE);
    }

    #[test]
    fn every_chunk_of_the_bat_ends_with_a_bitmap_entry() {
        // Two chunks and one block, all allocated: entries 2048 and 4097 are bitmaps.
        let blocks = 2 * CHUNK_RATIO + 1;
        let layout = layout(blocks * BLOCK_SIZE, &[(0, blocks * BLOCK_SIZE)]);
        assert_eq!(layout.entries, blocks + 2);
        let entries: Vec<u64> = layout.bat(0..layout.entries).map(u64::from_le_bytes).collect();
        let bitmaps: Vec<_> = entries.iter().enumerate().filter(|(_, e)| **e == 0).map(|(i, _)| i).collect();
        assert_eq!(bitmaps, [2048, 4097]);
        let blocks: Vec<_> = entries.iter().filter(|e| **e != 0).collect();
        assert!(blocks.windows(2).all(|pair| pair[0] + BLOCK_SIZE == *pair[1]));
        // A range from the middle says the same.
        assert_eq!(layout.bat(2047..2051).map(u64::from_le_bytes).collect::<Vec<_>>(), entries[2047..2051]);
    }
}
