//! The memory table, under load and at its limits.

use super::*;

#[test]
fn memory_table_is_swapped_under_running_rings() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.device.calls();
    let (low, high) = (memfd(MEMORY_SIZE), memfd(MEMORY_SIZE));
    let mut payload = state(2, 0);
    payload.extend(words(&[0, MEMORY_SIZE, USER_BASE, 0]));
    payload.extend(words(&[1 << 32, MEMORY_SIZE, USER_BASE + (1 << 32), 0]));
    bench.set(
        Req::SET_MEM_TABLE,
        &payload,
        &[low.as_raw_fd(), high.as_raw_fd()],
    );
    assert_eq!(bench.device.calls(), [Asked::Memory(2)]);
    let memory = bench.device.memory().unwrap();
    assert_eq!(
        memory.user_to_guest(USER_BASE + (1 << 32), 1),
        Some(1 << 32)
    );
}

#[test]
fn memory_table_without_a_running_ring_is_refused_and_the_old_one_kept() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.device.calls();
    let file = memfd(MEMORY_SIZE);
    let mut payload = state(1, 0);
    payload.extend(words(&[0, MEMORY_SIZE, USER_BASE + (1 << 32), 0]));
    assert!(!bench.try_set(Req::SET_MEM_TABLE, &payload, &[file.as_raw_fd()]));
    let region = add_region(0, MEMORY_SIZE, USER_BASE, 0);
    assert!(!bench.try_set(Req::REM_MEM_REG, &region, &[]));
    assert!(bench.device.calls().is_empty());
    bench.start_ring(1, 0);
    assert_eq!(bench.device.calls()[0], Asked::Start(1, 0));
}

#[test]
fn ring_that_moves_in_guest_memory_is_started_anew() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.start_ring(1, 0);
    bench.device.fetched.store(9, Ordering::Relaxed);
    bench.device.calls();
    bench.device.starts();
    let file = memfd(MEMORY_SIZE);
    let mut payload = state(1, 0);
    payload.extend(words(&[1 << 32, MEMORY_SIZE, USER_BASE, 0]));
    bench.set(Req::SET_MEM_TABLE, &payload, &[file.as_raw_fd()]);
    assert_eq!(
        bench.device.calls(),
        [
            Asked::Stop(0),
            Asked::Stop(1),
            Asked::Start(0, 9),
            Asked::Start(1, 9)
        ]
    );
    let starts = bench.device.starts();
    assert_eq!(starts[1].config.desc_table, (1 << 32) + 0x10000);
    assert!(
        starts
            .iter()
            .all(|start| start.enabled && start.kick.is_some())
    );
}

#[test]
fn regions_come_and_go_under_load() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.device.calls();
    let file = memfd(0x3000);
    for round in 0..100 {
        let at = 1 << 32 | round << 20;
        let region = add_region(at, 0x1001, USER_BASE + at, 0x1000);
        bench.set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
        // Older QEMUs pass the descriptor with REM_MEM_REG; the offset is ignored.
        let region = add_region(at, 0x1001, USER_BASE + at, 0);
        bench.set(Req::REM_MEM_REG, &region, &[file.as_raw_fd()]);
        assert_eq!(bench.device.calls(), [Asked::Memory(2), Asked::Memory(1)]);
    }
}

#[test]
fn region_that_overlaps_is_refused() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let file = memfd(0x2000);
    for (guest, user) in [
        (MEMORY_SIZE - 0x1000, USER_BASE + (1 << 32)),
        (1 << 32, USER_BASE + MEMORY_SIZE - 0x1000),
        (u64::MAX - 0xfff, USER_BASE + (1 << 32)),
    ] {
        let region = add_region(guest, 0x2000, user, 0);
        assert!(!bench.try_set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]));
    }
    // Right beside it is fine, twice is not.
    let region = add_region(MEMORY_SIZE, 0x2000, USER_BASE + MEMORY_SIZE, 0);
    bench.set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
    assert!(!bench.try_set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]));
}

#[test]
fn region_that_is_not_there_cannot_be_removed() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    for region in [
        add_region(0x1000, MEMORY_SIZE, USER_BASE, 0),
        add_region(0, MEMORY_SIZE - 1, USER_BASE, 0),
        add_region(0, MEMORY_SIZE, USER_BASE + 0x1000, 0),
    ] {
        assert!(!bench.try_set(Req::REM_MEM_REG, &region, &[]));
    }
    let region = add_region(0, MEMORY_SIZE, USER_BASE, 0);
    bench.set(Req::REM_MEM_REG, &region, &[]);
    assert!(!bench.try_set(Req::REM_MEM_REG, &region, &[]));
}

#[test]
fn region_longer_than_its_file_is_refused() {
    let mut bench = Bench::negotiated();
    let file = memfd(0x2000);
    for region in [
        add_region(0, 0x2001, USER_BASE, 0),
        add_region(0, 0x2000, USER_BASE, 0x1000),
        add_region(0, 0, USER_BASE, 0),
        add_region(0, 0x1000, USER_BASE, !0xfff),
    ] {
        assert!(!bench.try_set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]));
    }
    let pipe = eventfd();
    let region = add_region(0, 0x1000, USER_BASE, 0);
    assert!(!bench.try_set(Req::ADD_MEM_REG, &region, &[pipe.as_raw_fd()]));
}

#[test]
fn no_more_regions_than_offered() {
    let mut bench = Bench::negotiated();
    let file = memfd(0x1000);
    for slot in 0..509u64 {
        let region = add_region(slot << 12, 0x1000, USER_BASE + (slot << 12), 0);
        bench.set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
    }
    let region = add_region(1 << 40, 0x1000, USER_BASE + (1 << 40), 0);
    assert!(!bench.try_set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]));
}

#[test]
fn memory_is_let_go_when_the_vmm_dies() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    let memory = Arc::downgrade(&bench.device.starts().pop().unwrap().memory);
    assert!(memory.upgrade().is_some());
    let Bench {
        client, connection, ..
    } = bench;
    drop(client);
    drop(connection);
    assert!(memory.upgrade().is_none());
}
