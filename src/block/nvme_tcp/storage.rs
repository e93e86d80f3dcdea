//! A remote namespace as a storage: bytes by offset.
//!
//! Whole blocks go straight between the caller's memory and the sockets. Parts of blocks go through a buffer, and a
//! write of a part holds its blocks alone meanwhile ([`Edges`]), as in a file past the page cache.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::link::{Namespace, NamespaceState};
use super::local::Shared;
use super::queue::{Kind, Running};
use super::reservation::Action;
use super::wire::command::DsmRange;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::file::edges::{EdgeGuard, Edges};
use crate::block::storage::Limits;
use crate::block::zeros::Zeros;
use crate::reactor::{AlignedBuf, Io, Sg};

/// Bytes a step where a long transfer is made in steps.
const STEP: u64 = 1 << 20;

/// A remote namespace in use. Dropping it ends its connections.
#[derive(Debug)]
pub struct NvmeStorage {
    shared: Arc<Shared>,
    edges: Edges,
}

impl Drop for NvmeStorage {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl NvmeStorage {
    /// A namespace that its paths' threads have found. It is this storage's from then on.
    pub fn new(namespace: Arc<Namespace>) -> Self {
        Self {
            shared: Shared::new(namespace),
            edges: Edges::default(),
        }
    }

    /// The namespace.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.shared.namespace
    }

    pub(in crate::block) fn path(&self) -> &Path {
        self.namespace().name()
    }

    pub(in crate::block) fn len(&self) -> u64 {
        self.namespace().bytes()
    }

    /// Where reads begin to find zeros: nothing was ever there.
    pub(in crate::block) fn largest_len(&self) -> u64 {
        self.namespace().largest_bytes()
    }

    pub(in crate::block) fn limits(&self) -> &Limits {
        &self.namespace().geometry().limits
    }

    pub(in crate::block) fn read_only(&self) -> bool {
        self.namespace().spec().read_only
            || self.namespace().state() == NamespaceState::WriteProtected
    }

    /// Equal for the same namespace by two names.
    pub(in crate::block) fn identity(&self) -> (u64, u64) {
        let identity = u128::from_be_bytes(self.namespace().geometry().identity);
        ((identity >> 64) as u64, identity as u64)
    }

    /// Has this thread's queues connected, so that the first request need not wait for that.
    pub(in crate::block) fn join(&self, io: &Io) {
        let _joined = self.shared.local(io);
    }

    fn refuse(&self, kind: ErrorKind, what: &str, offset: u64, why: &str) -> Error {
        Error::image(kind, self.path(), offset, format_args!("{what}: {why}"))
    }

    fn writable(&self, what: &str, offset: u64) -> Result<()> {
        if self.namespace().spec().read_only {
            return Err(self.refuse(ErrorKind::ReadOnly, what, offset, "opened read-only"));
        }
        if self.namespace().state() == NamespaceState::WriteProtected {
            let why = "the target protects the namespace from writing: lift that, or attach the disk read-only";
            return Err(self.refuse(ErrorKind::ReadOnly, what, offset, why));
        }
        Ok(())
    }

