//! The catalog: which images there are, what is said of them, and how their files are opened.
//!
//! A catalog is a directory or a bucket. An image is a file with an image's extension, or a directory with such files
//! (its disks), or whatever a sidecar `NAME.toml` beside them lists. Listing reads names and sidecars only.

mod disk;
mod gate;
mod objects;
mod sidecar;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;

pub use disk::{FormatFile, OpenDisk};
pub use gate::AllowedFiles;
pub use objects::BucketFiles;
pub use sidecar::{ImageKind, ImageOrigin, Sidecar};
pub use store::{CatalogStore, Entry, LocalFiles};

use crate::convert::Workspace;
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::format::ImageFormat;
use crate::image::Cancel;
use crate::layout::LayoutOptions;

/// Disks that stay opened, with their tables and maps, when nobody uses them.
const OPEN_DISKS: std::num::NonZeroUsize = std::num::NonZeroUsize::new(64).expect("64 is not 0");

/// One image of the catalog.
#[derive(Clone, Debug)]
pub struct CatalogImage {
    /// The name of its directory in the mount.
    pub id: String,
    /// What its sidecar says; defaults where there is none.
    pub sidecar: Sidecar,
    /// Its disks, the system disk first.
    pub disks: Vec<CatalogDisk>,
    /// Why the image cannot be used although it is listed: a malformed sidecar.
    pub error: Option<Error>,
}

impl CatalogImage {
    /// The disk with that name.
    pub fn disk(&self, name: &str) -> Result<&CatalogDisk> {
        self.disks.iter().find(|d| d.name == name).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("image {} has no disk {}", quoted(&self.id), quoted(name)),
            )
        })
    }
}

/// One disk of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct CatalogDisk {
    /// The stem of its files in the mount: the image's id for the system disk, `ID-data1` … for the others.
    pub name: String,
    /// The image file, in the catalog's store.
    pub path: PathBuf,
    /// Its format, by sidecar or extension.
    pub format: ImageFormat,
    /// Files that it may refer to.
    pub allowed: Vec<PathBuf>,
}

/// The images of a directory or a bucket, and those of their disks that are open.
pub struct Catalog {
    store: Arc<dyn CatalogStore>,
    listed: Mutex<Option<Listed>>,
    open: Mutex<LruCache<PathBuf, OpenedDisk>>,
    workspace: Arc<Workspace>,
    walks: Cancel,
}

/// A listing and when it was made.
type Listed = (Instant, Arc<BTreeMap<String, CatalogImage>>);

/// A disk as the catalog named it, and as it was opened.
type OpenedDisk = (CatalogDisk, Arc<OpenDisk>);

