//! A disk in use: what requests go to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::reactor::{Io, Sg};

use super::copy_on_read::{Copies, CopyStats, Stopped};
use super::disk::SECTOR;
use super::error::{Error, ErrorKind, Result};
use super::holes::Holes;
use super::layer::{Layer, requests_ended};
use super::lock::Role;
use super::nvme_tcp::link::Namespace;
use super::nvme_tcp::remote;
use super::nvme_tcp::reservation::Reservation;
use super::spec::{CacheMode, DiskSpec};
use super::stack::{Whole, find_whole, read_pieces};
use super::storage::Storage;

/// The locks of a chain of images; dropping it gives them back.
#[derive(Debug, Default)]
pub(super) struct Locks {
    of: Vec<Arc<Storage>>,
    /// What a lock is for a namespace.
    reservation: Option<Reservation>,
    /// They were given back, or left to another process.
    over: AtomicBool,
}

impl Locks {
    pub(super) fn take(&mut self, storage: &Arc<Storage>, role: Role) -> Result<()> {
        storage.lock(role)?;
        self.of.push(storage.clone());
        Ok(())
    }

    /// Takes the reservation of the namespace that is written to, if there is one and it is wanted. It is not given
    /// up by a drop.
    pub(super) async fn reserve(&mut self, io: &Io, top: &Arc<Storage>) -> Result<()> {
        self.reservation = Reservation::take(io, top).await?;
        Ok(())
    }

    /// Gives the reservation up.
    pub(super) async fn unreserve(&self, io: &Io) -> Result<()> {
        match &self.reservation {
            Some(reservation) => reservation.release(io).await,
            None => Ok(()),
        }
    }

    fn release(&self) {
        if !self.over.swap(true, Ordering::AcqRel) {
            self.of.iter().for_each(|storage| storage.unlock());
        }
    }

    fn keep(&self) {
        if !self.over.swap(true, Ordering::AcqRel) {
            self.of.iter().for_each(|storage| storage.keep_locked());
        }
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.release();
    }
}

/// A disk that serves requests, from any thread with its own [`Io`]. Its images are locked.
#[derive(Debug)]
pub struct ActiveDisk {
    /// Top first; never empty.
    layers: Vec<Layer>,
    /// Those of the layers that are remote.
    namespaces: Vec<Arc<Namespace>>,
    size: AtomicU64,
    /// Held by who changes the size.
    resizing: async_lock::Mutex<()>,
    read_only: bool,
    write_through: bool,
    discard: bool,
    /// What is read through holes is stored in the top image, too.
    copies: Option<Arc<Copies>>,
    /// How deep the holes below the top image are, in a chain of several.
    holes: Option<Holes>,
    locks: Locks,
}

impl ActiveDisk {
    pub(super) fn new(
        layers: Vec<Layer>,
        namespaces: Vec<Arc<Namespace>>,
        locks: Locks,
        size: u64,
        spec: &DiskSpec,
    ) -> Self {
        // One that can not store anything makes no copies.
        let unit = layers[0].copy_unit().filter(|_| spec.copy_on_read);
        Self {
            copies: unit.map(|unit| Arc::new(Copies::new(unit))),
            holes: Holes::of(&layers),
            layers,
            namespaces,
            size: AtomicU64::new(size),
            resizing: async_lock::Mutex::new(()),
            read_only: spec.read_only,
            write_through: spec.cache == CacheMode::Writethrough,
            discard: spec.discard,
            locks,
        }
    }

    /// One whose bytes are those of a simulated storage.
    #[cfg(test)]
    pub(crate) fn made(storage: &Arc<Storage>) -> Arc<Self> {
        let size = storage.len();
        let raw = Layer::Raw(super::layer::Raw::new(storage.clone(), size));
        let source = super::spec::Source::Null { size };
        let spec = DiskSpec::new(source, super::spec::Format::Raw);
        Arc::new(Self::new(
            vec![raw],
            Vec::new(),
            Locks::default(),
            size,
            &spec,
        ))
    }

    /// Bytes of the disk, whole sectors.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// True if writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether one transfer is cheaper than several that make it up: not where none reaches a device.
    pub(crate) fn merging_pays(&self) -> bool {
        !matches!(self.layers[0].data(), Storage::Null(_))
    }

    /// Whether reads and writes of the top image's data end without a thread of the kernel: see
    /// [`Storage::ends_by_interrupt`]. Images below are only read.
    pub(crate) fn ends_by_interrupt(&self) -> bool {
        self.layers[0].data().ends_by_interrupt()
    }

    /// To be called on each worker that will serve requests of this disk, before the first one: its ring holds
    /// on to the disk's own files from then on.
    ///
    /// When this process is killed, its rings end only when what they have under way has ended, and so does the
    /// lock of the files that are registered with them. So whoever holds the image's lock next finds that
    /// nothing of this process can happen any more: no write to the image, and no read, of a backing file
    /// say, into the guest's memory. A read-only disk is shared by its lock, which says nothing of that kind.
    pub fn join(&self, io: &Io) {
        self.layers[0].join(io);
    }

