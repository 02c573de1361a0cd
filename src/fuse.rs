//! The adapter between the kernel's FUSE protocol and [`crate::vfs`]: the only user of fuser.
//!
//! What cannot wait is answered on the dispatcher's threads, of which there are more than cores: reads of local images,
//! and writes into a staged file that nobody else changes. Everything else is a task of the runtime that replies when it
//! is done, so that however many requests wait for a store, no thread does.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle as Runtime;
use tracing::{debug, warn};

use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Op;
use crate::units::{FileOffset, MIB, SECTOR};
use crate::vfs::{Attr, AttrChange, HandleId, Ino, NodeKind, OpenOptions, Vfs, Whence};

/// Largest read and write request, in bytes: what the kernel allows (FUSE_MAX_MAX_PAGES, 256 pages).
const MAX_REQUEST: u32 = MIB as u32;

/// The attribute that tells why a file cannot be opened or its export failed.
const ERROR_XATTR: &str = "user.freightfs.error";

/// What the kernel is told of a mount.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// What /proc/mounts names as the source.
    pub source: String,
    /// Whether other users may enter the mount.
    pub allow_other: bool,
    /// Whether the kernel refuses every change.
    pub read_only: bool,
    /// Dispatcher threads.
    pub threads: usize,
}

/// A mounted session: the kernel has answered and requests wait to be served.
pub struct MountedSession {
    session: Session<FuseAdapter>,
}

/// Unmounts from another thread.
pub struct Unmounter {
    inner: fuser::SessionUnmounter,
}

impl MountedSession {
    /// Mounts. When this returns the mount answers as soon as [`run`](Self::run) is called; the kernel holds
    /// requests until then.
    pub fn new(vfs: Arc<Vfs>, runtime: Runtime, mountpoint: &Path, options: &FuseOptions) -> Result<Self> {
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName(options.source.replace(',', "_")),
            // As a plain option it reaches the kernel on both ways of mounting; MountOption::Subtype does not.
            MountOption::CUSTOM("subtype=freightfs".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoAtime,
            // Modes and owners of objects come from the bucket: nobody there shall make a root shell here.
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        if options.read_only {
            config.mount_options.push(MountOption::RO);
        }
        config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(options.threads.max(2));
        config.clone_fd = true;
        let session = Session::new(FuseAdapter { vfs, runtime }, mountpoint, &config)
            .map_err(|e| mount_error(e).in_file(mountpoint.display().to_string()))?;
        Ok(Self { session })
    }

    /// Something to unmount with.
    pub fn unmounter(&mut self) -> Unmounter {
        Unmounter { inner: self.session.unmount_callable() }
    }

    /// Serves requests until the filesystem is unmounted.
    pub fn run(self) -> Result<()> {
        self.session.run().map_err(|e| Error::from_io("the connection to the kernel broke", e))
    }
}

impl Unmounter {
    /// Unmounts.
    pub fn unmount(&mut self) -> Result<()> {
        self.inner.unmount().map_err(|e| Error::from_io("cannot unmount", e))
    }
}

/// Says what to do about the usual reasons.
fn mount_error(error: std::io::Error) -> Error {
    let text = error.to_string();
    let what = match error.kind() {
        std::io::ErrorKind::NotFound if !Path::new("/dev/fuse").exists() => {
            "cannot mount: /dev/fuse is missing; load the kernel module with `modprobe fuse`"
        }
        std::io::ErrorKind::NotFound => "cannot mount: fusermount3 is missing; install the package fuse3",
        std::io::ErrorKind::NotConnected => {
            "cannot mount: an earlier mount here died; remove it with `fusermount3 -u` or `umount -l`"
        }
        std::io::ErrorKind::PermissionDenied if std::fs::File::open("/dev/fuse").is_err() => {
            "cannot mount: this user may not open /dev/fuse; its mode is usually 0666"
        }
        _ if text.contains("user_allow_other") => {
            "cannot mount: allow_other needs the line user_allow_other in /etc/fuse.conf"
        }
        _ => "cannot mount",
    };
    Error::from_io(what, error)
}

struct FuseAdapter {
    vfs: Arc<Vfs>,
    runtime: Runtime,
}

impl FuseAdapter {
    /// Runs `work`, which may wait, as a task.
    fn work<F: Future<Output = ()> + Send + 'static>(&self, op: Op, work: impl FnOnce(Arc<Vfs>) -> F) {
        self.vfs.metrics().count(op);
        self.runtime.spawn(work(Arc::clone(&self.vfs)));
    }
}