impl Catalog {
    /// The catalog of the directory `root`. Compressed files keep what they computed in memory.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self::new(Arc::new(LocalFiles::open(root)?)))
    }

    /// The catalog of these files.
    pub fn new(store: Arc<dyn CatalogStore>) -> Self {
        Self {
            store,
            listed: Mutex::default(),
            open: Mutex::new(LruCache::new(OPEN_DISKS)),
            workspace: Workspace::in_memory(),
            walks: Cancel::default(),
        }
    }

    /// What gives up walks over the tables of images, now and later.
    pub fn walks(&self) -> Cancel {
        self.walks.clone()
    }

    /// The same catalog, whose compressed files keep what they computed in `workspace`.
    pub fn with_workspace(self, workspace: Arc<Workspace>) -> Self {
        Self { workspace, ..self }
    }

    /// The directory, or the bucket's URL.
    pub fn place(&self) -> String {
        self.store.place(self.store.root())
    }

    /// Whether reading images may wait for another machine.
    pub fn is_remote(&self) -> bool {
        self.store.is_remote()
    }

    /// When a disk was last modified: the newest file of its chain, as far as that was opened, else its image file.
    pub fn modified(&self, disk: &CatalogDisk) -> Result<SystemTime> {
        let own = self.store.stat(&disk.path)?.modified();
        Ok(self.opened(disk).map_or(own, |open| open.modified().max(own)))
    }

    /// All images, by id, as the directory lists them now or did a moment ago.
    pub fn images(&self) -> Result<Arc<BTreeMap<String, CatalogImage>>> {
        let fresh = self
            .listed
            .lock()
            .as_ref()
            .filter(|(at, _)| at.elapsed() < self.store.listing_age())
            .map(|(_, i)| Arc::clone(i));
        match fresh {
            Some(images) => Ok(images),
            None => self.list_again(),
        }
    }

    /// The image with that id; one that is not in a recent listing is looked for again.
    pub fn image(&self, id: &str) -> Result<CatalogImage> {
        if let Some(image) = self.images()?.get(id) {
            return Ok(image.clone());
        }
        let missing = || Error::new(ErrorKind::NotFound, format!("the catalog has no image {}", quoted(id)));
        self.list_again()?.get(id).cloned().ok_or_else(missing)
    }

    fn list_again(&self) -> Result<Arc<BTreeMap<String, CatalogImage>>> {
        let images = self.candidates()?.into_iter().map(|c| c.into_image(&*self.store));
        let images: Arc<BTreeMap<_, _>> = Arc::new(images.map(|i| (i.id.clone(), i)).collect());
        *self.listed.lock() = Some((Instant::now(), Arc::clone(&images)));
        Ok(images)
    }

    /// The disk `disk` opened, or the same opening as long as the names of all files of its chain lead to what was
    /// opened.
    pub fn open_disk(&self, disk: &CatalogDisk) -> Result<Arc<OpenDisk>> {
        if let Some(open) = self.opened(disk)
            && open.is_current(&*self.store)
        {
            return Ok(open);
        }
        let workspace = Arc::clone(&self.workspace);
        let open = OpenDisk::open(&self.store, disk, LayoutOptions::default(), workspace, self.walks())?;
        let open = Arc::new(open);
        self.open.lock().put(disk.path.clone(), (disk.clone(), Arc::clone(&open)));
        Ok(open)
    }

    /// The disk as it was opened last, whatever its files are now.
    fn opened(&self, disk: &CatalogDisk) -> Option<Arc<OpenDisk>> {
        let mut open = self.open.lock();
        open.get(&disk.path).filter(|(known, _)| known == disk).map(|(_, open)| Arc::clone(open))
    }

    /// What the names suggest, before sidecars are read.
    fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut entries = self.store.entries()?;
        entries.retain(|name, _| !name.chars().any(char::is_control));
        let mut found: BTreeMap<String, Candidate> = BTreeMap::new();
        for (name, entry) in &entries {
            if extent_of(name).is_some_and(|whole| entries.contains_key(&whole)) {
                continue;
            }
            let path = self.store.root().join(name);
            if let Entry::Directory(files) = entry {
                let candidate = found.entry(name.clone()).or_insert_with(|| Candidate::new(name));
                candidate.files_within = image_files(&path, files);
                candidate.directory = Some(path);
            } else if let Some((stem, extension)) = name.rsplit_once('.') {
                let candidate = found.entry(stem.to_owned()).or_insert_with(|| Candidate::new(stem));
                if extension.eq_ignore_ascii_case("toml") {
                    candidate.sidecar = Some(path);
                } else if ImageFormat::from_file_name(name).is_some() {
                    candidate.files.push(path);
                }
            }
        }
        Ok(found.into_values().flat_map(Candidate::split).collect())
    }
}

/// The image files among a directory's, sorted by name.
fn image_files(directory: &Path, names: &[String]) -> Vec<PathBuf> {
    let names: BTreeSet<_> = names
        .iter()
        .filter(|name| !name.starts_with('.') && ImageFormat::from_file_name(name).is_some())
        .collect();
    let is_extent = |name: &str| extent_of(name).is_some_and(|whole| names.contains(&whole));
    names.iter().filter(|name| !is_extent(name)).map(|name| directory.join(name)).collect()
}

