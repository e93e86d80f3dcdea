use super::*;
use crate::virtio::testing::{PackedDriver, memory};

mod notify;

const RAM: u64 = 0x20_0000;
/// Data of chains, away from the rings at 0.
const DATA: u64 = 0x10_0000;

fn ring(driver: &PackedDriver) -> PackedRing {
    PackedRing::new(driver.mem, &driver.cfg).unwrap()
}

fn lens(iovecs: &[libc::iovec]) -> Vec<usize> {
    iovecs.iter().map(|v| v.iov_len).collect()
}

#[test]
fn every_size_up_to_32768_is_taken() {
    let mem = memory(&[(0, RAM)]);
    for size in [0, 32769, 65535] {
        let cfg = RingConfig {
            size,
            ..PackedDriver::new(&mem, 0, 4, 0, true).cfg
        };
        assert_eq!(
            PackedRing::new(&mem, &cfg).unwrap_err(),
            RingError::PackedSize(size)
        );
    }
    for size in [1, 3, 100, 9999, 32767, 32768] {
        let driver = PackedDriver::new(&mem, 0, size, 0, true);
        assert_eq!(ring(&driver).size(), size);
    }
}

#[test]
fn parts_that_are_unaligned_or_not_in_memory_are_refused() {
    let mem = memory(&[(0, RAM)]);
    let good = PackedDriver::new(&mem, 0, 5, 0, true).cfg;
    for (desc_table, avail_ring, used_ring) in [
        (8, good.avail_ring, good.used_ring),
        (0, good.avail_ring + 2, good.used_ring),
        (0, good.avail_ring, good.used_ring + 2),
    ] {
        let cfg = RingConfig {
            desc_table,
            avail_ring,
            used_ring,
            ..good
        };
        let refused = PackedRing::new(&mem, &cfg);
        assert!(matches!(refused, Err(RingError::Alignment { .. })));
    }
    for (desc_table, avail_ring, used_ring) in [
        (RAM - 64, good.avail_ring, good.used_ring),
        (0, RAM, good.used_ring),
        (0, good.avail_ring, !3),
    ] {
        let cfg = RingConfig {
            desc_table,
            avail_ring,
            used_ring,
            ..good
        };
        let refused = PackedRing::new(&mem, &cfg);
        assert!(matches!(refused, Err(RingError::Unmapped { .. })));
    }
}

#[test]
fn a_base_outside_the_ring_is_refused_and_one_inside_comes_back() {
    let mem = memory(&[(0, RAM)]);
    let good = PackedDriver::new(&mem, 0, 5, 0, true).cfg;
    assert_eq!(good.base, 0x8000_8000);
    for base in [5, 0x8005, 5 << 16, 0xffff_8000, 0x8000_7fff] {
        let cfg = RingConfig { base, ..good };
        let size = 5;
        let refused = PackedRing::new(&mem, &cfg).unwrap_err();
        assert_eq!(refused, RingError::Base { base, size });
    }
    for base in [0, 0x8004_0004, 0x0003_8001] {
        let cfg = RingConfig { base, ..good };
        assert_eq!(PackedRing::new(&mem, &cfg).unwrap().base(), base);
    }
}

#[test]
fn a_request_goes_there_and_back() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = PackedDriver::new(&mem, 0, 5, 3, true);
    let mut ring = ring(&driver);
    let mut chain = ChainBuf::with_capacity(4);
    for round in 0..20u32 {
        assert_eq!(ring.pop(), Ok(None));
        assert!(!ring.available());
        let id = 1000 + round as u16;
        driver.offer(id, &[(DATA, 16, 0), (DATA + 16, 512, 0), (DATA, 1, WRITE)]);
        assert!(ring.available());
        let slot = ring.pop().unwrap().unwrap();
        assert!(slot < 5);
        ring.read_chain(&mem, slot, &mut chain).unwrap();
        assert_eq!(lens(chain.readable()), [16, 512]);
        assert_eq!(lens(chain.writable()), [1]);
        ring.push_used(slot, round % 3);
        assert_ne!(ring.next_used(), ring.published_used());
        assert_eq!(driver.used(), None, "not yet published");
        assert!(ring.publish());
        // The length means something only where something was written.
        let written = Some(round % 3).filter(|len| *len > 0);
        assert_eq!(driver.used(), Some((id, written)));
        assert_eq!(driver.used(), None);
        assert_eq!(ring.next_used(), driver.next_used.bits());
        let place = u32::from(driver.next_avail.bits());
        assert_eq!(ring.base(), place | place << 16);
    }
}

