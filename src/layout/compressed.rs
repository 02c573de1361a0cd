//! Compressed layouts: files in which every place depends on how long all units before it became.
//!
//! The units that hold data (clusters, grains, blocks) are compressed one by one and stored in order. Their
//! lengths, four bytes a unit, are a [`LengthIndex`]; with it any byte of the file can be computed again by
//! compressing one unit. The index grows while units are compressed in order, so that a file whose head is
//! fixed can be read from its start before its size is known.

use std::ops::Range;
use std::sync::Arc;

use crate::codec::Compressor;
use crate::error::Result;
use crate::extent::AllocationMap;
use crate::units::FileOffset;

/// Units after which a table may follow their records, and whose start the index knows without adding lengths.
pub const GROUP_UNITS: u64 = 512;

/// A stored unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The unit's number.
    pub unit: u64,
    /// Where its record is.
    pub place: Range<FileOffset>,
    /// Bytes of its payload.
    pub payload_size: u32,
}

/// The arrangement of a compressed file: a head, records in the order of their units, tables, a tail.
pub trait CompressedLayout: Send + Sync {
    /// Bytes before the first record.
    fn head_size(&self) -> u64;

    /// The head, where it does not depend on what follows it: such a file can be written as a stream.
    fn fixed_head(&self) -> Option<&[u8]>;

    /// What units are compressed with.
    fn compressor(&self) -> Compressor;

    /// What is stored for a unit that is not all zeros.
    fn payload(&self, unit: &[u8]) -> Result<Vec<u8>> {
        self.compressor().compress(unit)
    }

    /// Where the record of a payload is put when everything before ends at `end`.
    fn place(&self, end: FileOffset, payload_size: u32) -> Range<FileOffset>;

    /// The record of a payload that is put at `at`.
    fn record(&self, unit: u64, at: FileOffset, payload: Vec<u8>) -> Vec<u8>;

    /// Bytes of the table that follows the records of a group that has any.
    fn group_table_size(&self) -> u64 {
        0
    }

    /// The table of a group with these records, of which there is at least one.
    fn group_table(&self, _records: &[Record]) -> Vec<u8> {
        Vec::new()
    }

    /// Bytes of the file at most.
    fn largest_file_size(&self) -> u64;

    /// What stands around the records, once all lengths are known.
    ///
    /// # Errors
    /// [`TooLarge`](crate::error::ErrorKind::TooLarge) when the records outgrew the format.
    fn finish(&self, index: Arc<LengthIndex>) -> Result<Box<dyn Ends>>;
}

/// Head and tail of a compressed file.
pub trait Ends: Send + Sync {
    /// Exact bytes in the file.
    fn file_size(&self) -> u64;

    /// Fills `buf` from `at`: all of it lies in the head or in the tail.
    fn read(&self, at: FileOffset, buf: &mut [u8]);
}

/// What is at a place between head and tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A record.
    Record(Record),
    /// The table of a group, at this place.
    Table(u64, Range<FileOffset>),
    /// Zeros up to this place.
    Gap(FileOffset),
}

/// The lengths of the payloads so far, in the order of the allocated units.
#[derive(Clone, Debug)]
pub struct LengthIndex {
    map: Arc<AllocationMap>,
    /// By rank. 0 for a unit that turned out to be all zeros and is not stored.
    lengths: Vec<u32>,
    /// Where each group begins, as far as they have begun; after [`close`](Self::close) the end of the last too.
    starts: Vec<FileOffset>,
    /// Where what is known ends.
    end: FileOffset,
    /// Whether the newest group has a record.
    group_has_records: bool,
}

impl LengthIndex {
    /// An index of `map` without any length yet.
    pub fn new(layout: &dyn CompressedLayout, map: Arc<AllocationMap>) -> Self {
        let head = FileOffset(layout.head_size());
        Self { map, lengths: Vec::new(), starts: vec![head], end: head, group_has_records: false }
    }

    /// The units whose lengths are kept.
    pub fn map(&self) -> &Arc<AllocationMap> {
        &self.map
    }

    /// The lengths so far.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// Where what is known ends.
    pub fn end(&self) -> FileOffset {
        self.end
    }

