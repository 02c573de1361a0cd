//! Inodes: numbers for places in the tree, stable over mounts, remembered while the kernel knows them.

use std::collections::HashMap;
use std::fmt;

use md5::{Digest, Md5};
use parking_lot::RwLock;

use crate::bucket::ObjectKey;
use crate::error::{Error, ErrorKind, Result};
use crate::format::OutputFormat;

/// An inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

/// The root directory's number, fixed by the kernel's protocol (FUSE_ROOT_ID in linux/fuse.h).
pub const ROOT_INO: Ino = Ino(1);

/// A file of `.freightfs/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ControlFile {
    Version,
    Config,
    Metrics,
}

impl ControlFile {
    pub(super) const ALL: [Self; 3] = [Self::Version, Self::Config, Self::Metrics];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Config => "config",
            Self::Metrics => "metrics",
        }
    }
}

/// A place in the tree.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Root,
    Images,
    Image {
        id: String,
    },
    ImageJson {
        id: String,
    },
    ImageFile {
        id: String,
        disk: String,
        format: OutputFormat,
    },
    Buckets,
    /// A bucket's root or a directory in it.
    Directory {
        bucket: String,
        prefix: Option<ObjectKey>,
    },
    Object {
        bucket: String,
        key: ObjectKey,
    },
    Jobs,
    Job {
        id: String,
    },
    Control,
    ControlFile(ControlFile),
}

/// The node's path in the mount; a directory of a bucket ends with `/`, because an object may have the same key.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("/"),
            Self::Images => f.write_str("/images"),
            Self::Image { id } => write!(f, "/images/{id}"),
            Self::ImageJson { id } => write!(f, "/images/{id}/image.json"),
            Self::ImageFile { id, disk, format } => write!(f, "/images/{id}/{disk}.{}", format.suffix()),
            Self::Buckets => f.write_str("/buckets"),
            Self::Directory { bucket, prefix: None } => write!(f, "/buckets/{bucket}/"),
            Self::Directory { bucket, prefix: Some(prefix) } => write!(f, "/buckets/{bucket}/{prefix}/"),
            Self::Object { bucket, key } => write!(f, "/buckets/{bucket}/{key}"),
            Self::Jobs => f.write_str("/jobs"),
            Self::Job { id } => write!(f, "/jobs/{id}.json"),
            Self::Control => f.write_str("/.freightfs"),
            Self::ControlFile(file) => write!(f, "/.freightfs/{}", file.name()),
        }
    }
}

/// The nodes that the kernel knows, by number.
pub(super) struct InodeTable {
    known: RwLock<HashMap<Ino, Known>>,
}

struct Known {
    node: Node,
    lookups: u64,
}

impl InodeTable {
    pub(super) fn new() -> Self {
        let root = Known { node: Node::Root, lookups: 1 };
        Self { known: RwLock::new(HashMap::from([(ROOT_INO, root)])) }
    }

    /// The node's number: a hash of its path, so that it is the same in every mount. In the unlikely case that
    /// two known nodes share a hash, the later one takes the next free number.
    pub(super) fn number(&self, node: &Node) -> Ino {
        if *node == Node::Root {
            return ROOT_INO;
        }
        let digest = Md5::digest(node.to_string().as_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        // 0 is no inode, 1 is the root.
        let mut ino = Ino((u64::from_le_bytes(bytes) >> 1).max(2));
        let known = self.known.read();
        while known.get(&ino).is_some_and(|other| other.node != *node) {
            ino = Ino(ino.0 + 1);
        }
        ino
    }

    /// The node of a number that the kernel has looked up.
    pub(super) fn node(&self, ino: Ino) -> Result<Node> {
        let known = self.known.read();
        let missing = || Error::new(ErrorKind::SourceChanged, format!("inode {} is not known", ino.0));
        known.get(&ino).map(|k| k.node.clone()).ok_or_else(missing)
    }

    /// Counts a lookup of the kernel; it will forget as many.
    pub(super) fn remember(&self, ino: Ino, node: Node) {
        let mut known = self.known.write();
        known.entry(ino).or_insert(Known { node, lookups: 0 }).lookups += 1;
    }

    /// Takes back `lookups`; a node without any is dropped.
    pub(super) fn forget(&self, ino: Ino, lookups: u64) {
        let mut known = self.known.write();
        if let Some(entry) = known.get_mut(&ino) {
            entry.lookups = entry.lookups.saturating_sub(lookups);
            if entry.lookups == 0 && ino != ROOT_INO {
                known.remove(&ino);
            }
        }
    }

    /// The kernel keeps its number when a file is renamed: the numbers that stood for a node stand for another now.
    pub(super) fn rename(&self, from: &Node, to: &Node) {
        for entry in self.known.write().values_mut().filter(|entry| entry.node == *from) {
            entry.node = to.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_stable_and_forgotten() {
        let node = Node::Image { id: "web".into() };
        let (a, b) = (InodeTable::new(), InodeTable::new());
        let ino = a.number(&node);
        assert_eq!(ino, b.number(&node));
        a.remember(ino, node.clone());
        a.remember(ino, node.clone());
        a.forget(ino, 1);
        assert_eq!(a.node(ino).unwrap(), node);
        a.forget(ino, 1);
        assert!(a.node(ino).is_err());
        a.forget(ROOT_INO, 100);
        assert_eq!(a.node(ROOT_INO).unwrap(), Node::Root);
    }

    #[test]
    fn a_number_follows_its_file_through_renames() {
        let table = InodeTable::new();
        let node = |id: &str| Node::Image { id: id.into() };
        let ino = table.number(&node("a"));
        table.remember(ino, node("a"));
        table.rename(&node("a"), &node("b"));
        table.rename(&node("b"), &node("c"));
        assert_eq!(table.node(ino).unwrap(), node("c"));
        assert_ne!(table.number(&node("a")), ino, "a new file under the old name is another file");
    }

    #[test]
    fn a_taken_number_is_passed_over() {
        let table = InodeTable::new();
        let node = Node::Image { id: "web".into() };
        let ino = table.number(&node);
        table.remember(ino, Node::Jobs);
        assert_eq!(table.number(&node), Ino(ino.0 + 1));
    }
}
