//! L2 tables: what a place of the disk is mapped to (qcow2.rst, "Cluster mapping").

use crate::header;
use crate::image::steps;
use crate::units::{FileOffset, SECTOR, Unit};

/// Bits of an L1 or L2 entry that hold a cluster's offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Bit 63: the refcount is 1. With an external data file it tells offset 0 from no offset.
const COPIED: u64 = 1 << 63;

/// Bit 62: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// Bit 0 of a standard entry: the cluster reads as zeros (version 3).
const ZERO: u64 = 1;

/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// Where bytes of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// In the data file from this offset on.
    Data(FileOffset),
    /// In the cluster compressed there; `length` is what the entry declares, rounded up to a sector.
    Compressed { host: FileOffset, length: u64 },
    /// Nowhere, and they read as zeros.
    Zero,
    /// Nowhere here: in the backing file, if there is one.
    Unallocated,
}

/// How an image's tables are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TableShape {
    pub(super) cluster_bits: u32,
    /// Entries of 16 bytes with a bitmap of subclusters.
    pub(super) extended: bool,
    /// Standard clusters are in another file.
    pub(super) external_data: bool,
    /// Whether bit 0 has a meaning: not in version 2.
    pub(super) zero_flag: bool,
}

impl TableShape {
    pub(super) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    fn entries_per_table(self) -> u64 {
        if self.extended { self.cluster_size() / 16 } else { self.cluster_size() / 8 }
    }

    /// Bytes of the disk that one L2 table maps; at most 2^39.
    pub(super) fn bytes_per_table(self) -> u64 {
        self.entries_per_table().saturating_mul(self.cluster_size())
    }

