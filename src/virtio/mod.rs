//! What the guest sees: its memory, the rings, virtio-blk requests, the configuration space.
//!
//! Nothing here knows the storage stack, io_uring or the vhost-user socket. The guest is hostile:
//! whatever bytes it puts in a ring, a table or a header end in an error value.
//!
//! Guest memory is shared with a running machine, so it is only ever touched through volatile or
//! atomic accesses on raw pointers; no reference to it is ever made, and each field that decides
//! anything is read once.

pub mod blk;
pub mod dirty;
pub mod inflight;
pub mod memory;
pub mod ring;

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod hostile;
