//! The structure that the crate documentation describes: levels, no circle between modules, one place that waits.
//!
//! What is still wrong is listed below, and the lists are exact: a new violation fails, and so does one that was
//! mended and is still listed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Imports that do not go to a lower level: (from, to).
const UPWARD: &[(&str, &str)] = &[];

/// Modules whose children import each other in a circle.
const CIRCLES: &[&str] = &[];

/// Modules that wait for asynchronous work and should not. `cli` may, and so may the one function that lets readers,
/// which are synchronous, read an object.
const WAITING: &[&str] = &[];

/// The file with that function.
const BRIDGE: &str = "bucket/object_file.rs";

/// A source file: its module path below the crate, and its code without comments and unit tests.
struct Module {
    path: Vec<String>,
    file: String,
    code: String,
    /// The paths of its `use` lines as written, and of what it names by `crate::` and `super::` elsewhere.
    named: Vec<Vec<String>>,
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

/// All modules but the crate's root and the program.
fn modules() -> Vec<Module> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    files.sort();
    let module = |file: PathBuf| {
        let relative = file.strip_prefix(&source).unwrap();
        let path: Vec<String> =
            relative.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        let text = std::fs::read_to_string(&file).unwrap();
        let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        let lines = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
        let file = relative.to_str().unwrap().to_owned();
        let code = lines.collect::<Vec<_>>().join("\n");
        Module { path, file, named: named(&code), code }
    };
    let modules: Vec<_> = files.into_iter().map(module).collect();
    modules.into_iter().filter(|module| module.file != "lib.rs" && module.file != "main.rs").collect()
}

/// The paths of a `use` tree, each with all its segments.
fn expand(tree: &str, before: &[String], found: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    if let Some((head, group)) = tree.split_once('{') {
        let mut path = before.to_vec();
        path.extend(head.split("::").map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned));
        let group = group.trim_end().strip_suffix('}').unwrap();
        let mut depth = 0;
        let parts = group.split(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        });
        parts.filter(|part| !part.trim().is_empty()).for_each(|part| expand(part, &path, found));
        return;
    }
    let mut path = before.to_vec();
    let tree = tree.split(" as ").next().unwrap();
    path.extend(tree.split("::").map(|segment| segment.trim().to_owned()));
    found.push(path);
}

/// The paths that a file's code names.
fn named(code: &str) -> Vec<Vec<String>> {
    let is_use = |line: &&str| {
        let line = line.trim_start();
        let line =
            line.strip_prefix("pub").map_or(line, |rest| rest.trim_start_matches(|c| c != ' ').trim_start());
        line.starts_with("use ")
    };
    let (mut found, mut rest) = (Vec::new(), String::new());
    for statement in code.split_inclusive(';') {
        let lines: Vec<_> = statement.split('\n').collect();
        let first = lines.iter().position(is_use).unwrap_or(lines.len());
        rest += &lines[..first].join("\n");
        if let Some((_, tree)) = lines[first..].join(" ").split_once("use ") {
            expand(tree.trim_end_matches(';'), &[], &mut found);
        }
    }
    for start in ["crate::", "super::"] {
        for (at, _) in rest.match_indices(start) {
            let path = rest[at..].split(|c: char| !c.is_alphanumeric() && !"_:".contains(c)).next().unwrap();
            // Only the first of `super::super::` begins a path.
            if !rest[..at].ends_with("::") {
                found.push(path.trim_end_matches(':').split("::").map(str::to_owned).collect());
            }
        }
    }
    found
}

/// The tree of modules, with the imports between them.
struct House {
    modules: Vec<Module>,
}

impl House {
    fn new() -> Self {
        Self { modules: modules() }
    }

    fn is_module(&self, path: &[String]) -> bool {
        self.modules.iter().any(|module| module.path == path)
    }

    /// The absolute path that `module` means by `named`; `None` for one of another crate.
    fn absolute(&self, module: &Module, named: &[String]) -> Option<Vec<String>> {
        let mut base = module.path.clone();
        let mut rest = named;
        match rest.first()?.as_str() {
            "crate" => (base, rest) = (Vec::new(), &rest[1..]),
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|segment| segment == "super") {
                    base.pop();
                    rest = &rest[1..];
                }
            }
            child => {
                let path = [&base[..], &[child.to_owned()]].concat();
                if !self.is_module(&path) {
                    return None;
                }
            }
        }
        Some([base, rest.to_vec()].concat())
    }

    /// The module in which the item at `path` stands: followed through what modules on the way import.
    fn owner(&self, path: &[String], hops: usize) -> Vec<String> {
        let depth = (1..=path.len()).rev().find(|&depth| self.is_module(&path[..depth])).unwrap_or(0);
        let (module, item) = path.split_at(depth);
        let found = self.modules.iter().find(|other| other.path == module);
        if let (Some(found), [item, ..], true) = (found, item, hops > 0) {
            let imported = found.named.iter().find(|named| named.last() == Some(item));
            if let Some(imported) = imported.and_then(|named| self.absolute(found, named)) {
                return self.owner(&imported, hops - 1);
            }
        }
        module.to_vec()
    }

    /// All imports: the importing module, and the one that owns what is imported.
    fn imports(&self) -> BTreeSet<(Vec<String>, Vec<String>)> {
        let mut found = BTreeSet::new();
        for module in &self.modules {
            for named in &module.named {
                if let Some(path) = self.absolute(module, named) {
                    found.insert((module.path.clone(), self.owner(&path, 5)));
                }
            }
        }
        found
    }
}

