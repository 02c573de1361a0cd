//! Nothing waits for something else's store: what hangs holds up its own requests only.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::images::{self, Random};
use support::mount::{Mount, World};
use support::proxied::{Setup, until};
use support::proxy::{Fate, Request};
use support::{can_mount, command, run, succeed};

/// A store that does not answer requests about some keys as long as it is told so.
#[derive(Clone, Default)]
struct Stopped {
    is_stopped: Arc<AtomicBool>,
    unanswered: Arc<AtomicUsize>,
}

impl Stopped {
    fn fate(&self, request: &Request, method: &str, key: &str) -> Fate {
        let is_meant = request.method == method && request.target.contains(key);
        if !is_meant || !self.is_stopped.load(Ordering::SeqCst) {
            return Fate::Forward;
        }
        self.unanswered.fetch_add(1, Ordering::SeqCst);
        Fate::Hang
    }

    fn stop(&self, stopped: bool) {
        self.is_stopped.store(stopped, Ordering::SeqCst);
    }

    fn wait_until_asked(&self) {
        until("the store is asked", || self.unanswered.load(Ordering::SeqCst) > 0);
    }
}

/// More than the dispatcher has threads.
const WRITERS: usize = 12;

/// A mount of `b`, which may be stopped, and of `c`, a directory.
fn mount(setup: &Setup) -> Mount {
    images::odd(&setup.world.catalog());
    mount_again(setup, "timeout=5")
}

fn mount_again(setup: &Setup, timeout: &str) -> Mount {
    let other = format!("c=file://{}", setup.world.bucket().display());
    setup.mount(&["--bucket", &other, "-o", timeout])
}

fn names(mount: &Mount, directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(mount.path(directory)).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Everything that does not need what hangs.
fn assert_the_rest_answers(mount: &Mount) {
    assert_eq!(names(mount, ""), [".freightfs", "buckets", "images", "jobs"]);
    assert_eq!(names(mount, "images"), ["odd"]);
    assert!(std::fs::metadata(mount.path("images/odd/odd.vhd")).unwrap().len() > 0);
    assert!(std::fs::read(mount.path("images/odd/odd.raw")).unwrap().len() > 1000);
    std::fs::write(mount.path("buckets/c/file"), "bytes").unwrap();
    assert_eq!(std::fs::read(mount.path("buckets/c/file")).unwrap(), b"bytes");
    assert!(names(mount, "buckets/c").contains(&"file".to_owned()));
    assert_eq!(std::fs::metadata(mount.key("other")).unwrap().len(), 5);
    assert_eq!(std::fs::read(mount.key("other")).unwrap(), b"other");
    assert!(names(mount, "buckets/b").contains(&"other".to_owned()));
}

fn assert_all_wait<T>(threads: &[JoinHandle<T>]) {
    assert!(threads.iter().all(|thread| !thread.is_finished()), "the store was not what they waited for");
}

#[test]
fn writes_to_an_object_that_does_not_come_hold_up_nobody_else() {
    let stopped = Stopped::default();
    let store = stopped.clone();
    let decide = move |request: &Request| store.fate(request, "GET", "/big");
    let Some(setup) = Setup::new("writers-wait", decide) else { return };
    let mount = mount(&setup);
    let key = |number: usize| mount.key(&format!("big-{number}"));
    for number in 0..WRITERS {
        std::fs::write(key(number), Random(number as u64).bytes(300_000)).unwrap();
    }
    std::fs::write(mount.key("other"), "other").unwrap();
    stopped.stop(true);
    // Each writes a file of its own: the kernel lets one write to a file at a time.
    let write = |number: usize| {
        let file = OpenOptions::new().read(true).write(true).open(key(number)).unwrap();
        std::thread::spawn(move || {
            file.write_all_at(b"changed", 100)?;
            nix::unistd::close(file).map_err(std::io::Error::from)
        })
    };
    let writers: Vec<_> = (0..WRITERS).map(write).collect();
    until("the store is asked for all", || stopped.unanswered.load(Ordering::SeqCst) >= WRITERS);
    assert_the_rest_answers(&mount);
    assert_eq!(std::fs::metadata(key(3)).unwrap().len(), 300_000);
    assert_all_wait(&writers);
    stopped.stop(false);
    for writer in writers {
        writer.join().unwrap().unwrap();
    }
    mount.unmount();
    for number in [0, WRITERS - 1] {
        let mut expected = Random(number as u64).bytes(300_000);
        expected[100..107].copy_from_slice(b"changed");
        assert!(std::fs::read(setup.fetch(&format!("big-{number}"))).unwrap() == expected);
    }
}

#[test]
fn a_close_whose_upload_hangs_holds_up_nobody_else() {
    let stopped = Stopped::default();
    let store = stopped.clone();
    let decide = move |request: &Request| store.fate(request, "PUT", "/slow-");
    let Some(setup) = Setup::new("closes-wait", decide) else { return };
    let mount = mount(&setup);
    std::fs::write(mount.key("other"), "other").unwrap();
    stopped.stop(true);
    let write = |number: usize| {
        let key = mount.key(&format!("slow-{number}"));
        std::thread::spawn(move || {
            let mut file = File::create(key).unwrap();
            file.write_all(b"slow").unwrap();
            nix::unistd::close(file)
        })
    };
    let writers: Vec<_> = (0..30).map(write).collect();
    stopped.wait_until_asked();
    assert_the_rest_answers(&mount);
    for number in 0..30 {
        let key = mount.key(&format!("slow-{number}"));
        until("it is written", || std::fs::metadata(&key).is_ok_and(|meta| meta.len() == 4));
        // Its number, size and bytes are there before its object is.
        assert_eq!(std::fs::read(&key).unwrap(), b"slow");
    }
    assert_all_wait(&writers);
    stopped.stop(false);
    let closed: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap().is_ok()).collect();
    // Those whose request was not answered in time were sent again.
    assert!(closed.iter().all(|closed| *closed), "{closed:?}");
    mount.unmount();
    let last = closed.iter().rposition(|closed| *closed).unwrap();
    assert_eq!(std::fs::read(setup.fetch(&format!("slow-{last}"))).unwrap(), b"slow");
}

