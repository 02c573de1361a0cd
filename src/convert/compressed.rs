//! A compressed file over an image: units are compressed in order, in parallel, and only as far as somebody reads.
//!
//! A read of a place whose unit was compressed before takes the record from memory or disk, or compresses the unit
//! again, which gives the same bytes. A place beyond that compresses on up to it. So a program that reads from the
//! start waits for no pass over the disk where the format's head is fixed; the size is known at the end, or at once
//! when an earlier pass kept its index.

use std::fs::File;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use rayon::prelude::*;
use tracing::debug;

use super::workspace::{Body, Workspace};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{AllocationMap, Extent, ExtentKind, is_zero};
use crate::image::{DiskImage, read_padded};
use crate::layout::CompressedLayout;
use crate::layout::compressed::{Ends, LengthIndex, Piece, Record};
use crate::units::{FileOffset, MIB, VirtualOffset};
use crate::vfile::{Preparation, VirtualFile, readable};

/// Bytes of the disk that one step compresses: few at first, so that the first byte comes soon, then more, so that
/// all cores have enough to do. A step holds this much of compressed units, and a unit for each thread.
const FIRST_STEP: u64 = 2 * MIB;
const LARGEST_STEP: u64 = 32 * MIB;

/// Bytes moved at once where head and tail are written.
const COPY_BUFFER: usize = MIB as usize;

/// A file of some compressed format over an image.
pub struct CompressedFile {
    image: Arc<dyn DiskImage>,
    layout: Box<dyn CompressedLayout>,
    unit_size: u64,
    workspace: Arc<Workspace>,
    /// The name of the file's records in the workspace.
    records: u64,
    /// The name of the file's index in the workspace: whatever changes a length changes it.
    key: String,
    largest_file_size: u64,
    state: RwLock<State>,
    /// Held by the thread that goes on compressing.
    step: Mutex<()>,
    body: RwLock<Option<Arc<Body>>>,
}

enum State {
    Growing(LengthIndex),
    Finished { index: Arc<LengthIndex>, ends: Box<dyn Ends> },
}

impl State {
    fn index(&self) -> &LengthIndex {
        match self {
            Self::Growing(index) => index,
            Self::Finished { index, .. } => index,
        }
    }
}

impl CompressedFile {
    /// Lays `image` out. Whatever the bytes depend on changes `name`, under which the workspace keeps the index.
    pub fn new(
        image: Arc<dyn DiskImage>,
        layout: Box<dyn CompressedLayout>,
        map: Arc<AllocationMap>,
        name: String,
        workspace: Arc<Workspace>,
    ) -> Result<Self> {
        let file = Self {
            unit_size: map.unit_size(),
            largest_file_size: layout.largest_file_size(),
            state: RwLock::new(State::Growing(LengthIndex::new(&*layout, map))),
            records: workspace.next_file(),
            key: name,
            image,
            layout,
            workspace,
            step: Mutex::default(),
            body: RwLock::default(),
        };
        file.load_index()?;
        Ok(file)
    }

    /// Takes over the lengths of an earlier pass, as far as it came.
    fn load_index(&self) -> Result<()> {
        let mut state = self.state.write();
        let State::Growing(index) = &mut *state else { return Ok(()) };
        let Some(lengths) = self.workspace.load_index(&self.key, index.map().allocated()) else {
            for length in self.workspace.load_growing(&self.key, index.map().allocated()) {
                index.push(&*self.layout, length);
            }
            return Ok(());
        };
        for length in lengths {
            index.push(&*self.layout, length);
        }
        self.finish(&mut state)
    }

    /// Bytes in the file, when they are known.
    pub fn finished_size(&self) -> Option<u64> {
        match &*self.state.read() {
            State::Growing(_) => None,
            State::Finished { ends, .. } => Some(ends.file_size()),
        }
    }

    /// Whether the file can be read from its start before its size is known.
    pub fn is_streamable(&self) -> bool {
        self.layout.fixed_head().is_some()
    }

    /// Compresses all that is left. `progress` gets the units done since its last call, of
    /// [`units`](Self::units).
    pub fn complete(&self, progress: &dyn Fn(u64)) -> Result<u64> {
        loop {
            let before = self.state.read().index().lengths().len();
            let finished = self.compress_on(None)?;
            progress((self.state.read().index().lengths().len() - before) as u64);
            if finished {
                return self.finished_size().ok_or_else(|| Error::new(ErrorKind::Internal, "not finished"));
            }
        }
    }

    /// Units that are to be compressed, all in all.
    pub fn units(&self) -> u64 {
        self.state.read().index().map().allocated()
    }

    /// Bytes of the disk in a unit.
    pub fn unit_size(&self) -> u64 {
        self.unit_size
    }

