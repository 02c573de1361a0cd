//! What the integration tests share: programs run under a time-out, images, mounts that end with their test.
#![allow(dead_code, unreachable_pub, reason = "each test program uses another part")]

pub mod azure;
pub mod check;
pub mod faulty;
pub mod hostile;
pub mod images;
pub mod mount;
pub mod proxied;
pub mod proxy;
pub mod random;
pub mod reasons;
pub mod s3;
pub mod sparse;
pub mod targets;

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

/// Seconds after which a program of a test is killed.
const LIMIT: &str = "120";

/// A command that is killed when it hangs.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", LIMIT]).arg(program);
    command.env("LC_ALL", "C");
    command
}

/// Runs a command that must succeed; returns its standard output.
pub fn succeed(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?} failed: {}\n{}", output.status, text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command that must fail; returns what it said on standard error.
pub fn fail(command: &mut Command) -> String {
    let output = run(command);
    assert!(!output.status.success(), "{command:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Both outputs of a program.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a line of shell that must succeed.
pub fn sh(line: &str) -> String {
    succeed(command("bash").args(["-euo", "pipefail", "-c", line]))
}

/// The program under test.
pub fn freightfs() -> Command {
    command(env!("CARGO_BIN_EXE_freightfs"))
}

/// Whether a program is installed.
pub fn has(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|o| o.status.success())
}

/// 7-Zip under either of its names.
pub fn seven_zip() -> Option<&'static str> {
    ["7zz", "7z"].into_iter().find(|name| has(name))
}

/// Says that something was not tested: on the output, and in the file that scripts/test prints at the end.
pub fn skip(what: &str) {
    println!("SKIPPED: {what}");
    if let Some(path) = std::env::var_os("FREIGHTFS_SKIPS") {
        let file = std::fs::File::options().create(true).append(true).open(path);
        // In one piece: other tests write at the same time.
        let line = format!("SKIPPED: {what}\n");
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// Whether filesystems can be mounted here; says so when not.
pub fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && has("fusermount3");
    if !can {
        skip("tests with real mounts: /dev/fuse or fusermount3 is missing");
    }
    can
}

/// SHA-256 of a file, by the independent program.
pub fn sha256(path: &Path) -> String {
    succeed(command("sha256sum").arg(path))
        .split_whitespace()
        .next()
        .unwrap()
        .trim_start_matches('\\')
        .to_owned()
}

/// Fails unless two files are equal.
pub fn assert_same(a: &Path, b: &Path) {
    succeed(command("cmp").arg(a).arg(b));
}

/// Fails unless qemu-img finds the same disk in both.
pub fn qemu_compare(a: &Path, a_format: &str, b: &Path, b_format: &str) {
    succeed(command("qemu-img").args(["compare", "-f", a_format, "-F", b_format]).arg(a).arg(b));
}
