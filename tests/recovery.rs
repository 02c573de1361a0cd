//! What a queue makes of what an earlier one left, and of what is missing, damaged, full or somebody else's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use freightfs::bucket::{Bucket, ObjectKey, Replaces, Tags};
use freightfs::error::{Error, ErrorKind, Result};
use freightfs::export::{
    Job, JobQueue, JobRequest, JobSource, JobState, QueueSettings, RecordedFile, Retries, StateDir, Status,
    StatusImage, staged_file,
};
use freightfs::extent::Extent;
use freightfs::failpoint::{Action, Step, arm};
use freightfs::metrics::Metrics;
use freightfs::units::FileOffset;
use freightfs::vfile::VirtualFile;
use parking_lot::{Condvar, Mutex};
use support::faulty::FaultyStore;
use support::images::Random;
use support::proxied::until;
use tokio::runtime::Handle;

const LIMIT: Duration = Duration::from_secs(60);
const SMALL: usize = 1000;
const LARGE: usize = 20 << 20;

/// A state directory, a source, and a store that outlive their queues.
struct World {
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    content: Vec<u8>,
    store: Arc<FaultyStore>,
    bucket: Bucket,
}

/// A queue with the state directory that it holds.
struct Queue {
    jobs: JobQueue,
    _state: StateDir,
}

impl World {
    fn new(size: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let content = Random(size as u64).bytes(size);
        std::fs::write(directory.path().join("source"), &content).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let store = FaultyStore::new(0);
        let (objects, uploads) = (Arc::<FaultyStore>::clone(&store), Arc::<FaultyStore>::clone(&store));
        let bucket = Bucket::with_stores("b", "memory://b", objects, uploads);
        Self { directory, runtime, content, store, bucket }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self) -> Arc<dyn VirtualFile> {
        staged_file(&self.path("source")).unwrap()
    }

    fn queue(&self) -> Queue {
        self.queue_with(true, QueueSettings::default())
    }

    fn queue_with(&self, has_bucket: bool, settings: QueueSettings) -> Queue {
        self.queue_on(self.runtime.handle().clone(), has_bucket, settings)
    }

    fn queue_on(&self, runtime: Handle, has_bucket: bool, settings: QueueSettings) -> Queue {
        let state = StateDir::open(&self.path("state")).unwrap();
        let buckets: BTreeMap<_, _> = [("b".to_owned(), self.bucket.clone())].into();
        let buckets = if has_bucket { buckets } else { BTreeMap::new() };
        let retries = Retries { count: 0, pause: Duration::from_millis(1) };
        let settings = QueueSettings { retries, ..settings };
        let jobs = JobQueue::new(buckets, state.journal(), Arc::new(Metrics::default()), settings, runtime);
        Queue { jobs, _state: state }
    }

    /// The next daemon, which finds the image.
    fn next_queue(&self) -> Queue {
        let queue = self.queue();
        self.resume(&queue);
        queue
    }

    fn resume(&self, queue: &Queue) {
        let path = self.path("source");
        let resolver = move |image: &StatusImage| {
            Ok(RecordedFile { file: staged_file(&path)?, image: image.clone(), continues: true })
        };
        queue.jobs.resume(resolver).unwrap();
    }

    fn stop(&self, queue: Queue) {
        self.runtime.block_on(queue.jobs.stop());
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        let (key, bytes) = (key(name), Bytes::copy_from_slice(bytes));
        self.runtime.block_on(self.bucket.put(&key, bytes, &Replaces::Anything)).unwrap();
    }

    fn get(&self, name: &str) -> Option<Vec<u8>> {
        self.runtime.block_on(async {
            let meta = self.bucket.head(&key(name)).await.unwrap()?;
            Some(self.bucket.read(&key(name), 0..meta.object_size, None).await.unwrap().to_vec())
        })
    }

    fn status_in_bucket(&self, name: &str) -> Option<Status> {
        serde_json::from_slice(&self.get(&format!("{name}.status"))?).ok()
    }

    /// A job of the image, or of a file that a program has written.
    fn submit(&self, queue: &Queue, name: &str, staged: bool) -> Arc<Job> {
        let file = if staged { staged_file(&self.staged("write-1")).unwrap() } else { self.file() };
        let source = if staged { JobSource::Staged(self.path("state/staging/write-1")) } else { image() };
        queue.jobs.submit(request(name, source), file, &mut None).unwrap()
    }

    fn staged(&self, name: &str) -> PathBuf {
        let path = self.path("state/staging").join(name);
        std::fs::write(&path, &self.content).unwrap();
        path
    }
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::parse(name).unwrap()
}

