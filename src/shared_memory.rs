//! Memory that another process has mapped too, and that may outlive this one.
//!
//! The inflight region and the dirty log are such memory: files that the VMM keeps open. Everything in them
//! is an atomic, since somebody else may write to it at any time, and none of it is trusted: who reads a
//! number checks it before use.
//!
//! After a `SIGKILL` the memory holds everything that was stored before the killing in program order, which
//! is why a [`compiler_fence`](std::sync::atomic::compiler_fence) is all the order that a record for the next
//! process needs.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use crate::mappings::{Watch, page_size_of};

/// A shared mapping of a file. It stays mapped until this is dropped.
#[derive(Debug)]
pub struct SharedMemory {
    watch: Option<Watch>,
    /// Where whole pages are mapped, and how many bytes of them.
    start: NonNull<u8>,
    all: usize,
    /// Bytes of them before those that were asked for.
    skip: usize,
    len: usize,
    file: File,
    offset: u64,
}

// SAFETY: the pointer is the address of a shared mapping that belongs to nobody's thread; it is read and
// written as atomics only.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes `len` bytes of zeros in a file without a name in the file system, sealed so that nobody can take
    /// them away; `name` is what `/proc` shows.
    ///
    /// # Errors
    /// Those of `memfd_create`, `ftruncate`, sealing and `mmap`.
    pub fn create(name: &CStr, len: u64) -> io::Result<Arc<Self>> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: `name` is a C string.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: fcntl with integers only.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Self::map(file, 0, len)
    }

    /// Maps `len` bytes of `file` from byte `offset` on, which need not be a multiple of the page size.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for nothing, for what does not fit in a file, and for more than the file
    /// has: an access to it would be a SIGBUS. Those of `fstat` and `mmap`.
    pub fn map(file: File, offset: u64, len: u64) -> io::Result<Arc<Self>> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(|| invalid(format!("{len} bytes at {offset:#x} of a file")))?;
        let size = file.metadata()?.len();
        if size < end {
            return Err(invalid(format!(
                "{len} bytes at {offset:#x} of a file that has only {size}"
            )));
        }
        // On hugetlbfs both ends are those of huge pages, or `munmap` would refuse.
        let page = page_size_of(&file)?;
        let skip = offset % page;
        let too_long = || invalid(format!("{len} bytes are more than can be mapped"));
        let all = (skip + len).checked_next_multiple_of(page);
        let all = all.and_then(|all| usize::try_from(all).ok());
        let all = all.ok_or_else(too_long)?;
        let from = i64::try_from(offset - skip).map_err(|_| too_long())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                all,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                from,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(too_long)?;
        let mut memory = Self {
            watch: None,
            start,
            all,
            skip: skip as usize,
            len: len as usize,
            file,
            offset,
        };
        let watch = Watch::new(start.as_ptr(), all, page).map_err(io::Error::other)?;
        memory.watch = Some(watch);
        Ok(Arc::new(memory))
    }

    /// Whether it has lost its pages ([`crate::mappings`]): somebody shortened the file. What was stored since may
    /// have gone nowhere.
    pub fn is_lost(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_lost)
    }

    /// Bytes that are mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: there is no mapping of nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file, to be handed to another process.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the mapping begins in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// `len` bytes from byte `at` on; none if they are not inside.
    pub fn part(self: &Arc<Self>, at: usize, len: usize) -> Option<SharedPart> {
        let end = at.checked_add(len)?;
        (end <= self.len).then(|| SharedPart {
            memory: self.clone(),
            at,
            len,
        })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // Nobody is to find what is mapped at this address next under our name.
        self.watch = None;
        // SAFETY: the mapping made in `map`, with the length it was made with; whoever looks at it holds an
        // `Arc` of this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.all) };
    }
}

/// A part of a [`SharedMemory`], which it keeps mapped. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct SharedPart {
    memory: Arc<SharedMemory>,
    at: usize,
    len: usize,
}

