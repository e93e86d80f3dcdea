//! Copy-on-write that is put off: what it reads and writes, and who meets whom on an incomplete cluster.

use std::cell::{Cell, RefCell};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use super::history::{History, Version, run_bytes};
use super::*;
use crate::block::error::Error;
use crate::block::sim::{Event, Kind};

const WRITE: Options = Options {
    read_only: false,
    has_backing: true,
    ..READ
};

/// A layer below that counts what is read of it, by sector, and can fail.
struct Base {
    bytes: Vec<u8>,
    sectors: RefCell<Vec<u32>>,
    reads: Cell<u64>,
    broken: Cell<bool>,
}

impl Base {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            sectors: RefCell::new(vec![0; bytes.len().div_ceil(512)]),
            reads: Cell::new(0),
            broken: Cell::new(false),
            bytes,
        }
    }

    fn bytes_read(&self) -> u64 {
        self.sectors
            .borrow()
            .iter()
            .map(|n| u64::from(*n) * 512)
            .sum()
    }
}

impl Below for Base {
    async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        io.yield_now().await;
        if self.broken.get() {
            let error = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(Error::io("base", "read", offset, error));
        }
        self.reads.set(self.reads.get() + 1);
        let end = (offset as usize + to.len()).div_ceil(512);
        for n in (offset as usize / 512..end).take_while(|n| n * 512 < self.bytes.len()) {
            self.sectors.borrow_mut()[n] += 1;
        }
        self.bytes.read(io, offset, to).await
    }
}

/// An image over a base, and what it must read as.
struct Over {
    images: Images,
    io: Io,
    storage: Arc<Storage>,
    image: Qcow2,
    base: Base,
    model: RefCell<Vec<u8>>,
}

impl Over {
    fn new(cluster: u64, base: Vec<u8>, size: u64, config: Sim) -> Self {
        Self::with(cluster, base, size, config, WRITE)
    }

    fn with(cluster: u64, base: Vec<u8>, size: u64, config: Sim, options: Options) -> Self {
        let images = Images::new();
        write_file(&images.path("base"), &base);
        let cluster = format!("cluster_size={cluster}");
        images.create_over("a", &cluster, "base", "raw", size);
        let io = reactor();
        let storage = sim(images.bytes("a"), config);
        let image = io.block_on(open(&io, &storage, options)).expect("open");
        let mut model = base.clone();
        model.resize(size as usize, 0);
        Self {
            images,
            io,
            storage,
            image,
            base: Base::new(base),
            model: RefCell::new(model),
        }
    }

    fn sim(&self) -> &SimStorage {
        the_sim(&self.storage)
    }

    async fn write(&self, offset: u64, data: &[u8]) {
        self.try_write(offset, data).await.expect("write");
    }

    async fn try_write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(data);
        let _pin = self.io.pin();
        self.image
            .write(&self.io, &self.base, offset, buf.sg())
            .await?;
        self.model.borrow_mut()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.image.flush(&self.io, &self.base).await
    }

    async fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = self.io.buf(len);
        read(&self.io, &self.image, &self.base, offset, buf.sg())
            .await
            .expect("read");
        buf.to_vec()
    }

    async fn check(&self, what: &str) {
        let got = read_all(&self.io, &self.image, &self.base).await;
        assert_same(&got.expect("read"), &self.model.borrow(), what);
    }

    /// Bytes written since the last call.
    fn written(&self) -> Vec<u64> {
        let len = |event| match event {
            Event::Write { len, .. } => Some(len),
            _ => None,
        };
        self.sim()
            .take_events()
            .into_iter()
            .filter_map(len)
            .collect()
    }

    /// What a power loss leaves that keeps all, or nothing, of what was not flushed.
    fn after_power_loss(&self, all: bool) -> Vec<u8> {
        let keep = |_, versions: usize| if all { versions - 1 } else { 0 };
        let bytes = self.sim().crash_with(keep);
        let judge = judge::Judge::new(&bytes);
        judge.check();
        judge.read_all(&self.base.bytes)
    }

    fn finish(&self, what: &str) {
        self.io.block_on(async {
            self.check(what).await;
            let closed = self.image.close(&self.io, &self.base).await;
            closed.expect("close");
        });
        let bytes = self.sim().crash_with(|_, _| 0);
        assert_eq!(judge::Judge::new(&bytes).check(), 0, "{what}: leaks");
        write_file(&self.images.path("a"), &bytes);
        run("qemu-img", &["check", "-q", &self.images.name("a")]);
        assert_same(&self.images.contents("a"), &self.model.borrow(), what);
        self.io.close();
    }
}

