//! A file in the staging directory as the source of a job.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::storage::{FileStorage, Storage};
use crate::units::FileOffset;
use crate::vfile::{VirtualFile, readable};

/// A staged file that is complete. It must not change while a job reads it, and is checked for that.
pub struct StagedFile {
    storage: FileStorage,
}

/// Opens a staged file.
pub fn staged_file(path: &Path) -> Result<Arc<dyn VirtualFile>> {
    let storage = FileStorage::open(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            Error::new(ErrorKind::Incomplete, "the staged bytes of this write are gone").because(e)
        }
        _ => e,
    })?;
    Ok(Arc::new(StagedFile { storage }))
}

impl VirtualFile for StagedFile {
    fn file_size(&self) -> u64 {
        self.storage.file_size()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let length = readable(self.file_size(), at, buf.len());
        if length > 0 {
            self.storage.read_exact_at(at, &mut buf[..length])?;
        }
        self.storage.verify_unchanged()?;
        Ok(length)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.storage.extent_at(at)
    }
}
