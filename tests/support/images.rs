//! Images for tests: a real filesystem, and disks with everything odd, in every source format.

use std::path::{Path, PathBuf};

pub use super::random::Random;
use super::{command, sh, succeed};

/// A raw disk full of noise.
pub fn noise(directory: &Path, size: usize) -> PathBuf {
    let raw = directory.join("noise.raw");
    std::fs::write(&raw, Random(size as u64).bytes(size)).unwrap();
    raw
}

/// A raw ext4 filesystem of 512 MiB with about 40 MiB of files, text and noise.
pub fn ext4(directory: &Path) -> PathBuf {
    let tree = directory.join("tree");
    std::fs::create_dir_all(tree.join("etc/deep/er")).unwrap();
    let mut random = Random(4);
    for index in 0..40 {
        let noise = random.bytes(512 * 1024);
        let line = format!("line {index} of a file that compresses well\n");
        let prose = line.repeat(512 * 1024 / line.len());
        std::fs::write(tree.join(format!("noise-{index}")), noise).unwrap();
        std::fs::write(tree.join(format!("etc/deep/er/text-{index}")), prose).unwrap();
    }
    let raw = directory.join("ext4.raw");
    let (tree_name, raw_name) = (tree.display(), raw.display());
    sh(&format!(
        "truncate -s 512M {raw_name}; E2FSPROGS_FAKE_TIME=1700000000 mkfs.ext4 -q -F -d {tree_name} {raw_name}; fallocate -d {raw_name}"
    ));
    std::fs::remove_dir_all(tree).unwrap();
    raw
}

/// A raw disk of an odd size with holes, zeros that are written, data at both ends and a partial last cluster.
pub fn odd(directory: &Path) -> PathBuf {
    use std::os::unix::fs::FileExt;
    let path = directory.join("odd.raw");
    let size = 37 * 1024 * 1024 + 777;
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    let mut random = Random(5);
    for (at, length) in
        [(0, 5000), (3 << 20, 1 << 20), (10_000_000, 70_000), (30 << 20, 100), (size - 77, 77)]
    {
        file.write_all_at(&random.bytes(length), at).unwrap();
    }
    file.write_all_at(&vec![0; 3 << 20], 20 << 20).unwrap();
    path
}

/// Makes a qcow2 of a raw image with qemu-img.
pub fn qcow2(raw: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = raw.with_file_name(name);
    succeed(
        command("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).arg(raw).arg(&path),
    );
    path
}

/// Runs commands of qemu-io on an image.
pub fn qemu_io(image: &Path, commands: &[&str]) {
    let mut qemu_io = command("qemu-io");
    for line in commands {
        qemu_io.args(["-c", line]);
    }
    succeed(qemu_io.args(["-f", "qcow2"]).arg(image));
}
