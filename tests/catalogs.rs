//! Catalogs in buckets: SeaweedFS, behind a proxy that counts, and Azurite.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use freightfs::bucket::Bucket;
use freightfs::catalog::{BucketFiles, Catalog};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

use support::images::{self, Random};
use support::mount::{Mount, World};
use support::proxied::{Setup, until};
use support::proxy::Fate;
use support::s3::{self, aws};
use support::{
    assert_same, azure, can_mount, command, fail, freightfs, qemu_compare, run, sh, succeed, text,
};

/// A catalog with all that catalogs have: sidecars, several disks, backing files, extents, and what is refused.
fn fill(catalog: &Path) {
    let raw = images::ext4(catalog);
    images::qcow2(&raw, "web.qcow2", &["-c"]);
    std::fs::write(catalog.join("web.toml"), "name = 'Web'\norigin = 'public'\n").unwrap();
    std::fs::create_dir(catalog.join("pair")).unwrap();
    let noise = images::noise(&catalog.join("pair"), 5 << 20);
    std::fs::rename(&noise, catalog.join("pair/data.raw")).unwrap();
    let convert = |format: &str, options: &str, to: &str| {
        let (from, to) = (raw.display(), catalog.join(to));
        sh(&format!("qemu-img convert -f raw -O {format} {options} {from} {}", to.display()));
    };
    convert("vmdk", "-o subformat=twoGbMaxExtentSparse", "pair/root.vmdk");
    std::fs::write(catalog.join("pair.toml"), "allow = ['root-s001.vmdk']\n").unwrap();
    convert("vhdx", "", "disk.vhdx");
    for (top, sidecar) in [("top", "allow = ['web.qcow2']\n"), ("denied", "os = 'none'\n")] {
        let create = "qemu-img create -q -f qcow2 -F qcow2 -b web.qcow2";
        sh(&format!("cd {} && {create} {top}.qcow2", catalog.display()));
        std::fs::write(catalog.join(format!("{top}.toml")), sidecar).unwrap();
    }
    images::qemu_io(&catalog.join("top.qcow2"), &["write -P 7 3M 1M"]);
    std::fs::write(catalog.join("broken.toml"), "colour = 'red'\n").unwrap();
    std::fs::write(catalog.join("broken.raw"), "x").unwrap();
    std::fs::write(catalog.join("short.qcow2"), "QFI").unwrap();
    std::fs::write(catalog.join("notes.txt"), "no image").unwrap();
    std::fs::remove_file(raw).unwrap();
}

/// Everything that a mount shows of its images, but for generations and places.
fn shown(mount: &Mount, place: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let images = mount.path("images");
    for line in sh(&format!("cd {} && find . | LC_ALL=C sort", images.display())).lines() {
        let path = images.join(line);
        if path.is_file() && !line.ends_with(".json") {
            lines.push(format!("{line} {}", std::fs::metadata(&path).unwrap().len()));
        } else if line.ends_with(".json") {
            let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            for disk in json["disks"].as_array_mut().unwrap() {
                disk["generation"] = ().into();
            }
            lines.push(format!("{line} {}", json.to_string().replace(place, "@")));
        } else {
            lines.push(line.to_owned());
        }
    }
    lines
}

/// The same images in a bucket and in a directory: the same names, sizes, refusals and bytes.
fn compare(remote: &Mount, place: &str, world: &World, local: &World) {
    let mount = local.mount(&["--formats", "raw:qcow2:vhd"]);
    let (theirs, ours) = (shown(remote, place), shown(&mount, local.catalog().to_str().unwrap()));
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(theirs, ours);
    }
    assert_eq!(theirs.len(), ours.len());
    assert!(ours.iter().any(|line| line.starts_with("./pair/pair-data1.vhd ")), "{ours:#?}");
    for (image, code) in [("denied", "reference_denied"), ("broken", "malformed"), ("short", "corrupt_image")]
    {
        let json = std::fs::read(mount.path(&format!("images/{image}/image.json"))).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let disk = json["disks"].get(0).map_or(&json["error"], |disk| &disk["error"]);
        assert_eq!(disk["code"], code, "{json:#}");
    }
    for image in ["web/web", "pair/pair", "pair/pair-data1", "top/top", "disk/disk"] {
        let raw = format!("images/{image}.raw");
        assert_same(&remote.path(&raw), &mount.path(&raw));
        let converted = world.out("converted.vhd");
        std::fs::copy(remote.path(&format!("images/{image}.vhd")), &converted).unwrap();
        qemu_compare(&mount.path(&raw), "raw", &converted, "vpc");
    }
    for (image, reason) in [("denied", "not among the files allowed"), ("broken", "colour")] {
        let json = std::fs::read_to_string(remote.path(&format!("images/{image}/image.json"))).unwrap();
        assert!(json.contains(reason), "{json}");
        let opened = std::fs::File::open(remote.path(&format!("images/{image}/{image}.raw")));
        assert!(opened.is_err(), "{image} opens");
    }
    mount.unmount();
}

