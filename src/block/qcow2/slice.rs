//! L2 slices in memory: who may look at one, change it, and throw it away.
//!
//! A slice is found through the [`Directory`] with one Acquire load, and its entry is read with another:
//! no lock, no reference count. What keeps it alive:
//!
//! - **Looking** is done between two awaits only (the closure of [`Directory::with`] cannot await).
//!   An unlinked slice is freed when every reactor has passed a quiescent point
//!   ([`crate::reactor::Epochs`]).
//! - **Changing** needs a pin ([`Pinned`]). A pinned slice is never unlinked, so a change cannot get lost
//!   in a slice that was replaced by a freshly loaded one.
//! - **Unlinking** takes the pin count from 0 to [`EVICTED`], which makes new pins fail, and then looks at
//!   the dirty flag: it sees every change made under an earlier pin.
//!
//! Per entry there is a state byte. A writer that is about to replace an entry claims it (`BUSY`). Only
//! claimed entries are changed, but for the flags that a load sets. Readers do not look at the state.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::entry;
use super::units::SLICE_ENTRIES;

/// In `pins`: unlinked, or about to be.
const EVICTED: u32 = 1 << 31;

/// In a state byte: a writer is replacing the entry.
pub(super) const BUSY: u8 = 1;
/// In a state byte, with `BUSY`: somebody waits for the claim's end.
pub(super) const WAITERS: u8 = 2;

/// In `dirty`: the slice differs from the file.
pub(super) const DIRTY: u8 = 1;
/// In `dirty`: data must be durable before this slice may be written (see `flush`).
pub(super) const ORDERED: u8 = 2;

/// A piece of an L2 table.
#[derive(Debug)]
pub(super) struct Slice {
    /// Number of the slice, over the whole virtual disk.
    pub(super) index: u64,
    pins: AtomicU32,
    dirty: AtomicU8,
    /// Looked at since the clock's hand passed.
    used: AtomicBool,
    /// What the file says where `entries` says [`entry::BAD`].
    bad: Vec<(usize, u64)>,
    states: [AtomicU8; SLICE_ENTRIES],
    entries: [AtomicU64; SLICE_ENTRIES],
}

impl Slice {
    /// A slice with entries as the file has them; `check` says which may be used.
    pub(super) fn new(
        index: u64,
        raw: impl Iterator<Item = u64>,
        check: impl Fn(u64) -> bool,
    ) -> Box<Self> {
        let mut slice = Box::new(Self {
            index,
            pins: AtomicU32::new(0),
            dirty: AtomicU8::new(0),
            used: AtomicBool::new(true),
            bad: Vec::new(),
            states: [const { AtomicU8::new(0) }; SLICE_ENTRIES],
            entries: [const { AtomicU64::new(0) }; SLICE_ENTRIES],
        });
        for (at, raw) in raw.enumerate().take(SLICE_ENTRIES) {
            let good = check(raw);
            if !good {
                slice.bad.push((at, raw));
            }
            *slice.entries[at].get_mut() = if good { raw } else { entry::BAD };
        }
        slice
    }

    /// The raw entry, in host byte order.
    #[inline]
    pub(super) fn get(&self, at: usize) -> u64 {
        self.entries[at].load(Ordering::Acquire)
    }

    /// Publishes an entry that the caller has claimed.
    pub(super) fn publish(&self, at: usize, raw: u64) {
        self.entries[at].store(raw, Ordering::Release);
    }

    #[inline]
    pub(super) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Sets flags of [`DIRTY`] and [`ORDERED`]; returns those that were set.
    pub(super) fn set_dirty(&self, flags: u8) -> u8 {
        self.dirty.fetch_or(flags, Ordering::AcqRel)
    }

    /// Called *before* entries are published that may be written only after their data: whoever copies
    /// such an entry and asks [`Slice::is_ordered`] afterwards is told, though the slice is not marked
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

    /// The state byte of an entry.
    pub(super) fn state(&self, at: usize) -> &AtomicU8 {
        &self.states[at]
    }

