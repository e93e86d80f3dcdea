//! Several workers at once, on real files and simulated ones.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::block::file::{FileOptions, FileStorage};

/// Which clusters are in use, of all threads.
struct Bitmap(Box<[AtomicBool]>);

impl Bitmap {
    fn take(&self, first: HostCluster, count: u64) {
        for cluster in first.0..first.0 + count {
            let taken = self.0[cluster as usize].swap(true, Ordering::SeqCst);
            assert!(!taken, "cluster {cluster} was handed out twice");
        }
    }

    fn give(&self, first: HostCluster, count: u64) {
        for cluster in first.0..first.0 + count {
            assert!(self.0[cluster as usize].swap(false, Ordering::SeqCst));
        }
    }
}

/// One worker's random life; ends with some clusters owned.
async fn work(
    allocator: &Arc<Allocator>,
    io: &Io,
    used: &Bitmap,
    mut seed: u64,
) -> Vec<(HostCluster, u64)> {
    let mut owned: Vec<(HostCluster, u64)> = Vec::new();
    for _ in 0..400 {
        let pin = io.pin();
        match random(&mut seed) % 8 {
            0..=2 => {
                let fresh = allocator
                    .allocate(io, random(&mut seed) % 30 + 1)
                    .await
                    .unwrap();
                used.take(fresh.first(), fresh.count());
                io.yield_now().await;
                if random(&mut seed) % 5 == 0 {
                    used.give(fresh.first(), fresh.count());
                    match random(&mut seed) % 2 {
                        0 => drop(fresh),
                        _ => fresh.give_back_untouched(),
                    }
                } else {
                    owned.push(fresh.keep());
                }
            }
            3..=5 if !owned.is_empty() => {
                let run = owned.swap_remove(random(&mut seed) as usize % owned.len());
                used.give(run.0, run.1);
                allocator.free(io, run.0, run.1);
            }
            6 => {
                drop(pin);
                let mark = allocator.mark();
                io.yield_now().await;
                allocator.settle(io, mark).await.unwrap();
            }
            _ => allocator.write_back(io).await.unwrap(),
        }
    }
    owned
}

fn run_workers(storage: &Arc<Storage>, max_clusters: usize) -> u64 {
    const WORKERS: usize = 4;
    let epochs = Epochs::new();
    let io = reactor_of(&epochs, 0);
    let allocator = io.block_on(open(&io, storage, WORKERS)).unwrap();
    let used = Bitmap((0..max_clusters).map(|_| AtomicBool::new(false)).collect());
    let owned: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=WORKERS)
            .map(|worker| {
                let (allocator, epochs, used) = (allocator.clone(), epochs.clone(), &used);
                scope.spawn(move || {
                    let io = reactor_of(&epochs, worker);
                    let owned = io.block_on(work(&allocator, &io, used, worker as u64 * 77));
                    // With a refill under way, perhaps.
                    io.close();
                    owned.iter().map(|run| run.1).sum::<u64>()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    let in_use = used.0.iter().filter(|b| b.load(Ordering::SeqCst)).count() as u64;
    assert_eq!(in_use, owned);
    io.block_on(async {
        let mark = allocator.mark();
        io.yield_now().await;
        allocator.settle(&io, mark).await.unwrap();
        assert_eq!(allocator.in_limbo(), 0);
        allocator.close(&io).await.unwrap();
    });
    io.close();
    owned
}

#[test]
fn workers_never_get_the_same_cluster() {
    for options in [
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=1",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        create(&path, options, 64 << 20);
        let options_of_file = FileOptions {
            read_only: false,
            direct: options.contains("4096"),
        };
        let file = FileStorage::open(&path, options_of_file).unwrap();
        let storage = Arc::new(Storage::File(file));
        let owned = run_workers(&storage, 1 << 20);
        let want = Judged {
            errors: 0,
            leaks: owned,
        };
        assert_eq!(judge_file(&path), want, "{options}");
    }
}

#[test]
fn workers_never_get_the_same_cluster_when_operations_end_in_any_order() {
    let config = Sim {
        delay: 3,
        pieces: true,
        ..Sim::default()
    };
    let storage = sim(image("cluster_size=512,refcount_bits=16", 64 << 20), config);
    let owned = run_workers(&storage, 1 << 20);
    let want = Judged {
        errors: 0,
        leaks: owned,
    };
    assert_eq!(judge(&simulated(&storage).image()), want);
}

#[test]
fn refills_come_ahead_of_need_and_one_at_a_time() {
    let io = reactor();
    let config = Sim {
        delay: 2,
        ..Sim::default()
    };
    let storage = sim(image("cluster_size=4096", 64 << 20), config);
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let first = allocator.allocate(&io, 1).await.unwrap();
        assert_eq!(allocator.in_arena(0), 15);
        let more = take(&allocator, &io, 8).await.unwrap();
        // The task has been started and needs turns, not requests.
        for _ in 0..200 {
            io.yield_now().await;
        }
        assert_eq!(allocator.in_arena(0), 7 + 32);
        drop((first, more));
        allocator.close(&io).await.unwrap();
    });
    io.close();
}

#[test]
fn close_waits_for_a_refill_under_way() {
    let io = reactor();
    let config = Sim {
        delay: 5,
        ..Sim::default()
    };
    let storage = sim(image("cluster_size=4096", 64 << 20), config);
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        drop(take(&allocator, &io, 10).await.unwrap());
        allocator.close(&io).await.unwrap();
        assert_eq!(allocator.in_arena(0), 0);
        // No task of it is left.
        assert_eq!(Arc::strong_count(&allocator), 1);
    });
    assert_eq!(
        judge(&simulated(&storage).image()),
        Judged {
            errors: 0,
            leaks: 10
        }
    );
    io.close();
}

#[test]
fn a_worker_that_ends_in_a_refill_loses_nothing() {
    let epochs = Epochs::new();
    let io = reactor_of(&epochs, 0);
    let empty = image("cluster_size=512,refcount_bits=64", 8 << 20);
    for turns in 0..60 {
        let config = Sim {
            delay: 1,
            ..Sim::default()
        };
        let storage = sim(empty.clone(), config);
        let allocator = io.block_on(open(&io, &storage, 1)).unwrap();
        let worker = reactor_of(&epochs, 1);
        let (task, arc) = (worker.clone(), allocator.clone());
        let got = std::rc::Rc::new(std::cell::Cell::new(0));
        let count = got.clone();
        let _ = worker.spawn(async move {
            let run = arc.allocate(&task, 1).await.unwrap().keep();
            count.set(run.1);
            std::future::pending::<()>().await;
        });
        (0..turns).for_each(|_| {
            worker.turn();
        });
        worker.close();
        io.block_on(allocator.close(&io)).unwrap();
        let judged = judge(&simulated(&storage).image());
        let want = Judged {
            errors: 0,
            leaks: got.get(),
        };
        assert_eq!(judged, want, "{turns} turns");
    }
    io.close();
}
