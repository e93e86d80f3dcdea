//! A slice with a change that the file does not have is not thrown away, and a flush is told of every
//! change, and of its order.

use std::rc::Rc;

use loom::thread;

use super::marks::{DIRTY, Marks, ORDERED};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::{PREEMPTIONS, explore_up_to};

/// No slice is linked.
const MISSING: u64 = u64::MAX;
/// The entry before and after the change.
const OLD: u64 = 1;
const NEW: u64 = 2;

/// A slice with one entry.
#[derive(Default)]
struct Slice {
    marks: Marks,
    entry: AtomicU64,
}

/// A directory with one word, and the slices that are linked there one after the other.
struct Tables {
    word: AtomicU64,
    slices: [Slice; 2],
    /// `Tables::dirty`: whether the slice is in the list.
    listed: Mutex<bool>,
    file: AtomicU64,
}

impl Tables {
    fn new() -> Rc<Self> {
        let tables = Self {
            word: AtomicU64::new(0),
            slices: Default::default(),
            listed: Mutex::default(),
            file: AtomicU64::new(OLD),
        };
        tables.slices[0].entry.store(OLD, Ordering::Relaxed);
        Rc::new(tables)
    }

    /// `Directory::pin`: `None` if no slice is linked.
    fn pin(&self) -> Option<&Slice> {
        loop {
            match self.word.load(Ordering::Acquire) {
                MISSING => return None,
                n if self.slices[n as usize].marks.pin() => return Some(&self.slices[n as usize]),
                _ => thread::yield_now(),
            }
        }
    }

    /// A writer: loads the slice again if it is gone, publishes, and marks it dirty.
    fn change(&self) {
        let slice = self.pin().unwrap_or_else(|| {
            let slice = &self.slices[1];
            slice
                .entry
                .store(self.file.load(Ordering::Acquire), Ordering::Relaxed);
            self.word.store(1, Ordering::Release);
            assert!(slice.marks.pin());
            slice
        });
        slice.marks.note_order(true);
        slice.entry.store(NEW, Ordering::Release);
        if slice.marks.set_dirty(DIRTY | ORDERED) & DIRTY == 0 {
            *self.listed.lock().unwrap() = true;
        }
        slice.marks.unpin();
    }

    /// `Tables::evict`.
    fn evict(&self) {
        let n = self.word.load(Ordering::Acquire);
        if n != MISSING && self.slices[n as usize].marks.begin_evict() {
            self.word.store(MISSING, Ordering::Release);
        }
    }

    /// `flush::Snapshot`: what is listed is pinned until it is written.
    fn flush(&self) {
        if !std::mem::take(&mut *self.listed.lock().unwrap()) {
            return;
        }
        let slice = self.pin().expect("what is dirty stays");
        let flags = slice.marks.take_dirty();
        let copy = slice.entry.load(Ordering::Acquire);
        let ordered = flags & ORDERED != 0 || slice.marks.is_ordered();
        assert!(copy == OLD || ordered, "written before its data");
        self.file.store(copy, Ordering::Release);
        slice.marks.unpin();
    }

    /// All have ended: nothing is lost.
    fn check(&self) {
        let file = self.file.load(Ordering::Acquire);
        match self.word.load(Ordering::Acquire) {
            MISSING => assert_eq!(file, NEW, "thrown away"),
            n => {
                let slice = &self.slices[n as usize];
                assert_eq!(slice.entry.load(Ordering::Acquire), NEW, "lost");
                let dirty = slice.marks.take_dirty() & DIRTY != 0;
                assert_eq!(*self.listed.lock().unwrap(), dirty, "listed");
                assert!(dirty || file == NEW, "forgotten");
            }
        }
    }
}

fn play(steps: &[fn(&Tables)]) {
    let steps = steps.to_vec();
    // Three threads take many more interleavings for each preemption.
    let preemptions = if steps.len() > 2 { 2 } else { PREEMPTIONS };
    explore_up_to(preemptions, move || {
        let tables = Tables::new();
        let threads: Vec<_> = steps
            .iter()
            .map(|&step| {
                let tables = tables.clone();
                thread::spawn(move || step(&tables))
            })
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        tables.check();
    });
}

/// One changes the slice while another throws it out.
pub fn a_change_against_an_eviction() {
    play(&[Tables::change, Tables::evict]);
}

/// A flush takes the flags in the middle of a change; then the slice may go, or not.
pub fn a_change_against_a_flush_and_an_eviction() {
    play(&[Tables::change, |tables| {
        tables.flush();
        tables.evict();
        tables.flush();
    }]);
}

/// All three at once.
pub fn a_change_a_flush_and_an_eviction() {
    play(&[Tables::change, Tables::flush, Tables::evict]);
}

/// Two changes, the second while the first is flushed.
pub fn two_changes_and_a_flush() {
    play(&[
        |tables| {
            tables.change();
            tables.change();
        },
        |tables| {
            tables.flush();
            tables.flush();
        },
    ]);
}
