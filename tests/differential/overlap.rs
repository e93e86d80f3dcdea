//! Requests in flight that overlap: four queues, two workers, one image. There is no one right answer while
//! they run. When all have ended each sector, as a whole, holds what one of them left that no later one had
//! to replace, and that does not change any more.

use std::time::{Duration, Instant};

use crate::common::{Rig, SOON};
use crate::frontend::blk::status;
use crate::frontend::guest::Random;
use crate::frontend::guest::model::SECTOR;
use crate::frontend::{BlkQueue, Completion, Daemon, Device, Error, Op, Segment, TempDir};
use crate::{Backing, Case, MAX_SECTORS, QCOW2, disk, make_image, options, program, stop};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Write,
    Zero,
    Discard,
    Flush,
    Read,
}

/// A request, by number.
#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    first: u64,
    count: u64,
}

/// A change that a sector may show.
#[derive(Clone, Copy, Debug)]
struct Change {
    id: usize,
    kind: Kind,
    /// By a clock that goes on with every request that begins or ends.
    began: u64,
    ended: u64,
}

/// What a sector may hold.
#[derive(Clone, Default)]
struct Sector {
    /// What it held when nothing ran last may still be there.
    rest: bool,
    changes: Vec<Change>,
}

impl Sector {
    /// A change has ended: what had ended before it began can not be seen any more. Discards replace
    /// nothing: they may do nothing.
    fn ended(&mut self, id: usize, clock: u64) {
        let Some(change) = self.changes.iter_mut().find(|change| change.id == id) else {
            return;
        };
        change.ended = clock;
        let change = *change;
        if change.kind != Kind::Discard {
            self.rest = false;
            self.changes.retain(|other| other.ended >= change.began);
        }
    }

    fn may_hold(&self, got: &[u8], rest: &[u8]) -> bool {
        let stamp = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| got[n]));
        let whole = got.chunks(8).all(|word| word == &got[..8]);
        self.rest && got == rest
            || whole
                && self.changes.iter().any(|change| match change.kind {
                    Kind::Write => stamp == change.id as u64 + 1,
                    _ => stamp == 0,
                })
    }
}

struct Overlap<'a> {
    case: &'a Case,
    random: Random,
    /// What the disk held when nothing ran last.
    bytes: Vec<u8>,
    sectors: Vec<Sector>,
    requests: Vec<Request>,
    ended: usize,
    clock: u64,
}

impl Overlap<'_> {
    /// Mostly in one small place, where they meet.
    fn pick(&mut self) -> Request {
        let sectors = self.sectors.len() as u64;
        let r = &mut self.random;
        let kind = match r.below(100) {
            0..=54 => Kind::Write,
            55..=66 => Kind::Zero,
            67..=80 => Kind::Discard,
            81..=87 => Kind::Flush,
            _ => Kind::Read,
        };
        let span = match r.below(4) {
            0 => sectors,
            _ => 4 * self.case.grain.max(32),
        };
        let mut count = 1 + r.below(MAX_SECTORS.min(3 * self.case.grain.max(8)));
        let mut first = r.below(span.min(sectors));
        if r.below(3) == 0 {
            // Whole clusters: such zeros and discards change mappings.
            first -= first % self.case.grain;
            count = count.next_multiple_of(self.case.grain).min(MAX_SECTORS);
        }
        let count = count.min(sectors - first);
        Request { kind, first, count }
    }

    fn submit(&mut self, queue: &mut BlkQueue) {
        let request = self.pick();
        let Request { kind, first, count } = request;
        let id = self.requests.len();
        let segment = Segment::new(first, count as u32);
        let segments = [match kind {
            Kind::Zero if self.random.below(2) == 0 => segment.unmap(),
            _ => segment,
        }];
        let mut data = vec![0; count as usize * SECTOR];
        for word in data.chunks_mut(8) {
            word.copy_from_slice(&(id as u64 + 1).to_le_bytes());
        }
        let op = match kind {
            Kind::Write => Op::Write {
                sector: first,
                data: &data,
            },
            Kind::Zero => Op::WriteZeroes(&segments),
            Kind::Discard => Op::Discard(&segments),
            Kind::Flush => Op::Flush,
            Kind::Read => Op::Read {
                sector: first,
                len: data.len() as u32,
            },
        };
        match queue.submit(op, id as u64) {
            Ok(_) => {}
            Err(Error::Full) => return,
            Err(error) => panic!("{error}"),
        }
        self.requests.push(request);
        self.clock += 1;
        if matches!(kind, Kind::Flush | Kind::Read) {
            return;
        }
        for sector in &mut self.sectors[first as usize..(first + count) as usize] {
            sector.changes.push(Change {
                id,
                kind,
                began: self.clock,
                ended: u64::MAX,
            });
        }
    }

    fn complete(&mut self, queue: &mut BlkQueue, done: Completion) {
        let id = done.token as usize;
        let Request { kind, first, count } = self.requests[id];
        assert_eq!(done.status, status::OK, "seed {}: {kind:?}", self.case.seed);
        queue.release(done);
        self.clock += 1;
        self.ended += 1;
        if !matches!(kind, Kind::Flush | Kind::Read) {
            for sector in &mut self.sectors[first as usize..(first + count) as usize] {
                sector.ended(id, self.clock);
            }
        }
    }

    /// Runs `count` requests, and waits until all have ended.
    fn go(&mut self, device: &mut Device, count: usize) {
        let until = self.requests.len() + count;
        while self.ended < until {
            let mut any = false;
            for queue in device.queues_mut() {
                for _ in 0..1 + self.random.below(16) {
                    let room = queue.slots_taken() < usize::from(self.case.depth);
                    if room && self.requests.len() < until {
                        self.submit(queue);
                    }
                }
                queue.ring.publish();
                while let Some(done) = queue.poll().unwrap() {
                    self.complete(queue, done);
                    any = true;
                }
            }
            let busy = device.queues_mut().iter_mut().find(|q| q.slots_taken() > 0);
            if let (false, Some(queue)) = (any, busy) {
                let done = queue.wait(SOON).unwrap();
                self.complete(queue, done);
            }
        }
    }

    fn read(&self, device: &mut Device) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.bytes.len());
        for first in (0..self.sectors.len()).step_by(MAX_SECTORS as usize) {
            let count = (self.sectors.len() - first).min(MAX_SECTORS as usize);
            let len = (count * SECTOR) as u32;
            all.extend(device.read(first as u64, len).unwrap());
        }
        all
    }

    /// Nothing runs: what there is must be one of what may be, and stay.
    fn judge(&mut self, device: &mut Device) {
        let seed = self.case.seed;
        let now = self.read(device);
        let before = self.bytes.chunks(SECTOR);
        for (n, (got, rest)) in now.chunks(SECTOR).zip(before).enumerate() {
            let sector = &self.sectors[n];
            assert!(
                sector.may_hold(got, rest),
                "seed {seed}, sector {n}: {:02x?}; at rest: {}, {:?}",
                &got[..16],
                sector.rest,
                sector.changes
            );
        }
        assert!(self.read(device) == now, "seed {seed}: it changes");
        self.settle(now);
    }

    fn settle(&mut self, bytes: Vec<u8>) {
        self.bytes = bytes;
        self.sectors.fill(Sector {
            rest: true,
            changes: Vec::new(),
        });
    }
}

