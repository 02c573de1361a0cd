//! What recent listings say of objects, so that look-ups of what was just listed ask nobody.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use super::ObjectName;
use crate::bucket::ObjectMeta;

/// How long a listing answers look-ups of the objects in it, so that `ls -l` asks once a page and not once a name.
const RECENT: Duration = Duration::from_secs(5);

/// Objects of listings that are remembered.
const RECENT_OBJECTS: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// What recent listings say.
pub(super) struct RecentObjects {
    /// When it was listed, and as what; or when it was changed here.
    known: Mutex<LruCache<ObjectName, (Instant, Option<ObjectMeta>)>>,
}

impl Default for RecentObjects {
    fn default() -> Self {
        Self { known: Mutex::new(LruCache::new(RECENT_OBJECTS)) }
    }
}

impl RecentObjects {
    /// The object, if a recent listing had it.
    pub(super) fn get(&self, object: &ObjectName) -> Option<ObjectMeta> {
        let known = self.known.lock();
        known.peek(object).filter(|(at, _)| at.elapsed() < RECENT).and_then(|(_, meta)| meta.clone())
    }

    /// Something happens to the object: what is listed until now is not to be used.
    pub(super) fn forget(&self, object: &ObjectName) {
        self.known.lock().put(object.clone(), (Instant::now(), None));
    }

    /// A listing that was asked for at `asked` has the object.
    pub(super) fn insert(&self, asked: Instant, bucket: &str, meta: &ObjectMeta) {
        let mut known = self.known.lock();
        let object = (bucket.to_owned(), meta.key.clone());
        if known.peek(&object).is_none_or(|(at, _)| *at < asked) {
            known.put(object, (asked, Some(meta.clone())));
        }
    }
}
