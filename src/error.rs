//! The one error type of the crate: a stable kind, where it happened, what happened, and its cause.
//!
//! Two exhaustive matches consume an [`ErrorKind`]: [`ErrorKind::errno`], what a program sees through the
//! mount, and [`ErrorKind::code`], what a status file and a log line say. Nothing else may switch on text.
//!
//! What an error says may come from outside: it is safe to show, bounded, and without the
//! secrets of URLs, whatever it was made of. A sentence quotes
//! names by [`quoted`], so that a long one does not cost the sentence.

mod redacted;
mod shown;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

pub use redacted::redacted;
pub use shown::{MAX_SHOWN_NAME, is_unsafe, quoted, shown};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Longest sentence, longest place and longest cause of an error, in bytes.
const MAX_TEXT: usize = 2048;

/// Longest [`report`](Error::report), and longest [`cause`](Error::cause).
pub const MAX_REPORT: usize = 4 * MAX_TEXT;

/// What sort of failure it is. Stable: errno and status codes follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// An image, file, bucket or object that does not exist.
    NotFound,
    /// A name, option, URL or document that is not well-formed.
    Malformed,
    /// A name of more bytes than a filesystem's names have, or a key of more bytes than a store's.
    NameTooLong,
    /// Refused by the policy in force.
    PolicyRefused,
    /// An image refers to a file that the catalog does not allow it to use.
    ReferenceDenied,
    /// The operating system or the store denies access.
    PermissionDenied,
    /// Larger than a format, policy or store allows.
    TooLarge,
    /// In use: an export of the same key is running, a state directory is locked.
    Busy,
    /// A limit on concurrent jobs is reached.
    TooManyJobs,
    /// A feature that is recognised and not supported.
    Unsupported,
    /// The image's own structures are wrong or cut short.
    CorruptImage,
    /// The source changed while it was being read.
    SourceChanged,
    /// Fewer bytes arrived than the format's own header declares.
    Incomplete,
    /// Bytes did not arrive as they were sent.
    Damaged,
    /// The upload failed for good.
    UploadFailed,
    /// The target, or the part of the tree, cannot be written.
    ReadOnly,
    /// No space is left for staging or in the target.
    NoSpace,
    /// A client token or another bounded value is too long.
    TokenTooLong,
    /// The image is encrypted and no key is known.
    Encrypted,
    /// The target exists and must not be replaced.
    AlreadyExists,
    /// The target is not what was to be replaced: somebody else wrote it meanwhile.
    Conflict,
    /// The job was cancelled.
    Cancelled,
    /// A directory is not empty.
    NotEmpty,
    /// A directory where a file is needed.
    IsDirectory,
    /// A file where a directory is needed.
    NotDirectory,
    /// Renaming across buckets, which programs answer with a copy.
    CrossDevice,
    /// A wait ended before what was waited for.
    TimedOut,
    /// Reading or writing failed below us.
    Io,
    /// A broken invariant of our own.
    Internal,
}

