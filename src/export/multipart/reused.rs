//! What the store has already of an object that is about to be made: chunks of the one that it replaces, and zeros.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::debug;

use super::log::{Copied, Making, PartPlan, UploadLog};
use super::uploads::{Uploads, abort, blocking};
use crate::bucket::{Bucket, CopySource, MAX_PARTS, ObjectKey, Replaces, Tags, Zeros, random};
use crate::error::{Error, Result};
use crate::export::reuse::{self, ChunkIndex, ChunkSizes, Origin, PlanLimits, PlannedPart};
use crate::units::MIB;

/// Smallest file whose zeros are copied: the object of zeros has to be made first, where there is none. Builds with debug
/// assertions, which make a smaller one, take a smaller file.
const ZEROS_FROM: u64 = if cfg!(debug_assertions) { 32 * MIB } else { 128 * MIB };

/// Longest part that is copied at once, unless larger ones are needed: one that fails is copied again.
const LONGEST_COPY: u64 = 256 * MIB;

/// What the store has already. Nothing of it is trusted: each copy is compared with the file's bytes.
#[derive(Debug, Default)]
pub(in crate::export) struct Reused {
    /// Whether the store copies parts.
    copies: bool,
    old: Option<Old>,
    without_zeros: bool,
    /// Whether it was the object of zeros that could not be used.
    zeros_failed: AtomicBool,
}

/// The object that is replaced.
#[derive(Debug)]
struct Old {
    key: ObjectKey,
    etag: String,
    index: Arc<ChunkIndex>,
}

/// Where the index of an object's chunks is, among our own files.
fn index_name(key: &ObjectKey) -> String {
    format!("chunks/{key}")
}

impl Reused {
    /// What the store has of `key`, whose object with that tag is about to be replaced by one of at most `size` bytes.
    pub(in crate::export) async fn look(
        bucket: &Bucket,
        key: &ObjectKey,
        replaces: &Replaces,
        size: u64,
    ) -> Self {
        if !bucket.copies_parts() || !is_in_parts(bucket, size) {
            return Self::default();
        }
        let old = match replaces {
            Replaces::Tag(etag) => Old::look(bucket, key, etag).await.unwrap_or_else(|error| {
                debug!(%key, "nothing is copied from the object that is replaced: {}", error.report());
                None
            }),
            _ => None,
        };
        Self { copies: true, old, ..Self::default() }
    }

    /// The same of whatever object is there.
    pub(super) async fn look_at(bucket: &Bucket, key: &ObjectKey, size: u64) -> Self {
        let there = bucket.head(key).await.ok().flatten();
        let replaces = Replaces::found(there.as_ref().map(|meta| meta.etag.as_deref()));
        Self::look(bucket, key, &replaces, size).await
    }

    /// Whether the object that is replaced has an index.
    pub(super) fn has_old(&self) -> bool {
        self.old.is_some()
    }

    /// A copy was refused: from now on nothing is copied from where that was. Chunks are made all the same, for the next
    /// export.
    pub(in crate::export) fn give_up(&mut self) {
        // Only once: what fails after that is the old object's.
        if !std::mem::take(self.zeros_failed.get_mut()) {
            self.old = None;
        }
        self.without_zeros = true;
    }

    /// How long the chunks of a file of at most `size` bytes are, where it is of use to have them: as long as those that
    /// were `recorded`, or that the old object has, if these are about right.
    pub(super) fn sizes(&self, size: u64, recorded: Option<u32>) -> Option<ChunkSizes> {
        let wanted = ChunkSizes::for_file(size);
        let is_right = |average: &u32| *average / 4 <= wanted.average && wanted.average / 4 <= *average;
        let old = self.old.as_ref().map(|old| old.index.average());
        let average = recorded.filter(is_right).or(old.filter(is_right)).unwrap_or(wanted.average);
        self.copies.then(|| ChunkSizes::with_average(average))
    }

    /// What parts of a file of at most `size` bytes may be.
    pub(super) fn limits(&self, bucket: &Bucket, part_size: u64, size: u64) -> PlanLimits {
        let least = bucket.least_part();
        PlanLimits {
            least,
            part_size,
            longest_copy: LONGEST_COPY.max(2 * least).max(2 * part_size),
            max_parts: MAX_PARTS,
            splices: bucket.splices(),
            zeros: (size >= ZEROS_FROM && !self.without_zeros).then_some(Bucket::ZEROS),
        }
    }

    /// The chunks of the old object, for an upload that can have copies of them.
    pub(super) fn old_index(&self, log: &UploadLog) -> Option<Arc<ChunkIndex>> {
        self.old.as_ref().filter(|_| !log.is_old()).map(|old| Arc::clone(&old.index))
    }

    /// A part with the objects that it is copied from.
    pub(super) async fn plan(&self, store: (&Bucket, &Uploads), part: &PlannedPart) -> Result<PartPlan> {
        let making = match &part.making {
            reuse::Making::Send => Making::Send,
            reuse::Making::Copy(origin) => {
                Making::Copy(self.copied(store, origin, part.length, part.crc64).await?)
            }
            reuse::Making::Splice { kept, from } => {
                Making::Splice(self.copied(store, from, *kept, part.crc64).await?)
            }
        };
        Ok(PartPlan { offset: part.offset, length: part.length, making })
    }

