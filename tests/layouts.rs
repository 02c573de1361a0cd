//! Standing properties of every layout, over disks of any size and allocation: the size that is said is the size that
//! is there, any split of reads is one read, and what was written reads back as the disk that it was made from.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use freightfs::convert::{CompressedFile, ConvertedFile, Workspace};
use freightfs::error::Result;
use freightfs::extent::{AllocationMap, Extent, ExtentKind};
use freightfs::format::OutputFormat;
use freightfs::image::{Cancel, DiskImage, ExtentVisitor, ImageDescription, allocation_map};
use freightfs::layout::{self, AnyLayout, LayoutInput, LayoutOptions};
use freightfs::storage::{Generation, Storage};
use freightfs::units::{FileOffset, VirtualOffset};
use freightfs::vfile::VirtualFile;
use proptest::prelude::*;
use support::images::Random;
use support::{command, hostile, succeed};

/// A disk that exists only as a list of runs of data.
struct SparseDisk {
    virtual_size: u64,
    /// Start, length and seed, ascending, disjoint, in units of 512 bytes but for the disk's end.
    runs: Vec<(u64, u64, u64)>,
}

impl SparseDisk {
    /// Runs of data at these places, as far as they lie on the disk and do not overlap.
    fn new(virtual_size: u64, places: &[(u64, u64, u64)]) -> Self {
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        let mut places: Vec<_> = places
            .iter()
            .map(|&(at, length, seed)| {
                (at % virtual_size.max(1) / 512 * 512, length.next_multiple_of(512), seed)
            })
            .collect();
        places.sort_unstable();
        for (at, length, seed) in places {
            let length = length.min(virtual_size.saturating_sub(at));
            let free = runs.last().is_none_or(|(start, length, _)| start + length <= at);
            if length > 0 && free {
                runs.push((at, length, seed));
            }
        }
        Self { virtual_size, runs }
    }

    /// The bytes of a run from `from` on: noise, text or zeros, by its seed.
    fn fill(seed: u64, from: u64, buf: &mut [u8]) {
        match seed % 4 {
            0 => buf.fill(0),
            1 => buf.iter_mut().enumerate().for_each(|(i, b)| *b = b"a text "[(from as usize + i) % 7]),
            _ => {
                // Noise that can be had from any sector on.
                let mut place = 0;
                while place < buf.len() {
                    let at = from + place as u64;
                    let sector = Random(seed ^ (at / 512) << 8).bytes(512);
                    let piece = &sector[(at % 512) as usize..];
                    let length = piece.len().min(buf.len() - place);
                    buf[place..place + length].copy_from_slice(&piece[..length]);
                    place += length;
                }
            }
        }
    }
}

