//! Power loss, and errors, at every moment.

use std::cell::Cell;
use std::rc::Rc;

use super::super::history::{History, Version};
use super::*;
use crate::block::sim::Kind;

/// A disk that tasks write to, each to sectors of its own.
struct World {
    io: Io,
    image: Qcow2,
    case: Case,
    history: History,
    tag: Cell<u64>,
    running: Cell<u64>,
    judged: Cell<u64>,
    failures: Cell<u64>,
}

const TASKS: u64 = 4;
const SIZE: u64 = 512 << 10;

impl World {
    fn new(case: Case) -> Self {
        let io = reactor();
        Self {
            image: io.block_on(case.open(&io)),
            history: History::new(case.model.clone()),
            case,
            io,
            tag: Cell::new(0),
            running: Cell::new(TASKS),
            judged: Cell::new(0),
            failures: Cell::new(0),
        }
    }

    /// A range of sectors that only `task` changes: stripes in the first half of the disk, so that subclusters
    /// and clusters have several writers, large regions in the second.
    fn range(&self, task: u64, state: &mut u64) -> (u64, u64) {
        let half = SIZE / SECTOR as u64 / 2;
        if random(state) % 2 == 0 {
            let stripe = 3;
            let stripes = half / (stripe * TASKS);
            let start = (random(state) % stripes * TASKS + task) * stripe;
            let skip = random(state) % stripe;
            (start + skip, 1 + random(state) % (stripe - skip))
        } else {
            let len = half / TASKS;
            let start = half + len * task;
            let skip = random(state) % len;
            (start + skip, 1 + random(state) % (len - skip).min(64))
        }
    }

    fn note(&self, result: Result<()>, first: u64, count: u64) {
        match result {
            Ok(()) => self.history.complete(first, count),
            Err(error) => {
                let kind = error.kind();
                assert!(
                    matches!(kind, ErrorKind::Io | ErrorKind::NoSpace),
                    "{error}"
                );
                self.failures.set(self.failures.get() + 1);
            }
        }
    }

    async fn write(&self, first: u64, count: u64) {
        self.tag.set(self.tag.get() + 1);
        let tag = self.tag.get();
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let _pin = self.io.pin();
        let at = first * SECTOR as u64;
        let result = self.image.write(&self.io, &self.case.below, at, buf.sg());
        self.note(result.await, first, count);
    }

