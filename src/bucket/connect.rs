//! Clients of remote stores, by a bucket's URL and the environment.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use percent_encoding::percent_decode_str;
use url::Url;

use super::client::Connector;
use super::credentials;
use super::remote::RemoteStore;
use crate::error::{Error, ErrorKind, Result};
use crate::settings::Secret;

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a request may take that has no other limit; each has one (`limits.rs`).
const LONGEST_REQUEST: Duration = Duration::from_secs(24 * 3600);

/// How often and how long a request is retried before it fails for good.
const RETRIES: usize = 8;
const RETRY_TIMEOUT: Duration = Duration::from_secs(180);

/// The region that object_store's client signs for where none is set.
const DEFAULT_REGION: &str = "us-east-1";

/// The setting that lets a client talk without TLS.
const ALLOW_HTTP: &str = "allow_http";

/// A bucket at a store, as its URL names it.
pub(super) struct Place<'a> {
    url: &'a Url,
    bucket: &'a str,
    /// Segments before every key.
    prefix: Option<String>,
    /// How long one request may take.
    timeout: Duration,
    /// Settings of its client, before those of the environment.
    client: &'a BTreeMap<String, Secret>,
}

impl<'a> Place<'a> {
    /// `SCHEME://bucket/prefix`.
    pub(super) fn parse(
        url: &'a Url,
        timeout: Duration,
        client: &'a BTreeMap<String, Secret>,
    ) -> Result<Self> {
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, what).in_file(url.as_str());
        let bucket =
            url.host_str().filter(|h| !h.is_empty()).ok_or_else(|| malformed("the URL names no bucket"))?;
        let prefix = percent_decode_str(url.path().trim_matches('/')).decode_utf8();
        let prefix = prefix.map_err(|e| malformed("the prefix is not UTF-8").because(e))?.into_owned();
        if !prefix.is_empty() {
            Path::parse(&prefix).map_err(|e| malformed("the prefix is not a key").because(e))?;
        }
        Ok(Self { url, bucket, prefix: (!prefix.is_empty()).then_some(prefix), timeout, client })
    }

    /// S3 by the AWS_* variables, and the shared files where those are silent.
    pub(super) fn s3(self) -> Result<RemoteStore> {
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
        for (key, value) in self.settings::<AmazonS3ConfigKey>()? {
            if key == AmazonS3ConfigKey::Endpoint {
                endpoint = Some(value.to_owned());
            }
            builder = builder.with_config(key, value);
        }
        let region = builder.get_config_value(&AmazonS3ConfigKey::Region);
        let connector = Connector::default();
        let store = builder
            .with_bucket_name(self.bucket)
            .with_client_options(self.options("AWS_ALLOW_HTTP"))
            .with_retry(retry())
            .with_unsigned_payload(protected(endpoint.as_deref()))
            // One removal by one request, which can have a condition.
            .with_disable_bulk_delete(true)
            .with_http_connector(connector.clone())
            .build();
        let store = self.usable(store)?;
        connector.sign_for_s3(&store, region.unwrap_or_else(|| DEFAULT_REGION.to_owned()));
        Ok(RemoteStore::s3(store, self.bucket, self.prefix))
    }

    /// Azure Blob Storage by the AZURE_* variables.
    pub(super) fn azure(self) -> Result<RemoteStore> {
        let from_env = MicrosoftAzureBuilder::from_env();
        let settings = self.settings::<AzureConfigKey>()?.into_iter();
        let builder = settings.fold(from_env, |builder, (key, value)| builder.with_config(key, value));
        let account = builder.get_config_value(&AzureConfigKey::AccountName);
        let connector = Connector::default();
        let store = builder
            .with_container_name(self.bucket)
            .with_client_options(self.options("AZURE_ALLOW_HTTP"))
            .with_retry(retry())
            .with_http_connector(connector.clone())
            .build();
        let store = self.usable(store)?;
        connector.sign_for_azure(&store, account.unwrap_or_default());
        Ok(RemoteStore::azure(store, self.prefix))
    }

    /// Google Cloud Storage by the GOOGLE_* variables.
    pub(super) fn google(self) -> Result<RemoteStore> {
        let from_env = GoogleCloudStorageBuilder::from_env();
        let settings = self.settings::<GoogleConfigKey>()?.into_iter();
        let connector = Connector::default();
        connector.sign_by_token();
        let store = settings
            .fold(from_env, |builder, (key, value)| builder.with_config(key, value))
            .with_bucket_name(self.bucket)
            .with_client_options(self.options("GOOGLE_ALLOW_HTTP"))
            .with_retry(retry())
            .with_http_connector(connector)
            .build();
        Ok(RemoteStore::google(self.usable(store)?, self.prefix))
    }

    /// The settings of the client, but for `allow_http`, which is not the store's.
    fn settings<K: FromStr>(&self) -> Result<Vec<(K, &'a str)>> {
        let settings = self.client.iter().filter(|(key, _)| *key != ALLOW_HTTP);
        let known = settings.map(|(key, value)| match key.parse() {
            Ok(known) => Ok((known, value.reveal())),
            Err(_) => {
                let what = format!("its store has no setting {key:?}");
                Err(Error::new(ErrorKind::Malformed, what).in_file(self.url.as_str()))
            }
        });
        known.collect()
    }

    fn usable<S>(&self, store: object_store::Result<S>) -> Result<S> {
        store.map_err(|e| {
            Error::new(ErrorKind::Malformed, "cannot use this bucket").in_file(self.url.as_str()).because(e)
        })
    }

    fn options(&self, allow_http: &str) -> ClientOptions {
        // The process's TLS; it stays what it is when somebody has chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let set = self.client.get(ALLOW_HTTP).map(|value| value.reveal().to_owned());
        let allowed = set
            .or_else(|| std::env::var(allow_http).ok())
            .is_some_and(|v| v == "1" || v.eq_ignore_ascii_case("true"));
        ClientOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT.min(self.timeout))
            .with_timeout(LONGEST_REQUEST.max(self.timeout))
            .with_allow_http(allowed)
    }
}

fn retry() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: RETRIES, retry_timeout: RETRY_TIMEOUT }
}

/// Whether bodies need no signature: TLS protects them, or they do not leave this machine. Hashing them again for
/// the signature costs two thirds of an upload's time.
fn protected(endpoint: Option<&str>) -> bool {
    let Some(url) = endpoint.and_then(|e| Url::parse(e).ok()) else { return true };
    let loopback = match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "https" || loopback
}
