//! The mount, as programs see it: real mounts, real cp, a local bucket.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use freightfs::format::OutputFormat;
use support::images::{self, Random};
use support::mount::{Mount, World};
use support::{assert_same, can_mount, check, command, fail, sha256, skip, succeed};

/// The uploads under way in a local bucket, whose directory comes with the first of them.
fn uploads(bucket: &Path) -> Vec<String> {
    let directory = bucket.join(".freightfs/uploads");
    if directory.exists() { ls(&directory) } else { Vec::new() }
}

fn ls(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All formats as a mount option.
fn all_formats() -> String {
    let suffixes: Vec<_> = OutputFormat::ALL.iter().map(|format| format.suffix()).collect();
    format!("formats={}", suffixes.join(":"))
}

/// Every file of an image in the mount: copied out by cp, it is what qemu-img says the source is, and pieces of it
/// are what the whole says.
fn check_image(world: &World, mount: &Mount, id: &str, source: &Path, source_format: &str) {
    for format in OutputFormat::ALL {
        let name = format!("{id}.{}", format.suffix());
        let file = mount.path(&format!("images/{id}/{name}"));
        let copy = world.out(&name);
        succeed(command("cp").arg("--sparse=always").arg(&file).arg(&copy));
        check::content(format, &copy, source, source_format);
        let whole = std::fs::File::open(&copy).unwrap();
        let pieces = std::fs::File::open(&file).unwrap();
        let size = whole.metadata().unwrap().len();
        assert_eq!(pieces.metadata().unwrap().len(), size);
        let mut random = Random(size);
        for _ in 0..200 {
            let at = random.below(size);
            let length = (1 + random.below(100_000)).min(size - at) as usize;
            let (mut a, mut b) = (vec![0; length], vec![0; length]);
            whole.read_exact_at(&mut a, at).unwrap();
            pieces.read_exact_at(&mut b, at).unwrap();
            assert!(a == b, "{name}: {length} bytes at {at} differ");
        }
        std::fs::remove_file(copy).unwrap();
    }
}

#[test]
fn a_real_filesystem_is_the_same_in_every_format_from_every_source() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::ext4(&world.catalog());
    images::qcow2(&raw, "plain.qcow2", &[]);
    images::qcow2(&raw, "zlib.qcow2", &["-c"]);
    images::qcow2(&raw, "zstd.qcow2", &["-c", "-o", "compression_type=zstd"]);
    let top = world.catalog().join("top.qcow2");
    succeed(
        command("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "zlib.qcow2"])
            .arg(&top),
    );
    images::qemu_io(&top, &["write -P 7 100M 300k", "write -z 5M 1M"]);
    std::fs::write(world.catalog().join("top.toml"), "allow = ['zlib.qcow2']").unwrap();
    let mount = world.mount(&["-o", &all_formats()]);
    assert_eq!(ls(&mount.path("images")), ["ext4", "plain", "top", "zlib", "zstd"]);
    check_image(&world, &mount, "ext4", &raw, "raw");
    for id in ["plain", "zlib", "zstd", "top"] {
        check_image(&world, &mount, id, &world.catalog().join(format!("{id}.qcow2")), "qcow2");
    }
    mount.unmount();
}

#[test]
fn cp_becomes_an_export_without_a_byte_through_the_kernel() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::ext4(&world.catalog());
    images::qcow2(&raw, "web.qcow2", &["-c"]);
    let mount = world.mount(&[]);
    let expected = world.out("expected.qcow2");
    std::fs::copy(mount.path("images/web/web.qcow2"), &expected).unwrap();
    let counts = |mount: &Mount| {
        ["read", "write"].map(|op| mount.metric(&format!("freightfs_fuse_requests_total{{op=\"{op}\"}}")))
    };
    let before = counts(&mount);
    succeed(command("cp").arg(mount.path("images/web/web.qcow2")).arg(mount.path("buckets/b/")));
    assert_eq!(counts(&mount), before, "cp caused reads or writes");
    // The job is recorded: the key is there with its size, whether or not the upload has ended.
    assert_eq!(mount.key("web.qcow2").metadata().unwrap().len(), expected.metadata().unwrap().len());
    let status = mount.wait("web.qcow2");
    assert_eq!(status["status"], "SUCCESS", "{status}");
    assert_eq!(status["progress"], 100);
    assert_eq!(status["image"]["format"], "qcow2");
    assert_eq!(status["sha256"], sha256(&expected));
    assert_eq!(status["bytes_uploaded"], status["size"]);
    assert_same(&world.bucket().join("web.qcow2"), &expected);
    assert_same(&mount.key("web.qcow2"), &expected);
    assert_eq!(
        ls(&mount.path("buckets/b")),
        ["web.qcow2", "web.qcow2.md5", "web.qcow2.sha256", "web.qcow2.status"]
    );
    let check = |line: &str| support::sh(&format!("cd {} && {line}", mount.path("buckets/b").display()));
    assert_eq!(
        check("sha256sum -c web.qcow2.sha256; md5sum -c web.qcow2.md5"),
        "web.qcow2: OK\nweb.qcow2: OK\n"
    );
    let job =
        std::fs::read_to_string(mount.path(&format!("jobs/{}.json", status["job_id"].as_str().unwrap())))
            .unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&job).unwrap(), status);
    // What the bucket holds is what the mount shows, for hosts without this mount.
    let stored = std::fs::read(world.bucket().join("web.qcow2.status")).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&stored).unwrap(), status);
    mount.unmount();
}

