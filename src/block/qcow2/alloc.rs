//! Host clusters: handed out from a worker's own arena, taken back through limbo.
//!
//! (qcow2.rst, "Host cluster management".) What holds at any moment, also after a loss of power:
//!
//! - A cluster that was handed out has refcount 1 on disk, durably; it reads as zeros, durably, if it
//!   says so. Both by the one flush of the refill it came with.
//! - A freed cluster keeps its refcount until no metadata on disk points at it and no running request
//!   may still look at it (`limbo`). So refcounts on disk are too high at worst: a leak.
//!
//! Refills and everything else that is slow run under one lock (`refill`), never on a request's path
//! unless its arena is dry.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use super::arena::Arena;
use super::fresh::Fresh;
use super::header::{Header, autoclear};
use super::leaks::Leaks;
use super::limbo::{Limbo, Mark};
use super::reftable::Refcounts;
use super::runs::{FreeRuns, Reserved, Run, merge};
use super::units::HostCluster;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::{Epochs, Io};

/// An arena holds at most this many bytes, and this many clusters. The former is what a power loss leaks, the rest
/// of an arena; and in the time that half of it lasts a journalling file system commits a transaction.
const MAX_ARENA_BYTES: u64 = 64 << 20;
const MAX_ARENA_CLUSTERS: u64 = 1024;

/// The allocator of one image that is open for writing. Shared by all workers.
pub struct Allocator {
    pub(super) storage: Arc<Storage>,
    pub(super) cluster_bits: u32,
    pub(super) max_arena: u64,
    arenas: Box<[Arena]>,
    pub(super) slow: async_lock::Mutex<Slow>,
    limbo: Limbo,
    /// Allocated clusters that nobody owns: given back, or of an attempt that failed.
    pub(super) orphans: Mutex<Vec<Run>>,
    pub(super) reserved: Mutex<Reserved>,
    pub(super) header: Header,
    leaks: Leaks,
    closed: AtomicBool,
    settles: Settles,
    /// What a task found to be wrong that nobody waited for.
    damage: Mutex<Option<Error>>,
}

/// What refills, settling and closing work on, one at a time.
pub(super) struct Slow {
    pub(super) counts: Refcounts,
    /// Freed runs, as far as known.
    pub(super) free: FreeRuns,
    /// Where the scan for free clusters goes on.
    pub(super) cursor: u64,
    /// From here on every cluster was free when the image was opened, or was appended since.
    pub(super) frontier: u64,
    /// The frontier at open: the file is not cut below it.
    pub(super) floor: u64,
    /// A scan of everything may find something.
    pub(super) maybe_free: bool,
    /// The header says, durably, that clusters are taken ahead of need.
    pub(super) marked: bool,
}

impl Slow {
    /// Notes clusters whose refcount became 0.
    pub(super) fn note_free(&mut self, run: Run) {
        self.maybe_free = true;
        if run.end() == self.frontier {
            self.frontier = run.first;
        } else if !self.free.add(run) {
            self.cursor = self.cursor.min(run.first);
        }
    }
}

impl std::fmt::Debug for Allocator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Allocator")
            .field("path", &self.storage.path())
            .field("arenas", &self.arenas)
            .finish_non_exhaustive()
    }
}

