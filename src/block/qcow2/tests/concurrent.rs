//! Several tasks, and several threads, on one image.

use std::cell::Cell;
use std::rc::Rc;

use super::*;

const WRITE: Options = Options {
    read_only: false,
    l2_cache_bytes: 1 << 20,
    workers: 2,
    has_backing: false,
    on_dirty: OnDirty::Repair,
};

fn judge_file(images: &Images, bytes: &[u8], want: &[u8], what: &str) {
    let judge = judge::Judge::new(bytes);
    assert_eq!(judge.check(), 0, "{what}: leaks");
    write_file(&images.path("a"), bytes);
    run("qemu-img", &["check", "-q", &images.name("a")]);
    assert_same(&images.contents("a"), want, what);
}

/// Runs futures as tasks of one reactor until all have ended.
pub(super) fn join(io: &Io, tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>>) {
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

#[test]
fn concurrent_first_writes_to_one_cluster() {
    let images = Images::new();
    let below = noise(1, 1 << 20);
    write_file(&images.path("base"), &below);
    images.create_over("a", "cluster_size=64k", "base", "raw", 1 << 20);
    for seed in 0..20 {
        let io = reactor();
        let config = Sim {
            seed,
            delay: 6,
            pieces: true,
            ..Sim::default()
        };
        let storage = sim(images.bytes("a"), config);
        let options = Options {
            has_backing: true,
            ..WRITE
        };
        let image = io.block_on(open(&io, &storage, options)).expect("open");
        let image = Rc::new((image, below.clone()));
        let mut want = below.clone();
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for n in 0..16usize {
            let data = noise(n as u64 + 100, 1024);
            want[65536 + n * 4096..][..1024].copy_from_slice(&data);
            let (io, image) = (io.clone(), image.clone());
            tasks.push(Box::pin(async move {
                let mut buf = io.buf(1024);
                buf.copy_from_slice(&data);
                let _pin = io.pin();
                let at = 65536 + n as u64 * 4096;
                image
                    .0
                    .write(&io, &image.1, at, buf.sg())
                    .await
                    .expect("write");
            }));
        }
        join(&io, tasks);
        io.block_on(image.0.close(&io, &image.1)).expect("close");
        let bytes = the_sim(&storage).image();
        let judge = judge::Judge::new(&bytes);
        assert_eq!(judge.check(), 0, "one cluster was allocated, and one table");
        assert_same(&judge.read_all(&below), &want, "all writes are there");
        io.close();
    }
}

#[test]
fn flushes_asked_for_together_are_done_as_one() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    let io = reactor();
    let config = Sim {
        delay: 5,
        ..Sim::default()
    };
    let storage = sim(images.bytes("a"), config);
    let image = Rc::new(io.block_on(open(&io, &storage, WRITE)).expect("open"));
    the_sim(&storage).take_events();
    let flush = || -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
        let (io, image) = (io.clone(), image.clone());
        Box::pin(async move { image.flush(&io, &()).await.expect("flush") })
    };
    join(&io, (0..16).map(|_| flush()).collect());
    let flushes = the_sim(&storage).take_events();
    // The first, or two of them, began before the others were asked for.
    assert!(flushes.len() <= 3, "{flushes:?}");
    io.close();
}

#[test]
fn a_write_against_a_discard_and_the_reallocation_of_its_cluster() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 1 << 20);
    images.qemu_io("a", &["write -P 1 0 64k"]);
    for seed in 0..20 {
        let io = reactor();
        let config = Sim {
            seed,
            delay: 12,
            pieces: true,
            ..Sim::default()
        };
        let storage = sim(images.bytes("a"), config);
        let image = Rc::new(io.block_on(open(&io, &storage, WRITE)).expect("open"));
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        // Slow writes in place, while their clusters are discarded and used again for others.
        for n in 0..4u64 {
            let (io, image) = (io.clone(), image.clone());
            tasks.push(Box::pin(async move {
                for round in 0..30 {
                    let mut buf = io.buf(16384);
                    buf.copy_from_slice(&noise(round, 16384));
                    let _pin = io.pin();
                    image
                        .write(&io, &(), n * 16384, buf.sg())
                        .await
                        .expect("write");
                }
            }));
        }
        {
            let (io, image) = (io.clone(), image.clone());
            tasks.push(Box::pin(async move {
                for _ in 0..40 {
                    let pin = io.pin();
                    image.discard(&io, 0, 65536).await.expect("discard");
                    drop(pin);
                    image.flush(&io, &()).await.expect("flush");
                }
            }));
        }
        {
            let (io, image) = (io.clone(), image.clone());
            tasks.push(Box::pin(async move {
                let data = noise(999, 8192);
                for n in 0..100u64 {
                    let at = 131_072 + n * 8192;
                    let mut buf = io.buf(8192);
                    buf.copy_from_slice(&data);
                    let _pin = io.pin();
                    image.write(&io, &(), at, buf.sg()).await.expect("write");
                }
                for n in 0..100u64 {
                    let mut buf = io.buf(8192);
                    read(&io, &image, &(), 131_072 + n * 8192, buf.sg())
                        .await
                        .expect("read");
                    assert_same(&buf, &data, "a cluster that was somebody else's before");
                }
            }));
        }
        join(&io, tasks);
        io.block_on(async {
            let data = noise(999, 8192);
            for n in 0..100u64 {
                let mut buf = io.buf(8192);
                read(&io, &image, &(), 131_072 + n * 8192, buf.sg())
                    .await
                    .expect("read");
                assert_same(&buf, &data, "at the end");
            }
            image.close(&io, &()).await.expect("close");
        });
        assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
        io.close();
    }
}

