//! Replaying a journal: checked as a whole first, then made true in memory, then flushed.

use std::collections::{BTreeMap, HashSet};

use super::super::Qcow2;
use super::super::below::Below;
use super::super::claim::Attempt;
use super::super::entry;
use super::super::extended;
use super::super::header::autoclear;
use super::super::record::SECTOR;
use super::super::runs::Run;
use super::super::units::{Geometry, GuestCluster, HostCluster, HostOffset};
use super::log::Room;
use super::memory::{Contents, Entry, Kept};
use super::step;
use crate::block::error::{Error, Result};
use crate::reactor::Io;

/// What the entries of one slice are going to be.
struct Patch {
    /// [`entry::BAD`] for those that stay.
    raw: Vec<u64>,
    /// Of extended entries.
    bitmaps: Vec<u64>,
}

impl Patch {
    fn new(g: &Geometry) -> Self {
        let entries = 1 << g.slice_bits();
        Self {
            raw: vec![entry::BAD; entries],
            bitmaps: vec![0; if g.extended_l2 { entries } else { 0 }],
        }
    }

    /// False: a bitmap where there can be none.
    fn set(&mut self, at: usize, raw: u64, bitmap: u64) -> bool {
        if let Some(to) = self.raw.get_mut(at) {
            *to = raw;
        }
        match self.bitmaps.get_mut(at) {
            Some(to) => *to = bitmap,
            None => return bitmap == 0,
        }
        true
    }

    fn get(&self, at: usize) -> Option<(u64, u64)> {
        let raw = self.raw.get(at).filter(|raw| **raw != entry::BAD)?;
        Some((*raw, self.bitmaps.get(at).copied().unwrap_or(0)))
    }

    /// Those that change: which, and raw entry and bitmap.
    fn all(&self) -> impl Iterator<Item = (u64, (u64, u64))> + '_ {
        (0..self.raw.len()).filter_map(|at| Some((at as u64, self.get(at)?)))
    }
}

/// What a journal comes to.
#[derive(Default)]
struct Outcome {
    /// L1 entries, by index.
    links: BTreeMap<u64, u64>,
    /// By slice, and by cluster in the slice.
    patches: BTreeMap<u64, Patch>,
    /// Incomplete clusters.
    records: BTreeMap<u64, Kept>,
}

