//! Disks that become larger and smaller: what was there stays, what comes is zeros.

use std::rc::Rc;

use super::*;
use crate::block::sim::Kind;

struct Case {
    images: Images,
    io: Io,
    storage: Arc<Storage>,
    image: Qcow2,
    below: Vec<u8>,
    /// What the disk should hold.
    disk: Vec<u8>,
}

/// Ways in which images differ.
#[derive(Clone, Copy, Debug)]
struct Kinds {
    options: &'static str,
    size: u64,
    backing: usize,
}

const KINDS: [Kinds; 6] = [
    Kinds {
        options: "cluster_size=512",
        size: 100 << 10,
        backing: 0,
    },
    Kinds {
        options: "cluster_size=4k",
        size: 101_888,
        backing: 0,
    },
    Kinds {
        options: "cluster_size=4k",
        size: 101_888,
        backing: 300_000,
    },
    Kinds {
        options: "cluster_size=512,compat=0.10",
        size: 100 << 10,
        backing: 150_000,
    },
    Kinds {
        options: "cluster_size=64k,refcount_bits=64",
        size: 1 << 20,
        backing: 90_000,
    },
    Kinds {
        options: "cluster_size=16k,extended_l2=on",
        size: 101_888,
        backing: 300_000,
    },
];

/// The files of an image that has some data.
fn files(kinds: Kinds) -> (Images, Vec<u8>) {
    let images = Images::new();
    let below = noise(3, kinds.backing);
    if kinds.backing > 0 {
        write_file(&images.path("base"), &below);
        images.create_over("a", kinds.options, "base", "raw", kinds.size);
    } else {
        images.create("a", kinds.options, kinds.size);
    }
    let end = format!("write -P 9 {} 1k", kinds.size - 1024);
    let commands = ["write -P 5 3k 9k", "write -c -P 7 64k 4k", &end];
    if kinds.options.contains("64k") || kinds.options.contains("16k") {
        images.qemu_io("a", &[commands[0], commands[2]]);
    } else {
        images.qemu_io("a", &commands);
    }
    (images, below)
}

impl Case {
    fn new(kinds: Kinds, config: Sim) -> Self {
        let (images, below) = files(kinds);
        Self::of(images, below, config)
    }

    fn of(images: Images, below: Vec<u8>, config: Sim) -> Self {
        let io = reactor();
        let storage = sim(images.bytes("a"), config);
        let options = Options {
            read_only: false,
            l2_cache_bytes: 0,
            workers: 0,
            has_backing: !below.is_empty(),
            on_dirty: OnDirty::Repair,
        };
        let image = io.block_on(open(&io, &storage, options)).expect("open");
        let disk = images.contents("a");
        Self {
            images,
            io,
            storage,
            image,
            below,
            disk,
        }
    }

    async fn resize(&mut self, size: u64) -> Result<()> {
        let below = self.below.len() as u64;
        self.image
            .resize(&self.io, &self.below, below, size)
            .await?;
        self.disk.resize(size as usize, 0);
        Ok(())
    }

    async fn write(&mut self, offset: u64, data: &[u8]) {
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(data);
        let _pin = self.io.pin();
        let write = self.image.write(&self.io, &self.below, offset, buf.sg());
        write.await.expect("write");
        self.disk[offset as usize..][..data.len()].copy_from_slice(data);
    }

    async fn check_contents(&self, what: &str) {
        let disk = read_all(&self.io, &self.image, &self.below).await;
        assert_same(&disk.expect("read"), &self.disk, what);
    }

    /// Ends with what QEMU says of the file.
    fn finish(self, what: &str) {
        self.io.block_on(async {
            self.check_contents(what).await;
            self.image
                .close(&self.io, &self.below)
                .await
                .expect("close");
        });
        let bytes = the_sim(&self.storage).crash_with(|_, _| 0);
        let judge = judge::Judge::new(&bytes);
        assert_eq!(judge.check(), 0, "{what}: leaks");
        write_file(&self.images.path("a"), &bytes);
        run("qemu-img", &["check", "-q", &self.images.name("a")]);
        assert_same(&self.images.contents("a"), &self.disk, what);
        self.io.close();
    }
}

#[test]
fn disks_grow_and_shrink_and_what_comes_is_zeros() {
    for kinds in KINDS {
        for seed in 1..4 {
            let what = format!("{kinds:?}, seed {seed}");
            let mut case = Case::new(kinds, Sim::default());
            let io = case.io.clone();
            io.block_on(async {
                let mut state = seed;
                for step in 0..12 {
                    let size = 512 * (1 + random(&mut state) % 5000);
                    case.resize(size).await.expect("resize");
                    assert_eq!(case.image.size(), size);
                    case.check_contents(&what).await;
                    for n in 0..3 {
                        let len = (512 << (random(&mut state) % 6)).min(size);
                        let offset = random(&mut state) % (size - len + 512) / 512 * 512;
                        case.write(offset.min(size - len), &noise(step * 3 + n, len as usize))
                            .await;
                    }
                    if random(&mut state) % 3 == 0 {
                        case.image.flush(&io, &case.below).await.expect("flush");
                    }
                }
            });
            case.finish(&what);
        }
    }
}

