//! Random requests against a model in memory: what is read back is what was written, in every combination of
//! image, queues and depth; in the end the image is clean and has the model's contents.
//!
//! Requests in flight never overlap, so that there is one right answer; `overlapping_writes_…` and `overlap`
//! are the cases where they do.

#[path = "../common/mod.rs"]
mod common;
mod overlap;

use std::path::Path;

use common::{Rig, SOON, program};
use vhost_user_frontend as frontend;

use frontend::blk::status;
use frontend::guest::Random;
use frontend::guest::model::{Kind, MAX_SEGMENTS, Model, Pending, Places, SECTOR};
use frontend::{
    BlkQueue, Completion, Daemon, Device, DeviceOptions, Disk, Error, Op, SlotOptions, TempDir,
    qemu,
};

/// Sectors of the longest request.
const MAX_SECTORS: u64 = 128;

/// One combination.
struct Case {
    seed: u64,
    requests: u64,
    format: &'static str,
    /// `-o` options of the image.
    options: &'static str,
    size: u64,
    /// Sectors that requests like to sit around: a cluster, or a page of the host.
    grain: u64,
    backing: Option<Backing>,
    queues: u16,
    workers: u16,
    /// Requests in flight a queue.
    depth: u16,
    misalign: u32,
    segment_len: u32,
}

#[derive(Clone, Copy)]
struct Backing {
    format: &'static str,
    options: &'static str,
    size: u64,
}

const RAW: Case = Case {
    seed: 1,
    requests: 15_000,
    format: "raw",
    options: "",
    size: 16 << 20,
    grain: 8,
    backing: None,
    queues: 1,
    workers: 1,
    depth: 32,
    misalign: 0,
    segment_len: u32::MAX,
};

const QCOW2: Case = Case {
    format: "qcow2",
    size: 32 << 20,
    grain: 128,
    requests: 12_000,
    ..RAW
};

struct Run<'a> {
    case: &'a Case,
    random: Random,
    model: Model,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    submitted: u64,
    places: Places,
    max_segments: usize,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case, model: Model) -> Self {
        let slots = usize::from(case.depth) * usize::from(case.queues);
        Self {
            case,
            random: Random::new(case.seed),
            model,
            pending: vec![None; slots],
            free: (0..slots).collect(),
            submitted: 0,
            places: Places {
                max_sectors: MAX_SECTORS,
                align: 1,
                grain: case.grain,
            },
            max_segments: 1,
        }
    }

    fn pick(&mut self) -> Option<Pending> {
        let kind = match self.random.below(100) {
            0..=39 => Kind::Read,
            40..=84 => Kind::Write,
            85..=89 => Kind::Zero,
            90..=96 => Kind::Discard,
            _ => Kind::Flush,
        };
        let (places, model) = (&self.places, &mut self.model);
        let range = |random: &mut Random| places.pick(random, model);
        Pending::pick(kind, &mut self.random, self.max_segments, range)
    }

    fn submit(&mut self, queue: &mut BlkQueue) {
        let Some(request) = self.pick() else { return };
        let Some(token) = self.free.pop() else { return };
        let data = request.data();
        queue.submit(request.op(&data), token as u64).unwrap();
        self.pending[token] = Some(request);
        self.submitted += 1;
    }

    fn complete(&mut self, queue: &mut BlkQueue, done: Completion) {
        let token = done.token as usize;
        let request = self.pending[token].take().expect("completed once");
        let (seed, submitted) = (self.case.seed, self.submitted);
        let what = move || format!("seed {seed}, after {submitted}: {request:?}");
        self.model.complete(queue, &request, done, &what);
        self.free.push(token);
    }

    /// Runs until `until` requests were submitted, and all are completed.
    fn go(&mut self, device: &mut Device, until: u64) {
        let config = device.config();
        let offered = config.max_discard_seg.min(config.max_write_zeroes_seg);
        self.max_segments = (offered.max(1) as usize).min(MAX_SEGMENTS);
        let depth = usize::from(self.case.depth);
        let mut in_flight = vec![0usize; usize::from(self.case.queues)];
        loop {
            for (q, queue) in device.queues_mut().iter_mut().enumerate() {
                // Bursts of any length, so that batches of every size come about.
                let burst = 1 + self.random.below(8);
                for _ in 0..burst {
                    if self.submitted < until && queue.slots_taken() < depth {
                        self.submit(queue);
                    }
                }
                queue.ring.publish();
                in_flight[q] = queue.slots_taken();
            }
            let Some(q) = in_flight.iter().position(|n| *n > 0) else {
                if self.submitted >= until {
                    return;
                }
                continue;
            };
            let mut any = false;
            for queue in device.queues_mut() {
                while let Some(done) = queue.poll().unwrap() {
                    self.complete(queue, done);
                    any = true;
                }
            }
            let full = in_flight.iter().all(|n| *n >= depth) || self.submitted >= until;
            if !any && full {
                let queue = device.queue(q);
                let done = queue.wait(SOON).unwrap();
                self.complete(queue, done);
            }
        }
    }
}

