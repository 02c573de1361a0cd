//! What formats that cut a disk into blocks have in common: reading and extents over a map of blocks.

use super::{DiskImage, ImageDescription};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage};
use crate::units::{FileOffset, VirtualOffset};

/// Blocks that one extent covers at most, which bounds the time of a call.
const MAX_RUN: u64 = 1 << 16;

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

/// A disk that is cut into blocks of one size.
pub(super) trait BlockMap {
    fn storage(&self) -> &dyn Storage;

    /// Bytes of the disk.
    fn virtual_size(&self) -> u64;

    /// Bytes of a block.
    fn block_size(&self) -> u64;

    /// Where block `index` is; it lies inside the disk, at least in part.
    fn block(&self, index: u64) -> Result<Block>;

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
            let (index, within) = (at.bytes() / self.block_size(), at.bytes() % self.block_size());
            let length = (self.block_size() - within).min(buf.len() as u64);
            let (target, rest) = std::mem::take(&mut buf).split_at_mut(length as usize);
            match self.block(index)? {
                Block::Data(host) => self.storage().read_exact_at(host + within, target)?,
                Block::Compressed(host) => self.read_compressed(host, within, target)?,
                Block::Zero | Block::Hole => target.fill(0),
            }
            buf = rest;
            at += length;
        }
        Ok(())
    }

    /// As [`DiskImage::extent_at`](super::DiskImage::extent_at): data is checked to lie inside the file.
    fn block_extent(&self, at: VirtualOffset) -> Result<Extent> {
        let (first, within) = (at.bytes() / self.block_size(), at.bytes() % self.block_size());
        let kind = self.checked_block(first)?.kind();
        let mut length = self.block_size() - within;
        for index in first + 1..first + MAX_RUN {
            if at.bytes() + length >= self.virtual_size() || self.checked_block(index)?.kind() != kind {
                break;
            }
            length += self.block_size();
        }
        Ok(Extent::new(kind, length.min(self.virtual_size() - at.bytes())))
    }

    /// A block whose bytes, as far as the disk needs them, are in the file.
    fn checked_block(&self, index: u64) -> Result<Block> {
        let block = self.block(index)?;
        let needed = match block {
            Block::Data(_) => self.block_size().min(self.virtual_size() - index * self.block_size()),
            // How long it is stands in front of it, and is checked when it is read.
            Block::Compressed(_) => 1,
            Block::Zero | Block::Hole => return Ok(block),
        };
        if let Block::Data(host) | Block::Compressed(host) = block
            && host.checked_add(needed).is_none_or(|end| end.bytes() > self.storage().file_size())
        {
            let what = format!(
                "block {index} lies past the end of the file, which has {} bytes and is truncated",
                self.storage().file_size()
            );
            return Err(Error::corrupt(what).in_file(self.storage().name()).at(host));
        }
        Ok(block)
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

    fn extent_at(&self, at: VirtualOffset) -> Result<Extent> {
        self.block_extent(at)
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
