//! Inputs to begin with: small images of every format and kind, and one of each document.

use std::sync::Arc;

use freightfs::format::{ImageFormat, OutputFormat};
use freightfs::header::qcow2::{MAGIC, Qcow2Header, V3_LENGTH};
use freightfs::header::vhd::{self, VhdDynamicHeader, VhdFooter};
use freightfs::header::vhdx::{self, VhdxHeader, VhdxLogDescriptor, VhdxLogHeader};
use freightfs::header::vmdk::{self, VmdkSparseHeader};
use freightfs::image::{ClosedGate, DiskImage, ReferenceGate, open_image};

use super::images::{converted, pack_chain};
use super::packed::PackedImage;
use super::random::Random;
use super::sparse::SparseFile;

/// Options: checksums are made right; and the image is converted to the format of that number.
fn options(format: usize) -> u8 {
    1 | (format as u8) << 1
}

/// No conversion.
const PLAIN: u8 = 1 | 31 << 1;

/// A disk with noise, text and zeros.
fn disk(size: u64) -> Arc<dyn DiskImage> {
    let mut file = SparseFile::new("disk", size);
    file = file.with(0, Random(1).bytes(700)).with(size / 2 / 512 * 512, b"text ".repeat(300));
    file = file.with(size - 512, vec![0; 500]);
    let gate: Arc<dyn ReferenceGate> = Arc::new(ClosedGate);
    open_image(ImageFormat::Raw, file.done(), &gate, 0).expect("a raw disk can be opened")
}

/// Two disks in each of the formats that are written and are of that image format.
pub fn written(format: ImageFormat) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (number, size) in [200_192, (5 << 20) + 1024].into_iter().enumerate() {
        for (index, output) in OutputFormat::ALL.into_iter().enumerate() {
            if output.image_format() == format {
                let file = converted(&disk(size), output, usize::MAX).expect("the disk fits the format");
                seeds.push(PackedImage::of(options((index + 5 * number) % 12), &file).pack());
            }
        }
    }
    seeds
}

fn words(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_be_bytes).collect()
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A qcow2 of 1 MiB with its L1 table in the third cluster and an L2 table in the fourth, which has these entries.
pub fn qcow2(cluster_bits: u32, entries: &[u64], backing: &str, features: u64) -> Vec<u8> {
    let mut header = Qcow2Header::parse(&[0; Qcow2Header::LENGTH]);
    let cluster = 1usize << cluster_bits;
    (header.magic, header.version, header.cluster_bits) = (MAGIC, 3, cluster_bits);
    (header.virtual_size, header.l1_size, header.l1_table_offset) = (1 << 20, 32, 2 * cluster as u64);
    (header.refcount_table_offset, header.refcount_table_clusters) = (cluster as u64, 1);
    (header.refcount_order, header.header_length) = (4, V3_LENGTH);
    header.incompatible_features = features;
    let mut file = vec![0; 6 * cluster];
    if !backing.is_empty() {
        (header.backing_file_offset, header.backing_file_size) = (256, backing.len() as u32);
        put(&mut file, 256, backing.as_bytes());
    }
    put(&mut file, 0, &header.encode());
    put(&mut file, 2 * cluster, &words([(3 * cluster as u64) | (1 << 63)]));
    put(&mut file, 3 * cluster, &words(entries.iter().copied()));
    put(&mut file, 4 * cluster, &[7; 512]);
    put(&mut file, 5 * cluster, &[9; 300]);
    file
}

pub fn qcow2_images() -> Vec<Vec<u8>> {
    let mut seeds = written(ImageFormat::Qcow2);
    let small = [(4 * 512) | (1 << 63), 0, 1, (5 * 512) | (1 << 63)];
    seeds.push(PackedImage::of(options(0), &qcow2(9, &small, "", 0)).pack());
    let large = [4 << 16 | 1 << 63, 0x0f0f | 0xf0 << 32, 0, 1 << 33, 5 << 16, 3];
    seeds.push(PackedImage::of(options(1), &qcow2(16, &large, "", 1 << 4)).pack());
    seeds
}