#[test]
fn other_writers_publish_their_bytes_too() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::odd(&world.catalog());
    let mount = world.mount(&[]);
    let b = mount.path("buckets/b").display().to_string();
    let image = mount.path("images/odd/odd.vmdk").display().to_string();
    let source = raw.display().to_string();
    for (key, line) in [
        ("cat", format!("cat {source} > {b}/cat")),
        ("dd", format!("dd if={source} of={b}/dd bs=64K status=none")),
        ("tee", format!("tee {b}/tee < {source} > /dev/null")),
        ("cp", format!("cp {source} {b}/cp")),
        ("sparse", format!("cp --sparse=always {source} {b}/sparse")),
        ("shutil", format!("python3 -c 'import shutil; shutil.copyfile(\"{source}\", \"{b}/shutil\")'")),
        (
            "backwards",
            format!(
                "dd if={source} of={b}/backwards bs=1M skip=20 seek=20 status=none; dd if={source} of={b}/backwards bs=1M count=20 conv=notrunc status=none"
            ),
        ),
    ] {
        support::sh(&line);
        // The last close(2) returned, so the object is there.
        assert_same(&world.bucket().join(key), &raw);
        let status = mount.status(key);
        assert_eq!(status["status"], "SUCCESS");
        assert_eq!(status["sha256"], sha256(&raw), "{key}");
    }
    let expected = world.out("expected.vmdk");
    std::fs::copy(&image, &expected).unwrap();
    // A part of an image, ranges out of place, and a mix of ranges and writes: right, whatever way they take.
    support::sh(&format!("dd if={image} of={b}/part.bin bs=1M count=1 status=none"));
    assert_same(&world.bucket().join("part.bin"), &cut(&expected, 0, 1 << 20, &world.out("part")));
    support::sh(&format!(
        "python3 - <<'E'\nimport os\ns=os.open('{image}',os.O_RDONLY); d=os.open('{b}/mixed.vmdk',os.O_WRONLY|os.O_CREAT)\n\
         n=os.copy_file_range(s,d,300000,0,0); assert n==300000,n\n\
         os.pwrite(d,b'x'*10,5); os.copy_file_range(s,d,1000,7,400000)\nos.close(d)\nE"
    ));
    let mut mixed = std::fs::read(&expected).unwrap();
    let moved = mixed[7..1007].to_vec();
    mixed.truncate(300_000);
    mixed[5..15].fill(b'x');
    mixed.resize(400_000, 0);
    mixed.extend(moved);
    assert!(std::fs::read(world.bucket().join("mixed.vmdk")).unwrap() == mixed);
    // Ranges that leave out the holes, and the size set at the end, are the whole file.
    support::sh(&format!(
        "python3 - <<'E'\nimport os\ns=os.open('{}',os.O_RDONLY); d=os.open('{b}/holes.raw',os.O_WRONLY|os.O_CREAT)\n\
         n=os.fstat(s).st_size; at=0\nwhile True:\n  try: at=os.lseek(s,at,os.SEEK_DATA)\n  except OSError: break\n\
         \x20 end=os.lseek(s,at,os.SEEK_HOLE)\n  while at<end: at+=os.copy_file_range(s,d,end-at,at,at)\n\
         os.ftruncate(d,n); os.close(d)\nE",
        mount.path("images/odd/odd.raw").display()
    ));
    let status = mount.wait("holes.raw");
    assert_eq!(status["image"]["id"], "odd", "the ranges were not taken as the image: {status}");
    assert_same(&world.bucket().join("holes.raw"), &raw);
    mount.unmount();
}

