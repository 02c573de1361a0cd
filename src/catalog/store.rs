//! Where a catalog's files are: what the catalog asks of a directory or of a bucket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::{FileStorage, Generation, Storage};

/// A name at the top of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A file.
    File,
    /// A directory with the names of the files in it.
    Directory(Vec<String>),
}

/// The files that a catalog is made of. Paths are absolute within the store.
pub trait CatalogStore: Send + Sync {
    /// The catalog's directory.
    fn root(&self) -> &Path;

    /// A path as messages name it: a path or a URL.
    fn place(&self, path: &Path) -> String;

    /// The names at the top of the catalog that do not begin with a point, and those in its directories. Reads nothing
    /// but names.
    fn entries(&self) -> Result<BTreeMap<String, Entry>>;

    /// The text of a file of at most `limit` bytes.
    fn read_text(&self, path: &Path, limit: u64) -> Result<String>;

    /// The generation that a file has now, without opening it.
    fn stat(&self, path: &Path) -> Result<Generation>;

    /// Whether a file still has the generation that it had when it was opened.
    fn is_current(&self, path: &Path, opened: &Generation) -> bool;

    /// Opens a file for reading.
    fn open(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Opens a file that an image names: a symbolic link in the last place is refused.
    fn open_reference(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// How old a listing may be. A new image is found at once all the same: what is not listed is looked for.
    fn listing_age(&self) -> Duration;

    /// Whether reading may wait for another machine.
    fn is_remote(&self) -> bool;
}

/// Files of this machine.
#[derive(Debug)]
pub struct LocalFiles {
    root: PathBuf,
}

impl LocalFiles {
    /// The directory `root`, which must be one that can be listed.
    pub fn open(root: &Path) -> Result<Self> {
        let place = || root.display().to_string();
        let root =
            root.canonicalize().map_err(|e| Error::from_io("cannot open the catalog", e).in_file(place()))?;
        if !root.is_dir() {
            return Err(
                Error::new(ErrorKind::NotDirectory, "the catalog is not a directory").in_file(place())
            );
        }
        std::fs::read_dir(&root)
            .map_err(|e| Error::from_io("cannot list the catalog", e).in_file(place()))?;
        Ok(Self { root })
    }

    /// No catalog, but files that are named one by one.
    pub fn anywhere() -> Self {
        Self { root: PathBuf::from("/") }
    }

    /// The names of the regular files in a directory; none where it cannot be read.
    fn files_in(directory: &Path) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
        // Only a link has to be looked at: what others are stands in the directory.
        let is_file = |entry: &std::fs::DirEntry| {
            let kind = entry.file_type();
            kind.is_ok_and(|kind| kind.is_file() || kind.is_symlink() && entry.path().is_file())
        };
        let files = entries.flatten().filter(is_file);
        files.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

impl CatalogStore for LocalFiles {
    fn root(&self) -> &Path {
        &self.root
    }

    fn place(&self, path: &Path) -> String {
        path.display().to_string()
    }

    fn entries(&self) -> Result<BTreeMap<String, Entry>> {
        let failed =
            |e| Error::from_io("cannot list the catalog", e).in_file(self.root.display().to_string());
        let mut entries = BTreeMap::new();
        for entry in std::fs::read_dir(&self.root).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !name.starts_with('.') {
                let path = entry.path();
                let is_directory = path.is_dir();
                entries.insert(
                    name,
                    if is_directory { Entry::Directory(Self::files_in(&path)) } else { Entry::File },
                );
            }
        }
        Ok(entries)
    }

    fn read_text(&self, path: &Path, limit: u64) -> Result<String> {
        let failed = |e| Error::from_io("cannot read", e).in_file(path.display().to_string());
        if std::fs::metadata(path).map_err(failed)?.len() > limit {
            return Err(too_large(limit).in_file(path.display().to_string()));
        }
        std::fs::read_to_string(path).map_err(failed)
    }

    fn stat(&self, path: &Path) -> Result<Generation> {
        FileStorage::stat(path)
    }

    fn is_current(&self, path: &Path, opened: &Generation) -> bool {
        self.stat(path).is_ok_and(|now| now == *opened)
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(FileStorage::open(path)?))
    }

    fn open_reference(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(FileStorage::open_no_follow(path)?))
    }

    fn listing_age(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn is_remote(&self) -> bool {
        false
    }
}

/// The refusal of a document that is too large to be one.
pub(super) fn too_large(limit: u64) -> Error {
    Error::new(ErrorKind::TooLarge, format!("has more than the {limit} bytes that are read"))
}
