//! L1 and L2 tables (qcow2.rst, "Cluster mapping", "Extended L2 Entries").
//!
//! Snapshots share L2 tables. First every L1 table says how often each L2 table is pointed at; then each
//! L2 table is read once, in the order of the file, and counts that many times.

use super::{Checker, Fix, Progress, Scope, read_window, window};
use crate::block::error::Result;
use crate::block::qcow2::entry::{self, COMPRESSED, COPIED, OFFSET, ZERO};
use crate::block::qcow2::units::HostOffset;

pub(super) const L2_TABLE: &str = "L2 table";
/// Reserved bits of an L1 entry, and of an L2 entry that is not compressed.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Pointers that are gathered before they are sorted in.
const PENDING: usize = 1 << 18;
/// The lower half of a subcluster bitmap: allocated; the upper half: zeros.
const ALLOCATED: u64 = 0xffff_ffff;

/// How often an L2 table is pointed at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Times {
    /// By the active L1 table.
    active: u64,
    /// By all.
    all: u64,
}

/// The L2 tables that were pointed at.
#[derive(Debug, Default)]
pub(super) struct L2Tables {
    /// By offset, ascending.
    known: Vec<(u64, Times)>,
    pending: Vec<(u64, Times)>,
}

impl L2Tables {
    fn add(&mut self, offset: u64, times: u64, active: bool) {
        let active = if active { times } else { 0 };
        self.pending.push((offset, Times { active, all: times }));
        if self.pending.len() >= PENDING.max(self.known.len()) {
            self.sort();
        }
    }

    fn sort(&mut self) {
        self.known.append(&mut self.pending);
        self.known.sort_unstable_by_key(|(offset, _)| *offset);
        self.known.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1.active += next.1.active;
                kept.1.all += next.1.all;
            }
            same
        });
    }

    /// How often the table at `offset` is pointed at, once all are known.
    pub(super) fn times(&self, offset: u64) -> u64 {
        let found = self.known.binary_search_by_key(&offset, |(at, _)| *at);
        found.map_or(0, |index| self.known[index].1.all)
    }
}

/// Whether an entry's COPIED flag says what `count`, the refcount of what it points at, says.
pub(in super::super) fn is_copied_right(raw: u64, count: u64) -> bool {
    (raw & COPIED != 0) == (count == 1)
}

/// Host data of an L2 entry.
enum Points {
    Nowhere,
    Compressed(HostOffset, u64),
    Cluster(u64),
}