/// A piece of a file as a file.
fn cut(file: &Path, from: usize, length: usize, to: &Path) -> std::path::PathBuf {
    std::fs::write(to, &std::fs::read(file).unwrap()[from..from + length]).unwrap();
    to.to_owned()
}

#[test]
fn directories_objects_and_names_behave() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::odd(&world.catalog());
    let mount = world.mount(&["--formats", "raw:vhd"]);
    succeed(command("cp").args(["-r"]).arg(mount.path("images/odd")).arg(mount.key("copy")));
    for name in ["odd.raw", "odd.vhd"] {
        assert_eq!(mount.wait(&format!("copy/{name}"))["status"], "SUCCESS");
        assert_same(&world.bucket().join("copy").join(name), &mount.path(&format!("images/odd/{name}")));
    }
    for name in ["a b", "x#1", "ü~%25", "-dash", "'quote'"] {
        std::fs::write(mount.key(name), name).unwrap();
        assert_eq!(std::fs::read_to_string(world.bucket().join(name)).unwrap(), name);
        assert_eq!(std::fs::read_to_string(mount.key(name)).unwrap(), name);
    }
    std::fs::rename(mount.key("a b"), mount.key("moved")).unwrap();
    assert_eq!(std::fs::read_to_string(world.bucket().join("moved")).unwrap(), "a b");
    assert!(!mount.key("a b").exists());
    std::fs::remove_file(mount.key("moved")).unwrap();
    assert!(!world.bucket().join("moved").exists());
    std::fs::write(mount.key("empty"), "").unwrap();
    assert_eq!(mount.wait("empty")["status"], "SUCCESS");
    assert_eq!(world.bucket().join("empty").metadata().unwrap().len(), 0);
    // Old content stays readable until the new one is complete, and is then replaced.
    std::fs::write(mount.key("x#1"), "new content").unwrap();
    assert_eq!(std::fs::read_to_string(mount.key("x#1")).unwrap(), "new content");
    std::fs::create_dir(mount.key("d")).unwrap();
    assert!(std::fs::remove_dir(mount.key("copy")).is_err());
    std::fs::remove_dir(mount.key("d")).unwrap();
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    assert_eq!(errno(std::fs::write(mount.key(".freightfs"), "x")), libc::EINVAL);
    assert_eq!(errno(std::fs::write(mount.path("images/odd/new"), "x")), libc::EROFS);
    assert_eq!(errno(std::fs::write(mount.path("images/odd/odd.raw"), "x")), libc::EROFS);
    assert_eq!(errno(std::fs::remove_file(mount.path("images/odd/odd.raw"))), libc::EROFS);
    assert_eq!(errno(std::fs::create_dir(mount.path("buckets/new"))), libc::EROFS);
    assert_eq!(errno(std::fs::write(mount.path("buckets/none/x"), "x")), libc::ENOENT);
    assert_eq!(errno(std::fs::rename(mount.path("images/odd/odd.raw"), mount.key("odd.raw"))), libc::EROFS);
    mount.unmount();
}

