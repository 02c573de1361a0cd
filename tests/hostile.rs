//! Images made to cost their readers more than they have: each is refused by name, or served in time and memory that
//! its file's bytes bound. Counted are steps (entries of tables, bits of bitmaps, sectors of logs), bytes and requests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use freightfs::codec::{Compression, Compressor};
use freightfs::convert::{ConvertedFile, write_file};
use freightfs::error::{ErrorKind, Result};
use freightfs::extent::AllocationMap;
use freightfs::format::ImageFormat;
use freightfs::header::qcow2::{MAGIC, Qcow2Header, V3_LENGTH};
use freightfs::header::vhd::{self, VhdDynamicHeader, VhdFooter, checksum};
use freightfs::header::vhdx::{self, VhdxHeader, VhdxLogDescriptor, VhdxLogHeader};
use freightfs::header::vmdk::{self, VmdkSparseHeader};
use freightfs::header::zvhd::{ZVHD_COOKIE, ZvhdHeader};
use freightfs::image::{
    Cancel, DiskImage, GatedFile, ReferenceGate, ReferenceKind, allocation_map, denied, inflated, open_image,
    steps,
};
use freightfs::layout::raw::RawLayout;
use freightfs::storage::{FileStorage, Storage};
use freightfs::units::{GIB, KIB, MIB, SECTOR, TIB, VirtualOffset};
use support::hostile::open;
use support::images::Random;
use support::sparse::{Reopened, SparseFile};
use support::{command, freightfs, succeed};

const EIB: u64 = TIB << 20;

/// What opening an image and walking all of it took.
struct Cost {
    steps: u64,
    map: AllocationMap,
}

fn cost(format: ImageFormat, file: Arc<dyn Storage>) -> Result<Cost> {
    let before = steps::taken();
    let image = open(format, file)?;
    let map = allocation_map(&*image, 64 * KIB, &Cancel::default())?;
    Ok(Cost { steps: steps::taken() - before, map })
}

/// The image is refused for that reason, its file is named, and little of it was read.
fn refused(format: ImageFormat, file: &Arc<SparseFile>, kind: ErrorKind, reason: &str) -> u64 {
    let before = steps::taken();
    let error =
        cost(format, Arc::clone(file) as _).err().unwrap_or_else(|| panic!("{} was read", file.name()));
    let said = error.report();
    assert_eq!(error.kind(), kind, "{said}");
    assert!(said.contains(file.name()) && said.contains(reason), "{said}");
    let steps = steps::taken() - before;
    bounded(file, steps);
    steps
}

/// What was read and looked at of a file has a bound in its bytes, holes not counted.
fn bounded(file: &SparseFile, steps: u64) {
    let bound = file.data() + 64 * KIB;
    let (read, requests) = (file.bytes_read(), file.requests());
    assert!(read <= 3 * bound, "{}: {read} bytes read, {} are data", file.name(), file.data());
    assert!(requests <= bound, "{}: {requests} requests, {} bytes are data", file.name(), file.data());
    assert!(steps <= 3 * bound, "{}: {steps} steps, {} bytes are data", file.name(), file.data());
}

/// The image is served at a cost with such a bound.
fn served(format: ImageFormat, file: &Arc<SparseFile>) -> AllocationMap {
    let cost = cost(format, Arc::clone(file) as _).unwrap();
    bounded(file, cost.steps);
    assert!(cost.map.memory() as u64 <= MIB + file.data());
    cost.map
}

/// Lets an image refer to a list of files, and counts how often one is opened.
struct Files {
    by_name: HashMap<String, (Arc<SparseFile>, ImageFormat)>,
    opened: AtomicU64,
}

struct Gate(Arc<Files>);

impl ReferenceGate for Gate {
    fn open(&self, kind: ReferenceKind, reference: &str) -> Result<GatedFile> {
        let name = reference.trim_start_matches("./");
        let (file, format) = self.0.by_name.get(name).ok_or_else(|| denied(kind, reference))?;
        self.0.opened.fetch_add(1, Ordering::Relaxed);
        Ok(GatedFile {
            storage: Arc::new(Reopened(Arc::clone(file))),
            format: Some(*format),
            gate: Arc::new(Gate(Arc::clone(&self.0))),
        })
    }
}

