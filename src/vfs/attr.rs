//! Attributes of files and directories.

use std::time::{Duration, SystemTime};

use super::Vfs;
use super::inode::Ino;
use crate::vfile::VirtualFile;
use crate::vfs::inode::Node;

/// How long the kernel may keep names and attributes that change rarely.
const TTL: Duration = Duration::from_secs(1);

/// A file or a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
}

/// What stat shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Attr {
    /// Inode number: the file's own, which goes with it when it is renamed. The first file of a path in a mount has the
    /// same number in every mount.
    pub ino: Ino,
    /// Tells files apart that had the same number one after the other.
    pub generation: u64,
    /// File or directory.
    pub kind: NodeKind,
    /// Bytes in the file; 0 for directories.
    pub file_size: u64,
    /// Names: 0 for a file that was removed and is still open.
    pub nlink: u32,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When the content last changed.
    pub modified: SystemTime,
    /// When content or attributes last changed.
    pub changed: SystemTime,
    /// How long these attributes and the name that led to them may be kept.
    pub ttl: Duration,
}

/// What setattr changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttrChange {
    /// Permission bits.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes in the file.
    pub file_size: Option<u64>,
    /// When the content last changed.
    pub modified: Option<SystemTime>,
}

impl Vfs {
    /// Attributes of a directory that changed at `modified`.
    pub(super) fn directory_attr(&self, node: &Node, modified: SystemTime) -> Attr {
        self.attr(node, NodeKind::Directory, 0, 0o755, modified, TTL)
    }

    /// Attributes of a file whose content only changes under another modification time.
    pub(super) fn file_attr(&self, node: &Node, file_size: u64, mode: u16, modified: SystemTime) -> Attr {
        self.attr(node, NodeKind::File, file_size, mode, modified, TTL)
    }

    /// Attributes of a computed file. As long as its size is not known, the largest one is shown and must not be
    /// kept.
    pub(super) fn virtual_file_attr(
        &self,
        node: &Node,
        file: &dyn VirtualFile,
        modified: SystemTime,
    ) -> Attr {
        let ttl = if file.known_size().is_some() { TTL } else { Duration::ZERO };
        self.attr(node, NodeKind::File, file.file_size(), 0o644, modified, ttl)
    }

    /// Attributes of a file that is made anew at each open, and so must not be kept.
    pub(super) fn live_file_attr(&self, node: &Node, file_size: u64, modified: SystemTime) -> Attr {
        self.attr(node, NodeKind::File, file_size, 0o444, modified, Duration::ZERO)
    }

    fn attr(
        &self,
        node: &Node,
        kind: NodeKind,
        file_size: u64,
        mode: u16,
        modified: SystemTime,
        ttl: Duration,
    ) -> Attr {
        let settings = &self.settings;
        let (ino, generation) = self.inodes.number(node);
        Attr {
            ino,
            generation,
            nlink: if kind == NodeKind::Directory { 2 } else { 1 },
            kind,
            file_size,
            mode: mode & !settings.umask,
            uid: settings.uid,
            gid: settings.gid,
            modified,
            changed: modified,
            ttl,
        }
    }
}