#[test]
fn a_huge_sparse_image_costs_next_to_nothing() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let image = world.catalog().join("huge.qcow2");
    succeed(command("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("2040G"));
    images::qemu_io(
        &image,
        &["write -P 1 0 1M", "write -P 2 1000G 1M", "write -P 3 2044G 1M"]
            .map(|l| if l.contains("2044G") { "write -P 3 2039G 1M" } else { l }),
    );
    let mount = world.mount(&["-o", &all_formats()]);
    for format in OutputFormat::ALL {
        let path = mount.path(&format!("images/huge/huge.{}", format.suffix()));
        let file = std::fs::File::open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        let mut byte = [0xee];
        file.read_exact_at(&mut byte, 0).unwrap();
        file.read_exact_at(&mut byte, size - 1).unwrap();
        match format {
            OutputFormat::Raw => assert_eq!(size, 2040 << 30),
            OutputFormat::FixedVhd => assert_eq!(size, (2040 << 30) + 512),
            _ => assert!(size < 600 << 20, "{format:?} has {size} bytes"),
        }
    }
    let resident = mount.resident();
    assert!(resident < 100 << 20, "{resident} bytes resident");
    mount.unmount();
}

#[test]
fn bad_images_give_their_errno_and_their_reason() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::odd(&world.path("out"));
    let good = images::qcow2(&raw, "good.qcow2", &[]);
    let bytes = std::fs::read(&good).unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(world.catalog().join(name), bytes).unwrap();
    put("good.qcow2", &bytes);
    put("truncated.qcow2", &bytes[..bytes.len() / 2]);
    put("garbage.qcow2", &Random(1).bytes(100_000));
    put("empty.qcow2", b"");
    let mut unknown = bytes.clone();
    unknown[72] |= 0x40;
    put("unknown.qcow2", &unknown);
    let mut encrypted = bytes.clone();
    encrypted[35] = 2;
    put("encrypted.qcow2", &encrypted);
    let overlay = |name: &str| {
        let path = world.catalog().join(name);
        let mut create = command("qemu-img");
        create
            .args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "gone.qcow2"])
            .arg(path)
            .arg("1M");
        succeed(&mut create);
    };
    overlay("denied.qcow2");
    overlay("missing.qcow2");
    put("missing.toml", b"allow = ['gone.qcow2']");
    put("sidecar.raw", b"x");
    put("sidecar.toml", b"origin = 'moon'");
    let mount = world.mount(&[]);
    for (id, errno, word) in [
        ("truncated", libc::EIO, "truncated"),
        ("garbage", libc::EIO, "magic"),
        ("empty", libc::EIO, "magic"),
        ("unknown", libc::EOPNOTSUPP, "bit 62"),
        ("encrypted", libc::ENOKEY, "encrypted"),
        ("denied", libc::EPERM, "gone.qcow2"),
        ("missing", libc::ENOENT, "gone.qcow2"),
        ("sidecar", libc::EINVAL, "moon"),
    ] {
        let file = mount.path(&format!("images/{id}/{id}.vhd"));
        let error = std::fs::File::open(&file).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno), "{id}: {error}");
        let document = std::fs::read_to_string(mount.path(&format!("images/{id}/image.json"))).unwrap();
        assert!(document.contains(word) && document.contains("\"exportable\": false"), "{id}: {document}");
        let reason =
            succeed(command("getfattr").args(["--only-values", "-n", "user.freightfs.error"]).arg(&file));
        assert!(reason.contains(word) && reason.contains(id), "{id}: {reason}");
        let said = fail(command("cp").arg(&file).arg(mount.path("buckets/b/")));
        assert!(said.contains("cannot open"), "{said}");
        assert!(!mount.key(&format!("{id}.vhd")).exists());
    }
    assert_same(&mount.path("images/good/good.raw"), &{
        let padded = world.out("padded.raw");
        std::fs::copy(&raw, &padded).unwrap();
        succeed(command("truncate").args(["-s", "%512"]).arg(&padded));
        padded
    });
    mount.unmount();
}

