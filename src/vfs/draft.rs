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
    state: Mutex<State>,
    view: Mutex<View>,
    pub(super) handles: AtomicUsize,
    /// A file under a temporary name, which is published when it gets its own.
    parked: AtomicBool,
}

/// What others see of a draft.
#[derive(Clone, Copy)]
struct View {
    file_size: u64,
    /// Whether what is there has been handed to a job.
    published: bool,
    /// Whether the last close has something to publish.
    unpublished: bool,
    modified: SystemTime,
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
        Self { object: Mutex::new(object), state: Mutex::new(state), view, handles, parked }
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
    pub(super) fn rename(&self, object: &ObjectName) -> bool {
        let state = self.state.lock();
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
    pub(super) fn publish_now(&self, vfs: &Vfs) -> Result<()> {
        let job = self.change(|state| {
            state.check()?;
            self.check_complete(state)?;
            self.publish(vfs, state).map(|_| match &state.content {
                Content::Published { job, .. } => job.clone(),
                _ => None,
            })
        })?;
        job.map_or(Ok(()), |job| job.wait(vfs.settings.wait_limit).map(drop))
    }

    /// Whether staged bytes are all that the format that their name tells says there is. A writer that was killed
    /// looks as if it had ended.
    fn check_complete(&self, state: &State) -> Result<()> {
        let Content::Staged(staged) = &state.content else { return Ok(()) };
        match OutputFormat::split_file_name(self.object().1.file_name()) {
            Some((_, format)) => {
                let storage = Arc::new(FileStorage::open(&staged.path)?);
                let checked = image::check_complete(format, storage);
                checked.map_err(|e| e.in_file(self.object().1.as_str()))
            }
            None => Ok(()),
        }
    }

    /// An image that was opened to be replaced, and of which nothing came, stays: whoever wanted to write it was killed
    /// in its first moment.
    fn check_emptied(&self, vfs: &Vfs, state: &State) -> Result<()> {
        let (bucket, key) = self.object();
        let is_image =
            OutputFormat::split_file_name(key.file_name()).is_some_and(|(_, f)| f != OutputFormat::Raw);
        if !matches!(state.content, Content::Empty) || !is_image {
            return Ok(());
        }
        let there = vfs.runtime.block_on(vfs.bucket(&bucket)?.head(&key))?;
        if there.is_some_and(|meta| meta.object_size > 0) {
            let what = "nothing was written: the object that was there stays; remove it to have it gone";
            return Err(Error::new(ErrorKind::Incomplete, what).in_file(key.as_str()));
        }
        Ok(())
    }

    /// Changes the state, and then what others see of it.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut state = self.state.lock();
        let result = change(&mut state);
        *self.view.lock() = state.view();
        result
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
        self.state.lock().refused.clone()
    }

    /// The file was removed while it was open: nothing of it is published.
    pub(super) fn discard(&self) {
        let _ = self.change(|state| {
            state.discarded = true;
            state.dirty = false;
            state.content = Content::Empty;
            Ok(())
        });
    }

    /// Writes bytes from anywhere.
    pub(super) fn write(&self, vfs: &Vfs, at: FileOffset, bytes: &[u8]) -> Result<()> {
        vfs.written_after(&self.object());
        self.change(|state| {
            state.check()?;
            let result = self.staged(vfs, state).and_then(|staged| staged.write(at, bytes));
            self.send_early(vfs, state);
            state.touched(result)
        })
    }

