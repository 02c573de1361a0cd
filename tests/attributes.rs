//! What is set on files: it belongs to the content that it was set for, whoever else writes, whatever fails.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use support::images::Random;
use support::mount::{Mount, World};
use support::proxied::{Setup, until};
use support::proxy::Fate;
use support::targets::targets;
use support::{assert_same, can_mount, command, fail, run, succeed};

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode()
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Two versions of a file, of one size and of times that differ.
fn versions(world: &World) -> [PathBuf; 2] {
    [1, 2].map(|version: u64| {
        let directory = world.out(&version.to_string());
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("f.bin");
        std::fs::write(&path, Random(version).bytes(100_000)).unwrap();
        let when = format!("2020-01-0{version}T00:00:00.5Z");
        succeed(command("touch").args(["-d", &when]).arg(&path));
        path
    })
}

/// A failed publication of v2 over v1 leaves v1 with its own time, so that the next copy sends v2.
fn check_failed_publication(world: &World, mount: &Mount, fail_next: impl Fn(bool)) {
    let [first, second] = versions(world);
    for copy in ["rsync", "cp"] {
        let arguments: &[&str] = if copy == "rsync" { &["-a"] } else { &["-pu"] };
        let send = |from: &Path| {
            let mut command = command(copy);
            command.args(arguments).arg(from).arg(mount.key("f.bin"));
            command
        };
        succeed(&mut send(&first));
        let before = mount.key("f.bin").metadata().unwrap();
        assert_eq!(before.mtime(), first.metadata().unwrap().mtime());
        fail_next(true);
        fail(&mut send(&second));
        fail_next(false);
        until("the object is what it was", || {
            mount.key("f.bin").metadata().is_ok_and(|now| now.mtime() == before.mtime())
        });
        assert_same(&mount.key("f.bin"), &first);
        succeed(&mut send(&second));
        assert_same(&mount.key("f.bin"), &second);
        std::fs::remove_file(mount.key("f.bin")).unwrap();
    }
}

#[test]
fn a_publication_that_failed_leaves_the_old_object_its_own_time() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let mount = world.mount(&["-o", "retries=0"]);
    let uploads = world.bucket().join(".freightfs/uploads");
    check_failed_publication(&world, &mount, |fails| {
        // Nothing can be uploaded where no directory is.
        let _ = std::fs::remove_dir_all(&uploads);
        if fails {
            std::fs::write(&uploads, "").unwrap()
        } else {
            std::fs::remove_file(&uploads).unwrap_or(())
        }
    });
    mount.unmount();
}

#[test]
fn a_publication_that_a_store_refused_leaves_the_old_object_its_own_time() {
    let fails = Arc::new(AtomicBool::new(false));
    let decide = Arc::clone(&fails);
    let Some(setup) = Setup::new("old-time", move |request| {
        let refused = request.method == "PUT"
            && request.target.contains("f.bin")
            && !request.target.contains(".status");
        if refused && decide.load(Ordering::SeqCst) { Fate::Answer(403) } else { Fate::Forward }
    }) else {
        return;
    };
    let mount = setup.mount(&[]);
    check_failed_publication(&setup.world, &mount, |on| fails.store(on, Ordering::SeqCst));
    mount.unmount();
}

#[test]
fn hosts_that_change_files_of_one_directory_keep_each_others_changes() {
    if !can_mount() {
        return;
    }
    for target in targets("documents") {
        let mount = target.mount();
        for name in ["a", "b", "c"] {
            std::fs::write(mount.key(name), name).unwrap();
        }
        let (_world, other) = target.other();
        // Both have read the directory's document, that there is none.
        let modes = |mount: &Mount| ["a", "b", "c"].map(|name| mode(&mount.key(name)) & 0o777);
        assert_eq!(modes(&mount), modes(&other));
        set_mode(&mount.key("a"), 0o600);
        set_mode(&other.key("b"), 0o640);
        mount.unmount();
        set_mode(&other.key("c"), 0o755);
        other.unmount();
        let mount = target.mount();
        assert_eq!(modes(&mount), [0o600, 0o640, 0o755], "{}", target.name);
        // And what is set back is forgotten for both.
        std::fs::remove_file(mount.key("a")).unwrap();
        std::fs::write(mount.key("a"), "new").unwrap();
        assert_eq!(modes(&mount), [0o644, 0o640, 0o755]);
        mount.unmount();
    }
}

