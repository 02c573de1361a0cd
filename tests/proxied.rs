//! Faults between the daemon and its store: at the nth request of an operation, for every n, the request is refused,
//! cut, damaged or never answered. No success over wrong bytes; the object is the old or the new one, whole; another
//! bucket answers while this one does not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use object_store::aws::AmazonS3;
use object_store::{ObjectStoreExt, PutPayload};
use sha2::{Digest, Sha256};
use support::images::{self, Random};
use support::mount::Mount;
use support::proxied::{Setup, until};
use support::proxy::{Fate, Request};
use support::s3::{self, uploads};
use support::{command, succeed};

const OLD: &[u8] = b"the old object";
const NEW: &[u8] = b"a new object, and longer";

/// Bytes of a part in these mounts, the least that S3 takes (S3 User Guide, "Amazon S3 multipart upload limits").
const PART: usize = 5 << 20;

/// Cases that run at once in a mount.
const AT_ONCE: usize = 6;

/// What is known to fail: operation, fault, and whose it is.
const KNOWN: &[(Operation, Fate, &str)] = &[];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// A copy of an image's file of two parts.
    Export,
    /// A file of a few bytes.
    Small,
    /// A file of two parts.
    Large,
    /// A rename over another object.
    Rename,
    Unlink,
    List,
    /// A mode that is saved beside the object.
    Chmod,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Export,
    Operation::Small,
    Operation::Large,
    Operation::Rename,
    Operation::Unlink,
    Operation::List,
    Operation::Chmod,
];

/// Every fault of one request.
const FAULTS: [Fate; 10] = [
    Fate::Answer(503),
    Fate::Answer(403),
    Fate::Cut,
    Fate::CutAnswer,
    Fate::WrongEtag,
    Fate::DamageRequest,
    Fate::DamageAnswer,
    Fate::HalveAnswer,
    Fate::Hang,
    Fate::Delay(50),
];

/// An operation in a directory of its own, whose nth request has a fate.
#[derive(Clone, Debug)]
struct Case {
    name: String,
    operation: Operation,
    fate: Fate,
    n: usize,
    /// Whether all requests from the nth on have it.
    for_good: bool,
}

/// What the proxy knows of a case.
#[derive(Default)]
struct Armed {
    fate: Option<(Fate, usize, bool)>,
    seen: Vec<Request>,
    hit: bool,
}

/// The cases by their names, and their names by those of their attributes' documents.
#[derive(Clone, Default)]
struct Plan {
    cases: Arc<Mutex<HashMap<String, Armed>>>,
    documents: Arc<Mutex<HashMap<String, String>>>,
}

impl Plan {
    fn arm(&self, case: &Case) {
        let document = hex::encode(Sha256::digest(case.name.as_bytes()))[..32].to_owned();
        self.documents.lock().unwrap().insert(document, case.name.clone());
        let armed = Armed { fate: Some((case.fate, case.n, case.for_good)), ..Armed::default() };
        self.cases.lock().unwrap().insert(case.name.clone(), armed);
    }

    /// Lets all requests of a case through; returns those that it had.
    fn disarm(&self, name: &str) -> Vec<Request> {
        let mut cases = self.cases.lock().unwrap();
        let armed = cases.get_mut(name).unwrap();
        armed.fate = None;
        std::mem::take(&mut armed.seen)
    }

    fn is_hit(&self, name: &str) -> bool {
        self.cases.lock().unwrap().get(name).is_some_and(|armed| armed.hit)
    }

    fn case_of(&self, request: &Request) -> Option<String> {
        if let Some(at) = request.target.find("case-") {
            return request.target.get(at..at + "case-0000".len()).map(str::to_owned);
        }
        let (_, document) = request.target.split_once("attributes/")?;
        self.documents.lock().unwrap().get(document.split('.').next()?).cloned()
    }

    fn decide(&self, request: &Request) -> Fate {
        let Some(name) = self.case_of(request) else { return Fate::Forward };
        let mut cases = self.cases.lock().unwrap();
        let Some(armed) = cases.get_mut(&name) else { return Fate::Forward };
        let Some((fate, n, for_good)) = armed.fate else { return Fate::Forward };
        let number = armed.seen.len();
        armed.seen.push(request.clone());
        let is_hit = number == n || for_good && number > n;
        armed.hit |= is_hit;
        if is_hit { fate } else { Fate::Forward }
    }
}