/// Polls a future by hand, a number of times at most, until `reached`; it must not end.
fn poll_until<F: Future>(io: &Io, mut future: Pin<&mut F>, most: u32, reached: impl Fn() -> bool) {
    io.block_on(async {
        for _ in 0..most {
            if reached() {
                return;
            }
            let polled = future
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_pending(), "it ended before");
            io.yield_now().await;
        }
    });
}

const SLOW: Sim = Sim {
    seed: 3,
    delay: 60,
    pieces: false,
    promises_zeros: true,
    discard_garbage: true,
    torn_failures: false,
};

// ---- what it costs ----

#[test]
fn a_sequential_writer_reads_almost_nothing_of_the_base() {
    for writers in [1, 4] {
        let over = Over::new(65536, noise(1, 8 << 20), 8 << 20, Sim::default());
        let data = noise(2, 6 << 20);
        // Beginning and ending inside a cluster, with a flush there, and one every now and then.
        let start = 20_480;
        over.io.block_on(async {
            for (n, piece) in data.chunks(4096 * writers).enumerate() {
                let at = start + (n * 4096 * writers) as u64;
                let each = piece.chunks(4096).enumerate();
                let all: Vec<_> = each
                    .map(|(n, data)| Box::pin(over.write(at + n as u64 * 4096, data)))
                    .collect();
                join_all(all).await;
                if n % 400 == 399 {
                    over.flush().await.expect("flush");
                }
            }
            over.flush().await.expect("flush");
        });
        let written: u64 = over.written().iter().sum();
        let read = over.base.bytes_read();
        assert!(read * 16 < written, "{read} read, {written} written");
        over.finish("sequential");
    }
}

async fn join_all<F: Future<Output = ()> + ?Sized>(mut futures: Vec<Pin<Box<F>>>) {
    std::future::poll_fn(|cx| {
        futures.retain_mut(|future| future.as_mut().poll(cx).is_pending());
        match futures.is_empty() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}

#[test]
fn a_random_writer_on_a_fresh_image_writes_little_more_than_the_guest() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 256 << 20);
    let io = reactor();
    let storage = sim(images.bytes("a"), Sim::default());
    let options = Options {
        has_backing: false,
        ..WRITE
    };
    io.block_on(async {
        let image = open(&io, &storage, options).await.expect("open");
        the_sim(&storage).take_events();
        let before = the_sim(&storage).bytes_read();
        let mut state = 9;
        let mut buf = io.buf(4096);
        buf.fill(1);
        const WRITES: u64 = 2000;
        for n in 0..WRITES {
            let at = random(&mut state) % (65536 - 1) * 4096;
            image.write(&io, &(), at, buf.sg()).await.expect("write");
            if n % 500 == 499 {
                image.flush(&io, &()).await.expect("flush");
            }
        }
        let written: u64 = the_sim(&storage)
            .take_events()
            .iter()
            .map(|event| match event {
                Event::Write { len, .. } => *len,
                _ => 0,
            })
            .sum();
        assert!(written * 10 < WRITES * 4096 * 12, "{written} written");
        let read = the_sim(&storage).bytes_read() - before;
        assert!(read < 1 << 20, "{read} read, of tables");
        image.close(&io, &()).await.expect("close");
    });
    io.close();
}

