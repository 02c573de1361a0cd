//! The options of a mount, each defined once: flags, `-o` words, keys of the configuration file, and the manual's
//! lists are made of this table.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::Value;

use super::{BucketSetting, MountSettings};
use crate::error::{Error, ErrorKind, Result};
use crate::format::OutputFormat;
use crate::policy::OnLimit;
use crate::units::{MIB, parse_bytes};

/// More than this many exports at once hold more memory than any machine gains by them.
const MAX_JOBS: u32 = 64;

/// Less holds not even what a few programs read at once.
const SMALLEST_CACHE: u64 = 32 * MIB;

/// Less holds not even a few of the longest lines.
const SMALLEST_LOG: u64 = 64 << 10;

/// A mount option.
#[derive(Debug)]
pub struct MountOption {
    /// Its word in `-o` and in the configuration file; as a flag it has `-` for `_`.
    pub word: &'static str,
    /// What its value is, in the manual's words; `None` for one that is given or not.
    pub value: Option<&'static str>,
    /// The value where none is given, as it would be given; `None` where there is none, or where it depends on the machine.
    pub default: Option<&'static str>,
    /// Whether it may be given for several buckets: a table in the configuration file.
    pub is_repeated: bool,
    /// What it does, in one line without a full stop.
    pub summary: &'static str,
    /// What else there is to say, in whole sentences.
    pub details: &'static str,
    /// Takes the value, which is empty for an option without one.
    pub(super) take: fn(&mut MountSettings, &str) -> Result<()>,
    /// Its value in force as a configuration file has it: a table where it is repeated, `None` where it is not given.
    pub(super) show: fn(&MountSettings) -> Option<Value>,
}

impl MountOption {
    /// The option as a flag, without its dashes.
    pub fn flag(&self) -> String {
        self.word.replace('_', "-")
    }

