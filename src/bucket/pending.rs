//! Uploads under way at S3, by requests that object_store has no words for.
//!
//! Such a request is made as a listing, so that it has the retries, limits and errors of one, and is rewritten below
//! object_store (`client.rs`), which gets an empty listing for an answer. The answers are checked: the store's, and names in
//! them are anybody's.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use jiff::Timestamp;
use object_store::client::{HttpError, HttpErrorKind, HttpResponse, HttpResponseBody};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::listing::named;
use crate::error::{Error, ErrorKind, Result};
use crate::units::MIB;

/// Largest answer that is read: 1000 uploads with keys of 1 KiB, each character escaped, take less.
const MAX_ANSWER: u64 = 16 * MIB;

/// Answers of one listing that are asked for.
const MAX_PAGES: usize = 10;

/// Most uploads of one key that are told apart.
const MAX_UPLOADS: usize = 1000;

/// Longest id of an upload that is taken.
const MAX_ID: usize = 1024;

/// What stays as it is in a path and a query (S3 User Guide, "Signature Calculations", URI encoding); in a path slashes too.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
pub(super) const PATH: &AsciiSet = &QUERY.remove(b'/');

/// The listing that object_store gets in place of the answer.
const EMPTY: &str = "<ListBucketResult></ListBucketResult>";

/// What is asked instead of a listing.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    /// The uploads of keys that begin like this, after those that the markers name ("ListMultipartUploads").
    Uploads { prefix: String, after: Option<(String, String)> },
    /// The first part of an upload ("ListParts").
    FirstPart { key: String, upload: String },
}

/// The store's answer, and its clock when it gave it.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) date: Option<Timestamp>,
    pub(super) text: Arc<str>,
}

/// An upload under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingUpload {
    /// The store's id of it.
    pub id: String,
    /// When it was started, by the store's clock.
    pub initiated: Option<Timestamp>,
    /// Who started it, where the store says so.
    pub initiator: Option<String>,
}

/// The uploads under way of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingUploads {
    /// When they were asked for, by the store's clock.
    pub at: Timestamp,
    /// All of them.
    pub uploads: Vec<PendingUpload>,
}

impl Ask {
    /// The path and the query of the request, where `path` is that of the bucket.
    pub(super) fn target(&self, path: &str) -> String {
        let encoded = |text: &str| utf8_percent_encode(text, QUERY).to_string();
        match self {
            Self::Uploads { prefix, after } => {
                let markers = after.as_ref().map(|(key, id)| {
                    format!("key-marker={}&upload-id-marker={}&", encoded(key), encoded(id))
                });
                let markers = markers.unwrap_or_default();
                format!("{path}?{markers}max-uploads=1000&prefix={}&uploads=", encoded(prefix))
            }
            Self::FirstPart { key, upload } => {
                let (path, key) = (path.trim_end_matches('/'), utf8_percent_encode(key, PATH));
                format!("{path}/{key}?max-parts=1&uploadId={}", encoded(upload))
            }
        }
    }
}

impl Answer {
    /// Reads an answer; returns it as the extension of an empty listing.
    pub(super) async fn taken(answer: HttpResponse) -> Result<HttpResponse, HttpError> {
        let (mut parts, body) = answer.into_parts();
        let date = parts.headers.get("date").and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok()).map(|date| date.timestamp());
        let body = bounded(body, MAX_ANSWER).await?;
        let text = String::from_utf8_lossy(&body).into();
        parts.headers.remove("content-length");
        parts.extensions.insert(Self { date, text });
        Ok(HttpResponse::from_parts(parts, EMPTY.to_owned().into()))
    }
}

/// A body of at most so many bytes.
pub(super) async fn bounded(body: HttpResponseBody, limit: u64) -> Result<Bytes, HttpError> {
    let (mut stream, mut read) = (body.bytes_stream(), BytesMut::new());
    while let Some(bytes) = stream.next().await {
        let bytes = bytes?;
        if (read.len() + bytes.len()) as u64 > limit {
            let what = format!("the store's answer has more than {limit} bytes");
            return Err(HttpError::new(HttpErrorKind::Decode, Error::new(ErrorKind::TooLarge, what)));
        }
        read.extend_from_slice(&bytes);
    }
    Ok(read.freeze())
}

/// A request that cannot be made.
pub(super) fn unknown<E: std::error::Error + Send + Sync + 'static>(error: E) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, error)
}

/// The uploads of exactly this key, page by page.
///
/// # Errors
/// [`Unsupported`](ErrorKind::Unsupported) where the answers do not tell all of them, or not when that was.
pub(super) async fn uploads_of<F>(key: &str, ask: impl Fn(Ask) -> F) -> Result<PendingUploads>
where
    F: Future<Output = Result<Answer>>,
{
    let unusable = |what: &str| Error::unsupported(format!("the store's list of uploads {what}"));
    let (mut uploads, mut after, mut at) = (Vec::new(), None, None);
    for _ in 0..MAX_PAGES {
        let Answer { date, text } = ask(Ask::Uploads { prefix: key.to_owned(), after }).await?;
        at = at.or(date);
        uploads.extend(uploads_in(&text).filter(|(of, _)| of == key).map(|(_, upload)| upload));
        if uploads.len() > MAX_UPLOADS || uploads.iter().any(|upload| upload.id.len() > MAX_ID) {
            return Err(unusable("is too long"));
        }
        // The elements of uploads come after those of the whole list, or before: none has these names.
        if named(&text, "IsTruncated").as_deref() != Some("true") {
            let at = at.ok_or_else(|| unusable("has no date"))?;
            return Ok(PendingUploads { at, uploads });
        }
        let marker = |name: &str| named(&text, name).unwrap_or_default();
        after = Some((marker("NextKeyMarker"), marker("NextUploadIdMarker")));
    }
    Err(unusable("does not end"))
}

