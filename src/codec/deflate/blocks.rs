//! Blocks of a deflate stream (RFC 1951, section 3.2).

use super::bits::BitWriter;
use super::huffman::Code;
use super::matches::{Match, SHORTEST, WINDOW};

const LITERALS: usize = 288;
const DISTANCES: usize = 30;
const END: usize = 256;
const LENGTH_CODES: usize = 19;
/// In which order the lengths of the code for lengths stand.
const ORDER: [usize; LENGTH_CODES] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
/// Bytes of the longest stored block.
const STORED: usize = 65535;

/// What a stream is made of: literals and matches, in the order of the input.
///
/// From the lowest bit on: 9 bits of a literal's byte, or 256 + length - 3 of a match; 5 bits of the distance's symbol and
/// 12 of the distance, of a literal [`NO_DISTANCE`] and 0. So both are written by the same steps, without a branch.
#[derive(Clone, Copy)]
pub(super) struct Token(u32);

const NO_DISTANCE: usize = 30;
const KINDS: usize = 512;
/// Kind of the shortest match.
const MATCHES: usize = 256;

impl Token {
    #[inline]
    pub(super) fn literal(byte: u8) -> Self {
        Self(u32::from(byte) | (NO_DISTANCE as u32) << 9)
    }

    #[inline]
    pub(super) fn of(found: Match) -> Self {
        let kind = MATCHES + found.length - SHORTEST;
        let symbol = DISTANCE_SYMBOLS[found.distance % WINDOW];
        Self(kind as u32 | u32::from(symbol) << 9 | (found.distance as u32) << 14)
    }

    #[inline]
    fn kind(self) -> usize {
        self.0 as usize % KINDS
    }

    #[inline]
    fn distance_symbol(self) -> usize {
        (self.0 >> 9) as usize % 32
    }

    #[inline]
    fn distance(self) -> u32 {
        self.0 >> 14
    }
}

/// A length as it is coded: symbol, number of extra bits, and the value of the symbol.
#[derive(Clone, Copy)]
struct Symbol {
    symbol: u16,
    extra: u8,
    base: u16,
}

/// The symbol of each kind.
static SYMBOLS: [Symbol; KINDS] = symbols();

const fn symbols() -> [Symbol; KINDS] {
    let mut table = [Symbol { symbol: 0, extra: 0, base: 0 }; KINDS];
    let mut kind = 0;
    while kind < MATCHES {
        table[kind].symbol = kind as u16;
        kind += 1;
    }
    let mut symbol = 257u16;
    while kind < KINDS - 1 {
        let extra = if symbol < 265 { 0 } else { ((symbol - 261) / 4) as u8 };
        let (base, mut left) = (kind as u16, 1usize << extra);
        while left > 0 && kind < KINDS - 1 {
            table[kind] = Symbol { symbol, extra, base };
            kind += 1;
            left -= 1;
        }
        symbol += 1;
    }
    table[KINDS - 1] = Symbol { symbol: 285, extra: 0, base: KINDS as u16 - 1 };
    table
}

/// The symbol of each distance.
static DISTANCE_SYMBOLS: [u8; WINDOW] = distance_symbols();

const fn distance_symbols() -> [u8; WINDOW] {
    let mut table = [0; WINDOW];
    let mut distance = 1;
    while distance < WINDOW {
        let value = distance as u32 - 1;
        table[distance] = if value < 4 {
            value as u8
        } else {
            let log = value.ilog2();
            (2 * log + ((value >> (log - 1)) & 1)) as u8
        };
        distance += 1;
    }
    table
}

/// Extra bits of a distance's symbol.
const fn distance_extra(symbol: usize) -> u32 {
    if symbol < 4 || symbol >= NO_DISTANCE { 0 } else { symbol as u32 / 2 - 1 }
}

/// Smallest distance of a symbol; of [`NO_DISTANCE`] and those above it 0.
const fn distance_base(symbol: usize) -> u32 {
    match symbol {
        0..4 => symbol as u32 + 1,
        4..NO_DISTANCE => ((2 + (symbol as u32 & 1)) << distance_extra(symbol)) + 1,
        _ => 0,
    }
}

