//! What the policy in force says of images, buckets and keys of the mount.

use super::{ObjectName, Vfs};
use crate::catalog::CatalogImage;
use crate::error::Result;
use crate::format::OutputFormat;
use crate::policy::{ImageFacts, PolicyRequest};

impl Vfs {
    /// What the policy is told of an image whose disk `disk` is exported. Disks that cannot be opened have no size.
    pub(super) fn image_facts(&self, image: &CatalogImage, disk: &str) -> ImageFacts {
        let sidecar = &image.sidecar;
        let size = |disk| Some(self.catalog.open_disk(disk).ok()?.image().virtual_size());
        ImageFacts {
            status: sidecar.status.clone(),
            os: sidecar.os.clone(),
            origin: sidecar.origin.name().to_owned(),
            made_from: sidecar.made_from.map(|origin| origin.name().to_owned()),
            kind: sidecar.kind.name().to_owned(),
            encrypted: sidecar.encrypted,
            region: sidecar.region.clone(),
            disks: image.disks.iter().map(size).collect(),
            disk: image.disks.iter().position(|known| known.name == disk).unwrap_or(0),
        }
    }

    /// Whether the policy lets an image be exported in a format, wherever to. `id` and `disk` name it.
    ///
    /// # Errors
    /// Its refusal.
    pub(super) fn permit_image(
        &self,
        facts: &ImageFacts,
        format: OutputFormat,
        (id, disk): (&str, &str),
    ) -> Result<()> {
        let request = PolicyRequest { image: Some(facts), format: Some(format), ..PolicyRequest::default() };
        self.settings
            .policy
            .check(&request)
            .map_err(|e| e.in_file(format!("{id}/{disk}.{}", format.suffix())))
    }

    /// Whether the policy lets anything be written to a key.
    pub(super) fn permit_target(&self, (bucket, key): &ObjectName) -> Result<()> {
        let request = PolicyRequest {
            bucket: self.settings.bucket_facts.get(bucket),
            key: Some(key.as_str()),
            ..PolicyRequest::default()
        };
        self.settings.policy.check(&request).map_err(|e| e.in_file(format!("{bucket}/{key}")))
    }

    /// Whether the policy lets this image be exported to this key.
    pub(super) fn permit_export(
        &self,
        facts: &ImageFacts,
        format: OutputFormat,
        (bucket, key): &ObjectName,
    ) -> Result<()> {
        let request = PolicyRequest {
            image: Some(facts),
            format: Some(format),
            bucket: self.settings.bucket_facts.get(bucket),
            key: Some(key.as_str()),
            ..PolicyRequest::default()
        };
        self.settings.policy.check(&request).map_err(|e| e.in_file(format!("{bucket}/{key}")))
    }
}
