//! Buckets on a real S3 server: SeaweedFS, which scripts/test starts.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;

use support::images::{self, Random};
use support::proxy::{Fate, Proxy};
use support::s3::{aws, endpoint, uploads, world};
use support::{assert_same, can_mount, command, fail, run, sh, sha256, succeed};

#[test]
fn an_export_to_s3_is_byte_identical_by_the_real_client() {
    let (Some(endpoint), true) = (endpoint(), can_mount()) else { return };
    let bucket = format!("exports-{}", std::process::id());
    let world = world(&endpoint, &bucket);
    let raw = images::ext4(&world.catalog());
    images::qcow2(&raw, "web.qcow2", &["-c"]);
    let url = format!("b=s3://{bucket}/some/prefix");
    let mount = world.mount_exactly(&["--bucket", &url]);
    for key in ["web.qcow2", "deep/er/web.qcow2"] {
        if let Some(parent) = Path::new(key).parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(mount.key(&parent.display().to_string())).unwrap();
        }
        let before = mount.metric("freightfs_fuse_requests_total{op=\"read\"}");
        mount.cp(&mount.path("images/web/web.qcow2"), key);
        assert_eq!(mount.metric("freightfs_fuse_requests_total{op=\"read\"}"), before, "cp caused reads");
        assert_eq!(mount.metric("freightfs_fuse_requests_total{op=\"write\"}"), 0, "cp caused writes");
        let status = mount.wait(key);
        assert_eq!(status["status"], "SUCCESS", "{status}");
        assert!(
            status["etag"].is_string() && status["url"] == format!("s3://{bucket}/some/prefix/{key}"),
            "{status}"
        );
        let expected = world.out("expected.qcow2");
        std::fs::copy(mount.path("images/web/web.qcow2"), &expected).unwrap();
        let fetched = world.out("fetched.qcow2");
        let object = format!("s3://{bucket}/some/prefix/{key}");
        succeed(aws(&endpoint, &["s3", "cp", "--quiet", &object]).arg(&fetched));
        assert_same(&fetched, &expected);
        assert_eq!(status["sha256"], sha256(&fetched));
        assert_same(&mount.key(key), &expected);
        let sums = format!(
            "cd {} && sha256sum -c web.qcow2.sha256 && md5sum -c web.qcow2.md5",
            mount.key(key).parent().unwrap().display()
        );
        support::sh(&sums);
    }
    assert!(uploads(&endpoint, &bucket).trim() == "None", "an upload is left");
    mount.unmount();
}

#[test]
fn objects_of_others_and_odd_names_are_the_same_keys() {
    let (Some(endpoint), true) = (endpoint(), can_mount()) else { return };
    let bucket = format!("names-{}", std::process::id());
    let world = world(&endpoint, &bucket);
    let mount = world.mount_exactly(&["--bucket", &format!("b=s3://{bucket}")]);
    for name in ["plain", "a b", "x#1", "ü~%25", "(par)[en]{s}", "plus+and&amp"] {
        let file = world.out("content");
        std::fs::write(&file, name).unwrap();
        succeed(
            aws(
                &endpoint,
                &["s3api", "put-object", "--bucket", &bucket, "--key", &format!("theirs/{name}"), "--body"],
            )
            .arg(&file),
        );
        assert_eq!(std::fs::read_to_string(mount.key(&format!("theirs/{name}"))).unwrap(), name);
        std::fs::write(mount.key(name), name).unwrap();
        let got = world.out("got");
        succeed(aws(&endpoint, &["s3api", "get-object", "--bucket", &bucket, "--key", name]).arg(&got));
        assert_eq!(std::fs::read_to_string(&got).unwrap(), name);
    }
    let listed = std::fs::read_dir(mount.key("theirs")).unwrap().count();
    assert_eq!(listed, 6);
    mount.unmount();
}

#[test]
fn large_objects_of_others_read_back_by_ranges() {
    use std::os::unix::fs::FileExt;
    let (Some(endpoint), true) = (endpoint(), can_mount()) else { return };
    let bucket = format!("reads-{}", std::process::id());
    let world = world(&endpoint, &bucket);
    let file = world.out("large");
    let content = Random(3).bytes(60 << 20);
    std::fs::write(&file, &content).unwrap();
    succeed(aws(&endpoint, &["s3", "cp", "--quiet"]).arg(&file).arg(format!("s3://{bucket}/large")));
    let mount = world.mount_exactly(&["--bucket", &format!("b=s3://{bucket}"), "--cache", "32M"]);
    assert_same(&mount.key("large"), &file);
    let object = std::fs::File::open(mount.key("large")).unwrap();
    let mut random = Random(4);
    for _ in 0..50 {
        let at = random.below(content.len() as u64 - 1000);
        let mut bytes = [0; 1000];
        object.read_exact_at(&mut bytes, at).unwrap();
        assert!(bytes == content[at as usize..at as usize + 1000]);
    }
    // Replaced by somebody else under the open file: an error, never mixed bytes.
    std::fs::write(&file, Random(5).bytes(30 << 20)).unwrap();
    succeed(aws(&endpoint, &["s3", "cp", "--quiet"]).arg(&file).arg(format!("s3://{bucket}/large")));
    let far = std::fs::File::open(mount.key("large"));
    drop(far);
    let mut bytes = vec![0; 1000];
    let mut errors = 0;
    for at in (0..15).map(|block| block * (4 << 20)) {
        match object.read_exact_at(&mut bytes, at as u64) {
            Ok(()) => assert!(bytes == content[at..at + 1000], "bytes of the other object"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(nix::libc::ESTALE));
                errors += 1;
            }
        }
    }
    assert!(errors >= 7, "32 of 60 blocks may be kept, and {} of 15 were", 15 - errors);
    drop(object);
    mount.unmount();
}

