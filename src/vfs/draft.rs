//! A draft: an open object of a bucket, with what was written to it, until the job that publishes it.
//!
//! It is a file in the sense of Unix. A name leads to it, and handles hold it, whatever becomes of the name: reads, writes
//! and sizes through a handle are those of the file that was opened. What holds:
//!
//! - All handles on one file, whenever they were opened, see the same bytes, those that any of them wrote last.
//! - A file that was removed or replaced by a rename keeps its bytes for those who have it open, as far as they were
//!   written here or are no more than [`KEPT`] and come within [`KEPT_LIMIT`]; reads of another one that only the bucket
//!   had fail with ESTALE. Nothing of it is published any more.
//! - A file that was renamed is published under its new name from then on, whatever was written before or after.
//! - Another host's new version of the object is another file: handles keep the old one, and what they read of it later
//!   fails with ESTALE.
//!
//! Bytes arrive in two ways. Ranges of an image file (copy_file_range) are only recorded; when they cover the
//! whole file, closing starts a job that reads the image itself. Anything else is staged in a file, and closing
//! uploads that and waits. A mix is staged as a whole: content is right whatever came. The first write to what the
//! bucket has fetches it into such a file; only those who use this file wait for that.

mod content;
mod publish;
mod ranges;
mod rsync;
mod source;
mod staged;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tracing::warn;

use self::content::{Content, Place, Published, State, View};
pub(super) use self::publish::{PublishOptions, Publisher};
use self::ranges::Ranges;
pub(super) use self::rsync::rsync_target;
pub(super) use self::source::RangeSource;
use self::staged::Staged;
pub(super) use self::table::{Drafts, Unlinked};
use super::ObjectName;
use super::lanes::Lane;
use crate::bucket::ObjectMeta;
use crate::error::{Error, ErrorKind, Result};
use crate::export::Job;
use crate::export::moves::Renamed;
use crate::format::OutputFormat;
use crate::units::{FileOffset, MIB};

/// Bytes of an object that are fetched to be kept for those who have it open when it is removed or replaced.
const KEPT: u64 = 256 * MIB;

/// How long that may take.
const KEPT_LIMIT: Duration = Duration::from_secs(10);

/// An open object. Shared by all handles on it.
///
/// What look-ups and listings need is kept beside the state, because the state is locked while bytes are fetched.
pub(super) struct Draft {
    object: Mutex<ObjectName>,
    state: tokio::sync::Mutex<State>,
    view: Mutex<View>,
    handles: AtomicUsize,
    /// Those of the handles that write.
    writers: AtomicUsize,
    /// A file under a temporary name, which is published when it gets its own.
    parked: AtomicBool,
}

impl Draft {
    fn with_content(object: ObjectName, content: Content) -> Self {
        let dirty = matches!(content, Content::Empty);
        let modified = dirty.then(SystemTime::now);
        let state = State { content, dirty, flushed: false, refused: None, modified, linked: true };
        Self {
            object: Mutex::new(object),
            view: Mutex::new(state.view()),
            state: tokio::sync::Mutex::new(state),
            handles: AtomicUsize::new(0),
            writers: AtomicUsize::new(0),
            parked: AtomicBool::new(false),
        }
    }

    /// A file that is new.
    pub(super) fn empty(object: ObjectName) -> Self {
        Self::with_content(object, Content::Empty)
    }

    /// A file that the bucket has.
    pub(super) fn over(object: ObjectName, meta: &ObjectMeta) -> Self {
        let published =
            Published { file_size: meta.object_size, etag: meta.etag.clone(), ..Published::default() };
        Self::with_content(object, Content::Published(published))
    }

    /// A file that a job is making.
    pub(super) fn of_job(object: ObjectName, job: Arc<Job>) -> Self {
        let lane = match job.request().source.image() {
            Some(image) => Lane::Image(image.id.clone()),
            None => Lane::Staging,
        };
        let file = job.file();
        let file_size = file.as_ref().map_or(0, |file| file.file_size());
        let place = file.map(|file| Place::File(lane, file));
        let published = Published { file_size, etag: None, job: Some(job), place };
        Self::with_content(object, Content::Published(published))
    }

