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
//! A load that comes in bursts is another matter: there is CPU to spare in its pauses, and what each burst is
//! about is to be over soon. So a pause of the driver's gives a quarter of its length to spin for storage after
//! it, up to 3 ms, as long as storage is quicker than that, and if there was a burst before it, of many requests in a
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
}

/// The smallest window worth having; below it a window is nothing.
const MIN_WINDOW: Duration = Duration::from_micros(4);
/// How long a driver may take to answer for that to be waited for.
const ANSWER_MAX: Duration = Duration::from_micros(10);
/// What a sleep in the kernel and a wake by a completion cost, about.
const STORAGE_MAX: Duration = Duration::from_micros(5);

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
/// So many waits for storage between two pauses make a burst.
const BURST: u32 = 16;
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
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(100);

    fn poller(mode: PollMode) -> Poller {
        Poller::new(PollConfig { mode, max: MAX })
    }

    /// The event after an idle time of which the worker did `last` at the end.
    fn end(poller: &mut Poller, now: Instant, last: Idle) -> Idle {
        if last == Idle::Sleep {
            poller.woke(now);
        }
        poller.busy();
        last
    }

    /// An idle time of `gap`, then an event. Returns what the worker did for most of it.
    fn gap(poller: &mut Poller, clock: &mut Instant, gap: Duration) -> Idle {
        poller.idle(*clock, Waiting::Driver);
        let just_before = *clock + gap.saturating_sub(Duration::from_nanos(1));
        let last = poller.idle(just_before, Waiting::Driver);
        *clock += gap;
        end(poller, *clock, last)
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
            poller.driver.length,
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
            assert!(poller.driver.length <= MAX);
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

    #[test]
    fn storage_is_spun_for_only_as_long_as_a_wake_takes() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        for _ in 0..10 {
            // The storage takes 20 us, and the driver comes back after 2.
            poller.idle(clock, Waiting::Storage);
            clock += Duration::from_micros(20);
            let last = poller.idle(clock, Waiting::Storage);
            assert_eq!(end(&mut poller, clock, last), Idle::Sleep);
            gap(&mut poller, &mut clock, Duration::from_micros(2));
        }
        assert_eq!(
            gap(&mut poller, &mut clock, Duration::from_micros(2)),
            Idle::Spin
        );
    }

    /// Storage that takes `gap` is waited for. Returns what the worker did for most of it.
    fn storage(poller: &mut Poller, clock: &mut Instant, gap: Duration) -> Idle {
        poller.idle(*clock, Waiting::Storage);
        let just_before = *clock + gap.saturating_sub(Duration::from_nanos(1));
        let last = poller.idle(just_before, Waiting::Storage);
        *clock += gap;
        end(poller, *clock, last)
    }

    #[test]
    fn a_burst_after_a_pause_is_spun_through_until_a_quarter_of_the_pause_is_spent() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        let request = Duration::from_micros(100);
        for round in 0..5 {
            gap(&mut poller, &mut clock, Duration::from_millis(8));
            let waits = (0..40).map(|_| storage(&mut poller, &mut clock, request));
            let waits: Vec<_> = waits.collect();
            let spun = waits.iter().take_while(|idle| **idle == Idle::Spin);
            // The first pause follows no burst.
            assert_eq!(spun.count(), if round == 0 { 0 } else { 20 }, "2 ms");
        }
    }

    #[test]
    fn pauses_of_a_slow_guest_give_nothing_to_spin_for_storage() {
        let (request, think) = (Duration::from_micros(80), Duration::from_micros(600));
        // A long one now and then; each one is long.
        for every in [30, 1] {
            let mut poller = poller(PollMode::Adaptive);
            let mut clock = Instant::now();
            for n in 0..300 {
                let pause = if n % every == 0 { PAUSE * 3 / 2 } else { think };
                gap(&mut poller, &mut clock, pause);
                let waited = storage(&mut poller, &mut clock, request);
                assert_eq!(waited, Idle::Sleep, "{every} {n}");
            }
        }
    }

    /// A burst after a pause.
    fn burst(poller: &mut Poller, clock: &mut Instant) {
        gap(poller, clock, PAUSE);
        for _ in 0..BURST {
            storage(poller, clock, Duration::from_micros(10));
        }
    }

    #[test]
    fn a_long_pause_gives_no_more_than_the_limit() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        burst(&mut poller, &mut clock);
        gap(&mut poller, &mut clock, Duration::from_secs(60));
        let left = poller.burst.left;
        assert_eq!(left, BURST_MAX);
        assert_eq!(
            storage(&mut poller, &mut clock, BURST_MAX * 2),
            Idle::Sleep,
            "one wait cannot take more either"
        );
        assert_eq!(poller.burst.left, Duration::ZERO);
    }

    #[test]
    fn storage_that_is_slower_than_a_pause_gives_is_not_spun_for() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        let (pause, seek) = (Duration::from_millis(4), Duration::from_millis(10));
        for _ in 0..10 {
            gap(&mut poller, &mut clock, pause);
            storage(&mut poller, &mut clock, seek);
        }
        // As if all that had been in no time.
        (poller.burst.waits, poller.burst.began) = (BURST, Some(clock));
        gap(&mut poller, &mut clock, pause);
        assert_eq!(poller.burst.left, pause / BURST_SHARE);
        poller.idle(clock, Waiting::Storage);
        let soon = clock + Duration::from_micros(10);
        assert_eq!(poller.idle(soon, Waiting::Storage), Idle::Sleep);
    }

    #[test]
    fn a_steady_load_gives_nothing_to_spin_for_storage() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        for _ in 0..1000 {
            gap(&mut poller, &mut clock, Duration::from_micros(500));
            storage(&mut poller, &mut clock, Duration::from_micros(100));
        }
        assert_eq!(poller.burst.left, Duration::ZERO);
    }

    /// A driver that answers after `gap`, and a wake that takes `wake`. Returns whether the worker slept.
    fn answer(poller: &mut Poller, clock: &mut Instant, gap: Duration, wake: Duration) -> bool {
        poller.idle(*clock, Waiting::Driver);
        let last = poller.idle(*clock + gap, Waiting::Driver);
        let sleeps = last == Idle::Sleep;
        *clock += if sleeps { gap + wake } else { gap };
        end(poller, *clock, last);
        sleeps
    }

    #[test]
    fn a_wake_that_takes_longer_than_the_limit_does_not_hide_a_quick_driver() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        let (quick, wake) = (Duration::from_micros(2), MAX + Duration::from_micros(20));
        let mut rounds = |count, gap| {
            (0..count)
                .filter(|_| answer(&mut poller, &mut clock, gap, wake))
                .count()
        };
        assert_eq!(rounds(10, quick), 8, "found by the first trial");
        assert_eq!(rounds(100, quick), 0);
        // One that is late now and then costs one sleep each time.
        for _ in 0..10 {
            assert_eq!(rounds(1, MAX), 1);
            assert_eq!(rounds(10, quick), 0);
        }
    }

    /// How many of `gaps` are spun for at least a while, of a driver that answers late three times of four.
    fn spun(poller: &mut Poller, clock: &mut Instant, gaps: u32, late: Duration) -> usize {
        let idles = (0..gaps).map(|n| {
            let quick = n % 4 == 0;
            gap(poller, clock, if quick { MAX / 4 } else { late });
            !poller.driver.length.is_zero()
        });
        idles.filter(|spins| *spins).count()
    }

    #[test]
    fn a_driver_that_is_quick_now_and_then_is_not_spun_for() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        spun(&mut poller, &mut clock, 40, Duration::from_millis(1));
        assert_eq!(
            spun(&mut poller, &mut clock, 400, Duration::from_millis(1)),
            0
        );
        // One that has become quick is.
        for n in 0..10 {
            let idle = gap(&mut poller, &mut clock, MAX / 4);
            assert_eq!(idle == Idle::Spin, n > 1, "{n}");
        }
    }

    #[test]
    fn trials_in_vain_become_rare() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        let trials = (0..4096).filter(|_| {
            gap(&mut poller, &mut clock, MAX + WAKE_MAX / 2);
            poller.driver.length == MAX
        });
        // After 8, 16, ... 512, and then each 512.
        assert!((8..20).contains(&trials.count()));
        assert_eq!(poller.driver.trial, RAREST_TRIAL);
        // A quick driver is still found.
        let found = (0..RAREST_TRIAL + 2)
            .any(|_| !answer(&mut poller, &mut clock, Duration::from_micros(2), MAX));
        assert!(found);
    }

    #[test]
    fn gaps_that_no_wake_explains_are_not_tried() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        for _ in 0..100 {
            gap(&mut poller, &mut clock, MAX + WAKE_MAX);
            assert_eq!(poller.driver.length, Duration::ZERO);
        }
    }

    #[test]
    fn the_work_that_ends_an_idle_time_is_no_part_of_it() {
        let mut poller = poller(PollMode::Adaptive);
        let mut clock = Instant::now();
        for round in 0..10 {
            let quick = Duration::from_micros(2);
            poller.idle(clock, Waiting::Driver);
            let last = poller.idle(clock + quick, Waiting::Driver);
            assert_eq!(last == Idle::Spin, round > 0);
            if last == Idle::Sleep {
                poller.woke(clock + quick);
            }
            // What came takes longer than the limit.
            clock += quick + MAX * 2;
            poller.busy();
        }
    }
}
