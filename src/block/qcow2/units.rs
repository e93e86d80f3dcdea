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

/// Entries of an L2 slice: the piece of an L2 table that is loaded and written at once.
pub const SLICE_ENTRIES: usize = 512;

/// Sizes that follow from `cluster_bits` and `refcount_order` of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
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

    /// log2 of the entries of an L2 table (a cluster of 8-byte entries).
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3
    }

    /// log2 of the entries of an L2 slice: [`SLICE_ENTRIES`], or a whole table where that is less.
    pub fn slice_bits(&self) -> u32 {
        self.l2_bits().min(SLICE_ENTRIES.trailing_zeros())
    }

    /// Bytes of an L2 slice in the file.
    pub fn slice_bytes(&self) -> u64 {
        8 << self.slice_bits()
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
