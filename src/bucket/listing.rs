//! Listings of stores, without what object_store's paths cannot have: one such key makes it refuse the whole answer.

use object_store::path::Path;

/// The elements of a listing, and those in them that name an object or a directory: S3 API Reference, "ListObjectsV2";
/// Blob service REST API, "List Blobs".
const ENTRIES: [(&str, &str); 4] =
    [("Contents", "Key"), ("CommonPrefixes", "Prefix"), ("Blob", "Name"), ("BlobPrefix", "Name")];

/// Whether a request with this query asks for a listing.
pub(super) fn is_listing(query: &str) -> bool {
    query.split('&').any(|pair| pair == "list-type=2" || pair == "comp=list")
}

/// The listing without entries that cannot be shown, and the name of one of them; `None` when there are none.
pub(super) fn without_unshown(listing: &str) -> Option<(String, String)> {
    let (mut text, mut unshown) = (listing.to_owned(), None);
    for (entry, name) in ENTRIES {
        let (start, end) = (format!("<{entry}>"), format!("</{entry}>"));
        let mut kept = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(at) = rest.find(&start) {
            let Some(length) = rest[at..].find(&end).map(|length| length + end.len()) else { break };
            match named(&rest[at..at + length], name).filter(|name| !can_be_shown(name)) {
                Some(name) => {
                    kept.push_str(&rest[..at]);
                    unshown.get_or_insert(name);
                }
                None => kept.push_str(&rest[..at + length]),
            }
            rest = &rest[at + length..];
        }
        kept.push_str(rest);
        text = kept;
    }
    Some((text, unshown?))
}

/// What an entry's element of that name holds.
pub(super) fn named(entry: &str, name: &str) -> Option<String> {
    let (_, rest) = entry.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(unescaped(text))
}

/// Whether a key, or a prefix with its slash, is a path. One that begins with a slash would be taken for the path without it.
fn can_be_shown(key: &str) -> bool {
    !key.starts_with('/') && Path::parse(key).is_ok()
}

/// The characters that a text in XML means (Extensible Markup Language 1.0, 4.1 and 4.6).
fn unescaped(text: &str) -> String {
    let mut pieces = text.split('&');
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (reference, rest) = piece.split_once(';').unwrap_or((piece, ""));
        let number = reference.strip_prefix('#').map(|number| match number.strip_prefix(['x', 'X']) {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => number.parse(),
        });
        plain.push(match (reference, number) {
            ("amp", _) => '&',
            ("lt", _) => '<',
            ("gt", _) => '>',
            ("quot", _) => '"',
            ("apos", _) => '\'',
            (_, Some(Ok(number))) => char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER),
            _ => char::REPLACEMENT_CHARACTER,
        });
        plain.push_str(rest);
    }
    plain
}

/// For the fuzz targets: what is shown of a listing is less than all of it. Returns whether something is left out.
pub fn fuzz_listing(text: &str) -> bool {
    let shown = without_unshown(text);
    assert!(shown.as_ref().is_none_or(|(shown, _)| shown.len() < text.len()));
    shown.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_cannot_be_shown_are_left_out() {
        let entry = |key: &str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        let good = entry("a/b &amp; c.raw") + &entry("a/");
        let prefixes = "<CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes>";
        let bad: String = ["a//b", "/a", "a/../b", "x&#x1;", "x&#10;"].into_iter().map(entry).collect();
        let page =
            |bad: &str, worse: &str| format!("<L>{bad}{good}{bad}{prefixes}{worse}<Prefix>p//</Prefix></L>");
        let (kept, unshown) =
            without_unshown(&page(&bad, "<CommonPrefixes><Prefix>y//</Prefix></CommonPrefixes>")).unwrap();
        assert_eq!((kept.as_str(), unshown.as_str()), (page("", "").as_str(), "a//b"));
        assert_eq!(without_unshown(&kept), None);
        assert_eq!(without_unshown("<Contents><Key>a//b</Key>"), None);
        let azure = "<Blob><Name>a//b</Name></Blob><BlobPrefix><Name>c/</Name></BlobPrefix>";
        assert_eq!(without_unshown(azure).unwrap().0, "<BlobPrefix><Name>c/</Name></BlobPrefix>");
    }

    #[test]
    fn listings_are_known_by_their_query() {
        assert!(is_listing("delimiter=%2F&list-type=2") && is_listing("restype=container&comp=list"));
        assert!(!is_listing("uploads=&prefix=list-type=2") && !is_listing(""));
    }
}
