//! Epoch-based reclamation: when may something that was unlinked be used for something else?
//!
//! Every reactor is a participant of one [`Epochs`] domain. A request pins the epoch it began in
//! ([`super::Io::pin`]); a participant publishes the oldest epoch that one of its requests, or its
//! current turn, may still be looking at. What was unlinked in epoch `r` ([`Epochs::retire`]) is free
//! once every participant has published something newer than `r` ([`Epochs::passed`]).
//!
//! The fences pair as follows. A participant announces its epoch, then fences (A), then looks at shared
//! structures. Whoever unlinks does so, then fences (B), then moves the epoch on and reads the
//! announcements. Either B's reader sees the announcement and waits, or A's reader sees the unlinking.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// A point in the order of retirements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// Published by a participant that looks at nothing.
const OFFLINE: u64 = u64::MAX;

/// A domain: the reactors that share data structures.
#[derive(Debug)]
pub struct Epochs {
    global: AtomicU64,
    participants: Mutex<Vec<Arc<Announcement>>>,
}

/// A participant's published word, alone on its cache line: its owner writes it while others read.
#[derive(Debug)]
#[repr(align(128))]
struct Announcement(AtomicU64);

impl Default for Epochs {
    fn default() -> Self {
        Self {
            global: AtomicU64::new(1),
            participants: Mutex::new(Vec::new()),
        }
    }
}

impl Epochs {
    /// A domain with no participants yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Ends the current epoch and returns it. Call it after the last pointer to the retired thing is gone.
    pub fn retire(&self) -> Epoch {
        fence(Ordering::SeqCst); // (B)
        Epoch(self.global.fetch_add(1, Ordering::SeqCst))
    }

    /// True once nothing that began in `epoch` or before is still running.
    pub fn passed(&self, epoch: Epoch) -> bool {
        fence(Ordering::SeqCst);
        self.lock()
            .iter()
            .all(|word| word.0.load(Ordering::SeqCst) > epoch.0)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Announcement>>> {
        self.participants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread's side of the domain.
#[derive(Debug)]
pub(super) struct Participant {
    domain: Arc<Epochs>,
    published: Arc<Announcement>,
    /// Epoch that new pins take; `OFFLINE` while parked.
    current: Cell<u64>,
    /// Epochs with running requests, oldest first: (epoch, requests).
    pinned: RefCell<VecDeque<(u64, u64)>>,
}

/// A running request's mark. Dropping it ends the request.
#[derive(Debug)]
pub struct Pin {
    owner: Rc<Participant>,
    epoch: u64,
}

impl Participant {
    pub(super) fn new(domain: Arc<Epochs>) -> Rc<Self> {
        let published = Arc::new(Announcement(AtomicU64::new(OFFLINE)));
        domain.lock().push(published.clone());
        Rc::new(Self {
            domain,
            published,
            current: Cell::new(OFFLINE),
            pinned: RefCell::new(VecDeque::with_capacity(64)),
        })
    }

    /// Comes online, or passes a quiescent point: no pointer read before this call is used after it,
    /// but by pinned requests.
    #[inline]
    pub(super) fn quiesce(&self) {
        let global = self.domain.global.load(Ordering::Acquire);
        if global != self.current.get() {
            self.announce(global);
        }
    }

    #[cold]
    fn announce(&self, global: u64) {
        self.current.set(global);
        let oldest = self.oldest().unwrap_or(global);
        self.published.0.store(oldest, Ordering::SeqCst);
        fence(Ordering::SeqCst); // (A)
    }

    /// Goes offline before sleeping; requests that still run keep their epoch published.
    pub(super) fn park(&self) {
        let oldest = self.oldest().unwrap_or(OFFLINE);
        self.published.0.store(oldest, Ordering::SeqCst);
        self.current.set(OFFLINE);
    }

    /// The oldest epoch with running requests.
    fn oldest(&self) -> Option<u64> {
        let mut pinned = self.pinned.borrow_mut();
        while pinned.front().is_some_and(|p| p.1 == 0) {
            pinned.pop_front();
        }
        pinned.front().map(|p| p.0)
    }

    #[inline]
    pub(super) fn pin(self: &Rc<Self>) -> Pin {
        if self.current.get() == OFFLINE {
            self.quiesce();
        }
        let epoch = self.current.get();
        let mut pinned = self.pinned.borrow_mut();
        match pinned.back_mut() {
            Some(last) if last.0 == epoch => last.1 += 1,
            _ => pinned.push_back((epoch, 1)),
        }
        Pin {
            owner: self.clone(),
            epoch,
        }
    }

    #[inline]
    fn unpin(&self, epoch: u64) {
        if epoch == self.current.get() {
            if let Some(last) = self.pinned.borrow_mut().back_mut().filter(|p| p.0 == epoch) {
                // Nothing is let go by that: new requests begin in this epoch, too. An entry of no requests stays
                // until the epoch ends.
                last.1 -= 1;
                return;
            }
        }
        self.unpin_older(epoch);
    }

    fn unpin_older(&self, epoch: u64) {
        let mut pinned = self.pinned.borrow_mut();
        if let Some(entry) = pinned.iter_mut().find(|p| p.0 == epoch) {
            entry.1 -= 1;
        }
        let before = pinned.front().map(|p| p.0);
        while pinned.front().is_some_and(|p| p.1 == 0) {
            pinned.pop_front();
        }
        let after = pinned.front().map_or(self.current.get(), |p| p.0);
        if before.is_some_and(|b| b < after) && self.published.0.load(Ordering::Relaxed) < after {
            self.published.0.store(after, Ordering::SeqCst);
        }
    }
}

impl Drop for Pin {
    #[inline]
    fn drop(&mut self) {
        self.owner.unpin(self.epoch);
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.domain
            .lock()
            .retain(|word| !Arc::ptr_eq(word, &self.published));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_holds_back_what_was_retired_while_it_ran() {
        let domain = Epochs::new();
        let a = Participant::new(domain.clone());
        let b = Participant::new(domain.clone());
        a.quiesce();
        b.quiesce();
        let pin = a.pin();
        let retired = domain.retire();
        assert!(!domain.passed(retired), "both may still look");
        a.quiesce();
        b.quiesce();
        assert!(!domain.passed(retired), "the pinned request may still look");
        drop(pin);
        assert!(domain.passed(retired));
    }

    #[test]
    fn a_sleeping_participant_holds_nothing_back_unless_a_request_runs() {
        let domain = Epochs::new();
        let a = Participant::new(domain.clone());
        a.quiesce();
        a.park();
        assert!(domain.passed(domain.retire()));
        let pin = a.pin();
        a.park();
        let retired = domain.retire();
        assert!(!domain.passed(retired));
        drop(pin);
        assert!(domain.passed(retired));
    }

    #[test]
    fn pins_end_in_any_order() {
        let domain = Epochs::new();
        let a = Participant::new(domain.clone());
        a.quiesce();
        let first = a.pin();
        let r1 = domain.retire();
        a.quiesce();
        let second = a.pin();
        let r2 = domain.retire();
        a.quiesce();
        drop(second);
        assert!(!domain.passed(r1) && !domain.passed(r2));
        drop(first);
        assert!(domain.passed(r1) && domain.passed(r2));
    }
}
