//! Remote stores, through object_store.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use md5::{Digest, Md5};
use object_store::aws::AmazonS3;
use object_store::azure::MicrosoftAzure;
use object_store::gcp::GoogleCloudStorage;
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    TagSet, UpdateVersion,
};
use parking_lot::Mutex;

use super::signed;
use super::{Conditions, Listing, ObjectKey, ObjectMeta, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};

/// A store behind object_store's traits.
pub(super) struct RemoteStore {
    store: Arc<dyn ObjectStore>,
    uploads: Arc<dyn MultipartStore>,
    /// The store again, where it lists page by page.
    pages: Option<Arc<dyn PaginatedListStore>>,
    /// Segments before every key, from the bucket's URL.
    prefix: Option<String>,
    /// Whether entity tags are MD5s, and those of objects made of parts follow from the parts' tags.
    md5_etags: AtomicBool,
    /// Whether the store has been shown to keep to conditions.
    conditions: Mutex<Conditions>,
    /// Whether its conditions are about versions instead of entity tags.
    versions: bool,
    /// Whether objects can have tags.
    has_tags: bool,
    /// What else it cannot do.
    limitation: Option<&'static str>,
}

impl RemoteStore {
    pub(super) fn new(store: Arc<dyn ObjectStore>, uploads: Arc<dyn MultipartStore>) -> Self {
        Self {
            store,
            uploads,
            pages: None,
            prefix: None,
            md5_etags: AtomicBool::new(false),
            conditions: Mutex::default(),
            versions: false,
            has_tags: false,
            limitation: None,
        }
    }

    /// Which conditions the store keeps to.
    pub(super) fn conditions(&self) -> Conditions {
        *self.conditions.lock()
    }

    pub(super) fn set_conditions(&self, conditions: Conditions) {
        *self.conditions.lock() = conditions;
    }

    /// S3, and what speaks its language.
    pub(super) fn s3(store: AmazonS3, prefix: Option<String>) -> Self {
        Self { has_tags: true, ..Self::paged(Arc::new(store), prefix) }
    }

    /// Azure Blob Storage.
    pub(super) fn azure(store: MicrosoftAzure, prefix: Option<String>) -> Self {
        let lacks = "objects get no tags, uploads are verified by size only, and parts of failed ones stay for a week";
        Self { limitation: Some(lacks), ..Self::paged(Arc::new(store), prefix) }
    }

    /// Google Cloud Storage.
    pub(super) fn google(store: GoogleCloudStorage, prefix: Option<String>) -> Self {
        Self {
            limitation: Some("objects get no tags"),
            versions: true,
            ..Self::paged(Arc::new(store), prefix)
        }
    }

    fn paged<S: ObjectStore + MultipartStore + PaginatedListStore>(
        store: Arc<S>,
        prefix: Option<String>,
    ) -> Self {
        let (objects, uploads) = (Arc::<S>::clone(&store), Arc::<S>::clone(&store));
        Self { pages: Some(store), prefix, ..Self::new(objects, uploads) }
    }

    /// Whether objects can have tags.
    pub(super) fn has_tags(&self) -> bool {
        self.has_tags
    }

    /// What the store cannot do, in words.
    pub(super) fn limitation(&self) -> Option<String> {
        let Conditions { creations, updates, completions, removals } = self.conditions();
        let unconditional = (!(creations && updates && completions && removals)).then_some(
            "the store does not refuse all that would replace another host's object: that is looked for before",
        );
        let words: Vec<_> = self.limitation.into_iter().chain(unconditional).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }

    /// Whether an object's entity tag tells what is in it.
    pub(super) fn has_md5_etags(&self) -> bool {
        self.md5_etags.load(Ordering::Relaxed)
    }

    pub(super) fn set_md5_etags(&self, has: bool) {
        self.md5_etags.store(has, Ordering::Relaxed);
    }

