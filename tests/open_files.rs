//! Open files are what was opened, whatever becomes of their names. Each test runs against a local bucket and S3.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;

use support::can_mount;
use support::images::{self, Random};
use support::mount::{Mount, World};
use support::proxied::until;
use support::targets::{Target, targets};
use support::{command, has, run, succeed, text};

fn for_each_target(name: &str, test: impl Fn(&Target, Mount)) {
    if can_mount() {
        for target in targets(name) {
            let mount = target.mount();
            test(&target, mount);
        }
    }
}

fn both(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn whole(file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_removed_file_is_another_than_the_new_one_of_its_name() {
    for_each_target("removed", |target, mount| {
        let key = mount.key("f");
        std::fs::write(&key, "the old content").unwrap();
        let old = both(&key);
        let number = old.metadata().unwrap().ino();
        std::fs::remove_file(&key).unwrap();
        let meta = old.metadata().unwrap();
        assert_eq!((meta.nlink(), meta.len(), meta.ino()), (0, 15, number));
        std::fs::write(&key, "new").unwrap();
        assert_ne!(std::fs::metadata(&key).unwrap().ino(), number);
        // What A does to its file is not done to B's.
        assert_eq!(whole(&old), b"the old content");
        old.set_len(0).unwrap();
        old.write_all_at(b"A", 2).unwrap();
        assert_eq!(whole(&old), b"\0\0A");
        assert_eq!(old.metadata().unwrap().len(), 3);
        drop(old);
        assert_eq!(std::fs::read(&key).unwrap(), b"new");
        mount.unmount();
        assert_eq!(target.object("f"), b"new");
    });
}

#[test]
fn a_removed_file_is_read_to_its_end() {
    for_each_target("to-its-end", |_, mount| {
        let bytes = Random(1).bytes(5 << 20);
        for (name, write) in [("reader", false), ("writer", true)] {
            let key = mount.key(name);
            std::fs::write(&key, &bytes).unwrap();
            let file = OpenOptions::new().read(true).write(write).open(&key).unwrap();
            let mut start = vec![0; 1000];
            file.read_exact_at(&mut start, 0).unwrap();
            std::fs::remove_file(&key).unwrap();
            assert!(whole(&file) == bytes, "{name}");
            assert!(!key.exists());
        }
        mount.unmount();
    });
}

#[test]
fn a_replaced_file_keeps_its_bytes_and_the_new_one_its_number() {
    for_each_target("replaced", |target, mount| {
        for (name, content) in [("a", "first"), ("b", "second, longer")] {
            std::fs::write(mount.key(name), content).unwrap();
        }
        let (a, b) = (both(&mount.key("a")), both(&mount.key("b")));
        let number = b.metadata().unwrap().ino();
        std::fs::rename(mount.key("b"), mount.key("a")).unwrap();
        assert_eq!((a.metadata().unwrap().nlink(), whole(&a)), (0, b"first".to_vec()));
        let meta = std::fs::metadata(mount.key("a")).unwrap();
        assert_eq!((meta.ino(), meta.len()), (number, 14), "the number goes with the file");
        assert_eq!((b.metadata().unwrap().ino(), whole(&b)), (number, b"second, longer".to_vec()));
        a.write_all_at(b"FIRST", 0).unwrap();
        b.write_all_at(b"SECOND", 0).unwrap();
        assert_eq!((whole(&a), whole(&b)), (b"FIRST".to_vec(), b"SECOND, longer".to_vec()));
        drop((a, b));
        mount.unmount();
        assert_eq!(target.object("a"), b"SECOND, longer");
    });
}

#[test]
fn a_file_that_is_renamed_while_it_is_open_is_the_one_of_its_new_name_for_all() {
    for_each_target("renamed-open", |target, mount| {
        std::fs::write(mount.key("a"), "0123").unwrap();
        // What is open from here on was not written here.
        mount.unmount();
        let mount = target.mount();
        let (old, new) = (mount.key("a"), mount.key("d"));
        let file = both(&old);
        std::fs::rename(&old, &new).unwrap();
        assert_eq!(std::fs::read(&new).unwrap(), b"0123");
        file.write_all_at(b"ab", 1).unwrap();
        assert_eq!(std::fs::read(&new).unwrap(), b"0ab3");
        std::fs::remove_file(&new).unwrap();
        assert_eq!(whole(&file), b"0ab3");
        nix::unistd::close(file).unwrap();
        assert!(!old.exists() && !new.exists(), "what was removed is there again");
        mount.unmount();
    });
}

#[test]
fn all_who_have_a_file_open_see_the_same_bytes() {
    for_each_target("same-bytes", |target, mount| {
        let key = mount.key("f");
        std::fs::write(&key, "0123456789").unwrap();
        let (reader, writer) = (File::open(&key).unwrap(), both(&key));
        let late = both(&key);
        assert_eq!(whole(&reader), b"0123456789");
        writer.write_all_at(b"ab", 3).unwrap();
        assert_eq!([whole(&reader), whole(&late)], [b"012ab56789", b"012ab56789"]);
        writer.sync_all().unwrap();
        late.write_all_at(b"XY", 9).unwrap();
        assert_eq!([whole(&reader), whole(&writer)], [b"012ab5678XY", b"012ab5678XY"]);
        drop(writer);
        late.set_len(4).unwrap();
        assert_eq!(whole(&reader), b"012a");
        drop(late);
        assert_eq!(whole(&reader), b"012a");
        assert_eq!(target.object("f"), b"012a", "the last writer's close publishes, whoever still reads");
        drop(reader);
        mount.unmount();
    });
}

#[test]
fn a_log_that_is_rotated_while_it_is_open_loses_no_line() {
    for_each_target("rotated", |target, mount| {
        let mut log = OpenOptions::new().append(true).create(true).open(mount.key("log")).unwrap();
        // Not published yet, and published, when it is moved.
        for name in ["log.2", "log.1"] {
            log.write_all(b"before\n").unwrap();
            if name == "log.1" {
                log.sync_all().unwrap();
            }
            std::fs::rename(mount.key("log"), mount.key(name)).unwrap();
            let next = OpenOptions::new().append(true).create(true).open(mount.key("log")).unwrap();
            let mut old = std::mem::replace(&mut log, next);
            old.write_all(b"after\n").unwrap();
            log.write_all(b"new\n").unwrap();
        }
        drop(log);
        assert_eq!(std::fs::read(mount.key("log.1")).unwrap(), b"new\nbefore\nafter\n");
        mount.unmount();
        for (key, content) in
            [("log.2", "before\nafter\n"), ("log.1", "new\nbefore\nafter\n"), ("log", "new\n")]
        {
            assert_eq!(String::from_utf8(target.object(key)).unwrap(), content, "{key}");
        }
    });
}

#[test]
fn a_changed_file_that_is_moved_is_never_missing_from_the_bucket() {
    for_each_target("moved", |target, mount| {
        std::fs::write(mount.key("f"), "old").unwrap();
        // Started before the file is open: whoever starts a program closes its copies of what it has open.
        let mut killer =
            command("sh").args(["-c", "read pid; kill -9 $pid"]).stdin(Stdio::piped()).spawn().unwrap();
        let pid = mount.pid();
        let file = both(&mount.key("f"));
        file.write_all_at(b"new", 0).unwrap();
        std::fs::rename(mount.key("f"), mount.key("g")).unwrap();
        assert!(!mount.key("f").exists());
        assert_eq!(whole(&file), b"new");
        writeln!(killer.stdin.take().unwrap(), "{pid}").unwrap();
        killer.wait().unwrap();
        until("the mount is dead", || std::fs::metadata(mount.key("g")).is_err());
        drop((file, mount));
        assert_eq!(target.object("g"), b"old", "whole, under one of its names");
    });
}

#[test]
fn a_new_file_that_is_moved_is_published_under_its_last_name_alone() {
    for_each_target("last-name", |target, mount| {
        let mut file = File::create(mount.key("f")).unwrap();
        file.write_all(b"bytes").unwrap();
        for name in ["g", "h"] {
            let from = if name == "g" { "f" } else { "g" };
            std::fs::rename(mount.key(from), mount.key(name)).unwrap();
        }
        drop(file);
        let mut names: Vec<_> =
            std::fs::read_dir(mount.key("")).unwrap().flatten().map(|e| e.file_name()).collect();
        names.retain(|name| !name.to_string_lossy().contains('.'));
        assert_eq!(names, ["h"]);
        mount.unmount();
        assert_eq!(target.object("h"), b"bytes");
    });
}

#[test]
fn an_unmount_right_after_the_close_loses_nothing() {
    for_each_target("unmounted", |target, mount| {
        let names: Vec<_> = (0..6).map(|number| format!("empty-{number}")).collect();
        for name in &names {
            File::create(mount.key(name)).unwrap();
        }
        let mut last = File::create(mount.key("last")).unwrap();
        last.write_all(b"bytes").unwrap();
        drop(last);
        mount.unmount();
        for name in &names {
            assert_eq!(target.object(name), b"", "{name}");
        }
        assert_eq!(target.object("last"), b"bytes");
    });
}

#[test]
fn a_check_that_fails_is_told_at_the_close_and_in_the_status() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::odd(&world.catalog());
    let image = world.out("k.qcow2");
    succeed(command("qemu-img").args(["convert", "-O", "qcow2"]).arg(&raw).arg(&image));
    let mount = world.mount(&[]);
    let mut file = File::create(mount.key("k.qcow2")).unwrap();
    file.write_all(&std::fs::read(&image).unwrap()).unwrap();
    // What the check reads cannot be opened.
    for staged in std::fs::read_dir(world.path("state/staging")).unwrap().flatten() {
        std::fs::remove_file(staged.path()).unwrap();
    }
    let closed = nix::unistd::close(file);
    assert!(closed.is_err(), "close says that nothing was published");
    assert_eq!(mount.status("k.qcow2")["status"], "FAIL");
    assert!(mount.log().contains("k.qcow2"), "{}", mount.log());
    assert!(!world.bucket().join("k.qcow2").exists());
    mount.unmount();
}

#[test]
fn what_killed_rsyncs_leave_is_bounded() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let mount = world.mount(&[]);
    // Any program of that name that makes a file under a temporary name and is gone before it renames it.
    let rsync = world.out("rsync");
    std::fs::copy("/bin/bash", &rsync).unwrap();
    let temporary = |number: usize| mount.key(&format!(".f.{number:06}"));
    for number in 0..40 {
        let write = "set -o noclobber; echo bytes > \"$1\"";
        succeed(command(&rsync).args(["-c", write, "rsync"]).arg(temporary(number)));
    }
    let left = || (0..40).filter(|&number| temporary(number).exists()).count();
    until("the oldest are given up", || left() <= 32);
    assert!(temporary(39).exists(), "the newest waits for its name");
    std::fs::rename(temporary(39), mount.key("f")).unwrap();
    assert_eq!(std::fs::read(mount.key("f")).unwrap(), b"bytes\n");
    mount.unmount();
    assert_eq!(std::fs::read(world.bucket().join("f")).unwrap(), b"bytes\n");
}

