//! A file of any length, of which only some pieces are data, as a source; it counts what is read of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use freightfs::error::Result;
use freightfs::extent::{Extent, ExtentKind};
use freightfs::storage::{Generation, Storage, check_range};
use freightfs::units::FileOffset;

/// A sparse file in memory.
pub struct SparseFile {
    name: String,
    file_size: u64,
    /// By their starts; they do not overlap.
    pieces: BTreeMap<u64, Vec<u8>>,
    generation: Generation,
    read: AtomicU64,
    requests: AtomicU64,
}

impl SparseFile {
    pub fn new(name: &str, file_size: u64) -> Self {
        Self {
            name: name.to_owned(),
            file_size,
            pieces: BTreeMap::new(),
            generation: Generation::everywhere(name, SystemTime::UNIX_EPOCH),
            read: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        }
    }

    /// A file of these bytes alone.
    pub fn of(name: &str, bytes: Vec<u8>) -> Arc<Self> {
        let size = bytes.len() as u64;
        Self::new(name, size).with(0, bytes).done()
    }

    /// Puts bytes where none are yet.
    pub fn with(mut self, at: u64, bytes: Vec<u8>) -> Self {
        assert!(at + bytes.len() as u64 <= self.file_size);
        self.pieces.insert(at, bytes);
        self
    }

    pub fn done(self) -> Arc<Self> {
        Arc::new(self)
    }

    /// Bytes that are not holes: what the file takes on disk, and what a copy of it costs whoever makes it.
    pub fn data(&self) -> u64 {
        self.pieces.values().map(|piece| piece.len() as u64).sum()
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Reads and questions for holes so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Storage for SparseFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn file_size(&self) -> u64 {
        self.file_size
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        check_range(self, at, buf.len() as u64)?;
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        buf.fill(0);
        let (start, end) = (at.0, at.0 + buf.len() as u64);
        let before = self.pieces.range(..start).next_back();
        for (place, piece) in before.into_iter().chain(self.pieces.range(start..end)) {
            let (from, to) = (start.max(*place), end.min(place + piece.len() as u64));
            if from < to {
                let source = &piece[(from - place) as usize..(to - place) as usize];
                buf[(from - start) as usize..(to - start) as usize].copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let within = self.pieces.range(..=at.0).next_back().map(|(place, piece)| place + piece.len() as u64);
        if let Some(end) = within.filter(|end| *end > at.0) {
            return Ok(Extent::new(ExtentKind::Data, end - at.0));
        }
        let next = self.pieces.range(at.0..).next().map_or(self.file_size, |(place, _)| *place);
        Ok(Extent::new(ExtentKind::Hole, next - at.0))
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn verify_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// The same file, opened once more.
pub struct Reopened(pub Arc<SparseFile>);

impl Storage for Reopened {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn file_size(&self) -> u64 {
        self.0.file_size()
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        self.0.read_exact_at(at, buf)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.0.extent_at(at)
    }

    fn generation(&self) -> &Generation {
        self.0.generation()
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.0.verify_unchanged()
    }
}
