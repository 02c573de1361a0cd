//! The algebra of extents: which bytes are data, known zeros, or holes, and where the allocated units are.

use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::units::VirtualOffset;

/// What a run of bytes is known to be without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that must be read. When unsure, a reader says this.
    Data,
    /// Allocated and reading as zeros.
    Zero,
    /// Not allocated, reading as zeros.
    Hole,
}

impl ExtentKind {
    /// Whether the bytes have to be read.
    pub fn is_data(self) -> bool {
        self == Self::Data
    }
}

/// A run of bytes of one kind, starting at the place that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What the bytes are.
    pub kind: ExtentKind,
    /// How many bytes, at least 1. It need not be maximal.
    pub length: u64,
}

impl Extent {
    /// An extent of `length` bytes.
    pub fn new(kind: ExtentKind, length: u64) -> Self {
        Self { kind, length }
    }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Folding with `or` inside a chunk has no branch, so that the compiler vectorises it.
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|&byte| byte == 0)
}

/// Units that share one rank sample.
const CHUNK_UNITS: u64 = 4096;
const WORDS: usize = (CHUNK_UNITS / 64) as usize;

/// The bits of a chunk.
type Bits = [u64; WORDS];

/// What the units of a chunk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Empty,
    Full,
    /// Some of them are allocated: the bits with that index.
    Mixed(usize),
}

/// Chunks that follow one another and are all empty or all full, or one whose units differ.
#[derive(Clone, Copy, Debug)]
struct Span {
    first_chunk: u64,
    /// Allocated units before it.
    rank: u64,
    content: Content,
}

/// Which units (clusters, grains, blocks) of a disk hold data: a bitmap with rank samples, without the parts of it in
/// which all bits are equal.
///
/// Everything takes time that grows with the logarithm of the map. Memory: 1 bit a unit where allocation is mixed, and
/// 32 bytes for each chunk of 4096 units that is mixed or begins a run of equal ones. So a disk of any size in which
/// nothing is allocated takes 32 bytes.
#[derive(Clone, Debug)]
pub struct AllocationMap {
    unit_size: u64,
    units: u64,
    allocated: u64,
    /// Ascending; each ends where the next one begins, and the first begins at chunk 0.
    spans: Vec<Span>,
    bits: Vec<Bits>,
}

impl AllocationMap {
    /// Starts a map of ⌈`virtual_size` / `unit_size`⌉ units, none allocated.
    pub fn builder(virtual_size: u64, unit_size: u64) -> AllocationMapBuilder {
        let map = Self {
            unit_size,
            units: virtual_size.div_ceil(unit_size),
            allocated: 0,
            spans: Vec::new(),
            bits: Vec::new(),
        };
        AllocationMapBuilder {
            map,
            last_start: 0,
            marked_to: 0,
            chunk: 0,
            words: [0; WORDS],
            has_bits: false,
        }
    }

    /// The map of no disk, for layouts in which allocation does not matter.
    pub fn empty() -> Self {
        Self { unit_size: 1, units: 0, allocated: 0, spans: Vec::new(), bits: Vec::new() }
    }

    /// Bytes in a unit.
    pub fn unit_size(&self) -> u64 {
        self.unit_size
    }

    /// Number of units.
    pub fn units(&self) -> u64 {
        self.units
    }

    /// Number of allocated units.
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// Bytes of memory that the map takes.
    pub fn memory(&self) -> usize {
        size_of_val(&*self.spans) + size_of_val(&*self.bits)
    }

    /// The index of the span that `unit`, which lies inside the disk, is in.
    fn span_index(&self, unit: u64) -> usize {
        self.spans.partition_point(|span| span.first_chunk <= unit / CHUNK_UNITS) - 1
    }

    /// The first unit after a span.
    fn span_end(&self, index: usize) -> u64 {
        let next = self.spans.get(index + 1).map(|next| next.first_chunk * CHUNK_UNITS);
        next.unwrap_or(self.units).min(self.units)
    }

    /// Whether unit `unit` is allocated; `false` past the end.
    pub fn is_allocated(&self, unit: u64) -> bool {
        if unit >= self.units {
            return false;
        }
        match self.spans[self.span_index(unit)].content {
            Content::Empty => false,
            Content::Full => true,
            Content::Mixed(index) => {
                let within = unit % CHUNK_UNITS;
                self.bits[index][(within / 64) as usize] >> (within % 64) & 1 == 1
            }
        }
    }