    /// The state, to be changed. What others see of it follows when the guard is dropped.
    async fn lock(&self) -> Locked<'_> {
        Locked { view: &self.view, state: self.state.lock().await }
    }

    /// From now on closing does not publish it; renaming does.
    pub(super) fn park(&self) {
        self.parked.store(true, Ordering::SeqCst);
    }

    /// Closing publishes it again.
    pub(super) fn unpark(&self) {
        self.parked.store(false, Ordering::SeqCst);
    }

    /// Whether the draft waits for its own name.
    pub(super) fn is_parked(&self) -> bool {
        self.parked.load(Ordering::SeqCst)
    }

    /// What it is published as.
    pub(super) fn object(&self) -> ObjectName {
        self.object.lock().clone()
    }

    /// Whether what it was made of is still what the key has, given what the bucket has now.
    pub(super) async fn is_current(&self, meta: Option<&ObjectMeta>) -> bool {
        let state = self.lock().await;
        let Content::Published(published) = &state.content else { return true };
        let made = published.job.as_ref().map(|job| job.status());
        let etag = match made {
            Some(status) if !status.status.is_final() => return true,
            // A copy under another name may have another tag than the job's.
            made => published.etag.clone().or(made.and_then(|status| status.etag)),
        };
        meta.is_some_and(|meta| etag.is_some() && meta.etag == etag)
    }

    /// Whether the last close has something to publish.
    pub(super) fn is_unpublished(&self) -> bool {
        self.view.lock().unpublished
    }

    /// Whether a program has closed it after it changed it for the last time.
    pub(super) fn is_flushed(&self) -> bool {
        self.view.lock().flushed
    }

    /// Bytes that the file has now.
    pub(super) fn file_size(&self) -> u64 {
        self.view.lock().file_size
    }

    /// Whether all that was written has been handed to a job, or nothing was written yet.
    pub(super) fn is_published(&self) -> bool {
        self.view.lock().published
    }

    /// When something was last written here.
    pub(super) fn modified(&self) -> Option<SystemTime> {
        self.view.lock().modified
    }

    /// The error that every later write repeats.
    pub(super) fn refusal(&self) -> Option<Error> {
        self.view.lock().refused.clone()
    }

    /// From now on every write and flush fails like this, until the file is truncated.
    pub(super) async fn refuse(&self, error: &Error) {
        let _ = self.lock().await.refuse::<()>(error.clone());
    }

    /// No name leads to it any more: nothing of it is published, and who has it open keeps its bytes. Returns whether
    /// there was something to publish, for [`relink`](Self::relink).
    pub(super) async fn unlink(&self, publisher: &Publisher) -> Result<bool> {
        let mut state = self.lock().await;
        let is_kept = match &state.content {
            Content::Published(published) => matches!(published.place, Some(Place::File(..))),
            _ => true,
        };
        if !is_kept && !self.is_closed() && state.file_size() <= KEPT {
            let staged = self.stage(publisher, &mut state, u64::MAX);
            match tokio::time::timeout(KEPT_LIMIT, staged).await {
                // It is gone already.
                Ok(Err(error)) if error.kind() == ErrorKind::SourceChanged => {}
                // The name is not to wait for bytes that do not come, and neither is its directory, which the kernel locks.
                Ok(Err(error)) if error.is_transient() => {
                    warn!(key = %self.object().1, "who has it open reads no more of it: {}", error.report());
                }
                Err(_) => {
                    warn!(key = %self.object().1, "who has it open reads no more of it: it came too slowly")
                }
                Ok(staged) => staged?,
            }
        }
        if let Content::Staged(staged) = &mut state.content {
            // Given up: it is sent to nowhere any more.
            drop(staged.take_early_upload());
        }
        let was_dirty = state.dirty;
        (state.linked, state.dirty) = (false, false);
        Ok(was_dirty)
    }

    /// The name could not be taken away: it leads to the file again.
    pub(super) async fn relink(&self, was_dirty: bool) {
        let mut state = self.lock().await;
        (state.linked, state.dirty) = (true, was_dirty);
    }

    /// From now on it is published as `object`. Whoever has it open keeps it.
    fn set_object(&self, state: &mut State, object: &ObjectName, renamed: Option<&Renamed>) {
        *self.object.lock() = object.clone();
        if let Content::Published(published) = &mut state.content {
            // What the bucket has of it has another key, and may have another tag.
            published.etag = renamed.and_then(|renamed| renamed.to.etag.clone());
            published.place.take_if(|place| !matches!(place, Place::File(..)));
        }
    }

    /// Whether it is open for writing more than once, or was and the last close is still to come.
    pub(super) fn has_other_writers(&self) -> bool {
        self.writers.load(Ordering::SeqCst) > 1
    }

    /// Whether nobody has it open.
    pub(super) fn is_closed(&self) -> bool {
        self.handles.load(Ordering::SeqCst) == 0
    }

    /// Writes bytes from anywhere.
    pub(super) async fn write(&self, publisher: &Publisher, at: FileOffset, bytes: Vec<u8>) -> Result<()> {
        let mut state = self.lock().await;
        state.check()?;
        self.check_written_name(publisher, &mut state)?;
        let result = match self.stage(publisher, &mut state, u64::MAX).await {
            Ok(()) => {
                let write = move |staged: &mut Staged| staged.write(at, &bytes);
                state.with_staged(&publisher.lanes, Lane::Staging, write).await
            }
            Err(error) => Err(error),
        };
        self.send_early(publisher, &mut state);
        state.touched(result)
    }

    /// Writes bytes now, if nothing has to be waited for: the bytes are staged already, and nobody changes them.
    pub(super) fn try_write(
        &self,
        publisher: &Publisher,
        at: FileOffset,
        bytes: &[u8],
    ) -> Option<Result<()>> {
        let mut state = Locked { view: &self.view, state: self.state.try_lock().ok()? };
        if state.check().is_err() || !matches!(state.content, Content::Staged(_)) {
            return None;
        }
        let result = state.staged().and_then(|staged| staged.write(at, bytes));
        self.send_early(publisher, &mut state);
        Some(state.touched(result))
    }

    /// Records that bytes of an image file stand at `at`, or stages them when they are not at their own place. What is
    /// refused sticks.
    pub(super) async fn copy_range(
        &self,
        publisher: &Publisher,
        source: &RangeSource,
        from: FileOffset,
        at: FileOffset,
        length: u64,
    ) -> Result<u64> {
        let mut state = self.lock().await;
        state.check()?;
        let length = length.min(source.whole_size().saturating_sub(from.bytes()));
        if length == 0 {
            return Ok(0);
        }
        if let Err(error) = self.check_name(source.format) {
            return state.refuse(error);
        }
        if from != at || !state.content.accepts(source) {
            let result = self.copy_staged(publisher, &mut state, source, (from, at, length)).await;
            self.send_early(publisher, &mut state);
            return state.touched(result);
        }
        if !matches!(state.content, Content::Ranges { .. }) {
            state.content =
                Content::Ranges { source: source.clone(), ranges: Ranges::default(), file_size: 0 };
        }
        if let Content::Ranges { ranges, file_size, .. } = &mut state.content {
            ranges.insert(at.bytes(), at.bytes() + length);
            *file_size = (*file_size).max(at.bytes() + length);
        }
        state.touched(Ok(length))
    }

    /// Copies bytes of an image into the staged file.
    async fn copy_staged(
        &self,
        publisher: &Publisher,
        state: &mut State,
        source: &RangeSource,
        (from, at, length): (FileOffset, FileOffset, u64),
    ) -> Result<u64> {
        self.stage(publisher, state, u64::MAX).await?;
        let (file, lane) = (Arc::clone(&source.file), source.lane());
        let copy = move |staged: &mut Staged| {
            let length = length.min(file.exact_size()?.saturating_sub(from.bytes()));
            staged.copy(&*file, from, at, length)?;
            Ok(length)
        };
        state.with_staged(&publisher.lanes, lane, copy).await
    }

    /// Refuses a program's bytes before they are staged and sent, where the name tells that the policy will refuse them. By
    /// their content it is asked at the end.
    fn check_written_name(&self, publisher: &Publisher, state: &mut State) -> Result<()> {
        if matches!(state.content, Content::Staged(_)) {
            return Ok(());
        }
        match self.published_name().map(|object| publisher.permits.written_name(&object)) {
            Some(Err(error)) => state.refuse(error),
            _ => Ok(()),
        }
    }

    /// Begins to send what is staged when there is enough of it.
    fn send_early(&self, publisher: &Publisher, state: &mut State) {
        let linked = state.linked;
        let Content::Staged(staged) = &mut state.content else { return };
        if linked
            && staged.wants_early_upload()
            && let Some((bucket, key)) = self.published_name()
        {
            let tags = publisher.requests.tags(&(bucket.clone(), key.clone()));
            staged.set_early_upload(|file, file_size| {
                publisher.jobs.early_upload(&bucket, &key, tags, file, file_size)
            });
        }
    }

    /// What it will be published as: what rsync writes under a temporary name gets the name within that.
    fn published_name(&self) -> Option<ObjectName> {
        let (bucket, key) = self.object();
        if !self.is_parked() {
            return Some((bucket, key));
        }
        Some((bucket, rsync::final_key(&key)?.ok()?))
    }

    /// The destination's name never converts: a suffix of another format is refused.
    fn check_name(&self, format: OutputFormat) -> Result<()> {
        let key = self.object().1;
        match OutputFormat::split_file_name(key.file_name()) {
            Some((_, named)) if named != format => Err(Error::new(
                ErrorKind::Malformed,
                format!(
                    "the name says {} but the file copied is {}; the source's name chooses the format",
                    named.suffix(),
                    format.suffix()
                ),
            )
            .in_file(key.as_str())),
            _ => Ok(()),
        }
    }

    /// Cuts or extends the file. A cut to nothing also clears a refusal.
    pub(super) async fn truncate(&self, publisher: &Publisher, size: u64) -> Result<()> {
        let mut state = self.lock().await;
        if size == 0 {
            state.content = Content::Empty;
            state.refused = None;
            return state.touched(Ok(()));
        }
        state.check()?;
        match &mut state.content {
            Content::Published(published) if published.file_size == size => return Ok(()),
            Content::Ranges { source, file_size, .. } if source.whole_size() == size => {
                *file_size = size;
                return state.touched(Ok(()));
            }
            _ => {}
        }
        self.check_written_name(publisher, &mut state)?;
        let resize = move |staged: &mut Staged| staged.set_size(size);
        let result = match self.stage(publisher, &mut state, size).await {
            Ok(()) => state.with_staged(&publisher.lanes, Lane::Staging, resize).await,
            Err(error) => Err(error),
        };
        state.touched(result)
    }

    /// Reads what the file has now.
    pub(super) async fn read(&self, publisher: &Publisher, at: FileOffset, length: usize) -> Result<Vec<u8>> {
        let place = {
            let mut state = self.lock().await;
            self.place(publisher, &mut state).await?
        };
        // Who writes meanwhile is not held up.
        place.read(&publisher.lanes, at, length).await
    }
}

/// A draft's state while somebody changes it.
struct Locked<'a> {
    view: &'a Mutex<View>,
    state: tokio::sync::MutexGuard<'a, State>,
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        *self.view.lock() = self.state.view();
    }
}
