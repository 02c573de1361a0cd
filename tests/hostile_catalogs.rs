//! Catalogs made to harm: what is no file, links, sidecars, names and numbers of files. Each is refused by name, costs
//! its own image only, and the images beside it are listed, read and exported.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use freightfs::catalog::{Catalog, CatalogStore, Entry, LocalFiles};
use freightfs::error::{ErrorKind, Result};
use freightfs::format::OutputFormat;
use freightfs::storage::{Generation, Storage};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use support::mount::{Mount, World};
use support::{can_mount, command, freightfs, run, sh, succeed, text};

const GOOD: [u8; 4096] = [7; 4096];

fn write(path: PathBuf, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn fifo(path: PathBuf) {
    nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
}

/// The parsed image.json of an image.
fn document(mount: &Mount, id: &str) -> serde_json::Value {
    let json = std::fs::read(mount.path("images").join(id).join("image.json")).unwrap();
    serde_json::from_slice(&json).unwrap()
}

/// Why an image, or its first disk, cannot be used.
fn reason(mount: &Mount, id: &str) -> String {
    let json = document(mount, id);
    let error = if json["error"].is_null() { &json["disks"][0]["error"] } else { &json["error"] };
    format!("{} {} {}", error["code"].as_str().unwrap_or("none"), error["details"], error["cause"])
}

/// Everything is listed, and the good images are read and exported.
fn serves(mount: &Mount, good: &[&str]) {
    let listed = sh(&format!("ls -lR {} | wc -l", mount.path("images").display()));
    assert!(listed.trim().parse::<u32>().unwrap() > 10, "{listed}");
    for id in good {
        let file = mount.path(&format!("images/{id}/{id}.raw"));
        assert_eq!(std::fs::read(&file).unwrap(), GOOD, "{id}");
        let key = format!("{id}.qcow2");
        mount.cp(&mount.path(&format!("images/{id}/{id}.qcow2")), &key);
        assert_eq!(mount.wait(&key)["status"], "SUCCESS", "{id}");
    }
}

/// None of the files of an image opens, and its export fails.
fn opens_not(mount: &Mount, id: &str, errno: i32) {
    let mut files = 0;
    for entry in std::fs::read_dir(mount.path("images").join(id)).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name() != Some(OsStr::new("image.json")) {
            let error = std::fs::File::open(&path).err().and_then(|e| e.raw_os_error());
            assert_eq!(error, Some(errno), "{}", path.display());
            files += 1;
        }
    }
    assert!(files > 0, "{id} has no files");
}

#[test]
fn what_is_no_file_hangs_nothing_and_is_refused_by_name() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let at = |name: &str| world.catalog().join(name);
    write(at("good.raw"), GOOD);
    fifo(at("fifo.raw"));
    fifo(at("piped.toml"));
    write(at("piped.raw"), GOOD);
    symlink("/dev/zero", at("zeros.toml")).unwrap();
    write(at("zeros.raw"), GOOD);
    let _listening = UnixListener::bind(at("socket.raw")).unwrap();
    write(at("pair/system.raw"), GOOD);
    fifo(at("pair/z.raw"));
    write(at("listing.toml"), "disks = [{ file = 'fifo.raw' }, { file = 'pair', format = 'raw' }]\n");
    std::fs::create_dir(at("dir.raw")).unwrap();
    std::fs::create_dir(at("dir.toml")).unwrap();
    // By who may make devices.
    let made = mknod(&at("block.raw"), SFlag::S_IFBLK, Mode::S_IRUSR, makedev(7, 200)).is_ok()
        && mknod(&at("full.raw"), SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 7)).is_ok();
    let mount = world.mount(&["--formats", "raw:qcow2"]);
    serves(&mount, &["good", "pair"]);
    for (id, expected) in [
        ("piped", "a FIFO"),
        ("zeros", "leads out of the catalog"),
        ("socket", "a socket"),
        ("listing", "a FIFO"),
        ("block", "a block device"),
        ("full", "a character device"),
    ] {
        if !made && ["block", "full"].contains(&id) {
            support::skip("devices in a catalog: this user cannot make any");
        } else {
            let reason = reason(&mount, id);
            assert!(reason.contains(expected) && reason.contains("/catalog/"), "{id}: {reason}");
            assert!(std::fs::File::open(mount.path(&format!("images/{id}/{id}.raw"))).is_err(), "{id}");
        }
    }
    let second = document(&mount, "pair")["disks"][1]["error"]["details"].as_str().unwrap().to_owned();
    assert!(second.contains("/pair/z.raw") && second.contains("a FIFO"), "{second}");
    mount.unmount();
    // The same by name, and where else files are read whole.
    for arguments in [
        vec!["info", "fifo.raw"],
        vec!["info", "socket.raw"],
        vec!["convert", "--quiet", "fifo.raw", "to.qcow2"],
        vec!["mount", "--policy", "piped.toml", ".", "../mnt"],
        vec!["mount", "--policy", "/dev/zero", ".", "../mnt"],
        vec!["mount", "piped.toml", "../mnt"],
        vec!["status", "piped.toml.status"],
    ] {
        if arguments[0] == "status" {
            fifo(at("piped.toml.status"));
        }
        let output = run(freightfs().current_dir(world.catalog()).args(&arguments));
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", text(&output));
        assert!(
            text(&output).contains("not a regular file") || arguments[1] == "socket.raw",
            "{}",
            text(&output)
        );
    }
}