fn image() -> JobSource {
    let text = || "image".to_owned();
    let (id, name, disk) = (text(), text(), text());
    let (format, generation) = ("raw".to_owned(), "1".to_owned());
    JobSource::Image(StatusImage { id, name, disk, format, generation, identity: None })
}

fn request(name: &str, source: JobSource) -> JobRequest {
    let (bucket, key) = ("b".to_owned(), key(name));
    JobRequest { bucket, key, source, client_token: None, tags: Tags::new(), replaces: None }
}

fn ended(queue: &Queue, name: &str) -> Status {
    let job = queue.jobs.newest("b", &key(name)).unwrap();
    let _ = job.wait(LIMIT);
    job.status()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_job_whose_end_could_not_be_recorded_is_found_in_place_and_never_put_over_a_newer_object() {
    for (size, staged) in [(LARGE, false), (LARGE, true), (SMALL, false), (SMALL, true)] {
        for is_replaced in [false, true] {
            let case = format!("{size} bytes, staged {staged}, replaced {is_replaced}");
            let world = World::new(size);
            let queue = world.queue();
            world.put("k.raw", b"old");
            arm(Some((Step::EndRecord, 1, Action::Full)));
            let job = world.submit(&queue, "k.raw", staged);
            assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success, "{case}");
            world.stop(queue);
            arm(None);
            if is_replaced {
                world.put("k.raw", b"a newer object");
            }
            let requests = world.store.requests();
            let queue = world.next_queue();
            let status = ended(&queue, "k.raw");
            // Of an upload in parts the log says that it was done; of others only the object could.
            if is_replaced {
                let expected = if size == LARGE { JobState::Success } else { JobState::Fail };
                assert_eq!(status.status, expected, "{case}: {:?}", status.error);
                assert_eq!(world.get("k.raw").unwrap(), b"a newer object", "{case}");
            } else {
                assert_eq!(status.status, JobState::Success, "{case}: {:?}", status.error);
                assert_eq!(world.get("k.raw").unwrap(), world.content, "{case}");
            }
            // Status and checksums again, and at most one put that was refused.
            assert!(world.store.requests() - requests <= 8, "{case}: it was uploaded again");
            world.stop(queue);
            assert_eq!(world.store.open_uploads(), 0, "{case}");
            assert!(names(&world.path("state/uploads")).is_empty(), "{case}");
            assert!(names(&world.path("state/staging")).is_empty(), "{case}");
        }
    }
}

#[test]
fn a_record_that_could_not_be_written_at_the_end_is_written_while_mounted() {
    let world = World::new(SMALL);
    let queue = world.queue();
    arm(Some((Step::EndRecord, 1, Action::Error)));
    let job = world.submit(&queue, "k.raw", true);
    job.wait(LIMIT).unwrap();
    let record = world.path("state/jobs").join(format!("{}.json", job.id()));
    until("the record", || std::fs::read_to_string(&record).unwrap().contains("\"SUCCESS\""));
    until("the staged file is removed", || names(&world.path("state/staging")).is_empty());
    world.stop(queue);
    arm(None);
}

#[test]
fn jobs_without_their_bucket_or_image_wait_visibly_and_are_resumed_or_cancelled() {
    let world = World::new(LARGE);
    let queue = world.queue();
    world.store.hold(true);
    let job = world.submit(&queue, "k.raw", false);
    until("an upload", || world.store.open_uploads() == 1);
    world.submit(&queue, "c.raw", false);
    world.stop(queue);
    world.store.hold(false);
    // A mount without the bucket.
    let queue = world.queue_with(false, QueueSettings::default());
    world.resume(&queue);
    let waiting = queue.jobs.job(&job.id()).unwrap();
    until("the job waits", || waiting.is_waiting());
    let status = waiting.status();
    assert!(!status.status.is_final());
    assert!(status.waiting.unwrap().contains("the bucket \"b\" is not in this mount"));
    world.runtime.block_on(queue.jobs.drain());
    let cancelled = queue.jobs.newest("b", &key("c.raw")).unwrap();
    cancelled.cancel();
    assert_eq!(cancelled.wait(LIMIT).unwrap_err().kind(), ErrorKind::Cancelled);
    world.stop(queue);
    assert!(world.store.open_uploads() >= 1, "the upload was aborted");
    // One without the image, which comes back.
    let queue = world.queue();
    let (asked, path) = (Arc::new(AtomicUsize::new(0)), world.path("source"));
    let resolver = move |image: &StatusImage| {
        if asked.fetch_add(1, Ordering::SeqCst) < 3 {
            return Err(Error::new(ErrorKind::NotFound, "no image is there"));
        }
        Ok(RecordedFile { file: staged_file(&path)?, image: image.clone(), continues: true })
    };
    queue.jobs.resume(resolver).unwrap();
    let status = ended(&queue, "k.raw");
    assert_eq!((status.status, status.waiting), (JobState::Success, None));
    assert_eq!(world.get("k.raw").unwrap(), world.content);
    until("the cancelled upload is aborted", || world.store.open_uploads() == 0);
    assert_eq!(world.status_in_bucket("c.raw").map(|s| s.status), None.or(Some(JobState::Cancelled)));
    world.stop(queue);
}

