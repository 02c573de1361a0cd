//! The options of a mount, each defined once: flags, `-o` words, keys of the configuration file, and the manual's
//! lists are made of this table.

use std::path::PathBuf;

use super::{MountSettings, add_fact, number, parse_formats, wrong};
use crate::error::Result;
use crate::policy::OnLimit;
use crate::units::{MIB, parse_bytes};

/// More than this many exports at once hold more memory than any machine gains by them.
const MAX_JOBS: u32 = 64;

/// Less holds not even what a few programs read at once.
const SMALLEST_CACHE: u64 = 32 * MIB;

/// A mount option.
#[derive(Debug)]
pub struct MountOption {
    /// Its word in `-o` and in the configuration file; as a flag it has `-` for `_`.
    pub word: &'static str,
    /// What its value is, in the manual's words; `None` for one that is given or not.
    pub value: Option<&'static str>,
    /// Whether it may be given for several buckets: a table in the configuration file.
    pub is_repeated: bool,
    /// What it does, in one line without a full stop.
    pub summary: &'static str,
    /// What else there is to say, in whole sentences.
    pub details: &'static str,
    /// Takes the value, which is empty for an option without one.
    pub(super) take: fn(&mut MountSettings, &str) -> Result<()>,
}

impl MountOption {
    /// The option as a flag, without its dashes.
    pub fn flag(&self) -> String {
        self.word.replace('_', "-")
    }
}

