//! VMDK monolithicSparse: header, descriptor, two copies of grain directory and tables, grains.
//!
//! Source: VMware, "Virtual Disk Format 5.0", "Hosted Sparse Extents". Offsets in tables count sectors and have 32
//! bits, so data must end before sector 2^32.

use std::ops::Range;
use std::sync::Arc;

use super::{Layout, LayoutInput, Region, copy_overlap, fill_table, units_region};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header::vmdk::{MAGIC, VmdkSparseHeader};
use crate::units::{FileOffset, KIB, SECTOR, round_up};

/// Bytes of a grain (the specification's default, 128 sectors).
pub const GRAIN_SIZE: u64 = 64 * KIB;

pub(super) const GRAIN_SECTORS: u64 = GRAIN_SIZE / SECTOR;

/// Entries of a grain table (fixed by the specification), which so takes 4 sectors.
pub(super) const TABLE_ENTRIES: u64 = 512;
const TABLE_SECTORS: u64 = 4;

/// The descriptor's place and length in sectors.
pub(super) const DESCRIPTOR_OFFSET: u64 = 1;
pub(super) const DESCRIPTOR_SIZE: u64 = 20;

/// Longest file name that a descriptor holds, in bytes.
const MAX_NAME: usize = 255;

/// The arrangement of a monolithicSparse VMDK.
#[derive(Debug)]
pub struct VmdkLayout {
    header: [u8; VmdkSparseHeader::LENGTH],
    descriptor: Vec<u8>,
    map: Arc<AllocationMap>,
    /// Grain tables of one copy.
    tables: u64,
    /// Sectors of one copy's directory.
    directory_sectors: u64,
    /// Where the two directories are; each one's tables follow it.
    directories: [FileOffset; 2],
    grains: FileOffset,
}

impl VmdkLayout {
    /// For a disk that is rounded up to a sector. The map's units are the grains.
    pub fn new(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        if input.virtual_size == 0 {
            // Readers take a capacity of 0 for another kind of extent.
            return Err(Error::unsupported("a disk of 0 bytes cannot be a VMDK"));
        }
        let capacity = input.virtual_size.div_ceil(SECTOR);
        let tables = capacity.div_ceil(TABLE_ENTRIES * GRAIN_SECTORS);
        let directory_sectors = (4 * tables).div_ceil(SECTOR);
        let copy_sectors = directory_sectors + TABLE_SECTORS * tables;
        let redundant = DESCRIPTOR_OFFSET + DESCRIPTOR_SIZE;
        let directory = redundant + copy_sectors;
        let overhead = round_up(directory + copy_sectors, GRAIN_SECTORS);
        if overhead + GRAIN_SECTORS * map.allocated() > 1 << 32 {
            let what = "a sparse VMDK holds at most 2 TiB of data and tables, the disk needs more";
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let header = VmdkSparseHeader {
            magic: MAGIC,
            version: 1,
            flags: 3,
            capacity,
            grain_size: GRAIN_SECTORS,
            descriptor_offset: DESCRIPTOR_OFFSET,
            descriptor_size: DESCRIPTOR_SIZE,
            grain_table_entries: TABLE_ENTRIES as u32,
            redundant_directory_offset: redundant,
            directory_offset: directory,
            overhead,
            unclean_shutdown: 0,
            line_ends: *b"\n \r\n",
            compression: 0,
        };
        Ok(Self {
            header: header.encode(),
            descriptor: descriptor(input, capacity, "monolithicSparse"),
            map,
            tables,
            directory_sectors,
            directories: [FileOffset(redundant * SECTOR), FileOffset(directory * SECTOR)],
            grains: FileOffset(overhead * SECTOR),
        })
    }

    /// A directory's entries, then its tables.
    fn fill_copy(&self, directory: FileOffset, at: FileOffset, buf: &mut [u8]) {
        let tables = directory + self.directory_sectors * SECTOR;
        fill_table(directory..directory + 4 * self.tables, at, buf, |indices| {
            indices.map(move |index| ((tables.bytes() / SECTOR + TABLE_SECTORS * index) as u32).to_le_bytes())
        });
        let entries: Range<FileOffset> = tables..tables + 4 * self.tables * TABLE_ENTRIES;
        fill_table(entries, at, buf, |indices| {
            self.map.ranked(indices).map(|rank| match rank {
                Some(rank) => ((self.grains.bytes() / SECTOR + GRAIN_SECTORS * rank) as u32).to_le_bytes(),
                None => [0; 4],
            })
        });
    }
}

/// The descriptor of a disk of `capacity` sectors.
pub(super) fn descriptor(input: &LayoutInput, capacity: u64, create_type: &str) -> Vec<u8> {
    let mut content_id = [0; 4];
    content_id.copy_from_slice(&input.seed[..4]);
    // All ones mean "no parent" and cannot be an id.
    let content_id = u32::from_le_bytes(content_id) & 0xffff_fffe;
    let cylinders = capacity / (255 * 63);
    let name = extent_name(&input.file_name);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={content_id:08x}\nparentCID=ffffffff\n\
         createType=\"{create_type}\"\n\n# Extent description\nRW {capacity} SPARSE \"{name}\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
    )
    .into_bytes()
}

