//! The log of an upload under way: what a later process needs to go on with it.
//!
//! One file of JSON lines, only ever appended to, each with its checksum. What a crash cuts off at its end is done again;
//! only the lines without which an upload would be lost, or an object be made twice, are synced. A damaged line may have
//! been one that takes parts back, so it costs all parts and hashes before it; what follows it counts.

mod line;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use parking_lot::Mutex;
use tracing::{debug, warn};

use crate::bucket::{MAX_PARTS, ObjectKey, random};
use crate::error::{Error, ErrorKind, Result};
use crate::export::reuse::{ChunkList, Cut};
use crate::export::sealed::{opened, sealed};
use crate::failpoint::{self, Step};
use crate::units::MIB;
use crate::whole_file;
use line::Line;
pub(in crate::export) use line::{
    Copied, DigestName, DigestState, Making, Part, PartPlan, Placed, UploadName,
};

/// Largest log that is read: 10 000 parts, two states of hashes for each, and the chunks of the largest index take two
/// thirds of it.
const MAX_LOG: u64 = 96 * MIB;

/// How a line of chunks begins.
const CHUNKS: &str = "{\"chunks\":";

/// How the name of a log ends that is no job's any more, each differently.
pub(super) fn given_up() -> String {
    format!("given-up-{:016x}.parts", random())
}

/// An upload under way, with its log.
#[derive(Debug)]
pub(in crate::export) struct UploadLog {
    name: UploadName,
    inner: Mutex<Inner>,
    /// Objects of splices that may be in the bucket.
    splices: AtomicUsize,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Open from the first line that this process appends.
    file: Option<File>,
    /// Bytes of whole lines.
    length: u64,
    parts: Vec<Slot>,
    sha256: DigestState,
    md5: DigestState,
    crc64: DigestState,
    chunks: ChunkList,
    completing: Option<String>,
    placed: Option<Placed>,
}

/// What is known of a part.
#[derive(Clone, Debug, Default)]
struct Slot {
    plan: Option<PartPlan>,
    part: Option<Part>,
}

impl UploadLog {
    /// Begins the log of an upload that was just started; durable when this returns.
    pub(in crate::export) fn create(path: PathBuf, name: UploadName) -> Result<Self> {
        let place = path.display().to_string();
        let failed = |e| Error::from_io("cannot record the upload", e).in_file(&place);
        File::options().append(true).create_new(true).open(&path).map_err(failed)?;
        let directory = path.parent().unwrap_or(Path::new(".")).to_owned();
        let inner = Mutex::new(Inner::new(path, 0));
        let log = Self { inner, name: name.clone(), splices: AtomicUsize::new(0) };
        log.inner.lock().append(&Line::Upload(name), true)?;
        File::open(directory).and_then(|d| d.sync_all()).map_err(failed)?;
        Ok(log)
    }

    /// Reads the log of an earlier process; `None` when it holds no upload. No file stays open.
    pub(in crate::export) fn open(path: &Path) -> Result<Option<Self>> {
        let text = match whole_file::read(path, MAX_LOG) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let log = Self::parse(path, &text);
        if log.as_ref().is_some_and(|log| !log.name.is_possible()) {
            let what = "an upload's log has a size of parts that there cannot be";
            return Err(Error::new(ErrorKind::Malformed, what).in_file(path.display().to_string()));
        }
        Ok(log)
    }

    /// The log of these bytes, which [`open`](Self::open) has read from `path`.
    fn parse(path: &Path, text: &[u8]) -> Option<Self> {
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut inner = Inner::new(path.to_owned(), whole as u64);
        let mut name = None;
        for line in text[..whole].split_inclusive(|&byte| byte == b'\n') {
            match opened(line) {
                Some(Line::Upload(upload)) => name = Some(upload),
                Some(line) => inner.apply(line),
                None => {
                    warn!(path = %path.display(), "a line of an upload's log is damaged; its parts are sent again");
                    inner.forget_parts();
                }
            }
        }
        let log = Self { name: name?, inner: Mutex::new(inner), splices: AtomicUsize::new(0) };
        let splices = log.plans().iter().filter(|plan| matches!(plan.making, Making::Splice(_))).count();
        log.splices.store(splices, Ordering::SeqCst);
        Some(log)
    }

    pub(in crate::export) fn name(&self) -> &UploadName {
        &self.name
    }

