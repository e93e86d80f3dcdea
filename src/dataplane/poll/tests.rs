//! What is spun for, on a clock of the tests' own.

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
    wait(poller, clock, Waiting::Driver, gap)
}

/// The same, with what is waited for.
fn wait(poller: &mut Poller, clock: &mut Instant, waiting: Waiting, gap: Duration) -> Idle {
    poller.idle(*clock, waiting);
    let just_before = *clock + gap.saturating_sub(Duration::from_nanos(1));
    let last = poller.idle(just_before, waiting);
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
    wait(poller, clock, Waiting::Storage, gap)
}

/// A driver that comes with its next request after `think`, and storage that takes `seek`, of which it waits. Returns
/// what the worker did for most of that.
fn alone(poller: &mut Poller, clock: &mut Instant, think: Duration, seek: Duration) -> Idle {
    gap(poller, clock, think);
    let waiting = poller.waiting(FEW, false, true);
    wait(poller, clock, waiting, seek)
}

#[test]
fn storage_is_spun_for_while_a_quick_driver_waits_for_it_alone() {
    let mut poller = poller(PollMode::Adaptive);
    let mut clock = Instant::now();
    let quick = Duration::from_micros(2);
    let mut spun = |think, seek| {
        let idles = (0..100).map(|_| alone(&mut poller, &mut clock, think, seek));
        idles.filter(|idle| *idle == Idle::Spin).count()
    };
    let all_but_the_first = 99;
    assert_eq!(
        spun(quick, MAX * 3 / 2),
        all_but_the_first,
        "longer than the driver is"
    );
    // A few are spun for in vain; from then on a trial now and then.
    let slow = spun(quick, MAX * FEW_FACTOR + WAKE_MAX);
    assert!(slow <= PATIENCE as usize, "{slow}");
    assert!(spun(quick, MAX / 2) > 90, "found again");
    assert!(spun(MAX * 5, MAX / 2) <= PATIENCE as usize);
    assert_eq!(spun(MAX * 5, MAX / 2), 0, "a slow driver waits for itself");
    assert!(spun(quick, MAX / 2) > 90);
    assert_eq!(poller.waiting(FEW, false, false), Waiting::Few);
    assert_eq!(poller.waiting(FEW, true, false), Waiting::Storage);
    assert_eq!(poller.waiting(FEW + 1, false, true), Waiting::Answer);
    assert_eq!(poller.waiting(FEW + 1, false, false), Waiting::Storage);
    assert_eq!(poller.waiting(0, false, true), Waiting::Driver);
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
fn requests_that_end_several_at_a_time_are_a_burst_too() {
    let mut poller = poller(PollMode::Adaptive);
    let mut clock = Instant::now();
    for round in 0..5 {
        gap(&mut poller, &mut clock, Duration::from_millis(9));
        for _ in 0..6 {
            let waited = storage(&mut poller, &mut clock, Duration::from_micros(160));
            assert_eq!(waited == Idle::Spin, round > 0, "{round}");
        }
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
