//! The session from the VMM's side: each test is a case that broke some back-end.

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::FrontendReq as Req;

use super::testing::*;
use super::{ConnectionError, Progress};

const NOFD: u64 = 0x100;

fn add_region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[0, guest, size, user, offset])
}

#[test]
fn qemu_handshake_offers_exactly_what_is_served() {
    let mut bench = Bench::negotiated();
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
    assert_eq!(bench.get(Req::GET_MAX_MEM_SLOTS), 509);
    assert!(bench.device.calls().is_empty());
}

#[test]
fn ring_starts_with_its_parts_in_any_order() {
    // QEMU, cloud-hypervisor, and one that kicks first and has its memory last.
    type Order = [Req; 4];
    let orders: [Order; 4] = [
        [
            Req::SET_VRING_NUM,
            Req::SET_VRING_BASE,
            Req::SET_VRING_ADDR,
            Req::SET_VRING_KICK,
        ],
        [
            Req::SET_VRING_NUM,
            Req::SET_VRING_ADDR,
            Req::SET_VRING_BASE,
            Req::SET_VRING_KICK,
        ],
        [
            Req::SET_VRING_KICK,
            Req::SET_VRING_BASE,
            Req::SET_VRING_ADDR,
            Req::SET_VRING_NUM,
        ],
        [
            Req::SET_VRING_KICK,
            Req::SET_VRING_NUM,
            Req::SET_VRING_ADDR,
            Req::SET_VRING_BASE,
        ],
    ];
    for memory_first in [true, false] {
        for order in orders {
            let mut bench = Bench::negotiated();
            if memory_first {
                bench.share_memory();
            }
            let kick = eventfd();
            for request in order {
                assert!(bench.device.starts().is_empty());
                match request {
                    Req::SET_VRING_NUM => bench.set(request, &state(2, 128), &[]),
                    Req::SET_VRING_BASE => bench.set(request, &state(2, 7), &[]),
                    Req::SET_VRING_ADDR => bench.set(request, &addresses(2, 0), &[]),
                    _ => bench.set(request, &words(&[2]), &[kick.as_raw_fd()]),
                }
            }
            if !memory_first {
                assert!(bench.device.starts().is_empty());
                bench.share_memory();
            }
            let starts = bench.device.starts();
            assert_eq!(starts.len(), 1);
            let config = starts[0].config;
            assert_eq!((config.size, config.next_avail), (128, 7));
            assert_eq!(
                (config.desc_table, config.avail_ring, config.used_ring),
                (0x20000, 0x22000, 0x24000)
            );
            assert_eq!(starts[0].memory.regions().len(), 1);
        }
    }
}

#[test]
fn ring_learns_the_negotiated_features() {
    for (features, event_idx, indirect) in [
        (1 << 32, false, false),
        (1 << 32 | 1 << 29, true, false),
        (1 << 32 | 1 << 28, false, true),
    ] {
        let mut bench = Bench::new();
        bench.negotiate(features | BIT_30);
        bench.share_memory();
        bench.start_ring(0, 0);
        let starts = bench.device.starts();
        assert_eq!(starts[0].features, features);
        assert_eq!(starts[0].config.event_idx, event_idx);
        assert_eq!(starts[0].config.indirect, indirect);
    }
}

