//! Compressed files of the mount, as programs see them: right at first touch, and as exports.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use freightfs::format::OutputFormat;
use support::images::{self, Random};
use support::mount::{Mount, World};
use support::{assert_same, can_mount, command, freightfs, sh, sha256, succeed};

fn compressed() -> impl Iterator<Item = OutputFormat> {
    OutputFormat::ALL.into_iter().filter(|format| format.is_compressed())
}

const FORMATS: &str = "formats=raw:zlib.qcow2:zstd.qcow2:stream.vmdk:zvhd:zvhd2";

/// A raw disk that compresses in part, with more than one group of units, in the catalog; its name is the program's.
fn disk(world: &World, name: &str) -> PathBuf {
    let path = world.catalog().join(format!("{name}.raw"));
    let file = std::fs::File::create(&path).unwrap();
    file.set_len((90 << 20) + 512).unwrap();
    file.write_all_at(&Random(3).bytes(12 << 20), 1 << 20).unwrap();
    let prose = "what was said before is said again, and again\n".repeat(100_000);
    file.write_all_at(prose.as_bytes(), 40 << 20).unwrap();
    file.write_all_at(&vec![0; 6 << 20], 60 << 20).unwrap();
    file.write_all_at(&Random(4).bytes(3 << 20), (87 << 20) + 512).unwrap();
    path
}

/// What `convert` makes of the disk under the name that it has in the mount.
fn expected(world: &World, raw: &Path, format: OutputFormat) -> PathBuf {
    let stem = raw.file_stem().unwrap().to_string_lossy().into_owned();
    let path = world.out(&format!("expected-{stem}.{}", format.suffix()));
    let formatted = ["convert", "--quiet", "--format", format.suffix()];
    succeed(freightfs().args(formatted).arg(raw).arg(&path));
    path
}

fn file(mount: &Mount, name: &str, format: OutputFormat) -> PathBuf {
    mount.path(&format!("images/{name}/{name}.{}", format.suffix()))
}

/// How each program copies from A to B. Every program has a disk of its own, so that its touch is the first.
const PROGRAMS: [(&str, &str); 11] = [
    ("cp", "cp A B"),
    ("cpsparse", "cp --sparse=always A B"),
    ("install", "install A B"),
    ("cat", "cat A > B"),
    ("dd", "dd if=A of=B bs=300k status=none"),
    ("head", "head -c 1G A > B"),
    ("rsync", "rsync -a A B"),
    ("tar", "tar c -C $(dirname A) $(basename A) | tar x -O > B"),
    ("python", "python3 -c 'import shutil; shutil.copyfile(\"A\", \"B\")'"),
    ("qemu", "qemu-img dd -f raw -O raw if=A of=B bs=1M"),
    ("tail", "tail -c +1 A > B"),
];

#[test]
fn every_program_reads_the_exact_bytes_at_first_touch() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let disks: Vec<_> = PROGRAMS.iter().map(|(name, _)| disk(&world, name)).collect();
    let mount = world.mount(&["-o", FORMATS]);
    for ((name, line), raw) in PROGRAMS.iter().zip(&disks) {
        for format in compressed() {
            let (from, to) = (file(&mount, name, format), world.out("copy"));
            // Neither letter of the line is looked for in a path.
            let (a, b) = (from.display().to_string(), to.display().to_string());
            let line = line.replace('A', "\0").replace('B', &b).replace('\0', &a);
            println!("{line}");
            sh(&line);
            let right = expected(&world, raw, format);
            if *name == "qemu" {
                // qemu-img fills up to whole sectors, which all but none of these files have anyway.
                let length = right.metadata().unwrap().len();
                assert_eq!(to.metadata().unwrap().len(), length.next_multiple_of(512));
            }
            assert_same(&right, &to);
            assert_eq!(from.metadata().unwrap().len(), right.metadata().unwrap().len(), "size after reading");
            std::fs::remove_file(to).unwrap();
            std::fs::remove_file(right).unwrap();
        }
    }
    mount.unmount();
}

#[test]
fn checksums_sizes_and_pieces_agree_with_the_whole() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = disk(&world, "disk");
    let mount = world.mount(&["-o", FORMATS]);
    for format in compressed() {
        let (path, right) = (file(&mount, "disk", format), expected(&world, &raw, format));
        let bound = path.metadata().unwrap().len();
        assert!(bound > right.metadata().unwrap().len(), "stat shows an upper bound before the first open");
        assert_eq!(sha256(&path), sha256(&right));
        let (whole, pieces) = (std::fs::read(&right).unwrap(), std::fs::File::open(&path).unwrap());
        assert_eq!(pieces.metadata().unwrap().len(), whole.len() as u64);
        let mut random = Random(6);
        for _ in 0..100 {
            let at = random.below(whole.len() as u64) as usize;
            let length = (1 + random.below(200_000) as usize).min(whole.len() - at);
            let mut piece = vec![0; length];
            pieces.read_exact_at(&mut piece, at as u64).unwrap();
            assert!(piece == whole[at..at + length], "{length} bytes at {at} of {format:?}");
        }
    }
    mount.unmount();
    // The next mount knows the sizes from the index, at once and without reading the disk.
    let mount = world.mount(&["-o", FORMATS]);
    for format in compressed() {
        let (path, right) = (file(&mount, "disk", format), expected(&world, &raw, format));
        assert_eq!(path.metadata().unwrap().len(), right.metadata().unwrap().len());
        assert_same(&path, &right);
    }
    mount.unmount();
    // A damaged index is made again.
    let lengths = world.path("state/lengths");
    for entry in std::fs::read_dir(&lengths).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let mount = world.mount(&["-o", FORMATS]);
    for format in compressed() {
        assert_same(&file(&mount, "disk", format), &expected(&world, &raw, format));
    }
    assert!(mount.log().contains("is damaged; it is made again"), "{}", mount.log());
    mount.unmount();
}

