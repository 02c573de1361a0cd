//! Where a file may be cut: behind each 64 bytes whose hash is small.
//!
//! The hash is Gear (Xia et al., "Ddelta: A Deduplication-Inspired Fast Delta Compression Approach", 2014), which FastCDC
//! uses too. It depends on its last 64 bytes only, and so several places can be looked at side by side: a processor that
//! rolls a single hash waits for its own results most of the time, and takes one and a half times as long.

/// Bytes that the hash is made of.
pub(super) const WINDOW: usize = 64;
/// Series of bytes that are hashed side by side.
const LANES: usize = 4;
/// Bytes of a series.
const LANE: usize = 2048;

/// A random number for each byte, by SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).
const GEAR: [u64; 256] = {
    let mut gear = [0; 256];
    let (mut state, mut byte) = (0_u64, 0);
    while byte < 256 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        gear[byte] = mixed ^ (mixed >> 31);
        byte += 1;
    }
    gear
};

/// The first length of at least `least` at which `bytes` may be cut: where the hash is below `limit`. `least` is more than
/// a window.
pub(super) fn first_cut(bytes: &[u8], least: usize, limit: u64) -> Option<usize> {
    let mut at = least - 1;
    while let Some(block) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        if let Some(length) = first_in_block(bytes, at, block, limit) {
            return Some(length);
        }
        at += LANES * LANE;
    }
    let mut hash = hash_before(bytes, at);
    let found = bytes.get(at..)?.iter().position(|byte| {
        hash = rolled(hash, *byte);
        hash < limit
    })?;
    Some(at + found + 1)
}

/// The same within a block that stands at `at`.
fn first_in_block(bytes: &[u8], at: usize, block: &[u8; LANES * LANE], limit: u64) -> Option<usize> {
    let (lanes, _) = block.as_chunks::<LANE>();
    let [one, two, three, four] = lanes else { return None };
    let [mut first, mut second, mut third, mut fourth] =
        [0, 1, 2, 3].map(|lane| hash_before(bytes, at + lane * LANE));
    let mut found = [None; LANES];
    for place in 0..LANE {
        first = rolled(first, one[place]);
        second = rolled(second, two[place]);
        third = rolled(third, three[place]);
        fourth = rolled(fourth, four[place]);
        if first < limit || second < limit || third < limit || fourth < limit {
            for (lane, hash) in [first, second, third, fourth].into_iter().enumerate() {
                if hash < limit {
                    found[lane].get_or_insert(at + lane * LANE + place + 1);
                }
            }
            // The others come later.
            if found[0].is_some() {
                break;
            }
        }
    }
    found.into_iter().flatten().next()
}

/// The hash over the window before a place.
fn hash_before(bytes: &[u8], at: usize) -> u64 {
    let window = bytes.get(at.saturating_sub(WINDOW)..at).unwrap_or_default();
    window.iter().fold(0, |hash, byte| rolled(hash, *byte))
}

#[inline]
fn rolled(hash: u64, byte: u8) -> u64 {
    (hash << 1).wrapping_add(GEAR[usize::from(byte)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_first_cut_is_the_first_window_with_a_small_hash(
            seed: u64,
            length in 0..20_000usize,
            least in WINDOW + 1..300,
            bits in 6..16u32,
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
            let limit = u64::MAX >> bits;
            let is_cut = |length: &usize| hash_before(&bytes, *length) < limit;
            prop_assert_eq!(first_cut(&bytes, least, limit), (least..=length).find(is_cut));
        }
    }

    #[test]
    fn bytes_that_are_all_the_same_are_not_cut_again_and_again() {
        for byte in 0..=255 {
            assert_eq!(first_cut(&[byte; 1000], WINDOW + 1, u64::MAX >> 14), None, "{byte}");
        }
    }
}
