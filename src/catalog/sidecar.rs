//! The sidecar `NAME.toml`: what the catalog's owner says of an image.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CatalogStore;
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::format::ImageFormat;

/// Largest sidecar that is read, in bytes.
const MAX_SIDECAR: u64 = 1 << 20;

/// Disks of an image at most.
pub(super) const MAX_DISKS: usize = 256;

/// Files that an image may refer to at most: a VMDK has up to 4096 extents, and there may be images below it.
const MAX_ALLOWED: usize = 8192;

/// Tags of an image at most, and bytes of each word: they stand in its image.json, and its name in every status.
const MAX_TAGS: usize = 256;
const MAX_WORD: usize = 1024;

/// Where an image comes from; clouds refuse to export some of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageOrigin {
    /// Made by its owner.
    #[default]
    Private,
    /// Offered to everybody by the provider.
    Public,
    /// Bought on a marketplace.
    Market,
    /// Shared by another account.
    Shared,
}

impl ImageOrigin {
    /// As sidecars and policies write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Public => "public",
            Self::Market => "market",
            Self::Shared => "shared",
        }
    }
}

impl ImageKind {
    /// As sidecars and policies write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::FullMachine => "full-machine",
            Self::Backup => "backup",
        }
    }
}

/// What an image was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageKind {
    /// A system disk, perhaps with data disks.
    #[default]
    System,
    /// A whole machine.
    FullMachine,
    /// A backup service's copy.
    Backup,
}

/// The content of a sidecar. Unknown keys are refused, so that a misspelt one is not silently without effect.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sidecar {
    /// The image's id, when it is not the file's stem.
    pub id: Option<String>,
    /// A name for people.
    pub name: Option<String>,
    /// The image's state in its cloud's words.
    pub status: Option<String>,
    /// The operating system.
    pub os: Option<String>,
    /// Where it comes from.
    #[serde(default)]
    pub origin: ImageOrigin,
    /// Where the image comes from that it was made of, when it was made of another one.
    pub made_from: Option<ImageOrigin>,
    /// What it was made of.
    #[serde(default)]
    pub kind: ImageKind,
    /// The region that it is in.
    pub region: Option<String>,
    /// Whether it is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// The format of the image file, where the extension does not tell it.
    pub format: Option<ImageFormat>,
    /// The disks, the system disk first, where the files found are not to be taken as they are.
    #[serde(default)]
    pub disks: Vec<SidecarDisk>,
    /// The files that the image may refer to: backing files and external data files.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Free key-value pairs.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// One disk in a sidecar's list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SidecarDisk {
    /// The image file, relative to the image's directory or else the catalog's.
    pub file: String,
    /// Its format, where the extension does not tell it.
    pub format: Option<ImageFormat>,
}

impl Sidecar {
    /// Reads and checks a sidecar.
    pub fn read(store: &dyn CatalogStore, path: &Path) -> Result<Self> {
        let place = store.place(path);
        let text = store.read_text(path, MAX_SIDECAR)?;
        let sidecar: Self = toml::from_str(&text).map_err(|e| Error::from_toml(&e, &text).in_file(&place))?;
        sidecar.check().map_err(|e| e.in_file(place))?;
        Ok(sidecar)
    }

    /// The files that it lists as disks.
    pub(super) fn files(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.file.clone()).collect()
    }

    /// The files that a sidecar lists that is refused for something else, as far as they can be told.
    pub(super) fn files_if_any(store: &dyn CatalogStore, path: &Path) -> Vec<String> {
        let text = store.read_text(path, MAX_SIDECAR).unwrap_or_default();
        let Ok(table) = toml::from_str::<toml::Table>(&text) else {
            // Half of one, perhaps: whatever it has in quotes may be a file.
            return text.split(['"', '\'']).take(MAX_ALLOWED).map(str::to_owned).collect();
        };
        let disks = table.get("disks").and_then(toml::Value::as_array).cloned().unwrap_or_default();
        disks.iter().filter_map(|disk| Some(disk.get("file")?.as_str()?.to_owned())).collect()
    }

    /// Refuses an id that cannot be a name, and more of anything than an image has.
    fn check(&self) -> Result<()> {
        if let Some(id) = self.id.as_ref().filter(|id| !is_file_name(id)) {
            let what = format!("the id {} cannot be a directory's name", quoted(id));
            return Err(Error::new(ErrorKind::Malformed, what));
        }
        for (key, count, most) in [
            ("disks", self.disks.len(), MAX_DISKS),
            ("allow", self.allow.len(), MAX_ALLOWED),
            ("tags", self.tags.len(), MAX_TAGS),
        ] {
            if count > most {
                let what = format!("{key} has {count} entries; an image has at most {most}");
                return Err(Error::new(ErrorKind::TooLarge, what));
            }
        }
        let words = [&self.name, &self.status, &self.os, &self.region].into_iter().flatten();
        let words = words.chain(self.tags.keys()).chain(self.tags.values());
        if let Some(long) = words.max_by_key(|word| word.len()).filter(|word| word.len() > MAX_WORD) {
            let (word, length) = (quoted(long), long.len());
            let what = format!("{word} has {length} bytes; a word of a sidecar has at most {MAX_WORD}");
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        Ok(())
    }
}

/// Whether `name` can be one component of a path: not empty, `.`, `..`, too long, nor with `/` or control characters.
fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && name.len() <= 200
        && !name.contains('/')
        && !name.chars().any(char::is_control)
}