#[test]
fn links_and_names_lead_out_of_a_catalog_only_where_the_mount_says_so() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let at = |name: &str| world.catalog().join(name);
    write(at("good.raw"), GOOD);
    write(at("sub/system.raw"), GOOD);
    let secret = world.out("secret.raw");
    write(secret.clone(), GOOD);
    write(world.out("secret.toml"), "name = 'Secret'\n");
    write(world.out("dir/system.raw"), GOOD);
    let links = [
        ("absolute.raw", secret.clone()),
        ("within.raw", at("good.raw")),
        ("relative.raw", PathBuf::from("../out/secret.raw")),
        ("told.toml", PathBuf::from("../out/secret.toml")),
        ("folder", PathBuf::from("../out/dir")),
        ("deep/system.raw", PathBuf::from("../../out/secret.raw")),
        ("magic.raw", PathBuf::from("/proc/self/exe")),
    ];
    std::fs::create_dir(at("deep")).unwrap();
    for (name, target) in &links {
        symlink(target, at(name)).unwrap();
    }
    write(at("told.raw"), GOOD);
    write(at("dots.toml"), "disks = [{ file = '../out/secret.raw' }]\n");
    write(at("named.toml"), format!("disks = [{{ file = {:?} }}]\n", secret.display().to_string()));
    // Those within are followed: relative ones, and what they lead to.
    symlink("good.raw", at("near.raw")).unwrap();
    symlink("sub", at("nearby")).unwrap();
    symlink("sub/../near.raw", at("chain.raw")).unwrap();
    symlink("loop.raw", at("loop.raw")).unwrap();
    symlink("nowhere", at("gone.raw")).unwrap();
    // A backing file, in the allowed list or not.
    let create = "qemu-img create -q -f qcow2 -F raw -b";
    for (name, base) in
        [("far", "../out/secret.raw"), ("linked", "relative.raw"), ("lawful", "sub/system.raw")]
    {
        sh(&format!("cd {} && {create} {base} {name}.qcow2", world.catalog().display()));
        write(at(&format!("{name}.toml")), format!("allow = ['{base}']\n"));
    }
    let refused =
        ["absolute", "within", "relative", "told", "folder", "deep", "magic", "dots", "named", "far"];
    let served = ["good", "sub", "near", "nearby", "chain", "lawful"];

    let mount = world.mount(&["--formats", "raw:qcow2"]);
    serves(&mount, &served);
    for id in refused {
        let reason = reason(&mount, id);
        assert!(reason.starts_with("reference_denied") && reason.contains("follow_links"), "{id}: {reason}");
        if id != "folder" {
            opens_not(&mount, id, libc::EPERM);
        }
    }
    for (id, expected) in [("linked", "symbolic link"), ("loop", "too many levels"), ("gone", "not_found")] {
        let reason = reason(&mount, id).to_lowercase();
        assert!(reason.contains(expected), "{id}: {reason}");
    }
    sh(&format!("ls -lR {}", mount.path("images").display()));
    let log = mount.log();
    let is_said = |line: &&str, name: &str| {
        line.contains("catalog::local_files") && line.contains(&format!("/catalog/{name}: leads out"))
    };
    let lines = |name: &str| log.lines().filter(|line| is_said(line, name)).count();
    for name in ["absolute.raw", "told.toml", "folder", "deep/system.raw"] {
        assert_eq!(lines(name), 1, "{name}: {log}");
    }
    mount.unmount();

    let mount = world.mount(&["--formats", "raw:qcow2", "--follow-links"]);
    serves(&mount, &["absolute", "within", "relative", "told", "folder", "deep", "dots", "named", "far"]);
    assert_eq!(document(&mount, "told")["name"], "Secret");
    assert!(reason(&mount, "linked").contains("symbolic link"), "{}", reason(&mount, "linked"));
    let shown = std::fs::read_to_string(mount.path(".freightfs/config")).unwrap();
    assert!(shown.contains("follow_links = true"), "{shown}");
    mount.unmount();
    // By the configuration file; and a catalog that is itself named by a link is nobody else's doing.
    let config = world.path("config.toml");
    write(config.clone(), "catalog = 'by-link'\nfollow_links = true\nformats = ['raw']\n");
    symlink(world.catalog(), world.path("by-link")).unwrap();
    world.source = Some(config.display().to_string());
    let mount = world.mount_exactly(&[]);
    assert_eq!(std::fs::read(mount.path("images/absolute/absolute.raw")).unwrap(), GOOD);
    mount.unmount();
    world.source = Some(world.path("by-link").display().to_string());
    let near =
        format!("allow = [{:?}]\n", world.path("by-link").join("sub/system.raw").display().to_string());
    write(world.catalog().join("lawful.toml"), near);
    let mount = world.mount(&["--formats", "raw:qcow2"]);
    serves(&mount, &["good", "near", "lawful"]);
    mount.unmount();
    // Who types a name means what it leads to.
    let info = succeed(freightfs().arg("info").arg(world.catalog().join("absolute.raw")));
    assert!(info.contains("4096") || info.contains("4 K"), "{info}");
    succeed(
        freightfs()
            .args(["convert", "--quiet"])
            .arg(world.catalog().join("relative.raw"))
            .arg(world.out("c.qcow2")),
    );
}

