//! VHDX, fixed and dynamic.
//!
//! Source: [MS-VHDX]. A log that was not replayed is replayed in memory; the file stays as it is. Differencing disks
//! are refused by name.

mod log;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::blocks::{Block, BlockImage, BlockMap, BlockVisitor, visit_alike};
use super::table::{Entry, EntryTable};
use crate::error::{Error, Result};
use crate::format::ImageFormat;
use crate::header;
use crate::header::vhdx::{
    FILE_PARAMETERS, FILE_SIGNATURE, Guid, HEADER_SIGNATURE, LOGICAL_SECTOR_SIZE, METADATA_SIGNATURE,
    PAYLOAD_BLOCK_FULLY_PRESENT, PHYSICAL_SECTOR_SIZE, REGION_BAT, REGION_METADATA, REGION_SIGNATURE,
    VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE, VhdxHeader, VhdxMetadataEntry, VhdxRegionEntry,
};
use crate::storage::{Storage, check_range};
use crate::units::{FileOffset, KIB, MIB, Unit, memory_size};

/// Places that are fixed (section 2.2).
const HEADERS: [FileOffset; 2] = [FileOffset(64 * KIB), FileOffset(128 * KIB)];
const REGION_TABLES: [FileOffset; 2] = [FileOffset(192 * KIB), FileOffset(256 * KIB)];

/// Bytes that a checksum covers: of a header, of a region table (sections 2.2.2 and 2.2.3).
const HEADER_SIZE: usize = 4 << 10;
const REGION_TABLE_SIZE: usize = 64 << 10;

/// Entries of a region table or metadata table at most (sections 2.2.3.1 and 2.6.1.1).
const MAX_ENTRIES: usize = 2047;

/// Bytes of the metadata table at most; items follow it (section 2.6.1).
const METADATA_TABLE_SIZE: u64 = 64 * KIB;

/// Flags of a metadata entry (section 2.6.1.2): required.
const REQUIRED: u32 = 4;

/// Flag of the file parameters (section 2.6.2.1): has a parent.
const HAS_PARENT: u64 = 2;

/// Limits of section 2.6.2.1; that of a disk's size, section 2.6.2.2, is the one of all readers.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;

/// States of a block besides fully present (section 2.5.1.1).
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;

/// The parent's places, which only a differencing disk has (section 2.6.2.6).
const PARENT_LOCATOR: Guid =
    [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];

/// A VHDX image.
pub struct VhdxImage {
    storage: Arc<dyn Storage>,
    disk: Disk,
    bat: EntryTable,
    replayed: bool,
}

/// What the metadata says.
struct Disk {
    block_size: u64,
    virtual_size: u64,
    sector_size: u64,
}

impl VhdxImage {
    /// Opens `storage`.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let place = storage.name().to_owned();
        Self::open_unnamed(storage).map_err(|e| e.in_file(place))
    }

    fn open_unnamed(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut signature = [0; FILE_SIGNATURE.len()];
        storage.read_exact_at(FileOffset(0), &mut signature)?;
        if signature != FILE_SIGNATURE {
            return Err(Error::corrupt("is not a VHDX image: the signature is wrong").at(0u64));
        }
        let header = newest_header(&*storage)?;
        let replayed = header.log_guid != [0; 16];
        let storage = if replayed { log::replay(storage, &header)? } else { storage };
        let [bat, metadata] = read_regions(&*storage)?;
        let disk = read_metadata(&*storage, &metadata)?;
        // Every group of blocks that one bitmap describes is followed by the bitmap's entry (section 2.5).
        let blocks = Unit::of(disk.block_size).count(disk.virtual_size);
        let entries = blocks.saturating_add(disk.chunk().index(blocks.saturating_sub(1)));
        if entries.saturating_mul(8) > bat.length.into() {
            let what = format!("the block table has {} bytes, the disk needs {entries} entries", bat.length);
            return Err(Error::corrupt(what).at(bat.file_offset));
        }
        let bat = EntryTable::new(Arc::clone(&storage), FileOffset(bat.file_offset), entries, Entry::U64Le)?;
        Ok(Self { storage, disk, bat, replayed })
    }
}

impl VhdxImage {
    /// What the entry of block `index` says.
    fn entry(&self, index: u64, entry: u64) -> Result<Block> {
        Ok(match entry & 7 {
            NOT_PRESENT | UNDEFINED | UNMAPPED => Block::Hole,
            ZERO => Block::Zero,
            // Bits 20 to 63 count MiB.
            PAYLOAD_BLOCK_FULLY_PRESENT => Block::Data(FileOffset(entry & !(MIB - 1))),
            state => {
                let what =
                    format!("block {index} is in state {state}, which a disk without parent does not have");
                return Err(Error::corrupt(what).in_file(self.storage.name()));
            }
        })
    }
}

