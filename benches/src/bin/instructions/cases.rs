//! What is counted, and how each case is driven: everything on one thread, with nothing left to chance.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost_user_frontend::blk::{SECTOR, status};
use vhost_user_frontend::protocol::feature;
use vhost_user_frontend::{
    BlkQueue, Memory, Notify, Op, RegionSpec, SlotOptions, TempDir, Virtqueue, qemu,
};
use virtioblkd::assembly;
use virtioblkd::block::JOURNAL_BYTES;
use virtioblkd::cli::{self, Invocation};
use virtioblkd::config::Host;
use virtioblkd::dataplane::device::{BlkDevice, RingStart};
use virtioblkd::dataplane::{Dataplane, HandWorker, PollConfig, PollMode};
use virtioblkd::shared_memory::SharedMemory;
use virtioblkd::virtio::inflight::InflightLayout;
use virtioblkd::virtio::memory::{GuestMemory, Region};
use virtioblkd::virtio::ring::RingConfig;

use super::rings;

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Descriptors of a ring.
pub const QUEUE_SIZE: u16 = 256;
/// Requests that are made available at once.
pub const BATCH: u64 = 32;
/// Bytes of a request.
const BLOCK: u32 = 4096;
/// Bytes of a disk.
const SIZE: u64 = 64 << 20;
/// Bytes of guest memory.
pub const GUEST_BYTES: u64 = 4 << 20;
/// Of a qcow2 image.
const CLUSTER: u64 = 64 << 10;
/// How long an operation may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long all that are under way take, about: writes to the page cache are a kernel thread's, and how many of them a
/// turn finds ended would be left to chance.
const SETTLE: Duration = Duration::from_millis(1);

/// A disk and what is asked of it.
#[derive(Clone, Copy, Debug)]
pub struct DiskCase {
    pub layer: Layer,
    pub write: bool,
}

/// What a disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Zeros.
    Null,
    /// A file in the page cache.
    Raw,
    /// Every cluster allocated, its table cached.
    Mapped,
    /// No cluster allocated.
    Fresh,
    /// So many images, with everything in the lowest.
    Chain(u32),
}

/// A ring without requests: chains are taken and returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingCase {
    /// Ours.
    Own {
        /// A packed ring.
        packed: bool,
        /// What is in flight is kept in a region.
        inflight: bool,
    },
    /// That of the reference stack.
    Reference,
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Disk(DiskCase),
    Ring(RingCase),
}

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    /// What it costs, in words.
    pub what: &'static str,
    pub kind: Kind,
    /// Of the daemon: guarded against a rise.
    pub ours: bool,
}

const fn disk(name: &'static str, what: &'static str, layer: Layer, write: bool) -> Case {
    let kind = Kind::Disk(DiskCase { layer, write });
    Case {
        name,
        what,
        kind,
        ours: true,
    }
}

const fn ring(name: &'static str, what: &'static str, packed: bool, inflight: bool) -> Case {
    let kind = Kind::Ring(RingCase::Own { packed, inflight });
    Case {
        name,
        what,
        kind,
        ours: true,
    }
}

/// All of them.
pub const CASES: &[Case] = &[
    disk("null-read", "read of a null disk", Layer::Null, false),
    disk("null-write", "write to a null disk", Layer::Null, true),
    disk("raw-read", "read of a raw file", Layer::Raw, false),
    disk("raw-write", "write to a raw file", Layer::Raw, true),
    disk(
        "qcow2-read",
        "read of a mapped cluster",
        Layer::Mapped,
        false,
    ),
    disk(
        "qcow2-write",
        "write to a mapped cluster",
        Layer::Mapped,
        true,
    ),
    disk(
        "qcow2-first-write",
        "first write to a cluster",
        Layer::Fresh,
        true,
    ),
    disk(
        "chain-1-read",
        "read through 1 image to its raw base",
        Layer::Chain(1),
        false,
    ),
    disk(
        "chain-16-read",
        "read through 16 images to their raw base",
        Layer::Chain(16),
        false,
    ),
    ring(
        "ring-split",
        "take and return a chain of 3, split ring",
        false,
        false,
    ),
    ring(
        "ring-split-inflight",
        "the same, with an inflight region",
        false,
        true,
    ),
    ring(
        "ring-packed",
        "take and return a chain of 3, packed ring",
        true,
        false,
    ),
    ring(
        "ring-packed-inflight",
        "the same, with an inflight region",
        true,
        true,
    ),
    Case {
        name: "ring-reference",
        what: "take and return a chain of 3, reference stack",
        kind: Kind::Ring(RingCase::Reference),
        ours: false,
    },
];