#[test]
fn a_final_status_that_the_bucket_lacks_is_put_while_mounted_and_at_the_next_mount() {
    let world = World::new(SMALL);
    for step in [Step::StatusEnd, Step::EndConfirm] {
        let queue = world.queue();
        let name = format!("{step}.raw");
        arm(Some((step, 1, Action::Full)));
        let job = world.submit(&queue, &name, false);
        job.wait(LIMIT).unwrap();
        if step == Step::StatusEnd {
            assert!(job.holds_status(), "the mount shows what the bucket lacks");
            assert_eq!(world.status_in_bucket(&name).unwrap().status, JobState::Running);
        }
        world.stop(queue);
        arm(None);
        let queue = world.next_queue();
        until("the status", || world.status_in_bucket(&name).unwrap().status == JobState::Success);
        let record = world.path("state/jobs").join(format!("{}.json", job.id()));
        let is_told = || std::fs::read_to_string(&record).unwrap().contains("\"status_unwritten\": false");
        until("the record says so", is_told);
        world.stop(queue);
    }
    let queue = world.queue();
    arm(Some((Step::StatusEnd, 1, Action::Error)));
    let job = world.submit(&queue, "once.raw", false);
    job.wait(LIMIT).unwrap();
    until("the status", || world.status_in_bucket("once.raw").unwrap().status == JobState::Success);
    until("the bucket has it", || !job.holds_status());
    world.stop(queue);
    arm(None);
}

#[test]
fn a_record_that_cannot_be_used_costs_its_own_job_which_fails_with_the_reason() {
    let world = World::new(LARGE);
    let queue = world.queue();
    world.store.hold(true);
    let jobs = ["cut.raw", "garbled.raw", "future.raw", "whole.raw"].map(|name| {
        let job = world.submit(&queue, name, false);
        until("its status", || world.status_in_bucket(name).is_some());
        job
    });
    world.stop(queue);
    world.store.hold(false);
    let record = |job: &Arc<Job>| world.path("state/jobs").join(format!("{}.json", job.id()));
    let text = std::fs::read_to_string(record(&jobs[0])).unwrap();
    std::fs::write(record(&jobs[0]), &text[..text.len() / 2]).unwrap();
    // Only the log of its upload tells whose this was.
    std::fs::write(record(&jobs[1]), [0xff; 100]).unwrap();
    let text = std::fs::read_to_string(record(&jobs[2])).unwrap();
    std::fs::write(record(&jobs[2]), text.replace("\"version\": 2", "\"version\": 99")).unwrap();
    let queue = world.next_queue();
    assert_eq!(ended(&queue, "whole.raw").status, JobState::Success);
    for name in ["cut.raw", "garbled.raw", "future.raw"] {
        until("its status has ended", || world.status_in_bucket(name).unwrap().status == JobState::Fail);
        let error = world.status_in_bucket(name).unwrap().error.unwrap();
        assert!(error.description.contains("record cannot be used"), "{name}: {error:?}");
        assert_eq!(world.get(name), None);
    }
    until("nothing is left at the store", || world.store.open_uploads() == 0);
    assert_eq!(names(&world.path("state/jobs/damaged")).len(), 3);
    world.stop(queue);
}

/// Credentials have expired when a daemon comes back; they are renewed later.
#[test]
fn a_resumed_job_whose_store_denies_access_waits_visibly_until_it_is_allowed() {
    for (staged, is_seen_at_mount) in [(false, true), (true, false)] {
        let world = World::new(LARGE);
        {
            let queue = world.queue();
            // The job is under way when the mount ends.
            world.store.hold(true);
            let job = world.submit(&queue, "k.raw", staged);
            world.stop(queue);
            assert!(!job.has_ended(), "{:?}", job.status());
            world.store.hold(false);
        }
        world.store.deny(true);
        if is_seen_at_mount {
            world.runtime.block_on(world.bucket.probe()).unwrap();
            assert!(world.bucket.check_writable().is_err());
        }
        let queue = world.next_queue();
        let job = queue.jobs.newest("b", &key("k.raw")).unwrap();
        until("the job waits", || job.is_waiting() || job.has_ended());
        let waiting = job.status().waiting.unwrap_or_default();
        assert!(waiting.contains("denie"), "{waiting:?}: {:?}", job.status());
        world.store.deny(false);
        assert_eq!(ended(&queue, "k.raw").status, JobState::Success);
        until("its status", || {
            world.status_in_bucket("k.raw").is_some_and(|s| s.status == JobState::Success)
        });
        assert!(world.get("k.raw").unwrap() == world.content);
        world.stop(queue);
    }
}

