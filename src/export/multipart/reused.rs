//! What the store has already of an object that is about to be made: chunks of the one that it replaces, and zeros.

use std::sync::Arc;

use tracing::debug;

use super::log::{Copied, Making, PartPlan, UploadLog};
use super::uploads::{Uploads, abort, blocking};
use crate::bucket::{Bucket, CopySource, MAX_PARTS, ObjectKey, Replaces, Tags, Zeros, random};
use crate::error::{Error, Result};
use crate::export::reuse::{self, ChunkIndex, ChunkSizes, Origin, PlanLimits, PlannedPart, Planner};
use crate::units::MIB;
use crate::vfile::VirtualFile;

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
    /// What the store has of `key`, whose object with that tag is about to be replaced.
    pub(in crate::export) async fn look(bucket: &Bucket, key: &ObjectKey, replaces: &Replaces) -> Self {
        if !bucket.copies_parts() {
            return Self::default();
        }
        let old = match replaces {
            Replaces::Tag(etag) => Old::look(bucket, key, etag).await.unwrap_or_else(|error| {
                debug!(%key, "nothing is copied from the object that is replaced: {}", error.report());
                None
            }),
            _ => None,
        };
        Self { copies: true, old }
    }

    /// The same of whatever object is there.
    pub(super) async fn look_at(bucket: &Bucket, key: &ObjectKey) -> Self {
        match bucket.head(key).await {
            Ok(Some(meta)) => Self::look(bucket, key, &Replaces::found(Some(meta.etag.as_deref()))).await,
            _ => Self::look(bucket, key, &Replaces::Nothing).await,
        }
    }

    /// Whether the object that is replaced has an index.
    pub(super) fn has_old(&self) -> bool {
        self.old.is_some()
    }

    /// How long the chunks are of a file whose size is not known at all.
    pub(super) fn sizes_of_any(&self) -> Option<ChunkSizes> {
        self.copies.then(|| ChunkSizes::for_file(0))
    }

    /// How long the chunks of a file are, where it is of use to have them.
    pub(super) fn sizes(&self, file: &dyn VirtualFile) -> Option<ChunkSizes> {
        self.copies.then(|| ChunkSizes::for_file(file.file_size()))
    }

    /// Plans the parts of a file of at most `size` bytes, from a part and a place on.
    pub(super) fn planner(&self, bucket: &Bucket, part_size: u64, size: u64, start: (usize, u64)) -> Planner {
        let least = bucket.least_part();
        let limits = PlanLimits {
            least,
            part_size,
            longest_copy: LONGEST_COPY.max(2 * least).max(2 * part_size),
            max_parts: MAX_PARTS,
            splices: bucket.splices(),
            zeros: (size >= ZEROS_FROM).then_some(Bucket::ZEROS),
        };
        let sizes = ChunkSizes::for_file(size);
        let index = self.old.as_ref().map(|old| &old.index).filter(|index| index.average() == sizes.average);
        Planner::new(limits, size, start, index.cloned())
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
                let zeros = zeros(bucket, uploads, length).await?;
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
        (chunks.end() == object_size).then(|| chunks.encode(ChunkSizes::for_file(object_size), &etag))
    };
    let Some(index) = blocking(log, encode).await?.flatten() else { return Ok(()) };
    bucket.put_control(&index_name(&log.name().key), index, &Replaces::Anything).await?;
    Ok(())
}