    fn path(&self, key: &ObjectKey) -> Result<Path> {
        // parse, not from: the latter would escape characters, and others would see another key.
        let text = match &self.prefix {
            Some(prefix) => format!("{prefix}/{key}"),
            None => key.to_string(),
        };
        Path::parse(&text)
            .map_err(|e| Error::new(ErrorKind::Malformed, "the store cannot have this key").because(e))
    }

    /// The key of a path below the prefix; `None` for names that a filesystem cannot have.
    fn meta(&self, meta: object_store::ObjectMeta) -> Option<ObjectMeta> {
        let path = meta.location.as_ref();
        let key = match &self.prefix {
            Some(prefix) => path.strip_prefix(prefix.as_str())?.strip_prefix('/')?,
            None => path,
        };
        let key = ObjectKey::parse(key).ok()?;
        Some(ObjectMeta {
            key,
            object_size: meta.size,
            modified: meta.last_modified.into(),
            etag: meta.e_tag,
        })
    }

    pub(super) async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        match self.store.head(&self.path(key)?).await {
            Ok(meta) => Ok(Some(ObjectMeta {
                key: key.clone(),
                object_size: meta.size,
                modified: meta.last_modified.into(),
                etag: meta.e_tag,
            })),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(translated("cannot look up the object", ErrorKind::Io, error)),
        }
    }

    pub(super) async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        let mut found = self.store.list(Some(&self.path(key)?));
        match found.next().await {
            None => Ok(false),
            Some(Ok(_)) => Ok(true),
            Some(Err(error)) => Err(translated("cannot list", ErrorKind::Io, error)),
        }
    }

    /// A page of one level, and the token of the next page.
    pub(super) async fn list(
        &self,
        prefix: Option<&ObjectKey>,
        page: Option<String>,
    ) -> Result<(Listing, Option<String>)> {
        let path = match (prefix, &self.prefix) {
            (Some(key), _) => Some(self.path(key)?),
            (None, Some(prefix)) => Path::parse(prefix).ok(),
            (None, None) => None,
        };
        let listed = match &self.pages {
            Some(store) => {
                let options = PaginatedListOptions {
                    delimiter: Some("/".into()),
                    page_token: page,
                    ..PaginatedListOptions::default()
                };
                let prefix = path.as_ref().map(|path| format!("{path}/"));
                store
                    .list_paginated(prefix.as_deref(), options)
                    .await
                    .map(|page| (page.result, page.page_token))
            }
            None => self.store.list_with_delimiter(path.as_ref()).await.map(|result| (result, None)),
        };
        let (found, next) = listed.map_err(|e| translated("cannot list", ErrorKind::Io, e))?;
        let names = found.common_prefixes.iter().filter_map(|p| p.filename());
        let listing = Listing {
            // The directory itself is an object in some stores, and with some clients.
            objects: found
                .objects
                .into_iter()
                .filter(|meta| Some(&meta.location) != path.as_ref())
                .filter_map(|meta| self.meta(meta))
                .collect(),
            prefixes: names.filter(|name| ObjectKey::parse(name).is_ok()).map(str::to_owned).collect(),
        };
        Ok((listing, next))
    }

    /// All objects, at whatever level; `None` when they are more than `limit`.
    pub(super) async fn list_all(&self, limit: usize) -> Result<Option<Vec<ObjectMeta>>> {
        let prefix = self.prefix.as_deref().and_then(|prefix| Path::parse(prefix).ok());
        let found = self.store.list(prefix.as_ref()).take(limit + 1).try_collect::<Vec<_>>().await;
        let found = found.map_err(|e| translated("cannot list", ErrorKind::Io, e))?;
        let all = found.len() <= limit;
        Ok(all.then(|| found.into_iter().filter_map(|meta| self.meta(meta)).collect()))
    }

    /// The names of the objects directly below a key.
    pub(super) async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>> {
        let found = self.store.list_with_delimiter(Some(&self.path(key)?)).await;
        let found = found.map_err(|e| translated("cannot list", ErrorKind::Io, e))?;
        Ok(found.objects.iter().filter_map(|meta| meta.location.filename()).map(str::to_owned).collect())
    }

    pub(super) async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let failed = |e| translated("cannot read the object", ErrorKind::Io, e);
        self.store
            .get_opts(&self.path(key)?, ranged(range, etag))
            .await
            .map_err(failed)?
            .bytes()
            .await
            .map_err(failed)
    }

    /// The same, handed over in pieces of so many bytes as they come. A piece that was cut off is not handed over, and
    /// nor is what was not asked for.
    pub(super) async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        mut take: impl FnMut(Bytes) + Send,
    ) -> Result<()> {
        let failed = |e| translated("cannot read the object", ErrorKind::Io, e);
        let mut left = range.end - range.start;
        let got = self.store.get_opts(&self.path(key)?, ranged(range, etag)).await.map_err(failed)?;
        let mut body = got.into_stream();
        let mut collected = BytesMut::new();
        while let Some(chunk) = body.next().await {
            let mut chunk = chunk.map_err(failed)?;
            while !chunk.is_empty() && left > 0 {
                let wanted = left.min(piece as u64) as usize;
                collected.reserve(wanted - collected.len());
                let length = chunk.len().min(wanted - collected.len());
                collected.extend_from_slice(&chunk.split_to(length));
                if collected.len() == wanted {
                    left -= wanted as u64;
                    take(std::mem::take(&mut collected).freeze());
                }
            }
        }
        Ok(())
    }

    /// Writes an object; returns its tag.
    pub(super) async fn put(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        tags: &Tags,
        replaces: &Replaces,
    ) -> Result<Option<String>> {
        let conditions = self.conditions();
        let mode = match replaces {
            Replaces::Nothing if conditions.creations => PutMode::Create,
            Replaces::Tag(tag) if conditions.updates => PutMode::Update(self.version(key, tag).await?),
            _ => {
                self.check(key, replaces).await?;
                PutMode::Overwrite
            }
        };
        let options = PutOptions { mode, tags: tag_set(tags), ..PutOptions::default() };
        let payload = PutPayload::from_bytes(bytes);
        let put = self.store.put_opts(&self.path(key)?, payload, options).await;
        put.map(|put| put.e_tag).map_err(|e| written("cannot write the object", replaces, e))
    }

    /// The object with a tag as the store's conditions have it.
    async fn version(&self, key: &ObjectKey, tag: &str) -> Result<UpdateVersion> {
        if !self.versions {
            return Ok(UpdateVersion { e_tag: Some(tag.to_owned()), version: None });
        }
        match self.store.head(&self.path(key)?).await {
            Ok(meta) if meta.e_tag.as_deref() == Some(tag) => {
                Ok(UpdateVersion { e_tag: meta.e_tag, version: meta.version })
            }
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Err(conflict("cannot write the object")),
            Err(error) => Err(translated("cannot look up the object", ErrorKind::Io, error)),
        }
    }

    /// Whether the object is what is to be replaced, for a store that does not look itself.
    async fn check(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        if *replaces == Replaces::Anything {
            return Ok(());
        }
        let meta = self.head(key).await?;
        if replaces.allows(meta.as_ref().map(|meta| meta.etag.as_deref())) {
            return Ok(());
        }
        Err(conflict("cannot write the object"))
    }

    pub(super) async fn delete(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        let what = "cannot remove the object";
        let path = self.path(key)?;
        let removed =
            async {
                if !self.conditions().removals {
                    self.check(key, replaces).await?;
                }
                match signed::with_headers(replaces.headers(), self.store.delete(&path)).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(refused(what, replaces, &error)
                        .unwrap_or_else(|| translated(what, ErrorKind::Io, error))),
                }
            };
        match removed.await {
            // Gone already, which is what was wanted.
            Err(error) if error.kind() == ErrorKind::Conflict && self.head(key).await?.is_none() => Ok(()),
            removed => removed,
        }
    }

    pub(super) async fn copy(&self, from: &ObjectKey, to: &ObjectKey) -> Result<()> {
        let copied = self.store.copy(&self.path(from)?, &self.path(to)?).await;
        copied.map_err(|e| translated("cannot copy the object", ErrorKind::Io, e))
    }

    pub(super) async fn start_upload(&self, key: &ObjectKey, tags: &Tags) -> Result<String> {
        let options = PutMultipartOptions { tags: tag_set(tags), ..PutMultipartOptions::default() };
        let started = self.uploads.create_multipart_opts(&self.path(key)?, options).await;
        started.map_err(|e| translated("cannot start the upload", ErrorKind::UploadFailed, e))
    }

    pub(super) async fn put_part(
        &self,
        key: &ObjectKey,
        upload: &str,
        index: usize,
        part: Bytes,
    ) -> Result<String> {
        let upload = upload.to_owned();
        let put = self.uploads.put_part(&self.path(key)?, &upload, index, PutPayload::from_bytes(part)).await;
        let failed = |e| translated(&format!("cannot upload part {}", index + 1), ErrorKind::UploadFailed, e);
        put.map(|part| part.content_id).map_err(failed)
    }

    pub(super) async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        parts: Vec<String>,
        replaces: &Replaces,
    ) -> Result<()> {
        let is_asked = self.conditions().completions;
        if !is_asked {
            self.check(key, replaces).await?;
        }
        let upload = upload.to_owned();
        let parts = parts.into_iter().map(|content_id| PartId { content_id }).collect();
        let path = self.path(key)?;
        let headers = if is_asked { replaces.headers() } else { Vec::new() };
        let complete = self.uploads.complete_multipart(&path, &upload, parts);
        let completed = signed::with_headers(headers, complete).await;
        completed.map(drop).map_err(|e| written("cannot complete the upload", replaces, e))
    }

    pub(super) async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()> {
        match self.uploads.abort_multipart(&self.path(key)?, &upload.to_owned()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(translated("cannot abort the upload", ErrorKind::Io, error)),
        }
    }
}

