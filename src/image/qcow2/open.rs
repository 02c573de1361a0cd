//! Opening a qcow2 image: header, extensions, features, references (qcow2.rst, "Header" to "Data file").

use std::sync::Arc;

use super::mapping::{OFFSET_MASK, TableShape};
use super::{Compression, Qcow2Image};
use crate::error::{Error, ErrorKind, Result, quoted};
use crate::format::ImageFormat;
use crate::header;
use crate::header::qcow2::{MAGIC, Qcow2Header, V2_LENGTH, V3_LENGTH};
use crate::image::table::check_disjoint;
use crate::image::{self, DiskImage, ReferenceGate, ReferenceKind};
use crate::storage::Storage;
use crate::units::{FileOffset, MIB, Unit, memory_size};

/// Magic of QED images, which are refused by name.
const QED_MAGIC: u32 = 0x5145_4400;

/// Limits of QEMU (block/qcow2.h): QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE.
const MAX_L1: u64 = 32 * MIB;
const MAX_REFCOUNT_TABLE: u64 = 8 * MIB;

/// Longest name of a backing file (qcow2.rst, "backing_file_size").
const MAX_BACKING_NAME: u64 = image::MAX_NAME as u64;

/// Incompatible features.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Compatible feature: refcounts may be stale.
const LAZY_REFCOUNTS: u64 = 1;

/// Autoclear feature: the external data file is the raw disk.
const RAW_EXTERNAL: u64 = 1 << 1;

/// Header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// What opening finds out.
pub(super) struct Opened {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) data: Arc<dyn Storage>,
    pub(super) backing: Option<Arc<dyn DiskImage>>,
    pub(super) virtual_size: u64,
    pub(super) shape: TableShape,
    pub(super) compression: Compression,
    pub(super) l1: Vec<u64>,
    pub(super) properties: Vec<(String, String)>,
}

/// What header extensions say.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    /// (0 incompatible, 1 compatible, 2 autoclear; bit; name)
    feature_names: Vec<(u8, u8, String)>,
}

pub(super) fn open(
    storage: Arc<dyn Storage>,
    gate: &Arc<dyn ReferenceGate>,
    depth: usize,
) -> Result<Qcow2Image> {
    let header = read_header(&*storage)?;
    check_layout(&header, &*storage)?;
    let extensions = read_extensions(&header, &*storage)?;
    check_features(&header, &extensions)?;
    let l1 = read_l1(&header, &*storage)?;
    let data = match header.incompatible_features & EXTERNAL_DATA {
        0 => Arc::clone(&storage),
        _ => open_data_file(&extensions, gate)?,
    };
    let backing = open_backing(&header, &extensions, &*storage, gate, depth)?;
    let compression = if header.compression_type == 1 { Compression::Zstd } else { Compression::Zlib };
    let shape = TableShape {
        cluster_bits: header.cluster_bits,
        extended: header.incompatible_features & EXTENDED_L2 != 0,
        external_data: header.incompatible_features & EXTERNAL_DATA != 0,
        zero_flag: header.version >= 3,
    };
    let properties = properties(&header, &extensions);
    let virtual_size = header.virtual_size;
    Ok(Qcow2Image::new(Opened { storage, data, backing, virtual_size, shape, compression, l1, properties }))
}

