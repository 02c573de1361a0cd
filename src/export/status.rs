//! The status file: one JSON object that says how far an export is, and how it ended.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::job_id::JobId;
use super::multipart::log::Placed;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Identity;

/// Version of the status file's fields.
pub(super) const STATUS_VERSION: u32 = 1;

/// Longest entity tag that is taken.
const MAX_ETAG: usize = 1024;

/// For how long a status that is not final holds after it was written. One that runs writes it several times meanwhile.
pub(super) const STATUS_VALID: Duration = Duration::from_secs(90);

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum JobState {
    /// Recorded durably, not started.
    Init,
    /// Being read and uploaded.
    Running,
    /// The object is in the bucket, its size and checksums verified.
    Success,
    /// Ended without an object; `error` says why.
    Fail,
    /// Ended by the user without an object.
    Cancelled,
}

impl JobState {
    /// Whether the job will not change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Success | Self::Fail | Self::Cancelled)
    }
}

/// What is exported, when it is an image of the catalog.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusImage {
    /// The image's id.
    pub id: String,
    /// The image's name for people, else its id.
    pub name: String,
    /// The disk.
    pub disk: String,
    /// The format's suffix.
    pub format: String,
    /// The generation of its image file, for people.
    pub generation: String,
    /// What its bytes depend on; absent from what earlier versions recorded.
    #[serde(default)]
    pub identity: Option<Identity>,
}

impl StatusImage {
    /// Whether both certainly are the same bytes, on this host.
    pub fn is_same(&self, other: &Self) -> bool {
        self.identity.is_some() && self.identity == other.identity
    }

    /// Whether both certainly are the same bytes on hosts that have copies of the source.
    pub fn is_same_elsewhere(&self, other: &Self) -> bool {
        self.identity.as_ref().zip(other.identity.as_ref()).is_some_and(|(a, b)| a.is_same_elsewhere(b))
    }
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusError {
    /// A public code, see [`ErrorKind::code`](crate::error::ErrorKind::code).
    pub code: String,
    /// What the code means, for people.
    pub description: String,
    /// Where it happened and what happened.
    pub details: String,
    /// The causes below it.
    pub cause: Option<String>,
    /// What the cloud whose policy is in force calls it.
    #[serde(default)]
    pub cloud_code: Option<String>,
}

impl From<&Error> for StatusError {
    fn from(error: &Error) -> Self {
        Self {
            code: error.kind().code().to_owned(),
            description: error.what().to_owned(),
            details: error.to_string(),
            cause: error.cause(),
            cloud_code: error.cloud_code().map(str::to_owned),
        }
    }
}

/// The content of `KEY.status` and of `jobs/JOB.json`. Fields that are not known yet are null, never absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// 1.
    pub version: u32,
    /// The job's id, unique over all hosts.
    pub job_id: JobId,
    /// The job's state.
    pub status: JobState,
    /// Percent of what is to be done, 0 to 100; 100 only with SUCCESS.
    pub progress: u8,
    /// The image exported; null for a plain write.
    pub image: Option<StatusImage>,
    /// The bucket's name in the mount.
    pub bucket: String,
    /// The object's key.
    pub key: String,
    /// The object's URL.
    pub url: String,
    /// Bytes of the object.
    pub size: Option<u64>,
    /// Bytes read and hashed.
    pub bytes_done: u64,
    /// Bytes that the store has confirmed, whichever way it has got them.
    pub bytes_uploaded: u64,
    /// Of these, bytes that were sent.
    #[serde(default)]
    pub bytes_sent: u64,
    /// Of these, bytes that the store has copied from the object that is replaced.
    #[serde(default)]
    pub bytes_reused: u64,
    /// Of these, zeros that the store has copied.
    #[serde(default)]
    pub bytes_zero: u64,
    /// When the job was recorded.
    pub begin_time: Timestamp,
    /// When it ended.
    pub end_time: Option<Timestamp>,
    /// Seconds that are left at the rate so far.
    pub eta_seconds: Option<u64>,
    /// MD5 of the object, hexadecimal.
    pub md5: Option<String>,
    /// SHA-256 of the object, hexadecimal.
    pub sha256: Option<String>,
    /// CRC-64/NVME of the object, hexadecimal, where the store has compared it.
    #[serde(default)]
    pub crc64nvme: Option<String>,
    /// The store's entity tag of the object.
    pub etag: Option<String>,
    /// The token that the client gave for this request.
    pub client_token: Option<String>,
    /// How often the same was asked for again while nothing had to be done for it: no byte was uploaded twice.
    #[serde(default)]
    pub repeated: u32,
    /// The host that runs the job.
    pub host: String,
    /// How often the job was started, from 1.
    pub attempt: u32,
    /// Why it failed.
    pub error: Option<StatusError>,
    /// When this status was last written into the bucket, or shown.
    #[serde(default)]
    pub updated: Option<Timestamp>,
    /// For how many seconds from `updated` on it holds: an unfinished one that is older comes from a host that ended,
    /// is cut off, or sleeps. Null once the job has ended.
    #[serde(default)]
    pub valid_seconds: Option<u64>,
    /// What the job waits for, in words: a bucket or an image that is not in this mount, a store that fails.
    #[serde(default)]
    pub waiting: Option<String>,
    /// What else is to be known, in words: a user's object at the place of a sidecar, which was left alone.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What is known, without anybody's clock, of which of two jobs of a key came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// This one: the other's status came after one of this job.
    Before,
    /// The other one: the order of the leases says so.
    After,
    /// Nothing: the times that both say are all there is.
    ByTime,
}

