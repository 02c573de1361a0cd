//! VHD, fixed, dynamic and differencing.
//!
//! Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0. The sector bitmaps of dynamic
//! disks are not looked at: a block that is there holds zeros where a bit is clear. Those of differencing disks tell
//! which sectors are the parent's.

mod parent;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::blocks::{Block, BlockMap, BlockVisitor, JoinedRuns, visit_alike};
use super::table::{Entry, EntryTable, check_disjoint};
use super::{DiskImage, ExtentVisitor, ImageDescription, ReferenceGate, steps};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::format::ImageFormat;
use crate::header::vhd::{
    DYNAMIC_COOKIE, FOOTER_COOKIE, TYPE_DIFFERENCING, TYPE_DYNAMIC, TYPE_FIXED, VhdDynamicHeader, VhdFooter,
    checksum,
};
use crate::storage::{Generation, Storage};
use crate::units::{FileOffset, SECTOR, VirtualOffset, memory_size, round_up};

/// Largest disk (2040 GiB).
const MAX_VIRTUAL_SIZE: u64 = 2040 << 30;

/// Most entries of a block table: its bytes are counted in 31 bits (QEMU, block/vpc.c).
const MAX_TABLE_ENTRIES: u32 = i32::MAX.unsigned_abs() / 4;

/// A table's entry without a block.
const FREE: u64 = u32::MAX as u64;

/// Creators whose disks are as large as the geometry's product: Virtual PC, and QEMU as it does (QEMU, block/vpc.c).
/// All others mean `current_size`.
const SIZE_BY_GEOMETRY: [&[u8; 4]; 2] = [b"vpc ", b"qemu"];

/// Cylinders, heads and sectors of a geometry that is full, so that `current_size` counts after all.
const FULL_GEOMETRY: (u16, u8, u8) = (65535, 16, 255);

/// A VHD image.
pub struct VhdImage {
    storage: Arc<dyn Storage>,
    virtual_size: u64,
    creator: [u8; 4],
    unique_id: [u8; 16],
    body: Body,
    /// What a differencing disk differs from.
    parent: Option<Arc<VhdImage>>,
}

enum Body {
    Fixed,
    Dynamic { table: EntryTable, block_size: u64, bitmap_size: u64 },
}

impl VhdImage {
    /// Opens `storage`; `depth` counts the images above it in the chain.
    pub fn open(storage: Arc<dyn Storage>, gate: &Arc<dyn ReferenceGate>, depth: usize) -> Result<Self> {
        let place = storage.name().to_owned();
        super::check_depth(&*storage, depth)?;
        Self::open_unnamed(storage, gate, depth).map_err(|e| e.in_file(place))
    }

    fn open_unnamed(storage: Arc<dyn Storage>, gate: &Arc<dyn ReferenceGate>, depth: usize) -> Result<Self> {
        let footer = find_footer(&*storage)?;
        let virtual_size = virtual_size(&footer);
        if virtual_size > MAX_VIRTUAL_SIZE {
            return Err(Error::corrupt(format!(
                "a VHD has at most 2040 GiB, this one says {virtual_size} bytes"
            )));
        }
        let (body, parent) = match footer.disk_type {
            TYPE_FIXED => {
                crate::storage::check_range(&*storage, FileOffset(0), virtual_size)?;
                (Body::Fixed, None)
            }
            TYPE_DYNAMIC => (open_dynamic(&storage, &read_header(&*storage, &footer)?, virtual_size)?, None),
            TYPE_DIFFERENCING => {
                let header = read_header(&*storage, &footer)?;
                let parent = parent::open(&*storage, &header, gate, depth)?;
                let body = open_dynamic(&storage, &header, virtual_size)?;
                check_blocks(&body, virtual_size.div_ceil(header.block_size.into()))?;
                (body, Some(Arc::new(parent)))
            }
            other => return Err(Error::unsupported(format!("VHD disks of type {other} are not supported"))),
        };
        let (creator, unique_id) = (footer.creator_application, footer.unique_id);
        Ok(Self { storage, virtual_size, creator, unique_id, body, parent })
    }

    /// The bytes of the bitmap of the block whose data is at `data` that tell of the sectors from `first` on, for
    /// `sectors` of them at most. Bit 0 of the first byte returned is not that of `first` but of the multiple of 8 below.
    fn read_bitmap(&self, data: FileOffset, first: u64, sectors: u64) -> Result<Vec<u8>> {
        let Body::Dynamic { bitmap_size, .. } = &self.body else { return Ok(Vec::new()) };
        let (from, to) = (first / 8, first.saturating_add(sectors).div_ceil(8));
        let mut bytes = vec![0; memory_size(to.saturating_sub(from))];
        let bitmap = FileOffset(data.bytes().saturating_sub(*bitmap_size));
        self.storage.read_exact_at(bitmap + from, &mut bytes)?;
        Ok(bytes)
    }

