//! The configuration space (section 5.2.4, `struct virtio_blk_config`).

use std::mem::offset_of;

use thiserror::Error;
use virtio_bindings::virtio_blk::virtio_blk_config;

use super::features::{CONFIG_WCE, FLUSH, seg_max};
use super::{DeviceLimits, SECTOR_SIZE};

/// Size of the structure, the zoned part included.
const CONFIG_SIZE: usize = size_of::<virtio_blk_config>();

/// The rust-vmm frontends address the configuration space from here on, QEMU from 0. The structure is
/// shorter than this, so there is no doubt which is meant.
const OTHER_BASE: u32 = 0x100;
const _: () = assert!(CONFIG_SIZE < OTHER_BASE as usize);

/// The longest read that is answered, in bytes: the whole space a vhost-user message can name.
const MAX_READ: u32 = 0x1000;

/// What is wrong with the disk's shape or with an access to its configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Not a power of two from 512 to 4096.
    #[error("logical block size {0} is not 512, 1024, 2048 or 4096")]
    BlockSize(u32),
    /// Not a power of two, or smaller than the logical block, or 2^256 times as large.
    #[error(
        "physical block size {physical} is not a power of two of at least {logical}, the logical one"
    )]
    PhysicalBlockSize {
        /// Physical block size in bytes.
        physical: u32,
        /// Logical block size in bytes.
        logical: u32,
    },
    /// Not a multiple of the block size, or too large for its field.
    #[error(
        "{field} of {bytes} bytes is not a multiple of the block size {block_size}, or too large"
    )]
    IoSize {
        /// Which field.
        field: &'static str,
        /// Its value in bytes.
        bytes: u32,
        /// Logical block size in bytes.
        block_size: u32,
    },
    /// A device needs a queue.
    #[error("a disk needs at least one queue")]
    NoQueue,
    /// A read outside the configuration space.
    #[error("read of {len} bytes at {offset:#x} of the configuration space")]
    Read {
        /// Offset in bytes.
        offset: u32,
        /// Length in bytes.
        len: u32,
    },
    /// A write to anything but `writeback`.
    #[error(
        "write of {len} bytes at {offset:#x} of the configuration space: only `writeback` can be written"
    )]
    NotWritable {
        /// Offset in bytes.
        offset: u32,
        /// Length in bytes.
        len: usize,
    },
    /// `writeback` is 0 or 1.
    #[error("write of {0} to `writeback`, which is 0 or 1")]
    BadWriteback(u8),
}

/// What the guest is told about good I/O sizes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Topology {
    /// Physical block size; 0 for the logical one.
    pub physical_block_size: u32,
    /// Suggested smallest I/O; 0 for none.
    pub min_io_size: u32,
    /// Suggested largest I/O; 0 for none.
    pub opt_io_size: u32,
}

/// The configuration space of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    bytes: [u8; CONFIG_SIZE],
    block_size: u32,
}

impl DeviceConfig {
    /// The configuration space of a disk with `num_queues` queues of up to `queue_size` descriptors.
    /// `write_cache` is the cache mode it starts with: write-back or write-through.
    ///
    /// A capacity that is no multiple of the block size is rounded down, see
    /// [`DeviceLimits::usable_capacity`]; whoever opens the disk says so to the user.
    ///
    /// # Errors
    /// Sizes that the structure cannot tell.
    pub fn new(
        limits: &DeviceLimits,
        topology: &Topology,
        num_queues: u16,
        queue_size: u16,
        write_cache: bool,
    ) -> Result<Self, ConfigError> {
        let block_size = limits.block_size;
        if !block_size.is_power_of_two() || !(512..=4096).contains(&block_size) {
            return Err(ConfigError::BlockSize(block_size));
        }
        let physical = match topology.physical_block_size {
            0 => block_size,
            size if size.is_power_of_two() && size >= block_size => size,
            physical => {
                return Err(ConfigError::PhysicalBlockSize {
                    physical,
                    logical: block_size,
                });
            }
        };
        let blocks = |field, bytes: u32, max: u32| {
            if bytes % block_size == 0 && bytes / block_size <= max {
                Ok(bytes / block_size)
            } else {
                Err(ConfigError::IoSize {
                    field,
                    bytes,
                    block_size,
                })
            }
        };
        let min_io = blocks("min_io_size", topology.min_io_size, u32::from(u16::MAX))?;
        let opt_io = blocks("opt_io_size", topology.opt_io_size, u32::MAX)?;
        if num_queues == 0 {
            return Err(ConfigError::NoQueue);
        }

        let mut config = Self {
            bytes: [0; CONFIG_SIZE],
            block_size,
        };
        let exponent = (physical / block_size).trailing_zeros() as u8;
        config.put32(offset_of!(virtio_blk_config, seg_max), seg_max(queue_size));
        config.put32(offset_of!(virtio_blk_config, blk_size), block_size);
        config.bytes[offset_of!(virtio_blk_config, physical_block_exp)] = exponent;
        config.put16(offset_of!(virtio_blk_config, min_io_size), min_io as u16);
        config.put32(offset_of!(virtio_blk_config, opt_io_size), opt_io);
        config.put16(offset_of!(virtio_blk_config, num_queues), num_queues);
        config.put32(
            offset_of!(virtio_blk_config, max_discard_sectors),
            sectors(limits.max_discard_bytes),
        );
        config.put32(
            offset_of!(virtio_blk_config, max_discard_seg),
            limits.max_discard_segments,
        );
        // The alignment is never finer than a block.
        config.put32(
            offset_of!(virtio_blk_config, discard_sector_alignment),
            limits.discard_alignment.max(block_size) / SECTOR_SIZE as u32,
        );
        config.put32(
            offset_of!(virtio_blk_config, max_write_zeroes_sectors),
            sectors(limits.max_write_zeroes_bytes),
        );
        config.put32(
            offset_of!(virtio_blk_config, max_write_zeroes_seg),
            limits.max_write_zeroes_segments,
        );
        config.bytes[offset_of!(virtio_blk_config, write_zeroes_may_unmap)] =
            u8::from(limits.write_zeroes_may_unmap);
        config.set_capacity(limits);
        config.set_write_cache(write_cache);
        Ok(config)
    }

