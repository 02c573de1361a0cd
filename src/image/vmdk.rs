//! VMDK: one file (monolithicSparse, streamOptimized), or a descriptor and the extents that it names.
//!
//! Source: VMware, "Virtual Disk Format 5.0". Files that a descriptor names are opened through the gate only. Disks
//! with a parent are refused by name.

mod descriptor;
mod sparse;

use std::sync::Arc;

use self::descriptor::{DESCRIPTOR_START, Descriptor, ExtentLine};
use self::sparse::SparseExtent;
use super::blocks::BlockMap;
use super::{DiskImage, ImageDescription, ReferenceGate, ReferenceKind};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentKind};
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage, check_range};
use crate::units::{FileOffset, SECTOR, VirtualOffset};

/// A VMDK image.
pub struct VmdkImage {
    /// The file that was opened: the only one, or the descriptor.
    storage: Arc<dyn Storage>,
    create_type: String,
    content_id: String,
    /// In the order of the disk.
    extents: Vec<VmdkExtent>,
    virtual_size: u64,
}

/// A part of the disk.
struct VmdkExtent {
    start: VirtualOffset,
    length: u64,
    content: Content,
}

enum Content {
    Sparse(Box<SparseExtent>),
    Flat { storage: Arc<dyn Storage>, start: FileOffset },
    Zero,
}

impl VmdkImage {
    /// Opens `storage`, which may be a descriptor that names other files.
    pub fn open(storage: Arc<dyn Storage>, gate: &Arc<dyn ReferenceGate>) -> Result<Self> {
        let place = storage.name().to_owned();
        Self::open_unnamed(storage, gate).map_err(|e| e.in_file(place))
    }

    fn open_unnamed(storage: Arc<dyn Storage>, gate: &Arc<dyn ReferenceGate>) -> Result<Self> {
        let mut start = [0; DESCRIPTOR_START.len()];
        storage.read_exact_at(FileOffset(0), &mut start)?;
        if start == DESCRIPTOR_START {
            return Self::open_described(storage, gate);
        }
        let extent = Box::new(SparseExtent::open(Arc::clone(&storage))?);
        let (at, length) = extent.descriptor().ok_or_else(|| {
            Error::unsupported("the VMDK has no descriptor; it may be an extent of another").at(28u64)
        })?;
        let descriptor = Descriptor::read(&*storage, at, length)?;
        refuse_parent(&descriptor)?;
        if !["monolithicSparse", "streamOptimized"].contains(&descriptor.create_type.as_str()) {
            let what = format!("VMDK of type {:?} is not supported in one file", descriptor.create_type);
            return Err(Error::unsupported(what).at(at));
        }
        let length = extent.virtual_size();
        let extent = VmdkExtent { start: VirtualOffset(0), length, content: Content::Sparse(extent) };
        Ok(Self {
            storage,
            create_type: descriptor.create_type,
            content_id: descriptor.content_id,
            extents: vec![extent],
            virtual_size: length,
        })
    }

    /// Opens the extents that a descriptor names.
    fn open_described(storage: Arc<dyn Storage>, gate: &Arc<dyn ReferenceGate>) -> Result<Self> {
        let descriptor = Descriptor::read(&*storage, FileOffset(0), storage.file_size())?;
        refuse_parent(&descriptor)?;
        let mut extents = Vec::with_capacity(descriptor.extents.len());
        let mut end = VirtualOffset(0);
        for line in &descriptor.extents {
            let length = line.sectors.checked_mul(SECTOR).filter(|length| *length > 0);
            let next =
                length.and_then(|length| end.checked_add(length)).filter(|next| next.0 <= i64::MAX as u64);
            let (Some(length), Some(next)) = (length, next) else {
                return Err(Error::corrupt(format!("an extent of {} sectors is not allowed", line.sectors)));
            };
            let content = open_content(line, length, gate)?;
            extents.push(VmdkExtent { start: end, length, content });
            end = next;
        }
        if extents.is_empty() {
            return Err(Error::corrupt("the descriptor names no extent"));
        }
        Ok(Self {
            storage,
            create_type: descriptor.create_type,
            content_id: descriptor.content_id,
            extents,
            virtual_size: end.bytes(),
        })
    }

    /// The extent that `at`, which lies inside the disk, is in.
    fn extent(&self, at: VirtualOffset) -> &VmdkExtent {
        let after = self.extents.partition_point(|extent| extent.start <= at);
        &self.extents[after.saturating_sub(1)]
    }

