//! What each sector may hold after a power loss, while several tasks write.
//!
//! Each sector has one task that writes to it, one request after another. So its contents go through
//! versions in an order, and a power loss may leave any of them from the one on that the last completed
//! flush covered.

use std::cell::RefCell;

use super::*;

pub(super) const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// As at the beginning.
    First,
    Zeros,
    Written(u64),
}

#[derive(Debug)]
struct Sector {
    versions: Vec<Version>,
    /// Index of the last version whose request has completed.
    completed: usize,
    /// Index of the oldest version that a power loss may leave.
    durable: usize,
}

/// The history of a disk.
#[derive(Debug)]
pub(super) struct History {
    first: Vec<u8>,
    sectors: RefCell<Vec<Sector>>,
}

/// What had completed when a flush began.
pub(super) struct FlushPoint(Vec<usize>);

impl History {
    pub(super) fn new(first: Vec<u8>) -> Self {
        let sectors = (0..first.len() / SECTOR)
            .map(|_| Sector {
                versions: vec![Version::First],
                completed: 0,
                durable: 0,
            })
            .collect();
        Self {
            first,
            sectors: RefCell::new(sectors),
        }
    }

    pub(super) fn begin(&self, first: u64, count: u64, version: Version) {
        for n in first..first + count {
            self.sectors.borrow_mut()[n as usize].versions.push(version);
        }
    }

    pub(super) fn complete(&self, first: u64, count: u64) {
        for n in first..first + count {
            let sector = &mut self.sectors.borrow_mut()[n as usize];
            sector.completed = sector.versions.len() - 1;
        }
    }

    pub(super) fn flush_begins(&self) -> FlushPoint {
        FlushPoint(self.sectors.borrow().iter().map(|s| s.completed).collect())
    }

    pub(super) fn flush_completed(&self, point: FlushPoint) {
        for (sector, completed) in self.sectors.borrow_mut().iter_mut().zip(point.0) {
            sector.durable = sector.durable.max(completed);
        }
    }

    pub(super) fn contents(&self, n: usize, version: Version) -> Vec<u8> {
        match version {
            Version::First => self.first[n * SECTOR..(n + 1) * SECTOR].to_vec(),
            Version::Zeros => vec![0; SECTOR],
            Version::Written(tag) => sector_bytes(n as u64, tag),
        }
    }

    fn check(&self, disk: &[u8], from: impl Fn(&Sector) -> usize, what: &str) {
        for (n, sector) in self.sectors.borrow().iter().enumerate() {
            let got = &disk[n * SECTOR..(n + 1) * SECTOR];
            let allowed = &sector.versions[from(sector)..];
            if !allowed.iter().any(|v| self.contents(n, *v) == got) {
                let is = sector
                    .versions
                    .iter()
                    .position(|v| self.contents(n, *v) == got);
                panic!(
                    "{what}: sector {n} holds {} and may hold {allowed:?}",
                    match is {
                        Some(at) => format!("version {at} of {:?}", sector.versions),
                        None => format!("what nobody wrote: {:02x?}", &got[..16]),
                    }
                );
            }
        }
    }

    /// Judges sectors that were read by a request which began at `point`.
    pub(super) fn check_read(&self, first: usize, got: &[u8], point: &FlushPoint, what: &str) {
        let sectors = self.sectors.borrow();
        for (at, got) in got.chunks(SECTOR).enumerate() {
            let n = first + at;
            let allowed = &sectors[n].versions[point.0[n]..];
            assert!(
                allowed.iter().any(|v| self.contents(n, *v) == got),
                "{what}: sector {n} was read as {:02x?} and may hold {allowed:?}",
                &got[..8]
            );
        }
    }

    /// Judges what a power loss has left.
    pub(super) fn check_crash(&self, disk: &[u8], what: &str) {
        self.check(disk, |s| s.durable, what);
    }

    /// Judges what can be read when nothing runs.
    pub(super) fn check_now(&self, disk: &[u8], what: &str) {
        self.check(disk, |s| s.completed, what);
    }
}

/// A sector's bytes: unlike any other's, and unlike its own at other times.
pub(super) fn sector_bytes(n: u64, tag: u64) -> Vec<u8> {
    noise(n << 32 ^ tag.wrapping_mul(0x1357), SECTOR)
}

pub(super) fn run_bytes(first: u64, count: u64, tag: u64) -> Vec<u8> {
    (first..first + count)
        .flat_map(|n| sector_bytes(n, tag))
        .collect()
}
