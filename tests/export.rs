//! Exports against a store that fails: never a wrong object, never a lost reason, no upload left over.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use freightfs::bucket::{Bucket, ObjectKey, Replaces, RequestLimits, Tags};
use freightfs::error::ErrorKind;
use freightfs::export::{
    Job, JobQueue, JobRequest, JobSource, JobState, Loaded, QueueSettings, RecordedFile, Retries, StateDir,
    Status, StatusImage, staged_file,
};
use freightfs::metrics::Metrics;
use freightfs::storage::Identity;
use freightfs::vfile::VirtualFile;
use md5::Md5;
use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest, Sha256};
use support::faulty::FaultyStore;
use support::images::Random;
use support::proxy::{Fate, Proxy};

const LIMIT: Duration = Duration::from_secs(60);

struct Setup {
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    content: Vec<u8>,
}

impl Setup {
    fn new(size: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let content = Random(size as u64).bytes(size);
        std::fs::write(directory.path().join("source"), &content).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        Self { directory, runtime, content }
    }

    fn file(&self) -> Arc<dyn VirtualFile> {
        staged_file(&self.directory.path().join("source")).unwrap()
    }

    fn bucket(&self, store: &Arc<FaultyStore>) -> Bucket {
        let (objects, uploads) = (Arc::<FaultyStore>::clone(store), Arc::<FaultyStore>::clone(store));
        Bucket::with_stores("b", "memory://b", objects, uploads)
    }

    fn queue(&self, bucket: &Bucket, state: &StateDir) -> JobQueue {
        self.retrying(bucket, state, 0)
    }

    fn retrying(&self, bucket: &Bucket, state: &StateDir, retries: u32) -> JobQueue {
        let buckets = BTreeMap::from([("b".to_owned(), bucket.clone())]);
        let metrics = Arc::new(Metrics::default());
        let retries = Retries { count: retries, pause: Duration::from_millis(1) };
        JobQueue::new(
            buckets,
            state.journal(),
            metrics,
            QueueSettings { retries, ..QueueSettings::default() },
            self.runtime.handle().clone(),
        )
    }

    /// A queue of one of several hosts that share the bucket, and runs one job at a time.
    fn sharing(&self, bucket: &Bucket, state: &StateDir, lease: Duration) -> JobQueue {
        let buckets = BTreeMap::from([("b".to_owned(), bucket.clone())]);
        let settings = QueueSettings { lease: Some(lease), running: 1, ..QueueSettings::default() };
        let runtime = self.runtime.handle().clone();
        JobQueue::new(buckets, state.journal(), Arc::new(Metrics::default()), settings, runtime)
    }

    fn state(&self) -> StateDir {
        StateDir::open(&self.directory.path().join("state")).unwrap()
    }
}

fn request(key: &str) -> JobRequest {
    let image = StatusImage {
        id: "image".into(),
        name: "image".into(),
        disk: "image".into(),
        format: "raw".into(),
        generation: "1".into(),
        identity: None,
    };
    JobRequest {
        bucket: "b".into(),
        key: ObjectKey::parse(key).unwrap(),
        source: JobSource::Image(image),
        client_token: None,
        tags: Tags::new(),
        replaces: None,
    }
}

