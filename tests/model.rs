//! A bucket's directory and an ordinary one, driven by the same random operations: the same results, but for what
//! freightfs-semantics(7) lists.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use support::can_mount;
use support::images::Random;
use support::mount::World;
use support::targets::{Target, targets_with};

/// One operation on names below a directory.
#[derive(Clone, Debug)]
enum Op {
    Write {
        name: usize,
        length: usize,
        seed: u64,
    },
    Append {
        name: usize,
        length: usize,
        seed: u64,
    },
    /// Opened for reading and writing without being created.
    WriteAt {
        name: usize,
        at: u64,
        length: usize,
        seed: u64,
    },
    CreateNew {
        name: usize,
    },
    Truncate {
        name: usize,
        length: u64,
    },
    /// Written in two pieces with a hole between, read back through the same open file.
    Mixed {
        name: usize,
        gap: u64,
        seed: u64,
    },
    Read {
        name: usize,
    },
    ReadAt {
        name: usize,
        at: u64,
        length: usize,
    },
    Remove {
        name: usize,
    },
    Rename {
        from: usize,
        to: usize,
    },
    MakeDirectory {
        name: usize,
    },
    RemoveDirectory {
        name: usize,
    },
    List {
        name: usize,
    },
    Chmod {
        name: usize,
        mode: u32,
    },
    SetTime {
        name: usize,
        seconds: i64,
    },
    SetXattr {
        name: usize,
        value: u8,
    },
    GetXattr {
        name: usize,
    },
    Link {
        from: usize,
        to: usize,
    },
    /// Opens a file into one of two slots; what was open there is closed first.
    Open {
        slot: usize,
        name: usize,
        how: How,
    },
    /// Reads the open file, wherever its name leads by now.
    ReadOpen {
        slot: usize,
        at: u64,
        length: usize,
    },
    WriteOpen {
        slot: usize,
        at: u64,
        length: usize,
        seed: u64,
    },
    TruncateOpen {
        slot: usize,
        length: u64,
    },
    StatOpen {
        slot: usize,
    },
    Close {
        slot: usize,
    },
}

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
enum How {
    Read,
    Write,
    ReadWrite,
    /// For both, created where it is missing.
    Create,
    /// For both, created or emptied.
    Empty,
}

/// Files that are open at a time.
const SLOTS: usize = 2;

/// A directory, and what is open of it.
struct Root<'a> {
    path: &'a Path,
    open: [Option<File>; SLOTS],
}

/// Files and directories: a name can be either, and `d/x` needs `d` to be a directory. One has sidecars.
const NAMES: [&str; 8] = ["a", "b", "d", "d/x", "d/y.raw", "e", "e/x", "e/f"];

/// Operations by name.
fn named_ops() -> impl Strategy<Value = Op> {
    let name = || 0..NAMES.len();
    let length = || prop_oneof![Just(0usize), 1..5000usize, 100_000..300_000usize];
    prop_oneof![
        4 => (name(), length(), any::<u64>()).prop_map(|(name, length, seed)| Op::Write { name, length, seed }),
        2 => (name(), length(), any::<u64>()).prop_map(|(name, length, seed)| Op::Append { name, length, seed }),
        2 => (name(), 0..200_000u64, length(), any::<u64>())
            .prop_map(|(name, at, length, seed)| Op::WriteAt { name, at, length, seed }),
        1 => name().prop_map(|name| Op::CreateNew { name }),
        2 => (name(), 0..250_000u64).prop_map(|(name, length)| Op::Truncate { name, length }),
        1 => (name(), 0..100_000u64, any::<u64>()).prop_map(|(name, gap, seed)| Op::Mixed { name, gap, seed }),
        2 => name().prop_map(|name| Op::Read { name }),
        2 => (name(), 0..200_000u64, 1..100_000usize).prop_map(|(name, at, length)| Op::ReadAt { name, at, length }),
        2 => name().prop_map(|name| Op::Remove { name }),
        3 => (name(), name()).prop_map(|(from, to)| Op::Rename { from, to }),
        3 => name().prop_map(|name| Op::MakeDirectory { name }),
        1 => name().prop_map(|name| Op::RemoveDirectory { name }),
        1 => name().prop_map(|name| Op::List { name }),
        1 => (name(), 0u32..0o1000).prop_map(|(name, mode)| Op::Chmod { name, mode: mode | 0o600 }),
        1 => (name(), 1..2_000_000_000i64).prop_map(|(name, seconds)| Op::SetTime { name, seconds }),
        1 => (name(), any::<u8>()).prop_map(|(name, value)| Op::SetXattr { name, value }),
        1 => name().prop_map(|name| Op::GetXattr { name }),
        1 => (name(), name()).prop_map(|(from, to)| Op::Link { from, to }),
    ]
}

