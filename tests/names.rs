//! Names and directories of a bucket: what can be called how, and who says that a directory is there.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use support::targets::targets;
use support::{can_mount, command, run, succeed, text};

fn ls(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

#[test]
fn names_of_every_length_that_a_name_may_have_are_written_and_listed() {
    if !can_mount() {
        return;
    }
    for target in targets("long-names") {
        std::fs::write(target.world.catalog().join("i.raw"), [7; 4096]).unwrap();
        let mount = target.mount();
        std::fs::create_dir(mount.key("d")).unwrap();
        let mut names = Vec::new();
        for length in [247, 248, 249, 251, 255] {
            let (plain, image) = ("p".repeat(length), "i".repeat(length - 4) + ".raw");
            std::fs::write(mount.key("d").join(&plain), "plain").unwrap();
            mount.cp(&mount.path("images/i/i.raw"), &format!("d/{image}"));
            assert_eq!(mount.wait(&format!("d/{image}"))["status"], "SUCCESS", "{length}");
            assert_eq!(std::fs::read(mount.key("d").join(&image)).unwrap(), [7; 4096]);
            names.extend([plain, image]);
        }
        let (_world, other) = target.other();
        for at in [&mount, &other] {
            let listed = ls(&at.key("d"));
            assert!(names.iter().all(|name| listed.contains(name)), "{}: {listed:?}", target.name);
        }
        other.unmount();
        for name in &names {
            std::fs::remove_file(mount.key("d").join(name)).unwrap();
        }
        mount.unmount();
    }
}

#[test]
fn a_name_that_is_too_long_is_refused_as_such_by_every_call() {
    if !can_mount() {
        return;
    }
    for target in targets("too-long") {
        let mount = target.mount();
        let long = "x".repeat(256);
        std::fs::write(mount.key("k"), "").unwrap();
        for parent in ["buckets/b", "buckets", "images", "jobs", ""] {
            let path = mount.path(parent).join(&long);
            assert_eq!(errno(path.metadata()), Some(libc::ENAMETOOLONG), "{parent}");
            assert_eq!(errno(std::fs::File::create(&path)), Some(libc::ENAMETOOLONG), "{parent}");
            assert_eq!(errno(std::fs::create_dir(&path)), Some(libc::ENAMETOOLONG), "{parent}");
            assert_eq!(errno(std::fs::remove_file(&path)), Some(libc::ENAMETOOLONG), "{parent}");
        }
        assert_eq!(errno(std::fs::rename(mount.key("k"), mount.key(&long))), Some(libc::ENAMETOOLONG));
        // A key has at most 1024 bytes, as a path in the kernel's calls has at most 4096.
        let deep = ["x".repeat(250).as_str()].repeat(4).join("/");
        std::fs::create_dir_all(mount.key(&deep)).unwrap();
        let path = mount.key(&deep).join("y".repeat(30));
        assert_eq!(errno(std::fs::File::create(path)), Some(libc::ENAMETOOLONG));
        std::fs::write(mount.key(&deep).join("y"), "fits").unwrap();
        mount.unmount();
    }
}

#[test]
fn a_regular_file_can_be_made_with_mknod_and_nothing_else_can() {
    if !can_mount() {
        return;
    }
    for target in targets("mknod") {
        let mount = target.mount();
        // mknod(1) makes no regular files; Python's os.mknod does.
        let mknod = |mode: &str, name: &str| {
            let call = format!("import os, stat; os.mknod({:?}, stat.{mode} | 0o600)", mount.key(name));
            text(&run(command("python3").args(["-c", &call])))
        };
        assert_eq!(mknod("S_IFREG", "made"), "");
        assert!(mknod("S_IFREG", "made").contains("File exists"));
        assert_eq!(std::fs::read(mount.key("made")).unwrap(), b"");
        for mode in ["S_IFIFO", "S_IFSOCK"] {
            assert!(mknod(mode, "other").contains("not permitted"), "{mode}");
        }
        assert_eq!(mount.wait("made")["status"], "SUCCESS");
        assert_eq!(target.object("made"), b"");
        mount.unmount();
    }
}

#[test]
fn a_tree_that_is_removed_is_gone_and_can_be_made_again() {
    if !can_mount() {
        return;
    }
    for target in targets("rm-rf") {
        let mount = target.mount();
        let (_world, other) = target.other();
        for _ in 0..2 {
            std::fs::create_dir_all(mount.key("d/e/f/empty")).unwrap();
            for file in ["d/1", "d/e/2", "d/e/f/3"] {
                std::fs::write(mount.key(file), file).unwrap();
            }
            succeed(command("rm").arg("-r").arg(mount.key("d")));
            assert_eq!(ls(&mount.key("")), Vec::<String>::new(), "{}", target.name);
            assert_eq!(errno(mount.key("d").metadata()), Some(libc::ENOENT));
            assert_eq!(ls(&other.key("")), Vec::<String>::new(), "{}: another mount", target.name);
        }
        other.unmount();
        mount.unmount();
    }
}

#[test]
fn what_a_directory_lists_can_be_looked_up() {
    if !can_mount() {
        return;
    }
    for target in targets("agree") {
        let mount = target.mount();
        let (_world, other) = target.other();
        std::fs::create_dir_all(mount.key("d/e")).unwrap();
        std::fs::write(mount.key("d/e/f"), "f").unwrap();
        assert_eq!(ls(&other.key("d")), ["e"]);
        for name in ls(&mount.key("d/e")) {
            std::fs::remove_file(mount.key("d/e").join(name)).unwrap();
        }
        // It stays here, as it would on a disk; elsewhere it depends on the store, which is of one mind.
        assert!(mount.key("d/e").is_dir());
        for at in [&mount, &other] {
            for directory in ["", "d", "d/e"] {
                let Ok(entries) = std::fs::read_dir(at.key(directory)) else { continue };
                for entry in entries {
                    let path = entry.unwrap().path();
                    assert!(
                        path.metadata().is_ok(),
                        "{}: {} is listed and not there",
                        target.name,
                        path.display()
                    );
                }
            }
        }
        std::fs::remove_dir(mount.key("d/e")).unwrap();
        assert_eq!(ls(&mount.key("d")), Vec::<String>::new());
        std::fs::remove_dir(mount.key("d")).unwrap();
        assert_eq!(ls(&mount.key("")), Vec::<String>::new());
        other.unmount();
        mount.unmount();
    }
}

#[test]
fn a_directory_that_is_removed_from_outside_is_gone() {
    if !can_mount() {
        return;
    }
    for target in targets("outside") {
        let mount = target.mount();
        let (_world, other) = target.other();
        std::fs::create_dir(mount.key("d")).unwrap();
        for file in ["d/a", "d/b"] {
            std::fs::write(mount.key(file), file).unwrap();
        }
        std::fs::remove_file(mount.key("d/a")).unwrap();
        succeed(command("rm").arg("-r").arg(other.key("d")));
        // Names and attributes are kept for a second, listings for five.
        support::proxied::until("the directory to be gone", || !mount.key("d").exists());
        assert_eq!(ls(&mount.key("")), Vec::<String>::new(), "{}", target.name);
        // One that was made and has nothing in it yet stays.
        std::fs::create_dir(mount.key("new")).unwrap();
        assert!(mount.key("new").is_dir());
        assert_eq!(ls(&mount.key("")), ["new"]);
        other.unmount();
        mount.unmount();
    }
}