#[test]
fn wrong_buckets_and_credentials_fail_the_mount() {
    let (Some(endpoint), true) = (endpoint(), can_mount()) else { return };
    let bucket = format!("denied-{}", std::process::id());
    let world = world(&endpoint, &bucket);
    let said = fail(&mut world.mount_command(&["--bucket", "b=s3://no-such-bucket-here"]));
    assert!(said.contains("no-such-bucket-here") && said.contains("no such bucket"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    let mut command = world.mount_command(&["--bucket", &format!("b=s3://{bucket}")]);
    let said = fail(command.env("AWS_SECRET_ACCESS_KEY", "wrong-secret-value"));
    assert!(said.contains("denies access") && !said.contains("wrong-secret-value"), "{said}");
    let mut command = world.mount_command(&["--bucket", &format!("b=s3://{bucket}")]);
    let said = fail(command.env("AWS_ACCESS_KEY_ID", "nobody"));
    assert!(said.contains("denies access") && said.contains("InvalidAccessKeyId"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    // Nobody listens there.
    let mut command = world.mount_command(&["--bucket", &format!("b=s3://{bucket}")]);
    let said = fail(command.env("AWS_ENDPOINT_URL", "http://127.0.0.1:9"));
    assert!(said.contains("127.0.0.1:9") && said.trim().lines().count() == 1, "{said}");
    assert!(!std::fs::read_to_string("/proc/mounts").unwrap().contains(world.path("mnt").to_str().unwrap()));
}

/// More names than two pages have: all are listed once, with one request a page and none for each name.
#[test]
fn a_large_directory_is_listed_page_by_page() {
    let (Some(endpoint), true) = (endpoint(), can_mount()) else { return };
    let bucket = format!("pages-{}", std::process::id());
    let mut world = world(&endpoint, &bucket);
    let proxy = Proxy::start(&endpoint, |_| Fate::Forward);
    world.environment[0].1 = proxy.url();
    let tree = world.out("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    for index in 0..2100 {
        std::fs::write(tree.join(format!("object-{index:04}")), "x".repeat(index % 7)).unwrap();
    }
    std::fs::write(tree.join("sub/one"), "1").unwrap();
    put_tree(&endpoint, &bucket, &tree);
    let mount = world.mount_exactly(&["--bucket", &format!("b=s3://{bucket}")]);
    let before = proxy.answered().len();
    let sizes = |path: &Path| {
        let listed = command("ls").args(["-l", "--time-style=+"]).arg(path).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let fields = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            (words.len() == 6).then(|| {
                format!("{} {} {}", words[0], if words[5] == "sub" { "" } else { words[4] }, words[5])
            })
        };
        listed.lines().filter_map(fields).collect::<Vec<_>>()
    };
    let listed = sizes(&mount.key("many"));
    let requests = proxy.answered().len() - before;
    assert_eq!(listed, sizes(&tree));
    assert!(requests < 40, "{requests} requests for a listing of three pages");
    // One that was removed is gone at once, whatever the listing said.
    std::fs::remove_file(mount.key("many/object-1234")).unwrap();
    assert!(!mount.key("many/object-1234").exists());
    assert_eq!(std::fs::read_dir(mount.key("many")).unwrap().count(), 2100);
    mount.unmount();
}

/// Puts the files of a directory below `many/`, many at once.
fn put_tree(endpoint: &str, bucket: &str, tree: &Path) {
    let store = support::s3::client(endpoint, bucket);
    let files = sh(&format!("cd {} && find . -type f -printf '%P\n'", tree.display()));
    let puts = files.lines().map(|name| {
        let (path, content) =
            (object_store::path::Path::from(format!("many/{name}")), std::fs::read(tree.join(name)).unwrap());
        let store = &store;
        async move { store.put(&path, content.into()).await.map(drop) }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(futures::stream::iter(puts).buffer_unordered(32).try_collect::<()>()).unwrap();
}

#[test]
fn tags_of_a_key_become_tags_of_its_object() {
    let (Some(endpoint), true) = (endpoint(), can_mount()) else { return };
    let bucket = format!("tags-{}", std::process::id());
    let world = world(&endpoint, &bucket);
    let raw = images::noise(&world.catalog(), 20 << 20);
    std::fs::write(world.catalog().join("small.raw"), Random(4).bytes(4096)).unwrap();
    let (url, local) = (format!("b=s3://{bucket}"), format!("l=file://{}", world.bucket().display()));
    let mount = world.mount_exactly(&["--bucket", &url, "--bucket", &local]);
    let set = |path: &Path, name: &str, value: &str| {
        run(command("setfattr").args(["-n", &format!("user.freightfs.tag.{name}"), "-v", value]).arg(path))
    };
    let tags = |key: &str| {
        let get = ["s3api", "get-object-tagging", "--bucket", &bucket, "--key", key, "--query"];
        let query = ["sort_by(TagSet,&Key)[].[Key,Value]", "--output", "text"];
        succeed(aws(&endpoint, &get).args(query)).trim().replace('\t', "=")
    };
    // An export in parts, one in one piece, and what a program writes.
    let (image, small) = (mount.path("images/noise/noise.raw"), mount.path("images/small/small.raw"));
    for (key, from) in [("parts.raw", &image), ("small.raw", &small), ("written.raw", &raw)] {
        std::fs::write(mount.key(key), "").unwrap();
        assert!(set(&mount.key(key), "env", "a b/c+d").status.success());
        assert!(set(&mount.key(key), "owner", "me").status.success());
        mount.cp(from, key);
        assert_eq!(mount.wait(key)["status"], "SUCCESS");
        assert_eq!(tags(key), "env=a b/c+d\nowner=me", "{key}");
    }
    // Other tags make it another export; the same ones do not.
    let uploaded = mount.metric("freightfs_uploaded_bytes_total");
    mount.cp(&image, "parts.raw");
    assert_eq!(mount.metric("freightfs_uploaded_bytes_total"), uploaded);
    assert!(set(&mount.key("parts.raw"), "env", "test").status.success());
    mount.cp(&image, "parts.raw");
    assert_eq!(mount.wait("parts.raw")["status"], "SUCCESS");
    assert_eq!(tags("parts.raw"), "env=test\nowner=me");
    for (name, value, reason) in
        [("x", "\u{7}", "Invalid"), ("", "v", "Invalid"), ("x", &"v".repeat(257), "Invalid")]
    {
        let refused = support::text(&set(&mount.key("parts.raw"), name, value));
        assert!(refused.contains(reason), "{name:?}={value:?}: {refused}");
    }
    std::fs::write(mount.path("buckets/l/x"), "").unwrap();
    let refused = support::text(&set(&mount.path("buckets/l/x"), "env", "test"));
    assert!(refused.contains("not supported"), "{refused}");
    mount.unmount();
}

#[test]
fn a_bucket_that_may_only_be_read_is_mounted_and_refuses_to_be_written() {
    let read_only = |request: &support::proxy::Request| match request.method.as_str() {
        "PUT" | "POST" | "DELETE" => Fate::Answer(403),
        _ => Fate::Forward,
    };
    let Some(setup) = support::proxied::Setup::new("read-only", read_only) else { return };
    let object = setup.world.out("object");
    std::fs::write(&object, "theirs").unwrap();
    let to = format!("s3://{}/dir/object", setup.bucket);
    succeed(aws(&setup.endpoint, &["s3", "cp", "--quiet"]).arg(&object).arg(&to));
    images::noise(&setup.world.catalog(), 1 << 20);
    let mut command = setup.world.mount_command(&["--bucket", &format!("b=s3://{}", setup.bucket)]);
    let said = run(&mut command);
    assert!(said.status.success() && support::text(&said).contains("read-only"), "{}", support::text(&said));
    let mount = setup.world.at();
    assert_eq!(std::fs::read_to_string(mount.key("dir/object")).unwrap(), "theirs");
    let erofs = |result: std::io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(nix::libc::EROFS), "{what}: {error}");
    };
    erofs(std::fs::write(mount.key("new"), "x"), "create");
    erofs(std::fs::write(mount.key("dir/object"), "x"), "overwrite");
    erofs(std::fs::remove_file(mount.key("dir/object")), "unlink");
    erofs(std::fs::rename(mount.key("dir/object"), mount.key("moved")), "rename");
    erofs(std::fs::create_dir(mount.key("made")), "mkdir");
    let copied =
        run(support::command("cp").arg(mount.path("images/noise/noise.raw")).arg(mount.key("k.raw")));
    assert!(!copied.status.success());
    assert_eq!(std::fs::read_to_string(mount.key("dir/object")).unwrap(), "theirs");
    mount.unmount();
}
