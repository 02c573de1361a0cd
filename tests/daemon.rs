//! The daemon's beginning and end, as mount(8), shells and systemd see them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};

use support::mount::World;
use support::proxied::until;
use support::{assert_same, can_mount, command, freightfs, images, run, sha256, succeed, text};

/// A mount in the foreground that tells a socket, as a unit of the type notify does, when it answers.
fn start(world: &World) -> Child {
    let path = world.path("notify");
    let _ = std::fs::remove_file(&path);
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let bucket = format!("b=file://{}", world.bucket().display());
    let mut mount = world.mount_command(&["--foreground", "--bucket", &bucket]);
    mount.env("NOTIFY_SOCKET", &path).stderr(Stdio::piped());
    let child = mount.spawn().unwrap();
    let mut said = [0; 64];
    let length = socket.recv(&mut said).unwrap();
    assert!(said[..length].starts_with(b"READY=1"), "{:?}", String::from_utf8_lossy(&said[..length]));
    child
}

#[test]
fn signals_and_umount_end_the_daemon_with_success() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::noise(&world.catalog(), 30 << 20);
    for (number, end) in ["TERM", "INT", "umount"].into_iter().enumerate() {
        let child = start(&world);
        let mount = world.at();
        let key = format!("{number}.raw");
        mount.cp(&mount.path("images/noise/noise.raw"), &key);
        if end == "umount" {
            succeed(command("umount").arg(world.path("mnt")));
        } else {
            // The child is a wrapper that passes signals on to the daemon.
            succeed(command("kill").args([format!("-{end}"), mount.pid().to_string()]));
        }
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{end}: {}", text(&output));
        assert!(text(&output).contains("ended"), "{end}: the log is not on the terminal: {}", text(&output));
        assert!(
            !std::fs::read_to_string("/proc/mounts").unwrap().contains(world.path("mnt").to_str().unwrap())
        );
        if end == "umount" {
            assert_same(&world.bucket().join(&key), &raw);
        }
    }
    // What a signal left is done by the next mount.
    let mut child = start(&world);
    let mount = world.at();
    for key in ["0.raw", "1.raw"] {
        let status = mount.wait(key);
        assert_eq!(
            (status["status"].as_str(), status["sha256"].as_str()),
            (Some("SUCCESS"), Some(&*sha256(&raw)))
        );
    }
    // A second mount with the same state directory is refused by its name, and the first goes on.
    let other = world.path("other");
    std::fs::create_dir(&other).unwrap();
    let refused = run(freightfs()
        .arg("mount")
        .arg(world.catalog())
        .arg(&other)
        .args(["--state".as_ref(), world.path("state").as_os_str()]));
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains(world.path("state").to_str().unwrap()), "{}", text(&refused));
    assert_eq!(text(&refused).trim().lines().count(), 1);
    until("the first mount", || mount.path("images").is_dir());
    mount.unmount();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_signal_ends_the_daemon_while_somebody_is_in_the_mount() {
    if !can_mount() {
        return;
    }
    for signal in ["TERM", "INT"] {
        let world = World::new();
        images::noise(&world.catalog(), 1 << 20);
        let mount = world.mount(&[]);
        std::fs::write(mount.key("k"), "kept").unwrap();
        let mut visitor = Command::new("sleep").arg("100").current_dir(mount.key("")).spawn().unwrap();
        let open = std::fs::File::open(mount.key("k")).unwrap();
        let mut writing = std::fs::File::create(mount.key("half")).unwrap();
        writing.write_all(b"not closed").unwrap();
        let (daemon, place) = (mount.pid(), world.path("mnt").display().to_string());
        mount.signal(signal);
        assert!(visitor.try_wait().unwrap().is_none(), "the visitor lives");
        assert!(!std::fs::read_to_string("/proc/mounts").unwrap().contains(&place), "{signal}: {daemon}");
        // With the last of the daemon's threads, which may outlive its first one for a moment.
        until("the open file has lost its mount", || open.metadata().is_err());
        visitor.kill().unwrap();
        visitor.wait().unwrap();
        // Nothing is left in the way of the next mount.
        let mount = world.mount(&[]);
        assert_eq!(std::fs::read_to_string(mount.key("k")).unwrap(), "kept");
        mount.unmount();
    }
}

#[test]
fn the_daemon_may_open_as_many_files_as_its_hard_limit_allows() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let bucket = format!("b=file://{}", world.bucket().display());
    let mount = world.mount_command(&["--bucket", &bucket]);
    let mut limited = command("bash");
    limited.args(["-c", "ulimit -Sn 200; ulimit -Hn 900; exec \"$@\"", "bash"]);
    limited.arg(mount.get_program()).args(mount.get_args());
    succeed(&mut limited);
    let mount = world.at();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", mount.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["900", "900"], "{files}");
    mount.unmount();
}

/// A status file that its host has not written again for years, and one whose host says that it still holds.
#[test]
fn hosts_that_are_not_heard_from_are_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let status = |name: &str, updated: &str, valid: u64| {
        let json = serde_json::json!({
            "version": 1, "job_id": "j", "status": "RUNNING", "progress": 1, "image": null, "bucket": "b", "key": name,
            "url": "u", "size": null, "bytes_done": 0, "bytes_uploaded": 0, "begin_time": "2020-01-01T00:00:00Z",
            "end_time": null, "eta_seconds": null, "md5": null, "sha256": null, "etag": null, "client_token": null,
            "host": "a-dead-host", "attempt": 1, "error": null, "updated": updated, "valid_seconds": valid,
        });
        let path = directory.path().join(name);
        std::fs::write(directory.path().join(format!("{name}.status")), json.to_string()).unwrap();
        path
    };
    let dead = status("dead.raw", "2020-01-01T00:00:05Z", 60);
    for command in ["wait", "status"] {
        let output = run(freightfs().arg(command).arg(&dead));
        assert_eq!(output.status.code(), Some(1), "{command}: {}", text(&output));
        let said = text(&output);
        assert!(said.contains("not heard from since 2020-01-01T00:00:05Z"), "{command}: {said}");
        assert!(said.contains("a-dead-host"), "{command}: {said}");
    }
    let alive = status("alive.raw", "2020-01-01T00:00:05Z", u64::from(u32::MAX));
    let output = run(freightfs().arg("status").arg(&alive));
    assert!(output.status.success() && !text(&output).contains("heard"), "{}", text(&output));
    let output = run(freightfs().args(["wait", "--quiet", "--timeout", "0"]).arg(&alive));
    assert!(text(&output).contains("have not ended"), "{}", text(&output));
}

#[test]
fn completions_are_those_of_the_shells() {
    for (shell, checker) in [("bash", "bash"), ("zsh", "zsh"), ("fish", "fish")] {
        let script = succeed(freightfs().args(["completions", shell]));
        assert!(script.contains("stage-limit") && script.contains("convert"), "{shell}");
        if support::has(checker) {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), script).unwrap();
            succeed(command(checker).arg("-n").arg(file.path()));
        }
    }
    assert_eq!(run(freightfs().args(["completions", "tcsh"])).status.code(), Some(2));
}
