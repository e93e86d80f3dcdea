//! A descriptor chain as host addresses.

use libc::iovec;
use thiserror::Error;

use crate::virtio::blk::request::Segment;
use crate::virtio::memory::GuestMemory;

/// The longest chain that is taken, in descriptors: the largest queue there can be.
///
/// The specification bounds a chain by the queue size; Windows sends up to 515 descriptors in one
/// indirect table whatever the queue size is, so an indirect table is bounded by this alone.
pub const MAX_DESCRIPTORS: u32 = 32768;

/// The most host buffers that one chain may become. A descriptor that crosses from one region into
/// its neighbour becomes several.
pub const MAX_IOVECS: usize = 2 * MAX_DESCRIPTORS as usize;

/// A buffer that grew beyond this gives its memory back when it is used again: a guest must not be
/// able to make every slot of a queue hold a megabyte for ever.
const KEEP_IOVECS: usize = 1024;

/// Size of a descriptor in a table (section 2.7.5: `struct virtq_desc`).
pub const DESC_SIZE: u32 = 16;

// The crate that this is tested against lays descriptors out as the specification says.
const _: () = assert!(size_of::<virtio_queue::desc::split::Descriptor>() == DESC_SIZE as usize);

/// What is wrong with a descriptor chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// `next` names a descriptor outside its table.
    #[error("descriptor {index} of a table of {count}")]
    Index {
        /// What the driver wrote.
        index: u32,
        /// Entries in the table.
        count: u32,
    },
    /// More descriptors than the table has: the chain loops.
    #[error("the chain has more descriptors than its table of {count}: it loops")]
    Loop {
        /// Entries in the table.
        count: u32,
    },
    /// An indirect table without `VIRTIO_F_INDIRECT_DESC`.
    #[error("indirect table, which was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect table inside an indirect table.
    #[error("indirect table inside an indirect table")]
    NestedIndirect,
    /// `INDIRECT` and `NEXT` on one descriptor.
    #[error("descriptor with both INDIRECT and NEXT")]
    IndirectNext,
    /// An indirect table of no entries, of a broken entry, or of too many.
    #[error(
        "indirect table of {len} bytes: not 1 to {MAX_DESCRIPTORS} entries of {DESC_SIZE} bytes"
    )]
    IndirectLength {
        /// Length in bytes that the driver wrote.
        len: u32,
    },
    /// A device-readable descriptor after a device-writable one.
    #[error("readable descriptor after a writable one")]
    ReadableAfterWritable,
    /// A buffer or a table is not in guest memory.
    #[error("{len} bytes at guest address {addr:#x} are not in guest memory")]
    Unmapped {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// More than [`MAX_IOVECS`] buffers.
    #[error("the chain has more than {MAX_IOVECS} buffers")]
    TooLong,
    /// No memory for so long a chain.
    #[error("no memory for a chain of this length")]
    NoMemory,
}

/// The buffers of one chain as host addresses: the readable ones first, then the writable ones.
///
/// Preallocated by the caller, one a request slot. The pointers are those of the [`GuestMemory`]
/// that the chain was read with: keep that snapshot until the request is finished.
#[derive(Debug)]
pub struct ChainBuf {
    pub(in crate::virtio) iovecs: Vec<iovec>,
    /// Index of the first writable buffer.
    pub(in crate::virtio) split: usize,
    readable_len: u64,
    writable_len: u64,
    /// Ranges of a discard or write-zeroes request, copied out of guest memory.
    pub(in crate::virtio) segments: Vec<Segment>,
}

// SAFETY: the iovecs are addresses of guest memory, which any thread may access; this type never
// dereferences them.
unsafe impl Send for ChainBuf {}

impl ChainBuf {
    /// Room for `n` buffers; it grows when a longer chain comes, up to [`MAX_IOVECS`].
    pub fn with_capacity(n: usize) -> Self {
        Self {
            iovecs: Vec::with_capacity(n.min(MAX_IOVECS)),
            split: 0,
            readable_len: 0,
            writable_len: 0,
            segments: Vec::with_capacity(1),
        }
    }

    /// Buffers that the device may read, in order.
    pub fn readable(&self) -> &[iovec] {
        &self.iovecs[..self.split]
    }

    /// Buffers that the device may write, in order.
    pub fn writable(&self) -> &[iovec] {
        &self.iovecs[self.split..]
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Takes the last writable byte: the status of a request.
    #[inline]
    pub(in crate::virtio) fn take_last_writable(&mut self) -> Option<*mut u8> {
        let last = self.iovecs[self.split..].last_mut()?;
        // No empty buffer is ever stored.
        last.iov_len -= 1;
        let byte = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            self.iovecs.pop();
        }
        self.writable_len -= 1;
        Some(byte)
    }

