//! Leases: which of several hosts makes an object, agreed upon in the bucket itself.
//!
//! Below `.freightfs/leases/HASH/`, HASH being that of the key, stands one object for each epoch, created by a put that
//! fails when it is there: who creates epoch n + 1 is the holder. Beside it the holder puts its heartbeat every third of
//! the lease, with the log of its upload. A host that sees no heartbeat for one lease period, by its own clock, creates
//! the next epoch and resumes that upload; the epoch is the fencing token. Only the holder of the newest epoch completes; a holder that
//! was asleep finds that it is not any more.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use super::job_id::JobId;
use super::sidecars::{Beside, Sidecar, look};
use super::status::{Status, StatusImage};
use crate::bucket::{Bucket, ObjectKey, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};

/// Beats in the time of a lease.
const BEATS: u32 = 3;

/// Looks of a follower in the time of a lease.
const LOOKS: u32 = 5;

/// The directory of all leases among our own files.
const LEASES: &str = "leases";

/// The last epoch that ten digits can say.
const LAST_EPOCH: u64 = 9_999_999_999;

/// Largest claim or heartbeat that is read: one has the log of an upload.
const MAX_DOCUMENT: u64 = 96 << 20;

/// Epochs that are looked at, or removed, before the newest.
const EPOCHS_KEPT: usize = 8;

/// Who wants to make an object, and what it is; of an epoch, its holder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Claim {
    pub(super) host: String,
    pub(super) job_id: JobId,
    /// The image; `None` for what a program wrote, which is like nothing else.
    pub(super) image: Option<StatusImage>,
}

/// A sign of life.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Beat {
    number: u64,
    /// Whether the job has ended, however.
    ended: bool,
    /// The log of the upload under way.
    upload: Option<String>,
    /// How it ended, for keys that have no status beside them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<Box<Status>>,
}

/// The right to make an object.
pub(super) struct Lease {
    bucket: Bucket,
    /// The name below our own files of the key's leases.
    directory: String,
    epoch: u64,
    lease: Duration,
}

/// How a job that several hosts may have begins.
pub(super) enum Claimed {
    /// This host makes the object.
    Held(Held),
    /// Another host has made it, or has failed.
    Done(Box<Status>),
}

/// The right to make an object, and what the holder before left.
pub(super) struct Held {
    pub(super) lease: Lease,
    /// What it had under way, when it was silent.
    pub(super) inherited: Option<Inherited>,
    /// The entity tag of the object that it made, when it had ended.
    pub(super) made: Option<String>,
}

/// What a silent holder left.
pub(super) struct Inherited {
    /// The log of its upload.
    pub(super) upload: String,
    /// Whether it made the same, so that the upload can be gone on with.
    pub(super) is_same: bool,
}

/// Gets the right for `own` to make the object, or waits until another host has made the same; `follow` is called when
/// that wait begins.
///
/// # Errors
/// [`Busy`](ErrorKind::Busy) while another host makes something else of the key.
pub(super) async fn claim(
    bucket: &Bucket,
    key: &ObjectKey,
    own: &Claim,
    lease: Duration,
    follow: impl Fn(),
) -> Result<Claimed> {
    let mut follows = false;
    let directory = directory_of(key);
    let held = |epoch, inherited, made| {
        let lease = Lease { bucket: bucket.clone(), directory: directory.clone(), epoch, lease };
        Claimed::Held(Held { lease, inherited, made })
    };
    let mut seen: Option<(u64, Beat, Instant)> = None;
    loop {
        let (epoch, claim, beat) = match newest_of(bucket, &directory).await {
            // The holder's beats do not arrive either: its silence counts from when the store answers again.
            Err(error) if follows && error.is_transient() => {
                seen = None;
                tokio::time::sleep(lease / LOOKS).await;
                continue;
            }
            found => found?,
        };
        let Some(claim) = claim.filter(|_| !beat.ended) else {
            let before = ended_before(bucket, key, beat.status).await?;
            let is_done = match &before {
                Some(status) => is_done_by(bucket, key, own, status, follows).await?,
                None => false,
            };
            if let Some(status) = before.as_ref().filter(|_| is_done) {
                return Ok(Claimed::Done(Box::new(status.clone())));
            }
            let next = after(epoch)?;
            if create(bucket, &directory, next, own).await? {
                return Ok(held(next, None, before.and_then(|status| status.etag)));
            }
            // Another host was faster.
            tokio::time::sleep(lease / LOOKS).await;
            continue;
        };
        if claim.job_id == own.job_id {
            return Ok(held(epoch, None, None));
        }
        let is_same = is_same(claim.image.as_ref(), own.image.as_ref());
        let (is_alive, since) = match &seen {
            Some((known, last, since)) if (known, last) == (&epoch, &beat) => (false, *since),
            Some((known, ..)) => (*known == epoch, Instant::now()),
            None => (false, Instant::now()),
        };
        if since.elapsed() > lease && create(bucket, &directory, after(epoch)?, own).await? {
            info!(job = %own.job_id, host = claim.host, "taking over the job of a host that is silent");
            let inherited = beat.upload.map(|upload| Inherited { upload, is_same });
            return Ok(held(after(epoch)?, inherited, None));
        }
        if is_alive && !is_same {
            let what = format!("host {} is making something else of this key", claim.host);
            return Err(Error::new(ErrorKind::Busy, what).in_file(bucket.url_of(key)));
        }
        seen = Some((epoch, beat, since));
        follows = true;
        follow();
        tokio::time::sleep(lease / LOOKS).await;
    }
}

