//! Image files as the fuzzer's inputs: without their zeros, so that an image of a terabyte is some hundred bytes.

use std::sync::Arc;

use super::random::Random;
use super::sparse::SparseFile;

/// Bytes of a run of zeros from which on they are left out, and to which places are aligned.
const SECTOR: u64 = 512;

/// What a large tail counts.
const TAIL_UNIT: u64 = 1 << 16;

/// Largest file: zeros cost nothing.
const MAX_FILE: u64 = 1 << 47;

/// An image file, and what is done with it.
///
/// Packed: `options` (1 byte), `tail` (4), then for each piece `skip` (4), its length (2) and its bytes; little-endian.
/// A piece begins `skip` sectors behind the sector in which the one before ended. The file ends `tail` bytes, or with its
/// highest bit set so many times 64 KiB, behind the last piece.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedImage {
    /// Bit 0: checksums are made right; the others choose what is done.
    pub options: u8,
    pub file_size: u64,
    /// By their places, which are multiples of a sector and ascend; none overlaps another.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

impl PackedImage {
    /// Any input is an image.
    pub fn unpack(input: &[u8]) -> Self {
        let mut input = Reader(input);
        let options = input.number(1) as u8;
        let tail = input.number(4);
        let (mut pieces, mut end) = (Vec::new(), 0u64);
        while !input.0.is_empty() && end < MAX_FILE {
            let skip = input.number(4) * SECTOR;
            let length = input.number(2) as usize;
            let bytes = input.bytes(length);
            let at = end.next_multiple_of(SECTOR) + skip;
            end = at + bytes.len() as u64;
            pieces.push((at, bytes));
        }
        let tail = if tail >> 31 == 1 { (tail & !(1 << 31)) * TAIL_UNIT } else { tail };
        Self { options, file_size: end + tail, pieces }
    }

    /// The input that [`unpack`](Self::unpack) makes this of, at least where all bytes between pieces are zeros.
    pub fn pack(&self) -> Vec<u8> {
        let end = self.pieces.last().map_or(0, |(at, bytes)| at + bytes.len() as u64);
        let tail = self.file_size.saturating_sub(end);
        let tail = if tail < 1 << 31 { tail } else { (tail / TAIL_UNIT).min((1 << 31) - 1) | 1 << 31 };
        let mut packed = vec![self.options];
        packed.extend((tail as u32).to_le_bytes());
        let mut end = 0u64;
        for (at, bytes) in &self.pieces {
            for (index, part) in bytes.chunks((u16::MAX as usize).div_ceil(2)).enumerate() {
                let at = at + index as u64 * (1 << 15);
                let skip = at.saturating_sub(end.next_multiple_of(SECTOR)) / SECTOR;
                packed.extend((skip as u32).to_le_bytes());
                packed.extend((part.len() as u16).to_le_bytes());
                packed.extend(part);
                end = at + part.len() as u64;
            }
        }
        packed
    }

