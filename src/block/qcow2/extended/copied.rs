//! Copy-on-read by subcluster.

use std::ops::Range;

use super::super::Qcow2;
use super::super::copied::Stored;
use super::super::journal::Room;
use super::super::units::{GuestCluster, GuestOffset, HostOffset};
use super::changes::Purpose;
use super::entry::{Host, Subclusters};
use super::write::{bits_in, clusters_of, whole};
use crate::block::error::Result;
use crate::reactor::{AlignedBuf, Io};

/// How a copy goes on.
enum Step<'a> {
    Give(super::changes::Reservation<'a>),
    Write(super::changes::Reservation<'a>, HostOffset),
    Is(Stored),
}

impl Qcow2 {
    /// Stores the part of a range of `bytes` that lies in the cluster at `offset`; one step on the way.
    pub(in crate::block::qcow2) async fn store_subclusters(
        &self,
        io: &Io,
        offset: u64,
        bytes: &mut AlignedBuf,
        range: Range<usize>,
        zeros: bool,
    ) -> Result<Stored> {
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let slice = self.tables.place(cluster).slice;
        if self.tables.shared_table(slice).is_some() {
            self.own_table(io, slice).await?;
        }
        let Some(mut room) = self.spare_log_room(io, 1).await? else {
            return Ok(Stored::Nothing);
        };
        let first = g.subcluster(GuestOffset(offset));
        let units = (range.len() as u64).div_ceil(1 << g.subcluster_bits());
        let wanted = first..(first + units).min(whole(cluster, 1).end);
        match self.copy_step(&mut room, cluster, wanted, zeros) {
            Step::Is(stored) => Ok(stored),
            Step::Give(reservation) => {
                self.give_hosts(io, &mut room, reservation).await?;
                Ok(Stored::Again)
            }
            Step::Write(reservation, host) => {
                let units = reservation.range();
                let len = ((units.end - units.start) << g.subcluster_bits()) as usize;
                let len = len.min(range.len());
                let part = bytes.sg().slice(range.start, len);
                self.data.write(io, host.0, part).await?;
                let Some(changes) = reservation.changes() else {
                    return Ok(Stored::Nothing);
                };
                for cluster in clusters_of(&units) {
                    let bits = bits_in(&units, cluster);
                    let old = changes.look(cluster);
                    let new = old.with(old.allocated | bits, old.zero);
                    changes.publish(&mut room, cluster, &new, true);
                }
                Ok(Stored::Bytes(len))
            }
        }
    }

    /// What comes next for subclusters of one cluster, with what it needs reserved. Zeros are done with it.
    fn copy_step(
        &self,
        room: &mut Room<'_>,
        cluster: GuestCluster,
        wanted: Range<u64>,
        zeros: bool,
    ) -> Step<'_> {
        let g = &self.tables.geometry;
        let Some(changes) = self.changes(self.tables.place(cluster).slice) else {
            return Step::Is(Stored::Again);
        };
        let pair = changes.look(cluster);
        // Those in a row, from the first on, that show the layer below and that nobody changes.
        let below = match pair.host {
            Host::None | Host::At { copied: true, .. } => pair.below(),
            Host::At { copied: false, .. } | Host::Compressed(_) | Host::Bad => 0,
        };
        let skip = (wanted.start % u64::from(Subclusters::BITS)) as u32;
        let in_a_row = u64::from((below >> skip).trailing_ones());
        let row = wanted.start..wanted.end.min(wanted.start + in_a_row);
        let row = changes.free(Purpose::Contents, &row);
        if row.is_empty() {
            return Step::Is(Stored::Nothing);
        }
        let bits = bits_in(&row, cluster);
        if zeros {
            changes.publish(
                room,
                cluster,
                &pair.with(pair.allocated, pair.zero | bits),
                false,
            );
            let len = (row.end - row.start) << g.subcluster_bits();
            return Step::Is(Stored::Bytes(len as usize));
        }
        let Host::At { host, .. } = pair.host else {
            let all = whole(cluster, 1);
            return match changes.free(Purpose::Host, &all) == all {
                true => Step::Give(changes.reserve(Purpose::Host, all)),
                false => Step::Is(Stored::Nothing),
            };
        };
        let host = HostOffset(host.0 + (u64::from(skip) << g.subcluster_bits()));
        Step::Write(changes.reserve(Purpose::Contents, row), host)
    }
}