fn gate(files: &[(&Arc<SparseFile>, ImageFormat)]) -> Arc<Files> {
    let by_name = files.iter().map(|(file, format)| (file.name().to_owned(), (Arc::clone(file), *format)));
    Arc::new(Files { by_name: by_name.collect(), opened: AtomicU64::new(0) })
}

fn open_gated(format: ImageFormat, file: &Arc<SparseFile>, files: &Arc<Files>) -> Result<Arc<dyn DiskImage>> {
    let gate: Arc<dyn ReferenceGate> = Arc::new(Gate(Arc::clone(files)));
    open_image(format, Arc::clone(file) as _, &gate, 0)
}

/// A header of a qcow2 whose L1 table of so many entries is at the third cluster.
fn qcow2(cluster_bits: u32, virtual_size: u64, l1_entries: u64, extended: bool) -> Qcow2Header {
    let mut header = Qcow2Header::parse(&[0; Qcow2Header::LENGTH]);
    (header.magic, header.version, header.cluster_bits) = (MAGIC, 3, cluster_bits);
    (header.virtual_size, header.l1_size) = (virtual_size, l1_entries as u32);
    (header.refcount_table_offset, header.l1_table_offset) = (1 << cluster_bits, 2 << cluster_bits);
    (header.refcount_table_clusters, header.refcount_order) = (1, 4);
    header.header_length = V3_LENGTH;
    header.incompatible_features = if extended { 1 << 4 } else { 0 };
    header
}

fn words(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_be_bytes).collect()
}

#[test]
fn a_disk_above_64_tib_is_refused_before_anything_is_made_for_it() {
    let refused = |format, file| {
        refused(format, &file, ErrorKind::TooLarge, "64 TiB");
    };
    let text =
        format!("# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\nRW {} ZERO\n", 8 * EIB / 512 - 1);
    refused(ImageFormat::Vmdk, SparseFile::of("150-bytes.vmdk", text.into_bytes()));
    let header = qcow2(21, 2 * EIB, 4 << 20, false).encode().to_vec();
    refused(ImageFormat::Qcow2, SparseFile::new("2-eib.qcow2", 64 * MIB).with(0, header).done());
    refused(ImageFormat::Raw, SparseFile::new("7-eib.raw", 7 * EIB).done());
    refused(ImageFormat::Zvhd, zvhd("8-pib.zvhd", 8192 * TIB));
    refused(ImageFormat::Vmdk, sparse_vmdk("large.vmdk", 65 * TIB, 128, 1, 0, GIB).done());
}

#[test]
fn a_disk_of_64_tib_without_data_costs_nothing() {
    let map = served(ImageFormat::Raw, &SparseFile::new("empty.raw", 64 * TIB).done());
    assert_eq!((map.units(), map.allocated()), (1 << 30, 0));
    assert!(map.memory() < 100);
    served(ImageFormat::Zvhd, &zvhd("empty.zvhd", 64 * TIB));
    let text = format!("# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\nRW {} ZERO\n", 64 * TIB / 512);
    served(ImageFormat::Vmdk, &SparseFile::of("zeros.vmdk", text.into_bytes()));
    // Little data: what it takes is in proportion to it.
    let mut file = SparseFile::new("little.raw", 64 * TIB);
    let mut random = Random(9);
    for _ in 0..500 {
        file = file.with(random.below(64 * TIB / MIB - 1) * MIB, vec![1; 4096]);
    }
    let map = served(ImageFormat::Raw, &file.done());
    assert!(map.allocated() > 400 && map.memory() < MIB as usize);
}

/// A ZVHD without a record.
fn zvhd(name: &str, virtual_size: u64) -> Arc<SparseFile> {
    let mut header = ZvhdHeader::parse(&[0; ZvhdHeader::LENGTH]);
    header.cookie = ZVHD_COOKIE;
    (header.original_size, header.current_size) = (virtual_size, virtual_size.next_multiple_of(GIB));
    header.checksum = checksum(&header.encode(), 64);
    let mut bytes = header.encode().to_vec();
    bytes.resize(4096, 0);
    SparseFile::of(name, bytes.repeat(2))
}

