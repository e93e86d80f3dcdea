//! Random requests whose right answers are known, and what the target may have executed for them.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use nvme_target::Execution;
use vhost_user_frontend::guest::Random;
use vhost_user_frontend::guest::model::{Kind, MAX_SEGMENTS, Model, Pending, Places, SECTOR};
use vhost_user_frontend::{BlkQueue, Completion, Device};

/// No request may be under way for so long: far beyond all timeouts that the cases have.
pub const HANG: Duration = Duration::from_secs(120);

/// NVM command set specification, section 3.
const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// A number in the environment.
pub fn number_in(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// The seed of a case, which is another one for each `VIRTIOBLKD_NVME_SEED`.
pub fn seed(case: u64) -> u64 {
    number_in("VIRTIOBLKD_NVME_SEED").map_or(case, |seed| seed * 1000 + case)
}

/// What the requests look like.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Sectors of the longest request.
    pub max_sectors: u64,
    /// Sectors that all requests are multiples of.
    pub align: u64,
    /// Sectors that requests like to sit around.
    pub grain: u64,
}

/// A driver's requests on a disk.
pub struct Load {
    shape: Shape,
    places: Places,
    name: String,
    pub random: Random,
    pub model: Model,
    pending: HashMap<u64, Pending>,
    /// All that may change blocks, in the order of submission.
    changes: Vec<Pending>,
    pub submitted: u64,
    pub completed: u64,
    max_segments: usize,
    last: Instant,
}

impl Load {
    pub fn new(name: &str, seed: u64, shape: Shape, model: Model) -> Self {
        println!("{name}: seed {seed}");
        Self {
            shape,
            places: Places {
                max_sectors: shape.max_sectors,
                align: shape.align,
                grain: shape.grain,
            },
            name: format!("{name}, seed {seed}"),
            random: Random::new(seed),
            model,
            pending: HashMap::new(),
            changes: Vec::new(),
            submitted: 0,
            completed: 0,
            max_segments: 1,
            last: Instant::now(),
        }
    }

    pub fn bytes(&self) -> u32 {
        self.shape.max_sectors as u32 * SECTOR as u32
    }

    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    fn what(&self) -> String {
        format!("{}, after {} requests", self.name, self.submitted)
    }

    fn pick(&mut self) -> Option<Pending> {
        let kind = match self.random.below(100) {
            0..=39 => Kind::Read,
            40..=82 => Kind::Write,
            83..=88 => Kind::Zero,
            89..=95 => Kind::Discard,
            _ => Kind::Flush,
        };
        let (places, model) = (&self.places, &mut self.model);
        let range = |random: &mut Random| places.pick(random, model);
        Pending::pick(kind, &mut self.random, self.max_segments, range)
    }

    fn submit(&mut self, queue: &mut BlkQueue) {
        let Some(request) = self.pick() else { return };
        let token = self.submitted;
        let data = request.data();
        queue.submit(request.op(&data), token).unwrap();
        if matches!(request.kind, Kind::Write | Kind::Zero | Kind::Discard) {
            self.changes.push(request);
        }
        self.pending.insert(token, request);
        self.submitted += 1;
    }

    fn complete(&mut self, queue: &mut BlkQueue, done: Completion) {
        let request = self.pending.remove(&done.token);
        let request =
            request.unwrap_or_else(|| panic!("{done:?} completes twice; {}", self.what()));
        let what = format!("{request:?}; {}", self.what());
        self.model.complete(queue, &request, done, &|| what.clone());
        self.completed += 1;
        self.last = Instant::now();
    }

    /// Submits what there is room for, up to `until` requests in all, and takes what has completed: how many.
    pub fn turn(&mut self, device: &mut Device, until: u64) -> u64 {
        let config = device.config();
        let offered = config.max_discard_seg.min(config.max_write_zeroes_seg);
        self.max_segments = (offered.max(1) as usize).min(MAX_SEGMENTS);
        let before = self.completed;
        for queue in device.queues_mut() {
            // Bursts of any length, so that batches of every size come about.
            for _ in 0..1 + self.random.below(8) {
                if self.submitted < until && queue.slots_taken() < usize::from(self.shape.depth) {
                    self.submit(queue);
                }
            }
            queue.ring.publish();
            while let Some(done) = queue.poll().unwrap() {
                self.complete(queue, done);
            }
        }
        let done = self.completed - before;
        if done == 0 {
            assert!(
                self.pending.is_empty() || self.last.elapsed() < HANG,
                "{} requests hang: {:?}; {}",
                self.pending.len(),
                self.pending,
                self.what()
            );
            std::thread::sleep(Duration::from_micros(100));
        }
        if self.pending.is_empty() {
            self.last = Instant::now();
        }
        done
    }

