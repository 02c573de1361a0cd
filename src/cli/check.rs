//! `freightfs check`: the dry run. Whether an image of a mount may be exported, in which formats, and why not.

use std::path::Path;

use serde::Deserialize;

use super::document::read_document;
use super::terminal::say;
use super::{CheckArguments, FAILED, OK, complain};
use crate::error::{Error, ErrorKind, Result};
use crate::export::StatusError;
use crate::units::human_bytes;

/// Largest image.json that is read, in bytes. One has some KiB, and 16 MiB with some ten thousand disks.
const MAX_IMAGE: u64 = 16 << 20;

/// What is read of image.json.
#[derive(Deserialize)]
struct Image {
    id: String,
    policy: String,
    error: Option<StatusError>,
    disks: Vec<Disk>,
}

#[derive(Deserialize)]
struct Disk {
    name: String,
    error: Option<StatusError>,
    formats: Vec<Format>,
}

#[derive(Deserialize)]
struct Format {
    file: String,
    size: Option<u64>,
    largest_size: Option<u64>,
    exportable: bool,
    error: Option<StatusError>,
}

pub(super) fn run(arguments: &CheckArguments) -> Result<u8> {
    let mut code = OK;
    for path in &arguments.paths {
        match check(path) {
            Ok(true) => {}
            Ok(false) => code = FAILED,
            Err(error) => {
                complain(&error);
                code = FAILED;
            }
        }
    }
    Ok(code)
}

/// Prints the verdict on an image's directory, or on one of its files; says whether it is good: of a directory, whether
/// every disk can be exported in some format.
fn check(path: &Path) -> Result<bool> {
    let place = path.display().to_string();
    let absolute = std::path::absolute(path)
        .map_err(|e| Error::from_io("cannot resolve the path", e).in_file(&place))?;
    let wanted =
        (!absolute.is_dir()).then(|| absolute.file_name().unwrap_or_default().to_string_lossy().into_owned());
    let directory = if wanted.is_some() { absolute.parent().map(Path::to_owned) } else { Some(absolute) };
    let document = directory.map(|d| d.join("image.json")).filter(|d| d.is_file());
    let missing = || Error::new(ErrorKind::NotFound, "this is no image of a freightfs mount").in_file(&place);
    let image: Image = read_document(&document.ok_or_else(missing)?, "description of an image", MAX_IMAGE)?;
    if let Some(error) = &image.error {
        say(format_args!("{}: no: {}", image.id, reason(error)));
        return Ok(false);
    }
    let mut good = !image.disks.is_empty();
    let mut seen = false;
    for disk in &image.disks {
        if let Some(error) = disk.error.as_ref().filter(|_| wanted.is_none()) {
            say(format_args!("{}: no: {}", disk.name, reason(error)));
        }
        let formats = disk.formats.iter().filter(|f| wanted.as_ref().is_none_or(|wanted| *wanted == f.file));
        let mut exportable = false;
        for format in formats {
            seen = true;
            exportable |= format.exportable;
            say(line(format, &image.policy));
        }
        good &= exportable || wanted.is_some();
        if let Some(wanted) = &wanted
            && disk.formats.iter().any(|f| f.file == *wanted)
        {
            return Ok(exportable);
        }
    }
    if !seen && wanted.is_some() {
        return Err(Error::new(ErrorKind::NotFound, "the mount offers no such file").in_file(place));
    }
    Ok(good)
}

fn line(format: &Format, policy: &str) -> String {
    let size = match (format.size, format.largest_size) {
        (Some(size), _) => human_bytes(size),
        (None, Some(largest)) => format!("at most {}", human_bytes(largest)),
        (None, None) => "-".to_owned(),
    };
    match &format.error {
        None => format!("{:32} yes  {size} (policy {policy})", format.file),
        Some(error) => format!("{:32} no   {}", format.file, reason(error)),
    }
}

fn reason(error: &StatusError) -> String {
    let cloud = error.cloud_code.as_ref().map(|code| format!(", {code}")).unwrap_or_default();
    format!("{}{cloud}: {}", error.code, error.description)
}
