//! The descriptor of a VMDK: what sort of disk it is, and the extents that it is put together from.
//!
//! Source: VMware, "Virtual Disk Format 5.0", "The Descriptor File".

use crate::error::{Error, ErrorKind, Result};
use crate::image::check_name;
use crate::storage::Storage;
use crate::units::{FileOffset, MIB};

/// First bytes of a descriptor that is a file of its own.
pub(in crate::image) const DESCRIPTOR_START: &[u8] = b"# Disk DescriptorFile";

/// Largest descriptor that is read, in bytes.
const MAX_DESCRIPTOR: u64 = MIB;

/// Characters of a line that an error shows.
const LINE_SHOWN: usize = 100;

/// Extents that a disk has at most: 4 TiB in files of 1 GiB.
const MAX_EXTENTS: usize = 4096;

/// What a descriptor says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Descriptor {
    pub(super) create_type: String,
    pub(super) content_id: String,
    pub(super) has_parent: bool,
    pub(super) extents: Vec<ExtentLine>,
}

/// A line of the extent description.
#[derive(Debug, PartialEq)]
pub(super) struct ExtentLine {
    /// How much of the disk it is.
    pub(super) sectors: u64,
    /// `SPARSE`, `FLAT`, `ZERO` …
    pub(super) kind: String,
    /// The file that it is in.
    pub(super) file: Option<String>,
    /// Where in the file it begins, in sectors.
    pub(super) offset: u64,
}

impl Descriptor {
    /// Reads the descriptor of `length` bytes at `at`.
    pub(super) fn read(storage: &dyn Storage, at: FileOffset, length: u64) -> Result<Self> {
        if length > MAX_DESCRIPTOR {
            let what = format!("a descriptor of {length} bytes is too large");
            return Err(Error::unsupported(what).at(at));
        }
        crate::storage::check_range(storage, at, length)?;
        let mut bytes = vec![0; crate::units::memory_size(length)];
        storage.read_exact_at(at, &mut bytes)?;
        let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(text)).map_err(|e| e.at(at))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut descriptor = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if ["RW ", "RDONLY ", "NOACCESS "].iter().any(|access| line.starts_with(access)) {
                let extent = parse_extent(line).ok_or_else(|| {
                    let shown: String = line.chars().take(LINE_SHOWN).collect();
                    Error::corrupt(format!(
                        "line {} of the descriptor is no extent: {shown:?}",
                        number.saturating_add(1)
                    ))
                })?;
                check_name("a file's name", extent.file.as_deref().map_or(0, str::len))?;
                check_name("an extent's type", extent.kind.len())?;
                descriptor.extents.push(extent);
                if descriptor.extents.len() > MAX_EXTENTS {
                    return Err(Error::new(
                        ErrorKind::TooLarge,
                        format!("the descriptor has more than {MAX_EXTENTS} extents"),
                    ));
                }
            } else if let Some((name, value)) = line.split_once('=') {
                let value = value.trim().trim_matches('"');
                check_name("a value", value.len())?;
                match name.trim() {
                    "CID" => descriptor.content_id = value.to_owned(),
                    "createType" => descriptor.create_type = value.to_owned(),
                    "parentCID" => descriptor.has_parent = !value.eq_ignore_ascii_case("ffffffff"),
                    _ => {}
                }
            }
        }
        Ok(descriptor)
    }
}

/// `RW SECTORS KIND ["FILE" [OFFSET]]`.
fn parse_extent(line: &str) -> Option<ExtentLine> {
    let (_access, rest) = line.split_once(' ')?;
    let (sectors, rest) = rest.trim_start().split_once(' ')?;
    let rest = rest.trim_start();
    let (kind, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let (file, offset) = match rest.trim_start().strip_prefix('"') {
        Some(rest) => {
            let (file, after) = rest.split_once('"')?;
            (Some(file.to_owned()), after.trim())
        }
        None => (None, ""),
    };
    // Some writers put a device's id behind the offset.
    let offset = offset.split_whitespace().next().map_or(Some(0), |offset| offset.parse().ok())?;
    Some(ExtentLine { sectors: sectors.parse().ok()?, kind: kind.to_owned(), file, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_and_values_are_read() {
        let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=FFFFFFFF\ncreateType = \"twoGbMaxExtentFlat\"\n\
                    RW 4192256 FLAT \"a b-f001.vmdk\" 0\nRDONLY 10 ZERO\nRW 7 SPARSE \"x\"\nRW 1 FLAT \"y\" 128 dev\n";
        let descriptor = Descriptor::parse(text).unwrap();
        assert_eq!((descriptor.create_type.as_str(), descriptor.has_parent), ("twoGbMaxExtentFlat", false));
        let lines: Vec<_> = descriptor
            .extents
            .iter()
            .map(|e| (e.sectors, e.kind.as_str(), e.file.as_deref(), e.offset))
            .collect();
        assert_eq!(
            lines,
            [
                (4_192_256, "FLAT", Some("a b-f001.vmdk"), 0),
                (10, "ZERO", None, 0),
                (7, "SPARSE", Some("x"), 0),
                (1, "FLAT", Some("y"), 128)
            ]
        );
        assert!(Descriptor::parse("parentCID=12\n").unwrap().has_parent);
        for bad in ["RW x FLAT \"a\" 0", "RW 1", "RW 1 FLAT \"a", "RW 1 FLAT \"a\" -5"] {
            assert!(Descriptor::parse(bad).is_err(), "{bad}");
        }
        assert!(Descriptor::parse(&"RW 1 ZERO\n".repeat(5000)).is_err());
    }
}
