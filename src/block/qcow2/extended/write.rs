//! Writing to subclusters that are not allocated.

use std::ops::Range;

use super::super::Qcow2;
use super::super::below::Below;
use super::super::entry;
use super::super::freed::Freed;
use super::super::journal::Room;
use super::super::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};
use super::super::write::Piece;
use super::changes::{Purpose, Reservation};
use super::entry::{ALL, Host, Pair, Subclusters};
use crate::block::error::Result;
use crate::reactor::{AlignedBuf, Io, Sg};

/// What must be done for a write to go on.
enum Step<'a> {
    /// Look again: things have changed.
    Again,
    /// Wait until this is free.
    Wait(Purpose, Range<u64>),
    /// Give host clusters to the clusters of the range.
    Host(Reservation<'a>),
    /// Write, and make the range allocated.
    Fill(Fill<'a>),
    /// Replace the host cluster, or the compressed one, of this pair.
    Remake(Reservation<'a>, Pair),
    Bad,
}

/// Subclusters in a row in the file, the first of which is not allocated.
struct Fill<'a> {
    reservation: Reservation<'a>,
    /// The host offset of the first.
    host: HostOffset,
    first: Edge,
    last: Edge,
}

/// What a subcluster shows before it is written to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Edge {
    Allocated,
    Zeros,
    Below,
}

/// The bits of those subclusters of a range that are in the cluster.
pub(super) fn bits_in(range: &Range<u64>, cluster: GuestCluster) -> Subclusters {
    let bits = u64::from(Subclusters::BITS);
    let base = cluster.0 * bits;
    let start = range.start.clamp(base, base + bits) - base;
    let end = range.end.clamp(base, base + bits) - base;
    // 64 bits wide, since all 32 may be shifted out.
    (((1u64 << end) - 1) & !((1u64 << start) - 1)) as Subclusters
}

/// All subclusters of a cluster, counted from the disk's beginning.
pub(super) fn whole(cluster: GuestCluster, count: u64) -> Range<u64> {
    let bits = u64::from(Subclusters::BITS);
    cluster.0 * bits..(cluster.0 + count) * bits
}

/// The clusters that a range of subclusters touches.
pub(super) fn clusters_of(range: &Range<u64>) -> impl Iterator<Item = GuestCluster> + use<> {
    let bits = u64::from(Subclusters::BITS);
    (range.start / bits..range.end.div_ceil(bits)).map(GuestCluster)
}

impl Qcow2 {
    /// [`Qcow2::write_new`] for an image with extended L2 entries: one step on the way. Returns bytes
    /// written; 0: look again.
    pub(in crate::block::qcow2) async fn write_new_extended<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<u64> {
        let cluster = self.tables.geometry.guest_cluster(GuestOffset(offset));
        let slice = self.tables.place(cluster).slice;
        if self.tables.shared_table(slice).is_some() {
            self.own_table(io, slice).await?;
        }
        let g = &self.tables.geometry;
        let wanted = g.clusters(g.in_cluster(offset) + from.len() as u64);
        let wanted = wanted.min(self.tables.left_in_slice(cluster));
        let mut room = self.log_room(io, wanted).await?;
        let most = (room.limit(wanted) << g.cluster_bits) - g.in_cluster(offset);
        match self.step(offset, most.min(from.len() as u64)) {
            Step::Again => Ok(0),
            Step::Bad => Err(self.found_bad(io, cluster).await),
            Step::Wait(purpose, range) => {
                drop(room);
                self.until_free(slice, purpose, range).await;
                Ok(0)
            }
            Step::Host(reservation) => {
                self.give_hosts(io, &mut room, reservation).await?;
                Ok(0)
            }
            Step::Fill(fill) => {
                self.fill_subclusters(io, below, &mut room, fill, offset, from)
                    .await
            }
            Step::Remake(reservation, old) => {
                let piece = Piece {
                    offset,
                    bytes: from,
                };
                let remake = self.remake(io, below, &mut room, reservation, &old, piece);
                remake.await
            }
        }
    }

