//! The log of a VHDX: changes of metadata that were promised and may not have reached their places.
//!
//! Source: [MS-VHDX], section 2.3. Entries are put over what the file has, in memory, in the order of the newest
//! valid sequence.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::checksum;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentKind};
use crate::header::vhdx::{
    Guid, LOG_DATA_SIGNATURE, LOG_SECTOR_SIGNATURE, LOG_SIGNATURE, LOG_ZERO_SIGNATURE, VhdxHeader,
    VhdxLogDescriptor, VhdxLogHeader,
};
use crate::image::steps;
use crate::storage::{Generation, Storage, check_range};
use crate::units::{FileOffset, memory_size};

/// Entries and data are aligned to this (section 2.3).
const SECTOR: usize = 4 << 10;

/// Largest log that is read; writers make one of 1 MiB.
const MAX_LOG: u32 = 64 << 20;

/// Changes that are kept at most, after those that others cover are gone. A log of 64 MiB has 16,384 data sectors.
const MAX_CHANGES: usize = 1 << 18;

/// Bytes that the entries of a log, those that turn out to be damaged too, may have together, in sizes of the log: a
/// sector is a part of one entry, but of an old and a new one where a new one has covered an old one in part.
const MAX_CHECKED: usize = 4;

/// `storage` with the changes of its log over it.
pub(super) fn replay(storage: Arc<dyn Storage>, header: &VhdxHeader) -> Result<Arc<dyn Storage>> {
    let start = FileOffset(header.log_offset);
    if header.log_length > MAX_LOG || !(header.log_length as usize).is_multiple_of(SECTOR) {
        return Err(Error::unsupported(format!("a log of {} bytes is not supported", header.log_length)));
    }
    check_range(&*storage, start, header.log_length.into())?;
    let mut bytes = vec![0; header.log_length as usize];
    storage.read_exact_at(start, &mut bytes)?;
    let mut log = Log { bytes, guid: header.log_guid, checked: 0 };
    let sequence = log.newest_sequence().map_err(|e| e.at(start))?.ok_or_else(|| {
        Error::corrupt("the log says that it has to be replayed, and has no valid entry").at(start)
    })?;
    let mut file_size = storage.file_size();
    let mut changes = Changes::default();
    for entry in &sequence {
        if entry.header.flushed_file_offset > storage.file_size() {
            let what = format!(
                "the log expects a file of {} bytes; it is truncated",
                entry.header.flushed_file_offset
            );
            return Err(Error::corrupt(what).at(start));
        }
        file_size = file_size.max(entry.header.last_file_offset);
        entry.apply(&log.entry_bytes(entry), &mut changes).map_err(|e| e.at(start + entry.at as u64))?;
    }
    Ok(Arc::new(ReplayedStorage { storage, file_size, changes }))
}

/// A log, which is a ring of sectors.
struct Log {
    bytes: Vec<u8>,
    guid: Guid,
    /// Bytes of entries whose checksum was looked at.
    checked: usize,
}

/// A log entry that is whole.
struct LogEntry {
    header: VhdxLogHeader,
    /// Where in the log it is.
    at: usize,
}

impl LogEntry {
    fn length(&self) -> usize {
        self.header.entry_length as usize
    }
}

impl Log {
    /// The parts of an entry before and after the ring's end.
    fn parts(&self, at: usize, length: usize) -> [&[u8]; 2] {
        let behind = self.bytes.get(at..).unwrap_or_default();
        match behind.get(..length) {
            Some(whole) => [whole, &[]],
            None => [behind, self.bytes.get(..length.saturating_sub(behind.len())).unwrap_or_default()],
        }
    }

    fn entry_bytes(&self, entry: &LogEntry) -> Vec<u8> {
        self.parts(entry.at, entry.length()).concat()
    }

