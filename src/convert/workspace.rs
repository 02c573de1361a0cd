//! What compressed files keep of their work: records in memory, whole bodies and indices on disk.
//!
//! All of it can be computed again; nothing is lost when it is gone, damaged or full.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tracing::{debug, warn};

use crate::error::{Error, Result};
use crate::units::{FileOffset, GIB, MIB};

/// Bytes of records that are kept in memory, over all files.
const RECORD_MEMORY: usize = 128 * MIB as usize;

/// Bytes of indices that are kept on disk; the oldest go first.
const INDEX_SPACE: u64 = 256 * MIB;

/// Space that bodies kept on disk leave free: this much, and a tenth of the filesystem.
const FREE_SPACE: u64 = GIB;

/// First bytes of an index file; the number is the version.
const INDEX_MAGIC: &[u8] = b"freightfs lengths 1\n";

/// Bytes of the SHA-256 at the end of an index file.
const DIGEST: usize = 32;

/// A file's id in this process, and a unit of it.
type RecordName = (u64, u64);

/// Where compressed files keep what they computed.
pub struct Workspace {
    directory: Option<PathBuf>,
    records: Mutex<Records>,
    next_file: AtomicU64,
}

struct Records {
    by_name: LruCache<RecordName, Arc<Vec<u8>>>,
    bytes: usize,
}

impl Workspace {
    /// Keeps records in memory only.
    pub fn in_memory() -> Arc<Self> {
        Self::new(None)
    }

    /// Keeps indices and bodies in `directory` too, which exists.
    pub fn in_directory(directory: &Path) -> Arc<Self> {
        Self::new(Some(directory.to_owned()))
    }

    fn new(directory: Option<PathBuf>) -> Arc<Self> {
        let records = Records { by_name: LruCache::unbounded(), bytes: 0 };
        Arc::new(Self { directory, records: Mutex::new(records), next_file: AtomicU64::new(0) })
    }

    /// A name for a file's records.
    pub(super) fn next_file(&self) -> u64 {
        self.next_file.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn record(&self, name: RecordName) -> Option<Arc<Vec<u8>>> {
        self.records.lock().by_name.get(&name).cloned()
    }

    pub(super) fn keep_record(&self, name: RecordName, record: Arc<Vec<u8>>) {
        let mut records = self.records.lock();
        records.bytes += record.len();
        if let Some(old) = records.by_name.put(name, record) {
            records.bytes -= old.len();
        }
        while records.bytes > RECORD_MEMORY {
            let Some((_, old)) = records.by_name.pop_lru() else { break };
            records.bytes -= old.len();
        }
    }

    /// A place on disk for a file's body, while there is room.
    pub(super) fn body(&self) -> Option<Body> {
        let directory = self.directory.as_ref()?;
        if !has_room(directory) {
            return None;
        }
        match tempfile::tempfile_in(directory) {
            Ok(file) => Some(Body::new(file, Some(directory.clone()))),
            Err(error) => {
                debug!("compressed bytes are not kept on disk: {error}");
                None
            }
        }
    }

    fn index_path(&self, key: &str) -> Option<PathBuf> {
        let name = hex::encode(Sha256::digest(key.as_bytes()));
        Some(self.directory.as_ref()?.join(format!("{name}.lengths")))
    }

    /// The lengths that an earlier pass under the same key kept. A damaged file is removed.
    pub(super) fn load_index(&self, key: &str, count: u64) -> Option<Vec<u32>> {
        let path = self.index_path(key)?;
        let bytes = std::fs::read(&path).ok()?;
        let lengths = parse_index(&bytes, key, count);
        if lengths.is_none() {
            warn!(path = %path.display(), "an index of compressed lengths is damaged; it is made again");
            let _ = std::fs::remove_file(&path);
        }
        lengths
    }

    /// The lengths, from the first one on, of a pass under the same key that was cut off. What follows them in the file
    /// is damaged, and is cut off: lengths that are kept from now on would never be read behind it.
    pub(super) fn load_growing(&self, key: &str, count: u64) -> Vec<u32> {
        let Some(path) = self.growing_path(key) else { return Vec::new() };
        let Ok(bytes) = std::fs::read(&path) else { return Vec::new() };
        let (mut lengths, whole) = parse_growing(&bytes, key);
        if whole < bytes.len() {
            warn!(path = %path.display(), "compressed lengths are damaged from byte {whole} on; they are made again");
            let cut = File::options().write(true).open(&path).and_then(|file| file.set_len(whole as u64));
            if cut.is_err() {
                let _ = std::fs::remove_file(&path);
            }
        }
        lengths.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        lengths
    }

    /// What is kept under the key is not what the compressor makes: it is of no use.
    pub(super) fn forget(&self, key: &str) {
        let Some(path) = self.index_path(key) else { return };
        warn!(path = %path.display(), "compressed lengths are wrong; they are made again");
        let _ = std::fs::remove_file(path.with_extension("growing"));
        let _ = std::fs::remove_file(path);
    }

    /// Keeps lengths of a pass that goes on, of which `start` came before.
    pub(super) fn keep_growing(&self, key: &str, start: u64, lengths: &[u32]) {
        let Some(path) = self.growing_path(key) else { return };
        let appended = File::options()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(&encode_growing(key, start, lengths)));
        if let Err(error) = appended {
            debug!(path = %path.display(), "lengths of a pass could not be kept: {error}");
        }
    }

