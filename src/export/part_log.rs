//! The log of an upload under way: what a later process needs to go on with it.
//!
//! One file of JSON lines, only ever appended to. What a crash cuts off at its end is done again; only the lines
//! without which an upload would be lost, or an object be made twice, are synced.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::debug;

use crate::bucket::{MAX_PARTS, ObjectKey};
use crate::error::{Error, ErrorKind, Result};

/// Which upload it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UploadName {
    /// The bucket's name in the mount.
    pub(super) bucket: String,
    pub(super) key: ObjectKey,
    /// The store's id of it.
    pub(super) id: String,
    /// Bytes of each part but the last.
    pub(super) part_size: u64,
}

/// A part that the store has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) length: u64,
    /// The id by which the object is put together.
    pub(super) id: String,
}

/// A hash over the first `bytes` of the object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DigestState {
    pub(super) bytes: u64,
    /// The hash's own state, hexadecimal; empty at the beginning.
    pub(super) state: String,
}

/// The hashes that are made of every object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DigestName {
    Sha256,
    Md5,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Upload(UploadName),
    Part {
        index: usize,
        #[serde(flatten)]
        part: Part,
    },
    /// The part was written again after it had been sent.
    Stale {
        index: usize,
    },
    Digest {
        name: DigestName,
        #[serde(flatten)]
        state: DigestState,
    },
    /// From here on the object may be in place, with an entity tag that begins like this.
    Completing {
        mark: String,
    },
}

/// An upload under way, with its log.
#[derive(Debug)]
pub(super) struct PartLog {
    name: UploadName,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    parts: Vec<Option<Part>>,
    sha256: DigestState,
    md5: DigestState,
    completing: Option<String>,
}

impl PartLog {
    /// Begins the log of an upload that was just started; durable when this returns.
    pub(super) fn create(path: PathBuf, name: UploadName) -> Result<Self> {
        let failed = |e| Error::from_io("cannot record the upload", e).in_file(path.display().to_string());
        let file = File::options().append(true).create_new(true).open(&path).map_err(failed)?;
        let log = Self { inner: Mutex::new(Inner::new(path.clone(), file)), name: name.clone() };
        log.inner.lock().append(&Line::Upload(name), true).map_err(failed)?;
        let directory = path.parent().unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).map_err(failed)?;
        Ok(log)
    }

    /// Reads the log of an earlier process; `None` when it holds no upload. A line that a crash cut off ends it.
    pub(super) fn open(path: &Path) -> Result<Option<Self>> {
        let failed =
            |e| Error::from_io("cannot read the record of an upload", e).in_file(path.display().to_string());
        let text = match fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(failed)?,
        };
        let file = File::options().append(true).open(path).map_err(failed)?;
        let mut inner = Inner::new(path.to_owned(), file);
        let mut name = None;
        let mut whole = 0;
        for line in text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            match serde_json::from_slice(line) {
                Ok(Line::Upload(upload)) => name = Some(upload),
                Ok(line) => inner.apply(line),
                Err(_) => break,
            }
            whole += line.len() as u64;
        }
        // What follows would be glued to the line that was cut off.
        inner.file.set_len(whole).map_err(failed)?;
        Ok(name.map(|name| Self { name, inner: Mutex::new(inner) }))
    }

    pub(super) fn name(&self) -> &UploadName {
        &self.name
    }

    /// The part, when the store has it.
    pub(super) fn part(&self, index: usize) -> Option<Part> {
        self.inner.lock().parts.get(index).cloned().flatten()
    }

    /// The ids of the first `count` parts, which the store all has.
    pub(super) fn ids(&self, count: usize) -> Result<Vec<String>> {
        let missing = || Error::new(ErrorKind::Internal, "a part of the upload was not sent");
        (0..count).map(|index| self.part(index).map(|part| part.id).ok_or_else(missing)).collect()
    }

    /// The store has this part.
    pub(super) fn finished(&self, index: usize, part: Part) {
        self.note(Line::Part { index, part });
    }

    /// This part and the hashes over it are to be made again.
    pub(super) fn stale(&self, index: usize) {
        self.note(Line::Stale { index });
    }

    /// How far the object is hashed.
    pub(super) fn digest(&self, name: DigestName) -> DigestState {
        let inner = self.inner.lock();
        match name {
            DigestName::Sha256 => inner.sha256.clone(),
            DigestName::Md5 => inner.md5.clone(),
        }
    }

    /// The object is hashed further.
    pub(super) fn hashed(&self, name: DigestName, state: DigestState) {
        self.note(Line::Digest { name, state });
    }

    /// What the entity tag begins with if the object is in place already.
    pub(super) fn completing(&self) -> Option<String> {
        self.inner.lock().completing.clone()
    }

    /// The object is about to be put in place; durable when this returns.
    pub(super) fn complete(&self, mark: &str) -> Result<()> {
        let mut inner = self.inner.lock();
        let line = Line::Completing { mark: mark.to_owned() };
        let place = inner.path.display().to_string();
        inner
            .append(&line, true)
            .map_err(|e| Error::from_io("cannot record the upload", e).in_file(place))?;
        inner.apply(line);
        Ok(())
    }

    /// All that was recorded, for another host.
    pub(super) fn text(&self) -> Option<String> {
        fs::read_to_string(&self.inner.lock().path).ok()
    }

    /// The log that another host wrote, as one of this host's.
    pub(super) fn adopt(path: &Path, text: &str) -> Result<Option<Self>> {
        let failed = |e| Error::from_io("cannot record the upload", e).in_file(path.display().to_string());
        fs::write(path, text).map_err(failed)?;
        Self::open(path)
    }

    /// The upload is given up, and its job begins another one: the log gets a name that no job has, so that it is kept
    /// until the upload was aborted. Durable when this returns.
    pub(super) fn set_aside(&self) -> Result<()> {
        let mut inner = self.inner.lock();
        let path = inner.path.with_extension("given-up.parts");
        let directory = path.parent().unwrap_or(Path::new("."));
        fs::rename(&inner.path, &path)
            .and_then(|()| File::open(directory)?.sync_all())
            .map_err(|e| Error::from_io("cannot give up an upload", e).in_file(path.display().to_string()))?;
        inner.path = path;
        Ok(())
    }

    /// The upload is over.
    pub(super) fn remove(&self) {
        let _ = fs::remove_file(&self.inner.lock().path);
    }

    /// A line whose loss costs work and nothing else.
    fn note(&self, line: Line) {
        let mut inner = self.inner.lock();
        if let Err(error) = inner.append(&line, false) {
            debug!(path = %inner.path.display(), "a part could not be recorded: {error}");
        }
        inner.apply(line);
    }
}

