//! Readers: an image file of any format as the disk that its guest sees.
//!
//! A reader parses hostile input: nothing is allocated by an unchecked field, tables are loaded lazily, and a
//! file that an image names is opened only through a [`ReferenceGate`].
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable
)]
// What numbers of a file are calculated with cannot panic, wrap or be cut off, in any build: see `units`.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

mod blocks;
pub mod inflated;
pub mod qcow2;
pub mod raw;
mod signature;
pub mod steps;
mod table;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
pub mod zvhd;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use signature::{RecognizedImage, SIGNATURE_RANGE, format_of_content, recognize};

use crate::error::{Error, ErrorKind, Result, quoted, redacted};
use crate::extent::{AllocationMap, Extent, ExtentKind};
use crate::format::{ImageFormat, OutputFormat};
use crate::storage::{Generation, Storage};
use crate::units::{FileOffset, TIB, VirtualOffset};
use crate::vfile::readable;

/// Longest chain of backing files that is followed.
pub const MAX_CHAIN_DEPTH: usize = 10;

/// Largest disk that is read, of any format: what a VHDX holds at most, and more than any cloud takes. It bounds what
/// tables and maps of a disk can cost, and is checked before anything is made for the disk.
pub const MAX_VIRTUAL_SIZE: u64 = 64 * TIB;

/// Runs that one extent is joined of at most, which bounds the time of a call.
const MAX_RUNS: u32 = 1 << 16;

/// Gets the runs of a disk one after the other, and says whether it wants the next one.
pub type ExtentVisitor<'a> = dyn FnMut(Extent) -> Result<ControlFlow<()>> + 'a;

/// Tells walks over the tables of images to give up. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Makes every walk that has a clone fail, now and later: the mount ends. For a job that is no failure.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails after [`cancel`](Self::cancel), with an error that may go away: a job that needed the walk is resumed.
    fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            let what = "reading the image's tables was given up, because the mount ends";
            return Err(Error::new(ErrorKind::Io, what).transient());
        }
        Ok(())
    }
}

/// A disk as its guest sees it, read anywhere from many threads at once.
pub trait DiskImage: Send + Sync {
    /// Bytes of the disk.
    fn virtual_size(&self) -> u64;

    /// Fills `buf` from `at`; all of it lies inside the disk.
    fn read_at(&self, at: VirtualOffset, buf: &mut [u8]) -> Result<()>;

    /// Tells `visit` what the bytes of `range`, which lies inside the disk, are, in order and without a gap, until it
    /// breaks off. Reads no image data.
    ///
    /// A walk takes time in the bytes of the tables that it passes, each of them once, whatever the size of the disk.
    /// An image below another one is walked only where the one above has nothing. Data has been checked to lie inside
    /// its file, so a truncated image fails here.
    fn visit_extents(
        &self,
        range: Range<VirtualOffset>,
        visit: &mut ExtentVisitor<'_>,
    ) -> Result<ControlFlow<()>>;

