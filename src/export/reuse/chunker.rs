//! A file cut into chunks by its content, so that what is inserted or removed moves the cuts that follow along with it.
//!
//! A chunk ends at the first place behind its shortest length that its content offers (`gear`). Long runs of zeros are
//! chunks of their own. Where a chunk ends depends on its bytes alone: not on what stands before it, nor on how the bytes
//! arrive.

use crc_fast::CrcAlgorithm;

use super::gear;
use crate::units::{GIB, KIB, MIB};

/// A chunk's BLAKE3 digest.
pub(in crate::export) type Digest = [u8; 32];

/// Largest file whose chunks have the smallest average: 2^18 of them.
const SMALL_FILE: u64 = 16 * GIB;
/// Average length of the chunks of such a file.
const SMALLEST_AVERAGE: u32 = 64 * KIB as u32;
/// Longest average: a chunk is held in memory whole.
pub(super) const LONGEST_AVERAGE: u32 = 16 * MIB as u32;

/// How long chunks are. They end earlier only at the file's end and at runs of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::export) struct ChunkSizes {
    /// Shortest chunk, and shortest run of zeros at a chunk's beginning that is a chunk of its own. Where it is half of the
    /// average, half of the bytes need no search for an end.
    pub(in crate::export) min: u32,
    /// Usual chunk, and shortest run of zeros inside a chunk that ends it.
    pub(in crate::export) average: u32,
    /// Longest chunk.
    pub(in crate::export) max: u32,
}

impl ChunkSizes {
    /// Those with this average.
    pub(in crate::export) fn with_average(average: u32) -> Self {
        Self { min: average / 2, average, max: average * 4 }
    }

    /// Those for a file of at most so many bytes: 32 KiB, 64 KiB and 256 KiB up to 16 GiB, four times as much for each
    /// four times of that, and not more than 64 MiB. Files of packages are about as long as chunks of 64 KiB: with four times
    /// as long ones, a night's upgrades cost half as many bytes again.
    pub(in crate::export) fn for_file(size_bound: u64) -> Self {
        let (mut average, mut file) = (SMALLEST_AVERAGE, SMALL_FILE);
        while file < size_bound && average < LONGEST_AVERAGE {
            (average, file) = (average * 4, file.saturating_mul(4));
        }
        Self::with_average(average.min(LONGEST_AVERAGE))
    }
}

/// A chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::export) struct Cut {
    /// Its bytes.
    pub(in crate::export) length: u32,
    /// Its digest.
    pub(in crate::export) digest: Digest,
    /// Its CRC-64/NVME.
    pub(in crate::export) crc64: u64,
    /// Whether all of it is zeros.
    pub(in crate::export) is_zero: bool,
}

impl Cut {
    fn of(bytes: &[u8], is_zero: bool) -> Self {
        Self {
            length: bytes.len() as u32,
            digest: *blake3::hash(bytes).as_bytes(),
            crc64: crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes),
            is_zero,
        }
    }
}

/// Cuts one file, whose bytes it is fed in order.
#[derive(Debug)]
pub(in crate::export) struct Chunker {
    sizes: ChunkSizes,
    /// What a hash is below where a chunk may end: once in the difference of average and shortest length.
    limit: u64,
    /// What has been fed of the chunk under way.
    pending: Vec<u8>,
    /// Bytes of `pending` with which looking for its end again is worth while.
    look_at: usize,
    /// The longest chunk of zeros, once there was one.
    zeros: Option<Cut>,
}

/// Where a chunk ends.
struct End {
    length: usize,
    is_zero: bool,
}

impl Chunker {
    /// One that begins at a file's start, or where another one has cut.
    pub(in crate::export) fn new(sizes: ChunkSizes) -> Self {
        let limit = u64::MAX / u64::from(sizes.average - sizes.min);
        Self { sizes, limit, pending: Vec::new(), look_at: 0, zeros: None }
    }

    /// Takes the file's next bytes, and adds the chunks that have ended to `cuts`.
    pub(in crate::export) fn feed(&mut self, mut bytes: &[u8], cuts: &mut Vec<Cut>) {
        while !self.pending.is_empty() {
            let before = self.pending.len();
            let wanted = self.look_at.saturating_sub(before).min(bytes.len());
            self.pending.extend_from_slice(&bytes[..wanted]);
            if self.pending.len() < self.look_at {
                return;
            }
            let Some(end) = self.end(&self.pending, false) else {
                bytes = &bytes[wanted..];
                self.look_later();
                continue;
            };
            let pending = std::mem::take(&mut self.pending);
            cuts.push(self.cut(&pending[..end.length], end.is_zero));
            self.pending = pending;
            if end.length >= before {
                bytes = &bytes[end.length - before..];
                self.pending.clear();
            } else {
                // The end lies before what was just added.
                self.pending.truncate(before);
                self.pending.drain(..end.length);
                self.look_at = self.pending.len();
            }
        }
        while let Some(end) = self.end(bytes, false) {
            cuts.push(self.cut(&bytes[..end.length], end.is_zero));
            bytes = &bytes[end.length..];
        }
        self.pending.extend_from_slice(bytes);
        self.look_later();
    }

