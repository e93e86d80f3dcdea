//! Freed clusters that may not be used yet.
//!
//! A cluster leaves limbo when the metadata that no longer points at it is durable (a flush that began
//! after the free has ended: [`Limbo::mark`] before, [`Limbo::take`] after) and every request begun
//! before the free has completed (its epoch has passed).

use std::collections::VecDeque;

use super::runs::Run;
use crate::reactor::Epoch;
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// A point in the order of frees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

#[derive(Debug)]
struct Entry {
    run: Run,
    epoch: Epoch,
    /// Number of the free, counted from the start.
    number: u64,
}

#[derive(Debug, Default)]
struct Inner {
    entries: VecDeque<Entry>,
    /// Out of limbo but not processed: the attempt failed.
    ready: Vec<Run>,
    /// Frees so far.
    count: u64,
    /// Entries before this one may not be joined with later ones: a mark lies between.
    marked: u64,
    /// Frees before this one are durable.
    settled: u64,
}

/// Freed clusters, of all workers.
#[derive(Debug, Default)]
pub(super) struct Limbo {
    inner: Mutex<Inner>,
}

impl Limbo {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a run that was unlinked before `epoch` was retired.
    pub(super) fn add(&self, run: Run, epoch: Epoch) {
        let mut inner = self.lock();
        let number = inner.count;
        inner.count += 1;
        let marked = inner.marked;
        if let Some(last) = inner.entries.back_mut() {
            if last.number >= marked && last.run.end() == run.first {
                last.run.count += run.count;
                last.epoch = last.epoch.max(epoch);
                return;
            }
        }
        inner.entries.push_back(Entry { run, epoch, number });
    }

    /// The frees so far.
    pub(super) fn mark(&self) -> Mark {
        let mut inner = self.lock();
        inner.marked = inner.count;
        Mark(inner.count)
    }

    /// Everything freed before `mark` is durable: takes the runs of which `passed` is true, and those
    /// that were put back.
    pub(super) fn take(&self, mark: Mark, passed: impl Fn(Epoch) -> bool) -> Vec<Run> {
        let mut inner = self.lock();
        inner.settled = inner.settled.max(mark.0);
        let settled = inner.settled;
        let mut taken = std::mem::take(&mut inner.ready);
        // Later epochs pass later: few questions are asked.
        let (mut newest_passed, mut oldest_not) = (None::<Epoch>, None::<Epoch>);
        inner.entries.retain(|entry| {
            if entry.number >= settled || oldest_not.is_some_and(|not| entry.epoch >= not) {
                return true;
            }
            if newest_passed.is_none_or(|yes| entry.epoch > yes) {
                if !passed(entry.epoch) {
                    oldest_not = Some(entry.epoch);
                    return true;
                }
                newest_passed = Some(entry.epoch);
            }
            taken.push(entry.run);
            false
        });
        taken
    }

    /// As [`Limbo::take`] when no request runs: no epoch is asked for. Leaves what is not durable.
    pub(super) fn take_durable(&self) -> Vec<Run> {
        self.take(Mark(0), |_| true)
    }

    /// Takes runs back whose processing failed.
    pub(super) fn put_back(&self, runs: &mut Vec<Run>) {
        self.lock().ready.append(runs);
    }

    /// Clusters in limbo.
    pub(super) fn len(&self) -> u64 {
        let inner = self.lock();
        let ready: u64 = inner.ready.iter().map(|run| run.count).sum();
        ready + inner.entries.iter().map(|e| e.run.count).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::Epochs;

    #[test]
    fn what_was_freed_after_the_mark_stays() {
        let (limbo, epochs) = (Limbo::default(), Epochs::new());
        limbo.add(Run::new(5, 1), epochs.retire());
        let mark = limbo.mark();
        limbo.add(Run::new(6, 1), epochs.retire());
        limbo.add(Run::new(7, 1), epochs.retire());
        assert_eq!(limbo.take(mark, |_| true), [Run::new(5, 1)]);
        let mark = limbo.mark();
        assert_eq!(limbo.take(mark, |_| true), [Run::new(6, 2)]);
        assert_eq!(limbo.len(), 0);
    }

    #[test]
    fn what_a_request_may_still_read_stays_and_goes_with_a_later_settle() {
        let (limbo, epochs) = (Limbo::default(), Epochs::new());
        let first = epochs.retire();
        limbo.add(Run::new(5, 1), first);
        limbo.add(Run::new(9, 1), epochs.retire());
        let mark = limbo.mark();
        assert_eq!(limbo.take(mark, |e| e <= first), [Run::new(5, 1)]);
        assert_eq!(limbo.take(Mark(0), |_| true), [Run::new(9, 1)]);
    }

    #[test]
    fn at_the_end_only_what_is_durable_is_taken() {
        let (limbo, epochs) = (Limbo::default(), Epochs::new());
        limbo.add(Run::new(5, 1), epochs.retire());
        let mark = limbo.mark();
        limbo.add(Run::new(9, 1), epochs.retire());
        assert!(limbo.take(mark, |_| false).is_empty());
        assert_eq!(limbo.take_durable(), [Run::new(5, 1)]);
        limbo.put_back(&mut vec![Run::new(5, 1)]);
        assert_eq!(limbo.len(), 2);
        assert_eq!(limbo.take_durable(), [Run::new(5, 1)]);
    }
}
