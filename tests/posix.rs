//! The cases of pjdfstest and of s3fs' integration script that apply to regular files and directories of a bucket, one
//! by one, each in a directory of its own. Those that do not apply stand in freightfs-semantics(7), with the reason.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag};
use support::images::Random;
use support::targets::targets;
use support::{can_mount, command, run, sh, text};

/// Where a case comes from and what it says, and how it is tried in a directory.
type Case = (&'static str, fn(&Path));

/// What is known to fail, and whose it is. The list is exact.
const KNOWN: &[(&str, &str)] = &[];

const CASES: &[Case] = &[
    ("pjdfstest chmod/00: modes of files and directories", modes),
    ("pjdfstest chmod/00: chmod moves the ctime", ctime_of_chmod),
    ("pjdfstest open/00, mkdir/00: the mode at creation, less the umask", mode_at_creation),
    ("pjdfstest */01: a component that is no directory", not_a_directory),
    ("pjdfstest */02: a name of 255 bytes, and one of 256", long_names),
    ("pjdfstest */03: a path that is too long", long_paths),
    ("pjdfstest */04: a component that is not there", no_entry),
    ("pjdfstest ftruncate/00, truncate/00: cut and extended", truncation),
    ("pjdfstest ftruncate/00: times of a truncation", times_of_truncation),
    ("pjdfstest ftruncate/12, truncate/12: larger than there can be", huge_truncation),
    ("pjdfstest ftruncate/13: a descriptor for reading only", truncation_for_readers),
    ("pjdfstest truncate/09: a directory", truncation_of_a_directory),
    ("pjdfstest mkdir/10, open/22: names that are there", names_that_are_there),
    ("pjdfstest open/13: a directory opened for writing", directories_for_writing),
    ("pjdfstest rename/00: over nothing and over a file", renames),
    ("pjdfstest rename/10, 13, 14: between files and directories", renames_of_kinds),
    ("pjdfstest rename/18: a directory into itself", rename_into_itself),
    ("pjdfstest rename/00: the ctime and the inode of what was renamed", inode_of_rename),
    ("pjdfstest rmdir/00, 01, 06, 12: removed, no directory, not empty, dots", removal_of_directories),
    ("pjdfstest unlink/00, 08: removed, and a directory", removal),
    ("pjdfstest unlink/14: a file that is open lives on", open_and_removed),
    ("pjdfstest utimensat/00: both times, with nanoseconds", times),
    ("pjdfstest utimensat/01, 02: now, and left out", times_now_and_omitted),
    ("pjdfstest utimensat/09: times behind 2038 and before 1970", far_times),
    ("pjdfstest chown/00: owners and groups", owners),
    ("pjdfstest mknod/00: a regular file", regular_mknod),
    ("s3fs test_append_file", appends),
    ("s3fs test_truncate_file, test_truncate_upload, test_truncate_empty_file", grown_and_emptied),
    ("s3fs test_truncate_shrink_file", shrunk_while_open),
    ("s3fs test_mv_file, test_mv_to_exist_file", moved),
    ("s3fs test_mv_empty_directory, test_mv_nonempty_directory", moved_directories),
    ("s3fs test_redirects", redirects),
    ("s3fs test_mkdir_rmdir", directories),
    ("s3fs test_list, test_list_many_file", listings),
    ("s3fs test_remove_nonempty_directory", not_empty),
    ("s3fs test_external_directory_creation, test_rm_rf_dir", rm_rf),
    ("s3fs test_rename_before_close", renamed_before_close),
    ("s3fs test_multipart_upload, test_multipart_copy", large_files),
    ("s3fs test_multipart_mix", mixed_writes),
    ("s3fs test_utimens_during_multipart", times_of_large_copies),
    ("s3fs test_special_characters", special_characters),
    ("s3fs test_extended_attributes", extended_attributes),
    ("s3fs test_mtime_file, test_update_time_cp_p, test_update_time_mv", kept_times),
    ("s3fs test_update_time_chmod, chown, xattr, touch, append", moved_times),
    ("s3fs test_copy_file", copied),
    ("s3fs test_write_after_seek_ahead", seek_ahead),
    ("s3fs test_overwrite_existing_file_range", overwritten_range),
    ("s3fs test_concurrent_directory_updates", concurrent_directories),
    ("s3fs test_concurrent_reads, test_concurrent_writes", concurrent_files),
    ("s3fs test_open_second_fd", second_descriptor),
    ("s3fs test_write_multiple_offsets, test_write_multiple_offsets_backwards", offsets),
    ("s3fs test_not_existed_dir_obj, test_file_names_longer_than_posix", deep_directories),
    ("s3fs test_pread_pwrite, test_not_boundary_writes", odd_boundaries),
    ("s3fs test_upload_sparsefile", sparse),
    ("s3fs test_mix_upload_entities", mixed_entities),
    ("s3fs test_statvfs", free_space),
    ("s3fs test_ut_ossfs", written_while_read),
    ("s3fs test_not_existed_file_access, test_chmod_mountpoint", missing_files),
];

/// The error of something that must fail.
#[track_caller]
fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Errno {
    Errno::from_raw(result.unwrap_err().raw_os_error().unwrap())
}

/// Closes a file, with the error that dropping it would lose.
#[track_caller]
fn close(file: File) {
    nix::unistd::close(OwnedFd::from(file)).unwrap();
}

#[track_caller]
fn write(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    close(file);
}

#[track_caller]
fn assert_content(path: &Path, bytes: &[u8]) {
    let found = std::fs::read(path).unwrap();
    assert!(found == bytes, "{} bytes instead of {}, or others", found.len(), bytes.len());
}

/// The names of a directory, without the objects beside exports.
fn names(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let is_sidecar =
        |name: &String| [".status", ".sha256", ".md5"].iter().any(|suffix| name.ends_with(suffix));
    let mut names: Vec<_> = names.filter(|name| !is_sidecar(name)).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o7777
}

fn ctime(path: &Path) -> (i64, i64) {
    let meta = path.metadata().unwrap();
    (meta.ctime(), meta.ctime_nsec())
}

fn modes(d: &Path) {
    write(&d.join("f"), b"x");
    std::fs::create_dir(d.join("d")).unwrap();
    for (name, bits) in [("f", 0o111), ("f", 0o600), ("f", 0o644), ("d", 0o700), ("d", 0o755)] {
        std::fs::set_permissions(d.join(name), Permissions::from_mode(bits)).unwrap();
        assert_eq!(mode(&d.join(name)), bits, "{name}");
    }
}

fn ctime_of_chmod(d: &Path) {
    let f = d.join("f");
    write(&f, b"x");
    let (before, modified) = (ctime(&f), f.metadata().unwrap().modified().unwrap());
    std::fs::set_permissions(&f, Permissions::from_mode(0o600)).unwrap();
    assert!(ctime(&f) > before, "the ctime stays");
    assert_eq!(f.metadata().unwrap().modified().unwrap(), modified, "the mtime moves");
}

fn mode_at_creation(d: &Path) {
    let before = nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    for (name, asked, umask, given) in [
        ("a", 0o755, 0, 0o755),
        ("b", 0o600, 0, 0o600),
        ("c", 0o666, 0o022, 0o644),
        ("e", 0o777, 0o077, 0o700),
    ] {
        nix::sys::stat::umask(Mode::from_bits_truncate(umask));
        let f = d.join(name);
        close(OpenOptions::new().write(true).create(true).mode(asked).open(&f).unwrap());
        assert_eq!(mode(&f), given, "a file {asked:o} under {umask:o}");
        let sub = d.join(format!("{name}.d"));
        std::fs::DirBuilder::new().mode(asked).create(&sub).unwrap();
        assert_eq!(mode(&sub), given, "a directory {asked:o} under {umask:o}");
    }
    nix::sys::stat::umask(before);
}

/// Every operation on a path, with its error.
fn all_errors(path: &Path) -> Vec<(&'static str, Errno)> {
    let parent = path.parent().unwrap();
    let other = parent.parent().unwrap().join("other");
    write(&other, b"x");
    let time = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
    vec![
        ("stat", errno(path.metadata())),
        ("open", errno(File::open(path))),
        ("create", errno(File::create(path))),
        ("mkdir", errno(std::fs::create_dir(path))),
        ("chmod", errno(std::fs::set_permissions(path, Permissions::from_mode(0o600)))),
        ("truncate", errno(nix::unistd::truncate(path, 1).map_err(std::io::Error::from))),
        ("rename from", errno(std::fs::rename(path, parent.parent().unwrap().join("to")))),
        ("rename to", errno(std::fs::rename(&other, path))),
        ("unlink", errno(std::fs::remove_file(path))),
        ("rmdir", errno(std::fs::remove_dir(path))),
        ("utimensat", errno(time)),
    ]
}

fn not_a_directory(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    write(&d.join("d/f"), b"x");
    for (what, found) in all_errors(&d.join("d/f/x")) {
        assert_eq!(found, Errno::ENOTDIR, "{what}");
    }
}

fn no_entry(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    for (what, found) in all_errors(&d.join("d/none/x")) {
        assert_eq!(found, Errno::ENOENT, "{what}");
    }
}

fn long_names(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    for length in [200, 240, 249, 250, 255] {
        let name = "n".repeat(length);
        write(&d.join(&name), b"long");
        assert_content(&d.join(&name), b"long");
        assert!(names(d).contains(&name), "{length} bytes are not listed");
        std::fs::rename(d.join(&name), d.join("short")).unwrap();
        std::fs::rename(d.join("short"), d.join(&name)).unwrap();
        std::fs::remove_file(d.join(&name)).unwrap();
        std::fs::create_dir(d.join(&name)).unwrap();
        std::fs::remove_dir(d.join(&name)).unwrap();
    }
    for (what, found) in all_errors(&d.join("d").join("n".repeat(256))) {
        assert_eq!(found, Errno::ENAMETOOLONG, "{what}");
    }
}

fn long_paths(d: &Path) {
    let path = (0..1000).fold(d.to_owned(), |path, _| path.join("long"));
    assert_eq!(errno(path.metadata()), Errno::ENAMETOOLONG);
    assert_eq!(errno(File::create(path)), Errno::ENAMETOOLONG);
}

fn truncation(d: &Path) {
    let (f, content) = (d.join("f"), Random(1).bytes(5000));
    write(&f, &content);
    nix::unistd::truncate(&f, 1234).unwrap();
    assert_content(&f, &content[..1234]);
    nix::unistd::truncate(&f, 9000).unwrap();
    assert_content(&f, &[&content[..1234], &[0; 9000 - 1234]].concat());
    let file = OpenOptions::new().write(true).open(&f).unwrap();
    file.set_len(77).unwrap();
    file.set_len(100).unwrap();
    close(file);
    assert_content(&f, &[&content[..77], &[0; 23]].concat());
}

fn times_of_truncation(d: &Path) {
    let f = d.join("f");
    write(&f, b"12345");
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::open(&f).unwrap().set_modified(old).unwrap();
    nix::unistd::truncate(&f, 3).unwrap();
    assert!(f.metadata().unwrap().modified().unwrap() > old, "a truncation does not move the mtime");
}

fn huge_truncation(d: &Path) {
    let f = d.join("f");
    write(&f, b"12345");
    let found = errno(nix::unistd::truncate(&f, i64::MAX).map_err(std::io::Error::from));
    assert!([Errno::EFBIG, Errno::EINVAL, Errno::ENOSPC].contains(&found), "{found}");
    assert_eq!(errno(nix::unistd::truncate(&f, -1).map_err(std::io::Error::from)), Errno::EINVAL);
    assert_content(&f, b"12345");
}

fn truncation_for_readers(d: &Path) {
    write(&d.join("f"), b"12345");
    assert_eq!(errno(File::open(d.join("f")).unwrap().set_len(1)), Errno::EINVAL);
    assert_content(&d.join("f"), b"12345");
}

fn truncation_of_a_directory(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    assert_eq!(errno(nix::unistd::truncate(&d.join("d"), 0).map_err(std::io::Error::from)), Errno::EISDIR);
}

fn names_that_are_there(d: &Path) {
    write(&d.join("f"), b"x");
    std::fs::create_dir(d.join("d")).unwrap();
    for name in ["f", "d"] {
        assert_eq!(errno(File::create_new(d.join(name))), Errno::EEXIST, "{name}");
        assert_eq!(errno(std::fs::create_dir(d.join(name))), Errno::EEXIST, "{name}");
    }
}

fn directories_for_writing(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    assert_eq!(errno(OpenOptions::new().write(true).open(d.join("d"))), Errno::EISDIR);
    assert_eq!(errno(File::create(d.join("d"))), Errno::EISDIR);
    assert_eq!(errno(File::open(d.join("d")).unwrap().read(&mut [0])), Errno::EISDIR);
}

fn renames(d: &Path) {
    write(&d.join("a"), b"a");
    std::fs::rename(d.join("a"), d.join("b")).unwrap();
    assert_eq!(names(d), ["b"]);
    write(&d.join("c"), b"c");
    std::fs::rename(d.join("b"), d.join("c")).unwrap();
    assert_eq!(names(d), ["c"]);
    assert_content(&d.join("c"), b"a");
    std::fs::rename(d.join("c"), d.join("c")).unwrap();
    assert_content(&d.join("c"), b"a");
    std::fs::create_dir(d.join("d")).unwrap();
    std::fs::rename(d.join("c"), d.join("d/c")).unwrap();
    assert_eq!((names(d), names(&d.join("d"))), (vec!["d".to_owned()], vec!["c".to_owned()]));
}

fn renames_of_kinds(d: &Path) {
    write(&d.join("f"), b"f");
    std::fs::create_dir(d.join("d")).unwrap();
    std::fs::create_dir(d.join("e")).unwrap();
    write(&d.join("e/x"), b"x");
    assert_eq!(errno(std::fs::rename(d.join("f"), d.join("d"))), Errno::EISDIR);
    let found = errno(std::fs::rename(d.join("d"), d.join("f")));
    // Directories are copied, not renamed: programs do that by themselves.
    assert!([Errno::ENOTDIR, Errno::EXDEV].contains(&found), "{found}");
    let found = errno(std::fs::rename(d.join("d"), d.join("e")));
    assert!([Errno::ENOTEMPTY, Errno::EXDEV].contains(&found), "{found}");
    assert_eq!(names(d), ["d", "e", "f"]);
}

fn rename_into_itself(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    let found = errno(std::fs::rename(d.join("d"), d.join("d/d")));
    assert!([Errno::EINVAL, Errno::EXDEV].contains(&found), "{found}");
}

fn inode_of_rename(d: &Path) {
    write(&d.join("a"), b"a");
    let before = d.join("a").metadata().unwrap();
    // Stores have times of whole seconds: a copy's is another one in the next.
    while SystemTime::now().duration_since(before.modified().unwrap()).unwrap().as_secs() < 1 {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::rename(d.join("a"), d.join("b")).unwrap();
    let after = d.join("b").metadata().unwrap();
    assert_eq!(after.modified().unwrap(), before.modified().unwrap(), "a rename moves the mtime");
    let facts = |meta: &std::fs::Metadata| (meta.ino(), meta.len(), meta.mode(), meta.nlink());
    assert_eq!(facts(&after), facts(&before));
    // And again, from what the first one set.
    std::fs::rename(d.join("b"), d.join("c")).unwrap();
    assert_eq!(d.join("c").metadata().unwrap().modified().unwrap(), before.modified().unwrap());
}

fn removal_of_directories(d: &Path) {
    std::fs::create_dir(d.join("d")).unwrap();
    write(&d.join("d/f"), b"x");
    assert_eq!(errno(std::fs::remove_dir(d.join("d"))), Errno::ENOTEMPTY);
    assert_eq!(errno(std::fs::remove_dir(d.join("d/f"))), Errno::ENOTDIR);
    assert_eq!(errno(std::fs::remove_dir(d.join("d/."))), Errno::EINVAL);
    assert_eq!(errno(std::fs::remove_dir(d.join("d/.."))), Errno::ENOTEMPTY);
    std::fs::remove_file(d.join("d/f")).unwrap();
    std::fs::remove_dir(d.join("d")).unwrap();
    assert_eq!(names(d), [""; 0]);
    assert_eq!(errno(d.join("d").metadata()), Errno::ENOENT);
}

fn removal(d: &Path) {
    write(&d.join("f"), b"x");
    std::fs::create_dir(d.join("d")).unwrap();
    std::fs::remove_file(d.join("f")).unwrap();
    assert_eq!(errno(d.join("f").metadata()), Errno::ENOENT);
    assert_eq!(errno(std::fs::remove_file(d.join("d"))), Errno::EISDIR);
}

fn open_and_removed(d: &Path) {
    let f = d.join("f");
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&f).unwrap();
    file.write_all(b"hello").unwrap();
    std::fs::remove_file(&f).unwrap();
    assert_eq!(errno(f.metadata()), Errno::ENOENT);
    assert_eq!(file.metadata().unwrap().len(), 5);
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all_at(b"HE", 0).unwrap();
    let mut read = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut read).unwrap();
    assert_eq!(read, "HEllo");
    file.set_len(2).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 2);
    close(file);
    assert_eq!(names(d), [""; 0]);
}

