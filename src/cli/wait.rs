//! `freightfs wait`: blocks until exports have ended, by reading their status files.

use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::jobs::read_status;
use super::{FAILED, OK, WaitArguments, complain};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobState, Status};

/// How long to sleep between two looks at a status file.
const INTERVAL: Duration = Duration::from_millis(200);

/// How long a file may be there without a status: an empty one is published when the kernel has told the daemon of
/// its last close, which it does later.
const GRACE: Duration = Duration::from_secs(5);

pub(super) fn run(arguments: &WaitArguments) -> Result<u8> {
    let started = Instant::now();
    let deadline = arguments.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let bars = MultiProgress::new();
    let mut waiting: Vec<_> = arguments
        .files
        .iter()
        .map(|file| (file.as_path(), bars.add(progress_bar(file, arguments.quiet))))
        .collect();
    let mut code = OK;
    while !waiting.is_empty() {
        waiting.retain(|(file, bar)| match look(file, bar) {
            Ok(None) => true,
            Err(error)
                if error.kind() == ErrorKind::NotFound && file.exists() && started.elapsed() < GRACE =>
            {
                true
            }
            Ok(Some(status)) => {
                bar.finish_and_clear();
                if !arguments.quiet || status.status != JobState::Success {
                    bars.suspend(|| println!("{}", sentence(file, &status)));
                }
                if status.status != JobState::Success {
                    code = FAILED;
                }
                false
            }
            Err(error) => {
                bar.finish_and_clear();
                bars.suspend(|| complain(&error));
                code = FAILED;
                false
            }
        });
        if !waiting.is_empty() {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let what = format!("{} of the exports have not ended; they go on", waiting.len());
                return Err(Error::new(ErrorKind::TimedOut, what));
            }
            std::thread::sleep(INTERVAL);
        }
    }
    Ok(code)
}

/// The status when it is final.
fn look(file: &Path, bar: &ProgressBar) -> Result<Option<Status>> {
    let status = read_status(file)?;
    bar.set_length(status.size.unwrap_or(0));
    bar.set_position(status.bytes_uploaded);
    Ok(status.status.is_final().then_some(status))
}

fn sentence(file: &Path, status: &Status) -> String {
    let file = file.display();
    match (status.status, &status.error) {
        (JobState::Success, _) => {
            format!(
                "{file}: SUCCESS, {} bytes, sha256 {}",
                status.size.unwrap_or(0),
                status.sha256.as_deref().unwrap_or("-")
            )
        }
        (state, Some(error)) => {
            let cause = error.cause.as_ref().map(|c| format!(": {c}")).unwrap_or_default();
            let word = if state == JobState::Cancelled { "CANCELLED" } else { "FAIL" };
            format!("{file}: {word} ({}), {}{cause}", error.code, error.details)
        }
        (_, None) => format!("{file}: FAIL"),
    }
}

fn progress_bar(file: &Path, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = "{msg:24!} {bar:20} {percent:>3}%  {binary_bytes_per_sec}  {eta} left";
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    ProgressBar::new(0)
        .with_style(ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()))
        .with_message(name)
}
