//! What damaged images give.

use freightfs::error::ErrorKind;

/// Reasons for which bytes may be refused. Anything else, an overflow or a read behind the end, is our own mistake.
pub const REASONS: [ErrorKind; 7] = [
    ErrorKind::CorruptImage,
    ErrorKind::Unsupported,
    ErrorKind::Encrypted,
    ErrorKind::Incomplete,
    ErrorKind::TooLarge,
    ErrorKind::ReferenceDenied,
    ErrorKind::NotFound,
];