/// A sparse extent of 1 MiB with two grains, and a descriptor.
pub fn sparse_extent() -> Vec<u8> {
    let header = VmdkSparseHeader {
        magic: vmdk::MAGIC,
        version: 1,
        flags: 3 | 1 << 2,
        capacity: 2048,
        grain_size: 8,
        descriptor_offset: 1,
        descriptor_size: 1,
        grain_table_entries: 128,
        redundant_directory_offset: 0,
        directory_offset: 2,
        overhead: 8,
        unclean_shutdown: 0,
        line_ends: *b"\n \r\n",
        compression: 0,
    };
    let numbers = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let mut file = vec![0; 24 * 512];
    put(&mut file, 0, &header.encode());
    put(
        &mut file,
        512,
        b"# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n",
    );
    put(&mut file, 1024, &numbers(&[3, 4]));
    put(&mut file, 1536, &numbers(&[8, 0, 1, 16]));
    put(&mut file, 2048, &numbers(&[0, 1]));
    put(&mut file, 4096, &[5; 700]);
    put(&mut file, 8192, &[6; 512]);
    file
}

pub fn vmdk_images() -> Vec<Vec<u8>> {
    let mut seeds = written(ImageFormat::Vmdk);
    seeds.push(PackedImage::of(options(3), &sparse_extent()).pack());
    seeds
}

pub fn descriptors() -> Vec<Vec<u8>> {
    let head = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n";
    [
        "createType=\"twoGbMaxExtentFlat\"\nRW 1024 FLAT \"1\" 0\nRW 8 FLAT \"1\" 2040\n",
        "createType=\"custom\"\nRW 2048 SPARSE \"2\"\nRW 100 ZERO\nRDONLY 100 SPARSE \"2\"\n",
        "createType=\"vmfs\"\nRW 9 VMFS \"./1\" 1 disk-1\nRW 137438953472 ZERO\n",
    ]
    .map(|lines| format!("{head}{lines}").into_bytes())
    .to_vec()
}

/// A VHD of 64 KiB in blocks of 4 KiB, of which two are there; with a parent of that name, or none.
pub fn vhd(parent: &str, id: u8) -> Vec<u8> {
    let mut footer = VhdFooter::parse(&[0; 512]);
    (footer.cookie, footer.version, footer.data_offset) = (vhd::FOOTER_COOKIE, 0x0001_0000, 512);
    (footer.original_size, footer.current_size) = (65536, 65536);
    footer.disk_type = if parent.is_empty() { vhd::TYPE_DYNAMIC } else { vhd::TYPE_DIFFERENCING };
    (footer.creator_application, footer.unique_id) = (*b"win ", [id; 16]);
    let mut header = VhdDynamicHeader::parse(&[0; 1024]);
    (header.cookie, header.data_offset, header.table_offset) = (vhd::DYNAMIC_COOKIE, u64::MAX, 1536);
    (header.header_version, header.max_table_entries, header.block_size) = (0x0001_0000, 16, 4096);
    header.parent_unique_id = [id + 1; 16];
    let name: Vec<u8> = parent.encode_utf16().flat_map(u16::to_be_bytes).collect();
    header.parent_name[..name.len()].copy_from_slice(&name);
    let mut file = vec![0; 1536];
    put(&mut file, 512, &header.encode());
    let table = [4, u32::MAX, 13, u32::MAX].into_iter().chain([u32::MAX; 12]);
    file.extend(table.flat_map(u32::to_be_bytes));
    put(&mut file, 4 * 512, &[0b1010_0000]);
    put(&mut file, 5 * 512, &[id; 4096]);
    put(&mut file, 13 * 512, &[0b0000_0011]);
    put(&mut file, 14 * 512, &[id + 1; 4096]);
    put(&mut file, 0, &footer.encode());
    file.extend(footer.encode());
    file
}

pub fn vhd_images() -> Vec<Vec<u8>> {
    let mut seeds = written(ImageFormat::Vhd);
    seeds.push(PackedImage::of(options(4), &vhd("", 1)).pack());
    seeds
}