#[test]
fn staged_files_that_no_record_needs_are_removed() {
    let world = World::new(LARGE);
    let queue = world.queue();
    world.store.hold(true);
    world.submit(&queue, "k.raw", true);
    world.stop(queue);
    world.store.hold(false);
    world.staged("write-of-a-killed-writer");
    let queue = world.next_queue();
    assert_eq!(ended(&queue, "k.raw").status, JobState::Success);
    assert_eq!(world.get("k.raw").unwrap(), world.content);
    world.stop(queue);
    assert!(names(&world.path("state/staging")).is_empty());
}

#[test]
fn records_and_logs_of_ended_jobs_do_not_pile_up_while_mounted() {
    let world = World::new(10);
    let queue = world.queue();
    let descriptors = || names(Path::new("/proc/self/fd")).len();
    let before = descriptors();
    for n in 0..1020 {
        let path = world.staged(&format!("write-{n}"));
        let file = staged_file(&path).unwrap();
        let job = queue.jobs.submit(request(&n.to_string(), JobSource::Staged(path)), file, &mut None);
        job.unwrap().wait(LIMIT).unwrap();
    }
    assert!(queue.jobs.jobs().len() <= 1001);
    assert!(names(&world.path("state/jobs")).len() <= 1001);
    assert!(names(&world.path("state/staging")).is_empty());
    assert!(descriptors() <= before + 10, "{} descriptors more", descriptors() - before);
    world.stop(queue);
}