fn set_times(path: &Path, accessed: (i64, i64), modified: (i64, i64)) {
    let time = |(seconds, nanos)| nix::sys::time::TimeSpec::new(seconds, nanos);
    let here = nix::fcntl::AT_FDCWD;
    let flag = nix::sys::stat::UtimensatFlags::FollowSymlink;
    nix::sys::stat::utimensat(here, path, &time(accessed), &time(modified), flag).unwrap();
}

fn modified(path: &Path) -> (i64, i64) {
    let meta = path.metadata().unwrap();
    (meta.mtime(), meta.mtime_nsec())
}

fn times(d: &Path) {
    write(&d.join("f"), b"x");
    std::fs::create_dir(d.join("d")).unwrap();
    for name in ["f", "d"] {
        set_times(&d.join(name), (1_900_000_000, 1), (1_950_000_000, 123_456_789));
        assert_eq!(modified(&d.join(name)), (1_950_000_000, 123_456_789), "{name}");
    }
}

fn times_now_and_omitted(d: &Path) {
    let f = d.join("f");
    write(&f, b"x");
    set_times(&f, (1_000_000, 0), (1_000_000, 5));
    set_times(&f, (2_000_000, 0), (0, libc::UTIME_OMIT));
    assert_eq!(modified(&f), (1_000_000, 5), "what was left out");
    set_times(&f, (2_000_000, 0), (0, libc::UTIME_NOW));
    let age = f.metadata().unwrap().modified().unwrap().elapsed().unwrap_or_default();
    assert!(age < Duration::from_secs(600), "now is {age:?} ago");
}

