//! The jobs that a mount knows.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::job::Job;
use crate::bucket::ObjectKey;

/// Ended jobs that are known; the oldest are forgotten first.
pub(super) const ENDED_KEPT: usize = 1000;

/// The jobs of a mount, by id and by key.
#[derive(Default)]
pub(super) struct Table {
    /// By id, so by time.
    jobs: BTreeMap<String, Arc<Job>>,
    /// The newest job of each key.
    newest: HashMap<(String, ObjectKey), Arc<Job>>,
    /// When exports were asked for in the last second.
    pub(super) asked: VecDeque<Instant>,
}

impl Table {
    /// Adds a job; returns the ids of ended ones that are forgotten for it.
    pub(super) fn insert(&mut self, job: &Arc<Job>) -> Vec<String> {
        let request = job.request();
        self.newest.insert((request.bucket.clone(), request.key.clone()), Arc::clone(job));
        self.jobs.insert(job.id(), Arc::clone(job));
        if self.jobs.len() <= ENDED_KEPT {
            return Vec::new();
        }
        // The record of one whose end the bucket lacks is all that can still tell it.
        let is_over = |job: &Job| job.has_ended() && !job.holds_status();
        let ended: Vec<_> =
            self.jobs.iter().filter(|(_, job)| is_over(job)).map(|(id, _)| id.clone()).collect();
        let surplus = ended.len().saturating_sub(ENDED_KEPT);
        let forgotten: Vec<_> = ended.into_iter().take(surplus).collect();
        for id in &forgotten {
            if let Some(job) = self.jobs.remove(id) {
                let request = job.request();
                let key = (request.bucket.clone(), request.key.clone());
                if self.newest.get(&key).is_some_and(|newest| Arc::ptr_eq(newest, &job)) {
                    self.newest.remove(&key);
                }
            }
        }
        forgotten
    }

    /// The greatest id.
    pub(super) fn last_id(&self) -> Option<&str> {
        self.jobs.last_key_value().map(|(id, _)| id.as_str())
    }

    /// The newest job of a key.
    pub(super) fn newest(&self, bucket: &str, key: &ObjectKey) -> Option<&Arc<Job>> {
        self.newest.get(&(bucket.to_owned(), key.clone()))
    }

    /// The newest job of each key of a bucket.
    pub(super) fn newest_in(&self, bucket: &str) -> impl Iterator<Item = &Arc<Job>> {
        self.newest.iter().filter(move |((of, _), _)| of == bucket).map(|(_, job)| job)
    }

    /// Forgets the job of a key if it has ended.
    pub(super) fn forget_newest(&mut self, bucket: &str, key: &ObjectKey) {
        let entry = (bucket.to_owned(), key.clone());
        if self.newest.get(&entry).is_some_and(|job| job.has_ended()) {
            self.newest.remove(&entry);
        }
    }

    pub(super) fn job(&self, id: &str) -> Option<&Arc<Job>> {
        self.jobs.get(id)
    }

    /// All jobs, oldest first.
    pub(super) fn jobs(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.jobs.values()
    }

    /// Jobs that have not ended.
    pub(super) fn active(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.jobs().filter(|job| !job.has_ended())
    }
}
