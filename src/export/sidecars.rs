//! Sidecars: the objects beside an exported object, its status and its checksums.
//!
//! A key whose name ends like a disk format is an export, whoever writes it, and has sidecars; other keys have some only
//! where the mount is set up so. A sidecar never has any. A name proves nothing: what freightfs writes, renames or
//! removes there is its own, which the content says, and a user's object of such a name stays.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::status::{JobState, Status};
use crate::bucket::{Bucket, ObjectKey, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};
use crate::format::OutputFormat;

/// Largest sidecar of ours; what is larger is somebody else's.
const MAX_SIZE: u64 = 1 << 20;

/// How often a sidecar is looked at that changes meanwhile.
const TRIES: u32 = 5;

/// One of the objects beside an exported one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sidecar {
    /// How far the export is and how it ended, see [`Status`].
    Status,
    /// The checksum file that `sha256sum -c` reads.
    Sha256,
    /// The checksum file that `md5sum -c` reads.
    Md5,
}

/// What stands at a sidecar's place.
#[derive(Clone, Debug, PartialEq)]
pub enum Beside {
    /// No object.
    Nothing,
    /// A sidecar of this key that freightfs wrote.
    Ours {
        /// Its bytes.
        bytes: Bytes,
        /// What a put replaces when it replaces just this.
        replaces: Replaces,
    },
    /// Somebody else's object, which stays as it is.
    Foreign,
}

/// What came of writing a sidecar.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Written {
    /// It is there; a later put replaces this.
    Done(Replaces),
    /// Somebody else's object is there and stays.
    Foreign,
    /// A sidecar of ours is there that stays: it is that of a newer object or job.
    Superseded,
}

impl Sidecar {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Status, Self::Sha256, Self::Md5];

    /// What a sidecar's name ends with.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Status => ".status",
            Self::Sha256 => ".sha256",
            Self::Md5 => ".md5",
        }
    }

    /// The object and the sidecar of it that a key names, whatever stands there.
    pub fn parse(key: &ObjectKey) -> Option<(ObjectKey, Self)> {
        Self::ALL.into_iter().find_map(|sidecar| {
            let object = ObjectKey::parse(key.as_str().strip_suffix(sidecar.suffix())?).ok()?;
            Some((object, sidecar))
        })
    }

    /// The sidecar's own key.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) when that would be too long.
    pub fn key_for(self, object: &ObjectKey) -> Result<ObjectKey> {
        object.with_suffix(self.suffix())
    }

    /// Digits of the digest in a checksum file.
    fn digits(self) -> usize {
        match self {
            Self::Status => 0,
            Self::Sha256 => 64,
            Self::Md5 => 32,
        }
    }

    /// Whether these bytes are this sidecar of that object, as freightfs writes it.
    fn is_ours(self, bucket: &Bucket, object: &ObjectKey, bytes: &[u8]) -> bool {
        if self == Self::Status {
            return Status::parse(bytes).is_ok_and(|status| is_status_of(&status, bucket, object));
        }
        std::str::from_utf8(bytes)
            .ok()
            .and_then(|line| digest_of(line, self.digits()))
            .is_some_and(|digest| checksum_line(digest, object.file_name()).as_bytes() == bytes)
    }
}

/// Whether objects of this key get sidecars: those whose name ends like a disk format, or with `all` every one. Not
/// sidecars themselves, and not names so long that a sidecar's would be too long.
pub fn has_sidecars(key: &ObjectKey, all: bool) -> bool {
    let is_export = all || OutputFormat::split_file_name(key.file_name()).is_some();
    is_export
        && Sidecar::parse(key).is_none()
        && Sidecar::ALL.into_iter().all(|sidecar| sidecar.key_for(key).is_ok())
}

