//! When rings start, stop and change.

use super::*;

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
            assert_eq!((config.size, config.base), (128, 7));
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
