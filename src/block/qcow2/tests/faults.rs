//! Every operation fails once: nothing but the request's own range may show it.

use super::history::{History, SECTOR, Version, run_bytes};
use super::*;
use crate::block::sim::Kind;

struct Sweep {
    io: Io,
    image: Qcow2,
    storage: Arc<Storage>,
    below: Vec<u8>,
    history: History,
    failures: u32,
}

impl Sweep {
    async fn write(&mut self, first: u64, count: u64, tag: u64) {
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let pin = self.io.pin();
        let offset = first * SECTOR as u64;
        let result = self
            .image
            .write(&self.io, &self.below, offset, buf.sg())
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
            .write_zeroes(&self.io, &self.below, offset, len, unmap)
            .await;
        drop(pin);
        self.note(result, first, count);
    }

    fn note(&mut self, result: Result<()>, first: u64, count: u64) {
        match result {
            Ok(()) => self.history.complete(first, count),
            Err(error) => {
                assert!(
                    matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace),
                    "{error}"
                );
                self.failures += 1;
            }
        }
    }

    async fn flush(&mut self) {
        let point = self.history.flush_begins();
        match self.image.flush(&self.io, &self.below).await {
            Ok(()) => self.history.flush_completed(point),
            Err(_) => self.failures += 1,
        }
    }

    async fn steps(&mut self) {
        self.write(1, 2, 1).await; // part of a fresh cluster
        self.write(40, 40, 2).await; // several, with head and tail
        self.write(130, 3, 3).await; // over a compressed cluster, if there is one
        self.flush().await;
        self.zero(48, 16, true).await;
        self.zero(64, 8, false).await;
        self.write(50, 2, 4).await;
        self.write(66, 2, 5).await; // into a reserved cluster
        self.flush().await;
        self.write(48, 32, 6).await;
        self.write(900, 100, 7).await; // another L2 table, where clusters are small
        self.zero(41, 3, true).await;
        self.flush().await;
        self.write(48, 1, 8).await;
    }

    fn judge_crashes(&self, what: &str) {
        for seed in 0..4 {
            let bytes = the_sim(&self.storage).crash(seed);
            let judge = judge::Judge::new(&bytes);
            judge.check();
            self.history.check_crash(&judge.read_all(&self.below), what);
        }
    }
}

/// Returns false when the sweep is over: so many operations there were not.
fn sweep(
    bits: u32,
    compat: &str,
    backing: bool,
    errno: i32,
    stays: bool,
    nth: u64,
    source: &(Vec<u8>, Vec<u8>, Vec<u8>),
) -> bool {
    let what = format!("{bits} {compat} {backing} {errno} {stays}, operation {nth}");
    let (bytes, contents, below) = source;
    let io = reactor();
    let config = Sim {
        torn_failures: true,
        seed: nth,
        ..Sim::default()
    };
    let storage = sim(bytes.clone(), config);
    let options = Options {
        read_only: false,
        l2_cache_bytes: 0,
        workers: 0,
        has_backing: backing,
    };
    let image = io.block_on(open(&io, &storage, options)).expect("open");
    let mut sweep = Sweep {
        io: io.clone(),
        image,
        storage,
        below: below.clone(),
        history: History::new(contents.clone()),
        failures: 0,
    };
    let before = the_sim(&sweep.storage).operations();
    the_sim(&sweep.storage).fail(Kind::Any, nth, errno, stays);
    io.block_on(sweep.steps());
    let over = the_sim(&sweep.storage).operations() - before < nth;
    sweep.judge_crashes(&what);
    the_sim(&sweep.storage).heal();
    io.block_on(async {
        let disk = read_all(&io, &sweep.image, &sweep.below)
            .await
            .expect("read");
        sweep.history.check_now(&disk, &what);
        let failures = sweep.failures;
        sweep.write(1, 2, 20).await;
        sweep.write(40, 40, 21).await;
        sweep.write(900, 100, 22).await;
        sweep.flush().await;
        assert_eq!(
            sweep.failures, failures,
            "{what}: what failed once works the next time"
        );
        sweep.judge_crashes(&what);
        sweep.image.close(&io, &sweep.below).await.expect("close");
    });
    let bytes = the_sim(&sweep.storage).crash_with(|_, _| 0);
    let leaks = judge::Judge::new(&bytes).check();
    assert_eq!(leaks, 0, "{what}: leaks");
    let disk = judge::Judge::new(&bytes).read_all(&sweep.below);
    sweep.history.check_now(&disk, &what);
    io.close();
    !over
}

#[test]
fn an_error_in_the_middle_leaves_the_old_mapping() {
    for (bits, compat, backing) in [(12, "1.1", true), (9, "1.1", false), (12, "0.10", true)] {
        let images = Images::new();
        let below = if backing { noise(4, 700_000) } else { vec![] };
        let options = format!("cluster_size={},compat={compat}", 1 << bits);
        if backing {
            write_file(&images.path("base"), &below);
            images.create_over("a", &options, "base", "raw", 1 << 20);
        } else {
            images.create("a", &options, 1 << 20);
        }
        images.qemu_io("a", &["write -c -P 3 64k 4k", "write -P 5 70k 1k"]);
        let source = (images.bytes("a"), images.contents("a"), below);
        for (errno, stays) in [(libc::EIO, false), (libc::ENOSPC, false), (libc::EIO, true)] {
            let mut nth = 1;
            while sweep(bits, compat, backing, errno, stays, nth, &source) {
                nth += 1;
                assert!(nth < 2000);
            }
            assert!(nth > 20, "{nth}");
        }
    }
}
