//! What content is known by: the generation of one file, and the identity of a computed file.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::extent::AllocationMap;

/// One content of one source file: two reads under one generation are reads of the same content.
///
/// Equal when nothing tells the contents apart on this host: a local file's device, inode, size, mtime and ctime, an
/// object's entity tag and size.
#[derive(Clone, Debug)]
pub struct Generation {
    shown: String,
    local: String,
    portable: String,
    modified: SystemTime,
}

impl Generation {
    /// A generation of which `shown` tells people, and which every host knows by the same words, `shown` again.
    pub fn everywhere(shown: impl Into<String>, modified: SystemTime) -> Self {
        let shown = shown.into();
        Self { local: shown.clone(), portable: shown.clone(), shown, modified }
    }

    /// A generation of which `shown` tells people; this host knows it by `local`, hosts that have copies of the file
    /// know it by `portable`.
    pub fn local(shown: String, local: String, portable: String, modified: SystemTime) -> Self {
        Self { shown, local, portable, modified }
    }

    /// For people and documents. Never compared where it matters.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// When the file was last modified.
    pub fn modified(&self) -> SystemTime {
        self.modified
    }
}

impl PartialEq for Generation {
    fn eq(&self, other: &Self) -> bool {
        self.local == other.local
    }
}

impl Eq for Generation {}

/// Everything that the bytes of a computed file depend on, as digests: each file of the source, what the catalog says
/// of it, the layout and its options, the compressor, and which units are allocated.
///
/// Equality is the only thing to ask of it, and there are two: `==` is true for the same bytes on this host,
/// [`is_same_elsewhere`](Self::is_same_elsewhere) for the same bytes on hosts with copies of the files.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// With what only this host knows: device, inode, time of the last status change.
    local: String,
    /// With what copies have in common: size and mtime, entity tags.
    portable: String,
    /// Of the allocation map, by which the layout places the bytes. Not a function of the source's content: a
    /// filesystem may tell other holes of the same file tomorrow.
    #[serde(default)]
    map: Option<String>,
}

impl Identity {
    /// Begins an identity; it is equal to others that get the same facts in the same order.
    pub fn of_facts() -> IdentityFacts {
        let hash = Sha256::new().chain_update(b"freightfs identity 1\0");
        IdentityFacts { local: hash.clone(), portable: hash }
    }

    /// Whether two hosts mean the same bytes.
    pub fn is_same_elsewhere(&self, other: &Self) -> bool {
        self.portable == other.portable && self.map == other.map
    }

    /// Whether on this host the source is the same and only its allocation map is another one, so that what was made
    /// of it before cannot be continued, but can be made again.
    pub fn differs_in_map_only(&self, other: &Self) -> bool {
        self.local == other.local && self.map != other.map
    }

    /// A text that is equal for equal identities on this host, to name what is kept for them.
    pub fn name(&self) -> String {
        format!("{}\n{}", self.local, self.map.as_deref().unwrap_or_default())
    }
}

/// Collects the facts of an [`Identity`].
pub struct IdentityFacts {
    local: Sha256,
    portable: Sha256,
}

impl IdentityFacts {
    /// A fact that is the same on every host.
    pub fn fact(self, fact: impl AsRef<[u8]>) -> Self {
        let fact = fact.as_ref();
        self.both(fact, fact)
    }

    /// A file of the source.
    pub fn source(self, source: &Generation) -> Self {
        self.both(source.local.as_bytes(), source.portable.as_bytes())
    }

    /// The identity of a file whose places depend on `map`, where there is one.
    pub fn finish(self, map: Option<&AllocationMap>) -> Identity {
        Identity {
            local: hex::encode(self.local.finalize()),
            portable: hex::encode(self.portable.finalize()),
            map: map.map(|map| hex::encode(map.digest())),
        }
    }

    /// Lengths first, so that no two lists of facts run together to the same bytes.
    fn both(mut self, local: &[u8], portable: &[u8]) -> Self {
        for (hash, bytes) in [(&mut self.local, local), (&mut self.portable, portable)] {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::VirtualOffset;

    fn file(local: &str, portable: &str) -> Generation {
        Generation::local("shown".into(), local.into(), portable.into(), SystemTime::UNIX_EPOCH)
    }

    fn map(unit: u64) -> AllocationMap {
        let mut builder = AllocationMap::builder(1 << 30, 65536);
        builder.mark(VirtualOffset(unit * 65536), 1).unwrap();
        builder.finish().unwrap()
    }

    #[test]
    fn every_fact_counts_and_facts_do_not_run_together() {
        let identity =
            |facts: &[&str]| facts.iter().fold(Identity::of_facts(), |all, fact| all.fact(fact)).finish(None);
        assert_eq!(identity(&["a", "b"]), identity(&["a", "b"]));
        let different: [&[&str]; 5] = [&["a", "b"], &["ab"], &["b", "a"], &["a"], &["a", "b", ""]];
        for (index, one) in different.iter().enumerate() {
            for other in &different[..index] {
                assert_ne!(identity(one), identity(other));
                assert!(!identity(one).is_same_elsewhere(&identity(other)));
            }
        }
    }

    #[test]
    fn copies_are_the_same_elsewhere_only_and_maps_count_everywhere() {
        let of = |generation, map: &AllocationMap| Identity::of_facts().source(generation).finish(Some(map));
        let (here, there, changed) = (file("1", "p"), file("2", "p"), file("1", "q"));
        let first = of(&here, &map(1));
        assert_eq!(first, of(&here, &map(1)));
        assert_ne!(first, of(&there, &map(1)));
        assert!(first.is_same_elsewhere(&of(&there, &map(1))));
        assert!(!first.is_same_elsewhere(&of(&changed, &map(1))));
        assert!(!first.is_same_elsewhere(&of(&there, &map(2))));
        assert!(first.differs_in_map_only(&of(&here, &map(2))));
        assert!(!first.differs_in_map_only(&of(&there, &map(2))));
        assert_ne!(first.name(), of(&here, &map(2)).name());
    }
}