/// An error of a request that writes.
fn written(what: &str, replaces: &Replaces, error: object_store::Error) -> Error {
    refused(what, replaces, &error).unwrap_or_else(|| translated(what, ErrorKind::UploadFailed, error))
}

/// The error of a condition that did not hold, if it is one.
fn refused(what: &str, replaces: &Replaces, error: &object_store::Error) -> Option<Error> {
    use object_store::Error as Store;
    let is_condition = match error {
        Store::AlreadyExists { .. } | Store::Precondition { .. } | Store::NotModified { .. } => true,
        // An object that is not there is not the one that was to be replaced (S3 API Reference, "PutObject", If-Match).
        Store::NotFound { .. } => Said::by(error).code.as_deref() == Some("NoSuchKey"),
        _ => false,
    };
    (is_condition && *replaces != Replaces::Anything).then(|| conflict(what).because(Said::by(error)))
}

fn conflict(what: &str) -> Error {
    let reason = "it is not what was to be replaced; somebody else has written it";
    Error::new(ErrorKind::Conflict, format!("{what}: {reason}"))
}

/// A request for bytes of one content.
fn ranged(range: Range<u64>, etag: Option<&str>) -> GetOptions {
    GetOptions {
        if_match: etag.map(str::to_owned),
        range: Some(GetRange::Bounded(range)),
        ..GetOptions::default()
    }
}

