//! Power loss and failures of single operations, with snapshots.

use super::*;

/// A disk with snapshots that tasks write to, each to sectors of its own.
struct World {
    album: Album,
    io: Io,
    image: Qcow2,
    storage: Arc<Storage>,
    history: History,
    tag: Cell<u64>,
    running: Cell<u32>,
    judged: Cell<u64>,
}

const TASKS: u64 = 3;

impl World {
    fn open(album: Album, config: Sim) -> Rc<Self> {
        let io = reactor();
        let storage = album.sim(config);
        let image = io
            .block_on(open(&io, &storage, album.options))
            .expect("open");
        Rc::new(Self {
            history: History::new(album.model.clone()),
            album,
            io,
            image,
            storage,
            tag: Cell::new(0),
            running: Cell::new(TASKS as u32),
            judged: Cell::new(0),
        })
    }

    async fn write(&self, first: u64, count: u64) -> Result<()> {
        self.tag.set(self.tag.get() + 1);
        let tag = self.tag.get();
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let _pin = self.io.pin();
        self.image
            .write(&self.io, &self.album.below, first * SECTOR as u64, buf.sg())
            .await?;
        self.history.complete(first, count);
        Ok(())
    }

    async fn zero(&self, first: u64, count: u64, unmap: bool) -> Result<()> {
        self.history.begin(first, count, Version::Zeros);
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let _pin = self.io.pin();
        self.image
            .write_zeroes(&self.io, &self.album.below, offset, len, unmap)
            .await?;
        self.history.complete(first, count);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let point = self.history.flush_begins();
        self.image.flush(&self.io, &self.album.below).await?;
        self.history.flush_completed(point);
        Ok(())
    }

    async fn task(self: Rc<Self>, task: u64, seed: u64) {
        let mut state = seed * 31 + task + 1;
        let stripes = self.image.size() / SECTOR as u64 / TASKS / 4;
        for _ in 0..25 {
            // Four sectors in turn are one task's: clusters have several writers.
            let stripe = (random(&mut state) % stripes * TASKS + task) * 4;
            let skip = random(&mut state) % 4;
            let count = 1 + random(&mut state) % (4 - skip);
            match random(&mut state) % 8 {
                0..5 => self.write(stripe + skip, count).await.expect("write"),
                5 => {
                    let unmap = random(&mut state) % 2 == 0;
                    self.zero(stripe + skip, count, unmap)
                        .await
                        .expect("zeroes");
                }
                6 => self.flush().await.expect("flush"),
                _ => self.io.yield_now().await,
            }
        }
        self.running.set(self.running.get() - 1);
    }

    fn judge(&self, bytes: &[u8], what: &str) {
        self.album.judge_crash(bytes, what);
        let disk = judge::Judge::new(bytes).read_all(&self.album.below);
        self.history.check_crash(&disk, what);
        self.judged.set(self.judged.get() + 1);
    }

    /// Cuts the power in thought, again and again.
    async fn crasher(&self, seed: u64) {
        let mut state = seed + 77;
        while self.running.get() > 0 {
            for _ in 0..random(&mut state) % 16 {
                self.io.yield_now().await;
            }
            let sim = the_sim(&self.storage);
            let chance = random(&mut state);
            self.judge(&sim.crash(chance), &format!("seed {seed}, some of it"));
            if chance % 4 == 0 {
                // The newest of what was written before the power failed, but for the copied tables: a
                // pointer must not come before what it points at.
                let newest = sim.crash_with(|sector, n| if sector < 256 { n - 1 } else { 0 });
                self.judge(&newest, &format!("seed {seed}, low sectors first"));
            }
        }
    }
}

#[test]
fn power_loss_at_any_moment_leaves_the_snapshots_whole() {
    let mut judged = 0;
    for (seed, options, backing, cache) in [
        (1, "cluster_size=512", false, 1 << 20),
        (2, "cluster_size=4k", false, 0),
        (3, "cluster_size=4k", true, 1 << 20),
        (4, "cluster_size=4k,compat=0.10", false, 1 << 20),
    ] {
        let below = if backing {
            noise(seed, 300_003)
        } else {
            vec![]
        };
        let first: &[&str] = &["write -P 1 0 200k", "write -c -P 3 200k 4k"];
        let second: &[&str] = &["write -P 5 40k 60k", "write -P 2 300k 20k"];
        let mut album = Album::new(options, &below, 384 << 10, &[first, second, &[]]);
        album.options.l2_cache_bytes = cache;
        let world = World::open(
            album,
            Sim {
                seed,
                delay: 4,
                pieces: true,
                promises_zeros: seed % 2 == 1,
                discard_garbage: true,
                torn_failures: false,
            },
        );
        for task in 0..TASKS {
            world.io.spawn(world.clone().task(task, seed));
        }
        let io = world.io.clone();
        io.block_on(async {
            world.crasher(seed).await;
            let disk = read_all(&io, &world.image, &world.album.below)
                .await
                .expect("read");
            world.history.check_now(&disk, "at the end");
            world
                .image
                .close(&io, &world.album.below)
                .await
                .expect("close");
            let bytes = the_sim(&world.storage).crash_with(|_, _| 0);
            let closed = judge::Judge::new(&bytes).read_all(&world.album.below);
            assert_same(&closed, &disk, "closed");
            let name = world.album.images.name("closed");
            write_file(&world.album.images.path("closed"), &bytes);
            run("qemu-img", &["check", "-q", &name]);
            for (snapshot, _) in &world.album.snapshots {
                run("qemu-img", &["snapshot", "-d", snapshot, &name]);
                run("qemu-img", &["check", "-q", &name]);
            }
        });
        judged += world.judged.get();
        io.close();
    }
    assert!(judged > 100, "{judged}");
}