#[test]
fn an_l2_table_that_is_named_twice_is_refused() {
    for (name, extended, per_table) in
        [("plain.qcow2", false, 512 * MIB), ("extended.qcow2", true, 256 * MIB)]
    {
        let (size, start, table) = (32 * TIB, 2u64 << 16, 4 * MIB);
        let entries = size / per_table;
        let l1 = words((0..entries).map(|_| table | 1 << 63));
        let file = SparseFile::new(name, 8 * MIB)
            .with(0, qcow2(16, size, entries, extended).encode().to_vec())
            .with(start, l1)
            .with(table, vec![0; 64 << 10]);
        refused(ImageFormat::Qcow2, &file.done(), ErrorKind::CorruptImage, "named twice");
    }
}

#[test]
fn l2_tables_in_holes_are_not_read() {
    let entries = 64 * TIB / (512 * MIB);
    let first = 16 * MIB;
    let l1 = words((0..entries).map(|index| (first + index * 64 * KIB) | 1 << 63));
    let file = SparseFile::new("holes.qcow2", first + entries * 64 * KIB)
        .with(0, qcow2(16, 64 * TIB, entries, false).encode().to_vec())
        .with(2 << 16, l1);
    assert_eq!(served(ImageFormat::Qcow2, &file.done()).allocated(), 0);
}

/// A VMDK in one file with its directory at 1 MiB, which is a hole until something is put there.
fn sparse_vmdk(name: &str, size: u64, grain: u64, version: u32, flags: u32, file_size: u64) -> SparseFile {
    let header = VmdkSparseHeader {
        magic: vmdk::MAGIC,
        version,
        flags,
        capacity: size / SECTOR,
        grain_size: grain,
        descriptor_offset: 1,
        descriptor_size: 20,
        grain_table_entries: 512,
        redundant_directory_offset: 0,
        directory_offset: MIB / SECTOR,
        overhead: 128,
        unclean_shutdown: 0,
        line_ends: *b"\n \r\n",
        compression: u16::from(flags & 1 << 16 != 0),
    };
    let text = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n";
    SparseFile::new(name, file_size).with(0, header.encode().to_vec()).with(SECTOR, text.as_bytes().to_vec())
}

fn sectors(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(|value| (value as u32).to_le_bytes()).collect()
}

#[test]
fn a_grain_directory_costs_what_it_has() {
    // A directory of 4 Mi entries, 16 MiB, that is a hole: a few steps, and none of its entries is read but the first.
    let tables = 64 * TIB / (16 * MIB);
    let file = sparse_vmdk("hole.vmdk", 64 * TIB, 64, 1, 0, MIB + 4 * tables).done();
    let cost = cost(ImageFormat::Vmdk, Arc::clone(&file) as _).unwrap();
    let read = file.bytes_read();
    assert!(cost.steps < 100 && read < 512 * KIB, "{} steps, {read} bytes", cost.steps);
    // Tables that are different places of a hole.
    let tables = 100_000;
    let named = sectors((0..tables).map(|index| 32 * MIB / SECTOR + index * 4));
    let file = sparse_vmdk("tables.vmdk", tables * 32 * MIB, 128, 1, 0, 32 * MIB + tables * 2048);
    assert_eq!(served(ImageFormat::Vmdk, &file.with(MIB, named).done()).allocated(), 0);
    // One table for all of them.
    let named = sectors((0..tables).map(|_| 32 * MIB / SECTOR));
    let file = sparse_vmdk("one.vmdk", tables * 32 * MIB, 128, 1, 0, 32 * MIB + tables * 2048);
    refused(ImageFormat::Vmdk, &file.with(MIB, named).done(), ErrorKind::CorruptImage, "named twice");
    // Different ones that overlap, more than there is room for.
    let named = sectors((0..tables).map(|index| 32 * MIB / SECTOR + index % 16_000));
    let file = sparse_vmdk("small.vmdk", tables * 32 * MIB, 128, 1, 0, 40 * MIB);
    refused(
        ImageFormat::Vmdk,
        &file.with(MIB, named).done(),
        ErrorKind::CorruptImage,
        "that fit into the file",
    );
}

