//! The disk as it must be, and the requests that change it.

use super::Random;
use crate::blk::{Segment, status};
use crate::blk_queue::{BlkQueue, Completion, Op};
use crate::device::Device;

/// Bytes.
pub const SECTOR: usize = 512;
/// Ranges of one discard or write-zeroes request.
pub const MAX_SEGMENTS: usize = 4;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Writes zeroes.
    Zero,
    /// Discards: see [`Model::discarded`].
    Discard,
    /// Flushes.
    Flush,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// What it does.
    pub kind: Kind,
    /// Its ranges, of which the first `count` are meant.
    pub segments: [Segment; MAX_SEGMENTS],
    /// How many ranges it has.
    pub count: usize,
    /// What a write's data is made from.
    pub seed: u64,
}

impl Pending {
    /// A request of this kind on ranges that `range` takes for it, at most `max_segments` where it may have several.
    /// None: there is no range for it.
    pub fn pick(
        kind: Kind,
        random: &mut Random,
        max_segments: usize,
        mut range: impl FnMut(&mut Random) -> Option<Segment>,
    ) -> Option<Self> {
        let wanted = match kind {
            Kind::Flush => 0,
            Kind::Read | Kind::Write => 1,
            Kind::Zero | Kind::Discard => 1 + random.below(max_segments as u64) as usize,
        };
        let mut request = Self {
            kind,
            segments: [Segment::new(0, 0); MAX_SEGMENTS],
            count: 0,
            seed: random.next(),
        };
        for _ in 0..wanted {
            if let Some(mut segment) = range(random) {
                if kind == Kind::Zero && random.below(2) == 0 {
                    segment = segment.unmap();
                }
                request.segments[request.count] = segment;
                request.count += 1;
            }
        }
        (kind == Kind::Flush || request.count > 0).then_some(request)
    }

    /// The driver's operation; `data` is [`Pending::data`].
    pub fn op<'a>(&'a self, data: &'a [u8]) -> Op<'a> {
        let segments = &self.segments[..self.count];
        match self.kind {
            Kind::Read => Op::Read {
                sector: segments[0].sector,
                len: self.read_len(),
            },
            Kind::Write => Op::Write {
                sector: segments[0].sector,
                data,
            },
            Kind::Zero => Op::WriteZeroes(segments),
            Kind::Discard => Op::Discard(segments),
            Kind::Flush => Op::Flush,
        }
    }

    /// Bytes that it reads.
    fn read_len(&self) -> u32 {
        match self.kind {
            Kind::Read => self.segments[0].num_sectors * SECTOR as u32,
            _ => 0,
        }
    }

    /// Its ranges, in sectors.
    pub fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.segments[..self.count].iter().map(|s| {
            let start = s.sector as usize;
            start..start + s.num_sectors as usize
        })
    }

    /// What a write writes; of others nothing.
    pub fn data(&self) -> Vec<u8> {
        if self.kind != Kind::Write {
            return Vec::new();
        }
        Random::new(self.seed).bytes(self.segments[0].num_sectors as usize * SECTOR)
    }
}

/// Where requests like to be: around multiples of a grain, and half of the time in a small part of the disk, where they
/// meet often; and a third of them right behind the last one.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Sectors of the longest request.
    pub max_sectors: u64,
    /// Sectors that all requests are multiples of.
    pub align: u64,
    /// Sectors that requests like to sit around: a cluster, or a page of the host.
    pub grain: u64,
}

impl Places {
    /// Takes a range that nobody uses.
    pub fn pick(&self, random: &mut Random, model: &mut Model) -> Option<Segment> {
        let Self {
            max_sectors,
            align,
            grain,
        } = *self;
        let sectors = model.sectors();
        let len = match random.below(8) {
            0 => 1 + random.below(max_sectors),
            1 => grain.min(max_sectors),
            _ => 1 + random.below(12),
        };
        let span = match random.below(2) {
            0 => sectors / 16,
            _ => sectors,
        };
        let mut sector = random.below(span);
        match random.below(4) {
            0 => sector = sector / grain * grain,
            1 => {
                sector = (sector / grain + 1) * grain;
                sector = sector.saturating_sub(1 + random.below(len.min(4)));
            }
            _ => {}
        }
        if random.below(3) == 0 {
            sector = model.next;
        }
        let sector = sector.min(sectors - align) / align * align;
        let len = len.next_multiple_of(align).min(max_sectors);
        model.take(sector, len.min(sectors - sector))
    }
}

