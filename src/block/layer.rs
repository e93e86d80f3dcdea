//! One layer of a disk: bytes of its own, or holes through which the layer below is seen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::reactor::{AlignedBuf, Io, Sg};
use crate::shared_memory::SharedPart;

use super::error::{Error, ErrorKind, Result};
use super::qcow2::{Compressed, Extent, Qcow2, journal_is_empty};
use super::storage::Storage;

/// What a range of a layer is made of, from its first byte on. Every `len` is in bytes, at least 1 and
/// at most what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Bytes of the layer's storage.
    Data {
        /// Where they begin in [`Layer::data`].
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Zeros.
    Zero {
        /// How many.
        len: u64,
    },
    /// What the layer below has there; zeros if there is none, or where it ends before.
    Backing {
        /// How many.
        len: u64,
    },
    /// Part of a compressed cluster: [`Layer::read_compressed`] reads it.
    Compressed {
        /// Where the compressed cluster lies.
        cluster: Compressed,
        /// Bytes of the cluster before the range.
        skip: u64,
        /// How many.
        len: u64,
    },
}

/// A layer that serves requests.
#[derive(Debug)]
pub enum Layer {
    /// The bytes of a storage as they are.
    Raw(Raw),
    /// A qcow2 image.
    Qcow2(Box<Qcow2>),
    /// Made up by a test.
    #[cfg(test)]
    Made(super::stack::tests::Made),
}

/// A storage whose bytes are the disk's.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<Storage>,
    size: AtomicU64,
}

impl Raw {
    /// The first `size` bytes of `storage`.
    pub fn new(storage: Arc<Storage>, size: u64) -> Self {
        let size = AtomicU64::new(size);
        Self { storage, size }
    }
}

impl Raw {
    async fn resize(&self, io: &Io, size: u64) -> Result<()> {
        let old = self.size.load(Ordering::Acquire);
        if size < old {
            self.size.store(size, Ordering::SeqCst);
            requests_ended(io).await;
        }
        let cut = self.storage.set_len(io, size).await;
        if cut.is_err() {
            self.size.store(old, Ordering::SeqCst);
            return cut;
        }
        self.storage.flush(io).await?;
        self.size.store(size, Ordering::SeqCst);
        Ok(())
    }
}

impl Layer {
    /// Bytes of the layer's disk as its file has them now, which another program may have changed. The size
    /// in use stays; a qcow2 image is locked, and its size is ours alone to change.
    ///
    /// # Errors
    /// The file does not tell its size.
    pub(super) fn size_outside(&self) -> Result<u64> {
        if let Self::Raw(raw) = self {
            raw.storage.refresh_len()?;
            return Ok(raw.storage.len_known_as(raw.size.load(Ordering::SeqCst)));
        }
        Ok(self.size())
    }

    /// Takes a size that [`Layer::size_outside`] told.
    pub(super) fn use_size(&self, size: u64) {
        if let Self::Raw(raw) = self {
            raw.size.store(size, Ordering::SeqCst);
        }
    }
}

/// Waits until every request has ended that began before the call. Not to be called from a request.
pub(super) async fn requests_ended(io: &Io) {
    const PAUSE: Duration = Duration::from_micros(100);
    let epoch = io.epochs().retire();
    while !io.epochs().passed(epoch) {
        io.sleep(PAUSE).await;
    }
}

