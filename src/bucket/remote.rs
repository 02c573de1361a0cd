//! Remote stores, through object_store.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
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

use super::checksum::{Checksum, Crc64, composite_etag};
use super::client::{self, Header, Tries, WholeCrc64};
use super::key::{CONTROL_PREFIX, ObjectKey, Unshown};
use super::part_copy::PartCopy;
use super::pending::{self, Answer, Ask, PendingUploads};
use super::replaces::Replaces;
use super::reply::{conflict, copy_error, translated, write_error};
use super::store::{
    Abilities, CopiedPart, CopyPart, CopySource, Listing, ObjectMeta, Put, PutPart, Store, Tags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GIB, MIB};

/// Largest object that a store copies with one request (S3 API Reference, "CopyObject").
const MAX_COPY: u64 = 5 * GIB;

/// Smallest part but the last (S3 User Guide, "Amazon S3 multipart upload limits").
const LEAST_PART: u64 = 5 * MIB;

/// Keys that are asked for to find out whether there are any.
const FIRST_KEYS: usize = 8;

/// A store behind object_store's traits.
pub(super) struct RemoteStore {
    store: Arc<dyn ObjectStore>,
    uploads: Arc<dyn MultipartStore>,
    /// The store again, where it lists page by page.
    pages: Option<Arc<dyn PaginatedListStore>>,
    /// The bucket's name in copies out of it, where the store copies parts as S3 does.
    bucket: Option<String>,
    /// Segments before every key, from the bucket's URL.
    prefix: Option<String>,
    /// Whether conditions are about versions instead of entity tags.
    versions: bool,
    /// Whether its uploads can be asked for as S3's.
    lists_uploads: bool,
    /// Whether an object `KEY/` can stand for a directory: consoles make such markers, and some stores list every directory
    /// that ever was by one.
    has_markers: bool,
    abilities: Abilities,
    unshown: Unshown,
}

impl RemoteStore {
    pub(super) fn new(store: Arc<dyn ObjectStore>, uploads: Arc<dyn MultipartStore>) -> Self {
        let abilities = Abilities {
            is_remote: true,
            largest_copy: MAX_COPY,
            least_part: LEAST_PART,
            ..Abilities::default()
        };
        Self {
            store,
            uploads,
            pages: None,
            bucket: None,
            prefix: None,
            versions: false,
            lists_uploads: false,
            has_markers: false,
            abilities,
            unshown: Unshown::default(),
        }
    }

    /// S3, and what speaks its language.
    pub(super) fn s3(store: AmazonS3, bucket: &str, prefix: Option<String>) -> Self {
        let mut made = Self::paged(Arc::new(store), prefix);
        made.bucket = Some(bucket.to_owned());
        made.abilities.has_tags = true;
        made.has_markers = true;
        made.lists_uploads = true;
        made.abilities.checksums = &[Checksum::Crc64, Checksum::Md5];
        made.abilities.copies_if = Some("x-amz-copy-source-if-match");
        made
    }

    /// Azure Blob Storage.
    pub(super) fn azure(store: MicrosoftAzure, prefix: Option<String>) -> Self {
        let mut made = Self::paged(Arc::new(store), prefix);
        made.abilities.lacks = Some("objects get no tags, and parts of failed uploads stay for a week");
        made.abilities.checksums = &[Checksum::AzureCrc64, Checksum::Md5];
        made.abilities.copies_if = Some("x-ms-source-if-match");
        made
    }

    /// Google Cloud Storage.
    pub(super) fn google(store: GoogleCloudStorage, prefix: Option<String>) -> Self {
        let mut made = Self::paged(Arc::new(store), prefix);
        made.abilities.lacks =
            Some("objects get no tags, and an upload that begins while the daemon is killed is left over");
        made.abilities.checksums = &[Checksum::Md5];
        made.versions = true;
        made
    }

    fn paged<S: ObjectStore + MultipartStore + PaginatedListStore>(
        store: Arc<S>,
        prefix: Option<String>,
    ) -> Self {
        let (objects, uploads) = (Arc::<S>::clone(&store), Arc::<S>::clone(&store));
        Self { pages: Some(store), prefix, ..Self::new(objects, uploads) }
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
        let key = self.unshown.shown(key)?;
        Some(ObjectMeta {
            key,
            object_size: meta.size,
            modified: meta.last_modified.into(),
            etag: meta.e_tag,
        })
    }

    /// Asks what object_store has no words for.
    async fn ask(&self, ask: Ask) -> Result<Answer> {
        let unsupported = || Error::unsupported("this store does not list its uploads");
        let pages = self.pages.as_ref().filter(|_| self.lists_uploads).ok_or_else(unsupported)?;
        let mut options = PaginatedListOptions::default();
        options.extensions.insert(ask);
        let listed = pages.list_paginated(None, options).await;
        let listed = listed.map_err(|e| translated("cannot list the uploads", ErrorKind::Io, e))?;
        listed.result.extensions.get::<Answer>().cloned().ok_or_else(unsupported)
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
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Err(conflict(WRITE)),
            Err(error) => Err(translated("cannot look up the object", ErrorKind::Io, error)),
        }
    }
}

