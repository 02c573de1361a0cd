//! ZVHD and ZVHD2.
//!
//! Source: see [`crate::header::zvhd`]. A ZVHD has no index: its records' headers are read one after the other when
//! it is opened. Its payloads are parts of one zlib stream, so a record may refer to the 32 KiB before it. Writers
//! that compress blocks one by one (this program is one) make records that refer to nothing; those are inflated
//! alone. For others the end of the record before is needed, and so on back to a checkpoint.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use parking_lot::Mutex;

use super::blocks::{Block, BlockImage, BlockMap, BlockVisitor};
use super::inflated::InflatedUnits;
use super::slice;
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::format::ImageFormat;
use crate::header::vhd::checksum;
use crate::header::zvhd::{
    ALIGNMENT, BLOCK_SIZE, METHOD_ZLIB, METHOD_ZSTD, RECORD_COOKIE, RECORD_END, SIZE_GRANULE, ZVHD_COOKIE,
    ZVHD2_COOKIE, ZvhdHeader, ZvhdIndexEntry, ZvhdRecordHeader,
};
use crate::storage::{Storage, check_range};
use crate::units::{FileOffset, memory_size};

/// Bytes of a record beside its payload and what it is padded with.
const RECORD_FRAME: u64 = (ZvhdRecordHeader::LENGTH + RECORD_END.len()) as u64;

/// Largest payload that is read: compressors add little to what they cannot compress.
const MAX_PAYLOAD: u32 = 3 << 20;

/// Entries of an index that are read at once.
const INDEX_PIECE: usize = 4096;

/// Ends of blocks that are kept as checkpoints, of 32 KiB each, while their bound for all images allows it.
const CHECKPOINTS: usize = 512;

/// A ZVHD or ZVHD2 image.
pub struct ZvhdImage {
    storage: Arc<dyn Storage>,
    header: ZvhdHeader,
    /// Ascending by block, and so by place.
    records: Vec<StoredBlock>,
    blocks: InflatedUnits,
    windows: Mutex<Windows>,
}

/// A block that has a record.
#[derive(Clone, Copy)]
struct StoredBlock {
    block: u32,
    payload_size: u32,
    payload: FileOffset,
}

/// The last 32 KiB of blocks, by the record's number.
struct Windows {
    /// Those of which a window was kept, and may be kept still.
    checkpoints: BTreeSet<usize>,
    kept: InflatedUnits,
    newest: Option<(usize, Arc<Vec<u8>>)>,
}

