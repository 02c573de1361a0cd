//! Several daemons on one bucket: each export is done by one of them, and taken over when that one is gone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use sha2::Digest;
use support::mount::{Mount, World};
use support::proxied::until;
use support::proxy::{Fate, Proxy, Request};
use support::s3::{self, endpoint, uploads};
use support::{assert_same, can_mount, command, fail, images, run, sh, sha256};

const PART: usize = 8 << 20;

/// Hosts with copies of one catalog, and one bucket behind a proxy.
struct Hosts {
    worlds: Vec<World>,
    proxy: Proxy,
    endpoint: String,
    bucket: String,
}

impl Hosts {
    fn new(name: &str, decide: impl FnMut(&Request) -> Fate + Send + 'static) -> Option<Self> {
        let (Some(endpoint), true) = (endpoint(), can_mount()) else { return None };
        let bucket = format!("{name}-{}", std::process::id());
        let proxy = Proxy::start(&endpoint, decide);
        let mut worlds = vec![s3::world(&endpoint, &bucket), World::new(), World::new()];
        worlds[0].environment[0].1 = proxy.url();
        let environment = worlds[0].environment.clone();
        let first = images::noise(&worlds[0].catalog(), 4 * PART + 5);
        for world in &mut worlds[1..] {
            world.environment.clone_from(&environment);
            // Other inodes, the same time: what two hosts have after rsync -a.
            sh(&format!("cp -p {} {}/", first.display(), world.catalog().display()));
        }
        Some(Self { worlds, proxy, endpoint, bucket })
    }

    fn arguments(&self) -> [String; 4] {
        let bucket = format!("b=s3://{}", self.bucket);
        ["--bucket".into(), bucket, "-o".into(), "shared,lease=4,formats=raw:stream.vmdk".into()]
    }

    fn mount(&self, host: usize) -> Mount {
        self.worlds[host].mount_exactly(&self.arguments().each_ref().map(String::as_str))
    }

    fn parts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        let parts = self.proxy.answered();
        for (request, _) in
            parts.iter().filter(|(r, status)| r.is_part() && *status == 200 && !r.target.contains("probe"))
        {
            *counts.entry(request.target.split("&uploadId").next().unwrap().to_owned()).or_default() += 1;
        }
        counts
    }

    fn object(&self, key: &str) -> std::path::PathBuf {
        let got = self.worlds[0].out("got");
        std::fs::write(&got, s3::get(&self.endpoint, &self.bucket, key)).unwrap();
        got
    }

    fn source(&self) -> std::path::PathBuf {
        self.worlds[0].catalog().join("noise.raw")
    }
}

fn copy(mount: &Mount, format: &str, key: &str) {
    let from = mount.path(&format!("images/noise/noise.{format}"));
    let cp = || run(command("cp").arg(&from).arg(mount.key(key)));
    let first = cp();
    // cp finds no file, and cannot create the one that another host has completed since.
    let raced = support::text(&first).contains("File exists");
    let copied = if raced { cp() } else { first };
    assert!(copied.status.success(), "{key}: {}", support::text(&copied));
}

/// The numbers of the parts that a heartbeat tells of.
fn parts_in_beat(beat: &[u8]) -> Vec<u64> {
    let beat: serde_json::Value = serde_json::from_slice(beat).unwrap_or_default();
    let log = beat["upload"].as_str().unwrap_or_default().lines();
    let part = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["part"]["index"].as_u64();
    log.filter_map(part).map(|index| index + 1).collect()
}

/// Waits until the job of a key has ended on a host, by its own list of jobs.
fn ended(mount: &Mount, key: &str) {
    until("the end of the job", || {
        let jobs = run(support::freightfs().arg("jobs").arg(mount.path("jobs")));
        !support::text(&jobs).contains(key)
    });
}

#[test]
fn the_same_copies_on_three_hosts_upload_once() {
    let Some(hosts) = Hosts::new("three", |_| Fate::Forward) else { return };
    let mounts: Vec<_> = (0..3).map(|host| hosts.mount(host)).collect();
    let keys: Vec<_> = (0..20).map(|n| format!("{n:02}.{}", ["raw", "stream.vmdk"][n % 2])).collect();
    std::thread::scope(|scope| {
        for (host, mount) in mounts.iter().enumerate() {
            let mut keys = keys.clone();
            keys.rotate_left(host * 7);
            scope.spawn(move || {
                for key in &keys {
                    copy(mount, key.split_once('.').unwrap().1, key);
                }
                for key in &keys {
                    ended(mount, key);
                }
            });
        }
    });
    let parts = hosts.parts();
    assert!(parts.len() >= 100 && parts.values().all(|&count| count == 1), "{parts:?}");
    for key in &keys {
        let status = mounts[0].status(key);
        assert_eq!(status["status"], "SUCCESS", "{status}");
        assert_eq!(status["sha256"], sha256(&hosts.object(key)));
        if key.ends_with(".raw") {
            assert_same(&hosts.object(key), &hosts.source());
        }
        for mount in &mounts[1..] {
            assert_eq!(mount.status(key), status, "{key}");
        }
    }
    assert_eq!(uploads(&hosts.endpoint, &hosts.bucket).trim(), "None");
    // Once more, on a host that did nothing of it: nothing is sent.
    copy(&mounts[2], "raw", "00.raw");
    ended(&mounts[2], "00.raw");
    assert_eq!(hosts.parts(), parts);
    assert_eq!(mounts[2].status("00.raw")["status"], "SUCCESS");
    mounts.into_iter().for_each(Mount::unmount);
}

