//! The readers of VHD, VHDX, VMDK, VDI and ZVHD against images made by qemu-img, by ourselves and by others.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freightfs::error::{Error, ErrorKind, Result};
use freightfs::extent::Extent;
use freightfs::format::{ImageFormat, OutputFormat};
use freightfs::image::check_complete;
use freightfs::storage::{Generation, MemoryStorage, Storage};
use freightfs::units::{FileOffset, VirtualOffset};
use support::hostile;
use support::images::{self, Random};
use support::mount::World;
use support::{command, fail, freightfs, qemu_compare, sh, skip, succeed};

/// (qemu-img's driver, extension, options)
const KINDS: [(&str, &str, &[&str]); 11] = [
    ("vhdx", "vhdx", &[]),
    ("vhdx", "vhdx", &["-o", "subformat=fixed,block_size=1M"]),
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
        // VHDX has its headers, its metadata and its table each in a megabyte of their own; a fixed VHD has only a footer.
        let tables = match format {
            ImageFormat::Vhdx => 0..4 << 20,
            ImageFormat::Vhd if options.iter().any(|o| o.contains("fixed")) => image.len() - 512..image.len(),
            _ => 0..30_000,
        };
        hostile::damage(format, &image, tables);
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
fn hostile_bytes_of_zvhd_give_errors_or_content_and_never_panic() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let expected = std::fs::read(&raw).unwrap();
    for (suffix, format) in [("zvhd", ImageFormat::Zvhd), ("zvhd2", ImageFormat::Zvhd2)] {
        let path = directory.path().join(format!("z.{suffix}"));
        succeed(freightfs().args(["convert", "--quiet"]).arg(&raw).arg(&path));
        let image = std::fs::read(&path).unwrap();
        assert!(hostile::read_all(format, image.clone()).unwrap() == expected[..1 << 20]);
        hostile::damage(format, &image, 0..4096 + 200);
        // Nothing that is cut short passes for whole: the last header counts.
        for length in (0..image.len()).step_by(image.len() / 200) {
            assert!(hostile::read_all(format, image[..length].to_vec()).is_err(), "{suffix} cut at {length}");
        }
    }
}

/// Reads an image that refers to others, first without leave, then with it.
fn check_gated(image: &Path, driver: &str, allowed: &[PathBuf], refusal: &str) {
    let said = fail(freightfs().arg("info").arg(image));
    assert!(said.contains(refusal) && said.contains("--allow-reference"), "{said}");
    let output = image.with_extension("converted.raw");
    let allow = allowed.iter().flat_map(|file| ["--allow-reference".into(), file.clone().into_os_string()]);
    succeed(freightfs().args(["convert", "--quiet"]).args(allow).arg(image).arg(&output));
    qemu_compare(image, driver, &output, "raw");
    std::fs::remove_file(output).unwrap();
}

#[test]
fn vmdk_in_several_files_is_read_through_the_gate() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
    let files = |stem: &str| -> Vec<PathBuf> {
        let names = std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().path());
        names.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with(&format!("{stem}-"))).collect()
    };
    for (name, subformat) in
        [("flat", "monolithicFlat"), ("split", "twoGbMaxExtentSparse"), ("splitflat", "twoGbMaxExtentFlat")]
    {
        let image = make(&raw, &format!("{name}.vmdk"), "vmdk", &["-o", &format!("subformat={subformat}")]);
        check_gated(&image, "vmdk", &files(name), "extent");
    }
    // A disk of several extents: 3 GiB in two files of at most 2 GiB, data on both sides of the border.
    let large = directory.path().join("large.raw");
    let file = std::fs::File::create(&large).unwrap();
    file.set_len((3 << 30) + 512).unwrap();
    file.write_all_at(&Random(8).bytes(8 << 20), (2 << 30) - (4 << 20)).unwrap();
    let image = make(&large, "two.vmdk", "vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]);
    assert_eq!(files("two").len(), 2);
    check_gated(&image, "vmdk", &files("two"), "extent");
    std::fs::OpenOptions::new().write(true).open(&files("flat")[0]).unwrap().set_len(1000).unwrap();
    let said = fail(
        freightfs()
            .arg("info")
            .arg(directory.path().join("flat.vmdk"))
            .arg("--allow-reference")
            .arg(&files("flat")[0]),
    );
    assert!(said.contains("flat-flat.vmdk") && said.contains("cut short"), "{said}");
}

