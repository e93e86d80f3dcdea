//! Guest memory: regions of memfd, each with a guest physical address and a user address.
//!
//! The user address is the VMM's virtual address in the vhost-user sense. Here it is a number of its own,
//! different from the guest physical address and from the address this process maps the region at, so that
//! a backend that mixes them up is found out.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::sys;

/// Distance between guest physical and user addresses of regions that do not choose their own.
pub const DEFAULT_USER_SHIFT: u64 = 0x5a00_0000_0000;

/// Bytes of the huge pages of [`Region::huge`].
pub const HUGE_PAGE: u64 = 2 << 20;

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages (2 MiB) that the machine was made to set aside; their number goes back to what it was.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Sets aside `count` more. None, with a word in the output, where this may not be done or memory is too
    /// fragmented.
    pub fn reserve(count: u64) -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let said = |why: String| println!("not tested: no huge pages can be set aside: {why}");
        let before = std::fs::read_to_string(NR_HUGEPAGES);
        let before = before.map_err(|e| said(e.to_string())).ok()?;
        let pages = Self {
            before: before.trim().parse().ok()?,
            _one_at_a_time: guard,
        };
        let wanted = (pages.before + count).to_string();
        if let Err(error) = std::fs::write(NR_HUGEPAGES, wanted) {
            said(error.to_string());
            return None;
        }
        if pages.free() < count {
            said(format!("{} of {count} are free", pages.free()));
            return None;
        }
        Some(pages)
    }

    /// Bytes of a page.
    pub fn size(&self) -> u64 {
        HUGE_PAGE
    }

    /// Pages that nobody uses.
    pub fn free(&self) -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("HugePages_Free:"));
        line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_HUGEPAGES, self.before.to_string());
    }
}

/// Where a region sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// User address of its first byte.
    pub user_addr: u64,
    /// Offset of its first byte in the file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    /// A region at `guest_addr`, at the usual user address, at the start of its file.
    pub fn new(guest_addr: u64, size: u64) -> Self {
        Self {
            guest_addr,
            size,
            user_addr: guest_addr + DEFAULT_USER_SHIFT,
            mmap_offset: 0,
        }
    }

    /// The same, `mmap_offset` bytes into its file.
    pub fn at_offset(self, mmap_offset: u64) -> Self {
        Self {
            mmap_offset,
            ..self
        }
    }
}

/// One region, mapped in this process.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    file: OwnedFd,
    base: *mut u8,
    mapped: usize,
    next: AtomicU64,
}

// SAFETY: the mapping lives as long as the region; its bytes are shared with another process anyway and are
// only reached through raw pointers and copies.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Makes the file and maps it.
    ///
    /// # Errors
    /// Those of memfd_create(2), ftruncate(2) and mmap(2).
    pub fn new(spec: RegionSpec) -> Result<Self> {
        Self::of(sys::memfd(spec.mmap_offset + spec.size)?, spec)
    }

    /// The same in huge pages (2 MiB). None is reserved: they are had as they are touched. The file ends at the end of
    /// a huge page, the region need not.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn huge(spec: RegionSpec) -> Result<Self> {
        let total = spec.mmap_offset + spec.size;
        Self::of(sys::huge_memfd(total.next_multiple_of(HUGE_PAGE))?, spec)
    }

    /// A region in a file that others may be in too, which reaches to the region's end at least.
    ///
    /// # Errors
    /// Those of fstat(2) and mmap(2).
    pub fn of(file: OwnedFd, spec: RegionSpec) -> Result<Self> {
        let mapped = std::fs::File::from(file.try_clone()?).metadata()?.len() as usize;
        // SAFETY: a fresh shared mapping of a file of that length; nothing else is touched.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self {
            spec,
            file,
            base: address.cast(),
            mapped,
            next: AtomicU64::new(0),
        })
    }

    /// Where the region sits.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// Another descriptor of its file.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn file(&self) -> Result<OwnedFd> {
        Ok(self.file.try_clone()?)
    }

    /// The descriptor to send to a backend.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// True when `len` bytes at `guest_addr` lie in this region.
    pub fn contains(&self, guest_addr: u64, len: u64) -> bool {
        guest_addr >= self.spec.guest_addr
            && guest_addr
                .checked_add(len)
                .is_some_and(|end| end <= self.spec.guest_addr + self.spec.size)
    }

    /// The address of a guest byte in this process.
    ///
    /// # Panics
    /// When the range is not in the region: the test itself is wrong.
    pub fn host(&self, guest_addr: u64, len: u64) -> *mut u8 {
        assert!(
            self.contains(guest_addr, len),
            "{len} bytes at guest address {guest_addr:#x} are not in {:x?}",
            self.spec
        );
        let offset = self.spec.mmap_offset + (guest_addr - self.spec.guest_addr);
        // SAFETY: the offset was checked against the length of the mapping.
        unsafe { self.base.add(offset as usize) }
    }

    /// The user address of a guest byte.
    pub fn user_addr(&self, guest_addr: u64) -> u64 {
        self.spec
            .user_addr
            .wrapping_add(guest_addr.wrapping_sub(self.spec.guest_addr))
    }

    /// Takes `len` bytes that nobody else was given, at a multiple of `align`, or nothing when the region is
    /// full. Memory is not given back: a region lives as long as a test.
    pub fn try_alloc(&self, len: u64, align: u64) -> Option<u64> {
        let mut current = self.next.load(Ordering::Relaxed);
        loop {
            let at = (self.spec.guest_addr + current).next_multiple_of(align);
            if !self.contains(at, len) {
                return None;
            }
            let after = at + len - self.spec.guest_addr;
            match self.next.compare_exchange_weak(
                current,
                after,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(at),
                Err(seen) => current = seen,
            }
        }
    }

    /// Takes every page of the file away; the next access makes a new one.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn take_away(&self) -> Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a descriptor and integers.
        match unsafe { libc::fallocate(self.fd(), mode, 0, self.mapped as libc::off_t) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// Bytes of memory that the file has pages for.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn allocated(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(std::fs::File::from(self.file()?).metadata()?.blocks() * 512)
    }

    /// Shortens (or lengthens) the file under the region, as a hostile VMM does. Bytes past the new end must
    /// not be touched by this process any more.
    ///
    /// # Errors
    /// Those of ftruncate(2).
    pub fn truncate(&self, file_size: u64) -> Result<()> {
        Ok(sys::truncate(&self.file, file_size)?)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses after this.
        unsafe { libc::munmap(self.base.cast(), self.mapped) };
    }
}