/// How often each symbol occurs.
#[derive(Clone)]
struct Counts {
    literals: [u32; LITERALS],
    distances: [u32; DISTANCES],
    /// Extra bits of all of them.
    extra: u64,
    /// Bytes that they stand for.
    bytes: usize,
}

impl Counts {
    const NONE: Self = Self { literals: [0; LITERALS], distances: [0; DISTANCES], extra: 0, bytes: 0 };

    fn of(tokens: &[Token]) -> Self {
        let (mut kinds, mut distances) = ([0u32; KINDS], [0u32; 32]);
        for token in tokens {
            kinds[token.kind()] += 1;
            distances[token.distance_symbol()] += 1;
        }
        let mut counts = Self::NONE;
        for (kind, (&count, symbol)) in kinds.iter().zip(&SYMBOLS).enumerate() {
            counts.literals[usize::from(symbol.symbol)] += count;
            counts.extra += u64::from(count) * u64::from(symbol.extra);
            let length = if kind < MATCHES { 1 } else { kind - MATCHES + SHORTEST };
            counts.bytes += count as usize * length;
        }
        counts.distances.copy_from_slice(&distances[..DISTANCES]);
        let extra = |(symbol, &count): (usize, &u32)| u64::from(count) * u64::from(distance_extra(symbol));
        counts.extra += counts.distances.iter().enumerate().map(extra).sum::<u64>();
        counts
    }

    fn add(&mut self, other: &Self) {
        self.literals.iter_mut().zip(&other.literals).for_each(|(a, b)| *a += b);
        self.distances.iter_mut().zip(&other.distances).for_each(|(a, b)| *a += b);
        self.extra += other.extra;
        self.bytes += other.bytes;
    }

    /// About the bits of a block with these counts, in 1/256.
    fn estimate(&self) -> u64 {
        let (mut bits, mut used) = (0, 0);
        for (counts, header) in [(&self.literals[..], 4 * 256), (&self.distances[..], 3 * 256)] {
            let total: u32 = counts.iter().sum();
            bits += u64::from(total) * u64::from(log(total));
            for &count in counts {
                bits -= u64::from(count) * u64::from(log(count));
                used += if count > 0 { header } else { 0 };
            }
        }
        bits + used + 256 * (self.extra + 60)
    }
}

/// The binary logarithm in 1/256 of values below 1024, of 0 zero. Integers, so that it is the same everywhere.
static LOGS: [u16; 1024] = logs();

const fn logs() -> [u16; 1024] {
    let mut table = [0; 1024];
    let mut value = 1;
    while value < 1024 {
        let whole = (value as u32).ilog2();
        // Between 1 and 2 by squaring: each time that the square passes 2 is one bit of the fraction.
        let (mut rest, mut fraction, mut bit) = ((value as u64) << (31 - whole), 0, 0);
        while bit < 8 {
            rest = (rest * rest) >> 31;
            fraction <<= 1;
            if rest >= 1 << 32 {
                fraction |= 1;
                rest >>= 1;
            }
            bit += 1;
        }
        table[value] = (whole << 8) as u16 | fraction;
        value += 1;
    }
    table
}

#[inline]
fn log(value: u32) -> u32 {
    let shift = 22u32.saturating_sub(value.leading_zeros());
    u32::from(LOGS[(value >> shift) as usize % 1024]) + (shift << 8)
}

/// Tokens that are counted at once; blocks consist of whole groups.
const GROUP: usize = 1024;

/// The tokens of an input and how they are cut into blocks.
#[derive(Default)]
pub(super) struct Tokens {
    tokens: Vec<Token>,
}

/// A block.
struct Block {
    tokens: std::ops::Range<usize>,
    /// Where its bytes begin.
    start: usize,
    counts: Counts,
}

impl Tokens {
    #[inline]
    pub(super) fn push(&mut self, token: Token) {
        self.tokens.push(token);
    }

    pub(super) fn clear(&mut self) {
        self.tokens.clear();
    }