    /// What the bytes from `at` on are: at most `limit` bytes, which is not 0 and lies inside the disk. It need not be
    /// all that are alike.
    fn extent_at(&self, at: VirtualOffset, limit: u64) -> Result<Extent> {
        let mut found: Option<Extent> = None;
        let mut runs = 0u32;
        let _ = self.visit_extents(at..at + limit, &mut |extent| {
            match &mut found {
                None => found = Some(extent),
                Some(known) if known.kind == extent.kind => {
                    known.length = known.length.saturating_add(extent.length)
                }
                Some(_) => return Ok(ControlFlow::Break(())),
            }
            runs = runs.saturating_add(1);
            Ok(if runs < MAX_RUNS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        found.ok_or_else(|| Error::new(ErrorKind::Internal, "reader returned no extent").at(at))
    }

    /// Fails with [`SourceChanged`](ErrorKind::SourceChanged) when a file of the chain changed since it was opened.
    fn verify_unchanged(&self) -> Result<()>;

    /// The generations of the files that the disk's bytes come from.
    fn sources(&self) -> Vec<Generation>;

    /// What the file and its chain are, for people and for `image.json`.
    fn description(&self) -> ImageDescription;
}

/// What a reader knows of an image file.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ImageDescription {
    /// The file's name.
    pub file: String,
    /// Its format.
    pub format: ImageFormat,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes of the file.
    pub file_size: u64,
    /// Bytes of a cluster, grain or block, for formats that have them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Format-specific properties in the words of qemu-img: (name, value).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<(String, String)>,
    /// The backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Box<ImageDescription>>,
}

impl ImageDescription {
    /// The same without secrets in URLs: an image names its backing file by one, perhaps.
    #[must_use]
    pub fn without_secrets(self) -> Self {
        let hidden = |text: String| redacted(&text).into_owned();
        Self {
            file: hidden(self.file),
            properties: self.properties.into_iter().map(|(name, value)| (name, hidden(value))).collect(),
            backing: self.backing.map(|backing| Box::new(backing.without_secrets())),
            ..self
        }
    }
}

/// What an image uses another file for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReferenceKind {
    /// A backing file: another image below this one.
    Backing,
    /// An external data file: the clusters of this image, raw.
    DataFile,
    /// An extent: a part of the disk that a descriptor names.
    Extent,
}

/// A file that a gate let an image use.
pub struct GatedFile {
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// Its format as the catalog or its name tells it, when it does.
    pub format: Option<ImageFormat>,
    /// The gate for what that file refers to.
    pub gate: Arc<dyn ReferenceGate>,
}

/// Decides which files an image may refer to. Readers open no file by themselves.
pub trait ReferenceGate: Send + Sync {
    /// Opens the file that an image names `reference`, or refuses.
    ///
    /// # Errors
    /// [`ReferenceDenied`](ErrorKind::ReferenceDenied) when it is not allowed, [`NotFound`](ErrorKind::NotFound)
    /// when it is allowed and missing.
    fn open(&self, kind: ReferenceKind, reference: &str) -> Result<GatedFile>;
}

/// The gate that allows nothing.
#[derive(Debug)]
pub struct ClosedGate;

impl ReferenceGate for ClosedGate {
    fn open(&self, kind: ReferenceKind, reference: &str) -> Result<GatedFile> {
        Err(denied(kind, reference))
    }
}

/// The refusal of a reference that is not allowed.
pub fn denied(kind: ReferenceKind, reference: &str) -> Error {
    let what = match kind {
        ReferenceKind::Backing => "backing file",
        ReferenceKind::DataFile => "external data file",
        ReferenceKind::Extent => "extent",
    };
    Error::new(
        ErrorKind::ReferenceDenied,
        format!(
            "the image names the {what} {}, which is not among the files allowed for it",
            quoted(reference)
        ),
    )
}

/// Opens `storage` as an image of `format`; `depth` counts the images above it in the chain.
pub fn open_image(
    format: ImageFormat,
    storage: Arc<dyn Storage>,
    gate: &Arc<dyn ReferenceGate>,
    depth: usize,
) -> Result<Arc<dyn DiskImage>> {
    check_depth(&*storage, depth)?;
    match format {
        ImageFormat::Raw => Ok(Arc::new(raw::RawImage::open(storage)?)),
        ImageFormat::Vhd => Ok(Arc::new(vhd::VhdImage::open(storage, gate, depth)?)),
        ImageFormat::Vhdx => Ok(Arc::new(vhdx::VhdxImage::open(storage)?)),
        ImageFormat::Vmdk => Ok(Arc::new(vmdk::VmdkImage::open(storage, gate)?)),
        ImageFormat::Vdi => Ok(Arc::new(vdi::VdiImage::open(storage)?)),
        ImageFormat::Zvhd | ImageFormat::Zvhd2 => Ok(Arc::new(zvhd::ZvhdImage::open(storage)?)),
        ImageFormat::Qcow2 => Ok(Arc::new(qcow2::Qcow2Image::open(storage, gate, depth)?)),
    }
}

/// Refuses a chain that is too long.
fn check_depth(storage: &dyn Storage, depth: usize) -> Result<()> {
    if depth > MAX_CHAIN_DEPTH {
        let what = format!("the chain of backing files is longer than {MAX_CHAIN_DEPTH} or loops");
        return Err(Error::unsupported(what).in_file(storage.name()));
    }
    Ok(())
}

/// Longest name of another file, and longest other word, that is taken from an image, in bytes (qcow2.rst,
/// "backing_file_size"). It goes into errors and documents.
const MAX_NAME: usize = 1023;

/// Refuses a name that is too long to be one.
fn check_name(what: &str, bytes: usize) -> Result<()> {
    if bytes > MAX_NAME {
        return Err(Error::corrupt(format!("{what} has {bytes} bytes, more than {MAX_NAME}")));
    }
    Ok(())
}

/// Refuses a disk that is larger than any that is read.
fn check_virtual_size(virtual_size: u64) -> Result<()> {
    if virtual_size > MAX_VIRTUAL_SIZE {
        let what = format!("a disk of {virtual_size} bytes is larger than the 64 TiB that are read");
        return Err(Error::new(ErrorKind::TooLarge, what));
    }
    Ok(())
}

/// Fails when a file that is said to be an image of `output` is cut short or damaged: its beginning is that format's,
/// and something that it says it has is not there. A VHD has its footer at its end, whatever it begins with.
///
/// # Errors
/// [`Incomplete`](ErrorKind::Incomplete) when more has to come, and what reading gave when that failed. What cannot be
/// told for other reasons, such as a reference that nothing allows, is not called incomplete.
pub fn check_complete(output: OutputFormat, storage: Arc<dyn Storage>) -> Result<()> {
    let format = output.image_format();
    if storage.file_size() == 0 || !begins_as(format, &*storage)? {
        return Ok(());
    }
    let incomplete = || {
        let what = format!("this is a {} that is cut short or damaged", format.name());
        Error::new(ErrorKind::Incomplete, what).in_file(storage.name())
    };
    // The reader makes do with the copy at the start.
    if format == ImageFormat::Vhd && !vhd::ends_with_footer(&*storage)? {
        return Err(incomplete());
    }
    let gate: Arc<dyn ReferenceGate> = Arc::new(ClosedGate);
    let walked = open_image(format, Arc::clone(&storage), &gate, 0).and_then(|image| {
        let unit = image.virtual_size().div_ceil(1024).max(1);
        allocation_map(&*image, unit, &Cancel::default()).map(drop)
    });
    match walked {
        Err(error) if error.kind() == ErrorKind::CorruptImage => Err(incomplete().because(error)),
        Err(error) => match error.kind() {
            ErrorKind::Unsupported
            | ErrorKind::ReferenceDenied
            | ErrorKind::Encrypted
            | ErrorKind::TooLarge => Ok(()),
            _ => Err(error),
        },
        Ok(()) => Ok(()),
    }
}

/// Whether a file begins as images of `format` do. A VHD may begin with anything, a raw disk with nothing known.
fn begins_as(format: ImageFormat, storage: &dyn Storage) -> Result<bool> {
    let (at, signature): (u64, &[u8]) = match format {
        ImageFormat::Raw => return Ok(false),
        ImageFormat::Vhd => return Ok(true),
        ImageFormat::Qcow2 => (0, b"QFI\xfb"),
        ImageFormat::Vhdx => (0, &crate::header::vhdx::FILE_SIGNATURE),
        ImageFormat::Vmdk => (0, &crate::header::vmdk::MAGIC),
        ImageFormat::Vdi => (64, &crate::header::vdi::SIGNATURE_BYTES),
        ImageFormat::Zvhd => (0, &crate::header::zvhd::ZVHD_COOKIE),
        ImageFormat::Zvhd2 => (0, &crate::header::zvhd::ZVHD2_COOKIE),
    };
    if storage.file_size() < at.saturating_add(signature.len() as u64) {
        return Ok(false);
    }
    let mut start = vec![0; signature.len()];
    storage.read_exact_at(FileOffset(at), &mut start)?;
    Ok(start == signature)
}

/// The `length` bytes at `from` of what was read; a reader whose bounds are right is never refused.
fn slice(bytes: &[u8], from: u64, length: u64) -> Result<&[u8]> {
    let range = usize::try_from(from).ok().zip(usize::try_from(length).ok());
    let found = range.and_then(|(from, length)| bytes.get(from..)?.get(..length));
    found.ok_or_else(|| {
        let what = format!("{length} bytes at {from} of {} were asked for", bytes.len());
        Error::new(ErrorKind::Internal, what)
    })
}

/// Fills `buf` from `at`; what lies past the disk's end is zeros.
pub fn read_padded(image: &dyn DiskImage, at: VirtualOffset, buf: &mut [u8]) -> Result<()> {
    let inside = readable(image.virtual_size(), FileOffset(at.bytes()), buf.len());
    let (inside, behind) = buf.split_at_mut(inside);
    behind.fill(0);
    if inside.is_empty() { Ok(()) } else { image.read_at(at, inside) }
}

/// Fills `target` from `at` of the image below another one, which may be smaller; zeros where there is none.
fn read_below(below: Option<&dyn DiskImage>, at: VirtualOffset, target: &mut [u8]) -> Result<()> {
    match below {
        Some(image) => read_padded(image, at, target),
        None => {
            target.fill(0);
            Ok(())
        }
    }
}

/// Tells `visit` what the image below another one has in a range; it may be smaller.
fn visit_below(
    below: Option<&dyn DiskImage>,
    range: Range<VirtualOffset>,
    visit: &mut ExtentVisitor<'_>,
) -> Result<ControlFlow<()>> {
    let size = below.map_or(0, |image| image.virtual_size());
    let border = VirtualOffset(size).clamp(range.start, range.end);
    if let Some(image) = below
        && border > range.start
        && image.visit_extents(range.start..border, visit)?.is_break()
    {
        return Ok(ControlFlow::Break(()));
    }
    if border < range.end {
        return visit(Extent::new(ExtentKind::Hole, range.end - border));
    }
    Ok(ControlFlow::Continue(()))
}

/// Tells `visit` where the `length` bytes at `at` of a file have holes: for disks that are stored as they are.
fn visit_storage(
    storage: &dyn Storage,
    mut at: FileOffset,
    length: u64,
    visit: &mut ExtentVisitor<'_>,
) -> Result<ControlFlow<()>> {
    let end = at + length;
    while at < end {
        let extent = storage.extent_at(at)?;
        let length = extent.length.min(end - at);
        if visit(Extent::new(extent.kind, length))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        at += length;
    }
    Ok(ControlFlow::Continue(()))
}

/// The map of the units of `unit_size` bytes in which `image` has data: one walk over its tables.
///
/// # Errors
/// A transient one when `cancel` was called, [`TooLarge`](ErrorKind::TooLarge) when there is no memory for
/// the map, else what reading gave.
pub fn allocation_map(image: &dyn DiskImage, unit_size: u64, cancel: &Cancel) -> Result<AllocationMap> {
    let end = VirtualOffset(image.virtual_size());
    let mut builder = AllocationMap::builder(end.bytes(), unit_size);
    let mut at = VirtualOffset(0);
    let _ = image.visit_extents(at..end, &mut |extent| {
        cancel.check()?;
        if extent.kind.is_data() {
            builder.mark(at, extent.length)?;
        }
        at += extent.length;
        Ok(ControlFlow::Continue(()))
    })?;
    if at != end {
        return Err(Error::new(ErrorKind::Internal, "the reader left out a part of the disk").at(at));
    }
    builder.finish()
}
