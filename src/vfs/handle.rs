//! Handles: what an open file reads and writes, fixed at its opening.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::attr::Attr;
use super::directory::OpenDirectory;
use super::draft::{Draft, RangeSource, rsync_target};
use super::drafts::Opening;
use super::inode::{HandleId, Ino, Node};
use super::lanes::Lane;
use super::tree::{DirectoryEntry, read_only};
use super::{ObjectName, Vfs};
use crate::error::{Error, ErrorKind, Result};
use crate::export::JobSource;
use crate::format::OutputFormat;
use crate::metrics::Op;
use crate::units::{FileOffset, GIB};
use crate::vfile::{VirtualFile, readable};

/// Most bytes that one copy_file_range records: a program sees progress, and the kernel's reply is 32 bits wide.
const MAX_RANGE: u64 = GIB;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Whether it will be written.
    pub write: bool,
    /// Whether it is cut to nothing first.
    pub truncate: bool,
    /// Whether it must not exist yet.
    pub exclusive: bool,
    /// The process that opens it, where that is known.
    pub opener: Option<u32>,
    /// Permission bits that it gets when it is created.
    pub mode: u16,
}

/// Where lseek looks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE.
    Hole,
}

/// An open file or directory.
pub(super) enum Handle {
    /// A directory that is being read.
    Directory(OpenDirectory),
    /// A document as it was when it was opened.
    Document(Vec<u8>),
    /// An image's file.
    Image(RangeSource),
    /// An object, and whether it was opened to be written.
    Object(Arc<Draft>, bool),
}

/// The open files and directories of a mount.
#[derive(Default)]
pub(super) struct Handles {
    open: RwLock<HashMap<HandleId, Arc<Handle>>>,
    /// How many were opened so far.
    opened: AtomicU64,
}

impl Handles {
    pub(super) fn insert(&self, handle: Handle) -> HandleId {
        let id = HandleId(self.opened.fetch_add(1, Ordering::Relaxed) + 1);
        self.open.write().insert(id, Arc::new(handle));
        id
    }

    pub(super) fn get(&self, id: HandleId) -> Result<Arc<Handle>> {
        let missing = || Error::new(ErrorKind::Internal, format!("handle {} is not open", id.0));
        self.open.read().get(&id).cloned().ok_or_else(missing)
    }

    pub(super) fn remove(&self, id: HandleId) -> Option<Arc<Handle>> {
        self.open.write().remove(&id)
    }
}

impl Vfs {
    /// Opens a file.
    pub async fn open(self: &Arc<Self>, ino: Ino, options: OpenOptions) -> Result<HandleId> {
        let how = Opening { write: options.write, truncate: options.truncate, create: false };
        let Some(node) = self.inodes.find(ino)? else {
            let draft = self.open_unlinked(ino, how).await?;
            return Ok(self.handles.insert(Handle::Object(draft, how.write)));
        };
        let handle = match (&node, options.write) {
            (Node::Object { bucket, key }, _) => {
                self.open_object(&(bucket.clone(), key.clone()), how).await?
            }
            (node, true) => return Err(read_only(node)),
            (Node::ImageFile { id, disk, format }, false) => {
                let lane = Lane::Image(id.clone());
                let (id, disk, format) = (id.clone(), disk.clone(), *format);
                let open = move |vfs: &Self| vfs.open_image(&id, &disk, format, options.opener);
                Handle::Image(self.blocking(lane, open).await?)
            }
            (Node::ImageJson { id }, false) => {
                let (lane, id) = (Lane::Image(id.clone()), id.clone());
                let document = move |vfs: &Self| Ok(vfs.image_document(&*vfs.catalog.image(&id)?));
                Handle::Document(self.blocking(lane, document).await?)
            }
            (Node::Job { id }, false) => {
                let job = self.jobs.job(id).ok_or_else(|| super::tree::no_entry(id))?;
                Handle::Document(job.status().to_json())
            }
            (Node::ControlFile(file), false) => Handle::Document(self.control_document(*file)),
            (node, false) => {
                return Err(Error::new(ErrorKind::IsDirectory, format!("{node} is a directory")));
            }
        };
        Ok(self.handles.insert(handle))
    }

