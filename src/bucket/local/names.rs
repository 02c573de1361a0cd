//! The lock under which objects of a local bucket get and lose their names.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use parking_lot::{Mutex, MutexGuard};

use super::directory::Directory;
use crate::bucket::key::CONTROL_PREFIX;
use crate::error::{Error, ErrorKind, Result};

/// The file below [`CONTROL_PREFIX`] that is locked.
const LOCK: &str = "lock";

/// How long it is waited for at most: less than requests take for which somebody waits.
const LOCK_LIMIT: Duration = Duration::from_secs(20);

/// The pauses between looks at a lock that another process has.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The lock of a bucket.
pub(super) struct NamesLock {
    path: PathBuf,
    limit: Duration,
    /// Taken before the file: who waits for this process waits here.
    here: Mutex<()>,
}

/// The right to give names to objects and to take them away, which nobody else on this host has meanwhile.
pub(super) struct Naming<'a> {
    _file: Flock<File>,
    _here: MutexGuard<'a, ()>,
}

impl NamesLock {
    /// The lock of the bucket in `root`, waited for no longer than `timeout`.
    pub(super) fn new(root: &Path, timeout: Duration) -> Self {
        let path = root.join(CONTROL_PREFIX).join(LOCK);
        Self { path, limit: LOCK_LIMIT.min(timeout), here: Mutex::default() }
    }

    /// Waits until nobody else, in this process or another one of this host, gives names to objects or takes them away.
    ///
    /// # Errors
    /// [`TimedOut`](ErrorKind::TimedOut) when somebody does so all the time: it was stopped, or its disk hangs.
    pub(super) fn lock(&self, directory: &Directory) -> Result<Naming<'_>> {
        let deadline = Instant::now() + self.limit;
        let here = self.here.try_lock_until(deadline).ok_or_else(|| self.late("this process"))?;
        directory.create_directories(CONTROL_PREFIX)?;
        let path = format!("{CONTROL_PREFIX}/{LOCK}");
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(file) = directory.try_lock(&path)? {
                return Ok(Naming { _file: file, _here: here });
            }
            if Instant::now() >= deadline {
                return Err(self.late("another process"));
            }
            std::thread::sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }

    fn late(&self, who: &str) -> Error {
        let limit = self.limit.as_secs();
        let what = format!("{who} has held the lock {} for {limit} s", self.path.display());
        Error::new(ErrorKind::TimedOut, what).transient()
    }
}
