//! The gate of a catalog's images: a reference is followed only to files that were allowed by name.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::CatalogStore;
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::format::ImageFormat;
use crate::image::{GatedFile, ReferenceGate, ReferenceKind, denied};
use crate::storage::Generation;

/// Lets an image refer to an exact list of files.
///
/// A reference is resolved against the directory of the file that makes it, without touching the disk, and must
/// then equal an allowed path. So `..`, absolute names and protocols lead nowhere but to that list, and a
/// symbolic link in the last place is refused when the file is opened (CVE-2024-32498, CVE-2022-47951).
#[derive(Clone)]
pub struct AllowedFiles {
    store: Arc<dyn CatalogStore>,
    /// The directory of the image that refers.
    directory: PathBuf,
    /// What may be opened, made absolute.
    allowed: Arc<HashSet<PathBuf>>,
    /// What was opened, by this gate and those that it gave.
    opened: OpenedFiles,
}

/// Files that were opened for an image, each under the generation that it had then.
pub(super) type OpenedFiles = Arc<Mutex<Vec<(PathBuf, Generation)>>>;

impl AllowedFiles {
    /// The gate of the image file `image`, which may refer to `allowed`. Relative paths start at the current
    /// directory, as the operator who lists them expects.
    pub fn new(store: Arc<dyn CatalogStore>, image: &Path, allowed: &[PathBuf]) -> Result<Self> {
        let absolute = |path: &Path| {
            std::path::absolute(path)
                .map(|p| store.canonical(&p))
                .map_err(|e| Error::from_io("cannot resolve", e).in_file(path.display().to_string()))
        };
        let directory = absolute(image)?.parent().map(Path::to_owned).unwrap_or_default();
        let allowed = allowed.iter().map(|p| absolute(p)).collect::<Result<_>>()?;
        Ok(Self { store, directory, allowed: Arc::new(allowed), opened: Arc::default() })
    }

    /// The files that were opened through the gate so far and will be.
    pub(super) fn opened(&self) -> OpenedFiles {
        Arc::clone(&self.opened)
    }
}

impl ReferenceGate for AllowedFiles {
    fn open(&self, kind: ReferenceKind, reference: &str) -> Result<GatedFile> {
        let path = self.store.canonical(&self.directory.join(reference));
        if reference.is_empty() || reference.contains('\0') || !self.allowed.contains(&path) {
            return Err(denied(kind, reference));
        }
        let (opened, most) = (self.opened.lock().len(), self.store.most_files());
        if opened >= most {
            let what = format!("the image is made of more than the {most} files that one may have open");
            return Err(Error::new(ErrorKind::TooLarge, what));
        }
        let storage = self.store.open_reference(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                format!("the image names {}, which is missing", quoted(reference)),
            )
            .in_file(self.store.place(&path)),
            _ => e,
        })?;
        self.opened.lock().push((path.clone(), storage.generation().clone()));
        let directory = path.parent().map(Path::to_owned).unwrap_or_default();
        Ok(GatedFile {
            storage,
            format: path.file_name().and_then(|n| ImageFormat::from_file_name(&n.to_string_lossy())),
            gate: Arc::new(Self { directory, ..self.clone() }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::LocalFiles;

    #[test]
    fn only_the_listed_file_opens() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("sub")).unwrap();
        for name in ["base.qcow2", "other.qcow2", "sub/base.qcow2"] {
            std::fs::write(root.join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", root.join("link.raw")).unwrap();
        let allowed = [root.join("base.qcow2"), root.join("link.raw"), root.join("gone.raw")];
        let gate =
            AllowedFiles::new(Arc::new(LocalFiles::anywhere()), &root.join("top.qcow2"), &allowed).unwrap();
        let open = |name: &str| gate.open(ReferenceKind::Backing, name).map(|f| f.storage.file_size());
        assert_eq!(open("base.qcow2").unwrap(), 10);
        assert_eq!(open("./sub/../base.qcow2").unwrap(), 10);
        assert_eq!(open(&root.join("base.qcow2").display().to_string()).unwrap(), 10);
        for name in
            ["other.qcow2", "sub/base.qcow2", "/etc/passwd", "../etc/passwd", "json:{}", "nbd://h/x", ""]
        {
            assert_eq!(open(name).unwrap_err().kind(), ErrorKind::ReferenceDenied, "{name}");
        }
        assert_eq!(open("gone.raw").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(open("link.raw").unwrap_err().kind(), ErrorKind::Malformed);
    }
}