impl Inner {
    fn new(path: PathBuf, file: File) -> Self {
        let (sha256, md5) = (DigestState::default(), DigestState::default());
        Self { path, file, parts: Vec::new(), sha256, md5, completing: None }
    }

    fn append(&mut self, line: &Line, durable: bool) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(line).map_err(std::io::Error::other)?;
        text.push(b'\n');
        self.file.write_all(&text)?;
        if durable { self.file.sync_data() } else { Ok(()) }
    }

    fn apply(&mut self, line: Line) {
        match line {
            Line::Upload(_) => {}
            // More than any store takes: not one of ours.
            Line::Part { index, .. } | Line::Stale { index } if index >= MAX_PARTS => {}
            Line::Part { index, part } => {
                if self.parts.len() <= index {
                    self.parts.resize(index + 1, None);
                }
                self.parts[index] = Some(part);
            }
            Line::Stale { index } => {
                if let Some(part) = self.parts.get_mut(index) {
                    *part = None;
                }
                (self.sha256, self.md5) = (DigestState::default(), DigestState::default());
            }
            Line::Digest { name: DigestName::Sha256, state } => self.sha256 = state,
            Line::Digest { name: DigestName::Md5, state } => self.md5 = state,
            Line::Completing { mark } => self.completing = Some(mark),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> UploadName {
        let key = ObjectKey::parse("k").unwrap();
        UploadName { bucket: "b".into(), key, id: "u".into(), part_size: 8 }
    }

    #[test]
    fn a_log_is_read_as_it_was_written_and_up_to_where_it_was_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.parts");
        let log = PartLog::create(path.clone(), name()).unwrap();
        for index in [0, 2, 1] {
            log.finished(index, Part { length: 8, id: format!("\"{index}\"") });
        }
        log.hashed(DigestName::Md5, DigestState { bytes: 16, state: "ab".into() });
        log.stale(2);
        log.hashed(DigestName::Sha256, DigestState { bytes: 8, state: "cd".into() });
        log.complete("\"tag").unwrap();
        let again = PartLog::open(&path).unwrap().unwrap();
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
            let Some(cut) = PartLog::open(&path).unwrap() else { continue };
            cut.finished(7, Part { length: 1, id: "x".into() });
            let again = PartLog::open(&path).unwrap().unwrap();
            assert_eq!(again.part(7).unwrap().id, "x", "cut off at {length}");
        }
        assert!(PartLog::open(&directory.path().join("none")).unwrap().is_none());
    }
}
