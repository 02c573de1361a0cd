//! Huffman codes of a limited length (RFC 1951, section 3.2.2).

/// Lengths and codes of an alphabet of `N` symbols. A symbol of length 0 does not occur.
pub(super) struct Code<const N: usize> {
    pub(super) lengths: [u8; N],
    /// The codes' bits, the first in the lowest place.
    pub(super) codes: [u16; N],
}

/// Longest code of any alphabet.
const LONGEST: usize = 15;

impl<const N: usize> Code<N> {
    /// The code that needs the fewest bits for these counts, none longer than `limit`.
    pub(super) fn of(counts: &[u32; N], limit: usize) -> Self {
        let lengths = lengths_for(counts, limit);
        Self { codes: codes_for(&lengths), lengths }
    }

    /// The code with these lengths.
    pub(super) fn with(lengths: [u8; N]) -> Self {
        Self { codes: codes_for(&lengths), lengths }
    }

    /// A symbol's code and its bits.
    #[inline]
    pub(super) fn of_symbol(&self, symbol: usize) -> (u32, u32) {
        (self.codes[symbol].into(), self.lengths[symbol].into())
    }

    /// Bits of all symbols that were counted.
    pub(super) fn cost(&self, counts: &[u32; N]) -> u64 {
        counts.iter().zip(&self.lengths).map(|(&count, &length)| u64::from(count) * u64::from(length)).sum()
    }
}

/// Optimal lengths, cut to the limit. At least two symbols get a length, so that every inflater takes the code.
fn lengths_for<const N: usize>(counts: &[u32; N], limit: usize) -> [u8; N] {
    let mut lengths = [0; N];
    let mut used: Vec<(u32, u16)> = Vec::with_capacity(N);
    used.extend(
        counts.iter().zip(0..).filter(|(count, _)| **count > 0).map(|(&count, symbol)| (count, symbol)),
    );
    for symbol in 0..2u16 {
        if used.len() < 2 && counts[usize::from(symbol)] == 0 {
            used.push((1, symbol));
        }
    }
    used.sort_unstable();
    let mut per_length = depths(&used);
    limit_depths(&mut per_length, limit);
    // The rarest symbols have the longest codes.
    let mut symbols = used.iter().map(|&(_, symbol)| usize::from(symbol));
    for length in (1..=limit).rev() {
        for symbol in symbols.by_ref().take(per_length[length] as usize) {
            lengths[symbol] = length as u8;
        }
    }
    lengths
}

/// How many leaves of a Huffman tree over these sorted weights stand at each depth; those deeper than any code count as
/// if they stood at the last one.
fn depths(sorted: &[(u32, u16)]) -> [u32; LONGEST + 1] {
    let leaves = sorted.len();
    // Two queues: the leaves, and the inner nodes, which are made in the order of their weights.
    let mut weights = Vec::with_capacity(leaves);
    let mut parents = vec![0u16; 2 * leaves];
    let (mut leaf, mut inner) = (0, 0);
    for node in 0..leaves - 1 {
        let mut weight = 0;
        for _ in 0..2 {
            let is_leaf = match (sorted.get(leaf), weights.get(inner)) {
                (Some((count, _)), Some(&sum)) => *count <= sum,
                (Some(_), None) => true,
                _ => false,
            };
            if is_leaf {
                weight += sorted[leaf].0;
                parents[leaf] = node as u16;
                leaf += 1;
            } else {
                weight += weights[inner];
                parents[leaves + inner] = node as u16;
                inner += 1;
            }
        }
        weights.push(weight);
    }
    let mut per_length = [0; LONGEST + 1];
    let mut depth_of = vec![0u8; leaves.max(2)];
    for node in (0..leaves - 2).rev() {
        depth_of[node] = depth_of[usize::from(parents[leaves + node])].saturating_add(1);
    }
    for &parent in &parents[..leaves] {
        per_length[(usize::from(depth_of[usize::from(parent)]) + 1).min(LONGEST)] += 1;
    }
    per_length
}

/// Moves leaves so that none is deeper than the limit and the code is complete (Kraft's sum is one).
fn limit_depths(per_length: &mut [u32; LONGEST + 1], limit: usize) {
    for length in limit + 1..=LONGEST {
        per_length[limit] += std::mem::take(&mut per_length[length]);
    }
    let kraft = |per_length: &[u32; LONGEST + 1]| -> u64 {
        (1..=limit).map(|length| u64::from(per_length[length]) << (limit - length)).sum()
    };
    let mut sum = kraft(per_length);
    while sum > 1 << limit {
        // A leaf of the deepest level that is above the limit becomes a node of two: itself and one from the limit.
        let Some(length) = (1..limit).rev().find(|&length| per_length[length] > 0) else { return };
        per_length[length] -= 1;
        per_length[length + 1] += 2;
        per_length[limit] -= 1;
        sum -= 1;
    }
}

/// Canonical codes, bit by bit reversed.
fn codes_for<const N: usize>(lengths: &[u8; N]) -> [u16; N] {
    let mut per_length = [0u16; LONGEST + 1];
    lengths.iter().filter(|length| **length > 0).for_each(|&length| per_length[usize::from(length)] += 1);
    let mut next = [0u16; LONGEST + 2];
    for length in 1..=LONGEST {
        next[length + 1] = (next[length] + per_length[length]) << 1;
    }
    let mut codes = [0; N];
    for (code, &length) in codes.iter_mut().zip(lengths).filter(|(_, length)| **length > 0) {
        let next = &mut next[usize::from(length)];
        *code = next.reverse_bits() >> (16 - length);
        *next += 1;
    }
    codes
}
