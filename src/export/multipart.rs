//! Uploads in parts: how bytes get into a bucket in bounded memory, and what a later process needs to resume that.
//!
//! Knows buckets and virtual files, and nothing of jobs. Every upload has an intent before it
//! is started ([`intents`]) and a log after that ([`log`]); a [`transfer`] reads a file
//! part by part, hashes it on the way ([`digests`]), and makes the [`parts`] that the log does not have, of bytes that it
//! sends or that the store has ([`reused`]); [`place`] puts the object in
//! place, and finds it there when an earlier process did so. [`early`] sends a file while a program still writes it,
//! [`copy`] copies an object that is too large for one request.

pub(super) mod copy;
pub(super) mod digests;
pub(super) mod early;
mod held;
pub(super) mod intents;
pub(super) mod log;
pub(super) mod memory;
pub(super) mod parts;
pub(super) mod place;
pub(super) mod reused;
mod splices;
pub(super) mod transfer;
pub(super) mod uploads;
