//! The manual against the code: every error code, errno, option and metric that is documented, and no other.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use freightfs::error::ErrorKind;
use support::{command, freightfs, has, run, skip, succeed, text};

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name)).unwrap()
}

#[test]
fn the_status_page_lists_every_error_code_with_its_errno() {
    let page = page("freightfs-status.5");
    // Each row is `.BR code " (" ERRNO )`.
    let rows =
        page.lines().filter_map(|line| line.strip_prefix(".BR ")?.strip_suffix(" )")?.split_once(" \" (\" "));
    let documented: Vec<(&str, &str)> = rows.collect();
    let known: Vec<_> = ErrorKind::ALL.iter().map(|kind| (kind.code(), errno_name(kind.errno()))).collect();
    for row in &known {
        assert!(documented.contains(row), "{row:?} is not in the manual");
    }
    assert_eq!(documented.len(), known.len());
}

fn errno_name(errno: i32) -> &'static str {
    let text = format!("{:?}", nix::errno::Errno::from_raw(errno));
    Box::leak(text.into_boxed_str())
}

#[test]
fn the_status_page_lists_every_field() {
    let page = page("freightfs-status.5");
    let fields = "version job_id status progress image bucket key url size bytes_done bytes_uploaded begin_time end_time \
                  eta_seconds md5 sha256 etag client_token repeated host attempt error";
    for field in fields.split_whitespace() {
        assert!(page.contains(field), "{field} is not in the manual");
    }
}

#[test]
fn every_option_of_every_command_is_in_the_manual() {
    let page = page("freightfs.1").replace("\\-", "-");
    let mut options = 0;
    for name in ["mount", "convert", "info", "wait", "status", "jobs", "cancel", "check"] {
        let help = succeed(freightfs().args([name, "--help"]));
        for word in
            help.split(|c: char| c.is_whitespace() || ",=".contains(c)).filter(|w| w.starts_with("--"))
        {
            assert!(page.contains(word), "{word} of {name} is not in the manual");
            options += 1;
        }
        assert!(page.contains(&format!("freightfs {name}")), "{name}");
    }
    assert!(options > 15);
}

/// The keys that a policy may have are those of its types, and the page has all of them.
#[test]
fn the_policy_page_lists_every_key_and_profile() {
    let page = page("freightfs-policy.5");
    let sources = ["src/policy.rs", "src/policy/rule.rs"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text: String = sources.map(|source| std::fs::read_to_string(root.join(source)).unwrap()).concat();
    let mut keys = 0;
    for name in ["struct Limits", "struct Document", "struct Rule", "struct Conditions", "struct Letters"] {
        let (_, after) = text.split_once(&format!("{name} {{")).unwrap();
        for line in after.split("\n}").next().unwrap().lines() {
            let field = line.trim().trim_start_matches("pub ").split_once(": ").map(|(field, _)| field);
            let Some(field) = field.filter(|f| f.chars().all(|c| c.is_ascii_lowercase() || c == '_')) else {
                continue;
            };
            let key = if field == "rules" { "rule" } else { field };
            assert!(page.contains(key), "{key} is not in the manual");
            keys += 1;
        }
    }
    assert!(keys > 25, "{keys} keys");
    for profile in freightfs::policy::Policy::profiles() {
        assert!(page.contains(&format!(".TP\n.B {profile}\n")), "{profile} is not in the manual");
    }
}

#[test]
fn every_format_is_in_the_manual() {
    let (formats, program) = (page("freightfs-formats.7"), page("freightfs.1"));
    for format in freightfs::format::OutputFormat::ALL {
        let row = format!(".TP\n.B .{}\n", format.suffix());
        assert!(formats.contains(&row), "{row:?} is not on the formats page");
        assert!(program.contains(format.suffix()), "{} is not on the program's page", format.suffix());
    }
    for name in ["raw", "qcow2", "vhd", "vhdx", "vmdk", "vdi"] {
        assert!(freightfs::format::ImageFormat::from_name(name).is_some());
        assert!(formats.contains(&format!(".TP\n.B {name}\n")), "{name} is not on the formats page");
    }
}

#[test]
fn the_pages_are_read_without_warnings() {
    if !has("man") {
        return skip("reading the manual pages with man, which is missing");
    }
    for name in [
        "freightfs.1",
        "freightfs-status.5",
        "freightfs-policy.5",
        "freightfs-semantics.7",
        "freightfs-formats.7",
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name);
        let mut man = command("man");
        man.args(["--warnings", "-E", "UTF-8", "-l"]).arg(path).env("MANWIDTH", "80").env("MANPAGER", "cat");
        let output = run(&mut man);
        assert!(output.status.success() && output.stderr.is_empty(), "{name}: {}", text(&output));
        assert!(output.stdout.len() > 1000);
    }
}
