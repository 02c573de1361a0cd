//! What the daemon gives up before it opens its catalog: the user who started it, capabilities, new privileges, files that are
//! not its own, and system calls that it never makes.
//!
//! All of it comes before the first thread, because most of it holds for the thread that asks and those that it starts. Each
//! layer stands for itself: where the kernel lacks one the others hold, and the log tells which are there.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    Scope, path_beneath_rules,
};
use nix::unistd::{Gid, Uid, User};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::error::{Error, ErrorKind, Result, quoted};
use crate::settings::{CatalogSetting, MountSettings, home_directory};

/// What root keeps where no other user is named, for a catalog and buckets whose files belong to others: only within the files
/// that are its own.
const KEPT: [Capability; 3] =
    [Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_FOWNER];

/// The newest Landlock that is asked for: files, links across directories, truncation, devices, TCP, signals.
const LANDLOCK: ABI = ABI::V6;

/// The user that a mount's daemon becomes.
pub(super) fn user(settings: &MountSettings) -> Result<Option<User>> {
    let Some(name) = &settings.user else { return Ok(None) };
    let failed = |e: nix::Error| Error::from_io("cannot look up the user", e.into());
    let number = name.parse().ok().map(Uid::from_raw);
    let found = match number {
        Some(uid) => User::from_uid(uid).map_err(failed)?,
        None => User::from_name(name).map_err(failed)?,
    };
    let missing = || Error::new(ErrorKind::NotFound, format!("there is no user {}", quoted(name)));
    let user = found.ok_or_else(missing)?;
    let own = nix::unistd::geteuid();
    if own.is_root() {
        return Ok(Some(user));
    }
    if own != user.uid {
        let what = format!("only root can mount for the user {}", quoted(name));
        return Err(Error::new(ErrorKind::PermissionDenied, what));
    }
    // What mount(8) says to its helpers of the user who mounts.
    Ok(None)
}

/// Makes the state directory, which belongs to the daemon's user and to nobody else; one that is there stays as it is.
pub(super) fn make_state(state: &Path, user: Option<&User>) -> Result<()> {
    let failed =
        |e| Error::from_io("cannot make the state directory", e).in_file(state.display().to_string());
    if let Some(parent) = state.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(state) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Ok(()) => user.map_or(Ok(()), |user| {
            std::os::unix::fs::lchown(state, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
        }),
        Err(e) => Err(e),
    }
    .map_err(failed)
}

/// Files that the daemon may use.
#[derive(Debug, Default)]
pub(super) struct Files {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Files {
    /// Those of a mount: its catalog, its local buckets and its state; and what the system's libraries read.
    pub(super) fn of(settings: &MountSettings, catalog: &CatalogSetting, state: &Path) -> Self {
        let mut files = Self::default();
        match catalog {
            // Whoever can put a link there has said where it leads to.
            CatalogSetting::Directory(_) if settings.follow_links => files.read.push("/".into()),
            CatalogSetting::Directory(path) => files.read.push(path.clone()),
            CatalogSetting::Bucket { .. } => {}
        }
        files.write.push(state.to_owned());
        for bucket in &settings.buckets {
            let url = url::Url::parse(&bucket.url).ok().filter(|url| url.scheme() == "file");
            files.write.extend(url.and_then(|url| url.to_file_path().ok()));
        }
        // What is mounted when it is looked into has to be there: a rule is about what it finds.
        files.read.iter().chain(&files.write).for_each(|path| drop(std::fs::read_dir(path)));
        let clients = settings.buckets.iter().map(|bucket| &bucket.client).chain(catalog.client());
        let values = clients.flat_map(BTreeMap::values).map(|value| PathBuf::from(value.reveal()));
        files.read.extend(values.filter(|path| path.is_absolute()));
        files.read.extend(credentials());
        files.read.extend(system());
        if cfg!(debug_assertions) {
            let log = std::env::var_os("FREIGHTFS_FAILPOINT_LOG").map(PathBuf::from);
            files.write.extend(log.and_then(|log| log.parent().map(Path::to_owned)));
        }
        files
    }
}

/// Where stores' clients look for credentials. A token is replaced by another file in its directory from time to time.
fn credentials() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let mut found: Vec<PathBuf> = [
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CONFIG_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "SERVICE_ACCOUNT",
    ]
    .into_iter()
    .filter_map(variable)
    .collect();
    let tokens = [
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AZURE_FEDERATED_TOKEN_FILE",
    ];
    let tokens = tokens.into_iter().filter_map(variable);
    found.extend(tokens.filter_map(|token| token.parent().map(Path::to_owned)));
    if let Some(home) = home_directory() {
        found.extend([".aws", ".config/gcloud"].map(|name| home.join(name)));
    }
    found
}

