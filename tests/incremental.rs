//! What a second export of a file sends, and that its object is the one that a whole export makes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use support::images::Random;
use support::mount::{Mount, World};
use support::proxy::Fate;
use support::{assert_same, can_mount, freightfs, proxied, sha256, succeed};

const MIB: usize = 1 << 20;
/// Bytes of the disk, and of it those that are zeros at its end.
const DISK: usize = 40 * MIB;
const ZEROS: usize = 4 * MIB;
/// Places of the disk that change, by a sector each.
const CHANGED: [usize; 3] = [13 * MIB, 14 * MIB + 5000, 29 * MIB];

fn make_disk(raw: &Path) {
    let mut bytes = Random(1).bytes(DISK);
    bytes[DISK - ZEROS..].fill(0);
    std::fs::write(raw, bytes).unwrap();
}

fn change_disk(raw: &Path) {
    let file = File::options().write(true).open(raw).unwrap();
    for at in CHANGED {
        file.write_all_at(&Random(at as u64).bytes(512), at as u64).unwrap();
    }
}

/// Exports a file of the disk; the final status, and whether it is that of what `convert` makes of the disk now.
fn export(world: &World, mount: &Mount, name: &str) -> Value {
    mount.cp(&mount.path(&format!("images/disk/{name}")), name);
    let status = mount.wait(name);
    assert_eq!(status["status"], "SUCCESS", "{status}");
    let expected = world.out(name);
    let _ = std::fs::remove_file(&expected);
    succeed(freightfs().args(["convert", "-q"]).arg(world.catalog().join("disk.raw")).arg(&expected));
    assert_eq!(status["sha256"], sha256(&expected), "{name}");
    assert_same(&mount.key(name), &expected);
    status
}

fn bytes(status: &Value, what: &str) -> usize {
    status[what].as_u64().unwrap() as usize
}

#[test]
fn a_second_export_to_s3_sends_what_has_changed() {
    let Some(setup) = proxied::Setup::new("incremental", |_| Fate::Forward) else { return };
    let raw = setup.world.catalog().join("disk.raw");
    let mount = setup.mount(&["-o", "formats=raw:zstd.qcow2"]);
    for name in ["disk.raw", "disk.zstd.qcow2"] {
        make_disk(&raw);
        let first = export(&setup.world, &mount, name);
        let size = bytes(&first, "size");
        assert_eq!(bytes(&first, "bytes_reused"), 0, "{name}");
        change_disk(&raw);
        let before = setup.proxy.received();
        let second = export(&setup.world, &mount, name);
        let received = setup.proxy.received() - before;
        // A chunk for each change, one part of tables at the beginning, and at most one at the end.
        assert!(received < 12 * MIB, "{name}: {received} of {size} bytes were sent");
        assert!(bytes(&second, "bytes_sent") <= received, "{name}: {second}");
        let all = ["bytes_sent", "bytes_reused", "bytes_zero"].map(|what| bytes(&second, what));
        assert_eq!(all.iter().sum::<usize>(), size, "{name}: {second}");
    }
    setup.assert_no_upload_is_left();
    mount.unmount();
}

#[test]
fn a_second_export_to_a_directory_copies_what_has_not_changed() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    world.environment.push(("FREIGHTFS_PART_SIZE".into(), "1".into()));
    let raw = world.catalog().join("disk.raw");
    make_disk(&raw);
    let mount = world.mount(&["-o", "formats=raw"]);
    assert_eq!(bytes(&export(&world, &mount, "disk.raw"), "bytes_reused"), 0);
    change_disk(&raw);
    let sent = bytes(&export(&world, &mount, "disk.raw"), "bytes_sent");
    assert!(sent < 2 * MIB, "{sent} bytes were sent");
    // An index that is none, and an object that is another one, cost bytes and nothing else.
    let index = world.bucket().join(".freightfs/chunks/disk.raw");
    std::fs::write(&index, "no index").unwrap();
    make_disk(&raw);
    assert_eq!(bytes(&export(&world, &mount, "disk.raw"), "bytes_reused"), 0);
    let stale = std::fs::read(&index).unwrap();
    std::fs::write(mount.key("disk.raw"), Random(9).bytes(DISK)).unwrap();
    std::fs::write(&index, stale).unwrap();
    change_disk(&raw);
    export(&world, &mount, "disk.raw");
    mount.unmount();
}
