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

/// The chunks of an object, in order from its first byte on, of which its index is made.
#[derive(Clone, Debug, Default)]
pub(in crate::export) struct ChunkList {
    /// Their usual length.
    average: u32,
    size: u64,
    /// As the index has them.
    entries: Vec<u8>,
    /// Whether there were too many.
    is_full: bool,
}

impl ChunkList {
    /// Chunks as the index has them.
    pub(in crate::export) fn entries_of(cuts: &[Cut]) -> Vec<u8> {
        cuts.iter().flat_map(|cut| cut.length.to_le_bytes().into_iter().chain(cut.digest)).collect()
    }

    /// Adds chunks as the index has them, which begin at `at` and are usually `average` long: what is there of chunks that end
    /// after that is void, and so are others than those.
    pub(in crate::export) fn extend(&mut self, average: u32, at: u64, entries: &[u8]) {
        if self.average != average {
            *self = Self { average, ..Self::default() };
        }
        if self.truncate(at) != at {
            // Some are missing before these.
            return;
        }
        let (entries, _) = entries.as_chunks::<ENTRY>();
        for entry in entries {
            self.size = self.size.saturating_add(length_of(entry));
            self.is_full |= HEAD + MAX_ETAG + self.entries.len() + ENTRY + DIGEST > MAX_INDEX;
            if self.is_full {
                self.entries = Vec::new();
            } else {
                self.entries.extend_from_slice(entry);
            }
        }
    }

    /// Forgets the chunks that end after `limit`; returns where the others end.
    pub(in crate::export) fn truncate(&mut self, limit: u64) -> u64 {
        while self.size > limit {
            let Some(kept) = self.entries.len().checked_sub(ENTRY) else {
                *self = Self { average: self.average, ..Self::default() };
                break;
            };
            let entry = self.entries.split_off(kept);
            self.size = self.size.saturating_sub(entry.first_chunk::<ENTRY>().map_or(0, length_of));
        }
        self.size
    }

    /// The bytes that all chunks have together.
    pub(in crate::export) fn end(&self) -> u64 {
        self.size
    }

    /// Their usual length; `None` of none.
    pub(in crate::export) fn average(&self) -> Option<u32> {
        (self.size > 0).then_some(self.average)
    }

    /// The index of the object that has this entity tag. `None` when it would be too large.
    pub(in crate::export) fn encode(&self, etag: &str) -> Option<Bytes> {
        if self.is_full || etag.len() > MAX_ETAG {
            return None;
        }
        let mut bytes = Vec::with_capacity(HEAD + etag.len() + self.entries.len() + DIGEST);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.average.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&((self.entries.len() / ENTRY) as u32).to_le_bytes());
        bytes.extend_from_slice(&(etag.len() as u16).to_le_bytes());
        bytes.extend_from_slice(etag.as_bytes());
        bytes.extend_from_slice(&self.entries);
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        Some(bytes.into())
    }
}