#[test]
fn block_tables_in_holes_cost_nothing() {
    // 128 MiB of entries that say that nothing is there: one step for each group that a bitmap's entry ends.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vhdx");
    succeed(
        command("qemu-img").args(["create", "-q", "-f", "vhdx", "-o", "block_size=1M"]).arg(&path).arg("16T"),
    );
    let file = FileStorage::open(&path).unwrap();
    assert!(file.file_size() > 128 * MIB);
    let cost = cost(ImageFormat::Vhdx, Arc::new(file)).unwrap();
    assert!(cost.steps < 10_000 && cost.map.allocated() == 0, "{} steps", cost.steps);
    // 2 GiB of entries that all say that the block is the file's start.
    let size = 255 * GIB;
    let mut footer = VhdFooter::parse(&[0; 512]);
    (footer.cookie, footer.version, footer.data_offset) = (vhd::FOOTER_COOKIE, 0x0001_0000, 512);
    (footer.original_size, footer.current_size, footer.disk_type) = (size, size, vhd::TYPE_DYNAMIC);
    footer.creator_application = *b"win ";
    footer.checksum = checksum(&footer.encode(), 64);
    let mut header = VhdDynamicHeader::parse(&[0; 1024]);
    (header.cookie, header.table_offset, header.header_version) = (vhd::DYNAMIC_COOKIE, MIB, 0x0001_0000);
    (header.max_table_entries, header.block_size) = ((size / SECTOR) as u32, SECTOR as u32);
    header.checksum = checksum(&header.encode(), 36);
    let end = MIB + size / SECTOR * 4;
    let file = SparseFile::new("same.vhd", end + 512)
        .with(0, footer.encode().to_vec())
        .with(512, header.encode().to_vec())
        .with(end, footer.encode().to_vec());
    refused(ImageFormat::Vhd, &file.done(), ErrorKind::CorruptImage, "more blocks than fit into the file");
}

#[test]
fn a_compressed_grain_of_1_gib_is_refused() {
    let compressed = 1 << 16 | 1 << 17;
    let file = sparse_vmdk("grain.vmdk", 4 * GIB, 2 * MIB, 3, compressed, 2 * MIB).done();
    refused(ImageFormat::Vmdk, &file, ErrorKind::TooLarge, "compressed grains of 1073741824 bytes");
}

#[test]
fn inflated_units_of_all_images_have_one_bound() {
    let grain = 4 * MIB;
    let stream =
        Compressor::new(Compression::Zlib, None).unwrap().compress(&vec![7; grain as usize]).unwrap();
    let images: Vec<_> = (0..30)
        .map(|number| {
            let marker = [0u64.to_le_bytes().to_vec(), (stream.len() as u32).to_le_bytes().to_vec()].concat();
            let file =
                sparse_vmdk(&format!("{number}.vmdk"), 4 * GIB, grain / 512, 3, 1 << 16 | 1 << 17, 8 * MIB)
                    .with(MIB, sectors([2 * MIB / 512].into_iter()))
                    .with(2 * MIB, sectors([3 * MIB / 512].into_iter()))
                    .with(3 * MIB, [marker, stream.clone()].concat());
            open(ImageFormat::Vmdk, file.done()).unwrap()
        })
        .collect();
    for image in &images {
        let mut piece = [0; 512];
        image.read_at(VirtualOffset(4096), &mut piece).unwrap();
        assert_eq!(piece, [7; 512]);
        assert!(inflated::memory() <= inflated::INFLATED_MEMORY);
    }
    assert!(inflated::memory() >= 15 * grain, "nothing is kept");
    drop(images);
    assert_eq!(inflated::memory(), 0);
}

