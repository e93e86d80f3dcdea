//! The messages about the device's configuration space.

use super::device::Device;
use crate::virtio::blk::config::WRITE_CACHE_OFFSET;

/// Where some front-ends believe the device's configuration to begin, after the header of a virtio-pci
/// legacy BAR (`VHOST_USER_CONFIG_OFFSET` of the `vhost` crate, which cloud-hypervisor passes).
const ODD_OFFSET: u32 = 0x100;

/// The offset within the configuration space that a front-end means by `offset`.
fn normalized(offset: u32) -> u32 {
    // A virtio-blk configuration is far shorter than 256 bytes: the two cannot be mixed up.
    offset.checked_sub(ODD_OFFSET).unwrap_or(offset)
}

/// Reads exactly `len` bytes: a VMM takes any other length for an error.
pub(super) fn read(device: &dyn Device, offset: u32, len: u32) -> Result<Vec<u8>, String> {
    let mut bytes = device.config(normalized(offset), len)?;
    bytes.resize(len as usize, 0);
    Ok(bytes)
}

/// Whether a read of `len` bytes at `offset` shows the capacity, which is the first field.
pub(super) fn has_capacity(offset: u32, len: u32) -> bool {
    normalized(offset) == 0 && len >= 8
}

/// The flags of a write that is part of a migration, and no driver's (vhost-user.rst, "Virtio device config
/// space").
const MIGRATION: u32 = 1;

/// Writes to the configuration space. In a migration a VMM may write all of it: that is accepted if nothing but
/// the write cache's mode would change.
pub(super) fn write(
    device: &dyn Device,
    offset: u32,
    flags: u32,
    data: &[u8],
) -> Result<(), String> {
    let offset = normalized(offset);
    let at = WRITE_CACHE_OFFSET.checked_sub(offset).map(|at| at as usize);
    let Some(at) = at.filter(|at| flags == MIGRATION && *at < data.len()) else {
        return device.set_config(offset, data);
    };
    let ours = read(device, offset, data.len() as u32)?;
    match (0..)
        .zip(data.iter().zip(&ours))
        .find(|(n, (a, b))| *n != at && a != b)
    {
        Some((n, _)) => Err(format!(
            "byte {} of the configuration is not what it is here",
            offset as usize + n
        )),
        None => device.set_config(WRITE_CACHE_OFFSET, &data[at..=at]),
    }
}
