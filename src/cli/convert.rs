//! `freightfs convert`: one image file into another, as the mount would show it.

use std::io::{IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::progress::Board;
use super::source::open_source;
use super::{ConvertArguments, OK, cores};
use crate::catalog::FormatFile;
use crate::convert::write_file;
use crate::error::{Error, ErrorKind, Result};
use crate::format::OutputFormat;
use crate::layout::LayoutOptions;
use crate::units::{FileOffset, MIB};
use crate::vfile::VirtualFile;

/// The output's name that means standard output.
const STANDARD_OUTPUT: &str = "-";

/// Bytes of a write to standard output.
const STREAM_BUFFER: usize = 4 * MIB as usize;

/// Sizes of qcow2 clusters (QEMU, docs/interop/qcow2.rst, "Header": cluster_bits; limited by qemu to 2 MiB).
const CLUSTER_SIZES: std::ops::RangeInclusive<u64> = 512..=2 * MIB;

pub(super) fn run(arguments: &ConvertArguments) -> Result<u8> {
    let output = &arguments.output;
    let place = output.display().to_string();
    let format = output_format(arguments)?;
    let options = layout_options(arguments, format)?;
    let disk = open_source(&arguments.input, &arguments.source, options)?.disk;
    let file = disk.file(format)?;
    let threads = arguments.threads.unwrap_or_else(cores).max(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::new(ErrorKind::Internal, "cannot start threads").because(e))?;
    if place == STANDARD_OUTPUT {
        return pool.install(|| stream(&file, arguments.quiet)).map(|()| OK);
    }
    let output = &replaceable(output)?;
    if std::fs::canonicalize(&arguments.input).is_ok_and(|input| input == *output) {
        return Err(Error::new(ErrorKind::Malformed, "input and output are the same file").in_file(place));
    }
    let directory = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |e| Error::from_io("cannot create the output", e).in_file(&place);
    // The output appears under its name only when it is whole: a failure leaves what was there before.
    let target = tempfile::Builder::new().prefix(".freightfs-").tempfile_in(directory).map_err(failed)?;
    let board = Board::new(arguments.quiet);
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let written = match &file {
        FormatFile::Plain(file) => {
            let progress = board.add(&name, file.file_size());
            write_file(&**file, target.as_file(), threads, &|bytes| progress.add(bytes))
                .inspect(|()| progress.finish())
        }
        FormatFile::Compressed(file) => {
            let progress = board.add(&name, file.units() * file.unit_size());
            pool.install(|| file.write_to(target.as_file(), &|units| progress.add(units * file.unit_size())))
                .inspect(|()| progress.finish())
        }
    };
    written.map_err(|e| e.in_file(&place))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666 & !current_umask());
    target.as_file().set_permissions(mode).map_err(failed)?;
    target
        .persist(output)
        .map_err(|e| Error::from_io("cannot put the output in place", e.error).in_file(&place))?;
    Ok(OK)
}

/// The path of the regular file that the output becomes: where a symbolic link leads. What is there and is something else is
/// refused, because the output takes its place: /dev/null would be a file from then on.
fn replaceable(output: &Path) -> Result<PathBuf> {
    let place = || output.display().to_string();
    let failed = |e| Error::from_io("cannot look at the output", e).in_file(place());
    match std::fs::symlink_metadata(output) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(output.to_owned()),
        looked => looked.map_err(failed)?,
    };
    // The kernel follows links as its rules for directories of all want it (fs.protected_symlinks).
    let meta = std::fs::metadata(output).map_err(failed)?;
    if !meta.is_file() {
        let what = "the output is a directory, a device, a FIFO or a socket, which is not replaced by a file; write \
                    to standard output: `freightfs convert --format raw IMAGE - >DEVICE`";
        return Err(Error::new(ErrorKind::Malformed, what).in_file(place()));
    }
    let path = std::fs::canonicalize(output).map_err(failed)?;
    let there = std::fs::symlink_metadata(&path).map_err(failed)?;
    if (there.dev(), there.ino()) != (meta.dev(), meta.ino()) {
        let what = "the output's symbolic link does not lead to what its name opens";
        return Err(Error::new(ErrorKind::Malformed, what).in_file(place()));
    }
    Ok(path)
}

/// The format that `--format` or the output's suffix names.
fn output_format(arguments: &ConvertArguments) -> Result<OutputFormat> {
    if let Some(suffix) = &arguments.format {
        return OutputFormat::from_suffix(suffix);
    }
    let place = arguments.output.display().to_string();
    if place == STANDARD_OUTPUT {
        let what = "standard output has no suffix that tells the format; give --format";
        return Err(Error::new(ErrorKind::Malformed, what));
    }
    let name = arguments.output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    OutputFormat::split_file_name(&name).map(|(_, format)| format).ok_or_else(|| {
        let known: Vec<_> = OutputFormat::ALL.iter().map(|f| format!(".{}", f.suffix())).collect();
        let what = format!("the suffix tells no known format ({}); give --format", known.join(" "));
        Error::new(ErrorKind::Malformed, what).in_file(place)
    })
}

/// Options that the format has; others are refused, because they would be ignored.
fn layout_options(arguments: &ConvertArguments, format: OutputFormat) -> Result<LayoutOptions> {
    let refused = |option: &str| {
        Err(Error::new(ErrorKind::Malformed, format!("--{option} means nothing for .{}", format.suffix())))
    };
    let qcow2 = format.qemu_name() == Some("qcow2");
    if arguments.level.is_some() && !format.is_compressed() {
        return refused("level");
    }
    if arguments.large_window && format != OutputFormat::ZlibQcow2 {
        return refused("large-window");
    }
    match arguments.cluster_size {
        Some(_) if !qcow2 => return refused("cluster-size"),
        Some(size) if !size.is_power_of_two() || !CLUSTER_SIZES.contains(&size) => {
            let what = format!("a cluster of {size} bytes is not a power of two from 512 to 2097152");
            return Err(Error::new(ErrorKind::Malformed, what));
        }
        _ => {}
    }
    Ok(LayoutOptions {
        cluster_size: arguments.cluster_size,
        level: arguments.level,
        large_window: arguments.large_window,
    })
}

/// Writes the file to standard output, from its start.
fn stream(file: &FormatFile, quiet: bool) -> Result<()> {
    let failed = |e| Error::from_io("cannot write to standard output", e);
    let mut output = std::io::stdout().lock();
    if output.is_terminal() {
        return Err(Error::new(ErrorKind::Malformed, "will not write an image to a terminal"));
    }
    if let FormatFile::Compressed(file) = file
        && !file.is_streamable()
    {
        let what = "a compressed qcow2 cannot be written to standard output, because its header tells where its \
                    tables are, which is known at its end; write it to a file";
        return Err(Error::unsupported(what));
    }
    let file = file.virtual_file();
    let progress = Board::new(quiet).add("standard output", file.file_size());
    let mut buffer = vec![0; STREAM_BUFFER];
    let mut at = FileOffset(0);
    loop {
        match file.read_at(at, &mut buffer)? {
            0 => break,
            read => {
                output.write_all(&buffer[..read]).map_err(failed)?;
                at += read as u64;
                progress.add(read as u64);
            }
        }
    }
    output.flush().map_err(failed)?;
    progress.finish();
    Ok(())
}

/// The process's umask, for a file that was made private first.
fn current_umask() -> u32 {
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    nix::sys::stat::umask(mask);
    mask.bits()
}
