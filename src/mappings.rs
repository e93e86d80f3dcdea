//! The mappings of files that another process can take the pages away from, and what becomes of them then.
//!
//! A VMM that truncates the file of its memory, or a hugetlbfs without a free page, turns the next access to
//! the mapping into a SIGBUS: at any instruction of any thread. So every such mapping is in a table that a
//! signal handler can read. What has lost its pages is covered with anonymous zeros, for the instruction to go
//! on, and is marked as lost *before* that: whoever touched a page that nobody else will ever see finds the
//! mark when it looks. Whoever serves the owner of the memory is told by an eventfd.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Mappings that this process can have at a time: thirty VMMs with all the regions that they may have.
const SLOTS: usize = 16384;

/// There is no room in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("this process has {SLOTS} mappings of shared memory and cannot watch over one more")]
pub struct TableFull;

/// A mapping, for a signal handler to find. Changed under [`FREE`]'s lock only; read without any.
struct Slot {
    /// Odd while the rest is valid; another number after each change.
    turn: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        turn: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// Slots that were ever used: all before this number.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Slots that were used and are free again.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// Whether any mapping was ever lost: all that the path of a request looks at.
static ANY_LOST: AtomicBool = AtomicBool::new(false);

static EVENT: OnceLock<EventFd> = OnceLock::new();
/// The descriptor in [`EVENT`], for a signal handler; negative: none yet.
static EVENT_FD: AtomicI32 = AtomicI32::new(-1);

/// What becomes readable, and stays so, when a mapping is lost. It is written to at each loss and never read:
/// wait for it edge-triggered.
///
/// # Errors
/// No eventfd can be made.
pub fn loss_event() -> io::Result<&'static EventFd> {
    if let Some(event) = EVENT.get() {
        return Ok(event);
    }
    let made = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let event = EVENT.get_or_init(|| made);
    EVENT_FD.store(event.as_raw_fd(), Ordering::Release);
    Ok(event)
}

/// Whether any mapping of this process was ever lost. If so, ask for those that matter.
#[inline]
pub fn any_lost() -> bool {
    ANY_LOST.load(Ordering::Relaxed)
}

/// The size in bytes of this machine's ordinary pages.
pub fn page_size() -> u64 {
    // SAFETY: sysconf has no memory arguments.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096).max(1)
}

/// The size in bytes of the pages that a file is mapped in: huge ones on hugetlbfs.
///
/// # Errors
/// Those of `fstatfs`.
pub fn page_size_of(file: &File) -> io::Result<u64> {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the descriptor is open and `stat` has room for the answer.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fstatfs succeeded and filled it in.
    let stat = unsafe { stat.assume_init() };
    let huge = (stat.f_type == libc::HUGETLBFS_MAGIC)
        .then(|| u64::try_from(stat.f_bsize).ok())
        .flatten();
    Ok(huge.unwrap_or(0).max(page_size()))
}

/// A mapping's place in the table. It is to be dropped before the mapping goes.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
    start: usize,
    len: usize,
}

impl Watch {
    /// Watches over a mapping of `len` bytes at `start`, in pages of `page` bytes. Both `start` and the kernel's
    /// end of the mapping are multiples of that.
    ///
    /// # Errors
    /// The table is full.
    pub(crate) fn new(start: *mut u8, len: usize, page: u64) -> Result<Self, TableFull> {
        let start = start as usize;
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let used = USED.load(Ordering::Relaxed);
        let number = free.pop().or((used < SLOTS).then_some(used));
        let number = number.ok_or(TableFull)?;
        let slot = &TABLE[number];
        // Pairs with the fence in `find`: who sees any of these stores sees that the turn is over.
        fence(Ordering::Release);
        slot.start.store(start, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.page.store(page as usize, Ordering::Relaxed);
        slot.lost.store(false, Ordering::Relaxed);
        slot.turn.fetch_add(1, Ordering::Release);
        USED.store(used.max(number + 1), Ordering::Release);
        Ok(Self {
            slot: number,
            start,
            len,
        })
    }

    /// Whether pages of the mapping were lost. What was written to it since may have gone nowhere.
    pub fn is_lost(&self) -> bool {
        TABLE[self.slot].lost.load(Ordering::Acquire)
    }

    /// Gives the whole mapping up, as if its pages were lost: accesses go to zeros that nobody else sees. False
    /// if the kernel did not let it be covered; it counts as lost all the same.
    pub(crate) fn give_up(&self) -> bool {
        mark(&TABLE[self.slot]);
        let covered = cover_range(self.start, self.len);
        tell();
        covered
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.slot].turn.fetch_add(1, Ordering::Relaxed);
        free.push(self.slot);
    }
}

impl Slot {
    /// Start, length and page size of the mapping, if there is one and it stays there: other slots than the one that
    /// is looked for (whose mapping is being accessed) may change at any time, and what was read of them is then a
    /// mixture. `midway` is for tests.
    fn read(&self, midway: impl FnOnce()) -> Option<(usize, usize, usize)> {
        let turn = self.turn.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        midway();
        let len = self.len.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let stayed = turn % 2 == 1 && self.turn.load(Ordering::Relaxed) == turn;
        stayed.then_some((start, len, page))
    }
}