    /// Records that bytes of an image file stand at `at`, or stages them when they are not at their own place.
    pub(super) fn copy_range(
        &self,
        vfs: &Vfs,
        source: &RangeSource,
        from: FileOffset,
        at: FileOffset,
        length: u64,
    ) -> Result<u64> {
        vfs.written_after(&self.object());
        self.change(|state| {
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
            let result = source.file.exact_size().and_then(|exact| {
                let length = length.min(exact.saturating_sub(from.bytes()));
                self.staged(vfs, state)?.copy(&*source.file, from, at, length)?;
                self.send_early(vfs, state);
                Ok(length)
            });
            state.touched(result)
        })
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
    pub(super) fn give_up_early_upload(&self) {
        if let Content::Staged(staged) = &mut self.state.lock().content {
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
    pub(super) fn truncate(&self, vfs: &Vfs, size: u64) -> Result<()> {
        vfs.written_after(&self.object());
        self.change(|state| {
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
            let result = self.staged(vfs, state).and_then(|staged| staged.set_size(size));
            state.touched(result)
        })
    }

    /// Reads what was written so far.
    pub(super) fn read(&self, vfs: &Vfs, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        self.change(|state| match state.content {
            Content::Empty => Ok(0),
            _ => self.staged(vfs, state)?.read(at, buf),
        })
    }

    /// What close(2) means: publishes what was written since the last flush. Nothing to do before data.
    ///
    /// # Errors
    /// The refusal or failure of this draft, every time until it is truncated.
    pub(super) fn flush(&self, vfs: &Vfs) -> Result<()> {
        let job = self.change(|state| {
            state.check()?;
            if !state.dirty || matches!(state.content, Content::Empty) || self.is_parked() {
                return Ok(None);
            }
            // More may come through the same open file: what is missing is missing at the last close.
            if let Err(error) = self.check_complete(state) {
                debug!("not published yet: {}", error.report());
                return Ok(None);
            }
            self.publish(vfs, state).or_else(|error| {
                // The program that closes may not look: the reason is there to be read later.
                if let Content::Ranges { source, .. } = &state.content {
                    vfs.record_refusal(self, &source.image, &error);
                }
                state.refuse(error)
            })
        })?;
        // Nothing is locked while the upload runs: the file can be looked at meanwhile.
        match job.map(|job| job.wait(vfs.settings.wait_limit)) {
            Some(Err(error)) => self.change(|state| state.refuse(error)),
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// Flushes, and waits for the job that publishes the content.
    pub(super) fn sync(&self, vfs: &Vfs) -> Result<()> {
        self.flush(vfs)?;
        let job = match &self.state.lock().content {
            Content::Published { job, .. } => job.clone(),
            _ => None,
        };
        job.map_or(Ok(()), |job| job.wait(vfs.settings.wait_limit).map(drop))
    }

    /// What the last close publishes: an empty file that nobody refused becomes an empty object, and what a flush
    /// left alone because more could come is published now, or refused. Afterwards there is nothing to publish.
    pub(super) fn publish_last(&self, vfs: &Vfs) {
        let published = self.change(|state| {
            state.check()?;
            if !state.dirty || state.discarded {
                return Ok(());
            }
            let complete = self.check_complete(state).and_then(|()| self.check_emptied(vfs, state));
            let published = complete.and_then(|()| self.publish(vfs, state));
            published.map(drop).or_else(|error| state.refuse(error))
        });
        match published {
            // Who wrote it was killed, and nobody is told but by the status.
            Err(error) if error.kind() == ErrorKind::Incomplete => vfs.record_incomplete(self, &error),
            // After a flush that failed this is no news; without one, nobody else is told.
            Err(error) => {
                debug!(key = %self.object().1, "not published at the last close: {}", error.report())
            }
            Ok(()) => {}
        }
    }

    /// Starts the job for the content. Returns it when it is to be waited for: that of plain bytes, so that
    /// close(2) can report; that of a recorded image only with the `wait` option.
    fn publish(&self, vfs: &Vfs, state: &mut State) -> Result<Option<Arc<Job>>> {
        let (job, wait) = match &state.content {
            Content::Ranges { source, ranges, file_size } if ranges.cover(source, *file_size)? => {
                if let Some(job) = vfs.same_export(&self.object(), &source.image)? {
                    return Ok(self.repeat(vfs, state, job));
                }
                let file = Arc::clone(&source.file);
                (
                    self.submit(vfs, JobSource::Image(source.image.clone()), file, &mut None)?,
                    vfs.settings.wait,
                )
            }
            Content::Published { .. } => return Ok(None),
            empty_or_staged => {
                let wait = !matches!(empty_or_staged, Content::Empty);
                self.staged(vfs, state)?;
                (self.submit_staged(vfs, state)?, wait)
            }
        };
        let file_size = job.file().map_or_else(|| job.status().size.unwrap_or(0), |file| file.file_size());
        vfs.republished(&self.object());
        state.content = Content::Published { file_size, job: Some(Arc::clone(&job)) };
        state.dirty = false;
        Ok(wait.then_some(job))
    }

    /// What was asked for is done already, or under way.
    fn repeat(&self, vfs: &Vfs, state: &mut State, job: Arc<Job>) -> Option<Arc<Job>> {
        vfs.jobs.repeat(&job);
        let file_size = job.status().size.unwrap_or(0);
        state.content = Content::Published { file_size, job: Some(Arc::clone(&job)) };
        state.dirty = false;
        vfs.settings.wait.then_some(job)
    }

    fn submit(
        &self,
        vfs: &Vfs,
        source: JobSource,
        file: Arc<dyn VirtualFile>,
        begun: &mut Option<EarlyUpload>,
    ) -> Result<Arc<Job>> {
        let (bucket, key) = self.object();
        let client_token = match &source {
            JobSource::Image(_) => vfs.client_token(&self.object()),
            JobSource::Staged(_) => None,
        };
        let tags = vfs.tags(&self.object());
        if begun.as_ref().is_some_and(|begun| *begun.tags() != tags) {
            // They are given to an upload at its start.
            *begun = None;
        }
        let request = JobRequest { bucket, key, source, client_token, tags };
        // The last close of an earlier handle may be publishing at this moment: that comes first.
        vfs.settle(&self.object());
        match vfs.jobs.submit(request.clone(), Arc::clone(&file), begun) {
            Err(error) if error.kind() == ErrorKind::Busy => {
                vfs.settle(&self.object());
                vfs.jobs.submit(request, file, begun)
            }
            submitted => submitted,
        }
    }

    /// Hands the staged file over to a job, which removes it at its end.
    fn submit_staged(&self, vfs: &Vfs, state: &mut State) -> Result<Arc<Job>> {
        let Content::Staged(staged) = &mut state.content else {
            return Err(Error::new(ErrorKind::Internal, "nothing is staged"));
        };
        let place = staged.path.display().to_string();
        staged
            .file
            .sync_all()
            .map_err(|e| Error::from_io("cannot sync the staged bytes", e).in_file(&place))?;
        let path = staged.path.to_path_buf();
        let mut begun = staged.take_early_upload();
        let job = self.submit(vfs, JobSource::Staged(path.clone()), staged_file(&path)?, &mut begun)?;
        if let Content::Staged(staged) = std::mem::replace(&mut state.content, Content::Empty) {
            staged
                .path
                .keep()
                .map_err(|e| Error::from_io("cannot keep the staged bytes", e.error).in_file(place))?;
        }
        Ok(job)
    }

    /// The content as a staged file: what it was before is copied into one.
    fn staged<'a>(&self, vfs: &Vfs, state: &'a mut State) -> Result<&'a mut Staged> {
        if !matches!(state.content, Content::Staged(_)) {
            let mut staged = Staged::new(&vfs.settings.staging, vfs.settings.stage_limit)?;
            match &state.content {
                Content::Ranges { source, ranges, file_size } => {
                    let exact = source.file.exact_size()?;
                    for (start, end) in ranges.iter().filter(|(start, _)| *start < exact) {
                        let length = end.min(exact) - start;
                        staged.copy(&*source.file, FileOffset(start), FileOffset(start), length)?;
                    }
                    // Up to the size that was shown, what was copied went on to the true end.
                    let end = if *file_size <= source.shown_size { exact } else { *file_size };
                    staged.set_size(end.min(*file_size))?;
                }
                Content::Published { job, .. } => {
                    let file = self.published_file(vfs, job.as_deref())?;
                    staged.copy(&*file, FileOffset(0), FileOffset(0), file.file_size())?;
                    staged.set_size(file.file_size())?;
                }
                Content::Empty | Content::Staged(_) => {}
            }
            state.content = Content::Staged(staged);
        }
        match &mut state.content {
            Content::Staged(staged) => Ok(staged),
            _ => Err(Error::new(ErrorKind::Internal, "nothing is staged")),
        }
    }

    fn published_file(&self, vfs: &Vfs, job: Option<&Job>) -> Result<Arc<dyn VirtualFile>> {
        if let Some(job) = job {
            job.wait(vfs.settings.wait_limit)?;
        }
        let (bucket, key) = self.object();
        let bucket = vfs.bucket(&bucket)?;
        let meta = vfs.runtime.block_on(bucket.head(&key))?;
        let gone = || Error::new(ErrorKind::NotFound, "the object is gone").in_file(bucket.url_of(&key));
        Ok(Arc::new(ObjectFile::new(bucket.clone(), meta.ok_or_else(gone)?, vfs.runtime.clone())))
    }
}

impl RangeSource {
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
        View { file_size, published, unpublished, modified: self.modified }
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
            Self::Ranges { source: known, .. } => known.image == source.image,
            _ => false,
        }
    }
}
