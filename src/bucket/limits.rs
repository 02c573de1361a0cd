//! Bounds around a store: how many requests are in flight, and how long those take for which somebody waits.
//!
//! Each class of requests has a lane of its own, so that a listing does not queue behind parts of uploads.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::checksum::Checksum;
use super::client::{self, Tries};
use super::key::ObjectKey;
use super::pending::PendingUploads;
use super::replaces::Replaces;
use super::store::{Abilities, CopiedPart, CopyPart, Listing, ObjectMeta, Put, PutPart, Store, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;

/// Requests of a bucket that are in flight at once.
pub const IN_FLIGHT: usize =
    METADATA_IN_FLIGHT + READS_IN_FLIGHT + AHEAD_IN_FLIGHT + WRITES_IN_FLIGHT + PARTS_IN_FLIGHT;

/// The same by class.
const METADATA_IN_FLIGHT: usize = 64;
const READS_IN_FLIGHT: usize = 32;
const AHEAD_IN_FLIGHT: usize = 24;
const WRITES_IN_FLIGHT: usize = 32;
const PARTS_IN_FLIGHT: usize = 16;

/// How long one try of a look-up, a listing or a removal takes at most, unless the mount's limit is shorter.
const METADATA_TRY: Duration = Duration::from_secs(10);

/// How many times that long they take at most, with all their tries and with the wait for their lane.
const METADATA_TRIES: u32 = 3;

/// How many times a read is tried that does not end in time.
const READ_TRIES: u32 = 2;

/// Bytes that are sent or read in the time that the mount's limit gives: more have that many times as long.
const BYTES_IN_TIME: u64 = 8 * MIB;

/// How many times as long a store has to put parts together, or to copy: of large objects that takes minutes.
const STORE_WORK: u32 = 5;

tokio::task_local! {
    /// The place in its lane that a request has.
    static PLACE: Arc<OwnedSemaphorePermit>;
}

/// A share of the place that this request has in its lane. A thread that works for it holds one, because nothing ends the
/// thread when the request is given up.
pub(super) fn place() -> Option<Arc<OwnedSemaphorePermit>> {
    PLACE.try_with(Arc::clone).ok()
}

/// A store whose requests are bounded.
pub(super) struct LimitedStore<S> {
    store: S,
    /// How long one try of a request takes at most that is not given more or less here.
    timeout: Duration,
    metadata: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    parts: Arc<Semaphore>,
}

impl<S> LimitedStore<S> {
    pub(super) fn new(store: S, timeout: Duration) -> Self {
        let lane = |places| Arc::new(Semaphore::new(places));
        Self {
            store,
            timeout,
            metadata: lane(METADATA_IN_FLIGHT),
            reads: lane(READS_IN_FLIGHT),
            ahead: lane(AHEAD_IN_FLIGHT),
            writes: lane(WRITES_IN_FLIGHT),
            parts: lane(PARTS_IN_FLIGHT),
        }
    }

    /// A request that somebody at a terminal waits for.
    async fn promptly<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let one_try = METADATA_TRY.min(self.timeout);
        let request = in_lane(&self.metadata, client::with_try_limit(one_try, request));
        within(one_try * METADATA_TRIES, request).await
    }

    /// A request that writes, each try of which has so long.
    async fn writing<T>(
        &self,
        lane: &Arc<Semaphore>,
        limit: Duration,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        in_lane(lane, client::with_try_limit(limit, request)).await
    }

    /// How long one try may take that sends or reads so many bytes.
    fn time_for(&self, bytes: u64) -> Duration {
        let times = u32::try_from(bytes.div_ceil(BYTES_IN_TIME)).unwrap_or(u32::MAX).max(1);
        self.timeout.saturating_mul(times)
    }
}

/// Gives a request up that takes too long.
async fn within<T>(limit: Duration, request: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| {
        let what = format!("the store has not answered within {} s", limit.as_secs());
        Err(Error::new(ErrorKind::TimedOut, what).transient())
    };
    tokio::time::timeout(limit, request).await.unwrap_or_else(late)
}

/// Makes a request when there is room in its lane.
pub(super) async fn in_lane<T>(lane: &Arc<Semaphore>, request: impl Future<Output = Result<T>>) -> Result<T> {
    let closed = |e| Error::new(ErrorKind::Internal, "a lane of a bucket is closed").because(e);
    let place = Arc::clone(lane).acquire_owned().await.map_err(closed)?;
    PLACE.scope(Arc::new(place), request).await
}