/// Integers that can be atomics: what [`SharedPart::atomics`] gives.
///
/// # Safety
/// Every bit pattern is a value, and shared references to it may be written through.
pub unsafe trait Atomic {}
// SAFETY: an integer that is accessed atomically.
unsafe impl Atomic for AtomicU8 {}
// SAFETY: as above.
unsafe impl Atomic for AtomicU16 {}
// SAFETY: as above.
unsafe impl Atomic for AtomicU32 {}
// SAFETY: as above.
unsafe impl Atomic for AtomicU64 {}

impl SharedPart {
    /// Bytes of this part.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// See [`SharedMemory::is_lost`].
    pub fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// A part of this part; none if it is not inside.
    pub fn part(&self, at: usize, len: usize) -> Option<SharedPart> {
        let end = at.checked_add(len)?;
        (end <= self.len).then(|| SharedPart {
            memory: self.memory.clone(),
            at: self.at + at,
            len,
        })
    }

    /// `count` integers from byte `at` on, in the machine's byte order; none if they are not inside, or not
    /// aligned.
    pub fn atomics<T: Atomic>(&self, at: usize, count: usize) -> Option<&[T]> {
        let end = count.checked_mul(size_of::<T>())?.checked_add(at)?;
        if end > self.len {
            return None;
        }
        let start = self.memory.start.as_ptr();
        let start = start.wrapping_add(self.memory.skip + self.at + at);
        let start = start.cast::<T>();
        if !start.is_aligned() {
            return None;
        }
        // SAFETY: `part` and the check above keep it inside the mapping, which `memory` keeps as long as this
        // lives; it is aligned; every bit pattern is a `T`, whose shared references may be written through.
        Some(unsafe { std::slice::from_raw_parts(start, count) })
    }

    /// One integer; see [`SharedPart::atomics`].
    pub fn atomic<T: Atomic>(&self, at: usize) -> Option<&T> {
        self.atomics(at, 1)?.first()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn two_mappings_of_one_file_are_the_same_memory() {
        let one = SharedMemory::create(c"test", 0x3000).unwrap();
        let file = one.file().try_clone().unwrap();
        let two = SharedMemory::map(file, 0x1008, 0x1000).unwrap();
        let part = one.part(0x1000, 0x100).unwrap();
        part.atomic::<AtomicU64>(16).unwrap().store(7, Relaxed);
        let same = two.part(0, 16).unwrap();
        assert_eq!(same.atomic::<AtomicU64>(8).unwrap().load(Relaxed), 7);
        drop(one);
        assert_eq!(part.atomic::<AtomicU8>(16).unwrap().load(Relaxed), 7);
    }

    #[test]
    fn nothing_outside_or_askew_is_given_out() {
        let memory = SharedMemory::create(c"test", 0x1000).unwrap();
        assert!(memory.part(0xfff, 2).is_none());
        assert!(memory.part(usize::MAX, 2).is_none());
        let part = memory.part(8, 24).unwrap();
        assert_eq!(part.atomics::<AtomicU64>(0, 3).unwrap().len(), 3);
        assert!(part.atomics::<AtomicU64>(0, 4).is_none());
        assert!(part.atomics::<AtomicU64>(8, usize::MAX).is_none());
        assert!(part.atomic::<AtomicU32>(2).is_none());
        assert!(part.part(16, 9).is_none());
        assert_eq!(part.part(16, 8).unwrap().len(), 8);
    }

    #[test]
    fn more_than_the_file_has_is_not_mapped_and_the_file_can_not_shrink() {
        let memory = SharedMemory::create(c"test", 0x1000).unwrap();
        let file = || memory.file().try_clone().unwrap();
        for (offset, len) in [(0, 0), (0, 0x1001), (0xfff, 2), (u64::MAX, 2)] {
            assert!(SharedMemory::map(file(), offset, len).is_err(), "{offset}");
        }
        assert!(file().set_len(0).is_err());
    }
}