    /// Tells which runs of `range`, which lies inside block `index`, are in the file and where, and which are the
    /// parent's. Reads only the bits of the range, few at first.
    fn visit_own(
        &self,
        index: u64,
        range: Range<VirtualOffset>,
        visit: &mut OwnVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let Block::Data(data) = self.checked_block(index)? else {
            return visit(range.end - range.start, None);
        };
        let start = VirtualOffset(self.blocks().start(index));
        let (mut at, mut piece) = (range.start, FIRST_PIECE);
        while at < range.end {
            let first = (at - start) / SECTOR;
            let sectors = (range.end - start).div_ceil(SECTOR).saturating_sub(first).min(piece);
            let bitmap = self.read_bitmap(data, first, sectors)?;
            let skipped = first % 8;
            let mut bits = Bits { bytes: &bitmap, at: skipped, end: skipped.saturating_add(sectors) };
            while let Some(own) = bits.next_run() {
                let behind = first.saturating_sub(skipped).saturating_add(bits.at);
                let end = range.end.min(start + behind.saturating_mul(SECTOR));
                let place = own.then(|| data + (at - start));
                if visit(end - at, place)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                at = end;
            }
            piece = piece.saturating_mul(2).min(LARGEST_PIECE);
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The parts of `range` that lie in one block each.
    fn split(&self, range: Range<VirtualOffset>) -> impl Iterator<Item = (u64, Range<VirtualOffset>)> + '_ {
        let blocks = self.blocks();
        (blocks.index(range.start.bytes())..blocks.count(range.end.bytes())).map(move |index| {
            let start = VirtualOffset(blocks.start(index));
            let end = VirtualOffset(blocks.start(index.saturating_add(1)));
            (index, range.start.max(start)..range.end.min(end))
        })
    }

    /// Reads a part of a differencing disk.
    fn read_over(&self, parent: &VhdImage, at: VirtualOffset, mut buf: &mut [u8]) -> Result<()> {
        for (index, range) in self.split(at..at + buf.len() as u64) {
            let mut at = range.start;
            let _ = self.visit_own(index, range, &mut |length, own| {
                let (target, rest) = std::mem::take(&mut buf).split_at_mut(memory_size(length));
                match own {
                    Some(host) => self.storage.read_exact_at(host, target)?,
                    None => super::read_below(Some(parent), at, target)?,
                }
                buf = rest;
                at += length;
                Ok(ControlFlow::Continue(()))
            })?;
        }
        Ok(())
    }

    fn visit_over(
        &self,
        parent: &VhdImage,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let mut runs = JoinedRuns::new(visit);
        for (index, range) in self.split(range) {
            let mut at = range.start;
            let flow = self.visit_own(index, range, &mut |length, own| {
                let flow = match own {
                    Some(_) => runs.add(Extent::new(ExtentKind::Data, length))?,
                    None => {
                        super::visit_below(Some(parent), at..at + length, &mut |extent| runs.add(extent))?
                    }
                };
                at += length;
                Ok(flow)
            })?;
            if flow.is_break() {
                return Ok(flow);
            }
        }
        runs.end()
    }
}

/// Gets a number of bytes, and where they are in the file if they are not the parent's.
type OwnVisitor<'a> = dyn FnMut(u64, Option<FileOffset>) -> Result<ControlFlow<()>> + 'a;

/// Sectors whose bits are read at once: at first, and at most.
const FIRST_PIECE: u64 = 128;
const LARGEST_PIECE: u64 = 1 << 19;

/// Bits of a bitmap. The first sector is the highest bit of the first byte ("Dynamic Hard Disk Image", "Data Blocks").
struct Bits<'a> {
    bytes: &'a [u8],
    at: u64,
    end: u64,
}

impl Bits<'_> {
    /// Whether the next bits are set; `at` is put behind all that are alike.
    fn next_run(&mut self) -> Option<bool> {
        let start = self.at;
        let byte = |at: u64| self.bytes.get(memory_size(at / 8)).copied().unwrap_or_default();
        let is_set = |at: u64| byte(at) & 0x80 >> (at % 8) != 0;
        let own = (start < self.end).then(|| is_set(start))?;
        let whole = if own { 0xff } else { 0 };
        let mut at = start;
        while at < self.end {
            steps::count(1);
            if at.is_multiple_of(8) && byte(at) == whole {
                at = at.saturating_add(8);
            } else if is_set(at) == own {
                at = at.saturating_add(1);
            } else {
                break;
            }
        }
        self.at = at.min(self.end);
        Some(own)
    }
}

