use super::*;
use crate::virtio::testing::{
    Driver, INDIRECT, NEXT, WRITE, desc, memory, read_u32, write_bytes, write_u16,
};

const RAM: u64 = 0x20_0000;
/// Data of chains, away from the rings at 0.
const DATA: u64 = 0x10_0000;

fn ring(driver: &Driver) -> SplitRing {
    SplitRing::new(driver.mem, &driver.cfg).unwrap()
}

fn chain_of(driver: &Driver, head: u16) -> Result<ChainBuf, ChainError> {
    let mut chain = ChainBuf::with_capacity(4);
    ring(driver).read_chain(driver.mem, head, &mut chain)?;
    Ok(chain)
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
        next_avail: 0,
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
    driver.cfg.next_avail = 99;
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
fn readable_parts_come_before_writable_ones() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(
        2,
        &[
            (DATA, 16, false),
            (DATA + 16, 512, false),
            (DATA + 1024, 1, true),
        ],
    );
    let chain = chain_of(&driver, 2).unwrap();
    assert_eq!(lens(chain.readable()), [16, 512]);
    assert_eq!(lens(chain.writable()), [1]);
    assert_eq!((chain.readable_len(), chain.writable_len()), (528, 1));
    let host = mem.host_ptr(DATA + 1024, 1).unwrap();
    assert_eq!(chain.writable()[0].iov_base.cast(), host);
}

#[test]
fn a_direct_chain_that_loops_ends_in_an_error() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_desc(0, desc(DATA, 16, NEXT, 1));
    driver.set_desc(1, desc(DATA, 16, NEXT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Loop { count: 8 }
    );
    // A descriptor of no bytes loops as well.
    driver.set_desc(3, desc(0, 0, NEXT, 3));
    assert_eq!(
        chain_of(&driver, 3).unwrap_err(),
        ChainError::Loop { count: 8 }
    );
}

#[test]
fn a_direct_chain_may_use_the_whole_queue() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let parts: Vec<_> = (0..8).map(|i| (DATA + 64 * i, 64, i > 3)).collect();
    driver.direct(0, &parts);
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (4, 4));
}

#[test]
fn next_out_of_range_ends_in_an_error() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_desc(0, desc(DATA, 16, NEXT, 8));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Index { index: 8, count: 8 }
    );
    driver.set_table(DATA, &[desc(DATA, 16, NEXT, 2), desc(DATA, 1, WRITE, 0)]);
    driver.set_desc(0, desc(DATA, 32, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Index { index: 2, count: 2 }
    );
}

#[test]
fn a_readable_part_after_a_writable_one_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(0, &[(DATA, 16, true), (DATA, 16, false)]);
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::ReadableAfterWritable
    );
}

#[test]
fn zero_length_descriptors_are_skipped() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let nowhere = u64::MAX;
    driver.direct(
        0,
        &[
            (nowhere, 0, false),
            (DATA, 16, false),
            (0, 0, false),
            (nowhere, 0, true),
            (DATA, 1, true),
        ],
    );
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!(lens(chain.readable()), [16]);
    assert_eq!(lens(chain.writable()), [1]);
}

#[test]
fn a_buffer_outside_memory_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    for (addr, len) in [
        (RAM, 1),
        (RAM - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
    ] {
        driver.direct(0, &[(addr, len, true)]);
        assert!(matches!(
            chain_of(&driver, 0),
            Err(ChainError::Unmapped { .. })
        ));
    }
}

#[test]
fn a_buffer_across_adjacent_regions_becomes_two() {
    let mem = memory(&[
        (0, RAM),
        (RAM, 0x3000),
        (RAM + 0x3000, 0x1000),
        (RAM + 0x5000, 0x1000),
    ]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(0, &[(RAM - 4, 4 + 0x3000 + 8, false), (RAM - 1, 3, true)]);
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!(lens(chain.readable()), [4, 0x3000, 8]);
    assert_eq!(lens(chain.writable()), [1, 2]);
    assert_eq!(chain.readable_len(), 0x300c);
    assert_eq!(
        chain.readable()[1].iov_base.cast(),
        mem.regions()[1].as_ptr()
    );
    // But not across a hole.
    driver.direct(0, &[(RAM + 0x3fff, 2, true)]);
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Unmapped {
            addr: RAM + 0x4000,
            len: 1
        }
    );
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_table(
        DATA,
        &[
            desc(DATA, 32, NEXT, 2),
            desc(DATA, 1, WRITE, 0),
            desc(DATA, 512, NEXT | WRITE, 1),
        ],
    );
    driver.set_desc(5, desc(DATA, 16, NEXT, 6));
    // WRITE on the descriptor of a table is ignored.
    driver.set_desc(6, desc(DATA, 48, INDIRECT | WRITE, 0));
    let chain = chain_of(&driver, 5).unwrap();
    assert_eq!(lens(chain.readable()), [16, 32]);
    assert_eq!(lens(chain.writable()), [512, 1]);
}

