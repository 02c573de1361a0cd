//! What is to be exported, and where to.

use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::status::StatusImage;
use crate::bucket::{ObjectKey, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::vfile::VirtualFile;

/// Where a job's bytes come from, in words that a later process understands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobSource {
    /// A file of the catalog.
    Image(StatusImage),
    /// A file in the staging directory, complete and synced, removed when the job ends.
    Staged(PathBuf),
}

impl JobSource {
    /// The image, where it is one; what a program wrote is none.
    pub fn image(&self) -> Option<&StatusImage> {
        match self {
            Self::Image(image) => Some(image),
            Self::Staged(_) => None,
        }
    }
}

/// What is to be exported, and where to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRequest {
    /// The bucket's name in the mount.
    pub bucket: String,
    /// The object's key.
    pub key: ObjectKey,
    /// The bytes.
    pub source: JobSource,
    /// The client's token.
    pub client_token: Option<String>,
    /// The object's tags.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    /// What the object replaces, as it was when the job was asked for. `None` where that is not known: then it is what
    /// is there when the job begins.
    #[serde(default)]
    pub replaces: Option<Replaces>,
}

/// The bytes of a recorded job's image, found again.
pub struct RecordedFile {
    /// The bytes.
    pub file: Arc<dyn VirtualFile>,
    /// What they are known by now.
    pub image: StatusImage,
    /// Whether they certainly are those that were recorded, so that an upload of them can be continued; else it is
    /// made anew.
    pub continues: bool,
}

/// Longest id of a job that is taken; ours have 29 bytes.
const MAX_JOB_ID: usize = 64;

/// A job's id: 1 to 64 ASCII letters, digits and hyphens, so that it can be part of a file's name. What a status in a
/// bucket or a record says is checked when it is read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// An id that sorts by time and is unique over hosts: milliseconds since 1970 and 64 random bits, hexadecimal.
    pub(super) fn new() -> Self {
        use std::hash::{BuildHasher, Hasher};
        // RandomState is seeded by the operating system and differs at each call.
        let random = std::hash::RandomState::new().build_hasher().finish();
        Self(format!("{:012x}-{random:016x}", Timestamp::now().as_millisecond()))
    }

    /// Checks an id.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) for what cannot be one.
    pub fn parse(id: &str) -> Result<Self> {
        let is_id = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if id.is_empty() || id.len() > MAX_JOB_ID || !id.bytes().all(is_id) {
            let shown: String = id.chars().take(MAX_JOB_ID).collect();
            return Err(Error::new(ErrorKind::Malformed, format!("{shown:?} is no id of a job")));
        }
        Ok(Self(id.to_owned()))
    }
}

impl Deref for JobId {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JobId {
    type Error = Error;

    fn try_from(id: String) -> Result<Self> {
        Self::parse(&id)
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_jobs_can_be_parts_of_names_and_nothing_else() {
        assert_eq!(JobId::parse(&JobId::new()).unwrap().len(), 29);
        let long = "x".repeat(MAX_JOB_ID + 1);
        for bad in ["", ".", "..", "/home/u/package", "a/b", "a.json", "a b", "a\0", "ä", &long] {
            assert_eq!(JobId::parse(bad).unwrap_err().kind(), ErrorKind::Malformed, "{bad:?}");
            assert!(serde_json::from_value::<JobId>(bad.into()).is_err(), "{bad:?}");
        }
        JobId::parse(&long[1..]).unwrap();
    }
}