    /// All that there is to say of it, in whole sentences.
    pub fn text(&self) -> String {
        let default = self.default.map(|default| format!("Default: {}.", default.replace(':', ", ")));
        let details = Some(self.details.to_owned()).filter(|details| !details.is_empty());
        let sentences = [Some(format!("{}.", self.summary)), details, default];
        sentences.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

/// All mount options, in the manual's order.
pub static OPTIONS: [MountOption; 29] = [
    MountOption {
        word: "bucket",
        value: Some("NAME=URL"),
        default: None,
        is_repeated: true,
        summary: "Mount a bucket as buckets/NAME",
        details: "The URL is file:///DIRECTORY, s3://BUCKET/PREFIX, az://CONTAINER/PREFIX or gs://BUCKET/PREFIX. May \
                  be repeated. Credentials and endpoints come from the environment or the configuration file, never \
                  from the command line.",
        take: MountSettings::add_bucket,
        show: |settings| {
            let url = |bucket: &BucketSetting| (bucket.name.clone(), Value::from(&*bucket.url));
            Some(Value::Table(settings.buckets.iter().map(url).collect()))
        },
    },
    MountOption {
        word: "follow_links",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Let links and names in the catalog's directory lead out of it",
        details: "Without it a symbolic link is followed within the catalog only, and so is a name that a sidecar has for a \
                  file; an image beyond is listed, and does not open (EPERM). Absolute links count as leading out. With it \
                  whoever can put a link into the catalog has the daemon read what it may read.",
        take: |settings, _| {
            settings.follow_links = true;
            Ok(())
        },
        show: |settings| Some(settings.follow_links.into()),
    },
    MountOption {
        word: "formats",
        value: Some("FORMAT:…"),
        default: Some("raw:qcow2:vhd:fixed.vhd:vmdk:vhdx:vdi:zlib.qcow2:stream.vmdk:zvhd:zvhd2"),
        is_repeated: false,
        summary: "Formats that image directories list, separated by colons",
        details: "zstd.qcow2 can be given besides the default ones.",
        take: |settings, value| {
            settings.formats = parse_formats(value)?;
            Ok(())
        },
        show: |settings| Some(words(settings.formats.iter().map(|format| format.suffix()))),
    },
    MountOption {
        word: "policy",
        value: Some("PROFILE|FILE"),
        default: Some("none"),
        is_repeated: false,
        summary: "What may be exported",
        details: "none, huawei-ims, otc-ims, alibaba-ecs, tencent-cvm, zstack, or a file; see \
                  freightfs-policy(5).",
        take: |settings, value| {
            value.clone_into(&mut settings.policy);
            Ok(())
        },
        show: |settings| Some(Value::from(&*settings.policy)),
    },
    MountOption {
        word: "plain_images",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Let programs write disk images whose origin the policy asks for and does not know",
        details: "Without it a mount whose policy has rules about images refuses a disk image that a program writes, \
                  whatever its name, with EPERM: its bytes may be those of an image that must not leave. See \
                  freightfs-policy(5).",
        take: |settings, _| {
            settings.plain_images = true;
            Ok(())
        },
        show: |settings| Some(settings.plain_images.into()),
    },
    MountOption {
        word: "storage_class",
        value: Some("NAME=CLASS"),
        default: None,
        is_repeated: true,
        summary: "Storage class of a bucket, for the policy",
        details: "May be repeated.",
        take: |settings, value| add_fact(&mut settings.storage_classes, "storage_class", value),
        show: |settings| facts(&settings.storage_classes),
    },
    MountOption {
        word: "region",
        value: Some("NAME=REGION"),
        default: None,
        is_repeated: true,
        summary: "Region of a bucket, for the policy",
        details: "May be repeated.",
        take: |settings, value| add_fact(&mut settings.regions, "region", value),
        show: |settings| facts(&settings.regions),
    },
    MountOption {
        word: "sidecars",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Write status and checksums beside every file",
        details: "Without it only files whose names end like a disk format have them: the exports. The state of the others \
                  is in jobs/ and in the extended attribute user.freightfs.status.",
        take: |settings, _| {
            settings.sidecars = true;
            Ok(())
        },
        show: |settings| Some(settings.sidecars.into()),
    },
    MountOption {
        word: "incremental",
        value: Some("auto|off"),
        default: Some("auto"),
        is_repeated: false,
        summary: "Whether only what has changed is sent",
        details: "A store that can copies what it has already: chunks of the object that is replaced, and zeros. The object is \
                  the same, byte for byte.",
        take: |settings, value| {
            settings.incremental = match value {
                "auto" => true,
                "off" => false,
                _ => return Err(wrong("incremental", value)),
            };
            Ok(())
        },
        show: |settings| Some(if settings.incremental { "auto" } else { "off" }.into()),
    },
    MountOption {
        word: "jobs",
        value: Some("N"),
        default: Some("4"),
        is_repeated: false,
        summary: "Exports into each bucket that run at once",
        details: "1 to 64. The others wait, in the order in which they came. A bucket that does not \
                  answer slows no other.",
        take: |settings, value| {
            let jobs = Some(number("jobs", value, 10)?).filter(|n| (1..=MAX_JOBS).contains(n));
            settings.jobs = jobs.ok_or_else(|| wrong("jobs", value))? as usize;
            Ok(())
        },
        show: |settings| Some(number_value(settings.jobs as u64)),
    },
    MountOption {
        word: "on_limit",
        value: Some("queue|fail"),
        default: None,
        is_repeated: false,
        summary: "What an export beyond the policy's limits does",
        details: "It waits, or fails with EAGAIN. The policy's own word by default.",
        take: |settings, value| {
            settings.on_limit = Some(match value {
                "queue" => OnLimit::Queue,
                "fail" => OnLimit::Fail,
                _ => return Err(wrong("on_limit", value)),
            });
            Ok(())
        },
        show: |settings| {
            let word = |on_limit| if on_limit == OnLimit::Fail { "fail" } else { "queue" };
            settings.on_limit.map(word).map(Value::from)
        },
    },
    MountOption {
        word: "rate",
        value: Some("SIZE"),
        default: None,
        is_repeated: false,
        summary: "Bytes to upload in a second, over all buckets",
        details: "As 20M; no limit by default. It holds on average: a part that has begun is sent as fast as it goes.",
        take: |settings, value| {
            let rate = parse_bytes(value).ok().filter(|&rate| rate > 0);
            settings.rate = Some(rate.ok_or_else(|| wrong("rate", value))?);
            Ok(())
        },
        show: |settings| settings.rate.map(number_value),
    },
    MountOption {
        word: "timeout",
        value: Some("SECONDS"),
        default: Some("60"),
        is_repeated: false,
        summary: "How long one request to a store may take before it is tried again",
        details: "1 to 3600. A request is retried for up to three minutes; look-ups, listings and removals fail after 30 seconds.",
        take: |settings, value| {
            settings.timeout = seconds("timeout", value)?;
            Ok(())
        },
        show: |settings| Some(number_value(settings.timeout)),
    },
    MountOption {
        word: "retries",
        value: Some("N"),
        default: Some("5"),
        is_repeated: false,
        summary: "How many times an export is resumed after a transient store error",
        details: "0 to 1000, besides the retries of single requests. Exponential back-off with jitter: about 1, 2, 4 … \
                  seconds, up to a minute. What a store refuses is not retried, and nor is what programs write: \
                  close(2) reports it.",
        take: |settings, value| {
            let retries = Some(number("retries", value, 10)?).filter(|&n| n <= 1000);
            settings.retries = retries.ok_or_else(|| wrong("retries", value))?;
            Ok(())
        },
        show: |settings| Some(number_value(settings.retries)),
    },
    MountOption {
        word: "shared",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Other hosts mount the same buckets and may do the same exports",
        details: "Each is done by one of them, and taken over by another when that one is gone; see \
                  freightfs-semantics(7). A store that does not keep to conditional puts is refused.",
        take: |settings, _| {
            settings.shared = true;
            Ok(())
        },
        show: |settings| Some(settings.shared.into()),
    },
    MountOption {
        word: "lease",
        value: Some("SECONDS"),
        default: Some("30"),
        is_repeated: false,
        summary: "How long a host that shares buckets may be silent before others take its jobs over",
        details: "1 to 3600. The same on all hosts.",
        take: |settings, value| {
            settings.lease = seconds("lease", value)?;
            Ok(())
        },
        show: |settings| Some(number_value(settings.lease)),
    },
    MountOption {
        word: "wait",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Closing a copy waits until its export has ended, and fails if it failed",
        details: "For at most three hours.",
        take: |settings, _| {
            settings.wait = true;
            Ok(())
        },
        show: |settings| Some(settings.wait.into()),
    },
    MountOption {
        word: "cache",
        value: Some("SIZE"),
        default: Some("256M"),
        is_repeated: false,
        summary: "Memory for blocks of objects that were read or are read ahead",
        details: "As 1G; 32M at least. For the catalog where it is a bucket, and for all buckets \
                  together. Blocks that nobody has read yet take half of it at most.",
        take: |settings, value| {
            let cache = parse_bytes(value).ok().filter(|&cache| cache >= SMALLEST_CACHE);
            settings.cache = cache.ok_or_else(|| wrong("cache", value))?;
            Ok(())
        },
        show: |settings| Some(number_value(settings.cache)),
    },
    MountOption {
        word: "read_to_end",
        value: Some("PROGRAM:…"),
        default: Some("cp:install:cat:dd:sha256sum:md5sum:cmp"),
        is_repeated: false,
        summary: "Programs that read a file to its end, whatever size stat shows",
        details: "By the names that the kernel has for them. For these a compressed file opens at once, before its \
                  size is known; others wait until it is.",
        take: |settings, value| {
            settings.read_to_end = value.split(':').map(str::to_owned).collect();
            Ok(())
        },
        show: |settings| Some(words(settings.read_to_end.iter().map(String::as_str))),
    },
    MountOption {
        word: "stage_limit",
        value: Some("SIZE"),
        default: None,
        is_repeated: false,
        summary: "Bytes that programs may write before they are uploaded, over all files",
        details: "As 10G. Writing more fails with ENOSPC, and nothing of that file is published. Default: what the \
                  state directory's filesystem has.",
        take: |settings, value| {
            settings.stage_limit = Some(parse_bytes(value).map_err(|_| wrong("stage_limit", value))?);
            Ok(())
        },
        show: |settings| settings.stage_limit.map(number_value),
    },
    MountOption {
        word: "state",
        value: Some("DIR"),
        default: None,
        is_repeated: false,
        summary: "Directory for the journal of jobs, the log and staged writes",
        details: "Default: $XDG_STATE_HOME, or /var/lib for root, or ~/.local/state, then freightfs/ and the mount \
                  point's path, so that the next mount there goes on with unfinished jobs.",
        take: |settings, value| {
            settings.state = Some(PathBuf::from(value));
            Ok(())
        },
        show: |settings| settings.state.as_ref().map(|path| Value::from(path.display().to_string())),
    },
    MountOption {
        word: "log_size",
        value: Some("SIZE"),
        default: Some("10M"),
        is_repeated: false,
        summary: "Size at which the log is put aside as log.1, in place of an older one",
        details: "As 1M; 64K at least. Both together have at most twice that.",
        take: |settings, value| {
            let size = parse_bytes(value).ok().filter(|&size| size >= SMALLEST_LOG);
            settings.log_size = size.ok_or_else(|| wrong("log_size", value))?;
            Ok(())
        },
        show: |settings| Some(number_value(settings.log_size)),
    },
    MountOption {
        word: "user",
        value: Some("USER"),
        default: None,
        is_repeated: false,
        summary: "Have the daemon that root starts run as this user, with the user's groups",
        details: "A name or a number. Root opens the configuration file, the state directory and the mount; the catalog, \
                  local buckets and credentials are opened by the user. Where the mount is not of root, only the user's own \
                  name is taken.",
        take: |settings, value| {
            settings.user = Some(value.to_owned());
            Ok(())
        },
        show: |settings| settings.user.as_deref().map(Value::from),
    },
    MountOption {
        word: "sandbox",
        value: Some("auto|off"),
        default: Some("auto"),
        is_repeated: false,
        summary: "Whether the daemon gives up the rights that it does not need",
        details: "Capabilities, new privileges, files that are not the mount's, system calls: as far as the kernel can, which \
                  the log tells; see freightfs-security(7). Credentials that another program gives (Azure's az) need off.",
        take: |settings, value| {
            settings.sandbox = match value {
                "auto" => true,
                "off" => false,
                _ => return Err(wrong("sandbox", value)),
            };
            Ok(())
        },
        show: |settings| Some(if settings.sandbox { "auto" } else { "off" }.into()),
    },
    MountOption {
        word: "allow_other",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Let other users enter the mount",
        details: "Permissions are checked by the kernel. For ordinary users /etc/fuse.conf must say user_allow_other.",
        take: |settings, _| {
            settings.allow_other = true;
            Ok(())
        },
        show: |settings| Some(settings.allow_other.into()),
    },
    MountOption {
        word: "uid",
        value: Some("UID"),
        default: None,
        is_repeated: false,
        summary: "Owner of all files",
        details: "Default: who mounts.",
        take: |settings, value| {
            settings.uid = Some(number("uid", value, 10)?);
            Ok(())
        },
        show: |settings| settings.uid.map(number_value),
    },
    MountOption {
        word: "gid",
        value: Some("GID"),
        default: None,
        is_repeated: false,
        summary: "Group of all files",
        details: "Default: that of who mounts.",
        take: |settings, value| {
            settings.gid = Some(number("gid", value, 10)?);
            Ok(())
        },
        show: |settings| settings.gid.map(number_value),
    },
    MountOption {
        word: "umask",
        value: Some("OCTAL"),
        default: Some("000"),
        is_repeated: false,
        summary: "Permission bits to take away from those of every file and directory",
        details: "",
        take: |settings, value| {
            let mask = u16::try_from(number("umask", value, 8)?).ok().filter(|m| *m <= 0o777);
            settings.umask = mask.ok_or_else(|| wrong("umask", value))?;
            Ok(())
        },
        show: |settings| Some(Value::from(format!("{:03o}", settings.umask))),
    },
    MountOption {
        word: "nonempty",
        value: None,
        default: None,
        is_repeated: false,
        summary: "Mount over a directory that is not empty",
        details: "What is in it is hidden until umount(8).",
        take: |settings, _| {
            settings.nonempty = true;
            Ok(())
        },
        show: |settings| Some(settings.nonempty.into()),
    },
];

fn seconds(word: &str, value: &str) -> Result<u32> {
    Some(number(word, value, 10)?).filter(|s| (1..=3600).contains(s)).ok_or_else(|| wrong(word, value))
}

/// `NAME=VALUE`, what is said of a bucket.
fn add_fact(facts: &mut BTreeMap<String, String>, word: &str, value: &str) -> Result<()> {
    let (name, fact) = value.split_once('=').filter(|(_, fact)| !fact.is_empty()).ok_or_else(|| {
        Error::new(ErrorKind::Malformed, format!("option {word}={value}: give it as {word}=BUCKET=VALUE"))
    })?;
    facts.insert(name.to_owned(), fact.to_owned());
    Ok(())
}

fn parse_formats(value: &str) -> Result<Vec<OutputFormat>> {
    let mut formats = value.split(':').map(OutputFormat::from_suffix).collect::<Result<Vec<_>>>()?;
    formats.sort();
    formats.dedup();
    Ok(formats)
}

fn number(word: &str, value: &str, radix: u32) -> Result<u32> {
    u32::from_str_radix(value, radix).map_err(|_| wrong(word, value))
}

fn wrong(word: &str, value: &str) -> Error {
    Error::new(ErrorKind::Malformed, format!("option {word}={value}: not a valid value"))
}

fn words<'a>(words: impl Iterator<Item = &'a str>) -> Value {
    Value::Array(words.map(Value::from).collect())
}

/// A table of what is said of buckets; none where nothing is.
fn facts(facts: &BTreeMap<String, String>) -> Option<Value> {
    let row = |(name, fact): (&String, &String)| (name.clone(), Value::from(&**fact));
    (!facts.is_empty()).then(|| Value::Table(facts.iter().map(row).collect()))
}

/// TOML has no numbers above i64's: nobody has as many bytes.
fn number_value(number: impl Into<u64>) -> Value {
    Value::Integer(i64::try_from(number.into()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_is_what_giving_it_means() {
        for option in &OPTIONS {
            let Some(default) = option.default else { continue };
            let mut given = MountSettings::default();
            (option.take)(&mut given, default).unwrap();
            assert_eq!(given, MountSettings::default(), "{}", option.word);
            assert!((option.show)(&given).is_some(), "{}", option.word);
        }
    }
}
