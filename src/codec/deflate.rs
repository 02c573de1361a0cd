//! A deflate compressor (RFC 1951) for windows below 4 KiB.
//!
//! libdeflate has no option for a window, and zlib's search is slow where QEMU opens streams with 12 bits of it. The
//! input is cut into literals and matches with one step of lazy evaluation ([`matches`]); these are counted in
//! groups, and neighbouring groups that are coded best together become a block ([`blocks`]). All of it is integer
//! arithmetic without state from one input to the next, so equal inputs give equal streams on every machine.

mod bits;
mod blocks;
mod huffman;
mod matches;

use self::bits::BitWriter;
use self::blocks::{Token, Tokens};
use self::matches::{Match, MatchFinder, Search};

/// What each level from 1 on spends. On a Debian root filesystem level 5 makes what zlib makes at level 9.
const LEVELS: [Effort; 9] = [
    Effort::new(1, 1, 16, 4),
    Effort::new(3, 1, 16, 4),
    Effort::new(4, 2, 24, 8),
    Effort::new(6, 2, 32, 8),
    Effort::new(8, 3, 32, 8),
    Effort::new(8, 4, 64, 16),
    Effort::new(16, 8, 64, 24),
    Effort::new(32, 16, 128, 32),
    Effort::new(128, 64, 258, 258),
];

/// The highest level.
pub(super) const HIGHEST_LEVEL: u8 = LEVELS.len() as u8;

struct Effort {
    /// Candidates for the match at a position.
    first: Search,
    /// Candidates for a longer match at the next position.
    lazy: Search,
    /// A match of so many bytes is taken without looking at the next position.
    good: usize,
}

impl Effort {
    const fn new(depth: u32, lazy: u32, enough: usize, good: usize) -> Self {
        Self { first: Search { depth, enough }, lazy: Search { depth: lazy, enough }, good }
    }
}

/// A compressor with its tables, about 100 KiB.
#[derive(Default)]
pub(super) struct Deflater {
    finder: Box<MatchFinder>,
    tokens: Tokens,
}

impl Deflater {
    /// One raw deflate stream, distances below 4096. Levels above the highest count as that.
    pub(super) fn compress(&mut self, input: &[u8], level: u8) -> Vec<u8> {
        let effort = &LEVELS[usize::from(level.clamp(1, HIGHEST_LEVEL) - 1)];
        self.tokens.clear();
        self.parse(input, effort);
        let mut out = BitWriter::with_capacity(input.len() / 2);
        self.tokens.write(input, &mut out);
        out.finish()
    }

    /// Cuts the input into literals and matches: a match gives way to a better one that begins a byte later.
    fn parse(&mut self, input: &[u8], effort: &Effort) {
        self.finder.restart(input);
        let mut at = 0;
        let mut found = self.finder.find(input, at, 0, effort.first);
        while at < input.len() {
            if found.length == 0 {
                self.tokens.push(Token::literal(input[at]));
                at += 1;
                found = self.finder.find(input, at, 0, effort.first);
                continue;
            }
            let mut entered = at + 1;
            if found.length < effort.good {
                let later = self.finder.find(input, at + 1, found.length - 1, effort.lazy);
                entered += 1;
                if is_better(later, found) {
                    self.tokens.push(Token::literal(input[at]));
                    (at, found) = (at + 1, later);
                    continue;
                }
            }
            self.tokens.push(Token::of(found));
            at += found.length;
            for position in entered..at {
                self.finder.enter(input, position);
            }
            found = self.finder.find(input, at, 0, effort.first);
        }
    }
}

