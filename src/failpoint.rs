//! Failpoints: the durable steps of a mount, each of which a test can make the last one.
//!
//! Every step after which a crash finds something else than before it calls [`pass`] just before it acts. In builds with
//! debug assertions `FREIGHTFS_FAILPOINT=STEP:N:ACTION` makes the Nth pass of a step (counted from 1) die by SIGKILL
//! (`kill`), fail with an I/O error (`error`), or fail for want of space, then and at every later pass (`full`);
//! `FREIGHTFS_FAILPOINT_LOG` names a file to which each pass appends the step's name and a newline. In other builds a
//! pass is nothing.

#[cfg(not(debug_assertions))]
use crate::error::Result;

/// Declares the steps with their names, and the list of all of them.
macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident = $name:literal,)*) => {
        /// A durable step: what a crash just before it has not done, and one just after it has.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Step {
            $($(#[$doc])* $step,)*
        }

        impl Step {
            /// Every step.
            pub const ALL: &[Self] = &[$(Self::$step,)*];

            /// The step's name in the environment variable and in the log.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$step => $name,)*
                }
            }
        }
    };
}

steps! {
    /// A staging file for a draft is created.
    StageCreate = "stage-create",
    /// Bytes of a draft are written into its staging file.
    StageWrite = "stage-write",
    /// A complete staging file is synced, before its job is recorded.
    StageSync = "stage-sync",
    /// The staging file of an ended job is removed.
    StageRemove = "stage-remove",
    /// A record of a job, whatever it says, is written into a new file of the state directory.
    RecordWrite = "record-write",
    /// That file takes the place of the record before.
    RecordRename = "record-rename",
    /// The record's new name is synced.
    RecordSync = "record-sync",
    /// A new job is recorded; close(2) returns after this.
    JobRecord = "job-record",
    /// A job's first status is put into the bucket.
    StatusBegin = "status-begin",
    /// A running job's status is put again.
    StatusRenew = "status-renew",
    /// The next epoch of a key's lease is created in the bucket.
    LeaseClaim = "lease-claim",
    /// It is recorded that an upload is about to be started.
    UploadIntent = "upload-intent",
    /// The store is asked to start an upload.
    UploadStart = "upload-start",
    /// The log of a started upload is created in the state directory.
    LogCreate = "log-create",
    /// A part is sent.
    PartSend = "part-send",
    /// The store is asked to copy a part.
    PartCopy = "part-copy",
    /// The object of a splice is removed.
    SpliceRemove = "splice-remove",
    /// A part that the store has is appended to the log.
    PartLog = "part-log",
    /// The log says that a part that was sent early was written again.
    StaleMark = "stale-mark",
    /// The record says that the object is about to be put in place, and as what.
    PublishRecord = "publish-record",
    /// The object is put in place: a small one by a put, others by the completion of their upload.
    ObjectPlace = "object-place",
    /// The index of an object's chunks is put into the bucket.
    IndexPut = "index-put",
    /// The record says how the job ended.
    EndRecord = "end-record",
    /// A checksum file is put beside the object.
    ChecksumPut = "checksum-put",
    /// The final status is put into the bucket.
    StatusEnd = "status-end",
    /// The record says that the bucket has the final status.
    EndConfirm = "end-confirm",
    /// The lease says that its job has ended.
    LeaseEnd = "lease-end",
    /// An upload is aborted at the store.
    UploadAbort = "upload-abort",
    /// The log of an upload that is over is removed.
    LogRemove = "log-remove",
    /// The record of an old ended job is removed.
    RecordPrune = "record-prune",
    /// What is about to be renamed, or removed with what stands beside it, is recorded.
    MoveRecord = "move-record",
    /// A rename makes the new object.
    CopyPlace = "copy-place",
    /// It is noted which object that is.
    MoveNote = "move-note",
    /// It is noted that nothing is left to be renamed or removed.
    MoveEnd = "move-end",
    /// The objects beside a renamed or removed one are renamed or removed with it.
    SidecarMove = "sidecar-move",
    /// An object is removed from its bucket.
    ObjectRemove = "object-remove",
    /// Attributes are saved into the bucket.
    AttributesSave = "attributes-save",
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Marks that the step is about to be done.
///
/// # Errors
/// What a test has asked for; never in builds without debug assertions.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_: Step) -> Result<()> {
    Ok(())
}

