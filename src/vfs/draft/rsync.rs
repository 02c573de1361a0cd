//! Files under rsync's temporary names, which are published when they get their own.

use crate::bucket::ObjectKey;
use crate::error::Result;

/// The NAME of `.NAME.XXXXXX`, under which rsync writes before it renames (rsync(1), `--temp-dir`). It makes such files
/// exclusively, as mkstemp(3) does.
pub(in super::super) fn rsync_target(name: &str) -> Option<&str> {
    let (name, random) = name.strip_prefix('.')?.rsplit_once('.')?;
    let is_random = random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric());
    (!name.is_empty() && is_random).then_some(name)
}

/// The key that what rsync writes as `key` will get.
pub(super) fn final_key(key: &ObjectKey) -> Option<Result<ObjectKey>> {
    let name = rsync_target(key.file_name())?;
    Some(match key.parent() {
        Some(parent) => parent.child(name),
        None => ObjectKey::parse(name),
    })
}
