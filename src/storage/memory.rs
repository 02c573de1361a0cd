//! Bytes in memory as a source, for tests and small documents.

use std::time::SystemTime;

use super::{Generation, Storage, check_range};
use crate::error::Result;
use crate::extent::{Extent, ExtentKind};
use crate::units::FileOffset;

/// A source held in memory; its generation never changes.
#[derive(Debug)]
pub struct MemoryStorage {
    name: String,
    bytes: Vec<u8>,
    generation: Generation,
}

impl MemoryStorage {
    /// A source named `name` with these bytes.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            bytes,
            generation: Generation::everywhere("memory", SystemTime::UNIX_EPOCH),
        }
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn file_size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        check_range(self, at, buf.len() as u64)?;
        let start = at.bytes() as usize;
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.file_size() - at.bytes()))
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn verify_unchanged(&self) -> Result<()> {
        Ok(())
    }
}