#[test]
fn libblkio_session() {
    let mut bench = Bench::new();
    bench.client.send(Req::SET_OWNER, 0, &[], &[]);
    let features = bench.get(Req::GET_FEATURES);
    // SET_FEATURES comes before SET_PROTOCOL_FEATURES.
    bench
        .client
        .send(Req::SET_FEATURES, 0, &words(&[features]), &[]);
    let protocol = bench.get(Req::GET_PROTOCOL_FEATURES);
    let wanted = 1 << 3 | 1 << 9 | 1 << 15 | 1;
    assert_eq!(protocol & wanted, wanted);
    bench
        .client
        .send(Req::SET_PROTOCOL_FEATURES, 0, &words(&[wanted]), &[]);
    bench.run().unwrap();
    // From here on every message has need_reply, those with a reply of their own too.
    bench.client.send(Req::GET_QUEUE_NUM, NEED_REPLY, &[], &[]);
    bench.run().unwrap();
    assert_eq!(bench.client.reply_u64(Req::GET_QUEUE_NUM), 4);
    assert!(bench.client.is_silent());

    // The rings' region ends in the middle of a page; guest addresses are the VMM's own.
    let rings = memfd(0x6406);
    let size = 0x4000 + 6 + 8 * 128;
    let add = add_region(USER_BASE, size, USER_BASE, 0);
    bench.set(Req::ADD_MEM_REG, &add, &[rings.as_raw_fd()]);
    let (kick, call) = (eventfd(), eventfd());
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[0]), &[kick.as_raw_fd()]);
    bench.set(Req::SET_VRING_CALL, &words(&[0]), &[call.as_raw_fd()]);
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    // Buffers come while the ring runs.
    let buffers = memfd(4000);
    let add = add_region(USER_BASE + 0x10_0000, 4000, USER_BASE + 0x10_0000, 0);
    bench.set(Req::ADD_MEM_REG, &add, &[buffers.as_raw_fd()]);
    assert_eq!(bench.device.starts()[0].config.desc_table, USER_BASE);
    assert_eq!(
        bench.device.calls(),
        [
            Asked::Features(FEATURES),
            Asked::Start(0, 0),
            Asked::Call(0, true),
            Asked::Enabled(0, true),
            Asked::Memory(2),
        ]
    );
    // It leaves without GET_VRING_BASE.
    let Bench {
        client,
        mut connection,
        device,
    } = bench;
    drop(client);
    assert_eq!(connection.process().unwrap(), Progress::Closed);
    drop(connection);
    assert_eq!(device.calls(), [Asked::Reset]);
}

#[test]
fn seabios_starts_one_queue_stops_it_and_the_kernel_starts_several() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.device.fetched.store(37, Ordering::Relaxed);
    bench.device.in_flight.store(3, Ordering::Relaxed);
    bench.set(Req::SET_VRING_ENABLE, &state(0, 0), &[]);
    assert_eq!(bench.stop_ring(0), 37);
    assert_eq!(
        bench.device.calls(),
        [
            Asked::Start(0, 0),
            Asked::Call(0, true),
            Asked::Enabled(0, true),
            Asked::Enabled(0, false),
            Asked::Stop(0),
        ]
    );
    // The kernel resets the device, negotiates anew, and starts all queues.
    bench.set(Req::SET_STATUS, &words(&[0]), &[]);
    bench.set(Req::SET_FEATURES, &words(&[FEATURES | BIT_30]), &[]);
    bench.share_memory();
    for index in 0..4 {
        bench.start_ring(index, 0);
    }
    let starts = bench.device.starts();
    assert_eq!(starts.len(), 4);
    // The first one runs again: a kick is set under it now.
    bench.device.calls();
    let kick = eventfd();
    bench.set(Req::SET_VRING_KICK, &words(&[0]), &[kick.as_raw_fd()]);
    assert_eq!(bench.device.calls(), [Asked::Kick(0, true)]);
}

#[test]
fn stopped_ring_starts_again_where_it_stopped() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(1, 0);
    bench.device.fetched.store(65535, Ordering::Relaxed);
    assert_eq!(bench.stop_ring(1), 65535);
    bench.device.calls();
    let kick = eventfd();
    bench.set(Req::SET_VRING_KICK, &words(&[1]), &[kick.as_raw_fd()]);
    assert_eq!(bench.device.calls(), [Asked::Start(1, 65535)]);
    // Its call descriptor is still the one the VMM gave it.
    assert!(bench.device.starts().pop().unwrap().call.is_some());
}

