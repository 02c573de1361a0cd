//! Positional sources of bytes: where image files and their parts are read from.

mod file;
mod identity;
mod memory;

pub use file::FileStorage;
pub(crate) use file::generation_of;
pub use identity::{Generation, Identity, IdentityFacts};
pub use memory::MemoryStorage;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::units::FileOffset;

/// A source of bytes of a fixed length.
pub trait Storage: Send + Sync {
    /// The name for messages: a path or a URL.
    fn name(&self) -> &str;

    /// Bytes in the source when it was opened.
    fn file_size(&self) -> u64;

    /// Fills `buf` from `at`; all of it lies inside the source.
    ///
    /// # Errors
    /// [`CorruptImage`](ErrorKind::CorruptImage) past the end (see [`check_range`]), else what reading gave.
    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()>;

    /// Whether the bytes from `at` on are data or a hole; `at` lies inside the source. Asked twice of one generation,
    /// a filesystem may answer otherwise: who depends on the answer keeps it.
    fn extent_at(&self, at: FileOffset) -> Result<Extent>;

    /// The generation that was opened.
    fn generation(&self) -> &Generation;

    /// Fails with [`SourceChanged`](ErrorKind::SourceChanged) when the source is no longer the generation that
    /// was opened. Called after reads, so that mixed bytes are never returned.
    fn verify_unchanged(&self) -> Result<()>;
}

/// Refuses a range that does not lie inside `storage`.
pub fn check_range(storage: &dyn Storage, at: FileOffset, length: u64) -> Result<()> {
    match at.checked_add(length) {
        Some(end) if end.bytes() <= storage.file_size() => Ok(()),
        _ => Err(Error::corrupt(format!(
            "{length} bytes are needed here, but the file ends at byte {}; it is cut short or damaged",
            storage.file_size()
        ))
        .in_file(storage.name())
        .at(at)),
    }
}

/// A source that changed under its reader.
pub(crate) fn changed(name: &str) -> Error {
    Error::new(ErrorKind::SourceChanged, "the source changed while it was in use").in_file(name)
}