#[test]
fn long_names_do_not_get_into_errors() {
    let name = "n".repeat(500_000);
    let text = format!("# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\nRW 8 FLAT \"{name}\" 0\n");
    let mut extension = qcow2(16, MIB, 1, false).encode().to_vec();
    extension.extend(0x4441_5441u32.to_be_bytes());
    extension.extend(50_000u32.to_be_bytes());
    extension.extend(&name.as_bytes()[..50_000]);
    let line = format!("# Disk DescriptorFile\nRW {name}\n");
    for (format, file) in [
        (ImageFormat::Vmdk, SparseFile::of("name.vmdk", text.into_bytes())),
        (ImageFormat::Vmdk, SparseFile::of("line.vmdk", line.into_bytes())),
        (ImageFormat::Qcow2, SparseFile::new("extension.qcow2", 4 << 16).with(0, extension).done()),
    ] {
        let error = cost(format, file).err().unwrap();
        assert!(error.report().len() < 300 && error.kind() == ErrorKind::CorruptImage, "{}", error.report());
    }
}

#[test]
fn a_catalog_with_a_hostile_image_is_listed_and_its_neighbour_is_read() {
    if !support::can_mount() {
        return;
    }
    let world = support::mount::World::new();
    let text = "# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\nRW 18014398509481983 ZERO\n";
    std::fs::write(world.catalog().join("evil.vmdk"), text).unwrap();
    let header = qcow2(21, 2 * EIB, 4 << 20, false).encode();
    let file = std::fs::File::create(world.catalog().join("large.qcow2")).unwrap();
    file.set_len(64 * MIB).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &header, 0).unwrap();
    std::fs::write(world.catalog().join("good.raw"), vec![5; 1 << 20]).unwrap();
    let mount = world.mount(&["--formats", "raw:qcow2:vmdk"]);
    for _ in 0..2 {
        support::run(command("ls").arg("-lR").arg(mount.path("images")));
    }
    let error = std::fs::File::open(mount.path("images/evil/evil.raw")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    assert_eq!(std::fs::read(mount.path("images/good/good.raw")).unwrap(), vec![5; 1 << 20]);
    mount.unmount();
}

/// A qcow2 of 512 MiB whose clusters are in turn nowhere and zero, over another file or none.
fn fragmented(name: &str, below: Option<&str>, phase: u64) -> Arc<SparseFile> {
    let mut header = qcow2(16, 512 * MIB, 1, false);
    let below = below.unwrap_or_default().as_bytes().to_vec();
    if !below.is_empty() {
        (header.backing_file_offset, header.backing_file_size) = (512, below.len() as u32);
    }
    SparseFile::new(name, 4 << 16)
        .with(0, header.encode().to_vec())
        .with(512, below)
        .with(2 << 16, words(std::iter::once(3 << 16 | 1 << 63)))
        .with(3 << 16, words((0..8192).map(|index| u64::from(index / phase % 2 == 1))))
        .done()
}

#[test]
fn a_chain_costs_what_its_tables_have() {
    // The last one: fragments below images that have nothing.
    for phases in [[1, 1, 1, 1, 1], [1, 2, 4, 8, 16], [16, 8, 4, 2, 1], [1, 8192, 8192, 8192, 8192]] {
        let names = ["0.qcow2", "1.qcow2", "2.qcow2", "3.qcow2", "4.qcow2"];
        let files: Vec<_> = (0..5)
            .map(|level| {
                fragmented(names[level], level.checked_sub(1).map(|below| names[below]), phases[level])
            })
            .collect();
        let allowed: Vec<_> = files.iter().map(|file| (file, ImageFormat::Qcow2)).collect();
        let image = open_gated(ImageFormat::Qcow2, &files[4], &gate(&allowed)).unwrap();
        let entries = 5 * 8192;
        let before = steps::taken();
        allocation_map(&*image, 64 * KIB, &Cancel::default()).unwrap();
        let whole = steps::taken() - before;
        assert!(whole <= 4 * entries, "{phases:?}: {whole} steps for {entries} entries");
        // Asked one by one, as a reader that looks for holes does.
        let before = steps::taken();
        let (mut at, mut extents) = (0, 0);
        while at < 512 * MIB {
            at += image.extent_at(VirtualOffset(at), 512 * MIB - at).unwrap().length;
            extents += 1;
        }
        let single = steps::taken() - before;
        assert!(single <= 200 * extents + 4 * entries, "{phases:?}: {single} steps for {extents} extents");
    }
}

