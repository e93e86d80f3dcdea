//! Copy-on-read: what it stores, and that nobody but the layers below notices.

use std::cell::Cell;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use super::active::Locks;
use super::copy_on_read::CopyStats;
use super::qcow2::{Header, OnDirty, Options, Qcow2};
use super::sim::{Event, Kind, Sim, SimStorage, random};
use super::storage::Storage;
use super::tests::{dir, io, pattern};
use super::*;
use crate::reactor::Io;

type Boxed = Pin<Box<dyn Future<Output = ()>>>;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

fn the_sim(storage: &Storage) -> &SimStorage {
    match storage {
        Storage::Sim(sim) => sim,
        _ => panic!("a simulated storage"),
    }
}

/// A disk with copy-on-read, of an overlay over raw bytes, both simulated.
struct Over {
    dir: tempfile::TempDir,
    io: Io,
    disk: Arc<ActiveDisk>,
    top: Arc<Storage>,
    base: Arc<Storage>,
    /// What the disk must read as.
    model: Vec<u8>,
}

impl Over {
    fn new(options: &str, base: Vec<u8>, size: usize) -> Self {
        let slow = Sim {
            delay: 4,
            ..Sim::default()
        };
        Self::with(options, base, size, &slow, true)
    }

    fn with(options: &str, base: Vec<u8>, size: usize, config: &Sim, copies: bool) -> Self {
        let dir = dir();
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(at("base"), &base).expect("base");
        let (file, below, bytes) = (at("a"), at("base"), size.to_string());
        let line = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", &below, "-F", "raw", &file, &bytes,
        ];
        run("qemu-img", &line);
        let io = io();
        let overlay = std::fs::read(&file).expect("overlay");
        let top = Arc::new(Storage::Sim(SimStorage::new(overlay, config.clone())));
        let below = SimStorage::new(base.clone(), config.clone()).read_only_too();
        let below = Arc::new(Storage::Sim(below));
        let mut model = base;
        model.resize(size, 0);
        let disk = open(&io, &top, &below, copies);
        Self {
            dir,
            io,
            disk,
            top,
            base: below,
            model,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        self.io.block_on(read(&self.io, &self.disk, offset, len))
    }

    /// Reads, and looks at what came.
    fn check(&self, offset: usize, len: usize) {
        let got = self.read(offset, len);
        assert!(got == self.model[offset..offset + len], "{offset}+{len}");
    }

    /// Lets the copies under way end.
    fn settle(&self) {
        self.io.block_on(async {
            while self.disk.copies_under_way() > 0 {
                self.io.yield_now().await;
            }
        });
    }

    fn base_bytes(&self) -> u64 {
        the_sim(&self.base).bytes_read()
    }

    /// Gives the disk back, and has QEMU's tools look at the image.
    fn finish(self, what: &str) -> CopyStats {
        self.check(0, self.model.len());
        self.settle();
        let stats = self.disk.copy_stats();
        let closed = self.io.block_on(self.disk.clone().deactivate(&self.io));
        closed.expect("closed");
        let bytes = the_sim(&self.top).crash_with(|_, _| 0);
        std::fs::write(self.path("a"), bytes).expect("image");
        let (file, raw) = (self.path("a"), self.path("raw"));
        let (file, raw) = (file.display().to_string(), raw.display().to_string());
        run("qemu-img", &["check", "-q", &file]);
        run("qemu-img", &["convert", "-O", "raw", &file, &raw]);
        assert!(std::fs::read(raw).expect("raw") == self.model, "{what}");
        self.io.close();
        stats
    }
}

