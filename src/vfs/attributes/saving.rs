//! Writing what was set into the bucket's documents.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tracing::warn;

use super::directory::Snapshot;
use super::{DirectoryName, directory_key, document_name};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::vfs::Vfs;

/// How often changes are written.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// How often a document is written again over what another host has written meanwhile.
const SAVE_ATTEMPTS: usize = 10;

impl Vfs {
    /// Writes what was changed, now. When this returns, changes made before it are in the buckets, or the log says why
    /// not. One bucket does not wait for another. Returns whether trying again may write more.
    pub async fn save_attributes(&self) -> bool {
        futures::future::join_all(self.buckets.keys().map(|bucket| self.save_bucket(bucket)))
            .await
            .contains(&true)
    }

    async fn save_bucket(&self, bucket: &str) -> bool {
        let saving = Arc::clone(self.attributes.saving.lock().entry(bucket.to_owned()).or_default());
        let _alone = saving.lock().await;
        let mut is_unsaved = false;
        for name in self.changed_directories(bucket) {
            if let Err(error) = self.save_directory(&name).await {
                is_unsaved |= error.is_transient();
                self.note_unsaved(&name, &error);
            }
        }
        is_unsaved
    }

    /// The directories of a bucket of which something is to be written.
    fn changed_directories(&self, bucket: &str) -> Vec<DirectoryName> {
        let known: Vec<DirectoryName> = {
            let directories = self.attributes.directories.lock();
            directories.keys().filter(|name| name.0 == bucket).cloned().collect()
        };
        let is_changed = |name: &DirectoryName| {
            self.settle_pending(name);
            let mut directories = self.attributes.directories.lock();
            directories.get_mut(name).is_some_and(|directory| {
                directory.sweep(|file| self.is_open(name, file));
                directory.is_changed()
            })
        };
        known.into_iter().filter(is_changed).collect()
    }

    /// The buckets that do not have what was last set on their files.
    pub fn unsaved_attributes(&self) -> Vec<String> {
        let directories = self.attributes.directories.lock();
        let unsaved = directories.iter().filter(|(_, directory)| directory.is_changed());
        let buckets: BTreeSet<_> = unsaved.map(|(name, _)| name.0.clone()).collect();
        buckets.into_iter().collect()
    }

    /// Writes a directory's document over the one that was read; over another one only what was changed here.
    async fn save_directory(&self, name: &DirectoryName) -> Result<()> {
        let bucket = self.bucket(&name.0)?;
        let document = document_name(name.1.as_ref());
        let mut attempts = 0;
        loop {
            let snapshot = match self.attributes.directories.lock().get(name) {
                Some(directory) => directory.snapshot(directory_key(name))?,
                None => return Ok(()),
            };
            let Snapshot { document: json, replaces, .. } = &snapshot;
            failpoint::pass(Step::AttributesSave)?;
            let written = match json.clone() {
                Some(json) => bucket.put_control(&document, Bytes::from(json), replaces).await.map(Some),
                None => bucket.delete_control_if(&document, replaces).await.map(|()| None),
            };
            match written {
                Ok(found) => {
                    if let Some(directory) = self.attributes.directories.lock().get_mut(name) {
                        directory.saved(&snapshot, found);
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Conflict && attempts < SAVE_ATTEMPTS => {
                    attempts += 1;
                    let (theirs, found) = self.read_document(name).await?;
                    if let Some(directory) = self.attributes.directories.lock().get_mut(name) {
                        directory.merge(theirs, found);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Says once why attributes are not written; they stay and are written later.
    fn note_unsaved(&self, name: &DirectoryName, error: &Error) {
        if let Some(directory) = self.attributes.directories.lock().get_mut(name)
            && !std::mem::replace(&mut directory.is_failing, true)
        {
            warn!(bucket = name.0, directory = directory_key(name), "attributes: {}", error.report());
        }
    }

    /// Writes changes every second, for ever.
    pub async fn keep_saving_attributes(&self) {
        let keep_saving = self.buckets.keys().map(async |bucket| {
            loop {
                tokio::time::sleep(SAVE_INTERVAL).await;
                self.save_bucket(bucket).await;
            }
        });
        futures::future::join_all(keep_saving).await;
    }

    /// Writes changes until all are in their buckets, but for those that a store refuses.
    pub async fn save_all_attributes(&self) {
        while self.save_attributes().await {
            tokio::time::sleep(SAVE_INTERVAL).await;
        }
    }
}