/// Guest memory: an ordered set of regions.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// Maps all of `specs`.
    ///
    /// # Errors
    /// Those of [`Region::new`].
    pub fn new(specs: &[RegionSpec]) -> Result<Self> {
        let mut memory = Self::default();
        for spec in specs {
            memory.add(*spec)?;
        }
        Ok(memory)
    }

    /// The same in huge pages.
    ///
    /// # Errors
    /// Those of [`Region::huge`].
    pub fn huge(specs: &[RegionSpec]) -> Result<Self> {
        let mut memory = Self::default();
        for spec in specs {
            memory.push(Region::huge(*spec)?);
        }
        Ok(memory)
    }

    /// Adds a region and returns it.
    ///
    /// # Errors
    /// Those of [`Region::new`].
    pub fn add(&mut self, spec: RegionSpec) -> Result<Arc<Region>> {
        let region = Arc::new(Region::new(spec)?);
        self.regions.push(region.clone());
        Ok(region)
    }

    /// Adds a region that was made elsewhere.
    pub fn push(&mut self, region: Region) -> Arc<Region> {
        let region = Arc::new(region);
        self.regions.push(region.clone());
        region
    }

    /// Takes a region out; it stays mapped here while somebody holds it.
    ///
    /// # Panics
    /// When there is no such region.
    pub fn remove(&mut self, index: usize) -> Arc<Region> {
        self.regions.remove(index)
    }

    /// The regions, in order.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The region that holds `len` bytes at `guest_addr`.
    ///
    /// # Panics
    /// When there is none.
    pub fn region_of(&self, guest_addr: u64, len: u64) -> &Arc<Region> {
        self.regions
            .iter()
            .find(|r| r.contains(guest_addr, len))
            .unwrap_or_else(|| panic!("no region holds {len} bytes at {guest_addr:#x}"))
    }

    /// Takes memory from the first region that has room.
    ///
    /// # Panics
    /// When none has.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        self.regions
            .iter()
            .find_map(|r| r.try_alloc(len, align))
            .unwrap_or_else(|| panic!("guest memory is full: {len} more bytes were asked for"))
    }

    /// Takes memory from one region.
    ///
    /// # Panics
    /// When it is full.
    pub fn alloc_in(&self, region: usize, len: u64, align: u64) -> u64 {
        self.regions[region]
            .try_alloc(len, align)
            .unwrap_or_else(|| panic!("region {region} is full: {len} more bytes were asked for"))
    }

    /// Copies bytes into the guest.
    ///
    /// # Panics
    /// When the range is not in one region.
    pub fn write(&self, guest_addr: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        let host = self.region_of(guest_addr, len).host(guest_addr, len);
        // SAFETY: `host` is valid for `len` bytes, and no Rust reference points into guest memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
    }

    /// Copies bytes out of the guest.
    ///
    /// # Panics
    /// When the range is not in one region.
    pub fn read(&self, guest_addr: u64, bytes: &mut [u8]) {
        let len = bytes.len() as u64;
        let host = self.region_of(guest_addr, len).host(guest_addr, len);
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// The bytes of a range, as a vector.
    ///
    /// # Panics
    /// When the range is not in one region.
    pub fn read_vec(&self, guest_addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(guest_addr, &mut bytes);
        bytes
    }

    /// Sets every byte of a range.
    ///
    /// # Panics
    /// When the range is not in one region.
    pub fn fill(&self, guest_addr: u64, len: usize, byte: u8) {
        let host = self
            .region_of(guest_addr, len as u64)
            .host(guest_addr, len as u64);
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(host, byte, len) };
    }
}
