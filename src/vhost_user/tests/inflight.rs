//! The inflight region: who makes it, who keeps it, and when it is in use.

use std::fs::File;

use super::*;
use crate::virtio::inflight::InflightLayout;

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD, with the padding that QEMU sends.
fn inflight(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = words(&[size, offset]);
    payload.extend([queues, queue_size, 0, 0].map(u16::to_ne_bytes).concat());
    payload
}

pub(super) const LAYOUT: InflightLayout = InflightLayout {
    queues: 4,
    queue_size: 128,
};
/// What the recording device wants for its journal.
pub(super) const JOURNAL: usize = 4096;

pub(super) fn get(bench: &mut Bench, queues: u16, queue_size: u16) -> (u64, File) {
    let payload = inflight(0, 0, queues, queue_size);
    bench.client.send(Req::GET_INFLIGHT_FD, 0, &payload, &[]);
    assert_eq!(bench.run().unwrap(), Progress::Idle);
    let (answer, file) = bench.client.reply_with_fd(Req::GET_INFLIGHT_FD);
    let word = |at: usize| u64::from_ne_bytes(answer[at..at + 8].try_into().unwrap());
    assert_eq!(word(8), 0, "offset");
    assert_eq!(
        answer[16..20],
        [queues, queue_size].map(u16::to_ne_bytes).concat()
    );
    (word(0), file)
}

pub(super) fn set(bench: &mut Bench, size: u64, file: &File) -> bool {
    let payload = inflight(size, 0, LAYOUT.queues, LAYOUT.queue_size);
    bench.try_set(Req::SET_INFLIGHT_FD, &payload, &[file.as_raw_fd()])
}

#[test]
fn a_fresh_region_is_zeros_that_nobody_can_take_away_and_has_room_for_the_journal() {
    let mut bench = Bench::negotiated();
    let (size, mut file) = get(&mut bench, 4, 128);
    assert_eq!(size, (LAYOUT.rest_at() + JOURNAL) as u64);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() as u64 == size && bytes.iter().all(|byte| *byte == 0));
    assert!(file.set_len(0).is_err());
    // It is the VMM's to decide: nothing is in use yet.
    assert!(bench.device.calls().is_empty());
    // Fewer and smaller queues than there could be are the VMM's choice too.
    assert!(get(&mut bench, 1, 2).0 < size);
}

#[test]
fn each_ring_gets_its_part_of_the_region_that_the_vmm_sent() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let (size, file) = get(&mut bench, 4, 128);
    assert!(set(&mut bench, size, &file));
    assert_eq!(bench.device.calls(), [Asked::Journal(Some(JOURNAL))]);
    bench.start_ring(0, 0);
    bench.start_ring(3, 0);
    for (start, index) in bench.device.starts().into_iter().zip([0u64, 3]) {
        let part = start.inflight.unwrap();
        assert_eq!(part.queue_size, 128);
        let mark = part.part.atomic::<std::sync::atomic::AtomicU64>(0).unwrap();
        mark.store(0x1234 + index, Ordering::Relaxed);
        let mut theirs = [0; 8];
        let at = index * LAYOUT.queue_bytes() as u64;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut theirs, at).unwrap();
        assert_eq!(u64::from_ne_bytes(theirs), 0x1234 + index);
    }
}

#[test]
fn a_vmm_that_keeps_no_region_is_served_as_ever() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.start_ring(0, 0);
    assert!(bench.device.starts().pop().unwrap().inflight.is_none());
    bench.set(Req::RESET_DEVICE, &[], &[]);
    assert!(!bench.device.calls().contains(&Asked::Journal(None)));
}

