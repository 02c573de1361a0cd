//! Checksums of bodies, which a store compares with what it received, and entity tags of what was sent.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use crc_fast::CrcAlgorithm;
use md5::{Digest, Md5};

use crate::error::{Error, ErrorKind, Result};

/// A checksum that a store may check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// CRC-64/NVME by S3's header (S3 User Guide, "Checking object integrity").
    Crc64,
    /// The same by Azure's, with its bytes the other way around (Blob service REST API, "Put Block").
    AzureCrc64,
    /// MD5 (RFC 1864). It takes twenty times as long.
    Md5,
}

impl Checksum {
    /// The header's name.
    pub(super) fn header(self) -> &'static str {
        match self {
            Self::Crc64 => "x-amz-checksum-crc64nvme",
            Self::AzureCrc64 => "x-ms-content-crc64",
            Self::Md5 => "content-md5",
        }
    }

    /// The header's value for a body.
    pub(super) fn of(self, body: &[u8]) -> String {
        let crc = || crc_fast::checksum(CrcAlgorithm::Crc64Nvme, body);
        match self {
            Self::Crc64 => Crc64::base64(crc()),
            Self::AzureCrc64 => BASE64_STANDARD.encode(crc().to_le_bytes()),
            Self::Md5 => BASE64_STANDARD.encode(Md5::digest(body)),
        }
    }
}

/// The CRC-64/NVME of bytes, in the order in which they are added. Those of neighbours make that of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crc64 {
    value: u64,
    length: u64,
}

impl Crc64 {
    /// That of so many bytes of which only the checksum is known.
    pub fn new(value: u64, length: u64) -> Self {
        Self { value, length }
    }

    /// That of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::new(crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes), bytes.len() as u64)
    }

    /// The next bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        *self = self.then(Self::of(bytes));
    }

    /// That of both, one after the other.
    pub fn then(self, next: Self) -> Self {
        if self.length == 0 || next.length == 0 {
            return if self.length == 0 { next } else { self };
        }
        let (algorithm, length) = (CrcAlgorithm::Crc64Nvme, self.length + next.length);
        Self::new(crc_fast::checksum_combine(algorithm, self.value, next.value, next.length), length)
    }

    /// The checksum.
    pub fn value(self) -> u64 {
        self.value
    }

    /// Of how many bytes it is the checksum.
    pub fn length(self) -> u64 {
        self.length
    }

    /// A checksum as S3 writes it.
    pub fn base64(value: u64) -> String {
        BASE64_STANDARD.encode(value.to_be_bytes())
    }

    /// What S3 has written.
    pub(super) fn from_base64(text: &str) -> Option<u64> {
        Some(u64::from_be_bytes(BASE64_STANDARD.decode(text).ok()?.try_into().ok()?))
    }
}

/// The entity tag of an object that was sent at once, where tags are MD5s.
pub(super) fn md5_etag(body: &[u8]) -> String {
    format!("\"{}\"", hex::encode(Md5::digest(body)))
}

/// The entity tag that S3 and most stores like it give to an object put together from parts: the MD5 of the parts' MD5s
/// and their number. `None` when the parts' ids are no MD5s.
pub(super) fn composite_etag(parts: &[String]) -> Option<String> {
    let mut md5 = Md5::new();
    for id in parts {
        let digest = hex::decode(id.trim_matches('"')).ok().filter(|digest| digest.len() == 16)?;
        md5.update(digest);
    }
    Some(format!("\"{}-{}\"", hex::encode(md5.finalize()), parts.len()))
}

/// What is known of the entity tag of an object that was just sent.
#[derive(Debug, Default)]
pub(super) struct SentTags {
    /// That of what was sent, where it can be told.
    pub(super) sent: Option<String>,
    /// The one that the store has answered with.
    pub(super) returned: Option<String>,
}

impl SentTags {
    /// Fails when an object is seen with another tag.
    pub(super) fn check(&self, found: Option<&str>) -> Result<()> {
        let found = found.unwrap_or_default();
        match (&self.sent, &self.returned) {
            (Some(sent), _) if sent != found => {
                let what =
                    format!("the object's entity tag is {found} after its upload; what was sent has {sent}");
                Err(Error::new(ErrorKind::UploadFailed, what))
            }
            (None, Some(returned)) if !is_same_tag(returned, found) => {
                let what = "the object was written, and somebody else has replaced it since";
                Err(Error::new(ErrorKind::Conflict, what))
            }
            _ => Ok(()),
        }
    }
}

/// Whether two entity tags are the same: some stores leave out the quotation marks in the answer to a completion.
pub(super) fn is_same_tag(one: &str, other: &str) -> bool {
    one.trim_matches('"') == other.trim_matches('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_specifications() {
        // The check value of the catalogue of parametrised CRC algorithms.
        assert_eq!(
            Checksum::Crc64.of(b"123456789"),
            BASE64_STANDARD.encode(0xae8b_1486_0a79_9888_u64.to_be_bytes())
        );
        assert_eq!(Crc64::from_base64(&Checksum::Crc64.of(b"123456789")), Some(0xae8b_1486_0a79_9888));
        assert_eq!(Checksum::Md5.of(b""), "1B2M2Y8AsgTpgAmY7PhCfg==");
        assert_eq!(md5_etag(b""), "\"d41d8cd98f00b204e9800998ecf8427e\"");
    }

    #[test]
    fn a_checksum_is_the_same_however_its_bytes_are_cut() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        for cut in [0, 1, 8, 65_536, 99_999, 100_000] {
            let (one, other) = bytes.split_at(cut);
            let mut running = Crc64::of(one);
            running.add(other);
            assert_eq!(running, Crc64::of(&bytes), "{cut}");
            assert_eq!(Crc64::of(one).then(Crc64::of(other)), Crc64::of(&bytes), "{cut}");
        }
    }
}
