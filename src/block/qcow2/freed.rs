//! Host clusters on their way from an entry that was replaced to limbo.

use super::Qcow2;
use super::entry::{Entry, decode};
use super::units::HostCluster;
use crate::reactor::Io;

/// Host clusters that entries have stopped pointing at.
#[derive(Default)]
pub(super) struct Freed {
    runs: Vec<(HostCluster, u64)>,
}

impl Freed {
    /// Takes the clusters of an entry that is being replaced.
    pub(super) fn note(&mut self, image: &Qcow2, raw: u64) {
        let g = &image.tables.geometry;
        match decode(raw, g) {
            // Nobody counts references to them.
            Entry::Data { .. } | Entry::Zero { .. } if g.data_file => {}
            Entry::Data { host, .. }
            | Entry::Zero {
                host: Some(host), ..
            } => {
                let cluster = g.host_cluster(host);
                match self.runs.last_mut() {
                    Some((first, count)) if first.0 + *count == cluster.0 => *count += 1,
                    _ => self.runs.push((cluster, 1)),
                }
            }
            // Several compressed clusters may share one: each gives back its own reference.
            Entry::Compressed(data) => {
                image.inflated.forget(data);
                self.runs.push(data.clusters(g));
            }
            Entry::Unallocated
            | Entry::Zero { host: None, .. }
            | Entry::Incomplete(_)
            | Entry::Bad => {}
        }
    }

    /// Gives them to limbo. After the entries that replaced them were published and marked dirty.
    pub(super) fn free(self, image: &Qcow2, io: &Io) {
        if let Some(alloc) = &image.alloc {
            for (first, count) in self.runs {
                alloc.free(io, first, count);
            }
        }
    }
}
