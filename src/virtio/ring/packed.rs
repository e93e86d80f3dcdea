//! The packed ring (section 2.8, "Packed Virtqueues").
//!
//! A used descriptor overwrites whatever stands at its place, which may be a part of a chain that is still being
//! worked on. So a chain is copied out of the ring when it is popped, into entries that are the ring's own: a
//! slot is the chain's first entry, and nothing is read from the ring after that.

mod inflight;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{ChainBuf, ChainError, DESC_SIZE, MAX_DESCRIPTORS, read_pair};
use super::{RingConfig, RingError, lookup, need_event};
use crate::kill_point::kill_point;
use crate::virtio::inflight::QueueRegion;
use crate::virtio::memory::{GuestMemory, Mapping};
use inflight::PackedInflight;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

const EVENT_ENABLE: u16 = VRING_PACKED_EVENT_FLAG_ENABLE as u16;
const EVENT_DISABLE: u16 = VRING_PACKED_EVENT_FLAG_DISABLE as u16;
const EVENT_DESC: u16 = VRING_PACKED_EVENT_FLAG_DESC as u16;

/// The largest packed ring (section 2.8).
const MAX_SIZE: u16 = 1 << 15;

/// A place in the ring, and the wrap counter of whoever gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    /// Bits 0 to 14 the index, bit 15 the wrap counter; as in the event suppression areas.
    fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & 0x7fff,
            wrap: bits & 0x8000 != 0,
        }
    }

    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `count` descriptors further in a ring of `size`, where `count` is at most `size`.
    #[inline]
    fn behind(self, count: u16, size: u16) -> Self {
        let index = self.index + count;
        if index < size {
            Self { index, ..self }
        } else {
            Self {
                index: index - size,
                wrap: !self.wrap,
            }
        }
    }

    /// The two flags of a descriptor that is available here.
    #[inline]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The two flags of a descriptor that is used here.
    #[inline]
    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// A descriptor that was copied out of the ring. There are as many as the ring has, since a driver can not have
/// more outstanding.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    addr: u64,
    len: u32,
    flags: u16,
    /// The next one of the chain, or of the free list, which ends in the queue size.
    next: u16,
    /// Of a chain's first entry: its buffer id.
    id: u16,
    /// Of a chain's first entry: how many there are, 0 if it is not in flight.
    num: u16,
    /// Of a chain's first entry: the last one.
    last: u16,
    /// Of a chain's first entry: it is done, and not published.
    pushed: bool,
}

/// Host addresses of a ring's parts, checked when they were made.
#[derive(Debug)]
struct Parts {
    desc: *mut u8,
    /// Read here: whether the driver wants interrupts.
    driver: *const AtomicU32,
    /// Written here: whether we want notifications. Offset and wrap counter, then flags.
    device: *const AtomicU16,
    /// Keeps the memory mapped behind the three pointers.
    _mappings: [Arc<Mapping>; 3],
}

impl Parts {
    fn new(mem: &GuestMemory, cfg: &RingConfig) -> Result<Self, RingError> {
        if cfg.size == 0 || cfg.size > MAX_SIZE {
            return Err(RingError::PackedSize(cfg.size));
        }
        let bytes = u64::from(DESC_SIZE) * u64::from(cfg.size);
        let (desc, m0) = lookup(mem, "descriptor ring", cfg.desc_table, bytes, 16)?;
        let (driver, m1) = lookup(mem, "driver event suppression", cfg.avail_ring, 4, 4)?;
        let (device, m2) = lookup(mem, "device event suppression", cfg.used_ring, 4, 4)?;
        Ok(Self {
            desc,
            driver: driver.cast(),
            device: device.cast(),
            _mappings: [m0, m1, m2],
        })
    }
}

/// The device's side of a packed ring.
///
/// One thread owns it; nothing here locks or panics, and nothing allocates after the start.
#[derive(Debug)]
pub struct PackedRing {
    parts: Parts,
    next_avail: Position,
    next_used: Position,
    entries: Box<[Entry]>,
    free_head: u16,
    /// Slots that are done, with the bytes written, since the last publication.
    done: Vec<(u16, u32)>,
    /// Descriptors of all those.
    unpublished: u16,
    /// Descriptors that were shown since the driver was last asked whether it wants an interrupt.
    untold: u16,
    /// What a predecessor had in flight and was not popped yet, the next one last.
    again: Vec<u16>,
    inflight: Option<PackedInflight>,
    cfg: RingConfig,
}

