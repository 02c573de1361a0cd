//! Crashes by enumeration: at every durable step of every operation the daemon is killed, the step fails, or the disk is
//! full. After the next mount the object is the old or the new one, whole, the status agrees with it, and nothing is left.
//!
//! One run of each operation finds which steps it passes, and how often. By default each step of an operation is hit at
//! its first and at its last pass; `FREIGHTFS_CRASH=all cargo test --test crash` hits every pass, in half an hour.
//! `FREIGHTFS_CRASH_OPERATION=Export` tries that one only.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use freightfs::export::sidecars::Sidecar;
use freightfs::failpoint::Step;
use futures::TryStreamExt;
use object_store::aws::AmazonS3;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use support::images::Random;
use support::mount::{Mount, World};
use support::proxied::until;
use support::s3::{self, Space};
use support::{can_mount, command, run, sha256, text};

const OLD: &[u8] = b"the old object";
const NEW: &[u8] = b"a new object, and longer";

const ACTIONS: [&str; 3] = ["kill", "error", "full"];

/// Steps that write to this host's disk: it is full for them whatever the store is.
const HOST_STEPS: [Step; 14] = [
    Step::StageCreate,
    Step::StageWrite,
    Step::StageSync,
    Step::RecordWrite,
    Step::RecordRename,
    Step::JobRecord,
    Step::UploadIntent,
    Step::LogCreate,
    Step::PartLog,
    Step::StaleMark,
    Step::PublishRecord,
    Step::EndRecord,
    Step::EndConfirm,
    Step::MoveRecord,
];

/// Ended jobs that a state directory has before a mount forgets some of them.
const MANY_JOBS: usize = 1003;

/// What is known to fail: operation, step, and whose it is.
const KNOWN: &[(Operation, &str, &str)] = &[];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    /// A copy of an image's file of two parts over an object.
    Export,
    /// The same where hosts share the bucket.
    Shared,
    /// A file of a few bytes over an object, and a mode.
    Small,
    /// A file of two parts over an object, of which a part is written again after it was sent.
    Large,
    /// The same, cut to a few bytes before it is closed.
    Cut,
    /// An export's file renamed over another object.
    Rename,
    /// An export's file removed.
    Unlink,
    /// A copy of an image's file over an object, and a mode, at the end of the mount: it is unmounted before the job ends.
    Unmount,
    /// A copy of an image's file whose status is written again while it runs.
    Renewed,
    /// A file of a few bytes, in a mount that finds more ended jobs than it remembers.
    Pruned,
    /// A copy of an image's file over the object of an earlier export of it, of which the store has most.
    Changed,
}

use Operation::{Changed, Cut, Export, Large, Pruned, Rename, Renewed, Shared, Small, Unlink, Unmount};

const OPERATIONS: [Operation; 11] =
    [Export, Shared, Small, Large, Cut, Rename, Unlink, Unmount, Renewed, Pruned, Changed];

impl Operation {
    /// Whether a job makes the object of an image after close.
    fn is_export(self) -> bool {
        matches!(self, Export | Shared | Unmount | Renewed | Changed)
    }

    /// Whether a step is hit in this operation: that of others hits it otherwise.
    fn hits(self, step: Step) -> bool {
        match self {
            Renewed => step == Step::StatusRenew,
            Pruned => step == Step::RecordPrune,
            Changed => [Step::PartCopy, Step::SpliceRemove, Step::IndexPut].contains(&step),
            _ => true,
        }
    }
}

/// A bucket of one case, as its store has it.
enum Store<'a> {
    Local(PathBuf),
    Remote(&'a Remote, String),
}

/// The S3 bucket of all cases.
struct Remote {
    endpoint: String,
    bucket: String,
    client: AmazonS3,
    runtime: tokio::runtime::Runtime,
    _space: Option<Space>,
}

