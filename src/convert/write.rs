//! Writing a computed file to a local one, on all cores, leaving out what reads as zeros anyway.

use std::fs::File;
use std::os::unix::fs::FileExt;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::extent::is_zero;
use crate::units::{FileOffset, KIB, MIB};
use crate::vfile::VirtualFile;

/// Bytes that a thread reads and writes at once.
const CHUNK: u64 = 2 * MIB;

/// Runs of zeros at least this long, so aligned, are left out of the file: a filesystem's usual block.
const ZERO_BLOCK: usize = 4 * KIB as usize;

/// The pieces of a file that are to be copied. Extents are asked for in order and carried along: each one once.
struct Pieces<'a> {
    source: &'a dyn VirtualFile,
    file_size: u64,
    at: u64,
    /// Where the data that is known of ends.
    data_end: u64,
}

impl Pieces<'_> {
    /// The next piece, up to a multiple of [`CHUNK`]; `None` at the end. `skipped` gets bytes that read as zeros.
    fn next(&mut self, skipped: &dyn Fn(u64)) -> Result<Option<(FileOffset, usize)>> {
        while self.at < self.file_size {
            if self.at >= self.data_end {
                let extent = self.source.extent_at(FileOffset(self.at))?;
                let length = extent.length.min(self.file_size - self.at);
                if !extent.kind.is_data() {
                    skipped(length);
                    self.at += length;
                    continue;
                }
                self.data_end = self.at + length;
            }
            // Short runs of other kinds are read along: one large read is cheaper than finding their borders.
            let end = ((self.at / CHUNK + 1) * CHUNK).min(self.file_size);
            let piece = (FileOffset(self.at), (end - self.at) as usize);
            self.at = end;
            return Ok(Some(piece));
        }
        Ok(None)
    }
}

/// Writes all of `source` into the empty file `target` with `threads` threads. `progress` gets the bytes done.
///
/// What is a hole in `source`, or zeros, becomes a hole. Memory: 2 MiB a thread.
pub fn write_file(
    source: &dyn VirtualFile,
    target: &File,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let file_size = source.file_size();
    target.set_len(file_size).map_err(|e| Error::from_io("cannot size the output", e))?;
    let pieces = Mutex::new(Pieces { source, file_size, at: 0, data_end: 0 });
    let failure: Mutex<Option<Error>> = Mutex::default();
    let copy_all = || -> Result<()> {
        let mut buffer = vec![0; CHUNK.min(file_size) as usize];
        while failure.lock().is_none() {
            let Some((at, length)) = pieces.lock().next(&|skipped| progress(skipped))? else { break };
            source.read_at(at, &mut buffer[..length])?;
            write_nonzero(target, at, &buffer[..length])?;
            progress(length as u64);
        }
        Ok(())
    };
    let worker = || {
        if let Err(error) = copy_all() {
            *failure.lock() = Some(error);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(worker);
        }
        worker();
    });
    failure.into_inner().map_or(Ok(()), Err)
}

/// Writes the runs of `bytes` between aligned blocks of zeros.
fn write_nonzero(target: &File, at: FileOffset, bytes: &[u8]) -> Result<()> {
    let mut run = None;
    let write = |start: usize, end: usize| {
        target
            .write_all_at(&bytes[start..end], at.bytes() + start as u64)
            .map_err(|e| Error::from_io("cannot write the output", e).at(at + start as u64))
    };
    for (index, block) in bytes.chunks(ZERO_BLOCK).enumerate() {
        let start = index * ZERO_BLOCK;
        match (is_zero(block), run) {
            (true, Some(from)) => {
                write(from, start)?;
                run = None;
            }
            (false, None) => run = Some(start),
            _ => {}
        }
    }
    run.map_or(Ok(()), |from| write(from, bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::{Extent, ExtentKind};
    use crate::vfile::readable;
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Bytes(Vec<u8>);

    impl VirtualFile for Bytes {
        fn file_size(&self) -> u64 {
            self.0.len() as u64
        }
        fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
            let length = readable(self.file_size(), at, buf.len());
            buf[..length].copy_from_slice(&self.0[at.bytes() as usize..][..length]);
            Ok(length)
        }
        fn extent_at(&self, at: FileOffset) -> Result<Extent> {
            Ok(Extent::new(ExtentKind::Data, self.file_size() - at.bytes()))
        }
    }

    #[test]
    fn the_copy_is_equal_and_zeros_are_holes() {
        let mut bytes = vec![0u8; 9 * MIB as usize + 777];
        for at in [0, 4095, 5 << 20, (9 << 20) + 776] {
            bytes[at] = 1;
        }
        let source = Bytes(bytes);
        let target = tempfile::NamedTempFile::new().unwrap();
        let done = AtomicU64::new(0);
        write_file(&source, target.as_file(), 3, &|n| {
            done.fetch_add(n, Ordering::Relaxed);
        })
        .unwrap();
        assert_eq!(std::fs::read(target.path()).unwrap(), source.0);
        assert_eq!(done.into_inner(), source.file_size());
        assert!(target.as_file().metadata().unwrap().blocks() * 512 < MIB, "zeros were written");
    }
}