/// Reads the header; fields that its version or length does not have are zero.
fn read_header(storage: &dyn Storage) -> Result<Qcow2Header> {
    let mut bytes = [0; Qcow2Header::LENGTH];
    let present = storage.file_size().min(Qcow2Header::LENGTH as u64);
    storage.read_exact_at(FileOffset(0), bytes.split_at_mut(memory_size(present)).0)?;
    let mut header = Qcow2Header::parse(&bytes);
    match (header.magic, header.version) {
        (QED_MAGIC, _) => return Err(Error::unsupported("is a QED image; convert it with qemu-img")),
        (magic, _) if magic != MAGIC => {
            return Err(Error::corrupt("is not a qcow2 image: the magic is wrong").at(0u64));
        }
        (_, 1) => return Err(Error::unsupported("is a qcow image of version 1; convert it with qemu-img")),
        (_, 2 | 3) => {}
        (_, version) => {
            return Err(Error::unsupported(format!("is a qcow2 image of version {version}")).at(4u64));
        }
    }
    if present < V2_LENGTH.into() {
        return Err(Error::corrupt("the file ends within the header; it is truncated").at(present));
    }
    if header.version == 2 {
        header = Qcow2Header::parse(&zero_after(bytes, V2_LENGTH.into()));
        header.refcount_order = 4;
        header.header_length = V2_LENGTH;
        return Ok(header);
    }
    let length = u64::from(header.header_length);
    if !(104..=1 << 16).contains(&length) || length > storage.file_size() || !length.is_multiple_of(8) {
        return Err(Error::corrupt(format!("the header's length {length} is wrong")).at(100u64));
    }
    Ok(Qcow2Header::parse(&zero_after(bytes, length.min(V3_LENGTH.into()))))
}

fn zero_after(mut bytes: [u8; Qcow2Header::LENGTH], length: u64) -> [u8; Qcow2Header::LENGTH] {
    bytes.iter_mut().skip(memory_size(length)).for_each(|byte| *byte = 0);
    bytes
}

/// Checks that the numbers of the header fit each other and the limits.
fn check_layout(header: &Qcow2Header, storage: &dyn Storage) -> Result<()> {
    if !(9..=21).contains(&header.cluster_bits) {
        return Err(
            Error::corrupt(format!("cluster bits are {}, not 9 to 21", header.cluster_bits)).at(20u64)
        );
    }
    let cluster_size = 1u64 << header.cluster_bits;
    let wrong_offset = |offset: u64| offset >= 1 << 56 || !offset.is_multiple_of(cluster_size);
    image::check_virtual_size(header.virtual_size).map_err(|e| e.at(24u64))?;
    if u64::from(header.header_length) > cluster_size {
        return Err(Error::corrupt("the header is larger than a cluster").at(100u64));
    }
    if u64::from(header.l1_size) * 8 > MAX_L1 {
        return Err(
            Error::corrupt(format!("the L1 table has {} entries, too many", header.l1_size)).at(36u64)
        );
    }
    if wrong_offset(header.l1_table_offset) {
        return Err(Error::corrupt("the L1 table's offset is wrong").at(40u64));
    }
    if wrong_offset(header.refcount_table_offset) || header.refcount_table_offset >= storage.file_size() {
        return Err(Error::corrupt("the refcount table's offset is wrong").at(48u64));
    }
    if u64::from(header.refcount_table_clusters) << header.cluster_bits > MAX_REFCOUNT_TABLE {
        return Err(Error::corrupt("the refcount table is too large").at(56u64));
    }
    if header.refcount_order > 6 {
        return Err(Error::corrupt("the refcount order is above 6").at(96u64));
    }
    if header.incompatible_features & EXTENDED_L2 != 0 && header.cluster_bits < 14 {
        return Err(Error::corrupt("extended L2 entries need clusters of at least 16 KiB").at(20u64));
    }
    let name_end = header.backing_file_offset.checked_add(header.backing_file_size.into());
    if header.backing_file_offset != 0
        && (name_end.is_none_or(|e| e > cluster_size)
            || u64::from(header.backing_file_size) > MAX_BACKING_NAME)
    {
        return Err(Error::corrupt("the backing file's name does not lie in the first cluster").at(8u64));
    }
    Ok(())
}

