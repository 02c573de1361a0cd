//! The mount's options: the same words in flags, in `-o` and in the configuration file, checked in one place.

mod document;
mod option;
mod paths;
mod secret;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Value;

pub use option::{MountOption, OPTIONS};
pub use paths::{default_state, home_directory};
pub use secret::Secret;

use crate::error::{Error, ErrorKind, Result};
use crate::format::OutputFormat;
use crate::policy::{BucketFacts, OnLimit, Policy};

/// A bucket to mount: the name of its directory, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketSetting {
    /// The directory under `buckets/`.
    pub name: String,
    /// `file:///directory`, `s3://bucket/prefix`, `az://container/prefix` or `gs://bucket/prefix`.
    pub url: String,
    /// Settings of the store's client, such as credentials and endpoint; only a configuration file has them.
    pub client: BTreeMap<String, Secret>,
}

/// Where the images are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CatalogSetting {
    /// A directory of this machine.
    Directory(PathBuf),
    /// A bucket: `s3://bucket/prefix`, `az://container/prefix` or `gs://bucket/prefix`.
    Bucket {
        /// Its URL.
        url: String,
        /// Settings of the store's client; only a configuration file has them.
        client: BTreeMap<String, Secret>,
    },
}

impl CatalogSetting {
    /// What a path or a URL names. A path that looks like a URL is written with `./` before it.
    pub fn named(text: &Path) -> Self {
        let url = text.to_str().filter(|text| {
            let scheme = text.split_once("://").map(|(scheme, _)| scheme);
            scheme.is_some_and(|s| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric()))
        });
        match url.map(|url| (url, url::Url::parse(url))) {
            Some((_, Ok(parsed))) if parsed.scheme() == "file" => {
                Self::Directory(parsed.to_file_path().unwrap_or_else(|()| text.to_owned()))
            }
            Some((url, _)) => Self::Bucket { url: url.to_owned(), client: BTreeMap::new() },
            None => Self::Directory(text.to_owned()),
        }
    }

    /// What its store's client is told.
    pub fn client(&self) -> Option<&BTreeMap<String, Secret>> {
        match self {
            Self::Directory(_) => None,
            Self::Bucket { client, .. } => Some(client),
        }
    }
}

/// Everything that can be said of a mount besides catalog and mount point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSettings {
    /// `bucket=NAME=URL`, any number.
    pub buckets: Vec<BucketSetting>,
    /// `formats=A:B:…`: those that directories list.
    pub formats: Vec<OutputFormat>,
    /// `stage_limit=SIZE`; no limit but the filesystem's when it is not given.
    pub stage_limit: Option<u64>,
    /// `read_to_end=A:B:…`, names of programs that do not trust the size that stat shows.
    pub read_to_end: Vec<String>,
    /// `policy=PROFILE|FILE`.
    pub policy: String,
    /// `plain_images`: programs may write disk images that the policy cannot judge.
    pub plain_images: bool,
    /// `follow_links`: links and names in the catalog may lead out of it.
    pub follow_links: bool,
    /// `sidecars`: every file has status and checksums beside it.
    pub sidecars: bool,
    /// `storage_class=NAME=CLASS`, what the owner says of a bucket; any number.
    pub storage_classes: BTreeMap<String, String>,
    /// `region=NAME=REGION`, the same of where it is.
    pub regions: BTreeMap<String, String>,
    /// `incremental=auto|off`: stores copy what they have already.
    pub incremental: bool,
    /// `jobs=N`: exports into a bucket that run at once.
    pub jobs: usize,
    /// `on_limit=queue|fail`, for the limits of the policy; its own word when it is not given.
    pub on_limit: Option<OnLimit>,
    /// `retries=N` of an export after transient errors.
    pub retries: u32,
    /// `shared`: other hosts mount the same buckets and do the same exports.
    pub shared: bool,
    /// `lease=SECONDS`: how long a host may be silent.
    pub lease: u32,
    /// `timeout=SECONDS` of one request to a store.
    pub timeout: u32,
    /// `rate=SIZE`: bytes to upload in a second, over all buckets; no limit when it is not given.
    pub rate: Option<u64>,
    /// `cache=SIZE`: bytes of memory for blocks of objects.
    pub cache: u64,
    /// `wait`: closing a copy waits for its export.
    pub wait: bool,
    /// `state=DIR`.
    pub state: Option<PathBuf>,
    /// `log_size=SIZE` at which the log is put aside.
    pub log_size: u64,
    /// `user=USER` that a daemon of root becomes.
    pub user: Option<String>,
    /// `sandbox=auto|off`.
    pub sandbox: bool,
    /// `allow_other`.
    pub allow_other: bool,
    /// `uid=N`.
    pub uid: Option<u32>,
    /// `gid=N`.
    pub gid: Option<u32>,
    /// `umask=OCTAL`: permission bits that nobody has.
    pub umask: u16,
    /// `nonempty`: what is in the mount point may be hidden.
    pub nonempty: bool,
    /// `ro`: nothing can be written, so that no export can be asked for.
    pub read_only: bool,
}

