//! VHD, fixed and dynamic.
//!
//! Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0. Differencing disks are refused by
//! name. Sector bitmaps are not looked at: in a dynamic disk a block that is there holds zeros where a bit is clear.

use std::sync::Arc;

use super::blocks::{Block, BlockMap};
use super::table::EntryTable;
use super::{DiskImage, ImageDescription};
use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::format::ImageFormat;
use crate::header::vhd::{
    DYNAMIC_COOKIE, FOOTER_COOKIE, TYPE_DYNAMIC, TYPE_FIXED, VhdDynamicHeader, VhdFooter, checksum,
};
use crate::storage::Storage;
use crate::units::{FileOffset, SECTOR, VirtualOffset, round_up};

/// Disk type: differencing.
const TYPE_DIFFERENCING: u32 = 4;

/// Largest disk (2040 GiB).
const MAX_VIRTUAL_SIZE: u64 = 2040 << 30;

/// A table's entry without a block.
const FREE: u32 = u32::MAX;

/// Creators whose `current_size` counts; of others the geometry's product does (QEMU, block/vpc.c).
const SIZE_BY_FIELD: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0"];

/// Cylinders, heads and sectors of a geometry that is full, so that the field counts after all.
const FULL_GEOMETRY: (u16, u8, u8) = (65535, 16, 255);

/// A VHD image.
pub struct VhdImage {
    storage: Arc<dyn Storage>,
    virtual_size: u64,
    creator: [u8; 4],
    body: Body,
}

enum Body {
    Fixed,
    Dynamic { table: EntryTable, block_size: u64, bitmap_size: u64 },
}

impl VhdImage {
    /// Opens `storage`.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let place = storage.name().to_owned();
        Self::open_unnamed(storage).map_err(|e| e.in_file(place))
    }

    fn open_unnamed(storage: Arc<dyn Storage>) -> Result<Self> {
        let footer = find_footer(&*storage)?;
        let virtual_size = virtual_size(&footer);
        if virtual_size > MAX_VIRTUAL_SIZE {
            return Err(Error::corrupt(format!(
                "a VHD has at most 2040 GiB, this one says {virtual_size} bytes"
            )));
        }
        let body = match footer.disk_type {
            TYPE_FIXED => {
                crate::storage::check_range(&*storage, FileOffset(0), virtual_size)?;
                Body::Fixed
            }
            TYPE_DYNAMIC => open_dynamic(&storage, &footer, virtual_size)?,
            TYPE_DIFFERENCING => {
                return Err(Error::unsupported("is a differencing VHD, which needs its parent"));
            }
            other => return Err(Error::unsupported(format!("VHD disks of type {other} are not supported"))),
        };
        Ok(Self { storage, virtual_size, creator: footer.creator_application, body })
    }
}

/// The footer in the last sector, or its copy in the first one.
fn find_footer(storage: &dyn Storage) -> Result<VhdFooter> {
    let last = storage.file_size().checked_sub(SECTOR);
    let last = last.ok_or_else(|| Error::corrupt("is not a VHD image: it is shorter than a footer"))?;
    let mut wrong =
        Error::corrupt("is not a VHD image, or is truncated: there is no footer in its last sector").at(last);
    for at in [last, 0] {
        let mut bytes = [0; VhdFooter::LENGTH];
        storage.read_exact_at(FileOffset(at), &mut bytes)?;
        let footer = VhdFooter::parse(&bytes);
        if footer.cookie != FOOTER_COOKIE {
            continue;
        }
        if footer.checksum == checksum(&bytes, 64) {
            return Ok(footer);
        }
        wrong = Error::corrupt("the footer's checksum is wrong").at(at + 64);
    }
    Err(wrong)
}

fn virtual_size(footer: &VhdFooter) -> u64 {
    let geometry = (footer.cylinders, footer.heads, footer.sectors);
    if SIZE_BY_FIELD.contains(&&footer.creator_application) || geometry == FULL_GEOMETRY {
        return footer.current_size;
    }
    u64::from(footer.cylinders) * u64::from(footer.heads) * u64::from(footer.sectors) * SECTOR
}

fn open_dynamic(storage: &Arc<dyn Storage>, footer: &VhdFooter, virtual_size: u64) -> Result<Body> {
    let at = FileOffset(footer.data_offset);
    let mut bytes = [0; VhdDynamicHeader::LENGTH];
    storage.read_exact_at(at, &mut bytes)?;
    let header = VhdDynamicHeader::parse(&bytes);
    if header.cookie != DYNAMIC_COOKIE {
        return Err(Error::corrupt("the dynamic header's cookie is wrong").at(at));
    }
    if header.checksum != checksum(&bytes, 36) {
        return Err(Error::corrupt("the dynamic header's checksum is wrong").at(at + 36));
    }
    let block_size = u64::from(header.block_size);
    if !block_size.is_power_of_two() || block_size < SECTOR {
        return Err(Error::corrupt(format!("blocks of {block_size} bytes are not allowed")).at(at + 32));
    }
    let blocks = virtual_size.div_ceil(block_size);
    if u64::from(header.max_table_entries) < blocks {
        let what =
            format!("the block table has {} entries, the disk needs {blocks}", header.max_table_entries);
        return Err(Error::corrupt(what).at(at + 28));
    }
    let table = EntryTable::new(Arc::clone(storage), FileOffset(header.table_offset), blocks, true)?;
    let bitmap_size = round_up((block_size / SECTOR).div_ceil(8), SECTOR);
    Ok(Body::Dynamic { table, block_size, bitmap_size })
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
        let Body::Dynamic { table, bitmap_size, .. } = &self.body else {
            return Ok(Block::Data(FileOffset(0)));
        };
        Ok(match table.get(index)? {
            FREE => Block::Hole,
            sector => Block::Data(FileOffset(u64::from(sector) * SECTOR + bitmap_size)),
        })
    }
}

impl DiskImage for VhdImage {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
        self.read_blocks(at, buf)
    }

    fn extent_at(&self, at: VirtualOffset) -> Result<Extent> {
        match self.body {
            Body::Fixed => {
                // A sparse file of a fixed disk has holes that its format does not know.
                let extent = self.storage.extent_at(FileOffset(at.bytes()))?;
                Ok(Extent::new(extent.kind, extent.length.min(self.virtual_size - at.bytes())))
            }
            Body::Dynamic { .. } => self.block_extent(at),
        }
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage.verify_unchanged()
    }

    fn description(&self) -> ImageDescription {
        let (kind, cluster_size) = match self.body {
            Body::Fixed => ("fixed", None),
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
            backing: None,
        }
    }
}
