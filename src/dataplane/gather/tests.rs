//! A ring on a simulated disk, its driver and its worker in one thread.

mod ends;
mod faults;
mod joins;
mod shown;
mod waits;

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use vhost_user_frontend as frontend;

use frontend::blk::status;
use frontend::guest::Random;
use frontend::protocol::feature;
use frontend::{BlkQueue, Completion, Memory, Notify, Op, RegionSpec, SlotOptions, Virtqueue};

use super::*;
use crate::block::sim::{Event, Sim, SimStorage};
use crate::block::{ActiveDisk, Storage};
use crate::dataplane::device::DeviceShared;
use crate::dataplane::mailbox::Start;
use crate::dataplane::queue::Queue;
use crate::dataplane::stats::RingStats;
use crate::reactor::{Epochs, Io, IoConfig};
use crate::shared_memory::SharedMemory;
use crate::virtio::blk::DeviceLimits;
use crate::virtio::dirty::DirtyLog;
use crate::virtio::inflight::InflightLayout;
use crate::virtio::memory::Region;
use crate::virtio::ring::RingConfig;

const KIB: u64 = 1 << 10;
const DISK: u64 = 4 << 20;
const GUEST: u64 = 32 << 20;
const QUEUE_SIZE: u16 = 256;
/// Data of a slot.
const SLOT: u32 = 64 << 10;

/// What outlives a daemon: the guest, what the VMM keeps, and the disk.
struct Rig {
    guest: BlkQueue,
    memory: Memory,
    mapped: Arc<GuestMemory>,
    storage: Arc<Storage>,
    kept: Arc<SharedMemory>,
    log: Option<Arc<DirtyLog>>,
    packed: bool,
    write_through: bool,
    next_token: u64,
}

/// A daemon's part of it.
struct Served {
    io: Io,
    queue: Rc<Queue>,
    stats: Arc<RingStats>,
}

impl Rig {
    fn new(sim: Sim) -> Self {
        Self::with(sim, false, u32::MAX)
    }

    fn with(sim: Sim, packed: bool, segment_len: u32) -> Self {
        let memory = Memory::new(&[RegionSpec::new(0, GUEST)]).unwrap();
        let mapped = map(&memory);
        let mut ring = Virtqueue::new(&memory, QUEUE_SIZE, packed).unwrap();
        ring.set_event_idx(true);
        ring.set_notify(Notify::Poll);
        let slots = SlotOptions {
            count: 128,
            data_len: SLOT,
            segment_len,
            indirect: true,
            ..SlotOptions::default()
        };
        let layout = layout();
        Self {
            guest: BlkQueue::new(&memory, ring, slots),
            memory,
            mapped,
            storage: Arc::new(Storage::Sim(SimStorage::new(pattern(), sim))),
            kept: SharedMemory::create(c"inflight", layout.rest_at() as u64).unwrap(),
            log: None,
            packed,
            write_through: false,
            next_token: 0,
        }
    }

    /// The guest's memory, mapped once more.
    fn map(&self) -> Arc<GuestMemory> {
        map(&self.memory)
    }

    fn serve(&self) -> Served {
        let io = Io::new(&IoConfig {
            worker: 1,
            entries: 64,
            epochs: Epochs::new(),
        })
        .unwrap();
        let limits = DeviceLimits {
            capacity_bytes: DISK,
            read_only: false,
            block_size: 512,
            max_discard_bytes: DISK,
            max_discard_segments: 1,
            discard_alignment: 512,
            max_write_zeroes_bytes: DISK,
            max_write_zeroes_segments: 1,
            write_zeroes_may_unmap: true,
        };
        let device = DeviceShared::made(limits);
        let through = &device.write_through;
        through.store(self.write_through, std::sync::atomic::Ordering::Relaxed);
        let at = self.guest.ring.vring_addr(0);
        let region = &self.memory.regions()[0];
        let guest = |user| user - region.user_addr(0);
        let config = RingConfig {
            size: QUEUE_SIZE,
            desc_table: guest(at.desc),
            avail_ring: guest(at.avail),
            used_ring: guest(at.used),
            event_idx: true,
            indirect: true,
            packed: self.packed,
            base: self.guest.ring.base(),
        };
        let stats = Arc::new(RingStats::default());
        let start = Start {
            device,
            disk: ActiveDisk::made(&self.storage),
            memory: self.mapped.clone(),
            config,
            features: feature::LINUX,
            kick: None,
            call: None,
            err: None,
            enabled: true,
            inflight: layout().queue(&self.kept, 0),
            log: self.log.clone(),
            used_log: None,
            stats: stats.clone(),
        };
        let queue = Queue::start((0, 0), &io, start).unwrap();
        Served { io, queue, stats }
    }