    fn storages(&self) -> impl Iterator<Item = &Arc<dyn Storage>> {
        let others = self.extents.iter().filter_map(|extent| extent.content.storage());
        std::iter::once(&self.storage).chain(others.filter(|other| !Arc::ptr_eq(other, &self.storage)))
    }
}

fn refuse_parent(descriptor: &Descriptor) -> Result<()> {
    if descriptor.has_parent {
        return Err(Error::unsupported("the VMDK has a parent, which is not supported"));
    }
    Ok(())
}

/// Opens the file of an extent of `length` bytes.
fn open_content(line: &ExtentLine, length: u64, gate: &Arc<dyn ReferenceGate>) -> Result<Content> {
    let file = || {
        let name = line
            .file
            .as_deref()
            .ok_or_else(|| Error::corrupt("an extent of the descriptor names no file"))?;
        gate.open(ReferenceKind::Extent, name)
    };
    match line.kind.as_str() {
        "ZERO" => Ok(Content::Zero),
        "FLAT" | "VMFS" => {
            let storage = file()?.storage;
            let start = line.offset.checked_mul(SECTOR).map(FileOffset);
            let start = start.ok_or_else(|| Error::corrupt("an extent's offset is too large"))?;
            check_range(&*storage, start, length)?;
            Ok(Content::Flat { storage, start })
        }
        "SPARSE" => {
            let storage = file()?.storage;
            let name = storage.name().to_owned();
            let extent = SparseExtent::open(storage).map_err(|e| e.in_file(&name))?;
            if extent.virtual_size() < length {
                let what = format!("the extent is smaller than the {length} bytes that its descriptor says");
                return Err(Error::corrupt(what).in_file(name));
            }
            Ok(Content::Sparse(Box::new(extent)))
        }
        other => Err(Error::unsupported(format!("extents of type {other:?} are not supported"))),
    }
}

impl Content {
    fn storage(&self) -> Option<&Arc<dyn Storage>> {
        match self {
            Self::Sparse(extent) => Some(extent.shared_storage()),
            Self::Flat { storage, .. } => Some(storage),
            Self::Zero => None,
        }
    }
}

impl DiskImage for VmdkImage {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn read_at(&self, mut at: VirtualOffset, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            let extent = self.extent(at);
            let within = at - extent.start;
            let length = extent.length.saturating_sub(within).min(buf.len() as u64);
            let (target, rest) = std::mem::take(&mut buf).split_at_mut(length as usize);
            if target.is_empty() {
                return Err(Error::corrupt("read past the end of the disk").at(at));
            }
            match &extent.content {
                Content::Sparse(sparse) => sparse.read_blocks(VirtualOffset(within), target)?,
                Content::Flat { storage, start } => storage.read_exact_at(*start + within, target)?,
                Content::Zero => target.fill(0),
            }
            buf = rest;
            at += length;
        }
        Ok(())
    }

    fn extent_at(&self, at: VirtualOffset) -> Result<Extent> {
        let extent = self.extent(at);
        let within = at - extent.start;
        let found = match &extent.content {
            Content::Sparse(sparse) => sparse.block_extent(VirtualOffset(within))?,
            Content::Flat { storage, start } => storage.extent_at(*start + within)?,
            Content::Zero => Extent::new(ExtentKind::Zero, extent.length),
        };
        Ok(Extent::new(found.kind, found.length.min(extent.length - within)))
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storages().try_for_each(|storage| storage.verify_unchanged())
    }

    fn sources(&self) -> Vec<Generation> {
        self.storages().map(|storage| storage.generation().clone()).collect()
    }

    fn description(&self) -> ImageDescription {
        let grain = self.extents.iter().find_map(|extent| match &extent.content {
            Content::Sparse(sparse) => Some(sparse.block_size()),
            _ => None,
        });
        let mut properties = vec![
            ("cid".to_owned(), self.content_id.clone()),
            ("create type".to_owned(), self.create_type.clone()),
        ];
        if self.extents.len() > 1 {
            properties.push(("extents".to_owned(), self.extents.len().to_string()));
        }
        ImageDescription {
            file: self.storage.name().to_owned(),
            format: ImageFormat::Vmdk,
            virtual_size: self.virtual_size,
            file_size: self.storages().map(|storage| storage.file_size()).sum(),
            cluster_size: grain,
            properties,
            backing: None,
        }
    }
}