impl Store<'_> {
    fn url(&self) -> String {
        match self {
            Self::Local(directory) => format!("file://{}", directory.display()),
            Self::Remote(remote, prefix) => format!("s3://{}/{prefix}", remote.bucket),
        }
    }

    fn get(&self, key: &str) -> Option<Vec<u8>> {
        match self {
            Self::Local(directory) => std::fs::read(directory.join(key)).ok(),
            Self::Remote(remote, prefix) => remote.runtime.block_on(async {
                let path = object_store::path::Path::from(format!("{prefix}/{key}"));
                Some(remote.client.get(&path).await.ok()?.bytes().await.unwrap().to_vec())
            }),
        }
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        match self {
            Self::Local(directory) => std::fs::write(directory.join(key), bytes).unwrap(),
            Self::Remote(remote, prefix) => {
                let path = object_store::path::Path::from(format!("{prefix}/{key}"));
                let payload = PutPayload::from(bytes.to_vec());
                remote.runtime.block_on(remote.client.put(&path, payload)).unwrap();
            }
        }
    }
}

/// What all cases have of one kind of store.
struct Bench {
    remote: Option<Remote>,
    part: usize,
    image: Vec<u8>,
    large: Vec<u8>,
    /// An image as it was exported once, and as it is.
    changed: [Vec<u8>; 2],
    /// The objects of an export with the key `from.raw`.
    export: BTreeMap<String, Vec<u8>>,
    /// The record of that export's job.
    record: String,
    next: std::sync::atomic::AtomicUsize,
}

/// One case: what is done, and what happens at which pass of a step.
#[derive(Clone, Debug)]
struct Case {
    operation: Operation,
    step: Step,
    n: usize,
    action: &'static str,
}

/// The place of one case.
struct Setup<'a> {
    world: World,
    store: Store<'a>,
    /// The step that is hit, and at which pass.
    armed: Option<(Step, usize)>,
}

impl Bench {
    fn new(remote: Option<Remote>) -> Self {
        // The least that S3 takes; a local bucket takes less.
        let is_remote = remote.is_some();
        let part = if is_remote { 5 << 20 } else { 1 << 20 };
        let mut bench = Self {
            remote,
            part,
            image: Random(1).bytes(part + 512),
            // Larger ones are sent to a store while they are written, from 16 MiB on.
            large: Random(2).bytes(if is_remote { 17 << 20 } else { part } + 999),
            changed: [Random(3).bytes(2 * part + part / 2), Vec::new()],
            export: BTreeMap::new(),
            record: String::new(),
            next: Default::default(),
        };
        bench.changed[1] = bench.changed[0].clone();
        bench.changed[1][part + part / 4..][..4096].fill(1);
        (bench.export, bench.record) = bench.template();
        bench
    }

