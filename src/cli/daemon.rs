//! The process that serves a mount: its start, its terminal, its log, its limits.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::User;
use tracing::{error, warn};

use super::log::Log;
use super::terminal::{plain, say_error};
use super::{FAILED, MountArguments, OK};
use crate::error::{Error, ErrorKind, Result};

/// The daemon's last word on its standard output once the mount answers, after notes; anything else is the reason why it
/// does not.
const READY: &str = "ready\n";

/// Starts this program again as a daemon, which may become another user, and returns when its mount answers or with its reason.
pub(super) fn start(arguments: &MountArguments, user: Option<&User>) -> Result<u8> {
    let failed = |e| Error::from_io("cannot start the daemon", e);
    let program = std::env::current_exe().map_err(failed)?;
    let flags = arguments.flags.words();
    let options = arguments.options.iter().flat_map(|options| ["-o", options]);
    let mut command = Command::new(program);
    // Where stores' clients look for credentials.
    command.envs(user.map(|user| ("HOME", &user.dir)));
    let mut child = command
        .arg("mount")
        .args(flags)
        .args(options)
        .arg("--report-ready")
        .arg("--")
        .args([&arguments.catalog, &arguments.mountpoint])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut said).map_err(failed)?;
    }
    if let Some(notes) = said.strip_suffix(READY) {
        notes.lines().for_each(say_error);
        return Ok(OK);
    }
    let status = child.wait().map_err(failed)?;
    if said.is_empty() {
        return Err(Error::new(ErrorKind::Internal, format!("the daemon ended without a reason: {status}")));
    }
    said.lines().for_each(say_error);
    Ok(FAILED)
}

/// Tells the waiting parent the notes of a mount that answers, and lets go of its terminal; or tells it the failure, and
/// ends the process.
pub(super) fn report(mounted: std::result::Result<&[String], &Error>) -> Result<()> {
    let line = match mounted {
        Ok(notes) => {
            notes.iter().map(|note| format!("freightfs: {}\n", plain(note))).collect::<String>() + READY
        }
        Err(error) => format!("freightfs: {}\n", plain(error.report())),
    };
    let failed = |e: std::io::Error| Error::from_io("cannot detach", e);
    let mut stdout = std::io::stdout();
    stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()).map_err(failed)?;
    if mounted.is_err() {
        std::process::exit(FAILED.into());
    }
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    nix::unistd::dup2_stderr(&null).map_err(|e| failed(e.into()))
}

/// Sets up the log and the limits of the process that serves: with `detached` in a session of its own, so that signals of
/// the terminal do not reach it, and with its log in the state directory.
pub(super) fn begin(detached: bool, state: &Path, log_size: u64) -> Result<Log> {
    let log = if detached {
        nix::unistd::setsid().map_err(|e| Error::from_io("cannot detach", e.into()))?;
        let log = Log::to_file(state, log_size)?;
        // Its standard error leads nowhere.
        std::panic::set_hook(Box::new(|panic| error!("a broken invariant: {panic}")));
        log
    } else {
        Log::to_terminal()
    };
    raise_descriptor_limit();
    Ok(log)
}

/// Allows as many open files as the hard limit does. The soft limit is 1024 nearly everywhere, for the sake of programs
/// that use select(2); each open file, staged file and connection takes a descriptor.
pub(super) fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!("the limit on open files cannot be raised: {error}");
    }
}
