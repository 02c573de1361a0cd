//! A draft: an object that is being written, from its creation to the job that publishes it.
//!
//! Bytes arrive in two ways. Ranges of an image file (copy_file_range) are only recorded; when they cover the
//! whole file, closing starts a job that reads the image itself. Anything else is staged in a file, and closing
//! uploads that and waits. A mix is staged as a whole: content is right whatever came.

mod ranges;
mod staged;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use tracing::debug;

use self::ranges::Ranges;
use self::staged::Staged;
use super::lanes::Lane;
use super::{ObjectName, Vfs};
use crate::bucket::{ObjectFile, ObjectKey};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{EarlyUpload, Job, JobRequest, JobSource, StatusImage, staged_file};
use crate::format::OutputFormat;
use crate::image;
use crate::policy::ImageFacts;
use crate::storage::FileStorage;
use crate::units::FileOffset;
use crate::vfile::VirtualFile;

/// An image file as the source of a range.
#[derive(Clone)]
pub(super) struct RangeSource {
    pub(super) file: Arc<dyn VirtualFile>,
    /// The size that was shown when it was opened: that of a compressed file may be larger than the true one.
    pub(super) shown_size: u64,
    pub(super) image: StatusImage,
    pub(super) format: OutputFormat,
    /// What the policy is told of the image.
    pub(super) facts: Arc<ImageFacts>,
}

/// An object being written. Shared by all handles on its key.
///
/// What look-ups and listings need is kept beside the state, because the state is locked while bytes are staged.
pub(super) struct Draft {
    object: Mutex<ObjectName>,
    state: tokio::sync::Mutex<State>,
    view: Mutex<View>,
    pub(super) handles: AtomicUsize,
    /// A file under a temporary name, which is published when it gets its own.
    parked: AtomicBool,
}

/// What others see of a draft.
#[derive(Clone)]
struct View {
    file_size: u64,
    /// Whether what is there has been handed to a job.
    published: bool,
    /// Whether the last close has something to publish.
    unpublished: bool,
    modified: SystemTime,
    refused: Option<Error>,
}

struct State {
    content: Content,
    /// Whether there is something that closing has to publish.
    dirty: bool,
    /// A refusal that every later write and flush repeats, until the file is truncated.
    refused: Option<Error>,
    modified: SystemTime,
    discarded: bool,
}

enum Content {
    /// No byte yet.
    Empty,
    /// Ranges of one image file, each at its own place.
    Ranges { source: RangeSource, ranges: Ranges, file_size: u64 },
    /// Bytes in a file of the staging directory.
    Staged(Staged),
    /// What the bucket has, or will have when the job that was started ends.
    Published { file_size: u64, job: Option<Arc<Job>> },
}

