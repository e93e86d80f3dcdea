//! Where a write goes: in place, to new clusters, or to what must be had first.

use std::sync::atomic::Ordering;

use super::Qcow2;
use super::entry::{Entry, decode};
use super::units::{GuestCluster, GuestOffset, HostOffset};
use crate::block::error::Result;
use crate::reactor::Io;

/// Where a write goes.
pub(super) enum Target {
    /// To clusters that are ours alone.
    InPlace { host: HostOffset, len: u64 },
    /// To new clusters, or to reserved ones that read as zeros.
    Claim,
    /// To a cluster that is incomplete.
    Incomplete,
    /// The slice of this number is needed first.
    Missing(u64),
    /// The slice of this number has no L2 table yet.
    NoTable(u64),
    /// The entry of this cluster is not valid.
    Bad(GuestCluster),
}

impl Qcow2 {
    /// Where in [`Qcow2::data`] all of a write goes that has nothing else to do any more: in one piece, to clusters that
    /// are the image's alone, with no bitmap to note it in. A cluster that showed zeros may have become such a one by
    /// this, and the write must follow. None: it is [`Qcow2::write`]'s. The range is inside the disk.
    #[inline]
    pub(in crate::block) fn in_place(&self, io: &Io, offset: u64, len: u64) -> Option<HostOffset> {
        if self.bitmaps.is_some() || self.refuse_writes.load(Ordering::Relaxed) {
            return None;
        }
        self.place_at_once(io, offset, len)
    }

    /// As [`Qcow2::in_place`], without a look at bitmaps and at whether writes are refused.
    #[inline]
    pub(super) fn place_at_once(&self, io: &Io, offset: u64, len: u64) -> Option<HostOffset> {
        match self.target(offset, len) {
            Target::InPlace { host, len: found } if found == len => Some(host),
            Target::Claim => self.place_new(io, offset, len),
            _ => None,
        }
    }

    /// Where a write of up to `len` bytes at `offset` goes.
    #[inline]
    pub(super) fn target(&self, offset: u64, len: u64) -> Target {
        if self.tables.geometry.extended_l2 {
            return self.target_extended(offset, len);
        }
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let skip = g.in_cluster(offset);
        let place = self.tables.place(cluster);
        let found = self.tables.with(place.slice, |slice| {
            slice.touch();
            let Entry::Data { host, copied: true } = decode(slice.get(place.at), g) else {
                return match decode(slice.get(place.at), g) {
                    Entry::Bad => Target::Bad(cluster),
                    Entry::Incomplete(_) => Target::Incomplete,
                    _ => Target::Claim,
                };
            };
            let wanted = g
                .clusters(skip + len)
                .min(self.tables.left_in_slice(cluster)) as usize;
            let clusters = self.run(slice, place.at, wanted, |n, next| {
                let want = HostOffset(host.0 + ((n as u64) << g.cluster_bits));
                next == Entry::Data {
                    host: want,
                    copied: true,
                }
            });
            Target::InPlace {
                host: HostOffset(host.0 + skip),
                len: (((clusters as u64) << g.cluster_bits) - skip).min(len),
            }
        });
        match found {
            Some(target) => target,
            None if self.tables.slice_offset(place.slice).is_some() => Target::Missing(place.slice),
            None => Target::NoTable(place.slice),
        }
    }

    /// As [`Qcow2::target`], and where clusters of the next slices lie behind those of the first, one run
    /// over all of them.
    pub(super) fn long_target(&self, offset: u64, len: u64) -> Target {
        let mut target = self.target(offset, len);
        while let Target::InPlace { host, len: found } = &mut target {
            if *found == len {
                break;
            }
            match self.target(offset + *found, len - *found) {
                Target::InPlace { host: next, len } if next.0 == host.0 + *found => *found += len,
                _ => break,
            }
        }
        target
    }

    /// Does what must be done before a target can be had; then look again. Always 0: bytes written.
    #[cold]
    pub(super) async fn prepare(&self, io: &Io, target: Target) -> Result<u64> {
        match target {
            Target::Missing(slice) => self.load(io, slice).await?,
            Target::NoTable(slice) => self.make_table(io, slice).await?,
            Target::Bad(cluster) => return Err(self.found_bad(io, cluster).await),
            Target::InPlace { .. } | Target::Claim | Target::Incomplete => {}
        }
        Ok(0)
    }
}
