//! What plain and compressed qcow2 files have alike: header, L1 table, and the places of L2 tables and refcounts.
//!
//! Source: QEMU, docs/interop/qcow2.rst. With cs bytes a cluster and P = cs/8 entries a table, a disk of N clusters has
//! ⌈N/P⌉ L1 entries, behind the header's cluster. Refcount table and refcount blocks follow the L2 tables.

use std::ops::Range;

use super::{copy_overlap, fill_table};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header::qcow2::{MAGIC, Qcow2Header, V3_LENGTH};
use crate::units::{FileOffset, MIB, SECTOR, round_up};

/// Largest L1 table in bytes that QEMU opens (block/qcow2.h, QCOW_MAX_L1_SIZE).
const MAX_L1: u64 = 32 * MIB;

/// Bit 63 of L1 and L2 entries: the cluster's refcount is exactly 1 (qcow2.rst, "Cluster mapping").
pub(super) const COPIED: u64 = 1 << 63;

/// Incompatible feature bit 3: the compression type is not zlib.
const COMPRESSION_TYPE: u64 = 1 << 3;

/// What is known before the clusters are.
#[derive(Clone, Debug)]
pub(super) struct Qcow2Head {
    /// Rounded up to a sector.
    virtual_size: u64,
    pub(super) cluster_bits: u32,
    /// 0 zlib, 1 zstd.
    compression_type: u8,
    pub(super) l1_entries: u64,
    pub(super) l1_table: Range<FileOffset>,
}

impl Qcow2Head {
    /// For a disk of `virtual_size` bytes. The map's units are the clusters.
    pub(super) fn new(virtual_size: u64, compression_type: u8, map: &AllocationMap) -> Result<Self> {
        let cluster_size = map.unit_size();
        let l1_entries = map.units().div_ceil(cluster_size / 8);
        if l1_entries * 8 > MAX_L1 {
            let what =
                format!("a disk of {virtual_size} bytes needs an L1 table of more than {MAX_L1} bytes");
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let start = FileOffset(cluster_size);
        Ok(Self {
            virtual_size: round_up(virtual_size, SECTOR),
            cluster_bits: cluster_size.ilog2(),
            compression_type,
            l1_entries,
            l1_table: start..start + round_up(8 * l1_entries, cluster_size),
        })
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(super) fn entries(&self) -> u64 {
        self.cluster_size() / 8
    }
}

/// Where the tables are.
#[derive(Debug)]
pub(super) struct Qcow2Frame {
    head: Qcow2Head,
    /// Which L2 tables there are.
    tables: AllocationMap,
    pub(super) l2_tables: Range<FileOffset>,
    refcount_table: Range<FileOffset>,
    pub(super) refcount_blocks: Range<FileOffset>,
}

impl Qcow2Frame {
    /// L2 tables begin at `start`; `following` clusters come behind the refcount blocks.
    pub(super) fn new(head: Qcow2Head, tables: AllocationMap, start: FileOffset, following: u64) -> Self {
        let after = |start: FileOffset, clusters: u64| start..start + clusters * head.cluster_size();
        let l2_tables = after(start, tables.allocated());
        let others = (l2_tables.end.bytes() >> head.cluster_bits) + following;
        let (blocks, table) = refcount_clusters(others, head.cluster_size());
        let refcount_table = after(l2_tables.end, table);
        let refcount_blocks = after(refcount_table.end, blocks);
        Self { head, tables, l2_tables, refcount_table, refcount_blocks }
    }

    fn header(&self) -> [u8; Qcow2Header::LENGTH] {
        let head = &self.head;
        Qcow2Header {
            magic: MAGIC,
            version: 3,
            backing_file_offset: 0,
            backing_file_size: 0,
            cluster_bits: head.cluster_bits,
            virtual_size: head.virtual_size,
            crypt_method: 0,
            l1_size: head.l1_entries as u32,
            l1_table_offset: head.l1_table.start.bytes(),
            refcount_table_offset: self.refcount_table.start.bytes(),
            refcount_table_clusters: ((self.refcount_table.end - self.refcount_table.start)
                >> head.cluster_bits) as u32,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: if head.compression_type == 0 { 0 } else { COMPRESSION_TYPE },
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            header_length: V3_LENGTH,
            compression_type: head.compression_type,
        }
        .encode()
    }

    /// Fills what `buf` at `at` has of header, L1 table and refcount table.
    pub(super) fn fill(&self, at: FileOffset, buf: &mut [u8]) {
        let (head, bits) = (&self.head, self.head.cluster_bits);
        copy_overlap(&self.header(), FileOffset(0), at, buf);
        fill_table(head.l1_table.clone(), at, buf, |indices| {
            self.tables.ranked(indices.start..indices.end.min(head.l1_entries)).map(|rank| match rank {
                Some(rank) => ((self.l2_tables.start.bytes() + (rank << bits)) | COPIED).to_be_bytes(),
                None => [0; 8],
            })
        });
        let blocks = self.refcount_blocks.start.bytes();
        let count = (self.refcount_blocks.end.bytes() - blocks) >> bits;
        fill_table(self.refcount_table.clone(), at, buf, |indices| {
            (indices.start..indices.end.min(count)).map(|index| (blocks + (index << bits)).to_be_bytes())
        });
    }

    /// The L2 tables that `length` bytes at `at` overlap: their L1 indices and their places.
    pub(super) fn l2_tables_in(
        &self,
        at: FileOffset,
        length: u64,
    ) -> impl Iterator<Item = (u64, Range<FileOffset>)> + '_ {
        let cluster_size = self.head.cluster_size();
        let start = at.clamp(self.l2_tables.start, self.l2_tables.end);
        let end = (at + length).clamp(start, self.l2_tables.end);
        let ranks = (start - self.l2_tables.start) / cluster_size
            ..(end - self.l2_tables.start).div_ceil(cluster_size);
        ranks.map(move |rank| {
            let index = self.tables.select(rank).expect("there are as many tables as the range has");
            let place = self.l2_tables.start + rank * cluster_size;
            (index, place..place + cluster_size)
        })
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

#[cfg(test)]
mod tests {
    use super::*;

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