/// A mount whose store stands behind the proxy, beside a live local bucket.
struct Bench {
    setup: Setup,
    plan: Plan,
    store: AmazonS3,
    runtime: tokio::runtime::Runtime,
    image: Vec<u8>,
    large: Vec<u8>,
    next: std::sync::atomic::AtomicUsize,
    ended: Mutex<BTreeMap<String, serde_json::Value>>,
    /// The cases whose program was told of a failure.
    failed: Mutex<BTreeSet<String>>,
}

impl Bench {
    fn new(name: &str) -> Option<Self> {
        let plan = Plan::default();
        let decides = plan.clone();
        let mut setup = Setup::new(name, move |request| decides.decide(request))?;
        setup.world.environment.push(("FREIGHTFS_PART_SIZE".into(), "5".into()));
        let raw = images::noise(&setup.world.catalog(), PART + 512);
        Some(Self {
            store: s3::client(&setup.endpoint, &setup.bucket),
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
            setup,
            plan,
            image: std::fs::read(raw).unwrap(),
            large: Random(77).bytes(PART + 99),
            next: Default::default(),
            ended: Mutex::default(),
            failed: Mutex::default(),
        })
    }

    fn mount(&self, timeout: u32) -> Mount {
        let live = format!("live=file://{}", self.setup.world.bucket().display());
        let options = format!("formats=raw,timeout={timeout},retries=0,jobs=64");
        self.setup.mount(&["--bucket", &live, "-o", &options])
    }

