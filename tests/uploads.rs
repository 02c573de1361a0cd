//! Uploads against a real S3 server behind a proxy that counts, delays and cuts: what is sent when, and how often.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use object_store::PutPayload;
use object_store::multipart::MultipartStore;
use support::images::{self, Random};
use support::proxied::{Setup, until};
use support::proxy::{Fate, Request};
use support::s3::{self, aws, uploads};
use support::{assert_same, command, freightfs, run, sha256, succeed};

const PART: usize = 8 << 20;

#[test]
fn parts_are_sent_while_a_program_writes_and_again_when_they_are_rewritten() {
    let Some(setup) = Setup::new("early", |_| Fate::Forward) else { return };
    let mount = setup.mount(&[]);
    let mut content = Random(1).bytes(5 * PART + 1000);
    let mut file = File::create(mount.key("k")).unwrap();
    file.write_all(&content[..4 * PART]).unwrap();
    // The writer is still there; what it has passed is at the store.
    until("early parts", || setup.parts("/k?").len() == 4);
    file.write_all_at(b"again", 2 * PART as u64 + 7).unwrap();
    content[2 * PART + 7..][..5].copy_from_slice(b"again");
    file.seek(std::io::SeekFrom::End(0)).unwrap();
    file.write_all(&content[4 * PART..]).unwrap();
    drop(file);
    assert_eq!(mount.status("k")["status"], "SUCCESS");
    let expected = setup.world.out("expected");
    std::fs::write(&expected, &content).unwrap();
    assert_same(&setup.fetch("k"), &expected);
    assert_eq!(mount.status("k")["sha256"], sha256(&expected));
    assert_eq!(mount.status("k")["bytes_uploaded"], content.len());
    let parts = setup.parts("/k?");
    assert_eq!(parts.len(), 6);
    assert!(parts.iter().all(|(number, count)| *count == 1 + usize::from(number == "3")), "{parts:?}");
    setup.assert_no_upload_is_left();

    // Cut to less, to nothing, removed and refused: nothing stays, and what is published is right.
    let mut cut = File::create(mount.key("cut")).unwrap();
    cut.write_all(&content).unwrap();
    until("early parts", || setup.parts("/cut?").len() == 5);
    cut.set_len(PART as u64 + 5).unwrap();
    drop(cut);
    std::fs::write(&expected, &content[..PART + 5]).unwrap();
    assert_same(&setup.fetch("cut"), &expected);
    let mut gone = File::create(mount.key("gone")).unwrap();
    gone.write_all(&content).unwrap();
    until("early parts", || setup.parts("/gone?").len() == 5);
    gone.set_len(0).unwrap();
    gone.write_all(&content[..10]).unwrap();
    std::fs::remove_file(mount.key("gone")).unwrap();
    drop(gone);
    // The last close is not waited for by the kernel; the end of the mount is.
    mount.unmount();
    setup.assert_no_upload_is_left();
}

#[test]
fn rsync_sends_to_the_name_that_the_file_will_get() {
    let Some(setup) = Setup::new("rsync-early", |_| Fate::Forward) else { return };
    let mount = setup.mount(&[]);
    let source = setup.world.out("some.bin");
    std::fs::write(&source, Random(2).bytes(5 * PART)).unwrap();
    succeed(command("rsync").args(["-a", "--bwlimit=40m"]).arg(&source).arg(mount.key("")));
    assert_same(&setup.fetch("some.bin"), &source);
    let parts = setup.parts("/some.bin?");
    assert!(parts.len() == 5 && parts.values().all(|&count| count == 1), "{parts:?}");
    let before_the_last = setup.proxy.answered();
    let copies = before_the_last.iter().filter(|(request, _)| request.target.contains(".some.bin."));
    assert_eq!(copies.filter(|(request, _)| request.method != "GET" && request.method != "HEAD").count(), 0);
    mount.unmount();
    setup.assert_no_upload_is_left();
}