#[test]
fn the_job_of_a_killed_host_is_taken_over_where_it_was() {
    let slow = Arc::new(AtomicU64::new(400));
    let delay = Arc::clone(&slow);
    let decide = move |request: &Request| {
        if request.is_part() { Fate::Delay(delay.load(Ordering::SeqCst)) } else { Fate::Forward }
    };
    let Some(hosts) = Hosts::new("taken-over", decide) else { return };
    let (first, second) = (hosts.mount(0), hosts.mount(1));
    slow.store(4000, Ordering::SeqCst);
    copy(&first, "raw", "k.raw");
    until("the first host's status", || first.key("k.raw.status").exists());
    copy(&second, "raw", "k.raw");
    // A heartbeat has told of parts.
    let hash = hex::encode(sha2::Sha256::digest("k.raw"));
    let beat = format!(".freightfs/leases/{}/0000000001.beat", &hash[..32]);
    let mut known = Vec::new();
    until("parts in the heartbeat", || {
        let beat = s3::find(&hosts.endpoint, &hosts.bucket, &beat).unwrap_or_default();
        known = parts_in_beat(&beat);
        !known.is_empty()
    });
    slow.store(0, Ordering::SeqCst);
    first.signal("KILL");
    ended(&second, "k.raw");
    let status = second.status("k.raw");
    assert_eq!(status["status"], "SUCCESS", "{status}\n{}", second.log());
    assert_same(&hosts.object("k.raw"), &hosts.source());
    assert_eq!(uploads(&hosts.endpoint, &hosts.bucket).trim(), "None");
    // What the heartbeat told of was not sent again. (Others were on their way when the host was killed.)
    let parts = hosts.parts();
    for number in &known {
        let sent = parts.iter().find(|(part, _)| part.ends_with(&format!("partNumber={number}")));
        assert_eq!(sent.unwrap().1, &1, "part {number} of {known:?} was sent again: {parts:?}");
    }
    // The first host comes back, and finds its job done.
    until("the mount is gone", || {
        let place = format!(" {} ", hosts.worlds[0].path("mnt").display());
        !std::fs::read_to_string("/proc/mounts").unwrap().contains(&place)
    });
    let first = hosts.mount(0);
    ended(&first, "k.raw");
    assert_eq!(first.status("k.raw"), status);
    first.unmount();
    second.unmount();
}

#[test]
fn a_host_that_slept_past_its_lease_completes_nothing() {
    let (slow, completions) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicUsize::new(0)));
    let (delay, completed) = (Arc::clone(&slow), Arc::clone(&completions));
    let decide = move |request: &Request| {
        if request.method == "POST" && request.target.contains("/k.raw?uploadId") {
            completed.fetch_add(1, Ordering::SeqCst);
        }
        if request.is_part() { Fate::Delay(delay.load(Ordering::SeqCst)) } else { Fate::Forward }
    };
    let Some(hosts) = Hosts::new("asleep", decide) else { return };
    let (first, second) = (hosts.mount(0), hosts.mount(1));
    slow.store(1500, Ordering::SeqCst);
    copy(&first, "raw", "k.raw");
    until("a part", || hosts.proxy.answered().iter().any(|(r, _)| r.target.contains("/k.raw?uploads")));
    let pid = first.pid().to_string();
    run(command("kill").args(["-STOP", &pid]));
    slow.store(0, Ordering::SeqCst);
    copy(&second, "raw", "k.raw");
    ended(&second, "k.raw");
    assert_eq!(second.status("k.raw")["status"], "SUCCESS", "{}", second.log());
    let after = completions.load(Ordering::SeqCst);
    run(command("kill").args(["-CONT", &pid]));
    ended(&first, "k.raw");
    assert_eq!(completions.load(Ordering::SeqCst), after, "the host that slept completed its upload");
    assert_eq!(first.status("k.raw"), second.status("k.raw"));
    assert_same(&hosts.object("k.raw"), &hosts.source());
    assert_eq!(uploads(&hosts.endpoint, &hosts.bucket).trim(), "None");
    first.unmount();
    second.unmount();
}

/// Whether it puts a small object of that key in place, by one put or by an upload of one part.
fn places(request: &Request, key: &str) -> bool {
    request.method == "PUT" && request.target.ends_with(&format!("/{key}"))
        || request.method == "POST" && request.target.contains(&format!("/{key}?uploadId"))
}

