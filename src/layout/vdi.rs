//! VDI, dynamic: header, block map, blocks.
//!
//! Source: VirtualBox, VDICore.h. Blocks of 1 MiB, as all writers make them; the map's entries count blocks.

use std::sync::Arc;

use super::{Layout, LayoutInput, Region, copy_overlap, fill_table, units_region};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::AllocationMap;
use crate::header;
use crate::header::vdi::{FREE, SIGNATURE, TEXT, TYPE_DYNAMIC, VERSION, VdiHeader};
use crate::units::{FileOffset, MIB, SECTOR, round_up};

/// Bytes of a block.
pub const BLOCK_SIZE: u64 = MIB;

/// Where the block map is: behind the header.
const MAP_OFFSET: FileOffset = FileOffset(512);

/// Most blocks of a disk (QEMU, block/vdi.c, VDI_BLOCKS_IN_IMAGE_MAX).
const MAX_BLOCKS: u64 = (1 << 29) - 1;

/// Bytes of the header from its size field on (VDICore.h, VDIHEADER1PLUS).
const HEADER_SIZE: u32 = 0x190;

/// The arrangement of a dynamic VDI.
#[derive(Debug)]
pub struct VdiLayout {
    header: [u8; VdiHeader::LENGTH],
    map: Arc<AllocationMap>,
    data: FileOffset,
}

impl VdiLayout {
    /// For a disk that is rounded up to a sector. The map's units are the blocks.
    pub fn new(input: &LayoutInput, map: Arc<AllocationMap>) -> Result<Self> {
        if map.units() > MAX_BLOCKS {
            let what =
                format!("a VDI holds at most {MAX_BLOCKS} MiB, the disk has {} bytes", input.virtual_size);
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let data = round_up(MAP_OFFSET.bytes() + 4 * map.units(), BLOCK_SIZE);
        let mut text = [0; 64];
        header::put(&mut text, 0, TEXT);
        let derived = |mask: u8| input.seed.map(|byte| byte ^ mask);
        let mut header = VdiHeader {
            text,
            signature: SIGNATURE,
            version: VERSION,
            header_size: HEADER_SIZE,
            image_type: TYPE_DYNAMIC,
            block_map_offset: MAP_OFFSET.bytes() as u32,
            data_offset: data as u32,
            sector_size: SECTOR as u32,
            disk_size: round_up(input.virtual_size, SECTOR),
            block_size: BLOCK_SIZE as u32,
            blocks: map.units() as u32,
            blocks_allocated: map.allocated() as u32,
            image_uuid: derived(0),
            snapshot_uuid: derived(0x55),
            link_uuid: [0; 16],
            parent_uuid: [0; 16],
        };
        // All zeros mean "no image".
        header.image_uuid[0] |= 1;
        Ok(Self { header: header.encode(), map, data: FileOffset(data) })
    }
}

impl Layout for VdiLayout {
    fn file_size(&self) -> u64 {
        self.data.bytes() + self.map.allocated() * BLOCK_SIZE
    }

    fn region_at(&self, at: FileOffset) -> Region {
        units_region(&self.map, self.data, at)
    }

    fn metadata(&self, at: FileOffset, buf: &mut [u8]) {
        buf.fill(0);
        copy_overlap(&self.header, FileOffset(0), at, buf);
        fill_table(MAP_OFFSET..MAP_OFFSET + 4 * self.map.units(), at, buf, |indices| {
            self.map.ranked(indices).map(|rank| rank.map_or(FREE, |rank| rank as u32).to_le_bytes())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::LayoutOptions;
    use super::super::tests::map;
    use super::*;

    #[test]
    fn sizes_follow_the_formula() {
        let input = LayoutInput {
            virtual_size: 10 << 30,
            seed: [0; 16],
            file_name: String::new(),
            options: LayoutOptions::default(),
        };
        let layout =
            VdiLayout::new(&input, map(10 << 30, BLOCK_SIZE, &[(0, 1), (5 << 30, 3 * MIB)])).unwrap();
        assert_eq!(layout.file_size(), MIB + 4 * MIB);
        assert_ne!(layout.header[392..408], [0; 16]);
    }
}
