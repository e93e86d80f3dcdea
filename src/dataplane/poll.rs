//! How long an idle worker spins before it sleeps.
//!
//! Spinning is worth it if the next event comes sooner than a sleep and a wake would cost; it is waste
//! if it comes much later. The window is learned from the gaps between events (requests fetched,
//! operations completed): after a gap that spinning up to the limit would have covered, the window
//! grows towards twice the mean gap; after a longer one it is halved, down to nothing. So a disk under
//! load is polled, and an idle one costs no CPU.

use std::time::{Duration, Instant};

/// When a worker polls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollMode {
    /// Spin for a window learned from the load, then sleep.
    Adaptive,
    /// Never sleep while a ring runs.
    Always,
    /// Sleep as soon as there is nothing to do.
    Never,
}

/// How an idle worker waits.
#[derive(Clone, Copy, Debug)]
pub struct PollConfig {
    /// When it polls.
    pub mode: PollMode,
    /// The longest it spins in [`PollMode::Adaptive`].
    pub max: Duration,
}

/// What an idle worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    Spin,
    Sleep,
}

/// The smallest window worth having; below it a window is nothing.
const MIN_WINDOW: Duration = Duration::from_micros(4);

/// Learns the window of one worker.
#[derive(Debug)]
pub(super) struct Poller {
    config: PollConfig,
    window: Duration,
    /// Mean gap between events of late, of those that the limit covers.
    mean_gap: Duration,
    idle_since: Option<Instant>,
}

impl Poller {
    pub(super) fn new(config: PollConfig) -> Self {
        Self {
            config,
            window: Duration::ZERO,
            mean_gap: Duration::ZERO,
            idle_since: None,
        }
    }

    /// The turn did something. `now` is asked for only at the end of an idle time.
    #[inline]
    pub(super) fn busy(&mut self, now: impl FnOnce() -> Instant) {
        if let Some(since) = self.idle_since.take() {
            self.learn(now().saturating_duration_since(since));
        }
    }

    /// The turn did nothing.
    pub(super) fn idle(&mut self, now: Instant) -> Idle {
        let since = *self.idle_since.get_or_insert(now);
        match self.config.mode {
            PollMode::Always => Idle::Spin,
            PollMode::Never => Idle::Sleep,
            PollMode::Adaptive if now.saturating_duration_since(since) < self.window => Idle::Spin,
            PollMode::Adaptive => Idle::Sleep,
        }
    }

    fn learn(&mut self, gap: Duration) {
        if gap > self.config.max {
            self.window /= 2;
            if self.window < MIN_WINDOW {
                self.window = Duration::ZERO;
            }
            return;
        }
        self.mean_gap = if self.mean_gap.is_zero() {
            gap
        } else {
            (self.mean_gap * 7 + gap) / 8
        };
        let want = (self.mean_gap * 2).clamp(MIN_WINDOW, self.config.max);
        // Up at once, since a missed spin costs a sleep and a wake; down slowly.
        self.window = if want > self.window || gap > self.window {
            want.max(gap).min(self.config.max)
        } else {
            (self.window * 7 + want) / 8
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(100);

    fn poller(mode: PollMode) -> Poller {
        Poller::new(PollConfig { mode, max: MAX })
    }

    /// An idle time of `gap`, then an event. Returns what the worker did for most of it.
    fn gap(poller: &mut Poller, clock: &mut Instant, gap: Duration) -> Idle {
        poller.idle(*clock);
        let last = poller.idle(*clock + gap.saturating_sub(Duration::from_nanos(1)));
        *clock += gap;
        poller.busy(|| *clock);
        last
    }

    #[test]
    fn a_steady_load_is_polled_and_a_slow_one_is_slept_through() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        let quick = Duration::from_micros(20);
        assert_eq!(gap(&mut poller, &mut clock, quick), Idle::Sleep);
        for _ in 0..10 {
            assert_eq!(gap(&mut poller, &mut clock, quick), Idle::Spin);
        }
        for _ in 0..10 {
            assert_eq!(
                gap(&mut poller, &mut clock, Duration::from_millis(5)),
                Idle::Sleep
            );
        }
        assert_eq!(
            poller.window,
            Duration::ZERO,
            "rare events are not spun for"
        );
    }

    #[test]
    fn the_window_never_passes_the_limit() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        for _ in 0..100 {
            gap(&mut poller, &mut clock, MAX);
            assert!(poller.window <= MAX);
        }
    }

    #[test]
    fn always_and_never_do_what_they_say() {
        let mut clock = Instant::now();
        let mut always = poller(PollMode::Always);
        let mut never = poller(PollMode::Never);
        for micros in [1, 50, 5000] {
            let length = Duration::from_micros(micros);
            assert_eq!(gap(&mut always, &mut clock, length), Idle::Spin);
            assert_eq!(gap(&mut never, &mut clock, length), Idle::Sleep);
        }
    }
}