    /// What comes next for a write of `len` bytes at `offset`, with what it needs reserved.
    fn step(&self, offset: u64, len: u64) -> Step<'_> {
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let Some(changes) = self.changes(self.tables.place(cluster).slice) else {
            return Step::Again;
        };
        let all = whole(cluster, self.tables.left_in_slice(cluster));
        let end = g.subcluster(GuestOffset(offset + len - 1)) + 1;
        let touched = g.subcluster(GuestOffset(offset))..end.min(all.end);
        let pair = changes.look(cluster);
        let (purpose, mut wanted) = match pair.host {
            Host::Bad => return Step::Bad,
            Host::None => {
                let empty =
                    clusters_of(&touched).take_while(|c| changes.look(*c).host == Host::None);
                (Purpose::Host, whole(cluster, empty.count() as u64))
            }
            Host::Compressed(_) | Host::At { copied: false, .. } => {
                (Purpose::Contents, whole(cluster, 1))
            }
            Host::At { host, copied: true } => {
                if pair.allocated & bits_in(&touched, cluster) & lowest(bits_in(&touched, cluster))
                    != 0
                {
                    return Step::Again;
                }
                let in_a_row = clusters_of(&touched).take_while(|c| {
                    let host = HostOffset(host.0 + ((c.0 - cluster.0) << g.cluster_bits));
                    changes.look(*c).is_ours_at(host)
                });
                let row = whole(cluster, in_a_row.count() as u64);
                (Purpose::Contents, touched.start..touched.end.min(row.end))
            }
        };
        let free = changes.free(purpose, &wanted);
        let remakes = purpose == Purpose::Contents && !pair.is_ours();
        if remakes && free != wanted {
            return Step::Wait(purpose, wanted);
        }
        if free.is_empty() {
            return Step::Wait(purpose, wanted.start..wanted.start + 1);
        }
        wanted = free;
        if purpose == Purpose::Host {
            return Step::Host(changes.reserve(purpose, wanted));
        }
        if remakes {
            return Step::Remake(changes.reserve(purpose, wanted), pair);
        }
        let Host::At { host, .. } = pair.host else {
            return Step::Again;
        };
        let edge = |subcluster: u64| {
            let cluster = GuestCluster(subcluster / u64::from(Subclusters::BITS));
            let bit = bits_in(&(subcluster..subcluster + 1), cluster);
            let pair = changes.look(cluster);
            if pair.allocated & bit != 0 {
                Edge::Allocated
            } else if self.zeros(&pair) & bit != 0 {
                Edge::Zeros
            } else {
                Edge::Below
            }
        };
        let (first, last) = (edge(wanted.start), edge(wanted.end - 1));
        let skip = (wanted.start << g.subcluster_bits()) & (g.cluster_size() - 1);
        Step::Fill(Fill {
            reservation: changes.reserve(purpose, wanted),
            host: HostOffset(host.0 + skip),
            first,
            last,
        })
    }

    /// Host clusters for clusters that have none. What shows zeros is allocated from then on if the new
    /// clusters are zeros; else they show what they showed.
    pub(super) async fn give_hosts(
        &self,
        io: &Io,
        room: &mut Room<'_>,
        reservation: Reservation<'_>,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let count = clusters_of(&reservation.range()).count() as u64;
        let cluster = GuestCluster(reservation.range().start / u64::from(Subclusters::BITS));
        let fresh = self.new_clusters(io, cluster, count).await?;
        let zeroed = self.fresh_reads_zero(&fresh);
        let Some(changes) = reservation.changes() else {
            return Ok(());
        };
        let (first, count) = (fresh.first(), fresh.count());
        let clusters = clusters_of(&reservation.range()).take(count as usize);
        for (n, cluster) in clusters.enumerate() {
            let old = changes.look(cluster);
            debug_assert_eq!(old.host, Host::None);
            let zeros = if zeroed { self.zeros(&old) } else { 0 };
            let host = g.host_offset(HostCluster(first.0 + n as u64));
            let new = Pair {
                raw: entry::data(host),
                ..old.with(zeros, old.zero & !zeros)
            };
            // Everything shows what it showed, whatever of this is in the file.
            changes.publish(room, cluster, &new, false);
        }
        fresh.keep();
        Ok(())
    }

    /// Writes to a run of subclusters, with the rest of the first and the last around.
    async fn fill_subclusters<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        room: &mut Room<'_>,
        fill: Fill<'_>,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<u64> {
        let g = &self.tables.geometry;
        let range = fill.reservation.range();
        let (start, end) = (
            range.start << g.subcluster_bits(),
            range.end << g.subcluster_bits(),
        );
        let len = (end - offset).min(from.len() as u64);
        // A data file does not grow beyond the disk's end.
        let filled = start + self.fill_len(start, end - start);
        let (before, after) = (offset - start, filled.saturating_sub(offset + len));
        let before = if fill.first == Edge::Allocated {
            0
        } else {
            before
        };
        let after = if fill.last == Edge::Allocated {
            0
        } else {
            after
        };

        // Both ends of one subcluster: one read, over the part between, which is not used.
        let one = range.end - range.start == 1 && before > 0 && after > 0;
        let (mut whole, mut head, mut tail);
        let (head, tail) = if one && fill.first == Edge::Below {
            whole = io.buf((end - start) as usize);
            below.read(io, start, whole.sg()).await?;
            let all = whole.sg();
            let behind = (before + len) as usize;
            (
                all.slice(0, before as usize),
                all.slice(behind, after as usize),
            )
        } else {
            head = self.edge(io, below, fill.first, start, before).await?;
            tail = self.edge(io, below, fill.last, offset + len, after).await?;
            (head.sg(), tail.sg())
        };
        let skip = offset - start - before;
        let host = HostOffset(fill.host.0 + skip);
        let part = from.split_at(len as usize).0;
        self.write_around(io, host, head, part, tail).await?;

        let Some(changes) = fill.reservation.changes() else {
            return Ok(0);
        };
        for cluster in clusters_of(&range) {
            let bits = bits_in(&range, cluster);
            let old = changes.look(cluster);
            let new = old.with(old.allocated | bits, old.zero & !bits);
            if new != old {
                changes.publish(room, cluster, &new, true);
            }
        }
        Ok(len)
    }

    /// `len` bytes at `offset`, in a subcluster that shows zeros or the layer below.
    async fn edge<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        edge: Edge,
        offset: u64,
        len: u64,
    ) -> Result<AlignedBuf> {
        let mut buf = io.buf(len as usize);
        if len > 0 && edge == Edge::Below {
            below.read(io, offset, buf.sg()).await?;
        } else {
            buf.fill(0);
        }
        Ok(buf)
    }

    /// A new host cluster for one that is compressed, or that may be shared. Allocated subclusters are
    /// copied, and all of a compressed cluster; the others stay what they are, but for those written to.
    async fn remake<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        room: &mut Room<'_>,
        reservation: Reservation<'_>,
        old: &Pair,
        piece: Piece<'_>,
    ) -> Result<u64> {
        let g = &self.tables.geometry;
        let (offset, from) = (piece.offset, piece.bytes);
        let cluster = g.guest_cluster(GuestOffset(offset));
        let skip = g.in_cluster(offset);
        let len = (g.cluster_size() - skip).min(from.len() as u64);
        let fresh = self.new_clusters(io, cluster, 1).await?;
        let new_host = g.host_offset(fresh.first());

        let first = g.subcluster(GuestOffset(offset));
        let touched_range = first..g.subcluster(GuestOffset(offset + len - 1)) + 1;
        let touched = bits_in(&touched_range, cluster);
        let covered_range =
            (offset.div_ceil(1 << g.subcluster_bits()))..((offset + len) >> g.subcluster_bits());
        let covered = bits_in(&covered_range, cluster);
        // What the cluster shows, as far as it is going to be written.
        let mut contents = io.buf(g.cluster_size() as usize);
        let allocated = match old.host {
            Host::Compressed(data) => {
                let all = contents.sg();
                self.read_compressed(io, data, 0, all).await?;
                ALL
            }
            _ => old.allocated | touched,
        };
        if let Host::At { host, .. } = old.host {
            let all = contents.sg();
            let zeros = self.zeros(old);
            for (bits, shown) in [
                (old.allocated, Edge::Allocated),
                (touched & zeros, Edge::Zeros),
                (touched & old.below() & !zeros, Edge::Below),
            ] {
                for run in runs(bits & !covered) {
                    let at = u64::from(run.start) << g.subcluster_bits();
                    let bytes = u64::from(run.end - run.start) << g.subcluster_bits();
                    let to = all.slice(at as usize, bytes as usize);
                    match shown {
                        Edge::Allocated => self.data.read(io, host.0 + at, to).await?,
                        Edge::Zeros => to.zero(),
                        Edge::Below => below.read(io, offset - skip + at, to).await?,
                    }
                }
            }
        }
        let all = contents.sg();
        let part = from.split_at(len as usize).0;
        for run in runs(allocated) {
            let start = u64::from(run.start) << g.subcluster_bits();
            let end = u64::from(run.end) << g.subcluster_bits();
            // A data file does not grow beyond the disk's end.
            let end = end.min(self.fill_len(offset - skip, g.cluster_size()));
            if start >= end {
                break;
            }
            let host = HostOffset(new_host.0 + start);
            if (start..end).contains(&skip) {
                let head = all.slice(start as usize, (skip - start) as usize);
                let behind = skip + len;
                let tail = all.slice(behind as usize, (end - behind) as usize);
                self.write_around(io, host, head, part, tail).await?;
            } else {
                let run = all.slice(start as usize, (end - start) as usize);
                self.data.write(io, host.0, run).await?;
            }
        }

        let Some(changes) = reservation.changes() else {
            return Ok(0);
        };
        let new = Pair {
            raw: entry::data(new_host),
            ..old.with(allocated, old.zero & !allocated)
        };
        changes.publish(room, cluster, &new, true);
        fresh.keep();
        drop(changes);
        let mut freed = Freed::default();
        freed.note(self, old.raw);
        freed.free(self, io);
        Ok(len)
    }
}

/// The lowest of some subclusters.
fn lowest(bits: Subclusters) -> Subclusters {
    bits & bits.wrapping_neg()
}

/// Subclusters in a row.
pub(super) fn runs(mut bits: Subclusters) -> impl Iterator<Item = Range<u32>> {
    std::iter::from_fn(move || {
        let start = bits.trailing_zeros();
        if start == Subclusters::BITS {
            return None;
        }
        let count = (bits >> start).trailing_ones();
        bits &= !(((1u64 << count) - 1) << start) as Subclusters;
        Some(start..start + count)
    })
}