    /// The valid entry at `at`.
    fn entry_at(&mut self, at: usize) -> Result<Option<LogEntry>> {
        let header = self.bytes.get(at..).and_then(VhdxLogHeader::parse_first);
        let Some(header) = header else { return Ok(None) };
        let length = header.entry_length as usize;
        let whole = length >= SECTOR && length.is_multiple_of(SECTOR) && length <= self.bytes.len();
        if header.signature != LOG_SIGNATURE
            || header.log_guid != self.guid
            || !whole
            || header.sequence_number == 0
        {
            return Ok(None);
        }
        self.checked = self.checked.saturating_add(length);
        steps::count((length / SECTOR) as u64);
        if self.checked > self.bytes.len().saturating_mul(MAX_CHECKED) {
            return Err(Error::corrupt("the log's entries overlap"));
        }
        let valid = header.checksum == checksum(&self.parts(at, length));
        Ok(valid.then_some(LogEntry { header, at }))
    }

    /// The entries to replay, oldest first: the sequence whose last entry is the newest (section 2.3.2).
    fn newest_sequence(&mut self) -> Result<Option<Vec<LogEntry>>> {
        let mut newest: Option<Vec<LogEntry>> = None;
        let mut at = 0;
        while at < self.bytes.len() {
            let sequence = self.sequence_from(at)?;
            at = at.saturating_add(sequence.iter().map(LogEntry::length).sum::<usize>().max(SECTOR));
            let Some(head) = sequence.last() else { continue };
            // What comes before the head's tail was written to its place already.
            let Some(tail) = sequence.iter().position(|entry| entry.at == head.header.tail as usize) else {
                continue;
            };
            let number = |entries: &[LogEntry]| entries.last().map_or(0, |head| head.header.sequence_number);
            if newest.as_ref().is_none_or(|other| number(other) < number(&sequence)) {
                newest = Some(sequence.into_iter().skip(tail).collect());
            }
        }
        Ok(newest)
    }

    /// Consecutive valid entries from `at` on.
    fn sequence_from(&mut self, at: usize) -> Result<Vec<LogEntry>> {
        let mut entries: Vec<LogEntry> = Vec::new();
        let (mut next, mut length) = (at, 0);
        while length < self.bytes.len() {
            let Some(entry) = self.entry_at(next)? else { break };
            let number = |entry: &LogEntry| entry.header.sequence_number;
            if entries.last().is_some_and(|last| number(last).checked_add(1) != Some(number(&entry))) {
                break;
            }
            // A ring.
            next = next.saturating_add(entry.length());
            next = next.checked_sub(self.bytes.len()).unwrap_or(next);
            length = length.saturating_add(entry.length());
            entries.push(entry);
        }
        Ok(entries)
    }
}

impl LogEntry {
    /// Adds what the entry, whose bytes these are, changes. Descriptors come first, rounded up to sectors; then the data
    /// in their order.
    fn apply(&self, entry: &[u8], changes: &mut Changes) -> Result<()> {
        let damaged = |what: &str| Error::corrupt(format!("a log entry is damaged: {what}"));
        let count = self.header.descriptor_count as usize;
        let descriptors =
            count.saturating_mul(VhdxLogDescriptor::LENGTH).saturating_add(VhdxLogHeader::LENGTH);
        if descriptors > entry.len() {
            return Err(damaged("it has too many descriptors"));
        }
        let data = entry.get(descriptors.next_multiple_of(SECTOR)..).unwrap_or_default();
        let mut data = data.chunks_exact(SECTOR);
        let descriptors = entry.get(VhdxLogHeader::LENGTH..descriptors).unwrap_or_default();
        let descriptors = descriptors.chunks_exact(VhdxLogDescriptor::LENGTH);
        for descriptor in descriptors.filter_map(VhdxLogDescriptor::parse_first) {
            if descriptor.sequence_number != self.header.sequence_number {
                return Err(damaged("a descriptor has another sequence number"));
            }
            let bytes = match descriptor.signature {
                LOG_ZERO_SIGNATURE => None,
                LOG_DATA_SIGNATURE => {
                    let sector = data.next().ok_or_else(|| damaged("data is missing"))?;
                    Some(self.sector(&descriptor, sector).ok_or_else(|| damaged("a data sector is torn"))?)
                }
                _ => return Err(damaged("a descriptor's signature is wrong")),
            };
            let length = bytes.as_ref().map_or(descriptor.leading_bytes_or_length, |b| b.len() as u64);
            let end = descriptor.file_offset.checked_add(length);
            let end = end.filter(|end| *end <= self.header.last_file_offset);
            let end = end.ok_or_else(|| damaged("it changes what lies past the file's end"))?;
            changes.put(descriptor.file_offset..end, bytes)?;
        }
        Ok(())
    }