    /// Bytes that one mapping decision covers: a cluster, or a subcluster.
    pub(super) fn unit_size(self) -> u64 {
        if self.extended { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// The mapping at `within` the part of the disk that `table` maps, and how many bytes, at most `limit`, follow
    /// it without a break. `limit` is not 0 and does not lead out of the table.
    pub(super) fn run(self, table: &[u8], within: u64, limit: u64) -> Result<(Mapping, u64), String> {
        let (unit, mut index) = (Unit::of(self.unit_size()), Unit::of(self.unit_size()).index(within));
        let first = match self.unit_mapping(table, index)? {
            Mapping::Data(host) => Mapping::Data(host + unit.within(within)),
            first @ Mapping::Compressed { .. } => {
                return Ok((first, Unit::of(self.cluster_size()).rest(within).min(limit)));
            }
            other => other,
        };
        let mut length = unit.rest(within);
        while length < limit {
            index = index.saturating_add(1);
            let next = self.unit_mapping(table, index)?;
            let continues = match (first, next) {
                (Mapping::Data(start), Mapping::Data(host)) => start.checked_add(length) == Some(host),
                (first, next) => first == next,
            };
            if !continues {
                break;
            }
            length = length.saturating_add(self.unit_size());
        }
        Ok((first, length.min(limit)))
    }

    /// The mapping of the start of a cluster or subcluster.
    fn unit_mapping(self, table: &[u8], unit: u64) -> Result<Mapping, String> {
        steps::count(1);
        if !self.extended {
            return self.standard(entry(table, unit));
        }
        let (cluster, subcluster) = (unit / SUBCLUSTERS, unit % SUBCLUSTERS);
        let first = cluster.saturating_mul(2);
        let (entry, bitmap) = (entry(table, first), entry(table, first.saturating_add(1)));
        if entry & COMPRESSED != 0 {
            return Ok(self.compressed(entry));
        }
        let (allocated, zero) = (is_set(bitmap, subcluster), is_set(bitmap >> SUBCLUSTERS, subcluster));
        match (allocated, zero) {
            (true, true) => {
                Err(format!("subcluster {subcluster} of L2 entry {cluster} is both allocated and zero"))
            }
            (false, true) => Ok(Mapping::Zero),
            (false, false) => Ok(Mapping::Unallocated),
            (true, false) => match self.host(entry)? {
                Some(host) => Ok(Mapping::Data(host + subcluster.saturating_mul(self.unit_size()))),
                None => Err(format!("L2 entry {cluster} has allocated subclusters and no offset")),
            },
        }
    }

    fn standard(self, entry: u64) -> Result<Mapping, String> {
        if entry & COMPRESSED != 0 {
            return Ok(self.compressed(entry));
        }
        if self.zero_flag && entry & ZERO != 0 {
            return Ok(Mapping::Zero);
        }
        Ok(self.host(entry)?.map_or(Mapping::Unallocated, Mapping::Data))
    }

    /// The cluster's offset; `None` when it has none.
    fn host(self, entry: u64) -> Result<Option<FileOffset>, String> {
        let offset = entry & OFFSET_MASK;
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(format!("the L2 entry {entry:#x} is not a cluster's offset"));
        }
        let present = offset != 0 || self.external_data && entry & COPIED != 0;
        Ok(present.then_some(FileOffset(offset)))
    }

    fn compressed(self, entry: u64) -> Mapping {
        // The low bits are the offset, those above the sectors that follow its own.
        let offsets = Unit::of((1 << 62) >> self.cluster_bits.saturating_sub(8).min(61));
        let described = entry & (COMPRESSED - 1);
        let (host, sectors) = (offsets.within(described), offsets.index(described));
        let length = SECTOR.saturating_mul(sectors).saturating_add(Unit::of(SECTOR).rest(host));
        Mapping::Compressed { host: FileOffset(host), length }
    }
}

/// Whether a bit of the lower half of a bitmap is set.
fn is_set(bitmap: u64, bit: u64) -> bool {
    (0..SUBCLUSTERS).contains(&bit) && bitmap & 1 << bit != 0
}

/// The big-endian word of that number of a table, which is inside it.
fn entry(table: &[u8], number: u64) -> u64 {
    usize::try_from(number.saturating_mul(8)).map_or(0, |at| header::big(table, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: TableShape =
        TableShape { cluster_bits: 16, extended: false, external_data: false, zero_flag: true };

    fn table(entries: &[u64]) -> Vec<u8> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(65536, 0);
        bytes
    }

    #[test]
    fn contiguous_clusters_are_one_run() {
        let table = table(&[0x50000 | COPIED, 0x60000 | COPIED, 0x90000 | COPIED, ZERO, ZERO | 0x70000]);
        let run = |within, limit| SHAPE.run(&table, within, limit).unwrap();
        assert_eq!(run(100, 1 << 20), (Mapping::Data(FileOffset(0x50064)), 2 * 65536 - 100));
        assert_eq!(run(100, 10), (Mapping::Data(FileOffset(0x50064)), 10));
        assert_eq!(run(3 * 65536, 1 << 20), (Mapping::Zero, 2 * 65536));
        assert_eq!(run(5 * 65536, 1 << 20), (Mapping::Unallocated, 1 << 20));
    }

    #[test]
    fn compressed_entries_are_taken_apart() {
        // Cluster bits 16: 54 bits of offset, then sectors less one.
        let table = table(&[COMPRESSED | 2 << 54 | 0x12345]);
        let expected = Mapping::Compressed { host: FileOffset(0x12345), length: 3 * 512 - 0x145 };
        assert_eq!(SHAPE.run(&table, 10, 1 << 20).unwrap(), (expected, 65526));
    }

    #[test]
    fn subclusters_are_told_by_their_bits() {
        let shape = TableShape { extended: true, ..SHAPE };
        let table = table(&[0x50000, 0b0110 | 1 << 32, 0, 1, 0x60000, 1 | 1 << 32]);
        let run = |within| shape.run(&table, within, 65536 - within % 65536);
        assert_eq!(run(0).unwrap(), (Mapping::Zero, 2048));
        assert_eq!(run(2048).unwrap(), (Mapping::Data(FileOffset(0x50800)), 4096));
        assert_eq!(run(3 * 2048).unwrap(), (Mapping::Unallocated, 29 * 2048));
        assert!(run(65536).unwrap_err().contains("no offset"));
        assert!(run(2 * 65536).unwrap_err().contains("both"));
    }

    #[test]
    fn offset_zero_of_a_data_file_needs_its_flag() {
        let shape = TableShape { external_data: true, ..SHAPE };
        let table = table(&[COPIED, 0]);
        assert_eq!(shape.run(&table, 0, 65536).unwrap().0, Mapping::Data(FileOffset(0)));
        assert_eq!(shape.run(&table, 65536, 65536).unwrap().0, Mapping::Unallocated);
        assert_eq!(SHAPE.run(&table, 0, 65536).unwrap().0, Mapping::Unallocated);
    }
}
