//! What holds for the image of any bytes: it is refused for a reason, or it is a disk, at a cost that its bytes bound.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use freightfs::convert::{CompressedFile, ConvertedFile, Workspace};
use freightfs::error::{Error, Result};
use freightfs::extent::{AllocationMap, Extent, is_zero};
use freightfs::format::{ImageFormat, OutputFormat};
use freightfs::image::{
    Cancel, DiskImage, GatedFile, MAX_VIRTUAL_SIZE, ReferenceGate, ReferenceKind, allocation_map, denied,
    open_image, read_padded, recognize, steps,
};
use freightfs::layout::{self, AnyLayout, LayoutInput, LayoutOptions};
use freightfs::storage::{MemoryStorage, Storage};
use freightfs::units::{FileOffset, VirtualOffset};
use freightfs::vfile::VirtualFile;

use super::packed::{PackedImage, Reader};
use super::random::Random;
use super::reasons::REASONS;
use super::seal::seal;
use super::sparse::{Reopened, SparseFile};

/// The formats, as inputs count them.
const FORMATS: [ImageFormat; 8] = [
    ImageFormat::Raw,
    ImageFormat::Qcow2,
    ImageFormat::Vhd,
    ImageFormat::Vhdx,
    ImageFormat::Vmdk,
    ImageFormat::Vdi,
    ImageFormat::Zvhd,
    ImageFormat::Zvhd2,
];

/// Files of an input that has several.
const MAX_FILES: usize = 5;

/// Longest report of an error, in bytes: names are bounded.
const MAX_REPORT: usize = 16 << 10;

/// Bytes of a hole that a walk may read, and of a disk that is read as a whole.
const HOLES: u64 = 64 << 20;
const WHOLE: u64 = 1 << 20;

/// Extents whose bytes are read, and bytes that are read of each of their ends.
const EXTENTS: usize = 6;
const END: u64 = 20_000;

/// An input of one file.
pub fn image(format: ImageFormat, input: &[u8]) -> bool {
    let mut packed = PackedImage::unpack(input);
    seal(format, &mut packed);
    let set = FileSet::new(vec![(format, packed.file("0"))]);
    let bytes = packed.range(0, packed.file_size.min(64 << 10));
    let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new("start", bytes));
    tolerated(recognize(&file).map(drop));
    check(&set, packed.options)
}

/// The files of an input: for each its format (1 byte), the length of its packed form (4), and that.
pub fn unpack_chain(input: &[u8]) -> Vec<(ImageFormat, PackedImage)> {
    let (mut input, mut files) = (Reader(input), Vec::new());
    while !input.0.is_empty() && files.len() < MAX_FILES {
        let format = FORMATS[input.number(1) as usize % FORMATS.len()];
        let length = input.number(4) as usize;
        files.push((format, PackedImage::unpack(&input.bytes(length))));
    }
    files
}

/// An input of several files, of which the first one is opened. They may refer to each other as `0`, `1` and so on.
pub fn chain(input: &[u8]) -> bool {
    let mut files = Vec::new();
    let mut options = 0;
    for (format, mut packed) in unpack_chain(input) {
        seal(format, &mut packed);
        options |= packed.options;
        files.push((format, packed.file(&files.len().to_string())));
    }
    !files.is_empty() && check(&FileSet::new(files), options)
}

/// A descriptor alone, over two files that it may name.
pub fn descriptor(text: &[u8]) -> bool {
    let flat = SparseFile::new("1", 1 << 20).with(4096, vec![7; 5000]).done();
    let sparse = PackedImage::of(1, &super::seeds::sparse_extent()).file("2");
    let set = FileSet::new(vec![
        (ImageFormat::Vmdk, SparseFile::of("0", text.to_vec())),
        (ImageFormat::Raw, flat),
        (ImageFormat::Vmdk, sparse),
    ]);
    check(&set, 1)
}

/// The input with these files.
pub fn pack_chain(files: &[(ImageFormat, PackedImage)]) -> Vec<u8> {
    let mut input = Vec::new();
    for (format, image) in files {
        input.push(FORMATS.iter().position(|known| known == format).unwrap_or(0) as u8);
        let packed = image.pack();
        input.extend((packed.len() as u32).to_le_bytes());
        input.extend(packed);
    }
    input
}

/// Files that may refer to each other.
struct FileSet {
    files: Vec<(ImageFormat, Arc<SparseFile>)>,
    opened: AtomicU64,
}

struct Gate(Arc<FileSet>);

impl ReferenceGate for Gate {
    fn open(&self, kind: ReferenceKind, reference: &str) -> Result<GatedFile> {
        let index = reference.trim_start_matches("./").parse::<usize>().ok();
        let found = index.and_then(|index| self.0.files.get(index));
        let (format, file) = found.ok_or_else(|| denied(kind, reference))?;
        self.0.opened.fetch_add(1, Ordering::Relaxed);
        Ok(GatedFile {
            storage: Arc::new(Reopened(Arc::clone(file))),
            format: Some(*format),
            gate: Arc::new(Gate(Arc::clone(&self.0))),
        })
    }
}