fn tag_set(tags: &Tags) -> TagSet {
    let mut set = TagSet::default();
    tags.iter().for_each(|(name, value)| set.push(name, value));
    set
}

/// The entity tag that S3 and most stores like it give to an object put together from parts: the MD5 of the parts' MD5s
/// and their number. `None` when the parts' ids are no MD5s.
pub(super) fn composite_etag(parts: &[String]) -> Option<String> {
    let mut md5 = Md5::new();
    for id in parts {
        let digest = hex::decode(id.trim_matches('"')).ok().filter(|digest| digest.len() == 16)?;
        md5.update(digest);
    }
    Some(format!("\"{}-{}\"", hex::encode(md5.finalize()), parts.len()))
}

/// Codes of answers that deny access, where the answer's number does not tell.
const DENIALS: [&str; 5] = [
    "AuthenticationFailed",
    "AuthorizationFailure",
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "AccessDenied",
];

/// The store's error in our words; `otherwise` is the kind of what can only be told as a failure.
fn translated(what: &str, otherwise: ErrorKind, error: object_store::Error) -> Error {
    use object_store::Error as Store;
    let said = Said::by(&error);
    let (kind, reason) = match (said.code.as_deref(), &error) {
        (Some("NoSuchBucket"), _) => (ErrorKind::NotFound, "the store has no such bucket; make it first"),
        (Some("ContainerNotFound"), _) => {
            (ErrorKind::NotFound, "the store has no such container; make it first")
        }
        // Azure's word for blocks that are not there, or are in an object already.
        (Some("InvalidBlockList"), _) => (ErrorKind::NotFound, "the store does not have its parts any more"),
        (Some(code), _) if DENIALS.contains(&code) => (ErrorKind::PermissionDenied, DENIED),
        (_, Store::PermissionDenied { .. } | Store::Unauthenticated { .. }) => {
            (ErrorKind::PermissionDenied, DENIED)
        }
        (_, Store::NotFound { .. }) => (ErrorKind::NotFound, "it is not there"),
        (_, Store::Precondition { .. } | Store::NotModified { .. }) => {
            (ErrorKind::SourceChanged, "it changed since it was opened")
        }
        (_, Store::AlreadyExists { .. }) => (ErrorKind::AlreadyExists, "it exists"),
        (_, Store::InvalidPath { .. }) => (ErrorKind::Malformed, "the store cannot have this key"),
        (_, Store::NotSupported { .. } | Store::NotImplemented { .. }) => {
            (ErrorKind::Unsupported, "the store cannot do this")
        }
        _ => {
            let failed = Error::new(otherwise, what);
            let is_final = said.is_final;
            let failed = failed.because(said);
            return if is_final { failed } else { failed.transient() };
        }
    };
    Error::new(kind, format!("{what}: {reason}")).because(said)
}