/// What libraries read: of processes, of the network, certificates. For root, /etc file by file: it has the passwords.
fn system() -> Vec<PathBuf> {
    const EVERYWHERE: [&str; 17] = [
        "/proc",
        "/sys/fs/cgroup",
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/dev/null",
        "/dev/urandom",
        "/run/systemd/resolve",
        "/run/NetworkManager",
        "/run/resolvconf",
        "/run/nscd",
        "/usr/share/ca-certificates",
        "/usr/local/share/ca-certificates",
        "/var/lib/ca-certificates",
        "/usr/share/pki",
        "/usr/share/zoneinfo",
    ];
    const OF_ETC: [&str; 17] = [
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/host.conf",
        "/etc/nsswitch.conf",
        "/etc/gai.conf",
        "/etc/services",
        "/etc/protocols",
        "/etc/passwd",
        "/etc/group",
        "/etc/localtime",
        "/etc/ld.so.cache",
        "/etc/ssl/certs",
        "/etc/ssl/cert.pem",
        "/etc/ssl/ca-bundle.pem",
        "/etc/pki/tls/certs",
        "/etc/pki/tls/cert.pem",
        "/etc/pki/ca-trust",
    ];
    let of_etc: &[&str] = if nix::unistd::geteuid().is_root() { &OF_ETC } else { &["/etc"] };
    let mut found: Vec<PathBuf> = EVERYWHERE.iter().chain(of_etc).map(PathBuf::from).collect();
    found.extend(["SSL_CERT_FILE", "SSL_CERT_DIR"].iter().filter_map(std::env::var_os).map(PathBuf::from));
    found
}

/// Becomes the user, and gives up what is not needed; returns what is in force and what the kernel lacks, for the log.
/// The process has one thread.
///
/// # Errors
/// Only where the process cannot become that user.
pub(super) fn enter(user: Option<&User>, files: Option<&Files>) -> Result<Vec<String>> {
    let mut report = Vec::new();
    let mut layer = |name: &str, applied: std::result::Result<String, String>| {
        report.push(match applied {
            Ok(what) => format!("{name}: {what}"),
            Err(why) => format!("{name}: not in force: {why}"),
        });
    };
    let kept: HashSet<Capability> = if user.is_some() { HashSet::new() } else { KEPT.into_iter().collect() };
    let is_root = nix::unistd::geteuid().is_root();
    if files.is_some() && is_root {
        layer("capabilities that programs could gain", drop_bounding(&kept));
    }
    if let Some(user) = user {
        become_user(user)
            .map_err(|e| Error::from_io(format!("cannot become the user {}", user.name), e.into()))?;
        layer("user", Ok(user.name.clone()));
    }
    // Rules for files that cannot be opened as this user are of no use.
    let Some(files) = files else {
        layer("sandbox", Err("the option sandbox=off".to_owned()));
        return Ok(report);
    };
    if is_root {
        layer("capabilities", drop_capabilities(&kept));
    }
    // Neither a debugger of the same user nor a core file gets at credentials in memory.
    layer(
        "memory",
        nix::sys::prctl::set_dumpable(false).map(|()| "private".to_owned()).map_err(|e| e.to_string()),
    );
    let no_new = nix::sys::prctl::set_no_new_privs();
    layer("new privileges", no_new.map(|()| "none".to_owned()).map_err(|e| e.to_string()));
    layer("files (Landlock)", restrict_files(files));
    layer("system calls (seccomp)", restrict_calls());
    Ok(report)
}