#[test]
fn a_chain_longer_than_the_queue_is_taken_from_an_indirect_table() {
    // Windows sends up to 515 descriptors.
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 128, 0);
    let table: Vec<_> = (0..515u16)
        .map(|i| {
            let flags = if i < 514 { NEXT } else { WRITE };
            desc(DATA + 16 * u64::from(i), 16, flags, i + 1)
        })
        .collect();
    driver.set_table(DATA, &table);
    driver.set_desc(0, desc(DATA, 515 * 16, INDIRECT, 0));
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!(chain.readable().len(), 514);
    assert_eq!(chain.writable().len(), 1);
}

#[test]
fn an_indirect_table_of_a_broken_length_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    for len in [0, 1, 15, 17, 40, 16 * 32769, u32::MAX, !15] {
        driver.set_desc(0, desc(DATA, len, INDIRECT, 0));
        assert_eq!(
            chain_of(&driver, 0).unwrap_err(),
            ChainError::IndirectLength { len }
        );
    }
    // Longer than what is left of memory.
    driver.set_desc(0, desc(RAM - 16, 32, INDIRECT, 0));
    assert!(matches!(
        chain_of(&driver, 0),
        Err(ChainError::Unmapped { .. })
    ));
}

#[test]
fn an_indirect_table_of_the_largest_size_is_taken_and_a_loop_in_it_found() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let table: Vec<_> = (0..32768u32)
        .map(|i| desc(0, 1, NEXT, ((i + 1) % 32768) as u16))
        .collect();
    driver.set_table(DATA, &table);
    driver.set_desc(0, desc(DATA, 32768 * 16, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Loop { count: 32768 }
    );
    write_bytes(&mem, DATA + 32767 * 16, &desc(0, 1, WRITE, 0).bytes());
    let mut chain = chain_of(&driver, 0).unwrap();
    assert_eq!(chain.readable().len(), 32767);
    // The buffer does not stay that large.
    chain.clear();
    assert!(chain.iovecs.capacity() <= 1024);
}

#[test]
fn an_indirect_table_that_is_not_aligned_is_read() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_table(
        DATA + 3,
        &[desc(DATA, 16, NEXT, 1), desc(DATA, 1, WRITE, 0)],
    );
    driver.set_desc(0, desc(DATA + 3, 32, INDIRECT, 0));
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 1));
}

#[test]
fn nested_indirect_and_indirect_with_next_are_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_table(DATA, &[desc(DATA, 16, INDIRECT, 0)]);
    driver.set_desc(0, desc(DATA, 16, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::NestedIndirect
    );
    driver.set_desc(0, desc(DATA, 16, INDIRECT | NEXT, 1));
    assert_eq!(chain_of(&driver, 0).unwrap_err(), ChainError::IndirectNext);
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = Driver::new(&mem, 0, 8, 0);
    driver.cfg.indirect = false;
    driver.set_table(DATA, &[desc(DATA, 16, WRITE, 0)]);
    driver.set_desc(0, desc(DATA, 16, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::IndirectNotNegotiated
    );
}

#[test]
fn lengths_are_summed_in_64_bits() {
    // Four descriptors of 2 GiB over the same memory: more than a u32 holds.
    let mem = memory(&[(0, 1 << 31)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(0, &[(0, 1 << 31, true); 4]);
    assert_eq!(chain_of(&driver, 0).unwrap().writable_len(), 1 << 33);
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
    ring.prefetch_descriptor(5);
}

#[test]
fn a_ring_and_a_chain_may_move_to_another_thread() {
    fn moves<T: Send>() {}
    moves::<SplitRing>();
    moves::<ChainBuf>();
    moves::<crate::virtio::blk::request::Parsed>();
}