/// Requests between two looks at the whole disk.
const ROUND: usize = 3000;
/// Rounds of a test, unless the environment says for how long.
const ROUNDS: usize = 4;

/// `VIRTIOBLKD_OVERLAP_SECONDS`: for so long each test goes on.
fn until() -> Option<Instant> {
    let text = std::env::var("VIRTIOBLKD_OVERLAP_SECONDS").ok()?;
    let seconds = text
        .parse()
        .expect("VIRTIOBLKD_OVERLAP_SECONDS is a number");
    Some(Instant::now() + Duration::from_secs(seconds))
}

fn run(case: &Case) {
    let dir = TempDir::new();
    let bytes = make_image(case, dir.path());
    let mut overlap = Overlap {
        case,
        random: Random::new(case.seed),
        sectors: vec![Sector::default(); bytes.len() / SECTOR],
        bytes: Vec::new(),
        requests: Vec::new(),
        ended: 0,
        clock: 0,
    };
    overlap.settle(bytes);
    let disk = disk(case, dir.path());
    let mut rig = Rig::start(dir, disk);
    let (until, mut rounds) = (until(), 0);
    loop {
        let mut device = rig.device_with(options(case));
        // Half of the rounds go on with what is in memory, half with what a stop left in the file.
        for _ in 0..2 {
            overlap.go(&mut device, ROUND);
            overlap.judge(&mut device);
            rounds += 1;
        }
        stop(&mut rig, &mut device, case.format);
        let over = match until {
            Some(until) => Instant::now() >= until,
            None => rounds >= ROUNDS,
        };
        if over {
            break;
        }
        rig.daemon = Daemon::start(&program(), &rig.disk, rig.dir.path());
    }
    crate::assert_image_is(&rig, case.format, &overlap.bytes);
    println!("{} requests in {rounds} rounds", overlap.requests.len());
}

const FOUR: Case = Case {
    queues: 4,
    workers: 2,
    depth: 16,
    size: 8 << 20,
    ..QCOW2
};

#[test]
fn overlapping_requests_on_four_queues_leave_one_of_them_in_each_sector() {
    run(&Case { seed: 21, ..FOUR });
}

#[test]
fn overlapping_requests_on_four_queues_over_a_base() {
    run(&Case {
        seed: 22,
        options: "cluster_size=4096",
        grain: 8,
        backing: Some(Backing {
            format: "qcow2",
            options: "cluster_size=65536",
            size: 5 << 20,
        }),
        ..FOUR
    });
}

#[test]
fn overlapping_requests_on_four_queues_in_clusters_of_512_bytes() {
    run(&Case {
        seed: 23,
        options: "cluster_size=512",
        grain: 1,
        size: 2 << 20,
        ..FOUR
    });
}

#[test]
fn overlapping_requests_on_four_queues_of_a_version_2_image() {
    run(&Case {
        seed: 24,
        options: "cluster_size=8192,compat=0.10",
        grain: 16,
        backing: Some(Backing {
            format: "raw",
            options: "",
            size: (3 << 20) + 512,
        }),
        ..FOUR
    });
}