/// Files that share a stem and so may be one image.
struct Candidate {
    stem: String,
    sidecar: Option<PathBuf>,
    directory: Option<PathBuf>,
    /// The image files in that directory.
    files_within: Vec<PathBuf>,
    /// The image files beside it.
    files: Vec<PathBuf>,
}

impl Candidate {
    fn new(stem: &str) -> Self {
        let stem = stem.to_owned();
        Self { stem, sidecar: None, directory: None, files_within: Vec::new(), files: Vec::new() }
    }

    /// Several image files with one stem are several images, each named by its whole file name.
    fn split(mut self) -> Vec<Self> {
        let files = std::mem::take(&mut self.files);
        let alone = files.len() == 1 && self.directory.is_none();
        let mut all: Vec<Self> = Vec::new();
        for file in files {
            let mut one = Self::new(&self.stem);
            if !alone {
                one.stem = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            } else {
                one.sidecar = self.sidecar.take();
            }
            one.files.push(file);
            all.push(one);
        }
        if self.directory.is_some() || self.sidecar.is_some() {
            all.push(self);
        }
        all.retain(|c| c.sidecar.is_some() || !c.files.is_empty() || !c.files_within.is_empty());
        all
    }

    fn into_image(self, store: &dyn CatalogStore) -> CatalogImage {
        let (sidecar, error) = match self.sidecar.as_deref().map(|path| Sidecar::read(store, path)) {
            None => (Sidecar::default(), None),
            Some(Ok(sidecar)) => (sidecar, None),
            Some(Err(error)) => (Sidecar::default(), Some(error)),
        };
        let id = sidecar.id.clone().unwrap_or_else(|| self.stem.clone());
        let base = self.directory.clone().unwrap_or_else(|| store.root().to_owned());
        let mut image = CatalogImage { id, sidecar, disks: Vec::new(), error };
        let allowed: Vec<_> = image.sidecar.allow.iter().map(|f| base.join(f)).collect();
        let listed = match self.listed_disks(&image.sidecar, &base, store) {
            Ok(listed) => listed,
            Err(error) => {
                image.error.get_or_insert(error);
                Vec::new()
            }
        };
        for (index, (path, format)) in listed.into_iter().enumerate() {
            let name = if index == 0 { image.id.clone() } else { format!("{}-data{index}", image.id) };
            image.disks.push(CatalogDisk { name, path, format, allowed: allowed.clone() });
        }
        image
    }

    /// The disks as (file, format), the system disk first: the sidecar's list, else the files found.
    fn listed_disks(
        &self,
        sidecar: &Sidecar,
        base: &Path,
        store: &dyn CatalogStore,
    ) -> Result<Vec<(PathBuf, ImageFormat)>> {
        let unknown = |path: &Path| {
            Error::new(ErrorKind::Malformed, "neither the sidecar nor the extension tells the disk's format")
                .in_file(store.place(path))
        };
        if !sidecar.disks.is_empty() {
            let listed = sidecar.disks.iter().map(|disk| {
                let path = base.join(&disk.file);
                let format = disk.format.or_else(|| ImageFormat::from_file_name(&disk.file));
                format.ok_or_else(|| unknown(&path)).map(|format| (path, format))
            });
            return listed.collect();
        }
        let mut files = if self.directory.is_some() { self.files_within.clone() } else { self.files.clone() };
        // A directory's system disk is the file named like the directory, or "system", "root" or "disk0"; else the first.
        let is_system = |p: &PathBuf| {
            let stem = p.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            stem == self.stem || ["system", "root", "disk0"].contains(&stem.as_str())
        };
        if let Some(at) = files.iter().position(is_system) {
            let system = files.remove(at);
            files.insert(0, system);
        }
        let with_format = files.into_iter().map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let format = sidecar.format.or_else(|| ImageFormat::from_file_name(&name));
            format.ok_or_else(|| unknown(&path)).map(|format| (path, format))
        });
        with_format.collect()
    }
}

