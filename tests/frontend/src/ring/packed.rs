//! The driver side of a packed virtqueue (virtio specification, "Packed Virtqueues", section 2.8).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use super::{
    Buf, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Driver, Lines, Notify, RingLayout, Used,
    need_event, wait_used,
};
use crate::error::{Error, Result};
use crate::memory::{Memory, Region};
use crate::message::VringAddr;

/// Descriptor flag: equals the driver's wrap counter where the driver made the descriptor available.
pub const DESC_F_AVAIL: u16 = 1 << 7;
/// Descriptor flag: equals the other flag where the device used the descriptor.
pub const DESC_F_USED: u16 = 1 << 15;
/// Event suppression: notify always.
pub const EVENT_ENABLE: u16 = 0;
/// Event suppression: notify never.
pub const EVENT_DISABLE: u16 = 1;
/// Event suppression: notify when the descriptor that is named is reached.
pub const EVENT_DESC: u16 = 2;

/// A place in the ring, with the wrap counter that is in force there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Descriptor.
    pub index: u16,
    /// Wrap counter.
    pub wrap: bool,
}

impl Position {
    /// Where a ring begins.
    pub const START: Self = Self {
        index: 0,
        wrap: true,
    };

    /// The sixteen bits of it, as in event suppression and in SET_VRING_BASE.
    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn advanced(self, count: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(count);
        if index >= u32::from(size) {
            Self {
                index: (index - u32::from(size)) as u16,
                wrap: !self.wrap,
            }
        } else {
            Self {
                index: index as u16,
                ..self
            }
        }
    }

    fn avail_flags(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }
}