impl Disk {
    /// Blocks whose sectors one bitmap block describes.
    fn chunk(&self) -> Unit {
        Unit::of(Unit::of(self.block_size).index((1u64 << 23).saturating_mul(self.sector_size)))
    }
}

/// CRC-32C of a block in parts, with zeros in place of the checksum at byte 4 of the first.
fn checksum(parts: &[&[u8]]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    for (index, part) in parts.iter().enumerate() {
        match part.split_at_checked(4).zip(part.get(8..)) {
            Some(((signature, _), rest)) if index == 0 => {
                digest.update(signature);
                digest.update(&[0; 4]);
                digest.update(rest);
            }
            _ => digest.update(part),
        }
    }
    // Of the 64 bits, those of this sum.
    u32::try_from(digest.finalize() & u64::from(u32::MAX)).unwrap_or_default()
}

/// The valid header with the larger sequence number.
fn newest_header(storage: &dyn Storage) -> Result<VhdxHeader> {
    let mut newest: Option<VhdxHeader> = None;
    for at in HEADERS {
        let mut block = vec![0; HEADER_SIZE];
        storage.read_exact_at(at, &mut block)?;
        let Some(header) = VhdxHeader::parse_first(&block) else { continue };
        let valid = header.signature == HEADER_SIGNATURE && header.checksum == checksum(&[&block]);
        if valid && newest.as_ref().is_none_or(|other| other.sequence_number < header.sequence_number) {
            newest = Some(header);
        }
    }
    let header = newest.ok_or_else(|| {
        Error::corrupt("neither of the two headers is valid: signature or checksum is wrong").at(HEADERS[0])
    })?;
    if header.version != 1 {
        return Err(Error::unsupported(format!("is a VHDX of version {}", header.version)).at(HEADERS[0]));
    }
    Ok(header)
}

/// The regions of the block table and of the metadata.
fn read_regions(storage: &dyn Storage) -> Result<[VhdxRegionEntry; 2]> {
    let at = REGION_TABLES[0];
    let mut wrong = Error::corrupt("neither of the two region tables is valid").at(at);
    for at in REGION_TABLES {
        let mut table = vec![0; REGION_TABLE_SIZE];
        storage.read_exact_at(at, &mut table)?;
        let stored: u32 = header::little(&table, 4);
        if table.starts_with(&REGION_SIGNATURE) && stored == checksum(&[&table]) {
            match parse_regions(storage, &table, at) {
                Ok(regions) => return Ok(regions),
                Err(error) => wrong = error,
            }
        }
    }
    Err(wrong)
}

