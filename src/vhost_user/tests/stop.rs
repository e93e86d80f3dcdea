//! Rings that stop with requests in flight left to whoever serves them next.

use super::*;

const SHMFD: u64 = 1 << 12;
const INFLIGHT: u64 = 1 << 20;
const SKIP_DRAIN: u64 = 1 << 23;
/// GET_VRING_BASE_SKIP_DRAIN.
const SKIP: u32 = 45;

/// A connection with ring 1 running, with these of the three features above.
fn running(features: u64) -> Bench {
    let mut bench = Bench::negotiated();
    let others = PROTOCOL & !(SHMFD | INFLIGHT | SKIP_DRAIN);
    let protocol = words(&[others | features]);
    bench.set(Req::SET_PROTOCOL_FEATURES, &protocol, &[]);
    bench.share_memory();
    if features & SHMFD != 0 {
        let file = memfd(1 << 16);
        let mut payload = words(&[1 << 16, 0]);
        payload.extend([4u16, 128, 0, 0].map(u16::to_ne_bytes).concat());
        bench.set(Req::SET_INFLIGHT_FD, &payload, &[file.as_raw_fd()]);
    }
    bench.start_ring(1, 0);
    bench.device.fetched.store(300, Ordering::Relaxed);
    bench.device.calls();
    bench
}

/// GET_VRING_BASE_SKIP_DRAIN; the base.
fn skip(bench: &mut Bench, index: u32) -> u32 {
    bench.client.send_raw(SKIP, 1, 8, &state(index, 0), &[]);
    assert_eq!(bench.run().unwrap(), Progress::Idle);
    let (code, payload) = bench.client.reply();
    assert_eq!((code, &payload[..4]), (SKIP, &index.to_ne_bytes()[..]));
    u32::from_ne_bytes(payload[4..].try_into().unwrap())
}

#[test]
fn the_message_of_its_own_suspends_and_the_old_one_completes() {
    for also in [0, INFLIGHT] {
        let mut bench = running(SHMFD | SKIP_DRAIN | also);
        assert_eq!(skip(&mut bench, 1), 300);
        assert_eq!(bench.device.calls(), [Asked::Suspend(1)]);
        // Stopped already, and one that never ran.
        assert_eq!((skip(&mut bench, 1), skip(&mut bench, 2)), (300, 0));
        assert!(bench.device.calls().is_empty());
        // It goes on with the region that is there.
        bench.device.starts();
        bench.start_ring(1, 300);
        assert!(bench.device.starts().pop().unwrap().inflight.is_some());
        bench.device.calls();
        assert_eq!(bench.stop_ring(1), 300);
        assert_eq!(bench.device.calls(), [Asked::Stop(1)]);
    }
}

#[test]
fn the_older_feature_alone_suspends_at_every_stop() {
    let mut bench = running(SHMFD | INFLIGHT);
    assert_eq!(bench.stop_ring(1), 300);
    assert_eq!(bench.device.calls(), [Asked::Suspend(1)]);
}

#[test]
fn without_a_region_requests_are_completed() {
    for features in [INFLIGHT, INFLIGHT | SKIP_DRAIN] {
        let mut bench = running(features);
        bench.stop_ring(1);
        assert_eq!(bench.device.calls(), [Asked::Stop(1)]);
    }
    let mut bench = running(SKIP_DRAIN);
    skip(&mut bench, 1);
    assert_eq!(bench.device.calls(), [Asked::Stop(1)]);
}

#[test]
fn the_message_is_refused_where_it_was_not_negotiated_or_makes_no_sense() {
    let mut bench = running(SHMFD | INFLIGHT);
    bench
        .client
        .send_raw(SKIP, 1 | NEED_REPLY, 8, &state(1, 0), &[]);
    assert!(matches!(bench.run(), Err(ConnectionError::Refused { .. })));
    for (payload, size) in [(state(4, 0), 8), (vec![0; 4], 4), (vec![0; 40], 40)] {
        let mut bench = running(SHMFD | SKIP_DRAIN);
        bench.client.send_raw(SKIP, 1, size, &payload, &[]);
        assert!(bench.run().is_err());
        assert!(bench.device.calls().is_empty());
    }
}

#[test]
fn a_drain_for_the_end_completes_whatever_was_negotiated() {
    let mut bench = running(SHMFD | INFLIGHT | SKIP_DRAIN);
    bench.connection.drain();
    assert_eq!(bench.device.calls(), [Asked::Stop(1)]);
}
