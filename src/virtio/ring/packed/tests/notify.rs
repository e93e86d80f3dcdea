//! Two threads, a driver and a device, which both wait to be told when they see nothing to do.
//!
//! As for split rings, it takes a release build to be caught by a fence that is missing.

use super::*;
use crate::virtio::testing::{Bell, Rng, dawdle};

/// A debug build only shows that nothing else is wrong.
const CHAINS: u32 = if cfg!(debug_assertions) {
    5_000
} else {
    50_000
};

fn field(driver: &PackedDriver, addr: u64) -> &'static AtomicU16 {
    let ptr = driver.mem.host_ptr(addr, 2).unwrap().cast::<AtomicU16>();
    // SAFETY: two aligned bytes of a mapping that outlives the test's threads.
    unsafe { &*ptr }
}

/// The driver's side: keeps up to `depth` chains in flight, sleeps until an interrupt when full.
fn drive(driver: &PackedDriver, depth: u32, kick: &Bell, interrupt: &Bell) {
    let cfg = driver.cfg;
    let flags = |at: Position| field(driver, cfg.desc_table + 16 * u64::from(at.index) + 14);
    let used = |at: Position| {
        let flags = flags(at).load(Ordering::Acquire);
        flags & (AVAIL | USED) == at.used()
    };
    let (wish, wish_flags) = (
        field(driver, cfg.avail_ring),
        field(driver, cfg.avail_ring + 2),
    );
    let (event, event_flags) = (
        field(driver, cfg.used_ring),
        field(driver, cfg.used_ring + 2),
    );
    let mut sent_at = Position::from_bits(cfg.base as u16);
    let mut seen_at = sent_at;
    let (mut sent, mut done, mut heard) = (0, 0, 0);
    let mut rng = Rng::new(1);
    while done < CHAINS {
        while sent < CHAINS && sent - done < depth {
            dawdle(&mut rng);
            let at = sent_at;
            sent_at = at.behind(1, cfg.size);
            sent += 1;
            flags(at).store(at.available(), Ordering::Release);
            fence(Ordering::SeqCst);
            let wanted = match event_flags.load(Ordering::Acquire) {
                EVENT_DESC => event.load(Ordering::Relaxed) == at.bits(),
                flags => flags == EVENT_ENABLE,
            };
            if wanted {
                kick.ring();
            }
        }
        dawdle(&mut rng);
        // Asks for an interrupt, looks once more, then sleeps.
        if cfg.event_idx {
            wish.store(seen_at.bits(), Ordering::Relaxed);
            wish_flags.store(EVENT_DESC, Ordering::Release);
        } else {
            wish_flags.store(EVENT_ENABLE, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        if !used(seen_at) {
            interrupt.wait(&mut heard, "an interrupt");
        }
        wish_flags.store(EVENT_DISABLE, Ordering::Relaxed);
        while done < sent && used(seen_at) {
            done += 1;
            seen_at = seen_at.behind(1, cfg.size);
        }
    }
}

/// The device's side: serves what there is, sleeps until a kick when there is nothing.
fn serve(ring: &mut PackedRing, kick: &Bell, interrupt: &Bell) {
    let (mut served, mut heard) = (0, 0);
    let mut rng = Rng::new(2);
    while served < CHAINS {
        ring.disable_notification();
        while let Some(slot) = ring.pop().unwrap() {
            ring.push_used(slot, 1);
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
    for (event_idx, depth) in [(false, 1), (true, 1), (false, 7), (true, 7)] {
        let mem = memory(&[(0, 0x10_000)]);
        let mut driver = PackedDriver::new(&mem, 0x1000, 7, 4, false);
        driver.cfg.event_idx = event_idx;
        let mut ring = ring(&driver);
        let (kick, interrupt) = (Bell::default(), Bell::default());
        std::thread::scope(|scope| {
            let (ring, kick, interrupt) = (&mut ring, &kick, &interrupt);
            scope.spawn(move || serve(ring, kick, interrupt));
            drive(&driver, depth, kick, interrupt);
        });
        assert_eq!(ring.next_used(), ring.base() as u16);
    }
}