    /// The largest distance of a match.
    #[cfg(test)]
    pub(super) fn farthest(&self) -> u32 {
        self.tokens.iter().map(|token| token.distance()).max().unwrap_or(0)
    }

    /// Writes all of them, as the final blocks of a stream.
    pub(super) fn write(&self, input: &[u8], out: &mut BitWriter) {
        let mut block = Block { tokens: 0..0, start: 0, counts: Counts::NONE };
        let mut cost = 0;
        for group in self.tokens.chunks(GROUP) {
            let counts = Counts::of(group);
            let alone = counts.estimate();
            let mut joined = block.counts.clone();
            joined.add(&counts);
            let together = joined.estimate();
            if together <= cost + alone || block.tokens.is_empty() {
                (block.counts, cost) = (joined, together);
            } else {
                self.write_block(&block, input, false, out);
                let (tokens, start) = (block.tokens.end, block.start + block.counts.bytes);
                block = Block { tokens: tokens..tokens, start, counts };
                cost = alone;
            }
            block.tokens.end += group.len();
        }
        self.write_block(&block, input, true, out);
    }

    fn write_block(&self, block: &Block, input: &[u8], is_final: bool, out: &mut BitWriter) {
        let mut counts = block.counts.clone();
        counts.literals[END] += 1;
        let (dynamic, header) = Codes::dynamic(&counts);
        let fixed = Codes::fixed();
        let last = u64::from(is_final);
        let (dynamic_bits, fixed_bits) = (header.bits() + dynamic.bits(&counts), fixed.bits(&counts));
        let bytes = &input[block.start..block.start + counts.bytes];
        let stored = stored_bits(bytes.len());
        if stored < dynamic_bits.min(fixed_bits) {
            return write_stored(bytes, is_final, out);
        }
        let codes = if fixed_bits <= dynamic_bits {
            out.put(last | 1 << 1, 3);
            fixed
        } else {
            out.put(last | 2 << 1, 3);
            header.write(out);
            dynamic
        };
        codes.write(&self.tokens[block.tokens.clone()], out);
    }
}

/// Bits of a block without compression, with its head.
fn stored_bits(bytes: usize) -> u64 {
    8 * bytes as u64 + 40 * bytes.div_ceil(STORED).max(1) as u64
}

fn write_stored(bytes: &[u8], is_final: bool, out: &mut BitWriter) {
    let mut chunks = bytes.chunks(STORED).peekable();
    while let Some(chunk) = chunks.next() {
        out.put(u64::from(is_final && chunks.peek().is_none()), 3);
        let length = chunk.len() as u16;
        out.put_bytes(&length.to_le_bytes());
        out.put_bytes(&(!length).to_le_bytes());
        out.put_bytes(chunk);
    }
}

/// The two codes of a block.
struct Codes {
    literals: Code<LITERALS>,
    distances: Code<DISTANCES>,
}

impl Codes {
    fn dynamic(counts: &Counts) -> (Self, Header) {
        let codes =
            Self { literals: Code::of(&counts.literals, 15), distances: Code::of(&counts.distances, 15) };
        let header = Header::of(&codes);
        (codes, header)
    }

    fn fixed() -> Self {
        let mut literals = [8; LITERALS];
        literals[144..256].fill(9);
        literals[256..280].fill(7);
        Self { literals: Code::with(literals), distances: Code::with([5; DISTANCES]) }
    }

    fn bits(&self, counts: &Counts) -> u64 {
        3 + self.literals.cost(&counts.literals) + self.distances.cost(&counts.distances) + counts.extra
    }

