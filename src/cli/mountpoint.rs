//! The directory that is mounted on: what it has to be, and how a mount is taken away from it.

use std::path::{Path, PathBuf};

use super::mount_table::mount_table;
use crate::error::{Error, ErrorKind, Result};
use crate::settings::MountSettings;

/// The mount point as an absolute path, checked to be a directory that answers, is empty, and has no mount.
pub(super) fn mountpoint(path: &Path, settings: &MountSettings) -> Result<PathBuf> {
    let place = path.display().to_string();
    let meta = std::fs::metadata(path).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOTCONN) => {
            let what = "an earlier mount here died; remove it with `fusermount3 -u` or `umount -l`, then mount again";
            Error::new(ErrorKind::Busy, what).in_file(&place)
        }
        Some(libc::ENOENT) => {
            let what = format!("the mount point does not exist; make it with `mkdir {place}`");
            Error::new(ErrorKind::NotFound, what).in_file(&place)
        }
        _ => Error::from_io("cannot use the mount point", e).in_file(&place),
    })?;
    if !meta.is_dir() {
        return Err(Error::new(ErrorKind::NotDirectory, "the mount point is not a directory").in_file(place));
    }
    let path = path
        .canonicalize()
        .map_err(|e| Error::from_io("cannot resolve the mount point", e).in_file(&place))?;
    let refused = |kind, what: String| Err(Error::new(kind, what).in_file(&place));
    let here: Vec<_> = mount_table()?.into_iter().filter(|mount| mount.path == path).collect();
    if let Some(mount) = here.iter().find(|mount| mount.kind.starts_with("fuse")) {
        let what = format!("{} is mounted here already; umount it first", mount.source);
        return refused(ErrorKind::Busy, what);
    }
    // Listing the place of an automount would wait for this very mount.
    if here.iter().any(|mount| mount.kind == "autofs") {
        return Ok(path);
    }
    let mut entries = std::fs::read_dir(&path)
        .map_err(|e| Error::from_io("cannot list the mount point", e).in_file(&place))?;
    if !settings.nonempty && entries.next().is_some() {
        let what = "the mount point is not empty, and a mount would hide what is in it; choose another directory, or \
                    give the option nonempty";
        return refused(ErrorKind::NotEmpty, what.to_owned());
    }
    Ok(path)
}

/// What stands for the catalog in /proc/mounts: the path that fstab has, so that `mount -a` knows it again.
pub(super) fn source(catalog: &Path) -> PathBuf {
    catalog.canonicalize().unwrap_or_else(|_| catalog.to_owned())
}
