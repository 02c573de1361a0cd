//! Parts of an object as places of its file: written, or copied within the filesystem, where it can by sharing blocks.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, copy_file_range, fallocate};
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};

use super::directory::{failed, is_file};
use super::{LocalStore, tag};
use crate::bucket::checksum::Crc64;
use crate::bucket::reply::source_changed;
use crate::bucket::store::{CopiedPart, CopyPart};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{KIB, MIB};

/// Blocks of zeros of this size are left as holes.
const ZERO_BLOCK: usize = 64 * KIB as usize;

/// Filesystems share blocks of at most this size: what stands in both files at the same place of such a block is copied by
/// itself, so that what stands before and after it does not prevent that.
const SHARED_BLOCK: u64 = 64 * KIB;

/// Bytes that are read at once.
const PIECE: u64 = MIB;

impl LocalStore {
    /// Copies a part out of an object; returns the checksum of what has arrived.
    pub(super) fn copy_part_now(&self, upload: &str, part: &CopyPart) -> Result<CopiedPart> {
        let source = &part.source;
        let opened = self.directory.open_at(source.key.as_str(), OFlag::O_RDONLY | OFlag::O_NONBLOCK);
        let from = match opened {
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(source_changed()),
            opened => File::from(opened.map_err(|e| failed("cannot open the object to copy from", e))?),
        };
        let check = || {
            let stat = fstat(&from).map_err(|e| failed("cannot stat the object to copy from", e))?;
            let holds = u64::try_from(stat.st_size).is_ok_and(|size| source.range.end <= size);
            match is_file(&stat) && holds && source.etag == tag(&stat) {
                true => Ok(()),
                false => Err(source_changed()),
            }
        };
        check()?;
        let to = self.open_upload(upload, OFlag::O_RDWR)?;
        copy(&from, source.range.clone(), &to, part.offset)?;
        check()?;
        let crc64 = crc64(&to, part.offset, source.range.end - source.range.start)?;
        Ok(CopiedPart { id: part.index.to_string(), crc64: Some(crc64) })
    }
}

/// Writes a part at its place. Blocks of zeros are holes, also where an earlier version of the part had data.
pub(super) fn write(file: &File, start: u64, part: &[u8]) -> Result<()> {
    let mut run = 0;
    let mut at = 0;
    let write = |from: usize, to: usize| {
        let written =
            if from < to { file.write_all_at(&part[from..to], start + from as u64) } else { Ok(()) };
        written.map_err(|e| failed("cannot write the part", e))
    };
    for block in part.chunks(ZERO_BLOCK) {
        if block.len() == ZERO_BLOCK && block.iter().all(|&b| b == 0) {
            write(run, at)?;
            clear(file, start + at as u64, block.len() as u64)?;
            run = at + block.len();
        }
        at += block.len();
    }
    write(run, at)
}

/// Copies the data of a range, and makes holes where it has them. Nothing is zeros meanwhile that is data in the end: a host
/// that was overtaken may do this in an object that is in place.
fn copy(from: &File, range: Range<u64>, to: &File, offset: u64) -> Result<()> {
    let mut at = range.start;
    loop {
        let data = next_data(from, at..range.end)?.unwrap_or(range.end..range.end);
        clear(to, at - range.start + offset, data.start - at)?;
        if data.is_empty() {
            return Ok(());
        }
        at = data.end;
        let place = data.start - range.start + offset;
        for piece in shareable(data, place) {
            copy_piece(from, piece.clone(), to, piece.start - range.start + offset)?;
        }
    }
}

/// The next run of data in a range. Where the filesystem does not tell, all of it is data.
fn next_data(file: &File, range: Range<u64>) -> Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let seek = |whence, at: u64, otherwise| match lseek(file, position(at)?, whence) {
        Ok(found) => Ok(u64::try_from(found).map_or(range.end, |found| found.min(range.end))),
        Err(Errno::ENXIO) => Ok(range.end),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(otherwise),
        Err(errno) => Err(failed("cannot look for data in the object", errno)),
    };
    let start = seek(Whence::SeekData, range.start, range.start)?;
    if start == range.end {
        return Ok(None);
    }
    Ok(Some(start..seek(Whence::SeekHole, start, range.end)?))
}

