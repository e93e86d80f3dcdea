//! Copy-on-write that is put off: writing to incomplete clusters, and reading them.
//!
//! A partial write to a cluster whose old content must stay around it goes to a new cluster at once; the
//! entry becomes the marker of a record ([`super::record`]) *before* the data is written, so that the next
//! writers to the cluster need not wait for the first. Each sector shows the old content until its write is
//! complete. When the guest has written the whole cluster, the new mapping is published and nothing was
//! ever copied; what is missing is filled in later (`fill`).
//!
//! The file has the old mapping all the while, and the old cluster is untouched: a power loss undoes what was
//! not flushed, sector by sector, and leaks the new cluster.
//!
//! Writes that are not made of whole sectors (the guest's are) complete the cluster first.

use super::Qcow2;
use super::below::Below;
use super::claim::{Attempt, Claim};
use super::entry::{self, Entry, decode};
use super::freed::Freed;
use super::fresh::Fresh;
use super::journal::Room;
use super::map::{Extent, Found};
use super::record::{Closing, New, SECTOR, Writing};
use super::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};
use super::write::Piece;
use crate::block::error::Result;
use crate::reactor::{Io, Sg};

/// What a write to an incomplete cluster found.
enum Entered<'a> {
    /// It may write to the new cluster, at this offset of the file.
    Writing(Writing<'a>, u32, HostOffset),
    /// Somebody is about to replace the entry.
    Closed,
    /// It is not incomplete any more.
    Changed,
}

/// Records for the first and the last of new clusters, where they are incomplete.
#[derive(Default)]
pub(super) struct Ends<'a> {
    head: Option<Writing<'a>>,
    tail: Option<Writing<'a>>,
}

impl Qcow2 {
    /// What an incomplete cluster shows. Between two awaits.
    pub(super) fn lookup_incomplete(
        &self,
        cluster: GuestCluster,
        index: u32,
        skip: u64,
        len: u64,
    ) -> Found {
        let (written, len) = self.records.extent(index, skip, len);
        if written {
            let host = HostOffset(self.records.host(index).0 + skip);
            return Found::Extent(Extent::Data { host, len });
        }
        Found::Extent(
            match decode(self.records.old(index), &self.tables.geometry) {
                Entry::Data { host, .. } => Extent::Data {
                    host: HostOffset(host.0 + skip),
                    len,
                },
                Entry::Zero { .. } => Extent::Zero { len },
                Entry::Unallocated => self.unallocated(len),
                Entry::Compressed(data) => Extent::Compressed { data, skip, len },
                Entry::Incomplete(_) | Entry::Bad => return Found::Bad(cluster),
            },
        )
    }

    // ---- making ----

