//! From memory to the file, in an order that survives a power loss at any instant.
//!
//! A flush does this, and the tests in `tests/crash.rs` break when a step moves:
//!
//! 0. **Complete** the clusters that are incomplete (`fill`). Those that become so meanwhile have their old
//!    entry in the snapshot.
//! 1. **Mark the limbo, then snapshot**: take all that is dirty, and copy the entries. A cluster that was
//!    freed before the mark had its entry replaced and marked dirty before that, so the snapshot unmaps it.
//! 2. **fdatasync of data** *before* any mapping of the snapshot is written, if one of them is `ordered`.
//!    Every entry was published after its data had been written, so this covers their data. An entry that
//!    is published later is not in the snapshot. Without this step the file could have a mapping whose
//!    cluster does not hold its data yet: sectors that copy-on-write only moved would be lost, and
//!    overwritten ones would read as something that nobody wrote. Not needed where the old content read
//!    as zeros and the new cluster does, durably (arena): then a mapping without its data shows zeros,
//!    which is the old content.
//! 3. **Write** slices, L1 and refcounts. Order among them does not matter: a new L2 table is zeros
//!    durably, so an L1 entry may come before or after the table's slices; refcounts that go up were
//!    durable before their clusters were used (arena); those that go down belong to clusters whose
//!    unmapping was durable before.
//! 4. **fdatasync**: mappings, and all data written in place, are durable.
//!    The journal drops what it had before this flush's snapshot (`journal`).
//! 5. **Settle**: what was freed before the mark is pointed at by nothing in the file, and may go on
//!    (refcount 0, hole, new use) when the requests that saw the old entries have ended. Earlier, a power
//!    loss would leave a mapping to a cluster that holds somebody else's data. A task does it, after the
//!    flush has answered.
//!
//! If a step fails, everything stays dirty and pinned down, and the next flush does it again.
//! The slices of a snapshot are pinned until step 4 is over: a slice whose entries are not safely in the
//! file is never thrown out and loaded again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_lock::{Mutex, MutexGuard};

use super::Qcow2;
use super::alloc::Allocator;
use super::below::Below;
use super::journal::Journal;
use super::record::Records;
use super::slice::{ORDERED, Pinned};
use super::tables::Tables;
use crate::block::error::Result;
use crate::block::storage::{Pending, Storage};
use crate::reactor::{AlignedBuf, Io};

/// Dirty mappings are not left unwritten for longer than this, if the caller's timer asks.
const MAX_AGE: Duration = Duration::from_secs(5);
/// Neighbouring slices are written together up to this many bytes.
const MAX_WRITE: usize = 1 << 20;
/// Writes under way at a time.
const DEPTH: usize = 32;

/// Flushes that were asked for at about the same time are done as one.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    /// Flushes asked for so far.
    asked: AtomicU64,
    /// Held by the one that runs; how many of those asked for are done.
    done: Mutex<u64>,
}

impl Qcow2 {
    /// Makes everything durable that was completed before the call. `below` shows what unallocated clusters
    /// show.
    ///
    /// # Errors
    /// Those of the storage. Nothing is forgotten then: the next flush tries again.
    pub async fn flush<B: Below + ?Sized>(&self, io: &Io, below: &B) -> Result<()> {
        if self.alloc.is_none() {
            return Ok(());
        }
        let ticket = self.flushes.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut done = self.flushes.done.lock().await;
        if *done >= ticket {
            return Ok(());
        }
        // Whoever has a ticket by now completed its writes before this flush's snapshot.
        let covers = self.flushes.asked.load(Ordering::SeqCst);
        let filled = self.fill_older(io, below, Duration::ZERO).await;
        // A cluster that cannot be completed keeps its old mapping in the file, and keeps nothing else back.
        self.flush_once(io).await?;
        filled?;
        *done = covers;
        Ok(())
    }

    /// Writes metadata back to make room for more of it, as it is: without completing clusters.
    ///
    /// # Errors
    /// As [`Qcow2::flush`].
    pub(super) async fn write_back(&self, io: &Io) -> Result<()> {
        if self.alloc.is_none() {
            return Ok(());
        }
        self.write_back_unless(io, || false).await
    }

