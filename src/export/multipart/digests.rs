//! SHA-256 and MD5 of an object, made in order while its parts are sent, each on a thread of its own.

use std::sync::Arc;

use bytes::Bytes;
use md5::Md5;
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::log::{DigestName, DigestState, UploadLog};
use crate::error::{Error, ErrorKind, Result};

/// Parts that wait for a hash; they count against the bound on memory.
const QUEUED: usize = 4;

/// Both hashes of an object, under way.
pub(in crate::export) struct Digests {
    sha256: Lane,
    md5: Lane,
}

/// One hash: its thread, and the parts on their way to it.
struct Lane {
    /// Bytes of the object that it has been given, or had when it began.
    given: u64,
    parts: mpsc::Sender<Bytes>,
    thread: JoinHandle<String>,
}

impl Digests {
    /// Begins where the log says that an earlier process was; its new states are recorded there.
    pub(in crate::export) fn start(log: Option<&Arc<UploadLog>>) -> Self {
        Self {
            sha256: Lane::start::<Sha256>(DigestName::Sha256, log),
            md5: Lane::start::<Md5>(DigestName::Md5, log),
        }
    }

    /// Whether the first `end` bytes have been given to both.
    pub(in crate::export) fn cover(&self, end: u64) -> bool {
        self.sha256.given >= end && self.md5.given >= end
    }

    /// Gives the bytes at `at`, which begin where the last ones ended; a hash that had them already leaves them.
    pub(in crate::export) async fn add(&mut self, at: u64, part: &Bytes) -> Result<()> {
        self.sha256.add(at, part).await?;
        self.md5.add(at, part).await
    }

    /// SHA-256 and MD5 of all that was given, hexadecimal.
    pub(in crate::export) async fn finish(self) -> Result<(String, String)> {
        Ok((self.sha256.finish().await?, self.md5.finish().await?))
    }
}

impl Lane {
    fn start<D: Digest + SerializableState + Send + 'static>(
        name: DigestName,
        log: Option<&Arc<UploadLog>>,
    ) -> Self {
        let begun = log.and_then(|log| resumed::<D>(&log.digest(name)));
        let (mut digest, given) = begun.unwrap_or_else(|| (D::new(), 0));
        let (parts, mut received) = mpsc::channel::<Bytes>(QUEUED);
        let log = log.cloned();
        let thread = tokio::task::spawn_blocking(move || {
            let mut bytes = given;
            while let Some(part) = received.blocking_recv() {
                digest.update(&part);
                bytes += part.len() as u64;
                if let Some(log) = &log {
                    log.hashed(name, DigestState { bytes, state: hex::encode(digest.serialize()) });
                }
            }
            hex::encode(digest.finalize())
        });
        Self { given, parts, thread }
    }

    async fn add(&mut self, at: u64, part: &Bytes) -> Result<()> {
        if self.given > at {
            return Ok(());
        }
        self.given = at + part.len() as u64;
        let gone = |e| Error::new(ErrorKind::Internal, "a hash of the job ended early").because(e);
        self.parts.send(part.clone()).await.map_err(gone)
    }

    async fn finish(self) -> Result<String> {
        drop(self.parts);
        joined(self.thread.await)
    }
}

/// A panic in a task is a broken invariant, not a reason to take the daemon down.
pub(in crate::export) fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|e| Error::new(ErrorKind::Internal, "a worker of the job panicked").because(e))
}

/// A hash as an earlier process left it; `None` when it left none that can be read.
fn resumed<D: SerializableState>(recorded: &DigestState) -> Option<(D, u64)> {
    let state = hex::decode(&recorded.state).ok()?;
    let state = SerializedState::<D>::try_from(state.as_slice()).ok()?;
    Some((D::deserialize(&state).ok()?, recorded.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::ObjectKey;
    use crate::export::multipart::log::UploadName;

    #[tokio::test]
    async fn a_hash_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.parts");
        let name = UploadName {
            bucket: "b".into(),
            key: ObjectKey::parse("k").unwrap(),
            id: "u".into(),
            part_size: 1 << 20,
        };
        let content: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        let whole = (hex::encode(Sha256::digest(&content)), hex::encode(Md5::digest(&content)));
        UploadLog::create(path.clone(), name).unwrap();
        for (at, part) in content.chunks(100).enumerate() {
            let log = Arc::new(UploadLog::open(&path).unwrap().unwrap());
            let mut digests = Digests::start(Some(&log));
            assert!(digests.cover(at as u64 * 100) && !digests.cover(at as u64 * 100 + 1));
            digests.add(at as u64 * 100, &Bytes::copy_from_slice(part)).await.unwrap();
            digests.finish().await.unwrap();
        }
        let log = Arc::new(UploadLog::open(&path).unwrap().unwrap());
        assert_eq!(Digests::start(Some(&log)).finish().await.unwrap(), whole);
        log.hashed(DigestName::Md5, DigestState { bytes: 5, state: "zz".into() });
        assert!(!Digests::start(Some(&log)).cover(5));
    }
}
