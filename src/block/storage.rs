//! A thing with bytes: what every layer reads its metadata and data from.

use std::path::Path;

use crate::reactor::{Io, Sg};

use super::crypt::{self, CryptStorage};
use super::disk::SECTOR;
use super::error::Result;
use super::file::{self, FileStorage};
use super::null::NullStorage;
use super::nvme_tcp::storage::{self as nvme, NvmeStorage};
#[cfg(test)]
use super::sim::SimStorage;

/// What a storage asks of requests, and what it likes. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests to memory on multiples of this go straight, others through a buffer. 1: anything does.
    pub mem_align: usize,
    /// Requests whose offset and length are multiples of this go straight; other writes read what
    /// stands around them first. 1: anything does.
    pub io_align: usize,
    /// Smallest block of the device or file system below.
    pub logical_block: u32,
    /// Block below which a write costs the device a read, too.
    pub physical_block: u32,
    /// Request size that the device likes best; 0: it does not say.
    pub optimal_io: u32,
    /// Discards of less than this, or not aligned to it, free nothing; 0: discards do nothing.
    pub discard_granularity: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            mem_align: 1,
            io_align: 1,
            logical_block: 512,
            physical_block: 512,
            optimal_io: 0,
            discard_granularity: 512,
        }
    }
}

/// Bytes by offset. All operations may run concurrently, from any thread with its own [`Io`]; ranges
/// that overlap have no order among them.
#[derive(Debug)]
pub enum Storage {
    /// A regular file or a block device.
    File(FileStorage),
    /// Zeros.
    Null(NullStorage),
    /// The plaintext of a file.
    Crypt(Box<CryptStorage>),
    /// A remote namespace.
    Nvme(Box<NvmeStorage>),
    /// In memory, for tests.
    #[cfg(test)]
    Sim(SimStorage),
}

/// Dispatches to the storage's own implementation.
macro_rules! each {
    ($self:expr, $s:ident => $file:expr, $n:ident => $null:expr, $c:ident => $crypt:expr, $r:ident => $remote:expr,
        $sim:ident => $simulated:expr) => {
        match $self {
            Storage::File($s) => $file,
            Storage::Null($n) => $null,
            Storage::Crypt($c) => $crypt,
            Storage::Nvme($r) => $remote,
            #[cfg(test)]
            Storage::Sim($sim) => $simulated,
        }
    };
}

impl Storage {
    /// Name for messages: the file's path.
    pub fn path(&self) -> &Path {
        each!(self, s => s.path(), s => s.path(), s => s.path(), s => s.path(), s => s.path())
    }

    /// Size in bytes, as far as this process knows.
    pub fn len(&self) -> u64 {
        each!(self, s => s.len(), s => s.len(), s => s.len(), s => s.len(), s => s.len())
    }

    /// True if there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Alignment and block sizes.
    pub fn limits(&self) -> &Limits {
        each!(self, s => s.limits(), s => s.limits(), s => s.limits(), s => s.limits(), s => s.limits())
    }

    /// True if writes are refused.
    pub fn read_only(&self) -> bool {
        each!(self, s => s.read_only(), s => s.read_only(), s => s.read_only(), s => s.read_only(), s => s.read_only())
    }

    /// Whether the kernel ends reads and writes in an interrupt, and not in a thread of its own, which may need the
    /// CPU of whoever waits.
    pub fn ends_by_interrupt(&self) -> bool {
        each!(self, s => s.direct(), _s => true, s => s.below().ends_by_interrupt(), _s => true, _s => true)
    }