#[test]
fn an_l1_table_moves_and_its_old_clusters_are_used_again() {
    let mut case = Case::new(KINDS[0], Sim::default());
    let io = case.io.clone();
    let old = case.image.header().l1_offset;
    io.block_on(async {
        case.resize(16 << 20).await.expect("grow");
        assert_ne!(case.image.tables.l1_place(), (old, 4));
        assert_eq!(case.image.tables.l1_place().1, 512);
        case.write((16 << 20) - 512, &noise(1, 512)).await;
        case.image.flush(&io, &case.below).await.expect("flush");
        assert_eq!(case.image.allocator().unwrap().in_limbo(), 0);
        let there = case.image.allocator().unwrap();
        assert_eq!(there.is_metadata(HostCluster(old.0 >> 9), 1), None);
        // Enough to find every free cluster of the file.
        for n in 0..400 {
            case.write((1 << 20) + n * 4096, &noise(n, 512)).await;
        }
        case.check_contents("after it has moved").await;
    });
    case.finish("after it has moved");
}

#[test]
fn mappings_that_somebody_left_beyond_the_end_do_not_show() {
    let (images, below) = files(KINDS[1]);
    // As an interrupted change of the size leaves it: mapped, and the header says less.
    run("qemu-img", &["resize", "-q", &images.name("a"), "200k"]);
    images.qemu_io("a", &["write -P 3 120k 60k"]);
    let mut bytes = images.bytes("a");
    bytes[24..32].copy_from_slice(&101_888u64.to_be_bytes());
    write_file(&images.path("a"), &bytes);
    let mut case = Case::of(images, below, Sim::default());
    let io = case.io.clone();
    io.block_on(case.resize(200 << 10)).expect("grow");
    case.finish("left beyond the end");
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    let mut case = Case::new(KINDS[0], Sim::default());
    let io = case.io.clone();
    io.block_on(async {
        // 512 bytes a cluster: 4 Mi tables of 64 entries.
        let most = 128u64 << 30;
        for size in [0, 1000, 513, most + 512, !511] {
            let error = case.resize(size).await.expect_err("no size");
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        }
        // There is no piece of the file for such an L1 table.
        let error = case.resize(most).await.expect_err("too large");
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert_eq!(case.image.size(), 100 << 10);
        let mut buf = io.buf(512);
        let beyond = case
            .image
            .write(&io, &case.below, 100 << 10, buf.sg())
            .await;
        assert_eq!(beyond.expect_err("beyond").kind(), ErrorKind::OutOfRange);
    });
    case.finish("refused");

    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    run("qemu-img", &["bitmap", "--add", &images.name("a"), "b"]);
    let mut bytes = images.bytes("a");
    // Not consistent: the image may be written to, and the bitmap is of the old size.
    bytes[88..96].fill(0);
    let io = reactor();
    let storage = sim(bytes, Sim::default());
    let options = Options {
        read_only: false,
        ..READ
    };
    io.block_on(async {
        let image = open(&io, &storage, options).await.expect("open");
        let error = image
            .resize(&io, &(), 0, 2 << 20)
            .await
            .expect_err("bitmap");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let image = open(&io, &storage, READ).await.expect("open");
        let error = image.resize(&io, &(), 0, 2 << 20).await.expect_err("reads");
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    });
    io.close();
}

