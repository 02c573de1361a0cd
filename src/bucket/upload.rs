//! Uploads of a bucket: an object sent in parts, each of which is verified, and put together at the end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use md5::{Digest, Md5};
use tracing::warn;

use super::checksum::{Crc64, SentTags, composite_etag};
use super::client::Tries;
use super::object::SENDINGS;
use super::store::PutPart;
use super::{Bucket, ObjectKey, ObjectMeta, PendingUploads, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GIB, MIB, TIB};

/// How many times, and after which pause, a store is asked for what was just uploaded.
const VERIFY_TRIES: u32 = 3;
const VERIFY_PAUSE: Duration = Duration::from_millis(200);

/// How long the start of an upload may take, with all tries. None is started by a request that is older.
pub const START_LIMIT: Duration = Duration::from_secs(300);

/// Smallest part that is sent. Builds with debug assertions take the MiB of `FREIGHTFS_PART_SIZE` instead, so that tests
/// need no large objects.
pub(super) const PART_SIZE: u64 = 8 * MIB;

/// Most parts in an upload (S3 User Guide, "Amazon S3 multipart upload limits").
pub const MAX_PARTS: usize = 10_000;

/// Largest part (the same table).
const MAX_PART_SIZE: u64 = 5 * GIB;

/// Largest object that this many of these parts make.
const MAX_OBJECT_SIZE: u64 = 48 * TIB;

/// [`PART_SIZE`], or what a test wants instead.
fn smallest_part() -> u64 {
    let wanted = || std::env::var("FREIGHTFS_PART_SIZE").ok()?.parse::<u64>().ok();
    cfg!(debug_assertions).then(wanted).flatten().map_or(PART_SIZE, |part| part * MIB)
}

impl Bucket {
    /// Bytes of each part but the last for an object of `object_size` bytes: 8 MiB, or as much as keeps the
    /// object within 10 000 parts.
    pub fn part_size_for(&self, object_size: u64) -> Result<u64> {
        if object_size > MAX_OBJECT_SIZE {
            let what =
                format!("an object has at most {MAX_OBJECT_SIZE} bytes, this one would have {object_size}");
            return Err(Error::new(ErrorKind::TooLarge, what).in_file(self.url()));
        }
        let part_size = object_size.div_ceil(MAX_PARTS as u64).max(smallest_part()).next_multiple_of(MIB);
        debug_assert!(part_size <= MAX_PART_SIZE);
        Ok(part_size)
    }

    /// Starts the upload of an object with these tags. Its id is good for later processes too.
    pub async fn start_upload(&self, key: &ObjectKey, part_size: u64, tags: &Tags) -> Result<String> {
        self.start_upload_once(key, part_size, tags, START_LIMIT).await.0
    }

    /// The same; says too whether the store may have started another one of which we do not know, because an answer of it
    /// was lost. Gives up after `limit`.
    pub async fn start_upload_once(
        &self,
        key: &ObjectKey,
        part_size: u64,
        tags: &Tags,
        limit: Duration,
    ) -> (Result<String>, bool) {
        if let Err(error) = self.check_writable() {
            return (Err(error), false);
        }
        let (checksum, tries) = (self.abilities().checks_parts, Tries::default());
        let started = self.store().start_upload(key, part_size, tags, checksum, &tries);
        let late = |_| Err(Error::new(ErrorKind::TimedOut, "the store starts no upload").transient());
        let started = tokio::time::timeout(limit, started).await.unwrap_or_else(late);
        let is_answered = started.as_ref().map_or_else(|error| !error.is_transient(), |_| true);
        let answered = u32::from(is_answered);
        (started.map_err(|e| self.named(e, key)), tries.0.load(Ordering::SeqCst) > answered)
    }