impl ErrorKind {
    /// The errno that a program gets for this kind.
    pub fn errno(self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::Malformed => libc::EINVAL,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::PolicyRefused | Self::ReferenceDenied => libc::EPERM,
            Self::PermissionDenied => libc::EACCES,
            Self::TooLarge => libc::EFBIG,
            Self::Busy | Self::Conflict => libc::EBUSY,
            Self::TooManyJobs => libc::EAGAIN,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::CorruptImage
            | Self::Incomplete
            | Self::Damaged
            | Self::UploadFailed
            | Self::Io
            | Self::Internal => libc::EIO,
            Self::SourceChanged => libc::ESTALE,
            Self::ReadOnly => libc::EROFS,
            Self::NoSpace => libc::ENOSPC,
            Self::TokenTooLong => libc::ERANGE,
            Self::Encrypted => libc::ENOKEY,
            Self::AlreadyExists => libc::EEXIST,
            Self::Cancelled => libc::ECANCELED,
            Self::NotEmpty => libc::ENOTEMPTY,
            Self::IsDirectory => libc::EISDIR,
            Self::NotDirectory => libc::ENOTDIR,
            Self::CrossDevice => libc::EXDEV,
            Self::TimedOut => libc::ETIMEDOUT,
        }
    }

    /// The public code of a status file's `error.code`, listed in freightfs-status(5).
    pub fn code(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Malformed => "malformed",
            Self::NameTooLong => "name_too_long",
            Self::PolicyRefused => "policy_refused",
            Self::ReferenceDenied => "reference_denied",
            Self::PermissionDenied => "permission_denied",
            Self::TooLarge => "too_large",
            Self::Busy => "busy",
            Self::TooManyJobs => "too_many_jobs",
            Self::Unsupported => "unsupported",
            Self::CorruptImage => "corrupt_image",
            Self::SourceChanged => "source_changed",
            Self::Incomplete => "incomplete",
            Self::Damaged => "damaged",
            Self::UploadFailed => "upload_failed",
            Self::ReadOnly => "read_only",
            Self::NoSpace => "no_space",
            Self::TokenTooLong => "token_too_long",
            Self::Encrypted => "encrypted",
            Self::AlreadyExists => "already_exists",
            Self::Conflict => "conflict",
            Self::Cancelled => "cancelled",
            Self::NotEmpty => "not_empty",
            Self::IsDirectory => "is_directory",
            Self::NotDirectory => "not_directory",
            Self::CrossDevice => "cross_device",
            Self::TimedOut => "timed_out",
            Self::Io => "io",
            Self::Internal => "internal",
        }
    }

    /// Every kind, for the tests that compare lists in the manual with the code.
    pub const ALL: [Self; 29] = [
        Self::NotFound,
        Self::Malformed,
        Self::NameTooLong,
        Self::PolicyRefused,
        Self::ReferenceDenied,
        Self::PermissionDenied,
        Self::TooLarge,
        Self::Busy,
        Self::TooManyJobs,
        Self::Unsupported,
        Self::CorruptImage,
        Self::SourceChanged,
        Self::Incomplete,
        Self::Damaged,
        Self::UploadFailed,
        Self::ReadOnly,
        Self::NoSpace,
        Self::TokenTooLong,
        Self::Encrypted,
        Self::AlreadyExists,
        Self::Conflict,
        Self::Cancelled,
        Self::NotEmpty,
        Self::IsDirectory,
        Self::NotDirectory,
        Self::CrossDevice,
        Self::TimedOut,
        Self::Io,
        Self::Internal,
    ];
}

