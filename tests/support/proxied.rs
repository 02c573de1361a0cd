//! A mount whose S3 server stands behind a proxy.

use std::collections::BTreeMap;

use super::can_mount;
use super::mount::{Mount, World};
use super::proxy::{Fate, Proxy, Request};
use super::s3::{self, endpoint, uploads};

/// A world whose daemon reaches the S3 server through a proxy.
pub struct Setup {
    pub world: World,
    pub proxy: Proxy,
    pub endpoint: String,
    pub bucket: String,
}

impl Setup {
    pub fn new(name: &str, decide: impl FnMut(&Request) -> Fate + Send + 'static) -> Option<Self> {
        let (Some(endpoint), true) = (endpoint(), can_mount()) else { return None };
        let bucket = format!("{name}-{}", std::process::id());
        let mut world = s3::world(&endpoint, &bucket);
        let proxy = Proxy::start(&endpoint, decide);
        for (variable, value) in &mut world.environment {
            if variable == "AWS_ENDPOINT_URL" {
                *value = proxy.url();
            }
        }
        Some(Self { world, proxy, endpoint, bucket })
    }

    pub fn mount(&self, arguments: &[&str]) -> Mount {
        let url = format!("b=s3://{}", self.bucket);
        self.world.mount_exactly(&[&["--bucket", &url], arguments].concat())
    }

    /// Kills the daemon; its mount goes away with it.
    pub fn kill(&self, mount: Mount) {
        mount.signal("KILL");
        let place = format!(" {} ", self.world.path("mnt").display());
        until("the mount is gone", || !std::fs::read_to_string("/proc/mounts").unwrap().contains(&place));
    }

    /// How often each part of a key was stored, by part number.
    pub fn parts(&self, key: &str) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for (request, status) in self.proxy.answered() {
            let number = request.target.split(['?', '&']).find_map(|word| word.strip_prefix("partNumber="));
            if let (true, 200, Some(number)) = (request.target.contains(key), status, number) {
                *counts.entry(number.to_owned()).or_default() += 1;
            }
        }
        counts
    }

    pub fn fetch(&self, key: &str) -> std::path::PathBuf {
        let fetched = self.world.out("fetched");
        std::fs::write(&fetched, s3::get(&self.endpoint, &self.bucket, key)).unwrap();
        fetched
    }

    pub fn assert_no_upload_is_left(&self) {
        assert_eq!(uploads(&self.endpoint, &self.bucket).trim(), "None", "an upload is left over");
    }
}

/// Waits for something that another process does.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