#[test]
fn get_vring_base_of_a_ring_that_never_started() {
    let mut bench = Bench::negotiated();
    assert_eq!(bench.stop_ring(3), 0);
    bench.set(Req::SET_VRING_BASE, &state(3, 77), &[]);
    assert_eq!(bench.stop_ring(3), 77);
    assert_eq!(bench.stop_ring(3), 77);
    assert!(bench.device.calls().is_empty());
}

#[test]
fn rings_begin_enabled_without_protocol_features() {
    let mut bench = Bench::new();
    bench.negotiate(FEATURES);
    bench.share_memory();
    let kick = eventfd();
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[0]), &[kick.as_raw_fd()]);
    assert!(bench.device.starts().pop().unwrap().enabled);
    // Some front-ends send it without having accepted bit 30.
    bench.device.calls();
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    bench.set(Req::SET_VRING_ENABLE, &state(0, 0), &[]);
    assert_eq!(bench.device.calls(), [Asked::Enabled(0, false)]);
}

#[test]
fn kick_before_enable_is_not_lost() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let kick = eventfd();
    kick.write(1).unwrap();
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[0]), &[kick.as_raw_fd()]);
    let start = bench.device.starts().pop().unwrap();
    assert!(!start.enabled);
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(
        bench.device.calls(),
        [Asked::Start(0, 0), Asked::Enabled(0, true)]
    );
    let mut count = [0; 8];
    let mut theirs = start.kick.unwrap();
    assert_eq!(theirs.read(&mut count).unwrap(), 8);
    assert_eq!(u64::from_ne_bytes(count), 1);
}

#[test]
fn kick_without_descriptor_means_poll() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_CALL, &words(&[NOFD]), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    let start = bench.device.starts().pop().unwrap();
    assert!(start.kick.is_none() && start.call.is_none());
}

#[test]
fn enable_without_base_starts_from_zero() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(bench.device.calls(), [Asked::Start(0, 0)]);
    assert!(bench.device.starts().pop().unwrap().enabled);
}

#[test]
fn every_queue_size_is_checked() {
    let mut bench = Bench::negotiated();
    // QEMU's own export died of 9999; the crates acknowledge 100 and keep 256.
    for num in [0, 3, 100, 512, 9999, 65536 + 128, u32::MAX] {
        assert!(
            !bench.try_set(Req::SET_VRING_NUM, &state(0, num), &[]),
            "{num}"
        );
    }
    for num in [1, 2, 128, 256] {
        assert!(
            bench.try_set(Req::SET_VRING_NUM, &state(0, num), &[]),
            "{num}"
        );
    }
    assert!(!bench.try_set(Req::SET_VRING_BASE, &state(0, 65536), &[]));
}

#[test]
fn every_queue_index_is_checked() {
    let kick = eventfd();
    for index in [4, 200, 255] {
        let mut bench = Bench::negotiated();
        for request in [
            Req::SET_VRING_NUM,
            Req::SET_VRING_BASE,
            Req::SET_VRING_ENABLE,
        ] {
            assert!(
                !bench.try_set(request, &state(index, 1), &[]),
                "{request:?}"
            );
        }
        assert!(!bench.try_set(Req::SET_VRING_ADDR, &addresses(index, 0), &[]));
        for request in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
            let number = words(&[index.into()]);
            assert!(
                !bench.try_set(request, &number, &[kick.as_raw_fd()]),
                "{request:?}"
            );
        }
        // It has a reply of its own, which there is none of: the VMM must not wait for it.
        bench
            .client
            .send(Req::GET_VRING_BASE, NEED_REPLY, &state(index, 0), &[]);
        assert!(matches!(bench.run(), Err(ConnectionError::Refused { .. })));
        assert!(bench.device.calls().is_empty());
    }
}