#[test]
fn a_file_beside_it_makes_no_refused_image_exportable() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let at = |name: &str| world.catalog().join(name);
    write(at("good.raw"), GOOD);
    sh(&format!("qemu-img create -q -f qcow2 {} 1M", at("web.qcow2").display()));
    write(at("web.toml"), "origin = 'market'\nencrypted = true\n");
    let mount = world.mount(&["--formats", "raw:qcow2", "--policy", "alibaba-ecs"]);
    let all_refused = |ids: &[&str]| {
        for id in ids {
            opens_not(&mount, id, libc::EPERM);
            let json = document(&mount, id);
            assert_eq!((&json["exportable"], &json["origin"]), (&false.into(), &"market".into()), "{json:#}");
        }
    };
    all_refused(&["web"]);
    write(at("web.raw"), "");
    all_refused(&["web.qcow2", "web.raw"]);
    write(at("web/web.raw"), GOOD);
    all_refused(&["web", "web.qcow2", "web.raw"]);
    // One that is not said to be anything is exported all the same.
    assert_eq!(document(&mount, "good")["exportable"], true);
    mount.unmount();
}

#[test]
fn every_name_that_can_be_shown_is_and_the_others_are_in_the_log_once() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let at = |name: &[u8]| world.catalog().join(OsStr::from_bytes(name));
    let long = |length: usize, end: &str| format!("{}{end}", "l".repeat(length - end.len()));
    let shown =
        ["good", "a b", "ü", "-rf", "\u{202e}gpj", "quote\"'$(id)", "%s%n", "con.txt", "x..", &long(251, "")];
    for id in shown {
        write(at(format!("{id}.raw").as_bytes()), GOOD);
    }
    write(at(b"told.raw"), GOOD);
    write(
        at(b"told.toml"),
        "name = '''\u{1b}]0;owned'''\n".replace('\u{1b}', "\\u001b").replace("'''", "\""),
    );
    let hidden: [&[u8]; 4] = [b"new\nline.raw", b"\x1b[2J.raw", b"bad\xff.raw", b"tab\t/disk.raw"];
    for name in hidden {
        write(at(name), GOOD);
    }
    let deep: PathBuf = std::iter::repeat_n("d", 500).collect();
    std::fs::create_dir_all(world.catalog().join(&deep)).unwrap();
    write(world.catalog().join(deep.join("disk.raw")), GOOD);
    let mount = world.mount(&[]);
    let names: Vec<_> =
        std::fs::read_dir(mount.path("images")).unwrap().map(|e| e.unwrap().file_name()).collect();
    for id in shown.iter().chain(["told"].iter()) {
        assert!(names.contains(&OsStr::new(id).to_owned()), "{id}: {names:?}");
        assert_eq!(std::fs::read(mount.path("images").join(id).join(format!("{id}.raw"))).unwrap(), GOOD);
    }
    assert_eq!(names.len(), shown.len() + 1);
    // What is listed can be looked up, however long: files whose names would be too long are not listed.
    let listed = sh(&format!("ls -lR {} 2>&1", mount.path("images").display()));
    assert!(!listed.contains("cannot access") && !listed.contains("?????"), "{listed}");
    serves(&mount, &["good", "-rf", "quote\"'$(id)"]);
    sh(&format!("ls -lR {}", mount.path("images").display()));
    let log = mount.log();
    assert_eq!(log.lines().filter(|line| line.contains("is not shown")).count(), hidden.len(), "{log}");
    assert!(!log.contains('\u{1b}') && !log.contains('\u{202e}'), "{log}");
    mount.unmount();
}

