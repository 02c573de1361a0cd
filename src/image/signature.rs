//! Disk images by their content: what a policy asks of bytes that a program writes. Readers never go by it.

use std::sync::Arc;

use super::vmdk::DESCRIPTOR_START;
use super::{ClosedGate, ReferenceGate, open_image};
use crate::error::Result;
use crate::format::ImageFormat;
use crate::header;
use crate::storage::Storage;
use crate::units::{FileOffset, SECTOR};

/// Bytes of a file's begin, and as many of its end, in which all signatures are.
pub const SIGNATURE_RANGE: u64 = SECTOR;

/// A disk image, as far as its bytes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecognizedImage {
    /// Its format; never raw, which has no signature.
    pub format: ImageFormat,
    /// Bytes of the disk, where its reader can open it.
    pub disk_size: Option<u64>,
}

/// The disk image that a file is by its content, whatever its name.
pub fn recognize(storage: &Arc<dyn Storage>) -> Result<Option<RecognizedImage>> {
    let length = storage.file_size().min(SIGNATURE_RANGE);
    let (mut head, mut tail) = (vec![0; length as usize], vec![0; length as usize]);
    storage.read_exact_at(FileOffset(0), &mut head)?;
    storage.read_exact_at(FileOffset(storage.file_size().saturating_sub(length)), &mut tail)?;
    let recognized = |format| {
        let gate: Arc<dyn ReferenceGate> = Arc::new(ClosedGate);
        let image = open_image(format, Arc::clone(storage), &gate, 0);
        RecognizedImage { format, disk_size: image.ok().map(|image| image.virtual_size()) }
    };
    Ok(format_of_content(&head, &tail).map(recognized))
}

/// The format by the first and the last [`SIGNATURE_RANGE`] bytes of a file, or all of a shorter one.
pub fn format_of_content(head: &[u8], tail: &[u8]) -> Option<ImageFormat> {
    let vdi = head.get(64..).is_some_and(|rest| rest.starts_with(&header::vdi::SIGNATURE_BYTES));
    let starts: [(&[u8], ImageFormat); 7] = [
        (&header::qcow2::MAGIC.to_be_bytes(), ImageFormat::Qcow2),
        (&header::vhdx::FILE_SIGNATURE, ImageFormat::Vhdx),
        (&header::vmdk::MAGIC, ImageFormat::Vmdk),
        (DESCRIPTOR_START, ImageFormat::Vmdk),
        (&header::zvhd::ZVHD_COOKIE, ImageFormat::Zvhd),
        (&header::zvhd::ZVHD2_COOKIE, ImageFormat::Zvhd2),
        (&header::vhd::FOOTER_COOKIE, ImageFormat::Vhd),
    ];
    let start = starts.into_iter().find(|(signature, _)| head.starts_with(signature));
    // A fixed VHD has its footer at the end only.
    let footer = header::vhd::FOOTER_COOKIE;
    let is_fixed = || tail.len() as u64 == SIGNATURE_RANGE && tail.starts_with(&footer);
    match start {
        Some((_, format)) => Some(format),
        None if vdi => Some(ImageFormat::Vdi),
        None => is_fixed().then_some(ImageFormat::Vhd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    fn format_of(bytes: &[u8]) -> Option<ImageFormat> {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("x", bytes.to_vec()));
        recognize(&storage).unwrap().map(|recognized| recognized.format)
    }

    #[test]
    fn images_are_recognized_by_their_signatures_and_nothing_else_is() {
        for (start, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], ImageFormat::Qcow2),
            (b"vhdxfile", ImageFormat::Vhdx),
            (b"KDMV", ImageFormat::Vmdk),
            (b"# Disk DescriptorFile\nversion=1\n", ImageFormat::Vmdk),
            (b"conectix", ImageFormat::Vhd),
            (b"stream\0\0", ImageFormat::Zvhd),
            (b"z2strm\0\0", ImageFormat::Zvhd2),
        ] {
            assert_eq!(format_of(start), Some(format));
            assert_eq!(format_of(&[start, &[0; 5000]].concat()), Some(format));
            assert_eq!(format_of(&[b"x", start].concat()), None);
        }
        let vdi = [&[b'<'; 64][..], &header::vdi::SIGNATURE_BYTES, &[0; 10]].concat();
        assert_eq!(format_of(&vdi), Some(ImageFormat::Vdi));
        let fixed = [&[7; 4096][..], b"conectix", &[0; 504]].concat();
        assert_eq!(format_of(&fixed), Some(ImageFormat::Vhd));
        assert_eq!(format_of(&fixed[..4600]), None);
        for plain in [&b""[..], b"Q", &[0; 4096]] {
            assert_eq!(format_of(plain), None);
        }
    }
}
