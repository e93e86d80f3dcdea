//! Every operation of a life fails once, from opening to closing: nothing but the request's own range may
//! show it, what is tried again works, and nothing leaks.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::history::{History, SECTOR, Version, run_bytes};
use super::kinds::{Kind, kinds};
use super::*;
use crate::block::sim;

struct Life<'a> {
    io: Io,
    image: Qcow2,
    storage: Arc<Storage>,
    below: &'a Vec<u8>,
    history: History,
    failures: u32,
}

/// How an operation fails. Of a transfer that fails a part has happened: it was cut short.
struct Fault {
    errno: i32,
    /// All that follow fail, too.
    stays: bool,
    /// The others do not happen at once either.
    pieces: bool,
}

const FAULTS: [Fault; 4] = [
    Fault {
        errno: libc::EIO,
        stays: false,
        pieces: false,
    },
    Fault {
        errno: libc::ENOSPC,
        stays: false,
        pieces: true,
    },
    Fault {
        errno: libc::EIO,
        stays: true,
        pieces: true,
    },
    Fault {
        errno: libc::ENOSPC,
        stays: true,
        pieces: false,
    },
];

fn is_told(error: &crate::block::error::Error) {
    let kind = error.kind();
    assert!(
        matches!(kind, ErrorKind::Io | ErrorKind::NoSpace),
        "{error}"
    );
}

impl Life<'_> {
    async fn write(&mut self, first: u64, count: u64, tag: u64) {
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let pin = self.io.pin();
        let offset = first * SECTOR as u64;
        let result = self
            .image
            .write(&self.io, self.below, offset, buf.sg())
            .await;
        drop(pin);
        self.note(result, first, count);
    }

    async fn zero(&mut self, first: u64, count: u64, unmap: bool) {
        self.history.begin(first, count, Version::Zeros);
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let pin = self.io.pin();
        let result = self
            .image
            .write_zeroes(&self.io, self.below, offset, len, unmap)
            .await;
        drop(pin);
        self.note(result, first, count);
    }

    /// What a discard leaves is zeros, or what was there.
    async fn discard(&mut self, first: u64, count: u64) {
        self.history.begin(first, count, Version::Zeros);
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let _pin = self.io.pin();
        if let Err(error) = self.image.discard(&self.io, offset, len).await {
            is_told(&error);
            self.failures += 1;
        }
    }

    fn note(&mut self, result: Result<()>, first: u64, count: u64) {
        match result {
            Ok(()) => self.history.complete(first, count),
            Err(error) => {
                is_told(&error);
                self.failures += 1;
            }
        }
    }

    async fn flush(&mut self) {
        let point = self.history.flush_begins();
        match self.image.flush(&self.io, self.below).await {
            Ok(()) => self.history.flush_completed(point),
            Err(error) => {
                is_told(&error);
                self.failures += 1;
            }
        }
    }

    async fn read(&mut self) {
        match read_all(&self.io, &self.image, self.below).await {
            Ok(disk) => self.history.check_now(&disk, "read"),
            Err(error) => {
                is_told(&error);
                self.failures += 1;
            }
        }
    }

    async fn steps(&mut self) {
        self.write(1, 2, 1).await; // part of a cluster, fresh or compressed
        self.write(140, 40, 2).await; // several, with head and tail
        self.write(201, 3, 3).await; // over a single compressed cluster, if there is one
        self.flush().await;
        self.zero(148, 16, true).await;
        self.zero(164, 8, false).await;
        self.discard(512, 48).await;
        self.write(150, 2, 4).await;
        self.write(166, 2, 5).await; // into a reserved cluster
        self.write(600, 3, 6).await; // in place, if there is data
        self.flush().await;
        self.read().await;
        self.write(148, 32, 7).await;
        self.write(900, 100, 8).await; // another L2 table, where clusters are small
        self.zero(141, 3, true).await;
        self.flush().await;
        self.write(148, 1, 9).await;
    }

    fn judge_crashes(&self, what: &str) {
        for seed in 0..3 {
            let bytes = the_sim(&self.storage).crash(seed);
            let judge = judge::Judge::new(&bytes);
            judge.check();
            self.history.check_crash(&judge.read_all(self.below), what);
        }
    }
}