impl Lease {
    /// Shows that this host is alive, until it is dropped; `upload` gives the log of the upload under way.
    pub(super) async fn keep<F: Future<Output = Option<String>>>(&self, upload: impl Fn() -> F) {
        let mut beat = Beat::default();
        loop {
            beat.number += 1;
            beat.upload = upload().await;
            if let Err(error) = self.put(&beat).await {
                warn!("a lease could not be renewed: {}", error.report());
            }
            tokio::time::sleep(self.lease / BEATS).await;
        }
    }

    /// Whether no other host has taken the job over.
    pub(super) async fn is_newest(&self) -> Result<bool> {
        Ok(newest(&self.bucket, &self.directory).await? == self.epoch)
    }

    /// Whether another host has taken the job over and goes on with its upload, or may be about to.
    pub(super) async fn is_inherited(&self, upload: &str) -> Result<bool> {
        let epoch = newest(&self.bucket, &self.directory).await?;
        if epoch == self.epoch {
            return Ok(false);
        }
        let beat: Option<Beat> = read(&self.bucket, &beat_name(&self.directory, epoch)).await?;
        let goes_on = |beat: Beat| !beat.ended && beat.upload.is_some_and(|log| log.contains(upload));
        Ok(beat.is_none_or(goes_on))
    }

    /// The job has ended, and its status is in the bucket, or is given here: who follows reads that. Older epochs are of
    /// no use.
    pub(super) async fn end(&self, status: Option<Status>) {
        let beat = Beat { number: u64::MAX, ended: true, upload: None, status: status.map(Box::new) };
        let _ = failpoint::pass(Step::LeaseEnd);
        if let Err(error) = self.put(&beat).await {
            warn!("the end of a lease could not be told: {}", error.report());
        }
        for epoch in (1..self.epoch).rev().take(EPOCHS_KEPT) {
            let _ = self.bucket.delete_control(&beat_name(&self.directory, epoch)).await;
            let _ = self.bucket.delete_control(&epoch_name(&self.directory, epoch)).await;
        }
    }

    async fn put(&self, beat: &Beat) -> Result<()> {
        let json = serde_json::to_vec(beat).expect("a beat has only string keys");
        let name = beat_name(&self.directory, self.epoch);
        self.bucket.put_control(&name, Bytes::from(json), &Replaces::Anything).await.map(drop)
    }
}

/// How the export ended that had the key before: `told` by its holder where no status beside the key says it.
async fn ended_before(bucket: &Bucket, key: &ObjectKey, told: Option<Box<Status>>) -> Result<Option<Status>> {
    let status = match told {
        Some(status) => Some(*status).filter(Status::is_possible),
        None => match look(bucket, key, Sidecar::Status).await? {
            Beside::Ours { bytes, .. } => Status::parse(&bytes).ok(),
            _ => None,
        },
    };
    Ok(status.filter(|status| status.status.is_final()))
}

/// Whether an export that has ended did what `own` is to do, and the object is still that.
async fn is_done_by(
    bucket: &Bucket,
    key: &ObjectKey,
    own: &Claim,
    ended: &Status,
    follows: bool,
) -> Result<bool> {
    if !is_same(ended.image.as_ref(), own.image.as_ref()) {
        return Ok(false);
    }
    if ended.error.is_some() {
        // A failure that was followed is the follower's too; one from before it was asked is not.
        return Ok(follows);
    }
    let object = bucket.head(key).await?;
    Ok(object.is_some_and(|meta| ended.etag.is_some() && meta.etag == ended.etag))
}

