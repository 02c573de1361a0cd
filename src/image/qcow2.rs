//! qcow2, versions 2 and 3, read-only.
//!
//! Source: QEMU, docs/interop/qcow2.rst. Supported: plain, zero and compressed clusters (zlib and zstd), extended
//! L2 entries, external data files and backing chains through the gate. Internal snapshots are left alone.
//! Memory for an image: its L1 table, at most 32 MiB and usually some KiB; at most [`TABLE_MEMORY`] bytes of L2
//! tables; its part of the inflated clusters that are kept, see [`super::inflated`].

mod mapping;
mod open;

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use rayon::prelude::*;

use super::blocks::Window;
use super::inflated::InflatedUnits;
use super::table::KnownZeros;
use super::{DiskImage, ExtentVisitor, ImageDescription, ReferenceGate, slice, steps};
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, is_zero};
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage};
use crate::units::{FileOffset, MIB, Unit, VirtualOffset, memory_size};
use mapping::{Mapping, TableShape};

/// Bytes of L2 tables that an image keeps: 256 tables of 64 KiB, which map 128 GiB.
pub const TABLE_MEMORY: u64 = 16 * MIB;

/// How compressed clusters are compressed (header byte 104).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    /// Raw deflate.
    Zlib,
    Zstd,
}

/// An L2 table as it is in the file.
type L2Table = Arc<Vec<u8>>;

/// A qcow2 image with what it refers to.
pub struct Qcow2Image {
    storage: Arc<dyn Storage>,
    /// Where standard clusters are: the file itself, or its external data file.
    data: Arc<dyn Storage>,
    backing: Option<Arc<dyn DiskImage>>,
    virtual_size: u64,
    shape: TableShape,
    compression: Compression,
    l1: Vec<u64>,
    tables: Mutex<LruCache<u64, L2Table>>,
    inflated: InflatedUnits,
    /// For [`DiskImage::description`].
    properties: Vec<(String, String)>,
}

/// A compressed cluster of which a read wants a piece, or all.
struct InflateTask<'a> {
    at: VirtualOffset,
    host: FileOffset,
    length: u64,
    target: &'a mut [u8],
}

impl Qcow2Image {
    /// Opens `storage`. References are followed through `gate`; `depth` counts the images above in the chain.
    pub fn open(storage: Arc<dyn Storage>, gate: &Arc<dyn ReferenceGate>, depth: usize) -> Result<Self> {
        let place = storage.name().to_owned();
        open::open(storage, gate, depth).map_err(|e| e.in_file(place))
    }

    fn new(parts: open::Opened) -> Self {
        let kept = |memory, size| {
            NonZeroUsize::new(memory_size(Unit::of(size).index(memory))).unwrap_or(NonZeroUsize::MIN)
        };
        let cluster_size = parts.shape.cluster_size();
        Self {
            storage: parts.storage,
            data: parts.data,
            backing: parts.backing,
            virtual_size: parts.virtual_size,
            compression: parts.compression,
            l1: parts.l1,
            tables: Mutex::new(LruCache::new(kept(TABLE_MEMORY, cluster_size))),
            inflated: InflatedUnits::new(),
            shape: parts.shape,
            properties: parts.properties,
        }
    }

    fn corrupt(&self, what: impl Into<String>, at: FileOffset) -> Error {
        Error::corrupt(what).in_file(self.storage.name()).at(at)
    }

    /// The L2 table of an L1 index; `None` when there is none.
    fn table(&self, index: u64) -> Result<Option<L2Table>> {
        let offset = self.table_offset(index);
        if offset.bytes() == 0 {
            return Ok(None);
        }
        if let Some(table) = self.tables.lock().get(&index) {
            return Ok(Some(Arc::clone(table)));
        }
        let cluster_size = self.shape.cluster_size();
        if !offset.bytes().is_multiple_of(cluster_size) {
            return Err(self.corrupt(format!("L1 entry {index} is not a cluster's offset"), offset));
        }
        if offset.checked_add(cluster_size).is_none_or(|end| end.bytes() > self.storage.file_size()) {
            let what =
                format!("the L2 table of L1 entry {index} lies past the end of the file, which is truncated");
            return Err(self.corrupt(what, offset));
        }
        let mut table = vec![0; memory_size(cluster_size)];
        self.storage.read_exact_at(offset, &mut table)?;
        let table = Arc::new(table);
        self.tables.lock().put(index, Arc::clone(&table));
        Ok(Some(table))
    }

