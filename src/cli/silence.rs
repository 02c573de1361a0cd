//! Hosts that are not heard from: a status that has not been renewed for longer than it holds.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::export::Status;

/// How far the clocks of two hosts may differ before an old status is taken for that of a silent host at first sight.
const SKEW: Duration = Duration::from_secs(300);

/// When the host of an unfinished job was last heard from, if that is longer ago than its status holds, by this host's
/// clock.
pub(super) fn silent_since(status: &Status) -> Option<Timestamp> {
    overdue(status, Timestamp::now()).map(|(updated, _)| updated)
}

/// What to tell of a silent host.
pub(super) fn sentence(status: &Status, since: Timestamp) -> String {
    format!(
        "not heard from since {since}: the host {:?} has ended, is cut off or sleeps; the export is resumed when it mounts again",
        status.host
    )
}

/// When an unfinished status was written, and for how long it has not held any more.
fn overdue(status: &Status, now: Timestamp) -> Option<(Timestamp, Duration)> {
    let (updated, valid) = (status.updated?, Duration::from_secs(status.valid_seconds?));
    let age = Duration::try_from(now.duration_since(updated)).ok()?;
    let is_overdue = !status.status.is_final() && age > valid;
    is_overdue.then(|| (updated, age - valid))
}

/// Looks at a status again and again, and finds out whether its host is silent. Clocks of hosts differ: unless the status
/// is much too old, the host is given the time for which a status holds, by this host's clock, to renew it.
#[derive(Debug, Default)]
pub(super) struct Watch {
    seen: Option<(Option<Timestamp>, Instant)>,
}

impl Watch {
    /// Since when the host is silent, now that it shows this status.
    pub(super) fn look(&mut self, status: &Status) -> Option<Timestamp> {
        self.look_at(status, Timestamp::now(), Instant::now())
    }

    fn look_at(&mut self, status: &Status, now: Timestamp, at: Instant) -> Option<Timestamp> {
        let first = match self.seen {
            Some((updated, first)) if updated == status.updated => first,
            _ => {
                self.seen = Some((status.updated, at));
                at
            }
        };
        let (updated, late) = overdue(status, now)?;
        let valid = Duration::from_secs(status.valid_seconds?);
        (late > SKEW || at.duration_since(first) > valid).then_some(updated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(updated: Option<&str>) -> Status {
        let json = serde_json::json!({
            "version": 1, "job_id": "j", "status": "RUNNING", "progress": 1, "image": null, "bucket": "b", "key": "k",
            "url": "u", "size": null, "bytes_done": 0, "bytes_uploaded": 0, "begin_time": "2026-01-01T00:00:00Z",
            "end_time": null, "eta_seconds": null, "md5": null, "sha256": null, "etag": null, "client_token": null,
            "host": "h", "attempt": 1, "error": null, "updated": updated, "valid_seconds": updated.map(|_| 60),
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_host_is_silent_when_its_status_is_not_renewed_in_time() {
        let now = |text: &str| text.parse::<Timestamp>().unwrap();
        let running = status(Some("2026-01-01T00:00:00Z"));
        let begin = Instant::now();
        let mut watch = Watch::default();
        // In time, and late by what may be the clocks' difference.
        assert_eq!(watch.look_at(&running, now("2026-01-01T00:00:59Z"), begin), None);
        let at = now("2026-01-01T00:02:00Z");
        assert_eq!(overdue(&running, at), Some((now("2026-01-01T00:00:00Z"), Duration::from_secs(60))));
        assert_eq!(watch.look_at(&running, at, begin + Duration::from_secs(59)), None);
        let renewed = status(Some("2026-01-01T00:00:20Z"));
        assert_eq!(watch.look_at(&renewed, at, begin + Duration::from_secs(61)), None);
        assert_eq!(watch.look_at(&renewed, at, begin + Duration::from_secs(122)), renewed.updated);
        // Much too late, at first sight.
        let late = Watch::default().look_at(&running, now("2026-01-01T01:00:00Z"), begin);
        assert_eq!(late, running.updated);
        // One that has ended, or comes from a daemon that did not say, is never silent.
        let ended = Status { status: crate::export::JobState::Fail, ..running };
        for status in [ended, status(None)] {
            assert_eq!(Watch::default().look_at(&status, now("2027-01-01T00:00:00Z"), begin), None);
        }
    }
}
