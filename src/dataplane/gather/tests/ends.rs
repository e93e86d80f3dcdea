//! A ring that stops, is suspended or killed while a transfer of several requests is under way.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::sync_channel;

use super::*;
use crate::kill_point::simulated::killed_after;

const COUNT: u64 = 10;

fn slow() -> Sim {
    Sim {
        delay: 40,
        seed: 5,
        ..Sim::default()
    }
}

/// Shows the driver's batch.
fn offer(rig: &mut Rig, served: &Served) {
    rig.write_before(served, 64 * KIB);
    rig.next_token = 0;
    for i in 0..COUNT {
        rig.write((64 + 4 * i) * KIB, 4 * KIB);
    }
    rig.guest.ring.publish();
}

/// A batch is fetched, and nothing of it has ended.
fn under_way(rig: &mut Rig) -> Served {
    let served = rig.serve();
    offer(rig, &served);
    assert!(served.queue.poll());
    assert_eq!(rig.writes(), [(64, 4 * COUNT)]);
    served.queue.publish();
    let mut done = Vec::new();
    rig.take(&mut done);
    assert!(done.is_empty());
    served
}

fn all_written(rig: &Rig) {
    let range = (64 * KIB) as usize..((64 + 4 * COUNT) * KIB) as usize;
    assert!(rig.sim().image()[range] == data_of(64 * KIB, 4 * COUNT * KIB));
}

fn exactly_once(done: &[Completion]) {
    let (good, bad) = judged(done);
    assert_eq!(good, (0..COUNT).collect::<Vec<_>>());
    assert!(bad.is_empty());
}

#[test]
fn a_ring_that_stops_completes_all_of_it_first() {
    for packed in [false, true] {
        let mut rig = Rig::with(slow(), packed, u32::MAX);
        let served = under_way(&mut rig);
        let (reply, answer) = sync_channel(1);
        served.queue.stop(reply);
        assert!(!served.queue.is_stopped());
        while !served.queue.is_stopped() {
            served.turn();
        }
        served.queue.end();
        let mut done = Vec::new();
        rig.take(&mut done);
        exactly_once(&done);
        all_written(&rig);
        let (reply, base) = served.queue.take_stop().unwrap();
        reply.send(Some(base)).unwrap();
        assert!(answer.recv().unwrap().is_some());
    }
}

#[test]
fn a_ring_that_is_suspended_leaves_all_of_it_to_its_successor() {
    for packed in [false, true] {
        let mut rig = Rig::with(slow(), packed, u32::MAX);
        let served = under_way(&mut rig);
        let (reply, _answer) = sync_channel(1);
        served.queue.suspend(reply);
        while !served.queue.is_stopped() {
            served.turn();
        }
        served.queue.end();
        let mut done = Vec::new();
        rig.take(&mut done);
        assert!(done.is_empty(), "nothing of it was completed");
        drop(served);
        let served = rig.serve();
        exactly_once(&rig.run(&served));
        all_written(&rig);
    }
}

#[test]
fn a_reactor_that_closes_over_a_transfer_lets_go_of_the_memory() {
    let mut rig = Rig::new(slow());
    let served = under_way(&mut rig);
    served.io.close();
    let mapped = Arc::downgrade(&rig.mapped);
    served.queue.end();
    drop(served);
    rig.mapped = Arc::new(crate::virtio::testing::memory(&[(0, 4096)]));
    assert!(mapped.upgrade().is_none());
}

#[test]
fn memory_is_replaced_while_a_transfer_is_under_way() {
    let mut rig = Rig::new(slow());
    let served = under_way(&mut rig);
    let again = rig.map();
    let old = Arc::downgrade(&std::mem::replace(&mut rig.mapped, again));
    served.queue.set_memory(&rig.mapped).unwrap();
    assert!(old.upgrade().is_some(), "the transfer goes on in it");
    exactly_once(&rig.run(&served));
    all_written(&rig);
    assert!(old.upgrade().is_none());
}

#[test]
fn every_page_that_a_transfer_read_into_is_marked_in_the_dirty_log() {
    let mut rig = Rig::new(Sim::default());
    let bits = SharedMemory::create(c"log", GUEST / 4096 / 8).unwrap();
    let part = bits.part(0, bits.len()).unwrap();
    rig.log = Some(Arc::new(DirtyLog::new(part.clone())));
    let served = rig.serve();
    rig.read(60 * KIB, 4 * KIB);
    rig.run(&served);
    let before = rig.sim().operations();
    let bytes: &[AtomicU8] = part.atomics(0, part.len()).unwrap();
    for byte in bytes {
        byte.store(0, Ordering::Relaxed);
    }
    let mut pages = Vec::new();
    for i in 0..COUNT {
        let (sector, len) = ((64 + 4 * i) * 2, 4096);
        let slot = rig.guest.submit(Op::Read { sector, len }, i).unwrap();
        pages.push((rig.guest.data_addr(slot) / 4096) as usize);
    }
    rig.guest.ring.publish();
    while served.turn() {}
    assert_eq!(rig.sim().operations() - before, 1);
    for page in pages {
        let byte = bytes[page / 8].load(Ordering::Relaxed);
        assert_eq!(byte >> (page % 8) & 1, 1, "page {page}");
    }
}

/// The daemon is left at each of its steps in a batch that is gathered; what comes next serves each request once.
#[test]
fn a_successor_of_one_that_was_killed_over_a_gather_serves_each_request_once() {
    for packed in [false, true] {
        for delay in [0, 2] {
            let mut places = 0;
            loop {
                let sim = Sim {
                    delay,
                    ..Sim::default()
                };
                let mut rig = Rig::with(sim, packed, u32::MAX);
                let served = rig.serve();
                offer(&mut rig, &served);
                let whole = killed_after(places, || {
                    for _ in 0..8 {
                        served.turn();
                    }
                });
                served.killed();
                let mut done = Vec::new();
                rig.take(&mut done);
                let next = rig.serve();
                done.extend(rig.run(&next));
                exactly_once(&done);
                all_written(&rig);
                if whole.is_some() {
                    break;
                }
                places += 1;
            }
            // Each request is fetched, executed and pushed; all are gathered and parted, and shown.
            assert!(places >= 3 * COUNT + 3, "{places}");
        }
    }
}
