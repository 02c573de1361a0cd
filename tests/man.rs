//! The manual against the code: every error code, errno, option and metric that is documented, and no other.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use freightfs::error::ErrorKind;
use freightfs::settings::OPTIONS;
use support::{command, has, run, skip, text};

const PAGES: [&str; 8] = [
    "freightfs.1",
    "mount.freightfs.8",
    "freightfs.toml.5",
    "freightfs-status.5",
    "freightfs-policy.5",
    "freightfs-semantics.7",
    "freightfs-formats.7",
    "freightfs-security.7",
];

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name)).unwrap()
}

/// The names that a struct or an enum of the code declares, one a line.
fn declared(source: &str, head: &str) -> Vec<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(source)).unwrap();
    let (_, body) =
        text.split_once(&format!("{head} {{\n")).unwrap_or_else(|| panic!("{head} is not in {source}"));
    let lines = body
        .lines()
        .take_while(|line| *line != "}")
        .filter(|line| !line.trim_start().starts_with(['/', '#']));
    let name =
        |line: &str| line.trim().trim_start_matches("pub ").split([':', ',']).next().unwrap().to_owned();
    lines.map(name).filter(|name| !name.is_empty()).collect()
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|other| other == word)
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
    let (section, _) = page.split_once(".SH ERROR CODES").unwrap();
    let mut fields = 0;
    for name in ["pub struct Status", "pub struct StatusImage", "pub struct StatusError"] {
        for field in declared("src/export/status.rs", name) {
            assert!(has_word(section, &field), "{field} of {name} is not in the manual");
            fields += 1;
        }
    }
    assert!(fields > 30, "{fields} fields");
}

/// The lists that are made of the definitions in the code stand between these lines.
const BEGIN: &str = ".\\\" generated: ";
const END: &str = ".\\\" end of what is generated\n";

/// A list by the name that its page has for it.
fn generated(name: &str) -> String {
    if let Some(command) = name.strip_prefix("options of ") {
        let mut program = match command {
            "mount.freightfs" => freightfs::cli::helper_command(),
            _ => freightfs::cli::command().find_subcommand(command).unwrap().clone(),
        };
        program = program.disable_help_flag(true);
        let mut section = Vec::new();
        clap_mangen::Man::new(program).render_options_section(&mut section).unwrap();
        let section = String::from_utf8(section).unwrap();
        // The page has headings of its own.
        return section
            .lines()
            .filter(|line| !line.starts_with(".SH"))
            .map(|line| format!("{line}\n"))
            .collect();
    }
    let mut page = roff::Roff::new();
    for option in &OPTIONS {
        let value = option.value.unwrap_or_default();
        let head = match name {
            "mount options" if value.is_empty() => vec![roff::bold(option.word)],
            "mount options" => vec![roff::bold(format!("{}=", option.word)), roff::italic(value)],
            "keys" if option.is_repeated => {
                let (_, value) = value.split_once('=').unwrap();
                let table = format!("[{}]", option.word);
                let value = format!("\"{value}\"");
                vec![roff::bold(table), " ".into(), roff::italic("NAME"), " = ".into(), roff::italic(value)]
            }
            "keys" if value.is_empty() => vec![roff::bold(option.word), " = true".into()],
            "keys" if value.ends_with(":…") => {
                let word = value.trim_end_matches(":…");
                vec![
                    roff::bold(option.word),
                    " = [".into(),
                    roff::italic(format!("\"{word}\"")),
                    ", …]".into(),
                ]
            }
            "keys" if ["N", "SECONDS", "UID", "GID"].contains(&value) => {
                vec![roff::bold(option.word), " = ".into(), roff::italic(value)]
            }
            "keys" => vec![roff::bold(option.word), " = ".into(), roff::italic(format!("\"{value}\""))],
            other => panic!("{other:?} is no list"),
        };
        page.control("TP", []);
        page.text(head);
        page.text([roff::roman(option.text())]);
    }
    page.to_roff()
}

/// The page with all of its lists made anew.
fn regenerated(page: &str) -> String {
    let mut whole = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (name, after) = after.split_once('\n').unwrap();
        let (_, after) = after.split_once(END).unwrap_or_else(|| panic!("no end of {name:?}"));
        whole += &format!("{before}{BEGIN}{name}\n{}{END}", generated(name));
        rest = after;
    }
    whole + rest
}

/// `FREIGHTFS_UPDATE_MAN=1 cargo test --test man` writes them anew.
#[test]
fn the_lists_of_options_are_those_of_the_code() {
    let mut lists = 0;
    for name in PAGES {
        let page = page(name);
        lists += page.matches(BEGIN).count();
        let right = regenerated(&page);
        if right != page && std::env::var_os("FREIGHTFS_UPDATE_MAN").is_some() {
            std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name), &right).unwrap();
        } else {
            assert!(right == page, "{name} has old lists: FREIGHTFS_UPDATE_MAN=1 cargo test --test man");
        }
    }
    let commands = freightfs::cli::command().get_subcommands().count();
    assert_eq!(lists, commands + 3, "a list is missing");
}

