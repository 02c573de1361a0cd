//! The S3 server that scripts/test starts.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use object_store::ObjectStoreExt;
use object_store::aws::{AmazonS3, AmazonS3Builder};

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

/// What a bucket takes on the server's disk, freed at once at the end of its test.
pub struct Space(String);

impl Drop for Space {
    fn drop(&mut self) {
        let Ok(master) = std::env::var("FREIGHTFS_TEST_S3_MASTER") else { return };
        // SeaweedFS keeps the objects of a bucket in volumes of its own.
        let delete = format!("GET /col/delete?collection={} HTTP/1.0\r\nhost: {master}\r\n\r\n", self.0);
        let freed = TcpStream::connect(&master).and_then(|mut stream| {
            stream.write_all(delete.as_bytes())?;
            stream.read_to_end(&mut Vec::new())
        });
        if let Err(error) = freed {
            println!("the space of the bucket {} is not freed: {error}", self.0);
        }
    }
}

/// A world for mounts with a new S3 bucket of that name.
pub fn world(endpoint: &str, bucket: &str) -> World {
    succeed(&mut aws(endpoint, &["s3api", "create-bucket", "--bucket", bucket]));
    let mut world = World::new();
    world.space = Some(Space(bucket.to_owned()));
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

/// A client of a library, for tests that ask for much: the AWS program takes most of a second to start.
pub fn client(endpoint: &str, bucket: &str) -> AmazonS3 {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = AmazonS3Builder::from_env().with_endpoint(endpoint).with_allow_http(true);
    builder.with_bucket_name(bucket).build().unwrap()
}

/// An object's bytes.
pub fn get(endpoint: &str, bucket: &str, key: &str) -> Vec<u8> {
    find(endpoint, bucket, key).unwrap()
}

/// An object's bytes, if it is there.
pub fn find(endpoint: &str, bucket: &str, key: &str) -> Option<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let path = object_store::path::Path::from(key);
        let got = client(endpoint, bucket).get(&path).await.ok()?;
        Some(got.bytes().await.ok()?.to_vec())
    })
}
