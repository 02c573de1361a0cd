//! What a file's bytes depend on: nothing that was made of another source is taken for the same, continued or mixed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use support::images::{self, Random};
use support::mount::World;
use support::proxied::{Setup, until};
use support::proxy::Fate;
use support::s3::{self, aws};
use support::targets::targets;
use support::{assert_same, can_mount, command, freightfs, qemu_compare, sh, sha256, succeed};

/// An overlay `top.qcow2` over `base.qcow2`, and a flat VMDK `flat.vmdk` with its extent, each with what it may refer
/// to. Returns the files below, the ones that are changed.
fn chains(catalog: &Path, size: usize) -> [(&'static str, &'static str, PathBuf); 2] {
    let raw = images::noise(catalog, size);
    images::qcow2(&raw, "base.qcow2", &[]);
    let convert = "qemu-img convert -f raw -O vmdk -o subformat=monolithicFlat noise.raw flat.vmdk";
    let create = "qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 top.qcow2";
    sh(&format!("cd {} && {create} && {convert} && rm noise.raw", catalog.display()));
    std::fs::write(catalog.join("top.toml"), "allow = ['base.qcow2']").unwrap();
    std::fs::write(catalog.join("flat.toml"), "allow = ['flat-flat.vmdk']").unwrap();
    [("top", "qcow2", catalog.join("base.qcow2")), ("flat", "vmdk", catalog.join("flat-flat.vmdk"))]
}

/// Changes bytes in the last fifth of a file, and gives it back the mtime that it had.
fn change_silently(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"changed", file.metadata().unwrap().len() / 5 * 4).unwrap();
    file.set_modified(modified).unwrap();
}

/// Puts a changed file of the same size and mtime in the place of a file.
fn replace_silently(path: &Path) {
    let new = path.with_extension("new");
    succeed(command("cp").arg("-p").arg(path).arg(&new));
    let file = File::options().write(true).open(&new).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"replaced", file.metadata().unwrap().len() / 5 * 4).unwrap();
    file.set_modified(modified).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[test]
fn an_export_is_made_again_when_a_file_below_the_image_changed() {
    if !can_mount() {
        return;
    }
    for target in targets("chain") {
        let catalog = target.world.catalog();
        let chains = chains(&catalog, 3 << 20);
        let mount = target.mount();
        for (id, format, below) in &chains {
            let key = format!("{id}.raw");
            let source = catalog.join(format!("{id}.{format}"));
            let export = || {
                mount.cp(&mount.path(&format!("images/{id}/{key}")), &key);
                let status = mount.wait(&key);
                assert_eq!(status["status"], "SUCCESS", "{}: {status}", target.name);
                let object = target.world.out(&key);
                std::fs::write(&object, target.object(&key)).unwrap();
                qemu_compare(&source, format, &object, "raw");
                (sha256(&object), status["repeated"].clone())
            };
            let (first, _) = export();
            assert_eq!(export(), (first.clone(), 1.into()), "{}: the same is made again", target.name);
            change_silently(below);
            let (second, repeated) = export();
            assert_ne!(first, second, "{}: the old bytes stay", target.name);
            assert_eq!(repeated, 0);
            replace_silently(below);
            let (third, repeated) = export();
            assert_ne!(second, third, "{}: the old bytes stay", target.name);
            assert_eq!(repeated, 0);
            // What is shown is the time of the newest file of the chain: rsync and cp -u see that it changed.
            succeed(command("touch").args(["-d", "2031-02-03T04:05:06Z"]).arg(below));
            let shown = mount.path(&format!("images/{id}/{key}"));
            let newest = below.metadata().unwrap().mtime();
            until("the time is that of the newest file", || shown.metadata().unwrap().mtime() == newest);
        }
        mount.unmount();
    }
}

/// Each mount of this world sends parts so slowly that it can be killed between them.
fn slow(name: &str) -> Option<Setup> {
    Setup::new(name, |request| if request.is_part() { Fate::Delay(300) } else { Fate::Forward })
}

