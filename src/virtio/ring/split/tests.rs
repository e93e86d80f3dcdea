use super::*;
use crate::virtio::testing::{Driver, memory, read_u32, write_u16};

mod chains;
mod notify;
mod oracle;

const RAM: u64 = 0x20_0000;
/// Data of chains, away from the rings at 0.
const DATA: u64 = 0x10_0000;

fn ring(driver: &Driver) -> SplitRing {
    SplitRing::new(driver.mem, &driver.cfg).unwrap()
}

fn lens(iovecs: &[libc::iovec]) -> Vec<usize> {
    iovecs.iter().map(|v| v.iov_len).collect()
}

#[test]
fn a_queue_size_that_is_no_power_of_two_is_refused() {
    let mem = memory(&[(0, RAM)]);
    for size in [0, 3, 100, 9999, 32767, 65535] {
        let cfg = RingConfig {
            size,
            ..Driver::new(&mem, 0, 4, 0).cfg
        };
        assert_eq!(
            SplitRing::new(&mem, &cfg).unwrap_err(),
            RingError::Size(size)
        );
    }
    for size in [1, 2, 32768] {
        let driver = Driver::new(&mem, 0, size, 0);
        assert_eq!(ring(&driver).size(), size);
    }
}

#[test]
fn rings_that_are_unaligned_or_not_in_memory_are_refused() {
    let mem = memory(&[(0, RAM)]);
    let good = Driver::new(&mem, 0, 4, 0).cfg;
    let bad = [
        RingConfig {
            desc_table: 8,
            ..good
        },
        RingConfig {
            avail_ring: good.avail_ring + 1,
            ..good
        },
        RingConfig {
            used_ring: good.used_ring + 2,
            ..good
        },
    ];
    for cfg in bad {
        assert!(matches!(
            SplitRing::new(&mem, &cfg),
            Err(RingError::Alignment { .. })
        ));
    }
    let bad = [
        RingConfig {
            desc_table: RAM - 48,
            ..good
        },
        RingConfig {
            avail_ring: RAM - 10,
            ..good
        },
        RingConfig {
            used_ring: RAM - 32,
            ..good
        },
        RingConfig {
            desc_table: !15,
            ..good
        },
    ];
    for cfg in bad {
        assert!(matches!(
            SplitRing::new(&mem, &cfg),
            Err(RingError::Unmapped { .. })
        ));
    }
}

#[test]
fn the_event_field_needs_memory_only_where_it_was_negotiated() {
    let mem = memory(&[(0, RAM)]);
    let mut cfg = Driver::new(&mem, 0, 4, 0).cfg;
    cfg.avail_ring = RAM - 12;
    assert!(SplitRing::new(&mem, &cfg).is_ok());
    cfg.event_idx = true;
    assert!(matches!(
        SplitRing::new(&mem, &cfg),
        Err(RingError::Unmapped {
            part: "available ring",
            ..
        })
    ));
}

#[test]
fn a_region_mapped_askew_does_not_give_a_misaligned_ring() {
    // A guest address that is aligned, at a host address that is not.
    let region = crate::virtio::testing::region(1, RAM);
    let mem = GuestMemory::new(vec![region]).unwrap();
    let cfg = RingConfig {
        size: 4,
        desc_table: 16,
        avail_ring: 128,
        used_ring: 256,
        event_idx: false,
        indirect: true,
        packed: false,
        base: 0,
    };
    assert!(matches!(
        SplitRing::new(&mem, &cfg),
        Err(RingError::Alignment { .. })
    ));
}

#[test]
fn the_used_index_is_read_from_the_ring_and_the_available_index_is_given() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = Driver::new(&mem, 0, 8, 100);
    write_u16(&mem, driver.cfg.used_ring + 2, 97);
    driver.cfg.base = 99;
    driver.set_avail_idx(99);
    let mut ring = ring(&driver);
    assert_eq!((ring.next_avail(), ring.next_used()), (99, 97));
    ring.push_used(3, 1);
    assert!(ring.publish());
    assert_eq!(driver.used_idx(), 98);
    assert_eq!(driver.used_elem(97), (3, 1));
}

