//! Files that io_uring operations name: registered with each ring at their first use there, so that an
//! operation costs no reference counting in the kernel.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::inline;

/// Registered-file slots of every ring; files beyond it are used by descriptor.
pub(super) const SLOTS: usize = 256;

/// Which file (by a number never used again) holds each slot; 0: none.
static HOLDERS: [AtomicU64; SLOTS] = [const { AtomicU64::new(0) }; SLOTS];
static FREE: Mutex<Vec<u32>> = Mutex::new(Vec::new());
static NEVER_USED: AtomicU64 = AtomicU64::new(0);
static NEXT_IDENTITY: AtomicU64 = AtomicU64::new(1);
/// Counts closed files, so that a ring knows when to look for slots to let go.
pub(super) static CLOSED: AtomicU64 = AtomicU64::new(0);

/// An open file for use with [`super::Io`], from any thread.
#[derive(Debug)]
pub struct IoFile {
    file: File,
    slot: Option<u32>,
    identity: u64,
    in_memory: bool,
}

impl IoFile {
    /// Takes a file over that holds a disk's bytes. If it is in memory, transfers are made as they are begun and
    /// not by the ring: see `inline`. Asks the file system, so it is for where files are opened.
    pub fn of_disk(file: File) -> Self {
        let in_memory = inline::is_in_memory(&file);
        let mut made = Self::new(file);
        made.in_memory = in_memory;
        made
    }

    /// Takes the file over.
    pub fn new(file: File) -> Self {
        let reused = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let slot = reused.or_else(|| {
            let next = NEVER_USED.fetch_add(1, Ordering::Relaxed);
            u32::try_from(next).ok().filter(|n| (*n as usize) < SLOTS)
        });
        let identity = NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed);
        if let Some(slot) = slot {
            HOLDERS[slot as usize].store(identity, Ordering::Release);
        }
        Self {
            file,
            slot,
            identity,
            in_memory: false,
        }
    }

    /// Takes a file over that is used now and then: it keeps no slot from others.
    pub fn without_slot(file: File) -> Self {
        Self {
            file,
            slot: None,
            identity: NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed),
            in_memory: false,
        }
    }

    /// The file, for calls that do not go through a ring.
    pub fn get(&self) -> &File {
        &self.file
    }

    /// True if its file system is memory, and the ring would hand each request to a thread.
    #[inline]
    pub(crate) fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    pub(super) fn slot(&self) -> Option<(u32, u64)> {
        self.slot.map(|slot| (slot, self.identity))
    }
}

impl AsFd for IoFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for IoFile {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for IoFile {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            HOLDERS[slot as usize].store(0, Ordering::Release);
            CLOSED.fetch_add(1, Ordering::Release);
            FREE.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(slot);
        }
    }
}

/// Which files one ring has registered, by slot.
#[derive(Debug)]
pub(super) struct Registered {
    identities: Vec<u64>,
    closed_seen: u64,
}

impl Registered {
    pub(super) fn new() -> Self {
        Self {
            identities: vec![0; SLOTS],
            closed_seen: CLOSED.load(Ordering::Acquire),
        }
    }

    /// True if the ring knows this file already.
    #[inline]
    pub(super) fn holds(&self, slot: u32, identity: u64) -> bool {
        self.identities[slot as usize] == identity
    }

    pub(super) fn set(&mut self, slot: u32, identity: u64) {
        self.identities[slot as usize] = identity;
    }

    /// Slots whose file was closed since the last call; the caller unregisters them.
    pub(super) fn stale(&mut self) -> Vec<u32> {
        self.closed_seen = CLOSED.load(Ordering::Acquire);
        let mut stale = Vec::new();
        for (slot, identity) in self.identities.iter_mut().enumerate() {
            if *identity != 0 && HOLDERS[slot].load(Ordering::Acquire) != *identity {
                *identity = 0;
                stale.push(slot as u32);
            }
        }
        stale
    }

    #[inline]
    pub(super) fn anything_closed(&self) -> bool {
        CLOSED.load(Ordering::Relaxed) != self.closed_seen
    }
}
