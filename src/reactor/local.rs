//! What a storage keeps for each thread: found by a small number, so that a request pays next to nothing for it.

use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use super::ring::Io;

struct Numbers {
    free: Vec<usize>,
    next: usize,
}

static NUMBERS: Mutex<Numbers> = Mutex::new(Numbers {
    free: Vec::new(),
    next: 0,
});

/// A place in every reactor for a value of one owner. Whatever was put there keeps the slot, directly or not, so
/// that a number is used again only when nobody has anything there.
#[derive(Debug)]
pub(crate) struct LocalSlot(usize);

impl LocalSlot {
    /// A place that nobody uses.
    pub(crate) fn new() -> Self {
        let mut numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
        Self(numbers.free.pop().unwrap_or_else(|| {
            numbers.next += 1;
            numbers.next - 1
        }))
    }
}

impl Drop for LocalSlot {
    fn drop(&mut self) {
        let mut numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.free.push(self.0);
    }
}

impl Io {
    /// What is kept in `slot` for this thread.
    #[inline]
    pub(crate) fn local<T: 'static>(&self, slot: &LocalSlot) -> Option<Rc<T>> {
        let locals = self.inner.locals.borrow();
        let found = locals.get(slot.0)?.as_ref()?;
        found.clone().downcast().ok()
    }

    /// Keeps `value` in `slot` for this thread, until [`Io::clear_local`] or the reactor's end.
    pub(crate) fn set_local<T: 'static>(&self, slot: &LocalSlot, value: Rc<T>) {
        let mut locals = self.inner.locals.borrow_mut();
        if locals.len() <= slot.0 {
            locals.resize(slot.0 + 1, None);
        }
        let before = locals[slot.0].replace(value);
        drop(locals);
        drop(before);
    }

    /// Forgets what is kept in `slot` for this thread.
    pub(crate) fn clear_local(&self, slot: &LocalSlot) {
        let mut locals = self.inner.locals.borrow_mut();
        let before = locals.get_mut(slot.0).and_then(Option::take);
        drop(locals);
        drop(before);
    }
}