impl Draft {
    /// A draft that starts empty (`truncate`), or with what the bucket has.
    pub(super) fn new(object: ObjectName, published: Option<u64>) -> Self {
        let content = match published {
            Some(file_size) => Content::Published { file_size, job: None },
            None => Content::Empty,
        };
        let dirty = published.is_none();
        let modified = SystemTime::now();
        let state = State { content, dirty, refused: None, modified, discarded: false };
        let view = Mutex::new(state.view());
        let (handles, parked) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { object: Mutex::new(object), state: tokio::sync::Mutex::new(state), view, handles, parked }
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

    /// From now on it is published as `object`. Whoever has it open goes on with it. Fails when it was published
    /// meanwhile.
    pub(super) async fn rename(&self, object: &ObjectName) -> bool {
        let state = self.state.lock().await;
        let unpublished = !matches!(state.content, Content::Published { .. });
        if unpublished {
            *self.object.lock() = object.clone();
        }
        unpublished
    }

    /// Whether nobody has it open.
    pub(super) fn is_closed(&self) -> bool {
        self.handles.load(Ordering::SeqCst) == 0
    }

    /// Publishes what there is, an empty file too, and waits for the job.
    pub(super) async fn publish_now(&self, vfs: &Arc<Vfs>) -> Result<()> {
        let mut state = self.lock().await;
        state.check()?;
        self.check_complete(vfs, &state).await?;
        self.publish(vfs, &mut state).await?;
        let job = state.job();
        drop(state);
        wait_for(vfs, job).await
    }

    /// Whether staged bytes are all that the format that their name tells says there is. A writer that was killed
    /// looks as if it had ended.
    async fn check_complete(&self, vfs: &Arc<Vfs>, state: &State) -> Result<()> {
        let Content::Staged(staged) = &state.content else { return Ok(()) };
        let key = self.object().1;
        let Some((_, format)) = OutputFormat::split_file_name(key.file_name()) else { return Ok(()) };
        let path = staged.path.to_path_buf();
        let check = move |_: &Vfs| image::check_complete(format, Arc::new(FileStorage::open(&path)?));
        vfs.blocking(Lane::Staging, check).await.map_err(|e| e.in_file(key.as_str()))
    }

    /// An image that was opened to be replaced, and of which nothing came, stays: whoever wanted to write it was killed
    /// in its first moment.
    async fn check_emptied(&self, vfs: &Arc<Vfs>, state: &State) -> Result<()> {
        let (bucket, key) = self.object();
        let is_image =
            OutputFormat::split_file_name(key.file_name()).is_some_and(|(_, f)| f != OutputFormat::Raw);
        if !matches!(state.content, Content::Empty) || !is_image {
            return Ok(());
        }
        let there = vfs.bucket(&bucket)?.head(&key).await?;
        if there.is_some_and(|meta| meta.object_size > 0) {
            let what = "nothing was written: the object that was there stays; remove it to have it gone";
            return Err(Error::new(ErrorKind::Incomplete, what).in_file(key.as_str()));
        }
        Ok(())
    }

    /// The state, to be changed. What others see of it follows when the guard is dropped.
    async fn lock(&self) -> Locked<'_> {
        Locked { view: &self.view, state: self.state.lock().await }
    }

    /// What it is published as.
    pub(super) fn object(&self) -> ObjectName {
        self.object.lock().clone()
    }

