//! Several requests at a time, of one cluster.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

use super::super::concurrent::{join, threads};
use super::*;

type Task = Pin<Box<dyn Future<Output = ()>>>;

const SLOW: Sim = Sim {
    seed: 0,
    delay: 6,
    pieces: true,
    promises_zeros: true,
    discard_garbage: true,
    torn_failures: false,
};

/// A layer below whose reads wait until they are let go.
#[derive(Clone, Default)]
struct Gate(Rc<(Cell<bool>, RefCell<Vec<Waker>>)>);

impl Gate {
    fn open(&self) {
        self.0.0.set(true);
        self.0.1.take().into_iter().for_each(Waker::wake);
    }
}

impl Below for Gate {
    async fn read(&self, _: &Io, _: u64, to: Sg<'_>) -> Result<()> {
        poll_fn(|cx| {
            if self.0.0.get() {
                return Poll::Ready(());
            }
            self.0.1.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        to.zero();
        Ok(())
    }
}

/// A request of a task of its own: done, or not.
fn start(io: &Io, image: &Rc<Qcow2>, gate: &Gate, offset: u64, len: u64) -> Rc<Cell<bool>> {
    let done = Rc::new(Cell::new(false));
    let (task_io, image, gate, told) = (io.clone(), image.clone(), gate.clone(), done.clone());
    io.spawn(async move {
        let _pin = task_io.pin();
        if len == 0 {
            // The whole first subcluster.
            image
                .discard(&task_io, offset, 2048)
                .await
                .expect("discard");
        } else {
            let mut buf = task_io.buf(len as usize);
            buf.fill(len as u8 | 1);
            let written = image.write(&task_io, &gate, offset, buf.sg()).await;
            written.expect("write");
        }
        told.set(true);
    });
    done
}

#[test]
fn writers_to_different_subclusters_do_not_wait_for_each_other() {
    let case = Case::new(65536, Base::Raw, 1 << 20, &[], Sim::default());
    let io = reactor();
    let image = Rc::new(io.block_on(case.open(&io)));
    let gate = Gate::default();
    let turns = || {
        io.block_on(async {
            for _ in 0..200 {
                io.yield_now().await;
            }
        });
    };
    // Has to read the rest of its subcluster from below, which takes long.
    let slow = start(&io, &image, &gate, 512, 512);
    turns();
    assert!(!slow.get());
    let beside = start(&io, &image, &gate, 2048, 4096);
    let same = start(&io, &image, &gate, 1024, 512);
    let across = start(&io, &image, &gate, 0, 8192);
    let discard = start(&io, &image, &gate, 0, 0);
    turns();
    assert!(beside.get(), "nothing is in its way");
    assert!(
        !same.get() && !across.get() && !discard.get(),
        "the slow one is"
    );
    let in_place = start(&io, &image, &gate, 3072, 512);
    turns();
    assert!(in_place.get());
    gate.open();
    turns();
    assert!(slow.get() && same.get() && across.get() && discard.get());
    io.block_on(image.close(&io, &())).expect("close");
    io.close();
}

#[test]
fn a_host_cluster_stays_while_one_of_its_subclusters_is_being_filled() {
    let commands = ["write -P 7 8k 2k"];
    let case = Case::new(65536, Base::Raw, 1 << 20, &commands, Sim::default());
    let io = reactor();
    let image = Rc::new(io.block_on(case.open(&io)));
    let gate = Gate::default();
    let turns = || {
        io.block_on(async {
            for _ in 0..200 {
                io.yield_now().await;
            }
        });
    };
    let slow = start(&io, &image, &gate, 512, 512);
    turns();
    // Nothing of the cluster is allocated any more, and nothing is yet.
    let discard = start(&io, &image, &gate, 8192, 0);
    turns();
    assert!(discard.get() && !slow.get());
    gate.open();
    turns();
    assert!(slow.get());
    io.block_on(async {
        let mut buf = io.buf(1024);
        read(&io, &image, &gate, 512, buf.sg()).await.expect("read");
        assert!(buf[..512].iter().all(|b| *b == 1) && buf[512..].iter().all(|b| *b == 0));
        read(&io, &image, &gate, 8192, buf.sg())
            .await
            .expect("read");
        assert!(buf.iter().all(|b| *b == 0));
        image.close(&io, &()).await.expect("close");
    });
    write_file(&case.images.path("a"), &the_sim(&case.storage).image());
    run("qemu-img", &["check", "-q", &case.images.name("a")]);
    io.close();
}

#[test]
fn a_request_that_is_dropped_lets_go_of_its_subclusters() {
    let mut case = Case::new(65536, Base::Raw, 1 << 20, &[], SLOW);
    let io = reactor();
    let image = io.block_on(case.open(&io));
    for turns in 0..40 {
        let at = turns * 4096;
        let mut buf = io.buf(1024);
        buf.fill(1);
        let mut first = Box::pin(image.write(&io, &case.below, at + 1536, buf.sg()));
        io.block_on(async {
            for _ in 0..turns {
                let poll = poll_fn(|cx| Poll::Ready(first.as_mut().poll(cx).is_ready()));
                if poll.await {
                    break;
                }
                io.yield_now().await;
            }
        });
        drop(first);
        drop(buf);
        io.block_on(case.write(&io, &image, at + 1024, &noise(turns, 2048)));
    }
    case.finish(&io, &image, "dropped");
    io.close();
}

#[test]
fn a_late_write_into_a_subcluster_that_is_used_again_harms_no_other_sector() {
    for cluster in [65536u64, 1 << 20] {
        let sub = cluster / 32;
        for seed in 0..10 {
            let config = Sim { seed, ..SLOW };
            let commands = ["write -P 77 0 2M"];
            let case = Case::new(cluster, Base::Raw, 2 << 20, &commands, config);
            let io = reactor();
            let image = Rc::new(io.block_on(case.open(&io)));
            let mut tasks: Vec<Task> = Vec::new();
            let left = Rc::new(Cell::new(3));
            // Each writes one sector of every subcluster of the first two clusters, again and again.
            for task in 0..3u64 {
                let (io, image, left) = (io.clone(), image.clone(), left.clone());
                let below = case.below.clone();
                tasks.push(Box::pin(async move {
                    let mut state = seed * 3 + task + 1;
                    for _ in 0..60 {
                        let n = random(&mut state) % 8;
                        let mut buf = io.buf(512);
                        buf.fill(task as u8 + 1);
                        let _pin = io.pin();
                        let at = n * sub + task * 512;
                        image.write(&io, &below, at, buf.sg()).await.expect("write");
                    }
                    left.set(left.get() - 1);
                }));
            }
            let (task_io, task_image, below) = (io.clone(), image.clone(), case.below.clone());
            tasks.push(Box::pin(async move {
                let (io, image) = (task_io, task_image);
                let mut state = seed + 9;
                // All of it once, so that what comes later is between zeros.
                image.discard(&io, 0, 8 * sub).await.expect("discard");
                while left.get() > 0 {
                    let pin = io.pin();
                    let n = random(&mut state) % 8;
                    if random(&mut state) % 2 == 0 {
                        image.discard(&io, n * sub, sub).await.expect("discard");
                    } else {
                        let keep = image.write_zeroes(&io, &below, n * sub, sub, false);
                        keep.await.expect("zeroes");
                    }
                    drop(pin);
                    io.yield_now().await;
                }
            }));
            join(&io, tasks);
            io.block_on(async {
                let all = read_all(&io, &image, &case.below).await.expect("read");
                for n in 0..8 * sub / 512 {
                    let sector = &all[n as usize * 512..][..512];
                    let writer = n % (sub / 512);
                    let first = sector[0];
                    assert!(sector.iter().all(|b| *b == first), "{n}: one write's");
                    let good = first == 0 || (writer < 3 && first == writer as u8 + 1);
                    assert!(good, "sector {n} of seed {seed}: {first}");
                }
                assert!(all[8 * sub as usize..2 << 20].iter().all(|b| *b == 77));
                image.close(&io, &()).await.expect("close");
            });
            let bytes = the_sim(&case.storage).image();
            write_file(&case.images.path("a"), &bytes);
            run("qemu-img", &["check", "-q", &case.images.name("a")]);
            io.close();
        }
    }
}

#[test]
fn two_threads_share_subclusters() {
    for (seed, cluster, base, cache) in [
        (1, 16384u64, Base::Raw, 1 << 20),
        (2, 65536, Base::None, 0),
        (3, 65536, Base::Extended, 0),
        (4, 256 << 10, Base::Raw, 0),
        (5, 2 << 20, Base::Qcow2, 1 << 20),
        (6, 2 << 20, Base::None, 0),
    ] {
        let config = Sim {
            seed,
            delay: 2,
            ..Sim::default()
        };
        let commands = ["write -P 3 100k 300k", "write -c -P 4 2M 2M"];
        let case = Case::new(cluster, base, 4 << 20, &commands, config);
        let options = Options {
            l2_cache_bytes: cache,
            ..case.options
        };
        let mut want = case.model.clone();
        threads(&case.storage, options, 300, &case.below, &mut want);
        let bytes = the_sim(&case.storage).image();
        judge(&case.images, &bytes, &want, &format!("{seed}"));
    }
}

#[test]
fn two_threads_share_subclusters_of_a_real_file() {
    use crate::block::file::{FileOptions, FileStorage};
    for (direct, cluster) in [(true, 65536u64), (false, 16384), (true, 1 << 20)] {
        let case = Case::new(cluster, Base::Raw, 4 << 20, &[], Sim::default());
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let file = FileStorage::open(case.images.path("a"), options).expect("open");
        let storage = Arc::new(Storage::File(file));
        let mut want = case.model.clone();
        threads(&storage, case.options, 100, &case.below, &mut want);
        drop(storage);
        let bytes = case.images.bytes("a");
        judge(&case.images, &bytes, &want, &format!("{direct} {cluster}"));
    }
}