/// A figure of this process from /proc/self/status.
fn figure(name: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_thousand_exports_that_wait_hold_few_descriptors_threads_and_bytes() {
    let world = World::new(LARGE);
    let queue = world.next_queue();
    world.store.hold(true);
    let figures = || (names(Path::new("/proc/self/fd")).len(), figure("Threads"), figure("VmRSS") >> 10);
    let before = figures();
    let jobs: Vec<_> = (0..1000).map(|n| world.submit(&queue, &format!("{n}.raw"), false)).collect();
    until("as many as may run", || world.store.open_uploads() == 4);
    let (descriptors, threads, memory) = figures();
    println!("before {before:?}, with 1000 exports {:?}", (descriptors, threads, memory));
    assert!(descriptors <= before.0 + 128 + 40, "{descriptors} descriptors");
    assert!(threads <= before.1 + 60, "{threads} threads");
    assert!(memory <= before.2 + 300, "{memory} MiB");
    // What waits has its size, and can be read.
    let last = jobs[999].file().unwrap();
    assert_eq!(last.known_size(), Some(LARGE as u64));
    let mut head = [0; 10];
    last.read_at(FileOffset(0), &mut head).unwrap();
    assert_eq!(head, world.content[..10]);
    jobs[999].cancel();
    assert_eq!(jobs[999].wait(LIMIT).unwrap_err().kind(), ErrorKind::Cancelled);
    world.stop(queue);
}

/// A file that is read when a test lets it.
struct Gated {
    file: Arc<dyn VirtualFile>,
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gated {
    fn new(world: &World) -> Arc<Self> {
        Arc::new(Self { file: world.file(), open: Mutex::new(false), changed: Condvar::new() })
    }

    fn open(&self) {
        *self.open.lock() = true;
        self.changed.notify_all();
    }
}

impl VirtualFile for Gated {
    fn file_size(&self) -> u64 {
        self.file.file_size()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let mut open = self.open.lock();
        while !*open {
            self.changed.wait(&mut open);
        }
        drop(open);
        self.file.read_at(at, buf)
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.file.extent_at(at)
    }
}

#[test]
fn a_status_is_written_again_while_nothing_moves() {
    let world = World::new(SMALL);
    let settings = QueueSettings { status_interval: Duration::from_millis(5), ..QueueSettings::default() };
    let queue = world.queue_with(true, settings);
    let gated = Gated::new(&world);
    let job = queue.jobs.submit(request("k.raw", image()), Arc::<Gated>::clone(&gated), &mut None).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    until("three statuses", || {
        seen.extend(world.status_in_bucket("k.raw").map(|status| status.updated.unwrap()));
        seen.len() >= 3
    });
    assert!(world.status_in_bucket("k.raw").unwrap().valid_seconds.unwrap() > 0);
    gated.open();
    let last = job.wait(LIMIT).unwrap();
    assert_eq!((last.valid_seconds, last.updated), (None, last.end_time));
    world.stop(queue);
}

#[test]
fn an_object_that_somebody_else_wrote_meanwhile_is_not_replaced() {
    for size in [SMALL, LARGE] {
        let world = World::new(size);
        let queue = world.queue();
        for (name, before) in [("new.raw", None), ("old.raw", Some(b"old"))] {
            if let Some(before) = before {
                world.put(name, before);
            }
            let gated = Gated::new(&world);
            let job = queue.jobs.submit(request(name, image()), Arc::<Gated>::clone(&gated), &mut None);
            until("it has begun", || world.status_in_bucket(name).is_some());
            // What is replaced is looked up after the first status.
            let record = world.path("state/jobs").join(format!("{}.json", job.as_ref().unwrap().id()));
            let knows = || std::fs::read_to_string(&record).unwrap().contains("\"replaces\": \"nothing\"");
            let knows_tag = || std::fs::read_to_string(&record).unwrap().contains("\"tag\"");
            until("it knows what it replaces", || knows() || knows_tag());
            world.put(name, b"newer");
            gated.open();
            let error = job.unwrap().wait(LIMIT).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict, "{name}, {size} bytes: {}", error.report());
            assert_eq!(world.get(name).unwrap(), b"newer");
        }
        assert_eq!(world.store.open_uploads(), 0);
        world.stop(queue);
    }
}

#[test]
fn a_part_that_was_written_again_is_sent_again_although_its_mark_was_lost() {
    let world = World::new(LARGE);
    let dying = tokio::runtime::Runtime::new().unwrap();
    let queue = world.queue_on(dying.handle().clone(), true, QueueSettings::default());
    let path = world.staged("write-1");
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let tags = Tags::new();
    let early = queue.jobs.early_upload("b", &key("k.raw"), tags, file.try_clone().unwrap(), LARGE as u64);
    let early = early.unwrap();
    let log = || {
        let log = names(&world.path("state/uploads")).pop()?;
        Some(world.path("state/uploads").join(log))
    };
    let text = || log().map(|log| std::fs::read_to_string(log).unwrap_or_default()).unwrap_or_default();
    early.wrote(LARGE as u64, 0);
    until("two early parts", || text().matches("{\"part\"").count() == 2);
    // The header is written again.
    std::os::unix::fs::FileExt::write_all_at(&file, b"header", 0).unwrap();
    early.wrote(0, 6);
    world.store.hold(true);
    let source = JobSource::Staged(path.clone());
    queue.jobs.submit(request("k.raw", source), staged_file(&path).unwrap(), &mut Some(early)).unwrap();
    dying.shutdown_timeout(LIMIT);
    drop(queue);
    world.store.hold(false);
    // Power was lost: what was not synced is not there.
    let kept: String =
        text().lines().filter(|l| !l.contains("\"stale\"")).map(|l| format!("{l}\n")).collect();
    std::fs::write(log().unwrap(), kept).unwrap();
    let queue = world.next_queue();
    let status = ended(&queue, "k.raw");
    assert_eq!(status.status, JobState::Success, "{:?}", status.error);
    let object = world.get("k.raw").unwrap();
    assert!(object[..6] == *b"header" && object[6..] == world.content[6..], "the old header is published");
    world.stop(queue);
}

#[test]
fn users_objects_at_the_places_of_sidecars_stay() {
    let world = World::new(SMALL);
    let queue = world.queue();
    let foreign = ["k.raw.status", "k.raw.sha256", "k.raw.md5"];
    for name in foreign {
        world.put(name, b"mine");
    }
    let status = world.submit(&queue, "k.raw", false).wait(LIMIT).unwrap();
    assert_eq!(status.status, JobState::Success);
    assert_eq!(status.notes.len(), 3, "{:?}", status.notes);
    assert!(status.notes.iter().all(|note| note.contains("was left alone")));
    for name in foreign {
        assert_eq!(world.get(name).unwrap(), b"mine");
    }
    let job = queue.jobs.newest("b", &key("k.raw")).unwrap();
    assert!(!job.holds_status(), "the user's object is hidden by a status");
    // Removing and renaming the object leaves them, too.
    world.runtime.block_on(queue.jobs.rename(&world.bucket, &key("k.raw"), &key("l.raw"), false)).unwrap();
    world.runtime.block_on(queue.jobs.remove_sidecars(&world.bucket, &key("k.raw"))).unwrap();
    for name in foreign {
        assert_eq!(world.get(name).unwrap(), b"mine");
    }
    assert_eq!(world.get("l.raw.status"), None);
    world.stop(queue);
}

#[test]
fn sidecars_go_with_their_object_and_other_files_have_none() {
    let world = World::new(SMALL);
    let queue = world.queue();
    world.submit(&queue, "d/k.raw", false).wait(LIMIT).unwrap();
    world.put("d/l.raw", &world.content);
    world.put("d/l.raw.md5", b"mine");
    let (from, to) = (key("d/k.raw"), key("d/l.raw"));
    world.runtime.block_on(queue.jobs.rename(&world.bucket, &from, &to, false)).unwrap();
    assert_eq!((world.get("d/k.raw.status"), world.get("d/k.raw.sha256")), (None, None));
    let status = world.status_in_bucket("d/l.raw").unwrap();
    assert_eq!((status.key.as_str(), status.url.as_str()), ("d/l.raw", "memory://b/d/l.raw"));
    let checksum = String::from_utf8(world.get("d/l.raw.sha256").unwrap()).unwrap();
    assert_eq!(checksum, format!("{}  l.raw\n", status.sha256.unwrap()));
    assert_eq!(world.get("d/l.raw.md5").unwrap(), b"mine");
    world.runtime.block_on(queue.jobs.rename(&world.bucket, &to, &key("d/notes"), false)).unwrap();
    assert_eq!((world.get("d/l.raw.status"), world.get("d/notes.status")), (None, None));
    // A name that is no disk's has none, and loses those of an earlier version when it is replaced.
    world.submit(&queue, "notes", true).wait(LIMIT).unwrap();
    assert_eq!((world.get("notes.status"), world.get("notes.md5")), (None, None));
    world.stop(queue);
    let everything = QueueSettings { all_sidecars: true, ..QueueSettings::default() };
    let queue = world.queue_with(true, everything);
    world.submit(&queue, "notes", true).wait(LIMIT).unwrap();
    assert!(world.get("notes.status").is_some() && world.get("notes.md5").is_some());
    world.stop(queue);
    let queue = world.queue();
    world.submit(&queue, "notes", true).wait(LIMIT).unwrap();
    assert_eq!((world.get("notes.status"), world.get("notes.md5")), (None, None));
    world.stop(queue);
}

/// Texts that are no status, claim, heartbeat, record, log or intent, though they look like one.
fn forged(genuine: &serde_json::Value) -> Vec<(&'static str, Vec<u8>)> {
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut forged = genuine.clone();
        change(&mut forged);
        forged.to_string().into_bytes()
    };
    let number = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    vec![
        ("a path for an id", with(&|forged| forged["job_id"] = "/home/u/package".into())),
        (
            "a path for an id",
            with(&|forged| {
                if let Some(status) = forged["status"].as_object_mut() {
                    status.insert("job_id".into(), "../../etc".into());
                }
            }),
        ),
        ("great numbers", with(&|forged| forged["bytes_uploaded"] = number("18446744073709551615"))),
        ("greater numbers", with(&|forged| forged["bytes_uploaded"] = number("1e300"))),
        ("a long checksum", with(&|forged| forged["sha256"] = "0".repeat(100_000).into())),
        ("deep", [b"[".repeat(100_000), b"]".repeat(100_000)].concat()),
        ("deep objects", b"{\"version\":".repeat(100_000)),
        ("nothing", Vec::new()),
        ("zeros", vec![0; 5000]),
    ]
}

