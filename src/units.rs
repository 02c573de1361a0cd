//! Offsets and lengths as types, so that a guest address cannot be used as a place in a file.
//!
//! [`VirtualOffset`] counts bytes of the disk that a guest sees; [`FileOffset`] counts bytes of a file or
//! object that stores it. Plain `u64` is a number of bytes or of units, never a place.
//!
//! Numbers of a hostile header can be any. So arithmetic here is total: a place that cannot be counted is the last one,
//! which is in no file and no disk and is refused there; a distance backwards is 0.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::{Add, AddAssign, Sub};

/// Bytes in a sector, in every format here.
pub const SECTOR: u64 = 512;
/// 2^10 bytes.
pub const KIB: u64 = 1 << 10;
/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;
/// 2^30 bytes.
pub const GIB: u64 = 1 << 30;
/// 2^40 bytes.
pub const TIB: u64 = 1 << 40;

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The place as a number of bytes from the start.
            pub fn bytes(self) -> u64 {
                self.0
            }

            /// The place `length` bytes further on, if it can be counted.
            pub fn checked_add(self, length: u64) -> Option<Self> {
                self.0.checked_add(length).map(Self)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, length: u64) -> Self {
                Self(self.0.saturating_add(length))
            }
        }

        impl AddAssign<u64> for $name {
            fn add_assign(&mut self, length: u64) {
                self.0 = self.0.saturating_add(length);
            }
        }

        impl Sub for $name {
            type Output = u64;
            fn sub(self, start: Self) -> u64 {
                self.0.saturating_sub(start.0)
            }
        }

        impl From<$name> for u64 {
            fn from(offset: $name) -> u64 {
                offset.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

offset! {
    /// A byte of the disk as the guest sees it.
    VirtualOffset
}

offset! {
    /// A byte of a file or object, a source's or a computed one's.
    FileOffset
}

/// What a disk, a table or a file is cut into: a block, a cluster, a grain. A unit of 0 bytes is one of 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit(NonZeroU64);

impl Unit {
    /// A unit of so many bytes, or of other things.
    pub fn of(size: u64) -> Self {
        Self(NonZeroU64::new(size).unwrap_or(NonZeroU64::MIN))
    }

    /// The number of the unit that `at` is in.
    pub fn index(self, at: u64) -> u64 {
        at / self.0
    }

    /// How far from the start of its unit `at` is.
    pub fn within(self, at: u64) -> u64 {
        at % self.0
    }

    /// How far from the end of its unit `at` is; not 0.
    pub fn rest(self, at: u64) -> u64 {
        self.0.get().saturating_sub(self.within(at))
    }

    /// Where a unit begins.
    pub fn start(self, index: u64) -> u64 {
        self.0.get().saturating_mul(index)
    }

    /// Units that so many bytes take.
    pub fn count(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.0.get())
    }
}

/// A number of bytes as a length in memory. What memory cannot have is the largest length, which no buffer has.
pub fn memory_size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// `value` rounded up to a multiple of `unit`, which is not 0; `None` when it does not fit.
pub fn checked_round_up(value: u64, unit: u64) -> Option<u64> {
    value.div_ceil(unit).checked_mul(unit)
}

/// `value` rounded up to a multiple of `unit`, for values known to be far from 2^64.
pub fn round_up(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}

/// A number of bytes for people: `1.5 GiB`, `512 B`.
pub fn human_bytes(bytes: u64) -> String {
    const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut name = 0;
    while value >= 1024.0 && name + 1 < NAMES.len() {
        value /= 1024.0;
        name += 1;
    }
    if name == 0 {
        return format!("{bytes} B");
    }
    let text = if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") };
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", NAMES[name])
}

/// A number of bytes, with one of qemu-img's suffixes or none.
pub fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" => KIB,
        "m" => MIB,
        "g" => GIB,
        "t" => TIB,
        other => return Err(format!("unknown unit {other:?}; known ones: K, M, G, T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a number of bytes"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_makes_arithmetic_of_places_and_units_wrap_or_panic() {
        let last = FileOffset(u64::MAX);
        assert_eq!((last + 1, last - last, FileOffset(1) - last), (last, 0, 0));
        let mut at = VirtualOffset(u64::MAX - 1);
        at += 5;
        assert_eq!(at, VirtualOffset(u64::MAX));
        for (size, at) in [(0, 0), (0, u64::MAX), (1, 7), (512, 511), (u64::MAX, 3), (3, u64::MAX)] {
            let unit = Unit::of(size);
            assert_eq!(unit.start(unit.index(at)) + unit.within(at), at);
            assert!(unit.rest(at) > 0 && unit.count(at) >= unit.index(at));
        }
        assert_eq!(Unit::of(2).start(u64::MAX), u64::MAX);
    }

    #[test]
    fn rounding_and_printing() {
        assert_eq!(round_up(1, 512), 512);
        assert_eq!(checked_round_up(u64::MAX, 512), None);
        assert_eq!(parse_bytes("64K"), Ok(65536));
        assert_eq!((parse_bytes("7"), parse_bytes("2t")), (Ok(7), Ok(2 * TIB)));
        assert!(["", "K", "1x", "-1", "99999999999T"].iter().all(|text| parse_bytes(text).is_err()));
        assert_eq!(human_bytes(512), "512 B");
        assert_eq!(human_bytes(GIB + GIB / 2), "1.5 GiB");
        assert_eq!(human_bytes(100 * MIB), "100 MiB");
        assert_eq!(human_bytes(10 * MIB), "10 MiB");
    }
}