#[test]
fn a_writer_and_its_daemon_killed_leave_nothing() {
    let Some(setup) = Setup::new("killed-early", |_| Fate::Forward) else { return };
    let mount = setup.mount(&[]);
    let mut file = File::create(mount.key("k.qcow2")).unwrap();
    file.write_all(&[b"QFI\xfb\0\0\0\x03".to_vec(), Random(3).bytes(4 * PART)].concat()).unwrap();
    until("early parts", || setup.parts("/k.qcow2?").len() == 4);
    setup.kill(mount);
    drop(file);
    let mount = setup.mount(&[]);
    until("the left-over upload is given up", || uploads(&setup.endpoint, &setup.bucket).trim() == "None");
    assert!(!mount.key("k.qcow2").exists());
    mount.unmount();
}

/// Whether it starts an upload of a key that ends like this.
fn is_start(request: &Request, key: &str) -> bool {
    request.method == "POST" && request.target.contains(&format!("{key}?uploads"))
}

/// The ids of the unfinished uploads of a bucket.
fn pending(setup: &Setup) -> Vec<String> {
    let listed = uploads(&setup.endpoint, &setup.bucket);
    let id = |line: &str| line.split('\t').next_back().map(str::to_owned);
    listed.lines().filter(|line| line.trim() != "None").filter_map(id).collect()
}

/// Starts an upload as another program; sends a part of it where that is asked for.
fn foreign(endpoint: &str, bucket: &str, key: &str, has_part: bool) -> String {
    let client = s3::client(endpoint, bucket);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let path = object_store::path::Path::from(key);
    runtime.block_on(async {
        let id = client.create_multipart(&path).await.unwrap();
        if has_part {
            client.put_part(&path, &id, 0, PutPayload::from_static(b"part")).await.unwrap();
        }
        id
    })
}

#[test]
fn an_upload_that_begins_unheard_is_given_up_and_no_other_programs_is() {
    // What happens when the daemon starts its upload: other programs begin some too, and its answer is lost.
    let (cut, others) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (left, known) = (Arc::clone(&cut), Arc::clone(&others));
    let (endpoint, bucket) = (s3::endpoint().unwrap_or_default(), format!("unheard-{}", std::process::id()));
    let decide = move |request: &Request| {
        let cuts = is_start(request, "/k.raw")
            && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if cuts {
            let other = |key, has_part| foreign(&endpoint, &bucket, key, has_part);
            known.lock().unwrap().extend([other("k.raw", true), other("k.raw.md5", false)]);
        }
        if cuts { Fate::CutAnswer } else { Fate::Forward }
    };
    let Some(mut setup) = Setup::new("unheard", decide) else { return };
    setup.world.environment.push(("FREIGHTFS_SETTLE".to_owned(), "0".to_owned()));
    images::noise(&setup.world.catalog(), 2 * PART);
    let mount = setup.mount(&["-o", "formats=raw"]);
    let before = foreign(&setup.endpoint, &setup.bucket, "k.raw", false);
    cut.store(2, Ordering::SeqCst);
    mount.cp(&mount.path("images/noise/noise.raw"), "k.raw");
    assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
    let mut expected = others.lock().unwrap().clone();
    assert_eq!(expected.len(), 4, "the answer was lost twice");
    expected.push(before);
    expected.sort();
    let now = || {
        let mut pending = pending(&setup);
        pending.sort();
        pending
    };
    until("only other programs' uploads are left", || now() == expected);
    until("nothing is left of it here", || {
        std::fs::read_dir(setup.world.path("state/uploads")).unwrap().count() == 0
    });
    // The next mount has nothing to look for.
    mount.unmount();
    setup.mount(&["-o", "formats=raw"]).unmount();
    assert_eq!(now(), expected);
}

