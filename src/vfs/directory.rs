//! Open directories, read page by page.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::Vfs;
use super::attr::NodeKind;
use super::inode::{Ino, Node};
use super::tree::DirectoryEntry;
use crate::bucket::ObjectKey;
use crate::error::Result;
use crate::export::sidecars::Sidecar;

/// A directory as it is being read: names are held from the page that is read on, not all of them.
pub(super) struct OpenDirectory {
    ino: Ino,
    reading: tokio::sync::Mutex<Reading>,
}

struct Reading {
    /// The number of the first name in `names`.
    first: u64,
    names: VecDeque<DirectoryEntry>,
    rest: Option<Rest>,
}

/// The pages of a bucket's directory that have not been read.
struct Rest {
    bucket: String,
    prefix: Option<ObjectKey>,
    page: Option<String>,
    /// Names that are being made in the mount, which have been given already.
    given: HashSet<String>,
}

impl Vfs {
    /// Begins to read a directory. Its first names are found out now, so that a bucket that cannot be listed is told here.
    pub(super) async fn directory(self: &Arc<Self>, ino: Ino) -> Result<OpenDirectory> {
        Ok(OpenDirectory { ino, reading: tokio::sync::Mutex::new(self.begin_reading(ino).await?) })
    }

    /// Gives the names of a directory from number `from` on, until `take` says that it is full. Number 0 begins anew with
    /// what there is then.
    pub(super) async fn read_names(
        self: &Arc<Self>,
        directory: &OpenDirectory,
        from: u64,
        mut take: impl FnMut(u64, &DirectoryEntry) -> bool + Send,
    ) -> Result<()> {
        let mut reading = directory.reading.lock().await;
        if from < reading.first {
            *reading = self.begin_reading(directory.ino).await?;
        }
        let mut number = from;
        loop {
            while number >= reading.first + reading.names.len() as u64 {
                // Only a reader that goes back needs them again.
                reading.first += reading.names.len() as u64;
                reading.names.clear();
                if !self.read_page(&mut reading).await? {
                    return Ok(());
                }
            }
            let entry = &reading.names[(number - reading.first) as usize];
            if take(number, entry) {
                return Ok(());
            }
            number += 1;
        }
    }

    /// Whether nothing is in a directory of a bucket.
    pub(super) async fn is_empty_directory(
        self: &Arc<Self>,
        bucket: &str,
        prefix: &ObjectKey,
    ) -> Result<bool> {
        let mut reading = self.begin_bucket(bucket, Some(prefix))?;
        while reading.names.is_empty() && self.read_page(&mut reading).await? {}
        Ok(reading.names.is_empty())
    }

    async fn begin_reading(self: &Arc<Self>, ino: Ino) -> Result<Reading> {
        let names = match self.inodes.node(ino)? {
            Node::Directory { bucket, prefix } => {
                let mut reading = self.begin_bucket(&bucket, prefix.as_ref())?;
                self.read_page(&mut reading).await?;
                return Ok(reading);
            }
            node => self.fixed_entries(node).await?,
        };
        Ok(Reading { first: 0, names: self.numbered(names).collect(), rest: None })
    }

    /// A bucket's directory with what is being made in it, before any page of the store's listing.
    fn begin_bucket(&self, bucket: &str, prefix: Option<&ObjectKey>) -> Result<Reading> {
        let made = self.entries_being_made(bucket, prefix)?;
        let given = made.iter().map(|(_, name, _)| name.clone()).collect();
        let rest = Rest { bucket: bucket.to_owned(), prefix: prefix.cloned(), page: None, given };
        Ok(Reading { first: 0, names: self.numbered(made).collect(), rest: Some(rest) })
    }

    /// One page more, in place of those that were read. Returns whether there was one.
    async fn read_page(&self, reading: &mut Reading) -> Result<bool> {
        let Some(mut rest) = reading.rest.take() else { return Ok(false) };
        let (bucket, asked) = (self.bucket(&rest.bucket)?, Instant::now());
        let (listing, next) = bucket.list_page(rest.prefix.as_ref(), rest.page.take()).await?;
        let mut names: BTreeMap<String, Node> = BTreeMap::new();
        for found in listing.objects {
            self.recent.insert(asked, &rest.bucket, &found);
            let node = Node::Object { bucket: rest.bucket.clone(), key: found.key.clone() };
            names.insert(found.key.file_name().to_owned(), node);
        }
        // Where an object and a directory have one name, the directory is what the name leads to.
        for name in listing.prefixes {
            // Below a long directory a key may be longer than one has.
            let Ok(key) = self.child_key(rest.prefix.as_ref(), &name) else { continue };
            self.recent.forget(&(rest.bucket.clone(), key.clone()));
            names.insert(name, Node::Directory { bucket: rest.bucket.clone(), prefix: Some(key) });
        }
        names.retain(|name, _| !rest.given.contains(name));
        let kind = |node: &Node| {
            if matches!(node, Node::Object { .. }) { NodeKind::File } else { NodeKind::Directory }
        };
        let entries = names.into_iter().map(|(name, node)| {
            let kind = kind(&node);
            (node, name, kind)
        });
        let (sidecars, others): (Vec<_>, Vec<_>) = entries.partition(|(node, _, _)| is_sidecar_name(node));
        // Who removes what is listed finds sidecars before the objects that would take them along.
        reading.names.extend(self.numbered([sidecars, others].concat()));
        if next.is_some() {
            rest.page = next;
            reading.rest = Some(rest);
        }
        Ok(true)
    }

    fn numbered(&self, names: Vec<(Node, String, NodeKind)>) -> impl Iterator<Item = DirectoryEntry> + '_ {
        names.into_iter().map(|(node, name, kind)| DirectoryEntry {
            ino: self.inodes.number(&node).0,
            name,
            kind,
        })
    }
}

/// Whether an object has the name of a sidecar.
fn is_sidecar_name(node: &Node) -> bool {
    matches!(node, Node::Object { key, .. } if Sidecar::parse(key).is_some())
}
