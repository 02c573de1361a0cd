//! Status and checksum files beside objects: who has them, and what becomes of them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::time::{Duration, SystemTime};

use support::mount::Mount;
use support::proxied::until;
use support::targets::targets;
use support::{can_mount, command, freightfs, has, images, run, succeed, text};

/// Files below a directory, as paths relative to it.
fn tree(path: &Path) -> Vec<String> {
    let found = succeed(command("find").arg(path).args(["-type", "f", "-printf", "%P\\n"]));
    let mut names: Vec<_> = found.lines().map(str::to_owned).collect();
    names.sort();
    names
}

fn with_sidecars(name: &str) -> Vec<String> {
    ["", ".md5", ".sha256", ".status"].map(|suffix| format!("{name}{suffix}")).to_vec()
}

fn export(mount: &Mount, key: &str) {
    mount.cp(&mount.path("images/noise/noise.vhd"), key);
    assert_eq!(mount.wait(key)["status"], "SUCCESS");
}

#[test]
fn files_whose_names_end_like_a_disk_format_have_sidecars_and_no_others_do() {
    if !can_mount() {
        return;
    }
    for target in targets("who-has") {
        images::noise(&target.world.catalog(), 1 << 20);
        let mount = target.mount();
        for name in ["notes.txt", "data", "k.md5", "k.status"] {
            std::fs::write(mount.key(name), name).unwrap();
        }
        // Whoever writes it.
        std::fs::copy(target.world.catalog().join("noise.raw"), mount.key("plain.raw")).unwrap();
        export(&mount, "image.vhd");
        let mut expected = ["data", "k.md5", "k.status", "notes.txt"].map(str::to_owned).to_vec();
        expected.extend(["image.vhd", "plain.raw"].into_iter().flat_map(with_sidecars));
        expected.sort();
        assert_eq!(tree(&mount.key("")), expected, "{}", target.name);
        // The state of the others is in the jobs, where the commands and an extended attribute find it.
        let status = mount.status("notes.txt");
        assert_eq!((&status["status"], &status["size"]), (&"SUCCESS".into(), &9.into()));
        let wait = run(freightfs().args(["wait", "--quiet"]).arg(mount.key("notes.txt")));
        assert!(wait.status.success(), "{}", text(&wait));
        if has("getfattr") {
            let mut getfattr = command("getfattr");
            getfattr.args(["--only-values", "-n", "user.freightfs.status"]).arg(mount.key("notes.txt"));
            let shown: serde_json::Value = serde_json::from_str(&succeed(&mut getfattr)).unwrap();
            assert_eq!(shown["job_id"], status["job_id"]);
        }
        assert_eq!(std::fs::read_to_string(mount.key("k.status")).unwrap(), "k.status");
        mount.unmount();
        let mount = target.mount_with(&["-o", "sidecars"]);
        std::fs::write(mount.key("notes.txt"), "again").unwrap();
        assert!(with_sidecars("notes.txt").iter().all(|name| mount.key(name).exists()), "{}", target.name);
        succeed(command("sha256sum").args(["-c", "notes.txt.sha256"]).current_dir(mount.key("")));
        mount.unmount();
    }
}

#[test]
fn an_equal_export_under_the_old_name_of_a_rename_stays_when_the_end_of_that_was_not_recorded() {
    if !can_mount() {
        return;
    }
    // A raw file does not depend on when its source was made.
    let export = |mount: &Mount| {
        mount.cp(&mount.path("images/noise/noise.raw"), "k.raw");
        assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
    };
    let seconds = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    for mut target in targets("again") {
        images::noise(&target.world.catalog(), 1 << 20);
        target.world.environment.push(("FREIGHTFS_FAILPOINT".to_owned(), "move-end:1:kill".to_owned()));
        let mount = target.mount();
        export(&mount);
        let exported = seconds();
        run(command("mv").arg(mount.key("k.raw")).arg(mount.key("moved.raw")));
        until("the daemon's end", || target.world.is_dead());
        drop(mount);
        target.world.environment.pop();
        // Stores count seconds.
        while seconds() <= exported {
            std::thread::sleep(Duration::from_millis(50));
        }
        let (other, mount) = target.other();
        images::noise(&other.catalog(), 1 << 20);
        export(&mount);
        mount.unmount();
        target.mount().unmount();
        let mount = target.mount();
        assert_eq!(
            tree(&mount.key("")),
            [with_sidecars("k.raw"), with_sidecars("moved.raw")].concat(),
            "{}",
            target.name
        );
        for name in ["k.raw", "moved.raw"] {
            succeed(command("sha256sum").arg("-c").arg(format!("{name}.sha256")).current_dir(mount.key("")));
            assert_eq!(mount.status(name)["status"], "SUCCESS");
        }
        mount.unmount();
    }
}

