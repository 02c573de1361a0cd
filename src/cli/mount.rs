//! `freightfs mount`: wiring, signals, end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::User;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::log::{Log, REPEATS_TOLD};
use super::mounter::{MountRequest, Mounter, session_error};
use super::mountpoint::{mountpoint, source};
use super::sandbox::Files;
use super::{MountArguments, OK, cores, daemon, sandbox};
use crate::bucket::{BlockCache, Bucket, IN_FLIGHT, RateLimit, RequestLimits};
use crate::catalog::{BucketFiles, Catalog, CatalogStore, LocalFiles};
use crate::convert::Workspace;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobQueue, QueueSettings, RecordedFile, Retries, StateDir, StatusImage};
use crate::format::OutputFormat;
use crate::fuse::{FuseOptions, MountedSession, Requests};
use crate::image::Cancel;
use crate::metrics::Metrics;
use crate::policy::Policy;
use crate::settings::{CatalogSetting, MountSettings, default_state};
use crate::vfs::{Vfs, VfsSettings};

/// The name of the bucket that the catalog is, where it is one.
const CATALOG: &str = "catalog";

/// How long fsync and `wait` wait for a job, at most: ZStack's default time-out of an export.
const WAIT_LIMIT: Duration = Duration::from_secs(3 * 3600);

