//! Messages that are broken, unknown, unexpected or not read.

use super::*;

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
fn unknown_messages_are_answered_with_an_error() {
    let mut bench = Bench::negotiated();
    let fd = eventfd();
    // From the protocol but not for us, and from nowhere; with payload, with a descriptor.
    for request in [19u32, 22, 23, 28, 35, 46, 1000, u32::MAX] {
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
    ] {
        let mut bench = Bench::negotiated();
        let few = words(&[PROTOCOL & (1 | 1 << 3)]);
        bench.set(Req::SET_PROTOCOL_FEATURES, &few, &[]);
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
fn no_descriptor_is_leaked() {
    if !alone("vhost_user::tests::messages::no_descriptor_is_leaked") {
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
