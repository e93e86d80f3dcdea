//! Discards and zeros: entries that stop pointing at data.
//!
//! Only whole clusters change their entries. What a discard does is what QEMU does: with the zero flag
//! (version 3) the range reads as zeros, also over a backing file; version 2 over a backing file ignores
//! discards, since an unmapped cluster would show old data from below.

use super::Qcow2;
use super::below::Below;
use super::claim::Attempt;
use super::entry::{self, Entry, decode};
use super::freed::Freed;
use super::map::{Extent, Found};
use super::target::Target;
use super::units::{GuestCluster, GuestOffset};
use crate::block::error::Result;
use crate::reactor::Io;

/// What is to become of whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmap {
    /// Their host clusters are given back.
    Free,
    /// Their host clusters stay reserved.
    Keep,
}

/// Zeros are written in pieces of this many bytes at most, where they must be written.
const ZERO_PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Gives back the whole clusters inside the range. They read as zeros then; the rest of the range is
    /// left alone.
    ///
    /// # Errors
    /// Those of reading tables and, over a backing file, of making them.
    pub async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        self.check_writes()?;
        if self.header.version < 3 && self.has_backing {
            return Ok(());
        }
        self.note_change(io, offset, len).await?;
        if self.is_raw_data() {
            return self.zero_bytes(io, &(), offset, len, true).await;
        }
        if self.tables.geometry.extended_l2 {
            return self.discard_extended(io, offset, len).await;
        }
        let (_, first, last, _) = self.whole_clusters(offset, len);
        self.unmap(io, first, last, Unmap::Free).await
    }

    /// Makes the range read as zeros. `may_unmap` allows giving clusters back; else they stay reserved.
    ///
    /// # Errors
    /// As [`Qcow2::write`].
    pub async fn write_zeroes<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<()> {
        self.check_range(offset, len)?;
        self.check_writes()?;
        self.note_change(io, offset, len).await?;
        if self.is_raw_data() {
            return self.zero_bytes(io, below, offset, len, may_unmap).await;
        }
        if self.tables.geometry.extended_l2 {
            let zeroes = self.write_zeroes_extended(io, below, offset, len, may_unmap);
            return zeroes.await;
        }
        let mode = match (self.header.version, may_unmap) {
            (3.., true) => Unmap::Free,
            (3.., false) => Unmap::Keep,
            (_, true) if !self.has_backing => Unmap::Free,
            // Version 2 has no zero flag.
            _ => return self.zero_bytes(io, below, offset, len, false).await,
        };
        let (head, first, last, tail) = self.whole_clusters(offset, len);
        self.zero_bytes(io, below, offset, head, false).await?;
        self.unmap(io, first, last, mode).await?;
        self.zero_bytes(io, below, offset + len - tail, tail, false)
            .await
    }

    /// Cuts a range: bytes before its first whole cluster, first cluster, cluster behind the last, bytes
    /// behind. The disk's last cluster is whole if the range goes to the disk's end.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, GuestCluster, GuestCluster, u64) {
        let g = &self.tables.geometry;
        let end = offset + len;
        let first = g.clusters(offset);
        let last = if end == self.tables.size() {
            g.clusters(end)
        } else {
            g.guest_cluster(GuestOffset(end)).0
        };
        if first >= last {
            return (len, GuestCluster(first), GuestCluster(first), 0);
        }
        let head = (first << g.cluster_bits) - offset;
        let tail = end.saturating_sub(last << g.cluster_bits);
        (head, GuestCluster(first), GuestCluster(last), tail)
    }

    /// The entry that replaces `raw`; none if it can stay.
    fn unmapped(&self, raw: u64, mode: Unmap) -> Option<u64> {
        let zero = if self.header.version >= 3 {
            entry::ZERO
        } else {
            0
        };
        match (decode(raw, &self.tables.geometry), mode) {
            (Entry::Unallocated, _) => self.has_backing.then_some(zero),
            (Entry::Zero { host: None, .. }, _) | (Entry::Bad, _) => None,
            (Entry::Zero { .. }, Unmap::Keep) => None,
            (Entry::Incomplete(index), Unmap::Keep) => {
                Some(entry::data(self.records.host(index)) | zero)
            }
            (Entry::Data { copied: true, .. }, Unmap::Keep) => Some(raw | zero),
            _ => Some(zero),
        }
    }

    pub(super) async fn unmap(
        &self,
        io: &Io,
        first: GuestCluster,
        last: GuestCluster,
        mode: Unmap,
    ) -> Result<()> {
        let mut cluster = first;
        while cluster < last {
            let place = self.tables.place(cluster);
            let left = self.tables.left_in_slice(cluster).min(last.0 - cluster.0);
            // The next entry that has to change.
            let next = self.tables.with(place.slice, |slice| {
                (0..left).find(|n| {
                    self.unmapped(slice.get(place.at + *n as usize), mode)
                        .is_some()
                })
            });
            match next {
                Some(Some(n)) => {
                    cluster = GuestCluster(cluster.0 + n);
                    cluster.0 += self.unmap_run(io, cluster, left - n, mode).await?;
                }
                Some(None) => cluster.0 += left,
                None if self.tables.slice_offset(place.slice).is_some() => {
                    self.load(io, place.slice).await?;
                }
                // No table: all unallocated. Over a backing file that needs zero flags.
                None if self.has_backing => self.make_table(io, place.slice).await?,
                None => cluster.0 += self.tables.left_in_table(cluster),
            }
        }
        Ok(())
    }

    /// Unmaps what can be claimed in a row; returns how many clusters.
    async fn unmap_run(&self, io: &Io, first: GuestCluster, most: u64, mode: Unmap) -> Result<u64> {
        let mut room = self.log_room(io, most).await?;
        let most = room.limit(most);
        let attempt = self
            .tables
            .try_claim(first, most, |_, raw| self.unmapped(raw, mode).is_some());
        let claim = match attempt {
            Attempt::Claimed(claim) => claim,
            Attempt::Busy => {
                drop(room);
                self.tables.unclaimed(first).await;
                return Ok(0);
            }
            Attempt::Unwanted | Attempt::Missing => return Ok(0),
            Attempt::Shared => {
                drop(room);
                self.own_table(io, self.tables.place(first).slice).await?;
                return Ok(0);
            }
        };
        // Who writes to an incomplete cluster ends that before its clusters go.
        let mut closed = Vec::new();
        for n in 0..claim.count() {
            if let Some(index) = entry::incomplete_index(claim.get(n)) {
                closed.push((n, self.records.close(index).await));
            }
        }
        if mode == Unmap::Free {
            self.drop_data(io, &claim).await;
        }
        // Behind the last await: who is dropped before leaves the records with what they were promised.
        room.take_over(closed.len());
        let mut closed = closed.into_iter().peekable();
        let mut freed = Freed::default();
        let new = |n: usize| {
            let old = claim.get(n);
            self.unmapped(old, mode).unwrap_or(old)
        };
        let mut noted = claim.note(&mut room, 0..claim.count(), new);
        for n in 0..claim.count() {
            let old = claim.get(n);
            if let Some(new) = self.unmapped(old, mode) {
                let kept = matches!(
                    decode(new, &self.tables.geometry),
                    Entry::Zero { host: Some(_), .. }
                );
                let record = closed.next_if(|(at, _)| *at == n);
                let host = record.as_ref().map(|(_, r)| entry::data(r.host()));
                if !kept {
                    freed.note(self, host.unwrap_or(old));
                }
                claim.publish(&noted, n, new);
                if let Some((_, record)) = record {
                    freed.note(self, record.old());
                    record.retire(io, &mut noted);
                }
            }
        }
        // A mapping to zeros needs no data to be durable first.
        self.tables.mark_dirty(claim.slice(), false);
        let count = claim.count() as u64;
        drop((noted, claim));
        freed.free(self, io);
        Ok(count)
    }

    /// Makes bytes zero without changing what is mapped, but where something must be mapped for it.
    pub(super) async fn zero_bytes<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        mut offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<()> {
        let end = offset + len;
        while offset < end {
            if let Found::Extent(Extent::Zero { len }) = self.lookup(offset, end - offset) {
                offset += len;
                continue;
            }
            offset += match self.target(offset, end - offset) {
                Target::InPlace { host, len } => {
                    self.data.write_zeroes(io, host.0, len, may_unmap).await?;
                    len
                }
                target @ (Target::Claim | Target::Incomplete) => {
                    let mut zeros = io.buf((end - offset).min(ZERO_PIECE) as usize);
                    zeros.fill(0);
                    if let Target::Claim = target {
                        self.write_new(io, below, offset, zeros.sg()).await?
                    } else {
                        self.write_incomplete(io, below, offset, zeros.sg()).await?
                    }
                }
                other => self.prepare(io, other).await?,
            };
        }
        Ok(())
    }
}
