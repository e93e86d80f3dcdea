//! virtio-blk (section 5.2, "Block Device"): requests, feature bits, the configuration space.

pub mod config;
pub mod features;
pub mod request;

/// Bytes in a sector: the unit of the protocol, whatever the block size is (section 5.2.5).
pub const SECTOR_SIZE: u64 = 512;

/// What the disk can take. Requests are checked against it, feature bits and the configuration space
/// are made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Size of the disk in bytes. What does not fill a whole block at its end is not offered to the
    /// guest, see [`DeviceLimits::usable_capacity`].
    pub capacity_bytes: u64,
    /// Every request that would change the disk fails.
    pub read_only: bool,
    /// Logical block size in bytes: 512, 1024, 2048 or 4096. Requests need only be aligned to
    /// sectors of 512 bytes; the block size is a hint (section 5.2.5).
    pub block_size: u32,
    /// The longest range of a discard, in bytes. 0 when the disk cannot discard.
    pub max_discard_bytes: u64,
    /// The most ranges in one discard. Each is copied and checked before the first is executed, so a
    /// few hundred at most.
    pub max_discard_segments: u32,
    /// Discards are best aligned to this, in bytes. A hint.
    pub discard_alignment: u32,
    /// The longest range of a write-zeroes, in bytes. 0 when the disk cannot write zeroes.
    pub max_write_zeroes_bytes: u64,
    /// The most ranges in one write-zeroes.
    pub max_write_zeroes_segments: u32,
    /// Write-zeroes with the UNMAP flag may deallocate.
    pub write_zeroes_may_unmap: bool,
}

impl DeviceLimits {
    /// The capacity that the guest sees, in bytes: rounded down to whole blocks.
    #[inline]
    pub fn usable_capacity(&self) -> u64 {
        // The block size is a power of two, which `DeviceConfig::new` checks.
        let block = u64::from(self.block_size).max(SECTOR_SIZE);
        self.capacity_bytes & !(block - 1)
    }
}
