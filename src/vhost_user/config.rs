//! The messages about the device's configuration space.

use super::device::Device;

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

/// Writes to the configuration space.
pub(super) fn write(device: &dyn Device, offset: u32, data: &[u8]) -> Result<(), String> {
    device.set_config(normalized(offset), data)
}
