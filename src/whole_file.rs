//! Files that are read whole: sidecars, policies, configurations, records.
//!
//! Whoever can name such a file, or put one where it is looked for, may have it be anything: a FIFO that nobody writes, a
//! device that never ends, a file that grows. So only regular files are read, what was opened is what is checked, and
//! no more bytes are taken than the limit, whatever the length says.

use std::fs::{File, FileType, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// Opens a regular file for reading. Nothing else is waited for: a FIFO without a writer is refused like any other.
///
/// # Errors
/// As [`check_regular`], else what opening gave; without a place.
pub fn open(path: &Path) -> Result<(File, Metadata)> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let file = File::options().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|e| Error::from_io("cannot open", e))?;
    let meta = file.metadata().map_err(|e| Error::from_io("cannot stat", e))?;
    check_regular(meta.file_type())?;
    Ok((file, meta))
}

/// Refuses what is no regular file, by its name.
///
/// # Errors
/// [`IsDirectory`](ErrorKind::IsDirectory), else [`Unsupported`](ErrorKind::Unsupported).
pub fn check_regular(kind: FileType) -> Result<()> {
    let what = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => {
            return Err(Error::new(ErrorKind::IsDirectory, "is a directory, not a file"));
        }
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_block_device() => "a block device",
        kind if kind.is_char_device() => "a character device",
        kind if kind.is_symlink() => "a symbolic link",
        _ => "something else",
    };
    Err(Error::unsupported(format!("is {what}, not a regular file")))
}

/// The bytes of a file of at most `limit` bytes.
///
/// # Errors
/// [`TooLarge`](ErrorKind::TooLarge) when it has more, else as [`open`]; each names the file.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let read = open(path).and_then(|(file, _)| read_opened(&file, limit));
    read.map_err(|e| e.in_file(path.display().to_string()))
}

/// The text of a file of at most `limit` bytes.
///
/// # Errors
/// [`Malformed`](ErrorKind::Malformed) when it is not UTF-8, else as [`read`].
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    text(read(path, limit)?).map_err(|e| e.in_file(path.display().to_string()))
}

/// What an opened file has from its position on, at most `limit` bytes.
///
/// # Errors
/// [`TooLarge`](ErrorKind::TooLarge) when it has more, else what reading gave; without a place.
pub fn read_opened(file: &File, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|e| Error::from_io("cannot read", e))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(limit));
    }
    Ok(bytes)
}

/// Bytes as the text that they should be.
///
/// # Errors
/// [`Malformed`](ErrorKind::Malformed) when they are not UTF-8; without a place.
pub fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes)
        .map_err(|e| Error::new(ErrorKind::Malformed, "is not UTF-8").because(e.utf8_error()))
}

/// Whether an error says that what is there is none of our files, whatever is tried again.
pub fn is_unfit(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::TooLarge | ErrorKind::Unsupported | ErrorKind::IsDirectory)
}

/// The refusal of a file that is too large to be read whole.
pub fn too_large(limit: u64) -> Error {
    Error::new(ErrorKind::TooLarge, format!("has more than the {limit} bytes that are read"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn regular_files_are_read_up_to_the_limit_and_nothing_else_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("file"), "12345").unwrap();
        assert_eq!(read_text(&path("file"), 5).unwrap(), "12345");
        let large = read(&path("file"), 4).unwrap_err();
        assert_eq!(large.kind(), ErrorKind::TooLarge);
        assert!(large.report().contains("/file: has more than the 4 bytes"), "{}", large.report());
        std::fs::write(path("latin"), [0xe4]).unwrap();
        assert_eq!(read_text(&path("latin"), 5).unwrap_err().kind(), ErrorKind::Malformed);

        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("zero")).unwrap();
        std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for (name, kind, reason) in [
            ("fifo", ErrorKind::Unsupported, "a FIFO"),
            ("zero", ErrorKind::Unsupported, "a character device"),
            ("socket", ErrorKind::Io, "cannot open"),
            (".", ErrorKind::IsDirectory, "a directory"),
            ("gone", ErrorKind::NotFound, "cannot open"),
        ] {
            let error = read(&path(name), 100).unwrap_err();
            assert_eq!(error.kind(), kind, "{}", error.report());
            assert!(error.report().contains(reason) && error.report().contains(name), "{}", error.report());
        }
        // The length of these says nothing of what can be read.
        assert!(read(Path::new("/proc/self/status"), 10).unwrap_err().kind() == ErrorKind::TooLarge);
        assert!(!read(Path::new("/proc/self/status"), 1 << 20).unwrap().is_empty());
    }
}