    fn case(&self, operation: Operation, fate: Fate, n: usize, for_good: bool) -> Case {
        let number = self.next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Case { name: format!("case-{number:04}"), operation, fate, n, for_good }
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        let payload = PutPayload::from(bytes.to_vec());
        self.runtime.block_on(self.store.put(&object_store::path::Path::from(key), payload)).unwrap();
    }

    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.runtime.block_on(async {
            let got = self.store.get(&object_store::path::Path::from(key)).await.ok()?;
            Some(got.bytes().await.unwrap().to_vec())
        })
    }

    /// The object that a case replaces, and what the operation needs.
    fn prepare(&self, case: &Case) {
        self.put(&format!("{}/k", case.name), OLD);
        if case.operation == Operation::Rename {
            self.put(&format!("{}/from", case.name), NEW);
        }
    }

    /// What the object is after the operation.
    fn new_object(&self, operation: Operation) -> Option<&[u8]> {
        match operation {
            Operation::Export => Some(&self.image),
            Operation::Large => Some(&self.large),
            Operation::Small | Operation::Rename => Some(NEW),
            Operation::Unlink => None,
            Operation::List | Operation::Chmod => Some(OLD),
        }
    }

    fn perform(&self, mount: &Mount, case: &Case) -> std::io::Result<()> {
        let directory = mount.key(&case.name);
        let key = directory.join("k");
        match case.operation {
            Operation::Export => {
                let mut from = File::open(mount.path("images/noise/noise.raw"))?;
                let mut to = File::create(key)?;
                std::io::copy(&mut from, &mut to)?;
                close(to)
            }
            Operation::Small => write(&key, NEW),
            Operation::Large => write(&key, &self.large),
            Operation::Rename => std::fs::rename(directory.join("from"), key),
            Operation::Unlink => std::fs::remove_file(key),
            Operation::List => {
                let names = names(&directory)?;
                // One bit of a name may be another one, for a moment; see `wrong_listing`.
                let right = names == ["k"] || case.fate == Fate::DamageAnswer;
                if right { Ok(()) } else { Err(std::io::Error::other("wrong names")) }
            }
            Operation::Chmod => std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o640)),
        }
    }

    /// The job of a case's key, once it has ended.
    fn ended_job(&self, mount: &Mount, case: &Case) -> Option<serde_json::Value> {
        let key = format!("{}/k", case.name);
        let mut ended = self.ended.lock().unwrap();
        for entry in std::fs::read_dir(mount.path("jobs")).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if ended.contains_key(&name) {
                continue;
            }
            let Ok(text) = std::fs::read(entry.path()) else { continue };
            let Ok(job) = serde_json::from_slice::<serde_json::Value>(&text) else { continue };
            if ["SUCCESS", "FAIL", "CANCELLED"].iter().any(|state| job["status"] == *state) {
                ended.insert(name, job);
            }
        }
        ended.values().find(|job| job["key"] == *key).cloned()
    }

    /// Runs one case; returns the requests that it had, and what was wrong.
    fn run(&self, mount: &Mount, case: &Case) -> (Vec<Request>, Vec<String>) {
        self.prepare(case);
        self.plan.arm(case);
        let done = self.perform(mount, case);
        let mut job = None;
        if case.operation == Operation::Export && done.is_ok() {
            until(&format!("the end of {case:?}"), || {
                job = self.ended_job(mount, case);
                job.is_some()
            });
        }
        if case.operation == Operation::Chmod {
            // Saved within about a second: the request is waited for, as long as there is one to wait for.
            let saved = || self.plan.cases.lock().unwrap()[&case.name].seen.iter().any(|r| r.method == "PUT");
            if done.is_ok() {
                until("the attributes are saved", saved);
            }
        }
        let requests = self.plan.disarm(&case.name);
        if done.is_err() {
            self.failed.lock().unwrap().insert(case.name.clone());
        }
        let listed =
            if case.operation == Operation::List { self.wrong_listing(mount, case, &done) } else { vec![] };
        (requests, [self.wrong(case, done, job), listed].concat())
    }

    /// What is wrong after a listing that may have been damaged: what cannot be read is EIO, and nothing is hidden, shown
    /// or changed by it for longer than it lasts.
    fn wrong_listing(&self, mount: &Mount, case: &Case, done: &std::io::Result<()>) -> Vec<String> {
        let mut wrong = Vec::new();
        let damages = [Fate::DamageAnswer, Fate::HalveAnswer];
        if let Err(error) = done
            && damages.contains(&case.fate)
            && error.raw_os_error() != Some(libc::EIO)
        {
            wrong.push(format!("a damaged listing gives {error}"));
        }
        let directory = mount.key(&case.name);
        match names(&directory) {
            Ok(names) if names == ["k"] => {}
            other => wrong.push(format!("the next listing gives {other:?}")),
        }
        match std::fs::read(directory.join("k")) {
            Ok(content) if content == OLD => {}
            other => wrong.push(format!("the listed object is {other:?}")),
        }
        wrong
    }

    /// What is wrong with a case that has ended.
    fn wrong(&self, case: &Case, done: std::io::Result<()>, job: Option<serde_json::Value>) -> Vec<String> {
        let mut wrong = Vec::new();
        let state = job.as_ref().map(|job| job["status"].as_str().unwrap().to_owned());
        let says_success = done.is_ok() && state.as_deref().is_none_or(|state| state == "SUCCESS");
        let object = self.get(&format!("{}/k", case.name));
        let new = self.new_object(case.operation);
        let is_new = object.as_deref() == new;
        let is_old = object.as_deref() == Some(OLD);
        let outcome = format!("{done:?} {state:?}");
        if !is_new && !is_old {
            let found = object.as_ref().map(|o| format!("{} bytes of nobody", o.len()));
            wrong.push(format!("{outcome}: the object is {}", found.unwrap_or("gone".into())));
        } else if says_success && !is_new {
            wrong.push(format!("{outcome}: the object is the old one"));
        }
        if case.operation == Operation::Rename {
            let from = self.get(&format!("{}/from", case.name));
            if from.as_deref().is_some_and(|from| from != NEW) || from.is_none() && !is_new {
                wrong.push(format!("{outcome}: what was renamed is lost"));
            }
            if says_success && from.is_some() {
                wrong.push(format!("{outcome}: the old name is there"));
            }
        }
        if matches!(case.fate, Fate::Forward | Fate::Delay(_) | Fate::Answer(503) | Fate::Cut)
            && !says_success
        {
            wrong.push(format!("{outcome}: what passes by itself was not tried again"));
        }
        // A fault that hides or distorts what the store has done leaves nobody to know; a refusal does not.
        let refused = matches!(case.fate, Fate::Answer(_) | Fate::Cut);
        let replaces = matches!(case.operation, Operation::Export | Operation::Small | Operation::Large);
        if replaces && refused && !says_success && !is_old {
            wrong.push(format!("{outcome}: a failure replaced the object"));
        }
        wrong
    }

    /// What the objects beside a key say of it, when everything is over.
    fn wrong_sidecars(&self, case: &Case) -> Vec<String> {
        let key = format!("{}/k", case.name);
        let Some(object) = self.get(&key) else { return Vec::new() };
        let sum = hex::encode(Sha256::digest(&object));
        let mut wrong = Vec::new();
        let is_new = Some(&object[..]) == self.new_object(case.operation);
        if let Some(status) = self.get(&format!("{key}.status")) {
            match serde_json::from_slice::<serde_json::Value>(&status) {
                Err(_) => wrong.push("the status is no JSON".to_owned()),
                Ok(status) => match status["status"].as_str() {
                    Some("SUCCESS") if !is_new || status["sha256"] != *sum => {
                        wrong.push(format!("SUCCESS in the bucket over another object: {status}"));
                    }
                    Some("INIT" | "RUNNING") => wrong.push(format!("the status is not over: {status}")),
                    _ => {}
                },
            }
            let checksum = self.get(&format!("{key}.sha256")).unwrap_or_default();
            if is_new && !checksum.is_empty() && !String::from_utf8_lossy(&checksum).starts_with(&sum) {
                wrong.push("the checksum is of another object".to_owned());
            }
        }
        wrong
    }
}

