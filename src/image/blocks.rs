//! What formats that cut a disk into blocks have in common: reading and extents over a map of blocks.

use std::ops::{ControlFlow, Range};

use super::{DiskImage, ExtentVisitor, ImageDescription};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage};
use crate::units::{FileOffset, Unit, VirtualOffset, memory_size};

/// How far a walk looks ahead before it tells what it found: this many steps at first, then twice as many each time.
/// So whoever breaks off after some runs has paid for about as many, and a long walk tells few.
const FIRST_WINDOW: u64 = 16;
const LARGEST_WINDOW: u64 = 1 << 16;

/// The steps that a walk looks ahead.
pub(super) struct Window(u64);

impl Window {
    pub(super) fn new() -> Self {
        Self(FIRST_WINDOW)
    }

    /// The steps up to the next run that is told.
    pub(super) fn steps(&self) -> u64 {
        self.0
    }

    /// Notes that a run was told.
    pub(super) fn widen(&mut self) {
        self.0 = self.0.saturating_mul(2).min(LARGEST_WINDOW);
    }
}

/// Joins neighbours of one kind before a visitor gets them.
pub(super) struct JoinedRuns<'a, 'v> {
    visit: &'a mut ExtentVisitor<'v>,
    run: Option<Extent>,
    /// Extents in the run.
    steps: u64,
    window: Window,
}

impl<'a, 'v> JoinedRuns<'a, 'v> {
    pub(super) fn new(visit: &'a mut ExtentVisitor<'v>) -> Self {
        Self { visit, run: None, steps: 0, window: Window::new() }
    }

    /// The next extent.
    pub(super) fn add(&mut self, extent: Extent) -> Result<ControlFlow<()>> {
        match &mut self.run {
            Some(run) if run.kind == extent.kind && self.steps < self.window.steps() => {
                run.length = run.length.saturating_add(extent.length);
                self.steps = self.steps.saturating_add(1);
                Ok(ControlFlow::Continue(()))
            }
            run => {
                let ended = run.replace(extent);
                self.steps = 1;
                self.window.widen();
                ended.map_or(Ok(ControlFlow::Continue(())), &mut *self.visit)
            }
        }
    }

    /// Tells the last run.
    pub(super) fn end(mut self) -> Result<ControlFlow<()>> {
        self.run.take().map_or(Ok(ControlFlow::Continue(())), &mut *self.visit)
    }
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// At this offset of the file.
    Data(FileOffset),
    /// Compressed at this offset of the file.
    Compressed(FileOffset),
    /// Allocated, reading as zeros.
    Zero,
    /// Not allocated.
    Hole,
}

impl Block {
    fn kind(self) -> ExtentKind {
        match self {
            Self::Data(_) | Self::Compressed(_) => ExtentKind::Data,
            Self::Zero => ExtentKind::Zero,
            Self::Hole => ExtentKind::Hole,
        }
    }
}

/// Gets a block, and how many are like it: 1 where it has a place.
pub(super) type BlockVisitor<'a> = dyn FnMut(Block, u64) -> Result<ControlFlow<()>> + 'a;

