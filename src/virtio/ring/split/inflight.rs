//! What a split ring has in flight, kept in a region that outlives this process (vhost-user.rst, "Inflight I/O
//! tracking").
//!
//! Each step is one store, and after a `SIGKILL` the memory holds what was stored in program order: so the
//! stores are Relaxed, and a compiler fence between them is all the order that they need. The successor is
//! ordered behind them by the kernel. A power loss takes the guest with it, and needs no record.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::kill_point::kill_point;
use crate::virtio::inflight::{
    InflightError, QueueRegion, SplitHeader, SplitState, Table, VERSION,
};

/// What the ring itself shows at the start.
pub(super) struct Shown<'a> {
    pub(super) size: u16,
    pub(super) used_idx: u16,
    pub(super) avail_idx: u16,
    /// The id of the used element of a (free running) index.
    pub(super) used_id: &'a dyn Fn(u16) -> u32,
}

/// The record of one ring.
#[derive(Debug)]
pub(super) struct SplitInflight {
    header: Table<SplitHeader>,
    states: Table<SplitState>,
    /// What the next head gets, so that the order of fetching is known.
    counter: u64,
    /// Heads pushed since the last publication. The region has the same as a list; this copy nobody else writes.
    batch: Vec<u16>,
    /// What a predecessor had in flight and was not handed out yet, the next one last.
    again: Vec<u16>,
}

/// Keeps the compiler from changing the order of two steps.
#[inline]
fn then() {
    compiler_fence(Ordering::Release);
}

impl SplitInflight {
    /// Takes up a region. With it the number of requests in flight, unless the region is fresh.
    ///
    /// # Errors
    /// The region has requests in flight and does not fit the ring.
    pub(super) fn new(
        region: &QueueRegion,
        shown: &Shown,
    ) -> Result<(Self, Option<u16>), InflightError> {
        let too_small = InflightError::TooSmall(shown.size);
        let (header, states) = region.split(shown.size).ok_or(too_small)?;
        let mut record = Self {
            header,
            states,
            counter: 0,
            batch: Vec::with_capacity(shown.size.into()),
            again: Vec::new(),
        };
        let Some(header) = record.header.get(0) else {
            return Err(too_small);
        };
        let version = header.version.load(Ordering::Relaxed);
        if version == 0 {
            record.begin(shown);
            return Ok((record, None));
        }
        let features = header.features.load(Ordering::Relaxed);
        if version != VERSION || features != 0 {
            return Err(InflightError::Unknown { version, features });
        }
        if let Err(why) = record.repair(shown) {
            // With nothing in flight nothing can be lost or repeated: the region of an earlier life of the
            // ring is as good as a fresh one.
            if region.split(region.queue_size).is_some_and(|(_, all)| {
                all.iter()
                    .any(|state| state.inflight.load(Ordering::Relaxed) != 0)
            }) {
                return Err(why);
            }
            record.begin(shown);
            return Ok((record, None));
        }
        record.collect(shown).map(|count| (record, Some(count)))
    }

    /// Makes the region one of this ring with nothing in flight. The version comes last: before it, the region
    /// is fresh for a successor too.
    fn begin(&self, shown: &Shown) {
        let Some(header) = self.header.get(0) else {
            return;
        };
        header.version.store(0, Ordering::Relaxed);
        then();
        for state in self.states.iter() {
            state.inflight.store(0, Ordering::Relaxed);
        }
        header.features.store(0, Ordering::Relaxed);
        header.desc_num.store(shown.size, Ordering::Relaxed);
        header.last_batch_head.store(0, Ordering::Relaxed);
        header.used_idx.store(shown.used_idx, Ordering::Relaxed);
        kill_point!("ring-split-fresh");
        then();
        header.version.store(VERSION, Ordering::Relaxed);
    }

