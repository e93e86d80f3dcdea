//! Where requests in flight are kept, so that they survive this process (vhost-user.rst, "Inflight I/O
//! tracking").
//!
//! The region is memory that the backend makes and the VMM keeps. It begins with a part for each queue, all
//! of one size; what is behind them is the backend's own, and holds the crash journal of the disk. This module
//! knows the layout; what is written there is the rings' business.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use thiserror::Error;

use crate::shared_memory::{Atomic, SharedMemory, SharedPart};

/// Bytes before the descriptors' states: of a packed queue, which has the longer header.
const HEADER: usize = 32;
/// Bytes of a descriptor's state: of a packed queue. A split one takes 16 of them.
const STATE: usize = 32;
/// Queues begin at multiples of this: a cache line.
const QUEUE_ALIGN: usize = 64;
/// What is behind the queues begins at a multiple of this.
const REST_ALIGN: usize = 4096;

/// The shape of an inflight region. A queue's part has room for either kind of ring, so that the shape does
/// not depend on features that may be negotiated after the region was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightLayout {
    /// Number of queues.
    pub queues: u16,
    /// Descriptors of each queue, at most.
    pub queue_size: u16,
}

impl InflightLayout {
    /// Bytes from one queue's part to the next one's.
    pub fn queue_bytes(&self) -> usize {
        (HEADER + STATE * usize::from(self.queue_size)).next_multiple_of(QUEUE_ALIGN)
    }

    /// Where the queues end, and the rest begins.
    pub fn rest_at(&self) -> usize {
        (usize::from(self.queues) * self.queue_bytes()).next_multiple_of(REST_ALIGN)
    }

    /// The part of a queue; none if the region is too small for it, or there is no such queue.
    pub fn queue(&self, region: &Arc<SharedMemory>, index: u16) -> Option<QueueRegion> {
        let at = usize::from(index) * self.queue_bytes();
        let part = region.part(at, HEADER + STATE * usize::from(self.queue_size))?;
        (index < self.queues).then_some(QueueRegion {
            part,
            queue_size: self.queue_size,
        })
    }

    /// What is behind the queues; none if there is nothing.
    pub fn rest(&self, region: &Arc<SharedMemory>) -> Option<SharedPart> {
        let at = self.rest_at();
        region.part(at, region.len().checked_sub(at).filter(|len| *len > 0)?)
    }
}

/// The part of one queue in the inflight region.
#[derive(Clone, Debug)]
pub struct QueueRegion {
    /// The memory, zeros when it is fresh.
    pub part: SharedPart,
    /// Descriptors that there is room for.
    pub queue_size: u16,
}

impl QueueRegion {
    /// The part as a split ring of `size` descriptors uses it; none if there is no room for it.
    pub(crate) fn split(&self, size: u16) -> Option<(Table<SplitHeader>, Table<SplitState>)> {
        let at = size_of::<SplitHeader>();
        let header = Table::new(&self.part, 0, 1)?;
        Some((header, Table::new(&self.part, at, usize::from(size))?))
    }

    /// The part as a packed ring of `size` descriptors uses it; none if there is no room for it.
    pub(crate) fn packed(&self, size: u16) -> Option<(Table<PackedHeader>, Table<PackedState>)> {
        let at = size_of::<PackedHeader>();
        let header = Table::new(&self.part, 0, 1)?;
        Some((header, Table::new(&self.part, at, usize::from(size))?))
    }
}

/// What `version` is in a region that is in use; 0 says that it is fresh.
pub(crate) const VERSION: u16 = 1;

/// `QueueRegionSplit`, without the states that follow it.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct SplitHeader {
    pub(crate) features: AtomicU64,
    pub(crate) version: AtomicU16,
    pub(crate) desc_num: AtomicU16,
    pub(crate) last_batch_head: AtomicU16,
    pub(crate) used_idx: AtomicU16,
}

/// `DescStateSplit`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct SplitState {
    pub(crate) inflight: AtomicU8,
    padding: [AtomicU8; 5],
    pub(crate) next: AtomicU16,
    pub(crate) counter: AtomicU64,
}

