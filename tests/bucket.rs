//! One suite for every store: the local directory, S3 (SeaweedFS, moto), Azure Blob Storage (Azurite), and the store in memory of the fault tests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use freightfs::bucket::{
    Bucket, CopySource, Crc64, ObjectFile, ObjectKey, Replaces, RequestLimits, Tags, Zeros,
};
use freightfs::error::ErrorKind;
use freightfs::units::FileOffset;
use freightfs::vfile::VirtualFile;
use support::faulty::FaultyStore;
use support::images::Random;
use support::proxy::{Fate, Proxy, Request};
use support::{azure, command, skip, succeed};

fn key(key: &str) -> ObjectKey {
    ObjectKey::parse(key).unwrap()
}

/// What every store must do.
async fn conformance(bucket: &Bucket) {
    bucket.probe().await.unwrap();
    assert_eq!(bucket.list(None).await.unwrap(), freightfs::bucket::Listing::default());
    objects(bucket).await;
    uploads(bucket).await;
    listings(bucket).await;
}

/// What hosts agree by.
async fn conditions(bucket: &Bucket) {
    bucket.check_shareable().unwrap();
    assert!(bucket.create_control("once", Bytes::from_static(b"first")).await.unwrap());
    assert!(!bucket.create_control("once", Bytes::from_static(b"second")).await.unwrap());
    // As when the answer to the first try was lost.
    assert!(bucket.create_control("once", Bytes::from_static(b"first")).await.unwrap());
    let found = bucket.read_control("once").await.unwrap().unwrap();
    assert_eq!(found.bytes, "first");
    let tag = Replaces::Tag(found.etag.unwrap());
    let next = bucket.put_control("once", Bytes::from_static(b"third"), &tag).await.unwrap();
    assert_eq!(bucket.read_control("once").await.unwrap().unwrap().etag, next);
    let refused = bucket.put_control("once", Bytes::from_static(b"late"), &tag).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Conflict);
    bucket.delete_control("once").await.unwrap();
    assert_eq!(bucket.read_control("once").await.unwrap(), None);
    replacements(bucket).await;
}

/// What is to be replaced is replaced, and nothing else is.
async fn replacements(bucket: &Bucket) {
    let k = key("replaced");
    let text = |text: &'static str| Bytes::from_static(text.as_bytes());
    let tagged = |meta: &freightfs::bucket::ObjectMeta| Replaces::Tag(meta.etag.clone().unwrap());
    let upload = async |content: &'static str, replaces: &Replaces| {
        let id = bucket.start_upload(&k, 5 << 20, &Tags::new()).await.unwrap();
        let part = bucket.put_part(&k, &id, 0, 0, text(content)).await.unwrap();
        let made = bucket.complete_upload(&k, &id, vec![part], content.len() as u64, replaces, None).await;
        if made.is_err() {
            bucket.abort_upload(&k, &id).await.unwrap();
        }
        made
    };
    let other = Replaces::Tag("\"00000000000000000000000000000000\"".to_owned());
    let conflicts = |error: freightfs::error::Error| {
        assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.report());
        assert!(error.to_string().starts_with(&bucket.url_of(&k)), "{error}");
    };
    conflicts(bucket.put(&k, text("x"), &other).await.unwrap_err());
    conflicts(upload("x", &other).await.unwrap_err());
    let first = upload("first", &Replaces::Nothing).await.unwrap();
    for replaces in [&Replaces::Nothing, &other] {
        conflicts(bucket.put(&k, text("x"), replaces).await.unwrap_err());
        conflicts(upload("x", replaces).await.unwrap_err());
    }
    assert_eq!(bucket.head(&k).await.unwrap().unwrap(), first);
    let second = bucket.put(&k, text("second"), &tagged(&first)).await.unwrap();
    assert_eq!(bucket.head(&k).await.unwrap().unwrap().etag, second);
    conflicts(upload("x", &tagged(&first)).await.unwrap_err());
    let third = upload("third", &Replaces::Tag(second.unwrap())).await.unwrap();
    assert_eq!(bucket.read(&k, 0..5, third.etag.as_deref()).await.unwrap(), "third");
    let source = key("source");
    bucket.put(&source, text("source"), &Replaces::Anything).await.unwrap();
    let source = bucket.head(&source).await.unwrap().unwrap();
    let error = bucket.copy(&source, &k, &tagged(&first)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.report());
    assert_eq!(bucket.read(&k, 0..5, third.etag.as_deref()).await.unwrap(), "third");
    bucket.delete(&source.key).await.unwrap();
    conflicts(bucket.delete_if(&k, &tagged(&first)).await.unwrap_err());
    bucket.delete_if(&k, &tagged(&third)).await.unwrap();
    assert_eq!(bucket.head(&k).await.unwrap(), None);
    bucket.delete_if(&k, &tagged(&third)).await.unwrap();
}

async fn objects(bucket: &Bucket) {
    let a = key("a");
    assert_eq!(bucket.head(&a).await.unwrap(), None);
    assert_eq!(bucket.read(&a, 0..1, None).await.unwrap_err().kind(), ErrorKind::NotFound);
    bucket.delete(&a).await.unwrap();
    bucket.put(&a, Bytes::from_static(b"content"), &Replaces::Anything).await.unwrap();
    let meta = bucket.head(&a).await.unwrap().unwrap();
    assert_eq!((meta.object_size, &meta.key), (7, &a));
    let age = meta.modified.elapsed().unwrap_or_default();
    assert!(age.as_secs() < 3600, "modified {age:?} ago");
    assert_eq!(bucket.read(&a, 2..5, meta.etag.as_deref()).await.unwrap(), "nte");
    bucket.put(&a, Bytes::from_static(b"other content"), &Replaces::Anything).await.unwrap();
    let error = bucket.read(&a, 2..5, meta.etag.as_deref()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceChanged, "{}", error.report());
    assert!(error.to_string().starts_with(&bucket.url_of(&a)), "{error}");
    let copy = async |from, replaces| bucket.copy(from, &key("deep/copy"), replaces).await;
    let error = copy(&meta, &Replaces::Anything).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceChanged, "{}", error.report());
    assert_eq!(bucket.head(&key("deep/copy")).await.unwrap(), None);
    let other = bucket.head(&a).await.unwrap().unwrap();
    let copied = copy(&other, &Replaces::Nothing).await.unwrap();
    assert_eq!((copied.object_size, copied.key.as_str()), (13, "deep/copy"));
    let copied = Replaces::Tag(copied.etag.unwrap());
    copy(&other, &copied).await.unwrap();
    copy(&other, &Replaces::Anything).await.unwrap();
    assert_eq!(bucket.read(&key("deep/copy"), 0..13, None).await.unwrap(), "other content");
    bucket.put(&key("empty"), Bytes::new(), &Replaces::Anything).await.unwrap();
    assert_eq!(bucket.head(&key("empty")).await.unwrap().unwrap().object_size, 0);
    for gone in ["a", "deep/copy", "empty"] {
        bucket.delete(&key(gone)).await.unwrap();
        assert_eq!(bucket.head(&key(gone)).await.unwrap(), None);
    }
}

