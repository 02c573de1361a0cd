//! Exports: a copy into a bucket as a job that outlives the program that asked for it.
//!
//! [`JobQueue::submit`] writes a durable record and returns. The job's run then reads its source part by part, hashes and
//! uploads it, and leaves the object, its checksums and its status file in the bucket. A job is a value to display and to
//! wait for; the run owns the work. A job that has not ended is resumed by the next queue over the same state directory;
//! what it does there is a function of the job's state, see the table in the crate's documentation.

mod context;
mod deferred;
mod ending;
mod job;
mod job_id;
mod lease;
mod limits;
pub mod moves;
mod multipart;
mod orphans;
mod progress;
mod queue;
mod queue_settings;
mod request;
mod retry;
mod reuse;
mod run;
pub(crate) mod sealed;
pub mod sidecars;
pub mod stage;
mod staged;
mod state_dir;
mod status;
mod table;

pub use job::Job;
pub use job_id::JobId;
pub use multipart::early::EarlyUpload;
pub use queue::JobQueue;
pub use queue_settings::QueueSettings;
pub use request::{JobRequest, JobSource, RecordedFile};
pub use retry::Retries;
pub use staged::{StagedFile, staged_file};
pub use state_dir::{DamagedRecord, Journal, Loaded, Publishing, Record, StateDir};
pub use status::{JobState, Status, StatusError, StatusImage};
#[doc(hidden)]
pub use {lease::fuzz_lease, moves::fuzz_moves, multipart::intents::fuzz_intent, multipart::log::fuzz_log};
