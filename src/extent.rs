//! The algebra of extents: which bytes are data, known zeros, or holes, and where the allocated units are.

use sha2::{Digest, Sha256};

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

/// Units that share one rank sample.
const CHUNK_UNITS: u64 = 4096;
const WORDS: usize = (CHUNK_UNITS / 64) as usize;

#[derive(Clone, Debug)]
enum Chunk {
    Empty,
    Full,
    Mixed(Box<[u64; WORDS]>),
}

impl Chunk {
    fn word(&self, index: usize) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Full => u64::MAX,
            Self::Mixed(words) => words[index],
        }
    }

    /// Allocated units before `unit`, which is at most [`CHUNK_UNITS`].
    fn rank(&self, unit: u64) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Full => unit,
            Self::Mixed(words) => {
                let (full, rest) = ((unit / 64) as usize, unit % 64);
                let head: u32 = words[..full].iter().map(|w| w.count_ones()).sum();
                let tail = if rest == 0 { 0 } else { (words[full] & ((1 << rest) - 1)).count_ones() };
                u64::from(head + tail)
            }
        }
    }
}

/// Which units (clusters, grains, blocks) of a disk hold data: a bitmap with rank samples.
///
/// `rank` and `select` take constant and logarithmic time; memory is 1 bit a unit where allocation is mixed and
/// 24 bytes per 4096 units where it is not.
#[derive(Clone, Debug)]
pub struct AllocationMap {
    unit_size: u64,
    units: u64,
    chunks: Vec<Chunk>,
    /// Allocated units before each chunk, and their total at the end.
    ranks: Vec<u64>,
}

impl AllocationMap {
    /// Starts a map of ⌈`virtual_size` / `unit_size`⌉ units, none allocated.
    pub fn builder(virtual_size: u64, unit_size: u64) -> AllocationMapBuilder {
        let units = virtual_size.div_ceil(unit_size);
        let chunks = vec![Chunk::Empty; units.div_ceil(CHUNK_UNITS) as usize];
        AllocationMapBuilder { map: Self { unit_size, units, chunks, ranks: Vec::new() } }
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
        self.ranks.last().copied().unwrap_or(0)
    }

    /// Whether unit `unit` is allocated; `false` past the end.
    pub fn is_allocated(&self, unit: u64) -> bool {
        if unit >= self.units {
            return false;
        }
        let in_chunk = unit % CHUNK_UNITS;
        self.chunks[(unit / CHUNK_UNITS) as usize].word((in_chunk / 64) as usize) >> (in_chunk % 64) & 1 == 1
    }

    /// Allocated units before `unit`; units past the end count as none.
    pub fn rank(&self, unit: u64) -> u64 {
        let unit = unit.min(self.units);
        let chunk = (unit / CHUNK_UNITS) as usize;
        match self.chunks.get(chunk) {
            Some(found) => self.ranks[chunk] + found.rank(unit % CHUNK_UNITS),
            None => self.allocated(),
        }
    }

