//! From names to images: files that share a stem, what a sidecar says of them, and who has which name.
//!
//! Whatever is ambiguous is refused, or told as the strictest reading has it: a file that is added to a catalog takes no
//! policy away from those that were there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sidecar::MAX_DISKS;
use super::store::{CatalogStore, Entry};
use super::{CatalogDisk, CatalogImage, Sidecar};
use crate::error::{Error, ErrorKind, Result};
use crate::format::ImageFormat;

/// The files that sidecars list, by the sidecars' paths. One that cannot be read lists what it did before.
pub(super) type Claims = BTreeMap<PathBuf, Vec<PathBuf>>;

/// All images of a catalog by their ids; `claims` is what an earlier listing left there, or nothing.
pub(super) fn list(
    store: &dyn CatalogStore,
    claims: &mut Claims,
) -> Result<BTreeMap<String, Arc<CatalogImage>>> {
    let candidates = candidates(store)?;
    let mut now = Claims::new();
    let mut found = Vec::new();
    for candidate in candidates {
        let read = candidate.read_sidecars(store);
        for (path, sidecar) in candidate.sidecars.iter().zip(&read) {
            let listed = match sidecar {
                Ok(sidecar) => candidate.claimed(&sidecar.files(), store),
                Err(_) => {
                    let mut known = claims.get(path).cloned().unwrap_or_default();
                    known.extend(candidate.claimed(&Sidecar::files_if_any(store, path), store));
                    known
                }
            };
            now.insert(path.clone(), listed);
        }
        found.extend(candidate.into_images(read, store));
    }
    *claims = now;
    let listed: BTreeSet<_> = claims.values().flatten().collect();
    let mut images: BTreeMap<String, Vec<Found>> = BTreeMap::new();
    for mut one in found {
        // A disk of an image whose sidecar names it is no image of its own, of which nothing would be said.
        let had = one.image.disks.len();
        if !one.has_sidecar {
            one.image.disks.retain(|disk| !listed.contains(&disk.path));
        }
        if !one.image.disks.is_empty() || had == 0 {
            images.entry(one.image.id.clone()).or_default().push(one);
        }
    }
    Ok(images.into_iter().map(|(id, same)| (id, Arc::new(alone(same, store)))).collect())
}

/// The only image of an id; one that tells why it cannot be used where several have it.
fn alone(mut same: Vec<Found>, store: &dyn CatalogStore) -> CatalogImage {
    let mut first = same.remove(0);
    if !same.is_empty() {
        let others = same.iter().map(|other| store.place(&other.place)).collect::<Vec<_>>().join(", ");
        let what = format!("has the same id as {others}");
        let error = Error::new(ErrorKind::Malformed, what).in_file(store.place(&first.place));
        first.image.error = Some(error);
    }
    first.image
}

/// What the names suggest, before sidecars are read.
fn candidates(store: &dyn CatalogStore) -> Result<Vec<Candidate>> {
    let mut entries = store.entries()?;
    entries.retain(|name, _| !name.chars().any(char::is_control));
    let mut found: BTreeMap<String, Candidate> = BTreeMap::new();
    for (name, entry) in &entries {
        if extent_of(name).is_some_and(|whole| entries.contains_key(&whole)) {
            continue;
        }
        let path = store.root().join(name);
        match (entry, name.rsplit_once('.')) {
            (Entry::Directory(files), _) => {
                let candidate = found.entry(name.clone()).or_insert_with(|| Candidate::new(name));
                candidate.files_within = image_files(&path, files);
                candidate.directory = Some(path);
            }
            (Entry::Unavailable(error), _) => {
                let candidate = found.entry(name.clone()).or_insert_with(|| Candidate::new(name));
                candidate.directory = Some(path);
                candidate.refused = Some(error.clone());
            }
            (Entry::File, Some((stem, _))) => {
                let candidate = found.entry(stem.to_owned()).or_insert_with(|| Candidate::new(stem));
                if is_sidecar(name) {
                    candidate.sidecars.push(path);
                } else if ImageFormat::from_file_name(name).is_some() {
                    candidate.files.push(path);
                }
            }
            (Entry::File, None) => {}
        }
    }
    Ok(found.into_values().collect())
}

/// Whether a file of that name is a sidecar.
pub(super) fn is_sidecar(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| extension.eq_ignore_ascii_case("toml"))
}

