//! Directories of the user and of a mount's state.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// The directory where a mount keeps its journal when none is given: named by the mount point, under
/// `$XDG_STATE_HOME/freightfs`, else under /var/lib for root and ~/.local/state for others.
///
/// # Errors
/// [`NotFound`](ErrorKind::NotFound) for a user without a home directory.
pub fn default_state(mountpoint: &Path) -> Result<PathBuf> {
    Ok(state_base()?.join("freightfs").join(escaped(mountpoint)))
}

/// `$XDG_STATE_HOME`, else /var/lib for root and ~/.local/state for others.
fn state_base() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(base) = variable("XDG_STATE_HOME").filter(|p| p.is_absolute()) {
        return Ok(base);
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib"));
    }
    let missing = || {
        Error::new(
            ErrorKind::NotFound,
            "this user has no home directory; give the state directory with --state",
        )
    };
    Ok(home_directory().ok_or_else(missing)?.join(".local/state"))
}

/// A path as one name: `/` as `-` and every other byte that is not alphanumeric, `_`, `.` or `:` as `\xNN`, as
/// systemd-escape writes it.
fn escaped(path: &Path) -> String {
    let path = path.as_os_str().as_encoded_bytes();
    let path = path.strip_prefix(b"/").unwrap_or(path);
    let mut name = String::new();
    for &byte in path {
        match byte {
            b'/' => name.push('-'),
            b'_' | b':' | b'.' => name.push(byte as char),
            byte if byte.is_ascii_alphanumeric() => name.push(byte as char),
            byte => name.push_str(&format!("\\x{byte:02x}")),
        }
    }
    if name.is_empty() || name.starts_with('.') {
        name.insert(0, '-');
    }
    name
}

/// The user's home directory: $HOME, or what the user database says. mount(8) clears the environment when an ordinary
/// user mounts by fstab.
pub fn home_directory() -> Option<PathBuf> {
    let variable = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    variable
        .or_else(|| nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_directories_are_named_by_the_mount_point() {
        let name = |path: &str| escaped(Path::new(path));
        assert_eq!(name("/mnt/a b"), r"mnt-a\x20b");
        assert_eq!(name("/mnt-a"), r"mnt\x2da");
        assert_eq!(name("/"), "-");
        assert_eq!(name("/.."), "-..");
    }
}