/// One export of three parts, or of one, over an old object, with the nth request failing.
fn export(setup: &Setup, failing: usize, retries: u32) -> (Status, Arc<FaultyStore>) {
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let key = ObjectKey::parse("k.raw").unwrap();
    setup.runtime.block_on(bucket.put(&key, Bytes::from_static(b"old"), &Replaces::Anything)).unwrap();
    let store = store.refailing(failing);
    let state = setup.state();
    let queue = setup.retrying(&bucket, &state, retries);
    let job = queue.submit(request("k.raw"), setup.file(), &mut None).unwrap();
    let waited = job.wait(LIMIT);
    let status = job.status();
    assert_eq!(waited.is_ok(), status.status == JobState::Success, "{status:?}");
    let object = setup.runtime.block_on(async {
        let meta = bucket.head(&key).await.unwrap().unwrap();
        bucket.read(&key, 0..meta.object_size, None).await.unwrap()
    });
    match status.status {
        JobState::Success => assert!(object == setup.content, "request {failing}: a wrong object"),
        JobState::Fail => {
            let error = status.error.clone().unwrap();
            assert!(error.cause.unwrap().contains("fails"), "request {failing}: the true reason is lost");
            assert!(object == b"old"[..], "request {failing}: a failed job touched the object");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(store.open_uploads(), 0, "request {failing}: an upload is left over");
    (status, store)
}

#[test]
fn every_single_failure_ends_in_success_or_in_its_reason() {
    // What must not fail: start, three parts, completion; or the one put. Before and after come the status, the
    // checksum files and the status again, without which the object still is what the status says.
    // A small put that fails in passing is made once more: a writer waits for it in close.
    for (size, essential, fatal) in [(20 << 20, 5, 5), (1000, 1, 0)] {
        let setup = Setup::new(size);
        let (status, store) = export(&setup, 0, 0);
        assert_eq!(status.status, JobState::Success);
        assert_eq!(status.bytes_uploaded, size as u64);
        // The first request put the old object.
        let requests = store.requests();
        assert_eq!(requests, 1 + 1 + essential + 2 + 1);
        let failed =
            (2..=requests).filter(|&failing| export(&setup, failing, 0).0.status == JobState::Fail).count();
        assert_eq!(failed, fatal);
    }
}

#[test]
fn a_job_goes_on_after_a_failure_and_sends_no_part_twice() {
    for size in [20 << 20, 1000] {
        let setup = Setup::new(size);
        let untroubled = export(&setup, 0, 0).1.requests();
        for failing in 2..=untroubled {
            let (status, store) = export(&setup, failing, 1);
            assert_eq!(status.status, JobState::Success, "request {failing}: {status:?}");
            let more = store.requests() - untroubled;
            // What failed is asked for once more; at most the parts that were under way with it, too.
            assert!(more <= 4, "request {failing}: {more} more requests");
        }
    }
}

/// The store of these tests has tags that nobody can tell before.
#[test]
fn a_completion_whose_answer_was_lost_is_known_by_the_objects_bytes() {
    let setup = Setup::new(20 << 20);
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let key = ObjectKey::parse("k.raw").unwrap();
    setup.runtime.block_on(bucket.put(&key, Bytes::from_static(b"old"), &Replaces::Anything)).unwrap();
    let state = setup.state();
    let queue = setup.retrying(&bucket, &state, 1);
    store.hold(true);
    let job = queue.submit(request("k.raw"), setup.file(), &mut None).unwrap();
    // The old object is one of the requests; the status file is not to take the place of the completion.
    while store.open_uploads() == 0 {
        std::thread::yield_now();
    }
    store.lose_answer();
    store.hold(false);
    job.wait(LIMIT).unwrap();
    assert_eq!(job.status().status, JobState::Success);
    let object = setup.runtime.block_on(bucket.read(&key, 0..20 << 20, None)).unwrap();
    assert!(object == setup.content);
    assert_eq!(store.open_uploads(), 0);
    // Old object, status, start, parts, completion, checksums and status: nothing was sent twice.
    assert_eq!(store.requests(), 1 + 1 + 5 + 2 + 1);
}

#[test]
fn the_same_key_is_busy_and_other_buckets_are_unknown() {
    let setup = Setup::new(20 << 20);
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let state = setup.state();
    let queue = setup.queue(&bucket, &state);
    store.hold(true);
    let first = queue.submit(request("k.raw"), setup.file(), &mut None).unwrap();
    let second = queue.submit(request("k.raw"), setup.file(), &mut None);
    assert_eq!(second.err().unwrap().kind(), ErrorKind::Busy);
    store.hold(false);
    first.wait(LIMIT).unwrap();
    queue.submit(request("k.raw"), setup.file(), &mut None).unwrap().wait(LIMIT).unwrap();
    let unknown = JobRequest { bucket: "none".into(), ..request("k.raw") };
    assert_eq!(queue.submit(unknown, setup.file(), &mut None).err().unwrap().kind(), ErrorKind::NotFound);
}

#[test]
fn jobs_of_a_dead_daemon_are_taken_up_or_fail_with_the_reason() {
    let setup = Setup::new(20 << 20);
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    {
        // A queue that is stopped before its jobs could end.
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        store.hold(true);
        for key in ["same.raw", "changed.raw"] {
            queue.submit(request(key), setup.file(), &mut None).unwrap();
        }
        setup.runtime.block_on(queue.stop());
        store.hold(false);
    }
    let state = setup.state();
    let queue = setup.queue(&bucket, &state);
    let resolved = Arc::new(AtomicUsize::new(0));
    let (asked, file) = (Arc::clone(&resolved), setup.file());
    queue
        .resume(move |image| {
            if asked.fetch_add(1, Ordering::SeqCst) == 0 {
                return Ok(RecordedFile { file: Arc::clone(&file), image: image.clone(), continues: true });
            }
            Err(freightfs::error::Error::new(ErrorKind::SourceChanged, "the source changed"))
        })
        .unwrap();
    let jobs = queue.jobs();
    assert_eq!(jobs.len(), 2);
    let ended = jobs.iter().map(|job| {
        let _ = job.wait(LIMIT);
        job.status()
    });
    let mut ended: Vec<_> = ended.map(|s| (s.status, s.error.map(|error| error.code))).collect();
    ended.sort_by_key(|(state, _)| *state == JobState::Fail);
    let changed = Some("source_changed".to_owned());
    assert_eq!(ended, [(JobState::Success, None), (JobState::Fail, changed)]);
    assert_eq!(resolved.load(Ordering::SeqCst), 2);
    assert_eq!(store.open_uploads(), 0);
}

#[test]
fn records_of_another_version_are_refused_by_name_and_set_aside() {
    let setup = Setup::new(1000);
    let state = setup.state();
    let path = setup.directory.path().join("state/jobs/x.json");
    std::fs::write(&path, "{\"version\": 99}").unwrap();
    let Loaded { records, damaged, .. } = state.journal().load().unwrap();
    assert!(records.is_empty());
    assert!(damaged[0].error.to_string().contains("99"), "{}", damaged[0].error);
    assert!(path.exists(), "it stays until its status was ended");
    let aside = state.journal().set_aside(&damaged[0]);
    assert!(!path.exists() && aside.ends_with("damaged/x.json") && aside.exists());
    assert!(state.journal().load().unwrap().damaged.is_empty(), "what was set aside stays there");
    assert!(aside.exists());
}

#[test]
fn objects_that_a_store_does_not_copy_are_renamed_in_parts() {
    let setup = Setup::new(20 << 20);
    for failing in 0..=7 {
        let store = FaultyStore::new(failing);
        let (objects, uploads) = (Arc::<FaultyStore>::clone(&store), Arc::<FaultyStore>::clone(&store));
        let bucket = Bucket::with_stores("b", "memory://b", objects, uploads).with_largest_copy(10 << 20);
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        let (from, to) = (ObjectKey::parse("from").unwrap(), ObjectKey::parse("to").unwrap());
        let content = Bytes::from(setup.content.clone());
        setup.runtime.block_on(async {
            if bucket.put(&from, content.clone(), &Replaces::Anything).await.is_err() {
                bucket.put(&from, content.clone(), &Replaces::Anything).await.unwrap();
            }
            let renamed = queue.rename(&bucket, &from, &to, false).await;
            // The put, the start, three parts and the completion.
            assert_eq!(renamed.is_err(), (2..=6).contains(&failing), "request {failing}");
            let (there, gone) = if renamed.is_ok() { (&to, &from) } else { (&from, &to) };
            assert!(bucket.read(there, 0..20 << 20, None).await.unwrap() == content);
            assert_eq!(bucket.head(gone).await.unwrap(), None, "request {failing}: two names");
        });
        assert_eq!(store.open_uploads(), 0, "request {failing}: an upload is left over");
        let logs = std::fs::read_dir(setup.directory.path().join("state/uploads")).unwrap().count();
        assert_eq!(logs, 0, "request {failing}");
    }
}

/// First as it is; then a part is not what the store was asked for, and a part cannot be copied.
#[test]
fn large_objects_are_renamed_by_copies_of_their_parts_and_read_only_when_those_are_wrong() {
    let Some(endpoint) = support::s3::endpoint() else { return };
    let setup = Setup::new(11 << 20);
    let name = format!("large-renames-{}", std::process::id());
    let make = ["s3api", "create-bucket", "--bucket", &name];
    support::succeed(&mut support::s3::aws(&endpoint, &make));
    let wrong = "<CopyPartResult><ETag>\"0\"</ETag><ChecksumCRC64NVME>AAAAAAAAAAA=</ChecksumCRC64NVME></CopyPartResult>";
    let (reads, fate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Fate::Forward)));
    let (read, next) = (Arc::clone(&reads), Arc::clone(&fate));
    let proxy = Proxy::start(&endpoint, move |request| {
        let is_read = request.method == "GET" && request.target.ends_with("/from");
        read.fetch_add(usize::from(is_read), Ordering::SeqCst);
        let is_copy = request.is_part() && request.target.contains("/to?");
        if is_copy { std::mem::replace(&mut *next.lock().unwrap(), Fate::Forward) } else { Fate::Forward }
    });
    let client = [("endpoint", proxy.url()), ("allow_http", "true".to_owned())];
    let client: BTreeMap<_, _> =
        client.into_iter().map(|(key, value)| (key.to_owned(), value.as_str().into())).collect();
    let key = |key: &str| ObjectKey::parse(key).unwrap();
    for (answer, expected) in [(Fate::Forward, 0), (Fate::AnswerWell(wrong), 2), (Fate::Answer(501), 2)] {
        let url = format!("s3://{name}");
        let bucket = Bucket::open_with("b", &url, &RequestLimits::default(), &client).unwrap();
        let bucket = bucket.with_largest_copy(10 << 20);
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        setup.runtime.block_on(async {
            bucket.probe().await.unwrap();
            let upload = bucket.start_upload(&key("from"), 8 << 20, &Tags::new()).await.unwrap();
            let content = Bytes::from(setup.content.clone());
            bucket.put_by_upload(&key("from"), &upload, content.clone(), &Replaces::Anything).await.unwrap();
            reads.store(0, Ordering::SeqCst);
            *fate.lock().unwrap() = answer;
            queue.rename(&bucket, &key("from"), &key("to"), false).await.unwrap();
            assert_eq!(reads.load(Ordering::SeqCst), expected, "{answer:?}");
            assert_eq!(bucket.copies_parts(), expected == 0);
            assert!(bucket.read(&key("to"), 0..11 << 20, None).await.unwrap() == content);
            assert_eq!(bucket.head(&key("from")).await.unwrap(), None);
            bucket.delete(&key("to")).await.unwrap();
        });
    }
    assert!(!support::s3::uploads(&endpoint, &name).contains("UploadId"));
    let logs = std::fs::read_dir(setup.directory.path().join("state/uploads")).unwrap().count();
    assert_eq!(logs, 0);
}

