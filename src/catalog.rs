//! The catalog: which images there are, what is said of them, and how their files are opened.
//!
//! A catalog is a directory or a bucket. An image is a file with an image's extension, or a directory with such files
//! (its disks), or whatever a sidecar `NAME.toml` beside them lists. Listing reads names and sidecars only.

mod candidate;
mod disk;
mod gate;
mod local_files;
mod objects;
mod sidecar;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use lru::LruCache;
use parking_lot::Mutex;

pub use disk::{FormatFile, OpenDisk};
pub use gate::AllowedFiles;
pub use local_files::LocalFiles;
pub use objects::BucketFiles;
pub use sidecar::{ImageKind, ImageOrigin, Sidecar};
pub use store::{CatalogStore, Entry};

use crate::convert::Workspace;
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::format::ImageFormat;
use crate::image::Cancel;
use crate::layout::LayoutOptions;

/// Disks that stay opened, with their tables and maps, when nobody uses them.
const OPEN_DISKS: std::num::NonZeroUsize = std::num::NonZeroUsize::new(64).expect("64 is not 0");

/// Files that these have open together, and bytes of their maps. The disk that was used last stays, whatever it has.
const OPEN_FILES: usize = 1024;
const OPEN_MAPS: usize = 256 << 20;

/// One image of the catalog.
#[derive(Clone, Debug)]
pub struct CatalogImage {
    /// The name of its directory in the mount.
    pub id: String,
    /// What its sidecar says; defaults where there is none.
    pub sidecar: Arc<Sidecar>,
    /// Its disks, the system disk first.
    pub disks: Vec<CatalogDisk>,
    /// Why the image cannot be used although it is listed: a malformed sidecar, an id that another image has too, a
    /// directory that leads out of the catalog.
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
    pub allowed: Arc<[PathBuf]>,
}

/// The images of a directory or a bucket, and those of their disks that are open.
pub struct Catalog {
    store: Arc<dyn CatalogStore>,
    listed: Mutex<Option<Listed>>,
    /// Held by who lists, with what sidecars claimed the last time. Others wait for that listing, as they would for one of
    /// their own.
    listing: Mutex<candidate::Claims>,
    open: Mutex<LruCache<PathBuf, OpenedDisk>>,
    workspace: Arc<Workspace>,
    walks: Cancel,
}

/// Images by their ids.
type Images = BTreeMap<String, Arc<CatalogImage>>;

