//! Renames and removals of objects with what stands beside them: steps of which a crash can leave some undone.
//!
//! A store has no rename: an object is copied, removed under its old name, and then its sidecars follow. Before the
//! first of these steps a line in the state directory says what there was, with entity tags, and what is to be; that is
//! the one sync that a rename costs. What is left to be done after a crash, or a request that failed, is a function of
//! what the bucket shows, [`Progress::of`] and then the row of [`TABLE`]. Nothing is removed that has another entity tag
//! than the line says, or was written at another time: equal bytes that somebody has put there again are theirs.

mod log;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tracing::{info, warn};

use self::log::Found;
pub use self::log::fuzz_moves;
pub(super) use self::log::{Move, MoveLog};
use super::ending::{GRACE, until_end};
use super::job_id::JobId;
use super::multipart::copy;
use super::multipart::digests::joined;
use super::multipart::memory::PartMemory;
use super::multipart::reused::remove_index;
use super::multipart::uploads::Uploads;
use super::retry::Retries;
use super::sidecars::{self, Beside, Sidecar, has_sidecars};
use crate::bucket::{Bucket, ObjectKey, ObjectMeta, Replaces};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};

/// How far a rename or a removal got, as the bucket shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The object has its old name only.
    Unmade,
    /// It has both names.
    Made,
    /// It has its new name only.
    Moved,
    /// It has neither.
    Gone,
}

/// One row of the table.
pub struct Row {
    /// How far it got.
    pub progress: Progress,
    /// What the bucket shows.
    pub shown: &'static str,
    /// What is done then.
    pub done: &'static str,
}

/// What is done with a rename or a removal that was interrupted. Printed in the crate's documentation.
pub const TABLE: [Row; 4] = [
    Row {
        progress: Progress::Unmade,
        shown: "the old name's object as recorded; none or another at the new one",
        done: "nothing: it was not renamed, or not removed",
    },
    Row {
        progress: Progress::Made,
        shown: "the old name's object as recorded; the same at the new one",
        done: "removes the old one, if it is as recorded still; what stands beside it follows",
    },
    Row {
        progress: Progress::Moved,
        shown: "none or another at the old name; the object at the new one",
        done: "what stood beside the old one follows",
    },
    Row {
        progress: Progress::Gone,
        shown: "none or another at the old name; none or another at the new one",
        done: "what stood beside an object that is gone is removed",
    },
];

impl Progress {
    /// What the bucket shows: whether the old name has the object as recorded, and the new name the same.
    pub fn of(has_source: bool, is_made: bool) -> Self {
        match (has_source, is_made) {
            (true, false) => Self::Unmade,
            (true, true) => Self::Made,
            (false, true) => Self::Moved,
            (false, false) => Self::Gone,
        }
    }
}

/// An object that was renamed.
#[derive(Clone, Debug)]
pub struct Renamed {
    /// As it was under its old name.
    pub from: ObjectMeta,
    /// As it is under its new one.
    pub to: ObjectMeta,
}

/// The bytes of sidecars that were looked at.
type Looked = HashMap<Sidecar, Bytes>;

/// What came of it, and what is left to be [settled](Moves::settle).
pub(super) type Outcome<T> = (Result<T>, Option<Move>);

/// Renames and removes the objects of a mount.
pub(super) struct Moves {
    log: MoveLog,
    uploads: Uploads,
    /// The memory for parts of each bucket, by its name.
    memory: BTreeMap<String, PartMemory>,
    /// Whether every key has sidecars.
    all_sidecars: bool,
}

impl Moves {
    pub(super) fn new(
        path: PathBuf,
        uploads: Uploads,
        memory: BTreeMap<String, PartMemory>,
        all_sidecars: bool,
    ) -> Self {
        Self { log: MoveLog::new(path), uploads, memory, all_sidecars }
    }

    pub(super) fn log(&self) -> &MoveLog {
        &self.log
    }

