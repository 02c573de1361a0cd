//! ZVHD and ZVHD2 byte by byte, against the description of the formats in words. Nothing here is taken from the
//! writer: offsets and values are written out, streams are inflated by other libraries (Python's zlib and backports.zstd).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use support::images::Random;
use support::{command, freightfs, run, skip, succeed};

const BLOCK: usize = 2 * 1024 * 1024;

/// 9 MiB and 777 bytes: blocks 0 and 2 have data, 1 is a hole, 3 is written zeros, 4 is partial.
fn disk(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(9 * 1024 * 1024 + 777).unwrap();
    file.write_all_at(&Random(1).bytes(5000), 100).unwrap();
    file.write_all_at(&b"hello ".repeat(100_000), 2 * BLOCK as u64).unwrap();
    file.write_all_at(&vec![0; 4096], 3 * BLOCK as u64).unwrap();
    file.write_all_at(b"end", 9 * 1024 * 1024 + 774).unwrap();
    path
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn convert(raw: &Path, suffix: &str) -> Vec<u8> {
    let path = raw.with_extension(suffix);
    succeed(freightfs().args(["convert", "--quiet"]).arg(raw).arg(&path));
    std::fs::read(path).unwrap()
}

/// The fields that both versions have, in a header at `at`.
fn check_common_header(file: &[u8], at: usize, cookie: &[u8; 8]) {
    let header = &file[at..at + 4096];
    let size = 9 * 1024 * 1024 + 777u64;
    assert_eq!(&header[0..8], cookie);
    assert_eq!(u32_at(header, 8), 2, "features");
    assert_eq!(u32_at(header, 12), 0x0001_0000, "version");
    assert_eq!(u64_at(header, 16), u64::MAX, "data offset");
    assert_eq!(&header[28..32], b"tap\0", "creator");
    assert_eq!(u32_at(header, 32), 0x0001_0004, "creator version");
    assert_eq!(u32_at(header, 36), 0);
    assert_eq!(u64_at(header, 40), size, "original size is exact");
    assert_eq!(u64_at(header, 48), 1 << 30, "current size is rounded up to 1 GiB");
    // 18434 sectors: 17 a track, 1084 tracks, 4 heads, 271 cylinders, by VHD's algorithm.
    assert_eq!(u32_at(header, 56), 271 << 16 | 4 << 8 | 17, "geometry");
    assert_eq!(u32_at(header, 60), 4, "type");
    let sum: u32 = header[..512]
        .iter()
        .enumerate()
        .filter(|(i, _)| !(64..68).contains(i))
        .map(|(_, &b)| u32::from(b))
        .sum();
    assert_eq!(u32_at(header, 64), !sum, "checksum");
    assert_ne!(&header[68..84], &[0; 16], "uuid");
    assert_eq!(&header[84..87], &[0; 3], "flags");
    assert_eq!(&header[512..], &[0; 4096 - 512][..], "the rest of the header");
}

struct Record {
    at: usize,
    length: usize,
    block: u32,
    payload: Vec<u8>,
}

/// The records from byte 4096 to `end`.
fn records(file: &[u8], end: usize) -> Vec<Record> {
    let (mut records, mut at) = (Vec::new(), 4096);
    while at < end {
        assert_eq!(&file[at..at + 12], b"hwstream bg\0", "record cookie at {at}");
        let size = u32_at(file, at + 12) as usize;
        let block = u32_at(file, at + 16);
        assert_eq!(&file[at + 20..at + 48], &[0; 28], "bytes 20 to 47");
        let length = (52 + size).next_multiple_of(4096);
        assert_eq!(&file[at + length - 4..at + length], b"end\0", "end mark");
        assert!(file[at + 48 + size..at + length - 4].iter().all(|&b| b == 0), "padding");
        records.push(Record { at, length, block, payload: file[at + 48..at + 48 + size].to_vec() });
        at += length;
    }
    assert_eq!(at, end);
    let blocks: Vec<_> = records.iter().map(|r| r.block).collect();
    assert_eq!(blocks, [0, 2, 4], "only blocks that are not all zeros, in ascending order");
    records
}

/// The disk's blocks 0, 2 and 4, the last one filled with zeros.
fn expected_blocks(raw: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(raw).unwrap();
    bytes.resize(5 * BLOCK, 0);
    [0, 2, 4].iter().flat_map(|&block| bytes[block * BLOCK..(block + 1) * BLOCK].to_vec()).collect()
}

/// Decompresses `input` by a line of Python that makes `out` of `data`.
fn by_python(directory: &Path, line: &str, input: &[u8]) -> Vec<u8> {
    let (from, to) = (directory.join("in"), directory.join("out"));
    std::fs::write(&from, input).unwrap();
    let program = format!(
        "import sys, zlib\ndata = open(sys.argv[1], 'rb').read()\n{line}\nopen(sys.argv[2], 'wb').write(out)"
    );
    succeed(command("python3").args(["-c", &program]).arg(from).arg(&to));
    std::fs::read(to).unwrap()
}

#[test]
fn zvhd_is_what_its_description_says() {
    let directory = tempfile::tempdir().unwrap();
    let raw = disk(directory.path());
    let file = convert(&raw, "zvhd");
    check_common_header(&file, 0, b"stream\0\0");
    assert_eq!(&file[84..512], &[0; 428][..], "no fields of the second version");
    assert_eq!(file[..4096], file[file.len() - 4096..], "the header again at the end");
    let records = records(&file, file.len() - 4096);
    assert_eq!(
        file.len(),
        8192 + records.iter().map(|r| (52 + r.payload.len()).div_ceil(4096) * 4096).sum::<usize>()
    );
    assert_eq!(&records[0].payload[..2], &[0x78, 0x9c], "the zlib header before the first payload");
    // One continuous zlib stream without an end.
    let stream: Vec<u8> = records.iter().flat_map(|r| r.payload.clone()).collect();
    assert!(
        records.iter().all(|r| r.payload.ends_with(&[0, 0, 0xff, 0xff])),
        "a sync flush after each block"
    );
    let line = "d = zlib.decompressobj(15); out = d.decompress(data); assert not d.eof and not d.unused_data";
    assert!(by_python(directory.path(), line, &stream) == expected_blocks(&raw));
    // At each record's border, exactly one block more is there.
    let first: Vec<u8> = records[..2].iter().flat_map(|r| r.payload.clone()).collect();
    assert_eq!(by_python(directory.path(), line, &first).len(), 2 * BLOCK);
}

#[test]
fn zvhd2_is_what_its_description_says() {
    let directory = tempfile::tempdir().unwrap();
    let raw = disk(directory.path());
    let file = convert(&raw, "zvhd2");
    for at in [0, file.len() - 4096] {
        check_common_header(&file, at, b"z2strm\0\0");
        assert_eq!((file[at + 87], u32_at(&file, at + 88), u32_at(&file, at + 92)), (1, 2 << 20, 5));
        assert_eq!((u32_at(&file, at + 120), u32_at(&file, at + 124)), (524_288, 4096), "segments' sizes");
        assert_eq!((file[at + 140], file[at + 141]), (0, 1), "method zstd");
        assert_eq!(&file[at + 142..at + 512], &[0; 370][..]);
    }
    let footer = &file[file.len() - 4096..];
    let (index, bitmap) = (u64_at(footer, 96) as usize, u64_at(footer, 104) as usize);
    assert_eq!((u32_at(footer, 112), u32_at(footer, 116)), (524_288, 4096), "one segment of each");
    assert_eq!((u32_at(footer, 128), u32_at(footer, 132), u32_at(footer, 136)), (1, 1, 3));
    // Header, records, header copy, index, bitmap, footer.
    assert_eq!(file[..4096], file[index - 4096..index], "the copy of the header");
    assert_eq!((index + 524_288, bitmap + 4096), (bitmap, file.len() - 4096));
    let records = records(&file, index - 4096);
    let sum: usize = records.iter().map(|r| r.length).sum();
    assert_eq!(file.len(), 12_288 + sum + 524_288 + 4096);
    for (number, record) in records.iter().enumerate() {
        let entry = index + 16 * number;
        assert_eq!(u64_at(&file, entry), record.at as u64);
        assert_eq!(
            (u32_at(&file, entry + 8), u32_at(&file, entry + 12)),
            (record.block, record.length as u32)
        );
    }
    assert!(file[index + 48..bitmap].iter().all(|&b| b == 0), "the rest of the index");
    assert_eq!(file[bitmap], 0b1_0101, "the bitmap's lowest bit is block 0");
    assert!(file[bitmap + 1..bitmap + 4096].iter().all(|&b| b == 0));
    if !run(command("python3").args(["-c", "import backports.zstd"])).status.success() {
        return skip("the frames of a ZVHD2 by Python's backports.zstd, which is missing");
    }
    let frames: Vec<u8> = records
        .iter()
        .flat_map(|r| {
            let line = "from backports import zstd; out = zstd.decompress(data)";
            by_python(directory.path(), line, &r.payload)
        })
        .collect();
    assert!(frames == expected_blocks(&raw), "each payload is a frame of its own");
}
