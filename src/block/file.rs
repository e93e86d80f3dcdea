//! A regular file or a block device, through the reactor.
//!
//! A request that the kernel takes as it is costs one operation. What O_DIRECT refuses goes through a
//! buffer (`bounce`), and a write that covers blocks in part holds them alone meanwhile ([`Edges`]).

pub(super) mod edges;
mod probe;
mod space;

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::reactor::{Io, IoFile, Op, Sg};

use super::error::{Error, ErrorKind, Result};
use super::handed::HandedFiles;
use super::storage::Limits;
use edges::{EdgeGuard, Edges};

/// Bytes a step where a long transfer is made in steps.
const STEP: u64 = 1 << 20;
/// EAGAIN is taken this often, a millisecond apart, before it is an error.
const PATIENCE: u32 = 5_000;

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Go past the page cache (O_DIRECT), where the file system can.
    pub direct: bool,
}

/// An open regular file or block device.
#[derive(Debug)]
pub struct FileStorage {
    path: PathBuf,
    file: IoFile,
    device: bool,
    direct: bool,
    read_only: bool,
    limits: Limits,
    len: AtomicU64,
    identity: (u64, u64),
    /// Modes of `fallocate` found not to work here, by `space::mode_bit`.
    refused: AtomicU32,
    /// errno of a flush that failed with dirty pages in the page cache; 0: none.
    lost: AtomicI32,
    edges: Edges,
    pub(super) held: super::lock::Held,
    /// Of a file that was handed over: whether its locks are this process's to give back.
    pub(super) locks_ours: Option<Arc<AtomicBool>>,
}

