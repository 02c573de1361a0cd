//! Extended attributes: their names, and who answers for each.

use std::sync::Arc;

use super::export_options::{TAG_PREFIX, TOKEN_XATTR};
use super::inode::{Ino, Node};
use super::lanes::Lane;
use super::tree::read_only;
use super::{ObjectName, Vfs};
use crate::error::{Error, ErrorKind, Result};

/// The attribute that has the status of the newest job of an object, as its status file would.
const STATUS_XATTR: &str = "user.freightfs.status";

impl Vfs {
    /// The reason in words why a file cannot be opened, or why its last job failed: `user.freightfs.error`.
    pub async fn error_text(self: &Arc<Self>, ino: Ino) -> Option<String> {
        match self.inodes.node(ino).ok()? {
            Node::ImageFile { id, disk, format } => {
                let lane = Lane::Image(id.clone());
                let open = move |vfs: &Self| vfs.exported_file(&id, &disk, format).map(drop);
                self.blocking(lane, open).await.err().map(|e| e.report())
            }
            Node::Object { bucket, key } => {
                if let Some(error) = self.draft(&(bucket.clone(), key.clone())).and_then(|d| d.refusal()) {
                    return Some(error.report());
                }
                let job = self.jobs.newest(&bucket, &key)?;
                job.outcome(&job.status()).err().map(|e| e.report())
            }
            _ => None,
        }
    }

    /// The object or directory of a bucket that an inode is, on which extended attributes can be set.
    fn xattr_place(&self, ino: Ino) -> Result<Option<(ObjectName, bool)>> {
        Ok(match self.inodes.node(ino)? {
            Node::Object { bucket, key } => Some(((bucket, key), false)),
            Node::Directory { bucket, prefix: Some(prefix) } => Some(((bucket, prefix), true)),
            _ => None,
        })
    }

    /// The value of an extended attribute, if it is set.
    pub async fn xattr(self: &Arc<Self>, ino: Ino, name: &str) -> Result<Option<Vec<u8>>> {
        match self.xattr_place(ino)? {
            Some((object, false)) if name == TOKEN_XATTR => {
                let last = || self.jobs.newest(&object.0, &object.1)?.request().client_token.clone();
                Ok(self.requests.token(&object).or_else(last).map(String::into_bytes))
            }
            Some((object, false)) if name.starts_with(TAG_PREFIX) => {
                Ok(self.requests.tags(&object).remove(&name[TAG_PREFIX.len()..]).map(String::into_bytes))
            }
            Some(((bucket, key), false)) if name == STATUS_XATTR => {
                Ok(self.jobs.newest(&bucket, &key).map(|job| job.status().to_json()))
            }
            Some((object, is_directory)) => self.user_xattr(&object, is_directory, name).await,
            None => Ok(None),
        }
    }

    /// The names of the extended attributes that were set.
    pub async fn xattr_names(self: &Arc<Self>, ino: Ino) -> Result<Vec<String>> {
        match self.xattr_place(ino)? {
            Some((object, is_directory)) => self.user_xattr_names(&object, is_directory).await,
            None => Ok(Vec::new()),
        }
    }

    /// Sets or, without a value, removes an extended attribute that begins with `user.`. `exists` says whether it must
    /// be there, or must not. Returns `false` when it is not there and should be.
    pub async fn change_xattr(
        self: &Arc<Self>,
        ino: Ino,
        name: &str,
        value: Option<&[u8]>,
        exists: Option<bool>,
    ) -> Result<bool> {
        match self.xattr_place(ino)? {
            Some((object, false)) if name == TOKEN_XATTR => self.requests.set_token(&object, value),
            Some((object, false)) if name.starts_with(TAG_PREFIX) => {
                if value.is_some() && !self.bucket(&object.0)?.has_tags() {
                    let what = format!("objects of bucket {:?} cannot have tags", object.0);
                    return Err(Error::new(ErrorKind::Unsupported, what).in_file(object.1.as_str()));
                }
                self.requests.set_tag(&object, &name[TAG_PREFIX.len()..], value)
            }
            Some((object, is_directory)) => {
                self.change_user_xattr(&object, is_directory, name, value, exists).await
            }
            None => Err(read_only(&self.inodes.node(ino)?)),
        }
    }
}