#[test]
fn a_region_stays_in_use_over_a_stop_and_while_a_ring_runs() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let (size, file) = get(&mut bench, 4, 128);
    let (_, other) = get(&mut bench, 4, 128);
    assert!(set(&mut bench, size, &file));
    bench.start_ring(0, 0);
    bench.device.calls();
    // The same memory by another descriptor changes nothing; another is refused while a ring runs.
    assert!(set(&mut bench, size, &file.try_clone().unwrap()));
    assert!(!set(&mut bench, size, &other));
    assert!(!set(&mut bench, size - 4096, &file));
    assert!(bench.device.calls().is_empty());
    bench.stop_ring(0);
    bench.device.starts();
    bench.start_ring(0, 0);
    assert!(bench.device.starts().pop().unwrap().inflight.is_some());
    bench.stop_ring(0);
    bench.device.calls();
    assert!(set(&mut bench, size, &other));
    assert_eq!(bench.device.calls(), [Asked::Journal(Some(JOURNAL))]);
}

#[test]
fn a_reset_and_the_end_of_the_connection_let_the_region_go() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let (size, file) = get(&mut bench, 4, 128);
    assert!(set(&mut bench, size, &file));
    bench.start_ring(0, 0);
    bench.device.calls();
    bench.set(Req::RESET_DEVICE, &[], &[]);
    // The image is given back with its journal; then that is let go.
    assert_eq!(
        bench.device.calls(),
        [Asked::Reset, Asked::Journal(None), Asked::Features(0)]
    );
    bench.device.starts();
    bench.start_ring(0, 0);
    assert!(bench.device.starts().pop().unwrap().inflight.is_none());
    bench.stop_ring(0);

    assert!(set(&mut bench, size, &file));
    bench.device.calls();
    let device = bench.device.clone();
    drop(bench);
    assert_eq!(device.calls(), [Asked::Reset, Asked::Journal(None)]);
}

#[test]
fn a_region_without_room_for_the_journal_is_used_without_one() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let queues = LAYOUT.rest_at() as u64;
    let file = memfd(queues);
    assert!(set(&mut bench, queues, &file));
    assert!(bench.device.calls().is_empty());
    bench.start_ring(0, 0);
    assert!(bench.device.starts().pop().unwrap().inflight.is_some());
}

#[test]
fn regions_that_do_not_fit_are_refused() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let full = (LAYOUT.rest_at() + JOURNAL) as u64;
    let file = memfd(full);
    let fd = [file.as_raw_fd()];
    for (size, offset, queues, queue_size) in [
        // Shorter than it says, or than its queues need.
        (full + 1, 0, 4, 128),
        (full, 4096, 4, 128),
        (64, 0, 4, 128),
        (u64::MAX, 0, 4, 128),
        (full, u64::MAX, 4, 128),
        (0, 0, 4, 128),
        (4096, 12, 1, 2),
        // More than the device has.
        (full, 0, 5, 128),
        (full, 0, 4, 257),
        (full, 0, u16::MAX, u16::MAX),
    ] {
        let payload = inflight(size, offset, queues, queue_size);
        assert!(
            !bench.try_set(Req::SET_INFLIGHT_FD, &payload, &fd),
            "{size} {offset} {queues} {queue_size}"
        );
    }
    assert!(bench.device.calls().is_empty());
    // A ring that is larger than its part does not start without its requests being kept.
    let payload = inflight(full, 0, 4, 64);
    bench.set(Req::SET_INFLIGHT_FD, &payload, &fd);
    bench.set(Req::SET_VRING_NUM, &state(0, 128), &[]);
    bench.set(Req::SET_VRING_BASE, &state(0, 0), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    assert!(!bench.try_set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]));
    // A ring beyond the region's queues is served, and not kept.
    let payload = inflight(full, 0, 1, 128);
    bench.set(Req::SET_INFLIGHT_FD, &payload, &fd);
    bench.device.starts();
    bench.start_ring(1, 0);
    assert!(bench.device.starts().pop().unwrap().inflight.is_none());
}

#[test]
fn a_region_larger_than_the_device_can_not_be_asked_for() {
    let mut bench = Bench::negotiated();
    let payload = inflight(0, 0, 5, 128);
    bench.client.send(Req::GET_INFLIGHT_FD, 0, &payload, &[]);
    // It has a reply of its own, which there is none of.
    assert!(matches!(bench.run(), Err(ConnectionError::Refused { .. })));
}