/// The keys that a policy may have are those of its types, and the page has all of them.
#[test]
fn the_policy_page_lists_every_key_and_profile() {
    let page = page("freightfs-policy.5");
    let (policy, rule) = ("src/policy.rs", "src/policy/rule.rs");
    let structs =
        [(policy, "Limits"), (policy, "Document"), (rule, "Rule"), (rule, "Conditions"), (rule, "Letters")];
    let mut keys = 0;
    for (source, name) in structs {
        for field in declared(source, &format!("struct {name}")) {
            let key = if field == "rules" { "rule" } else { &field };
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
    let sources = declared("src/format.rs", "pub enum ImageFormat");
    assert!(sources.len() >= 8, "{sources:?}");
    let (_, section) = formats.split_once(".SH WHAT IS READ").unwrap();
    let section = section.split(".SH").next().unwrap();
    for name in sources.iter().map(|name| name.to_lowercase()) {
        assert!(freightfs::format::ImageFormat::from_name(&name).is_some());
        assert!(has_word(section, &name), "{name} is not among the sources of the formats page");
    }
}

#[test]
fn the_pages_are_read_without_warnings() {
    if !has("man") {
        return skip("reading the manual pages with man, which is missing");
    }
    for name in PAGES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name);
        let mut man = command("man");
        man.args(["--warnings", "-E", "UTF-8", "-l"]).arg(path).env("MANWIDTH", "80").env("MANPAGER", "cat");
        let output = run(&mut man);
        assert!(output.status.success() && output.stderr.is_empty(), "{name}: {}", text(&output));
        assert!(output.stdout.len() > 1000);
    }
}

#[test]
fn every_metric_is_in_the_manual() {
    let page = page("freightfs.1");
    let text = freightfs::metrics::Metrics::default().render();
    let mut metrics: Vec<_> =
        text.lines().filter_map(|line| Some(line.strip_prefix("# HELP ")?.split_once(' ')?.0)).collect();
    metrics.sort_unstable();
    let mut documented: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix(".B freightfs_"))
        .map(|m| format!("freightfs_{m}"))
        .collect();
    documented.sort_unstable();
    assert_eq!(documented, metrics);
    for op in text.split("op=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert!(page.contains(op), "the operation {op} is not in the manual");
    }
}

#[test]
fn every_exit_code_is_in_the_manual() {
    // A page has a row for each code, and the code has a constant.
    let codes = |source: &str| -> Vec<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(source);
        let text = std::fs::read_to_string(path).unwrap();
        let constants = text.lines().filter_map(|line| line.strip_prefix("const ")?.split_once(": u8 = "));
        constants.map(|(_, value)| value.trim_end_matches(';').to_owned()).collect()
    };
    let rows = |name: &str| -> Vec<String> {
        let page = page(name);
        let (_, section) = page.split_once(".SH EXIT STATUS").unwrap();
        let section = section.split(".SH").next().unwrap();
        section.lines().filter_map(|line| line.strip_prefix(".B ")).map(str::to_owned).collect()
    };
    // 2 is clap's, for wrong usage; 0 is success everywhere.
    let program = [codes("cli.rs"), vec!["2".to_owned()]].concat();
    assert_eq!(rows("freightfs.1"), program);
    assert_eq!(rows("mount.freightfs.8"), [vec!["0".to_owned()], codes("cli/helper.rs")].concat());
}

/// Each promise of the threat model names tests, and these are there.
#[test]
fn every_promise_of_the_security_page_names_tests_that_are_there() {
    let page = page("freightfs-security.7");
    let (_, model) = page.split_once(".SH THREAT MODEL\n").unwrap();
    let model = model.split(".SH ").next().unwrap();
    let attackers: Vec<_> = model.split(".SS ").skip(1).collect();
    assert_eq!(
        attackers.len(),
        5,
        "a catalog's file, a bucket's object, a neighbour, the store, the network"
    );
    for attacker in attackers {
        let promises: Vec<_> = attacker.split(".TP").skip(1).collect();
        assert!(!promises.is_empty(), "nothing is promised: {attacker}");
        for promise in promises {
            let tests: Vec<_> =
                promise.lines().filter_map(|line| line.strip_prefix(".I ")?.split_once(": ")).collect();
            assert!(!tests.is_empty(), "no test: {promise}");
            for (file, name) in tests {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(format!("{file}.rs"));
                let source = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{file}: {e}"));
                let is_test = source.contains(&format!("#[test]\nfn {name}() {{\n"));
                assert!(is_test, "{file} has no test {name}");
            }
        }
    }
}
