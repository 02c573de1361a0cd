//! The HTTP client of a remote store, below object_store's retries: headers that object_store has no words for, listings
//! that it would refuse, and a limit of one try's time.
//!
//! A request that object_store made and signed gets the headers of the task that it belongs to, the condition of a
//! completion for instance, and is signed again with them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use object_store::ClientOptions;
use object_store::aws::{AmazonS3, AwsAuthorizer, AwsCredentialProvider};
use object_store::azure::{AzureAuthorizer, AzureCredentialProvider, MicrosoftAzure};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

use super::checksum::{Checksum, Crc64};
use super::key::Unshown;
use super::listing;
use super::part_copy::{NOT_IMPLEMENTED, PartCopy};
use super::pending::{Answer, Ask, unknown};
use crate::error::{Error, ErrorKind};

/// A header's name, in lower case, and its value.
pub(super) type Header = (&'static str, String);

tokio::task_local! {
    /// What the store's requests of this task are to have.
    static HEADERS: Vec<Header>;

    /// What the part that is sent is to be copied from instead.
    static COPY: Arc<PartCopy>;

    /// Whether the request is about a directory's marker, whose key ends with a slash: object_store's paths have none.
    static OF_DIRECTORY: bool;

    /// How long each try of these requests may take, where that is less than others may.
    static TRY_LIMIT: Duration;
}

/// Makes a request to a store that has these headers besides those of object_store.
pub(super) async fn with_headers<T>(headers: Vec<Header>, request: impl Future<Output = T>) -> T {
    HEADERS.scope(headers, request).await
}

/// Makes a request to S3 that sends a part without bytes, and has the store copy the part.
pub(super) async fn copying<T>(copy: Arc<PartCopy>, request: impl Future<Output = T>) -> T {
    COPY.scope(copy, request).await
}

/// Makes a removal at S3 that is about the object `KEY/` instead of `KEY`. Where it cannot be signed again nothing is asked,
/// and nothing found.
pub(super) async fn of_directory<T>(request: impl Future<Output = T>) -> T {
    OF_DIRECTORY.scope(true, request).await
}

/// Makes requests to a store each try of which takes no longer than this.
pub(super) async fn with_try_limit<T>(limit: Duration, request: impl Future<Output = T>) -> T {
    TRY_LIMIT.scope(limit, request).await
}

/// How many times a request was sent, counted where it is one of its extensions.
#[derive(Clone, Debug, Default)]
pub(super) struct Tries(pub(super) Arc<AtomicU32>);

/// The CRC-64/NVME of a whole object, an extension of the answer where the store was asked for checksums.
#[derive(Clone, Copy, Debug)]
pub(super) struct WholeCrc64(pub(super) u64);

impl WholeCrc64 {
    /// What the store says ("HeadObject"): checksums of parts do not count.
    fn of(answer: &HttpResponse) -> Option<Self> {
        let header = |name: &str| answer.headers().get(name)?.to_str().ok();
        let is_whole = header("x-amz-checksum-type") == Some("FULL_OBJECT");
        let crc64 = header(Checksum::Crc64.header()).and_then(Crc64::from_base64);
        crc64.filter(|_| is_whole).map(Self)
    }
}

/// Makes the HTTP clients of one store.
#[derive(Clone, Debug, Default)]
pub(super) struct Connector {
    signer: Arc<OnceLock<Signer>>,
}

/// Who signs a store's requests; known when the store's client has been made.
#[derive(Debug)]
enum Signer {
    Aws {
        credentials: AwsCredentialProvider,
        region: String,
    },
    Azure {
        credentials: AzureCredentialProvider,
        account: String,
    },
    /// A token, which does not depend on what is asked.
    Bearer,
}

impl Connector {
    /// From now on requests are signed as this store does it.
    pub(super) fn sign_for_s3(&self, store: &AmazonS3, region: String) {
        let _ = self.signer.set(Signer::Aws { credentials: Arc::clone(store.credentials()), region });
    }

    /// From now on requests are signed as this store does it.
    pub(super) fn sign_for_azure(&self, store: &MicrosoftAzure, account: String) {
        let _ = self.signer.set(Signer::Azure { credentials: Arc::clone(store.credentials()), account });
    }

    /// From now on requests may have headers that are in no signature.
    pub(super) fn sign_by_token(&self) {
        let _ = self.signer.set(Signer::Bearer);
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        let (signer, unshown) = (Arc::clone(&self.signer), Unshown::default());
        Ok(HttpClient::new(StoreClient { client, signer, unshown }))
    }
}

#[derive(Debug)]
struct StoreClient {
    client: HttpClient,
    signer: Arc<OnceLock<Signer>>,
    unshown: Unshown,
}

#[async_trait::async_trait]
impl HttpService for StoreClient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answered = self.answered(request);
        match TRY_LIMIT.try_with(|&limit| limit) {
            Ok(limit) => tokio::time::timeout(limit, answered).await.unwrap_or_else(|_| {
                let error = Error::new(ErrorKind::TimedOut, "the store does not answer");
                Err(HttpError::new(HttpErrorKind::Timeout, error))
            }),
            Err(_) => answered.await,
        }
    }
}