    /// The unit that has `rank` allocated units before it and is allocated itself.
    pub fn select(&self, rank: u64) -> Option<u64> {
        if rank >= self.allocated() {
            return None;
        }
        let chunk = self.ranks.partition_point(|&before| before <= rank) - 1;
        let mut left = rank - self.ranks[chunk];
        let base = chunk as u64 * CHUNK_UNITS;
        if let Chunk::Full = self.chunks[chunk] {
            return Some(base + left);
        }
        for index in 0..WORDS {
            let mut word = self.chunks[chunk].word(index);
            let ones = u64::from(word.count_ones());
            if left < ones {
                for _ in 0..left {
                    word &= word - 1;
                }
                return Some(base + index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            left -= ones;
        }
        None
    }

    /// How many units from `unit` on are all allocated or all not, at most `limit`; 0 only past the end.
    pub fn run_length(&self, unit: u64, limit: u64) -> u64 {
        let end = self.units.min(unit.saturating_add(limit));
        if unit >= end {
            return 0;
        }
        let allocated = self.is_allocated(unit);
        let mut at = unit;
        while at < end {
            let chunk = &self.chunks[(at / CHUNK_UNITS) as usize];
            match chunk {
                Chunk::Empty | Chunk::Full if matches!(chunk, Chunk::Full) == allocated => {
                    at = (at / CHUNK_UNITS + 1) * CHUNK_UNITS;
                }
                Chunk::Empty | Chunk::Full => break,
                Chunk::Mixed(words) => {
                    let word = words[(at % CHUNK_UNITS / 64) as usize];
                    let same = if allocated { word } else { !word } >> (at % 64);
                    let run = u64::from((!same).trailing_zeros()).min(64 - at % 64);
                    at += run;
                    if !at.is_multiple_of(64) || run == 0 {
                        break;
                    }
                }
            }
        }
        at.min(end) - unit
    }

    /// For each unit of `units`, in order, its rank if it is allocated: what tables of offsets are made of.
    pub fn ranked(&self, units: std::ops::Range<u64>) -> impl Iterator<Item = Option<u64>> + '_ {
        let mut rank = self.rank(units.start);
        units.map(move |unit| {
            self.is_allocated(unit).then(|| {
                rank += 1;
                rank - 1
            })
        })
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

/// Collects marks in any order into an [`AllocationMap`].
#[derive(Debug)]
pub struct AllocationMapBuilder {
    map: AllocationMap,
}

impl AllocationMapBuilder {
    /// Marks every unit that the `length` bytes from `start` touch; what lies past the end is ignored.
    pub fn mark(&mut self, start: VirtualOffset, length: u64) {
        if length == 0 {
            return;
        }
        let mut unit = start.bytes() / self.map.unit_size;
        let end = start.bytes().saturating_add(length).div_ceil(self.map.unit_size).min(self.map.units);
        while unit < end {
            let chunk_index = unit / CHUNK_UNITS;
            let chunk_start = chunk_index * CHUNK_UNITS;
            let stop = end.min(chunk_start + CHUNK_UNITS);
            let chunk = &mut self.map.chunks[chunk_index as usize];
            if unit == chunk_start && stop == chunk_start + CHUNK_UNITS {
                *chunk = Chunk::Full;
            } else if !matches!(chunk, Chunk::Full) {
                if let Chunk::Empty = chunk {
                    *chunk = Chunk::Mixed(Box::new([0; WORDS]));
                }
                if let Chunk::Mixed(words) = chunk {
                    set_bits(words, unit - chunk_start, stop - chunk_start);
                }
            }
            unit = stop;
        }
    }

    /// Ends the map: full chunks are folded, ranks sampled.
    pub fn finish(mut self) -> AllocationMap {
        let mut total = 0;
        let mut ranks = Vec::with_capacity(self.map.chunks.len() + 1);
        for chunk in &mut self.map.chunks {
            ranks.push(total);
            if matches!(chunk, Chunk::Mixed(words) if words.iter().all(|&w| w == u64::MAX)) {
                *chunk = Chunk::Full;
            }
            total += chunk.rank(CHUNK_UNITS);
        }
        ranks.push(total);
        self.map.ranks = ranks;
        self.map
    }
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
            marks in prop::collection::vec((0u64..20_000, 1u64..9_000), 0..12),
        ) {
            let mut plain = vec![false; units as usize];
            let mut builder = AllocationMap::builder(units * 512 - 100, 512);
            for (start, length) in marks {
                builder.mark(VirtualOffset(start * 512 + 7), length * 512 - 300);
                for unit in start..(start * 512 + 7 + length * 512 - 300).div_ceil(512) {
                    if let Some(slot) = plain.get_mut(unit as usize) {
                        *slot = true;
                    }
                }
            }
            let map = builder.finish();
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
        }
    }
}