impl DiskImage for SparseDisk {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
        assert!(at.0 + buf.len() as u64 <= self.virtual_size, "a read past the disk");
        buf.fill(0);
        for &(start, length, seed) in &self.runs {
            let (from, to) = (start.max(at.0), (start + length).min(at.0 + buf.len() as u64));
            if from < to {
                Self::fill(seed, from - start, &mut buf[(from - at.0) as usize..(to - at.0) as usize]);
            }
        }
        Ok(())
    }

    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>> {
        let mut at = range.start.0;
        while at < range.end.0 {
            let next = self.runs.iter().find(|(start, length, _)| at < start + length);
            let extent = match next {
                Some((start, length, _)) if at >= *start => {
                    Extent::new(ExtentKind::Data, start + length - at)
                }
                Some((start, ..)) => Extent::new(ExtentKind::Hole, start - at),
                None => Extent::new(ExtentKind::Hole, self.virtual_size - at),
            };
            let length = extent.length.min(range.end.0 - at);
            if visit(Extent::new(extent.kind, length))?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            at += length;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn verify_unchanged(&self) -> Result<()> {
        Ok(())
    }

    fn sources(&self) -> Vec<Generation> {
        Vec::new()
    }

    fn description(&self) -> ImageDescription {
        unreachable!("nobody asks")
    }
}

/// A computed file as the source of a reader.
struct Computed(Arc<dyn VirtualFile>, u64, Generation);

impl Storage for Computed {
    fn name(&self) -> &str {
        "computed"
    }

    fn file_size(&self) -> u64 {
        self.1
    }

    fn read_exact_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        freightfs::storage::check_range(self, at, buf.len() as u64)?;
        assert_eq!(self.0.read_at(at, buf)?, buf.len());
        Ok(())
    }

    fn extent_at(&self, at: FileOffset) -> Result<Extent> {
        self.0.extent_at(at)
    }

    fn generation(&self) -> &Generation {
        &self.2
    }

    fn verify_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

fn file(
    format: OutputFormat,
    disk: &Arc<SparseDisk>,
    options: LayoutOptions,
) -> Result<Arc<dyn VirtualFile>> {
    let input = LayoutInput {
        virtual_size: disk.virtual_size,
        seed: [5; 16],
        file_name: format!("disk.{}", format.suffix()),
        options,
    };
    let image: Arc<dyn DiskImage> = Arc::clone(disk) as _;
    let map = match layout::unit_size(format, &options) {
        Some(unit) => allocation_map(&**disk, unit, &Cancel::default())?,
        None => AllocationMap::empty(),
    };
    let map = Arc::new(map);
    Ok(match layout::build(format, &input, Arc::clone(&map))? {
        AnyLayout::Plain(layout) => Arc::new(ConvertedFile::new(image, layout)),
        AnyLayout::Compressed(layout) => {
            Arc::new(CompressedFile::new(image, layout, map, "test".into(), Workspace::in_memory())?)
        }
    })
}

/// Bytes of a file that is read as a whole.
const WHOLE: u64 = 24 << 20;

fn check_reads(format: OutputFormat, disk: &Arc<SparseDisk>, options: LayoutOptions) -> Result<()> {
    let one = file(format, disk, options)?;
    let bound = one.file_size();
    let mut random = Random(disk.virtual_size);
    // Pieces before the size is known: of a compressed file these are what makes it known.
    let early = if random.below(2) == 0 { random.below(bound.min(1 << 20) + 1) } else { 0 };
    let mut piece = vec![0; 3000];
    let length = one.read_at(FileOffset(early), &mut piece)?;
    let size = one.exact_size()?;
    assert!(size <= bound && one.file_size() == size && one.known_size() == Some(size));
    assert_eq!(length as u64, size.saturating_sub(early).min(3000));
    assert_eq!(one.read_at(FileOffset(size), &mut [0; 10])?, 0);
    let again = file(format, disk, options)?;
    for _ in 0..20 {
        let at = random.below(size.max(1));
        let length = 1 + random.below(300_000) as usize;
        let mut whole = vec![1; length];
        let read = again.read_at(FileOffset(at), &mut whole)?;
        assert_eq!(read as u64, size.saturating_sub(at).min(length as u64));
        let (mut pieces, mut done) = (vec![2; read], 0);
        while done < read {
            let step = (1 + random.below(70_000) as usize).min(read - done);
            let at = FileOffset(at + done as u64);
            assert_eq!(one.read_at(at, &mut pieces[done..done + step])?, step);
            done += step;
        }
        assert!(whole[..read] == pieces, "{length} bytes at {at} depend on how they are read");
    }
    if size <= WHOLE {
        let mut bytes = vec![0; size as usize + 1];
        assert_eq!(file(format, disk, options)?.read_at(FileOffset(0), &mut bytes)? as u64, size);
        let mut same = vec![0; size as usize];
        one.read_at(FileOffset(0), &mut same)?;
        assert!(bytes[..size as usize] == same, "two conversions differ");
    }
    check_parsed(format, disk, one, size)
}

/// The reader of the format finds the disk again.
fn check_parsed(
    format: OutputFormat,
    disk: &SparseDisk,
    file: Arc<dyn VirtualFile>,
    size: u64,
) -> Result<()> {
    let storage =
        Arc::new(Computed(file, size, Generation::everywhere("computed", std::time::SystemTime::UNIX_EPOCH)));
    let image = hostile::open(format.image_format(), storage)?;
    let rounded = match format {
        OutputFormat::Raw | OutputFormat::Zvhd | OutputFormat::Zvhd2 => disk.virtual_size,
        OutputFormat::Vhdx => disk.virtual_size.next_multiple_of(1 << 20),
        _ => image.virtual_size(),
    };
    assert_eq!(image.virtual_size(), rounded);
    assert!(rounded >= disk.virtual_size && rounded - disk.virtual_size <= 1 << 20);
    let mut places: Vec<u64> =
        disk.runs.iter().flat_map(|(at, length, _)| [*at, at + length - 1, at + length / 2]).collect();
    let mut random = Random(size);
    places.extend((0..10).map(|_| random.below(disk.virtual_size.max(1))));
    for place in places {
        let at = place.saturating_sub(700);
        let length = 1400.min(disk.virtual_size.saturating_sub(at)) as usize;
        let (mut expected, mut found) = (vec![0; length], vec![1; length]);
        disk.read_at(VirtualOffset(at), &mut expected)?;
        image.read_at(VirtualOffset(at), &mut found)?;
        assert!(expected == found, "{format:?}: {length} bytes at {at} read back otherwise");
        if expected.iter().any(|&b| b != 0) {
            let first = at + expected.iter().position(|&b| b != 0).unwrap() as u64;
            assert!(
                image.extent_at(VirtualOffset(first), image.virtual_size() - first)?.kind.is_data(),
                "data at {first} is no data extent"
            );
        }
    }
    Ok(())
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0u64),
        Just(1),
        1..100_000u64,
        1..(64u64 << 20),
        1..(3u64 << 40),
        Just(2u64 << 40),
        1..(8u64 << 40),
        Just(8u64 << 40)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn every_layout_keeps_its_promises(
        format in prop::sample::select(OutputFormat::ALL.to_vec()),
        virtual_size in sizes(),
        places in prop::collection::vec((0u64..1 << 43, 1u64..600_000, 0u64..100), 0..6),
        cluster_bits in 9u32..22,
    ) {
        let disk = Arc::new(SparseDisk::new(virtual_size, &places));
        let qcow2 = format.qemu_name() == Some("qcow2");
        let options = LayoutOptions {
            // Small clusters of a large disk would need too large an L1 table, which is refused.
            cluster_size: qcow2.then_some(1 << cluster_bits),
            level: format.is_compressed().then_some(1),
            large_window: virtual_size.is_multiple_of(2),
        };
        match check_reads(format, &disk, options) {
            Ok(()) => {}
            Err(error) => {
                let refused = matches!(
                    error.kind(),
                    freightfs::error::ErrorKind::TooLarge | freightfs::error::ErrorKind::Unsupported
                );
                let reason = virtual_size == 0 || virtual_size > 2040 << 30 || qcow2;
                prop_assert!(refused && reason, "{}", error.report());
            }
        }
    }
}