/// The footer in the last sector, or where that one is damaged, its copy in the first one.
///
/// A fixed disk has no copy: its first sector is its guest's, whatever stands there.
fn find_footer(storage: &dyn Storage) -> Result<VhdFooter> {
    let last = storage.file_size().checked_sub(SECTOR);
    let last = last.ok_or_else(|| Error::corrupt("is not a VHD image: it is shorter than a footer"))?;
    let (last, copy) = (read_footer(storage, last), read_footer(storage, 0));
    let copy = copy.and_then(|copy| match copy.disk_type {
        TYPE_FIXED => Err(Error::corrupt("a fixed disk has no footer in its last sector")),
        _ => Ok(copy),
    });
    match (last, copy) {
        (Ok(last), Ok(copy)) if last.disk_type != TYPE_FIXED => check_copy(last, &copy),
        (Ok(footer), _) | (Err(_), Ok(footer)) => Ok(footer),
        (Err(wrong), Err(_)) => Err(wrong),
    }
}

fn read_footer(storage: &dyn Storage, at: u64) -> Result<VhdFooter> {
    let mut bytes = [0; VhdFooter::LENGTH];
    storage.read_exact_at(FileOffset(at), &mut bytes)?;
    let footer = VhdFooter::parse(&bytes);
    if footer.cookie != FOOTER_COOKIE {
        let what = "is not a VHD image, or is truncated: there is no footer in its last sector";
        return Err(Error::corrupt(what).at(at));
    }
    if footer.checksum != checksum(&bytes, 64) {
        return Err(Error::corrupt("the footer's checksum is wrong").at(at.saturating_add(64)));
    }
    Ok(footer)
}

/// The footer, unless its copy is valid and says another disk: readers differ in which of the two they take.
fn check_copy(footer: VhdFooter, copy: &VhdFooter) -> Result<VhdFooter> {
    let disk = |f: &VhdFooter| (f.disk_type, f.data_offset, virtual_size(f), f.unique_id);
    if disk(&footer) == disk(copy) {
        return Ok(footer);
    }
    let what = format!(
        "the footer and its copy disagree: type {} and {}, {} and {} bytes, header at {} and {}",
        footer.disk_type,
        copy.disk_type,
        virtual_size(&footer),
        virtual_size(copy),
        footer.data_offset,
        copy.data_offset
    );
    Err(Error::corrupt(what).at(0u64))
}

fn virtual_size(footer: &VhdFooter) -> u64 {
    let geometry = (footer.cylinders, footer.heads, footer.sectors);
    if !SIZE_BY_GEOMETRY.contains(&&footer.creator_application) || geometry == FULL_GEOMETRY {
        return footer.current_size;
    }
    [footer.heads, footer.sectors]
        .into_iter()
        .fold(u64::from(footer.cylinders), |sectors, factor| sectors.saturating_mul(factor.into()))
        .saturating_mul(SECTOR)
}

/// Whether a file ends as every VHD does, with a footer that is whole.
pub(super) fn ends_with_footer(storage: &dyn Storage) -> Result<bool> {
    let Some(last) = storage.file_size().checked_sub(SECTOR) else { return Ok(false) };
    match read_footer(storage, last) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::CorruptImage => Ok(false),
        Err(error) => Err(error),
    }
}

/// The dynamic header that a footer points to.
fn read_header(storage: &dyn Storage, footer: &VhdFooter) -> Result<VhdDynamicHeader> {
    let at = FileOffset(footer.data_offset);
    let mut bytes = [0; VhdDynamicHeader::LENGTH];
    // A header that is cut short is refused for what it says, if that is wrong, and then for its length.
    let there = storage.file_size().saturating_sub(at.bytes()).min(bytes.len() as u64);
    storage.read_exact_at(at, bytes.split_at_mut(memory_size(there)).0)?;
    let header = VhdDynamicHeader::parse(&bytes);
    if header.cookie != DYNAMIC_COOKIE {
        return Err(Error::corrupt("the dynamic header's cookie is wrong").at(at));
    }
    if header.max_table_entries > MAX_TABLE_ENTRIES {
        let what = format!("a block table of {} entries is larger than allowed", header.max_table_entries);
        return Err(Error::corrupt(what).at(at + 28));
    }
    crate::storage::check_range(storage, at, bytes.len() as u64)?;
    if header.checksum != checksum(&bytes, 36) {
        return Err(Error::corrupt("the dynamic header's checksum is wrong").at(at + 36));
    }
    let block_size = u64::from(header.block_size);
    if !block_size.is_power_of_two() || block_size < SECTOR {
        return Err(Error::corrupt(format!("blocks of {block_size} bytes are not allowed")).at(at + 32));
    }
    Ok(header)
}