#[test]
fn an_upload_is_looked_for_by_later_mounts_until_its_time_is_over() {
    let Some(mut setup) = Setup::new("unheard-later", |_| Fate::Forward) else { return };
    setup.world.environment.push(("FREIGHTFS_SETTLE".to_owned(), "3600".to_owned()));
    images::noise(&setup.world.catalog(), 2 * PART);
    setup.world.environment.push(("FREIGHTFS_FAILPOINT".to_owned(), "log-create:1:kill".to_owned()));
    let mount = setup.mount(&["-o", "formats=raw"]);
    // The copy is accepted, and the daemon dies of it.
    let _ = run(command("cp").arg(mount.path("images/noise/noise.raw")).arg(mount.key("k.raw")));
    until("the daemon's end", || setup.world.is_dead());
    drop(mount);
    let orphan = pending(&setup);
    assert_eq!(orphan.len(), 1);
    let intents = |setup: &Setup| std::fs::read_dir(setup.world.path("state/uploads")).unwrap().count();
    let mut next = |seconds: &str| {
        setup.world.environment.retain(|(name, _)| !name.starts_with("FREIGHTFS"));
        setup.world.environment.push(("FREIGHTFS_SETTLE".to_owned(), seconds.to_owned()));
        let mount = setup.mount(&["-o", "formats=raw"]);
        assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
        mount.unmount();
        (pending(&setup), intents(&setup))
    };
    // Somebody else's could be as young as that.
    assert_eq!(next("3600"), (orphan, 1));
    assert_eq!(next("0"), (vec![], 0));
}

/// Parts in the logs of the uploads under way: what the daemon knows that the store has.
fn recorded_parts(setup: &Setup) -> usize {
    let logs = std::fs::read_dir(setup.world.path("state/uploads")).unwrap().flatten();
    logs.map(|log| std::fs::read_to_string(log.path()).unwrap_or_default().matches("{\"part\"").count()).sum()
}

/// Whether the state directory has a record of the key's job. What has no name yet is none.
fn is_recorded(jobs: &std::path::Path, key: &str) -> bool {
    std::fs::read_dir(jobs).unwrap().flatten().any(|record| {
        let text = std::fs::read_to_string(record.path()).unwrap_or_default();
        let is_named = record.path().extension().is_some_and(|extension| extension == "json");
        is_named && text.contains(&format!("\"key\": \"{key}\""))
    })
}

/// Exports of an image in a plain and in a compressed format, and a file that a program has written and closed:
/// killed after the nth part, and taken up by the next mount.
#[test]
fn a_killed_daemon_goes_on_at_its_last_finished_part() {
    let (asked, limit) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(usize::MAX)));
    let (counter, allowed) = (Arc::clone(&asked), Arc::clone(&limit));
    let decide = move |request: &Request| {
        let hold =
            request.is_part() && counter.fetch_add(1, Ordering::SeqCst) >= allowed.load(Ordering::SeqCst);
        if hold { Fate::Hang } else { Fate::Forward }
    };
    let Some(setup) = Setup::new("resumed", decide) else { return };
    let raw = images::noise(&setup.world.catalog(), 6 * PART);
    let converted = setup.world.out("noise.stream.vmdk");
    succeed(freightfs().args(["convert", "-q"]).arg(&raw).arg(&converted));
    let mut mount = setup.mount(&["-o", "formats=raw:stream.vmdk"]);
    for (index, kind) in ["raw", "stream.vmdk", "bin"].iter().enumerate() {
        for parts in [0, 1, 3, 5] {
            let key = format!("{parts}.{kind}");
            let first = asked.load(Ordering::SeqCst);
            limit.store(first + parts, Ordering::SeqCst);
            let mut writer = None;
            if index < 2 {
                mount.cp(&mount.path(&format!("images/noise/noise.{kind}")), &key);
            } else {
                // Its close waits for the upload, and fails when the daemon is killed: the job is accepted before.
                let (from, to) = (raw.clone(), mount.key(&key));
                writer = Some(std::thread::spawn(move || {
                    drop(run(command("dd")
                        .arg("bs=1M")
                        .arg(format!("if={}", from.display()))
                        .arg(format!("of={}", to.display()))))
                }));
                let jobs = setup.world.path("state/jobs");
                until("the job is recorded", || is_recorded(&jobs, &key));
            }
            until("the part that hangs", || asked.load(Ordering::SeqCst) > first + parts);
            until("the parts before it", || recorded_parts(&setup) == parts);
            setup.kill(mount);
            if let Some(writer) = writer {
                writer.join().unwrap();
            }
            limit.store(usize::MAX, Ordering::SeqCst);
            mount = setup.mount(&["-o", "formats=raw:stream.vmdk"]);
            let status = mount.wait(&key);
            assert_eq!(status["status"], "SUCCESS", "{key}: {status}");
            let fetched = setup.fetch(&key);
            assert_eq!(status["sha256"], sha256(&fetched), "{key}");
            if index == 1 {
                assert_same(&fetched, &converted);
            } else {
                assert_same(&fetched, &raw);
            }
            let parts = setup.parts(&format!("/{key}?"));
            assert!(parts.len() >= 6 && parts.values().all(|&count| count == 1), "{key}: {parts:?}");
        }
    }
    mount.unmount();
    setup.assert_no_upload_is_left();
}