#[test]
fn a_random_writer_reads_each_cluster_of_the_base_once_for_a_flush() {
    let options = Options {
        l2_cache_bytes: 8 << 20,
        ..WRITE
    };
    let over = Over::with(65536, noise(1, 8 << 20), 8 << 20, Sim::default(), options);
    over.io.block_on(async {
        let mut state = 5;
        for n in 0..over.image.records.lone_limit() as u64 {
            over.write(n * 131_072 + 8192, &noise(n, 4096)).await;
        }
        assert_eq!(over.base.bytes_read(), 0, "not before it must be");
        for n in 0..300 {
            let at = random(&mut state) % 2048 * 4096;
            over.write(at, &noise(n, 4096)).await;
        }
        assert!(over.image.records.len() > 50);
        over.flush().await.expect("flush");
        assert_eq!(over.image.records.len(), 0);
    });
    assert!(over.base.sectors.borrow().iter().all(|n| *n <= 1));
    over.finish("random");
}

#[test]
fn neighbours_are_read_at_one_go_and_written_together() {
    let over = Over::new(4096, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(900_096, &noise(7, 512)).await; // the table and the arena
        over.flush().await.expect("flush");
        for n in 0..8 {
            over.write(n * 4096 + 1024, &noise(n, 512)).await;
        }
        over.written();
        let reads = over.base.reads.get();
        over.flush().await.expect("flush");
        assert_eq!(over.base.reads.get() - reads, 1);
        let data = over.written().into_iter().filter(|len| *len < 4096);
        // Before the first, between two of them, and behind the last.
        assert_eq!(data.collect::<Vec<_>>().len(), 9);
    });
    over.finish("neighbours");
}

#[test]
fn a_cluster_full_of_holes_is_written_at_one_go() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        for n in 0..60 {
            over.write(65536 + 512 + n * 1024, &noise(n, 512)).await;
        }
        over.written();
        over.flush().await.expect("flush");
        let written = over.written();
        assert!(written.len() <= 4, "{written:?}");
    });
    over.finish("holes");
}

#[test]
fn zeros_of_the_base_are_not_written() {
    let over = Over::new(65536, vec![0; 1 << 20], 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(65536 + 4096, &noise(1, 4096)).await;
        over.written();
        over.flush().await.expect("flush");
        let written = over.written();
        assert!(written.iter().all(|len| *len <= 4096), "{written:?}");
    });
    over.finish("zeros");
}

// ---- when it is done ----

#[test]
fn a_flush_makes_durable_what_was_incomplete_and_before_it_nothing_changes() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, SLOW);
    over.io.block_on(async {
        over.write(65536 + 4096, &noise(2, 8192)).await;
        over.write(200_704, &noise(3, 65536)).await;
        over.check("incomplete").await;
        for all in [false, true] {
            assert_same(&over.after_power_loss(all), &over.base.bytes, "not flushed");
        }
        // Metadata is written back without completing anything: of the same slice a whole cluster.
        let whole = noise(5, 65536);
        over.write(524_288, &whole).await;
        over.image.write_back(&over.io).await.expect("write back");
        assert!(over.image.records.len() > 1);
        let mut want = over.base.bytes.clone();
        want[524_288..][..65536].copy_from_slice(&whole);
        assert_same(&over.after_power_loss(false), &want, "the old entries");
        over.write(65536, &noise(4, 512)).await;
        over.check("incomplete").await;
        over.flush().await.expect("flush");
        let durable = over.after_power_loss(false);
        assert_same(&durable, &over.model.borrow(), "flushed");
    });
    over.finish("flushed");
}

#[test]
fn what_is_incomplete_for_long_is_completed_by_the_timer() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        let (io, base) = (&over.io, &over.base);
        over.image.flush(io, base).await.expect("flush");
        over.write(65536, &noise(2, 4096)).await;
        let hour = Duration::from_secs(3600);
        let due = over.image.write_back_older(io, base, hour);
        due.await.expect("write back");
        assert_eq!(over.image.records.len(), 1, "not due");
        let due = over.image.write_back_older(io, base, Duration::ZERO);
        due.await.expect("write back");
        assert_eq!(over.image.records.len(), 0);
    });
    over.finish("age");
}