#[test]
fn a_client_token_names_one_request() {
    if !can_mount() || !has("setfattr") {
        return support::skip("client tokens: setfattr is missing");
    }
    let world = World::new();
    let raw = images::odd(&world.catalog());
    let token = |mount: &Mount, text: &str| {
        let name = ["-n", "user.freightfs.client_token", "-v", text];
        succeed(command("setfattr").args(name).arg(mount.key("k.raw")));
    };
    let copy =
        |mount: &Mount| run(command("cp").arg(mount.path("images/odd/odd.raw")).arg(mount.key("k.raw")));
    let version = |number: u8| {
        OpenOptions::new().write(true).open(&raw).unwrap().write_all_at(&[number; 512], 0).unwrap();
    };
    let mount = world.mount(&[]);
    std::fs::write(mount.key("k.raw"), "").unwrap();
    token(&mount, "one");
    assert!(copy(&mount).status.success());
    let first = mount.wait("k.raw");
    assert_eq!((&first["status"], &first["client_token"]), (&"SUCCESS".into(), &"one".into()));
    // A new version under no token, under the same one, and under another.
    version(2);
    let copied = copy(&mount);
    assert!(copied.status.success(), "{}", text(&copied));
    let second = mount.wait("k.raw");
    assert_eq!((&second["status"], &second["client_token"]), (&"SUCCESS".into(), &serde_json::Value::Null));
    version(3);
    token(&mount, "one");
    assert!(text(&copy(&mount)).contains("File exists"));
    token(&mount, "three");
    assert!(copy(&mount).status.success());
    let third = mount.wait("k.raw");
    assert_eq!((&third["status"], &third["client_token"]), (&"SUCCESS".into(), &"three".into()));
    mount.unmount();
    // The journal knows them.
    let mount = world.mount(&[]);
    let get = ["--only-values", "-n", "user.freightfs.client_token"];
    assert_eq!(succeed(command("getfattr").args(get).arg(mount.key("k.raw"))), "three");
    version(4);
    token(&mount, "three");
    assert!(text(&copy(&mount)).contains("File exists"));
    mount.unmount();
}
