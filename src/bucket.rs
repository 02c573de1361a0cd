//! Buckets: objects by key, in an object store or in a local directory, and the uploads that make them.
//!
//! The only module that writes to an object store. Everything here is asynchronous; a local directory is served
//! from blocking threads. An object appears, whole, when its upload is completed, and never before; what it is to
//! replace, a [`Replaces`], is part of the request.
//!
//! | file | what it owns |
//! |---|---|
//! | `object.rs`, `upload.rs`, `copies.rs`, `own_files.rs` | what can be done in a [`Bucket`]: with objects, with uploads, with parts that the store copies, with our own files |
//! | `zeros.rs` | the object out of which zeros are copied |
//! | `probe.rs` | what a store can do, found out at mount |
//! | `store.rs` | the trait of all stores |
//! | `local.rs`, `remote.rs` | a directory, and what object_store reaches, as stores |
//! | `limits.rs`, `rate_limit.rs` | around a store: requests in flight, time; bytes in a second |
//! | `connect.rs`, `credentials.rs`, `client.rs`, `listing.rs`, `pending.rs`, `part_copy.rs`, `checksum.rs`, `reply.rs` | clients of remote stores; what object_store has no words for; what a store's answers mean |
//! | `object_file.rs`, `block_cache.rs` | an object as a file, and its blocks in memory |

mod block_cache;
mod checksum;
mod client;
mod connect;
mod copies;
mod credentials;
mod key;
mod limits;
mod listing;
mod local;
mod object;
mod object_file;
mod own_files;
mod part_copy;
mod pending;
mod probe;
mod rate_limit;
mod remote;
mod replaces;
mod reply;
mod store;
mod upload;
mod zeros;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::multipart::MultipartStore;
use parking_lot::Mutex;

pub use block_cache::BlockCache;
use block_cache::next_number;
pub use checksum::Crc64;
pub use key::{CONTROL_PREFIX, ObjectKey, random};
pub use limits::IN_FLIGHT;
pub use object_file::{ObjectFile, wait};
pub use own_files::OwnFile;
pub use pending::{PendingUpload, PendingUploads};
pub use rate_limit::RateLimit;
pub use replaces::Replaces;
pub use store::{CopySource, Listing, ObjectMeta, Tags};
pub use upload::{MAX_PARTS, START_LIMIT};
pub use zeros::Zeros;
#[doc(hidden)]
pub use {listing::fuzz_listing, reply::fuzz_reply};

use crate::error::{Error, ErrorKind, Result};
use crate::settings::{MountSettings, Secret};
use connect::Place;
use limits::LimitedStore;
use local::LocalStore;
use remote::RemoteStore;
use store::{Abilities, Store};

/// How requests to a store are made.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// How long one of them may take before it is tried again. Look-ups, listings and removals take three times as long
    /// at most with all their tries, and 30 seconds at most; reads twice as long.
    pub timeout: Duration,
    /// How fast bytes are uploaded; `None` for as fast as it goes.
    pub rate: Option<Arc<RateLimit>>,
    /// Where blocks of objects are kept that were read.
    pub blocks: Arc<BlockCache>,
}

impl Default for RequestLimits {
    fn default() -> Self {
        let settings = MountSettings::default();
        Self {
            timeout: Duration::from_secs(settings.timeout.into()),
            rate: None,
            blocks: Arc::new(BlockCache::new(settings.cache)),
        }
    }
}

/// A bucket. Cheap to clone.
#[derive(Clone)]
pub struct Bucket {
    inner: Arc<Inner>,
}

struct Inner {
    /// Tells it from other buckets of this process, whatever their names are.
    number: u64,
    name: String,
    url: String,
    store: Box<dyn Store>,
    /// What the store can do; more of it is known after a probe.
    abilities: Mutex<Abilities>,
    limits: RequestLimits,
    /// The object of zeros, once all of it was seen.
    zeros: Mutex<Option<CopySource>>,
    growing_zeros: tokio::sync::Mutex<()>,
}

impl Bucket {
    /// Opens `file:///directory`, `s3://bucket/prefix`, `az://container/prefix` or `gs://bucket/prefix`.
    /// Nothing is asked of a remote store yet, see [`probe`](Self::probe).
    pub fn open(name: &str, url: &str) -> Result<Self> {
        Self::open_with(name, url, &RequestLimits::default(), &BTreeMap::new())
    }

