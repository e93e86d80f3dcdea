//! A virtqueue of either kind.

use std::sync::Arc;
use std::time::Duration;

use super::packed::{self, PackedQueue};
use super::split::SplitQueue;
use super::{Buf, Driver, Lines, Notify, Used, chain_desc};
use crate::error::Result;
use crate::memory::Memory;
use crate::message::VringAddr;
use crate::sys::EventFd;

/// The driver side of a virtqueue.
#[derive(Debug)]
pub enum Virtqueue {
    /// A split one.
    Split(SplitQueue),
    /// A packed one.
    Packed(PackedQueue),
}

macro_rules! either {
    ($self:expr, $queue:ident => $do:expr) => {
        match $self {
            Virtqueue::Split($queue) => $do,
            Virtqueue::Packed($queue) => $do,
        }
    };
}

impl Virtqueue {
    /// A ring of `size` descriptors anywhere in `memory`.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new(memory: &Memory, size: u16, packed: bool) -> Result<Self> {
        Ok(if packed {
            Self::Packed(PackedQueue::new(memory, size)?)
        } else {
            Self::Split(SplitQueue::new(memory, size)?)
        })
    }

    /// The split ring that it is.
    ///
    /// # Panics
    /// When it is a packed one.
    pub fn split(&mut self) -> &mut SplitQueue {
        match self {
            Self::Split(queue) => queue,
            Self::Packed(_) => panic!("a packed ring where the test needs a split one"),
        }
    }

    /// The packed ring that it is.
    ///
    /// # Panics
    /// When it is a split one.
    pub fn packed(&mut self) -> &mut PackedQueue {
        match self {
            Self::Packed(queue) => queue,
            Self::Split(_) => panic!("a split ring where the test needs a packed one"),
        }
    }

    fn lines(&self) -> &Lines {
        either!(self, q => Driver::lines(q))
    }

    fn lines_mut(&mut self) -> &mut Lines {
        either!(self, q => q.lines_mut())
    }

    /// Forgets everything and clears the ring, as a driver does at its start.
    pub fn reset(&mut self) {
        either!(self, q => q.reset());
    }

    /// Whether EVENT_IDX was negotiated.
    pub fn set_event_idx(&mut self, on: bool) {
        either!(self, q => q.set_event_idx(on));
    }

    /// How completions are waited for, and what the device is told about it.
    pub fn set_notify(&mut self, notify: Notify) {
        either!(self, q => q.set_notify(notify));
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        either!(self, q => q.size())
    }

    /// Free descriptors.
    pub fn free_count(&self) -> u16 {
        either!(self, q => q.free_count())
    }

    /// Chains that the device owns.
    pub fn in_flight(&self) -> usize {
        either!(self, q => q.in_flight())
    }

    /// The addresses for SET_VRING_ADDR.
    pub fn vring_addr(&self, flags: u32) -> VringAddr {
        either!(self, q => q.vring_addr(flags))
    }

    /// What SET_VRING_BASE says of a ring that goes on with the next chain to be added.
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(queue) => u32::from(queue.next_avail()),
            Self::Packed(queue) => {
                let at = u32::from(queue.next_avail().bits());
                at | at << 16
            }
        }
    }

    /// The kick descriptor.
    pub fn kick_fd(&self) -> &Arc<EventFd> {
        &self.lines().kick
    }

    /// The call descriptor.
    pub fn call_fd(&self) -> &Arc<EventFd> {
        &self.lines().call
    }

    /// The error descriptor.
    pub fn err_fd(&self) -> &Arc<EventFd> {
        &self.lines().err
    }

    /// Puts a new call descriptor in place; the backend has to be told.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn renew_call(&mut self) -> Result<()> {
        self.lines_mut().call = Arc::new(EventFd::new()?);
        Ok(())
    }

    /// How many kicks were sent.
    pub fn kicks(&self) -> u64 {
        self.lines().kicks
    }

    /// Puts a chain in the ring, not yet visible to the device; `None` when descriptors are short.
    pub fn add(&mut self, bufs: &[Buf], token: u64) -> Option<u16> {
        either!(self, q => q.add(bufs, token))
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
        either!(self, q => q.add_indirect(memory, table, bufs, token))
    }

    /// Puts a chain of one descriptor with any flags in the ring.
    pub fn add_one(&mut self, addr: u64, len: u32, flags: u16, token: u64) -> Option<u16> {
        either!(self, q => q.add_one(addr, len, flags, token))
    }

    /// Entry `index` of an indirect table, as this kind of ring has it.
    pub fn table_entry(&self, buf: &Buf, index: usize, last: bool) -> [u8; 16] {
        match self {
            Self::Split(_) => chain_desc(buf, (!last).then_some(index as u16 + 1)).to_bytes(),
            Self::Packed(_) => packed::table_entry(buf),
        }
    }

    /// Makes all chains added so far visible to the device, and kicks it if it asks for that.
    pub fn publish(&mut self) {
        either!(self, q => q.publish());
    }

    /// Kicks the device, wanted or not.
    pub fn kick(&mut self) {
        self.lines_mut().kick();
    }

    /// Takes the next used buffer, if there is one.
    ///
    /// # Errors
    /// `Protocol` when the device used a chain that it does not own.
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        either!(self, q => q.pop_used())
    }

    /// Waits for the next used buffer in the way that [`Virtqueue::set_notify`] chose.
    ///
    /// # Errors
    /// `TimedOut`; `LostNotification` when the device used a buffer and did not signal it within the time;
    /// `Protocol` for a chain it does not own.
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Used> {
        either!(self, q => q.wait_used(timeout))
    }
}
