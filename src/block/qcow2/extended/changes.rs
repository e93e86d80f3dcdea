//! Who changes which subclusters: reservations, and the lock under which pairs are replaced.
//!
//! Reservations are kept in a few short lists by slice number. Only a range's first part is ever waited for,
//! with nothing held meanwhile; where a later part is reserved already the range is cut before it. So no
//! writer waits while another waits for it.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use std::task::{Poll, Waker};

use super::super::Qcow2;
use super::super::journal::Room;
use super::super::slice::Pinned;
use super::super::tables::lock;
use super::super::units::GuestCluster;
use super::entry::Pair;

/// Lists of reservations: more than there are threads, so that they seldom meet at one.
const SHARDS: usize = 64;

/// The reservations of an image.
#[derive(Debug)]
pub(in crate::block::qcow2) struct Reservations(Box<[Shard]>);

/// The reservations in every 64th slice, alone on their cache lines. They are as many as there are writes
/// that allocate, so they are looked through one by one.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<Vec<Reserved>>);

/// What a reservation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To give clusters that have no host cluster one. What the subclusters show may change meanwhile.
    Host,
    /// To change what the subclusters show.
    Contents,
}

#[derive(Debug)]
struct Reserved {
    purpose: Purpose,
    /// Subclusters, counted from the disk's beginning.
    range: Range<u64>,
    waiters: Vec<Waker>,
}

impl Reserved {
    fn is_in_the_way(&self, purpose: Purpose, range: &Range<u64>) -> bool {
        self.purpose == purpose && self.range.start < range.end && range.start < self.range.end
    }
}

impl Default for Reservations {
    fn default() -> Self {
        Self((0..SHARDS).map(|_| Shard::default()).collect())
    }
}

impl Reservations {
    fn of(&self, slice: u64) -> &Mutex<Vec<Reserved>> {
        &self.0[(slice % SHARDS as u64) as usize].0
    }
}

/// The right to change the pairs of a slice, now. To be held between two awaits only.
pub(super) struct Changes<'a> {
    image: &'a Qcow2,
    slice: Pinned,
    reserved: MutexGuard<'a, Vec<Reserved>>,
}

impl Qcow2 {
    /// Locks the pairs of a slice; none if it is not in memory.
    pub(super) fn changes(&self, slice: u64) -> Option<Changes<'_>> {
        Some(Changes {
            image: self,
            slice: self.tables.pin(slice)?,
            reserved: lock(self.reservations.of(slice)),
        })
    }

    /// Waits until nothing is in the way of a reservation; something may be again by the time this returns.
    #[cold]
    pub(super) async fn until_free(&self, slice: u64, purpose: Purpose, range: Range<u64>) {
        poll_fn(|cx| {
            let mut reserved = lock(self.reservations.of(slice));
            let held = reserved
                .iter_mut()
                .find(|held| held.is_in_the_way(purpose, &range));
            match held {
                Some(held) => {
                    held.waiters.push(cx.waker().clone());
                    Poll::Pending
                }
                None => Poll::Ready(()),
            }
        })
        .await;
    }
}

impl<'a> Changes<'a> {
    fn at(&self, cluster: GuestCluster) -> usize {
        self.image.tables.place(cluster).at
    }

    /// The pair of a cluster of the slice.
    pub(super) fn look(&self, cluster: GuestCluster) -> Pair {
        Pair::look(&self.slice, self.at(cluster), &self.image.tables.geometry)
    }

    /// Replaces the pair of a cluster, for readers to see at once. `ordered`: it may go to the file only after
    /// a flush of data.
    pub(super) fn publish(
        &self,
        room: &mut Room<'_>,
        cluster: GuestCluster,
        pair: &Pair,
        ordered: bool,
    ) {
        self.slice.note_order(ordered);
        let mut log = room.log();
        log.note(cluster, pair.raw, pair.bitmap());
        let _noted = log.commit();
        let taken = self
            .slice
            .publish_pair(self.at(cluster), pair.raw, pair.bitmap());
        self.image.tables.note_memory(taken);
        self.image.tables.mark_dirty(&self.slice, ordered);
    }

    /// How much of a range is free, from its start on.
    pub(super) fn free(&self, purpose: Purpose, range: &Range<u64>) -> Range<u64> {
        let in_the_way = |held: &&Reserved| held.is_in_the_way(purpose, range);
        let held = self.reserved.iter().filter(in_the_way);
        let end = held.map(|held| held.range.start).min();
        range.start..end.map_or(range.end, |end| end.max(range.start))
    }

    /// Reserves a range that is free.
    pub(super) fn reserve(mut self, purpose: Purpose, range: Range<u64>) -> Reservation<'a> {
        debug_assert_eq!(self.free(purpose, &range), range);
        self.reserved.push(Reserved {
            purpose,
            range: range.clone(),
            waiters: Vec::new(),
        });
        Reservation {
            image: self.image,
            slice: self.slice,
            purpose,
            range,
        }
    }
}

/// Subclusters of one slice, or the host clusters of some, that only this writer changes. Dropping it ends
/// that. The slice stays in memory.
pub(super) struct Reservation<'a> {
    image: &'a Qcow2,
    slice: Pinned,
    purpose: Purpose,
    range: Range<u64>,
}

impl<'a> Reservation<'a> {
    /// What is reserved: subclusters, counted from the disk's beginning.
    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Locks the pairs of the slice, which is in memory.
    pub(super) fn changes(&self) -> Option<Changes<'a>> {
        self.image.changes(self.slice.index)
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut reserved = lock(self.image.reservations.of(self.slice.index));
        let mine = |held: &Reserved| held.purpose == self.purpose && held.range == self.range;
        let waiters = match reserved.iter().position(mine) {
            Some(at) => reserved.swap_remove(at).waiters,
            None => Vec::new(),
        };
        drop(reserved);
        waiters.into_iter().for_each(Waker::wake);
    }
}