/// A catalog's files, and how often they were listed, stated and opened.
struct Counted {
    files: LocalFiles,
    /// Names that are looked for before a listing ends, beginning with the second one.
    awaited: usize,
    listed: AtomicUsize,
    stated: AtomicUsize,
    opened: AtomicUsize,
}

impl Counted {
    fn new(root: &Path) -> Arc<Self> {
        Arc::new(Self::awaiting(root, 0))
    }

    fn awaiting(root: &Path, awaited: usize) -> Self {
        let files = LocalFiles::open(root).unwrap();
        let none = AtomicUsize::default;
        Self { files, awaited, listed: none(), stated: none(), opened: none() }
    }

    /// Listings, look-ups of times, and openings since this was last asked.
    fn taken(&self) -> [usize; 3] {
        [&self.listed, &self.stated, &self.opened].map(|count| count.swap(0, Ordering::SeqCst))
    }
}

impl CatalogStore for Counted {
    fn root(&self) -> &Path {
        self.files.root()
    }

    fn place(&self, path: &Path) -> String {
        self.files.place(path)
    }

    fn entries(&self) -> Result<BTreeMap<String, Entry>> {
        let before = self.listed.fetch_add(1, Ordering::SeqCst);
        while before > 0 && self.stated.load(Ordering::SeqCst) < self.awaited {
            std::thread::yield_now();
        }
        self.files.entries()
    }

    fn read_text(&self, path: &Path, limit: u64) -> Result<String> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        self.files.read_text(path, limit)
    }

    fn stat(&self, path: &Path) -> Result<Generation> {
        self.stated.fetch_add(1, Ordering::SeqCst);
        self.files.stat(path)
    }

    fn is_current(&self, path: &Path, opened: &Generation) -> bool {
        self.stated.fetch_add(1, Ordering::SeqCst);
        self.files.is_current(path, opened)
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        self.files.open(path)
    }

    fn open_reference(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        self.files.open_reference(path)
    }

    /// Only what is asked for makes a listing, and no passing of time.
    fn listing_age(&self) -> Duration {
        Duration::from_secs(3600)
    }

    fn may_have_new(&self, id: &str, since: SystemTime) -> bool {
        self.stated.fetch_add(1, Ordering::SeqCst);
        self.files.may_have_new(id, since)
    }

    fn is_remote(&self) -> bool {
        false
    }
}

