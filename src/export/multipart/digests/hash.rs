//! Hashes whose states can be recorded.

use sha2::Digest;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};

use crate::bucket::Crc64;

/// A hash that can go on in another process.
pub(super) trait Hash: Send + Sized + 'static {
    /// Of nothing.
    fn begin() -> Self;

    /// Hashes more bytes.
    fn take(&mut self, bytes: &[u8]);

    /// What [`resume`](Self::resume) reads.
    fn state(&self) -> Vec<u8>;

    /// A hash as it was; `None` when that is no state.
    fn resume(state: &[u8]) -> Option<Self>;

    /// The value, hexadecimal.
    fn end(self) -> String;
}

impl<D: Digest + SerializableState + Send + 'static> Hash for D {
    fn begin() -> Self {
        D::new()
    }

    fn take(&mut self, bytes: &[u8]) {
        self.update(bytes);
    }

    fn state(&self) -> Vec<u8> {
        self.serialize().to_vec()
    }

    fn resume(state: &[u8]) -> Option<Self> {
        D::deserialize(&SerializedState::<D>::try_from(state).ok()?).ok()
    }

    fn end(self) -> String {
        hex::encode(self.finalize())
    }
}

impl Hash for Crc64 {
    fn begin() -> Self {
        Self::default()
    }

    fn take(&mut self, bytes: &[u8]) {
        self.add(bytes);
    }

    fn state(&self) -> Vec<u8> {
        [self.value(), self.length()].iter().flat_map(|number| number.to_be_bytes()).collect()
    }

    fn resume(state: &[u8]) -> Option<Self> {
        let (numbers, []) = state.as_chunks::<8>() else { return None };
        let [value, length] = numbers else { return None };
        Some(Self::new(u64::from_be_bytes(*value), u64::from_be_bytes(*length)))
    }

    fn end(self) -> String {
        format!("{:016x}", self.value())
    }
}