    /// What the bytes from `at` on are mapped to, and for how many, at most `limit`, that holds.
    fn lookup(&self, at: VirtualOffset, limit: u64) -> Result<(Mapping, u64)> {
        let covered = Unit::of(self.shape.bytes_per_table());
        let (index, within) = (covered.index(at.bytes()), covered.within(at.bytes()));
        let limit = limit.min(self.virtual_size.saturating_sub(at.bytes())).min(covered.rest(at.bytes()));
        match self.table(index)? {
            Some(table) => self.run(index, &table, within, limit),
            None => Ok((Mapping::Unallocated, limit)),
        }
    }

    /// As [`TableShape::run`], in the table of that index.
    fn run(&self, index: u64, table: &L2Table, within: u64, limit: u64) -> Result<(Mapping, u64)> {
        self.shape.run(table, within, limit).map_err(|what| self.corrupt(what, self.table_offset(index)))
    }

    /// Where the L2 table of an L1 index is; 0 when there is none.
    fn table_offset(&self, index: u64) -> FileOffset {
        let entry = usize::try_from(index).ok().and_then(|i| self.l1.get(i)).copied().unwrap_or(0);
        FileOffset(entry & mapping::OFFSET_MASK)
    }

    /// The end of the run of L2 tables that are not there, or are known to be zeros, from `index` on; at most `end`.
    fn absent_until(&self, index: u64, end: u64, zeros: &KnownZeros) -> u64 {
        let is_absent = |index: u64| {
            let offset = self.table_offset(index);
            offset.bytes() == 0 || zeros.contain(offset, self.shape.cluster_size())
        };
        let next = (index..end).find(|index| !is_absent(*index)).unwrap_or(end);
        steps::count(next.saturating_sub(index));
        next
    }

