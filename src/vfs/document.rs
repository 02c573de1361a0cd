//! `image.json`: what an image is, and what can be had of it.

use std::sync::Arc;

use serde::Serialize;

use super::Vfs;
use super::permit::facts_of;
use super::tree::MAX_NAME;
use crate::catalog::{CatalogDisk, CatalogImage, OpenDisk, Sidecar};
use crate::error::{Error, ErrorKind, Result, shown};
use crate::export::StatusError;
use crate::format::OutputFormat;
use crate::image::ImageDescription;
use crate::policy::ImageFacts;

/// Bytes of each text of an error that the formats of a disk repeat.
const MAX_BRIEF: usize = 512;

#[derive(Serialize)]
struct ImageDocument<'a> {
    version: u32,
    id: &'a str,
    name: &'a str,
    status: Option<&'a str>,
    os: Option<&'a str>,
    origin: crate::catalog::ImageOrigin,
    made_from: Option<crate::catalog::ImageOrigin>,
    kind: crate::catalog::ImageKind,
    region: Option<&'a str>,
    encrypted: bool,
    /// The policy that decides what is exportable.
    policy: &'a str,
    tags: &'a std::collections::BTreeMap<String, String>,
    /// Whether every disk can be exported in some format.
    exportable: bool,
    error: Option<StatusError>,
    disks: Vec<DiskDocument>,
}

#[derive(Serialize)]
struct DiskDocument {
    name: String,
    role: &'static str,
    virtual_size: Option<u64>,
    generation: Option<String>,
    source: Option<ImageDescription>,
    error: Option<StatusError>,
    formats: Vec<FormatDocument>,
}

#[derive(Serialize)]
struct FormatDocument {
    format: &'static str,
    file: String,
    /// Bytes, when they are known without compressing the disk.
    size: Option<u64>,
    /// Bytes that a compressed file has at most, until its size is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    largest_size: Option<u64>,
    exportable: bool,
    error: Option<StatusError>,
}

impl Vfs {
    /// The bytes of an image's `image.json`.
    pub(super) fn image_document(&self, image: &CatalogImage) -> Vec<u8> {
        let Sidecar { name, status, os, origin, made_from, kind, region, encrypted, tags, .. } =
            &*image.sidecar;
        let disks = self.disk_documents(image);
        let document = ImageDocument {
            version: 1,
            id: &image.id,
            name: name.as_deref().unwrap_or(&image.id),
            status: status.as_deref(),
            os: os.as_deref(),
            origin: *origin,
            made_from: *made_from,
            kind: *kind,
            region: region.as_deref(),
            encrypted: *encrypted,
            policy: &self.settings.policy.name,
            tags,
            exportable: !disks.is_empty() && disks.iter().all(|d| d.formats.iter().any(|f| f.exportable)),
            error: image.error.as_ref().map(StatusError::from),
            disks,
        };
        let mut json = serde_json::to_vec_pretty(&document).expect("the document has only string keys");
        json.push(b'\n');
        json
    }

    /// Each disk is opened once, however many there are.
    fn disk_documents(&self, image: &CatalogImage) -> Vec<DiskDocument> {
        let open = |disk| match &image.error {
            Some(error) => Err(error.clone()),
            None => self.catalog.open_disk(disk),
        };
        let opened: Vec<_> = image.disks.iter().map(open).collect();
        let size = |open: &Result<Arc<OpenDisk>>| Some(open.as_ref().ok()?.image().virtual_size());
        let mut facts = facts_of(image, opened.iter().map(size).collect(), 0);
        let mut documents = Vec::new();
        for (index, (disk, open)) in image.disks.iter().zip(&opened).enumerate() {
            facts.disk = index;
            documents.push(self.disk_document(image, &facts, disk, open));
        }
        documents
    }

    fn disk_document(
        &self,
        image: &CatalogImage,
        facts: &ImageFacts,
        disk: &CatalogDisk,
        open: &Result<Arc<OpenDisk>>,
    ) -> DiskDocument {
        let document = |&format| {
            let permit = self.permits.image(facts, format, (&image.id, &disk.name));
            format_document(&disk.name, format, &open.clone().and_then(|open| permit.map(|()| open)))
        };
        let formats = self.settings.formats.iter().map(document).collect();
        DiskDocument {
            name: disk.name.clone(),
            role: if facts.disk == 0 { "system" } else { "data" },
            virtual_size: open.as_ref().ok().map(|o| o.image().virtual_size()),
            generation: open.as_ref().ok().map(|o| o.generation().shown().to_owned()),
            source: open.as_ref().ok().map(|o| o.image().description().without_secrets()),
            error: open.as_ref().err().map(StatusError::from),
            formats,
        }
    }
}

/// An error as each format repeats it: an image may have hundreds of disks and each a dozen formats, and what a disk's own
/// error says in full is bounded by what errors are.
fn brief(error: &Error) -> StatusError {
    let cut = |text: String| shown(&text, MAX_BRIEF).into_owned();
    let full = StatusError::from(error);
    StatusError {
        description: cut(full.description),
        details: cut(full.details),
        cause: full.cause.map(cut),
        ..full
    }
}

fn format_document(disk: &str, format: OutputFormat, open: &Result<Arc<OpenDisk>>) -> FormatDocument {
    let name = format!("{disk}.{}", format.suffix());
    let too_long =
        || Error::new(ErrorKind::NameTooLong, format!("the file's name has more than {MAX_NAME} bytes"));
    let nameable = if name.len() <= MAX_NAME { Ok(()) } else { Err(too_long()) };
    let file = nameable.and_then(|()| Ok(open.clone()?.file(format)?.virtual_file()));
    let size = file.as_ref().ok().and_then(|f| f.known_size());
    FormatDocument {
        format: format.suffix(),
        file: name,
        size,
        largest_size: file.as_ref().ok().filter(|_| size.is_none()).map(|f| f.file_size()),
        exportable: file.is_ok(),
        error: file.err().as_ref().map(brief),
    }
}