/// A failure: kind, what happened, in which file or object and at which byte of it, and why.
///
/// `Display` shows the place and what happened, never the source; [`Error::report`] shows the whole chain.
/// Cheap to clone, because one failure is told to several waiters.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    what: String,
    place: Option<String>,
    offset: Option<u64>,
    cloud_code: Option<String>,
    is_transient: bool,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`; `what` is a lower-case sentence without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: bounded(what.into()),
            place: None,
            offset: None,
            cloud_code: None,
            is_transient: false,
            source: None,
        }
    }

    /// [`ErrorKind::CorruptImage`] with a sentence.
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::CorruptImage, what)
    }

    /// [`ErrorKind::Unsupported`] with a sentence.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// An I/O error of the operating system, its kind translated where it has one here.
    pub fn from_io(what: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EACCES | libc::EPERM) => ErrorKind::PermissionDenied,
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::EFBIG) => ErrorKind::TooLarge,
            Some(libc::EBUSY) => ErrorKind::Busy,
            Some(libc::EEXIST) => ErrorKind::AlreadyExists,
            Some(libc::ENOTEMPTY) => ErrorKind::NotEmpty,
            Some(libc::EISDIR) => ErrorKind::IsDirectory,
            Some(libc::ENOTDIR) => ErrorKind::NotDirectory,
            Some(libc::ENAMETOOLONG) => ErrorKind::NameTooLong,
            Some(libc::EINVAL | libc::ELOOP) => ErrorKind::Malformed,
            _ => ErrorKind::Io,
        };
        Self::new(kind, what).because(source)
    }

    /// A TOML document that is not well-formed, by its line.
    pub fn from_toml(error: &toml::de::Error, text: &str) -> Self {
        let line = error.span().map_or(1, |span| line_number(text, span.start));
        let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        Self::new(ErrorKind::Malformed, format!("line {line}: {message}"))
    }

    /// Names the file, URL or key in which it happened; the first name given stays.
    #[must_use]
    pub fn in_file(mut self, place: impl Into<String>) -> Self {
        self.place.get_or_insert_with(|| bounded(place.into()));
        self
    }

    /// Names the byte of the file at which it happened; the first one given stays.
    #[must_use]
    pub fn at(mut self, offset: impl Into<u64>) -> Self {
        self.offset.get_or_insert_with(|| offset.into());
        self
    }

    /// Adds the code by which the cloud whose policy is in force calls it.
    #[must_use]
    pub fn with_cloud_code(mut self, code: &str) -> Self {
        self.cloud_code = Some(code.to_owned());
        self
    }

    /// Marks it as one that may go away by itself, so that it is worth to try again.
    #[must_use]
    pub fn transient(self) -> Self {
        Self { is_transient: true, ..self }
    }

    /// Whether it may go away by itself: a store that is not reached, overloaded or broken.
    pub fn is_transient(&self) -> bool {
        self.is_transient
    }

    /// The code by which the cloud whose policy is in force calls it.
    pub fn cloud_code(&self) -> Option<&str> {
        self.cloud_code.as_deref()
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What happened, without place and cause.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The errno for a program, see [`ErrorKind::errno`].
    pub fn errno(&self) -> i32 {
        self.kind.errno()
    }

    /// Place, sentence and all causes in one line, for people.
    pub fn report(&self) -> String {
        self.with_causes(self.to_string())
    }

    /// The causes alone in one line, if there are any.
    pub fn cause(&self) -> Option<String> {
        Some(self.with_causes(String::new())).filter(|line| !line.is_empty())
    }

    fn with_causes(&self, mut line: String) -> String {
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            // Stores answer with whole documents.
            let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            let text = bounded(text);
            if !line.contains(&text) {
                if !line.is_empty() {
                    line.push_str(": ");
                }
                line.push_str(&text);
            }
            next = cause.source();
        }
        match shown(&line, MAX_REPORT) {
            Cow::Borrowed(_) => line,
            Cow::Owned(cut) => cut,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if let Some(offset) = self.offset {
            write!(f, "at byte {offset}: ")?;
        }
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as &(dyn std::error::Error + 'static))
    }
}

/// A text as errors have it.
fn bounded(text: String) -> String {
    let text = match redacted(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(redacted) => redacted,
    };
    match shown(&text, MAX_TEXT) {
        Cow::Borrowed(_) => text,
        Cow::Owned(cut) => cut,
    }
}

/// The line, counted from 1, of a byte of a text.
fn line_number(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn codes_are_distinct_and_every_kind_is_listed() {
        let codes: HashSet<_> = ErrorKind::ALL.iter().map(|k| k.code()).collect();
        assert_eq!(codes.len(), ErrorKind::ALL.len());
        let (_, declared) = include_str!("error.rs").split_once("pub enum ErrorKind {\n").unwrap();
        let declared: Vec<_> = declared
            .lines()
            .take_while(|line| *line != "}")
            .filter_map(|line| line.trim().strip_suffix(','))
            .collect();
        let listed: Vec<_> = ErrorKind::ALL.iter().map(|kind| format!("{kind:?}")).collect();
        assert_eq!(listed, declared);
    }

    #[test]
    fn report_names_place_offset_sentence_and_cause_once() {
        let io = std::io::Error::from_raw_os_error(libc::EIO);
        let text = io.to_string();
        let error = Error::new(ErrorKind::Io, "cannot read").in_file("a.qcow2").at(512u64).because(io);
        assert_eq!(error.to_string(), "a.qcow2: at byte 512: cannot read");
        assert_eq!(error.report(), format!("a.qcow2: at byte 512: cannot read: {text}"));
        assert_eq!(error.clone().in_file("b").to_string(), error.to_string());
    }

    #[test]
    fn text_from_outside_is_bounded_and_safe_wherever_it_stands() {
        let hostile = "\x1b[2J\n".repeat(1 << 18);
        let cause = std::io::Error::other(hostile.clone());
        let error = Error::new(ErrorKind::Io, hostile.clone()).in_file(hostile.clone()).because(cause);
        let error = Error::corrupt("above").because(error);
        for text in [error.report(), error.cause().unwrap(), error.to_string()] {
            assert!(
                text.len() <= MAX_REPORT && !text.contains(char::is_control),
                "{} bytes: {text}",
                text.len()
            );
        }
        assert_eq!(quoted(&"x".repeat(1 << 20)).len(), MAX_SHOWN_NAME + 2);
    }

    #[test]
    fn lines_are_counted_from_one() {
        assert_eq!([0, 1, 2, 3, 9].map(|at| line_number("a\n\nb", at)), [1, 1, 2, 3, 3]);
    }
}
