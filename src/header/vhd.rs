//! The VHD footer and dynamic header (Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0).

use super::header;

/// The footer's cookie ("Hard Disk Footer Format").
pub const FOOTER_COOKIE: [u8; 8] = *b"conectix";

/// The dynamic header's cookie ("Dynamic Disk Header Format").
pub const DYNAMIC_COOKIE: [u8; 8] = *b"cxsparse";

/// Disk type: fixed.
pub const TYPE_FIXED: u32 = 2;

/// Disk type: dynamic.
pub const TYPE_DYNAMIC: u32 = 3;

/// Disk type: differencing.
pub const TYPE_DIFFERENCING: u32 = 4;

/// Platform code of a parent locator: a relative Windows path in UTF-16, little-endian.
pub const LOCATOR_RELATIVE: [u8; 4] = *b"W2ru";

/// Platform code of a parent locator: an absolute Windows path in UTF-16, little-endian.
pub const LOCATOR_ABSOLUTE: [u8; 4] = *b"W2ku";

header! {
    /// The last 512 bytes of every VHD; dynamic ones have a copy at the start.
    VhdFooter, 512 bytes, big endian {
        /// [`FOOTER_COOKIE`].
        0 cookie: [u8; 8],
        /// 2: the reserved bit that is always set.
        8 features: u32,
        /// 0x00010000.
        12 version: u32,
        /// Where the dynamic header is; all ones for fixed disks.
        16 data_offset: u64,
        /// Seconds since 2000-01-01 UTC.
        24 timestamp: u32,
        /// Who wrote it.
        28 creator_application: [u8; 4],
        /// Their version.
        32 creator_version: u32,
        /// Their operating system.
        36 creator_os: [u8; 4],
        /// Bytes of the disk when it was made.
        40 original_size: u64,
        /// Bytes of the disk.
        48 current_size: u64,
        /// Cylinders of the geometry.
        56 cylinders: u16,
        /// Heads of the geometry.
        58 heads: u8,
        /// Sectors a track of the geometry.
        59 sectors: u8,
        /// [`TYPE_FIXED`], [`TYPE_DYNAMIC`] or [`TYPE_DIFFERENCING`].
        60 disk_type: u32,
        /// One's complement of the sum of all other bytes.
        64 checksum: u32,
        /// Identity of the disk.
        68 unique_id: [u8; 16],
        /// Whether it holds a saved state.
        84 saved_state: u8,
    }
}

header! {
    /// Where a dynamic disk's blocks are.
    VhdDynamicHeader, 1024 bytes, big endian {
        /// [`DYNAMIC_COOKIE`].
        0 cookie: [u8; 8],
        /// All ones: there is no further structure.
        8 data_offset: u64,
        /// Where the block allocation table is.
        16 table_offset: u64,
        /// 0x00010000.
        24 header_version: u32,
        /// Entries of the block allocation table.
        28 max_table_entries: u32,
        /// Bytes of a block without its bitmap.
        32 block_size: u32,
        /// One's complement of the sum of all other bytes.
        36 checksum: u32,
        /// Differencing: the parent's identity.
        40 parent_unique_id: [u8; 16],
        /// Differencing: the parent's file name, UTF-16, big-endian, ended by zeros.
        64 parent_name: [u8; 512],
        /// Differencing: 8 places where the parent's path stands, see [`VhdParentLocator`].
        576 parent_locators: [u8; 192],
    }
}

header! {
    /// Where the parent's path stands in some platform's form ("Parent Locator Entry").
    VhdParentLocator, 24 bytes, big endian {
        /// Which form it has; zeros for none.
        0 platform_code: [u8; 4],
        /// Bytes of the path.
        8 data_length: u32,
        /// Where the path is.
        16 data_offset: u64,
    }
}

/// The checksum of a footer or dynamic header whose checksum field, 4 bytes at `field`, counts as zero.
pub fn checksum(bytes: &[u8], field: usize) -> u32 {
    let counted = bytes.iter().enumerate().filter(|(at, _)| !(field..field.saturating_add(4)).contains(at));
    !counted.fold(0u32, |sum, (_, &byte)| sum.wrapping_add(u32::from(byte)))
}

/// Cylinders, heads and sectors a track of a disk of that many sectors (appendix "CHS Calculation").
pub fn geometry(sectors: u64) -> (u16, u8, u8) {
    const MAX_CYLINDERS: u64 = 65535;
    let total = sectors.min(MAX_CYLINDERS * 16 * 255);
    // Of cylinders times heads: the cylinders.
    let of = |tracks: u64, heads: u8| {
        u16::try_from(tracks.checked_div(heads.into()).unwrap_or_default()).unwrap_or(u16::MAX)
    };
    if total >= MAX_CYLINDERS * 16 * 63 {
        return (of(total / 255, 16), 16, 255);
    }
    let heads = u8::try_from((total / 17).div_ceil(1024).max(4)).unwrap_or(u8::MAX);
    if heads <= 16 && total / 17 < u64::from(heads).saturating_mul(1024) {
        return (of(total / 17, heads), heads, 17);
    }
    if total / 31 < 16 * 1024 {
        return (of(total / 31, 16), 16, 31);
    }
    (of(total / 63, 16), 16, 63)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn footers_survive_parse_and_encode() {
        let mut footer = VhdFooter::parse(&[0x5a; 512]);
        footer.cookie = FOOTER_COOKIE;
        let encoded = footer.encode();
        assert_eq!(VhdFooter::parse(&encoded), footer);
        assert_eq!(&encoded[..8], b"conectix");
        assert_eq!(encoded[85], 0);
    }

    #[test]
    fn geometries_of_the_specification() {
        // 64 MiB, 20 GiB and the largest geometry there is.
        assert_eq!(geometry(131_072), (963, 8, 17));
        assert_eq!(geometry(41_943_040), (41610, 16, 63));
        assert_eq!(geometry(u64::MAX), (65535, 16, 255));
        assert_eq!(geometry(0), (0, 4, 17));
    }

    #[test]
    fn the_checksum_leaves_its_own_field_out() {
        let mut bytes = [1u8; 512];
        bytes[64..68].fill(0xff);
        assert_eq!(checksum(&bytes, 64), !508);
    }
}
