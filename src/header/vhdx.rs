//! Structures of VHDX ([MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format", section 2).

use super::header;

/// A GUID as it is on disk.
pub type Guid = [u8; 16];

/// The first bytes of the file (section 2.2.1).
pub const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";

/// Signature of a header (section 2.2.2), a region table (2.2.3) and the metadata table (2.6.1).
pub const HEADER_SIGNATURE: [u8; 4] = *b"head";
/// See [`HEADER_SIGNATURE`].
pub const REGION_SIGNATURE: [u8; 4] = *b"regi";
/// See [`HEADER_SIGNATURE`].
pub const METADATA_SIGNATURE: [u8; 8] = *b"metadata";

/// Regions (section 2.2.3.2).
pub const REGION_BAT: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
/// See [`REGION_BAT`].
pub const REGION_METADATA: Guid = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);

/// Metadata items (section 2.6.2).
pub const FILE_PARAMETERS: Guid = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
/// See [`FILE_PARAMETERS`].
pub const VIRTUAL_DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
/// See [`FILE_PARAMETERS`].
pub const VIRTUAL_DISK_ID: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
/// See [`FILE_PARAMETERS`].
pub const LOGICAL_SECTOR_SIZE: Guid = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
/// See [`FILE_PARAMETERS`].
pub const PHYSICAL_SECTOR_SIZE: Guid = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);

/// State of a BAT entry whose block is fully present (section 2.5.1.1).
pub const PAYLOAD_BLOCK_FULLY_PRESENT: u64 = 6;

/// The first three parts are little-endian on disk, the last eight bytes are in order.
const fn guid(first: u32, second: u16, third: u16, rest: u64) -> Guid {
    let (a, b, c, d) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes(), rest.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

header! {
    /// The start of one of the two 4 KiB headers, of which the valid one with the larger sequence number counts.
    VhdxHeader, 80 bytes, little endian {
        /// [`HEADER_SIGNATURE`].
        0 signature: [u8; 4],
        /// CRC-32C of the 4 KiB with this field zero.
        4 checksum: u32,
        /// Larger is newer.
        8 sequence_number: u64,
        /// Changes with the file.
        16 file_write_guid: Guid,
        /// Changes with the disk's content.
        32 data_write_guid: Guid,
        /// The log's identity; zero when there is nothing to replay.
        48 log_guid: Guid,
        /// 0.
        64 log_version: u16,
        /// 1.
        66 version: u16,
        /// Bytes of the log.
        68 log_length: u32,
        /// Where the log is.
        72 log_offset: u64,
    }
}

/// Signature of a log entry, and of what it holds (section 2.3.1).
pub const LOG_SIGNATURE: [u8; 4] = *b"loge";
/// See [`LOG_SIGNATURE`].
pub const LOG_DATA_SIGNATURE: [u8; 4] = *b"desc";
/// See [`LOG_SIGNATURE`].
pub const LOG_ZERO_SIGNATURE: [u8; 4] = *b"zero";
/// See [`LOG_SIGNATURE`].
pub const LOG_SECTOR_SIGNATURE: [u8; 4] = *b"data";

header! {
    /// The start of a log entry (section 2.3.1.1).
    VhdxLogHeader, 64 bytes, little endian {
        /// [`LOG_SIGNATURE`].
        0 signature: [u8; 4],
        /// CRC-32C of the whole entry with this field zero.
        4 checksum: u32,
        /// Bytes of the entry, a multiple of 4 KiB.
        8 entry_length: u32,
        /// Where the sequence that this entry ends begins, from the log's start.
        12 tail: u32,
        /// One more than that of the entry before.
        16 sequence_number: u64,
        /// Descriptors that follow.
        24 descriptor_count: u32,
        /// The log's identity.
        32 log_guid: Guid,
        /// Bytes that the file had at least when this was written.
        48 flushed_file_offset: u64,
        /// Bytes that the file needs.
        56 last_file_offset: u64,
    }
}

header! {
    /// A descriptor of a log entry: a sector of data, or a run of zeros (sections 2.3.1.2 and 2.3.1.3).
    VhdxLogDescriptor, 32 bytes, little endian {
        /// [`LOG_DATA_SIGNATURE`] or [`LOG_ZERO_SIGNATURE`].
        0 signature: [u8; 4],
        /// Data: the last 4 bytes of the sector.
        4 trailing_bytes: [u8; 4],
        /// Data: the first 8 bytes of the sector. Zeros: how many bytes.
        8 leading_bytes_or_length: u64,
        /// Where in the file.
        16 file_offset: u64,
        /// The entry's.
        24 sequence_number: u64,
    }
}

header! {
    /// An entry of a region table.
    VhdxRegionEntry, 32 bytes, little endian {
        /// Which region.
        0 guid: Guid,
        /// Where it is.
        16 file_offset: u64,
        /// Its bytes.
        24 length: u32,
        /// Bit 0: who does not know it must not open the file.
        28 required: u32,
    }
}

header! {
    /// An entry of the metadata table.
    VhdxMetadataEntry, 32 bytes, little endian {
        /// Which item.
        0 guid: Guid,
        /// Where it is, from the region's start; at least 64 KiB.
        16 offset: u32,
        /// Its bytes.
        20 length: u32,
        /// Bit 1: about the virtual disk; bit 2: required.
        24 flags: u32,
    }
}