/// The file's name as a quoted string can hold it.
fn extent_name(name: &str) -> String {
    let mut safe = String::new();
    for c in name.chars() {
        let c = if c.is_control() || "\"/\\".contains(c) { '_' } else { c };
        if safe.len() + c.len_utf8() > MAX_NAME {
            break;
        }
        safe.push(c);
    }
    if safe.is_empty() { "disk.vmdk".to_owned() } else { safe }
}

impl Layout for VmdkLayout {
    fn file_size(&self) -> u64 {
        self.grains.bytes() + self.map.allocated() * GRAIN_SIZE
    }

    fn region_at(&self, at: FileOffset) -> Region {
        units_region(&self.map, self.grains, at)
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        copy_overlap(&self.header, FileOffset(0), at, buf);
        copy_overlap(&self.descriptor, FileOffset(DESCRIPTOR_OFFSET * SECTOR), at, buf);
        for directory in self.directories {
            self.fill_copy(directory, at, buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::LayoutOptions;
    use super::super::tests::map;
    use super::*;
    use crate::units::TIB;

    fn input(virtual_size: u64, file_name: &str) -> LayoutInput {
        LayoutInput {
            virtual_size,
            seed: [0xff; 16],
            file_name: file_name.to_owned(),
            options: LayoutOptions::default(),
        }
    }

    #[test]
    fn sizes_follow_the_formula() {
        // 10 GiB: 320 tables, directory 3 sectors; 21 + 2·(3 + 1280) = 2587, rounded up to 2688 sectors.
        let layout =
            VmdkLayout::new(&input(10 << 30, "a.vmdk"), map(10 << 30, GRAIN_SIZE, &[(0, 1)])).unwrap();
        assert_eq!(layout.file_size(), (2688 + 128) * 512);
    }

    #[test]
    fn data_past_two_tebibytes_is_refused() {
        let layout = VmdkLayout::new(&input(3 * TIB, "a.vmdk"), map(3 * TIB, GRAIN_SIZE, &[(0, 2 * TIB)]));
        assert_eq!(layout.unwrap_err().kind(), ErrorKind::TooLarge);
        VmdkLayout::new(&input(8 * TIB, "a.vmdk"), map(8 * TIB, GRAIN_SIZE, &[(0, TIB)])).unwrap();
    }

    #[test]
    fn hostile_names_stay_inside_their_quotes() {
        let long = "x".repeat(10_000);
        for name in ["a\"\nRW 1 FLAT \"/etc/passwd\" 0", "../a", "", long.as_str()] {
            let layout = VmdkLayout::new(&input(1 << 20, name), map(1 << 20, GRAIN_SIZE, &[])).unwrap();
            let text = String::from_utf8(layout.descriptor).unwrap();
            assert_eq!(text.matches("\nRW ").count(), 1, "{text}");
            assert!(text.len() < 20 * 512 && !text.contains("CID=ffffffff\nparent"), "{text}");
        }
    }
}
