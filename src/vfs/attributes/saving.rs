//! Writing what was set into the bucket's documents.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tracing::warn;

use super::directory::{Directory, Snapshot};
use super::{DirectoryName, directory_key, document_name};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::vfs::Vfs;

/// How often changes are written.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// How often a document is written again over what another host has written meanwhile.
const SAVE_ATTEMPTS: usize = 10;

impl Vfs {
    /// Writes what was changed, now. When this returns, changes made before it are in the bucket, or the log says why
    /// not. One bucket does not wait for another.
    pub async fn save_attributes(&self) {
        let _alone = self.attributes.saving.lock().await;
        let known: Vec<DirectoryName> = self.attributes.directories.lock().keys().cloned().collect();
        let mut changed: BTreeMap<String, Vec<DirectoryName>> = BTreeMap::new();
        for name in known {
            self.settle_pending(&name);
            if let Some(directory) = self.attributes.directories.lock().get_mut(&name) {
                directory.sweep(|file| self.is_open(&name, file));
            }
            if self.attributes.directories.lock().get(&name).is_some_and(Directory::is_changed) {
                changed.entry(name.0.clone()).or_default().push(name);
            }
        }
        let save = async |names: Vec<DirectoryName>| {
            for name in names {
                if let Err(error) = self.save_directory(&name).await {
                    self.note_unsaved(&name, &error);
                }
            }
        };
        futures::future::join_all(changed.into_values().map(save)).await;
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
        loop {
            tokio::time::sleep(SAVE_INTERVAL).await;
            self.save_attributes().await;
        }
    }
}