#[test]
fn when_there_is_no_record_left_a_write_copies_at_once() {
    let options = Options {
        l2_cache_bytes: 512 << 10,
        ..WRITE
    };
    // Who writes to each second cluster is not followed; who writes one after the other is.
    for (apart, is_lone) in [(8192, true), (4096, false)] {
        let over = Over::with(4096, noise(1, 4 << 20), 4 << 20, Sim::default(), options);
        over.io.block_on(async {
            let records = &over.image.records;
            assert!(records.lone_limit() > 1 && records.lone_limit() * 4 < records.limit());
            let limit = match is_lone {
                true => records.lone_limit() as u64,
                false => records.limit() as u64,
            };
            for n in 0..limit + 5 {
                assert_eq!(over.base.bytes_read() > 0, n > limit, "{n}");
                over.write(n * apart + 512, &noise(n, 512)).await;
            }
            assert_eq!(records.len() as u64, limit);
            over.check("full").await;
        });
        over.finish("full");
    }
}

#[test]
fn a_stream_among_lone_writes_is_found_and_copies_one_cluster_at_most() {
    let over = Over::new(65536, noise(1, 32 << 20), 32 << 20, Sim::default());
    over.io.block_on(async {
        let mut lone = (0..120).map(|n| (16 << 20) + n * 131_072);
        for at in lone.by_ref().take(60) {
            over.write(at, &noise(at, 4096)).await;
        }
        // Eight clusters, one write each in turn with a lone one.
        let before: u32 = over.base.sectors.borrow()[..32768].iter().sum();
        for n in 0..8 * 16 {
            over.write(n * 4096, &noise(n, 4096)).await;
            if let Some(at) = lone.next() {
                over.write(at, &noise(at, 4096)).await;
            }
        }
        let read: u32 = over.base.sectors.borrow()[..32768].iter().sum();
        assert!(read - before <= 128, "{} sectors", read - before);
    });
    over.finish("stream");
}

#[test]
fn zeros_of_the_base_are_not_written_by_who_copies_at_once() {
    let mut base = vec![0; 1 << 20];
    // One cluster has data before, one behind what is written.
    base[65536..65536 + 512].fill(7);
    base[196_608 - 512..196_608].fill(7);
    let over = Over::new(65536, base, 1 << 20, Sim::default());
    over.io.block_on(async {
        let (io, base) = (&over.io, &over.base);
        over.image.set_eager(io, base, true).await.expect("eager");
        over.write(524_288 + 8192, &noise(1, 4096)).await; // the table, too
        over.written();
        over.write(262_144 + 8192, &noise(2, 4096)).await;
        assert_eq!(over.written(), [4096]);
        over.write(65536 + 8192, &noise(3, 4096)).await;
        assert_eq!(over.written(), [8192 + 4096]);
        over.write(131_072 + 8192, &noise(4, 4096)).await;
        assert_eq!(over.written(), [65536 - 8192]);
        over.check("zeros").await;
    });
    over.finish("zeros");
}

