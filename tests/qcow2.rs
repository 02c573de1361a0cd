//! The qcow2 reader against images made by qemu-img and qemu-io.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};

use freightfs::format::ImageFormat;
use support::hostile;
use support::images::{self, Random};
use support::{command, fail, freightfs, qemu_compare, succeed};

/// Converts with the program under test; every listed file may be referred to.
fn convert(input: &Path, output: &Path, allowed: &[PathBuf]) {
    let mut command = freightfs();
    command.arg("convert").arg(input).arg(output).arg("--quiet");
    for file in allowed {
        command.arg("--allow-reference").arg(file);
    }
    succeed(&mut command);
}

fn check(image: &Path, allowed: &[PathBuf]) {
    let output = image.with_extension("converted.raw");
    convert(image, &output, allowed);
    qemu_compare(image, "qcow2", &output, "raw");
    std::fs::remove_file(output).unwrap();
}

#[test]
fn every_kind_of_cluster_is_read_as_qemu_reads_it() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let kinds: [&[&str]; 17] = [
        &["-o", "compat=0.10"],
        &["-o", "compat=1.1"],
        &["-c", "-o", "compat=0.10"],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "extended_l2=on"],
        &["-c", "-o", "extended_l2=on"],
        &["-o", "extended_l2=on,cluster_size=16k"],
        &["-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=512"],
        &["-o", "cluster_size=4k"],
        &["-c", "-o", "cluster_size=4k,compression_type=zstd"],
        &["-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=2M,compression_type=zstd"],
        &["-o", "preallocation=metadata"],
        &["-o", "lazy_refcounts=on,refcount_bits=1"],
    ];
    for (index, options) in kinds.iter().enumerate() {
        println!("{options:?}");
        check(&images::qcow2(&raw, &format!("{index}.qcow2"), options), &[]);
    }
}

#[test]
fn zero_clusters_discards_and_snapshots_are_read_as_qemu_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for (name, options) in [("plain.qcow2", "cluster_size=64k"), ("extended.qcow2", "extended_l2=on")] {
        let image = images::qcow2(&raw, name, &["-o", options]);
        images::qemu_io(
            &image,
            &["write -z 3M 300k", "write -z -u 4000k 8k", "discard 10M 64k", "write -P 3 20M 5k"],
        );
        succeed(command("qemu-img").args(["snapshot", "-c", "one"]).arg(&image));
        images::qemu_io(&image, &["write -P 4 0 100k"]);
        check(&image, &[]);
    }
}

#[test]
fn backing_chains_of_other_sizes_and_clusters_are_read_as_qemu_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let base = images::qcow2(&raw, "base.qcow2", &["-c"]);
    let layer = |name: &str, over: &str, options: &str, size: &str| {
        let path = directory.path().join(name);
        let mut create = command("qemu-img");
        create
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", over, "-o", options])
            .arg(&path)
            .arg(size);
        succeed(&mut create);
        path
    };
    let larger = layer("larger.qcow2", "base.qcow2", "cluster_size=64k", "60M");
    images::qemu_io(
        &larger,
        &["write -P 7 1M 100k", "write -z 3M 200k", "write -z -u 4M 64k", "write -P 9 55M 1M"],
    );
    let smaller = layer("smaller.qcow2", "larger.qcow2", "cluster_size=4k", "33M");
    images::qemu_io(&smaller, &["write -P 5 31M 10k"]);
    let top = layer("top.qcow2", "smaller.qcow2", "extended_l2=on,cluster_size=128k", "50M");
    images::qemu_io(&top, &["write -P 5 1k 3k", "write -z 30M 33k", "write -P 6 40M 1"]);
    for image in [&larger, &smaller, &top] {
        check(image, &[base.clone(), larger.clone(), smaller.clone()]);
    }
    let said = fail(freightfs().arg("convert").arg(&top).arg(directory.path().join("x.raw")));
    assert!(said.contains("smaller.qcow2") && said.contains("--allow-reference"), "{said}");
    let loops = layer("loop.qcow2", "base.qcow2", "cluster_size=64k", "1M");
    succeed(
        command("qemu-img")
            .args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "loop.qcow2"])
            .arg(&loops),
    );
    let said = fail(freightfs().arg("info").arg(&loops).arg("--allow-reference").arg(&loops));
    assert!(said.contains("loops"), "{said}");
}

#[test]
fn external_data_files_are_read_through_the_gate() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    for (name, options) in [("own", "data_file=own.data"), ("raw", "data_file=raw.data,data_file_raw=on")] {
        let options = options.replace("data_file=", &format!("data_file={}/", directory.path().display()));
        let image = images::qcow2(&raw, &format!("{name}.qcow2"), &["-o", &options]);
        let data = directory.path().join(format!("{name}.data"));
        check(&image, &[data]);
        let said = fail(freightfs().arg("info").arg(&image));
        assert!(said.contains("external data file") && said.contains("not among"), "{said}");
    }
}

