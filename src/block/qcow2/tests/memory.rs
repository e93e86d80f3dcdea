//! What is in memory of the tables, and who holds a claim of it.

use std::task::{Context, Waker};

use super::*;
use crate::block::qcow2::claim::Attempt;
use crate::block::qcow2::map::Found;

/// A disk of 128 slices of 64 entries each.
fn small_slices(io: &Io, limit: u64) -> (Images, Qcow2) {
    let images = Images::new();
    images.create("a", "cluster_size=512", 4 << 20);
    images.qemu_io("a", &["write -P 1 0 4M"]);
    let storage = sim(images.bytes("a"), Sim::default());
    let options = Options {
        read_only: false,
        l2_cache_bytes: limit,
        ..READ
    };
    let image = io.block_on(open(io, &storage, options)).expect("open");
    (images, image)
}

#[test]
fn slices_that_are_looked_at_stay_and_the_others_make_room() {
    let io = reactor();
    let limit = 16 << 10;
    let (_images, image) = small_slices(&io, limit);
    let mut gone = 0;
    io.block_on(async {
        for slice in (1..128).chain(1..128) {
            if matches!(image.lookup(100, 1), Found::Missing(_)) {
                gone += 1;
            }
            image.map(&io, 100, 1).await.expect("map");
            image.map(&io, slice << 15, 1).await.expect("map");
            let used = image.tables.memory() as u64;
            assert!(used <= limit, "{used}");
            // What was unlinked is let go at a quiescent point.
            io.yield_now().await;
        }
    });
    assert!(image.tables.loaded() > 32, "{}", image.tables.loaded());
    assert!(gone < 25, "{gone} times of 254");
    io.close();
}

#[test]
fn compressed_entries_count_in_full() {
    let io = reactor();
    let images = Images::new();
    images.create("a", "cluster_size=64k", 128 << 20);
    images.qemu_io("a", &["write -c -P 1 0 64k", "write -P 1 64M 64k"]);
    let storage = sim(images.bytes("a"), Sim::default());
    let image = io.block_on(open(&io, &storage, READ)).expect("open");
    io.block_on(async {
        image.map(&io, 64 << 20, 1).await.expect("map");
        let plain = image.tables.memory();
        assert!(plain < 2200, "{plain}");
        image.map(&io, 0, 1).await.expect("map");
        let spilled = image.tables.memory() - plain;
        assert!(spilled > 2048 + 4096 && spilled < 6500, "{spilled}");
    });
    io.close();
}

#[test]
fn a_claim_ends_before_the_next_one_and_its_end_wakes_who_waits() {
    let io = reactor();
    let (_images, image) = small_slices(&io, 1 << 20);
    io.block_on(async {
        image.map(&io, 0, 1).await.expect("map");
        let claim = |first: u64, max: u64| {
            let attempt = image
                .tables
                .try_claim(GuestCluster(first), max, |n, _| n < 20);
            match attempt {
                Attempt::Claimed(claim) => Some(claim),
                Attempt::Busy => None,
                other => panic!("{other:?}"),
            }
        };
        let later = claim(10, 5).expect("free");
        let mut first = claim(2, 100).expect("free");
        assert_eq!(
            (later.count(), first.count()),
            (5, 8),
            "up to the next claim"
        );
        assert!(claim(14, 1).is_none() && claim(9, 1).is_none());
        assert_eq!(claim(15, 30).expect("free").count(), 20, "as far as wanted");
        assert_eq!(
            claim(60, 30).expect("free").count(),
            4,
            "as far as the slice"
        );

        let mut cx = Context::from_waker(Waker::noop());
        let mut wait = Box::pin(image.tables.unclaimed(GuestCluster(7)));
        assert!(wait.as_mut().poll(&mut cx).is_pending());
        first.truncate(6); // 2 to 7
        assert!(wait.as_mut().poll(&mut cx).is_pending(), "7 is held still");
        first.truncate(5);
        assert!(wait.as_mut().poll(&mut cx).is_ready());
        assert_eq!(claim(7, 9).expect("free").count(), 3);
        drop(later);
        assert_eq!(claim(7, 9).expect("free").count(), 9);
        drop(first);
        assert_eq!(claim(2, 64).expect("free").count(), 20);
    });
    io.close();
}
