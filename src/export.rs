//! Exports: a copy into a bucket as a job that outlives the program that asked for it.
//!
//! [`JobQueue::submit`] writes a durable record and returns; the job then reads its source part by part, hashes
//! and uploads it, and leaves the object, its checksums and its status file in the bucket. A record that has not
//! ended is taken up again by the next queue over the same state directory, at its last finished part.

mod copy;
mod digests;
mod early;
mod job;
mod journal;
mod lease;
mod limits;
mod part_log;
mod queue;
mod retry;
mod shared;
mod staged;
mod status;
mod upload;

pub use early::EarlyUpload;
pub use job::{Job, JobRequest, JobSource, RecordedFile};
pub use journal::{Journal, StateDir};
pub use queue::{JobQueue, QueueSettings};
pub use retry::Retries;
pub use staged::{StagedFile, staged_file};
pub use status::{JobState, Status, StatusError, StatusImage};