fn drop_bounding(kept: &HashSet<Capability>) -> std::result::Result<String, String> {
    for capability in caps::all().difference(kept) {
        // Newer ones than the kernel's are not there.
        if caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(|e| e.to_string())?;
        }
    }
    Ok(names(kept))
}

fn drop_capabilities(kept: &HashSet<Capability>) -> std::result::Result<String, String> {
    let drop = || {
        let permitted = caps::read(None, CapSet::Permitted)?;
        let kept: HashSet<_> = kept.intersection(&permitted).copied().collect();
        caps::clear(None, CapSet::Ambient)?;
        caps::clear(None, CapSet::Inheritable)?;
        caps::set(None, CapSet::Effective, &kept)?;
        caps::set(None, CapSet::Permitted, &kept)?;
        Ok::<_, caps::errors::CapsError>(names(&kept))
    };
    drop().map_err(|e| e.to_string())
}

fn names(capabilities: &HashSet<Capability>) -> String {
    let mut names: Vec<_> = capabilities.iter().map(ToString::to_string).collect();
    names.sort();
    if names.is_empty() { "none".to_owned() } else { names.join(" ") }
}

fn become_user(user: &User) -> nix::Result<()> {
    let name = CString::new(user.name.as_bytes()).map_err(|_| nix::Error::EINVAL)?;
    nix::unistd::initgroups(&name, user.gid)?;
    nix::unistd::setresgid(user.gid, user.gid, user.gid)?;
    nix::unistd::setresuid(user.uid, user.uid, user.uid)?;
    // There is no way back, or nothing was gained.
    if Uid::effective() != user.uid
        || Gid::effective() != user.gid
        || nix::unistd::setuid(Uid::from_raw(0)).is_ok() && !user.uid.is_root()
    {
        return Err(nix::Error::EPERM);
    }
    Ok(())
}

fn restrict_files(files: &Files) -> std::result::Result<String, String> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    // No programs, devices or sockets.
    let write: BitFlags<AccessFs> = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSym
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let restrict = || {
        let ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::BindTcp)?
            .scope(Scope::Signal)?
            .create()?
            .add_rules(path_beneath_rules(&files.read, read))?
            .add_rules(path_beneath_rules(&files.write, write))?
            .add_rules(path_beneath_rules(["/dev/fuse", "/dev/null"], device))?;
        ruleset.restrict_self()
    };
    match restrict().map_err(|e| e.to_string())?.ruleset {
        RulesetStatus::FullyEnforced => Ok("only those of the mount".to_owned()),
        RulesetStatus::PartiallyEnforced => {
            Ok("only those of the mount, as far as this kernel's Landlock can".to_owned())
        }
        RulesetStatus::NotEnforced => Err("the kernel has no Landlock".to_owned()),
    }
}

/// System calls that serve to take over a machine, and that no part of the daemon makes: they fail with EPERM.
fn restrict_calls() -> std::result::Result<String, String> {
    let calls = denied_calls();
    let number = calls.len();
    let arch = std::env::consts::ARCH.try_into().map_err(|_| "not known for this processor".to_owned())?;
    let rules = calls.into_iter().map(|call| (call, Vec::new())).collect();
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, denied, arch).map_err(|e| e.to_string())?;
    let program: BpfProgram = filter.try_into().map_err(|e: seccompiler::BackendError| e.to_string())?;
    seccompiler::apply_filter(&program).map_err(|e| e.to_string())?;
    Ok(format!("{number} denied"))
}

fn denied_calls() -> Vec<i64> {
    let mut calls = vec![
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_open_by_handle_at,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        libc::SYS_quotactl,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_kexec_file_load, libc::SYS_uselib]);
    calls.sort_unstable();
    calls.dedup();
    calls
}
