//! The buckets' part of the tree: objects, directories that are common prefixes, jobs and drafts over both.

use std::collections::BTreeMap;
use std::time::Duration;

use tracing::warn;

use super::attr::{Attr, AttrChange, NodeKind};
use super::draft::Draft;
use super::drafts::{Detached, Opening, object_node};
use super::inode::{Ino, Node};
use super::tree::{no_entry, read_only, status_time};
use super::{ObjectName, Vfs};
use crate::bucket::{Bucket, ObjectKey, ObjectMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::export::Job;
use crate::export::sidecars::Sidecar;
use std::sync::Arc;

/// The suffix of status files.
pub(super) const STATUS_SUFFIX: &str = ".status";

/// How long removing an object waits for the job that makes it to end.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);

impl Vfs {
    /// The bucket mounted under that name.
    pub(super) fn bucket(&self, name: &str) -> Result<&Bucket> {
        self.buckets.get(name).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("no bucket {name:?} is mounted; buckets are given at mount"),
            )
        })
    }

    /// The key of `name` in a directory of a bucket.
    pub(super) fn child_key(&self, prefix: Option<&ObjectKey>, name: &str) -> Result<ObjectKey> {
        match prefix {
            Some(prefix) => prefix.child(name),
            None => ObjectKey::parse(name),
        }
    }

    /// The job whose status the key is, when the key ends with `.status` and the job knows better than the bucket.
    pub(super) fn status_job(&self, bucket: &str, key: &ObjectKey) -> Option<Arc<Job>> {
        let base = ObjectKey::parse(key.as_str().strip_suffix(STATUS_SUFFIX)?).ok()?;
        self.jobs.newest(bucket, &base).filter(|job| job.holds_status() && self.jobs.has_sidecars(&base))
    }

    /// What a key is: a draft, a running job's status or object, an object in the store, or a directory.
    pub(super) async fn resolve_object(
        self: &Arc<Self>,
        bucket: String,
        key: ObjectKey,
    ) -> Result<(Node, Attr)> {
        let store = self.bucket(&bucket)?;
        let name = (bucket, key);
        let node = Node::Object { bucket: name.0.clone(), key: name.1.clone() };
        if let Some(draft) = self.draft(&name) {
            let modified = draft.modified().unwrap_or(self.mounted);
            let attr = self.file_attr(&node, draft.file_size(), 0o644, modified);
            return Ok((node, self.overridden(&name, Attr { ttl: Duration::ZERO, ..attr }).await));
        }
        if let Some(job) = self.status_job(&name.0, &name.1) {
            let attr = self.live_file_attr(&node, job.status().to_json().len() as u64, status_time(&job));
            return Ok((node, attr));
        }
        if let Some(file) =
            self.jobs.active(&name.0, &name.1).and_then(|job| Some((job.file()?, status_time(&job))))
        {
            let attr = self.virtual_file_attr(&node, &*file.0, file.1);
            // A job that fails or is cancelled takes the name away.
            let attr = Attr { ttl: Duration::ZERO, ..attr };
            return Ok((node, self.overridden(&name, attr).await));
        }
        let recent = self.recent.get(&name).filter(|_| self.jobs.newest(&name.0, &name.1).is_none());
        let (object, listing) = match recent {
            Some(object) => (Some(object), false),
            None => tokio::try_join!(store.head(&name.1), store.has_prefix(&name.1))?,
        };
        if listing {
            self.made_directories.remove(&name);
        }
        if listing || object.is_none() && self.is_made(&name) {
            let node = Node::Directory { bucket: name.0.clone(), prefix: Some(name.1.clone()) };
            let attr = self.overridden_directory(&name, self.directory_attr(&node, self.mounted)).await;
            return Ok((node, attr));
        }
        let object = object.ok_or_else(|| no_entry(name.1.as_str()))?;
        let attr = self.object_attr(&node, &object);
        let attr = self.overridden_object(&name, object.etag.as_deref(), attr).await;
        Ok((node, attr))
    }

    fn object_attr(&self, node: &Node, object: &ObjectMeta) -> Attr {
        self.file_attr(node, object.object_size, 0o644, object.modified)
    }

    /// What a directory of a bucket shows besides the store's listing: what is being made.
    pub(super) fn entries_being_made(
        &self,
        bucket: &str,
        prefix: Option<&ObjectKey>,
    ) -> Result<Vec<(Node, String, NodeKind)>> {
        let mut entries: BTreeMap<String, Node> = BTreeMap::new();
        let object = |key: ObjectKey| Node::Object { bucket: bucket.to_owned(), key };
        let here = |key: &ObjectKey| key.parent().as_ref() == prefix;
        for job in self.jobs.shown_in(bucket) {
            let key = &job.request().key;
            if here(key) {
                if !job.status().status.is_final() {
                    entries.insert(key.file_name().to_owned(), object(key.clone()));
                }
                if let Ok(status) = key.with_suffix(STATUS_SUFFIX)
                    && self.jobs.has_sidecars(key)
                {
                    entries.insert(status.file_name().to_owned(), object(status));
                }
            }
        }
        let drafts = self.drafts.unpublished_names();
        for (_, key) in drafts.into_iter().filter(|(b, key): &ObjectName| b == bucket && here(key)) {
            entries.insert(key.file_name().to_owned(), object(key));
        }
        for key in self.made_in(bucket, prefix) {
            let node = Node::Directory { bucket: bucket.to_owned(), prefix: Some(key.clone()) };
            entries.insert(key.file_name().to_owned(), node);
        }
        let entry = |(name, node): (String, Node)| {
            let kind = if matches!(node, Node::Object { .. }) { NodeKind::File } else { NodeKind::Directory };
            (node, name, kind)
        };
        Ok(entries.into_iter().map(entry).collect())
    }

    /// The key that `name` has in a directory where objects can be made.
    pub(super) fn writable_child(&self, parent: Ino, name: &str) -> Result<ObjectName> {
        match self.inodes.node(parent)? {
            Node::Directory { bucket, prefix } => {
                self.bucket(&bucket)?.check_writable()?;
                let object = (bucket, self.child_key(prefix.as_ref(), name)?);
                // Whoever asks is about to change it.
                self.recent.forget(&object);
                Ok(object)
            }
            node => Err(read_only(&node)),
        }
    }

    /// The draft of a key that has bytes which are not published: its content is what the file is. A draft that is
    /// published may linger, because the kernel does not wait for the last close.
    pub(super) fn draft(&self, object: &ObjectName) -> Option<Arc<Draft>> {
        self.drafts.named(object).filter(|draft| !draft.is_published())
    }

    /// Changes an object's attributes; a size cuts or extends the file, which is the one of `handle` where a program gave
    /// one.
    pub(super) async fn set_object_attr(
        self: &Arc<Self>,
        object: &ObjectName,
        handle: Option<Arc<Draft>>,
        change: &AttrChange,
    ) -> Result<()> {
        if let Some(file_size) = change.file_size {
            self.attributes.written_after(object);
            match handle {
                Some(draft) => draft.truncate(&self.publisher, file_size).await?,
                None => self.truncate_by_name(object, file_size).await?,
            }
        }
        self.remember(object, false, change).await
    }

    /// truncate(2): opened, cut, and published again when nobody else writes it. The handle keeps a file that somebody
    /// else closes meanwhile.
    async fn truncate_by_name(self: &Arc<Self>, object: &ObjectName, file_size: u64) -> Result<()> {
        let how = Opening { write: true, truncate: file_size == 0, create: false };
        let draft = self.open_draft(object, how).await?;
        let result = match draft.truncate(&self.publisher, file_size).await {
            Ok(()) if draft.has_other_writers() => Ok(()),
            Ok(()) => draft.flush(&self.publisher).await,
            Err(error) => Err(error),
        };
        self.drafts.close(&draft, true, &self.publisher).await;
        result
    }

    /// Makes a directory, which exists in the mount until an object in it makes it exist in the store.
    pub async fn make_directory(self: &Arc<Self>, parent: Ino, name: &str, mode: u16) -> Result<Attr> {
        let object = self.writable_child(parent, name)?;
        if self.resolve_object(object.0.clone(), object.1.clone()).await.is_ok() {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("{} exists", object.1)));
        }
        let store = self.bucket(&object.0)?;
        store.make_directory(&object.1).await?;
        self.made_directories.insert(object.clone());
        self.set_directory_mode(&object, mode).await?;
        self.lookup(parent, name).await
    }

    /// Removes an empty directory.
    pub async fn remove_directory(self: &Arc<Self>, parent: Ino, name: &str) -> Result<()> {
        let (bucket, key) = self.writable_child(parent, name)?;
        match self.resolve_object(bucket.clone(), key.clone()).await? {
            (Node::Directory { .. }, _) => {}
            (node, _) => {
                return Err(Error::new(ErrorKind::NotDirectory, format!("{node} is not a directory")));
            }
        }
        if !self.is_empty_directory(&bucket, &key).await? {
            return Err(Error::new(ErrorKind::NotEmpty, format!("{key} is not empty")));
        }
        self.bucket(&bucket)?.remove_directory(&key).await?;
        let directory = (bucket, key);
        self.forget_attributes(&directory, true).await;
        self.made_directories.remove(&directory);
        let (bucket, key) = directory;
        self.inodes.unlink(&Node::Directory { bucket, prefix: Some(key) });
        Ok(())
    }

    /// Removes an object, or cancels the job that is making it.
    pub async fn unlink(self: &Arc<Self>, parent: Ino, name: &str) -> Result<()> {
        if let Node::Jobs = self.inodes.node(parent)? {
            return self.cancel_job(name).await;
        }
        let object = self.writable_child(parent, name)?;
        self.check_moved(&object).await?;
        let (bucket, key) = &object;
        let held = self.status_job(bucket, key);
        if held.as_ref().is_some_and(|job| !job.status().status.is_final()) {
            let what = "the job is running; remove the object itself to cancel it";
            return Err(Error::new(ErrorKind::Busy, what).in_file(key.as_str()));
        }
        let detached = self.detach(&object).await?;
        let is_known = detached.is_open() || held.is_some();
        match self.remove_object(&object, is_known).await {
            Err(error) => {
                self.reattach(detached).await;
                Err(error)
            }
            Ok(()) => {
                let ino = self.inodes.unlink(&object_node(&object));
                self.forget_name(detached, ino);
                Ok(())
            }
        }
    }

    /// Removes what the bucket has under a name, and all that is known of it. `is_known` says that there is something
    /// besides.
    async fn remove_object(self: &Arc<Self>, object: &ObjectName, is_known: bool) -> Result<()> {
        let (bucket, key) = object;
        // What a program wrote is a file like any other; an export is cancelled.
        self.publisher.wait_for_previous(object, CANCEL_LIMIT).await;
        if let Some(job) = self.jobs.active(bucket, key) {
            job.cancel();
            match job.ended(CANCEL_LIMIT).await {
                // It was being put in place already.
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::TimedOut => return Err(e),
                Err(_) => return Ok(()),
            }
        }
        let store = self.bucket(bucket)?;
        if !self.jobs.remove(store, key).await? {
            if !is_known {
                return Err(no_entry(key.as_str()));
            }
            self.remove_sidecars(object).await;
        }
        if self.jobs.has_sidecars(key) {
            self.jobs.forget(bucket, key);
            self.forget_recent_sidecars(bucket, key);
        }
        self.forget_attributes(object, false).await;
        self.requests.forget(object);
        if let Some(base) = key.as_str().strip_suffix(STATUS_SUFFIX)
            && let Ok(base) = ObjectKey::parse(base)
        {
            self.jobs.forget(bucket, &base);
        }
        self.keep_directory_of(object).await;
        Ok(())
    }

    /// The sidecars of an object that is gone go too. One that cannot be removed now does no harm but being there.
    async fn remove_sidecars(&self, (bucket, key): &ObjectName) {
        if !self.jobs.has_sidecars(key) {
            return;
        }
        let removed = async { self.jobs.remove_sidecars(self.bucket(bucket)?, key).await };
        if let Err(error) = removed.await {
            warn!(%key, "sidecars stay although their object is gone: {}", error.report());
        }
    }

    fn forget_recent_sidecars(&self, bucket: &str, key: &ObjectKey) {
        let sidecars = Sidecar::ALL.into_iter().filter_map(|sidecar| sidecar.key_for(key).ok());
        sidecars.for_each(|sidecar| self.recent.forget(&(bucket.to_owned(), sidecar)));
    }

    /// Removing the file of a job that runs cancels it; what the object's name has stays.
    async fn cancel_job(self: &Arc<Self>, name: &str) -> Result<()> {
        let job =
            name.strip_suffix(".json").and_then(|id| self.jobs.job(id)).ok_or_else(|| no_entry(name))?;
        if job.status().status.is_final() {
            return Err(
                Error::new(ErrorKind::ReadOnly, "the job has ended, and its record stays").in_file(name)
            );
        }
        job.cancel();
        match job.ended(CANCEL_LIMIT).await {
            Ok(_) => {
                Err(Error::new(ErrorKind::Busy, "the job ended before it could be cancelled").in_file(name))
            }
            Err(error) if error.kind() == ErrorKind::TimedOut => Err(error),
            Err(_) => Ok(()),
        }
    }

    /// Gives a file under rsync's temporary name its own, and publishes it: the upload is one for that name, and done
    /// when this returns. With the modification time 0 it is what rsync keeps of a transfer that was interrupted
    /// (`--partial`): it gets its name and waits for the rest.
    async fn rename_parked(
        self: &Arc<Self>,
        draft: &Arc<Draft>,
        from: &ObjectName,
        to: &ObjectName,
    ) -> Result<()> {
        self.load_attributes(to).await?;
        let replaced = self.detach(to).await?;
        self.drafts.rename(draft, to, async { Ok(None) }).await?;
        self.renamed(from, to, replaced);
        self.forget_attributes(from, false).await;
        if self.is_marked_partial(to).await? {
            draft.give_up_early_upload().await;
            return Ok(());
        }
        draft.unpark();
        let published = draft.publish_now(&self.publisher).await;
        self.drafts.remove_closed(draft);
        published
    }

    /// Renames an object, open or not. The bucket has it under the new name before it is removed under the old one; what
    /// was written to it and is not published yet is published under the new name.
    async fn rename_object(
        self: &Arc<Self>,
        from: &ObjectName,
        to: &ObjectName,
        exclusive: bool,
    ) -> Result<()> {
        self.check_settled(from).await?;
        self.check_settled(to).await?;
        self.load_attributes(to).await?;
        let set = self.attributes_to_move(from).await?;
        let replaced = self.detach(to).await?;
        let draft = self.drafts.named(from);
        let moving = async {
            // A last close may have begun to publish them; nothing is published from here on.
            self.check_settled(from).await?;
            self.check_settled(to).await?;
            let is_new = draft.as_ref().is_some_and(|draft| !draft.is_published());
            match self.jobs.rename(self.bucket(&from.0)?, &from.1, &to.1, exclusive).await {
                Ok(renamed) => Ok(Some(renamed)),
                // Nothing of it was published yet.
                Err(error) if error.kind() == ErrorKind::NotFound && is_new => Ok(None),
                Err(error) => Err(error),
            }
        };
        let moved = match &draft {
            Some(draft) => self.drafts.rename(draft, to, moving).await,
            None => moving.await,
        };
        let renamed = match moved {
            Ok(renamed) => renamed,
            Err(error) => {
                self.reattach(replaced).await;
                return Err(error);
            }
        };
        self.renamed(from, to, replaced);
        [from, to].into_iter().for_each(|name| self.forget_recent_sidecars(&name.0, &name.1));
        if let Some(parent) = to.1.parent() {
            // The store has it now.
            self.made_directories.remove(&(to.0.clone(), parent));
        }
        self.keep_directory_of(from).await;
        self.forget_attributes(from, false).await;
        self.move_attributes(to, set, renamed).await
    }

    /// What is known of a file goes with it to its new name.
    fn renamed(&self, from: &ObjectName, to: &ObjectName, replaced: Detached) {
        self.attributes.move_pending(from, to);
        let ino = self.inodes.rename(&object_node(from), &object_node(to));
        self.forget_name(replaced, ino);
        self.recent.forget(from);
        self.requests.rename(from, to);
    }

    /// Renames an object: a copy within the store, then a delete. It stays the same file for those who have it open, and
    /// so does one that had the new name before, for those who have that open.
    pub async fn rename(
        self: &Arc<Self>,
        parent: Ino,
        name: &str,
        new_parent: Ino,
        new_name: &str,
        exclusive: bool,
    ) -> Result<()> {
        let from = self.writable_child(parent, name)?;
        let to = self.writable_child(new_parent, new_name)?;
        if from == to {
            return self.resolve_object(from.0, from.1).await.map(drop);
        }
        self.check_moved(&from).await?;
        self.check_moved(&to).await?;
        if from.0 != to.0 {
            return Err(Error::new(ErrorKind::CrossDevice, "a rename from one bucket to another is a copy"));
        }
        if let (Node::Directory { .. }, _) = self.resolve_object(from.0.clone(), from.1.clone()).await? {
            return Err(Error::new(
                ErrorKind::CrossDevice,
                "a directory of a bucket cannot be renamed, only copied",
            ));
        }
        let target = self.resolve_object(to.0.clone(), to.1.clone()).await;
        match target {
            Ok((Node::Directory { .. }, _)) => {
                return Err(Error::new(ErrorKind::IsDirectory, format!("{} is a directory", to.1)));
            }
            Ok(_) if exclusive => {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("{} exists", to.1)));
            }
            _ => {}
        }
        self.permit_rename(&from, &to).await?;
        match self.drafts.named(&from).filter(|draft| draft.is_parked()) {
            Some(draft) => {
                self.check_settled(&to).await?;
                self.rename_parked(&draft, &from, &to).await
            }
            None => self.rename_object(&from, &to, exclusive).await,
        }
    }
}
