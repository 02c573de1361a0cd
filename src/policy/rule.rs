//! One rule of a policy: its conditions and its refusal.

use serde::Deserialize;
use serde::de::Error as _;

use super::is_of;
use crate::error::{Error, ErrorKind, Result};
use crate::format::OutputFormat;
use crate::units::parse_bytes;

/// What a policy is told of an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageFacts {
    /// Its state in its cloud's words.
    pub status: Option<String>,
    /// The operating system.
    pub os: Option<String>,
    /// private, public, market or shared.
    pub origin: String,
    /// The origin of the image that it was made of.
    pub made_from: Option<String>,
    /// system, full-machine or backup.
    pub kind: String,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Where it is.
    pub region: Option<String>,
    /// Bytes of each disk as far as they can be told, the system disk first.
    pub disks: Vec<Option<u64>>,
    /// The disk that is exported.
    pub disk: usize,
}

/// What a policy is told of a bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketFacts {
    /// Its storage class.
    pub storage_class: Option<String>,
    /// Where it is.
    pub region: Option<String>,
}

/// What is known of a request so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct PolicyRequest<'a> {
    /// The image and the disk.
    pub image: Option<&'a ImageFacts>,
    /// The format.
    pub format: Option<OutputFormat>,
    /// The bucket.
    pub bucket: Option<&'a BucketFacts>,
    /// The object's key.
    pub key: Option<&'a str>,
    /// Bytes of the disk, where that is known and the image is not.
    pub disk_size: Option<u64>,
}

/// A refusal and when it is made.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// All of them must be met.
    #[serde(default)]
    when: Conditions,
    /// Our code of the refusal, from which the errno follows.
    #[serde(deserialize_with = "kind")]
    refuse: ErrorKind,
    /// The cloud's code.
    code: Option<String>,
    /// The reason, for people.
    message: String,
}

/// Conditions; of each list one has to match. Words are compared without regard to case.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Conditions {
    status: Option<Vec<String>>,
    status_not: Option<Vec<String>>,
    origin: Option<Vec<String>>,
    made_from: Option<Vec<String>>,
    kind: Option<Vec<String>>,
    /// Words that the operating system's name contains.
    os: Option<Vec<String>>,
    encrypted: Option<bool>,
    /// The exported disk has this many bytes or more.
    size_from: Option<Size>,
    /// The exported disk has more bytes.
    size_above: Option<Size>,
    /// Any data disk has more bytes.
    data_disk_above: Option<Size>,
    /// There are more data disks.
    data_disks_above: Option<usize>,
    format: Option<Vec<String>>,
    format_not: Option<Vec<String>>,
    storage_class_not: Option<Vec<String>>,
    /// Image and bucket are in different regions.
    other_region: Option<bool>,
    /// The key has a directory whose first part is not this many letters and digits.
    prefix_not: Option<Letters>,
    /// The object's name has more bytes.
    name_above: Option<usize>,
    /// The object's name has one of these characters.
    name_has: Option<String>,
}

/// How many letters and digits.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Letters {
    least: usize,
    most: usize,
}

/// A number of bytes, written as `128G`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Deserialize)]
#[serde(try_from = "String")]
struct Size(u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        parse_bytes(&text).map(Self).map_err(|_| format!("{text:?} is no number of bytes"))
    }
}

fn kind<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ErrorKind, D::Error> {
    let code = String::deserialize(deserializer)?;
    let known = ErrorKind::ALL.into_iter().find(|kind| kind.code() == code);
    known.ok_or_else(|| D::Error::custom(format!("unknown error code {code:?}")))
}

/// Whether a condition is met: one that is not made is, one about what is not known is not.
fn met<C: ?Sized, F>(condition: Option<&C>, fact: Option<F>, test: impl FnOnce(&C, F) -> bool) -> bool {
    match (condition, fact) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(condition), Some(fact)) => test(condition, fact),
    }
}

fn is_among(words: &[String], fact: &str) -> bool {
    words.iter().any(|word| word.eq_ignore_ascii_case(fact))
}

impl Rule {
    /// A rule without a condition would refuse everything: that is a mistake.
    pub(super) fn validate(&self) -> Result<()> {
        let empty = self.when == Conditions::default();
        if empty { Err(Error::new(ErrorKind::Malformed, "a rule has no condition")) } else { Ok(()) }
    }