impl FileStorage {
    /// Opens `path`. Blocks: not for a worker.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self> {
        Self::open_with(path, options, &HandedFiles::default())
    }

    /// As [`FileStorage::open`]; goes on with the one of `handed` that is this very file.
    pub fn open_with(
        path: impl AsRef<Path>,
        options: FileOptions,
        handed: &HandedFiles,
    ) -> Result<Self> {
        let path = path.as_ref();
        let opened = probe::open(path, options.read_only, options.direct)?;
        let (file, locks_ours) = match handed.take(&opened.file) {
            Some(handed) => (handed.file, Some(handed.ours)),
            None => (opened.file, None),
        };
        Ok(Self {
            path: path.to_owned(),
            file: IoFile::of_disk(file),
            device: opened.device,
            direct: opened.direct,
            read_only: options.read_only,
            limits: opened.limits,
            len: AtomicU64::new(opened.len),
            identity: opened.identity,
            refused: AtomicU32::new(0),
            lost: AtomicI32::new(0),
            edges: Edges::default(),
            held: super::lock::Held::default(),
            locks_ours,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// True if it goes past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// True for a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// Equal for the same file by two names: (device, inode), or (device number, all ones).
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    pub(super) fn join(&self, io: &Io) {
        io.register(&self.file);
    }

    /// The identity of what `path` leads to now.
    pub(super) fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
        std::fs::metadata(path).map(|meta| probe::identity(&meta))
    }

    /// The file's name as the kernel knows it, if it tells.
    pub(super) fn real_path(&self) -> Option<PathBuf> {
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        std::fs::read_link(link).ok()
    }

    pub(super) fn file(&self) -> &std::fs::File {
        self.file.get()
    }

    /// Reads the size again.
    pub(super) fn refresh_len(&self) -> Result<()> {
        let len = probe::size(&self.path, self.file.get())?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    pub(super) fn refresh(&self) -> Result<()> {
        self.refresh_len()?;
        // Everything is read anew; whoever flushed in vain was told.
        self.lost.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Behaves as on a device of larger blocks.
    #[cfg(test)]
    pub(super) fn pretend_blocks_of(&mut self, bytes: usize) {
        self.limits.io_align = bytes;
    }

    /// Behaves as on a file system without `fallocate`.
    #[cfg(test)]
    pub(super) fn pretend_no_fallocate(&self) {
        self.refused.store(u32::MAX, Ordering::Relaxed);
    }

    fn error(&self, operation: &'static str, offset: u64, source: io::Error) -> Error {
        let error = Error::io(&self.path, operation, offset, source);
        match error.kind() {
            ErrorKind::NoSpace => error.hint("make room where the image is, then try again"),
            _ => error,
        }
    }

    fn writable(&self) -> Result<()> {
        if self.read_only {
            let message = "opened read-only";
            return Err(Error::image(ErrorKind::ReadOnly, &self.path, None, message));
        }
        Ok(())
    }

    /// True if the kernel takes the request as it is.
    #[inline]
    fn straight(&self, offset: u64, sg: Sg<'_>) -> bool {
        let (mem, io) = (self.limits.mem_align - 1, self.limits.io_align - 1);
        if mem | io == 0 {
            return true;
        }
        offset & io as u64 == 0
            && sg
                .iter()
                .all(|(at, len)| at as usize & mem == 0 && len & io == 0)
    }

    #[inline]
    fn in_range(offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= i64::MAX as u64)
    }

    fn out_of_range(&self, offset: u64) -> Error {
        let message = "beyond what a file can hold";
        Error::image(ErrorKind::OutOfRange, &self.path, offset, message)
    }

    /// The blocks that a range touches.
    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let align = self.limits.io_align as u64;
        offset / align * align..(offset + len).next_multiple_of(align)
    }

    /// A write shares its blocks where others may come with parts of a block: a guest writes in 512
    /// bytes at the least, and metadata keeps its own order.
    fn shares_blocks(&self) -> bool {
        self.limits.io_align > 512
    }

    #[inline]
    pub(super) fn begin_read<'a>(&'a self, io: &'a Io, offset: u64, to: Sg<'a>) -> Pending<'a> {
        let ok = Self::in_range(offset, to.len() as u64) && self.straight(offset, to);
        Pending {
            storage: self,
            op: (ok && !to.is_empty()).then(|| io.read(&self.file, offset, to)),
            guard: None,
            offset,
            sg: to,
            write: false,
        }
    }

    #[inline]
    pub(super) fn begin_write<'a>(&'a self, io: &'a Io, offset: u64, from: Sg<'a>) -> Pending<'a> {
        let len = from.len() as u64;
        let mut ok = !self.read_only && Self::in_range(offset, len) && self.straight(offset, from);
        let mut guard = None;
        if ok && self.shares_blocks() {
            guard = self.edges.try_hold(offset..offset + len, false);
            ok = guard.is_some();
        }
        Pending {
            storage: self,
            op: (ok && !from.is_empty()).then(|| io.write(&self.file, offset, from)),
            guard,
            offset,
            sg: from,
            write: true,
        }
    }

    #[inline]
    fn grown(&self, end: u64) {
        if end > self.len.load(Ordering::Relaxed) && !self.device {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Ok if an operation that failed like this is to be tried again.
    #[cold]
    async fn again(
        &self,
        io: &Io,
        tries: &mut u32,
        operation: &'static str,
        offset: u64,
        error: io::Error,
    ) -> Result<()> {
        *tries += 1;
        match error.raw_os_error() {
            Some(libc::EINTR) if *tries < PATIENCE => Ok(()),
            Some(libc::EAGAIN) if *tries < PATIENCE => {
                io.sleep(Duration::from_millis(1)).await;
                Ok(())
            }
            _ => Err(self.error(operation, offset, error)),
        }
    }

    /// Goes on with a read of aligned blocks after its first result.
    #[cold]
    async fn read_on(&self, io: &Io, at: u64, to: Sg<'_>, first: io::Result<u32>) -> Result<()> {
        let (mut done, mut tries, mut outcome) = (0, 0, first);
        loop {
            match outcome {
                Ok(0) => break,
                Ok(count) => {
                    done += count as usize;
                    // Past the page cache only the end of the file cuts a block.
                    if done >= to.len() || done % self.limits.io_align != 0 {
                        break;
                    }
                }
                Err(e) => {
                    self.again(io, &mut tries, "read", at + done as u64, e)
                        .await?
                }
            }
            let rest = to.split_at(done).1;
            outcome = io.read(&self.file, at + done as u64, rest).await;
        }
        to.split_at(done).1.zero();
        Ok(())
    }

    /// Goes on with a write of aligned blocks after its first result.
    #[cold]
    async fn write_on(&self, io: &Io, at: u64, from: Sg<'_>, first: io::Result<u32>) -> Result<()> {
        let (mut done, mut tries, mut outcome) = (0, 0, first);
        loop {
            match outcome {
                Ok(count) => {
                    let before = done;
                    done += count as usize;
                    if done >= from.len() {
                        break;
                    }
                    done -= done % self.limits.io_align;
                    if done == before {
                        let stuck = io::Error::from_raw_os_error(libc::EAGAIN);
                        self.again(io, &mut tries, "write", at + done as u64, stuck)
                            .await?;
                    }
                }
                Err(e) => {
                    self.again(io, &mut tries, "write", at + done as u64, e)
                        .await?
                }
            }
            let rest = from.split_at(done).1;
            outcome = io.write(&self.file, at + done as u64, rest).await;
        }
        self.grown(at + from.len() as u64);
        Ok(())
    }

    /// A read that O_DIRECT refuses: whole blocks into a buffer, the bytes from there.
    #[cold]
    async fn read_bounced(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        if !Self::in_range(offset, to.len() as u64) {
            return Err(self.out_of_range(offset));
        }
        let blocks = self.blocks(offset, to.len() as u64);
        let (mut at, mut rest) = (blocks.start, to);
        let mut skip = (offset - blocks.start) as usize;
        while !rest.is_empty() {
            let step = (blocks.end - at).min(STEP);
            let mut buf = io.buf(step as usize);
            let first = io.read(&self.file, at, buf.sg()).await;
            self.read_on(io, at, buf.sg(), first).await?;
            let done = rest.copy_from(&buf[skip..]);
            (rest, skip, at) = (rest.split_at(done).1, 0, at + step);
        }
        Ok(())
    }

    /// A write that O_DIRECT refuses: from a buffer of whole blocks, with what stood at the edges.
    #[cold]
    async fn write_bounced(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        self.writable()?;
        if from.is_empty() {
            return Ok(());
        }
        if !Self::in_range(offset, from.len() as u64) {
            return Err(self.out_of_range(offset));
        }
        let end = offset + from.len() as u64;
        let align = self.limits.io_align as u64;
        let blocks = self.blocks(offset, from.len() as u64);
        let in_part = blocks != (offset..end);
        let _held = match in_part || self.shares_blocks() {
            true => Some(self.edges.hold(blocks.clone(), in_part).await),
            false => None,
        };
        let (mut at, mut rest) = (blocks.start, from);
        while at < blocks.end {
            let step = (blocks.end - at).min(STEP);
            let mut buf = io.buf(step as usize);
            let skip = offset.saturating_sub(at) as usize;
            let covered = (end - at).min(step) as usize;
            if skip > 0 {
                self.read_block(io, at, buf.sg().slice(0, align as usize))
                    .await?;
            }
            let last = step - align;
            if covered < step as usize && (skip == 0 || last > 0) {
                let block = buf.sg().slice(last as usize, align as usize);
                self.read_block(io, at + last, block).await?;
            }
            let done = rest.copy_to(&mut buf[skip..covered]);
            let first = io.write(&self.file, at, buf.sg()).await;
            self.write_on(io, at, buf.sg(), first).await?;
            (rest, at) = (rest.split_at(done).1, at + step);
        }
        Ok(())
    }

    async fn read_block(&self, io: &Io, at: u64, block: Sg<'_>) -> Result<()> {
        let first = io.read(&self.file, at, block).await;
        self.read_on(io, at, block, first).await
    }

    pub(super) async fn flush(&self, io: &Io) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let lost = self.lost.load(Ordering::Relaxed);
        if lost != 0 {
            let error = self.error("flush", 0, io::Error::from_raw_os_error(lost));
            return Err(error.hint(
                "an earlier flush failed and the page cache may have dropped what was written: \
                 the image must be opened afresh",
            ));
        }
        let mut tries = 0;
        while let Err(error) = io.fdatasync(&self.file).await {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            let told = self.again(io, &mut tries, "flush", 0, error).await;
            if told.is_err() && !self.direct {
                // The kernel reports lost pages once and calls them clean: a retry would lie.
                self.lost.store(errno, Ordering::Relaxed);
            }
            told?;
        }
        Ok(())
    }
}