    /// Takes the first 16 readable bytes, copied once, as two little-endian words; with them the
    /// index of the first buffer that is left. `None` when there are fewer.
    #[inline]
    pub(in crate::virtio) fn take_first_pair(&mut self) -> Option<((u64, u64), usize)> {
        if self.readable_len < 16 {
            return None;
        }
        self.readable_len -= 16;
        let first = self.iovecs[..self.split].first_mut()?;
        if first.iov_len < 16 {
            return Some(self.take_scattered_pair());
        }
        // SAFETY: 16 bytes of guest memory, mapped while the snapshot that the chain was read with
        // is kept.
        let pair = unsafe { read_pair(first.iov_base.cast()) };
        first.iov_base = first.iov_base.wrapping_byte_add(16);
        first.iov_len -= 16;
        Some((pair, usize::from(first.iov_len == 0)))
    }

    /// At least 16 readable bytes are there, in small pieces.
    #[cold]
    fn take_scattered_pair(&mut self) -> ((u64, u64), usize) {
        let mut bytes = [0u8; 16];
        let mut filled = 0;
        let mut index = 0;
        for buffer in &mut self.iovecs[..self.split] {
            let part = buffer.iov_len.min(bytes.len() - filled);
            for byte in &mut bytes[filled..filled + part] {
                // SAFETY: a byte of guest memory inside this buffer.
                *byte = unsafe { buffer.iov_base.cast::<u8>().read_volatile() };
                buffer.iov_base = buffer.iov_base.wrapping_byte_add(1);
                buffer.iov_len -= 1;
            }
            filled += part;
            if buffer.iov_len > 0 {
                break;
            }
            index += 1;
            if filled == bytes.len() {
                break;
            }
        }
        let all = u128::from_le_bytes(bytes);
        ((all as u64, (all >> 64) as u64), index)
    }

    /// Forgets the chain.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        if self.iovecs.capacity() > KEEP_IOVECS {
            self.iovecs.shrink_to(KEEP_IOVECS);
        }
        self.segments.clear();
        self.split = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }

    /// Appends the buffer of one descriptor. An empty one is only checked for its place.
    ///
    /// # Errors
    /// A readable buffer after a writable one, memory that is not there, too many buffers.
    // Always: it is called for each descriptor, and with two layouts the compiler would make it a call, which
    // makes the whole chain a third slower.
    #[inline(always)]
    pub fn push(
        &mut self,
        mem: &GuestMemory,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), ChainError> {
        let len = u64::from(len);
        if writable {
            self.writable_len += len;
        } else {
            if self.split != self.iovecs.len() {
                return Err(ChainError::ReadableAfterWritable);
            }
            self.readable_len += len;
        }
        if len == 0 {
            return Ok(());
        }
        let (host, left) = mem
            .host_span(addr)
            .ok_or(ChainError::Unmapped { addr, len })?;
        if len > left {
            return self.push_across(mem, addr, len, writable);
        }
        self.push_iovec(host, len, writable)
    }

    #[inline]
    fn push_iovec(&mut self, host: *mut u8, len: u64, writable: bool) -> Result<(), ChainError> {
        if self.iovecs.len() == self.iovecs.capacity() {
            self.grow()?;
        }
        self.iovecs.push(iovec {
            iov_base: host.cast(),
            iov_len: len as usize,
        });
        if !writable {
            self.split = self.iovecs.len();
        }
        Ok(())
    }

    /// Guest memory is contiguous where two regions touch, host memory is not.
    #[cold]
    fn push_across(
        &mut self,
        mem: &GuestMemory,
        mut addr: u64,
        mut len: u64,
        writable: bool,
    ) -> Result<(), ChainError> {
        while len > 0 {
            let (host, left) = mem
                .host_span(addr)
                .ok_or(ChainError::Unmapped { addr, len })?;
            let part = len.min(left);
            self.push_iovec(host, part, writable)?;
            len -= part;
            // A region does not end beyond 2^64, so the sum does not overflow.
            addr += part;
        }
        Ok(())
    }

    #[cold]
    fn grow(&mut self) -> Result<(), ChainError> {
        let now = self.iovecs.len();
        if now >= MAX_IOVECS {
            return Err(ChainError::TooLong);
        }
        let more = now.max(16).min(MAX_IOVECS - now);
        self.iovecs
            .try_reserve_exact(more)
            .map_err(|_| ChainError::NoMemory)
    }
}

/// Reads 16 bytes of guest memory, each once, as two little-endian words.
///
/// # Safety
/// `ptr` points at 16 mapped bytes. The guest may change them at any time.
#[inline]
pub(in crate::virtio) unsafe fn read_pair(ptr: *const u8) -> (u64, u64) {
    let words = ptr.cast::<u64>();
    if words.is_aligned() {
        // SAFETY: 16 mapped bytes, as the caller promises, and aligned.
        unsafe {
            (
                u64::from_le(words.read_volatile()),
                u64::from_le(words.add(1).read_volatile()),
            )
        }
    } else {
        // SAFETY: as the caller promises.
        unsafe { read_pair_unaligned(ptr) }
    }
}

/// # Safety
/// As [`read_pair`].
#[cold]
unsafe fn read_pair_unaligned(ptr: *const u8) -> (u64, u64) {
    let mut bytes = [0u8; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: 16 mapped bytes, as the caller promises.
        *byte = unsafe { ptr.add(i).read_volatile() };
    }
    let all = u128::from_le_bytes(bytes);
    (all as u64, (all >> 64) as u64)
}

#[cfg(test)]
mod tests;
