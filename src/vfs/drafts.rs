//! Opening and closing objects, and taking them away from under those who have them open.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::draft::{Draft, Unlinked};
use super::inode::{Ino, Node};
use super::{Attr, AttrChange, ObjectName, Vfs};
use crate::error::{Error, ErrorKind, Result};

/// How long a rename waits for the job that publishes what a program wrote.
const PREVIOUS_LIMIT: Duration = Duration::from_secs(10);

/// How often files under temporary names are looked at.
const PARKED_INTERVAL: Duration = Duration::from_secs(60);

/// How an object is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub(super) write: bool,
    /// Whether it is cut to nothing.
    pub(super) truncate: bool,
    /// Whether it may be new.
    pub(super) create: bool,
}

/// An object whose name is being taken away, and the draft that had it.
pub(super) struct Detached {
    object: ObjectName,
    open: Option<(Arc<Draft>, Option<Attr>, bool)>,
}

impl Detached {
    /// Whether somebody has it open.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }
}

impl Vfs {
    /// One more handle on what a key leads to: the file that is open already, if it still is what the bucket has, or
    /// that a job is making, or the object.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) when it is to be written and an image is exported to it;
    /// [`SourceChanged`](ErrorKind::SourceChanged) when there is nothing, so that the kernel looks the name up again.
    pub(super) async fn open_draft(&self, object: &ObjectName, how: Opening) -> Result<Arc<Draft>> {
        let (bucket, key) = object;
        if how.write {
            self.check_moved(object).await?;
            self.check_not_exporting(object)?;
        }
        let known = self.drafts.named(object);
        let job = self.jobs.active(bucket, key);
        let draft = match (known, job.filter(|job| job.file().is_some())) {
            (known, _) if how.write && how.truncate || known.as_ref().is_some_and(|d| !d.is_published()) => {
                self.drafts.open(object, how.write, || Draft::empty(object.clone()))
            }
            (_, Some(job)) => self.drafts.open(object, how.write, || Draft::of_job(object.clone(), job)),
            (known, None) => {
                let meta = self.bucket(bucket)?.head(key).await?;
                if let Some(known) = known
                    && !known.is_current(meta.as_ref()).await
                {
                    self.drafts.detach(&known);
                }
                let gone = || Error::new(ErrorKind::SourceChanged, "there is no such object any more");
                let make = match meta {
                    Some(meta) => Draft::over(object.clone(), &meta),
                    None if how.create => Draft::empty(object.clone()),
                    None => return Err(gone().in_file(key.as_str())),
                };
                self.drafts.open(object, how.write, || make)
            }
        };
        if how.write {
            self.begin_attributes(object).await;
        }
        self.begin_handle(&draft, how).await.map(|()| draft)
    }

    /// One more handle on an open file that has no name.
    pub(super) async fn open_unlinked(&self, ino: Ino, how: Opening) -> Result<Arc<Draft>> {
        let gone = || Error::new(ErrorKind::SourceChanged, format!("inode {} was removed", ino.0));
        let draft = self.drafts.unlinked(ino).ok_or_else(gone)?.draft;
        self.drafts.open_again(&draft, how.write);
        self.begin_handle(&draft, how).await.map(|()| draft)
    }

    async fn begin_handle(&self, draft: &Arc<Draft>, how: Opening) -> Result<()> {
        if how.write {
            // Somebody else writes what rsync left of a transfer: it is an ordinary file from now on.
            draft.unpark();
        }
        if how.write && how.truncate {
            self.note_written(draft);
            return draft.truncate(&self.publisher, 0).await;
        }
        Ok(())
    }

    /// Bytes of a file were written: a time that was set before does not hold any more. One that has lost its name is
    /// not what has that name now.
    pub(super) fn note_written(&self, draft: &Arc<Draft>) {
        let object = draft.object();
        if self.drafts.named(&object).is_some_and(|named| Arc::ptr_eq(&named, draft)) {
            self.attributes.written_after(&object);
        }
    }

    /// Refuses to write what an image is exported to, and the status of that.
    fn check_not_exporting(&self, object: &ObjectName) -> Result<()> {
        let busy = |what: &str| Err(Error::new(ErrorKind::Busy, what).in_file(object.1.as_str()));
        if self.status_job(&object.0, &object.1).is_some() {
            return busy("the job is running and writes this file");
        }
        match self.jobs.active(&object.0, &object.1) {
            Some(job)
                if job.request().source.image().is_some() && !self.publisher.is_repeat(object, &job) =>
            {
                busy("a job is making this object")
            }
            _ => Ok(()),
        }
    }

