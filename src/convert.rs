//! The conversion: an image seen through a layout is a [`VirtualFile`], computed where it is read.

mod compressed;
mod workspace;
mod write;

use std::sync::Arc;

pub use compressed::CompressedFile;
pub use workspace::Workspace;
#[doc(hidden)]
pub use workspace::fuzz_lengths;
pub use write::write_file;

use crate::error::Result;
use crate::extent::{Extent, ExtentKind};
use crate::image::{DiskImage, read_padded};
use crate::layout::{Layout, RegionSource};
use crate::units::FileOffset;
use crate::vfile::{VirtualFile, readable};

/// A file of some format over an image.
///
/// Deterministic: the same image, seed and file name give the same bytes, in any order of reads.
pub struct ConvertedFile {
    image: Arc<dyn DiskImage>,
    layout: Box<dyn Layout>,
}

impl ConvertedFile {
    /// Lays `image` out. Reads nothing.
    pub fn new(image: Arc<dyn DiskImage>, layout: Box<dyn Layout>) -> Self {
        Self { image, layout }
    }
}

impl VirtualFile for ConvertedFile {
    fn file_size(&self) -> u64 {
        self.layout.file_size()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let length = readable(self.file_size(), at, buf.len());
        let mut done = 0;
        while done < length {
            let here = at + done as u64;
            let region = self.layout.region_at(here);
            let piece = usize::try_from(region.length).unwrap_or(usize::MAX).min(length - done);
            let target = &mut buf[done..done + piece];
            match region.source {
                RegionSource::Metadata => self.layout.metadata(here, target),
                RegionSource::Guest(from) => read_padded(&*self.image, from, target)?,
                RegionSource::Zero => target.fill(0),
            }
            done += piece;
        }
        if length > 0 {
            self.image.verify_unchanged()?;
        }
        Ok(length)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        let region = self.layout.region_at(at);
        let length = region.length.min(self.file_size() - at.bytes());
        match region.source {
            RegionSource::Metadata => Ok(Extent::new(ExtentKind::Data, length)),
            RegionSource::Zero => Ok(Extent::new(ExtentKind::Hole, length)),
            RegionSource::Guest(from) if from.bytes() >= self.image.virtual_size() => {
                Ok(Extent::new(ExtentKind::Hole, length))
            }
            RegionSource::Guest(from) => {
                let inside = length.min(self.image.virtual_size() - from.bytes());
                self.image.extent_at(from, inside)
            }
        }
    }
}
