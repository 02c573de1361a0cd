//! Counters of the mount, as Prometheus text. Every metric's name, type, unit and meaning stands in this file.
//!
//! Names are stable: a metric is not renamed, and its meaning does not change, within a major version.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// The filesystem operations that are counted, by the label `op` of `freightfs_fuse_requests_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the FUSE operation of its name")]
pub enum Op {
    Lookup,
    Getattr,
    Setattr,
    Readdir,
    Open,
    Create,
    Read,
    Write,
    CopyFileRange,
    Flush,
    Fsync,
    Release,
    Unlink,
    Rename,
    Mkdir,
    Rmdir,
    Xattr,
    Lseek,
    Statfs,
}

impl Op {
    const ALL: [Self; 19] = [
        Self::Lookup,
        Self::Getattr,
        Self::Setattr,
        Self::Readdir,
        Self::Open,
        Self::Create,
        Self::Read,
        Self::Write,
        Self::CopyFileRange,
        Self::Flush,
        Self::Fsync,
        Self::Release,
        Self::Unlink,
        Self::Rename,
        Self::Mkdir,
        Self::Rmdir,
        Self::Xattr,
        Self::Lseek,
        Self::Statfs,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Getattr => "getattr",
            Self::Setattr => "setattr",
            Self::Readdir => "readdir",
            Self::Open => "open",
            Self::Create => "create",
            Self::Read => "read",
            Self::Write => "write",
            Self::CopyFileRange => "copy_file_range",
            Self::Flush => "flush",
            Self::Fsync => "fsync",
            Self::Release => "release",
            Self::Unlink => "unlink",
            Self::Rename => "rename",
            Self::Mkdir => "mkdir",
            Self::Rmdir => "rmdir",
            Self::Xattr => "xattr",
            Self::Lseek => "lseek",
            Self::Statfs => "statfs",
        }
    }
}

/// A number that only grows, counted without locks.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of a mount.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: [Counter; Op::ALL.len()],
    /// Bytes given to readers.
    pub read_bytes: Counter,
    /// Bytes taken from writers.
    pub written_bytes: Counter,
    /// Bytes recorded by copy_file_range, which were not moved.
    pub copied_bytes: Counter,
    /// Bytes of finished parts and objects that were sent.
    pub uploaded_bytes: Counter,
    /// Bytes of finished parts that stores have copied from objects that are replaced.
    pub reused_bytes: Counter,
    /// Bytes of finished parts that stores have copied from zeros.
    pub zero_bytes: Counter,
    /// Jobs accepted.
    pub jobs_submitted: Counter,
    /// Jobs that ended in SUCCESS.
    pub jobs_succeeded: Counter,
    /// Jobs that ended in FAIL.
    pub jobs_failed: Counter,
    /// Jobs that ended in CANCELLED.
    pub jobs_cancelled: Counter,
}

impl Metrics {
    /// Counts one request.
    pub fn count(&self, op: Op) {
        self.requests[op as usize].add(1);
    }

    /// How often `op` was requested.
    pub fn requests(&self, op: Op) -> u64 {
        self.requests[op as usize].get()
    }

    /// All metrics in the text format of Prometheus, version 0.0.4.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, help: &str, rows: &[(String, u64)]| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
            for (labels, value) in rows {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let requests: Vec<_> =
            Op::ALL.iter().map(|&op| (format!("{{op=\"{}\"}}", op.label()), self.requests(op))).collect();
        metric(
            "freightfs_fuse_requests_total",
            "Requests of the kernel, by operation; reads of our own documents are left out.",
            &requests,
        );
        let one = |counter: &Counter| vec![(String::new(), counter.get())];
        metric("freightfs_read_bytes_total", "Bytes given to readers.", &one(&self.read_bytes));
        metric("freightfs_written_bytes_total", "Bytes taken from writers.", &one(&self.written_bytes));
        metric(
            "freightfs_copied_bytes_total",
            "Bytes that copy_file_range recorded without moving them.",
            &one(&self.copied_bytes),
        );
        metric(
            "freightfs_uploaded_bytes_total",
            "Bytes of finished parts and objects that were sent.",
            &one(&self.uploaded_bytes),
        );
        metric(
            "freightfs_reused_bytes_total",
            "Bytes of finished parts that stores have copied from the objects that are replaced.",
            &one(&self.reused_bytes),
        );
        metric(
            "freightfs_zero_bytes_total",
            "Zeros of finished parts that stores have copied.",
            &one(&self.zero_bytes),
        );
        metric("freightfs_jobs_submitted_total", "Export jobs accepted.", &one(&self.jobs_submitted));
        let ended = [
            ("SUCCESS", &self.jobs_succeeded),
            ("FAIL", &self.jobs_failed),
            ("CANCELLED", &self.jobs_cancelled),
        ];
        let ended = ended.map(|(state, counter)| (format!("{{status=\"{state}\"}}"), counter.get()));
        metric("freightfs_jobs_ended_total", "Export jobs that ended, by status.", &ended);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_show_in_the_text() {
        let metrics = Metrics::default();
        metrics.count(Op::Read);
        metrics.count(Op::Read);
        metrics.jobs_failed.add(3);
        let text = metrics.render();
        assert!(text.contains("freightfs_fuse_requests_total{op=\"read\"} 2\n"));
        assert!(text.contains("freightfs_jobs_ended_total{status=\"FAIL\"} 3\n"));
        for (index, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, index);
        }
    }
}