    /// Copies the entries as the file has them, big-endian.
    pub(super) fn encode(&self, to: &mut [u8]) {
        for (at, to) in to.chunks_exact_mut(8).enumerate() {
            let mut raw = self.get(at);
            if raw == entry::BAD {
                let kept = self.bad.iter().find(|bad| bad.0 == at);
                raw = kept.map_or(0, |bad| bad.1);
            }
            to.copy_from_slice(&raw.to_be_bytes());
        }
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

    fn pin(&self) -> bool {
        self.pins
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |pins| {
                (pins & EVICTED == 0).then_some(pins + 1)
            })
            .is_ok()
    }

    fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::Release);
    }
}

/// A slice that is not unlinked before this is dropped.
#[derive(Debug)]
pub(super) struct Pinned(NonNull<Slice>);

// SAFETY: a slice is Sync, and the pin keeps it alive wherever it goes.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl std::ops::Deref for Pinned {
    type Target = Slice;
    fn deref(&self) -> &Slice {
        // SAFETY: pinned slices are neither unlinked nor freed.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.unpin();
    }
}

/// All slices of the virtual disk, loaded or not: one word each, in pages that cost nothing before
/// something in them is loaded.
#[derive(Debug)]
pub(super) struct Directory {
    words: NonNull<AtomicPtr<Slice>>,
    len: usize,
}

// SAFETY: the words are atomic, and slices are Sync.
unsafe impl Send for Directory {}
// SAFETY: as above.
unsafe impl Sync for Directory {}

impl Directory {
    /// Room for `len` slices; none if there is no memory for that.
    pub(super) fn new(len: u64) -> Option<Self> {
        let len = usize::try_from(len).ok()?;
        let layout = Layout::array::<AtomicPtr<Slice>>(len.max(1)).ok()?;
        // SAFETY: the layout is not empty. Zeros are null pointers.
        let words = NonNull::new(unsafe { alloc_zeroed(layout) })?.cast();
        Some(Self { words, len })
    }

    #[inline]
    fn word(&self, index: u64) -> Option<&AtomicPtr<Slice>> {
        let index = usize::try_from(index).ok().filter(|i| *i < self.len)?;
        // SAFETY: `len` words were allocated and zeroed, and live as long as `self`.
        Some(unsafe { self.words.add(index).as_ref() })
    }

    /// Looks at a slice, if it is loaded. On a reactor's thread only, in a task or in `block_on`.
    #[inline]
    pub(super) fn with<R>(&self, index: u64, look: impl FnOnce(&Slice) -> R) -> Option<R> {
        let slice = self.word(index)?.load(Ordering::Acquire);
        // SAFETY: a slice that could be found is freed only after this thread's next quiescent point,
        // and `look` cannot get there: it does not await.
        unsafe { slice.as_ref() }.map(look)
    }

    /// Pins a slice, if it is loaded.
    pub(super) fn pin(&self, index: u64) -> Option<Pinned> {
        loop {
            match self.with(index, |slice| {
                slice.pin().then(|| Pinned(NonNull::from(slice)))
            }) {
                Some(Some(pinned)) => return Some(pinned),
                // Being unlinked, or found dirty and left alone: a matter of a few instructions.
                Some(None) => std::thread::yield_now(),
                None => return None,
            }
        }
    }

    /// Makes a slice findable. Only its one loader does this.
    pub(super) fn link(&self, slice: Box<Slice>) -> *mut Slice {
        let index = slice.index;
        let slice = Box::into_raw(slice);
        if let Some(word) = self.word(index) {
            word.store(slice, Ordering::Release);
        }
        slice
    }

    /// The opposite, for a slice on which [`Slice::begin_evict`] succeeded.
    pub(super) fn unlink(&self, index: u64) -> Option<Box<Slice>> {
        let slice = self.word(index)?.swap(null_mut(), Ordering::AcqRel);
        // SAFETY: it came from `Box::into_raw` in `link`, and the swap gives it out once. Threads may
        // still look at it: the caller keeps the box until they have passed a quiescent point.
        (!slice.is_null()).then(|| unsafe { Box::from_raw(slice) })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Loaded slices were unlinked by `Tables`.
        if let Ok(layout) = Layout::array::<AtomicPtr<Slice>>(self.len.max(1)) {
            // SAFETY: allocated with the same layout.
            unsafe { dealloc(self.words.as_ptr().cast(), layout) };
        }
    }
}