    /// Runs until `until` requests were submitted, and all are completed. `each` is called now and then.
    pub fn go(&mut self, device: &mut Device, until: u64, mut each: impl FnMut(&mut Self)) {
        while self.submitted < until || !self.pending.is_empty() {
            self.turn(device, until);
            each(self);
        }
        // Nothing comes that nobody waits for.
        for queue in device.queues_mut() {
            assert_eq!(queue.poll().unwrap(), None, "{}", self.what());
            assert_eq!(queue.slots_taken(), 0, "{}", self.what());
        }
    }

    /// Reads all of the disk; then no discarded sector is undecided any more.
    pub fn read_all(&mut self, device: &mut Device) {
        let (name, step) = (&self.name, self.shape.max_sectors);
        self.model.check_all(device, step, &|| name.clone());
    }

    /// Every command that changed blocks was a part of a request that was made, with that request's data, or of writes
    /// that were made one behind the other. `block` is the namespace's, in bytes. How many were executed more than once
    /// is returned.
    pub fn check_journal(&self, journal: &[Execution], block: usize) -> usize {
        let mut by_sector: Vec<Vec<u32>> = vec![Vec::new(); self.model.bytes.len() / SECTOR];
        for (index, change) in self.changes.iter().enumerate() {
            for sector in change.ranges().flatten() {
                by_sector[sector].push(index as u32);
            }
        }
        let mut written = Written {
            changes: &self.changes,
            by_sector: &by_sector,
            data: HashMap::new(),
        };
        let mut seen: HashMap<(u8, u64, u64, u32), usize> = HashMap::new();
        let per = (block / SECTOR) as u64;
        for e in journal
            .iter()
            .filter(|e| ![FLUSH, READ].contains(&e.opcode))
        {
            let (first, count) = (e.slba * per, e.blocks * per);
            let range = first as usize..(first + count) as usize;
            let within = |r: &Range<usize>| r.start <= range.start && range.end <= r.end;
            let made = by_sector[range.start].iter().any(|&index| {
                let change = &self.changes[index as usize];
                if e.opcode == WRITE {
                    return written.by(index, range.clone(), 0, e.crc);
                }
                if !change.ranges().any(|part| within(&part)) {
                    return false;
                }
                match (e.opcode, change.kind) {
                    (WRITE_ZEROES, Kind::Zero) | (DATASET_MANAGEMENT, Kind::Discard) => true,
                    // A discard may be done by zeroes, and zeroes may be deallocated where that reads as zeros.
                    (WRITE_ZEROES, Kind::Discard) | (DATASET_MANAGEMENT, Kind::Zero) => true,
                    _ => false,
                }
            });
            assert!(made, "nobody asked for {e:?}; {}", self.what());
            *seen.entry((e.opcode, e.slba, e.blocks, e.crc)).or_default() += 1;
        }
        let writes = seen.iter().filter(|((opcode, ..), _)| *opcode == WRITE);
        writes.filter(|(_, times)| **times > 1).count()
    }
}

/// Bytes of the longest write that requests are joined to.
const MOST_JOINED: usize = 128 << 10;
/// Requests that are joined were in flight together: no more changes than so many were made between them.
const NEAR: u32 = 512;

/// What writes may have come of the requests.
struct Written<'a> {
    changes: &'a [Pending],
    /// Those that change each sector.
    by_sector: &'a [Vec<u32>],
    data: HashMap<u32, Vec<u8>>,
}

impl Written<'_> {
    /// Whether a write of these sectors is what this request writes there and, where the request ends before them,
    /// what others write that begin where it ends and were made after it. `crc` is that of what comes before.
    fn by(&mut self, index: u32, range: Range<usize>, crc: u32, wanted: u32) -> bool {
        let change = &self.changes[index as usize];
        let own = change
            .ranges()
            .find(|own| own.contains(&range.start))
            .filter(|_| change.kind == Kind::Write);
        let Some(own) = own else { return false };
        let data = self.data.entry(index).or_insert_with(|| change.data());
        let end = own.end.min(range.end);
        let at = (range.start - own.start) * SECTOR..(end - own.start) * SECTOR;
        let crc = crc32c::crc32c_append(crc, &data[at]);
        if end == range.end {
            return crc == wanted;
        }
        let by_sector = self.by_sector;
        let next = |next: &&u32| {
            let starts_here = |own: Range<usize>| own.start == end;
            (index + 1..index + NEAR).contains(*next)
                && self.changes[**next as usize].ranges().any(starts_here)
        };
        let candidates: Vec<u32> = by_sector[end].iter().filter(next).copied().collect();
        range.len() * SECTOR <= MOST_JOINED
            && (candidates.into_iter()).any(|next| self.by(next, end..range.end, crc, wanted))
    }
}