/// Options that mount(8) and fstab use among themselves: taken and without meaning here.
const IGNORED: &[&str] = &[
    "defaults",
    "rw",
    "auto",
    "noauto",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "async",
    "sync",
    "diratime",
    "nodiratime",
    "strictatime",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "mand",
    "nomand",
    "silent",
    "loud",
];

/// Whether an option is one of mount(8)'s own.
fn is_ignored(word: &str) -> bool {
    word.is_empty() || IGNORED.contains(&word) || word.starts_with("x-") || word.starts_with("X-")
}

impl Default for MountSettings {
    /// What [`OPTIONS`] say.
    fn default() -> Self {
        let mut settings = Self::without_defaults();
        for option in &OPTIONS {
            if let Some(default) = option.default {
                (option.take)(&mut settings, default).expect("defaults are valid, as a test of theirs shows");
            }
        }
        settings
    }
}

impl MountSettings {
    fn without_defaults() -> Self {
        Self {
            buckets: Vec::new(),
            formats: Vec::new(),
            stage_limit: None,
            read_to_end: Vec::new(),
            policy: String::new(),
            plain_images: false,
            follow_links: false,
            sidecars: false,
            storage_classes: BTreeMap::new(),
            regions: BTreeMap::new(),
            incremental: false,
            jobs: 0,
            on_limit: None,
            retries: 0,
            shared: false,
            lease: 0,
            timeout: 0,
            rate: None,
            cache: 0,
            wait: false,
            state: None,
            log_size: 0,
            user: None,
            sandbox: false,
            allow_other: false,
            uid: None,
            gid: None,
            umask: 0,
            nonempty: false,
            read_only: false,
        }
    }

    /// Takes the options of one `-o`: words separated by commas; `\,` is a comma within a word.
    pub fn apply_options(&mut self, options: &str) -> Result<()> {
        split_options(options).iter().try_for_each(|option| match option.split_once('=') {
            Some((word, value)) => self.apply(word, Some(value)),
            None => self.apply(option, None),
        })
    }

    /// The options of one `-o` that are known, for callers that want the others ignored.
    pub fn known_options(options: &str) -> String {
        let known = |option: &String| {
            let word = option.split_once('=').map_or(option.as_str(), |(word, _)| word);
            word == "ro" || OPTIONS.iter().any(|known| known.word == word)
        };
        let escaped = |option: String| option.replace('\\', "\\\\").replace(',', "\\,");
        split_options(options).into_iter().filter(known).map(escaped).collect::<Vec<_>>().join(",")
    }

    /// Takes one option.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed), with the option's name, when it is unknown or its value is wrong.
    pub fn apply(&mut self, word: &str, value: Option<&str>) -> Result<()> {
        let malformed = |what: String| Err(Error::new(ErrorKind::Malformed, what));
        // By fstab: ordinary users may mount.
        if word == "user" && value.is_none() {
            return Ok(());
        }
        match OPTIONS.iter().find(|option| option.word == word) {
            Some(option) => match (option.value, value) {
                (Some(_), None | Some("")) => malformed(format!("option {word:?} needs a value")),
                (None, Some(_)) => malformed(format!("option {word:?} takes no value")),
                _ => (option.take)(self, value.unwrap_or_default()),
            },
            None if word == "ro" && value.is_none() => {
                self.read_only = true;
                Ok(())
            }
            None if is_ignored(word) => Ok(()),
            None => malformed(format!("unknown mount option {word:?}")),
        }
    }

