//! The daemon's log: safe for terminals, bounded while it grows, and without the same line again and again.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use crate::error::{Error, Result, redacted, shown};

/// Longest line, in bytes, and longest value in one.
const MAX_LINE: usize = 16 << 10;
const MAX_VALUE: usize = 4 << 10;

/// How long repetitions of a line are counted before they are told.
pub(super) const REPEATS_TOLD: Duration = Duration::from_secs(60);

/// The log of this process. Cheap to clone.
#[derive(Clone)]
pub(super) struct Log(Arc<Mutex<Lines>>);

impl Log {
    /// The terminal's log, or the journal's, which has times and colours of its own.
    pub(super) fn to_terminal() -> Self {
        let in_journal = std::env::var_os("JOURNAL_STREAM").is_some();
        let log = Self::new(Target::Terminal, !in_journal);
        let ansi = !in_journal && io::stderr().is_terminal();
        if in_journal {
            log.install_without_time()
        } else {
            log.install(ansi)
        }
        log
    }

    /// `log` in the state directory. Once it has `limit` bytes it is put aside as `log.1`, in place of what was there.
    pub(super) fn to_file(state: &Path, limit: u64) -> Result<Self> {
        let file = LogFile::open(state.join("log"), limit);
        let failed =
            |e| Error::from_io("cannot open the log", e).in_file(state.join("log").display().to_string());
        let log = Self::new(Target::File(file.map_err(failed)?), true);
        log.install(false);
        Ok(log)
    }

    fn new(target: Target, has_time: bool) -> Self {
        let lines = Lines { target, has_time, last: String::new(), repeats: 0, since: Instant::now() };
        Self(Arc::new(Mutex::new(lines)))
    }

    fn install(&self, ansi: bool) {
        let fields = debug_fn(value).delimited(" ");
        let log =
            tracing_subscriber::fmt().with_env_filter(filter()).fmt_fields(fields).with_writer(self.clone());
        let _ = log.with_ansi(ansi).try_init();
    }

    fn install_without_time(&self) {
        let fields = debug_fn(value).delimited(" ");
        let log =
            tracing_subscriber::fmt().with_env_filter(filter()).fmt_fields(fields).with_writer(self.clone());
        let _ = log.with_ansi(false).without_time().try_init();
    }

    /// Tells how often the last line was repeated, if it has been for long enough.
    pub(super) fn tell_repeats(&self) {
        let mut lines = self.0.lock();
        if lines.since.elapsed() >= REPEATS_TOLD {
            lines.tell_repeats();
        }
    }
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_env("FREIGHTFS_LOG").unwrap_or_else(|_| "warn,freightfs=info".into())
}

/// A value of an event: names and messages in it come from outside.
fn value(writer: &mut Writer<'_>, field: &tracing::field::Field, value: &dyn fmt::Debug) -> fmt::Result {
    // Where a library's line stands in its source.
    if field.name().starts_with("log.") {
        return Ok(());
    }
    if field.name() != "message" {
        write!(writer, "{}=", field.name())?;
    }
    writer.write_str(&shown(&redacted(&format!("{value:?}")), MAX_VALUE))
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter(self)
    }
}

/// Takes one line with each write, as tracing-subscriber writes them.
pub(super) struct LineWriter<'a>(&'a Log);

impl Write for LineWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().take(String::from_utf8_lossy(bytes).trim_end());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What was logged last, and where it goes.
struct Lines {
    target: Target,
    /// Whether each line begins with its time, which makes no difference.
    has_time: bool,
    /// The last line, or its latest repetition.
    last: String,
    /// Repetitions of it that have not been told.
    repeats: u64,
    /// When the first of them came.
    since: Instant,
}

enum Target {
    Terminal,
    File(LogFile),
}

impl Lines {
    fn take(&mut self, line: &str) {
        let line = &line[..line.floor_char_boundary(MAX_LINE)];
        if self.timed(line).1 != self.timed(&self.last).1 {
            self.tell_repeats();
            self.target.write(line);
        } else {
            if self.repeats == 0 {
                self.since = Instant::now();
            }
            self.repeats += 1;
        }
        line.clone_into(&mut self.last);
        if self.repeats > 0 && self.since.elapsed() >= REPEATS_TOLD {
            self.tell_repeats();
        }
    }

    fn tell_repeats(&mut self) {
        if self.repeats > 0 {
            let (time, _) = self.timed(&self.last);
            let mut line = time.to_owned();
            let _ = write!(line, " INFO freightfs: last message repeated {} times", self.repeats);
            self.target.write(line.trim_start());
            self.repeats = 0;
        }
    }

