//! Pairs of an L2 entry and a bitmap: bits to meaning and back.

use super::super::entry::{self, Compressed, Entry};
use super::super::slice::Slice;
use super::super::units::{Geometry, HostOffset};

/// A bit for each subcluster of a cluster.
pub(super) type Subclusters = u32;

/// All subclusters of a cluster.
pub(super) const ALL: Subclusters = Subclusters::MAX;

/// Where the bits "reads as zeros" begin in a bitmap; those below say "allocated".
const ZERO_SHIFT: u32 = 32;

/// What the entry of a pair says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// No host cluster.
    None,
    /// A host cluster; the bitmap says what of it counts.
    At { host: HostOffset, copied: bool },
    /// Deflated data, of the cluster as a whole.
    Compressed(Compressed),
    /// Not to be used.
    Bad,
}

/// A pair. What is neither allocated nor zero shows the backing file, or zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// The entry as it is.
    pub(super) raw: u64,
    pub(super) host: Host,
    pub(super) allocated: Subclusters,
    pub(super) zero: Subclusters,
}

impl Pair {
    /// An entry's and its bitmap's meaning.
    #[inline]
    pub(super) fn new(raw: u64, bitmap: u64, g: &Geometry) -> Self {
        Self {
            raw,
            host: match entry::decode(raw, g) {
                Entry::Data { host, copied } => Host::At { host, copied },
                Entry::Unallocated => Host::None,
                Entry::Compressed(data) => Host::Compressed(data),
                // Its zero flag is one that an extended entry does not have.
                Entry::Zero { .. } | Entry::Incomplete(_) | Entry::Bad => Host::Bad,
            },
            allocated: bitmap as Subclusters,
            zero: (bitmap >> ZERO_SHIFT) as Subclusters,
        }
    }

    /// The pair of an entry in a slice.
    #[inline]
    pub(super) fn look(slice: &Slice, at: usize, g: &Geometry) -> Self {
        let (raw, bitmap) = slice.look(at);
        Self::new(raw, bitmap, g)
    }

    /// The bitmap.
    pub(super) fn bitmap(&self) -> u64 {
        u64::from(self.zero) << ZERO_SHIFT | u64::from(self.allocated)
    }

    /// The subclusters that show the layer below; meaningless for compressed clusters.
    #[inline]
    pub(super) fn below(&self) -> Subclusters {
        !(self.allocated | self.zero)
    }

    /// True if there is a host cluster, and it is the image's alone.
    pub(super) fn is_ours(&self) -> bool {
        matches!(self.host, Host::At { copied: true, .. })
    }

    /// True if the host cluster is exactly this one.
    #[inline]
    pub(super) fn is_at(&self, wanted: HostOffset) -> bool {
        matches!(self.host, Host::At { host, .. } if host == wanted)
    }

    /// True if the host cluster is exactly this one, and the image's alone.
    #[inline]
    pub(super) fn is_ours_at(&self, host: HostOffset) -> bool {
        self.host == Host::At { host, copied: true }
    }

    /// The same with other subclusters; those in neither show the layer below.
    pub(super) fn with(self, allocated: Subclusters, zero: Subclusters) -> Self {
        Self {
            allocated,
            zero,
            ..self
        }
    }
}

/// Do entry and bitmap go together? Whether the entry is well-formed by itself is not asked here.
pub(in crate::block::qcow2) fn is_well_formed(raw: u64, bitmap: u64, g: &Geometry) -> bool {
    let (allocated, zero) = (bitmap as Subclusters, (bitmap >> ZERO_SHIFT) as Subclusters);
    if entry::is_compressed(raw) {
        return bitmap == 0;
    }
    allocated & zero == 0 && (allocated == 0 || entry::has_host(raw, g))
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: true,
        data_file: false,
    };

    #[test]
    fn pairs_mean_what_the_format_says() {
        let pair = Pair::new(0x8000_0000_0005_0000, 0x0000_000c_0000_0003, &G);
        let host = HostOffset(0x50000);
        assert_eq!(pair.host, Host::At { host, copied: true });
        assert_eq!((pair.allocated, pair.zero, pair.below()), (3, 12, !15));
        assert_eq!(pair.bitmap(), 0x0000_000c_0000_0003);
        assert!(pair.is_ours_at(host) && !pair.is_ours_at(HostOffset(0x60000)));
        assert_eq!(Pair::new(0x50001, 0, &G).host, Host::Bad);
        assert_eq!(Pair::new(0, 1 << 32, &G).host, Host::None);
    }

    #[test]
    fn pairs_that_do_not_go_together_are_seen() {
        let compressed = 1 << 62 | 0x1234;
        for (raw, bitmap) in [
            (0, 0),
            (0, 1 << 63),
            (0x50000, 0),
            (0x50000, 0xffff_fffe_0000_0001),
            (compressed, 0),
        ] {
            assert!(is_well_formed(raw, bitmap, &G), "{raw:#x} {bitmap:#x}");
        }
        for (raw, bitmap) in [
            (0, 1),
            (0x50000, 1 << 32 | 1),
            (0x50000, u64::MAX),
            (compressed, 1),
            (compressed, 1 << 40),
        ] {
            assert!(!is_well_formed(raw, bitmap, &G), "{raw:#x} {bitmap:#x}");
        }
    }
}
