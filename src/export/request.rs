//! What is to be exported, and where to.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::status::StatusImage;
use crate::bucket::{ObjectKey, Replaces, Tags};
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
