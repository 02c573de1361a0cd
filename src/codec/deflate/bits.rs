//! Bits of a deflate stream, the first in the lowest place (RFC 1951, section 3.1.1).

/// Bits on their way into bytes.
pub(super) struct BitWriter {
    /// What is written, and room for the next word.
    bytes: Vec<u8>,
    length: usize,
    pending: u64,
    /// Bits that are pending, below 8 between two calls.
    count: u32,
}

/// Room that a word needs.
const WORD: usize = 8;

impl BitWriter {
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes + WORD], length: 0, pending: 0, count: 0 }
    }

    /// Appends the lowest `count` bits, at most 48; the bits above them are zero.
    #[inline]
    pub(super) fn put(&mut self, bits: u64, count: u32) {
        debug_assert!(count <= 48 && bits >> count == 0);
        self.pending |= bits << self.count;
        self.count += count;
        if self.bytes.len() < self.length + WORD {
            self.bytes.resize(2 * self.bytes.len() + WORD, 0);
        }
        if let Some(word) = self.bytes.get_mut(self.length..).and_then(|rest| rest.first_chunk_mut()) {
            *word = self.pending.to_le_bytes();
        }
        let whole = self.count & !7;
        self.length += (whole / 8) as usize;
        self.pending >>= whole;
        self.count -= whole;
    }

    /// Whole bytes, behind zeros up to a byte's border.
    pub(super) fn put_bytes(&mut self, bytes: &[u8]) {
        self.align();
        self.bytes.truncate(self.length);
        self.bytes.extend_from_slice(bytes);
        self.length = self.bytes.len();
    }

    /// The stream, with zeros up to its last byte.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.align();
        self.bytes.truncate(self.length);
        self.bytes
    }

    fn align(&mut self) {
        if self.count > 0 {
            self.put(0, 8 - self.count);
        }
    }
}
