//! A disk that is open: its reader, its allocation maps, and its file in each format.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::gate::OpenedFiles;
use super::{AllowedFiles, CatalogDisk, CatalogStore};
use crate::convert::{CompressedFile, ConvertedFile, Workspace};
use crate::error::{Error, Result};
use crate::extent::AllocationMap;
use crate::format::{ImageFormat, OutputFormat};
use crate::image::{self, Cancel, DiskImage, ReferenceGate};
use crate::layout::{self, AnyLayout, LayoutInput, LayoutOptions};
use crate::storage::{Generation, Identity, IdentityFacts};
use crate::vfile::VirtualFile;

/// One generation of a disk, opened. Files of all formats share its reader and its maps.
pub struct OpenDisk {
    name: String,
    image: Arc<dyn DiskImage>,
    generation: Generation,
    /// All files of the chain by their names.
    opened: OpenedFiles,
    format: ImageFormat,
    is_remote: bool,
    seed: [u8; 16],
    maps: Mutex<HashMap<u64, Arc<AllocationMap>>>,
    files: Mutex<HashMap<OutputFormat, (FormatFile, Identity)>>,
    options: LayoutOptions,
    workspace: Arc<Workspace>,
    walks: Cancel,
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
    /// computed in `workspace`. Walks over its tables are given up when `walks` is cancelled.
    pub fn open(
        store: &Arc<dyn CatalogStore>,
        disk: &CatalogDisk,
        options: LayoutOptions,
        workspace: Arc<Workspace>,
        walks: Cancel,
    ) -> Result<Self> {
        let storage = store.open(&disk.path)?;
        let generation = storage.generation().clone();
        let seed = seed(&disk.name, storage.file_size(), generation.modified());
        let gate = AllowedFiles::new(Arc::clone(store), &disk.path, &disk.allowed)?;
        let opened = gate.opened();
        opened.lock().push((disk.path.clone(), generation.clone()));
        let gate: Arc<dyn ReferenceGate> = Arc::new(gate);
        let image = image::open_image(disk.format, storage, &gate, 0)
            .map_err(|e: Error| e.in_file(store.place(&disk.path)))?;
        Ok(Self {
            name: disk.name.clone(),
            image,
            generation,
            opened,
            format: disk.format,
            is_remote: store.is_remote(),
            seed,
            maps: Mutex::default(),
            files: Mutex::default(),
            options,
            workspace,
            walks,
        })
    }

    /// Files that it has open: those of its chain.
    pub fn files(&self) -> usize {
        self.opened.lock().len()
    }

    /// Bytes of memory of its maps. One that is being made does not count yet.
    pub fn memory(&self) -> usize {
        self.maps.try_lock().map_or(0, |maps| maps.values().map(|map| map.memory()).sum())
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

    /// When the newest file of its chain was last modified.
    pub fn modified(&self) -> SystemTime {
        let opened = self.opened.lock();
        opened.iter().map(|(_, generation)| generation.modified()).max().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Whether the names of all files of the chain still lead to what was opened. Who has the disk open reads on
    /// when they do not, as long as [`verify_unchanged`](Self::verify_unchanged) allows it.
    pub(super) fn is_current(&self, store: &dyn CatalogStore) -> bool {
        let opened = self.opened.lock().clone();
        opened.iter().all(|(path, generation)| store.is_current(path, generation))
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
        self.identified_file(format).map(|(file, _)| file)
    }

    /// The disk's file in `format`, and what its bytes depend on.
    pub fn identified_file(&self, format: OutputFormat) -> Result<(FormatFile, Identity)> {
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
            Some(unit) => Some(self.map(unit)?),
            None => None,
        };
        let facts = self.facts(format);
        let placed = map.clone().unwrap_or_else(|| Arc::new(AllocationMap::empty()));
        let image = Arc::clone(&self.image);
        let identified = match layout::build(format, &input, Arc::clone(&placed))? {
            AnyLayout::Plain(layout) => {
                let identity = facts.finish(map.as_deref());
                (FormatFile::Plain(Arc::new(ConvertedFile::new(image, layout))), identity)
            }
            AnyLayout::Compressed(layout) => {
                let identity = facts.fact(layout.compressor().identity()?).finish(map.as_deref());
                let workspace = Arc::clone(&self.workspace);
                let file = CompressedFile::new(image, layout, placed, identity.name(), workspace)?;
                (FormatFile::Compressed(Arc::new(file)), identity)
            }
        };
        files.insert(format, identified.clone());
        Ok(identified)
    }

    /// What the bytes of the disk's file in `format` depend on, but for the compressor and the allocation map.
    fn facts(&self, format: OutputFormat) -> IdentityFacts {
        let facts = Identity::of_facts()
            .fact(layout::VERSION.to_le_bytes())
            .fact(format.suffix())
            .fact(self.options.fact())
            .fact(&self.name)
            .fact(self.seed)
            .fact(self.format.name())
            .fact(self.image.virtual_size().to_le_bytes());
        self.image.sources().iter().fold(facts, IdentityFacts::source)
    }

    /// Whether what earlier versions recorded of a source, the generation of its image file alone, tells all that the
    /// bytes of the file in `format` depend on.
    pub fn is_told_by_generation(&self, format: OutputFormat) -> bool {
        let is_alone = self.image.sources().iter().all(|source| *source == self.generation);
        // The holes of a local file are the filesystem's to tell; other formats have theirs in their tables.
        let has_own_map = self.is_remote || !matches!(self.format, ImageFormat::Raw | ImageFormat::Vhd);
        is_alone && (has_own_map || layout::unit_size(format, &self.options).is_none())
    }

    fn map(&self, unit: u64) -> Result<Arc<AllocationMap>> {
        let mut maps = self.maps.lock();
        if let Some(map) = maps.get(&unit) {
            return Ok(Arc::clone(map));
        }
        let map = Arc::new(image::allocation_map(&*self.image, unit, &self.walks)?);
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
