//! The transfer of the device's internal state.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::*;

pub(super) const SAVE: u32 = 0;
pub(super) const LOAD: u32 = 1;

/// A pipe: the end to read from, the end to write to.
pub(super) fn pipe() -> (File, File) {
    let (reader, writer) = UnixStream::pair().unwrap();
    reader.shutdown(std::net::Shutdown::Write).unwrap();
    let file = |sock| File::from(OwnedFd::from(sock));
    (file(reader), file(writer))
}

pub(super) fn begin(bench: &mut Bench, direction: u32, file: &File) -> u64 {
    let payload = state(direction, 0);
    let fd = [file.as_raw_fd()];
    bench
        .client
        .send(Req::SET_DEVICE_STATE_FD, 0, &payload, &fd);
    assert_eq!(bench.run().unwrap(), Progress::Idle);
    bench.client.reply_u64(Req::SET_DEVICE_STATE_FD)
}

/// Loads these bytes; whether they were taken.
fn load(bench: &mut Bench, bytes: &[u8]) -> bool {
    let (reader, mut writer) = pipe();
    assert_eq!(begin(bench, LOAD, &reader), NOFD);
    writer.write_all(bytes).unwrap();
    drop((reader, writer));
    bench.get(Req::CHECK_DEVICE_STATE) == 0
}

fn save(bench: &mut Bench) -> Vec<u8> {
    let (mut reader, writer) = pipe();
    assert_eq!(begin(bench, SAVE, &writer), NOFD);
    drop(writer);
    let mut bytes = Vec::new();
    // The device has closed its end.
    reader.read_to_end(&mut bytes).unwrap();
    assert_eq!(bench.get(Req::CHECK_DEVICE_STATE), 0);
    bytes
}

#[test]
fn what_the_driver_set_is_there_after_a_transfer() {
    let mut source = Bench::negotiated();
    source.set(Req::SET_STATUS, &words(&[0xf]), &[]);
    let bytes = save(&mut source);
    assert!(bytes.len() < 4096, "it fits into any pipe");

    let mut target = Bench::negotiated();
    assert!(load(&mut target, &bytes));
    let calls = [Asked::Features(FEATURES), Asked::SetConfig(32, vec![0])];
    assert_eq!(target.device.calls(), calls);
    assert_eq!(target.get(Req::GET_STATUS), 0xf);
    assert_eq!(save(&mut target), bytes);
}

#[test]
fn a_state_that_makes_no_sense_is_refused_and_nothing_of_it_taken() {
    let mut bench = Bench::negotiated();
    let good = save(&mut bench);
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    bench.device.calls();
    for bytes in [
        vec![],
        good[1..].to_vec(),
        [&good[..], &[0]].concat(),
        vec![0; 100_000],
        changed(0, 0),
        changed(8, 2),
        // A feature that is not offered here; a mode that is none; bytes for later versions.
        changed(19, 0x80),
        changed(20, 2),
        changed(31, 1),
    ] {
        assert!(!load(&mut bench, &bytes), "{bytes:?}");
        assert!(bench.device.calls().is_empty());
    }
    assert!(load(&mut bench, &good));
    // Checked once.
    assert_ne!(bench.get(Req::CHECK_DEVICE_STATE), 0);
}

#[test]
fn a_state_is_not_transferred_while_a_ring_runs_or_unasked_for() {
    let mut bench = Bench::negotiated();
    assert_ne!(bench.get(Req::CHECK_DEVICE_STATE), 0);
    bench.share_memory();
    bench.start_ring(0, 0);
    let (reader, writer) = pipe();
    assert_eq!(begin(&mut bench, SAVE, &writer), NOFD | 1);
    assert_eq!(begin(&mut bench, LOAD, &reader), NOFD | 1);
    assert_ne!(bench.get(Req::CHECK_DEVICE_STATE), 0);
    bench.stop_ring(0);
    let without = words(&[PROTOCOL & !(1 << 19)]);
    bench.set(Req::SET_PROTOCOL_FEATURES, &without, &[]);
    assert_eq!(begin(&mut bench, SAVE, &writer), NOFD | 1);
}

#[test]
fn a_pipe_without_end_does_not_hold_the_disk_for_ever() {
    let mut bench = Bench::negotiated();
    let (reader, _writer) = pipe();
    assert_eq!(begin(&mut bench, LOAD, &reader), NOFD);
    assert_ne!(bench.get(Req::CHECK_DEVICE_STATE), 0);
    // Nobody reads, and there is no room.
    let (_reader, mut writer) = pipe();
    let sock = UnixStream::from(OwnedFd::from(writer.try_clone().unwrap()));
    sock.set_nonblocking(true).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    sock.set_nonblocking(false).unwrap();
    assert_eq!(begin(&mut bench, SAVE, &writer), NOFD | 1);
    // Nobody is there any more.
    let (reader, writer) = pipe();
    drop(reader);
    assert_eq!(begin(&mut bench, SAVE, &writer), NOFD | 1);
    assert_ne!(bench.get(Req::CHECK_DEVICE_STATE), 0);
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
}