impl FileSet {
    fn new(files: Vec<(ImageFormat, Arc<SparseFile>)>) -> Arc<Self> {
        Arc::new(Self { files, opened: AtomicU64::new(0) })
    }

    fn open(self: &Arc<Self>) -> Result<Arc<dyn DiskImage>> {
        let gate: Arc<dyn ReferenceGate> = Arc::new(Gate(Arc::clone(self)));
        let (format, file) = &self.files[0];
        open_image(*format, Arc::clone(file) as _, &gate, 0)
    }

    fn spent(&self) -> Spent {
        let sum = |of: fn(&SparseFile) -> u64| self.files.iter().map(|(_, file)| of(file)).sum();
        Spent {
            read: sum(SparseFile::bytes_read),
            requests: sum(SparseFile::requests),
            steps: steps::taken(),
        }
    }

    /// Fails unless what was spent since `before` is bounded by the bytes of the files, `times` over.
    fn bounded(&self, before: &Spent, times: u64, what: &str) {
        let now = self.spent();
        let data: u64 = self.files.iter().map(|(_, file)| file.data() + (64 << 10)).sum();
        let holes: u64 = self.files.iter().map(|(_, file)| file.file_size().min(HOLES)).sum();
        let opened = 1 + self.opened.load(Ordering::Relaxed);
        let bound = times * opened * data;
        let (read, requests) = (now.read - before.read, now.requests - before.requests);
        let steps = now.steps - before.steps;
        assert!(read <= 3 * bound + 2 * times * holes, "{what} reads {read} bytes of {data}");
        assert!(requests <= bound + holes / 512, "{what} makes {requests} requests for {data} bytes");
        assert!(steps <= 3 * bound + holes / 2, "{what} takes {steps} steps for {data} bytes");
    }
}

struct Spent {
    read: u64,
    requests: u64,
    steps: u64,
}

/// The value, unless the bytes were refused for one of [`REASONS`].
fn tolerated<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            refused(&error);
            None
        }
    }
}

fn refused(error: &Error) {
    let report = error.report();
    assert!(REASONS.contains(&error.kind()), "{:?}: {report}", error.kind());
    assert!(report.len() <= MAX_REPORT, "an error of {} bytes", report.len());
}

/// Opens the first file and does with it what a mount does. Returns whether it is an image.
fn check(set: &Arc<FileSet>, options: u8) -> bool {
    let start = set.spent();
    let opened = tolerated(set.open());
    set.bounded(&start, 1, "opening");
    let Some(disk) = opened else { return false };
    let size = disk.virtual_size();
    assert!(size <= MAX_VIRTUAL_SIZE, "a disk of {size} bytes");
    let description = disk.description();
    assert!(description.properties.iter().all(|(name, value)| name.len() + value.len() < MAX_REPORT));
    let start = set.spent();
    let walked = tolerated(walk(&*disk));
    set.bounded(&start, 2, "a walk");
    check_reads(&*disk, walked.as_deref(), options);
    let Some(extents) = walked else { return false };
    check_extents(&*disk, &extents);
    let start = set.spent();
    let map = tolerated(allocation_map(&*disk, 64 << 10, &Cancel::default()));
    set.bounded(&start, 2, "a map");
    let data: u64 = set.files.iter().map(|(_, file)| file.data()).sum();
    assert!(map.is_none_or(|map| map.memory() as u64 <= (1 << 20) + 64 * data), "a map for {data} bytes");
    if size <= WHOLE {
        check_conversion(&disk, options);
    }
    true
}

/// All extents of the disk, but no more than the first and the last ones: they tile it.
fn walk(disk: &dyn DiskImage) -> Result<Vec<(u64, Extent)>> {
    let (size, mut at, mut found) = (disk.virtual_size(), 0, Vec::new());
    let _ = disk.visit_extents(VirtualOffset(0)..VirtualOffset(size), &mut |extent| {
        assert!(extent.length > 0 && extent.length <= size - at, "an extent leads out of the disk");
        if found.len() >= 2 * EXTENTS {
            found.remove(EXTENTS);
        }
        found.push((at, extent));
        at += extent.length;
        Ok(ControlFlow::Continue(()))
    })?;
    assert_eq!(at, size, "the extents do not cover the disk");
    Ok(found)
}

/// Extents that are asked for one by one are those of the walk.
fn check_extents(disk: &dyn DiskImage, extents: &[(u64, Extent)]) {
    for (at, extent) in extents {
        let one = disk.extent_at(VirtualOffset(*at), disk.virtual_size() - at);
        if let Some(one) = tolerated(one) {
            assert!(one.length > 0 && one.length <= disk.virtual_size() - at);
            assert_eq!(one.kind, extent.kind, "two extents at {at}");
        }
    }
}