/// Locks a mutex whose holders can not leave it half-way.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Allocator {
    /// Reads and checks the refcount table; refcount blocks are read when they are needed. Serves
    /// workers 0 to `workers` ([`Io::worker`]).
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a table or block outside the file or over other metadata.
    pub async fn open(
        io: &Io,
        storage: &Arc<Storage>,
        header: &Header,
        workers: usize,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let file_end = geometry.clusters(storage.len());
        let mut reserved = Reserved::default();
        let counts = Refcounts::open(io, storage, header, file_end, &mut reserved).await?;
        let leaks = Leaks::new(header, storage);
        reserved.runs().for_each(|run| leaks.touch(run));
        let max_arena = (MAX_ARENA_BYTES >> geometry.cluster_bits).clamp(1, MAX_ARENA_CLUSTERS);
        // What the table does not cover is free by definition, whatever the file holds there.
        let frontier = file_end.min(counts.covered());
        Ok(Self {
            storage: storage.clone(),
            cluster_bits: geometry.cluster_bits,
            max_arena,
            arenas: (0..=workers).map(|_| Arena::new(max_arena)).collect(),
            slow: async_lock::Mutex::new(Slow {
                counts,
                free: FreeRuns::default(),
                cursor: 0,
                frontier,
                floor: frontier,
                maybe_free: true,
                marked: header.autoclear & autoclear::ARENAS != 0,
            }),
            limbo: Limbo::default(),
            orphans: Mutex::default(),
            reserved: Mutex::new(reserved),
            header: header.clone(),
            leaks,
            closed: AtomicBool::new(false),
            settles: Settles::default(),
            damage: Mutex::default(),
        })
    }

    /// Keeps clusters from ever being handed out: the L1 table, and L2 tables as far as they are known.
    /// The header, the refcount table and its blocks are reserved already.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if other metadata is there.
    pub fn reserve_metadata(
        &self,
        first: HostCluster,
        count: u64,
        what: &'static str,
    ) -> Result<()> {
        self.leaks.touch(Run::new(first.0, count));
        let clash = lock(&self.reserved).add(Run::new(first.0, count), what);
        clash.map_err(|there| self.corrupt(first.0, format!("the {what} overlaps the {there}")))
    }

    /// Ends a reservation, of all or some of the clusters of one call of [`Allocator::reserve_metadata`].
    pub fn release_metadata(&self, first: HostCluster, count: u64) {
        lock(&self.reserved).remove(Run::new(first.0, count));
    }

    /// Ends the reservation of a part of what was reserved.
    pub(super) fn release_part(&self, first: HostCluster, count: u64) {
        lock(&self.reserved).cut(Run::new(first.0, count));
    }

    /// What reserved metadata is in these clusters, if any is.
    pub fn is_metadata(&self, first: HostCluster, count: u64) -> Option<&'static str> {
        let clash = lock(&self.reserved).clash(Run::new(first.0, count));
        clash.map(|(_, what)| what)
    }

    pub(super) fn corrupt(&self, cluster: u64, what: String) -> Error {
        let offset = cluster.checked_shl(self.cluster_bits);
        Error::image(ErrorKind::Corrupt, self.storage.path(), offset, what)
            .hint("check the image with: qemu-img check")
    }

    fn closed(&self) -> Error {
        let what = "the image is being closed";
        Error::image(ErrorKind::NotAllowed, self.storage.path(), None, what)
    }

    // ---- handing out ----

    /// Up to `want` neighbouring clusters with durable refcount 1, from the arena of the calling
    /// worker: no lock, no I/O; only where the arena is dry it waits for a refill. A refill is started
    /// ahead of need, as a task of `io`.
    ///
    /// # Errors
    /// Those of the refill that was waited for: [`ErrorKind::NoSpace`] when not even one cluster can
    /// be had, [`ErrorKind::Corrupt`] when a free cluster turns out to hold metadata.
    #[inline]
    pub async fn allocate(self: &Arc<Self>, io: &Io, want: u64) -> Result<Fresh<'_>> {
        let worker = io.worker();
        let Some(arena) = self.arenas.get(worker) else {
            let what = format!("worker {worker} is not one of the image's");
            return Err(Error::image(
                ErrorKind::NotAllowed,
                self.storage.path(),
                None,
                what,
            ));
        };
        loop {
            if let Some(fresh) = self.allocate_at_once(io, want) {
                return Ok(fresh);
            }
            let rounds = arena.rounds();
            self.start_refill(io, worker);
            match arena.refilled(rounds).await {
                Err(error) if arena.len() == 0 => return Err(error),
                _ => {}
            }
        }
    }

    /// As [`Allocator::allocate`], where the arena has something.
    #[inline]
    pub(super) fn allocate_at_once(self: &Arc<Self>, io: &Io, want: u64) -> Option<Fresh<'_>> {
        let worker = io.worker();
        let arena = self.arenas.get(worker)?;
        let stock = arena.take(want.max(1))?;
        if arena.is_low() {
            self.start_refill(io, worker);
        }
        Some(Fresh::new(self, arena, stock))
    }

    #[cold]
    fn start_refill(self: &Arc<Self>, io: &Io, worker: usize) {
        let arena = &self.arenas[worker];
        if !arena.begin_refill() {
            return;
        }
        let what = "the worker ended while it refilled its arena";
        let cancelled = Error::image(ErrorKind::Io, self.storage.path(), None, what);
        let mut refill = Refill {
            allocator: self.clone(),
            worker,
            outcome: Err(cancelled),
        };
        if self.closed.load(Ordering::SeqCst) {
            refill.outcome = Err(self.closed());
            return;
        }
        let io = io.clone();
        let _task = io.clone().spawn(async move {
            let allocator = refill.allocator.clone();
            let arena = &allocator.arenas[worker];
            let size = arena.size();
            let result = allocator.refill(&io, size).await;
            refill.outcome = result.map(|stock| arena.refill(&stock, size, allocator.max_arena));
            if let Err(error) = &refill.outcome {
                log::debug!("no clusters for worker {worker}: {error}");
            }
        });
    }

    // ---- taking back ----

    /// Puts clusters into limbo that in-memory metadata does not point at any more: call it after
    /// unlinking them. Each loses one reference when it leaves limbo.
    pub fn free(&self, io: &Io, first: HostCluster, count: u64) {
        if count > 0 {
            self.leaks.touch(Run::new(first.0, count));
            self.limbo
                .add(Run::new(first.0, count), io.epochs().retire());
        }
    }

    /// The frees so far. Take it before a flush copies the metadata that it is going to write.
    pub fn mark(&self) -> Mark {
        self.limbo.mark()
    }

    /// Everything that was freed before `mark` is unlinked durably: what no request may still look at
    /// leaves limbo; its refcounts go down (in memory), and clusters without references are discarded
    /// and may be used again. What is left waits for a later call, as does everything after a failure.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a cluster has fewer references than were freed; the others are
    /// processed. Those of reading and writing refcount blocks.
    pub async fn settle(&self, io: &Io, mark: Mark) -> Result<()> {
        let epochs: &Epochs = io.epochs();
        let runs = self.limbo.take(mark, |epoch| epochs.passed(epoch));
        self.release(io, runs).await
    }

    /// As [`Allocator::settle`], the slow part as a task of `io`: whoever waits for a flush need not wait
    /// for holes to be punched. What fails is tried again with a later call.
    pub fn settle_later(self: &Arc<Self>, io: &Io, mark: Mark) {
        let epochs: &Epochs = io.epochs();
        let runs = self.limbo.take(mark, |epoch| epochs.passed(epoch));
        if runs.is_empty() {
            return;
        }
        lock(&self.settles.0).0 += 1;
        let mut later = SettleLater {
            allocator: self.clone(),
            runs,
        };
        let io = io.clone();
        let _task = io.clone().spawn(async move {
            let runs = std::mem::take(&mut later.runs);
            if let Err(error) = later.allocator.release(&io, runs).await {
                log::warn!("giving freed clusters back: {error}");
                if error.kind() == ErrorKind::Corrupt {
                    *lock(&later.allocator.damage) = Some(error);
                }
            }
        });
    }

    /// What [`Allocator::settle_later`] found to be wrong with the image's metadata, once.
    pub(super) fn take_damage(&self) -> Option<Error> {
        lock(&self.damage).take()
    }

    /// Waits until no cluster is on its way out of limbo; false: none was.
    pub(super) async fn settled(&self) -> bool {
        let mut waited = false;
        poll_fn(|cx| {
            let mut settles = lock(&self.settles.0);
            if settles.0 == 0 {
                return Poll::Ready(());
            }
            waited = true;
            if !settles.1.iter().any(|w| w.will_wake(cx.waker())) {
                settles.1.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        waited
    }

    /// Has the header say that clusters were taken ahead of need, or entries put into a journal.
    pub(super) async fn mark_in_use(&self, io: &Io) -> Result<()> {
        let mut slow = self.slow.lock().await;
        if !slow.marked {
            self.header.mark_arenas(io, &self.storage, true).await?;
            self.storage.flush(io).await?;
            slow.marked = true;
        }
        Ok(())
    }

    /// The search for clusters that a crash has leaked.
    pub(super) fn leaks(&self) -> &Leaks {
        &self.leaks
    }

    pub(super) async fn release(&self, io: &Io, runs: Vec<Run>) -> Result<()> {
        if runs.is_empty() {
            return Ok(());
        }
        let mut settling = Settling {
            limbo: &self.limbo,
            todo: runs,
            sole: Vec::new(),
        };
        let mut wrong = None;
        {
            let mut slow = self.slow.lock().await;
            while let Some(run) = settling.todo.pop() {
                self.drop_shared(io, &mut slow, run, &mut settling, &mut wrong)
                    .await?;
            }
        }
        let before: u64 = settling.sole.iter().map(|run| run.count).sum();
        let mut sole = settling.sole.clone();
        merge(&mut sole);
        if before != sole.iter().map(|run| run.count).sum::<u64>() {
            let first = sole.first().map_or(0, |run| run.first);
            wrong = wrong.or_else(|| Some(self.corrupt(first, "clusters were freed twice".into())));
        }
        settling.sole.clone_from(&sole);
        // Still allocated, and nobody's: the time to punch holes without the lock.
        for run in &sole {
            self.discard(io, *run).await;
        }
        let mut slow = self.slow.lock().await;
        while let Some(run) = settling.sole.pop() {
            let mut left = run;
            for (_, part) in run.by_block(slow.counts.block_bits()) {
                let drop_one = |_, count: u64| count.saturating_sub(1);
                let dropped = slow.counts.update(io, &self.storage, part, drop_one).await;
                if let Err(error) = dropped {
                    settling.sole.push(left);
                    return Err(error);
                }
                left = Run::new(part.end(), run.end() - part.end());
            }
            slow.note_free(run);
        }
        wrong.map_or(Ok(()), Err)
    }

    /// Drops one reference of clusters that have several; those with one go to `settling.sole`.
    async fn drop_shared(
        &self,
        io: &Io,
        slow: &mut Slow,
        run: Run,
        settling: &mut Settling<'_>,
        wrong: &mut Option<Error>,
    ) -> Result<()> {
        if let Some((cluster, what)) = lock(&self.reserved).clash(run) {
            *wrong = Some(self.corrupt(cluster, format!("a freed cluster holds the {what}")));
            return Ok(());
        }
        let mut left = run;
        for (_, part) in run.by_block(slow.counts.block_bits()) {
            let mut unreferenced = None;
            let sole = &mut settling.sole;
            let change = |cluster, count| match count {
                0 => {
                    unreferenced = Some(cluster);
                    0
                }
                1 => {
                    match sole.last_mut() {
                        Some(last) if last.end() == cluster => last.count += 1,
                        _ => sole.push(Run::new(cluster, 1)),
                    }
                    1
                }
                _ => count - 1,
            };
            if let Err(error) = slow.counts.update(io, &self.storage, part, change).await {
                settling.todo.push(left);
                return Err(error);
            }
            if let Some(cluster) = unreferenced {
                let what = "a freed cluster has refcount 0 already".into();
                *wrong = Some(self.corrupt(cluster, what));
            }
            left = Run::new(part.end(), run.end() - part.end());
        }
        Ok(())
    }

    /// A hint to the file system; nothing depends on it.
    pub(super) async fn discard(&self, io: &Io, run: Run) {
        let (at, len) = (
            run.first << self.cluster_bits,
            run.count << self.cluster_bits,
        );
        if let Err(error) = self.storage.discard(io, at, len).await {
            log::debug!("freed clusters keep their space: {error}");
        }
    }

    /// Writes the refcounts that changed, without a flush. Unwritten ones are too high, never too low, so
    /// a refill under way, which holds them and writes them itself, is not waited for.
    ///
    /// # Errors
    /// Those of writing; nothing is lost.
    pub async fn write_back(&self, io: &Io) -> Result<()> {
        match self.slow.try_lock() {
            Some(mut slow) => slow.counts.write_dirty(io, &self.storage).await,
            None => Ok(()),
        }
    }

    /// Gives the arenas and what is durably freed back, writes all refcounts, cuts free clusters off
    /// the file's end, and flushes. No request runs, and none comes: [`Allocator::allocate`] fails from
    /// here on. Waits for refills and settling; their reactors must go on turning or be closed. What was
    /// freed after the last settled flush stays allocated: the metadata on disk may point at it.
    ///
    /// # Errors
    /// The first that occurs; the rest is done all the same. May be called again.
    pub async fn close(&self, io: &Io) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        self.leaks.cancel();
        for arena in &self.arenas {
            arena.idle().await;
            lock(&self.orphans).append(&mut arena.drain());
        }
        self.settled().await;
        let settled = self.release(io, self.limbo.take_durable()).await;
        let mut slow = self.slow.lock().await;
        let closed = self.close_refcounts(io, &mut slow).await;
        match self.limbo.len() {
            0 => {}
            n => log::warn!(
                "{}: {n} freed clusters stay allocated: their unlinking could not be written",
                self.storage.path().display()
            ),
        }
        let closed = settled.and(closed);
        if closed.is_ok() && slow.marked && self.limbo.len() == 0 && self.leaks.is_done() {
            self.header.mark_arenas(io, &self.storage, false).await?;
            self.storage.flush(io).await?;
            slow.marked = false;
        }
        closed
    }

    /// A cluster's refcount as of now: what was freed and is in limbo still counts.
    ///
    /// # Errors
    /// Those of reading its refcount block.
    pub async fn refcount(&self, io: &Io, cluster: HostCluster) -> Result<u64> {
        let mut slow = self.slow.lock().await;
        slow.counts.get(io, &self.storage, cluster.0).await
    }

    /// Clusters in limbo.
    pub fn in_limbo(&self) -> u64 {
        self.limbo.len()
    }

    #[cfg(test)]
    pub(super) fn in_arena(&self, worker: usize) -> u64 {
        self.arenas[worker].len()
    }
}

/// A refill under way; when it ends, by whatever means, those who wait are told.
struct Refill {
    allocator: Arc<Allocator>,
    worker: usize,
    outcome: Result<()>,
}

impl Drop for Refill {
    fn drop(&mut self) {
        let failed = std::mem::replace(&mut self.outcome, Ok(())).err();
        self.allocator.arenas[self.worker].refill_ended(failed);
    }
}

/// Tasks that settle: how many there are, and who waits for their end.
#[derive(Default)]
struct Settles(Mutex<(usize, Vec<Waker>)>);

/// Runs that a task is going to release; if it is dropped before it began, they go back to limbo.
struct SettleLater {
    allocator: Arc<Allocator>,
    runs: Vec<Run>,
}

impl Drop for SettleLater {
    fn drop(&mut self) {
        self.allocator.limbo.put_back(&mut self.runs);
        let mut settles = lock(&self.allocator.settles.0);
        settles.0 -= 1;
        if settles.0 == 0 {
            let waiters = std::mem::take(&mut settles.1);
            drop(settles);
            waiters.into_iter().for_each(Waker::wake);
        }
    }
}

/// Runs on their way out of limbo; what is left of them goes back there.
struct Settling<'a> {
    limbo: &'a Limbo,
    /// Not looked at yet.
    todo: Vec<Run>,
    /// Of one reference each.
    sole: Vec<Run>,
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.limbo.put_back(&mut self.todo);
        self.limbo.put_back(&mut self.sole);
    }
}

#[cfg(test)]
#[path = "alloc_tests/mod.rs"]
mod tests;
