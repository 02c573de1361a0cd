//! A bucket's directory, used by the programs that people use: the same body against a local bucket and against S3.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use support::images::Random;
use support::mount::World;
use support::proxied::until;
use support::targets::targets;
use support::{assert_same, can_mount, command, run, sh, text};

/// A file outside the mount: 20 MiB and a bit, with a hole, older than now, with a mode of its own.
fn source(world: &World) -> PathBuf {
    let path = world.out("source.bin");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len((20 << 20) + 777).unwrap();
    file.write_all_at(&Random(1).bytes(9 << 20), 100).unwrap();
    file.write_all_at(&Random(2).bytes(1 << 20), 18 << 20).unwrap();
    sh(&format!("touch -d '2021-03-04 05:06:07.5' {0}; chmod 640 {0}", path.display()));
    path
}

/// What is kept of the source besides its bytes.
#[derive(Clone, Copy, PartialEq)]
enum Kept {
    Content,
    TimeAndMode,
}

/// (name, line of shell with @S for the source and @D for the destination, what must be kept)
const COPIES: &[(&str, &str, Kept)] = &[
    ("cp", "cp @S @D", Kept::Content),
    ("cp-a", "cp -a @S @D", Kept::TimeAndMode),
    ("cp-p", "cp -p @S @D", Kept::TimeAndMode),
    ("cp-sparse-always", "cp --sparse=always @S @D", Kept::Content),
    ("cp-sparse-never", "cp --sparse=never @S @D", Kept::Content),
    ("install", "install -m 640 @S @D", Kept::Content),
    ("cat", "cat @S > @D", Kept::Content),
    ("dd-512", "head -c 300000 @S > @T; dd if=@T of=@D bs=512 status=none; cp @T @2", Kept::Content),
    ("dd-64k", "dd if=@S of=@D bs=64K status=none", Kept::Content),
    ("dd-1m", "dd if=@S of=@D bs=1M status=none conv=fsync", Kept::Content),
    ("dd-4m", "dd if=@S of=@D bs=4M status=none oflag=direct", Kept::Content),
    ("tee", "tee @D < @S > /dev/null", Kept::Content),
    (
        "tar",
        "tar c --format=posix -C $(dirname @S) $(basename @S) | tar x -C $(dirname @D) --transform s/source.bin/$(basename @D)/",
        Kept::TimeAndMode,
    ),
    ("rsync-a", "rsync -a @S @D", Kept::TimeAndMode),
    ("rsync-inplace", "rsync -a --inplace @S @D", Kept::TimeAndMode),
    ("rsync-sparse", "rsync -a --sparse @S @D", Kept::TimeAndMode),
    ("rsync-append", "head -c 5000000 @S > @D; rsync -a --append-verify @S @D", Kept::TimeAndMode),
    ("rsync-partial", "rsync -a --partial @S @D", Kept::TimeAndMode),
    ("rsync-delta", "head -c 19000000 @S > @D; rsync -a --no-whole-file @S @D", Kept::TimeAndMode),
    ("shutil", "python3 -c \"import shutil; shutil.copy2('@S', '@D')\"", Kept::TimeAndMode),
    ("mv", "cp -p @S @D.old; mv @D.old @D", Kept::TimeAndMode),
    ("append", "head -c 10000000 @S > @D; tail -c +10000001 @S >> @D", Kept::Content),
    ("overwrite", "echo old > @D; cp @S @D", Kept::Content),
    ("truncate", "cp @S @D; truncate -s 25M @D; truncate -s $(stat -c %s @S) @D", Kept::Content),
];