    /// A line's time, and the line without it.
    fn timed<'a>(&self, line: &'a str) -> (&'a str, &'a str) {
        if self.has_time { line.split_once(' ').unwrap_or(("", line)) } else { ("", line) }
    }
}

impl Target {
    /// What cannot be written is given up. A terminal or a pipe that takes nothing holds up who logs, as everywhere.
    fn write(&mut self, line: &str) {
        let _ = match self {
            Self::Terminal => writeln!(io::stderr(), "{line}"),
            Self::File(file) => file.write(line),
        };
    }
}

struct LogFile {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl LogFile {
    fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(&path)?;
        let length = file.metadata()?.len();
        Ok(Self { path, file, length, limit })
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        let line = format!("{line}\n");
        if self.length + line.len() as u64 > self.limit && self.length > 0 {
            if self.is_there()? { self.put_aside()? } else { self.reopen()? }
        }
        self.file.write_all(line.as_bytes())?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// Whether the name still leads to the file that is written: logrotate(8) may have put it aside, or cut it.
    fn is_there(&mut self) -> io::Result<bool> {
        let written = self.file.metadata()?;
        self.length = written.len();
        let named = std::fs::symlink_metadata(&self.path);
        Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (written.dev(), written.ino())))
    }

    fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(std::mem::take(&mut self.path), self.limit)?;
        Ok(())
    }

    /// What cannot be put aside is given up: the log is bounded whatever happens.
    fn put_aside(&mut self) -> io::Result<()> {
        let renamed = std::fs::rename(&self.path, self.path.with_extension("1"));
        let opened = renamed.and_then(|()| File::options().create(true).append(true).open(&self.path));
        match opened {
            Ok(file) => self.file = file,
            Err(_) => self.file.set_len(0)?,
        }
        self.length = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(directory: &Path, limit: u64) -> Lines {
        let file = LogFile::open(directory.join("log"), limit).unwrap();
        Lines {
            target: Target::File(file),
            has_time: true,
            last: String::new(),
            repeats: 0,
            since: Instant::now(),
        }
    }

    fn text(directory: &Path, name: &str) -> String {
        std::fs::read_to_string(directory.join(name)).unwrap_or_default()
    }

    #[test]
    fn a_line_that_is_repeated_is_counted_until_another_comes_or_a_minute_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = lines(directory.path(), 1 << 20);
        log.take("00:00  INFO first");
        (1..=512).for_each(|second| log.take(&format!("{second:05}  WARN the same")));
        log.take("00:09  INFO other");
        let expected = "00:00  INFO first\n00001  WARN the same\n00512 INFO freightfs: last message repeated 511 times\n\
                        00:09  INFO other\n";
        assert_eq!(text(directory.path(), "log"), expected);
        log.take("00:10  INFO other");
        log.since = Instant::now().checked_sub(REPEATS_TOLD).unwrap();
        log.take("01:11  INFO other");
        let expected = format!("{expected}01:11 INFO freightfs: last message repeated 2 times\n");
        assert_eq!(text(directory.path(), "log"), expected);
        log.take("01:12  INFO last");
        assert_eq!(text(directory.path(), "log"), format!("{expected}01:12  INFO last\n"));
    }

    #[test]
    fn the_log_and_the_one_put_aside_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("log"), "x".repeat(5000)).unwrap();
        let mut log = lines(directory.path(), 1000);
        log.take(&format!("0 {}", "y".repeat(MAX_LINE * 2)));
        assert_eq!(text(directory.path(), "log.1").len(), 5000);
        assert_eq!(text(directory.path(), "log").len(), MAX_LINE + 1);
        for number in 0..500 {
            log.take(&format!("{number:04} INFO {number}"));
            assert!(text(directory.path(), "log").len() <= 1000 || number == 0);
        }
        assert!(text(directory.path(), "log").ends_with("0499 INFO 499\n"));
        assert!((900..=1000).contains(&text(directory.path(), "log.1").len()));
        // What somebody else puts aside stays where it is put.
        std::fs::rename(directory.path().join("log"), directory.path().join("log.1")).unwrap();
        (0..60).for_each(|number| log.take(&format!("{number:04} INFO {number}")));
        assert!(text(directory.path(), "log.1").contains("0499 INFO 499\n"));
        assert!(text(directory.path(), "log").ends_with("0059 INFO 59\n"));
        // Where nothing can be put aside, a directory stands at its place for instance.
        std::fs::remove_file(directory.path().join("log.1")).unwrap();
        std::fs::create_dir_all(directory.path().join("log.1/x")).unwrap();
        (0..500).for_each(|number| log.take(&format!("{number:04} INFO {number}")));
        assert!(text(directory.path(), "log").len() <= 1000);
        assert!(text(directory.path(), "log").ends_with("0499 INFO 499\n"));
    }
}