fn far_times(d: &Path) {
    let f = d.join("f");
    write(&f, b"x");
    for seconds in [4_294_967_296, 2_147_483_648, 1, -1_000_000] {
        set_times(&f, (seconds, 0), (seconds, 0));
        assert_eq!(modified(&f), (seconds, 0));
    }
}

fn owners(d: &Path) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    write(&d.join("f"), b"x");
    std::fs::create_dir(d.join("d")).unwrap();
    for name in ["f", "d"] {
        std::os::unix::fs::chown(d.join(name), Some(123), Some(456)).unwrap();
        std::os::unix::fs::chown(d.join(name), None, Some(7)).unwrap();
        let meta = d.join(name).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (123, 7), "{name}");
    }
}

fn regular_mknod(d: &Path) {
    nix::sys::stat::mknod(&d.join("f"), SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0).unwrap();
    assert_eq!(d.join("f").metadata().unwrap().len(), 0);
    let again = nix::sys::stat::mknod(&d.join("f"), SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0);
    assert_eq!(again.unwrap_err(), Errno::EEXIST);
    write(&d.join("f"), b"x");
    assert_content(&d.join("f"), b"x");
}

fn appends(d: &Path) {
    let f = d.join("f");
    let mut whole = Vec::new();
    for number in 0..10 {
        let line = format!("line {number}\n");
        let mut file = OpenOptions::new().append(true).create(true).open(&f).unwrap();
        file.write_all(line.as_bytes()).unwrap();
        close(file);
        whole.extend(line.bytes());
    }
    assert_content(&f, &whole);
}

