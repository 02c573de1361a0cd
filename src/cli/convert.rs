//! `freightfs convert`: one image file into another, as the mount would show it.

use std::path::Path;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};

use super::{ConvertArguments, OK, SourceArguments, cores};
use crate::catalog::{CatalogDisk, OpenDisk};
use crate::convert::write_file;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{ImageFormat, OutputFormat};
use crate::vfile::VirtualFile;

/// Opens an image file that was named on the command line.
pub(super) fn open_source(path: &Path, source: &SourceArguments) -> Result<OpenDisk> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let format = source.input_format.or_else(|| ImageFormat::from_file_name(&name)).ok_or_else(|| {
        Error::new(
            ErrorKind::Malformed,
            "the extension does not tell the image's format; give --input-format",
        )
        .in_file(path.display().to_string())
    })?;
    let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem);
    let disk =
        CatalogDisk { name: stem.to_owned(), path: path.to_owned(), format, allowed: source.allowed.clone() };
    let opened = OpenDisk::open(&disk);
    opened.map_err(|error| match error.kind() {
        ErrorKind::ReferenceDenied => {
            let what = format!("{}; --allow-reference FILE allows it", error.what());
            Error::new(ErrorKind::ReferenceDenied, what).in_file(path.display().to_string())
        }
        _ => error,
    })
}

pub(super) fn run(arguments: &ConvertArguments) -> Result<u8> {
    let output = &arguments.output;
    let place = output.display().to_string();
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let format = match &arguments.format {
        Some(suffix) => OutputFormat::from_suffix(suffix)?,
        None => OutputFormat::split_file_name(&name).map(|(_, format)| format).ok_or_else(|| {
            let known: Vec<_> = OutputFormat::ALL.iter().map(|f| format!(".{}", f.suffix())).collect();
            let what = format!("the suffix tells no known format ({}); give --format", known.join(" "));
            Error::new(ErrorKind::Malformed, what).in_file(&place)
        })?,
    };
    let disk = open_source(&arguments.input, &arguments.source)?;
    let file = disk.file(format)?;
    let same = std::fs::canonicalize(output).ok().zip(std::fs::canonicalize(&arguments.input).ok());
    if same.is_some_and(|(output, input)| output == input) {
        return Err(Error::new(ErrorKind::Malformed, "input and output are the same file").in_file(place));
    }
    let directory = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |e| Error::from_io("cannot create the output", e).in_file(&place);
    // The output appears under its name only when it is whole: a failure leaves what was there before.
    let target = tempfile::Builder::new().prefix(".freightfs-").tempfile_in(directory).map_err(failed)?;
    let bar = progress_bar(file.file_size(), arguments.quiet);
    let threads = arguments.threads.unwrap_or_else(cores).max(1);
    let source: Arc<dyn VirtualFile> = file;
    write_file(&*source, target.as_file(), threads, &|bytes| bar.inc(bytes))
        .map_err(|e| e.in_file(&place))?;
    bar.finish_and_clear();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666 & !current_umask());
    target.as_file().set_permissions(mode).map_err(failed)?;
    target
        .persist(output)
        .map_err(|e| Error::from_io("cannot put the output in place", e.error).in_file(&place))?;
    Ok(OK)
}

/// The process's umask, for a file that was made private first.
fn current_umask() -> u32 {
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    nix::sys::stat::umask(mask);
    mask.bits()
}

/// A bar on a terminal, nothing elsewhere.
fn progress_bar(bytes: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style =
        "{bar:30} {percent:>3}%  {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    ProgressBar::new(bytes)
        .with_style(ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()))
}