    /// The uploads under way of exactly this key; `None` where the store does not list them.
    pub async fn pending_uploads(&self, key: &ObjectKey) -> Result<Option<PendingUploads>> {
        if !self.abilities().lists_uploads {
            return Ok(None);
        }
        match self.store().pending_uploads(key).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
            listed => listed.map(Some).map_err(|e| self.named(e, key)),
        }
    }

    /// Whether a part of an upload has arrived, where the store lists uploads.
    pub async fn has_part(&self, key: &ObjectKey, upload: &str) -> Result<bool> {
        self.store().has_part(key, upload).await.map_err(|e| self.named(e, key))
    }

    /// When this machine was started, where a part that was written may be in its memory only.
    pub fn boot(&self) -> Option<String> {
        (!self.abilities().is_remote).then(super::local::boot)
    }

    /// Who the store says has started our uploads, where it says that.
    pub fn initiator(&self) -> Option<String> {
        self.abilities().initiator
    }

    /// Sends part `index`, counted from 0, which stands at `offset` in the object; returns the id by which it is put together.
    /// Parts may differ in length. What the store has got is what was sent, or the part is sent again.
    ///
    /// # Errors
    /// [`Damaged`](ErrorKind::Damaged) when it arrives damaged each time.
    pub async fn put_part(
        &self,
        key: &ObjectKey,
        upload: &str,
        index: usize,
        offset: u64,
        bytes: Bytes,
    ) -> Result<String> {
        self.check_writable()?;
        self.throttle(bytes.len()).await;
        let abilities = self.abilities();
        let checksum = abilities.checks_parts.map(|checksum| (checksum, checksum.of(&bytes)));
        let mut expected = match checksum {
            None if abilities.has_md5_etags => Some(md5_of(&bytes).await?),
            _ => None,
        };
        let mut part = PutPart { index, offset, bytes, checksum };
        let mut sending = 0;
        loop {
            sending += 1;
            let error = match self.store().put_part(key, upload, part.clone()).await {
                Ok(id) if expected.as_deref().is_none_or(|expected| id.trim_matches('"') == expected) => {
                    return Ok(id);
                }
                Ok(id) => {
                    let what = format!("part {}: the store has received something else, {id}", index + 1);
                    Error::new(ErrorKind::Damaged, what).transient()
                }
                // The upload was begun by a version that told the store of no checksum.
                Err(error) if is_final(&error) && part.checksum.is_some() && abilities.has_md5_etags => {
                    (part.checksum, expected) = (None, Some(md5_of(&part.bytes).await?));
                    continue;
                }
                Err(error) => error,
            };
            if error.kind() != ErrorKind::Damaged || sending >= SENDINGS {
                return Err(self.named(error, key));
            }
            warn!("a part of {key} is sent again: {}", error.report());
        }
    }

    /// What the entity tag of the object begins with that these parts, `size` bytes together, will make, where that is
    /// known before.
    pub async fn expected_etag_prefix(
        &self,
        upload: &str,
        parts: &[String],
        size: u64,
    ) -> Result<Option<String>> {
        self.store().expected_etag_prefix(upload, parts, size).await
    }

    /// Makes the object out of its parts, and asks the store whether it is what was sent. A store that can do that compares the
    /// CRC-64/NVME of all of it first.
    ///
    /// # Errors
    /// [`Damaged`](ErrorKind::Damaged) when its parts do not make what has that checksum.
    /// [`Conflict`](ErrorKind::Conflict) when there is something else than what is to be replaced. The upload is still
    /// there then.
    pub async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        parts: Vec<String>,
        object_size: u64,
        replaces: &Replaces,
        crc64: Option<u64>,
    ) -> Result<ObjectMeta> {
        self.check_writable()?;
        let abilities = self.abilities();
        let crc64 = crc64.filter(|_| abilities.checks_objects);
        let etag = composite_etag(&parts).filter(|_| abilities.has_md5_etags);
        let completed = async {
            let replaces = self.looked_for(key, replaces, abilities.conditions.completions).await?;
            let complete = async |crc64| {
                let parts = parts.clone();
                self.store().complete_upload(key, upload, parts, object_size, &replaces, crc64).await
            };
            match complete(crc64).await {
                // The upload was begun by a version that told the store of no checksum.
                Err(error) if crc64.is_some() && is_final(&error) => complete(None).await,
                completed => completed,
            }
        };
        match completed.await {
            Ok(returned) => {
                let tags = SentTags { sent: etag, returned: returned.filter(|_| abilities.returns_tags) };
                self.verify(key, object_size, &tags).await
            }
            Err(error) => {
                // The answer to an earlier try of the same completion may have been lost.
                if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NotFound)
                    && let Some(etag) = etag
                    && let Ok(Some(meta)) = self.head(key).await
                    && (meta.object_size, meta.etag.as_ref()) == (object_size, Some(&etag))
                {
                    return Ok(meta);
                }
                Err(self.named(error, key))
            }
        }
    }

    /// Whether an object of so many bytes that is sent at once is to be sent by an upload of one part all the same: a store
    /// that does not look at what arrives tells by a part's tag, before there is an object.
    pub fn puts_by_upload(&self, object_size: u64) -> bool {
        let abilities = self.abilities();
        abilities.is_remote
            && abilities.checks_puts.is_none()
            && (abilities.checks_parts.is_some() || abilities.has_md5_etags)
            && object_size > 0
    }

    /// Writes an object by an upload, which has no parts yet: verified before it takes the place of what was there. The
    /// upload is left to the caller to abort when this fails.
    ///
    /// # Errors
    /// As [`complete_upload`](Self::complete_upload).
    pub async fn put_by_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        bytes: Bytes,
        replaces: &Replaces,
    ) -> Result<ObjectMeta> {
        let size = bytes.len() as u64;
        let crc64 = Crc64::of(&bytes).value();
        let part = self.put_part(key, upload, 0, 0, bytes).await?;
        self.complete_upload(key, upload, vec![part], size, replaces, Some(crc64)).await
    }

    /// Asks the store whether an object is the one that was just sent: its size, and the entity tag where that is known.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when somebody else has replaced it meanwhile.
    pub(super) async fn verify(
        &self,
        key: &ObjectKey,
        object_size: u64,
        tags: &SentTags,
    ) -> Result<ObjectMeta> {
        let wrong = |what: String| Error::new(ErrorKind::UploadFailed, what);
        // The object is in place, right or wrong: one bad answer does not decide about it.
        let mut tries = 1;
        loop {
            let error = match self.head(key).await {
                Err(error) => error,
                Ok(None) => wrong("the object is not there after its upload".to_owned()),
                Ok(Some(meta)) if meta.object_size != object_size => {
                    let size = meta.object_size;
                    wrong(format!("the object has {size} bytes after its upload, not {object_size}"))
                }
                Ok(Some(meta)) => match tags.check(meta.etag.as_deref()) {
                    Ok(()) => return Ok(meta),
                    Err(error) => error,
                },
            };
            if tries == VERIFY_TRIES {
                return Err(self.named(error, key));
            }
            tries += 1;
            tokio::time::sleep(VERIFY_PAUSE).await;
        }
    }

    /// Gives an upload up; one that is not there any more is no failure.
    pub async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<()> {
        self.store().abort_upload(key, upload).await.map_err(|e| self.named(e, key))
    }

    /// Whether the store is one in which dead processes leave files that are [swept](Self::sweep).
    pub fn has_leftovers(&self) -> bool {
        !self.abilities().is_remote
    }

    /// Removes what dead processes left of uploads, but for those `kept` and those that another state directory than
    /// `state` may continue. A remote store cannot tell whose an upload is: there only uploads that are known by their id
    /// are ever given up.
    pub async fn sweep(&self, state: &str, kept: Vec<String>) -> Result<()> {
        match self.check_writable() {
            Ok(()) => self.store().sweep(state, kept).await,
            Err(_) => Ok(()),
        }
    }
}

/// Whether a store refuses a part or a completion, and will again.
fn is_final(error: &Error) -> bool {
    error.kind() == ErrorKind::UploadFailed && !error.is_transient()
}

/// A part's MD5, the id that some stores give to it.
async fn md5_of(part: &Bytes) -> Result<String> {
    let part = part.clone();
    let digest = tokio::task::spawn_blocking(move || hex::encode(Md5::digest(&part))).await;
    digest.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the bucket panicked").because(e))
}