#[test]
fn a_source_that_changes_is_answered_with_estale() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::odd(&world.catalog());
    let mount = world.mount(&[]);
    let file = std::fs::File::open(mount.path("images/odd/odd.qcow2")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    let source = std::fs::File::options().write(true).open(&raw).unwrap();
    source.write_all_at(b"changed", 100).unwrap();
    source.set_len(40 << 20).unwrap();
    let error = file.read_exact_at(&mut byte, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    // Opened again, it is the new content.
    let mut changed = [0; 7];
    let again = std::fs::File::open(mount.path("images/odd/odd.raw")).unwrap();
    again.read_exact_at(&mut changed, 100).unwrap();
    assert_eq!(&changed, b"changed");
    drop((file, again));
    mount.unmount();
}

#[test]
fn a_copy_under_another_formats_name_is_refused() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::odd(&world.catalog());
    let mount = world.mount(&[]);
    let said = fail(command("cp").arg(mount.path("images/odd/odd.qcow2")).arg(mount.key("x.vhd")));
    assert!(said.contains("Invalid argument"), "{said}");
    let status = mount.wait("x.vhd");
    assert_eq!(status["status"], "FAIL");
    assert_eq!(status["error"]["code"], "malformed");
    assert!(!mount.key("x.vhd").exists() && !world.bucket().join("x.vhd").exists());
    mount.cp(&mount.path("images/odd/odd.qcow2"), "x.img");
    assert_eq!(mount.wait("x.img")["status"], "SUCCESS");
    mount.unmount();
}

#[test]
fn a_full_bucket_fails_the_job_and_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::ext4(&world.catalog());
    let bucket = world.bucket();
    let tmpfs =
        command("mount").args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(&bucket).output().unwrap();
    if !tmpfs.status.success() {
        return skip("a full bucket: no tmpfs can be mounted here");
    }
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = command("umount").arg("-l").arg(&self.0).output();
        }
    }
    let _unmount = Unmount(bucket.clone());
    let mount = world.mount(&[]);
    mount.cp(&mount.path("images/ext4/ext4.qcow2"), "big.qcow2");
    let status = mount.wait("big.qcow2");
    assert_eq!(status["status"], "FAIL", "{status}");
    assert_eq!(status["error"]["code"], "no_space");
    assert!(status["error"]["details"].as_str().unwrap().contains("big.qcow2"), "{status}");
    assert!(!mount.key("big.qcow2").exists());
    assert_eq!(uploads(&bucket), Vec::<String>::new());
    let wait = freightfs_wait(&mount, "big.qcow2");
    assert_eq!(wait.0, Some(1));
    assert!(wait.1.contains("no_space"), "{}", wait.1);
    // A plain writer is told by close(2).
    let said = fail(
        command("cp").arg("--reflink=never").arg(world.catalog().join("ext4.raw")).arg(mount.key("plain")),
    );
    assert!(said.contains("No space left on device"), "{said}");
    // The mount is of use all the same, as soon as what was sent of the other file is given up.
    support::proxied::until("the space to be free", || uploads(&bucket).is_empty());
    std::fs::write(mount.key("small"), "fits").unwrap();
    assert_eq!(std::fs::read_to_string(mount.key("small")).unwrap(), "fits");
    drop(mount);
}

fn freightfs_wait(mount: &Mount, key: &str) -> (Option<i32>, String) {
    let output = support::run(support::freightfs().arg("wait").arg(mount.key(key)));
    (output.status.code(), support::text(&output))
}

#[test]
fn with_the_wait_option_the_exit_code_is_the_whole_truth() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::odd(&world.catalog());
    let mount = world.mount(&["-o", "wait"]);
    mount.cp(&mount.path("images/odd/odd.vhd"), "odd.vhd");
    assert_eq!(mount.status("odd.vhd")["status"], "SUCCESS");
    assert_same(&world.bucket().join("odd.vhd"), &mount.path("images/odd/odd.vhd"));
    drop(mount);
}

#[test]
fn sync_waits_for_the_export() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::ext4(&world.catalog());
    let mount = world.mount(&[]);
    mount.cp(&mount.path("images/ext4/ext4.vmdk"), "ext4.vmdk");
    succeed(command("sync").arg(mount.key("ext4.vmdk")));
    assert_eq!(mount.status("ext4.vmdk")["status"], "SUCCESS");
    mount.unmount();
}

