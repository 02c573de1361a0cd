//! Buckets at Azure Blob Storage: Azurite, which scripts/test starts, read by Microsoft's own client.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use support::images::{self, Random};
use support::mount::World;
use support::{assert_same, azure, can_mount, command, freightfs, run, sha256, succeed, text};

/// Fetches a blob with Microsoft's client.
fn fetch(endpoint: &str, container: &str, key: &str, to: &Path) {
    let blob = format!("service.get_blob_client({container:?}, {key:?})");
    azure::python(endpoint, &format!("open({to:?}, 'wb').write({blob}.download_blob().readall())"));
}

#[test]
fn exports_and_copies_reach_a_container_by_a_configuration_file() {
    let (Some(endpoint), true) = (azure::endpoint(), can_mount()) else { return };
    let container = format!("exports-{}", std::process::id());
    azure::make_container(&endpoint, &container);
    let world = World::new();
    let raw = images::noise(&world.catalog(), 20 << 20);
    images::qcow2(&images::ext4(&world.catalog()), "disk.qcow2", &[]);
    let config = world.path("freightfs.toml");
    let (account, key) = (azure::ACCOUNT, azure::KEY);
    let document = format!(
        "catalog = \"catalog\"\nformats = [\"raw\", \"fixed.vhd\", \"zlib.qcow2\"]\n\n[bucket.b]\n\
         url = \"az://{container}/some/prefix\"\nendpoint = \"{endpoint}\"\nallow_http = true\n\
         account_name = \"{account}\"\naccess_key = \"{key}\"\n"
    );
    std::fs::write(&config, document).unwrap();
    let mounted = || {
        let mut mount = freightfs();
        mount.arg("mount").arg(&config).arg(world.path("mnt")).arg("--state").arg(world.path("state"));
        run(&mut mount)
    };
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o644)).unwrap();
    let refused = text(&mounted());
    assert!(refused.contains("chmod 600") && !refused.contains(key), "{refused}");
    std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o600)).unwrap();
    for (right, wrong, reason) in
        [(key, "d3Jvbmc=", "denies access"), (&*container, "nothing-here", "no such container")]
    {
        let document = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, document.replace(right, wrong)).unwrap();
        let refused = text(&mounted());
        assert!(refused.contains(reason) && refused.trim().lines().count() == 1, "{refused}");
        std::fs::write(&config, document).unwrap();
    }
    let said = mounted();
    assert!(said.status.success(), "{}", text(&said));
    // What this store cannot do is said, and what it was told is not.
    assert!(text(&said).contains("bucket b: ") && text(&said).contains("tags"), "{}", text(&said));
    let mount = world.at();
    assert!(!mount.log().contains(key));
    let shown = std::fs::read_to_string(mount.path(".freightfs/config")).unwrap();
    assert!(shown.contains("az://") && !shown.contains(key), "{shown}");

    for (image, format) in [("noise", "raw"), ("noise", "fixed.vhd"), ("disk", "zlib.qcow2")] {
        let name = format!("{image}.{format}");
        let from = mount.path(&format!("images/{image}/{name}"));
        mount.cp(&from, &name);
        let status = mount.wait(&name);
        assert_eq!(status["status"], "SUCCESS", "{status}");
        let fetched = world.out("fetched");
        fetch(&endpoint, &container, &format!("some/prefix/{name}"), &fetched);
        assert_same(&fetched, &from);
        assert_same(&mount.key(&name), &from);
        assert_eq!(status["sha256"], sha256(&fetched));
    }
    // rsync writes, renames, and finds that there is nothing to do.
    std::fs::create_dir(mount.key("deep")).unwrap();
    succeed(command("rsync").arg("-a").arg(&raw).arg(mount.key("deep/")));
    fetch(&endpoint, &container, "some/prefix/deep/noise.raw", &world.out("fetched"));
    assert_same(&world.out("fetched"), &raw);
    let again = succeed(command("rsync").args(["-a", "--stats"]).arg(&raw).arg(mount.key("deep/")));
    assert!(again.contains("Number of regular files transferred: 0"), "{again}");
    // An object that others replace, and one that is overwritten.
    std::fs::write(mount.key("small"), Random(3).bytes(999)).unwrap();
    std::fs::write(mount.key("small"), "new").unwrap();
    fetch(&endpoint, &container, "some/prefix/small", &world.out("fetched"));
    assert_eq!(std::fs::read(world.out("fetched")).unwrap(), b"new");
    std::fs::rename(mount.key("small"), mount.key("moved")).unwrap();
    assert_eq!(std::fs::read(mount.key("moved")).unwrap(), b"new");
    assert!(!mount.key("small").exists());
    std::fs::remove_file(mount.key("moved")).unwrap();
    mount.unmount();
}

#[test]
fn a_killed_export_goes_on_with_the_parts_that_azure_has() {
    let (Some(endpoint), true) = (azure::endpoint(), can_mount()) else { return };
    let container = format!("killed-{}", std::process::id());
    azure::make_container(&endpoint, &container);
    let mut world = World::new();
    for (name, value) in [
        ("AZURE_STORAGE_ACCOUNT_NAME", azure::ACCOUNT),
        ("AZURE_STORAGE_ACCOUNT_KEY", azure::KEY),
        ("AZURE_STORAGE_ENDPOINT", &endpoint),
        ("AZURE_ALLOW_HTTP", "true"),
    ] {
        world.environment.push((name.to_owned(), value.to_owned()));
    }
    let raw = images::noise(&world.catalog(), 100 << 20);
    let url = format!("b=az://{container}");
    let mount = world.mount_exactly(&["--bucket", &url, "-o", "rate=40M"]);
    mount.cp(&mount.path("images/noise/noise.raw"), "noise.raw");
    support::proxied::until("some parts", || mount.metric("freightfs_uploaded_bytes_total") >= 32 << 20);
    mount.signal("KILL");
    let place = format!(" {} ", world.path("mnt").display());
    support::proxied::until("the mount is gone", || {
        !std::fs::read_to_string("/proc/mounts").unwrap().contains(&place)
    });
    let mount = world.mount_exactly(&["--bucket", &url]);
    let status = mount.wait("noise.raw");
    assert_eq!(status["status"], "SUCCESS", "{status}");
    let sent = mount.metric("freightfs_uploaded_bytes_total");
    assert!(sent <= 72 << 20, "{sent} bytes were sent again");
    fetch(&endpoint, &container, "noise.raw", &world.out("fetched"));
    assert_same(&world.out("fetched"), &raw);
    mount.unmount();
}

/// A shared access signature is part of each request's URL, and errors name URLs; object_store leaves that one out.
#[test]
fn a_signature_is_not_told_with_the_url_that_failed() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    for (name, value) in [
        ("AZURE_STORAGE_ACCOUNT_NAME", azure::ACCOUNT),
        ("AZURE_STORAGE_SAS_KEY", "sv=2024-11-04&sig=confidential"),
        ("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9"),
        ("AZURE_ALLOW_HTTP", "true"),
    ] {
        world.environment.push((name.to_owned(), value.to_owned()));
    }
    world.environment.push(("FREIGHTFS_LOG".to_owned(), "debug".to_owned()));
    let refused = run(&mut world.mount_command(&["--bucket", "b=az://container"]));
    assert!(!refused.status.success());
    let log = std::fs::read_to_string(world.path("state").join("log")).unwrap_or_default();
    assert!(text(&refused).contains("cannot list"), "{}", text(&refused));
    assert!(!text(&refused).contains("confidential"), "{}", text(&refused));
    assert!(!log.contains("confidential"), "{log}");
}
