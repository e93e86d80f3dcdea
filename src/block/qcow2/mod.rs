//! qcow2 images: reading, writing and what makes both safe.
//!
//! QEMU's `docs/interop/qcow2.rst` is the format's document; each module names the sections it follows.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`units`], [`header`], `entry` | the format's numbers, header and table entries |
//! | `code`, `slice`, `marks`, `room`, `l1`, `tables` | the L1 table and the cache of L2 slices: lock-free to look at |
//! | `map`, `compressed`, `inflated` | reading: from the guest's offset to where its bytes are |
//! | `claim`, `target`, `write`, `first`, `discard` | changing: one claimed run of clusters after another |
//! | `cow`, `record`, `fill` | copy-on-write, put off until it must be done |
//! | `copied` | copy-on-read: what a hole shows becomes the image's own |
//! | `extended` | reading and changing images whose clusters have subclusters |
//! | `data_file` | guest data in a file of its own |
//! | `encrypted` | where the LUKS header is, and what is not encrypted |
//! | `alloc`, `fresh`, `freed`, `refill`, `arena`, `limbo` | host clusters: handed out, made ready, freed |
//! | `leaks` | what a crash has leaked, given back while the image is in use |
//! | `reftable`, `refcount` | the refcount table, its blocks and their entries |
//! | `resize` | another size of the disk |
//! | [`bitmaps`] | persistent bitmaps: kept up while the image is written to |
//! | [`snapshots`] | internal snapshots: what they need, and tables that become ours alone |
//! | [`check`] | counting references, as `qemu-img check` does |
//! | [`repair`] | making refcounts and COPIED flags what the references say |
//! | `damage` | metadata found to be wrong while the image is in use |
//! | `flush` | from memory to the file, in the order that survives a power loss |
//! | `journal` | what is in memory only, kept where it survives this process |

mod alloc;
mod arena;
mod below;
pub mod bitmaps;
pub mod check;
mod claim;
mod code;
mod compressed;
mod copied;
mod cow;
mod damage;
mod data_file;
mod discard;
mod encrypted;
mod entry;
mod extended;
mod fill;
mod first;
mod flush;
mod freed;
mod fresh;
pub mod header;
mod inflated;
mod journal;
mod l1;
mod leaks;
mod limbo;
mod map;
mod marks;
mod open;
mod record;
mod refcount;
mod refill;
mod reftable;
pub mod repair;
mod resize;
pub(in crate::block) mod room;
mod runs;
mod slice;
pub mod snapshots;
mod tables;
mod target;
pub mod units;
mod write;

#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

pub use alloc::Allocator;
pub use below::Below;
pub use entry::Compressed;
pub use fresh::Fresh;
pub use header::{BackingName, Header};
pub(in crate::block) use journal::is_empty as journal_is_empty;
pub use map::Extent;
pub use open::Options;
pub use repair::OnDirty;
pub use units::{Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset};

use super::error::Result;
use super::storage::Storage;
use crate::reactor::Io;
use bitmaps::Upkeep;
use flush::Flushes;
use inflated::Inflated;
use journal::Journal;
use record::Records;
use tables::Tables;

/// An open image. Requests run on any thread's [`crate::reactor::Io`] of one epoch domain at the same time;
/// each holds a [`crate::reactor::Pin`] from its beginning to its end.
#[derive(Debug)]
pub struct Qcow2 {
    /// The image file: metadata, and compressed clusters.
    storage: Arc<Storage>,
    /// Where guest data lies: the image file, as it is or deciphered, or an external data file.
    data: Arc<Storage>,
    header: Header,
    /// Incomplete clusters. They keep slices in memory: dropped before the tables.
    records: Records,
    tables: Tables,
    /// None: opened read-only.
    alloc: Option<Arc<Allocator>>,
    has_backing: bool,
    /// The bitmaps that follow what is written; none for most images.
    bitmaps: Option<Box<Upkeep>>,
    flushes: Flushes,
    /// What is published and not written, for the process after this one.
    journal: OnceLock<Journal>,
    inflated: Inflated,
    /// Of images with extended L2 entries: what is being changed.
    reservations: extended::Reservations,
    /// Held by who makes an L2 table, copies a shared one, or moves the L1 table.
    new_table: async_lock::Mutex<()>,
    /// Held by who changes the disk's size.
    resizing: async_lock::Mutex<()>,
    /// Opened read-only, or found to be corrupt since.
    refuse_writes: AtomicBool,
}

impl Qcow2 {
    /// Bytes of the virtual disk.
    #[inline]
    pub fn size(&self) -> u64 {
        self.tables.size()
    }

    /// See [`crate::block::ActiveDisk::join`].
    pub(in crate::block) fn join(&self, io: &Io) {
        self.storage.join(io);
        self.data.join(io);
    }

    /// The header as it was at opening.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where [`Extent::Data`] is found.
    #[inline]
    pub fn data(&self) -> &Storage {
        &self.data
    }

    /// To be called before the bytes of a range change: notes it in the bitmaps, if there are some.
    #[inline]
    async fn note_change(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        match &self.bitmaps {
            None => Ok(()),
            Some(bitmaps) => bitmaps.note(io, &self.storage, offset, len).await,
        }
    }

    /// True if guest data lies in a file of its own.
    pub(super) fn has_data_file(&self) -> bool {
        self.header.data_file.is_some()
    }

    /// True if new clusters read as the guest's zeros, durably, where nothing was written to them. Zeros
    /// in the file are not that where they are taken for ciphertext.
    pub(crate) fn fresh_reads_zero(&self, fresh: &Fresh<'_>) -> bool {
        fresh.zeroed() && self.header.encryption == header::Encryption::None
    }
}