impl StoreClient {
    async fn answered(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(ask) = request.extensions().get::<Ask>().cloned() {
            return self.asked(request, &ask).await;
        }
        if let Ok(copy) = COPY.try_with(Arc::clone)
            && PartCopy::is_of(&request)
        {
            return self.copied(request, &copy).await;
        }
        if let Some(tries) = request.extensions().get::<Tries>() {
            tries.0.fetch_add(1, Ordering::SeqCst);
        }
        let headers = HEADERS.try_with(Clone::clone).unwrap_or_default();
        let of_directory = OF_DIRECTORY.try_with(|&is_set| is_set).unwrap_or(false);
        match self.signer.get().filter(|signer| signer.has_made(&request)) {
            Some(signer) if of_directory || !headers.is_empty() => {
                if of_directory {
                    let marker = format!("{}/", request.uri()).parse();
                    *request.uri_mut() = marker.map_err(unknown)?;
                }
                for (name, value) in headers {
                    let value = value.parse().map_err(unknown)?;
                    request.headers_mut().insert(name, value);
                }
                signer.sign(&mut request).await.map_err(unknown)?;
            }
            // It would be about the object without the slash.
            None if of_directory && request.method() == "DELETE" => return empty(404),
            _ => {}
        }
        let is_listing = request.uri().query().is_some_and(listing::is_listing);
        let mut answer = self.client.execute(request).await?;
        if let Some(crc64) = WholeCrc64::of(&answer) {
            answer.extensions_mut().insert(crc64);
        }
        if is_listing && answer.status().is_success() { self.shown(answer).await } else { Ok(answer) }
    }

    /// Asks something else than the listing that the request is.
    async fn asked(&self, mut request: HttpRequest, ask: &Ask) -> Result<HttpResponse, HttpError> {
        let Some(signer) = self.signer.get().filter(|signer| signer.has_made(&request)) else {
            return empty(501);
        };
        let mut uri = request.uri().clone().into_parts();
        let path = uri.path_and_query.as_ref().map_or("/", |target| target.path());
        uri.path_and_query = Some(ask.target(path).parse().map_err(unknown)?);
        *request.uri_mut() = uri.try_into().map_err(unknown)?;
        signer.sign(&mut request).await.map_err(unknown)?;
        let answer = self.client.execute(request).await?;
        if answer.status().is_success() { Answer::taken(answer).await } else { Ok(answer) }
    }

    /// Has a part copied instead of sending it.
    async fn copied(&self, mut request: HttpRequest, copy: &PartCopy) -> Result<HttpResponse, HttpError> {
        let Some(signer) = self.signer.get().filter(|signer| signer.has_made(&request)) else {
            return answer(400, NOT_IMPLEMENTED);
        };
        copy.rewrite(&mut request)?;
        signer.sign(&mut request).await.map_err(unknown)?;
        copy.taken(self.client.execute(request).await?).await
    }

    /// A listing without what cannot be shown.
    async fn shown(&self, answer: HttpResponse) -> Result<HttpResponse, HttpError> {
        let (parts, body) = answer.into_parts();
        let body = body.bytes().await?;
        let shown = std::str::from_utf8(&body).ok().and_then(listing::without_unshown);
        let Some((shown, unshown)) = shown else { return Ok(HttpResponse::from_parts(parts, body.into())) };
        self.unshown.note(&unshown);
        Ok(HttpResponse::from_parts(parts, shown.into()))
    }
}

/// An answer that no store gave: 404 for what is not there, 501 for what cannot be asked.
fn empty(status: u16) -> Result<HttpResponse, HttpError> {
    answer(status, "")
}

fn answer(status: u16, body: &str) -> Result<HttpResponse, HttpError> {
    let mut answer = HttpResponse::new(body.to_owned().into());
    *answer.status_mut() = status.try_into().map_err(unknown)?;
    Ok(answer)
}

impl Signer {
    /// Whether it is a request to the store: those for credentials pass here too.
    fn has_made(&self, request: &HttpRequest) -> bool {
        let has = |name: &str| request.headers().contains_key(name);
        match self {
            // Directory buckets have keys of their own for each session, which are not at hand here.
            Self::Aws { .. } => has("x-amz-content-sha256") && !has("x-amz-s3session-token"),
            Self::Azure { .. } => has("x-ms-version"),
            Self::Bearer => has("authorization"),
        }
    }

    /// Signs a request again whose headers have changed. One that was not signed needs no signature, or has it in its URL.
    async fn sign(&self, request: &mut HttpRequest) -> object_store::Result<()> {
        if matches!(self, Self::Bearer) || request.headers_mut().remove("authorization").is_none() {
            return Ok(());
        }
        match self {
            Self::Bearer => Ok(()),
            Self::Aws { credentials, region } => {
                let credential = credentials.get_credential().await?;
                // The digest of the body, or the words that say that it is not signed.
                let digest = request.headers().get("x-amz-content-sha256").and_then(|v| hex::decode(v).ok());
                AwsAuthorizer::new(&credential, "s3", region)
                    .with_sign_payload(digest.is_some())
                    .try_authorize(request, digest.as_deref())
            }
            Self::Azure { credentials, account } => {
                let credential = credentials.get_credential().await?;
                AzureAuthorizer::new(&credential, account).try_authorize(request)
            }
        }
    }
}
