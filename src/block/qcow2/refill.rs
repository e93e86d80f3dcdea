//! Finding clusters for an arena and making them ready: the slow half of the allocator.
//!
//! Whatever is found is marked with refcount 1 in memory at once, so that it is not found twice, and is
//! owned by a [`Claim`] until everything about it is durable. A claim that is dropped, for a failure or
//! because the worker ended, leaves orphans; the next attempt begins with freeing those.

use std::sync::Mutex;

use super::alloc::{Allocator, Slow, lock};
use super::arena::Stock;
use super::header::MAX_HOST_OFFSET;
use super::reftable::Budget;
use super::runs::{Run, merge};
use super::units::HostCluster;
use crate::block::error::{Error, ErrorKind, Result};
use crate::reactor::Io;

/// Runs of which a refill is made up, apart from those at the end of the file.
const MAX_RUNS: usize = 16;
/// What one refill may spend on scanning the image for free clusters.
const SCAN: Budget = Budget {
    blocks: 2,
    entries: 1 << 18,
};
const UNBOUNDED: Budget = Budget {
    blocks: u64::MAX,
    entries: u64::MAX,
};

/// Clusters that are being made ready.
struct Claim<'a> {
    orphans: &'a Mutex<Vec<Run>>,
    /// Marked with refcount 1 in memory.
    runs: Vec<Run>,
    /// Free, and to be marked next.
    found: Vec<Run>,
}

/// Clusters of [`Allocator::allocate_run`] that no metadata points at yet.
#[derive(Debug)]
#[must_use = "dropping it gives the clusters back"]
pub(super) struct FreshRun<'a> {
    orphans: &'a Mutex<Vec<Run>>,
    run: Run,
}

impl FreshRun<'_> {
    pub(super) fn first(&self) -> HostCluster {
        HostCluster(self.run.first)
    }

    pub(super) fn count(&self) -> u64 {
        self.run.count
    }

    /// Takes the clusters over for good.
    pub(super) fn keep(mut self) {
        self.run.count = 0;
    }
}

impl Drop for FreshRun<'_> {
    fn drop(&mut self) {
        if self.run.count > 0 {
            lock(self.orphans).push(self.run);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.runs.len() + self.found.len() > 0 {
            let mut orphans = lock(self.orphans);
            orphans.append(&mut self.runs);
            orphans.append(&mut self.found);
        }
    }
}

impl Allocator {
    fn no_space(&self) -> Error {
        let what = "no free cluster is left in the image, and it can not grow";
        Error::image(ErrorKind::NoSpace, self.storage.path(), None, what)
    }