    fn setup(&self) -> Setup<'_> {
        let number = self.next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut world = World::new();
        let mut set = |name: &str, value: String| world.environment.push((name.to_owned(), value));
        set("FREIGHTFS_PART_SIZE", (self.part >> 20).to_string());
        // Nobody else starts an upload that could be taken for one that was left over.
        set("FREIGHTFS_SETTLE", "0".to_owned());
        if let Some(remote) = &self.remote {
            set("AWS_ENDPOINT_URL", remote.endpoint.clone());
            set("AWS_ALLOW_HTTP", "true".to_owned());
        }
        std::fs::write(world.catalog().join("image.raw"), &self.image).unwrap();
        let store = match &self.remote {
            Some(remote) => Store::Remote(remote, format!("case-{number:05}")),
            None => Store::Local(world.bucket()),
        };
        Setup { world, store, armed: None }
    }

    /// The objects that an export leaves, and the record of its job.
    fn template(&self) -> (BTreeMap<String, Vec<u8>>, String) {
        let setup = self.setup();
        let mount = setup.mount(Export, None).unwrap();
        copy(&mount.path("images/image/image.raw"), &mount.key("from.raw")).unwrap();
        mount.wait("from.raw");
        mount.unmount();
        let names = ["from.raw", "from.raw.status", "from.raw.sha256", "from.raw.md5"];
        let record = std::fs::read_dir(setup.world.path("state/jobs")).unwrap().next().unwrap().unwrap();
        let record = std::fs::read_to_string(record.path()).unwrap();
        (names.map(|name| (name.to_owned(), setup.store.get(name).unwrap())).into(), record)
    }

    /// Fills a state directory with ended jobs.
    fn remember_many_jobs(&self, setup: &Setup) {
        let record: serde_json::Value = serde_json::from_str(&self.record).unwrap();
        let id = record["status"]["job_id"].as_str().unwrap();
        let directory = setup.world.path("state/jobs");
        std::fs::create_dir_all(&directory).unwrap();
        for number in 0..MANY_JOBS {
            let other = format!("{}{number:04}", &id[..id.len() - 4]);
            std::fs::write(directory.join(format!("{other}.json")), self.record.replace(id, &other)).unwrap();
        }
    }

    /// The key that a case is about.
    fn key(&self, operation: Operation) -> &'static str {
        match operation {
            Unlink => "from.raw",
            Export | Shared | Unmount | Renewed | Changed | Rename => "k.raw",
            Small | Pruned | Large | Cut => "k",
        }
    }

    fn old(&self, operation: Operation) -> &[u8] {
        match operation {
            Unlink => &self.image,
            Changed => &self.changed[0],
            _ => OLD,
        }
    }

    fn new_object(&self, operation: Operation) -> Option<&[u8]> {
        match operation {
            Export | Shared | Unmount | Renewed | Rename => Some(&self.image),
            Large => Some(&self.large),
            Small | Pruned | Cut => Some(NEW),
            Changed => Some(&self.changed[1]),
            Unlink => None,
        }
    }

    fn prepare(&self, setup: &Setup, operation: Operation) {
        if operation == Changed {
            return self.export_before(setup);
        }
        setup.store.put(self.key(operation), self.old(operation));
        if matches!(operation, Rename | Unlink) {
            for (name, bytes) in &self.export {
                setup.store.put(name, bytes);
            }
        }
        if operation == Pruned {
            self.remember_many_jobs(setup);
        }
    }

    /// Exports an image, which changes then.
    fn export_before(&self, setup: &Setup) {
        let image = setup.world.catalog().join("image.raw");
        std::fs::write(&image, &self.changed[0]).unwrap();
        let mount = setup.mount(Changed, None).unwrap();
        copy(&mount.path("images/image/image.raw"), &mount.key("k.raw")).unwrap();
        mount.wait("k.raw");
        end(&mount);
        std::fs::remove_file(setup.steps()).unwrap();
        std::fs::write(&image, &self.changed[1]).unwrap();
    }

    fn perform(&self, setup: &Setup, mount: &Mount, operation: Operation) -> std::io::Result<()> {
        let key = mount.key(self.key(operation));
        match operation {
            Export | Shared | Renewed | Changed => copy(&mount.path("images/image/image.raw"), &key),
            Unmount => {
                copy(&mount.path("images/image/image.raw"), &key)?;
                std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640))
            }
            Small | Pruned => {
                let mut file = File::create(&key)?;
                file.write_all(NEW)?;
                file.set_permissions(std::fs::Permissions::from_mode(0o640))?;
                close(file)
            }
            Large | Cut => {
                let mut file = File::create(&key)?;
                file.write_all(&self.large)?;
                if self.remote.is_some() {
                    until("a part is sent while the file is written, or the end", || setup.has_sent_a_part());
                }
                if operation == Cut {
                    file.set_len(0)?;
                    file.write_all_at(NEW, 0)?;
                } else {
                    file.write_all_at(&self.large[100..200], 100)?;
                }
                close(file)
            }
            Rename => std::fs::rename(mount.key("from.raw"), key),
            Unlink => std::fs::remove_file(key),
        }
    }

    /// Which steps an operation passes, and how often.
    fn passes(&self, operation: Operation) -> BTreeMap<&'static str, usize> {
        let setup = self.setup();
        self.prepare(&setup, operation);
        let mount = setup.mount(operation, None).unwrap();
        self.perform(&setup, &mount, operation)
            .unwrap_or_else(|e| panic!("{operation:?}: {e}\n{}", mount.log()));
        if !matches!(operation, Unmount | Pruned) {
            settle(&mount).unwrap();
        }
        end(&mount);
        if operation == Unmount {
            // What is set just before the end is not lost, whoever sees it next.
            let mount = setup.mount(operation, None).unwrap();
            let mode = mount.key(self.key(operation)).metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o640, "a mode that was set before the unmount");
            mount.unmount();
        }
        let log = std::fs::read_to_string(setup.steps()).unwrap_or_default();
        let count = |step: &Step| (step.name(), log.lines().filter(|line| *line == step.name()).count());
        let passes: BTreeMap<_, _> = Step::ALL.iter().map(count).filter(|(_, count)| *count > 0).collect();
        let wrong = self.wrong(&setup, operation, &Ok(()));
        assert!(wrong.is_empty(), "{operation:?} without a fault: {wrong:#?}");
        passes
    }

    /// Runs one case; returns what is wrong after it.
    fn run(&self, case: &Case) -> Vec<String> {
        let mut setup = self.setup();
        setup.armed = Some((case.step, case.n));
        self.prepare(&setup, case.operation);
        let failpoint = format!("{}:{}:{}", case.step, case.n, case.action);
        let mut wrong = Vec::new();
        // Some steps are passed by the mount itself.
        let mut done = Err(std::io::Error::other("not mounted"));
        if let Some(mount) = setup.mount(case.operation, Some(&failpoint)) {
            done = self.perform(&setup, &mount, case.operation);
            if !matches!(case.operation, Unmount | Pruned) {
                wrong.extend(settle(&mount).err());
            }
            end(&mount);
        }
        let Some(mount) = setup.mount(case.operation, None) else {
            wrong.push(format!("the next mount fails: {}", setup.world.at().log()));
            return wrong;
        };
        if case.operation != Pruned {
            wrong.extend(settle(&mount).err());
        }
        end(&mount);
        wrong.extend(self.wrong(&setup, case.operation, &done));
        wrong
    }

    /// What is wrong when everything is over.
    fn wrong(&self, setup: &Setup, operation: Operation, done: &std::io::Result<()>) -> Vec<String> {
        let mut wrong = Vec::new();
        let key = self.key(operation);
        let object = setup.store.get(key);
        let is_new = object.as_deref() == self.new_object(operation);
        let is_old = object.as_deref() == Some(self.old(operation));
        let status = setup.store.get(&format!("{key}.status"));
        let status = status.map(|text| serde_json::from_slice(&text).unwrap_or(serde_json::Value::Null));
        let state = status.as_ref().map(|status| status["status"].as_str().unwrap_or("no JSON").to_owned());
        let outcome = format!("{done:?} {state:?}");
        if !is_new && !is_old {
            let size = object.as_ref().map(Vec::len);
            wrong.push(format!("{outcome}: the object is of nobody: {size:?} bytes"));
        }
        // An export that was accepted may fail afterwards, and say so.
        let is_export = operation.is_export();
        let accepts = is_export && state.as_deref() == Some("FAIL");
        if done.is_ok() && !is_new && !accepts {
            wrong.push(format!("{outcome}: the object is the old one"));
        }
        match state.as_deref() {
            Some("SUCCESS") if operation == Unlink => {}
            Some("SUCCESS") => {
                let sum = setup.sum(object.as_deref().unwrap_or_default());
                if status.as_ref().unwrap()["sha256"] != *sum {
                    wrong.push(format!("{outcome}: SUCCESS is of other bytes"));
                }
            }
            Some("FAIL" | "CANCELLED") if !is_new => {}
            None if !is_export || !is_new => {}
            _ => wrong.push(format!("{outcome}: the status does not agree with the object, new: {is_new}")),
        }
        wrong.extend(self.wrong_beside(setup, operation, object.as_deref(), &outcome));
        wrong.extend(setup.left_over());
        wrong
    }

    /// What is wrong with the checksums, and with what was renamed or removed.
    fn wrong_beside(
        &self,
        setup: &Setup,
        operation: Operation,
        object: Option<&[u8]>,
        outcome: &str,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        let key = self.key(operation);
        if let (Some(object), Some(checksum)) = (object, setup.store.get(&format!("{key}.sha256")))
            && !String::from_utf8_lossy(&checksum).starts_with(&setup.sum(object))
        {
            wrong.push(format!("{outcome}: the checksum is of other bytes"));
        }
        let from = setup.store.get("from.raw");
        if operation == Rename {
            let is_renamed = object == Some(&self.image[..]);
            match from.as_deref() {
                None if !is_renamed => wrong.push(format!("{outcome}: what was renamed is lost")),
                Some(from) if from != self.image => wrong.push(format!("{outcome}: it is of nobody")),
                Some(_) if is_renamed => wrong.push(format!("{outcome}: it has two names")),
                _ => {}
            }
            if is_renamed
                && Sidecar::ALL.iter().any(|s| setup.store.get(&format!("{key}{}", s.suffix())).is_none())
            {
                wrong.push(format!("{outcome}: what stood beside it did not follow"));
            }
        }
        for name in self.export.keys().filter(|name| *name != "from.raw") {
            let is_beside = matches!(operation, Rename | Unlink);
            if is_beside && from.is_none() && setup.store.get(name).is_some() {
                wrong.push(format!("{outcome}: {name} outlives its object"));
            }
        }
        wrong
    }
}