    fn put16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// The disk was resized. `true` when the guest sees another capacity and must be told.
    pub fn set_capacity(&mut self, limits: &DeviceLimits) -> bool {
        let capacity = (limits.usable_capacity() / SECTOR_SIZE).to_le_bytes();
        let at = offset_of!(virtio_blk_config, capacity);
        let field = &mut self.bytes[at..at + 8];
        let changed = field != capacity;
        field.copy_from_slice(&capacity);
        changed
    }

    /// The capacity that the guest sees, in bytes.
    pub fn capacity_bytes(&self) -> u64 {
        let at = offset_of!(virtio_blk_config, capacity);
        let mut field = [0; 8];
        field.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_le_bytes(field) * SECTOR_SIZE
    }

    /// The `writeback` field: a write-back cache (true) or a write-through one. It is kept over
    /// resets of the device.
    pub fn write_cache(&self) -> bool {
        self.bytes[offset_of!(virtio_blk_config, wce)] != 0
    }

    /// Sets the `writeback` field.
    pub fn set_write_cache(&mut self, on: bool) {
        self.bytes[offset_of!(virtio_blk_config, wce)] = u8::from(on);
    }

    /// The driver acknowledged these features. One that can switch the cache but cannot flush starts
    /// with a write-through cache (section 5.2.5.2).
    pub fn negotiated(&mut self, features: u64) {
        if features & (CONFIG_WCE | FLUSH) == CONFIG_WCE {
            self.set_write_cache(false);
        }
    }

    /// `len` bytes at `offset`, exactly so many: what lies beyond the structure reads as zeros, since
    /// a frontend asks for the size of the structure it knows.
    ///
    /// # Errors
    /// More than a vhost-user message can name.
    pub fn read(&self, offset: u32, len: u32) -> Result<Vec<u8>, ConfigError> {
        if offset > MAX_READ || len > MAX_READ {
            return Err(ConfigError::Read { offset, len });
        }
        let start = normalize(offset);
        let mut answer = vec![0; len as usize];
        let known = self.bytes.get(start..).unwrap_or_default();
        let count = known.len().min(answer.len());
        answer[..count].copy_from_slice(&known[..count]);
        Ok(answer)
    }

    /// The driver writes. Gives the cache mode that is now set.
    ///
    /// # Errors
    /// Anything but one byte, 0 or 1, in `writeback`. Nothing has changed then.
    pub fn write(&mut self, offset: u32, data: &[u8]) -> Result<bool, ConfigError> {
        match data {
            [value] if normalize(offset) == offset_of!(virtio_blk_config, wce) => {
                if *value > 1 {
                    return Err(ConfigError::BadWriteback(*value));
                }
                self.set_write_cache(*value == 1);
                Ok(*value == 1)
            }
            _ => Err(ConfigError::NotWritable {
                offset,
                len: data.len(),
            }),
        }
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }
}

/// Where the write cache's mode is (`writeback`): one byte, 1 with a cache.
pub const WRITE_CACHE_OFFSET: u32 = offset_of!(virtio_blk_config, wce) as u32;

/// An offset in the structure, whichever way the frontend counts.
fn normalize(offset: u32) -> usize {
    offset.checked_sub(OTHER_BASE).unwrap_or(offset) as usize
}

fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR_SIZE).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