#[test]
fn a_bucket_with_much_else_shows_the_same_images() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = Arc::new(InMemory::new());
    let put = |key: &str| {
        let path = object_store::path::Path::from(key);
        runtime.block_on(store.put(&path, object_store::PutPayload::from_static(b"id = 'x'"))).unwrap();
    };
    for key in
        ["web.raw", "web.toml", "pair/pair.raw", "pair/data.raw", "deep/er/no.raw", ".hidden.raw", "note.txt"]
    {
        put(key);
    }
    let bucket = Bucket::with_stores("catalog", "memory:", store.clone(), store.clone());
    let images = || {
        let catalog = Catalog::new(Arc::new(BucketFiles::new(bucket.clone(), runtime.handle().clone())));
        let images = catalog.images().unwrap();
        images.values().map(|image| (image.id.clone(), image.disks.clone())).collect::<Vec<_>>()
    };
    let few = images();
    assert_eq!(
        few.iter().map(|(id, disks)| (id.as_str(), disks.len())).collect::<Vec<_>>(),
        [("pair", 2), ("x", 1)]
    );
    // Objects below it hide neither an image nor a sidecar.
    put("web.toml/x.raw");
    put("web.raw/x.raw");
    assert_eq!(images(), few);
    // More than are listed whatever their level.
    (0..10_001).for_each(|number| put(&format!("pair/deep/er/{number}")));
    assert!(runtime.block_on(bucket.list_all(10_000)).unwrap().is_none());
    assert_eq!(images(), few);
}

fn put(endpoint: &str, bucket: &str, key: &str, file: &Path) {
    let object = format!("s3://{bucket}/{key}");
    succeed(aws(endpoint, &["s3", "cp", "--quiet"]).arg(file).arg(object));
}

#[test]
fn a_bucket_shows_what_a_directory_shows() {
    let Some(setup) = Setup::new("catalog", |_| Fate::Forward) else { return };
    let local = World::new();
    fill(&local.catalog());
    let place = format!("s3://{}/all/images", setup.bucket);
    succeed(aws(&setup.endpoint, &["s3", "sync", "--quiet"]).arg(local.catalog()).arg(&place));
    let mut world = setup.world;
    world.source = Some(place.clone());
    let mount = world.mount_exactly(&["--formats", "raw:qcow2:vhd"]);
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.contains(world.path("mnt").to_str().unwrap())).unwrap();
    assert!(line.starts_with(&format!("{place} ")), "{line}");
    compare(&mount, &place, &world, &local);
    // Without a mount: an object by its URL.
    let environment = || world.environment.iter().map(|(name, value)| (name, value));
    let object = format!("{place}/top.qcow2");
    let refused = fail(freightfs().envs(environment()).args(["info", &object]));
    assert!(refused.contains("web.qcow2") && refused.contains("--allow-reference"), "{refused}");
    let allow = ["--allow-reference", "web.qcow2"];
    let info = succeed(freightfs().envs(environment()).args(["info", "--json", &object]).args(allow));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["disk_size"], std::fs::metadata(local.catalog().join("top.qcow2")).unwrap().len());
    let converted = world.out("converted.vhdx");
    let convert = ["convert", "--quiet", &object];
    succeed(freightfs().envs(environment()).args(convert).arg(&converted).args(allow));
    qemu_compare(&mount.path("images/top/top.raw"), "raw", &converted, "vhdx");
    // What is shown of the configuration mounts the same again.
    let shown = std::fs::read_to_string(mount.path(".freightfs/config")).unwrap();
    assert!(shown.contains(&format!("catalog = \"{place}\"")), "{shown}");
    mount.unmount();
    let config = world.path("again.toml");
    std::fs::write(&config, shown).unwrap();
    world.source = Some(config.display().to_string());
    let mount = world.mount_exactly(&[]);
    assert!(mount.path("images/web/web.raw").exists());
    mount.unmount();
}

