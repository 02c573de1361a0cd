//! A bucket as a catalog: its objects are read in ranges, each of one generation, by entity tag.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::{StreamExt, TryStreamExt, stream};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::candidate::is_sidecar;
use super::store::{CatalogStore, Entry};
use crate::bucket::{Bucket, ObjectFile, ObjectKey, ObjectMeta, wait};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::format::ImageFormat;
use crate::storage::{Generation, Storage, changed, check_range};
use crate::units::FileOffset;
use crate::vfile::VirtualFile;
use crate::whole_file;

/// How old may be what is known of names and objects. Bytes are never of two generations: each request names the tag.
const AGE: Duration = Duration::from_secs(5);

/// How many names that are not listed are looked for by listing anew, one after the other; then one in each [`MISSED`].
const LOOKED_FOR: u32 = 16;
const MISSED: Duration = Duration::from_secs(1);

/// Objects of which something is remembered.
const KNOWN: std::num::NonZeroUsize = std::num::NonZeroUsize::new(65_536).expect("it is not 0");

/// Sidecars whose text is remembered, and their bytes together.
const TEXTS: std::num::NonZeroUsize = std::num::NonZeroUsize::new(4096).expect("it is not 0");
const TEXT_BYTES: usize = 16 << 20;

/// Objects that are listed whatever their level: a thousand a request. Of a bucket with more, each directory is a request.
const LISTED_DEEP: usize = 10_000;

/// Directories that are listed at once.
const LISTED_AT_ONCE: usize = 16;

/// The objects of a bucket, as paths below `/`. Cheap to clone.
///
/// Everything blocks on the runtime and so must not be called on its own worker threads.
#[derive(Clone)]
pub struct BucketFiles {
    inner: Arc<Inner>,
}

struct Inner {
    bucket: Bucket,
    runtime: Handle,
    known: Mutex<LruCache<ObjectKey, (Instant, ObjectMeta)>>,
    texts: Mutex<LruCache<ObjectKey, (Generation, String)>>,
    /// Listings that missing names may still ask for, and since when.
    missed: Mutex<(u32, Instant)>,
}

impl BucketFiles {
    /// The bucket's objects. Nothing is asked yet.
    pub fn new(bucket: Bucket, runtime: Handle) -> Self {
        let (known, texts) = (LruCache::sparse(KNOWN), LruCache::sparse(TEXTS));
        let missed = Mutex::new((LOOKED_FOR, Instant::now()));
        Self {
            inner: Arc::new(Inner {
                bucket,
                runtime,
                known: Mutex::new(known),
                texts: Mutex::new(texts),
                missed,
            }),
        }
    }

    /// The same of a bucket that can be listed, which is found out.
    pub fn open(bucket: Bucket, runtime: Handle) -> Result<Self> {
        wait(&runtime, bucket.list_page(None, None))?;
        Ok(Self::new(bucket, runtime))
    }

    /// What is known of an object, or was less than [`AGE`] ago.
    fn meta(&self, key: &ObjectKey) -> Result<ObjectMeta> {
        if let Some((at, meta)) = self.inner.known.lock().get(key)
            && at.elapsed() < AGE
        {
            return Ok(meta.clone());
        }
        self.meta_now(key)
    }

    fn meta_now(&self, key: &ObjectKey) -> Result<ObjectMeta> {
        let bucket = &self.inner.bucket;
        match wait(&self.inner.runtime, bucket.head(key))? {
            Some(meta) => {
                self.inner.known.lock().put(key.clone(), (Instant::now(), meta.clone()));
                Ok(meta)
            }
            None => {
                self.forget(key);
                Err(Error::new(ErrorKind::NotFound, "there is no such object").in_file(bucket.url_of(key)))
            }
        }
    }