async fn uploads(bucket: &Bucket) {
    let k = key("dir/big object");
    let part_size = 5 << 20;
    let mut content = Random(1).bytes(12 << 20);
    content[3 << 20..9 << 20].fill(0);
    let bytes = Bytes::from(content.clone());
    bucket.put(&k, Bytes::from_static(b"old"), &Replaces::Anything).await.unwrap();
    for round in 0..2 {
        let upload = bucket.start_upload(&k, part_size, &Tags::new()).await.unwrap();
        let part = |index: usize| {
            let range = index * part_size as usize..((index + 1) * part_size as usize).min(bytes.len());
            bucket.put_part(&k, &upload, index, range.start as u64, bytes.slice(range))
        };
        // Out of order, together, and one of them twice.
        let (last, first) = tokio::join!(part(2), part(0));
        let (first, last) = (first.unwrap(), last.unwrap());
        part(1).await.unwrap();
        let middle = part(1).await.unwrap();
        assert_eq!(
            bucket.read(&k, 0..3, None).await.unwrap(),
            "old",
            "the upload is seen before it is complete"
        );
        if round == 0 {
            bucket.abort_upload(&k, &upload).await.unwrap();
            assert_eq!(bucket.head(&k).await.unwrap().unwrap().object_size, 3);
            continue;
        }
        let size = bytes.len() as u64;
        let meta = bucket
            .complete_upload(&k, &upload, vec![first, middle, last], size, &Replaces::Anything, None)
            .await
            .unwrap();
        assert_eq!(meta.object_size, size);
        assert!(bucket.read(&k, 0..size, meta.etag.as_deref()).await.unwrap() == content);
        let file = ObjectFile::new(bucket.clone(), meta, tokio::runtime::Handle::current());
        let read = tokio::task::spawn_blocking(move || {
            let mut whole = vec![0; 12 << 20];
            let mut done = 0;
            while done < whole.len() {
                let end = (done + 777_777).min(whole.len());
                done += file.read_at(FileOffset(done as u64), &mut whole[done..end]).unwrap();
            }
            assert_eq!(file.read_at(FileOffset(12 << 20), &mut [0]).unwrap(), 0);
            whole
        });
        assert!(read.await.unwrap() == content);
    }
    bucket.delete(&k).await.unwrap();
}

async fn listings(bucket: &Bucket) {
    let names = ["b", "c d", "x#1", "ü~%25", "(par)[en]{s}"];
    for name in names {
        bucket
            .put(&key(&format!("list/{name}")), Bytes::from_static(b"1"), &Replaces::Anything)
            .await
            .unwrap();
        bucket
            .put(&key(&format!("list/sub/{name}")), Bytes::from_static(b"22"), &Replaces::Anything)
            .await
            .unwrap();
    }
    let listing = bucket.list(None).await.unwrap();
    assert!(listing.objects.is_empty() && listing.prefixes.contains(&"list".to_owned()), "{listing:?}");
    assert!(!listing.prefixes.contains(&".freightfs".to_owned()));
    let listing = bucket.list(Some(&key("list"))).await.unwrap();
    assert_eq!(listing.prefixes, ["sub"]);
    let mut found: Vec<_> = listing.objects.iter().map(|o| o.key.file_name()).collect();
    let mut expected = names.to_vec();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
    assert!(listing.objects.iter().all(|o| o.object_size == 1));
    assert!(bucket.has_prefix(&key("list/sub")).await.unwrap());
    assert!(!bucket.has_prefix(&key("list/su")).await.unwrap());
    assert_eq!(bucket.list(Some(&key("nothing/here"))).await.unwrap(), freightfs::bucket::Listing::default());
    for name in names {
        assert_eq!(bucket.read(&key(&format!("list/sub/{name}")), 0..2, None).await.unwrap(), "22");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap()
}

fn local() -> (tempfile::TempDir, Bucket) {
    let directory = tempfile::tempdir().unwrap();
    let bucket = Bucket::open("b", &format!("file://{}", directory.path().display())).unwrap();
    (directory, bucket)
}

#[test]
fn a_local_directory_conforms() {
    let (directory, bucket) = local();
    runtime().block_on(conformance(&bucket));
    runtime().block_on(conditions(&bucket));
    assert_eq!(std::fs::read_dir(directory.path().join(".freightfs/uploads")).unwrap().count(), 0);
}

/// What a remount goes by that wants to know whether an earlier process put the object in place.
#[test]
fn a_local_upload_knows_its_objects_tag_and_another_file_in_the_same_inode_has_another_one() {
    let (directory, bucket) = local();
    runtime().block_on(async {
        let k = key("k");
        let upload = bucket.start_upload(&k, 5 << 20, &Tags::new()).await.unwrap();
        // The end of the last part is zeros, which are left out.
        let mut bytes = vec![0; 1 << 20];
        bytes[0] = 1;
        let part = bucket.put_part(&k, &upload, 0, 0, bytes.into()).await.unwrap();
        let expected =
            bucket.expected_etag_prefix(&upload, std::slice::from_ref(&part), 1 << 20).await.unwrap();
        let made =
            bucket.complete_upload(&k, &upload, vec![part], 1 << 20, &Replaces::Nothing, None).await.unwrap();
        assert_eq!(made.etag, expected);
        // Inodes are given again: such a file has been written at another time.
        let other = std::fs::File::options().write(true).open(directory.path().join("k")).unwrap();
        other.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let found = bucket.head(&k).await.unwrap().unwrap();
        assert_eq!(found.object_size, made.object_size);
        assert!(!found.etag.unwrap().starts_with(&expected.unwrap()), "another object is taken for ours");
    });
}

/// A local bucket whose requests may take so many seconds.
fn opened(directory: &std::path::Path, timeout: u64) -> Bucket {
    let limits = RequestLimits { timeout: Duration::from_secs(timeout), ..RequestLimits::default() };
    let url = format!("file://{}", directory.display());
    Bucket::open_with("b", &url, &limits, &BTreeMap::new()).unwrap()
}

/// The names in a directory of a bucket's own files.
fn own_files(directory: &std::path::Path, name: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory.join(".freightfs").join(name)).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_lock_that_another_process_keeps_is_named_and_holds_up_only_those_who_need_it() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = opened(directory.path(), 1);
    runtime().block_on(async {
        let (k, text) = (key("new/k"), Bytes::from_static(b"text"));
        bucket.put(&key("old"), text.clone(), &Replaces::Anything).await.unwrap();
        let old = bucket.head(&key("old")).await.unwrap().unwrap();
        let upload = bucket.start_upload(&k, 5 << 20, &Tags::new()).await.unwrap();
        let part = bucket.put_part(&k, &upload, 0, 0, text.clone()).await.unwrap();
        let lock = std::fs::File::open(directory.path().join(".freightfs/lock")).unwrap();
        let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap();
        let replaces = Replaces::Nothing;
        let (put, made, copied, removed, list, read) = tokio::join!(
            bucket.put(&k, text.clone(), &replaces),
            bucket.complete_upload(&k, &upload, vec![part.clone()], 4, &replaces, None),
            bucket.copy(&old, &k, &replaces),
            bucket.delete(&old.key),
            bucket.list(None),
            bucket.read(&old.key, 0..4, None),
        );
        assert_eq!((list.unwrap().objects.len(), read.unwrap()), (1, text.clone()));
        for refused in [put.map(drop), made.map(drop), copied.map(drop), removed] {
            let error = refused.unwrap_err();
            assert_eq!((error.kind(), error.is_transient()), (ErrorKind::TimedOut, true), "{error}");
            assert!(error.report().contains("/.freightfs/lock"), "{}", error.report());
        }
        drop(lock);
        bucket.complete_upload(&k, &upload, vec![part], 4, &replaces, None).await.unwrap();
        assert_eq!(own_files(directory.path(), "uploads"), Vec::<String>::new());
    });
}