fn options(case: &Case) -> DeviceOptions {
    DeviceOptions {
        queues: case.queues,
        queue_size: 256,
        slots: SlotOptions {
            count: case.depth,
            data_len: MAX_SECTORS as u32 * SECTOR as u32,
            misalign: case.misalign,
            segment_len: case.segment_len,
            indirect: case.segment_len != u32::MAX,
            data_region: None,
        },
        ..DeviceOptions::default()
    }
}

/// Makes the image (and what is below it), and returns what it reads as.
fn make_image(case: &Case, dir: &Path) -> Vec<u8> {
    let image = dir.join("disk");
    let mut contents = vec![0; case.size as usize];
    let Some(backing) = case.backing else {
        qemu::create(&image, case.format, case.size, case.options);
        return contents;
    };
    // The lower image: random in every other stretch of 40 KiB, zero between them.
    let mut random = Random::new(case.seed ^ 0xbac);
    for stretch in contents[..backing.size as usize]
        .chunks_mut(40 << 10)
        .step_by(2)
    {
        random.fill(stretch);
    }
    let raw = dir.join("base.raw");
    std::fs::write(&raw, &contents[..backing.size as usize]).unwrap();
    let base = dir.join("base");
    let mut args = vec!["convert", "-O", backing.format];
    if !backing.options.is_empty() {
        args.extend(["-o", backing.options]);
    }
    args.extend([raw.to_str().unwrap(), base.to_str().unwrap()]);
    qemu::img_ok(args);
    qemu::create_overlay(&image, case.size, &base, backing.format, case.options);
    contents
}

fn disk(case: &Case, dir: &Path) -> Disk {
    let mut disk = Disk::new(dir.join("disk"), case.format)
        .queues(case.queues)
        .workers(case.workers);
    if case.backing.is_some() {
        disk = disk.args(["--allow-path".as_ref(), dir.as_os_str()]);
    }
    disk
}

/// Stops the daemon as an operator does; the image must be clean then.
fn stop(rig: &mut Rig, device: &mut Device, format: &str) {
    device.shut_down().unwrap();
    rig.daemon.terminate();
    if format == "qcow2" {
        qemu::check_clean(&rig.image());
    }
}

/// Compares the image with `bytes` by QEMU's own reading of it.
fn assert_image_is(rig: &Rig, format: &str, bytes: &[u8]) {
    let dump = rig.dir.join("model");
    std::fs::write(&dump, bytes).unwrap();
    qemu::assert_equal(&rig.image(), format, &dump, "raw");
}

fn run(case: &Case) {
    let dir = TempDir::new();
    let model = Model::new(make_image(case, dir.path()));
    let disk = disk(case, dir.path());
    let mut rig = Rig::start(dir, disk);
    let mut run = Run::new(case, model);
    let mut device = rig.device_with(options(case));
    run.go(&mut device, case.requests / 2);

    // A stop and a new start, flushed or not.
    stop(&mut rig, &mut device, case.format);
    rig.daemon = Daemon::start(&program(), &rig.disk, rig.dir.path());
    let mut device = rig.device_with(options(case));
    run.go(&mut device, case.requests);

    let what = || format!("seed {}", case.seed);
    run.model.check_all(&mut device, MAX_SECTORS, &what);
    stop(&mut rig, &mut device, case.format);
    assert_image_is(&rig, case.format, &run.model.bytes);
}

#[test]
fn raw_one_queue() {
    run(&RAW);
}

#[test]
fn raw_four_queues_two_workers_odd_buffers() {
    run(&Case {
        seed: 2,
        queues: 4,
        workers: 2,
        depth: 16,
        misalign: 13,
        segment_len: 1536,
        ..RAW
    });
}

#[test]
fn qcow2_clusters_of_512_bytes() {
    run(&Case {
        seed: 3,
        options: "cluster_size=512",
        size: 4 << 20,
        grain: 1,
        ..QCOW2
    });
}

#[test]
fn qcow2_clusters_of_4_kib_version_2() {
    run(&Case {
        seed: 4,
        options: "cluster_size=4096,compat=0.10",
        size: (8 << 20) + 1536,
        grain: 8,
        depth: 64,
        ..QCOW2
    });
}

#[test]
fn qcow2_default_clusters_two_workers() {
    run(&Case {
        seed: 5,
        requests: 20_000,
        queues: 2,
        workers: 2,
        ..QCOW2
    });
}

#[test]
fn qcow2_small_clusters_four_queues_two_workers_in_one_place() {
    run(&Case {
        seed: 6,
        options: "cluster_size=8192",
        size: 2 << 20,
        grain: 16,
        queues: 4,
        workers: 2,
        depth: 8,
        ..QCOW2
    });
}