/// Reads at the disk's ends, and where extents begin and end. However reads are split, the bytes are the same; what is
/// said to be zeros is.
fn check_reads(disk: &dyn DiskImage, extents: Option<&[(u64, Extent)]>, options: u8) {
    let size = disk.virtual_size();
    let mut random = Random(u64::from(options));
    let mut places = vec![(0, size.min(END)), (size - size.min(END), size.min(END))];
    for (at, extent) in extents.unwrap_or_default() {
        let length = extent.length.min(END);
        for from in [*at, at + extent.length - length] {
            let read = read_split(disk, from, length, &mut random);
            let Some(bytes) = read else { continue };
            assert!(extent.kind.is_data() || is_zero(&bytes), "{:?} at {from} has bytes", extent.kind);
        }
    }
    places.push((random.below(size.max(1)), END));
    for (at, length) in places {
        read_split(disk, at, length.min(size - at), &mut random);
    }
}

/// The bytes of a range, read at once and in pieces; `None` where either way finds damage, which both do.
fn read_split(disk: &dyn DiskImage, at: u64, length: u64, random: &mut Random) -> Option<Vec<u8>> {
    let mut whole = vec![0xaa; length as usize];
    let read = tolerated(disk.read_at(VirtualOffset(at), &mut whole));
    let mut pieces = vec![0x55; length as usize];
    let (mut done, mut all) = (0, true);
    while done < length {
        let step = (1 + random.below(length)).min(length - done);
        let target = &mut pieces[done as usize..(done + step) as usize];
        all &= tolerated(disk.read_at(VirtualOffset(at + done), target)).is_some();
        done += step;
    }
    assert_eq!(
        read.is_some(),
        all,
        "{length} bytes at {at} are damaged only when they are split, or only when not"
    );
    read.map(|()| assert!(whole == pieces, "{length} bytes at {at} depend on how they are read"))?;
    Some(whole)
}

/// Converts a small disk to the format that the options choose, twice: both are the same bytes, which are the same disk.
fn check_conversion(disk: &Arc<dyn DiskImage>, options: u8) {
    let Some(format) = OutputFormat::ALL.into_iter().nth(usize::from(options >> 1) % 32) else { return };
    let size = disk.virtual_size();
    let mut content = vec![0; size as usize];
    if tolerated(disk.read_at(VirtualOffset(0), &mut content)).is_none() {
        return;
    }
    let Some(bytes) = tolerated(converted(disk, format, usize::MAX)) else { return };
    let Some(again) = tolerated(converted(disk, format, 100_003)) else { panic!("converted once only") };
    assert!(bytes == again, "two conversions to {format:?} differ");
    let set = FileSet::new(vec![(format.image_format(), SparseFile::of("converted", bytes))]);
    let read = set.open().expect("what was converted is an image");
    assert!(read.virtual_size() >= size, "the disk has shrunk");
    let mut back = vec![1; size as usize];
    read.read_at(VirtualOffset(0), &mut back).expect("what was converted can be read");
    assert!(content == back, "the disk of a {format:?} is another one");
    let mut rest = vec![1; (read.virtual_size() - size) as usize];
    read_padded(&*read, VirtualOffset(size), &mut rest).expect("what was converted can be read");
    assert!(is_zero(&rest), "a {format:?} has something behind its disk");
}

/// A conversion, read from its start in pieces of at most so many bytes.
pub fn converted(disk: &Arc<dyn DiskImage>, format: OutputFormat, piece: usize) -> Result<Vec<u8>> {
    let options = LayoutOptions { level: format.is_compressed().then_some(1), ..LayoutOptions::default() };
    let input = LayoutInput {
        virtual_size: disk.virtual_size(),
        seed: [7; 16],
        file_name: format!("disk.{}", format.suffix()),
        options,
    };
    let map = match layout::unit_size(format, &options) {
        Some(unit) => allocation_map(&**disk, unit, &Cancel::default())?,
        None => AllocationMap::empty(),
    };
    let map = Arc::new(map);
    let file: Box<dyn VirtualFile> = match layout::build(format, &input, Arc::clone(&map))? {
        AnyLayout::Plain(layout) => Box::new(ConvertedFile::new(Arc::clone(disk), layout)),
        AnyLayout::Compressed(layout) => {
            let (name, workspace) = ("fuzz".to_owned(), Workspace::in_memory());
            Box::new(CompressedFile::new(Arc::clone(disk), layout, map, name, workspace)?)
        }
    };
    let size = file.exact_size()?;
    assert!(size <= 64 << 20, "a file of {size} bytes for a disk of {}", disk.virtual_size());
    let mut bytes = vec![0; size as usize];
    let mut done = 0;
    while done < bytes.len() {
        let end = bytes.len().min(done.saturating_add(piece));
        done += file.read_at(FileOffset(done as u64), &mut bytes[done..end])?;
    }
    Ok(bytes)
}