#[test]
fn a_late_write_does_not_hit_a_cluster_that_was_discarded_under_it() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 8 << 20);
    images.qemu_io("a", &["write -P 1 0 64k"]);
    let io = reactor();
    let storage = sim(images.bytes("a"), Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        // A write that has looked its clusters up, and whose I/O takes long.
        let slow_request = io.pin();
        let Ok(Extent::Data { host, len: 65536 }) = image.map(&io, 0, 65536).await else {
            panic!("data in a row");
        };
        image.discard(&io, 0, 65536).await.expect("discard");
        // Enough new clusters for several refills, which take what is free inside the file first.
        for n in 0..400u64 {
            let mut buf = io.buf(4096);
            buf.copy_from_slice(&noise(n, 4096));
            image
                .write(&io, &(), (1 << 20) + n * 4096, buf.sg())
                .await
                .expect("write");
            if n % 8 == 0 {
                image.flush(&io, &()).await.expect("flush");
                io.yield_now().await;
            }
        }
        let mut late = io.buf(65536);
        late.fill(0xee);
        storage
            .write(&io, host.0, late.sg())
            .await
            .expect("the late write");
        drop(slow_request);
        for n in 0..400u64 {
            let mut buf = io.buf(4096);
            read(&io, &image, &(), (1 << 20) + n * 4096, buf.sg())
                .await
                .expect("read");
            assert_same(&buf, &noise(n, 4096), "somebody else's cluster");
        }
        image.close(&io, &()).await.expect("close");
    });
    assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
    io.close();
}

#[test]
fn a_request_that_is_dropped_in_the_middle_lets_its_clusters_go() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 1 << 20);
    for turns in 0..60 {
        let io = reactor();
        let config = Sim {
            seed: turns,
            delay: 6,
            pieces: true,
            ..Sim::default()
        };
        let storage = sim(images.bytes("a"), config);
        let image = Rc::new(io.block_on(open(&io, &storage, WRITE)).expect("open"));
        let dropped = {
            let (io, image) = (io.clone(), image.clone());
            io.clone().spawn(async move {
                let mut buf = io.buf(65536);
                buf.fill(1);
                let _pin = io.pin();
                image.write(&io, &(), 512, buf.sg()).await.expect("write");
            })
        };
        io.block_on(async {
            for _ in 0..turns {
                io.yield_now().await;
            }
        });
        io.remove(dropped);
        io.block_on(async {
            let mut buf = io.buf(65536);
            buf.copy_from_slice(&noise(turns, 65536));
            image.write(&io, &(), 512, buf.sg()).await.expect("write");
            let mut back = io.buf(65536);
            read(&io, &image, &(), 512, back.sg()).await.expect("read");
            assert_same(&back, &buf, "the second write");
            image.close(&io, &()).await.expect("close");
        });
        assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
        io.close();
    }
}