#[test]
fn refusal_that_cannot_be_told_ends_the_connection() {
    let mut bench = Bench::negotiated();
    bench
        .client
        .send(Req::SET_VRING_NUM, 0, &state(0, 9999), &[]);
    let error = bench.run().unwrap_err();
    assert!(error.to_string().contains("9999"), "{error}");
}

#[test]
fn running_ring_takes_repetitions_and_refuses_changes() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 5);
    bench.device.calls();
    for (request, same, other) in [
        (Req::SET_VRING_NUM, state(0, 128), state(0, 64)),
        (Req::SET_VRING_BASE, state(0, 5), state(0, 6)),
        (Req::SET_VRING_ADDR, addresses(0, 0), addresses(0, 0x100)),
    ] {
        assert!(bench.try_set(request, &same, &[]), "{request:?}");
        assert!(!bench.try_set(request, &other, &[]), "{request:?}");
    }
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert!(!bench.try_set(Req::SET_VRING_ENABLE, &state(0, 2), &[]));
    assert!(bench.device.calls().is_empty());
}

#[test]
fn repeated_messages_change_nothing() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.negotiate(FEATURES | BIT_30);
    bench.share_memory();
    bench.start_ring(0, 0);
    let ring = [Asked::Kick(0, true), Asked::Call(0, true)];
    let calls = bench.device.calls();
    assert_eq!(calls, [&[Asked::Memory(1)], &ring[..]].concat());
    assert_eq!(bench.stop_ring(0), bench.stop_ring(0));
    for _ in 0..2 {
        bench.set(Req::RESET_DEVICE, &[], &[]);
        bench.set(Req::SET_OWNER, &[], &[]);
        bench.set(Req::RESET_OWNER, &[], &[]);
    }
    bench.start_ring(0, 0);
}

#[test]
fn running_ring_takes_new_descriptors() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.device.calls();
    let fd = eventfd();
    for request in [Req::SET_VRING_CALL, Req::SET_VRING_KICK, Req::SET_VRING_ERR] {
        bench.set(request, &words(&[0]), &[fd.as_raw_fd()]);
        bench.set(request, &words(&[NOFD]), &[]);
    }
    assert_eq!(
        bench.device.calls(),
        [
            Asked::Call(0, true),
            Asked::Call(0, false),
            Asked::Kick(0, true),
            Asked::Kick(0, false),
            Asked::Err(0, true),
            Asked::Err(0, false),
        ]
    );
}

#[test]
fn ring_outside_memory_is_refused() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, MEMORY_SIZE - 16), &[]);
    assert!(!bench.try_set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]));
    assert!(bench.device.calls().is_empty());
}

#[test]
fn failed_start_is_told_and_signals_the_error_descriptor() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    *bench.device.start_error.lock().unwrap() = Some("the image is locked".to_owned());
    let err = eventfd();
    bench.set(Req::SET_VRING_ERR, &words(&[0]), &[err.as_raw_fd()]);
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    assert!(!bench.try_set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]));
    assert_eq!(err.read().unwrap(), 1);
    // The next message tries again.
    *bench.device.start_error.lock().unwrap() = None;
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(bench.device.calls(), [Asked::Start(0, 0)]);
}