    /// Waits for a rename or a removal that is not over.
    pub(super) async fn check_moved(&self, object: &ObjectName) -> Result<()> {
        self.jobs.check_moved(&object.0, &object.1, PREVIOUS_LIMIT).await
    }

    /// Refuses to touch what a job is making; one that publishes what a program wrote is waited for.
    pub(super) async fn check_settled(&self, object: &ObjectName) -> Result<()> {
        let end = Instant::now() + PREVIOUS_LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            self.publisher.wait_for_previous(object, left).await;
            let Some(job) = self.jobs.active(&object.0, &object.1) else { return Ok(()) };
            let is_image = job.request().source.image().is_some();
            if is_image && self.publisher.is_repeat(object, &job) {
                return Ok(());
            }
            // A last close may have begun to publish in this moment.
            if is_image || left.is_zero() {
                let busy = Error::new(ErrorKind::Busy, "a job is making this object");
                return Err(busy.in_file(object.1.as_str()));
            }
        }
    }

    /// Gives up, for ever, files that killed programs left under temporary names.
    pub async fn keep_drafts_bounded(&self) {
        loop {
            tokio::time::sleep(PARKED_INTERVAL).await;
            self.drafts.give_up_parked(SystemTime::now());
        }
    }

    /// The mount has ended: what programs have closed is handed to jobs, and what they were still writing is not. The
    /// kernel does not send every last close before an unmount.
    pub async fn end_drafts(&self) {
        let end = |draft: Arc<Draft>| async move {
            if draft.is_unpublished() && draft.is_flushed() && !draft.is_parked() {
                draft.publish_last(&self.publisher).await;
            }
            draft.give_up_early_upload().await;
        };
        futures::future::join_all(self.drafts.all_named().into_iter().map(end)).await;
    }

    /// Takes the name away from the draft that has it open, whose handles keep it.
    pub(super) async fn detach(self: &Arc<Self>, object: &ObjectName) -> Result<Detached> {
        let Some(draft) = self.drafts.named(object) else {
            return Ok(Detached { object: object.clone(), open: None });
        };
        let attr = self.resolve_object(object.0.clone(), object.1.clone()).await.ok().map(|(_, attr)| attr);
        let was_dirty = draft.unlink(&self.publisher).await?;
        self.drafts.detach(&draft);
        Ok(Detached { object: object.clone(), open: Some((draft, attr, was_dirty)) })
    }

    /// The name could not be taken away after all.
    pub(super) async fn reattach(&self, detached: Detached) {
        if let Some((draft, _, was_dirty)) = detached.open {
            draft.relink(was_dirty).await;
            self.drafts.attach(&draft);
        }
    }

    /// The name is gone: the file is known by its number alone, if the kernel knows that.
    pub(super) fn forget_name(&self, detached: Detached, ino: Option<Ino>) {
        self.recent.forget(&detached.object);
        if let (Some((draft, Some(attr), _)), Some(ino)) = (detached.open, ino) {
            self.drafts.keep_unlinked(ino, Unlinked { draft, attr });
        }
    }

    /// The attributes of a number that no name leads to any more.
    pub(super) fn unlinked_attr(&self, ino: Ino) -> Result<Attr> {
        let gone = || Error::new(ErrorKind::SourceChanged, format!("inode {} was removed", ino.0));
        let Unlinked { draft, attr } = self.drafts.unlinked(ino).ok_or_else(gone)?;
        let modified = draft.modified().unwrap_or(attr.modified);
        Ok(Attr { ino, file_size: draft.file_size(), modified, nlink: 0, ttl: Duration::ZERO, ..attr })
    }

    /// Changes the attributes of an open file that no name leads to: they go with it.
    pub(super) async fn set_unlinked_attr(&self, ino: Ino, change: &AttrChange) -> Result<()> {
        let gone = || Error::new(ErrorKind::SourceChanged, format!("inode {} was removed", ino.0));
        let draft = self.drafts.unlinked(ino).ok_or_else(gone)?.draft;
        if let Some(file_size) = change.file_size {
            draft.truncate(&self.publisher, file_size).await?;
        }
        self.drafts.change_unlinked(ino, |attr| {
            attr.mode = change.mode.unwrap_or(attr.mode);
            attr.uid = change.uid.unwrap_or(attr.uid);
            attr.gid = change.gid.unwrap_or(attr.gid);
            attr.modified = change.modified.unwrap_or(attr.modified);
            attr.changed = SystemTime::now();
        });
        Ok(())
    }
}

/// An object's node.
pub(super) fn object_node((bucket, key): &ObjectName) -> Node {
    Node::Object { bucket: bucket.clone(), key: key.clone() }
}
