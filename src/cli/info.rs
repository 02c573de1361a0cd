//! `freightfs info`: what an image file is.

use std::fmt::Write;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::convert::open_source;
use super::{InfoArguments, OK};
use crate::catalog::OpenDisk;
use crate::error::{Error, Result};
use crate::format::OutputFormat;
use crate::image::{ImageDescription, allocation_map};
use crate::layout::LayoutOptions;
use crate::units::{KIB, SECTOR, human_bytes};

/// The granularity at which allocation is counted: the smallest that a guest's filesystem usually has.
const ALLOCATION_UNIT: u64 = 64 * KIB;

/// Columns of a property's name.
const WIDTH: usize = 20;

#[derive(Serialize)]
struct Info {
    #[serde(flatten)]
    description: ImageDescription,
    /// Bytes that the image file takes on its filesystem.
    disk_size: u64,
    /// Bytes of the guest's disk that hold data, in units of 64 KiB.
    allocated_size: u64,
    /// What the image would be in each format.
    outputs: Vec<Output>,
}

#[derive(Serialize)]
struct Output {
    format: &'static str,
    /// Bytes of the file, when they are known without compressing it.
    size: Option<u64>,
    /// Bytes that a compressed file has at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    largest_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

pub(super) fn run(arguments: &InfoArguments) -> Result<u8> {
    let disk = open_source(&arguments.image, &arguments.source, LayoutOptions::default())?;
    let metadata = std::fs::metadata(&arguments.image);
    let metadata = metadata.map_err(|e| {
        Error::from_io("cannot look at the image", e).in_file(arguments.image.display().to_string())
    })?;
    let info = Info {
        disk_size: metadata.blocks() * SECTOR,
        description: disk.image().description(),
        allocated_size: allocated_size(&disk)?,
        outputs: OutputFormat::ALL.into_iter().map(|format| output(&disk, format)).collect(),
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&info).expect("the document has only string keys"));
    } else {
        print!("{}", text(&info));
    }
    Ok(OK)
}

fn allocated_size(disk: &OpenDisk) -> Result<u64> {
    let map = allocation_map(&**disk.image(), ALLOCATION_UNIT)?;
    Ok((map.allocated() * ALLOCATION_UNIT).min(disk.image().virtual_size()))
}

fn output(disk: &OpenDisk, format: OutputFormat) -> Output {
    let mut output = Output { format: format.suffix(), size: None, largest_size: None, refused: None };
    match disk.file(format).map(|file| file.virtual_file()) {
        Ok(file) => {
            output.size = file.known_size();
            output.largest_size = output.size.is_none().then(|| file.file_size());
        }
        Err(error) => output.refused = Some(error.report()),
    }
    output
}

fn text(info: &Info) -> String {
    let mut text = String::new();
    describe(&mut text, &info.description, "");
    let _ = writeln!(text, "{:<WIDTH$}{}", "disk size:", sized(info.disk_size));
    let _ = writeln!(text, "{:<WIDTH$}{}", "allocated:", sized(info.allocated_size));
    let _ = writeln!(text, "\nas a file of the mount:");
    for output in &info.outputs {
        let value = match (output.size, output.largest_size, &output.refused) {
            (Some(size), ..) => sized(size),
            (_, Some(largest), _) => format!("compressed, at most {}", human_bytes(largest)),
            (.., refused) => format!("refused: {}", refused.as_deref().unwrap_or("")),
        };
        let _ = writeln!(text, "  .{:<17}{value}", output.format);
    }
    text
}

fn describe(text: &mut String, image: &ImageDescription, indent: &str) {
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{indent}{:<WIDTH$}{value}", format!("{name}:"));
    };
    line("image", image.file.clone());
    line("file format", image.format.name().to_owned());
    line("virtual size", sized(image.virtual_size));
    line("file size", sized(image.file_size));
    if let Some(cluster) = image.cluster_size {
        line("cluster size", cluster.to_string());
    }
    for (name, value) in &image.properties {
        line(name, value.clone());
    }
    if let Some(backing) = &image.backing {
        line("backing file", String::new());
        describe(text, backing, &format!("{indent}  "));
    }
}

fn sized(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_bytes(bytes))
}
