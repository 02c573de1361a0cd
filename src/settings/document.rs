//! The configuration file: the mount's options as TOML, and what each bucket's store needs to be told.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Deserialize;
use toml::Value;

use super::{CatalogSetting, MountSettings, OPTIONS, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::whole_file;

/// Largest configuration file that is read, in bytes.
const MAX_DOCUMENT: u64 = 1 << 20;

/// Keys of a bucket's table that are for us; all others are for the client of its store.
const BUCKET_KEYS: [&str; 3] = ["url", "storage_class", "region"];

/// Settings of a store's client that are no secrets.
const PLAIN_KEYS: [&str; 3] = ["region", "endpoint", "allow_http"];

#[derive(Deserialize)]
struct Document {
    /// Where the images are: a path relative to the file's directory, a URL, or a table with `url`.
    catalog: Value,
    #[serde(flatten)]
    options: BTreeMap<String, Value>,
}

impl MountSettings {
    /// Takes the options of a configuration file; returns the catalog that it names.
    ///
    /// # Errors
    /// [`PermissionDenied`](ErrorKind::PermissionDenied) when it tells a store's client what may be a secret, and others
    /// than its owner may read it.
    pub fn apply_file(&mut self, path: &Path) -> Result<CatalogSetting> {
        let place = path.display().to_string();
        let failed =
            |e: Error| Error::new(e.kind(), "cannot read the configuration").in_file(&place).because(e);
        let (file, meta) = whole_file::open(path).map_err(failed)?;
        let text = whole_file::read_opened(&file, MAX_DOCUMENT).and_then(whole_file::text).map_err(failed)?;
        let document: Document =
            toml::from_str(&text).map_err(|e| Error::from_toml(&e, &text).in_file(&place))?;
        for (word, value) in &document.options {
            self.apply_value(word, value).map_err(|e| e.in_file(&place))?;
        }
        let directory = path.parent().unwrap_or(Path::new(""));
        let catalog = catalog_setting(&document.catalog, directory).map_err(|e| e.in_file(&place))?;
        let clients = self.buckets.iter().map(|bucket| &bucket.client).chain(catalog.client());
        let mut told = clients.flat_map(BTreeMap::keys);
        if meta.mode() & 0o077 != 0 && told.any(|key| !PLAIN_KEYS.contains(&key.as_str())) {
            let what =
                "has settings of a store's client, which may be secrets, and others may read it: chmod 600";
            return Err(Error::new(ErrorKind::PermissionDenied, what).in_file(place));
        }
        Ok(catalog)
    }

    fn apply_value(&mut self, word: &str, value: &Value) -> Result<()> {
        let Some(option) = OPTIONS.iter().find(|option| option.word == word) else {
            return Err(Error::new(ErrorKind::Malformed, format!("unknown key {word:?}")));
        };
        match value {
            Value::Table(table) if option.is_repeated => {
                table.iter().try_for_each(|(name, value)| match (word, value) {
                    ("bucket", Value::Table(settings)) => self.apply_bucket(name, settings),
                    _ => self.apply(word, Some(&format!("{name}={}", scalar(word, value)?))),
                })
            }
            _ if option.is_repeated => {
                let what = format!("{word} is a table of buckets: [{word}] and then NAME = \"…\"");
                Err(Error::new(ErrorKind::Malformed, what))
            }
            Value::Boolean(false) if option.value.is_none() => Ok(()),
            Value::Boolean(true) if option.value.is_none() => self.apply(word, None),
            _ if option.value.is_none() => {
                Err(Error::new(ErrorKind::Malformed, format!("{word} is true or false")))
            }
            Value::Array(words) => {
                let words = words.iter().map(|value| scalar(word, value)).collect::<Result<Vec<_>>>()?;
                self.apply(word, Some(&words.join(":")))
            }
            value => self.apply(word, Some(&scalar(word, value)?)),
        }
    }

    /// `[bucket.NAME]` with its `url`, facts for the policy, and settings of the store's client.
    fn apply_bucket(&mut self, name: &str, settings: &toml::Table) -> Result<()> {
        let named = |e: Error| Error::new(e.kind(), format!("[bucket.{name}]: {e}"));
        let text = |key: &str| settings.get(key).map(|value| scalar(key, value).map_err(named)).transpose();
        let Some(url) = text("url")? else {
            return Err(Error::new(ErrorKind::Malformed, format!("[bucket.{name}] has no url")));
        };
        self.apply("bucket", Some(&format!("{name}={url}")))?;
        for word in ["storage_class", "region"] {
            if let Some(value) = text(word)? {
                self.apply(word, Some(&format!("{name}={value}")))?;
            }
        }
        let mut client = client_settings(settings, &BUCKET_KEYS).map_err(named)?;
        if let Some(region) = text("region")?.filter(|_| url.starts_with("s3:")) {
            client.insert("region".to_owned(), Secret::new(region));
        }
        if let Some(bucket) = self.buckets.last_mut() {
            bucket.client = client;
        }
        Ok(())
    }
}

/// The catalog: a path or a URL, or a table with its `url` and settings of the store's client.
fn catalog_setting(value: &Value, directory: &Path) -> Result<CatalogSetting> {
    let malformed = |what: &str| Error::new(ErrorKind::Malformed, format!("catalog: {what}"));
    let (text, settings) = match value {
        Value::String(text) => (Some(text.as_str()), None),
        Value::Table(table) => (table.get("url").and_then(Value::as_str), Some(table)),
        _ => (None, None),
    };
    let text = text.ok_or_else(|| malformed("give a path, a URL, or a table with url"))?;
    match (CatalogSetting::named(Path::new(text)), settings) {
        (CatalogSetting::Directory(path), None) => Ok(CatalogSetting::Directory(directory.join(path))),
        (CatalogSetting::Directory(_), Some(_)) => Err(malformed("only a bucket's URL has settings")),
        (bucket, None) => Ok(bucket),
        (CatalogSetting::Bucket { url, .. }, Some(settings)) => {
            Ok(CatalogSetting::Bucket { url, client: client_settings(settings, &["url"])? })
        }
    }
}

/// What a store's client is told: all keys of its table but `ours`.
fn client_settings(settings: &toml::Table, ours: &[&str]) -> Result<BTreeMap<String, Secret>> {
    let others = settings.iter().filter(|(key, _)| !ours.contains(&key.as_str()));
    others.map(|(key, value)| Ok((key.clone(), Secret::new(scalar(key, value)?)))).collect()
}

/// A value as `-o` would have it.
fn scalar(word: &str, value: &Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        _ => Err(Error::new(ErrorKind::Malformed, format!("{word}: a string or a number is needed here"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn parse(text: &str, mode: u32) -> Result<(MountSettings, CatalogSetting)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let mut settings = MountSettings::default();
        let catalog = match settings.apply_file(&path)? {
            CatalogSetting::Directory(path) => {
                let within = path.strip_prefix(directory.path()).map(Path::to_owned);
                CatalogSetting::Directory(within.unwrap_or(path))
            }
            bucket => bucket,
        };
        Ok((settings, catalog))
    }

    #[test]
    fn a_file_says_what_options_say() {
        let text = "catalog = 'images'\njobs = 7\nwait = true\nshared = false\numask = '022'\n\
                    formats = ['raw', 'qcow2']\nstage_limit = '1G'\n[bucket]\na = 'file:///a'\n\
                    [storage_class]\na = 'Standard'\n";
        let (settings, catalog) = parse(text, 0o644).unwrap();
        assert_eq!(catalog, CatalogSetting::named(Path::new("images")));
        let mut same = MountSettings::default();
        let options = "jobs=7,wait,umask=022,formats=raw:qcow2,stage_limit=1G,bucket=a=file:///a,storage_class=a=Standard";
        same.apply_options(options).unwrap();
        assert_eq!(settings, same);
    }

    #[test]
    fn what_is_shown_can_be_mounted_again() {
        let mut settings = MountSettings::default();
        let options = "bucket=a=file:///a,bucket=b=s3://b/c,formats=raw:zvhd2,policy=tencent-cvm,storage_class=a=S,\
                       region=b=r,jobs=9,on_limit=fail,rate=3M,timeout=7,retries=0,shared,lease=9,cache=64M,wait,\
                       read_to_end=cp:x,stage_limit=1G,state=/s,log_size=1M,user=u,sandbox=off,\
                       allow_other,uid=1,gid=2,umask=027,nonempty,plain_images,follow_links,sidecars,incremental=off";
        let given = options.replace("bucket=b=", "").matches('=').count();
        settings.apply_options(options).unwrap();
        assert!(given >= OPTIONS.len() - 4, "the test does not give every option");
        let shown = settings.shown("/c", Path::new("/m"), Path::new("/s"));
        let (again, catalog) = parse(&shown, 0o644).unwrap();
        assert_eq!((again, catalog), (settings, CatalogSetting::named(Path::new("/c"))));
    }

    #[test]
    fn stores_are_told_what_their_table_says_and_nobody_else_is() {
        let text = "catalog = '/c'\n[bucket.b]\nurl = 's3://b'\nregion = 'r'\nsecret_access_key = 'hidden'\n";
        let (settings, catalog) = parse(text, 0o600).unwrap();
        assert_eq!(catalog, CatalogSetting::named(Path::new("/c")));
        assert_eq!(settings.buckets[0].client["secret_access_key"].reveal(), "hidden");
        assert_eq!(settings.regions["b"], "r");
        assert_eq!(settings.buckets[0].client["region"].reveal(), "r");
        let plain = "catalog = '/c'\n[bucket.b]\nurl = 's3://b'\nregion = 'r'\nendpoint = 'http://h'\n";
        parse(plain, 0o644).unwrap();
        assert!(!format!("{settings:?}").contains("hidden"));
        let error = parse(text, 0o640).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_catalog_is_a_path_a_url_or_a_table() {
        let (_, catalog) = parse("catalog = 's3://images/web'", 0o644).unwrap();
        assert_eq!(catalog, CatalogSetting::named(Path::new("s3://images/web")));
        let text = "[catalog]\nurl = 's3://images'\nendpoint = 'http://h'\nsecret_access_key = 'hidden'\n";
        let (_, catalog) = parse(text, 0o600).unwrap();
        assert_eq!(catalog.client().unwrap()["secret_access_key"].reveal(), "hidden");
        assert!(!format!("{catalog:?}").contains("hidden"));
        assert_eq!(parse(text, 0o644).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }

    #[test]
    fn wrong_files_are_refused_with_place_and_reason() {
        for (text, named) in [
            ("jobs = 3", "catalog"),
            ("catalog = 3", "catalog"),
            ("[catalog]\nendpoint = 'e'", "url"),
            ("[catalog]\nurl = '/a'\nendpoint = 'e'", "catalog"),
            ("catalog = 'c'\njobs = 99", "jobs"),
            ("catalog = 'c'\ncolour = 'red'", "colour"),
            ("catalog = 'c'\nwait = 'yes'", "wait"),
            ("catalog = 'c'\nbucket = 'b=file:///x'", "[bucket]"),
            ("catalog = 'c'\n[bucket.b]\nstorage_class = 'x'", "url"),
            ("catalog = 'c'\n\njobs = =", "line 3"),
        ] {
            let error = parse(text, 0o600).unwrap_err();
            assert!(error.to_string().contains(named) && error.to_string().contains("a.toml"), "{error}");
        }
    }
}
