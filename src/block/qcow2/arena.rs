//! A worker's stock of clusters: allocated, durable, not referenced yet.
//!
//! Only the worker's own thread takes from its arena and puts into it (requests, and the refill task,
//! which runs on the same reactor). So plain loads and stores do; they are atomic because closing the
//! allocator looks at every arena from one thread.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use super::runs::Run;
use crate::block::error::{Error, Result};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// Clusters of the first refill.
const FIRST_SIZE: u64 = 16;

/// A run ready to be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stock {
    pub(super) run: Run,
    /// It reads as zeros, durably.
    pub(super) zeroed: bool,
}

/// One worker's arena, alone on its cache lines.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Arena {
    /// The run being handed out: next cluster, end.
    next: AtomicU64,
    end: AtomicU64,
    zeroed: AtomicBool,
    /// Clusters in the runs behind it.
    queued: AtomicU64,
    /// With fewer clusters than this a refill is due.
    low: AtomicU64,
    refilling: AtomicBool,
    /// Clusters that the next refill asks for.
    size: AtomicU64,
    /// What is touched once a run or a refill.
    cold: Mutex<Cold>,
}

#[derive(Debug, Default)]
struct Cold {
    queue: VecDeque<Stock>,
    waiters: Vec<Waker>,
    /// Refills that ended.
    rounds: u64,
    /// How the last one failed.
    failed: Option<Error>,
}

impl Arena {
    pub(super) fn new(max_size: u64) -> Self {
        Self {
            next: AtomicU64::new(0),
            end: AtomicU64::new(0),
            zeroed: AtomicBool::new(false),
            queued: AtomicU64::new(0),
            low: AtomicU64::new(0),
            refilling: AtomicBool::new(false),
            size: AtomicU64::new(FIRST_SIZE.min(max_size)),
            cold: Mutex::default(),
        }
    }

    fn cold(&self) -> MutexGuard<'_, Cold> {
        self.cold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up to `want` neighbouring clusters.
    #[inline]
    pub(super) fn take(&self, want: u64) -> Option<Stock> {
        let mut next = self.next.load(Ordering::Relaxed);
        let mut end = self.end.load(Ordering::Relaxed);
        if next == end {
            (next, end) = self.next_run()?;
        }
        let count = want.min(end - next);
        self.next.store(next + count, Ordering::Release);
        Some(Stock {
            run: Run::new(next, count),
            zeroed: self.zeroed.load(Ordering::Relaxed),
        })
    }

    #[cold]
    fn next_run(&self) -> Option<(u64, u64)> {
        let mut cold = self.cold();
        let Stock { run, zeroed } = cold.queue.pop_front()?;
        let queued = self.queued.load(Ordering::Relaxed);
        self.queued.store(queued - run.count, Ordering::Relaxed);
        self.next.store(run.first, Ordering::Relaxed);
        self.end.store(run.end(), Ordering::Relaxed);
        self.zeroed.store(zeroed, Ordering::Relaxed);
        Some((run.first, run.end()))
    }

    /// Takes clusters back that were handed out and not touched.
    pub(super) fn put_back(&self, stock: Stock) {
        let next = self.next.load(Ordering::Relaxed);
        let (end, zeroed) = (&self.end, &self.zeroed);
        if stock.run.end() == next && zeroed.load(Ordering::Relaxed) == stock.zeroed {
            self.next.store(stock.run.first, Ordering::Release);
        } else if next == end.load(Ordering::Relaxed) {
            zeroed.store(stock.zeroed, Ordering::Relaxed);
            self.next.store(stock.run.first, Ordering::Relaxed);
            end.store(stock.run.end(), Ordering::Release);
        } else {
            self.queue(&[stock], true);
        }
    }

    fn queue(&self, stock: &[Stock], front: bool) {
        let mut cold = self.cold();
        let count: u64 = stock.iter().map(|s| s.run.count).sum();
        for &stock in stock {
            if front {
                cold.queue.push_front(stock);
            } else {
                cold.queue.push_back(stock);
            }
        }
        let queued = self.queued.load(Ordering::Relaxed);
        self.queued.store(queued + count, Ordering::Release);
    }

    /// True if a refill should be started ahead of need.
    #[inline]
    pub(super) fn is_low(&self) -> bool {
        let here = self.end.load(Ordering::Relaxed) - self.next.load(Ordering::Relaxed);
        here + self.queued.load(Ordering::Relaxed) < self.low.load(Ordering::Relaxed)
            && !self.refilling.load(Ordering::Relaxed)
    }

    /// Clusters in stock.
    pub(super) fn len(&self) -> u64 {
        let here = self.end.load(Ordering::Acquire) - self.next.load(Ordering::Acquire);
        here + self.queued.load(Ordering::Acquire)
    }

