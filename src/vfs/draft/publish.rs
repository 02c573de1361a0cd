//! From a draft to the job that makes its object.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use tracing::{debug, warn};

use super::super::ObjectName;
use super::super::attributes::Attributes;
use super::super::export_options::ExportOptions;
use super::super::lanes::{Lane, Lanes};
use super::super::permit::Permits;
use super::Draft;
use super::content::{Content, Place, Published, State};
use super::staged::Staged;
use crate::bucket::{Bucket, ObjectFile, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{EarlyUpload, Job, JobQueue, JobRequest, JobSource, JobState, StatusImage, staged_file};
use crate::failpoint::{self, Step};
use crate::format::OutputFormat;
use crate::image;
use crate::storage::{FileStorage, Storage};
use crate::units::{FileOffset, MIB};
use crate::vfile::VirtualFile;

/// Bytes of an object that are fetched at once when it is staged.
const FETCH: usize = MIB as usize;

/// How often a job may begin just after the one before was waited for.
const ATTEMPTS: usize = 5;

/// How publishing is done.
#[derive(Clone, Debug)]
pub(in super::super) struct PublishOptions {
    /// Whether closing a copy waits until its job has ended.
    pub(in super::super) wait: bool,
    /// How long that, fsync, and closing what a program wrote wait before they give up; the job goes on.
    pub(in super::super) wait_limit: Duration,
    /// Where writers' files are staged.
    pub(in super::super) staging: PathBuf,
    /// Bytes that staged files may take together.
    pub(in super::super) stage_limit: Option<u64>,
}

/// What drafts need to become objects.
pub(in super::super) struct Publisher {
    pub(in super::super) jobs: JobQueue,
    pub(in super::super) buckets: BTreeMap<String, Bucket>,
    pub(in super::super) lanes: Arc<Lanes>,
    pub(in super::super) attributes: Arc<Attributes>,
    pub(in super::super) requests: Arc<ExportOptions>,
    pub(in super::super) options: PublishOptions,
    pub(in super::super) permits: Arc<Permits>,
    pub(in super::super) runtime: Runtime,
}

impl Publisher {
    pub(super) fn bucket(&self, name: &str) -> Result<&Bucket> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no bucket {name:?} is mounted"));
        self.buckets.get(name).ok_or_else(missing)
    }

    /// An object as the bucket has it now.
    pub(super) async fn object(&self, (bucket, key): &ObjectName) -> Result<ObjectFile> {
        let bucket = self.bucket(bucket)?;
        let gone = || Error::new(ErrorKind::SourceChanged, "the object is gone").in_file(bucket.url_of(key));
        let meta = bucket.head(key).await?.ok_or_else(gone)?;
        Ok(ObjectFile::new(bucket.clone(), meta, self.runtime.clone()))
    }

    /// A new file in the staging directory.
    pub(super) async fn new_staged(&self) -> Result<Staged> {
        let (directory, limit) = (self.options.staging.clone(), self.options.stage_limit);
        self.lanes.run(Lane::Staging, move || Staged::new(&directory, limit)).await
    }

    /// Copies the first `length` bytes of an object into a staged file.
    pub(super) async fn fetch(&self, object: &ObjectFile, mut staged: Staged, length: u64) -> Result<Staged> {
        let mut at = 0;
        while at < length {
            let wanted = usize::try_from(length - at).unwrap_or(usize::MAX).min(FETCH);
            let bytes = object.read(FileOffset(at), wanted).await?;
            if bytes.is_empty() {
                return Err(Error::new(ErrorKind::SourceChanged, "the object became shorter"));
            }
            let (here, read) = (FileOffset(at), bytes.len() as u64);
            let write = move || staged.write(here, &bytes).map(|()| staged);
            staged = self.lanes.run(Lane::Staging, write).await?;
            at += read;
        }
        Ok(staged)
    }

    /// Waits for a job, if there is one.
    pub(super) async fn wait_for(&self, job: Option<Arc<Job>>) -> Result<()> {
        match job {
            Some(job) => job.ended(self.options.wait_limit).await.map(drop),
            None => Ok(()),
        }
    }

    /// Waits, at most `limit`, for jobs that publish what a program wrote: those of images take longer, and are not
    /// waited for.
    pub(in super::super) async fn wait_for_previous(&self, object: &ObjectName, limit: Duration) {
        let ended = async {
            // Another one may follow: that of a handle whose last close came late.
            while let Some(job) = self.jobs.active(&object.0, &object.1)
                && matches!(job.request().source, JobSource::Staged(_))
            {
                // How it ends is for those who asked for it.
                let _ = job.ended(limit).await;
            }
        };
        let _ = tokio::time::timeout(limit, ended).await;
    }

    /// Leaves a FAIL status beside a key, so that the reason can be read later.
    pub(in super::super) async fn record_refusal(
        &self,
        (bucket, key): ObjectName,
        source: JobSource,
        error: &Error,
    ) {
        let request =
            JobRequest { bucket, key, source, client_token: None, tags: Tags::new(), replaces: None };
        if let Err(error) = self.jobs.record_refusal(request, error).await {
            warn!("a refusal could not be recorded: {}", error.report());
        }
    }

    /// Whether a running job of this key was asked for by the token that the key has now: asking again is no conflict.
    pub(in super::super) fn is_repeat(&self, object: &ObjectName, job: &Job) -> bool {
        let token = self.requests.token(object);
        token.is_some() && job.request().client_token == token
    }

    /// The job that did or does what is asked for, so that nothing is uploaded twice.
    ///
    /// # Errors
    /// [`AlreadyExists`](ErrorKind::AlreadyExists) when the token named another request.
    async fn same_export(&self, object: &ObjectName, image: &StatusImage) -> Result<Option<Arc<Job>>> {
        let tags = self.requests.tags(object);
        let is_same = |job: &Job| {
            let request = job.request();
            (&request.bucket, &request.key) == (&object.0, &object.1)
                && request.tags == tags
                && matches!(&request.source, JobSource::Image(known) if known.is_same(image))
        };
        let job = match self.requests.next_token(object) {
            Some(token) => {
                let named = |job: &Arc<Job>| job.request().client_token.as_ref() == Some(&token);
                let known = self.jobs.jobs().into_iter().rev().find(named);
                if known.as_ref().is_some_and(|job| !is_same(job)) {
                    let what = format!("the client token {token:?} named another request");
                    return Err(Error::new(ErrorKind::AlreadyExists, what).in_file(object.1.as_str()));
                }
                known
            }
            None => self.jobs.newest(&object.0, &object.1).filter(|job| is_same(job)),
        };
        let Some(job) = job else { return Ok(None) };
        let status = job.status();
        match status.status {
            JobState::Init | JobState::Running => Ok(Some(job)),
            JobState::Success => {
                // The object must still be the one that the job made.
                let there = self.bucket(&object.0)?.head(&object.1).await?;
                let unchanged = there.is_some_and(|meta| {
                    status.etag.is_some() && meta.etag == status.etag && Some(meta.object_size) == status.size
                });
                Ok(unchanged.then_some(job))
            }
            JobState::Fail | JobState::Cancelled => Ok(None),
        }
    }

    /// Records a job durably, and starts it.
    async fn submit(
        &self,
        object: &ObjectName,
        source: JobSource,
        file: Arc<dyn VirtualFile>,
        begun: Option<EarlyUpload>,
    ) -> Result<Arc<Job>> {
        let client_token = source.image().and_then(|_| self.requests.next_token(object));
        let tags = self.requests.tags(object);
        // They are given to an upload at its start.
        let mut begun = begun.filter(|begun| *begun.tags() == tags);
        let (bucket, key) = object.clone();
        let mut request = JobRequest { bucket, key, source, client_token, tags, replaces: None };
        for attempt in 1.. {
            // What was written before is published before.
            self.wait_for_previous(object, self.options.wait_limit).await;
            // Who writes waits for the store anyway; an export is accepted without it, and looks when it begins.
            if request.source.image().is_none() {
                request.replaces = self.replaces(&request).await;
            }
            let (request, file, jobs) = (request.clone(), Arc::clone(&file), self.jobs.clone());
            let submit = move || {
                let submitted = jobs.submit(request, file, &mut begun);
                Ok((submitted, begun))
            };
            let (submitted, left) = self.lanes.run(Lane::Staging, submit).await?;
            begun = left;
            match submitted {
                Ok(job) => {
                    if job.request().source.image().is_some() {
                        self.requests.token_used(object);
                    }
                    return Ok(job);
                }
                // Somebody else may have been faster. A policy says busy too.
                Err(error) if error.kind() == ErrorKind::Busy && attempt < ATTEMPTS => {
                    if !self.is_free_soon(object) {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorKind::Internal, "no job was submitted"))
    }

    /// What the object replaces, if the store says it now.
    async fn replaces(&self, request: &JobRequest) -> Option<Replaces> {
        let meta = self.bucket(&request.bucket).ok()?.head(&request.key).await.ok()?;
        Some(Replaces::found(meta.as_ref().map(|meta| meta.etag.as_deref())))
    }

    /// Whether no image is exported to the key: what a program wrote can be waited for, and may have ended by now.
    fn is_free_soon(&self, (bucket, key): &ObjectName) -> bool {
        let job = self.jobs.active(bucket, key);
        job.is_none_or(|job| matches!(job.request().source, JobSource::Staged(_)))
    }
}

impl Draft {
    /// What close(2) means: publishes what was written since the last flush, and waits for the job when the bytes are a
    /// program's own. There is nothing to do before data.
    ///
    /// # Errors
    /// The refusal or failure of this draft, every time until it is truncated.
    pub(in super::super) async fn flush(&self, publisher: &Publisher) -> Result<()> {
        self.wait_for_turn(publisher).await;
        let mut state = self.lock().await;
        state.check()?;
        state.flushed = true;
        if !state.dirty || !state.linked || matches!(state.content, Content::Empty) || self.is_parked() {
            return Ok(());
        }
        let published = match self.check_complete(publisher, &state).await {
            // More may come through the same open file: what is missing is missing at the last close.
            Err(error) if error.kind() == ErrorKind::Incomplete => {
                debug!("not published yet: {}", error.report());
                return Ok(());
            }
            Err(error) => Err(error),
            Ok(()) => self.publish(publisher, &mut state).await,
        };
        match published {
            Ok(None) => Ok(()),
            // Nothing is locked while the upload runs: the file can be looked at and written meanwhile.
            Ok(Some(job)) => {
                drop(state);
                self.outcome(publisher, job).await
            }
            Err(error) => {
                let source = match &state.content {
                    Content::Ranges { source, .. } => JobSource::Image(source.image.clone()),
                    _ => JobSource::Staged(PathBuf::new()),
                };
                let refused = state.refuse(error.clone());
                drop(state);
                // The program that closes may not look: the reason is there to be read later.
                publisher.record_refusal(self.object(), source, &error).await;
                refused
            }
        }
    }

    /// Waits until what was written before is published, if there is more to publish. Not under the lock: whoever removes
    /// or renames the file does not wait for that, and neither do listings of its directory.
    async fn wait_for_turn(&self, publisher: &Publisher) {
        if self.is_unpublished() && self.file_size() > 0 && !self.is_parked() {
            publisher.wait_for_previous(&self.object(), publisher.options.wait_limit).await;
        }
    }

    /// How the job ended; its failure is the draft's, unless something else was written by then.
    async fn outcome(&self, publisher: &Publisher, job: Arc<Job>) -> Result<()> {
        let ended = publisher.wait_for(Some(Arc::clone(&job))).await;
        let Err(error) = ended else { return Ok(()) };
        let mut state = self.lock().await;
        if state.job().is_some_and(|known| Arc::ptr_eq(known, &job)) {
            return state.refuse(error);
        }
        Err(error)
    }

    /// Flushes, and waits for the job that publishes the content.
    pub(in super::super) async fn sync(&self, publisher: &Publisher) -> Result<()> {
        self.flush(publisher).await?;
        let job = self.lock().await.job().cloned();
        publisher.wait_for(job).await
    }

    /// Publishes what there is, an empty file too, and waits for the job.
    pub(in super::super) async fn publish_now(&self, publisher: &Publisher) -> Result<()> {
        let mut state = self.lock().await;
        state.check()?;
        self.check_complete(publisher, &state).await?;
        self.publish(publisher, &mut state).await?;
        let job = state.job().cloned();
        drop(state);
        publisher.wait_for(job).await
    }

    /// What the last close publishes: an empty file that nobody refused becomes an empty object, and what a flush
    /// left alone because more could come is published now, or refused. Afterwards there is nothing to publish.
    pub(in super::super) async fn publish_last(&self, publisher: &Publisher) {
        self.wait_for_turn(publisher).await;
        let mut state = self.lock().await;
        if state.check().is_err() || !state.dirty || !state.linked {
            return;
        }
        let published = async {
            self.check_complete(publisher, &state).await?;
            self.check_emptied(publisher, &state).await?;
            self.publish(publisher, &mut state).await
        };
        let Err(error) = published.await else { return };
        let _ = state.refuse::<()>(error.clone());
        drop(state);
        // Who wrote it has closed it or was killed, and nobody is told but by the status and the log.
        warn!(key = %self.object().1, "not published at the last close: {}", error.report());
        publisher.record_refusal(self.object(), JobSource::Staged(PathBuf::new()), &error).await;
    }

    /// Whether staged bytes are all that the format that their name tells says there is. A writer that was killed
    /// looks as if it had ended.
    async fn check_complete(&self, publisher: &Publisher, state: &State) -> Result<()> {
        let Content::Staged(staged) = &state.content else { return Ok(()) };
        let key = self.object().1;
        let Some((_, format)) = OutputFormat::split_file_name(key.file_name()) else { return Ok(()) };
        let path = staged.path.to_path_buf();
        let check = move || image::check_complete(format, Arc::new(FileStorage::open(&path)?));
        publisher.lanes.run(Lane::Staging, check).await.map_err(|e| e.in_file(key.as_str()))
    }

    /// An image that was opened to be replaced, and of which nothing came, stays: whoever wanted to write it was killed
    /// in its first moment.
    async fn check_emptied(&self, publisher: &Publisher, state: &State) -> Result<()> {
        let (bucket, key) = self.object();
        let is_image =
            OutputFormat::split_file_name(key.file_name()).is_some_and(|(_, f)| f != OutputFormat::Raw);
        if !matches!(state.content, Content::Empty) || !is_image {
            return Ok(());
        }
        let there = publisher.bucket(&bucket)?.head(&key).await?;
        if there.is_some_and(|meta| meta.object_size > 0) {
            let what = "nothing was written: the object that was there stays; remove it to have it gone";
            return Err(Error::new(ErrorKind::Incomplete, what).in_file(key.as_str()));
        }
        Ok(())
    }

    /// Starts the job for the content. Returns it when it is to be waited for: that of plain bytes, so that
    /// close(2) can report; that of a recorded image only with the `wait` option.
    async fn publish(&self, publisher: &Publisher, state: &mut State) -> Result<Option<Arc<Job>>> {
        let object = self.object();
        let (job, wait) = match &state.content {
            Content::Published(_) => {
                state.dirty = false;
                return Ok(None);
            }
            Content::Ranges { source, .. } if self.covers(publisher, state).await? => {
                // It may have been copied under another name.
                self.check_name(source.format)?;
                publisher.permits.export(&source.facts, source.format, &object)?;
                (self.submit_image(publisher, state, &object).await?, publisher.options.wait)
            }
            content => {
                let wait = !matches!(content, Content::Empty);
                self.stage(publisher, state, u64::MAX).await?;
                self.check_permitted(publisher, state, &object).await?;
                (submit_staged(publisher, state, &object).await?, wait)
            }
        };
        let file = job.file();
        let file_size = match &file {
            Some(file) => file.file_size(),
            None => job.status().size.unwrap_or(0),
        };
        let lane = match job.request().source.image() {
            Some(image) => Lane::Image(image.id.clone()),
            None => Lane::Staging,
        };
        let place = file.map(|file| Place::File(lane, file));
        let published = Published { file_size, etag: None, job: Some(Arc::clone(&job)), place };
        let publish = || {
            state.content = Content::Published(published);
            state.dirty = false;
            *self.view.lock() = state.view();
        };
        publisher.attributes.published_by(&object, &job.id(), publish);
        Ok(wait.then_some(job))
    }

    /// Whether the policy lets a program's bytes be published, now that they are all there. Nothing is asked of an empty
    /// file but its name.
    async fn check_permitted(&self, publisher: &Publisher, state: &State, object: &ObjectName) -> Result<()> {
        let size = state.file_size();
        match &state.content {
            Content::Staged(staged) if size > 0 && publisher.permits.judges_content() => {
                let path = staged.path.to_path_buf();
                let recognize = move || {
                    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path)?);
                    image::recognize(&storage)
                };
                let recognized = publisher.lanes.run(Lane::Staging, recognize).await?;
                publisher.permits.written(object, size, recognized)
            }
            _ => publisher.permits.target(object),
        }
    }

    /// Whether recorded ranges are the whole of an image's file.
    async fn covers(&self, publisher: &Publisher, state: &State) -> Result<bool> {
        let Content::Ranges { source, ranges, file_size } = &state.content else { return Ok(false) };
        let (source, ranges, file_size) = (source.clone(), ranges.clone(), *file_size);
        publisher.lanes.run(source.lane(), move || ranges.cover(&source, file_size)).await
    }

    /// The job that exports an image: a new one, or one that did or does the same.
    async fn submit_image(
        &self,
        publisher: &Publisher,
        state: &State,
        object: &ObjectName,
    ) -> Result<Arc<Job>> {
        let Content::Ranges { source, .. } = &state.content else {
            return Err(Error::new(ErrorKind::Internal, "no image is recorded"));
        };
        if let Some(job) = publisher.same_export(object, &source.image).await? {
            publisher.jobs.repeat(&job).await;
            publisher.requests.token_used(object);
            return Ok(job);
        }
        let file = Arc::clone(&source.file);
        publisher.submit(object, JobSource::Image(source.image.clone()), file, None).await
    }

    /// Makes the content a staged file: what it was before, or the first `keep` bytes of it, are copied into one.
    pub(super) async fn stage(&self, publisher: &Publisher, state: &mut State, keep: u64) -> Result<()> {
        if matches!(state.content, Content::Staged(_)) {
            return Ok(());
        }
        let place = self.place(publisher, state).await?;
        let mut staged = publisher.new_staged().await?;
        let length = state.file_size().min(keep);
        let (lane, fill): (Lane, Box<Fill>) = match place {
            Place::Nowhere | Place::Staged(_) => (Lane::Staging, Box::new(|_| Ok(()))),
            Place::Ranges(source, ranges, file_size) => {
                (source.lane(), Box::new(move |staged| staged.copy_ranges(&source, &ranges, file_size)))
            }
            Place::File(lane, file) => {
                let fill = move |staged: &mut Staged| {
                    let length = file.exact_size()?.min(keep);
                    staged.copy(&*file, FileOffset(0), FileOffset(0), length)?;
                    staged.set_size(length)
                };
                (lane, Box::new(fill))
            }
            Place::Object(object) => {
                let length = object.file_size().min(keep);
                staged = publisher.fetch(&object, staged, length).await?;
                (Lane::Staging, Box::new(move |staged| staged.set_size(length)))
            }
        };
        debug!(key = %self.object().1, length, "staged");
        let fill = move || fill(&mut staged).map(|()| staged);
        state.content = Content::Staged(publisher.lanes.run(lane, fill).await?);
        Ok(())
    }

    /// Where the content is read now.
    pub(super) async fn place(&self, publisher: &Publisher, state: &mut State) -> Result<Place> {
        let published = match &mut state.content {
            Content::Empty => return Ok(Place::Nowhere),
            Content::Ranges { source, ranges, file_size } => {
                return Ok(Place::Ranges(Box::new(source.clone()), ranges.clone(), *file_size));
            }
            Content::Staged(staged) => return Ok(Place::Staged(Arc::clone(&staged.file))),
            Content::Published(published) => published,
        };
        if published.place.is_none() {
            let object = publisher.object(&self.object()).await?;
            let is_known = published.etag.is_some();
            if is_known && object.etag() != published.etag.as_deref() {
                let what = "the object was replaced since it was opened";
                return Err(Error::new(ErrorKind::SourceChanged, what).in_file(self.object().1.as_str()));
            }
            published.file_size = object.file_size();
            published.place = Some(Place::Object(Arc::new(object)));
        }
        published.place.clone().ok_or_else(|| Error::new(ErrorKind::Internal, "the bytes are nowhere"))
    }

    /// What was sent while it was written is given up.
    pub(in super::super) async fn give_up_early_upload(&self) {
        if let Content::Staged(staged) = &mut self.lock().await.content {
            drop(staged.take_early_upload());
        }
    }
}

/// What fills a new staged file.
type Fill = dyn FnOnce(&mut Staged) -> Result<()> + Send;

/// Hands the staged file over to a job, which removes it at its end.
async fn submit_staged(publisher: &Publisher, state: &mut State, object: &ObjectName) -> Result<Arc<Job>> {
    let staged = state.staged()?;
    let place = staged.path.display().to_string();
    let (file, path) = (Arc::clone(&staged.file), staged.path.to_path_buf());
    let begun = staged.take_early_upload();
    let sync = move || {
        failpoint::pass(Step::StageSync)?;
        file.sync_all().map_err(|e| Error::from_io("cannot sync the staged bytes", e))?;
        Ok((staged_file(&path)?, path))
    };
    let synced = publisher.lanes.run(Lane::Staging, sync).await;
    let (file, path) = synced.map_err(|e| e.in_file(&place))?;
    // The job has them from the moment in which it is recorded, whatever becomes of this task.
    state.staged()?.path.disable_cleanup(true);
    let submitted = publisher.submit(object, JobSource::Staged(path), file, begun).await;
    if submitted.is_err() {
        state.staged()?.path.disable_cleanup(false);
    }
    submitted
}
