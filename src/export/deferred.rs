//! The file of a job that waits: its size is known, and it is opened when somebody reads it. So thousands of jobs that
//! wait hold no descriptors.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::extent::Extent;
use crate::units::FileOffset;
use crate::vfile::VirtualFile;

/// Opens the file.
type Open = Box<dyn Fn() -> Result<Arc<dyn VirtualFile>> + Send + Sync>;

/// A file that is opened at its first read.
pub(super) struct DeferredFile {
    file_size: u64,
    known_size: Option<u64>,
    open: Open,
    opened: Mutex<Option<Arc<dyn VirtualFile>>>,
}

impl DeferredFile {
    /// Such a file of `file_size` bytes, or at most so many while `known_size` is none.
    pub(super) fn new(file_size: u64, known_size: Option<u64>, open: Open) -> Self {
        Self { file_size, known_size, open, opened: Mutex::default() }
    }

    fn opened(&self) -> Result<Arc<dyn VirtualFile>> {
        let mut opened = self.opened.lock();
        if let Some(file) = &*opened {
            return Ok(Arc::clone(file));
        }
        let file = (self.open)()?;
        *opened = Some(Arc::clone(&file));
        Ok(file)
    }
}

impl VirtualFile for DeferredFile {
    fn file_size(&self) -> u64 {
        self.file_size
    }

    fn known_size(&self) -> Option<u64> {
        self.known_size
    }

    fn exact_size(&self) -> Result<u64> {
        match self.known_size {
            Some(size) => Ok(size),
            None => self.opened()?.exact_size(),
        }
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        self.opened()?.read_at(at, buf)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.opened()?.extent_at(at)
    }
}
