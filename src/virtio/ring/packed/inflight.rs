//! What a packed ring has in flight, kept in a region that outlives this process (vhost-user.rst, "Inflight I/O
//! tracking").
//!
//! The region has the ring's entries once more, under the same numbers, and is only read at the start: what is
//! found there was checked then, and nobody can change it under a running ring. As for split rings, program
//! order is all that the stores need.

use std::sync::atomic::{Ordering, compiler_fence};

use super::{AVAIL, Entry, PackedRing, Position, USED};
use crate::kill_point::kill_point;
use crate::virtio::inflight::{
    InflightError, PackedHeader, PackedState, QueueRegion, Table, VERSION,
};

/// The record of one ring.
#[derive(Debug)]
pub(super) struct PackedInflight {
    header: Table<PackedHeader>,
    states: Table<PackedState>,
    /// What the next chain gets, so that the order of fetching is known.
    counter: u64,
    /// The free list and the used index as they are without the batch that is being completed.
    free_head: u16,
    used: Position,
}

/// Keeps the compiler from changing the order of two steps.
#[inline]
fn then() {
    compiler_fence(Ordering::Release);
}

/// The two heads of the free list as one integer.
#[inline]
fn heads(free_head: u16, old: u16) -> u32 {
    let ([a, b], [c, d]) = (free_head.to_ne_bytes(), old.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// The two used indices and wrap counters as one integer.
#[inline]
fn used_pair(used: Position, old: Position) -> u64 {
    let ([a, b], [c, d]) = (used.index.to_ne_bytes(), old.index.to_ne_bytes());
    let wraps = (u8::from(used.wrap), u8::from(old.wrap));
    u64::from_ne_bytes([a, b, c, d, wraps.0, wraps.1, 0, 0])
}

impl PackedHeader {
    fn free_heads(&self) -> (u16, u16) {
        let [a, b, c, d] = self.free_heads.load(Ordering::Relaxed).to_ne_bytes();
        (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]))
    }

    fn used_pair(&self) -> (Position, Position) {
        let [a, b, c, d, wrap, old_wrap, ..] = self.used.load(Ordering::Relaxed).to_ne_bytes();
        let position = |index, wrap| Position {
            index: u16::from_ne_bytes(index),
            wrap: wrap != 0,
        };
        (position([a, b], wrap), position([c, d], old_wrap))
    }
}

/// Takes up a region for a ring that was just made, and lets the ring go on where the region says, unless that is
/// fresh.
///
/// # Errors
/// The region has requests in flight and does not fit the ring.
pub(super) fn take_up(
    ring: &mut PackedRing,
    region: &QueueRegion,
) -> Result<PackedInflight, InflightError> {
    let too_small = InflightError::TooSmall(ring.cfg.size);
    let (header, states) = region.packed(ring.cfg.size).ok_or(too_small)?;
    let mut record = PackedInflight {
        header,
        states,
        counter: 0,
        free_head: 0,
        used: ring.next_used,
    };
    let Some(header) = record.header.get(0) else {
        return Err(too_small);
    };
    let version = header.version.load(Ordering::Relaxed);
    if version == 0 {
        record.begin();
        return Ok(record);
    }
    let features = header.features.load(Ordering::Relaxed);
    if version != VERSION || features != 0 {
        return Err(InflightError::Unknown { version, features });
    }
    if let Err(why) = record
        .judge(ring)
        .and_then(|shown| record.collect(ring, shown))
    {
        // With nothing in flight nothing can be lost or repeated: the region of an earlier life of the ring is as
        // good as a fresh one.
        if region.packed(region.queue_size).is_some_and(|(_, all)| {
            all.iter()
                .any(|state| state.inflight.load(Ordering::Relaxed) != 0)
        }) {
            return Err(why);
        }
        record.free_head = 0;
        record.used = ring.next_used;
        record.begin();
    }
    Ok(record)
}

impl PackedInflight {
    /// Makes the region one of this ring with nothing in flight. The version comes last: before it, the region
    /// is fresh for a successor too.
    fn begin(&self) {
        let Some(header) = self.header.get(0) else {
            return;
        };
        header.version.store(0, Ordering::Relaxed);
        then();
        let mut count = 0;
        for state in self.states.iter() {
            count += 1;
            state.inflight.store(0, Ordering::Relaxed);
            state.next.store(count, Ordering::Relaxed);
        }
        header.features.store(0, Ordering::Relaxed);
        header.desc_num.store(count, Ordering::Relaxed);
        self.store_free_heads(self.free_head, self.free_head);
        self.store_used(self.used, self.used);
        kill_point!("ring-packed-fresh");
        then();
        header.version.store(VERSION, Ordering::Relaxed);
    }

