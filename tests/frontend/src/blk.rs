//! virtio-blk as the driver sees it: requests, segments, and the configuration space.

/// Bytes of a sector, the protocol's only unit.
pub const SECTOR: u64 = 512;

/// Request types.
#[allow(missing_docs)]
pub mod request_type {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const GET_LIFETIME: u32 = 10;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
    pub const ZONE_REPORT: u32 = 16;
}

/// Status bytes.
#[allow(missing_docs)]
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
    /// What this driver puts there before a request: the device has not written it.
    pub const UNTOUCHED: u8 = 0xff;
}

/// The flag of a write-zeroes segment that allows deallocation.
pub const SEGMENT_UNMAP: u32 = 1;

/// The sixteen bytes that a request starts with.
pub fn header(request_type: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&request_type.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub num_sectors: u32,
    /// Flags; bit 0 is UNMAP, the rest reserved.
    pub flags: u32,
}

impl Segment {
    /// A range without flags.
    pub fn new(sector: u64, num_sectors: u32) -> Self {
        Self {
            sector,
            num_sectors,
            flags: 0,
        }
    }

    /// The same with UNMAP.
    pub fn unmap(self) -> Self {
        self.with_flags(SEGMENT_UNMAP)
    }

    /// The same with any flags.
    pub fn with_flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    /// The sixteen bytes of the segment.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.num_sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// Length of `struct virtio_blk_config` up to and with the write-zeroes fields.
pub const CONFIG_LEN: u32 = 60;
/// Offset of the one byte a driver may write.
pub const CONFIG_WRITEBACK: u32 = 32;

/// The configuration space, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Config {
    /// In sectors of 512 bytes.
    pub capacity: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub blk_size: u32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: u16,
    pub opt_io_size: u32,
    pub writeback: u8,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: u8,
}

impl Config {
    /// Parses the bytes from offset 0; fields past the end read as zero.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut b = [0u8; CONFIG_LEN as usize];
        let n = bytes.len().min(b.len());
        b[..n].copy_from_slice(&bytes[..n]);
        let u16_at = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        Self {
            capacity: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            size_max: u32_at(8),
            seg_max: u32_at(12),
            // 16..20 is the geometry.
            blk_size: u32_at(20),
            physical_block_exp: b[24],
            alignment_offset: b[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: b[32],
            // 33 is padding.
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: b[56],
        }
    }
}
