//! qcow2 version 3, compressed: header, L1 table, compressed clusters, L2 tables, refcount table, refcount blocks.
//!
//! Source: QEMU, docs/interop/qcow2.rst, "Compressed Clusters Descriptor". With cb the cluster bits, an entry is
//! bit 62, the number of further sectors above bit x = 62 − (cb − 8), and the byte offset below it. Compressed
//! clusters are packed without gaps; the sectors that one touches count for the refcount of every host cluster that
//! they lie in. A cluster that does not become smaller is stored plain and aligned.

use std::ops::Range;
use std::sync::Arc;

use super::compressed::{CompressedLayout, Ends, GROUP_UNITS, LengthIndex, Record};
use super::qcow2_frame::{COPIED, Qcow2Frame, Qcow2Head, refcount_clusters};
use super::{LayoutInput, copy_overlap, fill_table};
use crate::codec::{Compression, Compressor};
use crate::error::Result;
use crate::extent::AllocationMap;
use crate::header;
use crate::units::{FileOffset, SECTOR, VirtualOffset, round_up};

/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// The arrangement of a compressed qcow2 file.
#[derive(Clone)]
pub struct CompressedQcow2Layout {
    head: Qcow2Head,
    compressor: Compressor,
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
        let head = Qcow2Head::new(input.virtual_size, compression_type, &map)?;
        Ok(Self { head, compressor, map })
    }

    fn cluster_size(&self) -> u64 {
        self.head.cluster_size()
    }

    /// The L2 entry of a stored cluster.
    fn entry(&self, record: &Record) -> u64 {
        let (start, end) = (record.place.start.bytes(), record.place.end.bytes());
        if self.is_plain(record.payload_size) {
            return start | COPIED;
        }
        let further_sectors = (end - 1) / SECTOR - start / SECTOR;
        COMPRESSED | further_sectors << (62 - (self.head.cluster_bits - 8)) | start
    }

    fn is_plain(&self, payload_size: u32) -> bool {
        u64::from(payload_size) >= self.cluster_size()
    }
}

impl CompressedLayout for CompressedQcow2Layout {
    fn head_size(&self) -> u64 {
        self.head.l1_table.end.bytes()
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
        let tables = self.head.l1_entries.min(self.map.allocated());
        // Clusters between two plain ones, and a plain one with the gap before it, take no more than they have.
        let others = (self.head_size() >> self.head.cluster_bits) + self.map.allocated() + 1 + tables;
        let (blocks, table) = refcount_clusters(others, self.cluster_size());
        (others + blocks + table) << self.head.cluster_bits
    }

    fn finish(&self, index: Arc<LengthIndex>) -> Result<Box<dyn Ends>> {
        let entries = self.head.entries();
        let mut tables = AllocationMap::builder(self.head.l1_entries, 1);
        for group in 0..index.groups() {
            for record in index.records(self, group) {
                tables.mark(VirtualOffset(record.unit / entries), 1)?;
            }
        }
        let tables = tables.finish()?;
        let body_end = FileOffset(round_up(index.end().bytes(), self.cluster_size()));
        let frame = Qcow2Frame::new(self.head.clone(), tables, body_end, 0);
        Ok(Box::new(Qcow2Ends { layout: self.clone(), index, frame }))
    }
}

/// What stands around the clusters.
struct Qcow2Ends {
    layout: CompressedQcow2Layout,
    index: Arc<LengthIndex>,
    frame: Qcow2Frame,
}

impl Qcow2Ends {
    /// The L2 table of that number.
    fn l2_table(&self, table: u64) -> Vec<u8> {
        let entries = self.layout.head.entries();
        let units = table * entries..(table + 1) * entries;
        let mut bytes = vec![0; 8 * entries as usize];
        for group in units.start / GROUP_UNITS..units.end.div_ceil(GROUP_UNITS) {
            // Small clusters have several tables in a group.
            for record in self.index.records(&self.layout, group).filter(|r| units.contains(&r.unit)) {
                let at = 8 * (record.unit - units.start) as usize;
                header::put(&mut bytes, at, &self.layout.entry(&record).to_be_bytes());
            }
        }
        bytes
    }

    /// Refcounts of a range of host clusters.
    fn refcounts(&self, clusters: Range<u64>) -> Vec<u16> {
        let bits = self.layout.head.cluster_bits;
        let body = self.layout.head_size() >> bits..self.frame.l2_tables.start.bytes() >> bits;
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
                // A cluster of 2 MiB cannot hold 65536 units: each takes more than 32 bytes.
                if let Some(count) = counts.get_mut((cluster - clusters.start) as usize) {
                    *count = count.saturating_add(1);
                }
            }
        }
        counts
    }
}

impl Ends for Qcow2Ends {
    fn file_size(&self) -> u64 {
        self.frame.refcount_blocks.end.bytes()
    }

    fn read(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        self.frame.fill(at, buf);
        for (index, place) in self.frame.l2_tables_in(at, buf.len() as u64) {
            copy_overlap(&self.l2_table(index), place.start, at, buf);
        }
        let clusters = self.file_size() >> self.layout.head.cluster_bits;
        fill_table(self.frame.refcount_blocks.clone(), at, buf, |indices| {
            self.refcounts(indices.start..indices.end.min(clusters)).into_iter().map(u16::to_be_bytes)
        });
    }
}