    /// Takes everything.
    pub(super) fn drain(&self) -> Vec<Run> {
        let mut cold = self.cold();
        let mut runs: Vec<Run> = cold.queue.drain(..).map(|stock| stock.run).collect();
        self.queued.store(0, Ordering::Relaxed);
        let end = self.end.load(Ordering::Acquire);
        let next = self.next.swap(end, Ordering::AcqRel);
        if next < end {
            runs.push(Run::new(next, end - next));
        }
        runs
    }

    // ---- refills ----

    /// Clusters that the next refill asks for.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Claims the right to refill; false if one is under way. Ends with [`Arena::refill_ended`].
    pub(super) fn begin_refill(&self) -> bool {
        !self.refilling.swap(true, Ordering::SeqCst)
    }

    /// The count of refills that ended, for [`Arena::refilled`].
    pub(super) fn rounds(&self) -> u64 {
        self.cold().rounds
    }

    /// Puts a refill's clusters into stock; `size` was asked for, the next may ask for `max_size`.
    pub(super) fn refill(&self, stock: &[Stock], size: u64, max_size: u64) {
        let got: u64 = stock.iter().map(|s| s.run.count).sum();
        self.queue(stock, false);
        self.low.store(got / 2 + 1, Ordering::Relaxed);
        let next = if got < size { got } else { size * 2 };
        self.size.store(next.clamp(1, max_size), Ordering::Relaxed);
    }

    /// Ends what [`Arena::begin_refill`] began, and wakes those who wait for it.
    pub(super) fn refill_ended(&self, failed: Option<Error>) {
        let mut cold = self.cold();
        if failed.is_some() {
            // No attempt ahead of need after a failure: the next is made when somebody has to have it.
            self.low.store(0, Ordering::Relaxed);
            self.size
                .store(FIRST_SIZE.min(self.size()), Ordering::Relaxed);
        }
        cold.failed = failed;
        cold.rounds += 1;
        let waiters = std::mem::take(&mut cold.waiters);
        self.refilling.store(false, Ordering::SeqCst);
        drop(cold);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// Waits until more refills than `rounds` have ended; how the last one did.
    pub(super) async fn refilled(&self, rounds: u64) -> Result<()> {
        poll_fn(|cx| {
            let mut cold = self.cold();
            if cold.rounds != rounds {
                return Poll::Ready(cold.failed.clone().map_or(Ok(()), Err));
            }
            if !cold.waiters.iter().any(|w| w.will_wake(cx.waker())) {
                cold.waiters.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Waits for the refill under way, if there is one.
    pub(super) async fn idle(&self) {
        loop {
            let rounds = self.rounds();
            if !self.refilling.load(Ordering::SeqCst) {
                return;
            }
            // Its failure was told to those who need clusters.
            let _ = self.refilled(rounds).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stock(first: u64, count: u64) -> Stock {
        Stock {
            run: Run::new(first, count),
            zeroed: true,
        }
    }

    #[test]
    fn clusters_come_in_order_and_as_many_at_once_as_there_are() {
        let arena = Arena::new(1024);
        assert_eq!(arena.take(1), None);
        arena.refill(&[stock(10, 4), stock(30, 2)], 16, 1024);
        assert_eq!(arena.len(), 6);
        assert_eq!(arena.take(3), Some(stock(10, 3)));
        assert_eq!(arena.take(3), Some(stock(13, 1)));
        assert_eq!(arena.take(1), Some(stock(30, 1)));
        assert_eq!(arena.len(), 1);
        assert_eq!(arena.drain(), [Run::new(31, 1)]);
        assert_eq!(arena.take(1), None);
    }

    #[test]
    fn untouched_clusters_go_back_to_where_they_came_from() {
        let arena = Arena::new(1024);
        arena.refill(&[stock(10, 8), stock(40, 1)], 16, 1024);
        let (a, b) = (arena.take(2).unwrap(), arena.take(2).unwrap());
        arena.put_back(b);
        assert_eq!(arena.take(4), Some(stock(12, 4)));
        arena.put_back(a);
        assert_eq!(arena.len(), 5);
        assert_eq!(arena.take(9), Some(stock(16, 2)));
        assert_eq!(arena.take(9), Some(stock(10, 2)));
        arena.put_back(stock(70, 1));
        assert_eq!(arena.take(9), Some(stock(70, 1)));
        assert_eq!(arena.take(9), Some(stock(40, 1)));
        assert_eq!(arena.len(), 0);
    }

    #[test]
    fn refills_grow_while_they_succeed_and_come_ahead_of_need() {
        let arena = Arena::new(40);
        assert_eq!(arena.size(), 16);
        arena.refill(&[stock(0, 16)], 16, 40);
        assert_eq!(arena.size(), 32);
        assert!(!arena.is_low());
        arena.take(8);
        assert!(arena.is_low(), "half used");
        assert!(arena.begin_refill() && !arena.begin_refill());
        assert!(!arena.is_low(), "one at a time");
        arena.refill(&[stock(16, 32)], 32, 40);
        arena.refill_ended(None);
        assert_eq!(arena.size(), 40);
        arena.refill(&[stock(60, 3)], 40, 40);
        assert_eq!(arena.size(), 3, "no space for more");
    }
}