    /// Gives an object another name, in place of what has that; `exclusive` says that nothing may have it.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound), [`AlreadyExists`](ErrorKind::AlreadyExists), and the store's.
    pub(super) async fn rename(
        self: &Arc<Self>,
        bucket: &Bucket,
        from: &ObjectKey,
        to: &ObjectKey,
        exclusive: bool,
    ) -> Outcome<Renamed> {
        let (mut begun, source, looked) = match self.prepare(bucket, from, to, exclusive).await {
            Ok(prepared) => prepared,
            Err(error) => return (Err(error), None),
        };
        let renamed = |to| Ok(Renamed { from: source.clone(), to });
        let (made, is_there_again) = match self.act(bucket, &mut begun, &source, exclusive).await {
            Ok(done) => done,
            Err(error) => {
                return match self.recover(bucket, begun, error.clone()).await {
                    (Ok(Some(made)), left) => (renamed(made), left),
                    (Ok(None), left) => (Err(error), left),
                    (Err(error), left) => (Err(error), left),
                };
            }
        };
        let shown = Shown { is_made: true, is_replaced: true, is_there_again };
        let left = match self.follow(bucket, &begun, &looked, shown).await {
            Ok(()) => {
                self.log.end(&begun.id);
                None
            }
            Err(error) => {
                // The object has its new name, which is what was asked for.
                warn!(key = %made.key, "what stands beside it does not follow yet: {}", error.report());
                Some(begun)
            }
        };
        (renamed(made), left)
    }

