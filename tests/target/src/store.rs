//! The memory that a namespace's blocks are in.

use std::io;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes that one lock of a store covers.
const STRIPE_SHIFT: u32 = 20;
/// The locks of a store.
const STRIPES: usize = 64;

/// Anonymous memory, taken page by page as it is written. A command sees a range as a whole: writes exclude
/// reads and writes of what shares a stripe with them, so that no block is ever torn.
pub(crate) struct Store {
    base: *mut u8,
    len: usize,
    locks: Vec<RwLock<()>>,
}

// SAFETY: the mapping lives as long as the store, and its bytes are only touched under the stripes' locks.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// A store of `len` bytes that all read as zeros.
    pub fn new(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len.max(4096)).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh private mapping; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: base.cast(),
            len,
            locks: (0..STRIPES).map(|_| RwLock::new(())).collect(),
        })
    }

    /// Bytes that the store can hold.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    fn check(&self, offset: u64, len: usize) -> usize {
        let end = offset
            .checked_add(len as u64)
            .filter(|&end| end <= self.len as u64);
        assert!(
            end.is_some(),
            "{len} bytes at {offset} are outside a store of {} bytes",
            self.len
        );
        offset as usize
    }

    /// Runs `each` on the bytes of the range, under its lock.
    pub fn with<T>(&self, offset: u64, len: usize, each: impl FnOnce(&[u8]) -> T) -> T {
        let at = self.check(offset, len);
        let _guard = self.shared(offset, len);
        // SAFETY: inside the mapping, and locked against writers while the slice lives.
        each(unsafe { std::slice::from_raw_parts(self.base.add(at), len) })
    }

    /// Writes `data` at `offset` if `under`, which runs while the range is locked, says so.
    pub fn write(&self, offset: u64, data: &[u8], under: impl FnOnce() -> bool) {
        let at = self.check(offset, data.len());
        let _guard = self.exclusive(offset, data.len());
        if under() {
            // SAFETY: inside the mapping, and locked against everybody else.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.base.add(at), data.len()) }
        }
    }

    /// Makes the range read as zeros and gives whole pages back, if `under`, which runs while the range is
    /// locked, says so.
    pub fn zero(&self, offset: u64, len: usize, under: impl FnOnce() -> bool) {
        const PAGE: usize = 4096;
        let at = self.check(offset, len);
        let _guard = self.exclusive(offset, len);
        if !under() {
            return;
        }
        let (first, last) = (at.next_multiple_of(PAGE), (at + len) / PAGE * PAGE);
        // SAFETY: all inside the mapping, and locked against everybody else; what is given back reads as zeros.
        unsafe {
            if len < 16 * PAGE || first >= last {
                std::ptr::write_bytes(self.base.add(at), 0, len);
            } else {
                std::ptr::write_bytes(self.base.add(at), 0, first - at);
                std::ptr::write_bytes(self.base.add(last), 0, at + len - last);
                if libc::madvise(
                    self.base.add(first).cast(),
                    last - first,
                    libc::MADV_DONTNEED,
                ) != 0
                {
                    std::ptr::write_bytes(self.base.add(first), 0, last - first);
                }
            }
        }
    }

    /// The stripes of a range, ascending, so that two commands never wait for each other in a circle.
    fn stripes(offset: u64, len: usize) -> Vec<usize> {
        let (first, last) = (
            offset >> STRIPE_SHIFT,
            (offset + len.max(1) as u64 - 1) >> STRIPE_SHIFT,
        );
        if last - first + 1 >= STRIPES as u64 {
            return (0..STRIPES).collect();
        }
        let mut stripes: Vec<usize> = (first..=last).map(|s| s as usize % STRIPES).collect();
        stripes.sort_unstable();
        stripes
    }

    fn shared(&self, offset: u64, len: usize) -> Guards<RwLockReadGuard<'_, ()>> {
        Self::lock(offset, len, |s| {
            self.locks[s].read().unwrap_or_else(|e| e.into_inner())
        })
    }

    fn exclusive(&self, offset: u64, len: usize) -> Guards<RwLockWriteGuard<'_, ()>> {
        Self::lock(offset, len, |s| {
            self.locks[s].write().unwrap_or_else(|e| e.into_inner())
        })
    }

    fn lock<G>(offset: u64, len: usize, take: impl Fn(usize) -> G) -> Guards<G> {
        let first = offset >> STRIPE_SHIFT;
        if (offset + len.max(1) as u64 - 1) >> STRIPE_SHIFT == first {
            return Guards::One(take(first as usize % STRIPES));
        }
        Guards::Several(Self::stripes(offset, len).into_iter().map(take).collect())
    }
}

/// The locks of a range; nearly always one.
enum Guards<G> {
    One(#[allow(dead_code, reason = "held for its drop")] G),
    Several(#[allow(dead_code, reason = "held for its drop")] Vec<G>),
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody refers to any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