    /// The file has ended: the chunks that are left, and the chunker is as new.
    pub(in crate::export) fn finish(&mut self, cuts: &mut Vec<Cut>) {
        let pending = std::mem::take(&mut self.pending);
        let mut rest = &pending[..];
        while let Some(end) = self.end(rest, true) {
            cuts.push(self.cut(&rest[..end.length], end.is_zero));
            rest = &rest[end.length..];
        }
    }

    /// Twice what is pending is looked at next, so that bytes that come singly are not looked at again and again.
    fn look_later(&mut self) {
        let longest = self.sizes.max as usize;
        self.look_at = (2 * self.pending.len()).clamp(self.sizes.min as usize, longest);
    }

    fn cut(&mut self, bytes: &[u8], is_zero: bool) -> Cut {
        if !is_zero || bytes.len() < self.sizes.max as usize {
            return Cut::of(bytes, is_zero);
        }
        self.zeros.get_or_insert_with(|| Cut::of(bytes, true)).clone()
    }

    /// Where the chunk that `bytes` begin with ends, if they tell. They are all that is left of the file if `is_all`.
    fn end(&self, bytes: &[u8], is_all: bool) -> Option<End> {
        let ChunkSizes { min, average, max } = self.sizes;
        let window = &bytes[..bytes.len().min(max as usize)];
        let is_enough = is_all || window.len() == max as usize;
        let zeros = leading_zeros(window);
        if zeros == window.len() {
            return (is_enough && zeros > 0).then_some(End { length: zeros, is_zero: true });
        }
        if zeros >= min as usize {
            return Some(End { length: zeros, is_zero: true });
        }
        let cut = gear::first_cut(window, min as usize, self.limit);
        let content = cut.unwrap_or(window.len());
        if let Some(length) = zero_run(&window[..content], average as usize) {
            return Some(End { length, is_zero: false });
        }
        (is_enough || cut.is_some()).then_some(End { length: content, is_zero: false })
    }
}

/// How many zeros `bytes` begin with.
fn leading_zeros(bytes: &[u8]) -> usize {
    let (blocks, _) = bytes.as_chunks::<64>();
    let whole = 64 * blocks.iter().take_while(|block| is_zero(block)).count();
    whole + bytes[whole..].iter().take_while(|byte| **byte == 0).count()
}

/// How many zeros `bytes` end with.
fn trailing_zeros(bytes: &[u8]) -> usize {
    let (_, blocks) = bytes.as_rchunks::<64>();
    let whole = 64 * blocks.iter().rev().take_while(|block| is_zero(block)).count();
    whole + bytes[..bytes.len() - whole].iter().rev().take_while(|byte| **byte == 0).count()
}

fn is_zero(block: &[u8; 64]) -> bool {
    let (words, _) = block.as_chunks::<8>();
    words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word)) == 0
}

