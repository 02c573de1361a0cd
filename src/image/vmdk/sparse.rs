//! A hosted sparse extent: grains found through a directory of tables, plain or compressed.
//!
//! Source: VMware, "Virtual Disk Format 5.0", "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse
//! Extents".

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::super::blocks::{Block, BlockMap, BlockVisitor};
use super::super::inflated::InflatedUnits;
use super::super::table::{Entry, EntryTable, TableWalk, check_disjoint};
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::header;
use crate::header::vmdk::{MAGIC, VmdkSparseHeader};
use crate::image::{slice, steps};
use crate::storage::Storage;
use crate::units::{FileOffset, GIB, MIB, SECTOR, Unit, memory_size};

/// Flags of the header: grain table entries of 1 are zeros; grains are compressed.
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;

/// A directory's offset that says: it stands in the footer.
const DIRECTORY_AT_END: u64 = u64::MAX;

/// Limits of QEMU (block/vmdk.c): entries of a grain table, bytes of a grain, entries of the directory.
const MAX_TABLE_ENTRIES: u32 = 512;
const MAX_GRAIN: u64 = GIB;
const MAX_DIRECTORY: u64 = 32 << 20;

/// Largest compressed grain that is read: it is inflated as a whole. Writers make 64 KiB.
const MAX_COMPRESSED_GRAIN: u64 = 4 * MIB;

/// Grain tables that are kept, of 2 KiB each.
const TABLES_KEPT: NonZeroUsize = NonZeroUsize::new(256).expect("256 is not 0");

/// Bytes before a compressed grain's stream: its first sector (u64) and its length (u32).
const GRAIN_MARKER: usize = 12;

/// A sparse extent.
pub(super) struct SparseExtent {
    storage: Arc<dyn Storage>,
    header: VmdkSparseHeader,
    directory: EntryTable,
    tables: Mutex<LruCache<u64, Arc<Vec<u8>>>>,
    grains: InflatedUnits,
}