#[test]
fn full_error_descriptor_does_not_block() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    *bench.device.start_error.lock().unwrap() = Some("no".to_owned());
    let (end, mut full) = UnixStream::pair().unwrap();
    full.set_nonblocking(true).unwrap();
    while full.write(&[0; 4096]).is_ok() {}
    full.set_nonblocking(false).unwrap();
    bench.set(Req::SET_VRING_ERR, &words(&[0]), &[full.as_raw_fd()]);
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    assert!(!bench.try_set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]));
    drop(end);
}

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
fn config_answer_has_exactly_the_size_asked_for() {
    let mut bench = Bench::negotiated();
    let get = |bench: &mut Bench, offset: u32, size: u32| {
        let mut payload = [offset, size, 0].map(u32::to_ne_bytes).concat();
        payload.resize(12 + size as usize, 0xaa);
        bench.client.send(Req::GET_CONFIG, 0, &payload, &[]);
        bench.run().unwrap();
        let (code, reply) = bench.client.reply();
        assert_eq!(code, Req::GET_CONFIG as u32);
        assert_eq!(reply[..4], offset.to_ne_bytes());
        assert_eq!(
            reply.len() - 12,
            u32::from_ne_bytes(reply[4..8].try_into().unwrap()) as usize
        );
        reply[12..].to_vec()
    };
    assert_eq!(get(&mut bench, 0, 4), [0, 1, 2, 3]);
    assert_eq!(get(&mut bench, 0x100, 4), [0, 1, 2, 3]);
    assert_eq!(get(&mut bench, 0x120, 2), [32, 33]);
    assert_eq!(get(&mut bench, 58, 4), [58, 59, 0, 0]);
    assert_eq!(get(&mut bench, 0, 256).len(), 256);
    // A failure is an empty answer, and the connection lives on.
    *bench.device.config_error.lock().unwrap() = Some("no".to_owned());
    assert!(get(&mut bench, 0, 4).is_empty());
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
}

#[test]
fn config_is_written_where_it_may_be() {
    let mut bench = Bench::negotiated();
    let write = |offset: u32, data: &[u8]| {
        let mut payload = [offset, data.len() as u32, 0]
            .map(u32::to_ne_bytes)
            .concat();
        payload.extend(data);
        payload
    };
    assert!(bench.try_set(Req::SET_CONFIG, &write(32, &[1]), &[]));
    assert!(bench.try_set(Req::SET_CONFIG, &write(0x120, &[0]), &[]));
    assert!(!bench.try_set(Req::SET_CONFIG, &write(0, &[0; 8]), &[]));
    assert_eq!(
        bench.device.calls(),
        [Asked::SetConfig(32, vec![1]), Asked::SetConfig(32, vec![0])]
    );
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut bench = Bench::negotiated();
    assert!(!bench.try_set(Req::SET_FEATURES, &words(&[FEATURES | 1 << 26]), &[]));
    assert!(!bench.try_set(
        Req::SET_PROTOCOL_FEATURES,
        &words(&[PROTOCOL | 1 << 12]),
        &[]
    ));
}

#[test]
fn features_stay_while_a_ring_runs() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.set(Req::SET_FEATURES, &words(&[FEATURES | BIT_30]), &[]);
    assert!(!bench.try_set(Req::SET_FEATURES, &words(&[1 << 32 | BIT_30]), &[]));
    bench.stop_ring(0);
    bench.set(Req::SET_FEATURES, &words(&[1 << 32 | BIT_30]), &[]);
}

#[test]
fn status_is_kept_and_zero_resets() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.set(Req::SET_STATUS, &words(&[0xf]), &[]);
    assert_eq!(bench.get(Req::GET_STATUS), 0xf);
    // FEATURES_OK does not stay when the features were refused.
    assert!(!bench.try_set(Req::SET_FEATURES, &words(&[1 << 60]), &[]));
    bench.set(Req::SET_STATUS, &words(&[0xb]), &[]);
    assert_eq!(bench.get(Req::GET_STATUS), 3);
    assert!(!bench.try_set(Req::SET_STATUS, &words(&[0x1ff]), &[]));

    bench.start_ring(0, 0);
    bench.device.calls();
    bench.set(Req::SET_STATUS, &words(&[0]), &[]);
    assert_eq!(bench.get(Req::GET_STATUS), 0);
    assert_eq!(bench.device.calls(), [Asked::Reset]);
}

#[test]
fn status_without_negotiation_is_refused() {
    let mut bench = Bench::negotiated();
    let without = PROTOCOL & !(1 << 16);
    bench.set(Req::SET_PROTOCOL_FEATURES, &words(&[without]), &[]);
    assert!(!bench.try_set(Req::SET_STATUS, &words(&[1]), &[]));
    bench.client.send(Req::GET_STATUS, 0, &[], &[]);
    assert!(matches!(bench.run(), Err(ConnectionError::Refused { .. })));
}