/// The table of the crate documentation: the level of each module.
fn levels() -> BTreeMap<String, usize> {
    let root = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let mut levels = BTreeMap::new();
    for row in root.lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let mut cells = row.split(" | ");
        let (Some(Ok(level)), Some(modules)) = (cells.next().map(str::parse), cells.next()) else { continue };
        for name in modules.split('`').skip(1).step_by(2) {
            assert!(levels.insert(name.to_owned(), level).is_none(), "{name} stands on two levels");
        }
    }
    levels
}

/// Fails unless exactly the violations that are listed were found.
fn assert_exact<T: Ord + std::fmt::Debug>(what: &str, found: &BTreeSet<T>, listed: BTreeSet<T>) {
    let new: Vec<_> = found.difference(&listed).collect();
    assert!(new.is_empty(), "{what}: {new:#?}");
    let mended: Vec<_> = listed.difference(found).collect();
    assert!(mended.is_empty(), "{what}: mended, and still listed in tests/architecture.rs: {mended:?}");
}

#[test]
fn modules_import_lower_levels_only() {
    let (house, levels) = (House::new(), levels());
    for module in &house.modules {
        assert!(levels.contains_key(&module.path[0]), "{} has no level in src/lib.rs", module.path[0]);
    }
    for module in levels.keys() {
        assert!(house.is_module(std::slice::from_ref(module)), "{module} has a level and is no module");
    }
    let mut checked = 0;
    let mut upward = BTreeSet::new();
    for (from, to) in house.imports() {
        let (Some(from), Some(to)) = (from.first(), to.first()) else { continue };
        checked += 1;
        if from != to && levels[to] >= levels[from] {
            upward.insert((from.clone(), to.clone()));
        }
    }
    assert!(checked > 200, "the test sees only {checked} imports");
    let listed = UPWARD.iter().map(|&(from, to)| (from.to_owned(), to.to_owned())).collect();
    assert_exact("imports of the same or a higher level", &upward, listed);
}

/// Whether `to` is reached from `from` by one edge or more.
fn reaches(edges: &BTreeSet<(String, String)>, from: &str, to: &str) -> bool {
    let (mut seen, mut todo) = (BTreeSet::new(), vec![from]);
    while let Some(at) = todo.pop() {
        for (_, next) in edges.iter().filter(|(from, _)| from == at) {
            if next == to {
                return true;
            }
            if seen.insert(next) {
                todo.push(next);
            }
        }
    }
    false
}

/// The children of one module, each with what is below it, form no circle. What a parent and its children have of each
/// other is not counted: a parent composes its children, and they use the types that it defines.
#[test]
fn no_modules_import_each_other_in_a_circle() {
    let house = House::new();
    let mut edges: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
    for (from, to) in house.imports() {
        let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
        if let (Some(a), Some(b)) = (from.get(common), to.get(common)) {
            edges.entry(from[..common].join("::")).or_default().insert((a.clone(), b.clone()));
        }
    }
    assert!(edges.len() > 8, "the test sees only {} modules with children", edges.len());
    let mut circles = BTreeSet::new();
    for (parent, edges) in &edges {
        let children: BTreeSet<_> = edges.iter().map(|(from, _)| from).collect();
        let within: Vec<_> = children.into_iter().filter(|child| reaches(edges, child, child)).collect();
        if !within.is_empty() {
            println!("a circle in {parent}: {within:?}");
            circles.insert(parent.clone());
        }
    }
    assert_exact("circles", &circles, CIRCLES.iter().map(|&name| name.to_owned()).collect());
}

#[test]
fn nothing_waits_but_the_program_and_one_bridge() {
    let mut waiting = BTreeSet::new();
    for module in modules() {
        let waits = module.code.matches("block_on(").count();
        let allowed = match module.file.as_str() {
            BRIDGE => 1,
            _ if module.path[0] == "cli" => usize::MAX,
            _ => 0,
        };
        if waits > allowed {
            println!("{} waits in {waits} places", module.file);
            waiting.insert(module.path[0].clone());
        }
    }
    assert_exact("modules that wait", &waiting, WAITING.iter().map(|&name| name.to_owned()).collect());
}

#[test]
fn only_the_adapters_know_their_libraries() {
    for module in modules() {
        for (library, owner) in [("fuser::", "fuse"), ("object_store::", "bucket")] {
            let uses = module.code.contains(library);
            let file = &module.file;
            assert!(!uses || module.path[0] == owner, "{file} uses {library}, which belongs to {owner}");
        }
    }
}