impl Case {
    /// How many requests are counted.
    pub fn requests(&self) -> u64 {
        match self.kind {
            // Each takes a cluster of its own.
            Kind::Disk(DiskCase {
                layer: Layer::Fresh,
                ..
            }) => 512,
            Kind::Disk(_) => 2048,
            Kind::Ring(_) => 4096,
        }
    }

    /// Does it once, with as many requests before that are not counted.
    pub fn drive(&self, requests: u64) -> Result<()> {
        match self.kind {
            Kind::Disk(case) => drive_disk(case, requests),
            Kind::Ring(case) => rings::drive(case, requests),
        }
    }
}

/// The turn of a worker whose instructions are counted. Its name is what callgrind is told.
#[inline(never)]
pub fn counted_turn(worker: &mut HandWorker) -> bool {
    worker.turn()
}

/// Guest memory as the driver has it, and as the device does.
pub fn guest_memory() -> Result<(Memory, Arc<GuestMemory>)> {
    let memory = Memory::new(&[RegionSpec::new(0, GUEST_BYTES)])?;
    let region = &memory.regions()[0];
    let spec = region.spec();
    let mapped = Region::map(
        region.file()?,
        spec.mmap_offset,
        spec.guest_addr,
        region.user_addr(spec.guest_addr),
        spec.size,
    )?;
    Ok((memory, Arc::new(GuestMemory::new(vec![mapped])?)))
}

/// Where a ring lies.
pub fn ring_config(ring: &Virtqueue, memory: &GuestMemory, packed: bool) -> Result<RingConfig> {
    let at = ring.vring_addr(0);
    let guest = |user, len| {
        memory
            .user_to_guest(user, len)
            .ok_or("the ring is not in guest memory")
    };
    Ok(RingConfig {
        size: ring.size(),
        desc_table: guest(at.desc, 16)?,
        avail_ring: guest(at.avail, 4)?,
        used_ring: guest(at.used, 4)?,
        event_idx: true,
        indirect: true,
        packed,
        base: ring.base(),
    })
}

/// Makes the file of a case; its path and format.
fn image(layer: Layer, dir: &TempDir) -> Result<(String, &'static str)> {
    let path = |name: &str| -> String { dir.join(name).display().to_string() };
    Ok(match layer {
        Layer::Null => (format!("null:{}M", SIZE >> 20), "raw"),
        Layer::Raw => {
            let raw = path("raw");
            data(Path::new(&raw))?;
            (raw, "raw")
        }
        Layer::Mapped | Layer::Fresh => {
            // Mapped: the warm-up writes each cluster.
            let image = path("image");
            qemu::create(Path::new(&image), "qcow2", SIZE, "");
            (image, "qcow2")
        }
        Layer::Chain(images) => {
            let mut below = path("base");
            data(Path::new(&below))?;
            let mut format = "raw";
            for level in 0..images {
                let image = path(&format!("image-{level}"));
                qemu::create_overlay(Path::new(&image), SIZE, Path::new(&below), format, "");
                (below, format) = (image, "qcow2");
            }
            (below, format)
        }
    })
}

fn data(path: &Path) -> Result<()> {
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at >> 12) as u8 | 1).collect();
    Ok(std::fs::write(path, bytes)?)
}

fn open(file: &str, format: &str, plane: &Arc<Dataplane>) -> Result<BlkDevice> {
    // In the page cache nothing waits for a device, so that turns do not depend on one.
    let args = [
        "virtioblkd",
        "--socket-path",
        "unused",
        "--blk-file",
        file,
        "--format",
        format,
        "--cache",
        "writeback",
        "--num-queues",
        "1",
    ];
    let Invocation::Run(config) = cli::load_from(args, &Host::of_this_process())
        .map_err(|error| format!("the command line was refused: {error}"))?
    else {
        return Err("the command line asks for something else".into());
    };
    Ok(assembly::open_device(plane, &config.disks[0])?)
}