#[test]
fn sidecars_go_and_are_renamed_with_their_object() {
    if !can_mount() {
        return;
    }
    for target in targets("go-along") {
        images::noise(&target.world.catalog(), 1 << 20);
        let mount = target.mount();
        std::fs::create_dir(mount.key("d")).unwrap();
        export(&mount, "d/k.vhd");
        succeed(command("mv").arg(mount.key("d/k.vhd")).arg(mount.key("d/moved.vhd")));
        assert_eq!(tree(&mount.key("d")), with_sidecars("moved.vhd"), "{}", target.name);
        succeed(command("sha256sum").args(["-c", "moved.vhd.sha256"]).current_dir(mount.key("d")));
        let status = mount.status("d/moved.vhd");
        assert_eq!((&status["status"], &status["key"]), (&"SUCCESS".into(), &"d/moved.vhd".into()));
        // Over an export, whose sidecars would be wrong; and to a name that has none.
        export(&mount, "d/old.vhd");
        std::fs::write(mount.key("d/plain"), "plain").unwrap();
        succeed(command("mv").arg(mount.key("d/moved.vhd")).arg(mount.key("d/old.vhd")));
        assert_eq!(mount.status("d/old.vhd")["key"], "d/old.vhd");
        succeed(command("mv").arg(mount.key("d/plain")).arg(mount.key("d/old.vhd")));
        assert_eq!(tree(&mount.key("d")), ["old.vhd"], "{}", target.name);
        std::fs::remove_file(mount.key("d/old.vhd")).unwrap();
        export(&mount, "d/k.vhd");
        std::fs::remove_file(mount.key("d/k.vhd")).unwrap();
        std::fs::remove_dir(mount.key("d")).unwrap();
        // What a user wrote at such a place stays.
        std::fs::create_dir(mount.key("d")).unwrap();
        std::fs::write(mount.key("d/k.vhd.md5"), "my notes").unwrap();
        export(&mount, "d/k.vhd");
        std::fs::remove_file(mount.key("d/k.vhd")).unwrap();
        assert_eq!(tree(&mount.key("d")), ["k.vhd.md5"], "{}", target.name);
        assert_eq!(std::fs::read_to_string(mount.key("d/k.vhd.md5")).unwrap(), "my notes");
        export(&mount, "d/k.vhd");
        succeed(command("rm").arg("-r").arg(mount.key("d")));
        assert_eq!(tree(&mount.key("")), Vec::<String>::new());
        mount.unmount();
    }
}

#[test]
fn copies_of_directories_succeed_and_have_no_sidecars_of_sidecars() {
    if !can_mount() {
        return;
    }
    for target in targets("copies") {
        images::noise(&target.world.catalog(), 1 << 20);
        let mount = target.mount();
        std::fs::create_dir_all(mount.key("d/e")).unwrap();
        for name in ["d/a", "d/b.txt", "d/e/c"] {
            std::fs::write(mount.key(name), name).unwrap();
        }
        export(&mount, "d/k.vhd");
        let before = tree(&mount.key("d"));
        let copy = |program: &str, words: &[&str], to: &str| {
            let output = run(command(program).args(words).current_dir(mount.key("")));
            assert!(output.status.success(), "{}: {program} {words:?}: {}", target.name, text(&output));
            assert_eq!(tree(&mount.key(to)), before, "{}: {program}", target.name);
            succeed(command("cmp").arg(mount.key("d/k.vhd")).arg(mount.key(to).join("k.vhd")));
            succeed(command("sha256sum").args(["-c", "k.vhd.sha256"]).current_dir(mount.key(to)));
        };
        copy("cp", &["-r", "d", "copied"], "copied");
        copy("cp", &["-a", "d", "archived"], "archived");
        copy("rsync", &["-a", "d/", "synced"], "synced");
        copy("rsync", &["-a", "d/", "synced"], "synced");
        mount.unmount();
    }
}

#[test]
fn git_works_in_a_bucket() {
    if !can_mount() {
        return;
    }
    if !has("git") {
        return support::skip("git in a bucket: git is missing");
    }
    for target in targets("git") {
        let mount = target.mount();
        let script = "git init -q -b main r && cd r && git config user.name n && git config user.email e@x && \
                      echo one > a && mkdir d && echo two > d/b && git add . && git commit -q -m first && \
                      echo three >> a && git commit -q -a -m second && git fsck --strict && git status --porcelain && \
                      git log --oneline | wc -l && git gc -q && git fsck --strict && git clone -q . ../clone";
        let output = run(command("bash").args(["-c", script]).current_dir(mount.key("")));
        assert!(output.status.success(), "{}: {}", target.name, text(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "2", "{}: {}", target.name, text(&output));
        assert_eq!(std::fs::read_to_string(mount.key("clone/a")).unwrap(), "one\nthree\n");
        mount.unmount();
    }
}