/// All of it in one process: its id says nothing about who is alive.
#[test]
fn what_the_dead_left_in_a_local_bucket_is_removed_and_nothing_that_somebody_may_need() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let uploads = || own_files(path, "uploads");
    let control = |name: &str| path.join(".freightfs").join(name);
    let age = |name: &str, days: u64| {
        let file = std::fs::File::options().write(true).open(control(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(days * 24 * 3600)).unwrap();
    };
    runtime().block_on(async {
        let start =
            async |bucket: &Bucket| bucket.start_upload(&key("k"), 5 << 20, &Tags::new()).await.unwrap();
        let (one, other) = (opened(path, 10), opened(path, 10));
        one.sweep("state 1", Vec::new()).await.unwrap();
        other.sweep("state 2", Vec::new()).await.unwrap();
        let (kept, lost, foreign) = (start(&one).await, start(&one).await, start(&other).await);
        let put = format!("{}-put-0123456789abcdef-5", kept.split('-').next().unwrap());
        std::fs::write(control(&format!("uploads/{put}")), "bytes").unwrap();
        let mut all = vec![kept.clone(), lost.clone(), foreign.clone(), put.clone()];
        all.sort();
        // Both are alive.
        other.sweep("state 2", Vec::new()).await.unwrap();
        assert_eq!(uploads(), all);
        drop(one);
        // A mount with the first one's state directory may continue its uploads, but no put.
        other.sweep("state 2", Vec::new()).await.unwrap();
        all.retain(|name| *name != put);
        assert_eq!(uploads(), all);
        let one = opened(path, 10);
        one.sweep("state 1", vec![kept.clone()]).await.unwrap();
        all.retain(|name| *name != lost);
        assert_eq!(uploads(), all);
        // What is named neither here nor anywhere else has an end too.
        age(&format!("uploads/{kept}"), 8);
        age(&format!("uploads/{foreign}"), 8);
        other.sweep("state 2", Vec::new()).await.unwrap();
        assert_eq!(uploads(), [foreign.as_str()]);
        assert_eq!(own_files(path, "locks").len(), 2, "the lock of the dead one stays");
        drop(other);
        // Another kernel's lock says nothing.
        let lock = control(&format!("locks/{}", foreign.split('-').next().unwrap()));
        std::fs::write(&lock, "another boot\nstate 1\n").unwrap();
        age(&format!("uploads/{foreign}"), 6);
        one.sweep("state 1", Vec::new()).await.unwrap();
        assert_eq!(uploads(), [foreign.as_str()]);
        age(&format!("uploads/{foreign}"), 8);
        one.sweep("state 1", Vec::new()).await.unwrap();
        assert_eq!((uploads().len(), lock.exists()), (0, true), "somebody may hold it elsewhere");
        age(&format!("locks/{}", foreign.split('-').next().unwrap()), 8);
        // No state directory is that of all those that are not known.
        drop(opened(path, 10).start_upload(&key("k"), 5 << 20, &Tags::new()).await.unwrap());
        one.sweep("", Vec::new()).await.unwrap();
        assert_eq!(uploads().len(), 1);
        age(&format!("uploads/{}", uploads()[0]), 8);
        one.sweep("state 1", Vec::new()).await.unwrap();
        assert_eq!((uploads().len(), own_files(path, "locks").len()), (0, 1));
    });
}

#[test]
fn a_probe_that_fails_leaves_nothing() {
    use object_store::ObjectStore;
    let mut failed = 0;
    for failing in 1.. {
        let store = FaultyStore::new(failing);
        let (objects, uploads) = (Arc::<FaultyStore>::clone(&store), Arc::<FaultyStore>::clone(&store));
        let bucket = Bucket::with_stores("b", "memory://b", objects, uploads);
        let (probed, left) = runtime().block_on(async {
            let probed = bucket.probe().await;
            (probed, store.list_with_delimiter(Some(&".freightfs".into())).await.unwrap().objects)
        });
        assert!(left.is_empty(), "request {failing}: {left:?}");
        assert_eq!(store.open_uploads(), 0, "request {failing}");
        failed += usize::from(probed.is_err());
        if store.requests() < failing {
            break;
        }
    }
    assert!(failed > 3, "{failed}");
}

#[test]
fn a_store_in_memory_conforms() {
    let store = FaultyStore::new(0);
    let (objects, uploads) = (Arc::<FaultyStore>::clone(&store), Arc::<FaultyStore>::clone(&store));
    let bucket = Bucket::with_stores("b", "memory://b", objects, uploads);
    runtime().block_on(conformance(&bucket));
    runtime().block_on(conditions(&bucket));
}