#[test]
fn many_records_ask_for_being_made_fewer() {
    let options = Options {
        l2_cache_bytes: 512 << 10,
        ..WRITE
    };
    for (apart, is_lone) in [(8192, true), (4096, false)] {
        let over = Over::with(4096, noise(1, 4 << 20), 4 << 20, Sim::default(), options);
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        over.image.when_scarce(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        over.io.block_on(async {
            let limit = match is_lone {
                true => over.image.records.lone_limit() as u64,
                false => over.image.records.limit() as u64,
            };
            let at = |n: u64| (1 << 20) + n * apart + 512;
            for n in 0..limit / 2 {
                over.write(at(n), &noise(n, 512)).await;
            }
            over.image.fill_ahead(&over.io, &over.base).await;
            assert_eq!(over.image.records.len() as u64, limit / 2, "not scarce");
            assert_eq!(asked.load(Ordering::Relaxed), 0);
            over.write(at(limit / 2 - 1) + apart, &noise(1, 512)).await;
            assert_eq!(asked.load(Ordering::Relaxed), 1);
            over.image.fill_ahead(&over.io, &over.base).await;
            let left = over.image.records.len() as u64;
            assert!(left <= limit / 4 + 1, "{left} of {limit}");
            over.check("fewer").await;
            // The latest is among those that stay.
            let clusters = over.image.records.list(Duration::ZERO);
            let latest = (at(limit / 2 - 1) + apart) / 4096;
            assert_eq!(clusters.last(), Some(&GuestCluster(latest)));
        });
        over.finish("fewer");
    }
}

#[test]
fn an_eager_image_copies_at_once_and_has_completed_what_was_put_off() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        assert_eq!(over.image.records.len(), 1);
        let (io, base) = (&over.io, &over.base);
        over.image.set_eager(io, base, true).await.expect("eager");
        assert_eq!(over.image.records.len(), 0);
        over.write(131_072, &noise(2, 4096)).await;
        assert_eq!(over.image.records.len(), 0);
        over.image.set_eager(io, base, false).await.expect("lazy");
        over.write(262_144, &noise(2, 4096)).await;
        assert_eq!(over.image.records.len(), 1);
    });
    over.finish("eager");
}

#[test]
fn a_write_of_less_than_sectors_completes_the_cluster_first() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        over.write(4000, &noise(3, 200)).await;
        assert_eq!(over.image.records.len(), 0);
        over.write(131_172, &noise(3, 1000)).await;
        over.check("odd").await;
    });
    over.finish("odd");
}

// ---- who meets whom ----

#[test]
fn a_write_to_a_copied_cluster_does_not_wait_for_another_one_under_way() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, SLOW);
    over.io.block_on(over.write(0, &noise(2, 4096)));
    over.written();
    let begun = Cell::new(false);
    let first = noise(3, 4096);
    let mut slow = pin!(over.write(65536, &first));
    poll_until(&over.io, slow.as_mut(), 1000, || {
        begun.set(begun.get() || over.written().contains(&4096));
        begun.get()
    });
    over.io.block_on(async {
        over.write(65536 + 8192, &noise(4, 4096)).await;
        over.check("the second only").await;
        slow.await;
    });
    over.finish("both");
}

#[test]
fn a_late_fill_never_overwrites_a_completed_write() {
    for seed in 1..20 {
        let config = Sim { seed, ..SLOW };
        let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, config);
        over.io.block_on(async {
            over.write(0, &noise(2, 4096)).await;
            over.flush().await.expect("flush");
            over.write(65536, &noise(2, 4096)).await;
        });
        over.written();
        let data = noise(3, 4096);
        let mut slow = pin!(over.write(65536 + 8192, &data));
        let begun = Cell::new(false);
        poll_until(&over.io, slow.as_mut(), 1000, || {
            begun.set(begun.get() || over.written().contains(&4096));
            begun.get()
        });
        // The fill begins while the write is on its way.
        let mut flush = pin!(over.flush());
        let filling = Cell::new(false);
        poll_until(&over.io, flush.as_mut(), 300, || {
            filling.set(filling.get() || !over.written().is_empty());
            filling.get()
        });
        over.io.block_on(slow);
        over.io.block_on(flush).expect("flush");
        assert!(!filling.get(), "the fill waits for the writer");
        over.finish("late");
    }
}

#[test]
fn a_write_that_meets_a_fill_waits_for_it_and_goes_in_place() {
    for seed in 1..10 {
        let config = Sim { seed, ..SLOW };
        let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, config);
        over.io.block_on(async {
            over.write(0, &noise(2, 4096)).await;
            over.flush().await.expect("flush");
            over.write(65536, &noise(2, 4096)).await;
        });
        over.written();
        let mut flush = pin!(over.flush());
        let filling = Cell::new(false);
        poll_until(&over.io, flush.as_mut(), 1000, || {
            filling.set(filling.get() || !over.written().is_empty());
            filling.get()
        });
        let data = noise(3, 4096);
        let write = pin!(over.write(65536 + 8192, &data));
        over.io.block_on(join_all(vec![
            Box::pin(async { flush.await.expect("flush") }) as Pin<Box<dyn Future<Output = ()>>>,
            Box::pin(write),
        ]));
        over.finish("met");
    }
}

