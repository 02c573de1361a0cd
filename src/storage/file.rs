//! A local file as a source.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{Whence, lseek64};
use tracing::debug;

use super::{Generation, Storage, changed, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::units::{FileOffset, SECTOR};
use crate::whole_file;

/// Bytes that a filesystem may allocate for an extent's record, and for whatever else belongs to a file: what is allocated
/// beyond those and the data was preallocated.
const EXTENT_RECORD: u64 = 64;
const ALLOCATION_SLACK: u64 = 64 << 10;

/// A local file, read with pread; holes come from SEEK_DATA and SEEK_HOLE.
#[derive(Debug)]
pub struct FileStorage {
    name: String,
    file: File,
    file_size: u64,
    generation: Generation,
    /// Names of the file when it was opened.
    links: u64,
    /// Done when the filesystem was asked to tell the same holes from then on.
    settled: Once,
    /// Its place among the files of images.
    place: Option<ImagePlace>,
}

/// A descriptor of those that images may have.
#[derive(Debug)]
struct ImagePlace;

/// Files that images have open, of all catalogs of the process: descriptors are the process's.
static OF_IMAGES: AtomicU64 = AtomicU64::new(0);

impl ImagePlace {
    fn take() -> Result<Self> {
        let (most, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, 0));
        // Counted before it is looked at: two that come at once do not both take the last place.
        let (place, others) = (Self, OF_IMAGES.fetch_add(1, Ordering::SeqCst));
        if others >= most / 2 {
            drop(place);
            let what = format!("images have {others} files open, half of what this process may have");
            return Err(Error::new(ErrorKind::Busy, what).transient());
        }
        Ok(place)
    }
}

impl Drop for ImagePlace {
    fn drop(&mut self) {
        OF_IMAGES.fetch_sub(1, Ordering::SeqCst);
    }
}

impl FileStorage {
    /// Opens a regular file for reading.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let (file, _) = whole_file::open(path).map_err(|e| e.in_file(&name))?;
        Self::of(file, name)
    }

    /// A regular file that was opened for reading, under the name that messages have for it.
    pub fn of(file: File, name: String) -> Result<Self> {
        let meta = file.metadata().map_err(|e| Error::from_io("cannot stat", e).in_file(&name))?;
        whole_file::check_regular(meta.file_type()).map_err(|e| e.in_file(&name))?;
        let (generation, links) = (generation_of(&meta), meta.nlink());
        Ok(Self { name, file_size: meta.len(), generation, links, settled: Once::new(), place: None, file })
    }

    /// The same file, counted among those of images, which have half of the process's descriptors at most: what else the
    /// process does needs some, however many files an image is made of.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) when these are taken; it may go away.
    pub fn for_image(mut self) -> Result<Self> {
        self.place = Some(ImagePlace::take().map_err(|e| e.in_file(&self.name))?);
        Ok(self)
    }

    /// Has the filesystem tell the same holes now and later, as far as it can; done once.
    ///
    /// What writers left in the page cache is written back: before that it is not decided where it stands. A descriptor
    /// for reading is enough. What was preallocated and never written is a hole, but is told as data where somebody has
    /// read it and it is in the page cache, from which it is dropped. Whether the holes were the same is told by the digest
    /// of the map that is made of them.
    fn settle_holes(&self) {
        self.settled.call_once(|| {
            let dropped = || posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            let settled = self.file.sync_data().and_then(|()| match self.has_preallocated()? {
                true => dropped().map_err(std::io::Error::from),
                false => Ok(()),
            });
            if let Err(error) = settled {
                debug!(file = self.name, "its holes may be others later: {error}");
            }
        });
    }

    /// Whether clearly more is allocated than is told as data.
    fn has_preallocated(&self) -> std::io::Result<bool> {
        let (mut at, mut data, mut runs) = (0, 0, 0);
        while let Ok(start) = lseek64(&self.file, at, Whence::SeekData) {
            let end = lseek64(&self.file, start, Whence::SeekHole)?;
            if end <= at {
                break;
            }
            data += (end - start) as u64;
            runs += 1;
            at = end;
        }
        let allocated = self.file.metadata()?.blocks() * SECTOR;
        Ok(allocated > data + runs * EXTENT_RECORD + ALLOCATION_SLACK)
    }
}