#[test]
fn jobs_survive_the_daemon() {
    if !can_mount() {
        return;
    }
    for signal in ["KILL", "TERM"] {
        let world = World::new();
        let raw = world.catalog().join("ext4.raw");
        let file = std::fs::File::create(&raw).unwrap();
        file.set_len(150 << 20).unwrap();
        file.write_all_at(&Random(9).bytes(30 << 20), 50 << 20).unwrap();
        let mount = world.mount(&[]);
        let keys = ["a.raw", "b.raw", "c.raw"];
        for key in keys {
            mount.cp(&mount.path("images/ext4/ext4.raw"), key);
        }
        // After SIGKILL the dead mount is taken away by the guard's end.
        mount.signal(signal);
        let mount = world.mount(&[]);
        for key in keys {
            let status = mount.wait(key);
            assert_eq!(status["status"], "SUCCESS", "{signal}: {status}");
            assert_same(&world.bucket().join(key), &raw);
        }
        assert_eq!(uploads(&world.bucket()), Vec::<String>::new());
        mount.unmount();
    }
}

#[test]
fn umount_finishes_what_was_asked_for() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::ext4(&world.catalog());
    let mount = world.mount(&[]);
    mount.cp(&mount.path("images/ext4/ext4.raw"), "ext4.raw");
    mount.unmount();
    assert_same(&world.bucket().join("ext4.raw"), &raw);
    let status = std::fs::read_to_string(world.bucket().join("ext4.raw.status")).unwrap();
    assert!(status.contains("SUCCESS"), "{status}");
}

#[test]
fn a_busy_key_is_refused_and_removing_it_cancels() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::ext4(&world.catalog());
    std::fs::File::create(world.catalog().join("large.raw")).unwrap().set_len(20 << 30).unwrap();
    let mount = world.mount(&[]);
    mount.cp(&mount.path("images/large/large.raw"), "k.raw");
    let said = fail(command("cp").arg(mount.path("images/ext4/ext4.raw")).arg(mount.key("k.raw")));
    assert!(said.contains("busy"), "{said}");
    let error = std::fs::remove_file(mount.key("k.raw.status")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    // What is not uploaded yet already reads, with its final size.
    assert_eq!(mount.key("k.raw").metadata().unwrap().len(), 20 << 30);
    let mut bytes = [1; 100];
    std::fs::File::open(mount.key("k.raw")).unwrap().read_exact_at(&mut bytes, 10 << 30).unwrap();
    assert_eq!(bytes, [0; 100]);
    std::fs::remove_file(mount.key("k.raw")).unwrap();
    let status = mount.wait("k.raw");
    assert_eq!(status["status"], "CANCELLED", "{status}");
    assert!(!mount.key("k.raw").exists());
    assert_eq!(uploads(&world.bucket()), Vec::<String>::new());
    std::fs::remove_file(mount.key("k.raw.status")).unwrap();
    assert_eq!(ls(&mount.path("buckets/b")), Vec::<String>::new());
    mount.unmount();
}

#[test]
fn mounts_that_cannot_be_say_why_and_leave_nothing() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    images::odd(&world.catalog());
    let mount = world.mount(&[]);
    let second = World::new();
    let state = world.path("state").display().to_string();
    let said = fail(&mut second.mount_command(&["-o", &format!("state={state}")]));
    assert!(said.contains("another mount holds") && said.contains(&mount.pid().to_string()), "{said}");
    mount.unmount();
    for (arguments, word) in [
        (&["--bucket", "b=file:///nowhere/at/all"][..], "nowhere"),
        (&["--bucket", "b=ftp://x/y"], "ftp"),
        (&["--bucket", "b=s3://user:secret@x/y"], "no credentials"),
        (&["--bucket", "nourl"], "NAME=URL"),
        (&["-o", "colour=red"], "colour"),
        (&["--formats", "zip"], "zip"),
    ] {
        let said = fail(&mut world.mount_command(arguments));
        assert!(said.contains(word) && !said.contains("secret"), "{said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
        assert!(
            !std::fs::read_to_string("/proc/mounts")
                .unwrap()
                .contains(&world.path("mnt").display().to_string())
        );
    }
    let mut command = support::freightfs();
    let said = fail(
        command.args(["mount", "/nowhere"]).arg(world.path("mnt")).arg("--state").arg(world.path("state")),
    );
    assert!(said.contains("/nowhere") && said.contains("catalog"), "{said}");
}