/// The record of the newest job in the state directory, changed.
fn edit_record(setup: &Setup, change: impl Fn(&mut serde_json::Value)) -> serde_json::Value {
    let jobs = std::fs::read_dir(setup.directory.path().join("state/jobs")).unwrap().flatten();
    let path = jobs.map(|job| job.path()).filter(|path| path.extension().is_some()).max().unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let before = record.clone();
    change(&mut record);
    std::fs::write(&path, record.to_string()).unwrap();
    before
}

/// Makes of an ended job one that was running when its daemon died, with a log of these lines.
fn unfinish(setup: &Setup, lines: &[serde_json::Value]) {
    let record = edit_record(setup, |record| {
        let status = &mut record["status"];
        status["status"] = "RUNNING".into();
        for field in ["end_time", "md5", "sha256", "etag"] {
            status[field] = serde_json::Value::Null;
        }
    });
    let log = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let id = record["status"]["job_id"].as_str().unwrap();
    std::fs::write(setup.directory.path().join(format!("state/uploads/{id}.parts")), log).unwrap();
}

fn read(setup: &Setup, bucket: &Bucket, key: &str) -> Option<Bytes> {
    let key = ObjectKey::parse(key).unwrap();
    setup.runtime.block_on(async {
        let meta = bucket.head(&key).await.unwrap()?;
        Some(bucket.read(&key, 0..meta.object_size, None).await.unwrap())
    })
}

