//! The drafts of a mount: which name leads to which, who has them open, and which have no name any more.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tracing::info;

use super::super::ObjectName;
use super::super::attr::Attr;
use super::super::inode::Ino;
use super::Draft;
use super::publish::Publisher;
use super::rsync::rsync_target;
use crate::error::Result;
use crate::export::moves::Renamed;

/// Files under a temporary name that nobody has open and that wait for their own: more than that, and the oldest is
/// given up. One that is left by a killed rsync never gets its name.
const PARKED: usize = 32;

/// How long a file under a temporary name waits, and what an interrupted transfer has left under its own.
const TEMPORARY_AGE: Duration = Duration::from_secs(3600);
const PARTIAL_AGE: Duration = Duration::from_secs(24 * 3600);

/// All drafts.
#[derive(Default)]
pub(in super::super) struct Drafts {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    named: HashMap<ObjectName, Arc<Draft>>,
    unlinked: HashMap<Ino, Unlinked>,
}

/// An open file without a name.
#[derive(Clone)]
pub(in super::super) struct Unlinked {
    pub(in super::super) draft: Arc<Draft>,
    /// Its attributes when it lost its name; what is set later is set here.
    pub(in super::super) attr: Attr,
}

impl Drafts {
    /// The draft that a name leads to.
    pub(in super::super) fn named(&self, object: &ObjectName) -> Option<Arc<Draft>> {
        self.table.lock().named.get(object).cloned()
    }

    /// The names that lead to content which the bucket does not have.
    pub(in super::super) fn unpublished_names(&self) -> Vec<ObjectName> {
        let table = self.table.lock();
        table.named.iter().filter(|(_, draft)| !draft.is_published()).map(|(name, _)| name.clone()).collect()
    }

    /// The open file that has this number and no name.
    pub(in super::super) fn unlinked(&self, ino: Ino) -> Option<Unlinked> {
        self.table.lock().unlinked.get(&ino).cloned()
    }

    /// Changes the attributes of an open file without a name.
    pub(in super::super) fn change_unlinked(&self, ino: Ino, change: impl FnOnce(&mut Attr)) {
        if let Some(unlinked) = self.table.lock().unlinked.get_mut(&ino) {
            change(&mut unlinked.attr);
        }
    }

    /// One handle more on the draft of a name; `make` makes it where there is none.
    pub(in super::super) fn open(
        &self,
        object: &ObjectName,
        write: bool,
        make: impl FnOnce() -> Draft,
    ) -> Arc<Draft> {
        let mut table = self.table.lock();
        let draft = table.named.entry(object.clone()).or_insert_with(|| Arc::new(make()));
        draft.open_handle(write);
        Arc::clone(draft)
    }

    /// One handle more on a draft, whatever its name is.
    pub(in super::super) fn open_again(&self, draft: &Arc<Draft>, write: bool) {
        let _table = self.table.lock();
        draft.open_handle(write);
    }

    /// The name does not lead to this draft any more, whose handles keep it.
    pub(in super::super) fn detach(&self, draft: &Arc<Draft>) {
        let mut table = self.table.lock();
        table.remove_named(draft);
    }

    /// The name leads to the draft again.
    pub(in super::super) fn attach(&self, draft: &Arc<Draft>) {
        self.table.lock().named.entry(draft.object()).or_insert_with(|| Arc::clone(draft));
    }

    /// The draft, which is detached, is found by this number as long as somebody has it open.
    pub(in super::super) fn keep_unlinked(&self, ino: Ino, unlinked: Unlinked) {
        let mut table = self.table.lock();
        if !unlinked.draft.is_closed() {
            table.unlinked.insert(ino, unlinked);
        }
    }