    fn claim(&self) -> Claim<'_> {
        Claim {
            orphans: &self.orphans,
            runs: Vec::new(),
            found: Vec::new(),
        }
    }

    /// Makes about `size` clusters ready to be handed out, or as many as there is space for.
    pub(super) async fn refill(&self, io: &Io, size: u64) -> Result<Vec<Stock>> {
        let mut slow = self.slow.lock().await;
        let mut size = size.max(1);
        loop {
            let result = self.attempt(io, &mut slow, size).await;
            match &result {
                Err(error) if error.kind() == ErrorKind::NoSpace => {}
                _ => return result,
            }
            if size > 1 {
                size /= 2;
                continue;
            }
            // Clusters may be on their way out of limbo.
            drop(slow);
            if !self.settled().await {
                return result;
            }
            slow = self.slow.lock().await;
        }
    }

    async fn attempt(&self, io: &Io, slow: &mut Slow, size: u64) -> Result<Vec<Stock>> {
        self.free_orphans(io, slow).await?;
        let mut claim = self.claim();
        let found = self.find(io, slow, size, &mut claim).await;
        merge(&mut claim.runs);
        match found {
            // What was found before the space ran out is good enough.
            Err(error) if error.kind() == ErrorKind::NoSpace && !claim.runs.is_empty() => {}
            other => other?,
        }
        let mut stock = Vec::with_capacity(claim.runs.len());
        let mut full = None;
        for run in claim.runs.clone() {
            let (at, len) = (
                run.first << self.cluster_bits,
                run.count << self.cluster_bits,
            );
            match self.storage.allocate(io, at, len).await {
                Ok(zeroed) => {
                    self.reach(io, at + len).await?;
                    stock.push(Stock { run, zeroed });
                }
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    claim.runs.retain(|r| *r != run);
                    lock(&self.orphans).push(run);
                    full = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if stock.is_empty() {
            return Err(full.unwrap_or_else(|| self.no_space()));
        }
        if !slow.marked {
            self.header.mark_arenas(io, &self.storage, true).await?;
        }
        slow.counts.write_dirty(io, &self.storage).await?;
        slow.counts.sync(io, &self.storage).await?;
        slow.marked = true;
        claim.runs.clear();
        self.free_old_tables(slow);
        Ok(stock)
    }

    /// Neighbouring clusters with durable refcount 1, for a table that has to lie in one piece. They may
    /// hold anything.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`], also for more clusters than one refcount block can count: the clusters
    /// behind the end of the file may lack their blocks, and a block lies in what it counts. Those of
    /// reading and writing refcounts. Nothing is lost then.
    pub(super) async fn allocate_run(&self, io: &Io, count: u64) -> Result<FreshRun<'_>> {
        let mut slow = self.slow.lock().await;
        self.free_orphans(io, &mut slow).await?;
        let mut claim = self.claim();
        let begin = slow.frontier;
        let run = self.find_run(io, &mut slow, count).await?;
        if begin < run.first && !slow.free.add(Run::new(begin, run.first - begin)) {
            slow.cursor = slow.cursor.min(begin);
        }
        slow.maybe_free |= begin < run.first;
        slow.frontier = run.end();
        claim.found.push(run);
        self.take(io, &mut slow, &mut claim).await?;
        let Some(&run) = claim.runs.first() else {
            return Err(self.no_space());
        };
        let (at, len) = (
            run.first << self.cluster_bits,
            run.count << self.cluster_bits,
        );
        self.storage.allocate(io, at, len).await?;
        self.reach(io, at + len).await?;
        if !slow.marked {
            self.header.mark_arenas(io, &self.storage, true).await?;
        }
        slow.counts.write_dirty(io, &self.storage).await?;
        slow.counts.sync(io, &self.storage).await?;
        slow.marked = true;
        claim.runs.clear();
        self.free_old_tables(&mut slow);
        Ok(FreshRun {
            orphans: &self.orphans,
            run,
        })
    }

    /// Free clusters behind the frontier, `count` of them in what one refcount block counts, and one more in
    /// front if that block is missing.
    async fn find_run(&self, io: &Io, slow: &mut Slow, count: u64) -> Result<Run> {
        let bits = slow.counts.block_bits();
        if count >= 1 << bits {
            let what = format!("{count} clusters in one piece are more than this image can find");
            let path = self.storage.path();
            return Err(Error::image(ErrorKind::NoSpace, path, None, what)
                .hint("qemu-img convert can make an image with larger clusters"));
        }
        let mut at = slow.frontier;
        loop {
            let index = at >> bits;
            let end = (index + 1) << bits;
            if end > MAX_HOST_OFFSET >> self.cluster_bits {
                return Err(self.no_space());
            }
            if slow.counts.covered() < end {
                self.grow_table(io, slow).await?;
                at = at.max(slow.frontier);
                continue;
            }
            let wanted = count + u64::from(!slow.counts.has_block(index as usize));
            let mut budget = UNBOUNDED;
            let scan = slow
                .counts
                .scan(io, &self.storage, at, end, wanted, &mut budget);
            let (run, next) = scan.await?;
            match run {
                Some(run) if run.count == wanted => return Ok(run),
                Some(_) => at = next,
                None => at = end,
            }
        }
    }

    /// Makes the file reach to `end`, where reserving space has not done it: metadata may point at
    /// a table that was not written yet, and nothing may point beyond the end of the file.
    async fn reach(&self, io: &Io, end: u64) -> Result<()> {
        const LAST: u64 = 512;
        if self.storage.len() >= end {
            return Ok(());
        }
        self.storage.write_zeroes(io, end - LAST, LAST, false).await
    }

    /// Finds and claims clusters: freed ones, those that the scan comes by, and the rest at the end.
    async fn find(&self, io: &Io, slow: &mut Slow, size: u64, claim: &mut Claim<'_>) -> Result<()> {
        let storage = &*self.storage;
        let mut wanted = size;
        while wanted > 0 && claim.found.len() < MAX_RUNS {
            let Some(hint) = slow.free.take((size / 16).max(1), wanted) else {
                break;
            };
            // A hint that is lost on the way is found again by the scan.
            let cursor = slow.cursor;
            slow.cursor = cursor.min(hint.first);
            let (mut at, mut budget) = (hint.first, UNBOUNDED);
            while at < hint.end() {
                let (end, max) = (hint.end(), hint.end() - at);
                let scan = slow.counts.scan(io, storage, at, end, max, &mut budget);
                let (run, next) = scan.await?;
                if let Some(run) = run {
                    wanted = wanted.saturating_sub(run.count);
                    claim.found.push(run);
                }
                at = next;
            }
            slow.cursor = cursor;
        }
        self.take(io, slow, claim).await?;

        let last_resort = size == 1 && wanted > 0 && slow.maybe_free;
        let mut budget = if last_resort {
            slow.cursor = 0;
            UNBOUNDED
        } else {
            SCAN
        };
        let end = slow.frontier.min(slow.counts.covered());
        while wanted > 0 && claim.found.len() < MAX_RUNS && slow.cursor < end {
            let scan = slow
                .counts
                .scan(io, storage, slow.cursor, end, wanted, &mut budget);
            let (run, next) = scan.await?;
            slow.cursor = next;
            let Some(run) = run else {
                break;
            };
            wanted = wanted.saturating_sub(run.count);
            claim.found.push(run);
        }
        if last_resort && claim.found.is_empty() {
            slow.maybe_free = false;
        }
        self.take(io, slow, claim).await?;

        // New refcount blocks take clusters, too: then there are fewer than asked for, but not none.
        while wanted > 0 || claim.runs.is_empty() {
            if slow.frontier >= slow.counts.covered() {
                // Whatever was found on the way here is claimed before the table moves.
                self.take(io, slow, claim).await?;
                self.grow_table(io, slow).await?;
                continue;
            }
            let (from, to) = (slow.frontier, slow.counts.covered());
            let mut budget = UNBOUNDED;
            let index = (from >> slow.counts.block_bits()) as usize;
            let max = wanted.max(1) + u64::from(!slow.counts.has_block(index));
            let scan = slow.counts.scan(io, storage, from, to, max, &mut budget);
            let (run, next) = scan.await?;
            if next > MAX_HOST_OFFSET >> self.cluster_bits {
                return Err(self.no_space());
            }
            slow.frontier = next;
            if let Some(run) = run {
                wanted = wanted.saturating_sub(run.count);
                claim.found.push(run);
            }
            if wanted == 0 {
                self.take(io, slow, claim).await?;
            }
        }
        Ok(())
    }

    /// Claims the runs that were found, none of which crosses the border of a refcount block: makes
    /// the blocks that they lack out of their first clusters, and sets the refcounts of the rest (in
    /// memory).
    async fn take(&self, io: &Io, slow: &mut Slow, claim: &mut Claim<'_>) -> Result<()> {
        let mut blocks: Vec<(usize, u64)> = Vec::new();
        let mut rest = Vec::with_capacity(claim.found.len());
        for run in &claim.found {
            self.leaks().touch(*run);
            if let Some((cluster, what)) = lock(&self.reserved).clash(*run) {
                let what = format!("the {what} is in a cluster with refcount 0");
                return Err(self.corrupt(cluster, what));
            }
            let index = (run.first >> slow.counts.block_bits()) as usize;
            let mut run = *run;
            if !slow.counts.has_block(index) && blocks.iter().all(|block| block.0 != index) {
                blocks.push((index, run.first));
                run = Run::new(run.first + 1, run.count - 1);
            }
            if run.count > 0 {
                rest.push(run);
            }
        }
        if !blocks.is_empty() {
            let create = slow.counts.create_blocks(io, &self.storage, &blocks);
            create.await?;
            claim.found = rest;
            for (_, cluster) in blocks {
                self.reserve_own(Run::new(cluster, 1), "refcount block")?;
            }
        }
        while let Some(&run) = claim.found.last() {
            let mark = |_, count: u64| count.max(1);
            slow.counts.update(io, &self.storage, run, mark).await?;
            claim.found.pop();
            claim.runs.push(run);
        }
        Ok(())
    }

    fn reserve_own(&self, run: Run, what: &'static str) -> Result<()> {
        let added = lock(&self.reserved).add(run, what);
        added.map_err(|there| self.corrupt(run.first, format!("the {what} is over the {there}")))
    }

    async fn grow_table(&self, io: &Io, slow: &mut Slow) -> Result<()> {
        let first = slow.counts.covered();
        let beyond = Run::new(first, u64::MAX - first);
        if let Some((cluster, what)) = lock(&self.reserved).clash(beyond) {
            let what = format!("the {what} is in a cluster that the refcount table does not cover");
            return Err(self.corrupt(cluster, what));
        }
        let (table, blocks) = slow.counts.grow(io, &self.storage, first).await?;
        slow.frontier = slow.frontier.max(blocks.end());
        self.reserve_own(table, "refcount table")?;
        for cluster in blocks.first..blocks.end() {
            self.reserve_own(Run::new(cluster, 1), "refcount block")?;
        }
        Ok(())
    }

    /// Frees the tables that a grown one has replaced, now that the header does not point at them.
    fn free_old_tables(&self, slow: &mut Slow) {
        for table in slow.counts.take_old_tables() {
            lock(&self.reserved).remove(table);
            lock(&self.orphans).push(table);
        }
    }

    /// Frees what nobody owns; returns it.
    pub(super) async fn free_orphans(&self, io: &Io, slow: &mut Slow) -> Result<Vec<Run>> {
        let mut claim = self.claim();
        claim.runs = std::mem::take(&mut *lock(&self.orphans));
        merge(&mut claim.runs);
        let mut freed = Vec::with_capacity(claim.runs.len());
        while let Some(&run) = claim.runs.last() {
            for (_, part) in run.by_block(slow.counts.block_bits()) {
                let mut shared = None;
                let change = |cluster, count| match count {
                    0 | 1 => 0,
                    _ => {
                        shared = Some(cluster);
                        count
                    }
                };
                slow.counts.update(io, &self.storage, part, change).await?;
                if let Some(cluster) = shared {
                    claim.runs.pop();
                    let what = "a cluster that was never used has several references";
                    return Err(self.corrupt(cluster, what.into()));
                }
            }
            claim.runs.pop();
            slow.note_free(run);
            freed.push(run);
        }
        Ok(freed)
    }

    /// The end of [`Allocator::close`]: everything that can be done is, the first error is returned.
    pub(super) async fn close_refcounts(&self, io: &Io, slow: &mut Slow) -> Result<()> {
        let freed = self.free_orphans(io, slow).await;
        let mut result = match freed {
            Ok(freed) => {
                self.cut_file(io, slow, &freed).await;
                Ok(())
            }
            Err(error) => Err(error),
        };
        // Once more if a replaced table can be freed now.
        for _ in 0..2 {
            let mut written = slow.counts.write_dirty(io, &self.storage).await;
            let synced = slow.counts.sync(io, &self.storage).await;
            written = written.and(synced);
            let failed = written.is_err();
            result = result.and(written);
            if failed {
                break;
            }
            self.free_old_tables(slow);
            let freed = self.free_orphans(io, slow).await.map(|_| ());
            result = result.and(freed);
            if !slow.counts.is_dirty() {
                break;
            }
        }
        result
    }

    /// Cuts free clusters off the end of the file, down to its end when it was opened, and gives the
    /// space of `freed` back. Their refcounts may still be 1 on disk: at worst a leak.
    async fn cut_file(&self, io: &Io, slow: &mut Slow, freed: &[Run]) {
        let len = self.storage.len();
        let mut end = len.div_ceil(1 << self.cluster_bits);
        let before = end;
        while end > slow.floor {
            match slow.counts.get(io, &self.storage, end - 1).await {
                Ok(0) if lock(&self.reserved).clash(Run::new(end - 1, 1)).is_none() => end -= 1,
                Ok(_) => break,
                Err(error) => {
                    log::debug!("the file is not cut: {error}");
                    break;
                }
            }
        }
        if end < before {
            match self.storage.set_len(io, end << self.cluster_bits).await {
                Ok(()) => slow.frontier = slow.frontier.min(end),
                Err(error) => log::debug!("the file is not cut: {error}"),
            }
        }
        for run in freed {
            let stop = run.end().min(end);
            if run.first < stop {
                self.discard(io, Run::new(run.first, stop - run.first))
                    .await;
            }
        }
    }
}