fn grown_and_emptied(d: &Path) {
    let f = d.join("f");
    write(&f, b"");
    nix::unistd::truncate(&f, 1024).unwrap();
    assert_content(&f, &[0; 1024]);
    nix::unistd::truncate(&f, 0).unwrap();
    assert_content(&f, b"");
    nix::unistd::truncate(&f, 10 << 20).unwrap();
    assert_content(&f, &vec![0; 10 << 20]);
}

fn shrunk_while_open(d: &Path) {
    let (f, content) = (d.join("f"), Random(2).bytes(200_000));
    let mut file = File::create(&f).unwrap();
    file.write_all(&content).unwrap();
    file.set_len(50_000).unwrap();
    file.write_all_at(&content[..10], 60_000).unwrap();
    close(file);
    assert_content(&f, &[&content[..50_000], &[0; 10_000], &content[..10]].concat());
}

fn moved(d: &Path) {
    let content = Random(3).bytes(100_000);
    write(&d.join("a"), &content);
    write(&d.join("b"), b"b");
    sh(&format!("mv {0}/a {0}/c && mv {0}/c {0}/b", d.display()));
    assert_eq!(names(d), ["b"]);
    assert_content(&d.join("b"), &content);
}

fn moved_directories(d: &Path) {
    sh(&format!(
        "cd {} && mkdir -p a/deep e && echo x > a/deep/f && mv a b && mv e g && cat b/deep/f",
        d.display()
    ));
    assert_eq!(names(d), ["b", "g"]);
    assert_content(&d.join("b/deep/f"), b"x\n");
}