fn open(io: &Io, top: &Arc<Storage>, below: &Arc<Storage>, copies: bool) -> Arc<ActiveDisk> {
    let mut spec = DiskSpec::new(Source::Null { size: 0 }, Format::Qcow2);
    spec.copy_on_read = copies;
    let options = Options {
        read_only: false,
        l2_cache_bytes: 1 << 20,
        workers: 0,
        has_backing: true,
        on_dirty: OnDirty::Repair,
    };
    let image = io.block_on(async {
        let header = Header::read(io, top).await.expect("header");
        let image = Qcow2::open(io, top.clone(), header, options);
        image.await.expect("image")
    });
    let size = image.size();
    let layers = vec![
        Layer::Qcow2(Box::new(image)),
        Layer::Raw(Raw::new(below.clone(), below.len())),
    ];
    let disk = ActiveDisk::new(layers, Vec::new(), Locks::default(), size, &spec);
    let disk = Arc::new(disk);
    disk.fill_ahead_by_tasks();
    disk.copy_by_tasks();
    disk
}

async fn read(io: &Io, disk: &ActiveDisk, offset: usize, len: usize) -> Vec<u8> {
    let mut buf = io.buf(len);
    buf.fill(0xee);
    let read = disk.read(io, offset as u64, buf.sg());
    read.await.expect("read");
    buf.to_vec()
}

async fn write(io: &Io, disk: &ActiveDisk, offset: usize, data: &[u8]) {
    let mut buf = io.buf(data.len());
    buf.copy_from_slice(data);
    let written = disk.write(io, offset as u64, buf.sg());
    written.await.expect("write");
}

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

const KINDS: [&str; 5] = [
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=512",
    "cluster_size=64k,compat=0.10",
];

#[test]
fn a_second_read_does_not_touch_the_base() {
    for kind in KINDS {
        let size = 2 << 20;
        let over = Over::new(kind, pattern(size, 1), size);
        for offset in (0..size).step_by(128 << 10) {
            over.check(offset, 128 << 10);
            over.settle();
        }
        assert_eq!(over.base_bytes(), size as u64, "{kind}: all of it once");
        over.check(0, size);
        assert_eq!(over.base_bytes(), size as u64, "{kind}: and no more");
        assert_eq!(over.finish(kind).stored_bytes, size as u64, "{kind}");
    }
}

#[test]
fn after_it_is_opened_again_the_base_is_not_read_either() {
    let size = 1 << 20;
    let over = Over::new("cluster_size=64k", pattern(size, 1), size);
    over.check(0, size / 2);
    over.settle();
    let closed = over.io.block_on(over.disk.clone().deactivate(&over.io));
    closed.expect("closed");
    let before = over.base_bytes();
    let again = open(&over.io, &over.top, &over.base, true);
    let over = Over {
        disk: again,
        ..over
    };
    over.check(0, size / 2);
    assert_eq!(over.base_bytes(), before);
    over.finish("again");
}

#[test]
fn a_small_read_brings_the_whole_cluster_and_reads_no_byte_twice() {
    for (kind, unit) in [
        ("cluster_size=64k", 65536),
        ("cluster_size=2M", 2 << 20),
        ("cluster_size=128k,extended_l2=on", 4096),
    ] {
        let size = 4 << 20;
        let over = Over::new(kind, pattern(size, 1), size);
        over.check(unit + 1536, 512);
        over.settle();
        assert_eq!(over.base_bytes(), unit as u64, "{kind}");
        over.check(unit, unit);
        assert_eq!(over.base_bytes(), unit as u64, "{kind}");
        over.finish(kind);
    }
}

#[test]
fn without_the_option_nothing_is_copied() {
    let size = 1 << 20;
    let over = Over::with(KINDS[0], pattern(size, 1), size, &Sim::default(), false);
    over.check(0, size);
    the_sim(&over.top).take_events();
    over.check(0, size);
    assert_eq!(over.base_bytes(), 2 * size as u64);
    assert!(the_sim(&over.top).take_events().is_empty());
    assert_eq!(over.finish("off"), CopyStats::default());
}

