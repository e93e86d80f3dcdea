//! Virtqueues, the device's side.
//!
//! [`split`] is the split ring of the specification (section 2.7, "Split Virtqueues"), [`packed`] the packed
//! one (section 2.8, "Packed Virtqueues"); [`chain`] collects descriptors into host addresses and is shared by
//! both.

pub mod chain;
pub mod packed;
pub mod split;

use std::sync::Arc;

use thiserror::Error;

use super::inflight::{InflightError, QueueRegion};
use super::memory::{GuestMemory, Mapping};

pub use chain::{ChainBuf, ChainError};
pub use packed::PackedRing;
pub use split::SplitRing;

/// Where a ring lies and how it was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Number of descriptors, 1 to 32768; of a split ring a power of two.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// `VIRTIO_F_RING_PACKED` was negotiated; the three addresses are then those of the descriptor ring, the
    /// driver's and the device's event suppression area.
    pub packed: bool,
    /// Where to go on, as `SET_VRING_BASE` says it. Split: the first available index to be served. Packed:
    /// bits 0 to 14 the descriptor to be looked at next, bit 15 its wrap counter; bits 16 to 31 the same for the
    /// used descriptor to be written next.
    pub base: u32,
}

/// Why a ring cannot be used, or can no longer be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RingError {
    /// Not a power of two from 1 to 32768.
    #[error("queue size {0} is not a power of two between 1 and 32768")]
    Size(u16),
    /// Not from 1 to 32768.
    #[error("queue size {0} of a packed ring is not between 1 and 32768")]
    PackedSize(u16),
    /// A part of the ring is not aligned as sections 2.7 (16, 2 and 4 bytes) and 2.8.10.1 (16, 4 and 4) demand.
    #[error("{part} at guest address {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which part of the ring.
        part: &'static str,
        /// Its guest physical address.
        addr: u64,
        /// What is demanded.
        align: u64,
    },
    /// A part of the ring is not inside one region of guest memory.
    #[error("{part} at guest address {addr:#x}, {len} bytes, is not in guest memory")]
    Unmapped {
        /// Which part of the ring.
        part: &'static str,
        /// Its guest physical address.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The driver claims more available chains than the ring has room for.
    #[error("avail.idx {avail_idx} is more than {size} ahead of {next_avail}")]
    AvailIndex {
        /// What the driver wrote.
        avail_idx: u16,
        /// What the device is to serve next.
        next_avail: u16,
        /// The queue size.
        size: u16,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("available ring names descriptor {head} of {size}")]
    Head {
        /// What the driver wrote.
        head: u16,
        /// The queue size.
        size: u16,
    },
    /// A packed ring is to go on at a descriptor that does not exist.
    #[error("base {base:#x} is outside a packed ring of {size}")]
    Base {
        /// See [`RingConfig::base`].
        base: u32,
        /// The queue size.
        size: u16,
    },
    /// The chain at this descriptor of a packed ring has more descriptors than the driver can have left.
    #[error(
        "the chain at descriptor {index} runs into descriptors of requests in flight, in a ring of {size}"
    )]
    Overrun {
        /// Where the chain begins.
        index: u16,
        /// The queue size.
        size: u16,
    },
    /// The inflight region does not fit the ring.
    #[error(
        "its inflight region can not be gone on with: {0}; reset the guest's device (reboot the guest), which \
         makes the VMM take a fresh region"
    )]
    Inflight(#[from] InflightError),
}

/// The device's side of a ring, of either layout.
///
/// What [`Ring::pop`] gives is a *slot*: a number below the queue size that names the request until its
/// [`Ring::push_used`]. With an inflight region everything between the two survives this process.
#[derive(Debug)]
pub enum Ring {
    /// Section 2.7.
    Split(SplitRing),
    /// Section 2.8.
    Packed(PackedRing),
}

/// The same call on whichever ring it is.
macro_rules! each {
    ($ring:expr, $each:ident => $call:expr) => {
        match $ring {
            Ring::Split($each) => $call,
            Ring::Packed($each) => $call,
        }
    };
}

