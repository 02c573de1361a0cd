//! Copies into a bucket that go wrong: programs killed, stores that fail, refuse, cut and are slow.
//!
//! The program fails wherever it can know; the object that was there stays; the status says what happened; nothing
//! is left at the store.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::mount::Mount;
use support::proxied::{Setup, until};
use support::proxy::{Fate, Request};
use support::s3::uploads;
use support::{assert_same, command, images, run, text};

const OLD: &[u8] = b"the old object";

/// Counts the parts of uploads, and lets them have a fate from a number on.
#[derive(Clone)]
struct Parts {
    seen: Arc<AtomicUsize>,
    from: Arc<AtomicUsize>,
    to: Arc<AtomicUsize>,
}

impl Parts {
    fn new() -> Self {
        let number = |n| Arc::new(AtomicUsize::new(n));
        Self { seen: number(0), from: number(usize::MAX), to: number(usize::MAX) }
    }

    /// The next parts but `skipped` are hit, `count` of them.
    fn hit(&self, skipped: usize, count: usize) {
        let first = self.seen.load(Ordering::SeqCst) + skipped;
        self.from.store(first, Ordering::SeqCst);
        self.to.store(first.saturating_add(count), Ordering::SeqCst);
    }

    fn is_hit(&self, request: &Request) -> bool {
        if !request.is_part() {
            return false;
        }
        let number = self.seen.fetch_add(1, Ordering::SeqCst);
        (self.from.load(Ordering::SeqCst)..self.to.load(Ordering::SeqCst)).contains(&number)
    }
}

/// A qcow2 file of 40 MiB of noise outside the mount.
fn source(setup: &Setup) -> std::path::PathBuf {
    let raw = images::noise(&setup.world.path("out"), 40 << 20);
    images::qcow2(&raw, "new.qcow2", &[])
}

fn start(program: &str, arguments: &[&str], from: &Path, to: &Path) -> Child {
    let mut program = Command::new(program);
    program.args(arguments).arg(from).arg(to).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    run(command("kill").args([format!("-{name}"), child.id().to_string()]));
}

/// The object is what it was, for S3 clients and in the mount, and nothing else is left at the store.
fn assert_intact(setup: &Setup, mount: &Mount, key: &str) {
    let old = setup.world.out("old");
    std::fs::write(&old, OLD).unwrap();
    assert_same(&setup.fetch(key), &old);
    assert_same(&mount.key(key), &old);
    until("nothing is left", || uploads(&setup.endpoint, &setup.bucket).trim() == "None");
}

#[test]
fn killed_copies_leave_the_old_object_and_say_so() {
    let parts = Parts::new();
    let hit = parts.clone();
    let decide = move |request: &Request| if hit.is_hit(request) { Fate::Delay(300) } else { Fate::Forward };
    let Some(setup) = Setup::new("killed", decide) else { return };
    let source = source(&setup);
    let mount = setup.mount(&[]);
    let mut cut = 0;
    for (program, arguments) in
        [("cp", &[][..]), ("rsync", &["-a", "--bwlimit=20m"]), ("rsync", &["--inplace", "--bwlimit=20m"])]
    {
        for signal_name in ["INT", "KILL"] {
            for after in [0, 1, 3] {
                let key = format!("{program}-{}-{signal_name}-{after}.qcow2", arguments.len());
                std::fs::write(mount.key(&key), OLD).unwrap();
                parts.hit(0, usize::MAX);
                let first = parts.seen.load(Ordering::SeqCst);
                let mut child = start(program, arguments, &source, &mount.key(&key));
                let copied = |n| parts.seen.load(Ordering::SeqCst) >= first + n;
                until("parts, or the end", || copied(after) || child.try_wait().unwrap().is_some());
                signal(&child, signal_name);
                let ended = child.wait().unwrap();
                parts.hit(usize::MAX / 2, 0);
                if ended.success() {
                    println!("{key}: faster than the signal");
                    assert_same(&setup.fetch(&key), &source);
                    continue;
                }
                // The kernel does not wait for the last close.
                until("the end of the job", || {
                    let job = mount.key(&format!("{key}.status"));
                    let status = std::fs::read_to_string(job).unwrap_or_default();
                    !status.contains("\"INIT\"") && !status.contains("\"RUNNING\"")
                });
                let published = setup.fetch(&key);
                if std::fs::read(&published).unwrap() == std::fs::read(&source).unwrap() {
                    println!("{key}: complete when killed");
                    assert_eq!(mount.wait(&key)["status"], "SUCCESS");
                    continue;
                }
                assert_intact(&setup, &mount, &key);
                cut += 1;
                if !arguments.contains(&"-a") && after > 0 {
                    let status = mount.status(&key);
                    assert_eq!(status["error"]["code"], "incomplete", "{key}: {status}");
                }
            }
        }
    }
    assert!(cut >= 6, "only {cut} of 18 copies were cut off in the middle");
    mount.unmount();
    setup.assert_no_upload_is_left();
}

