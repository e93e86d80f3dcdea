//! Records of incomplete clusters: copy-on-write that was put off.
//!
//! An incomplete cluster has a new host cluster that holds the sectors which the guest has written since;
//! the others still show what the old entry says. That is known in memory only: the L2 entry is a marker
//! with the number of a record ([`entry::incomplete`](super::entry::incomplete)).
//!
//! **Who may do what.** Readers look at a record without a lock, between two awaits, as at a slice; so a
//! retired record is used again only when every reactor has passed a quiescent point. A writer to the new
//! cluster *enters* the record and *leaves* it when its data is written and its sectors are marked. To
//! replace the marker one holds the claim of the entry, *closes* the record (nobody enters any more) and
//! waits until all writers have left: what is done then can not overwrite what one of them completes.
//! A closed record is opened again, or retired, before its claim ends, so that who finds it closed waits for
//! the claim.
//!
//! **Bounds.** There are so many records at most, of so many bytes of clusters, that completing them all is
//! a matter of some milliseconds: a flush does it. Most of them are for who is likely to write the rest of the
//! cluster as well: a write to the cluster behind one that was new a short while ago. Other writes, a random
//! writer's, get a few: their copying is only put off, and to put it off costs one write more. Where these are
//! used up a write copies at once, so that a random writer pays for what it does while it does it, and a
//! flush does not pay for it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::journal::{Memory, Noted, step};
use super::slice::Pinned;
use super::tables::lock;
use super::units::{Geometry, GuestCluster, HostOffset};
use crate::reactor::{Epoch, Io};

/// Grain at which a cluster is incomplete, in bytes: the guest's sector.
pub(super) const SECTOR: u64 = 512;

/// Incomplete clusters, at most, and their bytes.
const MAX_RECORDS: u64 = 1024;
const MAX_BYTES: u64 = 64 << 20;

/// One in so many records is for writes that nothing speaks for being followed by others.
const LONE_SHARE: usize = 16;
/// New clusters that are remembered, to tell who writes one after the other.
const RECENT: usize = 256;

/// In a record's state, above the number of writers: nobody enters.
const CLOSED: u32 = 1 << 31;

/// Called when it is time to complete some clusters ahead of need.
type Ahead = Box<dyn Fn(&Io) + Send + Sync>;

/// The records of one image.
pub(super) struct Records {
    slots: Box<[Slot]>,
    /// A bit for each sector: written to the new cluster. `words` for each slot.
    written: Box<[AtomicU64]>,
    words: usize,
    sectors: u32,
    /// Records in use, at most. There are more slots: retired ones wait for requests to end.
    limit: usize,
    /// Those of them that lone writes may use.
    lone_limit: usize,
    book: Mutex<Book>,
    /// No record is made: who copies, copies at once.
    eager: AtomicBool,
    ahead: OnceLock<Ahead>,
    /// Where the records are kept so that they survive this process; nothing is read from there.
    kept: OnceLock<Memory>,
    /// Held by who completes clusters ahead of need. True: nobody does that any more.
    pub(super) filling: async_lock::Mutex<bool>,
}

/// What readers look at. Written before the marker is published, and not changed after, but for the last two.
#[derive(Debug, Default)]
struct Slot {
    guest: AtomicU64,
    /// The new cluster's host offset; bit 0: it reads as zeros where nothing was written.
    host: AtomicU64,
    old: AtomicU64,
    /// Sectors not written.
    missing: AtomicU32,
    state: AtomicU32,
}

#[derive(Debug, Default)]
struct Book {
    free: Vec<u32>,
    /// Retired, oldest first.
    dead: VecDeque<(Epoch, u32)>,
    /// In use, by guest cluster.
    open: BTreeMap<u64, Open>,
    /// How many of them are lone writes'.
    lone: usize,
    /// Guest clusters that became new lately, but for those that were written as a whole; the next goes to `next`.
    recent: Vec<u64>,
    next: usize,
    /// Who waits for a record's writers to leave.
    closers: HashMap<u32, Waker>,
}

