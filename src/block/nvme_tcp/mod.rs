//! A remote disk: the host side of NVMe over TCP.
//!
//! One *namespace* is reached by one or several *paths*, an address each. A path has a thread of its own
//! (`controller`): it connects, keeps the association alive, listens to events, and connects again when it was
//! lost. All that blocks is done there. The workers do nothing but I/O: each has one queue, that is one TCP
//! connection, for each path, which the path's thread hands to it ready for use ([`link`]).
//!
//! [`wire`] encodes and decodes what the specifications lay down in bytes. [`machine`] is the host's side
//! of one connected I/O queue as a state machine without I/O: bytes in, bytes out, ends of commands out.
//!
//! Sections are cited as "TCP 3.3.2.1" (NVM Express TCP Transport Specification, revision 1.0),
//! "Base 3.3.3.1" (NVM Express Base Specification, revision 2.0 unless another is named) and
//! "NVM 4.1.5" (NVM Command Set Specification, revision 1.0).

pub mod auth;
pub mod controller;
pub mod discovery;
pub mod host;
pub mod link;
mod local;
pub mod machine;
mod queue;
pub(crate) mod remote;
pub(in crate::block) mod reservation;
pub mod secret;
#[cfg(test)]
mod secret_tests;
pub mod spec;
pub mod storage;
pub mod tls;
pub mod uri;
pub mod wire;

pub use storage::NvmeStorage;