thread_local! {
    /// The dispatcher thread's buffer for reads, grown once.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Answers a read that has nothing to wait for; gives the reply back otherwise.
fn read_now(vfs: &Vfs, fh: FileHandle, offset: u64, size: usize, reply: ReplyData) -> Option<ReplyData> {
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

/// `.` and `..` come before the directory's own names.
async fn reply_directory(vfs: Arc<Vfs>, node: INodeNo, fh: HandleId, offset: u64, mut reply: ReplyDirectory) {
    for (number, name) in [".", ".."].into_iter().enumerate().skip(offset as usize) {
        let _ = reply.add(node, number as u64 + 1, FileType::Directory, name);
    }
    let read = vfs.read_directory(fh, offset.saturating_sub(2), |number, entry| {
        reply.add(INodeNo(entry.ino.0), number + 3, file_type(entry.kind), &entry.name)
    });
    match read.await {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno("readdir", &e)),
    }
}

fn ino(ino: INodeNo) -> Ino {
    Ino(ino.0)
}

fn handle(fh: FileHandle) -> HandleId {
    HandleId(fh.0)
}

/// Longest name, in bytes (NAME_MAX in linux/limits.h). The kernel lets FUSE have longer ones.
const MAX_NAME: usize = 255;

/// A name as text.
fn utf8(name: &OsStr) -> Result<String> {
    if name.len() > MAX_NAME {
        let what = format!("the name {name:?} has {} bytes; a name has at most {MAX_NAME}", name.len());
        return Err(Error::new(ErrorKind::NameTooLong, what));
    }
    let wrong = || Error::new(ErrorKind::Malformed, format!("the name {name:?} is not UTF-8"));
    name.to_str().map(str::to_owned).ok_or_else(wrong)
}

fn errno(op: &str, error: &Error) -> Errno {
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
fn copy_errno(error: &Error) -> Errno {
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

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.file_size,
        // Full, whatever holes there are: coreutils stops using copy_file_range when it sees fewer.
        blocks: attr.file_size.div_ceil(SECTOR),
        atime: attr.modified,
        mtime: attr.modified,
        ctime: attr.modified,
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

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

fn open_options(flags: i32) -> OpenOptions {
    OpenOptions {
        write: flags & libc::O_ACCMODE != libc::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0,
        exclusive: flags & libc::O_EXCL != 0,
        opener: None,
    }
}

fn reply_write(written: Result<()>, length: u32, reply: ReplyWrite) {
    match written {
        Ok(()) => reply.written(length),
        Err(e) => reply.error(errno("write", &e)),
    }
}

fn reply_empty(op: &str, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(op, &e)),
    }
}

/// A value or list of extended attributes; with a size of 0 only its length is asked for.
fn reply_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match size {
        0 => reply.size(value.len() as u32),
        _ if value.len() > size as usize => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}

fn reply_xattr_change(op: &str, changed: Result<bool>, reply: ReplyEmpty) {
    match changed {
        Ok(true) => reply.ok(),
        Ok(false) => reply.error(Errno::ENODATA),
        Err(e) => reply.error(errno(op, &e)),
    }
}

fn reply_entry(op: &str, result: Result<Attr>, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(&attr.ttl, &file_attr(&attr), Generation(attr.generation)),
        Err(e) => reply.error(errno(op, &e)),
    }
}

fn reply_attr(op: &str, result: Result<Attr>, reply: ReplyAttr) {
    match result {
        Ok(attr) => reply.attr(&attr.ttl, &file_attr(&attr)),
        Err(e) => reply.error(errno(op, &e)),
    }
}

