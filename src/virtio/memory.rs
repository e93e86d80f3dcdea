//! Guest memory: the regions that the VMM shares, mapped here, and the translation of addresses.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use crate::mappings::{TableFull, Watch, page_size, page_size_of};

/// Why guest memory could not be mapped or changed.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A region of no bytes.
    #[error("memory region at guest address {guest_addr:#x} is empty")]
    Empty {
        /// Guest physical address of the region.
        guest_addr: u64,
    },
    /// An address or a file offset plus the length leaves 64 bits.
    #[error("memory region at guest address {guest_addr:#x}: {what} + length {len:#x} overflows")]
    Overflow {
        /// Guest physical address of the region.
        guest_addr: u64,
        /// Length of the region in bytes.
        len: u64,
        /// Which sum overflows.
        what: &'static str,
    },
    /// The offset into the file cannot be mapped.
    #[error(
        "memory region at guest address {guest_addr:#x}: offset {offset:#x} is not page-aligned"
    )]
    UnalignedOffset {
        /// Guest physical address of the region.
        guest_addr: u64,
        /// Offset into the file in bytes.
        offset: u64,
    },
    /// The file ends inside the region: the first access past its end would be a SIGBUS.
    #[error(
        "memory region at guest address {guest_addr:#x} needs {needed:#x} bytes of its file, which \
         has {size:#x}: the memory backend of the VMM was truncated"
    )]
    FileTooShort {
        /// Guest physical address of the region.
        guest_addr: u64,
        /// End of the region in the file, in bytes.
        needed: u64,
        /// Length of the file in bytes.
        size: u64,
    },
    /// The descriptor is not something that can be guest memory.
    #[error(
        "memory region at guest address {guest_addr:#x}: the descriptor is neither a regular file \
         (memfd, hugetlbfs, tmpfs) nor a character device"
    )]
    NotMappable {
        /// Guest physical address of the region.
        guest_addr: u64,
    },
    /// `fstat`, `fstatfs` or `mmap` failed.
    #[error(
        "{operation} of the memory region at guest address {guest_addr:#x}, {len:#x} bytes: {source}"
    )]
    Map {
        /// Guest physical address of the region.
        guest_addr: u64,
        /// Length of the region in bytes.
        len: u64,
        /// The system call.
        operation: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// More mappings than one process can have.
    #[error("memory region at guest address {guest_addr:#x}: {source}")]
    TooMany {
        /// Guest physical address of the region.
        guest_addr: u64,
        /// The limit.
        source: TableFull,
    },
    /// Two regions cover the same guest physical address.
    #[error("memory regions at guest addresses {first:#x} and {second:#x} overlap")]
    GuestOverlap {
        /// Guest physical address of the lower region.
        first: u64,
        /// Guest physical address of the higher region.
        second: u64,
    },
    /// Two regions cover the same address of the VMM.
    #[error("memory regions at VMM addresses {first:#x} and {second:#x} overlap")]
    UserOverlap {
        /// VMM virtual address of the lower region.
        first: u64,
        /// VMM virtual address of the higher region.
        second: u64,
    },
    /// The region to be removed is not there.
    #[error(
        "no memory region at guest address {guest_addr:#x}, VMM address {user_addr:#x}, {len:#x} bytes"
    )]
    NoSuchRegion {
        /// Guest physical address that was asked for.
        guest_addr: u64,
        /// VMM virtual address that was asked for.
        user_addr: u64,
        /// Length that was asked for.
        len: u64,
    },
}

/// A mapping of a file of guest memory. It is unmapped when this is dropped.
#[derive(Debug)]
pub struct Mapping {
    // Dropped before the mapping itself.
    watch: Watch,
    region: MmapRegion,
    page: u64,
}

impl Mapping {
    /// What was mapped.
    pub fn region(&self) -> &MmapRegion {
        &self.region
    }

    /// Whether it was lost ([`crate::mappings`]).
    pub fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }

    /// See [`Watch::give_up`].
    pub(crate) fn give_up(&self) -> bool {
        self.watch.give_up()
    }

    /// The addresses in this process, up to the end of the last page.
    pub(crate) fn range(&self) -> (u64, u64) {
        let len = (self.region.size() as u64).next_multiple_of(self.page);
        (self.region.as_ptr() as u64, len)
    }
}

/// One mapped region of guest memory. Clones share the mapping.
#[derive(Debug, Clone)]
pub struct Region {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Address of the first byte in the VMM's address space.
    pub user_addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// First byte of the region in `mapping`: a huge page may begin before it.
    skip: usize,
    mapping: Arc<Mapping>,
}

