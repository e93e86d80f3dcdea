//! Updates of the header in place. Each is one write of the first sector, which a power loss leaves whole:
//! old or new.

use super::{Header, autoclear, field, incompatible, u64_at};
use crate::block::error::Result;
use crate::block::qcow2::units::HostOffset;
use crate::block::storage::Storage;
use crate::reactor::Io;

impl Header {
    /// Points the header at another refcount table. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn write_refcount_table(
        &self,
        io: &Io,
        storage: &Storage,
        offset: HostOffset,
        clusters: u32,
    ) -> Result<()> {
        self.update(io, storage, |sector| {
            put(sector, field::REFCOUNT_TABLE, &offset.0.to_be_bytes());
            put(sector, field::REFCOUNT_TABLE + 8, &clusters.to_be_bytes());
        })
        .await
    }

    /// Changes the disk's size in bytes, and where the L1 table is, all at once. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub(in crate::block::qcow2) async fn write_size(
        &self,
        io: &Io,
        storage: &Storage,
        size: u64,
        l1_offset: HostOffset,
        l1_entries: u32,
    ) -> Result<()> {
        self.update(io, storage, |sector| {
            put(sector, field::SIZE, &size.to_be_bytes());
            put(sector, field::L1, &l1_entries.to_be_bytes());
            put(sector, field::L1 + 4, &l1_offset.0.to_be_bytes());
        })
        .await
    }

    /// Sets or clears our mark for clusters taken ahead of need ([`autoclear::ARENAS`]). Version 2 has no
    /// such bits. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn mark_arenas(&self, io: &Io, storage: &Storage, set: bool) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        self.update(io, storage, |sector| {
            let bits = u64_at(sector, field::AUTOCLEAR) & !autoclear::ARENAS;
            let mark = if set { autoclear::ARENAS } else { 0 };
            put(sector, field::AUTOCLEAR, &(bits | mark).to_be_bytes());
        })
        .await
    }

    /// Clears the auto-clear bits that are not known, as must be before the first write by a program that
    /// does not keep up what they stand for. True if there were some: not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn clear_autoclear(&self, io: &Io, storage: &Storage) -> Result<bool> {
        let kept = self.autoclear & autoclear::KEPT_UP;
        if kept == self.autoclear {
            return Ok(false);
        }
        self.update(io, storage, |sector| {
            put(sector, field::AUTOCLEAR, &kept.to_be_bytes());
        })
        .await?;
        Ok(true)
    }

    /// Sets the corrupt bit, so that nobody writes to the image before it is repaired. Version 2 has no
    /// such bit. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn mark_corrupt(&self, io: &Io, storage: &Storage) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        self.update(io, storage, |sector| {
            let bits = u64_at(sector, field::INCOMPATIBLE) | incompatible::CORRUPT;
            put(sector, field::INCOMPATIBLE, &bits.to_be_bytes());
        })
        .await
    }

    /// Clears the dirty and the corrupt bit of an image that was found to be sound. Not durable before a
    /// flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn mark_sound(&self, io: &Io, storage: &Storage) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        self.update(io, storage, |sector| {
            let marks = incompatible::DIRTY | incompatible::CORRUPT;
            let bits = u64_at(sector, field::INCOMPATIBLE) & !marks;
            put(sector, field::INCOMPATIBLE, &bits.to_be_bytes());
        })
        .await
    }

    async fn update(
        &self,
        io: &Io,
        storage: &Storage,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let _one = self.updates.lock().await;
        let mut sector = io.buf(512);
        storage.read(io, 0, sector.sg()).await?;
        change(&mut sector);
        storage.write(io, 0, sector.sg()).await
    }
}

fn put(sector: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = sector.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}
