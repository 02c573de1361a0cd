//! qcow2 version 3, uncompressed: header, L1 table, L2 tables, refcount table, refcount blocks, data.
//!
//! Source: QEMU, docs/interop/qcow2.rst. With cs bytes a cluster, P = cs/8 entries a table, N = ⌈S/cs⌉ clusters,
//! A of them allocated, and T L2 tables that have any of those:
//! L1 takes ⌈8·⌈N/P⌉/cs⌉ clusters, and X = 1 + L1 + T + A. Refcount blocks rb and refcount table rt are the least
//! with rb = ⌈(X+rb+rt)/(cs/2)⌉ and rt = ⌈8·rb/cs⌉. The file has X+rb+rt clusters, each with refcount 1.

use std::ops::Range;
use std::sync::Arc;

use super::{Layout, Region, copy_overlap, fill_table, units_region};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header::qcow2::{MAGIC, Qcow2Header, V3_LENGTH};
use crate::units::{FileOffset, MIB, SECTOR, round_up};

/// 64 KiB, qemu-img's default.
pub const DEFAULT_CLUSTER_BITS: u32 = 16;

/// Largest L1 table in bytes that QEMU opens (block/qcow2.h, QCOW_MAX_L1_SIZE).
pub(super) const MAX_L1: u64 = 32 * MIB;

/// Bit 63 of L1 and L2 entries: the cluster's refcount is exactly 1 (qcow2.rst, "Cluster mapping").
pub(super) const COPIED: u64 = 1 << 63;

/// The arrangement of an uncompressed qcow2 file.
#[derive(Debug)]
pub struct Qcow2Layout {
    virtual_size: u64,
    cluster_bits: u32,
    map: Arc<AllocationMap>,
    /// Which L2 tables there are.
    tables: AllocationMap,
    l1_entries: u64,
    l1_table: Range<FileOffset>,
    l2_tables: Range<FileOffset>,
    refcount_table: Range<FileOffset>,
    refcount_blocks: Range<FileOffset>,
    file_size: u64,
}

