//! A disk that is open: its reader, its allocation maps, and its file in each format.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{AllowedFiles, CatalogDisk, CatalogStore, StoredFile};
use crate::convert::{CompressedFile, ConvertedFile, Workspace};
use crate::error::{Error, Result};
use crate::extent::AllocationMap;
use crate::format::OutputFormat;
use crate::image::{self, DiskImage, ReferenceGate};
use crate::layout::{self, AnyLayout, LayoutInput, LayoutOptions};
use crate::storage::Generation;
use crate::vfile::VirtualFile;

/// One generation of a disk, opened. Files of all formats share its reader and its maps.
pub struct OpenDisk {
    name: String,
    image: Arc<dyn DiskImage>,
    generation: Generation,
    modified: SystemTime,
    seed: [u8; 16],
    maps: Mutex<HashMap<u64, Arc<AllocationMap>>>,
    files: Mutex<HashMap<OutputFormat, FormatFile>>,
    options: LayoutOptions,
    workspace: Arc<Workspace>,
}

/// A disk's file in one format.
#[derive(Clone)]
pub enum FormatFile {
    /// Its size is known.
    Plain(Arc<ConvertedFile>),
    /// Its size is known after its data was compressed once.
    Compressed(Arc<CompressedFile>),
}

impl FormatFile {
    /// The file, whichever it is.
    pub fn virtual_file(&self) -> Arc<dyn VirtualFile> {
        match self {
            Self::Plain(file) => Arc::clone(file) as Arc<dyn VirtualFile>,
            Self::Compressed(file) => Arc::clone(file) as Arc<dyn VirtualFile>,
        }
    }
}

impl OpenDisk {
    /// Opens the disk's image file and what it refers to. Reads headers only. Compressed files keep what they
    /// computed in `workspace`.
    pub fn open(
        store: &Arc<dyn CatalogStore>,
        disk: &CatalogDisk,
        options: LayoutOptions,
        workspace: Arc<Workspace>,
    ) -> Result<Self> {
        let StoredFile { storage, modified } = store.open(&disk.path)?;
        let generation = storage.generation().clone();
        let seed = seed(&disk.name, storage.file_size(), modified);
        let gate: Arc<dyn ReferenceGate> =
            Arc::new(AllowedFiles::new(Arc::clone(store), &disk.path, &disk.allowed)?);
        let image = image::open_image(disk.format, storage, &gate, 0)
            .map_err(|e: Error| e.in_file(store.place(&disk.path)))?;
        Ok(Self {
            name: disk.name.clone(),
            image,
            generation,
            modified,
            seed,
            maps: Mutex::default(),
            files: Mutex::default(),
            options,
            workspace,
        })
    }

    /// The disk's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The guest's disk.
    pub fn image(&self) -> &Arc<dyn DiskImage> {
        &self.image
    }

    /// The generation of its image file.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// When its image file was last modified.
    pub fn modified(&self) -> SystemTime {
        self.modified
    }

    /// Fails when a file of the chain changed since the disk was opened.
    pub fn verify_unchanged(&self) -> Result<()> {
        self.image.verify_unchanged()
    }

    /// The name of the disk's file in `format`.
    pub fn file_name(&self, format: OutputFormat) -> String {
        format!("{}.{}", self.name, format.suffix())
    }

    /// The disk's file in `format`. The first call for a unit size walks the image's tables, later ones share.
    pub fn file(&self, format: OutputFormat) -> Result<FormatFile> {
        // The lock is held while a map is made, so that ten openers walk the tables once.
        let mut files = self.files.lock();
        if let Some(file) = files.get(&format) {
            return Ok(file.clone());
        }
        let input = LayoutInput {
            virtual_size: self.image.virtual_size(),
            seed: self.seed,
            file_name: self.file_name(format),
            options: self.options,
        };
        let map = match layout::unit_size(format, &self.options) {
            Some(unit) => self.map(unit)?,
            None => Arc::new(AllocationMap::builder(0, 1).finish()),
        };
        let image = Arc::clone(&self.image);
        let file = match layout::build(format, &input, Arc::clone(&map))? {
            AnyLayout::Plain(layout) => FormatFile::Plain(Arc::new(ConvertedFile::new(image, layout))),
            AnyLayout::Compressed(layout) => {
                let (source, workspace) = (self.source_key(format), Arc::clone(&self.workspace));
                let file = CompressedFile::new(image, layout, map, &source, workspace)?;
                FormatFile::Compressed(Arc::new(file))
            }
        };
        files.insert(format, file.clone());
        Ok(file)
    }

    /// What the bytes of a compressed file depend on besides its compressor.
    fn source_key(&self, format: OutputFormat) -> String {
        let sources: Vec<_> = self.image.sources().into_iter().map(|generation| generation.0).collect();
        format!("{}\n{:?}\n{}\n{}", format.suffix(), self.options, self.name, sources.join("\n"))
    }

    fn map(&self, unit: u64) -> Result<Arc<AllocationMap>> {
        let mut maps = self.maps.lock();
        if let Some(map) = maps.get(&unit) {
            return Ok(Arc::clone(map));
        }
        let map = Arc::new(image::allocation_map(&*self.image, unit)?);
        self.image.verify_unchanged()?;
        maps.insert(unit, Arc::clone(&map));
        Ok(map)
    }
}

/// What stands where other tools put random identifiers: the disk's name, and its file's size and mtime.
///
/// Device and inode are left out, so that two hosts with copies that keep mtime make the same bytes.
fn seed(name: &str, file_size: u64, modified: SystemTime) -> [u8; 16] {
    let since = modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(b"freightfs seed 1\0");
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(file_size.to_le_bytes());
    hash.update(since.as_nanos().to_le_bytes());
    let mut seed = [0; 16];
    seed.copy_from_slice(&hash.finalize()[..16]);
    seed
}