    /// The image that a file is.
    pub fn of(options: u8, file: &[u8]) -> Self {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for (index, sector) in file.chunks(SECTOR as usize).enumerate() {
            let at = index as u64 * SECTOR;
            if sector.iter().all(|&byte| byte == 0) {
                continue;
            }
            match pieces.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at => bytes.extend(sector),
                _ => pieces.push((at, sector.to_vec())),
            }
        }
        Self { options, file_size: file.len() as u64, pieces }
    }

    /// The file.
    pub fn file(&self, name: &str) -> Arc<SparseFile> {
        let pieces = self.pieces.iter().filter(|(_, bytes)| !bytes.is_empty());
        let inside = |at: u64, bytes: &[u8]| {
            let length = self.file_size.saturating_sub(at).min(bytes.len() as u64);
            bytes[..length as usize].to_vec()
        };
        pieces
            .filter(|(at, _)| *at < self.file_size)
            .fold(SparseFile::new(name, self.file_size), |file, (at, bytes)| {
                file.with(*at, inside(*at, bytes))
            })
            .done()
    }

    /// Makes a file of it, with holes between pieces.
    pub fn write_to(&self, path: &std::path::Path) {
        let file = std::fs::File::create(path).expect("the file can be made");
        file.set_len(self.file_size).expect("the file can be so large");
        for (at, bytes) in &self.pieces {
            std::os::unix::fs::FileExt::write_all_at(&file, bytes, *at).expect("the file can be written");
        }
    }

    /// The bytes at `at`, zeros between pieces.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut read = [0; N];
        self.each(at, N as u64, |range, bytes| read[range].copy_from_slice(bytes));
        read
    }

    /// All bytes of a range.
    pub fn range(&self, at: u64, length: u64) -> Vec<u8> {
        let mut read = vec![0; length as usize];
        self.each(at, length, |range, bytes| read[range].copy_from_slice(bytes));
        read
    }

    /// Tells the parts of a range that pieces have.
    fn each(&self, at: u64, length: u64, mut part: impl FnMut(std::ops::Range<usize>, &[u8])) {
        let end = at.saturating_add(length);
        for (place, piece) in &self.pieces {
            let (from, to) = (at.max(*place), end.min(place + piece.len() as u64));
            if from < to {
                part(
                    (from - at) as usize..(to - at) as usize,
                    &piece[(from - place) as usize..(to - place) as usize],
                );
            }
        }
    }

    /// Puts bytes where pieces are; elsewhere nothing happens.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at.saturating_add(bytes.len() as u64);
        for (place, piece) in &mut self.pieces {
            let (from, to) = (at.max(*place), end.min(*place + piece.len() as u64));
            if from < to {
                piece[(from - *place) as usize..(to - *place) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
    }

    /// Changes the image as somebody does who knows that there are tables in it: numbers at aligned places, from the ends
    /// of their ranges, from the file's size, or from elsewhere in the file; pieces that are moved, doubled and cut off.
    pub fn mutate(&mut self, random: &mut Random) {
        match random.below(20) {
            0 => self.file_size = random.below(self.file_size + 1),
            1 => self.file_size = self.file_size.saturating_mul(1 + random.below(5)).min(MAX_FILE),
            2 => self.options = random.next() as u8 | 1,
            3 if !self.pieces.is_empty() => {
                let (from, to) = (self.any(random), self.any(random));
                self.pieces[to].1 = self.pieces[from].1.clone();
                self.repair();
            }
            4 if !self.pieces.is_empty() => {
                let piece = self.any(random);
                let at = self.pieces[piece].0;
                self.pieces[piece].0 =
                    if random.below(2) == 0 { at / 2 } else { at + random.below(9) * SECTOR };
                self.repair();
            }
            5 if !self.pieces.is_empty() => {
                let piece = self.any(random);
                let keep = random.below(self.pieces[piece].1.len() as u64 + 1) as usize;
                self.pieces[piece].1.truncate(keep);
            }
            _ if !self.pieces.is_empty() => {
                for _ in 0..1 + random.below(3) {
                    self.change_number(random);
                }
            }
            _ => {}
        }
    }

    fn any(&self, random: &mut Random) -> usize {
        random.below(self.pieces.len() as u64) as usize
    }

    /// Pieces in order, without overlaps.
    fn repair(&mut self) {
        for (at, _) in &mut self.pieces {
            *at = *at / SECTOR * SECTOR;
        }
        self.pieces.sort_by_key(|(at, _)| *at);
        self.pieces.dedup_by_key(|(at, _)| *at);
        for index in 1..self.pieces.len() {
            let next = self.pieces[index].0;
            let (at, bytes) = &mut self.pieces[index - 1];
            bytes.truncate((next - *at) as usize);
        }
    }

    fn change_number(&mut self, random: &mut Random) {
        let (piece, other) = (self.any(random), self.any(random));
        let width = [1, 2, 4, 4, 4, 8, 8][random.below(7) as usize];
        let place = |length: usize, random: &mut Random| {
            // Headers are at the starts of pieces.
            let most = if random.below(2) == 0 { length.min(128) } else { length };
            (random.below((most as u64 / width as u64).max(1)) as usize) * width
        };
        let at = place(self.pieces[piece].1.len(), random);
        let known = place(self.pieces[other].1.len(), random);
        let bytes = &self.pieces[other].1;
        let copied: Vec<u8> = bytes.iter().skip(known).take(width).copied().collect();
        let Some(target) = self.pieces[piece].1.get_mut(at..at + width) else { return };
        if random.below(4) == 0 && copied.len() == width {
            target.copy_from_slice(&copied);
            return;
        }
        let little = random.below(2) == 0;
        let old = target.iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
        let old = if little { old.swap_bytes() >> (64 - 8 * width as u32) } else { old };
        let all = u64::MAX >> (64 - 8 * width as u32);
        let size = self.file_size;
        let new = match random.below(12) {
            0 => 0,
            1 => all,
            2 => all - random.below(8),
            3 => 1 << random.below(8 * width as u64),
            4 => (1u64 << random.below(8 * width as u64)).wrapping_sub(1),
            5 => old.wrapping_add(1),
            6 => old.wrapping_sub(1),
            7 => old ^ 1 << random.below(8 * width as u64),
            8 => size / [1, 512, 4096, 65536, 1 << 20][random.below(5) as usize],
            9 => old.wrapping_mul(2),
            10 => old / 2,
            _ => random.next() >> random.below(64),
        } & all;
        let bytes = if little {
            new.to_le_bytes()[..width].to_vec()
        } else {
            new.to_be_bytes()[8 - width..].to_vec()
        };
        target.copy_from_slice(&bytes);
    }
}

/// Takes an input apart; behind its end are zeros.
pub struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    /// A little-endian number of so many bytes.
    pub fn number(&mut self, width: usize) -> u64 {
        self.bytes(width).iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// So many bytes, or those that are left.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let (bytes, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        bytes.to_vec()
    }
}