    fn open_image(
        &self,
        id: &str,
        disk: &str,
        format: OutputFormat,
        opener: Option<u32>,
    ) -> Result<RangeSource> {
        let (file, image, facts) = self.exported_file(id, disk, format)?;
        // Who trusts the size that stat shows must not see one that is only an upper bound.
        if file.known_size().is_none() && !self.reads_to_end(opener) {
            file.exact_size()?;
        }
        let shown_size = file.file_size();
        Ok(RangeSource { shown_size, file, image, format, facts: Arc::new(facts) })
    }

    async fn open_object(self: &Arc<Self>, object: &ObjectName, how: Opening) -> Result<Handle> {
        if how.write {
            self.bucket(&object.0)?.check_writable()?;
            self.permits.target(object)?;
        } else if let Some(job) = self.status_job(&object.0, &object.1) {
            return Ok(Handle::Document(job.status().to_json()));
        }
        Ok(Handle::Object(self.open_draft(object, how).await?, how.write))
    }

    /// Whether a process is known to read on to the end of a file, whatever size it has.
    fn reads_to_end(&self, opener: Option<u32>) -> bool {
        program(opener).is_some_and(|name| self.settings.read_to_end.contains(&name))
    }

    /// Creates an object's file and opens it for writing.
    pub async fn create(
        self: &Arc<Self>,
        parent: Ino,
        name: &str,
        options: OpenOptions,
    ) -> Result<(Attr, HandleId)> {
        let object = self.writable_child(parent, name)?;
        // What comes into being from here on, by another host, is what this file will replace.
        let (mut truncate, mut is_new) = (options.truncate, false);
        match self.resolve_object(object.0.clone(), object.1.clone()).await {
            Ok((Node::Directory { .. }, _)) => {
                return Err(Error::new(ErrorKind::IsDirectory, format!("{} is a directory", object.1)));
            }
            Ok(_) if options.exclusive => {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("{} exists", object.1)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => (truncate, is_new) = (true, true),
            Err(error) => return Err(error),
        }
        self.permits.target(&object)?;
        let how = Opening { write: true, truncate, create: true };
        let draft = self.open_draft(&object, how).await?;
        if is_new {
            self.set_created_mode(&object, options.mode);
        }
        let temporary = options.exclusive && rsync_target(name).is_some();
        if temporary && program(options.opener).as_deref() == Some("rsync") {
            draft.park();
        }
        let id = self.handles.insert(Handle::Object(draft, true));
        match self.lookup(parent, name).await {
            Ok(attr) => Ok((attr, id)),
            Err(error) => {
                // The kernel knows no handle that it could close.
                self.release(id).await;
                Err(error)
            }
        }
    }

    /// Makes an empty file that nobody has open, as mknod(2) does.
    pub async fn make_file(self: &Arc<Self>, parent: Ino, name: &str, mode: u16) -> Result<Attr> {
        let options = OpenOptions { write: true, exclusive: true, mode, ..OpenOptions::default() };
        let (attr, handle) = self.create(parent, name, options).await?;
        self.release(handle).await;
        Ok(attr)
    }

    /// Reads from an open file. Only the end of the file gives fewer than `length` bytes.
    pub async fn read(self: &Arc<Self>, id: HandleId, at: FileOffset, length: usize) -> Result<Vec<u8>> {
        let handle = self.handles.get(id)?;
        let (lane, file) = match &*handle {
            Handle::Image(source) => (source.lane(), Arc::clone(&source.file)),
            Handle::Object(draft, _) => {
                let bytes = draft.read(&self.publisher, at, length).await?;
                self.metrics.read_bytes.add(bytes.len() as u64);
                return Ok(bytes);
            }
            Handle::Document(bytes) => {
                let mut buf = vec![0; length];
                let read = read_document(bytes, at, &mut buf);
                buf.truncate(read);
                return Ok(buf);
            }
            Handle::Directory(_) => {
                return Err(Error::new(ErrorKind::IsDirectory, "the handle is a directory's"));
            }
        };
        let read = move |vfs: &Self| {
            let mut buf = vec![0; length];
            let read = file.read_at(at, &mut buf)?;
            buf.truncate(read);
            vfs.metrics.read_bytes.add(read as u64);
            Ok(buf)
        };
        self.blocking(lane, read).await
    }

    /// The same into a buffer, where nothing has to be waited for; `None` where something might.
    pub fn read_now(&self, id: HandleId, at: FileOffset, buf: &mut [u8]) -> Option<Result<usize>> {
        let handle = match self.handles.get(id) {
            Ok(handle) => handle,
            Err(error) => return Some(Err(error)),
        };
        match &*handle {
            // Looking at the metrics does not change them.
            Handle::Document(bytes) => Some(Ok(read_document(bytes, at, buf))),
            Handle::Image(source) if !source.format.is_compressed() && !self.catalog.is_remote() => {
                self.metrics.count(Op::Read);
                let read = source.file.read_at(at, buf);
                self.metrics.read_bytes.add(read.as_ref().map_or(0, |&read| read as u64));
                Some(read)
            }
            _ => None,
        }
    }

    /// Writes to an open file.
    pub async fn write(self: &Arc<Self>, id: HandleId, at: FileOffset, bytes: Vec<u8>) -> Result<()> {
        let length = bytes.len() as u64;
        let draft = self.writer(id)?;
        self.note_written(&draft);
        draft.write(&self.publisher, at, bytes).await?;
        self.metrics.written_bytes.add(length);
        Ok(())
    }

    /// The same where nothing has to be waited for; `None`, and nothing done, where something has.
    pub fn write_now(&self, id: HandleId, at: FileOffset, bytes: &[u8]) -> Option<Result<()>> {
        let draft = self.writer(id).ok()?;
        let written = draft.try_write(&self.publisher, at, bytes)?;
        self.note_written(&draft);
        if written.is_ok() {
            self.metrics.written_bytes.add(bytes.len() as u64);
        }
        Some(written)
    }

    /// Copies a range from one open file to another without moving it where that is possible; returns how much.
    ///
    /// # Errors
    /// What is refused sticks to the destination: its later writes and flushes fail with the same error. The
    /// caller decides which errno copy_file_range itself may give, because most make programs fall back silently.
    pub async fn copy_range(
        self: &Arc<Self>,
        source: HandleId,
        from: FileOffset,
        destination: HandleId,
        at: FileOffset,
        length: u64,
    ) -> Result<u64> {
        let length = length.min(MAX_RANGE);
        let draft = self.writer(destination)?;
        let handle = self.handles.get(source)?;
        let Handle::Image(source) = &*handle else {
            // Another object's bytes: programs that are told so read and write them.
            return Err(Error::new(ErrorKind::CrossDevice, "only image files are copied by range"));
        };
        let object = draft.object();
        self.note_written(&draft);
        let first = draft.refusal().is_none();
        let copied = match self.permits.export(&source.facts, source.format, &object) {
            Ok(()) => draft.copy_range(&self.publisher, source, from, at, length).await,
            Err(error) => {
                draft.refuse(&error).await;
                Err(error)
            }
        };
        if let (Err(error), true) = (&copied, first) {
            let image = JobSource::Image(source.image.clone());
            self.publisher.record_refusal(object, image, error).await;
        }
        let copied = copied?;
        self.metrics.copied_bytes.add(copied);
        Ok(copied)
    }

    /// Opens a directory. A bucket that cannot be listed fails here.
    pub async fn open_directory(self: &Arc<Self>, ino: Ino) -> Result<HandleId> {
        Ok(self.handles.insert(Handle::Directory(self.directory(ino).await?)))
    }

    /// Gives the names of an open directory from number `from` on, until `take` says that it is full. Number 0 begins
    /// anew with what there is then.
    pub async fn read_directory(
        self: &Arc<Self>,
        id: HandleId,
        from: u64,
        take: impl FnMut(u64, &DirectoryEntry) -> bool + Send,
    ) -> Result<()> {
        match &*self.handles.get(id)? {
            Handle::Directory(directory) => self.read_names(directory, from, take).await,
            _ => Err(Error::new(ErrorKind::NotDirectory, "the handle is not a directory's")),
        }
    }

    /// What close(2) waits for. Handles that only read have nothing to do.
    pub async fn flush(self: &Arc<Self>, id: HandleId) -> Result<()> {
        match &*self.handles.get(id)? {
            Handle::Object(draft, true) => draft.flush(&self.publisher).await,
            _ => Ok(()),
        }
    }

    /// What fsync(2) waits for: the end of the job that makes the object. Fails if the job fails.
    pub async fn sync(self: &Arc<Self>, id: HandleId) -> Result<()> {
        match &*self.handles.get(id)? {
            Handle::Object(draft, true) => draft.sync(&self.publisher).await,
            Handle::Object(draft, false) => {
                let (bucket, key) = draft.object();
                match self.jobs.newest(&bucket, &key) {
                    Some(job) => job.ended(self.settings.wait_limit).await.map(drop),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// The last close of a handle.
    pub async fn release(self: &Arc<Self>, id: HandleId) {
        let handle = self.handles.remove(id);
        if let Some(Handle::Object(draft, write)) = handle.as_deref() {
            self.drafts.close(draft, *write, &self.publisher).await;
        }
    }

    /// The next data or hole from `at` on, as lseek(2) defines them: the end of the file is a hole.
    pub async fn seek(
        self: &Arc<Self>,
        id: HandleId,
        at: FileOffset,
        whence: Whence,
    ) -> Result<Option<FileOffset>> {
        let handle = self.handles.get(id)?;
        let (lane, file) = match &*handle {
            Handle::Image(source) => (source.lane(), Arc::clone(&source.file)),
            Handle::Document(bytes) => return Ok(plain_seek(bytes.len() as u64, at, whence)),
            Handle::Object(draft, _) => {
                return Ok(plain_seek(draft.file_size(), at, whence));
            }
            Handle::Directory(_) => {
                return Err(Error::new(ErrorKind::IsDirectory, "the handle is a directory's"));
            }
        };
        self.blocking(lane, move |_| seek_in(&*file, at, whence)).await
    }

    /// What a handle that writes has open.
    pub(super) fn writer(&self, id: HandleId) -> Result<Arc<Draft>> {
        match &*self.handles.get(id)? {
            Handle::Object(draft, true) => Ok(Arc::clone(draft)),
            _ => Err(Error::new(ErrorKind::ReadOnly, "the handle is not open for writing")),
        }
    }
}

/// The name of a process's program, as the kernel has it.
fn program(pid: Option<u32>) -> Option<String> {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pid?)).ok()?;
    Some(name.trim_end().to_owned())
}

fn read_document(bytes: &[u8], at: FileOffset, buf: &mut [u8]) -> usize {
    let length = readable(bytes.len() as u64, at, buf.len());
    if length > 0 {
        let start = at.bytes() as usize;
        buf[..length].copy_from_slice(&bytes[start..start + length]);
    }
    length
}

/// lseek: the end of the file is a hole.
fn seek_in(file: &dyn VirtualFile, at: FileOffset, whence: Whence) -> Result<Option<FileOffset>> {
    let file_size = file.file_size();
    let mut place = at;
    while place.bytes() < file_size {
        let extent = file.extent_at(place)?;
        if extent.kind.is_data() == (whence == Whence::Data) {
            return Ok(Some(place));
        }
        place += extent.length;
    }
    let end = at.bytes() < file_size && whence == Whence::Hole;
    Ok(end.then_some(FileOffset(file_size)))
}

/// lseek in a file without holes.
fn plain_seek(file_size: u64, at: FileOffset, whence: Whence) -> Option<FileOffset> {
    let inside = at.bytes() < file_size;
    inside.then_some(if whence == Whence::Data { at } else { FileOffset(file_size) })
}
