//! On-disk headers, each declared once: the declaration both parses and encodes.

pub mod qcow2;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
pub mod zvhd;

/// A value of a header's field.
pub(crate) trait Field: Sized {
    /// Reads it from its bytes.
    fn get(bytes: &[u8], big_endian: bool) -> Self;
    /// Writes it to its bytes.
    fn put(&self, bytes: &mut [u8], big_endian: bool);
}

macro_rules! integer_field {
    ($($integer:ty),*) => { $(
        impl Field for $integer {
            fn get(bytes: &[u8], big_endian: bool) -> Self {
                let mut array = [0; size_of::<Self>()];
                array.copy_from_slice(&bytes[..size_of::<Self>()]);
                if big_endian { Self::from_be_bytes(array) } else { Self::from_le_bytes(array) }
            }

            fn put(&self, bytes: &mut [u8], big_endian: bool) {
                let array = if big_endian { self.to_be_bytes() } else { self.to_le_bytes() };
                bytes[..array.len()].copy_from_slice(&array);
            }
        }
    )* };
}

integer_field!(u8, u16, u32, u64);

impl<const N: usize> Field for [u8; N] {
    fn get(bytes: &[u8], _big_endian: bool) -> Self {
        let mut array = [0; N];
        array.copy_from_slice(&bytes[..N]);
        array
    }

    fn put(&self, bytes: &mut [u8], _big_endian: bool) {
        bytes[..N].copy_from_slice(self);
    }
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