/// Whether a match is worth the literal before it: a byte more counts four bits, a distance twice as far one.
fn is_better(later: Match, found: Match) -> bool {
    let bits = |found: Match| 4 * found.length as u32 + 32 - found.distance.max(1).ilog2();
    later.length > 0 && bits(later) > bits(found) + 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes as three inflaters read the stream.
    fn inflated(stream: &[u8], length: usize) -> [Vec<u8>; 3] {
        let mut first = vec![0; length];
        super::super::inflate_raw(stream, &mut first).unwrap();
        let mut second = vec![0; length + 1];
        let mut inflate = zlib_rs::Inflate::new(false, 15);
        let status = inflate.decompress(stream, &mut second, zlib_rs::InflateFlush::Finish).unwrap();
        assert_eq!((status, inflate.total_in()), (zlib_rs::Status::StreamEnd, stream.len() as u64));
        second.truncate(inflate.total_out() as usize);
        let third = miniz_oxide::inflate::decompress_to_vec(stream).unwrap();
        [first, second, third]
    }

    fn check(input: &[u8]) {
        let mut deflater = Deflater::default();
        for level in 1..=HIGHEST_LEVEL {
            let stream = deflater.compress(input, level);
            assert_eq!(inflated(&stream, input.len()), [input; 3], "level {level}");
            assert!(deflater.tokens.farthest() < 4096, "beyond QEMU's window");
            assert!(stream.len() <= input.len() + input.len() / 1000 + 16, "level {level}: {}", stream.len());
            assert_eq!(Deflater::default().compress(input, level), stream, "depends on what came before");
        }
    }

    /// Bytes with runs, copies from all distances, and skewed and even literals.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            (1usize..6000).prop_map(|length| Piece::Copy { back: length, length: 1 + length % 700 }),
            (1usize..9000, 1usize..300).prop_map(|(back, length)| Piece::Copy { back, length }),
            (any::<u8>(), 1usize..600).prop_map(|(byte, length)| Piece::Run { byte, length }),
            (any::<u64>(), 1usize..3000, 1u32..256).prop_map(|(seed, length, symbols)| Piece::Noise {
                seed,
                length,
                symbols
            }),
        ];
        prop::collection::vec(piece, 0..60).prop_map(|pieces| {
            let mut bytes = Vec::new();
            pieces.into_iter().for_each(|piece| piece.append(&mut bytes));
            bytes
        })
    }

    #[derive(Clone, Debug)]
    enum Piece {
        Copy { back: usize, length: usize },
        Run { byte: u8, length: usize },
        Noise { seed: u64, length: usize, symbols: u32 },
    }

    impl Piece {
        fn append(self, bytes: &mut Vec<u8>) {
            match self {
                Self::Copy { back, length } => {
                    let from = bytes.len().saturating_sub(back);
                    for at in from..(from + length).min(bytes.len()) {
                        bytes.push(bytes[at]);
                    }
                }
                Self::Run { byte, length } => bytes.resize(bytes.len() + length, byte),
                Self::Noise { seed, length, symbols } => {
                    let mut random = fastrand::Rng::with_seed(seed);
                    bytes.extend((0..length).map(|_| random.u32(..symbols) as u8));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn three_inflaters_read_what_was_compressed(input in bytes()) {
            check(&input);
        }
    }

    #[test]
    fn edges_of_the_format_are_reached() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut noise =
            |length: usize| -> Vec<u8> { std::iter::repeat_with(|| random.u8(..)).take(length).collect() };
        // Nothing, single bytes, stored blocks of more than one length field, and codes that reach their longest.
        for length in [0, 1, 2, 3, 4, 258, 259, 65535, 65536, 200_000] {
            check(&noise(length));
            check(&vec![7; length]);
        }
        let block = noise(300);
        for gap in [4095 - 300, 4096 - 300, 4097 - 300, 6000 - 300] {
            check(&[&block[..], &vec![0; gap], &block].concat());
        }
        let fibonacci = (0..22u8).scan((1usize, 1usize), |(a, b), byte| {
            (*a, *b) = (*b, *a + *b);
            Some(vec![byte.wrapping_mul(37); *a])
        });
        let mut skewed: Vec<u8> = fibonacci.flatten().collect();
        random.shuffle(&mut skewed);
        check(&skewed);
    }

    #[test]
    fn higher_levels_are_smaller_and_none_is_larger_than_zlibs() {
        // Words in a skewed order, as text and tables have them.
        let mut random = fastrand::Rng::with_seed(3);
        let words: Vec<Vec<u8>> =
            (0..800).map(|_| (0..random.usize(2..9)).map(|_| random.u8(97..117)).collect()).collect();
        let text: Vec<u8> = (0..12_000)
            .flat_map(|_| words[random.usize(..800) * random.usize(..800) / 800].clone())
            .take(65536)
            .collect();
        let sizes: Vec<usize> =
            (1..=HIGHEST_LEVEL).map(|level| Deflater::default().compress(&text, level).len()).collect();
        assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
        let mut zlib = zlib_rs::Deflate::new(9, false, 12);
        zlib.compress(&text, &mut vec![0; 65536], zlib_rs::DeflateFlush::Finish).unwrap();
        assert!(sizes[4] as u64 <= zlib.total_out() * 101 / 100, "{sizes:?}, zlib {}", zlib.total_out());
    }
}