/// A listing that ended, well or not, and when it was begun.
struct Listed {
    begun: Instant,
    since: SystemTime,
    images: Result<Arc<Images>>,
}

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
            listing: Mutex::default(),
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
    pub fn images(&self) -> Result<Arc<Images>> {
        Ok(self.listed()?.0)
    }

    /// The images, and when they were listed.
    fn listed(&self) -> Result<(Arc<Images>, SystemTime)> {
        let asked = Instant::now();
        if let Some(Listed { begun, since, images: Ok(images) }) = &*self.listed.lock()
            && begun.elapsed() < self.store.listing_age()
        {
            return Ok((Arc::clone(images), *since));
        }
        self.list(asked)
    }

    /// The image with that id. One that is not in a recent listing is looked for again when it may be new, so that names
    /// that are not there cost no listing each.
    pub fn image(&self, id: &str) -> Result<Arc<CatalogImage>> {
        let asked = Instant::now();
        let (images, since) = self.listed()?;
        if let Some(image) = images.get(id) {
            return Ok(Arc::clone(image));
        }
        let missing = || Error::new(ErrorKind::NotFound, format!("the catalog has no image {}", quoted(id)));
        if !self.store.may_have_new(id, since) {
            return Err(missing());
        }
        self.list(asked)?.0.get(id).cloned().ok_or_else(missing)
    }

    /// The outcome of a listing that was begun at `asked` or later: however many ask at once, one of them lists for the
    /// others, and a store that does not answer is waited for once.
    fn list(&self, asked: Instant) -> Result<(Arc<Images>, SystemTime)> {
        let mut listing = self.listing.lock();
        let known = |listed: &Listed| (listed.begun >= asked).then(|| (listed.images.clone(), listed.since));
        let known = self.listed.lock().as_ref().and_then(known);
        let (images, since) = match known {
            Some(known) => known,
            None => {
                let (begun, since) = (Instant::now(), SystemTime::now());
                let images = candidate::list(&*self.store, &mut listing).map(Arc::new);
                *self.listed.lock() = Some(Listed { begun, since, images: images.clone() });
                (images, since)
            }
        };
        Ok((images?, since))
    }

    /// The disk `disk` opened, or the same opening as long as the names of all files of its chain lead to what was
    /// opened.
    pub fn open_disk(&self, disk: &CatalogDisk) -> Result<Arc<OpenDisk>> {
        if let Some(open) = self.opened(disk)
            && open.is_current(&*self.store)
        {
            return Ok(open);
        }
        let mut opened = self.open_anew(disk);
        // Others, which nobody uses, may have the descriptors.
        while opened.as_ref().is_err_and(|e| e.kind() == ErrorKind::Busy)
            && self.open.lock().pop_lru().is_some()
        {
            opened = self.open_anew(disk);
        }
        let open = Arc::new(opened?);
        self.keep(disk, &open);
        Ok(open)
    }

    fn open_anew(&self, disk: &CatalogDisk) -> Result<OpenDisk> {
        let workspace = Arc::clone(&self.workspace);
        OpenDisk::open(&self.store, disk, LayoutOptions::default(), workspace, self.walks())
    }

    /// Keeps a disk open for whoever comes next, and closes those that were used least recently where they are too many.
    fn keep(&self, disk: &CatalogDisk, opened: &Arc<OpenDisk>) {
        let mut open = self.open.lock();
        open.put(disk.path.clone(), (disk.clone(), Arc::clone(opened)));
        let sum = |open: &LruCache<_, OpenedDisk>, of: fn(&OpenDisk) -> usize| {
            open.iter().map(|(_, (_, disk))| of(disk)).sum::<usize>()
        };
        while open.len() > 1
            && (sum(&open, OpenDisk::files) > OPEN_FILES || sum(&open, OpenDisk::memory) > OPEN_MAPS)
        {
            open.pop_lru();
        }
    }

    /// The disk as it was opened last, whatever its files are now.
    fn opened(&self, disk: &CatalogDisk) -> Option<Arc<OpenDisk>> {
        let mut open = self.open.lock();
        open.get(&disk.path).filter(|(known, _)| known == disk).map(|(_, open)| Arc::clone(open))
    }
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

    /// The ids, and of each whether it is encrypted or why it cannot be used.
    fn told(catalog: &Catalog) -> Vec<String> {
        let told = |image: &Arc<CatalogImage>| match &image.error {
            None => format!("{} {}", image.id, image.sidecar.encrypted),
            Some(error) => format!("{} {}", image.id, error.kind().code()),
        };
        catalog.images().unwrap().values().map(told).collect()
    }

    #[test]
    fn a_file_that_is_added_takes_no_sidecar_from_those_that_were_there() {
        let secret = ("web.toml", "encrypted = true\n");
        for (added, expected) in [
            ("other.raw", vec!["other false", "web true"]),
            ("web.raw", vec!["web.qcow2 true", "web.raw true"]),
            ("web.vmdk", vec!["web.qcow2 true", "web.vmdk true"]),
            ("web.QCOW2", vec!["web.QCOW2 true", "web.qcow2 true"]),
            ("web/notes.txt", vec!["web true"]),
            ("web/x/y", vec!["web true"]),
            ("web/disk.raw", vec!["web true", "web.qcow2 true"]),
            ("web.TOML", vec!["web malformed"]),
            ("web-flat.vmdk", vec!["web true", "web-flat false"]),
        ] {
            let (_dir, catalog) = catalog(&[secret, ("web.qcow2", ""), (added, "")]);
            assert_eq!(told(&catalog), expected, "{added}");
        }
        let named = "id = 'img'\nencrypted = true\n";
        let (_dir, one) = catalog(&[("web.toml", named), ("web.qcow2", ""), ("web.raw", "")]);
        assert_eq!(told(&one), ["img.qcow2 true", "img.raw true"]);
        // Two say that they are it: nobody knows which one is meant.
        let (_dir, two) = catalog(&[("a.toml", "id = 'web'"), ("a.raw", ""), ("web.raw", ""), secret]);
        assert_eq!(told(&two), ["web malformed"]);
        let reason = two.image("web").unwrap().error.as_ref().unwrap().report();
        assert!(reason.contains("a.toml") && reason.contains("web.toml"), "{reason}");
    }

    #[test]
    fn a_disk_that_a_sidecar_lists_is_no_image_of_its_own() {
        let machine = "encrypted = true\ndisks = [{ file = 'root.qcow2' }, { file = './data/1.raw' }]\n";
        let (_dir, catalog) = catalog(&[
            ("machine.toml", machine),
            ("machine.raw", ""),
            ("root.qcow2", ""),
            ("data/1.raw", ""),
            ("data/2.raw", ""),
            ("only/1.raw", ""),
        ]);
        assert_eq!(told(&catalog), ["data false", "machine true", "only false"]);
        let disks = |id: &str| {
            let image = catalog.image(id).unwrap();
            image.disks.iter().map(|disk| disk.path.file_name().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(disks("machine"), ["root.qcow2", "1.raw"]);
        assert_eq!(disks("data"), ["2.raw"]);
    }

    #[test]
    fn what_is_added_beside_a_sidecar_frees_none_of_its_disks() {
        let machine = ("machine.toml", "encrypted = true\ndisks = [{ file = 'root.qcow2' }]\n");
        for (added, text, expected) in [
            ("machine/x/y", "", "machine true"),
            ("machine/other.raw", "", "machine true"),
            ("machine/root.qcow2", "", "machine malformed"),
            ("machine.TOML", "", "machine malformed"),
            ("machine.TOML", "= broken", "machine malformed"),
        ] {
            let (_dir, catalog) = catalog(&[machine, ("root.qcow2", ""), (added, text)]);
            assert_eq!(told(&catalog), [expected], "{added} {text:?}");
        }
        // One that cannot be read, whatever is wrong with it.
        let huge = format!("{}# {}", machine.1, "x".repeat(1 << 20));
        for broken in [
            "disks = [{ file = 'root.qcow2' }]\ncolour = 1",
            "encrypted = true\ndisks = [{ file = 'root.qcow2'",
            &huge,
        ] {
            let (dir, catalog) = catalog(&[machine, ("root.qcow2", "")]);
            assert_eq!(told(&catalog), ["machine true"]);
            std::fs::write(dir.path().join("machine.toml"), broken).unwrap();
            *catalog.listed.lock() = None;
            let error = told(&catalog);
            assert!(
                ["machine malformed", "machine too_large"].contains(&error[0].as_str()) && error.len() == 1,
                "{error:?}"
            );
        }
        let (_dir, first) =
            catalog(&[("machine.toml", "disks = [{ file = 'root.qcow2'"), ("root.qcow2", "")]);
        assert_eq!(told(&first), ["machine malformed"]);
    }

    #[test]
    fn files_are_known_by_the_name_that_the_catalog_was_given_too() {
        let (dir, _) = catalog(&[("root.qcow2", "")]);
        let link = dir.path().join("link");
        std::fs::create_dir(dir.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        let named = link.join("root.qcow2").display().to_string();
        std::fs::write(link.join("root.qcow2"), "").unwrap();
        std::fs::write(
            link.join("machine.toml"),
            format!("encrypted = true\ndisks = [{{ file = {named:?} }}]"),
        )
        .unwrap();
        assert_eq!(told(&Catalog::open(&link).unwrap()), ["machine true"]);
    }

    #[test]
    fn what_a_sidecar_and_a_directory_have_is_bounded() {
        let list = |key: &str, one: &str, count: usize| format!("{key} = [{}]\n", vec![one; count].join(","));
        let disks = |count| list("disks", "{file='a.raw'}", count);
        for (text, reason) in [
            (
                list("allow", "'a'", 100_000) + &disks(26_000),
                "disks has 26000 entries; an image has at most 256",
            ),
            (disks(256) + &list("allow", "'a'", 8193), "allow has 8193 entries; an image has at most 8192"),
            (
                format!("[tags]\na = '{}'\n", "x".repeat(1025)),
                "has 1025 bytes; a word of a sidecar has at most 1024",
            ),
            (format!("name = '{}'\n", "x".repeat(1 << 20)), "more than the 1048576 bytes"),
        ] {
            let (_dir, catalog) = catalog(&[("a.raw", ""), ("a.toml", &text)]);
            let error = catalog.image("a").unwrap().error.clone().unwrap();
            assert_eq!(error.kind(), ErrorKind::TooLarge);
            assert!(
                error.report().contains("/a.toml: ") && error.report().contains(reason),
                "{}",
                error.report()
            );
        }
        let (_dir, most) = catalog(&[("a.raw", ""), ("a.toml", &(disks(256) + &list("allow", "'a'", 8192)))]);
        let image = most.image("a").unwrap();
        assert_eq!((image.disks.len(), image.error.is_none()), (256, true));
        assert!(image.disks.iter().all(|disk| Arc::ptr_eq(&disk.allowed, &image.disks[0].allowed)));
        let names: Vec<_> = (0..257).map(|number| format!("many/{number}.raw")).collect();
        let (_dir, many) = catalog(&names.iter().map(|name| (name.as_str(), "")).collect::<Vec<_>>());
        let error = many.image("many").unwrap().error.clone().unwrap();
        assert!(error.report().contains("/many: has 257 image files"), "{}", error.report());
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
