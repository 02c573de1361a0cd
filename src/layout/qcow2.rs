//! qcow2 version 3, uncompressed: header, L1 table, L2 tables, refcount table, refcount blocks, data.
//!
//! Source: QEMU, docs/interop/qcow2.rst. With cs bytes a cluster, P = cs/8 entries a table, N = ⌈S/cs⌉ clusters,
//! A of them allocated, and T L2 tables that have any of those:
//! L1 takes ⌈8·⌈N/P⌉/cs⌉ clusters, and X = 1 + L1 + T + A. Refcount blocks rb and refcount table rt are the least
//! with rb = ⌈(X+rb+rt)/(cs/2)⌉ and rt = ⌈8·rb/cs⌉. The file has X+rb+rt clusters, each with refcount 1.

use std::sync::Arc;

use super::qcow2_frame::{COPIED, Qcow2Frame, Qcow2Head};
use super::{Layout, Region, fill_table, units_region};
use crate::error::Result;
use crate::extent::AllocationMap;
use crate::units::FileOffset;

/// 64 KiB, qemu-img's default.
pub const DEFAULT_CLUSTER_BITS: u32 = 16;

/// The arrangement of an uncompressed qcow2 file.
#[derive(Debug)]
pub struct Qcow2Layout {
    head: Qcow2Head,
    frame: Qcow2Frame,
    map: Arc<AllocationMap>,
    file_size: u64,
}

impl Qcow2Layout {
    /// For a disk of `virtual_size` bytes, which is rounded up to a sector. The map's units are the clusters.
    pub fn new(virtual_size: u64, map: Arc<AllocationMap>) -> Result<Self> {
        let head = Qcow2Head::new(virtual_size, 0, &map)?;
        let tables = map.groups(head.entries())?;
        let frame = Qcow2Frame::new(head.clone(), tables, head.l1_table.end, map.allocated());
        let file_size = frame.refcount_blocks.end.bytes() + map.allocated() * head.cluster_size();
        Ok(Self { head, frame, map, file_size })
    }

    /// The L2 tables that `buf` at `at` overlaps.
    fn fill_l2_tables(&self, at: FileOffset, buf: &mut [u8]) {
        let (data, entries) = (self.frame.refcount_blocks.end, self.head.entries());
        for (index, place) in self.frame.l2_tables_in(at, buf.len() as u64) {
            fill_table(place, at, buf, |indices| {
                let units = index * entries + indices.start..index * entries + indices.end;
                self.map.ranked(units).map(move |rank| match rank {
                    Some(rank) => ((data.bytes() + (rank << self.head.cluster_bits)) | COPIED).to_be_bytes(),
                    None => [0; 8],
                })
            });
        }
    }
}

impl Layout for Qcow2Layout {
    fn file_size(&self) -> u64 {
        self.file_size
    }

    fn region_at(&self, at: FileOffset) -> Region {
        units_region(&self.map, self.frame.refcount_blocks.end, at)
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        self.frame.fill(at, buf);
        self.fill_l2_tables(at, buf);
        let clusters = self.file_size >> self.head.cluster_bits;
        fill_table(self.frame.refcount_blocks.clone(), at, buf, |indices| {
            (indices.start..indices.end.min(clusters)).map(|_| 1u16.to_be_bytes())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::map;
    use super::*;
    use crate::error::ErrorKind;

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
}