#[test]
fn what_is_set_on_a_file_while_its_content_before_is_put_in_place_is_that_of_the_new_one() {
    // The first request that puts the object in place arrives when the test lets it.
    let held = Arc::new(AtomicBool::new(false));
    let is_held = Arc::clone(&held);
    let decide = move |request: &Request| {
        let places = request.method == "PUT" && request.target.ends_with("/file");
        if places && !held.swap(true, Ordering::SeqCst) { Fate::Hold } else { Fate::Forward }
    };
    let Some(setup) = Setup::new("set-meanwhile", decide) else { return };
    let mount = mount_again(&setup, "timeout=60");
    let key = mount.key("file");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| std::fs::write(&key, "one"));
        until("the first content is on its way", || is_held.load(Ordering::SeqCst));
        let mut file = File::create(&key).unwrap();
        file.write_all(b"the second").unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        file.set_modified(time).unwrap();
        std::fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(file.metadata().unwrap().mtime(), 1_000_000_000);
        setup.proxy.release();
        first.join().unwrap().unwrap();
        assert_eq!(std::fs::metadata(&key).unwrap().mtime(), 1_000_000_000, "after the first content");
        nix::unistd::close(file).unwrap();
    });
    let meta = std::fs::metadata(&key).unwrap();
    assert_eq!((meta.len(), meta.mtime(), meta.mode() & 0o777), (10, 1_000_000_000, 0o600));
    mount.unmount();
}

#[test]
fn a_name_is_removed_although_the_bytes_do_not_come_that_somebody_has_open() {
    let stopped = Stopped::default();
    let store = stopped.clone();
    let decide = move |request: &Request| store.fate(request, "GET", "/open");
    let Some(setup) = Setup::new("removed-open", decide) else { return };
    let mount = mount_again(&setup, "timeout=3600");
    std::fs::write(mount.key("open"), Random(1).bytes(300_000)).unwrap();
    mount.unmount();
    let mount = mount_again(&setup, "timeout=3600");
    let file = File::open(mount.key("open")).unwrap();
    stopped.stop(true);
    std::fs::remove_file(mount.key("open")).unwrap();
    assert!(stopped.unanswered.load(Ordering::SeqCst) > 0 && !mount.key("open").exists());
    stopped.stop(false);
    setup.proxy.release();
    let read = file.read_at(&mut [0; 10], 0);
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::ESTALE));
    drop(file);
    mount.unmount();
}

/// Whether the bucket `c` has this mode of some file.
fn has_mode(setup: &Setup, mode: u32) -> bool {
    let documents = std::fs::read_dir(setup.world.bucket().join(".freightfs/attributes"));
    let mut documents = documents.into_iter().flatten().map(|entry| entry.unwrap().path());
    documents.any(|path| {
        std::fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("\"mode\":{mode}")))
    })
}

