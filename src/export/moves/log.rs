//! What is about to be renamed or removed, so that a later process can tell how far it got.
//!
//! One file of JSON lines with checksums for all buckets. It is appended to, and when it has become long it is
//! written anew with what is not over, what is about buckets that are not in this mount for instance. A move is durable
//! before its first step. That an object was made, and that all is over, is noted without waiting for the disk: where a power
//! failure loses that, the bucket is asked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::bucket::{ObjectKey, ObjectMeta, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::export::sealed::{sealed, unsealed};
use crate::export::sidecars::Sidecar;
use crate::failpoint::{self, Step};
use crate::whole_file;

/// Bytes from which on a log is written anew, besides twice those that it needs.
const LONG: u64 = 64 << 10;

/// Largest log that is read: hundreds of thousands of lines.
const MAX_LOG: u64 = 128 << 20;

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
    /// Told when a move is over.
    ended: watch::Sender<()>,
}

struct Inner {
    path: PathBuf,
    /// Open from the first line that this process appends.
    file: Option<File>,
    /// Bytes of whole lines.
    length: u64,
    /// Bytes of it when it was last written anew.
    needed: u64,
    /// Whether its name may be lost by a power failure.
    is_new: bool,
    /// Whether it may have more than this process knows.
    is_unread: bool,
    open: BTreeMap<String, Move>,
}

impl MoveLog {
    pub(in crate::export) fn new(path: PathBuf) -> Self {
        let (is_new, is_unread) = (!path.exists(), false);
        let inner =
            Inner { path, file: None, length: 0, needed: 0, is_new, is_unread, open: BTreeMap::new() };
        Self { inner: Mutex::new(inner), ended: watch::Sender::new(()) }
    }

    /// Reads what earlier processes left; returns the moves that are not over. Nothing was begun yet.
    pub(in crate::export) fn load(&self) -> Vec<Move> {
        let mut inner = self.inner.lock();
        if let Err(error) = inner.load() {
            warn!("what was being renamed or removed is not known: {}", error.report());
        }
        inner.open.values().cloned().collect()
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
        if inner.is_long() {
            // Where that fails the log is as it was, and what was appended is synced below.
            let _ = inner.write_anew().inspect_err(|e| debug!("the log of moves stays long: {e}"));
        }
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
        let mut inner = self.inner.lock();
        if let Some(open) = inner.open.get_mut(id) {
            open.made = Some(etag.map(str::to_owned));
        }
        let noted = failpoint::pass(Step::MoveNote).is_ok().then(|| inner.append(&line));
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
            // Soon, because a key may get the same object again; and nobody waits for it.
            sync_soon(file);
        }
        drop(inner);
        self.ended.send_replace(());
    }

    /// Waits until no rename or removal is under way, or interrupted, that is about this key.
    pub(in crate::export) async fn settled(&self, bucket: &str, key: &ObjectKey) {
        let is_free = |_: &()| !self.inner.lock().open.values().any(|open| open.names(bucket, key));
        // The sender is here, so that waiting does not fail.
        let _ = self.ended.subscribe().wait_for(is_free).await;
    }
}

/// Syncs a file on a thread that may wait, where there is a runtime.
fn sync_soon(file: File) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn_blocking(move || file.sync_data());
    }
}

impl Inner {
    fn load(&mut self) -> Result<()> {
        let text = match whole_file::read(&self.path, MAX_LOG) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            // None of ours, or of no use: out of the way, where somebody can look at it.
            Err(error)
                if whole_file::is_unfit(&error)
                    && fs::rename(&self.path, self.path.with_extension("unfit")).is_ok() =>
            {
                self.is_new = true;
                return Err(error);
            }
            Err(error) => {
                // Nothing is taken away from it: a later mount may be able to read it.
                self.is_unread = true;
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

    /// Whether most of the log is about what is over.
    fn is_long(&self) -> bool {
        !self.is_unread && self.length > LONG + 2 * self.needed
    }

    /// Writes a log of what is not over in place of this one; this one stays where that fails.
    fn write_anew(&mut self) -> std::io::Result<()> {
        let new = self.path.with_extension("new");
        let mut text = String::new();
        for open in self.open.values() {
            text += &sealed(&Line::Begin(Box::new(open.clone())))?;
            if let Some(etag) = &open.made {
                text += &sealed(&Line::Made { id: open.id.clone(), etag: etag.clone() })?;
            }
        }
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        (self.file, self.length, self.needed) = (None, text.len() as u64, text.len() as u64);
        self.is_new = true;
        self.sync_name()
    }

    /// Makes the log's name as durable as its lines.
    fn sync_name(&mut self) -> std::io::Result<()> {
        if self.is_new {
            File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
            self.is_new = false;
        }
        Ok(())
    }

    /// Appends a line, or nothing; returns the file, to be synced.
    fn append(&mut self, line: &Line) -> std::io::Result<File> {
        let text = sealed(line).map_err(std::io::Error::other)?;
        if self.file.is_none() {
            let file = File::options().create(true).append(true).open(&self.path)?;
            // What a crash cut off would be glued to the next line.
            file.set_len(self.length)?;
            self.file = Some(file);
        }
        self.sync_name()?;
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
    fn a_log_stays_short_beside_what_is_never_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("moves");
        let log = MoveLog::new(path.clone());
        log.begin(moved("absent", "a.raw")).unwrap();
        log.made("absent", Some("\"x\""));
        let absent = Move { made: Some(Some("\"x\"".into())), ..moved("absent", "a.raw") };
        let (mut longest, key) = (0, format!("{}/{}", "x".repeat(250), "x".repeat(250)));
        for id in 0..400 {
            let id = id.to_string();
            log.begin(moved(&id, &key)).unwrap();
            longest = longest.max(fs::metadata(&path).unwrap().len());
            // What crashes leave at any time.
            if id.ends_with("99") {
                assert_eq!(left(&path), [moved(&id, &key), absent.clone()]);
            }
            log.end(&id);
        }
        assert!((LONG..LONG + (8 << 10)).contains(&longest), "{longest} bytes");
        assert_eq!(left(&path), [absent]);
    }

    #[test]
    fn what_is_no_log_goes_out_of_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("moves");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let log = MoveLog::new(path.clone());
        assert!(log.load().is_empty());
        log.begin(moved("1", "a.raw")).unwrap();
        assert_eq!(left(&path), [moved("1", "a.raw")]);
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
    async fn who_comes_to_a_name_of_what_is_not_over_waits_and_others_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let log = MoveLog::new(directory.path().join("moves"));
        log.begin(moved("1", "a.raw")).unwrap();
        let key = |text| ObjectKey::parse(text).unwrap();
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