/// Tells `visit` that `count` entries of a table in a row say the same of their blocks.
pub(super) fn visit_alike(block: Block, count: u64, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>> {
    if matches!(block, Block::Zero | Block::Hole) {
        return visit(block, count);
    }
    for _ in 0..count {
        if visit(block, 1)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// A disk that is cut into blocks of one size.
pub(super) trait BlockMap {
    fn storage(&self) -> &dyn Storage;

    /// Bytes of the disk.
    fn virtual_size(&self) -> u64;

    /// Bytes of a block.
    fn block_size(&self) -> u64;

    /// The blocks, to calculate with.
    fn blocks(&self) -> Unit {
        Unit::of(self.block_size())
    }

    /// Where block `index` is; it lies inside the disk, at least in part.
    fn block(&self, index: u64) -> Result<Block>;

    /// Tells `visit` where the blocks of a range are, in order, until it breaks off. Takes time in the bytes of the
    /// tables, not in the blocks of the disk.
    fn visit_blocks(&self, blocks: Range<u64>, visit: &mut BlockVisitor<'_>) -> Result<ControlFlow<()>>;

    /// Reads from `within` a compressed block that is at `host`.
    fn read_compressed(&self, host: FileOffset, _within: u64, _target: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Internal, "the format has no compressed blocks").at(host))
    }

    /// Fills `buf` from `at`, as [`DiskImage::read_at`](super::DiskImage::read_at).
    fn read_blocks(&self, mut at: VirtualOffset, mut buf: &mut [u8]) -> Result<()> {
        if at.checked_add(buf.len() as u64).is_none_or(|end| end.bytes() > self.virtual_size()) {
            return Err(Error::new(ErrorKind::Internal, "read past the end of the disk").at(at));
        }
        while !buf.is_empty() {
            let (index, within) = (self.blocks().index(at.bytes()), self.blocks().within(at.bytes()));
            let length = self.blocks().rest(at.bytes()).min(buf.len() as u64);
            let (target, rest) = std::mem::take(&mut buf).split_at_mut(memory_size(length));
            match self.checked_block(index)? {
                Block::Data(host) => self.storage().read_exact_at(host + within, target)?,
                Block::Compressed(host) => self.read_compressed(host, within, target)?,
                Block::Zero | Block::Hole => target.fill(0),
            }
            buf = rest;
            at += length;
        }
        Ok(())
    }

    /// As [`DiskImage::visit_extents`](super::DiskImage::visit_extents): data is checked to lie inside the file.
    fn visit_block_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let unit = self.blocks();
        let blocks = unit.index(range.start.bytes())..unit.count(range.end.bytes());
        let (mut index, mut at) = (blocks.start, range.start);
        let mut runs = JoinedRuns::new(visit);
        let mut room = unit.index(self.storage().file_size()).saturating_add(2);
        let flow = self.visit_blocks(blocks, &mut |block, count| {
            self.check_block(index, block)?;
            if matches!(block, Block::Data(_)) {
                room = room.checked_sub(1).ok_or_else(|| self.too_many_blocks())?;
            }
            index = index.saturating_add(count);
            let end = VirtualOffset(unit.start(index)).min(range.end);
            let extent = Extent::new(block.kind(), end - at);
            at = end;
            runs.add(extent)
        })?;
        if flow.is_break() { Ok(flow) } else { runs.end() }
    }

    /// The refusal of a table that names more blocks than fit into the file, so that some are the same: a walk through
    /// them would have no bound in the file's size.
    fn too_many_blocks(&self) -> Error {
        let what = "the disk has more blocks than fit into the file: one is named twice, or two overlap";
        Error::corrupt(what).in_file(self.storage().name())
    }

    /// A block whose bytes, as far as the disk needs them, are in the file.
    fn checked_block(&self, index: u64) -> Result<Block> {
        let block = self.block(index)?;
        self.check_block(index, block)?;
        Ok(block)
    }

    /// Fails when bytes of block `index` that the disk needs are not in the file.
    fn check_block(&self, index: u64, block: Block) -> Result<()> {
        let (host, needed) = match block {
            Block::Data(host) => {
                (host, self.block_size().min(self.virtual_size().saturating_sub(self.blocks().start(index))))
            }
            // How long it is stands in front of it, and is checked when it is read.
            Block::Compressed(host) => (host, 1),
            Block::Zero | Block::Hole => return Ok(()),
        };
        if host.checked_add(needed).is_some_and(|end| end.bytes() <= self.storage().file_size()) {
            return Ok(());
        }
        let what = format!(
            "block {index} lies past the end of the file, which has {} bytes and is truncated",
            self.storage().file_size()
        );
        Err(Error::corrupt(what).in_file(self.storage().name()).at(host))
    }
}

/// An image that is nothing but its blocks, in one file.
pub(super) trait BlockImage: BlockMap {
    /// Its format.
    fn format(&self) -> ImageFormat;

    /// Its properties, in the words of qemu-img.
    fn properties(&self) -> Vec<(String, String)>;
}

impl<T: BlockImage + Send + Sync> DiskImage for T {
    fn virtual_size(&self) -> u64 {
        BlockMap::virtual_size(self)
    }

    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
        self.read_blocks(at, buf)
    }

    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        self.visit_block_extents(range, visit)
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storage().verify_unchanged()
    }

    fn sources(&self) -> Vec<Generation> {
        vec![self.storage().generation().clone()]
    }

    fn description(&self) -> ImageDescription {
        ImageDescription {
            file: self.storage().name().to_owned(),
            format: self.format(),
            virtual_size: BlockMap::virtual_size(self),
            file_size: self.storage().file_size(),
            cluster_size: Some(self.block_size()),
            properties: self.properties(),
            backing: None,
        }
    }
}
