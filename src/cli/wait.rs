//! `freightfs wait`: blocks until exports have ended, by reading their status files.

use std::path::Path;
use std::time::{Duration, Instant};

use super::jobs::{read_status, saved};
use super::progress::{Board, Progress};
use super::silence::{self, Watch};
use super::terminal::say;
use super::{FAILED, OK, WaitArguments, complain};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{JobState, Status};
use crate::units::human_bytes;

/// How long to sleep between two looks at a status file.
const INTERVAL: Duration = Duration::from_millis(200);

/// How long a file may be there without a status: an empty one is published when the kernel has told the daemon of
/// its last close, which it does later.
const GRACE: Duration = Duration::from_secs(5);

pub(super) fn run(arguments: &WaitArguments) -> Result<u8> {
    let started = Instant::now();
    let deadline = arguments.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let board = Board::new(arguments.quiet);
    let waited = |file: &Path| (file.to_owned(), board.add(&name(file), 0), Watch::default());
    let mut waiting: Vec<_> = arguments.files.iter().map(|file| waited(file)).collect();
    let mut code = OK;
    while !waiting.is_empty() {
        waiting.retain_mut(|(file, progress, watch)| match look(file, progress, watch) {
            Ok(None) => true,
            Err(error)
                if error.kind() == ErrorKind::NotFound && file.exists() && started.elapsed() < GRACE =>
            {
                true
            }
            Ok(Some(status)) => {
                progress.finish();
                if !arguments.quiet || status.status != JobState::Success {
                    board.print(|| sentence(file, &status).into_iter().for_each(say));
                }
                if status.status != JobState::Success {
                    code = FAILED;
                }
                false
            }
            Err(error) => {
                progress.finish();
                board.print(|| complain(&error));
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
///
/// # Errors
/// [`TimedOut`](ErrorKind::TimedOut) when the host of the job is silent.
fn look(file: &Path, progress: &Progress, watch: &mut Watch) -> Result<Option<Status>> {
    let status = read_status(file)?;
    if let Some(since) = watch.look(&status) {
        let what = silence::sentence(&status, since);
        return Err(Error::new(ErrorKind::TimedOut, what).in_file(file.display().to_string()));
    }
    match status.size {
        Some(size) => progress.set(status.bytes_uploaded, size),
        None => progress.set_percent(status.progress, status.eta_seconds),
    }
    Ok(status.status.is_final().then_some(status))
}

/// How it ended, in lines.
fn sentence(file: &Path, status: &Status) -> Vec<String> {
    let file = file.display();
    match (status.status, &status.error) {
        (JobState::Success, _) => {
            let (size, sha256) = (status.size.unwrap_or(0), status.sha256.as_deref().unwrap_or("-"));
            [format!("{file}: SUCCESS, {} ({size} bytes)", human_bytes(size)), format!("  sha256 {sha256}")]
                .into_iter()
                .chain(saved(status).map(|saved| format!("  {saved}")))
                .collect()
        }
        (state, Some(error)) => {
            let cause = error.cause.as_ref().map(|c| format!(": {c}")).unwrap_or_default();
            let word = if state == JobState::Cancelled { "CANCELLED" } else { "FAIL" };
            vec![format!("{file}: {word} ({}), {}{cause}", error.code, error.details)]
        }
        (_, None) => vec![format!("{file}: FAIL")],
    }
}

fn name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
