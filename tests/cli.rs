//! The commands and what others have written: forged statuses, text for terminals, devices as outputs, secrets in URLs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::Output;

use object_store::ObjectStoreExt;
use serde_json::{Value, json};
use support::mount::World;
use support::{can_mount, command, fail, freightfs, images, run, s3, skip, succeed, text};

/// A status that nobody but its writer has checked.
fn status(job: &str, changes: &[(&str, Value)]) -> Vec<u8> {
    let mut status = json!({
        "version": 1, "job_id": job, "status": "RUNNING", "progress": 1, "image": null, "bucket": "b", "key": "bait.raw",
        "url": "u", "size": null, "bytes_done": 0, "bytes_uploaded": 0, "begin_time": "2020-01-01T00:00:00Z",
        "end_time": null, "eta_seconds": null, "md5": null, "sha256": null, "etag": null, "client_token": null,
        "host": "elsewhere", "attempt": 1, "error": null,
    });
    for (field, value) in changes {
        status[*field] = value.clone();
    }
    serde_json::to_vec(&status).unwrap()
}

#[test]
fn a_forged_status_cancels_no_file_and_no_other_job() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    std::fs::File::create(world.catalog().join("large.raw")).unwrap().set_len(20 << 30).unwrap();
    let mount = world.mount(&[]);
    mount.cp(&mount.path("images/large/large.raw"), "real.raw");
    let real = mount.status("real.raw")["job_id"].as_str().unwrap().to_owned();
    let package = world.out("package");
    std::fs::write(package.with_extension("json"), "{}").unwrap();
    for (job, reason) in [
        (package.to_str().unwrap(), "no job of this mount makes it"),
        ("../../out/package", "no job of this mount makes it"),
        (&real, "it is made on host elsewhere"),
    ] {
        std::fs::write(world.bucket().join("bait.raw.status"), status(job, &[])).unwrap();
        for name in ["bait.raw", "bait.raw.status"] {
            let said = fail(freightfs().arg("cancel").arg(mount.key(name)));
            assert!(said.contains(reason), "{job}: {said}");
        }
        assert!(package.with_extension("json").exists());
    }
    assert_eq!(mount.status("real.raw")["error"], Value::Null, "the other job was cancelled");
    // What only looks like a mount.
    let fake = world.path("out/fake");
    for directory in [".freightfs", "jobs", "buckets/b"] {
        std::fs::create_dir_all(fake.join(directory)).unwrap();
    }
    std::fs::write(fake.join(".freightfs/version"), "0").unwrap();
    let job = fake.join(format!("jobs/{real}.json"));
    std::fs::write(&job, status(&real, &[])).unwrap();
    let said = fail(freightfs().arg("cancel").arg(fake.join("buckets/b/bait.raw")));
    assert!(said.contains("in no freightfs mount") && job.exists(), "{said}");
    // By another way to the same mount.
    let link = world.out("link");
    std::os::unix::fs::symlink(mount.key(""), &link).unwrap();
    succeed(freightfs().arg("cancel").arg(link.join("real.raw")));
    assert_eq!(mount.wait("real.raw")["status"], "CANCELLED");
    mount.unmount();
}

#[test]
fn a_forged_status_in_a_store_is_refused_by_every_command() {
    let (Some(endpoint), true) = (s3::endpoint(), can_mount()) else { return };
    let bucket = format!("forged-{}", std::process::id());
    let world = s3::world(&endpoint, &bucket);
    let package = world.out("package.json");
    std::fs::write(&package, "{}").unwrap();
    let mount = world.mount_exactly(&["--bucket", &format!("b=s3://{bucket}")]);
    let store = s3::client(&endpoint, &bucket);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let job = package.with_extension("");
    for (key, document) in [
        ("path.raw", status(job.to_str().unwrap(), &[])),
        ("types.raw", status("x", &[("progress", json!(256)), ("bytes_done", json!(-1))])),
        ("cut.raw", status("x", &[])[..50].to_vec()),
        ("deep.raw", "[".repeat(100_000).into_bytes()),
        ("long.raw", vec![b' '; (1 << 20) + 1]),
    ] {
        let place = object_store::path::Path::from(format!("{key}.status"));
        runtime.block_on(store.put(&place, document.into())).unwrap();
        for command in ["cancel", "status", "wait"] {
            let said = fail(freightfs().arg(command).arg(mount.key(key)));
            assert_eq!(said.lines().count(), 1, "{command} {key}: {said}");
        }
    }
    assert!(package.exists());
    mount.unmount();
}

