//! Headers that object_store has no words for: the condition of a completion or a removal, and a body's checksum.
//!
//! A layer of the store's HTTP client, below object_store's retries and limits. A request that object_store made and
//! signed gets the headers of the task that it belongs to, and is signed again with them.

use std::sync::{Arc, OnceLock};

use object_store::ClientOptions;
use object_store::aws::{AmazonS3, AwsAuthorizer, AwsCredentialProvider};
use object_store::azure::{AzureAuthorizer, AzureCredentialProvider, MicrosoftAzure};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

use crate::error::{Error, ErrorKind};

/// A header's name, in lower case, and its value.
pub(super) type Header = (&'static str, String);

tokio::task_local! {
    /// What the store's requests of this task are to have.
    static HEADERS: Vec<Header>;
}

/// Makes a request to a store that has these headers besides those of object_store.
pub(super) async fn with_headers<T>(headers: Vec<Header>, request: impl Future<Output = T>) -> T {
    HEADERS.scope(headers, request).await
}

/// Makes the HTTP clients of one store.
#[derive(Clone, Debug, Default)]
pub(super) struct Connector {
    signer: Arc<OnceLock<Signer>>,
}

/// Who signs a store's requests; known when the store's client has been made.
#[derive(Debug)]
enum Signer {
    Aws { credentials: AwsCredentialProvider, region: String },
    Azure { credentials: AzureCredentialProvider, account: String },
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
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(SigningClient { client, signer: Arc::clone(&self.signer) }))
    }
}

#[derive(Debug)]
struct SigningClient {
    client: HttpClient,
    signer: Arc<OnceLock<Signer>>,
}

#[async_trait::async_trait]
impl HttpService for SigningClient {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let headers = HEADERS.try_with(Clone::clone).unwrap_or_default();
        if !headers.is_empty()
            && let Some(signer) = self.signer.get()
            && signer.has_made(&request)
        {
            let failed =
                |what: &str| HttpError::new(HttpErrorKind::Unknown, Error::new(ErrorKind::Internal, what));
            for (name, value) in headers {
                let value =
                    value.parse().map_err(|_| failed("a header has a value that HTTP does not allow"))?;
                request.headers_mut().insert(name, value);
            }
            signer.sign(&mut request).await.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        }
        self.client.execute(request).await
    }
}

impl Signer {
    /// Whether it is a request to the store: those for credentials pass here too.
    fn has_made(&self, request: &HttpRequest) -> bool {
        let has = |name: &str| request.headers().contains_key(name);
        match self {
            // Directory buckets have keys of their own for each session, which are not at hand here.
            Self::Aws { .. } => has("x-amz-content-sha256") && !has("x-amz-s3session-token"),
            Self::Azure { .. } => has("x-ms-version"),
        }
    }

    /// Signs a request again whose headers have changed. One that was not signed needs no signature, or has it in its URL.
    async fn sign(&self, request: &mut HttpRequest) -> object_store::Result<()> {
        if request.headers_mut().remove("authorization").is_none() {
            return Ok(());
        }
        match self {
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
