//! L1 and L2 entries: bits to meaning and back.
//!
//! `docs/interop/qcow2.rst`, section "Cluster mapping".

use super::units::{Geometry, HostCluster, HostOffset};

/// The cluster (or L2 table) is referenced exactly once.
pub(super) const COPIED: u64 = 1 << 63;
/// A compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Reads as zeros, whatever the host cluster holds (version 3).
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In memory, for an entry that must not be used. No valid entry has both bits; what the file really
/// says is kept beside the slice.
pub(super) const BAD: u64 = COPIED | COMPRESSED;
/// In memory, with the number of an incomplete cluster's record in bits 9 to 32 ([`incomplete`]): see
/// `record`. No valid entry has all these bits.
pub(super) const INCOMPLETE: u64 = COPIED | COMPRESSED | 1 << 1;
/// The largest number of an incomplete cluster.
pub(super) const MAX_INCOMPLETE: u32 = (1 << 24) - 1;
/// The first bit of that number.
const INCOMPLETE_SHIFT: u32 = 9;

/// What an L2 entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// The backing file shows, or zeros.
    Unallocated,
    /// Reads as zeros; a host cluster may be reserved.
    Zero {
        host: Option<HostOffset>,
        copied: bool,
    },
    /// Plain data.
    Data { host: HostOffset, copied: bool },
    /// Deflated data.
    Compressed(Compressed),
    /// Some of it is in a new cluster; the record of this number knows.
    Incomplete(u32),
    /// Not to be used.
    Bad,
}

/// Where the deflated data of a cluster lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// First byte; aligned to nothing.
    pub(super) offset: HostOffset,
    /// Bytes up to the end of its last sector; the deflated data may end before.
    pub(super) bytes: u64,
}

impl Compressed {
    /// The host clusters it occupies a part of: first and count, 1 to 3. Each holds one reference
    /// for it.
    pub(super) fn clusters(&self, g: &Geometry) -> (HostCluster, u64) {
        let first = self.offset.0 >> g.cluster_bits;
        let last = (self.offset.0 + self.bytes - 1) >> g.cluster_bits;
        (HostCluster(first), last - first + 1)
    }
}

/// The marker of an incomplete cluster, by number: [`MAX_INCOMPLETE`] at most, else [`BAD`].
pub(super) fn incomplete(index: u32) -> u64 {
    if index > MAX_INCOMPLETE {
        return BAD;
    }
    INCOMPLETE | u64::from(index) << INCOMPLETE_SHIFT
}

/// The number of an incomplete cluster, if the entry is such a marker.
pub(super) fn incomplete_index(raw: u64) -> Option<u32> {
    let index = (raw >> INCOMPLETE_SHIFT) as u32 & MAX_INCOMPLETE;
    (incomplete(index) == raw).then_some(index)
}

/// True for what an entry can be in memory only: [`BAD`], and incomplete clusters.
#[cfg(test)]
pub(super) fn is_marker(raw: u64) -> bool {
    raw & BAD == BAD
}

/// An L2 entry's meaning.
#[inline]
pub(super) fn decode(raw: u64, g: &Geometry) -> Entry {
    if raw & COMPRESSED != 0 {
        if raw & COPIED != 0 {
            return incomplete_index(raw).map_or(Entry::Bad, Entry::Incomplete);
        }
        // Bits 0 to x-1 are the offset, x to 61 the number of further sectors.
        let x = 62 - (g.cluster_bits - 8);
        let offset = raw & ((1 << x) - 1);
        let sectors = (raw & !COMPRESSED) >> x;
        return Entry::Compressed(Compressed {
            offset: HostOffset(offset),
            bytes: (sectors + 1) * 512 - (offset & 511),
        });
    }
    let host = HostOffset(raw & OFFSET);
    let copied = raw & COPIED != 0;
    if raw & ZERO != 0 {
        Entry::Zero {
            host: (host.0 != 0).then_some(host),
            copied,
        }
    } else if host.0 != 0 || (copied && g.data_file) {
        Entry::Data { host, copied }
    } else {
        Entry::Unallocated
    }
}

/// True for the entry of a compressed cluster.
pub(super) fn is_compressed(raw: u64) -> bool {
    raw & COMPRESSED != 0
}

/// True if an entry that is not compressed has a host cluster.
pub(super) fn has_host(raw: u64, g: &Geometry) -> bool {
    raw & OFFSET != 0 || (g.data_file && raw & COPIED != 0)
}

/// True if the bits that must be 0 are, and the offset is a cluster's.
pub(super) fn is_well_formed(raw: u64, g: &Geometry, version: u32) -> bool {
    if raw & COMPRESSED != 0 {
        return raw & COPIED == 0 && !g.data_file;
    }
    // Extended entries have their zeros in the bitmap.
    let zero = if version >= 3 && !g.extended_l2 {
        ZERO
    } else {
        0
    };
    let offset = raw & OFFSET;
    raw & !(COPIED | OFFSET | zero) == 0
        && g.is_aligned(offset)
        && (offset != 0 || raw & COPIED == 0 || g.data_file)
}