fn redirects(d: &Path) {
    sh(&format!("cd {} && echo a > f && echo b > f && echo c >> f && echo d 1<> f", d.display()));
    assert_content(&d.join("f"), b"d\nc\n");
}

fn directories(d: &Path) {
    sh(&format!("cd {} && mkdir d && rmdir d && mkdir -p d/e/f && rmdir d/e/f d/e d && ls", d.display()));
    assert_eq!(names(d), [""; 0]);
}

fn listings(d: &Path) {
    let expected: Vec<_> = (0..120).map(|number| format!("{number:03}")).collect();
    for name in &expected {
        write(&d.join(name), b"");
    }
    std::fs::create_dir(d.join("d")).unwrap();
    let mut all = expected;
    all.push("d".to_owned());
    assert_eq!(names(d), all);
}

fn not_empty(d: &Path) {
    sh(&format!("cd {} && mkdir d && touch d/f && ! rmdir d 2>/dev/null && test -f d/f", d.display()));
}

fn rm_rf(d: &Path) {
    sh(&format!(
        "cd {} && mkdir -p a/b/c a/d && echo x > a/b/c/f && echo y > a/d/f && echo z > a/f && rm -rf a && test ! -e a",
        d.display()
    ));
    assert_eq!(names(d), [""; 0]);
}

