//! Between the kernel's words and the vfs's: what requests ask, and what replies say.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, ReplyXattr, TimeOrNow,
};
use parking_lot::Mutex;
use tracing::{debug, warn};

use super::{MAX_NAME, MAX_REQUEST};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FileOffset, SECTOR};
use crate::vfs::{Attr, DirectoryEntry, HandleId, Ino, NodeKind, OpenOptions, Vfs};

thread_local! {
    /// The dispatcher thread's buffer for reads, grown once.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Answers a read that has nothing to wait for; gives the reply back otherwise.
pub(super) fn read_now(
    vfs: &Vfs,
    fh: FileHandle,
    offset: u64,
    size: usize,
    reply: ReplyData,
) -> Option<ReplyData> {
    READ_BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        match vfs.read_now(handle(fh), FileOffset(offset), &mut buffer[..size]) {
            Some(Ok(read)) => reply.data(&buffer[..read]),
            Some(Err(e)) => reply.error(errno("read", &e)),
            None => return Some(reply),
        }
        None
    })
}

/// A directory's reply, which is filled by one and may be given up by another.
#[derive(Clone)]
pub(super) struct SharedDirectory {
    reply: Arc<Mutex<Option<ReplyDirectory>>>,
}

impl SharedDirectory {
    pub(super) fn new(reply: ReplyDirectory) -> Self {
        Self { reply: Arc::new(Mutex::new(Some(reply))) }
    }

    /// Takes a name; says whether there is no room for it. A reply that was given up has none.
    fn add(&self, ino: INodeNo, next: u64, kind: FileType, name: &str) -> bool {
        self.reply.lock().as_mut().is_none_or(|reply| reply.add(ino, next, kind, name))
    }

    /// Fills it. `.` and `..` come before the directory's own names.
    pub(super) async fn fill(self, vfs: Arc<Vfs>, node: INodeNo, fh: HandleId, offset: u64) -> Result<()> {
        for (number, name) in [".", ".."].into_iter().enumerate().skip(offset as usize) {
            let _ = self.add(node, number as u64 + 1, FileType::Directory, name);
        }
        let take = |number: u64, entry: &DirectoryEntry| {
            self.add(INodeNo(entry.ino.0), number + 3, file_type(entry.kind), &entry.name)
        };
        vfs.read_directory(fh, offset.saturating_sub(2), take).await
    }

    /// Sends it.
    pub(super) fn answer(self, read: Result<()>) {
        let Some(reply) = self.reply.lock().take() else { return };
        match read {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno("readdir", &e)),
        }
    }

    /// Sends an error instead.
    pub(super) fn error(self, errno: Errno) {
        if let Some(reply) = self.reply.lock().take() {
            reply.error(errno);
        }
    }
}

pub(super) fn ino(ino: INodeNo) -> Ino {
    Ino(ino.0)
}

pub(super) fn handle(fh: FileHandle) -> HandleId {
    HandleId(fh.0)
}

/// A name as text.
pub(super) fn utf8(name: &OsStr) -> Result<String> {
    if name.len() > MAX_NAME {
        let what = format!("the name {name:?} has {} bytes; a name has at most {MAX_NAME}", name.len());
        return Err(Error::new(ErrorKind::NameTooLong, what));
    }
    let wrong = || Error::new(ErrorKind::Malformed, format!("the name {name:?} is not UTF-8"));
    name.to_str().map(str::to_owned).ok_or_else(wrong)
}

pub(super) fn errno(op: &str, error: &Error) -> Errno {
    // Names that are not there are everyday life; the rest helps to find out why a program failed.
    if error.kind() == ErrorKind::NotFound {
        debug!(op, "{}", error.report());
    } else {
        warn!(op, "{}", error.report());
    }
    Errno::from_i32(error.errno())
}

/// The errno of a refused copy_file_range. Others would make cp fall back to read and write silently; the true
/// one comes from the next write or close.
pub(super) fn copy_errno(error: &Error) -> Errno {
    match error.errno() {
        safe @ (libc::EDQUOT | libc::ENOSPC | libc::EIO | libc::EROFS | libc::EBUSY | libc::EAGAIN) => {
            errno("copy_file_range", error);
            Errno::from_i32(safe)
        }
        libc::EXDEV => Errno::EXDEV,
        _ => {
            errno("copy_file_range", error);
            Errno::EIO
        }
    }
}

fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::File => FileType::RegularFile,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.file_size,
        // Full, whatever holes there are: coreutils stops using copy_file_range when it sees fewer.
        blocks: attr.file_size.div_ceil(SECTOR),
        atime: attr.modified,
        mtime: attr.modified,
        ctime: attr.changed,
        crtime: attr.modified,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        // cp, cat and others size their buffers by this: one request for each of their reads.
        blksize: MAX_REQUEST,
        flags: 0,
    }
}

pub(super) fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

/// The permission bits of a mode. That of a new file is without the umask's already: the kernel takes it away.
pub(super) fn permissions(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

pub(super) fn open_options(flags: i32) -> OpenOptions {
    OpenOptions {
        write: flags & libc::O_ACCMODE != libc::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0,
        exclusive: flags & libc::O_EXCL != 0,
        opener: None,
        mode: 0,
    }
}

pub(super) fn reply_write(written: Result<()>, length: u32, reply: ReplyWrite) {
    match written {
        Ok(()) => reply.written(length),
        Err(e) => reply.error(errno("write", &e)),
    }
}

pub(super) fn reply_open(op: &str, opened: Result<HandleId>, flags: FopenFlags, reply: ReplyOpen) {
    match opened {
        Ok(id) => reply.opened(FileHandle(id.0), flags),
        Err(e) => reply.error(errno(op, &e)),
    }
}

pub(super) fn reply_empty(op: &str, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(op, &e)),
    }
}

/// A value or list of extended attributes; with a size of 0 only its length is asked for.
pub(super) fn reply_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match size {
        0 => reply.size(value.len() as u32),
        _ if value.len() > size as usize => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}

pub(super) fn reply_xattr_change(op: &str, changed: Result<bool>, reply: ReplyEmpty) {
    match changed {
        Ok(true) => reply.ok(),
        Ok(false) => reply.error(Errno::ENODATA),
        Err(e) => reply.error(errno(op, &e)),
    }
}

pub(super) fn reply_entry(op: &str, result: Result<Attr>, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(&attr.ttl, &file_attr(&attr), Generation(attr.generation)),
        Err(e) => reply.error(errno(op, &e)),
    }
}

pub(super) fn reply_attr(op: &str, result: Result<Attr>, reply: ReplyAttr) {
    match result {
        Ok(attr) => reply.attr(&attr.ttl, &file_attr(&attr)),
        Err(e) => reply.error(errno(op, &e)),
    }
}