impl Setup<'_> {
    /// Mounts; `None` when the daemon dies of its failpoint meanwhile.
    fn mount(&self, operation: Operation, failpoint: Option<&str>) -> Option<Mount> {
        let bucket = format!("b={}", self.store.url());
        let mut options = "formats=raw,timeout=5,retries=1".to_owned();
        if operation == Shared {
            options += ",shared,lease=1";
        }
        let mut mount = self.world.mount_command(&["--bucket", &bucket, "-o", &options]);
        if let Some(failpoint) = failpoint {
            mount.env("FREIGHTFS_FAILPOINT", failpoint);
        }
        if operation == Renewed {
            mount.env("FREIGHTFS_STATUS_INTERVAL", "1");
        }
        mount.env("FREIGHTFS_FAILPOINT_LOG", self.steps());
        let output = run(&mut mount);
        if failpoint.is_none() {
            assert!(output.status.success(), "mount failed: {}", text(&output));
        }
        output.status.success().then(|| self.world.at())
    }

    /// Whether the log of an upload has a part, or the fault has happened, after which there may never be one.
    fn has_sent_a_part(&self) -> bool {
        let logs = std::fs::read_dir(self.world.path("state/uploads")).into_iter().flatten().flatten();
        let mut logs = logs.map(|log| std::fs::read_to_string(log.path()).unwrap_or_default());
        let steps = std::fs::read_to_string(self.steps()).unwrap_or_default();
        let is_hit =
            |(step, n): (Step, usize)| steps.lines().filter(|line| *line == step.name()).count() >= n;
        logs.any(|log| log.contains("\"part\"")) || self.world.is_dead() || self.armed.is_some_and(is_hit)
    }

    /// The log of the steps that were passed.
    fn steps(&self) -> PathBuf {
        self.world.path("steps")
    }

    fn sum(&self, bytes: &[u8]) -> String {
        let path = self.world.out("sum");
        std::fs::write(&path, bytes).unwrap();
        sha256(&path)
    }

    /// What an ended mount has left in its state directory, in a local bucket and at the store.
    fn left_over(&self) -> Vec<String> {
        let mut left = Vec::new();
        for directory in ["state/uploads", "state/staging"] {
            let entries = std::fs::read_dir(self.world.path(directory)).into_iter().flatten().flatten();
            left.extend(entries.map(|entry| format!("left over: {}", entry.path().display())));
        }
        for record in std::fs::read_dir(self.world.path("state/jobs")).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(record.path()).unwrap_or_default();
            if ["SUCCESS", "FAIL", "CANCELLED"].iter().all(|state| !text.contains(&format!("\"{state}\""))) {
                left.push(format!("a record that is not over: {text}"));
            }
        }
        match &self.store {
            Store::Local(directory) => {
                let own =
                    command("find").arg(directory.join(".freightfs")).args(["-type", "f"]).output().unwrap();
                let own = String::from_utf8_lossy(&own.stdout).into_owned();
                let is_kept = |line: &&str| {
                    ["/attributes/", "/chunks/", "/lease", "/lock"].iter().any(|kept| line.contains(kept))
                };
                left.extend(
                    own.lines().filter(|line| !is_kept(line)).map(|line| format!("left over: {line}")),
                );
            }
            // Asked for all cases together at the end: the program takes a second to start.
            Store::Remote(..) => {}
        }
        left
    }
}

