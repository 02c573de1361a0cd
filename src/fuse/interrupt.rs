//! Programs that wait for a store, and are told to end.
//!
//! The kernel tells a filesystem by FUSE_INTERRUPT that the program which waits for a request has got a signal. fuser
//! 0.18 answers that with ENOSYS, after which the kernel says no more of it and lets programs wait for their answers
//! whatever comes, SIGKILL included (fs/fuse/dev.c, request_wait_answer). So whoever keeps a program waiting looks itself
//! whether that is to end: at the signals that are pending, and at how it ends if it is about to.

use std::time::Duration;

use fuser::{Errno, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite};

use super::reply::SharedDirectory;

/// How often it is looked.
const INTERVAL: Duration = Duration::from_millis(200);

/// The signals by which people and systems end programs. Others, which a program may use for itself, interrupt nothing:
/// few programs expect that of a file.
const ENDING: [i32; 5] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGKILL, libc::SIGTERM];

/// The flag of a process that is ending (PF_EXITING in linux/sched.h).
const EXITING: u64 = 0x4;

/// A reply that can be an error instead.
pub(super) trait Refuse {
    /// Sends the error.
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, SharedDirectory);

/// Waits until the task that made a request is to end: for ever where that is not known, as of another container's.
pub(super) async fn told_to_end(task: u32) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{task}/{name}")).unwrap_or_default();
        if is_signalled(&read("status")) || is_killed(&read("stat")) {
            return;
        }
    }
}

/// Whether a task has got a signal to end that it neither blocks nor ignores (proc_pid_status(5)).
fn is_signalled(status: &str) -> bool {
    let mask = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.and_then(|value| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(0)
    };
    let ending = ENDING.iter().fold(0, |mask, signal| mask | 1 << (signal - 1));
    (mask("SigPnd") | mask("ShdPnd")) & !mask("SigBlk") & !mask("SigIgn") & ending != 0
}

/// Whether a task closes its files because a signal has ended it (proc_pid_stat(5), fields 9 and 52).
fn is_killed(stat: &str) -> bool {
    // The name, in parentheses, may have any characters.
    let Some((_, fields)) = stat.rsplit_once(") ") else { return false };
    let field = |number: usize| fields.split(' ').nth(number - 3).and_then(|field| field.trim().parse().ok());
    let (flags, exit_code): (u64, u64) = (field(9).unwrap_or(0), field(52).unwrap_or(0));
    // The lower seven bits of the code are the signal's number (wait(2)).
    flags & EXITING != 0 && ENDING.iter().any(|&signal| u64::try_from(signal) == Ok(exit_code & 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_signals_that_end_a_program_and_reach_it_count() {
        let status = |pending: u64, shared: u64, blocked: u64, ignored: u64| {
            format!(
                "Name:\tcp\nSigQ:\t0/95\nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\n\
                 SigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t0\n"
            )
        };
        let (interrupt, kill, alarm) = (1 << 1, 1 << 8, 1 << 13);
        assert!(is_signalled(&status(interrupt, 0, 0, 0)) && is_signalled(&status(0, kill, 0, 0)));
        for (pending, blocked, ignored) in
            [(0, 0, 0), (alarm, 0, 0), (interrupt, interrupt, 0), (interrupt, 0, interrupt)]
        {
            assert!(!is_signalled(&status(0, pending, blocked, ignored)));
        }
        assert!(!is_signalled(""));
    }

    #[test]
    fn programs_that_end_by_themselves_wait_for_their_files() {
        let stat = |flags: u64, exit_code: u64| {
            let zeros = |count: usize| "0 ".repeat(count);
            format!("7 (a) b) D {}{flags} {}{exit_code}\n", zeros(5), zeros(42))
        };
        assert!(is_killed(&stat(0x404, 9)) && is_killed(&stat(0x4, 0x80 | 15)));
        assert!(
            !is_killed(&stat(0x404, 0)) && !is_killed(&stat(0x400, 9)) && !is_killed(&stat(0x404, 1 << 8))
        );
        assert!(!is_killed(""));
    }
}