#[test]
fn only_regular_files_are_read_as_statuses() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    succeed(command("mkfifo").arg(path("fifo.status")));
    std::os::unix::fs::symlink("/dev/zero", path("zero.status")).unwrap();
    std::fs::create_dir(path("directory.status")).unwrap();
    for name in ["fifo", "zero", "directory"] {
        for command in ["status", "wait"] {
            let said = fail(freightfs().arg(command).arg(path(name)));
            assert!(said.contains(&format!("{name}.status")), "{said}");
        }
    }
}

/// What a terminal would obey: a new title, an 8-bit control sequence, other colours, text in another order.
const HOSTILE: &str = "\u{1b}]0;owned\u{7}\u{9b}2J\u{1b}[31m\u{202e}\r\u{2028}x";

/// Fails unless a program's outputs have nothing for a terminal, and show the hostile text all the same.
#[track_caller]
fn assert_plain(output: &Output) {
    let said = text(output);
    let is_plain = |c: char| c == '\n' || !freightfs::error::is_unsafe(c);
    assert!(said.chars().all(is_plain), "{said:?}");
    assert!(said.contains("owned"), "{said}");
}

#[test]
fn text_from_outside_does_not_reach_the_terminal_as_it_is() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let forged = world.out("forged.status");
    let error = json!({"code": HOSTILE, "description": HOSTILE, "details": HOSTILE, "cause": HOSTILE, "cloud_code": HOSTILE});
    let hostile = json!(HOSTILE);
    for state in ["RUNNING", "FAIL", "SUCCESS"] {
        let changes = [
            ("status", json!(state)),
            ("error", if state == "FAIL" { error.clone() } else { Value::Null }),
            ("updated", json!("2020-01-01T00:00:00Z")),
            ("valid_seconds", json!(1)),
            ("waiting", hostile.clone()),
            ("notes", json!([HOSTILE])),
            ("bucket", hostile.clone()),
            ("key", hostile.clone()),
            ("host", hostile.clone()),
            ("sha256", hostile.clone()),
        ];
        std::fs::write(&forged, status("x", &changes)).unwrap();
        for arguments in [&["status"][..], &["status", "--json"], &["wait"]] {
            let output = run(freightfs().args(arguments).arg(&forged));
            assert_plain(&output);
            if arguments.contains(&"--json") {
                let read: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(read[0]["host"], HOSTILE);
            }
        }
    }
    // An image's own words and its name; the program's words on what it cannot do with it.
    let named = world.out(&format!("{HOSTILE}.raw"));
    std::fs::write(&named, [0; 4096]).unwrap();
    for arguments in [&["info"][..], &["info", "--json"]] {
        assert_plain(&run(freightfs().args(arguments).arg(&named)));
    }
    let backed = world.catalog().join("backed.qcow2");
    succeed(
        command("qemu-img")
            .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", HOSTILE])
            .arg(&backed)
            .arg("1M"),
    );
    assert_plain(&run(freightfs().arg("info").arg(&backed)));
    assert_plain(&run(freightfs().arg("convert").arg(&backed).arg(world.out("o.raw"))));
    assert_plain(&run(freightfs().arg("convert").arg(&named).arg(world.out(&format!("{HOSTILE}.unknown")))));
    assert_plain(&run(&mut world.mount_command(&["-o", &format!("policy={HOSTILE}")])));
    // The mount: sidecars, names of objects, the log.
    std::fs::write(
        world.catalog().join("backed.toml"),
        format!("os = {HOSTILE:?}\n\"{}\" = 1\n", HOSTILE.escape_unicode())
            .replace("\\u{", "\\U0000")
            .replace('}', ""),
    )
    .unwrap();
    let mount = world.mount(&[]);
    let checked = run(freightfs().arg("check").arg(mount.path("images/backed")));
    assert!(
        !checked.status.success()
            && !text(&checked).chars().any(|c| c != '\n' && freightfs::error::is_unsafe(c))
    );
    let _ = std::fs::read(mount.path("images/backed/backed.raw"));
    for key in [format!("{HOSTILE}.raw"), "\u{202e}owned.raw".to_owned()] {
        if std::fs::copy(&named, mount.key(&key)).is_ok() {
            assert_plain(&run(freightfs().args(["jobs", "--all"]).arg(mount.path(""))));
        }
    }
    let log = mount.log();
    assert!(log.chars().all(|c| c == '\n' || !freightfs::error::is_unsafe(c)), "{log:?}");
    mount.unmount();
}