#[test]
fn a_container_of_azure_shows_what_a_directory_shows_by_a_configuration_file() {
    let (Some(endpoint), true) = (azure::endpoint(), can_mount()) else { return };
    let container = format!("catalog-{}", std::process::id());
    azure::make_container(&endpoint, &container);
    let local = World::new();
    fill(&local.catalog());
    let upload = format!(
        "import pathlib\nroot = pathlib.Path({:?})\nfor file in filter(pathlib.Path.is_file, root.rglob('*')):\n    \
         service.get_blob_client({container:?}, 'x/' + str(file.relative_to(root))).upload_blob(file.read_bytes())",
        local.catalog()
    );
    azure::python(&endpoint, &upload);
    let mut world = World::new();
    let config = world.path("azure.toml");
    let (account, key) = (azure::ACCOUNT, azure::KEY);
    let document = format!(
        "formats = ['raw', 'qcow2', 'vhd']\ncache = '32M'\n[catalog]\nurl = 'az://{container}/x'\n\
         endpoint = '{endpoint}'\nallow_http = true\naccount_name = '{account}'\naccess_key = '{key}'\n"
    );
    std::fs::write(&config, document).unwrap();
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o600)).unwrap();
    world.source = Some(config.display().to_string());
    let mount = world.mount_exactly(&[]);
    compare(&mount, &format!("az://{container}/x"), &world, &local);
    let shown = std::fs::read_to_string(mount.path(".freightfs/config")).unwrap();
    assert!(!shown.contains(key) && !mount.log().contains(key), "{shown}");
    mount.unmount();
}

#[test]
fn looking_reads_no_image_and_reading_fetches_what_it_needs_once() {
    let Some(mut setup) = Setup::new("lazy", |_| Fate::Forward) else { return };
    let local = World::new();
    // 64 GiB with 40 MiB of data in two places.
    let image = local.catalog().join("big.qcow2");
    succeed(command("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64G"));
    let noise = images::noise(&local.path("out"), 20 << 20);
    let writes = [0, 60 << 30].map(|at: u64| format!("write -s {} {at} 20M", noise.display()));
    images::qemu_io(&image, &writes.each_ref().map(String::as_str));
    put(&setup.endpoint, &setup.bucket, "images/big.qcow2", &image);
    let size = std::fs::metadata(&image).unwrap().len();
    let fetched = |setup: &Setup| {
        let is_read = |method: &str, target: &str| method == "GET" && target.contains("big.qcow2");
        setup.proxy.answered().iter().filter(|(r, _)| is_read(&r.method, &r.target)).count() as u64
    };
    setup.world.source = Some(format!("s3://{}/images", setup.bucket));
    let mount = setup.mount(&[]);
    assert_eq!(sh(&format!("ls {0} && ls {0}/big", mount.path("images").display())).lines().count(), 13);
    assert_eq!(fetched(&setup), 0, "mounting and listing read the image");
    let lists = setup.proxy.answered().iter().filter(|(r, _)| r.target.contains("list-type=2")).count();
    assert!(lists <= 8, "{lists} requests to list one image");
    // The tables of a qcow2 of 64 GiB stand in its first blocks, and where its data begins anew.
    let mut sector = [0; 4096];
    let raw = std::fs::File::open(mount.path("images/big/big.raw")).unwrap();
    raw.read_exact_at(&mut sector, 60 << 30).unwrap();
    assert_eq!(sector[..], Random(20 << 20).bytes(4096)[..]);
    assert!(fetched(&setup) < 8, "{} blocks for a sector", fetched(&setup));
    drop(raw);
    for (format, qemu) in [("vhdx", "vhdx"), ("stream.vmdk", "vmdk")] {
        let key = format!("exports/big.{format}");
        std::fs::create_dir_all(mount.key("exports")).unwrap();
        mount.cp(&mount.path(&format!("images/big/big.{format}")), &key);
        let status = mount.wait(&key);
        assert_eq!(status["status"], "SUCCESS", "{status}");
        qemu_compare(&image, "qcow2", &setup.fetch(&key), qemu);
    }
    let blocks = size.div_ceil(1 << 20);
    assert!(fetched(&setup) <= blocks, "{} requests for {blocks} blocks", fetched(&setup));
    mount.unmount();
}

