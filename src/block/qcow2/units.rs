//! Units of the format: offsets and clusters of the guest's disk and of the image file, and the sizes
//! that follow from the header.

/// A byte's place on the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte's place in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// A cluster of the virtual disk, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// A cluster of the image file, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// Entries of an L2 slice, at most: the piece of an L2 table, 4 KiB, that is loaded and written at once.
/// Extended entries are twice as large, and a slice has half as many.
pub const SLICE_ENTRIES: usize = 512;
/// Subclusters of a cluster in an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// Sizes that follow from `cluster_bits`, `refcount_order` and the extended L2 bit of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
    /// L2 entries have 128 bits: an entry and the bitmap of its subclusters.
    pub extended_l2: bool,
    /// Guest data lies in a file of its own: offset 0 is as good as any other.
    pub data_file: bool,
}

impl Geometry {
    /// Bytes a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Width of a refcount, in bits.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts in a refcount block (a cluster).
    pub fn refcount_block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// log2 of the bytes of an L2 entry: 3, or 4 for extended ones.
    #[inline]
    pub fn entry_bits(&self) -> u32 {
        3 + u32::from(self.extended_l2)
    }

    /// log2 of the entries of an L2 table, which is a cluster.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    /// log2 of the entries of an L2 slice: 4 KiB of them, or a whole table where that is less.
    pub fn slice_bits(&self) -> u32 {
        let most = (SLICE_ENTRIES * 8).trailing_zeros() - self.entry_bits();
        self.l2_bits().min(most)
    }

    /// Bytes of an L2 slice in the file.
    pub fn slice_bytes(&self) -> u64 {
        1 << (self.slice_bits() + self.entry_bits())
    }

    /// log2 of the bytes of a subcluster; meaningful with extended L2 entries.
    pub fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - SUBCLUSTERS.trailing_zeros()
    }

    /// The subcluster that holds a byte of the virtual disk, counted from the disk's beginning;
    /// meaningful with extended L2 entries.
    pub fn subcluster(&self, offset: GuestOffset) -> u64 {
        offset.0 >> self.subcluster_bits()
    }

    /// Bytes of the virtual disk that one L2 table maps.
    pub fn l2_span(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Clusters that `bytes` need.
    pub fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Offset inside its cluster.
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// True for a multiple of the cluster size.
    pub fn is_aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// The cluster that holds a byte of the virtual disk.
    pub fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// The cluster that holds a byte of the file.
    pub fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// First byte of a cluster of the file.
    pub fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }
}