#[derive(Debug)]
struct Open {
    since: Instant,
    is_lone: bool,
    /// A slice with a marker is not thrown out.
    _slice: Pinned,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records")
            .field("limit", &self.limit)
            .field("book", &self.book)
            .finish_non_exhaustive()
    }
}

/// A cluster of which a record is to be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct New {
    pub(super) guest: GuestCluster,
    /// Its new cluster, and whether that reads as zeros.
    pub(super) host: HostOffset,
    pub(super) zeroed: bool,
    /// Its old entry.
    pub(super) old: u64,
    /// Nothing speaks for its writer going on behind it.
    pub(super) is_lone: bool,
}

/// Records of clusters of `1 << cluster_bits` bytes, at most.
pub(super) fn most_records(cluster_bits: u32) -> usize {
    MAX_RECORDS.min(MAX_BYTES >> cluster_bits) as usize
}

/// Words of 64 bits that take a bit for each sector of a cluster.
pub(super) fn words_of(cluster_bits: u32) -> usize {
    (1usize << cluster_bits).div_ceil(SECTOR as usize * u64::BITS as usize)
}

impl Records {
    /// Room for records, each of which keeps a slice in memory: of `slices` that may be, half at most.
    pub(super) fn new(g: &Geometry, slices: usize) -> Self {
        let limit = most_records(g.cluster_bits).min(slices / 2);
        let sectors = (g.cluster_size() / SECTOR) as u32;
        let words = words_of(g.cluster_bits);
        let count = limit * 2;
        Self {
            slots: (0..count).map(|_| Slot::default()).collect(),
            written: (0..count * words).map(|_| AtomicU64::new(0)).collect(),
            words,
            sectors,
            limit,
            lone_limit: limit.div_ceil(LONE_SHARE),
            book: Mutex::new(Book {
                free: (0..count as u32).rev().collect(),
                ..Book::default()
            }),
            eager: AtomicBool::new(false),
            ahead: OnceLock::new(),
            kept: OnceLock::new(),
            filling: async_lock::Mutex::new(false),
        }
    }

    /// Keeps the records in the memory of a journal, too. Before the first one is made.
    pub(super) fn keep_in(&self, memory: Memory) {
        let _first = self.kept.set(memory);
    }

    /// Says what to call when records get scarce. Once.
    pub(super) fn set_ahead(&self, ahead: Ahead) {
        let _first = self.ahead.set(ahead);
    }

    /// Makes no more records, or does again.
    pub(super) fn set_eager(&self, eager: bool) {
        // Under the lock: who was there before has made its record by now.
        let _book = lock(&self.book);
        self.eager.store(eager, Ordering::Relaxed);
    }

    /// True if no records are made.
    pub(super) fn is_eager(&self) -> bool {
        self.eager.load(Ordering::Relaxed)
    }

    /// A record with one writer, not published yet; none if there is no room for it.
    pub(super) fn make(&self, io: &Io, slice: Pinned, new: New) -> Option<Writing<'_>> {
        let mut book = lock(&self.book);
        let is_full = book.open.len() >= self.limit || new.is_lone && book.lone >= self.lone_limit;
        if self.eager.load(Ordering::Relaxed) || is_full {
            return None;
        }
        let index = book.take_slot(io)?;
        book.insert(new.guest, slice, new.is_lone);
        let scarce = self.is_scarce(&book);
        drop(book);