/// The slot of an address: start, length and page size with it.
fn find(address: usize) -> Option<(&'static Slot, usize, usize, usize)> {
    let used = USED.load(Ordering::Acquire);
    TABLE[..used].iter().find_map(|slot| {
        let (start, len, page) = slot.read(|| {})?;
        let inside = address.wrapping_sub(start) < len;
        inside.then_some((slot, start, len, page))
    })
}

fn mark(slot: &Slot) {
    slot.lost.store(true, Ordering::SeqCst);
    ANY_LOST.store(true, Ordering::SeqCst);
}

fn tell() {
    let event = EVENT_FD.load(Ordering::Acquire);
    if event >= 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: write(2) is async-signal-safe, and eight bytes are there. A counter that is full is set.
        unsafe { libc::write(event, one.as_ptr().cast(), one.len()) };
    }
}

fn cover_range(start: usize, len: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is in a mapping of ours that stays until its `Watch` is dropped, and nothing but shared
    // memory is in it, which may change at any time anyway.
    let mapped = unsafe { libc::mmap(start as *mut _, len, protection, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// For the handler of SIGBUS: puts zeros where the pages behind `address` are lost, and tells of it. False if
/// the address is in no mapping that is watched over, or cannot be helped.
///
/// What follows the address in its mapping is covered too: a truncated file has lost it as well, and holes that
/// are covered one by one could use up the mappings that a process may have. Async-signal-safe.
pub(crate) fn cover(address: usize) -> bool {
    let Some((slot, start, len, page)) = find(address) else {
        return false;
    };
    // The mark comes first: who writes to a page of zeros finds it afterwards. (Another thread gets there only
    // after the kernel has made its processor forget the old page, which is as good as a barrier.)
    mark(slot);
    let from = address - (address - start) % page.max(1);
    // Some mappings (device DAX) can only be replaced whole.
    let covered = cover_range(from, len - (from - start)) || cover_range(start, len);
    tell();
    covered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_its_mapping_only() {
        // Addresses that no process has: nothing is mapped or touched here.
        let at = 0x7fff_0000_0000_0000usize;
        let watch = |page_number: usize, pages: usize| {
            let start = (at + page_number * 4096) as *mut u8;
            Watch::new(start, pages * 4096, 4096).unwrap()
        };
        let one = watch(0, 2);
        let two = watch(3, 1);
        let found = |address: usize| find(address).map(|(_, start, ..)| (start - at) / 4096);
        assert_eq!(found(at), Some(0));
        assert_eq!(found(at + 2 * 4096 - 1), Some(0));
        assert_eq!(found(at + 2 * 4096), None);
        assert_eq!(found(at + 3 * 4096 + 17), Some(3));
        assert_eq!(found(at - 1), None);
        assert!(!one.is_lost() && !two.is_lost());
        drop(one);
        assert_eq!(found(at), None);
        // Its slot is used again, and begins unharmed.
        let three = watch(5, 1);
        mark(&TABLE[three.slot]);
        assert!(three.is_lost() && !two.is_lost());
        drop(three);
        let four = watch(7, 1);
        assert!(!four.is_lost());
        assert_eq!(found(at + 5 * 4096), None);
        assert_eq!(found(at + 7 * 4096), Some(7));
    }

    #[test]
    fn what_is_read_of_a_slot_while_it_changes_is_not_believed() {
        let at = 0x7ffe_0000_0000_0000usize;
        let near = Watch::new((at - 0x1000) as *mut u8, 0x1000, 4096).unwrap();
        let slot = &TABLE[near.slot];
        assert_eq!(slot.read(|| {}), Some((at - 0x1000, 0x1000, 4096)));
        // Replaced by a longer one, which begins further down: the start of the first with the length of the second
        // would reach beyond both.
        let mixture = slot.read(|| {
            drop(near);
            let mut others = Vec::new();
            loop {
                let next = Watch::new((at - 0x10_0000) as *mut u8, 0x8000, 4096).unwrap();
                let same = std::ptr::eq(slot, &TABLE[next.slot]);
                others.push(next);
                if same {
                    break;
                }
            }
        });
        assert_eq!(mixture, None);
        assert!(find(at + 0x1000).is_none());
    }

    #[test]
    fn an_address_is_found_while_other_mappings_come_and_go() {
        let at = 0x7ffd_0000_0000_0000usize;
        let _ours = Watch::new(at as *mut u8, 4096, 4096).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 1..3usize {
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let low = (at - (thread << 40)) as *mut u8;
                        drop(Watch::new(low, 1 << 39, 4096).unwrap());
                    }
                });
            }
            for _ in 0..10_000 {
                let found = find(at + 5).map(|(_, start, len, _)| (start, len));
                assert_eq!(found, Some((at, 4096)));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
