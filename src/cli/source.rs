//! The image that a command line names: a file, or an object by its URL.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use percent_encoding::percent_decode_str;
use tokio::runtime::Runtime;

use super::daemon::raise_descriptor_limit;
use super::{SourceArguments, cores};
use crate::bucket::{Bucket, RequestLimits};
use crate::catalog::{BucketFiles, CatalogDisk, CatalogStore, LocalFiles, OpenDisk};
use crate::convert::Workspace;
use crate::error::{Error, ErrorKind, Result};
use crate::format::ImageFormat;
use crate::image::Cancel;
use crate::layout::LayoutOptions;
use crate::settings::CatalogSetting;

/// An image that was named, opened.
pub(super) struct NamedImage {
    pub(super) disk: OpenDisk,
    /// The file, where it is one of this machine.
    pub(super) file: Option<PathBuf>,
}

/// Opens an image that was named on the command line.
pub(super) fn open_source(
    path: &Path,
    source: &SourceArguments,
    options: LayoutOptions,
) -> Result<NamedImage> {
    let place = path.display().to_string();
    // A VMDK may be made of thousands of files.
    raise_descriptor_limit();
    let (store, path, allowed): (Arc<dyn CatalogStore>, _, _) = match CatalogSetting::named(path) {
        CatalogSetting::Directory(path) => (Arc::new(LocalFiles::anywhere()), path, source.allowed.clone()),
        CatalogSetting::Bucket { url, .. } => {
            let (files, path) = object(&url)?;
            // Beside the object, as the image that refers means it.
            let beside = |file: &PathBuf| Path::new("/").join(file);
            (Arc::new(files), path, source.allowed.iter().map(beside).collect())
        }
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let format = source.input_format.or_else(|| ImageFormat::from_file_name(&name)).ok_or_else(|| {
        let what = "the extension does not tell the image's format; give --input-format";
        Error::new(ErrorKind::Malformed, what).in_file(&place)
    })?;
    let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem).to_owned();
    let disk = CatalogDisk { name: stem, path, format, allowed: allowed.into() };
    let opened = OpenDisk::open(&store, &disk, options, Workspace::in_memory(), Cancel::default());
    let opened = opened.map_err(|error| match error.kind() {
        ErrorKind::ReferenceDenied => {
            let what = format!("{}; --allow-reference FILE allows it", error.what());
            Error::new(ErrorKind::ReferenceDenied, what).in_file(place)
        }
        _ => error,
    })?;
    Ok(NamedImage { disk: opened, file: (!store.is_remote()).then_some(disk.path) })
}

/// The objects beside the one that a URL names, and its path among them.
fn object(url: &str) -> Result<(BucketFiles, PathBuf)> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let nothing = || Error::new(ErrorKind::Malformed, "the URL names no object").in_file(url);
    if url.contains(['?', '#']) {
        let what = "an object's URL has no ? and no #; write them as %3F and %23. Signed URLs are not read: give \
                    credentials in the environment";
        return Err(Error::new(ErrorKind::Malformed, what).in_file(url));
    }
    let (scheme, rest) = url.split_once("://").ok_or_else(nothing)?;
    let (directory, name) = rest.rsplit_once('/').filter(|(_, name)| !name.is_empty()).ok_or_else(nothing)?;
    let name = percent_decode_str(name).decode_utf8().map_err(|_| nothing())?;
    let directory = format!("{scheme}://{directory}");
    let bucket = Bucket::open_with("source", &directory, &RequestLimits::default(), &BTreeMap::new())?;
    let runtime = match RUNTIME.get() {
        Some(runtime) => runtime,
        None => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(cores())
                .enable_all()
                .build()
                .map_err(|e| Error::from_io("cannot start the runtime", e))?;
            RUNTIME.get_or_init(|| runtime)
        }
    };
    Ok((BucketFiles::new(bucket, runtime.handle().clone()), Path::new("/").join(&*name)))
}