    #[inline]
    fn store_free_heads(&self, free_head: u16, old: u16) {
        if let Some(header) = self.header.get(0) {
            let heads = heads(free_head, old);
            header.free_heads.store(heads, Ordering::Relaxed);
        }
    }

    #[inline]
    fn store_used(&self, used: Position, old: Position) {
        if let Some(header) = self.header.get(0) {
            header.used.store(used_pair(used, old), Ordering::Relaxed);
        }
    }

    /// Takes a batch for finished whose first used descriptor is in the ring, and one whose is not for undone.
    /// Gives the descriptors of the one that is finished. Nothing is changed yet.
    fn judge(&mut self, ring: &PackedRing) -> Result<u16, InflightError> {
        let Some(header) = self.header.get(0) else {
            return Ok(0);
        };
        let size = ring.cfg.size;
        let found = header.desc_num.load(Ordering::Relaxed);
        if found != size {
            return Err(InflightError::Size { found, size });
        }
        let (used, old) = header.used_pair();
        for Position { index, .. } in [used, old] {
            if index >= size {
                return Err(InflightError::Used { index, size });
            }
        }
        let (free_head, old_free_head) = header.free_heads();
        (self.free_head, self.used) = (old_free_head, old);
        let mut shown = 0;
        // The specification compares the indices only; a batch may fill the whole ring.
        if used != old && flags(ring, old) != old.available() {
            (self.free_head, self.used) = (free_head, used);
            shown = match used.wrap == old.wrap {
                true => used.index.saturating_sub(old.index),
                false => (used.index + size).saturating_sub(old.index),
            };
        }
        Ok(shown)
    }

    /// Finds what is in flight, copies it into the ring's entries, and lets the ring go on behind it. `shown` are
    /// the descriptors of the batch that is finished.
    fn collect(&mut self, ring: &mut PackedRing, mut shown: u16) -> Result<(), InflightError> {
        let size = ring.cfg.size;
        let mut seen = vec![false; size.into()];
        let mut see = |index: u16| match seen.get_mut(usize::from(index)) {
            Some(seen) if !*seen => {
                *seen = true;
                Ok(())
            }
            _ => Err(InflightError::Lists(index)),
        };
        let mut entries = vec![Entry::default(); size.into()].into_boxed_slice();
        // Nothing is changed before everything was checked.
        let (mut free, mut all_free) = (self.free_head, vec![false; size.into()]);
        while let Some(state) = self.states.get(free) {
            see(free)?;
            all_free[usize::from(free)] = true;
            // On the free list those of the finished batch are in flight, or the one chain whose fetching was not
            // finished, which is the first.
            if state.inflight.load(Ordering::Relaxed) != 0 {
                let num = state.num.load(Ordering::Relaxed).max(1);
                match shown.checked_sub(num) {
                    Some(left) => shown = left,
                    None if free == self.free_head && shown == 0 => {}
                    None => return Err(InflightError::Lists(free)),
                }
            }
            let next = state.next.load(Ordering::Relaxed);
            entries[usize::from(free)].next = next;
            free = next;
        }
        let (mut found, mut total) = (Vec::new(), 0u16);
        for (head, state) in (0..size).zip(self.states.iter()) {
            if all_free[usize::from(head)] || state.inflight.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let num = state.num.load(Ordering::Relaxed);
            let (mut index, mut last, mut id) = (head, head, 0);
            // At most as many rounds as there are entries: none is seen twice.
            for _ in 0..num {
                see(index)?;
                let state = self.states.get(index).ok_or(InflightError::Lists(index))?;
                last = index;
                id = state.id.load(Ordering::Relaxed);
                index = state.next.load(Ordering::Relaxed);
                let entry = &mut entries[usize::from(last)];
                entry.addr = state.addr.load(Ordering::Relaxed);
                entry.len = state.len.load(Ordering::Relaxed);
                entry.flags = state.flags.load(Ordering::Relaxed);
                entry.next = index;
            }
            if num == 0 || last != state.last.load(Ordering::Relaxed) {
                return Err(InflightError::Lists(head));
            }
            let entry = &mut entries[usize::from(head)];
            (entry.id, entry.num, entry.last) = (id, num, last);
            found.push((state.counter.load(Ordering::Relaxed), head));
            total += num;
        }
        if let Some(lost) = seen.iter().position(|seen| !seen) {
            return Err(InflightError::Lists(lost as u16));
        }
        // Where the requests in flight came from, the ring has descriptors that are available, or, beyond the
        // first, some that an undone batch has marked as used. The driver has not looked at those; it would
        // when it gets there.
        let mut behind = self.used;
        for _ in 0..total {
            let found = flags(ring, behind);
            if found != behind.available() && found != behind.used() {
                return Err(InflightError::NotAvailable(behind.index));
            }
            behind = behind.behind(1, size);
        }
        let mut at = self.used;
        for _ in 0..total {
            if flags(ring, at) == at.used() {
                let tail = u64::from_le(ring.tail(at.index).load(Ordering::Relaxed));
                let bits = u64::from(AVAIL | USED) << 48;
                let tail = tail & !bits | u64::from(at.available()) << 48;
                ring.tail(at.index).store(tail.to_le(), Ordering::Relaxed);
                kill_point!("ring-packed-restored");
            }
            at = at.behind(1, size);
        }
        // Chains whose copying was not finished, and those of a finished batch.
        for (state, free) in self.states.iter().zip(&all_free) {
            if *free {
                state.inflight.store(0, Ordering::Relaxed);
                kill_point!("ring-packed-repaired");
            }
        }
        then();
        self.store_free_heads(self.free_head, self.free_head);
        kill_point!("ring-packed-recovered");
        then();
        self.store_used(self.used, self.used);
        // Ties are no work of ours; they get some order.
        found.sort_unstable();
        // Only a counter that somebody overwrote can be the last one there is.
        self.counter = found.last().map_or(0, |(last, _)| last.wrapping_add(1));
        ring.again = found.iter().rev().map(|(_, head)| *head).collect();
        ring.entries = entries;
        ring.free_head = self.free_head;
        ring.next_used = self.used;
        ring.next_avail = behind;
        Ok(())
    }

