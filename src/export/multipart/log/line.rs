//! The lines of an upload's log.

use serde::{Deserialize, Serialize};

use crate::bucket::ObjectKey;
use crate::failpoint::Step;
use crate::units::{GIB, MIB};

/// Largest part that a store takes (S3 User Guide, "Amazon S3 multipart upload limits").
const MAX_PART_SIZE: u64 = 5 * GIB;

/// Which upload it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct UploadName {
    /// The bucket's name in the mount.
    pub(in crate::export) bucket: String,
    #[serde(deserialize_with = "ObjectKey::deserialize_any")]
    pub(in crate::export) key: ObjectKey,
    /// The store's id of it.
    pub(in crate::export) id: String,
    /// Bytes of each part but the last, where nothing else is planned.
    pub(in crate::export) part_size: u64,
    /// When the machine was started whose memory may have had parts that its disk had not, where that can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::export) boot: Option<String>,
}

impl UploadName {
    /// Whether there can be parts of this size.
    pub(super) fn is_possible(&self) -> bool {
        let size = self.part_size;
        size > 0 && size <= MAX_PART_SIZE && size.is_multiple_of(MIB)
    }
}

/// Bytes that the store has already, in an object of the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct Copied {
    #[serde(deserialize_with = "ObjectKey::deserialize_any")]
    pub(in crate::export) key: ObjectKey,
    /// The entity tag of the object that is meant.
    pub(in crate::export) etag: String,
    /// Where they are in it.
    pub(in crate::export) at: u64,
    pub(in crate::export) length: u64,
    /// Their CRC-64/NVME.
    pub(in crate::export) crc64: u64,
    /// Whether they are of the object of zeros.
    #[serde(default)]
    pub(in crate::export) is_zero: bool,
}

/// How a part comes to the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::export) enum Making {
    /// It is sent.
    Send,
    /// The store copies it.
    Copy(Copied),
    /// The store copies its beginning into an object of its own, the rest is sent behind that, and the store copies the
    /// whole.
    Splice(Copied),
}

/// What a part is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct PartPlan {
    /// Where it stands in the object.
    pub(in crate::export) offset: u64,
    pub(in crate::export) length: u64,
    pub(in crate::export) making: Making,
}

impl PartPlan {
    /// A part that is sent.
    pub(in crate::export) fn sent(offset: u64, length: u64) -> Self {
        Self { offset, length, making: Making::Send }
    }

    /// How many of its bytes, the first ones, are copied.
    pub(in crate::export) fn copied(&self) -> u64 {
        match &self.making {
            Making::Send => 0,
            Making::Copy(_) => self.length,
            Making::Splice(copied) => copied.length.min(self.length),
        }
    }

    /// Where what follows it stands.
    pub(in crate::export) fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// A part that the store has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct Part {
    /// Where it stands in the object; earlier versions made all parts but the last of one size, and did not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::export) offset: Option<u64>,
    pub(in crate::export) length: u64,
    /// The id by which the object is put together.
    pub(in crate::export) id: String,
}

/// A hash over the first `bytes` of the object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct DigestState {
    pub(in crate::export) bytes: u64,
    /// The hash's own state, hexadecimal; empty at the beginning.
    pub(in crate::export) state: String,
}

/// The hashes that are made of every object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::export) enum DigestName {
    Sha256,
    Md5,
    Crc64nvme,
}

/// An object that is in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct Placed {
    /// Its bytes.
    pub(in crate::export) size: u64,
    /// Its entity tag.
    pub(in crate::export) etag: Option<String>,
    /// Of the whole object, hexadecimal.
    pub(in crate::export) sha256: String,
    /// Of the whole object, hexadecimal.
    pub(in crate::export) md5: String,
    /// CRC-64/NVME of the whole object, hexadecimal, where it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::export) crc64nvme: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    Upload(UploadName),
    /// A part is about to be made.
    Plan {
        index: usize,
        #[serde(flatten)]
        plan: PartPlan,
    },
    Part {
        index: usize,
        #[serde(flatten)]
        part: Part,
    },
    /// The part was written again after it had been sent.
    Stale {
        index: usize,
    },
    Digest {
        name: DigestName,
        #[serde(flatten)]
        state: DigestState,
    },
    /// Chunks from a place on, as the index has them; base64. What was known of chunks from there on is void.
    Chunks {
        /// Their usual length.
        average: u32,
        at: u64,
        chunks: String,
    },
    /// From here on the object may be in place, with an entity tag that begins like this.
    Completing {
        mark: String,
    },
    /// The object is in place.
    Placed(Placed),
}

impl Line {
    /// The durable step that this line is.
    pub(super) fn step(&self) -> Option<Step> {
        match self {
            Self::Upload(_) => Some(Step::LogCreate),
            Self::Part { .. } => Some(Step::PartLog),
            Self::Stale { .. } => Some(Step::StaleMark),
            Self::Completing { .. } => Some(Step::PublishRecord),
            Self::Plan { .. } | Self::Digest { .. } | Self::Chunks { .. } | Self::Placed(_) => None,
        }
    }
}
