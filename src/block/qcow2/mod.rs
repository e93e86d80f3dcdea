//! qcow2 images.
//!
//! QEMU's `docs/interop/qcow2.rst` is the format's document; each module names the sections it follows.

pub mod header;
pub mod units;

pub use header::{BackingName, Header};
pub use units::{Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset};