    /// Allocated units before `unit`; units past the end count as none.
    pub fn rank(&self, unit: u64) -> u64 {
        if unit >= self.units {
            return self.allocated;
        }
        let span = &self.spans[self.span_index(unit)];
        span.rank
            + match span.content {
                Content::Empty => 0,
                Content::Full => unit - span.first_chunk * CHUNK_UNITS,
                Content::Mixed(index) => rank_in(&self.bits[index], unit % CHUNK_UNITS),
            }
    }

    /// The unit that has `rank` allocated units before it and is allocated itself.
    pub fn select(&self, rank: u64) -> Option<u64> {
        if rank >= self.allocated {
            return None;
        }
        // Of spans with one rank all but the last are empty.
        let span = &self.spans[self.spans.partition_point(|span| span.rank <= rank) - 1];
        let (base, left) = (span.first_chunk * CHUNK_UNITS, rank - span.rank);
        match span.content {
            Content::Empty => None,
            Content::Full => Some(base + left),
            Content::Mixed(index) => select_in(&self.bits[index], left).map(|within| base + within),
        }
    }

    /// How many units from `unit` on are all allocated or all not, at most `limit`; 0 only past the end.
    pub fn run_length(&self, unit: u64, limit: u64) -> u64 {
        let end = self.units.min(unit.saturating_add(limit));
        if unit >= end {
            return 0;
        }
        let allocated = self.is_allocated(unit);
        let mut at = unit;
        for index in self.span_index(unit)..self.spans.len() {
            let span_end = self.span_end(index);
            at = match self.spans[index].content {
                Content::Empty if allocated => break,
                Content::Full if !allocated => break,
                Content::Empty | Content::Full => span_end,
                Content::Mixed(bits) => {
                    let base = self.spans[index].first_chunk * CHUNK_UNITS;
                    (base + next_in(&self.bits[bits], at - base, !allocated)).min(span_end)
                }
            };
            if at < span_end || at >= end {
                break;
            }
        }
        at.min(end) - unit
    }

    /// The allocated units of `units`, in order, each with its rank. What is not allocated takes no time.
    pub fn allocated_in(&self, units: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (mut at, end) = (units.start, units.end.min(self.units));
        let mut rank = self.rank(at);
        let mut index = if at < end { self.span_index(at) } else { 0 };
        std::iter::from_fn(move || {
            while at < end {
                let span = &self.spans[index];
                let span_end = self.span_end(index);
                at = match span.content {
                    Content::Empty => span_end,
                    Content::Full => at,
                    Content::Mixed(bits) => {
                        let base = span.first_chunk * CHUNK_UNITS;
                        (base + next_in(&self.bits[bits], at - base, true)).min(span_end)
                    }
                };
                if at < span_end.min(end) {
                    (at, rank) = (at + 1, rank + 1);
                    index += usize::from(at == span_end);
                    return Some((at - 1, rank - 1));
                }
                index += 1;
            }
            None
        })
    }

    /// For each unit of `units`, in order, its rank if it is allocated: what tables of offsets are made of.
    pub fn ranked(&self, units: Range<u64>) -> impl Iterator<Item = Option<u64>> + '_ {
        let mut allocated = self.allocated_in(units.clone()).peekable();
        units.map(move |unit| allocated.next_if(|(found, _)| *found == unit).map(|(_, rank)| rank))
    }

    /// Which groups of `size` units have any that is allocated: a map of units of one byte.
    pub fn groups(&self, size: u64) -> Result<AllocationMap> {
        let mut groups = AllocationMap::builder(self.units.div_ceil(size), 1);
        let mut rank = 0;
        while let Some(unit) = self.select(rank) {
            groups.mark(VirtualOffset(unit / size), 1)?;
            rank = self.rank((unit / size + 1) * size);
        }
        groups.finish()
    }

    /// SHA-256 of the units' size and of all runs: equal for equal maps, however they are kept.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let mut add = |number: u64| hash.update(number.to_le_bytes());
        add(self.unit_size);
        add(self.units);
        add(self.is_allocated(0).into());
        let mut unit = 0;
        while unit < self.units {
            let run = self.run_length(unit, u64::MAX);
            add(run);
            unit += run;
        }
        hash.finalize().into()
    }

    /// Whether any unit in `start..end` is allocated.
    pub fn any_allocated(&self, start: u64, end: u64) -> bool {
        self.rank(end) > self.rank(start)
    }
}