    /// Looks at what there is, and records what is about to be done.
    async fn prepare(
        self: &Arc<Self>,
        bucket: &Bucket,
        from: &ObjectKey,
        to: &ObjectKey,
        exclusive: bool,
    ) -> Result<(Move, ObjectMeta, Looked)> {
        let (source, target) = tokio::try_join!(bucket.head(from), bucket.head(to))?;
        let gone = || Error::new(ErrorKind::NotFound, "the object is gone").in_file(bucket.url_of(from));
        let source = source.ok_or_else(gone)?;
        if exclusive && target.is_some() {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("{to} exists")));
        }
        let (mut found, mut replaced) = (Found::new(from, Some(&source)), Found::new(to, target.as_ref()));
        let mut looked = Looked::new();
        if self.has_sidecars(from) || self.has_sidecars(to) {
            looked = look_beside(bucket, &mut found).await?;
            look_beside(bucket, &mut replaced).await?;
        }
        Ok((self.begin(bucket, found, Some(replaced)).await?, source, looked))
    }

    /// Makes the object under its new name, and removes it under its old one. Says whether somebody has put equal bytes
    /// there meanwhile.
    async fn act(
        &self,
        bucket: &Bucket,
        begun: &mut Move,
        source: &ObjectMeta,
        exclusive: bool,
    ) -> Result<(ObjectMeta, bool)> {
        let Some(target) = &begun.to else { return Err(Error::new(ErrorKind::Internal, "not a rename")) };
        // Nothing else than what the line says is replaced.
        let replaces = if exclusive { Replaces::Nothing } else { target.replaces() };
        failpoint::pass(Step::CopyPlace)?;
        let renamed = bucket.rename(source, &target.key, &replaces).await?;
        let made = match &renamed {
            Some(made) => made.clone(),
            None => {
                let log_id = format!("copy-{}", JobId::new());
                let unknown = || Error::new(ErrorKind::Internal, "a rename in a bucket that is not mounted");
                let memory = self.memory.get(bucket.name()).ok_or_else(unknown)?;
                copy::copy(&self.uploads, (bucket, memory), source, &target.key, &replaces, &log_id).await?
            }
        };
        begun.made = Some(made.etag.clone());
        if renamed.is_some() {
            return Ok((made, false));
        }
        self.log.made(&begun.id, made.etag.as_deref());
        let is_there_again = remove_source(bucket, begun).await?;
        Ok((made, is_there_again))
    }

    /// Removes an object and what stands beside it. Says whether there was one.
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) when somebody replaced it meanwhile, which stays; and the store's.
    pub(super) async fn remove(self: &Arc<Self>, bucket: &Bucket, key: &ObjectKey) -> Outcome<bool> {
        let begun = async {
            let Some(meta) = bucket.head(key).await? else { return Ok(None) };
            let mut found = Found::new(key, Some(&meta));
            if self.has_sidecars(key) {
                look_beside(bucket, &mut found).await?;
            }
            let replaces = found.replaces();
            // What has nothing beside it is removed by one request.
            let begun = match found.sidecars.is_empty() {
                true => None,
                false => Some(self.begin(bucket, found, None).await?),
            };
            Ok(Some((begun, replaces, meta.object_size)))
        };
        let (begun, replaces, object_size) = match begun.await {
            Ok(Some(begun)) => begun,
            Ok(None) => return (Ok(false), None),
            Err(error) => return (Err(error), None),
        };
        let removed = async {
            failpoint::pass(Step::ObjectRemove)?;
            bucket.delete_if(key, &replaces).await
        };
        let removed = removed.await;
        if removed.is_ok() {
            remove_index(bucket, key, object_size).await;
        }
        match (removed, begun) {
            (removed, None) => (removed.map(|()| true), None),
            (Err(error), Some(begun)) => {
                let (progress, left) = self.recover(bucket, begun, error).await;
                (progress.map(|_| true), left)
            }
            (Ok(()), Some(begun)) => {
                let shown = Shown { is_made: false, is_replaced: false, is_there_again: false };
                match self.follow(bucket, &begun, &Looked::new(), shown).await {
                    Ok(()) => {
                        self.log.end(&begun.id);
                        (Ok(true), None)
                    }
                    Err(error) => {
                        warn!(%key, "sidecars are there still: {}", error.report());
                        (Ok(true), Some(begun))
                    }
                }
            }
        }
    }

    /// Finds out how far something got that failed with `error`, and finishes it. That is the result too where nothing
    /// was done.
    async fn recover(&self, bucket: &Bucket, begun: Move, error: Error) -> Outcome<Option<ObjectMeta>> {
        if was_refused(&error) && begun.made.is_none() {
            self.log.end(&begun.id);
            return (Err(error), None);
        }
        match self.resolve(bucket, &begun).await {
            Ok((Progress::Unmade, _)) => (Err(error), None),
            Ok((_, made)) => (Ok(made), None),
            Err(again) => {
                warn!("a rename or a removal is not over: {}", again.report());
                (Err(error), Some(begun))
            }
        }
    }

    /// Finishes what is left of a rename or a removal, with back-off, until the mount ends. What can be done at once is done
    /// before that.
    pub(super) async fn settle(
        &self,
        bucket: &Bucket,
        left: Move,
        retries: Retries,
        mut stopping: watch::Receiver<bool>,
    ) {
        for failures in 0.. {
            let grace = if failures == 0 { GRACE } else { Duration::ZERO };
            let resolved = until_end(&mut stopping, grace, self.resolve(bucket, &left)).await;
            let Some(resolved) = resolved else { return };
            match resolved {
                Ok((progress, _)) => {
                    info!(key = %left.from.key, "an interrupted rename or removal is over: {progress:?}");
                    return;
                }
                // Its names are not to wait for what will never be.
                Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly) => {
                    warn!(key = %left.from.key, "a rename or a removal stays half-done: {}", error.report());
                    self.log.end(&left.id);
                    return;
                }
                Err(error) => warn!("a rename or a removal is not over: {}", error.report()),
            }
            let pause = tokio::time::sleep(retries.pause(failures));
            if until_end(&mut stopping, Duration::ZERO, pause).await.is_none() {
                return;
            }
        }
    }

    /// Asks the bucket how far something got, and does what is left. Returns what there was, and the object at the new
    /// name if it has that.
    async fn resolve(&self, bucket: &Bucket, left: &Move) -> Result<(Progress, Option<ObjectMeta>)> {
        let source = bucket.head(&left.from.key).await?;
        let target = match &left.to {
            Some(to) => bucket.head(&to.key).await?,
            None => None,
        };
        let has_source = left.from.is(source.as_ref());
        let is_made = is_made(bucket, left, source.as_ref().filter(|_| has_source), target.as_ref()).await?;
        let progress = Progress::of(has_source, is_made);
        // What follows says which object it is of.
        let made = target.as_ref().filter(|_| is_made).map(|target| target.etag.clone());
        let left = &Move { made, ..left.clone() };
        let is_there_again = match progress {
            Progress::Made => remove_source(bucket, left).await?,
            _ => left.from.is_there_again(source.as_ref()),
        };
        if progress != Progress::Unmade {
            let is_replaced = left.to.as_ref().is_some_and(|to| !to.is(target.as_ref()));
            let shown = Shown { is_made, is_replaced, is_there_again };
            self.follow(bucket, left, &Looked::new(), shown).await?;
        }
        self.log.end(&left.id);
        Ok((progress, target.filter(|_| is_made)))
    }

    /// Has the sidecars of an object that is gone from its old name follow it, in place of those of what had its new
    /// one before. They name the new object afterwards.
    async fn follow(&self, bucket: &Bucket, moved: &Move, looked: &Looked, shown: Shown) -> Result<()> {
        if let Some(to) = &moved.to {
            for sidecar in Sidecar::ALL {
                let has_one = moved.from.sidecars.contains_key(&sidecar) && self.has_sidecars(&to.key);
                if shown.is_made && has_one {
                    self.carry(bucket, moved, to, sidecar, looked).await?;
                } else if let (Some(replaces), true) =
                    (to.sidecars.get(&sidecar), shown.is_made || shown.is_replaced)
                {
                    remove_sidecar(bucket, &to.key, sidecar, replaces).await?;
                }
            }
        }
        // What is true of equal bytes that somebody has put there again is theirs.
        let removed = moved.from.sidecars.iter().filter(|_| !shown.is_there_again);
        for (&sidecar, replaces) in removed {
            remove_sidecar(bucket, &moved.from.key, sidecar, replaces).await?;
        }
        Ok(())
    }

    /// Writes a sidecar of the old name as one of the new name, if that was not done yet.
    async fn carry(
        &self,
        bucket: &Bucket,
        moved: &Move,
        to: &Found,
        sidecar: Sidecar,
        looked: &Looked,
    ) -> Result<()> {
        let bytes = match looked.get(&sidecar) {
            Some(bytes) => bytes.clone(),
            None => match sidecars::look(bucket, &moved.from.key, sidecar).await? {
                Beside::Ours { bytes, replaces } if moved.from.sidecars.get(&sidecar) == Some(&replaces) => {
                    bytes
                }
                _ => return Ok(()),
            },
        };
        let etag = moved.made.clone().flatten();
        let bytes = sidecars::renamed(bucket, &to.key, sidecar, &bytes, etag.clone())?;
        let known = to.sidecars.get(&sidecar).cloned().unwrap_or(Replaces::Nothing);
        failpoint::pass(Step::SidecarMove)?;
        // Where somebody has put another object there meanwhile, what stands beside it is theirs.
        let may = |_| async {
            let there = bucket.head(&to.key).await?;
            Ok(there.is_some_and(|there| there.etag == etag))
        };
        sidecars::write(bucket, &to.key, sidecar, bytes, known, may).await.map(drop)
    }

    fn has_sidecars(&self, key: &ObjectKey) -> bool {
        has_sidecars(key, self.all_sidecars)
    }

    /// Records what is about to be done.
    async fn begin(self: &Arc<Self>, bucket: &Bucket, from: Found, to: Option<Found>) -> Result<Move> {
        let bucket = bucket.name().to_owned();
        let begun = Move { id: JobId::new().to_string(), bucket, from, to, made: None };
        let (moves, recorded) = (Arc::clone(self), begun.clone());
        joined(tokio::task::spawn_blocking(move || moves.log.begin(recorded)).await)??;
        Ok(begun)
    }
}

