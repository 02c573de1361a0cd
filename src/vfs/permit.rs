//! What the policy in force says of images, buckets and keys of the mount.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::lanes::Lane;
use super::{ObjectName, Vfs};
use crate::bucket::{Bucket, ObjectMeta};
use crate::catalog::CatalogImage;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobSource, JobState, StatusImage};
use crate::format::OutputFormat;
use crate::image::{RecognizedImage, SIGNATURE_RANGE, format_of_content};
use crate::policy::{BucketFacts, ImageFacts, Policy, PolicyRequest};

/// The policy, with what the mount is told of its buckets. Every way to a key asks it.
#[derive(Clone, Debug)]
pub(super) struct Permits {
    pub(super) policy: Arc<Policy>,
    /// What the policy is told of the buckets, by name.
    pub(super) buckets: BTreeMap<String, BucketFacts>,
    /// Whether programs may write disk images that a rule about images cannot judge.
    pub(super) plain_images: bool,
}

impl Permits {
    /// Whether the policy lets an image be exported in a format, wherever to. `id` and `disk` name it.
    ///
    /// # Errors
    /// Its refusal.
    pub(super) fn image(
        &self,
        facts: &ImageFacts,
        format: OutputFormat,
        (id, disk): (&str, &str),
    ) -> Result<()> {
        let request = PolicyRequest { image: Some(facts), format: Some(format), ..PolicyRequest::default() };
        self.policy.check(&request).map_err(|e| e.in_file(format!("{id}/{disk}.{}", format.suffix())))
    }

    /// Whether the policy lets anything be written to a key.
    pub(super) fn target(&self, object: &ObjectName) -> Result<()> {
        self.check(object, PolicyRequest::default())
    }

    /// Whether the policy lets this image be exported to this key.
    pub(super) fn export(&self, facts: &ImageFacts, format: OutputFormat, object: &ObjectName) -> Result<()> {
        self.check(
            object,
            PolicyRequest { image: Some(facts), format: Some(format), ..PolicyRequest::default() },
        )
    }

    /// Whether the policy lets a program's bytes be written to a key: before they are all there, with what its name tells.
    pub(super) fn written_name(&self, object: &ObjectName) -> Result<()> {
        match OutputFormat::of_file_name(object.1.file_name()) {
            Some(_) => self.unknown_image(object),
            None => Ok(()),
        }
    }

    /// Whether the policy asks for more than where something is written to.
    pub(super) fn judges_content(&self) -> bool {
        self.policy.judges_content()
    }

    /// Whether the policy asks for the size of the exported disk, or with `data` of the data disks.
    pub(super) fn judges_size(&self, data: bool) -> bool {
        self.policy.judges_size(data)
    }

    /// Whether the policy lets a program's bytes be published at a key: `size` bytes, in which an image was recognized.
    pub(super) fn written(
        &self,
        object: &ObjectName,
        size: u64,
        recognized: Option<RecognizedImage>,
    ) -> Result<()> {
        self.content(object, size, recognized)?;
        if recognized.is_some() { self.unknown_image(object) } else { self.written_name(object) }
    }

    /// Whether the policy lets an object be at a key: the formats that its name and its content tell are asked for. Of the
    /// image that it came from nothing is asked.
    pub(super) fn content(
        &self,
        object: &ObjectName,
        size: u64,
        recognized: Option<RecognizedImage>,
    ) -> Result<()> {
        let named = OutputFormat::of_file_name(object.1.file_name());
        // A name may tell more than the content does, as that a qcow2 is compressed.
        let hidden = recognized.map(|image| image.format);
        let hidden = hidden.filter(|format| named.is_none_or(|named| named.image_format() != *format));
        let disk_size = match recognized {
            Some(image) => Some(image.disk_size.unwrap_or(size)),
            None => named.map(|_| size),
        };
        for format in [named, hidden.map(OutputFormat::of_image)].into_iter().flatten() {
            self.check(
                object,
                PolicyRequest { format: Some(format), disk_size, ..PolicyRequest::default() },
            )?;
        }
        self.target(object)
    }

    fn unknown_image(&self, object: &ObjectName) -> Result<()> {
        if self.plain_images {
            return Ok(());
        }
        self.policy.check_unknown_image().map_err(|e| e.in_file(format!("{}/{}", object.0, object.1)))
    }