/// A transfer of a file under way.
#[derive(Debug)]
pub(super) struct Pending<'a> {
    storage: &'a FileStorage,
    /// None: the kernel would refuse it as it is, or it has to wait for a neighbour.
    op: Option<Op<'a>>,
    guard: Option<EdgeGuard<'a>>,
    offset: u64,
    sg: Sg<'a>,
    write: bool,
}

impl<'a> Pending<'a> {
    /// Where in the file it is.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The memory that is transferred.
    pub(super) fn sg(&self) -> Sg<'a> {
        self.sg
    }

    #[inline]
    pub(super) async fn finish(mut self, io: &Io) -> Result<()> {
        let (storage, offset, sg) = (self.storage, self.offset, self.sg);
        let Some(op) = self.op.take() else {
            drop(self.guard.take());
            return match self.write {
                true => Box::pin(storage.write_bounced(io, offset, sg)).await,
                false => Box::pin(storage.read_bounced(io, offset, sg)).await,
            };
        };
        match op.await {
            Ok(count) if count as usize == sg.len() => {
                if self.write {
                    storage.grown(offset + u64::from(count));
                }
                Ok(())
            }
            first if self.write => Box::pin(storage.write_on(io, offset, sg, first)).await,
            first => Box::pin(storage.read_on(io, offset, sg, first)).await,
        }
    }
}
