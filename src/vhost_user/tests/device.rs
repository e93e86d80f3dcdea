//! The handshake, features, configuration, status, reset, and the end.

use super::*;

#[test]
fn qemu_handshake_offers_exactly_what_is_served() {
    let mut bench = Bench::negotiated();
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
    assert_eq!(bench.get(Req::GET_MAX_MEM_SLOTS), 509);
    assert!(bench.device.calls().is_empty());
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
    // All of it with the write cache's mode in it: in a migration, and not from a driver.
    let mut all: Vec<u8> = (0..60).collect();
    all[32] = 1;
    assert!(!bench.try_set(Req::SET_CONFIG, &write(0, &all), &[]));
    let write = |offset: u32, data: &[u8]| {
        let mut payload = write(offset, data);
        payload[8] = 1;
        payload
    };
    assert!(bench.try_set(Req::SET_CONFIG, &write(0, &all), &[]));
    assert!(bench.try_set(Req::SET_CONFIG, &write(30, &all[30..40]), &[]));
    all[8] ^= 1;
    assert!(!bench.try_set(Req::SET_CONFIG, &write(0, &all), &[]));
    assert_eq!(
        bench.device.calls(),
        [1, 0, 1, 1].map(|mode| Asked::SetConfig(32, vec![mode]))
    );
}

#[test]
fn features_that_cannot_be_ignored_are_refused() {
    let mut bench = Bench::negotiated();
    for bit in [33, 34, 35] {
        let features = words(&[FEATURES | BIT_30 | 1 << bit]);
        assert!(!bench.try_set(Req::SET_FEATURES, &features, &[]), "{bit}");
    }
    let protocol = words(&[PROTOCOL | 1 << 17]);
    assert!(!bench.try_set(Req::SET_PROTOCOL_FEATURES, &protocol, &[]));
    assert!(bench.device.calls().is_empty());
}

#[test]
fn features_that_qemu_adds_of_its_own_accord_are_ignored() {
    let mut bench = Bench::negotiated();
    let features = words(&[FEATURES | BIT_30 | 1 << 24 | 1 << 27 | 1 << 40]);
    bench.set(Req::SET_FEATURES, &features, &[]);
    assert_eq!(bench.device.calls(), [Asked::Features(FEATURES)]);
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
    assert!(!bench.try_set(Req::SET_FEATURES, &words(&[1 << 34]), &[]));
    bench.set(Req::SET_STATUS, &words(&[0xb]), &[]);
    assert_eq!(bench.get(Req::GET_STATUS), 3);
    assert!(!bench.try_set(Req::SET_STATUS, &words(&[0x1ff]), &[]));

    bench.start_ring(0, 0);
    bench.device.calls();
    bench.set(Req::SET_STATUS, &words(&[0]), &[]);
    assert_eq!(bench.get(Req::GET_STATUS), 0);
    assert_eq!(bench.device.calls(), [Asked::Reset, Asked::Features(0)]);
}

#[test]
fn status_begins_at_zero_and_goes_back_there_by_either_reset() {
    let mut bench = Bench::negotiated();
    assert_eq!(bench.get(Req::GET_STATUS), 0);
    for reset in [Req::RESET_DEVICE, Req::SET_STATUS] {
        let payload = if reset == Req::SET_STATUS {
            words(&[0])
        } else {
            Vec::new()
        };
        assert!(!bench.try_set(Req::SET_FEATURES, &words(&[1 << 34]), &[]));
        bench.set(Req::SET_STATUS, &words(&[0xb]), &[]);
        assert_eq!(bench.get(Req::GET_STATUS), 3);
        bench.set(reset, &payload, &[]);
        assert_eq!(bench.get(Req::GET_STATUS), 0);
        // The refusal is forgotten with the rest.
        bench.set(Req::SET_STATUS, &words(&[0xb]), &[]);
        assert_eq!(bench.get(Req::GET_STATUS), 0xb);
        // DRIVER_OK, DEVICE_NEEDS_RESET and FAILED are the VMM's to set, and are kept.
        bench.set(Req::SET_STATUS, &words(&[0xcf]), &[]);
        assert_eq!(bench.get(Req::GET_STATUS), 0xcf);
    }
}

#[test]
fn status_is_no_payload_of_a_get_and_64_bits_of_a_set() {
    for (request, len) in [
        (Req::GET_STATUS, 8),
        (Req::SET_STATUS, 0),
        (Req::SET_STATUS, 1),
        (Req::SET_STATUS, 16),
    ] {
        let mut bench = Bench::negotiated();
        bench.client.send(request, NEED_REPLY, &vec![0; len], &[]);
        let ended = bench.run();
        assert!(
            matches!(ended, Err(ConnectionError::Protocol { .. })),
            "{request:?} of {len} bytes: {ended:?}"
        );
    }
}

#[test]
fn features_are_negotiated_anew_after_a_reset_and_bit_30_stays() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.start_ring(1, 0);
    let start = bench.device.starts().pop().unwrap();
    assert_eq!(start.features, FEATURES);
    bench.device.calls();
    bench.set(Req::RESET_DEVICE, &[], &[]);
    assert_eq!(bench.device.calls(), [Asked::Reset, Asked::Features(0)]);
    // Other features than before: nothing runs that would stand in the way.
    let few = 1 << 32;
    bench.set(Req::SET_FEATURES, &words(&[few | BIT_30]), &[]);
    bench.start_ring(0, 0);
    let start = bench.device.starts().pop().unwrap();
    assert_eq!(start.features, few);
    assert!(!start.config.event_idx && !start.config.indirect);
    // A ring that starts before anything was negotiated has no features, and waits to be enabled: bit 30 and
    // the protocol features belong to the connection.
    bench.set(Req::RESET_DEVICE, &[], &[]);
    bench.start_ring(0, 0);
    let start = bench.device.starts().pop().unwrap();
    assert_eq!(start.features, 0);
    assert!(!start.enabled);
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
    assert_eq!(bench.device.calls(), [Asked::Reset, Asked::Features(0)]);
    // Nothing of the old ring is left but its call and error descriptors, which QEMU sets once.
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    assert!(bench.device.calls().is_empty());
    bench.start_ring(0, 0);
    let start = bench.device.starts().pop().unwrap();
    assert!(!start.enabled, "disabled until it is enabled again");
    assert_eq!(start.config.base, 0);

    bench.set(Req::RESET_DEVICE, &[], &[]);
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    assert!(bench.device.starts().pop().unwrap().call.is_some());
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
fn drain_stops_every_ring_with_its_requests_answered() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.start_ring(2, 0);
    bench.device.calls();
    bench.connection.drain();
    assert_eq!(bench.device.calls(), [Asked::Stop(0), Asked::Stop(2)]);
}