/// Closes a file, with the error that dropping it would lose.
fn close(file: File) -> std::io::Result<()> {
    Ok(nix::unistd::close(OwnedFd::from(file))?)
}

/// The names in a directory.
fn names(directory: &Path) -> std::io::Result<Vec<std::ffi::OsString>> {
    std::fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    close(file)
}

/// Runs cases, some at once; returns what was wrong with each.
fn run_all(bench: &Bench, mount: &Mount, cases: &[Case]) -> Vec<(Case, String)> {
    let queue: Mutex<VecDeque<_>> = Mutex::new(cases.iter().cloned().collect());
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(case) = queue.lock().unwrap().pop_front() else { break };
                    let (requests, found) = bench.run(mount, &case);
                    let asked = requests.get(case.n).map(|r| format!("{} {}", r.method, r.target));
                    let found =
                        found.into_iter().map(|what| (case.clone(), format!("{what} after {asked:?}")));
                    wrong.lock().unwrap().extend(found);
                }
            });
        }
    });
    wrong.into_inner().unwrap()
}

/// Fails for what is wrong and not known.
fn report(wrong: Vec<(Case, String)>) {
    let is_known = |case: &Case| KNOWN.iter().find(|(o, f, _)| *o == case.operation && *f == case.fate);
    let mut new = Vec::new();
    for (case, what) in wrong {
        let line = format!("{:?} with {:?} at request {}: {what}", case.operation, case.fate, case.n);
        match is_known(&case) {
            Some((_, _, whose)) => println!("known, {whose}: {line}"),
            None => new.push(line),
        }
    }
    assert!(new.is_empty(), "{} violations:\n{}", new.len(), new.join("\n"));
}

#[test]
fn a_fault_at_any_request_of_any_operation_is_no_success_over_wrong_bytes() {
    let Some(bench) = Bench::new("proxied") else { return };
    let mount = bench.mount(1);
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        // Without a fault: how many requests there are.
        let whole = bench.case(operation, Fate::Forward, usize::MAX, false);
        let (requests, wrong) = bench.run(&mount, &whole);
        assert!(wrong.is_empty(), "{operation:?}: {wrong:?}");
        println!("{operation:?}: {} requests", requests.len());
        for (n, request) in requests.iter().enumerate() {
            println!("  {n} {} {}", request.method, request.target);
        }
        assert!((2..60).contains(&requests.len()), "{operation:?}: {requests:?}");
        for fate in FAULTS {
            // What else is read is known by its checksum or its tag.
            if fate == Fate::HalveAnswer && operation != Operation::List {
                continue;
            }
            cases.extend((0..requests.len()).map(|n| bench.case(operation, fate, n, false)));
        }
        cases.push(whole);
    }
    println!("{} cases", cases.len());
    let faults: Vec<_> = cases.iter().filter(|case| case.fate != Fate::Forward).cloned().collect();
    let mut wrong = run_all(&bench, &mount, &faults);
    mount.unmount();
    // Of an upload whose start was answered to nobody, nobody knows.
    let unheard = [Fate::CutAnswer, Fate::Hang, Fate::DamageAnswer, Fate::HalveAnswer, Fate::WrongEtag];
    for line in uploads(&bench.setup.endpoint, &bench.setup.bucket).lines() {
        let case = cases.iter().find(|case| line.contains(&case.name));
        if let Some(case) = case.filter(|case| !unheard.contains(&case.fate)) {
            wrong.push((case.clone(), format!("an upload is left over: {line}")));
        }
    }
    let mount = bench.mount(60);
    for case in &cases {
        wrong.extend(bench.wrong_sidecars(case).into_iter().map(|what| (case.clone(), what)));
        if case.operation == Operation::Chmod && !bench.failed.lock().unwrap().contains(&case.name) {
            let mode = mount.key(&case.name).join("k").metadata().unwrap().permissions().mode() & 0o777;
            if mode != 0o640 {
                wrong.push((case.clone(), format!("the mode is {mode:o} at the next mount")));
            }
        }
    }
    mount.unmount();
    report(wrong);
}

