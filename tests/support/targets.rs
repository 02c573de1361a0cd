//! The buckets that a test body runs against: it is written once.

use super::mount::{Mount, World};
use super::s3;

/// A bucket to test against.
pub struct Target {
    pub name: &'static str,
    pub world: World,
    arguments: Vec<String>,
}

impl Target {
    /// An object, as the store itself has it.
    pub fn object(&self, key: &str) -> Vec<u8> {
        if self.name == "local" {
            return std::fs::read(self.world.bucket().join(key)).unwrap();
        }
        let endpoint = s3::endpoint().unwrap();
        let url = format!("{}/{key}", self.arguments[1].strip_prefix("b=").unwrap());
        let got = self.world.out("got");
        super::succeed(s3::aws(&endpoint, &["s3", "cp", "--quiet", &url]).arg(&got));
        std::fs::read(got).unwrap()
    }

    /// Another mount of the same bucket, with a state and a mount point of its own.
    pub fn other(&self) -> (World, Mount) {
        let mut world = World::new();
        world.environment.clone_from(&self.world.environment);
        let mount = world.mount_exactly(&self.arguments.iter().map(String::as_str).collect::<Vec<_>>());
        (world, mount)
    }

    pub fn mount(&self) -> Mount {
        self.mount_with(&[])
    }

    /// A mount with more options.
    pub fn mount_with(&self, options: &[&str]) -> Mount {
        let arguments: Vec<_> = self.arguments.iter().map(String::as_str).collect();
        self.world.mount_exactly(&[&arguments, options].concat())
    }
}

/// The local bucket, and the one on S3 where a server runs.
pub fn targets(test: &str) -> Vec<Target> {
    targets_with(test, World::new())
}

/// The same, with the local bucket in a world of its own.
pub fn targets_with(test: &str, local: World) -> Vec<Target> {
    let bucket = format!("b=file://{}", local.bucket().display());
    let mut targets =
        vec![Target { name: "local", world: local, arguments: vec!["--bucket".into(), bucket] }];
    if let Some(endpoint) = s3::endpoint() {
        let bucket = format!("{test}-{}", std::process::id());
        let world = s3::world(&endpoint, &bucket);
        let arguments = vec!["--bucket".into(), format!("b=s3://{bucket}/pre fix")];
        targets.push(Target { name: "s3", world, arguments });
    }
    targets
}
