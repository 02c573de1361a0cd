//! What each cloud's export API says, item by item, and what the mount does about it.
//!
//! One row for each parameter, constraint, answer and error code of the five documents. A row says where it stands,
//! what is done, and what a program gets: an errno, and the cloud's code in image.json or in the status file.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use libc::{EACCES, EBUSY, EEXIST, EFBIG, EINVAL, EIO, ENAMETOOLONG, ENOENT, ENOKEY, EPERM, ERANGE};
use support::mount::{Mount, World};
use support::proxied::{self, Setup};
use support::proxy::{Fate, Request};
use support::targets::{Target, targets};
use support::{can_mount, command, fail, has, run, sh, text};

/// What is done for a row.
enum Do {
    /// An image is exported in a format, and the job succeeds.
    Export { image: &'static str, format: &'static str },
    /// An image's file does not open: errno and the cloud's code.
    Refused { image: &'static str, format: &'static str, errno: i32, code: &'static str },
    /// An image's file in a format is not there.
    NotOffered { image: &'static str, format: &'static str },
    /// Nothing can be written to this path below buckets/.
    NoKey { path: String, errno: i32 },
    /// A copy to this path below buckets/ fails, and the status file has the cloud's code.
    NoExport { image: &'static str, format: &'static str, path: &'static str, code: &'static str },
    /// Anything else.
    Check(fn(&Mount) -> Result<(), String>),
}

use Do::{Check, Export, NoExport, NoKey, NotOffered, Refused};

/// Images, by what their sidecars say; all of one small disk but for the large ones.
const IMAGES: [(&str, &str); 24] = [
    ("plain", ""),
    ("available", "status = 'available'"),
    ("normal", "status = 'Normal'"),
    ("uninitialized", "status = 'Uninitialized'"),
    ("saving", "status = 'saving'"),
    ("creating", "status = 'creating'"),
    ("deleted", "status = 'deleted'"),
    ("windows-public", "origin = 'public'\nos = 'Windows Server 2022'"),
    ("suse-public", "origin = 'public'\nos = 'SUSE Linux Enterprise 15'"),
    ("windows-made", "made_from = 'public'\nos = 'Windows Server 2022'"),
    ("suse-made", "made_from = 'public'\nos = 'SUSE Linux Enterprise 15'"),
    ("debian-made", "made_from = 'public'\nos = 'Debian 13'"),
    ("windows", "os = 'Windows Server 2022'"),
    ("redhat", "os = 'Red Hat Enterprise Linux 9'"),
    ("public", "origin = 'public'"),
    ("market", "origin = 'market'"),
    ("market-made", "made_from = 'market'"),
    ("shared", "origin = 'shared'"),
    ("full", "kind = 'full-machine'"),
    ("backup", "kind = 'backup'"),
    ("encrypted", "encrypted = true"),
    ("here", "region = 'here'"),
    ("ready", "status = 'Ready'"),
    ("downloading", "status = 'downloading'"),
];

/// Sparse raw disks of an image: bytes of each.
const SIZES: [(&str, &[u64]); 6] = [
    ("large", &[200 << 30]),
    ("just-below", &[(128 << 30) - 512]),
    ("huge", &[1 << 40]),
    ("five-data", &[1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20]),
    ("four-data", &[1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20]),
    ("big-data", &[1 << 20, 501 << 30]),
];

fn world() -> World {
    let world = World::new();
    let catalog = world.catalog();
    for (id, sidecar) in IMAGES {
        std::fs::write(catalog.join(format!("{id}.raw")), id.repeat(5000)).unwrap();
        std::fs::write(catalog.join(format!("{id}.toml")), sidecar).unwrap();
    }
    for (id, disks) in SIZES {
        std::fs::create_dir(catalog.join(id)).unwrap();
        for (index, &size) in disks.iter().enumerate() {
            let name = if index == 0 { "system.raw".to_owned() } else { format!("x{index}.raw") };
            std::fs::File::create(catalog.join(id).join(name)).unwrap().set_len(size).unwrap();
        }
    }
    for bucket in ["cold", "far"] {
        std::fs::create_dir(world.path(bucket)).unwrap();
    }
    world
}

fn mount(world: &World, profile: &str) -> Mount {
    let bucket = |name: &str| format!("bucket={name}=file://{}", world.path(name).display());
    let facts = "storage_class=b=Standard,storage_class=cold=Archive,region=b=here,region=far=elsewhere";
    let options = format!("policy={profile},{},{},{facts}", bucket("cold"), bucket("far"));
    world.mount(&["-o", &options])
}

fn file(mount: &Mount, image: &str, format: &str) -> PathBuf {
    mount.path(&format!("images/{image}/{image}.{format}"))
}

fn errno(result: std::io::Result<std::fs::File>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

/// What image.json says of a format: exportable, and the cloud's code.
fn verdict(mount: &Mount, image: &str, format: &str) -> (bool, String) {
    let json = std::fs::read(mount.path(&format!("images/{image}/image.json"))).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let formats = json["disks"][0]["formats"].as_array().unwrap();
    let found = formats.iter().find(|f| f["format"] == format).unwrap_or(&serde_json::Value::Null);
    let code = found["error"]["cloud_code"].as_str().unwrap_or_default();
    (found["exportable"] == true, code.to_owned())
}

impl Do {
    fn run(&self, mount: &Mount) -> Result<(), String> {
        let wrong = |what: &str, got: String| Err(format!("{what}: {got}"));
        match self {
            Export { image, format } => {
                let key = format!("{image}.{format}");
                let copied = run(command("cp").arg(file(mount, image, format)).arg(mount.key(&key)));
                if !copied.status.success() {
                    return wrong("cp", text(&copied));
                }
                let status = mount.wait(&key);
                let success = status["status"] == "SUCCESS" && verdict(mount, image, format).0;
                if success { Ok(()) } else { wrong("status", status.to_string()) }
            }
            Refused { image, format, errno: expected, code } => {
                let got =
                    (errno(std::fs::File::open(file(mount, image, format))), verdict(mount, image, format));
                let as_said = got == (Some(*expected), (false, (*code).to_owned()));
                if as_said { Ok(()) } else { wrong("open and image.json", format!("{got:?}")) }
            }
            NotOffered { image, format } => match errno(std::fs::File::open(file(mount, image, format))) {
                Some(ENOENT) => Ok(()),
                other => wrong("open", format!("{other:?}")),
            },
            NoKey { path, errno: expected } => {
                match errno(std::fs::File::create(mount.path("buckets").join(path))) {
                    Some(got) if got == *expected => Ok(()),
                    other => wrong("create", format!("{other:?}")),
                }
            }
            NoExport { image, format, path, code } => {
                let to = mount.path("buckets").join(path);
                let copied = run(command("cp").arg(file(mount, image, format)).arg(&to));
                if copied.status.success() {
                    return wrong("cp", "success".into());
                }
                let _ = run(support::freightfs().args(["wait", "--quiet"]).arg(&to));
                let status = std::fs::read_to_string(format!("{}.status", to.display())).unwrap_or_default();
                let told = status.contains(&format!("\"cloud_code\": \"{code}\""));
                if told && !to.exists() { Ok(()) } else { wrong("status", status) }
            }
            Check(check) => check(mount),
        }
    }
}

fn job_fields(mount: &Mount) -> Result<(), String> {
    let status = mount.status("plain.qcow2");
    let id = status["job_id"].as_str().unwrap_or_default();
    let job = std::fs::read_to_string(mount.path(&format!("jobs/{id}.json"))).map_err(|e| e.to_string())?;
    let there = ["url", "md5", "sha256", "begin_time", "end_time", "progress", "error"];
    let missing: Vec<_> = there.iter().filter(|f| !job.contains(&format!("\"{f}\""))).collect();
    let right = missing.is_empty() && status["progress"] == 100 && status["error"].is_null();
    if right { Ok(()) } else { Err(format!("{missing:?} {job}")) }
}

fn setfattr(mount: &Mount, key: &str, token: &str) -> std::process::Output {
    run(command("setfattr").args(["-n", "user.freightfs.client_token", "-v", token]).arg(mount.key(key)))
}

/// A token names a request: the same again uploads nothing, another one under it is refused, a long one too.
fn client_token(mount: &Mount) -> Result<(), String> {
    if !has("setfattr") {
        support::skip("client tokens: setfattr is missing");
        return Ok(());
    }
    for key in ["token.raw", "other.raw"] {
        std::fs::write(mount.key(key), "").unwrap();
        let _ = run(support::freightfs().args(["wait", "--quiet"]).arg(mount.key(key)));
        assert!(setfattr(mount, key, "request-1").status.success());
    }
    let image = file(mount, "plain", "raw");
    let copy = |key: &str| run(command("cp").arg(&image).arg(mount.key(key)));
    assert!(copy("token.raw").status.success());
    let first = mount.wait("token.raw");
    let uploaded = mount.metric("freightfs_uploaded_bytes_total");
    assert!(copy("token.raw").status.success());
    let again = mount.status("token.raw");
    let same =
        again["job_id"] == first["job_id"] && again["repeated"] == 1 && again["client_token"] == "request-1";
    if !same || mount.metric("freightfs_uploaded_bytes_total") != uploaded {
        return Err(format!("{first} and then {again}"));
    }
    if copy("other.raw").status.success() {
        return Err("another request under the same token was accepted".into());
    }
    let long = "x".repeat(65);
    let refused = setfattr(mount, "token.raw", &long);
    let named = text(&refused).contains("Numerical result out of range");
    let fine = setfattr(mount, "token.raw", &long[1..]).status.success();
    let _ = (EEXIST, ERANGE);
    if named && fine { Ok(()) } else { Err(text(&refused)) }
}

/// While one export of an image runs, another of the same one is refused. The first waits for the second's place.
fn one_export_of_an_image(mount: &Mount) -> Result<(), String> {
    let from = file(mount, "large", "raw");
    std::fs::copy(&from, mount.key("first.raw")).map_err(|e| e.to_string())?;
    let second = run(command("cp").arg(&from).arg(mount.key("second.raw")));
    let status = mount.wait("second.raw").to_string();
    std::fs::remove_file(mount.key("first.raw")).map_err(|e| e.to_string())?;
    let told = status.contains("OperationDenied.ImageExporting") && text(&second).contains("busy");
    if told { Ok(()) } else { Err(format!("{} {status}", text(&second))) }
}

fn only_the_root_disk(mount: &Mount) -> Result<(), String> {
    let names: Vec<_> = std::fs::read_dir(mount.path("images/four-data")).unwrap().flatten().collect();
    let names: Vec<_> = names.iter().map(|n| n.file_name().into_string().unwrap()).collect();
    let has = |name: &str| names.iter().any(|n| n == name);
    let fine = has("four-data.raw") && has("four-data-data4.raw") && !has("four-data-data5.raw");
    if fine { Ok(()) } else { Err(format!("{names:?}")) }
}

/// Whether cp of several images into one directory makes as many jobs.
fn several_images(mount: &Mount) -> Result<(), String> {
    let (a, b) = (file(mount, "plain", "raw"), file(mount, "available", "raw"));
    std::fs::create_dir_all(mount.key("several")).unwrap();
    let copied = run(command("cp").arg(a).arg(b).arg(mount.key("several/")));
    let done =
        ["several/plain.raw", "several/available.raw"].map(|key| mount.wait(key)["status"] == "SUCCESS");
    if copied.status.success() && done == [true, true] { Ok(()) } else { Err(text(&copied)) }
}

fn md5_and_url(mount: &Mount) -> Result<(), String> {
    let sums = sh(&format!("cd {} && md5sum -c plain.qcow2.md5", mount.key("").display()));
    let url = mount.status("plain.qcow2")["url"].as_str().unwrap_or_default().to_owned();
    if sums.contains("OK") && url.ends_with("/plain.qcow2") { Ok(()) } else { Err(format!("{sums} {url}")) }
}

fn error_fields(mount: &Mount) -> Result<(), String> {
    let _ = run(command("cp").arg(file(mount, "plain", "qcow2")).arg(mount.key("wrong.vmdk")));
    let error = mount.wait("wrong.vmdk")["error"].clone();
    let there = ["code", "description", "details", "cause", "cloud_code"];
    let all = error.is_object() && there.iter().all(|field| error.get(field).is_some());
    if all { Ok(()) } else { Err(error.to_string()) }
}

fn dry_run(mount: &Mount) -> Result<(), String> {
    let before = std::fs::read_dir(mount.path("jobs")).unwrap().count();
    let verdicts = [verdict(mount, "plain", "raw").0, verdict(mount, "encrypted", "raw").0];
    let after = std::fs::read_dir(mount.path("jobs")).unwrap().count();
    if verdicts == [true, false] && before == after { Ok(()) } else { Err(format!("{verdicts:?}")) }
}

/// The rows of a profile.
fn check(profile: &str, rows: &[(&str, Do)]) {
    if !can_mount() {
        return;
    }
    let world = world();
    let mount = mount(&world, profile);
    let mut wrong = String::new();
    for (item, action) in rows {
        if let Err(what) = action.run(&mount) {
            writeln!(wrong, "{profile}: {item}: {what}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    mount.unmount();
}

fn refused(image: &'static str, format: &'static str, errno: i32, code: &'static str) -> Do {
    Refused { image, format, errno, code }
}

fn export(image: &'static str, format: &'static str) -> Do {
    Export { image, format }
}

fn no_key(path: &str, errno: i32) -> Do {
    NoKey { path: path.to_owned(), errno }
}

fn huawei() -> Vec<(&'static str, Do)> {
    let long = format!("b/{}.qcow2", "x".repeat(250));
    vec![
        ("image_id", export("plain", "qcow2")),
        ("image_id: not there, 404", NotOffered { image: "nobody", format: "qcow2" }),
        ("bucket_url: the bucket is not there, 404", no_key("nobody/k", ENOENT)),
        ("bucket_url: the file's name is too long, IMG.0074", NoKey { path: long, errno: ENAMETOOLONG }),
        ("bucket_url: the file's name has a wrong character, IMG.0075, 400", no_key("b/a:b.qcow2", EINVAL)),
        ("bucket_url: the storage class has to be Standard", no_key("cold/k", EPERM)),
        (
            "bucket_url: the bucket is in another region, IMG.0058",
            NoExport { image: "here", format: "vhd", path: "far/k.vhd", code: "IMG.0058" },
        ),
        ("file_format: qcow2", export("normal", "qcow2")),
        ("file_format: vhd", export("plain", "vhd")),
        ("file_format: zvhd", export("plain", "zvhd")),
        ("file_format: vmdk", export("plain", "vmdk")),
        ("file_format: another, IMG.0072", NotOffered { image: "plain", format: "raw" }),
        ("constraint: status Normal", export("normal", "vhd")),
        ("constraint: status Normal (Uninitialized)", export("uninitialized", "vhd")),
        ("constraint: another status that passes, IMG.0046", refused("saving", "vhd", EBUSY, "IMG.0046")),
        ("constraint: another status, IMG.0046", refused("deleted", "vhd", EPERM, "IMG.0046")),
        ("constraint: Windows public image, 403", refused("windows-public", "vhd", EPERM, "IMG.0077")),
        ("constraint: SUSE public image", refused("suse-public", "vhd", EPERM, "IMG.0077")),
        ("constraint: made from a Windows public image", refused("windows-made", "vhd", EPERM, "IMG.0077")),
        ("constraint: made from a SUSE public image", refused("suse-made", "vhd", EPERM, "IMG.0077")),
        ("constraint: made from another public image", export("debian-made", "vhd")),
        ("constraint: one's own Windows image", export("windows", "vhd")),
        ("constraint: private images only: shared, IMG.0047", refused("shared", "vhd", EPERM, "IMG.0047")),
        ("constraint: full-ECS images", refused("full", "vhd", EPERM, "IMG.0128")),
        ("constraint: smaller than 128 GB", refused("large", "qcow2", EFBIG, "IMG.0160")),
        (
            "constraint: just below 128 GB",
            Check(|mount| {
                let (exportable, code) = verdict(mount, "just-below", "qcow2");
                if exportable { Ok(()) } else { Err(code) }
            }),
        ),
        (
            "constraint: larger by the fast export",
            Check(|mount| {
                let (exportable, code) = verdict(mount, "large", "zvhd2");
                if exportable { Ok(()) } else { Err(code) }
            }),
        ),
        ("constraint: below 1 TB", refused("huge", "zvhd2", EFBIG, "IMG.0160")),
        ("constraint: CSBS backups", refused("backup", "vhd", EPERM, "IMG.0080")),
        ("constraint: market images", refused("market", "vhd", EPERM, "IMG.0079")),
        ("constraint: made from market images", refused("market-made", "vhd", EPERM, "IMG.0079")),
        ("encrypted without its key, IMG.0099", refused("encrypted", "vhd", ENOKEY, "IMG.0099")),
        ("response: job_id; the job's query", Check(job_fields)),
    ]
}

#[test]
fn huawei_ims() {
    check("huawei-ims", &huawei());
}

#[test]
fn otc_ims() {
    let mut rows = huawei();
    rows.extend([
        ("note: the storage class must be Standard", no_key("cold/k", EPERM)),
        ("bucket_url, file_format: mandatory, by path and suffix", NotOffered { image: "plain", format: "" }),
        ("job status SUCCESS", Check(job_fields)),
    ]);
    check("otc-ims", &rows);
}

#[test]
fn alibaba_ecs() {
    check(
        "alibaba-ecs",
        &[
            ("ImageId", export("plain", "qcow2")),
            (
                "ImageId: MissingParameter: the image's file is its format's, nothing else",
                NotOffered { image: "plain", format: "" },
            ),
            ("ImageId.NotFound", NotOffered { image: "nobody", format: "raw" }),
            ("formats: raw", export("plain", "raw")),
            ("formats: vhd", export("plain", "vhd")),
            ("formats: vmdk", export("plain", "vmdk")),
            ("formats: vdi", export("plain", "vdi")),
            ("formats: another", NotOffered { image: "plain", format: "vhdx" }),
            ("OssBucket", export("available", "raw")),
            ("OssBucket.NotFound, MissingParameter OssBucket", no_key("nobody/k", ENOENT)),
            (
                "RegionId: same region, RegionId.NotFound, InvalidRegion.NotSupport",
                NoExport { image: "here", format: "raw", path: "far/k.raw", code: "OssBucket.NotFound" },
            ),
            ("RegionId: the image's own", export("here", "raw")),
            (
                "OssPrefix: 1 to 30 letters or digits",
                Check(|mount| {
                    std::fs::create_dir(mount.key("prefix1")).map_err(|e| e.to_string())?;
                    std::fs::write(mount.key("prefix1/k"), "x").map_err(|e| e.to_string())
                }),
            ),
            (
                "OssPrefix.Malformed: a character",
                Check(|mount| {
                    std::fs::create_dir(mount.key("pre-fix")).map_err(|e| e.to_string())?;
                    no_key("b/pre-fix/k", EINVAL).run(mount)
                }),
            ),
            (
                "OssPrefix.Malformed: 31 characters",
                Check(|mount| {
                    let prefix = "x".repeat(31);
                    std::fs::create_dir(mount.key(&prefix)).map_err(|e| e.to_string())?;
                    no_key(&format!("b/{prefix}/k"), EINVAL).run(mount)
                }),
            ),
            ("ClientToken", Check(client_token)),
            ("market images, ImageNotSupported", refused("market", "raw", EPERM, "ImageNotSupported")),
            ("made from market images", refused("market-made", "raw", EPERM, "ImageNotSupported")),
            ("custom images only, Forbidden", refused("public", "raw", EPERM, "Forbidden")),
            ("somebody else's, Forbidden", refused("shared", "raw", EPERM, "Forbidden")),
            ("not more than 4 data disks", refused("five-data", "raw", EPERM, "ImageNotSupported")),
            ("4 data disks", Check(only_the_root_disk)),
            ("a data disk of more than 500 GB", refused("big-data", "raw", EFBIG, "ImageNotSupported")),
            ("IncorrectImageStatus, passing", refused("creating", "raw", EBUSY, "IncorrectImageStatus")),
            ("IncorrectImageStatus", refused("deleted", "raw", EPERM, "IncorrectImageStatus")),
            ("OperationDenied.ImageExporting", Check(one_export_of_an_image)),
            ("ExportTaskId, RequestId", Check(job_fields)),
        ],
    );
}

#[test]
fn tencent_cvm() {
    check(
        "tencent-cvm",
        &[
            ("BucketName, ImageIds.N of one", export("plain", "qcow2")),
            ("ImageIds.N of several", Check(several_images)),
            ("InvalidParameterValue.BucketNotFound", no_key("nobody/k", ENOENT)),
            ("InvalidImageId.NotFound, SnapshotNotFound", NotOffered { image: "nobody", format: "raw" }),
            (
                "InvalidImageId.Malformed, ImageIdsSnapshotIdsMustOne: a path names one image",
                NotOffered { image: "plain", format: "" },
            ),
            ("ExportFormat: RAW", export("plain", "raw")),
            ("ExportFormat: VHD", export("plain", "vhd")),
            ("ExportFormat: VMDK", export("plain", "vmdk")),
            ("ExportFormat: another", NotOffered { image: "plain", format: "vdi" }),
            (
                "FileNamePrefixList.N, InvalidFileNamePrefixList: each copy has its own name",
                Check(|mount| {
                    let copied =
                        run(command("cp").arg(file(mount, "plain", "raw")).arg(mount.key("mine-plain.raw")));
                    let status = mount.wait("mine-plain.raw");
                    if copied.status.success() && status["status"] == "SUCCESS" {
                        Ok(())
                    } else {
                        Err(status.to_string())
                    }
                }),
            ),
            ("OnlyExportRootDisk", Check(only_the_root_disk)),
            ("DryRun", Check(dry_run)),
            ("TaskId, CosPaths, RequestId", Check(job_fields)),
            (
                "InvalidImageState: another task",
                refused("creating", "raw", EBUSY, "InvalidParameterValue.InvalidImageState"),
            ),
            (
                "InvalidImageState: no state for it",
                refused("deleted", "raw", EPERM, "InvalidParameterValue.InvalidImageState"),
            ),
            (
                "EncryptedImagesNotSupported",
                refused("encrypted", "raw", ENOKEY, "UnsupportedOperation.EncryptedImagesNotSupported"),
            ),
            (
                "PublicImageExportUnsupported: public",
                refused("public", "raw", EPERM, "UnsupportedOperation.PublicImageExportUnsupported"),
            ),
            (
                "PublicImageExportUnsupported: market",
                refused("market", "raw", EPERM, "UnsupportedOperation.PublicImageExportUnsupported"),
            ),
            (
                "MarketImageExportUnsupported",
                refused("market-made", "raw", EPERM, "UnsupportedOperation.MarketImageExportUnsupported"),
            ),
            (
                "SharedImageExportUnsupported",
                refused("shared", "raw", EPERM, "UnsupportedOperation.SharedImageExportUnsupported"),
            ),
            (
                "WindowsImageExportUnsupported, InvalidImageOsName",
                refused("windows", "raw", EPERM, "UnsupportedOperation.WindowsImageExportUnsupported"),
            ),
            (
                "RedHatImageExportUnsupported",
                refused("redhat", "raw", EPERM, "UnsupportedOperation.RedHatImageExportUnsupported"),
            ),
            (
                "ImageTooLargeExportUnsupported, TooLarge",
                refused("huge", "raw", EFBIG, "UnsupportedOperation.ImageTooLargeExportUnsupported"),
            ),
        ],
    );
}

#[test]
fn zstack() {
    check(
        "zstack",
        &[
            ("backupStorageUuid: the bucket; imageUuid", export("plain", "qcow2")),
            ("backupStorageUuid: not there", no_key("nobody/k", ENOENT)),
            ("imageUuid: not there", NotOffered { image: "nobody", format: "qcow2" }),
            ("exportFormat: any of the catalog's", export("plain", "vhdx")),
            ("state Ready, Enabled", export("ready", "raw")),
            ("state not Ready", refused("downloading", "raw", EBUSY, "SYS.1008")),
            ("state neither", refused("deleted", "raw", EPERM, "SYS.1008")),
            ("imageUrl, exportMd5Sum", Check(md5_and_url)),
            ("success", Check(job_fields)),
            ("error: code, description, details, elaboration, opaque, cause", Check(error_fields)),
            (
                "userTags, systemTags: kept as extended attributes",
                Check(|mount| {
                    let key = mount.key("plain.qcow2");
                    let set = run(command("setfattr").args(["-n", "user.owner", "-v", "me"]).arg(&key));
                    let got = run(command("getfattr").args(["--only-values", "-n", "user.owner"]).arg(&key));
                    if set.status.success() && text(&got).contains("me") { Ok(()) } else { Err(text(&got)) }
                }),
            ),
        ],
    );
}

/// LimitExceeded.ExportImageTaskLimitExceeded and the rate of requests, with limits of one's own.
#[test]
fn limits_queue_or_fail() {
    if !can_mount() {
        return;
    }
    // How many are accepted in a second depends on how fast they come: src/export/limits.rs tests that without a clock.
    for (limits, words) in [("jobs = 2", &[true, false][..]), ("requests_per_second = 3", &[false])] {
        for &fails in words {
            let world = world();
            let policy = world.out("mine.toml");
            let text = format!("extends = 'tencent-cvm'\n[limits]\njobs_of_image = 100\n{limits}\n");
            std::fs::write(&policy, text).unwrap();
            let word = if fails { "fail" } else { "queue" };
            let mount =
                world.mount(&["-o", &format!("policy={},on_limit={word},formats=raw", policy.display())]);
            // Large enough that none ends before the last one is asked for.
            let from = file(&mount, "just-below", "raw");
            let results: Vec<_> = (0..5)
                .map(|n| run(command("cp").arg(&from).arg(mount.key(&format!("{n}.raw")))).status.success())
                .collect();
            let accepted = results.iter().filter(|&&accepted| accepted).count();
            assert_eq!(accepted, if fails { 2 } else { 5 }, "{limits}, {word}");
            if fails {
                let status = mount.wait("4.raw");
                assert_eq!(status["error"]["code"], "too_many_jobs");
                let code = &status["error"]["cloud_code"];
                assert_eq!(*code, "LimitExceeded.ExportImageTaskLimitExceeded");
            }
            for n in 0..5 {
                let _ = std::fs::remove_file(mount.key(&format!("{n}.raw")));
            }
            mount.unmount();
        }
    }
}

/// Runs a line of shell in the mount; returns what it says when it fails.
fn shell(mount: &Mount, line: &str) -> Option<String> {
    let line = format!("set -o pipefail; cd {} && {{ {line}; }}", mount.path("").display());
    let output = run(command("bash").args(["-c", &line]));
    (!output.status.success()).then(|| text(&output))
}

/// Images whose region is known and is the bucket's or not, and a policy that asks for it.
fn every_way(test: &str) -> Vec<Target> {
    let targets = targets(test);
    for Target { world, .. } in &targets {
        std::fs::write(world.catalog().join("kept.raw"), [1; 70_000]).unwrap();
        std::fs::write(world.catalog().join("kept.toml"), "region = 'here'").unwrap();
        std::fs::write(world.catalog().join("free.raw"), [2; 70_000]).unwrap();
        std::fs::write(world.catalog().join("free.toml"), "region = 'there'").unwrap();
        let rules = "formats = ['raw', 'vhd', 'fixed.vhd', 'qcow2']\n\
                     [[rule]]\nwhen = { other_region = true }\nrefuse = 'policy_refused'\nmessage = 'another region'\n\
                     [[rule]]\nwhen = { name_has = ':' }\nrefuse = 'malformed'\nmessage = 'a colon'\n";
        std::fs::write(world.out("rules.toml"), rules).unwrap();
    }
    targets
}

#[test]
fn every_way_to_a_key_asks_the_policy() {
    if !can_mount() {
        return;
    }
    for target in every_way("every-way") {
        let options = format!("policy={},region=b=there", target.world.out("rules.toml").display());
        let mount = target.mount_with(&["-o", &options]);
        let file = |image: &str, format: &str| format!("images/{image}/{image}.{format}");
        let kept = |format: &str| file("kept", format);
        let (vhd, fixed, raw, qcow2) = (kept("vhd"), kept("fixed.vhd"), kept("raw"), kept("qcow2"));
        for (line, key, word) in [
            // The copy of an image, by cp, through a pipe, under its own name and under others.
            (format!("cp {vhd} buckets/b/1.vhd"), "1.vhd", ""),
            (format!("cat {vhd} | dd of=buckets/b/2.vhd status=none"), "2.vhd", "not permitted"),
            (format!("cat {raw} | dd of=buckets/b/3.raw status=none"), "3.raw", "not permitted"),
            (format!("cat {raw} | dd of=buckets/b/4.IMG status=none"), "4.IMG", "not permitted"),
            (format!("cat {vhd} > buckets/b/5"), "5", "not permitted"),
            (format!("cat {fixed} > buckets/b/6"), "6", "not permitted"),
            (format!("cat {qcow2} > buckets/b/7.txt"), "7.txt", "not permitted"),
            (format!("rsync {qcow2} buckets/b/8.qcow2"), "8.qcow2", "not permitted"),
            // Where and as what, whatever it is.
            ("echo > buckets/b/a:b".to_owned(), "a:b", "Invalid"),
            (format!("cp {} buckets/b/a:b.vhd", file("free", "vhd")), "a:b.vhd", "Invalid"),
        ] {
            let said = shell(&mount, &line).unwrap_or_else(|| panic!("{}: {line} succeeds", target.name));
            assert!(said.contains(word), "{}: {line}: {said}", target.name);
            assert!(!mount.key(key).exists(), "{}: {line} leaves an object", target.name);
        }
        for line in
            ["echo text > buckets/b/text", ": > buckets/b/empty.vhd", "cp buckets/b/text buckets/b/copy"]
        {
            assert_eq!(shell(&mount, line), None, "{}: {line}", target.name);
        }
        mount.cp(&mount.path(&file("free", "vhd")), "free.vhd");
        assert_eq!(mount.wait("free.vhd")["status"], "SUCCESS");
        let object = target.object("free.vhd");
        for (line, key, word) in [
            ("mv buckets/b/free.vhd buckets/b/a:b.vhd", "a:b.vhd", "cannot move"),
            ("mv buckets/b/free.vhd buckets/b/free.vmdk", "free.vmdk", "not permitted"),
            ("truncate -s 1000 buckets/b/free.vhd", "", "not permitted"),
            ("echo x >> buckets/b/free.vhd", "", "not permitted"),
            ("cp buckets/b/free.vhd buckets/b/again.vhd", "again.vhd", "not permitted"),
        ] {
            let said = shell(&mount, line).unwrap_or_else(|| panic!("{}: {line} succeeds", target.name));
            assert!(said.contains(word), "{}: {line}: {said}", target.name);
            assert!(key.is_empty() || !mount.key(key).exists(), "{}: {line}", target.name);
            assert!(target.object("free.vhd") == object, "{}: {line} changes the object", target.name);
        }
        assert_eq!(shell(&mount, "mv buckets/b/free.vhd buckets/b/moved.vhd"), None);
        assert!(target.object("moved.vhd") == object);
        mount.unmount();
        // An option lets programs write images of which nothing is known; what is known is asked for all the same.
        let mount = target.mount_with(&["-o", &format!("{options},plain_images")]);
        assert_eq!(shell(&mount, &format!("cat {vhd} | dd of=buckets/b/2.vhd status=none")), None);
        let said = shell(&mount, &format!("cat {vhd} | dd of=buckets/b/2.vmdk status=none")).unwrap();
        assert!(said.contains("not permitted"), "{said}");
        mount.unmount();
    }
}

#[test]
fn a_file_is_asked_for_by_the_name_under_which_it_is_published() {
    if !can_mount() {
        return;
    }
    for target in every_way("renamed") {
        let options = format!("policy={},region=b=there", target.world.out("rules.toml").display());
        let mount = target.mount_with(&["-o", &options]);
        let mut from = std::fs::File::open(file(&mount, "free", "qcow2")).unwrap();
        let mut to = std::fs::File::create(mount.key("name.img")).unwrap();
        std::io::copy(&mut from, &mut to).unwrap();
        std::fs::rename(mount.key("name.img"), mount.key("other.vhd")).unwrap();
        drop((from, to));
        proxied::until("the file to be refused", || {
            mount.key("other.vhd.status").exists() && !mount.key("other.vhd").exists()
        });
        assert_eq!(mount.status("other.vhd")["error"]["code"], "malformed", "{}", target.name);
        // A program's file.
        let mut to = std::fs::File::create(mount.key("plain")).unwrap();
        to.write_all(&[3; 4000]).unwrap();
        std::fs::rename(mount.key("plain"), mount.key("plain.raw")).unwrap();
        drop(to);
        proxied::until("the file to be refused", || {
            mount.key("plain.raw.status").exists() && !mount.key("plain.raw").exists()
        });
        assert_eq!(mount.status("plain.raw")["error"]["code"], "policy_refused", "{}", target.name);
        mount.unmount();
    }
}

/// 401, 403, 404, 500 and 503 of the store: the errno of a program that writes, and the code of an export.
#[test]
fn answers_of_the_store() {
    let cases = [
        (401, EACCES, "permission_denied"),
        (403, EACCES, "permission_denied"),
        (404, ENOENT, "not_found"),
        (500, EIO, "upload_failed"),
        (503, EIO, "upload_failed"),
    ];
    // Those that are tried again take their time.
    std::thread::scope(|scope| {
        for (status, errno, code) in cases {
            scope.spawn(move || {
                let decide = move |request: &Request| {
                    let hit = request.method == "PUT" && request.target.ends_with("/k.bin");
                    if hit { Fate::Answer(status) } else { Fate::Forward }
                };
                let Some(setup) = Setup::new(&format!("answer-{status}"), decide) else { return };
                let mount = setup.mount(&["-o", "policy=huawei-ims"]);
                let from = setup.world.out("k.bin");
                std::fs::write(&from, "bytes").unwrap();
                let said = text(&run(command("cp").arg(&from).arg(mount.key("k.bin"))));
                let words = std::io::Error::from_raw_os_error(errno).to_string();
                assert!(said.contains(words.split(" (os").next().unwrap()), "{status}: {said}");
                let told = mount.status("k.bin");
                assert_eq!(told["error"]["code"], code, "{status}");
                assert!(told["error"]["cloud_code"].as_str().unwrap().starts_with("IMG."), "{told}");
                mount.unmount();
            });
        }
    });
}

#[test]
fn a_wrong_policy_fails_the_mount_and_says_where() {
    if !can_mount() {
        return;
    }
    let world = world();
    let policy = world.out("mine.toml");
    std::fs::write(&policy, "extends = 'zstack'\n\nformats = ['zip']\n").unwrap();
    for (option, parts) in [
        (format!("policy={}", policy.display()), vec!["mine.toml", "zip"]),
        ("policy=amazon".to_owned(), vec!["amazon", "huawei-ims", "tencent-cvm"]),
        ("policy=alibaba-ecs,formats=vhdx".to_owned(), vec!["alibaba-ecs", "none of the formats"]),
        ("storage_class=x=Standard".to_owned(), vec!["\"x\""]),
    ] {
        let bucket = format!("b=file://{}", world.bucket().display());
        let said = fail(&mut world.mount_command(&["--bucket", &bucket, "-o", &option]));
        assert!(parts.iter().all(|part| said.contains(part)), "{option}: {said}");
    }
}

#[test]
fn the_commands_show_check_and_cancel() {
    if !can_mount() {
        return;
    }
    let world = world();
    let mount = mount(&world, "huawei-ims");
    let freight = |words: &[&str], path: &PathBuf| run(support::freightfs().args(words).arg(path));
    let checked = freight(&["check"], &mount.path("images/large"));
    assert!(checked.status.success(), "{}", text(&checked));
    for part in ["large.qcow2", "no   too_large, IMG.0160", "large.zvhd2", "yes", "policy huawei-ims"] {
        assert!(text(&checked).contains(part), "{part}: {}", text(&checked));
    }
    let one = freight(&["check"], &file(&mount, "large", "qcow2"));
    assert!(!one.status.success() && text(&one).lines().count() == 1, "{}", text(&one));
    assert!(freight(&["check"], &file(&mount, "plain", "vhd")).status.success());
    assert!(text(&freight(&["check"], &mount.path("buckets"))).contains("no image"));

    // A fixed VHD of nearly 128 GiB takes a while.
    std::fs::copy(file(&mount, "just-below", "fixed.vhd"), mount.key("k.fixed.vhd")).unwrap();
    let jobs = text(&freight(&["jobs"], &mount.path("")));
    assert!(jobs.contains("b/k.fixed.vhd") && !jobs.contains("SUCCESS"), "{jobs}");
    let status = text(&freight(&["status"], &mount.key("k.fixed.vhd")));
    assert!(status.contains("RUNNING") || status.contains("INIT"), "{status}");
    let cancelled = freight(&["cancel"], &mount.key("k.fixed.vhd"));
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    assert!(!mount.key("k.fixed.vhd").exists());
    assert_eq!(mount.status("k.fixed.vhd")["status"], "CANCELLED");
    let again = freight(&["cancel"], &mount.key("k.fixed.vhd"));
    assert!(!again.status.success() && text(&again).contains("CANCELLED"), "{}", text(&again));
    assert!(!freight(&["status"], &mount.key("k.fixed.vhd")).status.success());
    let json = text(&freight(&["jobs", "--all", "--json"], &mount.path("jobs")));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["status"], "CANCELLED");
    // What has ended is not taken away by cancelling.
    mount.cp(&file(&mount, "plain", "qcow2"), "done.qcow2");
    assert_eq!(mount.wait("done.qcow2")["status"], "SUCCESS");
    assert!(!freight(&["cancel"], &mount.key("done.qcow2")).status.success());
    assert!(mount.key("done.qcow2").exists());
    mount.unmount();
}
