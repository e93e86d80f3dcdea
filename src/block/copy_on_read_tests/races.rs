//! Copies beside requests, beside one another, and beside changes of the disk.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use super::super::sim::{Sim, random};
use super::*;

type Boxed = Pin<Box<dyn Future<Output = ()>>>;

/// Runs futures as tasks of one reactor until all have ended.
fn join(io: &Io, tasks: Vec<Boxed>) {
    let left = Rc::new(Cell::new(tasks.len()));
    for task in tasks {
        let left = left.clone();
        io.spawn(async move {
            task.await;
            left.set(left.get() - 1);
        });
    }
    io.block_on(async {
        while left.get() > 0 {
            io.yield_now().await;
        }
    });
}

#[test]
fn copies_under_way_are_bounded_and_the_others_read_past_them() {
    let size = 32 << 20;
    let over = Over::new("cluster_size=64k", pattern(size, 1), size);
    let (io, disk) = (&over.io, &over.disk);
    let most = Rc::new(Cell::new(0));
    let tasks: Vec<Boxed> = (0..64)
        .map(|n| {
            let (io, disk, most) = (io.clone(), disk.clone(), most.clone());
            let want = over.model[n << 19..][..4096].to_vec();
            Box::pin(async move {
                let got = read(&io, &disk, n << 19, 4096).await;
                assert!(got == want);
                most.set(most.get().max(disk.copies_under_way()));
            }) as Boxed
        })
        .collect();
    join(io, tasks);
    over.settle();
    assert_eq!(most.get(), 8);
    let stats = over.disk.copy_stats();
    assert!(stats.passed_over >= 40, "{stats:?}");
    assert!(stats.stored_bytes >= 8 << 16, "{stats:?}");
    over.finish("bounded");
}

#[test]
fn readers_of_one_cluster_make_one_copy() {
    let size = 1 << 20;
    let over = Over::new("cluster_size=64k", pattern(size, 1), size);
    let (io, disk) = (&over.io, &over.disk);
    let tasks: Vec<Boxed> = (0..16)
        .map(|n| {
            let (io, disk) = (io.clone(), disk.clone());
            let want = over.model[65536 + n * 4096..][..4096].to_vec();
            Box::pin(async move {
                let got = read(&io, &disk, 65536 + n * 4096, 4096).await;
                assert!(got == want);
            }) as Boxed
        })
        .collect();
    join(io, tasks);
    over.settle();
    assert_eq!(over.disk.copy_stats().stored_bytes, 65536);
    assert!(run_len(&over) < 65536 * 2);
    let read = over.base_bytes();
    assert!(
        read <= 65536 + 15 * 4096,
        "one brings the cluster, the others what they need: {read}"
    );
    over.finish("one copy");
}

#[test]
fn the_disk_is_given_back_while_the_base_does_not_answer() {
    let size = 1 << 20;
    let over = Over::new("cluster_size=64k", pattern(size, 1), size);
    over.check(65536, 4096);
    // The copy reads for as long as nobody stops it.
    let slow = Sim {
        delay: 1 << 30,
        ..Sim::default()
    };
    the_sim(&over.base).behave(slow);
    assert_eq!(over.disk.copies_under_way(), 1);
    let closed = over.io.block_on(over.disk.clone().deactivate(&over.io));
    closed.expect("closed");
    assert_eq!(over.disk.copies_under_way(), 0);
    assert_eq!(over.disk.copy_stats().stored_bytes, 0);
}

#[test]
fn a_disk_that_changes_its_size_shows_no_copy_of_what_it_has_lost() {
    for kind in KINDS {
        for seed in 0..12 {
            let size = 1 << 20;
            let config = Sim {
                delay: 8,
                seed,
                pieces: true,
                ..Sim::default()
            };
            let mut over = Over::with(kind, pattern(size, 1), size, &config, true);
            let cut = 512 * (1 + (seed as usize * 331) % 2047);
            over.check(cut - 512, 512 * 2);
            over.check((cut / 2) & !511, 4096);
            over.io.block_on(async {
                let (io, disk) = (&over.io, &over.disk);
                for _ in 0..seed * 3 {
                    io.yield_now().await;
                }
                disk.resize(io, cut as u64).await.expect("smaller");
                disk.resize(io, size as u64).await.expect("larger");
            });
            over.model[cut..].fill(0);
            over.finish(&format!("{kind} {seed}"));
        }
    }
}

