//! What a request that writes replaces.

use serde::{Deserialize, Serialize};

/// What a put, a completion or a removal replaces: it fails when something else is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// Of a put that is to replace nothing.
    pub(super) creations: bool,
    /// Of a put that is to replace an object.
    pub(super) updates: bool,
    pub(super) completions: bool,
    pub(super) removals: bool,
    /// Of a copy, about its source too.
    pub(super) copies: bool,
}

impl Conditions {
    /// Every one.
    pub(super) const ALL: Self =
        Self { creations: true, updates: true, completions: true, removals: true, copies: true };

    /// Whether the store looks itself what a put replaces.
    pub(super) fn of_put(self, replaces: &Replaces) -> bool {
        match replaces {
            Replaces::Anything => true,
            Replaces::Nothing => self.creations,
            Replaces::Tag(_) => self.updates,
        }
    }

    /// Whether the store keeps to every one.
    pub(super) fn are_all(self) -> bool {
        self == Self::ALL
    }
}

impl Replaces {
    /// What replaces an object as it was when somebody looked: its entity tag, or `None` when there was none.
    pub fn found(object: Option<Option<&str>>) -> Self {
        match object {
            None => Self::Nothing,
            Some(Some(etag)) => Self::Tag(etag.to_owned()),
            Some(None) => Self::Anything,
        }
    }

    /// Whether the object with this entity tag is the very one that is to be replaced.
    pub fn is(&self, etag: Option<&str>) -> bool {
        matches!(self, Self::Tag(tag) if etag == Some(tag))
    }

    /// Whether what is there is what is to be replaced: `None` for nothing, else its entity tag.
    pub(super) fn allows(&self, object: Option<Option<&str>>) -> bool {
        match self {
            Self::Anything => true,
            Self::Nothing => object.is_none(),
            Self::Tag(tag) => object == Some(Some(tag)),
        }
    }
}