#[test]
fn a_host_that_slept_with_a_small_object_on_its_way_leaves_its_successors_alone() {
    for (name, is_shared) in [("small-shared", true), ("small-plain", false)] {
        // The first request that puts an object in place arrives when everything else is over.
        let held = Arc::new(std::sync::Mutex::new(std::collections::BTreeSet::new()));
        let decide = move |request: &Request| {
            let key = ["k.raw", "p.raw"].into_iter().find(|key| places(request, key));
            let is_first = key.is_some_and(|key| held.lock().unwrap().insert(key));
            if is_first { Fate::Hold } else { Fate::Forward }
        };
        let Some(hosts) = Hosts::new(name, decide) else { return };
        for (world, byte) in hosts.worlds.iter().zip(1..) {
            std::fs::write(world.catalog().join("noise.raw"), vec![byte; 1024]).unwrap();
        }
        let options = if is_shared { "shared,lease=2,formats=raw" } else { "formats=raw" };
        let bucket = format!("b=s3://{}", hosts.bucket);
        let mount = |host: usize| hosts.worlds[host].mount_exactly(&["--bucket", &bucket, "-o", options]);
        let (first, second) = (mount(0), mount(1));
        let write = |mount: &Mount, text: &str| run(command("cp").arg(text).arg(mount.key("p.raw")));
        let plain = |host: usize| hosts.worlds[host].catalog().join("noise.raw").display().to_string();
        copy(&first, "raw", "k.raw");
        std::thread::scope(|scope| {
            let closed = scope.spawn(|| write(&first, &plain(0)));
            until("both objects are on their way", || hosts.proxy.hanging() == 2);
            let pid = first.pid().to_string();
            run(command("kill").args(["-STOP", &pid]));
            copy(&second, "raw", "k.raw");
            assert!(write(&second, &plain(1)).status.success());
            let names = |key: &str| ["", ".status", ".sha256", ".md5"].map(|suffix| format!("{key}{suffix}"));
            let all: Vec<_> = ["k.raw", "p.raw"].into_iter().flat_map(names).collect();
            ended(&second, "k.raw");
            let now = || all.iter().map(|name| s3::find(&hosts.endpoint, &hosts.bucket, name)).collect();
            let before: Vec<_> = now();
            run(command("kill").args(["-CONT", &pid]));
            hosts.proxy.release();
            assert!(!closed.join().unwrap().status.success(), "{name}: close does not tell");
            ended(&first, "k.raw");
            for (name, (before, after)) in all.iter().zip(before.into_iter().zip(now())) {
                assert!(before.is_some() && before == after, "{name} of the successor is another one");
            }
            for key in ["k.raw", "p.raw"] {
                assert_eq!(second.status(key)["status"], "SUCCESS");
                assert_eq!(s3::get(&hosts.endpoint, &hosts.bucket, key), [2; 1024]);
            }
        });
        first.unmount();
        second.unmount();
    }
}

#[test]
fn a_host_that_dies_before_it_ends_its_lease_ends_it_at_its_next_mount() {
    if !can_mount() {
        return;
    }
    let (mut first, second) = (World::new(), World::new());
    for world in [&first, &second] {
        images::noise(&world.catalog(), 1024);
    }
    let bucket = format!("b=file://{}", first.bucket().display());
    // Nobody waits for so long.
    let arguments = ["--bucket", &bucket, "-o", "shared,lease=3600,formats=raw"];
    first.environment.push(("FREIGHTFS_FAILPOINT".to_owned(), "lease-end:1:kill".to_owned()));
    let mount = first.mount_exactly(&arguments);
    run(command("cp").arg(mount.path("images/noise/noise.raw")).arg(mount.key("k.raw")));
    until("the daemon's end", || first.is_dead());
    drop(mount);
    first.environment.clear();
    first.mount_exactly(&arguments).unmount();
    let mount = second.mount_exactly(&arguments);
    copy(&mount, "raw", "k.raw");
    assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
    mount.unmount();
}

#[test]
fn a_store_that_ignores_conditions_cannot_be_shared() {
    let seen = std::sync::Mutex::new((String::new(), 0));
    let decide = move |request: &Request| {
        let probe =
            request.method == "PUT" && request.target.contains("/.freightfs/probe-") && !request.is_part();
        if !probe {
            return Fate::Forward;
        }
        let (first, puts) = &mut *seen.lock().unwrap();
        if first.is_empty() {
            first.clone_from(&request.target);
        }
        *puts += usize::from(*first == request.target);
        // The fourth put is one that must not replace what is there, and this store says that it has done it.
        if *first == request.target && *puts == 4 { Fate::Answer(200) } else { Fate::Forward }
    };
    let Some(hosts) = Hosts::new("careless", decide) else { return };
    let said = fail(&mut hosts.worlds[0].mount_command(&hosts.arguments().each_ref().map(String::as_str)));
    assert!(said.contains("conditional puts") && said.contains("cannot be shared"), "{said}");
    // A local directory can, and hosts without each other too.
    let world = World::new();
    images::noise(&world.catalog(), PART);
    let mount = world.mount(&["-o", "shared,lease=2,formats=raw"]);
    copy(&mount, "raw", "k.raw");
    assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
    copy(&mount, "raw", "k.raw");
    assert_same(&world.bucket().join("k.raw"), Path::new(&world.catalog().join("noise.raw")));
    mount.unmount();
}
