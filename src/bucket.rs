//! Buckets: objects by key, in an object store or in a local directory, and the uploads that make them.
//!
//! The only module that writes to an object store. Everything here is asynchronous; a local directory is served
//! from blocking threads. An object appears, whole, when its upload is completed, and never before.

mod block_cache;
mod connect;
mod credentials;
mod key;
mod local;
mod object_file;
mod pace;
mod remote;
mod replaces;
mod signed;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use md5::{Digest, Md5};
use object_store::ObjectStore;
use object_store::multipart::MultipartStore;

pub use block_cache::BlockCache;
use block_cache::next_number;
pub use key::ObjectKey;
pub use object_file::ObjectFile;
pub use pace::Pace;
pub use replaces::Replaces;

use crate::error::{Error, ErrorKind, Result};
use crate::settings::{CACHE, REQUEST_TIMEOUT, Secret};
use crate::units::{GIB, MIB, TIB};
use connect::Place;
use local::LocalStore;
use remote::RemoteStore;
use replaces::Conditions;

/// The directory of our own files in a bucket: uploads under way, probes.
pub const CONTROL_PREFIX: &str = ".freightfs";

/// Largest of our own files that is read: the attributes of about a million files.
const MAX_CONTROL_SIZE: u64 = 128 * MIB;

/// How often, and after which pause, a store is asked for what was just uploaded.
const VERIFY_TRIES: u32 = 3;
const VERIFY_PAUSE: Duration = Duration::from_millis(200);

/// What a probe writes.
const PROBE: &[u8] = b"freightfs\n";

/// What a probe tries to put in its place.
const OTHER_PROBE: &[u8] = b"freight fs\n";

/// An entity tag that no object has.
const OTHER_TAG: &str = "\"00000000000000000000000000000000\"";

/// Smallest part that is sent.
const PART_SIZE: u64 = 8 * MIB;

/// Most parts in an upload (S3 User Guide, "Amazon S3 multipart upload limits").
pub const MAX_PARTS: usize = 10_000;

/// Largest part (the same table).
const MAX_PART_SIZE: u64 = 5 * GIB;

/// Largest object that a store copies with one request (S3 API Reference, "CopyObject").
const MAX_COPY: u64 = 5 * GIB;

/// Largest object that this many of these parts make.
const MAX_OBJECT_SIZE: u64 = 48 * TIB;

/// Tags of an object: names and values, as S3 has them.
pub type Tags = BTreeMap<String, String>;

/// How requests to a store are made.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// How long one of them may take before it is tried again.
    pub timeout: Duration,
    /// How fast bytes are uploaded; `None` for as fast as it goes.
    pub pace: Option<Arc<Pace>>,
    /// Where blocks of objects are kept that were read.
    pub blocks: Arc<BlockCache>,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(REQUEST_TIMEOUT.into()),
            pace: None,
            blocks: Arc::new(BlockCache::new(CACHE)),
        }
    }
}

/// What is known of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectMeta {
    /// Its key.
    pub key: ObjectKey,
    /// Its bytes.
    pub object_size: u64,
    /// When it was last written.
    pub modified: SystemTime,
    /// Its entity tag: another content has another tag.
    pub etag: Option<String>,
}

/// One of our own files in a bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnFile {
    /// What is in it.
    pub bytes: Bytes,
    /// Its entity tag, which its next version can be made to replace.
    pub etag: Option<String>,
}

/// One level of a bucket's keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    /// The objects at this level.
    pub objects: Vec<ObjectMeta>,
    /// The names, without slashes, below which there are more.
    pub prefixes: Vec<String>,
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
    backend: Backend,
    /// Bytes of the largest object that the store copies with one request.
    largest_copy: u64,
    limits: RequestLimits,
}

