//! A storage whose bytes are the plaintext of another's.
//!
//! The unit is a sector of 512 bytes, whose number in this storage is its IV. So a LUKS file is one with the
//! payload's offset, and the data of an encrypted qcow2 image one with none: there the IV is the place in
//! the image file.
//!
//! Reads land in the caller's memory and are decrypted there, through a small window, so that pieces may be
//! of any length. Writes are encrypted in a buffer of the reactor's and written from there: the caller's
//! memory is not ours to change. Parts of sectors are read and written with what stands around them.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::cipher::SECTOR;
use super::luks::Unlocked;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::file;
use crate::block::file::edges::Edges;
use crate::block::storage::{Limits, Storage};
use crate::block::zeros::Zeros;
use crate::reactor::{Io, Sg};

/// Bytes that are decrypted at once.
const WINDOW: usize = 8 * SECTOR;
/// Bytes that are encrypted and written at once.
const STEP: usize = 256 << 10;

/// The plaintext of a storage, from an offset on.
#[derive(Debug)]
pub struct CryptStorage {
    below: Arc<Storage>,
    key: Arc<Unlocked>,
    payload: u64,
    limits: Limits,
    edges: Edges,
}

/// Calls what holds the ciphertext, which files and namespaces are asked for alike: never another cipher, so that no future contains itself.
macro_rules! below {
    ($self:expr, $file:ident => $on_file:expr, $sim:ident => $on_sim:expr) => {
        match &*$self.below {
            Storage::File($file) => $on_file,
            Storage::Nvme($file) => $on_file,
            #[cfg(test)]
            Storage::Sim($sim) => $on_sim,
            _ => Err($self.no_file()),
        }
    };
}

impl CryptStorage {
    /// What `below` holds from `payload` (bytes, whole sectors) on, by the key of `key`.
    pub fn new(below: Arc<Storage>, key: Arc<Unlocked>, payload: u64) -> Self {
        let limits = Limits {
            io_align: below.limits().io_align.max(SECTOR),
            // Discards end here: they would show which sectors are in use. QEMU and dm-crypt do the same.
            discard_granularity: 0,
            ..*below.limits()
        };
        Self {
            below,
            key,
            payload,
            limits,
            edges: Edges::default(),
        }
    }

    /// Where the ciphertext is.
    pub fn below(&self) -> &Storage {
        &self.below
    }

    pub(in crate::block) fn path(&self) -> &Path {
        self.below.path()
    }

    pub(in crate::block) fn len(&self) -> u64 {
        self.below.len().saturating_sub(self.payload)
    }

    pub(in crate::block) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(in crate::block) fn read_only(&self) -> bool {
        self.below.read_only()
    }

    #[cold]
    fn no_file(&self) -> Error {
        let message = "only files, block devices and namespaces are decrypted";
        Error::image(ErrorKind::Unsupported, self.path(), None, message)
    }