/// How long the daemon waits for stores when it ends. What they have not answered by then is interrupted, as a crash would
/// interrupt it, and the next mount resumes it. Container runtimes kill after 10 seconds.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// How long it waits then for what was last set on files.
const SAVE_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn run(arguments: &MountArguments) -> Result<u8> {
    let (settings, catalog) = settings(arguments)?;
    let user = sandbox::user(&settings)?;
    if !arguments.foreground && !arguments.report_ready {
        return daemon::start(arguments, user.as_ref());
    }
    let mounted = Mounted::new(arguments, &settings, catalog, user.as_ref());
    if arguments.report_ready {
        daemon::report(mounted.as_ref().map(|mounted| &*mounted.notes))?;
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
    sandbox::user(&settings)?;
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

/// A mount that answers.
struct Mounted {
    session: MountedSession,
    mounter: Mounter,
    jobs: JobQueue,
    vfs: Arc<Vfs>,
    /// Gives up what would have the end of the mount wait.
    walks: Cancel,
    /// What the user should know of this mount.
    notes: Vec<String>,
    log: Log,
    runtime: Runtime,
    _state: StateDir,
}

impl Mounted {
    /// Mounts. Whatever can fail comes before the kernel is asked for the mount, cheap checks first.
    fn new(
        arguments: &MountArguments,
        settings: &MountSettings,
        catalog: CatalogSetting,
        user: Option<&User>,
    ) -> Result<Self> {
        let mountpoint = mountpoint(&arguments.mountpoint, settings)?;
        let state_path = state_path(settings, &mountpoint)?;
        let policy = Arc::new(settings.policy()?);
        let mut mounter = Mounter::start(&mount_request(arguments, settings, &mountpoint, user))?;
        // Before there is another thread.
        let given_up = give_up(settings, &catalog, &state_path, user)?;
        let runtime = runtime(settings.buckets.len())?;
        let handle = runtime.handle();
        let limits = limits(settings);
        let catalog = open_catalog(catalog, settings.follow_links, &limits, handle)?;
        let state = StateDir::open(&state_path)?;
        let log = daemon::begin(arguments.report_ready, &state_path, settings.log_size)?;
        given_up.iter().for_each(|layer| info!("{layer}"));
        let catalog = Catalog::new(catalog).with_workspace(Workspace::in_directory(&state.lengths()));
        let buckets = runtime.block_on(open_buckets(settings, &limits))?;
        let metrics = Arc::new(Metrics::default());
        let jobs = job_queue(settings, &policy, &buckets, &state, &metrics, handle);
        let walks = catalog.walks();
        let shown_config = settings.shown(&catalog.place(), &mountpoint, &state_path);
        let vfs_settings = vfs_settings(settings, &policy, &buckets, &state, shown_config)?;
        let notes = limitations(&buckets);
        let vfs = Arc::new(Vfs::new(catalog, buckets, jobs.clone(), metrics, vfs_settings, handle.clone()));
        let options = FuseOptions { allow_other: settings.allow_other, threads: (2 * cores()).max(4) };
        let device = mounter.mount()?;
        let session = MountedSession::new(Arc::clone(&vfs), handle.clone(), device, &options)
            .map_err(|e| session_error(e, &mut mounter))?;
        notes.iter().for_each(|note| warn!("{note}"));
        info!(mountpoint = %mountpoint.display(), state = %state_path.display(), "mounted");
        Ok(Self { session, mounter, jobs, vfs, walks, notes, log, runtime, _state: state })
    }

    /// Serves until the mount is gone. After umount the jobs are finished; after a signal they stay recorded, and the next
    /// mount with this state directory resumes them.
    fn serve(self) -> Result<()> {
        let vfs = Arc::clone(&self.vfs);
        let resolver = Arc::clone(&vfs);
        self.jobs.resume(move |image| resolve(&resolver, image))?;
        let signalled = self.runtime.spawn(signalled());
        let saver = Arc::clone(&vfs);
        let log = self.log.clone();
        let saving = self.runtime.spawn(async move {
            tokio::join!(saver.keep_saving_attributes(), saver.keep_drafts_bounded(), keep_telling(log))
        });
        let requests = self.session.requests();
        let mut ended = serve_session(self.session)?;
        let (result, by_signal) = self.runtime.block_on(async {
            tokio::pin!(signalled);
            tokio::select! {
                result = &mut ended => {
                    (result, finish(&vfs, &requests, &self.jobs, signalled).await)
                }
                _ = &mut signalled => {
                    self.walks.cancel();
                    (unmount(self.mounter, ended).await, true)
                }
            }
        });
        if by_signal {
            info!("ending by signal; unfinished jobs stay recorded");
        }
        self.runtime.block_on(stop(&vfs, &self.jobs));
        saving.abort();
        info!("ended");
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        // The session that ended without a result was cut off by the signal.
        result.unwrap_or(Ok(()))
    }
}

/// Tells from time to time how often the last line of the log was repeated.
async fn keep_telling(log: Log) {
    let mut interval = tokio::time::interval(REPEATS_TOLD);
    loop {
        interval.tick().await;
        log.tell_repeats();
    }
}

/// Ends what still works for the mount. What a store does not answer holds up nothing of another one.
async fn stop(vfs: &Arc<Vfs>, jobs: &JobQueue) {
    let ended = async {
        vfs.end_drafts().await;
        jobs.stop().await;
    };
    if tokio::time::timeout(STOP_LIMIT, ended).await.is_err() {
        warn!("a store did not answer within {} s; the next mount resumes", STOP_LIMIT.as_secs());
    }
    // Waits for those under way.
    let _ = tokio::time::timeout(SAVE_LIMIT, vfs.save_attributes()).await;
    for bucket in vfs.unsaved_attributes() {
        warn!(bucket, "what was last set on its files is lost: its store did not take it");
    }
}

/// Serves the kernel's requests on a thread of its own; gives the session's result. Nobody waits for the thread: somebody's
/// working directory or open file keeps a session alive that is detached already, and only the process's end ends it.
fn serve_session(session: MountedSession) -> Result<oneshot::Receiver<Result<()>>> {
    let (tell, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("session".to_owned())
        .spawn(move || drop(tell.send(session.run())))
        .map_err(|e| Error::from_io("cannot serve the mount", e))?;
    Ok(ended)
}

/// Finishes what a mount that is gone has begun: requests that the kernel does not wait for, files that were closed, jobs,
/// and what was set on files. Returns whether a signal came first.
async fn finish(vfs: &Arc<Vfs>, requests: &Requests, jobs: &JobQueue, signalled: impl Future) -> bool {
    let ending = Arc::clone(vfs);
    let finished = async {
        requests.answered().await;
        // Not cut off by a signal.
        let _ = tokio::spawn(async move { ending.end_drafts().await }).await;
        let left = jobs.jobs().iter().filter(|job| !job.status().status.is_final()).count();
        if left > 0 {
            info!("unmounted; finishing {left} jobs");
        }
        jobs.drain().await;
        vfs.save_all_attributes().await;
    };
    tokio::select! {
        () = finished => false,
        _ = signalled => true,
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
    follow_links: bool,
    limits: &RequestLimits,
    runtime: &Handle,
) -> Result<Arc<dyn CatalogStore>> {
    match catalog {
        CatalogSetting::Directory(path) => {
            Ok(Arc::new(LocalFiles::open(&path)?.following_links(follow_links)))
        }
        CatalogSetting::Bucket { url, client } => {
            let named = |e: Error| Error::new(e.kind(), format!("the catalog: {}", e.report()));
            let bucket = Bucket::open_with(CATALOG, &url, limits, &client).map_err(named)?;
            Ok(Arc::new(BucketFiles::open(bucket, runtime.clone()).map_err(named)?))
        }
    }
}

fn limits(settings: &MountSettings) -> RequestLimits {
    RequestLimits {
        timeout: Duration::from_secs(settings.timeout.into()),
        rate: settings.rate.map(|rate| Arc::new(RateLimit::new(rate))),
        blocks: Arc::new(BlockCache::new(settings.cache)),
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
            bucket.check_shareable().map_err(named)?;
        }
        buckets.insert(setting.name.clone(), bucket);
    }
    Ok(buckets)
}

/// A runtime whose threads a directory that hangs does not use up, be it each of so many buckets'.
fn runtime(buckets: usize) -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores())
        .max_blocking_threads(1024 + IN_FLIGHT * buckets)
        .thread_keep_alive(Duration::from_secs(60))
        .enable_all()
        .build()
        .map_err(|e| Error::from_io("cannot start the runtime", e))
}

fn state_path(settings: &MountSettings, mountpoint: &Path) -> Result<PathBuf> {
    match &settings.state {
        Some(path) => {
            std::path::absolute(path).map_err(|e| Error::from_io("cannot resolve the state directory", e))
        }
        None => default_state(mountpoint),
    }
}

/// What the user should know of the buckets' stores.
fn limitations(buckets: &BTreeMap<String, Bucket>) -> Vec<String> {
    let limitation = |bucket: &Bucket| Some(format!("bucket {}: {}", bucket.name(), bucket.limitation()?));
    buckets.values().filter_map(limitation).collect()
}

fn job_queue(
    settings: &MountSettings,
    policy: &Arc<Policy>,
    buckets: &BTreeMap<String, Bucket>,
    state: &StateDir,
    metrics: &Arc<Metrics>,
    runtime: &Handle,
) -> JobQueue {
    let queue_settings = QueueSettings {
        running: settings.jobs,
        lease: settings.shared.then(|| Duration::from_secs(settings.lease.into())),
        policy: Arc::clone(policy),
        retries: Retries { count: settings.retries, ..Retries::default() },
        all_sidecars: settings.sidecars,
        incremental: settings.incremental,
        ..QueueSettings::default()
    };
    JobQueue::new(buckets.clone(), state.journal(), Arc::clone(metrics), queue_settings, runtime.clone())
}

fn vfs_settings(
    settings: &MountSettings,
    policy: &Arc<Policy>,
    buckets: &BTreeMap<String, Bucket>,
    state: &StateDir,
    shown_config: String,
) -> Result<VfsSettings> {
    let formats: Vec<_> = settings.formats.iter().copied().filter(|&f| policy.offers(f)).collect();
    if formats.is_empty() {
        let what = format!("policy {:?} offers none of the formats that were chosen", policy.name);
        return Err(Error::new(ErrorKind::Malformed, what));
    }
    Ok(VfsSettings {
        formats,
        policy: Arc::clone(policy),
        bucket_facts: buckets.keys().map(|name| (name.clone(), settings.bucket_facts(name))).collect(),
        plain_images: settings.plain_images,
        read_to_end: settings.read_to_end.clone(),
        wait: settings.wait,
        wait_limit: WAIT_LIMIT,
        uid: settings.uid.unwrap_or_else(|| nix::unistd::getuid().as_raw()),
        gid: settings.gid.unwrap_or_else(|| nix::unistd::getgid().as_raw()),
        umask: settings.umask,
        staging: state.staging(),
        stage_limit: settings.stage_limit,
        shown_config,
    })
}

fn mount_request(
    arguments: &MountArguments,
    settings: &MountSettings,
    mountpoint: &Path,
    user: Option<&User>,
) -> MountRequest {
    let own = || (nix::unistd::getuid(), nix::unistd::getgid());
    MountRequest {
        mountpoint: mountpoint.to_owned(),
        source: source(&arguments.catalog).display().to_string(),
        allow_other: settings.allow_other,
        read_only: settings.read_only,
        owner: user.map_or_else(own, |user| (user.uid, user.gid)),
    }
}

/// Gives up what serving the mount does not need; returns what that was, for the log.
fn give_up(
    settings: &MountSettings,
    catalog: &CatalogSetting,
    state: &Path,
    user: Option<&User>,
) -> Result<Vec<String>> {
    // The kernel's rules are about files that are there.
    sandbox::make_state(state, user)?;
    let files = settings.sandbox.then(|| Files::of(settings, catalog, state));
    sandbox::enter(user, files.as_ref())
}

/// Waits for SIGTERM or SIGINT.
async fn signalled() {
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
}

/// Takes the mount away. A busy one is detached: it is out of the tree at once, and whoever has it open or as working
/// directory loses it when the process ends. Returns the session's result, where that ended.
async fn unmount(
    mut mounter: Mounter,
    ended: oneshot::Receiver<Result<()>>,
) -> Result<Result<()>, oneshot::error::RecvError> {
    let unmounted = tokio::task::spawn_blocking(move || match mounter.unmount() {
        Ok(()) => true,
        Err(error) => {
            warn!("{}; detaching", error.report());
            mounter.detach();
            false
        }
    });
    let ended = async { if unmounted.await.unwrap_or(false) { ended.await } else { Ok(Ok(())) } };
    // A thread of the session may be reading from a disk that does not answer.
    tokio::time::timeout(STOP_LIMIT, ended).await.unwrap_or(Ok(Ok(())))
}