fn unchanged(setup: &Setup) -> impl Fn(&StatusImage) -> freightfs::error::Result<RecordedFile> + use<> {
    let file = setup.file();
    move |image| Ok(RecordedFile { file: Arc::clone(&file), image: image.clone(), continues: true })
}

#[test]
fn what_is_told_late_stays_away_from_a_newer_object() {
    for is_ended in [false, true] {
        let (setup, other) = (Setup::new(9 << 20), Setup::new(1000));
        let bucket = setup.bucket(&FaultyStore::new(0));
        {
            let state = setup.state();
            let queue = setup.queue(&bucket, &state);
            queue.submit(request("k.raw"), setup.file(), &mut None).unwrap().wait(LIMIT).unwrap();
            setup.runtime.block_on(queue.stop());
        }
        if is_ended {
            edit_record(&setup, |record| record["status_unwritten"] = true.into());
        } else {
            let record = edit_record(&setup, |_| {});
            let status = &record["status"];
            let upload = serde_json::json!({"bucket": "b", "key": "k.raw", "id": "u", "part_size": 8 << 20});
            let placed = serde_json::json!({
                "size": 9 << 20, "etag": status["etag"], "sha256": status["sha256"], "md5": status["md5"],
            });
            unfinish(&setup, &[serde_json::json!({"upload": upload}), serde_json::json!({"placed": placed})]);
        }
        let state = other.state();
        let queue = other.queue(&bucket, &state);
        queue.submit(request("k.raw"), other.file(), &mut None).unwrap().wait(LIMIT).unwrap();
        let names = ["k.raw", "k.raw.status", "k.raw.sha256", "k.raw.md5"];
        let newer = names.map(|name| read(&other, &bucket, name).unwrap());

        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        queue.resume(unchanged(&setup)).unwrap();
        let job = queue.jobs().pop().unwrap();
        assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success);
        while job.holds_status() {
            std::thread::yield_now();
        }
        setup.runtime.block_on(queue.stop());
        assert!(names.map(|name| read(&setup, &bucket, name).unwrap()) == newer, "ended: {is_ended}");
        assert!(edit_record(&setup, |_| {})["status_unwritten"] == false, "it is not tried again");
    }
}

