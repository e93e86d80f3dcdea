//! Copy-on-read: what the layers below show becomes the image's own.
//!
//! Nothing that a request can see changes by it, so it asks for less than a write: where it meets anybody, it
//! leaves the cluster alone. An entry that is unallocated under its claim shows the layer below, whatever it was
//! before; so what was read there some time ago, without a claim, is what the cluster shows now. The claim is
//! held for as long as the data is written, and never while the layers below are read.
//!
//! The order is that of a write to new clusters (`write`): data before mapping, in memory and in the file. To
//! lose a copy is harmless. But a copy can not be left out of a flush because of that: the guest may have written
//! to the cluster since, in place, which nobody notes.
//!
//! A cluster of zeros becomes a mapping to zeros: it takes no space and no data has to be durable before it, and
//! the zeros of an image that is mostly empty are not fetched from far away time and again. Version 2 can not say
//! that over a backing file, and leaves such clusters alone.

use std::ops::Range;

use super::Qcow2;
use super::claim::{Attempt, Claim};
use super::entry::{self, Entry, decode};
use super::fill::is_zero;
use super::journal::Room;
use super::map::{Extent, Found};
use super::target::Target;
use super::units::GuestOffset;
use crate::block::error::Result;
use crate::reactor::{AlignedBuf, Io};

impl Qcow2 {
    /// The unit of what [`Qcow2::store_copy`] stores, in bytes; none if this image stores no copies: it is only
    /// read, has nothing below, or has an external data file, whose clusters are not new before they are claimed.
    pub(in crate::block) fn copy_unit(&self) -> Option<u64> {
        let stores = self.alloc.is_some() && self.has_backing && !self.has_data_file();
        let g = &self.tables.geometry;
        let bits = if g.extended_l2 {
            g.subcluster_bits()
        } else {
            g.cluster_bits
        };
        stores.then_some(1 << bits)
    }

    /// True if all of a range shows the layer below, as far as that is known without I/O.
    pub(in crate::block) fn is_hole(&self, offset: u64, len: u64) -> bool {
        let end = (offset + len).min(self.size());
        let mut at = offset;
        while at < end {
            match self.lookup(at, end - at) {
                Found::Extent(Extent::Backing { len }) => at += len,
                _ => return false,
            }
        }
        true
    }

    /// True if what is to be done when the image is handed over is kept small.
    pub(in crate::block) fn is_eager(&self) -> bool {
        self.records.is_eager()
    }

    /// Stores `bytes`, which is what the layers below show at `offset`: whole units, or up to the end of the
    /// disk's last one. Units that are not holes, or that somebody changes now, are passed over. Returns the bytes
    /// that became the image's own. The caller holds no [`crate::reactor::Pin`] that anybody waits for.
    ///
    /// # Errors
    /// Those of allocation and of the storage. What was stored before stays; all shows what it showed.
    pub(in crate::block) async fn store_copy(
        &self,
        io: &Io,
        offset: u64,
        bytes: &mut AlignedBuf,
    ) -> Result<u64> {
        let Some(unit) = self.copy_unit() else {
            return Ok(0);
        };
        let _pin = io.pin();
        self.check_writes()?;
        // What is beyond the end of a disk that has become smaller is let go of, as by a request.
        let end = self.size().next_multiple_of(unit).saturating_sub(offset);
        let len = (bytes.len() as u64).min(end) as usize;
        let zeros: Vec<bool> = bytes[..len].chunks(unit as usize).map(is_zero).collect();
        let (mut first, mut stored) = (0, 0);
        for run in zeros.chunk_by(|a, b| a == b) {
            let range = first..(first + run.len() * unit as usize).min(len);
            first = range.end;
            stored += self.store_run(io, offset, bytes, range, run[0]).await?;
        }
        Ok(stored)
    }

