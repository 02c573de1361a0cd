//! VMDK in one sparse file: monolithicSparse and streamOptimized.
//!
//! Source: VMware, "Virtual Disk Format 5.0". Descriptors that name other files and disks with a parent are refused
//! by name. Grains are inflated on each read; a reader of small pieces of a compressed image pays for whole grains.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::blocks::{Block, BlockMap};
use super::table::EntryTable;
use super::{DiskImage, ImageDescription};
use crate::codec;
use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::format::ImageFormat;
use crate::header::vmdk::{MAGIC, VmdkSparseHeader};
use crate::storage::Storage;
use crate::units::{FileOffset, GIB, SECTOR, VirtualOffset};

/// Flags of the header: grain table entries of 1 are zeros; grains are compressed.
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;

/// A directory's offset that says: it stands in the footer.
const DIRECTORY_AT_END: u64 = u64::MAX;

/// Limits of QEMU (block/vmdk.c): entries of a grain table, bytes of a grain, entries of the directory.
const MAX_TABLE_ENTRIES: u32 = 512;
const MAX_GRAIN: u64 = GIB;
const MAX_DIRECTORY: u64 = 32 << 20;

/// Largest descriptor that is read, in bytes.
const MAX_DESCRIPTOR: u64 = 1 << 20;

/// Grain tables that are kept, of 2 KiB each.
const TABLES_KEPT: NonZeroUsize = NonZeroUsize::new(256).expect("256 is not 0");

/// Bytes before a compressed grain's stream: its first sector (u64) and its length (u32).
const GRAIN_MARKER: usize = 12;

/// A VMDK image.
pub struct VmdkImage {
    storage: Arc<dyn Storage>,
    header: VmdkSparseHeader,
    directory: EntryTable,
    tables: Mutex<LruCache<u32, Arc<Vec<u8>>>>,
    create_type: String,
}

impl VmdkImage {
    /// Opens `storage`.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let place = storage.name().to_owned();
        Self::open_unnamed(storage).map_err(|e| e.in_file(place))
    }

    fn open_unnamed(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut header = read_header(&*storage, FileOffset(0))?;
        if header.directory_offset == DIRECTORY_AT_END {
            // The footer is a header before the end-of-stream marker's sector.
            let at = storage.file_size().checked_sub(2 * SECTOR);
            let at =
                at.ok_or_else(|| Error::corrupt("the file is too short for a footer; it is truncated"))?;
            header = read_header(&*storage, FileOffset(at))?;
        }
        check(&header)?;
        let create_type = read_descriptor(&header, &*storage)?;
        let covered = header.grain_size * u64::from(header.grain_table_entries);
        let tables = header.capacity.div_ceil(covered);
        if tables > MAX_DIRECTORY {
            return Err(
                Error::corrupt(format!("a grain directory of {tables} entries is too large")).at(12u64)
            );
        }
        let start = header.directory_offset.checked_mul(SECTOR);
        let start = start.ok_or_else(|| Error::corrupt("the grain directory's offset is wrong").at(56u64))?;
        let directory = EntryTable::new(Arc::clone(&storage), FileOffset(start), tables, false)?;
        let tables = Mutex::new(LruCache::new(TABLES_KEPT));
        Ok(Self { storage, header, directory, tables, create_type })
    }

    fn compressed(&self) -> bool {
        self.header.flags & FLAG_COMPRESSED != 0
    }

    /// The grain's entry in its table; 0 when there is no table.
    fn entry(&self, grain: u64) -> Result<u32> {
        let per_table = u64::from(self.header.grain_table_entries);
        let table = self.directory.get(grain / per_table)?;
        if table == 0 {
            return Ok(0);
        }
        let entries = self.table(table)?;
        let at = 4 * (grain % per_table) as usize;
        Ok(u32::from_le_bytes([entries[at], entries[at + 1], entries[at + 2], entries[at + 3]]))
    }

    /// The grain table at that sector.
    fn table(&self, sector: u32) -> Result<Arc<Vec<u8>>> {
        if let Some(known) = self.tables.lock().get(&sector) {
            return Ok(Arc::clone(known));
        }
        let mut entries = vec![0; 4 * self.header.grain_table_entries as usize];
        self.storage.read_exact_at(FileOffset(u64::from(sector) * SECTOR), &mut entries)?;
        let entries = Arc::new(entries);
        self.tables.lock().put(sector, Arc::clone(&entries));
        Ok(entries)
    }

    /// A grain, inflated: the last one of a disk may be shorter than the others.
    fn inflate(&self, host: FileOffset) -> Result<Vec<u8>> {
        let mut marker = [0; GRAIN_MARKER];
        self.storage.read_exact_at(host, &mut marker)?;
        let length = u64::from(u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]));
        let grain = BlockMap::block_size(self);
        // Deflate adds little to what it cannot compress; more than twice the grain is no grain.
        if length > 2 * grain + SECTOR {
            let what = format!("a compressed grain of {length} bytes is too large");
            return Err(Error::corrupt(what).in_file(self.storage.name()).at(host));
        }
        crate::storage::check_range(&*self.storage, host + GRAIN_MARKER as u64, length)?;
        let mut input = vec![0; length as usize];
        self.storage.read_exact_at(host + GRAIN_MARKER as u64, &mut input)?;
        let mut output = vec![0; grain as usize];
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
    if bytes.starts_with(b"# Disk DescriptorFile") {
        return Err(Error::unsupported(
            "is a VMDK descriptor that names other files, which is not supported",
        ));
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
    if header.capacity > i64::MAX as u64 / SECTOR {
        return Err(Error::corrupt("the capacity is too large").at(12u64));
    }
    if header.flags & FLAG_COMPRESSED != 0 && header.compression != 1 {
        let what = format!("compression algorithm {} is not supported", header.compression);
        return Err(Error::unsupported(what).at(77u64));
    }
    Ok(())
}

