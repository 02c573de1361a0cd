//! Inodes: numbers for places in the tree, stable over mounts, remembered while the kernel knows them.

use std::collections::HashMap;
use std::fmt;

use md5::{Digest, Md5};
use parking_lot::RwLock;

use crate::bucket::ObjectKey;
use crate::error::{Error, ErrorKind, Result};
use crate::export::sidecars::Sidecar;
use crate::format::OutputFormat;

/// An inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

/// A number for an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

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

/// What the numbers of objects end with; those of their sidecars end with less.
const OBJECT_RANK: u64 = 3;

/// The nodes that the kernel knows, by number.
///
/// A number is a file's, not a name's: it goes with a file that is renamed, and stays with one that was removed as long
/// as the kernel knows it. What gets the name then is another file with another number, or, when the kernel has forgotten
/// the old one, with the same number and another generation. No number is given twice with one generation.
pub(super) struct InodeTable {
    table: RwLock<Table>,
}

struct Table {
    by_number: HashMap<Ino, Known>,
    by_node: HashMap<Node, Ino>,
    /// What a number gets that the kernel learns now.
    generation: u64,
}

struct Known {
    /// `None` when nothing has a name any more that leads here.
    node: Option<Node>,
    lookups: u64,
    generation: u64,
}

impl InodeTable {
    pub(super) fn new() -> Self {
        let root = Known { node: Some(Node::Root), lookups: 1, generation: 0 };
        let by_number = HashMap::from([(ROOT_INO, root)]);
        let by_node = HashMap::from([(Node::Root, ROOT_INO)]);
        Self { table: RwLock::new(Table { by_number, by_node, generation: 0 }) }
    }

    /// The number and generation that the node has, or would get now.
    pub(super) fn number(&self, node: &Node) -> (Ino, u64) {
        self.table.read().number(node)
    }

    /// The node of a number that the kernel has looked up; `None` when it has no name any more.
    ///
    /// # Errors
    /// [`SourceChanged`](ErrorKind::SourceChanged) when the kernel cannot know it.
    pub(super) fn find(&self, ino: Ino) -> Result<Option<Node>> {
        let missing = || Error::new(ErrorKind::SourceChanged, format!("inode {} is not known", ino.0));
        self.table.read().by_number.get(&ino).map(|known| known.node.clone()).ok_or_else(missing)
    }

    /// The node of a number that the kernel has looked up, and that still has a name.
    pub(super) fn node(&self, ino: Ino) -> Result<Node> {
        let gone = || Error::new(ErrorKind::SourceChanged, format!("inode {} was removed", ino.0));
        self.find(ino)?.ok_or_else(gone)
    }

    /// Counts a lookup of the kernel; it will forget as many.
    pub(super) fn remember(&self, node: Node) -> (Ino, u64) {
        let mut table = self.table.write();
        let (ino, generation) = table.number(&node);
        table.by_node.insert(node.clone(), ino);
        let new = Known { node: Some(node), lookups: 0, generation };
        table.by_number.entry(ino).or_insert(new).lookups += 1;
        (ino, generation)
    }

    /// Takes back `lookups`; a node without any is dropped.
    pub(super) fn forget(&self, ino: Ino, lookups: u64) {
        let mut table = self.table.write();
        let Some(known) = table.by_number.get_mut(&ino) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && ino != ROOT_INO
            && let Some(Known { node: Some(node), .. }) = table.by_number.remove(&ino)
        {
            table.by_node.remove(&node);
        }
    }

    /// The node's name is gone. Returns the number that stays with what had it, if the kernel knows it.
    pub(super) fn unlink(&self, node: &Node) -> Option<Ino> {
        self.table.write().unlink(node)
    }

    /// What had the name `from` has the name `to`, and what had that has none. Returns the number of the latter.
    pub(super) fn rename(&self, from: &Node, to: &Node) -> Option<Ino> {
        let mut table = self.table.write();
        let replaced = table.unlink(to);
        if let Some(ino) = table.by_node.remove(from) {
            if let Some(known) = table.by_number.get_mut(&ino) {
                known.node = Some(to.clone());
            }
            table.by_node.insert(to.clone(), ino);
        }
        replaced
    }
}