/// A request for what a program wrote, staged in the state directory.
fn staged(setup: &Setup, key: &str, replaces: Option<Replaces>) -> (JobRequest, Arc<dyn VirtualFile>) {
    let path = setup.directory.path().join("state/staging/written");
    std::fs::write(&path, &setup.content).unwrap();
    let file = staged_file(&path).unwrap();
    (JobRequest { source: JobSource::Staged(path), replaces, ..request(key) }, file)
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + LIMIT;
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// Submits what a program wrote; the store puts it in place and goes down before it says so.
fn lose_the_answer(setup: &Setup, store: &FaultyStore, bucket: &Bucket, queue: &JobQueue) -> Arc<Job> {
    let key = ObjectKey::parse("k.bin").unwrap();
    let old = setup.runtime.block_on(bucket.put(&key, Bytes::from_static(b"old"), &Replaces::Anything));
    store.die_completing();
    let (request, file) = staged(setup, "k.bin", Some(Replaces::found(Some(old.unwrap().as_deref()))));
    let job = queue.submit(request, file, &mut None).unwrap();
    assert!(job.wait(LIMIT).is_err(), "close gets the error");
    until("waiting", || job.is_waiting());
    assert!(!job.has_ended(), "it is not known how it ended: {:?}", job.status());
    job
}

#[test]
fn an_answer_that_was_lost_is_asked_for_until_the_store_answers() {
    let setup = Setup::new(9 << 20);
    let store = FaultyStore::new(0);
    let (bucket, state) = (setup.bucket(&store), setup.state());
    let queue = setup.queue(&bucket, &state);
    let job = lose_the_answer(&setup, &store, &bucket, &queue);
    store.set_down(false);
    until("the end", || job.has_ended());
    assert_eq!(job.status().status, JobState::Success);
    assert!(read(&setup, &bucket, "k.bin").unwrap() == setup.content);
    assert_eq!(store.open_uploads(), 0);
}

#[test]
fn a_job_in_doubt_is_asked_about_by_the_next_mount_and_a_cancellation_is_kept() {
    for cancels in [false, true] {
        let setup = Setup::new(9 << 20);
        let store = FaultyStore::new(0);
        let bucket = setup.bucket(&store);
        {
            let state = setup.state();
            let queue = setup.queue(&bucket, &state);
            let job = lose_the_answer(&setup, &store, &bucket, &queue);
            if cancels {
                job.cancel();
            }
            setup.runtime.block_on(queue.stop());
            assert!(!job.has_ended(), "{:?}", job.status());
        }
        store.set_down(false);
        assert_eq!(edit_record(&setup, |_| {})["is_cancelled"] == true, cancels);
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        queue.resume(unchanged(&setup)).unwrap();
        let job = queue.jobs().pop().unwrap();
        // What is in place was not cancelled.
        assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success);
    }
}