    /// Writes the whole file into the empty file `target`, in one pass. `progress` as in
    /// [`complete`](Self::complete).
    pub fn write_to(&self, target: &File, progress: &dyn Fn(u64)) -> Result<()> {
        let target = target.try_clone().map_err(|e| Error::from_io("cannot write the output", e))?;
        let body = Arc::new(Body::new(target, None));
        *self.body.write() = Some(Arc::clone(&body));
        let file_size = self.complete(progress)?;
        body.set_file_size(file_size)?;
        let body_end = self.state.read().index().end();
        let head = FileOffset(0)..FileOffset(self.layout.head_size());
        let mut buffer = vec![0; COPY_BUFFER];
        for range in [head, body_end..FileOffset(file_size)] {
            let mut at = range.start;
            while at < range.end {
                let length = (range.end - at).min(COPY_BUFFER as u64) as usize;
                self.read_at(at, &mut buffer[..length])?;
                body.write(at, &buffer[..length])?;
                at += length as u64;
            }
        }
        Ok(())
    }

    /// Reads a unit and compresses it; empty when it is all zeros.
    fn payload(&self, unit: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.unit_size as usize];
        read_padded(&*self.image, VirtualOffset(unit * self.unit_size), &mut bytes)?;
        if is_zero(&bytes) { Ok(Vec::new()) } else { self.layout.payload(&bytes) }
    }

    /// Makes sure that `at` is known, or that the whole file is.
    fn extend_to(&self, at: FileOffset) -> Result<()> {
        while !self.compress_on(Some(at))? {}
        Ok(())
    }

    /// One step further, unless `wanted` is known already. Returns whether it is, or the file is finished.
    fn compress_on(&self, wanted: Option<FileOffset>) -> Result<bool> {
        let known = |state: &State| match state {
            State::Finished { .. } => true,
            State::Growing(index) => wanted.is_some_and(|at| at < index.end()),
        };
        if known(&self.state.read()) {
            return Ok(true);
        }
        let _step = self.step.lock();
        let units = match &*self.state.read() {
            state if known(state) => return Ok(true),
            state => {
                let done = state.index().lengths().len() as u64 * self.unit_size;
                let step = done.clamp(FIRST_STEP, LARGEST_STEP);
                state.index().pending((step / self.unit_size).max(2) as usize)
            }
        };
        if units.is_empty() {
            self.finish(&mut self.state.write())?;
            self.workspace.save_index(&self.key, self.state.read().index().lengths());
            return Ok(true);
        }
        let payloads = units.par_iter().map(|&unit| self.payload(unit)).collect::<Result<Vec<_>>>()?;
        // Before anything of it is seen: lengths of mixed bytes would be wrong for ever.
        self.image.verify_unchanged()?;
        let mut state = self.state.write();
        let State::Growing(index) = &mut *state else { return Ok(true) };
        let (first, first_group) = (index.lengths().is_empty(), index.groups().saturating_sub(1));
        let mut records = Vec::with_capacity(payloads.len());
        let start = index.lengths().len();
        for payload in payloads {
            let payload_size = u32::try_from(payload.len())
                .map_err(|e| Error::new(ErrorKind::Internal, "a compressed unit is too large").because(e))?;
            records.extend(index.push(&*self.layout, payload_size).map(|record| (record, payload)));
        }
        self.workspace.keep_growing(&self.key, start as u64, &index.lengths()[start..]);
        drop(state);
        if first {
            self.open_body();
        }
        self.keep(records, first_group)?;
        Ok(known(&self.state.read()))
    }

    fn finish(&self, state: &mut State) -> Result<()> {
        if let State::Growing(index) = state {
            let first_group = index.groups().saturating_sub(1);
            let mut index = index.clone();
            index.close(&*self.layout);
            let index = Arc::new(index);
            let ends = self.layout.finish(Arc::clone(&index))?;
            *state = State::Finished { index, ends };
            self.keep_tables(state, first_group)?;
        }
        Ok(())
    }

    /// Keeps records on disk while there is room, else in memory. `first_group` is the first one whose table may
    /// not have been written yet.
    fn keep(&self, records: Vec<(Record, Vec<u8>)>, first_group: u64) -> Result<()> {
        let make = |(record, payload): (Record, Vec<u8>)| {
            (record.unit, record.place.start, self.layout.record(record.unit, record.place.start, payload))
        };
        if let Some(body) = self.body_with_room() {
            let written =
                records.into_par_iter().map(make).try_for_each(|(_, at, bytes)| body.write(at, &bytes));
            match written.and_then(|()| self.keep_tables(&self.state.read(), first_group)) {
                Err(error) if body.is_target() => return Err(error),
                Err(error) => {
                    debug!("compressed bytes are kept on disk no longer: {}", error.report());
                    *self.body.write() = None;
                }
                Ok(()) => {}
            }
            return Ok(());
        }
        for (unit, _, bytes) in records.into_iter().map(make) {
            self.workspace.keep_record((self.records, unit), Arc::new(bytes));
        }
        Ok(())
    }

    /// Writes the tables of the groups that have ended, and notes how far the body is whole.
    fn keep_tables(&self, state: &State, first_group: u64) -> Result<()> {
        let Some(body) = self.body.read().clone() else { return Ok(()) };
        let index = state.index();
        if self.layout.group_table_size() > 0 {
            let ended =
                if matches!(state, State::Finished { .. }) { index.groups() } else { index.groups() - 1 };
            for group in first_group..ended {
                let records: Vec<_> = index.records(&*self.layout, group).collect();
                if let Some(last) = records.last() {
                    body.write(last.place.end, &self.layout.group_table(&records))?;
                }
            }
        }
        body.set_written(index.end());
        Ok(())
    }

    /// Looks for a place on disk before the first record is kept: the body has all of them or none.
    fn open_body(&self) {
        let mut body = self.body.write();
        if body.is_none() {
            *body = self.workspace.body().map(Arc::new);
        }
    }

    /// Where the body is written to, while there is room.
    fn body_with_room(&self) -> Option<Arc<Body>> {
        let mut body = self.body.write();
        if body.as_ref().is_some_and(|body| !body.has_room()) {
            *body = None;
        }
        body.clone()
    }

    /// The bytes of a record.
    fn record(&self, record: &Record) -> Result<Arc<Vec<u8>>> {
        let name = (self.records, record.unit);
        if let Some(kept) = self.workspace.record(name) {
            return Ok(kept);
        }
        let payload = self.payload(record.unit)?;
        self.image.verify_unchanged()?;
        if payload.len() != record.payload_size as usize {
            self.workspace.forget(&self.key);
            let what = format!(
                "unit {} compresses to {} bytes now and to {} before",
                record.unit,
                payload.len(),
                record.payload_size
            );
            return Err(Error::new(ErrorKind::Internal, what));
        }
        let bytes = Arc::new(self.layout.record(record.unit, record.place.start, payload));
        self.workspace.keep_record(name, Arc::clone(&bytes));
        Ok(bytes)
    }

    /// Reads what follows `at` without a border; 0 only at the end of the file.
    fn read_some(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let head_size = self.layout.head_size();
        if at.bytes() < head_size {
            let length = readable(head_size, at, buf.len());
            match self.layout.fixed_head() {
                Some(head) => buf[..length].copy_from_slice(&head[at.bytes() as usize..][..length]),
                None => {
                    self.complete(&|_| ())?;
                    self.read_end(at, &mut buf[..length]);
                }
            }
            return Ok(length);
        }
        self.extend_to(at)?;
        if let Some(body) = self.body.read().clone() {
            let length = body.available(at).min(buf.len() as u64) as usize;
            if length > 0 {
                body.read(at, &mut buf[..length])?;
                return Ok(length);
            }
        }
        let (place, bytes) = match self.piece_at(at) {
            None => return Ok(self.read_end(at, buf)),
            Some(Piece::Record(record)) => (record.place.clone(), self.record(&record)?),
            Some(Piece::Table(group, place)) => {
                let state = self.state.read();
                let records: Vec<_> = state.index().records(&*self.layout, group).collect();
                (place, Arc::new(self.layout.group_table(&records)))
            }
            Some(Piece::Gap(end)) => {
                let length = (end - at).min(buf.len() as u64) as usize;
                buf[..length].fill(0);
                return Ok(length);
            }
        };
        let from = (at - place.start) as usize;
        let length = bytes.len().saturating_sub(from).min(buf.len());
        buf[..length].copy_from_slice(&bytes[from..from + length]);
        Ok(length)
    }

    fn piece_at(&self, at: FileOffset) -> Option<Piece> {
        let state = self.state.read();
        (at < state.index().end()).then(|| state.index().piece_at(&*self.layout, at))
    }

    /// Reads head or tail of the finished file.
    fn read_end(&self, at: FileOffset, buf: &mut [u8]) -> usize {
        match &*self.state.read() {
            State::Growing(_) => 0,
            State::Finished { ends, .. } => {
                let length = readable(ends.file_size(), at, buf.len());
                ends.read(at, &mut buf[..length]);
                length
            }
        }
    }
}

impl VirtualFile for CompressedFile {
    fn file_size(&self) -> u64 {
        self.finished_size().unwrap_or(self.largest_file_size)
    }

    fn known_size(&self) -> Option<u64> {
        self.finished_size()
    }

    fn exact_size(&self) -> Result<u64> {
        self.complete(&|_| ())
    }

    fn preparation(&self) -> Option<Preparation> {
        let state = self.state.read();
        let index = state.index();
        Some(Preparation {
            done: index.lengths().len() as u64,
            total: index.map().allocated(),
            bytes: index.end().bytes(),
            is_first: !self.is_streamable(),
        })
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.read_some(at + done as u64, &mut buf[done..])? {
                0 => break,
                read => done += read,
            }
        }
        if done > 0 {
            self.image.verify_unchanged()?;
        }
        Ok(done)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.file_size().saturating_sub(at.bytes()).max(1)))
    }
}
