//! URLs, as people are shown them: without what may be a secret.
//!
//! A signed URL has its signature in the query, and so have keys of shared access; before the host stand a name and a
//! password, and a fragment may be anything. Stores' clients quote the URLs of their requests in their errors.

use std::borrow::Cow;

/// Stands where something was left out.
const CUT: &str = "…";

/// `text` with every URL in it without user, password, query and fragment. Applied twice it is the same as once.
///
/// Whatever follows `?` or `#` is left out up to the next blank, quotation mark or angle bracket, so that a key which has
/// such a character is cut too: nothing tells it from a query.
pub fn redacted(text: &str) -> Cow<'_, str> {
    let Some(first) = text.find("://") else { return Cow::Borrowed(text) };
    let mut shown = text[..first].to_owned();
    let mut rest = &text[first..];
    while let Some(url) = rest.strip_prefix("://") {
        let end = url.find(|c: char| c.is_whitespace() || "\"<>`".contains(c)).unwrap_or(url.len());
        let next = url.find("://").unwrap_or(url.len());
        let (url, after) = url.split_at(end.min(next));
        let before = shown.rsplit(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
        let has_port = !["", "s3", "az", "gs"].contains(&before);
        shown.push_str("://");
        push_redacted(&mut shown, url, has_port);
        let next = after.find("://").unwrap_or(after.len());
        shown.push_str(&after[..next]);
        rest = &after[next..];
    }
    Cow::Owned(shown)
}

/// A URL without its scheme, where a host may have a port or not.
fn push_redacted(shown: &mut String, url: &str, has_port: bool) {
    let end = url.find(['?', '#']).unwrap_or(url.len());
    // A password may have any of these, where somebody did not escape it.
    let user = if url[..end].contains('/') { in_path(&url[..end], has_port) } else { url.rfind('@') };
    let rest = user.map_or(url, |at| &url[at..]);
    let (path, query) = rest.find(['?', '#']).map_or((rest, ""), |at| rest.split_at(at));
    if user.is_some() {
        shown.push_str(CUT);
    }
    shown.push_str(path);
    if let Some(mark) = query.chars().next() {
        shown.push(mark);
        shown.push_str(CUT);
    }
}

/// Where user and password end. They may have a slash: then no port follows the first colon.
fn in_path(path: &str, has_port: bool) -> Option<usize> {
    let authority = path.split('/').next().unwrap_or_default();
    let is_port = |port: &str| has_port && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let is_host =
        authority.starts_with('[') || authority.split_once(':').is_none_or(|(_, port)| is_port(port));
    if is_host { authority.rfind('@') } else { path.rfind('@') }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_urls_are_not_shown_and_the_rest_is() {
        for (text, expected) in [
            ("no URL: a?b#c@d", "no URL: a?b#c@d"),
            ("s3://b/web/me@home.raw is gone", "s3://b/web/me@home.raw is gone"),
            ("https://h:8443/d/w.qcow2?X-Amz-Signature=SECRET&a=b", "https://h:8443/d/w.qcow2?…"),
            ("GET http://key:SECRET@h/b/k?sig=SE%2FCRET: refused", "GET http://…@h/b/k?… refused"),
            ("s3://AKIA:SEC/RET@bucket/key", "s3://…@bucket/key"),
            ("s3://SECRET@bucket", "s3://…@bucket"),
            ("http://[::1]:9000/me@x", "http://[::1]:9000/me@x"),
            (
                "url (\"http://h/?sig=SECRET\"), then http://a:SECRET@h/#SECRET and <az://c/k?SECRET>",
                "url (\"http://h/?…\"), then http://…@h/#… and <az://c/k?…>",
            ),
            ("http://h/x://y:SECRET@z?SECRET", "http://h/x://…@z?…"),
            ("s3://AKIA:/HIDDEN@bucket/k", "s3://…@bucket/k"),
            ("s3://AKIA:123/45@bucket", "s3://…@bucket"),
            ("http://key:SECR?ET@h", "http://…@h"),
            ("http://h:/SECRET@x", "http://…@x"),
            ("://u:123/SECRET@h", "://…@h"),
            ("://", "://"),
        ] {
            let once = redacted(text).into_owned();
            assert_eq!(once, expected);
            assert_eq!(redacted(&once), once);
        }
    }
}
