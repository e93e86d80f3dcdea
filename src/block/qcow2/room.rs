//! Arrays with room to grow: the L1 table and the directory of slices do not move under those who read them.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64};

/// What an array can be made of.
///
/// # Safety
/// All bytes zero is a value of the type, and it has nothing to drop.
pub(in crate::block) unsafe trait Word: Sync {}
// SAFETY: zero is a number.
unsafe impl Word for AtomicU8 {}
// SAFETY: as above.
unsafe impl Word for AtomicU64 {}
// SAFETY: zeros are a null pointer, and what it points at is nothing to the array.
unsafe impl<T> Word for AtomicPtr<T> {}

/// Words that are zero until they are written to, in pages that take no memory until then.
#[derive(Debug)]
pub(in crate::block) struct Room<T: Word> {
    words: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its words, which threads may share.
unsafe impl<T: Word> Send for Room<T> {}
// SAFETY: as above.
unsafe impl<T: Word> Sync for Room<T> {}

impl<T: Word> Room<T> {
    /// `len` words; none if the system does not give the addresses for that.
    pub(in crate::block) fn new(len: u64) -> Option<Self> {
        let len = usize::try_from(len).ok()?;
        let layout = Layout::array::<T>(len.max(1)).ok()?;
        // SAFETY: the layout is not empty: no word is.
        let words = NonNull::new(unsafe { alloc_zeroed(layout) })?.cast();
        Some(Self { words, len })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(in crate::block) fn get(&self, index: u64) -> Option<&T> {
        let index = usize::try_from(index).ok().filter(|i| *i < self.len)?;
        // SAFETY: `len` words were allocated, zeros are valid ones, and they live as long as `self`.
        Some(unsafe { self.words.add(index).as_ref() })
    }
}

impl<T: Word> Drop for Room<T> {
    fn drop(&mut self) {
        if let Ok(layout) = Layout::array::<T>(self.len.max(1)) {
            // SAFETY: allocated with the same layout.
            unsafe { dealloc(self.words.as_ptr().cast(), layout) };
        }
    }
}
