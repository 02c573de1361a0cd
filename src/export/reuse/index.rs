//! The index of an object's chunks, which stands beside it and says where its next version finds what it has already.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 4 | version, little-endian as all numbers |
//! | 4 | average length of the chunks |
//! | 8 | the object's bytes |
//! | 4 | number of chunks |
//! | 2 | length of the entity tag, which follows |
//! | 36 each | the chunks in the object's order: length (4), BLAKE3 digest (32) |
//! | 32 | BLAKE3 digest of all before it |
//!
//! It comes from a bucket and may have been written by anybody. What is read of it is bounded by its own length, and no
//! chunk that it names lies outside the object.

use bytes::Bytes;

use super::chunker::{ChunkSizes, Cut, Digest, LONGEST_AVERAGE};
use crate::error::{Error, ErrorKind, Result};

/// Largest index: 900 000 chunks.
pub(in crate::export) const MAX_INDEX: usize = 32 << 20;

const MAGIC: &[u8; 8] = b"FFCHUNKS";
const VERSION: u32 = 1;
/// Bytes before the entity tag.
const HEAD: usize = 30;
/// Bytes of a chunk.
const ENTRY: usize = 36;
const DIGEST: usize = 32;
/// Longest entity tag. Those of stores have below 100 bytes.
const MAX_ETAG: usize = 1024;

/// Where the chunks of an object are.
#[derive(Debug)]
pub(in crate::export) struct ChunkIndex {
    average: u32,
    /// Where each chunk begins, and at last where the object ends.
    offsets: Vec<u64>,
    digests: Vec<Digest>,
    /// The chunks' numbers in the order of their digests; equal ones in the object's order.
    sorted: Vec<u32>,
}

impl ChunkIndex {
    /// Reads the index of the object that has this size and entity tag.
    ///
    /// # Errors
    /// `Unsupported` for another version, `Conflict` when it describes another object, `Damaged` when it is no index.
    pub(in crate::export) fn decode(bytes: &[u8], object_size: u64, etag: &str) -> Result<Self> {
        let damaged = |what: &str| Error::new(ErrorKind::Damaged, format!("an index of chunks {what}"));
        let mut rest = Reader(bytes);
        if rest.take(8) != Some(MAGIC) {
            return Err(damaged("does not begin like one"));
        }
        let cut_off = || damaged("is cut off");
        let version = rest.u32().ok_or_else(cut_off)?;
        if version != VERSION {
            let what = format!("an index of chunks has version {version}, which is not known");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let (body, sum) = bytes.split_last_chunk::<DIGEST>().ok_or_else(cut_off)?;
        if bytes.len() > MAX_INDEX || blake3::hash(body) != *sum {
            return Err(damaged("does not have its checksum"));
        }
        let average = rest.u32().ok_or_else(cut_off)?;
        let size = rest.u64().ok_or_else(cut_off)?;
        let count = rest.u32().ok_or_else(cut_off)? as usize;
        let length = rest.u16().ok_or_else(cut_off)? as usize;
        if rest.take(length) != Some(etag.as_bytes()) || size != object_size {
            return Err(Error::new(ErrorKind::Conflict, "an index of chunks describes another object"));
        }
        let entries = rest.0.len().checked_sub(DIGEST).ok_or_else(cut_off)?;
        if Some(entries) != count.checked_mul(ENTRY) || !(4..=LONGEST_AVERAGE).contains(&average) {
            return Err(damaged("has a wrong head"));
        }
        let (entries, _) = rest.0[..entries].as_chunks::<ENTRY>();
        Self::new(entries, average, size).ok_or_else(|| damaged("has chunks that are not the object's"))
    }

    fn new(entries: &[[u8; ENTRY]], average: u32, size: u64) -> Option<Self> {
        let longest = ChunkSizes::with_average(average).max;
        let mut offsets = Vec::with_capacity(entries.len() + 1);
        let mut digests = Vec::with_capacity(entries.len());
        let mut at = 0u64;
        for entry in entries {
            let (length, digest) = entry.split_first_chunk::<4>()?;
            let length = u32::from_le_bytes(*length);
            if length == 0 || length > longest {
                return None;
            }
            offsets.push(at);
            digests.push(Digest::try_from(digest).ok()?);
            at = at.checked_add(length.into())?;
        }
        offsets.push(at);
        let mut sorted: Vec<u32> = (0..digests.len() as u32).collect();
        sorted.sort_unstable_by_key(|&chunk| (digests[chunk as usize], chunk));
        (at == size).then_some(Self { average, offsets, digests, sorted })
    }

    /// The average length of its chunks. Only a file that is cut with the same one has chunks of it.
    pub(in crate::export) fn average(&self) -> u32 {
        self.average
    }

    /// Where in the object a chunk with this digest and length begins: at `expected_at` if one does.
    pub(in crate::export) fn offset_of(
        &self,
        digest: &Digest,
        length: u32,
        expected_at: Option<u64>,
    ) -> Option<u64> {
        let is_it = |chunk: usize| self.digests[chunk] == *digest && self.length(chunk) == u64::from(length);
        let expected = expected_at.and_then(|at| self.offsets.binary_search(&at).ok());
        if let Some(chunk) = expected.filter(|&chunk| chunk < self.digests.len() && is_it(chunk)) {
            return Some(self.offsets[chunk]);
        }
        let first = self.sorted.partition_point(|&chunk| self.digests[chunk as usize] < *digest);
        let chunk = *self.sorted.get(first)? as usize;
        is_it(chunk).then(|| self.offsets[chunk])
    }

    fn length(&self, chunk: usize) -> u64 {
        self.offsets[chunk + 1] - self.offsets[chunk]
    }
}

/// Takes a number's or a text's bytes from the front of others.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.number().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.number().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.number().map(u64::from_le_bytes)
    }
}

/// Makes the index of an object from its chunks, in order from its first byte on.
#[derive(Debug)]
pub(in crate::export) struct IndexBuilder {
    average: u32,
    size: u64,
    /// `None` when there were too many.
    entries: Option<Vec<u8>>,
}

impl IndexBuilder {
    /// An index without chunks of a file that is cut into `sizes`.
    pub(in crate::export) fn new(sizes: ChunkSizes) -> Self {
        Self { average: sizes.average, size: 0, entries: Some(Vec::new()) }
    }

    /// Adds the file's next chunk.
    pub(in crate::export) fn add(&mut self, cut: &Cut) {
        self.size += u64::from(cut.length);
        let Some(entries) = &mut self.entries else { return };
        if HEAD + MAX_ETAG + entries.len() + ENTRY + DIGEST > MAX_INDEX {
            self.entries = None;
            return;
        }
        entries.extend_from_slice(&cut.length.to_le_bytes());
        entries.extend_from_slice(&cut.digest);
    }

    /// The bytes that all chunks have together.
    pub(in crate::export) fn size(&self) -> u64 {
        self.size
    }

    /// The index of the object that has this entity tag. `None` when it would be too large.
    pub(in crate::export) fn encode(&self, etag: &str) -> Option<Bytes> {
        let entries = self.entries.as_ref().filter(|_| etag.len() <= MAX_ETAG)?;
        let mut bytes = Vec::with_capacity(HEAD + etag.len() + entries.len() + DIGEST);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.average.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&((entries.len() / ENTRY) as u32).to_le_bytes());
        bytes.extend_from_slice(&(etag.len() as u16).to_le_bytes());
        bytes.extend_from_slice(etag.as_bytes());
        bytes.extend_from_slice(entries);
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        Some(bytes.into())
    }
}
