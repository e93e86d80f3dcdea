//! The memory table: what `SET_MEM_TABLE`, `ADD_MEM_REG` and `REM_MEM_REG` make of guest memory.
//!
//! A table is never changed in place. A message makes a new one out of the old, and the session puts it
//! in use once the running rings are known to lie in it.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;

use crate::virtio::memory::{GuestMemory, MemoryError, Region};

/// How many regions a VMM may have: what KVM offers on x86 (`KVM_CAP_NR_MEMSLOTS`), so that it is not us
/// who limit the hotplug of memory.
pub(super) const MAX_SLOTS: usize = 509;

/// Why a memory message was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("{0} memory regions are more than the {MAX_SLOTS} that were offered")]
    TooMany(usize),
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Region, MemoryError> {
    Region::map(
        file,
        region.mmap_offset,
        region.guest_phys_addr,
        region.user_addr,
        region.memory_size,
    )
}

/// A whole new table.
pub(super) fn replaced(
    regions: &[VhostUserMemoryRegion],
    files: Vec<File>,
) -> Result<Arc<GuestMemory>, TableError> {
    if regions.len() > MAX_SLOTS {
        return Err(TableError::TooMany(regions.len()));
    }
    let mapped = regions
        .iter()
        .zip(files)
        .map(|(region, file)| map(region, file))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(GuestMemory::new(mapped)?))
}

/// The table with one region more.
pub(super) fn added(
    table: &GuestMemory,
    region: &VhostUserMemoryRegion,
    file: File,
) -> Result<Arc<GuestMemory>, TableError> {
    let regions = table.regions().len() + 1;
    if regions > MAX_SLOTS {
        return Err(TableError::TooMany(regions));
    }
    Ok(Arc::new(table.with_region(map(region, file)?)?))
}

/// The table without one region, which its guest address, user address and size name; the offset into
/// its file is ignored (vhost-user.rst, `VHOST_USER_REM_MEM_REG`).
pub(super) fn removed(
    table: &GuestMemory,
    region: &VhostUserMemoryRegion,
) -> Result<Arc<GuestMemory>, TableError> {
    Ok(Arc::new(table.without_region(
        region.guest_phys_addr,
        region.user_addr,
        region.memory_size,
    )?))
}