fn open_dynamic(storage: &Arc<dyn Storage>, header: &VhdDynamicHeader, virtual_size: u64) -> Result<Body> {
    let block_size = u64::from(header.block_size);
    let blocks = virtual_size.div_ceil(block_size);
    if u64::from(header.max_table_entries) < blocks {
        let what =
            format!("the block table has {} entries, the disk needs {blocks}", header.max_table_entries);
        return Err(Error::corrupt(what));
    }
    let table = EntryTable::new(Arc::clone(storage), FileOffset(header.table_offset), blocks, Entry::U32Be)?;
    let bitmap_size = round_up((block_size / SECTOR).div_ceil(8), SECTOR);
    Ok(Body::Dynamic { table, block_size, bitmap_size })
}

/// What an entry of the block table says.
fn entry(entry: u64, bitmap_size: u64) -> Block {
    match entry {
        FREE => Block::Hole,
        sector => Block::Data(FileOffset(sector.saturating_mul(SECTOR)) + bitmap_size),
    }
}

/// Refuses a differencing disk of which two blocks overlap: their bitmaps are read in every walk.
fn check_blocks(body: &Body, blocks: u64) -> Result<()> {
    let Body::Dynamic { table, block_size, bitmap_size } = body else { return Ok(()) };
    let mut sectors = Vec::new();
    let _ = table.visit(0..blocks, &mut |entry, count| {
        // Two that are the same are as bad as many.
        let named = if entry == FREE { 0 } else { count.min(2) };
        sectors.extend((0..named).map(|_| entry));
        Ok(ControlFlow::Continue(()))
    })?;
    check_disjoint(sectors, block_size.saturating_add(*bitmap_size) / SECTOR, "a block", SECTOR)
}

impl BlockMap for VhdImage {
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn block_size(&self) -> u64 {
        match self.body {
            // One block, which is the disk.
            Body::Fixed => self.virtual_size.max(1),
            Body::Dynamic { block_size, .. } => block_size,
        }
    }

    fn block(&self, index: u64) -> Result<Block> {
        match &self.body {
            Body::Fixed => Ok(Block::Data(FileOffset(0))),
            Body::Dynamic { table, bitmap_size, .. } => Ok(entry(table.get(index)?, *bitmap_size)),
        }
    }

    fn visit_blocks(&self, blocks: Range<u64>, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
        match &self.body {
            Body::Fixed if blocks.is_empty() => Ok(ControlFlow::Continue(())),
            Body::Fixed => visit(Block::Data(FileOffset(0)), 1),
            Body::Dynamic { table, bitmap_size, .. } => {
                table.visit(blocks, &mut |value, count| visit_alike(entry(value, *bitmap_size), count, visit))
            }
        }
    }
}

impl DiskImage for VhdImage {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
        match &self.parent {
            Some(parent) => self.read_over(parent, at, buf),
            None => self.read_blocks(at, buf),
        }
    }

    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        match (&self.parent, &self.body) {
            (Some(parent), _) => self.visit_over(parent, range, visit),
            // A sparse file of a fixed disk has holes that its format does not know.
            (None, Body::Fixed) => {
                let start = FileOffset(range.start.bytes());
                super::visit_storage(&*self.storage, start, range.end - range.start, visit)
            }
            (None, Body::Dynamic { .. }) => self.visit_block_extents(range, visit),
        }
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage.verify_unchanged()?;
        self.parent.as_ref().map_or(Ok(()), |parent| parent.verify_unchanged())
    }

    fn sources(&self) -> Vec<Generation> {
        let mut sources = vec![self.storage.generation().clone()];
        sources.extend(self.parent.iter().flat_map(|parent| parent.sources()));
        sources
    }

    fn description(&self) -> ImageDescription {
        let (kind, cluster_size) = match self.body {
            Body::Fixed => ("fixed", None),
            Body::Dynamic { block_size, .. } if self.parent.is_some() => ("differencing", Some(block_size)),
            Body::Dynamic { block_size, .. } => ("dynamic", Some(block_size)),
        };
        let creator: String =
            self.creator.iter().map(|&b| if b.is_ascii_graphic() { b as char } else { ' ' }).collect();
        ImageDescription {
            file: self.storage.name().to_owned(),
            format: ImageFormat::Vhd,
            virtual_size: self.virtual_size,
            file_size: self.storage.file_size(),
            cluster_size,
            properties: vec![
                ("type".to_owned(), kind.to_owned()),
                ("creator".to_owned(), creator.trim().to_owned()),
            ],
            backing: self.parent.as_ref().map(|parent| Box::new(parent.description())),
        }
    }
}