    /// Whether the rule asks for something that only an image has.
    pub(super) fn judges_images(&self) -> bool {
        // Every condition is named, so that a new one is not forgotten here.
        let Conditions {
            status,
            status_not,
            origin,
            made_from,
            kind,
            os,
            encrypted,
            size_from: _,
            size_above: _,
            data_disk_above,
            data_disks_above,
            format: _,
            format_not: _,
            storage_class_not: _,
            other_region,
            prefix_not: _,
            name_above: _,
            name_has: _,
        } = &self.when;
        let words = [status, status_not, origin, made_from, kind, os].into_iter().any(Option::is_some);
        let has = encrypted.is_some() || data_disk_above.is_some() || data_disks_above.is_some();
        words || has || other_region.is_some()
    }

    /// Whether the rule asks for the size of the exported disk, or with `data` of the data disks.
    pub(super) fn judges_size(&self, data: bool) -> bool {
        let exported = self.when.size_from.is_some() || self.when.size_above.is_some();
        if data { self.when.data_disk_above.is_some() } else { exported }
    }

    pub(super) fn applies(&self, request: &PolicyRequest<'_>) -> bool {
        self.when.are_met_by_image(request) && self.when.are_met_by_target(request)
    }

    pub(super) fn refusal(&self, policy: &str) -> Error {
        let error = Error::new(self.refuse, format!("{} (policy {policy})", self.message));
        match &self.code {
            Some(code) => error.with_cloud_code(code),
            None => error,
        }
    }
}

impl Conditions {
    fn are_met_by_image(&self, request: &PolicyRequest<'_>) -> bool {
        let image = request.image;
        let status = image.and_then(|i| i.status.as_deref());
        let os = image.and_then(|i| i.os.as_deref()).map(str::to_ascii_lowercase);
        let size = match image {
            Some(image) => image.disks.get(image.disk).copied().flatten(),
            None => request.disk_size,
        };
        let data = image.map(|i| i.disks.get(1..).unwrap_or_default());
        met(self.status.as_deref(), status, is_among)
            && met(self.status_not.as_deref(), status, |words, status| !is_among(words, status))
            && met(self.origin.as_deref(), image.map(|i| i.origin.as_str()), is_among)
            && met(self.made_from.as_deref(), image.and_then(|i| i.made_from.as_deref()), is_among)
            && met(self.kind.as_deref(), image.map(|i| i.kind.as_str()), is_among)
            && met(self.os.as_deref(), os, |words, os| {
                words.iter().any(|w| os.contains(&w.to_ascii_lowercase()))
            })
            && met(self.encrypted.as_ref(), image.map(|i| i.encrypted), |wanted, is| *wanted == is)
            && met(self.size_from.as_ref(), size, |limit, size| size >= limit.0)
            && met(self.size_above.as_ref(), size, |limit, size| size > limit.0)
            && met(self.data_disk_above.as_ref(), data, |limit, disks| {
                disks.iter().flatten().any(|&size| size > limit.0)
            })
            && met(self.data_disks_above.as_ref(), data, |limit, disks| disks.len() > *limit)
    }

    fn are_met_by_target(&self, request: &PolicyRequest<'_>) -> bool {
        let class = request.bucket.and_then(|b| b.storage_class.as_deref());
        let regions = request
            .image
            .and_then(|i| i.region.as_deref())
            .zip(request.bucket.and_then(|b| b.region.as_deref()));
        let name = request.key.map(|key| key.rsplit_once('/').map_or(key, |(_, name)| name));
        let prefix = request.key.map(|key| key.split_once('/').map(|(first, _)| first));
        let is_one_of = |names: &[String], format| names.iter().any(|name| is_of(format, name));
        met(self.format.as_deref(), request.format, is_one_of)
            && met(self.format_not.as_deref(), request.format, |names, format| !is_one_of(names, format))
            && met(self.storage_class_not.as_deref(), class, |words, class| !is_among(words, class))
            && met(self.other_region.as_ref(), regions, |wanted, (a, b)| *wanted == (a != b))
            && met(self.prefix_not.as_ref(), prefix, |letters, prefix| {
                prefix.is_some_and(|p| !letters.hold(p))
            })
            && met(self.name_above.as_ref(), name, |limit, name| name.len() > *limit)
            && met(self.name_has.as_ref(), name, |characters, name| name.contains(|c| characters.contains(c)))
    }
}

impl Letters {
    fn hold(self, text: &str) -> bool {
        (self.least..=self.most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
    }
}