fn renamed_before_close(d: &Path) {
    let mut file = File::create(d.join("a")).unwrap();
    file.write_all(b"foo").unwrap();
    std::fs::rename(d.join("a"), d.join("b")).unwrap();
    file.write_all(b"bar").unwrap();
    close(file);
    assert_eq!(names(d), ["b"]);
    assert_content(&d.join("b"), b"foobar");
}

fn large_files(d: &Path) {
    let content = Random(4).bytes(17 << 20);
    write(&d.join("a"), &content);
    assert_content(&d.join("a"), &content);
    std::fs::rename(d.join("a"), d.join("b")).unwrap();
    assert_content(&d.join("b"), &content);
}

fn mixed_writes(d: &Path) {
    let (f, mut content) = (d.join("f"), Random(5).bytes(17 << 20));
    write(&f, &content);
    let size = content.len();
    for at in [0, 12_345, 8 << 20, (8 << 20) - 3, size - 7, size] {
        let file = OpenOptions::new().write(true).open(&f).unwrap();
        file.write_all_at(b"0123456789", at as u64).unwrap();
        close(file);
        content.resize(content.len().max(at + 10), 0);
        content[at..at + 10].copy_from_slice(b"0123456789");
        assert_content(&f, &content);
    }
}

fn times_of_large_copies(d: &Path) {
    let content = Random(6).bytes(17 << 20);
    write(&d.join("a"), &content);
    set_times(&d.join("a"), (1_000_000, 0), (1_000_000, 0));
    sh(&format!("cp -p {0}/a {0}/b", d.display()));
    assert_eq!(modified(&d.join("b")), (1_000_000, 0));
    assert_content(&d.join("b"), &content);
}

fn special_characters(d: &Path) {
    for name in [
        "special",
        "special?",
        "special*",
        "special~",
        "special\u{b5}",
        "a b",
        "100%",
        "a+b",
        "#x",
        "ä\u{308}",
        "-x",
        "'q'",
        "\"",
    ] {
        write(&d.join(name), name.as_bytes());
        assert_content(&d.join(name), name.as_bytes());
        assert!(names(d).contains(&name.to_owned()), "{name} is not listed");
    }
    assert_eq!(errno(d.join("speciaL").metadata()), Errno::ENOENT);
    std::fs::create_dir(d.join("s p?e~c")).unwrap();
    write(&d.join("s p?e~c/f"), b"x");
    assert_content(&d.join("s p?e~c/f"), b"x");
}

fn extended_attributes(d: &Path) {
    let f = d.join("f");
    write(&f, b"x");
    let line = |line: &str| sh(&line.replace("@F", &f.display().to_string()));
    if !run(command("setfattr").args(["-n", "user.a", "-v", "1"]).arg(&f)).status.success() {
        return support::skip("extended attributes of posix.rs: setfattr is missing");
    }
    line("setfattr -n user.b -v two @F");
    assert_eq!(line("getfattr -n user.b --only-values @F"), "two");
    line("setfattr -n user.b -v 2 @F; setfattr -x user.a @F");
    assert_eq!(line("getfattr -n user.b --only-values @F"), "2");
    let gone = run(command("getfattr").args(["-n", "user.a"]).arg(&f));
    assert!(text(&gone).contains("No such attribute"), "{}", text(&gone));
}