/// Reads the extensions between the header and the backing file's name or the first cluster's end.
fn read_extensions(header: &Qcow2Header, storage: &dyn Storage) -> Result<Extensions> {
    let cluster_size = 1u64 << header.cluster_bits;
    let end = match header.backing_file_offset {
        0 => cluster_size.min(storage.file_size()),
        offset => offset.min(storage.file_size()),
    };
    let mut extensions = Extensions::default();
    let mut at = u64::from(header.header_length);
    while let Some(room) = end.checked_sub(at).and_then(|left| left.checked_sub(8)) {
        let mut head = [0; 8];
        storage.read_exact_at(FileOffset(at), &mut head)?;
        let (kind, length) = (header::big(&head, 0), u64::from(header::big::<u32>(&head, 4)));
        if kind == EXTENSION_END {
            break;
        }
        if length > room {
            return Err(Error::corrupt(format!(
                "header extension {kind:#010x} is {length} bytes long, too long"
            ))
            .at(at));
        }
        let mut data = vec![0; memory_size(length)];
        storage.read_exact_at(FileOffset(at) + 8, &mut data)?;
        match kind {
            EXTENSION_BACKING_FORMAT => extensions.backing_format = Some(text(&data, "backing format", at)?),
            EXTENSION_DATA_FILE => extensions.data_file = Some(text(&data, "data file's name", at)?),
            EXTENSION_FEATURE_NAMES => extensions.feature_names = feature_names(&data),
            _ => {}
        }
        at = at.saturating_add(8).saturating_add(length.next_multiple_of(8));
    }
    Ok(extensions)
}

fn text(bytes: &[u8], what: &str, at: u64) -> Result<String> {
    image::check_name(what, bytes.len()).map_err(|e| e.at(at))?;
    let not_text = |e| Error::corrupt(format!("the {what} is not UTF-8")).at(at).because(e);
    String::from_utf8(bytes.to_vec()).map_err(|e| not_text(e.utf8_error()))
}

/// Entries of 48 bytes: type, bit, name padded with zeros.
fn feature_names(data: &[u8]) -> Vec<(u8, u8, String)> {
    let feature = |entry: &[u8]| {
        let (kind, rest) = entry.split_first()?;
        let (bit, name) = rest.split_first()?;
        let name = name.split(|&b| b == 0).next().unwrap_or_default();
        Some((*kind, *bit, String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect()))
    };
    data.chunks_exact(48).filter_map(feature).collect()
}

/// Refuses by name what must not be read.
fn check_features(header: &Qcow2Header, extensions: &Extensions) -> Result<()> {
    let features = header.incompatible_features;
    let known = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
    if features & !known != 0 {
        let bits = (0..64u8).filter(|bit| features & !known & 1 << bit != 0);
        let names: Vec<_> = bits
            .map(|bit| {
                let name = extensions.feature_names.iter().find(|(kind, b, _)| *kind == 0 && *b == bit);
                name.map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("{name:?} (bit {bit})"))
            })
            .collect();
        let what = format!("the image has unknown incompatible features: {}", names.join(", "));
        return Err(Error::unsupported(what).at(72u64));
    }
    if features & CORRUPT != 0 {
        let what = "the image is marked corrupt; repair it with `qemu-img check -r all`";
        return Err(Error::corrupt(what).at(72u64));
    }
    if features & DIRTY != 0 {
        let what = "the image was not closed cleanly (dirty bit); repair it with `qemu-img check -r all`";
        return Err(Error::corrupt(what).at(72u64));
    }
    if header.crypt_method != 0 {
        let method = match header.crypt_method {
            1 => "AES".to_owned(),
            2 => "LUKS".to_owned(),
            other => format!("method {other}"),
        };
        return Err(Error::new(ErrorKind::Encrypted, format!("the image is encrypted ({method})")).at(32u64));
    }
    match (features & COMPRESSION_TYPE != 0, header.compression_type) {
        (false, 0) | (true, 1) => Ok(()),
        (true, 0) | (false, _) => {
            Err(Error::corrupt("the compression type and its feature bit disagree").at(104u64))
        }
        (true, other) => Err(Error::unsupported(format!("compression type {other} is unknown")).at(104u64)),
    }
}