/// The descriptor whose extent a file of that name is by VMware's custom: `NAME-flat.vmdk`, `NAME-s001.vmdk` and
/// `NAME-f001.vmdk` belong to `NAME.vmdk`.
fn extent_of(name: &str) -> Option<String> {
    let (whole, part) = name.strip_suffix(".vmdk")?.rsplit_once('-')?;
    let numbered = part
        .strip_prefix(['s', 'f'])
        .is_some_and(|digits| digits.len() >= 3 && digits.bytes().all(|digit| digit.is_ascii_digit()));
    (part == "flat" || numbered).then(|| format!("{whole}.vmdk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(files: &[(&str, &str)]) -> (tempfile::TempDir, Catalog) {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let catalog = Catalog::open(dir.path()).unwrap();
        (dir, catalog)
    }

    #[test]
    fn files_directories_and_sidecars_become_images() {
        let (_dir, catalog) = catalog(&[
            ("web.qcow2", ""),
            ("web.toml", "name = 'Web'\norigin = 'public'\n"),
            ("db/data.raw", ""),
            ("db/db.qcow2", ""),
            ("db.toml", "allow = ['base.qcow2']"),
            ("same.raw", ""),
            ("same.qcow2", ""),
            ("listed.toml", "id = 'img-1'\n[[disks]]\nfile = 'blob.bin'\nformat = 'raw'\n"),
            ("blob.bin", ""),
            ("notes.txt", ""),
            ("split.vmdk", ""),
            ("split-s001.vmdk", ""),
            ("split-flat.vmdk", ""),
            ("alone-flat.vmdk", ""),
            ("dir/root.vmdk", ""),
            ("dir/root-f002.vmdk", ""),
            (".hidden.raw", ""),
            ("empty/readme", ""),
        ]);
        let images = catalog.images().unwrap();
        let ids: Vec<_> = images.keys().map(String::as_str).collect();
        assert_eq!(ids, ["alone-flat", "db", "dir", "img-1", "same.qcow2", "same.raw", "split", "web"]);
        assert_eq!(images["web"].sidecar.name.as_deref(), Some("Web"));
        assert_eq!(images["web"].sidecar.origin, ImageOrigin::Public);
        let names: Vec<_> = images["db"].disks.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["db", "db-data1"]);
        assert!(images["db"].disks[0].path.ends_with("db/db.qcow2"));
        assert!(images["db"].disks[0].allowed[0].ends_with("db/base.qcow2"));
        assert_eq!(images["img-1"].disks[0].format, ImageFormat::Raw);
        assert_eq!(images["dir"].disks.len(), 1);
    }

    #[test]
    fn a_malformed_sidecar_is_an_error_of_its_image_only() {
        let (_dir, catalog) = catalog(&[("a.raw", ""), ("a.toml", "colour = 'red'"), ("b.raw", "")]);
        let images = catalog.images().unwrap();
        let error = images["a"].error.as_ref().unwrap().report();
        assert!(error.contains("a.toml") && error.contains("colour"), "{error}");
        assert!(images["b"].error.is_none());
    }

    #[test]
    fn an_open_disk_is_shared_until_its_file_changes() {
        let (dir, catalog) = catalog(&[("a.raw", "0123456789")]);
        let image = catalog.image("a").unwrap();
        let first = catalog.open_disk(&image.disks[0]).unwrap();
        assert!(Arc::ptr_eq(&first, &catalog.open_disk(&image.disks[0]).unwrap()));
        std::fs::write(dir.path().join("a.raw"), "changed and longer").unwrap();
        let second = catalog.open_disk(&image.disks[0]).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(first.verify_unchanged().unwrap_err().kind(), ErrorKind::SourceChanged);
        assert_ne!(first.generation(), second.generation());
    }
}
