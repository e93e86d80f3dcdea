//! Power loss at any moment, under concurrent writers.

use std::cell::Cell;
use std::rc::Rc;

use super::history::{History, SECTOR, Version, run_bytes};
use super::*;

/// A disk that tasks write to, each to sectors of its own.
struct World {
    io: Io,
    image: Qcow2,
    storage: Arc<Storage>,
    below: Vec<u8>,
    history: History,
    tag: Cell<u64>,
    running: Cell<u32>,
    /// Crash states judged.
    judged: Cell<u64>,
    /// What the tasks may do.
    discards: bool,
}

const TASKS: u64 = 4;
/// Sectors of a stripe; stripes belong to the tasks in turn, so that clusters have several writers.
const STRIPE: u64 = 4;

impl World {
    fn sectors(&self) -> u64 {
        self.image.size() / SECTOR as u64
    }

    /// A range of sectors that only `task` changes: in the first half of the disk inside a stripe, in the
    /// second inside a large region.
    fn range(&self, task: u64, state: &mut u64) -> (u64, u64) {
        let half = self.sectors() / 2;
        let (start, len) = if random(state) % 2 == 0 {
            let stripes = half / (STRIPE * TASKS);
            ((random(state) % stripes * TASKS + task) * STRIPE, STRIPE)
        } else {
            (half + half / TASKS * task, half / TASKS)
        };
        let skip = random(state) % len;
        (start + skip, 1 + random(state) % (len - skip).min(64))
    }

    fn next_tag(&self) -> u64 {
        self.tag.set(self.tag.get() + 1);
        self.tag.get()
    }

    async fn write(&self, first: u64, count: u64) -> Result<()> {
        let tag = self.next_tag();
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let _pin = self.io.pin();
        self.image
            .write(&self.io, &self.below, first * SECTOR as u64, buf.sg())
            .await?;
        self.history.complete(first, count);
        Ok(())
    }

    async fn zero(&self, first: u64, count: u64, unmap: bool) -> Result<()> {
        self.history.begin(first, count, Version::Zeros);
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let _pin = self.io.pin();
        self.image
            .write_zeroes(&self.io, &self.below, offset, len, unmap)
            .await?;
        self.history.complete(first, count);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let point = self.history.flush_begins();
        self.image.flush(&self.io, &self.below).await?;
        self.history.flush_completed(point);
        Ok(())
    }

    async fn task(self: Rc<Self>, task: u64, seed: u64, steps: u64) {
        let mut state = seed * 31 + task + 1;
        for _ in 0..steps {
            let (first, count) = self.range(task, &mut state);
            match random(&mut state) % 10 {
                0..6 => self.write(first, count).await.expect("write"),
                6 | 7 if self.discards => {
                    let unmap = random(&mut state) % 2 == 0;
                    self.zero(first, count, unmap).await.expect("zeroes");
                }
                8 => self.flush().await.expect("flush"),
                _ => self.io.yield_now().await,
            }
        }
        self.running.set(self.running.get() - 1);
    }

    fn judge(&self, bytes: &[u8], what: &str) {
        let judge = judge::Judge::new(bytes);
        judge.check();
        self.history.check_crash(&judge.read_all(&self.below), what);
        self.judged.set(self.judged.get() + 1);
    }

    /// Cuts the power in thought, again and again.
    async fn crasher(self: Rc<Self>, seed: u64) {
        let mut state = seed + 77;
        while self.running.get() > 0 {
            for _ in 0..random(&mut state) % 6 {
                self.io.yield_now().await;
            }
            let sim = the_sim(&self.storage);
            let chance = random(&mut state);
            self.judge(&sim.crash(chance), &format!("seed {seed}, some of it"));
            if chance % 4 == 0 {
                self.judge(
                    &sim.crash_with(|_, _| 0),
                    &format!("seed {seed}, nothing of it"),
                );
                let all = sim.crash_with(|_, versions| versions - 1);
                self.judge(&all, &format!("seed {seed}, all of it"));
            }
        }
    }
}