fn in_memory() -> (Arc<FaultyStore>, Bucket) {
    let store = FaultyStore::new(0);
    let (objects, uploads) = (Arc::<FaultyStore>::clone(&store), Arc::<FaultyStore>::clone(&store));
    (store, Bucket::with_stores("b", "memory://b", objects, uploads))
}

#[test]
fn an_object_that_was_replaced_at_once_is_not_taken_for_ours() {
    let (store, bucket) = in_memory();
    runtime().block_on(async {
        bucket.probe().await.unwrap();
        let k = key("k");
        let (tags, content) = (Tags::new(), Bytes::from_static(b"ours"));
        store.replace_next(b"them");
        let put = bucket.put_tagged(&k, content.clone(), &tags, &Replaces::Anything).await;
        let upload = bucket.start_upload(&k, 5 << 20, &tags).await.unwrap();
        let part = bucket.put_part(&k, &upload, 0, 0, content.clone()).await.unwrap();
        store.replace_next(b"they");
        let made = bucket.complete_upload(&k, &upload, vec![part], 4, &Replaces::Anything, None).await;
        for refused in [put, made] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Conflict);
        }
        assert_eq!(bucket.read(&k, 0..4, None).await.unwrap(), "they");
        bucket.put_tagged(&k, content, &tags, &Replaces::Anything).await.unwrap();
    });
}

/// A copy has another tag than an object that was made of parts: only its bytes tell.
#[test]
fn a_copy_whose_answer_was_lost_is_no_conflict() {
    let (store, bucket) = in_memory();
    runtime().block_on(async {
        bucket.probe().await.unwrap();
        let content = Bytes::from(Random(3).bytes((16 << 20) + 5));
        let size = content.len() as u64;
        let (from, to) = (key("from"), key("to"));
        bucket.put(&from, content.clone(), &Replaces::Anything).await.unwrap();
        let source = bucket.head(&from).await.unwrap().unwrap();
        store.lose_answer();
        assert!(bucket.copy(&source, &to, &Replaces::Nothing).await.unwrap_err().is_transient());
        let copied = bucket.copy(&source, &to, &Replaces::Nothing).await.unwrap();
        assert_ne!(copied.etag, source.etag);
        assert!(bucket.read(&to, 0..size, copied.etag.as_deref()).await.unwrap() == content);
        let mut other = content.to_vec();
        other[16 << 20] ^= 1;
        bucket.put(&to, other.into(), &Replaces::Anything).await.unwrap();
        let refused = bucket.copy(&source, &to, &Replaces::Nothing).await;
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Conflict);
    });
}

/// Runs the suite in two places of a bucket at a server that scripts/test started.
fn conforms_at(scheme: &str, name: &str, client: &[(&str, &str)]) -> Bucket {
    let client: BTreeMap<_, _> =
        client.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
    let open = |prefix: &str| {
        let url = format!("{scheme}://{name}{prefix}");
        Bucket::open_with("b", &url, &RequestLimits::default(), &client).unwrap()
    };
    runtime().block_on(open("").probe()).unwrap();
    let bucket = open("/a prefix");
    runtime().block_on(conformance(&bucket));
    bucket
}

fn s3_conforms_at(variable: &str) {
    let Ok(endpoint) = std::env::var(variable) else {
        return skip(&format!(
            "the stores' suite against S3: {variable} is not set; scripts/test starts a server"
        ));
    };
    let name = format!("conformance-{}", std::process::id());
    succeed(command("aws").args(["--endpoint-url", &endpoint, "s3api", "create-bucket", "--bucket", &name]));
    let bucket = conforms_at("s3", &name, &[("endpoint", &endpoint), ("allow_http", "true")]);
    runtime().block_on(conditions(&bucket));
}

#[test]
fn seaweedfs_conforms() {
    s3_conforms_at("FREIGHTFS_TEST_S3");
}

/// Bodies are signed where neither TLS nor the machine protects them: here by an address that is not seen to be this machine's.
#[test]
fn seaweedfs_conforms_with_signed_bodies() {
    let Ok(endpoint) = std::env::var("FREIGHTFS_TEST_S3") else {
        return skip("signed bodies: FREIGHTFS_TEST_S3 is not set; scripts/test starts a server");
    };
    let name = format!("signed-{}", std::process::id());
    succeed(command("aws").args(["--endpoint-url", &endpoint, "s3api", "create-bucket", "--bucket", &name]));
    let endpoint = endpoint.replace("127.0.0.1", "[::ffff:127.0.0.1]");
    let bucket = conforms_at("s3", &name, &[("endpoint", &endpoint), ("allow_http", "true")]);
    runtime().block_on(conditions(&bucket));
    assert_eq!(bucket.limitation(), None);
}

#[test]
fn moto_conforms() {
    s3_conforms_at("FREIGHTFS_TEST_MOTO");
}

#[test]
fn azurite_conforms() {
    let Some(endpoint) = azure::endpoint() else { return };
    let name = format!("conformance-{}", std::process::id());
    azure::make_container(&endpoint, &name);
    let client = [
        ("endpoint", endpoint.as_str()),
        ("allow_http", "true"),
        ("account_name", azure::ACCOUNT),
        ("access_key", azure::KEY),
    ];
    let bucket = conforms_at("az", &name, &client);
    runtime().block_on(conditions(&bucket));
    println!("limitation: {:?}", bucket.limitation());
}

#[test]
fn links_do_not_lead_out_of_a_local_bucket() {
    let (directory, bucket) = local();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let link = |to: &std::path::Path, name: &str| {
        std::os::unix::fs::symlink(to, directory.path().join(name)).unwrap()
    };
    link(&outside.path().join("secret"), "file");
    link(outside.path(), "dir");
    link(std::path::Path::new("../../../../../../etc/passwd"), "up");
    std::fs::write(directory.path().join("inside"), "inside").unwrap();
    link(std::path::Path::new("inside"), "good");
    runtime().block_on(async {
        for name in ["file", "dir/secret", "up"] {
            let error = bucket.read(&key(name), 0..1, None).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{name}: {}", error.report());
            assert!(bucket.head(&key(name)).await.is_err());
        }
        assert!(bucket.put(&key("dir/new"), Bytes::from_static(b"x"), &Replaces::Anything).await.is_err());
        assert_eq!(bucket.read(&key("good"), 0..6, None).await.unwrap(), "inside");
        let listing = bucket.list(None).await.unwrap();
        let names: Vec<_> = listing.objects.iter().map(|o| o.key.as_str()).collect();
        assert_eq!(names, ["good", "inside"]);
    });
    assert!(!outside.path().join("new").exists());
}

