//! The dirty log: when it is in effect, and what is refused.

use super::*;

/// Bytes of a log for the test guest.
pub(super) const LOG: u64 = MEMORY_SIZE / 0x1000 / 8;
pub(super) const ON: u64 = FEATURES | BIT_30 | LOG_ALL;
pub(super) const OFF: u64 = FEATURES | BIT_30;

/// Payload of a SET_VRING_ADDR for ring `index` with its used ring logged at `log`.
pub(super) fn logged(index: u32, log: u64) -> Vec<u8> {
    let mut bytes = addresses(index, 0);
    bytes[4..8].copy_from_slice(&1u32.to_ne_bytes());
    bytes[32..40].copy_from_slice(&log.to_ne_bytes());
    bytes
}

/// SET_LOG_BASE; the answer is the payload sent back.
pub(super) fn set_log_base(bench: &mut Bench, size: u64, offset: u64, file: &std::fs::File) {
    let payload = words(&[size, offset]);
    bench
        .client
        .send(Req::SET_LOG_BASE, 0, &payload, &[file.as_raw_fd()]);
    assert_eq!(bench.run().unwrap(), Progress::Idle);
    assert_eq!(bench.client.reply(), (Req::SET_LOG_BASE as u32, payload));
}

pub(super) fn features(bench: &mut Bench, features: u64) -> Vec<Asked> {
    bench.set(Req::SET_FEATURES, &words(&[features]), &[]);
    let calls = bench.device.calls();
    let is_log = |call: &Asked| matches!(call, Asked::Log(_));
    calls.into_iter().filter(is_log).collect()
}

fn running() -> Bench {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    bench.device.calls();
    bench
}

#[test]
fn logging_begins_and_ends_while_rings_run_as_qemu_has_it() {
    let mut bench = running();
    let file = memfd(LOG);
    set_log_base(&mut bench, LOG, 0, &file);
    // Memory alone is no wish.
    assert!(bench.device.calls().is_empty());
    assert_eq!(features(&mut bench, ON), [Asked::Log(true)]);
    bench.set(Req::SET_VRING_ADDR, &logged(0, 0x2000), &[]);
    assert_eq!(bench.device.calls(), [Asked::UsedLog(0, Some(0x2000))]);
    // What is marked is in the VMM's memory.
    bench.device.log().unwrap().mark(0x1000, 1).unwrap();
    let mut bits = [0; 1];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bits, 0).unwrap();
    assert_eq!(bits, [2]);
    // The migration is cancelled: no ring stops.
    assert_eq!(features(&mut bench, OFF), [Asked::Log(false)]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    assert_eq!(bench.device.calls(), [Asked::UsedLog(0, None)]);
    // And begun again, with the memory that is there.
    assert_eq!(features(&mut bench, ON), [Asked::Log(true)]);
    assert_eq!(features(&mut bench, ON), []);
}

#[test]
fn features_may_come_before_the_memory_and_rings_after_both() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    assert_eq!(features(&mut bench, ON), []);
    let file = memfd(LOG + 0x1000);
    set_log_base(&mut bench, LOG, 0x1000, &file);
    assert_eq!(bench.device.calls(), [Asked::Log(true)]);
    bench.start_ring(1, 0);
    assert!(bench.device.starts().pop().unwrap().used_log.is_none());
    bench.stop_ring(1);
    bench.set(Req::SET_VRING_ADDR, &logged(1, 0x5000), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD | 1]), &[]);
    let start = bench.device.starts().pop().unwrap();
    assert_eq!(start.used_log, Some(0x5000));
    // The driver did not negotiate what is the session's.
    assert_eq!(start.features, FEATURES);
}

#[test]
fn a_log_is_replaced_while_it_is_in_use_as_when_memory_is_plugged() {
    let mut bench = running();
    let (old, new) = (memfd(LOG), memfd(2 * LOG));
    set_log_base(&mut bench, LOG, 0, &old);
    features(&mut bench, ON);
    set_log_base(&mut bench, 2 * LOG, 0, &new);
    assert_eq!(bench.device.calls(), [Asked::Log(true)]);
    bench.device.log().unwrap().mark(MEMORY_SIZE, 1).unwrap();
    let bytes = |file: &std::fs::File, at: u64| {
        let mut bytes = [0; 1];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, at).unwrap();
        bytes[0]
    };
    assert_eq!(bytes(&new, LOG), 1);
    let plugged = memfd(MEMORY_SIZE);
    let region = add_region(MEMORY_SIZE, MEMORY_SIZE, USER_BASE + MEMORY_SIZE, 0);
    bench.set(Req::ADD_MEM_REG, &region, &[plugged.as_raw_fd()]);
    assert_eq!(bench.device.calls(), [Asked::Memory(2)]);
}

#[test]
fn other_features_stay_while_a_ring_runs_with_a_log() {
    let mut bench = running();
    set_log_base(&mut bench, LOG, 0, &memfd(LOG));
    let fewer = words(&[ON & !(1 << 9)]);
    assert!(!bench.try_set(Req::SET_FEATURES, &fewer, &[]));
    assert!(bench.device.calls().is_empty());
    assert_eq!(features(&mut bench, ON), [Asked::Log(true)]);
    // Addresses stay, wherever they are logged.
    let mut moved = logged(0, 0x2000);
    moved[8] ^= 0x10;
    assert!(!bench.try_set(Req::SET_VRING_ADDR, &moved, &[]));
    assert!(bench.device.calls().is_empty());
}

#[test]
fn a_log_that_does_not_reach_all_memory_is_refused() {
    for (size, offset, len) in [
        // Too short for guest memory; shorter than it says; nothing.
        (LOG - 1, 0, LOG),
        (LOG, 0, LOG - 1),
        (LOG, 8, LOG),
    ] {
        let mut bench = running();
        let file = memfd(len);
        let payload = words(&[size, offset]);
        let fd = [file.as_raw_fd()];
        bench.client.send(Req::SET_LOG_BASE, 0, &payload, &fd);
        // Its answer can say nothing but yes: the VMM must not go on with the migration.
        assert!(matches!(bench.run(), Err(ConnectionError::Refused { .. })));
        assert!(bench.device.calls().is_empty());
    }
}

#[test]
fn the_log_ends_with_the_connection_and_not_with_a_reset() {
    let mut bench = running();
    set_log_base(&mut bench, LOG, 0, &memfd(LOG));
    features(&mut bench, ON);
    bench.set(Req::RESET_DEVICE, &[], &[]);
    assert_eq!(bench.device.calls(), [Asked::Reset, Asked::Features(0)]);
    let device = bench.device.clone();
    drop(bench);
    assert_eq!(device.calls(), [Asked::Reset, Asked::Log(false)]);
}

#[test]
fn a_log_descriptor_is_taken_and_not_needed() {
    let mut bench = Bench::negotiated();
    let (reader, mut writer) = UnixStream::pair().unwrap();
    bench.set(Req::SET_LOG_FD, &[], &[reader.as_raw_fd()]);
    drop(reader);
    // Nobody else has it open.
    assert!(writer.write(&[0]).is_err());
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
}
