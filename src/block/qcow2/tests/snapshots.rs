//! Images with internal snapshots: the active disk changes, and the snapshots stay what they were.

use std::cell::Cell;
use std::rc::Rc;

use super::history::{History, SECTOR, Version, run_bytes};
use super::*;
use crate::block::qcow2::snapshots::list;
use crate::block::sim::Kind;

mod crash;
mod hostile;

/// An image of `qemu-img` with snapshots, and what each of them shows.
struct Album {
    images: Images,
    below: Vec<u8>,
    options: Options,
    snapshots: Vec<(String, Vec<u8>)>,
    listing: String,
    /// No further reference can be counted.
    refcounts_are_full: bool,
    /// What the active disk must show.
    model: Vec<u8>,
}

/// The same without the last: every table is shared.
const ALL_SHARED: [&[&str]; 3] = [STAGES[0], STAGES[1], &[]];
/// What is written before each snapshot, and after the last.
const STAGES: [&[&str]; 3] = [
    &[
        "write -P 1 0 200k",
        "write -P 2 512k 100k",
        "write -c -P 3 640k 64k",
        "write -P 4 1000k 20k",
    ],
    &[
        "write -P 5 40k 60k",
        "write -P 6 300k 8k",
        "write -c -P 7 704k 64k",
        "write -z 520k 8k",
    ],
    &["write -P 8 60k 4k", "write -P 9 900k 64k"],
];

impl Album {
    fn new(options: &str, below: &[u8], size: u64, stages: &[&[&str]]) -> Self {
        let images = Images::new();
        if below.is_empty() {
            images.create("a", options, size);
        } else {
            write_file(&images.path("base"), below);
            images.create_over("a", options, "base", "raw", size);
        }
        let mut snapshots = Vec::new();
        for (n, commands) in stages.iter().enumerate() {
            if !commands.is_empty() {
                images.qemu_io("a", commands);
            }
            if n + 1 < stages.len() {
                let name = format!("s{n}");
                run("qemu-img", &["snapshot", "-c", &name, &images.name("a")]);
                let contents = images.contents("a");
                snapshots.push((name, contents));
            }
        }
        run("qemu-img", &["check", "-q", &images.name("a")]);
        Self {
            below: below.to_vec(),
            options: Options {
                read_only: false,
                l2_cache_bytes: 1 << 20,
                workers: 2,
                has_backing: !below.is_empty(),
                on_dirty: OnDirty::Repair,
            },
            snapshots,
            listing: run("qemu-img", &["snapshot", "-l", &images.name("a")]),
            refcounts_are_full: options.contains("refcount_bits=2"),
            model: images.contents("a"),
            images,
        }
    }

    fn sim(&self, config: Sim) -> Arc<Storage> {
        sim(self.images.bytes("a"), config)
    }

    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    /// Judges an image that was closed: by `qemu-img`, also after each snapshot is deleted in turn.
    fn judge(&self, bytes: &[u8], what: &str) {
        let name = self.images.name("judged");
        write_file(&self.images.path("judged"), bytes);
        run("qemu-img", &["check", "-q", &name]);
        assert_same(&self.images.contents("judged"), &self.model, what);
        let listing = run("qemu-img", &["snapshot", "-l", &name]);
        assert_eq!(listing, self.listing, "{what}");
        for (snapshot, contents) in &self.snapshots {
            let raw = self.images.name("snapshot.raw");
            let which = format!("snapshot.name={snapshot}");
            run(
                "qemu-img",
                &["convert", "-l", &which, "-O", "raw", &name, &raw],
            );
            let got = std::fs::read(raw).expect("contents");
            assert_same(&got, contents, &format!("{what}: {snapshot}"));
        }
        // One is made the active disk, and they are deleted: the refcounts must add up.
        let fits = !self.refcounts_are_full;
        if let Some((snapshot, contents)) = self.snapshots.first().filter(|_| fits) {
            let copy = self.images.name("applied");
            write_file(&self.images.path("applied"), bytes);
            run("qemu-img", &["snapshot", "-a", snapshot, &copy]);
            run("qemu-img", &["check", "-q", &copy]);
            assert_same(&self.images.contents("applied"), contents, what);
        }
        for (snapshot, _) in &self.snapshots {
            run("qemu-img", &["snapshot", "-d", snapshot, &name]);
            run("qemu-img", &["check", "-q", &name]);
        }
        assert_same(&self.images.contents("judged"), &self.model, what);
    }

