//! Images made to harm, at least one for each thing that readers must withstand, through info, convert and a mount. Each
//! is refused with its reason, or served, in bounded memory. What they cost in steps, `hostile.rs` counts.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
// The harness is the fuzz targets' too, which have no `support`: both have some files of it.
#![allow(clippy::duplicate_mod)]

#[path = "fuzz/harness.rs"]
mod harness;
mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freightfs::format::ImageFormat;
use harness::packed::PackedImage;
use harness::seal::seal;
use harness::seeds;
use support::mount::{Mount, World};
use support::{can_mount, command, freightfs, run, skip, text};

const MIB: u64 = 1 << 20;

/// What readers must withstand. Each has an image below.
const LINES: [&str; 26] = [
    "a disk larger than any that is read",
    "a table that is named twice",
    "a directory that is a hole",
    "blocks that are named more often than they fit into the file",
    "a name that is too long",
    "a compressed unit that is too large, or is none",
    "qcow2: backing files that are URLs, json:, absolute or outside",
    "qcow2: external data files",
    "qcow2: clusters, L1 table and refcount table out of their limits",
    "qcow2: offsets above 2^56",
    "qcow2: features that are unknown, corrupt and dirty images",
    "qcow2: encryption",
    "qcow version 1 and QED",
    "VMDK: flat extents that are files of the host",
    "VMDK: a parent",
    "VMDK: grains, grain tables and directories out of their limits",
    "VHD: parents",
    "VHD: a table that does not cover the disk",
    "VHD: blocks of odd sizes",
    "VHD: footers that disagree",
    "VHDX: tables with more than 2047 entries",
    "VHDX: blocks of odd sizes",
    "VHDX: regions that overlap",
    "VHDX: a log that cannot be replayed",
    "VDI: blocks of another size, parents",
    "wrong checksums",
];

/// A raw disk is what its guest has written, whatever that is.
const RAW: &str = "raw: a guest that writes the header of another format";

struct Case {
    line: &'static str,
    name: String,
    format: ImageFormat,
    image: PackedImage,
    /// Why it is refused; `None` when it is served.
    reason: Option<&'static str>,
}

/// The cases, which are put together one by one.
#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    /// An image that is another one but for bytes at some places; checksums are right.
    fn add(
        &mut self,
        line: &'static str,
        format: ImageFormat,
        file: &[u8],
        changes: &[(u64, &[u8])],
        reason: impl Into<Option<&'static str>>,
    ) {
        let mut image = PackedImage::of(1, file);
        changes.iter().for_each(|(at, bytes)| image.write(*at, bytes));
        seal(format, &mut image);
        self.put(line, format, image, reason);
    }

    fn put(
        &mut self,
        line: &'static str,
        format: ImageFormat,
        image: PackedImage,
        reason: impl Into<Option<&'static str>>,
    ) {
        let extension = match format {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vhd => "vhd",
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vdi => "vdi",
            ImageFormat::Zvhd | ImageFormat::Zvhd2 => "zvhd",
        };
        let name = format!("case-{}.{extension}", self.0.len());
        self.0.push(Case { line, name, format, image, reason: reason.into() });
    }
}

fn qcow2_cases(cases: &mut Cases) {
    let format = ImageFormat::Qcow2;
    let base = seeds::qcow2(16, &[4 << 16 | 1 << 63], "", 0);
    let word = |number: u32| number.to_be_bytes();
    let long = |number: u64| number.to_be_bytes();
    let mut add = |line, changes: &[(u64, &[u8])], reason| cases.add(line, format, &base, changes, reason);
    add(LINES[0], &[(24, &long(2 << 60))], "64 TiB");
    let twice = [long(3 << 16), long(3 << 16)].concat();
    add(LINES[1], &[(24, &long(1 << 30)), (2 << 16, &twice)], "named twice");
    add(LINES[4], &[(8, &long(256)), (16, &word(1024))], "does not lie in the first cluster");
    add(LINES[5], &[(3 << 16, &long(1 << 62 | 4 << 16))], "damaged");
    add(LINES[8], &[(20, &word(8))], "cluster bits");
    add(LINES[8], &[(20, &word(22))], "cluster bits");
    add(LINES[8], &[(36, &word(5 << 20))], "too many");
    add(LINES[8], &[(56, &word(1 << 12))], "refcount table is too large");
    add(LINES[9], &[(40, &long(1 << 57))], "L1 table's offset");
    add(LINES[10], &[(72, &long(1 << 40))], "unknown incompatible");
    add(LINES[10], &[(72, &long(2))], "marked corrupt");
    add(LINES[10], &[(72, &long(1))], "dirty");
    add(LINES[11], &[(32, &word(2))], "LUKS");
    add(LINES[12], &[(4, &word(1))], "version 1");
    add(LINES[12], &[(0, &word(0x5145_4400))], "QED");
    let file = [&word(0x4441_5441)[..], &word(8), b"/etc/pwd"].concat();
    add(LINES[7], &[(72, &long(4)), (112, &file)], "external data file");
    for name in ["json:{\"driver\":\"file\"}", "nbd:localhost:1", "/etc/passwd", "../../etc/passwd"] {
        cases.add(LINES[6], format, &seeds::qcow2(16, &[], name, 0), &[], "not among the files allowed");
    }
    cases.add(RAW, ImageFormat::Raw, &seeds::qcow2(16, &[], "/etc/passwd", 0), &[], None);
}

