//! What a store can do, found out at mount by requests that it must refuse.

use bytes::Bytes;
use md5::{Digest, Md5};

use super::checksum::{Checksum, Crc64, composite_etag, is_same_tag, md5_etag};
use super::client::Tries;
use super::key::{CONTROL_PREFIX, ObjectKey, unique};
use super::replaces::Conditions;
use super::store::{Abilities, CopyPart, CopySource, Put, PutPart, Tags};
use super::upload::PART_SIZE;
use super::{Bucket, PendingUpload, Replaces};
use crate::error::{Error, ErrorKind, Result};

/// What a probe writes.
const PROBE: &[u8] = b"freightfs\n";

/// What it tries to put in its place.
const OTHER: &[u8] = b"freight fs\n";

/// An entity tag that no object has.
const OTHER_TAG: &str = "\"00000000000000000000000000000000\"";

/// What an upload of one part shows.
#[derive(Debug, Default)]
struct ProbedUpload {
    /// The part's id.
    part: String,
    /// The object's tag as the store returns it.
    tag: Option<String>,
    /// Whether it was not put together with the checksum of another one.
    checks_object: bool,
}

impl Bucket {
    /// Finds out whether the bucket is there and can be used as exports use it: listed, written, read, written in parts,
    /// removed from; which conditions and checksums its store keeps to; and whether it can be written at all. What it
    /// writes is removed again.
    pub async fn probe(&self) -> Result<()> {
        let key = probe_key();
        // Listing first: some stores answer a put into a bucket that is not there with an internal error.
        self.has_prefix(&key).await?;
        let put = self.put(&key, Bytes::from_static(PROBE), &Replaces::Anything).await;
        if let Err(error) = &put
            && matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly)
        {
            tracing::info!("bucket {} is read-only: {}", self.name(), error.report());
            self.inner.abilities.lock().is_read_only = true;
            return Ok(());
        }
        let probed = async {
            put?;
            self.probe_written(&key).await
        };
        self.removed(&key, probed).await
    }

    /// What can be found out with an object that is there.
    async fn probe_written(&self, key: &ObjectKey) -> Result<()> {
        let read = self.read(key, 0..PROBE.len() as u64, None).await?;
        if read != PROBE {
            let what = "the store gives other bytes than were written";
            return Err(self.named(Error::new(ErrorKind::Io, what), key));
        }
        let mut found = self.abilities();
        if found.is_remote {
            let (puts, parts, listed, copies) = tokio::join!(
                self.probe_puts(&found),
                self.probe_parts(&found),
                self.probe_listing(),
                self.probe_part_copies(key, &found)
            );
            let (lists_uploads, initiator) = listed?.map_or((false, None), |upload| (true, upload.initiator));
            found = Abilities { checks_puts: puts?, lists_uploads, initiator, ..parts? };
            // Parts that are copied stand beside parts that are sent, and have the same checksum.
            found.copies_parts = found.checks_parts == Some(Checksum::Crc64) && copies;
            found.conditions = self.probe_conditions(key).await?;
            tracing::debug!("bucket {}: {found:?}", self.name());
            *self.inner.abilities.lock() = found;
        }
        Ok(())
    }

    /// A probe whose object is removed again, whatever comes of it.
    async fn removed<T>(&self, key: &ObjectKey, probe: impl Future<Output = Result<T>>) -> Result<T> {
        let probed = probe.await;
        let removed = self.delete(key).await;
        let found = probed?;
        removed.map(|()| found)
    }

    /// Asks once more a store that denied writing when it was [probed](Self::probe): credentials may have been renewed.
    pub async fn probe_again(&self) -> Result<()> {
        if !self.inner.abilities.lock().is_read_only {
            return Ok(());
        }
        self.inner.abilities.lock().is_read_only = false;
        // What the store can do is not known before that was tried out.
        self.probe().await.inspect_err(|_| self.inner.abilities.lock().is_read_only = true)
    }

    /// Whether hosts can agree in this bucket, as [`probe`](Self::probe) has found out: whether its store refuses to create
    /// what is there. Some accept that condition and ignore it.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) when it does not, [`ReadOnly`](ErrorKind::ReadOnly) where nothing can be
    /// written.
    pub fn check_shareable(&self) -> Result<()> {
        self.check_writable()?;
        if self.abilities().conditions.creations {
            return Ok(());
        }
        let what = "the store does not keep to conditional puts, so that hosts cannot agree in it: it cannot be shared";
        Err(Error::unsupported(what).in_file(self.url()))
    }

    /// The checksum by which the store refuses damaged objects.
    async fn probe_puts(&self, abilities: &Abilities) -> Result<Option<Checksum>> {
        let key = probe_key();
        let probe = async {
            for &checksum in abilities.checksums {
                let put = |of: &[u8]| Put {
                    bytes: Bytes::from_static(PROBE),
                    checksum: Some((checksum, checksum.of(of))),
                    ..Put::default()
                };
                let is_checked = is_damaged(&self.store().put(&key, put(OTHER)).await)
                    && self.store().put(&key, put(PROBE)).await.is_ok();
                if is_checked {
                    return Ok(Some(checksum));
                }
            }
            Ok(None)
        };
        self.removed(&key, probe).await
    }

    /// The checksum by which the store refuses damaged parts, and what its entity tags are.
    async fn probe_parts(&self, abilities: &Abilities) -> Result<Abilities> {
        let key = probe_key();
        self.removed(&key, self.probe_parts_of(&key, abilities)).await
    }

    async fn probe_parts_of(&self, key: &ObjectKey, abilities: &Abilities) -> Result<Abilities> {
        let mut found = None;
        for &checksum in abilities.checksums {
            // A store that does not know the checksum may refuse any of these requests.
            if self.probe_upload(key, Some(checksum)).await.is_ok_and(|made| made.is_some()) {
                found = Some(checksum);
                break;
            }
        }
        let ProbedUpload { part, tag: returned, checks_object } =
            self.probe_upload(key, found).await?.unwrap_or_default();
        let etag = self.head(key).await?.and_then(|meta| meta.etag);
        let is_md5 = part.trim_matches('"') == hex::encode(Md5::digest(PROBE));
        let of_parts = etag.is_some() && etag == composite_etag(&[part]);
        let put = self.put(key, Bytes::from_static(PROBE), &Replaces::Anything).await?;
        let is_seen = |returned: Option<&str>, meta: Option<&str>| {
            returned.zip(meta).is_some_and(|(returned, seen)| is_same_tag(returned, seen))
        };
        let after_put = self.head(key).await?.and_then(|meta| meta.etag);
        Ok(Abilities {
            checks_parts: found,
            checks_objects: checks_object,
            has_md5_etags: is_md5 && of_parts && put == Some(md5_etag(PROBE)),
            returns_tags: is_seen(returned.as_deref(), etag.as_deref())
                && is_seen(put.as_deref(), after_put.as_deref()),
            ..abilities.clone()
        })
    }

    /// Makes an object by an upload of one part; `None` where a damaged part was taken.
    async fn probe_upload(
        &self,
        key: &ObjectKey,
        checksum: Option<Checksum>,
    ) -> Result<Option<ProbedUpload>> {
        let upload =
            self.store().start_upload(key, PART_SIZE, &Tags::new(), checksum, &Tries::default()).await?;
        let part = |of: &[u8]| PutPart {
            index: 0,
            offset: 0,
            bytes: Bytes::from_static(PROBE),
            checksum: checksum.map(|checksum| (checksum, checksum.of(of))),
        };
        let made = async {
            if checksum.is_some() && !is_damaged(&self.store().put_part(key, &upload, part(OTHER)).await) {
                return Ok(None);
            }
            let id = self.store().put_part(key, &upload, part(PROBE)).await?;
            let size = PROBE.len() as u64;
            let parts = vec![id.clone()];
            let complete = async |crc64| {
                let (parts, replaces) = (parts.clone(), &Replaces::Anything);
                self.store().complete_upload(key, &upload, parts, size, replaces, crc64).await
            };
            let crc64 = |of| (checksum == Some(Checksum::Crc64)).then(|| Crc64::of(of).value());
            let (tag, checks_object) = match crc64(OTHER) {
                None => (complete(None).await?, false),
                Some(other) => match complete(Some(other)).await {
                    Ok(tag) => (tag, false),
                    Err(error) if error.kind() == ErrorKind::Damaged => (complete(crc64(PROBE)).await?, true),
                    // It knows no checksums of whole objects.
                    Err(_) => (complete(None).await?, false),
                },
            };
            Ok(Some(ProbedUpload { part: id, tag, checks_object }))
        };
        let made = made.await;
        if !matches!(made, Ok(Some(_))) {
            let _ = self.abort_upload(key, &upload).await;
        }
        made
    }

    /// How the store lists an upload of ours; `None` where it does not, or not when it was started.
    async fn probe_listing(&self) -> Result<Option<PendingUpload>> {
        let key = probe_key();
        let upload =
            self.store().start_upload(&key, PART_SIZE, &Tags::new(), None, &Tries::default()).await?;
        let listed = self.store().pending_uploads(&key).await;
        if let Err(error) = self.abort_upload(&key, &upload).await {
            tracing::warn!("an upload of a probe is left over: {}", error.report());
        }
        let listed = listed.inspect_err(|e| tracing::debug!("uploads are not listed: {}", e.report()));
        let mut uploads = listed.map_or_else(|_| Vec::new(), |listed| listed.uploads).into_iter();
        Ok(uploads.find(|listed| listed.id == upload && listed.initiated.is_some()))
    }

    /// Whether the store copies an object as a part only when it is what it was, and says what it has copied. Ranges are not
    /// tried: S3 has them of large objects only.
    async fn probe_part_copies(&self, key: &ObjectKey, abilities: &Abilities) -> bool {
        let checksum = Some(Checksum::Crc64);
        if !abilities.checksums.contains(&Checksum::Crc64) {
            return false;
        }
        let to = probe_key();
        let copied = async {
            let etag = self.head(key).await?.and_then(|meta| meta.etag).unwrap_or_default();
            let tries = Tries::default();
            let upload = self.store().start_upload(&to, PART_SIZE, &Tags::new(), checksum, &tries).await?;
            let copy = async |etag: &str| {
                let source =
                    CopySource { key: key.clone(), etag: etag.to_owned(), range: 0..PROBE.len() as u64 };
                let part = CopyPart { index: 0, offset: 0, source, is_whole: true };
                self.store().copy_part(&to, &upload, part).await
            };
            let refused = is_conflict(&copy(OTHER_TAG).await);
            let copied = if refused { copy(&etag).await } else { Err(Error::unsupported("no conditions")) };
            if let Err(error) = self.abort_upload(&to, &upload).await {
                tracing::warn!("an upload of a probe is left over: {}", error.report());
            }
            copied
        };
        let copied = copied.await.inspect_err(|e| tracing::debug!("no parts are copied: {}", e.report()));
        copied.is_ok_and(|copied| copied.crc64 == Some(Crc64::of(PROBE).value()))
    }

    /// Which conditions the store keeps to, by some that do not hold and one that does, on an object that is there.
    async fn probe_conditions(&self, key: &ObjectKey) -> Result<Conditions> {
        let wrong = Replaces::Tag(OTHER_TAG.to_owned());
        let put = async |bytes, replaces: &Replaces| {
            let put = Put { bytes: Bytes::from_static(bytes), replaces: replaces.clone(), ..Put::default() };
            self.store().put(key, put).await
        };
        let removals = is_conflict(&self.store().delete(key, &wrong).await);
        // Whatever the store made of that, there is an object again.
        put(PROBE, &Replaces::Anything).await?;
        let completions = self.probe_completions(key, &wrong).await?;
        let right = put(PROBE, &Replaces::Anything).await?.map_or(Replaces::Nothing, Replaces::Tag);
        let creations = is_conflict(&put(OTHER, &Replaces::Nothing).await);
        let updates = is_conflict(&put(OTHER, &wrong).await) && put(OTHER, &right).await.is_ok();
        let copies = self.probe_copies(key).await?;
        Ok(Conditions { creations, updates, completions, removals, copies })
    }

    /// Whether an object is copied only where it is what it was, and replaces what it is to replace.
    async fn probe_copies(&self, key: &ObjectKey) -> Result<bool> {
        let to = probe_key();
        let etag = self.head(key).await?.and_then(|meta| meta.etag);
        let other = Replaces::Tag(OTHER_TAG.to_owned());
        let copy = async |etag, replaces| self.store().copy(key, etag, &to, replaces).await;
        let refuses = async {
            let refuses = copy(Some(OTHER_TAG), &Replaces::Anything)
                .await
                .is_err_and(|error| error.kind() == ErrorKind::SourceChanged)
                && copy(etag.as_deref(), &Replaces::Nothing).await.is_ok()
                && is_conflict(&copy(etag.as_deref(), &Replaces::Nothing).await)
                && is_conflict(&copy(etag.as_deref(), &other).await);
            Ok(refuses)
        };
        self.removed(&to, refuses).await
    }

    /// Whether an upload is completed only where it replaces what it is to replace.
    async fn probe_completions(&self, key: &ObjectKey, wrong: &Replaces) -> Result<bool> {
        let upload = self.store().start_upload(key, PART_SIZE, &Tags::new(), None, &Tries::default()).await?;
        let part = PutPart { index: 0, offset: 0, bytes: Bytes::from_static(PROBE), checksum: None };
        let refuses = async {
            let id = self.store().put_part(key, &upload, part).await?;
            let size = PROBE.len() as u64;
            let complete = async |replaces| {
                self.store().complete_upload(key, &upload, vec![id.clone()], size, replaces, None).await
            };
            Ok(is_conflict(&complete(wrong).await) && is_conflict(&complete(&Replaces::Nothing).await))
        };
        let refuses = refuses.await;
        let _ = self.abort_upload(key, &upload).await;
        refuses
    }
}

fn probe_key() -> ObjectKey {
    ObjectKey::internal(&format!("{CONTROL_PREFIX}/probe-{}", unique()))
}

fn is_damaged<T>(result: &Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Damaged)
}

fn is_conflict<T>(result: &Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Conflict)
}