#[test]
fn urls_that_are_wrong_are_refused_with_their_reason() {
    for (url, kind, word) in [
        ("nonsense", ErrorKind::Malformed, "URL"),
        ("ftp://x", ErrorKind::Malformed, "ftp"),
        ("s3://", ErrorKind::Malformed, "bucket"),
        ("s3://key:secret@b", ErrorKind::Malformed, "credentials"),
        ("s3://b/a//b", ErrorKind::Malformed, "prefix"),
        ("s3://b?x=y", ErrorKind::Malformed, "?"),
        ("file:///nowhere/at/all", ErrorKind::NotFound, "/nowhere/at/all"),
        ("file:///etc/passwd", ErrorKind::NotDirectory, "/etc/passwd"),
    ] {
        let error = Bucket::open("b", url).err().unwrap();
        assert_eq!(error.kind(), kind, "{url}: {error}");
        assert!(
            error.report().contains(word) && !error.report().contains("secret"),
            "{url}: {}",
            error.report()
        );
    }
}

#[test]
fn parts_keep_objects_within_the_stores_limit() {
    let (_directory, bucket) = local();
    for size in [0, 1, 8 << 20, 80_000 << 20, (80_000 << 20) + 1, 2 << 40, 48 << 40] {
        let part = bucket.part_size_for(size).unwrap();
        assert!(part >= 8 << 20 && size.div_ceil(part) <= 10_000, "{size}: {part}");
    }
    assert_eq!(bucket.part_size_for(u64::MAX).unwrap_err().kind(), ErrorKind::TooLarge);
}

type Decide = Box<dyn FnMut(&Request) -> Fate + Send>;

/// A bucket at a server, and the same through a proxy that lets chosen requests fail.
struct Behind {
    direct: Bucket,
    bucket: Bucket,
    endpoint: String,
    name: String,
    /// What becomes of each request from now on.
    fate: Arc<Mutex<Decide>>,
}

impl Behind {
    /// At each S3 server that scripts/test started, probed; each of them has abilities of its own.
    fn everywhere(name: &str) -> Vec<Self> {
        let server = |variable| Some((variable, std::env::var(variable).ok()?));
        let servers: Vec<_> =
            ["FREIGHTFS_TEST_S3", "FREIGHTFS_TEST_MOTO"].into_iter().filter_map(server).collect();
        if servers.is_empty() {
            skip("stores behind a proxy: FREIGHTFS_TEST_S3 is not set; scripts/test starts a server");
        }
        servers.into_iter().map(|(variable, endpoint)| Self::at(&endpoint, name, variable)).collect()
    }

    fn at(endpoint: &str, name: &str, variable: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        println!("{variable}: {endpoint}");
        succeed(command("aws").args([
            "--endpoint-url",
            endpoint,
            "s3api",
            "create-bucket",
            "--bucket",
            &name,
        ]));
        let fate: Arc<Mutex<Decide>> = Arc::new(Mutex::new(Box::new(|_: &Request| Fate::Forward)));
        let shared = Arc::clone(&fate);
        let proxy = Proxy::start(endpoint, move |request| (shared.lock().unwrap())(request));
        let open = |endpoint: &str| {
            let client = BTreeMap::from(
                [("endpoint", endpoint), ("allow_http", "true")].map(|(k, v)| (k.to_owned(), v.into())),
            );
            let limits = RequestLimits { timeout: Duration::from_secs(2), ..RequestLimits::default() };
            Bucket::open_with("b", &format!("s3://{name}"), &limits, &client).unwrap()
        };
        let (direct, bucket) = (open(endpoint), open(&proxy.url()));
        Self { direct, bucket, endpoint: endpoint.to_owned(), name, fate }
    }

    fn each(&self, decide: impl FnMut(&Request) -> Fate + Send + 'static) {
        *self.fate.lock().unwrap() = Box::new(decide);
    }

    /// The next `count` requests that `is` chooses get this fate.
    fn next(&self, count: usize, fate: Fate, is: impl Fn(&Request) -> bool + Send + 'static) {
        let mut left = count;
        self.each(move |request| {
            let chosen = left > 0 && is(request);
            left -= usize::from(chosen);
            if chosen { fate } else { Fate::Forward }
        });
    }

    async fn read(&self, k: &ObjectKey) -> Bytes {
        let meta = self.direct.head(k).await.unwrap().unwrap();
        self.direct.read(k, 0..meta.object_size, None).await.unwrap()
    }

    /// Makes an object at once, as small ones are made.
    async fn put_at_once(
        &self,
        k: &ObjectKey,
        content: &Bytes,
    ) -> freightfs::error::Result<freightfs::bucket::ObjectMeta> {
        let (tags, replaces) = (Tags::new(), Replaces::Anything);
        if !self.bucket.puts_by_upload(content.len() as u64) {
            return self.bucket.put_tagged(k, content.clone(), &tags, &replaces).await;
        }
        let upload = self.bucket.start_upload(k, 5 << 20, &tags).await?;
        let made = self.bucket.put_by_upload(k, &upload, content.clone(), &replaces).await;
        if made.is_err() {
            self.bucket.abort_upload(k, &upload).await?;
        }
        made
    }

    /// Makes an object of two parts.
    async fn upload(
        &self,
        k: &ObjectKey,
        content: &Bytes,
        replaces: &Replaces,
    ) -> freightfs::error::Result<()> {
        let half = 5 << 20;
        let upload = self.bucket.start_upload(k, half as u64, &Tags::new()).await?;
        let made = async {
            let mut parts = Vec::new();
            for (index, part) in [content.slice(..half), content.slice(half..)].into_iter().enumerate() {
                parts.push(self.bucket.put_part(k, &upload, index, (index * half) as u64, part).await?);
            }
            self.bucket
                .complete_upload(k, &upload, parts, content.len() as u64, replaces, None)
                .await
                .map(drop)
        };
        let made = made.await;
        if made.is_err() {
            self.bucket.abort_upload(k, &upload).await?;
        }
        made
    }
}

