//! On-disk headers, each declared once: the declaration both parses and encodes.
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable
)]
// What numbers of a file are calculated with cannot panic, wrap or be cut off, in any build: see `units`.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

pub mod qcow2;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
pub mod zvhd;

/// A value of a header's field.
pub(crate) trait Field: Sized {
    /// Reads it from the first of these bytes; they count as zeros where they are too few.
    fn get(bytes: &[u8], big_endian: bool) -> Self;
    /// Writes it to its bytes.
    fn put(&self, bytes: &mut [u8], big_endian: bool);
}

macro_rules! integer_field {
    ($($integer:ty),*) => { $(
        impl Field for $integer {
            fn get(bytes: &[u8], big_endian: bool) -> Self {
                let array = bytes.first_chunk().copied().unwrap_or_default();
                if big_endian { Self::from_be_bytes(array) } else { Self::from_le_bytes(array) }
            }

            fn put(&self, bytes: &mut [u8], big_endian: bool) {
                let array = if big_endian { self.to_be_bytes() } else { self.to_le_bytes() };
                if let Some(target) = bytes.first_chunk_mut() {
                    *target = array;
                }
            }
        }
    )* };
}

integer_field!(u8, u16, u32, u64);

impl<const N: usize> Field for [u8; N] {
    fn get(bytes: &[u8], _big_endian: bool) -> Self {
        bytes.first_chunk().copied().unwrap_or([0; N])
    }

    fn put(&self, bytes: &mut [u8], _big_endian: bool) {
        if let Some(target) = bytes.first_chunk_mut() {
            *target = *self;
        }
    }
}

/// The little-endian number at `at` of what was read; zero where nothing is.
pub(crate) fn little<T: Field>(bytes: &[u8], at: usize) -> T {
    T::get(bytes.get(at..).unwrap_or_default(), false)
}

/// The big-endian number at `at` of what was read; zero where nothing is.
pub(crate) fn big<T: Field>(bytes: &[u8], at: usize) -> T {
    T::get(bytes.get(at..).unwrap_or_default(), true)
}

/// Puts bytes at `at` of a block, as far as it has room for them.
pub(crate) fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    let target = block.iter_mut().skip(at);
    target.zip(bytes).for_each(|(target, byte)| *target = *byte);
}

/// Declares a header: its length in bytes, its byte order (`big` or `little`), and for each field its offset, name
/// and type. Bytes between fields are ignored when parsed and zero when encoded.
macro_rules! header {
    (@big big) => { true };
    (@big little) => { false };
    (
        $(#[$doc:meta])*
        $name:ident, $length:literal bytes, $order:ident endian {
            $( $(#[$field_doc:meta])* $offset:literal $field:ident: $type:ty, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $type, )*
        }

        impl $name {
            /// Bytes of the encoded header.
            pub const LENGTH: usize = $length;

            /// Reads the fields; whether their values make sense is for the caller to check.
            pub fn parse(bytes: &[u8; $length]) -> Self {
                Self {
                    $( $field: $crate::header::Field::get(&bytes[$offset..], header!(@big $order)), )*
                }
            }

            /// Reads the fields from the first bytes; `None` where they are too few.
            pub fn parse_first(bytes: &[u8]) -> Option<Self> {
                bytes.first_chunk().map(Self::parse)
            }

            /// Writes the fields.
            pub fn encode(&self) -> [u8; $length] {
                let mut bytes = [0; $length];
                $( $crate::header::Field::put(&self.$field, &mut bytes[$offset..], header!(@big $order)); )*
                bytes
            }
        }
    };
}

pub(crate) use header;
