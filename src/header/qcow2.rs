//! The qcow2 header (QEMU, docs/interop/qcow2.rst, "Header").

use super::header;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a version 2 header, which ends before the version 3 fields.
pub const V2_LENGTH: u32 = 72;

/// Bytes of the version 3 header with the compression type.
pub const V3_LENGTH: u32 = 112;

header! {
    /// Versions 2 and 3; the fields from byte 72 on exist in version 3 only.
    Qcow2Header, 112 bytes, big endian {
        /// [`MAGIC`].
        0 magic: u32,
        /// 2 or 3.
        4 version: u32,
        /// Where the backing file's name is, 0 for none.
        8 backing_file_offset: u64,
        /// Bytes of that name.
        16 backing_file_size: u32,
        /// The cluster size is 2 to this power.
        20 cluster_bits: u32,
        /// Bytes of the disk.
        24 virtual_size: u64,
        /// 0 none, 1 AES, 2 LUKS.
        32 crypt_method: u32,
        /// Entries of the L1 table.
        36 l1_size: u32,
        /// Where the L1 table is.
        40 l1_table_offset: u64,
        /// Where the refcount table is.
        48 refcount_table_offset: u64,
        /// Clusters of the refcount table.
        56 refcount_table_clusters: u32,
        /// Internal snapshots.
        60 nb_snapshots: u32,
        /// Where the snapshot table is.
        64 snapshots_offset: u64,
        /// Features without which the image must not be opened.
        72 incompatible_features: u64,
        /// Features that may be ignored.
        80 compatible_features: u64,
        /// Features that are cleared when the image is written by somebody who does not know them.
        88 autoclear_features: u64,
        /// A refcount has 2 to this power bits.
        96 refcount_order: u32,
        /// Bytes of the header.
        100 header_length: u32,
        /// 0 zlib, 1 zstd; only with the incompatible feature bit 3.
        104 compression_type: u8,
    }
}