/// The offset in an L1 entry; 0: no table.
pub(super) fn l1_offset(raw: u64) -> u64 {
    raw & OFFSET
}

/// True if an L1 entry's reserved bits are 0 and its offset is a cluster's.
pub(super) fn l1_is_well_formed(raw: u64, g: &Geometry) -> bool {
    raw & !(COPIED | OFFSET) == 0 && g.is_aligned(raw & OFFSET)
}

/// An L2 entry of a table that several L1 tables lead to: its cluster has as many references at least, so
/// the flag, where a damaged image has it, does not count. What is malformed stays so.
pub(super) fn shared(raw: u64) -> u64 {
    if raw & COMPRESSED != 0 || raw & OFFSET == 0 {
        return raw;
    }
    raw & !COPIED
}

/// True if an L1 entry leads to a table that other L1 tables lead to as well.
pub(super) fn is_shared_table(raw: u64) -> bool {
    raw & OFFSET != 0 && raw & COPIED == 0
}

/// The entry of a data cluster, or of a table, that is referenced once.
pub(super) fn data(host: HostOffset) -> u64 {
    host.0 | COPIED
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        data_file: false,
    };

    #[test]
    fn entries_mean_what_the_format_says() {
        let host = HostOffset(0x50000);
        assert_eq!(decode(0, &G), Entry::Unallocated);
        assert_eq!(decode(data(host), &G), Entry::Data { host, copied: true });
        assert_eq!(
            decode(0x50000, &G),
            Entry::Data {
                host,
                copied: false
            }
        );
        assert_eq!(
            decode(1, &G),
            Entry::Zero {
                host: None,
                copied: false
            }
        );
        assert_eq!(
            decode(data(host) | ZERO, &G),
            Entry::Zero {
                host: Some(host),
                copied: true
            }
        );
        // 64 KiB clusters: 54 bits of offset, 8 of sectors.
        let raw = COMPRESSED | 3 << 54 | 0x12_3456;
        let Entry::Compressed(c) = decode(raw, &G) else {
            panic!("compressed")
        };
        assert_eq!(c.offset, HostOffset(0x12_3456));
        assert_eq!(c.bytes, 4 * 512 - 0x56);
        assert_eq!(c.clusters(&G), (HostCluster(0x12), 1));
        let crossing = Compressed {
            offset: HostOffset(0x1_ff00),
            bytes: 0x200,
        };
        assert_eq!(crossing.clusters(&G), (HostCluster(1), 2));
    }

    #[test]
    fn markers_of_incomplete_clusters_are_never_taken_from_a_file() {
        for index in [0, 1, 0x1234, MAX_INCOMPLETE] {
            let raw = incomplete(index);
            assert_eq!(decode(raw, &G), Entry::Incomplete(index));
            assert!(!is_well_formed(raw, &G, 3));
        }
        assert_eq!(decode(BAD, &G), Entry::Bad);
        assert_eq!(incomplete_index(data(HostOffset(0x50000))), None);
    }

    #[test]
    fn in_a_data_file_offset_0_is_a_place_and_nothing_is_compressed() {
        let g = Geometry {
            data_file: true,
            ..G
        };
        let host = HostOffset(0);
        assert_eq!(decode(COPIED, &g), Entry::Data { host, copied: true });
        assert_eq!(decode(0, &g), Entry::Unallocated);
        assert!(is_well_formed(COPIED, &g, 3) && is_well_formed(COPIED | ZERO, &g, 3));
        assert!(!is_well_formed(COMPRESSED | 77, &g, 3));
    }

    #[test]
    fn entries_of_a_shared_table_lose_the_flag_and_stay_as_malformed_as_they_are() {
        assert_eq!(shared(COPIED | 0x50000), 0x50000);
        assert_eq!(shared(COPIED | 0x50001), 0x50001);
        for same in [0, 1, 0x50000, COMPRESSED | 77, COPIED, BAD, BAD | 77] {
            assert_eq!(shared(same), same, "{same:#x}");
        }
        assert!(is_shared_table(0x50000));
        assert!(!is_shared_table(COPIED | 0x50000) && !is_shared_table(0));
    }

    #[test]
    fn malformed_entries_are_seen() {
        for good in [
            0,
            1,
            0x50000,
            COPIED | 0x50000,
            COPIED | 0x50001,
            COMPRESSED | 77,
        ] {
            assert!(is_well_formed(good, &G, 3), "{good:#x}");
        }
        for bad in [
            COPIED,
            BAD,
            0x50200,
            0x50002,
            1 << 56,
            COPIED | COMPRESSED | 77,
        ] {
            assert!(!is_well_formed(bad, &G, 3), "{bad:#x}");
        }
        assert!(!is_well_formed(1, &G, 2), "version 2 has no zero flag");
    }
}