#[test]
fn an_export_whose_base_changed_while_nobody_ran_it_fails_and_is_no_mixture() {
    let Some(setup) = slow("base-changed") else { return };
    let chains = chains(&setup.world.catalog(), 96 << 20);
    for (index, (id, _, below)) in chains.iter().enumerate() {
        let mount = setup.mount(&[]);
        let key = format!("{id}.raw");
        mount.cp(&mount.path(&format!("images/{id}/{key}")), &key);
        until("parts are stored", || setup.parts(&format!("/{key}?")).len() > 3);
        setup.kill(mount);
        if index == 0 {
            change_silently(below)
        } else {
            replace_silently(below)
        }
        let mount = setup.mount(&[]);
        let status = mount.wait(&key);
        assert_eq!((&status["status"], &status["error"]["code"]), (&"FAIL".into(), &"source_changed".into()));
        assert_eq!(s3::find(&setup.endpoint, &setup.bucket, &key), None);
        setup.assert_no_upload_is_left();
        mount.unmount();
    }
}

/// Takes the identities out of all records, as versions wrote them that had none.
fn forget_identities(state: &Path) {
    for record in std::fs::read_dir(state.join("jobs")).unwrap().flatten() {
        let text = std::fs::read(record.path()).unwrap();
        let mut record_of: serde_json::Value = serde_json::from_slice(&text).unwrap();
        record_of["status"]["image"].as_object_mut().unwrap().remove("identity");
        record_of["request"]["source"]["image"].as_object_mut().unwrap().remove("identity");
        std::fs::write(record.path(), serde_json::to_vec(&record_of).unwrap()).unwrap();
    }
}

#[test]
fn a_record_without_an_identity_is_continued_only_where_its_generation_tells_everything() {
    let Some(setup) = slow("no-identity") else { return };
    chains(&setup.world.catalog(), 64 << 20);
    let noise = images::noise(&setup.world.catalog(), 64 << 20);
    for (key, from, expected) in [
        ("noise.raw", "images/noise/noise.raw", "SUCCESS"),
        // The holes of the source are not in its generation, nor is a backing file.
        ("noise.vhd", "images/noise/noise.vhd", "FAIL"),
        ("top.raw", "images/top/top.raw", "FAIL"),
    ] {
        let mount = setup.mount(&[]);
        mount.cp(&mount.path(from), key);
        until("parts are stored", || setup.parts(&format!("/{key}?")).len() > 2);
        setup.kill(mount);
        forget_identities(&setup.world.path("state"));
        let mount = setup.mount(&[]);
        let status = mount.wait(key);
        assert_eq!(status["status"], expected, "{status}");
        if expected == "SUCCESS" {
            assert_same(&setup.fetch(key), &noise);
            assert_eq!(setup.parts(&format!("/{key}?"))["1"], 1, "the export began again");
        } else {
            assert_eq!(status["error"]["code"], "source_changed");
        }
        mount.unmount();
    }
}

/// Extents of a file as the filesystem tells them, as (start, end) of data.
fn data(path: &Path) -> Vec<(i64, i64)> {
    use nix::unistd::{Whence, lseek};
    let file = File::open(path).unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(start) = lseek(&file, at, Whence::SeekData) {
        at = lseek(&file, start, Whence::SeekHole).unwrap();
        found.push((start, at));
    }
    found
}

