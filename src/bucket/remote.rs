//! Remote stores, through object_store.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use md5::{Digest, Md5};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
};

use super::{Listing, ObjectKey, ObjectMeta, credentials};
use crate::error::{Error, ErrorKind, Result};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one request may take: the largest common part, 64 MiB, at 2 Mbit/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(300);

/// How often and how long a request is retried before it fails for good.
const RETRIES: usize = 8;
const RETRY_TIMEOUT: Duration = Duration::from_secs(180);

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
}

impl RemoteStore {
    pub(super) fn new(store: Arc<dyn ObjectStore>, uploads: Arc<dyn MultipartStore>) -> Self {
        Self { store, uploads, pages: None, prefix: None, md5_etags: AtomicBool::new(false) }
    }

    /// S3 by the AWS_* variables, and the shared files where those are silent.
    pub(super) fn s3(url: &url::Url) -> Result<Self> {
        // The process's TLS; it stays what it is when somebody has chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, what).in_file(url.as_str());
        let bucket =
            url.host_str().filter(|h| !h.is_empty()).ok_or_else(|| malformed("the URL names no bucket"))?;
        let prefix = url.path().trim_matches('/');
        let prefix = percent_encoding::percent_decode_str(prefix).decode_utf8();
        let prefix = prefix.map_err(|e| malformed("the prefix is not UTF-8").because(e))?.into_owned();
        if !prefix.is_empty() {
            Path::parse(&prefix).map_err(|e| malformed("the prefix is not a key").because(e))?;
        }
        let mut builder = AmazonS3Builder::from_env();
        let mut endpoint = std::env::var("AWS_ENDPOINT_URL").ok();
        for (variable, value) in credentials::from_files() {
            let in_environment = std::env::var_os(variable).is_some()
                || variable == "AWS_REGION" && std::env::var_os("AWS_DEFAULT_REGION").is_some();
            if let (false, Ok(key)) =
                (in_environment, variable.to_ascii_lowercase().parse::<AmazonS3ConfigKey>())
            {
                if variable == "AWS_ENDPOINT_URL" {
                    endpoint = Some(value.clone());
                }
                builder = builder.with_config(key, value);
            }
        }
        let options = ClientOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT)
            .with_allow_http(
                std::env::var("AWS_ALLOW_HTTP").is_ok_and(|v| v == "1" || v.eq_ignore_ascii_case("true")),
            );
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES,
            retry_timeout: RETRY_TIMEOUT,
        };
        let store = builder
            .with_bucket_name(bucket)
            .with_client_options(options)
            .with_retry(retry)
            .with_unsigned_payload(protected(endpoint.as_deref()))
            .build()
            .map_err(|e| malformed("cannot use this bucket").because(e))?;
        let store = Arc::new(store);
        let uploads: Arc<dyn MultipartStore> = Arc::<object_store::aws::AmazonS3>::clone(&store);
        let pages: Option<Arc<dyn PaginatedListStore>> =
            Some(Arc::<object_store::aws::AmazonS3>::clone(&store));
        Ok(Self {
            store,
            uploads,
            pages,
            prefix: (!prefix.is_empty()).then_some(prefix),
            md5_etags: AtomicBool::new(false),
        })
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

    /// The names of the objects directly below a key.
    pub(super) async fn list_names(&self, key: &ObjectKey) -> Result<Vec<String>> {
        let found = self.store.list_with_delimiter(Some(&self.path(key)?)).await;
        let found = found.map_err(|e| translated("cannot list", ErrorKind::Io, e))?;
        Ok(found.objects.iter().filter_map(|meta| meta.location.filename()).map(str::to_owned).collect())
    }

    pub(super) async fn read(&self, key: &ObjectKey, range: Range<u64>, etag: Option<&str>) -> Result<Bytes> {
        let options = GetOptions {
            if_match: etag.map(str::to_owned),
            range: Some(GetRange::Bounded(range)),
            ..GetOptions::default()
        };
        let failed = |e| translated("cannot read the object", ErrorKind::Io, e);
        self.store.get_opts(&self.path(key)?, options).await.map_err(failed)?.bytes().await.map_err(failed)
    }

    pub(super) async fn put(&self, key: &ObjectKey, bytes: Bytes) -> Result<()> {
        let put = self.store.put(&self.path(key)?, PutPayload::from_bytes(bytes)).await;
        put.map(drop).map_err(|e| translated("cannot write the object", ErrorKind::UploadFailed, e))
    }

    /// Writes an object unless there is one.
    pub(super) async fn create(&self, key: &ObjectKey, bytes: Bytes) -> Result<bool> {
        let options = PutOptions::from(PutMode::Create);
        match self.store.put_opts(&self.path(key)?, PutPayload::from_bytes(bytes), options).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(false)
            }
            Err(error) => Err(translated("cannot write the object", ErrorKind::UploadFailed, error)),
        }
    }

    pub(super) async fn delete(&self, key: &ObjectKey) -> Result<()> {
        match self.store.delete(&self.path(key)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(translated("cannot remove the object", ErrorKind::Io, error)),
        }
    }

    pub(super) async fn copy(&self, from: &ObjectKey, to: &ObjectKey) -> Result<()> {
        let copied = self.store.copy(&self.path(from)?, &self.path(to)?).await;
        copied.map_err(|e| translated("cannot copy the object", ErrorKind::Io, e))
    }

    pub(super) async fn start_upload(&self, key: &ObjectKey) -> Result<String> {
        let started = self.uploads.create_multipart(&self.path(key)?).await;
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
    ) -> Result<()> {
        let upload = upload.to_owned();
        let parts = parts.into_iter().map(|content_id| PartId { content_id }).collect();
        let completed = self.uploads.complete_multipart(&self.path(key)?, &upload, parts).await;
        completed.map(drop).map_err(|e| translated("cannot complete the upload", ErrorKind::UploadFailed, e))
    }

    pub(super) async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()> {
        match self.uploads.abort_multipart(&self.path(key)?, &upload.to_owned()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(translated("cannot abort the upload", ErrorKind::Io, error)),
        }
    }
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