#[test]
fn requests_that_run_on_keep_their_data() {
    const SIZE: u64 = 100 << 10;
    let config = Sim {
        delay: 4,
        pieces: true,
        discard_garbage: true,
        ..Sim::default()
    };
    for (seed, kinds) in (5..).zip(KINDS.into_iter().take(4)) {
        let config = Sim {
            seed,
            ..config.clone()
        };
        let case = Case::new(kinds, config);
        let io = case.io.clone();
        // Only what is below this is compared: the rest comes and goes.
        let kept = 64 << 10;
        let case = Rc::new(std::cell::RefCell::new(Some(case)));
        let lent = case.borrow_mut().take().expect("case");
        let world = Rc::new(lent);
        let disk = Rc::new(std::cell::RefCell::new(world.disk[..kept].to_vec()));
        let running = Rc::new(std::cell::Cell::new(4));
        for task in 0..4u64 {
            let (world, disk, running) = (world.clone(), disk.clone(), running.clone());
            io.spawn(async move {
                let io = &world.io;
                let mut state = seed * 9 + task + 1;
                for step in 0..60 {
                    // In stripes of its own, or anywhere in what may be gone.
                    let low = random(&mut state) % 2 == 0;
                    let at = match low {
                        true => (random(&mut state) % 16 * 4 + task) * 1024,
                        false => kept as u64 + random(&mut state) % 4000 * 512,
                    };
                    let data = noise(state + step, 1024);
                    let mut buf = io.buf(1024);
                    buf.copy_from_slice(&data);
                    let pin = io.pin();
                    let written = world.image.write(io, &world.below, at, buf.sg()).await;
                    match written {
                        Ok(()) => {
                            // What was written is there while its request runs, if the disk is.
                            let mut back = io.buf(1024);
                            match read(io, &world.image, &world.below, at, back.sg()).await {
                                Ok(()) if low => assert_same(&back, &data, "read back"),
                                Ok(()) => {}
                                Err(e) => assert_eq!(e.kind(), ErrorKind::OutOfRange, "{e}"),
                            }
                            if low {
                                disk.borrow_mut()[at as usize..][..1024].copy_from_slice(&data);
                            }
                        }
                        Err(e) => {
                            assert!(!low && e.kind() == ErrorKind::OutOfRange, "{e}");
                        }
                    }
                    drop(pin);
                    if step % 16 == 7 {
                        world.image.flush(io, &world.below).await.expect("flush");
                    }
                }
                running.set(running.get() - 1);
            });
        }
        io.block_on(async {
            let mut state = seed;
            let below = world.below.len() as u64;
            while running.get() > 0 {
                let size = SIZE + random(&mut state) % 4000 * 512;
                let resize = world.image.resize(&io, &world.below, below, size);
                resize.await.expect("resize");
            }
            let resize = world.image.resize(&io, &world.below, below, kept as u64);
            resize.await.expect("resize");
        });
        let mut case = Rc::try_unwrap(world).ok().expect("tasks have ended");
        case.disk = disk.borrow().clone();
        io.block_on(case.resize(3 << 20)).expect("resize");
        case.finish(&format!("{kinds:?}"));
    }
}

#[test]
fn a_smaller_disk_waits_for_requests_beyond_its_end() {
    let config = Sim {
        delay: 90,
        ..Sim::default()
    };
    let case = Rc::new(Case::new(KINDS[0], config));
    let io = case.io.clone();
    let done = Rc::new(std::cell::Cell::new(0));
    for task in 0..4 {
        let (case, done) = (case.clone(), done.clone());
        io.spawn(async move {
            let _pin = case.io.pin();
            let mut buf = case.io.buf(1024);
            buf.fill(7);
            let at = (70 << 10) + task * 4096;
            let write = case.image.write(&case.io, &case.below, at, buf.sg());
            write.await.expect("write");
            done.set(done.get() + 1);
        });
    }
    io.block_on(async {
        for _ in 0..3 {
            io.yield_now().await;
        }
        assert_eq!(done.get(), 0, "they have begun");
        let resize = case.image.resize(&io, &case.below, 0, 64 << 10);
        resize.await.expect("resize");
        assert_eq!(done.get(), 4, "they have ended");
        let tables = &case.image.tables;
        for cluster in 128..200 {
            let place = tables.place(GuestCluster(cluster));
            let there = tables.with(place.slice, |slice| slice.look(place.at));
            assert_eq!(there.unwrap_or_default(), (0, 0), "cluster {cluster}");
        }
    });
    let mut case = Rc::try_unwrap(case).ok().expect("tasks have ended");
    case.disk.truncate(64 << 10);
    case.finish("waited for");
}

/// Sizes to change to, from [`KINDS`]' own: with and without an L1 table that moves; smaller; both.
const SIZES: [&[u64]; 4] = [
    &[2 << 20],
    &[104 << 10],
    &[20 << 10 | 512],
    &[70 << 10, 1 << 20, 50 << 10],
];

