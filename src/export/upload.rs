//! One attempt of one job: source to object, part by part, hashed on the way, in bounded memory.
//!
//! Parts are read in order, each hashed by two threads (SHA-256 and MD5) while it is uploaded. At most
//! [`MAX_PARTS_IN_FLIGHT`] uploads run at once, and as many parts again may wait for the hashes, so a job holds
//! at most 2 × [`MAX_PARTS_IN_FLIGHT`] + 2 parts.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use md5::Md5;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::job::Job;
use crate::bucket::{Bucket, ObjectKey, ObjectMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::units::{FileOffset, MIB};
use crate::vfile::VirtualFile;

/// Uploads of one job that run at once; fewer when parts are so large that they would hold more than
/// [`PART_MEMORY`].
pub(super) const MAX_PARTS_IN_FLIGHT: usize = 4;

/// Bytes of parts in flight that one job may hold.
const PART_MEMORY: u64 = 64 * MIB;

/// What an attempt gave.
pub(super) struct Uploaded {
    pub(super) meta: ObjectMeta,
    pub(super) sha256: String,
    pub(super) md5: String,
}

/// One attempt to bring `file` into `bucket` as `key`.
pub(super) struct Attempt<'a> {
    pub(super) bucket: &'a Bucket,
    pub(super) key: &'a ObjectKey,
    pub(super) file: Arc<dyn VirtualFile>,
    pub(super) job: &'a Job,
    pub(super) metrics: &'a Metrics,
}

impl Attempt<'_> {
    /// Uploads and verifies. `start` starts an upload with parts of a size, and records it; `progress` is called
    /// after each part.
    ///
    /// When this fails after `start`, the upload is left to the caller to abort.
    pub(super) async fn run<S, P>(
        &self,
        start: impl FnOnce(u64) -> S,
        progress: impl Fn() -> P,
    ) -> Result<Uploaded>
    where
        S: Future<Output = Result<String>>,
        P: Future<Output = ()>,
    {
        // The size of a compressed file is known when its last part has been read.
        let part_size = self.bucket.part_size_for(self.file.file_size())?;
        let first = joined(read_part(&self.file, 0, part_size).await)??;
        if (first.len() as u64) < part_size || self.file.known_size() == Some(part_size) {
            return self.put_whole(first).await;
        }
        let upload = start(part_size).await?;
        let (hashes, mut feed) = Hashes::start();
        let in_flight_limit =
            usize::try_from(PART_MEMORY / part_size).unwrap_or(1).clamp(1, MAX_PARTS_IN_FLIGHT);
        let mut parts = Vec::new();
        let mut in_flight = FuturesUnordered::new();
        let (mut part, mut size) = (first, 0);
        while !part.is_empty() {
            size += part.len() as u64;
            // The next part is read while this one is hashed and sent.
            let next = read_part(&self.file, size, part_size);
            self.job.update(|s| {
                s.bytes_done += part.len() as u64;
                s.size = s.size.or(self.file.known_size());
            });
            feed.send(part.clone()).await?;
            while in_flight.len() >= in_flight_limit {
                self.finish_one(&mut in_flight, &mut parts).await?;
                progress().await;
            }
            in_flight.push(self.put_part(&upload, parts.len(), part));
            parts.push(None);
            part = joined(next.await)??;
        }
        drop(feed);
        while !in_flight.is_empty() {
            self.finish_one(&mut in_flight, &mut parts).await?;
            progress().await;
        }
        let (sha256, md5) = hashes.finish().await?;
        let parts = parts.into_iter().map(|p| p.expect("every part was sent and finished")).collect();
        self.check_size(size)?;
        self.job.set_publishing();
        let meta = self.bucket.complete_upload(self.key, &upload, parts, size).await?;
        Ok(Uploaded { meta, sha256, md5 })
    }

    /// All bytes have been read; the file must agree.
    fn check_size(&self, read: u64) -> Result<()> {
        if self.file.known_size() == Some(read) {
            self.job.update(|s| s.size = Some(read));
            return Ok(());
        }
        Err(Error::new(ErrorKind::SourceChanged, "the source became shorter").at(read))
    }

    async fn put_part(&self, upload: &str, index: usize, part: Bytes) -> Result<(usize, u64, String)> {
        let length = part.len() as u64;
        let id = self.bucket.put_part(self.key, upload, index, part).await?;
        Ok((index, length, id))
    }

    async fn finish_one<F>(
        &self,
        in_flight: &mut FuturesUnordered<F>,
        parts: &mut [Option<String>],
    ) -> Result<()>
    where
        F: Future<Output = Result<(usize, u64, String)>>,
    {
        if let Some(finished) = in_flight.next().await {
            let (index, length, id) = finished?;
            parts[index] = Some(id);
            self.job.uploaded(length, self.file.file_size());
            self.metrics.uploaded_bytes.add(length);
        }
        Ok(())
    }

    /// What fits into one part needs no multipart upload.
    async fn put_whole(&self, bytes: Bytes) -> Result<Uploaded> {
        let size = bytes.len() as u64;
        self.check_size(size)?;
        self.job.update(|s| s.bytes_done = size);
        let (hashes, mut feed) = Hashes::start();
        feed.send(bytes.clone()).await?;
        drop(feed);
        let (sha256, md5) = hashes.finish().await?;
        self.job.set_publishing();
        self.bucket.put(self.key, bytes).await?;
        let meta =
            self.bucket.head(self.key).await?.ok_or_else(|| self.wrong("is not there after its upload"))?;
        if meta.object_size != size {
            return Err(self.wrong(&format!("has {} bytes after its upload, not {size}", meta.object_size)));
        }
        self.job.uploaded(size, size);
        self.metrics.uploaded_bytes.add(size);
        Ok(Uploaded { meta, sha256, md5 })
    }

    fn wrong(&self, what: &str) -> Error {
        Error::new(ErrorKind::UploadFailed, format!("the object {what}"))
            .in_file(self.bucket.url_of(self.key))
    }
}