#[test]
fn every_program_copies_into_a_bucket() {
    if !can_mount() {
        return;
    }
    for target in targets("tools") {
        let source = source(&target.world);
        let mount = target.mount();
        let mut failures = Vec::new();
        for (name, line, kept) in COPIES {
            let to = mount.key(&format!("{name}.bin"));
            let small = target.world.out("small");
            let line = line
                .replace("@2", &small.display().to_string())
                .replace("@S", &source.display().to_string())
                .replace("@D", &to.display().to_string())
                .replace("@T", &target.world.out("part").display().to_string());
            let output = run(command("bash").args(["-euo", "pipefail", "-c", &line]));
            let expected = if line.contains(&small.display().to_string()) { &small } else { &source };
            if let Err(why) = check(&output, expected, &to, *kept) {
                failures.push(format!("{} {name}: {why}", target.name));
            }
        }
        // What is kept, is kept over mounts.
        mount.unmount();
        let mount = target.mount();
        for (name, _, kept) in COPIES.iter().filter(|(.., kept)| *kept != Kept::Content) {
            if let Err(why) = same_attributes(&source, &mount.key(&format!("{name}.bin")), *kept) {
                failures.push(format!("{} {name} after another mount: {why}", target.name));
            }
        }
        mount.unmount();
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}

fn check(output: &std::process::Output, source: &Path, to: &Path, kept: Kept) -> Result<(), String> {
    if !output.status.success() {
        return Err(format!("{} {}", output.status, text(output)));
    }
    let compared = run(command("cmp").arg(source).arg(to));
    if !compared.status.success() {
        return Err(text(&compared));
    }
    same_attributes(source, to, kept)
}

fn same_attributes(source: &Path, to: &Path, kept: Kept) -> Result<(), String> {
    let (a, b) = (source.metadata().unwrap(), to.metadata().map_err(|e| e.to_string())?);
    if a.len() != b.len() {
        return Err(format!("{} bytes instead of {}", b.len(), a.len()));
    }
    let seen = |m: &std::fs::Metadata| (m.mtime(), m.mtime_nsec(), m.mode() & 0o7777);
    if kept == Kept::TimeAndMode && seen(&a) != seen(&b) {
        return Err(format!("time and mode {:?} instead of {:?}", seen(&b), seen(&a)));
    }
    Ok(())
}

#[test]
fn a_second_rsync_transfers_nothing_and_the_way_out_is_the_same() {
    if !can_mount() {
        return;
    }
    for target in targets("rsync") {
        let tree = target.world.out("tree");
        std::fs::create_dir_all(tree.join("sub/deeper")).unwrap();
        for (index, name) in ["a", "sub/b", "sub/deeper/c d", "sub/.hidden", "sub/empty"].iter().enumerate() {
            std::fs::write(tree.join(name), Random(index as u64).bytes(if index == 4 { 0 } else { 100_000 }))
                .unwrap();
        }
        sh(&format!("touch -d '2020-01-02 03:04:05' {0}/a {0}/sub/b", tree.display()));
        let mount = target.mount();
        let to = mount.key("copy");
        sh(&format!("rsync -a {}/ {}/", tree.display(), to.display()));
        let again = format!("rsync -a -i {}/ {}/", tree.display(), to.display());
        let listed = |out: &str| -> Vec<String> {
            out.lines().filter(|l| l.starts_with(">f") || l.starts_with(".f")).map(str::to_owned).collect()
        };
        assert_eq!(listed(&sh(&again)), Vec::<String>::new(), "{}: a second rsync", target.name);
        mount.unmount();
        let mount = target.mount();
        assert_eq!(listed(&sh(&again)), Vec::<String>::new(), "{}: after another mount", target.name);
        let back = target.world.out("back");
        sh(&format!("rsync -a {}/ {}/", to.display(), back.display()));
        sh(&format!("diff -r {} {}", tree.display(), back.display()));
        let times = |root: &Path| {
            sh(&format!("cd {} && find . -type f -printf '%p %T@ %m\\n' | sort", root.display()))
        };
        assert_eq!(times(&tree), times(&back), "{}", target.name);
        // --delete takes away what is gone at the source, and nothing else.
        std::fs::remove_file(tree.join("sub/b")).unwrap();
        sh(&format!("rsync -a --delete {}/ {}/", tree.display(), to.display()));
        assert!(!to.join("sub/b").exists() && to.join("a").exists());
        let leftovers = sh(&format!("find {} -name '.*.??????'", to.display()));
        assert_eq!(leftovers, "", "{}: files under rsync's temporary names", target.name);
        assert_same(&to.join("a"), &tree.join("a"));
        mount.unmount();
    }
}

#[test]
fn what_people_look_with_works() {
    if !can_mount() {
        return;
    }
    for target in targets("looks") {
        let source = source(&target.world);
        let mount = target.mount();
        let directory = mount.key("dir");
        std::fs::create_dir(&directory).unwrap();
        sh(&format!("cp {} {}/x.raw; echo two > {1}/y", source.display(), directory.display()));
        mount.wait("dir/x.raw");
        sh(&format!("cd {} && sha256sum -c x.raw.sha256 && md5sum -c x.raw.md5", directory.display()));
        let found = sh(&format!(
            "cd {} && find . -type f ! -name '*.status' ! -name '*.md5' ! -name '*.sha256' | sort",
            directory.display()
        ));
        assert_eq!(found, "./x.raw\n./y\n");
        assert!(sh(&format!("ls -la {}", directory.display())).contains(&format!(" {} ", (20 << 20) + 777)));
        assert!(
            sh(&format!("du -s --apparent-size -B1 {}/x.raw", directory.display())).starts_with("20972297")
        );
        let numbers = || sh(&format!("ls -i {} | sort", directory.display()));
        assert_eq!(numbers(), numbers(), "inode numbers are stable");
        mount.unmount();
    }
}

#[test]
fn qemu_img_writes_into_a_bucket() {
    if !can_mount() {
        return;
    }
    for target in targets("qemu") {
        let source = source(&target.world);
        let mount = target.mount();
        for (format, name) in [("qcow2", "q.qcow2"), ("vmdk", "q.vmdk"), ("vpc", "q.vhd"), ("raw", "q.raw")] {
            let to = mount.key(name);
            sh(&format!("qemu-img convert -f raw -O {format} {} {}", source.display(), to.display()));
            sh(&format!("qemu-img compare -f raw -F {format} {} {}", source.display(), to.display()));
        }
        mount.unmount();
    }
}

#[test]
fn extended_attributes_are_kept_with_the_object() {
    if !can_mount() {
        return;
    }
    for target in targets("xattrs") {
        let source = source(&target.world);
        if !run(command("setfattr").args(["-n", "user.owner", "-v", "me"]).arg(&source)).status.success() {
            return support::skip("extended attributes: the filesystem of temporary files has none");
        }
        let mount = target.mount();
        for line in ["rsync -aX @S @D", "cp -a @S @D", "cp @S @D; setfattr -n user.owner -v me @D"] {
            let to = mount.key("x.bin");
            sh(&line.replace("@S", &source.display().to_string()).replace("@D", &to.display().to_string()));
            assert_eq!(
                sh(&format!("getfattr -n user.owner --only-values {}", to.display())),
                "me",
                "{} {line}",
                target.name
            );
            assert!(sh(&format!("getfattr -d {}", to.display())).contains("user.owner"));
            sh(&format!("setfattr -x user.owner {0}; setfattr -n user.colour -v red {0}", to.display()));
            assert!(!sh(&format!("getfattr -d {}", to.display())).contains("user.owner"));
        }
        mount.unmount();
        let mount = target.mount();
        let to = mount.key("x.bin");
        assert_eq!(
            sh(&format!("getfattr -n user.colour --only-values {}", to.display())),
            "red",
            "{}",
            target.name
        );
        mount.unmount();
    }
}

/// Runs a program in a process group of its own until a condition holds, sends the program a signal, and waits until
/// nothing of its group is left: rsync's other processes rename after the one that was killed.
fn interrupted(program: &[&str], signal: &str, condition: impl FnMut() -> bool) -> std::process::ExitStatus {
    let mut child =
        std::process::Command::new(program[0]).args(&program[1..]).process_group(0).spawn().unwrap();
    let group = child.id().to_string();
    until("the moment to interrupt", condition);
    run(command("kill").args([&format!("-{signal}"), &group]));
    let ended = child.wait().unwrap();
    until("the end of its group", || !run(command("pgrep").args(["-g", &group])).status.success());
    ended
}

#[test]
fn an_interrupted_rsync_publishes_nothing_and_goes_on() {
    if !can_mount() {
        return;
    }
    for target in targets("partial") {
        let source = source(&target.world);
        let mount = target.mount();
        std::fs::write(mount.key("x.bin"), "old").unwrap();
        let to = mount.key("x.bin");
        let (from, into) = (source.display().to_string(), to.display().to_string());
        let rsync = ["rsync", "-a", "--partial", "--bwlimit=4000", &from, &into];
        let is_arriving = || {
            let names = std::fs::read_dir(mount.key("")).unwrap().flatten();
            let mut sizes = names
                .filter(|n| n.file_name().to_string_lossy().starts_with(".x.bin."))
                .map(|n| n.metadata().map_or(0, |m| m.len()));
            sizes.any(|size| size > 1 << 20)
        };
        for signal in ["INT", "KILL"] {
            assert!(!interrupted(&rsync, signal, is_arriving).success());
            assert_eq!(target.object("x.bin"), b"old", "{} {signal}", target.name);
        }
        assert!(to.metadata().unwrap().len() < 20 << 20, "the partial file is there to go on with");
        sh(&format!("rsync -a --partial --no-whole-file {} {}", source.display(), to.display()));
        assert_same(&source, &to);
        same_attributes(&source, &to, Kept::TimeAndMode).unwrap();
        mount.unmount();
    }
}

#[test]
fn a_killed_writer_publishes_nothing_and_the_status_says_so() {
    if !can_mount() {
        return;
    }
    for target in targets("killed") {
        let raw = target.world.catalog().join("disk.raw");
        let file = std::fs::File::create(&raw).unwrap();
        file.set_len(40 << 20).unwrap();
        file.write_all_at(&Random(5).bytes(30 << 20), 1 << 20).unwrap();
        let mount = target.mount();
        let suffixes: &[&str] = match target.name {
            "local" => &[
                "qcow2",
                "vhd",
                "fixed.vhd",
                "vmdk",
                "vhdx",
                "vdi",
                "zlib.qcow2",
                "stream.vmdk",
                "zvhd",
                "zvhd2",
            ],
            _ => &["qcow2", "stream.vmdk"],
        };
        // A fixed VHD under a name that could be a dynamic one's, too.
        let local_only = if target.name == "local" { &[("fixed.vhd", "f.vhd")][..] } else { &[] };
        let named = suffixes.iter().map(|suffix| (*suffix, format!("k.{suffix}")));
        for (suffix, key) in named.chain(local_only.iter().map(|(suffix, key)| (*suffix, (*key).to_owned())))
        {
            let whole = target.world.out(&format!("disk.{suffix}"));
            sh(&format!(
                "cp {} {}",
                mount.path(&format!("images/disk/disk.{suffix}")).display(),
                whole.display()
            ));
            let to = mount.key(&key);
            // The first part comes, and then the writer is killed.
            let line =
                format!("{{ head -c 20000000 {}; kill -KILL $$; }} > {}", whole.display(), to.display());
            let killed = run(command("bash").args(["-c", &line]));
            assert!(!killed.status.success());
            let status = mount.wait(&key);
            assert_eq!(
                (&status["status"], &status["error"]["code"]),
                (&"FAIL".into(), &"incomplete".into()),
                "{} {key}: {status}",
                target.name
            );
            assert!(!to.exists(), "{key}");
            sh(&format!("cat {} > {}", whole.display(), to.display()));
            assert_same(&whole, &to);
            assert_eq!(mount.status(&key)["status"], "SUCCESS");
        }
        // Two programs that write one file one after the other are no half a writer.
        let whole = target.world.out("disk.qcow2");
        let to = mount.key("two.qcow2");
        sh(&format!("{{ head -c 9000000 {0}; tail -c +9000001 {0}; }} > {1}", whole.display(), to.display()));
        assert_same(&whole, &to);
        mount.unmount();
    }
}

#[test]
fn what_a_store_does_not_have_is_refused_by_its_errno() {
    use nix::errno::Errno;
    if !can_mount() {
        return;
    }
    let target = targets("errno").remove(0);
    let mount = target.mount();
    std::fs::write(mount.key("f"), "x").unwrap();
    std::fs::create_dir(mount.key("d")).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(mount.key("f")).unwrap();
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o644);
    let kind = nix::sys::stat::SFlag::S_IFCHR;
    let errors: Vec<(&str, std::io::Error, Errno)> = vec![
        ("link", std::fs::hard_link(mount.key("f"), mount.key("g")).unwrap_err(), Errno::EPERM),
        ("symlink", std::os::unix::fs::symlink("f", mount.key("g")).unwrap_err(), Errno::EPERM),
        ("mkfifo", nix::unistd::mkfifo(&mount.key("g"), mode).unwrap_err().into(), Errno::EPERM),
        ("mknod", nix::sys::stat::mknod(&mount.key("g"), kind, mode, 0).unwrap_err().into(), Errno::EPERM),
        (
            "fallocate",
            nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 100).unwrap_err().into(),
            Errno::EOPNOTSUPP,
        ),
        ("create in images", std::fs::write(mount.path("images/x"), "").unwrap_err(), Errno::EROFS),
        ("create in buckets", std::fs::write(mount.path("buckets/x"), "").unwrap_err(), Errno::EROFS),
        ("mkdir in jobs", std::fs::create_dir(mount.path("jobs/x")).unwrap_err(), Errno::EROFS),
        ("rmdir of a bucket", std::fs::remove_dir(mount.path("buckets/b")).unwrap_err(), Errno::EROFS),
        ("a control character", std::fs::write(mount.key("a\nb"), "").unwrap_err(), Errno::EINVAL),
        ("our own files", std::fs::write(mount.key(".freightfs"), "").unwrap_err(), Errno::EINVAL),
        ("rmdir of a file", std::fs::remove_dir(mount.key("f")).unwrap_err(), Errno::ENOTDIR),
        ("unlink of a directory", std::fs::remove_file(mount.key("d")).unwrap_err(), Errno::EISDIR),
        ("a file as directory", std::fs::write(mount.key("f/x"), "").unwrap_err(), Errno::ENOTDIR),
        ("rename of a directory", std::fs::rename(mount.key("d"), mount.key("e")).unwrap_err(), Errno::EXDEV),
        (
            "rename over a directory",
            std::fs::rename(mount.key("f"), mount.key("d")).unwrap_err(),
            Errno::EISDIR,
        ),
        ("create new", std::fs::File::create_new(mount.key("f")).unwrap_err(), Errno::EEXIST),
    ];
    for (what, error, errno) in errors {
        assert_eq!(error.raw_os_error(), Some(errno as i32), "{what}: {error}");
    }
    drop(file);
    mount.unmount();
}

