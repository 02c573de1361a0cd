//! `freightfs mount`: wiring, daemon, signals, end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::mount_table::mount_table;
use super::{FAILED, MountArguments, OK, cores};
use crate::bucket::{BlockCache, Bucket, Pace, RequestLimits};
use crate::catalog::{BucketFiles, Catalog, CatalogStore, LocalFiles};
use crate::convert::Workspace;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobQueue, QueueSettings, RecordedFile, Retries, StateDir, StatusImage};
use crate::format::OutputFormat;
use crate::fuse::{FuseOptions, MountedSession, Unmounter};
use crate::metrics::Metrics;
use crate::settings::{
    CACHE, CatalogSetting, JOBS, LEASE, MountSettings, REQUEST_TIMEOUT, RETRIES, default_state,
    home_directory,
};
use crate::vfs::{Vfs, VfsSettings};

/// What the daemon says at last on its standard output when the mount answers, after notes; anything else is the reason
/// why not.
const READY: &str = "ready\n";

/// The name of the bucket that the catalog is, where it is one.
const CATALOG: &str = "catalog";

/// How long fsync and `wait` wait for a job, at most: ZStack's default time-out of an export.
const WAIT_LIMIT: Duration = Duration::from_secs(3 * 3600);

/// Bytes from which a log is put aside at start.
const LOG_LIMIT: u64 = 10 << 20;

pub(super) fn run(arguments: &MountArguments) -> Result<u8> {
    let (settings, catalog) = settings(arguments)?;
    if !arguments.foreground && !arguments.report_ready {
        return start_daemon(arguments);
    }
    let mounted = Mounted::new(arguments, &settings, catalog);
    if arguments.report_ready {
        report(&mounted)?;
    }
    let mounted = mounted?;
    // For a unit of the type notify; nobody listens elsewhere.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    mounted.serve()?;
    Ok(OK)
}

/// Everything that can be checked without mounting.
pub(super) fn check(arguments: &MountArguments) -> Result<u8> {
    let (settings, catalog) = settings(arguments)?;
    mountpoint(&arguments.mountpoint, &settings)?;
    match &catalog {
        CatalogSetting::Directory(path) => Catalog::open(path).map(drop)?,
        CatalogSetting::Bucket { url, client } => {
            Bucket::open_with(CATALOG, url, &limits(&settings), client).map(drop)?;
        }
    }
    settings.policy()?;
    Ok(OK)
}

/// One validated form of configuration file, flags and options, and the catalog. What is said later wins.
fn settings(arguments: &MountArguments) -> Result<(MountSettings, CatalogSetting)> {
    let mut settings = MountSettings::default();
    let catalog = match CatalogSetting::named(&arguments.catalog) {
        CatalogSetting::Directory(path)
            if path.extension().is_some_and(|extension| extension == "toml") && !path.is_dir() =>
        {
            settings.apply_file(&path)?
        }
        catalog => catalog,
    };
    for (option, value) in &arguments.flags.0 {
        settings.apply(option.word, value.as_deref())?;
    }
    arguments.options.iter().try_for_each(|options| settings.apply_options(options))?;
    Ok((settings, catalog))
}

/// Starts this program again as a daemon, and returns when its mount answers or with its reason.
fn start_daemon(arguments: &MountArguments) -> Result<u8> {
    let failed = |e| Error::from_io("cannot start the daemon", e);
    let program = std::env::current_exe().map_err(failed)?;
    let flags = arguments.flags.words();
    let options = arguments.options.iter().flat_map(|options| ["-o", options]);
    let mut child = Command::new(program)
        .arg("mount")
        .args(flags)
        .args(options)
        .arg("--report-ready")
        .arg("--")
        .args([&arguments.catalog, &arguments.mountpoint])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut said).map_err(failed)?;
    }
    if let Some(notes) = said.strip_suffix(READY) {
        eprint!("{notes}");
        return Ok(OK);
    }
    let status = child.wait().map_err(failed)?;
    if said.is_empty() {
        return Err(Error::new(ErrorKind::Internal, format!("the daemon ended without a reason: {status}")));
    }
    eprint!("{said}");
    Ok(FAILED)
}