    /// The part, when the store has it.
    pub(in crate::export) fn part(&self, index: usize) -> Option<Part> {
        self.inner.lock().parts.get(index)?.part.clone()
    }

    /// What a part is to be, if an earlier process or this one has planned it, and the part when the store has it. Parts of
    /// one size need no plan: one that is missing before others is theirs.
    pub(in crate::export) fn planned(&self, index: usize) -> Option<(PartPlan, Option<Part>)> {
        let slot = self.inner.lock().parts.get(index)?.clone();
        let regular = (index as u64).saturating_mul(self.name.part_size);
        let plan = slot.plan.unwrap_or_else(|| {
            let length = slot.part.as_ref().map_or(self.name.part_size, |part| part.length);
            PartPlan::sent(regular, length)
        });
        let is_planned =
            |part: &Part| (part.offset.unwrap_or(regular), part.length) == (plan.offset, plan.length);
        let part = slot.part.filter(is_planned);
        Some((plan, part))
    }

    /// What all parts that were planned are to be.
    pub(in crate::export) fn plans(&self) -> Vec<PartPlan> {
        let count = self.inner.lock().parts.len();
        (0..count).filter_map(|index| self.planned(index)).map(|(plan, _)| plan).collect()
    }

    /// A part is about to be made.
    pub(in crate::export) fn plan(&self, index: usize, plan: PartPlan) {
        self.note(Line::Plan { index, plan });
    }

    /// Objects of splices that may be in the bucket.
    pub(super) fn splices(&self) -> &AtomicUsize {
        &self.splices
    }

    /// The chunks from `at` on, where those before end.
    pub(in crate::export) fn chunked(&self, average: u32, at: u64, cuts: &[Cut]) {
        self.note(Line::Chunks { average, at, chunks: BASE64_STANDARD.encode(ChunkList::entries_of(cuts)) });
    }

    /// The chunks of the object, as far as they are known from its start on.
    pub(in crate::export) fn chunks(&self) -> ChunkList {
        self.inner.lock().chunks.clone()
    }

    /// Up to where the chunks are known, of those that end at `limit` or before; later ones are void.
    pub(in crate::export) fn cut_chunks(&self, limit: u64) -> u64 {
        self.inner.lock().chunks.truncate(limit)
    }

    /// The usual length of the chunks that are known.
    pub(in crate::export) fn chunk_average(&self) -> Option<u32> {
        self.inner.lock().chunks.average()
    }

    /// Whether an earlier version has made parts of it: it did not say where they stand, and asked for no checksums.
    pub(in crate::export) fn is_old(&self) -> bool {
        let inner = self.inner.lock();
        inner.parts.iter().any(|slot| slot.part.as_ref().is_some_and(|part| part.offset.is_none()))
    }

    /// No part is trusted any more.
    pub(in crate::export) fn forget(&self) {
        self.inner.lock().forget_parts();
    }

    /// Up to where the chunks are known.
    pub(in crate::export) fn chunks_end(&self) -> u64 {
        self.inner.lock().chunks.end()
    }

    /// The ids of the first `count` parts, which the store all has.
    pub(in crate::export) fn ids(&self, count: usize) -> Result<Vec<String>> {
        let missing = || Error::new(ErrorKind::Internal, "a part of the upload was not sent");
        (0..count).map(|index| self.part(index).map(|part| part.id).ok_or_else(missing)).collect()
    }

    /// The store has this part.
    pub(in crate::export) fn finished(&self, index: usize, part: Part) {
        self.note(Line::Part { index, part });
    }

    /// This part and the hashes over it are to be made again.
    pub(in crate::export) fn stale(&self, index: usize) {
        self.note(Line::Stale { index });
    }

    /// How many bytes the parts have together, if none before the last one is missing.
    pub(in crate::export) fn sent_bytes(&self) -> Option<u64> {
        let inner = self.inner.lock();
        inner.parts.iter().try_fold(0u64, |sum, slot| sum.checked_add(slot.part.as_ref()?.length))
    }

    /// The object that is in place, if a process recorded that it is.
    pub(in crate::export) fn placed(&self) -> Option<Placed> {
        self.inner.lock().placed.clone()
    }

    /// The object is in place. Durable when this returns, unless it could not be recorded; then the store is asked.
    pub(in crate::export) fn place(&self, placed: Placed) {
        let mut inner = self.inner.lock();
        let line = Line::Placed(placed);
        if let Err(error) = inner.append(&line, true) {
            debug!("that an object is in place could not be recorded: {}", error.report());
        }
        inner.apply(line);
    }