#[test]
fn a_full_staging_disk_fails_the_writer_and_publishes_nothing() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let mount = world.mount(&["-o", "stage_limit=24M"]);
    std::fs::write(mount.key("big"), "old").unwrap();
    for line in ["dd if=/dev/urandom of=@D bs=1M count=40 status=none", "cp @S @D", "rsync @S @D"] {
        let source = world.out("big-source");
        std::fs::write(&source, Random(9).bytes(40 << 20)).unwrap();
        let line = line
            .replace("@S", &source.display().to_string())
            .replace("@D", &mount.key("big").display().to_string());
        let output = run(command("bash").args(["-c", &line]));
        assert!(
            !output.status.success() && text(&output).contains("No space left"),
            "{line}: {}",
            text(&output)
        );
        assert_eq!(std::fs::read(world.bucket().join("big")).unwrap(), b"old", "{line}");
    }
    // What was refused takes no room: there is enough for a smaller one.
    std::fs::write(mount.key("small"), Random(9).bytes(20 << 20)).unwrap();
    assert_eq!(std::fs::read(world.bucket().join("small")).unwrap().len(), 20 << 20);
    mount.unmount();
}

#[test]
fn modes_from_a_bucket_make_no_program_privileged() {
    if !can_mount() {
        return;
    }
    for target in targets("nosuid") {
        let mount = target.mount();
        sh(&format!("cp /bin/true {0}; chmod 4755 {0}", mount.key("program").display()));
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let line = mounts.lines().find(|line| {
            line.contains(&mount.path("").display().to_string().trim_end_matches('/').to_owned())
        });
        let line = line.unwrap();
        assert!(
            line.contains("fuse.freightfs") && line.contains("nosuid") && line.contains("nodev"),
            "{line}"
        );
        mount.unmount();
    }
}
