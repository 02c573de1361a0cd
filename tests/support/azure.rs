//! The server of Azure Blob Storage that scripts/test starts.

use super::{command, skip, succeed};

/// The account that Azurite has, and its key, which everybody knows (Azurite's README, "Default Storage Account").
pub const ACCOUNT: &str = "devstoreaccount1";
pub const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// The account's URL.
pub fn endpoint() -> Option<String> {
    let server = std::env::var("FREIGHTFS_TEST_AZURE").ok();
    if server.is_none() {
        skip("tests against Azure: FREIGHTFS_TEST_AZURE is not set; scripts/test starts a server");
    }
    Some(format!("{}/{ACCOUNT}", server?))
}

/// Runs a line of Python that has `service`, Microsoft's client.
pub fn python(endpoint: &str, line: &str) -> String {
    let service = format!("BlobServiceClient('{endpoint}', '{KEY}')");
    let program = format!("from azure.storage.blob import BlobServiceClient\nservice = {service}\n{line}\n");
    succeed(command("python3").args(["-c", &program]))
}

/// Makes a container.
pub fn make_container(endpoint: &str, name: &str) {
    python(endpoint, &format!("service.create_container({name:?})"));
}