#[test]
fn what_was_set_just_before_the_end_of_a_mount_is_saved() {
    let writes = Arc::new(AtomicUsize::new(0));
    let (seen, delay) = (Arc::clone(&writes), Arc::new(AtomicBool::new(false)));
    let slow = Arc::clone(&delay);
    let Some(setup) = Setup::new("saved", move |request| {
        let is_save = request.method == "PUT" && request.target.contains("attributes");
        seen.fetch_add(usize::from(is_save), Ordering::SeqCst);
        if is_save && slow.load(Ordering::SeqCst) { Fate::Delay(700) } else { Fate::Forward }
    }) else {
        return;
    };
    let mut mount = setup.mount(&[]);
    std::fs::write(mount.key("f"), "content").unwrap();
    delay.store(true, Ordering::SeqCst);
    for (round, new) in [0o600, 0o640, 0o604].into_iter().enumerate() {
        let before = writes.load(Ordering::SeqCst);
        set_mode(&mount.key("f"), new);
        // The end comes at once, or while it is being saved.
        if round > 0 {
            until("it is being saved", || writes.load(Ordering::SeqCst) > before);
        }
        match round {
            1 => mount.signal("TERM"),
            _ => mount.unmount(),
        }
        mount = setup.mount(&[]);
        assert_eq!(mode(&mount.key("f")) & 0o777, new, "round {round}");
    }
    mount.unmount();
}

#[test]
fn attributes_of_a_running_export_survive_the_daemon() {
    let Some(setup) =
        Setup::new("running", |request| if request.is_part() { Fate::Delay(400) } else { Fate::Forward })
    else {
        return;
    };
    support::images::noise(&setup.world.catalog(), 64 << 20);
    let mount = setup.mount(&[]);
    let image = mount.path("images/noise/noise.raw");
    succeed(command("cp").arg("-p").arg(&image).arg(mount.key("noise.raw")));
    set_mode(&mount.key("noise.raw"), 0o600);
    let expected = image.metadata().unwrap().mtime();
    until("they are saved", || {
        let answered = setup.proxy.answered();
        answered.iter().any(|(request, _)| request.method == "PUT" && request.target.contains("attributes"))
    });
    setup.kill(mount);
    let mount = setup.mount(&[]);
    assert_eq!(mount.wait("noise.raw")["status"], "SUCCESS");
    let found = mount.key("noise.raw").metadata().unwrap();
    assert_eq!((found.mtime(), found.mode() & 0o777), (expected, 0o600));
    mount.unmount();
}

#[test]
fn files_and_directories_have_the_mode_that_they_were_created_with() {
    if !can_mount() {
        return;
    }
    for target in targets("created") {
        let mount = target.mount();
        let create = |name: &str, mode: u32| {
            let mut options = File::options();
            options.write(true).create_new(true).mode(mode).open(mount.key(name)).unwrap()
        };
        let mut secret = create("secret", 0o600);
        assert_eq!(secret.metadata().unwrap().mode() & 0o7777, 0o600, "while it is written");
        secret.write_all(b"secret").unwrap();
        drop(secret);
        drop(create("script", 0o777));
        std::fs::DirBuilder::new().mode(0o700).create(mount.key("private")).unwrap();
        // A store has no directory without a file.
        let line = "echo x > private/x; umask 077; echo x > masked; mkdir masked-d; echo x > masked-d/x; umask 0; echo x > open";
        support::sh(&format!("cd {} && {line}", mount.key("").display()));
        // An existing file keeps its mode when it is written anew, whatever the writer's umask.
        support::sh(&format!("umask 0; echo again > {}", mount.key("secret").display()));
        let modes = |mount: &Mount| {
            ["secret", "script", "private", "masked", "masked-d", "open"]
                .map(|name| mode(&mount.key(name)) & 0o7777)
        };
        // What the umask of the test's own process leaves.
        let elsewhere = target.world.out("script");
        File::options().write(true).create_new(true).mode(0o777).open(&elsewhere).unwrap();
        let own = mode(&elsewhere) & 0o7777;
        let expected = [0o600, own, 0o700, 0o600, 0o700, 0o666];
        assert_eq!(modes(&mount), expected, "{}", target.name);
        mount.unmount();
        let mount = target.mount();
        assert_eq!(modes(&mount), expected, "{}: in the next mount", target.name);
        mount.unmount();
    }
}