/// `QueueRegionPacked`, without the states that follow it. Fields that change together are one integer here.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct PackedHeader {
    pub(crate) features: AtomicU64,
    pub(crate) version: AtomicU16,
    pub(crate) desc_num: AtomicU16,
    /// `free_head`, `old_free_head`: two of 16 bits.
    pub(crate) free_heads: AtomicU32,
    /// `used_idx`, `old_used_idx`: two of 16 bits; `used_wrap_counter`, `old_used_wrap_counter`: two of 8 bits.
    pub(crate) used: AtomicU64,
    padding: AtomicU64,
}

/// `DescStatePacked`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct PackedState {
    pub(crate) inflight: AtomicU8,
    padding: AtomicU8,
    pub(crate) next: AtomicU16,
    pub(crate) last: AtomicU16,
    pub(crate) num: AtomicU16,
    pub(crate) counter: AtomicU64,
    pub(crate) id: AtomicU16,
    pub(crate) flags: AtomicU16,
    pub(crate) len: AtomicU32,
    pub(crate) addr: AtomicU64,
}

const _: () = assert!(size_of::<SplitHeader>() == 16 && size_of::<SplitState>() == 16);
const _: () = assert!(size_of::<PackedHeader>() == HEADER && size_of::<PackedState>() == STATE);

// SAFETY: integers that are accessed atomically, and no padding.
unsafe impl Atomic for SplitHeader {}
// SAFETY: as above.
unsafe impl Atomic for SplitState {}
// SAFETY: as above.
unsafe impl Atomic for PackedHeader {}
// SAFETY: as above.
unsafe impl Atomic for PackedState {}

/// A table in a queue's part, looked up once: what is found by a number of a driver's or a VMM's choice is found
/// with one comparison.
#[derive(Debug)]
pub(crate) struct Table<T> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory mapped.
    _part: SharedPart,
}

// SAFETY: `start` is the address of shared memory that `_part` keeps mapped; the entries are atomics, and nothing
// is bound to the thread that looked them up.
unsafe impl<T: Atomic + Sync> Send for Table<T> {}

impl<T: Atomic> Table<T> {
    fn new(part: &SharedPart, at: usize, len: usize) -> Option<Self> {
        let entries = part.atomics::<T>(at, len)?;
        Some(Self {
            start: NonNull::from(entries.first()?),
            len,
            _part: part.clone(),
        })
    }

    /// The entry of this number, if there is one.
    #[inline]
    pub(crate) fn get(&self, index: u16) -> Option<&T> {
        let index = usize::from(index);
        // SAFETY: `atomics` gave `len` entries from `start` on, in memory that `_part` keeps mapped.
        (index < self.len).then(|| unsafe { self.start.add(index).as_ref() })
    }

    /// All entries, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        // SAFETY: as in `get`.
        (0..self.len).map(|index| unsafe { self.start.add(index).as_ref() })
    }
}

/// Why a region is not gone on with. What is in flight is then neither repeated nor lost by guessing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InflightError {
    /// The part of the queue has no room for the ring.
    #[error("it has no room for a ring of {0} descriptors")]
    TooSmall(u16),
    /// Of another program, or overwritten.
    #[error("it has version {version} and features {features:#x}, where 1 and 0 are known")]
    Unknown {
        /// Its version.
        version: u16,
        /// Its feature flags.
        features: u64,
    },
    /// Made for a ring of another size, with requests in flight.
    #[error("it was made for {found} descriptors, and the ring has {size}")]
    Size {
        /// What it says.
        found: u16,
        /// The queue size.
        size: u16,
    },
    /// The batch that was being completed is not the one that the ring shows.
    #[error(
        "its record of the last completed batch, from used index {from} to {to}, does not agree with the used ring"
    )]
    Batch {
        /// The used index up to which all is recorded.
        from: u16,
        /// The ring's used index.
        to: u16,
    },
    /// More in flight than the driver has outstanding.
    #[error("it has {in_flight} requests in flight, and the driver waits for {outstanding}")]
    Outstanding {
        /// Requests that it has in flight.
        in_flight: u16,
        /// Requests that the driver has made available and not got back.
        outstanding: u16,
    },
    /// A packed ring's free list and chains do not have every entry exactly once.
    #[error("its lists of descriptors are damaged at entry {0}")]
    Lists(u16),
    /// A packed ring's used index is not in the ring.
    #[error("its used index {index} is not one of a ring of {size}")]
    Used {
        /// The index.
        index: u16,
        /// The queue size.
        size: u16,
    },
    /// What it has in flight in a packed ring is not there.
    #[error("it has descriptor {0} in flight, which the driver has not made available")]
    NotAvailable(u16),
}
