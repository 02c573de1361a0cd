//! The attributes of a directory's files, and the document in which a bucket has them: read as hostile input, written
//! over the document that was read only, and merged with what another host wrote meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use super::{MAX_XATTRS, is_user_xattr};
use crate::bucket::Replaces;
use crate::error::{Error, ErrorKind, Result};
use crate::export::sealed::{opened, sealed};

/// Version of the document.
const VERSION: u32 = 1;

/// Bytes of the largest document that is used.
const MAX_DOCUMENT: usize = 32 << 20;

/// Permission bits and those for setuid, setgid and sticky: a mode has nothing else here, least of all a file's type.
const MODE_BITS: u16 = 0o7777;

/// What is set on one file or directory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(in crate::vfs) struct FileAttributes {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::vfs) mode: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::vfs) uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::vfs) gid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::vfs) modified: Option<Timestamp>,
    /// When something of this was last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::vfs) changed: Option<Timestamp>,
    /// Values in hexadecimal.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) xattrs: BTreeMap<String, String>,
    /// The entity tag of the object that they were set for: they are no other object's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) etag: Option<String>,
}

/// What is set on a content that is not in the bucket yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Pending {
    /// The job that puts the content there; `None` while it is written.
    #[serde(default)]
    pub(super) job: Option<String>,
    #[serde(flatten)]
    pub(super) set: FileAttributes,
    /// What is set on a content that is written while the job still puts the one before in place.
    #[serde(skip)]
    pub(super) next: Option<FileAttributes>,
}

impl Pending {
    /// What is set on a content that no job puts in place yet.
    pub(super) fn of_written(set: FileAttributes) -> Self {
        Self { set, ..Self::default() }
    }

    /// What is set on the content that is being written, to be changed.
    pub(super) fn written(&mut self) -> &mut FileAttributes {
        match self.job {
            None => &mut self.set,
            Some(_) => self.next.get_or_insert_with(|| self.set.of_new_content()),
        }
    }

    /// What is set on the content that the name has now: the one that is being written, or the job's.
    pub(super) fn shown(&self, is_written: bool) -> &FileAttributes {
        self.next.as_ref().filter(|_| is_written).unwrap_or(&self.set)
    }

    /// Whether some of it is in no document.
    pub(super) fn is_unsaved(&self) -> bool {
        self.job.is_none() || self.next.is_some()
    }
}

/// A directory's document.
#[derive(Debug, Serialize, Deserialize)]
struct Written<Name: Ord, File, Job> {
    version: u32,
    directory: String,
    /// By name; directories end with `/`.
    files: BTreeMap<Name, File>,
    /// What becomes a file's when its job succeeds.
    #[serde(default = "BTreeMap::new", skip_serializing_if = "BTreeMap::is_empty")]
    pending: BTreeMap<Name, Job>,
}

/// What a document says that is sound.
#[derive(Debug, Default)]
pub(super) struct Document {
    files: BTreeMap<String, FileAttributes>,
    pending: BTreeMap<String, Pending>,
}

/// A directory as this mount knows it.
pub(super) struct Directory {
    pub(super) files: BTreeMap<String, FileAttributes>,
    pub(super) pending: BTreeMap<String, Pending>,
    /// When the document was read or written.
    pub(super) loaded: Instant,
    /// Whether writing it failed the last time.
    pub(super) is_failing: bool,
    /// The document that is there, as its tag; `None` when there is none.
    found: Option<Option<String>>,
    /// The names that are not in the document as they are here, with the number of the last change.
    changed: BTreeMap<String, u64>,
    changes: u64,
    /// What is pending without a job and was not open the last time that somebody looked.
    idle: BTreeSet<String>,
}

/// A document that is to be written.
pub(super) struct Snapshot {
    /// `None` when nothing is set on any file.
    pub(super) document: Option<Vec<u8>>,
    pub(super) replaces: Replaces,
    changes: u64,
}