    fn in_range(&self, what: &str, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len).is_some_and(|end| end <= self.len()) {
            true => Ok(()),
            false => {
                let why = format!("beyond the namespace's end at {:#x}", self.len());
                Err(self.refuse(ErrorKind::OutOfRange, what, offset, &why))
            }
        }
    }

    /// Refuses a read of what the namespace has lost by shrinking: it is no zeros, and whoever stored it as such, in
    /// an overlay, would keep them when the namespace has grown back. `inside` of the `len` bytes are there.
    #[cold]
    fn none_lost(&self, offset: u64, inside: usize, len: usize) -> Result<()> {
        let first = offset.saturating_add(inside as u64);
        if inside == len || first >= self.largest_len() {
            return Ok(());
        }
        let why = format!(
            "the namespace has shrunk, and ends at {:#x}; enlarge it at the target",
            self.len()
        );
        Err(self.refuse(ErrorKind::OutOfRange, "read", first, &why))
    }

    #[inline]
    fn block(&self) -> u64 {
        self.namespace().geometry().block.into()
    }

    #[inline]
    fn is_whole(&self, offset: u64, len: usize) -> bool {
        (offset | len as u64) & (self.block() - 1) == 0
    }

    /// The blocks that a range touches, in bytes; the range is inside the namespace.
    fn blocks(&self, offset: u64, len: u64) -> Range<u64> {
        let block = self.block();
        offset / block * block..(offset + len).next_multiple_of(block)
    }

    /// A write of whole blocks shares them where others may come with parts of a block.
    #[inline]
    fn shares_blocks(&self) -> bool {
        self.block() > 512
    }

    /// # Safety
    /// As [`Running::begin`].
    #[inline]
    unsafe fn run(&self, io: &Io, kind: Kind, offset: u64, len: u64, data: Sg<'_>) -> Running {
        let local = self.shared.local(io);
        // SAFETY: the caller's promise.
        unsafe { Running::begin(local, kind, offset, len, data) }
    }

    #[inline]
    pub(in crate::block) fn begin_read<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        to: Sg<'a>,
    ) -> Pending<'a> {
        let inside = self.len().saturating_sub(offset).min(to.len() as u64) as usize;
        let straight = self.is_whole(offset, to.len());
        let running = (straight && inside > 0).then(|| {
            let part = to.split_at(inside).0;
            // SAFETY: what is returned, which cancels the request when it is dropped, does not outlive the memory.
            unsafe { self.run(io, Kind::Read, offset, inside as u64, part) }
        });
        Pending {
            storage: self,
            running,
            guard: None,
            offset,
            sg: to,
            what: match straight {
                true => What::Read { inside },
                false => What::ReadInParts,
            },
        }
    }

    #[inline]
    pub(in crate::block) fn begin_write<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        from: Sg<'a>,
    ) -> Pending<'a> {
        let len = from.len() as u64;
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len());
        let mut straight =
            fits && len > 0 && self.is_whole(offset, from.len()) && !self.read_only();
        let mut guard = None;
        if straight && self.shares_blocks() {
            guard = self.edges.try_hold(offset..offset + len, false);
            straight = guard.is_some();
        }
        // SAFETY: as in `begin_read`.
        let running = straight.then(|| unsafe { self.run(io, Kind::Write, offset, len, from) });
        Pending {
            storage: self,
            running,
            guard,
            offset,
            sg: from,
            what: What::Write { straight },
        }
    }

    /// A read of parts of blocks: whole ones into a buffer, the bytes from there.
    #[cold]
    async fn read_in_parts(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        let inside = self.len().saturating_sub(offset).min(to.len() as u64);
        let (mut rest, beyond) = to.split_at(inside as usize);
        self.none_lost(offset, inside as usize, to.len())?;
        beyond.zero();
        if rest.is_empty() {
            return Ok(());
        }
        let blocks = self.blocks(offset, inside);
        let mut at = blocks.start;
        let mut skip = (offset - at) as usize;
        while !rest.is_empty() {
            let step = (blocks.end - at).min(STEP);
            let mut buf = io.buf(step as usize);
            self.read_block(io, at, buf.sg()).await?;
            let done = rest.copy_from(&buf[skip..]);
            (rest, skip, at) = (rest.split_at(done).1, 0, at + step);
        }
        Ok(())
    }

    /// A write that cannot go straight: from a buffer of whole blocks, with what stood at the edges.
    #[cold]
    async fn write_in_parts(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        self.writable("write", offset)?;
        self.in_range("write", offset, from.len() as u64)?;
        if from.is_empty() {
            return Ok(());
        }
        let end = offset + from.len() as u64;
        let block = self.block();
        let blocks = self.blocks(offset, from.len() as u64);
        let in_part = blocks != (offset..end);
        let _held = self.edges.hold(blocks.clone(), in_part).await;
        let (mut at, mut rest) = (blocks.start, from);
        while at < blocks.end {
            let step = (blocks.end - at).min(STEP);
            let mut buf = io.buf(step as usize);
            let skip = offset.saturating_sub(at) as usize;
            let covered = (end - at).min(step) as usize;
            if skip > 0 {
                let first = buf.sg().slice(0, block as usize);
                self.read_block(io, at, first).await?;
            }
            let last = step - block;
            if covered < step as usize && (skip == 0 || last > 0) {
                let sg = buf.sg().slice(last as usize, block as usize);
                self.read_block(io, at + last, sg).await?;
            }
            let done = rest.copy_to(&mut buf[skip..covered]);
            // SAFETY: the buffer lives until the request's end, or its cancelling with this future.
            let running = unsafe { self.run(io, Kind::Write, at, step, buf.sg()) };
            running.finish().await?;
            (rest, at) = (rest.split_at(done).1, at + step);
        }
        Ok(())
    }

    async fn read_block(&self, io: &Io, at: u64, to: Sg<'_>) -> Result<()> {
        // SAFETY: the memory lives until the request's end, or its cancelling with this future.
        let running = unsafe { self.run(io, Kind::Read, at, to.len() as u64, to) };
        running.finish().await
    }

    pub(in crate::block) async fn flush(&self, io: &Io) -> Result<()> {
        if self.namespace().spec().read_only {
            return Ok(());
        }
        self.command(io, Kind::Flush, 0, 0).await
    }

    /// Runs a command without data.
    async fn command(&self, io: &Io, kind: Kind, offset: u64, len: u64) -> Result<()> {
        // SAFETY: there is no memory.
        let running = unsafe { self.run(io, kind, offset, len, Sg::empty()) };
        running.finish().await
    }

    /// Runs a command of reservations, which concern the namespace as a whole; `data` is what it wants or gives.
    pub(super) async fn reservation(&self, io: &Io, action: Action, data: Sg<'_>) -> Result<()> {
        let (kind, len) = (Kind::Reservation(action), data.len() as u64);
        // SAFETY: the memory lives until the request's end, or its cancelling with this future.
        let running = unsafe { self.run(io, kind, 0, len, data) };
        running.finish().await
    }

    pub(in crate::block) async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        self.writable("discard", offset)?;
        let grain = u64::from(self.limits().discard_granularity);
        if grain == 0 {
            return Ok(());
        }
        // Parts of blocks are not discarded, and what is less than the granularity frees nothing.
        let grain = grain.next_multiple_of(self.block());
        let end = offset.saturating_add(len).min(self.len()) / grain * grain;
        let start = offset.div_ceil(grain).saturating_mul(grain);
        if start >= end {
            return Ok(());
        }
        let _held = match self.shares_blocks() {
            true => Some(self.edges.hold(start..end, false).await),
            false => None,
        };
        self.command(io, Kind::Wait, offset, 0).await?;
        let limits = self.shared.local(io).discard_limits();
        let mut list = io.buf(DsmRange::MAX * DsmRange::BYTES);
        let mut at = start;
        while at < end {
            let (ranges, next) = limits.fill(&mut list, self.block(), at..end);
            let kind = Kind::Discard { ranges };
            let data = list.sg().split_at(usize::from(ranges) * DsmRange::BYTES).0;
            // SAFETY: as in `write_in_parts`.
            let running = unsafe { self.run(io, kind, at, next - at, data) };
            match running.finish().await {
                // It is a hint.
                Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),
                other => other?,
            }
            at = next;
        }
        Ok(())
    }

    pub(in crate::block) async fn write_zeroes(
        &self,
        io: &Io,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<()> {
        self.writable("write zeroes", offset)?;
        self.in_range("write zeroes", offset, len)?;
        let (block, end) = (self.block(), offset + len);
        let (start, stop) = (offset.next_multiple_of(block), end / block * block);
        if start >= stop || !self.zero_blocks(io, start..stop, may_unmap).await? {
            return self.write_of_zeros(io, offset, end).await;
        }
        self.write_of_zeros(io, offset, start).await?;
        self.write_of_zeros(io, stop, end).await
    }

    /// Zeroes whole blocks by command. False: the controller knows none.
    async fn zero_blocks(&self, io: &Io, range: Range<u64>, may_unmap: bool) -> Result<bool> {
        let _held = match self.shares_blocks() {
            true => Some(self.edges.hold(range.clone(), false).await),
            false => None,
        };
        let deallocate = may_unmap && self.namespace().geometry().deallocated_reads_zero;
        let kind = Kind::WriteZeroes { deallocate };
        let len = range.end - range.start;
        match self.command(io, kind, range.start, len).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn write_of_zeros(&self, io: &Io, offset: u64, end: u64) -> Result<()> {
        if offset >= end {
            return Ok(());
        }
        let mut zeros = Zeros::new(io, offset..end, STEP);
        while let Some((at, from)) = zeros.next() {
            Box::pin(self.begin_write(io, at, from).finish(io)).await?;
        }
        Ok(())
    }

    /// Makes the range read as zeros, if the controller has a command for it. Space is the target's matter.
    pub(in crate::block) async fn allocate(&self, io: &Io, offset: u64, len: u64) -> Result<bool> {
        self.writable("allocate", offset)?;
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            let why = "beyond the end of the namespace; enlarge it at the target";
            return Err(self.refuse(ErrorKind::NoSpace, "allocate", offset, why));
        }
        match len > 0 && self.is_whole(offset, len as usize) {
            true => self.zero_blocks(io, offset..offset + len, true).await,
            false => Ok(len == 0),
        }
    }

    /// A namespace has the size that the target gives it.
    pub(in crate::block) fn set_len(&self, len: u64) -> Result<()> {
        self.writable("resize", len)?;
        if len > self.len() {
            let why = "a namespace is enlarged at the target, and the disk follows";
            return Err(self.refuse(ErrorKind::NoSpace, "resize", len, why));
        }
        Ok(())
    }
}

