//! The daemon by what it can no longer do, and that everything else still works.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use support::mount::{Mount, World};
use support::proxied::until;
use support::{assert_same, can_mount, command, fail, freightfs, images, run, sha256, skip, succeed, text};

/// CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER (linux/capability.h), which root keeps for files of others.
const KEPT: u64 = 0b1110;

const NOBODY: u32 = 65534;

/// A field of the status of every thread of a daemon (proc(5)).
fn fields(mount: &Mount, name: &str) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap();
    let status = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("status")).ok();
    let value = |status: String| {
        let line =
            status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {status}"));
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    let found: Vec<_> = threads.filter_map(|thread| status(thread.unwrap())).map(value).collect();
    assert!(found.len() > 2, "{} threads", found.len());
    found
}

/// What all threads may have of a set of capabilities.
fn capabilities(mount: &Mount, set: &str) -> u64 {
    fields(mount, set)
        .iter()
        .map(|bits| u64::from_str_radix(bits, 16).unwrap())
        .fold(0, |all, bits| all | bits)
}

/// Whether a layer is in force, by the log.
fn has_layer(mount: &Mount, name: &str) -> bool {
    let log = mount.log();
    let line =
        log.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name} is not in {log}"));
    let is_there = !line.contains("not in force");
    if !is_there {
        skip(&format!("the daemon's sandbox: {line}"));
    }
    is_there
}

