//! CRC-64/NVME of bytes whose pieces' are known, a hundred times as fast as `crc_fast` combines any CRC.

/// The polynomial with its bits reversed, without x^64 (NVM Command Set specification, "64b CRC Polynomial").
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// x^(8 * 2^n) for each n.
const POWERS: [u64; 64] = {
    // The highest bit is x^0.
    let mut powers = [1 << (63 - 8); 64];
    let mut n = 1;
    while n < 64 {
        powers[n] = product(powers[n - 1], powers[n - 1]);
        n += 1;
    }
    powers
};

/// The product of two polynomials.
const fn product(one: u64, mut other: u64) -> u64 {
    let (mut sum, mut bit) = (0, 1 << 63);
    while bit > 0 {
        if one & bit > 0 {
            sum ^= other;
        }
        other = (other >> 1) ^ if other & 1 > 0 { POLYNOMIAL } else { 0 };
        bit >>= 1;
    }
    sum
}

/// The CRC of bytes with the CRC `first` and `length` bytes behind them with the CRC `second`.
pub(super) fn joined(first: u64, second: u64, length: u64) -> u64 {
    let powers = POWERS.iter().enumerate().filter(|(n, _)| length >> n & 1 > 0);
    powers.fold(first, |crc, (_, power)| product(crc, *power)) ^ second
}

#[cfg(test)]
mod tests {
    use crc_fast::CrcAlgorithm::Crc64Nvme;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn joined_crcs_are_those_of_all_bytes(bytes in any::<Vec<u8>>(), at in any::<prop::sample::Index>()) {
            let crc = |bytes: &[u8]| crc_fast::checksum(Crc64Nvme, bytes);
            let (first, second) = bytes.split_at(at.index(bytes.len() + 1));
            prop_assert_eq!(joined(crc(first), crc(second), second.len() as u64), crc(&bytes));
        }

        #[test]
        fn lengths_have_no_limit(first: u64, second: u64, length: u64) {
            let expected = crc_fast::checksum_combine(Crc64Nvme, first, second, length);
            prop_assert_eq!(joined(first, second, length), expected);
        }
    }
}