    fn check(&self, (bucket, key): &ObjectName, request: PolicyRequest<'_>) -> Result<()> {
        let request = PolicyRequest { bucket: self.buckets.get(bucket), key: Some(key.as_str()), ..request };
        self.policy.check(&request).map_err(|e| e.in_file(format!("{bucket}/{key}")))
    }
}

impl Vfs {
    /// Whether the policy lets an object be renamed. Its bytes are in the bucket already: a disk image of which nothing is
    /// known is asked for by name and content only, and one that a job of this mount exported as at its export.
    pub(super) async fn permit_rename(self: &Arc<Self>, from: &ObjectName, to: &ObjectName) -> Result<()> {
        self.permits.target(to)?;
        if !self.permits.judges_content() {
            return Ok(());
        }
        let bucket = self.bucket(&from.0)?;
        let Some(meta) = bucket.head(&from.1).await? else { return Ok(()) };
        let recognized = recognize_object(bucket, &meta).await?;
        if meta.object_size > 0 {
            self.permits.content(to, meta.object_size, recognized)?;
        }
        match self.exported_image(from, &meta) {
            Some(image) => self.permit_export_again(image, to).await,
            None => Ok(()),
        }
    }

    /// The image of which a job of this mount made the object.
    fn exported_image(&self, (bucket, key): &ObjectName, meta: &ObjectMeta) -> Option<StatusImage> {
        let job = self.jobs.newest(bucket, key)?;
        let status = job.status();
        let is_its = status.status == JobState::Success && status.etag == meta.etag && status.etag.is_some();
        match &job.request().source {
            JobSource::Image(image) if is_its => Some(image.clone()),
            _ => None,
        }
    }

    /// Asks for an export under another key. Of an image that is not there any more nothing is known.
    async fn permit_export_again(self: &Arc<Self>, image: StatusImage, to: &ObjectName) -> Result<()> {
        let format = OutputFormat::from_suffix(&image.format)?;
        let disk = image.disk;
        let facts = move |vfs: &Self| {
            let image = vfs.catalog.image(&image.id)?;
            if let Some(error) = &image.error {
                return Err(Error::new(error.kind(), "the image cannot be used").because(error.clone()));
            }
            Ok(vfs.image_facts(&image, &disk))
        };
        match self.blocking(Lane::Catalog, facts).await {
            Ok(facts) => self.permits.export(&facts, format, to),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What the policy is told of an image whose disk `disk` is exported. Disks that cannot be opened have no size.
    pub(super) fn image_facts(&self, image: &CatalogImage, disk: &str) -> ImageFacts {
        let exported = image.disks.iter().position(|known| known.name == disk).unwrap_or(0);
        // Only disks whose size a rule asks for are opened.
        let size = |(number, disk)| {
            let is_asked = number == exported && self.permits.judges_size(false)
                || number > 0 && self.permits.judges_size(true);
            let open = is_asked.then(|| self.catalog.open_disk(disk).ok()).flatten()?;
            Some(open.image().virtual_size())
        };
        facts_of(image, image.disks.iter().enumerate().map(size).collect(), exported)
    }
}

/// What the policy is told of an image with disks of so many bytes, one of which is exported.
pub(super) fn facts_of(image: &CatalogImage, disks: Vec<Option<u64>>, disk: usize) -> ImageFacts {
    let sidecar = &image.sidecar;
    ImageFacts {
        status: sidecar.status.clone(),
        os: sidecar.os.clone(),
        origin: sidecar.origin.name().to_owned(),
        made_from: sidecar.made_from.map(|origin| origin.name().to_owned()),
        kind: sidecar.kind.name().to_owned(),
        encrypted: sidecar.encrypted,
        region: sidecar.region.clone(),
        disks,
        disk,
    }
}

/// The disk image that an object is by its content.
async fn recognize_object(bucket: &Bucket, meta: &ObjectMeta) -> Result<Option<RecognizedImage>> {
    let length = meta.object_size.min(SIGNATURE_RANGE);
    if length == 0 {
        return Ok(None);
    }
    let tag = meta.etag.as_deref();
    let head = bucket.read(&meta.key, 0..length, tag).await?;
    let tail = bucket.read(&meta.key, meta.object_size - length..meta.object_size, tag).await?;
    let format = format_of_content(&head, &tail);
    Ok(format.map(|format| RecognizedImage { format, disk_size: None }))
}
