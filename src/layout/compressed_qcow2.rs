//! qcow2 version 3, compressed: header, L1 table, compressed clusters, L2 tables, refcount table, refcount blocks.
//!
//! Source: QEMU, docs/interop/qcow2.rst, "Compressed Clusters Descriptor". With cb the cluster bits, an entry is
//! bit 62, the number of further sectors above bit x = 62 − (cb − 8), and the byte offset below it. Compressed
//! clusters are packed without gaps; the sectors that one touches count for the refcount of every host cluster that
//! they lie in. A cluster that does not become smaller is stored plain and aligned.

use std::ops::Range;
use std::sync::Arc;

use super::compressed::{CompressedLayout, Ends, GROUP_UNITS, LengthIndex, Record};
use super::qcow2::{COPIED, MAX_L1, refcount_clusters};
use super::{LayoutInput, copy_overlap, fill_table};
use crate::codec::{Compression, Compressor};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header::qcow2::{MAGIC, Qcow2Header, V3_LENGTH};
use crate::units::{FileOffset, SECTOR, VirtualOffset, round_up};

/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// Incompatible feature bit 3: the compression type is not zlib.
const COMPRESSION_TYPE: u64 = 1 << 3;

/// The arrangement of a compressed qcow2 file.
#[derive(Clone)]
pub struct CompressedQcow2Layout {
    virtual_size: u64,
    cluster_bits: u32,
    compressor: Compressor,
    compression_type: u8,
    l1_entries: u64,
    l1_table: Range<FileOffset>,
    map: Arc<AllocationMap>,
}

impl CompressedQcow2Layout {
    /// Clusters compressed with raw deflate, which the format calls zlib. The map's units are the clusters.
    pub fn zlib(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        let compression =
            if input.options.large_window { Compression::Deflate } else { Compression::DeflateSmallWindow };
        Self::new(input, map, Compressor::new(compression, input.options.level)?, 0)
    }

    /// Clusters compressed with zstd. The map's units are the clusters.
    pub fn zstd(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        Self::new(input, map, Compressor::new(Compression::Zstd, input.options.level)?, 1)
    }