impl SparseExtent {
    /// Opens the extent that `storage` is.
    pub(super) fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut header = read_header(&*storage, FileOffset(0))?;
        if header.directory_offset == DIRECTORY_AT_END {
            // The footer is a header before the end-of-stream marker's sector.
            let at = storage.file_size().checked_sub(2 * SECTOR);
            let at =
                at.ok_or_else(|| Error::corrupt("the file is too short for a footer; it is truncated"))?;
            header = read_header(&*storage, FileOffset(at))?;
        }
        check(&header)?;
        let covered = header.grain_size.saturating_mul(header.grain_table_entries.into());
        let tables = header.capacity.div_ceil(covered);
        if tables > MAX_DIRECTORY {
            return Err(
                Error::corrupt(format!("a grain directory of {tables} entries is too large")).at(12u64)
            );
        }
        let start = header.directory_offset.checked_mul(SECTOR);
        let start = start.ok_or_else(|| Error::corrupt("the grain directory's offset is wrong").at(56u64))?;
        let directory = EntryTable::new(Arc::clone(&storage), FileOffset(start), tables, Entry::U32Le)?;
        let extent = Self {
            storage,
            directory,
            tables: Mutex::new(LruCache::new(TABLES_KEPT)),
            grains: InflatedUnits::new(),
            header,
        };
        extent.check_directory(tables)?;
        Ok(extent)
    }

    /// The file that the extent is in.
    pub(super) fn shared_storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The descriptor's place in the file and its bytes, if there is one.
    pub(super) fn descriptor(&self) -> Option<(FileOffset, u64)> {
        let at = self.header.descriptor_offset.checked_mul(SECTOR).filter(|at| *at > 0)?;
        Some((FileOffset(at), self.header.descriptor_size.saturating_mul(SECTOR)))
    }

    fn compressed(&self) -> bool {
        self.header.flags & FLAG_COMPRESSED != 0
    }

    /// What an entry of a grain table says.
    fn grain(&self, sector: u32) -> Block {
        let zero_grains = self.header.flags & FLAG_ZERO_GRAINS != 0;
        match sector {
            0 => Block::Hole,
            1 if zero_grains => Block::Zero,
            sector if self.compressed() => Block::Compressed(FileOffset(u64::from(sector) * SECTOR)),
            sector => Block::Data(FileOffset(u64::from(sector) * SECTOR)),
        }
    }

    /// Tells the grains of a part of a table.
    fn visit_table(&self, entries: &[u8], visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
        steps::count(entries.len() as u64 / 4);
        for entry in entries.chunks_exact(4) {
            let sector = header::little(entry, 0);
            if visit(self.grain(sector), 1)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Refuses a directory that names more than the file can have: a walk through it would have no bound in the file's
    /// size.
    fn check_directory(&self, tables: u64) -> Result<()> {
        let length = u64::from(self.header.grain_table_entries).saturating_mul(4);
        let most = Unit::of(length).index(self.storage.file_size());
        let mut sectors = Vec::new();
        let _ = self.directory.visit(0..tables, &mut |sector, count| {
            // Two that are the same are as bad as many.
            let named = if sector == 0 { 0 } else { count.min(2) };
            sectors.extend((0..named).map(|_| sector));
            if sectors.len() as u64 > most {
                let what =
                    format!("the directory names more grain tables than the {most} that fit into the file");
                return Err(Error::corrupt(what).at(self.directory.start()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        check_disjoint(sectors, length.div_ceil(SECTOR), "a grain table", SECTOR)
    }

    /// The grain's entry in its table; 0 when there is no table.
    fn entry(&self, grain: u64) -> Result<u32> {
        let table = self.directory.get(self.per_table().index(grain))?;
        if table == 0 {
            return Ok(0);
        }
        let entries = self.table(table)?;
        let place = self.per_table().within(grain).saturating_mul(4);
        Ok(header::little(slice(&entries, place, 4)?, 0))
    }

    /// The grains that a table has entries of.
    fn per_table(&self) -> Unit {
        Unit::of(self.header.grain_table_entries.into())
    }

    /// The grain table at that sector.
    fn table(&self, sector: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(known) = self.tables.lock().get(&sector) {
            return Ok(Arc::clone(known));
        }
        let mut entries = vec![0; memory_size(u64::from(self.header.grain_table_entries).saturating_mul(4))];
        self.storage.read_exact_at(FileOffset(sector.saturating_mul(SECTOR)), &mut entries)?;
        let entries = Arc::new(entries);
        self.tables.lock().put(sector, Arc::clone(&entries));
        Ok(entries)
    }

    /// A grain, inflated: the last one of a disk may be shorter than the others.
    fn inflate(&self, host: FileOffset) -> Result<Vec<u8>> {
        let mut marker = [0; GRAIN_MARKER];
        self.storage.read_exact_at(host, &mut marker)?;
        let length = u64::from(header::little::<u32>(&marker, 8));
        let grain = BlockMap::block_size(self);
        // Deflate adds little to what it cannot compress; more than twice the grain is no grain.
        if length > grain.saturating_mul(2).saturating_add(SECTOR) {
            let what = format!("a compressed grain of {length} bytes is too large");
            return Err(Error::corrupt(what).in_file(self.storage.name()).at(host));
        }
        crate::storage::check_range(&*self.storage, host + GRAIN_MARKER as u64, length)?;
        let mut input = vec![0; memory_size(length)];
        self.storage.read_exact_at(host + GRAIN_MARKER as u64, &mut input)?;
        let mut output = vec![0; memory_size(grain)];
        let damaged = |e| {
            Error::corrupt("a compressed grain is damaged").in_file(self.storage.name()).at(host).because(e)
        };
        let written = codec::inflate_zlib(&input, &mut output).map_err(damaged)?;
        output.truncate(written);
        Ok(output)
    }
}

fn read_header(storage: &dyn Storage, at: FileOffset) -> Result<VmdkSparseHeader> {
    let mut bytes = [0; VmdkSparseHeader::LENGTH];
    storage.read_exact_at(at, &mut bytes)?;
    let header = VmdkSparseHeader::parse(&bytes);
    if header.magic == MAGIC {
        return Ok(header);
    }
    Err(Error::corrupt("is not a sparse VMDK: the magic is wrong").at(at))
}

fn check(header: &VmdkSparseHeader) -> Result<()> {
    if !(1..=3).contains(&header.version) {
        return Err(Error::unsupported(format!("is a VMDK of version {}", header.version)).at(4u64));
    }
    let grain = header.grain_size.saturating_mul(SECTOR);
    if !grain.is_power_of_two() || grain > MAX_GRAIN {
        return Err(
            Error::corrupt(format!("grains of {} sectors are not allowed", header.grain_size)).at(20u64)
        );
    }
    if header.grain_table_entries == 0 || header.grain_table_entries > MAX_TABLE_ENTRIES {
        let what = format!("grain tables of {} entries are not allowed", header.grain_table_entries);
        return Err(Error::corrupt(what).at(44u64));
    }
    crate::image::check_virtual_size(header.capacity.saturating_mul(SECTOR)).map_err(|e| e.at(12u64))?;
    if header.flags & FLAG_COMPRESSED != 0 && grain > MAX_COMPRESSED_GRAIN {
        let what = format!(
            "compressed grains of {grain} bytes are larger than the {MAX_COMPRESSED_GRAIN} that are read"
        );
        return Err(Error::new(ErrorKind::TooLarge, what).at(20u64));
    }
    if header.flags & FLAG_COMPRESSED != 0 && header.compression != 1 {
        let what = format!("compression algorithm {} is not supported", header.compression);
        return Err(Error::unsupported(what).at(77u64));
    }
    Ok(())
}

impl BlockMap for SparseExtent {
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn virtual_size(&self) -> u64 {
        self.header.capacity.saturating_mul(SECTOR)
    }

    fn block_size(&self) -> u64 {
        self.header.grain_size.saturating_mul(SECTOR)
    }

    fn block(&self, index: u64) -> Result<Block> {
        Ok(self.grain(self.entry(index)?))
    }

    fn visit_blocks(&self, blocks: Range<u64>, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
        let unit = self.per_table();
        let tables = unit.index(blocks.start)..unit.count(blocks.end);
        let mut walk = TableWalk::new(&*self.storage);
        let mut grain = blocks.start;
        self.directory.visit(tables, &mut |sector, count| {
            // Tables that are not there are passed at once. No table is named twice.
            let tables_end = unit.start(unit.index(grain).saturating_add(count));
            let first = unit.within(grain);
            let grains = tables_end.min(blocks.end).saturating_sub(grain);
            grain = grain.saturating_add(grains);
            let table = match sector {
                0 => None,
                sector => walk.read(FileOffset(sector.saturating_mul(SECTOR)), unit.start(4))?,
            };
            match table {
                None => visit(Block::Hole, grains),
                Some(table) => {
                    self.visit_table(slice(table, first.saturating_mul(4), grains.saturating_mul(4))?, visit)
                }
            }
        })
    }

    fn read_compressed(&self, host: FileOffset, within: u64, target: &mut [u8]) -> Result<()> {
        let known = self.grains.get(host.bytes());
        let grain = match known {
            Some(grain) => grain,
            None => {
                let grain = Arc::new(self.inflate(host)?);
                // Who reads a whole grain has no use for it a second time.
                if (target.len() as u64) < BlockMap::block_size(self) {
                    self.grains.put(host.bytes(), Arc::clone(&grain));
                }
                grain
            }
        };
        let from = memory_size(within);
        let bytes = grain.get(from..from.saturating_add(target.len())).ok_or_else(|| {
            let what = format!("a compressed grain holds {} bytes only", grain.len());
            Error::corrupt(what).in_file(self.storage.name()).at(host)
        })?;
        target.copy_from_slice(bytes);
        Ok(())
    }
}