#[test]
fn a_discard_of_an_incomplete_cluster_waits_for_its_writer_and_frees_both_clusters() {
    for (seed, unmap) in [(1, None), (2, Some(true)), (3, Some(false))] {
        let config = Sim { seed, ..SLOW };
        let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, config);
        over.io.block_on(over.write(65536, &noise(2, 4096)));
        over.written();
        let data = noise(3, 4096);
        let mut slow = pin!(over.write(65536 + 8192, &data));
        let begun = Cell::new(false);
        poll_until(&over.io, slow.as_mut(), 1000, || {
            begun.set(begun.get() || over.written().contains(&4096));
            begun.get()
        });
        let (io, base) = (&over.io, &over.base);
        let mut discard = pin!(async {
            let _pin = io.pin();
            match unmap {
                None => over.image.discard(io, 65536, 65536).await,
                Some(unmap) => {
                    let zeroes = over.image.write_zeroes(io, base, 65536, 65536, unmap);
                    zeroes.await
                }
            }
        });
        poll_until(io, discard.as_mut(), 100, || false);
        io.block_on(slow);
        io.block_on(discard).expect("discard");
        assert_eq!(over.image.records.len(), 0);
        over.model.borrow_mut()[65536..131_072].fill(0);
        over.finish("discarded");
    }
}

#[test]
fn zeros_in_an_incomplete_cluster_are_written_as_data_is() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(65536, &noise(2, 4096)).await;
        let zeroes = over
            .image
            .write_zeroes(&over.io, &over.base, 65536 + 2048, 8192, false);
        zeroes.await.expect("zeroes");
        over.model.borrow_mut()[65536 + 2048..][..8192].fill(0);
        assert_eq!(over.image.records.len(), 1);
        over.check("zeros").await;
    });
    over.finish("zeros");
}

/// Writers with sectors of their own in shared clusters, a flusher, somebody who fills ahead, and readers,
/// who see each sector as it was or as it became, and nothing else.
fn crowd(seed: u64, cluster: u64) {
    let config = Sim {
        seed,
        delay: 8,
        pieces: true,
        discard_garbage: true,
        promises_zeros: seed % 3 != 0,
        torn_failures: false,
    };
    let size = 16 * cluster.max(16384);
    let over = Rc::new(Over::new(
        cluster,
        noise(seed, size as usize - 700),
        size,
        config,
    ));
    let history = Rc::new(History::new(over.model.borrow().clone()));
    let running = Rc::new(Cell::new(0));
    let sectors = size / 512;
    let spawn = |task: Pin<Box<dyn Future<Output = ()>>>| {
        running.set(running.get() + 1);
        let running = running.clone();
        over.io.spawn(async move {
            task.await;
            running.set(running.get() - 1);
        });
    };
    for task in 0..5u64 {
        let (over, history) = (over.clone(), history.clone());
        spawn(Box::pin(async move {
            let mut state = seed * 100 + task + 1;
            for step in 0..60 {
                let first = (random(&mut state) % (sectors / 20) * 5 + task) * 4;
                let (first, count) = (first + random(&mut state) % 4, 1);
                let tag = task << 32 | (step + 1);
                history.begin(first, count, Version::Written(tag));
                over.write(first * 512, &run_bytes(first, count, tag)).await;
                history.complete(first, count);
            }
        }));
    }
    for task in 0..2u64 {
        let over = over.clone();
        spawn(Box::pin(async move {
            for _ in 0..20 {
                match task {
                    0 => over.flush().await.expect("flush"),
                    _ => {
                        let older = over.image.fill_older(&over.io, &over.base, Duration::ZERO);
                        older.await.expect("fill");
                    }
                }
                over.io.yield_now().await;
            }
        }));
    }
    for task in 0..3u64 {
        let (over, history) = (over.clone(), history.clone());
        spawn(Box::pin(async move {
            let mut state = seed * 1000 + task + 1;
            for _ in 0..60 {
                let first = random(&mut state) % (sectors - 32);
                let point = history.flush_begins();
                let got = over.read(first * 512, 32 * 512).await;
                history.check_read(first as usize, &got, &point, &format!("seed {seed}"));
            }
        }));
    }
    over.io.block_on(async {
        while running.get() > 0 {
            over.io.yield_now().await;
        }
    });
    over.finish(&format!("crowd {seed}"));
}