/// What the bucket shows of a new name.
#[derive(Clone, Copy)]
struct Shown {
    /// Whether it has the object.
    is_made: bool,
    /// Whether what it had before is gone.
    is_replaced: bool,
    /// Whether equal bytes were put under the old name again.
    is_there_again: bool,
}

/// Whether an error says that nothing was done. What says that something is another one than before can be the answer to
/// a request that was made twice, so the bucket is asked.
fn was_refused(error: &Error) -> bool {
    use ErrorKind::{NoSpace, PermissionDenied, ReadOnly};
    let refusals = [NoSpace, PermissionDenied, ReadOnly];
    !error.is_transient() && refusals.contains(&error.kind())
}

/// Whether the new name has the object. `source` is that under its old name, if it is there.
async fn is_made(
    bucket: &Bucket,
    left: &Move,
    source: Option<&ObjectMeta>,
    target: Option<&ObjectMeta>,
) -> Result<bool> {
    let (Some(to), Some(target)) = (&left.to, target) else { return Ok(false) };
    if let Some(made) = &left.made {
        return Ok(target.etag == *made);
    }
    let (size, etag) = left.from.object.clone().unwrap_or_default();
    if etag.is_some() && target.etag == etag {
        return Ok(target.object_size == size);
    }
    match source {
        Some(source) if !to.is(Some(target)) => bucket.is_copy(source, target).await,
        // It is as it was; or nobody can tell any more, and what stands beside it is not to tell of another object.
        _ => Ok(false),
    }
}

