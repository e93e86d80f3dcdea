//! Bitmaps from the file and to it.
//!
//! `docs/interop/qcow2.rst`, sections "Bitmap table" and "Bitmap data": a bit is the lowest of its byte for
//! the first piece of the disk, and so on; what is behind the last bit is zero.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::directory::{TableEntry, clusters, flag};
use super::{Tracked, Upkeep};
use crate::block::error::Result;
use crate::block::qcow2::alloc::Allocator;
use crate::block::qcow2::fresh::Fresh;
use crate::block::qcow2::header::Header;
use crate::block::qcow2::units::{Geometry, HostCluster};
use crate::block::storage::Storage;
use crate::reactor::{AlignedBuf, Io};

/// Bytes of a table that are written at once.
const TABLE_PIECE: usize = 1 << 20;
const SECTOR: usize = 512;

impl Tracked {
    /// Words of a cluster of the bitmap's data.
    fn words_per_cluster(g: &Geometry) -> usize {
        (g.cluster_size() / 8) as usize
    }

    /// The bits that exist of a word.
    fn valid(&self, word: usize) -> u64 {
        match self.bits - word as u64 * 64 {
            left @ 0..64 => (1 << left) - 1,
            _ => u64::MAX,
        }
    }

    /// Reads the bits.
    pub(super) async fn load(&self, io: &Io, storage: &Storage, header: &Header) -> Result<()> {
        let per_cluster = Self::words_per_cluster(&header.geometry);
        let table = self.table.lock().await;
        for (n, (entry, words)) in table.iter().zip(self.words.chunks(per_cluster)).enumerate() {
            let at = match entry {
                TableEntry::Zeros => continue,
                TableEntry::Ones => None,
                TableEntry::At(at) => Some(*at),
            };
            let mut buf = io.buf(header.geometry.cluster_size() as usize);
            match at {
                Some(at) => storage.read(io, at, buf.sg()).await?,
                None => buf.fill(0xff),
            }
            for (m, (word, bytes)) in words.iter().zip(buf.chunks_exact(8)).enumerate() {
                let bits = bytes.try_into().map_or(0, u64::from_le_bytes);
                word.store(bits & self.valid(n * per_cluster + m), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// A cluster of the bitmap's data, as it is to be stored; zeros behind the last bit.
    fn encode(&self, io: &Io, g: &Geometry, n: usize) -> AlignedBuf {
        let per_cluster = Self::words_per_cluster(g);
        let mut buf = io.buf(g.cluster_size() as usize);
        buf.fill(0);
        let words = self.words.iter().skip(n * per_cluster).take(per_cluster);
        for (word, bytes) in words.zip(buf.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        buf
    }

    /// Writes the bits, where nobody trusts them. Returns the table that they make, and the clusters that are
    /// new in it.
    async fn write_bits<'a>(
        &self,
        io: &Io,
        storage: &Storage,
        g: &Geometry,
        alloc: &'a Arc<Allocator>,
    ) -> Result<(Vec<TableEntry>, Vec<Fresh<'a>>)> {
        let old = self.table.lock().await;
        let mut table = Vec::with_capacity(old.len());
        let mut new = Vec::new();
        for (n, old) in old.iter().enumerate() {
            let mut buf = self.encode(io, g, n);
            let entry = match old {
                _ if buf.iter().all(|byte| *byte == 0) => TableEntry::Zeros,
                // Not where there are bits behind the last one: those have to be zero.
                _ if buf.iter().all(|byte| *byte == 0xff) => TableEntry::Ones,
                TableEntry::At(at) => TableEntry::At(*at),
                _ => {
                    let fresh = alloc.allocate(io, 1).await?;
                    let at = g.host_offset(fresh.first()).0;
                    new.push(fresh);
                    TableEntry::At(at)
                }
            };
            if let TableEntry::At(at) = entry {
                storage.write(io, at, buf.sg()).await?;
            }
            table.push(entry);
        }
        Ok((table, new))
    }

    /// Writes the table in its place, durably. Each sector of it is the old one or the new one after a loss of
    /// power, and both lead to clusters that are allocated.
    async fn write_table(&self, io: &Io, storage: &Storage, table: &[TableEntry]) -> Result<()> {
        for (n, piece) in table.chunks(TABLE_PIECE / 8).enumerate() {
            let mut buf = io.buf((piece.len() * 8).next_multiple_of(SECTOR));
            buf.fill(0);
            for (entry, bytes) in piece.iter().zip(buf.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&entry.encode().to_be_bytes());
            }
            let at = self.bitmap.table + (n * TABLE_PIECE) as u64;
            storage.write(io, at, buf.sg()).await?;
        }
        storage.flush(io).await
    }

    async fn store(
        &self,
        io: &Io,
        storage: &Storage,
        g: &Geometry,
        alloc: &Arc<Allocator>,
    ) -> Result<()> {
        let (table, new) = self.write_bits(io, storage, g, alloc).await?;
        let written = self.write_table(io, storage, &table).await;
        // Also after an error: the file may have the new table.
        for fresh in new {
            fresh.keep();
        }
        written?;
        let mut old = self.table.lock().await;
        for run in clusters(g, &old).unwrap_or_default() {
            alloc.release_metadata(HostCluster(run.first), run.count);
        }
        let pairs = old.iter().zip(&table);
        let dropped = pairs.filter(|(old, new)| old != new).map(|(old, _)| *old);
        let dropped: Vec<TableEntry> = dropped.collect();
        for run in clusters(g, &dropped).unwrap_or_default() {
            alloc.free(io, HostCluster(run.first), run.count);
        }
        *old = table;
        // What stays allocated for an error here is a leak.
        if let Err(error) = alloc.settle(io, alloc.mark()).await {
            log::warn!("giving freed clusters of bitmaps back: {error}");
        }
        Ok(())
    }
}

impl Upkeep {
    /// Marks the bitmaps as in use, before anything else changes.
    #[cold]
    pub(super) async fn begin(&self, io: &Io, storage: &Storage) -> Result<()> {
        let changed = self.set_flag(io, storage, true);
        changed.await.map_err(|error| {
            error.hint("its bitmaps could not be marked as in use, so nothing was written")
        })
    }

    /// Sets or clears `in_use` of all bitmaps that are kept up, durably. Each flag is in one sector, so a loss
    /// of power leaves a bitmap marked or not.
    async fn set_flag(&self, io: &Io, storage: &Storage, in_use: bool) -> Result<()> {
        let mut directory = self.directory.lock().await;
        if self.in_use.load(Ordering::Relaxed) == in_use {
            return Ok(());
        }
        let mut bytes = directory.bytes.clone();
        let mut sectors = Vec::with_capacity(self.tracked.len());
        for tracked in &self.tracked {
            let at = tracked.bitmap.flags_at;
            let flags = match in_use {
                true => tracked.bitmap.flags | flag::IN_USE,
                false => tracked.bitmap.flags & !flag::IN_USE,
            };
            bytes[at..at + 4].copy_from_slice(&flags.to_be_bytes());
            sectors.push(at / SECTOR * SECTOR);
        }
        sectors.dedup();
        for at in sectors {
            let mut buf = io.buf(SECTOR);
            buf.copy_from_slice(&bytes[at..at + SECTOR]);
            storage
                .write(io, directory.offset + at as u64, buf.sg())
                .await?;
        }
        storage.flush(io).await?;
        directory.bytes = bytes;
        // Release: who sees the mark may change data.
        self.in_use.store(in_use, Ordering::Release);
        Ok(())
    }

    /// Stores the bitmaps, and ends their use. All that the guest wrote is durable, and no request runs.
    /// Where this fails they stay in use, which means that they are not trusted; the image is consistent.
    ///
    /// # Errors
    /// Those of writing and of allocation.
    pub(in super::super) async fn store(
        &self,
        io: &Io,
        storage: &Storage,
        header: &Header,
        alloc: &Arc<Allocator>,
    ) -> Result<()> {
        if !self.in_use.load(Ordering::Acquire) {
            return Ok(());
        }
        let stored = self.store_all(io, storage, &header.geometry, alloc).await;
        stored.map_err(|error| {
            error.hint(
                "its bitmaps could not be stored and are inconsistent now; the disk's data is safe",
            )
        })
    }

    async fn store_all(
        &self,
        io: &Io,
        storage: &Storage,
        g: &Geometry,
        alloc: &Arc<Allocator>,
    ) -> Result<()> {
        for tracked in &self.tracked {
            tracked.store(io, storage, g, alloc).await?;
        }
        self.set_flag(io, storage, false).await
    }
}