/// Makes a differencing VHD out of a dynamic one, by the specification's offsets alone: every third sector of the
/// blocks it has is its own, the others are the parent's.
fn make_differencing(child: &Path, parent: &Path) {
    let parent_bytes = std::fs::read(parent).unwrap();
    let mut bytes = std::fs::read(child).unwrap();
    let blocks = u32::from_be_bytes(bytes[512 + 28..512 + 32].try_into().unwrap()) as usize;
    for block in 0..blocks {
        let entry = 1536 + 4 * block;
        let sector = u32::from_be_bytes(bytes[entry..entry + 4].try_into().unwrap());
        if sector != u32::MAX {
            for own in 0..4096usize {
                let byte = &mut bytes[sector as usize * 512 + own / 8];
                let bit = 0x80 >> (own % 8);
                *byte = if own % 3 == 0 { *byte | bit } else { *byte & !bit };
            }
        }
    }
    let name: Vec<u8> =
        parent.file_name().unwrap().to_string_lossy().encode_utf16().flat_map(u16::to_be_bytes).collect();
    let header = &mut bytes[512..1536];
    header[40..56].copy_from_slice(&parent_bytes[68..84]);
    header[64..64 + name.len()].copy_from_slice(&name);
    seal(header, 36);
    let last = bytes.len() - 512;
    for footer in [0, last] {
        bytes[footer + 60..footer + 64].copy_from_slice(&4u32.to_be_bytes());
        seal(&mut bytes[footer..footer + 512], 64);
    }
    std::fs::write(child, bytes).unwrap();
}

#[test]
fn a_differencing_vhd_is_read_over_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let base = images::odd(directory.path());
    let over = directory.path().join("over.raw");
    let (mut expected, size) = (std::fs::read(&base).unwrap(), base.metadata().unwrap().len() as usize);
    expected.resize(size.next_multiple_of(512), 0);
    let mut top = vec![0; expected.len()];
    top[5 << 20..9 << 20].copy_from_slice(&Random(11).bytes(4 << 20));
    top[size - 100..size].fill(7);
    std::fs::write(&over, &top).unwrap();
    let options = ["-o", "force_size=on"];
    let parent = make(&base, "parent.vhd", "vpc", &options);
    let child = make(&over, "child.vhd", "vpc", &options);
    let bat = std::fs::read(&child).unwrap();
    make_differencing(&child, &parent);
    for sector in 0..expected.len() / 512 {
        let entry = 1536 + 4 * (sector / 4096);
        let there = bat[entry..entry + 4] != [0xff; 4];
        if there && sector % 4096 % 3 == 0 {
            expected[sector * 512..(sector + 1) * 512]
                .copy_from_slice(&top[sector * 512..(sector + 1) * 512]);
        }
    }
    let output = directory.path().join("out.raw");
    let convert = |allowed: &Path| {
        let mut command = freightfs();
        command.args(["convert", "--quiet", "--allow-reference"]).arg(allowed).arg(&child).arg(&output);
        command
    };
    succeed(&mut convert(&parent));
    assert!(std::fs::read(&output).unwrap() == expected, "the parent's and the own sectors are mixed up");
    let said = fail(freightfs().arg("info").arg(&child));
    assert!(said.contains("parent.vhd") && said.contains("--allow-reference"), "{said}");
    if support::has("vhdiinfo") {
        assert!(succeed(command("vhdiinfo").arg(&child)).contains("Differential"));
    }
    // Another disk under the parent's name.
    std::fs::rename(&over, directory.path().join("parent.raw")).unwrap();
    make(&directory.path().join("parent.raw"), "parent.vhd", "vpc", &options);
    assert!(fail(&mut convert(&parent)).contains("identity differs"));
    std::fs::remove_file(&parent).unwrap();
    assert!(fail(&mut convert(&parent)).contains("which is missing"));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let raw = images::odd(directory.path());
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

/// Puts the checksum into a VHD's footer, or with 36 into its header.
fn seal(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, &b| sum.wrapping_add(b.into()));
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A disk of 40 MiB whose last bytes are data, as GPT's second header is: its geometry stands for 33,280 bytes less.
fn data_at_the_end(directory: &Path) -> PathBuf {
    let raw = directory.join("end.raw");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(40 << 20).unwrap();
    file.write_all_at(&Random(3).bytes(9000), (40 << 20) - 9000).unwrap();
    raw
}