    /// A data sector has parts of the sequence number where the descriptor keeps its bytes (section 2.3.1.4).
    fn sector(&self, descriptor: &VhdxLogDescriptor, sector: &[u8]) -> Option<Vec<u8>> {
        let number = self.header.sequence_number.to_le_bytes();
        let (low, high) = number.split_at(4);
        let bytes = sector.strip_prefix(&LOG_SECTOR_SIGNATURE)?.strip_prefix(high)?.strip_suffix(low)?;
        let leading = descriptor.leading_bytes_or_length.to_le_bytes();
        Some([&leading, bytes, &descriptor.trailing_bytes[..]].concat())
    }
}

/// Changes of a file, by their starts: none overlaps another, the newest counts.
#[derive(Default)]
struct Changes {
    by_start: BTreeMap<u64, Change>,
}

/// A change of the file.
#[derive(Clone)]
struct Change {
    end: u64,
    /// The bytes, of which the change begins with the one at `from`; `None` for zeros.
    bytes: Option<Arc<Vec<u8>>>,
    from: u64,
}

impl Changes {
    /// Puts a change over those before it. `bytes` are as many as the range has.
    fn put(&mut self, range: Range<u64>, bytes: Option<Vec<u8>>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        steps::count(1);
        if let Some((start, before)) = self.by_start.range_mut(..range.start).next_back()
            && before.end > range.start
        {
            let (start, rest) = (*start, before.clone());
            before.end = range.start;
            self.keep_after(range.end, start, rest);
        }
        while let Some(start) = self.by_start.range(range.clone()).next().map(|(start, _)| *start) {
            if let Some(covered) = self.by_start.remove(&start) {
                self.keep_after(range.end, start, covered);
            }
        }
        self.by_start.insert(range.start, Change { end: range.end, bytes: bytes.map(Arc::new), from: 0 });
        if self.by_start.len() > MAX_CHANGES {
            return Err(Error::unsupported(format!(
                "a log of more than {MAX_CHANGES} changes is not replayed"
            )));
        }
        Ok(())
    }

    /// Keeps what a change that began at `start` has after `end`.
    fn keep_after(&mut self, end: u64, start: u64, change: Change) {
        if change.end > end {
            self.by_start.insert(
                end,
                Change { from: change.from.saturating_add(end.saturating_sub(start)), ..change },
            );
        }
    }

    /// Puts the changes over the bytes of the file at `at`.
    fn apply(&self, at: u64, buf: &mut [u8]) {
        let end = at.saturating_add(buf.len() as u64);
        let before = self.by_start.range(..at).next_back();
        for (start, change) in before.into_iter().chain(self.by_start.range(at..end)) {
            let (from, to) = (at.max(*start), end.min(change.end));
            if from < to {
                let part = [from, to].map(|place| memory_size(place.saturating_sub(at)));
                let target = buf.get_mut(part[0]..part[1]).unwrap_or_default();
                let first = memory_size(change.from.saturating_add(from.saturating_sub(*start)));
                let bytes = change.bytes.as_ref();
                match bytes.map(|bytes| bytes.get(first..first.saturating_add(target.len()))) {
                    Some(Some(bytes)) => target.copy_from_slice(bytes),
                    _ => target.fill(0),
                }
            }
        }
    }
}

/// A file with changes over it.
struct ReplayedStorage {
    storage: Arc<dyn Storage>,
    file_size: u64,
    changes: Changes,
}

impl Storage for ReplayedStorage {
    fn name(&self) -> &str {
        self.storage.name()
    }

