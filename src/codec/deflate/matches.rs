//! Earlier occurrences of what stands at a position, within a small window.

/// Distances of matches are smaller than this.
pub(super) const WINDOW: usize = 4096;

/// Bytes of the shortest and of the longest match (RFC 1951, section 3.2.5).
pub(super) const SHORTEST: usize = 3;
pub(super) const LONGEST: usize = 258;

const HASH_BITS: u32 = 15;
const HASHES: usize = 1 << HASH_BITS;
const SHORT_HASH_BITS: u32 = 11;
const SHORT_HASHES: usize = 1 << SHORT_HASH_BITS;

/// An earlier occurrence; none when the length is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) length: usize,
    pub(super) distance: usize,
}

/// How hard is searched.
#[derive(Clone, Copy)]
pub(super) struct Search {
    /// Candidates that are looked at.
    pub(super) depth: u32,
    /// A match of so many bytes ends the search.
    pub(super) enough: usize,
}

/// Chains of the positions whose first four bytes have the same hash, and the last position of each three bytes.
///
/// Positions are kept modulo 2^16. What stands at one is compared with the input before it counts, so that one from a
/// multiple of 2^16 earlier does no harm. Every position is entered once, in order.
pub(super) struct MatchFinder {
    heads: [u16; HASHES],
    before: [u16; WINDOW],
    threes: [u16; SHORT_HASHES],
    next: Next,
}

/// Of the next position: looked up a step ahead, because the tables are larger than a processor's fastest memory.
#[derive(Clone, Copy, Default)]
struct Next {
    word: u32,
    hash: usize,
    candidate: u16,
}

impl Default for MatchFinder {
    fn default() -> Self {
        let (heads, before, threes) = ([0; HASHES], [0; WINDOW], [0; SHORT_HASHES]);
        Self { heads, before, threes, next: Next::default() }
    }
}

impl MatchFinder {
    /// Forgets everything: this input comes next.
    pub(super) fn restart(&mut self, input: &[u8]) {
        self.heads.fill(0);
        self.before.fill(0);
        self.threes.fill(0);
        self.look_ahead(input, 0);
    }

    #[inline(always)]
    fn look_ahead(&mut self, input: &[u8], at: usize) {
        // What ends the input has no word; nothing is searched there.
        let word = word_at(input, at).unwrap_or(0);
        let hash = hash_of_four(word);
        self.next = Next { word, hash, candidate: self.heads[hash] };
    }

    /// Enters the next position, `at`.
    #[inline(always)]
    pub(super) fn enter(&mut self, input: &[u8], at: usize) {
        let Next { word, hash, candidate } = self.next;
        self.threes[hash_of_three(word)] = at as u16;
        self.before[at % WINDOW] = candidate;
        self.heads[hash % HASHES] = at as u16;
        self.look_ahead(input, at + 1);
    }

    /// Enters the next position, `at`, and finds the longest match there, the nearest one of those, if one is longer than
    /// `least`.
    #[inline(always)]
    pub(super) fn find(&mut self, input: &[u8], at: usize, least: usize, search: Search) -> Match {
        let Next { word, mut candidate, .. } = self.next;
        let three = self.threes[hash_of_three(word)];
        self.enter(input, at);
        if input.len() < at + 4 {
            return Match::default();
        }
        let here = &input[at..input.len().min(at + LONGEST)];
        let reach = at.min(WINDOW - 1);
        let mut best = Match { length: least.max(SHORTEST), distance: 0 };
        let distance = distance_to(three, at);
        if least < SHORTEST
            && (1..=reach).contains(&distance)
            && word_at(input, at - distance).is_some_and(|other| (other ^ word) << 8 == 0)
        {
            best.distance = distance;
        }
        let (mut nearer, mut distance) = (0, distance_to(candidate, at));
        for _ in 0..search.depth {
            // Chains lead farther back until they leave the window.
            if distance <= nearer || distance > reach {
                break;
            }
            let there = &input[at - distance..];
            if word_at(there, 0) == Some(word) && there.get(best.length) == here.get(best.length) {
                let length = common(here, there);
                if length > best.length {
                    best = Match { length, distance };
                    if length >= search.enough || length == here.len() {
                        break;
                    }
                }
            }
            nearer = distance;
            candidate = self.before[usize::from(candidate) % WINDOW];
            distance = distance_to(candidate, at);
        }
        if best.distance == 0 { Match::default() } else { best }
    }
}

/// How far back a position is that is known modulo 2^16.
#[inline(always)]
fn distance_to(position: u16, at: usize) -> usize {
    (at as u16).wrapping_sub(position).into()
}

#[inline(always)]
fn word_at(input: &[u8], at: usize) -> Option<u32> {
    input.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Knuth's multiplicative hash: the golden ratio's fraction of 2^32.
const GOLDEN: u32 = 0x9e37_79b1;

#[inline(always)]
fn hash_of_four(word: u32) -> usize {
    (word.wrapping_mul(GOLDEN) >> (32 - HASH_BITS)) as usize
}

#[inline(always)]
fn hash_of_three(word: u32) -> usize {
    ((word << 8).wrapping_mul(GOLDEN) >> (32 - SHORT_HASH_BITS)) as usize
}

/// How many bytes both begin with; the first four are equal.
#[inline(always)]
fn common(here: &[u8], there: &[u8]) -> usize {
    let there = &there[..here.len()];
    let mut length = 4;
    while let (Some(a), Some(b)) = (here[length..].first_chunk(), there[length..].first_chunk()) {
        let difference = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if difference != 0 {
            return length + (difference.trailing_zeros() / 8) as usize;
        }
        length += 8;
    }
    length + here[length..].iter().zip(&there[length..]).take_while(|(a, b)| a == b).count()
}