fn parse_regions(storage: &dyn Storage, table: &[u8], at: FileOffset) -> Result<[VhdxRegionEntry; 2]> {
    let count = header::little::<u32>(table, 8) as usize;
    if count > MAX_ENTRIES {
        return Err(Error::corrupt(format!("a region table of {count} entries is too large")).at(at + 8));
    }
    let (mut bat, mut metadata) = (None, None);
    let mut taken: Vec<(u64, u64)> = vec![(0, MIB)];
    let entries = table.get(16..).unwrap_or_default().chunks_exact(VhdxRegionEntry::LENGTH);
    for (index, entry) in entries.filter_map(VhdxRegionEntry::parse_first).take(count).enumerate() {
        let place = at + 16 + index.saturating_mul(VhdxRegionEntry::LENGTH) as u64;
        check_range(storage, FileOffset(entry.file_offset), entry.length.into())?;
        let range = (entry.file_offset, entry.file_offset.saturating_add(entry.length.into()));
        if taken.iter().any(|(start, end)| range.0 < *end && *start < range.1) {
            return Err(Error::corrupt("two regions overlap").at(place));
        }
        taken.push(range);
        let known = match entry.guid {
            REGION_BAT => &mut bat,
            REGION_METADATA => &mut metadata,
            _ if entry.required & 1 != 0 => {
                return Err(Error::unsupported("has a required region that is not known").at(place));
            }
            _ => continue,
        };
        if known.replace(entry).is_some() {
            return Err(Error::corrupt("a region is given twice").at(place));
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok([bat, metadata]),
        _ => Err(Error::corrupt("the region for block table or metadata is missing").at(at)),
    }
}

fn read_metadata(storage: &dyn Storage, region: &VhdxRegionEntry) -> Result<Disk> {
    let start = FileOffset(region.file_offset);
    let mut table = vec![0; memory_size(METADATA_TABLE_SIZE.min(region.length.into()))];
    storage.read_exact_at(start, &mut table)?;
    if table.len() < 32 || !table.starts_with(&METADATA_SIGNATURE) {
        return Err(Error::corrupt("the metadata table's signature is wrong").at(start));
    }
    let count = usize::from(header::little::<u16>(&table, 10));
    if count > MAX_ENTRIES {
        return Err(
            Error::corrupt(format!("a metadata table of {count} entries is too large")).at(start + 10)
        );
    }
    let (mut parameters, mut virtual_size, mut sector_size) = (None, None, None);
    let entries = table.get(32..).unwrap_or_default().chunks_exact(VhdxMetadataEntry::LENGTH);
    for (index, entry) in entries.filter_map(VhdxMetadataEntry::parse_first).take(count).enumerate() {
        let place = start + 32 + index.saturating_mul(VhdxMetadataEntry::LENGTH) as u64;
        let item = |length: usize| read_item(storage, region, &entry, length).map_err(|e| e.at(place));
        match entry.guid {
            FILE_PARAMETERS => parameters = Some(item(8)?),
            VIRTUAL_DISK_SIZE => virtual_size = Some(item(8)?),
            LOGICAL_SECTOR_SIZE => sector_size = Some(item(4)?),
            VIRTUAL_DISK_ID | PHYSICAL_SECTOR_SIZE | PARENT_LOCATOR => {}
            _ if entry.flags & REQUIRED != 0 => {
                return Err(Error::unsupported("has a required metadata item that is not known").at(place));
            }
            _ => {}
        }
    }
    let (Some(parameters), Some(virtual_size), Some(sector_size)) = (parameters, virtual_size, sector_size)
    else {
        return Err(Error::corrupt("block size, disk size or sector size is missing").at(start));
    };
    if parameters >> 32 & HAS_PARENT != 0 {
        return Err(Error::unsupported("is a differencing VHDX, which needs its parent").at(start));
    }
    let block_size = parameters & u64::from(u32::MAX);
    if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
        return Err(Error::corrupt(format!("blocks of {block_size} bytes are not allowed")).at(start));
    }
    if ![512, 4096].contains(&sector_size) {
        return Err(Error::corrupt(format!("sectors of {sector_size} bytes are not allowed")).at(start));
    }
    super::check_virtual_size(virtual_size).map_err(|e| e.at(start))?;
    if !virtual_size.is_multiple_of(sector_size) {
        return Err(Error::corrupt(format!("a disk of {virtual_size} bytes is not allowed")).at(start));
    }
    Ok(Disk { block_size, virtual_size, sector_size })
}

/// A metadata item of `length` bytes, at most 8, as a little-endian number.
fn read_item(
    storage: &dyn Storage,
    region: &VhdxRegionEntry,
    entry: &VhdxMetadataEntry,
    length: usize,
) -> Result<u64> {
    let inside = u64::from(entry.offset) >= METADATA_TABLE_SIZE
        && u64::from(entry.offset).saturating_add(length as u64) <= region.length.into();
    if !inside || entry.length as usize != length {
        return Err(Error::corrupt("a metadata item has a wrong place or length"));
    }
    let mut bytes = vec![0; length];
    storage.read_exact_at(FileOffset(region.file_offset) + entry.offset.into(), &mut bytes)?;
    Ok(bytes.iter().rev().fold(0, |item, &byte| item << 8 | u64::from(byte)))
}

impl BlockMap for VhdxImage {
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn virtual_size(&self) -> u64 {
        self.disk.virtual_size
    }

    fn block_size(&self) -> u64 {
        self.disk.block_size
    }

    fn block(&self, index: u64) -> Result<Block> {
        self.entry(index, self.bat.get(index.saturating_add(self.disk.chunk().index(index)))?)
    }

    fn visit_blocks(&self, blocks: Range<u64>, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
        let chunk = self.disk.chunk();
        let mut index = blocks.start;
        while index < blocks.end {
            // The entry of a bitmap follows each chunk.
            let before = chunk.index(index);
            let end = blocks.end.min(index.saturating_add(chunk.rest(index)));
            let entries = index.saturating_add(before)..end.saturating_add(before);
            let flow = self.bat.visit(entries, &mut |entry, count| {
                let block = self.entry(index, entry)?;
                index = index.saturating_add(count);
                visit_alike(block, count, visit)
            })?;
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl BlockImage for VhdxImage {
    fn format(&self) -> ImageFormat {
        ImageFormat::Vhdx
    }

    fn properties(&self) -> Vec<(String, String)> {
        let log = if self.replayed { "replayed in memory" } else { "empty" };
        vec![
            ("log".to_owned(), log.to_owned()),
            ("sector size".to_owned(), self.disk.sector_size.to_string()),
        ]
    }
}