    /// Records for those of the claimed clusters that `len` bytes from `offset` on leave incomplete. None if
    /// there is no room for them, or no grain fine enough: then they are to be copied at once.
    pub(super) fn make_records(
        &self,
        io: &Io,
        claim: &Claim<'_>,
        fresh: &Fresh<'_>,
        offset: u64,
        len: u64,
    ) -> Option<Ends<'_>> {
        let g = &self.tables.geometry;
        let skip = g.in_cluster(offset);
        if (skip | len) & (SECTOR - 1) != 0 {
            return None;
        }
        let last = claim.count() - 1;
        let is_cut = g.in_cluster(skip + len) != 0;
        let zeroed = self.fresh_reads_zero(fresh);
        let first = g.guest_cluster(GuestOffset(offset));
        let needs = |n| !(zeroed && self.reads_zero(claim.get(n)));
        let needs_head = (skip > 0 || (last == 0 && is_cut)) && needs(0);
        let needs_tail = last > 0 && is_cut && needs(last);
        if !(needs_head || needs_tail) {
            return Some(Ends::default());
        }
        let is_lone = !self
            .records
            .is_followed(first, GuestCluster(first.0 + last as u64));
        let make = |n: usize| {
            let new = New {
                guest: GuestCluster(first.0 + n as u64),
                host: g.host_offset(HostCluster(fresh.first().0 + n as u64)),
                zeroed,
                old: claim.get(n),
                is_lone,
            };
            let slice = self.tables.pin(self.tables.place(new.guest).slice)?;
            self.records.make(io, slice, new)
        };
        let (mut head, mut tail) = (None, None);
        if needs_head {
            head = Some(make(0)?);
        }
        if needs_tail {
            tail = Some(make(last)?);
        }
        Some(Ends { head, tail })
    }

    /// Writes a piece to new clusters of which the `ends` are incomplete.
    pub(super) async fn write_incomplete_ends(
        &self,
        io: &Io,
        room: &mut Room<'_>,
        mut claim: Claim<'_>,
        fresh: Fresh<'_>,
        piece: Piece<'_>,
        mut ends: Ends<'_>,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let (offset, part) = (piece.offset, piece.bytes);
        let (skip, len) = (g.in_cluster(offset), part.len() as u64);
        let count = claim.count();
        let cluster = g.guest_cluster(GuestOffset(offset));
        let host = g.host_offset(fresh.first());
        let (mut fresh, mut first) = (fresh, 0);
        let mut marks = [None; 2];
        let mut noted = room.log().commit();
        if let Some(head) = &mut ends.head {
            let index = head.publish(&mut noted);
            claim.publish(&noted, 0, entry::incomplete(index));
            let (kept, rest) = fresh.split_at(1);
            kept.keep();
            (fresh, first) = (rest, 1);
            marks[0] = Some((cluster, index));
        }
        if let Some(tail) = &mut ends.tail {
            let index = tail.publish(&mut noted);
            claim.publish(&noted, count - 1, entry::incomplete(index));
            let between = fresh.count() - 1;
            let (rest, kept) = fresh.split_at(between);
            kept.keep();
            fresh = rest;
            marks[1] = Some((GuestCluster(cluster.0 + count as u64 - 1), index));
        }
        drop(noted);
        if fresh.count() == 0 {
            // The next writers find the records.
            claim.truncate(0);
        }
        self.data.write(io, host.0 + skip, part).await?;

        if let Some(head) = ends.head {
            head.wrote(skip, len.min(g.cluster_size() - skip));
        }
        if let Some(tail) = ends.tail {
            tail.wrote(0, g.in_cluster(skip + len));
        }
        if fresh.count() > 0 {
            self.publish_between(io, room, claim, fresh, first);
        }
        for (cluster, index) in marks.into_iter().flatten() {
            self.complete(io, cluster, index);
        }
        Ok(())
    }

    /// Publishes the new clusters that are whole, from the claim's entry `first` on.
    fn publish_between(
        &self,
        io: &Io,
        room: &mut Room<'_>,
        claim: Claim<'_>,
        fresh: Fresh<'_>,
        first: usize,
    ) {
        let g = &self.tables.geometry;
        let mut freed = Freed::default();
        let (host, count) = fresh.keep();
        claim.slice().note_order(true);
        let which = first..first + count as usize;
        let entry = |at| {
            let n = (at - first) as u64;
            entry::data(g.host_offset(HostCluster(host.0 + n)))
        };
        let noted = claim.note(room, which.clone(), entry);
        for at in which {
            freed.note(self, claim.get(at));
            claim.publish(&noted, at, entry(at));
        }
        self.tables.mark_dirty(claim.slice(), true);
        drop((noted, claim));
        freed.free(self, io);
    }

    // ---- writing ----

    /// Writes what lies in the incomplete cluster at `offset`. Returns bytes written; 0: things have changed,
    /// look again.
    pub(super) async fn write_incomplete<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<u64> {
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let skip = g.in_cluster(offset);
        let len = (g.cluster_size() - skip).min(from.len() as u64);
        if (skip | len) & (SECTOR - 1) != 0 {
            // Boxed: rare, and not to make every write's future larger.
            Box::pin(self.fill_run(io, below, cluster, 1)).await?;
            return Ok(0);
        }
        match self.enter(cluster, skip) {
            Entered::Writing(writing, index, host) => {
                let part = from.split_at(len as usize).0;
                self.data.write(io, host.0, part).await?;
                writing.wrote(skip, len);
                drop(writing);
                self.complete(io, cluster, index);
                Ok(len)
            }
            Entered::Closed => {
                self.tables.unclaimed(cluster).await;
                Ok(0)
            }
            Entered::Changed => Ok(0),
        }
    }

    fn enter(&self, cluster: GuestCluster, skip: u64) -> Entered<'_> {
        let place = self.tables.place(cluster);
        let raw = self.tables.with(place.slice, |slice| slice.get(place.at));
        let Some(index) = raw.and_then(entry::incomplete_index) else {
            return Entered::Changed;
        };
        match self.records.enter(index) {
            Some(writing) => {
                let host = HostOffset(self.records.host(index).0 + skip);
                Entered::Writing(writing, index, host)
            }
            None => Entered::Closed,
        }
    }

    // ---- completing ----

    /// Publishes the new mapping if all of the cluster was written and nobody writes to it now. If somebody
    /// does, or holds the claim, it is left to the last one, or to the next flush.
    fn complete(&self, io: &Io, cluster: GuestCluster, index: u32) {
        if !self.records.is_whole(index) {
            return;
        }
        let marker = Some(index);
        let wanted = |_, raw| entry::incomplete_index(raw) == marker;
        if let Attempt::Claimed(claim) = self.tables.try_claim(cluster, 1, wanted) {
            if let Some(closing) = self.records.close_whole(index) {
                self.publish_filled(io, claim, vec![closing]);
            }
        }
    }

    /// Replaces the markers of complete clusters, one for each claimed entry, and ends the claim.
    pub(super) fn publish_filled(&self, io: &Io, claim: Claim<'_>, closed: Vec<Closing<'_>>) {
        let mut freed = Freed::default();
        claim.slice().note_order(true);
        let mut room = Room::of_records(self.journal.get(), closed.len());
        let entry = |n: usize| entry::data(closed[n].host());
        let mut noted = claim.note(&mut room, 0..closed.len(), entry);
        for (n, record) in closed.into_iter().enumerate() {
            freed.note(self, record.old());
            claim.publish(&noted, n, entry::data(record.host()));
            record.retire(io, &mut noted);
        }
        self.tables.mark_dirty(claim.slice(), true);
        drop((noted, claim));
        freed.free(self, io);
    }
}