/// Two threads with several tasks each; sectors have one writer, clusters have several.
pub(super) fn threads(
    storage: &Arc<Storage>,
    options: Options,
    steps: u32,
    below: &Vec<u8>,
    want: &mut [u8],
) {
    let size = want.len() as u64;
    const THREADS: u64 = 2;
    const TASKS: u64 = 3;
    let epochs = Epochs::new();
    let io = reactor_of(&epochs, 0);
    let image = io.block_on(open(&io, storage, options)).expect("open");
    let start = want.to_vec();
    let results: Vec<Vec<(u64, Vec<u8>)>> = std::thread::scope(|scope| {
        let spawn = |thread: u64| {
            let (epochs, image, start) = (&epochs, &image, &start);
            scope.spawn(move || {
                let io = reactor_of(epochs, thread as usize + 1);
                let owner = thread * TASKS;
                let mut owned = Vec::new();
                let mut futures: Vec<_> = (0..TASKS)
                    .map(|task| {
                        let io = &io;
                        Box::pin(async move {
                            let mut state = owner + task + 1;
                            let mut mine = std::collections::BTreeMap::new();
                            let stripes = size / 2048 / (THREADS * TASKS);
                            for _ in 0..steps {
                                let stripe =
                                    random(&mut state) % stripes * THREADS * TASKS + owner + task;
                                let at = stripe * 2048;
                                let model = mine
                                    .entry(at)
                                    .or_insert_with(|| start[at as usize..][..2048].to_vec());
                                let from = random(&mut state) as usize % 4;
                                let count = 1 + random(&mut state) as usize % (4 - from);
                                let range = from * 512..(from + count) * 512;
                                let mut buf = io.buf(range.len());
                                let pin = io.pin();
                                let offset = at + range.start as u64;
                                match random(&mut state) % 10 {
                                    8.. => {
                                        drop(pin);
                                        copy_some(io, image, below, &mut state)
                                            .await
                                            .expect("copy");
                                    }
                                    0..5 => {
                                        buf.copy_from_slice(&noise(
                                            random(&mut state),
                                            range.len(),
                                        ));
                                        model[range].copy_from_slice(&buf);
                                        image
                                            .write(io, below, offset, buf.sg())
                                            .await
                                            .expect("write");
                                    }
                                    5 => {
                                        let len = range.len() as u64;
                                        model[range].fill(0);
                                        let unmap = random(&mut state) % 2 == 0;
                                        image
                                            .write_zeroes(io, below, offset, len, unmap)
                                            .await
                                            .expect("zeroes");
                                    }
                                    6 => {
                                        drop(pin);
                                        image.flush(io, below).await.expect("flush");
                                        io.yield_now().await;
                                    }
                                    _ => {
                                        read(io, image, below, offset, buf.sg())
                                            .await
                                            .expect("read");
                                        assert_same(&buf, &model[range], "read by its only writer");
                                    }
                                }
                            }
                            mine
                        })
                    })
                    .collect();
                // All of them on this reactor, as one future.
                io.block_on(std::future::poll_fn(|cx| {
                    futures.retain_mut(|future| match future.as_mut().poll(cx) {
                        std::task::Poll::Ready(mine) => {
                            owned.extend(mine);
                            false
                        }
                        std::task::Poll::Pending => true,
                    });
                    if futures.is_empty() {
                        std::task::Poll::Ready(())
                    } else {
                        std::task::Poll::Pending
                    }
                }));
                drop(futures);
                io.close();
                owned
            })
        };
        let handles: Vec<_> = (0..THREADS).map(spawn).collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("a thread"))
            .collect()
    });
    for (at, bytes) in results.into_iter().flatten() {
        want[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    io.block_on(async {
        let got = read_all(&io, &image, below).await.expect("read");
        assert_same(&got, want, "after the threads");
        image.close(&io, below).await.expect("close");
    });
    io.close();
}

#[test]
fn two_threads_share_clusters_of_a_simulated_image() {
    for (seed, bits, backing, cache) in [
        (1, 12u32, true, 1 << 20),
        (2, 9, false, 0),
        (3, 16, true, 0),
        (4, 12, false, 1 << 20),
        (5, 9, true, 0),
    ] {
        let images = Images::new();
        let size = 1 << 20;
        let options = format!("cluster_size={}", 1 << bits);
        let below = if backing {
            noise(seed, 900_000)
        } else {
            vec![]
        };
        if backing {
            write_file(&images.path("base"), &below);
            images.create_over("a", &options, "base", "raw", size);
        } else {
            images.create("a", &options, size);
        }
        let config = Sim {
            seed,
            delay: 2,
            ..Sim::default()
        };
        let storage = sim(images.bytes("a"), config);
        let mut want = images.contents("a");
        let options = Options {
            has_backing: backing,
            l2_cache_bytes: cache,
            ..WRITE
        };
        threads(&storage, options, 300, &below, &mut want);
        judge_file(
            &images,
            &the_sim(&storage).image(),
            &want,
            &format!("{seed}"),
        );
    }
}

#[test]
fn two_threads_share_clusters_of_a_real_file() {
    use crate::block::file::{FileOptions, FileStorage};
    let images = Images::new();
    let size = 4 << 20;
    let below = noise(3, 3_000_000);
    write_file(&images.path("base"), &below);
    for (direct, cluster) in [(true, 65536), (false, 512), (true, 4096)] {
        let options = format!("cluster_size={cluster}");
        images.create_over("a", &options, "base", "raw", size);
        let mut want = images.contents("a");
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let file = FileStorage::open(images.path("a"), options).expect("open");
        let storage = Arc::new(Storage::File(file));
        let options = Options {
            has_backing: true,
            ..WRITE
        };
        threads(&storage, options, 60, &below, &mut want);
        drop(storage);
        judge_file(
            &images,
            &images.bytes("a"),
            &want,
            &format!("{direct} {cluster}"),
        );
        std::fs::remove_file(images.path("a")).expect("remove");
    }
}
