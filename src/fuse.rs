//! The adapter between the kernel's FUSE protocol and [`crate::vfs`]: the only user of fuser.
//!
//! What cannot wait is answered on the dispatcher's threads, of which there are more than cores: reads of local images,
//! and writes into a staged file that nobody else changes. Everything else is a task of the runtime that replies when it
//! is done, so that however many requests wait for a store, no thread does.

mod interrupt;
mod reply;
mod session;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle as Runtime;
use tracing::debug;

use self::interrupt::{Refuse, told_to_end};
use self::reply::{
    SharedDirectory, copy_errno, errno, file_attr, handle, ino, open_options, permissions, read_now,
    reply_attr, reply_empty, reply_entry, reply_open, reply_write, reply_xattr, reply_xattr_change, time,
    utf8,
};
pub use self::session::{FuseOptions, MountedSession, Requests};
use crate::error::Result;
use crate::metrics::Op;
use crate::units::{FileOffset, MIB};
use crate::vfs::{Attr, AttrChange, HandleId, OpenOptions, Vfs, Whence};

/// Largest read and write request, in bytes: what the kernel allows (FUSE_MAX_MAX_PAGES, 256 pages).
const MAX_REQUEST: u32 = MIB as u32;

/// Longest name, in bytes (NAME_MAX in linux/limits.h). The kernel lets FUSE have longer ones.
const MAX_NAME: usize = 255;

/// The attribute that tells why a file cannot be opened or its export failed.
const ERROR_XATTR: &str = "user.freightfs.error";

struct FuseAdapter {
    vfs: Arc<Vfs>,
    runtime: Runtime,
    requests: Requests,
}

impl FuseAdapter {
    /// Runs `work`, which may wait, as a task.
    fn work<F: Future<Output = ()> + Send + 'static>(&self, op: Op, work: impl FnOnce(Arc<Vfs>) -> F) {
        self.vfs.metrics().count(op);
        let (unanswered, work) = (self.requests.begin(), work(Arc::clone(&self.vfs)));
        self.runtime.spawn(async move {
            work.await;
            drop(unanswered);
        });
    }

    /// The same for work during which a program may be told to end. It gets EINTR then; the work goes on, and `undo`
    /// takes back what the kernel has not got.
    fn wait_or_undo<R, T, F, U>(
        &self,
        op: Op,
        request: &Request,
        reply: R,
        work: impl FnOnce(Arc<Vfs>) -> F,
        answer: impl FnOnce(Result<T>, R) + Send + 'static,
        undo: impl FnOnce(Arc<Vfs>, T) -> U + Send + 'static,
    ) where
        R: Refuse + Send + 'static,
        T: Send,
        F: Future<Output = Result<T>> + Send + 'static,
        U: Future<Output = ()> + Send,
    {
        let task = request.pid();
        self.work(op, |vfs| {
            let work = work(Arc::clone(&vfs));
            async move {
                let mut work = std::pin::pin!(work);
                tokio::select! {
                    biased;
                    result = &mut work => answer(result, reply),
                    () = told_to_end(task) => {
                        reply.refuse(Errno::EINTR);
                        if let Ok(given) = work.await {
                            undo(vfs, given).await;
                        }
                    }
                }
            }
        });
    }

    /// The same where there is nothing to take back.
    fn wait<R, T, F>(
        &self,
        op: Op,
        request: &Request,
        reply: R,
        work: impl FnOnce(Arc<Vfs>) -> F,
        answer: impl FnOnce(Result<T>, R) + Send + 'static,
    ) where
        R: Refuse + Send + 'static,
        T: Send,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.wait_or_undo(op, request, reply, work, answer, async |_, _| {});
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

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = utf8(name);
        let look = async move |vfs: Arc<Vfs>| vfs.lookup(ino(parent), &name?).await;
        let answer = |found, reply| reply_entry("lookup", found, reply);
        self.wait_or_undo(Op::Lookup, req, reply, look, answer, async |vfs, attr| vfs.forget(attr.ino, 1));
    }

    fn forget(&self, _req: &Request, node: INodeNo, lookups: u64) {
        self.vfs.forget(ino(node), lookups);
    }

    fn getattr(&self, req: &Request, node: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let look = async move |vfs: Arc<Vfs>| vfs.getattr(ino(node)).await;
        self.wait(Op::Getattr, req, reply, look, |attr, reply| reply_attr("getattr", attr, reply));
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
        let mode = mode.map(permissions);
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
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = utf8(name);
        self.work(Op::Mkdir, async move |vfs| {
            let made = async { vfs.make_directory(ino(parent), &name?, permissions(mode)).await };
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
            let made = async { vfs.make_file(ino(parent), &name?, permissions(mode)).await };
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
        let open = async move |vfs: Arc<Vfs>| vfs.open(ino(node), options).await;
        let answer = |opened, reply| reply_open("open", opened, FopenFlags::FOPEN_DIRECT_IO, reply);
        self.wait_or_undo(Op::Open, req, reply, open, answer, async |vfs, id| vfs.release(id).await);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = utf8(name);
        let options = OpenOptions { opener: Some(req.pid()), mode: permissions(mode), ..open_options(flags) };
        let create = async move |vfs: Arc<Vfs>| vfs.create(ino(parent), &name?, options).await;
        let answer = |created: Result<(Attr, HandleId)>, reply: ReplyCreate| match created {
            Ok((attr, id)) => {
                let (fh, flags) = (FileHandle(id.0), FopenFlags::FOPEN_DIRECT_IO);
                reply.created(&attr.ttl, &file_attr(&attr), Generation(attr.generation), fh, flags);
            }
            Err(e) => reply.error(errno("create", &e)),
        };
        self.wait_or_undo(Op::Create, req, reply, create, answer, async |vfs, (attr, id)| {
            vfs.forget(attr.ino, 1);
            vfs.release(id).await;
        });
    }

    fn read(
        &self,
        req: &Request,
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
        let read = async move |vfs: Arc<Vfs>| vfs.read(handle(fh), FileOffset(offset), size).await;
        self.wait(Op::Read, req, reply, read, |read, reply| match read {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno("read", &e)),
        });
    }

    fn write(
        &self,
        req: &Request,
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
        let write = async move |vfs: Arc<Vfs>| vfs.write(handle(fh), at, data).await;
        self.wait(Op::Write, req, reply, write, move |written, reply| reply_write(written, length, reply));
    }

    fn flush(&self, req: &Request, _node: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        let flush = async move |vfs: Arc<Vfs>| vfs.flush(handle(fh)).await;
        self.wait(Op::Flush, req, reply, flush, |flushed, reply| reply_empty("flush", flushed, reply));
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

    fn fsync(&self, req: &Request, _node: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let sync = async move |vfs: Arc<Vfs>| vfs.sync(handle(fh)).await;
        self.wait(Op::Fsync, req, reply, sync, |synced, reply| reply_empty("fsync", synced, reply));
    }

    fn opendir(&self, req: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let open = async move |vfs: Arc<Vfs>| vfs.open_directory(ino(node)).await;
        let answer = |opened, reply| reply_open("opendir", opened, FopenFlags::empty(), reply);
        self.wait_or_undo(Op::Readdir, req, reply, open, answer, async |vfs, id| vfs.release(id).await);
    }

    fn readdir(&self, req: &Request, node: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let filled = SharedDirectory::new(reply);
        let (names, fh) = (filled.clone(), handle(fh));
        let read = async move |vfs| names.fill(vfs, node, fh, offset).await;
        self.wait(Op::Readdir, req, filled, read, |read, filled| filled.answer(read));
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
