//! The split ring (section 2.7, "Split Virtqueues").

mod inflight;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use super::chain::{ChainBuf, ChainError, DESC_SIZE, MAX_DESCRIPTORS, read_pair};
use super::{RingConfig, RingError, lookup, need_event};
use crate::kill_point::kill_point;
use crate::virtio::inflight::QueueRegion;
use crate::virtio::memory::{GuestMemory, Mapping};
use inflight::SplitInflight;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Host addresses of a ring's parts, checked when they were made.
#[derive(Debug)]
struct Parts {
    desc: *const u8,
    avail: *const AtomicU16,
    used: *const AtomicU16,
    /// Keeps the memory mapped behind the three pointers.
    _mappings: [Arc<Mapping>; 3],
}

impl Parts {
    fn new(mem: &GuestMemory, cfg: &RingConfig) -> Result<Self, RingError> {
        let size = u64::from(cfg.size);
        if !cfg.size.is_power_of_two() {
            // A u16 power of two is at most 32768.
            return Err(RingError::Size(cfg.size));
        }
        // The event fields exist only where they were negotiated (sections 2.7.6 and 2.7.8).
        let event = if cfg.event_idx { 2 } else { 0 };
        let (desc, m0) = lookup(
            mem,
            "descriptor table",
            cfg.desc_table,
            size * u64::from(DESC_SIZE),
            16,
        )?;
        let (avail, m1) = lookup(
            mem,
            "available ring",
            cfg.avail_ring,
            4 + 2 * size + event,
            2,
        )?;
        let (used, m2) = lookup(mem, "used ring", cfg.used_ring, 4 + 8 * size + event, 4)?;
        Ok(Self {
            desc,
            avail: avail.cast(),
            used: used.cast(),
            _mappings: [m0, m1, m2],
        })
    }
}

/// The device's side of a split ring.
///
/// One thread owns it; nothing here locks, allocates or panics. Host pointers are cached, and the
/// ring keeps the mappings behind them alive until [`SplitRing::remap`] or its end.
#[derive(Debug)]
pub struct SplitRing {
    parts: Parts,
    mask: u16,
    next_avail: u16,
    /// `avail.idx` as last read: chains before it are served without looking again.
    avail_idx: u16,
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    /// `used.idx` when the driver was last asked whether it wants an interrupt.
    told: u16,
    cfg: RingConfig,
    inflight: Option<SplitInflight>,
}