/// A VHD over `p.vhd` of 2040 GiB whose blocks have 2 GiB, and that parent, which has no block.
fn differencing(name: &str, blocks: impl Fn(u64) -> u64, file_size: u64) -> (SparseFile, Arc<SparseFile>) {
    let size = 2040 * GIB;
    let footer = |disk_type, id| {
        let mut footer = VhdFooter::parse(&[0; 512]);
        (footer.cookie, footer.version, footer.data_offset) = (vhd::FOOTER_COOKIE, 0x0001_0000, 512);
        (footer.original_size, footer.current_size, footer.disk_type) = (size, size, disk_type);
        (footer.creator_application, footer.unique_id) = (*b"win ", [id; 16]);
        footer.checksum = checksum(&footer.encode(), 64);
        footer.encode().to_vec()
    };
    let header = |name: &str| {
        let mut header = VhdDynamicHeader::parse(&[0; 1024]);
        (header.cookie, header.table_offset, header.header_version) =
            (vhd::DYNAMIC_COOKIE, 1536, 0x0001_0000);
        (header.max_table_entries, header.block_size) = (1020, 2 << 30);
        header.parent_unique_id = [1; 16];
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        header.parent_name[..name.len()].copy_from_slice(&name);
        header.checksum = checksum(&header.encode(), 36);
        header.encode().to_vec()
    };
    let table =
        |entry: &dyn Fn(u64) -> u64| (0..1020).flat_map(|b| (entry(b) as u32).to_be_bytes()).collect();
    let free: Vec<u8> = table(&|_| u32::MAX.into());
    let child = SparseFile::new(name, file_size)
        .with(0, footer(4, 2))
        .with(512, header("p.vhd"))
        .with(1536, table(&blocks))
        .with(file_size - 512, footer(4, 2));
    let parent = [footer(3, 1), header(""), free, vec![0xff; 16], footer(3, 1)].concat();
    (child, SparseFile::of("p.vhd", parent))
}

#[test]
fn bitmaps_of_2_gib_blocks_are_read_where_they_are_asked_for() {
    // All blocks are one.
    let (child, parent) = differencing("twice.vhd", |_| 16, 4 * GIB);
    let (child, files) = (child.done(), gate(&[(&parent, ImageFormat::Vhd)]));
    let error = open_gated(ImageFormat::Vhd, &child, &files).err().unwrap();
    assert!(error.report().contains("a block is named twice"), "{}", error.report());
    // Every second sector is the parent's, in one block of two.
    let block = |index| if index < 2 { 16 + index * (4 * MIB + 1024) } else { u32::MAX.into() };
    let (child, parent) = differencing("bits.vhd", block, 8 * GIB);
    let (child, files) =
        (child.with(16 * 512, vec![0x55; 512 << 10]).done(), gate(&[(&parent, ImageFormat::Vhd)]));
    let image = open_gated(ImageFormat::Vhd, &child, &files).unwrap();
    let (before, read) = (steps::taken(), child.bytes_read());
    let extent = image.extent_at(VirtualOffset(0), image.virtual_size()).unwrap();
    assert_eq!(extent.length, SECTOR);
    image.read_at(VirtualOffset(3 * MIB), &mut [0; 4096]).unwrap();
    assert!(steps::taken() - before < 1000 && child.bytes_read() - read < 10_000, "one piece costs a bitmap");
    let mut runs = 0;
    let before = steps::taken();
    let count = &mut |_| {
        runs += 1;
        Ok(ControlFlow::Continue(()))
    };
    let _ = image.visit_extents(VirtualOffset(0)..VirtualOffset(2040 * GIB), count).unwrap();
    // A step for each bit of the first bitmap; the second one is zeros.
    assert!(runs >= 4 << 20 && steps::taken() - before <= 16 << 20, "{runs} runs");
    assert!(child.bytes_read() - read < 2 * MIB);
}

/// CRC-32C with the field at 4 zero, put there.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[4..8].fill(0);
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes) as u32;
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// A VHDX of which only the header and the log are there.
fn logged(name: &str, log: Vec<u8>) -> Arc<SparseFile> {
    let mut header = VhdxHeader::parse(&[0; VhdxHeader::LENGTH]);
    (header.signature, header.version, header.log_guid) = (vhdx::HEADER_SIGNATURE, 1, [7; 16]);
    (header.log_offset, header.log_length) = (MIB, log.len() as u32);
    let mut block = header.encode().to_vec();
    block.resize(4096, 0);
    SparseFile::new(name, 64 * MIB)
        .with(0, vhdx::FILE_SIGNATURE.to_vec())
        .with(64 * KIB, seal(block))
        .with(MIB, log)
        .done()
}