#[test]
fn names_that_are_missing_do_not_list_a_bucket_each() {
    let Some(mut setup) = Setup::new("missing", |_| Fate::Forward) else { return };
    let raw = images::noise(&setup.world.out(""), 1 << 20);
    put(&setup.endpoint, &setup.bucket, "images/disk.raw", &raw);
    setup.world.source = Some(format!("s3://{}/images", setup.bucket));
    let mount = setup.mount(&[]);
    let lists = || setup.proxy.answered().iter().filter(|(r, _)| r.target.contains("list-type=2")).count();
    let before = lists();
    let look = format!(
        "cd {}; (ls missing{{1..600}} 2>&1 || true) | grep -c 'No such'",
        mount.path("images").display()
    );
    assert_eq!(sh(&look).trim(), "600");
    // Sixteen at once, then one in a second, and one every five seconds for whoever looks.
    let taken = lists() - before;
    assert!(taken < 120, "{taken} listings for 600 names");
    put(&setup.endpoint, &setup.bucket, "images/new.raw", &raw);
    until("the new image is found", || mount.path("images/new/new.raw").exists());
    mount.unmount();
}

#[test]
fn an_image_that_is_replaced_is_never_mixed_and_the_new_one_is_found() {
    let (Some(endpoint), true) = (s3::endpoint(), can_mount()) else { return };
    let bucket = format!("replaced-{}", std::process::id());
    let mut world = s3::world(&endpoint, &bucket);
    let (old, new) = (world.out("old"), world.out("new"));
    std::fs::write(&old, vec![b'o'; 40 << 20]).unwrap();
    std::fs::write(&new, vec![b'n'; 40 << 20]).unwrap();
    put(&endpoint, &bucket, "disk.raw", &old);
    let sidecar = world.out("sidecar");
    std::fs::write(&sidecar, "name = 'First'\n").unwrap();
    put(&endpoint, &bucket, "disk.toml", &sidecar);
    world.source = Some(format!("s3://{bucket}"));
    let mount = world.mount(&[]);
    let path = mount.path("images/disk/disk.raw");
    let mut file = std::fs::File::open(&path).unwrap();
    let mut start = vec![0; 1 << 20];
    file.read_exact(&mut start).unwrap();
    put(&endpoint, &bucket, "disk.raw", &new);
    let mut read = Vec::new();
    let ended = file.read_to_end(&mut read);
    assert!(read.iter().all(|&byte| byte == b'o'), "bytes of two generations");
    assert_eq!(ended.unwrap_err().raw_os_error(), Some(nix::libc::ESTALE));
    drop(file);
    until("the new image is shown", || {
        std::fs::File::open(&path).and_then(|mut file| file.read(&mut start)).is_ok() && start[0] == b'n'
    });
    assert_same(&path, &new);
    // One that comes is found at once; that one went, and what its sidecar says now, a moment later.
    put(&endpoint, &bucket, "other.raw", &old);
    assert_same(&mount.path("images/other/other.raw"), &old);
    let said = || std::fs::read_to_string(mount.path("images/disk/image.json")).unwrap_or_default();
    assert!(said().contains("First"), "{}", said());
    std::fs::write(&sidecar, "name = 'Second'\n").unwrap();
    put(&endpoint, &bucket, "disk.toml", &sidecar);
    succeed(&mut aws(&endpoint, &["s3", "rm", "--quiet", &format!("s3://{bucket}/other.raw")]));
    until("the sidecar is read again", || said().contains("Second"));
    until("the image is gone", || !mount.path("images/other").exists());
    mount.unmount();
}

#[test]
fn exports_of_a_buckets_images_go_on_after_a_kill() {
    let Some(mut setup) = Setup::new("onward", |request| {
        // Slow enough to be killed in the middle.
        if request.is_part() { Fate::Delay(150) } else { Fate::Forward }
    }) else {
        return;
    };
    let noise = images::noise(&setup.world.out(""), 96 << 20);
    put(&setup.endpoint, &setup.bucket, "images/noise.raw", &noise);
    setup.world.source = Some(format!("s3://{}/images", setup.bucket));
    let mount = setup.mount(&[]);
    mount.cp(&mount.path("images/noise/noise.vhd"), "noise.vhd");
    until("parts are stored", || setup.parts("noise.vhd").len() > 4);
    setup.kill(mount);
    let mount = setup.mount(&[]);
    let status = mount.wait("noise.vhd");
    assert_eq!(status["status"], "SUCCESS", "{status}");
    qemu_compare(&noise, "raw", &setup.fetch("noise.vhd"), "vpc");
    setup.assert_no_upload_is_left();
    mount.unmount();
}

