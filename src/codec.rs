//! Compression and decompression of single units.
//!
//! Decompression is bounded on both sides: input by what is declared, output by one unit. Compression is
//! deterministic: equal bytes give equal bytes on every machine, with one version of a compressor.

mod deflate;

use std::cell::RefCell;

use sha2::{Digest, Sha256};
use zlib_rs::{Deflate, DeflateFlush};

use self::deflate::Deflater;
use crate::error::{Error, ErrorKind, Result};

thread_local! {
    static INFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    static ZSTD: RefCell<zstd_safe::DCtx<'static>> = RefCell::new(zstd_safe::DCtx::create());
    static DEFLATE: RefCell<Option<(u8, libdeflater::Compressor)>> = const { RefCell::new(None) };
    static DEFLATE_SMALL_WINDOW: RefCell<Deflater> = RefCell::default();
    static ZLIB: RefCell<Option<(u8, Deflate)>> = const { RefCell::new(None) };
    static ZSTD_COMPRESS: RefCell<zstd_safe::CCtx<'static>> = RefCell::new(zstd_safe::CCtx::create());
}

/// How a compressed unit is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A raw deflate stream (RFC 1951) by libdeflate.
    Deflate,
    /// A raw deflate stream whose distances stay below 4 KiB, by this crate.
    DeflateSmallWindow,
    /// A zlib stream (RFC 1950) by libdeflate.
    Zlib,
    /// Raw deflate blocks that end with a sync flush instead of a final block, by zlib-rs: streams of several units
    /// can be put behind one another.
    DeflateFlushed,
    /// A zstd frame (RFC 8878).
    Zstd,
}

/// A compressor with its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Compressor {
    compression: Compression,
    level: u8,
}

impl Compressor {
    /// A compressor; without a level, the one that was measured to be worth its time.
    pub fn new(compression: Compression, level: Option<u8>) -> Result<Self> {
        let (default, highest) = match compression {
            // On a Debian root filesystem, level 6 is 0.5 % smaller and takes 13 % more time.
            Compression::Deflate | Compression::Zlib => (5, 12),
            Compression::DeflateFlushed => (5, 9),
            // On that file system, level 5 is as small as what qemu-img writes.
            Compression::DeflateSmallWindow => (5, deflate::HIGHEST_LEVEL),
            Compression::Zstd => (3, 19),
        };
        let level = level.unwrap_or(default);
        if !(1..=highest).contains(&level) {
            let what = format!("compression level {level} is not between 1 and {highest}");
            return Err(Error::new(ErrorKind::Malformed, what));
        }
        Ok(Self { compression, level })
    }

    /// Bytes that `length` bytes compress to at most.
    pub fn bound(self, length: usize) -> usize {
        match self.compression {
            Compression::Zstd => zstd_safe::compress_bound(length),
            // libdeflate.h, libdeflate_deflate_compress_bound: 5 bytes for each 5000, and the stream's ends.
            Compression::Deflate | Compression::Zlib => length + 5 * (length / 5000 + 1) + 16,
            // zlib's bound for any window and memory level (deflate.c, deflateBound), and the flush. The other one stores
            // what does not become smaller, in blocks of at least 1 KiB.
            Compression::DeflateFlushed | Compression::DeflateSmallWindow => length + length / 8 + 128,
        }
    }

    /// Compresses one unit.
    pub fn compress(self, input: &[u8]) -> Result<Vec<u8>> {
        let mut output = vec![0; self.bound(input.len())];
        let length = match self.compression {
            Compression::Deflate => self.libdeflate(|c| c.deflate_compress(input, &mut output))?,
            Compression::Zlib => self.libdeflate(|c| c.zlib_compress(input, &mut output))?,
            Compression::DeflateFlushed => self.zlib(input, &mut output)?,
            Compression::DeflateSmallWindow => {
                return Ok(DEFLATE_SMALL_WINDOW.with_borrow_mut(|d| d.compress(input, self.level)));
            }
            Compression::Zstd => self.zstd(input, &mut output)?,
        };
        output.truncate(length);
        output.shrink_to_fit();
        Ok(output)
    }

    fn libdeflate(
        self,
        compress: impl FnOnce(&mut libdeflater::Compressor) -> Result<usize, libdeflater::CompressionError>,
    ) -> Result<usize> {
        DEFLATE.with_borrow_mut(|kept| {
            if kept.as_ref().is_none_or(|(level, _)| *level != self.level) {
                let level = libdeflater::CompressionLvl::new(self.level.into());
                let level = level
                    .map_err(|e| Error::new(ErrorKind::Internal, format!("compression level: {e:?}")))?;
                *kept = Some((self.level, libdeflater::Compressor::new(level)));
            }
            match kept {
                Some((_, compressor)) => compress(compressor).map_err(|e| failed(&e)),
                None => Err(failed(&"no compressor")),
            }
        })
    }