    /// Fills `to` from `offset` on. Past the end of the storage are zeros.
    #[inline]
    pub async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        each!(self,
            s => s.begin_read(io, offset, to).finish(io).await,
            s => s.read(to),
            s => s.read(io, offset, to).await,
            s => s.begin_read(io, offset, to).finish(io).await,
            s => s.read(io, offset, to).await)
    }

    /// Writes all of `from` at `offset`. A file grows as needed.
    #[inline]
    pub async fn write(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        each!(self,
            s => s.begin_write(io, offset, from).finish(io).await,
            s => s.write(),
            s => s.write(io, offset, from).await,
            s => s.begin_write(io, offset, from).finish(io).await,
            s => s.write(io, offset, from).await)
    }

    /// As [`Storage::read`], queued at once where the storage can: several may be under way while
    /// their caller goes on. Nothing is complete before [`Pending::finish`].
    #[inline]
    pub fn begin_read<'a>(&'a self, io: &'a Io, offset: u64, to: Sg<'a>) -> Pending<'a> {
        Pending(each!(self,
            s => Under::File(s.begin_read(io, offset, to)),
            s => Under::Ended(s.read(to)),
            s => Under::Crypt(s.begin_read(io, offset, to)),
            s => Under::Nvme(s.begin_read(io, offset, to)),
            _s => Under::Later { storage: self, offset, sg: to, write: false }))
    }

    /// As [`Storage::write`], queued at once where the storage can.
    #[inline]
    pub fn begin_write<'a>(&'a self, io: &'a Io, offset: u64, from: Sg<'a>) -> Pending<'a> {
        Pending(each!(self,
            s => Under::File(s.begin_write(io, offset, from)),
            s => Under::Ended(s.write()),
            _s => Under::Later { storage: self, offset, sg: from, write: true },
            s => Under::Nvme(s.begin_write(io, offset, from)),
            _s => Under::Later { storage: self, offset, sg: from, write: true }))
    }

    /// Makes everything durable that was written before the call.
    pub async fn flush(&self, io: &Io) -> Result<()> {
        each!(self,
            s => s.flush(io).await,
            _s => Ok(()),
            s => s.flush(io).await,
            s => s.flush(io).await,
            s => s.flush(io).await)
    }

    /// Gives the range back to the device or file system, where that is possible: a hint. What it reads
    /// as afterwards is not defined.
    pub async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        each!(self,
            s => s.discard(io, offset, len).await,
            s => s.write(),
            // Nothing: it would show which sectors are in use.
            _s => Ok(()),
            s => s.discard(io, offset, len).await,
            s => s.discard(io, offset, len).await)
    }

    /// Makes the range read as zeros; `may_unmap` allows its space to be given back. A file grows if
    /// the range ends beyond it.
    pub async fn write_zeroes(
        &self,
        io: &Io,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<()> {
        each!(self,
            s => s.write_zeroes(io, offset, len, may_unmap).await,
            s => s.write(),
            s => s.write_zeroes(io, offset, len).await,
            s => s.write_zeroes(io, offset, len, may_unmap).await,
            s => s.write_zeroes(io, offset, len, may_unmap).await)
    }

    /// Reserves space for the range and makes it read as zeros (durably after a flush); what it held is
    /// lost. False: it may read as anything, and space is reserved only as far as the storage does that.
    /// In memory (tmpfs) the range is left as a hole: [`Storage::reserve`] is for what needs the space.
    pub async fn allocate(&self, io: &Io, offset: u64, len: u64) -> Result<bool> {
        each!(self,
            s => s.allocate(io, offset, len).await,
            s => s.write().map(|()| true),
            s => s.allocate(io, offset, len).await,
            s => s.allocate(io, offset, len).await,
            s => s.allocate(io, offset, len).await)
    }

    /// Reserves space for a range that was allocated, where [`Storage::allocate`] leaves that to the first write.
    /// What the range reads as stays.
    pub(super) async fn reserve(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        match self {
            Self::File(file) => file.reserve(io, offset, len).await,
            _ => Ok(()),
        }
    }

    /// Cuts the storage, or grows it with zeros. Not while writes that grow it run.
    pub async fn set_len(&self, io: &Io, len: u64) -> Result<()> {
        let _ = io;
        each!(self,
            s => s.set_len(len),
            s => s.write(),
            s => s.set_len(io, len).await,
            s => s.set_len(len),
            s => s.set_len(io, len).await)
    }

    /// Reads the size again, and nothing else, while requests run: another process may have changed it.
    pub(super) fn refresh_len(&self) -> Result<()> {
        each!(self, s => s.refresh_len(), _s => Ok(()), s => s.below().refresh_len(), _s => Ok(()), _s => Ok(()))
    }

    /// Its size, where somebody knew it as `known` before. Past the page cache only whole blocks can be written, so
    /// a write to a part of one at the end makes a file grow to its end: that is our own doing, and no other size.
    pub(super) fn len_known_as(&self, known: u64) -> u64 {
        let (len, align) = (self.len(), self.limits().io_align as u64);
        // What is no whole sector is not the disk's, and nobody writes there.
        let last = known / SECTOR * SECTOR;
        match last % align != 0 && len == last.next_multiple_of(align) {
            true => known,
            false => len,
        }
    }

    /// Registers what it does I/O to with a ring: see [`super::ActiveDisk::join`].
    pub(super) fn join(&self, io: &Io) {
        each!(self, s => s.join(io), _s => (), s => s.below().join(io), s => s.join(io), _s => ())
    }

    /// Equal for the same file by two names: device and inode. Of what is no file, zeros.
    pub fn identity(&self) -> (u64, u64) {
        each!(self, s => s.identity(), _s => (0, 0), s => s.below().identity(), s => s.identity(), s => s.identity())
    }

    /// Reads the size again: another process may have owned the file.
    pub fn refresh(&self) -> Result<()> {
        each!(self, s => s.refresh(), _s => Ok(()), s => s.below().refresh(), _s => Ok(()), _s => Ok(()))
    }
}

/// A transfer under way. Dropped, it is waited for.
#[derive(Debug)]
#[must_use = "a transfer is complete only when it was finished"]
pub struct Pending<'a>(Under<'a>);

#[derive(Debug)]
enum Under<'a> {
    File(file::Pending<'a>),
    Ended(Result<()>),
    Crypt(crypt::storage::Pending<'a>),
    Nvme(nvme::Pending<'a>),
    Later {
        storage: &'a Storage,
        offset: u64,
        sg: Sg<'a>,
        write: bool,
    },
}

// Every read through a chain has a window of these in its future, and every entry of a queue has such a future.
const _: () = assert!(size_of::<Option<Pending<'_>>>() <= 120);

impl Pending<'_> {
    /// Waits for the transfer's end and, where the kernel stopped short, transfers the rest.
    #[inline]
    pub async fn finish(self, io: &Io) -> Result<()> {
        match self.0 {
            Under::File(pending) => pending.finish(io).await,
            Under::Ended(result) => result,
            Under::Crypt(pending) => pending.finish(io).await,
            Under::Nvme(pending) => pending.finish(io).await,
            Under::Later {
                storage,
                offset,
                sg,
                write: false,
            } => storage.read(io, offset, sg).await,
            Under::Later {
                storage,
                offset,
                sg,
                write: true,
            } => storage.write(io, offset, sg).await,
        }
    }
}
