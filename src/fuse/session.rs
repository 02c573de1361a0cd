//! The session with the kernel.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuser::{Config, Session, SessionACL};
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;

use super::FuseAdapter;
use crate::error::{Error, Result};
use crate::vfs::Vfs;

/// The kernel's device (fuse(4)).
const DEVICE: &str = "/dev/fuse";

/// How a mount is served.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// Whether other users may enter the mount.
    pub allow_other: bool,
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

impl MountedSession {
    /// Begins to talk with the kernel over the connection of a mount. When this returns the mount answers as soon as
    /// [`run`](Self::run) is called; the kernel holds requests until then.
    pub fn new(vfs: Arc<Vfs>, runtime: Runtime, device: OwnedFd, options: &FuseOptions) -> Result<Self> {
        let mut config = Config::default();
        config.n_threads = Some(options.threads.max(2));
        // For its own connection each thread opens the device, which a daemon that became another user may not.
        config.clone_fd = File::options().read(true).write(true).open(DEVICE).is_ok();
        let acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
        let requests = Requests::default();
        let adapter = FuseAdapter { vfs, runtime, requests: requests.clone() };
        let session = Session::from_fd(adapter, device, acl, config)
            .map_err(|e| Error::from_io("the kernel does not begin the session", e))?;
        Ok(Self { session, requests })
    }

    /// The requests under way, also after the mount is gone.
    pub fn requests(&self) -> Requests {
        self.requests.clone()
    }

    /// Serves requests until the filesystem is unmounted.
    pub fn run(self) -> Result<()> {
        self.session.run().map_err(|e| Error::from_io("the connection to the kernel broke", e))
    }
}
