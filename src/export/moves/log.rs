//! What is about to be renamed or removed, so that a later process can tell how far it got.
//!
//! One file of JSON lines with checksums for all buckets, only ever appended to while something is under way, and
//! emptied when nothing is. A move is durable before its first step. That an object was made, and that all is over, is
//! noted without waiting for the disk: where a power failure loses that, the bucket is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::bucket::{ObjectKey, ObjectMeta, Replaces};
use crate::error::{Error, Result};
use crate::export::sealed::{sealed, unsealed};
use crate::export::sidecars::Sidecar;
use crate::failpoint::{self, Step};

/// Bytes from which on a log is emptied that holds nothing any more.
const WORTH_EMPTYING: u64 = 64 << 10;

/// An object that is renamed or removed, and what there was before the first step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::export) struct Move {
    pub(super) id: String,
    /// The bucket's name in the mount.
    pub(super) bucket: String,
    pub(super) from: Found,
    /// `None` where it is removed.
    pub(super) to: Option<Found>,
    /// The entity tag of what was made at the new name, once that is known; its own is `None` where stores have none.
    #[serde(skip)]
    pub(super) made: Option<Option<String>>,
}

/// A key, and what stood there and beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) key: ObjectKey,
    /// The object: its bytes and its entity tag.
    pub(super) object: Option<(u64, Option<String>)>,
    /// When it was last written, by the store's clock: equal bytes that were put there again are another object. Absent
    /// from what earlier versions recorded.
    #[serde(default)]
    pub(super) modified: Option<SystemTime>,
    /// The sidecars that are ours, by their entity tags.
    pub(super) sidecars: BTreeMap<Sidecar, Replaces>,
}

impl Found {
    pub(super) fn new(key: &ObjectKey, meta: Option<&ObjectMeta>) -> Self {
        let object = meta.map(|meta| (meta.object_size, meta.etag.clone()));
        let modified = meta.map(|meta| meta.modified);
        Self { key: key.clone(), object, modified, sidecars: BTreeMap::new() }
    }

    /// Whether the object is the one that stood there.
    pub(super) fn is(&self, meta: Option<&ObjectMeta>) -> bool {
        self.is_equal(meta) && (self.modified.is_none() || self.modified == meta.map(|meta| meta.modified))
    }

    /// Whether the object has the bytes of the one that stood there, as far as its entity tag tells, and was put there
    /// later.
    pub(super) fn is_there_again(&self, meta: Option<&ObjectMeta>) -> bool {
        meta.is_some() && self.is_equal(meta) && !self.is(meta)
    }

    fn is_equal(&self, meta: Option<&ObjectMeta>) -> bool {
        self.object == meta.map(|meta| (meta.object_size, meta.etag.clone()))
    }

    /// What a request replaces that is about the object that stood there.
    pub(super) fn replaces(&self) -> Replaces {
        Replaces::found(self.object.as_ref().map(|(_, etag)| etag.as_deref()))
    }
}

impl Move {
    /// The bucket's name in the mount.
    pub(in crate::export) fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Whether it is about an object or a sidecar of this key.
    fn names(&self, bucket: &str, key: &ObjectKey) -> bool {
        let object = Sidecar::parse(key).map(|(object, _)| object);
        let is_key = |found: &Found| found.key == *key || object.as_ref() == Some(&found.key);
        self.bucket == bucket && (is_key(&self.from) || self.to.as_ref().is_some_and(is_key))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Begin(Box<Move>),
    /// The object is there under its new name.
    Made {
        id: String,
        etag: Option<String>,
    },
    /// Nothing is left to be done.
    End {
        id: String,
    },
}

/// The log of all moves of a mount.
pub(in crate::export) struct MoveLog {
    inner: Mutex<Inner>,
    /// The moves that were interrupted, or whose requests failed: names that lead to them wait.
    unsettled: watch::Sender<BTreeSet<String>>,
}

struct Inner {
    path: PathBuf,
    /// Open from the first line that this process appends.
    file: Option<File>,
    /// Bytes of whole lines.
    length: u64,
    open: BTreeMap<String, Move>,
}

impl MoveLog {
    pub(in crate::export) fn new(path: PathBuf) -> Self {
        let inner = Inner { path, file: None, length: 0, open: BTreeMap::new() };
        Self { inner: Mutex::new(inner), unsettled: watch::Sender::new(BTreeSet::new()) }
    }

    /// Reads what earlier processes left; returns the moves that are not over. Nothing was begun yet.
    pub(in crate::export) fn load(&self) -> Vec<Move> {
        let mut inner = self.inner.lock();
        if let Err(error) = inner.load() {
            // Nothing is taken away from it: a later mount may be able to read it.
            let path = inner.path.display();
            warn!("what was being renamed or removed cannot be read, and stays as it is: {path}: {error}");
        }
        let left: Vec<_> = inner.open.values().cloned().collect();
        drop(inner);
        self.unsettled.send_modify(|ids| ids.extend(left.iter().map(|left| left.id.clone())));
        left
    }

