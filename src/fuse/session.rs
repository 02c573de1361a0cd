//! The session with the kernel: mounting, serving, unmounting.

use std::path::Path;
use std::sync::Arc;

use fuser::{Config, MountOption, Session, SessionACL};
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;

use super::FuseAdapter;
use crate::error::{Error, Result};
use crate::vfs::Vfs;

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
    requests: Requests,
}

/// The requests that have not been answered. The kernel waits for most of them, but not for the last close of a file.
#[derive(Clone)]
pub struct Requests {
    count: Arc<watch::Sender<usize>>,
}

/// A request that has not been answered.
pub(super) struct Unanswered(Requests);

impl Default for Requests {
    fn default() -> Self {
        Self { count: Arc::new(watch::Sender::new(0)) }
    }
}

impl Requests {
    pub(super) fn begin(&self) -> Unanswered {
        self.count.send_modify(|count| *count += 1);
        Unanswered(self.clone())
    }

    /// Waits until none is left.
    pub async fn answered(&self) {
        // The sender is here, so that waiting does not fail.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
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
        let requests = Requests::default();
        let adapter = FuseAdapter { vfs, runtime, requests: requests.clone() };
        let session = Session::new(adapter, mountpoint, &config)
            .map_err(|e| mount_error(e).in_file(mountpoint.display().to_string()))?;
        Ok(Self { session, requests })
    }

    /// The requests under way, also after the mount is gone.
    pub fn requests(&self) -> Requests {
        self.requests.clone()
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
