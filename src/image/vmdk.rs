//! VMDK: one file (monolithicSparse, streamOptimized), or a descriptor and the extents that it names.
//!
//! Source: VMware, "Virtual Disk Format 5.0". Files that a descriptor names are opened through the gate only. Disks
//! with a parent are refused by name.

mod descriptor;
mod sparse;

use std::collections::{HashMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

pub(super) use self::descriptor::DESCRIPTOR_START;
use self::descriptor::{Descriptor, ExtentLine};
use self::sparse::SparseExtent;
use super::blocks::BlockMap;
use super::{DiskImage, ExtentVisitor, ImageDescription, ReferenceGate, ReferenceKind};
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::extent::{Extent, ExtentKind};
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage, check_range};
use crate::units::{FileOffset, SECTOR, VirtualOffset, memory_size};

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
    Sparse(Arc<SparseExtent>),
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
        let extent = Arc::new(SparseExtent::open(Arc::clone(&storage))?);
        let (at, length) = extent.descriptor().ok_or_else(|| {
            Error::unsupported("the VMDK has no descriptor; it may be an extent of another").at(28u64)
        })?;
        let descriptor = Descriptor::read(&*storage, at, length)?;
        refuse_parent(&descriptor)?;
        if !["monolithicSparse", "streamOptimized"].contains(&descriptor.create_type.as_str()) {
            let create_type = quoted(&descriptor.create_type);
            let what = format!("VMDK of type {create_type} is not supported in one file");
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
        let virtual_size = virtual_size(&descriptor.extents)?;
        let mut files = ExtentFiles { gate, by_name: HashMap::new(), opened: Vec::new() };
        let mut extents = Vec::with_capacity(descriptor.extents.len());
        let mut start = VirtualOffset(0);
        for line in &descriptor.extents {
            let length = line.sectors.saturating_mul(SECTOR);
            let content = files.content(line, length)?;
            extents.push(VmdkExtent { start, length, content });
            start += length;
        }
        Ok(Self {
            storage,
            create_type: descriptor.create_type,
            content_id: descriptor.content_id,
            extents,
            virtual_size,
        })
    }

    /// The extent that `at`, which lies inside the disk, is in.
    fn extent(&self, at: VirtualOffset) -> Result<&VmdkExtent> {
        let after = self.extents.partition_point(|extent| extent.start <= at);
        let extent = self.extents.get(after.saturating_sub(1));
        extent.ok_or_else(|| Error::new(ErrorKind::Internal, "the disk has no extents").at(at))
    }

    /// The files that the disk's bytes come from, each once.
    fn storages(&self) -> Vec<&Arc<dyn Storage>> {
        let mut known: Vec<&Arc<dyn Storage>> = vec![&self.storage];
        let mut seen: HashSet<*const ()> = HashSet::from([address(&self.storage)]);
        let files = self.extents.iter().filter_map(|extent| extent.content.storage());
        known.extend(files.filter(|file| seen.insert(address(file))));
        known
    }
}

/// Where a file's value is: what one file is known by.
fn address(storage: &Arc<dyn Storage>) -> *const () {
    Arc::as_ptr(storage).cast()
}

fn refuse_parent(descriptor: &Descriptor) -> Result<()> {
    if descriptor.has_parent {
        return Err(Error::unsupported("the VMDK has a parent, which is not supported"));
    }
    Ok(())
}

/// The bytes of a disk of these extents, checked before any of them is opened.
fn virtual_size(extents: &[ExtentLine]) -> Result<u64> {
    let mut size = 0u64;
    for line in extents {
        let length = line.sectors.checked_mul(SECTOR).filter(|length| *length > 0);
        let Some(sum) = length.and_then(|length| size.checked_add(length)) else {
            return Err(Error::corrupt(format!("an extent of {} sectors is not allowed", line.sectors)));
        };
        super::check_virtual_size(sum)?;
        size = sum;
    }
    if size == 0 {
        return Err(Error::corrupt("the descriptor names no extent"));
    }
    Ok(size)
}