        // Nobody looks at a slot that is free.
        let slot = &self.slots[index as usize];
        slot.guest.store(new.guest.0, Ordering::Relaxed);
        let host = new.host.0 | u64::from(new.zeroed);
        slot.host.store(host, Ordering::Relaxed);
        slot.old.store(new.old, Ordering::Relaxed);
        slot.missing.store(self.sectors, Ordering::Relaxed);
        slot.state.store(1, Ordering::Relaxed);
        for word in self.bits(index) {
            word.store(0, Ordering::Relaxed);
        }
        if let Some(kept) = self.kept.get() {
            kept.prepare(index, new.guest.0, new.host.0, new.old);
        }
        if let (true, Some(ahead)) = (scarce, self.ahead.get()) {
            if self.filling.try_lock().is_some() {
                ahead(io);
            }
        }
        Some(Writing {
            records: self,
            index,
            is_published: false,
        })
    }

    /// True if a write that begins in `first`, an old cluster, and makes `last` new is likely to be followed by
    /// others behind it: what lies before it became new lately. `last` is remembered as new.
    pub(super) fn is_followed(&self, first: GuestCluster, last: GuestCluster) -> bool {
        let mut book = lock(&self.book);
        let before = first.0.checked_sub(1);
        let is_followed = before.is_some_and(|it| book.recent.contains(&it));
        book.remember(last);
        is_followed
    }

    fn is_scarce(&self, book: &Book) -> bool {
        book.open.len() > self.limit / 2 || book.lone > self.lone_limit / 2
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    fn bits(&self, index: u32) -> &[AtomicU64] {
        let first = index as usize * self.words;
        self.written.get(first..first + self.words).unwrap_or(&[])
    }

    // ---- looking, between two awaits ----

    /// The entry that the cluster had.
    pub(super) fn old(&self, index: u32) -> u64 {
        self.slot(index)
            .map_or(0, |slot| slot.old.load(Ordering::Relaxed))
    }

    /// The new cluster.
    pub(super) fn host(&self, index: u32) -> HostOffset {
        let host = self.slot(index).map(|s| s.host.load(Ordering::Relaxed));
        HostOffset(host.unwrap_or(0) & !1)
    }

    /// Whether the byte `skip` bytes into the cluster was written to the new one, and for how many bytes from
    /// there on, at most `len` and not beyond the cluster, that is the same.
    pub(super) fn extent(&self, index: u32, skip: u64, len: u64) -> (bool, u64) {
        let (written, end) = self.run(index, (skip / SECTOR) as u32);
        (written, (u64::from(end) * SECTOR - skip).min(len))
    }

    /// Whether a sector was written, and the first one behind it of which the contrary is true.
    fn run(&self, index: u32, sector: u32) -> (bool, u32) {
        let bits = self.bits(index);
        // Acquire: who sees the bit finds the data.
        let word = |n: usize| bits.get(n).map_or(0, |word| word.load(Ordering::Acquire));
        let mut n = (sector / u64::BITS) as usize;
        let first = word(n) >> (sector % u64::BITS);
        let written = first & 1 == 1;
        // Ones where it is the contrary.
        let flip = |word: u64| if written { !word } else { word };
        let mut unlike = flip(first) & (u64::MAX >> (sector % u64::BITS));
        let mut at = sector;
        while unlike == 0 {
            n += 1;
            at = n as u32 * u64::BITS;
            if at >= self.sectors {
                return (written, self.sectors);
            }
            unlike = flip(word(n));
        }
        (written, (at + unlike.trailing_zeros()).min(self.sectors))
    }

    /// Enters a record to write to the new cluster; none if it is closed.
    pub(super) fn enter(&self, index: u32) -> Option<Writing<'_>> {
        let entered =
            self.slot(index)?
                .state
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, |state| {
                    (state & CLOSED == 0).then_some(state + 1)
                });
        // Not made in vain: dropped, it would leave.
        entered.is_ok().then(|| Writing {
            records: self,
            index,
            is_published: true,
        })
    }

    /// True if all sectors were written.
    pub(super) fn is_whole(&self, index: u32) -> bool {
        self.slot(index)
            .is_some_and(|slot| slot.missing.load(Ordering::Acquire) == 0)
    }

    // ---- closing, by who holds the claim ----

    /// Closes a record, and waits until its writers have left.
    pub(super) async fn close(&self, index: u32) -> Closing<'_> {
        if let Some(slot) = self.slot(index) {
            slot.state.fetch_or(CLOSED, Ordering::Acquire);
        }
        let closing = Closing {
            records: self,
            index,
        };
        poll_fn(|cx| {
            // Locked, so that the last one to leave finds the waker or has left before.
            let mut book = lock(&self.book);
            if self.writers(index) == 0 {
                book.closers.remove(&index);
                return Poll::Ready(());
            }
            book.closers.insert(index, cx.waker().clone());
            Poll::Pending
        })
        .await;
        closing
    }

    /// Closes a record whose sectors are all written, if nobody writes to it.
    pub(super) fn close_whole(&self, index: u32) -> Option<Closing<'_>> {
        let slot = self.slot(index)?;
        let closed = self.is_whole(index)
            && slot
                .state
                .compare_exchange(0, CLOSED, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        closed.then(|| Closing {
            records: self,
            index,
        })
    }

    fn writers(&self, index: u32) -> u32 {
        let state = self.slot(index).map(|s| s.state.load(Ordering::Acquire));
        state.unwrap_or(0) & !CLOSED
    }

    // ---- all of them ----

    /// Clusters that are incomplete, ascending; of those at least as old as `age`.
    pub(super) fn list(&self, age: Duration) -> Vec<GuestCluster> {
        let book = lock(&self.book);
        let all = book.open.iter();
        if age.is_zero() {
            return all.map(|(guest, _)| GuestCluster(*guest)).collect();
        }
        let now = Instant::now();
        all.filter(|(_, open)| open.is_of(age, now))
            .map(|(guest, _)| GuestCluster(*guest))
            .collect()
    }

    /// The older half of the records, if they are scarce; of those of lone writes, if only these are. Guest
    /// clusters, ascending.
    pub(super) fn older_half(&self) -> Vec<GuestCluster> {
        let book = lock(&self.book);
        if !self.is_scarce(&book) {
            return Vec::new();
        }
        let all = book.open.len() > self.limit / 2;
        let which = book.open.iter().filter(|(_, open)| all || open.is_lone);
        let mut ages: Vec<(Instant, u64)> = which.map(|(g, o)| (o.since, *g)).collect();
        ages.sort_unstable();
        ages.truncate(ages.len().div_ceil(2));
        let mut clusters: Vec<GuestCluster> =
            ages.into_iter().map(|(_, g)| GuestCluster(g)).collect();
        clusters.sort_unstable();
        clusters
    }

    /// True if there is a record of at least this age.
    pub(super) fn is_due(&self, age: Duration) -> bool {
        let now = Instant::now();
        let book = lock(&self.book);
        book.open.values().any(|open| open.is_of(age, now))
    }

    /// Records in use.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.book).open.len()
    }

    /// Records in use, at most.
    #[cfg(test)]
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Those of lone writes.
    #[cfg(test)]
    pub(super) fn lone_limit(&self) -> usize {
        self.lone_limit
    }
}

