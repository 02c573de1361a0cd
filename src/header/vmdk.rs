//! The header of VMDK sparse extents (VMware, "Virtual Disk Format 5.0", "Hosted Sparse Extent Header").

use super::header;

/// `KDMV`.
pub const MAGIC: [u8; 4] = *b"KDMV";

header! {
    /// The first sector of a sparse extent. Offsets and sizes count sectors of 512 bytes.
    VmdkSparseHeader, 512 bytes, little endian {
        /// [`MAGIC`].
        0 magic: [u8; 4],
        /// 1 for monolithicSparse, 3 for streamOptimized.
        4 version: u32,
        /// Bit 0 newline test valid, bit 1 redundant grain directory, bit 16 compressed, bit 17 markers.
        8 flags: u32,
        /// Sectors of the disk.
        12 capacity: u64,
        /// Sectors of a grain.
        20 grain_size: u64,
        /// Where the descriptor is.
        28 descriptor_offset: u64,
        /// Its length.
        36 descriptor_size: u64,
        /// Entries of a grain table.
        44 grain_table_entries: u32,
        /// Where the redundant grain directory is.
        48 redundant_directory_offset: u64,
        /// Where the grain directory is.
        56 directory_offset: u64,
        /// Sectors before the first grain.
        64 overhead: u64,
        /// Whether the writer did not close it.
        72 unclean_shutdown: u8,
        /// `\n`, ` `, `\r`, `\n`: shows that no transfer changed line ends.
        73 line_ends: [u8; 4],
        /// 0 none, 1 deflate.
        77 compression: u16,
    }
}
