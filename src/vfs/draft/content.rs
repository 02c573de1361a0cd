//! What an open object's bytes are at a moment, and where they are read.

use std::fs::File;
use std::sync::Arc;
use std::time::SystemTime;

use super::super::lanes::{Lane, Lanes};
use super::ranges::Ranges;
use super::source::RangeSource;
use super::staged::{self, Staged};
use crate::bucket::ObjectFile;
use crate::error::{Error, ErrorKind, Result};
use crate::export::Job;
use crate::units::FileOffset;
use crate::vfile::VirtualFile;

/// The bytes.
pub(super) enum Content {
    /// No byte yet.
    Empty,
    /// Ranges of one image file, each at its own place.
    Ranges { source: RangeSource, ranges: Ranges, file_size: u64 },
    /// Bytes in a file of the staging directory.
    Staged(Staged),
    /// What the bucket has, or will have when the job that was started ends.
    Published(Published),
}

/// Content that was handed to a job, or that the bucket had.
#[derive(Default)]
pub(super) struct Published {
    pub(super) file_size: u64,
    /// The object's tag, where it was looked at.
    pub(super) etag: Option<String>,
    pub(super) job: Option<Arc<Job>>,
    /// Where the bytes are read, once that is known.
    pub(super) place: Option<Place>,
}

/// Where bytes are read.
#[derive(Clone)]
pub(super) enum Place {
    /// Nowhere: there are none.
    Nowhere,
    /// In a staged file that is being written.
    Staged(Arc<File>),
    /// In the ranges of an image's file, with zeros between them.
    Ranges(Box<RangeSource>, Ranges, u64),
    /// In a computed or local file.
    File(Lane, Arc<dyn VirtualFile>),
    /// In the bucket.
    Object(Arc<ObjectFile>),
}

impl Place {
    /// Reads `length` bytes, or fewer at the end.
    pub(super) async fn read(self, lanes: &Lanes, at: FileOffset, length: usize) -> Result<Vec<u8>> {
        match self {
            Self::Nowhere => Ok(Vec::new()),
            Self::Staged(file) => lanes.run(Lane::Staging, move || staged::read(&file, at, length)).await,
            Self::Ranges(source, ranges, file_size) => {
                let lane = source.lane();
                lanes.run(lane, move || ranges.read(&*source.file, file_size, at, length)).await
            }
            Self::File(lane, file) => {
                let read = move || {
                    let mut bytes = vec![0; length];
                    let read = file.read_at(at, &mut bytes)?;
                    bytes.truncate(read);
                    Ok(bytes)
                };
                lanes.run(lane, read).await
            }
            Self::Object(object) => object.read(at, length).await,
        }
    }
}

/// A draft's content and what is to become of it.
pub(super) struct State {
    pub(super) content: Content,
    /// Whether there is something that closing has to publish.
    pub(super) dirty: bool,
    /// Whether a program has closed it after the last change.
    pub(super) flushed: bool,
    /// A refusal that every later write and flush repeats, until the file is truncated.
    pub(super) refused: Option<Error>,
    /// When it was last written here.
    pub(super) modified: Option<SystemTime>,
    /// Whether a name leads to it. What has none is never published.
    pub(super) linked: bool,
}

/// What others see of a draft.
#[derive(Clone)]
pub(super) struct View {
    pub(super) file_size: u64,
    /// Whether what is there has been handed to a job.
    pub(super) published: bool,
    /// Whether the last close has something to publish.
    pub(super) unpublished: bool,
    pub(super) flushed: bool,
    pub(super) modified: Option<SystemTime>,
    pub(super) refused: Option<Error>,
}

impl State {
    pub(super) fn view(&self) -> View {
        View {
            file_size: self.file_size(),
            published: matches!(self.content, Content::Published(_)),
            unpublished: self.dirty && self.linked && self.refused.is_none(),
            flushed: self.flushed,
            modified: self.modified,
            refused: self.refused.clone(),
        }
    }

    pub(super) fn file_size(&self) -> u64 {
        match &self.content {
            Content::Empty => 0,
            Content::Ranges { file_size, .. } => *file_size,
            Content::Published(published) => published.file_size,
            Content::Staged(staged) => staged.file_size,
        }
    }

    /// The job that publishes the content.
    pub(super) fn job(&self) -> Option<&Arc<Job>> {
        match &self.content {
            Content::Published(published) => published.job.as_ref(),
            _ => None,
        }
    }

    pub(super) fn staged(&mut self) -> Result<&mut Staged> {
        match &mut self.content {
            Content::Staged(staged) => Ok(staged),
            _ => Err(Error::new(ErrorKind::Internal, "nothing is staged")),
        }
    }

    /// Works on the staged file on a thread that may wait.
    pub(super) async fn with_staged<T: Send + 'static>(
        &mut self,
        lanes: &Lanes,
        lane: Lane,
        work: impl FnOnce(&mut Staged) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match std::mem::replace(&mut self.content, Content::Empty) {
            Content::Staged(mut staged) => {
                let work = move || {
                    let result = work(&mut staged);
                    Ok((staged, result))
                };
                let (staged, result) = lanes.run(lane, work).await?;
                self.content = Content::Staged(staged);
                result
            }
            other => {
                self.content = other;
                Err(Error::new(ErrorKind::Internal, "nothing is staged"))
            }
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        self.refused.clone().map_or(Ok(()), Err)
    }

    pub(super) fn refuse<T>(&mut self, error: Error) -> Result<T> {
        self.refused = Some(error.clone());
        Err(error)
    }

    /// After a change: it is to be published, or its failure sticks.
    pub(super) fn touched<T>(&mut self, result: Result<T>) -> Result<T> {
        self.modified = Some(SystemTime::now());
        self.flushed = false;
        match result {
            Ok(value) => {
                self.dirty = self.linked;
                Ok(value)
            }
            Err(error) => self.refuse(error),
        }
    }
}

impl Content {
    /// Whether a range of `source` at its own place can be recorded without being read.
    pub(super) fn accepts(&self, source: &RangeSource) -> bool {
        match self {
            Self::Empty => true,
            Self::Ranges { source: known, .. } => known.image == source.image,
            _ => false,
        }
    }
}