#[test]
fn device_reset_begins_anew_on_the_same_connection() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 3);
    bench.start_ring(1, 3);
    bench.device.calls();
    bench.set(Req::RESET_DEVICE, &[], &[]);
    assert_eq!(bench.device.calls(), [Asked::Reset]);
    // Nothing of the old ring is left but its call descriptor.
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    assert!(bench.device.calls().is_empty());
    bench.start_ring(0, 0);
    let start = bench.device.starts().pop().unwrap();
    assert!(!start.enabled, "disabled until it is enabled again");
    assert_eq!(start.config.next_avail, 0);
}

#[test]
fn unknown_messages_are_answered_with_an_error() {
    let mut bench = Bench::negotiated();
    let fd = eventfd();
    // From the protocol but not for us, and from nowhere; with payload, with a descriptor.
    for request in [19u32, 22, 23, 28, 35, 45, 1000, u32::MAX] {
        bench
            .client
            .send_raw(request, 1 | NEED_REPLY, 24, &[0; 24], &[fd.as_raw_fd()]);
        bench.run().unwrap();
        let (code, payload) = bench.client.reply();
        assert_eq!(code, request);
        assert_eq!(payload, 1u64.to_ne_bytes());
    }
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
    // Without need_reply the VMM cannot be told.
    bench.client.send_raw(1000, 1, 0, &[], &[]);
    assert!(matches!(bench.run(), Err(ConnectionError::Refused { .. })));
}

#[test]
fn messages_without_their_feature_end_the_connection_or_are_refused() {
    let inflight = [words(&[0x1000, 0]), vec![4, 0, 128, 0, 0, 0, 0, 0]].concat();
    let log = words(&[0x1000, 0]);
    let fd = memfd(0x1000);
    for (request, payload, fds) in [
        (Req::GET_INFLIGHT_FD, &inflight, vec![]),
        (Req::SET_INFLIGHT_FD, &inflight, vec![fd.as_raw_fd()]),
        (Req::SET_LOG_BASE, &log, vec![fd.as_raw_fd()]),
        (Req::GET_SHMEM_CONFIG, &vec![], vec![]),
        (Req::SET_BACKEND_REQ_FD, &vec![], vec![fd.as_raw_fd()]),
    ] {
        let mut bench = Bench::negotiated();
        bench.client.send(request, NEED_REPLY, payload, &fds);
        assert!(bench.run().is_err(), "{request:?}");
        assert!(bench.client.is_silent());
    }
}

#[test]
fn message_in_pieces_is_waited_for() {
    let mut bench = Bench::negotiated();
    let message = [
        8u32.to_ne_bytes(),
        (1 | NEED_REPLY).to_ne_bytes(),
        8u32.to_ne_bytes(),
        1u32.to_ne_bytes(),
        256u32.to_ne_bytes(),
    ]
    .concat();
    for byte in &message {
        assert!(bench.client.is_silent());
        bench.client.send_bytes(&[*byte]);
        assert_eq!(bench.run().unwrap(), Progress::Idle);
    }
    assert_eq!(bench.client.reply_u64(Req::SET_VRING_NUM), 0);
}

#[test]
fn header_and_payload_in_two_writes_with_descriptor() {
    let mut bench = Bench::negotiated();
    let fd = eventfd();
    let kick = Req::SET_VRING_KICK as u32;
    bench
        .client
        .send_raw(kick, 1 | NEED_REPLY, 8, &[], &[fd.as_raw_fd()]);
    assert_eq!(bench.run().unwrap(), Progress::Idle);
    bench.client.send_bytes(&words(&[0]));
    assert_eq!(bench.run().unwrap(), Progress::Idle);
    assert_eq!(bench.client.reply_u64(Req::SET_VRING_KICK), 0);
}

