//! The shared AWS files: credentials, region and endpoint where the environment does not give them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::settings::home_directory;
use crate::whole_file;

/// Largest of these files that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Values for the S3 client that the files of a profile give, by the names of the AWS_* variables.
///
/// Files and profile are chosen as the AWS tools do (AWS SDKs and Tools Reference Guide, "Shared config and
/// credentials files"): AWS_PROFILE or `default`; AWS_SHARED_CREDENTIALS_FILE or ~/.aws/credentials;
/// AWS_CONFIG_FILE or ~/.aws/config, where the section is `profile NAME`. The credentials file wins.
pub(super) fn from_files() -> HashMap<&'static str, String> {
    let profile = std::env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned());
    let file = |variable: &str, name: &str| {
        let default = || home_directory().map(|home| home.join(".aws").join(name));
        std::env::var_os(variable).map(PathBuf::from).or_else(default)
    };
    let mut values = HashMap::new();
    if let Some(path) = file("AWS_CONFIG_FILE", "config") {
        let section = if profile == "default" { profile.clone() } else { format!("profile {profile}") };
        read_section(&path, &section, &mut values);
    }
    if let Some(path) = file("AWS_SHARED_CREDENTIALS_FILE", "credentials") {
        read_section(&path, &profile, &mut values);
    }
    values
}

/// Names in the files, and the variables that mean the same.
const NAMES: [(&str, &str); 5] = [
    ("aws_access_key_id", "AWS_ACCESS_KEY_ID"),
    ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
    ("aws_session_token", "AWS_SESSION_TOKEN"),
    ("region", "AWS_REGION"),
    ("endpoint_url", "AWS_ENDPOINT_URL"),
];

fn read_section(path: &Path, section: &str, values: &mut HashMap<&'static str, String>) {
    let Ok(text) = whole_file::read_text(path, MAX_FILE) else { return };
    let mut inside = false;
    for line in text.lines() {
        // Indented lines belong to nested settings, which are not ours.
        let trimmed = line.trim();
        if trimmed.starts_with('#') || trimmed.starts_with(';') || line.starts_with([' ', '\t']) {
            continue;
        }
        if let Some(name) = trimmed.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
            inside = name.trim() == section;
        } else if let (true, Some((name, value))) = (inside, trimmed.split_once('=')) {
            let known = NAMES.iter().find(|(in_file, _)| *in_file == name.trim());
            if let Some((_, variable)) = known {
                values.insert(variable, value.trim().to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_section_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "[default]\naws_access_key_id = A\n# x = y\n[profile p]\nregion=r1\n  nested = z\nendpoint_url = http://h:1\n";
        std::fs::write(file.path(), text).unwrap();
        let mut values = HashMap::new();
        read_section(file.path(), "profile p", &mut values);
        assert_eq!(values["AWS_REGION"], "r1");
        assert_eq!(values["AWS_ENDPOINT_URL"], "http://h:1");
        assert_eq!(values.len(), 2);
        read_section(file.path(), "default", &mut values);
        assert_eq!(values["AWS_ACCESS_KEY_ID"], "A");
    }
}