impl Open {
    fn is_of(&self, age: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= age
    }
}

impl Book {
    fn insert(&mut self, guest: GuestCluster, slice: Pinned, is_lone: bool) {
        let open = Open {
            since: Instant::now(),
            is_lone,
            _slice: slice,
        };
        self.lone += usize::from(is_lone);
        self.open.insert(guest.0, open);
    }

    /// What it returns is to be dropped without the lock.
    fn remove(&mut self, guest: u64) -> Option<Open> {
        let open = self.open.remove(&guest)?;
        self.lone -= usize::from(open.is_lone);
        Some(open)
    }

    fn remember(&mut self, cluster: GuestCluster) {
        let next = self.next % RECENT;
        match self.recent.get_mut(next) {
            Some(place) => *place = cluster.0,
            None => self.recent.push(cluster.0),
        }
        self.next = next + 1;
    }

    fn take_slot(&mut self, io: &Io) -> Option<u32> {
        if self.free.is_empty() {
            while let Some((epoch, index)) = self.dead.front().copied() {
                if !io.epochs().passed(epoch) {
                    break;
                }
                self.dead.pop_front();
                self.free.push(index);
            }
        }
        self.free.pop()
    }
}

/// A writer in a record. Dropped, it has left.
#[derive(Debug)]
pub(super) struct Writing<'a> {
    records: &'a Records,
    index: u32,
    is_published: bool,
}

