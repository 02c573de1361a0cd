//! What the semantics page says: its examples are run as they stand, and its words on several programs and hosts hold.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use support::images::{self, Random};
use support::mount::Mount;
use support::proxied::until;
use support::targets::{Target, targets};
use support::{can_mount, command, run, text};

/// The examples of the page: what a user types after `$ `, and all that the terminal shows then.
fn examples() -> Vec<(String, String)> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/freightfs-semantics.7");
    let page = std::fs::read_to_string(page).unwrap();
    let mut examples: Vec<(String, String)> = Vec::new();
    for block in page.split("\n.EX\n").skip(1) {
        for line in block.split("\n.EE").next().unwrap().lines() {
            let line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\");
            match line.strip_prefix("$ ") {
                Some(typed) => examples.push((typed.to_owned(), String::new())),
                None => {
                    let shown = &mut examples.last_mut().unwrap().1;
                    *shown += &line;
                    shown.push('\n');
                }
            }
        }
    }
    examples
}

#[test]
fn the_examples_of_the_page_are_true() {
    if !can_mount() {
        return;
    }
    let examples = examples();
    assert!(examples.len() > 15, "{} examples", examples.len());
    for target in targets("examples") {
        std::fs::copy(images::odd(&target.world.path("out")), target.world.catalog().join("web.raw"))
            .unwrap();
        let mount = target.mount();
        for (typed, shown) in &examples {
            let shell = format!("cd {} && {{ {typed}; }} 2>&1", mount.path("").display());
            let output = run(command("bash").args(["-c", &shell]));
            assert_eq!(text(&output), *shown, "{}: $ {typed}", target.name);
        }
        mount.unmount();
    }
}

#[test]
fn two_programs_that_write_one_key_write_one_file() {
    if !can_mount() {
        return;
    }
    for target in targets("two") {
        let mount = target.mount();
        let mut expected = Random(1).bytes(200_000);
        let (one, two) = (
            File::create(mount.key("k")).unwrap(),
            File::options().write(true).open(mount.key("k")).unwrap(),
        );
        one.write_all_at(&expected[..100_000], 0).unwrap();
        two.write_all_at(&expected[100_000..], 100_000).unwrap();
        drop(one);
        // What the file held at that close is there; the other one goes on.
        two.write_all_at(b"later", 50_000).unwrap();
        expected[50_000..][..5].copy_from_slice(b"later");
        assert!(std::fs::read(mount.key("k")).unwrap() == expected, "a reader sees what was written");
        drop(two);
        // The last close is not waited for.
        run(support::freightfs().args(["wait", "--quiet"]).arg(mount.key("k")));
        assert!(target.object("k") == expected, "{}", target.name);
        mount.unmount();
    }
}

#[test]
fn many_programs_that_replace_one_key_leave_one_of_their_files() {
    if !can_mount() {
        return;
    }
    for target in targets("replace") {
        let mount = target.mount();
        let contents: Vec<_> = (0..4u64).map(|n| Random(n).bytes(300_000 + n as usize)).collect();
        for (index, content) in contents.iter().enumerate() {
            std::fs::write(target.world.out(&index.to_string()), content).unwrap();
        }
        std::thread::scope(|scope| {
            for index in 0..contents.len() {
                let (from, to) = (target.world.out(&index.to_string()), mount.key("k"));
                scope.spawn(move || {
                    for _ in 0..5 {
                        // rsync writes under a name of its own: whoever renames last has the key.
                        let copied = run(command("rsync").args(["-a", "--ignore-times"]).arg(&from).arg(&to));
                        assert!(copied.status.success(), "{}", text(&copied));
                    }
                });
            }
        });
        let object = target.object("k");
        assert!(contents.contains(&object), "{}: {} bytes of nobody", target.name, object.len());
        assert!(std::fs::read(mount.key("k")).unwrap() == object);
        mount.unmount();
    }
}

#[test]
fn a_listing_has_each_name_once_while_jobs_begin_and_end() {
    if !can_mount() {
        return;
    }
    for target in targets("listing") {
        images::noise(&target.world.catalog(), 9 << 20);
        let mount = target.mount();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let lister = scope.spawn(|| {
                let (mut listings, mut copied) = (0, std::collections::BTreeSet::new());
                while !stop.load(Ordering::SeqCst) {
                    let mut names: Vec<_> = std::fs::read_dir(mount.key(""))
                        .unwrap()
                        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                        .collect();
                    let all = names.len();
                    names.sort();
                    names.dedup();
                    assert_eq!(names.len(), all, "a name twice: {names:?}");
                    // From the copy's close on an object and its status are there, before and after the job's end.
                    let has_status = |name: &String| names.contains(&format!("{name}.status"));
                    for name in &copied {
                        assert!(
                            names.contains(name) && has_status(name),
                            "{name} or its status is away: {names:?}"
                        );
                    }
                    copied.extend(names.iter().filter(|n| n.ends_with(".raw") && has_status(n)).cloned());
                    listings += 1;
                }
                listings
            });
            for round in 0..8 {
                mount.cp(&mount.path("images/noise/noise.raw"), &format!("{round}.raw"));
                assert_eq!(mount.wait(&format!("{round}.raw"))["status"], "SUCCESS");
            }
            stop.store(true, Ordering::SeqCst);
            assert!(lister.join().unwrap() > 8);
        });
        mount.unmount();
    }
}

/// Replaces an object without the mount.
fn replace_behind(target: &Target, other: &Mount, key: &str, content: &[u8]) {
    if target.name == "local" {
        let new = target.world.bucket().join("new");
        std::fs::write(&new, content).unwrap();
        std::fs::rename(new, target.world.bucket().join(key)).unwrap();
    } else {
        std::fs::write(other.key(key), content).unwrap();
    }
}

#[test]
fn an_object_that_changes_behind_the_mounts_back_is_never_mixed() {
    if !can_mount() {
        return;
    }
    for target in targets("behind") {
        let mount = target.mount();
        // A second mount of the same bucket, on a world of its own, is the one who changes it.
        let other = target.other();
        let (old, new) = (Random(1).bytes(40 << 20), Random(2).bytes(30 << 20));
        std::fs::write(mount.key("k"), &old).unwrap();
        let mut reader = File::open(mount.key("k")).unwrap();
        let mut head = vec![0; 1000];
        reader.read_exact(&mut head).unwrap();
        assert!(head == old[..1000]);
        replace_behind(&target, &other.1, "k", &new);
        let mut rest = Vec::new();
        let error = reader.read_to_end(&mut rest).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{}", target.name);
        assert!(rest == old[1000..1000 + rest.len()], "{}: mixed bytes", target.name);
        // Opened again it is the new one, at once; its size within the time that attributes are kept.
        assert!(std::fs::read(mount.key("k")).unwrap() == new, "{}", target.name);
        until("the new size", || mount.key("k").metadata().unwrap().len() == new.len() as u64);
        drop(reader);
        other.1.unmount();
        mount.unmount();
    }
}