#[test]
fn ten_thousand_names_and_as_many_that_are_missing_cost_a_few_listings() {
    let directory = tempfile::tempdir().unwrap();
    let count = 10_000;
    let id = |number: usize| format!("image{number}");
    for number in 0..count {
        write(directory.path().join(id(number) + ".raw"), "");
    }
    let store = Counted::new(directory.path());
    let catalog = Catalog::new(Arc::clone(&store) as Arc<dyn CatalogStore>);
    assert_eq!(catalog.images().unwrap().len(), count);
    for number in 0..count {
        catalog.image(&id(number)).unwrap();
    }
    assert_eq!(store.taken(), [1, 0, 0]);
    for number in 0..count {
        let error = catalog.image(&format!("missing{number}")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    // The directory may have been changed in the clock's tick in which it was listed: then once more.
    let [listed, stated, opened] = store.taken();
    assert!(listed <= 20 && stated <= count && opened == 0, "{listed} {stated} {opened}");
    // What comes is found all the same, at the top and in a directory that was there without an image.
    write(directory.path().join("new.raw"), "");
    catalog.image("new").unwrap();
    std::fs::create_dir(directory.path().join("folder")).unwrap();
    assert!(catalog.image("folder").is_err());
    write(directory.path().join("folder/disk.raw"), "");
    catalog.image("folder").unwrap();
}

#[test]
fn any_number_of_names_that_are_looked_for_at_once_cost_two_listings() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path().join("old.raw"), "");
    let count = 200;
    let store = Arc::new(Counted::awaiting(directory.path(), count));
    let catalog = Catalog::new(Arc::clone(&store) as Arc<dyn CatalogStore>);
    catalog.images().unwrap();
    write(directory.path().join("new.raw"), "");
    std::thread::scope(|scope| {
        for number in 0..count {
            let catalog = &catalog;
            scope.spawn(move || match number % 2 {
                0 => assert_eq!(catalog.image("new").unwrap().id, "new"),
                _ => assert!(catalog.image("missing").is_err()),
            });
        }
    });
    // The one that was there, one that the first asked for, and one for those who came while that was made.
    assert!(store.taken()[0] <= 3);
}

/// Held by tests that count or limit the descriptors of this process.
static DESCRIPTORS: Mutex<()> = Mutex::new(());

/// Descriptors that this process has open in a directory.
fn descriptors(directory: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    links.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(directory))).count()
}

#[test]
fn disks_that_nobody_uses_have_a_bound_of_descriptors_together() {
    let _alone = DESCRIPTORS.lock();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().canonicalize().unwrap();
    let (plain, split, extents) = (2000, 6, 250);
    for number in 0..plain {
        write(root.join(format!("p{number}.raw")), GOOD);
    }
    for number in 0..split {
        // Each names as many files of one sector.
        let (mut text, mut allow) =
            ("# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\n".to_owned(), String::new());
        for extent in 0..extents {
            let name = format!("e/{number}-{extent}.bin");
            write(root.join(&name), [1; 512]);
            text += &format!("RW 1 FLAT \"{name}\" 0\n");
            allow += &format!("'{name}',");
        }
        write(root.join(format!("v{number}.vmdk")), text);
        write(root.join(format!("v{number}.toml")), format!("allow = [{allow}]\n"));
    }
    let catalog = Catalog::open(&root).unwrap();
    let mut most = 0;
    let images = catalog.images().unwrap();
    assert_eq!(images.len(), plain + split);
    for (number, image) in images.values().enumerate() {
        assert!(image.error.is_none(), "{:?}", image.error);
        let disk = catalog.open_disk(&image.disks[0]).unwrap();
        disk.file(OutputFormat::FixedVhd).unwrap();
        if number % 50 == 0 || image.id.starts_with('v') {
            most = most.max(descriptors(&root));
        }
    }
    // The one in use, and 1024 of others.
    assert!(most <= 1024 + extents + 1, "{most} descriptors");
    assert!(most > extents, "{most} descriptors");
    for number in 0..100 {
        let image = catalog.image(&format!("p{number}")).unwrap();
        catalog.open_disk(&image.disks[0]).unwrap();
    }
    assert_eq!(descriptors(&root), 64);
}