    async fn zero(&self, first: u64, count: u64, unmap: bool) {
        self.history.begin(first, count, Version::Zeros);
        let (at, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let _pin = self.io.pin();
        let below = &self.case.below;
        let result = self.image.write_zeroes(&self.io, below, at, len, unmap);
        self.note(result.await, first, count);
    }

    async fn flush(&self) {
        let point = self.history.flush_begins();
        match self.image.flush(&self.io, &()).await {
            Ok(()) => self.history.flush_completed(point),
            Err(error) => self.note(Err(error), 0, 0),
        }
    }

    async fn task(self: Rc<Self>, task: u64, seed: u64, steps: u64) {
        let mut state = seed * 31 + task + 1;
        for _ in 0..steps {
            let (first, count) = self.range(task, &mut state);
            match random(&mut state) % 10 {
                0..6 => self.write(first, count).await,
                6 | 7 => self.zero(first, count, random(&mut state) % 2 == 0).await,
                8 => self.flush().await,
                _ => self.io.yield_now().await,
            }
        }
        self.running.set(self.running.get() - 1);
    }

    /// What `qemu-img` says of an image that a power loss has left: leaks are all it may complain of.
    fn judge_crash(&self, bytes: &[u8], what: &str) {
        let images = &self.case.images;
        write_file(&images.path("a"), bytes);
        let name = images.name("a");
        let check = Command::new("qemu-img")
            .args(["check", "-q", &name])
            .output();
        let check = check.expect("qemu-img");
        let text = String::from_utf8_lossy(&check.stdout);
        assert!(matches!(check.status.code(), Some(0 | 3)), "{what}: {text}");
        self.history.check_crash(&images.contents("a"), what);
        self.judged.set(self.judged.get() + 1);
    }

    /// Cuts the power in thought, again and again.
    async fn crasher(self: Rc<Self>, seed: u64) {
        let mut state = seed + 77;
        while self.running.get() > 0 {
            for _ in 0..random(&mut state) % 12 {
                self.io.yield_now().await;
            }
            let sim = the_sim(&self.case.storage);
            let chance = random(&mut state);
            let bytes = match chance % 4 {
                0 => sim.crash_with(|_, _| 0),
                1 => sim.crash_with(|_, versions| versions - 1),
                _ => sim.crash(chance),
            };
            self.judge_crash(&bytes, &format!("seed {seed}, {}", chance % 4));
        }
    }
}

#[test]
fn power_loss_at_any_moment_loses_nothing_flushed_of_any_subcluster() {
    let mut judged = 0;
    for (seed, cluster, base, zeros, cache) in [
        (1, 16384u64, Base::Raw, true, 0),
        (2, 65536, Base::None, true, 1 << 20),
        (3, 65536, Base::Raw, true, 1 << 20),
        (4, 65536, Base::Extended, false, 0),
        (5, 128 << 10, Base::Qcow2, true, 0),
        (6, 128 << 10, Base::None, false, 1 << 20),
    ] {
        let config = Sim {
            seed,
            delay: 4,
            pieces: true,
            promises_zeros: zeros,
            discard_garbage: true,
            torn_failures: false,
        };
        let commands = [
            "write -c -P 3 0 128k",
            "write -P 5 200k 99k",
            "write -z 300k 20k",
        ];
        let mut case = Case::new(cluster, base, SIZE, &commands, config);
        case.options.l2_cache_bytes = cache;
        let world = Rc::new(World::new(case));
        for task in 0..TASKS {
            world.io.spawn(world.clone().task(task, seed, 40));
        }
        let io = world.io.clone();
        io.block_on(world.clone().crasher(seed));
        io.block_on(async {
            assert_eq!(world.failures.get(), 0);
            let point = world.history.flush_begins();
            world.image.close(&world.io, &()).await.expect("close");
            world.history.flush_completed(point);
        });
        let bytes = the_sim(&world.case.storage).crash_with(|_, _| 0);
        world.judge_crash(&bytes, "closed");
        run("qemu-img", &["check", "-q", &world.case.images.name("a")]);
        judged += world.judged.get();
        io.close();
    }
    assert!(judged > 200, "{judged}");
}

/// Returns false when the sweep is over: so many operations there were not.
fn sweep(world: &World, errno: i32, stays: bool, nth: u64, what: &str) -> bool {
    let storage = the_sim(&world.case.storage);
    let before = storage.operations();
    storage.fail(Kind::Any, nth, errno, stays);
    world.io.block_on(async {
        // Compressed, half-covered, shared with zeros, fresh, over the base; and back.
        world.write(3, 9).await;
        world.write(131, 1).await;
        world.write(140, 40).await;
        world.flush().await;
        world.zero(135, 30, true).await;
        world.zero(300, 33, false).await;
        world.write(301, 2).await;
        world.zero(128, 128, true).await;
        world.flush().await;
        world.write(700, 2).await;
        world.write(704, 128).await;
        world.write(200, 3).await;
        world.flush().await;
    });
    let over = storage.operations() - before < nth;
    if nth % 5 == 0 {
        world.judge_crash(&storage.crash(nth), what);
    }
    storage.heal();
    world.io.block_on(async {
        let disk = read_all(&world.io, &world.image, &world.case.below).await;
        world.history.check_now(&disk.expect("read"), what);
        let failures = world.failures.get();
        world.write(3, 9).await;
        world.write(140, 40).await;
        world.write(690, 100).await;
        world.flush().await;
        assert_eq!(
            world.failures.get(),
            failures,
            "{what}: it works the next time"
        );
        world.image.close(&world.io, &()).await.expect("close");
    });
    let bytes = storage.crash_with(|_, _| 0);
    let images = &world.case.images;
    write_file(&images.path("a"), &bytes);
    run("qemu-img", &["check", "-q", &images.name("a")]);
    world.history.check_now(&images.contents("a"), what);
    world.io.close();
    !over
}

#[test]
fn an_error_in_the_middle_leaves_the_subclusters_as_they_were() {
    let commands = [
        "write -c -P 3 0 64k",
        "write -P 5 70k 9k",
        "write -z 90k 10k",
    ];
    for (errno, stays, base) in [
        (libc::EIO, false, Base::Raw),
        (libc::ENOSPC, false, Base::None),
        (libc::ENOSPC, true, Base::Raw),
    ] {
        let made = Case::new(65536, base, SIZE, &commands, Sim::default());
        let (bytes, mut nth) = (made.images.bytes("a"), 1);
        let mut case = Some(made);
        while let Some(mut now) = case.take() {
            let what = format!("{errno} {stays} {base:?}, operation {nth}");
            let config = Sim {
                torn_failures: true,
                seed: nth,
                ..Sim::default()
            };
            now.storage = sim(bytes.clone(), config);
            now.options.l2_cache_bytes = 0;
            let world = World::new(now);
            if sweep(&world, errno, stays, nth, &what) {
                nth += 1;
                case = Some(world.case);
            }
            assert!(nth < 2000);
        }
        assert!(nth > 20, "{nth}");
    }
}