/// Returns false when the sweep is over: so many operations there were not.
fn sweep(album: &Album, errno: i32, stays: bool, nth: u64) -> bool {
    let what = format!("{errno} {stays}, operation {nth}");
    let config = Sim {
        torn_failures: true,
        seed: nth,
        ..Sim::default()
    };
    let again = Album {
        images: Images::new(),
        below: album.below.clone(),
        options: album.options,
        snapshots: album.snapshots.clone(),
        listing: album.listing.clone(),
        refcounts_are_full: album.refcounts_are_full,
        model: album.model.clone(),
    };
    write_file(&again.images.path("a"), &album.images.bytes("a"));
    let world = World::open(again, config);
    let sim = the_sim(&world.storage);
    let before = sim.operations();
    sim.fail(Kind::Any, nth, errno, stays);
    let failures = Cell::new(0);
    let io = world.io.clone();
    let note = |result: Result<()>| {
        if let Err(error) = result {
            let kind = error.kind();
            assert!(
                matches!(kind, ErrorKind::Io | ErrorKind::NoSpace),
                "{what}: {error}"
            );
            failures.set(failures.get() + 1);
        }
    };
    io.block_on(async {
        note(world.write(1, 2).await);
        note(world.zero(16, 16, true).await);
        note(world.flush().await);
        note(world.write(10, 30).await);
        note(world.write(400, 3).await);
        note(world.flush().await);
        note(world.write(402, 9).await);
    });
    let over = sim.operations() - before < nth;
    // qemu-img is slow: a power loss after every fifth failure is judged.
    if nth % 5 == 0 {
        world.judge(&sim.crash(nth), &what);
    }
    sim.heal();
    io.block_on(async {
        let disk = read_all(&io, &world.image, &world.album.below)
            .await
            .expect("read");
        world.history.check_now(&disk, &what);
        let failed = failures.get();
        note(world.write(1, 2).await);
        note(world.zero(16, 16, true).await);
        note(world.write(400, 3).await);
        note(world.flush().await);
        assert_eq!(failures.get(), failed, "{what}: it works the next time");
        world
            .image
            .close(&io, &world.album.below)
            .await
            .expect("close");
    });
    let bytes = sim.crash_with(|_, _| 0);
    write_file(&world.album.images.path("closed"), &bytes);
    let closed = world.album.images.name("closed");
    run("qemu-img", &["check", "-q", &closed]);
    for n in 0..world.album.snapshots.len() {
        let then = with_snapshot_active(&bytes, n);
        let got = judge::Judge::new(&then).read_all(&world.album.below);
        assert_same(&got, &world.album.snapshots[n].1, &what);
    }
    io.close();
    !over
}

#[test]
fn an_error_at_any_operation_leaves_the_snapshots_whole() {
    let below = noise(4, 200_000);
    let first: &[&str] = &["write -P 1 0 100k", "write -c -P 3 200k 4k"];
    let mut album = Album::new("cluster_size=4k", &below, 256 << 10, &[first, &[]]);
    album.options.l2_cache_bytes = 0;
    for (errno, stays) in [(libc::EIO, false), (libc::ENOSPC, true)] {
        let mut nth = 1;
        while sweep(&album, errno, stays, nth) {
            nth += 1;
            assert!(nth < 1000);
        }
        assert!(nth > 20, "{nth}");
    }
}

#[test]
fn a_copied_table_is_durable_before_the_entry_that_leads_to_it() {
    let album = Album::new(
        "cluster_size=4k",
        &[],
        1 << 20,
        &[&["write -P 1 0 1M"], &[]],
    );
    let mut after = album.model.clone();
    after[..4096].fill(0);
    let l1 = number(&album.images.bytes("a"), 40, 8) / SECTOR as u64;
    let mut seen = [false; 2];
    for operations in 0.. {
        assert!(operations < 100);
        let storage = album.sim(Sim::default());
        let io = reactor();
        let image = io
            .block_on(open(&io, &storage, album.options))
            .expect("open");
        let sim = the_sim(&storage);
        sim.cut_power_after(operations);
        // A discard writes no data that would have to be durable first.
        io.block_on(async {
            let pin = io.pin();
            let discarded = image.discard(&io, 0, 4096).await;
            drop(pin);
            let _failed = discarded.and(image.flush(&io, &album.below).await);
        });
        for l1_first in [true, false] {
            let bytes = sim.crash_with(|sector, versions| {
                let newest = sector == u64::MAX || (sector == l1) == l1_first;
                if newest { versions - 1 } else { 0 }
            });
            let what = format!("{operations} operations, {l1_first}");
            album.judge_crash(&bytes, &what);
            let disk = judge::Judge::new(&bytes).read_all(&[]);
            let is_after = disk[..4096] == after[..4096];
            let want = if is_after { &after } else { &album.model };
            assert_same(&disk, want, &what);
            seen[usize::from(is_after)] = true;
        }
        let over = !sim.is_dead();
        io.close();
        if over {
            break;
        }
    }
    assert_eq!(seen, [true; 2], "before, and after");
}