    /// Walks the part of `range`, which lies in one L2 table's, that `table` maps.
    fn visit_table(
        &self,
        index: u64,
        table: &L2Table,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let mut window = Window::new();
        let mut at = range.start;
        while at < range.end {
            let within = Unit::of(self.shape.bytes_per_table()).within(at.bytes());
            let limit = (range.end - at).min(window.steps().saturating_mul(self.shape.unit_size()));
            let (mapping, length) = self.run(index, table, within, limit)?;
            let flow = match mapping {
                Mapping::Data(host) => {
                    self.check_data(host, length)?;
                    visit(Extent::new(ExtentKind::Data, length))?
                }
                Mapping::Compressed { host, length: compressed } => {
                    self.compressed_length(host, compressed)?;
                    visit(Extent::new(ExtentKind::Data, length))?
                }
                Mapping::Zero => visit(Extent::new(ExtentKind::Zero, length))?,
                Mapping::Unallocated => super::visit_below(self.backing.as_deref(), at..at + length, visit)?,
            };
            if flow.is_break() {
                return Ok(flow);
            }
            window.widen();
            at += length;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The bytes of a compressed cluster that are in the file: its length is rounded up to a sector, and the last
    /// cluster's sector may be short.
    fn compressed_length(&self, host: FileOffset, length: u64) -> Result<u64> {
        let end = host.checked_add(length).map(FileOffset::bytes);
        let file_size = self.storage.file_size();
        match end {
            Some(end) if host.bytes() < file_size && end < file_size.saturating_add(512) => {
                Ok(length.min(FileOffset(file_size) - host))
            }
            _ => {
                Err(self
                    .corrupt("a compressed cluster lies past the end of the file, which is truncated", host))
            }
        }
    }

    fn inflate(&self, host: FileOffset, length: u64, target: &mut [u8]) -> Result<()> {
        thread_local! {
            static COMPRESSED: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        let length = memory_size(self.compressed_length(host, length)?);
        COMPRESSED.with_borrow_mut(|buffer| {
            buffer.resize(length, 0);
            let input = buffer.as_mut_slice();
            self.storage.read_exact_at(host, input)?;
            let result = match self.compression {
                Compression::Zlib => codec::inflate_raw(input, target),
                Compression::Zstd => codec::unzstd(input, target),
            };
            result.map_err(|e| self.corrupt("a compressed cluster is damaged", host).because(e))
        })
    }

    /// Reads a piece of a compressed cluster, keeping the cluster for the next piece.
    fn read_inflated(
        &self,
        at: VirtualOffset,
        host: FileOffset,
        length: u64,
        target: &mut [u8],
    ) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let unit = Unit::of(cluster_size);
        let (cluster, within) = (unit.index(at.bytes()), unit.within(at.bytes()));
        let known = self.inflated.get(cluster);
        let bytes = match known {
            Some(bytes) => bytes,
            None => {
                let mut bytes = vec![0; memory_size(cluster_size)];
                self.inflate(host, length, &mut bytes)?;
                let bytes = Arc::new(bytes);
                self.inflated.put(cluster, Arc::clone(&bytes));
                bytes
            }
        };
        target.copy_from_slice(slice(&bytes, within, target.len() as u64)?);
        Ok(())
    }

    fn run_task(&self, task: &mut InflateTask<'_>) -> Result<()> {
        if task.target.len() as u64 == self.shape.cluster_size() {
            self.inflate(task.host, task.length, task.target)
        } else {
            self.read_inflated(task.at, task.host, task.length, task.target)
        }
    }

    /// Fails when `length` bytes of a standard cluster at `host` are not in the file.
    fn check_data(&self, host: FileOffset, length: u64) -> Result<()> {
        if host.checked_add(length).is_some_and(|end| end.bytes() <= self.data.file_size()) {
            return Ok(());
        }
        let what = format!(
            "a cluster lies past the end of the file, which has {} bytes and is truncated",
            self.data.file_size()
        );
        Err(Error::corrupt(what).in_file(self.data.name()).at(host))
    }
}

impl DiskImage for Qcow2Image {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn read_at(&self, mut at: VirtualOffset, mut buf: &mut [u8]) -> Result<()> {
        if at.checked_add(buf.len() as u64).is_none_or(|end| end.bytes() > self.virtual_size) {
            return Err(Error::new(ErrorKind::Internal, "read past the end of the disk").at(at));
        }
        let mut tasks = Vec::new();
        while !buf.is_empty() {
            let (mapping, length) = self.lookup(at, buf.len() as u64)?;
            let (target, rest) = std::mem::take(&mut buf).split_at_mut(memory_size(length));
            match mapping {
                Mapping::Data(host) => {
                    self.check_data(host, length)?;
                    self.data.read_exact_at(host, target)?;
                }
                Mapping::Zero => target.fill(0),
                Mapping::Unallocated => super::read_below(self.backing.as_deref(), at, target)?,
                Mapping::Compressed { host, length } => tasks.push(InflateTask { at, host, length, target }),
            }
            buf = rest;
            at += length;
        }
        match tasks.as_mut_slice() {
            [] => Ok(()),
            [task] => self.run_task(task),
            tasks => tasks.par_iter_mut().try_for_each(|task| self.run_task(task)),
        }
    }

    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let covered = Unit::of(self.shape.bytes_per_table());
        let tables = covered.count(range.end.bytes());
        let (mut window, mut zeros) = (Window::new(), KnownZeros::default());
        let mut at = range.start;
        while at < range.end {
            let index = covered.index(at.bytes());
            let next = self.absent_until(index, tables.min(index.saturating_add(window.steps())), &zeros);
            let end = range.end.min(VirtualOffset(covered.start(next.max(index.saturating_add(1)))));
            let flow = match if next > index { None } else { self.table(index)? } {
                None => super::visit_below(self.backing.as_deref(), at..end, visit)?,
                Some(table) => {
                    if is_zero(&table) {
                        zeros.learn(&*self.storage, self.table_offset(index))?;
                    }
                    self.visit_table(index, &table, at..end, visit)?
                }
            };
            if flow.is_break() {
                return Ok(flow);
            }
            window.widen();
            at = end;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage.verify_unchanged()?;
        if !Arc::ptr_eq(&self.storage, &self.data) {
            self.data.verify_unchanged()?;
        }
        self.backing.as_ref().map_or(Ok(()), |backing| backing.verify_unchanged())
    }

    fn sources(&self) -> Vec<Generation> {
        let mut sources = vec![self.storage.generation().clone(), self.data.generation().clone()];
        sources.extend(self.backing.iter().flat_map(|backing| backing.sources()));
        sources
    }

    fn description(&self) -> ImageDescription {
        ImageDescription {
            file: self.storage.name().to_owned(),
            format: ImageFormat::Qcow2,
            virtual_size: self.virtual_size,
            file_size: self.storage.file_size(),
            cluster_size: Some(self.shape.cluster_size()),
            properties: self.properties.clone(),
            backing: self.backing.as_ref().map(|backing| Box::new(backing.description())),
        }
    }
}