    /// Another name leads to the draft, when `moving` has moved what the bucket has of it, if it has. Nothing is
    /// published meanwhile.
    pub(in super::super) async fn rename(
        &self,
        draft: &Arc<Draft>,
        to: &ObjectName,
        moving: impl Future<Output = Result<Option<Renamed>>>,
    ) -> Result<Option<Renamed>> {
        let mut state = draft.lock().await;
        let moved = moving.await?;
        let from = draft.object();
        draft.set_object(&mut state, to, moved.as_ref());
        let mut table = self.table.lock();
        if table.named.get(&from).is_some_and(|known| Arc::ptr_eq(known, draft)) {
            table.named.remove(&from);
        }
        if !draft.is_closed() || draft.is_parked() {
            table.named.insert(to.clone(), Arc::clone(draft));
        }
        Ok(moved)
    }

    /// One handle fewer. The last one that writes publishes, and the last one of all takes the draft away; who opens the
    /// key meanwhile shares it.
    pub(in super::super) async fn close(&self, draft: &Arc<Draft>, write: bool, publisher: &Publisher) {
        loop {
            if self.close_now(draft, write) {
                break;
            }
            draft.publish_last(publisher).await;
        }
        self.give_up_parked(SystemTime::now());
    }

    /// Returns whether the handle was taken away; otherwise there is something to publish before.
    fn close_now(&self, draft: &Arc<Draft>, write: bool) -> bool {
        // Handles are counted under this lock, so that nobody opens a draft that is being taken away.
        let mut table = self.table.lock();
        let is_last_writer = write && draft.writers.load(Ordering::SeqCst) == 1;
        if is_last_writer && draft.is_unpublished() && !draft.is_parked() {
            return false;
        }
        if write {
            draft.writers.fetch_sub(1, Ordering::SeqCst);
        }
        if draft.handles.fetch_sub(1, Ordering::SeqCst) == 1 {
            if !draft.is_parked() {
                table.remove_named(draft);
            }
            table.unlinked.retain(|_, unlinked| !Arc::ptr_eq(&unlinked.draft, draft));
        }
        true
    }

    /// Takes a draft that was published away if nobody has it open.
    pub(in super::super) fn remove_closed(&self, draft: &Arc<Draft>) {
        let mut table = self.table.lock();
        if draft.is_closed() {
            table.remove_named(draft);
        }
    }

    /// Gives up files that wait too long for their own name, and the oldest where there are too many.
    pub(in super::super) fn give_up_parked(&self, now: SystemTime) {
        let mut table = self.table.lock();
        let is_waiting = |draft: &&Arc<Draft>| draft.is_parked() && draft.is_closed();
        let mut waiting: Vec<_> = table.named.values().filter(is_waiting).cloned().collect();
        waiting.sort_by_key(|draft| std::cmp::Reverse(draft.modified()));
        let is_old = |draft: &Draft| {
            let is_temporary = rsync_target(draft.object().1.file_name()).is_some();
            let limit = if is_temporary { TEMPORARY_AGE } else { PARTIAL_AGE };
            draft.modified().and_then(|at| now.duration_since(at).ok()).is_some_and(|age| age > limit)
        };
        for (index, draft) in waiting.iter().enumerate() {
            if index >= PARKED || is_old(draft) {
                info!(key = %draft.object().1, "given up: a file under a temporary name that got no other");
                table.remove_named(draft);
            }
        }
    }

    /// Everything that a name leads to.
    pub(in super::super) fn all_named(&self) -> Vec<Arc<Draft>> {
        self.table.lock().named.values().cloned().collect()
    }
}

impl Table {
    fn remove_named(&mut self, draft: &Arc<Draft>) {
        let object = draft.object();
        if self.named.get(&object).is_some_and(|known| Arc::ptr_eq(known, draft)) {
            self.named.remove(&object);
        }
    }
}

impl Draft {
    fn open_handle(&self, write: bool) {
        self.handles.fetch_add(1, Ordering::SeqCst);
        if write {
            self.writers.fetch_add(1, Ordering::SeqCst);
        }
    }
}
