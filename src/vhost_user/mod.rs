//! The control plane: one connection with a VMM over a vhost-user socket.
//!
//! The messages and their meaning are those of QEMU's `docs/interop/vhost-user.rst`. A [`Connection`]
//! looks at each message before the `vhost` crate parses it, the session keeps the state (features,
//! memory table, rings), and the disk behind it is a [`Device`]. A VMM is trusted no more than a guest:
//! whatever it sends ends in an error reply or in the end of its connection.

mod blk;
mod channel;
mod config;
mod connection;
mod device;
pub mod handover;
mod listener;
mod memory;
mod peek;
mod postcopy;
mod rings;
mod session;
pub mod sigbus;

pub use connection::{Connection, ConnectionError, Progress};
pub use device::{Device, Paused, Resized, RingStart};
pub use listener::{Listen, ListenError, Listener, Source, systemd_sockets};

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