/// Whether two hosts mean the same bytes. What a program wrote is like nothing else.
fn is_same(a: Option<&StatusImage>, b: Option<&StatusImage>) -> bool {
    a.zip(b).is_some_and(|(a, b)| a.is_same_elsewhere(b))
}

/// The lease that an earlier process of this host has held for its job, if nobody has taken it over.
pub(super) async fn held_by(
    bucket: &Bucket,
    key: &ObjectKey,
    job_id: &str,
    lease: Duration,
) -> Result<Option<Lease>> {
    let directory = directory_of(key);
    let epoch = newest(bucket, &directory).await?;
    let claim: Option<Claim> = read(bucket, &epoch_name(&directory, epoch)).await?;
    let is_own = claim.is_some_and(|claim| *claim.job_id == *job_id);
    Ok(is_own.then(|| Lease { bucket: bucket.clone(), directory, epoch, lease }))
}

/// Whether another host has taken over what `job_id` made of a key and goes on with its upload, as far as is known without
/// holding the lease.
///
/// # Errors
/// Also while the holder of the newest epoch has not shown yet what it does.
pub(super) async fn is_inherited_from(
    bucket: &Bucket,
    key: &ObjectKey,
    job_id: &str,
    upload: &str,
) -> Result<bool> {
    let (_, claim, beat) = newest_of(bucket, &directory_of(key)).await?;
    let Some(claim) = claim.filter(|claim| *claim.job_id != *job_id && !beat.ended) else { return Ok(false) };
    if beat == Beat::default() {
        let what = format!("host {} has just begun to make this object", claim.host);
        return Err(Error::new(ErrorKind::Busy, what).transient());
    }
    Ok(beat.upload.is_some_and(|log| log.contains(upload)))
}

/// The logs of the uploads that hosts which share the bucket have under way for a key, as far as their newest heartbeats tell.
pub(super) async fn uploads_of(bucket: &Bucket, key: &ObjectKey) -> Result<Vec<String>> {
    uploads_in(bucket, &directory_of(key)).await
}

/// The same for all keys of a bucket.
pub(super) async fn all_uploads(bucket: &Bucket) -> Result<Vec<String>> {
    let mut logs = Vec::new();
    for name in bucket.list_control(LEASES).await? {
        logs.extend(uploads_in(bucket, &format!("{LEASES}/{name}")).await?);
    }
    Ok(logs)
}

async fn uploads_in(bucket: &Bucket, directory: &str) -> Result<Vec<String>> {
    let mut epochs = epochs(bucket, directory).await?;
    epochs.sort_unstable_by(|a, b| b.cmp(a));
    let mut logs = Vec::new();
    for epoch in epochs.into_iter().take(EPOCHS_KEPT) {
        let beat: Option<Beat> = read(bucket, &beat_name(directory, epoch)).await?;
        logs.extend(beat.and_then(|beat| beat.upload));
    }
    Ok(logs)
}

/// The name below our own files of a key's leases.
fn directory_of(key: &ObjectKey) -> String {
    format!("{LEASES}/{}", &hex::encode(Sha256::digest(key.as_str().as_bytes()))[..32])
}

/// The next epoch.
fn after(epoch: u64) -> Result<u64> {
    if epoch >= LAST_EPOCH {
        let what = format!("the key's leases in the bucket end with {epoch}");
        return Err(Error::new(ErrorKind::Malformed, what));
    }
    Ok(epoch + 1)
}

fn epoch_name(directory: &str, epoch: u64) -> String {
    format!("{directory}/{epoch:010}")
}

fn beat_name(directory: &str, epoch: u64) -> String {
    format!("{directory}/{epoch:010}.beat")
}

/// The newest epoch, its holder and that one's last sign of life.
async fn newest_of(bucket: &Bucket, directory: &str) -> Result<(u64, Option<Claim>, Beat)> {
    let epoch = newest(bucket, directory).await?;
    let claim = read(bucket, &epoch_name(directory, epoch)).await?;
    let beat: Option<Beat> = read(bucket, &beat_name(directory, epoch)).await?;
    Ok((epoch, claim, beat.unwrap_or_default()))
}

/// The newest epoch, 0 when there is none.
async fn newest(bucket: &Bucket, directory: &str) -> Result<u64> {
    Ok(epochs(bucket, directory).await?.into_iter().max().unwrap_or(0))
}

async fn epochs(bucket: &Bucket, directory: &str) -> Result<Vec<u64>> {
    let names = bucket.list_control(directory).await?;
    // Names in the bucket are anybody's.
    let is_epoch = |name: &&String| name.len() == 10 && name.bytes().all(|byte| byte.is_ascii_digit());
    Ok(names.iter().filter(is_epoch).filter_map(|name| name.parse().ok()).collect())
}

