//! Parts that S3 copies out of an object ("UploadPartCopy"), for which object_store has no words.
//!
//! Such a request is made as one that sends a part without bytes, so that it has the retries, limits and errors of one, and
//! is rewritten below object_store (`client.rs`). The answer comes in a body, which may say too that it is none: a long copy
//! begins to be answered before it has ended.

use std::ops::Range;

use object_store::client::{HttpError, HttpRequest, HttpResponse};
use parking_lot::Mutex;
use percent_encoding::utf8_percent_encode;

use super::checksum::Crc64;
use super::listing::named;
use super::pending::{PATH, bounded, unknown};

/// Largest answer that is read.
const MAX_ANSWER: u64 = 64 * 1024;

/// Codes of errors in the body of an answer that began well, with which the store asks for another try.
const PASSING: [&str; 5] =
    ["InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted"];

/// A part that is being copied.
#[derive(Debug)]
pub(super) struct PartCopy {
    headers: Vec<(&'static str, String)>,
    /// What the store says of the bytes of the part.
    crc64: Mutex<Option<u64>>,
}

impl PartCopy {
    /// The copy of a part from the object at `path`, its bucket and its key, with that entity tag: of all of it, or a range.
    pub(super) fn new(path: &str, etag: &str, range: Option<Range<u64>>) -> Self {
        let mut headers = vec![
            ("x-amz-copy-source", utf8_percent_encode(path, PATH).to_string()),
            ("x-amz-copy-source-if-match", etag.to_owned()),
        ];
        if let Some(range) = range {
            let last = range.end.saturating_sub(1);
            headers.push(("x-amz-copy-source-range", format!("bytes={}-{last}", range.start)));
        }
        Self { headers, crc64: Mutex::new(None) }
    }

    /// What the store has said of the bytes of the part.
    pub(super) fn crc64(&self) -> Option<u64> {
        *self.crc64.lock()
    }

    /// Whether a request is the one that is to be rewritten.
    pub(super) fn is_of(request: &HttpRequest) -> bool {
        request.method() == "PUT" && request.uri().query().is_some_and(|query| query.contains("partNumber="))
    }

    /// Makes a request to send nothing one to copy, which is not signed yet.
    pub(super) fn rewrite(&self, request: &mut HttpRequest) -> Result<(), HttpError> {
        let headers = request.headers_mut();
        let of_body = |name: &str| name.starts_with("x-amz-checksum-") || name.starts_with("content-");
        let names: Vec<_> = headers.keys().filter(|name| of_body(name.as_str())).cloned().collect();
        names.iter().filter(|name| *name != "content-length").for_each(|name| drop(headers.remove(name)));
        for (name, value) in &self.headers {
            let value = value.parse().map_err(unknown)?;
            headers.insert(*name, value);
        }
        Ok(())
    }

    /// The answer as one to a part that was sent: with its entity tag in a header, or an error.
    pub(super) async fn taken(&self, answer: HttpResponse) -> Result<HttpResponse, HttpError> {
        let (mut parts, body) = answer.into_parts();
        if matches!(parts.status.as_u16(), 405 | 501) {
            // Asked again it says the same.
            parts.status = 400.try_into().map_err(unknown)?;
            return Ok(HttpResponse::from_parts(parts, NOT_IMPLEMENTED.to_owned().into()));
        }
        if !parts.status.is_success() {
            return Ok(HttpResponse::from_parts(parts, body));
        }
        let text = String::from_utf8_lossy(&bounded(body, MAX_ANSWER).await?).into_owned();
        let tag = if text.contains("<CopyPartResult") { named(&text, "ETag") } else { None };
        let Some(tag) = tag.and_then(|tag| tag.parse().ok()) else {
            parts.status = status_of(named(&text, "Code").as_deref()).try_into().map_err(unknown)?;
            parts.headers.clear();
            return Ok(HttpResponse::from_parts(parts, text.into()));
        };
        *self.crc64.lock() = named(&text, "ChecksumCRC64NVME").and_then(|crc| Crc64::from_base64(&crc));
        parts.headers.insert("etag", tag);
        Ok(HttpResponse::from_parts(parts, String::new().into()))
    }
}

/// The answer that stands for those of stores that do not know the request.
pub(super) const NOT_IMPLEMENTED: &str =
    "<Error><Code>NotImplemented</Code><Message>ranges of objects cannot be copied</Message></Error>";

/// The status of an answer whose body says that it is an error, or nothing that is known.
fn status_of(code: Option<&str>) -> u16 {
    match code {
        None => 502,
        Some(code) if PASSING.contains(&code) => 503,
        Some("NoSuchUpload") => 404,
        Some("PreconditionFailed") => 412,
        Some(_) => 400,
    }
}