#[test]
fn the_log_is_bounded_while_it_is_written() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    images::noise(&world.catalog(), 1 << 20);
    // The FUSE library tells each request.
    world.environment.push(("FREIGHTFS_LOG".to_owned(), "debug".to_owned()));
    let mount = world.mount(&["--log-size", "64K"]);
    let length = |name: &str| std::fs::metadata(world.path("state").join(name)).map_or(0, |meta| meta.len());
    let mut rotated = false;
    for _ in 0..1000 {
        std::fs::metadata(mount.path("images/noise/nothing")).unwrap_err();
        assert!(length("log") <= 64 << 10);
        rotated = length("log.1") > 0;
        if rotated {
            break;
        }
    }
    assert!(rotated, "{} bytes", length("log"));
    mount.unmount();
    assert!(length("log") > 0 && length("log") <= 64 << 10 && length("log.1") <= 64 << 10);
    let log = std::fs::read_to_string(world.path("state/log")).unwrap();
    assert!(log.trim_end().ends_with("ended"), "{log}");
}

#[test]
fn convert_replaces_no_device_and_nothing_else_that_is_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let image = images::noise(directory.path(), 1 << 20);
    succeed(command("mkfifo").arg(path("fifo")));
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    std::fs::create_dir(path("directory")).unwrap();
    let mut outputs = vec!["fifo", "socket", "directory"];
    // As /dev/null is; never that itself.
    if run(command("mknod").arg(path("null")).args(["c", "1", "3"])).status.success() {
        std::os::unix::fs::symlink("null", path("link")).unwrap();
        outputs.extend(["null", "link"]);
    } else {
        skip("convert to a device: no device can be made here");
    }
    std::os::unix::fs::symlink("gone", path("dangling")).unwrap();
    outputs.push("dangling");
    let kind = |name: &str| path(name).symlink_metadata().unwrap().file_type();
    for output in outputs {
        let before = kind(output);
        let said = fail(freightfs().args(["convert", "--format", "raw"]).arg(&image).arg(path(output)));
        assert!(said.contains(output), "{output}: {said}");
        assert_eq!(kind(output), before, "{output}");
    }
    assert!(!path("null").exists() || kind("null").is_char_device());
    // Standard output is a pipe here.
    let said = fail(freightfs().args(["convert", "--format", "raw"]).arg(&image).arg("/dev/stdout"));
    assert!(said.contains("standard output"), "{said}");
    assert!(!path("gone").exists());
    // Where a link leads to a file, that is written.
    std::fs::write(path("file"), "old").unwrap();
    std::os::unix::fs::symlink("file", path("to-file")).unwrap();
    succeed(freightfs().args(["convert", "--quiet", "--format", "raw"]).arg(&image).arg(path("to-file")));
    assert!(kind("to-file").is_symlink());
    support::assert_same(&image, &path("file"));
    // Neither is the input, by whatever name.
    let said = fail(
        freightfs()
            .args(["convert", "--format", "raw"])
            .arg(path("to-file"))
            .args(["--input-format", "raw"])
            .arg(path("file")),
    );
    assert!(said.contains("same file"), "{said}");
}