    /// How far the object is hashed.
    pub(in crate::export) fn digest(&self, name: DigestName) -> DigestState {
        let inner = self.inner.lock();
        match name {
            DigestName::Sha256 => inner.sha256.clone(),
            DigestName::Md5 => inner.md5.clone(),
            DigestName::Crc64nvme => inner.crc64.clone(),
        }
    }

    /// The object is hashed further.
    pub(in crate::export) fn hashed(&self, name: DigestName, state: DigestState) {
        self.note(Line::Digest { name, state });
    }

    /// What the entity tag begins with if the object is in place already.
    pub(in crate::export) fn completing(&self) -> Option<String> {
        self.inner.lock().completing.clone()
    }

    /// The object is about to be put in place; durable when this returns.
    pub(in crate::export) fn complete(&self, mark: &str) -> Result<()> {
        let mut inner = self.inner.lock();
        let line = Line::Completing { mark: mark.to_owned() };
        inner.append(&line, true)?;
        inner.apply(line);
        Ok(())
    }

    /// All that was recorded, for another host, but for the chunks: they are many, and it makes them again.
    pub(in crate::export) fn text(&self) -> Option<String> {
        let path = self.inner.lock().path.clone();
        let text = whole_file::read_text(&path, MAX_LOG).ok()?;
        Some(text.split_inclusive('\n').filter(|line| !line.starts_with(CHUNKS)).collect())
    }

    /// The id of the upload that a log is about, by its text.
    pub(in crate::export) fn id_in(text: &str) -> Option<String> {
        text.lines().find_map(|line| match opened(line.as_bytes()) {
            Some(Line::Upload(name)) => Some(name.id),
            _ => None,
        })
    }

    /// The log that another host wrote of an upload of this key, as one of this host's, where the bucket may have another
    /// name. `None` when it is not one.
    pub(in crate::export) fn adopt(
        path: &Path,
        text: &str,
        bucket: &str,
        key: &ObjectKey,
    ) -> Result<Option<Self>> {
        let failed = |e| Error::from_io("cannot record the upload", e).in_file(path.display().to_string());
        let mut adopted = String::new();
        for line in text.split_inclusive('\n') {
            match opened(line.as_bytes()) {
                Some(Line::Upload(name)) if name.key == *key && name.is_possible() => {
                    let line = Line::Upload(UploadName { bucket: bucket.to_owned(), ..name });
                    adopted += &sealed(&line).map_err(std::io::Error::other).map_err(failed)?;
                }
                Some(Line::Upload(name)) => {
                    warn!("another host's upload {name:?} is not one of this key, and is not gone on with");
                    return Ok(None);
                }
                // This host looks itself.
                Some(Line::Placed(_)) => {}
                _ => adopted += line,
            }
        }
        fs::write(path, adopted).map_err(failed)?;
        Self::open(path)
    }

    /// The upload is given up, and its job begins another one: the log gets a name that no job has, so that it is kept
    /// until the upload was aborted. Durable when this returns.
    pub(in crate::export) fn set_aside(&self) -> Result<()> {
        let mut inner = self.inner.lock();
        let path = inner.path.with_extension(given_up());
        let directory = path.parent().unwrap_or(Path::new("."));
        fs::rename(&inner.path, &path)
            .and_then(|()| File::open(directory)?.sync_all())
            .map_err(|e| Error::from_io("cannot give up an upload", e).in_file(path.display().to_string()))?;
        inner.path = path;
        Ok(())
    }

    /// The upload is over.
    pub(in crate::export) fn remove(&self) {
        let mut inner = self.inner.lock();
        inner.file = None;
        // What stays is found, and given up or seen to be over, by the next mount.
        if failpoint::pass(Step::LogRemove).is_ok() {
            let _ = fs::remove_file(&inner.path);
        }
    }

    /// A line whose loss costs work and nothing else.
    fn note(&self, line: Line) {
        let mut inner = self.inner.lock();
        if let Err(error) = inner.append(&line, false) {
            debug!("a part could not be recorded: {}", error.report());
        }
        inner.apply(line);
    }
}

impl Inner {
    fn new(path: PathBuf, length: u64) -> Self {
        Self {
            path,
            file: None,
            length,
            parts: Vec::new(),
            sha256: DigestState::default(),
            md5: DigestState::default(),
            crc64: DigestState::default(),
            chunks: ChunkList::default(),
            completing: None,
            placed: None,
        }
    }