/// The image files among a directory's, sorted by name.
fn image_files(directory: &Path, names: &[String]) -> Vec<PathBuf> {
    let names: BTreeSet<_> = names
        .iter()
        .filter(|name| !name.starts_with('.') && ImageFormat::from_file_name(name).is_some())
        .collect();
    let is_extent = |name: &str| extent_of(name).is_some_and(|whole| names.contains(&whole));
    names.iter().filter(|name| !is_extent(name)).map(|name| directory.join(name)).collect()
}

/// Files that share a stem.
struct Candidate {
    stem: String,
    /// One, or several whose extensions differ in case.
    sidecars: Vec<PathBuf>,
    directory: Option<PathBuf>,
    /// The image files in that directory.
    files_within: Vec<PathBuf>,
    /// The image files beside it.
    files: Vec<PathBuf>,
    /// Why nobody looks into the directory.
    refused: Option<Error>,
}

/// An image and where it comes from.
struct Found {
    image: CatalogImage,
    /// What the log and errors name: its sidecar, directory or file.
    place: PathBuf,
    has_sidecar: bool,
}

impl Candidate {
    fn new(stem: &str) -> Self {
        Self {
            stem: stem.to_owned(),
            sidecars: Vec::new(),
            directory: None,
            files_within: Vec::new(),
            files: Vec::new(),
            refused: None,
        }
    }

    fn read_sidecars(&self, store: &dyn CatalogStore) -> Vec<Result<Sidecar>> {
        self.sidecars.iter().map(|path| Sidecar::read(store, path)).collect()
    }

    /// What its sidecar says, which is so of every image of the stem.
    fn sidecar(&self, mut read: Vec<Result<Sidecar>>, store: &dyn CatalogStore) -> Result<Sidecar> {
        match &self.sidecars[..] {
            [] => Ok(Sidecar::default()),
            [_] => read.remove(0),
            [one, other, ..] => {
                let what = format!("is a sidecar of the same images as {}", store.place(other));
                Err(Error::new(ErrorKind::Malformed, what).in_file(store.place(one)))
            }
        }
    }

    /// What files that its sidecar names may mean: in its directory, and beside it.
    fn claimed(&self, files: &[String], store: &dyn CatalogStore) -> Vec<PathBuf> {
        let bases = [Some(store.root()), self.directory.as_deref()];
        let bases = bases.into_iter().flatten();
        bases.flat_map(|base| files.iter().map(|file| store.canonical(&base.join(file)))).collect()
    }

    /// What a file means that its sidecar lists as a disk. A directory that somebody adds does not change it.
    fn listed_file(&self, file: &str, store: &dyn CatalogStore) -> Result<PathBuf> {
        let top = store.canonical(&store.root().join(file));
        let Some(directory) = &self.directory else { return Ok(top) };
        let within = store.canonical(&directory.join(file));
        if within == top || store.stat(&within).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
            return Ok(if self.files_within.is_empty() || store.stat(&top).is_ok() { top } else { within });
        }
        match store.stat(&top) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(within),
            _ => {
                let what = format!("may be {} too, as a sidecar names it", store.place(&within));
                Err(Error::new(ErrorKind::Malformed, what).in_file(store.place(&top)))
            }
        }
    }

    /// The images: one where the sidecar lists the disks, else one for the directory and one for each file. A file that
    /// does not have the stem for itself is an image under its whole name.
    fn into_images(self, read: Vec<Result<Sidecar>>, store: &dyn CatalogStore) -> Vec<Found> {
        let (sidecar, error) = match self.sidecar(read, store) {
            Ok(sidecar) => (Arc::new(sidecar), None),
            Err(error) => (Arc::default(), Some(error)),
        };
        let base = self.directory.clone().unwrap_or_else(|| store.root().to_owned());
        let id = sidecar.id.clone().unwrap_or_else(|| self.stem.clone());
        let has_directory = !self.files_within.is_empty() || self.refused.is_some();
        let mut made =
            Images { sidecar, error, allowed: BTreeMap::new(), candidate: &self, store, found: Vec::new() };
        if !made.sidecar.disks.is_empty() {
            let disks = made.listed();
            // What they may refer to is beside them.
            let is_within =
                |(path, _): &(PathBuf, _)| self.directory.as_ref().is_some_and(|d| path.starts_with(d));
            let base = if disks.iter().flatten().any(is_within) { &base } else { store.root() };
            made.add(id, base, disks);
            return made.found;
        }
        let is_alone = self.files.len() == 1 && !has_directory;
        for file in &self.files {
            let extension = file.extension().unwrap_or_default().to_string_lossy();
            let id = if is_alone { id.clone() } else { format!("{id}.{extension}") };
            made.add(id, store.root(), made.with_formats(vec![file.clone()]));
        }
        if has_directory || self.files.is_empty() && !self.sidecars.is_empty() {
            let disks = match self.refused.clone() {
                Some(refused) => Err(refused),
                None => made.with_formats(self.files_of_directory()),
            };
            made.add(id, &base, disks);
        }
        made.found
    }

    /// A directory's image files, the system disk first: the file named like the directory, or "system", "root" or
    /// "disk0"; else the first.
    fn files_of_directory(&self) -> Vec<PathBuf> {
        let mut files = self.files_within.clone();
        let is_system = |path: &PathBuf| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            stem == self.stem || ["system", "root", "disk0"].contains(&stem.as_str())
        };
        if let Some(at) = files.iter().position(is_system) {
            let system = files.remove(at);
            files.insert(0, system);
        }
        files
    }
}