/// A part that was written again after it was sent early, was sent again by the job: what is in place has it.
#[test]
fn parts_that_were_sent_again_before_the_end_are_not_stale_after_it() {
    let setup = Setup::new(9 << 20);
    let bucket = setup.bucket(&FaultyStore::new(0));
    {
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        let (request, file) = staged(&setup, "k.bin", Some(Replaces::Nothing));
        queue.submit(request, file, &mut None).unwrap().wait(LIMIT).unwrap();
        setup.runtime.block_on(queue.stop());
    }
    let meta = setup.runtime.block_on(bucket.head(&ObjectKey::parse("k.bin").unwrap())).unwrap().unwrap();
    // Neither the source nor hashes nor part 0: only the log can tell that the object is in place.
    edit_record(&setup, |record| {
        (record["stale"], record["upload_log"]) =
            (serde_json::json!([0]), record["status"]["job_id"].clone());
    });
    let digest = |name: &str| {
        let (sha, md5) = (Sha256::new_with_prefix(&setup.content), Md5::new_with_prefix(&setup.content));
        let state = if name == "md5" { hex::encode(md5.serialize()) } else { hex::encode(sha.serialize()) };
        serde_json::json!({"digest": {"name": name, "bytes": setup.content.len(), "state": state}})
    };
    unfinish(
        &setup,
        &[
            serde_json::json!({"upload": {"bucket": "b", "key": "k.bin", "id": "u", "part_size": 8 << 20}}),
            serde_json::json!({"part": {"index": 0, "length": 8 << 20, "id": "0"}}),
            serde_json::json!({"part": {"index": 1, "length": 1 << 20, "id": "1"}}),
            digest("sha256"),
            digest("md5"),
            serde_json::json!({"completing": {"mark": meta.etag.unwrap()}}),
        ],
    );
    let state = setup.state();
    let queue = setup.queue(&bucket, &state);
    queue.resume(unchanged(&setup)).unwrap();
    let job = queue.jobs().pop().unwrap();
    assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success);
}

#[test]
fn a_damaged_record_is_tried_until_its_status_was_ended() {
    let setup = Setup::new(1000);
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let jobs = setup.directory.path().join("state/jobs");
    let path = {
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        let job = queue.submit(request("k.raw"), setup.file(), &mut None).unwrap();
        job.wait(LIMIT).unwrap();
        setup.runtime.block_on(queue.stop());
        jobs.join(format!("{}.json", job.id()))
    };
    edit_record(&setup, |record| record["version"] = 99.into());
    // As it is while the job runs.
    let key = ObjectKey::parse("k.raw.status").unwrap();
    let status = String::from_utf8(read(&setup, &bucket, "k.raw.status").unwrap().to_vec()).unwrap();
    let running = Bytes::from(status.replace("\"SUCCESS\"", "\"RUNNING\""));
    setup.runtime.block_on(bucket.put(&key, running, &Replaces::Anything)).unwrap();
    for down in [true, false] {
        store.set_down(down);
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        queue.resume(unchanged(&setup)).unwrap();
        if down {
            until("the store was asked", || store.refused() > 0);
        } else {
            until("the record is set aside", || !path.exists());
        }
        setup.runtime.block_on(queue.stop());
        assert_eq!(path.exists(), down);
    }
    let status = read(&setup, &bucket, "k.raw.status").unwrap();
    assert!(String::from_utf8_lossy(&status).contains("\"FAIL\""), "{status:?}");
}

#[test]
fn records_are_of_their_own_job_and_their_staged_file_is_below_the_state_directory() {
    let setup = Setup::new(1000);
    let bucket = setup.bucket(&FaultyStore::new(0));
    let outside = setup.directory.path().join("source");
    {
        let state = setup.state();
        let queue = setup.queue(&bucket, &state);
        let (request, file) = staged(&setup, "k.bin", Some(Replaces::Nothing));
        queue.submit(request, file, &mut None).unwrap().wait(LIMIT).unwrap();
        setup.runtime.block_on(queue.stop());
    }
    unfinish(&setup, &[]);
    let record = edit_record(&setup, |record| {
        record["request"]["source"]["staged"] = outside.to_str().unwrap().into()
    });
    let id = record["status"]["job_id"].as_str().unwrap();
    let jobs = setup.directory.path().join("state/jobs");
    std::fs::copy(jobs.join(format!("{id}.json")), jobs.join("copy.json")).unwrap();
    let state = setup.state();
    let queue = setup.queue(&bucket, &state);
    queue.resume(unchanged(&setup)).unwrap();
    let jobs = queue.jobs();
    assert_eq!(jobs.len(), 1, "the copy is no job");
    assert!(jobs[0].wait(LIMIT).is_err(), "nothing is read from elsewhere: {:?}", jobs[0].status());
    assert!(outside.exists());
}