#[test]
fn an_export_whose_holes_are_others_after_a_kill_begins_again() {
    let Some(setup) = slow("other-holes") else { return };
    // Preallocated, so that what is in the page cache is data to the filesystem, and what is not is a hole.
    let raw = setup.world.catalog().join("disk.raw");
    let file = File::create(&raw).unwrap();
    sh(&format!("fallocate -l 160M {}", raw.display()));
    file.write_all_at(&Random(3).bytes(72 << 20), 8 << 20).unwrap();
    file.sync_all().unwrap();
    let before = data(&raw);
    let mount = setup.mount(&[]);
    mount.cp(&mount.path("images/disk/disk.vhd"), "disk.vhd");
    until("parts are stored", || setup.parts("/disk.vhd?").len() > 3);
    setup.kill(mount);
    let ctime = file.metadata().unwrap().ctime_nsec();
    succeed(command("cat").arg(&raw).stdout(std::process::Stdio::null()));
    if data(&raw) == before {
        return support::skip("changed holes: this filesystem tells the same of what is in the page cache");
    }
    assert_eq!(file.metadata().unwrap().ctime_nsec(), ctime);
    let mount = setup.mount(&[]);
    let status = mount.wait("disk.vhd");
    assert_eq!(status["status"], "SUCCESS", "{status}");
    let fetched = setup.fetch("disk.vhd");
    assert_eq!(status["sha256"], sha256(&fetched));
    qemu_compare(&raw, "raw", &fetched, "vpc");
    setup.assert_no_upload_is_left();
    mount.unmount();
}

#[test]
fn hosts_over_a_catalog_in_a_bucket_tell_images_of_one_size_apart() {
    let (Some(endpoint), true) = (s3::endpoint(), can_mount()) else { return };
    let bucket = format!("same-size-{}", std::process::id());
    let mut worlds = vec![s3::world(&endpoint, &bucket), World::new()];
    worlds[1].environment = worlds[0].environment.clone();
    let made = tempfile::tempdir().unwrap();
    let put = |seed| {
        // Sent in parts: the entity tag has a dash and the number of parts.
        let image = made.path().join("image.raw");
        std::fs::write(&image, Random(seed).bytes(20 << 20)).unwrap();
        let url = format!("s3://{bucket}/images/image.raw");
        succeed(aws(&endpoint, &["s3", "cp", "--quiet"]).arg(&image).arg(url));
        image
    };
    let arguments =
        ["--bucket".to_owned(), format!("b=s3://{bucket}/out"), "-o".into(), "shared,lease=4".into()];
    let export = |world: &World| {
        let mount = world.mount_exactly(&arguments.each_ref().map(String::as_str));
        mount.cp(&mount.path("images/image/image.raw"), "image.raw");
        let status = mount.wait("image.raw");
        assert_eq!(status["status"], "SUCCESS", "{status}");
        mount.unmount();
        let got = world.out("got");
        std::fs::write(&got, s3::get(&endpoint, &bucket, "out/image.raw")).unwrap();
        (got, status["job_id"].clone())
    };
    let source = format!("s3://{bucket}/images");
    let image = put(1);
    for world in &mut worlds {
        world.source = Some(source.clone());
    }
    let [first, second] = [&worlds[0], &worlds[1]];
    let (got, job) = export(first);
    assert_same(&got, &image);
    assert_eq!(export(second).1, job, "what another host made is made again");
    let image = put(2);
    assert_same(&export(second).0, &image);
}

#[test]
fn three_conversions_of_a_raw_image_that_was_just_written_are_identical() {
    for allocate in ["truncate -s", "fallocate -l"] {
        three_conversions(allocate);
    }
}

fn three_conversions(allocate: &str) {
    let world = World::new();
    let raw = world.out("fresh.raw");
    // Preallocated, what a conversion reads ahead is data to the filesystem at the next one.
    sh(&format!("{allocate} 64M {}", raw.display()));
    let file = File::options().write(true).open(&raw).unwrap();
    let mut random = Random(8);
    for _ in 0..80 {
        file.write_all_at(&random.bytes(4096), random.below(60 << 20)).unwrap();
    }
    for format in ["vhdx", "stream.vmdk"] {
        let sums: Vec<_> = (0..3)
            .map(|run| {
                std::fs::create_dir_all(world.out(&format!("{run}.d"))).unwrap();
                let named = world.out(&format!("{run}.d/fresh.{format}"));
                succeed(freightfs().args(["convert", "-q"]).arg(&raw).arg(&named));
                sha256(&named)
            })
            .collect();
        assert!(sums.iter().all(|sum| *sum == sums[0]), "{allocate}: {format}: {sums:?}");
    }
}