impl Qcow2 {
    /// Makes true what a journal says, durably. Nothing has changed in the file if the journal turns out not to
    /// fit the image.
    pub(super) async fn replay<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        found: Contents,
    ) -> Result<()> {
        let marked = self.header.autoclear & autoclear::ARENAS != 0;
        if self.header.version >= 3 && !marked {
            return Err(self.foreign("its mark is gone"));
        }
        let counts = (found.entries.len(), found.records.len());
        let mut outcome = self.sum_up(found)?;
        self.check_links(io, &outcome.links).await?;
        for (index, raw) in std::mem::take(&mut outcome.links) {
            if self.tables.l1_raw(index) != raw {
                let table = HostOffset(entry::l1_offset(raw));
                self.tables.relink(index, table, true);
            }
        }
        let mut hosts = HashSet::new();
        for (slice, patch) in &outcome.patches {
            self.check_slice(*slice)?;
            for (at, pair) in patch.all() {
                let guest = self.tables.cluster_of(*slice, at);
                self.check_pair(io, guest, pair, &mut hosts).await?;
            }
        }
        let mut incomplete = Vec::new();
        for (_, record) in std::mem::take(&mut outcome.records) {
            if self.check_record(io, &outcome, &record, &mut hosts).await? {
                incomplete.push(record);
            }
        }
        step!("journal-replay-checked");
        for (slice, patch) in outcome.patches {
            self.apply(io, slice, patch).await?;
        }
        for record in &incomplete {
            self.complete_kept(io, below, record).await?;
        }
        step!("journal-replay-applied");
        self.flush(io, below).await?;
        step!("journal-replay-flushed");
        log::info!(
            "{}: the process before this one was killed; of its journal, {} entries and {} incomplete \
             clusters were replayed",
            self.header.path.display(),
            counts.0,
            counts.1
        );
        Ok(())
    }

    fn foreign(&self, what: impl std::fmt::Display) -> Error {
        self.not_replayed(&format!(
            "does not fit the image: {what}. Somebody else has written to the image meanwhile"
        ))
    }

    /// The last word about every entry.
    fn sum_up(&self, found: Contents) -> Result<Outcome> {
        let g = &self.tables.geometry;
        let tables = self.tables.l1_place().1;
        let end = tables << g.l2_bits();
        let mut outcome = Outcome::default();
        for record in found.records {
            if record.guest.0 >= end {
                return Err(self.foreign(format_args!("cluster {} of the disk", record.guest.0)));
            }
            if let Some(twice) = outcome.records.insert(record.guest.0, record) {
                return Err(self.foreign(format_args!("two records of {}", twice.guest.0)));
            }
        }
        for (number, entry) in (found.first..).zip(found.entries) {
            match entry {
                Entry::Link { index, raw } if index < tables => {
                    outcome.links.insert(index, raw);
                }
                Entry::Map {
                    guest,
                    count,
                    raw,
                    bitmap,
                    host_steps,
                } if guest.0 + count <= end => {
                    let all = guest.0..guest.0 + count;
                    for n in all.clone() {
                        let steps = if host_steps { n - guest.0 } else { 0 };
                        let raw = raw.wrapping_add(steps << g.cluster_bits);
                        let place = self.tables.place(GuestCluster(n));
                        let patch = outcome.patches.entry(place.slice);
                        let patch = patch.or_insert_with(|| Patch::new(g));
                        if !patch.set(place.at, raw, bitmap) {
                            return Err(self.foreign(format_args!("entry {number}")));
                        }
                    }
                    let records = outcome.records.range(all);
                    let over = records.filter(|(_, record)| record.since <= number);
                    let over: Vec<u64> = over.map(|(guest, _)| *guest).collect();
                    for guest in over {
                        outcome.records.remove(&guest);
                    }
                }
                _ => return Err(self.foreign(format_args!("entry {number}"))),
            }
        }
        Ok(outcome)
    }

    /// Fails unless a cluster has the references that it had.
    async fn check_host(&self, io: &Io, host: HostOffset, is_ours: bool) -> Result<()> {
        let cluster = self.tables.geometry.host_cluster(host);
        let alloc = self.allocator()?;
        let inside = self.tables.geometry.is_aligned(host.0)
            && host.0 < self.storage.len()
            && alloc.is_metadata(cluster, 1).is_none();
        if !inside {
            return Err(self.foreign(format_args!("cluster {:#x}", host.0)));
        }
        alloc.leaks().touch(Run::new(cluster.0, 1));
        let count = alloc.refcount(io, cluster).await?;
        if count == 0 || (is_ours && count != 1) {
            return Err(self.foreign(format_args!("cluster {:#x} has refcount {count}", host.0)));
        }
        Ok(())
    }

    /// Checks L2 tables, and keeps them from being taken for anything else.
    async fn check_links(&self, io: &Io, links: &BTreeMap<u64, u64>) -> Result<()> {
        let g = &self.tables.geometry;
        let alloc = self.allocator()?;
        for (index, raw) in links {
            let there = self.tables.l1_raw(*index);
            if there == *raw {
                continue;
            }
            let wrong = || self.foreign(format_args!("L1 entry {index} is {there:#x}"));
            let is_table = entry::l1_is_well_formed(*raw, g) && *raw & entry::COPIED != 0;
            if !is_table || !(there == 0 || entry::is_shared_table(there)) {
                return Err(wrong());
            }
            let table = HostOffset(entry::l1_offset(*raw));
            self.check_host(io, table, true).await?;
            let reserved = alloc.reserve_metadata(g.host_cluster(table), 1, "L2 table");
            reserved.map_err(|_| wrong())?;
        }
        Ok(())
    }

    fn check_slice(&self, slice: u64) -> Result<()> {
        let is_own = self.tables.shared_table(slice).is_none();
        match self.tables.slice_offset(slice).is_some() && is_own {
            true => Ok(()),
            false => Err(self.foreign(format_args!("slice {slice} has no table of its own"))),
        }
    }

    /// Checks what an entry is going to be.
    async fn check_pair(
        &self,
        io: &Io,
        guest: GuestCluster,
        (raw, bitmap): (u64, u64),
        hosts: &mut HashSet<HostCluster>,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let is_entry = (!g.extended_l2 || extended::is_well_formed(raw, bitmap, g))
            && !entry::is_compressed(raw)
            && self
                .tables
                .may_be(guest, raw, &self.storage, self.allocator()?);
        if !is_entry {
            return Err(self.foreign(format_args!("the entry {raw:#x} of cluster {}", guest.0)));
        }
        let host = HostOffset(raw & entry::OFFSET);
        if g.data_file || host.0 == 0 {
            return Ok(());
        }
        if !hosts.insert(g.host_cluster(host)) {
            return Err(self.foreign(format_args!("cluster {:#x} is used twice", host.0)));
        }
        self.check_host(io, host, raw & entry::COPIED != 0).await
    }

    /// Checks a record; false if its cluster is complete already.
    async fn check_record(
        &self,
        io: &Io,
        outcome: &Outcome,
        record: &Kept,
        hosts: &mut HashSet<HostCluster>,
    ) -> Result<bool> {
        let place = self.tables.place(record.guest);
        self.check_slice(place.slice)?;
        if record.host & !entry::OFFSET != 0 {
            let what = format_args!("a record of cluster {:#x}", record.host);
            return Err(self.foreign(what));
        }
        let new = entry::data(HostOffset(record.host));
        self.check_pair(io, record.guest, (new, 0), hosts).await?;
        let there = loop {
            if let Some(there) = self.tables.with(place.slice, |slice| slice.get(place.at)) {
                break there;
            }
            self.load(io, place.slice).await?;
        };
        let patch = outcome.patches.get(&place.slice);
        let noted = patch.and_then(|patch| patch.get(place.at));
        if noted.is_none() && there == new {
            return Ok(false);
        }
        if noted.map_or(there, |noted| noted.0) != record.old || self.tables.geometry.extended_l2 {
            let what = format_args!("cluster {} is {there:#x} now", record.guest.0);
            return Err(self.foreign(what));
        }
        Ok(true)
    }

    /// Publishes the entries of a slice.
    async fn apply(&self, io: &Io, slice: u64, patch: Patch) -> Result<()> {
        for (at, (raw, bitmap)) in patch.all() {
            let guest = self.tables.cluster_of(slice, at);
            self.publish_replayed(io, guest, raw, bitmap).await?;
        }
        if self.tables.is_crowded() {
            // In the order of any flush: what is in the file by then is replayed again, if need be.
            self.write_back(io).await?;
        }
        Ok(())
    }

    async fn publish_replayed(
        &self,
        io: &Io,
        guest: GuestCluster,
        raw: u64,
        bitmap: u64,
    ) -> Result<()> {
        let place = self.tables.place(guest);
        loop {
            match self.tables.try_claim(guest, 1, |_, _| true) {
                Attempt::Claimed(claim) => {
                    if claim.slice().look(place.at) != (raw, bitmap) {
                        let mut room = Room::none();
                        let noted = room.log().commit();
                        claim.slice().note_order(true);
                        claim.publish_pair(&noted, 0, raw, bitmap);
                        self.tables.mark_dirty(claim.slice(), true);
                    }
                    return Ok(());
                }
                Attempt::Missing => self.load(io, place.slice).await?,
                // Nobody else is here.
                Attempt::Busy | Attempt::Unwanted | Attempt::Shared => {
                    return Err(self.foreign(format_args!("slice {}", place.slice)));
                }
            }
        }
    }

    /// Copies what the guest has not written of an incomplete cluster, and publishes it. A sector that a write
    /// was under way to may have landed in the new cluster: all that is missing is written.
    async fn complete_kept<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        record: &Kept,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let end = self.fill_len(record.host, g.cluster_size());
        let base = record.guest.0 << g.cluster_bits;
        for (start, len) in missing(&record.written, g.cluster_size() / SECTOR) {
            let (start, len) = (
                start * SECTOR,
                (len * SECTOR).min(end.saturating_sub(start * SECTOR)),
            );
            if len == 0 {
                continue;
            }
            let mut buf = io.buf(len as usize);
            self.read_old(io, below, record.old, base + start, buf.sg())
                .await?;
            self.data.write(io, record.host + start, buf.sg()).await?;
            step!("journal-replay-copied");
        }
        let raw = entry::data(HostOffset(record.host));
        self.publish_replayed(io, record.guest, raw, 0).await
    }
}

/// Runs of sectors whose bits are not set: first and count.
fn missing(bits: &[u64], sectors: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let is_written = move |n: &u64| {
        let word = bits.get((n / 64) as usize);
        word.is_some_and(|word| word >> (n % 64) & 1 == 1)
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = (at..sectors).find(|n| !is_written(n))?;
        at = (first..sectors).find(is_written).unwrap_or(sectors);
        Some((first, at - first))
    })
}
