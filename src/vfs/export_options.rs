//! What is set on a key for the next export to it: a client token, and tags of the object.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::ObjectName;
use crate::bucket::Tags;
use crate::error::{Error, ErrorKind, Result};

/// The extended attribute by which a client names its request, before it copies.
pub(super) const TOKEN_XATTR: &str = "user.freightfs.client_token";

/// What stands before a tag's name in the extended attribute's name.
pub(super) const TAG_PREFIX: &str = "user.freightfs.tag.";

/// Most characters of a token (Alibaba Cloud ECS, ExportImage: "a maximum of 64 ASCII characters").
const MAX_TOKEN: usize = 64;

/// Most tags of an object, and most characters of their names and values (Amazon S3 User Guide, "Categorizing your
/// objects using tags").
const MAX_TAGS: usize = 10;
const MAX_NAME: usize = 128;
const MAX_VALUE: usize = 256;

/// The tokens and tags of all keys.
#[derive(Default)]
pub(super) struct ExportOptions {
    tokens: Mutex<HashMap<ObjectName, Token>>,
    tags: Mutex<HashMap<ObjectName, Tags>>,
}

/// A name that a client gave to one request.
#[derive(Clone, Debug)]
struct Token {
    text: String,
    /// Whether the request was made: the token stays to be read, and names no later one.
    is_used: bool,
}

impl ExportOptions {
    /// Names the next export to a key, or takes the name back. Returns whether there is or was one.
    ///
    /// # Errors
    /// [`TokenTooLong`](ErrorKind::TokenTooLong) above 64 characters, [`Malformed`](ErrorKind::Malformed) when they are
    /// not ASCII.
    pub(super) fn set_token(&self, object: &ObjectName, token: Option<&[u8]>) -> Result<bool> {
        let mut tokens = self.tokens.lock();
        let Some(token) = token else { return Ok(tokens.remove(object).is_some()) };
        if token.len() > MAX_TOKEN {
            let what = format!("a client token has at most {MAX_TOKEN} characters, not {}", token.len());
            return Err(Error::new(ErrorKind::TokenTooLong, what).in_file(object.1.as_str()));
        }
        let plain = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        let text = std::str::from_utf8(token).ok().filter(plain).ok_or_else(|| {
            Error::new(ErrorKind::Malformed, "a client token has printable ASCII characters only")
                .in_file(object.1.as_str())
        })?;
        tokens.insert(object.clone(), Token { text: text.to_owned(), is_used: false });
        Ok(true)
    }

    /// The name of the next export to a key, else that of the last one.
    pub(super) fn token(&self, object: &ObjectName) -> Option<String> {
        self.tokens.lock().get(object).map(|token| token.text.clone())
    }

    /// The name of the next export to a key. What named an earlier one is none.
    pub(super) fn next_token(&self, object: &ObjectName) -> Option<String> {
        self.tokens.lock().get(object).filter(|token| !token.is_used).map(|token| token.text.clone())
    }

    /// The request that the token names was made.
    pub(super) fn token_used(&self, object: &ObjectName) {
        if let Some(token) = self.tokens.lock().get_mut(object) {
            token.is_used = true;
        }
    }

    /// Sets a tag of the next object made at a key, or takes it away. Returns whether it was there or is now.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) for what S3 does not allow.
    pub(super) fn set_tag(&self, object: &ObjectName, name: &str, value: Option<&[u8]>) -> Result<bool> {
        let mut all = self.tags.lock();
        let Some(value) = value else {
            return Ok(all.get_mut(object).is_some_and(|tags| tags.remove(name).is_some()));
        };
        let value = check_tag(name, value).map_err(|e| e.in_file(object.1.as_str()))?;
        let tags = all.entry(object.clone()).or_default();
        if tags.len() >= MAX_TAGS && !tags.contains_key(name) {
            let what = format!("an object has at most {MAX_TAGS} tags");
            return Err(Error::new(ErrorKind::Malformed, what).in_file(object.1.as_str()));
        }
        tags.insert(name.to_owned(), value);
        Ok(true)
    }

    /// The tags of the next object made at a key; those of the last one where none were given since.
    pub(super) fn tags(&self, object: &ObjectName) -> Tags {
        self.tags.lock().get(object).cloned().unwrap_or_default()
    }

    /// An object is gone.
    pub(super) fn forget(&self, object: &ObjectName) {
        self.tokens.lock().remove(object);
        self.tags.lock().remove(object);
    }

    /// An object has another name: what was set on it goes with it, and what was set on an object there is gone.
    pub(super) fn rename(&self, from: &ObjectName, to: &ObjectName) {
        fn rename<T>(all: &mut HashMap<ObjectName, T>, from: &ObjectName, to: &ObjectName) {
            match all.remove(from) {
                Some(set) => drop(all.insert(to.clone(), set)),
                None => drop(all.remove(to)),
            }
        }
        rename(&mut self.tokens.lock(), from, to);
        rename(&mut self.tags.lock(), from, to);
    }
}

/// The value of a tag, if name and value are as S3 has them.
fn check_tag(name: &str, value: &[u8]) -> Result<String> {
    let malformed = |what: String| Error::new(ErrorKind::Malformed, what);
    let value = std::str::from_utf8(value)
        .map_err(|e| malformed(format!("the tag {name:?} is not UTF-8")).because(e))?;
    if name.is_empty() || name.chars().count() > MAX_NAME || value.chars().count() > MAX_VALUE {
        let what = format!("a tag's name has 1 to {MAX_NAME} characters, and its value at most {MAX_VALUE}");
        return Err(malformed(what));
    }
    let is_plain = |c: char| c.is_alphanumeric() || c == ' ' || "+-=._:/@".contains(c);
    if !name.chars().chain(value.chars()).all(is_plain) {
        let what =
            format!("the tag {name:?} has characters besides letters, digits, spaces and + - = . _ : / @");
        return Err(malformed(what));
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::ObjectKey;

    #[test]
    fn a_token_names_one_request_and_goes_with_its_object() {
        let options = ExportOptions::default();
        let name = |key: &str| ("b".to_owned(), ObjectKey::parse(key).unwrap());
        options.set_token(&name("a"), Some(b"t")).unwrap();
        assert_eq!(options.next_token(&name("a")).as_deref(), Some("t"));
        options.token_used(&name("a"));
        assert_eq!(options.next_token(&name("a")), None);
        options.rename(&name("a"), &name("b"));
        assert_eq!((options.token(&name("a")), options.token(&name("b"))), (None, Some("t".to_owned())));
        options.set_token(&name("b"), Some(b"t")).unwrap();
        assert_eq!(options.next_token(&name("b")).as_deref(), Some("t"), "given again, it names the next");
        options.forget(&name("b"));
        assert_eq!(options.token(&name("b")), None);
    }
}
