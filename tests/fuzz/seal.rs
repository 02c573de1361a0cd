//! Makes the checksums of a changed image right, as somebody does who wants its reader to go on.

use freightfs::format::ImageFormat;
use freightfs::header::{vhd, vhdx, zvhd};

use super::packed::PackedImage;

/// Bytes of a log that are looked through.
const MOST_LOG: u64 = 1 << 20;

pub fn seal(format: ImageFormat, image: &mut PackedImage) {
    if image.options & 1 == 0 {
        return;
    }
    match format {
        ImageFormat::Vhd => seal_vhd(image),
        ImageFormat::Vhdx => seal_vhdx(image),
        ImageFormat::Zvhd | ImageFormat::Zvhd2 => {
            for at in [0, image.file_size.saturating_sub(4096)] {
                let bytes: [u8; 512] = image.read(at);
                if bytes.starts_with(&zvhd::ZVHD_COOKIE) || bytes.starts_with(&zvhd::ZVHD2_COOKIE) {
                    image.write(at + 64, &vhd::checksum(&bytes, 64).to_le_bytes());
                }
            }
        }
        ImageFormat::Raw | ImageFormat::Qcow2 | ImageFormat::Vmdk | ImageFormat::Vdi => {}
    }
}

fn seal_vhd(image: &mut PackedImage) {
    for at in [0, image.file_size.saturating_sub(512)] {
        let footer: [u8; 512] = image.read(at);
        if !footer.starts_with(&vhd::FOOTER_COOKIE) {
            continue;
        }
        image.write(at + 64, &vhd::checksum(&footer, 64).to_be_bytes());
        let header = vhd::VhdFooter::parse(&footer).data_offset;
        let bytes: [u8; 1024] = image.read(header);
        if bytes.starts_with(&vhd::DYNAMIC_COOKIE) {
            image.write(header + 36, &vhd::checksum(&bytes, 36).to_be_bytes());
        }
    }
}

fn seal_vhdx(image: &mut PackedImage) {
    for (at, length) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)] {
        if image.read::<4>(at) != [0; 4] {
            put_sum(image, at, length);
        }
    }
    for at in [64 << 10, 128 << 10] {
        let header = vhdx::VhdxHeader::parse(&image.read(at));
        if header.signature != vhdx::HEADER_SIGNATURE || header.log_guid == [0; 16] {
            continue;
        }
        for sector in (0..u64::from(header.log_length).min(MOST_LOG)).step_by(4096) {
            let Some(at) = header.log_offset.checked_add(sector) else { continue };
            let entry: [u8; 16] = image.read(at);
            let length = u64::from(u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]));
            if entry.starts_with(&vhdx::LOG_SIGNATURE) && (64..=MOST_LOG).contains(&length) {
                put_sum(image, at, length);
            }
        }
    }
}

/// CRC-32C of a range with the field at 4 zero, put there.
fn put_sum(image: &mut PackedImage, at: u64, length: u64) {
    let mut bytes = image.range(at, length);
    bytes[4..8].fill(0);
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes) as u32;
    image.write(at + 4, &sum.to_le_bytes());
}
