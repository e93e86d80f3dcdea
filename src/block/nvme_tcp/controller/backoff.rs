//! When to try again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// The delay before the second attempt.
const SHORTEST: Duration = Duration::from_millis(20);
/// An association, or a queue of one, that lived this long was a good one: the next attempt comes at once again.
pub(super) const GOOD: Duration = Duration::from_millis(500);

/// The delays between attempts: none, 20 ms, doubled each time, up to a longest one.
#[derive(Debug)]
pub(crate) struct Backoff {
    longest: Duration,
    next: Duration,
    seed: u64,
}

impl Backoff {
    pub(crate) fn new(longest: Duration) -> Self {
        Self {
            longest,
            next: Duration::ZERO,
            // A RandomState of its own for each path: hosts that lost the same target do not come back in step.
            seed: RandomState::new().build_hasher().finish() | 1,
        }
    }

    /// How long to wait now.
    pub(crate) fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).max(SHORTEST).min(self.longest);
        // xorshift64; up to a quarter less.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        delay - delay.mul_f64((self.seed % 256) as f64 / 1024.0)
    }

    /// An association has ended that was up for so long.
    pub(crate) fn lived(&mut self, time: Duration) {
        if time >= GOOD {
            self.next = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_attempt_comes_at_once_and_later_ones_within_the_longest_delay() {
        let longest = Duration::from_secs(2);
        let mut backoff = Backoff::new(longest);
        assert_eq!(backoff.delay(), Duration::ZERO);
        let mut nominal = SHORTEST;
        for _ in 0..20 {
            let delay = backoff.delay();
            assert!(
                delay <= nominal && delay >= nominal.mul_f64(0.75),
                "{delay:?} of {nominal:?}"
            );
            nominal = (nominal * 2).min(longest);
        }
        // One that came up and broke at once does not start it anew; one that lived does.
        backoff.lived(Duration::from_millis(1));
        assert!(backoff.delay() > Duration::from_secs(1));
        backoff.lived(Duration::from_secs(1));
        assert_eq!(backoff.delay(), Duration::ZERO);
    }
}