fn log_entry(length: usize, descriptors: u32) -> VhdxLogHeader {
    VhdxLogHeader {
        signature: vhdx::LOG_SIGNATURE,
        checksum: 1,
        entry_length: length as u32,
        tail: 0,
        sequence_number: 5,
        descriptor_count: descriptors,
        log_guid: [7; 16],
        flushed_file_offset: 0,
        last_file_offset: 64 * MIB,
    }
}

#[test]
fn a_log_costs_what_it_has() {
    // An entry at every sector, each as long as the log.
    let length = 8 * MIB as usize;
    let mut log = vec![0; length];
    for at in (0..length).step_by(4096) {
        log[at..at + 64].copy_from_slice(&log_entry(length, 0).encode());
    }
    let file = logged("entries.vhdx", log);
    let steps = refused(ImageFormat::Vhdx, &file, ErrorKind::CorruptImage, "the log's entries overlap");
    assert!(steps <= 6 * length as u64 / 4096, "{steps} sectors of a log of {length} bytes");
    // One entry that puts zeros over and over: at one place, and each time within the time before.
    let count = ((length - 64) / 32) as u64;
    let zeros = |place: &dyn Fn(u64) -> (u64, u64)| {
        let mut log = log_entry(length, count as u32).encode().to_vec();
        for index in 0..count {
            let (file_offset, zeros) = place(index);
            let signature = vhdx::LOG_ZERO_SIGNATURE;
            let descriptor = VhdxLogDescriptor {
                signature,
                trailing_bytes: [0; 4],
                leading_bytes_or_length: zeros,
                file_offset,
                sequence_number: 5,
            };
            log.extend(descriptor.encode());
        }
        log.resize(length, 0);
        seal(log)
    };
    let same = logged("same.vhdx", zeros(&|_| (16 * MIB, MIB)));
    refused(ImageFormat::Vhdx, &same, ErrorKind::CorruptImage, "region tables");
    let nested = logged("nested.vhdx", zeros(&|index| (16 * MIB + index * 8, 20 * MIB - index * 64)));
    refused(ImageFormat::Vhdx, &nested, ErrorKind::Unsupported, "262144 changes");
}

#[test]
fn a_block_number_that_wraps_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("a.raw"), directory.path().join("a.vhdx"));
    std::fs::write(&raw, Random(1).bytes(3 << 20)).unwrap();
    succeed(freightfs().args(["convert", "--quiet"]).arg(&raw).arg(&path));
    let mut bytes = std::fs::read(&path).unwrap();
    // The table is at 2 MiB. 1 MiB further on, this block would be where the file begins.
    bytes[2 << 20..(2 << 20) + 8].copy_from_slice(&(!(MIB - 1) | 6).to_le_bytes());
    let image = open(ImageFormat::Vhdx, SparseFile::of("wraps.vhdx", bytes)).unwrap();
    let error = image.read_at(VirtualOffset(MIB), &mut [0; 512]).unwrap_err();
    assert!(
        error.report().contains("wraps.vhdx") && error.report().contains("block 0"),
        "{}",
        error.report()
    );
    assert_eq!(error.kind(), ErrorKind::CorruptImage);
}