impl ZvhdImage {
    /// Opens `storage`.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let place = storage.name().to_owned();
        Self::open_unnamed(storage).map_err(|e| e.in_file(place))
    }

    fn open_unnamed(storage: Arc<dyn Storage>) -> Result<Self> {
        let first = read_header(&*storage, FileOffset(0))?;
        let end = storage.file_size().checked_sub(ALIGNMENT);
        let end = end.filter(|end| *end > 0).map(FileOffset);
        let end =
            end.ok_or_else(|| Error::corrupt("the file ends before its last header; it is truncated"))?;
        let header = read_header(&*storage, end)
            .map_err(|e| Error::corrupt("there is no valid header at its end; it is truncated").because(e))?;
        if first.cookie != header.cookie || first.original_size != header.original_size {
            return Err(Error::corrupt("the headers at its start and end disagree").at(end));
        }
        let blocks = virtual_size(&header).div_ceil(BLOCK_SIZE);
        let records = if header.cookie == ZVHD_COOKIE {
            scan_records(&*storage, end, blocks)?
        } else {
            read_index(&*storage, &header, end, blocks)?
        };
        let windows = Windows { checkpoints: BTreeSet::new(), kept: InflatedUnits::windows(), newest: None };
        Ok(Self { storage, header, records, blocks: InflatedUnits::new(), windows: Mutex::new(windows) })
    }

    /// The bytes of the block of a record.
    fn inflated(&self, number: usize) -> Result<Arc<Vec<u8>>> {
        if let Some(known) = self.blocks.get(number as u64) {
            return Ok(known);
        }
        let place = self.record(number)?.payload;
        let block = self.inflate(number).map_err(|e| {
            Error::corrupt("a record is damaged").in_file(self.storage.name()).at(place).because(e)
        })?;
        let block = Arc::new(block);
        self.blocks.put(number as u64, Arc::clone(&block));
        Ok(block)
    }

    fn inflate(&self, number: usize) -> Result<Vec<u8>> {
        let payload = self.payload(number)?;
        let mut block = vec![0; memory_size(BLOCK_SIZE)];
        if self.header.cookie == ZVHD2_COOKIE {
            if self.header.method == METHOD_ZSTD {
                codec::unzstd(&payload, &mut block)?;
            } else if codec::inflate_zlib(&payload, &mut block)? != block.len() {
                return Err(Error::corrupt("a block has fewer than 2 MiB"));
            }
            return Ok(block);
        }
        // A stream that refers to nothing before it can have only one meaning.
        if codec::inflate_flushed(&payload, None, &mut block).is_ok() {
            return Ok(block);
        }
        let mut windows = self.windows.lock();
        let mut from = windows.before(number);
        loop {
            let (start, window) = &from;
            let payload = self.payload(*start)?;
            codec::inflate_flushed(&payload, window.as_deref().map(Vec::as_slice), &mut block)?;
            if *start == number {
                return Ok(block);
            }
            let window =
                Arc::new(block.iter().skip(block.len().saturating_sub(codec::WINDOW)).copied().collect());
            windows.keep(*start, &window, self.records.len());
            from = (start.saturating_add(1), Some(window));
        }
    }

    fn record(&self, number: usize) -> Result<&StoredBlock> {
        let lost = || Error::new(ErrorKind::Internal, format!("there is no record {number}"));
        self.records.get(number).ok_or_else(lost)
    }

    /// A record's payload without the zlib header that the first one of a ZVHD begins with.
    fn payload(&self, number: usize) -> Result<Vec<u8>> {
        let record = self.record(number)?;
        let mut payload = vec![0; record.payload_size as usize];
        self.storage.read_exact_at(record.payload, &mut payload)?;
        if number == 0 && self.header.cookie == ZVHD_COOKIE {
            // RFC 1950, section 2.2: method deflate, no dictionary, check bits.
            let valid = payload.first_chunk().is_some_and(|&[method, flags]| {
                method & 0x0f == 8 && flags & 0x20 == 0 && u16::from_be_bytes([method, flags]) % 31 == 0
            });
            if !valid {
                return Err(Error::corrupt("the first record does not begin a zlib stream"));
            }
            payload.drain(..2);
        }
        Ok(payload)
    }
}

impl Windows {
    /// Where to begin in order to inflate record `number`: a record at or before it, and what came before that.
    fn before(&self, number: usize) -> (usize, Option<Arc<Vec<u8>>>) {
        let newest = self.newest.clone().filter(|(at, _)| *at < number);
        let kept = |&at: &usize| Some((at, self.kept.get(at as u64)?));
        let checkpoint = self.checkpoints.range(..number).rev().find_map(kept);
        let nearest = newest.into_iter().chain(checkpoint).max_by_key(|(at, _)| *at);
        nearest.map_or((0, None), |(at, window)| (at.saturating_add(1), Some(window)))
    }

    fn keep(&mut self, number: usize, window: &Arc<Vec<u8>>, records: usize) {
        if number.is_multiple_of((records / CHECKPOINTS).saturating_add(1)) {
            self.checkpoints.insert(number);
            self.kept.put(number as u64, Arc::clone(window));
        }
        self.newest = Some((number, Arc::clone(window)));
    }
}

