//! Claims: the right to replace the entries of a run of clusters.
//!
//! A claim is taken entry by entry, in ascending order, with a compare-and-swap on the state byte. Only a
//! claim's first entry is ever waited for, and nothing is held meanwhile; where a later entry is busy the
//! run ends before it. So no writer waits while another waits for it.
//!
//! Who finds an entry busy puts a waker beside it; the claim's end takes the wakers. The wakers' lock makes
//! "still busy, so register" one step, and the swap in [`Claim`]'s drop sees the registration or comes
//! before it.

use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::slice::{BUSY, Pinned, Slice, WAITERS};
use super::tables::{Tables, lock};
use super::units::GuestCluster;

/// Neighbouring entries of one slice that only this writer may replace. Dropping it ends the claim.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    tables: &'a Tables,
    slice: Pinned,
    first: GuestCluster,
    at: usize,
    count: usize,
}

/// What became of an attempt to claim.
#[derive(Debug)]
pub(super) enum Attempt<'a> {
    /// At least the first entry is claimed.
    Claimed(Claim<'a>),
    /// The first entry is somebody else's.
    Busy,
    /// The first entry is not (or no more) as it was wanted.
    Unwanted,
    /// The slice is not in memory.
    Missing,
}

impl Tables {
    /// Claims `first` and up to `max` entries from there on, in one slice, as long as they are free and
    /// `wanted` (which gets the distance from the first and the raw entry).
    pub(super) fn try_claim(
        &self,
        first: GuestCluster,
        max: u64,
        wanted: impl Fn(usize, u64) -> bool,
    ) -> Attempt<'_> {
        let place = self.place(first);
        let Some(slice) = self.pin(place.slice) else {
            return Attempt::Missing;
        };
        let max = max.min(self.left_in_slice(first)) as usize;
        let mut claim = Claim {
            tables: self,
            slice,
            first,
            at: place.at,
            count: 0,
        };
        while claim.count < max {
            let n = claim.count;
            let state = claim.slice.state(place.at + n);
            // Acquire: what the last claim published is seen.
            let free = state.compare_exchange(0, BUSY, Ordering::Acquire, Ordering::Relaxed);
            if free.is_err() {
                if n == 0 {
                    return Attempt::Busy;
                }
                break;
            }
            claim.count += 1;
            if !wanted(n, claim.get(n)) {
                claim.truncate(n);
                if n == 0 {
                    return Attempt::Unwanted;
                }
                break;
            }
        }
        Attempt::Claimed(claim)
    }

    /// Waits until nobody claims the cluster; somebody may again by the time this returns.
    #[cold]
    pub(super) async fn unclaimed(&self, cluster: GuestCluster) {
        let place = self.place(cluster);
        poll_fn(|cx| {
            let registered = self.with(place.slice, |slice| {
                let mut waiters = lock(&self.waiters);
                let state = slice.state(place.at);
                let busy = state
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                        (state & BUSY != 0).then_some(state | WAITERS)
                    })
                    .is_ok();
                if busy {
                    waiters
                        .entry(cluster.0)
                        .or_default()
                        .push(cx.waker().clone());
                }
                busy
            });
            match registered {
                Some(true) => Poll::Pending,
                _ => Poll::Ready(()),
            }
        })
        .await;
    }
}

impl Claim<'_> {
    /// Entries claimed.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The raw entry `n` behind the first.
    pub(super) fn get(&self, n: usize) -> u64 {
        self.slice.get(self.at + n)
    }

    /// Replaces the entry `n` behind the first, for readers to see at once.
    pub(super) fn publish(&self, n: usize, raw: u64) {
        debug_assert!(n < self.count);
        self.slice.publish(self.at + n, raw);
    }

    /// The slice.
    pub(super) fn slice(&self) -> &Slice {
        &self.slice
    }

    /// Ends the claim of all but the first `count` entries.
    pub(super) fn truncate(&mut self, count: usize) {
        while self.count > count {
            self.count -= 1;
            self.release(self.count);
        }
    }

    fn release(&self, n: usize) {
        // Release: the next claim sees what this one published.
        let state = self.slice.state(self.at + n).swap(0, Ordering::Release);
        if state & WAITERS != 0 {
            let waiters = lock(&self.tables.waiters).remove(&(self.first.0 + n as u64));
            waiters.into_iter().flatten().for_each(Waker::wake);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.truncate(0);
    }
}
