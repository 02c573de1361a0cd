//! What a request that writes replaces.

use super::signed::Header;

/// What a put, a completion or a removal replaces: it fails when something else is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Replaces {
    /// Whatever is there.
    #[default]
    Anything,
    /// Nothing: there must be no object.
    Nothing,
    /// The object that has this entity tag.
    Tag(String),
}

/// Which conditions a store keeps to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Conditions {
    /// A put that is to replace nothing.
    pub(super) creations: bool,
    /// A put that is to replace an object.
    pub(super) updates: bool,
    pub(super) completions: bool,
    pub(super) removals: bool,
}

impl Replaces {
    /// What replaces an object with that tag, as it was when somebody looked: `None` when there was none.
    pub fn found(object: Option<Option<&str>>) -> Self {
        match object {
            None => Self::Nothing,
            Some(Some(etag)) => Self::Tag(etag.to_owned()),
            Some(None) => Self::Anything,
        }
    }

    /// Whether what is there is what is to be replaced: `None` for nothing, else its entity tag.
    pub(super) fn allows(&self, object: Option<Option<&str>>) -> bool {
        match self {
            Self::Anything => true,
            Self::Nothing => object.is_none(),
            Self::Tag(tag) => object == Some(Some(tag)),
        }
    }

    /// As headers of a request (RFC 9110, 13.1.1 and 13.1.2).
    pub(super) fn headers(&self) -> Vec<Header> {
        match self {
            Self::Anything => Vec::new(),
            Self::Nothing => vec![("if-none-match", "*".to_owned())],
            Self::Tag(tag) => vec![("if-match", tag.clone())],
        }
    }
}