/// Reads the embedded descriptor: the type it says, after refusing a parent and extents in other files.
fn read_descriptor(header: &VmdkSparseHeader, storage: &dyn Storage) -> Result<String> {
    let at = header.descriptor_offset.checked_mul(SECTOR).map(FileOffset);
    let length = header.descriptor_size.saturating_mul(SECTOR);
    let (Some(at), true) = (at, header.descriptor_offset > 0 && (1..=MAX_DESCRIPTOR).contains(&length))
    else {
        return Err(Error::unsupported("the VMDK has no embedded descriptor of usual size").at(28u64));
    };
    crate::storage::check_range(storage, at, length)?;
    let mut bytes = vec![0; length as usize];
    storage.read_exact_at(at, &mut bytes)?;
    let text = String::from_utf8_lossy(bytes.split(|&b| b == 0).next().unwrap_or_default()).into_owned();
    let value = |name: &str| {
        let line =
            text.lines().find_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix('='));
        line.map(|value| value.trim().trim_matches('"').to_owned())
    };
    if value("parentCID").is_some_and(|parent| !parent.eq_ignore_ascii_case("ffffffff")) {
        return Err(Error::unsupported("the VMDK has a parent, which is not supported").at(at));
    }
    let create_type = value("createType").unwrap_or_default();
    if !["monolithicSparse", "streamOptimized"].contains(&create_type.as_str()) {
        return Err(Error::unsupported(format!("VMDK of type {create_type:?} is not supported")).at(at));
    }
    Ok(create_type)
}

impl BlockMap for VmdkImage {
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn virtual_size(&self) -> u64 {
        self.header.capacity * SECTOR
    }

    fn block_size(&self) -> u64 {
        self.header.grain_size * SECTOR
    }

    fn block(&self, index: u64) -> Result<Block> {
        let zero_grains = self.header.flags & FLAG_ZERO_GRAINS != 0;
        Ok(match self.entry(index)? {
            0 => Block::Hole,
            1 if zero_grains => Block::Zero,
            sector if self.compressed() => Block::Compressed(FileOffset(u64::from(sector) * SECTOR)),
            sector => Block::Data(FileOffset(u64::from(sector) * SECTOR)),
        })
    }

    fn read_compressed(&self, host: FileOffset, within: u64, target: &mut [u8]) -> Result<()> {
        let grain = self.inflate(host)?;
        let from = within as usize;
        let bytes = grain.get(from..from + target.len()).ok_or_else(|| {
            let what = format!("a compressed grain holds {} bytes only", grain.len());
            Error::corrupt(what).in_file(self.storage.name()).at(host)
        })?;
        target.copy_from_slice(bytes);
        Ok(())
    }
}

impl DiskImage for VmdkImage {
    fn virtual_size(&self) -> u64 {
        BlockMap::virtual_size(self)
    }

    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
        self.read_blocks(at, buf)
    }

    fn extent_at(&self, at: VirtualOffset) -> Result<Extent> {
        self.block_extent(at)
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage.verify_unchanged()
    }

    fn description(&self) -> ImageDescription {
        ImageDescription {
            file: self.storage.name().to_owned(),
            format: ImageFormat::Vmdk,
            virtual_size: BlockMap::virtual_size(self),
            file_size: self.storage.file_size(),
            cluster_size: Some(BlockMap::block_size(self)),
            properties: vec![("create type".to_owned(), self.create_type.clone())],
            backing: None,
        }
    }
}
