//! Names: what each directory has in it, and which node a name leads to.

use std::sync::Arc;
use std::time::SystemTime;

use super::attr::{Attr, NodeKind};
use super::inode::{ControlFile, HandleId, Ino, Node};
use super::lanes::Lane;
use super::{AttrChange, Vfs};
use crate::catalog::CatalogImage;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Job, RecordedFile, StatusImage};
use crate::format::OutputFormat;
use crate::policy::ImageFacts;
use crate::vfile::VirtualFile;

/// One name in a directory.
#[derive(Clone, Debug, PartialEq)]
pub struct DirectoryEntry {
    /// The name.
    pub name: String,
    /// What it leads to.
    pub ino: Ino,
    /// File or directory.
    pub kind: NodeKind,
}

/// The files of the root directory.
const IMAGES: &str = "images";
const BUCKETS: &str = "buckets";
const JOBS: &str = "jobs";
const CONTROL: &str = ".freightfs";
const IMAGE_JSON: &str = "image.json";

/// Longest name that a program can look up, in bytes (NAME_MAX).
pub(super) const MAX_NAME: usize = 255;

/// No file of that name.
pub(super) fn no_entry(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no {name:?} here"))
}

impl Vfs {
    /// Finds `name` in a directory and counts it as known to the kernel until it is forgotten.
    pub async fn lookup(self: &Arc<Self>, parent: Ino, name: &str) -> Result<Attr> {
        let node = self.child(&self.inodes.node(parent)?, name)?;
        let (node, mut attr) = self.resolve(node).await?;
        (attr.ino, attr.generation) = self.inodes.remember(node);
        Ok(attr)
    }