    fn sim(&self) -> &SimStorage {
        match &*self.storage {
            Storage::Sim(sim) => sim,
            _ => unreachable!(),
        }
    }

    /// Puts a request on the ring; the driver has not shown it yet. Its token: they count from 0.
    fn submit(&mut self, op: Op<'_>) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.guest.submit(op, token).unwrap();
        token
    }

    fn write(&mut self, offset: u64, len: u64) -> u64 {
        let data = data_of(offset, len);
        let sector = offset / 512;
        self.submit(Op::Write {
            sector,
            data: &data,
        })
    }

    fn read(&mut self, offset: u64, len: u64) -> u64 {
        let (sector, len) = (offset / 512, len as u32);
        self.submit(Op::Read { sector, len })
    }

    /// A write that ends where the next request may go on, so that the batch after it begins with a neighbour.
    fn write_before(&mut self, served: &Served, offset: u64) {
        self.write(offset - 4096, 4096);
        let done = self.run(served);
        assert_eq!(done.len(), 1);
        self.sim().take_events();
    }

    /// Shows the driver's requests and serves them all.
    fn run(&mut self, served: &Served) -> Vec<Completion> {
        self.guest.ring.publish();
        let mut done = Vec::new();
        let mut idle = 0;
        while idle < 64 {
            let busy = served.turn();
            let before = done.len();
            self.take(&mut done);
            let more = busy || done.len() > before;
            idle = if more { 0 } else { idle + 1 };
        }
        assert_eq!(served.queue.requests(), 0);
        done
    }

    /// What has been completed.
    fn take(&mut self, done: &mut Vec<Completion>) {
        while let Some(completion) = self.guest.poll().unwrap() {
            self.guest.release(completion);
            done.push(completion);
        }
    }

    /// The writes that the disk was asked for, as (KiB, KiB).
    fn writes(&self) -> Vec<(u64, u64)> {
        let events = self.sim().take_events();
        let writes = events.iter().filter_map(|event| match event {
            Event::Write { offset, len } => Some((offset / KIB, len / KIB)),
            _ => None,
        });
        writes.collect()
    }
}

impl Served {
    fn turn(&self) -> bool {
        let busy = self.queue.poll() | self.io.turn();
        busy | self.queue.publish()
    }

    /// As if the process had been killed: nothing of it ends in order.
    fn killed(self) {
        std::mem::forget((self.queue, self.io));
    }
}

fn map(memory: &Memory) -> Arc<GuestMemory> {
    let region = &memory.regions()[0];
    let spec = region.spec();
    let user = region.user_addr(spec.guest_addr);
    let file = region.file().unwrap();
    let mapped = Region::map(file, spec.mmap_offset, spec.guest_addr, user, spec.size);
    Arc::new(GuestMemory::new(vec![mapped.unwrap()]).unwrap())
}

fn layout() -> InflightLayout {
    InflightLayout {
        queues: 1,
        queue_size: QUEUE_SIZE,
    }
}

/// What the disk holds at first.
fn pattern() -> Vec<u8> {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN
        .get_or_init(|| Random::new(3).bytes(DISK as usize))
        .clone()
}

/// What a write to this range writes.
fn data_of(offset: u64, len: u64) -> Vec<u8> {
    (offset / 512..(offset + len) / 512)
        .flat_map(|sector| Random::new(sector ^ 0xabcd).bytes(512))
        .collect()
}

/// Tokens of those that ended with OK, and of the others.
fn judged(done: &[Completion]) -> (Vec<u64>, Vec<u64>) {
    let mut tokens = (Vec::new(), Vec::new());
    for completion in done {
        match completion.status {
            status::OK => tokens.0.push(completion.token),
            status::IOERR => tokens.1.push(completion.token),
            other => panic!("status {other}"),
        }
    }
    tokens.0.sort_unstable();
    tokens.1.sort_unstable();
    tokens
}