/// Operations by name and on open files.
fn open_ops() -> impl Strategy<Value = Op> {
    // Few names, so that what is open is renamed, replaced and removed.
    let name = || 0..3usize;
    let slot = || 0..SLOTS;
    let length = || prop_oneof![1..5000usize, 100_000..300_000usize];
    let how = prop_oneof![
        Just(How::Read),
        Just(How::Write),
        Just(How::ReadWrite),
        Just(How::Create),
        Just(How::Empty)
    ];
    prop_oneof![
        5 => (slot(), name(), how).prop_map(|(slot, name, how)| Op::Open { slot, name, how }),
        4 => (slot(), 0..200_000u64, 1..100_000usize).prop_map(|(slot, at, length)| Op::ReadOpen { slot, at, length }),
        5 => (slot(), 0..200_000u64, length(), any::<u64>())
            .prop_map(|(slot, at, length, seed)| Op::WriteOpen { slot, at, length, seed }),
        2 => (slot(), 0..250_000u64).prop_map(|(slot, length)| Op::TruncateOpen { slot, length }),
        3 => slot().prop_map(|slot| Op::StatOpen { slot }),
        3 => slot().prop_map(|slot| Op::Close { slot }),
        2 => (name(), length(), any::<u64>()).prop_map(|(name, length, seed)| Op::Write { name, length, seed }),
        1 => (name(), 0..250_000u64).prop_map(|(name, length)| Op::Truncate { name, length }),
        1 => name().prop_map(|name| Op::CreateNew { name }),
        2 => name().prop_map(|name| Op::Read { name }),
        3 => name().prop_map(|name| Op::Remove { name }),
        4 => (name(), name()).prop_map(|(from, to)| Op::Rename { from, to }),
        1 => Just(Op::List { name: 2 }),
        1 => Just(Op::MakeDirectory { name: 2 }),
    ]
}

/// What an operation gave: some words, or the errno.
type Outcome = Result<String, i32>;

fn is_sidecar(name: &str) -> bool {
    [".status", ".sha256", ".md5"].iter().any(|suffix| name.ends_with(suffix))
}

fn list(path: &Path) -> std::io::Result<Vec<String>> {
    let mut names: Vec<_> = std::fs::read_dir(path)?
        .map(|e| e.map(|e| e.file_name().into_string().unwrap()))
        .collect::<Result<_, _>>()?;
    names.retain(|name| !is_sidecar(name));
    names.sort();
    Ok(names)
}