/// An image of a kind.
struct Source {
    kind: &'static Kind,
    bytes: Vec<u8>,
    contents: Vec<u8>,
    below: Vec<u8>,
}

impl Source {
    fn new(kind: &'static Kind) -> Self {
        let images = Images::new();
        let below = kind.create(&images);
        let (bytes, contents) = (images.bytes("a"), images.contents("a"));
        Self {
            kind,
            bytes,
            contents,
            below,
        }
    }
}

/// A life in which the `nth` operation fails. Returns false when there were not so many.
fn life(source: &Source, fault: &Fault, nth: u64) -> bool {
    let (errno, stays) = (fault.errno, fault.stays);
    let what = format!("{}, {errno} {stays}, operation {nth}", source.kind.name);
    let io = reactor();
    let config = Sim {
        torn_failures: true,
        pieces: fault.pieces,
        promises_zeros: source.kind.zeros,
        seed: nth,
        ..Sim::default()
    };
    let storage = sim(source.bytes.clone(), config);
    let options = source.kind.opened(0);
    let simulated = the_sim(&storage);
    simulated.fail(sim::Kind::Any, nth, errno, stays);
    let image = io.block_on(open(&io, &storage, options));
    let failed_to_open = image.is_err();
    let image = image.unwrap_or_else(|error| {
        is_told(&error);
        simulated.heal();
        let again = io.block_on(open(&io, &storage, options));
        again.unwrap_or_else(|error| panic!("{what}: the second opening: {error}"))
    });
    let mut life = Life {
        io: io.clone(),
        image,
        storage: storage.clone(),
        below: &source.below,
        history: History::new(source.contents.clone()),
        failures: 0,
    };
    io.block_on(async {
        life.steps().await;
        assert!(!failed_to_open || life.failures == 0, "{what}: opened well");
        life.judge_crashes(&what);
        if simulated.operations() >= nth {
            // What failed once works the next time.
            simulated.heal();
            let disk = read_all(&io, &life.image, life.below).await;
            life.history.check_now(&disk.expect("read"), &what);
            let failures = life.failures;
            life.write(1, 2, 20).await;
            life.write(140, 40, 21).await;
            life.write(201, 3, 22).await;
            life.write(900, 100, 23).await;
            life.flush().await;
            assert_eq!(life.failures, failures, "{what}: the next time");
            life.judge_crashes(&what);
        }
        if let Err(error) = life.image.close(&io, life.below).await {
            is_told(&error);
            life.judge_crashes(&what);
            simulated.heal();
            life.image
                .close(&io, life.below)
                .await
                .expect("the second close");
        }
    });
    let over = simulated.operations() < nth;
    let bytes = simulated.crash_with(|_, _| 0);
    let judge = judge::Judge::new(&bytes);
    assert_eq!(judge.check(), 0, "{what}: leaks");
    life.history
        .check_now(&judge.read_all(&source.below), &what);
    drop(life);
    io.close();
    !over
}

/// Kinds whose paths through the code differ.
const SWEPT: [&str; 7] = [
    "plain",
    "compressed",
    "over a base, compressed",
    "over a base, no zeros from storage",
    "clusters of 512 bytes",
    "reserved clusters",
    "version 2 over a base",
];

#[test]
fn an_error_in_the_middle_leaves_the_old_mapping() {
    let swept: Vec<_> = kinds().filter(|k| SWEPT.contains(&k.name)).collect();
    assert_eq!(swept.len(), SWEPT.len());
    let (next, lives) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(kind) = swept.get(next.fetch_add(1, Ordering::Relaxed)) {
            let source = Source::new(kind);
            for fault in &FAULTS {
                let mut nth = 1;
                while life(&source, fault, nth) {
                    nth += 1;
                    assert!(nth < 5000);
                }
                assert!(nth > 20, "{nth}");
                lives.fetch_add(nth as usize, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in [scope.spawn(work), scope.spawn(work)] {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    println!("{} lives with a fault", lives.into_inner());
}