/// Random disks of a format that one run of qemu-img reads, one behind the other.
const IMAGES: u64 = 24;

/// A random disk of at most 3 MiB with some runs of data, the same for the same number.
fn small_disk(number: u64) -> Arc<SparseDisk> {
    let mut random = Random(number);
    let virtual_size = 1 + random.below(if number.is_multiple_of(3) { 100_000 } else { 3 << 20 });
    let places: Vec<_> = (0..random.below(6))
        .map(|_| (random.below(3 << 20), 1 + random.below(100_000), random.below(100)))
        .collect();
    Arc::new(SparseDisk::new(virtual_size, &places))
}

/// Writes a disk as a file of a format.
fn write_as(format: OutputFormat, number: u64, disk: &Arc<SparseDisk>, path: &std::path::Path) {
    let options = LayoutOptions {
        cluster_size: (format.qemu_name() == Some("qcow2")).then_some(1 << (9 + number % 13)),
        level: format.is_compressed().then_some(1),
        large_window: false,
    };
    let file = file(format, disk, options).unwrap();
    let mut bytes = vec![0; file.exact_size().unwrap() as usize];
    assert_eq!(file.read_at(FileOffset(0), &mut bytes).unwrap(), bytes.len());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn random_disks_in_every_format_are_the_same_disks_to_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let all = directory.path().join("all.raw");
    for (format, driver) in OutputFormat::ALL.iter().filter_map(|f| Some((*f, f.qemu_name()?))) {
        let (mut convert, mut expected) = (command("qemu-img"), Vec::new());
        convert.args(["convert", "-f", driver, "-O", "raw"]);
        for number in 0..IMAGES {
            let disk = small_disk(number);
            let path = directory.path().join(format!("{number}.{}", format.suffix()));
            write_as(format, number, &disk, &path);
            let storage = freightfs::storage::FileStorage::open(&path).unwrap();
            let size = hostile::open(format.image_format(), Arc::new(storage)).unwrap().virtual_size();
            let start = expected.len();
            // Sectors are what qemu-img counts in.
            expected.resize(start + size.next_multiple_of(512) as usize, 0);
            let end = start + disk.virtual_size as usize;
            disk.read_at(VirtualOffset(0), &mut expected[start..end]).unwrap();
            convert.arg(path);
        }
        succeed(convert.arg(&all));
        let found = std::fs::read(&all).unwrap();
        assert_eq!(found.len(), expected.len(), "{format:?}: sizes differ");
        if found != expected {
            let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
            panic!("{format:?}: qemu-img reads something else at {differs:?} of all disks together");
        }
    }
}
