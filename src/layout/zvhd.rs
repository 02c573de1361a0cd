//! ZVHD and ZVHD2: records of 2 MiB blocks that are not all zeros, between two headers.
//!
//! Source: see [`crate::header::zvhd`]. A ZVHD is a header, the records, and the header again; its payloads are one
//! zlib stream cut by sync flushes. A ZVHD2 is a header, the records, the header again, an index, a bitmap, and a
//! footer with all fields, which counts; each payload is a zstd frame.

use std::sync::Arc;

use super::LayoutInput;
use super::compressed::{CompressedLayout, Ends, LengthIndex, PlainEnds};
use crate::codec::{Compression, Compressor};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header::vhd::{checksum, geometry};
use crate::header::zvhd::{
    ALIGNMENT, BITMAP_SEGMENT, BLOCK_SIZE, INDEX_SEGMENT, METHOD_ZSTD, RECORD_COOKIE, RECORD_END,
    SIZE_GRANULE, ZVHD_COOKIE, ZVHD2_COOKIE, ZvhdHeader, ZvhdIndexEntry, ZvhdRecordHeader,
};
use crate::units::{FileOffset, SECTOR, TIB, round_up};

/// What begins a zlib stream (RFC 1950, section 2.2: deflate, 32 KiB window, default level), before the first
/// payload of a ZVHD.
const STREAM_START: [u8; 2] = [0x78, 0x9c];

/// Largest disk: its blocks are counted in 32 bits, and its index in 32 bits of bytes.
const MAX_VIRTUAL_SIZE: u64 = 256 * TIB;

/// The arrangement of a ZVHD or ZVHD2.
pub struct ZvhdLayout {
    version: Version,
    header: ZvhdHeader,
    head: Vec<u8>,
    compressor: Compressor,
    map: Arc<AllocationMap>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Zvhd,
    Zvhd2,
}

impl ZvhdLayout {
    /// A ZVHD. The map's units are the blocks.
    pub fn zvhd(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        Self::new(Version::Zvhd, input, map)
    }

    /// A ZVHD2. The map's units are the blocks.
    pub fn zvhd2(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        Self::new(Version::Zvhd2, input, map)
    }

    fn new(version: Version, input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        if input.virtual_size > MAX_VIRTUAL_SIZE {
            let what = format!("a ZVHD holds at most 256 TiB, the disk has {} bytes", input.virtual_size);
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let second = version == Version::Zvhd2;
        let (cylinders, heads, sectors) = geometry(input.virtual_size.div_ceil(SECTOR));
        let header = ZvhdHeader {
            cookie: if second { ZVHD2_COOKIE } else { ZVHD_COOKIE },
            features: 2,
            version: 0x0001_0000,
            data_offset: u64::MAX,
            timestamp: 0,
            creator_application: *b"tap\0",
            creator_version: 0x0001_0004,
            creator_os: 0,
            original_size: input.virtual_size,
            current_size: round_up(input.virtual_size, SIZE_GRANULE),
            geometry: u32::from(cylinders) << 16 | u32::from(heads) << 8 | u32::from(sectors),
            disk_type: 4,
            checksum: 0,
            unique_id: input.seed,
            format_version: second.into(),
            block_size: if second { BLOCK_SIZE as u32 } else { 0 },
            blocks: if second { map.units() as u32 } else { 0 },
            index_offset: 0,
            bitmap_offset: 0,
            index_size: 0,
            bitmap_size: 0,
            index_segment_size: if second { INDEX_SEGMENT as u32 } else { 0 },
            bitmap_segment_size: if second { BITMAP_SEGMENT as u32 } else { 0 },
            index_segments: 0,
            bitmap_segments: 0,
            stored_blocks: 0,
            method: if second { METHOD_ZSTD } else { 0 },
        };
        let compression = if second { Compression::Zstd } else { Compression::DeflateFlushed };
        let compressor = Compressor::new(compression, input.options.level)?;
        Ok(Self { version, head: sealed(header.clone()), header, compressor, map })
    }

    /// Bytes of the payload's own frame in front of what was compressed.
    fn stream_start(&self, at: FileOffset) -> &'static [u8] {
        let first = self.version == Version::Zvhd && at.bytes() == self.head_size();
        if first { &STREAM_START } else { &[] }
    }