/// The object came by another upload than the one that this job has begun.
#[test]
fn a_job_that_succeeds_by_what_another_one_made_leaves_no_upload() {
    let setup = Setup::new(9 << 20);
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let state = setup.state();
    let queue = setup.queue(&bucket, &state);
    store.hold(true);
    let job = queue.submit(request("k.raw"), setup.file(), &mut None).unwrap();
    until("an upload", || store.open_uploads() == 1);
    let key = ObjectKey::parse("k.raw").unwrap();
    let same = Bytes::from(setup.content.clone());
    setup.runtime.block_on(bucket.put(&key, same, &Replaces::Nothing)).unwrap();
    store.hold(false);
    assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success);
    assert_eq!(store.open_uploads(), 0);
}

#[test]
fn look_ups_before_the_upload_are_tried_again_and_what_is_replaced_is_recorded_while_a_job_waits() {
    let setup = Setup::new(1000);
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let key = ObjectKey::parse("k.raw").unwrap();
    setup.runtime.block_on(bucket.put(&key, Bytes::from_static(b"old"), &Replaces::Anything)).unwrap();
    let state = setup.state();
    let queue = setup.retrying(&bucket, &state, 20);
    store.set_down(true);
    let job = queue.submit(request("k.raw"), setup.file(), &mut None).unwrap();
    until("waiting", || job.is_waiting() || job.has_ended());
    store.set_down(false);
    assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success);
    assert!(edit_record(&setup, |_| {})["replaces"]["tag"].is_string());
}

#[test]
#[cfg(debug_assertions)]
fn a_record_that_may_be_there_after_an_error_is_removed() {
    use freightfs::failpoint::{Action, Step, arm};
    let setup = Setup::new(1000);
    let bucket = setup.bucket(&FaultyStore::new(0));
    let state = setup.state();
    let queue = setup.queue(&bucket, &state);
    arm(Some((Step::RecordSync, 1, Action::Error)));
    let submitted = queue.submit(request("k.raw"), setup.file(), &mut None);
    arm(None);
    assert_eq!(submitted.err().unwrap().kind(), ErrorKind::Io);
    assert_eq!(std::fs::read_dir(setup.directory.path().join("state/jobs")).unwrap().count(), 0);
}

/// A request for an image that other hosts have too.
fn known_request(key: &str) -> JobRequest {
    let mut request = request(key);
    if let JobSource::Image(image) = &mut request.source {
        image.identity = Some(Identity::of_facts().fact("the image").finish(None));
    }
    request
}

#[test]
fn who_follows_another_host_survives_a_store_that_does_not_answer() {
    let (setup, other) = (Setup::new(9 << 20), Setup::new(9 << 20));
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let (state, other_state) = (setup.state(), other.state());
    let lease = Duration::from_secs(2);
    let (queue, follower) =
        (setup.sharing(&bucket, &state, lease), other.sharing(&bucket, &other_state, lease));
    store.hold(true);
    let job = queue.submit(known_request("k.raw"), setup.file(), &mut None).unwrap();
    until("an upload", || store.open_uploads() == 1);
    let followed = follower.submit(known_request("k.raw"), other.file(), &mut None).unwrap();
    until("it follows", || !followed.holds_status() || followed.has_ended());
    store.fail_reads(3);
    until("its looks have failed", || store.failing_reads() == 0 || followed.has_ended());
    store.hold(false);
    assert_eq!(job.wait(LIMIT).unwrap().status, JobState::Success);
    assert_eq!(followed.wait(LIMIT).unwrap().repeated, 1);
    assert_eq!(store.open_uploads(), 0);
}