/// Data is never reported as a hole: qemu-img's own map, entry by entry.
#[test]
fn extents_agree_with_the_map_of_qemu_img() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let image = images::qcow2(&raw, "a.qcow2", &["-o", "cluster_size=4k"]);
    images::qemu_io(&image, &["write -z 3M 300k", "discard 10M 64k"]);
    let map = succeed(command("qemu-img").args(["map", "--output=json", "-f", "qcow2"]).arg(&image));
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let opened = open(&image).unwrap();
    let mut data = 0;
    for entry in map {
        let (start, length) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        let mut at = start;
        while at < (start + length).min(opened.virtual_size()) {
            let extent =
                opened.extent_at(freightfs::units::VirtualOffset(at), opened.virtual_size() - at).unwrap();
            assert_eq!(extent.kind.is_data(), entry["data"] == true, "at {at}: {entry}");
            at += extent.length;
            data += if extent.kind.is_data() { extent.length } else { 0 };
        }
    }
    assert!(data > 700_000);
}

fn open(path: &Path) -> freightfs::error::Result<std::sync::Arc<dyn freightfs::image::DiskImage>> {
    hostile::open(ImageFormat::Qcow2, std::sync::Arc::new(freightfs::storage::FileStorage::open(path)?))
}

fn read_all(bytes: Vec<u8>) -> freightfs::error::Result<Vec<u8>> {
    hostile::read_all(ImageFormat::Qcow2, bytes)
}

/// A small image with every kind of cluster, as bytes.
fn small(options: &[&str]) -> (Vec<u8>, Vec<u8>) {
    use std::os::unix::fs::FileExt;
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("small.raw");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(300 * 1024).unwrap();
    file.write_all_at(&Random(1).bytes(50_000), 3000).unwrap();
    file.write_all_at(&[b'a'; 60_000], 100_000).unwrap();
    file.write_all_at(&Random(2).bytes(1000), 299 * 1024).unwrap();
    let image = images::qcow2(&raw, "small.qcow2", options);
    (std::fs::read(image).unwrap(), std::fs::read(raw).unwrap())
}

#[test]
fn hostile_bytes_give_errors_or_content_and_never_panic() {
    for options in [
        &["-o", "cluster_size=4k"][..],
        &["-c", "-o", "cluster_size=4k"],
        &["-o", "extended_l2=on,cluster_size=16k"],
    ] {
        let (image, raw) = small(options);
        assert!(read_all(image.clone()).unwrap() == raw);
        hostile::damage(ImageFormat::Qcow2, &image, 0..40_000);
    }
}

#[test]
fn truncation_is_an_error_or_costs_nothing() {
    for options in [&["-o", "cluster_size=4k"][..], &["-c", "-o", "cluster_size=4k"]] {
        let (image, raw) = small(options);
        let mut errors = 0;
        for length in (0..image.len()).step_by(97).chain([image.len() - 1]) {
            match read_all(image[..length].to_vec()) {
                Ok(content) => assert!(content == raw, "wrong content at length {length}"),
                Err(_) => errors += 1,
            }
        }
        assert!(errors > image.len() / 97 / 2);
    }
}

#[test]
fn what_must_not_be_read_is_refused_by_name() {
    let (image, _) = small(&["-o", "cluster_size=4k"]);
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = image.clone();
        change(&mut image);
        read_all(image).unwrap_err()
    };
    let put = |at: usize, bytes: &[u8]| {
        let bytes = bytes.to_vec();
        move |image: &mut Vec<u8>| image[at..at + bytes.len()].copy_from_slice(&bytes)
    };
    use freightfs::error::ErrorKind;
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let cases: [(Change<'_>, ErrorKind, &str); 10] = [
        (&put(0, b"QED\0"), ErrorKind::Unsupported, "QED"),
        (&put(0, b"abcd"), ErrorKind::CorruptImage, "magic"),
        (&put(4, &1u32.to_be_bytes()), ErrorKind::Unsupported, "version 1"),
        (&put(4, &4u32.to_be_bytes()), ErrorKind::Unsupported, "version 4"),
        (&put(32, &2u32.to_be_bytes()), ErrorKind::Encrypted, "LUKS"),
        (&put(79, &[1]), ErrorKind::CorruptImage, "dirty"),
        (&put(79, &[2]), ErrorKind::CorruptImage, "corrupt"),
        (&put(72, &(1u64 << 50).to_be_bytes()), ErrorKind::Unsupported, "bit 50"),
        (&put(79, &[8]), ErrorKind::CorruptImage, "compression type"),
        (&put(36, &u32::MAX.to_be_bytes()), ErrorKind::CorruptImage, "L1 table"),
    ];
    for (change, kind, word) in cases {
        let error = refused(change);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.report().contains(word), "{error} does not say {word}");
    }
}

#[test]
fn samples_of_others_are_read_or_refused_for_their_reason() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/samples");
    if !samples.is_dir() {
        return support::skip("the sample images are not here");
    }
    let directory = tempfile::tempdir().unwrap();
    let unpack = |name: &str| {
        let path = directory.path().join(name);
        support::sh(&format!("bzip2 -dc {}/{name}.bz2 > {}", samples.display(), path.display()));
        path
    };
    check(&unpack("dfvfs-ext2.qcow2"), &[]);
    let said = fail(freightfs().arg("info").arg(unpack("cirros-snapshot1.qcow2")));
    assert!(said.contains("backing file") && said.contains("not among the files allowed"), "{said}");
}
