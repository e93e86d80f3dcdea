//! A freed cluster is not handed out before its unlinking is durable and nobody can still look at it.

use std::rc::Rc;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;

use super::arena::{Arena, Stock};
use super::limbo::Limbo;
use super::runs::Run;
use crate::explore;
use crate::reactor::{Epochs, Worker};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Clusters of the model's image; guest cluster n begins in host cluster n + FIRST.
const CLUSTERS: usize = 2;
const FIRST: u64 = 5;

/// An image: mappings in memory and in the file, 0 for unmapped, and what is in its clusters.
struct Image {
    epochs: Arc<Epochs>,
    limbo: Limbo,
    map: [AtomicU64; CLUSTERS],
    dirty: [AtomicBool; CLUSTERS],
    file: [AtomicU64; CLUSTERS],
    clusters: [UnsafeCell<()>; CLUSTERS],
    /// Refcounts that are 0: what refills find (`Slow::free`).
    free: Mutex<Vec<u64>>,
}

impl Image {
    fn new() -> Rc<Self> {
        let mapped = |n| AtomicU64::new(FIRST + n as u64);
        Rc::new(Self {
            epochs: Epochs::new(),
            limbo: Limbo::default(),
            map: std::array::from_fn(mapped),
            dirty: std::array::from_fn(|_| AtomicBool::new(false)),
            file: std::array::from_fn(mapped),
            clusters: std::array::from_fn(|_| UnsafeCell::new(())),
            free: Mutex::default(),
        })
    }

    /// `discard::unmap_run`: publish, mark dirty, free.
    fn discard(&self, guest: usize) {
        let host = self.map[guest].swap(0, Ordering::AcqRel);
        self.dirty[guest].swap(true, Ordering::AcqRel);
        self.limbo.add(Run::new(host, 1), self.epochs.retire());
    }

    /// `flush::flush_once`: mark, snapshot, write, flush, settle. One at a time.
    fn flush(&self) {
        let mark = self.limbo.mark();
        for guest in 0..CLUSTERS {
            if self.dirty[guest].swap(false, Ordering::AcqRel) {
                let copy = self.map[guest].load(Ordering::Acquire);
                self.file[guest].store(copy, Ordering::Relaxed);
            }
        }
        for run in self.limbo.take(mark, |epoch| self.epochs.passed(epoch)) {
            for cluster in run.first..run.end() {
                for file in &self.file {
                    let there = file.load(Ordering::Relaxed);
                    assert_ne!(there, cluster, "the file still points at it");
                }
                self.free.lock().unwrap().push(cluster);
            }
        }
    }

    /// A refill and a write of new data: all that is free is handed out, each to one.
    fn reuse(&self) {
        for cluster in std::mem::take(&mut *self.free.lock().unwrap()) {
            // Loom tells if somebody looks at it meanwhile, or has it, too.
            self.clusters[(cluster - FIRST) as usize].with_mut(|_| ());
        }
    }

    /// A request that reads guest cluster `guest`, over some turns of its worker.
    fn read(&self, worker: &Worker, guest: usize) {
        let pin = worker.pin();
        let host = self.map[guest].load(Ordering::Acquire);
        worker.turn();
        if host != 0 {
            self.clusters[(host - FIRST) as usize].with(|_| ());
        }
        drop(pin);
    }
}

/// A discard in one thread while another flushes.
pub fn a_discard_against_a_flush() {
    explore(|| {
        let image = Image::new();
        let its = image.clone();
        let thread = thread::spawn(move || {
            let worker = Worker::new(&its.epochs);
            let pin = worker.pin();
            its.discard(0);
            drop(pin);
            worker.park();
        });
        image.flush();
        image.reuse();
        image.flush();
        image.reuse();
        thread.join().unwrap();
    });
}

/// Neighbours that are freed one by one are joined in limbo, but not over a mark between them.
pub fn frees_of_neighbours_against_a_flush() {
    explore(|| {
        let image = Image::new();
        let its = image.clone();
        let thread = thread::spawn(move || {
            its.discard(0);
            its.discard(1);
        });
        image.flush();
        image.reuse();
        image.flush();
        image.reuse();
        thread.join().unwrap();
    });
}

/// A request reads a cluster that is discarded, flushed and used again under it.
pub fn a_read_against_discard_flush_and_reuse() {
    explore(|| {
        let image = Image::new();
        let its = image.clone();
        let thread = thread::spawn(move || {
            let worker = Worker::new(&its.epochs);
            worker.turn();
            its.read(&worker, 0);
            worker.park();
        });
        image.discard(0);
        image.flush();
        image.reuse();
        thread.join().unwrap();
    });
}

/// Neighbours joined in limbo pass when the later of them has: a request that began between the frees
/// looks at the second.
pub fn a_read_of_the_later_of_two_neighbours() {
    explore(|| {
        let image = Image::new();
        let its = image.clone();
        let thread = thread::spawn(move || {
            let worker = Worker::new(&its.epochs);
            its.read(&worker, 1);
            worker.park();
        });
        image.discard(0);
        image.discard(1);
        image.flush();
        image.reuse();
        thread.join().unwrap();
    });
}

/// Three threads: a reader, one that discards, one that flushes and uses again.
pub fn a_read_a_discard_and_a_flush() {
    explore(|| {
        let image = Image::new();
        let (reads, discards) = (image.clone(), image.clone());
        let reader = thread::spawn(move || {
            let worker = Worker::new(&reads.epochs);
            reads.read(&worker, 0);
            worker.park();
        });
        let discarder = thread::spawn(move || discards.discard(0));
        image.flush();
        image.reuse();
        reader.join().unwrap();
        discarder.join().unwrap();
    });
}

/// Two workers free clusters and refill their arenas from what has left limbo. No cluster has two
/// owners, and none is lost.
pub fn no_cluster_has_two_owners() {
    explore(|| {
        let image = Image::new();
        let workers: Vec<_> = (0..CLUSTERS)
            .map(|n| {
                let image = image.clone();
                thread::spawn(move || {
                    let arena = Arena::new(4);
                    image.discard(n);
                    // One flush at a time, as `Flushes::done` has it: here the second worker's.
                    if n == 1 {
                        image.flush();
                    }
                    let stock: Vec<Stock> = std::mem::take(&mut *image.free.lock().unwrap())
                        .into_iter()
                        .map(|cluster| Stock {
                            run: Run::new(cluster, 1),
                            zeroed: true,
                        })
                        .collect();
                    arena.refill(&stock, 4, 4);
                    let mut owned = 0;
                    while let Some(stock) = arena.take(1) {
                        let at = (stock.run.first - FIRST) as usize;
                        image.clusters[at].with_mut(|_| ());
                        owned += stock.run.count;
                    }
                    owned
                })
            })
            .collect();
        let owned: u64 = workers.into_iter().map(|w| w.join().unwrap()).sum();
        let free = image.free.lock().unwrap().len() as u64;
        assert_eq!(owned + free + image.limbo.len(), CLUSTERS as u64);
    });
}