impl Status {
    /// The end with an object in the bucket.
    pub(super) fn succeed(&mut self, placed: &Placed) {
        self.status = JobState::Success;
        self.progress = 100;
        self.size = Some(placed.size);
        self.etag.clone_from(&placed.etag);
        self.sha256 = Some(placed.sha256.clone());
        self.md5 = Some(placed.md5.clone());
        self.crc64nvme.clone_from(&placed.crc64nvme);
        self.end();
    }

    /// The end without an object: FAIL, or CANCELLED when that is what happened.
    pub(super) fn fail(&mut self, error: &Error) {
        let cancelled = error.kind() == ErrorKind::Cancelled;
        self.status = if cancelled { JobState::Cancelled } else { JobState::Fail };
        self.error = Some(StatusError::from(error));
        self.end();
    }

    fn end(&mut self) {
        self.end_time = Some(now());
        self.updated = self.end_time;
        self.eta_seconds = None;
        (self.valid_seconds, self.waiting) = (None, None);
    }

    /// Whether this status may take the place of `there`, that of another job, beside an object with the entity tag
    /// `object`. `order` says what is known of which job came first.
    ///
    /// A success is told beside the object that it made. Everything else gives way to a later job, whose id is greater, and
    /// to the success that made the object and came after this job began.
    pub(super) fn may_replace(&self, there: &Self, object: Option<&str>, order: Order) -> bool {
        if self.status == JobState::Success {
            return self.is_of(object);
        }
        let came_after = order == Order::Before || there.end_time.is_some_and(|end| end >= self.begin_time);
        let made_it = there.status == JobState::Success && there.etag.is_some() && there.is_of(object);
        order == Order::After || there.job_id < self.job_id && !(made_it && came_after)
    }

    /// Whether an object with this entity tag is the one of this status, as far as that has one.
    pub(super) fn is_of(&self, object: Option<&str>) -> bool {
        self.etag.is_none() || self.etag.as_deref() == object
    }

    /// Reads a status as it is in a bucket or a record, where anybody may have written it.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) for what freightfs does not write.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let malformed = || Error::new(ErrorKind::Malformed, "this is no status");
        let status: Self = serde_json::from_slice(json).map_err(|e| malformed().because(e))?;
        if status.is_possible() { Ok(status) } else { Err(malformed()) }
    }

    /// Whether its texts that are used, and not only shown, are what they should be.
    pub(super) fn is_possible(&self) -> bool {
        let is_digest = |digest: &Option<String>, digits: usize| {
            let is_hex = |text: &String| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
            digest.as_ref().is_none_or(is_hex)
        };
        self.progress <= 100
            && is_digest(&self.sha256, 64)
            && is_digest(&self.md5, 32)
            && is_digest(&self.crc64nvme, 16)
            && self.etag.as_ref().is_none_or(|etag| etag.len() <= MAX_ETAG)
    }

    /// The file's bytes: one indented JSON object and a newline.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json =
            serde_json::to_vec_pretty(self).expect("a status has only string keys and finite numbers");
        json.push(b'\n');
        json
    }
}

/// Now, to the second's thousandth: what people and programs read.
pub(super) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(job: u32, status: &str, etag: Option<&str>) -> Status {
        let second = |n: u32| format!("2026-01-01T00:00:{n:02}Z");
        serde_json::from_value(serde_json::json!({
            "version": 1, "job_id": job.to_string(), "status": status, "progress": 0, "image": null, "bucket": "b",
            "key": "k", "url": "u", "size": null, "bytes_done": 0, "bytes_uploaded": 0, "begin_time": second(job),
            "end_time": etag.map(|_| second(job + 2)), "eta_seconds": null, "md5": null, "sha256": null, "etag": etag,
            "client_token": null, "host": "h", "attempt": 1, "error": null,
        }))
        .unwrap()
    }

    #[test]
    fn a_status_gives_way_to_what_is_newer() {
        let object = Some("new");
        let success = |job, etag| status(job, "SUCCESS", Some(etag));
        let failed = |job| status(job, "FAIL", None);
        use Order::{After, Before, ByTime};
        for (own, there, order, may) in [
            // The success that made the object, and one that did not.
            (success(1, "new"), success(5, "old"), Before, true),
            (success(5, "old"), failed(1), Before, false),
            // A failure leaves the success of whoever won, and takes the place of one from before it.
            (failed(5), success(4, "new"), ByTime, false),
            (failed(9), success(4, "new"), ByTime, true),
            (failed(9), success(4, "new"), Before, false),
            (failed(9), success(4, "old"), Before, true),
            // Later jobs have the word.
            (failed(5), failed(6), Before, false),
            (status(5, "RUNNING", None), status(6, "RUNNING", None), Before, false),
            (status(6, "RUNNING", None), status(5, "RUNNING", None), Before, true),
            // Whatever the clocks say, where hosts agree on an order.
            (failed(5), failed(6), After, true),
            (status(5, "RUNNING", None), success(9, "new"), After, true),
            (success(5, "old"), failed(6), After, false),
        ] {
            let text = format!("{own:?}\n{there:?}");
            assert_eq!(own.may_replace(&there, object, order), may, "{text}");
        }
    }
}