#[test]
fn what_is_set_on_files_waits_for_no_other_store_and_neither_does_the_end_of_the_mount() {
    let stopped = Stopped::default();
    let store = stopped.clone();
    let decide = move |request: &Request| store.fate(request, "PUT", "/");
    let Some(setup) = Setup::new("attributes-wait", decide) else { return };
    images::odd(&setup.world.catalog());
    // What hangs does so for ever.
    let mount_again = || mount_again(&setup, "timeout=3600");
    let mount = mount_again();
    let set = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    std::fs::write(mount.key("other"), "other").unwrap();
    std::fs::write(mount.path("buckets/c/file"), "bytes").unwrap();
    stopped.stop(true);
    set(&mount.key("other"), 0o640);
    stopped.wait_until_asked();
    mount.cp(&mount.path("images/odd/odd.vhd"), "odd.vhd");
    set(&mount.path("buckets/c/file"), 0o611);
    until("the other bucket has it", || has_mode(&setup, 0o611));
    set(&mount.path("buckets/c/file"), 0o622);
    mount.signal("TERM");
    assert!(has_mode(&setup, 0o622));
    stopped.stop(false);
    let mount = mount_again();
    assert!(
        mount
            .log()
            .contains("what was last set on its files is lost: its store did not take it bucket=\"b\"")
    );
    let status = mount.wait("odd.vhd");
    assert_eq!(status["status"], "SUCCESS", "{status}");
    let made = std::fs::read(mount.path("images/odd/odd.vhd")).unwrap();
    // After umount nothing is lost: the daemon ends when the store has it.
    stopped.unanswered.store(0, Ordering::SeqCst);
    stopped.stop(true);
    set(&mount.key("odd.vhd"), 0o604);
    stopped.wait_until_asked();
    let pid = mount.pid();
    let unmounting = std::thread::spawn(|| mount.unmount());
    until("the mount is gone", || !setup.world.path("mnt/images").exists());
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "the daemon has ended without having saved it");
    stopped.stop(false);
    setup.proxy.release();
    unmounting.join().unwrap();
    assert!(std::fs::read(setup.fetch("odd.vhd")).unwrap() == made);
    let mount = mount_again();
    assert_eq!(std::fs::metadata(mount.key("odd.vhd")).unwrap().mode() & 0o777, 0o604);
    mount.unmount();
}

/// A process that does nothing until it is dropped.
struct Paused(u32);

impl Paused {
    fn new(pid: u32) -> Self {
        succeed(command("kill").args(["-STOP", &pid.to_string()]));
        Self(pid)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        run(command("kill").args(["-CONT", &self.0.to_string()]));
    }
}

/// What hangs as a directory of NFS does whose server is gone: a mount whose daemon is stopped.
#[test]
fn a_local_bucket_whose_directory_hangs_holds_up_nobody_else() {
    /// More than the threads of the daemon were for all its work.
    const ASKERS: usize = 1100;
    if !can_mount() {
        return;
    }
    let (below, world) = (World::new(), World::new());
    images::odd(&world.catalog());
    let server = below.mount(&[]);
    // At its top, names of our own files are not taken.
    std::fs::create_dir(server.key("deep")).unwrap();
    let hangs = format!("hangs=file://{}", server.key("deep").display());
    let other = format!("c=file://{}", world.path("out").display());
    let mount = world.mount(&["--bucket", &other, "--bucket", &hangs, "-o", "timeout=3600"]);
    std::fs::write(mount.key("other"), "other").unwrap();
    std::fs::write(mount.path("buckets/hangs/file"), "bytes").unwrap();
    let paused = Paused::new(server.pid());
    let ask = |number: usize| {
        let place = mount.path(&format!("buckets/hangs/file-{number}"));
        let ask = move || std::fs::metadata(place).map(drop).map_err(|e| e.kind());
        std::thread::Builder::new().stack_size(1 << 17).spawn(ask).unwrap()
    };
    let askers: Vec<_> = (0..ASKERS).map(ask).collect();
    let threads = || std::fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap().count();
    let file = mount.path("buckets/hangs/file");
    let reader = std::thread::spawn(move || std::fs::read(file));
    until("the directory is asked", || threads() > 64);
    assert_the_rest_answers(&mount);
    assert!(threads() < 500, "{} threads", threads());
    drop(paused);
    for asker in askers {
        assert!(matches!(
            asker.join().unwrap(),
            Err(std::io::ErrorKind::NotFound | std::io::ErrorKind::TimedOut)
        ));
    }
    assert!(reader.join().unwrap().is_ok_and(|bytes| bytes == b"bytes"));
    mount.unmount();
    server.unmount();
}

#[test]
fn closes_of_more_files_than_there_are_threads_all_end() {
    const FILES: usize = 1100;
    if !can_mount() {
        return;
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let world = World::new();
    let mount = world.mount(&[]);
    let together = Arc::new(Barrier::new(FILES));
    let write = |number: usize| {
        let (key, together) = (mount.key(&format!("f{number}")), Arc::clone(&together));
        let work = move || {
            let mut file = File::create(key).unwrap();
            write!(file, "{number}").unwrap();
            together.wait();
            nix::unistd::close(file)
        };
        std::thread::Builder::new().stack_size(1 << 17).spawn(work).unwrap()
    };
    let closers: Vec<_> = (0..FILES).map(write).collect();
    until("something is closed", || closers.iter().any(JoinHandle::is_finished));
    assert_eq!(names(&mount, ""), [".freightfs", "buckets", "images", "jobs"]);
    for closer in closers {
        closer.join().unwrap().unwrap();
    }
    mount.unmount();
    for number in 0..FILES {
        let object = std::fs::read_to_string(world.bucket().join(format!("f{number}"))).unwrap();
        assert_eq!(object, number.to_string());
    }
}