#[test]
fn a_chain_is_not_read_again_after_the_pop() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = PackedDriver::new(&mem, 0, 8, 0, true);
    let mut ring = ring(&driver);
    let mut chain = ChainBuf::with_capacity(4);
    driver.offer(0, &[(DATA, 16, 0), (DATA, 1, WRITE)]);
    driver.offer(1, &[(DATA + 64, 17, 0), (DATA, 2, WRITE)]);
    let (first, second) = (ring.pop().unwrap().unwrap(), ring.pop().unwrap().unwrap());
    // The used descriptors of the two stand where the first one's chain stood.
    ring.push_used(second, 2);
    ring.publish();
    assert_eq!(driver.used(), Some((1, Some(2))));
    for i in 0..8 {
        driver.set_desc(i, u64::MAX, u32::MAX, 77, 0xffff);
    }
    ring.read_chain(&mem, first, &mut chain).unwrap();
    assert_eq!(lens(chain.readable()), [16]);
    assert_eq!(lens(chain.writable()), [1]);
}

#[test]
fn a_batch_is_seen_all_at_once() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = PackedDriver::new(&mem, 0, 7, 5, false);
    let mut ring = ring(&driver);
    for id in 0..3 {
        driver.offer(id, &[(DATA, 16, 0), (DATA, 1, WRITE)]);
    }
    let slots: Vec<_> = (0..3).map(|_| ring.pop().unwrap().unwrap()).collect();
    for slot in [slots[2], slots[0], slots[1]] {
        ring.push_used(slot, 1);
    }
    assert!(ring.publish());
    let order: Vec<_> = std::iter::from_fn(|| driver.used()).collect();
    assert_eq!(order, [(2, Some(1)), (0, Some(1)), (1, Some(1))]);
}

#[test]
fn indirect_tables_have_no_links_and_stand_alone() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = PackedDriver::new(&mem, 0, 8, 0, true);
    let mut chain = ChainBuf::with_capacity(4);
    let table = |driver: &PackedDriver, i: u64, len: u32, flags: u16| {
        let bytes = crate::virtio::testing::desc(DATA, len, 9, flags).bytes();
        crate::virtio::testing::write_bytes(driver.mem, DATA + 0x1000 + 16 * i, &bytes);
    };
    table(&driver, 0, 16, NEXT | INDIRECT);
    table(&driver, 1, 512, 0);
    table(&driver, 2, 1, WRITE | NEXT);
    let at = DATA + 0x1000;
    let mut try_chain = |driver: &mut PackedDriver, indirect, parts: &[(u64, u32, u16)]| {
        let cfg = RingConfig {
            indirect,
            base: u32::from(driver.next_avail.bits()),
            ..driver.cfg
        };
        let mut ring = PackedRing::new(driver.mem, &cfg).unwrap();
        driver.offer(0, parts);
        let slot = ring.pop().unwrap().unwrap();
        ring.read_chain(driver.mem, slot, &mut chain)
            .map(|()| (lens(chain.readable()), lens(chain.writable())))
    };
    assert_eq!(
        try_chain(&mut driver, true, &[(at, 48, INDIRECT | WRITE)]),
        Ok((vec![16, 512], vec![1]))
    );
    for (indirect, parts, error) in [
        (
            false,
            vec![(at, 48, INDIRECT)],
            ChainError::IndirectNotNegotiated,
        ),
        (
            true,
            vec![(at, 0, INDIRECT)],
            ChainError::IndirectLength { len: 0 },
        ),
        (
            true,
            vec![(at, 47, INDIRECT)],
            ChainError::IndirectLength { len: 47 },
        ),
        (
            true,
            vec![(at, 16 * 32769, INDIRECT)],
            ChainError::IndirectLength { len: 16 * 32769 },
        ),
        (
            true,
            vec![(at, 48, INDIRECT), (DATA, 1, WRITE)],
            ChainError::IndirectNext,
        ),
        (
            true,
            vec![(DATA, 16, 0), (at, 48, INDIRECT)],
            ChainError::IndirectNext,
        ),
        (
            true,
            vec![(RAM - 16, 48, INDIRECT)],
            ChainError::Unmapped {
                addr: RAM - 16,
                len: 48,
            },
        ),
        (
            true,
            vec![(DATA, 1, WRITE), (DATA, 16, 0)],
            ChainError::ReadableAfterWritable,
        ),
    ] {
        assert_eq!(
            try_chain(&mut driver, indirect, &parts),
            Err(error),
            "{parts:?}"
        );
    }
}

#[test]
fn a_chain_longer_than_the_ring_breaks_it() {
    let mem = memory(&[(0, RAM)]);
    for (size, taken) in [(1, 0), (4, 0), (5, 2)] {
        let mut driver = PackedDriver::new(&mem, 0, size, 0, true);
        let mut ring = ring(&driver);
        for id in 0..taken {
            driver.offer(id, &[(DATA, 1, WRITE)]);
            ring.pop().unwrap().unwrap();
        }
        // NEXT in all that are left, and in those that were popped.
        for i in 0..size {
            driver.set_desc(i, DATA, 16, 0, NEXT | AVAIL);
        }
        let index = taken;
        for _ in 0..2 {
            assert_eq!(ring.pop(), Err(RingError::Overrun { index, size }));
        }
        // One that fits exactly is taken.
        driver.set_flags(size - 1, AVAIL);
        assert!(ring.pop().unwrap().is_some());
        assert_eq!(ring.pop(), Ok(None));
    }
}