impl Region {
    /// Maps `len` bytes of `file` at `mmap_offset` (`MAP_SHARED | MAP_NORESERVE`, read and write).
    ///
    /// The length need not be a multiple of the page size; the offset must be one. On hugetlbfs,
    /// where `mmap` wants both in huge pages, the mapping is widened to them.
    ///
    /// # Errors
    /// An empty region, sums that overflow, an unaligned offset, a file that is no memory or is
    /// shorter than the region (`fstat`), or a failing system call.
    pub fn map(
        file: impl Into<File>,
        mmap_offset: u64,
        guest_addr: u64,
        user_addr: u64,
        len: u64,
    ) -> Result<Self, MemoryError> {
        let file = file.into();
        let map_error = |operation, source| MemoryError::Map {
            guest_addr,
            len,
            operation,
            source,
        };
        let overflow = |what| MemoryError::Overflow {
            guest_addr,
            len,
            what,
        };
        if len == 0 {
            return Err(MemoryError::Empty { guest_addr });
        }
        guest_addr
            .checked_add(len)
            .ok_or(overflow("guest address"))?;
        user_addr.checked_add(len).ok_or(overflow("VMM address"))?;
        let needed = mmap_offset
            .checked_add(len)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or(overflow("file offset"))?;

        if mmap_offset % page_size() != 0 {
            return Err(MemoryError::UnalignedOffset {
                guest_addr,
                offset: mmap_offset,
            });
        }
        let metadata = file.metadata().map_err(|e| map_error("fstat", e))?;
        if metadata.is_file() {
            if metadata.size() < needed {
                return Err(MemoryError::FileTooShort {
                    guest_addr,
                    needed,
                    size: metadata.size(),
                });
            }
        } else if !metadata.file_type().is_char_device() {
            // A character device (device DAX) has no size to check.
            return Err(MemoryError::NotMappable { guest_addr });
        }

        let page = page_size_of(&file).map_err(|e| map_error("fstatfs", e))?;
        let (start, end) = whole_pages(mmap_offset, needed, page).ok_or(overflow("file offset"))?;
        let size = usize::try_from(end - start).map_err(|_| overflow("file offset"))?;
        let skip = (mmap_offset - start) as usize;
        let mapping = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, start))
            .build()
            .map_err(|e| map_error("mmap", io::Error::other(e)))?;
        let watch = Watch::new(mapping.as_ptr(), size, page)
            .map_err(|source| MemoryError::TooMany { guest_addr, source })?;
        let mapping = Mapping {
            watch,
            region: mapping,
            page,
        };
        Ok(Self {
            guest_addr,
            user_addr,
            len,
            skip,
            mapping: Arc::new(mapping),
        })
    }

    /// Where the first byte of the region is mapped in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        // wrapping_add: `skip` lies inside the mapping by construction.
        self.mapping.region.as_ptr().wrapping_add(self.skip)
    }

    /// The file that the region is a part of, and where in it the region begins, in bytes; for another process
    /// to map it too.
    pub fn file(&self) -> Option<(&File, u64)> {
        let place = self.mapping.region.file_offset()?;
        Some((place.file(), place.start() + self.skip as u64))
    }

    /// The mapping itself: whoever keeps it keeps the memory mapped.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

/// The bytes of a file from `start` to `end`, widened to whole pages where `mmap` and `munmap` insist on them
/// (huge pages). Ordinary pages the kernel rounds by itself, and `start` is a multiple of them already.
fn whole_pages(start: u64, end: u64, page: u64) -> Option<(u64, u64)> {
    if page <= page_size() {
        return Some((start, end));
    }
    let end = end.checked_next_multiple_of(page)?;
    Some((start / page * page, end)).filter(|_| i64::try_from(end).is_ok())
}

/// What a translation needs of a region, packed for the hot path.
#[derive(Debug, Clone, Copy)]
struct Window {
    guest_addr: u64,
    len: u64,
    host: *mut u8,
}

/// An immutable snapshot of guest memory.
///
/// It is shared by `Arc` among the control thread and the workers and replaced whole. Pointers that
/// it handed out are valid while a snapshot with the same region is alive.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
    windows: Box<[Window]>,
}

// SAFETY: the raw pointers in `windows` are the addresses of mappings which `regions` keeps alive
// and which are themselves `Send + Sync`; a `GuestMemory` never dereferences them.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; all methods take `&self` and only read the table.
unsafe impl Sync for GuestMemory {}

/// Up to this many regions a linear scan beats a binary search. A usual guest has two or three.
const LINEAR_SCAN: usize = 4;