fn kept_times(d: &Path) {
    write(&d.join("a"), b"x");
    set_times(&d.join("a"), (1_000_000, 0), (1_000_000, 500_000_000));
    sh(&format!("cp -p {0}/a {0}/b && mv {0}/a {0}/c && cp -a {0}/c {0}/e", d.display()));
    for name in ["b", "c", "e"] {
        assert_eq!(modified(&d.join(name)), (1_000_000, 500_000_000), "{name}");
    }
}

fn moved_times(d: &Path) {
    let f = d.join("f");
    write(&f, b"x");
    let old = (1_000_000, 0);
    set_times(&f, old, old);
    std::fs::set_permissions(&f, Permissions::from_mode(0o600)).unwrap();
    run(command("setfattr").args(["-n", "user.a", "-v", "1"]).arg(&f));
    assert_eq!(modified(&f), old, "chmod and setfattr keep the mtime");
    let mut file = OpenOptions::new().append(true).open(&f).unwrap();
    file.write_all(b"y").unwrap();
    close(file);
    let appended = modified(&f);
    assert!(appended > old, "an append moves the mtime");
    set_times(&f, old, old);
    sh(&format!("touch {}", f.display()));
    assert!(modified(&f) > old, "touch moves the mtime");
    assert_eq!(mode(&f), 0o600, "a write keeps the mode");
}

fn copied(d: &Path) {
    let content = Random(7).bytes(300_000);
    write(&d.join("a"), &content);
    sh(&format!("cp {0}/a {0}/b && cp {0}/a {0}/b && cmp {0}/a {0}/b", d.display()));
    assert_content(&d.join("b"), &content);
}

fn seek_ahead(d: &Path) {
    let file = File::create(d.join("f")).unwrap();
    file.write_all_at(b"x", 9999).unwrap();
    close(file);
    assert_content(&d.join("f"), &[&[0; 9999][..], b"x"].concat());
}

fn overwritten_range(d: &Path) {
    write(&d.join("f"), &[b'a'; 5000]);
    let file = OpenOptions::new().write(true).open(d.join("f")).unwrap();
    file.write_all_at(&[b'b'; 1000], 2000).unwrap();
    close(file);
    assert_content(&d.join("f"), &[[b'a'; 2000].as_slice(), &[b'b'; 1000], &[b'a'; 2000]].concat());
}

fn concurrent_directories(d: &Path) {
    std::thread::scope(|scope| {
        for thread in 0..5 {
            scope.spawn(move || {
                for round in 0..5 {
                    let f = d.join(format!("{thread}-{round}"));
                    write(&f, b"x");
                    names(d);
                    std::fs::remove_file(f).unwrap();
                }
            });
        }
    });
    assert_eq!(names(d), [""; 0]);
}

fn concurrent_files(d: &Path) {
    let content = Random(8).bytes(1 << 20);
    let file = File::create(d.join("f")).unwrap();
    std::thread::scope(|scope| {
        for (number, piece) in content.chunks(1 << 18).enumerate() {
            let file = &file;
            scope.spawn(move || file.write_all_at(piece, (number << 18) as u64).unwrap());
        }
    });
    close(file);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_content(&d.join("f"), &content));
        }
    });
}

fn second_descriptor(d: &Path) {
    let f = d.join("f");
    let mut first = OpenOptions::new().append(true).create(true).open(&f).unwrap();
    first.write_all(b"foo").unwrap();
    assert_eq!(f.metadata().unwrap().len(), 3);
    let second = File::open(&f).unwrap();
    assert_eq!(second.metadata().unwrap().len(), 3);
    first.write_all(b"bar").unwrap();
    let mut read = String::new();
    (&second).read_to_string(&mut read).unwrap();
    assert_eq!(read, "foobar");
    close(second);
    close(first);
    assert_content(&f, b"foobar");
}

fn offsets(d: &Path) {
    for order in [[0u64, 100_000, 17 << 20], [17 << 20, 100_000, 0]] {
        let file = File::create(d.join("f")).unwrap();
        let mut expected = vec![0; (17 << 20) + 5];
        for at in order {
            file.write_all_at(b"piece", at).unwrap();
            expected[at as usize..at as usize + 5].copy_from_slice(b"piece");
        }
        close(file);
        assert_content(&d.join("f"), &expected);
    }
}

