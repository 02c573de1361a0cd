//! Object tags: extended attributes `user.freightfs.tag.NAME`, which the next object made at a key gets.

use super::{ObjectName, Vfs};
use crate::bucket::Tags;
use crate::error::{Error, ErrorKind, Result};

/// What stands before a tag's name in the extended attribute's name.
pub(super) const TAG_PREFIX: &str = "user.freightfs.tag.";

/// Most tags of an object, and most characters of their names and values (Amazon S3 User Guide, "Categorizing your
/// objects using tags").
const MAX_TAGS: usize = 10;
const MAX_NAME: usize = 128;
const MAX_VALUE: usize = 256;

impl Vfs {
    /// Sets a tag of the next object made at a key, or takes it away. Returns whether it was there or is now.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) where the store has no tags, [`Malformed`](ErrorKind::Malformed) for what
    /// S3 does not allow.
    pub(super) fn set_tag(&self, object: &ObjectName, name: &str, value: Option<&[u8]>) -> Result<bool> {
        let refused = |kind, what: String| Error::new(kind, what).in_file(object.1.as_str());
        let mut all = self.tags.lock();
        let Some(value) = value else {
            return Ok(all.get_mut(object).is_some_and(|tags| tags.remove(name).is_some()));
        };
        if !self.bucket(&object.0)?.has_tags() {
            let what = format!("objects of bucket {:?} cannot have tags", object.0);
            return Err(refused(ErrorKind::Unsupported, what));
        }
        let value = std::str::from_utf8(value).map_err(|e| {
            refused(ErrorKind::Malformed, format!("the tag {name:?} is not UTF-8")).because(e)
        })?;
        if name.is_empty() || name.chars().count() > MAX_NAME || value.chars().count() > MAX_VALUE {
            let what =
                format!("a tag's name has 1 to {MAX_NAME} characters, and its value at most {MAX_VALUE}");
            return Err(refused(ErrorKind::Malformed, what));
        }
        let is_plain = |c: char| c.is_alphanumeric() || c == ' ' || "+-=._:/@".contains(c);
        if !name.chars().chain(value.chars()).all(is_plain) {
            let what = format!(
                "the tag {name:?} has characters besides letters, digits, spaces and + - = . _ : / @"
            );
            return Err(refused(ErrorKind::Malformed, what));
        }
        let tags = all.entry(object.clone()).or_default();
        if tags.len() >= MAX_TAGS && !tags.contains_key(name) {
            return Err(refused(ErrorKind::Malformed, format!("an object has at most {MAX_TAGS} tags")));
        }
        tags.insert(name.to_owned(), value.to_owned());
        Ok(true)
    }

    /// The tags of the next object made at a key; those of the last one where none were given since.
    pub(super) fn tags(&self, object: &ObjectName) -> Tags {
        self.tags.lock().get(object).cloned().unwrap_or_default()
    }
}