/// Whether bodies need no signature: TLS protects them, or they do not leave this machine. Hashing them again for
/// the signature costs two thirds of an upload's time.
fn protected(endpoint: Option<&str>) -> bool {
    let Some(url) = endpoint.and_then(|e| url::Url::parse(e).ok()) else { return true };
    let loopback = match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "https" || loopback
}

/// The store's error in our words; `otherwise` is the kind of what can only be told as a failure.
fn translated(what: &str, otherwise: ErrorKind, error: object_store::Error) -> Error {
    use object_store::Error as Store;
    let text = error.to_string();
    let (kind, what) = match &error {
        _ if text.contains("NoSuchBucket") => {
            (ErrorKind::NotFound, format!("{what}: the store has no such bucket"))
        }
        Store::NotFound { .. } => (ErrorKind::NotFound, format!("{what}: it is not there")),
        Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => {
            (ErrorKind::PermissionDenied, format!("{what}: the store denies access with these credentials"))
        }
        _ if ["SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied"]
            .iter()
            .any(|c| text.contains(c)) =>
        {
            (ErrorKind::PermissionDenied, format!("{what}: the store denies access with these credentials"))
        }
        Store::Precondition { .. } | Store::NotModified { .. } => {
            (ErrorKind::SourceChanged, format!("{what}: it changed since it was opened"))
        }
        Store::AlreadyExists { .. } => (ErrorKind::AlreadyExists, format!("{what}: it exists")),
        Store::InvalidPath { .. } => {
            (ErrorKind::Malformed, format!("{what}: the store cannot have this key"))
        }
        Store::NotSupported { .. } | Store::NotImplemented { .. } => {
            (ErrorKind::Unsupported, format!("{what}: the store cannot do this"))
        }
        _ => (otherwise, what.to_owned()),
    };
    Error::new(kind, what).because(error)
}
