//! The disk as it must be, and the requests that change it.
#![allow(missing_docs)]

use vhost_user_frontend::Segment;

use crate::common::Random;

pub const SECTOR: usize = 512;
/// Ranges of one discard or write-zeroes request.
pub const MAX_SEGMENTS: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    Zero,
    #[allow(dead_code)] // The load of upgrades has none: it wants one right answer.
    Discard,
    Flush,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    pub kind: Kind,
    pub segments: [Segment; MAX_SEGMENTS],
    pub count: usize,
    /// What a write's data is made from.
    pub seed: u64,
}

impl Pending {
    pub fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.segments[..self.count].iter().map(|s| {
            let start = s.sector as usize;
            start..start + s.num_sectors as usize
        })
    }

    pub fn data(&self) -> Vec<u8> {
        Random::new(self.seed).bytes(self.segments[0].num_sectors as usize * SECTOR)
    }
}

/// The disk as it must be.
pub struct Model {
    pub bytes: Vec<u8>,
    /// Discarded since it was last written or read: it may have become zero, or not (the specification allows
    /// both), but nothing else.
    pub discarded: Vec<bool>,
    pub busy: Vec<bool>,
}

impl Model {
    pub fn new(bytes: Vec<u8>) -> Self {
        let sectors = bytes.len() / SECTOR;
        Self {
            bytes,
            discarded: vec![false; sectors],
            busy: vec![false; sectors],
        }
    }

    pub fn sectors(&self) -> u64 {
        self.busy.len() as u64
    }

    pub fn sector(&mut self, index: usize) -> &mut [u8] {
        &mut self.bytes[index * SECTOR..(index + 1) * SECTOR]
    }

    /// What was read must be what is there; a discarded sector is from now on what it was read as.
    pub fn check_read(&mut self, first: usize, got: &[u8], what: &dyn Fn() -> String) {
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

    pub fn apply(&mut self, request: &Pending) {
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