    /// The same, unless somebody else has written enough back when it is this one's turn.
    pub(super) async fn write_back_unless(
        &self,
        io: &Io,
        is_enough: impl Fn() -> bool,
    ) -> Result<()> {
        let _one = self.flushes.done.lock().await;
        if is_enough() {
            return Ok(());
        }
        self.flush_once(io).await
    }

    async fn flush_once(&self, io: &Io) -> Result<()> {
        let alloc = self.allocator()?;
        if let Some(damage) = alloc.take_damage() {
            self.stop_writing(io, &damage).await;
        }
        let mark = alloc.mark();
        // After the limbo's, so that what mapped a freed cluster is dropped before the cluster is let go.
        let logged = self.journal.get().map(Journal::mark);
        let mut snapshot = Snapshot::take(&self.tables);
        snapshot.copy(io, &self.records);
        if snapshot.ordered {
            self.flush_files(io).await?;
        }
        snapshot.write(io, &self.storage).await?;
        alloc.write_back(io).await?;
        self.flush_files(io).await?;
        snapshot.written = true;
        drop(snapshot);
        if let (Some(journal), Some(logged)) = (self.journal.get(), logged) {
            journal.drop_before(logged);
        }
        // The guest's data is safe: it need not wait for the rest.
        alloc.settle_later(io, mark);
        Ok(())
    }

    /// Flushes, and keeps other flushes away as long as what it returns is held.
    ///
    /// # Errors
    /// As [`Qcow2::flush`].
    pub(super) async fn flush_and_hold(&self, io: &Io) -> Result<MutexGuard<'_, u64>> {
        let held = self.flushes.done.lock().await;
        self.flush_once(io).await?;
        Ok(held)
    }

    pub(super) async fn flush_files(&self, io: &Io) -> Result<()> {
        if self.has_data_file() {
            self.data.flush(io).await?;
        }
        self.storage.flush(io).await
    }

    /// What the first step of a flush decides: must data be durable before the mappings are written?
    /// `between` happens after it has taken what is dirty, and before it copies that.
    #[cfg(test)]
    pub(super) fn would_order(&self, io: &Io, between: impl FnOnce()) -> bool {
        let mut snapshot = Snapshot::take(&self.tables);
        between();
        snapshot.copy(io, &self.records);
        snapshot.ordered
    }

    /// Writes mappings back if there are many, or old ones, and lets clusters out of limbo that no flush
    /// asks after any more. To be called from a timer, once a second or so: it bounds what the next flush
    /// has to write.
    ///
    /// # Errors
    /// As [`Qcow2::flush`].
    pub async fn write_back_if_due<B: Below + ?Sized>(&self, io: &Io, below: &B) -> Result<()> {
        self.give_leaks_back(io).await;
        self.write_back_older(io, below, MAX_AGE).await
    }

    /// The same, with what is to be called old.
    pub(super) async fn write_back_older<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        old: Duration,
    ) -> Result<()> {
        if let Some(damage) = self.alloc.as_ref().and_then(|alloc| alloc.take_damage()) {
            self.stop_writing(io, &damage).await;
        }
        let (slices, age) = self.tables.dirty();
        let forgotten = |alloc: &Arc<Allocator>| age.is_none() && alloc.in_limbo() > 0;
        let due = slices >= self.tables.write_back_threshold()
            || age.is_some_and(|age| age >= old)
            || self.records.is_due(old)
            || self.journal.get().is_some_and(Journal::is_much)
            || self.alloc.as_ref().is_some_and(forgotten);
        if due {
            self.flush(io, below).await
        } else {
            Ok(())
        }
    }

    /// Flushes, and gives back what was reserved. No request may run, and none may come. The file is then
    /// as any other program expects it.
    ///
    /// # Errors
    /// As [`Qcow2::flush`]; the image is consistent all the same, but may have leaked clusters.
    pub async fn close<B: Below + ?Sized>(&self, io: &Io, below: &B) -> Result<()> {
        let Some(alloc) = &self.alloc else {
            return Ok(());
        };
        self.end_fill_ahead().await;
        let mut flushed = self.flush(io, below).await;
        if let (Ok(()), Some(bitmaps)) = (&flushed, &self.bitmaps) {
            flushed = bitmaps.store(io, &self.storage, &self.header, alloc).await;
        }
        if flushed.is_err() || self.refuse_writes.load(Ordering::SeqCst) {
            alloc.leaks().keep_mark();
        }
        // Also after an error: arenas must be stopped, and the more is given back the better.
        let closed = alloc.close(io).await;
        if let Some(journal) = self.journal.get() {
            journal.end();
        }
        if let Some(damage) = alloc.take_damage() {
            self.stop_writing(io, &damage).await;
        }
        flushed.and(closed)
    }
}