#[cfg(debug_assertions)]
pub use armed::{arm, pass};

/// What happens at an armed step.
#[cfg(debug_assertions)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process dies by SIGKILL.
    Kill,
    /// This pass fails with [`Io`](crate::error::ErrorKind::Io).
    Error,
    /// This and all later passes fail with ENOSPC.
    Full,
}

#[cfg(debug_assertions)]
mod armed {
    use std::collections::HashMap;
    use std::io::Write;
    use std::sync::LazyLock;

    use parking_lot::Mutex;

    use super::{Action, Step};
    use crate::error::{Error, ErrorKind, Result};

    #[derive(Default)]
    struct State {
        armed: Option<(Step, u64, Action)>,
        log: Option<std::fs::File>,
        passed: HashMap<Step, u64>,
        /// What is wrong with the environment: a test that arms nothing must not pass.
        malformed: Option<String>,
    }

    static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(from_environment()));

    fn from_environment() -> State {
        let mut state = State::default();
        if let Ok(text) = std::env::var("FREIGHTFS_FAILPOINT") {
            state.armed = parse(&text);
            state.malformed = state.armed.is_none().then_some(text);
        }
        if let Some(path) = std::env::var_os("FREIGHTFS_FAILPOINT_LOG") {
            match std::fs::File::options().create(true).append(true).open(&path) {
                Ok(file) => state.log = Some(file),
                Err(error) => state.malformed = Some(format!("{}: {error}", path.display())),
            }
        }
        state
    }

    pub(super) fn parse(text: &str) -> Option<(Step, u64, Action)> {
        let mut words = text.split(':');
        let (name, number, action) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
        let step = *Step::ALL.iter().find(|step| step.name() == name)?;
        let action = match action {
            "kill" => Action::Kill,
            "error" => Action::Error,
            "full" => Action::Full,
            _ => return None,
        };
        words.next().is_none().then_some((step, number, action))
    }

    /// Arms a step of this process, as the environment does, and counts its passes from 0 again; `None` disarms.
    pub fn arm(armed: Option<(Step, u64, Action)>) {
        let mut state = STATE.lock();
        state.passed.clear();
        state.armed = armed;
    }

    /// Marks that the step is about to be done.
    ///
    /// # Errors
    /// What a test has asked for.
    pub fn pass(step: Step) -> Result<()> {
        let mut state = STATE.lock();
        if let Some(text) = &state.malformed {
            return Err(Error::new(ErrorKind::Malformed, format!("no failpoint can be made of {text:?}")));
        }
        if let Some(log) = &mut state.log {
            let _ = log.write_all(format!("{step}\n").as_bytes());
        }
        let count = state.passed.entry(step).or_default();
        *count += 1;
        let count = *count;
        match state.armed {
            Some((armed, number, Action::Kill)) if armed == step && count == number => die(),
            Some((armed, number, Action::Error)) if armed == step && count == number => {
                Err(Error::new(ErrorKind::Io, format!("the failpoint {step} fails")))
            }
            Some((armed, number, Action::Full)) if armed == step && count >= number => {
                let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
                Err(Error::from_io(format!("the failpoint {step} has no space"), full))
            }
            _ => Ok(()),
        }
    }

    /// Dies by SIGKILL. Nothing else passes a step meanwhile.
    fn die() -> Result<()> {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        std::process::abort()
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_distinct_and_parsed() {
        let names: HashSet<_> = Step::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), Step::ALL.len());
        for &step in Step::ALL {
            assert_eq!(armed::parse(&format!("{step}:3:kill")), Some((step, 3, Action::Kill)));
        }
        for text in ["", "job-record", "job-record:1", "job-record:x:kill", "job-record:1:die", "none:1:kill"]
        {
            assert_eq!(armed::parse(text), None, "{text}");
        }
    }
}