#[test]
fn message_cut_off_by_the_end_of_the_connection() {
    for len in [1, 11, 12, 19] {
        let mut bench = Bench::negotiated();
        let message = [8u32, 1, 8, 0, 128].map(u32::to_ne_bytes).concat();
        bench.client.send_bytes(&message[..len]);
        bench
            .client
            .sock
            .shutdown(std::net::Shutdown::Write)
            .unwrap();
        assert!(matches!(bench.run(), Err(ConnectionError::Truncated)));
    }
}

#[test]
fn payload_of_the_wrong_length_ends_the_connection() {
    for (request, len) in [
        (Req::SET_FEATURES, 4),
        (Req::SET_VRING_NUM, 12),
        (Req::SET_VRING_ADDR, 8),
        (Req::SET_MEM_TABLE, 4),
        (Req::SET_MEM_TABLE, 40 + 8),
        (Req::GET_CONFIG, 4),
        (Req::SET_STATUS, 4),
        (Req::GET_FEATURES, 8),
        (Req::SET_VRING_KICK, 4),
    ] {
        let mut bench = Bench::negotiated();
        bench.client.send(request, 0, &vec![1; len], &[]);
        assert!(bench.run().is_err(), "{request:?} with {len} bytes");
    }
}

#[test]
fn oversized_message_ends_the_connection() {
    for size in [4097, 1 << 20, u32::MAX] {
        let mut bench = Bench::negotiated();
        bench.client.send_raw(24, 1, size, &[], &[]);
        assert!(matches!(
            bench.run(),
            Err(ConnectionError::Oversized { size: told, .. }) if told == size
        ));
    }
}

#[test]
fn wrong_version_reply_and_unknown_flags_end_the_connection() {
    for flags in [0, 2, 3, 1 | 4, 1 | 0x10, u32::MAX] {
        let mut bench = Bench::negotiated();
        bench.client.send_raw(1, flags, 0, &[], &[]);
        assert!(matches!(bench.run(), Err(ConnectionError::Flags { .. })));
    }
}

#[test]
fn wrong_number_of_descriptors_ends_the_connection() {
    let fd = eventfd();
    let region = add_region(0, 0x1000, USER_BASE, 0);
    let mut table = state(1, 0);
    table.extend(words(&[0, 0x1000, USER_BASE, 0]));
    for (request, payload, fds) in [
        (Req::SET_VRING_KICK, words(&[0]), 0),
        (Req::SET_VRING_KICK, words(&[0]), 2),
        (Req::SET_VRING_CALL, words(&[NOFD]), 1),
        (Req::ADD_MEM_REG, region.clone(), 0),
        (Req::ADD_MEM_REG, region, 2),
        (Req::SET_MEM_TABLE, table.clone(), 0),
        (Req::SET_MEM_TABLE, table, 2),
        (Req::GET_FEATURES, vec![], 1),
        (Req::SET_VRING_NUM, state(0, 128), 32),
    ] {
        let mut bench = Bench::negotiated();
        bench
            .client
            .send(request, 0, &payload, &vec![fd.as_raw_fd(); fds]);
        assert!(bench.run().is_err(), "{request:?} with {fds}");
    }
}

#[test]
fn more_descriptors_than_a_message_can_have_do_not_hang() {
    // The vhost crate would wait for ever for a header that it has thrown away.
    let fd = eventfd();
    for count in [33, 253] {
        let mut bench = Bench::negotiated();
        bench
            .client
            .send(Req::GET_FEATURES, 0, &[], &vec![fd.as_raw_fd(); count]);
        assert!(matches!(bench.run(), Err(ConnectionError::TooManyFds)));
    }
}