/// A store that refuses everything, without a word of XML.
fn refusing_store() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(
                b"HTTP/1.1 400 Bad Request\r\ncontent-length: 4\r\nconnection: close\r\n\r\nno!\n",
            );
        }
    });
    address.to_string()
}

#[test]
fn no_secret_of_a_url_is_shown() {
    let world = World::new();
    let assert_hidden = |output: &Output| {
        let said = text(output);
        assert!(!output.status.success() && !said.contains("HIDDEN") && !said.contains("HID/DEN"), "{said}");
        assert!(said.contains("freightfs: "), "{said}");
    };
    for url in [
        "https://h/b/disk.qcow2?X-Amz-Credential=HIDDEN/2026/us-east-1&X-Amz-Signature=HIDDEN",
        "https://user:HIDDEN@h/disk.qcow2",
        "s3://b/disk.qcow2?X-Amz-Signature=HIDDEN",
        "s3://AKIA:HID/DEN@b/disk.qcow2",
        "s3://AKIA:HIDDEN@b/disk.qcow2",
        "az://c/disk.qcow2?sv=2022&sig=HIDDEN#HIDDEN",
    ] {
        assert_hidden(&run(freightfs().args(["info", url])));
        assert_hidden(&run(freightfs().args(["info", "--json", url])));
        assert_hidden(&run(freightfs().args(["convert", url]).arg(world.out("o.raw"))));
        assert_hidden(&run(&mut world.mount_command(&["--bucket", &format!("b={url}")])));
        let mut mount = freightfs();
        mount.args(["mount", url]).arg(world.path("mnt")).arg("--state").arg(world.path("state"));
        assert_hidden(&run(&mut mount));
    }
    // What a store's client tells of its requests.
    let store = refusing_store();
    let endpoint = format!("http://user:HIDDEN@{store}");
    let config = world.path("freightfs.toml");
    let document = format!(
        "catalog = \"catalog\"\n[bucket.b]\nurl = \"s3://b\"\nendpoint = \"{endpoint}\"\nallow_http = true\n\
         access_key_id = \"k\"\nsecret_access_key = \"HIDDEN\"\n"
    );
    std::fs::write(&config, document).unwrap();
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut mount = freightfs();
    mount.arg("mount").arg(&config).arg(world.path("mnt")).arg("--state").arg(world.path("state"));
    assert_hidden(&run(mount.env("FREIGHTFS_LOG", "debug")));
    let azure = [
        ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
        ("AZURE_STORAGE_SAS_KEY", "sv=2022-11-02&sig=HIDDEN"),
        ("AZURE_ALLOW_HTTP", "true"),
        ("FREIGHTFS_LOG", "debug"),
    ];
    let endpoint = format!("http://{store}");
    let azure = || azure.into_iter().chain([("AZURE_STORAGE_ENDPOINT", endpoint.as_str())]);
    assert_hidden(&run(freightfs().args(["info", "az://c/disk.qcow2"]).envs(azure())));
    assert_hidden(&run(world.mount_command(&["--bucket", "b=az://c"]).envs(azure())));
    let log = std::fs::read_to_string(world.path("state/log")).unwrap();
    assert!(log.contains("the store answers") && !log.contains("HIDDEN"), "{log}");
    // An image that names a signed URL below it.
    let image = world.out("backed.qcow2");
    let backing = "json:{\"driver\": \"https\", \"url\": \"https://user:HIDDEN@h/base.raw?sig=HIDDEN\"}";
    let mut create = command("qemu-img");
    succeed(
        create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]).arg(&image).arg("1M"),
    );
    assert_hidden(&run(freightfs().arg("info").arg(&image)));
}