/// Set bits before `within`.
fn rank_in(bits: &Bits, within: u64) -> u64 {
    let (full, rest) = ((within / 64) as usize, within % 64);
    let head: u32 = bits[..full].iter().map(|word| word.count_ones()).sum();
    let tail = if rest == 0 { 0 } else { (bits[full] & ((1 << rest) - 1)).count_ones() };
    u64::from(head + tail)
}

/// The set bit with `rank` set ones before it.
fn select_in(bits: &Bits, mut rank: u64) -> Option<u64> {
    for (index, word) in bits.iter().enumerate() {
        let ones = u64::from(word.count_ones());
        if rank < ones {
            let word = (0..rank).fold(*word, |word, _| word & (word - 1));
            return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
        }
        rank -= ones;
    }
    None
}

/// The first bit at or after `from` that is `set`, or the chunk's end.
fn next_in(bits: &Bits, from: u64, set: bool) -> u64 {
    let mut mask = u64::MAX << (from % 64);
    for (index, word) in bits.iter().enumerate().skip((from / 64) as usize) {
        let found = if set { *word } else { !word } & mask;
        if found != 0 {
            return index as u64 * 64 + u64::from(found.trailing_zeros());
        }
        mask = u64::MAX;
    }
    CHUNK_UNITS
}

/// Collects marks, in the order of their starts, into an [`AllocationMap`].
#[derive(Debug)]
pub struct AllocationMapBuilder {
    map: AllocationMap,
    /// The first unit of the last mark, and the first one that no mark has reached.
    last_start: u64,
    marked_to: u64,
    /// The chunk that is being filled, and its bits.
    chunk: u64,
    words: Bits,
    has_bits: bool,
}

impl AllocationMapBuilder {
    /// Marks every unit that the `length` bytes from `start` touch; what lies past the end is ignored. Marks may
    /// overlap, and none starts before the one before it.
    ///
    /// # Errors
    /// [`TooLarge`](ErrorKind::TooLarge) when there is no memory for it.
    pub fn mark(&mut self, start: VirtualOffset, length: u64) -> Result<()> {
        let first = start.bytes() / self.map.unit_size;
        let end = start.bytes().saturating_add(length).div_ceil(self.map.unit_size).min(self.map.units);
        if first < self.last_start {
            return Err(Error::new(ErrorKind::Internal, "extents are not in the order of the disk").at(start));
        }
        self.last_start = first;
        let mut unit = first.max(self.marked_to);
        if length == 0 || unit >= end {
            return Ok(());
        }
        self.marked_to = end;
        while unit < end {
            self.begin(unit / CHUNK_UNITS)?;
            let whole = (end - unit) / CHUNK_UNITS;
            if unit.is_multiple_of(CHUNK_UNITS) && whole > 0 {
                self.push(Content::Full, whole)?;
                unit += whole * CHUNK_UNITS;
            } else {
                let chunk_start = self.chunk * CHUNK_UNITS;
                let stop = end.min(chunk_start + CHUNK_UNITS);
                set_bits(&mut self.words, unit - chunk_start, stop - chunk_start);
                self.has_bits = true;
                unit = stop;
            }
        }
        Ok(())
    }

    /// Ends the map.
    pub fn finish(mut self) -> Result<AllocationMap> {
        self.begin(self.map.units.div_ceil(CHUNK_UNITS))?;
        self.map.spans.shrink_to_fit();
        self.map.bits.shrink_to_fit();
        Ok(self.map)
    }

    /// Ends the chunk that is being filled, if it is not `chunk`, which no mark has filled yet.
    fn begin(&mut self, chunk: u64) -> Result<()> {
        if self.has_bits && chunk > self.chunk {
            if self.words.iter().all(|&word| word == u64::MAX) {
                self.push(Content::Full, 1)?;
            } else {
                self.map.bits.try_reserve(1).map_err(no_memory)?;
                self.map.bits.push(self.words);
                self.push(Content::Mixed(self.map.bits.len() - 1), 1)?;
            }
            self.words = [0; WORDS];
            self.has_bits = false;
        }
        if chunk > self.chunk {
            self.push(Content::Empty, chunk - self.chunk)?;
        }
        Ok(())
    }

    /// Adds `chunks` chunks of one content at the end.
    fn push(&mut self, content: Content, chunks: u64) -> Result<()> {
        if self.map.spans.last().is_none_or(|last| last.content != content) {
            self.map.spans.try_reserve(1).map_err(no_memory)?;
            self.map.spans.push(Span { first_chunk: self.chunk, rank: self.map.allocated, content });
        }
        self.chunk += chunks;
        self.map.allocated += match content {
            Content::Empty => 0,
            Content::Full => chunks * CHUNK_UNITS,
            Content::Mixed(index) => rank_in(&self.map.bits[index], CHUNK_UNITS),
        };
        Ok(())
    }
}

