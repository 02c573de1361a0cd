//! Parts that the store copies, so that no byte of them passes here.

use tracing::warn;

use super::checksum::Crc64;
use super::store::{CopiedPart, CopyPart, CopySource};
use super::{Bucket, ObjectKey, ObjectMeta};
use crate::error::{Error, ErrorKind, Result};

impl Bucket {
    /// Has the store copy a range of an object as part `index`, counted from 0, which stands at `offset` in the object that is
    /// made, and compares the checksum of what was copied; returns the id by which it is put together. No byte of it passes
    /// here. After any error but a transient one the part can be sent.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when the source is not what it was, or is shorter than that;
    /// [`Damaged`](ErrorKind::Damaged) when something else was copied than what has that checksum;
    /// [`Unsupported`](ErrorKind::Unsupported) when the store cannot do this, or does not say the checksum of what it has
    /// copied; [`NotFound`](ErrorKind::NotFound) when there is no such upload.
    pub async fn copy_part(
        &self,
        key: &ObjectKey,
        upload: &str,
        index: usize,
        offset: u64,
        source: &CopySource,
        crc64: u64,
    ) -> Result<String> {
        match self.copy_range(key, upload, index, offset, source).await? {
            (id, found) if found.value() == crc64 => Ok(id),
            _ => {
                let what = format!(
                    "part {}: the store has copied something else than was in {}",
                    index + 1,
                    source.key
                );
                Err(self.named(Error::new(ErrorKind::Damaged, what), key))
            }
        }
    }

    /// The same; returns with the id what the store says of the bytes that it has copied.
    ///
    /// # Errors
    /// As [`copy_part`](Self::copy_part), which compares them.
    pub async fn copy_range(
        &self,
        key: &ObjectKey,
        upload: &str,
        index: usize,
        offset: u64,
        source: &CopySource,
    ) -> Result<(String, Crc64)> {
        self.check_writable()?;
        let length = source.range.end.saturating_sub(source.range.start);
        if length == 0 {
            return Err(self.named(Error::new(ErrorKind::Internal, "a part without bytes"), key));
        }
        let part = CopyPart { index, offset, source: source.clone(), is_whole: false };
        let copied = self.store().copy_part(key, upload, part).await;
        // An upload that an earlier version began asks for no checksums, which says nothing of others.
        let is_silent = matches!(&copied, Ok(CopiedPart { crc64: None, .. }));
        let copied = copied.and_then(|CopiedPart { id, crc64 }| match crc64 {
            Some(crc64) => Ok((id, Crc64::new(crc64, length))),
            None => Err(Error::unsupported("the store does not say what it has copied")),
        });
        copied.map_err(|error| {
            match error.kind() {
                ErrorKind::Unsupported if !is_silent => {
                    self.forget_copies("the store copies no ranges of objects");
                }
                ErrorKind::Conflict => self.forget_zeros(source),
                _ => {}
            }
            self.named(error, key)
        })
    }

    /// The CRC-64/NVME of an object that is still the same, where the store keeps it.
    ///
    /// # Errors
    /// [`SourceChanged`](ErrorKind::SourceChanged) when it has another tag.
    pub async fn crc64_of(&self, object: &ObjectMeta) -> Result<Option<u64>> {
        let crc64 = self.store().crc64(&object.key, object.etag.as_deref()).await;
        crc64.map_err(|e| self.named(e, &object.key))
    }

    /// Whether the store copies parts, as [`copy_part`](Self::copy_part) does it, as far as that is known.
    pub fn copies_parts(&self) -> bool {
        let abilities = self.inner.abilities.lock();
        abilities.copies_parts && abilities.copies_failed.is_none()
    }

    /// Bytes of the smallest part of an upload that is not its last one.
    pub fn least_part(&self) -> u64 {
        self.inner.abilities.lock().least_part
    }

    /// Whether a part can be made of bytes that the store has and of others, by way of an object of both; where parts may be
    /// small it is not worth it.
    pub fn splices(&self) -> bool {
        self.inner.abilities.lock().is_remote
    }

    /// Whether the store compares the CRC-64/NVME of a whole object before it puts it together.
    pub fn checks_objects(&self) -> bool {
        self.inner.abilities.lock().checks_objects
    }

    /// From now on no parts are copied, because of what went wrong: in words that follow "everything is sent".
    pub fn forget_copies(&self, why: &str) {
        let mut abilities = self.inner.abilities.lock();
        if abilities.copies_failed.is_none() {
            warn!("bucket {}: everything is sent: {why}", self.name());
            abilities.copies_failed = Some(why.to_owned());
        }
    }
}