/// Gives a command to the worker from another thread, and turns it meanwhile.
fn meanwhile<T: Send>(
    worker: &mut HandWorker,
    command: impl FnOnce() -> T + Send,
) -> std::thread::Result<T> {
    std::thread::scope(|scope| {
        let asked = scope.spawn(command);
        while !asked.is_finished() {
            if !worker.turn() {
                // Valgrind runs one thread at a time, and does not let another go on while this one is in its ring.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        asked.join()
    })
}

fn drive_disk(case: DiskCase, requests: u64) -> Result<()> {
    let dir = TempDir::new();
    let (file, format) = image(case.layer, &dir)?;
    let (memory, mapped) = guest_memory()?;
    let (plane, mut worker) = Dataplane::by_hand(PollConfig {
        mode: PollMode::Always,
        max: Duration::ZERO,
    })?;
    let device = open(&file, format, &plane)?;
    let mut ring = Virtqueue::new(&memory, QUEUE_SIZE, false)?;
    ring.set_event_idx(true);
    ring.set_notify(Notify::Poll);
    let slots = SlotOptions {
        count: BATCH as u16,
        data_len: BLOCK,
        indirect: true,
        ..SlotOptions::default()
    };
    let features = device.features() & feature::LINUX;
    device.set_acked_features(features);
    let config = ring_config(&ring, &mapped, false)?;
    let mut queue = BlkQueue::new(&memory, ring, slots);

    // As QEMU has it: requests in flight and unwritten mappings are kept.
    let layout = InflightLayout {
        queues: 1,
        queue_size: QUEUE_SIZE,
    };
    let kept = SharedMemory::create(c"inflight", (layout.rest_at() + JOURNAL_BYTES) as u64)?;
    device.set_journal(layout.rest(&kept));
    let start = RingStart {
        memory: mapped,
        config,
        features,
        // Neither is needed: the worker is turned, and the driver looks.
        kick: None,
        call: None,
        err: None,
        enabled: true,
        inflight: layout.queue(&kept, 0),
        used_log: None,
    };
    meanwhile(&mut worker, || device.start_ring(0, start)).map_err(|_| "starting panicked")??;

    let mut load = Load {
        worker: &mut worker,
        queue: &mut queue,
    };
    let clusters = SIZE / CLUSTER;
    let order = |n: u64, of: u64| n.wrapping_mul(0x9e37_79b1) % of;
    let mut warm_up: Vec<u64> = Vec::new();
    if case.layer != Layer::Fresh {
        // All that can be cached is, and every cluster allocated if they are to be.
        warm_up.extend((0..clusters).map(|n| n * CLUSTER));
        load.run(
            case.layer == Layer::Mapped || case.write,
            &warm_up,
            HandWorker::turn,
        )?;
        let blocks = SIZE / u64::from(BLOCK);
        let counted: Vec<u64> = (0..requests)
            .map(|n| order(n, blocks) * u64::from(BLOCK))
            .collect();
        load.run(case.write, &counted, HandWorker::turn)?;
        load.run(case.write, &counted, counted_turn)?;
    } else {
        let half = clusters / 2;
        warm_up.extend((0..half).map(|n| n * CLUSTER));
        load.run(true, &warm_up, HandWorker::turn)?;
        let counted: Vec<u64> = (0..requests.min(half))
            .map(|n| (half + n) * CLUSTER)
            .collect();
        load.run(true, &counted, counted_turn)?;
    }

    meanwhile(&mut worker, || device.reset()).map_err(|_| "stopping panicked")?;
    Ok(())
}

/// The guest, and the worker that serves it.
struct Load<'a> {
    worker: &'a mut HandWorker,
    queue: &'a mut BlkQueue,
}

impl Load<'_> {
    /// One request at each of these offsets, [`BATCH`] at a time; a worker's turns are taken by `turn`.
    fn run(
        &mut self,
        write: bool,
        offsets: &[u64],
        turn: impl Fn(&mut HandWorker) -> bool,
    ) -> Result<()> {
        for batch in offsets.chunks(BATCH as usize) {
            for offset in batch {
                let (sector, len) = (offset / SECTOR, BLOCK);
                let op = match write {
                    true => Op::WriteInPlace { sector, len },
                    false => Op::Read { sector, len },
                };
                self.queue.submit(op, 0)?;
            }
            self.queue.ring.publish();
            let mut done = 0;
            while done < batch.len() {
                let busy = turn(self.worker);
                while let Some(completion) = self.queue.poll()? {
                    if completion.status != status::OK {
                        return Err(format!("a request failed: {completion:?}").into());
                    }
                    self.queue.release(completion);
                    done += 1;
                }
                if done < batch.len() {
                    if !busy {
                        self.worker.wait(PATIENCE);
                    }
                    std::thread::sleep(SETTLE);
                }
            }
        }
        Ok(())
    }
}