#[test]
fn the_change_time_moves_when_attributes_and_names_change_and_never_back() {
    if !can_mount() {
        return;
    }
    for target in targets("ctime") {
        let mount = target.mount();
        let file = mount.key("f");
        std::fs::write(&file, "content").unwrap();
        let changed = |path: &Path| {
            let found = path.metadata().unwrap();
            (found.ctime(), found.ctime_nsec())
        };
        let mut last = changed(&file);
        let mut moved = |what: &str, path: &Path| {
            let now = changed(path);
            assert!(now > last, "{}: {what}: {now:?} after {last:?}", target.name);
            last = now;
        };
        set_mode(&file, 0o600);
        moved("chmod", &file);
        succeed(command("touch").args(["-d", "2001-01-01"]).arg(&file));
        assert_eq!(file.metadata().unwrap().mtime(), 978_307_200);
        moved("utimes", &file);
        let other = mount.key("g");
        std::fs::rename(&file, &other).unwrap();
        moved("rename", &other);
        assert_eq!(other.metadata().unwrap().mtime(), 978_307_200);
        mount.unmount();
    }
}

#[test]
fn attributes_that_somebody_wrote_into_the_bucket_make_a_file_nothing_else() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let mount = world.mount(&[]);
    for name in ["link", "plain", "odd"] {
        std::fs::write(mount.key(name), name).unwrap();
    }
    set_mode(&mount.key("plain"), 0o640);
    mount.unmount();
    let documents = world.bucket().join(".freightfs/attributes");
    let document = std::fs::read_dir(&documents).unwrap().next().unwrap().unwrap().path();
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&document).unwrap()).unwrap();
    json["files"]["link"] =
        serde_json::json!({ "mode": 0o120_777, "xattrs": { "security.capability": "00" } });
    json["files"]["odd"] = serde_json::json!({ "mode": "no number" });
    json["pending"] = serde_json::json!({ "new": { "job": "of nobody here", "mode": 0o777 } });
    std::fs::write(&document, serde_json::to_vec(&json).unwrap()).unwrap();
    let mount = world.mount(&[]);
    std::fs::write(mount.key("new"), "new").unwrap();
    assert_eq!(mode(&mount.key("new")) & 0o777, 0o644, "another host's job gives its attributes");
    let link = mount.key("link").symlink_metadata().unwrap();
    assert!(link.is_file(), "{link:?}");
    assert_eq!(link.mode() & 0o7777, 0o777);
    let names = run(command("getfattr").args(["-m", "-"]).arg(mount.key("link")));
    assert!(!support::text(&names).contains("security.capability"));
    assert_eq!((mode(&mount.key("plain")) & 0o777, mode(&mount.key("odd")) & 0o777), (0o640, 0o644));
    mount.unmount();

    // What a later version wrote is neither used nor replaced.
    json["version"] = 2.into();
    let later = serde_json::to_vec(&json).unwrap();
    std::fs::write(&document, &later).unwrap();
    let mount = world.mount(&[]);
    assert_eq!(mode(&mount.key("plain")) & 0o777, 0o644);
    let refused = std::fs::set_permissions(mount.key("plain"), std::fs::Permissions::from_mode(0o600));
    assert!(refused.is_err());
    mount.unmount();
    assert_eq!(std::fs::read(&document).unwrap(), later);
}

#[test]
fn what_is_set_while_a_file_is_being_published_is_not_lost() {
    if !can_mount() {
        return;
    }
    let world = World::in_memory();
    let mount = world.mount(&[]);
    // The kernel tells of the last close when it likes: the file is published before, during or after what is set.
    let set = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for number in 0..1000 {
        let file = mount.key(&format!("{number}"));
        drop(std::fs::File::create_new(&file).unwrap());
        std::fs::File::open(&file).unwrap().set_modified(set).unwrap();
        assert_eq!(file.metadata().unwrap().modified().unwrap(), set, "file {number}");
    }
    mount.unmount();
    let mount = world.mount(&[]);
    for number in 0..1000 {
        let file = mount.key(&format!("{number}"));
        assert_eq!(file.metadata().unwrap().modified().unwrap(), set, "file {number} at the next mount");
    }
    mount.unmount();
}