fn vmdk_cases(cases: &mut Cases) {
    let format = ImageFormat::Vmdk;
    let base = seeds::sparse_extent();
    let word = |number: u32| number.to_le_bytes();
    let long = |number: u64| number.to_le_bytes();
    let mut add = |line, changes: &[(u64, &[u8])], reason| cases.add(line, format, &base, changes, reason);
    add(LINES[0], &[(12, &long(1 << 40))], "64 TiB");
    add(LINES[1], &[(1024, &word(3)), (1028, &word(3))], "named twice");
    add(LINES[5], &[(8, &word(1 << 16)), (20, &long(1 << 14)), (77, &[1])], "compressed grains of");
    add(LINES[15], &[(44, &word(513))], "grain tables of 513");
    add(LINES[15], &[(20, &long(1 << 22))], "grains of");
    add(LINES[15], &[(12, &long(1 << 37))], "grain directory of");
    let mut hole = PackedImage::of(1, &base);
    hole.file_size = 8 * MIB;
    hole.write(12, &long(1 << 26));
    hole.write(56, &long(2048));
    cases.put(LINES[2], format, hole, None);
    let head = "# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\n";
    let mut add =
        |line, rest: &str, reason| cases.add(line, format, format!("{head}{rest}").as_bytes(), &[], reason);
    add(LINES[0], "RW 18014398509481983 ZERO\n", "64 TiB");
    add(LINES[4], &format!("RW 8 FLAT \"{}\" 0\n", "n".repeat(2000)), "1023");
    add(LINES[13], "RW 1 FLAT \"/etc/passwd\" 0\n", "not among the files allowed");
    add(LINES[14], "parentCID=12345678\nparentFileNameHint=\"/etc/passwd\"\nRW 1 ZERO\n", "has a parent");
}

fn vhd_cases(cases: &mut Cases) {
    let format = ImageFormat::Vhd;
    let base = seeds::vhd("", 1);
    let word = |number: u32| number.to_be_bytes();
    let end = base.len() as u64 - 512;
    let mut add = |line, changes: &[(u64, &[u8])], reason| cases.add(line, format, &base, changes, reason);
    add(LINES[3], &[(1536, &word(4).repeat(16))], "more blocks than fit");
    add(LINES[17], &[(512 + 28, &word(3))], "block table has 3 entries");
    add(LINES[18], &[(512 + 32, &word(5000))], "blocks of 5000 bytes");
    add(LINES[18], &[(512 + 32, &word(256))], "blocks of 256 bytes");
    add(LINES[19], &[(end + 68, &[9; 16])], "disagree");
    cases.add(LINES[16], format, &seeds::vhd("..\\..\\p.vhd", 1), &[], "not among the files allowed");
    let mut wrong = PackedImage::of(1, &base);
    wrong.write(70, &[9]);
    wrong.write(end + 70, &[9]);
    cases.put(LINES[25], format, wrong, "checksum");
}

fn vhdx_cases(cases: &mut Cases) {
    let format = ImageFormat::Vhdx;
    let base = seeds::vhdx();
    let (regions, metadata) = (192 << 10, 3 * MIB);
    let mut add = |line, changes: &[(u64, &[u8])], reason| cases.add(line, format, &base, changes, reason);
    let many = 3000u32.to_le_bytes();
    add(LINES[20], &[(regions + 8, &many), (regions + 65536 + 8, &many)], "region table of 3000");
    add(LINES[20], &[(metadata + 10, &many[..2])], "metadata table of 3000");
    add(LINES[21], &[(metadata + (64 << 10), &(3u32 << 20).to_le_bytes())], "blocks of 3145728 bytes");
    let place = metadata.to_le_bytes();
    add(LINES[22], &[(regions + 32, &place), (regions + 65536 + 32, &place)], "overlap");
    let mut log = seeds::logged_vhdx();
    log.write(MIB, &[0; 4]);
    seal(format, &mut log);
    cases.put(LINES[23], format, log, "no valid entry");
    let mut wrong = PackedImage::of(1, &base);
    [64 << 10, 128 << 10].into_iter().for_each(|at| wrong.write(at + 8, &[9]));
    cases.put(LINES[25], format, wrong, "neither of the two headers");
}