impl FileAttributes {
    /// Whether nothing is set.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self { etag: self.etag.clone(), ..Self::default() }
    }

    /// Whether they are those of the object with that tag. Versions before did not always know it.
    pub(super) fn is_of(&self, etag: Option<&str>) -> bool {
        self.etag.is_none() || self.etag.as_deref().map(bare) == etag.map(bare)
    }

    /// The same for a content that is new: its time is another one, and its tag is not known.
    pub(super) fn of_new_content(&self) -> Self {
        Self { modified: None, etag: None, ..self.clone() }
    }

    /// What of them a program may have set; the rest somebody wrote into the bucket by hand.
    fn validated(mut self) -> Self {
        self.mode = self.mode.map(|mode| mode & MODE_BITS);
        // chown(2) means by -1 that nothing is changed.
        self.uid = self.uid.filter(|&uid| uid != u32::MAX);
        self.gid = self.gid.filter(|&gid| gid != u32::MAX);
        let mut room = MAX_XATTRS;
        self.xattrs.retain(|name, value| {
            let size = name.len() + value.len() / 2;
            let fits = is_user_xattr(name) && size <= room && hex::decode(&*value).is_ok();
            room -= if fits { size } else { 0 };
            fits
        });
        self
    }
}

/// A tag however it is quoted: listings and answers for the object itself need not agree.
fn bare(etag: &str) -> &str {
    etag.trim_start_matches("W/").trim_matches('"')
}

impl Document {
    /// Reads the document of `directory`.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) when a later version wrote it, [`TooLarge`](ErrorKind::TooLarge): it is
    /// not to be replaced then. [`Malformed`](ErrorKind::Malformed) when it is damaged or another directory's.
    pub(super) fn parse(bytes: &[u8], directory: &str) -> Result<Self> {
        if bytes.len() > MAX_DOCUMENT {
            let what = format!("the attributes of a directory have {} bytes", bytes.len());
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let damaged =
            |what: &str| Error::new(ErrorKind::Malformed, format!("attributes are damaged: {what}"));
        let document: Written<String, Value, Value> =
            opened(bytes).ok_or_else(|| damaged("they are not what was written"))?;
        if document.version != VERSION {
            let what = format!("attributes of version {} are of a later freightfs", document.version);
            return Err(Error::unsupported(what));
        }
        if document.directory != directory {
            return Err(damaged("they are another directory's"));
        }
        let files = sound(document.files).map(|(name, set): (_, FileAttributes)| (name, set.validated()));
        let pending = sound(document.pending).map(|(name, Pending { job, set, .. })| {
            (name, Pending { job, ..Pending::of_written(set.validated()) })
        });
        Ok(Self { files: files.collect(), pending: pending.collect() })
    }
}

/// The entries that can be read: others cost nothing but themselves.
fn sound<T: DeserializeOwned>(entries: BTreeMap<String, Value>) -> impl Iterator<Item = (String, T)> {
    entries.into_iter().filter_map(|(name, entry)| match serde_json::from_value(entry) {
        Ok(entry) => Some((name, entry)),
        Err(error) => {
            warn!(name, "attributes of a file are damaged and not used: {error}");
            None
        }
    })
}

impl Directory {
    /// A directory as its document has it, which has the tag `found`.
    pub(super) fn new(document: Option<Document>, found: Option<Option<String>>) -> Self {
        let Document { files, pending } = document.unwrap_or_default();
        let changed = BTreeMap::new();
        let (loaded, idle) = (Instant::now(), BTreeSet::new());
        Self { files, pending, loaded, is_failing: false, found, changed, changes: 0, idle }
    }

    /// Takes over what the document has now, but for what is changed here.
    pub(super) fn merge(&mut self, document: Option<Document>, found: Option<Option<String>>) {
        let mut theirs = document.unwrap_or_default();
        for name in self.changed.keys() {
            replace(&mut theirs.files, name, self.files.remove(name));
            replace(&mut theirs.pending, name, self.pending.remove(name));
        }
        // What is being written is in no document.
        theirs.pending.extend(std::mem::take(&mut self.pending).into_iter().filter(|(_, p)| p.is_unsaved()));
        (self.files, self.pending) = (theirs.files, theirs.pending);
        (self.found, self.loaded) = (found, Instant::now());
    }

