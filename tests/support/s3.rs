//! The S3 server that scripts/test starts.

use std::process::Command;

use super::mount::World;
use super::{command, skip, succeed};

/// The server's URL.
pub fn endpoint() -> Option<String> {
    let endpoint = std::env::var("FREIGHTFS_TEST_S3").ok();
    if endpoint.is_none() {
        skip("tests against S3: FREIGHTFS_TEST_S3 is not set; scripts/test starts a server");
    }
    endpoint
}

/// The client of AWS.
pub fn aws(endpoint: &str, arguments: &[&str]) -> Command {
    let mut aws = command("aws");
    aws.args(["--endpoint-url", endpoint]).args(arguments);
    aws
}

/// A world for mounts with a new S3 bucket of that name.
pub fn world(endpoint: &str, bucket: &str) -> World {
    succeed(&mut aws(endpoint, &["s3api", "create-bucket", "--bucket", bucket]));
    let mut world = World::new();
    for (name, value) in [("AWS_ENDPOINT_URL", endpoint), ("AWS_ALLOW_HTTP", "true")] {
        world.environment.push((name.to_owned(), value.to_owned()));
    }
    world
}

/// The unfinished uploads of a bucket, `None` in words when there are none.
pub fn uploads(endpoint: &str, bucket: &str) -> String {
    let list =
        ["s3api", "list-multipart-uploads", "--bucket", bucket, "--query", "Uploads", "--output", "text"];
    succeed(&mut aws(endpoint, &list))
}