/// The daemon dies after the store has put the object in place, before it has heard of it.
#[test]
fn an_object_that_was_completed_unheard_is_found_and_not_made_again() {
    let lost = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&lost);
    let decide = move |request: &Request| {
        let completes = request.method == "POST"
            && request.target.contains("/k.raw?")
            && request.target.contains("uploadId=");
        if completes && !seen.swap(true, Ordering::SeqCst) { Fate::Delay(700) } else { Fate::Forward }
    };
    let Some(setup) = Setup::new("unheard", decide) else { return };
    let raw = images::noise(&setup.world.catalog(), 3 * PART);
    let mount = setup.mount(&["-o", "formats=raw"]);
    mount.cp(&mount.path("images/noise/noise.raw"), "k.raw");
    until("the completion", || lost.load(Ordering::SeqCst));
    setup.kill(mount);
    let head = ["s3api", "head-object", "--bucket", &setup.bucket, "--key", "k.raw"];
    until("the object", || run(&mut aws(&setup.endpoint, &head)).status.success());
    let mount = setup.mount(&["-o", "formats=raw"]);
    assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
    assert_same(&setup.fetch("k.raw"), &raw);
    let parts = setup.parts("/k.raw?");
    assert!(parts.len() == 3 && parts.values().all(|&count| count == 1), "{parts:?}");
    mount.unmount();
    setup.assert_no_upload_is_left();
}