    /// Stores a range of `bytes`, units that all are zeros or all are not.
    async fn store_run(
        &self,
        io: &Io,
        base: u64,
        bytes: &mut AlignedBuf,
        mut range: Range<usize>,
        zeros: bool,
    ) -> Result<u64> {
        if zeros && self.header.version < 3 {
            return Ok(0);
        }
        let mut stored = 0;
        while !range.is_empty() {
            let offset = base + range.start as u64;
            // What is needed to look at the entry; a table is made only for what is going to be in it.
            match self.target(offset, range.len() as u64) {
                Target::Claim => {}
                other @ (Target::Missing(_) | Target::NoTable(_)) => {
                    self.prepare(io, other).await?;
                    continue;
                }
                Target::InPlace { .. } | Target::Incomplete | Target::Bad(_) => {
                    range.start = self.next_unit(offset, base, &range);
                    continue;
                }
            }
            let done = if self.tables.geometry.extended_l2 {
                self.store_subclusters(io, offset, bytes, range.clone(), zeros)
                    .await?
            } else {
                self.store_clusters(io, offset, bytes, range.clone(), zeros)
                    .await?
            };
            match done {
                Stored::Bytes(len) => {
                    let len = len.min(range.len());
                    stored += len as u64;
                    range.start += len;
                }
                Stored::Again => {}
                Stored::Nothing => range.start = self.next_unit(offset, base, &range),
            }
        }
        Ok(stored)
    }

    /// Where the unit behind the one at `offset` begins in a range of the bytes at `base`.
    fn next_unit(&self, offset: u64, base: u64, range: &Range<usize>) -> usize {
        let unit = self.copy_unit().unwrap_or(1);
        let next = (offset / unit + 1) * unit - base;
        (next as usize).clamp(range.start + 1, range.end)
    }

    async fn store_clusters(
        &self,
        io: &Io,
        offset: u64,
        bytes: &mut AlignedBuf,
        range: Range<usize>,
        zeros: bool,
    ) -> Result<Stored> {
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let wanted = g
            .clusters(range.len() as u64)
            .min(self.tables.left_in_slice(cluster));
        let Some(mut room) = self.spare_log_room(io, wanted).await? else {
            return Ok(Stored::Nothing);
        };
        let wanted = room.limit(wanted);
        let is_hole = |_, raw| decode(raw, g) == Entry::Unallocated;
        let claim = match self.tables.try_claim(cluster, wanted, is_hole) {
            Attempt::Claimed(claim) => claim,
            Attempt::Busy | Attempt::Unwanted => return Ok(Stored::Nothing),
            Attempt::Missing => return Ok(Stored::Again),
            Attempt::Shared => {
                drop(room);
                self.own_table(io, self.tables.place(cluster).slice).await?;
                return Ok(Stored::Again);
            }
        };
        let len = |claim: &Claim<'_>| claim.count() << g.cluster_bits;
        if zeros {
            let len = len(&claim);
            self.publish_zeros(&mut room, &claim);
            return Ok(Stored::Bytes(len));
        }
        let mut claim = claim;
        let fresh = self.new_clusters(io, cluster, claim.count() as u64).await?;
        claim.truncate(fresh.count() as usize);
        let len = len(&claim).min(range.len());
        let part = bytes.sg().slice(range.start, len);
        let host = g.host_offset(fresh.first());
        self.data.write(io, host.0, part).await?;
        self.publish_fresh(io, &mut room, claim, fresh, true);
        Ok(Stored::Bytes(len))
    }

    /// The claimed holes show zeros.
    fn publish_zeros(&self, room: &mut Room<'_>, claim: &Claim<'_>) {
        let noted = claim.note(room, 0..claim.count(), |_| entry::ZERO);
        for n in 0..claim.count() {
            claim.publish(&noted, n, entry::ZERO);
        }
        // The old content is zeros: nothing has to be durable first.
        self.tables.mark_dirty(claim.slice(), false);
    }
}

/// What became of a part of a copy.
pub(super) enum Stored {
    /// So many bytes, from the beginning of what was asked for.
    Bytes(usize),
    /// Things have changed, look again.
    Again,
    /// The first unit is not to be had.
    Nothing,
}