impl Writing<'_> {
    /// The record's number, to be published as a marker: from then on the record stays when this is dropped.
    /// It counts in the journal from here on.
    pub(super) fn publish(&mut self, noted: &mut Noted<'_, '_>) -> u32 {
        noted.begin_record(self.index);
        self.is_published = true;
        self.index
    }

    /// Notes that `len` bytes from `skip` bytes into the cluster on, whole sectors, hold what the guest
    /// wrote.
    pub(super) fn wrote(&self, skip: u64, len: u64) {
        let bits = self.records.bits(self.index);
        let (mut at, end) = (skip / SECTOR, (skip + len) / SECTOR);
        let mut new = 0;
        while at < end {
            let (word, bit) = (at / 64, at % 64);
            let count = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            if let Some(kept) = self.records.kept.get() {
                // What others have seen must not be gone when this process is: before the bit that they see.
                kept.mark(self.index, word as usize, mask);
                step!("journal-record-marked");
            }
            if let Some(word) = bits.get(word as usize) {
                // Release: who sees the bit finds the data.
                new += (!word.fetch_or(mask, Ordering::AcqRel) & mask).count_ones();
            }
            at += count;
        }
        if let Some(slot) = self.records.slot(self.index) {
            slot.missing.fetch_sub(new, Ordering::AcqRel);
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let Some(slot) = self.records.slot(self.index) else {
            return;
        };
        if !self.is_published {
            let mut book = lock(&self.records.book);
            let guest = slot.guest.load(Ordering::Relaxed);
            let open = book.remove(guest);
            book.free.push(self.index);
            drop((book, open));
            return;
        }
        // Release: who closes sees the marks.
        if slot.state.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1 {
            let waker = lock(&self.records.book).closers.remove(&self.index);
            waker.into_iter().for_each(Waker::wake);
        }
    }
}

/// A closed record without writers. Dropped, it is open again.
#[derive(Debug)]
pub(super) struct Closing<'a> {
    records: &'a Records,
    index: u32,
}

impl Closing<'_> {
    /// The new cluster.
    pub(super) fn host(&self) -> HostOffset {
        self.records.host(self.index)
    }

    /// The old entry.
    pub(super) fn old(&self) -> u64 {
        self.records.old(self.index)
    }

    /// The new cluster reads as zeros where nothing was written.
    pub(super) fn is_zeroed(&self) -> bool {
        let slot = self.records.slot(self.index);
        slot.is_some_and(|slot| slot.host.load(Ordering::Relaxed) & 1 == 1)
    }

    /// The parts of the cluster that were not written: offset in it, and length, in bytes.
    pub(super) fn missing(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut sector = 0;
        std::iter::from_fn(move || {
            while sector < self.records.sectors {
                let start = sector;
                let (written, end) = self.records.run(self.index, start);
                sector = end;
                if !written {
                    let bytes = |sectors: u32| u64::from(sectors) * SECTOR;
                    return Some((bytes(start), bytes(end - start)));
                }
            }
            None
        })
    }

    /// Gives the record up. After the entry that replaced its marker was published.
    pub(super) fn retire(self, io: &Io, noted: &mut Noted<'_, '_>) {
        let records = self.records;
        noted.end_record(self.index);
        let guest = records
            .slot(self.index)
            .map(|slot| slot.guest.load(Ordering::Relaxed));
        let mut book = lock(&records.book);
        // It stays closed, for those who have seen the marker.
        book.dead.push_back((io.epochs().retire(), self.index));
        let open = guest.and_then(|guest| book.remove(guest));
        drop((book, open));
        std::mem::forget(self);
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.records.slot(self.index) {
            slot.state.fetch_and(!CLOSED, Ordering::Release);
        }
    }
}