#[test]
fn a_damaged_part_is_sent_again_and_never_completed() {
    let content = Bytes::from(Random(7).bytes(6 << 20));
    for behind in Behind::everywhere("damaged-part") {
        runtime().block_on(async {
            behind.bucket.probe().await.unwrap();
            let k = key("k");
            behind.bucket.put(&k, Bytes::from_static(b"old"), &Replaces::Anything).await.unwrap();
            behind.next(usize::MAX, Fate::DamageRequest, |request| request.target.contains("partNumber=2"));
            let error = behind.upload(&k, &content, &Replaces::Anything).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{}", error.report());
            assert!(error.is_transient());
            assert_eq!(behind.read(&k).await, "old");
            behind.next(2, Fate::DamageRequest, |request| request.target.contains("partNumber=2"));
            behind.upload(&k, &content, &Replaces::Anything).await.unwrap();
            assert!(behind.read(&k).await == content);
            // An upload of a version that did not announce the checksum: the store takes no part that has one.
            if behind.bucket.limitation().is_none() {
                behind.next(1, Fate::Answer(400), Request::is_part);
                behind.upload(&k, &content, &Replaces::Anything).await.unwrap();
                let upload = behind.bucket.start_upload(&k, 8 << 20, &Tags::new()).await.unwrap();
                behind.next(1, Fate::Answer(400), |request| request.method == "POST");
                let whole = Replaces::Anything;
                behind.bucket.put_by_upload(&k, &upload, content.slice(1..), &whole).await.unwrap();
                assert!(behind.read(&k).await == content.slice(1..));
            }
        });
    }
}

#[test]
fn an_object_that_arrives_damaged_does_not_take_the_place_of_the_old_one() {
    let content = Bytes::from(Random(8).bytes(100_000));
    for behind in Behind::everywhere("damaged-put") {
        runtime().block_on(async {
            behind.bucket.probe().await.unwrap();
            let k = key("k");
            behind.bucket.put(&k, Bytes::from_static(b"old"), &Replaces::Anything).await.unwrap();
            let put = async || behind.put_at_once(&k, &content).await;
            behind.next(usize::MAX, Fate::DamageRequest, |request| request.method == "PUT");
            let error = put().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{}", error.report());
            assert_eq!(behind.read(&k).await, "old");
            behind.next(2, Fate::DamageRequest, |request| request.method == "PUT");
            let meta = put().await.unwrap();
            assert_eq!(meta, behind.direct.head(&k).await.unwrap().unwrap());
            assert!(behind.read(&k).await == content);
        });
    }
}

#[test]
fn what_was_written_although_its_answer_was_lost_is_no_conflict() {
    let content = Bytes::from(Random(9).bytes(6 << 20));
    for behind in Behind::everywhere("lost-answer") {
        runtime().block_on(async {
            behind.bucket.probe().await.unwrap();
            let k = key("k");
            for replaced in [None, Some("old")] {
                let replaces = match replaced {
                    None => Replaces::Nothing,
                    Some(old) => {
                        let old = Bytes::from_static(old.as_bytes());
                        Replaces::Tag(behind.direct.put(&k, old, &Replaces::Anything).await.unwrap().unwrap())
                    }
                };
                let is_completion =
                    |request: &Request| request.method == "POST" && request.target.contains("uploadId=");
                behind.next(1, Fate::CutAnswer, is_completion);
                behind.upload(&k, &content, &replaces).await.unwrap();
                assert!(behind.read(&k).await == content);
            }
            let old = behind.direct.head(&k).await.unwrap().unwrap();
            let replaces = Replaces::Tag(old.etag.unwrap());
            let put = async || behind.bucket.put(&k, content.slice(..1000), &replaces).await;
            behind.next(1, Fate::CutAnswer, |request| request.method == "PUT");
            // The client does not know whether it may ask again; a second attempt finds that it is done.
            if put().await.is_err() {
                put().await.unwrap();
            }
            assert_eq!(behind.read(&k).await, content.slice(..1000));
            let error = behind.bucket.put(&k, content.slice(..999), &replaces).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict);
        });
    }
}

#[test]
fn keys_that_cannot_be_paths_do_not_hide_the_others() {
    for behind in Behind::everywhere("odd-keys") {
        let long = "x".repeat(300);
        let keys = ["d/good", "d//empty", "d/../up", "/top", "d/x\u{1}y", "d//", "top", &format!("d/{long}")];
        // object_store's own client cannot write these; a server may refuse some.
        let program = format!(
            "import boto3\nclient = boto3.client('s3', endpoint_url={:?})\nfor key in {keys:?}:\n try:\n  \
             client.put_object(Bucket={:?}, Key=key, Body=b'x')\n except Exception as error:\n  print(key, error)\n",
            behind.endpoint, behind.name
        );
        println!("{}", succeed(command("python3").args(["-c", &program.replace("\\u{1}", "\\x01")])));
        runtime().block_on(async {
            let names = |objects: Vec<freightfs::bucket::ObjectMeta>| {
                objects.into_iter().map(|meta| meta.key.to_string()).collect::<Vec<_>>()
            };
            let top = behind.bucket.list(None).await.unwrap();
            assert_eq!((names(top.objects), top.prefixes), (vec!["top".to_owned()], vec!["d".to_owned()]));
            let below = names(behind.bucket.list(Some(&key("d"))).await.unwrap().objects);
            assert!(below.contains(&"d/good".to_owned()), "{below:?}");
            let all = names(behind.bucket.list_all(100).await.unwrap().unwrap());
            assert!(all.contains(&"d/good".to_owned()) && all.contains(&"top".to_owned()), "{all:?}");
            assert!(behind.bucket.has_prefix(&key("d")).await.unwrap());
        });
    }
}

#[test]
fn credentials_that_may_only_read_make_a_bucket_read_only() {
    for behind in Behind::everywhere("read-only") {
        runtime().block_on(async {
            let k = key("k");
            behind.direct.put(&k, Bytes::from_static(b"theirs"), &Replaces::Anything).await.unwrap();
            behind.each(|request| match request.method.as_str() {
                "PUT" | "POST" | "DELETE" => Fate::Answer(403),
                _ => Fate::Forward,
            });
            behind.bucket.probe().await.unwrap();
            assert!(behind.bucket.limitation().unwrap().starts_with("read-only"));
            assert_eq!(behind.bucket.read(&k, 0..6, None).await.unwrap(), "theirs");
            assert_eq!(behind.bucket.list(None).await.unwrap().objects.len(), 1);
            let put = behind.bucket.put(&k, Bytes::new(), &Replaces::Anything).await.map(drop);
            let start = behind.bucket.start_upload(&k, 5 << 20, &Tags::new()).await.map(drop);
            let meta = behind.bucket.head(&k).await.unwrap().unwrap();
            let copy = behind.bucket.copy(&meta, &key("l"), &Replaces::Anything).await.map(drop);
            for refused in [put, start, copy, behind.bucket.delete(&k).await] {
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
            }
        });
    }
}