    /// Appends a line, or nothing.
    fn append(&mut self, line: &Line, durable: bool) -> Result<()> {
        line.step().map_or(Ok(()), failpoint::pass)?;
        let place = self.path.display().to_string();
        self.write(line, durable).map_err(|e| Error::from_io("cannot record the upload", e).in_file(place))
    }

    fn write(&mut self, line: &Line, durable: bool) -> std::io::Result<()> {
        let text = sealed(line).map_err(std::io::Error::other)?;
        if self.file.is_none() {
            let file = File::options().append(true).open(&self.path)?;
            // What a crash cut off would be glued to the next line.
            file.set_len(self.length)?;
            self.file = Some(file);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        if let Err(error) = file.write_all(text.as_bytes()) {
            let _ = file.set_len(self.length);
            return Err(error);
        }
        self.length += text.len() as u64;
        if durable { file.sync_data() } else { Ok(()) }
    }

    /// No part that was recorded so far is trusted any more.
    fn forget_parts(&mut self) {
        self.parts.clear();
        self.forget_digests();
    }

    /// The hashes, and the chunks, are to be made again from the start.
    fn forget_digests(&mut self) {
        (self.sha256, self.md5) = (DigestState::default(), DigestState::default());
        self.crc64 = DigestState::default();
        self.chunks.truncate(0);
    }

    fn slot(&mut self, index: usize) -> &mut Slot {
        if self.parts.len() <= index {
            self.parts.resize(index + 1, Slot::default());
        }
        &mut self.parts[index]
    }

    fn apply(&mut self, line: Line) {
        match line {
            Line::Upload(_) => {}
            // More than any store takes: not one of ours.
            Line::Plan { index, .. } | Line::Part { index, .. } | Line::Stale { index }
                if index >= MAX_PARTS => {}
            Line::Plan { index, plan } => *self.slot(index) = Slot { plan: Some(plan), part: None },
            Line::Part { index, part } => self.slot(index).part = Some(part),
            Line::Stale { index } => {
                if let Some(slot) = self.parts.get_mut(index) {
                    slot.part = None;
                }
                self.forget_digests();
            }
            Line::Digest { name: DigestName::Sha256, state } => self.sha256 = state,
            Line::Digest { name: DigestName::Md5, state } => self.md5 = state,
            Line::Digest { name: DigestName::Crc64nvme, state } => self.crc64 = state,
            Line::Chunks { average, at, chunks } => {
                self.chunks.extend(average, at, &BASE64_STANDARD.decode(chunks).unwrap_or_default());
            }
            // Every tag begins with nothing.
            Line::Completing { mark } if mark.is_empty() => {}
            Line::Completing { mark } => self.completing = Some(mark),
            Line::Placed(placed) => self.placed = Some(placed),
        }
    }
}

/// For the fuzz targets: reads a log's bytes, and its lines as the ones that they are written as again.
/// Returns whether it names an upload.
pub fn fuzz_log(bytes: &[u8]) -> bool {
    let log = UploadLog::parse(Path::new("fuzz.parts"), bytes);
    if let Some(log) = &log {
        let parts = log.inner.lock().parts.clone();
        assert_eq!(log.ids(parts.len()).is_ok(), parts.iter().all(|slot| slot.part.is_some()));
        let _ = (log.sent_bytes(), log.name.is_possible(), log.placed(), log.completing(), log.plans());
    }
    for line in bytes.split(|&byte| byte == b'\n').filter_map(opened::<Line>) {
        let text = sealed(&line).unwrap_or_default();
        let again = opened(text.as_bytes()).and_then(|line: Line| sealed(&line).ok());
        assert_eq!(again.as_ref(), Some(&text), "a line is read as another one than it was written");
    }
    log.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::sealed::SUM;
    use crate::units::GIB;

    fn name() -> UploadName {
        let key = ObjectKey::parse("k").unwrap();
        UploadName { bucket: "b".into(), key, id: "u".into(), part_size: MIB, boot: None }
    }

    #[test]
    fn a_log_is_read_as_it_was_written_and_up_to_where_it_was_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.parts");
        let log = UploadLog::create(path.clone(), name()).unwrap();
        for index in [0, 2, 1] {
            log.finished(index, Part { offset: None, length: 8, id: format!("\"{index}\"") });
        }
        log.hashed(DigestName::Md5, DigestState { bytes: 16, state: "ab".into() });
        log.stale(2);
        log.hashed(DigestName::Sha256, DigestState { bytes: 8, state: "cd".into() });
        log.complete("\"tag").unwrap();
        let again = UploadLog::open(&path).unwrap().unwrap();
        assert_eq!(again.name(), &name());
        assert_eq!(again.ids(2).unwrap(), ["\"0\"", "\"1\""]);
        assert_eq!(again.part(2), None);
        assert!(again.ids(3).is_err());
        assert_eq!(again.digest(DigestName::Sha256).bytes, 8);
        assert_eq!(again.digest(DigestName::Md5), DigestState::default());
        assert_eq!(again.completing().as_deref(), Some("\"tag"));
        let text = fs::read(&path).unwrap();
        for length in 0..text.len() {
            fs::write(&path, &text[..length]).unwrap();
            let Some(cut) = UploadLog::open(&path).unwrap() else { continue };
            cut.finished(7, Part { offset: None, length: 1, id: "x".into() });
            let again = UploadLog::open(&path).unwrap().unwrap();
            assert_eq!(again.part(7).unwrap().id, "x", "cut off at {length}");
        }
        assert!(UploadLog::open(&directory.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn a_log_of_another_host_is_checked_before_it_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(format!("{name}.parts"));
        let key = ObjectKey::parse("k").unwrap();
        let adopt = |change: &dyn Fn(&mut UploadName)| {
            let mut name = name();
            change(&mut name);
            let part = || Part { offset: None, length: u64::MAX, id: "x".into() };
            let parts = (0..2).map(|index| Line::Part { index, part: part() });
            let lines = std::iter::once(Line::Upload(name)).chain(parts);
            let text = lines.map(|line| sealed(&line).unwrap()).collect::<String>();
            UploadLog::adopt(&path("own"), &text, "mine", &key).unwrap()
        };
        let log = adopt(&|name| name.bucket = "theirs".into()).unwrap();
        assert_eq!((log.name().bucket.as_str(), log.sent_bytes()), ("mine", None));
        for part_size in [0, 1, MIB + 1, 6 * GIB, u64::MAX] {
            assert!(adopt(&|name| name.part_size = part_size).is_none(), "{part_size}");
        }
        assert!(adopt(&|name| name.key = ObjectKey::parse("other").unwrap()).is_none());
    }

    #[test]
    fn uploads_that_are_given_up_keep_a_log_each() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.parts");
        for _ in 0..2 {
            UploadLog::create(path.clone(), name()).unwrap().set_aside().unwrap();
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_damaged_line_costs_the_parts_before_it_and_what_has_no_checksum_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.parts");
        let log = UploadLog::create(path.clone(), name()).unwrap();
        let part = |id: &str| Part { offset: None, length: 8, id: id.to_owned() };
        log.finished(0, part("old"));
        log.stale(0);
        log.finished(1, part("new"));
        log.hashed(DigestName::Md5, DigestState { bytes: 16, state: "ab".into() });
        log.complete("\"tag").unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            for at in 0..line.len() {
                let mut damaged: Vec<Vec<u8>> = lines.iter().map(|line| line.as_bytes().to_vec()).collect();
                damaged[number][at] ^= 0x55;
                fs::write(&path, [damaged.join(&b'\n'), b"\n".to_vec()].concat()).unwrap();
                let Some(read) = UploadLog::open(&path).unwrap() else {
                    assert_eq!(number, 0, "only the upload's own line may not be missing");
                    continue;
                };
                assert_eq!(read.part(0), None, "line {number}: a part that was taken back is there again");
                assert!(read.part(1).is_none_or(|part| part.id == "new"));
                assert!(read.digest(DigestName::Md5).bytes == 0 || number < 4);
                assert!(read.completing().is_none_or(|mark| mark == "\"tag"));
            }
        }
        let plain: Vec<_> = lines.iter().map(|l| format!("{}}}", l.split_once(SUM).unwrap().0)).collect();
        fs::write(&path, plain.join("\n") + "\n").unwrap();
        let old = UploadLog::open(&path).unwrap().unwrap();
        assert_eq!((old.part(0), old.part(1).unwrap().id.as_str()), (None, "new"));
        assert_eq!(old.completing().as_deref(), Some("\"tag"));
    }
}