    fn add_bucket(&mut self, value: &str) -> Result<()> {
        // Not the URL: somebody may have put a secret there, which is refused later.
        let shown = value.split('=').next().unwrap_or_default();
        let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("bucket {shown:?}: {what}"));
        let (name, url) = value.split_once('=').ok_or_else(|| malformed("give it as NAME=URL"))?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(plain) {
            return Err(malformed(
                "a bucket's name has letters, digits, '.', '_' and '-', and does not begin with '.'",
            ));
        }
        if self.buckets.iter().any(|b| b.name == name) {
            return Err(malformed("that name is given twice"));
        }
        self.buckets.push(BucketSetting {
            name: name.to_owned(),
            url: url.to_owned(),
            client: BTreeMap::new(),
        });
        Ok(())
    }

    /// The policy, with what was said of its limits.
    pub fn policy(&self) -> Result<Policy> {
        let mut policy = Policy::load(&self.policy)?;
        policy.limits.on_limit = self.on_limit.or(policy.limits.on_limit);
        for name in self.storage_classes.keys().chain(self.regions.keys()) {
            if !self.buckets.iter().any(|bucket| bucket.name == *name) {
                let what = format!("storage_class or region of {name:?}, which is no bucket of this mount");
                return Err(Error::new(ErrorKind::Malformed, what));
            }
        }
        Ok(policy)
    }

    /// What policies are told of a bucket.
    pub fn bucket_facts(&self, name: &str) -> BucketFacts {
        BucketFacts {
            storage_class: self.storage_classes.get(name).cloned(),
            region: self.regions.get(name).cloned(),
        }
    }

    /// The settings in force as a configuration file, but for what only stores are told. URLs hold no secrets: those
    /// that do are refused.
    pub fn shown(&self, catalog: &str, mountpoint: &Path, state: &Path) -> String {
        let mut lines = vec![
            format!("# mounted on {}", mountpoint.display().to_string().escape_debug()),
            format!("catalog = {catalog:?}"),
            format!("state = {:?}", state.display().to_string()),
        ];
        let mut tables = Vec::new();
        for option in OPTIONS.iter().filter(|option| option.word != "state") {
            match (option.show)(self) {
                Some(Value::Table(table)) => {
                    tables.push(format!("\n[{}]", option.word));
                    tables.extend(table.iter().map(|(name, value)| format!("{name:?} = {value}")));
                }
                Some(value) => lines.push(format!("{} = {value}", option.word)),
                None => {}
            }
        }
        lines.extend(tables);
        lines.join("\n") + "\n"
    }
}

fn split_options(options: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut escaped = false;
    for c in options.chars() {
        let last = words.last_mut().expect("there is always a word");
        match c {
            c if escaped => {
                if c != ',' && c != '\\' {
                    last.push('\\');
                }
                last.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            ',' => words.push(String::new()),
            c => last.push(c),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_ignored_or_refused_by_name() {
        let mut settings = MountSettings::default();
        let options =
            r"bucket=b=s3://x/y\,z,wait,formats=raw:qcow2,uid=7,umask=022,_netdev,x-systemd.automount,nofail";
        settings.apply_options(options).unwrap();
        assert_eq!(settings.buckets[0].url, "s3://x/y,z");
        assert_eq!(settings.formats, [OutputFormat::Raw, OutputFormat::Qcow2]);
        assert_eq!((settings.uid, settings.umask, settings.wait), (Some(7), 0o22, true));
        for (option, named) in [
            ("waits", "waits"),
            ("wait=1", "wait"),
            ("uid", "uid"),
            ("umask=999", "umask"),
            ("formats=raw:zip", "zip"),
            ("bucket=b=file:///x", "twice"),
            ("bucket=x", "NAME=URL"),
            ("bucket=a/b=file:///x", "a/b"),
            ("bucket=a/b=s3://key:secret@x", "a/b"),
        ] {
            let error = settings.apply_options(option).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Malformed);
            assert!(error.to_string().contains(named) && !error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn catalogs_are_directories_or_buckets() {
        let directory = |path: &str| CatalogSetting::Directory(PathBuf::from(path));
        let bucket = |url: &str| CatalogSetting::Bucket { url: url.to_owned(), client: BTreeMap::new() };
        for (named, expected) in [
            ("/srv/images", directory("/srv/images")),
            ("./s3://images", directory("./s3://images")),
            ("file:///srv/a%20b", directory("/srv/a b")),
            ("s3://images/web", bucket("s3://images/web")),
            ("az://images", bucket("az://images")),
            ("a:b", directory("a:b")),
        ] {
            assert_eq!(CatalogSetting::named(Path::new(named)), expected);
        }
    }
}