/// A range in the pieces in which it is copied to `place`: whole blocks by themselves, where they stand alike in both files.
fn shareable(range: Range<u64>, place: u64) -> impl Iterator<Item = Range<u64>> {
    let first = range.start.next_multiple_of(SHARED_BLOCK);
    let last = range.end / SHARED_BLOCK * SHARED_BLOCK;
    let pieces = match range.start % SHARED_BLOCK == place % SHARED_BLOCK && first < last {
        true => [range.start..first, first..last, last..range.end],
        false => [range, 0..0, 0..0],
    };
    pieces.into_iter().filter(|piece| !piece.is_empty())
}

fn copy_piece(from: &File, mut piece: Range<u64>, to: &File, place: u64) -> Result<()> {
    let (mut read_at, mut write_at) = (position(piece.start)?, position(place)?);
    while !piece.is_empty() {
        // No more than half of what the system call can count.
        let length = (piece.end - piece.start).min(1 << 30) as usize;
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), length) {
            // The object is shorter than it was.
            Ok(0) => return Err(source_changed()),
            Ok(copied) => piece.start += copied as u64,
            Err(Errno::EINTR) => {}
            // Two filesystems, or one that knows no such call.
            Err(Errno::EXDEV | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => {
                return copy_through(from, piece, to, u64::try_from(write_at).unwrap_or_default());
            }
            Err(errno) => return Err(failed("cannot copy the part", errno)),
        }
    }
    Ok(())
}

/// Copies by reading and writing.
fn copy_through(from: &File, mut piece: Range<u64>, to: &File, mut place: u64) -> Result<()> {
    let mut buffer = vec![0; PIECE.min(piece.end - piece.start) as usize];
    while !piece.is_empty() {
        let wanted = buffer.len().min((piece.end - piece.start) as usize);
        let read = from.read_at(&mut buffer[..wanted], piece.start);
        let read = read.map_err(|e| failed("cannot read the object to copy from", e))?;
        if read == 0 {
            return Err(source_changed());
        }
        to.write_all_at(&buffer[..read], place).map_err(|e| failed("cannot write the part", e))?;
        (piece.start, place) = (piece.start + read as u64, place + read as u64);
    }
    Ok(())
}

/// The checksum of what is in a file. What it is too short for are zeros that were left out.
fn crc64(file: &File, start: u64, length: u64) -> Result<u64> {
    let mut crc = Crc64::default();
    let mut buffer = vec![0; PIECE.min(length) as usize];
    while crc.length() < length {
        let wanted = (length - crc.length()).min(PIECE) as usize;
        let read = file.read_at(&mut buffer[..wanted], start + crc.length());
        let read = read.map_err(|e| failed("cannot read the part", e))?;
        if read == 0 {
            buffer.fill(0);
        }
        crc.add(&buffer[..if read == 0 { wanted } else { read }]);
    }
    Ok(crc.value())
}

/// Makes zeros of what an earlier version of a part has left in its place.
fn clear(file: &File, start: u64, length: u64) -> Result<()> {
    let end = start.checked_add(length).ok_or_else(|| Error::new(ErrorKind::TooLarge, "too many parts"))?;
    position(end)?;
    let file_size = file.metadata().map_err(|e| failed("cannot stat the upload", e))?.len();
    if length > 0 && file_size > start { punch_hole(file, start, length) } else { Ok(()) }
}

/// A place as the system calls have it.
fn position(at: u64) -> Result<i64> {
    i64::try_from(at)
        .map_err(|e| Error::new(ErrorKind::TooLarge, "a part beyond the largest file").because(e))
}

/// Makes zeros of what is there, without taking room where the filesystem can do that.
fn punch_hole(file: &File, start: u64, length: u64) -> Result<()> {
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, punch, position(start)?, position(length)?) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP) => {
            let zeros = vec![0; ZERO_BLOCK];
            let end = start + length;
            (start..end).step_by(ZERO_BLOCK).try_for_each(|at| {
                let length = (end - at).min(ZERO_BLOCK as u64) as usize;
                file.write_all_at(&zeros[..length], at).map_err(|e| failed("cannot write the part", e))
            })
        }
        Err(errno) => Err(failed("cannot write the part", errno)),
    }
}