    /// Something is about to be renamed or removed; durable when this returns. Blocks.
    pub(super) fn begin(&self, begun: Move) -> Result<()> {
        failpoint::pass(Step::MoveRecord)?;
        let mut inner = self.inner.lock();
        let place = inner.path.display().to_string();
        let failed = |e| Error::from_io("cannot record what is about to be done", e).in_file(&place);
        let file = inner.append(&Line::Begin(Box::new(begun.clone()))).map_err(failed)?;
        let id = begun.id.clone();
        inner.open.insert(id.clone(), begun);
        drop(inner);
        if let Err(error) = file.sync_data() {
            self.end(&id);
            return Err(failed(error));
        }
        Ok(())
    }

    /// The object is there under its new name.
    pub(super) fn made(&self, id: &str, etag: Option<&str>) {
        let line = Line::Made { id: id.to_owned(), etag: etag.map(str::to_owned) };
        let noted = failpoint::pass(Step::MoveNote).is_ok().then(|| self.inner.lock().append(&line));
        if !matches!(noted, Some(Ok(_))) {
            debug!("that an object was renamed could not be noted");
        }
    }

    /// Nothing is left to be done.
    pub(super) fn end(&self, id: &str) {
        let mut inner = self.inner.lock();
        inner.open.remove(id);
        // What stays is found to be over by the next mount.
        if failpoint::pass(Step::MoveEnd).is_ok()
            && let Ok(file) = inner.append(&Line::End { id: id.to_owned() })
        {
            if inner.open.is_empty() && inner.length > WORTH_EMPTYING && file.set_len(0).is_ok() {
                inner.length = 0;
            }
            // Soon, because a key may get the same object again; and nobody waits for it.
            sync_soon(file);
        }
        drop(inner);
        self.unsettled.send_if_modified(|ids| ids.remove(id));
    }

    /// Whoever comes to one of its names waits from now on.
    pub(super) fn unsettle(&self, id: &str) {
        self.unsettled.send_if_modified(|ids| ids.insert(id.to_owned()));
    }

    /// Waits until nothing is unsettled that is about this key.
    pub(in crate::export) async fn settled(&self, bucket: &str, key: &ObjectKey) {
        let is_free = |ids: &BTreeSet<String>| {
            let inner = self.inner.lock();
            !ids.iter().filter_map(|id| inner.open.get(id)).any(|open| open.names(bucket, key))
        };
        // The sender is here, so that waiting does not fail.
        let _ = self.unsettled.subscribe().wait_for(is_free).await;
    }
}

/// Syncs a file on a thread that may wait, where there is a runtime.
fn sync_soon(file: File) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn_blocking(move || file.sync_data());
    }
}

impl Inner {
    fn load(&mut self) -> std::io::Result<()> {
        let text = match fs::read(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                self.length = fs::metadata(&self.path).map_or(0, |meta| meta.len());
                return Err(error);
            }
            Ok(text) => text,
        };
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        self.length = whole as u64;
        for line in text[..whole].split_inclusive(|&byte| byte == b'\n') {
            match unsealed(line) {
                Some(Line::Begin(begun)) => drop(self.open.insert(begun.id.clone(), *begun)),
                Some(Line::Made { id, etag }) => {
                    if let Some(open) = self.open.get_mut(&id) {
                        open.made = Some(etag);
                    }
                }
                Some(Line::End { id }) => drop(self.open.remove(&id)),
                // It may have said that one of those before it is over.
                None => {
                    warn!(
                        path = %self.path.display(),
                        "a line about renames and removals is damaged: those before it are not finished"
                    );
                    self.open.clear();
                }
            }
        }
        Ok(())
    }

    /// Appends a line, or nothing; returns the file, to be synced.
    fn append(&mut self, line: &Line) -> std::io::Result<File> {
        let text = sealed(line).map_err(std::io::Error::other)?;
        if self.file.is_none() {
            let is_new = !self.path.exists();
            let file = File::options().create(true).append(true).open(&self.path)?;
            if is_new {
                File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
            }
            // What a crash cut off would be glued to the next line.
            file.set_len(self.length)?;
            self.file = Some(file);
        }
        let Some(file) = &mut self.file else { return Err(std::io::ErrorKind::NotFound.into()) };
        if let Err(error) = file.write_all(text.as_bytes()) {
            let _ = file.set_len(self.length);
            return Err(error);
        }
        self.length += text.len() as u64;
        file.try_clone()
    }
}

