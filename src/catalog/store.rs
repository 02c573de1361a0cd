//! Where a catalog's files are: what the catalog asks of a directory or of a bucket.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::storage::{Generation, Storage};

/// A name at the top of a catalog.
#[derive(Clone, Debug)]
pub enum Entry {
    /// Anything but a directory. Who opens it learns whether it is a file.
    File,
    /// A directory with the names of the images' files in it, and perhaps others.
    Directory(Vec<String>),
    /// A link that is not followed, and may be one to a directory.
    Unavailable(Error),
}

/// The files that a catalog is made of. Paths are absolute within the store.
pub trait CatalogStore: Send + Sync {
    /// The catalog's directory.
    fn root(&self) -> &Path;

    /// A path as messages name it: a path or a URL.
    fn place(&self, path: &Path) -> String;

    /// A path that a sidecar or an image names, without `.` and `..`, and by the one name that the store has for it.
    fn canonical(&self, path: &Path) -> PathBuf {
        lexically_normal(path)
    }

    /// Files that one image may have open.
    fn most_files(&self) -> usize {
        usize::MAX
    }

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

    /// How old a listing may be. A new image is found before all the same: what is not listed is looked for.
    fn listing_age(&self) -> Duration;

    /// Whether there may be an image `id` now that was not there when the catalog was listed at `since`, so that it is
    /// worth to list it again. Costs a few system calls, whatever the catalog has, and seldom says so for nothing.
    fn may_have_new(&self, id: &str, since: SystemTime) -> bool;

    /// Whether reading may wait for another machine.
    fn is_remote(&self) -> bool;
}

/// `path` without `.` and with `..` resolved by text alone.
pub(super) fn lexically_normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    normal
}