enum Backend {
    Local(LocalStore),
    Remote(RemoteStore),
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
        let malformed = |what: String| Error::new(ErrorKind::Malformed, what).in_file(redacted(url));
        let parsed = url::Url::parse(url).map_err(|e| malformed("not a URL".to_owned()).because(e))?;
        if !parsed.username().is_empty() || parsed.password().is_some() {
            let what = "a bucket's URL holds no credentials: give them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
            return Err(malformed(what.to_owned()));
        }
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(malformed("a bucket's URL has no ? and no #; write them as %3F and %23".to_owned()));
        }
        let backend = match parsed.scheme() {
            "file" => {
                if let Some(key) = client.keys().next() {
                    return Err(malformed(format!("a local directory has no setting {key:?}")));
                }
                let path =
                    parsed.to_file_path().map_err(|()| malformed("not a local directory".to_owned()))?;
                Backend::Local(LocalStore::open(&path)?)
            }
            "s3" => Backend::Remote(Place::parse(&parsed, limits.timeout, client)?.s3()?),
            "az" => Backend::Remote(Place::parse(&parsed, limits.timeout, client)?.azure()?),
            "gs" => Backend::Remote(Place::parse(&parsed, limits.timeout, client)?.google()?),
            other => {
                let what = format!("the scheme {other:?} is not known; known are file, s3, az and gs");
                return Err(malformed(what));
            }
        };
        let url = parsed.as_str().trim_end_matches('/');
        Ok(Self::new(name, url, backend, MAX_COPY, limits.clone()))
    }

    /// A bucket over given stores, for tests that let requests fail.
    pub fn with_stores(
        name: &str,
        url: &str,
        store: Arc<dyn ObjectStore>,
        uploads: Arc<dyn MultipartStore>,
    ) -> Self {
        Self::with_copy_limit(name, url, store, uploads, MAX_COPY)
    }

    /// As [`with_stores`](Self::with_stores), over a store that copies no object larger than this with one request.
    pub fn with_copy_limit(
        name: &str,
        url: &str,
        store: Arc<dyn ObjectStore>,
        uploads: Arc<dyn MultipartStore>,
        largest_copy: u64,
    ) -> Self {
        let backend = Backend::Remote(RemoteStore::new(store, uploads));
        Self::new(name, url, backend, largest_copy, RequestLimits::default())
    }

    fn new(name: &str, url: &str, backend: Backend, largest_copy: u64, limits: RequestLimits) -> Self {
        let (name, url) = (name.to_owned(), url.to_owned());
        Self { inner: Arc::new(Inner { number: next_number(), name, url, backend, largest_copy, limits }) }
    }

    /// Where blocks are kept.
    fn blocks(&self) -> &BlockCache {
        &self.inner.limits.blocks
    }

    /// Whether it is at a store, and not a directory.
    fn is_remote(&self) -> bool {
        matches!(self.inner.backend, Backend::Remote(_))
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
        matches!(&self.inner.backend, Backend::Remote(store) if store.has_tags())
    }

    /// What the store cannot do that others can, in words.
    pub fn limitation(&self) -> Option<String> {
        match &self.inner.backend {
            Backend::Local(_) => None,
            Backend::Remote(store) => store.limitation(),
        }
    }

    /// Bytes of each part but the last for an object of `object_size` bytes: 8 MiB, or as much as keeps the
    /// object within 10 000 parts.
    pub fn part_size_for(&self, object_size: u64) -> Result<u64> {
        if object_size > MAX_OBJECT_SIZE {
            let what =
                format!("an object has at most {MAX_OBJECT_SIZE} bytes, this one would have {object_size}");
            return Err(Error::new(ErrorKind::TooLarge, what).in_file(self.url()));
        }
        let part_size = object_size.div_ceil(MAX_PARTS as u64).max(PART_SIZE).next_multiple_of(MIB);
        debug_assert!(part_size <= MAX_PART_SIZE);
        Ok(part_size)
    }

    /// Finds out whether the bucket is there and can be used as exports use it: listed, written, read, written in parts,
    /// removed from. The object that it takes is removed again.
    pub async fn probe(&self) -> Result<()> {
        let key = ObjectKey::internal(&format!("{CONTROL_PREFIX}/probe-{}", unique()));
        let content = Bytes::from_static(PROBE);
        // Listing first: some stores answer a put into a bucket that is not there with an internal error.
        self.has_prefix(&key).await?;
        self.put(&key, content.clone(), &Replaces::Anything).await?;
        let read = self.read(&key, 0..PROBE.len() as u64, None).await?;
        if read != content {
            let what = "the store gives other bytes than were written";
            return Err(self.named(Error::new(ErrorKind::Io, what), &key));
        }
        if let Backend::Remote(store) = &self.inner.backend {
            let part = self.probe_upload(&key, &Replaces::Anything).await?;
            let meta = self.head(&key).await?;
            let is_md5 = part.trim_matches('"') == hex::encode(Md5::digest(PROBE));
            let etag = meta.and_then(|meta| meta.etag);
            store.set_md5_etags(is_md5 && etag == remote::composite_etag(&[part]));
            store.set_conditions(self.probe_conditions(&key).await?);
        }
        self.delete(&key).await
    }

    /// Makes an object by an upload of one part; returns the part's id.
    async fn probe_upload(&self, key: &ObjectKey, replaces: &Replaces) -> Result<String> {
        let upload = self.start_upload(key, PART_SIZE, &Tags::new()).await?;
        let made = async {
            let part = self.put_part(key, &upload, 0, Bytes::from_static(PROBE)).await?;
            let size = PROBE.len() as u64;
            self.complete_upload(key, &upload, vec![part.clone()], size, replaces).await?;
            Ok(part)
        };
        let made = made.await;
        if made.is_err() {
            let _ = self.abort_upload(key, &upload).await;
        }
        made
    }

    /// Finds out which conditions the store keeps to, by some that do not hold and one that does.
    async fn probe_conditions(&self, key: &ObjectKey) -> Result<Conditions> {
        let Backend::Remote(store) = &self.inner.backend else { return Ok(Conditions::default()) };
        // So that the store is asked, and not we.
        store.set_conditions(Conditions {
            creations: true,
            updates: true,
            completions: true,
            removals: true,
        });
        let wrong = Replaces::Tag(OTHER_TAG.to_owned());
        let refuses = |result: Result<()>| result.is_err_and(|error| error.kind() == ErrorKind::Conflict);
        let put = async |replaces| self.put(key, Bytes::from_static(OTHER_PROBE), replaces).await.map(drop);
        let complete = async |replaces| self.probe_upload(key, replaces).await.map(drop);
        let removals = refuses(self.delete_if(key, &wrong).await);
        // Whatever the store made of that, there is an object again.
        self.put(key, Bytes::from_static(PROBE), &Replaces::Anything).await?;
        let completions = refuses(complete(&wrong).await) && refuses(complete(&Replaces::Nothing).await);
        let etag = self.put(key, Bytes::from_static(PROBE), &Replaces::Anything).await?;
        let creations = refuses(put(&Replaces::Nothing).await);
        let right = etag.map_or(Replaces::Nothing, Replaces::Tag);
        let updates = refuses(put(&wrong).await) && put(&right).await.is_ok();
        Ok(Conditions { creations, updates, completions, removals })
    }

    /// What is known of an object; `None` when it is not there.
    pub async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        match &self.inner.backend {
            Backend::Local(store) => store.head(key).await,
            Backend::Remote(store) => store.head(key).await,
        }
        .map_err(|e| self.named(e, key))
    }

    /// Whether there is any object below `key/`.
    pub async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        match &self.inner.backend {
            Backend::Local(store) => store.is_directory(key).await,
            Backend::Remote(store) => store.has_prefix(key).await,
        }
        .map_err(|e| self.named(e, key))
    }

    /// One level below `prefix`, or of the whole bucket. Our own files are left out.
    pub async fn list(&self, prefix: Option<&ObjectKey>) -> Result<Listing> {
        let mut whole = Listing::default();
        let mut page = None;
        loop {
            let (listing, next) = self.list_page(prefix, page).await?;
            whole.objects.extend(listing.objects);
            whole.prefixes.extend(listing.prefixes);
            if next.is_none() {
                return Ok(whole);
            }
            page = next;
        }
    }

    /// A page of [`list`](Self::list): the first one, or the one that the page before named. `None` names no further one.
    pub async fn list_page(
        &self,
        prefix: Option<&ObjectKey>,
        page: Option<String>,
    ) -> Result<(Listing, Option<String>)> {
        let listed = match &self.inner.backend {
            Backend::Local(store) => store.list(prefix).await.map(|listing| (listing, None)),
            Backend::Remote(store) => store.list(prefix, page).await,
        };
        let (mut listing, next) =
            listed.map_err(|e| e.in_file(prefix.map_or(self.url().to_owned(), |p| self.url_of(p))))?;
        if prefix.is_none() {
            listing.prefixes.retain(|name| name != CONTROL_PREFIX);
        }
        Ok((listing, next))
    }

    /// All objects of the bucket by few requests, at whatever level; `None` when they are more than `limit`, or where the
    /// store has directories. Our own files are left out.
    pub async fn list_all(&self, limit: usize) -> Result<Option<Vec<ObjectMeta>>> {
        match &self.inner.backend {
            Backend::Local(_) => Ok(None),
            Backend::Remote(store) => store.list_all(limit).await.map_err(|e| e.in_file(self.url())),
        }
    }

    /// Bytes of an object, which must still have the tag `etag` when one is given.
    ///
    /// # Errors
    /// [`SourceChanged`](ErrorKind::SourceChanged) when it has another one.
    pub async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let wanted = range.end - range.start;
        let bytes = match &self.inner.backend {
            Backend::Local(store) => store.read(key, range, etag).await,
            Backend::Remote(store) => store.read(key, range, etag).await,
        }
        .map_err(|e| self.named(e, key))?;
        if bytes.len() as u64 != wanted {
            let what = format!("the store gave {} bytes instead of {wanted}", bytes.len());
            return Err(self.named(Error::new(ErrorKind::Io, what), key));
        }
        Ok(bytes)
    }

    /// The same by one request, handed over in pieces of so many bytes as they come, the last one with what is left.
    async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        mut take: impl FnMut(Bytes) + Send,
    ) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(_) => {
                for start in range.clone().step_by(piece) {
                    take(self.read(key, start..range.end.min(start + piece as u64), etag).await?);
                }
                Ok(())
            }
            Backend::Remote(store) => {
                let read = store.read_pieces(key, range, etag, piece, take).await;
                read.map_err(|e| self.named(e, key))
            }
        }
    }

    /// Writes a small object at once; for what is about objects, which waits for nothing. Returns its entity tag.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when there is something else than what is to be replaced.
    pub async fn put(&self, key: &ObjectKey, bytes: Bytes, replaces: &Replaces) -> Result<Option<String>> {
        self.put_now(key, bytes, &Tags::new(), replaces).await
    }

    /// Writes an object with these tags at once, when the limit on uploads allows it. Returns its entity tag.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_tagged(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        tags: &Tags,
        replaces: &Replaces,
    ) -> Result<Option<String>> {
        self.keep_pace(&bytes).await;
        self.put_now(key, bytes, tags, replaces).await
    }

    async fn put_now(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        tags: &Tags,
        replaces: &Replaces,
    ) -> Result<Option<String>> {
        let put = match &self.inner.backend {
            Backend::Local(store) => store.put(key, bytes.clone(), replaces).await.map(Some),
            Backend::Remote(store) => store.put(key, bytes.clone(), tags, replaces).await,
        };
        match put {
            // The answer to an earlier try of the same put may have been lost.
            Err(error) if error.kind() == ErrorKind::Conflict => match self.same_content(key, &bytes).await {
                Ok(Some(meta)) => Ok(meta.etag),
                _ => Err(self.named(error, key)),
            },
            put => put.map_err(|e| self.named(e, key)),
        }
    }

    /// The object, if it has these bytes.
    async fn same_content(&self, key: &ObjectKey, bytes: &Bytes) -> Result<Option<ObjectMeta>> {
        let Some(meta) = self.head(key).await?.filter(|meta| meta.object_size == bytes.len() as u64) else {
            return Ok(None);
        };
        let is_same =
            bytes.is_empty() || self.read(key, 0..meta.object_size, meta.etag.as_deref()).await? == *bytes;
        Ok(is_same.then_some(meta))
    }

    /// Reads one of our own files, by its name below [`CONTROL_PREFIX`]; `None` when it is not there.
    pub async fn read_control(&self, name: &str) -> Result<Option<OwnFile>> {
        let key = ObjectKey::internal(&format!("{CONTROL_PREFIX}/{name}"));
        match self.head(&key).await? {
            Some(meta) if meta.object_size == 0 => Ok(Some(OwnFile { bytes: Bytes::new(), etag: meta.etag })),
            Some(meta) if meta.object_size > MAX_CONTROL_SIZE => {
                let what = format!("one of freightfs's own files has {} bytes", meta.object_size);
                Err(self.named(Error::new(ErrorKind::TooLarge, what), &key))
            }
            Some(meta) => {
                let bytes = self.read(&key, 0..meta.object_size, meta.etag.as_deref()).await?;
                Ok(Some(OwnFile { bytes, etag: meta.etag }))
            }
            None => Ok(None),
        }
    }

    /// Writes one of our own files; returns its entity tag.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_control(&self, name: &str, bytes: Bytes, replaces: &Replaces) -> Result<Option<String>> {
        self.put(&ObjectKey::internal(&format!("{CONTROL_PREFIX}/{name}")), bytes, replaces).await
    }

    /// Writes one of our own files unless it is there with another content; says whether it is there with this one.
    pub async fn create_control(&self, name: &str, bytes: Bytes) -> Result<bool> {
        match self.put_control(name, bytes, &Replaces::Nothing).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The names of our own files in a directory of them.
    pub async fn list_control(&self, name: &str) -> Result<Vec<String>> {
        let key = ObjectKey::internal(&format!("{CONTROL_PREFIX}/{name}"));
        match &self.inner.backend {
            Backend::Local(store) => store.list_names(&key).await,
            Backend::Remote(store) => store.list_names(&key).await,
        }
        .map_err(|e| self.named(e, &key))
    }

    /// Whether the store refuses to create what is there, as [`probe`](Self::probe) has found out: some accept the
    /// condition and ignore it.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) when it does not.
    pub async fn probe_create(&self) -> Result<()> {
        match &self.inner.backend {
            Backend::Remote(store) if !store.conditions().creations => {
                let what = "the store does not keep to conditional puts, so that hosts cannot agree in it: it cannot be shared";
                Err(Error::unsupported(what).in_file(self.url()))
            }
            _ => Ok(()),
        }
    }

    /// Removes one of our own files.
    pub async fn delete_control(&self, name: &str) -> Result<()> {
        self.delete(&ObjectKey::internal(&format!("{CONTROL_PREFIX}/{name}"))).await
    }

    /// Removes an object, whatever it is; one that is not there is no failure.
    pub async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.delete_if(key, &Replaces::Anything).await
    }

    /// Removes an object that has a tag; one that is not there is no failure.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when it has another tag.
    pub async fn delete_if(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(store) => store.delete(key, replaces).await,
            Backend::Remote(store) => store.delete(key, replaces).await,
        }
        .map_err(|e| self.named(e, key))
    }

    /// Whether [`copy`](Self::copy) can copy an object of that size. A larger one has to be read and sent in parts.
    pub fn copies(&self, object_size: u64) -> bool {
        match &self.inner.backend {
            Backend::Local(_) => true,
            Backend::Remote(_) => object_size <= self.inner.largest_copy,
        }
    }

    /// Copies an object within the bucket, by one request to the store.
    pub async fn copy(&self, from: &ObjectKey, to: &ObjectKey) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(store) => store.copy(from, to).await,
            Backend::Remote(store) => store.copy(from, to).await,
        }
        .map_err(|e| self.named(e, from))
    }

    /// Makes an empty directory where the store has directories; elsewhere there is nothing to do.
    pub async fn make_directory(&self, key: &ObjectKey) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(store) => store.make_directory(key).await.map_err(|e| self.named(e, key)),
            Backend::Remote(_) => Ok(()),
        }
    }

    /// Removes an empty directory where the store has directories.
    pub async fn remove_directory(&self, key: &ObjectKey) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(store) => store.remove_directory(key).await.map_err(|e| self.named(e, key)),
            Backend::Remote(_) => Ok(()),
        }
    }

    /// Starts the upload of an object with these tags. Its id is good for later processes too.
    pub async fn start_upload(&self, key: &ObjectKey, part_size: u64, tags: &Tags) -> Result<String> {
        match &self.inner.backend {
            Backend::Local(store) => store.start_upload(part_size).await,
            Backend::Remote(store) => store.start_upload(key, tags).await,
        }
        .map_err(|e| self.named(e, key))
    }

    /// Sends part `index`, counted from 0; returns the id by which it is put together.
    pub async fn put_part(&self, key: &ObjectKey, upload: &str, index: usize, part: Bytes) -> Result<String> {
        self.keep_pace(&part).await;
        match &self.inner.backend {
            Backend::Local(store) => store.put_part(upload, index, part).await,
            Backend::Remote(store) => store.put_part(key, upload, index, part).await,
        }
        .map_err(|e| self.named(e, key))
    }

    /// What the entity tag of the object begins with that these parts will make, where that is known before.
    pub async fn completion_mark(&self, upload: &str, parts: &[String]) -> Result<Option<String>> {
        match &self.inner.backend {
            Backend::Local(store) => store.completion_mark(upload).await.map(Some),
            Backend::Remote(_) => Ok(remote::composite_etag(parts)),
        }
    }

    /// Makes the object out of its parts, and asks the store whether it is what was sent.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when there is something else than what is to be replaced. The upload is still
    /// there then.
    pub async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        parts: Vec<String>,
        object_size: u64,
        replaces: &Replaces,
    ) -> Result<ObjectMeta> {
        let etag = remote::composite_etag(&parts).filter(|_| self.has_md5_etags());
        let completed = match &self.inner.backend {
            Backend::Local(store) => store.complete_upload(key, upload, object_size, replaces).await,
            Backend::Remote(store) => store.complete_upload(key, upload, parts, replaces).await,
        };
        if let Err(error) = completed {
            // The answer to an earlier try of the same completion may have been lost.
            if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NotFound)
                && let Some(etag) = etag
                && let Ok(Some(meta)) = self.head(key).await
                && (meta.object_size, meta.etag.as_ref()) == (object_size, Some(&etag))
            {
                return Ok(meta);
            }
            return Err(self.named(error, key));
        }
        self.verify(key, object_size, etag.as_deref()).await
    }

    /// Whether an object's entity tag tells what is in it.
    fn has_md5_etags(&self) -> bool {
        match &self.inner.backend {
            Backend::Local(_) => false,
            Backend::Remote(store) => store.has_md5_etags(),
        }
    }

    /// Asks the store whether an object is the one that was just sent: its size, and the entity tag where this store
    /// makes it as S3 does.
    pub async fn verify(&self, key: &ObjectKey, object_size: u64, etag: Option<&str>) -> Result<ObjectMeta> {
        let etag = etag.filter(|_| self.has_md5_etags());
        let wrong = |what: String| Error::new(ErrorKind::UploadFailed, what);
        // The object is in place, right or wrong: one bad answer does not decide about it.
        let mut tries = 1;
        loop {
            let error = match self.head(key).await {
                Err(error) => error,
                Ok(None) => wrong("the object is not there after its upload".to_owned()),
                Ok(Some(meta)) if meta.object_size != object_size => {
                    let size = meta.object_size;
                    wrong(format!("the object has {size} bytes after its upload, not {object_size}"))
                }
                Ok(Some(meta)) if etag.is_some() && meta.etag.as_deref() != etag => {
                    let (found, sent) = (meta.etag.unwrap_or_default(), etag.unwrap_or_default());
                    wrong(format!(
                        "the object's entity tag is {found} after its upload; what was sent has {sent}"
                    ))
                }
                Ok(Some(meta)) => return Ok(meta),
            };
            if tries == VERIFY_TRIES {
                return Err(self.named(error, key));
            }
            tries += 1;
            tokio::time::sleep(VERIFY_PAUSE).await;
        }
    }

    /// Gives an upload up; one that is not there any more is no failure.
    pub async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(store) => store.abort_upload(upload).await,
            Backend::Remote(store) => store.abort_upload(key, upload).await,
        }
        .map_err(|e| self.named(e, key))
    }

    /// Removes what dead processes of this host left of uploads, but for those `kept`. A remote store cannot tell
    /// whose an upload is: there only uploads that are known by their id are ever given up.
    pub async fn sweep(&self, kept: Vec<String>) -> Result<()> {
        match &self.inner.backend {
            Backend::Local(store) => store.sweep(kept).await,
            Backend::Remote(_) => Ok(()),
        }
    }

    async fn keep_pace(&self, bytes: &Bytes) {
        if let Some(pace) = &self.inner.limits.pace {
            pace.wait(bytes.len() as u64).await;
        }
    }

    fn named(&self, error: Error, key: &ObjectKey) -> Error {
        error.in_file(self.url_of(key))
    }
}

/// A name that nobody else uses: process, time and a random number.
fn unique() -> String {
    use std::hash::{BuildHasher, Hasher};
    let random = std::hash::RandomState::new().build_hasher().finish();
    format!("{}-{random:016x}", std::process::id())
}

/// A URL without what stands between scheme and host, which may be a secret.
fn redacted(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 < at => format!("{}…{}", &url[..scheme + 3], &url[at..]),
        _ => url.to_owned(),
    }
}