/// For the fuzz targets: reads lines about moves, as the ones that they are written as again. Returns whether there is one.
pub fn fuzz_moves(bytes: &[u8]) -> bool {
    let lines = bytes.split(|&byte| byte == b'\n');
    let lines = lines.filter_map(|line| unsealed(line).or_else(|| serde_json::from_slice::<Line>(line).ok()));
    lines.fold(false, |_, line| {
        let text = sealed(&line).unwrap_or_default();
        let again = unsealed::<Line>(text.as_bytes()).and_then(|line| sealed(&line).ok());
        assert_eq!(again.as_ref(), Some(&text), "a line is read as another one than it was written");
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(id: &str, key: &str) -> Move {
        let key = ObjectKey::parse(key).unwrap();
        let mut from =
            Found { key, object: Some((3, Some("\"t\"".into()))), modified: None, sidecars: BTreeMap::new() };
        from.sidecars.insert(Sidecar::Status, Replaces::Tag("\"s\"".into()));
        let to = Found {
            key: ObjectKey::parse("to").unwrap(),
            object: None,
            modified: None,
            sidecars: BTreeMap::new(),
        };
        Move { id: id.into(), bucket: "b".into(), from, to: Some(to), made: None }
    }

    fn left(path: &Path) -> Vec<Move> {
        MoveLog::new(path.to_owned()).load()
    }

    #[test]
    fn what_is_not_over_is_left_whatever_a_crash_cuts_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("moves");
        assert!(left(&path).is_empty());
        let log = MoveLog::new(path.clone());
        log.begin(moved("1", "a.raw")).unwrap();
        log.begin(moved("2", "c")).unwrap();
        log.end("1");
        log.made("2", Some("\"x\""));
        let second = Move { made: Some(Some("\"x\"".into())), ..moved("2", "c") };
        assert_eq!(left(&path), [second]);
        let text = fs::read(&path).unwrap();
        for length in 0..text.len() {
            fs::write(&path, &text[..length]).unwrap();
            let log = MoveLog::new(path.clone());
            let before = log.load().len();
            log.begin(moved("3", "e")).unwrap();
            assert_eq!(left(&path).len(), before + 1, "cut off at {length}");
        }
        for at in 0..text.len() {
            let mut damaged = text.clone();
            damaged[at] ^= 0x55;
            fs::write(&path, damaged).unwrap();
            assert!(left(&path).iter().all(|left| ["1", "2"].contains(&left.id.as_str())));
        }
    }

    #[test]
    fn equal_bytes_that_were_put_there_again_are_another_object() {
        let key = ObjectKey::parse("k").unwrap();
        let meta = |seconds| ObjectMeta {
            key: key.clone(),
            object_size: 3,
            modified: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds),
            etag: Some("\"t\"".into()),
        };
        let found = Found::new(&key, Some(&meta(1)));
        assert!(
            found.is(Some(&meta(1))) && !found.is(Some(&meta(2))) && found.is_there_again(Some(&meta(2)))
        );
        assert!(!found.is_there_again(Some(&meta(1))) && !found.is_there_again(None));
        let text = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Found>(&text).unwrap(), found);
        let earlier = serde_json::json!({"key": "k", "object": [3, "\"t\""], "sidecars": {}});
        let earlier: Found = serde_json::from_value(earlier).unwrap();
        assert!(earlier.is(Some(&meta(2))) && !earlier.is(None));
    }

    #[test]
    fn a_damaged_line_may_have_ended_those_before_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("moves");
        let log = MoveLog::new(path.clone());
        log.begin(moved("1", "a.raw")).unwrap();
        let begun = fs::read(&path).unwrap().len();
        log.end("1");
        log.begin(moved("2", "c")).unwrap();
        let mut text = fs::read(&path).unwrap();
        text[begun + 5] ^= 1;
        fs::write(&path, text).unwrap();
        assert_eq!(left(&path), [moved("2", "c")]);
    }

    #[tokio::test]
    async fn names_of_what_is_unsettled_wait_and_others_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let log = MoveLog::new(directory.path().join("moves"));
        log.begin(moved("1", "a.raw")).unwrap();
        let key = |text| ObjectKey::parse(text).unwrap();
        // Whoever began it is still at it.
        log.settled("b", &key("a.raw")).await;
        log.unsettle("1");
        log.settled("b", &key("other")).await;
        log.settled("c", &key("a.raw")).await;
        for name in ["a.raw", "a.raw.status", "to"] {
            let name = key(name);
            let waiting = log.settled("b", &name);
            tokio::pin!(waiting);
            assert!(futures::poll!(&mut waiting).is_pending());
        }
        log.end("1");
        log.settled("b", &key("a.raw")).await;
    }
}
