//! Directories that are in the mount only. A store has a directory by the objects in it: one that was made and one whose
//! last object was removed here stay, as they would on a disk, until they are removed.

use std::collections::HashMap;

use jiff::Timestamp;
use parking_lot::Mutex;

use super::{ObjectName, Vfs};
use crate::bucket::ObjectKey;
use crate::export::JobState;

/// The directories, and since when each of them was not in the store.
#[derive(Default)]
pub(super) struct MadeDirectories {
    since: Mutex<HashMap<ObjectName, Timestamp>>,
}

impl MadeDirectories {
    /// It is here although the store does not have it, or may not.
    pub(super) fn insert(&self, directory: ObjectName) {
        self.since.lock().insert(directory, Timestamp::now());
    }

    /// It is gone, or in the store: that decides from now on whether it is there.
    pub(super) fn remove(&self, directory: &ObjectName) {
        self.since.lock().remove(directory);
    }

    /// Those that are directly in a directory of a bucket.
    fn in_directory(&self, bucket: &str, prefix: Option<&ObjectKey>) -> Vec<ObjectName> {
        let since = self.since.lock();
        let here = since.keys().filter(|(b, key)| b == bucket && key.parent().as_ref() == prefix);
        here.cloned().collect()
    }
}

impl Vfs {
    /// Whether a directory that the store does not have is here. One in which an object came into being meanwhile was in
    /// the store then: somebody else has removed it.
    pub(super) fn is_made(&self, directory: &ObjectName) -> bool {
        let Some(since) = self.made_directories.since.lock().get(directory).copied() else { return false };
        let below = format!("{}/", directory.1);
        let was_stored = self.jobs.jobs().into_iter().any(|job| {
            let request = job.request();
            let is_below = request.bucket == directory.0 && request.key.as_str().starts_with(&below);
            let status = is_below.then(|| job.status());
            status.is_some_and(|s| s.status == JobState::Success && s.end_time.is_some_and(|end| end > since))
        });
        if was_stored {
            self.made_directories.remove(directory);
        }
        !was_stored
    }

    /// The directories that are here, directly in a directory of a bucket, whatever the store has.
    pub(super) fn made_in(&self, bucket: &str, prefix: Option<&ObjectKey>) -> Vec<ObjectKey> {
        let mut made = self.made_directories.in_directory(bucket, prefix);
        made.retain(|directory| self.is_made(directory));
        made.into_iter().map(|(_, key)| key).collect()
    }

    /// An object was removed here: its directory stays.
    pub(super) async fn keep_directory_of(&self, (bucket, key): &ObjectName) {
        let (Some(parent), Ok(store)) = (key.parent(), self.bucket(bucket)) else { return };
        // One that the store has goes with what others do there.
        if !matches!(store.has_prefix(&parent).await, Ok(true)) {
            self.made_directories.insert((bucket.clone(), parent));
        }
    }
}