/// The images of a candidate, as they are made.
struct Images<'a> {
    sidecar: Arc<Sidecar>,
    error: Option<Error>,
    /// The files to which images may refer, by the directory that they are in: one list for all of them.
    allowed: BTreeMap<PathBuf, Arc<[PathBuf]>>,
    candidate: &'a Candidate,
    store: &'a dyn CatalogStore,
    found: Vec<Found>,
}

/// Files and their formats.
type Disks = Vec<(PathBuf, ImageFormat)>;

impl Images<'_> {
    fn add(&mut self, id: String, base: &Path, disks: Result<Disks>) {
        let candidate = self.candidate;
        let first = disks.as_ref().ok().and_then(|disks| Some(disks.first()?.0.clone()));
        let place = candidate.sidecars.first().or(candidate.directory.as_ref()).cloned();
        let place = place.or(first).unwrap_or_else(|| base.to_owned());
        let (disks, wrong) = match disks {
            Ok(disks) => (disks, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let allowed = self.allowed.entry(base.to_owned()).or_insert_with(|| {
            let canonical = |file: &String| self.store.canonical(&base.join(file));
            self.sidecar.allow.iter().map(canonical).collect()
        });
        let disk = |(index, (path, format))| {
            let name = if index == 0 { id.clone() } else { format!("{id}-data{index}") };
            CatalogDisk { name, path, format, allowed: Arc::clone(allowed) }
        };
        let disks = disks.into_iter().enumerate().map(disk).collect();
        let error = self.error.clone().or(wrong);
        let image = CatalogImage { id: id.clone(), sidecar: Arc::clone(&self.sidecar), disks, error };
        let has_sidecar = !candidate.sidecars.is_empty();
        self.found.push(Found { image, place, has_sidecar });
    }

    /// The disks that the sidecar lists.
    fn listed(&self) -> Result<Disks> {
        let disks = self.sidecar.disks.iter().map(|disk| {
            let path = self.candidate.listed_file(&disk.file, self.store)?;
            let format = disk.format.or_else(|| ImageFormat::from_file_name(&disk.file));
            self.known(path, format)
        });
        disks.collect()
    }

    /// Files that were found, with what the sidecar says of the format.
    fn with_formats(&self, files: Vec<PathBuf>) -> Result<Disks> {
        if files.len() > MAX_DISKS {
            let what = format!("has {} image files; an image has at most {MAX_DISKS} disks", files.len());
            let directory = files[0].parent().unwrap_or(self.store.root());
            return Err(Error::new(ErrorKind::TooLarge, what).in_file(self.store.place(directory)));
        }
        let with_format = files.into_iter().map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.known(path, self.sidecar.format.or_else(|| ImageFormat::from_file_name(&name)))
        });
        with_format.collect()
    }

    fn known(&self, path: PathBuf, format: Option<ImageFormat>) -> Result<(PathBuf, ImageFormat)> {
        match format {
            Some(format) => Ok((path, format)),
            None => {
                let what = "neither the sidecar nor the extension tells the disk's format";
                Err(Error::new(ErrorKind::Malformed, what).in_file(self.store.place(&path)))
            }
        }
    }
}

/// The descriptor whose extent a file of that name is by VMware's custom: `NAME-flat.vmdk`, `NAME-s001.vmdk` and
/// `NAME-f001.vmdk` belong to `NAME.vmdk`.
fn extent_of(name: &str) -> Option<String> {
    let (whole, part) = name.strip_suffix(".vmdk")?.rsplit_once('-')?;
    let numbered = part
        .strip_prefix(['s', 'f'])
        .is_some_and(|digits| digits.len() >= 3 && digits.bytes().all(|digit| digit.is_ascii_digit()));
    (part == "flat" || numbered).then(|| format!("{whole}.vmdk"))
}
