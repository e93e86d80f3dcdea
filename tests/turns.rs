//! What a worker does in one turn, taken by hand: who gets a turn, and who must wait for the next one.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::Duration;

use vhost_user_frontend::blk::{SECTOR, status};
use vhost_user_frontend::protocol::feature;
use vhost_user_frontend::{BlkQueue, Memory, Notify, Op, RegionSpec, SlotOptions, Virtqueue};
use virtioblkd::assembly;
use virtioblkd::cli::{self, Invocation};
use virtioblkd::config::Host;
use virtioblkd::dataplane::device::{BlkDevice, RingStart};
use virtioblkd::dataplane::{Dataplane, HandWorker, PollConfig, PollMode};
use virtioblkd::virtio::memory::{GuestMemory, Region};
use virtioblkd::virtio::ring::RingConfig;

const SIZE: u64 = 16 << 20;
const BLOCK: u32 = 32 << 10;
const QUEUE_SIZE: u16 = 128;
const DEPTH: u16 = 32;

/// A worker in the hands of the test, and a device on `file` with two rings that are looked at in every turn.
struct Rig {
    worker: HandWorker,
    device: BlkDevice,
    queues: Vec<BlkQueue>,
    memory: Memory,
}

impl Rig {
    fn start(file: &File) -> Self {
        let memory = Memory::new(&[RegionSpec::new(0, 8 << 20)]).expect("memory");
        let region = &memory.regions()[0];
        let spec = region.spec();
        let mapped = Region::map(
            region.file().expect("a file"),
            spec.mmap_offset,
            spec.guest_addr,
            region.user_addr(spec.guest_addr),
            spec.size,
        );
        let mapped = GuestMemory::new(vec![mapped.expect("mapped")]);
        let mapped = Arc::new(mapped.expect("guest memory"));
        let poll = PollConfig {
            mode: PollMode::Always,
            max: Duration::ZERO,
        };
        let (plane, worker) = Dataplane::by_hand(poll).expect("io_uring");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let device = open(&path, &plane);
        let features = device.features() & feature::LINUX;
        device.set_acked_features(features);
        let mut rig = Self {
            worker,
            device,
            queues: Vec::new(),
            memory,
        };
        for index in 0..2 {
            rig.add_ring(index, &mapped, features);
        }
        rig
    }

    fn add_ring(&mut self, index: u16, mapped: &Arc<GuestMemory>, features: u64) {
        let mut ring = Virtqueue::new(&self.memory, QUEUE_SIZE, false).expect("a ring");
        ring.set_event_idx(true);
        ring.set_notify(Notify::Poll);
        let at = ring.vring_addr(u32::from(index));
        let guest = |user| mapped.user_to_guest(user, 16).expect("in guest memory");
        let start = RingStart {
            memory: mapped.clone(),
            config: RingConfig {
                size: QUEUE_SIZE,
                desc_table: guest(at.desc),
                avail_ring: guest(at.avail),
                used_ring: guest(at.used),
                event_idx: true,
                indirect: true,
                packed: false,
                base: ring.base(),
            },
            features,
            kick: None,
            call: None,
            err: None,
            enabled: true,
            inflight: None,
            used_log: None,
        };
        let slots = SlotOptions {
            count: DEPTH,
            data_len: BLOCK,
            ..SlotOptions::default()
        };
        self.queues.push(BlkQueue::new(&self.memory, ring, slots));
        self.meanwhile(|device| device.start_ring(index, start))
            .expect("the ring starts");
    }

    /// Gives a command from another thread, and turns the worker until it is answered.
    fn meanwhile<T: Send>(&mut self, command: impl FnOnce(&BlkDevice) -> T + Send) -> T {
        let (device, worker) = (&self.device, &mut self.worker);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| command(device));
            while !asked.is_finished() {
                worker.turn();
            }
            asked.join().expect("answered")
        })
    }

    /// Makes reads available in all of the rings, at places that are nobody's neighbours.
    fn submit_to_all(&mut self) {
        for queue in &mut self.queues {
            for n in 0..u64::from(DEPTH) {
                let sector = n * 7 % 32 * (SIZE / 32 / SECTOR);
                let len = BLOCK;
                queue.submit(Op::Read { sector, len }, n).expect("a slot");
            }
            queue.ring.publish();
        }
    }

    /// By ring: how many completions the driver finds that it has not found before.
    fn shown(&mut self) -> Vec<u16> {
        let count = |queue: &mut BlkQueue| {
            let mut count = 0;
            while let Some(completion) = queue.poll().expect("a used ring in order") {
                assert_eq!(
                    (completion.status, completion.used_len),
                    (status::OK, BLOCK + 1)
                );
                queue.release(completion);
                count += 1;
            }
            count
        };
        self.queues.iter_mut().map(count).collect()
    }
}

impl Drop for Rig {
    /// A ring that runs is stopped by its worker, which has to be turned for it.
    fn drop(&mut self) {
        self.meanwhile(BlkDevice::reset);
    }
}

fn open(path: &str, plane: &Arc<Dataplane>) -> BlkDevice {
    let args = [
        "virtioblkd",
        "--socket-path",
        "unused",
        "--blk-file",
        path,
        "--format",
        "raw",
        "--cache",
        "writeback",
        "--num-queues",
        "2",
    ];
    let Ok(Invocation::Run(config)) = cli::load_from(args, &Host::of_this_process()) else {
        panic!("the command line was refused");
    };
    assembly::open_device(plane, &config.disks[0]).expect("the disk opens")
}

/// A file in memory, whose transfers the worker makes itself as it begins them.
fn inmemory() -> File {
    // SAFETY: the name is a string; a new descriptor is ours alone.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), 0)) };
    file.set_len(SIZE).expect("room");
    file
}

#[test]
fn a_ring_whose_requests_end_as_they_begin_shows_them_and_lets_the_next_ring_have_its_turn() {
    let file = inmemory();
    let mut rig = Rig::start(&file);
    rig.submit_to_all();
    rig.worker.turn();
    // A share is 64 KiB: two of these requests, and each ring has had one.
    let first = rig.shown();
    assert!(
        first.iter().all(|shown| (1..=3).contains(shown)),
        "{first:?}"
    );
    // The rest follows turn by turn, and no ring falls behind the other.
    let mut all = first;
    while all.iter().any(|count| *count < DEPTH) {
        assert!(rig.worker.turn(), "{all:?}: nothing is done any more");
        for (all, shown) in all.iter_mut().zip(rig.shown()) {
            assert!(shown <= 3, "{shown} at one go");
            *all += shown;
        }
        assert!(all[0].abs_diff(all[1]) <= 3, "{all:?}");
    }
    assert_eq!(all, [DEPTH; 2]);
}