fn other_cases(cases: &mut Cases) {
    let vdi = seeds::file(ImageFormat::Vdi);
    let mut add =
        |line, changes: &[(u64, &[u8])], reason| cases.add(line, ImageFormat::Vdi, &vdi, changes, reason);
    add(LINES[0], &[(368, &(1u64 << 50).to_le_bytes())], "64 TiB");
    add(LINES[24], &[(376, &(2u32 << 20).to_le_bytes())], "blocks of");
    add(LINES[24], &[(440, &[1])], "parent");
    let zvhd = seeds::file(ImageFormat::Zvhd);
    let end = zvhd.len() as u64 - 4096;
    let size = [(1u64 << 53).to_le_bytes(), (1u64 << 53).to_le_bytes()].concat();
    cases.add(LINES[0], ImageFormat::Zvhd, &zvhd, &[(40, &size), (end + 40, &size)], "64 TiB");
    let mut wrong = PackedImage::of(1, &zvhd);
    wrong.write(70, &[9]);
    cases.put(LINES[25], ImageFormat::Zvhd, wrong, "checksum");
}

fn cases() -> Vec<Case> {
    let mut cases = Cases::default();
    qcow2_cases(&mut cases);
    vmdk_cases(&mut cases);
    vhd_cases(&mut cases);
    vhdx_cases(&mut cases);
    other_cases(&mut cases);
    for line in LINES {
        let of_line = cases.0.iter().filter(|case| case.line == line).count();
        println!("{of_line:3} {line}");
        assert!(of_line > 0, "there is no image for: {line}");
    }
    cases.0
}

/// Bytes of memory that the commands about an image may have: the program, its threads' stacks, and little else.
const ADDRESSES: &str = "ulimit -v 2000000; exec \"$@\"";

/// Runs the program in bounded memory; what it said when it failed.
fn refusal(arguments: &[&str], file: &Path, rest: &[&Path]) -> Option<String> {
    let program = freightfs();
    let mut bounded = command("bash");
    bounded.args(["-c", ADDRESSES, "bash"]).arg(program.get_args().last().unwrap());
    let output = run(bounded.args(arguments).arg(file).args(rest));
    assert!(output.status.code().is_some_and(|code| code < 100), "{}: {output:?}", file.display());
    (!output.status.success()).then(|| text(&output))
}

#[test]
fn commands_refuse_each_image_with_its_reason_in_bounded_memory() {
    let directory = tempfile::tempdir().unwrap();
    for case in cases() {
        let file = directory.path().join(&case.name);
        case.image.write_to(&file);
        let output = directory.path().join("output.raw");
        let info = refusal(&["info"], &file, &[]);
        let converted = refusal(&["convert", "--quiet"], &file, &[&output]);
        let name = format!("{} ({}, {:?})", case.name, case.line, case.format);
        match case.reason {
            None => assert_eq!((info, converted), (None, None), "{name}"),
            Some(reason) => {
                let said = converted.unwrap_or_else(|| panic!("{name} was converted"));
                assert!(said.contains(reason) && said.contains(&case.name), "{name}: {said}");
                assert!(said.len() < 5000 && info.is_none_or(|said| said.len() < 5000), "{name}");
                assert!(!output.exists(), "{name} left an output");
            }
        }
        let _ = std::fs::remove_file(output);
    }
}

/// Bytes that the daemon may take for an image beyond the image's own.
const BEYOND: u64 = 64 * MIB;

/// Lets the daemon's highest resident memory begin anew; `None` where the kernel does not let this test do so.
fn forget_peak(mount: &Mount) -> Option<u64> {
    std::fs::write(format!("/proc/{}/clear_refs", mount.pid()), "5").ok().map(|()| mount.peak())
}

/// Reads parts of a file: its begin, its middle and its end. The first error.
fn read_parts(path: &Path) -> std::io::Result<()> {
    let size = std::fs::metadata(path)?.len();
    let file = std::fs::File::open(path)?;
    for at in [0, size / 2, size.saturating_sub(4096)] {
        file.read_at(&mut [0; 4096], at)?;
    }
    Ok(())
}

