//! Images whose guest data is in a file of its own, raw by itself or not.

use super::history::{History, SECTOR, Version, run_bytes};
use super::*;

/// An image with its data file, both in memory.
struct Pair {
    images: Images,
    image: Arc<Storage>,
    data: Arc<Storage>,
    raw: bool,
    below: Vec<u8>,
    model: Vec<u8>,
}

impl Pair {
    fn new(options: &str, raw: bool, below: &[u8], size: u64, config: &Sim) -> Self {
        let images = Images::new();
        let data = images.name("d");
        let kind = if raw { "on" } else { "off" };
        let options = format!("{options},data_file={data},data_file_raw={kind}");
        if below.is_empty() {
            images.create("a", &options, size);
        } else {
            write_file(&images.path("base"), below);
            images.create_over("a", &options, "base", "raw", size);
        }
        images.qemu_io(
            "a",
            &[
                "write -P 7 100k 70k",
                "write -z 128k 4k",
                "write -P 8 0 512",
            ],
        );
        let mut bytes = images.bytes("d");
        if !raw {
            // Where nothing is mapped it may hold anything.
            let free = 200 << 10..bytes.len().min(size as usize);
            bytes[free.clone()].copy_from_slice(&noise(size, free.len()));
        }
        Self {
            image: sim(images.bytes("a"), config.clone()),
            data: sim(bytes, config.clone()),
            model: images.contents("a"),
            below: below.to_vec(),
            raw,
            images,
        }
    }

    async fn open(&self, io: &Io, read_only: bool) -> Qcow2 {
        let options = Options {
            read_only,
            has_backing: !self.below.is_empty(),
            ..READ
        };
        open_pair(io, &self.image, &self.data, options)
            .await
            .expect("open")
    }

