//! Decompression of single units, bounded on both sides: input by what is declared, output by one unit.

use std::cell::RefCell;

use crate::error::{Error, Result};

thread_local! {
    static INFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    static ZSTD: RefCell<zstd_safe::DCtx<'static>> = RefCell::new(zstd_safe::DCtx::create());
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

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
        let mut out = vec![0; compressor.deflate_compress_bound(data.len())];
        let length = compressor.deflate_compress(data, &mut out).unwrap();
        out.truncate(length);
        out
    }

    #[test]
    fn one_unit_exactly_with_trailing_bytes_ignored() {
        let data = vec![7u8; 65536];
        let mut input = deflated(&data);
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