#[test]
fn qcow2_clusters_of_2_mib() {
    run(&Case {
        seed: 7,
        options: "cluster_size=2M",
        size: 48 << 20,
        grain: 4096,
        ..QCOW2
    });
}

#[test]
fn qcow2_over_a_raw_image_that_is_shorter() {
    run(&Case {
        seed: 8,
        backing: Some(Backing {
            format: "raw",
            options: "",
            size: (11 << 20) + 512,
        }),
        ..QCOW2
    });
}

#[test]
fn qcow2_over_qcow2_of_another_cluster_size_two_workers() {
    run(&Case {
        seed: 9,
        options: "cluster_size=16384",
        grain: 32,
        queues: 2,
        workers: 2,
        segment_len: 4096,
        backing: Some(Backing {
            format: "qcow2",
            options: "cluster_size=2M",
            size: 32 << 20,
        }),
        ..QCOW2
    });
}

#[test]
fn qcow2_depth_one() {
    run(&Case {
        seed: 10,
        requests: 6_000,
        depth: 1,
        backing: Some(Backing {
            format: "qcow2",
            options: "cluster_size=512",
            size: 6 << 20,
        }),
        ..QCOW2
    });
}

#[test]
fn qcow2_subclusters_over_qcow2_with_subclusters_two_workers() {
    run(&Case {
        seed: 14,
        options: "extended_l2=on,cluster_size=64k",
        size: (16 << 20) + 1536,
        grain: 4,
        queues: 2,
        workers: 2,
        backing: Some(Backing {
            format: "qcow2",
            options: "extended_l2=on,cluster_size=16k",
            size: 12 << 20,
        }),
        ..QCOW2
    });
}

#[test]
fn qcow2_subclusters_of_64_kib() {
    run(&Case {
        seed: 15,
        options: "extended_l2=on,cluster_size=2M",
        size: 48 << 20,
        grain: 128,
        ..QCOW2
    });
}

/// A write that was in flight together with others on the same sectors.
#[derive(Clone, Copy)]
struct Stamp {
    id: u64,
    submitted: u64,
    completed: u64,
}

/// Writes in flight overlap. In the end each sector, as a whole, holds a write that no later one had to
/// replace: none that was submitted after this one had completed.
#[test]
fn overlapping_writes_leave_one_of_them_in_each_sector() {
    const SECTORS: u64 = 4096;
    let rig = Rig::with("qcow2", SECTORS * 512, |d| d.queues(2).workers(2));
    let device_options = DeviceOptions {
        queues: 2,
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(device_options);
    let mut random = Random::new(11);
    let mut stamps: Vec<Vec<Stamp>> = vec![Vec::new(); SECTORS as usize];
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let (mut clock, mut done_count) = (0u64, 0u64);
    const WRITES: u64 = 10_000;
    while done_count < WRITES {
        std::thread::yield_now();
        for queue in device.queues_mut() {
            for _ in 0..1 + random.below(16) {
                let id = ranges.len() as u64;
                if id == WRITES {
                    break;
                }
                let len = 1 + random.below(40);
                let sector = random.below(SECTORS / 32).min(SECTORS - len);
                let mut data = vec![0; len as usize * SECTOR];
                for word in data.chunks_mut(8) {
                    word.copy_from_slice(&(id + 1).to_le_bytes());
                }
                match queue.submit(
                    Op::Write {
                        sector,
                        data: &data,
                    },
                    id,
                ) {
                    Ok(_) => {}
                    Err(Error::Full) => break,
                    Err(e) => panic!("{e}"),
                }
                clock += 1;
                ranges.push((sector, len));
                for s in sector..sector + len {
                    stamps[s as usize].push(Stamp {
                        id,
                        submitted: clock,
                        completed: u64::MAX,
                    });
                }
            }
            queue.ring.publish();
        }
        for queue in device.queues_mut() {
            while let Some(done) = queue.poll().unwrap() {
                assert_eq!(done.status, status::OK);
                queue.release(done);
                clock += 1;
                done_count += 1;
                let (sector, len) = ranges[done.token as usize];
                for s in sector..sector + len {
                    let stamps = &mut stamps[s as usize];
                    let at = stamps.iter().position(|x| x.id == done.token).unwrap();
                    stamps[at].completed = clock;
                    // Writes that were over before this one began cannot be seen any more.
                    let begun = stamps[at].submitted;
                    stamps.retain(|x| x.completed >= begun);
                }
            }
        }
    }
    for s in 0..SECTORS {
        let got = device.read(s, 512).unwrap();
        let stamp = u64::from_le_bytes(got[..8].try_into().unwrap());
        assert!(
            got.chunks(8).all(|word| word == &got[..8]),
            "sector {s} is torn"
        );
        let stamps = &stamps[s as usize];
        assert!(
            stamps.iter().any(|x| x.id + 1 == stamp) || (stamps.is_empty() && stamp == 0),
            "sector {s} holds write {stamp}, which was overwritten"
        );
    }
    device.shut_down().unwrap();
}
