//! Two threads, a driver and a device, which both go to sleep when they see nothing to do.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;

/// Only for a failing run: a lost notification would wait for ever.
const GIVE_UP: Duration = Duration::from_secs(20);
const CHAINS: u32 = 60_000;

fn field(driver: &Driver, addr: u64) -> &'static AtomicU16 {
    let ptr = driver.mem.host_ptr(addr, 2).unwrap().cast::<AtomicU16>();
    // SAFETY: two aligned bytes of a mapping that outlives the test's threads.
    unsafe { &*ptr }
}

/// The driver's side: keeps up to `depth` chains in flight, sleeps until an interrupt when full.
fn drive(driver: &Driver, depth: u16, kick: &Sender<()>, interrupt: &Receiver<()>) {
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
    let (mut sent, mut seen) = (cfg.next_avail, cfg.next_avail);
    let (mut total, mut done) = (0, 0);
    while done < CHAINS {
        while total < CHAINS && sent.wrapping_sub(seen) < depth {
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
                kick.send(()).unwrap();
            }
        }
        // Asks for an interrupt, looks once more, then sleeps.
        match used_event {
            Some(event) => event.store(seen, Ordering::Relaxed),
            None => avail_flags.store(0, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
        if used_idx.load(Ordering::Acquire) == seen {
            interrupt
                .recv_timeout(GIVE_UP)
                .expect("an interrupt was lost");
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
fn serve(ring: &mut SplitRing, kick: &Receiver<()>, interrupt: &Sender<()>) {
    let mut served = 0;
    while served < CHAINS {
        ring.disable_notification();
        while let Some(head) = ring.pop().unwrap() {
            ring.push_used(head, 1);
            served += 1;
            if served % 3 == 0 && ring.publish() {
                interrupt.send(()).unwrap();
            }
        }
        if ring.publish() {
            interrupt.send(()).unwrap();
        }
        if served < CHAINS && !ring.enable_notification() {
            kick.recv_timeout(GIVE_UP).expect("a kick was lost");
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
        let (kick, kicked) = channel();
        let (interrupt, interrupted) = channel();
        std::thread::scope(|scope| {
            let ring = &mut ring;
            scope.spawn(move || serve(ring, &kicked, &interrupt));
            drive(&driver, depth, &kick, &interrupted);
        });
        let end = 65000u16.wrapping_add(CHAINS as u16);
        assert_eq!((ring.next_avail(), driver.used_idx()), (end, end));
    }
}