    /// The next units, at most `limit`, whose lengths are to be pushed in this order.
    pub fn pending(&self, limit: usize) -> Vec<u64> {
        let first = self.lengths.len() as u64;
        let last = self.map.allocated().min(first + limit as u64);
        (first..last).filter_map(|rank| self.map.select(rank)).collect()
    }

    /// Adds the length of the next pending unit, 0 when it is all zeros. Says where its record is, if it has one.
    pub fn push(&mut self, layout: &dyn CompressedLayout, payload_size: u32) -> Option<Record> {
        let unit = self.map.select(self.lengths.len() as u64)?;
        self.begin(layout, unit / GROUP_UNITS);
        self.lengths.push(payload_size);
        if payload_size == 0 {
            return None;
        }
        let place = layout.place(self.end, payload_size);
        self.end = place.end;
        self.group_has_records = true;
        Some(Record { unit, place, payload_size })
    }

    /// Ends the last group, after the last length.
    pub fn close(&mut self, layout: &dyn CompressedLayout) {
        self.begin(layout, self.map.units().div_ceil(GROUP_UNITS));
    }

    fn begin(&mut self, layout: &dyn CompressedLayout, group: u64) {
        while (self.starts.len() as u64) <= group {
            if std::mem::take(&mut self.group_has_records) {
                self.end += layout.group_table_size();
            }
            self.starts.push(self.end);
        }
    }

    /// Number of groups that have begun.
    pub fn groups(&self) -> u64 {
        (self.starts.len() as u64).min(self.map.units().div_ceil(GROUP_UNITS))
    }

    /// The records of a group, as far as they are known.
    pub fn records<'a>(
        &'a self,
        layout: &'a dyn CompressedLayout,
        group: u64,
    ) -> impl Iterator<Item = Record> + 'a {
        let first = group * GROUP_UNITS;
        let mut end = self.starts.get(group as usize).copied().unwrap_or(self.end);
        self.map.allocated_in(first..first + GROUP_UNITS).filter_map(move |(unit, rank)| {
            let payload_size = *self.lengths.get(rank as usize)?;
            if payload_size == 0 {
                return None;
            }
            let place = layout.place(end, payload_size);
            end = place.end;
            Some(Record { unit, place, payload_size })
        })
    }

    /// The last group that begins at or before `at`.
    fn group_at(&self, at: FileOffset) -> u64 {
        (self.starts.partition_point(|&start| start <= at) as u64).saturating_sub(1)
    }

    /// What is at `at`, which lies at or after the head and before [`end`](Self::end).
    pub fn piece_at(&self, layout: &dyn CompressedLayout, at: FileOffset) -> Piece {
        let group = self.group_at(at);
        let mut end = self.starts.get(group as usize).copied().unwrap_or_default();
        for record in self.records(layout, group) {
            if at < record.place.start {
                return Piece::Gap(record.place.start);
            }
            if at < record.place.end {
                return Piece::Record(record);
            }
            end = record.place.end;
        }
        Piece::Table(group, end..end + layout.group_table_size())
    }

    /// The records that end after `at`, in order.
    pub fn records_from<'a>(
        &'a self,
        layout: &'a dyn CompressedLayout,
        at: FileOffset,
    ) -> impl Iterator<Item = Record> + 'a {
        let groups = self.group_at(at)..self.groups();
        groups.flat_map(move |group| self.records(layout, group)).filter(move |r| r.place.end > at)
    }
}

/// Head and tail that are kept as bytes.
pub(super) struct PlainEnds {
    pub(super) head: Vec<u8>,
    /// Where the tail begins, and its bytes.
    pub(super) tail_start: FileOffset,
    pub(super) tail: Vec<u8>,
}

impl Ends for PlainEnds {
    fn file_size(&self) -> u64 {
        self.tail_start.bytes() + self.tail.len() as u64
    }

    fn read(&self, at: FileOffset, buf: &mut [u8]) {
        super::copy_overlap(&self.head, FileOffset(0), at, buf);
        super::copy_overlap(&self.tail, self.tail_start, at, buf);
    }
}
