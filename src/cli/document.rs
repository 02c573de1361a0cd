//! JSON files that the commands read: a bucket's or a mount's, so that anybody may have written them.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};
use crate::whole_file;

/// Reads a JSON file of at most `limit` bytes.
///
/// # Errors
/// Those of [`whole_file::read`], and [`Malformed`](ErrorKind::Malformed), which says that it is no `kind`.
pub(super) fn read_document<T: DeserializeOwned>(path: &Path, kind: &str, limit: u64) -> Result<T> {
    let json = whole_file::read(path, limit)?;
    let malformed = |e| Error::new(ErrorKind::Malformed, format!("is not a {kind}")).because(e);
    serde_json::from_slice(&json).map_err(|e| malformed(e).in_file(path.display().to_string()))
}
