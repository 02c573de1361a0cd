//! Keys: the names of objects, checked once.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::error::{Error, ErrorKind, Result};

/// The directory of our own files in a bucket: uploads under way, leases, attributes.
pub const CONTROL_PREFIX: &str = ".freightfs";

/// Longest key in bytes (S3 User Guide, "Naming Amazon S3 objects").
const MAX_KEY: usize = 1024;

/// Longest segment that a filesystem takes (NAME_MAX in linux/limits.h).
const MAX_SEGMENT: usize = 255;

/// An object's key: segments joined by `/`, each a name that a filesystem can have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectKey(String);

impl ObjectKey {
    /// Checks a key.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) for an empty segment, `.`, `..`, a control character, or a key among our own
    /// files; [`NameTooLong`](ErrorKind::NameTooLong) for more than 1024 bytes, or 255 in a segment.
    pub fn parse(key: &str) -> Result<Self> {
        let refused = |kind, what: &str| Err(Error::new(kind, format!("the key {key:?} {what}")));
        let malformed = |what| refused(ErrorKind::Malformed, what);
        if key.len() > MAX_KEY {
            return refused(ErrorKind::NameTooLong, "has more than 1024 bytes");
        }
        for segment in key.split('/') {
            if segment.is_empty() || segment == "." || segment == ".." {
                return malformed("has an empty segment, \".\" or \"..\"");
            }
            if segment.len() > MAX_SEGMENT {
                return refused(ErrorKind::NameTooLong, "has a segment of more than 255 bytes");
            }
            if segment.chars().any(char::is_control) {
                return malformed("has a control character");
            }
        }
        if key.split('/').next() == Some(CONTROL_PREFIX) {
            return malformed("is among freightfs's own files");
        }
        Ok(Self(key.to_owned()))
    }

    /// A key among our own files.
    pub(super) fn internal(key: &str) -> Self {
        Self(key.to_owned())
    }

    /// Reads the key of one of our own files, or of any object, out of what no one but freightfs writes.
    pub fn deserialize_any<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let below = text.strip_prefix(CONTROL_PREFIX).and_then(|below| below.strip_prefix('/'));
        let parsed = Self::parse(below.unwrap_or(&text)).map_err(serde::de::Error::custom)?;
        Ok(if below.is_some() { Self(text) } else { parsed })
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last segment.
    pub fn file_name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&self.0, |(_, name)| name)
    }

    /// The key without its last segment; `None` at the top of the bucket.
    pub fn parent(&self) -> Option<Self> {
        self.0.rsplit_once('/').map(|(parent, _)| Self(parent.to_owned()))
    }

    /// The key one segment further down.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::parse(&format!("{}/{name}", self.0))
    }

    /// The key of a file that stands beside the object, with `suffix` added.
    pub fn with_suffix(&self, suffix: &str) -> Result<Self> {
        Self::parse(&format!("{}{suffix}", self.0))
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ObjectKey {
    type Error = Error;

    fn try_from(key: String) -> Result<Self> {
        Self::parse(&key)
    }
}

impl From<ObjectKey> for String {
    fn from(key: ObjectKey) -> Self {
        key.0
    }
}

/// What of a store cannot be shown in a filesystem, told once.
#[derive(Debug, Default)]
pub(super) struct Unshown(AtomicBool);

impl Unshown {
    /// The key, if it can be a path.
    pub(super) fn shown(&self, key: &str) -> Option<ObjectKey> {
        let parsed = ObjectKey::parse(key).ok();
        if parsed.is_none() && key.split('/').next() != Some(CONTROL_PREFIX) {
            self.note(key);
        }
        parsed
    }

    /// Tells of a key that cannot be a path, unless one was told of before.
    pub(super) fn note(&self, key: &str) {
        if !self.0.swap(true, Ordering::Relaxed) {
            warn!("objects whose keys cannot be paths are not shown, for instance {key:?}");
        }
    }
}

/// A name that nobody else uses: process and a random number.
pub(super) fn unique() -> String {
    format!("{}-{:016x}", std::process::id(), random())
}

/// A random number that no other host has: its seed is the operating system's, at each call.
pub fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked_and_taken_apart() {
        let key = ObjectKey::parse("a/b c~#%/ü.raw").unwrap();
        assert_eq!(key.file_name(), "ü.raw");
        assert_eq!(key.parent().unwrap().as_str(), "a/b c~#%");
        assert_eq!(ObjectKey::parse("a").unwrap().parent(), None);
        assert_eq!(key.with_suffix(".md5").unwrap().file_name(), "ü.raw.md5");
        for bad in ["", "/a", "a/", "a//b", ".", "a/../b", "a\nb", "a\0", ".freightfs", ".freightfs/x"] {
            assert_eq!(ObjectKey::parse(bad).unwrap_err().kind(), ErrorKind::Malformed, "{bad:?}");
        }
        for long in ["x".repeat(256), format!("a/{}/b", "x".repeat(256)), "x/".repeat(512) + "x"] {
            assert_eq!(ObjectKey::parse(&long).unwrap_err().kind(), ErrorKind::NameTooLong);
        }
        ObjectKey::parse(&"x".repeat(255)).unwrap();
        ObjectKey::parse("x/.freightfs").unwrap();
    }

    #[test]
    fn logs_may_name_our_own_files_and_no_other_path() {
        #[derive(Deserialize)]
        struct Line(#[serde(deserialize_with = "ObjectKey::deserialize_any")] ObjectKey);
        let read = |key: &str| serde_json::from_value::<Line>(key.into()).map(|line| line.0.to_string()).ok();
        for good in ["a/b", ".freightfs/zeros", ".freightfs/splices/1-2"] {
            assert_eq!(read(good).as_deref(), Some(good));
            assert_eq!(serde_json::from_value::<ObjectKey>(good.into()).is_ok(), good == "a/b");
        }
        for bad in ["", ".freightfs", ".freightfs/", ".freightfs/../x", ".freightfs//x", "../x"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