/// Waits until every job has ended, or the daemon has.
fn settle(mount: &Mount) -> Result<(), String> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(45);
    loop {
        let Ok(jobs) = std::fs::read_dir(mount.path("jobs")) else { return Ok(()) };
        let texts = jobs.flatten().map(|job| std::fs::read_to_string(job.path()).unwrap_or_default());
        let is_over = |text: &String| !["\"INIT\"", "\"RUNNING\""].iter().any(|state| text.contains(state));
        let running: Vec<_> = texts.filter(|text| !is_over(text)).collect();
        if running.is_empty() {
            return Ok(());
        }
        if std::time::Instant::now() > deadline {
            return Err(format!("a job does not end: {running:?}"));
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Unmounts, whether the daemon lives or not, and waits for its end. The kernel may not have sent every
/// last close yet.
fn end(mount: &Mount) {
    let pid = mount.pid();
    let unmount =
        |options: &[&str]| run(command("fusermount3").args(options).arg(mount.path(""))).status.success();
    if std::fs::read_dir(mount.path("")).is_ok() {
        until("the mount is not in use", || {
            unmount(&["-u", "-q"]) || std::fs::read_dir(mount.path("jobs")).is_err()
        });
    }
    unmount(&["-u", "-q", "-z"]);
    until("the daemon is gone", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        matches!(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()), None | Some('Z' | 'X'))
    });
}