#[test]
fn a_base_that_is_shorter_and_of_odd_length_ends_in_zeros_that_are_not_stored_as_data() {
    for kind in KINDS {
        let size = 2 << 20;
        let over = Over::new(kind, pattern(700_001, 1), size);
        for offset in (0..size).step_by(1 << 18) {
            over.check(offset, 1 << 18);
            over.settle();
        }
        let read = over.base_bytes();
        over.check(0, size);
        assert_eq!(over.base_bytes(), read, "{kind}");
        let len = the_sim(&over.top).image().len();
        let used = run_len(&over);
        assert!(used < 1_200_000, "{kind}: {used} of {len}");
        over.finish(kind);
    }
}

/// Bytes of data written to the overlay so far.
fn run_len(over: &Over) -> u64 {
    let events = the_sim(&over.top).take_events();
    let len = |event| match event {
        Event::Write { len, .. } => len,
        _ => 0,
    };
    events.into_iter().map(len).sum()
}

#[test]
fn zeros_of_the_base_become_mappings_to_zeros() {
    for kind in KINDS {
        let size = 1 << 20;
        let mut base = pattern(size, 1);
        base[200_000..800_000].fill(0);
        let over = Over::new(kind, base, size);
        for offset in (0..size).step_by(1 << 17) {
            over.check(offset, 1 << 17);
            over.settle();
        }
        let before = over.base_bytes();
        over.check(262_144, 262_144);
        let again = over.base_bytes() - before;
        // Version 2 can not say that it is zeros, and would have to store them.
        assert_eq!(again > 0, kind.contains("0.10"), "{kind}");
        over.finish(kind);
    }
}

#[test]
fn a_disk_whose_end_is_inside_a_cluster() {
    for kind in KINDS {
        let size = (1 << 20) + 512 * 3;
        for base in [size, size + 70_000, size - 512] {
            let over = Over::new(kind, pattern(base, 1), size);
            let over = Over {
                model: {
                    let mut model = pattern(base, 1);
                    model.resize(size, 0);
                    model
                },
                ..over
            };
            over.check(size - 4096, 4096);
            over.settle();
            over.finish(kind);
        }
    }
}

#[test]
fn a_full_file_system_is_not_the_guests_error() {
    for kind in KINDS {
        let size = 4 << 20;
        let over = Over::new(kind, pattern(size, 1), size);
        the_sim(&over.top).full_at(the_sim(&over.top).image().len() as u64);
        over.check(0, 65536);
        over.settle();
        let failed = over.disk.copy_stats();
        // A read of several pieces makes several copies.
        assert!((1..=2).contains(&failed.failed), "{kind}: {failed}");
        for offset in (65536..size).step_by(65536) {
            over.check(offset, 65536);
            over.settle();
        }
        assert_eq!(
            over.disk.copy_stats(),
            failed,
            "{kind}: it is asked for space again"
        );
        assert_eq!(failed.stored_bytes, 0, "{kind}");
        the_sim(&over.top).heal();
        the_sim(&over.top).full_at(u64::MAX);
        over.check(0, 65536);
        over.settle();
        assert_eq!(over.disk.copy_stats(), failed, "{kind}: not yet");
        over.disk.end_copy_pause();
        over.check(0, 65536);
        over.settle();
        assert_eq!(over.disk.copy_stats().stored_bytes, 65536, "{kind}");
        over.finish(kind);
    }
}

#[test]
fn a_base_that_fails_is_the_guests_error_only_where_the_guest_reads() {
    let size = 1 << 20;
    let over = Over::new("cluster_size=64k", pattern(size, 1), size);
    // The second read of the base is the rest of the cluster.
    the_sim(&over.base).fail(Kind::Read, 2, libc::EIO, true);
    over.check(4096, 4096);
    over.settle();
    assert_eq!(over.disk.copy_stats().failed, 1);
    let error = over.io.block_on(async {
        let mut buf = over.io.buf(4096);
        over.disk.read(&over.io, 131_072, buf.sg()).await
    });
    error.expect_err("the base can not be read");
    the_sim(&over.base).heal();
    over.finish("a failing base");
}