    fn write(&self, tokens: &[Token], out: &mut BitWriter) {
        // Bits of each kind with the extra bits of its length, and their number.
        let kinds: [(u32, u32); KINDS] = std::array::from_fn(|kind| {
            let Symbol { symbol, extra, base } = SYMBOLS[kind];
            let (code, length) = self.literals.of_symbol(usize::from(symbol));
            let value = (kind as u32).wrapping_sub(base.into()) & ((1 << extra) - 1);
            (code | value << length, length + u32::from(extra))
        });
        let distances: [DistanceCode; 32] = std::array::from_fn(|symbol| {
            let (code, length) = if symbol < DISTANCES { self.distances.of_symbol(symbol) } else { (0, 0) };
            DistanceCode { code, length, base: distance_base(symbol), bits: length + distance_extra(symbol) }
        });
        for token in tokens {
            let (word, count) = kinds[token.kind()];
            let distance = &distances[token.distance_symbol()];
            let value = u64::from(token.distance().wrapping_sub(distance.base)) << distance.length;
            out.put(u64::from(word) | (u64::from(distance.code) | value) << count, count + distance.bits);
        }
        let (code, length) = self.literals.of_symbol(END);
        out.put(code.into(), length);
    }
}

/// How the distances of a symbol are written.
struct DistanceCode {
    code: u32,
    length: u32,
    base: u32,
    /// With the extra bits.
    bits: u32,
}

/// How a block tells its codes (RFC 1951, section 3.2.7).
struct Header {
    literals: usize,
    distances: usize,
    /// Symbols of the code for lengths, with the value and the number of their extra bits.
    symbols: Vec<(u8, u8, u8)>,
    code: Code<LENGTH_CODES>,
    /// Lengths of that code that are told.
    told: usize,
}

impl Header {
    fn of(codes: &Codes) -> Self {
        let used = |lengths: &[u8], least: usize| {
            lengths.iter().rposition(|length| *length > 0).map_or(least, |last| (last + 1).max(least))
        };
        let literals = used(&codes.literals.lengths, 257);
        let distances = used(&codes.distances.lengths, 1);
        let lengths = [&codes.literals.lengths[..literals], &codes.distances.lengths[..distances]].concat();
        let symbols = run_lengths(&lengths);
        let mut counts = [0; LENGTH_CODES];
        symbols.iter().for_each(|(symbol, ..)| counts[usize::from(*symbol)] += 1);
        let code = Code::of(&counts, 7);
        let told =
            ORDER.iter().rposition(|&symbol| code.lengths[symbol] > 0).map_or(4, |last| (last + 1).max(4));
        Self { literals, distances, symbols, code, told }
    }

    fn bits(&self) -> u64 {
        let each =
            |(symbol, _, extra): &(u8, u8, u8)| u64::from(self.code.lengths[usize::from(*symbol)] + extra);
        14 + 3 * self.told as u64 + self.symbols.iter().map(each).sum::<u64>()
    }

    fn write(&self, out: &mut BitWriter) {
        out.put((self.literals - 257) as u64, 5);
        out.put((self.distances - 1) as u64, 5);
        out.put((self.told - 4) as u64, 4);
        for &symbol in &ORDER[..self.told] {
            out.put(self.code.lengths[symbol].into(), 3);
        }
        for &(symbol, value, extra) in &self.symbols {
            let symbol = usize::from(symbol);
            out.put(self.code.codes[symbol].into(), self.code.lengths[symbol].into());
            out.put(value.into(), extra.into());
        }
    }
}

/// Lengths as symbols: 16 repeats the last one, 17 and 18 are runs of zeros.
fn run_lengths(lengths: &[u8]) -> Vec<(u8, u8, u8)> {
    let mut symbols = Vec::with_capacity(lengths.len());
    for run in lengths.chunk_by(|a, b| a == b) {
        let (length, mut left) = (run[0], run.len());
        if length != 0 {
            symbols.push((length, 0, 0));
            left -= 1;
        }
        let (short, long) = if length == 0 { (3..=10, 138) } else { (3..=6, 6) };
        while left >= 3 {
            let taken = left.min(long);
            symbols.push(match (length, taken) {
                (0, taken) if short.contains(&taken) => (17, taken as u8 - 3, 3),
                (0, taken) => (18, taken as u8 - 11, 7),
                (_, taken) => (16, taken as u8 - 3, 2),
            });
            left -= taken;
        }
        symbols.extend(std::iter::repeat_n((length, 0, 0), left));
    }
    symbols
}
