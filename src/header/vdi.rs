//! The header of VDI images (VirtualBox, VDICore.h, VDIHEADER1PLUS behind VDIPREHEADER).

use super::header;

/// What stands at the start, for people.
pub const TEXT: &[u8] = b"<<< Oracle VM VirtualBox Disk Image >>>\n";

/// The signature behind the text.
pub const SIGNATURE: u32 = 0xbeda_107f;

/// The signature as it is on disk.
pub const SIGNATURE_BYTES: [u8; 4] = SIGNATURE.to_le_bytes();

/// Version 1.1.
pub const VERSION: u32 = 0x0001_0001;

/// Image type: blocks are allocated when they are written.
pub const TYPE_DYNAMIC: u32 = 1;

/// A block map's entry without a block.
pub const FREE: u32 = u32::MAX;

header! {
    /// The first 512 bytes of an image.
    VdiHeader, 512 bytes, little endian {
        /// [`TEXT`], padded with zeros.
        0 text: [u8; 64],
        /// [`SIGNATURE`].
        64 signature: u32,
        /// [`VERSION`].
        68 version: u32,
        /// Bytes of the header from here on.
        72 header_size: u32,
        /// [`TYPE_DYNAMIC`] or 2, fixed.
        76 image_type: u32,
        /// Where the block map is.
        340 block_map_offset: u32,
        /// Where the blocks are.
        344 data_offset: u32,
        /// Bytes of a sector.
        360 sector_size: u32,
        /// Bytes of the disk.
        368 disk_size: u64,
        /// Bytes of a block.
        376 block_size: u32,
        /// Blocks of the disk.
        384 blocks: u32,
        /// Blocks in the file.
        388 blocks_allocated: u32,
        /// Identity of the image, not zero.
        392 image_uuid: [u8; 16],
        /// Identity of its last modification.
        408 snapshot_uuid: [u8; 16],
        /// Identity of the parent; zero for none.
        424 link_uuid: [u8; 16],
        /// Identity of the parent's last modification; zero for none.
        440 parent_uuid: [u8; 16],
    }
}
