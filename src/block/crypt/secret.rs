//! Memory for passphrases: not swapped, not dumped, wiped when it goes.

use std::fmt;
use std::io;
use std::ptr::NonNull;

use zeroize::Zeroize;

/// Bytes of one passphrase at most.
pub(super) const MAX_SECRET: usize = 64 << 10;

/// A passphrase. `Debug` shows its length only.
pub(super) struct Secret {
    /// A mapping of [`MAX_SECRET`] bytes.
    memory: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value alone and is not written to once it is made.
unsafe impl Send for Secret {}
// SAFETY: as above: shared references only read.
unsafe impl Sync for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.len)
    }
}

impl Secret {
    /// A secret of what `fill` puts into the memory that it is given; `fill` returns how many bytes. One
    /// more than [`MAX_SECRET`] can not be given: a full buffer is too much.
    pub(super) fn new(fill: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping, which touches nothing that exists.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAX_SECRET,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let Some(memory) = NonNull::new(memory).filter(|_| memory != libc::MAP_FAILED) else {
            return Err(io::Error::last_os_error());
        };
        // SAFETY: the mapping is ours. Both calls are best effort: the limit of locked memory may be low.
        let locked = unsafe {
            libc::madvise(memory.as_ptr(), MAX_SECRET, libc::MADV_DONTDUMP);
            libc::mlock(memory.as_ptr(), MAX_SECRET) == 0
        };
        if !locked {
            log::debug!(
                "memory of a key is not locked: {}",
                io::Error::last_os_error()
            );
        }
        let mut secret = Self {
            memory: memory.cast(),
            len: 0,
        };
        secret.len = fill(secret.all())?.min(MAX_SECRET);
        Ok(secret)
    }

    fn all(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has that many bytes, zeros at first, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), MAX_SECRET) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: as in `all`; `len` is not beyond it.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.all().zeroize();
        // SAFETY: mapped in `new`, with that size, and not used after this.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), MAX_SECRET) };
    }
}
