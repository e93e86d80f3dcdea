//! Claims: the right to replace the entries of a run of clusters.
//!
//! Who replaces entries holds a claim of them; readers, and writers to clusters that are the image's alone,
//! do not look at claims. So claims are kept apart from the slices, in a few short lists by slice number:
//! the run of a claim lies in one slice, and is claimed under one lock.
//!
//! Only a claim's first entry is ever waited for, and nothing is held meanwhile; where a later entry is
//! claimed already the run ends before it. So no writer waits while another waits for it.
//!
//! Who finds an entry claimed puts a waker beside the claim; the claim's end takes the wakers. The lock makes
//! "still claimed, so register" one step.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::Mutex;
use std::task::{Poll, Waker};

use super::journal::{Noted, Room};
use super::slice::{Pinned, Slice};
use super::tables::{Tables, lock};
use super::units::GuestCluster;

/// Lists of claims: more than there are threads, so that they seldom meet at one.
const SHARDS: u64 = 64;

/// The claims of an image.
#[derive(Debug)]
pub(super) struct Claims(Box<[Shard]>);

/// Claims in every 64th slice, alone on their cache lines. They are as many as there are writes to new
/// clusters under way, so they are looked through one by one.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<Vec<Held>>);

/// A run of claimed guest clusters.
#[derive(Debug)]
struct Held {
    first: u64,
    count: u64,
    /// Who waits for which of them.
    waiters: Vec<(u64, Waker)>,
}

impl Default for Claims {
    fn default() -> Self {
        Self((0..SHARDS).map(|_| Shard::default()).collect())
    }
}

impl Claims {
    fn of(&self, slice: u64) -> &Mutex<Vec<Held>> {
        &self.0[(slice % SHARDS) as usize].0
    }
}

impl Held {
    fn has(&self, cluster: GuestCluster) -> bool {
        (self.first..self.first + self.count).contains(&cluster.0)
    }
}

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
    /// The slice's L2 table is shared with a snapshot, and must be made ours first
    /// ([`super::Qcow2::own_table`]).
    Shared,
}

impl Tables {
    /// Claims `first` and up to `max` entries from there on, in one slice, as long as they are free and
    /// `wanted` (which gets the distance from the first and the raw entry, and must take no lock).
    pub(super) fn try_claim(
        &self,
        first: GuestCluster,
        max: u64,
        wanted: impl Fn(usize, u64) -> bool,
    ) -> Attempt<'_> {
        let place = self.place(first);
        // A table that is ours stays so.
        if self.shared_table(place.slice).is_some() {
            return Attempt::Shared;
        }
        let Some(slice) = self.pin(place.slice) else {
            return Attempt::Missing;
        };
        let mut free = max.min(self.left_in_slice(first));
        let mut claims = lock(self.claims.of(place.slice));
        for held in claims.iter() {
            if held.has(first) {
                return Attempt::Busy;
            }
            if held.first > first.0 {
                free = free.min(held.first - first.0);
            }
        }
        let count = (0..free as usize)
            .take_while(|n| wanted(*n, slice.get(place.at + n)))
            .count();
        if count == 0 {
            return Attempt::Unwanted;
        }
        claims.push(Held {
            first: first.0,
            count: count as u64,
            waiters: Vec::new(),
        });
        drop(claims);
        Attempt::Claimed(Claim {
            tables: self,
            slice,
            first,
            at: place.at,
            count,
        })
    }

    /// Waits until nobody claims the cluster; somebody may again by the time this returns.
    #[cold]
    pub(super) async fn unclaimed(&self, cluster: GuestCluster) {
        let slice = self.place(cluster).slice;
        poll_fn(|cx| {
            let mut claims = lock(self.claims.of(slice));
            let Some(held) = claims.iter_mut().find(|held| held.has(cluster)) else {
                return Poll::Ready(());
            };
            held.waiters.push((cluster.0, cx.waker().clone()));
            Poll::Pending
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

    /// Replaces the entry `n` behind the first, for readers to see at once. A bitmap stays.
    pub(super) fn publish(&self, noted: &Noted<'_, '_>, n: usize, raw: u64) {
        self.publish_pair(noted, n, raw, self.slice.bitmap(self.at + n));
    }

    /// Appends to the journal what some of the claimed entries are going to be; bitmaps stay.
    pub(super) fn note<'r, 'j>(
        &self,
        room: &'r mut Room<'j>,
        which: Range<usize>,
        entry: impl Fn(usize) -> u64,
    ) -> Noted<'r, 'j> {
        let mut log = room.log();
        for n in which {
            let bitmap = self.slice.bitmap(self.at + n);
            log.note(self.cluster(n), entry(n), bitmap);
        }
        log.commit()
    }

    /// The `n`th of the claimed guest clusters.
    pub(super) fn cluster(&self, n: usize) -> GuestCluster {
        GuestCluster(self.first.0 + n as u64)
    }

    /// As [`Claim::publish`], with the bitmap of an extended entry.
    pub(super) fn publish_pair(&self, _noted: &Noted<'_, '_>, n: usize, raw: u64, bitmap: u64) {
        debug_assert!(n < self.count);
        let taken = self.slice.publish_pair(self.at + n, raw, bitmap);
        self.tables.note_memory(taken);
    }

    /// The slice.
    pub(super) fn slice(&self) -> &Slice {
        &self.slice
    }

    /// Ends the claim of all but the first `count` entries.
    pub(super) fn truncate(&mut self, count: usize) {
        if count >= self.count {
            return;
        }
        self.count = count;
        let end = self.first.0 + count as u64;
        // Unlocking is a Release: the next claim sees what this one published.
        let mut claims = lock(self.tables.claims.of(self.slice.index));
        let Some(at) = claims.iter().position(|held| held.first == self.first.0) else {
            return;
        };
        let waiters = if count == 0 {
            claims.swap_remove(at).waiters
        } else {
            let held = &mut claims[at];
            held.count = count as u64;
            let waiters = std::mem::take(&mut held.waiters).into_iter();
            let (over, still) = waiters.partition(|waiter| waiter.0 >= end);
            held.waiters = still;
            over
        };
        drop(claims);
        waiters.into_iter().for_each(|(_, waker)| waker.wake());
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.truncate(0);
    }
}