#[test]
fn a_copy_of_a_compressed_file_is_an_export_that_waits_for_no_pass() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = disk(&world, "disk");
    let mount = world.mount(&["-o", FORMATS]);
    let reads = |mount: &Mount| mount.metric("freightfs_fuse_requests_total{op=\"read\"}");
    let before = reads(&mount);
    for format in compressed() {
        mount.cp(&file(&mount, "disk", format), &format!("k.{}", format.suffix()));
    }
    assert_eq!(reads(&mount), before, "cp caused reads");
    for format in compressed() {
        let (key, right) = (format!("k.{}", format.suffix()), expected(&world, &raw, format));
        let status = mount.wait(&key);
        assert_eq!(status["status"], "SUCCESS", "{status}");
        assert_eq!(status["size"], right.metadata().unwrap().len());
        assert_eq!(status["sha256"], sha256(&right));
        assert_same(&world.bucket().join(&key), &right);
        assert_eq!(mount.key(&key).metadata().unwrap().len(), right.metadata().unwrap().len());
    }
    // The same by programs that read and write.
    let from = file(&mount, "disk", OutputFormat::StreamVmdk);
    for program in ["rsync -a", "cp --reflink=never --sparse=always"] {
        sh(&format!("{program} {} {}", from.display(), mount.key("w.stream.vmdk").display()));
        let right = expected(&world, &raw, OutputFormat::StreamVmdk);
        assert_same(&world.bucket().join("w.stream.vmdk"), &right);
        std::fs::remove_file(mount.key("w.stream.vmdk")).unwrap();
    }
    mount.unmount();
}

#[test]
fn a_changed_source_is_compressed_anew() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = disk(&world, "disk");
    let mount = world.mount(&["-o", FORMATS]);
    let path = file(&mount, "disk", OutputFormat::ZlibQcow2);
    let first = sha256(&path);
    std::fs::OpenOptions::new().write(true).open(&raw).unwrap().write_all_at(b"changed", 2 << 20).unwrap();
    let expected = expected(&world, &raw, OutputFormat::ZlibQcow2);
    assert_eq!(sha256(&path), sha256(&expected));
    assert_ne!(sha256(&path), first);
    mount.unmount();
}

#[test]
fn a_damaged_source_fails_the_pass_and_the_export_with_its_reason() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = world.catalog().join("bad.raw");
    let lines: String = (0..400_000).map(|n: u64| format!("line {} of a text\n", n * n % 9973)).collect();
    std::fs::write(&raw, lines).unwrap();
    let image = images::qcow2(&raw, "bad.qcow2", &["-c"]);
    std::fs::remove_file(&raw).unwrap();
    // In the middle of the compressed clusters.
    let file_size = image.metadata().unwrap().len();
    let damaged = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    damaged.write_all_at(&[0xff; 30_000], file_size / 2).unwrap();
    let mount = world.mount(&["-o", FORMATS]);
    let path = mount.path("images/bad/bad.stream.vmdk");
    let error = std::fs::File::open(&path).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(!command("cat").arg(&path).output().unwrap().status.success());
    mount.cp(&path, "bad.stream.vmdk");
    let status = mount.wait("bad.stream.vmdk");
    assert_eq!(
        (&status["status"], &status["error"]["code"]),
        (&"FAIL".into(), &"corrupt_image".into()),
        "{status}"
    );
    assert!(!world.bucket().join("bad.stream.vmdk").exists());
    mount.unmount();
}

/// A daemon that was killed goes on inside compressed output: what was compressed before is not compressed again.
#[test]
fn a_pass_that_was_cut_off_goes_on() {
    use freightfs::catalog::{Catalog, FormatFile};
    use freightfs::convert::Workspace;
    use freightfs::units::FileOffset;
    use freightfs::vfile::VirtualFile;

    let world = World::new();
    images::noise(&world.catalog(), 40 << 20);
    for (format, head) in
        [(OutputFormat::StreamVmdk, 20 << 20), (OutputFormat::Zvhd, 20 << 20), (OutputFormat::Zvhd2, 9 << 20)]
    {
        let open = || {
            let workspace = Workspace::in_directory(&world.path("state"));
            let catalog = Catalog::open(&world.catalog()).unwrap().with_workspace(workspace);
            let disk = catalog.open_disk(catalog.image("noise").unwrap().disk("noise").unwrap()).unwrap();
            match disk.file(format).unwrap() {
                FormatFile::Compressed(file) => file,
                FormatFile::Plain(_) => panic!("not compressed"),
            }
        };
        let read = |file: &dyn VirtualFile, length: usize| {
            let mut bytes = vec![0; length];
            assert_eq!(file.read_at(FileOffset(0), &mut bytes).unwrap(), length);
            bytes
        };
        // Never finished.
        let begun = read(&*open(), head);
        let file = open();
        let done = std::sync::atomic::AtomicU64::new(0);
        let size = file
            .complete(&|units| {
                done.fetch_add(units, std::sync::atomic::Ordering::Relaxed);
            })
            .unwrap();
        let done = done.into_inner() * file.unit_size();
        assert!(
            done > 0 && done <= (40 << 20) - head as u64,
            "{format:?}: {done} bytes were compressed again"
        );
        let resumed = read(&*file, size as usize);
        assert!(resumed.starts_with(&begun));
        std::fs::remove_dir_all(world.path("state")).unwrap();
        std::fs::create_dir(world.path("state")).unwrap();
        assert!(read(&*open(), size as usize) == resumed, "{format:?}");
    }
}
