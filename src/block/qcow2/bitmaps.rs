//! Persistent dirty bitmaps: kept up while the image is written to.
//!
//! `docs/interop/qcow2.rst`, section "Bitmaps". A bitmap with the `auto` flag has a bit for each piece of the
//! disk that was written to since it was cleared; backup programs live on it. So it may show too much, and
//! never too little:
//!
//! - Before the first change of guest data, `in_use` is set in the directory, durably ([`Upkeep::note`]). From
//!   there on what the file has of the bitmap is not trusted by anybody.
//! - A bit is set before the data that it stands for changes.
//! - When the image is closed and everything is flushed, the bits are stored, durably, and then `in_use` is
//!   cleared ([`Upkeep::store`]). After a crash, or where that fails, it stays.
//!
//! As nobody trusts a bitmap in use, its table and its clusters are written where they are. What must hold at
//! each moment is only that every entry leads to a cluster that is allocated: new clusters are, durably,
//! before the table is written, and old ones are freed when it is durable.
//!
//! Other bitmaps stay as they are: disabled ones, and those that were found in use. Their clusters, as those
//! of the directory, are reserved as metadata.

mod directory;
mod store;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_lock::Mutex;

pub use directory::{Bitmap, list};
use directory::{Directory, TableEntry};

use super::Qcow2;
use super::alloc::Allocator;
use super::header::{Header, autoclear};
use super::runs::Run;
use super::units::HostCluster;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Memory for the bits of an image's bitmaps, in bytes.
const MAX_MEMORY: u64 = 1 << 30;

/// The bitmaps of an image that follow its changes.
#[derive(Debug)]
pub(super) struct Upkeep {
    tracked: Vec<Tracked>,
    /// They are marked as in use in the file, durably.
    in_use: AtomicBool,
    directory: Mutex<Directory>,
}

/// One of them.
#[derive(Debug)]
struct Tracked {
    bitmap: Bitmap,
    granularity_bits: u32,
    bits: u64,
    words: Box<[AtomicU64]>,
    /// As it is in the file.
    table: Mutex<Vec<TableEntry>>,
}

impl Tracked {
    fn new(bitmap: Bitmap, size: u64, table: Vec<TableEntry>) -> Self {
        let bits = bitmap.bits(size);
        Self {
            granularity_bits: bitmap.granularity.trailing_zeros(),
            bits,
            words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            table: Mutex::new(table),
            bitmap,
        }
    }

    /// Sets the bits from the one of byte `first` to the one of byte `last`.
    #[inline]
    fn set(&self, first: u64, last: u64) {
        let (first, last) = (
            first >> self.granularity_bits,
            last >> self.granularity_bits,
        );
        for word in first / 64..=last / 64 {
            let low = if word == first / 64 { first % 64 } else { 0 };
            let high = if word == last / 64 { last % 64 } else { 63 };
            let mask = u64::MAX << low & u64::MAX >> (63 - high);
            if let Some(word) = self.words.get(word as usize) {
                // Relaxed: they are looked at when all requests have ended. Most are set already, and
                // the word stays shared.
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Upkeep {
    /// Reads the bitmaps of an image that is opened for writing and reserves what they occupy. None: there
    /// is nothing to keep up.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for bitmaps that contradict the format, [`ErrorKind::Unsupported`] for what
    /// must be kept up and can not be; those of reading.
    pub(super) async fn open(
        io: &Io,
        storage: &Storage,
        header: &Header,
        alloc: &Allocator,
    ) -> Result<Option<Box<Self>>> {
        let Some(extension) = header.bitmaps else {
            return Ok(None);
        };
        if header.autoclear & autoclear::BITMAPS == 0 {
            log::warn!(
                "{}: a program without support for bitmaps has written to the image; its bitmaps mean \
                 nothing any more and are left alone",
                header.path.display()
            );
            return Ok(None);
        }
        let g = header.geometry;
        let directory = directory::read(io, storage, header, extension).await?;
        let reserve =
            |run: Run, what| alloc.reserve_metadata(HostCluster(run.first), run.count, what);
        let run = |at: u64, bytes: u64| Run::new(at >> g.cluster_bits, g.clusters(bytes));
        let at = extension.directory_offset.0;
        reserve(run(at, extension.directory_bytes), "bitmap directory")?;
        let mut tracked = Vec::new();
        let mut memory = 0;
        for bitmap in &directory.bitmaps {
            // First the table's place: so all that is read and kept is in the file, and there once.
            reserve(run(bitmap.table, bitmap.table_entries * 8), "bitmap table")?;
            let table = directory::read_table(io, storage, header, bitmap).await?;
            let clusters = directory::clusters(&g, &table).ok_or_else(|| {
                let what = format!("the bitmap {:?} has a cluster twice", bitmap.name);
                directory::corrupt(&header.path, bitmap.table, what)
            })?;
            for run in clusters {
                reserve(run, "bitmap")?;
            }
            if !bitmap.auto || bitmap.in_use {
                continue;
            }
            memory += bitmap.bits(header.size).div_ceil(8);
            let why = match () {
                () if bitmap.is_closed() => "has extra data that is not known",
                () if memory > MAX_MEMORY => "needs too much memory, with those before it",
                () => {
                    let new = Tracked::new(bitmap.clone(), header.size, table);
                    new.load(io, storage, header).await?;
                    tracked.push(new);
                    continue;
                }
            };
            let what = format!(
                "the bitmap {:?} {why}, and writing would have to keep it up; open the image read-only, or \
                 stop the bitmap with: qemu-img bitmap --disable",
                bitmap.name
            );
            return Err(Error::image(ErrorKind::Unsupported, &header.path, at, what));
        }
        let upkeep = Self {
            tracked,
            in_use: AtomicBool::new(false),
            directory: Mutex::new(directory),
        };
        Ok((!upkeep.tracked.is_empty()).then(|| Box::new(upkeep)))
    }

    /// Notes that `len` bytes at `offset` are about to change.
    ///
    /// # Errors
    /// Those of marking the bitmaps as in use: then nothing may change.
    #[inline]
    pub(super) async fn note(
        &self,
        io: &Io,
        storage: &Storage,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        // Acquire: the mark is durable.
        if !self.in_use.load(Ordering::Acquire) {
            Box::pin(self.begin(io, storage)).await?;
        }
        for tracked in &self.tracked {
            tracked.set(offset, offset + len - 1);
        }
        Ok(())
    }
}

impl Qcow2 {
    /// True if the image has persistent bitmaps that mean something. They are made for the disk's size: who
    /// changes that has to refuse, or make them anew.
    pub fn has_bitmaps(&self) -> bool {
        self.header.bitmaps.is_some() && self.header.autoclear & autoclear::BITMAPS != 0
    }
}
