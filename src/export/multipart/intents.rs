//! Uploads that are about to be started: each is recorded before the store is asked, so that one whose id is never heard,
//! because the process dies or the connection is cut, can be found and given up.
//!
//! S3 lists the uploads under way of a key, and nothing that we say when we start one is in that list. So the intent says
//! which uploads of the key there are already and what time it is, both by the store. What was started within the time that
//! a request can take after that, by the same identity, may be the lost one. It is looked for when that time is long over:
//! whoever else has started it has sent a part by then, and the lost one never has any.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bucket::{ObjectKey, PendingUpload, PendingUploads, START_LIMIT, random};
use crate::error::{Error, ErrorKind, Result};
use crate::export::sealed::{sealed, unsealed};
use crate::failpoint::{self, Step};
use crate::whole_file;

/// How the names of intents end.
pub(super) const SUFFIX: &str = "intent";

/// Largest intent that is read: 1000 ids of 1 KiB, escaped, take less.
const MAX_SIZE: u64 = 8 << 20;

/// How far the clocks of a store's own machines may be apart.
const SKEW: Duration = Duration::from_secs(60);

/// How long after it was recorded an upload is looked for. Builds with debug assertions take the seconds of
/// `FREIGHTFS_SETTLE` instead, so that tests need not wait.
const SETTLE: Duration = Duration::from_secs(900);

/// How long it is kept that an upload is to be looked for which cannot be.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

fn settle_time() -> Duration {
    let wanted = || std::env::var("FREIGHTFS_SETTLE").ok()?.parse().ok();
    cfg!(debug_assertions).then(wanted).flatten().map_or(SETTLE, Duration::from_secs)
}

/// An upload that is about to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::export) struct Intent {
    /// The bucket's name in the mount.
    pub(in crate::export) bucket: String,
    #[serde(deserialize_with = "ObjectKey::deserialize_any")]
    pub(in crate::export) key: ObjectKey,
    /// When it was recorded, by the store's clock.
    pub(in crate::export) at: Timestamp,
    /// The same by the clock of this host.
    pub(in crate::export) recorded: Timestamp,
    /// The uploads of the key that there were before.
    pub(in crate::export) known: Vec<String>,
    /// Who the store says has started our uploads.
    pub(in crate::export) initiator: Option<String>,
}

/// An intent in the state directory.
#[derive(Debug)]
pub(in crate::export) struct RecordedIntent {
    pub(in crate::export) intent: Intent,
    path: PathBuf,
    /// The uploads that were found at the first look, and when that was, by the clock that nobody sets.
    found: Mutex<Option<(Instant, Vec<String>)>>,
}

impl Intent {
    /// What is to be recorded before an upload of a key is started whose others are these.
    pub(super) fn new(
        bucket: &str,
        key: &ObjectKey,
        pending: PendingUploads,
        initiator: Option<String>,
    ) -> Self {
        let known = pending.uploads.into_iter().map(|upload| upload.id).collect();
        let recorded = Timestamp::now();
        Self { bucket: bucket.to_owned(), key: key.clone(), at: pending.at, recorded, known, initiator }
    }

    /// How long it is too early to look for the upload, when the store's clock says `now`. One clock may have been set.
    pub(in crate::export) fn early_by(&self, now: Timestamp) -> Option<Duration> {
        let passed = now.duration_since(self.at).min(Timestamp::now().duration_since(self.recorded));
        let left = signed(settle_time()).saturating_sub(passed);
        Duration::try_from(left).ok().filter(|left| !left.is_zero())
    }

    /// Whether it is so old that nobody looks for its upload any more: its bucket is not mounted here, or cannot be asked.
    pub(super) fn is_forgotten(&self) -> bool {
        Timestamp::now().duration_since(self.recorded) > signed(FORGOTTEN)
    }

    /// Whether an upload of the key may be the one that was to be started.
    pub(in crate::export) fn may_be(&self, upload: &PendingUpload) -> bool {
        let Some(after) = upload.initiated.map(|initiated| initiated.duration_since(self.at)) else {
            return false;
        };
        (signed(SKEW) * -1..=signed(START_LIMIT + SKEW)).contains(&after)
            && !self.known.contains(&upload.id)
            && self.initiator == upload.initiator
    }

    /// Records it under a new name that begins like this; durable when this returns.
    pub(super) fn record(self, directory: &Path, name: &str) -> Result<RecordedIntent> {
        let path = directory.join(format!("{name}-{:016x}.{SUFFIX}", random()));
        let place = path.display().to_string();
        let failed = |e| Error::from_io("cannot record that an upload begins", e).in_file(&place);
        failpoint::pass(Step::UploadIntent)?;
        let text = sealed(&self).map_err(std::io::Error::other).map_err(failed)?;
        let written = File::create_new(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            File::open(directory)?.sync_all()
        });
        let recorded = RecordedIntent { intent: self, path, found: Mutex::default() };
        if let Err(error) = written {
            recorded.remove();
            return Err(failed(error));
        }
        Ok(recorded)
    }
}

impl RecordedIntent {
    /// Reads what an earlier process recorded.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) for what is none: what a crash cut off was followed by no request.
    pub(super) fn read(path: PathBuf) -> Result<Self> {
        let place = path.display().to_string();
        let damaged =
            || Error::new(ErrorKind::Malformed, "it does not say which upload began").in_file(&place);
        let text = whole_file::read(&path, MAX_SIZE);
        let text = text.map_err(|e| if whole_file::is_unfit(&e) { damaged().because(e) } else { e })?;
        let intent = unsealed(&text).ok_or_else(damaged)?;
        Ok(Self { intent, path, found: Mutex::default() })
    }

