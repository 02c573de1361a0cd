//! What a store's answers mean: refused for good, changed, not there, damaged, or worth another try.

use super::replaces::Replaces;
use crate::error::{Error, ErrorKind, redacted};

/// Codes of answers that deny access, where the answer's number does not tell.
const DENIALS: [&str; 5] = [
    "AuthenticationFailed",
    "AuthorizationFailure",
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "AccessDenied",
];

/// Codes of answers to bodies that are not what their checksums say.
const DAMAGES: [&str; 6] = [
    "BadDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    "Md5Mismatch",
    "Crc64Mismatch",
    "IncompleteBody",
];

/// Codes of answers to a copy whose source is not what it was: gone, replaced, or shorter (S3 API Reference, "UploadPartCopy").
const SOURCE_CHANGES: [&str; 4] = ["NoSuchKey", "PreconditionFailed", "InvalidRange", "InvalidArgument"];

/// Codes of answers to what the store cannot do.
const UNKNOWN: [&str; 3] = ["NotImplemented", "MethodNotAllowed", "NotSupported"];

/// The error of a condition that does not hold.
pub(super) fn conflict(what: &str) -> Error {
    let reason = "there is something else than what was to be replaced; somebody else has written it";
    Error::new(ErrorKind::Conflict, format!("{what}: {reason}"))
}

/// The error of an object that is not what was to be copied.
pub(super) fn source_changed() -> Error {
    Error::new(ErrorKind::Conflict, "cannot copy the part: the object to copy from is not what it was")
}

/// The error of a part that the store was to copy.
pub(super) fn copy_error(error: object_store::Error) -> Error {
    use object_store::Error as Store;
    let what = "cannot copy the part";
    let reply = StoreReply::of(&error);
    match (reply.code.as_deref(), &error) {
        (Some(code), _) if SOURCE_CHANGES.contains(&code) => source_changed().because(reply),
        (_, Store::Precondition { .. }) => source_changed().because(reply),
        (Some(code), _) if UNKNOWN.contains(&code) => {
            Error::unsupported("the store copies no ranges of objects").because(reply)
        }
        _ => translated(what, ErrorKind::UploadFailed, error),
    }
}

/// The store's error of a request that writes, in our words.
pub(super) fn write_error(what: &str, replaces: &Replaces, error: object_store::Error) -> Error {
    use object_store::Error as Store;
    let is_condition = match &error {
        Store::AlreadyExists { .. } | Store::Precondition { .. } | Store::NotModified { .. } => true,
        // An object that is not there is not the one that was to be replaced (S3 API Reference, "PutObject", If-Match).
        Store::NotFound { .. } => StoreReply::of(&error).code.as_deref() == Some("NoSuchKey"),
        _ => false,
    };
    if is_condition && *replaces != Replaces::Anything {
        return conflict(what).because(StoreReply::of(&error));
    }
    translated(what, ErrorKind::UploadFailed, error)
}

/// The store's error in our words; `otherwise` is the kind of what can only be told as a failure.
pub(super) fn translated(what: &str, otherwise: ErrorKind, error: object_store::Error) -> Error {
    use object_store::Error as Store;
    let reply = StoreReply::of(&error);
    let (kind, reason) = match (reply.code.as_deref(), &error) {
        (Some("NoSuchBucket"), _) => (ErrorKind::NotFound, "the store has no such bucket; make it first"),
        (Some("ContainerNotFound"), _) => {
            (ErrorKind::NotFound, "the store has no such container; make it first")
        }
        // Azure's word for blocks that are not there, or are in an object already.
        (Some("InvalidBlockList"), _) => (ErrorKind::NotFound, "the store does not have its parts any more"),
        (Some(code), _) if DAMAGES.contains(&code) => {
            let what = format!("{what}: the bytes that the store received are not those that were sent");
            return Error::new(ErrorKind::Damaged, what).because(reply).transient();
        }
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
            let is_final = reply.is_final;
            let failed = failed.because(reply);
            return if is_final { failed } else { failed.transient() };
        }
    };
    Error::new(kind, format!("{what}: {reason}")).because(reply)
}

const DENIED: &str = "the store denies access with these credentials";

/// What a store answers, for people: the code and the message of its answer where it has them. The log has all of it at the
/// level debug.
#[derive(Debug)]
struct StoreReply {
    code: Option<String>,
    text: String,
    /// Whether it will say the same again: the answer's number begins with 4, and is not that of a slow or of too many requests.
    is_final: bool,
}

impl StoreReply {
    fn of(error: &object_store::Error) -> Self {
        // It may quote a URL with a password or a signature.
        let whole = redacted(&error.to_string()).into_owned();
        tracing::debug!("the store answers: {whole}");
        // Before the answer stand the request's method and URL, where anything may be written.
        let answer = whole.split_once("status code: ").map_or("", |(_, answer)| answer);
        let element = |name: &str| {
            let (_, rest) = answer.split_once(&format!("<{name}>"))?;
            let (text, _) = rest.split_once('<')?;
            // Azure's messages are followed by the request's number and time.
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

/// For the fuzz targets: the error in which a store's answer has this text.
pub fn fuzz_reply(text: &str) -> Error {
    let text = format!("Server returned non-2xx status code: {text}");
    let error = object_store::Error::Generic { store: "S3", source: text.into() };
    write_error("cannot write it", &Replaces::Nothing, error)
}

impl std::fmt::Display for StoreReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StoreReply {}
