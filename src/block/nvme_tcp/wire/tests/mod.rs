//! Byte-exact vectors, derived from the figures of the specifications and checked against the layouts of
//! Linux (include/linux/nvme.h, nvme-tcp.h) and libnvme; and what is refused.

mod commands;
mod identify;
mod pdus;
mod statuses;

/// `bytes` at `at` of a zeroed structure.
fn put(structure: &mut [u8], at: usize, bytes: &[u8]) {
    structure[at..at + bytes.len()].copy_from_slice(bytes);
}
