//! A file cut into chunks by its content, so that what is inserted or removed moves the cuts that follow along with it.
//!
//! FastCDC (Xia et al., "The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage Systems",
//! 2020) finds the cuts. Long runs of zeros are chunks of their own. Where a chunk ends depends on its bytes alone: not
//! on what stands before it, nor on how the bytes arrive.

use crc_fast::CrcAlgorithm;
use fastcdc::v2020::{self, Normalization};

use crate::units::{GIB, KIB, MIB};

/// A chunk's BLAKE3 digest.
pub(in crate::export) type Digest = [u8; 32];

/// Largest file whose chunks have the smallest average: 2^18 of them.
const SMALL_FILE: u64 = 64 * GIB;
/// Average length of the chunks of such a file.
const SMALLEST_AVERAGE: u32 = 256 * KIB as u32;
/// Longest average: a chunk is held in memory whole.
pub(super) const LONGEST_AVERAGE: u32 = 16 * MIB as u32;

/// How long chunks are. They end earlier only at the file's end and at runs of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::export) struct ChunkSizes {
    /// Shortest chunk, and shortest run of zeros at a chunk's beginning that is a chunk of its own.
    pub(in crate::export) min: u32,
    /// Usual chunk, and shortest run of zeros inside a chunk that ends it.
    pub(in crate::export) average: u32,
    /// Longest chunk.
    pub(in crate::export) max: u32,
}

impl ChunkSizes {
    /// Those with this average.
    pub(in crate::export) fn with_average(average: u32) -> Self {
        Self { min: average / 4, average, max: average * 4 }
    }

    /// Those for a file of at most so many bytes: 64 KiB, 256 KiB and 1 MiB up to 64 GiB, four times as much for each
    /// four times of that, and not more than 64 MiB.
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
    /// FastCDC's masks below and above the average.
    masks: (u64, u64),
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
        let masks = v2020::select_masks(sizes.average as usize, Normalization::Level1);
        Self { sizes, masks, pending: Vec::new(), look_at: 0, zeros: None }
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
        let content = self.content_end(window);
        if let Some(length) = zero_run(&window[..content], average as usize) {
            return Some(End { length, is_zero: false });
        }
        (is_enough || content < window.len()).then_some(End { length: content, is_zero: false })
    }

    /// Where FastCDC ends the chunk; at the window's end if it does not tell.
    fn content_end(&self, window: &[u8]) -> usize {
        let ChunkSizes { min, average, max } = self.sizes;
        let (min, average, max) = (min as usize, average as usize, max as usize);
        let (strict, loose) = self.masks;
        v2020::cut(window, min, average, max, strict, loose, strict << 1, loose << 1).1
    }
}

/// How many zeros `bytes` begin with.
fn leading_zeros(bytes: &[u8]) -> usize {
    let (blocks, _) = bytes.as_chunks::<64>();
    let whole = 64 * blocks.iter().take_while(|block| is_zero(*block)).count();
    whole + bytes[whole..].iter().take_while(|byte| **byte == 0).count()
}

/// How many zeros `bytes` end with.
fn trailing_zeros(bytes: &[u8]) -> usize {
    let (_, blocks) = bytes.as_rchunks::<64>();
    let whole = 64 * blocks.iter().rev().take_while(|block| is_zero(*block)).count();
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
