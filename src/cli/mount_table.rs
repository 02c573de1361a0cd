//! What is mounted where, as this process sees it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// One mount.
pub(super) struct MountEntry {
    /// What is mounted.
    pub(super) source: String,
    /// Where.
    pub(super) path: PathBuf,
    /// The filesystem's type, as `fuse.freightfs`.
    pub(super) kind: String,
}

/// All mounts (proc(5), "/proc/pid/mounts"), whose names may be any bytes.
pub(super) fn mount_table() -> Result<Vec<MountEntry>> {
    let place = "/proc/self/mounts";
    let table =
        std::fs::read(place).map_err(|e| Error::from_io("cannot read the mount table", e).in_file(place))?;
    Ok(table.split(|&byte| byte == b'\n').filter_map(entry).collect())
}

fn entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ').map(unescaped);
    let (source, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Some(MountEntry { source: text(&source), path: OsString::from_vec(path).into(), kind: text(&kind) })
}

/// A path of the mount table, in which blanks and backslashes are written as three octal digits (fstab(5)).
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut path = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.iter().position(|&byte| byte == b'\\') {
        path.extend_from_slice(&rest[..at]);
        let after = &rest[at + 1..];
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        path.push(code.unwrap_or(b'\\'));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    path.extend_from_slice(rest);
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_mount_table_are_unescaped() {
        for (escaped, plain) in
            [("/mnt/a\\040b", "/mnt/a b"), ("/a\\134b", "/a\\b"), ("/plain", "/plain"), ("/x\\", "/x\\")]
        {
            assert_eq!(unescaped(escaped.as_bytes()), plain.as_bytes());
        }
        let entry = entry(b"/c /mnt/\xff\\040 fuse.freightfs rw 0 0").unwrap();
        assert_eq!(entry.path.as_os_str().as_encoded_bytes(), b"/mnt/\xff ");
        assert_eq!((&*entry.source, &*entry.kind), ("/c", "fuse.freightfs"));
    }
}