    /// Has copying that was put off done by tasks, where it gets much.
    pub(super) fn fill_ahead_by_tasks(self: &Arc<Self>) {
        let disk = Arc::downgrade(self);
        self.layers[0].when_scarce(move |io| {
            if let Some(disk) = disk.upgrade() {
                let task_io = io.clone();
                let _task = io.spawn(async move {
                    let (top, below) = disk.top();
                    top.fill_ahead(&task_io, below).await;
                });
            }
        });
    }

    /// Has copies made of what is read through holes, if that was asked for and is possible.
    pub(super) fn copy_by_tasks(self: &Arc<Self>) {
        if let Some(copies) = &self.copies {
            copies.belong_to(Arc::downgrade(self));
        }
    }

    /// What copy-on-read has done since the disk was activated.
    pub fn copy_stats(&self) -> CopyStats {
        let stats = self.copies.as_ref().map(|copies| copies.stats());
        stats.unwrap_or_default()
    }

    /// Copies under way.
    #[cfg(test)]
    pub(super) fn copies_under_way(&self) -> usize {
        self.copies.as_ref().map_or(0, |copies| copies.under_way())
    }

    /// As if nothing was known of a copy that failed.
    #[cfg(test)]
    pub(super) fn end_copy_pause(&self) {
        self.copies.iter().for_each(|copies| copies.end_pause());
    }

    /// The top image's name.
    pub(super) fn name(&self) -> &std::path::Path {
        self.layers[0].data().path()
    }

    pub(super) fn top(&self) -> (&Layer, &[Layer]) {
        (&self.layers[0], &self.layers[1..])
    }