/// What stands at the place of a sidecar of `object`.
pub async fn look(bucket: &Bucket, object: &ObjectKey, sidecar: Sidecar) -> Result<Beside> {
    let key = sidecar.key_for(object)?;
    let mut tries = 1;
    loop {
        let Some(meta) = bucket.head(&key).await? else { return Ok(Beside::Nothing) };
        if meta.object_size == 0 || meta.object_size > MAX_SIZE {
            return Ok(Beside::Foreign);
        }
        match bucket.read(&key, 0..meta.object_size, meta.etag.as_deref()).await {
            Ok(bytes) if sidecar.is_ours(bucket, object, &bytes) => {
                return Ok(Beside::Ours { bytes, replaces: Replaces::found(Some(meta.etag.as_deref())) });
            }
            Ok(_) => return Ok(Beside::Foreign),
            // It was replaced between two requests.
            Err(error) if is_change(&error) && tries < TRIES => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Whether the object of this key is a sidecar that freightfs wrote.
pub async fn is_sidecar(bucket: &Bucket, key: &ObjectKey) -> Result<bool> {
    match Sidecar::parse(key) {
        Some((object, sidecar)) => Ok(matches!(look(bucket, &object, sidecar).await?, Beside::Ours { .. })),
        None => Ok(false),
    }
}

/// Removes those sidecars of `object` that are ours, after the object itself was removed or replaced.
pub async fn remove(bucket: &Bucket, object: &ObjectKey) -> Result<()> {
    for sidecar in Sidecar::ALL {
        let Ok(key) = sidecar.key_for(object) else { continue };
        if let Beside::Ours { replaces, .. } = look(bucket, object, sidecar).await? {
            failpoint::pass(Step::SidecarMove)?;
            match bucket.delete_if(&key, &replaces).await {
                // Somebody else's by now, or that of a newer export.
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                deleted => deleted?,
            }
        }
    }
    Ok(())
}

/// The bytes of a sidecar of ours as one of `to`, whose entity tag is `etag`.
pub(super) fn renamed(
    bucket: &Bucket,
    to: &ObjectKey,
    sidecar: Sidecar,
    bytes: &Bytes,
    etag: Option<String>,
) -> Result<Bytes> {
    let damaged = || Error::new(ErrorKind::Internal, "a sidecar of ours cannot be read any more");
    if sidecar == Sidecar::Status {
        let mut status: Status = Status::parse(bytes).map_err(|e| damaged().because(e))?;
        (status.bucket, status.key) = (bucket.name().to_owned(), to.to_string());
        status.url = bucket.url_of(to);
        if status.status == JobState::Success {
            status.etag = etag;
        }
        return Ok(Bytes::from(status.to_json()));
    }
    let line = std::str::from_utf8(bytes).map_err(|e| damaged().because(e))?;
    let digest = digest_of(line, sidecar.digits()).ok_or_else(damaged)?;
    Ok(Bytes::from(checksum_line(digest, to.file_name())))
}

/// Writes a sidecar over `known`, or over what is ours by its content. Before it replaces anything else than `known`,
/// `may` is given that and asked whether it is to be replaced.
///
/// # Errors
/// What `may` gives; [`Conflict`](ErrorKind::Conflict) when it changes all the time.
pub(super) async fn write<F>(
    bucket: &Bucket,
    object: &ObjectKey,
    sidecar: Sidecar,
    bytes: Bytes,
    known: Replaces,
    may: impl Fn(Option<Bytes>) -> F,
) -> Result<Written>
where
    F: Future<Output = Result<bool>>,
{
    let key = sidecar.key_for(object)?;
    let mut replaces = known;
    let mut tries = 1;
    loop {
        match bucket.put(&key, bytes.clone(), &replaces).await {
            Ok(etag) => return Ok(Written::Done(Replaces::found(Some(etag.as_deref())))),
            Err(error) if error.kind() == ErrorKind::Conflict && tries < TRIES => tries += 1,
            Err(error) => return Err(error),
        }
        let there;
        (there, replaces) = match look(bucket, object, sidecar).await? {
            Beside::Nothing => (None, Replaces::Nothing),
            // The put had been done, and its answer was lost.
            Beside::Ours { bytes: there, replaces } if there == bytes => return Ok(Written::Done(replaces)),
            Beside::Ours { bytes, replaces } => (Some(bytes), replaces),
            Beside::Foreign => return Ok(Written::Foreign),
        };
        if !may(there).await? {
            return Ok(Written::Superseded);
        }
    }
}

/// Whether a status is that of an object, or of one of that name elsewhere: the bucket may have had another name when it
/// was written, and a directory may have been copied. A checksum file too says no more than the name.
fn is_status_of(status: &Status, bucket: &Bucket, object: &ObjectKey) -> bool {
    let name = status.key.rsplit('/').next();
    name == Some(object.file_name()) || status.url == bucket.url_of(object)
}

/// A line of coreutils' checksum files; names with a backslash or a newline are escaped as coreutils does.
pub(super) fn checksum_line(digest: &str, name: &str) -> String {
    if name.contains(['\\', '\n', '\r']) {
        let name = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
        return format!("\\{digest}  {name}\n");
    }
    format!("{digest}  {name}\n")
}

/// The digest of a checksum line.
fn digest_of(line: &str, digits: usize) -> Option<&str> {
    let digest = line.strip_prefix('\\').unwrap_or(line).split_once("  ")?.0;
    let is_digest = digest.len() == digits && digest.bytes().all(|b| b.is_ascii_hexdigit());
    is_digest.then_some(digest)
}

fn is_change(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::SourceChanged | ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> ObjectKey {
        ObjectKey::parse(text).unwrap()
    }

    #[test]
    fn names_that_end_like_a_disk_format_have_sidecars_and_sidecars_have_none() {
        for (name, exported, all) in [
            ("d/web.vhd", true, true),
            ("web.stream.vmdk", true, true),
            ("notes.txt", false, true),
            ("web.vhd.status", false, false),
            ("web.vhd.md5", false, false),
            ("notes.txt.sha256", false, false),
            (".vhd", false, true),
        ] {
            assert_eq!(has_sidecars(&key(name), false), exported, "{name}");
            assert_eq!(has_sidecars(&key(name), true), all, "{name}");
        }
        assert!(
            !has_sidecars(&key(&format!("{}.vhd", "x".repeat(247))), false),
            "no room for a sidecar's name"
        );
    }

    #[test]
    fn only_what_freightfs_writes_is_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let bucket = Bucket::open("b", &format!("file://{}", directory.path().display())).unwrap();
        let object = key("d/a\\b.raw");
        let digest = "0123456789abcdef".repeat(2);
        let line = checksum_line(&digest, "a\\b.raw");
        assert!(Sidecar::Md5.is_ours(&bucket, &object, line.as_bytes()));
        assert!(!Sidecar::Sha256.is_ours(&bucket, &object, line.as_bytes()));
        assert!(!Sidecar::Md5.is_ours(&bucket, &key("d/b.raw"), line.as_bytes()));
        let more = format!("{line}{line}");
        for foreign in ["", "0  a\\b.raw\n", "# notes\n", &line.replace("  ", " *"), &more] {
            assert!(!Sidecar::Md5.is_ours(&bucket, &object, foreign.as_bytes()), "{foreign:?}");
        }
        for foreign in ["{}", "not JSON", ""] {
            assert!(!Sidecar::Status.is_ours(&bucket, &object, foreign.as_bytes()), "{foreign:?}");
        }
    }
}
