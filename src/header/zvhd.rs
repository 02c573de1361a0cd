//! Structures of ZVHD and ZVHD2, the compressed image formats of Huawei Cloud and Open Telekom Cloud.
//!
//! There is no specification. Source: the behaviour of the open-source converter huaweicloud/ims-qemu-img, commit
//! fc2d885 (2018). Files are compatible with that program; none was validated against a live image service. The
//! formats are not VHD: there is no block table, and numbers are little-endian.

use super::header;

/// Cookie of ZVHD.
pub const ZVHD_COOKIE: [u8; 8] = *b"stream\0\0";

/// Cookie of ZVHD2.
pub const ZVHD2_COOKIE: [u8; 8] = *b"z2strm\0\0";

/// Cookie of a record.
pub const RECORD_COOKIE: [u8; 12] = *b"hwstream bg\0";

/// The last bytes of a record.
pub const RECORD_END: [u8; 4] = *b"end\0";

/// Bytes of the disk that a record holds.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Headers, records, the bitmap's segments and the footer are aligned to this.
pub const ALIGNMENT: u64 = 4096;

/// Bytes of a segment of ZVHD2's index.
pub const INDEX_SEGMENT: u64 = 524_288;

/// Bytes of a segment of ZVHD2's bitmap.
pub const BITMAP_SEGMENT: u64 = 4096;

/// The current size is the original one rounded up to this.
pub const SIZE_GRANULE: u64 = 1 << 30;

/// Compression method of ZVHD2: zlib.
pub const METHOD_ZLIB: u8 = 0;

/// Compression method of ZVHD2: zstd.
pub const METHOD_ZSTD: u8 = 1;

header! {
    /// The first 512 of a header's 4096 bytes; the rest is zero. ZVHD leaves the fields from byte 87 on zero.
    ZvhdHeader, 512 bytes, little endian {
        /// [`ZVHD_COOKIE`] or [`ZVHD2_COOKIE`].
        0 cookie: [u8; 8],
        /// 2.
        8 features: u32,
        /// 0x00010000.
        12 version: u32,
        /// All ones.
        16 data_offset: u64,
        /// Seconds since 2000-01-01 UTC.
        24 timestamp: u32,
        /// `tap\0`.
        28 creator_application: [u8; 4],
        /// 0x00010004.
        32 creator_version: u32,
        /// 0.
        36 creator_os: u32,
        /// Bytes of the disk.
        40 original_size: u64,
        /// The same rounded up to 1 GiB, which the original converter takes for the disk's size.
        48 current_size: u64,
        /// Cylinders << 16 | heads << 8 | sectors a track.
        56 geometry: u32,
        /// 4.
        60 disk_type: u32,
        /// One's complement of the sum of the 512 bytes with this field zero.
        64 checksum: u32,
        /// Identity of the disk.
        68 unique_id: [u8; 16],
        /// 1 in ZVHD2.
        87 format_version: u8,
        /// Bytes of a block.
        88 block_size: u32,
        /// Blocks of the disk.
        92 blocks: u32,
        /// Where the index is, in bytes.
        96 index_offset: u64,
        /// Where the bitmap is, in bytes.
        104 bitmap_offset: u64,
        /// Bytes of the index.
        112 index_size: u32,
        /// Bytes of the bitmap.
        116 bitmap_size: u32,
        /// Bytes of a segment of the index.
        120 index_segment_size: u32,
        /// Bytes of a segment of the bitmap.
        124 bitmap_segment_size: u32,
        /// Segments of the index.
        128 index_segments: u32,
        /// Segments of the bitmap.
        132 bitmap_segments: u32,
        /// Records.
        136 stored_blocks: u32,
        /// [`METHOD_ZLIB`] or [`METHOD_ZSTD`].
        141 method: u8,
    }
}

header! {
    /// What stands before a record's payload.
    ZvhdRecordHeader, 48 bytes, little endian {
        /// [`RECORD_COOKIE`].
        0 cookie: [u8; 12],
        /// Bytes of the payload.
        12 payload_size: u32,
        /// Number of the block.
        16 block: u32,
    }
}

header! {
    /// An entry of ZVHD2's index.
    ZvhdIndexEntry, 16 bytes, little endian {
        /// Where the record is.
        0 record_offset: u64,
        /// Number of the block.
        8 block: u32,
        /// Bytes of the record.
        12 record_size: u32,
    }
}