#[async_trait::async_trait]
impl Store for RemoteStore {
    fn abilities(&self) -> Abilities {
        self.abilities.clone()
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
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

    /// Decided by what a listing shows, so that both agree: some stores list directories that have been emptied.
    async fn has_prefix(&self, key: &ObjectKey) -> Result<bool> {
        let failed = |e| translated("cannot list", ErrorKind::Io, e);
        if let Some(store) = &self.pages {
            let prefix = format!("{}/", self.path(key)?);
            let mut page_token = None;
            loop {
                let delimiter = Some("/".into());
                let options = PaginatedListOptions {
                    delimiter,
                    max_keys: Some(FIRST_KEYS),
                    page_token,
                    ..PaginatedListOptions::default()
                };
                let page = store.list_paginated(Some(&prefix), options).await.map_err(failed)?;
                // A page may be empty because nothing on it can be shown.
                if !page.result.objects.is_empty() || !page.result.common_prefixes.is_empty() {
                    return Ok(true);
                }
                page_token = page.page_token;
                if page_token.is_none() {
                    return Ok(false);
                }
            }
        }
        let mut found = self.store.list(Some(&self.path(key)?));
        match found.next().await {
            None => Ok(false),
            Some(Ok(_)) => Ok(true),
            Some(Err(error)) => Err(failed(error)),
        }
    }

    async fn list_page(
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
            prefixes: names
                .filter(|name| *name == CONTROL_PREFIX || self.unshown.shown(name).is_some())
                .map(str::to_owned)
                .collect(),
        };
        Ok((listing, next))
    }

    async fn list_all(&self, limit: usize) -> Result<Option<Vec<ObjectMeta>>> {
        let prefix = self.prefix.as_deref().and_then(|prefix| Path::parse(prefix).ok());
        let found = self.store.list(prefix.as_ref()).take(limit + 1).try_collect::<Vec<_>>().await;
        let found = found.map_err(|e| translated("cannot list", ErrorKind::Io, e))?;
        let all = found.len() <= limit;
        Ok(all.then(|| found.into_iter().filter_map(|meta| self.meta(meta)).collect()))
    }

    async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>> {
        let found = self.store.list_with_delimiter(Some(&self.path(key)?)).await;
        let found = found.map_err(|e| translated("cannot list", ErrorKind::Io, e))?;
        Ok(found.objects.iter().filter_map(|meta| meta.location.filename()).map(str::to_owned).collect())
    }

