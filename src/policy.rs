//! Policies: what a cloud's export lets through, as data.
//!
//! A policy is a TOML document: the formats that it offers, rules that refuse, limits, and the cloud's own error codes.
//! The built-in profiles are `src/policy/*.toml`, each written from the export API of one cloud; a user's document has
//! the same keys and may extend one of them. A rule refuses what meets all its conditions; the first one that does
//! decides. What is not known (a bucket's storage class, an image's state) meets no condition.

mod rule;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

pub use rule::{BucketFacts, ImageFacts, PolicyRequest, Rule};

use crate::error::{Error, ErrorKind, Result};
use crate::format::OutputFormat;
use crate::whole_file;

/// The built-in profiles by name.
const PROFILES: [(&str, &str); 6] = [
    ("none", include_str!("policy/none.toml")),
    ("huawei-ims", include_str!("policy/huawei-ims.toml")),
    ("otc-ims", include_str!("policy/otc-ims.toml")),
    ("alibaba-ecs", include_str!("policy/alibaba-ecs.toml")),
    ("tencent-cvm", include_str!("policy/tencent-cvm.toml")),
    ("zstack", include_str!("policy/zstack.toml")),
];

/// How many profiles may extend one another.
const MAX_DEPTH: usize = 8;

/// Largest policy file that is read, in bytes.
const MAX_POLICY: u64 = 1 << 20;

/// What happens to an export that a limit does not let start now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnLimit {
    /// It waits.
    #[default]
    Queue,
    /// It fails with EAGAIN.
    Fail,
}

/// Limits of a policy. What is not given has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Exports of images that run at once.
    pub jobs: Option<usize>,
    /// Exports of one image that run at once; more fail with EBUSY.
    pub jobs_of_image: Option<usize>,
    /// Exports that may be asked for in a second.
    pub requests_per_second: Option<u32>,
    /// What happens beyond `jobs` and `requests_per_second`.
    pub on_limit: Option<OnLimit>,
}

/// A policy as it stands in a document.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    /// Another profile whose formats, limits and codes hold where this one has none, and whose rules come after.
    extends: Option<String>,
    /// For people.
    #[serde(default)]
    #[allow(dead_code, reason = "documents tell people what they are")]
    description: String,
    formats: Option<Vec<String>>,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    codes: BTreeMap<String, String>,
    #[serde(default, rename = "rule")]
    rules: Vec<Rule>,
}

/// A policy in force.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// The profile's name, or the file's.
    pub name: String,
    /// The limits.
    pub limits: Limits,
    formats: Option<Vec<String>>,
    rules: Vec<Rule>,
    /// The cloud's code for what no rule refuses, by our own code.
    codes: BTreeMap<String, String>,
}

impl Policy {
    /// The names of the built-in profiles.
    pub fn profiles() -> impl Iterator<Item = &'static str> {
        PROFILES.iter().map(|(name, _)| *name)
    }

    /// A built-in profile by its name, or the policy in a file.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) with file and line when the document is wrong.
    pub fn load(name_or_file: &str) -> Result<Self> {
        if let Some((name, text)) = PROFILES.iter().find(|(name, _)| *name == name_or_file) {
            return Self::parse(name, text, MAX_DEPTH);
        }
        let failed = |e: Error| match e.kind() {
            ErrorKind::NotFound => {
                let known: Vec<_> = Self::profiles().collect();
                let what = format!("neither a profile ({}) nor a file", known.join(", "));
                Error::new(ErrorKind::NotFound, what).in_file(format!("policy {name_or_file}"))
            }
            _ => Error::new(e.kind(), "cannot read the policy").because(e),
        };
        let text = whole_file::read_text(Path::new(name_or_file), MAX_POLICY).map_err(failed)?;
        Self::parse(name_or_file, &text, MAX_DEPTH)
    }

    fn parse(name: &str, text: &str, depth: usize) -> Result<Self> {
        let malformed =
            |what: String| Error::new(ErrorKind::Malformed, what).in_file(format!("policy {name}"));
        let document: Document =
            toml::from_str(text).map_err(|e| Error::from_toml(&e, text).in_file(format!("policy {name}")))?;
        for format in document.formats.iter().flatten() {
            if !OutputFormat::ALL.iter().any(|known| is_of(*known, format)) {
                return Err(malformed(format!("unknown format {format:?}")));
            }
        }
        for code in document.codes.keys() {
            if !ErrorKind::ALL.iter().any(|kind| kind.code() == code) {
                return Err(malformed(format!("unknown error code {code:?}")));
            }
        }
        document.rules.iter().try_for_each(Rule::validate).map_err(|e| malformed(e.what().to_owned()))?;
        let base = match &document.extends {
            None => None,
            Some(_) if depth == 0 => {
                return Err(malformed("too many policies extend one another".to_owned()));
            }
            Some(base) => Some(match PROFILES.iter().find(|(name, _)| name == base) {
                Some((name, text)) => Self::parse(name, text, depth - 1)?,
                None => return Err(malformed(format!("it extends {base:?}, which is no profile"))),
            }),
        };
        Ok(document.over(name, base))
    }

    /// Whether directories list a format.
    pub fn offers(&self, format: OutputFormat) -> bool {
        self.formats.as_ref().is_none_or(|formats| formats.iter().any(|name| is_of(format, name)))
    }

    /// Decides about what is known of a request. More may be known, and refused, later.
    ///
    /// # Errors
    /// The refusal of the first rule that applies, with the cloud's code; [`PolicyRefused`](ErrorKind::PolicyRefused) for
    /// a format that the policy does not offer.
    pub fn check(&self, request: &PolicyRequest<'_>) -> Result<()> {
        if let Some(rule) = self.rules.iter().find(|rule| rule.applies(request)) {
            return Err(rule.refusal(&self.name));
        }
        match request.format.filter(|&format| !self.offers(format)) {
            Some(format) => Err(self.refusal(format!("the format {} is not exported", format.suffix()))),
            None => Ok(()),
        }
    }

    /// Whether it refuses anything.
    pub fn judges_content(&self) -> bool {
        self.formats.is_some() || !self.rules.is_empty()
    }

    /// Whether a rule asks for the size of the exported disk, which takes opening it, or with `data` of the data disks.
    pub fn judges_size(&self, data: bool) -> bool {
        self.rules.iter().any(|rule| rule.judges_size(data))
    }

    /// Decides about a disk image that a program writes: of the image that its bytes come from nothing is known.
    ///
    /// # Errors
    /// [`PolicyRefused`](ErrorKind::PolicyRefused) when a rule asks for an image's facts.
    pub fn check_unknown_image(&self) -> Result<()> {
        if !self.rules.iter().any(Rule::judges_images) {
            return Ok(());
        }
        Err(self.refusal(
            "disk images that programs write are refused, because nothing is known of the image that their bytes come \
             from: copy the image's own file with cp, or mount with plain_images"
                .to_owned(),
        ))
    }

    fn refusal(&self, what: String) -> Error {
        let error = Error::new(ErrorKind::PolicyRefused, format!("{what} (policy {})", self.name));
        self.with_cloud_code(error)
    }

    /// A failure with the code that the cloud has for it, where it has one and no rule named another.
    #[must_use]
    pub fn with_cloud_code(&self, error: Error) -> Error {
        match self.codes.get(error.kind().code()) {
            Some(code) if error.cloud_code().is_none() => error.with_cloud_code(code),
            _ => error,
        }
    }
}