/// Closes a file, with the error that dropping it would lose.
fn close(file: File) -> std::io::Result<()> {
    Ok(nix::unistd::close(OwnedFd::from(file))?)
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut from = File::open(from)?;
    let mut to = File::create(to)?;
    std::io::copy(&mut from, &mut to)?;
    close(to)
}

/// The cases of an operation, from the passes of a run without a fault. A store takes longer than a directory, and is no
/// other for the steps of this host: there each step is hit once, by a death and by a failure, and by a full disk where it
/// writes to one. So is each step of a mount that ends.
fn cases(operation: Operation, passes: &BTreeMap<&'static str, usize>, is_remote: bool) -> Vec<Case> {
    let all = std::env::var("FREIGHTFS_CRASH").is_ok_and(|value| value == "all");
    let mut cases = Vec::new();
    for &step in Step::ALL.iter().filter(|step| operation.hits(**step)) {
        let count = passes.get(step.name()).copied().unwrap_or(0);
        let once = is_remote || matches!(operation, Unmount | Renewed | Pruned);
        for n in (1..=count).filter(|&n| all || n == 1 || n == count && !once) {
            let is_hit = |action: &&&str| all || !once || **action != "full" || HOST_STEPS.contains(&step);
            let actions = ACTIONS.iter().filter(is_hit);
            cases.extend(actions.map(|&action| Case { operation, step, n, action }));
        }
    }
    cases
}

