//! What the mount means: names, attributes, handles, and what a copy does. Knows nothing of FUSE.
//!
//! Whatever may wait, for a store, a job or a file, is an `async fn`, and [`crate::fuse`] runs it as a task: nothing
//! here holds a thread while it waits. What is not `async` answers at once and may be called on any thread.
//! Synchronous work that may take long goes to a thread of its lane (`lanes.rs`). A call answers with an
//! [`Error`](crate::error::Error) whose errno the program gets.

mod attr;
mod attributes;
mod directory;
mod document;
mod draft;
mod drafts;
mod export_options;
mod handle;
mod inode;
mod lanes;
mod made;
mod objects;
mod permit;
mod recent;
mod tree;
mod xattr;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::runtime::Handle as Runtime;

pub use attr::{Attr, AttrChange, NodeKind};
pub use handle::{OpenOptions, Whence};
pub use inode::{HandleId, Ino, ROOT_INO};
pub use tree::DirectoryEntry;

use crate::bucket::{Bucket, ObjectKey};
use crate::catalog::Catalog;
use crate::error::Result;
use crate::export::JobQueue;
use crate::format::OutputFormat;
use crate::metrics::Metrics;
use crate::policy::{BucketFacts, Policy};
use attributes::Attributes;
#[doc(hidden)]
pub use attributes::fuzz_attributes;
use draft::{Drafts, PublishOptions, Publisher};
use export_options::ExportOptions;
use handle::Handles;
use inode::InodeTable;
use lanes::{Lane, Lanes};
use made::MadeDirectories;
use permit::Permits;
use recent::RecentObjects;

/// How a mount behaves; made by the command line.
#[derive(Clone, Debug)]
pub struct VfsSettings {
    /// The formats that image directories list.
    pub formats: Vec<OutputFormat>,
    /// Programs that read a file to its end, so that they may open a compressed one whose size is not known yet.
    pub read_to_end: Vec<String>,
    /// What may be exported.
    pub policy: Arc<Policy>,
    /// What the policy is told of the buckets, by name.
    pub bucket_facts: BTreeMap<String, BucketFacts>,
    /// Whether programs may write disk images that a rule about images cannot judge.
    pub plain_images: bool,
    /// Whether closing a copy waits until its job has ended.
    pub wait: bool,
    /// How long fsync and `wait` wait before they give up; the job goes on.
    pub wait_limit: Duration,
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
    /// Permission bits that are taken away.
    pub umask: u16,
    /// Where writers' files are staged.
    pub staging: std::path::PathBuf,
    /// Bytes that staged files may take together.
    pub stage_limit: Option<u64>,
    /// The configuration as users may see it, for `.freightfs/config`.
    pub shown_config: String,
}

/// A bucket's name and a key in it.
type ObjectName = (String, ObjectKey);

/// The mounted tree.
pub struct Vfs {
    catalog: Catalog,
    buckets: BTreeMap<String, Bucket>,
    jobs: JobQueue,
    metrics: Arc<Metrics>,
    settings: VfsSettings,
    mounted: SystemTime,
    inodes: InodeTable,
    handles: Handles,
    drafts: Drafts,
    publisher: Publisher,
    /// Directories that were made and may have no object in them yet.
    made_directories: MadeDirectories,
    attributes: Arc<Attributes>,
    recent: RecentObjects,
    /// What clients set for the next exports.
    requests: Arc<ExportOptions>,
    lanes: Arc<Lanes>,
    permits: Arc<Permits>,
}

impl Vfs {
    /// The tree over a catalog and buckets.
    pub fn new(
        catalog: Catalog,
        buckets: BTreeMap<String, Bucket>,
        jobs: JobQueue,
        metrics: Arc<Metrics>,
        settings: VfsSettings,
        runtime: Runtime,
    ) -> Self {
        let (lanes, attributes) = (Arc::<Lanes>::default(), Arc::<Attributes>::default());
        let requests = Arc::<ExportOptions>::default();
        let permits = Arc::new(Permits {
            policy: Arc::clone(&settings.policy),
            buckets: settings.bucket_facts.clone(),
            plain_images: settings.plain_images,
        });
        let publisher = Publisher {
            permits: Arc::clone(&permits),
            jobs: jobs.clone(),
            buckets: buckets.clone(),
            lanes: Arc::clone(&lanes),
            attributes: Arc::clone(&attributes),
            requests: Arc::clone(&requests),
            options: PublishOptions {
                wait: settings.wait,
                wait_limit: settings.wait_limit,
                staging: settings.staging.clone(),
                stage_limit: settings.stage_limit,
            },
            runtime,
        };
        Self {
            catalog,
            buckets,
            jobs,
            metrics,
            settings,
            mounted: SystemTime::now(),
            inodes: InodeTable::new(),
            handles: Handles::default(),
            drafts: Drafts::default(),
            publisher,
            made_directories: MadeDirectories::default(),
            attributes,
            recent: RecentObjects::default(),
            requests,
            lanes,
            permits,
        }
    }

    /// Runs synchronous work that may take long on a thread of its lane.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        lane: Lane,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let vfs = Arc::clone(self);
        self.lanes.run(lane, move || work(&vfs)).await
    }

    /// The mount's counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The jobs of the mount.
    pub fn jobs(&self) -> &JobQueue {
        &self.jobs
    }
}
