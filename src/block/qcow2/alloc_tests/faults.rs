//! Operations that fail, images that lie, storage that is full.

use super::*;
use crate::block::sim::Event;

/// A life of an allocator: takes, writes, frees, flushes. Returns the first error.
async fn life(
    allocator: &Arc<Allocator>,
    io: &Io,
    live: &mut Books,
    seed: u64,
    turns: u64,
) -> Result<()> {
    let mut seed = seed | 1;
    let mut owned: Vec<(HostCluster, u64)> = Vec::new();
    let mut result = Ok(());
    for _ in 0..turns {
        match random(&mut seed) % 4 {
            0 | 1 => match allocator.allocate(io, random(&mut seed) % 40 + 1).await {
                Ok(fresh) => {
                    // While it is owned nobody else gets it, kept or not.
                    live.take(fresh.first(), fresh.count());
                    match random(&mut seed) % 4 {
                        0 => {
                            live.give(fresh.first(), fresh.count());
                            drop(fresh);
                        }
                        1 => {
                            live.give(fresh.first(), fresh.count());
                            let (kept, back) = fresh.split_at(1);
                            back.give_back_untouched();
                            live.take(kept.first(), kept.count());
                            owned.push(kept.keep());
                        }
                        _ => owned.push(fresh.keep()),
                    }
                }
                Err(error) => result = result.and(Err(error)),
            },
            2 if !owned.is_empty() => {
                let run = owned.swap_remove(random(&mut seed) as usize % owned.len());
                live.give(run.0, run.1);
                allocator.free(io, run.0, run.1);
            }
            _ => {
                let mark = allocator.mark();
                io.yield_now().await;
                result = result.and(allocator.settle(io, mark).await);
                result = result.and(allocator.write_back(io).await);
            }
        }
    }
    result
}

#[test]
fn any_operation_may_fail_and_the_next_attempt_works() {
    for (options, torn) in [
        ("cluster_size=512,refcount_bits=64", false),
        ("cluster_size=512,refcount_bits=64", true),
        ("cluster_size=4096,refcount_bits=16", true),
    ] {
        let empty = image(options, 8 << 20);
        let (mut nth, mut told) = (1, 0);
        loop {
            let io = reactor();
            let config = Sim {
                torn_failures: torn,
                pieces: torn,
                ..Sim::default()
            };
            let storage = sim(empty.clone(), config);
            let ended = io.block_on(async {
                let allocator = open(&io, &storage, 0).await.unwrap();
                let mut live = Books::default();
                let errno = if nth % 2 == 0 {
                    libc::EIO
                } else {
                    libc::ENOSPC
                };
                simulated(&storage).fail(Kind::Any, nth, errno, false);
                let before = simulated(&storage).operations();
                let broken = life(&allocator, &io, &mut live, nth, 60).await;
                let operations = simulated(&storage).operations() - before;
                told += u64::from(broken.is_err());
                simulated(&storage).heal();
                // From here on all is well, and what is live is still counted.
                life(&allocator, &io, &mut live, nth + 1, 60).await.unwrap();
                allocator
                    .allocate(&io, 1)
                    .await
                    .unwrap()
                    .give_back_untouched();
                let durable = simulated(&storage).crash_with(|_, _| 0);
                let counts = Counts::of(&durable);
                for cluster in live.0.keys() {
                    assert_eq!(counts.get(*cluster), 1, "{options} {nth}: {cluster}");
                }
                let mark = allocator.mark();
                io.yield_now().await;
                allocator.settle(&io, mark).await.unwrap();
                allocator.close(&io).await.unwrap();
                // Nothing is lost either: just the live clusters are allocated.
                let judged = judge(&simulated(&storage).image());
                let want = Judged {
                    errors: 0,
                    leaks: live.0.len() as u64,
                };
                assert_eq!(judged, want, "{options} {nth}");
                operations < nth
            });
            io.close();
            if ended {
                break;
            }
            nth += 1;
        }
        assert!(told > 5, "{options}: {told} failures were told");
    }
}