#[async_trait::async_trait]
impl<S: Store> Store for LimitedStore<S> {
    fn abilities(&self) -> Abilities {
        self.store.abilities()
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        self.promptly(self.store.head(key)).await
    }

    async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        self.promptly(self.store.has_prefix(key)).await
    }

    async fn list_page(
        &self,
        prefix: Option<&ObjectKey>,
        page: Option<String>,
    ) -> Result<(Listing, Option<String>)> {
        self.promptly(self.store.list_page(prefix, page)).await
    }

    async fn list_all(&self, limit: usize) -> Result<Option<Vec<ObjectMeta>>> {
        self.promptly(self.store.list_all(limit)).await
    }

    async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>> {
        self.promptly(self.store.list_names(key)).await
    }

    async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let limit = self.time_for(range.end - range.start);
        // A directory that hangs once hangs again.
        let tries = if self.store.abilities().is_remote { READ_TRIES } else { 1 };
        let read = async {
            for _ in 1..tries {
                let one_try = self.store.read(key, range.clone(), etag);
                if let Ok(read) = tokio::time::timeout(limit, one_try).await {
                    return read;
                }
            }
            within(limit, self.store.read(key, range.clone(), etag)).await
        };
        in_lane(&self.reads, read).await
    }

    async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<()> {
        let limit = self.time_for(range.end - range.start);
        in_lane(&self.ahead, within(limit, self.store.read_pieces(key, range, etag, piece, take))).await
    }

    async fn put(&self, key: &ObjectKey, put: Put) -> Result<Option<String>> {
        let limit = self.time_for(put.bytes.len() as u64);
        self.writing(&self.writes, limit, self.store.put(key, put)).await
    }

    async fn delete(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        self.promptly(self.store.delete(key, replaces)).await
    }

    async fn copy(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<()> {
        let limit = self.timeout * STORE_WORK;
        self.writing(&self.writes, limit, self.store.copy(from, etag, to, replaces)).await
    }

    async fn rename(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<bool> {
        self.promptly(self.store.rename(from, etag, to, replaces)).await
    }

    async fn make_directory(&self, key: &ObjectKey) -> Result<()> {
        self.promptly(self.store.make_directory(key)).await
    }

    async fn remove_directory(&self, key: &ObjectKey) -> Result<()> {
        self.promptly(self.store.remove_directory(key)).await
    }

    async fn start_upload(
        &self,
        key: &ObjectKey,
        part_size: u64,
        tags: &Tags,
        checksum: Option<Checksum>,
        tries: &Tries,
    ) -> Result<String> {
        let start = self.store.start_upload(key, part_size, tags, checksum, tries);
        self.writing(&self.writes, self.timeout, start).await
    }

    async fn pending_uploads(&self, key: &ObjectKey) -> Result<PendingUploads> {
        self.promptly(self.store.pending_uploads(key)).await
    }

    async fn has_part(&self, key: &ObjectKey, upload: &str) -> Result<bool> {
        self.promptly(self.store.has_part(key, upload)).await
    }

    async fn put_part(&self, key: &ObjectKey, upload: &str, part: PutPart) -> Result<String> {
        let limit = self.time_for(part.bytes.len() as u64);
        self.writing(&self.parts, limit, self.store.put_part(key, upload, part)).await
    }

    async fn crc64(&self, key: &ObjectKey, etag: Option<&str>) -> Result<Option<u64>> {
        self.promptly(self.store.crc64(key, etag)).await
    }

    async fn copy_part(&self, key: &ObjectKey, upload: &str, part: CopyPart) -> Result<CopiedPart> {
        let range = &part.source.range;
        let limit = self.time_for(range.end - range.start).max(self.timeout * STORE_WORK);
        self.writing(&self.parts, limit, self.store.copy_part(key, upload, part)).await
    }

    async fn expected_etag_prefix(
        &self,
        upload: &str,
        parts: &[String],
        size: u64,
    ) -> Result<Option<String>> {
        in_lane(&self.writes, self.store.expected_etag_prefix(upload, parts, size)).await
    }

    async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        parts: Vec<String>,
        object_size: u64,
        replaces: &Replaces,
        crc64: Option<u64>,
    ) -> Result<Option<String>> {
        let complete = self.store.complete_upload(key, upload, parts, object_size, replaces, crc64);
        self.writing(&self.writes, self.timeout * STORE_WORK, complete).await
    }

    async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()> {
        self.writing(&self.writes, self.timeout, self.store.abort_upload(key, upload)).await
    }

    async fn sweep(&self, state: &str, kept: Vec<String>) -> Result<()> {
        in_lane(&self.writes, self.store.sweep(state, kept)).await
    }
}
