//! What a ring tells the dirty log (vhost-user.rst, "Migration").
//!
//! The kernel writes to guest memory on our behalf, by io_uring, and nobody sees that but us. So everything
//! that was written for a request is marked when it completes: its buffers and its status before the driver
//! is shown the completion, the used ring after it was written. A page that was marked before it was written
//! could be copied in between, and would be stale at the target.
//!
//! Without a log this costs one branch a request.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::virtio::dirty::{DirtyLog, OutsideLog};
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::{ChainBuf, RingConfig};

/// Bytes of an element of a split used ring, and of a descriptor of a packed ring.
const USED_ELEMENT: u64 = 8;
const DESCRIPTOR: u64 = 16;
/// `flags` and `idx` of a split used ring; the whole event suppression area of a packed one.
const HEADER: u64 = 4;

/// Why something that was written could not be marked.
#[derive(Debug, thiserror::Error)]
pub(super) enum MarkError {
    #[error(transparent)]
    Outside(#[from] OutsideLog),
    #[error("the request wrote to memory that is not the guest's; this is a bug in virtioblkd")]
    NotGuest,
}

/// The marks of one ring.
#[derive(Debug)]
pub(super) struct Marks {
    on: Cell<bool>,
    log: RefCell<Option<Arc<DirtyLog>>>,
    /// Where the used ring is in the log (`log_guest_addr`); none: it is not to be logged.
    used: Cell<Option<u64>>,
    ring: RingConfig,
}

impl Marks {
    /// For a ring that is about to start.
    pub(super) fn new(log: Option<Arc<DirtyLog>>, used: Option<u64>, ring: &RingConfig) -> Self {
        Self {
            on: Cell::new(log.is_some()),
            log: RefCell::new(log),
            used: Cell::new(used),
            ring: *ring,
        }
    }

    /// Whether anything is to be marked.
    #[inline]
    pub(super) fn are_on(&self) -> bool {
        self.on.get()
    }

    /// From now on, this is the log.
    pub(super) fn set_log(&self, log: Option<Arc<DirtyLog>>) {
        self.on.set(log.is_some());
        self.log.replace(log);
    }

    /// From now on, this is where the used ring is in the log.
    pub(super) fn set_used(&self, used: Option<u64>) {
        self.used.set(used);
    }

    /// What a request wrote: its writable buffers, from front to end, and its status. Of a read that failed, too:
    /// a part may be there. `memory` is what the chain was read with.
    #[cold]
    pub(super) fn request(
        &self,
        memory: &GuestMemory,
        chain: &ChainBuf,
        status: *const u8,
    ) -> Result<(), MarkError> {
        let log = self.log.borrow();
        let Some(log) = log.as_ref().filter(|_| !muted()) else {
            return Ok(());
        };
        // A buffer is in one region: what crosses into the next one was cut when the chain was read.
        for buffer in chain.writable() {
            mark_host(log, memory, buffer.iov_base.cast(), buffer.iov_len as u64)?;
        }
        mark_host(log, memory, status, 1)
    }

    /// The completions from used index `old` to `new`, which the driver has just been shown.
    #[cold]
    pub(super) fn completions(&self, old: u16, new: u16) -> Result<(), MarkError> {
        let log = self.log.borrow();
        let (Some(log), Some(used)) = (log.as_ref().filter(|_| !muted()), self.used.get()) else {
            return Ok(());
        };
        let size = self.ring.size;
        // A packed ring's elements are its descriptors, wherever its used ring is said to be; bit 15 of its
        // index is the wrap counter. Elements between two that were written may be marked as well.
        let (start, bytes, index) = match self.ring.packed {
            false => (used.saturating_add(HEADER), USED_ELEMENT, 0xffff),
            true => (self.ring.desc_table, DESCRIPTOR, 0x7fff),
        };
        let (first, end) = ((old & index) % size, (new & index) % size);
        let mark = |from: u16, to: u16| {
            let len = u64::from(to - from) * bytes;
            log.mark(start.saturating_add(u64::from(from) * bytes), len)
        };
        if first < end {
            mark(first, end)?;
        } else {
            mark(first, size)?;
            mark(0, end)?;
        }
        Ok(log.mark(used, HEADER)?)
    }

    /// That the driver was asked to notify, or not to: `flags` or `avail_event`.
    #[cold]
    pub(super) fn notification(&self) -> Result<(), MarkError> {
        let log = self.log.borrow();
        let (Some(log), Some(used)) = (log.as_ref().filter(|_| !muted()), self.used.get()) else {
            return Ok(());
        };
        log.mark(used, HEADER)?;
        if self.ring.event_idx && !self.ring.packed {
            let elements = u64::from(self.ring.size) * USED_ELEMENT;
            log.mark(used.saturating_add(HEADER + elements), 2)?;
        }
        Ok(())
    }

    /// Everything of the used ring: when its logging begins, since a process that was killed may have written
    /// and not marked.
    #[cold]
    pub(super) fn whole_ring(&self) -> Result<(), MarkError> {
        self.completions(0, 0)?;
        self.notification()
    }
}

fn mark_host(
    log: &DirtyLog,
    memory: &GuestMemory,
    host: *const u8,
    len: u64,
) -> Result<(), MarkError> {
    let addr = memory.host_to_guest(host).ok_or(MarkError::NotGuest)?;
    Ok(log.mark(addr, len)?)
}

/// Whether a test wants to see what becomes of a migration without marks: `VIRTIOBLKD_MUTE_DIRTY_LOG`. A test
/// that finds nothing stale then would find nothing without this either.
#[cfg(debug_assertions)]
fn muted() -> bool {
    static MUTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *MUTED.get_or_init(|| std::env::var_os("VIRTIOBLKD_MUTE_DIRTY_LOG").is_some())
}

#[cfg(not(debug_assertions))]
fn muted() -> bool {
    false
}

#[cfg(test)]
mod tests;