// SAFETY: the pointers are addresses of shared memory that `parts` keeps mapped; nothing is bound to
// the thread that made them.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Looks the ring up in guest memory. The used index is read from the ring, the available index
    /// is `cfg.base`.
    ///
    /// # Errors
    /// A size that is no power of two, parts that are not aligned or not inside one region each.
    pub fn new(mem: &GuestMemory, cfg: &RingConfig) -> Result<Self, RingError> {
        let parts = Parts::new(mem, cfg)?;
        let mut ring = Self {
            parts,
            mask: cfg.size - 1,
            // A split ring's base has 16 bits: the session has seen to that.
            next_avail: cfg.base as u16,
            avail_idx: cfg.base as u16,
            next_used: 0,
            published: 0,
            told: 0,
            cfg: *cfg,
            inflight: None,
        };
        ring.next_used = u16::from_le(ring.used_field(1).load(Ordering::Acquire));
        ring.published = ring.next_used;
        ring.told = ring.next_used;
        Ok(ring)
    }

    /// As [`SplitRing::new`], with what is in flight kept in a region. Where a predecessor has left requests in
    /// it, they are handed out first, and the ring goes on behind them: `cfg.base` counts only with a region
    /// that is fresh.
    ///
    /// # Errors
    /// As [`SplitRing::new`], and a region that does not fit the ring.
    pub fn with_inflight(
        mem: &GuestMemory,
        cfg: &RingConfig,
        region: &QueueRegion,
    ) -> Result<Self, RingError> {
        let mut ring = Self::new(mem, cfg)?;
        let used_id = |index| ring.used_element(index).0.load(Ordering::Relaxed);
        let shown = inflight::Shown {
            size: cfg.size,
            used_idx: ring.next_used,
            avail_idx: ring.load_avail_idx(),
            used_id: &|index| u32::from_le(used_id(index)),
        };
        let (inflight, found) = SplitInflight::new(region, &shown)?;
        if let Some(in_flight) = found {
            ring.next_avail = ring.next_used.wrapping_add(in_flight);
            ring.avail_idx = ring.next_avail;
        }
        ring.inflight = Some(inflight);
        Ok(ring)
    }

    /// The memory table changed: looks the ring up again. Indices are kept.
    ///
    /// # Errors
    /// The ring is not in the new memory; the old mapping stays in use.
    pub fn remap(&mut self, mem: &GuestMemory) -> Result<(), RingError> {
        self.parts = Parts::new(mem, &self.cfg)?;
        Ok(())
    }

    /// A 16-bit field of the available ring: 0 flags, 1 idx, 2.. the ring, then `used_event`.
    #[inline]
    fn avail_field(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 2 + usize::from(self.cfg.size) + usize::from(self.cfg.event_idx));
        // SAFETY: `Parts::new` checked the alignment and that the whole available ring is mapped,
        // and `index` stays inside it. The driver only does plain accesses of this width here.
        unsafe { &*self.parts.avail.add(index) }
    }

    /// A 16-bit field of the used ring's header: 0 flags, 1 idx.
    #[inline]
    fn used_field(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 2);
        // SAFETY: as in `avail_field`, for the used ring.
        unsafe { &*self.parts.used.add(index) }
    }

    #[inline]
    fn avail_event(&self) -> &AtomicU16 {
        debug_assert!(self.cfg.event_idx);
        // SAFETY: with `event_idx`, `Parts::new` checked two bytes after the last used element.
        unsafe { &*self.parts.used.add(2 + 4 * usize::from(self.cfg.size)) }
    }

    #[inline]
    fn load_avail_idx(&self) -> u16 {
        // Acquire pairs with the driver's write barrier between the ring entry and avail.idx
        // (section 2.7.13.3): what the entry names is complete once the index is seen.
        u16::from_le(self.avail_field(1).load(Ordering::Acquire))
    }

    /// The next chain's head, or `None` when the ring is empty.
    ///
    /// # Errors
    /// The ring is broken: `avail.idx` ran ahead by more than the queue size, or the head does not
    /// exist. Nothing was taken, so the error repeats until the driver resets the queue.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(again) = self.inflight.as_mut().and_then(SplitInflight::again) {
            return Ok(Some(again));
        }
        if self.next_avail == self.avail_idx {
            let avail_idx = self.load_avail_idx();
            if avail_idx == self.next_avail {
                return Ok(None);
            }
            if avail_idx.wrapping_sub(self.next_avail) > self.cfg.size {
                return Err(RingError::AvailIndex {
                    avail_idx,
                    next_avail: self.next_avail,
                    size: self.cfg.size,
                });
            }
            self.avail_idx = avail_idx;
        }
        let entry = 2 + usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail_field(entry).load(Ordering::Relaxed));
        if head >= self.cfg.size {
            return Err(RingError::Head {
                head,
                size: self.cfg.size,
            });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Ok(Some(head))
    }

    /// Whether [`SplitRing::pop`] has something to say: a chain, or an error.
    #[inline]
    pub fn available(&self) -> bool {
        self.next_avail != self.avail_idx
            || self.load_avail_idx() != self.next_avail
            || self.backlog() > 0
    }

    /// Chains of a predecessor that are still to be popped.
    #[inline]
    pub fn backlog(&self) -> u16 {
        self.inflight.as_ref().map_or(0, SplitInflight::backlog)
    }

    /// How many chains are waiting, at most the queue size.
    #[inline]
    pub fn pending(&self) -> u16 {
        self.load_avail_idx()
            .wrapping_sub(self.next_avail)
            .min(self.cfg.size)
    }

    /// Collects the chain of `head` into `chain`: readable buffers first, then writable ones.
    ///
    /// Every descriptor is read once. A descriptor of no bytes is skipped; a buffer that crosses into
    /// an adjacent region becomes two.
    ///
    /// # Errors
    /// What [`ChainError`] says. `chain` then holds a part of the chain, of no use.
    #[inline]
    pub fn read_chain(
        &self,
        mem: &GuestMemory,
        head: u16,
        chain: &mut ChainBuf,
    ) -> Result<(), ChainError> {
        chain.clear();
        // SAFETY: `Parts::new` checked that `size` descriptors are mapped here.
        let indirect = unsafe {
            walk(
                mem,
                self.parts.desc,
                u32::from(self.cfg.size),
                head,
                chain,
                self.cfg.indirect,
            )?
        };
        match indirect {
            None => Ok(()),
            Some(table) => read_indirect(mem, table, chain),
        }
    }

    /// Id and length of the used element that `index` (free running) stands for.
    #[inline]
    fn used_element(&self, index: u16) -> (&AtomicU32, &AtomicU32) {
        let index = usize::from(index & self.mask);
        // SAFETY: `Parts::new` checked `size` elements of 8 bytes after 4 bytes of header, 4-aligned.
        unsafe {
            let element = self.parts.used.cast::<AtomicU32>().add(1 + 2 * index);
            (&*element, &*element.add(1))
        }
    }

    /// Writes a used element: the chain of `head` is done and `written` bytes of it were written.
    /// The driver sees it after [`SplitRing::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let (id, len) = self.used_element(self.next_used);
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        len.store(written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.push(head);
        }
    }

    /// Makes the pushed elements visible to a driver that looks. Whether it wants an interrupt for them, the next
    /// [`SplitRing::publish`] says.
    #[inline]
    pub fn show(&mut self) {
        let new = self.next_used;
        if self.published == new {
            return;
        }
        // Release pairs with the driver's read barrier after used.idx: elements, data and status
        // are there once the index is seen.
        self.used_field(1).store(new.to_le(), Ordering::Release);
        self.published = new;
        if let Some(inflight) = &mut self.inflight {
            kill_point!("ring-split-shown");
            inflight.settle(new);
        }
    }

    /// Makes the pushed elements visible, and says whether the driver wants an interrupt for them and those that were
    /// only [shown](SplitRing::show). `false` when there are none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let (old, new) = (self.told, self.published);
        if old == new {
            return false;
        }
        self.told = new;
        // The index must be visible before the driver's wish is read; the driver writes its wish,
        // then a full barrier, then reads the index (sections 2.7.7.2 and 2.7.14). Otherwise both
        // sides can miss each other.
        fence(Ordering::SeqCst);
        if self.cfg.event_idx {
            let at = 2 + usize::from(self.cfg.size);
            let event = u16::from_le(self.avail_field(at).load(Ordering::Relaxed));
            need_event(event, new, old)
        } else {
            let flags = u16::from_le(self.avail_field(0).load(Ordering::Relaxed));
            flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    /// Asks the driver not to notify, as far as it can be asked.
    ///
    /// With `EVENT_IDX` there is no switch: the driver notifies when it passes `avail_event`, once in 65536 chains.
    #[inline]
    pub fn disable_notification(&mut self) {
        if self.cfg.event_idx {
            // Behind what was fetched: 65535 more chains can come without passing it. Left where it was when we asked,
            // it would be passed by the next one if what woke us was something else.
            let behind = self.next_avail.wrapping_sub(1);
            self.avail_event().store(behind.to_le(), Ordering::Relaxed);
        } else {
            let flags = VRING_USED_F_NO_NOTIFY as u16;
            self.used_field(0).store(flags.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify about the next chain. `true` when chains are waiting already: the
    /// driver may have made them available before it saw the wish, so look before going to sleep.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        if self.cfg.event_idx {
            self.avail_event()
                .store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_field(0).store(0, Ordering::Relaxed);
        }
        // Pairs with the driver's full barrier between avail.idx and reading the wish (section
        // 2.7.13.4).
        fence(Ordering::SeqCst);
        self.load_avail_idx() != self.next_avail || self.backlog() > 0
    }

    /// The next available index to be served.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The same as [`RingConfig::base`]: the answer to `GET_VRING_BASE` once all is drained.
    pub fn base(&self) -> u32 {
        self.next_avail.into()
    }

    /// The index of the next used element to be pushed.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// `used.idx` as last published (or found at the start).
    pub fn published_used(&self) -> u16 {
        self.published
    }

    /// Where the ring lies and how it was negotiated, as given at the start.
    pub fn config(&self) -> &RingConfig {
        &self.cfg
    }

    /// The queue size.
    pub fn size(&self) -> u16 {
        self.cfg.size
    }

    /// Byte offset and length in the used ring of the element that `index` (free running) stands
    /// for, for the dirty log. `used.idx` is the two bytes at offset 2.
    pub fn used_element_range(&self, index: u16) -> (u64, u64) {
        (4 + 8 * u64::from(index & self.mask), 8)
    }
}

/// An indirect table that a chain led to.
struct Table {
    addr: u64,
    len: u32,
}

/// Walks one table from `index` on. `Some` when the chain goes on in an indirect table, which is
/// always its last descriptor.
///
/// # Safety
/// `count` descriptors are mapped at `table`, for the whole call.
#[inline]
unsafe fn walk(
    mem: &GuestMemory,
    table: *const u8,
    count: u32,
    index: u16,
    chain: &mut ChainBuf,
    indirect: bool,
) -> Result<Option<Table>, ChainError> {
    let mut index = u32::from(index);
    // A chain that visits more descriptors than its table has visits one twice.
    for _ in 0..count {
        if index >= count {
            return Err(ChainError::Index { index, count });
        }
        // SAFETY: `index < count`, and the caller promises `count` descriptors.
        let (addr, rest) = unsafe { read_pair(table.add((index * DESC_SIZE) as usize)) };
        let len = rest as u32;
        let flags = (rest >> 32) as u16;
        let next = (rest >> 48) as u16;
        if flags & INDIRECT != 0 {
            if !indirect {
                return Err(ChainError::IndirectNotNegotiated);
            }
            if flags & NEXT != 0 {
                return Err(ChainError::IndirectNext);
            }
            // WRITE is ignored here, as section 2.7.5.3.2 tells the device to.
            return Ok(Some(Table { addr, len }));
        }
        chain.push(mem, addr, len, flags & WRITE != 0)?;
        if flags & NEXT == 0 {
            return Ok(None);
        }
        index = u32::from(next);
    }
    Err(ChainError::Loop { count })
}

/// Section 2.7.5.3, "Indirect Descriptors".
fn read_indirect(mem: &GuestMemory, table: Table, chain: &mut ChainBuf) -> Result<(), ChainError> {
    let Table { addr, len } = table;
    let count = len / DESC_SIZE;
    if len % DESC_SIZE != 0 || count == 0 || count > MAX_DESCRIPTORS {
        return Err(ChainError::IndirectLength { len });
    }
    // The table must lie in one region: drivers allocate it in one piece, and a region boundary is a
    // hole of the machine's memory map.
    let host = mem
        .host_ptr(addr, u64::from(len))
        .ok_or(ChainError::Unmapped {
            addr,
            len: u64::from(len),
        })?;
    // SAFETY: `count` descriptors are mapped at `host`.
    match unsafe { walk(mem, host, count, 0, chain, true)? } {
        None => Ok(()),
        Some(_) => Err(ChainError::NestedIndirect),
    }
}

#[cfg(test)]
mod tests;
