//! Ids of jobs.

use std::fmt;
use std::ops::Deref;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::bucket::random;
use crate::error::{Error, ErrorKind, Result};

/// Longest id of a job that is taken; ours have 29 bytes.
const MAX_JOB_ID: usize = 64;

/// The last time that an id's twelve digits can say.
const LAST_TIME: u64 = (1 << 48) - 1;

/// A job's id: 1 to 64 ASCII letters, digits and hyphens, so that it can be part of a file's name. What a status in a
/// bucket or a record says is checked when it is read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// An id that sorts by time and is unique over hosts: milliseconds since 1970 and 64 random bits, hexadecimal.
    pub(super) fn new() -> Self {
        Self::after(None)
    }

    /// One that sorts after another too, whatever the clock says.
    pub(super) fn after(last: Option<&str>) -> Self {
        let now = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
        let last = last.and_then(|id| u64::from_str_radix(id.split_once('-')?.0, 16).ok());
        let time = last.map_or(now, |last| now.max(last.saturating_add(1))).min(LAST_TIME);
        Self(format!("{time:012x}-{:016x}", random()))
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

    #[test]
    fn ids_sort_after_those_that_were_given_before_the_clock_was_set_back() {
        for last in ["0fffffffffff-ffffffffffffffff", "000000000000-0", "no id", "-", "x-1"] {
            let next = JobId::after(Some(last));
            assert!(next.len() == 29 && *next > *last || last.starts_with(['n', 'x']), "{last} {next}");
        }
        // A damaged one does not make ids longer.
        assert_eq!(JobId::after(Some("ffffffffffffffff-0")).len(), 29);
    }
}