    /// A chain was copied into the entries from `slot` on, and is followed by `free_head`. Until the last step
    /// the chain is a part of the free list, and a successor takes it for free.
    #[inline]
    pub(super) fn take(&mut self, entries: &[Entry], slot: u16, free_head: u16) {
        let Some(head) = entries.get(usize::from(slot)) else {
            return;
        };
        let mut index = slot;
        for _ in 0..head.num {
            let (Some(entry), Some(state)) =
                (entries.get(usize::from(index)), self.states.get(index))
            else {
                return;
            };
            state.addr.store(entry.addr, Ordering::Relaxed);
            state.len.store(entry.len, Ordering::Relaxed);
            state.flags.store(entry.flags, Ordering::Relaxed);
            state.id.store(head.id, Ordering::Relaxed);
            index = entry.next;
        }
        let Some(state) = self.states.get(slot) else {
            return;
        };
        state.num.store(head.num, Ordering::Relaxed);
        state.last.store(head.last, Ordering::Relaxed);
        state.counter.store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        kill_point!("ring-packed-copied");
        then();
        state.inflight.store(1, Ordering::Relaxed);
        kill_point!("ring-packed-marked");
        then();
        self.free_head = free_head;
        self.store_free_heads(free_head, free_head);
        kill_point!("ring-packed-taken");
        then();
    }

    /// A batch is about to be written to the ring: puts its chains on the free list and moves the used index, both
    /// beside the old ones.
    #[inline]
    pub(super) fn complete(
        &mut self,
        entries: &[Entry],
        done: &[(u16, u32)],
        mut free_head: u16,
        used: Position,
    ) {
        for (slot, _) in done {
            let Some(head) = entries.get(usize::from(*slot)) else {
                continue;
            };
            if let Some(last) = self.states.get(head.last) {
                last.next.store(free_head, Ordering::Relaxed);
            }
            kill_point!("ring-packed-linked");
            free_head = *slot;
        }
        self.store_free_heads(free_head, self.free_head);
        kill_point!("ring-packed-freed");
        then();
        self.store_used(used, self.used);
        kill_point!("ring-packed-counted");
        then();
    }

    /// The driver sees the batch: it is no longer in flight, and what is new is all that there is.
    #[inline]
    pub(super) fn settle(&mut self, done: &[(u16, u32)], free_head: u16, used: Position) {
        then();
        for (slot, _) in done {
            if let Some(state) = self.states.get(*slot) {
                state.inflight.store(0, Ordering::Relaxed);
            }
            kill_point!("ring-packed-cleared");
        }
        then();
        (self.free_head, self.used) = (free_head, used);
        self.store_free_heads(free_head, free_head);
        kill_point!("ring-packed-kept");
        then();
        self.store_used(used, used);
        kill_point!("ring-packed-settled");
        then();
    }
}

/// The two flags that say who has the descriptor at a place of the ring.
fn flags(ring: &PackedRing, at: Position) -> u16 {
    let tail = u64::from_le(ring.tail(at.index).load(Ordering::Relaxed));
    (tail >> 48) as u16 & (AVAIL | USED)
}