#[test]
fn a_failing_close_does_what_it_can_and_may_be_tried_again() {
    for kind in [Kind::Write, Kind::Flush, Kind::SetLen, Kind::Discard] {
        let io = reactor();
        let storage = sim(image("cluster_size=4096", 8 << 20), Sim::default());
        io.block_on(async {
            let allocator = open(&io, &storage, 0).await.unwrap();
            let runs = take(&allocator, &io, 100).await.unwrap();
            free_and_settle(&allocator, &io, &runs[..1]).await.unwrap();
            simulated(&storage).fail(kind, 1, libc::EIO, false);
            let closed = allocator.close(&io).await;
            // To cut the file and to punch holes are not what a close is for.
            assert_eq!(
                closed.is_err(),
                matches!(kind, Kind::Write | Kind::Flush),
                "{kind:?}"
            );
            simulated(&storage).take_events();
            allocator.close(&io).await.unwrap();
            // A flush that fails may have lost what was written before it.
            let events = simulated(&storage).take_events();
            let written = events.iter().any(|e| matches!(e, Event::Write { .. }));
            assert_eq!(written, closed.is_err(), "{kind:?}");
            let leaks = runs[1..].iter().map(|run| run.1).sum();
            let judged = judge(&simulated(&storage).crash_with(|_, _| 0));
            assert_eq!(judged, Judged { errors: 0, leaks }, "{kind:?}");
        });
        io.close();
    }
}

#[test]
fn without_space_smaller_arenas_are_tried_and_then_it_is_told() {
    let io = reactor();
    let storage = sim(image("cluster_size=4096", 64 << 20), Sim::default());
    let sim = simulated(&storage);
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        for _ in 0..3 {
            sim.heal();
            sim.fail(Kind::Allocate, 1, libc::ENOSPC, true);
            let error = allocator.allocate(&io, 1).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            let asked: Vec<u64> = sim
                .take_events()
                .into_iter()
                .filter_map(|event| match event {
                    Event::Allocate { len, .. } => Some(len / 4096),
                    _ => None,
                })
                .collect();
            assert_eq!(asked, [16, 8, 4, 2, 1]);
        }
        // Every waiting request is told.
        let told = std::rc::Rc::new(std::cell::Cell::new(0));
        for _ in 0..5 {
            let (told, io, allocator) = (told.clone(), io.clone(), allocator.clone());
            let task = io.clone();
            let _ = io.spawn(async move {
                let error = allocator.allocate(&task, 1).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                told.set(told.get() + 1);
            });
        }
        while told.get() < 5 {
            io.yield_now().await;
        }
        sim.heal();
        let runs = take(&allocator, &io, 40).await.unwrap();
        // None of the attempts has moved the end of the image.
        let highest = runs.iter().map(|run| run.0.0 + run.1).max().unwrap();
        assert!(highest < 60, "{highest}");
        allocator.close(&io).await.unwrap();
    });
    assert_eq!(
        judge(&sim.image()),
        Judged {
            errors: 0,
            leaks: 40
        }
    );
    io.close();
}

#[test]
fn a_full_device_gives_every_cluster_it_has() {
    let io = reactor();
    let storage = sim(image("cluster_size=4096", 8 << 20), Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let runs = take(&allocator, &io, 500).await.unwrap();
        free_and_settle(&allocator, &io, &runs).await.unwrap();
        allocator.close(&io).await.unwrap();
    });
    // What was free inside the file at open is found by the scan, though nothing says where it is.
    let mut bytes = simulated(&storage).image();
    bytes.resize(400 * 4096, 0);
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), &bytes).unwrap();
    let fresh = sim(bytes, Sim::default());
    io.block_on(async {
        let allocator = open(&io, &fresh, 0).await.unwrap();
        let used = {
            let image = simulated(&fresh).image();
            let counts = Counts::of(&image);
            (0..400).filter(|c| counts.get(*c) > 0).count() as u64
        };
        let mut books = Books::default();
        for run in take(&allocator, &io, 400 - used).await.unwrap() {
            books.take(run.0, run.1);
        }
        assert!(
            books.0.keys().all(|cluster| *cluster < 400),
            "the file's free clusters first"
        );
        allocator.close(&io).await.unwrap();
    });
    io.close();
}

