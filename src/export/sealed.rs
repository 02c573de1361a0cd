//! JSON with a checksum in its last field: what is read of it is what was written, whatever was between.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What stands between the text and its checksum, which are eight hexadecimal digits.
pub(super) const SUM: &str = ",\"sum\":\"";
const SUM_END: &str = "\"}";
const SUM_LENGTH: usize = SUM.len() + 8 + SUM_END.len();

/// A JSON object as a line with its checksum and its end.
pub(crate) fn sealed(value: &impl Serialize) -> serde_json::Result<String> {
    let mut text = serde_json::to_string(value)?;
    let sum = checksum(&text);
    text.truncate(text.len() - 1);
    Ok(format!("{text}{SUM}{sum:08x}{SUM_END}\n"))
}

/// What was sealed, if it is whole.
pub(crate) fn unsealed<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let text = std::str::from_utf8(line).ok()?.trim_end_matches('\n');
    let (text, sum) = text.split_at_checked(text.len().checked_sub(SUM_LENGTH)?)?;
    let sum = u32::from_str_radix(sum.strip_prefix(SUM)?.strip_suffix(SUM_END)?, 16).ok()?;
    let text = format!("{text}}}");
    (sum == checksum(&text)).then(|| serde_json::from_str(&text).ok()).flatten()
}

/// The same, or what an earlier version wrote without a checksum.
pub(crate) fn opened<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let is_sealed = || {
        let text = std::str::from_utf8(line).ok()?.trim_end_matches('\n');
        Some(text.get(text.len().checked_sub(SUM_LENGTH)?..)?.starts_with(SUM))
    };
    match is_sealed() {
        Some(true) => unsealed(line),
        _ => serde_json::from_slice(line).ok(),
    }
}

fn checksum(text: &str) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, text.as_bytes()) as u32
}
