//! The levels of `src/lib.rs`: a module imports lower levels only.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

/// Modules by level, lowest first. Modules of one level do not import each other, but for those named in [`PEERS`].
const LEVELS: [&[&str]; 9] = [
    &["error", "units", "format"],
    &["codec", "extent", "failpoint", "header", "metrics", "policy", "settings", "storage", "vfile"],
    &["image", "layout"],
    &["bucket", "catalog", "convert"],
    &[],
    &["export"],
    &["vfs"],
    &["fuse"],
    &["cli"],
];

/// Imports within a level that are allowed, one way: (from, to).
const PEERS: [(&str, &str); 8] = [
    ("format", "error"),
    ("storage", "extent"),
    ("vfile", "extent"),
    ("catalog", "bucket"),
    ("catalog", "convert"),
    ("codec", "error"),
    ("settings", "error"),
    ("settings", "policy"),
];

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|modules| modules.contains(&module))
}

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Every `crate::module` of a file, outside comments.
fn imports(text: &str) -> Vec<String> {
    let code: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let group = &group[..group.find('}').unwrap()];
            names.extend(group.split(',').map(|n| n.trim().split("::").next().unwrap().to_owned()));
        } else {
            names.push(rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned());
        }
    }
    names
}

#[test]
fn modules_import_lower_levels_only() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    let mut checked = 0;
    let mut wrong = Vec::new();
    for file in files {
        let relative = file.strip_prefix(&source).unwrap();
        let module = relative
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_string_lossy()
            .trim_end_matches(".rs")
            .to_owned();
        if module == "lib" || module == "main" {
            continue;
        }
        let own = level(&module).unwrap_or_else(|| panic!("{module} has no level in tests/architecture.rs"));
        for import in imports(&std::fs::read_to_string(&file).unwrap()) {
            let Some(other) = level(&import) else { continue };
            checked += 1;
            let peer = PEERS.contains(&(module.as_str(), import.as_str()));
            if import != module && other >= own && !peer {
                wrong.push(format!(
                    "{}: {module} (level {own}) imports {import} (level {other})",
                    relative.display()
                ));
            }
        }
    }
    assert!(checked > 100, "the test sees only {checked} imports");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_adapters_know_their_libraries() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    for file in files {
        let relative = file.strip_prefix(&source).unwrap().display().to_string();
        let code = std::fs::read_to_string(&file).unwrap();
        let code: Vec<_> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for (library, owner) in [("fuser::", "fuse"), ("object_store::", "bucket")] {
            let uses = code.iter().any(|line| line.contains(library));
            assert!(
                !uses || relative.starts_with(owner),
                "{relative} uses {library}, which belongs to {owner}"
            );
        }
    }
}