#[test]
fn a_refcount_table_that_can_not_be_is_refused_by_name() {
    let io = reactor();
    let good = image("cluster_size=4096", 8 << 20);
    let table = u64::from_be_bytes(good[48..56].try_into().unwrap());
    let block = Counts::of(&good).word(table);
    let patched = |at: u64, value: u64| {
        let mut bytes = good.clone();
        bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
        bytes
    };
    for (bytes, what) in [
        (patched(table, block + 512), "not valid"),
        (patched(table, 1 << 60), "not valid"),
        (patched(table, 1 << 40), "beyond the end of the file"),
        (patched(table, table), "overlaps the refcount table"),
        (patched(table + 8, block), "overlaps the refcount block"),
        (patched(table + 16, 1), "not valid"),
        (
            patched(48, good.len().next_multiple_of(4096) as u64),
            "refcount table",
        ),
    ] {
        let storage = sim(bytes, Sim::default());
        let error = io.block_on(open(&io, &storage, 0)).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert!(matches!(
            error.kind(),
            ErrorKind::Corrupt | ErrorKind::InvalidImage
        ));
    }
    // The L1 table is where the allocator would not expect it.
    let storage = sim(patched(40, block), Sim::default());
    let error = io.block_on(open(&io, &storage, 0)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("L1 table overlaps the refcount block"),
        "{error}"
    );
    io.close();
}

#[test]
fn metadata_with_refcount_0_is_never_handed_out() {
    let io = reactor();
    let good = image("cluster_size=4096", 8 << 20);
    let counts = Counts::of(&good);
    let block = counts.word(counts.word(48)) as usize;
    // The header, the refcount table, its block, the L1 table.
    for cluster in 0..4 {
        let mut bytes = good.clone();
        bytes[block + cluster * 2..block + cluster * 2 + 2].fill(0);
        let storage = sim(bytes, Sim::default());
        io.block_on(async {
            let allocator = open(&io, &storage, 0).await.unwrap();
            for _ in 0..3 {
                let error = allocator.allocate(&io, 1).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                assert!(error.to_string().contains("refcount 0"), "{error}");
            }
        });
    }
    io.close();
}

#[test]
fn no_bytes_in_table_or_blocks_make_it_panic() {
    let io = reactor();
    let good = image("cluster_size=512,refcount_bits=4", 1 << 20);
    let mut seed = 99;
    for _ in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..random(&mut seed) % 12 + 1 {
            let at = random(&mut seed) as usize % bytes.len();
            bytes[at] = random(&mut seed) as u8;
        }
        let storage = sim(bytes, Sim::default());
        io.block_on(async {
            let Ok(allocator) = open(&io, &storage, 0).await else {
                return;
            };
            if let Ok(runs) = take(&allocator, &io, 200).await {
                let _ = free_and_settle(&allocator, &io, &runs).await;
            }
            let _ = allocator.close(&io).await;
        });
    }
    io.close();
}

#[test]
fn a_settle_that_can_not_read_the_refcounts_is_made_up_for() {
    let io = reactor();
    let empty = image("cluster_size=512,refcount_bits=64", 8 << 20);
    let storage = sim(empty, Sim::default());
    let runs = io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let runs = take(&allocator, &io, 400).await.unwrap();
        allocator.close(&io).await.unwrap();
        runs
    });
    let before = simulated(&storage).image();
    for nth in 1..=6 {
        let storage = sim(before.clone(), Sim::default());
        io.block_on(async {
            let allocator = open(&io, &storage, 0).await.unwrap();
            simulated(&storage).fail(Kind::Read, nth, libc::EIO, false);
            // None of the refcount blocks has been read yet.
            let error = free_and_settle(&allocator, &io, &runs).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(allocator.in_limbo() > 0);
            let mark = allocator.mark();
            allocator.settle(&io, mark).await.unwrap();
            assert_eq!(allocator.in_limbo(), 0);
            allocator.close(&io).await.unwrap();
        });
        let judged = judge(&simulated(&storage).image());
        let clean = Judged {
            errors: 0,
            leaks: 0,
        };
        assert_eq!(judged, clean, "{nth}");
    }
    io.close();
}
