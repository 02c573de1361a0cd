//! Raw images: the file is the disk.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::{DiskImage, ExtentVisitor, ImageDescription};
use crate::error::Result;
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage};
use crate::units::{FileOffset, VirtualOffset};

/// A raw image. Its content is never probed for another format (CVE-2026-24708).
pub struct RawImage {
    storage: Arc<dyn Storage>,
}

impl RawImage {
    /// The whole of `storage` as a disk.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        super::check_virtual_size(storage.file_size()).map_err(|e| e.in_file(storage.name()))?;
        Ok(Self { storage })
    }
}

impl DiskImage for RawImage {
    fn virtual_size(&self) -> u64 {
        self.storage.file_size()
    }

    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
        self.storage.read_exact_at(FileOffset(at.bytes()), buf)
    }

    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        super::visit_storage(&*self.storage, FileOffset(range.start.bytes()), range.end - range.start, visit)
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage.verify_unchanged()
    }

    fn sources(&self) -> Vec<Generation> {
        vec![self.storage.generation().clone()]
    }

    fn description(&self) -> ImageDescription {
        ImageDescription {
            file: self.storage.name().to_owned(),
            format: ImageFormat::Raw,
            virtual_size: self.virtual_size(),
            file_size: self.storage.file_size(),
            cluster_size: None,
            properties: Vec::new(),
            backing: None,
        }
    }
}