    /// Judges what a power loss has left: leaks are allowed, errors are not, and snapshots are whole.
    fn judge_crash(&self, bytes: &[u8], what: &str) {
        write_file(&self.images.path("crashed"), bytes);
        let output = Command::new("qemu-img")
            .args(["check", &self.images.name("crashed")])
            .output()
            .expect("qemu-img");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            matches!(output.status.code(), Some(0 | 3)),
            "{what}: {text}{}",
            String::from_utf8_lossy(&output.stdout)
        );
        for (n, (snapshot, contents)) in self.snapshots.iter().enumerate() {
            let then = with_snapshot_active(bytes, n);
            let got = judge::Judge::new(&then).read_all(&self.below);
            assert_same(&got, contents, &format!("{what}: {snapshot}"));
        }
    }

    async fn random_step(&mut self, io: &Io, image: &Qcow2, state: &mut u64) {
        let sectors = self.size() / 512;
        let offset = random(state) % sectors;
        let most = [1, 16, 100, 600][(random(state) % 4) as usize];
        let len = (1 + random(state) % most).min(sectors - offset) * 512;
        let offset = offset * 512;
        let range = offset as usize..(offset + len) as usize;
        let pin = io.pin();
        match random(state) % 10 {
            0..5 => {
                let data = noise(random(state), len as usize);
                let mut buf = io.buf(data.len());
                buf.copy_from_slice(&data);
                image
                    .write(io, &self.below, offset, buf.sg())
                    .await
                    .expect("write");
                self.model[range].copy_from_slice(&data);
            }
            5 => {
                // Whole clusters: what a discard does is then not in doubt.
                let whole = image.header().geometry.cluster_size();
                let (first, end) = (
                    offset.next_multiple_of(whole),
                    (offset + len) / whole * whole,
                );
                if first < end && !(image.header().version < 3 && image.has_backing) {
                    image
                        .discard(io, first, end - first)
                        .await
                        .expect("discard");
                    self.model[first as usize..end as usize].fill(0);
                }
            }
            6 | 7 => {
                let unmap = random(state) % 2 == 0;
                image
                    .write_zeroes(io, &self.below, offset, len, unmap)
                    .await
                    .expect("zeroes");
                self.model[range].fill(0);
            }
            8 => {
                drop(pin);
                image.flush(io, &self.below).await.expect("flush");
            }
            _ => {
                let mut buf = io.buf(len as usize);
                read(io, image, &self.below, offset, buf.sg())
                    .await
                    .expect("read");
                assert_same(&buf, &self.model[range], "a read");
            }
        }
    }
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The image with the L1 table of its snapshot `n` as the active one: no more than a way to look at it.
fn with_snapshot_active(bytes: &[u8], n: usize) -> Vec<u8> {
    let mut at = number(bytes, 64, 8) as usize;
    for _ in 0..n {
        let variable =
            number(bytes, at + 12, 2) + number(bytes, at + 14, 2) + number(bytes, at + 36, 4);
        at = (at + 40 + variable as usize).next_multiple_of(8);
    }
    let mut image = bytes.to_vec();
    image[40..48].copy_from_slice(&bytes[at..at + 8]);
    image[36..40].copy_from_slice(&bytes[at + 8..at + 12]);
    image
}

#[test]
fn random_requests_change_the_active_disk_only_in_every_geometry() {
    let cases = [
        ("cluster_size=512", false, 1 << 20),
        ("cluster_size=4k", false, 0),
        ("cluster_size=4k,refcount_bits=2", true, 1 << 20),
        ("cluster_size=4k,compat=0.10", true, 1 << 20),
        ("cluster_size=4k,compat=0.10", false, 1 << 20),
        ("cluster_size=64k,refcount_bits=64", true, 0),
        ("cluster_size=64k", false, 1 << 20),
        ("cluster_size=2M", true, 1 << 20),
    ];
    for (seed, (options, backing, cache)) in cases.into_iter().enumerate() {
        let seed = seed as u64 + 1;
        let below = if backing {
            noise(seed, 900_001)
        } else {
            vec![]
        };
        let zeroes_are_unknown = options.contains("0.10");
        let all = if seed % 2 == 0 { STAGES } else { ALL_SHARED };
        let stages: Vec<Vec<&str>> = all
            .iter()
            .map(|stage| {
                let known = |c: &&&str| !(zeroes_are_unknown && c.contains("-z"));
                // A compressed write is of whole clusters, and several of them count in one.
                let few = options.contains("2M") || options.contains("refcount_bits=2");
                let fits = |c: &&&str| !(c.contains("-c") && few);
                stage.iter().filter(known).filter(fits).copied().collect()
            })
            .collect();
        let stages: Vec<&[&str]> = stages.iter().map(Vec::as_slice).collect();
        let mut album = Album::new(options, &below, 1_300_992, &stages);
        album.options.l2_cache_bytes = cache;
        let config = Sim {
            seed,
            pieces: true,
            promises_zeros: seed % 2 == 0,
            discard_garbage: true,
            ..Sim::default()
        };
        let storage = album.sim(config);
        let mut state = seed;
        for _ in 0..3 {
            let io = reactor();
            let image = io
                .block_on(open(&io, &storage, album.options))
                .expect("open");
            io.block_on(async {
                for _ in 0..60 {
                    album.random_step(&io, &image, &mut state).await;
                }
                let got = read_all(&io, &image, &album.below).await.expect("read");
                assert_same(&got, &album.model, options);
                image.close(&io, &album.below).await.expect("close");
            });
            io.close();
        }
        album.judge(&the_sim(&storage).image(), options);
    }
}

