//! What holds for documents and records of any bytes: they are refused with an error of bounded length, or they are read,
//! and what was read is written as something that is read as the same.

use std::cell::RefCell;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use freightfs::bucket::ObjectKey;
use freightfs::catalog::{CatalogStore, LocalFiles, Sidecar};
use freightfs::error::{Error, ErrorKind, Result};
use freightfs::export::{StateDir, Status, sidecars};
use freightfs::format::OutputFormat;
use freightfs::policy::{BucketFacts, ImageFacts, Policy, PolicyRequest};
use freightfs::settings::MountSettings;
use freightfs::units::parse_bytes;

/// Errors are this long at most, or some times as long as what they are about.
const MAX_REPORT: usize = 4096;

/// A directory of this thread, in memory where the system has such a place.
struct Scratch {
    path: PathBuf,
    state: StateDir,
}

impl Scratch {
    fn new() -> Self {
        let parent = Path::new("/dev/shm");
        let parent = if parent.is_dir() { parent.to_owned() } else { std::env::temp_dir() };
        let path =
            parent.join(format!("freightfs-fuzz-{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::create_dir_all(path.join("catalog")).expect("a directory can be made");
        let state = StateDir::open(&path.join("state")).expect("a state directory can be made");
        Self { path, state }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// Writes the input to a file of that name in the scratch directory, which only its owner may read, and uses it.
fn with_file<T>(name: &str, input: &[u8], then: impl FnOnce(&Path, &StateDir) -> T) -> T {
    SCRATCH.with_borrow(|scratch| {
        let file = scratch.path.join(name);
        std::fs::write(&file, input).expect("a file can be written");
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("its mode can be set");
        then(&scratch.path, &scratch.state)
    })
}

/// The value, unless the input was refused: a mistake of ours is no refusal, and the error is no longer than it may be.
fn tolerated<T>(input: &[u8], result: Result<T>) -> Option<T> {
    result.map_err(|error| refused(input, &error)).ok()
}

fn refused(input: &[u8], error: &Error) {
    let report = error.report();
    assert_ne!(error.kind(), ErrorKind::Internal, "{report}");
    assert!(report.len() <= MAX_REPORT + 8 * input.len(), "an error of {} bytes", report.len());
}

pub fn sidecar(input: &[u8]) -> bool {
    with_file("catalog/web.toml", input, |directory, _| {
        let files = LocalFiles::open(&directory.join("catalog")).expect("the catalog can be opened");
        let path = files.root().join("web.toml");
        let sidecar = tolerated(input, Sidecar::read(&files, &path));
        let id = sidecar.as_ref().and_then(|sidecar| sidecar.id.as_deref());
        assert!(id.is_none_or(|id| !id.contains('/') && id != "." && id != ".."));
        sidecar.is_some()
    })
}

pub fn policy(input: &[u8]) -> bool {
    let name = |directory: &Path| directory.join("policy.toml").display().to_string();
    let policy = with_file("policy.toml", input, |directory, _| Policy::load(&name(directory)));
    let Some(policy) = tolerated(input, policy) else { return false };
    let image = ImageFacts {
        status: Some("ACTIVE".to_owned()),
        os: None,
        origin: "market".to_owned(),
        made_from: None,
        kind: "system".to_owned(),
        encrypted: true,
        region: Some("r".to_owned()),
        disks: vec![Some(1 << 40), None],
        disk: 1,
    };
    let bucket = BucketFacts { storage_class: Some("archive".to_owned()), region: None };
    for format in OutputFormat::ALL {
        let _ = policy.offers(format);
        let request = PolicyRequest {
            image: Some(&image),
            format: Some(format),
            bucket: Some(&bucket),
            key: Some("a/b.vhd"),
            disk_size: None,
        };
        for request in [request, PolicyRequest { image: None, ..request }, PolicyRequest::default()] {
            if let Err(error) = policy.check(&request) {
                refused(input, &policy.with_cloud_code(error));
            }
        }
    }
    let _ = policy.check_unknown_image();
    true
}

/// The configuration file, and the same bytes as words of `-o`.
pub fn configuration(input: &[u8]) -> bool {
    let mut settings = MountSettings::default();
    let applied = with_file("configuration.toml", input, |directory, _| {
        settings.apply_file(&directory.join("configuration.toml"))
    });
    let is_file = tolerated(input, applied).is_some();
    if is_file {
        let shown = settings.shown("images", Path::new("/mnt"), Path::new("/state"));
        assert!(toml::from_str::<toml::Table>(&shown).is_ok(), "{shown}");
    }
    let Ok(text) = std::str::from_utf8(input) else { return is_file };
    let known = MountSettings::known_options(text);
    assert_eq!(MountSettings::known_options(&known), known);
    tolerated(input, MountSettings::default().apply_options(text)).is_some() || is_file
}

pub fn status(input: &[u8]) -> bool {
    let Ok(status) = serde_json::from_slice::<Status>(input) else { return false };
    let again = serde_json::from_slice::<Status>(&status.to_json());
    assert_eq!(again.ok().as_ref(), Some(&status), "a status is read as another one than it was written");
    true
}

/// A record of the journal; the job is called `job`.
pub fn journal(input: &[u8]) -> bool {
    let loaded = with_file("state/jobs/job.json", input, |_, state| state.journal().load());
    let loaded = loaded.expect("the journal can be listed");
    assert_eq!(loaded.records.len() + loaded.damaged.len(), 1);
    loaded.damaged.iter().for_each(|damaged| refused(input, &damaged.error));
    for record in &loaded.records {
        assert_eq!(record.status.job_id.to_string(), "job");
        let text = serde_json::to_vec(record).expect("a record can be written");
        let again: freightfs::export::Record = serde_json::from_slice(&text).expect("and read");
        assert_eq!(serde_json::to_vec(&again).ok(), Some(text));
    }
    !loaded.records.is_empty()
}

/// The logs of uploads and moves, and intents of uploads.
pub fn upload_log(input: &[u8]) -> bool {
    use freightfs::export::{fuzz_intent, fuzz_log, fuzz_moves};
    fuzz_log(input) | fuzz_moves(input) | fuzz_intent(input)
}

/// What hosts that share a bucket put into it, and the attributes of its files.
pub fn bucket_records(input: &[u8]) -> bool {
    freightfs::export::fuzz_lease(input) | freightfs::vfs::fuzz_attributes(input)
}

pub fn lengths(input: &[u8]) -> bool {
    freightfs::convert::fuzz_lengths(input)
}

/// Answers of stores.
pub fn answers(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let error = freightfs::bucket::fuzz_reply(&text);
    refused(input, &error);
    freightfs::bucket::fuzz_listing(&text) | !error.is_transient()
}

/// Names that programs, buckets and command lines have.
pub fn names(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let key = tolerated(input, ObjectKey::parse(&text));
    if let Some(key) = &key {
        assert_eq!(key.as_str(), text);
        let parents = std::iter::successors(key.parent(), ObjectKey::parent).count();
        assert_eq!(parents, text.matches('/').count());
        if let Some((object, sidecar)) = sidecars::Sidecar::parse(key) {
            assert_eq!(sidecar.key_for(&object).ok().as_ref(), Some(key));
        }
        if let Some((stem, format)) = OutputFormat::split_file_name(key.file_name()) {
            assert_eq!(format!("{stem}.{}", format.suffix()), key.file_name());
        }
    }
    let _ = (parse_bytes(&text), OutputFormat::from_suffix(&text));
    key.is_some()
}