/// All mount options, in the manual's order.
pub static OPTIONS: [MountOption; 22] = [
    MountOption {
        word: "bucket",
        value: Some("NAME=URL"),
        is_repeated: true,
        summary: "Mount a bucket as buckets/NAME",
        details: "The URL is file:///DIRECTORY, s3://BUCKET/PREFIX, az://CONTAINER/PREFIX or gs://BUCKET/PREFIX. May \
                  be repeated. Credentials and endpoints come from the environment or the configuration file, never \
                  from the command line.",
        take: MountSettings::add_bucket,
    },
    MountOption {
        word: "formats",
        value: Some("FORMAT:…"),
        is_repeated: false,
        summary: "Formats that image directories list, separated by colons",
        details: "raw, qcow2, vhd, fixed.vhd, vmdk, vhdx, vdi, zlib.qcow2, zstd.qcow2, stream.vmdk, zvhd, zvhd2. All \
                  but zstd.qcow2 by default.",
        take: |settings, value| {
            settings.formats = Some(parse_formats(value)?);
            Ok(())
        },
    },
    MountOption {
        word: "policy",
        value: Some("PROFILE|FILE"),
        is_repeated: false,
        summary: "What may be exported",
        details: "none (the default), huawei-ims, otc-ims, alibaba-ecs, tencent-cvm, zstack, or a file; see \
                  freightfs-policy(5).",
        take: |settings, value| {
            settings.policy = Some(value.to_owned());
            Ok(())
        },
    },
    MountOption {
        word: "storage_class",
        value: Some("NAME=CLASS"),
        is_repeated: true,
        summary: "Storage class of a bucket, for the policy",
        details: "May be repeated.",
        take: |settings, value| add_fact(&mut settings.storage_classes, "storage_class", value),
    },
    MountOption {
        word: "region",
        value: Some("NAME=REGION"),
        is_repeated: true,
        summary: "Region of a bucket, for the policy",
        details: "May be repeated.",
        take: |settings, value| add_fact(&mut settings.regions, "region", value),
    },
    MountOption {
        word: "jobs",
        value: Some("N"),
        is_repeated: false,
        summary: "Exports into each bucket that run at once",
        details: "1 to 64, 4 by default. The others wait, in the order in which they came. A bucket that does not \
                  answer slows no other.",
        take: |settings, value| {
            let jobs = Some(number("jobs", value, 10)?).filter(|n| (1..=MAX_JOBS).contains(n));
            settings.jobs = Some(jobs.ok_or_else(|| wrong("jobs", value))? as usize);
            Ok(())
        },
    },
    MountOption {
        word: "on_limit",
        value: Some("queue|fail"),
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
    },
    MountOption {
        word: "rate",
        value: Some("SIZE"),
        is_repeated: false,
        summary: "Bytes to upload in a second, over all buckets",
        details: "As 20M; no limit by default. It holds on average: a part that has begun is sent as fast as it goes.",
        take: |settings, value| {
            let rate = parse_bytes(value).ok().filter(|&rate| rate > 0);
            settings.rate = Some(rate.ok_or_else(|| wrong("rate", value))?);
            Ok(())
        },
    },
    MountOption {
        word: "timeout",
        value: Some("SECONDS"),
        is_repeated: false,
        summary: "How long one request to a store may take before it is tried again",
        details: "1 to 3600, 300 by default. A request is tried for up to three minutes, or once when it takes longer.",
        take: |settings, value| {
            settings.timeout = Some(seconds("timeout", value)?);
            Ok(())
        },
    },
    MountOption {
        word: "retries",
        value: Some("N"),
        is_repeated: false,
        summary: "How often an image's export goes on where it was after its store was not reached or was broken",
        details: "0 to 1000, 5 by default; besides what is tried again of single requests. The pauses are random, of \
                  about 1, 2, 4 … seconds, up to a minute. What a store refuses is not tried again, and \
                  nor is what programs write: close(2) tells them.",
        take: |settings, value| {
            let retries = Some(number("retries", value, 10)?).filter(|&n| n <= 1000);
            settings.retries = Some(retries.ok_or_else(|| wrong("retries", value))?);
            Ok(())
        },
    },
    MountOption {
        word: "shared",
        value: None,
        is_repeated: false,
        summary: "Other hosts mount the same buckets and may do the same exports",
        details: "Each is done by one of them, and taken over by another when that one is gone; see \
                  freightfs-semantics(7). A store that does not keep to conditional puts is refused.",
        take: |settings, _| {
            settings.shared = true;
            Ok(())
        },
    },
    MountOption {
        word: "lease",
        value: Some("SECONDS"),
        is_repeated: false,
        summary: "How long a host that shares buckets may be silent before others take its jobs over",
        details: "1 to 3600, 30 by default. The same on all hosts.",
        take: |settings, value| {
            settings.lease = Some(seconds("lease", value)?);
            Ok(())
        },
    },
    MountOption {
        word: "wait",
        value: None,
        is_repeated: false,
        summary: "Closing a copy waits until its export has ended, and fails if it failed",
        details: "For at most three hours.",
        take: |settings, _| {
            settings.wait = true;
            Ok(())
        },
    },
    MountOption {
        word: "cache",
        value: Some("SIZE"),
        is_repeated: false,
        summary: "Memory for blocks of objects that were read or are read ahead",
        details: "As 1G; 256M by default, 32M at least. For the catalog where it is a bucket, and for all buckets \
                  together. Blocks that nobody has read yet take half of it at most.",
        take: |settings, value| {
            let cache = parse_bytes(value).ok().filter(|&cache| cache >= SMALLEST_CACHE);
            settings.cache = Some(cache.ok_or_else(|| wrong("cache", value))?);
            Ok(())
        },
    },
    MountOption {
        word: "read_to_end",
        value: Some("PROGRAM:…"),
        is_repeated: false,
        summary: "Programs that read a file to its end, whatever size stat shows",
        details: "By the names that the kernel has for them. For these a compressed file opens at once, before its \
                  size is known; others wait until it is. Default: cp:install:cat:dd:sha256sum:md5sum:cmp.",
        take: |settings, value| {
            settings.read_to_end = Some(value.split(':').map(str::to_owned).collect());
            Ok(())
        },
    },
    MountOption {
        word: "stage_limit",
        value: Some("SIZE"),
        is_repeated: false,
        summary: "Bytes that programs may write before they are uploaded, over all files",
        details: "As 10G. Writing more fails with ENOSPC, and nothing of that file is published. Default: what the \
                  state directory's filesystem has.",
        take: |settings, value| {
            settings.stage_limit = Some(parse_bytes(value).map_err(|_| wrong("stage_limit", value))?);
            Ok(())
        },
    },
    MountOption {
        word: "state",
        value: Some("DIR"),
        is_repeated: false,
        summary: "Directory for the journal of jobs, the log and staged writes",
        details: "Default: $XDG_STATE_HOME, or /var/lib for root, or ~/.local/state, then freightfs/ and the mount \
                  point's path, so that the next mount there goes on with unfinished jobs.",
        take: |settings, value| {
            settings.state = Some(PathBuf::from(value));
            Ok(())
        },
    },
    MountOption {
        word: "allow_other",
        value: None,
        is_repeated: false,
        summary: "Let other users enter the mount",
        details: "Permissions are checked by the kernel. For ordinary users /etc/fuse.conf must say user_allow_other.",
        take: |settings, _| {
            settings.allow_other = true;
            Ok(())
        },
    },
    MountOption {
        word: "uid",
        value: Some("UID"),
        is_repeated: false,
        summary: "Owner of all files",
        details: "Default: who mounts.",
        take: |settings, value| {
            settings.uid = Some(number("uid", value, 10)?);
            Ok(())
        },
    },
    MountOption {
        word: "gid",
        value: Some("GID"),
        is_repeated: false,
        summary: "Group of all files",
        details: "Default: that of who mounts.",
        take: |settings, value| {
            settings.gid = Some(number("gid", value, 10)?);
            Ok(())
        },
    },
    MountOption {
        word: "umask",
        value: Some("OCTAL"),
        is_repeated: false,
        summary: "Permission bits to take away from 0644 and 0755",
        details: "Default: 0.",
        take: |settings, value| {
            let mask = u16::try_from(number("umask", value, 8)?).ok().filter(|m| *m <= 0o777);
            settings.umask = Some(mask.ok_or_else(|| wrong("umask", value))?);
            Ok(())
        },
    },
    MountOption {
        word: "nonempty",
        value: None,
        is_repeated: false,
        summary: "Mount over a directory that is not empty",
        details: "What is in it is hidden until umount(8).",
        take: |settings, _| {
            settings.nonempty = true;
            Ok(())
        },
    },
];

fn seconds(word: &str, value: &str) -> Result<u32> {
    Some(number(word, value, 10)?).filter(|s| (1..=3600).contains(s)).ok_or_else(|| wrong(word, value))
}
