//! Copy-on-read: what it stores, and that nobody but the layers below notices.

mod failures;
mod races;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use super::active::Locks;
use super::copy_on_read::CopyStats;
use super::qcow2::{Header, OnDirty, Options, Qcow2};
use super::sim::{Event, Sim, SimStorage};
use super::storage::Storage;
use super::tests::{dir, io, pattern};
use super::*;
use crate::reactor::Io;

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