    fn new(
        input: &LayoutInput,
        map: Arc<AllocationMap>,
        compressor: Compressor,
        compression_type: u8,
    ) -> Result<Self> {
        let cluster_size = map.unit_size();
        let l1_entries = map.units().div_ceil(cluster_size / 8);
        if l1_entries * 8 > MAX_L1 {
            let what = format!(
                "a disk of {} bytes needs an L1 table of more than {MAX_L1} bytes",
                input.virtual_size
            );
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let l1_table =
            FileOffset(cluster_size)..FileOffset(cluster_size + round_up(8 * l1_entries, cluster_size));
        Ok(Self {
            virtual_size: round_up(input.virtual_size, SECTOR),
            cluster_bits: cluster_size.ilog2(),
            compressor,
            compression_type,
            l1_entries,
            l1_table,
            map,
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The L2 entry of a stored cluster.
    fn entry(&self, record: &Record) -> u64 {
        let (start, end) = (record.place.start.bytes(), record.place.end.bytes());
        if self.is_plain(record.payload_size) {
            return start | COPIED;
        }
        let further_sectors = (end - 1) / SECTOR - start / SECTOR;
        COMPRESSED | further_sectors << (62 - (self.cluster_bits - 8)) | start
    }

    fn is_plain(&self, payload_size: u32) -> bool {
        u64::from(payload_size) >= self.cluster_size()
    }
}

impl CompressedLayout for CompressedQcow2Layout {
    fn head_size(&self) -> u64 {
        self.l1_table.end.bytes()
    }

    fn fixed_head(&self) -> Option<&[u8]> {
        None
    }

    fn compressor(&self) -> Compressor {
        self.compressor
    }

    fn payload(&self, unit: &[u8]) -> Result<Vec<u8>> {
        let payload = self.compressor.compress(unit)?;
        Ok(if payload.len() < unit.len() { payload } else { unit.to_vec() })
    }

    fn place(&self, end: FileOffset, payload_size: u32) -> Range<FileOffset> {
        let plain = self.is_plain(payload_size);
        let start = if plain { FileOffset(round_up(end.bytes(), self.cluster_size())) } else { end };
        start..start + u64::from(payload_size)
    }

    fn record(&self, _unit: u64, _at: FileOffset, payload: Vec<u8>) -> Vec<u8> {
        payload
    }

    fn largest_file_size(&self) -> u64 {
        let tables = self.l1_entries.min(self.map.allocated());
        // Clusters between two plain ones, and a plain one with the gap before it, take no more than they have.
        let others = (self.head_size() >> self.cluster_bits) + self.map.allocated() + 1 + tables;
        let (blocks, table) = refcount_clusters(others, self.cluster_size());
        (others + blocks + table) << self.cluster_bits
    }

    fn finish(&self, index: Arc<LengthIndex>) -> Result<Box<dyn Ends>> {
        let entries = self.cluster_size() / 8;
        let mut tables = AllocationMap::builder(self.l1_entries, 1);
        for group in 0..index.groups() {
            for record in index.records(self, group) {
                tables.mark(VirtualOffset(record.unit / entries), 1)?;
            }
        }
        let tables = tables.finish()?;
        let after = |start: FileOffset, clusters: u64| start..start + clusters * self.cluster_size();
        let body_end = FileOffset(round_up(index.end().bytes(), self.cluster_size()));
        let l2_tables = after(body_end, tables.allocated());
        let others = l2_tables.end.bytes() >> self.cluster_bits;
        let (blocks, table) = refcount_clusters(others, self.cluster_size());
        let refcount_table = after(l2_tables.end, table);
        let refcount_blocks = after(refcount_table.end, blocks);
        Ok(Box::new(Qcow2Ends {
            layout: self.clone(),
            index,
            tables,
            l2_tables,
            refcount_table,
            refcount_blocks,
        }))
    }
}

/// What stands around the clusters.
struct Qcow2Ends {
    layout: CompressedQcow2Layout,
    index: Arc<LengthIndex>,
    /// Which L2 tables there are.
    tables: AllocationMap,
    l2_tables: Range<FileOffset>,
    refcount_table: Range<FileOffset>,
    refcount_blocks: Range<FileOffset>,
}

impl Qcow2Ends {
    fn header(&self) -> [u8; Qcow2Header::LENGTH] {
        let layout = &self.layout;
        let zstd = layout.compression_type != 0;
        Qcow2Header {
            magic: MAGIC,
            version: 3,
            backing_file_offset: 0,
            backing_file_size: 0,
            cluster_bits: layout.cluster_bits,
            virtual_size: layout.virtual_size,
            crypt_method: 0,
            l1_size: layout.l1_entries as u32,
            l1_table_offset: layout.l1_table.start.bytes(),
            refcount_table_offset: self.refcount_table.start.bytes(),
            refcount_table_clusters: ((self.refcount_table.end - self.refcount_table.start)
                >> layout.cluster_bits) as u32,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: if zstd { COMPRESSION_TYPE } else { 0 },
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            header_length: V3_LENGTH,
            compression_type: layout.compression_type,
        }
        .encode()
    }

    /// The L2 tables that `buf` at `at` overlaps.
    fn fill_l2_tables(&self, at: FileOffset, buf: &mut [u8]) {
        let cluster_size = self.layout.cluster_size();
        let start = at.max(self.l2_tables.start);
        let end = (at + buf.len() as u64).min(self.l2_tables.end);
        if start >= end {
            return;
        }
        let ranks = (start - self.l2_tables.start) / cluster_size
            ..(end - self.l2_tables.start).div_ceil(cluster_size);
        for rank in ranks {
            let index = self.tables.select(rank).expect("there are as many tables as the range has");
            copy_overlap(&self.l2_table(index), self.l2_tables.start + rank * cluster_size, at, buf);
        }
    }

    /// The L2 table of that number.
    fn l2_table(&self, table: u64) -> Vec<u8> {
        let entries = self.layout.cluster_size() / 8;
        let units = table * entries..(table + 1) * entries;
        let mut bytes = vec![0; 8 * entries as usize];
        for group in units.start / GROUP_UNITS..units.end.div_ceil(GROUP_UNITS) {
            // Small clusters have several tables in a group.
            for record in self.index.records(&self.layout, group).filter(|r| units.contains(&r.unit)) {
                let at = 8 * (record.unit - units.start) as usize;
                bytes[at..at + 8].copy_from_slice(&self.layout.entry(&record).to_be_bytes());
            }
        }
        bytes
    }

    /// Refcounts of a range of host clusters.
    fn refcounts(&self, clusters: Range<u64>) -> Vec<u16> {
        let bits = self.layout.cluster_bits;
        let body = self.layout.head_size() >> bits..self.l2_tables.start.bytes() >> bits;
        // Tables are used once.
        let mut counts: Vec<u16> = clusters.clone().map(|c| u16::from(!body.contains(&c))).collect();
        let from = FileOffset((clusters.start << bits).max(self.layout.head_size()));
        for record in self.index.records_from(&self.layout, from) {
            let first = record.place.start.bytes() >> bits;
            let last = (round_up(record.place.end.bytes(), SECTOR) - 1) >> bits;
            if first >= clusters.end {
                break;
            }
            for cluster in first.max(clusters.start)..(last + 1).min(clusters.end) {
                let count = &mut counts[(cluster - clusters.start) as usize];
                // A cluster of 2 MiB cannot hold 65536 units: each takes more than 32 bytes.
                *count = count.saturating_add(1);
            }
        }
        counts
    }
}

impl Ends for Qcow2Ends {
    fn file_size(&self) -> u64 {
        self.refcount_blocks.end.bytes()
    }

    fn read(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        let (layout, l2) = (&self.layout, self.l2_tables.start);
        copy_overlap(&self.header(), FileOffset(0), at, buf);
        fill_table(layout.l1_table.clone(), at, buf, |indices| {
            self.tables.ranked(indices.start..indices.end.min(layout.l1_entries)).map(|rank| match rank {
                Some(rank) => ((l2.bytes() + (rank << layout.cluster_bits)) | COPIED).to_be_bytes(),
                None => [0; 8],
            })
        });
        self.fill_l2_tables(at, buf);
        let blocks = (self.refcount_blocks.end - self.refcount_blocks.start) >> layout.cluster_bits;
        fill_table(self.refcount_table.clone(), at, buf, |indices| {
            (indices.start..indices.end.min(blocks)).map(|index| {
                (self.refcount_blocks.start.bytes() + (index << layout.cluster_bits)).to_be_bytes()
            })
        });
        let clusters = self.file_size() >> layout.cluster_bits;
        fill_table(self.refcount_blocks.clone(), at, buf, |indices| {
            self.refcounts(indices.start..indices.end.min(clusters)).into_iter().map(u16::to_be_bytes)
        });
    }
}