    /// The same with limits, and with settings of the store's client by object_store's names for them, which come
    /// before the environment's.
    pub fn open_with(
        name: &str,
        url: &str,
        limits: &RequestLimits,
        client: &BTreeMap<String, Secret>,
    ) -> Result<Self> {
        let malformed = |what: String| Error::new(ErrorKind::Malformed, what).in_file(url);
        let parsed = url::Url::parse(url).map_err(|e| malformed("not a URL".to_owned()).because(e))?;
        if !parsed.username().is_empty() || parsed.password().is_some() {
            let what = "a bucket's URL holds no credentials: give them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
            return Err(malformed(what.to_owned()));
        }
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(malformed("a bucket's URL has no ? and no #; write them as %3F and %23".to_owned()));
        }
        let place = || Place::parse(&parsed, limits.timeout, client);
        let store = match parsed.scheme() {
            "file" => {
                if let Some(key) = client.keys().next() {
                    return Err(malformed(format!("a local directory has no setting {key:?}")));
                }
                let path =
                    parsed.to_file_path().map_err(|()| malformed("not a local directory".to_owned()))?;
                let store = LimitedStore::new(LocalStore::open(&path, limits.timeout)?, limits.timeout);
                return Ok(Self::new(name, parsed.as_str(), Box::new(store), limits));
            }
            "s3" => place()?.s3()?,
            "az" => place()?.azure()?,
            "gs" => place()?.google()?,
            other => {
                let what = format!("the scheme {other:?} is not known; known are file, s3, az and gs");
                return Err(malformed(what));
            }
        };
        Ok(Self::new(name, parsed.as_str(), Box::new(LimitedStore::new(store, limits.timeout)), limits))
    }

    /// A bucket over given stores, for tests that let requests fail.
    pub fn with_stores(
        name: &str,
        url: &str,
        store: Arc<dyn ObjectStore>,
        uploads: Arc<dyn MultipartStore>,
    ) -> Self {
        let store = Box::new(RemoteStore::new(store, uploads));
        Self::new(name, url, store, &RequestLimits::default())
    }

    /// The same bucket as one whose store copies no object larger than this with one request, for tests.
    #[must_use]
    pub fn with_largest_copy(self, largest_copy: u64) -> Self {
        self.inner.abilities.lock().largest_copy = largest_copy;
        self
    }

    fn new(name: &str, url: &str, store: Box<dyn Store>, limits: &RequestLimits) -> Self {
        let (name, url) = (name.to_owned(), url.trim_end_matches('/').to_owned());
        let abilities = Mutex::new(store.abilities());
        let limits = limits.clone();
        let (zeros, growing_zeros) = (Mutex::default(), tokio::sync::Mutex::default());
        let number = next_number();
        Self { inner: Arc::new(Inner { number, name, url, store, abilities, limits, zeros, growing_zeros }) }
    }

    fn store(&self) -> &dyn Store {
        &*self.inner.store
    }

    fn abilities(&self) -> Abilities {
        self.inner.abilities.lock().clone()
    }

    /// Its name in the mount.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// An object's URL, for people: the key is not escaped.
    pub fn url_of(&self, key: &ObjectKey) -> String {
        format!("{}/{key}", self.inner.url)
    }

    /// Whether objects can have tags.
    pub fn has_tags(&self) -> bool {
        self.inner.abilities.lock().has_tags
    }

    /// Whether [`copy`](Self::copy) can copy an object of that size. A larger one has to be read and sent in parts.
    pub fn can_copy(&self, object_size: u64) -> bool {
        object_size <= self.inner.abilities.lock().largest_copy
    }

    /// What the store cannot do that others can, in words, as far as a [`probe`](Self::probe) has found out.
    pub fn limitation(&self) -> Option<String> {
        self.inner.abilities.lock().limitation()
    }

    /// Fails where a [`probe`](Self::probe) has found that nothing can be written.
    ///
    /// # Errors
    /// [`ReadOnly`](ErrorKind::ReadOnly).
    pub fn check_writable(&self) -> Result<()> {
        if self.inner.abilities.lock().is_read_only {
            let what = "the bucket is read-only: its store denies writing with these credentials";
            return Err(Error::new(ErrorKind::ReadOnly, what).in_file(self.url()));
        }
        Ok(())
    }

    /// Waits until the limit on the bytes that are sent in a second lets anything be sent.
    pub async fn wait_for_rate(&self) {
        self.throttle(0).await;
    }

    /// Waits until so many bytes may be sent.
    async fn throttle(&self, length: usize) {
        if let Some(rate) = &self.inner.limits.rate {
            rate.throttle(length as u64).await;
        }
    }

    fn named(&self, error: Error, key: &ObjectKey) -> Error {
        error.in_file(self.url_of(key))
    }
}
