//! The first write to a cluster of zeros, where nothing has to be waited for.
//!
//! Most writes to an image without a backing file are of this kind until it is full: the cluster shows zeros, there is
//! a new one in the arena that reads as zeros, and room in the journal. What [`super::write`] does about that in several
//! steps is done here by one plain call, in the same order and with the same claim; what is different in anything is
//! left to it.

use super::Qcow2;
use super::claim::Attempt;
use super::entry::{Entry, decode};
use super::units::{GuestOffset, HostOffset};

use crate::reactor::Io;

impl Qcow2 {
    /// Gives the cluster that a range is in a new one, which reads as zeros as the old one did, and tells where in it
    /// the range is. None if that can not be done at once, and nothing has changed then.
    #[inline(never)]
    pub(super) fn place_new(&self, io: &Io, offset: u64, len: u64) -> Option<HostOffset> {
        let g = &self.tables.geometry;
        let skip = g.in_cluster(offset);
        if len == 0 || skip + len > g.cluster_size() || g.extended_l2 || g.data_file {
            return None;
        }
        let is_zero = |raw| match decode(raw, g) {
            Entry::Unallocated => !self.has_backing,
            Entry::Zero { host: None, .. } => true,
            _ => false,
        };
        let cluster = g.guest_cluster(GuestOffset(offset));
        let place = self.tables.place(cluster);
        let raw = self.tables.with(place.slice, |slice| slice.get(place.at));
        raw.filter(|raw| is_zero(*raw))?;

        let mut room = self.log_room_at_once(1)?;
        let wanted = |_, raw| is_zero(raw);
        let Attempt::Claimed(claim) = self.tables.try_claim(cluster, 1, wanted) else {
            return None;
        };
        let fresh = self.alloc.as_ref()?.allocate_at_once(io, 1)?;
        if !self.fresh_reads_zero(&fresh) {
            fresh.give_back_untouched();
            return None;
        }
        // Zeros become zeros: nobody can tell when, so nobody waits for the write that follows.
        let host = self.publish_fresh(io, &mut room, claim, fresh, false);
        Some(HostOffset(host.0 + skip))
    }
}