    /// Index, bitmap and footer of a ZVHD2.
    fn index_and_footer(&self, index: &LengthIndex) -> Vec<u8> {
        let mut bitmap = vec![0u8; self.map.units().div_ceil(8) as usize];
        let mut entries = Vec::new();
        let mut stored_blocks = 0;
        for record in index.records_from(self, FileOffset(0)) {
            let record_size = (record.place.end - record.place.start) as u32;
            let (record_offset, block) = (record.place.start.bytes(), record.unit as u32);
            entries.extend(ZvhdIndexEntry { record_offset, block, record_size }.encode());
            if let Some(byte) = bitmap.get_mut((record.unit / 8) as usize) {
                *byte |= 1 << (record.unit % 8);
            }
            stored_blocks += 1;
        }
        entries.resize(round_up(entries.len() as u64, INDEX_SEGMENT) as usize, 0);
        bitmap.resize(round_up(bitmap.len() as u64, BITMAP_SEGMENT) as usize, 0);
        let index_offset = index.end().bytes() + ALIGNMENT;
        let footer = ZvhdHeader {
            index_offset,
            bitmap_offset: index_offset + entries.len() as u64,
            index_size: entries.len() as u32,
            bitmap_size: bitmap.len() as u32,
            index_segments: (entries.len() as u64 / INDEX_SEGMENT) as u32,
            bitmap_segments: (bitmap.len() as u64 / BITMAP_SEGMENT) as u32,
            stored_blocks,
            ..self.header.clone()
        };
        [entries, bitmap, sealed(footer)].concat()
    }
}

/// The header's 4096 bytes with their checksum.
fn sealed(mut header: ZvhdHeader) -> Vec<u8> {
    header.checksum = 0;
    header.checksum = checksum(&header.encode(), 64);
    let mut bytes = header.encode().to_vec();
    bytes.resize(ALIGNMENT as usize, 0);
    bytes
}

/// Bytes of the record of a payload of that many bytes.
fn record_size(payload_size: u64) -> u64 {
    round_up((ZvhdRecordHeader::LENGTH + RECORD_END.len()) as u64 + payload_size, ALIGNMENT)
}

impl CompressedLayout for ZvhdLayout {
    fn head_size(&self) -> u64 {
        ALIGNMENT
    }

    fn fixed_head(&self) -> Option<&[u8]> {
        Some(&self.head)
    }

    fn compressor(&self) -> Compressor {
        self.compressor
    }

    fn place(&self, end: FileOffset, payload_size: u32) -> std::ops::Range<FileOffset> {
        let payload_size = u64::from(payload_size) + self.stream_start(end).len() as u64;
        end..end + record_size(payload_size)
    }

    fn record(&self, unit: u64, at: FileOffset, payload: Vec<u8>) -> Vec<u8> {
        let start = self.stream_start(at);
        let payload_size = (start.len() + payload.len()) as u32;
        let header = ZvhdRecordHeader { cookie: RECORD_COOKIE, payload_size, block: unit as u32 };
        let mut record = [&header.encode()[..], start, &payload].concat();
        record.resize(record_size(payload_size.into()) as usize - RECORD_END.len(), 0);
        record.extend(RECORD_END);
        record
    }

    fn largest_file_size(&self) -> u64 {
        let payload = self.compressor.bound(BLOCK_SIZE as usize) + STREAM_START.len();
        let records = self.map.allocated() * record_size(payload as u64);
        let ends = match self.version {
            Version::Zvhd => 2 * ALIGNMENT,
            Version::Zvhd2 => {
                3 * ALIGNMENT
                    + round_up(ZvhdIndexEntry::LENGTH as u64 * self.map.allocated(), INDEX_SEGMENT)
                    + round_up(self.map.units().div_ceil(8), BITMAP_SEGMENT)
            }
        };
        records + ends
    }

    fn finish(&self, index: Arc<LengthIndex>) -> Result<Box<dyn Ends>> {
        let mut tail = self.head.clone();
        if self.version == Version::Zvhd2 {
            tail.extend(self.index_and_footer(&index));
        }
        Ok(Box::new(PlainEnds { head: self.head.clone(), tail_start: index.end(), tail }))
    }
}