/// The header says both the exact size and one rounded up; the exact one counts when they agree.
fn virtual_size(header: &ZvhdHeader) -> u64 {
    let rounded = header.original_size.checked_next_multiple_of(SIZE_GRANULE);
    if rounded == Some(header.current_size) { header.original_size } else { header.current_size }
}

fn read_header(storage: &dyn Storage, at: FileOffset) -> Result<ZvhdHeader> {
    let mut bytes = [0; ZvhdHeader::LENGTH];
    storage.read_exact_at(at, &mut bytes)?;
    let header = ZvhdHeader::parse(&bytes);
    if header.cookie != ZVHD_COOKIE && header.cookie != ZVHD2_COOKIE {
        return Err(Error::corrupt("is not a ZVHD or ZVHD2: the cookie is wrong").at(at));
    }
    if header.checksum != checksum(&bytes, 64) {
        return Err(Error::corrupt("a header's checksum is wrong").at(at + 64));
    }
    super::check_virtual_size(virtual_size(&header)).map_err(|e| e.at(at + 48))?;
    if header.cookie == ZVHD2_COOKIE {
        if u64::from(header.block_size) != BLOCK_SIZE {
            let what = format!("blocks of {} bytes are not supported", header.block_size);
            return Err(Error::unsupported(what).at(at + 88));
        }
        if ![METHOD_ZLIB, METHOD_ZSTD].contains(&header.method) {
            let what = format!("compression method {} is not supported", header.method);
            return Err(Error::unsupported(what).at(at + 141));
        }
    }
    Ok(header)
}

/// A record whose header is at `at`, all of which lies before `end`; and where the next one begins.
fn read_record(storage: &dyn Storage, at: FileOffset, end: FileOffset) -> Result<(StoredBlock, FileOffset)> {
    let mut bytes = [0; ZvhdRecordHeader::LENGTH];
    storage.read_exact_at(at, &mut bytes)?;
    let header = ZvhdRecordHeader::parse(&bytes);
    if header.cookie != RECORD_COOKIE {
        return Err(Error::corrupt("a record's cookie is wrong").at(at));
    }
    if header.payload_size > MAX_PAYLOAD {
        let what = format!("a payload of {} bytes is too large", header.payload_size);
        return Err(Error::corrupt(what).at(at + 12));
    }
    let length = RECORD_FRAME.saturating_add(header.payload_size.into());
    let next = at + length.next_multiple_of(ALIGNMENT);
    if next > end {
        return Err(Error::corrupt("a record goes on past the records' end").at(at));
    }
    let mut mark = [0; RECORD_END.len()];
    storage.read_exact_at(FileOffset(next.bytes().saturating_sub(mark.len() as u64)), &mut mark)?;
    if mark != RECORD_END {
        return Err(Error::corrupt("a record has no end mark").at(next));
    }
    let payload = at + ZvhdRecordHeader::LENGTH as u64;
    Ok((StoredBlock { block: header.block, payload_size: header.payload_size, payload }, next))
}

/// Blocks ascend and lie on the disk.
fn check_block(records: &[StoredBlock], block: u32, blocks: u64, at: FileOffset) -> Result<()> {
    if u64::from(block) >= blocks {
        return Err(Error::corrupt(format!("block {block} is past the end of the disk")).at(at));
    }
    if records.last().is_some_and(|last| last.block >= block) {
        return Err(Error::corrupt(format!("block {block} is out of order")).at(at));
    }
    Ok(())
}

fn scan_records(storage: &dyn Storage, end: FileOffset, blocks: u64) -> Result<Vec<StoredBlock>> {
    let mut records = Vec::new();
    let mut at = FileOffset(ALIGNMENT);
    while at < end {
        let (record, next) = read_record(storage, at, end)?;
        check_block(&records, record.block, blocks, at)?;
        records.push(record);
        at = next;
    }
    if at != end {
        return Err(Error::corrupt("the records do not end at the last header").at(at));
    }
    Ok(records)
}