#[test]
fn what_a_store_does_once_is_tried_again_and_what_it_goes_on_with_is_told() {
    let parts = Parts::new();
    let (hit, fate) = (parts.clone(), Arc::new(std::sync::Mutex::new(Fate::Forward)));
    let chosen = Arc::clone(&fate);
    let decide =
        move |request: &Request| if hit.is_hit(request) { *chosen.lock().unwrap() } else { Fate::Forward };
    let Some(setup) = Setup::new("faults", decide) else { return };
    let source = source(&setup);
    std::fs::copy(setup.world.path("out").join("noise.raw"), setup.world.catalog().join("image.raw"))
        .unwrap();
    let mount = setup.mount(&["-o", "wait,formats=raw"]);
    let image = mount.path("images/image/image.raw");
    let copies: [(&str, &str, &[&str], &Path); 4] = [
        ("export.raw", "cp", &[], &image),
        ("cp.qcow2", "cp", &[], &source),
        ("rsync.qcow2", "rsync", &["-a"], &source),
        ("inplace.qcow2", "rsync", &["--inplace"], &source),
    ];
    for (key, program, arguments, from) in copies {
        for fault in [Fate::Answer(500), Fate::Answer(503), Fate::Cut, Fate::CutAnswer, Fate::Delay(500)] {
            *fate.lock().unwrap() = fault;
            parts.hit(2, 1);
            let to = mount.key(&format!("once-{key}"));
            let copied = run(command(program).args(arguments).arg(from).arg(to));
            assert!(copied.status.success(), "{key}, {fault:?}: {}", text(&copied));
            assert_same(&setup.fetch(&format!("once-{key}")), from);
        }
        // Refused for good.
        *fate.lock().unwrap() = Fate::Answer(403);
        std::fs::write(mount.key(key), OLD).unwrap();
        parts.hit(2, usize::MAX);
        let copied = run(command(program).args(arguments).arg(from).arg(mount.key(key)));
        parts.hit(usize::MAX / 2, 0);
        assert!(!copied.status.success(), "{key}: the refusal is lost");
        let errors = ["Permission denied", "Input/output error"];
        assert!(errors.iter().any(|error| text(&copied).contains(error)), "{key}: {}", text(&copied));
        let status = mount.status(key);
        assert_eq!(status["status"], "FAIL", "{key}: {status}");
        assert_eq!(status["error"]["code"], "permission_denied", "{key}: {status}");
        assert_intact(&setup, &mount, key);
        // And the same again when the store is well.
        let copied = run(command(program).args(arguments).arg(from).arg(mount.key(key)));
        assert!(copied.status.success(), "{key}: {}", text(&copied));
        assert_same(&setup.fetch(key), from);
    }
    mount.unmount();
    setup.assert_no_upload_is_left();
}

/// One fault at the nth request of an export, for every n: the right object and SUCCESS, or the old object, FAIL and
/// the reason.
#[test]
fn a_fault_at_any_request_makes_no_wrong_object() {
    let asked = Arc::new(AtomicUsize::new(0));
    let chosen = Arc::new(std::sync::Mutex::new((usize::MAX, Fate::Forward)));
    let (counter, choice) = (Arc::clone(&asked), Arc::clone(&chosen));
    let decide = move |request: &Request| {
        // What other parts of the mount ask for is not counted: look-ups of names by the test itself.
        if !request.target.contains("k-") || request.target.contains("prefix=") {
            return Fate::Forward;
        }
        let number = counter.fetch_add(1, Ordering::SeqCst);
        let (hit, fate) = *choice.lock().unwrap();
        if number == hit { fate } else { Fate::Forward }
    };
    let Some(setup) = Setup::new("nth", decide) else { return };
    let raw = images::noise(&setup.world.catalog(), 17 << 20);
    let mount = setup.mount(&["-o", "formats=raw,timeout=1,retries=0"]);
    let image = mount.path("images/noise/noise.raw");
    let faults =
        [Fate::Answer(403), Fate::Answer(503), Fate::Cut, Fate::CutAnswer, Fate::WrongEtag, Fate::Hang];
    let (mut failed, mut copies, mut requests) = (0, 0, usize::MAX);
    for fault in faults {
        let mut n = 0;
        while n < requests {
            let key = format!("k-{}-{n}", format!("{fault:?}").replace(['(', ')'], "").to_lowercase());
            std::fs::write(mount.key(&key), OLD).unwrap();
            *chosen.lock().unwrap() = (asked.load(Ordering::SeqCst) + n, fault);
            let first = asked.load(Ordering::SeqCst);
            let copied = run(command("cp").arg(&image).arg(mount.key(&key)));
            // The jobs of the mount are looked at without a request to the store.
            until("the end of the job", || {
                let jobs = text(&run(support::freightfs().arg("jobs").arg(mount.path("jobs"))));
                !jobs.contains(&key)
            });
            *chosen.lock().unwrap() = (usize::MAX, Fate::Forward);
            let status = if copied.status.success() { mount.wait(&key) } else { serde_json::Value::Null };
            // The first copy is hit by nothing that matters, and counts the requests.
            if requests == usize::MAX {
                requests = asked.load(Ordering::SeqCst) - first;
                assert!((8..40).contains(&requests), "{requests} requests");
            }
            let object = std::fs::read(setup.fetch(&key)).unwrap();
            if status["status"] == "SUCCESS" {
                assert!(object == std::fs::read(&raw).unwrap(), "{key}: not what SUCCESS says");
            } else {
                failed += 1;
                let told = status.is_null() || status["error"]["details"].is_string();
                assert!(told, "{key}: {status}");
                // A store that gave a wrong tag has the right object all the same.
                let right = fault == Fate::WrongEtag && object == std::fs::read(&raw).unwrap();
                assert!(right || object == OLD, "{key}: a failed job touched the object: {status}");
            }
            copies += 1;
            n += 1;
        }
    }
    assert!(failed >= 4 && failed < copies / 2, "{failed} of {copies} failed");
    mount.unmount();
    // Where the answer to the start of an upload was lost, nobody knows its id.
    let left = uploads(&setup.endpoint, &setup.bucket);
    assert!(left.lines().all(|line| line.contains("k-cutanswer-")), "{left}");
}