#[test]
fn images_leave_half_of_the_descriptors_to_everything_else() {
    // In a process of its own, whose limit is nobody else's.
    if std::env::var_os("FREIGHTFS_TEST_DESCRIPTORS").is_none() {
        let name = "images_leave_half_of_the_descriptors_to_everything_else";
        let mut alone = command(std::env::current_exe().unwrap());
        let said = succeed(alone.args(["--exact", name]).env("FREIGHTFS_TEST_DESCRIPTORS", "1"));
        assert!(said.contains("1 passed"), "{said}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().canonicalize().unwrap();
    for number in 0..60 {
        write(root.join(format!("p{number}.raw")), GOOD);
    }
    let catalog = Catalog::open(&root).unwrap();
    let open = |number: usize| {
        let image = catalog.image(&format!("p{number}")).unwrap();
        catalog.open_disk(&image.disks[0])
    };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 80, hard).unwrap();
    // Those that nobody uses give way; those that are used do not.
    (0..60).for_each(|number| drop(open(number).unwrap()));
    let used: Vec<_> = (0..40).map(|number| open(number).unwrap()).collect();
    let refused = open(40).err().unwrap();
    assert_eq!((refused.kind(), refused.is_transient()), (ErrorKind::Busy, true), "{}", refused.report());
    assert!(refused.report().contains("p40.raw"), "{}", refused.report());
    assert_eq!(descriptors(&root), 40);
    drop(used);
    open(40).unwrap();
    // Of these one image has a quarter of all at most.
    let allow: String = (0..60).map(|number| format!("'p{number}.raw',")).collect();
    let extents: String = (0..60).map(|number| format!("RW 8 FLAT \"p{number}.raw\" 0\n")).collect();
    let head = "# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\n";
    write(root.join("wide.vmdk"), head.to_owned() + &extents);
    write(root.join("wide.toml"), format!("allow = [{allow}]\n"));
    let wide = Catalog::open(&root).unwrap();
    let error = wide.open_disk(&wide.image("wide").unwrap().disks[0]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{}", error.report());
    assert!(error.report().contains("more than the 20 files"), "{}", error.report());
}

#[test]
fn documents_and_attributes_of_an_image_stay_small_whatever_its_names_are() {
    if !can_mount() {
        return;
    }
    let world = World::new();
    let at = |name: &str| world.catalog().join(name);
    // As long as a reader takes them, and of what grows most when it is escaped.
    let name = "\u{202e}\u{1b}\"\\".repeat(1023 / 7);
    let disks = 256;
    for number in 0..disks {
        let text = format!(
            "# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\nRW 8 FLAT \"{}\" 0\n",
            name.replace('"', "'")
        );
        write(at(&format!("many/{}{number}.vmdk", "d".repeat(200))), text);
    }
    write(at("many.toml"), format!("name = {:?}\n[tags]\n", "n".repeat(1024)));
    let mount = world.mount(&["-o", "formats=raw:qcow2:vhd:vmdk:vhdx:vdi:zvhd:zvhd2"]);
    sh(&format!("ls -l {} > {}", mount.path("images/many").display(), world.out("listed").display()));
    let json = std::fs::read_to_string(mount.path("images/many/image.json")).unwrap();
    let document: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(document["disks"].as_array().unwrap().len(), disks);
    assert!(json.len() < 20 << 20, "{} bytes", json.len());
    assert!(!json.contains('\u{1b}') && !json.contains('\u{202e}'));
    let file = mount.path("images/many/many.raw");
    let shown = succeed(
        command("getfattr")
            .args(["--absolute-names", "--only-values", "-n", "user.freightfs.error"])
            .arg(&file),
    );
    assert!(shown.contains("among the files allowed") && shown.len() < 8192, "{shown}");
    assert!(mount.log().len() < 1 << 20, "{} bytes of log", mount.log().len());
    println!("image.json: {} bytes, the attribute: {}", json.len(), shown.len());
    mount.unmount();
}