    fn growing_path(&self, key: &str) -> Option<PathBuf> {
        Some(self.index_path(key)?.with_extension("growing"))
    }

    /// Keeps the lengths of a finished pass.
    pub(super) fn save_index(&self, key: &str, lengths: &[u32]) {
        let Some(path) = self.index_path(key) else { return };
        let _ = std::fs::remove_file(path.with_extension("growing"));
        if let Err(error) = write_index(&path, key, lengths) {
            warn!(path = %path.display(), "an index of compressed lengths could not be kept: {error}");
        }
        if let Some(directory) = &self.directory {
            drop_oldest(directory);
        }
    }
}

/// Whether the filesystem of `directory` has room for more than others need.
fn has_room(directory: &Path) -> bool {
    nix::sys::statvfs::statvfs(directory).is_ok_and(|fs| {
        let free = fs.blocks_available().saturating_mul(fs.fragment_size());
        let all = fs.blocks().saturating_mul(fs.fragment_size());
        free > FREE_SPACE.max(all / 10)
    })
}

/// Key, number of lengths, lengths, digest of all before.
fn encode_index(key: &str, lengths: &[u32]) -> Vec<u8> {
    let mut bytes = INDEX_MAGIC.to_vec();
    bytes.extend((key.len() as u64).to_le_bytes());
    bytes.extend(key.as_bytes());
    bytes.extend((lengths.len() as u64).to_le_bytes());
    bytes.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
    let digest = Sha256::digest(&bytes);
    bytes.extend(digest);
    bytes
}

