//! What recorded ranges are of: a file of an image.

use std::sync::Arc;

use super::super::lanes::Lane;
use crate::export::StatusImage;
use crate::format::OutputFormat;
use crate::policy::ImageFacts;
use crate::vfile::VirtualFile;

/// An image file as the source of a range.
#[derive(Clone)]
pub(in super::super) struct RangeSource {
    pub(in super::super) file: Arc<dyn VirtualFile>,
    /// The size that was shown when it was opened: that of a compressed file may be larger than the true one.
    pub(in super::super) shown_size: u64,
    pub(in super::super) image: StatusImage,
    pub(in super::super) format: OutputFormat,
    /// What the policy is told of the image.
    pub(in super::super) facts: Arc<ImageFacts>,
}

impl RangeSource {
    /// Where it is read.
    pub(in super::super) fn lane(&self) -> Lane {
        Lane::Image(self.image.id.clone())
    }

    /// Bytes that are the whole file: the true size once it is known, until then the one that was shown.
    pub(super) fn whole_size(&self) -> u64 {
        self.file.known_size().unwrap_or(self.shown_size)
    }
}