fn length_of(entry: &[u8; ENTRY]) -> u64 {
    let [a, b, c, d, ..] = *entry;
    u32::from_le_bytes([a, b, c, d]).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AVERAGE: u32 = 64;

    fn cut((number, length): (u8, u32)) -> Cut {
        Cut { length, digest: [number; 32], crc64: 0, is_zero: false }
    }

    fn add(list: &mut ChunkList, cut: Cut) {
        list.extend(AVERAGE, list.end(), &ChunkList::entries_of(&[cut]));
    }

    fn built(chunks: &[(u8, u32)]) -> (Bytes, u64) {
        let mut list = ChunkList::default();
        list.extend(AVERAGE, 0, &[]);
        chunks.iter().for_each(|chunk| add(&mut list, cut(*chunk)));
        (list.encode("\"tag\"").unwrap(), list.end())
    }

    /// The same bytes with a checksum of what they are now.
    fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.truncate(bytes.len() - DIGEST);
        let sum = *blake3::hash(&bytes).as_bytes();
        [bytes, sum.to_vec()].concat()
    }

    fn kind(bytes: &[u8], size: u64, etag: &str) -> Option<ErrorKind> {
        ChunkIndex::decode(bytes, size, etag).err().map(|error| error.kind())
    }

    fn chunks() -> impl Strategy<Value = Vec<(u8, u32)>> {
        proptest::collection::vec((0..20u8, 1..=4 * AVERAGE), 0..60)
    }

    proptest! {
        #[test]
        fn each_chunk_is_found_where_it_is(chunks in chunks(), at in 0..20_000u64) {
            let (bytes, size) = built(&chunks);
            let index = ChunkIndex::decode(&bytes, size, "\"tag\"").unwrap();
            prop_assert_eq!(index.average(), AVERAGE);
            let mut places = Vec::new();
            let end = chunks.iter().fold(0, |at, chunk| {
                places.push((at, *chunk));
                at + u64::from(chunk.1)
            });
            prop_assert_eq!(end, size);
            for &(place, (number, length)) in &places {
                let find = |at| index.offset_of(&[number; 32], length, at);
                prop_assert_eq!(find(Some(place)), Some(place));
                for at in [None, Some(at), Some(size), Some(u64::MAX)] {
                    if let Some(found) = find(at) {
                        prop_assert!(places.contains(&(found, (number, length))));
                    }
                }
                let first = places.iter().find(|(_, chunk)| chunk.0 == number).unwrap();
                prop_assert_eq!(find(None), (first.1.1 == length).then_some(first.0));
            }
            prop_assert_eq!(index.offset_of(&[99; 32], 1, Some(0)), None);
        }

        #[test]
        fn whatever_an_index_says_it_leads_into_the_object(
            chunks in chunks(),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            size in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
        ) {
            let (bytes, whole) = built(&chunks);
            let mut bytes = bytes.to_vec();
            let body = bytes.len() - DIGEST;
            for (at, byte) in changes {
                bytes[at.index(body)] = byte;
            }
            let size = size.unwrap_or(whole);
            if let Ok(index) = ChunkIndex::decode(&resealed(bytes), size, "\"tag\"") {
                prop_assert_eq!(index.offsets.last(), Some(&size));
                for (number, digest) in index.digests.iter().enumerate() {
                    let length = index.length(number);
                    let found = index.offset_of(digest, length as u32, Some(index.offsets[number])).unwrap();
                    prop_assert!(found + length <= size);
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_with_an_index_is_said() {
        let (bytes, size) = built(&[(1, 10), (2, 20)]);
        assert_eq!(kind(&bytes, size, "\"tag\""), None);
        assert_eq!(kind(&bytes, size + 1, "\"tag\""), Some(ErrorKind::Conflict));
        for etag in ["", "\"tag", "\"other\""] {
            assert_eq!(kind(&bytes, size, etag), Some(ErrorKind::Conflict), "{etag}");
        }
        let mut version = bytes.to_vec();
        version[8] = 2;
        assert_eq!(kind(&version, size, "\"tag\""), Some(ErrorKind::Unsupported));
        for length in 0..bytes.len() {
            assert_eq!(
                kind(&bytes[..length], size, "\"tag\""),
                Some(ErrorKind::Damaged),
                "cut off at {length}"
            );
        }
        for at in (0..bytes.len()).filter(|at| !(8..12).contains(at)) {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 0x55;
            assert_eq!(kind(&bytes, size, "\"tag\""), Some(ErrorKind::Damaged), "byte {at} is another one");
        }
        // Each number of the head, and the first chunk's length, with a checksum that is true.
        for (at, number) in [(12, 0), (12, u32::MAX), (24, 1), (24, u32::MAX), (35, 0), (35, 300), (35, 11)] {
            let mut bytes = bytes.to_vec();
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
            assert_eq!(kind(&resealed(bytes), size, "\"tag\""), Some(ErrorKind::Damaged), "{number} at {at}");
        }
    }

    #[test]
    fn too_many_chunks_have_no_index() {
        let mut list = ChunkList::default();
        let most = MAX_INDEX / ENTRY - 40;
        list.extend(AVERAGE, 0, &ChunkList::entries_of(&vec![cut((1, 1)); most]));
        let etag = "e".repeat(MAX_ETAG);
        let bytes = list.encode(&etag).unwrap();
        assert!(bytes.len() <= MAX_INDEX);
        assert_eq!(list.encode(&(etag + "e")), None);
        (0..40).for_each(|_| add(&mut list, cut((1, 1))));
        assert_eq!(list.encode("e"), None);
    }

    #[test]
    fn chunks_that_are_made_again_take_the_place_of_those_before() {
        let cuts: Vec<_> = [(1, 10), (2, 20), (3, 30)].into_iter().map(cut).collect();
        let mut list = ChunkList::default();
        list.extend(AVERAGE, 0, &ChunkList::entries_of(&cuts));
        let whole = list.encode("e");
        for (at, kept) in [(60, 60), (59, 30), (30, 30), (29, 10), (9, 0)] {
            let mut cut = list.clone();
            assert_eq!((cut.truncate(at), cut.end()), (kept, kept), "cut off at {at}");
        }
        list.extend(AVERAGE, 10, &ChunkList::entries_of(&cuts[1..]));
        assert_eq!(list.encode("e"), whole);
        // Chunks before these are missing.
        list.extend(AVERAGE, 61, &ChunkList::entries_of(&cuts[..1]));
        list.extend(AVERAGE, 45, &ChunkList::entries_of(&cuts[..1]));
        assert_eq!(list.end(), 30);
    }
}