    fn zlib(self, input: &[u8], output: &mut [u8]) -> Result<usize> {
        ZLIB.with_borrow_mut(|kept| {
            // A new stream clears more memory than a unit has.
            let (_, stream) = match kept {
                Some(known) if known.0 == self.level => known,
                other => other.insert((self.level, Deflate::new(self.level.into(), false, 15))),
            };
            stream.reset();
            stream.compress(input, output, DeflateFlush::SyncFlush).map_err(|e| failed(&e.as_str()))?;
            let written = stream.total_out() as usize;
            // A full buffer would mean that the flush was cut off.
            if stream.total_in() != input.len() as u64 || written >= output.len() {
                return Err(failed(&"the stream is longer than its bound"));
            }
            Ok(written)
        })
    }

    fn zstd(self, input: &[u8], output: &mut [u8]) -> Result<usize> {
        let failed = |code| failed(&zstd_safe::get_error_name(code));
        ZSTD_COMPRESS.with_borrow_mut(|zstd| zstd.compress(output, input, self.level.into()).map_err(failed))
    }

    /// What tells this compressor from every other one whose output may differ: its name and level, and a digest
    /// of what it makes of a fixed text, which changes when a new version of the library compresses otherwise.
    pub fn identity(self) -> Result<String> {
        let text: Vec<u8> = (0..20_000u32).flat_map(|n| (n.wrapping_mul(n) % 9973).to_le_bytes()).collect();
        let digest = Sha256::digest(self.compress(&text)?);
        Ok(format!("{:?}-{}-{}", self.compression, self.level, hex::encode(&digest[..8])))
    }
}

fn failed(why: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorKind::Internal, format!("cannot compress: {why}"))
}

/// The empty final block that ends a deflate stream after a sync flush (RFC 1951, section 3.2.4).
const FINAL_BLOCK: [u8; 5] = [1, 0, 0, 0xff, 0xff];

/// Bytes that a deflate stream can refer back to (RFC 1951, section 2).
pub const WINDOW: usize = 32 << 10;

/// Inflates a part of a raw deflate stream that begins and ends at sync flushes into exactly `output.len()` bytes.
/// `window` is what came before it, of which the last 32 KiB count; without it the part must refer to nothing before.
pub fn inflate_flushed(input: &[u8], window: Option<&[u8]>, output: &mut [u8]) -> Result<()> {
    // The window goes in front as a stored block, so that any inflater can do it.
    let window = window.map_or(&[][..], |w| &w[w.len().saturating_sub(WINDOW)..]);
    let mut stream = Vec::with_capacity(input.len() + window.len() + 10);
    if !window.is_empty() {
        let length = window.len() as u16;
        stream.push(0);
        stream.extend(length.to_le_bytes());
        stream.extend((!length).to_le_bytes());
        stream.extend(window);
    }
    stream.extend(input);
    stream.extend(FINAL_BLOCK);
    if window.is_empty() {
        return inflate_raw(&stream, output);
    }
    let mut all = vec![0; window.len() + output.len()];
    inflate_raw(&stream, &mut all)?;
    output.copy_from_slice(&all[window.len()..]);
    Ok(())
}

/// Inflates one raw deflate stream (RFC 1951) at the start of `input`, which must give exactly `output.len()`
/// bytes. What follows the stream in `input` is ignored: formats round units up to sectors.
pub fn inflate_raw(input: &[u8], output: &mut [u8]) -> Result<()> {
    let written = INFLATE.with_borrow_mut(|inflate| {
        inflate
            .deflate_decompress(input, output)
            .map_err(|e| Error::corrupt("deflate stream is damaged").because(e))
    })?;
    exactly(written, output.len())
}

/// Inflates one zlib stream (RFC 1950) at the start of `input` into at most `output.len()` bytes; says how many.
pub fn inflate_zlib(input: &[u8], output: &mut [u8]) -> Result<usize> {
    let inflated = INFLATE.with_borrow_mut(|inflate| inflate.zlib_decompress(input, output));
    inflated.map_err(|e| Error::corrupt("zlib stream is damaged").because(e))
}

/// Decompresses one zstd frame (RFC 8878) at the start of `input` into exactly `output.len()` bytes; what
/// follows the frame is ignored.
pub fn unzstd(input: &[u8], output: &mut [u8]) -> Result<()> {
    let wanted = output.len();
    let failed = |code| Error::corrupt(format!("zstd frame is damaged: {}", zstd_safe::get_error_name(code)));
    let length = zstd_safe::find_frame_compressed_size(input).map_err(failed)?;
    let written = ZSTD.with_borrow_mut(|zstd| zstd.decompress(output, &input[..length])).map_err(failed)?;
    exactly(written, wanted)
}

