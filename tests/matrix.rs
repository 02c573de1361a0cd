//! Every reader against every layout, judged by programs and libraries that nobody here wrote.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};

use freightfs::format::OutputFormat;
use support::{check, command, freightfs, images, succeed};

/// (file name, qemu-img's driver, options) of sources that qemu-img makes.
const QEMU_SOURCES: [(&str, &str, &[&str]); 13] = [
    ("plain.qcow2", "qcow2", &[]),
    ("old.qcow2", "qcow2", &["-o", "compat=0.10"]),
    ("zlib.qcow2", "qcow2", &["-c"]),
    ("zstd.qcow2", "qcow2", &["-c", "-o", "compression_type=zstd"]),
    ("small.qcow2", "qcow2", &["-o", "cluster_size=512"]),
    ("extended.qcow2", "qcow2", &["-o", "extended_l2=on,cluster_size=128k"]),
    ("dynamic.vhd", "vpc", &["-o", "force_size=on"]),
    ("fixed.vhd", "vpc", &["-o", "subformat=fixed,force_size=on"]),
    ("sparse.vmdk", "vmdk", &[]),
    ("stream.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
    ("dynamic.vhdx", "vhdx", &[]),
    ("fixed.vhdx", "vhdx", &["-o", "subformat=fixed,block_size=1M"]),
    ("dynamic.vdi", "vdi", &[]),
];

/// Sources that only we write.
const OWN_SOURCES: [&str; 4] = ["own.zvhd", "own.zvhd2", "own.stream.vmdk", "own.zlib.qcow2"];

fn convert(source: &Path, directory: &Path, format: OutputFormat) -> PathBuf {
    let image = directory.join(format!("out.{}", format.suffix()));
    succeed(freightfs().args(["convert", "--quiet"]).arg(source).arg(&image));
    image
}

#[test]
fn every_layout_is_read_by_every_independent_reader() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for format in OutputFormat::ALL {
        let image = convert(&raw, directory.path(), format);
        check::content(format, &image, &raw, "raw");
        check::independent_readers(format, &image, &raw);
        check::deterministic(&raw, &image, &["--format", format.suffix(), "--threads", "1"]);
        std::fs::remove_file(image).unwrap();
    }
}

#[test]
fn every_reader_goes_to_every_layout() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let mut sources = Vec::new();
    for (name, driver, options) in QEMU_SOURCES {
        let source = directory.path().join(name);
        let mut convert = command("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", driver]).args(options).arg(&raw).arg(&source);
        succeed(&mut convert);
        sources.push(source);
    }
    for name in OWN_SOURCES {
        let source = directory.path().join(name);
        succeed(freightfs().args(["convert", "--quiet"]).arg(&raw).arg(&source));
        sources.push(source);
    }
    for source in sources {
        for format in OutputFormat::ALL {
            println!("{} to .{}", source.display(), format.suffix());
            let image = convert(&source, directory.path(), format);
            check::content(format, &image, &raw, "raw");
            std::fs::remove_file(image).unwrap();
        }
    }
}

#[test]
fn cluster_sizes_and_levels_of_qcow2_are_clean() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for size in ["512", "4K", "64K", "2M"] {
        for format in [OutputFormat::Qcow2, OutputFormat::ZlibQcow2, OutputFormat::ZstdQcow2] {
            let image = directory.path().join(format!("{size}.{}", format.suffix()));
            let options = ["--cluster-size", size];
            succeed(freightfs().args(["convert", "--quiet"]).args(options).arg(&raw).arg(&image));
            check::content(format, &image, &raw, "raw");
            check::deterministic(&raw, &image, &[&["--format", format.suffix()], &options[..]].concat());
        }
    }
    let options: [&[&str]; 3] = [&["--level", "1"], &["--level", "9"], &["--large-window", "--level", "12"]];
    let sizes = options.map(|options| {
        let image = directory.path().join("level.zlib.qcow2");
        succeed(freightfs().args(["convert", "--quiet"]).args(options).arg(&raw).arg(&image));
        check::content(OutputFormat::ZlibQcow2, &image, &raw, "raw");
        image.metadata().unwrap().len()
    });
    assert!(sizes[0] >= sizes[1] && sizes[1] >= sizes[2]);
}

#[test]
fn a_stream_is_the_file_and_what_cannot_stream_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for format in OutputFormat::ALL {
        let name = format!("odd.{}", format.suffix());
        let line = format!(
            "cd {} && {} convert --quiet --format {} odd.raw - > streamed",
            directory.path().display(),
            env!("CARGO_BIN_EXE_freightfs"),
            format.suffix()
        );
        if matches!(format, OutputFormat::ZlibQcow2 | OutputFormat::ZstdQcow2) {
            let said = support::fail(command("bash").args(["-c", &line]));
            assert!(said.contains("standard output"), "{said}");
            continue;
        }
        support::sh(&line);
        let image = directory.path().join(name);
        if format != OutputFormat::Raw {
            succeed(freightfs().args(["convert", "--quiet"]).arg(&raw).arg(&image));
        }
        support::assert_same(&directory.path().join("streamed"), &image);
    }
    let said = support::fail(freightfs().args(["convert", "--level", "3"]).arg(&raw).arg("x.vhd"));
    assert!(said.contains("--level means nothing for .vhd"), "{said}");
    let said =
        support::fail(freightfs().args(["convert", "--cluster-size", "5000"]).arg(&raw).arg("x.qcow2"));
    assert!(said.contains("power of two"), "{said}");
    let said = support::fail(freightfs().arg("convert").arg(&raw).arg("-"));
    assert!(said.contains("--format"), "{said}");
}
