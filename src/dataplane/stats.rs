//! Counters of a ring. Its worker is the only writer, so a count costs a load and a store.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What a ring has done since it started.
#[derive(Debug, Default)]
pub struct RingStats {
    /// Requests fetched.
    pub requests: Counter,
    /// Notifications from the driver: one for each time it woke us. While a worker polls the driver is
    /// told not to send them, so a busy ring shows few.
    pub kicks: Counter,
    /// Interrupts sent to the driver.
    pub interrupts: Counter,
    /// Requests that ended with a status other than OK.
    pub errors: Counter,
    /// Times the worker went to sleep while it owned this ring.
    pub sleeps: Counter,
    /// Requests under way.
    pub in_flight: AtomicU32,
}

/// A number with one writer and any readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one; only by the writer.
    #[inline]
    pub(super) fn count(&self) {
        self.add(1);
    }

    /// Adds; only by the writer.
    #[inline]
    pub(super) fn add(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl std::fmt::Display for RingStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} requests, {} errors, {} kicks, {} interrupts, {} sleeps",
            self.requests.get(),
            self.errors.get(),
            self.kicks.get(),
            self.interrupts.get(),
            self.sleeps.get()
        )
    }
}
