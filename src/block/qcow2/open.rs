//! Opening an image: from a checked header to tables that serve requests.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use super::Qcow2;
use super::alloc::Allocator;
use super::bitmaps::Upkeep;
use super::data_file;
use super::extended::Reservations;
use super::flush::Flushes;
use super::header::{Header, incompatible};
use super::inflated::Inflated;
use super::record::Records;
use super::repair::{self, OnDirty};
use super::snapshots;
use super::tables::Tables;
use super::units::HostCluster;
use crate::block::error::Result;
use crate::block::storage::Storage;
use crate::reactor::Io;

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Never write to it.
    pub read_only: bool,
    /// Memory for L2 slices, in bytes; a few are kept whatever it says.
    pub l2_cache_bytes: u64,
    /// Workers that will use the image, besides the control thread ([`Io::worker`] 1 to this).
    pub workers: usize,
    /// There is a layer below: unallocated clusters show it. If not, they are zeros.
    pub has_backing: bool,
    /// What to do with an image that is to be written to and was not closed by its last writer.
    pub on_dirty: OnDirty,
}

impl Qcow2 {
    /// Opens the image of `header`, which was read from `storage` under the same lock.
    ///
    /// # Errors
    /// [`crate::block::error::ErrorKind::Unsupported`] for what must not be written to, those of
    /// [`repair::repair`] where the last writer did not close the image,
    /// [`crate::block::error::ErrorKind::Corrupt`] for tables that are not what they should be.
    pub async fn open(
        io: &Io,
        storage: Arc<Storage>,
        header: Header,
        options: Options,
    ) -> Result<Self> {
        Self::open_with_data(io, storage, None, header, options).await
    }

    /// As [`Qcow2::open`]; `data` is where guest data lies, if that is not `storage` as it is: the external
    /// data file, or the plaintext of an encrypted image.
    ///
    /// # Errors
    /// As [`Qcow2::open`]; [`crate::block::error::ErrorKind::InvalidImage`] for a data file that is not
    /// wanted, or is and not there.
    pub async fn open_with_data(
        io: &Io,
        storage: Arc<Storage>,
        data: Option<Arc<Storage>>,
        header: Header,
        options: Options,
    ) -> Result<Self> {
        header.check_supported()?;
        let data = data_file::place(&header, &storage, data)?;
        let write = !options.read_only;
        let mut header = header;
        if write {
            header.check_writable()?;
            header = repair::on_opening(io, &storage, header, options.on_dirty).await?;
        } else if header.has(incompatible::CORRUPT) {
            log::warn!(
                "{}: the image is marked corrupt: what it reads as may be wrong, and some of it may not be \
                 readable; `virtioblkd check` tells more",
                storage.path().display()
            );
        }
        let held = match write {
            true => Some(snapshots::held(io, &storage, &header).await?),
            false => None,
        };
        let cache_bytes = options.l2_cache_bytes;
        let tables = Tables::open(io, &storage, &header, held.as_ref(), cache_bytes).await?;
        let (mut alloc, mut bitmaps) = (None, None);
        if write {
            let new = Allocator::open(io, &storage, &header, options.workers).await?;
            for range in tables.metadata() {
                let count = range.end - range.start;
                new.reserve_metadata(
                    HostCluster(range.start),
                    count,
                    "L1, an L2 or a snapshot's table",
                )?;
            }
            if let Some((first, count)) = header.luks_clusters() {
                new.reserve_metadata(first, count, "encryption header")?;
            }
            bitmaps = Upkeep::open(io, &storage, &header, &new).await?;
            alloc = Some(Arc::new(new));
            // What these bits stand for is not kept up: they go before anything else changes.
            if header.clear_autoclear(io, &storage).await? {
                storage.flush(io).await?;
            }
        }
        let slices = if write { tables.limit() } else { 0 };
        Ok(Self {
            inflated: Inflated::new(&header.geometry),
            records: Records::new(&header.geometry, slices),
            data,
            storage,
            header,
            tables,
            alloc,
            has_backing: options.has_backing,
            bitmaps,
            flushes: Flushes::default(),
            journal: OnceLock::new(),
            reservations: Reservations::default(),
            new_table: async_lock::Mutex::new(()),
            resizing: async_lock::Mutex::new(()),
            refuse_writes: AtomicBool::new(!write),
        })
    }
}
