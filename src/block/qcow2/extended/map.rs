//! From the guest's offset to where its bytes are, by subcluster.

use super::super::Qcow2;
use super::super::map::{Extent, Found};
use super::super::slice::Slice;
use super::super::target::Target;
use super::super::units::{Geometry, GuestCluster, GuestOffset, HostOffset};
use super::entry::{Host, Pair, Subclusters};

/// Where a range begins, and how far a lookup may go.
struct Start {
    cluster: GuestCluster,
    /// The range's first byte, in the cluster.
    skip: u64,
    /// The subcluster of that byte, in the cluster.
    subcluster: u32,
    /// Clusters that the range touches, in the slice.
    clusters: u64,
}

/// Distance of a cluster from the first, in the file, where they lie in a row.
fn nth(g: &Geometry, host: HostOffset, n: u64) -> HostOffset {
    HostOffset(host.0 + (n << g.cluster_bits))
}

impl Qcow2 {
    fn start(&self, offset: u64, len: u64) -> Start {
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let skip = g.in_cluster(offset);
        Start {
            cluster,
            skip,
            subcluster: (skip >> g.subcluster_bits()) as u32,
            clusters: g
                .clusters(skip + len)
                .min(self.tables.left_in_slice(cluster)),
        }
    }

    /// [`Qcow2::lookup`] for an image with extended L2 entries.
    #[inline]
    pub(in crate::block::qcow2) fn lookup_extended(&self, offset: u64, len: u64) -> Found {
        let g = &self.tables.geometry;
        let start = self.start(offset, len);
        let place = self.tables.place(start.cluster);
        let found = self.tables.with(place.slice, |slice| {
            slice.touch();
            let first = Pair::look(slice, place.at, g);
            let run = Run {
                slice,
                at: place.at,
                start: &start,
                first,
                g,
            };
            let bit = 1 << start.subcluster;
            Found::Extent(match first.host {
                Host::Bad => return Found::Bad(start.cluster),
                Host::Compressed(data) => Extent::Compressed {
                    data,
                    skip: start.skip,
                    len: (g.cluster_size() - start.skip).min(len),
                },
                Host::At { host, .. } if first.allocated & bit != 0 => Extent::Data {
                    host: HostOffset(host.0 + start.skip),
                    len: run
                        .bytes(|n, next| match next.is_at(nth(g, host, n)) {
                            true => next.allocated,
                            false => 0,
                        })
                        .min(len),
                },
                Host::None | Host::At { .. } if first.below() & bit != 0 && self.has_backing => {
                    Extent::Backing {
                        len: run
                            .bytes(|_, next| match next.host {
                                Host::None | Host::At { .. } => next.below(),
                                Host::Compressed(_) | Host::Bad => 0,
                            })
                            .min(len),
                    }
                }
                Host::None | Host::At { .. } => Extent::Zero {
                    len: run.bytes(|_, next| self.zeros(next)).min(len),
                },
            })
        });
        match found {
            Some(found) => found,
            None if self.tables.slice_offset(place.slice).is_some() => Found::Missing(place.slice),
            None => {
                let left = self.tables.left_in_table(start.cluster) << g.cluster_bits;
                Found::Extent(self.unallocated((left - start.skip).min(len)))
            }
        }
    }

    /// [`Qcow2::target`] for an image with extended L2 entries.
    #[inline]
    pub(in crate::block::qcow2) fn target_extended(&self, offset: u64, len: u64) -> Target {
        let g = &self.tables.geometry;
        let start = self.start(offset, len);
        let place = self.tables.place(start.cluster);
        let found = self.tables.with(place.slice, |slice| {
            slice.touch();
            let first = Pair::look(slice, place.at, g);
            match first.host {
                Host::Bad => Target::Bad(start.cluster),
                Host::At { host, copied: true } if first.allocated >> start.subcluster & 1 == 1 => {
                    let run = Run {
                        slice,
                        at: place.at,
                        start: &start,
                        first,
                        g,
                    };
                    let bytes = run.bytes(|n, next| match next.is_ours_at(nth(g, host, n)) {
                        true => next.allocated,
                        false => 0,
                    });
                    Target::InPlace {
                        host: HostOffset(host.0 + start.skip),
                        len: bytes.min(len),
                    }
                }
                _ => Target::Claim,
            }
        });
        match found {
            Some(target) => target,
            None if self.tables.slice_offset(place.slice).is_some() => Target::Missing(place.slice),
            None => Target::NoTable(place.slice),
        }
    }

    /// The subclusters that show zeros, whatever the layer below holds.
    #[inline]
    pub(super) fn zeros(&self, pair: &Pair) -> Subclusters {
        match pair.host {
            Host::None | Host::At { .. } if self.has_backing => pair.zero,
            Host::None | Host::At { .. } => !pair.allocated,
            Host::Compressed(_) | Host::Bad => 0,
        }
    }
}

/// Pairs in a row, from a range's first on.
struct Run<'a> {
    slice: &'a Slice,
    at: usize,
    start: &'a Start,
    /// Looked at already: it may have changed since.
    first: Pair,
    g: &'a Geometry,
}

impl Run<'_> {
    /// Bytes from the start on, in subclusters in a row that are in the masks of their clusters. `mask` gets
    /// a cluster's distance from the first.
    #[inline]
    fn bytes(&self, mask: impl Fn(u64, &Pair) -> Subclusters) -> u64 {
        let mut end = u64::from(self.start.subcluster);
        let mut pair = self.first;
        for n in 0..self.start.clusters {
            let from = if n == 0 { self.start.subcluster } else { 0 };
            if n > 0 {
                pair = Pair::look(self.slice, self.at + n as usize, self.g);
            }
            let count = (mask(n, &pair) >> from).trailing_ones();
            end += u64::from(count);
            if from + count < Subclusters::BITS {
                break;
            }
        }
        (end << self.g.subcluster_bits()).saturating_sub(self.start.skip)
    }
}
