//! The dirty log: which pages of guest memory this process has written to, for a migration's source
//! (vhost-user.rst, "Migration").
//!
//! One bitmap by guest physical address, apart from the memory map, so that it stays right when regions come
//! and go.

use std::sync::atomic::{AtomicU8, Ordering};

use thiserror::Error;

use crate::shared_memory::SharedPart;

/// Bytes of memory for each bit (`VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 0x1000;

/// An address that the log does not reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the dirty log of {pages:#x} pages does not reach {len} bytes at guest address {addr:#x}: a migration \
     would lose what was written there"
)]
pub struct OutsideLog {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Pages that the log has bits for.
    pub pages: u64,
}

/// The log, shared with the VMM, which takes bits away while this process sets them.
#[derive(Debug)]
pub struct DirtyLog {
    bits: SharedPart,
}

impl DirtyLog {
    /// The log in this memory, the first bit being that of guest address 0.
    pub fn new(bits: SharedPart) -> Self {
        Self { bits }
    }

    /// Whether the memory was lost ([`SharedPart::is_lost`]): marks go nowhere.
    pub fn is_lost(&self) -> bool {
        self.bits.is_lost()
    }

    /// Notes that `len` bytes at a guest physical address were written. To be called after they were.
    ///
    /// # Errors
    /// The log is too short. What it reaches was noted.
    #[inline]
    pub fn mark(&self, addr: u64, len: u64) -> Result<(), OutsideLog> {
        if len == 0 {
            return Ok(());
        }
        let bytes = self.bits.atomics::<AtomicU8>(0, self.bits.len());
        let bytes = bytes.unwrap_or_default();
        let pages = bytes.len() as u64 * 8;
        let first = addr / LOG_PAGE;
        let last = addr.saturating_add(len - 1) / LOG_PAGE;
        for page in first..=last.min(pages.saturating_sub(1)) {
            // Release: who finds the bit finds what was written before. An atomic operation only where the bit
            // is not there yet would be cheaper, and wrong: the VMM may have read the page just before.
            bytes[(page / 8) as usize].fetch_or(1 << (page % 8), Ordering::Release);
        }
        match last < pages {
            true => Ok(()),
            false => Err(OutsideLog { addr, len, pages }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared_memory::SharedMemory;

    fn marked(log: &DirtyLog) -> Vec<u64> {
        let bytes = log.bits.atomics::<AtomicU8>(0, log.bits.len()).unwrap();
        (0..bytes.len() as u64 * 8)
            .filter(|p| bytes[(p / 8) as usize].load(Ordering::Acquire) & (1 << (p % 8)) != 0)
            .collect()
    }

    fn log(bytes: usize) -> DirtyLog {
        let memory = SharedMemory::create(c"log", 0x1000).unwrap();
        DirtyLog::new(memory.part(0, bytes).unwrap())
    }

    #[test]
    fn every_page_that_a_write_touches_is_marked_and_no_other() {
        for (addr, len, pages) in [
            (0, 1, vec![0]),
            (0xfff, 1, vec![0]),
            (0xfff, 2, vec![0, 1]),
            (0x3000, 0x1000, vec![3]),
            (0x3000, 0x1001, vec![3, 4]),
            (0x7800, 0x2000, vec![7, 8, 9]),
            (0x5000, 0, vec![]),
        ] {
            let log = log(8);
            log.mark(addr, len).unwrap();
            assert_eq!(marked(&log), pages, "{len} bytes at {addr:#x}");
        }
    }

    #[test]
    fn what_the_log_does_not_reach_is_an_error_and_the_rest_is_marked() {
        let log = log(1);
        assert!(log.mark(0x7000, 0x1000).is_ok());
        assert!(log.mark(0x6000, 0x3000).is_err());
        assert_eq!(marked(&log), [6, 7]);
        assert!(log.mark(0x8000, 1).is_err());
        assert!(log.mark(u64::MAX, u64::MAX).is_err());
        assert_eq!(marked(&log), [6, 7]);
    }
}
