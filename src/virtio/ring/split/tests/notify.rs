//! Two threads, a driver and a device, which both wait to be told when they see nothing to do.
//!
//! In a release build it fails within a second when either of the ring's full fences is taken out; a
//! debug build is too slow around them to be caught.

use super::*;
use crate::virtio::testing::{Bell, Rng, dawdle};

/// A debug build only shows that nothing else is wrong.
const CHAINS: u32 = if cfg!(debug_assertions) {
    5_000
} else {
    50_000
};

fn field(driver: &Driver, addr: u64) -> &'static AtomicU16 {
    let ptr = driver.mem.host_ptr(addr, 2).unwrap().cast::<AtomicU16>();
    // SAFETY: two aligned bytes of a mapping that outlives the test's threads.
    unsafe { &*ptr }
}

/// The driver's side: keeps up to `depth` chains in flight, sleeps until an interrupt when full.
fn drive(driver: &Driver, depth: u16, kick: &Bell, interrupt: &Bell) {
    let cfg = driver.cfg;
    let size = u64::from(cfg.size);
    let avail_flags = field(driver, cfg.avail_ring);
    let avail_idx = field(driver, cfg.avail_ring + 2);
    let used_flags = field(driver, cfg.used_ring);
    let used_idx = field(driver, cfg.used_ring + 2);
    let used_event = cfg
        .event_idx
        .then(|| field(driver, cfg.avail_ring + 4 + 2 * size));
    let avail_event = cfg
        .event_idx
        .then(|| field(driver, cfg.used_ring + 4 + 8 * size));
    let (mut sent, mut seen) = (cfg.base as u16, cfg.base as u16);
    let (mut total, mut done, mut heard) = (0, 0, 0);
    let mut rng = Rng::new(1);
    while done < CHAINS {
        while total < CHAINS && sent.wrapping_sub(seen) < depth {
            dawdle(&mut rng);
            field(driver, cfg.avail_ring + 4 + 2 * (u64::from(sent) % size))
                .store(sent % cfg.size, Ordering::Relaxed);
            let old = sent;
            sent = sent.wrapping_add(1);
            total += 1;
            avail_idx.store(sent, Ordering::Release);
            fence(Ordering::SeqCst);
            let wanted = match avail_event {
                Some(event) => need_event(event.load(Ordering::Relaxed), sent, old),
                None => used_flags.load(Ordering::Relaxed) == 0,
            };
            if wanted {
                kick.ring();
            }
        }
        dawdle(&mut rng);
        // Asks for an interrupt, looks once more, then sleeps.
        match used_event {
            Some(event) => event.store(seen, Ordering::Relaxed),
            None => avail_flags.store(0, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
        if used_idx.load(Ordering::Acquire) == seen {
            interrupt.wait(&mut heard, "an interrupt");
        }
        if used_event.is_none() {
            avail_flags.store(1, Ordering::Relaxed);
        }
        let now = used_idx.load(Ordering::Acquire);
        done += u32::from(now.wrapping_sub(seen));
        seen = now;
    }
}

/// The device's side: serves what there is, sleeps until a kick when there is nothing.
fn serve(ring: &mut SplitRing, kick: &Bell, interrupt: &Bell) {
    let (mut served, mut heard) = (0, 0);
    let mut rng = Rng::new(2);
    while served < CHAINS {
        ring.disable_notification();
        while let Some(head) = ring.pop().unwrap() {
            ring.push_used(head, 1);
            served += 1;
            // Some the driver may find before it is asked whether it waits for them.
            if rng.once_in(2) {
                ring.show();
            }
            if served % 3 == 0 && ring.publish() {
                interrupt.ring();
            }
        }
        dawdle(&mut rng);
        if ring.publish() {
            interrupt.ring();
        }
        dawdle(&mut rng);
        if served < CHAINS && !ring.enable_notification() {
            kick.wait(&mut heard, "a kick");
        }
    }
}

#[test]
fn no_notification_is_lost_between_a_driver_and_a_device() {
    for (event_idx, depth) in [(false, 1), (true, 1), (false, 8), (true, 8)] {
        let mem = memory(&[(0, 0x10_000)]);
        let mut driver = Driver::new(&mem, 0x1000, 8, 65000);
        driver.cfg.event_idx = event_idx;
        let mut ring = ring(&driver);
        let (kick, interrupt) = (Bell::default(), Bell::default());
        std::thread::scope(|scope| {
            let (ring, kick, interrupt) = (&mut ring, &kick, &interrupt);
            scope.spawn(move || serve(ring, kick, interrupt));
            drive(&driver, depth, kick, interrupt);
        });
        let end = 65000u16.wrapping_add(CHAINS as u16);
        assert_eq!((ring.next_avail(), driver.used_idx()), (end, end));
    }
}
