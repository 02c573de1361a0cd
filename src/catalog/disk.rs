//! A disk that is open: its reader, its allocation maps, and its file in each format.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{AllowedFiles, CatalogDisk};
use crate::convert::ConvertedFile;
use crate::error::{Error, Result};
use crate::extent::AllocationMap;
use crate::format::OutputFormat;
use crate::image::{self, DiskImage, ReferenceGate};
use crate::layout::{self, LayoutInput};
use crate::storage::{FileStorage, Generation, Storage};

/// One generation of a disk, opened. Files of all formats share its reader and its maps.
pub struct OpenDisk {
    name: String,
    image: Arc<dyn DiskImage>,
    generation: Generation,
    modified: SystemTime,
    seed: [u8; 16],
    maps: Mutex<HashMap<u64, Arc<AllocationMap>>>,
    files: Mutex<HashMap<OutputFormat, Arc<ConvertedFile>>>,
}

impl OpenDisk {
    /// Opens the disk's image file and what it refers to. Reads headers only.
    pub fn open(disk: &CatalogDisk) -> Result<Self> {
        let storage = FileStorage::open(&disk.path)?;
        let modified = storage.modified();
        let generation = storage.generation().clone();
        let seed = seed(&disk.name, storage.file_size(), modified);
        let gate: Arc<dyn ReferenceGate> = Arc::new(AllowedFiles::new(&disk.path, &disk.allowed)?);
        let place = disk.path.display().to_string();
        let image = image::open_image(disk.format, Arc::new(storage), &gate, 0)
            .map_err(|e: Error| e.in_file(place))?;
        Ok(Self {
            name: disk.name.clone(),
            image,
            generation,
            modified,
            seed,
            maps: Mutex::default(),
            files: Mutex::default(),
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
    pub fn file(&self, format: OutputFormat) -> Result<Arc<ConvertedFile>> {
        // The lock is held while a map is made, so that ten openers walk the tables once.
        let mut files = self.files.lock();
        if let Some(file) = files.get(&format) {
            return Ok(Arc::clone(file));
        }
        let input = LayoutInput {
            virtual_size: self.image.virtual_size(),
            seed: self.seed,
            file_name: self.file_name(format),
        };
        let map = match layout::unit_size(format) {
            Some(unit) => self.map(unit)?,
            None => Arc::new(AllocationMap::builder(0, 1).finish()),
        };
        let file = Arc::new(ConvertedFile::with_map(Arc::clone(&self.image), format, &input, map)?);
        files.insert(format, Arc::clone(&file));
        Ok(file)
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
