//! The parent of a differencing VHD: which names it may have, and whether the file found is the right one.

use std::sync::Arc;

use super::VhdImage;
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::format::ImageFormat;
use crate::header::vhd::{LOCATOR_ABSOLUTE, LOCATOR_RELATIVE, VhdDynamicHeader, VhdParentLocator};
use crate::image::{ReferenceGate, ReferenceKind, check_name};
use crate::storage::{Storage, check_range};
use crate::units::FileOffset;

/// Longest path that is read, in bytes: what Windows allows, in UTF-16.
const MAX_PATH: u32 = 2 * 32767;

/// Opens the first of the parent's names that the gate allows.
pub(super) fn open(
    storage: &dyn Storage,
    header: &VhdDynamicHeader,
    gate: &Arc<dyn ReferenceGate>,
    depth: usize,
) -> Result<VhdImage> {
    let names = names(storage, header)?;
    let mut refused = Error::corrupt("is a differencing VHD that does not name its parent");
    for name in &names {
        let file = match gate.open(ReferenceKind::Backing, name) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::ReferenceDenied => {
                refused = error;
                continue;
            }
            Err(error) => return Err(error),
        };
        if file.format.is_some_and(|format| format != ImageFormat::Vhd) {
            return Err(Error::unsupported(format!("the parent {} is not a VHD", quoted(name))));
        }
        let parent = VhdImage::open(file.storage, &file.gate, depth.saturating_add(1))?;
        if parent.unique_id != header.parent_unique_id {
            let what =
                format!("{} is not the disk that this one was made from: its identity differs", quoted(name));
            return Err(Error::corrupt(what));
        }
        return Ok(parent);
    }
    Err(refused)
}

/// The parent's names as paths of this system, the likeliest last, which is the one that a refusal tells.
fn names(storage: &dyn Storage, header: &VhdDynamicHeader) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for code in [LOCATOR_ABSOLUTE, LOCATOR_RELATIVE] {
        for bytes in header.parent_locators.chunks_exact(VhdParentLocator::LENGTH) {
            let locator = VhdParentLocator::parse_first(bytes);
            if let Some(locator) = locator.filter(|locator| locator.platform_code == code) {
                names.push(read_locator(storage, &locator)?);
            }
        }
    }
    names.push(decode(&header.parent_name, u16::from_be_bytes));
    names.retain(|name| !name.is_empty());
    names.iter().try_for_each(|name| check_name("the parent's name", name.len()))?;
    Ok(names)
}

fn read_locator(storage: &dyn Storage, locator: &VhdParentLocator) -> Result<String> {
    let at = FileOffset(locator.data_offset);
    if locator.data_length > MAX_PATH {
        let what = format!("a parent's path of {} bytes is too long", locator.data_length);
        return Err(Error::corrupt(what).at(at));
    }
    check_range(storage, at, locator.data_length.into())?;
    let mut bytes = vec![0; locator.data_length as usize];
    storage.read_exact_at(at, &mut bytes)?;
    Ok(decode(&bytes, u16::from_le_bytes))
}

/// UTF-16 up to its first zero, with slashes for backslashes.
fn decode(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let pairs = bytes.chunks_exact(2).filter_map(|pair| pair.first_chunk().copied());
    let units = pairs.map(unit).take_while(|unit| *unit != 0);
    char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect::<String>()
        .replace('\\', "/")
}
