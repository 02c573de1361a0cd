//! A file that is computed or fetched: the trait through which the mount, exports and caches read bytes.

use crate::error::Result;
use crate::extent::Extent;
use crate::units::FileOffset;

/// How far the work is that finds a file's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preparation {
    /// Steps done.
    pub done: u64,
    /// Steps in all.
    pub total: u64,
    /// Bytes of the file that these steps made.
    pub bytes: u64,
    /// Whether no byte can be read before it has ended; else reading from the start keeps up with it.
    pub is_first: bool,
}

/// A file whose bytes can be read anywhere, from many threads at once.
///
/// Any split of reads gives the same bytes as one whole read.
pub trait VirtualFile: Send + Sync {
    /// Bytes in the file; while they are not known, the most that it can have.
    fn file_size(&self) -> u64;

    /// Bytes in the file, if they are known. Only those of a compressed file may not be.
    fn known_size(&self) -> Option<u64> {
        Some(self.file_size())
    }

    /// Bytes in the file. Where they are not known, this takes a pass over the source.
    fn exact_size(&self) -> Result<u64> {
        Ok(self.file_size())
    }

    /// How far the work is that finds the size, for files that need such work.
    fn preparation(&self) -> Option<Preparation> {
        None
    }

    /// Reads up to `buf.len()` bytes at `at` and says how many: fewer only at the end of the file, 0 past it.
    ///
    /// # Errors
    /// [`SourceChanged`](crate::error::ErrorKind::SourceChanged) when the source is not what it was when the
    /// file was opened, else what reading the source gave.
    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize>;

    /// What the bytes from `at` on are known to be; `at` lies inside the file.
    fn extent_at(&self, at: FileOffset) -> Result<Extent>;
}

/// How many bytes a read of `wanted` bytes at `at` gives in a file of `file_size` bytes.
pub fn readable(file_size: u64, at: FileOffset, wanted: usize) -> usize {
    usize::try_from(file_size.saturating_sub(at.bytes())).unwrap_or(usize::MAX).min(wanted)
}
