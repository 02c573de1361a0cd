//! The Debian package and the README's recipes, on this machine, in a mount namespace of their own: nothing of it stays.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use support::{azure, can_mount, command, has, images, s3, skip, succeed, text};

/// What namespace.sh exits with where namespaces and overlays cannot be made.
const NO_NAMESPACE: i32 = 77;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A directory that ordinary users can enter.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::Builder::new().prefix("freightfs-test-").tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Runs a script as root where the system can be changed, or says why not and returns `false`.
fn run_in_namespace(script: &Path, work: &Path, environment: &[(&str, &str)]) -> bool {
    let mut unshare = Command::new("timeout");
    unshare.args(["--kill-after=5", "240", "unshare", "--mount", "--pid", "--fork", "--mount-proc"]);
    unshare
        .args(["--propagation", "private", "bash"])
        .arg(Path::new(ROOT).join("tests/support/namespace.sh"));
    unshare.arg(work).arg(script).envs(environment.iter().copied());
    let output = unshare.output().unwrap();
    if output.status.code() == Some(NO_NAMESPACE) {
        skip("changing the system in a namespace, which cannot be made here");
        return false;
    }
    assert!(output.status.success(), "{}", text(&output));
    println!("{}", text(&output));
    true
}

fn can_change_the_system() -> bool {
    let can = nix::unistd::geteuid().is_root() && has("unshare") && has("dpkg");
    if !can {
        skip("installing the package and mounting by fstab: needs root, unshare and dpkg");
    }
    can && can_mount()
}

#[test]
fn the_package_is_installed_read_and_mounted_by_fstab() {
    if !can_change_the_system() {
        return;
    }
    if !has("cargo-deb") {
        return skip("the package: cargo-deb is missing");
    }
    let work = directory();
    let image = images::qcow2(&images::ext4(work.path()), "image.qcow2", &[]);
    let package = Path::new(ROOT).join("scripts/package");
    let said = succeed(command(package).arg("--binary").arg(env!("CARGO_BIN_EXE_freightfs")));
    let deb = Path::new(ROOT).join(said.lines().last().unwrap());
    let script = Path::new(ROOT).join("tests/support/installed.sh");
    let environment = [("DEB", deb.to_str().unwrap()), ("IMAGE", image.to_str().unwrap())];
    let _ = run_in_namespace(&script, work.path(), &environment);
}

/// The blocks of the README's section, each run by bash, one after the other.
#[test]
fn the_recipes_of_the_readme_work_as_they_are_written() {
    if !can_change_the_system() {
        return;
    }
    let (Some(s3), Some(azure)) = (s3::endpoint(), azure::endpoint()) else { return };
    let readme = std::fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let (_, section) = readme.split_once("\n## Recipes\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let recipes: Vec<_> =
        section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap()).collect();
    assert!(recipes.len() >= 6, "{} recipes", recipes.len());
    let work = directory();
    let image = images::qcow2(&images::ext4(work.path()), "image.qcow2", &[]);
    succeed(&mut s3::aws(&s3, &["s3api", "create-bucket", "--bucket", "my-bucket"]));
    azure::make_container(&azure, "my-container");
    let mut script = format!(
        "set -euo pipefail\n{ROOT}/scripts/install --binary {} /usr\nmkdir -p /srv/images /mnt/freight\n\
         cp {} /srv/images/web01.qcow2\n",
        env!("CARGO_BIN_EXE_freightfs"),
        image.display()
    );
    for (number, recipe) in recipes.iter().enumerate() {
        let file = work.path().join(format!("recipe-{number}.sh"));
        std::fs::write(&file, recipe).unwrap();
        script += &format!("echo '== recipe {number}'\nbash -euo pipefail {}\n", file.display());
        script += "if grep fuse.freightfs /proc/mounts; then echo 'left mounted'; exit 1; fi\n";
    }
    script += "echo '== a bucket by mount(8)'\nmount -t freightfs -o formats=raw s3://my-bucket/nightly /mnt/freight\n\
               [ \"$(findmnt -n -o SOURCE /mnt/freight)\" = s3://my-bucket/nightly ]\n\
               head -c 1M /mnt/freight/images/web01/web01.raw >/dev/null\numount /mnt/freight\n";
    let all = work.path().join("recipes.sh");
    std::fs::write(&all, script).unwrap();
    let environment = [
        ("AWS_ENDPOINT_URL", s3.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AZURE_STORAGE_ACCOUNT_NAME", azure::ACCOUNT),
        ("AZURE_STORAGE_ACCOUNT_KEY", azure::KEY),
        ("AZURE_STORAGE_ENDPOINT", azure.as_str()),
        ("AZURE_ALLOW_HTTP", "true"),
    ];
    if !run_in_namespace(&all, work.path(), &environment) {
        return;
    }
    let fetched = work.path().join("fetched");
    for (key, format) in [("nightly/web01/web01.qcow2", "qcow2"), ("import/web01.stream.vmdk", "vmdk")] {
        std::fs::write(&fetched, s3::get(&s3, "my-bucket", key)).unwrap();
        succeed(command("qemu-img").args(["compare", "-f", "qcow2", "-F", format]).arg(&image).arg(&fetched));
    }
    let blob = "service.get_blob_client('my-container', 'vhds/web01.fixed.vhd')";
    azure::python(&azure, &format!("open({fetched:?}, 'wb').write({blob}.download_blob().readall())"));
    succeed(command("qemu-img").args(["compare", "-f", "qcow2", "-F", "vpc"]).arg(&image).arg(&fetched));
}