/// Tells the waiting parent how it went and lets go of its terminal.
fn report(mounted: &Result<Mounted>) -> Result<()> {
    let line = match mounted {
        Ok(mounted) => {
            let notes: String = mounted.notes.iter().map(|note| format!("freightfs: {note}\n")).collect();
            notes + READY
        }
        Err(error) => format!("freightfs: {}\n", error.report()),
    };
    let failed = |e: std::io::Error| Error::from_io("cannot detach", e);
    let mut stdout = std::io::stdout();
    stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()).map_err(failed)?;
    if mounted.is_err() {
        std::process::exit(FAILED.into());
    }
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    nix::unistd::dup2_stderr(&null).map_err(|e| failed(e.into()))
}

/// A mount that answers.
struct Mounted {
    session: MountedSession,
    mountpoint: PathBuf,
    jobs: JobQueue,
    vfs: Arc<Vfs>,
    /// What the user should know of this mount.
    notes: Vec<String>,
    runtime: Runtime,
    _state: StateDir,
}

impl Mounted {
    fn new(arguments: &MountArguments, settings: &MountSettings, catalog: CatalogSetting) -> Result<Self> {
        let mountpoint = mountpoint(&arguments.mountpoint, settings)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(cores())
            .max_blocking_threads(1024)
            .thread_keep_alive(Duration::from_secs(60))
            .enable_all()
            .build()
            .map_err(|e| Error::from_io("cannot start the runtime", e))?;
        let limits = limits(settings);
        let catalog = open_catalog(catalog, &limits, runtime.handle())?;
        let state_path = match &settings.state {
            Some(path) => std::path::absolute(path)
                .map_err(|e| Error::from_io("cannot resolve the state directory", e))?,
            None => default_state(&state_base()?, &mountpoint),
        };
        let state = StateDir::open(&state_path)?;
        if arguments.report_ready {
            // The daemon's own session: signals of the terminal do not reach it.
            nix::unistd::setsid().map_err(|e| Error::from_io("cannot detach", e.into()))?;
            log_to_file(&state_path)?;
        } else {
            log_to_terminal();
        }
        let catalog = Catalog::new(catalog).with_workspace(Workspace::in_directory(&state.lengths()));
        let buckets = runtime.block_on(open_buckets(settings, &limits))?;
        let lack = |bucket: &Bucket| Some(format!("bucket {}: {}", bucket.name(), bucket.limitation()?));
        let notes: Vec<_> = buckets.values().filter_map(lack).collect();
        let policy = Arc::new(settings.policy()?);
        let formats: Vec<_> = settings.formats().into_iter().filter(|&f| policy.offers(f)).collect();
        if formats.is_empty() {
            let what = format!("policy {:?} offers none of the formats that were chosen", policy.name);
            return Err(Error::new(ErrorKind::Malformed, what));
        }
        let seconds = settings.lease.unwrap_or(LEASE);
        let lease = settings.shared.then(|| Duration::from_secs(seconds.into()));
        let metrics = Arc::new(Metrics::default());
        let handle = runtime.handle().clone();
        let jobs = JobQueue::new(
            buckets.clone(),
            state.journal(),
            Arc::clone(&metrics),
            QueueSettings {
                running: settings.jobs.unwrap_or(JOBS),
                lease,
                policy: Arc::clone(&policy),
                retries: Retries { count: settings.retries.unwrap_or(RETRIES), ..Retries::default() },
            },
            handle.clone(),
        );
        let vfs_settings = VfsSettings {
            formats,
            policy,
            bucket_facts: buckets.keys().map(|name| (name.clone(), settings.bucket_facts(name))).collect(),
            read_to_end: settings.read_to_end(),
            wait: settings.wait,
            wait_limit: WAIT_LIMIT,
            uid: settings.uid.unwrap_or_else(|| nix::unistd::getuid().as_raw()),
            gid: settings.gid.unwrap_or_else(|| nix::unistd::getgid().as_raw()),
            umask: settings.umask.unwrap_or(0),
            staging: state.staging(),
            stage_limit: settings.stage_limit,
            shown_config: settings.shown(&catalog.place(), &mountpoint, &state_path),
        };
        let options = FuseOptions {
            source: source(&arguments.catalog).display().to_string(),
            allow_other: settings.allow_other,
            read_only: settings.read_only,
            threads: (2 * cores()).max(4),
        };
        let vfs = Arc::new(Vfs::new(catalog, buckets, jobs.clone(), metrics, vfs_settings, handle.clone()));
        let session = MountedSession::new(Arc::clone(&vfs), handle, &mountpoint, &options)?;
        notes.iter().for_each(|note| warn!("{note}"));
        info!(mountpoint = %mountpoint.display(), state = %state_path.display(), "mounted");
        Ok(Self { session, mountpoint, jobs, vfs, notes, runtime, _state: state })
    }