fn parse_index(bytes: &[u8], key: &str, count: u64) -> Option<Vec<u32>> {
    let (content, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST)?)?;
    if Sha256::digest(content).as_slice() != digest {
        return None;
    }
    let rest = content.strip_prefix(INDEX_MAGIC)?;
    let rest = rest.strip_prefix(&(key.len() as u64).to_le_bytes())?.strip_prefix(key.as_bytes())?;
    let lengths = rest.strip_prefix(&count.to_le_bytes())?;
    if lengths.len() as u64 != count.checked_mul(4)? {
        return None;
    }
    Some(lengths.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// One piece of a pass: its first length's number, how many, the lengths, and a digest of key and piece. Pieces follow
/// one another in the file; of two passes at once both may write, the same lengths.
fn encode_growing(key: &str, start: u64, lengths: &[u32]) -> Vec<u8> {
    let mut piece = start.to_le_bytes().to_vec();
    piece.extend((lengths.len() as u64).to_le_bytes());
    piece.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
    let digest = growing_digest(key, &piece);
    piece.extend(digest);
    piece
}

fn growing_digest(key: &str, piece: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(key.as_bytes()).chain_update(piece).finalize().into()
}

/// The lengths of all pieces up to the first that is cut off, damaged or out of order, and the bytes of those pieces.
fn parse_growing(mut bytes: &[u8], key: &str) -> (Vec<u32>, usize) {
    let all = bytes.len();
    let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
    let mut lengths: Vec<u32> = Vec::new();
    while bytes.len() >= 16 {
        let (start, count) = (number(&bytes[..8]), number(&bytes[8..16]));
        let Some(end) =
            count.checked_mul(4).and_then(|n| usize::try_from(n).ok()).and_then(|n| n.checked_add(16))
        else {
            break;
        };
        let Some((piece, rest)) = bytes.split_at_checked(end) else { break };
        let Some((digest, rest)) = rest.split_at_checked(DIGEST) else { break };
        if growing_digest(key, piece) != digest || start > lengths.len() as u64 {
            break;
        }
        let known = lengths.len() - start as usize;
        let new = piece[16..].chunks_exact(4).skip(known);
        lengths.extend(new.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        bytes = rest;
    }
    (lengths, all - bytes.len())
}

fn write_index(path: &Path, key: &str, lengths: &[u32]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(&encode_index(key, lengths))?;
    file.persist(path)?;
    Ok(())
}

/// Removes the oldest indices while all of them take too much space.
fn drop_oldest(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    let mut indices: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "lengths" || e == "growing"))
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        })
        .collect();
    indices.sort();
    let mut space: u64 = indices.iter().map(|(_, length, _)| length).sum();
    for (_, length, path) in indices {
        if space <= INDEX_SPACE {
            break;
        }
        space -= length;
        let _ = std::fs::remove_file(path);
    }
}

/// The bytes of a compressed file between head and tail, each at its own place, as far as they were computed.
pub(super) struct Body {
    file: File,
    /// Where room is looked for; `None` for a file that has to take everything.
    directory: Option<PathBuf>,
    /// Everything after the head and before this place is in the file.
    written: AtomicU64,
}

impl Body {
    pub(super) fn new(file: File, directory: Option<PathBuf>) -> Self {
        Self { file, directory, written: AtomicU64::new(0) }
    }

    /// Whether more may be written.
    pub(super) fn has_room(&self) -> bool {
        self.directory.as_deref().is_none_or(has_room)
    }

    /// Whether the file is the conversion's target, so that a failure to write is the conversion's.
    pub(super) fn is_target(&self) -> bool {
        self.directory.is_none()
    }

    pub(super) fn write(&self, at: FileOffset, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, at.bytes())
            .map_err(|e| Error::from_io("cannot write the compressed bytes", e).at(at))
    }

    /// All before `end` is written.
    pub(super) fn set_written(&self, end: FileOffset) {
        self.written.store(end.bytes(), Ordering::Release);
    }

    /// Bytes from `at` on that can be read.
    pub(super) fn available(&self, at: FileOffset) -> u64 {
        self.written.load(Ordering::Acquire).saturating_sub(at.bytes())
    }

    /// Fills `buf`; gaps that were never written, at the end too, are zeros.
    pub(super) fn read(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let read = self.file.read_at(&mut buf[done..], at.bytes() + done as u64);
            match read.map_err(|e| Error::from_io("cannot read the compressed bytes", e).at(at))? {
                0 => {
                    buf[done..].fill(0);
                    break;
                }
                read => done += read,
            }
        }
        Ok(())
    }

    pub(super) fn set_file_size(&self, file_size: u64) -> Result<()> {
        self.file.set_len(file_size).map_err(|e| Error::from_io("cannot size the output", e))
    }
}