#[test]
fn a_write_that_fails_stores_nothing() {
    for kind in KINDS {
        for nth in 1..12 {
            let size = 1 << 20;
            let config = Sim {
                delay: 4,
                torn_failures: true,
                ..Sim::default()
            };
            let over = Over::with(kind, pattern(size, 1), size, &config, true);
            the_sim(&over.top).fail(Kind::Any, nth, libc::EIO, false);
            for offset in (0..size).step_by(65536) {
                let got = over.io.block_on(async {
                    let mut buf = over.io.buf(65536);
                    let read = over.disk.read(&over.io, offset as u64, buf.sg()).await;
                    read.map(|()| buf.to_vec())
                });
                // Looking for mappings reads the overlay for the guest, too.
                if let Ok(got) = got {
                    assert!(got == over.model[offset..offset + 65536], "{kind} {nth}");
                }
                over.settle();
                over.disk.end_copy_pause();
            }
            the_sim(&over.top).heal();
            over.finish(&format!("{kind} {nth}"));
        }
    }
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

#[test]
fn while_the_guest_is_migrated_nothing_is_copied() {
    let size = 1 << 20;
    let over = Over::new(KINDS[1], pattern(size, 1), size);
    let eager = |eager| over.io.block_on(over.disk.set_eager(&over.io, eager));
    eager(true).expect("eager");
    over.check(0, 65536);
    over.settle();
    assert_eq!(over.disk.copy_stats().stored_bytes, 0);
    eager(false).expect("not eager");
    over.check(0, 65536);
    over.settle();
    assert_eq!(over.disk.copy_stats().stored_bytes, 65536);
    over.finish("eager");
}

#[test]
fn what_copies_add_to_a_flush() {
    let size = 1 << 20;
    let over = Over::new(KINDS[1], pattern(size, 1), size);
    // The table and clusters enough for what follows.
    over.check(0, 8 * 65536);
    over.settle();
    let flush = || {
        the_sim(&over.top).take_events();
        let flushed = over.io.block_on(over.disk.flush(&over.io));
        flushed.expect("flush");
        the_sim(&over.top).take_events()
    };
    flush();
    assert_eq!(flush(), [Event::Flush], "nothing to write");
    over.check(9 * 65536, 2 * 65536);
    over.settle();
    // Data before mapping: one flush of the file more, and one write for neighbouring mappings.
    let events = flush();
    assert!(
        matches!(
            events[..],
            [Event::Flush, Event::Write { .. }, Event::Flush]
        ),
        "{events:?}"
    );
    over.finish("flush");
}

#[test]
fn a_power_loss_at_any_step_of_a_flush_loses_copies_at_most() {
    for kind in KINDS {
        for steps in 0..5 {
            let size = 512 << 10;
            let mut base = pattern(size, 1);
            base[100_000..200_000].fill(0);
            let over = Over::new(kind, base, size);
            over.check(0, 4096);
            over.settle();
            let flushed = over.io.block_on(over.disk.flush(&over.io));
            flushed.expect("flush");
            over.check(0, size);
            over.settle();
            the_sim(&over.top).cut_power_after(steps);
            let _cut = over.io.block_on(over.disk.flush(&over.io));
            for seed in 1..=4 {
                // All that reached the file and some of it; the mapping without the data above all.
                let bytes = the_sim(&over.top).crash(seed);
                std::fs::write(over.path("a"), bytes).expect("image");
                let (file, raw) = (over.path("a"), over.path("raw"));
                let (file, raw) = (file.display().to_string(), raw.display().to_string());
                run("qemu-img", &["convert", "-O", "raw", &file, &raw]);
                let got = std::fs::read(raw).expect("raw");
                assert!(got == over.model, "{kind}, {steps} steps, {seed}");
            }
        }
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
            let model = Rc::new(std::cell::RefCell::new(over.model.clone()));
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