    /// Refuses what no file can hold. Whole sectors are refused below.
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).map(|end| self.place(end));
        match end.is_some_and(|end| end <= i64::MAX as u64) {
            true => Ok(()),
            false => {
                let message = "beyond what a file can hold";
                let path = self.path();
                Err(Error::image(ErrorKind::OutOfRange, path, offset, message))
            }
        }
    }

    /// In the storage below. What is out of range there is refused there.
    fn place(&self, offset: u64) -> u64 {
        self.payload.saturating_add(offset)
    }

    /// The sectors that a range touches, in bytes.
    fn sectors(offset: u64, len: usize) -> Range<u64> {
        let end = offset + len as u64;
        offset / SECTOR as u64 * SECTOR as u64..end.div_ceil(SECTOR as u64) * SECTOR as u64
    }

    fn is_whole(offset: u64, len: usize) -> bool {
        (offset | len as u64) % SECTOR as u64 == 0
    }

    /// Bytes of a transfer that lie before the end. The rest reads as zeros: nobody encrypted it.
    fn inside(&self, offset: u64, len: usize) -> usize {
        let end = match &*self.below {
            // What it has lost by shrinking is no zeros: it says so itself.
            Storage::Nvme(namespace) => namespace.largest_len().saturating_sub(self.payload),
            _ => self.len(),
        };
        let left = end.saturating_sub(offset) / SECTOR as u64 * SECTOR as u64;
        left.min(len as u64) as usize
    }

    fn decrypt(&self, offset: u64, data: Sg<'_>) {
        let mut window = [0; WINDOW];
        let (mut sector, mut rest) = (offset / SECTOR as u64, data);
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(WINDOW);
            let window = &mut window[..part.len()];
            part.copy_to(window);
            self.key.cipher().decrypt(sector, window);
            part.copy_from(window);
            (sector, rest) = (sector + (WINDOW / SECTOR) as u64, tail);
        }
    }

    #[inline]
    pub(in crate::block) fn begin_read<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        to: Sg<'a>,
    ) -> Pending<'a> {
        let under = match (&*self.below, Self::is_whole(offset, to.len())) {
            (Storage::File(file), true) => {
                let (inside, beyond) = to.split_at(self.inside(offset, to.len()));
                beyond.zero();
                Under::File(file.begin_read(io, self.place(offset), inside))
            }
            _ => Under::Later { offset, to },
        };
        Pending {
            storage: self,
            under,
        }
    }

    pub(in crate::block) async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        self.begin_read(io, offset, to).finish(io).await
    }

    /// Reads whole sectors.
    async fn read_sectors(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        let (inside, beyond) = to.split_at(self.inside(offset, to.len()));
        let at = self.place(offset);
        below!(self,
            f => f.begin_read(io, at, inside).finish(io).await,
            s => s.read(io, at, inside).await)?;
        self.decrypt(offset, inside);
        beyond.zero();
        Ok(())
    }

    /// A read of parts of sectors: of all that they touch, by way of a buffer.
    #[cold]
    async fn read_in_part(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        self.check_range(offset, to.len() as u64)?;
        let Range { start, end } = Self::sectors(offset, to.len());
        let (mut at, mut rest) = (start, to);
        let mut skip = (offset - start) as usize;
        while !rest.is_empty() {
            let mut buf = io.buf((end - at).min(STEP as u64) as usize);
            self.read_sectors(io, at, buf.sg()).await?;
            at += buf.len() as u64;
            let done = rest.copy_from(&buf[skip..]);
            (rest, skip) = (rest.split_at(done).1, 0);
        }
        Ok(())
    }

    pub(in crate::block) async fn write(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        if !Self::is_whole(offset, from.len()) {
            return Box::pin(self.write_in_part(io, offset, from)).await;
        }
        let (mut at, mut rest) = (offset, from);
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(STEP);
            let mut buf = io.buf(part.len());
            part.copy_to(&mut buf);
            self.write_sectors(io, at, &mut buf).await?;
            (at, rest) = (at.saturating_add(part.len() as u64), tail);
        }
        Ok(())
    }

    /// Encrypts a buffer and writes it.
    async fn write_sectors(
        &self,
        io: &Io,
        offset: u64,
        buf: &mut crate::reactor::AlignedBuf,
    ) -> Result<()> {
        self.key.cipher().encrypt(offset / SECTOR as u64, buf);
        let at = self.place(offset);
        below!(self,
            f => f.begin_write(io, at, buf.sg()).finish(io).await,
            s => s.write(io, at, buf.sg()).await)
    }

    /// A write of parts of sectors: with what stands around them, which nobody else may change meanwhile.
    #[cold]
    async fn write_in_part(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.check_range(offset, from.len() as u64)?;
        let sectors = Self::sectors(offset, from.len());
        let _held = self.edges.hold(sectors.clone(), true).await;
        let end = offset + from.len() as u64;
        let (mut at, mut rest) = (sectors.start, from);
        while at < sectors.end {
            let step = (sectors.end - at).min(STEP as u64) as usize;
            let mut buf = io.buf(step);
            let skip = offset.saturating_sub(at) as usize;
            let covered = (end - at).min(step as u64) as usize;
            if skip > 0 {
                let first = buf.sg().slice(0, SECTOR);
                self.read_sectors(io, at, first).await?;
            }
            let last = step - SECTOR;
            if covered < step && (skip == 0 || last > 0) {
                let sector = buf.sg().slice(last, SECTOR);
                self.read_sectors(io, at + last as u64, sector).await?;
            }
            let done = rest.copy_to(&mut buf[skip..covered]);
            self.write_sectors(io, at, &mut buf).await?;
            (rest, at) = (rest.split_at(done).1, at + step as u64);
        }
        Ok(())
    }

    /// Writes zeros, encrypted: a hole below would not read as zeros.
    pub(in crate::block) async fn write_zeroes(
        &self,
        io: &Io,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let mut zeros = Zeros::new(io, offset..offset + len, STEP as u64);
        while let Some((at, from)) = zeros.next() {
            self.write(io, at, from).await?;
        }
        Ok(())
    }

    pub(in crate::block) async fn flush(&self, io: &Io) -> Result<()> {
        below!(self, f => f.flush(io).await, s => s.flush(io).await)
    }

    /// Reserves space. It does not read as zeros.
    pub(in crate::block) async fn allocate(&self, io: &Io, offset: u64, len: u64) -> Result<bool> {
        let at = self.place(offset);
        below!(self, f => f.allocate(io, at, len).await, s => s.allocate(io, at, len).await)?;
        Ok(false)
    }

    pub(in crate::block) async fn set_len(&self, io: &Io, len: u64) -> Result<()> {
        let _ = io;
        let at = self.place(len);
        below!(self, f => f.set_len(at), s => s.set_len(io, at).await)
    }
}

/// A read under way.
#[derive(Debug)]
pub(in crate::block) struct Pending<'a> {
    storage: &'a CryptStorage,
    under: Under<'a>,
}

#[derive(Debug)]
enum Under<'a> {
    /// It has begun, in whole sectors, and knows where it is. What lies past the end is zeros already.
    File(file::Pending<'a>),
    /// It begins when it is finished.
    Later { offset: u64, to: Sg<'a> },
}

impl Pending<'_> {
    #[inline]
    pub(in crate::block) async fn finish(self, io: &Io) -> Result<()> {
        let storage = self.storage;
        match self.under {
            Under::File(pending) => {
                let (place, to) = (pending.offset(), pending.sg());
                pending.finish(io).await?;
                storage.decrypt(place - storage.payload, to);
                Ok(())
            }
            Under::Later { offset, to } if CryptStorage::is_whole(offset, to.len()) => {
                Box::pin(storage.read_sectors(io, offset, to)).await
            }
            Under::Later { offset, to } => Box::pin(storage.read_in_part(io, offset, to)).await,
        }
    }
}