#[test]
fn the_list_of_snapshots_is_what_qemu_img_tells() {
    let album = Album::new("cluster_size=4k", &[], 1 << 20, &STAGES);
    let io = reactor();
    let storage = album.sim(Sim::default());
    let got = io.block_on(async {
        let header = Header::read(&io, &storage).await.expect("header");
        list(&io, &storage, &header).await.expect("list")
    });
    let args = ["info", "--output", "json", &album.images.name("a")];
    let told: serde_json::Value = serde_json::from_str(&run("qemu-img", &args)).expect("json");
    let told = told["snapshots"].as_array().expect("snapshots");
    assert_eq!(got.len(), told.len());
    for (got, told) in got.iter().zip(told) {
        assert_eq!(got.id, told["id"]);
        assert_eq!(got.name, told["name"]);
        assert_eq!(got.date_secs, told["date-sec"]);
        assert_eq!(got.date_nanos, told["date-nsec"]);
        assert_eq!(got.vm_state_bytes, told["vm-state-size"]);
        assert_eq!(got.vm_clock_nanos, told["vm-clock-nsec"]);
        assert_eq!(got.icount, told["icount"].as_u64());
        assert_eq!(got.disk_bytes, 1 << 20);
    }
}

#[test]
fn a_shared_table_is_copied_by_the_first_change_and_by_nothing_else() {
    let album = Album::new(
        "cluster_size=4k",
        &[],
        4 << 20,
        &[&["write -P 1 0 4M"], &[]],
    );
    let io = reactor();
    let storage = album.sim(Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, album.options).await.expect("open");
        let tables = &image.tables;
        let (first, second) = (0, 1);
        let before = (tables.slice_offset(first), tables.slice_offset(second));
        read_all(&io, &image, &()).await.expect("read");
        assert!(tables.shared_table(first).is_some());
        assert_eq!(
            tables.slice_offset(first),
            before.0,
            "reading copies nothing"
        );
        let mut buf = io.buf(512);
        buf.fill(0);
        image.write(&io, &(), 4096, buf.sg()).await.expect("write");
        assert_eq!(tables.shared_table(first), None);
        let copy = tables.slice_offset(first);
        assert_ne!(copy, before.0);
        image.write(&io, &(), 8192, buf.sg()).await.expect("write");
        assert_eq!(tables.slice_offset(first), copy, "once");
        assert_eq!(tables.slice_offset(second), before.1, "the other one stays");
        image.discard(&io, 2 << 20, 4096).await.expect("discard");
        assert_ne!(tables.slice_offset(second), before.1);
        // A cluster is ours by now: it is written in place.
        the_sim(&storage).take_events();
        image.write(&io, &(), 4096, buf.sg()).await.expect("write");
        assert_eq!(the_sim(&storage).take_events().len(), 1);
        image.close(&io, &()).await.expect("close");
    });
    io.close();
    let mut album = album;
    for at in [4096, 8192] {
        album.model[at..at + 512].fill(0);
    }
    album.model[2 << 20..(2 << 20) + 4096].fill(0);
    album.judge(&the_sim(&storage).image(), "two tables");
}