#[test]
fn what_is_forged_in_a_bucket_or_a_state_directory_costs_itself_only() {
    let mut world = World::new(SMALL);
    let place = world.path("bucket");
    std::fs::create_dir(&place).unwrap();
    world.bucket = Bucket::open("b", &format!("file://{}", place.display())).unwrap();
    let settings = || QueueSettings { lease: Some(Duration::from_secs(1)), ..QueueSettings::default() };
    let queue = world.queue_with(true, settings());
    let genuine = world.submit(&queue, "genuine.raw", false).wait(LIMIT).unwrap();
    let genuine = serde_json::to_value(&genuine).unwrap();
    let leases = |name: &str| {
        let hash = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(name.as_bytes()));
        place.join(".freightfs/leases").join(&hash[..32])
    };
    let huge = |path: &Path| std::fs::File::create(path).unwrap().set_len(1 << 30).unwrap();
    let mut keys = Vec::new();
    for (number, (what, text)) in forged(&genuine).into_iter().enumerate() {
        let name = format!("{number}.raw");
        std::fs::write(place.join(format!("{name}.status")), &text).unwrap();
        std::fs::create_dir_all(leases(&name)).unwrap();
        for epoch in ["0000000001", "0000000001.beat", "18446744073709551615"] {
            std::fs::write(leases(&name).join(epoch), &text).unwrap();
        }
        keys.push((what, name));
    }
    // A GiB that is a status, a claim, a heartbeat; and a heartbeat with a log that nobody could go on with.
    std::fs::create_dir_all(leases("huge.raw")).unwrap();
    for path in [place.join("huge.raw.status"), leases("huge.raw").join("0000000001")] {
        huge(&path);
    }
    let log = serde_json::json!({"upload": {"bucket": "b", "key": "log.raw", "id": "../../x", "part_size": u64::MAX}});
    let claim = serde_json::json!({"host": "h", "job_id": "other", "image": null});
    let beat = serde_json::json!({"number": u64::MAX, "ended": false, "upload": format!("{log}\n")});
    std::fs::create_dir_all(leases("log.raw")).unwrap();
    std::fs::write(leases("log.raw").join("0000000001"), claim.to_string()).unwrap();
    std::fs::write(leases("log.raw").join("0000000001.beat"), beat.to_string()).unwrap();
    keys.extend([("huge", "huge.raw".to_owned()), ("log", "log.raw".to_owned())]);
    let jobs: Vec<_> = keys.iter().map(|(what, name)| (what, world.submit(&queue, name, false))).collect();
    for (what, job) in jobs {
        assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success, "{what}");
        assert!(world.get(job.request().key.as_str()).unwrap() == world.content, "{what}");
    }
    world.stop(queue);

    // The same in the state directory, beside a job that is under way.
    let record = names_of(&world.path("state/jobs")).into_iter().find(|path| path.is_file()).unwrap();
    let mut unfinished: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    unfinished["status"]["status"] = "RUNNING".into();
    for (number, (_, text)) in forged(&unfinished).into_iter().enumerate() {
        std::fs::write(world.path(&format!("state/jobs/forged-{number}.json")), &text).unwrap();
        std::fs::write(world.path(&format!("state/uploads/forged-{number}.parts")), &text).unwrap();
        std::fs::write(world.path(&format!("state/uploads/forged-{number}.intent")), &text).unwrap();
    }
    let part_log =
        serde_json::json!({"upload": {"bucket": "b", "key": "k", "id": "i", "part_size": u64::MAX}});
    std::fs::write(world.path("state/uploads/sizes.parts"), format!("{part_log}\n")).unwrap();
    for name in ["jobs/x.json", "uploads/x.parts", "uploads/x.intent"] {
        huge(&world.path("state").join(name));
        let fifo = world.path("state").join(name.replace('x', "fifo"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    std::fs::write(&record, unfinished.to_string()).unwrap();
    let queue = world.queue_with(true, settings());
    world.resume(&queue);
    let key = unfinished["request"]["key"].as_str().unwrap();
    assert_eq!(ended(&queue, key).status, JobState::Success);
    world.stop(queue);
    let left = names(&world.path("state/jobs"));
    assert!(!left.iter().any(|name| name.contains("forged") || name == "x.json"), "{left:?}");
    assert!(figure("VmHWM") < 400 << 10, "KiB of memory: {}", figure("VmHWM"));
}

fn names_of(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path()).collect()
}

#[test]
fn who_writes_what_is_being_renamed_waits_until_that_is_over() {
    let world = World::new(SMALL);
    let queue = world.queue();
    world.put("old", b"bytes");
    world.store.hold(true);
    let (jobs, bucket) = (queue.jobs.clone(), world.bucket.clone());
    let renaming =
        world.runtime.spawn(async move { jobs.rename(&bucket, &key("old"), &key("new"), false).await });
    until("the copy is under way", || world.store.waiting() > 0);
    let check = |name: &str, limit| world.runtime.block_on(queue.jobs.check_moved("b", &key(name), limit));
    for name in ["old", "new"] {
        assert_eq!(check(name, Duration::ZERO).unwrap_err().kind(), ErrorKind::Busy, "{name}");
    }
    check("other", Duration::ZERO).unwrap();
    world.store.hold(false);
    check("old", LIMIT).unwrap();
    world.runtime.block_on(renaming).unwrap().unwrap();
    assert!(world.get("old").is_none() && world.get("new").is_some());
    world.stop(queue);
}

#[test]
fn the_end_of_a_mount_does_not_wait_for_a_comparison_that_does_not_come() {
    let world = World::new(SMALL);
    let queue = world.queue();
    world.put("old", b"bytes");
    world.store.hold(true);
    let (jobs, bucket) = (queue.jobs.clone(), world.bucket.clone());
    let renaming =
        world.runtime.spawn(async move { jobs.rename(&bucket, &key("old"), &key("new"), false).await });
    until("the copy is under way", || world.store.waiting() > 0);
    // The copy is made, and nobody hears of it; what is asked then is not answered at first, and later never.
    world.store.lose_answer();
    world.store.fail_reads(1000);
    world.store.hold(false);
    world.runtime.block_on(renaming).unwrap().unwrap_err();
    until("it is asked again", || world.store.failing_reads() <= 997);
    let waiting = world.store.waiting();
    world.store.hold_reads(true);
    world.store.fail_reads(0);
    until("the objects are looked at", || world.store.waiting() > waiting);
    let stopped = world.runtime.block_on(async { tokio::time::timeout(LIMIT, queue.jobs.stop()).await });
    assert!(stopped.is_ok(), "the end of the mount waits");
    drop(queue);
    world.store.hold_reads(false);
    let queue = world.next_queue();
    world.runtime.block_on(queue.jobs.check_moved("b", &key("old"), LIMIT)).unwrap();
    assert_eq!((world.get("old"), world.get("new").as_deref()), (None, Some(&b"bytes"[..])));
    world.stop(queue);
}

#[test]
fn a_status_is_ended_by_a_mount_without_sidecars_too() {
    let world = World::new(LARGE);
    let everything = QueueSettings { all_sidecars: true, ..QueueSettings::default() };
    let queue = world.queue_with(true, everything);
    world.store.hold(true);
    world.submit(&queue, "notes", false);
    let state = || world.status_in_bucket("notes").map(|status| status.status);
    until("the status is there", || state() == Some(JobState::Running));
    world.stop(queue);
    world.store.hold(false);
    let queue = world.next_queue();
    assert_eq!(ended(&queue, "notes").status, JobState::Success);
    assert_eq!(state(), Some(JobState::Success));
    assert!(world.get("notes.sha256").is_some() && world.get("notes.md5").is_some());
    world.stop(queue);
}

#[test]
fn an_upload_that_another_host_goes_on_with_is_not_swept() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir(path("bucket")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let opened = || Bucket::open("b", &format!("file://{}", path("bucket").display())).unwrap();
    let state = StateDir::open(&path("state")).unwrap();
    let identity = std::fs::read_to_string(path("state/id")).unwrap();
    let (taken, lost, last) = runtime.block_on(async {
        // Dead processes of this state directory; of the last one there is nothing but its lock, which goes last.
        let (last, dead) = (opened(), opened());
        last.sweep(&identity, Vec::new()).await.unwrap();
        let last = names(&path("bucket/.freightfs/locks")).remove(0);
        dead.sweep(&identity, Vec::new()).await.unwrap();
        let start = async || dead.start_upload(&key("k.raw"), 5 << 20, &Tags::new()).await.unwrap();
        (start().await, start().await, last)
    });
    let upload = serde_json::json!({"bucket": "b", "key": "k.raw", "id": taken, "part_size": 5 << 20});
    let log = serde_json::json!({"upload": upload}).to_string() + "\n";
    let beat = serde_json::json!({"number": 1, "ended": false, "upload": log});
    let lease = "leases/0123456789abcdef0123456789abcdef/0000000001";
    let other = opened();
    runtime.block_on(async {
        let put =
            async |name: &str, text: String| other.put_control(name, text.into(), &Replaces::Nothing).await;
        put(&format!("{lease}.beat"), beat.to_string()).await.unwrap();
        put(lease, "{}".to_owned()).await.unwrap();
    });
    let settings = QueueSettings { lease: Some(Duration::from_secs(60)), ..QueueSettings::default() };
    let buckets: BTreeMap<_, _> = [("b".to_owned(), opened())].into();
    let (metrics, handle) = (Arc::new(Metrics::default()), runtime.handle().clone());
    let jobs = JobQueue::new(buckets, state.journal(), metrics, settings, handle);
    jobs.resume(|_| Err(Error::unsupported("no image"))).unwrap();
    let has = |directory: &str, name: &str| {
        names(&path("bucket/.freightfs").join(directory)).iter().any(|n| n == name)
    };
    until("the end of the sweep", || !has("locks", &last));
    assert!(!has("uploads", &lost) && has("uploads", &taken), "what another host goes on with is gone");
    runtime.block_on(jobs.stop());
}