#[test]
fn vmm_that_reads_no_replies_does_not_block() {
    let mut bench = Bench::negotiated();
    bench.client.sock.set_nonblocking(true).unwrap();
    let request = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
    let mut sent = 0;
    // Whoever blocks here hangs the test.
    while bench.client.sock.write(&request).is_ok_and(|len| len == 12) {
        sent += 1;
        assert_eq!(bench.run().unwrap(), Progress::Idle);
    }
    bench.client.sock.set_nonblocking(false).unwrap();
    for _ in 0..sent {
        bench.run().unwrap();
        bench.client.reply_u64(Req::GET_FEATURES);
    }
}

#[test]
fn every_byte_of_a_message_may_be_wrong() {
    // A small fuzzer: no message may panic, hang or start a ring that is not there.
    let mut seed = 1u32;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed
    };
    let fd = memfd(0x10000);
    for _ in 0..3000 {
        let mut bench = Bench::negotiated();
        bench.share_memory();
        for _ in 0..8 {
            let size = [0, 8, 8, 8, 12, 16, 24, 40, 40][random() as usize % 9];
            let payload: Vec<u8> = (0..size)
                .map(|_| {
                    if random() % 3 == 0 {
                        random() as u8
                    } else {
                        (random() % 3) as u8
                    }
                })
                .collect();
            let fds = vec![fd.as_raw_fd(); [0, 0, 1, 1, 2][random() as usize % 5]];
            let flags = 1 | (random() & 1) << 3;
            bench
                .client
                .send_raw(random() % 48, flags, size, &payload, &fds);
            if bench.run().is_err() {
                break;
            }
        }
        for start in bench.device.starts() {
            assert!(start.memory.host_ptr(start.config.desc_table, 16).is_some());
        }
    }
}

#[test]
fn migration_target_whose_source_never_hands_over_starts_nothing() {
    let mut bench = Bench::negotiated();
    bench.get(Req::GET_QUEUE_NUM);
    let Bench {
        client,
        mut connection,
        device,
    } = bench;
    drop(client);
    assert_eq!(connection.process().unwrap(), Progress::Closed);
    drop(connection);
    assert_eq!(device.calls(), [Asked::Reset]);
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

#[test]
fn drain_stops_every_ring_with_its_requests_answered() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.start_ring(2, 0);
    bench.device.calls();
    bench.connection.drain();
    assert_eq!(bench.device.calls(), [Asked::Stop(0), Asked::Stop(2)]);
}

#[test]
fn no_descriptor_is_leaked() {
    if !is_alone() {
        let child = run_alone("vhost_user::tests::no_descriptor_is_leaked");
        let text = String::from_utf8_lossy(&child.stdout);
        assert!(
            child.status.success() && text.contains("1 passed"),
            "{text}"
        );
        return;
    }
    let file = memfd(MEMORY_SIZE);
    let spare = eventfd();
    let session = |how: u32| {
        let mut bench = Bench::negotiated();
        bench.share_memory();
        for index in 0..4 {
            bench.start_ring(index, 0);
            bench.start_ring(index, 0);
        }
        let region = add_region(1 << 32, 0x1000, USER_BASE + (1 << 32), 0);
        bench.set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
        bench.try_set(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
        bench.set(Req::REM_MEM_REG, &region, &[file.as_raw_fd()]);
        bench.stop_ring(0);
        if how % 2 == 0 {
            bench.set(Req::RESET_DEVICE, &[], &[]);
        }
        // Descriptors that nobody asked for.
        bench
            .client
            .send_raw(1000, 9, 8, &[0; 8], &[spare.as_raw_fd(); 32]);
        bench.run().unwrap();
        let fds = [1, 2, 33, 253][how as usize % 4];
        bench
            .client
            .send(Req::GET_FEATURES, 0, &[], &vec![spare.as_raw_fd(); fds]);
        assert!(bench.run().is_err());
    };
    (0..4).for_each(session);
    let before = open_fds();
    (0..40).for_each(session);
    assert_eq!(open_fds(), before);
    // The file's own position was never touched: the memory was mapped, not read.
    assert_eq!((&file).stream_position().unwrap(), 0);
}
