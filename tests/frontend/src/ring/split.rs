//! The driver side of a split virtqueue (virtio specification, "Split Virtqueues").
//!
//! The usual calls (`add`, `publish`, `kick`, `pop_used`) keep the driver's rules and allocate nothing. The
//! raw ones write any bytes anywhere in the ring, for tests of a hostile guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

use super::{
    AVAIL_F_NO_INTERRUPT, Buf, DESC_F_INDIRECT, Desc, Driver, Lines, Notify, Outcome, RingLayout,
    USED_F_NO_NOTIFY, Used, chain_desc, need_event, wait_used,
};
use crate::error::{Error, Result};
use crate::memory::{Memory, Region};
use crate::message::VringAddr;
use crate::sys::EventFd;

/// Marks a descriptor that belongs to no chain of ours.
const NO_CHAIN: u16 = 0;

/// The driver side of one split virtqueue.
#[derive(Debug)]
pub struct SplitQueue {
    size: u16,
    layout: RingLayout,
    // Keep the memory mapped that the pointers below point into.
    desc_region: Arc<Region>,
    avail_region: Arc<Region>,
    used_region: Arc<Region>,
    desc: *mut Desc,
    avail: *mut u16,
    used: *mut u16,
    event_idx: bool,
    notify: Notify,
    free_head: u16,
    free_count: u16,
    /// The driver's own links: a hostile or broken device must not be able to lead it astray.
    next: Box<[u16]>,
    /// Descriptors of the chain that starts here, `NO_CHAIN` for none.
    chain_len: Box<[u16]>,
    tokens: Box<[u64]>,
    avail_idx: u16,
    published: u16,
    last_used: u16,
    lines: Lines,
}