/// Looks at all files of an image of a mount, reads and copies them. What refused it: errno, and why, by image.json or by
/// the status of an export, which must have ended.
fn use_image(mount: &Mount, id: &str) -> Option<(i32, String)> {
    let directory = mount.path("images").join(id);
    let json = std::fs::read_to_string(directory.join("image.json")).unwrap();
    let mut refusal = None;
    for suffix in ["raw", "qcow2"] {
        let (file, key) = (directory.join(format!("{id}.{suffix}")), format!("{id}.{suffix}"));
        let read = read_parts(&file);
        // The largest of those that are served is zeros, which a copy of its raw file would write out.
        if suffix != "raw" && std::fs::copy(&file, mount.key(&key)).is_ok() {
            let status = mount.wait(&key);
            match status["status"].as_str() {
                Some("SUCCESS") => {}
                Some("FAIL") => refusal = Some((libc::EIO, status["error"].to_string())),
                state => panic!("{key}: {state:?}"),
            }
        }
        if let Err(error) = read {
            refusal = Some((error.raw_os_error().unwrap(), refusal.map_or(json.clone(), |(_, why)| why)));
        }
    }
    refusal
}

/// Tells other threads to stop, in a test that has failed too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Reads a good image again and again until told to stop. How often, and how long a read took at most.
fn read_others(mount: &Mount, stop: &AtomicBool) -> (u32, Duration) {
    let (mut reads, mut longest) = (0, Duration::ZERO);
    while !stop.load(Ordering::SeqCst) || reads == 0 {
        let begin = Instant::now();
        assert_eq!(std::fs::read(mount.path("images/good/good.raw")).unwrap(), [7; 4096]);
        longest = longest.max(begin.elapsed());
        reads += 1;
    }
    (reads, longest)
}

#[test]
fn a_mount_refuses_or_serves_each_image_in_bounded_memory_and_others_meanwhile() {
    if !can_mount() {
        return;
    }
    let mut world = World::in_memory();
    world.environment.push(("FREIGHTFS_PART_SIZE".into(), "1".into()));
    let cases = cases();
    for case in &cases {
        case.image.write_to(&world.catalog().join(&case.name));
    }
    std::fs::write(world.catalog().join("good.raw"), [7; 4096]).unwrap();
    let mount = world.mount(&["--formats", "raw:qcow2"]);
    for case in cases {
        let stop = AtomicBool::new(false);
        let id = case.name.split('.').next().unwrap();
        let before = forget_peak(&mount);
        let begin = Instant::now();
        let (refusal, (reads, longest)) = std::thread::scope(|scope| {
            let others = scope.spawn(|| read_others(&mount, &stop));
            let stopping = Stop(&stop);
            let refusal = use_image(&mount, id);
            drop(stopping);
            (refusal, others.join().unwrap())
        });
        let name = format!("{} ({}, {:?})", case.name, case.line, case.format);
        let took = before.map(|before| mount.peak().saturating_sub(before));
        println!("{name}: {:?}, {took:?} bytes; {reads} other reads, at most {longest:?}", begin.elapsed());
        match (case.reason, refusal) {
            (None, None) => {}
            (Some(reason), Some((errno, why))) => {
                assert!(why.contains(reason), "{name}: {why}");
                assert!(
                    [libc::EIO, libc::EPERM, libc::EOPNOTSUPP, libc::EFBIG, libc::ENOKEY].contains(&errno)
                );
            }
            (reason, refusal) => panic!("{name}: {reason:?}, {refusal:?}"),
        }
        match took {
            Some(took) => assert!(took <= BEYOND + case.image.file_size, "{name}: {took} bytes"),
            None => skip("the memory that a hostile image takes: the peak cannot be reset here"),
        }
    }
    mount.unmount();
}

/// The smallest part that the environment asks for is larger than any store takes, which builds with debug assertions
/// find out by panicking.
#[test]
fn a_job_that_panics_fails_says_so_in_the_log_and_leaves_the_mount_alone() {
    if !can_mount() {
        return;
    }
    let mut world = World::in_memory();
    world.environment.push(("FREIGHTFS_PART_SIZE".into(), (1 << 20).to_string()));
    std::fs::write(world.catalog().join("good.raw"), [7; 4096]).unwrap();
    let mount = world.mount(&["--formats", "raw:qcow2"]);
    mount.cp(&mount.path("images/good/good.qcow2"), "good.qcow2");
    let status = mount.wait("good.qcow2");
    assert_eq!(
        (&status["status"], &status["error"]["code"]),
        (&"FAIL".into(), &"internal".into()),
        "{status}"
    );
    assert!(mount.log().contains("a broken invariant: panicked at"), "{}", mount.log());
    assert_eq!(std::fs::read(mount.path("images/good/good.raw")).unwrap(), [7; 4096]);
    mount.unmount();
}