    fn file_size(&self) -> u64 {
        self.file_size
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        check_range(self, at, buf.len() as u64)?;
        // The log may have made the file larger than it is on disk.
        let inside = memory_size(self.storage.file_size().saturating_sub(at.bytes())).min(buf.len());
        let (inside, behind) = buf.split_at_mut(inside);
        behind.fill(0);
        if !inside.is_empty() {
            self.storage.read_exact_at(at, inside)?;
        }
        self.changes.apply(at.bytes(), buf);
        Ok(())
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.file_size.saturating_sub(at.bytes()).max(1)))
    }

    fn generation(&self) -> &Generation {
        self.storage.generation()
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage.verify_unchanged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    const GUID: Guid = [7; 16];

    fn seal(mut entry: Vec<u8>) -> Vec<u8> {
        let sum = checksum(&[&entry]);
        entry[4..8].copy_from_slice(&sum.to_le_bytes());
        entry
    }

    /// An entry that writes a sector and zeros a run, laid out by the specification's tables.
    fn entry(number: u64, tail: u32, sector: (u64, u8), zeros: (u64, u64), file_size: u64) -> Vec<u8> {
        let header = VhdxLogHeader {
            signature: LOG_SIGNATURE,
            checksum: 0,
            entry_length: 8192,
            tail,
            sequence_number: number,
            descriptor_count: 2,
            log_guid: GUID,
            flushed_file_offset: 0,
            last_file_offset: file_size,
        };
        let mut bytes = header.encode().to_vec();
        let descriptor = |signature, first: u64, file_offset| VhdxLogDescriptor {
            signature,
            trailing_bytes: [sector.1; 4],
            leading_bytes_or_length: first,
            file_offset,
            sequence_number: number,
        };
        bytes.extend(descriptor(LOG_DATA_SIGNATURE, u64::from_le_bytes([sector.1; 8]), sector.0).encode());
        bytes.extend(descriptor(LOG_ZERO_SIGNATURE, zeros.1, zeros.0).encode());
        bytes.resize(4096, 0);
        bytes.extend(LOG_SECTOR_SIGNATURE);
        bytes.extend(((number >> 32) as u32).to_le_bytes());
        bytes.resize(8192 - 4, sector.1);
        bytes.extend((number as u32).to_le_bytes());
        seal(bytes)
    }

    fn header() -> VhdxHeader {
        let mut header = VhdxHeader::parse(&[0; VhdxHeader::LENGTH]);
        (header.log_guid, header.log_offset, header.log_length) = (GUID, 0, 65536);
        header
    }

    fn replayed(log: &[u8]) -> Result<Vec<u8>> {
        let mut file = log.to_vec();
        file.resize(65536, 0);
        file.resize(65536 + 16384, 0xee);
        let storage = replay(Arc::new(MemoryStorage::new("v", file)), &header())?;
        let mut bytes = vec![0; storage.file_size() as usize - 65536];
        storage.read_exact_at(FileOffset(65536), &mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn the_newest_sequence_is_replayed_in_order() {
        let large = 65536 + 20000;
        let log = [
            entry(5, 0, (65536, 1), (65536 + 8192, 100), large),
            entry(6, 0, (65536, 2), (65536 + 4096, 4096), large),
            // An older sequence behind it counts for nothing.
            entry(2, 16384, (65536, 9), (65536, 9), large),
        ];
        let bytes = replayed(&log.concat()).unwrap();
        assert_eq!(bytes.len(), 20000, "the log makes the file larger");
        assert_eq!((&bytes[..4096], &bytes[4096..8192]), (&[2; 4096][..], &[0; 4096][..]));
        assert_eq!((&bytes[8192..8292], bytes[8292]), (&[0; 100][..], 0xee));
        assert_eq!((&bytes[12288..16384], &bytes[16384..]), (&[0xee; 4096][..], &[0; 20000 - 16384][..]));
    }

    #[test]
    fn torn_and_missing_entries_end_the_sequence_or_refuse_the_file() {
        let large = 65536 + 16384;
        let first = entry(5, 0, (65536, 1), (65536, 0), large);
        let mut torn = entry(6, 0, (65536, 2), (65536, 0), large);
        torn[5000] ^= 1;
        let bytes = replayed(&[first.clone(), torn].concat()).unwrap();
        assert_eq!(bytes[..4096], [1; 4096]);
        assert!(replayed(&[]).is_err());
        // Its tail is not there.
        assert!(replayed(&entry(7, 8192, (65536, 1), (65536, 0), large)).is_err());
        // A change past the end that the entry itself declares.
        assert!(replayed(&entry(7, 0, (65536, 1), (u64::MAX, 2), large)).is_err());
    }
}
