//! Virtqueues, the device's side.
//!
//! [`split`] is the split ring of the specification (section 2.7, "Split Virtqueues"); [`chain`]
//! collects descriptors into host addresses and is shared by every ring layout.

pub mod chain;
pub mod split;

use thiserror::Error;

pub use chain::{ChainBuf, ChainError};
pub use split::SplitRing;

/// Where a ring lies and how it was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Number of descriptors: a power of two, 1 to 32768.
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
    /// A part of the ring is not aligned as section 2.7 demands (16, 2 and 4 bytes).
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
}

/// Whether the driver asked to hear of an index in `old..new` (section 2.7.7.2: `vring_need_event`).
#[inline]
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
