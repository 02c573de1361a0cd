//! The states of a job: what is durable in each, and what the next mount does when it finds a job there.
//!
//! Every step is intent, act, done: the intent is durable before the act, and the act can be asked about afterwards. So
//! each state is told by what is on disk, and recovery is a function from it, [`Stage::of`] and then the row of [`TABLE`].

/// Where a job is, as far as the state directory tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its record is written.
    Recorded,
    /// Its upload has begun.
    Sending,
    /// Its object is about to be put in place, or is.
    Publishing,
    /// Its object is in place.
    Placed,
    /// Its end is recorded.
    Ended,
    /// Its end is in the bucket too.
    Told,
}

/// What the next mount does with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Begins it.
    Begin,
    /// Sends what is not there yet.
    Resume,
    /// Looks whether the object is in place; if it is, concludes, else resumes, over what the object replaces only.
    Find,
    /// Records the success, and writes what stands beside the object.
    Conclude,
    /// Writes the final status.
    Tell,
    /// Nothing.
    Remember,
}

/// What is known of a job in the state directory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// The record says how it ended.
    pub ended: bool,
    /// The record says that the bucket lacks the final status.
    pub untold: bool,
    /// There is a log of its upload.
    pub log: bool,
    /// The log or the record says what is about to be put in place.
    pub intent: bool,
    /// The log says that it is in place.
    pub placed: bool,
}

/// One state.
pub struct Row {
    /// The state.
    pub stage: Stage,
    /// What is durable in it.
    pub durable: &'static str,
    /// The step that leads on.
    pub next: &'static str,
    /// What the next mount does.
    pub recovery: Recovery,
    /// The recovery in words.
    pub found: &'static str,
}

/// All states, in their order. Printed in the crate's documentation.
pub const TABLE: [Row; 6] = [
    Row {
        stage: Stage::Recorded,
        durable: "the record: request, source, what the object replaces; staged bytes",
        next: "start an upload, create its log",
        recovery: Recovery::Begin,
        found: "begins; waits while its bucket or image is not in this mount",
    },
    Row {
        stage: Stage::Sending,
        durable: "the log: the upload's id, parts that are planned and that the store has, states of the hashes, chunks",
        next: "send or copy, and hash, the other parts; record what is about to be put in place",
        recovery: Recovery::Resume,
        found: "sends what the log does not have",
    },
    Row {
        stage: Stage::Publishing,
        durable: "the intent: the entity tag to come, or size and digests",
        next: "put the object in place, over what it replaces only",
        recovery: Recovery::Find,
        found: "asks the bucket: in place, or resumes; another object there stays",
    },
    Row {
        stage: Stage::Placed,
        durable: "the object; the log: its size, digests and entity tag",
        next: "put the index of its chunks and the checksums, record the end",
        recovery: Recovery::Conclude,
        found: "SUCCESS, whatever the source is by now; what stands beside another object stays",
    },
    Row {
        stage: Stage::Ended,
        durable: "the record: the final status, and that the bucket lacks it",
        next: "put the final status; end the lease; wake who waits",
        recovery: Recovery::Tell,
        found: "puts the final status, unless that of a newer job is there; tries again while mounted",
    },
    Row {
        stage: Stage::Told,
        durable: "the final status in the bucket; the record says so",
        next: "none; the oldest records are removed",
        recovery: Recovery::Remember,
        found: "shown in jobs/",
    },
];

impl Stage {
    /// The state that these facts tell.
    pub fn of(facts: Facts) -> Self {
        match facts {
            Facts { ended: true, untold: true, .. } => Self::Ended,
            Facts { ended: true, .. } => Self::Told,
            Facts { placed: true, .. } => Self::Placed,
            Facts { intent: true, .. } => Self::Publishing,
            Facts { log: true, .. } => Self::Sending,
            _ => Self::Recorded,
        }
    }

    /// What the next mount does.
    pub fn recovery(self) -> Recovery {
        TABLE[self as usize].recovery
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_the_states_and_in_the_crates_documentation() {
        let documentation = include_str!("../lib.rs");
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.stage as usize, index);
            let line = format!("//! | {:?} | {} | {} | {} |\n", row.stage, row.durable, row.next, row.found);
            assert!(documentation.contains(&line), "src/lib.rs lacks\n{line}");
        }
    }

    #[test]
    fn later_facts_decide() {
        let sending = Facts { log: true, ..Facts::default() };
        let publishing = Facts { intent: true, ..sending };
        let placed = Facts { placed: true, ..publishing };
        let ended = Facts { ended: true, untold: true, ..placed };
        for (facts, recovery) in [
            (Facts::default(), Recovery::Begin),
            (sending, Recovery::Resume),
            (publishing, Recovery::Find),
            (Facts { log: false, ..publishing }, Recovery::Find),
            (placed, Recovery::Conclude),
            (ended, Recovery::Tell),
            (Facts { untold: false, ..ended }, Recovery::Remember),
        ] {
            assert_eq!(Stage::of(facts).recovery(), recovery, "{facts:?}");
        }
    }
}