async fn create(bucket: &Bucket, directory: &str, epoch: u64, own: &Claim) -> Result<bool> {
    let json = serde_json::to_vec(own).expect("a claim has only string keys");
    failpoint::pass(Step::LeaseClaim)?;
    bucket.create_control(&epoch_name(directory, epoch), Bytes::from(json)).await
}

async fn read<T: serde::de::DeserializeOwned>(bucket: &Bucket, name: &str) -> Result<Option<T>> {
    match bucket.read_control_within(name, MAX_DOCUMENT).await {
        Ok(Some(file)) => {
            let document = serde_json::from_slice(&file.bytes);
            Ok(document.inspect_err(|e| warn!("{name} in {} is damaged: {e}", bucket.url())).ok())
        }
        Ok(None) => Ok(None),
        // Not one of ours.
        Err(error) if error.kind() == ErrorKind::TooLarge => {
            warn!("{}", error.report());
            Ok(None)
        }
        // It was replaced between two requests: the next look tells.
        Err(error) if matches!(error.kind(), ErrorKind::SourceChanged | ErrorKind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// For the fuzz targets: reads claims and heartbeats, as those that they are written as again. Returns whether it is one.
pub fn fuzz_lease(bytes: &[u8]) -> bool {
    let (claim, beat) = (serde_json::from_slice::<Claim>(bytes), serde_json::from_slice::<Beat>(bytes));
    let is_one = claim.is_ok() || beat.is_ok();
    if let Ok(claim) = claim {
        let text = serde_json::to_vec(&claim).unwrap_or_default();
        let again = serde_json::from_slice::<Claim>(&text).map(|claim| serde_json::to_vec(&claim));
        assert_eq!(again.ok().and_then(|text| text.ok()), Some(text));
    }
    if let Ok(beat) = beat {
        let text = serde_json::to_vec(&beat).unwrap_or_default();
        assert_eq!(serde_json::from_slice::<Beat>(&text).ok(), Some(beat));
    }
    is_one
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);

    fn claim_of(job_id: &str) -> Claim {
        Claim { host: "h".to_owned(), job_id: JobId::parse(job_id).unwrap(), image: None }
    }

    async fn held(bucket: &Bucket, key: &ObjectKey, job_id: &str) -> Lease {
        match claim(bucket, key, &claim_of(job_id), LEASE, || {}).await.unwrap() {
            Claimed::Held(held) => held.lease,
            Claimed::Done(status) => panic!("{status:?}"),
        }
    }

    #[tokio::test]
    async fn an_upload_is_given_up_unless_the_holder_after_us_goes_on_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let bucket = Bucket::open("b", &format!("file://{}", directory.path().display())).unwrap();
        let key = ObjectKey::parse("k").unwrap();
        let first = held(&bucket, &key, "first").await;
        assert!(!first.is_inherited("upload").await.unwrap());
        assert!(create(&bucket, &first.directory, 2, &claim_of("second")).await.unwrap());
        assert!(first.is_inherited("upload").await.unwrap(), "the next holder may be about to go on with it");
        let second = held_by(&bucket, &key, "second", LEASE).await.unwrap().unwrap();
        assert!(held_by(&bucket, &key, "first", LEASE).await.unwrap().is_none(), "it was taken over");
        let mut beat = Beat { upload: Some("the log of upload".to_owned()), ..Beat::default() };
        second.put(&beat).await.unwrap();
        assert!(first.is_inherited("upload").await.unwrap());
        assert!(!first.is_inherited("another").await.unwrap());
        beat.ended = true;
        second.put(&beat).await.unwrap();
        assert!(!first.is_inherited("upload").await.unwrap());
    }

    #[tokio::test]
    async fn the_last_of_all_epochs_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let bucket = Bucket::open("b", &format!("file://{}", directory.path().display())).unwrap();
        let key = ObjectKey::parse("k").unwrap();
        let directory = directory_of(&key);
        let put = async |epoch: u64| {
            let name = epoch_name(&directory, epoch);
            bucket.put_control(&name, Bytes::from_static(b"{}"), &Replaces::Nothing).await.unwrap();
        };
        for not_ours in [u64::MAX, LAST_EPOCH + 1] {
            put(not_ours).await;
        }
        assert_eq!(newest(&bucket, &directory).await.unwrap(), 0);
        put(LAST_EPOCH).await;
        let claimed = claim(&bucket, &key, &claim_of("job"), LEASE, || {}).await;
        assert_eq!(claimed.err().unwrap().kind(), ErrorKind::Malformed);
    }
}