/// A VHD by another creator, with the geometry that the specification gives its disk.
fn created_by(vhd: &[u8], creator: &[u8; 4]) -> Vec<u8> {
    let mut bytes = vhd.to_vec();
    let last = bytes.len() - 512;
    let is_dynamic = bytes[..8] == *b"conectix";
    for footer in [Some(last), is_dynamic.then_some(0)].into_iter().flatten() {
        let footer = &mut bytes[footer..footer + 512];
        footer[28..32].copy_from_slice(creator);
        footer[56..60].copy_from_slice(&[0x04, 0xb3, 4, 17]);
        seal(footer, 64);
    }
    bytes
}

const CREATORS: [&[u8; 4]; 11] =
    [b"wa\0\0", b"vbox", b"vs  ", b"vmwa", b"none", b"win ", b"tap\0", b"d2v ", b"CTXS", b"vpc ", b"qemu"];

#[test]
fn a_vhd_of_every_creator_has_the_size_that_qemu_gives_it() {
    let directory = tempfile::tempdir().unwrap();
    let raw = data_at_the_end(directory.path());
    for (name, subformat) in [("d.vhd", "dynamic"), ("f.vhd", "fixed")] {
        let made = make(&raw, name, "vpc", &["-o", &format!("subformat={subformat},force_size=on")]);
        let bytes = std::fs::read(made).unwrap();
        for creator in CREATORS {
            let image = directory.path().join("patched.vhd");
            std::fs::write(&image, created_by(&bytes, creator)).unwrap();
            check(&image, "vpc");
            let info = succeed(freightfs().args(["info", "--json"]).arg(&image));
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            let by_geometry = [b"vpc ", b"qemu"].contains(&creator);
            let expected = if by_geometry { 1203 * 4 * 17 * 512u64 } else { 40 << 20 };
            assert_eq!(info["virtual_size"], expected, "{creator:?} {subformat}");
        }
    }
}

#[test]
fn a_mount_shows_the_whole_disk_of_a_vhd_by_other_creators() {
    if !support::can_mount() {
        return;
    }
    let world = World::new();
    let raw = data_at_the_end(&world.path("out"));
    let made = make(&raw, "f.vhd", "vpc", &["-o", "subformat=fixed,force_size=on"]);
    let bytes = std::fs::read(made).unwrap();
    for (name, creator) in [("azure", b"wa\0\0"), ("vbox", b"vbox")] {
        std::fs::write(world.catalog().join(format!("{name}.vhd")), created_by(&bytes, creator)).unwrap();
    }
    let mount = world.mount(&["--formats", "raw"]);
    for name in ["azure", "vbox"] {
        support::assert_same(&raw, &mount.path(&format!("images/{name}/{name}.raw")));
    }
    mount.unmount();
}

#[test]
fn a_vhd_whose_footer_and_copy_say_different_disks_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let raw = data_at_the_end(directory.path());
    let made = make(&raw, "d.vhd", "vpc", &["-o", "force_size=on"]);
    let bytes = std::fs::read(made).unwrap();
    // Type, size, the header's place, identity.
    for (at, value) in [(63, 4), (52, 1), (23, 1), (70, 0xff)] {
        let mut changed = bytes.clone();
        changed[at] ^= value;
        seal(&mut changed[..512], 64);
        let error = hostile::read_all(ImageFormat::Vhd, changed).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CorruptImage);
        assert!(error.to_string().contains("its copy disagree"), "{error}");
    }
    // The first sector of a fixed disk is its guest's, who may write a footer there: it never counts.
    let fixed = make(&raw, "f.vhd", "vpc", &["-o", "subformat=fixed,force_size=on"]);
    let mut fixed = std::fs::read(fixed).unwrap();
    let (footer, guests) = (fixed[fixed.len() - 512..].to_vec(), bytes[..512].to_vec());
    fixed[..512].copy_from_slice(&guests);
    assert!(hostile::read_all(ImageFormat::Vhd, fixed.clone()).unwrap()[..512] == guests);
    fixed[..512].copy_from_slice(&footer);
    let cut = fixed.len() - 512;
    fixed.truncate(cut);
    assert!(hostile::read_all(ImageFormat::Vhd, fixed).is_err());
}