/// Reads `length` bytes at `at` on a blocking thread; fewer only at the end of the file.
fn read_part(file: &Arc<dyn VirtualFile>, at: u64, length: u64) -> JoinHandle<Result<Bytes>> {
    let file = Arc::clone(file);
    tokio::task::spawn_blocking(move || {
        let length = file.known_size().map_or(length, |size| length.min(size.saturating_sub(at)));
        let mut part = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let mut done = 0;
        while done < part.len() {
            match file.read_at(FileOffset(at + done as u64), &mut part[done..])? {
                0 => break,
                read => done += read,
            }
        }
        part.truncate(done);
        Ok(Bytes::from(part))
    })
}

/// A panic in a blocking task is a broken invariant, not a reason to take the daemon down.
fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the job panicked").because(e))
}

/// SHA-256 and MD5 of the parts in order, each on its own thread.
struct Hashes {
    sha256: JoinHandle<String>,
    md5: JoinHandle<String>,
}

/// Where the parts go to be hashed.
struct HashFeed {
    sha256: mpsc::Sender<Bytes>,
    md5: mpsc::Sender<Bytes>,
}

impl Hashes {
    fn start() -> (Self, HashFeed) {
        let (sha256, to_sha256) = hash_thread::<Sha256>();
        let (md5, to_md5) = hash_thread::<Md5>();
        (Self { sha256, md5 }, HashFeed { sha256: to_sha256, md5: to_md5 })
    }

    async fn finish(self) -> Result<(String, String)> {
        Ok((joined(self.sha256.await)?, joined(self.md5.await)?))
    }
}

impl HashFeed {
    async fn send(&mut self, part: Bytes) -> Result<()> {
        let gone = |e| Error::new(ErrorKind::Internal, "a hash of the job ended early").because(e);
        self.sha256.send(part.clone()).await.map_err(gone)?;
        self.md5.send(part).await.map_err(gone)
    }
}

fn hash_thread<D: Digest + Send + 'static>() -> (JoinHandle<String>, mpsc::Sender<Bytes>) {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(MAX_PARTS_IN_FLIGHT);
    let thread = tokio::task::spawn_blocking(move || {
        let mut digest = D::new();
        while let Some(part) = receiver.blocking_recv() {
            digest.update(&part);
        }
        hex::encode(digest.finalize())
    });
    (thread, sender)
}