/// For the fuzz targets: reads lengths that were kept, with digests that are made right. Returns whether there were any.
pub fn fuzz_lengths(bytes: &[u8]) -> bool {
    let count = bytes.first().copied().unwrap_or_default();
    let mut found = false;
    for sealed in [bytes.to_vec(), [bytes, Sha256::digest(bytes).as_slice()].concat()] {
        if let Some(lengths) = parse_index(&sealed, "key", count.into()) {
            assert_eq!(encode_index("key", &lengths), sealed);
            found = true;
        }
    }
    let mut growing = Vec::new();
    for piece in bytes.chunks(40) {
        growing.extend(piece);
        growing.extend(growing_digest("key", piece));
    }
    for growing in [bytes, &growing] {
        let (lengths, whole) = parse_growing(growing, "key");
        assert!(whole <= growing.len() && lengths.len() <= growing.len() / 4);
        found |= !lengths.is_empty();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_kept_and_a_damaged_one_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let workspace = Workspace::in_directory(directory.path());
        let lengths = [7, 0, 65536, u32::MAX];
        workspace.save_index("key", &lengths);
        assert_eq!(workspace.load_index("key", 4).unwrap(), lengths);
        assert_eq!(workspace.load_index("other", 4), None);
        let path = workspace.index_path("key").unwrap();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(parse_index(&bad, "key", 4), None, "byte {at}");
            assert_eq!(parse_index(&good[..at], "key", 4), None, "length {at}");
        }
        assert_eq!(parse_index(&good, "key", 5), None);
        std::fs::write(&path, &good[1..]).unwrap();
        assert_eq!(workspace.load_index("key", 4), None);
        assert!(!path.exists(), "a damaged index stays");
    }

    #[test]
    fn a_pass_that_was_cut_off_is_known_up_to_there() {
        let directory = tempfile::tempdir().unwrap();
        let workspace = Workspace::in_directory(directory.path());
        workspace.keep_growing("key", 0, &[1, 2, 3]);
        workspace.keep_growing("key", 2, &[3, 4]);
        workspace.keep_growing("key", 4, &[5]);
        workspace.keep_growing("key", 9, &[6]);
        assert_eq!(workspace.load_growing("key", 100), [1, 2, 3, 4, 5]);
        assert_eq!(workspace.load_growing("key", 4), [1, 2, 3, 4]);
        let path = workspace.growing_path("key").unwrap();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let expected: [u32; 5] = [1, 2, 3, 4, 5];
            for bytes in [&bad[..], &good[..at]] {
                let (lengths, _) = parse_growing(bytes, "key");
                assert!(expected.starts_with(&lengths), "byte {at}: {lengths:?}");
            }
        }
        assert!(parse_growing(&good, "other").0.is_empty());
        // Behind damage that stays nothing would be found again.
        std::fs::write(&path, [&good[..], b"damaged"].concat()).unwrap();
        let known = workspace.load_growing("key", 100).len() as u64;
        workspace.keep_growing("key", known, &[7]);
        assert_eq!(workspace.load_growing("key", 100), [1, 2, 3, 4, 5, 7]);
        workspace.save_index("key", &[1, 2]);
        assert!(!path.exists());
    }

    #[test]
    fn records_are_kept_within_their_memory() {
        let workspace = Workspace::in_memory();
        let record = Arc::new(vec![1; RECORD_MEMORY / 10]);
        for unit in 0..25 {
            workspace.keep_record((0, unit), Arc::clone(&record));
        }
        assert!(workspace.record((0, 24)).is_some() && workspace.record((0, 0)).is_none());
        assert!(workspace.records.lock().bytes <= RECORD_MEMORY);
        workspace.keep_record((0, 24), Arc::new(vec![1]));
        let records = workspace.records.lock();
        assert_eq!(records.bytes, records.by_name.iter().map(|(_, r)| r.len()).sum::<usize>());
    }
}
