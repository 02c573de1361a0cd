//! A mount of the program under test, that ends with its test whatever happens.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{command, freightfs, run, succeed, text};

/// Where a test's catalog, bucket, state and mount are.
pub struct World {
    directory: tempfile::TempDir,
    /// What is mounted instead of the directory `catalog`.
    pub source: Option<String>,
    /// The S3 bucket's.
    pub space: Option<super::s3::Space>,
    /// Variables for the daemon.
    pub environment: Vec<(String, String)>,
}

impl World {
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// A world in memory where there is such a filesystem, for tests of what is written and not of whether it lasts.
    pub fn in_memory() -> Self {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { Self::below(memory) } else { Self::new() }
    }

    fn below(place: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("freightfs-test-").tempdir_in(place).unwrap();
        for name in ["catalog", "bucket", "state", "mnt", "out"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self { directory, source: None, space: None, environment: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn catalog(&self) -> PathBuf {
        self.path("catalog")
    }

    pub fn bucket(&self) -> PathBuf {
        self.path("bucket")
    }

    pub fn out(&self, name: &str) -> PathBuf {
        self.path("out").join(name)
    }

    /// Mounts with the local bucket `b` and more arguments.
    pub fn mount(&self, arguments: &[&str]) -> Mount {
        let bucket = format!("b=file://{}", self.bucket().display());
        self.mount_exactly(&[&["--bucket", &bucket], arguments].concat())
    }

    /// Mounts with these arguments only.
    pub fn mount_exactly(&self, arguments: &[&str]) -> Mount {
        let output = run(&mut self.mount_command(arguments));
        let mount = self.at();
        assert!(output.status.success(), "mount failed: {}", text(&output));
        mount
    }

    /// What is mounted here.
    pub fn at(&self) -> Mount {
        Mount { path: self.path("mnt"), state: self.path("state") }
    }

    /// Whether no daemon has this state directory any more.
    pub fn is_dead(&self) -> bool {
        let pid = std::fs::read_to_string(self.path("state/lock")).unwrap_or_default();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        matches!(stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()), None | Some('Z' | 'X'))
    }

    /// The command that mounts.
    pub fn mount_command(&self, arguments: &[&str]) -> Command {
        let mut command = freightfs();
        let source = self.source.as_ref().map_or_else(|| self.catalog(), PathBuf::from);
        command.arg("mount").arg(source).arg(self.path("mnt"));
        command.arg("--state").arg(self.path("state")).args(arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// A mounted filesystem.
pub struct Mount {
    path: PathBuf,
    state: PathBuf,
}

impl Mount {
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A key of the bucket `b`.
    pub fn key(&self, key: &str) -> PathBuf {
        self.path.join("buckets/b").join(key)
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        std::fs::read_to_string(self.state.join("lock")).unwrap().trim().parse().unwrap()
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.state.join("log")).unwrap_or_default()
    }

    /// The sum of a metric's rows whose line begins like this.
    pub fn metric(&self, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.path(".freightfs/metrics")).unwrap();
        let rows = text.lines().filter(|line| line.starts_with(name));
        rows.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Resident memory of the daemon in bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most resident memory that the daemon had, in bytes.
    pub fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Waits for the export of a key; returns its status.
    pub fn wait(&self, key: &str) -> serde_json::Value {
        run(freightfs().args(["wait", "--quiet", "--timeout", "100"]).arg(self.key(key)));
        self.status(key)
    }

    /// The status of a key: that of its status file, or what the mount knows of a file without one.
    pub fn status(&self, key: &str) -> serde_json::Value {
        if let Ok(text) = std::fs::read(self.key(&format!("{key}.status"))) {
            return serde_json::from_slice(&text).unwrap();
        }
        let output = run(freightfs().args(["status", "--json"]).arg(self.key(key)));
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        found.get(0).cloned().unwrap_or_else(|| panic!("{key} has no status: {}", text(&output)))
    }

    /// Copies a file of the mount or from outside to a key.
    pub fn cp(&self, from: &Path, key: &str) {
        succeed(command("cp").arg(from).arg(self.key(key)));
    }

    /// Unmounts and waits until the daemon has ended.
    pub fn unmount(self) {
        let pid = self.pid();
        succeed(command("fusermount3").arg("-u").arg(&self.path));
        wait_for_end(pid);
    }

    /// Sends the daemon a signal and waits until it has ended.
    pub fn signal(self, name: &str) {
        let pid = self.pid();
        succeed(command("kill").args([&format!("-{name}"), &pid.to_string()]));
        wait_for_end(pid);
    }
}

/// Waits for a process that is not our child. One that its new parent has not reaped yet has ended too.
fn wait_for_end(pid: u32) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(100);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "the daemon does not end");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mounted = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        if mounted.contains(&format!(" {} ", self.path.display())) {
            if std::thread::panicking() {
                println!("log of the daemon:\n{}", self.log());
            }
            let unmounted = run(command("fusermount3").args(["-u", "-q"]).arg(&self.path)).status.success();
            if !unmounted {
                run(command("fusermount3").args(["-u", "-q", "-z"]).arg(&self.path));
            }
        }
        // The daemon may be finishing jobs, or not have been mounted at all.
        if let Ok(pid) = std::fs::read_to_string(self.state.join("lock")) {
            let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.trim())).unwrap_or_default();
            if name.trim() == "freightfs" {
                run(command("kill").arg(pid.trim()));
            }
        }
    }
}