    /// Serves until the mount is gone. After umount the jobs are finished; after a signal they stay recorded, and
    /// the next mount with this state directory goes on with them.
    fn serve(mut self) -> Result<()> {
        let vfs = Arc::clone(&self.vfs);
        self.jobs.resume(|image| resolve(&vfs, image))?;
        let signalled = Arc::new(AtomicBool::new(false));
        let unmounter = self.session.unmounter();
        let ended = self.runtime.spawn(on_signal(unmounter, self.mountpoint.clone(), Arc::clone(&signalled)));
        let saver = Arc::clone(&vfs);
        let saving = self.runtime.spawn(async move { saver.keep_saving_attributes().await });
        let result = self.session.run();
        self.runtime.block_on(vfs.end_drafts());
        if !signalled.load(Ordering::SeqCst) {
            let left = self.jobs.jobs().iter().filter(|job| !job.status().status.is_final()).count();
            if left > 0 {
                info!("unmounted; finishing {left} jobs");
            }
            self.runtime.block_on(async {
                tokio::select! {
                    () = self.jobs.drain() => {}
                    _ = ended => {}
                }
            });
        }
        self.runtime.block_on(self.jobs.stop());
        saving.abort();
        self.runtime.block_on(vfs.save_attributes());
        info!("ended");
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        result
    }
}

/// Finds the bytes of a recorded job again, if its source is what it was.
fn resolve(vfs: &Vfs, image: &StatusImage) -> Result<RecordedFile> {
    let format = OutputFormat::from_suffix(&image.format)?;
    vfs.recorded_file(image, format)
}

/// The files of the catalog, which is asked whether it can be listed.
fn open_catalog(
    catalog: CatalogSetting,
    limits: &RequestLimits,
    runtime: &Handle,
) -> Result<Arc<dyn CatalogStore>> {
    match catalog {
        CatalogSetting::Directory(path) => Ok(Arc::new(LocalFiles::open(&path)?)),
        CatalogSetting::Bucket { url, client } => {
            let named = |e: Error| Error::new(e.kind(), format!("the catalog: {}", e.report()));
            let bucket = Bucket::open_with(CATALOG, &url, limits, &client).map_err(named)?;
            Ok(Arc::new(BucketFiles::open(bucket, runtime.clone()).map_err(named)?))
        }
    }
}

fn limits(settings: &MountSettings) -> RequestLimits {
    RequestLimits {
        timeout: Duration::from_secs(settings.timeout.unwrap_or(REQUEST_TIMEOUT).into()),
        pace: settings.rate.map(|rate| Arc::new(Pace::new(rate))),
        blocks: Arc::new(BlockCache::new(settings.cache.unwrap_or(CACHE))),
    }
}

async fn open_buckets(settings: &MountSettings, limits: &RequestLimits) -> Result<BTreeMap<String, Bucket>> {
    let mut buckets = BTreeMap::new();
    for setting in &settings.buckets {
        let named = |e: Error| Error::new(e.kind(), format!("bucket {}: {}", setting.name, e.report()));
        let bucket =
            Bucket::open_with(&setting.name, &setting.url, limits, &setting.client).map_err(named)?;
        bucket.probe().await.map_err(named)?;

        if settings.shared {
            bucket.probe_create().await.map_err(named)?;
        }
        buckets.insert(setting.name.clone(), bucket);
    }
    Ok(buckets)
}

/// Unmounts at SIGTERM and SIGINT; a mount that is busy is detached, and its open files end with the process.
async fn on_signal(mut unmounter: Unmounter, mountpoint: PathBuf, signalled: Arc<AtomicBool>) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        warn!("signals cannot be handled");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    signalled.store(true, Ordering::SeqCst);
    info!("ending by signal; unfinished jobs stay recorded");
    let _ = tokio::task::spawn_blocking(move || {
        if let Err(error) = unmounter.unmount() {
            warn!("{}; detaching", error.report());
            detach(&mountpoint);
        }
    })
    .await;
}