    /// What was pending is the object's that is there now.
    pub(super) fn commit(&mut self, name: String, set: FileAttributes) {
        let is_empty = set.is_empty();
        let before = if is_empty { self.files.remove(&name) } else { self.files.insert(name.clone(), set) };
        if !is_empty || before.is_some() {
            self.mark(&name);
        }
    }

    /// Takes away what is pending for nobody: no job, and not open at two looks, between which it may be renamed.
    pub(super) fn sweep(&mut self, is_open: impl Fn(&str) -> bool) {
        let mut idle: BTreeSet<String> =
            self.pending.iter().filter(|(_, p)| p.job.is_none()).map(|(n, _)| n.clone()).collect();
        idle.retain(|name| !is_open(name));
        self.pending.retain(|name, _| !(idle.contains(name) && self.idle.contains(name)));
        self.idle = idle;
    }

    /// Something of that name is to be written.
    pub(super) fn mark(&mut self, name: &str) {
        self.changes += 1;
        self.changed.insert(name.to_owned(), self.changes);
    }

    /// Whether something is to be written.
    pub(super) fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether it cannot be read anew without losing something.
    pub(super) fn is_needed(&self) -> bool {
        self.is_changed() || self.pending.values().any(Pending::is_unsaved)
    }

    /// The document as it is to be, and what it is to replace.
    pub(super) fn snapshot(&self, directory: &str) -> Result<Snapshot> {
        let is_kept = |pending: &Pending| pending.job.is_some() && !pending.set.is_empty();
        let document = Written {
            version: VERSION,
            directory: directory.to_owned(),
            files: self.files.iter().collect(),
            pending: self.pending.iter().filter(|(_, pending)| is_kept(pending)).collect(),
        };
        let is_empty = document.files.is_empty() && document.pending.is_empty();
        let json = sealed(&document)
            .map_err(|e| Error::new(ErrorKind::Internal, "attributes cannot be encoded").because(e))?;
        if json.len() > MAX_DOCUMENT {
            let what = "the attributes of a directory's files are too many to be kept";
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let found = self.found.as_ref().map(|etag| etag.as_deref());
        Ok(Snapshot {
            document: (!is_empty).then(|| json.into_bytes()),
            replaces: Replaces::found(found),
            changes: self.changes,
        })
    }

    /// The document was written and has the tag `found`; what was changed since then is not in it.
    pub(super) fn saved(&mut self, snapshot: &Snapshot, found: Option<Option<String>>) {
        self.changed.retain(|_, change| *change > snapshot.changes);
        (self.found, self.loaded, self.is_failing) = (found, Instant::now(), false);
    }
}

fn replace<T>(all: &mut BTreeMap<String, T>, name: &str, value: Option<T>) {
    match value {
        Some(value) => drop(all.insert(name.to_owned(), value)),
        None => drop(all.remove(name)),
    }
}

/// For the fuzz targets: reads a document of attributes, as the one that it is written as again. Returns whether it is
/// one.
pub fn fuzz_attributes(bytes: &[u8]) -> bool {
    let Ok(mut document) = Document::parse(bytes, "d") else { return false };
    // What is being written, and what changes nothing, is in no document.
    document.pending.retain(|_, pending| pending.job.is_some() && !pending.set.is_empty());
    let names: Vec<_> = document.files.keys().chain(document.pending.keys()).cloned().collect();
    let mut directory = Directory::new(Some(document), None);
    names.iter().for_each(|name| directory.mark(name));
    let Ok(Snapshot { document: Some(written), .. }) = directory.snapshot("d") else { return true };
    let again = Document::parse(&written, "d").ok();
    let again = again.as_ref().map(|again| (&again.files, &again.pending));
    assert_eq!(again, Some((&directory.files, &directory.pending)));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(mode: u16) -> FileAttributes {
        FileAttributes { mode: Some(mode), etag: Some("t".into()), ..FileAttributes::default() }
    }

    fn document(directory: &Directory) -> Document {
        Document::parse(&directory.snapshot("d").unwrap().document.unwrap(), "d").unwrap()
    }

    #[test]
    fn what_was_set_survives_and_what_is_being_written_is_not_kept() {
        let mut directory = Directory::new(None, None);
        let set = FileAttributes {
            modified: Some("2021-03-04T05:06:07.123456789Z".parse().unwrap()),
            xattrs: BTreeMap::from([("user.a".to_owned(), "00ff".to_owned())]),
            ..mode(0o640)
        };
        directory.files.insert("f".into(), set.clone());
        directory
            .pending
            .insert("job".into(), Pending { job: Some("1".into()), ..Pending::of_written(set.clone()) });
        directory.pending.insert("draft".into(), Pending::of_written(set.clone()));
        let read = document(&directory);
        assert_eq!(read.files["f"], set);
        assert_eq!(read.pending.keys().collect::<Vec<_>>(), ["job"]);
        assert!(Directory::new(None, None).snapshot("d").unwrap().document.is_none());
    }

    #[test]
    fn hosts_that_change_different_files_keep_both() {
        let mut ours = Directory::new(None, None);
        for name in ["both", "removed", "mine"] {
            ours.files.insert(name.into(), mode(0o600));
        }
        let theirs = document(&ours);
        ours.files.insert("mine".into(), mode(0o611));
        ours.mark("mine");
        ours.files.remove("removed");
        ours.mark("removed");
        ours.pending.insert("draft".into(), Pending::default());
        let mut their_directory = Directory::new(Some(theirs), None);
        their_directory.files.insert("both".into(), mode(0o622));
        their_directory.files.insert("theirs".into(), mode(0o633));
        ours.merge(Some(document(&their_directory)), Some(Some("2".into())));
        let modes: Vec<_> = ours.files.iter().map(|(n, f)| (n.as_str(), f.mode.unwrap())).collect();
        assert_eq!(modes, [("both", 0o622), ("mine", 0o611), ("theirs", 0o633)]);
        assert!(ours.pending.contains_key("draft") && ours.is_changed());
        let snapshot = ours.snapshot("d").unwrap();
        assert_eq!(snapshot.replaces, Replaces::Tag("2".into()));
        ours.mark("mine");
        ours.saved(&snapshot, Some(Some("3".into())));
        assert!(ours.is_changed(), "a change while the document was written is lost");
        ours.saved(&ours.snapshot("d").unwrap(), Some(Some("4".into())));
        assert!(!ours.is_changed());
    }

    #[test]
    fn a_document_by_hand_sets_nothing_that_a_program_could_not() {
        let json = |version: u32, directory: &str, set: &str| {
            format!("{{\"version\":{version},\"directory\":{directory:?},\"files\":{{\"f\":{set}}}}}")
        };
        let long = "aa".repeat(MAX_XATTRS);
        let set = format!(
            "{{\"mode\":41471,\"uid\":4294967295,\"xattrs\":{{\"user.ok\":\"00\",\"security.capability\":\"00\",
            \"user.odd\":\"0\",\"user.freightfs.error\":\"00\",\"user.long\":{long:?}}}}}"
        );
        let set = format!(
            "{set},\"unsound\":{{\"mode\":70000}},\"when\":{{\"modified\":\"+999999-01-01T00:00:00Z\"}}"
        );
        let read = Document::parse(json(1, "d", &set).as_bytes(), "d").unwrap();
        assert_eq!(read.files.len(), 1);
        let file = &read.files["f"];
        assert_eq!((file.mode, file.uid), (Some(0o777), None));
        assert_eq!(file.xattrs.keys().collect::<Vec<_>>(), ["user.ok"]);
        let kind = |text: String| Document::parse(text.as_bytes(), "d").unwrap_err().kind();
        assert_eq!(kind(json(2, "d", "{}")), ErrorKind::Unsupported);
        assert_eq!(kind(json(1, "e", "{}")), ErrorKind::Malformed);
        assert_eq!(kind(" ".repeat(MAX_DOCUMENT + 1)), ErrorKind::TooLarge);
    }
}
