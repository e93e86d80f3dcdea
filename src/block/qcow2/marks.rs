//! Who holds a slice, and what the file does not have of it: pins and dirty flags.
//!
//! A change is made under a pin, and the slice is marked dirty before the pin goes. Unlinking takes the
//! pins from 0 to [`EVICTED`], which makes new pins fail, and then looks at the flags: it sees every change
//! made under an earlier pin.

use crate::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// In `pins`: unlinked, or about to be.
const EVICTED: u32 = 1 << 31;

/// In `dirty`: the slice differs from the file.
pub(super) const DIRTY: u8 = 1;
/// In `dirty`: data must be durable before this slice may be written (see `flush`).
pub(super) const ORDERED: u8 = 2;

#[derive(Debug)]
pub(super) struct Marks {
    pins: AtomicU32,
    dirty: AtomicU8,
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            pins: AtomicU32::new(0),
            dirty: AtomicU8::new(0),
        }
    }
}

impl Marks {
    /// Sets flags of [`DIRTY`] and [`ORDERED`]; returns those that were set.
    pub(super) fn set_dirty(&self, flags: u8) -> u8 {
        self.dirty.fetch_or(flags, Ordering::AcqRel)
    }

    /// Called *before* entries are published that may be written only after their data: whoever copies
    /// such an entry and asks [`Marks::is_ordered`] afterwards is told, though the slice is not marked
    /// dirty before the publication is over.
    pub(super) fn note_order(&self, ordered: bool) {
        if ordered {
            self.dirty.fetch_or(ORDERED, Ordering::AcqRel);
        }
    }

    /// True if an entry that was published so far may be written only after a flush of data.
    pub(super) fn is_ordered(&self) -> bool {
        self.dirty.load(Ordering::Acquire) & ORDERED != 0
    }

    pub(super) fn take_dirty(&self) -> u8 {
        self.dirty.swap(0, Ordering::AcqRel)
    }

    /// Readies a clean slice that nobody changes for unlinking: no pin succeeds any more.
    pub(super) fn begin_evict(&self) -> bool {
        if self.dirty.load(Ordering::Acquire) != 0 {
            return false;
        }
        let taken = self
            .pins
            .compare_exchange(0, EVICTED, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        // Whoever dirtied it meanwhile has dropped its pin before, so its flag is seen here.
        if taken && self.dirty.load(Ordering::Acquire) != 0 {
            self.pins.store(0, Ordering::Release);
            return false;
        }
        taken
    }

    pub(super) fn pin(&self) -> bool {
        self.pins
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |pins| {
                (pins & EVICTED == 0).then_some(pins + 1)
            })
            .is_ok()
    }

    pub(super) fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }
}