// SAFETY: the pointers are addresses of shared memory that `parts` keeps mapped; nothing is bound to
// the thread that made them.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// Looks the ring up in guest memory. Where to go on says `cfg.base`.
    ///
    /// # Errors
    /// A size that cannot be, parts that are not aligned or not inside one region each, a base outside the ring.
    pub fn new(mem: &GuestMemory, cfg: &RingConfig) -> Result<Self, RingError> {
        let parts = Parts::new(mem, cfg)?;
        let size = cfg.size;
        let next_avail = Position::from_bits(cfg.base as u16);
        let next_used = Position::from_bits((cfg.base >> 16) as u16);
        if next_avail.index >= size || next_used.index >= size {
            let base = cfg.base;
            return Err(RingError::Base { base, size });
        }
        let entry = |index| Entry {
            next: index + 1,
            ..Entry::default()
        };
        Ok(Self {
            parts,
            next_avail,
            next_used,
            entries: (0..size).map(entry).collect(),
            free_head: 0,
            done: Vec::with_capacity(size.into()),
            unpublished: 0,
            untold: 0,
            again: Vec::new(),
            inflight: None,
            cfg: *cfg,
        })
    }

    /// As [`PackedRing::new`], with what is in flight kept in a region. Where a predecessor has left requests in
    /// it, they are handed out first, and the ring goes on behind them: `cfg.base` counts only with a region
    /// that is fresh.
    ///
    /// # Errors
    /// As [`PackedRing::new`], and a region that does not fit the ring.
    pub fn with_inflight(
        mem: &GuestMemory,
        cfg: &RingConfig,
        region: &QueueRegion,
    ) -> Result<Self, RingError> {
        let mut ring = Self::new(mem, cfg)?;
        let record = inflight::take_up(&mut ring, region)?;
        ring.inflight = Some(record);
        Ok(ring)
    }

    /// The memory table changed: looks the ring up again.
    ///
    /// # Errors
    /// The ring is not in the new memory; the old mapping stays in use.
    pub fn remap(&mut self, mem: &GuestMemory) -> Result<(), RingError> {
        self.parts = Parts::new(mem, &self.cfg)?;
        Ok(())
    }

    /// The second half of a descriptor: length, buffer id, flags.
    #[inline]
    fn tail(&self, index: u16) -> &AtomicU64 {
        debug_assert!(index < self.cfg.size);
        // SAFETY: `Parts::new` checked that `size` descriptors are mapped, 16-aligned; an index of ours is below
        // it. The driver accesses parts of these eight bytes at a time, which the hardware lets meet.
        unsafe { &*self.parts.desc.add(16 * usize::from(index) + 8).cast() }
    }

    /// Whether there is a descriptor to be popped. Acquire pairs with the driver's write barrier before the flags
    /// of a chain's first descriptor, which are the last it writes (section 2.8.21.1.1).
    #[inline]
    fn first(&self) -> Option<u64> {
        let tail = u64::from_le(self.tail(self.next_avail.index).load(Ordering::Acquire));
        let flags = (tail >> 48) as u16;
        (flags & (AVAIL | USED) == self.next_avail.available()).then_some(tail)
    }

    /// The next request, or `None` when the ring is empty. What it gives is a slot: the chain's first entry.
    ///
    /// # Errors
    /// The ring is broken: a chain has more descriptors than the driver can have left. Nothing was taken, so the
    /// error repeats until the driver resets the queue.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(again) = self.again.pop() {
            return Ok(Some(again));
        }
        let Some(mut tail) = self.first() else {
            return Ok(None);
        };
        let (size, slot) = (self.cfg.size, self.free_head);
        let (mut at, mut entry, mut num) = (self.next_avail, slot, 0u16);
        let free_head = loop {
            // SAFETY: as in `tail`, for the first eight bytes.
            let addr = unsafe {
                let desc = self.parts.desc.add(16 * usize::from(at.index));
                u64::from_le(desc.cast::<u64>().read_volatile())
            };
            let Some(copy) = self.entries.get_mut(usize::from(entry)) else {
                let index = self.next_avail.index;
                return Err(RingError::Overrun { index, size });
            };
            copy.addr = addr;
            copy.len = tail as u32;
            copy.flags = (tail >> 48) as u16;
            num += 1;
            at = at.behind(1, size);
            if copy.flags & NEXT == 0 {
                break copy.next;
            }
            // Entries are all different until the free list ends, so this ends too.
            entry = copy.next;
            tail = u64::from_le(self.tail(at.index).load(Ordering::Relaxed));
        };
        let Some(head) = self.entries.get_mut(usize::from(slot)) else {
            return Ok(None);
        };
        // The buffer id is in the last descriptor (section 2.8.6).
        head.id = (tail >> 32) as u16;
        head.num = num;
        head.last = entry;
        if let Some(inflight) = &mut self.inflight {
            inflight.take(&self.entries, slot, free_head);
        }
        self.free_head = free_head;
        self.next_avail = at;
        Ok(Some(slot))
    }

    /// Whether [`PackedRing::pop`] has something to say: a request, or an error.
    #[inline]
    pub fn available(&self) -> bool {
        self.backlog() > 0 || self.first().is_some()
    }

    /// Requests of a predecessor that are still to be popped.
    #[inline]
    pub fn backlog(&self) -> u16 {
        // At most the queue size.
        self.again.len() as u16
    }

    /// Collects the buffers of a slot that was popped, see [`SplitRing::read_chain`](super::SplitRing::read_chain).
    ///
    /// # Errors
    /// What [`ChainError`] says. `chain` then holds a part of the chain, of no use.
    #[inline]
    pub fn read_chain(
        &self,
        mem: &GuestMemory,
        slot: u16,
        chain: &mut ChainBuf,
    ) -> Result<(), ChainError> {
        chain.clear();
        let (mut index, mut left) = (slot, None);
        while let Some(entry) = self.entries.get(usize::from(index)) {
            let num = left.unwrap_or(entry.num);
            if entry.flags & INDIRECT != 0 {
                if !self.cfg.indirect {
                    return Err(ChainError::IndirectNotNegotiated);
                }
                // A list is of one kind only (section 2.8.19).
                if left.is_some() || num != 1 {
                    return Err(ChainError::IndirectNext);
                }
                return read_indirect(mem, entry.addr, entry.len, chain);
            }
            chain.push(mem, entry.addr, entry.len, entry.flags & WRITE != 0)?;
            if num <= 1 {
                break;
            }
            left = Some(num - 1);
            index = entry.next;
        }
        Ok(())
    }

    /// The request of a slot is done, and `written` bytes of its buffers were written. The driver sees it after
    /// [`PackedRing::publish`], which is also when the slot is free again.
    #[inline]
    pub fn push_used(&mut self, slot: u16, written: u32) {
        let Some(entry) = self.entries.get_mut(usize::from(slot)) else {
            return;
        };
        // Of a slot that is in flight, and once.
        if entry.pushed || entry.num == 0 {
            return;
        }
        entry.pushed = true;
        self.unpublished += entry.num;
        self.done.push((slot, written));
    }

    /// The place behind what was pushed; bit 15 is the wrap counter.
    #[inline]
    pub fn next_used(&self) -> u16 {
        self.next_used
            .behind(self.unpublished, self.cfg.size)
            .bits()
    }

    /// The place of the used descriptor that the driver looks at next; bit 15 is the wrap counter.
    #[inline]
    pub fn published_used(&self) -> u16 {
        self.next_used.bits()
    }

    /// Writes the used descriptors of what was pushed, for a driver that looks. Whether it wants an interrupt for
    /// them, the next [`PackedRing::publish`] says.
    ///
    /// The driver looks at one place only, that of the first one. It is written last, and shows them all.
    #[inline]
    pub fn show(&mut self) {
        if self.done.is_empty() {
            return;
        }
        let size = self.cfg.size;
        let old = self.next_used;
        if let Some(inflight) = &mut self.inflight {
            let used = old.behind(self.unpublished, size);
            inflight.complete(&self.entries, &self.done, self.free_head, used);
        }
        let (mut at, mut first) = (old, None);
        for (slot, written) in &self.done {
            let Some(entry) = self.entries.get_mut(usize::from(*slot)) else {
                continue;
            };
            let (id, num, last) = (entry.id, entry.num, entry.last);
            (entry.num, entry.pushed) = (0, false);
            // WRITE says that the length means something (section 2.8.4).
            let flags = at.used() | if *written > 0 { WRITE } else { 0 };
            let tail = u64::from(flags) << 48 | u64::from(id) << 32 | u64::from(*written);
            match first {
                None => first = Some(tail),
                Some(_) => {
                    self.tail(at.index).store(tail.to_le(), Ordering::Relaxed);
                    kill_point!("ring-packed-written");
                }
            }
            if let Some(last) = self.entries.get_mut(usize::from(last)) {
                last.next = self.free_head;
            }
            self.free_head = *slot;
            at = at.behind(num, size);
        }
        if let Some(first) = first {
            // Release pairs with the driver's read barrier behind the flags: the other used descriptors, data and
            // status are there once they are seen.
            self.tail(old.index).store(first.to_le(), Ordering::Release);
        }
        self.next_used = at;
        if let Some(inflight) = &mut self.inflight {
            kill_point!("ring-packed-shown");
            inflight.settle(&self.done, self.free_head, at);
        }
        self.done.clear();
        // From a whole lap on, each place was passed.
        let shown = std::mem::take(&mut self.unpublished);
        self.untold = self.untold.saturating_add(shown);
    }

    /// Shows the driver what was pushed, and says whether it wants an interrupt for that and what was only
    /// [shown](PackedRing::show). `false` when there is nothing of the kind.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let total = std::mem::take(&mut self.untold);
        if total == 0 {
            return false;
        }
        let (at, size) = (self.next_used, self.cfg.size);
        // What is used must be visible before the driver's wish is read; the driver writes its wish, then a full
        // barrier, then looks. Otherwise both sides can miss each other.
        fence(Ordering::SeqCst);
        // SAFETY: `Parts::new` checked four bytes, aligned. Offset and flags are read at once.
        let event = u32::from_le(unsafe { &*self.parts.driver }.load(Ordering::Relaxed));
        match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.cfg.event_idx => {
                let event = Position::from_bits(event as u16);
                // Seen from the lap that the ring is in now.
                let lap = if event.wrap == at.wrap { 0 } else { size };
                need_event(
                    event.index.wrapping_sub(lap),
                    at.index,
                    at.index.wrapping_sub(total),
                )
            }
            _ => true,
        }
    }

    /// A field of the device's event suppression area: 0 offset and wrap counter, 1 flags.
    #[inline]
    fn device_event(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 2);
        // SAFETY: `Parts::new` checked four bytes, aligned.
        unsafe { &*self.parts.device.add(index) }
    }

    /// Asks the driver not to notify.
    #[inline]
    pub fn disable_notification(&mut self) {
        let flags = self.device_event(1);
        flags.store(EVENT_DISABLE.to_le(), Ordering::Relaxed);
    }

    /// Asks the driver to notify of the next request. `true` when requests are waiting already: the driver may
    /// have made them available before it saw the wish, so look before going to sleep.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        let mut flags = EVENT_ENABLE;
        if self.cfg.event_idx {
            let next = self.next_avail.bits().to_le();
            self.device_event(0).store(next, Ordering::Relaxed);
            flags = EVENT_DESC;
        }
        // Release: the offset is there once the driver sees that it counts.
        self.device_event(1).store(flags.to_le(), Ordering::Release);
        // Pairs with the driver's full barrier between the descriptor's flags and reading the wish (section
        // 2.8.21.3.1).
        fence(Ordering::SeqCst);
        self.available()
    }

    /// The same as [`RingConfig::base`]: the answer to `GET_VRING_BASE` once all is drained.
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// The queue size.
    #[inline]
    pub fn size(&self) -> u16 {
        self.cfg.size
    }
}

/// Section 2.8.7, "Indirect Flag": a table has no links, and no flag but WRITE means anything in it.
fn read_indirect(
    mem: &GuestMemory,
    addr: u64,
    len: u32,
    chain: &mut ChainBuf,
) -> Result<(), ChainError> {
    let count = len / DESC_SIZE;
    if len % DESC_SIZE != 0 || count == 0 || count > MAX_DESCRIPTORS {
        return Err(ChainError::IndirectLength { len });
    }
    let len = u64::from(len);
    let table = mem
        .host_ptr(addr, len)
        .ok_or(ChainError::Unmapped { addr, len })?;
    for index in 0..count as usize {
        // SAFETY: `count` descriptors are mapped at `table`.
        let (addr, tail) = unsafe { read_pair(table.add(index * DESC_SIZE as usize)) };
        let flags = (tail >> 48) as u16;
        chain.push(mem, addr, tail as u32, flags & WRITE != 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