impl Document {
    fn over(self, name: &str, base: Option<Policy>) -> Policy {
        let mut policy = Policy {
            name: name.to_owned(),
            limits: self.limits,
            formats: self.formats,
            rules: self.rules,
            codes: self.codes,
        };
        if let Some(base) = base {
            policy.formats = policy.formats.or(base.formats);
            policy.rules.extend(base.rules);
            for (ours, code) in base.codes {
                policy.codes.entry(ours).or_insert(code);
            }
            policy.limits = Limits {
                jobs: policy.limits.jobs.or(base.limits.jobs),
                jobs_of_image: policy.limits.jobs_of_image.or(base.limits.jobs_of_image),
                requests_per_second: policy.limits.requests_per_second.or(base.limits.requests_per_second),
                on_limit: policy.limits.on_limit.or(base.limits.on_limit),
            };
        }
        policy
    }
}

/// Whether a format is one that a name stands for: its suffix, or the family that the suffix's last part names, so that
/// `qcow2` stands for zlib.qcow2 too.
fn is_of(format: OutputFormat, name: &str) -> bool {
    let suffix = format.suffix();
    suffix == name || suffix.rsplit('.').next() == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_is_well_formed() {
        for name in Policy::profiles() {
            let policy = Policy::load(name).unwrap();
            assert_eq!(policy.name, name);
        }
        assert!(OutputFormat::ALL.into_iter().all(|f| Policy::load("none").unwrap().offers(f)));
    }

    #[test]
    fn documents_extend_profiles_and_are_refused_with_their_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mine.toml");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Policy::load(path.to_str().unwrap())
        };
        let mine = load("extends = 'alibaba-ecs'\nformats = ['raw']\n[limits]\njobs = 2\n").unwrap();
        assert!(mine.offers(OutputFormat::Raw) && !mine.offers(OutputFormat::Qcow2));
        assert_eq!((mine.limits.jobs, mine.limits.jobs_of_image), (Some(2), Some(1)));
        assert!(!mine.rules.is_empty() && mine.check_unknown_image().is_err());
        let check = |format| mine.check(&PolicyRequest { format: Some(format), ..PolicyRequest::default() });
        assert!(check(OutputFormat::Raw).is_ok());
        assert_eq!(check(OutputFormat::Qcow2).unwrap_err().kind(), ErrorKind::PolicyRefused);
        let names =
            "[[rule]]\nwhen = { name_above = 9, format = ['raw'] }\nrefuse = 'malformed'\nmessage = 'x'";
        load(names).unwrap().check_unknown_image().unwrap();
        let refuse = "refuse = 'too_large'\nmessage = 'x'";
        for (condition, asked) in [
            ("name_above = 9", [false, false]),
            ("data_disks_above = 1", [false, false]),
            ("size_above = '1T'", [true, false]),
            ("size_from = '1T'", [true, false]),
            ("data_disk_above = '1T'", [false, true]),
        ] {
            let policy = load(&format!("[[rule]]\nwhen = {{ {condition} }}\n{refuse}")).unwrap();
            assert_eq!([false, true].map(|data| policy.judges_size(data)), asked, "{condition}");
        }
        for (text, part) in [
            ("formats = ['zip']", "zip"),
            ("\nformat = []", "line 2"),
            ("extends = 'nobody'", "nobody"),
            ("[codes]\nwrong = 'x'", "wrong"),
            ("[[rule]]\nrefuse = 'policy_refused'\nmessage = 'x'", "condition"),
            ("[[rule]]\nwhen = { size_above = '1X' }\nrefuse = 'too_large'\nmessage = 'x'", "1X"),
            ("[[rule]]\nwhen = { os = ['x'] }\nrefuse = 'unheard'\nmessage = 'x'", "unheard"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.report().contains(part), "{text}: {}", error.report());
        }
        assert_eq!(Policy::load("/nowhere").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