#[test]
fn without_event_idx_the_flag_suppresses_interrupts() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = PackedDriver::new(&mem, 0, 4, 0, true);
    let mut ring = ring(&driver);
    for (flags, wanted) in [(0, true), (1, false), (2, true), (3, true), (0xfffd, false)] {
        driver.offer(0, &[(DATA, 1, WRITE)]);
        let slot = ring.pop().unwrap().unwrap();
        driver.set_event(0, flags);
        ring.push_used(slot, 1);
        assert_eq!(ring.publish(), wanted, "{flags}");
        assert!(driver.used().is_some());
        driver.offer(0, &[(DATA, 1, WRITE)]);
        let slot = ring.pop().unwrap().unwrap();
        ring.push_used(slot, 1);
        ring.show();
        assert!(driver.used().is_some(), "shown");
        assert_eq!(ring.publish(), wanted, "{flags}, shown before");
    }
    assert!(!ring.publish(), "nothing was pushed");
}

#[test]
fn with_event_idx_an_interrupt_comes_when_the_event_is_passed() {
    // Every place, batch and event, against counting.
    let mem = memory(&[(0, RAM)]);
    for size in [1u16, 3, 4] {
        for start in 0..size {
            for wrap in [false, true] {
                for batch in 1..=size {
                    for back in 0..2 * size {
                        let mut driver = PackedDriver::new(&mem, 0, size, start, wrap);
                        driver.cfg.event_idx = true;
                        let mut ring = ring(&driver);
                        for id in 0..batch {
                            driver.offer(id, &[(DATA, 1, WRITE)]);
                            let slot = ring.pop().unwrap().unwrap();
                            ring.push_used(slot, 1);
                            // What was shown before counts as well.
                            if (id + start) % 2 == 0 {
                                ring.show();
                            }
                        }
                        // An event `back` places before the end of the next lap.
                        let place = |step: u16| {
                            let at = Position { index: start, wrap };
                            let half = at.behind(step.min(size), size);
                            half.behind(step - step.min(size), size).bits()
                        };
                        driver.set_event(place(back), 2);
                        // Two laps away is the same place with the same counter: those just passed.
                        let wanted = (0..batch).any(|step| place(step) == place(back));
                        assert_eq!(ring.publish(), wanted, "{size} {start} {batch} {back}");
                    }
                }
            }
        }
    }
}

#[test]
fn notifications_are_switched() {
    let mem = memory(&[(0, RAM)]);
    for event_idx in [false, true] {
        let mut driver = PackedDriver::new(&mem, 0, 3, 2, true);
        driver.cfg.event_idx = event_idx;
        let mut ring = ring(&driver);
        ring.disable_notification();
        assert_eq!(driver.device_event().1, 1);
        for _ in 0..5 {
            assert!(!ring.enable_notification());
            let (event, flags) = driver.device_event();
            assert_eq!(flags, if event_idx { 2 } else { 0 });
            assert!(!event_idx || event == driver.next_avail.bits());
            driver.offer(0, &[(DATA, 1, WRITE)]);
            assert!(ring.enable_notification(), "a chain is waiting");
            let slot = ring.pop().unwrap().unwrap();
            ring.push_used(slot, 1);
            ring.publish();
            assert!(driver.used().is_some());
        }
    }
}

#[test]
fn a_ring_survives_a_new_memory_table() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = PackedDriver::new(&mem, 0, 3, 0, true);
    let mut ring = ring(&driver);
    driver.offer(7, &[(DATA, 1, WRITE)]);
    let slot = ring.pop().unwrap().unwrap();
    let other = memory(&[(0, RAM)]);
    let mut moved = PackedDriver::new(&other, 0, 3, 0, true);
    moved.offer(7, &[(DATA, 1, WRITE)]);
    ring.remap(&other).unwrap();
    ring.push_used(slot, 9);
    ring.publish();
    assert_eq!(moved.used(), Some((7, Some(9))));
    assert_eq!(driver.used(), None, "the old memory is left alone");
    assert!(ring.remap(&GuestMemory::empty()).is_err());
    drop((mem, other));
    // The ring keeps its memory mapped.
    assert_eq!(ring.pop(), Ok(None));
}

#[test]
fn a_ring_may_move_to_another_thread() {
    fn moves<T: Send>() {}
    moves::<PackedRing>();
    moves::<super::super::Ring>();
}