// SAFETY: the pointers point into mappings that the regions keep alive; the queue is used by one thread.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// A ring of `size` descriptors anywhere in `memory`.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new(memory: &Memory, size: u16) -> Result<Self> {
        let layout = RingLayout {
            desc: memory.alloc(16 * u64::from(size), 16),
            avail: memory.alloc(6 + 2 * u64::from(size), 2),
            used: memory.alloc(6 + 8 * u64::from(size), 4),
        };
        Self::at(memory, size, layout)
    }

    /// A ring whose three parts lie where `layout` says; they are cleared.
    ///
    /// # Errors
    /// Those of eventfd(2).
    ///
    /// # Panics
    /// When `layout` is not in `memory`, or not aligned as the specification demands.
    pub fn at(memory: &Memory, size: u16, layout: RingLayout) -> Result<Self> {
        assert!(layout.desc % 16 == 0 && layout.avail % 2 == 0 && layout.used % 4 == 0);
        let n = u64::from(size);
        let (desc_len, avail_len, used_len) = (16 * n, 6 + 2 * n, 6 + 8 * n);
        let desc_region = memory.region_of(layout.desc, desc_len).clone();
        let avail_region = memory.region_of(layout.avail, avail_len).clone();
        let used_region = memory.region_of(layout.used, used_len).clone();
        let mut queue = Self {
            size,
            layout,
            desc: desc_region.host(layout.desc, desc_len).cast(),
            avail: avail_region.host(layout.avail, avail_len).cast(),
            used: used_region.host(layout.used, used_len).cast(),
            desc_region,
            avail_region,
            used_region,
            event_idx: false,
            notify: Notify::Call,
            free_head: 0,
            free_count: size,
            next: vec![0; usize::from(size)].into(),
            chain_len: vec![NO_CHAIN; usize::from(size)].into(),
            tokens: vec![0; usize::from(size)].into(),
            avail_idx: 0,
            published: 0,
            last_used: 0,
            lines: Lines::new()?,
        };
        queue.reset();
        Ok(queue)
    }

    /// Forgets everything and clears the ring, as a driver does at its start.
    pub fn reset(&mut self) {
        let n = usize::from(self.size);
        // SAFETY: the three parts were checked to have these lengths when the pointers were made.
        unsafe {
            std::ptr::write_bytes(self.desc.cast::<u8>(), 0, 16 * n);
            std::ptr::write_bytes(self.avail.cast::<u8>(), 0, 6 + 2 * n);
            std::ptr::write_bytes(self.used.cast::<u8>(), 0, 6 + 8 * n);
        }
        for i in 0..self.size {
            self.next[usize::from(i)] = (i + 1) % self.size.max(1);
            self.chain_len[usize::from(i)] = NO_CHAIN;
            self.tokens[usize::from(i)] = 0;
        }
        self.free_head = 0;
        self.free_count = self.size;
        self.avail_idx = 0;
        self.published = 0;
        self.last_used = 0;
        self.lines.call.take();
        self.set_notify(self.notify);
    }

    /// Starts the ring's free-running indices at `index` instead of zero, for tests of wrap-around. Only on a
    /// ring that is empty; the backend must be given the same base.
    ///
    /// # Panics
    /// When chains are in flight.
    pub fn start_at(&mut self, index: u16) {
        assert_eq!(self.free_count, self.size, "chains are in flight");
        self.avail_idx = index;
        self.published = index;
        self.last_used = index;
        self.set_avail_idx(index);
        self.set_used_idx(index);
        self.set_notify(self.notify);
    }

    /// Whether EVENT_IDX was negotiated.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
        self.set_notify(self.notify);
    }

    /// How completions are waited for, and what the device is told about it.
    pub fn set_notify(&mut self, notify: Notify) {
        self.notify = notify;
        match (notify, self.event_idx) {
            (Notify::Poll, false) => self.set_avail_flags(AVAIL_F_NO_INTERRUPT),
            (Notify::Poll, true) => {
                self.set_avail_flags(0);
                // As far behind as can be: not reached for 65535 completions; `pop_used` moves it on.
                self.set_used_event(self.last_used.wrapping_sub(1));
            }
            (Notify::Call, event_idx) => {
                self.set_avail_flags(0);
                if event_idx {
                    self.set_used_event(self.last_used);
                }
            }
        }
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

    /// The addresses for SET_VRING_ADDR.
    pub fn vring_addr(&self, flags: u32) -> VringAddr {
        VringAddr {
            flags,
            desc: self.desc_region.user_addr(self.layout.desc),
            used: self.used_region.user_addr(self.layout.used),
            avail: self.avail_region.user_addr(self.layout.avail),
            log: self.layout.used,
        }
    }

    /// The kick descriptor.
    pub fn kick_fd(&self) -> &Arc<EventFd> {
        &self.lines.kick
    }

    /// The call descriptor.
    pub fn call_fd(&self) -> &Arc<EventFd> {
        &self.lines.call
    }

    /// The error descriptor.
    pub fn err_fd(&self) -> &Arc<EventFd> {
        &self.lines.err
    }

    /// Puts a new call descriptor in place; the backend has to be told.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn renew_call(&mut self) -> Result<()> {
        self.lines.call = Arc::new(EventFd::new()?);
        Ok(())
    }

    /// How many kicks were sent.
    pub fn kicks(&self) -> u64 {
        self.lines.kicks
    }

    // The driver's rules.

    /// Puts a chain in the ring, not yet visible to the device; `None` when descriptors are short.
    pub fn add(&mut self, bufs: &[Buf], token: u64) -> Option<u16> {
        if bufs.is_empty() || bufs.len() > usize::from(self.free_count) {
            return None;
        }
        let head = self.free_head;
        let mut at = head;
        for (i, buf) in bufs.iter().enumerate() {
            let next = self.next[usize::from(at)];
            let last = i + 1 == bufs.len();
            self.set_desc(at, chain_desc(buf, (!last).then_some(next)));
            if last {
                self.free_head = next;
            } else {
                at = next;
            }
        }
        self.finish_add(head, bufs.len() as u16, token);
        Some(head)
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
            let last = i + 1 == bufs.len();
            let desc = chain_desc(buf, (!last).then_some(i as u16 + 1));
            memory.write(table + 16 * i as u64, &desc.to_bytes());
        }
        self.add_one(table, 16 * bufs.len() as u32, DESC_F_INDIRECT, token)
    }

    /// Puts a chain of one descriptor with any flags in the ring.
    pub fn add_one(&mut self, addr: u64, len: u32, flags: u16, token: u64) -> Option<u16> {
        if self.free_count == 0 {
            return None;
        }
        let head = self.free_head;
        self.free_head = self.next[usize::from(head)];
        self.set_desc(
            head,
            Desc {
                addr,
                len,
                flags,
                next: 0,
            },
        );
        self.finish_add(head, 1, token);
        Some(head)
    }

    fn finish_add(&mut self, head: u16, len: u16, token: u64) {
        self.free_count -= len;
        self.chain_len[usize::from(head)] = len;
        self.tokens[usize::from(head)] = token;
        self.set_avail_entry(self.avail_idx, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Makes all chains added so far visible to the device, and kicks it if it asks for that.
    pub fn publish(&mut self) {
        let old = self.published;
        if old == self.avail_idx {
            return;
        }
        self.set_avail_idx(self.avail_idx);
        self.published = self.avail_idx;
        // The device publishes its event index, looks at avail.idx once more, and sleeps; we publish
        // avail.idx and look at its event index. Neither look may pass the other's store.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            need_event(self.avail_event(), self.avail_idx, old)
        } else {
            self.used_flags() & USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Kicks the device, wanted or not.
    pub fn kick(&mut self) {
        self.lines.kick();
    }

    /// Takes the next used entry, if there is one.
    ///
    /// # Errors
    /// `Protocol` when the device used a chain that it does not own.
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        if self.used_idx() == self.last_used {
            return Ok(None);
        }
        let (id, len) = self.used_entry(self.last_used);
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_idx {
            let event = match self.notify {
                Notify::Poll => self.last_used.wrapping_sub(1),
                Notify::Call => self.last_used,
            };
            self.set_used_event(event);
        }
        let head = usize::try_from(id).unwrap_or(usize::MAX);
        let owned = self.chain_len.get(head).copied().unwrap_or(NO_CHAIN);
        if owned == NO_CHAIN {
            return Err(Error::Protocol(format!(
                "used entry {} names chain {id}, which the device does not own",
                self.last_used.wrapping_sub(1)
            )));
        }
        self.release(head as u16, owned);
        Ok(Some(Used {
            id,
            len,
            token: self.tokens[head],
        }))
    }

    fn release(&mut self, head: u16, len: u16) {
        let mut tail = head;
        for _ in 1..len {
            tail = self.next[usize::from(tail)];
        }
        self.next[usize::from(tail)] = self.free_head;
        self.free_head = head;
        self.free_count += len;
        self.chain_len[usize::from(head)] = NO_CHAIN;
    }

    /// Waits for the next used entry in the way that [`SplitQueue::set_notify`] chose.
    ///
    /// # Errors
    /// `TimedOut`; `LostNotification` when the device used a buffer and did not signal it within the time;
    /// `Protocol` for a chain it does not own.
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Used> {
        wait_used(self, timeout)
    }

    pub(super) fn lines_mut(&mut self) -> &mut Lines {
        &mut self.lines
    }

    // Raw access.

    /// Writes a descriptor.
    pub fn set_desc(&mut self, index: u16, desc: Desc) {
        assert!(index < self.size);
        let desc = Desc {
            addr: desc.addr.to_le(),
            len: desc.len.to_le(),
            flags: desc.flags.to_le(),
            next: desc.next.to_le(),
        };
        // SAFETY: the index is in the table, which was checked when the pointer was made.
        unsafe { self.desc.add(usize::from(index)).write_volatile(desc) };
    }

    fn avail_word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: callers pass offsets of the available ring, which is aligned and mapped; both sides reach
        // it through atomics or whole-word stores.
        unsafe { AtomicU16::from_ptr(self.avail.add(at)) }
    }

    fn used_word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as for the available ring.
        unsafe { AtomicU16::from_ptr(self.used.add(at)) }
    }

    /// Sets `avail.flags`.
    pub fn set_avail_flags(&mut self, flags: u16) {
        self.avail_word(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Sets `avail.idx`, whatever it means.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_word(1).store(index.to_le(), Ordering::Release);
    }

    /// Reads `avail.idx`.
    pub fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail_word(1).load(Ordering::Relaxed))
    }

    /// Sets the entry of the available ring that the free-running `position` falls on.
    pub fn set_avail_entry(&mut self, position: u16, head: u16) {
        let at = usize::from(position % self.size);
        self.avail_word(2 + at)
            .store(head.to_le(), Ordering::Relaxed);
    }

    /// Puts a head in the available ring by raw means: the next entry, not yet visible. Chains of the raw
    /// calls are taken off the used ring with [`SplitQueue::pop_used_raw`].
    pub fn push_raw(&mut self, head: u16) {
        self.set_avail_entry(self.avail_idx, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Sets `used_event`, which asks for a notification once the device passes it.
    pub fn set_used_event(&mut self, event: u16) {
        let at = 2 + usize::from(self.size);
        self.avail_word(at).store(event.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Reads `used.flags`.
    pub fn used_flags(&self) -> u16 {
        u16::from_le(self.used_word(0).load(Ordering::Relaxed))
    }

    /// Reads `used.idx`.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used_word(1).load(Ordering::Acquire))
    }

    /// Overwrites `used.idx`, which a driver never does but at its start.
    pub fn set_used_idx(&mut self, index: u16) {
        self.used_word(1).store(index.to_le(), Ordering::Release);
    }

    /// The used entry that the free-running `position` falls on: id and length.
    pub fn used_entry(&self, position: u16) -> (u32, u32) {
        let at = usize::from(position % self.size);
        // SAFETY: the entry is in the used ring, which is 4-byte aligned from its fourth byte on.
        unsafe {
            let entry = self.used.add(2 + 4 * at).cast::<u32>();
            (
                u32::from_le(entry.read_volatile()),
                u32::from_le(entry.add(1).read_volatile()),
            )
        }
    }

    /// Reads `avail_event`, up to where the device wants no kick.
    pub fn avail_event(&self) -> u16 {
        let at = 2 + 4 * usize::from(self.size);
        u16::from_le(self.used_word(at).load(Ordering::Relaxed))
    }

    /// Takes the next used entry without asking whether it was ours.
    pub fn pop_used_raw(&mut self) -> Option<(u32, u32)> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let entry = self.used_entry(self.last_used);
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_idx {
            self.set_used_event(self.last_used);
        }
        Some(entry)
    }

    /// Waits until `used.idx` differs from what was last taken, the error descriptor is signalled, or the time
    /// is up; says which.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait_outcome(&mut self, timeout: Duration) -> Result<Outcome> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((id, len)) = self.pop_used_raw() {
                return Ok(Outcome::Used { id, len });
            }
            if self.lines.err.wait(Duration::from_millis(1))? {
                return Ok(Outcome::Broken);
            }
            if Instant::now() >= deadline {
                return Ok(Outcome::Silence);
            }
        }
    }

    /// The position up to which used entries were taken.
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// The position of the next chain to be added.
    pub fn next_avail(&self) -> u16 {
        self.avail_idx
    }

    /// Chains that the device owns.
    pub fn in_flight(&self) -> usize {
        self.chain_len.iter().filter(|n| **n != NO_CHAIN).count()
    }
}

impl Driver for SplitQueue {
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