impl Table {
    /// A hash of the path, so that it is the same in every mount; the next free number where another file has it. cp -r
    /// copies a directory's files by their numbers: those of an object's sidecars come just before its own, because a copy
    /// of the object makes new ones.
    fn number(&self, node: &Node) -> (Ino, u64) {
        if let Some(ino) = self.by_node.get(node) {
            return (*ino, self.by_number.get(ino).map_or(self.generation, |known| known.generation));
        }
        let (path, rank) = match node {
            Node::Object { bucket, key } => match Sidecar::parse(key) {
                Some((key, sidecar)) => {
                    (Node::Object { bucket: bucket.clone(), key }.to_string(), sidecar as u64)
                }
                None => (node.to_string(), OBJECT_RANK),
            },
            _ => (node.to_string(), 0),
        };
        let digest = Md5::digest(path.as_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        // 0 is no inode, 1 is the root.
        let hash = u64::from_le_bytes(bytes) >> 1 & !OBJECT_RANK;
        let mut ino = Ino(hash.max(OBJECT_RANK + 1) | rank);
        while self.by_number.contains_key(&ino) {
            ino = Ino(ino.0 + 1);
        }
        (ino, self.generation)
    }

    fn unlink(&mut self, node: &Node) -> Option<Ino> {
        self.generation += 1;
        let ino = self.by_node.remove(node)?;
        if let Some(known) = self.by_number.get_mut(&ino) {
            known.node = None;
        }
        Some(ino)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> Node {
        Node::Image { id: id.into() }
    }

    #[test]
    fn numbers_are_stable_and_forgotten() {
        let (a, b) = (InodeTable::new(), InodeTable::new());
        let (ino, _) = a.remember(node("web"));
        assert_eq!(ino, b.number(&node("web")).0);
        a.remember(node("web"));
        a.forget(ino, 1);
        assert_eq!(a.node(ino).unwrap(), node("web"));
        a.forget(ino, 1);
        assert!(a.node(ino).is_err());
        a.forget(ROOT_INO, 100);
        assert_eq!(a.node(ROOT_INO).unwrap(), Node::Root);
    }

    #[test]
    fn sidecars_have_the_numbers_before_their_objects() {
        let table = InodeTable::new();
        let number = |key: &str| {
            let node = Node::Object { bucket: "b".into(), key: ObjectKey::parse(key).unwrap() };
            table.number(&node).0.0
        };
        for object in ["k.vhd", "d/k.raw", "notes"] {
            let own = number(object);
            let mut sidecars =
                [".status", ".md5", ".sha256"].map(|suffix| number(&format!("{object}{suffix}")));
            sidecars.sort_unstable();
            assert_eq!(sidecars, [own - 3, own - 2, own - 1]);
        }
    }

    #[test]
    fn a_number_follows_its_file_through_renames() {
        let table = InodeTable::new();
        let (ino, _) = table.remember(node("a"));
        table.rename(&node("a"), &node("b"));
        table.rename(&node("b"), &node("c"));
        assert_eq!(table.node(ino).unwrap(), node("c"));
        assert_eq!(table.number(&node("c")).0, ino, "the name leads to the file that has it");
        assert_ne!(table.number(&node("a")).0, ino, "a new file under the old name is another file");
    }

    #[test]
    fn no_number_is_given_twice_with_one_generation() {
        let table = InodeTable::new();
        let mut given = std::collections::HashSet::new();
        let first = table.remember(node("a"));
        assert!(given.insert(first));
        // Removed and still open: the new file has another number.
        assert_eq!(table.unlink(&node("a")), Some(first.0));
        assert_eq!(table.find(first.0).unwrap(), None);
        let second = table.remember(node("a"));
        assert!(given.insert(second) && second.0 != first.0);
        // Forgotten by the kernel: the number comes again, in another generation.
        table.forget(first.0, 1);
        table.unlink(&node("a"));
        table.forget(second.0, 1);
        let third = table.remember(node("a"));
        assert!(given.insert(third) && third.0 == first.0);
        // Replaced by a rename, and the renamed file's own old name taken again.
        table.remember(node("b"));
        assert_eq!(table.rename(&node("b"), &node("a")), Some(third.0));
        assert!(given.insert(table.remember(node("b"))));
        table.forget(third.0, 1);
        table.unlink(&node("a"));
        assert!(given.insert(table.remember(node("a"))));
    }
}