const DENIED: &str = "the store denies access with these credentials";

/// What a store said, for people: the code and the message of its answer where it has them. The log has all of it at the
/// level debug.
#[derive(Debug)]
struct Said {
    code: Option<String>,
    text: String,
    /// Whether it will say the same again: the answer's number begins with 4, and is not that of a slow or of too many requests.
    is_final: bool,
}

impl Said {
    fn by(error: &object_store::Error) -> Self {
        let whole = error.to_string();
        tracing::debug!("the store said: {whole}");
        // Before the answer stand the request's method and URL, where anything may be written.
        let answer = whole.split_once("status code: ").map_or("", |(_, answer)| answer);
        let element = |name: &str| {
            let (_, rest) = answer.split_once(&format!("<{name}>"))?;
            let (text, _) = rest.split_once('<')?;
            // Azure's messages go on with the request's number and time.
            Some(text.lines().next().unwrap_or_default().trim().to_owned())
        };
        let code = element("Code");
        let text = match (&code, element("Message")) {
            (Some(code), Some(message)) => format!("it says {code}: {message}"),
            (Some(code), None) => format!("it says {code}"),
            _ => whole.clone(),
        };
        let is_final = answer.starts_with('4') && !["408", "429"].iter().any(|n| answer.starts_with(n));
        Self { code, text, is_final }
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Said {}
