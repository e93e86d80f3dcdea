//! How long an idle worker spins before it sleeps.
//!
//! Spinning is worth it if the next event comes sooner than a sleep and a wake would cost; it is waste
//! if it comes much later. The window is learned from the gaps between events: after a gap that spinning
//! up to the limit would have covered, the window grows towards twice the mean gap; after a longer one it
//! is halved, down to nothing. So a disk under load is polled, and an idle one costs no CPU.
//!
//! A sleep hides how long the gap would have been: its end is the wake's, which may take longer in a VM than the
//! limit is. So a few long gaps are needed until nothing is spun any more: four in a row, or too many for the short
//! ones among them, sooner if the window is long. Then two short ones in a row are needed to begin again, and every eighth
//! of those that may have been short is spun for up to the limit, to see, and ever fewer as long as they were not.
//!
//! What is waited for is learned apart. A driver that finds us asleep pays for the wake with a
//! notification, which is dear in a guest, so it is spun for up to the user's limit while nothing else is
//! under way, and for a little after it was shown a completion, which it likes to answer with the next
//! request. Storage wakes us from the kernel for a few microseconds, and may need this very CPU meanwhile
//! (an io_uring worker thread, a softirq), so it is spun for only as long as that wake would take.
//!
//! Unless there are a few requests at most, and the driver is one that comes with the next at once: then storage and
//! we are all that it waits for, and the wake is a large part of that. So twice the user's limit is spun for it, but
//! not where threads of the kernel do the work, as in its page cache: with one on our CPU buffered writes were 0.6 of
//! what they are without.
//!
//! A load that comes in bursts is another matter: there is CPU to spare in its pauses, and what each burst is
//! about is to be over soon. So a pause of the driver's gives a quarter of its length to spin for storage after
//! it, up to 3 ms, as long as storage is quicker than that, and if there was a burst before it, of several waits in a
//! time shorter than the pause: a slow guest, too, needs a millisecond now and then for its next request. A steady
//! load has no pauses and gets nothing.

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

/// What an idle worker waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// The next request: nothing is under way.
    Driver,
    /// The driver's answer to completions that it has just been shown, while others are under way.
    Answer,
    /// The end of an operation, or the next request.
    Storage,
    /// The same, with as many requests under way as [`FEW`] at most, each of which somebody may be waiting for.
    Few,
}

/// The smallest window worth having; below it a window is nothing.
const MIN_WINDOW: Duration = Duration::from_micros(4);
/// How long a driver may take to answer for that to be waited for.
const ANSWER_MAX: Duration = Duration::from_micros(10);
/// What a sleep in the kernel and a wake by a completion cost, about.
const STORAGE_MAX: Duration = Duration::from_micros(5);
/// So many requests are few.
const FEW: u32 = 4;
/// So many times the user's limit is spun for storage while there are few.
const FEW_FACTOR: u32 = 2;

/// So many gaps in a row have to be longer than the limit until nothing is spun for any more.
const PATIENCE: u32 = 4;
/// What a gap that spinning covered is worth, in gaps that were spun for in vain with a window of up to [`UNIT`].
const HIT: u32 = 2;
/// With a longer window it is so many times as dear.
const UNIT: Duration = Duration::from_micros(16);
/// The most that is saved up.
const MOST_WORTH: u32 = 16;
/// Of gaps that may have been short, and were slept through, each so-manieth is spun for, ...
const TRIAL: u32 = 8;
/// ... and half as many after each time that this was in vain, down to this.
const RAREST_TRIAL: u32 = 512;
/// The longest that a wake takes of which a short gap is thought.
const WAKE_MAX: Duration = Duration::from_micros(150);
/// A driver that was silent for this long, while we slept, made a pause.
const PAUSE: Duration = Duration::from_millis(1);
/// So many waits for storage between two pauses make a burst: few, since each may be for several requests that end
/// together, but not a single one.
const BURST: u32 = 4;
/// The part of a pause that may be spun after it.
const BURST_SHARE: u32 = 4;
/// The most that a pause gives.
const BURST_MAX: Duration = Duration::from_millis(3);

/// Learns the windows of one worker.
#[derive(Debug)]
pub(super) struct Poller {
    mode: PollMode,
    driver: Window,
    answer: Window,
    storage: Window,
    few: Window,
    burst: Burst,
    idle_since: Option<(Instant, Waiting)>,
    /// When that was still so. What ends it may be long work, which is no part of the gap.
    idle_until: Instant,
    /// Whether we have slept since.
    slept: bool,
}

/// What may be spun for storage after a pause.
#[derive(Debug, Default)]
struct Burst {
    left: Duration,
    /// Mean time that storage was waited for of late.
    storage: Duration,
    /// How often it was, since the last pause, ...
    waits: u32,
    /// ... which ended then.
    began: Option<Instant>,
}

/// The window of one kind of waiting.
#[derive(Debug)]
struct Window {
    max: Duration,
    length: Duration,
    /// Mean gap between events of late, of those that the limit covers.
    mean_gap: Duration,
    /// Gaps in a row that were longer than the limit.
    misses: u32,
    /// Whether anything is spun.
    open: bool,
    /// Whether it pays: what short gaps were worth, less those that were spun for in vain.
    worth: u32,
    /// After so many misses one is spun for, to see.
    trial: u32,
}