#[test]
fn a_vhd_whose_footers_differ_in_a_bit_is_refused_or_the_disk_that_qemu_reads() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("r.raw");
    std::fs::write(&raw, Random(9).bytes(1 << 20)).unwrap();
    let bytes = std::fs::read(make(&raw, "d.vhd", "vpc", &["-o", "force_size=on"])).unwrap();
    let last = bytes.len() - 512;
    let (mut random, mut refused) = (Random(10), 0);
    let (mut convert, mut expected) = (command("qemu-img"), Vec::new());
    convert.args(["convert", "-f", "vpc", "-O", "raw"]);
    for number in 0..90 {
        let mut changed = bytes.clone();
        let (at, bit) = (8 + random.below(78) as usize, 1 << random.below(8));
        let footers = [vec![0], vec![last], vec![0, last]];
        for start in footers[number % 3].clone() {
            let footer = &mut changed[start..start + 512];
            footer[at] ^= bit;
            seal(footer, 64);
        }
        let Ok(image) = hostile::open(ImageFormat::Vhd, Arc::new(MemoryStorage::new("v", changed.clone())))
        else {
            refused += 1;
            continue;
        };
        let mut disk = vec![0; image.virtual_size() as usize];
        image.read_at(VirtualOffset(0), &mut disk).unwrap();
        expected.extend(disk);
        let path = directory.path().join(format!("{number}.vhd"));
        std::fs::write(&path, changed).unwrap();
        convert.arg(path);
    }
    assert!((20..70).contains(&refused), "{refused} of 90 are refused");
    let all = directory.path().join("all.raw");
    succeed(convert.arg(&all));
    assert!(std::fs::read(all).unwrap() == expected, "qemu-img reads other disks");
}

#[test]
fn a_vhd_without_a_footer_at_its_end_is_incomplete() {
    let directory = tempfile::tempdir().unwrap();
    let raw = data_at_the_end(directory.path());
    let complete = |format, bytes: &[u8]| {
        let storage = Arc::new(MemoryStorage::new("k", bytes.to_vec()));
        check_complete(format, storage).map_err(|error| error.kind())
    };
    for subformat in ["fixed", "dynamic"] {
        let options = format!("subformat={subformat},force_size=on");
        let bytes = std::fs::read(make(&raw, "k.vhd", "vpc", &["-o", &options])).unwrap();
        let mut damaged = bytes.clone();
        let last = damaged.len() - 100;
        damaged[last] ^= 1;
        for format in [OutputFormat::Vhd, OutputFormat::FixedVhd] {
            assert_eq!(complete(format, &bytes), Ok(()));
            for part in [&bytes[..bytes.len() / 2], &bytes[..bytes.len() - 512], &bytes[..100], &damaged] {
                assert_eq!(complete(format, part), Err(ErrorKind::Incomplete), "{subformat}");
            }
            assert_eq!(complete(format, b""), Ok(()));
        }
    }
}

#[test]
fn a_check_that_cannot_read_is_no_answer() {
    struct Unreadable(MemoryStorage);
    impl Storage for Unreadable {
        fn name(&self) -> &str {
            "k.qcow2"
        }
        fn file_size(&self) -> u64 {
            self.0.file_size()
        }
        fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
            let failed = std::io::Error::from_raw_os_error(libc::EIO);
            if at.bytes() > 0 {
                Err(Error::from_io("cannot read", failed))
            } else {
                self.0.read_exact_at(at, buf)
            }
        }
        fn extent_at(&self, at: FileOffset) -> Result<Extent> {
            self.0.extent_at(at)
        }
        fn generation(&self) -> &Generation {
            self.0.generation()
        }
        fn verify_unchanged(&self) -> Result<()> {
            Ok(())
        }
    }
    let (image, _) = small("qcow2", &[]);
    let storage = Unreadable(MemoryStorage::new("k.qcow2", image));
    let error = check_complete(OutputFormat::Qcow2, Arc::new(storage)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
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
    check(&unpack("iotest-dynamic-1G.vhdx"), "vhdx");
    let (vmdk, qcow2) = (unpack("dfvfs-ext2.vmdk"), unpack("dfvfs-ext2.qcow2"));
    check(&vmdk, "vmdk");
    qemu_compare(&vmdk, "vmdk", &qcow2, "qcow2");
    let said = fail(freightfs().args(["info", "--input-format", "vhd"]).arg(unpack("afl5.img")));
    assert!(said.contains("a block table of 1073741825 entries is larger than allowed"), "{said}");
    let said = fail(freightfs().arg("info").arg(unpack("cirros-snapshot1.qcow2")));
    assert!(said.contains("backing file") && said.contains("cirros.raw"), "{said}");
}
