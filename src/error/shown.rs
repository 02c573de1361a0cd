//! Text from outside, as people are shown it: names and words of images, objects, sidecars and statuses.
//!
//! Whoever can put a file into a catalog or an object into a bucket chooses such text: its length, and characters that a
//! terminal obeys. Applied twice it is the same as once, so nobody has to know what was done to a text before.

use std::borrow::Cow;

/// Longest name that a sentence quotes, in bytes: one of a file fits.
pub const MAX_SHOWN_NAME: usize = 255;

/// Stands where something was left out.
const CUT: &str = "…";

/// `text` in one line of at most `limit` bytes without anything that a terminal obeys or that changes how what stands
/// beside it reads.
///
/// Control characters, line separators and marks of the direction of writing are escaped as in Rust. What is too long
/// loses its middle: the beginning tells what it is, and the end of a path which file.
pub fn shown(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit && !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    // Of a long text, not all is escaped only to be thrown away.
    let clean = escaped(&cut(text, limit)).into_owned();
    Cow::Owned(cut(&clean, limit).into_owned())
}

/// A name from outside in quotation marks, at most about [`MAX_SHOWN_NAME`] bytes of it, safe to show.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", shown(name, MAX_SHOWN_NAME))
}

/// Whether a terminal obeys a character, or takes it as a mark for how others are to be written.
pub fn is_unsafe(c: char) -> bool {
    let is_mark = |c| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    c.is_control() || is_mark(c)
}

fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) {
            clean.extend(c.escape_default());
        } else {
            clean.push(c);
        }
    }
    Cow::Owned(clean)
}

/// `text` without its middle where it has more than `limit` bytes: two thirds of what is left are its beginning.
fn cut(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let kept = limit.saturating_sub(CUT.len());
    let head = text.floor_char_boundary(kept - kept / 3);
    let tail = text.ceil_char_boundary(text.len() - kept / 3);
    Cow::Owned(format!("{}{CUT}{}", &text[..head], &text[tail..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_escaped_and_other_text_is_as_it_was() {
        for plain in ["", "web01.qcow2", "C:\\disks\\a \"b\".vmdk", "Größe 数字 🙂", "a…b"] {
            assert!(matches!(shown(plain, 64), Cow::Borrowed(text) if text == plain));
        }
        let hostile = "\x1b]0;x\x07\r\n\t\u{9b}31m\u{7f}\u{202e}gpj.exe\u{2028}\u{feff}\0";
        let text = shown(hostile, 1000);
        assert!(!text.contains(is_unsafe), "{text}");
        assert!(text.starts_with("\\u{1b}]0;x\\u{7}\\r\\n\\t\\u{9b}31m"), "{text}");
        assert_eq!(quoted("a\nb"), "\"a\\nb\"");
    }

    #[test]
    fn no_text_is_longer_than_its_limit_and_twice_is_once() {
        for text in
            ["a".repeat(1 << 20), "ü".repeat(1 << 20), "\x1b".repeat(1 << 20), "a\u{202e}🙂".repeat(999)]
        {
            for limit in [3, 4, 5, 16, 255, 2048] {
                let once = shown(&text, limit).into_owned();
                assert!(once.len() <= limit, "{} bytes of {limit}", once.len());
                assert!(once.contains(CUT));
                assert_eq!(shown(&once, limit), once);
            }
        }
        let path = format!("/srv/{}/web.qcow2", "x".repeat(5000));
        let cut = shown(&path, 100);
        assert!(cut.starts_with("/srv/xxx") && cut.ends_with("xxx/web.qcow2"), "{cut}");
    }
}
