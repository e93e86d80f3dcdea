//! What was retired is not used for something else while anybody may still look at it.

use std::rc::Rc;

use loom::cell::UnsafeCell;
use loom::sync::mpsc::channel;
use loom::thread;

use super::{Epochs, Worker};
use crate::explore;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Something that is found by a pointer. Loom fails a model in which its memory is used by two threads at a
/// time.
struct Thing {
    linked: AtomicBool,
    memory: UnsafeCell<()>,
}

impl Thing {
    fn new() -> Self {
        Self {
            linked: AtomicBool::new(true),
            memory: UnsafeCell::new(()),
        }
    }

    fn find(&self) -> bool {
        self.linked.load(Ordering::Acquire)
    }

    fn look(&self) {
        self.memory.with(|_| ());
    }

    /// Unlinks it, and uses its memory for something else as soon as that is allowed, if it is.
    fn unlink_and_reuse(&self, epochs: &Epochs, asks: usize) {
        self.linked.store(false, Ordering::Release);
        let epoch = epochs.retire();
        for _ in 0..asks {
            if epochs.passed(epoch) {
                self.memory.with_mut(|_| ());
                return;
            }
            thread::yield_now();
        }
    }
}

fn against(asks: usize, reader: impl Fn(&Thing, Worker) + Sync + Send + Copy + 'static) {
    explore(move || {
        let (epochs, thing) = (Epochs::new(), Rc::new(Thing::new()));
        let its = (epochs.clone(), thing.clone());
        let thread = thread::spawn(move || {
            let (epochs, thing) = its;
            reader(&thing, Worker::new(&epochs));
        });
        thing.unlink_and_reuse(&epochs, asks);
        thread.join().unwrap();
    });
}

/// A look without a pin lasts until the thread's next turn.
pub fn a_look_within_a_turn() {
    against(2, |thing, worker| {
        for _ in 0..2 {
            worker.turn();
            if thing.find() {
                thing.look();
            }
        }
        worker.park();
    });
}

/// A request looks at what it found before many turns of its worker.
pub fn a_pinned_request_over_turns() {
    against(2, |thing, worker| {
        worker.turn();
        let pin = worker.pin();
        let found = thing.find();
        worker.turn();
        if found {
            thing.look();
        }
        drop(pin);
        worker.turn();
        worker.park();
    });
}

/// A worker that slept, and sleeps again with its request under way.
pub fn a_pinned_request_over_a_sleep() {
    against(2, |thing, worker| {
        worker.turn();
        worker.park();
        let pin = worker.pin();
        let found = thing.find();
        worker.park();
        if found {
            thing.look();
        }
        drop(pin);
    });
}

/// Two requests of one worker, the later of which ends first.
pub fn requests_that_end_out_of_order() {
    against(2, |thing, worker| {
        worker.turn();
        let first = worker.pin();
        let found_first = thing.find();
        worker.turn();
        let second = worker.pin();
        let found = thing.find();
        if found {
            thing.look();
        }
        drop(second);
        worker.turn();
        if found_first {
            thing.look();
        }
        drop(first);
        worker.park();
    });
}

/// Two workers look; a third thread unlinks. One of them goes for good.
pub fn two_workers_and_one_that_leaves() {
    explore(|| {
        let (epochs, thing) = (Epochs::new(), Rc::new(Thing::new()));
        let threads: Vec<_> = (0..2)
            .map(|n| {
                let (epochs, thing) = (epochs.clone(), thing.clone());
                thread::spawn(move || {
                    let worker = Worker::new(&epochs);
                    let pin = worker.pin();
                    if thing.find() {
                        thing.look();
                    }
                    drop(pin);
                    if n == 0 {
                        worker.park();
                    }
                })
            })
            .collect();
        thing.unlink_and_reuse(&epochs, 1);
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}

/// Not only safe: what nobody looks at any more does pass, also if the last request that could ended while
/// its worker slept.
pub fn what_nobody_looks_at_passes() {
    explore(|| {
        let epochs = Epochs::new();
        let (ended, end) = channel();
        let its = epochs.clone();
        let thread = thread::spawn(move || {
            let worker = Worker::new(&its);
            let pin = worker.pin();
            worker.turn();
            worker.park();
            drop(pin);
            // It lives on, asleep.
            end.recv().unwrap();
            drop(worker);
        });
        let epoch = epochs.retire();
        while !epochs.passed(epoch) {
            thread::yield_now();
        }
        ended.send(()).unwrap();
        thread.join().unwrap();
    });
}