/// A small disk in the first of the formats that are written and are of that image format.
pub fn file(format: ImageFormat) -> Vec<u8> {
    let output = OutputFormat::ALL.into_iter().find(|output| output.image_format() == format);
    converted(&disk(200_192), output.expect("the format is written"), usize::MAX)
        .expect("the disk fits the format")
}

pub fn vhdx() -> Vec<u8> {
    file(ImageFormat::Vhdx)
}

/// A VHDX as it is written, with an entry in its log that changes a sector of the disk and zeros another.
pub fn logged_vhdx() -> PackedImage {
    let mut file = vhdx();
    let (entry_length, at) = (8192u32, 1 << 20);
    let size = file.len() as u64;
    let log = VhdxLogHeader {
        signature: vhdx::LOG_SIGNATURE,
        checksum: 1,
        entry_length,
        tail: 0,
        sequence_number: 5,
        descriptor_count: 2,
        log_guid: [7; 16],
        flushed_file_offset: size,
        last_file_offset: size + 4096,
    };
    let descriptor = |signature, first, file_offset| VhdxLogDescriptor {
        signature,
        trailing_bytes: [1; 4],
        leading_bytes_or_length: first,
        file_offset,
        sequence_number: 5,
    };
    put(&mut file, at, &log.encode());
    put(&mut file, at + 64, &descriptor(vhdx::LOG_DATA_SIGNATURE, 1, size - 4096).encode());
    put(&mut file, at + 96, &descriptor(vhdx::LOG_ZERO_SIGNATURE, 4096, size - 8192).encode());
    put(&mut file, at + 4096, &vhdx::LOG_SECTOR_SIGNATURE);
    put(&mut file, at + 8188, &5u32.to_le_bytes());
    for place in [64 << 10, 128 << 10] {
        let mut start = [0; VhdxHeader::LENGTH];
        start.copy_from_slice(&file[place..place + VhdxHeader::LENGTH]);
        let header = VhdxHeader { log_guid: [7; 16], ..VhdxHeader::parse(&start) };
        put(&mut file, place, &header.encode());
    }
    PackedImage::of(options(7), &file)
}

pub fn vhdx_images() -> Vec<Vec<u8>> {
    let mut seeds = written(ImageFormat::Vhdx);
    seeds.push(logged_vhdx().pack());
    seeds
}

pub fn zvhd_images() -> Vec<Vec<u8>> {
    [written(ImageFormat::Zvhd), written(ImageFormat::Zvhd2)].concat()
}

pub fn chains() -> Vec<Vec<u8>> {
    let raw = || (ImageFormat::Raw, PackedImage::of(PLAIN, &Random(3).bytes(9000)));
    let over = |name: &str| {
        let entries = [(4 * 512) | (1 << 63), 0, 1, 0];
        (ImageFormat::Qcow2, PackedImage::of(options(2), &qcow2(9, &entries, name, 0)))
    };
    let vhd = |name: &str, id| (ImageFormat::Vhd, PackedImage::of(options(0), &vhd(name, id)));
    let text = &descriptors()[0];
    vec![
        pack_chain(&[over("1"), raw()]),
        pack_chain(&[over("1"), over("2"), over("3"), raw()]),
        pack_chain(&[over("0")]),
        pack_chain(&[over("1"), over("0")]),
        pack_chain(&[vhd("1", 1), vhd("2", 2), vhd("", 3)]),
        pack_chain(&[over("1"), vhd("2", 1), vhd("", 2)]),
        pack_chain(&[(ImageFormat::Vmdk, PackedImage::of(PLAIN, text)), raw()]),
    ]
}

pub fn raw_images() -> Vec<Vec<u8>> {
    let sparse = PackedImage { file_size: 40 << 40, ..PackedImage::of(PLAIN, &[1; 600]) };
    vec![PackedImage::of(options(6), &Random(2).bytes(5000)).pack(), sparse.pack()]
}

pub fn vdi_images() -> Vec<Vec<u8>> {
    written(ImageFormat::Vdi)
}