/// How much of a discard goes into a command, whichever path it takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiscardLimits {
    pub(super) ranges: u16,
    pub(super) range_blocks: u32,
    pub(super) blocks: u64,
}

impl DiscardLimits {
    /// Lists as much of `bytes` as one command takes; returns how many ranges that are, and where they end.
    fn fill(&self, list: &mut AlignedBuf, block: u64, bytes: Range<u64>) -> (u16, u64) {
        let (mut ranges, mut at) = (0, bytes.start);
        let mut left = self.blocks.max(1);
        let most = self.ranges.clamp(1, DsmRange::MAX as u16);
        for entry in list.chunks_exact_mut(DsmRange::BYTES).take(most.into()) {
            let blocks = ((bytes.end - at) / block)
                .min(left)
                .min(self.range_blocks.max(1).into());
            if blocks == 0 {
                break;
            }
            let range = DsmRange {
                slba: at / block,
                blocks: blocks as u32,
            };
            entry.copy_from_slice(&range.encode());
            ranges += 1;
            left -= blocks;
            at += blocks * block;
        }
        (ranges, at)
    }
}

#[derive(Clone, Copy, Debug)]
enum What {
    Read {
        /// Bytes before the end of the namespace.
        inside: usize,
    },
    ReadInParts,
    Write {
        straight: bool,
    },
}

/// A transfer under way. Dropped, it is given up: its memory is not touched any more.
#[derive(Debug)]
pub(in crate::block) struct Pending<'a> {
    storage: &'a NvmeStorage,
    running: Option<Running>,
    guard: Option<EdgeGuard<'a>>,
    offset: u64,
    sg: Sg<'a>,
    what: What,
}

impl Pending<'_> {
    #[inline]
    pub(in crate::block) async fn finish(mut self, io: &Io) -> Result<()> {
        let (storage, offset, sg) = (self.storage, self.offset, self.sg);
        if let Some(running) = self.running.take() {
            running.finish().await?;
        }
        match self.what {
            What::Read { inside } if inside == sg.len() => Ok(()),
            What::Read { inside } => {
                storage.none_lost(offset, inside, sg.len())?;
                sg.split_at(inside).1.zero();
                Ok(())
            }
            What::ReadInParts => Box::pin(storage.read_in_parts(io, offset, sg)).await,
            What::Write { straight: true } => Ok(()),
            What::Write { straight: false } => {
                drop(self.guard.take());
                Box::pin(storage.write_in_parts(io, offset, sg)).await
            }
        }
    }
}