    async fn write(&mut self, io: &Io, image: &Qcow2, offset: usize, bytes: &[u8]) {
        let mut buf = io.buf(bytes.len());
        buf.copy_from_slice(bytes);
        let _pin = io.pin();
        let written = image.write(io, &self.below, offset as u64, buf.sg());
        written.await.expect("write");
        self.model[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// What the data file alone shows of the disk.
    fn raw_view(&self, bytes: Vec<u8>) -> Vec<u8> {
        let mut bytes = bytes;
        bytes.resize(self.model.len(), 0);
        bytes
    }

    fn check_raw(&self, what: &str) {
        if self.raw {
            let view = self.raw_view(the_sim(&self.data).image());
            assert_same(&view, &self.model, what);
        }
    }

    async fn steps(&mut self, io: &Io, image: &Qcow2, seed: u64) {
        let mut state = seed;
        let sectors = self.model.len() / 512;
        for step in 0..150 {
            let at = random(&mut state) as usize % sectors;
            let most = [1, 8, 64, 300][random(&mut state) as usize % 4];
            let len = (1 + random(&mut state) as usize % most).min(sectors - at) * 512;
            let at = at * 512;
            let what = format!("seed {seed}, step {step}");
            match random(&mut state) % 8 {
                0..4 => {
                    let bytes = noise(random(&mut state), len);
                    self.write(io, image, at, &bytes).await;
                }
                4 | 5 => {
                    let unmap = random(&mut state) % 2 == 0;
                    let _pin = io.pin();
                    let (at, len) = (at as u64, len as u64);
                    let zeroed = image.write_zeroes(io, &self.below, at, len, unmap);
                    zeroed.await.expect("zeroes");
                    self.model[at as usize..][..len as usize].fill(0);
                }
                6 => {
                    // Whole clusters, so that both kinds discard the same.
                    let cluster = image.header.geometry.cluster_size() as usize;
                    let (start, end) =
                        (at.next_multiple_of(cluster), (at + len) / cluster * cluster);
                    if start < end {
                        let _pin = io.pin();
                        let discarded = image.discard(io, start as u64, (end - start) as u64);
                        discarded.await.expect("discard");
                        self.model[start..end].fill(0);
                    }
                }
                _ => {
                    image.flush(io, &self.below).await.expect("flush");
                    self.check_raw(&what);
                }
            }
            if step % 10 == 0 {
                let got = read_all(io, image, &self.below).await.expect("read");
                assert_same(&got, &self.model, &what);
            }
        }
    }
}

pub(super) async fn open_pair(
    io: &Io,
    image: &Arc<Storage>,
    data: &Arc<Storage>,
    options: Options,
) -> Result<Qcow2> {
    let header = Header::read(io, image).await?;
    Qcow2::open_with_data(io, image.clone(), Some(data.clone()), header, options).await
}

#[test]
fn random_changes_are_as_the_model_and_qemu_reads_both_files() {
    let base = noise(3, 600_007);
    for (options, raw, below, size) in [
        ("cluster_size=4k", false, &[][..], 1 << 20),
        ("cluster_size=4k", true, &[], 1 << 20),
        ("cluster_size=64k", false, &base, 1_000_448),
        ("cluster_size=64k", true, &[], 1_000_448),
        ("cluster_size=512", false, &base, 300 << 10),
        ("cluster_size=512", true, &[], 300 << 10),
    ] {
        for seed in 1..3 {
            let what = format!("{options} raw {raw} seed {seed}");
            let config = Sim {
                // What a data file holds where nothing was written is anything.
                promises_zeros: false,
                discard_garbage: true,
                ..Sim::default()
            };
            let mut pair = Pair::new(options, raw, below, size, &config);
            let io = reactor();
            io.block_on(async {
                let before = the_sim(&pair.image).image().len();
                let all = the_sim(&pair.data).image().len();
                for round in 0..2 {
                    let image = pair.open(&io, false).await;
                    pair.steps(&io, &image, seed * 10 + round).await;
                    image.close(&io, &pair.below).await.expect("close");
                    pair.check_raw(&what);
                }
                if options == "cluster_size=64k" {
                    let now = the_sim(&pair.image).image().len();
                    assert_eq!(now, before, "{what}: no data goes to the image");
                }
                let now = the_sim(&pair.data).image().len();
                assert_eq!(now, all, "{what}: the data file does not grow");
            });
            io.close();
            write_file(&pair.images.path("a"), &the_sim(&pair.image).image());
            write_file(&pair.images.path("d"), &the_sim(&pair.data).image());
            run("qemu-img", &["check", "-q", &pair.images.name("a")]);
            assert_same(&pair.images.contents("a"), &pair.model, &what);
            let autoclear = the_sim(&pair.image).image()[95];
            assert_eq!(autoclear, u8::from(raw) << 1, "{what}: the raw bit stays");
        }
    }
}

#[test]
fn power_loss_of_both_files_loses_nothing_flushed_and_invents_nothing() {
    let mut judged = 0;
    for seed in 0..6u64 {
        let raw = seed % 2 == 0;
        let below = if raw { vec![] } else { noise(seed, 150_001) };
        let config = Sim {
            seed: seed + 1,
            discard_garbage: true,
            promises_zeros: seed % 3 != 0,
            ..Sim::default()
        };
        let pair = Pair::new("cluster_size=4k", raw, &below, 256 << 10, &config);
        let history = History::new(pair.model.clone());
        let io = reactor();
        io.block_on(async {
            let image = pair.open(&io, false).await;
            let mut state = seed + 50;
            for step in 0..60u64 {
                let first = random(&mut state) % 500;
                let count = 1 + random(&mut state) % 12;
                let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
                let pin = io.pin();
                match random(&mut state) % 6 {
                    0..3 => {
                        let bytes = run_bytes(first, count, step + 1);
                        let mut buf = io.buf(bytes.len());
                        buf.copy_from_slice(&bytes);
                        history.begin(first, count, Version::Written(step + 1));
                        let written = image.write(&io, &pair.below, offset, buf.sg());
                        written.await.expect("write");
                        history.complete(first, count);
                    }
                    3 | 4 => {
                        history.begin(first, count, Version::Zeros);
                        let unmap = step % 2 == 0;
                        let zeroed = image.write_zeroes(&io, &pair.below, offset, len, unmap);
                        zeroed.await.expect("zeroes");
                        history.complete(first, count);
                    }
                    _ => {
                        drop(pin);
                        let point = history.flush_begins();
                        image.flush(&io, &pair.below).await.expect("flush");
                        history.flush_completed(point);
                    }
                }
                for chance in 0..3 {
                    let what = format!("seed {seed}, step {step}, chance {chance}");
                    let chance = seed << 20 | step << 8 | chance;
                    let data = the_sim(&pair.data).crash(chance);
                    if raw {
                        history.check_crash(&pair.raw_view(data.clone()), &what);
                    }
                    // The newest or the oldest of the image with any of the data shows a wrong order soonest.
                    let sim_image = the_sim(&pair.image);
                    for pick in 0..3 {
                        let bytes = match pick {
                            0 => sim_image.crash_with(|_, _| 0),
                            1 => sim_image.crash_with(|_, versions| versions - 1),
                            _ => sim_image.crash(chance),
                        };
                        let (left, data) = (
                            sim(bytes, Sim::default()),
                            sim(data.clone(), Sim::default()),
                        );
                        let options = Options {
                            has_backing: !pair.below.is_empty(),
                            ..READ
                        };
                        let left = open_pair(&io, &left, &data, options).await.expect("open");
                        let disk = read_all(&io, &left, &pair.below).await.expect("read");
                        history.check_crash(&disk, &what);
                        judged += 1;
                    }
                }
            }
            image.close(&io, &pair.below).await.expect("close");
        });
        io.close();
    }
    assert!(judged > 2000, "{judged}");
}

/// Tasks that change sectors of their own, in clusters that they share, while the power is cut in thought.
struct World {
    io: Io,
    pair: Pair,
    image: Qcow2,
    history: History,
    tag: std::cell::Cell<u64>,
    running: std::cell::Cell<u64>,
}

impl World {
    async fn task(self: std::rc::Rc<Self>, task: u64, seed: u64) {
        const TASKS: u64 = 4;
        let mut state = seed * 31 + task + 1;
        for _ in 0..25 {
            let count = 1 + random(&mut state) % 4;
            let first = (random(&mut state) % 32 * TASKS + task) * 4;
            let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
            let (io, below) = (&self.io, &self.pair.below);
            let pin = io.pin();
            match random(&mut state) % 6 {
                0..3 => {
                    self.tag.set(self.tag.get() + 1);
                    let bytes = run_bytes(first, count, self.tag.get());
                    let mut buf = io.buf(bytes.len());
                    buf.copy_from_slice(&bytes);
                    self.history
                        .begin(first, count, Version::Written(self.tag.get()));
                    let written = self.image.write(io, below, offset, buf.sg());
                    written.await.expect("write");
                    self.history.complete(first, count);
                }
                3 | 4 => {
                    self.history.begin(first, count, Version::Zeros);
                    let unmap = random(&mut state) % 2 == 0;
                    let zeroed = self.image.write_zeroes(io, below, offset, len, unmap);
                    zeroed.await.expect("zeroes");
                    self.history.complete(first, count);
                }
                _ => {
                    drop(pin);
                    let point = self.history.flush_begins();
                    self.image.flush(io, &self.pair.below).await.expect("flush");
                    self.history.flush_completed(point);
                }
            }
        }
        self.running.set(self.running.get() - 1);
    }

    async fn crasher(&self, seed: u64) -> u64 {
        let (mut state, mut judged) = (seed + 9, 0);
        while self.running.get() > 0 {
            for _ in 0..random(&mut state) % 8 {
                self.io.yield_now().await;
            }
            let chance = random(&mut state);
            let what = format!("seed {seed}, chance {chance:#x}");
            let data = the_sim(&self.pair.data).crash(chance);
            if self.pair.raw {
                self.history
                    .check_crash(&self.pair.raw_view(data.clone()), &what);
            }
            let image = the_sim(&self.pair.image).crash(chance ^ 1);
            let (image, data) = (sim(image, Sim::default()), sim(data, Sim::default()));
            let options = Options {
                has_backing: !self.pair.below.is_empty(),
                ..READ
            };
            let left = open_pair(&self.io, &image, &data, options)
                .await
                .expect("open");
            let disk = read_all(&self.io, &left, &self.pair.below)
                .await
                .expect("read");
            self.history.check_crash(&disk, &what);
            judged += 1;
        }
        judged
    }
}

#[test]
fn writers_of_shared_clusters_and_power_loss_with_a_data_file() {
    let mut judged = 0;
    for seed in 0..6u64 {
        let raw = seed % 2 == 0;
        let below = if raw { vec![] } else { noise(seed, 150_001) };
        let config = Sim {
            seed: seed + 1,
            delay: 4,
            pieces: true,
            discard_garbage: true,
            ..Sim::default()
        };
        let size = 256 << 10;
        let pair = Pair::new("cluster_size=4k", raw, &below, size, &config);
        let io = reactor();
        let world = std::rc::Rc::new(World {
            image: io.block_on(pair.open(&io, false)),
            history: History::new(pair.model.clone()),
            io: io.clone(),
            pair,
            tag: Default::default(),
            running: std::cell::Cell::new(4),
        });
        for task in 0..4 {
            io.spawn(world.clone().task(task, seed));
        }
        io.block_on(async {
            judged += world.crasher(seed).await;
            let disk = read_all(&io, &world.image, &world.pair.below)
                .await
                .expect("read");
            world.history.check_now(&disk, "at the end");
            world
                .image
                .close(&io, &world.pair.below)
                .await
                .expect("close");
            if raw {
                let view = world.pair.raw_view(the_sim(&world.pair.data).image());
                world.history.check_now(&view, "the data file by itself");
            }
        });
        io.close();
    }
    assert!(judged > 100, "{judged}");
}

#[test]
fn entries_that_lead_elsewhere_in_the_data_file_are_refused() {
    let pair = Pair::new("cluster_size=64k", false, &[], 1 << 20, &Sim::default());
    let good = pair.images.bytes("a");
    let header = Header::parse(Path::new("a"), &good, good.len() as u64).expect("header");
    let l1 = header.l1_offset.0 as usize;
    let l2 = u64::from_be_bytes(good[l1..l1 + 8].try_into().expect("entry")) & !(1 << 63);
    let l2 = l2 as usize;
    let io = reactor();
    for entry in [
        1 << 63 | 0x1_0000,
        1 << 63 | 0x7fff_0000_0000,
        0x20_0000,
        1 << 62 | 77,
        1 << 63 | 0x1_0001,
    ] as [u64; 5]
    {
        let mut bytes = good.clone();
        bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        io.block_on(async {
            let options = Options {
                read_only: false,
                ..READ
            };
            let image = open_pair(&io, &sim(bytes, Sim::default()), &pair.data, options)
                .await
                .expect("open");
            let error = image.map(&io, 0, 512).await.expect_err("the entry");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}: {error}");
            let mut buf = io.buf(512);
            let error = image
                .write(&io, &(), 0, buf.sg())
                .await
                .expect_err("the entry");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}: {error}");
        });
    }
    io.block_on(async {
        let header = Header::read(&io, &pair.image).await.expect("header");
        let without = Qcow2::open(&io, pair.image.clone(), header, READ).await;
        assert_eq!(
            without.expect_err("no data file").kind(),
            ErrorKind::InvalidImage
        );
    });
}
