//! A worker's arena, and who else looks at it: those who wait for a refill, and the closer.

use std::rc::Rc;
use std::sync::Arc;

use loom::future::block_on;
use loom::sync::mpsc::channel;
use loom::thread;

use super::arena::{Arena, Stock};
use super::runs::Run;
use crate::block::error::Error;
use crate::explore;
use crate::sync::atomic::{AtomicBool, Ordering, fence};

fn stock(first: u64, count: u64) -> Stock {
    Stock {
        run: Run::new(first, count),
        zeroed: true,
    }
}

/// The clusters of runs, ascending.
fn clusters(runs: impl IntoIterator<Item = Run>) -> Vec<u64> {
    let mut all: Vec<u64> = runs.into_iter().flat_map(|r| r.first..r.end()).collect();
    all.sort_unstable();
    all
}

/// `alloc::Allocator::start_refill`, with the refill's end where its task ends. There are no SeqCst
/// loads and stores in loom: the fences stand for them.
fn refill(arena: &Arena, closed: &AtomicBool, found: &[Stock]) -> bool {
    if !arena.begin_refill() {
        return false;
    }
    fence(Ordering::SeqCst);
    if closed.load(Ordering::SeqCst) {
        arena.refill_ended(Some(Error));
        return false;
    }
    arena.refill(found, 4, 4);
    arena.refill_ended(None);
    true
}

/// `alloc::Allocator::close`.
fn close(arena: &Arena, closed: &AtomicBool) -> Vec<Run> {
    closed.store(true, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    block_on(arena.idle());
    arena.drain()
}

/// Requests have ended, a refill goes on or is only about to begin: the closer gets every cluster that
/// nobody took, each once, and none comes afterwards.
pub fn close_against_a_refill() {
    explore(|| {
        let (arena, closed) = (Arc::new(Arena::new(4)), Arc::new(AtomicBool::new(false)));
        let (ended, requests) = channel();
        arena.refill(&[stock(1, 2), stock(8, 1)], 4, 4);
        let its = (arena.clone(), closed.clone(), ended);
        let worker = thread::spawn(move || {
            let (arena, closed, ended) = its;
            // Two requests: one keeps its cluster, one gives it back untouched.
            let kept = arena.take(1).unwrap();
            let back = arena.take(1).unwrap();
            arena.put_back(back);
            ended.send(()).unwrap();
            let refilled = refill(&arena, &closed, &[stock(20, 2)]);
            (kept.run, refilled)
        });
        requests.recv().unwrap();
        let drained = close(&arena, &closed);
        let (kept, refilled) = worker.join().unwrap();
        let mut all = vec![1, 2, 8];
        if refilled {
            all.extend([20, 21]);
        }
        let seen = clusters(drained.into_iter().chain([kept]));
        assert_eq!(seen, all, "each is somebody's, once");
        assert_eq!(arena.len(), 0);
        assert_eq!(arena.take(1), None);
    });
}

/// Two of the worker's tasks want to refill, and the closer comes: one refill at a time.
pub fn one_refill_at_a_time() {
    explore(|| {
        let arena = Arc::new(Arena::new(4));
        let busy = Rc::new(loom::cell::UnsafeCell::new(()));
        let threads: Vec<_> = (0..2)
            .map(|n| {
                let (arena, busy) = (arena.clone(), busy.clone());
                thread::spawn(move || {
                    let began = arena.begin_refill();
                    if began {
                        busy.with_mut(|_| ());
                        arena.refill(&[stock(10 * n, 1)], 4, 4);
                        arena.refill_ended(None);
                    }
                    began
                })
            })
            .collect();
        let refills = threads
            .into_iter()
            .filter_map(|t| t.join().ok())
            .filter(|b| *b);
        let refills = refills.count() as u64;
        assert!(refills >= 1);
        assert_eq!(arena.len(), refills);
    });
}

/// Who waits for a refill is woken by its end, whenever that comes (`alloc::Allocator::allocate`).
pub fn nobody_sleeps_through_the_end_of_a_refill() {
    explore(|| {
        let arena = Arc::new(Arena::new(4));
        assert!(arena.begin_refill());
        let rounds = arena.rounds();
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let arena = arena.clone();
                thread::spawn(move || block_on(arena.refilled(rounds)).is_ok())
            })
            .collect();
        arena.refill(&[stock(1, 1)], 4, 4);
        arena.refill_ended(None);
        assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap()));
        assert_eq!(arena.take(1), Some(stock(1, 1)));
    });
}

/// A failure is told to those who waited for this refill, and the next may succeed.
pub fn a_failed_refill_is_told() {
    explore(|| {
        let arena = Arc::new(Arena::new(4));
        assert!(arena.begin_refill());
        let rounds = arena.rounds();
        let its = arena.clone();
        let waiter = thread::spawn(move || {
            let first = block_on(its.refilled(rounds));
            let rounds = its.rounds();
            if !its.begin_refill() {
                return first.is_err();
            }
            its.refill(&[stock(1, 1)], 4, 4);
            its.refill_ended(None);
            block_on(its.refilled(rounds)).is_ok() && first.is_err()
        });
        arena.refill_ended(Some(Error));
        assert!(waiter.join().unwrap());
        assert_eq!(arena.len(), 1);
    });
}

/// The closer waits for the refill under way, but not for one that nobody began.
pub fn idle_ends_when_the_refill_has() {
    explore(|| {
        let arena = Arc::new(Arena::new(4));
        let its = arena.clone();
        let worker = thread::spawn(move || {
            for n in 0..2 {
                if its.begin_refill() {
                    its.refill(&[stock(n, 1)], 4, 4);
                    its.refill_ended(None);
                }
            }
        });
        block_on(arena.idle());
        worker.join().unwrap();
        block_on(arena.idle());
        assert_eq!(arena.len(), 2);
    });
}