    #[inline]
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(self.refuse(ErrorKind::OutOfRange, offset, "beyond the end of the disk")),
        }
    }

    #[inline]
    fn check_change(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(self.refuse(ErrorKind::ReadOnly, offset, "the disk is read-only"));
        }
        self.check(offset, len)
    }

    #[cold]
    fn refuse(&self, kind: ErrorKind, offset: u64, message: &str) -> Error {
        Error::image(kind, self.layers[0].data().path(), offset, message)
    }

    /// Fills `to` from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the disk, else those of images and storage; as for all requests.
    #[inline]
    pub async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        let _pin = io.pin();
        let len = to.len() as u64;
        self.check(offset, len)?;
        let copies = self.copies.as_ref();
        match find_whole(
            &self.layers,
            self.holes.as_ref(),
            offset,
            len,
            copies.is_some(),
        ) {
            Some(Whole::Data(storage, at)) => storage.read(io, at, to).await,
            Some(Whole::Zero) => {
                to.zero();
                Ok(())
            }
            None => read_pieces(&self.layers, io, offset, to, copies).await,
        }
    }

    /// Writes `from` at `offset`. Durable after the next flush, or at once where the disk writes through.
    ///
    /// # Errors
    /// As [`ActiveDisk::read`]; [`ErrorKind::ReadOnly`]; [`ErrorKind::NoSpace`].
    #[inline]
    pub async fn write(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        let _pin = io.pin();
        let len = from.len() as u64;
        self.check_change(offset, len)?;
        let (top, below) = self.top();
        match top.in_place(io, offset, len) {
            Some(at) => top.data().write(io, at, from).await?,
            None => top.write(io, below, offset, from).await?,
        }
        if self.write_through {
            self.written(io).await?;
        }
        Ok(())
    }

    /// Gives the range up: what it reads as afterwards is not defined, and its space may be given back.
    ///
    /// # Errors
    /// As [`ActiveDisk::write`].
    pub async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        let _pin = io.pin();
        self.check_change(offset, len)?;
        if !self.discard || len == 0 {
            return Ok(());
        }
        self.top().0.discard(io, offset, len).await?;
        self.written(io).await
    }

    /// Makes the range read as zeros; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As [`ActiveDisk::write`].
    pub async fn write_zeroes(&self, io: &Io, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let _pin = io.pin();
        self.check_change(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let (top, below) = self.top();
        let unmap = unmap && self.discard;
        top.write_zeroes(io, below, offset, len, unmap).await?;
        self.written(io).await
    }

    /// Makes everything durable whose request completed before.
    ///
    /// # Errors
    /// Those of images and storage: what was written may be lost.
    pub async fn flush(&self, io: &Io) -> Result<()> {
        let _pin = io.pin();
        if self.read_only {
            return Ok(());
        }
        let (top, below) = self.top();
        top.flush(io, below).await
    }

    /// Writes metadata back that has waited for long, or is much. To be called once a second or so, from
    /// one thread: it bounds what the next flush has to do.
    ///
    /// # Errors
    /// As [`ActiveDisk::flush`].
    pub async fn write_back_if_due(&self, io: &Io) -> Result<()> {
        let _pin = io.pin();
        if self.read_only {
            return Ok(());
        }
        let (top, below) = self.top();
        top.write_back_if_due(io, below).await
    }

    /// Puts no copying off any more, or does again; being eager begins with what was put off. Not to be called
    /// from a request.
    ///
    /// # Errors
    /// As [`ActiveDisk::flush`]; what could not be completed is tried again by the next flush.
    pub async fn set_eager(&self, io: &Io, eager: bool) -> Result<()> {
        let _pin = io.pin();
        if self.read_only {
            return Ok(());
        }
        let (top, below) = self.top();
        top.set_eager(io, below, eager).await
    }

    /// Changes the disk's size to `size` bytes, whole sectors. What is new reads as zeros; requests that end
    /// beyond a smaller size are refused from the call on. Not to be called from a request: it waits for those
    /// that began before. The guest is told of it elsewhere.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a size that cannot be, [`ErrorKind::ReadOnly`],
    /// [`ErrorKind::Unsupported`] for an image that cannot be resized; those of images and storage. The size
    /// has not changed then, unless that can not be undone; what is beyond a smaller one may have lost its
    /// contents.
    pub async fn resize(&self, io: &Io, size: u64) -> Result<()> {
        let _one = self.resizing.lock().await;
        if self.read_only {
            return Err(self.refuse(ErrorKind::ReadOnly, 0, "the disk is read-only"));
        }
        if size == 0 || size % SECTOR != 0 {
            let what = format!("{size} bytes are no size of a disk; write a multiple of {SECTOR}");
            return Err(self.refuse(ErrorKind::OutOfRange, 0, &what));
        }
        let _no_copies = self.stop_copies().await;
        let old = self.size();
        if size < old {
            self.size.store(size, Ordering::SeqCst);
        }
        let (top, below) = self.top();
        let resized = top.resize(io, below, size).await;
        self.size
            .store(top.size() / SECTOR * SECTOR, Ordering::SeqCst);
        resized
    }

    /// Looks whether another program has changed the size of the file, block device or namespace whose bytes are the
    /// disk's, takes the size that it has now, and returns it: whole sectors, 0 if there is none. Requests that
    /// end beyond a smaller size are refused from then on, and those that began before are waited for. A qcow2
    /// image is locked, and keeps its size. Not to be called from a request.
    ///
    /// # Errors
    /// The file does not tell its size, or a namespace of the disk has gone. Nothing has changed then.
    pub async fn refresh(&self, io: &Io) -> Result<u64> {
        let _one = self.resizing.lock().await;
        self.namespaces
            .iter()
            .try_for_each(|namespace| remote::look_at(namespace))?;
        let top = &self.layers[0];
        let outside = top.size_outside()?;
        let size = outside / SECTOR * SECTOR;
        if size < self.size() {
            self.size.store(size, Ordering::SeqCst);
            requests_ended(io).await;
        }
        top.use_size(outside);
        self.size.store(size, Ordering::SeqCst);
        Ok(size)
    }

    #[inline]
    async fn written(&self, io: &Io) -> Result<()> {
        if self.write_through {
            let (top, below) = self.top();
            return top.flush(io, below).await;
        }
        Ok(())
    }

    /// Ends the disk's use: everything is flushed, reserved space given back, the locks are released.
    /// The caller vouches that no request runs and none begins.
    ///
    /// # Errors
    /// The first one met; the locks are released all the same.
    pub async fn deactivate(self: Arc<Self>, io: &Io) -> Result<()> {
        let closed = self.close(io).await;
        let unreserved = self.locks.unreserve(io).await;
        self.locks.release();
        closed.and(unreserved)
    }

    /// As [`ActiveDisk::deactivate`], but the images stay locked: for a process that has
    /// [their files](ActiveDisk::files) and goes on with them, or for this one.
    ///
    /// # Errors
    /// As [`ActiveDisk::deactivate`]; the images stay locked all the same.
    pub async fn deactivate_locked(self: Arc<Self>, io: &Io) -> Result<()> {
        let closed = self.close(io).await;
        self.locks.keep();
        closed
    }

    async fn stop_copies(&self) -> Option<Stopped<'_>> {
        match &self.copies {
            Some(copies) => Some(copies.stop().await),
            None => None,
        }
    }

    async fn close(&self, io: &Io) -> Result<()> {
        let _no_copies = self.stop_copies().await;
        let stats = self.copy_stats();
        if stats != CopyStats::default() {
            log::info!("{}: copy-on-read: {stats}", self.name().display());
        }
        match self.read_only {
            true => Ok(()),
            false => self.layers[0].close(io, &self.layers[1..]).await,
        }
    }

    /// Descriptors of all files that are locked, to be handed to another process.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn files(&self) -> std::io::Result<Vec<std::fs::File>> {
        let files = self.locks.of.iter().filter_map(|storage| match &**storage {
            Storage::File(file) => Some(file.file().try_clone()),
            _ => None,
        });
        files.collect()
    }
}