impl Ring {
    /// Looks the ring up in guest memory. What the inflight region has in flight is handed out first.
    ///
    /// # Errors
    /// A size that cannot be, parts that are not aligned or not inside one region of memory each, an inflight
    /// region that does not fit the ring.
    pub fn new(
        mem: &GuestMemory,
        cfg: &RingConfig,
        inflight: Option<QueueRegion>,
    ) -> Result<Self, RingError> {
        Ok(match (cfg.packed, inflight) {
            (false, None) => Ring::Split(SplitRing::new(mem, cfg)?),
            (false, Some(region)) => Ring::Split(SplitRing::with_inflight(mem, cfg, &region)?),
            (true, None) => Ring::Packed(PackedRing::new(mem, cfg)?),
            (true, Some(region)) => Ring::Packed(PackedRing::with_inflight(mem, cfg, &region)?),
        })
    }

    /// The memory table changed: looks the ring up again.
    ///
    /// # Errors
    /// The ring is not in the new memory; the old mapping stays in use.
    pub fn remap(&mut self, mem: &GuestMemory) -> Result<(), RingError> {
        each!(self, ring => ring.remap(mem))
    }

    /// The slot of the next request, or `None` when the ring is empty.
    ///
    /// # Errors
    /// The driver broke the ring. Nothing was taken, so the error repeats until the queue is reset.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        each!(self, ring => ring.pop())
    }

    /// Whether [`Ring::pop`] has something to say: a request, or an error.
    #[inline]
    pub fn available(&self) -> bool {
        each!(self, ring => ring.available())
    }

    /// Requests of a predecessor that are still to be handed out by [`Ring::pop`].
    #[inline]
    pub fn backlog(&self) -> u16 {
        each!(self, ring => ring.backlog())
    }

    /// Collects the buffers of a slot that was popped, see [`SplitRing::read_chain`].
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
        each!(self, ring => ring.read_chain(mem, slot, chain))
    }

    /// The request of a slot is done, and `written` bytes of its buffers were written. The driver sees it after
    /// [`Ring::publish`].
    #[inline]
    pub fn push_used(&mut self, slot: u16, written: u32) {
        each!(self, ring => ring.push_used(slot, written))
    }

    /// Where the next pushed request will be shown. Split: the used index. Packed: the place of a descriptor, bit
    /// 15 being the wrap counter.
    #[inline]
    pub fn next_used(&self) -> u16 {
        each!(self, ring => ring.next_used())
    }

    /// As [`Ring::next_used`], of what the driver has been shown: the same number if nothing is to be published.
    #[inline]
    pub fn published_used(&self) -> u16 {
        each!(self, ring => ring.published_used())
    }

    /// Shows a driver that looks what was pushed. Whether it wants an interrupt for that, the next [`Ring::publish`]
    /// says.
    #[inline]
    pub fn show(&mut self) {
        each!(self, ring => ring.show())
    }

    /// Shows the driver what was pushed, and says whether it wants an interrupt for that and what was only
    /// [shown](Ring::show). `false` when there is nothing of the kind.
    #[inline]
    pub fn publish(&mut self) -> bool {
        each!(self, ring => ring.publish())
    }

    /// Asks the driver not to notify, as far as it can be asked.
    #[inline]
    pub fn disable_notification(&mut self) {
        each!(self, ring => ring.disable_notification())
    }

    /// Asks the driver to notify of the next request. `true` when requests are waiting already: the driver may
    /// have made them available before it saw the wish, so look before going to sleep.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        each!(self, ring => ring.enable_notification())
    }

    /// Where to go on, as [`RingConfig::base`]: the answer to `GET_VRING_BASE` once all is drained.
    pub fn base(&self) -> u32 {
        each!(self, ring => ring.base())
    }

    /// The queue size.
    #[inline]
    pub fn size(&self) -> u16 {
        each!(self, ring => ring.size())
    }
}

/// `len` bytes at a guest address, aligned there and here.
fn lookup(
    mem: &GuestMemory,
    part: &'static str,
    addr: u64,
    len: u64,
    align: u64,
) -> Result<(*mut u8, Arc<Mapping>), RingError> {
    let unmapped = RingError::Unmapped { part, addr, len };
    let host = mem.host_ptr(addr, len).ok_or(unmapped)?;
    // A VMM may map a region askew, so an aligned guest address is not yet an aligned host address.
    if addr % align != 0 || host as u64 % align != 0 {
        return Err(RingError::Alignment { part, addr, align });
    }
    Ok((host, mem.mapping_of(addr).ok_or(unmapped)?))
}

/// Whether the driver asked to hear of an index in `old..new` (section 2.7.7.2: `vring_need_event`).
#[inline]
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests;