/// Kills at random moments; as many as `FREIGHTFS_TEST_KILLS` says, of three kinds of exports in turn.
#[test]
fn a_daemon_killed_at_any_moment_ends_its_jobs() {
    let kills: usize = std::env::var("FREIGHTFS_TEST_KILLS").ok().map_or(6, |text| text.parse().unwrap());
    let Some(setup) =
        Setup::new("any-moment", |request| if request.is_part() { Fate::Delay(60) } else { Fate::Forward })
    else {
        return;
    };
    let raw = images::noise(&setup.world.catalog(), 4 * PART);
    let converted = setup.world.out("noise.stream.vmdk");
    succeed(freightfs().args(["convert", "-q"]).arg(&raw).arg(&converted));
    let mut random = Random(std::process::id().into());
    let mut mount = setup.mount(&["-o", "formats=raw:stream.vmdk"]);
    let mut interrupted = 0;
    for kill in 0..kills {
        let kind = ["raw", "stream.vmdk", "bin"][kill % 3];
        let key = format!("{kill}.{kind}");
        let (from, to) = match kind {
            "bin" => (raw.clone(), mount.key(&key)),
            kind => (mount.path(&format!("images/noise/noise.{kind}")), mount.key(&key)),
        };
        let writer = std::thread::spawn(move || drop(run(command("cp").arg(from).arg(to))));
        let jobs = setup.world.path("state/jobs");
        until("the job is recorded", || is_recorded(&jobs, &key));
        std::thread::sleep(std::time::Duration::from_millis(random.below(900)));
        setup.kill(mount);
        writer.join().unwrap();
        // The parts that the daemon knew of: those must not be sent again.
        let known: Vec<String> = std::fs::read_dir(setup.world.path("state/uploads"))
            .unwrap()
            .flatten()
            .flat_map(|log| {
                let text = std::fs::read_to_string(log.path()).unwrap();
                let part = |line: &str| {
                    let line: serde_json::Value = serde_json::from_str(line).ok()?;
                    Some((line["part"]["index"].as_u64()? + 1).to_string())
                };
                text.lines().filter_map(part).collect::<Vec<_>>()
            })
            .collect();
        interrupted += usize::from(!known.is_empty());
        mount = setup.mount(&["-o", "formats=raw:stream.vmdk"]);
        let status = mount.wait(&key);
        assert_eq!(status["status"], "SUCCESS", "{key}: {status}");
        let fetched = setup.fetch(&key);
        assert_eq!(status["sha256"], sha256(&fetched), "{key}");
        assert_same(&fetched, if kind == "stream.vmdk" { &converted } else { &raw });
        let parts = setup.parts(&format!("/{key}?"));
        for number in &known {
            assert_eq!(parts[number], 1, "{key}: part {number} was sent again: {parts:?}");
        }
    }
    println!("{interrupted} of {kills} exports were interrupted after a part");
    mount.unmount();
    setup.assert_no_upload_is_left();
}

/// A bucket that does not answer slows no other, and a thousand jobs that wait for it cost little.
#[test]
fn a_bucket_that_hangs_slows_no_other_and_holds_a_thousand_jobs() {
    let hanging = Arc::new(AtomicBool::new(false));
    let hangs = Arc::clone(&hanging);
    let decide = move |_: &Request| if hangs.load(Ordering::SeqCst) { Fate::Hang } else { Fate::Forward };
    let Some(setup) = Setup::new("hanging", decide) else { return };
    let raw = images::noise(&setup.world.catalog(), 2 * PART);
    let other = format!("other=file://{}", setup.world.bucket().display());
    let mount = setup.mount(&["--bucket", &other, "-o", "formats=raw"]);
    let image = mount.path("images/noise/noise.raw");
    let before = mount.resident();
    // Names are looked up in the store before they are written, so they are opened while it answers.
    let files: Vec<_> = (0..1000).map(|n| File::create(mount.key(&format!("{n:04}.raw"))).unwrap()).collect();
    hanging.store(true, Ordering::SeqCst);
    for mut file in files {
        std::io::copy(&mut File::open(&image).unwrap(), &mut file).unwrap();
    }
    let waiting = || {
        let jobs = support::text(&run(freightfs().args(["jobs", "--json"]).arg(mount.path("jobs"))));
        let jobs: Vec<serde_json::Value> = serde_json::from_str(&jobs).unwrap();
        jobs.len()
    };
    until("a thousand jobs", || waiting() == 1000);
    for n in 0..8 {
        let to = mount.path(&format!("buckets/other/{n}.raw"));
        succeed(command("cp").arg(&image).arg(&to));
        succeed(freightfs().args(["wait", "--quiet"]).arg(&to));
        assert_same(&setup.world.bucket().join(format!("{n}.raw")), &raw);
    }
    assert_eq!(waiting(), 1000, "the bucket that hangs was not asked for anything");
    let grown = mount.resident().saturating_sub(before) >> 20;
    println!("{grown} MiB for 1000 jobs");
    assert!(grown < 400, "{grown} MiB");
    mount.signal("TERM");
}