impl Qcow2Layout {
    /// For a disk of `virtual_size` bytes, which is rounded up to a sector. The map's units are the clusters.
    pub fn new(virtual_size: u64, map: Arc<AllocationMap>) -> Result<Self> {
        let cluster_size = map.unit_size();
        let entries = cluster_size / 8;
        let l1_entries = map.units().div_ceil(entries);
        if l1_entries * 8 > MAX_L1 {
            let what =
                format!("a disk of {virtual_size} bytes needs an L1 table of more than {MAX_L1} bytes");
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let tables = map.groups(entries)?;
        let l1_clusters = (8 * l1_entries).div_ceil(cluster_size);
        let others = 1 + l1_clusters + tables.allocated() + map.allocated();
        let (refcount_blocks, refcount_table) = refcount_clusters(others, cluster_size);
        let after = |start: FileOffset, clusters: u64| start..start + clusters * cluster_size;
        let l1_table = after(FileOffset(cluster_size), l1_clusters);
        let l2_tables = after(l1_table.end, tables.allocated());
        let refcount_table = after(l2_tables.end, refcount_table);
        let refcount_blocks = after(refcount_table.end, refcount_blocks);
        Ok(Self {
            virtual_size: round_up(virtual_size, SECTOR),
            cluster_bits: cluster_size.ilog2(),
            file_size: refcount_blocks.end.bytes() + map.allocated() * cluster_size,
            l1_entries,
            tables,
            map,
            l1_table,
            l2_tables,
            refcount_table,
            refcount_blocks,
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn header(&self) -> [u8; Qcow2Header::LENGTH] {
        let clusters = |range: &Range<FileOffset>| (range.end - range.start) >> self.cluster_bits;
        Qcow2Header {
            magic: MAGIC,
            version: 3,
            backing_file_offset: 0,
            backing_file_size: 0,
            cluster_bits: self.cluster_bits,
            virtual_size: self.virtual_size,
            crypt_method: 0,
            l1_size: self.l1_entries as u32,
            l1_table_offset: self.l1_table.start.bytes(),
            refcount_table_offset: self.refcount_table.start.bytes(),
            refcount_table_clusters: clusters(&self.refcount_table) as u32,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            header_length: V3_LENGTH,
            compression_type: 0,
        }
        .encode()
    }

    /// The L2 tables that `buf` at `at` overlaps.
    fn fill_l2_tables(&self, at: FileOffset, buf: &mut [u8]) {
        let start = at.max(self.l2_tables.start);
        let end = (at + buf.len() as u64).min(self.l2_tables.end);
        if start >= end {
            return;
        }
        let (data, entries) = (self.refcount_blocks.end, self.cluster_size() / 8);
        let ranks = (start - self.l2_tables.start) >> self.cluster_bits
            ..(end - self.l2_tables.start).div_ceil(self.cluster_size());
        for rank in ranks {
            let index = self.tables.select(rank).expect("there are as many tables as the range has");
            let table = self.l2_tables.start + rank * self.cluster_size();
            fill_table(table..table + self.cluster_size(), at, buf, |indices| {
                let units = index * entries + indices.start..index * entries + indices.end;
                self.map.ranked(units).map(move |rank| match rank {
                    Some(rank) => ((data.bytes() + (rank << self.cluster_bits)) | COPIED).to_be_bytes(),
                    None => [0; 8],
                })
            });
        }
    }
}

/// Refcount blocks and refcount table clusters for `others` other clusters: the least fixpoint.
pub(super) fn refcount_clusters(others: u64, cluster_size: u64) -> (u64, u64) {
    let (mut blocks, mut table) = (0, 0);
    loop {
        // A refcount has 16 bits.
        let next_blocks = (others + blocks + table).div_ceil(cluster_size / 2);
        let next_table = (8 * next_blocks).div_ceil(cluster_size);
        if (next_blocks, next_table) == (blocks, table) {
            return (blocks, table);
        }
        (blocks, table) = (next_blocks, next_table);
    }
}

impl Layout for Qcow2Layout {
    fn file_size(&self) -> u64 {
        self.file_size
    }

    fn region_at(&self, at: FileOffset) -> Region {
        units_region(&self.map, self.refcount_blocks.end, at)
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        let (entries, l2, blocks) = (self.l1_entries, self.l2_tables.start, self.refcount_blocks.start);
        copy_overlap(&self.header(), FileOffset(0), at, buf);
        fill_table(self.l1_table.clone(), at, buf, |indices| {
            self.tables.ranked(indices.start..indices.end.min(entries)).map(|rank| match rank {
                Some(rank) => ((l2.bytes() + (rank << self.cluster_bits)) | COPIED).to_be_bytes(),
                None => [0; 8],
            })
        });
        self.fill_l2_tables(at, buf);
        let block_count = (self.refcount_blocks.end - blocks) >> self.cluster_bits;
        fill_table(self.refcount_table.clone(), at, buf, |indices| {
            (indices.start..indices.end.min(block_count))
                .map(|index| (blocks.bytes() + (index << self.cluster_bits)).to_be_bytes())
        });
        let clusters = self.file_size >> self.cluster_bits;
        fill_table(self.refcount_blocks.clone(), at, buf, |indices| {
            (indices.start..indices.end.min(clusters)).map(|_| 1u16.to_be_bytes())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::map;
    use super::*;

    #[test]
    fn sizes_follow_the_formula() {
        // Nothing allocated: header, L1, refcount table, one refcount block.
        let empty = Qcow2Layout::new(10 << 30, map(10 << 30, 65536, &[])).unwrap();
        assert_eq!(empty.file_size(), 4 * 65536);
        // 1 GiB allocated in 512 MiB pieces of L2: two tables, 16384 clusters.
        let full = Qcow2Layout::new(1 << 30, map(1 << 30, 65536, &[(0, 1 << 30)])).unwrap();
        assert_eq!(full.file_size(), (1 + 1 + 2 + 1 + 1 + 16384) * 65536);
    }

    #[test]
    fn a_disk_that_needs_too_large_an_l1_table_is_refused() {
        let error = Qcow2Layout::new(1 << 38, map(1 << 38, 512, &[])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
    }

    #[test]
    fn refcounts_of_every_cluster_size_reach_a_fixpoint() {
        for bits in 9..=21 {
            for others in [1u64, 100, 65_535, 1 << 20, 1 << 32] {
                let cluster_size = 1u64 << bits;
                let (blocks, table) = refcount_clusters(others, cluster_size);
                assert!(blocks * (cluster_size / 2) >= others + blocks + table);
                assert!(table * cluster_size >= 8 * blocks);
            }
        }
    }
}