/// Takes a busy mount out of the tree.
fn detach(mountpoint: &Path) {
    let detached = nix::mount::umount2(mountpoint, nix::mount::MntFlags::MNT_DETACH).is_ok();
    if !detached {
        let _ = Command::new("fusermount3").args(["-u", "-z", "-q", "--"]).arg(mountpoint).status();
    }
}

/// The mount point as an absolute path, checked to be a directory that answers, is empty, and has no mount.
fn mountpoint(path: &Path, settings: &MountSettings) -> Result<PathBuf> {
    let place = path.display().to_string();
    let meta = std::fs::metadata(path).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOTCONN) => {
            let what = "an earlier mount here died; remove it with `fusermount3 -u` or `umount -l`, then mount again";
            Error::new(ErrorKind::Busy, what).in_file(&place)
        }
        Some(libc::ENOENT) => {
            let what = format!("the mount point does not exist; make it with `mkdir {place}`");
            Error::new(ErrorKind::NotFound, what).in_file(&place)
        }
        _ => Error::from_io("cannot use the mount point", e).in_file(&place),
    })?;
    if !meta.is_dir() {
        return Err(Error::new(ErrorKind::NotDirectory, "the mount point is not a directory").in_file(place));
    }
    let path = path
        .canonicalize()
        .map_err(|e| Error::from_io("cannot resolve the mount point", e).in_file(&place))?;
    let refused = |kind, what: String| Err(Error::new(kind, what).in_file(&place));
    let here: Vec<_> = mount_table()?.into_iter().filter(|mount| mount.path == path).collect();
    if let Some(mount) = here.iter().find(|mount| mount.kind.starts_with("fuse")) {
        let what = format!("{} is mounted here already; umount it first", mount.source);
        return refused(ErrorKind::Busy, what);
    }
    // Listing the place of an automount would wait for this very mount.
    if here.iter().any(|mount| mount.kind == "autofs") {
        return Ok(path);
    }
    let mut entries = std::fs::read_dir(&path)
        .map_err(|e| Error::from_io("cannot list the mount point", e).in_file(&place))?;
    if !settings.nonempty && entries.next().is_some() {
        let what = "the mount point is not empty, and a mount would hide what is in it; choose another directory, or \
                    give the option nonempty";
        return refused(ErrorKind::NotEmpty, what.to_owned());
    }
    Ok(path)
}

/// What stands for the catalog in /proc/mounts: the path that fstab has, so that `mount -a` knows it again.
fn source(catalog: &Path) -> PathBuf {
    catalog.canonicalize().unwrap_or_else(|_| catalog.to_owned())
}

/// `$XDG_STATE_HOME`, else /var/lib for root and ~/.local/state for others.
fn state_base() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(base) = variable("XDG_STATE_HOME").filter(|p| p.is_absolute()) {
        return Ok(base);
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib"));
    }
    let missing = || {
        Error::new(
            ErrorKind::NotFound,
            "this user has no home directory; give the state directory with --state",
        )
    };
    Ok(home_directory().ok_or_else(missing)?.join(".local/state"))
}

fn log_filter() -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_env("FREIGHTFS_LOG")
        .unwrap_or_else(|_| "warn,freightfs=info".into())
}

/// The terminal's log, or the journal's, which has times and colours of its own.
fn log_to_terminal() {
    let log = tracing_subscriber::fmt().with_env_filter(log_filter()).with_writer(std::io::stderr);
    let _ = if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.with_ansi(false).without_time().try_init()
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
}

/// The daemon's log: `log` in the state directory, put aside as `log.1` at start when it has grown.
fn log_to_file(state: &Path) -> Result<()> {
    let path = state.join("log");
    let failed = |e| Error::from_io("cannot open the log", e).in_file(path.display().to_string());
    if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_LIMIT) {
        std::fs::rename(&path, state.join("log.1")).map_err(failed)?;
    }
    let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
    let _ =
        tracing_subscriber::fmt().with_env_filter(log_filter()).with_ansi(false).with_writer(file).try_init();
    Ok(())
}
