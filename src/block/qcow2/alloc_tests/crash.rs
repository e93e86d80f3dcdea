//! Power losses: whatever subset of the unflushed writes survives.

use super::*;
use crate::block::sim::Event;

/// Checks what a loss of power now could leave: every cluster that is handed out has a durable
/// refcount, and there is nothing but leaks.
fn crash(storage: &Storage, live: &Books, seed: u64, judged: bool) {
    let sim = simulated(storage);
    let mut random_seed = seed | 1;
    let images = [
        sim.crash_with(|_, _| 0),
        sim.crash_with(|_, versions| versions - 1),
        sim.crash(random(&mut random_seed)),
        sim.crash(random(&mut random_seed)),
    ];
    for image in images {
        let counts = Counts::of(&image);
        for cluster in live.0.keys() {
            assert!(counts.get(*cluster) >= 1, "cluster {cluster} can be lost");
        }
        if judged {
            assert_eq!(judge(&image).errors, 0);
        }
    }
}

#[test]
fn a_power_loss_at_any_operation_leaks_at_worst() {
    for (options, clusters) in [
        // A table of one cluster covers 64 blocks of 64 clusters: it grows several times.
        ("cluster_size=512,refcount_bits=64", 9000),
        ("cluster_size=512,refcount_bits=16", 20000),
        ("cluster_size=4096,refcount_bits=1", 300),
    ] {
        let io = reactor();
        let empty = image(options, 8 << 20);
        let mut seed = 7;
        // First without a loss, to see where to cut.
        let mut cuts = vec![0];
        let mut next = 0;
        while let Some(&cut) = cuts.get(next) {
            next += 1;
            let storage = sim(
                empty.clone(),
                Sim {
                    pieces: true,
                    ..Sim::default()
                },
            );
            if cut > 0 {
                simulated(&storage).cut_power_after(cut);
            }
            let mut live = Books::default();
            let ended: Result<()> = io.block_on(async {
                let allocator = open(&io, &storage, 0).await?;
                let mut turn = 0;
                while (live.0.len() as u64) < clusters {
                    turn += 1;
                    let runs = take(&allocator, &io, 300).await?;
                    runs.iter().for_each(|run| live.take(run.0, run.1));
                    if turn % 3 == 0 {
                        // Unlinked and durable, as far as the allocator is told.
                        for run in &runs[..runs.len() / 2] {
                            live.give(run.0, run.1);
                        }
                        free_and_settle(&allocator, &io, &runs[..runs.len() / 2]).await?;
                        allocator.write_back(&io).await?;
                    }
                }
                allocator.close(&io).await
            });
            io.close();
            if cut == 0 {
                ended.unwrap();
                let events = simulated(&storage).take_events();
                let total = events.len() as u64;
                // All early operations, those around a change of the header, and a sample.
                cuts.extend(1..total.min(40));
                for (at, event) in (0u64..).zip(&events) {
                    if matches!(event, Event::Write { offset: 0, .. }) {
                        // 0 would be no cut.
                        cuts.extend(at.saturating_sub(4).max(1)..(at + 6).min(total));
                    }
                }
                cuts.extend((0..12).map(|_| 1 + random(&mut seed) % (total - 1)));
                let counts = Counts::of(&empty);
                let after = simulated(&storage).image();
                let grown = Counts::of(&after).word(48) != counts.word(48);
                assert_eq!(grown, options.contains("512"), "{options}");
            } else {
                assert!(ended.is_err());
            }
            crash(&storage, &live, random(&mut seed), true);
        }
    }
}

#[test]
fn clusters_that_promise_zeros_read_as_zeros_after_a_power_loss() {
    for zeros in [true, false] {
        let io = reactor();
        let config = Sim {
            promises_zeros: zeros,
            discard_garbage: true,
            ..Sim::default()
        };
        let storage = sim(image("cluster_size=4096", 8 << 20), config);
        io.block_on(async {
            let allocator = open(&io, &storage, 0).await.unwrap();
            for round in 0..20 {
                let fresh = allocator.allocate(&io, 5).await.unwrap();
                assert_eq!(fresh.zeroed(), zeros);
                let (at, len) = (
                    fresh.first().0 as usize * 4096,
                    fresh.count() as usize * 4096,
                );
                let durable = simulated(&storage).crash_with(|_, _| 0);
                let bytes = durable.get(at..at + len).unwrap();
                assert_eq!(bytes.iter().all(|b| *b == 0), zeros);
                let mut dirt = io.buf(len);
                dirt.fill(0xee);
                storage.write(&io, at as u64, dirt.sg()).await.unwrap();
                storage.flush(&io).await.unwrap();
                match round % 3 {
                    0 => drop(fresh),
                    _ => free_and_settle(&allocator, &io, &[fresh.keep()])
                        .await
                        .unwrap(),
                }
            }
            allocator.close(&io).await.unwrap();
        });
        assert_eq!(
            judge(&simulated(&storage).image()),
            Judged {
                errors: 0,
                leaks: 0
            }
        );
        io.close();
    }
}

#[test]
fn a_cluster_freed_and_taken_again_is_counted_again_first() {
    let io = reactor();
    let storage = sim(image("cluster_size=4096", 8 << 20), Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let mut ever = std::collections::HashSet::new();
        let mut again = 0;
        for round in 0..40 {
            let runs = take(&allocator, &io, 100).await.unwrap();
            let mut live = Books::default();
            runs.iter().for_each(|run| live.take(run.0, run.1));
            crash(&storage, &live, round, false);
            again += live
                .0
                .keys()
                .filter(|cluster| !ever.insert(**cluster))
                .count();
            free_and_settle(&allocator, &io, &runs).await.unwrap();
            if round % 2 == 0 {
                allocator.write_back(&io).await.unwrap();
                storage.flush(&io).await.unwrap();
            }
        }
        assert!(again > 1000, "{again} clusters were used again");
        allocator.close(&io).await.unwrap();
    });
    io.close();
}