impl Layer {
    /// Bytes of the layer's disk.
    #[inline]
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size.load(Ordering::Acquire),
            Self::Qcow2(image) => image.size(),
            #[cfg(test)]
            Self::Made(made) => made.size,
        }
    }

    /// Where [`Mapping::Data`] is found.
    #[inline]
    pub fn data(&self) -> &Storage {
        match self {
            Self::Raw(raw) => &raw.storage,
            Self::Qcow2(image) => image.data(),
            #[cfg(test)]
            Self::Made(made) => &made.storage,
        }
    }

    /// What is at `offset`; `offset + len` is not beyond the layer's size, `len` not 0.
    ///
    /// # Errors
    /// Those of reading the metadata, and of metadata that makes no sense.
    #[inline]
    pub async fn map(&self, io: &Io, offset: u64, len: u64) -> Result<Mapping> {
        match self {
            Self::Raw(_) => Ok(Mapping::Data { offset, len }),
            Self::Qcow2(image) => Ok(image.map(io, offset, len).await?.into()),
            #[cfg(test)]
            Self::Made(made) => Ok(made.map(offset, len)),
        }
    }

    /// [`Layer::map`] without waiting; none where it would have to.
    #[inline]
    pub(super) fn map_at_once(&self, offset: u64, len: u64) -> Option<Mapping> {
        match self {
            Self::Raw(_) => Some(Mapping::Data { offset, len }),
            Self::Qcow2(image) => Some(image.map_at_once(offset, len)?.into()),
            #[cfg(test)]
            Self::Made(made) => Some(made.map(offset, len)),
        }
    }

    /// Where in [`Layer::data`] all of a write goes, if that is all there is to it any more: then it must follow.
    /// None: it is [`Layer::write`]'s.
    #[inline]
    pub(super) fn in_place(&self, io: &Io, offset: u64, len: u64) -> Option<u64> {
        if len == 0 || offset.checked_add(len)? > self.size() {
            return None;
        }
        match self {
            Self::Raw(_) => Some(offset),
            Self::Qcow2(image) => Some(image.in_place(io, offset, len)?.0),
            #[cfg(test)]
            Self::Made(_) => None,
        }
    }

    /// Fills `to` with what [`Mapping::Compressed`] says.
    ///
    /// # Errors
    /// Those of reading, and of data that is damaged.
    pub(super) async fn read_compressed(
        &self,
        io: &Io,
        cluster: Compressed,
        skip: u64,
        to: Sg<'_>,
    ) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.read_compressed(io, cluster, skip, to).await,
            _ => Ok(()),
        }
    }
}