    async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let failed = |e| translated("cannot read the object", ErrorKind::Io, e);
        self.store
            .get_opts(&self.path(key)?, ranged(range, etag))
            .await
            .map_err(failed)?
            .bytes()
            .await
            .map_err(failed)
    }

    /// A piece that was cut off is not handed over, and nor is what was not asked for.
    async fn read_pieces(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
        etag: Option<&str>,
        piece: usize,
        take: &mut (dyn FnMut(Bytes) + Send),
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

    async fn put(&self, key: &ObjectKey, put: Put) -> Result<Option<String>> {
        let mode = match &put.replaces {
            Replaces::Anything => PutMode::Overwrite,
            Replaces::Nothing => PutMode::Create,
            Replaces::Tag(tag) => PutMode::Update(self.version(key, tag).await?),
        };
        let options = PutOptions { mode, tags: tag_set(&put.tags), ..PutOptions::default() };
        let path = self.path(key)?;
        let sent = self.store.put_opts(&path, PutPayload::from_bytes(put.bytes), options);
        let sent = client::with_headers(checksum_header(put.checksum), sent).await;
        sent.map(|put| put.e_tag).map_err(|e| write_error(WRITE, &put.replaces, e))
    }

    async fn delete(&self, key: &ObjectKey, replaces: &Replaces) -> Result<()> {
        let path = self.path(key)?;
        match client::with_headers(condition(replaces), self.store.delete(&path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(write_error("cannot remove the object", replaces, error)),
        }
    }

    async fn copy(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<()> {
        let mut headers = condition(replaces);
        headers.extend(self.abilities.copies_if.zip(etag).map(|(header, etag)| (header, etag.to_owned())));
        let (from, to) = (self.path(from)?, self.path(to)?);
        let copied = client::with_headers(headers, self.store.copy(&from, &to)).await;
        copied.map_err(|e| write_error("cannot copy the object", replaces, e))
    }

    async fn make_directory(&self, _: &ObjectKey) -> Result<()> {
        Ok(())
    }

    /// The marker that may stand for it goes; there is nothing else.
    async fn remove_directory(&self, key: &ObjectKey) -> Result<()> {
        if !self.has_markers {
            return Ok(());
        }
        let path = self.path(key)?;
        match client::of_directory(self.store.delete(&path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(translated("cannot remove the directory", ErrorKind::Io, error)),
        }
    }

    async fn start_upload(
        &self,
        key: &ObjectKey,
        _: u64,
        tags: &Tags,
        checksum: Option<Checksum>,
        tries: &Tries,
    ) -> Result<String> {
        let headers = match checksum {
            // S3 wants to know the checksum of the parts from the beginning (S3 API Reference, "CreateMultipartUpload").
            Some(Checksum::Crc64) => vec![
                ("x-amz-checksum-algorithm", "CRC64NVME".to_owned()),
                ("x-amz-checksum-type", "FULL_OBJECT".to_owned()),
            ],
            _ => Vec::new(),
        };
        let mut options = PutMultipartOptions { tags: tag_set(tags), ..PutMultipartOptions::default() };
        options.extensions.insert(tries.clone());
        let path = self.path(key)?;
        let started = client::with_headers(headers, self.uploads.create_multipart_opts(&path, options)).await;
        started.map_err(|e| translated("cannot start the upload", ErrorKind::UploadFailed, e))
    }

    async fn pending_uploads(&self, key: &ObjectKey) -> Result<PendingUploads> {
        let path = self.path(key)?;
        pending::uploads_of(path.as_ref(), |ask| self.ask(ask)).await
    }

    async fn has_part(&self, key: &ObjectKey, upload: &str) -> Result<bool> {
        let ask = Ask::FirstPart { key: self.path(key)?.to_string(), upload: upload.to_owned() };
        Ok(pending::has_part(&self.ask(ask).await?))
    }

    async fn put_part(&self, key: &ObjectKey, upload: &str, part: PutPart) -> Result<String> {
        let (path, upload) = (self.path(key)?, upload.to_owned());
        let payload = PutPayload::from_bytes(part.bytes);
        let sent = self.uploads.put_part(&path, &upload, part.index, payload);
        let sent = client::with_headers(checksum_header(part.checksum), sent).await;
        let what = || format!("cannot upload part {}", part.index + 1);
        sent.map(|part| part.content_id).map_err(|e| translated(&what(), ErrorKind::UploadFailed, e))
    }

    async fn crc64(&self, key: &ObjectKey, etag: Option<&str>) -> Result<Option<u64>> {
        if self.bucket.is_none() {
            return Ok(None);
        }
        let options = GetOptions { head: true, if_match: etag.map(str::to_owned), ..GetOptions::default() };
        let headers = vec![("x-amz-checksum-mode", "ENABLED".to_owned())];
        let path = self.path(key)?;
        let found = client::with_headers(headers, self.store.get_opts(&path, options)).await;
        let found = found.map_err(|e| translated("cannot look up the object", ErrorKind::Io, e))?;
        Ok(found.extensions.get::<WholeCrc64>().map(|crc64| crc64.0))
    }

    async fn copy_part(&self, key: &ObjectKey, upload: &str, part: CopyPart) -> Result<CopiedPart> {
        let unsupported = || Error::unsupported("this store copies no parts");
        let bucket = self.bucket.as_ref().ok_or_else(unsupported)?;
        let (path, upload) = (self.path(key)?, upload.to_owned());
        let CopySource { key, etag, range } = part.source;
        let source = format!("{bucket}/{}", self.path(&key)?);
        let copy = Arc::new(PartCopy::new(&source, &etag, (!part.is_whole).then_some(range)));
        let sent = self.uploads.put_part(&path, &upload, part.index, PutPayload::new());
        let id = client::copying(Arc::clone(&copy), sent).await.map_err(copy_error)?.content_id;
        Ok(CopiedPart { id, crc64: copy.crc64() })
    }

    async fn expected_etag_prefix(&self, _: &str, parts: &[String], _: u64) -> Result<Option<String>> {
        Ok(composite_etag(parts))
    }

    async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        parts: Vec<String>,
        _: u64,
        replaces: &Replaces,
        crc64: Option<u64>,
    ) -> Result<Option<String>> {
        let (path, upload) = (self.path(key)?, upload.to_owned());
        let parts = parts.into_iter().map(|content_id| PartId { content_id }).collect();
        let mut headers = condition(replaces);
        if let Some(crc64) = crc64 {
            headers.push((Checksum::Crc64.header(), Crc64::base64(crc64)));
            headers.push(("x-amz-checksum-type", "FULL_OBJECT".to_owned()));
        }
        let completed = self.uploads.complete_multipart(&path, &upload, parts);
        let completed = client::with_headers(headers, completed).await;
        completed.map(|made| made.e_tag).map_err(|e| write_error("cannot complete the upload", replaces, e))
    }

    async fn sweep(&self, _: &str, _: Vec<String>) -> Result<()> {
        Ok(())
    }

    async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()> {
        match self.uploads.abort_multipart(&self.path(key)?, &upload.to_owned()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(translated("cannot abort the upload", ErrorKind::Io, error)),
        }
    }
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

/// What a put cannot do when it fails.
const WRITE: &str = "cannot write the object";

/// A condition as headers of a request (RFC 9110, 13.1.1 and 13.1.2).
fn condition(replaces: &Replaces) -> Vec<Header> {
    match replaces {
        Replaces::Anything => Vec::new(),
        Replaces::Nothing => vec![("if-none-match", "*".to_owned())],
        Replaces::Tag(tag) => vec![("if-match", tag.clone())],
    }
}

fn checksum_header(checksum: Option<(Checksum, String)>) -> Vec<Header> {
    checksum.into_iter().map(|(checksum, value)| (checksum.header(), value)).collect()
}