fn read_index(
    storage: &dyn Storage,
    header: &ZvhdHeader,
    end: FileOffset,
    blocks: u64,
) -> Result<Vec<StoredBlock>> {
    let length = u64::from(header.stored_blocks).saturating_mul(ZvhdIndexEntry::LENGTH as u64);
    if length > u64::from(header.index_size) {
        return Err(Error::corrupt("the index is too small for its blocks").at(end + 112));
    }
    let at = FileOffset(header.index_offset);
    if at.checked_add(length).is_none_or(|index_end| index_end > end) {
        return Err(Error::corrupt("the index does not lie inside the file").at(end + 96));
    }
    check_range(storage, at, length)?;
    let mut records = Vec::new();
    // In pieces: that the file has so many bytes does not mean that they are entries.
    let mut piece = Vec::new();
    for number in 0..header.stored_blocks as usize {
        let place = at + number.saturating_mul(ZvhdIndexEntry::LENGTH) as u64;
        let within = (number % INDEX_PIECE).saturating_mul(ZvhdIndexEntry::LENGTH);
        if within == 0 {
            piece.resize(memory_size(at + length - place).min(INDEX_PIECE * ZvhdIndexEntry::LENGTH), 0);
            storage.read_exact_at(place, &mut piece)?;
        }
        let entry = piece.get(within..).and_then(ZvhdIndexEntry::parse_first);
        let entry = entry.ok_or_else(|| Error::corrupt("the index is cut short").at(place))?;
        check_block(&records, entry.block, blocks, place)?;
        let record_start = FileOffset(entry.record_offset);
        if record_start.checked_add(u64::from(entry.record_size)).is_none_or(|record_end| record_end > at) {
            return Err(Error::corrupt("a record does not lie before the index").at(place));
        }
        let (record, next) = read_record(storage, record_start, at)?;
        if record.block != entry.block || next - record_start != u64::from(entry.record_size) {
            return Err(Error::corrupt("the index and a record disagree").at(place));
        }
        records.push(record);
    }
    Ok(records)
}

impl BlockMap for ZvhdImage {
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn virtual_size(&self) -> u64 {
        virtual_size(&self.header)
    }

    fn block_size(&self) -> u64 {
        BLOCK_SIZE
    }

    fn block(&self, index: u64) -> Result<Block> {
        let found = self.records.binary_search_by_key(&index, |record| record.block.into());
        let record = found.ok().and_then(|number| self.records.get(number));
        Ok(record.map_or(Block::Hole, |record| Block::Compressed(record.payload)))
    }

    fn visit_blocks(&self, blocks: Range<u64>, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
        let mut at = blocks.start;
        let first = self.records.partition_point(|record| u64::from(record.block) < at);
        let stored = self.records.iter().skip(first);
        let stored = stored.take_while(|record| u64::from(record.block) < blocks.end);
        for record in stored {
            let block = u64::from(record.block);
            if block > at && visit(Block::Hole, block.saturating_sub(at))?.is_break()
                || visit(Block::Compressed(record.payload), 1)?.is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
            at = block.saturating_add(1);
        }
        if at < blocks.end {
            visit(Block::Hole, blocks.end.saturating_sub(at))
        } else {
            Ok(ControlFlow::Continue(()))
        }
    }

    fn read_compressed(&self, host: FileOffset, within: u64, target: &mut [u8]) -> Result<()> {
        let found = self.records.binary_search_by_key(&host, |record| record.payload);
        let number = found.map_err(|_| Error::corrupt("there is no record here").at(host))?;
        target.copy_from_slice(slice(&self.inflated(number)?, within, target.len() as u64)?);
        Ok(())
    }
}

impl BlockImage for ZvhdImage {
    fn format(&self) -> ImageFormat {
        if self.header.cookie == ZVHD2_COOKIE { ImageFormat::Zvhd2 } else { ImageFormat::Zvhd }
    }