#[test]
fn what_somebody_writes_while_a_shared_job_waits_for_its_turn_stays() {
    let setup = Setup::new(9 << 20);
    let store = FaultyStore::new(0);
    let (bucket, state) = (setup.bucket(&store), setup.state());
    let queue = setup.sharing(&bucket, &state, Duration::from_secs(60));
    let key = ObjectKey::parse("second.raw").unwrap();
    let put =
        |bytes| setup.runtime.block_on(bucket.put(&key, Bytes::from_static(bytes), &Replaces::Anything));
    put(b"old").unwrap();
    store.hold(true);
    let first = queue.submit(request("first.raw"), setup.file(), &mut None).unwrap();
    until("an upload", || store.open_uploads() == 1);
    let second = queue.submit(request("second.raw"), setup.file(), &mut None).unwrap();
    let records = setup.directory.path().join("state/jobs").join(format!("{}.json", second.id()));
    until("what it replaces is recorded", || {
        std::fs::read_to_string(&records).unwrap_or_default().contains("\"replaces\": {")
    });
    put(b"newer").unwrap();
    store.hold(false);
    first.wait(LIMIT).unwrap();
    assert_eq!(second.wait(LIMIT).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(read(&setup, &bucket, "second.raw").unwrap(), "newer");
}

/// The other host's clock is a year ahead: its job has a greater id, and has ended after this one.
#[test]
fn a_status_of_a_host_with_another_clock_gives_way_by_the_order_of_the_leases() {
    let (setup, lease) = (Setup::new(1000), Duration::from_secs(60));
    let (bucket, state) = (setup.bucket(&FaultyStore::new(0)), setup.state());
    let queue = setup.sharing(&bucket, &state, lease);
    queue.submit(request("k.raw"), setup.file(), &mut None).unwrap().wait(LIMIT).unwrap();
    let status = read(&setup, &bucket, "k.raw.status").unwrap();
    for state in ["SUCCESS", "FAIL"] {
        let mut ahead: serde_json::Value = serde_json::from_slice(&status).unwrap();
        (ahead["job_id"], ahead["status"]) = ("ffffffffffff-0".into(), state.into());
        ahead["end_time"] = "2999-01-01T00:00:00Z".into();
        let (key, text) = (ObjectKey::parse("k.raw.status").unwrap(), Bytes::from(ahead.to_string()));
        setup.runtime.block_on(bucket.put(&key, text, &Replaces::Anything)).unwrap();
        // A source that is shorter than it was.
        let source = setup.file();
        std::fs::File::options()
            .write(true)
            .open(setup.directory.path().join("source"))
            .unwrap()
            .set_len(10)
            .unwrap();
        let failed = queue.submit(request("k.raw"), source, &mut None).unwrap();
        assert!(failed.wait(LIMIT).is_err());
        std::fs::write(setup.directory.path().join("source"), &setup.content).unwrap();
        let told: Status = serde_json::from_slice(&read(&setup, &bucket, "k.raw.status").unwrap()).unwrap();
        assert_eq!((&*told.job_id, told.status), (&*failed.id(), JobState::Fail), "over {state}");
    }
}

#[test]
fn a_host_that_gives_its_job_up_leaves_the_upload_to_the_one_that_has_taken_it_over() {
    let (setup, other) = (Setup::new(20 << 20), Setup::new(20 << 20));
    let store = FaultyStore::new(0);
    let bucket = setup.bucket(&store);
    let lease = Duration::from_secs(2);
    let other_state = other.state();
    let successor = other.sharing(&bucket, &other_state, lease);
    let is_told = || {
        let names = setup.runtime.block_on(bucket.list_control(&lease_directory("k.raw"))).unwrap();
        names.iter().filter(|name| name.ends_with(".beat")).any(|name| {
            let name = format!("{}/{name}", lease_directory("k.raw"));
            let beat = setup.runtime.block_on(bucket.read_control(&name)).ok().flatten();
            beat.is_some_and(|beat| String::from_utf8_lossy(&beat.bytes).contains("\\\"upload\\\""))
        })
    };
    {
        let state = setup.state();
        let queue = setup.sharing(&bucket, &state, lease);
        store.hold(true);
        queue.submit(known_request("k.raw"), setup.file(), &mut None).unwrap();
        until("an upload", || store.open_uploads() == 1);
        until("a heartbeat that tells of it", is_told);
        setup.runtime.block_on(queue.stop());
    }
    let taken = successor.submit(known_request("k.raw"), other.file(), &mut None).unwrap();
    until("it is taken over", || taken.status().status == JobState::Running && taken.holds_status());
    let second = format!("{}/0000000002.beat", lease_directory("k.raw"));
    until("the new holder says what it does", || {
        let beat = setup.runtime.block_on(bucket.read_control(&second)).unwrap();
        beat.is_some_and(|beat| String::from_utf8_lossy(&beat.bytes).contains("\\\"upload\\\""))
    });
    let state = setup.state();
    let queue = setup.sharing(&bucket, &state, lease);
    queue.resume(unchanged(&setup)).unwrap();
    let job = queue.jobs().pop().unwrap();
    job.cancel();
    assert_eq!(job.wait(LIMIT).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(store.open_uploads(), 1, "the successor's upload");
    store.hold(false);
    assert_eq!(taken.wait(LIMIT).unwrap().attempt, 1);
    assert_eq!(store.open_uploads(), 0);
    setup.runtime.block_on(queue.stop());
    assert_eq!(std::fs::read_dir(setup.directory.path().join("state/uploads")).unwrap().count(), 0);
}

/// Where the leases of a key are, below our own files.
fn lease_directory(key: &str) -> String {
    format!("leases/{}", &hex::encode(Sha256::digest(key))[..32])
}