    async fn copied(
        &self,
        (bucket, uploads): (&Bucket, &Uploads),
        origin: &Origin,
        length: u64,
        crc64: u64,
    ) -> Result<Copied> {
        let (key, etag, at, is_zero) = match (origin, &self.old) {
            (Origin::Old { at }, Some(old)) => (old.key.clone(), old.etag.clone(), *at, false),
            _ => {
                let zeros = zeros(bucket, uploads, length).await;
                let zeros = zeros.inspect_err(|_| self.zeros_failed.store(true, Ordering::SeqCst))?;
                (zeros.key, zeros.etag, 0, true)
            }
        };
        Ok(Copied { key, etag, at, length, crc64, is_zero })
    }
}

/// The object of zeros; made, or made whole, where there is none.
async fn zeros(bucket: &Bucket, uploads: &Uploads, length: u64) -> Result<CopySource> {
    // It is made once, however many jobs need it.
    let _gate = bucket.gate_of_zeros().await;
    let source = match bucket.zeros().await? {
        Zeros::Whole(source) => source,
        Zeros::Seed(seed) => {
            let (key, log_id) = (Bucket::zeros_key(), format!("zeros-{}", random()));
            let part_size = bucket.part_size_for(Bucket::ZEROS)?;
            let log = uploads.begin(bucket, &key, &Tags::new(), part_size, &log_id).await?;
            match bucket.grow_zeros(&log.name().id, &seed).await {
                Ok(source) => {
                    log.remove();
                    source
                }
                Err(error) => {
                    abort(bucket, &log).await;
                    // Another host may have been faster.
                    match bucket.zeros().await? {
                        Zeros::Whole(source) => source,
                        Zeros::Seed(_) => return Err(error),
                    }
                }
            }
        }
    };
    let size = source.range.end - source.range.start;
    if size < length {
        let what = format!("the object of zeros has {size} bytes");
        return Err(Error::unsupported(what).in_file(bucket.url_of(&source.key)));
    }
    Ok(source)
}

impl Old {
    async fn look(bucket: &Bucket, key: &ObjectKey, etag: &str) -> Result<Option<Self>> {
        let Some(file) = bucket.read_control_within(&index_name(key), reuse::MAX_INDEX as u64).await? else {
            return Ok(None);
        };
        let Some(meta) = bucket.head(key).await?.filter(|meta| meta.etag.as_deref() == Some(etag)) else {
            return Ok(None);
        };
        let (size, tag) = (meta.object_size, etag.to_owned());
        let index = tokio::task::spawn_blocking(move || ChunkIndex::decode(&file.bytes, size, &tag));
        let index = super::digests::joined(index.await)??;
        Ok(Some(Self { key: key.clone(), etag: etag.to_owned(), index: Arc::new(index) }))
    }
}

/// Puts the index of an object's chunks beside it, if the log has all of them.
pub(in crate::export) async fn put_index(
    bucket: &Bucket,
    log: &Arc<UploadLog>,
    object_size: u64,
    etag: &str,
) -> Result<()> {
    let etag = etag.to_owned();
    let encode = move |log: &UploadLog| {
        let chunks = log.chunks();
        (chunks.end() == object_size).then(|| chunks.encode(&etag))
    };
    let Some(index) = blocking(log, encode).await?.flatten() else { return Ok(()) };
    bucket.put_control(&index_name(&log.name().key), index, &Replaces::Anything).await?;
    Ok(())
}

/// Whether an object of so many bytes is made of parts: others have no index.
fn is_in_parts(bucket: &Bucket, object_size: u64) -> bool {
    bucket.part_size_for(object_size).is_ok_and(|part_size| object_size >= part_size)
}

/// Removes the index of an object of so many bytes that is not there any more.
pub(in crate::export) async fn remove_index(bucket: &Bucket, key: &ObjectKey, object_size: u64) {
    if bucket.copies_parts()
        && is_in_parts(bucket, object_size)
        && let Err(error) = bucket.delete_control(&index_name(key)).await
    {
        debug!(%key, "the index of its chunks could not be removed: {}", error.report());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::reuse::ChunkList;

    #[test]
    fn what_is_refused_is_given_up_one_after_the_other_and_never_tried_for_ever() {
        let mut list = ChunkList::default();
        list.extend(64, 0, &[]);
        let index = ChunkIndex::decode(&list.encode("e").unwrap(), 0, "e").unwrap();
        let key = ObjectKey::parse("k").unwrap();
        let old = Some(Old { key, etag: "e".into(), index: Arc::new(index) });
        let mut reused = Reused { copies: true, old, ..Reused::default() };
        *reused.zeros_failed.get_mut() = true;
        reused.give_up();
        assert!(reused.has_old() && reused.without_zeros);
        reused.give_up();
        assert!(!reused.has_old() && reused.sizes(0, None).is_some());
    }
}
