//! The bound on the bytes of parts that a mount holds: read ahead, in flight and waiting for their hashes together.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::digests::joined;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FileOffset, KIB, MIB};
use crate::vfile::VirtualFile;

/// Bytes of parts that a mount holds at most, over all its jobs and buckets.
pub(in crate::export) const PART_MEMORY: u64 = 256 * MIB;

/// What every bucket may hold in a mount with so many of them that their shares would be smaller: two parts of the
/// smallest size.
const LEAST_SHARE: u64 = 16 * MIB;

/// What memory is counted in.
const UNIT: u64 = 64 * KIB;

/// A bucket's share of the memory for parts, so that one that hangs takes nothing from the others.
#[derive(Clone, Debug)]
pub(in crate::export) struct PartMemory {
    units: Arc<Semaphore>,
    total: u32,
}

/// Bytes with their part of the bound, which ends when the last clone of them is dropped.
struct Held<B> {
    bytes: B,
    _units: Option<OwnedSemaphorePermit>,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Held<B> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl PartMemory {
    /// The share of one of so many buckets.
    pub(in crate::export) fn share_of(buckets: usize) -> Self {
        let share = (PART_MEMORY / buckets.max(1) as u64).max(LEAST_SHARE);
        let total = u32::try_from(share / UNIT).unwrap_or(u32::MAX);
        Self { units: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Reads `length` bytes at `at` on a blocking thread, fewer only at the end of the file, when the bound allows it. A
    /// part that is larger than the whole share is held alone.
    pub(super) fn read(
        &self,
        file: &Arc<dyn VirtualFile>,
        at: u64,
        length: u64,
    ) -> JoinHandle<Result<Bytes>> {
        let (memory, file) = (self.clone(), Arc::clone(file));
        tokio::spawn(async move {
            let length = within(&*file, at, length);
            let units = memory.units(length).await?;
            read_holding(file, at, length, Some(units)).await
        })
    }

    /// The same, if the bound allows it now.
    pub(super) fn read_now(
        &self,
        file: &Arc<dyn VirtualFile>,
        at: u64,
        length: u64,
    ) -> Option<JoinHandle<Result<Bytes>>> {
        let length = within(&**file, at, length);
        let units = Arc::clone(&self.units).try_acquire_many_owned(self.wanted(length)).ok()?;
        Some(tokio::spawn(read_holding(Arc::clone(file), at, length, Some(units))))
    }

    /// The same beyond the bound, for one who holds bytes that it cannot release before it has more.
    pub(super) fn read_beyond(
        &self,
        file: &Arc<dyn VirtualFile>,
        at: u64,
        length: u64,
    ) -> JoinHandle<Result<Bytes>> {
        tokio::spawn(read_holding(Arc::clone(file), at, within(&**file, at, length), None))
    }

    /// Reads what comes otherwise, at most `length` bytes, when the bound allows it.
    pub(super) async fn hold<B: AsRef<[u8]> + Send + 'static>(
        &self,
        length: u64,
        reading: impl Future<Output = Result<B>>,
    ) -> Result<Bytes> {
        let units = Some(self.units(length).await?);
        Ok(Bytes::from_owner(Held { bytes: reading.await?, _units: units }))
    }

    /// The right to hold so many bytes.
    async fn units(&self, length: u64) -> Result<OwnedSemaphorePermit> {
        let units = Arc::clone(&self.units).acquire_many_owned(self.wanted(length)).await;
        units.map_err(|e| Error::new(ErrorKind::Internal, "the mount ends").because(e))
    }

    fn wanted(&self, length: u64) -> u32 {
        u32::try_from(length.div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(1, self.total)
    }
}

/// So many bytes at `at`, or those that the file has.
fn within(file: &dyn VirtualFile, at: u64, length: u64) -> u64 {
    file.known_size().map_or(length, |size| length.min(size.saturating_sub(at)))
}

async fn read_holding(
    file: Arc<dyn VirtualFile>,
    at: u64,
    length: u64,
    units: Option<OwnedSemaphorePermit>,
) -> Result<Bytes> {
    let read = joined(tokio::task::spawn_blocking(move || read_full(&*file, at, length)).await)?;
    Ok(Bytes::from_owner(Held { bytes: read?, _units: units }))
}

fn read_full(file: &dyn VirtualFile, at: u64, length: u64) -> Result<Vec<u8>> {
    let mut part = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    let mut done = 0;
    while done < part.len() {
        match file.read_at(FileOffset(at + done as u64), &mut part[done..])? {
            0 => break,
            read => done += read,
        }
    }
    part.truncate(done);
    Ok(part)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::extent::{Extent, ExtentKind};

    /// Zeros whose reads are counted.
    struct Zeros(AtomicUsize);

    impl VirtualFile for Zeros {
        fn file_size(&self) -> u64 {
            1 << 40
        }

        fn read_at(&self, _: FileOffset, buf: &mut [u8]) -> Result<usize> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(buf.len())
        }

        fn extent_at(&self, _: FileOffset) -> Result<Extent> {
            Ok(Extent::new(ExtentKind::Zero, 1))
        }
    }

    #[tokio::test]
    async fn parts_are_read_when_the_bytes_before_them_are_gone_everywhere() {
        let memory = PartMemory::share_of(1000);
        let zeros = Arc::new(Zeros(AtomicUsize::new(0)));
        let file: Arc<dyn VirtualFile> = Arc::<Zeros>::clone(&zeros);
        let first = memory.read(&file, 0, LEAST_SHARE / 2).await.unwrap().unwrap();
        let second = memory.read(&file, 0, LEAST_SHARE / 2).await.unwrap().unwrap();
        assert_eq!(memory.units.available_permits(), 0);
        let third = memory.read(&file, 0, 1);
        let clone = first.slice(..10);
        drop(first);
        assert_eq!(memory.units.available_permits(), 0, "a clone still holds the bytes");
        assert_eq!(zeros.0.load(Ordering::SeqCst), 2);
        drop((clone, second));
        assert_eq!(third.await.unwrap().unwrap().len(), 1);
        // More than the share: alone.
        let large = memory.read(&file, 0, LEAST_SHARE + 1).await.unwrap().unwrap();
        assert_eq!((large.len() as u64, memory.units.available_permits()), (LEAST_SHARE + 1, 0));
    }
}