    /// Takes back `lookups` of an inode.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        self.inodes.forget(ino, lookups);
    }

    /// Attributes of an inode: of the file that has this number, whatever its name is now, and if it has none.
    pub async fn getattr(self: &Arc<Self>, ino: Ino) -> Result<Attr> {
        let Some(node) = self.inodes.find(ino)? else { return self.unlinked_attr(ino) };
        let (_, mut attr) = self.resolve(node).await?;
        // An object may have become a directory, or a name may be another file now: the number stays.
        attr.ino = ino;
        Ok(attr)
    }

    /// Changes attributes. Only objects have any that can be changed. A size is that of the file that `handle` has
    /// open, where a program gives one.
    pub async fn setattr(
        self: &Arc<Self>,
        ino: Ino,
        handle: Option<HandleId>,
        change: &AttrChange,
    ) -> Result<Attr> {
        let Some(node) = self.inodes.find(ino)? else {
            self.set_unlinked_attr(ino, change).await?;
            return self.unlinked_attr(ino);
        };
        match node {
            Node::Object { bucket, key } => {
                let draft = handle.and_then(|id| self.writer(id).ok());
                self.set_object_attr(&(bucket, key), draft, change).await?;
            }
            Node::Directory { bucket, prefix: Some(prefix) } if change.file_size.is_none() => {
                self.remember(&(bucket, prefix), true, change).await?;
            }
            // A bucket's top belongs to nobody: what rsync -a sets on it is taken and not kept.
            Node::Directory { prefix: None, .. } if change.file_size.is_none() => {}
            node => return Err(read_only(&node)),
        }
        self.getattr(ino).await
    }

    /// The names in a directory outside the buckets.
    pub(super) async fn fixed_entries(self: &Arc<Self>, node: Node) -> Result<Vec<(Node, String, NodeKind)>> {
        match &node {
            Node::Images | Node::Image { .. } => {
                self.blocking(Lane::Catalog, move |vfs| vfs.entries_now(&node)).await
            }
            _ => self.entries_now(&node),
        }
    }

    fn entries_now(&self, node: &Node) -> Result<Vec<(Node, String, NodeKind)>> {
        Ok(match node {
            Node::Root => self.root_entries(),
            Node::Images => {
                let ids = self.catalog.images()?;
                let entry = |id: &String| (Node::Image { id: id.clone() }, id.clone(), NodeKind::Directory);
                ids.keys().map(entry).collect()
            }
            Node::Image { id } => self.image_entries(&*self.catalog.image(id)?),
            Node::Buckets => {
                let entry = |b: &String| {
                    (Node::Directory { bucket: b.clone(), prefix: None }, b.clone(), NodeKind::Directory)
                };
                self.buckets.keys().map(entry).collect()
            }
            Node::Jobs => {
                let entry = |job: Arc<Job>| {
                    let id = job.id();
                    (Node::Job { id: id.clone() }, format!("{id}.json"), NodeKind::File)
                };
                self.jobs.jobs().into_iter().map(entry).collect()
            }
            Node::Control => {
                let entry = |f: ControlFile| (Node::ControlFile(f), f.name().to_owned(), NodeKind::File);
                ControlFile::ALL.into_iter().map(entry).collect()
            }
            file => return Err(Error::new(ErrorKind::NotDirectory, format!("{file} is not a directory"))),
        })
    }

    fn root_entries(&self) -> Vec<(Node, String, NodeKind)> {
        let nodes =
            [(Node::Images, IMAGES), (Node::Buckets, BUCKETS), (Node::Jobs, JOBS), (Node::Control, CONTROL)];
        nodes.into_iter().map(|(node, name)| (node, name.to_owned(), NodeKind::Directory)).collect()
    }

    fn image_entries(&self, image: &CatalogImage) -> Vec<(Node, String, NodeKind)> {
        let id = || image.id.clone();
        let mut entries = vec![(Node::ImageJson { id: id() }, IMAGE_JSON.to_owned(), NodeKind::File)];
        for disk in &image.disks {
            for &format in &self.settings.formats {
                let node = Node::ImageFile { id: id(), disk: disk.name.clone(), format };
                let name = format!("{}.{}", disk.name, format.suffix());
                // What is listed can be looked up.
                if name.len() <= MAX_NAME {
                    entries.push((node, name, NodeKind::File));
                }
            }
        }
        entries
    }

    /// The node that `name` means in a directory, which need not exist.
    pub(super) fn child(&self, parent: &Node, name: &str) -> Result<Node> {
        let found = match parent {
            Node::Root => match name {
                IMAGES => Some(Node::Images),
                BUCKETS => Some(Node::Buckets),
                JOBS => Some(Node::Jobs),
                CONTROL => Some(Node::Control),
                _ => None,
            },
            Node::Images => Some(Node::Image { id: name.to_owned() }),
            Node::Image { id } if name == IMAGE_JSON => Some(Node::ImageJson { id: id.clone() }),
            Node::Image { id } => OutputFormat::split_file_name(name).map(|(disk, format)| Node::ImageFile {
                id: id.clone(),
                disk: disk.to_owned(),
                format,
            }),
            Node::Buckets => Some(Node::Directory { bucket: name.to_owned(), prefix: None }),
            Node::Directory { bucket, prefix } => {
                Some(Node::Object { bucket: bucket.clone(), key: self.child_key(prefix.as_ref(), name)? })
            }
            Node::Jobs => name.strip_suffix(".json").map(|id| Node::Job { id: id.to_owned() }),
            Node::Control => ControlFile::ALL.into_iter().find(|f| f.name() == name).map(Node::ControlFile),
            file => return Err(Error::new(ErrorKind::NotDirectory, format!("{file} is not a directory"))),
        };
        found.ok_or_else(|| no_entry(name))
    }

    /// The attributes of a node, and the node itself: an object's key may turn out to be a directory.
    async fn resolve(self: &Arc<Self>, node: Node) -> Result<(Node, Attr)> {
        let attr = match &node {
            Node::Directory { bucket, prefix: Some(prefix) } => {
                return self.resolve_object(bucket.clone(), prefix.clone()).await;
            }
            Node::Object { bucket, key } => return self.resolve_object(bucket.clone(), key.clone()).await,
            Node::Image { id } | Node::ImageJson { id } | Node::ImageFile { id, .. } => {
                let (lane, node) = (Lane::Image(id.clone()), node.clone());
                self.blocking(lane, move |vfs| vfs.attr_now(&node)).await?
            }
            _ => self.attr_now(&node)?,
        };
        Ok((node, attr))
    }

    /// The attributes of a node outside the buckets' directories.
    fn attr_now(&self, node: &Node) -> Result<Attr> {
        Ok(match node {
            Node::Root | Node::Images | Node::Buckets | Node::Jobs | Node::Control => {
                self.directory_attr(node, self.mounted)
            }
            Node::Image { id } => {
                let image = self.catalog.image(id)?;
                self.directory_attr(node, self.image_modified(&image))
            }
            Node::ImageJson { id } => {
                let image = self.catalog.image(id)?;
                let file_size = self.image_document(&image).len() as u64;
                self.live_file_attr(node, file_size, self.image_modified(&image))
            }
            Node::ImageFile { id, disk, format } => self.image_file_attr(node, id, disk, *format)?,
            Node::Directory { bucket, prefix: None } => {
                self.bucket(bucket)?;
                self.directory_attr(node, self.mounted)
            }
            Node::Directory { .. } | Node::Object { .. } => return Err(no_entry(&node.to_string())),
            Node::Job { id } => {
                let job = self.jobs.job(id).ok_or_else(|| no_entry(id))?;
                self.live_file_attr(node, job.status().to_json().len() as u64, status_time(&job))
            }
            Node::ControlFile(file) => {
                self.live_file_attr(node, self.control_document(*file).len() as u64, SystemTime::now())
            }
        })
    }

    /// A file whose image cannot be read is listed with size 0; opening it says why.
    fn image_file_attr(&self, node: &Node, id: &str, disk: &str, format: OutputFormat) -> Result<Attr> {
        if !self.settings.formats.contains(&format) {
            return Err(no_entry(&node.to_string()));
        }
        let image = self.catalog.image(id)?;
        let disk = image.disk(disk)?;
        let file = match &image.error {
            Some(error) => Err(error.clone()),
            None => self.catalog.open_disk(disk).and_then(|open| Ok((open.modified(), open.file(format)?))),
        };
        Ok(match file {
            Ok((modified, file)) => self.virtual_file_attr(node, &*file.virtual_file(), modified),
            Err(_) => self.file_attr(node, 0, 0o444, self.catalog.modified(disk).unwrap_or(self.mounted)),
        })
    }

    /// The file of an image in a format, if the policy lets it be exported, how a job names it, and what the policy is
    /// told of it.
    pub(super) fn exported_file(
        &self,
        id: &str,
        disk: &str,
        format: OutputFormat,
    ) -> Result<(Arc<dyn VirtualFile>, StatusImage, ImageFacts)> {
        let image = self.catalog.image(id)?;
        let facts = self.image_facts(&image, disk);
        self.permits.image(&facts, format, (id, disk))?;
        let (file, status) = self.file_of(&image, disk, format)?;
        Ok((file, status, facts))
    }

    /// The file of an image in a format, and how a job names it.
    pub(super) fn image_file(
        &self,
        id: &str,
        disk: &str,
        format: OutputFormat,
    ) -> Result<(Arc<dyn VirtualFile>, StatusImage)> {
        self.file_of(&*self.catalog.image(id)?, disk, format)
    }

    /// The same of an image that was looked up: what was judged of it and its file are of one listing.
    fn file_of(
        &self,
        image: &CatalogImage,
        disk: &str,
        format: OutputFormat,
    ) -> Result<(Arc<dyn VirtualFile>, StatusImage)> {
        if let Some(error) = &image.error {
            return Err(error.clone());
        }
        let open = self.catalog.open_disk(image.disk(disk)?)?;
        let (file, identity) = open.identified_file(format)?;
        let name = StatusImage {
            id: image.id.clone(),
            name: image.sidecar.name.clone().unwrap_or_else(|| image.id.clone()),
            disk: disk.to_owned(),
            format: format.suffix().to_owned(),
            generation: open.generation().shown().to_owned(),
            identity: Some(identity),
        };
        Ok((file.virtual_file(), name))
    }

    /// The file that a recorded job exports, if its source certainly is what it was. Where only the source's holes
    /// are others, the file is made anew.
    pub fn recorded_file(&self, image: &StatusImage, format: OutputFormat) -> Result<RecordedFile> {
        let (file, now) = self.image_file(&image.id, &image.disk, format)?;
        let continues = match (&image.identity, &now.identity) {
            (Some(known), Some(identity)) => known == identity,
            _ => image.generation == now.generation && self.is_told_by_generation(image, format)?,
        };
        let differs_in_map_only = || {
            image.identity.as_ref().zip(now.identity.as_ref()).is_some_and(|(a, b)| a.differs_in_map_only(b))
        };
        if continues || differs_in_map_only() {
            return Ok(RecordedFile { file, image: now, continues });
        }
        let what = "the source changed since the export was asked for";
        Err(Error::new(ErrorKind::SourceChanged, what).in_file(format!("{}/{}", image.id, image.disk)))
    }

    /// Whether the generation that an earlier version recorded tells all that the file's bytes depend on.
    fn is_told_by_generation(&self, image: &StatusImage, format: OutputFormat) -> Result<bool> {
        let disk = self.catalog.image(&image.id)?;
        Ok(self.catalog.open_disk(disk.disk(&image.disk)?)?.is_told_by_generation(format))
    }

    /// The newest change of an image's files; the mount's start where none can be read.
    fn image_modified(&self, image: &CatalogImage) -> SystemTime {
        image.disks.iter().filter_map(|disk| self.catalog.modified(disk).ok()).max().unwrap_or(self.mounted)
    }

    /// The content of a file of `.freightfs/`.
    pub(super) fn control_document(&self, file: ControlFile) -> Vec<u8> {
        match file {
            ControlFile::Version => format!("{}\n", env!("CARGO_PKG_VERSION")).into_bytes(),
            ControlFile::Config => self.settings.shown_config.clone().into_bytes(),
            ControlFile::Metrics => self.metrics.render().into_bytes(),
        }
    }
}

/// When a job's status last changed in a way that matters: its end, else its begin.
pub(super) fn status_time(job: &Job) -> SystemTime {
    let status = job.status();
    status.end_time.unwrap_or(status.begin_time).into()
}

/// The refusal to change something outside the buckets.
pub(super) fn read_only(node: &Node) -> Error {
    let what = match node {
        Node::Images | Node::Image { .. } | Node::ImageJson { .. } | Node::ImageFile { .. } => {
            "images are read-only"
        }
        Node::Buckets | Node::Directory { prefix: None, .. } => "buckets are given at mount",
        _ => "this part of the mount is read-only",
    };
    Error::new(ErrorKind::ReadOnly, format!("{node}: {what}"))
}
