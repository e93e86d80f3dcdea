//! Keeps writes apart that meet in a block.
//!
//! A write that covers a block of the device only in part reads the block, changes it and writes it
//! back. A neighbour that writes to the same block meanwhile would be undone. So such a write holds its
//! blocks alone, and others share theirs.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Byte ranges of one storage that are held.
#[derive(Debug, Default)]
pub(in crate::block) struct Edges {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    waiters: Vec<Waker>,
    next_number: u64,
}

#[derive(Debug)]
struct Held {
    range: Range<u64>,
    alone: bool,
    number: u64,
}

/// A held range; dropping it lets it go. Small, because every transfer under way has room for one.
#[derive(Debug)]
pub(in crate::block) struct EdgeGuard<'a> {
    edges: &'a Edges,
    number: u64,
}

impl Edges {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds `range` if nobody is in the way.
    pub(in crate::block) fn try_hold(
        &self,
        range: Range<u64>,
        alone: bool,
    ) -> Option<EdgeGuard<'_>> {
        self.hold_or(range, alone, |_| ())
    }

    /// Holds `range`, after those that are in the way.
    pub(in crate::block) async fn hold(&self, range: Range<u64>, alone: bool) -> EdgeGuard<'_> {
        poll_fn(|cx| {
            let wait = |state: &mut State| state.waiters.push(cx.waker().clone());
            match self.hold_or(range.clone(), alone, wait) {
                Some(guard) => Poll::Ready(guard),
                None => Poll::Pending,
            }
        })
        .await
    }

    fn hold_or(
        &self,
        range: Range<u64>,
        alone: bool,
        otherwise: impl FnOnce(&mut State),
    ) -> Option<EdgeGuard<'_>> {
        let mut state = self.lock();
        let in_the_way = |other: &Held| {
            (alone || other.alone) && other.range.start < range.end && range.start < other.range.end
        };
        if state.held.iter().any(in_the_way) {
            otherwise(&mut state);
            return None;
        }
        let number = state.next_number;
        state.next_number += 1;
        state.held.push(Held {
            range,
            alone,
            number,
        });
        Some(EdgeGuard {
            edges: self,
            number,
        })
    }
}

impl Drop for EdgeGuard<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.edges.lock();
            let its = |held: &Held| held.number == self.number;
            if let Some(index) = state.held.iter().position(its) {
                state.held.swap_remove(index);
            }
            std::mem::take(&mut state.waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_lets_its_own_range_go_and_no_other() {
        let edges = Edges::default();
        let first = edges.try_hold(0..4096, false).unwrap();
        let same = edges.try_hold(0..4096, false).unwrap();
        let next = edges.try_hold(4096..8192, false).unwrap();
        drop(next);
        assert!(edges.try_hold(0..512, true).is_none());
        let alone = edges.try_hold(4096..8192, true).unwrap();
        drop(first);
        assert!(edges.try_hold(0..512, true).is_none());
        drop(same);
        assert!(edges.try_hold(0..4096, true).is_some());
        assert!(edges.try_hold(8191..8192, false).is_none());
        drop(alone);
        assert!(edges.try_hold(8191..8192, false).is_some());
    }
}