struct Setup<'a> {
    options: &'a str,
    backing: bool,
    commands: &'a [&'a str],
    discards: bool,
    config: Sim,
    cache: u64,
    steps: u64,
}

const SIZE: u64 = 512 << 10;

fn run_world(setup: &Setup<'_>, seed: u64) -> u64 {
    let images = Images::new();
    let below = if setup.backing {
        noise(seed, 300_003)
    } else {
        vec![]
    };
    if setup.backing {
        write_file(&images.path("base"), &below);
        images.create_over("a", setup.options, "base", "raw", SIZE);
    } else {
        images.create("a", setup.options, SIZE);
    }
    if !setup.commands.is_empty() {
        images.qemu_io("a", setup.commands);
    }
    let io = reactor();
    let config = Sim {
        seed,
        ..setup.config.clone()
    };
    let storage = sim(images.bytes("a"), config);
    let options = Options {
        read_only: false,
        l2_cache_bytes: setup.cache,
        workers: 0,
        has_backing: setup.backing,
    };
    let image = io.block_on(open(&io, &storage, options)).expect("open");
    let world = Rc::new(World {
        io: io.clone(),
        image,
        storage,
        below,
        history: History::new(images.contents("a")),
        tag: Cell::new(0),
        running: Cell::new(TASKS as u32),
        judged: Cell::new(0),
        discards: setup.discards,
    });
    for task in 0..TASKS {
        io.spawn(world.clone().task(task, seed, setup.steps));
    }
    let judged = io.block_on(async {
        world.clone().crasher(seed).await;
        let disk = read_all(&io, &world.image, &world.below)
            .await
            .expect("read");
        world.history.check_now(&disk, "at the end");
        let point = world.history.flush_begins();
        world.image.close(&io, &world.below).await.expect("close");
        world.history.flush_completed(point);
        let bytes = the_sim(&world.storage).crash_with(|_, _| 0);
        world.judge(&bytes, "closed");
        assert_eq!(judge::Judge::new(&bytes).check(), 0, "leaks");
        write_file(&images.path("a"), &bytes);
        run("qemu-img", &["check", "-q", &images.name("a")]);
        world.judged.get()
    });
    io.close();
    judged
}

const DELAYED: Sim = Sim {
    seed: 0,
    delay: 4,
    pieces: true,
    promises_zeros: true,
    discard_garbage: true,
    torn_failures: false,
};

#[test]
fn power_loss_at_any_moment_loses_nothing_flushed_and_invents_nothing() {
    let compressed = [
        "write -c -P 3 0 64k",
        "write -c -P 4 100k 4k",
        "write -P 5 256k 64k",
    ];
    let mut judged = 0;
    for seed in 0..2 {
        for (bits, backing, zeros) in [
            (12, false, true),
            (12, true, true),
            (12, true, false),
            (13, true, true),
            (9, false, true),
            (14, true, true),
        ] {
            let options = format!("cluster_size={}", 1 << bits);
            let commands: &[&str] = if bits == 12 { &compressed } else { &[] };
            judged += run_world(
                &Setup {
                    options: &options,
                    backing,
                    commands,
                    discards: true,
                    config: Sim {
                        promises_zeros: zeros,
                        ..DELAYED
                    },
                    cache: if seed % 2 == 0 { 1 << 20 } else { 0 },
                    steps: 40,
                },
                seed + 1,
            );
        }
    }
    assert!(judged > 500, "{judged}");
}

#[test]
fn power_loss_with_a_version_2_image() {
    for seed in 0..2 {
        run_world(
            &Setup {
                options: "cluster_size=4k,compat=0.10",
                backing: seed % 2 == 0,
                commands: &["write -P 5 256k 64k"],
                discards: true,
                config: DELAYED,
                cache: 1 << 20,
                steps: 40,
            },
            seed + 100,
        );
    }
}