    fn properties(&self) -> Vec<(String, String)> {
        let zstd = self.header.cookie == ZVHD2_COOKIE && self.header.method == METHOD_ZSTD;
        vec![
            ("compression type".to_owned(), if zstd { "zstd" } else { "zlib" }.to_owned()),
            ("stored blocks".to_owned(), self.records.len().to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DiskImage;
    use crate::image::inflated::{self, INFLATED_MEMORY, WINDOW_MEMORY};
    use crate::storage::MemoryStorage;
    use crate::units::VirtualOffset;
    use zlib_rs::{Deflate, DeflateFlush};

    /// A ZVHD whose payloads are one stream of one compressor, as its first writer makes them.
    fn one_stream(blocks: &[(u32, Vec<u8>)], virtual_size: u64) -> Vec<u8> {
        let mut header = ZvhdHeader::parse(&[0; ZvhdHeader::LENGTH]);
        header.cookie = ZVHD_COOKIE;
        (header.original_size, header.current_size) = (virtual_size, virtual_size.next_multiple_of(1 << 30));
        header.checksum = checksum(&header.encode(), 64);
        let mut encoded = header.encode().to_vec();
        encoded.resize(4096, 0);
        let mut file = encoded.clone();
        let mut deflate = Deflate::new(6, true, 15);
        for (block, bytes) in blocks {
            let mut payload = vec![0; bytes.len() * 2];
            let before = deflate.total_out();
            deflate.compress(bytes, &mut payload, DeflateFlush::SyncFlush).unwrap();
            payload.truncate((deflate.total_out() - before) as usize);
            let header =
                ZvhdRecordHeader { cookie: RECORD_COOKIE, payload_size: payload.len() as u32, block: *block };
            file.extend(header.encode());
            file.extend(payload);
            let end = (file.len() + 4).next_multiple_of(4096) - 4;
            file.resize(end, 0);
            file.extend(RECORD_END);
        }
        file.extend(encoded);
        file
    }

    #[test]
    fn records_that_refer_to_those_before_are_read_in_any_order() {
        // Text that repeats over the borders of blocks, so that each refers to the one before.
        let line = |n: usize| format!("line {} of a text that goes on and on\n", n % 700);
        let text: Vec<u8> = (0..400_000).flat_map(|n| line(n).into_bytes()).collect();
        let blocks: Vec<_> =
            (0..6u32).map(|n| (2 * n, text[n as usize * (2 << 20)..][..2 << 20].to_vec())).collect();
        let file = one_stream(&blocks, 25 << 20);
        let image = || ZvhdImage::open(Arc::new(MemoryStorage::new("z", file.clone()))).unwrap();
        let payload = image().payload(3).unwrap();
        assert!(
            codec::inflate_flushed(&payload, None, &mut vec![0; 2 << 20]).is_err(),
            "the test tests nothing"
        );
        for order in [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 3, 0, 5, 1, 4]] {
            let image = image();
            for index in order {
                let (block, bytes) = &blocks[index];
                let mut read = vec![1; 2 << 20];
                image.read_at(VirtualOffset(u64::from(*block) << 21), &mut read).unwrap();
                assert!(read == *bytes, "block {block} in order {order:?}");
            }
            // Without the windows the stream is begun anew.
            let others = InflatedUnits::windows();
            (0..WINDOW_MEMORY >> 15).for_each(|number| others.put(number, Arc::new(vec![0; codec::WINDOW])));
            assert!(inflated::memory() <= INFLATED_MEMORY + WINDOW_MEMORY);
            let mut windows = image.windows.lock();
            assert!(!windows.checkpoints.is_empty());
            assert!(windows.checkpoints.iter().all(|&at| windows.kept.get(at as u64).is_none()));
            windows.newest = None;
            drop(windows);
            assert!(image.inflate(5).unwrap() == blocks[5].1);
            let mut hole = vec![1; 100];
            image.read_at(VirtualOffset(2 << 20), &mut hole).unwrap();
            assert_eq!(hole, [0; 100]);
        }
    }
}
