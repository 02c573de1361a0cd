//! What is mounted where, as this process sees it.

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

/// All mounts (proc(5), "/proc/pid/mounts").
pub(super) fn mount_table() -> Result<Vec<MountEntry>> {
    let place = "/proc/self/mounts";
    let table = std::fs::read_to_string(place)
        .map_err(|e| Error::from_io("cannot read the mount table", e).in_file(place))?;
    let entry = |line: &str| {
        let mut fields = line.split(' ').map(unescaped);
        let (source, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        Some(MountEntry { source, path: path.into(), kind })
    };
    Ok(table.lines().filter_map(entry).collect())
}

/// A path of the mount table, in which blanks and backslashes are written as three octal digits (fstab(5)).
fn unescaped(text: &str) -> String {
    let mut path = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        path.push_str(before);
        let code = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => path.push(code as char),
            None => path.push('\\'),
        }
        rest = if code.is_some() { &after[3..] } else { after };
    }
    path.push_str(rest);
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
            assert_eq!(unescaped(escaped), plain);
        }
    }
}
