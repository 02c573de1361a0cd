//! Bytes that were written and are not in a bucket yet: a file of the staging directory for each draft.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use super::ranges::Ranges;
use super::source::RangeSource;
use crate::error::{Error, ErrorKind, Result};
use crate::export::EarlyUpload;
use crate::failpoint::{self, Step};
use crate::units::{FileOffset, MIB, SECTOR};
use crate::vfile::VirtualFile;

/// Bytes moved at once when ranges are staged.
const COPY_BUFFER: usize = MIB as usize;

/// Bytes that a draft may write before the staging directory is looked at again.
const ALLOWANCE: u64 = 16 * MIB;

/// Bytes from which on a file is sent while it is written.
const EARLY_SIZE: u64 = 16 * MIB;

/// The bytes of a draft in a file.
pub(super) struct Staged {
    pub(super) file: Arc<File>,
    /// Removed on drop unless a job has taken it over.
    pub(super) path: tempfile::TempPath,
    pub(super) file_size: u64,
    /// Bytes that all staged files may take together.
    limit: Option<u64>,
    /// Bytes that may be written before the limit is looked at again.
    allowance: u64,
    /// Whether every write so far began at or after the end of the one before.
    is_monotonic: bool,
    /// What is sent of it while it is written.
    early: Option<EarlyUpload>,
}

impl Staged {
    pub(super) fn new(directory: &Path, limit: Option<u64>) -> Result<Self> {
        let failed =
            |e| Error::from_io("cannot create a staging file", e).in_file(directory.display().to_string());
        failpoint::pass(Step::StageCreate)?;
        let file = tempfile::Builder::new().prefix("write-").tempfile_in(directory).map_err(failed)?;
        let (file, path) = file.into_parts();
        let file = Arc::new(file);
        Ok(Self { file, path, file_size: 0, limit, allowance: 0, is_monotonic: true, early: None })
    }

    fn failed(&self, what: &str, e: std::io::Error) -> Error {
        Error::from_io(what, e).in_file(self.path.display().to_string())
    }

    /// Writes bytes and notes them.
    pub(super) fn write(&mut self, at: FileOffset, bytes: &[u8]) -> Result<()> {
        let file = self.reserve(at, bytes.len() as u64)?;
        failpoint::pass(Step::StageWrite)?;
        write_all(&file, at, bytes)?;
        self.wrote(at, bytes.len() as u64);
        Ok(())
    }

    /// Makes room for `length` bytes at `at`, which are then written to the file that is given back.
    pub(super) fn reserve(&mut self, at: FileOffset, length: u64) -> Result<Arc<File>> {
        self.make_room(length).map_err(|e| e.at(at))?;
        Ok(Arc::clone(&self.file))
    }

    /// Notes that bytes were written.
    pub(super) fn wrote(&mut self, at: FileOffset, length: u64) {
        self.is_monotonic &= at.bytes() >= self.file_size;
        self.file_size = self.file_size.max(at.bytes() + length);
        if let Some(early) = &self.early {
            early.wrote(at.bytes(), length);
        }
    }

    /// Whether the file is worth sending while it is written, and is not sent yet, or in parts that are too small.
    pub(super) fn wants_early_upload(&self) -> bool {
        match &self.early {
            Some(early) => early.is_outgrown(self.file_size),
            None => self.is_monotonic && self.file_size >= EARLY_SIZE,
        }
    }

    /// Sends the file while it is written; what was sent before is given up.
    pub(super) fn set_early_upload(&mut self, begin: impl FnOnce(File, u64) -> Option<EarlyUpload>) {
        self.early = None;
        self.early = self.file.try_clone().ok().and_then(|file| begin(file, self.file_size));
        // One that could not begin now is not tried at every write.
        self.is_monotonic = false;
    }

    /// What was sent so far.
    pub(super) fn take_early_upload(&mut self) -> Option<EarlyUpload> {
        self.early.take()
    }

    /// Refuses to write `length` bytes when all staged files together would take more than the limit.
    fn make_room(&mut self, length: u64) -> Result<()> {
        let Some(limit) = self.limit else { return Ok(()) };
        if length > self.allowance {
            let directory = self.path.parent().unwrap_or(Path::new("."));
            let taken =
                taken(directory).map_err(|e| self.failed("cannot look at the staging directory", e))?;
            let wanted = length.max(ALLOWANCE.min(limit.saturating_sub(taken)));
            if taken.saturating_add(wanted) > limit {
                let what = format!("staged bytes would exceed stage_limit, {limit} bytes");
                return Err(Error::new(ErrorKind::NoSpace, what));
            }
            self.allowance = wanted;
        }
        self.allowance -= length;
        Ok(())
    }

    pub(super) fn set_size(&mut self, size: u64) -> Result<()> {
        self.file.set_len(size).map_err(|e| self.failed("cannot size the staging file", e))?;
        self.is_monotonic &= size >= self.file_size;
        self.file_size = size;
        if let Some(early) = &self.early {
            early.resized(size);
        }
        Ok(())
    }

    /// Copies what was recorded of an image's file.
    pub(super) fn copy_ranges(
        &mut self,
        source: &RangeSource,
        ranges: &Ranges,
        file_size: u64,
    ) -> Result<()> {
        let exact = source.file.exact_size()?;
        for (start, end) in ranges.iter().filter(|(start, _)| *start < exact) {
            let length = end.min(exact) - start;
            self.copy(&*source.file, FileOffset(start), FileOffset(start), length)?;
        }
        // Up to the size that was shown, what was copied went on to the true end.
        let end = if file_size <= source.shown_size { exact } else { file_size };
        self.set_size(end.min(file_size))
    }

    pub(super) fn copy(
        &mut self,
        source: &dyn VirtualFile,
        from: FileOffset,
        at: FileOffset,
        length: u64,
    ) -> Result<()> {
        let mut buffer = vec![0; COPY_BUFFER];
        let mut done = 0;
        while done < length {
            let wanted = usize::try_from(length - done).unwrap_or(usize::MAX).min(COPY_BUFFER);
            let read = source.read_at(from + done, &mut buffer[..wanted])?;
            if read == 0 {
                return Err(Error::new(ErrorKind::SourceChanged, "the source became shorter").at(from + done));
            }
            self.write(at + done, &buffer[..read])?;
            done += read as u64;
        }
        Ok(())
    }
}

/// Writes staged bytes.
pub(super) fn write_all(file: &File, at: FileOffset, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, at.bytes()).map_err(|e| Error::from_io("cannot stage", e))
}

/// Reads staged bytes: fewer than `length` only at the end.
pub(super) fn read(file: &File, at: FileOffset, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        let read = file.read_at(&mut bytes[done..], at.bytes() + done as u64);
        match read.map_err(|e| Error::from_io("cannot read staged bytes", e))? {
            0 => break,
            read => done += read,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Bytes that the files of the staging directory take.
fn taken(directory: &Path) -> std::io::Result<u64> {
    let mut taken = 0;
    for entry in std::fs::read_dir(directory)? {
        // One that is gone by now takes nothing.
        taken += entry?.metadata().map_or(0, |meta| meta.blocks() * SECTOR);
    }
    Ok(taken)
}