/// Removes the object under its old name. What somebody else has put there meanwhile stays; says whether that has equal
/// bytes, which the entity tag does not tell.
async fn remove_source(bucket: &Bucket, moved: &Move) -> Result<bool> {
    let look = || bucket.head(&moved.from.key);
    // An answer can be damaged on its way: it takes two to leave something where it is.
    if !moved.from.is(look().await?.as_ref()) {
        let there = look().await?;
        if !moved.from.is(there.as_ref()) {
            return Ok(moved.from.is_there_again(there.as_ref()));
        }
    }
    failpoint::pass(Step::ObjectRemove)?;
    unless_replaced(bucket.delete_if(&moved.from.key, &moved.from.replaces()).await)?;
    Ok(false)
}

async fn remove_sidecar(
    bucket: &Bucket,
    object: &ObjectKey,
    sidecar: Sidecar,
    replaces: &Replaces,
) -> Result<()> {
    failpoint::pass(Step::SidecarMove)?;
    unless_replaced(bucket.delete_if(&sidecar.key_for(object)?, replaces).await)
}

fn unless_replaced(removed: Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
        removed => removed,
    }
}

/// Finds the sidecars of an object that are ours.
async fn look_beside(bucket: &Bucket, found: &mut Found) -> Result<Looked> {
    let mut looked = Looked::new();
    for sidecar in Sidecar::ALL {
        if sidecar.key_for(&found.key).is_ok()
            && let Beside::Ours { bytes, replaces } = sidecars::look(bucket, &found.key, sidecar).await?
        {
            found.sidecars.insert(sidecar, replaces);
            looked.insert(sidecar, bytes);
        }
    }
    Ok(looked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_stands_in_the_crates_documentation() {
        let documentation = include_str!("../lib.rs");
        for row in &TABLE {
            let line = format!("//! | {:?} | {} | {} |\n", row.progress, row.shown, row.done);
            assert!(documentation.contains(&line), "src/lib.rs lacks\n{line}");
        }
        let all = [(true, false), (true, true), (false, true), (false, false)];
        assert_eq!(all.map(|(source, made)| Progress::of(source, made)), TABLE.map(|row| row.progress));
    }
}
