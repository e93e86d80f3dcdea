//! A file's space: reserving it, zeroing it, giving it back.

use std::io;
use std::sync::atomic::Ordering;

use crate::reactor::Io;

use super::{FileStorage, STEP};
use crate::block::error::{ErrorKind, Result};
use crate::block::zeros::Zeros;

/// Bytes an `fallocate` at most, so that none takes for ever.
const FALLOCATE_STEP: u64 = 1 << 30;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
const RESERVE: i32 = 0;

impl FileStorage {
    /// False: this file does not do it; remembered where it is so for good.
    async fn fallocate(
        &self,
        io: &Io,
        operation: &'static str,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> Result<bool> {
        let bit = mode_bit(mode);
        if self.refused.load(Ordering::Relaxed) & bit != 0 {
            return Ok(false);
        }
        let _held = match self.shares_blocks() && len > 0 {
            true => Some(self.edges.hold(self.blocks(offset, len), false).await),
            false => None,
        };
        let (mut at, end) = (offset, offset + len);
        let mut tries = 0;
        while at < end {
            let step = (end - at).min(FALLOCATE_STEP);
            match io.fallocate(&self.file, mode, at, step).await {
                Ok(_) => at += step,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => {
                        self.refused.fetch_or(bit, Ordering::Relaxed);
                        log::debug!("{}: no {operation} by fallocate here", self.path.display());
                        return Ok(false);
                    }
                    Some(libc::EINVAL | libc::EPERM | libc::ETXTBSY) => return Ok(false),
                    _ => self.again(io, &mut tries, operation, at, error).await?,
                },
            }
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
            self.grown(end);
        }
        Ok(true)
    }

    pub(in crate::block) async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        self.writable()?;
        if !Self::in_range(offset, len) {
            return Err(self.out_of_range(offset));
        }
        // Parts of blocks free nothing and cost a write of zeros.
        let grain = u64::from(self.limits.discard_granularity.max(1));
        let end = (offset + len).min(self.len()) / grain * grain;
        let start = offset.next_multiple_of(grain);
        if start >= end {
            return Ok(());
        }
        match self
            .fallocate(io, "discard", PUNCH, start, end - start)
            .await
        {
            // A hint: for want of space for metadata it may go unheeded.
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(()),
            other => other.map(|_| ()),
        }
    }

    pub(in crate::block) async fn write_zeroes(
        &self,
        io: &Io,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<()> {
        self.writable()?;
        if !Self::in_range(offset, len) {
            return Err(self.out_of_range(offset));
        }
        if len == 0 {
            return Ok(());
        }
        if !self.device {
            if self.zero_file(io, offset, len, may_unmap).await? {
                return Ok(());
            }
            return self.write_of_zeros(io, offset, offset + len).await;
        }
        // A device zeroes whole blocks.
        let block = u64::from(self.limits.logical_block);
        let end = offset + len;
        let (start, stop) = (offset.next_multiple_of(block), end / block * block);
        if start >= stop {
            return self.write_of_zeros(io, offset, end).await;
        }
        let whole = stop - start;
        let done = may_unmap && self.fallocate(io, "unmap", PUNCH, start, whole).await?
            || self.fallocate(io, "zero", ZERO_KEEP, start, whole).await?;
        if !done {
            return self.write_of_zeros(io, offset, end).await;
        }
        self.write_of_zeros(io, offset, start).await?;
        self.write_of_zeros(io, stop, end).await
    }

    /// Zeroes a range of a regular file without writing zeros; it grows as needed. False: it cannot.
    async fn zero_file(&self, io: &Io, offset: u64, len: u64, may_unmap: bool) -> Result<bool> {
        let (end, size) = (offset + len, self.len());
        if may_unmap && end <= size && self.fallocate(io, "unmap", PUNCH, offset, len).await? {
            return Ok(true);
        }
        if self.fallocate(io, "zero", ZERO, offset, len).await? {
            return Ok(true);
        }
        let inside = end.min(size).saturating_sub(offset);
        Ok(
            (inside == 0 || self.fallocate(io, "unmap", PUNCH, offset, inside).await?)
                && self.fallocate(io, "allocate", RESERVE, offset, len).await?,
        )
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

    pub(in crate::block) async fn allocate(&self, io: &Io, offset: u64, len: u64) -> Result<bool> {
        self.writable()?;
        if !Self::in_range(offset, len) {
            return Err(self.out_of_range(offset));
        }
        if len == 0 {
            return Ok(true);
        }
        if self.device {
            if offset + len > self.len() {
                let full = io::Error::from_raw_os_error(libc::ENOSPC);
                return Err(self.error("allocate", offset, full));
            }
            return self.fallocate(io, "unmap", PUNCH, offset, len).await;
        }
        if self.file.is_in_memory() {
            return self.make_hole(io, offset, len).await;
        }
        let beyond = offset >= self.len();
        if beyond && self.fallocate(io, "allocate", RESERVE, offset, len).await? {
            return Ok(true);
        }
        // Without `fallocate` nothing is reserved, but what the file grows by reads as zeros.
        Ok(beyond || self.zero_file(io, offset, len, false).await?)
    }

    /// What [`FileStorage::allocate`] does in memory: the range becomes a hole, and what the file grows by is one.
    /// To reserve pages would take as long as to write them, all sixteen of a cluster where the guest
    /// writes one, and nothing is laid out in a row by it. A full file system shows at the write then.
    async fn make_hole(&self, io: &Io, offset: u64, len: u64) -> Result<bool> {
        let inside = (offset + len).min(self.len()).saturating_sub(offset);
        Ok(inside == 0
            || self.fallocate(io, "unmap", PUNCH, offset, inside).await?
            || self.zero_file(io, offset, len, false).await?)
    }

    /// Reserves space that [`FileStorage::allocate`] has not, for a range whose first write must not fail for
    /// want of it. What the range reads as stays.
    pub(in crate::block) async fn reserve(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        self.writable()?;
        if !Self::in_range(offset, len) {
            return Err(self.out_of_range(offset));
        }
        if self.file.is_in_memory() && len > 0 {
            // Where it is not possible (ramfs), space does not run out.
            self.fallocate(io, "allocate", RESERVE, offset, len).await?;
        }
        Ok(())
    }

    pub(in crate::block) fn set_len(&self, len: u64) -> Result<()> {
        self.writable()?;
        if self.device {
            if len > self.len() {
                let full = io::Error::from_raw_os_error(libc::ENOSPC);
                return Err(self.error("resize", len, full));
            }
            return Ok(());
        }
        self.file
            .get()
            .set_len(len)
            .map_err(|e| self.error("resize", len, e))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }
}

fn mode_bit(mode: i32) -> u32 {
    match mode {
        PUNCH => 1,
        ZERO => 2,
        ZERO_KEEP => 4,
        _ => 8,
    }
}