/// The uploads of one answer, with their keys.
fn uploads_in(text: &str) -> impl Iterator<Item = (String, PendingUpload)> {
    text.split("<Upload>").skip(1).filter_map(|rest| {
        let (element, _) = rest.split_once("</Upload>")?;
        let initiator = element.split_once("<Initiator>").and_then(|(_, initiator)| named(initiator, "ID"));
        let upload = PendingUpload {
            id: named(element, "UploadId")?,
            initiated: named(element, "Initiated").and_then(|time| time.parse().ok()),
            initiator: initiator.filter(|id| !id.is_empty()),
        };
        Some((named(element, "Key")?, upload))
    })
}

/// Whether an answer about an upload's parts names one.
pub(super) fn has_part(answer: &Answer) -> bool {
    answer.text.contains("<Part>")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures::FutureExt;

    use super::*;

    fn upload(key: &str, id: &str, more: &str) -> String {
        format!(
            "<Upload><Initiated>2026-11-24T14:55:01Z</Initiated><Key>{key}</Key><UploadId>{id}</UploadId>{more}</Upload>"
        )
    }

    fn listed(key: &str, pages: &[String], date: bool) -> (Result<PendingUploads>, Vec<String>) {
        let (asked, at) = (RefCell::new(Vec::new()), "2026-11-24T14:55:02Z".parse().unwrap());
        let ask = |ask: Ask| {
            let number = asked.borrow().len().min(pages.len() - 1);
            asked.borrow_mut().push(ask.target("/b"));
            std::future::ready(Ok(Answer { date: date.then_some(at), text: pages[number].as_str().into() }))
        };
        let found = uploads_of(key, ask).now_or_never().unwrap();
        (found, asked.into_inner())
    }

    #[test]
    fn the_uploads_of_a_key_are_those_of_exactly_that_key_on_all_pages() {
        let initiator =
            "<Owner><ID>o</ID></Owner><Initiator><ID>me</ID><DisplayName>x</DisplayName></Initiator>";
        let markers = "<NextKeyMarker>a&amp;b</NextKeyMarker><NextUploadIdMarker>1/</NextUploadIdMarker>";
        let first = format!("<IsTruncated>true</IsTruncated>{markers}{}", upload("a&amp;b", "1", initiator));
        let second = upload("a&amp;b.md5", "2", "") + &upload("a&amp;b", "3", "") + "<Upload><Key>cut off";
        let (found, asked) = listed("a&b", &[first, second], true);
        let found = found.unwrap();
        let ids: Vec<_> = found.uploads.iter().map(|u| (u.id.as_str(), u.initiator.as_deref())).collect();
        assert_eq!(ids, [("1", Some("me")), ("3", None)]);
        assert_eq!(found.uploads[0].initiated, Some("2026-11-24T14:55:01Z".parse().unwrap()));
        assert_eq!(
            asked,
            [
                "/b?max-uploads=1000&prefix=a%26b&uploads=",
                "/b?key-marker=a%26b&upload-id-marker=1%2F&max-uploads=1000&prefix=a%26b&uploads="
            ]
        );
    }

    #[test]
    fn a_list_that_does_not_end_is_too_long_or_has_no_date_is_of_no_use() {
        let endless = format!("<IsTruncated>true</IsTruncated>{}", upload("k", "1", ""));
        let long = upload("k", "1", "").repeat(MAX_UPLOADS + 1);
        for (page, date) in [
            (endless, true),
            (long, true),
            (upload("k", &"x".repeat(MAX_ID + 1), ""), true),
            (String::new(), false),
        ] {
            let (found, asked) = listed("k", &[page], date);
            assert_eq!(found.unwrap_err().kind(), ErrorKind::Unsupported);
            assert!(asked.len() <= MAX_PAGES);
        }
    }

    #[test]
    fn parts_are_asked_for_below_the_bucket_whatever_its_url_is() {
        let ask = Ask::FirstPart { key: "d/ü &.raw".to_owned(), upload: "1+2".to_owned() };
        let target = "d/%C3%BC%20%26.raw?max-parts=1&uploadId=1%2B2";
        assert_eq!((ask.target("/"), ask.target("/b")), (format!("/{target}"), format!("/b/{target}")));
    }

    #[tokio::test]
    async fn an_answer_that_does_not_end_is_not_read_to_its_end() {
        let body = "x".repeat(MAX_ANSWER as usize + 1);
        assert!(bounded(body.into(), MAX_ANSWER).await.is_err());
    }
}