/// Runs a program against a path.
fn answers(program: &[&str], path: &Path) -> String {
    succeed(command(program[0]).args(&program[1..]).arg(path))
}

#[test]
fn a_store_that_stops_for_good_delays_no_other_bucket_and_loses_nothing() {
    let Some(bench) = Bench::new("stopped") else { return };
    let mount = bench.mount(3600);
    std::fs::write(mount.path("buckets/live/there"), NEW).unwrap();
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        let whole = bench.case(operation, Fate::Forward, usize::MAX, false);
        let (requests, _) = bench.run(&mount, &whole);
        cases.extend((0..requests.len()).map(|n| bench.case(operation, Fate::Hang, n, true)));
    }
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for case in &cases {
            bench.prepare(case);
            bench.plan.arm(case);
            let (bench, mount, outcomes) = (&bench, &mount, &outcomes);
            scope.spawn(move || {
                let done = bench.perform(mount, case);
                outcomes.lock().unwrap().push((case.name.clone(), done));
            });
        }
        until("requests that hang", || {
            cases.iter().filter(|case| bench.plan.is_hit(&case.name)).count() > cases.len() / 2
        });
        let live = mount.path("buckets/live");
        for program in [&["ls", "-la"][..], &["stat"], &["touch", "-c"]] {
            answers(program, &live.join("there"));
            answers(program, &live);
        }
        assert_eq!(answers(&["cat"], &live.join("there")).as_bytes(), NEW);
        for place in ["images", "images/noise", "buckets", "jobs", ".freightfs"] {
            answers(&["ls", "-la"], &mount.path(place));
        }
        let image: PathBuf = mount.path("images/noise/noise.raw");
        std::fs::copy(&image, live.join("copied")).unwrap();
        succeed(support::freightfs().args(["wait", "--quiet"]).arg(live.join("copied")));
        let hanging = bench.setup.proxy.hanging();
        println!("{} cases, {hanging} requests hang", cases.len());
        assert!(hanging > 0, "the store answered again");
        // Nothing of it is waited for at the end, either.
        mount_signal(&mount);
    });
    bench.setup.proxy.release();
    for case in &cases {
        bench.plan.disarm(&case.name);
    }
    drop(mount);
    let mount = bench.mount(60);
    until("the jobs of the dead daemon end", || {
        std::fs::read_dir(mount.path("jobs")).unwrap().flatten().all(|job| {
            let text = std::fs::read_to_string(job.path()).unwrap_or_default();
            !text.contains("\"INIT\"") && !text.contains("\"RUNNING\"")
        })
    });
    let mut wrong = Vec::new();
    for (name, done) in outcomes.into_inner().unwrap() {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let job = bench.ended_job(&mount, case);
        // A write whose close failed may be taken up by the next mount: the object is then the new one.
        wrong.extend(bench.wrong(case, done, job).into_iter().map(|what| (case.clone(), what)));
        wrong.extend(bench.wrong_sidecars(case).into_iter().map(|what| (case.clone(), what)));
    }
    mount.unmount();
    bench.setup.assert_no_upload_is_left();
    report(wrong);
}

/// Ends the daemon as a system's shutdown does, and waits for its end.
fn mount_signal(mount: &Mount) {
    let pid = mount.pid();
    succeed(command("kill").args(["-TERM", &pid.to_string()]));
    until("the daemon ends", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        matches!(state, None | Some('Z' | 'X'))
    });
}