/// What a local file's content is known by: device, inode, size and mtime for people; the ctime besides on this host,
/// because a program can set the mtime back; size and mtime where copies are.
pub(crate) fn generation_of(meta: &std::fs::Metadata) -> Generation {
    let portable = format!("{:x}-{:x}.{:x}", meta.len(), meta.mtime(), meta.mtime_nsec());
    let shown = format!("{:x}-{:x}-{portable}", meta.dev(), meta.ino());
    let local = format!("{shown}-{:x}.{:x}", meta.ctime(), meta.ctime_nsec());
    Generation::local(shown, local, portable, meta.modified().unwrap_or(SystemTime::UNIX_EPOCH))
}

impl Storage for FileStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn file_size(&self) -> u64 {
        self.file_size
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        check_range(self, at, buf.len() as u64)?;
        self.file.read_exact_at(buf, at.bytes()).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(&self.name).at(at),
            _ => Error::from_io("cannot read", e).in_file(&self.name).at(at),
        })
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.settle_holes();
        let left = self.file_size - at.bytes();
        // lseek moves the descriptor's position, which nothing here uses: reads are positional.
        let seek = |whence| lseek64(&self.file, at.bytes() as i64, whence).map(|to| to as u64);
        match seek(Whence::SeekData) {
            Ok(to) if to > at.bytes() => Ok(Extent::new(ExtentKind::Hole, (to - at.bytes()).min(left))),
            Ok(_) => match seek(Whence::SeekHole) {
                Ok(to) if to > at.bytes() => Ok(Extent::new(ExtentKind::Data, (to - at.bytes()).min(left))),
                // A filesystem that cannot tell, or a file that is being cut: say data, reading decides.
                _ => Ok(Extent::new(ExtentKind::Data, left)),
            },
            Err(nix::errno::Errno::ENXIO) => Ok(Extent::new(ExtentKind::Hole, left)),
            Err(_) => Ok(Extent::new(ExtentKind::Data, left)),
        }
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn verify_unchanged(&self) -> Result<()> {
        let meta = self.file.metadata().map_err(|e| Error::from_io("cannot stat", e).in_file(&self.name))?;
        let now = generation_of(&meta);
        // A name that is given or taken moves the ctime too: an image that was replaced by a rename is read to its end.
        let is_renamed = || meta.nlink() != self.links && now.shown() == self.generation.shown();
        if now == self.generation || is_renamed() { Ok(()) } else { Err(changed(&self.name)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn holes_are_seen_and_a_change_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        let mut file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"x", 4 << 20).unwrap();
        let storage = FileStorage::open(&path).unwrap();
        let first = storage.extent_at(FileOffset(0)).unwrap();
        assert_eq!(first.kind, ExtentKind::Hole);
        assert_eq!(first.length, 4 << 20);
        assert!(storage.extent_at(FileOffset(4 << 20)).unwrap().kind.is_data());
        storage.verify_unchanged().unwrap();
        file.write_all(b"y").unwrap();
        file.set_len(9 << 20).unwrap();
        assert_eq!(storage.verify_unchanged().unwrap_err().kind(), ErrorKind::SourceChanged);
    }

    #[test]
    fn reading_past_the_end_names_file_and_place() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 100]).unwrap();
        let storage = FileStorage::open(file.path()).unwrap();
        let error = storage.read_exact_at(FileOffset(90), &mut [0; 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CorruptImage);
        assert!(error.to_string().contains("at byte 90"), "{error}");
    }
}