    /// Whether an object still has the generation `opened`.
    fn still_has(&self, key: &ObjectKey, opened: &Generation) -> Result<bool> {
        if generation(&self.meta(key)?) == *opened {
            return Ok(true);
        }
        // That may be from a listing, whose tags not every store writes as it answers for the object itself.
        Ok(generation(&self.meta_now(key)?) == *opened)
    }

    fn forget(&self, key: &ObjectKey) {
        self.inner.known.lock().pop(key);
    }

    fn remember(&self, objects: &[ObjectMeta]) {
        let mut known = self.inner.known.lock();
        let now = Instant::now();
        for meta in objects {
            known.put(meta.key.clone(), (now, meta.clone()));
        }
    }

    /// The objects at the top and in its directories, perhaps with some below those.
    async fn objects(&self) -> Result<Vec<ObjectMeta>> {
        let bucket = &self.inner.bucket;
        if let Some(objects) = bucket.list_all(LISTED_DEEP).await? {
            return Ok(objects);
        }
        let top = bucket.list(None).await?;
        let directories = top.prefixes.into_iter().filter(|name| !name.starts_with('.'));
        let list = |name: String| async move { bucket.list(Some(&ObjectKey::parse(&name)?)).await };
        let listings = stream::iter(directories).map(list).buffered(LISTED_AT_ONCE).try_collect::<Vec<_>>();
        let below = listings.await?.into_iter().flat_map(|listing| listing.objects);
        Ok(top.objects.into_iter().chain(below).collect())
    }

    /// The text of an object, of this generation.
    fn text(&self, meta: &ObjectMeta, limit: u64) -> Result<String> {
        let bucket = &self.inner.bucket;
        let place = || bucket.url_of(&meta.key);
        if meta.object_size > limit {
            return Err(whole_file::too_large(limit).in_file(place()));
        }
        let bytes = match meta.object_size {
            0 => Vec::new(),
            size => {
                let read = bucket.read(&meta.key, 0..size, meta.etag.as_deref());
                wait(&self.inner.runtime, read)?.to_vec()
            }
        };
        whole_file::text(bytes).map_err(|e| e.in_file(place()))
    }

    fn key(&self, path: &Path) -> Result<ObjectKey> {
        let place = || format!("{}{}", self.inner.bucket.url(), path.display());
        let text = path.to_str().and_then(|text| text.strip_prefix('/'));
        let text = text.ok_or_else(|| Error::new(ErrorKind::NotFound, "not a key").in_file(place()))?;
        ObjectKey::parse(text).map_err(|e| e.in_file(place()))
    }
}

impl CatalogStore for BucketFiles {
    fn root(&self) -> &Path {
        Path::new("/")
    }

    fn place(&self, path: &Path) -> String {
        let url = self.inner.bucket.url();
        if path == self.root() { url.to_owned() } else { format!("{url}{}", path.display()) }
    }

    fn entries(&self) -> Result<BTreeMap<String, Entry>> {
        let objects = wait(&self.inner.runtime, self.objects())?;
        self.remember(&objects);
        let mut entries = BTreeMap::new();
        for meta in objects {
            let key = meta.key.as_str();
            if key.starts_with('.') {
                continue;
            }
            let Some((directory, name)) = key.split_once('/') else {
                let entry = entries.entry(key.to_owned()).or_insert(Entry::File);
                if counts_as_file(key) {
                    *entry = Entry::File;
                }
                continue;
            };
            let entry = entries.entry(directory.to_owned()).or_insert(Entry::Directory(Vec::new()));
            match entry {
                Entry::Directory(names) if !name.contains('/') => names.push(name.to_owned()),
                Entry::File if !counts_as_file(directory) => {
                    let names = Some(name).filter(|name| !name.contains('/')).map(str::to_owned);
                    *entry = Entry::Directory(names.into_iter().collect());
                }
                _ => {}
            }
        }
        Ok(entries)
    }

