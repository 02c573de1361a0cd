//! A store in memory that fails the nth of its writing requests, and counts them.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::watch;

/// A store in memory whose requests can fail.
#[derive(Debug, Default)]
pub struct FaultyStore {
    inner: InMemory,
    /// Writing requests so far: puts, starts, parts, completions, aborts.
    requests: AtomicUsize,
    /// The request, counted from 1, that fails; 0 for none.
    failing: AtomicUsize,
    /// Uploads started, and neither completed nor aborted.
    open_uploads: Mutex<HashSet<MultipartId>>,
    /// Requests that were refused while it was down.
    refused: AtomicUsize,
    /// Reads that fail from now on.
    failing_reads: AtomicUsize,
    /// Whether writing is denied.
    denies: AtomicBool,
    /// Whether no request is answered.
    down: AtomicBool,
    /// Whether the store goes down between the next completion and its answer.
    dies_completing: AtomicBool,
    /// While this is true, parts and copies wait.
    held: watch::Sender<bool>,
    /// While this is true, reads wait.
    holds_reads: watch::Sender<bool>,
    /// Requests that wait for one of these, or have waited.
    waiting: AtomicUsize,
    /// Whether the next completion or copy is made and its answer is lost.
    loses_answer: AtomicBool,
    /// What somebody else puts in the place of the next object as soon as it is there.
    rival: Mutex<Option<&'static [u8]>>,
}

impl FaultyStore {
    /// A store whose `failing`th writing request fails.
    pub fn new(failing: usize) -> Arc<Self> {
        let store = Self::default();
        store.failing.store(failing, Ordering::SeqCst);
        Arc::new(store)
    }

    /// The same store; the `failing`th request, counted from its first, will fail.
    pub fn refailing(self: Arc<Self>, failing: usize) -> Arc<Self> {
        self.failing.store(failing, Ordering::SeqCst);
        self
    }

    /// Lets every part and every copy wait, or go on.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// Lets every read wait, or go on.
    pub fn hold_reads(&self, held: bool) {
        self.holds_reads.send_replace(held);
    }

    /// Requests that had to wait so far.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    async fn wait_while(&self, held: &watch::Sender<bool>) {
        if *held.borrow() {
            self.waiting.fetch_add(1, Ordering::SeqCst);
        }
        let _ = held.subscribe().wait_for(|held| !held).await;
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn open_uploads(&self) -> usize {
        self.open_uploads.lock().unwrap().len()
    }

    /// Answers no request any more, or all again.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Lets so many reads fail.
    pub fn fail_reads(&self, reads: usize) {
        self.failing_reads.store(reads, Ordering::SeqCst);
    }

    /// How many reads are still to fail.
    pub fn failing_reads(&self) -> usize {
        self.failing_reads.load(Ordering::SeqCst)
    }

    /// Denies writing, or allows it again.
    pub fn deny(&self, denies: bool) {
        self.denies.store(denies, Ordering::SeqCst);
    }

    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::SeqCst)
    }

    /// Does the next completion, does not answer it, and goes down.
    pub fn die_completing(&self) {
        self.dies_completing.store(true, Ordering::SeqCst);
    }

    fn reached(&self) -> Result<()> {
        match self.is_down() {
            true => {
                self.refused.fetch_add(1, Ordering::SeqCst);
                Err(Error::Generic { store: "faulty", source: "the store is down, and so this fails".into() })
            }

            false => Ok(()),
        }
    }

    /// The next completion or copy is made, and its answer is lost.
    pub fn lose_answer(&self) {
        self.loses_answer.store(true, Ordering::SeqCst);
    }

    /// Somebody else replaces the next object as soon as it is there.
    pub fn replace_next(&self, content: &'static [u8]) {
        *self.rival.lock().unwrap() = Some(content);
    }

    async fn made<T>(&self, location: &Path, answer: T) -> Result<T> {
        let rival = self.rival.lock().unwrap().take();
        if let Some(rival) = rival {
            self.inner.put_opts(location, PutPayload::from_static(rival), PutOptions::default()).await?;
        }
        if self.loses_answer.swap(false, Ordering::SeqCst) {
            return Err(Error::Generic { store: "faulty", source: "the answer is lost".into() });
        }
        Ok(answer)
    }

    fn count(&self, what: &str) -> Result<()> {
        self.reached()?;
        if self.denies.load(Ordering::SeqCst) {
            let (path, source) = (what.to_owned(), "credentials have expired".into());
            return Err(Error::PermissionDenied { path, source });
        }
        let number = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
        if number == self.failing.load(Ordering::SeqCst) {
            return Err(Error::Generic {
                store: "faulty",
                source: format!("{what}, request {number}, fails").into(),
            });
        }
        Ok(())
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty store")
    }
}

#[async_trait::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.count("put")?;
        let put = self.inner.put_opts(location, payload, options).await?;
        self.made(location, put).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.reached()?;
        self.wait_while(&self.holds_reads).await;
        let fails = self
            .failing_reads
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok();
        if fails {
            return Err(Error::Generic { store: "faulty", source: "this read fails".into() });
        }
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.wait_while(&self.held).await;
        self.inner.copy_opts(from, to, options).await?;
        self.made(to, ()).await
    }
}

#[async_trait::async_trait]
impl MultipartStore for FaultyStore {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        self.count("create")?;
        let id = self.inner.create_multipart(path).await?;
        self.open_uploads.lock().unwrap().insert(id.clone());
        Ok(id)
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        index: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        self.count("part")?;
        self.wait_while(&self.held).await;
        self.inner.put_part(path, id, index, data).await
    }

    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        self.count("complete")?;
        let result = self.inner.complete_multipart(path, id, parts).await?;
        self.open_uploads.lock().unwrap().remove(id);
        if self.dies_completing.swap(false, Ordering::SeqCst) {
            self.set_down(true);
            self.reached()?;
        }
        self.made(path, result).await
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.reached()?;
        if !self.open_uploads.lock().unwrap().remove(id) {
            return Err(Error::NotFound { path: path.to_string(), source: "no such upload".into() });
        }
        self.inner.abort_multipart(path, id).await
    }
}