#[test]
fn what_is_no_hole_any_more_is_left_alone() {
    // A new cluster that is not zeros keeps what shows zeros apart from what is stored.
    for kind in KINDS {
        let size = 1 << 20;
        let config = Sim {
            promises_zeros: false,
            ..Sim::default()
        };
        let mut over = Over::with(kind, pattern(size, 1), size, &config, true);
        let written = pattern(70_000 / 512 * 512, 2);
        over.io.block_on(async {
            let (io, disk) = (&over.io, &over.disk);
            write(io, disk, 4096 + 512, &written).await;
            let zeroes = disk.write_zeroes(io, 131_072, 65536, true);
            zeroes.await.expect("zeroes");
            let zeroes = disk.write_zeroes(io, 262_144 + 8192, 4096, true);
            zeroes.await.expect("zeroes");
            // As late as can be: what was read of the base before all that.
            let mut buf = io.buf(512 << 10);
            buf.copy_from_slice(&over.model[..512 << 10]);
            let stored = disk.top().0.store_copy(io, 0, &mut buf).await;
            assert!(stored.expect("stored") > 0, "{kind}: the rest");
        });
        over.model[4608..][..written.len()].copy_from_slice(&written);
        over.model[131_072..196_608].fill(0);
        over.model[270_336..274_432].fill(0);
        over.finish(kind);
    }
}

/// Tasks that read anywhere, and change sectors of their own.
#[test]
fn reads_and_changes_of_all_kinds_at_the_same_time() {
    for kind in KINDS {
        for seed in 1..=12 {
            let size = 1 << 20;
            let config = Sim {
                seed,
                delay: 10,
                pieces: true,
                promises_zeros: seed % 3 > 0,
                discard_garbage: true,
                ..Sim::default()
            };
            let mut base = pattern(size - 70_000, seed);
            base[300_000..400_000].fill(0);
            let mut over = Over::with(kind, base, size, &config, true);
            let model = Rc::new(RefCell::new(over.model.clone()));
            const TASKS: usize = 6;
            let tasks: Vec<Boxed> = (0..TASKS)
                .map(|task| {
                    let (io, disk, model) = (over.io.clone(), over.disk.clone(), model.clone());
                    let mut rng = seed * 100 + task as u64 + 1;
                    Box::pin(async move {
                        for _ in 0..60 {
                            let stripes = size / 2048 / TASKS;
                            let stripe = random(&mut rng) as usize % stripes * TASKS + task;
                            let from = random(&mut rng) as usize % 4;
                            let count = 1 + random(&mut rng) as usize % (4 - from);
                            let (at, len) = (stripe * 2048 + from * 512, count * 512);
                            match random(&mut rng) % 16 {
                                0..4 => {
                                    let data = pattern(len, random(&mut rng));
                                    write(&io, &disk, at, &data).await;
                                    model.borrow_mut()[at..at + len].copy_from_slice(&data);
                                }
                                4 => {
                                    let zeroes =
                                        disk.write_zeroes(&io, at as u64, len as u64, true);
                                    zeroes.await.expect("zeroes");
                                    model.borrow_mut()[at..at + len].fill(0);
                                }
                                5 => disk.flush(&io).await.expect("flush"),
                                6..10 => {
                                    let got = read(&io, &disk, at, len).await;
                                    assert!(got == model.borrow()[at..at + len], "{seed}");
                                }
                                _ => {
                                    // Other tasks may be writing there; a large read has many kinds of it.
                                    let len = 512 << (random(&mut rng) % 9);
                                    let at = random(&mut rng) as usize % ((size - len) / 512);
                                    read(&io, &disk, at * 512, len).await;
                                }
                            }
                        }
                    }) as Boxed
                })
                .collect();
            join(&over.io, tasks);
            over.model = Rc::try_unwrap(model).expect("one").into_inner();
            let stats = over.finish(&format!("{kind} {seed}"));
            assert!(stats.stored_bytes > 0, "{kind} {seed}: {stats:?}");
            assert_eq!(stats.failed, 0);
        }
    }
}
