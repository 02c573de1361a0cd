//! What people see. Names and messages come from images, buckets and stores: no terminal shall take any of it for a command,
//! and no line for two. Everything that the program prints goes through here.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use super::FAILED;
use crate::error::{is_unsafe, redacted, shown};

/// Longest line for people, in bytes.
const MAX_LINE: usize = 8 << 10;

/// A word or a name from outside as a part of a line.
pub(super) fn plain(text: impl Display) -> String {
    let text = text.to_string();
    shown(&redacted(&text), MAX_LINE).into_owned()
}

/// Prints a line on standard output.
pub(super) fn say(text: impl Display) {
    print(&plain(text));
}

/// Prints a line on standard error.
pub(super) fn say_error(text: impl Display) {
    // There is nowhere to tell that it failed.
    let _ = writeln!(io::stderr(), "{}", plain(text));
}

/// Prints a value as JSON on standard output.
pub(super) fn say_json(value: &impl Serialize) {
    print(&json(value));
}

/// Indented JSON, in which characters that a terminal may act on are escaped too: JSON itself demands it below U+0020 only.
fn json(value: &impl Serialize) -> String {
    let json =
        serde_json::to_string_pretty(value).expect("documents have only string keys and finite numbers");
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        // Others than newlines are within strings only.
        match c {
            // None of them is beyond U+FFFF.
            c if c != '\n' && is_unsafe(c) => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

/// Prints what is safe. A reader that has gone away wants no more; whatever else hinders is a failure.
fn print(text: &str) {
    let mut output = io::stdout().lock();
    if let Err(error) = writeln!(output, "{text}").and_then(|()| output.flush()) {
        if error.kind() != io::ErrorKind::BrokenPipe {
            say_error(format_args!("freightfs: cannot write to standard output: {error}"));
        }
        std::process::exit(FAILED.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_acts_on_passes() {
        let hostile = "a\x1b]0;owned\x07b\r\nc\u{9b}2J\u{202e}d\u{7f}ä\t";
        assert_eq!(plain(hostile), "a\\u{1b}]0;owned\\u{7}b\\r\\nc\\u{9b}2J\\u{202e}d\\u{7f}ä\\t");
        let json = json(&[hostile]);
        assert!(json.chars().all(|c| c == '\n' || !is_unsafe(c)), "{json}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&json).unwrap(), [hostile]);
    }

    /// Whoever prints otherwise prints what nobody has escaped.
    #[test]
    fn everything_is_printed_here() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli");
        let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let mut seen = 0;
        for file in files.filter(|file| !file.ends_with("terminal.rs")).chain(["src/cli.rs".into()]) {
            let text = std::fs::read_to_string(&file).unwrap();
            for word in ["println!(", "print!(", "stderr()", "stdout()"] {
                let uses = text.lines().filter(|line| {
                    let asks = line.contains("is_terminal") || line.contains("use_stderr");
                    line.contains(word) && !asks
                });
                let known = ["convert.rs", "daemon.rs", "log.rs"].iter().any(|name| file.ends_with(name))
                    || text.contains("clap_complete::generate");
                assert!(
                    uses.count() == 0 || known && !word.contains("print"),
                    "{} in {}",
                    word,
                    file.display()
                );
            }
            seen += 1;
        }
        assert!(seen > 12);
    }
}