#[test]
fn a_listing_does_not_wait_for_parts_and_a_store_that_is_silent_is_given_up() {
    for behind in Behind::everywhere("lanes").into_iter().take(1) {
        runtime().block_on(async {
            behind.bucket.probe().await.unwrap();
            let k = key("k");
            let upload = behind.bucket.start_upload(&k, 5 << 20, &Tags::new()).await.unwrap();
            let arrived = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&arrived);
            behind.each(move |request| {
                if request.is_part() {
                    counted.fetch_add(1, Ordering::SeqCst);
                    return Fate::Hang;
                }
                Fate::Forward
            });
            let parts: Vec<_> = (0..100)
                .map(|index| {
                    let (bucket, k, upload) = (behind.bucket.clone(), k.clone(), upload.clone());
                    tokio::spawn(async move {
                        bucket.put_part(&k, &upload, index, index as u64, Bytes::from_static(b"x")).await
                    })
                })
                .collect();
            while arrived.load(Ordering::SeqCst) == 0 {
                tokio::task::yield_now().await;
            }
            behind.bucket.list(None).await.unwrap();
            assert_eq!(behind.bucket.head(&k).await.unwrap(), None);
            // Those that hang have been tried once, or they are not sent yet.
            assert!(arrived.load(Ordering::SeqCst) < 100, "they are sent all at once");
            parts.iter().for_each(|part| part.abort());
            behind.each(|_| Fate::Hang);
            let (list, head, delete, read) = tokio::join!(
                behind.bucket.list(None),
                behind.bucket.head(&k),
                behind.bucket.delete(&k),
                behind.bucket.read(&k, 0..1, None)
            );
            let errors = [list.unwrap_err(), head.unwrap_err(), delete.unwrap_err(), read.unwrap_err()];
            errors.iter().for_each(|error| assert!(error.is_transient(), "{}", error.report()));
        });
    }
}

#[test]
fn each_store_says_what_it_cannot_do() {
    let expected =
        [("FREIGHTFS_TEST_S3", None), ("FREIGHTFS_TEST_MOTO", Some("does not refuse every write"))];
    for behind in Behind::everywhere("abilities") {
        runtime().block_on(behind.bucket.probe()).unwrap();
        let (_, limitation) =
            expected.iter().find(|(v, _)| std::env::var(v).is_ok_and(|e| e == behind.endpoint)).unwrap();
        match (limitation, behind.bucket.limitation()) {
            (None, None) => {}
            (Some(words), Some(found)) => assert!(found.contains(words), "{found}"),
            (expected, found) => panic!("{expected:?}: {found:?}"),
        }
    }
}

fn crc64(bytes: &[u8]) -> u64 {
    Crc64::of(bytes).value()
}

/// Copied parts beside one that was sent, and everything that is not copied.
async fn copied_parts(bucket: &Bucket) {
    let (from, k) = (key("from a&b/ü"), key("copied"));
    let mut content = Random(21).bytes(6 << 20);
    content[2 << 20..3 << 20].fill(0);
    let (content, sent) = (Bytes::from(content), Bytes::from(Random(22).bytes(5 << 20)));
    let etag = bucket.put(&from, content.clone(), &Replaces::Anything).await.unwrap().unwrap();
    let upload = bucket.start_upload(&k, 8 << 20, &Tags::new()).await.unwrap();
    let offsets = [0, 5 << 20, (5 << 20) + sent.len() as u64];
    let copy = async |index: usize, key: &ObjectKey, etag: &str, range: std::ops::Range<u64>, crc64| {
        let source = CopySource { key: key.clone(), etag: etag.to_owned(), range };
        bucket.copy_part(&k, &upload, index, offsets[index], &source, crc64).await
    };
    let slice = |range: &std::ops::Range<u64>| content.slice(range.start as usize..range.end as usize);
    let (first, last) = (4099..4099 + (5 << 20), 5000..5301);
    let other = "\"00000000000000000000000000000000\"";
    for (key, etag, range, crc64, kind) in [
        (&from, other, last.clone(), 0, ErrorKind::Conflict),
        (&key("nothing"), &etag, last.clone(), 0, ErrorKind::Conflict),
        (&from, &etag, (6 << 20) - 5..(6 << 20) + 1, 0, ErrorKind::Conflict),
        (&from, &etag, 9 << 20..10 << 20, 0, ErrorKind::Conflict),
        (&from, &etag, last.clone(), crc64(&slice(&first)), ErrorKind::Damaged),
    ] {
        let error = copy(2, key, etag, range.clone(), crc64).await.unwrap_err();
        assert_eq!((error.kind(), error.is_transient()), (kind, false), "{range:?}: {}", error.report());
        assert!(error.to_string().starts_with(&bucket.url_of(&k)), "{error}");
    }
    let one = copy(0, &from, &etag, first.clone(), crc64(&slice(&first))).await.unwrap();
    let two = bucket.put_part(&k, &upload, 1, offsets[1], sent.clone()).await.unwrap();
    let three = copy(2, &from, &etag, last.clone(), crc64(&slice(&last))).await.unwrap();
    let whole = [slice(&first), sent, slice(&last)].concat();
    let (parts, size) = (vec![one, two, three], whole.len() as u64);
    let crc64 = crc64(&whole);
    if bucket.url().starts_with("s3:") {
        let parts = parts.clone();
        let wrong =
            bucket.complete_upload(&k, &upload, parts, size, &Replaces::Nothing, Some(crc64 ^ 1)).await;
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Damaged);
    }
    let made =
        bucket.complete_upload(&k, &upload, parts, size, &Replaces::Nothing, Some(crc64)).await.unwrap();
    assert!(bucket.read(&k, 0..size, made.etag.as_deref()).await.unwrap() == whole);
    let gone = bucket.start_upload(&k, 8 << 20, &Tags::new()).await.unwrap();
    bucket.abort_upload(&k, &gone).await.unwrap();
    let source = CopySource { key: from.clone(), etag: etag.clone(), range: last };
    let error = bucket.copy_part(&k, &gone, 0, 0, &source, 0).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{}", error.report());
    assert!(bucket.copies_parts());
    bucket.forget_copies("they were wrong");
    assert!(!bucket.copies_parts() && bucket.limitation().unwrap().contains("they were wrong"));
}

