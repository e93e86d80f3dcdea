//! Where requests in flight are kept, so that they survive this process (vhost-user.rst, "Inflight I/O
//! tracking").
//!
//! The region is memory that the backend makes and the VMM keeps. It begins with a part for each queue, all
//! of one size; what is behind them is the backend's own, and holds the crash journal of the disk. This module
//! knows the layout; what is written there is the rings' business.

use crate::shared_memory::{SharedMemory, SharedPart};
use std::sync::Arc;

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
