//! Renames in a local bucket: one step of the filesystem.

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, renameat};
use nix::sys::stat::fstatat;

use super::directory::{failed, is_file};
use super::{LocalStore, check, tag};
use crate::bucket::key::ObjectKey;
use crate::bucket::replaces::Replaces;
use crate::error::{Error, ErrorKind, Result};

impl LocalStore {
    /// Gives a file another name, durably. Says no where the names are on two filesystems, and for links: a symbolic one
    /// would lead elsewhere from another directory, and of two names of one file the kernel removes none.
    pub(super) fn rename_now(
        &self,
        from: &ObjectKey,
        etag: Option<&str>,
        to: &ObjectKey,
        replaces: &Replaces,
    ) -> Result<bool> {
        let locked = self.lock_names()?;
        let (old_parent, old_name) = self.directory.parent(from.as_str(), false)?;
        let (parent, name) = self.directory.parent(to.as_str(), true)?;
        let stat = self.directory.stat(from.as_str())?.filter(is_file);
        let stat = stat.ok_or_else(|| failed("cannot rename the object", Errno::ENOENT))?;
        if etag.is_some_and(|etag| etag != tag(&stat)) {
            return Err(Error::new(ErrorKind::SourceChanged, "the object changed since it was looked up"));
        }
        check(replaces, self.directory.stat(to.as_str())?.as_ref())?;
        let itself = fstatat(&old_parent, old_name, AtFlags::AT_SYMLINK_NOFOLLOW);
        let itself = itself.map_err(|e| failed("cannot rename the object", e))?;
        if !is_file(&itself) || itself.st_nlink > 1 {
            return Ok(false);
        }
        match renameat(&old_parent, old_name, &parent, name) {
            Err(Errno::EXDEV) => return Ok(false),
            renamed => renamed.map_err(|e| failed("cannot rename the object", e))?,
        }
        drop(locked);
        for directory in [parent, old_parent] {
            let synced = File::from(directory).sync_all();
            synced.map_err(|e| failed("cannot sync the object's directory", e))?;
        }
        Ok(true)
    }
}
