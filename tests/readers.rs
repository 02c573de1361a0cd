//! The readers of VHD, VMDK and VDI against images made by qemu-img, by ourselves and by others.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use freightfs::format::ImageFormat;
use support::hostile;
use support::images::{self, Random};
use support::{command, fail, freightfs, qemu_compare, sh, skip, succeed};

/// (qemu-img's driver, extension, options)
const KINDS: [(&str, &str, &[&str]); 9] = [
    ("vpc", "vhd", &[]),
    ("vpc", "vhd", &["-o", "force_size=on"]),
    ("vpc", "vhd", &["-o", "subformat=fixed,force_size=on"]),
    ("vdi", "vdi", &[]),
    ("vdi", "vdi", &["-o", "static=on"]),
    ("vmdk", "vmdk", &[]),
    ("vmdk", "vmdk", &["-o", "zeroed_grain=on"]),
    ("vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
    ("vmdk", "vmdk", &["-o", "compat6"]),
];

/// Makes an image of a raw one.
fn make(raw: &Path, name: &str, driver: &str, options: &[&str]) -> PathBuf {
    let path = raw.with_file_name(name);
    succeed(
        command("qemu-img").args(["convert", "-f", "raw", "-O", driver]).args(options).arg(raw).arg(&path),
    );
    path
}

/// What the program under test reads is what qemu-img reads.
fn check(image: &Path, driver: &str) {
    let output = image.with_extension("converted.raw");
    succeed(freightfs().args(["convert", "--quiet"]).arg(image).arg(&output));
    qemu_compare(image, driver, &output, "raw");
    let size = |path: &Path, driver: &str| {
        let info = succeed(command("qemu-img").args(["info", "--output=json", "-f", driver]).arg(path));
        serde_json::from_str::<serde_json::Value>(&info).unwrap()["virtual-size"].as_u64().unwrap()
    };
    assert_eq!(size(image, driver), size(&output, "raw"), "{}", image.display());
    std::fs::remove_file(output).unwrap();
}

#[test]
fn every_kind_is_read_as_qemu_reads_it() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for (index, (driver, extension, options)) in KINDS.iter().enumerate() {
        println!("{driver} {options:?}");
        check(&make(&raw, &format!("{index}.{extension}"), driver, options), driver);
    }
}

#[test]
fn what_we_write_we_read() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for (name, driver) in
        [("a.vhd", "vpc"), ("b.fixed.vhd", "vpc"), ("c.vmdk", "vmdk"), ("d.vdi", "vdi"), ("e.qcow2", "qcow2")]
    {
        let image = directory.path().join(name);
        succeed(freightfs().args(["convert", "--quiet"]).arg(&raw).arg(&image));
        check(&image, driver);
    }
}

/// A small image as bytes, and its disk.
fn small(driver: &str, options: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("small.raw");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(300 * 1024).unwrap();
    file.write_all_at(&Random(1).bytes(50_000), 3000).unwrap();
    file.write_all_at(&[b'a'; 60_000], 100_000).unwrap();
    let image = make(&raw, "small", driver, options);
    (std::fs::read(image).unwrap(), std::fs::read(raw).unwrap())
}

#[test]
fn hostile_bytes_and_truncation_give_errors_or_content_and_never_panic() {
    for (driver, _, options) in KINDS {
        if driver == "vpc" && !options.iter().any(|o| o.contains("force_size")) {
            // The default's size is the geometry's, so that content and size are not the raw image's.
            continue;
        }
        let format = ImageFormat::from_name(driver).unwrap();
        let (image, raw) = small(driver, options);
        assert!(hostile::read_all(format, image.clone()).unwrap() == raw, "{driver} {options:?}");
        hostile::damage(format, &image, 30_000);
        let mut errors = 0;
        let step = image.len() / 300 + 1;
        for length in (0..image.len()).step_by(step) {
            match hostile::read_all(format, image[..length].to_vec()) {
                Ok(content) => {
                    assert!(content == raw, "{driver} {options:?}: wrong content at length {length}")
                }
                Err(_) => errors += 1,
            }
        }
        assert!(errors > 20, "{driver} {options:?}: {errors} errors");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let flat = make(&raw, "flat.vmdk", "vmdk", &["-o", "subformat=monolithicFlat"]);
    assert!(fail(freightfs().arg("info").arg(&flat)).contains("names other files"));
    let base = make(&raw, "base.vmdk", "vmdk", &[]);
    let child = directory.path().join("child.vmdk");
    succeed(
        command("qemu-img").args(["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b"]).arg(base).arg(&child),
    );
    assert!(fail(freightfs().arg("info").arg(&child)).contains("parent"));
    let vhd = make(&raw, "a.vhd", "vpc", &[]);
    let mut bytes = std::fs::read(&vhd).unwrap();
    let type_at = bytes.len() - 512 + 63;
    bytes[type_at] = 4;
    std::fs::write(&vhd, &bytes).unwrap();
    // The last footer's checksum is wrong now; its copy at the start still says what the disk is.
    succeed(freightfs().arg("info").arg(&vhd));
    bytes[63] = 4;
    std::fs::write(&vhd, &bytes).unwrap();
    assert!(fail(freightfs().arg("info").arg(&vhd)).contains("checksum"));
}

#[test]
fn samples_of_others_have_the_size_and_content_that_qemu_gives_them() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/samples");
    if !samples.is_dir() {
        return skip("the sample images are not here");
    }
    let directory = tempfile::tempdir().unwrap();
    let unpack = |name: &str| {
        let path = directory.path().join(name);
        sh(&format!("bzip2 -dc {}/{name}.bz2 > {}", samples.display(), path.display()));
        path
    };
    // 127 GiB without a block, of the size that its geometry says: too large to compare byte by byte.
    let info = succeed(freightfs().args(["info", "--json"]).arg(unpack("virtualpc-dynamic.vhd")));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["virtual_size"], &info["allocated_size"]), (&136_363_130_880u64.into(), &0.into()));
    check(&unpack("iotest-version3.vmdk"), "vmdk");
    let (vmdk, qcow2) = (unpack("dfvfs-ext2.vmdk"), unpack("dfvfs-ext2.qcow2"));
    check(&vmdk, "vmdk");
    qemu_compare(&vmdk, "vmdk", &qcow2, "qcow2");
    fail(freightfs().args(["info", "--input-format", "vhd"]).arg(unpack("afl5.img")));
}