fn no_memory(error: std::collections::TryReserveError) -> Error {
    Error::new(ErrorKind::TooLarge, "there is no memory for the map of the disk's data").because(error)
}

fn set_bits(words: &mut [u64; WORDS], mut from: u64, to: u64) {
    while from < to {
        let stop = to.min((from / 64 + 1) * 64);
        let width = stop - from;
        let mask = if width == 64 { u64::MAX } else { ((1 << width) - 1) << (from % 64) };
        words[(from / 64) as usize] |= mask;
        from = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_booleans(
            units in 1u64..20_000,
            mut marks in prop::collection::vec((0u64..20_000, 1u64..9_000), 0..12),
            (from, to, size) in (0u64..20_000, 0u64..20_000, 1u64..5000),
        ) {
            let mut plain = vec![false; units as usize];
            let mut builder = AllocationMap::builder(units * 512 - 100, 512);
            marks.sort_unstable();
            for (start, length) in marks {
                builder.mark(VirtualOffset(start * 512 + 7), length * 512 - 300).unwrap();
                for unit in start..(start * 512 + 7 + length * 512 - 300).div_ceil(512) {
                    if let Some(slot) = plain.get_mut(unit as usize) {
                        *slot = true;
                    }
                }
            }
            let map = builder.finish().unwrap();
            prop_assert_eq!(map.units(), units);
            let mut rank = 0;
            for unit in 0..units {
                prop_assert_eq!(map.rank(unit), rank);
                prop_assert_eq!(map.is_allocated(unit), plain[unit as usize]);
                if plain[unit as usize] {
                    prop_assert_eq!(map.select(rank), Some(unit));
                    rank += 1;
                }
            }
            prop_assert_eq!(map.allocated(), rank);
            prop_assert_eq!(map.select(rank), None);
            let mut unit = 0;
            while unit < units {
                let run = map.run_length(unit, u64::MAX);
                let expected = plain[unit as usize..].iter().take_while(|&&b| b == plain[unit as usize]).count();
                prop_assert_eq!(run, expected as u64);
                unit += run;
            }
            let is_set = |unit: u64| plain.get(unit as usize).copied().unwrap_or(false);
            let set: Vec<_> = (from..to).filter(|&unit| is_set(unit)).collect();
            prop_assert_eq!(map.allocated_in(from..to).map(|(unit, _)| unit).collect::<Vec<_>>(), set.clone());
            let ranks: Vec<_> = map.ranked(from..to).collect();
            let expected: Vec<_> = (from..to).map(|unit| is_set(unit).then(|| map.rank(unit))).collect();
            prop_assert_eq!(ranks, expected);
            let groups = map.groups(size).unwrap();
            for group in 0..units.div_ceil(size) {
                let any = (group * size..(group + 1) * size).any(is_set);
                prop_assert_eq!(groups.is_allocated(group), any);
            }
        }
    }

    #[test]
    fn what_is_not_allocated_costs_nothing() {
        let size = 1 << 63;
        let mut builder = AllocationMap::builder(size, 512);
        for at in [0, 1 << 40, 1 << 62] {
            builder.mark(VirtualOffset(at), 1 << 36).unwrap();
        }
        builder.mark(VirtualOffset(size - 1), 1).unwrap();
        let map = builder.finish().unwrap();
        assert!(map.memory() < 2000, "{}", map.memory());
        assert_eq!(map.allocated(), 3 * (1 << 27) + 1);
        assert_eq!(map.select(3 << 27), Some(map.units() - 1));
        // Every second unit, the worst there is: little more than a bit for each.
        let mut builder = AllocationMap::builder(1 << 20, 1);
        (0..1 << 20).step_by(2).for_each(|at| builder.mark(VirtualOffset(at), 1).unwrap());
        assert!(builder.finish().unwrap().memory() < (1 << 20) / 8 * 11 / 10);
    }

    #[test]
    fn marks_out_of_order_are_an_error() {
        let mut builder = AllocationMap::builder(1 << 20, 1);
        builder.mark(VirtualOffset(5000), 10).unwrap();
        assert!(builder.mark(VirtualOffset(10), 10).is_err());
    }
}