fn perform(root: &mut Root, op: &Op) -> Outcome {
    let path = |name: &usize| -> PathBuf { root.path.join(NAMES[*name]) };
    if let Op::Open { slot, .. } | Op::Close { slot } = op
        && let Some(file) = root.open[*slot].take()
    {
        nix::unistd::close(OwnedFd::from(file)).map_err(|errno| errno as i32)?;
    }
    let open = |slot: &usize| {
        root.open[*slot].as_ref().ok_or_else(|| std::io::Error::from_raw_os_error(libc::EBADF))
    };
    let mut opened = None;
    let mut done = || -> std::io::Result<String> {
        Ok(match op {
            Op::Write { name, length, seed } => {
                std::fs::write(path(name), Random(*seed).bytes(*length))?;
                String::new()
            }
            Op::Append { name, length, seed } => {
                let mut file = OpenOptions::new().append(true).create(true).open(path(name))?;
                file.write_all(&Random(*seed).bytes(*length))?;
                String::new()
            }
            Op::WriteAt { name, at, length, seed } => {
                let file = OpenOptions::new().read(true).write(true).open(path(name))?;
                file.write_all_at(&Random(*seed).bytes(*length), *at)?;
                String::new()
            }
            Op::CreateNew { name } => {
                File::create_new(path(name))?;
                String::new()
            }
            Op::Truncate { name, length } => {
                OpenOptions::new().write(true).open(path(name))?.set_len(*length)?;
                String::new()
            }
            Op::Mixed { name, gap, seed } => {
                let mut file =
                    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path(name))?;
                file.write_all(&Random(*seed).bytes(1000))?;
                file.seek(SeekFrom::Current(*gap as i64))?;
                file.write_all(&Random(*seed).bytes(1000))?;
                file.seek(SeekFrom::Start(0))?;
                let mut all = Vec::new();
                file.read_to_end(&mut all)?;
                digest(&all)
            }
            Op::Read { name } => digest(&std::fs::read(path(name))?),
            Op::ReadAt { name, at, length } => {
                let file = File::open(path(name))?;
                let mut bytes = vec![0; *length];
                let read = file.read_at(&mut bytes, *at)?;
                digest(&bytes[..read])
            }
            Op::Remove { name } => {
                std::fs::remove_file(path(name))?;
                String::new()
            }
            Op::Rename { from, to } => {
                std::fs::rename(path(from), path(to))?;
                String::new()
            }
            Op::MakeDirectory { name } => {
                std::fs::create_dir(path(name))?;
                String::new()
            }
            Op::RemoveDirectory { name } => {
                std::fs::remove_dir(path(name))?;
                String::new()
            }
            Op::List { name } => format!("{:?}", list(&path(name))?),
            Op::Chmod { name, mode } => {
                std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(*mode))?;
                format!("{:o}", path(name).metadata()?.mode() & 0o777)
            }
            Op::SetTime { name, seconds } => {
                let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(*seconds as u64);
                File::open(path(name))?.set_modified(time)?;
                path(name).metadata()?.mtime().to_string()
            }
            Op::SetXattr { name, value } => {
                setxattr(&path(name), *value)?;
                String::new()
            }
            Op::GetXattr { name } => getxattr(&path(name))?,
            Op::Link { from, to } => {
                std::fs::hard_link(path(from), path(to))?;
                String::new()
            }
            Op::Open { slot, name, how } => {
                let (read, write) = match how {
                    How::Read => (true, false),
                    How::Write => (false, true),
                    _ => (true, true),
                };
                let create = matches!(how, How::Create | How::Empty);
                let mut options = OpenOptions::new();
                options.read(read).write(write).create(create).truncate(matches!(how, How::Empty));
                let file = options.open(path(name))?;
                let is_directory = file.metadata()?.is_dir();
                opened = Some((*slot, file));
                format!("directory: {is_directory}")
            }
            Op::ReadOpen { slot, at, length } => {
                let mut bytes = vec![0; *length];
                let read = open(slot)?.read_at(&mut bytes, *at)?;
                digest(&bytes[..read])
            }
            Op::WriteOpen { slot, at, length, seed } => {
                open(slot)?.write_all_at(&Random(*seed).bytes(*length), *at)?;
                String::new()
            }
            Op::TruncateOpen { slot, length } => {
                open(slot)?.set_len(*length)?;
                String::new()
            }
            Op::StatOpen { slot } => {
                let meta = open(slot)?.metadata()?;
                if meta.is_dir() {
                    "a directory".to_owned()
                } else {
                    format!("{} bytes, {} links", meta.len(), meta.nlink())
                }
            }
            Op::Close { .. } => String::new(),
        })
    };
    let outcome = done().map_err(|e| e.raw_os_error().unwrap_or(-1));
    if let Some((slot, file)) = opened {
        root.open[slot] = Some(file);
    }
    outcome
}

fn digest(bytes: &[u8]) -> String {
    let sum =
        bytes.iter().fold(0u64, |sum, &b| sum.wrapping_mul(1_099_511_628_211).wrapping_add(u64::from(b) + 1));
    format!("{} bytes {sum:x}", bytes.len())
}

const XATTR: &str = "user.model";

fn setxattr(path: &Path, value: u8) -> std::io::Result<()> {
    let value = format!("value-{value}");
    Ok(rustix::fs::setxattr(path, XATTR, value.as_bytes(), rustix::fs::XattrFlags::empty())?)
}

fn getxattr(path: &Path) -> std::io::Result<String> {
    let mut value = [0; 100];
    let length = rustix::fs::getxattr(path, XATTR, &mut value[..])?;
    Ok(String::from_utf8(value[..length].to_vec()).unwrap())
}