/// The bytes of an indirect table's entry: addresses, lengths and the write flag only (section 2.8.7).
pub fn table_entry(buf: &Buf) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buf.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&buf.len.to_le_bytes());
    let flags = if buf.write { DESC_F_WRITE } else { 0 };
    bytes[14..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Marks an id that no chain of ours has.
const NO_CHAIN: u16 = 0;
/// What the driver writes where a device must not look for a buffer id: in all but the last descriptor.
const NO_ID: u16 = 0xfeed;

/// The driver side of one packed virtqueue.
#[derive(Debug)]
pub struct PackedQueue {
    size: u16,
    layout: RingLayout,
    regions: [Arc<Region>; 3],
    desc: *mut u8,
    driver: *mut u16,
    device: *mut u16,
    event_idx: bool,
    notify: Notify,
    free_ids: Vec<u16>,
    free_count: u16,
    /// Descriptors of the chain with this id, `NO_CHAIN` for none.
    chain_len: Box<[u16]>,
    tokens: Box<[u64]>,
    next_avail: Position,
    next_used: Position,
    /// The first descriptor that is not visible yet, with the flags that will make it so.
    hidden: Option<(u16, u16)>,
    /// Descriptors added since the last look at the device's event suppression.
    added: u16,
    lines: Lines,
}

// SAFETY: the pointers point into mappings that the regions keep alive; the queue is used by one thread.
unsafe impl Send for PackedQueue {}

impl PackedQueue {
    /// A ring of `size` descriptors anywhere in `memory`.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new(memory: &Memory, size: u16) -> Result<Self> {
        let layout = RingLayout {
            desc: memory.alloc(16 * u64::from(size), 16),
            avail: memory.alloc(4, 4),
            used: memory.alloc(4, 4),
        };
        Self::at(memory, size, layout)
    }

    /// A ring whose parts lie where `layout` says (`avail` is the driver's event suppression, `used` the
    /// device's); they are cleared.
    ///
    /// # Errors
    /// Those of eventfd(2).
    ///
    /// # Panics
    /// When `layout` is not in `memory`, or not aligned as the specification demands.
    pub fn at(memory: &Memory, size: u16, layout: RingLayout) -> Result<Self> {
        assert!(layout.desc % 16 == 0 && layout.avail % 4 == 0 && layout.used % 4 == 0);
        let n = usize::from(size);
        let desc_len = 16 * u64::from(size);
        let regions = [
            memory.region_of(layout.desc, desc_len).clone(),
            memory.region_of(layout.avail, 4).clone(),
            memory.region_of(layout.used, 4).clone(),
        ];
        let mut queue = Self {
            size,
            layout,
            desc: regions[0].host(layout.desc, desc_len),
            driver: regions[1].host(layout.avail, 4).cast(),
            device: regions[2].host(layout.used, 4).cast(),
            regions,
            event_idx: false,
            notify: Notify::Call,
            free_ids: Vec::with_capacity(n),
            free_count: size,
            chain_len: vec![NO_CHAIN; n].into(),
            tokens: vec![0; n].into(),
            next_avail: Position::START,
            next_used: Position::START,
            hidden: None,
            added: 0,
            lines: Lines::new()?,
        };
        queue.reset();
        Ok(queue)
    }

    /// Forgets everything and clears the ring, as a driver does at its start.
    pub fn reset(&mut self) {
        self.free_count = self.size;
        self.start_at(Position::START);
        self.lines.call.take();
    }

    /// Starts the ring at any place, for tests of wrap-around. Only on a ring that is empty; the backend must
    /// be given the same base.
    ///
    /// # Panics
    /// When chains are in flight.
    pub fn start_at(&mut self, start: Position) {
        assert_eq!(self.free_count, self.size, "chains are in flight");
        let n = usize::from(self.size);
        // SAFETY: the parts were checked to have these lengths when the pointers were made.
        unsafe {
            std::ptr::write_bytes(self.desc, 0, 16 * n);
            std::ptr::write_bytes(self.device.cast::<u8>(), 0, 4);
        }
        // As if the lap so far had been used: neither available nor used when the ring comes there next.
        for index in 0..self.size {
            let lap = start.wrap == (index < start.index);
            let flags = if lap { DESC_F_AVAIL | DESC_F_USED } else { 0 };
            self.flags_at(index).store(flags.to_le(), Ordering::Relaxed);
        }
        self.free_ids.clear();
        self.free_ids.extend((0..self.size).rev());
        self.chain_len.fill(NO_CHAIN);
        self.tokens.fill(0);
        self.next_avail = start;
        self.next_used = start;
        self.hidden = None;
        self.added = 0;
        self.set_notify(self.notify);
    }

    fn flags_at(&self, index: u16) -> &AtomicU16 {
        assert!(index < self.size);
        // SAFETY: the index is in the ring, which is mapped and 16-byte aligned; both sides reach the flags
        // through atomics.
        unsafe { AtomicU16::from_ptr(self.desc.add(16 * usize::from(index) + 14).cast()) }
    }

    fn put(&mut self, index: u16, addr: u64, len: u32, id: u16) {
        assert!(index < self.size);
        // SAFETY: as in `flags_at`; the flags are not touched.
        unsafe {
            let desc = self.desc.add(16 * usize::from(index));
            desc.cast::<u64>().write_volatile(addr.to_le());
            desc.add(8).cast::<u32>().write_volatile(len.to_le());
            desc.add(12).cast::<u16>().write_volatile(id.to_le());
        }
    }

    fn event_word(&self, device: bool, at: usize) -> &AtomicU16 {
        let area = if device { self.device } else { self.driver };
        // SAFETY: both areas are two words, aligned and mapped.
        unsafe { AtomicU16::from_ptr(area.add(at)) }
    }

    /// Whether EVENT_IDX was negotiated.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
        self.set_notify(self.notify);
    }

    /// How completions are waited for, and what the device is told about it.
    pub fn set_notify(&mut self, notify: Notify) {
        self.notify = notify;
        let flags = match (notify, self.event_idx) {
            (Notify::Poll, _) => EVENT_DISABLE,
            (Notify::Call, false) => EVENT_ENABLE,
            (Notify::Call, true) => EVENT_DESC,
        };
        self.ask_for_event();
        // The place before the flags that make it count.
        self.event_word(false, 1)
            .store(flags.to_le(), Ordering::Release);
    }

    fn ask_for_event(&self) {
        let next = self.next_used.bits();
        self.event_word(false, 0)
            .store(next.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the ring lies.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// Free descriptors.
    pub fn free_count(&self) -> u16 {
        self.free_count
    }

    /// Chains that the device owns.
    pub fn in_flight(&self) -> usize {
        self.chain_len.iter().filter(|n| **n != NO_CHAIN).count()
    }

    /// Where the next chain will be put.
    pub fn next_avail(&self) -> Position {
        self.next_avail
    }

    /// Where the next used descriptor is looked for.
    pub fn next_used(&self) -> Position {
        self.next_used
    }

    /// The addresses for SET_VRING_ADDR.
    pub fn vring_addr(&self, flags: u32) -> VringAddr {
        VringAddr {
            flags,
            desc: self.regions[0].user_addr(self.layout.desc),
            avail: self.regions[1].user_addr(self.layout.avail),
            used: self.regions[2].user_addr(self.layout.used),
            // What the device writes of a packed ring is the descriptor ring itself, logged by its address; the
            // device's event suppression has this one.
            log: self.layout.used,
        }
    }

    /// Puts a chain in the ring, not yet visible to the device; `None` when descriptors are short.
    pub fn add(&mut self, bufs: &[Buf], token: u64) -> Option<u16> {
        if bufs.is_empty() || bufs.len() > usize::from(self.free_count) {
            return None;
        }
        let id = self.free_ids.pop()?;
        for (i, buf) in bufs.iter().enumerate() {
            let last = i + 1 == bufs.len();
            let flags =
                if last { 0 } else { DESC_F_NEXT } | if buf.write { DESC_F_WRITE } else { 0 };
            self.put_next(buf.addr, buf.len, if last { id } else { NO_ID }, flags);
        }
        self.own(id, bufs.len() as u16, token);
        Some(id)
    }

    /// Puts a chain of one descriptor with any flags in the ring.
    pub fn add_one(&mut self, addr: u64, len: u32, flags: u16, token: u64) -> Option<u16> {
        if self.free_count == 0 {
            return None;
        }
        let id = self.free_ids.pop()?;
        self.put_next(addr, len, id, flags);
        self.own(id, 1, token);
        Some(id)
    }

    /// Puts a chain in the ring as one indirect descriptor; the table is written at `table`, which must have
    /// room for 16 bytes a buffer.
    pub fn add_indirect(
        &mut self,
        memory: &Memory,
        table: u64,
        bufs: &[Buf],
        token: u64,
    ) -> Option<u16> {
        if bufs.is_empty() || self.free_count == 0 {
            return None;
        }
        for (i, buf) in bufs.iter().enumerate() {
            memory.write(table + 16 * i as u64, &table_entry(buf));
        }
        self.add_one(table, 16 * bufs.len() as u32, DESC_F_INDIRECT, token)
    }

    fn put_next(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let at = self.next_avail;
        let flags = flags | at.avail_flags();
        self.put(at.index, addr, len, id);
        // A device takes descriptors in order: while the first is hidden, all behind it are.
        if self.hidden.is_none() {
            self.hidden = Some((at.index, flags));
        } else {
            self.flags_at(at.index)
                .store(flags.to_le(), Ordering::Release);
        }
        self.next_avail = at.advanced(1, self.size);
        self.added += 1;
    }

    fn own(&mut self, id: u16, len: u16, token: u64) {
        self.free_count -= len;
        self.chain_len[usize::from(id)] = len;
        self.tokens[usize::from(id)] = token;
    }

    /// Makes all chains added so far visible to the device, and kicks it if it asks for that.
    pub fn publish(&mut self) {
        let Some((index, flags)) = self.hidden.take() else {
            return;
        };
        self.flags_at(index).store(flags.to_le(), Ordering::Release);
        let added = std::mem::take(&mut self.added);
        // The device enables its event suppression, looks at the ring once more, and sleeps; we make
        // descriptors available and look at its event suppression. Neither look may pass the other's store.
        fence(Ordering::SeqCst);
        let wanted = match u16::from_le(self.event_word(true, 1).load(Ordering::Acquire)) & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                let bits = u16::from_le(self.event_word(true, 0).load(Ordering::Relaxed));
                let mut event = bits & 0x7fff;
                if (bits >> 15 != 0) != self.next_avail.wrap {
                    event = event.wrapping_sub(self.size);
                }
                let new = self.next_avail.index;
                need_event(event, new, new.wrapping_sub(added))
            }
            _ => true,
        };
        if wanted {
            self.kick();
        }
    }

    /// Kicks the device, wanted or not.
    pub fn kick(&mut self) {
        self.lines.kick();
    }

    /// Takes the next used buffer, if there is one.
    ///
    /// # Errors
    /// `Protocol` when the device used a buffer that it does not own.
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        let at = self.next_used;
        let flags = u16::from_le(self.flags_at(at.index).load(Ordering::Acquire));
        let (avail, used) = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
        if avail != used || used != at.wrap {
            return Ok(None);
        }
        // SAFETY: the index is in the ring.
        let (id, len) = unsafe {
            let desc = self.desc.add(16 * usize::from(at.index));
            (
                u16::from_le(desc.add(12).cast::<u16>().read_volatile()),
                u32::from_le(desc.add(8).cast::<u32>().read_volatile()),
            )
        };
        let owned = self.chain_len.get(usize::from(id)).copied();
        let owned = owned.unwrap_or(NO_CHAIN);
        if owned == NO_CHAIN {
            return Err(Error::Protocol(format!(
                "used descriptor {} (wrap counter {}) names buffer {id}, which the device does not own",
                at.index,
                u8::from(at.wrap)
            )));
        }
        self.chain_len[usize::from(id)] = NO_CHAIN;
        self.free_ids.push(id);
        self.free_count += owned;
        self.next_used = at.advanced(owned, self.size);
        if self.event_idx && self.notify == Notify::Call {
            self.ask_for_event();
        }
        Ok(Some(Used {
            id: u32::from(id),
            len,
            token: self.tokens[usize::from(id)],
        }))
    }

    /// Waits for the next used buffer in the way that [`PackedQueue::set_notify`] chose.
    ///
    /// # Errors
    /// `TimedOut`; `LostNotification` when the device used a buffer and did not signal it within the time;
    /// `Protocol` for a buffer it does not own.
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Used> {
        wait_used(self, timeout)
    }

    pub(super) fn lines_mut(&mut self) -> &mut Lines {
        &mut self.lines
    }
}

impl Driver for PackedQueue {
    fn pop(&mut self) -> Result<Option<Used>> {
        self.pop_used()
    }

    fn lines(&self) -> &Lines {
        &self.lines
    }

    fn notify(&self) -> Notify {
        self.notify
    }
}

#[cfg(test)]
mod tests;