    /// Finishes a batch that the driver has seen and that was not taken out of the region. The list must be
    /// that of the used ring, which the ring's own ids show: entries that were taken out already may be in it.
    fn repair(&self, shown: &Shown) -> Result<(), InflightError> {
        let Some(header) = self.header.get(0) else {
            return Ok(());
        };
        let found = header.desc_num.load(Ordering::Relaxed);
        if found != shown.size {
            let size = shown.size;
            return Err(InflightError::Size { found, size });
        }
        let from = header.used_idx.load(Ordering::Relaxed);
        let to = shown.used_idx;
        let broken = InflightError::Batch { from, to };
        let count = to.wrapping_sub(from);
        if count > shown.size {
            return Err(broken);
        }
        let mut batch = Vec::with_capacity(count.into());
        let mut seen = vec![false; shown.size.into()];
        let mut head = header.last_batch_head.load(Ordering::Relaxed);
        for back in 1..=count {
            let state = self.states.get(head).ok_or(broken)?;
            let id = (shown.used_id)(to.wrapping_sub(back));
            let twice = std::mem::replace(&mut seen[usize::from(head)], true);
            if twice || id != u32::from(head) {
                return Err(broken);
            }
            batch.push(head);
            head = state.next.load(Ordering::Relaxed);
        }
        self.clear(batch.iter());
        header.used_idx.store(to, Ordering::Relaxed);
        Ok(())
    }

    /// Finds what is in flight; returns how many that are.
    fn collect(&mut self, shown: &Shown) -> Result<u16, InflightError> {
        let mut found = Vec::new();
        for (head, state) in (0..shown.size).zip(self.states.iter()) {
            if state.inflight.load(Ordering::Relaxed) != 0 {
                found.push((state.counter.load(Ordering::Relaxed), head));
            }
        }
        // Every request in flight is one that the driver made available and did not get back.
        let in_flight = found.len() as u16;
        let outstanding = shown.avail_idx.wrapping_sub(shown.used_idx);
        if in_flight > outstanding {
            return Err(InflightError::Outstanding {
                in_flight,
                outstanding,
            });
        }
        // Ties are no work of ours; they get some order.
        found.sort_unstable();
        // Only a counter that somebody overwrote can be the last one there is.
        self.counter = found.last().map_or(0, |(last, _)| last.wrapping_add(1));
        self.again = found.iter().rev().map(|(_, head)| *head).collect();
        Ok(in_flight)
    }

    /// The next head that a predecessor had in flight.
    #[inline]
    pub(super) fn again(&mut self) -> Option<u16> {
        self.again.pop()
    }

    /// Heads that [`SplitInflight::again`] still has.
    #[inline]
    pub(super) fn backlog(&self) -> u16 {
        // At most the queue size.
        self.again.len() as u16
    }

    /// A head was fetched.
    #[inline]
    pub(super) fn take(&mut self, head: u16) {
        let Some(state) = self.states.get(head) else {
            return;
        };
        state.counter.store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        kill_point!("ring-split-counted");
        then();
        state.inflight.store(1, Ordering::Relaxed);
        kill_point!("ring-split-taken");
        then();
    }

    /// A head is in the used ring, but `used.idx` does not show it yet.
    #[inline]
    pub(super) fn push(&mut self, head: u16) {
        let (Some(header), Some(state)) = (self.header.get(0), self.states.get(head)) else {
            return;
        };
        kill_point!("ring-split-pushed");
        let last = self.batch.last().copied();
        // Before the first of a batch it leads nowhere that anybody goes.
        state.next.store(last.unwrap_or(head), Ordering::Relaxed);
        kill_point!("ring-split-linked");
        then();
        header.last_batch_head.store(head, Ordering::Relaxed);
        then();
        self.batch.push(head);
    }

    /// `used.idx` is now `used_idx`, and shows the whole batch.
    #[inline]
    pub(super) fn settle(&mut self, used_idx: u16) {
        let Some(header) = self.header.get(0) else {
            return;
        };
        then();
        self.clear(self.batch.iter().rev());
        header.used_idx.store(used_idx, Ordering::Relaxed);
        then();
        self.batch.clear();
        kill_point!("ring-split-settled");
    }

    /// These heads are no longer in flight.
    #[inline]
    fn clear<'a>(&self, heads: impl Iterator<Item = &'a u16>) {
        for head in heads {
            if let Some(state) = self.states.get(*head) {
                state.inflight.store(0, Ordering::Relaxed);
            }
            kill_point!("ring-split-cleared");
        }
        then();
    }
}