/// The files of a descriptor's extents. Each is opened once, however many extents name it, and under whatever names.
struct ExtentFiles<'a> {
    gate: &'a Arc<dyn ReferenceGate>,
    /// Indices of `opened`.
    by_name: HashMap<String, usize>,
    opened: Vec<ExtentFile>,
}

struct ExtentFile {
    storage: Arc<dyn Storage>,
    /// What it is as a sparse extent, once one needed it.
    sparse: Option<Arc<SparseExtent>>,
}

impl ExtentFiles<'_> {
    fn file(&mut self, line: &ExtentLine) -> Result<&mut ExtentFile> {
        let name = line
            .file
            .as_deref()
            .ok_or_else(|| Error::corrupt("an extent of the descriptor names no file"))?;
        let index = match self.by_name.get(name) {
            Some(index) => *index,
            None => {
                let storage = self.gate.open(ReferenceKind::Extent, name)?.storage;
                let is_same = |file: &ExtentFile| {
                    file.storage.name() == storage.name() && file.storage.generation() == storage.generation()
                };
                let index = self.opened.iter().position(is_same).unwrap_or(self.opened.len());
                if index == self.opened.len() {
                    self.opened.push(ExtentFile { storage, sparse: None });
                }
                self.by_name.insert(name.to_owned(), index);
                index
            }
        };
        let lost = || Error::new(ErrorKind::Internal, "an extent's file is opened and not there");
        self.opened.get_mut(index).ok_or_else(lost)
    }

    /// Opens the file of an extent of `length` bytes.
    fn content(&mut self, line: &ExtentLine, length: u64) -> Result<Content> {
        match line.kind.as_str() {
            "ZERO" => Ok(Content::Zero),
            "FLAT" | "VMFS" => {
                let storage = Arc::clone(&self.file(line)?.storage);
                let start = line.offset.checked_mul(SECTOR).map(FileOffset);
                let start = start.ok_or_else(|| Error::corrupt("an extent's offset is too large"))?;
                check_range(&*storage, start, length)?;
                Ok(Content::Flat { storage, start })
            }
            "SPARSE" => {
                let file = self.file(line)?;
                let extent = match &file.sparse {
                    Some(extent) => Arc::clone(extent),
                    None => {
                        let opened = SparseExtent::open(Arc::clone(&file.storage));
                        let extent = Arc::new(opened.map_err(|e| e.in_file(file.storage.name()))?);
                        Arc::clone(file.sparse.insert(extent))
                    }
                };
                if extent.virtual_size() < length {
                    let what =
                        format!("the extent is smaller than the {length} bytes that its descriptor says");
                    return Err(Error::corrupt(what).in_file(file.storage.name()));
                }
                Ok(Content::Sparse(extent))
            }
            other => Err(Error::unsupported(format!("extents of type {} are not supported", quoted(other)))),
        }
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
            let extent = self.extent(at)?;
            let within = at - extent.start;
            let length = extent.length.saturating_sub(within).min(buf.len() as u64);
            let (target, rest) = std::mem::take(&mut buf).split_at_mut(memory_size(length));
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

    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.extent(at)?;
            let end = range.end.min(extent.start + extent.length);
            let within = at - extent.start;
            let flow = match &extent.content {
                Content::Sparse(sparse) => {
                    let part = VirtualOffset(within)..VirtualOffset(end - extent.start);
                    sparse.visit_block_extents(part, visit)?
                }
                Content::Flat { storage, start } => {
                    super::visit_storage(&**storage, *start + within, end - at, visit)?
                }
                Content::Zero => visit(Extent::new(ExtentKind::Zero, end - at))?,
            };
            if flow.is_break() {
                return Ok(flow);
            }
            at = end;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn verify_unchanged(&self) -> Result<()> {
        self.storages().into_iter().try_for_each(|storage| storage.verify_unchanged())
    }

    fn sources(&self) -> Vec<Generation> {
        self.storages().into_iter().map(|storage| storage.generation().clone()).collect()
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
            file_size: self.storages().into_iter().map(|storage| storage.file_size()).sum(),
            cluster_size: grain,
            properties,
            backing: None,
        }
    }
}