fn deep_directories(d: &Path) {
    let deep: PathBuf = (0..12).fold(d.to_owned(), |path, level| path.join(format!("level-{level}")));
    std::fs::create_dir_all(&deep).unwrap();
    write(&deep.join("f"), b"deep");
    assert_content(&deep.join("f"), b"deep");
    std::fs::remove_dir_all(d.join("level-0")).unwrap();
    assert_eq!(names(d), [""; 0]);
}

fn odd_boundaries(d: &Path) {
    let mut expected = Vec::new();
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(d.join("f")).unwrap();
    for size in [1, 4095, 4097, 131_071, 131_073, 1_048_577] {
        let piece = Random(size as u64).bytes(size);
        file.write_all(&piece).unwrap();
        expected.extend(piece);
        let mut back = vec![0; size];
        file.read_exact_at(&mut back, (expected.len() - size) as u64).unwrap();
        assert!(back == expected[expected.len() - size..], "{size} bytes are not read back");
    }
    close(file);
    assert_content(&d.join("f"), &expected);
}

fn sparse(d: &Path) {
    let f = d.join("f");
    let file = File::create(&f).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"end", (64 << 20) - 3).unwrap();
    close(file);
    let mut tail = [0; 6];
    File::open(&f).unwrap().read_exact_at(&mut tail, (64 << 20) - 6).unwrap();
    assert_eq!(&tail, b"\0\0\0end");
    assert_eq!(f.metadata().unwrap().len(), 64 << 20);
}

fn mixed_entities(d: &Path) {
    // Parts that are sent, parts that are copied and holes in one file.
    let (f, mut content) = (d.join("f"), Random(9).bytes(20 << 20));
    write(&f, &content);
    let file = OpenOptions::new().write(true).open(&f).unwrap();
    file.write_all_at(&[1; 5], 1).unwrap();
    file.write_all_at(&[2; 5], 24 << 20).unwrap();
    close(file);
    content[1..6].copy_from_slice(&[1; 5]);
    content.resize(24 << 20, 0);
    content.extend([2; 5]);
    assert_content(&f, &content);
}

fn free_space(d: &Path) {
    let output = run(command("df").arg(d));
    assert!(output.status.success(), "{}", text(&output));
}

fn written_while_read(d: &Path) {
    let f = d.join("f");
    write(&f, &[b'a'; 10_000]);
    let reader = File::open(&f).unwrap();
    let file = OpenOptions::new().write(true).open(&f).unwrap();
    file.write_all_at(&[b'b'; 10], 0).unwrap();
    close(file);
    let mut start = [0; 10];
    match reader.read_exact_at(&mut start, 0) {
        // One who reads what was replaced is told so, and never gets a mixture.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE)),
        Ok(()) => assert!(start == [b'a'; 10] || start == [b'b'; 10], "{start:?}"),
    }
}

fn missing_files(d: &Path) {
    assert_eq!(errno(File::open(d.join("none"))), Errno::ENOENT);
    assert_eq!(errno(std::fs::read_dir(d.join("none"))), Errno::ENOENT);
    assert_eq!(errno(std::fs::remove_file(d.join("none"))), Errno::ENOENT);
    assert_eq!(errno(std::fs::rename(d.join("none"), d.join("other"))), Errno::ENOENT);
}

#[test]
fn files_and_directories_are_as_their_suites_want_them() {
    if !can_mount() {
        return;
    }
    let mut failed = BTreeMap::<_, Vec<_>>::new();
    for target in targets("posix") {
        let mount = target.mount();
        for (number, (what, case)) in CASES.iter().enumerate() {
            let directory = mount.key(&format!("{number:02}"));
            std::fs::create_dir(&directory).unwrap();
            println!("{} {what}", target.name);
            if std::panic::catch_unwind(|| case(&directory)).is_err() {
                failed.entry(*what).or_default().push(target.name);
            }
        }
        mount.unmount();
    }
    let new: Vec<_> =
        failed.iter().filter(|(what, _)| KNOWN.iter().all(|(known, _)| known != *what)).collect();
    assert!(new.is_empty(), "{new:#?}");
    let mended: Vec<_> = KNOWN.iter().filter(|(what, _)| !failed.contains_key(what)).collect();
    assert!(mended.is_empty(), "mended, and still listed: {mended:?}");
}

/// The table itself is right: an ordinary directory passes all of it.
#[test]
fn an_ordinary_directory_passes_every_case() {
    let directory = tempfile::tempdir().unwrap();
    for (number, (what, case)) in CASES.iter().enumerate() {
        println!("{what}");
        let directory = directory.path().join(format!("{number:02}"));
        std::fs::create_dir(&directory).unwrap();
        case(&directory);
    }
}