/// A world that other users can enter, whose bucket is theirs.
fn open_world() -> World {
    let world = World::new();
    for name in ["", "catalog", "mnt"] {
        std::fs::set_permissions(world.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    for name in ["bucket", "mnt"] {
        std::os::unix::fs::chown(world.path(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    std::fs::remove_dir(world.path("state")).unwrap();
    world
}

#[test]
fn every_thread_of_the_daemon_has_given_up_what_it_does_not_need() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let raw = images::noise(&world.catalog(), 4 << 20);
    let mount = world.mount(&[]);
    mount.cp(&mount.path("images/noise/noise.raw"), "k.raw");
    assert_eq!(mount.wait("k.raw")["status"], "SUCCESS");
    assert_same(&mount.key("k.raw"), &raw);
    if nix::unistd::geteuid().is_root() {
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(capabilities(&mount, set) & !KEPT, 0, "{set}");
        }
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(capabilities(&mount, set), 0, "{set}");
    }
    assert!(fields(&mount, "NoNewPrivs").iter().all(|value| value == "1"));
    if has_layer(&mount, "seccomp") {
        assert!(fields(&mount, "Seccomp:").iter().all(|value| value == "2"));
    }
    // Not dumpable: what the kernel shows of the process is root's, and no core file is written.
    let status = std::fs::metadata(format!("/proc/{}/environ", mount.pid())).unwrap();
    assert_eq!(status.uid(), 0);
    mount.unmount();
    let mount = world.mount(&["--sandbox", "off"]);
    assert!(fields(&mount, "NoNewPrivs").iter().all(|value| value == "0"));
    assert!(fields(&mount, "Seccomp:").iter().all(|value| value == "0"));
    mount.signal("TERM");
}

/// The daemon writes beneath its state directory by name. Where that leads out of it, only the kernel stands in between.
#[test]
fn the_daemon_reaches_no_file_that_is_not_its_own() {
    if !can_mount() {
        return;
    }
    for sandbox in ["auto", "off"] {
        let world = World::new();
        let mount = world.mount(&["--sandbox", sandbox]);
        let outside = world.out("outside");
        std::fs::create_dir(&outside).unwrap();
        let staging = world.path("state/staging");
        std::fs::rename(&staging, world.path("state/before")).unwrap();
        std::os::unix::fs::symlink(&outside, &staging).unwrap();
        if sandbox == "auto" && has_layer(&mount, "Landlock") {
            std::fs::write(mount.key("k"), "some bytes").unwrap_err();
            assert!(mount.log().contains("staging file: Permission denied"), "{}", mount.log());
            assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        } else {
            // It is the sandbox that hinders it.
            std::fs::write(mount.key("k"), "some bytes").unwrap();
        }
        std::fs::remove_file(&staging).unwrap();
        std::fs::rename(world.path("state/before"), &staging).unwrap();
        std::fs::write(mount.key("other"), "some bytes").unwrap();
        mount.unmount();
    }
}

/// A server that gives credentials which have expired already, lists nothing, and denies everything else: its address, and the tokens by
/// which it was asked.
fn credential_server() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let tokens = Arc::new(Mutex::new(Vec::new()));
    let asked = Arc::clone(&tokens);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let head = BufReader::new(&stream).lines().map_while(Result::ok);
            let head: Vec<_> = head.take_while(|line| !line.is_empty()).collect();
            let (status, body) = if head.iter().any(|line| line.starts_with("GET /credentials")) {
                let token = |line: &String| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("authorization").then(|| value.to_owned())
                };
                asked.lock().unwrap().extend(head.iter().find_map(token));
                let body = r#"{"AccessKeyId":"a","SecretAccessKey":"b","Token":"c","Expiration":"2020-01-01T00:00:00Z"}"#;
                ("200 OK", body)
            } else if head.iter().any(|line| line.contains("list-type=2")) {
                (
                    "200 OK",
                    "<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated></ListBucketResult>",
                )
            } else {
                ("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>")
            };
            let length = body.len();
            let answer =
                format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (url, tokens)
}

/// As Kubernetes puts a token into a pod, and a newer one in its place: by a link to another directory.
fn put_token(directory: &Path, token: &str) {
    std::fs::create_dir_all(directory.join(token)).unwrap();
    std::fs::write(directory.join(token).join("token"), token).unwrap();
    symlink(token, directory.join("new")).unwrap();
    std::fs::rename(directory.join("new"), directory.join("..data")).unwrap();
    let _ = symlink("..data/token", directory.join("token"));
}

#[test]
fn a_token_that_is_replaced_after_the_mount_is_read_by_the_daemon_that_is_shut_in() {
    if !can_mount() {
        return;
    }
    let (server, tokens) = credential_server();
    let mut world = World::new();
    let directory = world.out("tokens");
    put_token(&directory, "first");
    let token = directory.join("token").display().to_string();
    for (name, value) in [
        ("AWS_ENDPOINT_URL", &*server),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{server}/credentials")),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &token),
    ] {
        world.environment.push((name.to_owned(), value.to_owned()));
    }
    let mut command = world.mount_command(&["--bucket", "b=s3://bucket"]);
    command
        .env("HOME", world.path("out"))
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY");
    succeed(&mut command);
    let mount = world.at();
    has_layer(&mount, "Landlock");
    let asked_by = |token: &str| {
        let _ = std::fs::metadata(mount.key("something"));
        tokens.lock().unwrap().iter().any(|asked| asked == token)
    };
    until("the first token is used", || asked_by("first"));
    put_token(&directory, "second");
    until("the second token is used", || asked_by("second"));
    mount.signal("TERM");
}

#[test]
fn a_daemon_that_root_starts_for_a_user_has_the_rights_of_that_user_only() {
    if !can_mount() {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return skip("a daemon of root that becomes another user: needs root");
    }
    let world = open_world();
    let raw = images::noise(&world.catalog(), 4 << 20);
    let secret = world.catalog().join("secret.raw");
    std::fs::write(&secret, [7; 4096]).unwrap();
    let mut create = command("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "secret.raw"]);
    succeed(create.arg(world.catalog().join("top.qcow2")));
    std::fs::write(world.catalog().join("top.toml"), "allow = ['secret.raw']").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("/etc/shadow", world.catalog().join("shadow.raw")).unwrap();
    let arguments = ["-o", "user=nobody,allow_other,follow_links"];
    for key in ["first.raw", "second.raw"] {
        let mount = world.mount(&arguments);
        assert!(
            fields(&mount, "Uid").iter().all(|uids| *uids == format!("{NOBODY} {NOBODY} {NOBODY} {NOBODY}"))
        );
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(capabilities(&mount, set), 0, "{set}");
        }
        for image in ["secret/secret.raw", "top/top.raw", "shadow/shadow.raw"] {
            let error = std::fs::read(mount.path("images").join(image)).unwrap_err();
            assert!(matches!(error.raw_os_error(), Some(libc::EACCES | libc::ENOENT)), "{image}: {error}");
        }
        mount.cp(&mount.path("images/noise/noise.raw"), key);
        assert_eq!(mount.wait(key)["status"], "SUCCESS");
        assert_same(&mount.key(key), &raw);
        std::fs::write(mount.key("plain"), key).unwrap();
        for file in ["state", "state/log", "state/lock", "bucket/plain", &format!("bucket/{key}")] {
            assert_eq!(world.path(file).metadata().unwrap().uid(), NOBODY, "{file}");
        }
        assert_eq!(mount.path("images").metadata().unwrap().uid(), NOBODY);
        if key == "first.raw" {
            mount.unmount()
        } else {
            mount.signal("TERM")
        }
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        assert!(!mounts.contains(world.path("mnt").to_str().unwrap()));
    }
    for (user, reason) in [("nobody-at-all", "there is no user"), ("4294967295", "there is no user")] {
        let said = fail(&mut world.mount_command(&["-o", &format!("user={user}")]));
        assert!(said.contains(reason), "{said}");
    }
}

/// The same command as another user.
fn as_nobody(command: &Command) -> Command {
    let mut other = support::command("setpriv");
    other.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"]);
    other.arg(command.get_program()).args(command.get_args());
    other
}

#[test]
fn an_ordinary_user_mounts_and_unmounts_by_fusermount3() {
    if !can_mount() {
        return;
    }
    if !nix::unistd::geteuid().is_root() || !support::has("setpriv") {
        return skip("mounting as another user: needs root and setpriv");
    }
    if std::fs::metadata("/dev/fuse").unwrap().mode() & 0o6 != 0o6 {
        return skip(
            "mounting as another user: only root may open /dev/fuse here; tests/installed.rs does in a namespace",
        );
    }
    let world = open_world();
    let raw = images::noise(&world.catalog(), 1 << 20);
    let base = world.path("");
    std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o777)).unwrap();
    let bucket = format!("b=file://{}", world.bucket().display());
    for end in ["fusermount3", "TERM"] {
        // mount(8) tells the user's name.
        succeed(&mut as_nobody(&world.mount_command(&["--bucket", &bucket, "-o", "user=nobody"])));
        let mount = world.at();
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let line = mounts.lines().find(|line| line.contains(world.path("mnt").to_str().unwrap())).unwrap();
        assert!(line.contains(" fuse.freightfs ") && line.contains("nosuid,nodev"), "{line}");
        let read = succeed(&mut as_nobody(command("sha256sum").arg(mount.path("images/noise/noise.raw"))));
        assert!(read.starts_with(&sha256(&raw)));
        let copy = format!("echo kept >{}", mount.key(end).display());
        succeed(&mut as_nobody(command("bash").args(["-c", &copy])));
        assert!(fields(&mount, "NoNewPrivs").iter().all(|value| value == "1"));
        if end == "TERM" {
            mount.signal("TERM");
        } else {
            let pid = mount.pid();
            succeed(&mut as_nobody(command("fusermount3").arg("-u").arg(world.path("mnt"))));
            until("the daemon has ended", || !Path::new(&format!("/proc/{pid}")).exists() || world.is_dead());
        }
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        assert!(!mounts.contains(world.path("mnt").to_str().unwrap()), "{end}");
        assert_eq!(std::fs::read_to_string(world.bucket().join(end)).unwrap(), "kept\n");
    }
    let said = text(&run(&mut as_nobody(&world.mount_command(&["-o", "user=root"]))));
    assert!(said.contains("only root can mount for the user"), "{said}");
}

#[test]
fn nothing_that_mounts_is_left_of_a_daemon_that_was_killed() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let mount = world.mount(&[]);
    let place = world.path("mnt");
    let mounters = || -> Vec<String> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let is_ours = |line: String| line.starts_with(&format!("freightfs-mounter\0{}\0", place.display()));
        let found = processes
            .filter(|entry| std::fs::read_to_string(entry.path().join("cmdline")).is_ok_and(is_ours));
        found.map(|entry| entry.file_name().into_string().unwrap()).collect()
    };
    let found = mounters();
    assert_eq!(found.len(), 1);
    // Signals that end the daemon are not for it.
    succeed(command("kill").args(["-TERM", &found[0]]));
    assert_eq!(mounters(), found);
    mount.signal("KILL");
    until("the process that mounts has ended", || mounters().is_empty());
    run(command("fusermount3").args(["-u", "-z", "-q"]).arg(&place));
    // A daemon that cannot serve the mount leaves none.
    let said = fail(&mut world.mount_command(&["--bucket", "b=file:///nowhere/at/all"]));
    assert!(said.contains("nowhere"), "{said}");
    until("the process that mounts has ended", || mounters().is_empty());
    assert!(!fail(freightfs().arg("jobs").arg(&place)).is_empty());
}