#[test]
fn readers_see_each_sector_of_an_incomplete_cluster_as_it_was_or_became() {
    for seed in 1..20 {
        crowd(seed, [4096, 16384, 65536][seed as usize % 3]);
    }
}

// ---- what goes wrong ----

#[test]
fn a_fill_that_fails_fails_the_flush_and_the_next_one_tries_again() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        over.write(65536 + 4096, &noise(3, 4096)).await;
        over.base.broken.set(true);
        over.flush().await.expect_err("nothing to copy from");
        over.base.broken.set(false);
        over.check("as incomplete as before").await;
        assert_eq!(over.image.records.len(), 2);
        // Half-way through what is written.
        over.sim().fail(Kind::Write, 1, libc::ENOSPC, false);
        over.flush().await.expect_err("no space");
        over.check("as incomplete as before").await;
        over.write(65536, &noise(4, 8192)).await;
        over.flush().await.expect("flush");
        let durable = over.after_power_loss(false);
        assert_same(&durable, &over.model.borrow(), "flushed");
    });
    over.finish("failed once");
}

#[test]
fn a_cluster_that_can_not_be_completed_keeps_nothing_else_back() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        // A whole cluster, which needs nothing from below.
        over.write(3 * 65536, &noise(3, 65536)).await;
        over.base.broken.set(true);
        over.flush().await.expect_err("nothing to copy from");
        let durable = over.after_power_loss(false);
        assert_same(
            &durable[3 * 65536..4 * 65536],
            &noise(3, 65536),
            "its mapping went to the file all the same",
        );
        over.base.broken.set(false);
    });
    over.finish("could not be completed once");
}

#[test]
fn a_failed_write_to_an_incomplete_cluster_shows_the_old_content() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(0, &noise(2, 4096)).await;
        for at in [131_072, 8192] {
            over.sim().fail(Kind::Write, 1, libc::EIO, false);
            over.try_write(at, &noise(2, 4096))
                .await
                .expect_err("failed");
            over.check("the old content").await;
        }
        // With a whole cluster between two that are not.
        over.sim().fail(Kind::Write, 1, libc::EIO, false);
        let failed = over.try_write(262_144 + 4096, &noise(2, 3 * 65536)).await;
        failed.expect_err("failed");
        over.check("the old content").await;
    });
    over.finish("failed");
}

#[test]
fn a_request_that_is_dropped_while_it_copies_leaves_the_cluster_to_others() {
    for turns in 0..80 {
        let config = Sim {
            seed: turns,
            delay: 6,
            pieces: true,
            ..Sim::default()
        };
        let over = Rc::new(Over::new(4096, noise(1, 1 << 18), 1 << 18, config));
        let task = over.clone();
        let dropped = over.io.spawn(async move {
            match turns % 2 {
                0 => task.write(512, &noise(2, 16384)).await,
                _ => {
                    task.write(512, &noise(2, 1024)).await;
                    task.flush().await.expect("flush");
                }
            }
        });
        over.io.block_on(async {
            for _ in 0..turns {
                over.io.yield_now().await;
            }
        });
        over.io.remove(dropped);
        over.io.block_on(async {
            over.write(512, &noise(turns, 16384)).await;
            over.check("the second write").await;
        });
        over.finish("dropped");
    }
}
