//! qcow2 images: reading, writing and what makes both safe.
//!
//! QEMU's `docs/interop/qcow2.rst` is the format's document; each module names the sections it follows.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`units`], [`header`], `entry` | the format's numbers, header and table entries |
//! | `slice`, `tables` | the L1 table and the cache of L2 slices: lock-free to look at |
//! | `map`, `compressed` | reading: from the guest's offset to where its bytes are |
//! | `claim`, `write`, `discard` | changing: one claimed run of clusters after another |
//! | `alloc`, `refill`, `arena`, `limbo` | host clusters: handed out, made ready, freed |
//! | `reftable`, `refcount` | the refcount table, its blocks and their entries |
//! | `flush` | from memory to the file, in the order that survives a power loss |

#[allow(dead_code)] // Writing uses it.
mod alloc;
mod arena;
mod below;
pub mod check;
mod compressed;
mod entry;
pub mod header;
mod limbo;
mod map;
mod open;
mod refcount;
mod refill;
mod reftable;
mod runs;
#[allow(dead_code)] // Writing uses the rest.
mod slice;
#[allow(dead_code)] // Writing uses the rest.
mod tables;
pub mod units;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use alloc::{Allocator, Fresh};
pub use below::Below;
pub use entry::Compressed;
pub use header::{BackingName, Header};
pub use limbo::Mark;
pub use map::Extent;
pub use open::Options;
pub use units::{Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset};

use super::storage::Storage;
use tables::Tables;

/// An open image. Requests run on any thread's [`crate::reactor::Io`] of one epoch domain at the same time;
/// each holds a [`crate::reactor::Pin`] from its beginning to its end.
#[derive(Debug)]
pub struct Qcow2 {
    storage: Arc<Storage>,
    header: Header,
    tables: Tables,
    has_backing: bool,
}

impl Qcow2 {
    /// Bytes of the virtual disk.
    #[inline]
    pub fn size(&self) -> u64 {
        self.tables.size()
    }

    /// The header as it was at opening.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The image file: where [`Extent::Data`] is found.
    #[inline]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }
}