impl GuestMemory {
    /// No memory at all: every translation fails.
    pub fn empty() -> Self {
        Self::default()
    }

    /// A snapshot of these regions, in any order.
    ///
    /// # Errors
    /// Two regions that overlap, in guest physical or in VMM addresses.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        // A region's own sums were checked when it was mapped, so `addr + len` cannot overflow.
        regions.sort_by_key(|region| region.user_addr);
        for pair in regions.windows(2) {
            if pair[0].user_addr + pair[0].len > pair[1].user_addr {
                return Err(MemoryError::UserOverlap {
                    first: pair[0].user_addr,
                    second: pair[1].user_addr,
                });
            }
        }
        regions.sort_by_key(|region| region.guest_addr);
        for pair in regions.windows(2) {
            if pair[0].guest_addr + pair[0].len > pair[1].guest_addr {
                return Err(MemoryError::GuestOverlap {
                    first: pair[0].guest_addr,
                    second: pair[1].guest_addr,
                });
            }
        }
        let windows = regions
            .iter()
            .map(|region| Window {
                guest_addr: region.guest_addr,
                len: region.len,
                host: region.as_ptr(),
            })
            .collect();
        Ok(Self { regions, windows })
    }

    /// This memory and one region more (vhost-user `ADD_MEM_REG`); mappings are shared.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn with_region(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions)
    }

    /// This memory without one region (vhost-user `REM_MEM_REG`); mappings are shared.
    ///
    /// # Errors
    /// No region has exactly these addresses and this length.
    pub fn without_region(
        &self,
        guest_addr: u64,
        user_addr: u64,
        len: u64,
    ) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        let position = regions
            .iter()
            .position(|r| r.guest_addr == guest_addr && r.user_addr == user_addr && r.len == len)
            .ok_or(MemoryError::NoSuchRegion {
                guest_addr,
                user_addr,
                len,
            })?;
        regions.remove(position);
        Self::new(regions)
    }

    /// The regions, by ascending guest physical address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region of a guest physical address.
    #[inline]
    fn window(&self, guest_addr: u64) -> Option<&Window> {
        if self.windows.len() <= LINEAR_SCAN {
            // One unsigned comparison a region: an address below it wraps to a huge offset.
            return self
                .windows
                .iter()
                .find(|w| guest_addr.wrapping_sub(w.guest_addr) < w.len);
        }
        let above = self.windows.partition_point(|w| w.guest_addr <= guest_addr);
        self.windows[..above]
            .last()
            .filter(|w| guest_addr - w.guest_addr < w.len)
    }

    /// The host address of a guest physical address, and how many bytes (at least one) follow it in
    /// the same region.
    #[inline]
    pub fn host_span(&self, guest_addr: u64) -> Option<(*mut u8, u64)> {
        let window = self.window(guest_addr)?;
        let offset = guest_addr - window.guest_addr;
        // wrapping_add: the offset lies inside the mapping.
        Some((
            window.host.wrapping_add(offset as usize),
            window.len - offset,
        ))
    }

    /// The host address of `len` contiguous bytes at a guest physical address, all in one region.
    #[inline]
    pub fn host_ptr(&self, guest_addr: u64, len: u64) -> Option<*mut u8> {
        let (host, left) = self.host_span(guest_addr)?;
        (len <= left).then_some(host)
    }

    /// The guest physical address of `len` bytes at an address of the VMM (the ring addresses of
    /// `SET_VRING_ADDR`), all in one region.
    pub fn user_to_guest(&self, user_addr: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user_addr.checked_sub(region.user_addr)?;
            (offset < region.len && len <= region.len - offset).then(|| region.guest_addr + offset)
        })
    }

    /// The guest physical address of a pointer that [`GuestMemory::host_ptr`] gave, for the dirty
    /// log.
    pub fn host_to_guest(&self, host: *const u8) -> Option<u64> {
        self.windows.iter().find_map(|window| {
            let offset = (host as u64).wrapping_sub(window.host as u64);
            (offset < window.len).then(|| window.guest_addr + offset)
        })
    }

    /// A region whose mapping was lost ([`crate::mappings`]), if there is one.
    pub fn lost(&self) -> Option<&Region> {
        self.regions.iter().find(|region| region.mapping.is_lost())
    }

    /// The mapping of the region that holds a guest physical address.
    pub(crate) fn mapping_of(&self, guest_addr: u64) -> Option<Arc<Mapping>> {
        self.regions
            .iter()
            .find(|r| guest_addr.wrapping_sub(r.guest_addr) < r.len)
            .map(|r| Arc::clone(&r.mapping))
    }
}

#[cfg(test)]
mod tests;