#[test]
fn extents_of_one_file_open_it_once() {
    let flat = SparseFile::new("f.vmdk", GIB).done();
    let sparse = sparse_vmdk("s.vmdk", GIB, 128, 1, 0, 2 * MIB).done();
    let named = |kind: &str, name: &str| {
        let mut text = "# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\n".to_owned();
        for index in 0..4096 {
            let offset = if kind == "FLAT" { format!(" {index}") } else { String::new() };
            text += &format!("RW 8 {kind} \"{}{name}\"{offset}\n", "./".repeat(index % 5));
        }
        SparseFile::of("many.vmdk", text.into_bytes())
    };
    for (kind, file) in [("FLAT", &flat), ("SPARSE", &sparse)] {
        let files = gate(&[(file, ImageFormat::Vmdk)]);
        let image = open_gated(ImageFormat::Vmdk, &named(kind, file.name()), &files).unwrap();
        // Once for each way to write its name, and kept once.
        assert_eq!((files.opened.load(Ordering::Relaxed), image.sources().len()), (5, 2), "{kind}");
        assert!(file.bytes_read() < 64 * KIB, "{kind}: the file was read again for each extent");
        image.read_at(VirtualOffset(0), &mut vec![0; 16 << 20]).unwrap();
        allocation_map(&*image, 64 * KIB, &Cancel::default()).unwrap();
    }
}

#[test]
fn a_walk_can_be_given_up() {
    let file = sparse_vmdk("long.vmdk", 64 * TIB, 128, 1, 0, MIB + 8 * MIB).done();
    let image = open(ImageFormat::Vmdk, file).unwrap();
    let cancel = Cancel::default();
    cancel.clone().cancel();
    let before = steps::taken();
    let error = allocation_map(&*image, 64 * KIB, &cancel).err().unwrap();
    assert!(error.is_transient(), "a job that needed it has failed for good");
    assert!(steps::taken() - before < 100_000);
}

/// Writes an image's disk to a raw file; says how many steps that took.
fn steps_to_raw(image: Arc<dyn DiskImage>) -> u64 {
    let file = ConvertedFile::new(Arc::clone(&image), Box::new(RawLayout::new(image.virtual_size())));
    let target = tempfile::tempfile().unwrap();
    let before = steps::taken();
    let done = AtomicU64::new(0);
    let count = |bytes| {
        done.fetch_add(bytes, Ordering::Relaxed);
    };
    write_file(&file, &target, 1, &count).unwrap();
    assert_eq!(done.into_inner(), image.virtual_size());
    steps::taken() - before
}

#[test]
fn a_large_disk_without_data_is_written_in_as_many_steps_as_its_tables_have_entries() {
    let directory = tempfile::tempdir().unwrap();
    let create = |name: &str, driver: &str, size: &str| {
        let path = directory.path().join(name);
        succeed(command("qemu-img").args(["create", "-q", "-f", driver]).arg(&path).arg(size));
        path
    };
    let measured = |format, path: &Path| {
        let storage = FileStorage::open(path).unwrap();
        let bytes = storage.file_size();
        let steps = steps_to_raw(open(format, Arc::new(storage)).unwrap());
        println!("{}: {bytes} bytes, {steps} steps", path.display());
        (bytes, steps)
    };
    for (format, name, driver, size) in [
        (ImageFormat::Raw, "a.raw", "raw", "8T"),
        (ImageFormat::Qcow2, "a.qcow2", "qcow2", "8T"),
        (ImageFormat::Vhd, "a.vhd", "vpc", "2040G"),
        (ImageFormat::Vhdx, "a.vhdx", "vhdx", "8T"),
        (ImageFormat::Vmdk, "a.vmdk", "vmdk", "8T"),
        (ImageFormat::Vdi, "a.vdi", "vdi", "8T"),
    ] {
        let (bytes, steps) = measured(format, &create(name, driver, size));
        // Of raw disks the holes are the filesystem's; entries have 4 bytes at least.
        let bound = if format == ImageFormat::Raw { 10 } else { bytes / 4 };
        assert!(steps <= bound, "{name}: {steps} steps");
    }
    assert!(steps_to_raw(open(ImageFormat::Zvhd, zvhd("a.zvhd", 8 * TIB)).unwrap()) < 10);
}

#[test]
fn fragments_are_looked_at_once_when_they_are_written() {
    let entries = 8192;
    let below = fragmented("0.qcow2", None, 1);
    let top = fragmented("1.qcow2", Some("0.qcow2"), 3);
    let files = gate(&[(&below, ImageFormat::Qcow2)]);
    let image = open_gated(ImageFormat::Qcow2, &top, &files).unwrap();
    let steps = steps_to_raw(image);
    assert!(steps <= 60 * entries, "{steps} steps for {entries} entries");
}