#[test]
fn a_catalog_that_fails_fails_the_read_and_a_moments_failure_does_not() {
    let failing = Arc::new(std::sync::atomic::AtomicU8::new(0));
    let fate = Arc::clone(&failing);
    let mut seen = 0;
    let Some(mut setup) = Setup::new("failing", move |request| {
        let is_image = request.method == "GET" && request.target.contains("noise.raw");
        seen += usize::from(is_image);
        match fate.load(std::sync::atomic::Ordering::SeqCst) {
            1 if is_image && seen.is_multiple_of(3) => Fate::Answer(503),
            1 if is_image && seen % 3 == 1 => Fate::CutAnswer,
            2 if is_image => Fate::Answer(403),
            _ => Fate::Forward,
        }
    }) else {
        return;
    };
    let noise = images::noise(&setup.world.out(""), 24 << 20);
    put(&setup.endpoint, &setup.bucket, "images/noise.raw", &noise);
    setup.world.source = Some(format!("s3://{}/images", setup.bucket));
    let mount = setup.mount(&[]);
    failing.store(1, std::sync::atomic::Ordering::SeqCst);
    assert_same(&mount.path("images/noise/noise.raw"), &noise);
    mount.unmount();
    let mount = setup.mount(&[]);
    failing.store(2, std::sync::atomic::Ordering::SeqCst);
    let refused = std::fs::read(mount.path("images/noise/noise.raw")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EACCES), "{refused}");
    mount.cp(&mount.path("images/noise/noise.vhd"), "noise.vhd");
    let status = mount.wait("noise.vhd");
    assert_eq!(status["status"], "FAIL", "{status}");
    assert!(status["error"]["details"].as_str().unwrap().contains("noise.raw"), "{status}");
    failing.store(0, std::sync::atomic::Ordering::SeqCst);
    assert_same(&mount.path("images/noise/noise.raw"), &noise);
    mount.unmount();
}

#[test]
fn a_catalog_that_cannot_be_listed_is_refused_in_one_line() {
    let (Some(endpoint), true) = (s3::endpoint(), can_mount()) else { return };
    let bucket = format!("refused-{}", std::process::id());
    let mut world = s3::world(&endpoint, &bucket);
    let mut refused = |source: &str, variable: Option<(&str, &str)>, reason: &str| {
        world.source = Some(source.to_owned());
        let mut mount = world.mount_command(&[]);
        let said = text(&run(mount.envs(variable)));
        assert!(said.contains(reason) && said.trim().lines().count() == 1, "{said}");
        assert!(!said.contains("hidden"), "{said}");
        assert!(
            !std::fs::read_to_string("/proc/mounts").unwrap().contains(world.path("mnt").to_str().unwrap())
        );
    };
    let there = format!("s3://{bucket}");
    refused("s3://nothing-here-at-all", None, "no such bucket");
    refused(&there, Some(("AWS_SECRET_ACCESS_KEY", "wrong")), "denies access");
    refused("s3://key:hidden@bucket", None, "credentials");
    refused("ftp://host/images", None, "\"ftp\"");
    refused("s3://", None, "names no bucket");
    refused("file:///nothing/here", None, "/nothing/here");
    // What can be checked without mounting.
    let mut check = freightfs();
    let fake = check.arg("mount").arg(&there).arg(world.path("mnt")).args(["-o", "cache=1M"]);
    assert!(text(&run(fake)).contains("cache=1M"));
}

#[test]
fn names_that_no_path_can_have_cost_nothing_but_themselves() {
    let (Ok(endpoint), true) = (std::env::var("FREIGHTFS_TEST_MOTO"), can_mount()) else {
        return support::skip("odd keys in a catalog: FREIGHTFS_TEST_MOTO is not set");
    };
    let bucket = format!("odd-{}", std::process::id());
    let mut world = s3::world(&endpoint, &bucket);
    let raw = images::noise(&world.out(""), 1 << 20);
    let keys = [
        "images/good.raw",
        "images/pair/pair.raw",
        "images//bad.raw",
        "images/a/../b.raw",
        "images/pair//c.raw",
    ];
    for key in keys {
        let put = ["s3api", "put-object", "--bucket", &bucket, "--key", key, "--body"];
        succeed(aws(&endpoint, &put).arg(&raw));
    }
    world.source = Some(format!("s3://{bucket}/images"));
    let mount = world.mount(&[]);
    let mut names: Vec<_> = std::fs::read_dir(mount.path("images"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["good", "pair"]);
    for id in ["good", "pair"] {
        assert_same(&mount.path(&format!("images/{id}/{id}.raw")), &raw);
    }
    mount.unmount();
}