/// What the manual lists as other than an ordinary directory.
fn is_exception(op: &Op, model: &Root, mount: &Outcome) -> bool {
    match (op, mount) {
        // Directories of a bucket cannot be renamed, only copied; nor is there anything to link to.
        (Op::Rename { from, .. }, Err(libc::EXDEV)) => model.path.join(NAMES[*from]).is_dir(),
        // A store has no object without a key: what was published and lost its name may be gone, and is never another.
        (
            Op::ReadOpen { slot, .. } | Op::WriteOpen { slot, .. } | Op::TruncateOpen { slot, .. },
            Err(libc::ESTALE),
        ) => model.open[*slot].as_ref().is_some_and(|file| file.metadata().unwrap().nlink() == 0),
        (Op::Link { .. }, Err(libc::EPERM)) => true,
        _ => false,
    }
}

/// Everything below a directory: paths, kinds, contents, modes of files.
fn tree(root: &Path, below: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for name in list(&root.join(below)).unwrap() {
        let place = format!("{below}{name}");
        let path = root.join(&place);
        let meta = path.metadata().unwrap();
        if meta.is_dir() {
            lines.push(format!("{place}/"));
            lines.extend(tree(root, &format!("{place}/")));
        } else {
            lines.push(format!("{place} {}", digest(&std::fs::read(&path).unwrap())));
        }
    }
    lines
}

/// Runs a sequence on both. Returns what differs.
fn differs(model: &Path, mounted: &Path, ops: &[Op]) -> Option<String> {
    let [mut model_root, mut mounted_root] = [model, mounted].map(|path| {
        std::fs::create_dir(path).unwrap();
        Root { path, open: Default::default() }
    });
    for (number, op) in ops.iter().enumerate() {
        let seen = perform(&mut mounted_root, op);
        if is_exception(op, &model_root, &seen) {
            continue;
        }
        let expected = perform(&mut model_root, op);
        if seen != expected {
            return Some(format!("operation {number}, {op:?}: {seen:?} instead of {expected:?}"));
        }
    }
    for slot in 0..SLOTS {
        let closed = [&mut mounted_root, &mut model_root].map(|root| perform(root, &Op::Close { slot }));
        if closed[0] != closed[1] {
            return Some(format!("at the end slot {slot} closes with {:?}", closed[0]));
        }
    }
    let (expected, seen) = (tree(model, ""), tree(mounted, ""));
    (expected != seen).then(|| format!("at the end {seen:#?} instead of {expected:#?}"))
}

#[test]
fn a_buckets_directory_is_like_an_ordinary_one() {
    if !can_mount() {
        return;
    }
    for target in targets_with("model", World::in_memory()) {
        if setxattr(&target.world.path("out"), 0).is_err() {
            return support::skip("the reference model: extended attributes are missing here");
        }
        let cases = if target.name == "local" { 300 } else { 30 };
        check_target(&target, &prop::collection::vec(named_ops(), 10..60), cases);
    }
}

#[test]
fn open_files_are_like_ordinary_ones_whatever_becomes_of_their_names() {
    if !can_mount() {
        return;
    }
    for target in targets_with("open", World::in_memory()) {
        let cases = if target.name == "local" { 2000 } else { 200 };
        check_target(&target, &prop::collection::vec(open_ops(), 4..30), cases);
    }
}

/// A number for a longer run, from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The same sequences in every run; `FREIGHTFS_MODEL_SEED` tries others, `FREIGHTFS_MODEL_CASES` more.
fn check_target(target: &Target, sequence: &impl Strategy<Value = Vec<Op>>, cases: u64) {
    let (mount, begun) = (target.mount(), std::time::Instant::now());
    let seed = number("FREIGHTFS_MODEL_SEED").unwrap_or(1);
    let cases = number("FREIGHTFS_MODEL_CASES").unwrap_or(cases);
    let config = Config { rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let mut tried = 0;
    let mut fails = |ops: &[Op]| {
        tried += 1;
        let name = format!("case-{tried}");
        differs(&target.world.out(&name), &mount.key(&name), ops)
    };
    for case in 0..cases {
        let mut tree = sequence.new_tree(&mut runner).unwrap();
        let Some(mut why) = fails(&tree.current()) else { continue };
        // Shrunk by hand, because every attempt needs directories of its own.
        let mut smallest = tree.current();
        for _ in 0..200 {
            if !tree.simplify() {
                break;
            }
            match fails(&tree.current()) {
                Some(still) => (why, smallest) = (still, tree.current()),
                None => {
                    if !tree.complicate() {
                        break;
                    }
                }
            }
        }
        panic!("{} seed {seed}, case {case}: {why}\n{smallest:#?}", target.name);
    }
    println!("{}: {cases} sequences in {} s", target.name, begun.elapsed().as_secs());
    mount.unmount();
}