    pub(super) fn open_handle(&self) {
        self.handles.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether the last close has something to publish.
    pub(super) fn is_unpublished(&self) -> bool {
        self.view.lock().unpublished
    }

    /// Bytes that the file has now.
    pub(super) fn file_size(&self) -> u64 {
        self.view.lock().file_size
    }

    /// Whether all that was written has been handed to a job, or nothing was written yet.
    pub(super) fn is_published(&self) -> bool {
        self.view.lock().published
    }

    /// When something was last written.
    pub(super) fn modified(&self) -> SystemTime {
        self.view.lock().modified
    }

    /// The error that every later write repeats.
    pub(super) fn refusal(&self) -> Option<Error> {
        self.view.lock().refused.clone()
    }

    /// The file was removed while it was open: nothing of it is published.
    pub(super) async fn discard(&self) {
        let mut state = self.lock().await;
        state.discarded = true;
        state.dirty = false;
        state.content = Content::Empty;
    }

    /// Writes bytes from anywhere.
    pub(super) async fn write(&self, vfs: &Arc<Vfs>, at: FileOffset, bytes: Vec<u8>) -> Result<()> {
        vfs.written_after(&self.object());
        let mut state = self.lock().await;
        state.check()?;
        let result = match self.stage(vfs, &mut state).await {
            Ok(()) => {
                let length = bytes.len() as u64;
                let written = state.staged()?.reserve(at, length);
                let write = written.map(|file| move |_: &Vfs| staged::write_all(&file, at, &bytes));
                match write {
                    Ok(write) => vfs.blocking(Lane::Staging, write).await,
                    Err(error) => Err(error),
                }
                .and_then(|()| Ok(state.staged()?.wrote(at, length)))
            }
            Err(error) => Err(error),
        };
        self.send_early(vfs, &mut state);
        state.touched(result)
    }

    /// Writes bytes now, if nothing has to be waited for: the bytes are staged already, and nobody changes them.
    pub(super) fn try_write(&self, vfs: &Vfs, at: FileOffset, bytes: &[u8]) -> Option<Result<()>> {
        let mut state = Locked { view: &self.view, state: self.state.try_lock().ok()? };
        if state.check().is_err() || !matches!(state.content, Content::Staged(_)) {
            return None;
        }
        vfs.written_after(&self.object());
        let length = bytes.len() as u64;
        let result = state.staged().and_then(|staged| {
            let file = staged.reserve(at, length)?;
            staged::write_all(&file, at, bytes)?;
            staged.wrote(at, length);
            Ok(())
        });
        self.send_early(vfs, &mut state);
        Some(state.touched(result))
    }

    /// Records that bytes of an image file stand at `at`, or stages them when they are not at their own place.
    pub(super) async fn copy_range(
        &self,
        vfs: &Arc<Vfs>,
        source: &RangeSource,
        from: FileOffset,
        at: FileOffset,
        length: u64,
    ) -> Result<u64> {
        vfs.written_after(&self.object());
        let mut state = self.lock().await;
        state.check()?;
        let length = length.min(source.whole_size().saturating_sub(from.bytes()));
        if length == 0 {
            return Ok(0);
        }
        let permit = || vfs.permit_export(&source.facts, source.format, &self.object());
        if let Err(error) = self.check_name(source.format).and_then(|()| permit()) {
            return state.refuse(error);
        }
        if from == at && state.content.accepts(source) {
            if !matches!(state.content, Content::Ranges { .. }) {
                state.content =
                    Content::Ranges { source: source.clone(), ranges: Ranges::default(), file_size: 0 };
            }
            if let Content::Ranges { ranges, file_size, .. } = &mut state.content {
                ranges.insert(at.bytes(), at.bytes() + length);
                *file_size = (*file_size).max(at.bytes() + length);
            }
            return state.touched(Ok(length));
        }
        let result = self.copy_staged(vfs, &mut state, source, from, at, length).await;
        self.send_early(vfs, &mut state);
        state.touched(result)
    }

    /// Copies bytes of an image into the staged file.
    async fn copy_staged(
        &self,
        vfs: &Arc<Vfs>,
        state: &mut State,
        source: &RangeSource,
        from: FileOffset,
        at: FileOffset,
        length: u64,
    ) -> Result<u64> {
        self.stage(vfs, state).await?;
        let (file, lane) = (Arc::clone(&source.file), source.lane());
        let copy = move |staged: &mut Staged| {
            let length = length.min(file.exact_size()?.saturating_sub(from.bytes()));
            staged.copy(&*file, from, at, length)?;
            Ok(length)
        };
        state.with_staged(vfs, lane, copy).await
    }

    /// Begins to send what is staged when there is enough of it.
    fn send_early(&self, vfs: &Vfs, state: &mut State) {
        let Content::Staged(staged) = &mut state.content else { return };
        if staged.wants_early_upload()
            && let Some((bucket, key)) = self.published_name()
        {
            let tags = vfs.tags(&(bucket.clone(), key.clone()));
            staged.set_early_upload(|file, file_size| {
                vfs.jobs.early_upload(&bucket, &key, tags, file, file_size)
            });
        }
    }

    /// What it will be published as: what rsync writes under a temporary name gets the name within that.
    fn published_name(&self) -> Option<ObjectName> {
        let (bucket, key) = self.object();
        if !self.is_parked() {
            return Some((bucket, key));
        }
        let name = super::handle::rsync_target(key.file_name())?;
        let key = match key.parent() {
            Some(parent) => parent.child(name),
            None => ObjectKey::parse(name),
        };
        Some((bucket, key.ok()?))
    }

    /// What was sent while it was written is given up.
    pub(super) async fn give_up_early_upload(&self) {
        if let Content::Staged(staged) = &mut self.state.lock().await.content {
            drop(staged.take_early_upload());
        }
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
    pub(super) async fn truncate(&self, vfs: &Arc<Vfs>, size: u64) -> Result<()> {
        vfs.written_after(&self.object());
        let mut state = self.lock().await;
        if size == 0 {
            state.content = Content::Empty;
            state.refused = None;
            state.dirty = true;
            return state.touched(Ok(()));
        }
        state.check()?;
        match &mut state.content {
            Content::Published { file_size, .. } if *file_size == size => return Ok(()),
            Content::Ranges { source, file_size, .. } if source.whole_size() == size => {
                *file_size = size;
                return state.touched(Ok(()));
            }
            _ => {}
        }
        let result = self.stage(vfs, &mut state).await.and_then(|()| state.staged()?.set_size(size));
        state.touched(result)
    }

    /// Reads what was written so far.
    pub(super) async fn read(&self, vfs: &Arc<Vfs>, at: FileOffset, length: usize) -> Result<Vec<u8>> {
        let mut state = self.lock().await;
        if matches!(state.content, Content::Empty) {
            return Ok(Vec::new());
        }
        self.stage(vfs, &mut state).await?;
        let file = Arc::clone(&state.staged()?.file);
        // Who writes meanwhile is not held up.
        drop(state);
        vfs.blocking(Lane::Staging, move |_| staged::read(&file, at, length)).await
    }

    /// What close(2) means: publishes what was written since the last flush. Nothing to do before data.
    ///
    /// # Errors
    /// The refusal or failure of this draft, every time until it is truncated.
    pub(super) async fn flush(&self, vfs: &Arc<Vfs>) -> Result<()> {
        let mut state = self.lock().await;
        state.check()?;
        if !state.dirty || matches!(state.content, Content::Empty) || self.is_parked() {
            return Ok(());
        }
        // More may come through the same open file: what is missing is missing at the last close.
        if let Err(error) = self.check_complete(vfs, &state).await {
            debug!("not published yet: {}", error.report());
            return Ok(());
        }
        let job = match self.publish(vfs, &mut state).await {
            Ok(job) => job,
            Err(error) => {
                // The program that closes may not look: the reason is there to be read later.
                if let Content::Ranges { source, .. } = &state.content {
                    vfs.record_refusal(self, &source.image, &error).await;
                }
                return state.refuse(error);
            }
        };
        // Nothing is locked while the upload runs: the file can be looked at meanwhile.
        drop(state);
        match wait_for(vfs, job).await {
            Err(error) => self.lock().await.refuse(error),
            Ok(()) => Ok(()),
        }
    }

    /// Flushes, and waits for the job that publishes the content.
    pub(super) async fn sync(&self, vfs: &Arc<Vfs>) -> Result<()> {
        self.flush(vfs).await?;
        let job = self.state.lock().await.job();
        wait_for(vfs, job).await
    }

    /// What the last close publishes: an empty file that nobody refused becomes an empty object, and what a flush
    /// left alone because more could come is published now, or refused. Afterwards there is nothing to publish.
    pub(super) async fn publish_last(&self, vfs: &Arc<Vfs>) {
        let mut state = self.lock().await;
        if state.check().is_err() || !state.dirty || state.discarded {
            return;
        }
        let published = async {
            self.check_complete(vfs, &state).await?;
            self.check_emptied(vfs, &state).await?;
            self.publish(vfs, &mut state).await
        };
        let published = match published.await {
            Ok(_) => Ok(()),
            Err(error) => state.refuse(error),
        };
        drop(state);
        match published {
            // Who wrote it was killed, and nobody is told but by the status.
            Err(error) if error.kind() == ErrorKind::Incomplete => vfs.record_incomplete(self, &error).await,
            // After a flush that failed this is no news; without one, nobody else is told.
            Err(error) => {
                debug!(key = %self.object().1, "not published at the last close: {}", error.report())
            }
            Ok(()) => {}
        }
    }

    /// Starts the job for the content. Returns it when it is to be waited for: that of plain bytes, so that
    /// close(2) can report; that of a recorded image only with the `wait` option.
    async fn publish(&self, vfs: &Arc<Vfs>, state: &mut State) -> Result<Option<Arc<Job>>> {
        let (job, wait) = match &state.content {
            Content::Ranges { source, ranges, file_size }
                if covers(vfs, source, ranges, *file_size).await? =>
            {
                if let Some(job) = vfs.same_export(&self.object(), &source.image).await? {
                    return Ok(self.repeat(vfs, state, job).await);
                }
                let file = Arc::clone(&source.file);
                let image = JobSource::Image(source.image.clone());
                (self.submit(vfs, image, file, None).await?, vfs.settings.wait)
            }
            Content::Published { .. } => return Ok(None),
            empty_or_staged => {
                let wait = !matches!(empty_or_staged, Content::Empty);
                self.stage(vfs, state).await?;
                (self.submit_staged(vfs, state).await?, wait)
            }
        };
        let file_size = job.file().map_or_else(|| job.status().size.unwrap_or(0), |file| file.file_size());
        vfs.republished(&self.object());
        state.content = Content::Published { file_size, job: Some(Arc::clone(&job)) };
        state.dirty = false;
        Ok(wait.then_some(job))
    }

    /// What was asked for is done already, or under way.
    async fn repeat(&self, vfs: &Arc<Vfs>, state: &mut State, job: Arc<Job>) -> Option<Arc<Job>> {
        vfs.jobs.repeat(&job).await;
        let file_size = job.status().size.unwrap_or(0);
        state.content = Content::Published { file_size, job: Some(Arc::clone(&job)) };
        state.dirty = false;
        vfs.settings.wait.then_some(job)
    }

    async fn submit(
        &self,
        vfs: &Arc<Vfs>,
        source: JobSource,
        file: Arc<dyn VirtualFile>,
        begun: Option<EarlyUpload>,
    ) -> Result<Arc<Job>> {
        let (bucket, key) = self.object();
        let client_token = match &source {
            JobSource::Image(_) => vfs.client_token(&self.object()),
            JobSource::Staged(_) => None,
        };
        let tags = vfs.tags(&self.object());
        // They are given to an upload at its start.
        let mut begun = begun.filter(|begun| *begun.tags() == tags);
        let request = JobRequest { bucket, key, source, client_token, tags };
        // The last close of an earlier handle may be publishing at this moment: that comes first.
        vfs.settle(&self.object()).await;
        let mut is_second = false;
        loop {
            let (request, file) = (request.clone(), Arc::clone(&file));
            let submit = move |vfs: &Vfs| {
                let submitted = vfs.jobs.submit(request, file, &mut begun);
                Ok((submitted, begun))
            };
            let (submitted, left) = vfs.blocking(Lane::Staging, submit).await?;
            match submitted {
                Err(error) if error.kind() == ErrorKind::Busy && !is_second => {
                    vfs.settle(&self.object()).await;
                    (begun, is_second) = (left, true);
                }
                submitted => return submitted,
            }
        }
    }

    /// Hands the staged file over to a job, which removes it at its end.
    async fn submit_staged(&self, vfs: &Arc<Vfs>, state: &mut State) -> Result<Arc<Job>> {
        let staged = state.staged()?;
        let place = staged.path.display().to_string();
        let (file, path) = (Arc::clone(&staged.file), staged.path.to_path_buf());
        let begun = staged.take_early_upload();
        let sync = move |_: &Vfs| {
            let synced = file.sync_all();
            synced.map_err(|e| Error::from_io("cannot sync the staged bytes", e))?;
            Ok((staged_file(&path)?, path))
        };
        let (file, path) = vfs.blocking(Lane::Staging, sync).await.map_err(|e| e.in_file(&place))?;
        let job = self.submit(vfs, JobSource::Staged(path), file, begun).await?;
        if let Content::Staged(staged) = std::mem::replace(&mut state.content, Content::Empty) {
            staged
                .path
                .keep()
                .map_err(|e| Error::from_io("cannot keep the staged bytes", e.error).in_file(place))?;
        }
        Ok(job)
    }

    /// Makes the content a staged file: what it was before is copied into one.
    async fn stage(&self, vfs: &Arc<Vfs>, state: &mut State) -> Result<()> {
        let (lane, fill): (Lane, Box<Fill>) = match &state.content {
            Content::Staged(_) => return Ok(()),
            Content::Empty => (Lane::Staging, Box::new(|_| Ok(()))),
            Content::Ranges { source, ranges, file_size } => {
                let (source, ranges, file_size) = (source.clone(), ranges.clone(), *file_size);
                (source.lane(), Box::new(move |staged| staged.copy_ranges(&source, &ranges, file_size)))
            }
            Content::Published { job, .. } => {
                let file = self.published_file(vfs, job.clone()).await?;
                let fill = move |staged: &mut Staged| {
                    staged.copy(&*file, FileOffset(0), FileOffset(0), file.file_size())?;
                    staged.set_size(file.file_size())
                };
                (Lane::Staging, Box::new(fill))
            }
        };
        let filled = vfs.blocking(lane, move |vfs| {
            let mut staged = Staged::new(&vfs.settings.staging, vfs.settings.stage_limit)?;
            fill(&mut staged)?;
            Ok(staged)
        });
        state.content = Content::Staged(filled.await?);
        Ok(())
    }

    async fn published_file(&self, vfs: &Arc<Vfs>, job: Option<Arc<Job>>) -> Result<Arc<dyn VirtualFile>> {
        wait_for(vfs, job).await?;
        let (bucket, key) = self.object();
        let bucket = vfs.bucket(&bucket)?;
        let gone = || Error::new(ErrorKind::NotFound, "the object is gone").in_file(bucket.url_of(&key));
        let meta = bucket.head(&key).await?.ok_or_else(gone)?;
        Ok(Arc::new(ObjectFile::new(bucket.clone(), meta, vfs.runtime.clone())))
    }
}

/// What fills a new staged file.
type Fill = dyn FnOnce(&mut Staged) -> Result<()> + Send;

/// Waits for a job, if there is one.
async fn wait_for(vfs: &Vfs, job: Option<Arc<Job>>) -> Result<()> {
    match job {
        Some(job) => job.ended(vfs.settings.wait_limit).await.map(drop),
        None => Ok(()),
    }
}

/// Whether recorded ranges are the whole of an image's file.
async fn covers(vfs: &Arc<Vfs>, source: &RangeSource, ranges: &Ranges, file_size: u64) -> Result<bool> {
    let (source, ranges) = (source.clone(), ranges.clone());
    vfs.blocking(source.lane(), move |_| ranges.cover(&source, file_size)).await
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

impl RangeSource {
    /// Where it is read.
    pub(super) fn lane(&self) -> Lane {
        Lane::Image(self.image.id.clone())
    }

    /// Bytes that are the whole file: the true size once it is known, until then the one that was shown.
    fn whole_size(&self) -> u64 {
        self.file.known_size().unwrap_or(self.shown_size)
    }
}

impl State {
    fn view(&self) -> View {
        let file_size = match &self.content {
            Content::Empty => 0,
            Content::Ranges { file_size, .. } | Content::Published { file_size, .. } => *file_size,
            Content::Staged(staged) => staged.file_size,
        };
        let published = matches!(self.content, Content::Published { .. });
        let unpublished = self.dirty && !self.discarded && self.refused.is_none();
        View { file_size, published, unpublished, modified: self.modified, refused: self.refused.clone() }
    }

    /// The job that publishes the content.
    fn job(&self) -> Option<Arc<Job>> {
        match &self.content {
            Content::Published { job, .. } => job.clone(),
            _ => None,
        }
    }

    fn staged(&mut self) -> Result<&mut Staged> {
        match &mut self.content {
            Content::Staged(staged) => Ok(staged),
            _ => Err(Error::new(ErrorKind::Internal, "nothing is staged")),
        }
    }

    /// Works on the staged file on a thread that may wait.
    async fn with_staged<T: Send + 'static>(
        &mut self,
        vfs: &Arc<Vfs>,
        lane: Lane,
        work: impl FnOnce(&mut Staged) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match std::mem::replace(&mut self.content, Content::Empty) {
            Content::Staged(mut staged) => {
                let work = move |_: &Vfs| {
                    let result = work(&mut staged);
                    Ok((staged, result))
                };
                let (staged, result) = vfs.blocking(lane, work).await?;
                self.content = Content::Staged(staged);
                result
            }
            other => {
                self.content = other;
                Err(Error::new(ErrorKind::Internal, "nothing is staged"))
            }
        }
    }

    fn check(&self) -> Result<()> {
        self.refused.clone().map_or(Ok(()), Err)
    }

    fn refuse<T>(&mut self, error: Error) -> Result<T> {
        self.refused = Some(error.clone());
        Err(error)
    }

    /// After a change: it is to be published, or its failure sticks.
    fn touched<T>(&mut self, result: Result<T>) -> Result<T> {
        self.modified = SystemTime::now();
        match result {
            Ok(value) => {
                self.dirty = !self.discarded;
                Ok(value)
            }
            Err(error) => self.refuse(error),
        }
    }
}

impl Content {
    /// Whether a range of `source` at its own place can be recorded without being read.
    fn accepts(&self, source: &RangeSource) -> bool {
        match self {
            Self::Empty => true,
            Self::Ranges { source: known, .. } => known.image.is_same(&source.image),
            _ => false,
        }
    }
}
