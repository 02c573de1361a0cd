//! One suite for every store: the local directory, S3 (SeaweedFS, moto), Azure Blob Storage (Azurite), and the store in memory of the fault tests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use freightfs::bucket::{Bucket, ObjectFile, ObjectKey, Replaces, RequestLimits, Tags};
use freightfs::error::ErrorKind;
use freightfs::units::FileOffset;
use freightfs::vfile::VirtualFile;
use support::faulty::FaultyStore;
use support::images::Random;
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
        let part = bucket.put_part(&k, &id, 0, text(content)).await.unwrap();
        let made = bucket.complete_upload(&k, &id, vec![part], content.len() as u64, replaces).await;
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
    bucket.copy(&a, &key("deep/copy")).await.unwrap();
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
            bucket.put_part(&k, &upload, index, bytes.slice(range))
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
            .complete_upload(&k, &upload, vec![first, middle, last], size, &Replaces::Anything)
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

#[test]
fn a_store_in_memory_conforms() {
    let store = FaultyStore::new(0);
    let (objects, uploads) = (Arc::<FaultyStore>::clone(&store), Arc::<FaultyStore>::clone(&store));
    let bucket = Bucket::with_stores("b", "memory://b", objects, uploads);
    runtime().block_on(conformance(&bucket));
    runtime().block_on(conditions(&bucket));
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