#[test]
fn power_loss_at_any_step_leaves_the_old_size_or_the_new_one() {
    let mut judged = 0;
    for kinds in KINDS.into_iter().take(4) {
        let (images, below) = files(kinds);
        let (bytes, before) = (images.bytes("a"), images.contents("a"));
        for sizes in SIZES {
            for after in 0.. {
                let what = format!("{kinds:?} to {sizes:?}, {after} operations");
                let io = reactor();
                let storage = sim(bytes.clone(), Sim::default());
                let options = Options {
                    read_only: false,
                    l2_cache_bytes: 0,
                    workers: 0,
                    has_backing: !below.is_empty(),
                    on_dirty: OnDirty::Repair,
                };
                let image = io.block_on(open(&io, &storage, options)).expect("open");
                the_sim(&storage).cut_power_after(after);
                let mut least = before.len();
                let mut failed = false;
                for size in sizes {
                    least = least.min(*size as usize);
                    let resize = image.resize(&io, &below, below.len() as u64, *size);
                    failed = io.block_on(resize).is_err();
                    if failed {
                        break;
                    }
                }
                for seed in 0..6 {
                    let bytes = the_sim(&storage).crash(seed * 7 + after);
                    let judge = judge::Judge::new(&bytes);
                    judge.check();
                    let disk = judge.read_all(&below);
                    let size = disk.len();
                    let known =
                        |size: usize| size == before.len() || sizes.contains(&(size as u64));
                    assert!(known(size), "{what}: {size} bytes");
                    // What no size cuts off is there whatever happens.
                    assert_same(&disk[..least], &before[..least], &what);
                    // Version 2 has no zero flag: while the disk shrinks its end may show the backing file.
                    let shows = kinds.options.contains("0.10") && sizes.len() > 1;
                    if size > before.len() && !shows {
                        let zeros = vec![0; size - before.len()];
                        assert_same(&disk[before.len()..], &zeros, &what);
                    }
                    judged += 1;
                }
                io.close();
                if !failed {
                    break;
                }
            }
        }
    }
    assert!(judged > 500, "{judged}");
}

#[test]
fn what_fails_is_undone_and_works_the_next_time() {
    for kinds in KINDS.into_iter().take(4) {
        let (images, below) = files(kinds);
        let (bytes, before) = (images.bytes("a"), images.contents("a"));
        for (sizes, errno) in SIZES.into_iter().zip([libc::EIO, libc::ENOSPC].repeat(2)) {
            for nth in 1.. {
                let what = format!("{kinds:?} to {sizes:?}, error {errno} at {nth}");
                let images = Images::new();
                if !below.is_empty() {
                    write_file(&images.path("base"), &below);
                }
                write_file(&images.path("a"), &bytes);
                let config = Sim {
                    torn_failures: true,
                    seed: nth,
                    ..Sim::default()
                };
                let mut case = Case {
                    disk: before.clone(),
                    ..Case::reopened(images, &below, config)
                };
                let io = case.io.clone();
                let begun = the_sim(&case.storage).operations();
                the_sim(&case.storage).fail(Kind::Any, nth, errno, false);
                let mut least = before.len();
                for size in sizes {
                    let old = case.image.size();
                    let resized = io.block_on(case.resize(*size));
                    least = least.min(*size as usize);
                    if let Err(error) = resized {
                        let kind = error.kind();
                        assert!(
                            matches!(kind, ErrorKind::Io | ErrorKind::NoSpace),
                            "{error}"
                        );
                        assert_eq!(case.image.size(), old, "{what}");
                        let disk = io.block_on(read_all(&io, &case.image, &below));
                        assert_same(&disk.expect("read")[..least], &before[..least], &what);
                        io.block_on(case.resize(*size)).expect("the second time");
                    }
                }
                let over = the_sim(&case.storage).operations() - begun < nth;
                the_sim(&case.storage).heal();
                io.block_on(async {
                    let disk = read_all(&io, &case.image, &below).await;
                    case.disk = disk.expect("read");
                    assert_same(&case.disk[..least], &before[..least], &what);
                    let grown = case.disk.len() > before.len() && sizes.len() == 1;
                    assert!(!grown || case.disk[before.len()..].iter().all(|b| *b == 0));
                    case.write(10 << 10, &noise(nth, 1024)).await;
                    case.image.close(&io, &case.below).await.expect("close");
                });
                let bytes = the_sim(&case.storage).crash_with(|_, _| 0);
                let judge = judge::Judge::new(&bytes);
                assert_eq!(judge.check(), 0, "{what}: leaks");
                assert_same(&judge.read_all(&below), &case.disk, &what);
                io.close();
                if over {
                    break;
                }
            }
        }
    }
}

impl Case {
    /// A case whose contents are not known yet.
    fn reopened(images: Images, below: &[u8], config: Sim) -> Self {
        let io = reactor();
        let storage = sim(images.bytes("a"), config);
        let options = Options {
            read_only: false,
            l2_cache_bytes: 0,
            workers: 0,
            has_backing: !below.is_empty(),
            on_dirty: OnDirty::Repair,
        };
        let image = io.block_on(open(&io, &storage, options)).expect("open");
        Self {
            images,
            io,
            storage,
            image,
            below: below.to_vec(),
            disk: Vec::new(),
        }
    }
}
