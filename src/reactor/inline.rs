//! Transfers to files in memory, made at once by the thread that begins them.
//!
//! tmpfs and its kin have no submission that does not wait (FMODE_NOWAIT), so io_uring hands each request to a
//! thread of its own, which costs more than the copy does and competes with the reactor's thread for its CPU.
//! There is nothing to wait for in such a file but pages of it that were swapped out.
//!
//! What is copied at one go is bounded, so that nobody else waits for long: a transfer of more than [`LARGEST`]
//! goes to the ring, and so does all that a turn begins after [`TURN`]. Both together are some 100 microseconds
//! of copying. A ring of the driver's is left for the next one after [`INLINE_SHARE`], and what it completed is
//! shown to the driver.

use std::fs::File;
use std::os::fd::AsRawFd;

use libc::{iovec, off_t};

use super::buf::Sg;
use super::file::IoFile;
use super::op::Op;
use super::ring::Io;

/// Bytes of the largest transfer.
const LARGEST: usize = 256 << 10;
/// Bytes in one turn of the reactor, but for the last transfer.
const TURN: usize = 512 << 10;
/// What the call costs, in bytes that could be copied meanwhile.
const CALL: usize = 4 << 10;
/// After this many bytes there is something worth showing to a driver: see [`Io::inline_work`].
pub(crate) const INLINE_SHARE: usize = 64 << 10;

/// True for a regular file on a file system in memory. (Nodes of devices are on one, too.)
pub(super) fn is_in_memory(file: &File) -> bool {
    // linux/magic.h
    const RAMFS_MAGIC: u32 = 0x8584_58f6;
    const TMPFS_MAGIC: u32 = 0x0102_1994;
    const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return false;
    }
    let mut of = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills the structure; a failure leaves zeros, which are a valid one.
    let of = unsafe {
        libc::fstatfs(file.as_raw_fd(), of.as_mut_ptr());
        of.assume_init()
    };
    matches!(
        of.f_type as u32,
        RAMFS_MAGIC | TMPFS_MAGIC | HUGETLBFS_MAGIC
    )
}

impl Io {
    /// What was copied inline in this turn, in bytes and their like. A loop that begins requests gives way when
    /// this has grown by [`INLINE_SHARE`].
    #[inline]
    pub(crate) fn inline_work(&self) -> usize {
        self.inner.inline_work.get()
    }

    /// True if this much is to be copied now: it is counted.
    #[inline]
    fn takes_inline(&self, file: &IoFile, len: usize) -> bool {
        if !file.is_in_memory() || len > LARGEST {
            return false;
        }
        let work = self.inner.inline_work.get();
        if work >= TURN {
            return false;
        }
        self.inner.inline_work.set(work + len + CALL);
        true
    }

    /// The transfer, ended, if it is one that is made at once.
    #[inline]
    pub(super) fn transfer_inline(
        &self,
        file: &IoFile,
        offset: u64,
        sg: Sg<'_>,
        write: bool,
    ) -> Option<Op<'_>> {
        let offset = off_t::try_from(offset).ok()?;
        if !self.takes_inline(file, sg.len()) {
            return None;
        }
        let fd = file.as_raw_fd();
        let mut pieces = sg.iter();
        let first = pieces.next().unwrap_or((std::ptr::null_mut(), 0));
        if pieces.next().is_none() {
            // SAFETY: the list vouches for its memory as long as it is borrowed.
            return Some(self.ended(unsafe {
                match write {
                    true => libc::pwrite(fd, first.0.cast(), first.1, offset),
                    false => libc::pread(fd, first.0.cast(), first.1, offset),
                }
            }));
        }
        let transfer = |list: &[iovec]| {
            // SAFETY: as above; the list itself lives through the call.
            unsafe {
                match write {
                    true => libc::pwritev(fd, list.as_ptr(), list.len() as i32, offset),
                    false => libc::preadv(fd, list.as_ptr(), list.len() as i32, offset),
                }
            }
        };
        Some(self.ended(self.with_iovecs(sg, transfer)))
    }

    /// Makes what was written durable, as far as there is such a thing in memory.
    #[inline]
    pub(super) fn fdatasync_inline(&self, file: &IoFile) -> Option<Op<'_>> {
        self.takes_inline(file, 0).then(|| {
            // SAFETY: no memory is passed.
            self.ended(unsafe { libc::fdatasync(file.as_raw_fd()) } as isize)
        })
    }

    /// `fallocate(2)` of a range that may be as large as a transfer.
    #[inline]
    pub(super) fn fallocate_inline(
        &self,
        file: &IoFile,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> Option<Op<'_>> {
        let (offset, length) = (off_t::try_from(offset).ok()?, off_t::try_from(len).ok()?);
        let work = usize::try_from(len).ok()?;
        self.takes_inline(file, work).then(|| {
            // SAFETY: no memory is passed.
            let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) };
            self.ended(result as isize)
        })
    }

    /// An operation that has ended with what a system call returned.
    #[inline]
    fn ended(&self, returned: isize) -> Op<'_> {
        let result = match returned {
            0.. => returned as i32, // at most `LARGEST`
            _ => -std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        };
        Op::ended(self, result)
    }
}

#[cfg(test)]
mod tests;