impl Checker<'_> {
    pub(super) async fn active_l1(&mut self) -> Result<()> {
        let (at, bytes) = (self.header.l1_offset.0, self.header.l1_entries * 8);
        if bytes > 0 {
            self.refer(at, bytes, 1, Some("L1 table"))?;
            self.l1_table(at, bytes, 1, true).await?;
        }
        Ok(())
    }

    /// Takes the L2 tables of an L1 table that is pointed at `times` times, and checks its entries.
    pub(super) async fn l1_table(
        &mut self,
        at: u64,
        bytes: u64,
        times: u64,
        active: bool,
    ) -> Result<()> {
        let table = self.read_words(at, bytes).await?;
        for (index, raw) in table.into_iter().enumerate() {
            if raw == 0 {
                continue;
            }
            let place = at + index as u64 * 8;
            let offset = raw & OFFSET;
            if raw & L1_RESERVED != 0 {
                let what = format!("L1 entry {index} ({raw:#x}) has reserved bits set");
                self.report.add(times, false, place, Fix::Never, what);
            }
            if !self.geometry.is_aligned(offset) {
                let what =
                    format!("the L2 table of L1 entry {index} at {offset:#x} is not aligned");
                self.report.add(times, false, place, Fix::Never, what);
            }
            self.l2.add(offset, times, active);
            if active && offset != 0 {
                self.copied(place, raw, offset, times, false).await?;
            }
        }
        Ok(())
    }

    /// Counts the L2 tables and what they point at.
    pub(super) async fn l2_tables(&mut self, progress: Progress<'_>) -> Result<()> {
        self.l2.sort();
        let size = self.geometry.cluster_size();
        let tables = std::mem::take(&mut self.l2.known);
        let mut done = 0;
        // One by one in the order of the file; those that are not there do not count.
        for window in tables.chunks(window(size)) {
            let mut places = Vec::with_capacity(window.len());
            let mut times = Vec::with_capacity(window.len());
            for &(offset, count) in window {
                // Also of a table that is only partly in the file what is there counts.
                if self.refer(offset, size, count.all, Some(L2_TABLE))? || offset < self.len {
                    places.push(offset);
                    times.push(count);
                }
            }
            self.charge(places.len() as u64 * size)?;
            let bufs = read_window(self.io, self.storage, &places, size).await?;
            let mut times = times.into_iter();
            for (first, buf) in &bufs {
                for (at, table) in (*first..)
                    .step_by(size as usize)
                    .zip(buf.chunks_exact(size as usize))
                {
                    self.l2_table(at, table, times.next().unwrap_or_default())
                        .await?;
                }
            }
            done += window.len();
            progress(done as f64 / tables.len() as f64);
        }
        self.l2.known = tables;
        Ok(())
    }

    async fn l2_table(&mut self, at: u64, table: &[u8], times: Times) -> Result<()> {
        let entry_bytes = 1 << self.geometry.entry_bits();
        let size = self.geometry.cluster_size();
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        let mut next = 0;
        for (index, bytes) in table.chunks_exact(entry_bytes).enumerate() {
            let (raw, bitmap) = (word(&bytes[..8]), bytes.get(8..).map_or(0, word));
            if raw | bitmap == 0 {
                continue;
            }
            let place = at + (index * entry_bytes) as u64;
            match self.l2_entry(place, raw, bitmap, times.all) {
                Points::Nowhere => {}
                Points::Compressed(offset, bytes) => {
                    self.refer(offset.0, bytes, times.all, None)?;
                    self.report.allocated += times.active;
                    self.report.compressed += times.active;
                    self.report.fragmented += times.active;
                }
                Points::Cluster(offset) => {
                    self.report.allocated += times.active;
                    if next != 0 && next != offset {
                        self.report.fragmented += times.active;
                    }
                    next = offset + size;
                    if self.header.data_file.is_none() {
                        self.refer(offset, size, times.all, None)?;
                    }
                    // As in QEMU, an L1 entry that leads to the header is no table to look for flags in.
                    if times.active > 0 && at != 0 {
                        let external = self.header.data_file.is_some();
                        self.copied(place, raw, offset, times.active, external)
                            .await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks one L2 entry by itself.
    fn l2_entry(&mut self, place: u64, raw: u64, bitmap: u64, times: u64) -> Points {
        let data_file = self.header.data_file.is_some();
        let geometry = self.geometry;
        let mut bad = |what: &str| {
            let what = format!("L2 entry {raw:#x} {what}");
            self.report.add(times, false, place, Fix::Never, what);
        };
        if raw & COMPRESSED != 0 {
            if raw & COPIED != 0 {
                bad("has both the COPIED and the compressed flag");
            }
            if data_file {
                bad("is compressed, in an image with an external data file");
                return Points::Nowhere;
            }
            if bitmap != 0 {
                bad("is compressed and has subclusters");
                return Points::Nowhere;
            }
            return match entry::decode(raw & !COPIED, &geometry) {
                entry::Entry::Compressed(data) => Points::Compressed(data.offset, data.bytes),
                _ => Points::Nowhere,
            };
        }
        if raw & L2_RESERVED != 0 {
            bad("has reserved bits set");
        }
        let zero = raw & ZERO != 0 && !geometry.extended_l2;
        if zero && self.header.version < 3 {
            bad("has the zero flag, which version 2 does not know");
        }
        let offset = raw & OFFSET;
        if offset == 0 && !(data_file && !zero && raw & COPIED != 0) {
            if raw & COPIED != 0 {
                bad("has the COPIED flag and no offset");
            }
            if bitmap & ALLOCATED != 0 {
                bad(&format!(
                    "has no offset, and allocated subclusters ({bitmap:#x})"
                ));
            }
            return Points::Nowhere;
        }
        if (bitmap >> 32) & bitmap & ALLOCATED != 0 {
            bad(&format!(
                "has subclusters that are allocated and zeros at once ({bitmap:#x})"
            ));
        }
        if !geometry.is_aligned(offset) {
            bad("points into the middle of a cluster");
        }
        Points::Cluster(offset)
    }

    /// The COPIED flag says whether the refcount is exactly one. Data in a file of its own counts as one.
    async fn copied(
        &mut self,
        place: u64,
        raw: u64,
        offset: u64,
        times: u64,
        external: bool,
    ) -> Result<()> {
        let count = match external {
            true => 1,
            false => self.refcount(offset >> self.geometry.cluster_bits).await?,
        };
        if self.scope != Scope::InUse && !is_copied_right(raw, count) {
            let flag = if count == 1 { "lacks" } else { "has" };
            let what = format!(
                "the entry {flag} the COPIED flag; its cluster at {offset:#x} has refcount {count}"
            );
            self.report.add(times, false, place, Fix::All, what);
        }
        Ok(())
    }
}