/// Changes: the top layer's.
impl Layer {
    /// Writes `from` at `offset`. `below` is what the layer's holes show.
    #[inline]
    pub(super) async fn write(
        &self,
        io: &Io,
        below: &[Layer],
        offset: u64,
        from: Sg<'_>,
    ) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.storage.write(io, offset, from).await,
            Self::Qcow2(image) => image.write(io, below, offset, from).await,
            #[cfg(test)]
            Self::Made(_) => Ok(()),
        }
    }

    /// Gives the range up. What it reads as is not defined afterwards.
    pub(super) async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.storage.discard(io, offset, len).await,
            Self::Qcow2(image) => image.discard(io, offset, len).await,
            #[cfg(test)]
            Self::Made(_) => Ok(()),
        }
    }

    /// Makes the range read as zeros.
    pub(super) async fn write_zeroes(
        &self,
        io: &Io,
        below: &[Layer],
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.storage.write_zeroes(io, offset, len, unmap).await,
            Self::Qcow2(image) => image.write_zeroes(io, below, offset, len, unmap).await,
            #[cfg(test)]
            Self::Made(_) => Ok(()),
        }
    }

    /// Makes durable what was completed before.
    pub(super) async fn flush(&self, io: &Io, below: &[Layer]) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.storage.flush(io).await,
            Self::Qcow2(image) => image.flush(io, below).await,
            #[cfg(test)]
            Self::Made(_) => Ok(()),
        }
    }

    /// Writes metadata back that has waited for long, or is much.
    pub(super) async fn write_back_if_due(&self, io: &Io, below: &[Layer]) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.write_back_if_due(io, below).await,
            _ => Ok(()),
        }
    }

    /// Copies at once what must be copied, or puts it off.
    pub(super) async fn set_eager(&self, io: &Io, below: &[Layer], eager: bool) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.set_eager(io, below, eager).await,
            // They put nothing off.
            _ => Ok(()),
        }
    }

    /// Makes the layer's disk `size` bytes long; what is new reads as zeros. Requests may run; those that
    /// begin later and end beyond a smaller size are not to come here. Not to be called from a request.
    ///
    /// # Errors
    /// As [`Qcow2::resize`]. The size has not changed then.
    pub(super) async fn resize(&self, io: &Io, below: &[Layer], size: u64) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.resize(io, size).await,
            Self::Qcow2(image) => {
                let below_size = below.first().map_or(0, Layer::size);
                image.resize(io, below, below_size, size).await
            }
            #[cfg(test)]
            Self::Made(_) => Ok(()),
        }
    }

    /// Says what to call when it is time for [`Layer::fill_ahead`].
    pub(super) fn when_scarce(&self, ahead: impl Fn(&Io) + Send + Sync + 'static) {
        if let Self::Qcow2(image) = self {
            image.when_scarce(ahead);
        }
    }

    /// Does some copying that was put off.
    pub(super) async fn fill_ahead(&self, io: &Io, below: &[Layer]) {
        if let Self::Qcow2(image) = self {
            image.fill_ahead(io, below).await;
        }
    }

    /// The unit of [`Layer::store_copy`], bytes; none if the layer stores no copies of what is below.
    pub(super) fn copy_unit(&self) -> Option<u64> {
        match self {
            Self::Qcow2(image) => image.copy_unit(),
            _ => None,
        }
    }

    /// True if a range would be stored by [`Layer::store_copy`], as far as can be told at once.
    pub(super) fn wants_copy(&self, offset: u64, len: u64) -> bool {
        match self {
            Self::Qcow2(image) => !image.is_eager() && image.is_hole(offset, len),
            _ => false,
        }
    }

    /// True if the image puts nothing off: see [`Layer::set_eager`].
    pub(super) fn is_eager(&self) -> bool {
        matches!(self, Self::Qcow2(image) if image.is_eager())
    }

    /// Makes what the layers below show at `offset`, in `bytes`, the layer's own where it has holes. Bytes stored.
    pub(super) async fn store_copy(
        &self,
        io: &Io,
        offset: u64,
        bytes: &mut AlignedBuf,
    ) -> Result<u64> {
        match self {
            Self::Qcow2(image) => image.store_copy(io, offset, bytes).await,
            _ => Ok(0),
        }
    }

    /// Gives the layer memory that outlives this process, after making good what is in it.
    ///
    /// # Errors
    /// As [`Qcow2::use_journal`]; [`ErrorKind::InvalidImage`] for the journal of another layer.
    pub(super) async fn use_journal(
        &self,
        io: &Io,
        below: &[Layer],
        memory: SharedPart,
    ) -> Result<()> {
        match self {
            Self::Qcow2(image) => image.use_journal(io, below, memory).await,
            // Nothing of theirs is in memory only.
            _ if journal_is_empty(&memory) => Ok(()),
            _ => {
                let what = "the memory that the VMM keeps has changes of another image";
                let path = self.data().path();
                let error = Error::image(ErrorKind::InvalidImage, path, None, what);
                Err(error.hint(
                    "start the disk with the image that it had before; or end the VM and start it anew, \
                     which loses what was not flushed",
                ))
            }
        }
    }

    /// See [`super::ActiveDisk::join`].
    pub(super) fn join(&self, io: &Io) {
        match self {
            Self::Raw(raw) => raw.storage.join(io),
            Self::Qcow2(image) => image.join(io),
            #[cfg(test)]
            Self::Made(_) => {}
        }
    }

    /// Ends the use of the layer, everything durable and reserved space given back.
    pub(super) async fn close(&self, io: &Io, below: &[Layer]) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.storage.flush(io).await,
            Self::Qcow2(image) => image.close(io, below).await,
            #[cfg(test)]
            Self::Made(_) => Ok(()),
        }
    }
}

impl From<Extent> for Mapping {
    #[inline]
    fn from(extent: Extent) -> Self {
        match extent {
            Extent::Data { host, len } => Self::Data {
                offset: host.0,
                len,
            },
            Extent::Zero { len } => Self::Zero { len },
            Extent::Backing { len } => Self::Backing { len },
            Extent::Compressed { data, skip, len } => Self::Compressed {
                cluster: data,
                skip,
                len,
            },
        }
    }
}