/// The passes of every operation without a fault.
fn all_passes(bench: &Bench, place: &str) -> Vec<(Operation, BTreeMap<&'static str, usize>)> {
    let pass = |operation| {
        let passes = bench.passes(operation);
        println!("{place} {operation:?}: {passes:?}");
        (operation, passes)
    };
    OPERATIONS.map(pass).into()
}

/// Enumerates all operations. One case after the other: a program that another thread starts would have our files open
/// for a moment, and its start would close them.
fn enumerate(bench: &Bench, place: &str) {
    let only = std::env::var("FREIGHTFS_CRASH_OPERATION").ok();
    let all = all_passes(bench, place).into_iter();
    let all: Vec<_> = all
        .filter(|(operation, _)| only.as_ref().is_none_or(|only| *only == format!("{operation:?}")))
        .collect();
    let cases: Vec<_> = all
        .iter()
        .flat_map(|(operation, passes)| cases(*operation, passes, bench.remote.is_some()))
        .collect();
    println!("{place}: {} points", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        // What does not end, or not as it should, is the case's own failure.
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bench.run(&case)));
        for what in found.unwrap_or_else(|_| vec!["it panics, see above".to_owned()]) {
            let line = format!("{:?} at {}:{}:{}: {what}", case.operation, case.step, case.n, case.action);
            match KNOWN.iter().find(|(o, s, _)| *o == case.operation && *s == case.step.name()) {
                Some((_, _, whose)) => println!("known, {whose}: {line}"),
                None => {
                    println!("wrong: {line}");
                    wrong.push(line);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} violations:\n{}", wrong.len(), wrong.join("\n"));
}

/// The S3 bucket of a test, where there is a server.
fn remote(name: &str) -> Option<Bench> {
    let endpoint = s3::endpoint()?;
    let bucket = format!("{name}-{}", std::process::id());
    let mut world = s3::world(&endpoint, &bucket);
    Some(Bench::new(Some(Remote {
        client: s3::client(&endpoint, &bucket),
        runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        _space: world.space.take(),
        endpoint,
        bucket,
    })))
}

#[test]
fn no_crash_at_any_step_leaves_a_local_bucket_worse_or_anything_behind() {
    if can_mount() {
        enumerate(&Bench::new(None), "local");
    }
}

#[test]
fn no_crash_at_any_step_leaves_an_s3_bucket_worse_or_anything_behind() {
    if !can_mount() {
        return;
    }
    let Some(bench) = remote("crash") else { return };
    enumerate(&bench, "S3");
    let remote = bench.remote.as_ref().unwrap();
    let left = s3::uploads(&remote.endpoint, &remote.bucket);
    assert_eq!(left.trim(), "None", "uploads are left over");
    let objects: Vec<_> = remote.runtime.block_on(remote.client.list(None).try_collect()).unwrap();
    let spliced = objects.iter().filter(|object| object.location.as_ref().contains("/splices/"));
    assert_eq!(spliced.count(), 0, "objects of splices are left over");
}

#[test]
fn every_step_is_reached_by_some_operation() {
    if !can_mount() {
        return;
    }
    let Some(bench) = remote("steps") else { return };
    let all = [all_passes(&Bench::new(None), "local"), all_passes(&bench, "S3")].concat();
    let reached: BTreeSet<_> = all.iter().flat_map(|(_, passes)| passes.keys().copied()).collect();
    let never: Vec<_> =
        Step::ALL.iter().map(|step| step.name()).filter(|name| !reached.contains(name)).collect();
    assert!(never.is_empty(), "no operation reaches {never:?}");
}
