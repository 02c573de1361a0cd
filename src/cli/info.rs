//! `freightfs info`: what an image file is.

use std::fmt::Write;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::source::{NamedImage, open_source};
use super::terminal::{plain, say, say_json};
use super::{InfoArguments, OK};
use crate::catalog::OpenDisk;
use crate::error::{Error, Result};
use crate::extent::AllocationMap;
use crate::format::OutputFormat;
use crate::image::{Cancel, ImageDescription, allocation_map};
use crate::layout::LayoutOptions;
use crate::units::{KIB, SECTOR, human_bytes};

/// The granularity at which allocation is counted: the smallest that a guest's filesystem usually has.
const ALLOCATION_UNIT: u64 = 64 * KIB;

/// Signs of the map.
const MAP_COLUMNS: u64 = 64;
const MAP_ROWS: u64 = 4;

/// Columns of a property's name.
const WIDTH: usize = 20;

#[derive(Serialize)]
struct Info {
    #[serde(flatten)]
    description: ImageDescription,
    /// Bytes that the image file takes on its filesystem, or those of an object.
    disk_size: u64,
    /// Bytes of the guest's disk that hold data, in units of 64 KiB.
    allocated_size: u64,
    /// What the image would be in each format.
    outputs: Vec<Output>,
    /// Where the data is, for people.
    #[serde(skip)]
    map: String,
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
    let NamedImage { disk, file } =
        open_source(&arguments.image, &arguments.source, LayoutOptions::default())?;
    let disk_size = match file {
        Some(file) => {
            let metadata = std::fs::metadata(&file);
            let failed =
                |e| Error::from_io("cannot look at the image", e).in_file(file.display().to_string());
            metadata.map_err(failed)?.blocks() * SECTOR
        }
        None => disk.image().description().file_size,
    };
    let map = allocation_map(&**disk.image(), ALLOCATION_UNIT, &Cancel::default())?;
    let info = Info {
        disk_size,
        description: disk.image().description().without_secrets(),
        allocated_size: (map.allocated() * ALLOCATION_UNIT).min(disk.image().virtual_size()),
        outputs: OutputFormat::ALL.into_iter().map(|format| output(&disk, format)).collect(),
        map: drawn(&map, shades()),
    };
    if arguments.json {
        say_json(&info);
    } else {
        text(&info).lines().for_each(say);
    }
    Ok(OK)
}

/// Signs for no data, then for up to a quarter, a half, three quarters and all of it.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];

/// The same where the terminal has no others.
const PLAIN_SHADES: [char; 5] = ['.', ':', '+', 'x', '#'];

/// By the locale's character set, as setlocale(3) finds it.
fn shades() -> [char; 5] {
    let locale =
        ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|n| std::env::var(n).ok().filter(|v| !v.is_empty()));
    let locale = locale.unwrap_or_default().to_ascii_lowercase();
    if locale.contains("utf-8") || locale.contains("utf8") { SHADES } else { PLAIN_SHADES }
}

/// The disk from its start to its end in at most [`MAP_COLUMNS`] × [`MAP_ROWS`] signs.
fn drawn(map: &AllocationMap, shades: [char; 5]) -> String {
    let cells = map.units().min(MAP_COLUMNS * MAP_ROWS);
    let mut text = String::new();
    for cell in 0..cells {
        if cell % MAP_COLUMNS == 0 {
            text.push_str(if cell == 0 { "  " } else { "\n  " });
        }
        let place = |cell: u64| (u128::from(cell) * u128::from(map.units()) / u128::from(cells)) as u64;
        let (start, end) = (place(cell), place(cell + 1));
        let allocated = map.rank(end) - map.rank(start);
        text.push(shades[(allocated * 4).div_ceil(end - start) as usize]);
    }
    text
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
    if !info.map.is_empty() {
        let _ = writeln!(
            text,
            "\nwhere the data is, {} to a sign:",
            human_bytes(info.description.virtual_size.div_ceil(MAP_COLUMNS * MAP_ROWS).max(ALLOCATION_UNIT))
        );
        let _ = writeln!(text, "{}", info.map);
    }
    let _ = writeln!(text, "\nas a file of the mount:");
    for output in &info.outputs {
        let value = match (output.size, output.largest_size, &output.refused) {
            (Some(size), ..) => sized(size),
            (_, Some(largest), _) => format!("compressed, at most {}", human_bytes(largest)),
            (.., refused) => format!("refused: {}", plain(refused.as_deref().unwrap_or(""))),
        };
        let _ = writeln!(text, "  .{:<17}{value}", output.format);
    }
    text
}

fn describe(text: &mut String, image: &ImageDescription, indent: &str) {
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{indent}{:<WIDTH$}{}", format!("{name}:"), plain(value));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::VirtualOffset;

    #[test]
    fn the_map_shows_where_data_is() {
        let mut map = AllocationMap::builder(1024 * 64 * KIB, ALLOCATION_UNIT);
        // The first cell in part, the second wholly, and the last.
        map.mark(VirtualOffset(0), 64 * KIB).unwrap();
        map.mark(VirtualOffset(4 * 64 * KIB), 4 * 64 * KIB).unwrap();
        map.mark(VirtualOffset(1021 * 64 * KIB), 3 * 64 * KIB).unwrap();
        let drawn = drawn(&map.finish().unwrap(), PLAIN_SHADES);
        let rows: Vec<_> = drawn.lines().map(str::trim).collect();
        assert_eq!(rows.iter().map(|row| row.len()).collect::<Vec<_>>(), [64; 4]);
        assert!(rows[0].starts_with(":#..") && rows[3].ends_with("..x"), "{drawn}");
        assert_eq!(drawn.matches(['.', ':', '+', 'x', '#']).count(), 256);
        let small = AllocationMap::builder(3 * 64 * KIB, ALLOCATION_UNIT).finish().unwrap();
        assert_eq!(super::drawn(&small, PLAIN_SHADES), "  ...");
    }
}
