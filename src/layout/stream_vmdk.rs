//! VMDK streamOptimized: header, descriptor, compressed grains with markers, grain tables after every 512 grains,
//! grain directory, footer.
//!
//! Source: VMware, "Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents". The header says that
//! the directory's place stands in the footer, so that the file can be written without going back. A grain is
//! {sector u64, length u32} and a zlib stream, padded to a sector; markers are {sectors u64, 0 u32, type u32} in a
//! sector of their own.

use std::ops::Range;
use std::sync::Arc;

use super::LayoutInput;
use super::compressed::{CompressedLayout, Ends, GROUP_UNITS, LengthIndex, PlainEnds, Record};
use super::vmdk::{DESCRIPTOR_OFFSET, DESCRIPTOR_SIZE, GRAIN_SECTORS, GRAIN_SIZE, TABLE_ENTRIES, descriptor};
use crate::codec::{Compression, Compressor};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header;
use crate::header::vmdk::{MAGIC, VmdkSparseHeader};
use crate::units::{FileOffset, SECTOR, round_up};

/// Newline test valid, compressed grains, markers ("Hosted Sparse Extent Header").
const FLAGS: u32 = 0x0003_0001;

/// Says in place of the directory's offset that it stands in the footer (GD_AT_END).
const DIRECTORY_AT_END: u64 = u64::MAX;

/// Sectors before the first grain.
const OVERHEAD: u64 = 128;

/// Types of markers ("Stream-Optimized Compressed Sparse Extents").
const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;
const MARKER_FOOTER: u32 = 3;

/// Bytes before a grain's stream.
const GRAIN_HEADER: u64 = 12;

/// Sectors of a grain table, and with its marker.
const TABLE_SECTORS: u64 = 4 * TABLE_ENTRIES / SECTOR;

/// The arrangement of a streamOptimized VMDK.
pub struct StreamVmdkLayout {
    head: Vec<u8>,
    header: VmdkSparseHeader,
    compressor: Compressor,
    map: Arc<AllocationMap>,
    /// Grain tables that a full disk has.
    tables: u64,
}

impl StreamVmdkLayout {
    /// For a disk that is rounded up to a sector. The map's units are the grains.
    pub fn new(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        if input.virtual_size == 0 {
            return Err(Error::unsupported("a disk of 0 bytes cannot be a VMDK"));
        }
        let capacity = input.virtual_size.div_ceil(SECTOR);
        let header = VmdkSparseHeader {
            magic: MAGIC,
            version: 3,
            flags: FLAGS,
            capacity,
            grain_size: GRAIN_SECTORS,
            descriptor_offset: DESCRIPTOR_OFFSET,
            descriptor_size: DESCRIPTOR_SIZE,
            grain_table_entries: TABLE_ENTRIES as u32,
            redundant_directory_offset: 0,
            directory_offset: DIRECTORY_AT_END,
            overhead: OVERHEAD,
            unclean_shutdown: 0,
            line_ends: *b"\n \r\n",
            compression: 1,
        };
        let mut head = header.encode().to_vec();
        head.resize((DESCRIPTOR_OFFSET * SECTOR) as usize, 0);
        head.extend(descriptor(input, capacity, "streamOptimized"));
        head.resize((OVERHEAD * SECTOR) as usize, 0);
        let compressor = Compressor::new(Compression::Zlib, input.options.level)?;
        Ok(Self { head, header, compressor, map, tables: capacity.div_ceil(TABLE_ENTRIES * GRAIN_SECTORS) })
    }

    fn directory_sectors(&self) -> u64 {
        (4 * self.tables).div_ceil(SECTOR)
    }
}

/// A marker's sector.
fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut bytes = sectors.to_le_bytes().to_vec();
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.resize(SECTOR as usize, 0);
    bytes
}

impl CompressedLayout for StreamVmdkLayout {
    fn head_size(&self) -> u64 {
        self.head.len() as u64
    }

    fn fixed_head(&self) -> Option<&[u8]> {
        Some(&self.head)
    }

    fn compressor(&self) -> Compressor {
        self.compressor
    }

    fn place(&self, end: FileOffset, payload_size: u32) -> Range<FileOffset> {
        end..end + round_up(GRAIN_HEADER + u64::from(payload_size), SECTOR)
    }

    fn record(&self, unit: u64, _at: FileOffset, payload: Vec<u8>) -> Vec<u8> {
        let mut record = (unit * GRAIN_SECTORS).to_le_bytes().to_vec();
        record.extend((payload.len() as u32).to_le_bytes());
        record.extend(payload);
        record.resize(round_up(record.len() as u64, SECTOR) as usize, 0);
        record
    }

    fn group_table_size(&self) -> u64 {
        (1 + TABLE_SECTORS) * SECTOR
    }

    fn group_table(&self, records: &[Record]) -> Vec<u8> {
        let mut table = vec![0; (TABLE_SECTORS * SECTOR) as usize];
        for record in records {
            let entry = 4 * (record.unit % TABLE_ENTRIES) as usize;
            let sector = (record.place.start.bytes() / SECTOR) as u32;
            header::put(&mut table, entry, &sector.to_le_bytes());
        }
        [marker(TABLE_SECTORS, MARKER_TABLE), table].concat()
    }

    fn largest_file_size(&self) -> u64 {
        let payload = self.compressor.bound(GRAIN_SIZE as usize) as u64;
        let grains = self.map.allocated() * round_up(GRAIN_HEADER + payload, SECTOR);
        let tables = self.tables.min(self.map.allocated()) * self.group_table_size();
        self.head_size() + grains + tables + (self.directory_sectors() + 4) * SECTOR
    }

    fn finish(&self, index: Arc<LengthIndex>) -> Result<Box<dyn Ends>> {
        if index.end().bytes() / SECTOR > u64::from(u32::MAX) {
            let what = "a VMDK holds at most 2 TiB of compressed data and tables, the disk needs more";
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        const { assert!(GROUP_UNITS == TABLE_ENTRIES, "a group of the index has one grain table") };
        let sectors = self.directory_sectors();
        let mut directory = Vec::with_capacity((sectors * SECTOR) as usize);
        for group in 0..self.tables {
            let last = index.records(self, group).last();
            // The table follows its marker, which follows the group's last grain.
            let sector = last.map_or(0, |last| last.place.end.bytes() / SECTOR + 1);
            directory.extend((sector as u32).to_le_bytes());
        }
        directory.resize((sectors * SECTOR) as usize, 0);
        let directory_offset = index.end().bytes() / SECTOR + 1;
        let footer = VmdkSparseHeader { directory_offset, ..self.header.clone() };
        let tail = [
            marker(sectors, MARKER_DIRECTORY),
            directory,
            marker(1, MARKER_FOOTER),
            footer.encode().to_vec(),
            // The end-of-stream marker is all zeros.
            marker(0, 0),
        ];
        Ok(Box::new(PlainEnds { head: self.head.clone(), tail_start: index.end(), tail: tail.concat() }))
    }
}