fn exactly(written: usize, wanted: usize) -> Result<()> {
    if written == wanted {
        return Ok(());
    }
    Err(Error::corrupt(format!("compressed unit holds {written} bytes instead of {wanted}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compressed(compression: Compression, data: &[u8]) -> Vec<u8> {
        let compressor = Compressor::new(compression, None).unwrap();
        let out = compressor.compress(data).unwrap();
        assert!(out.len() <= compressor.bound(data.len()));
        assert_eq!(out, compressor.compress(data).unwrap(), "not deterministic");
        out
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn what_is_compressed_inflates_to_the_same() {
        let prose = "the quick brown fox jumps over the lazy dog ".repeat(3000).into_bytes();
        for data in [noise(65536), noise(2 << 20), prose[..65536].to_vec(), vec![0; 512]] {
            let mut out = vec![1; data.len()];
            for compression in [Compression::Deflate, Compression::DeflateSmallWindow] {
                inflate_raw(&compressed(compression, &data), &mut out).unwrap();
                assert_eq!(out, data);
            }
            assert_eq!(inflate_zlib(&compressed(Compression::Zlib, &data), &mut out).unwrap(), data.len());
            assert_eq!(out, data);
            unzstd(&compressed(Compression::Zstd, &data), &mut out).unwrap();
            assert_eq!(out, data);
        }
    }

    #[test]
    fn flushed_parts_inflate_alone_and_together() {
        let parts = [noise(100_000), b"abc".repeat(20_000), noise(5)];
        let whole = parts.concat();
        let mut stream = Vec::new();
        for part in &parts {
            let one = compressed(Compression::DeflateFlushed, part);
            let mut out = vec![0; part.len()];
            inflate_flushed(&one, None, &mut out).unwrap();
            assert_eq!(&out, part);
            inflate_flushed(&one, Some(&noise(77)), &mut out).unwrap();
            assert_eq!(&out, part);
            stream.extend(one);
        }
        let mut out = vec![0; whole.len()];
        inflate_flushed(&stream, None, &mut out).unwrap();
        assert_eq!(out, whole);
    }

    #[test]
    fn a_part_that_refers_back_needs_its_window() {
        // One stream, flushed in the middle, the second half a copy of the first.
        let half = noise(30_000);
        let mut deflate = Deflate::new(6, false, 15);
        let mut out = vec![0; 100_000];
        deflate.compress(&half, &mut out, DeflateFlush::SyncFlush).unwrap();
        let first = deflate.total_out() as usize;
        deflate.compress(&half, &mut out[first..], DeflateFlush::SyncFlush).unwrap();
        let second = out[first..deflate.total_out() as usize].to_vec();
        assert!(second.len() < 1000);
        let mut plain = vec![0; half.len()];
        assert!(inflate_flushed(&second, None, &mut plain).is_err());
        inflate_flushed(&second, Some(&half), &mut plain).unwrap();
        assert_eq!(plain, half);
    }

    #[test]
    fn levels_are_checked_and_told_apart() {
        assert!(Compressor::new(Compression::Zstd, Some(0)).is_err());
        assert!(Compressor::new(Compression::DeflateFlushed, Some(10)).is_err());
        let identity =
            |level| Compressor::new(Compression::Deflate, Some(level)).unwrap().identity().unwrap();
        assert_ne!(identity(1), identity(12));
    }

    #[test]
    fn one_unit_exactly_with_trailing_bytes_ignored() {
        let data = vec![7u8; 65536];
        let mut input = compressed(Compression::Deflate, &data);
        input.extend_from_slice(&[0xff; 100]);
        let mut output = vec![0; 65536];
        inflate_raw(&input, &mut output).unwrap();
        assert_eq!(output, data);
        assert!(inflate_raw(&input, &mut vec![0; 65535]).is_err());
        assert!(inflate_raw(&input, &mut vec![0; 65537]).is_err());

        let mut frame = vec![0; zstd_safe::compress_bound(data.len())];
        let length = zstd_safe::compress(&mut frame[..], &data, 3).unwrap();
        frame.truncate(length);
        frame.extend_from_slice(&[0xee; 77]);
        let mut output = vec![0; 65536];
        unzstd(&frame, &mut output).unwrap();
        assert_eq!(output, data);
        assert!(unzstd(&frame, &mut vec![0; 65535]).is_err());
        assert!(unzstd(&frame, &mut vec![0; 65537]).is_err());
        assert!(unzstd(&frame[..length - 1], &mut output).is_err());
    }
}
