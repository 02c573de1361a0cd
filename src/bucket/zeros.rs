//! The object of zeros, out of which long runs of zeros are copied by the store instead of being sent.
//!
//! It is among our own files, and one for all hosts. Its first bytes are sent, and it grows by being copied onto itself: what
//! somebody else has put in its place has another entity tag, and is neither used nor replaced. Where tags tell nothing of
//! the content, the checksum of each part that is copied out of it does.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::checksum::{Crc64, composite_etag, md5_etag};
use super::client::Tries;
use super::own_files::own_key;
use super::upload::MAX_PARTS;
use super::{Bucket, CopySource, ObjectKey, ObjectMeta, Replaces, Tags};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GIB, MIB};

/// Its name among our own files.
const NAME: &str = "zeros";

/// Bytes of it that are sent, and of each part of which it is made: enough for a store that copies ranges of large objects
/// only.
const SEED: u64 = 8 * MIB;

/// Its size when it is made. Builds with debug assertions have a smaller one, because the stores of tests copy each byte.
const SIZE: u64 = if cfg!(debug_assertions) { 2 * SEED } else { GIB };

/// Parts of it that are copied at once.
const COPIES_IN_FLIGHT: usize = 4;

/// How far the object of zeros has got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// All of it is there.
    Whole(CopySource),
    /// Its first bytes are there, out of which it is [made](Bucket::grow_zeros).
    Seed(CopySource),
}

impl Bucket {
    /// Bytes of the object of zeros.
    pub const ZEROS: u64 = SIZE;

    /// The key of the object of zeros, for the upload by which it grows.
    pub fn zeros_key() -> ObjectKey {
        own_key(NAME)
    }

    /// The object of zeros; its first bytes are sent if there is none. Where a bucket is a directory all of it is made at
    /// once.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) where nothing can be copied out of it, or something else has its name.
    pub async fn zeros(&self) -> Result<Zeros> {
        if !self.copies_parts() {
            return Err(self.named(Error::unsupported("the store copies no parts"), &own_key(NAME)));
        }
        let known = self.inner.zeros.lock().clone();
        if let Some(source) = known {
            return Ok(Zeros::Whole(source));
        }
        let key = own_key(NAME);
        let meta = match self.head(&key).await? {
            Some(meta) => meta,
            None => self.plant_zeros(&key).await?,
        };
        let zeros = self.checked_zeros(&key, meta)?;
        if let Zeros::Whole(source) = &zeros {
            *self.inner.zeros.lock() = Some(source.clone());
        }
        Ok(zeros)
    }

    /// Makes the object of zeros out of its first bytes, by an upload of [its key](Self::zeros_key) that has no parts yet and
    /// is left to the caller to abort when this fails.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when another host was faster.
    pub async fn grow_zeros(&self, upload: &str, seed: &CopySource) -> Result<CopySource> {
        let (key, seeded) = (own_key(NAME), crc64_of_seed());
        let copy = async |index: usize| {
            let offset = index as u64 * SEED;
            self.copy_part(&key, upload, index, offset, seed, seeded.value()).await
        };
        let copies = stream::iter((0..SIZE / SEED).map(|index| copy(index as usize)));
        let parts: Vec<_> = copies.buffered(COPIES_IN_FLIGHT).try_collect().await?;
        let crc64 = parts.iter().fold(Crc64::default(), |whole, _| whole.then(seeded));
        let replaces = Replaces::Tag(seed.etag.clone());
        let made = self.complete_upload(&key, upload, parts, SIZE, &replaces, Some(crc64.value())).await?;
        match self.checked_zeros(&key, made)? {
            Zeros::Whole(source) => {
                *self.inner.zeros.lock() = Some(source.clone());
                Ok(source)
            }
            Zeros::Seed(_) => Err(self.named(Error::new(ErrorKind::Conflict, "it did not grow"), &key)),
        }
    }

    /// Held by who makes the object of zeros, so that this process does it once.
    pub async fn gate_of_zeros(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.inner.growing_zeros.lock().await
    }

    /// An object of zeros has turned out to be another one than it was.
    pub(super) fn forget_zeros(&self, source: &CopySource) {
        let mut zeros = self.inner.zeros.lock();
        if zeros.as_ref().is_some_and(|zeros| (&zeros.key, &zeros.etag) == (&source.key, &source.etag)) {
            *zeros = None;
        }
    }

    /// Begins the object of zeros. Returns what is there then.
    async fn plant_zeros(&self, key: &ObjectKey) -> Result<ObjectMeta> {
        let planted = match self.abilities().is_remote {
            true => {
                let seed = Bytes::from(vec![0; SEED as usize]);
                self.put_tagged(key, seed, &Tags::new(), &Replaces::Nothing).await
            }
            false => self.make_hole(key).await,
        };
        match planted {
            Err(error) if error.kind() == ErrorKind::Conflict => self.head(key).await?.ok_or(error),
            planted => planted,
        }
    }

    /// Makes an object of a directory that is one hole.
    async fn make_hole(&self, key: &ObjectKey) -> Result<ObjectMeta> {
        let started = self.store().start_upload(key, SEED, &Tags::new(), None, &Tries::default()).await;
        let upload = started.map_err(|e| self.named(e, key))?;
        let made = self.complete_upload(key, &upload, Vec::new(), SIZE, &Replaces::Nothing, None).await;
        if made.is_err() {
            self.abort_upload(key, &upload).await?;
        }
        made
    }

    /// What an object is that has the name, if it can be told to be zeros.
    fn checked_zeros(&self, key: &ObjectKey, meta: ObjectMeta) -> Result<Zeros> {
        let (abilities, size) = (self.abilities(), meta.object_size);
        let unusable =
            || Error::unsupported("there is something else than the zeros that freightfs puts there");
        let parts = usize::try_from(size / SEED).ok().filter(|&parts| parts > 0 && parts <= MAX_PARTS);
        let parts = parts.filter(|_| size.is_multiple_of(SEED));
        let (parts, etag) =
            parts.zip(meta.etag).ok_or_else(unusable).map_err(|error| self.named(error, key))?;
        let is_seed = abilities.is_remote && parts == 1;
        if abilities.has_md5_etags {
            let seed = md5_etag(&vec![0; SEED as usize]);
            let expected = if is_seed { Some(seed) } else { composite_etag(&vec![seed; parts]) };
            if expected.as_ref() != Some(&etag) {
                return Err(self.named(unusable(), key));
            }
        }
        let source = CopySource { key: key.clone(), etag, range: 0..size };
        Ok(if is_seed { Zeros::Seed(source) } else { Zeros::Whole(source) })
    }
}

fn crc64_of_seed() -> Crc64 {
    Crc64::of(&vec![0; SEED as usize])
}