impl Poller {
    pub(super) fn new(config: PollConfig) -> Self {
        Self {
            mode: config.mode,
            driver: Window::new(config.max),
            answer: Window::new(config.max.min(ANSWER_MAX)),
            storage: Window::new(config.max.min(STORAGE_MAX)),
            few: Window::new(config.max * FEW_FACTOR),
            burst: Burst::default(),
            idle_since: None,
            idle_until: Instant::now(),
            slept: false,
        }
    }

    fn window(&mut self, waiting: Waiting) -> &mut Window {
        match waiting {
            Waiting::Driver => &mut self.driver,
            Waiting::Answer => &mut self.answer,
            Waiting::Storage => &mut self.storage,
            Waiting::Few => &mut self.few,
        }
    }

    /// What is waited for, with so many requests under way, which threads of the kernel may have, and a driver that has
    /// just been shown completions or not.
    pub(super) fn waiting(&self, requests: u32, threads: bool, shown: bool) -> Waiting {
        match requests {
            0 => Waiting::Driver,
            1..=FEW if self.driver.open && !threads => Waiting::Few,
            _ if shown => Waiting::Answer,
            _ => Waiting::Storage,
        }
    }

    /// The turn did something.
    #[inline]
    pub(super) fn busy(&mut self) {
        if let Some((since, waiting)) = self.idle_since.take() {
            let gap = self.idle_until.saturating_duration_since(since);
            self.window(waiting).learn(gap);
            let slept = std::mem::take(&mut self.slept);
            self.burst.learn(since, gap, waiting, slept);
        }
    }

    /// A sleep has ended.
    pub(super) fn woke(&mut self, now: Instant) {
        self.idle_until = now;
        self.slept = true;
    }

    /// The turn did nothing.
    pub(super) fn idle(&mut self, now: Instant, waiting: Waiting) -> Idle {
        let (since, waiting) = *self.idle_since.get_or_insert((now, waiting));
        self.idle_until = now;
        let spin = match self.mode {
            PollMode::Always => true,
            PollMode::Never => false,
            PollMode::Adaptive => {
                let gap = now.saturating_duration_since(since);
                gap < self.window(waiting).length || self.burst.spins(gap, waiting)
            }
        };
        if spin { Idle::Spin } else { Idle::Sleep }
    }
}

impl Burst {
    fn spins(&self, gap: Duration, waiting: Waiting) -> bool {
        waiting != Waiting::Driver && gap < self.left && self.storage < self.left
    }

    /// Something was waited for, from `since` on.
    fn learn(&mut self, since: Instant, gap: Duration, waiting: Waiting, slept: bool) {
        if waiting != Waiting::Driver {
            self.storage = (self.storage * 7 + gap) / 8;
            self.left = self.left.saturating_sub(gap);
            self.waits = self.waits.saturating_add(1);
        } else if slept && gap >= PAUSE {
            let lasted = self
                .began
                .map(|began| since.saturating_duration_since(began));
            let burst = self.waits >= BURST && lasted.is_some_and(|lasted| lasted < gap);
            self.left = match burst {
                true => (gap / BURST_SHARE).min(BURST_MAX),
                false => Duration::ZERO,
            };
            (self.waits, self.began) = (0, Some(since + gap));
        }
    }
}

impl Window {
    fn new(max: Duration) -> Self {
        Self {
            max,
            length: Duration::ZERO,
            mean_gap: Duration::ZERO,
            misses: 0,
            open: false,
            worth: 0,
            trial: TRIAL,
        }
    }

    fn learn(&mut self, gap: Duration) {
        if gap > self.max {
            self.misses = self.misses.wrapping_add(1);
            let cost = 1 + self.length.as_micros() / UNIT.as_micros();
            self.worth = self.worth.saturating_sub(cost as u32);
            self.open &= self.worth > 0 && self.misses < PATIENCE;
            self.length = if self.open {
                (self.length / 2).max(self.length.min(MIN_WINDOW))
            } else if self.misses % self.trial == 0 && gap < self.max + WAKE_MAX {
                self.trial = (self.trial * 2).min(RAREST_TRIAL);
                self.max
            } else {
                Duration::ZERO
            };
            return;
        }
        // A trial, or the second in a row.
        let begins = !self.length.is_zero() || self.misses == 0;
        self.misses = 0;
        self.trial = TRIAL;
        self.worth = (self.worth + HIT).min(MOST_WORTH);
        self.open |= begins;
        self.mean_gap = if self.mean_gap.is_zero() {
            gap
        } else {
            (self.mean_gap * 7 + gap) / 8
        };
        let want = (self.mean_gap * 2).max(MIN_WINDOW).min(self.max);
        // Up at once, since a missed spin costs a sleep and a wake; down slowly.
        self.length = if !self.open {
            Duration::ZERO
        } else if want > self.length || gap > self.length {
            want.max(gap).min(self.max)
        } else {
            (self.length * 7 + want) / 8
        };
    }
}

#[cfg(test)]
mod tests;