/// Where the first run of at least `length` zeros begins, other than at the start.
fn zero_run(bytes: &[u8], length: usize) -> Option<usize> {
    // Each such run has a byte in one of these places.
    let mut at = length - 1;
    while at < bytes.len() {
        let after = leading_zeros(&bytes[at..]);
        if after > 0 {
            let start = at - trailing_zeros(&bytes[..at]);
            if at + after - start >= length && start > 0 {
                return Some(start);
            }
        }
        at += after.max(1).next_multiple_of(length);
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZES: ChunkSizes = ChunkSizes { min: 128, average: 256, max: 1024 };

    /// The cuts of a file that is fed in pieces of these lengths, in turn.
    fn cuts(bytes: &[u8], pieces: &[usize]) -> Vec<Cut> {
        let (mut chunker, mut cuts) = (Chunker::new(SIZES), Vec::new());
        let (mut rest, mut pieces) = (bytes, pieces.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*pieces.next().unwrap()).clamp(1, rest.len()));
            chunker.feed(piece, &mut cuts);
            rest = after;
        }
        chunker.finish(&mut cuts);
        cuts
    }

    fn whole(bytes: &[u8]) -> Vec<Cut> {
        cuts(bytes, &[bytes.len().max(1)])
    }

    /// Bytes as disks have them: of any kind, zeros, and zeros with something in between.
    fn disk() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            3 => (any::<u64>(), 0..3000usize).prop_map(|(seed, length)| {
                let mut random = fastrand::Rng::with_seed(seed);
                (0..length).map(|_| random.u8(..)).collect()
            }),
            2 => (0..3000usize).prop_map(|length| vec![0; length]),
            1 => (0..300usize, 1..40usize).prop_map(|(length, times)| {
                [vec![0; length], vec![7]].concat().repeat(times)
            }),
            1 => (any::<u8>(), 0..2000usize).prop_map(|(byte, length)| vec![byte; length]),
        ];
        proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn cuts_are_the_same_however_the_file_is_fed(
            bytes in disk(),
            pieces in proptest::collection::vec(prop_oneof![1..20usize, 1..2000usize], 1..10),
        ) {
            prop_assert_eq!(cuts(&bytes, &pieces), whole(&bytes));
        }

        #[test]
        fn cuts_are_the_same_from_any_cut_on(bytes in disk()) {
            let all = whole(&bytes);
            let mut at = 0;
            for (number, cut) in all.iter().enumerate() {
                prop_assert_eq!(&whole(&bytes[at..]), &all[number..]);
                at += cut.length as usize;
            }
        }

        #[test]
        fn chunks_are_what_they_say_and_the_whole_file(bytes in disk()) {
            let mut rest = &bytes[..];
            for cut in whole(&bytes) {
                prop_assert!((1..=SIZES.max).contains(&cut.length));
                let (chunk, after) = rest.split_at(cut.length as usize);
                let is_zero = chunk.iter().all(|byte| *byte == 0);
                prop_assert_eq!(&cut, &Cut::of(chunk, is_zero));
                rest = after;
            }
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn long_runs_of_zeros_are_chunks_of_their_own(bytes in disk()) {
            let (mut at, mut ours) = (0, vec![false; bytes.len()]);
            for cut in whole(&bytes) {
                let end = at + cut.length as usize;
                ours[at..end].fill(cut.is_zero);
                at = end;
            }
            let mut at = 0;
            while at < bytes.len() {
                let length = leading_zeros(&bytes[at..]);
                let outside = ours[at..at + length].iter().filter(|is_zero| !**is_zero).count();
                let most = (SIZES.average + SIZES.min) as usize;
                prop_assert!(outside < most, "{} of {} zeros are sent", outside, length);
                at += length + 1;
            }
        }

        #[test]
        fn what_is_inserted_costs_the_chunks_around_it(
            seed: u64,
            at in 0..30_000usize,
            inserted in proptest::collection::vec(any::<u8>(), 1..50),
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let old: Vec<u8> = (0..30_000).map(|_| random.u8(..)).collect();
            let new = [&old[..at], &inserted, &old[at..]].concat();
            let known: Vec<_> = whole(&old).into_iter().map(|cut| cut.digest).collect();
            let changed: u32 =
                whole(&new).iter().filter(|cut| !known.contains(&cut.digest)).map(|cut| cut.length).sum();
            prop_assert!(changed <= 12 * SIZES.max, "{} bytes are other chunks", changed);
        }
    }

    #[test]
    fn the_number_of_chunks_of_large_files_is_bounded_and_so_are_chunks() {
        let sizes = |size| ChunkSizes::for_file(size);
        assert_eq!(sizes(0), ChunkSizes { min: 32 << 10, average: 64 << 10, max: 256 << 10 });
        assert_eq!(sizes(16 * GIB), sizes(0));
        assert_eq!(sizes(16 * GIB + 1).average, 256 << 10);
        for shift in 30..42 {
            let size = 1u64 << shift;
            assert!(size / u64::from(sizes(size).average) <= 1 << 18, "{size}");
        }
        assert_eq!(sizes(u64::MAX), ChunkSizes { min: 8 << 20, average: 16 << 20, max: 64 << 20 });
    }

    #[test]
    fn zeros_are_found_wherever_they_are() {
        for length in 1..20 {
            for before in 0..45 {
                for after in 0..3 {
                    let bytes = [vec![1; before], vec![0; length], vec![1; after]].concat();
                    for least in 1..22 {
                        let expected = (length >= least && before > 0).then_some(before);
                        assert_eq!(zero_run(&bytes, least), expected, "{before} {length} {after} {least}");
                    }
                }
            }
        }
    }
}