fn read_l1(header: &Qcow2Header, storage: &dyn Storage) -> Result<Vec<u64>> {
    let cluster_size = 1u64 << header.cluster_bits;
    let is_extended = header.incompatible_features & EXTENDED_L2 != 0;
    let entries = if is_extended { cluster_size / 16 } else { cluster_size / 8 };
    let needed = Unit::of(entries.saturating_mul(cluster_size)).count(header.virtual_size);
    if u64::from(header.l1_size) < needed {
        let what = format!("the L1 table has {} entries, the virtual size needs {needed}", header.l1_size);
        return Err(Error::corrupt(what).at(36u64));
    }
    let at = FileOffset(header.l1_table_offset);
    // Only what the disk needs is read; before the allocation the range is checked against the file's length.
    crate::storage::check_range(storage, at, needed.saturating_mul(8))?;
    let mut bytes = vec![0; memory_size(needed.saturating_mul(8))];
    storage.read_exact_at(at, &mut bytes)?;
    let entry = |chunk: &[u8]| chunk.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
    let l1: Vec<u64> = bytes.chunks_exact(8).map(entry).collect();
    let tables = l1.iter().map(|entry| entry & OFFSET_MASK).filter(|offset| *offset != 0).collect();
    check_disjoint(tables, cluster_size, "an L2 table", 1)?;
    Ok(l1)
}

fn open_data_file(extensions: &Extensions, gate: &Arc<dyn ReferenceGate>) -> Result<Arc<dyn Storage>> {
    let missing = || Error::corrupt("the image has an external data file and does not name it");
    let name = extensions.data_file.as_deref().ok_or_else(missing)?;
    Ok(gate.open(ReferenceKind::DataFile, name)?.storage)
}

fn open_backing(
    header: &Qcow2Header,
    extensions: &Extensions,
    storage: &dyn Storage,
    gate: &Arc<dyn ReferenceGate>,
    depth: usize,
) -> Result<Option<Arc<dyn DiskImage>>> {
    if header.backing_file_offset == 0 || header.backing_file_size == 0 {
        return Ok(None);
    }
    let mut name = vec![0; header.backing_file_size as usize];
    storage.read_exact_at(FileOffset(header.backing_file_offset), &mut name)?;
    let name = text(&name, "backing file's name", header.backing_file_offset)?;
    let file = gate.open(ReferenceKind::Backing, &name)?;
    let declared = match extensions.backing_format.as_deref() {
        None | Some("") => None,
        Some(format) => Some(ImageFormat::from_name(format).ok_or_else(|| {
            Error::unsupported(format!(
                "the backing file {name:?} has the format {format:?}, which is not read"
            ))
        })?),
    };
    // A file is never probed: a raw backing file's content belongs to its guest (CVE-2026-24708).
    let format = match (declared, file.format) {
        (Some(declared), Some(known)) if declared != known => {
            let what = format!(
                "the image says that its backing file {name:?} is {}, its name says {}",
                declared.name(),
                known.name()
            );
            return Err(Error::new(ErrorKind::ReferenceDenied, what));
        }
        (Some(format), _) | (None, Some(format)) => format,
        (None, None) => {
            let what = format!(
                "neither the image nor the name tells the format of the backing file {}",
                quoted(&name)
            );
            return Err(Error::new(ErrorKind::ReferenceDenied, what));
        }
    };
    image::open_image(format, file.storage, &file.gate, depth.saturating_add(1)).map(Some)
}

/// What qemu-img says under "Format specific information", in its words.
fn properties(header: &Qcow2Header, extensions: &Extensions) -> Vec<(String, String)> {
    let mut properties = Vec::new();
    let mut add = |name: &str, value: &str| properties.push((name.to_owned(), value.to_owned()));
    let flag = |set: bool| if set { "true" } else { "false" };
    add("compat", if header.version == 2 { "0.10" } else { "1.1" });
    add("compression type", if header.compression_type == 1 { "zstd" } else { "zlib" });
    if header.version >= 3 {
        add("lazy refcounts", flag(header.compatible_features & LAZY_REFCOUNTS != 0));
        add("refcount bits", &(1u32 << header.refcount_order).to_string());
        add("corrupt", "false");
        add("extended l2", flag(header.incompatible_features & EXTENDED_L2 != 0));
    }
    if let Some(name) = &extensions.data_file {
        add("data file", name);
        add("data file raw", flag(header.autoclear_features & RAW_EXTERNAL != 0));
    }
    if header.nb_snapshots > 0 {
        add("snapshots", &header.nb_snapshots.to_string());
    }
    properties
}
