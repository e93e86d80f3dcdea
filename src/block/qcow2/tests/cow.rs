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

mod cost;
mod failures;
mod meetings;
mod when;

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