/// What a flush is about to write. Dropped unwritten, all of it is dirty again.
struct Snapshot<'a> {
    tables: &'a Tables,
    slices: Vec<(Pinned, u8)>,
    l1_units: BTreeSet<u64>,
    l1_ordered: bool,
    /// Data must be durable first.
    ordered: bool,
    /// Where each of `slices` goes: (offset, index), ascending.
    places: Vec<(u64, usize)>,
    /// (offset, bytes), ascending.
    writes: Vec<(u64, AlignedBuf)>,
    written: bool,
}

impl<'a> Snapshot<'a> {
    /// Takes all that is dirty.
    fn take(tables: &'a Tables) -> Self {
        let dirty = tables.take_dirty();
        let mut snapshot = Self {
            tables,
            slices: Vec::with_capacity(dirty.slices.len()),
            l1_units: dirty.l1_units,
            l1_ordered: dirty.l1_ordered,
            ordered: dirty.l1_ordered,
            places: Vec::with_capacity(dirty.slices.len()),
            writes: Vec::new(),
            written: false,
        };
        for index in dirty.slices {
            // A dirty slice is in memory, and has a table.
            if let (Some(slice), Some(offset)) = (tables.pin(index), tables.slice_offset(index)) {
                let flags = slice.take_dirty();
                snapshot.ordered |= flags & ORDERED != 0;
                snapshot.places.push((offset.0, snapshot.slices.len()));
                snapshot.slices.push((slice, flags));
            }
        }
        snapshot.places.sort_unstable();
        snapshot
    }

    /// Copies the entries as they are now, and finds out whether their data must be durable first.
    fn copy(&mut self, io: &Io, records: &Records) {
        let tables = self.tables;
        let bytes = tables.geometry.slice_bytes() as usize;
        let most = (MAX_WRITE / bytes).max(1);
        let neighbours = |a: &(u64, usize), b: &(u64, usize)| a.0 + bytes as u64 == b.0;
        for run in self
            .places
            .chunk_by(neighbours)
            .flat_map(|r| r.chunks(most))
        {
            let mut buf = io.buf(run.len() * bytes);
            for (place, to) in run.iter().zip(buf.chunks_exact_mut(bytes)) {
                let slice = &self.slices[place.1].0;
                // A record that is seen in the slice can be looked at here: there is no await between.
                slice.encode(to, |index| records.old(index));
                // A writer may be between publishing and marking: what was copied counts, not what was
                // marked when the flags were taken.
                self.ordered |= slice.is_ordered();
            }
            self.writes.push((run[0].0, buf));
        }
        for unit in &self.l1_units {
            let mut buf = io.buf(tables.l1_unit() as usize);
            let offset = tables.encode_l1(*unit, &mut buf);
            self.writes.push((offset.0, buf));
        }
        // The same for L1 entries, which change under the lock that this takes.
        self.ordered |= tables.is_l1_ordered();
    }

    async fn write(&mut self, io: &Io, storage: &Storage) -> Result<()> {
        for batch in self.writes.chunks_mut(DEPTH) {
            let begun: Vec<Pending<'_>> = batch
                .iter_mut()
                .map(|(offset, buf)| storage.begin_write(io, *offset, buf.sg()))
                .collect();
            let mut result = Ok(());
            for write in begun {
                result = result.and(write.finish(io).await);
            }
            result?;
        }
        Ok(())
    }
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        if self.written {
            return;
        }
        for (slice, flags) in &self.slices {
            if *flags != 0 {
                self.tables.mark_dirty(slice, flags & ORDERED != 0);
            }
        }
        self.tables
            .put_l1_dirty(std::mem::take(&mut self.l1_units), self.l1_ordered);
    }
}