    fn read_text(&self, path: &Path, limit: u64) -> Result<String> {
        let key = self.key(path)?;
        let meta = self.meta(&key)?;
        let generation = generation(&meta);
        if let Some((known, text)) = self.inner.texts.lock().get(&key)
            && *known == generation
        {
            return Ok(text.clone());
        }
        // The listing's tag will do; where the store writes it otherwise for the object itself, that is asked.
        let (generation, text) = match self.text(&meta, limit) {
            Ok(text) => (generation, text),
            Err(_) => {
                let meta = self.meta_now(&key)?;
                (self::generation(&meta), self.text(&meta, limit)?)
            }
        };
        let mut texts = self.inner.texts.lock();
        texts.put(key, (generation, text.clone()));
        while texts.iter().map(|(_, (_, text))| text.len()).sum::<usize>() > TEXT_BYTES {
            texts.pop_lru();
        }
        Ok(text)
    }

    fn stat(&self, path: &Path) -> Result<Generation> {
        Ok(generation(&self.meta(&self.key(path)?)?))
    }

    fn is_current(&self, path: &Path, opened: &Generation) -> bool {
        self.key(path).and_then(|key| self.still_has(&key, opened)).unwrap_or(false)
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let meta = self.meta_now(&self.key(path)?)?;
        let inner = &self.inner;
        let storage = ObjectStorage {
            name: inner.bucket.url_of(&meta.key),
            generation: generation(&meta),
            key: meta.key.clone(),
            file: ObjectFile::new(inner.bucket.clone(), meta, inner.runtime.clone()),
            files: self.clone(),
        };
        Ok(Arc::new(storage))
    }

    fn open_reference(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        // Objects have no links.
        self.open(path)
    }

    fn listing_age(&self) -> Duration {
        AGE
    }

    fn may_have_new(&self, _id: &str, _since: SystemTime) -> bool {
        let mut missed = self.inner.missed.lock();
        let (left, since) = *missed;
        let regained = (since.elapsed().as_secs() / MISSED.as_secs()).min(LOOKED_FOR.into()) as u32;
        let left = (left + regained).min(LOOKED_FOR);
        // What is left of a second counts on.
        let since = if regained > 0 { Instant::now() } else { since };
        *missed = (left.saturating_sub(1), since);
        left > 0
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// Whether an object of that name is an image or a sidecar, which objects below it do not hide.
fn counts_as_file(name: &str) -> bool {
    is_sidecar(name) || ImageFormat::from_file_name(name).is_some()
}

/// What an object's content is known by: its entity tag where it has one, however it is quoted, else its time.
fn generation(meta: &ObjectMeta) -> Generation {
    let size = meta.object_size;
    match &meta.etag {
        Some(etag) => Generation::everywhere(format!("{}-{size:x}", etag.trim_matches('"')), meta.modified),
        None => {
            let since = meta.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            Generation::everywhere(format!("at-{:x}-{size:x}", since.as_secs()), meta.modified)
        }
    }
}

/// One content of an object as a source.
struct ObjectStorage {
    name: String,
    key: ObjectKey,
    generation: Generation,
    file: ObjectFile,
    files: BucketFiles,
}

impl Storage for ObjectStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn file_size(&self) -> u64 {
        self.file.file_size()
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        check_range(self, at, buf.len() as u64)?;
        let read = self.file.read_at(at, buf);
        if read.as_ref().is_err_and(|e| e.kind() == ErrorKind::SourceChanged) {
            self.files.forget(&self.key);
        }
        match read {
            Ok(read) if read == buf.len() => Ok(()),
            Ok(_) => Err(changed(&self.name).at(at)),
            Err(error) => Err(error.at(at)),
        }
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.file.extent_at(at)
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn verify_unchanged(&self) -> Result<()> {
        let gone = |e: Error| if e.kind() == ErrorKind::NotFound { changed(&self.name) } else { e };
        let same = self.files.still_has(&self.key, &self.generation).map_err(gone)?;
        if same { Ok(()) } else { Err(changed(&self.name)) }
    }
}
