//! Discards and zeros by subcluster.
//!
//! The bitmap says what reads as zeros, so nothing has to be written for whole subclusters. A host cluster is
//! given back when none of its subclusters counts any more, unless it is to stay; space of subclusters alone
//! is not given back to the file system.

use std::ops::Range;

use super::super::Qcow2;
use super::super::below::Below;
use super::super::discard::Unmap;
use super::super::freed::Freed;
use super::super::journal::Room;
use super::super::units::GuestCluster;
use super::changes::{Changes, Purpose};
use super::entry::{ALL, Host, Pair, Subclusters};
use super::write::{bits_in, clusters_of, whole};
use crate::block::error::Result;
use crate::reactor::Io;

impl Qcow2 {
    /// [`Qcow2::discard`] for an image with extended L2 entries: gives back the whole subclusters. Of a
    /// compressed cluster that is not discarded as a whole nothing is.
    pub(in crate::block::qcow2) async fn discard_extended(
        &self,
        io: &Io,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let mut range = self.whole_subclusters(offset, len);
        while !range.is_empty() {
            range.start = match self.zero_subclusters(io, &range, Unmap::Free).await? {
                Done::Until(next) => next,
                Done::Compressed(next) => next,
            };
        }
        Ok(())
    }

    /// [`Qcow2::write_zeroes`] for an image with extended L2 entries.
    pub(in crate::block::qcow2) async fn write_zeroes_extended<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<()> {
        let mode = if may_unmap { Unmap::Free } else { Unmap::Keep };
        let mut range = self.whole_subclusters(offset, len);
        if range.is_empty() {
            return self.zero_bytes(io, below, offset, len, false).await;
        }
        let bits = self.tables.geometry.subcluster_bits();
        let (start, end) = (range.start << bits, range.end << bits);
        self.zero_bytes(io, below, offset, start - offset, false)
            .await?;
        while !range.is_empty() {
            range.start = match self.zero_subclusters(io, &range, mode).await? {
                Done::Until(next) => next,
                Done::Compressed(next) => {
                    let at = range.start << bits;
                    let end = (next << bits).min(offset + len);
                    self.zero_bytes(io, below, at, end - at, false).await?;
                    next
                }
            };
        }
        let tail = (offset + len).saturating_sub(end);
        self.zero_bytes(io, below, end, tail, false).await
    }

    /// The subclusters that are in the range as a whole. If the range goes to the disk's end, all of the disk's
    /// last cluster behind its beginning is.
    fn whole_subclusters(&self, offset: u64, len: u64) -> Range<u64> {
        let g = &self.tables.geometry;
        let (bits, end) = (g.subcluster_bits(), offset + len);
        let first = offset.div_ceil(1 << bits);
        if first << bits >= end {
            return first..first;
        }
        let last = if end == self.tables.size() {
            whole(GuestCluster(g.clusters(end)), 0).end
        } else {
            end >> bits
        };
        first..last.max(first)
    }

    /// Makes as many subclusters zero as can be in one go, from the range's start on.
    async fn zero_subclusters(&self, io: &Io, range: &Range<u64>, mode: Unmap) -> Result<Done> {
        let first = GuestCluster(range.start / u64::from(Subclusters::BITS));
        let slice = self.tables.place(first).slice;
        if self.tables.slice_offset(slice).is_none() {
            // No table: nothing is allocated. Over a backing file the bitmaps must say zero.
            if self.has_backing {
                self.make_table(io, slice).await?;
                return Ok(Done::Until(range.start));
            }
            let end = whole(first, self.tables.left_in_table(first)).end;
            return Ok(Done::Until(range.end.min(end)));
        }
        if self.tables.shared_table(slice).is_some() {
            self.own_table(io, slice).await?;
        }
        let left = whole(first, self.tables.left_in_slice(first));
        let range = range.start..range.end.min(left.end);
        let mut room = self
            .log_room(io, clusters_of(&range).count() as u64)
            .await?;
        let most = room.limit(clusters_of(&range).count() as u64);
        let range = range.start..range.end.min(whole(first, most).end);
        let mut freed = Freed::default();
        let done = {
            let Some(changes) = self.changes(slice) else {
                drop(room);
                self.load(io, slice).await?;
                return Ok(Done::Until(range.start));
            };
            self.zero_pairs(&changes, &mut room, &range, mode, &mut freed)
        };
        drop(room);
        // The entries were published and marked dirty.
        freed.free(self, io);
        if done == Done::Until(range.start) {
            let first = range.start..range.end.min(whole(first, 1).end);
            self.until_free(slice, Purpose::Contents, first).await;
        }
        Ok(done)
    }

    fn zero_pairs(
        &self,
        changes: &Changes<'_>,
        room: &mut Room<'_>,
        range: &Range<u64>,
        mode: Unmap,
        freed: &mut Freed,
    ) -> Done {
        for cluster in clusters_of(range) {
            let all = whole(cluster, 1);
            let start = range.start.max(all.start);
            let part = start..range.end.min(all.end);
            let old = changes.look(cluster);
            let bits = bits_in(range, cluster);
            if matches!(old.host, Host::Compressed(_)) && bits != ALL {
                return match start == range.start {
                    true => Done::Compressed(part.end),
                    false => Done::Until(start),
                };
            }
            let alone = changes.free(Purpose::Contents, &all) == all;
            let Some(new) = self.zeroed(&old, bits, mode, alone) else {
                continue;
            };
            if changes.free(Purpose::Contents, &part) != part {
                return Done::Until(start);
            }
            if new.host == Host::None {
                freed.note(self, old.raw);
            }
            // A bitmap of zeros needs no data to be durable first.
            changes.publish(room, cluster, &new, false);
        }
        Done::Until(range.end)
    }

    /// The pair that replaces `old` to make some subclusters zero; none if it can stay. `alone`: nobody else
    /// has reserved anything of the cluster.
    fn zeroed(&self, old: &Pair, bits: Subclusters, mode: Unmap, alone: bool) -> Option<Pair> {
        let none = |allocated, zero| Pair {
            raw: 0,
            host: Host::None,
            ..old.with(allocated, zero)
        };
        let new = match old.host {
            Host::Bad => return None,
            Host::Compressed(_) => none(0, ALL),
            Host::None | Host::At { .. } => {
                let zero = if self.has_backing {
                    bits
                } else {
                    bits & old.allocated
                };
                old.with(old.allocated & !bits, old.zero | zero)
            }
        };
        // A host cluster that may be shared cannot be kept for later writes.
        let keeps = mode == Unmap::Keep && old.is_ours();
        let unused = matches!(old.host, Host::At { .. }) && new.allocated == 0;
        let gives_back = unused && !keeps && alone && (bits == ALL || new != *old);
        match gives_back {
            true => Some(none(0, new.zero)),
            false => (new != *old).then_some(new),
        }
    }
}

/// How far zeros were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// Up to this subcluster.
    Until(u64),
    /// Not at all: up to this subcluster there is a part of a compressed cluster.
    Compressed(u64),
}