#[test]
fn parts_are_copied_byte_for_byte_out_of_what_was_meant_only() {
    let (_directory, bucket) = local();
    runtime().block_on(copied_parts(&bucket));
    for behind in Behind::everywhere("part-copies") {
        runtime().block_on(async {
            behind.direct.probe().await.unwrap();
            if std::env::var("FREIGHTFS_TEST_S3").is_ok_and(|endpoint| endpoint == behind.endpoint) {
                assert!(behind.direct.copies_parts());
            }
            if behind.direct.copies_parts() {
                copied_parts(&behind.direct).await;
            } else {
                not_copied(&behind.direct).await;
            }
        });
    }
}

/// A store that copies whatever is there, or does not say what that was.
async fn not_copied(bucket: &Bucket) {
    let content = Bytes::from(Random(23).bytes(6 << 20));
    let (from, k) = (key("from"), key("k"));
    let etag = bucket.put(&from, content.clone(), &Replaces::Anything).await.unwrap().unwrap();
    let upload = bucket.start_upload(&k, 8 << 20, &Tags::new()).await.unwrap();
    let source = CopySource { key: from, etag, range: 0..5 << 20 };
    let error = bucket.copy_part(&k, &upload, 0, 0, &source, crc64(&content[..5 << 20])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", error.report());
    bucket.abort_upload(&k, &upload).await.unwrap();
}

#[test]
fn answers_to_copies_that_are_late_lost_damaged_or_errors_make_no_part_that_is_not_right() {
    for behind in Behind::everywhere("copy-answers").into_iter().take(1) {
        runtime().block_on(async {
            behind.bucket.probe().await.unwrap();
            let content = Bytes::from(Random(24).bytes(1 << 20));
            let (from, k) = (key("from"), key("k"));
            let etag = behind.direct.put(&from, content.clone(), &Replaces::Anything).await.unwrap().unwrap();
            let upload = behind.bucket.start_upload(&k, 8 << 20, &Tags::new()).await.unwrap();
            let source = CopySource { key: from, etag, range: 100..100_100 };
            let right = crc64(&content[100..100_100]);
            let copy = async || behind.bucket.copy_part(&k, &upload, 0, 0, &source, right).await;
            let id = copy().await.unwrap();
            let error = |code: &str| {
                Box::leak(format!("<?xml?>\n\n <Error><Code>{code}</Code></Error>").into_boxed_str())
            };
            for passing in [Fate::Answer(503), Fate::CutAnswer, Fate::AnswerWell(error("InternalError"))] {
                behind.next(2, passing, Request::is_part);
                assert_eq!(copy().await.unwrap(), id, "{passing:?}");
            }
            for (answer, kind) in [
                (Fate::AnswerWell(error("AccessDenied")), ErrorKind::PermissionDenied),
                (Fate::AnswerWell(error("PreconditionFailed")), ErrorKind::Conflict),
                (Fate::AnswerWell(error("NoSuchUpload")), ErrorKind::NotFound),
                (Fate::Answer(403), ErrorKind::PermissionDenied),
                (Fate::Answer(400), ErrorKind::UploadFailed),
            ] {
                behind.next(1, answer, Request::is_part);
                let error = copy().await.unwrap_err();
                assert_eq!((error.kind(), error.is_transient()), (kind, false), "{}", error.report());
            }
            // Wherever the bit is: no other part is taken for this one.
            behind.next(1, Fate::DamageAnswer, Request::is_part);
            assert!(copy().await.map_or_else(|error| error.kind() == ErrorKind::Damaged, |copied| copied == id));
            let other = "<CopyPartResult><ETag>x</ETag><ChecksumCRC64NVME>AAAAAAAAAAA=</ChecksumCRC64NVME></CopyPartResult>";
            behind.next(1, Fate::AnswerWell(other), Request::is_part);
            assert_eq!(copy().await.unwrap_err().kind(), ErrorKind::Damaged);
            assert!(behind.bucket.copies_parts());
            behind.next(1, Fate::Answer(501), Request::is_part);
            assert_eq!(copy().await.unwrap_err().kind(), ErrorKind::Unsupported);
            assert!(!behind.bucket.copies_parts());
            behind.direct.abort_upload(&k, &upload).await.unwrap();
        });
    }
}

/// Two hosts that find the first bytes of it, and a bucket where something else has its name.
#[test]
fn the_object_of_zeros_is_made_once_and_what_else_has_its_name_stays() {
    let (directory, bucket) = local();
    let behind = Behind::everywhere("zeros").into_iter().next();
    runtime().block_on(async {
        let Zeros::Whole(source) = bucket.zeros().await.unwrap() else { panic!("a hole does not grow") };
        let again = opened(directory.path(), 10).zeros().await.unwrap();
        assert_eq!(again, Zeros::Whole(source));
        let Some(Behind { direct, bucket: other, .. }) = behind else { return };
        direct.probe().await.unwrap();
        other.probe().await.unwrap();
        let k = Bucket::zeros_key();
        let seed = async |bucket: &Bucket| match bucket.zeros().await.unwrap() {
            Zeros::Seed(seed) => seed,
            whole @ Zeros::Whole(_) => panic!("{whole:?}"),
        };
        let (one, two) = tokio::join!(seed(&direct), seed(&other));
        assert_eq!(one, two);
        let (mut grown, mut late) = (Vec::new(), 0);
        for bucket in [&direct, &other] {
            let upload = bucket.start_upload(&k, 8 << 20, &Tags::new()).await.unwrap();
            match bucket.grow_zeros(&upload, &one).await {
                Ok(source) => grown.push(source),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.report());
                    bucket.abort_upload(&k, &upload).await.unwrap();
                    late += 1;
                }
            }
        }
        assert_eq!((grown.len(), late), (1, 1));
        for bucket in [&direct, &other] {
            assert_eq!(bucket.zeros().await.unwrap(), Zeros::Whole(grown[0].clone()));
        }
        let size = grown[0].range.end;
        assert!(direct.read(&k, 0..size, Some(&grown[0].etag)).await.unwrap().iter().all(|&byte| byte == 0));
        let wrong = Bytes::from(Random(25).bytes(8 << 20));
        let etag = direct.put_control("zeros", wrong, &Replaces::Anything).await.unwrap();
        // Out of the one that it knows nothing comes any more.
        let upload = direct.start_upload(&key("k"), 8 << 20, &Tags::new()).await.unwrap();
        let gone = direct.copy_part(&key("k"), &upload, 0, 0, &grown[0], 0).await.unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::Conflict, "{}", gone.report());
        direct.abort_upload(&key("k"), &upload).await.unwrap();
        assert_eq!(direct.zeros().await.unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(direct.read_control("zeros").await.unwrap().unwrap().etag, etag);
    });
}