/// The disk as it must be.
#[derive(Debug)]
pub struct Model {
    /// What it reads as.
    pub bytes: Vec<u8>,
    /// Discarded since it was last written or read: it may have become zero, or not (the specification allows
    /// both), but nothing else.
    pub discarded: Vec<bool>,
    /// Sectors that requests in flight use: no other does, so that there is one right answer.
    pub busy: Vec<bool>,
    /// Where the range ended that was taken last.
    next: u64,
}

impl Model {
    /// A disk that holds `bytes`, whole sectors.
    pub fn new(bytes: Vec<u8>) -> Self {
        let sectors = bytes.len() / SECTOR;
        Self {
            bytes,
            discarded: vec![false; sectors],
            busy: vec![false; sectors],
            next: 0,
        }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.busy.len() as u64
    }

    /// Takes these sectors for a request, if nobody uses them.
    pub fn take(&mut self, sector: u64, sectors: u64) -> Option<Segment> {
        let range = sector as usize..(sector + sectors) as usize;
        if self.busy[range.clone()].iter().any(|busy| *busy) {
            return None;
        }
        self.next = range.end as u64;
        self.busy[range].fill(true);
        Some(Segment::new(sector, sectors as u32))
    }

    /// Nobody uses the sectors of this request any more.
    pub fn give_back(&mut self, request: &Pending) {
        for range in request.ranges() {
            self.busy[range].fill(false);
        }
    }

    /// A request has completed as it must, and the disk is what it has made of it. `what` is for messages.
    pub fn complete(
        &mut self,
        queue: &mut BlkQueue,
        request: &Pending,
        done: Completion,
        what: &dyn Fn() -> String,
    ) {
        assert_eq!(done.status, status::OK, "{}", what());
        let read = request.read_len();
        assert_eq!(done.used_len, read + 1, "{}", what());
        if request.kind == Kind::Read {
            let mut got = vec![0; read as usize];
            queue.copy_data(done.slot, &mut got);
            self.check_read(request.segments[0].sector as usize, &got, what);
        }
        self.apply(request);
        self.give_back(request);
        queue.release(done);
    }

    /// Reads all of the disk, in steps; then no discarded sector is undecided any more.
    pub fn check_all(&mut self, device: &mut Device, step_sectors: u64, what: &dyn Fn() -> String) {
        let sectors = self.sectors();
        for first in (0..sectors).step_by(step_sectors as usize) {
            let len = step_sectors.min(sectors - first) as u32 * SECTOR as u32;
            let got = device.read(first, len);
            let got = got.unwrap_or_else(|error| panic!("{error}; at the end; {}", what()));
            self.check_read(first as usize, &got, &|| format!("at the end; {}", what()));
        }
    }

    fn sector(&mut self, index: usize) -> &mut [u8] {
        &mut self.bytes[index * SECTOR..(index + 1) * SECTOR]
    }

    /// What was read must be what is there; a discarded sector is from now on what it was read as.
    fn check_read(&mut self, first: usize, got: &[u8], what: &dyn Fn() -> String) {
        for (i, got) in got.chunks(SECTOR).enumerate() {
            let index = first + i;
            if self.sector(index) == got {
                self.discarded[index] = false;
            } else if self.discarded[index] && got.iter().all(|b| *b == 0) {
                self.sector(index).fill(0);
                self.discarded[index] = false;
            } else {
                let want = self.sector(index)[..16].to_vec();
                panic!(
                    "sector {index} (discarded: {}): read {:02x?}, wanted {want:02x?}; {}",
                    self.discarded[index],
                    &got[..16],
                    what()
                );
            }
        }
    }

    fn apply(&mut self, request: &Pending) {
        for range in request.ranges() {
            match request.kind {
                Kind::Write => {
                    let data = request.data();
                    self.bytes[range.start * SECTOR..range.end * SECTOR].copy_from_slice(&data);
                    self.discarded[range].fill(false);
                }
                Kind::Zero => {
                    self.bytes[range.start * SECTOR..range.end * SECTOR].fill(0);
                    self.discarded[range].fill(false);
                }
                Kind::Discard => self.discarded[range].fill(true),
                Kind::Read | Kind::Flush => {}
            }
        }
    }
}