    /// How long it is too early to take these uploads for lost ones, or those of them that are. Where the store names who has
    /// started an upload, one look is enough. Elsewhere they may be another program's, which waits before it sends its first
    /// part: they have to be without one at two looks.
    pub(in crate::export) fn lost(
        &self,
        candidates: Vec<String>,
    ) -> std::result::Result<Vec<String>, Duration> {
        if self.intent.initiator.is_some() || candidates.is_empty() {
            return Ok(candidates);
        }
        let mut found = self.found.lock();
        let (at, before) = found.get_or_insert_with(|| (Instant::now(), candidates.clone()));
        match settle_time().saturating_sub(at.elapsed()) {
            Duration::ZERO => Ok(candidates.into_iter().filter(|id| before.contains(id)).collect()),
            early => Err(early),
        }
    }

    /// There is nothing to be looked for any more. One that stays is looked for once more, by the next mount.
    pub(in crate::export) fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// For the fuzz targets: reads an intent, as the one that it is written as again. Returns whether it is one.
pub fn fuzz_intent(bytes: &[u8]) -> bool {
    let intent = unsealed(bytes).or_else(|| serde_json::from_slice::<Intent>(bytes).ok());
    let again = intent.as_ref().and_then(|intent| unsealed::<Intent>(sealed(intent).ok()?.as_bytes()));
    assert_eq!(again, intent, "an intent is read as another one than it was written");
    intent.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(id: &str, initiated: &str, initiator: Option<&str>) -> PendingUpload {
        let initiated = format!("2026-11-24T{initiated}Z").parse().ok();
        PendingUpload { id: id.to_owned(), initiated, initiator: initiator.map(str::to_owned) }
    }

    fn intent(initiator: Option<&str>) -> Intent {
        let at = "2026-11-24T12:00:00Z".parse().unwrap();
        let before = PendingUploads { at, uploads: vec![pending("before", "11:59:59", initiator)] };
        Intent::new("b", &ObjectKey::parse("k").unwrap(), before, initiator.map(str::to_owned))
    }

    #[test]
    fn only_what_this_identity_started_in_the_time_of_the_request_may_be_the_lost_upload() {
        for initiator in [None, Some("me")] {
            let intent = intent(initiator);
            for (id, initiated, is_ours) in [
                ("new", "12:00:00", true),
                ("new", "11:59:01", true),
                ("new", "12:05:59", true),
                ("new", "11:58:59", false),
                ("new", "12:06:01", false),
                ("new", "never", false),
                ("before", "11:59:59", false),
                ("before", "12:00:01", false),
            ] {
                assert_eq!(intent.may_be(&pending(id, initiated, initiator)), is_ours, "{id} {initiated}");
            }
            assert!(!intent.may_be(&pending("new", "12:00:00", Some("somebody else"))));
        }
        assert!(!intent(Some("me")).may_be(&pending("new", "12:00:00", None)));
    }

    #[test]
    fn an_upload_is_looked_for_when_nobody_else_can_be_without_a_part() {
        assert!(SETTLE > START_LIMIT + SKEW * 2, "what is aborted is minutes old");
        let mut intent = intent(None);
        assert!(intent.early_by("2999-01-01T00:00:00Z".parse().unwrap()).is_some(), "by one clock only");
        intent.recorded = "2020-01-01T00:00:00Z".parse().unwrap();
        assert!(intent.is_forgotten());
        let early = |time: &str| intent.early_by(format!("2026-11-24T{time}Z").parse().unwrap());
        assert_eq!(early("12:14:00"), Some(Duration::from_secs(60)));
        assert_eq!((early("12:15:00"), early("23:00:00")), (None, None));
        // A clock that was set back.
        assert_eq!(early("11:00:00"), Some(Duration::from_secs(4500)));
    }

    #[test]
    fn where_nobody_says_who_started_an_upload_it_is_looked_at_twice() {
        let directory = tempfile::tempdir().unwrap();
        let ids = |ids: &[&str]| ids.iter().map(|&id| id.to_owned()).collect::<Vec<_>>();
        let known = intent(Some("me")).record(directory.path(), "x").unwrap();
        assert_eq!(known.lost(ids(&["1", "2"])), Ok(ids(&["1", "2"])));
        let unknown = intent(None).record(directory.path(), "x").unwrap();
        assert_eq!(unknown.lost(Vec::new()), Ok(Vec::new()));
        for _ in 0..2 {
            let early = unknown.lost(ids(&["1", "2"])).unwrap_err();
            assert!(!early.is_zero() && early <= SETTLE);
        }
        // Later one has a part, and another one has begun.
        unknown.found.lock().as_mut().unwrap().0 -= SETTLE;
        assert_eq!(unknown.lost(ids(&["2", "3"])), Ok(ids(&["2"])));
    }

    #[test]
    fn an_intent_is_read_as_it_was_written_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let recorded = intent(Some("me")).record(directory.path(), "x").unwrap();
        let text = fs::read(&recorded.path).unwrap();
        assert_eq!(RecordedIntent::read(recorded.path.clone()).unwrap().intent, recorded.intent);
        for at in 0..text.len() - 1 {
            let mut damaged = text.clone();
            damaged[at] ^= 0x55;
            fs::write(&recorded.path, &damaged).unwrap();
            assert!(RecordedIntent::read(recorded.path.clone()).is_err(), "damaged at {at}");
            fs::write(&recorded.path, &text[..at]).unwrap();
            assert!(RecordedIntent::read(recorded.path.clone()).is_err(), "cut off at {at}");
        }
        File::create(&recorded.path).unwrap().set_len(MAX_SIZE + 1).unwrap();
        assert_eq!(RecordedIntent::read(recorded.path.clone()).unwrap_err().kind(), ErrorKind::Malformed);
        recorded.remove();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
