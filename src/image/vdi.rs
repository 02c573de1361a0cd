//! VDI, dynamic and fixed.
//!
//! Source: VirtualBox, VDICore.h. Images with a parent are refused by name.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::blocks::{Block, BlockImage, BlockMap, BlockVisitor, visit_alike};
use super::table::{Entry, EntryTable};
use crate::error::{Error, Result};
use crate::format::ImageFormat;
use crate::header::vdi::{self, SIGNATURE, TYPE_DYNAMIC, VERSION, VdiHeader};
use crate::storage::Storage;
use crate::units::{FileOffset, MIB, SECTOR};

/// Image type: every block is there from the start (VDICore.h).
const TYPE_FIXED: u32 = 2;

/// A map's entry without a block.
const FREE: u64 = vdi::FREE as u64;

/// A map's entry whose block was discarded and reads as zeros (VDICore.h, VDI_IMAGE_BLOCK_ZERO).
const ZERO: u64 = u32::MAX as u64 - 1;

/// Bytes of a block: no writer makes another size, and QEMU reads no other.
const BLOCK_SIZE: u64 = MIB;

/// A VDI image.
pub struct VdiImage {
    storage: Arc<dyn Storage>,
    header: VdiHeader,
    map: EntryTable,
}

impl VdiImage {
    /// Opens `storage`.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut bytes = [0; VdiHeader::LENGTH];
        storage.read_exact_at(FileOffset(0), &mut bytes)?;
        let header = VdiHeader::parse(&bytes);
        check(&header).map_err(|e| e.in_file(storage.name()))?;
        let start = FileOffset(header.block_map_offset.into());
        let map = EntryTable::new(Arc::clone(&storage), start, header.blocks.into(), Entry::U32Le)?;
        Ok(Self { storage, header, map })
    }
}

impl VdiImage {
    /// What an entry of the map says.
    fn entry(&self, entry: u64) -> Block {
        match entry {
            FREE => Block::Hole,
            ZERO => Block::Zero,
            block => {
                let start = FileOffset(self.header.data_offset.into());
                Block::Data(start + block.saturating_mul(BLOCK_SIZE))
            }
        }
    }
}

fn check(header: &VdiHeader) -> Result<()> {
    if header.signature != SIGNATURE {
        return Err(Error::corrupt("is not a VDI image: the signature is wrong").at(64u64));
    }
    if header.version != VERSION {
        return Err(Error::unsupported(format!("is a VDI image of version {:#x}", header.version)).at(68u64));
    }
    if header.link_uuid != [0; 16] || header.parent_uuid != [0; 16] {
        return Err(Error::unsupported("the VDI image has a parent, which is not supported").at(424u64));
    }
    if header.image_type != TYPE_DYNAMIC && header.image_type != TYPE_FIXED {
        return Err(Error::unsupported(format!(
            "VDI images of type {} are not supported",
            header.image_type
        ))
        .at(76u64));
    }
    if u64::from(header.sector_size) != SECTOR || u64::from(header.block_size) != BLOCK_SIZE {
        let what = format!(
            "sectors of {} and blocks of {} bytes are not supported",
            header.sector_size, header.block_size
        );
        return Err(Error::unsupported(what).at(360u64));
    }
    super::check_virtual_size(header.disk_size).map_err(|e| e.at(368u64))?;
    if u64::from(header.blocks) < header.disk_size.div_ceil(BLOCK_SIZE) {
        let what =
            format!("the map's {} blocks do not cover the disk of {} bytes", header.blocks, header.disk_size);
        return Err(Error::corrupt(what).at(384u64));
    }
    Ok(())
}

impl BlockMap for VdiImage {
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn virtual_size(&self) -> u64 {
        self.header.disk_size
    }

    fn block_size(&self) -> u64 {
        BLOCK_SIZE
    }

    fn block(&self, index: u64) -> Result<Block> {
        Ok(self.entry(self.map.get(index)?))
    }

    fn visit_blocks(&self, blocks: Range<u64>, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
        self.map.visit(blocks, &mut |entry, count| visit_alike(self.entry(entry), count, visit))
    }
}

impl BlockImage for VdiImage {
    fn format(&self) -> ImageFormat {
        ImageFormat::Vdi
    }

    fn properties(&self) -> Vec<(String, String)> {
        let kind = if self.header.image_type == TYPE_FIXED { "fixed" } else { "dynamic" };
        vec![("type".to_owned(), kind.to_owned())]
    }
}