#[test]
fn chains_come_out_in_order_and_indices_wrap() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 4, 65533);
    let mut ring = ring(&driver);
    let mut index = 65533u16;
    for round in 0..6u16 {
        assert_eq!(ring.pop(), Ok(None));
        assert!(!ring.available());
        for i in 0..4 {
            driver.offer((round + i) % 4);
        }
        assert_eq!(ring.pending(), 4);
        for i in 0..4 {
            assert!(ring.available());
            let head = (round + i) % 4;
            assert_eq!(ring.pop(), Ok(Some(head)));
            ring.push_used(head, u32::from(index));
            assert_eq!(
                driver.used_idx(),
                index.wrapping_sub(i),
                "not yet published"
            );
            index = index.wrapping_add(1);
        }
        assert!(ring.publish());
        assert_eq!(driver.used_idx(), index);
        let last = index.wrapping_sub(1);
        assert_eq!(
            driver.used_elem(last),
            (u32::from((round + 3) % 4), u32::from(last))
        );
    }
    assert_eq!(ring.next_avail(), index);
}

#[test]
fn a_queue_of_one_works() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 1, 65535).with_event_idx();
    let mut ring = ring(&driver);
    for i in 0..4u16 {
        driver.set_used_event(driver.used_idx());
        driver.direct(0, &[(DATA, 16, true)]);
        driver.offer(0);
        assert_eq!(ring.pop(), Ok(Some(0)));
        assert_eq!(ring.pop(), Ok(None));
        let mut chain = ChainBuf::with_capacity(1);
        ring.read_chain(&mem, 0, &mut chain).unwrap();
        assert_eq!(lens(chain.writable()), [16]);
        ring.push_used(0, 7);
        assert!(ring.publish());
        assert_eq!(driver.used_idx(), i);
    }
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_ring() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 65530);
    let mut ring = ring(&driver);
    driver.set_avail_idx(65530u16.wrapping_add(9));
    for _ in 0..2 {
        assert!(ring.available());
        assert!(matches!(ring.pop(), Err(RingError::AvailIndex { .. })));
    }
    assert_eq!(ring.pending(), 8);
    // Going backwards is running ahead by nearly 65536.
    driver.set_avail_idx(65529);
    assert!(matches!(ring.pop(), Err(RingError::AvailIndex { .. })));
    driver.set_avail_idx(65530u16.wrapping_add(8));
    assert_eq!(ring.pop(), Ok(Some(0)));
}

#[test]
fn a_head_out_of_range_breaks_the_ring() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let mut ring = ring(&driver);
    driver.offer(8);
    for _ in 0..2 {
        assert_eq!(ring.pop(), Err(RingError::Head { head: 8, size: 8 }));
    }
    assert_eq!(ring.next_avail(), 0);
}

#[test]
fn nothing_pushed_publishes_nothing() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 4, 5);
    let mut ring = ring(&driver);
    assert!(!ring.publish());
    ring.push_used(0, 0);
    assert!(ring.publish());
    assert!(!ring.publish());
    assert_eq!(driver.used_idx(), 6);
}

#[test]
fn without_event_idx_the_flag_suppresses_interrupts() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 4, 0);
    let mut ring = ring(&driver);
    driver.set_avail_flags(1);
    ring.push_used(0, 0);
    assert!(!ring.publish());
    driver.set_avail_flags(0);
    ring.push_used(0, 0);
    assert!(ring.publish());
}

#[test]
fn with_event_idx_the_event_decides_and_the_flag_does_not() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 65534).with_event_idx();
    let mut ring = ring(&driver);
    driver.set_avail_flags(1);
    // Wants to hear of the element at index 0, the third from here.
    driver.set_used_event(0);
    ring.push_used(0, 0);
    assert!(!ring.publish(), "65534");
    ring.push_used(0, 0);
    assert!(!ring.publish(), "65535");
    ring.push_used(0, 0);
    assert!(ring.publish(), "0");
    ring.push_used(0, 0);
    assert!(!ring.publish(), "already told");
    // A batch that passes the event.
    driver.set_used_event(4);
    for _ in 0..5 {
        ring.push_used(0, 0);
    }
    assert!(ring.publish());
}

#[test]
fn what_was_only_shown_is_asked_about_with_the_next_publication() {
    let mem = memory(&[(0, RAM)]);
    for event_idx in [false, true] {
        let driver = Driver::new(&mem, 0, 8, 65534);
        let driver = match event_idx {
            true => driver.with_event_idx(),
            false => driver,
        };
        let mut ring = ring(&driver);
        // Waits for the second of four.
        driver.set_used_event(65535);
        for shown in 1..4u16 {
            ring.push_used(0, 0);
            ring.show();
            assert_eq!(driver.used_idx(), 65534u16.wrapping_add(shown));
        }
        ring.push_used(0, 0);
        assert!(ring.publish());
        assert_eq!(driver.used_idx(), 2);
        ring.show();
        assert!(!ring.publish(), "nothing is new");
        // All of it shown already.
        driver.set_used_event(2);
        ring.push_used(0, 0);
        ring.show();
        assert!(ring.publish());
    }
}