impl Filesystem for FuseAdapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(64);
        // Each is an optimisation that a kernel may lack. HANDLE_KILLPRIV_V2 spares a getxattr of
        // security.capability before every write; ATOMIC_O_TRUNC makes open and truncation one request.
        for wanted in [
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_PARALLEL_DIROPS,
        ] {
            if config.add_capabilities(wanted).is_err() {
                debug!("the kernel does not offer {wanted:?}");
            }
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = utf8(name);
        self.work(Op::Lookup, async move |vfs| {
            let found = async { vfs.lookup(ino(parent), &name?).await };
            reply_entry("lookup", found.await, reply);
        });
    }

    fn forget(&self, _req: &Request, node: INodeNo, lookups: u64) {
        self.vfs.forget(ino(node), lookups);
    }

    fn getattr(&self, _req: &Request, node: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.work(Op::Getattr, async move |vfs| reply_attr("getattr", vfs.getattr(ino(node)).await, reply));
    }

    fn setattr(
        &self,
        _req: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mode = mode.map(|mode| (mode & 0o7777) as u16);
        let change = AttrChange { mode, uid, gid, file_size: size, modified: mtime.map(time) };
        self.work(Op::Setattr, async move |vfs| {
            reply_attr("setattr", vfs.setattr(ino(node), fh.map(handle), &change).await, reply);
        });
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = utf8(name);
        self.work(Op::Mkdir, async move |vfs| {
            let made = async { vfs.make_directory(ino(parent), &name?).await };
            reply_entry("mkdir", made.await, reply);
        });
    }

    // A store has files and nothing else; EPERM is what link(2), symlink(2) and mknod(2) say of such filesystems.
    fn mknod(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        if ![0, libc::S_IFREG].contains(&(mode & libc::S_IFMT)) {
            return reply.error(Errno::EPERM);
        }
        let name = utf8(name);
        self.work(Op::Create, async move |vfs| {
            let made = async { vfs.make_file(ino(parent), &name?).await };
            reply_entry("mknod", made.await, reply);
        });
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _req: &Request, _node: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = utf8(name);
        self.work(Op::Unlink, async move |vfs| {
            let removed = async { vfs.unlink(ino(parent), &name?).await };
            reply_empty("unlink", removed.await, reply);
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = utf8(name);
        self.work(Op::Rmdir, async move |vfs| {
            let removed = async { vfs.remove_directory(ino(parent), &name?).await };
            reply_empty("rmdir", removed.await, reply);
        });
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            return reply.error(Errno::EINVAL);
        }
        let (name, new_name) = (utf8(name), utf8(new_name));
        let exclusive = flags.contains(RenameFlags::RENAME_NOREPLACE);
        self.work(Op::Rename, async move |vfs| {
            let renamed =
                async { vfs.rename(ino(parent), &name?, ino(new_parent), &new_name?, exclusive).await };
            reply_empty("rename", renamed.await, reply);
        });
    }

    fn open(&self, req: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let options = OpenOptions { opener: Some(req.pid()), ..open_options(flags.0) };
        self.work(Op::Open, async move |vfs| match vfs.open(ino(node), options).await {
            Ok(id) => reply.opened(FileHandle(id.0), FopenFlags::FOPEN_DIRECT_IO),
            Err(e) => reply.error(errno("open", &e)),
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = utf8(name);
        let options = OpenOptions { opener: Some(req.pid()), ..open_options(flags) };
        self.work(Op::Create, async move |vfs| {
            let created = async { vfs.create(ino(parent), &name?, options).await };
            match created.await {
                Ok((attr, id)) => {
                    let (fh, flags) = (FileHandle(id.0), FopenFlags::FOPEN_DIRECT_IO);
                    reply.created(&attr.ttl, &file_attr(&attr), Generation(attr.generation), fh, flags);
                }
                Err(e) => reply.error(errno("create", &e)),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size.min(MAX_REQUEST) as usize;
        let Some(reply) = read_now(&self.vfs, fh, offset, size, reply) else { return };
        self.work(Op::Read, async move |vfs| match vfs.read(handle(fh), FileOffset(offset), size).await {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno("read", &e)),
        });
    }

    fn write(
        &self,
        _req: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (at, length) = (FileOffset(offset), data.len() as u32);
        if let Some(written) = self.vfs.write_now(handle(fh), at, data) {
            self.vfs.metrics().count(Op::Write);
            return reply_write(written, length, reply);
        }
        let data = data.to_vec();
        self.work(Op::Write, async move |vfs| {
            reply_write(vfs.write(handle(fh), at, data).await, length, reply);
        });
    }

    fn flush(&self, _req: &Request, _node: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.work(Op::Flush, async move |vfs| reply_empty("flush", vfs.flush(handle(fh)).await, reply));
    }

    fn release(
        &self,
        _req: &Request,
        _node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.work(Op::Release, async move |vfs| {
            vfs.release(handle(fh)).await;
            reply.ok();
        });
    }

    fn fsync(&self, _req: &Request, _node: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.work(Op::Fsync, async move |vfs| reply_empty("fsync", vfs.sync(handle(fh)).await, reply));
    }

    fn opendir(&self, _req: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.work(Op::Readdir, async move |vfs| match vfs.open_directory(ino(node)).await {
            Ok(id) => reply.opened(FileHandle(id.0), FopenFlags::empty()),
            Err(e) => reply.error(errno("opendir", &e)),
        });
    }

    fn readdir(&self, _req: &Request, node: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.work(Op::Readdir, move |vfs| reply_directory(vfs, node, handle(fh), offset, reply));
    }

    fn releasedir(
        &self,
        _req: &Request,
        _node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.work(Op::Readdir, async move |vfs| {
            vfs.release(handle(fh)).await;
            reply.ok();
        });
    }

    fn fsyncdir(&self, _req: &Request, _node: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _node: INodeNo, reply: ReplyStatfs) {
        self.vfs.metrics().count(Op::Statfs);
        // A bucket has no size. Programs that look for room find plenty: 2^50 bytes, all free.
        let blocks = 1 << 30;
        reply.statfs(blocks, blocks, blocks, 0, 0, MAX_REQUEST, MAX_NAME as u32, MAX_REQUEST);
    }

    fn access(&self, _req: &Request, _node: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn setxattr(
        &self,
        _req: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let exists = match flags {
            libc::XATTR_CREATE => Some(false),
            libc::XATTR_REPLACE => Some(true),
            _ => None,
        };
        let (name, value) = (utf8(name), value.to_vec());
        self.work(Op::Xattr, async move |vfs| {
            let changed = async { vfs.change_xattr(ino(node), &name?, Some(&value), exists).await };
            reply_xattr_change("setxattr", changed.await, reply);
        });
    }

    fn removexattr(&self, _req: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = utf8(name);
        self.work(Op::Xattr, async move |vfs| {
            let changed = async { vfs.change_xattr(ino(node), &name?, None, Some(true)).await };
            reply_xattr_change("removexattr", changed.await, reply);
        });
    }

    fn getxattr(&self, _req: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if name.to_str().is_some_and(|name| name.starts_with("system.posix_acl")) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        // The kernel asks for security.capability and others often; there are none.
        let Some(name) = name.to_str().filter(|name| name.starts_with("user.")).map(str::to_owned) else {
            self.vfs.metrics().count(Op::Xattr);
            return reply.error(Errno::ENODATA);
        };
        self.work(Op::Xattr, async move |vfs| {
            let value = match name.as_str() {
                ERROR_XATTR => Ok(vfs.error_text(ino(node)).await.map(String::into_bytes)),
                other => vfs.xattr(ino(node), other).await,
            };
            match value {
                Ok(Some(value)) => reply_xattr(&value, size, reply),
                Ok(None) => reply.error(Errno::ENODATA),
                Err(e) => reply.error(errno("getxattr", &e)),
            }
        });
    }

    /// Ours are answered but not listed: programs copy what is listed.
    fn listxattr(&self, _req: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        self.work(Op::Xattr, async move |vfs| match vfs.xattr_names(ino(node)).await {
            Ok(names) => {
                let list: Vec<u8> =
                    names.into_iter().flat_map(|name| [name.as_bytes(), &[0]].concat()).collect();
                reply_xattr(&list, size, reply);
            }
            Err(e) => reply.error(errno("listxattr", &e)),
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(at) = u64::try_from(offset).map(FileOffset) else { return reply.error(Errno::ENXIO) };
        self.work(Op::Lseek, async move |vfs| match vfs.seek(handle(fh), at, whence).await {
            Ok(Some(found)) => reply.offset(found.bytes() as i64),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(e) => reply.error(errno("lseek", &e)),
        });
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _node_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _node_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (from, at) = (FileOffset(offset_in), FileOffset(offset_out));
        self.work(Op::CopyFileRange, async move |vfs| {
            match vfs.copy_range(handle(fh_in), from, handle(fh_out), at, len).await {
                Ok(copied) => reply.written(copied as u32),
                Err(e) => reply.error(copy_errno(&e)),
            }
        });
    }
}
