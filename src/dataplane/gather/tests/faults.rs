//! A transfer that fails fails nobody but who would have failed alone.

use super::*;
use crate::block::sim::Kind;

const COUNT: u64 = 8;

/// A batch of eight that is one transfer, as numbers of those that ended well and of those that did not.
fn batch(rig: &mut Rig, served: &Served, kind: Kind) -> (Vec<u64>, Vec<u64>) {
    begin_at(rig, served, kind, 60, 1);
    rig.sim().take_events();
    rig.next_token = 0;
    begin_at(rig, served, kind, 64, COUNT)
}

fn begin_at(
    rig: &mut Rig,
    served: &Served,
    kind: Kind,
    at: u64,
    count: u64,
) -> (Vec<u64>, Vec<u64>) {
    for i in 0..count {
        let at = (at + 4 * i) * KIB;
        match kind {
            Kind::Write => rig.write(at, 4 * KIB),
            _ => rig.read(at, 4 * KIB),
        };
    }
    judged(&rig.run(served))
}

fn prepared(torn: bool) -> (Rig, Served) {
    let rig = Rig::new(Sim {
        torn_failures: torn,
        delay: if torn { 3 } else { 0 },
        ..Sim::default()
    });
    let served = rig.serve();
    (rig, served)
}

#[test]
fn a_transfer_that_fails_once_is_made_request_by_request() {
    for kind in [Kind::Write, Kind::Read] {
        for torn in [false, true] {
            let (mut rig, served) = prepared(torn);
            // The one before the batch is the first.
            rig.sim().fail(kind, 2, libc::EIO, false);
            let operations = rig.sim().operations();
            let (good, bad) = batch(&mut rig, &served, kind);
            assert_eq!(good, (0..COUNT).collect::<Vec<_>>());
            assert!(bad.is_empty());
            assert_eq!(rig.sim().operations() - operations, 2 + COUNT);
            assert_eq!(served.stats.errors.get(), 0);
            if kind == Kind::Write {
                let mut alone: Vec<(u64, u64)> = (1..COUNT).map(|i| (64 + 4 * i, 4)).collect();
                alone.insert(0, (64, 32));
                alone.push((64, 4));
                assert_eq!(rig.writes(), alone, "the leader is the last");
                let range = (64 * KIB) as usize..(96 * KIB) as usize;
                assert!(rig.sim().image()[range] == data_of(64 * KIB, 32 * KIB));
            }
        }
    }
}

#[test]
fn only_the_request_that_fails_is_told_so() {
    for kind in [Kind::Write, Kind::Read] {
        for torn in [false, true] {
            for failing in 0..COUNT {
                let (mut rig, served) = prepared(torn);
                rig.sim().fail(kind, 2, libc::EIO, false);
                // The members begin in their order, and the leader after them.
                let nth = if failing == 0 { COUNT } else { failing };
                rig.sim().fail(kind, 2 + nth, libc::EIO, false);
                let (good, bad) = batch(&mut rig, &served, kind);
                assert_eq!(bad, [failing], "{kind:?}");
                assert_eq!(good.len() as u64, COUNT - 1);
                assert_eq!(served.stats.errors.get(), 1);
                let image = rig.sim().image();
                for i in (0..COUNT).filter(|i| kind == Kind::Write && *i != failing) {
                    let at = ((64 + 4 * i) * KIB) as usize;
                    let want = data_of(at as u64, 4096);
                    assert!(image[at..at + 4096] == want, "{i} of {failing}");
                }
                // And life goes on.
                let operations = rig.sim().operations();
                let (good, bad) = batch(&mut rig, &served, kind);
                assert_eq!((good.len() as u64, bad.len()), (COUNT, 0));
                assert_eq!(rig.sim().operations() - operations, 2);
            }
        }
    }
}

#[test]
fn a_disk_that_always_fails_fails_every_request_once() {
    let (mut rig, served) = prepared(false);
    rig.sim().fail(Kind::Write, 2, libc::EIO, true);
    let (good, bad) = batch(&mut rig, &served, Kind::Write);
    assert_eq!((good.len() as u64, bad.len() as u64), (0, COUNT));
    assert_eq!(served.stats.errors.get(), COUNT);
}

#[test]
fn a_write_through_is_durable_before_it_completes_by_one_flush_for_all() {
    let mut rig = Rig::new(Sim::default());
    rig.write_through = true;
    let served = rig.serve();
    let (good, _) = batch(&mut rig, &served, Kind::Write);
    assert_eq!(good.len() as u64, COUNT);
    let write = |at, len| Event::Write {
        offset: at * KIB,
        len: len * KIB,
    };
    assert_eq!(rig.sim().take_events(), [write(64, 32), Event::Flush]);
    // A flush that fails: each has its own.
    rig.sim().fail(Kind::Flush, 2, libc::EIO, false);
    rig.sim().fail(Kind::Flush, 5, libc::EIO, false);
    let (good, bad) = batch(&mut rig, &served, Kind::Write);
    assert_eq!((good.len() as u64, bad), (COUNT - 1, vec![3]));
}

#[test]
fn chains_that_are_broken_are_left_out_of_the_gather_around_them() {
    let (mut rig, served) = prepared(false);
    rig.write_before(&served, 64 * KIB);
    let control = rig.memory.alloc(64, 64);
    for i in 0..3 {
        rig.write((64 + 4 * i) * KIB, 4 * KIB);
    }
    // No room for a status. Its token is none of the queue's slots, so it is taken by hand.
    let bufs = [frontend::Buf::readable(control, 16)];
    rig.guest.ring.add(&bufs, 999).unwrap();
    for i in 3..6 {
        rig.write((64 + 4 * i) * KIB, 4 * KIB);
    }
    rig.guest.ring.publish();
    while served.turn() {}
    let mut used = Vec::new();
    while let Some(done) = rig.guest.ring.pop_used().unwrap() {
        used.push((done.token, done.len));
    }
    assert_eq!(used.len(), 7);
    assert!(used.contains(&(999, 0)), "{used:?}");
    assert_eq!(rig.writes(), [(64, 24)]);
    assert_eq!(served.queue.requests(), 0);
}

#[test]
fn a_ring_that_breaks_in_the_middle_of_a_batch_leaves_nobody_waiting() {
    let (mut rig, served) = prepared(false);
    rig.write_before(&served, 64 * KIB);
    for i in 0..4 {
        rig.write((64 + 4 * i) * KIB, 4 * KIB);
    }
    // A head that does not exist, right behind them.
    let avail = rig.guest.ring.vring_addr(0).avail - rig.memory.regions()[0].user_addr(0);
    rig.guest.ring.publish();
    let bytes = rig.memory.read_vec(avail + 2, 2);
    let index = u16::from_le_bytes([bytes[0], bytes[1]]);
    let entry = avail + 4 + 2 * u64::from(index % QUEUE_SIZE);
    rig.memory.write(entry, &QUEUE_SIZE.to_le_bytes());
    rig.memory.write(avail + 2, &(index + 1).to_le_bytes());
    while served.turn() {}
    let mut done = Vec::new();
    rig.take(&mut done);
    assert_eq!(judged(&done).0.len(), 4);
    assert_eq!(rig.writes(), [(64, 16)]);
    assert_eq!(served.queue.requests(), 0);
}