#[test]
fn need_event_agrees_with_counting() {
    // The element `event` is among those made visible by old -> new.
    for old in [0u16, 5, 65530, 65535] {
        for count in 1..20u16 {
            let new = old.wrapping_add(count);
            for event in (0..40u16).map(|i| old.wrapping_sub(10).wrapping_add(i)) {
                let counted = (0..count).any(|i| old.wrapping_add(i) == event);
                assert_eq!(need_event(event, new, old), counted, "{event} {old} {new}");
            }
        }
    }
}

#[test]
fn notifications_are_switched_by_the_flag_without_event_idx() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 4, 0);
    let mut ring = ring(&driver);
    ring.disable_notification();
    assert_eq!(driver.used_flags(), 1);
    assert!(!ring.enable_notification());
    assert_eq!(driver.used_flags(), 0);
    driver.offer(0);
    assert!(ring.enable_notification(), "a chain is waiting");
    assert_eq!(ring.pop(), Ok(Some(0)));
    assert!(!ring.enable_notification());
}

#[test]
fn notifications_are_switched_by_the_event_with_event_idx() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 4, 65535).with_event_idx();
    let mut ring = ring(&driver);
    assert!(!ring.enable_notification());
    assert_eq!(driver.avail_event(), 65535);
    driver.offer(2);
    ring.disable_notification();
    assert_eq!(driver.used_flags(), 0, "flags stay 0 with EVENT_IDX");
    assert_eq!(ring.pop(), Ok(Some(2)));
    assert!(!ring.enable_notification());
    assert_eq!(driver.avail_event(), 0);
}

#[test]
fn a_driver_that_was_asked_and_was_silent_does_not_notify_any_more() {
    let mem = memory(&[(0, RAM)]);
    for start in [0, 7, 65535] {
        let driver = Driver::new(&mem, 0, 4, start).with_event_idx();
        let mut ring = ring(&driver);
        assert!(!ring.enable_notification());
        let old = driver.avail_idx();
        let notifies = |new| need_event(driver.avail_event(), new, old);
        assert!(notifies(old.wrapping_add(1)), "it was asked");
        ring.disable_notification();
        assert!((1..=4).all(|count| !notifies(old.wrapping_add(count))));
        // What it has made available before that was seen makes no difference.
        driver.offer(1);
        assert!((1..=3).all(|count| !need_event(
            driver.avail_event(),
            old.wrapping_add(1 + count),
            old.wrapping_add(1)
        )));
    }
}

#[test]
fn a_ring_survives_a_new_memory_table() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 4, 65535);
    let mut ring = ring(&driver);
    driver.offer(1);
    assert_eq!(ring.pop(), Ok(Some(1)));
    let other = memory(&[(0, RAM)]);
    let moved = Driver::new(&other, 0, 4, 0);
    ring.remap(&other).unwrap();
    moved.offer(3);
    assert_eq!(ring.pop(), Ok(Some(3)));
    ring.push_used(3, 9);
    ring.publish();
    assert_eq!(moved.used_elem(65535), (3, 9));
    assert_eq!(driver.used_idx(), 65535, "the old memory is left alone");
    assert!(ring.remap(&GuestMemory::empty()).is_err());
    drop((mem, other));
    // The ring keeps its memory mapped.
    assert_eq!(ring.pop(), Ok(None));
}

#[test]
fn a_used_element_lies_where_the_dirty_log_is_told() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 65535);
    let mut ring = ring(&driver);
    let (offset, len) = ring.used_element_range(ring.next_used());
    ring.push_used(5, 0x1234);
    assert_eq!((offset, len), (4 + 8 * 7, 8));
    assert_eq!(read_u32(&mem, driver.cfg.used_ring + offset), 5);
    assert_eq!(read_u32(&mem, driver.cfg.used_ring + offset + 4), 0x1234);
}

#[test]
fn a_ring_and_a_chain_may_move_to_another_thread() {
    fn moves<T: Send>() {}
    moves::<SplitRing>();
    moves::<ChainBuf>();
    moves::<crate::virtio::blk::request::Parsed>();
}