#[test]
fn concurrent_first_changes_copy_a_shared_table_once() {
    for seed in 0..6 {
        let mut album = Album::new("cluster_size=4k", &[], 1 << 20, &ALL_SHARED);
        let storage = album.sim(Sim {
            seed,
            delay: 6,
            pieces: true,
            ..Sim::default()
        });
        let io = reactor();
        let image = io
            .block_on(open(&io, &storage, album.options))
            .expect("open");
        let image = Rc::new(image);
        let old = image.tables.slice_offset(0).expect("a table");
        let left = Rc::new(Cell::new(16));
        for n in 0..16usize {
            // Two writers a cluster; every fourth zeroes instead.
            let at = n * 2048 + (seed as usize % 3) * 65536;
            let data = noise(n as u64, 2048);
            let zero = n % 4 == 3;
            album.model[at..at + 2048].copy_from_slice(&data);
            if zero {
                album.model[at..at + 2048].fill(0);
            }
            let (io, image, left) = (io.clone(), image.clone(), left.clone());
            io.clone().spawn(async move {
                let pin = io.pin();
                if zero {
                    let zeroed = image.write_zeroes(&io, &(), at as u64, 2048, true).await;
                    zeroed.expect("zeroes");
                } else {
                    let mut buf = io.buf(2048);
                    buf.copy_from_slice(&data);
                    let written = image.write(&io, &(), at as u64, buf.sg()).await;
                    written.expect("write");
                }
                drop(pin);
                left.set(left.get() - 1);
            });
        }
        io.block_on(async {
            while left.get() > 0 {
                io.yield_now().await;
            }
            let old = image.tables.geometry.host_cluster(old);
            let alloc = image.allocator().expect("allocator");
            let before = alloc.refcount(&io, old).await.expect("refcount");
            assert_eq!(before, 2, "in limbo, with s1's");
            image.close(&io, &()).await.expect("close");
            let after = alloc.refcount(&io, old).await.expect("refcount");
            assert_eq!(after, 1, "one reference was given back");
        });
        io.close();
        album.judge(&the_sim(&storage).image(), &format!("seed {seed}"));
    }
}

#[test]
fn threads_change_the_active_disk_side_by_side() {
    let mut album = Album::new("cluster_size=4k", &[], 4 << 20, &ALL_SHARED);
    let epochs = Epochs::new();
    let control = reactor_of(&epochs, 0);
    let storage = album.sim(Sim::default());
    let image = control
        .block_on(open(&control, &storage, album.options))
        .expect("open");
    std::thread::scope(|scope| {
        for worker in 1..=2usize {
            let (image, epochs) = (&image, &epochs);
            scope.spawn(move || {
                let io = reactor_of(epochs, worker);
                io.block_on(async {
                    for n in 0..512u64 {
                        // Every second half of a cluster is one thread's.
                        let at = n * 4096 % (2 << 20) + (worker as u64 - 1) * 2048;
                        let mut buf = io.buf(2048);
                        buf.fill(worker as u8 + 0x40);
                        let pin = io.pin();
                        image.write(&io, &(), at, buf.sg()).await.expect("write");
                        drop(pin);
                        if n % 100 == 99 {
                            image.flush(&io, &()).await.expect("flush");
                        }
                    }
                });
                io.close();
            });
        }
    });
    for (n, half) in album.model[..2 << 20].chunks_mut(2048).enumerate() {
        half.fill(0x41 + (n % 2) as u8);
    }
    control.block_on(image.close(&control, &())).expect("close");
    control.close();
    album.judge(&the_sim(&storage).image(), "two threads");
}

#[test]
fn the_saved_state_of_a_machine_behind_the_disk_stays() {
    // Behind the disk's last L2 table: as an image of a smaller disk, the same clusters are machine state.
    let mut album = Album::new(
        "cluster_size=4k",
        &[],
        4 << 20,
        &[
            &["write -P 1 0 64k", "write -P 2 2M 1M"],
            &["write -P 3 3M 64k"],
        ],
    );
    let whole = album.model.clone();
    let mut bytes = album.images.bytes("a");
    bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
    album.model.truncate(1 << 20);
    let storage = sim(bytes, Sim::default());
    let io = reactor();
    let image = io
        .block_on(open(&io, &storage, album.options))
        .expect("open");
    io.block_on(async {
        let mut state = 5;
        for _ in 0..60 {
            album.random_step(&io, &image, &mut state).await;
        }
        image.close(&io, &()).await.expect("close");
    });
    io.close();
    let mut bytes = the_sim(&storage).image();
    bytes[24..32].copy_from_slice(&(4u64 << 20).to_be_bytes());
    album.model.extend_from_slice(&whole[1 << 20..]);
    album.judge(&bytes, "behind the disk");
}
