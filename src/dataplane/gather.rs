//! Neighbouring requests of a batch that become one transfer.
//!
//! A read or write that goes on where the last one ended does not go to the disk at once if more requests are at
//! hand: it opens a gather, and leads it. Those of the same batch that go on where the gather ends join. Anything
//! else that comes, a limit, or the end of the batch closes it, and the leader makes one transfer of it all. So
//! nothing ever waits for a request that is not there yet, and a load that is not sequential pays for one compare.
//!
//! This is the book-keeping; `queue::gathered` has the requests.

use std::cell::{Cell, Ref, RefCell};

use libc::iovec;

use crate::virtio::blk::SECTOR_SIZE;
use crate::virtio::blk::request::Command;
use crate::virtio::memory::GuestMemory;

/// Bytes of the largest request that is gathered. Larger ones are worth a transfer of their own.
const LARGEST_REQUEST: u64 = 32 << 10;
/// Bytes of the largest transfer: its first request waits for all of it.
const LARGEST: u64 = 128 << 10;
/// Pieces of memory in one transfer, far below IOV_MAX.
const MOST_PIECES: usize = 256;
/// Pieces of memory of one request.
const MOST_PIECES_OF_REQUEST: usize = 64;

/// A read or write as a gather sees it.
pub(super) struct Neighbour<'a> {
    /// Names its slot.
    pub(super) head: u16,
    pub(super) command: Command,
    pub(super) data: &'a [iovec],
    /// What its buffers are in.
    pub(super) memory: &'a GuestMemory,
}

impl Neighbour<'_> {
    fn len(&self) -> u64 {
        match self.command {
            Command::Read { len, .. } | Command::Write { len, .. } => len,
            _ => 0,
        }
    }

    /// Whether it may be a part of a larger transfer. A piece that is no whole sectors would have all of it copied
    /// where memory must be aligned.
    fn is_fit(&self) -> bool {
        let sector = SECTOR_SIZE as usize;
        let whole = |piece: &iovec| (piece.iov_base as usize | piece.iov_len) % sector == 0;
        (1..=LARGEST_REQUEST).contains(&self.len())
            && self.data.len() <= MOST_PIECES_OF_REQUEST
            && self.data.iter().all(whole)
    }
}

/// What becomes of a request that waits in a gather.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verdict {
    /// It makes the transfer.
    Lead,
    /// Its part of the transfer was made.
    Done,
    /// It is to make its own.
    Alone,
}

/// What became of a request that was shown to a gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joined {
    /// It is in.
    In {
        /// The slot of the one before it.
        after: u16,
        /// There is no room for another like it.
        full: bool,
    },
    /// It is not.
    Not,
}

/// The gather of one ring: at most one is open.
#[derive(Debug)]
pub(super) struct Gather {
    /// Where the last read or write ended, as [`Gather::follows`] has it.
    next: Cell<u64>,
    open: Cell<bool>,
    /// Larger transfers are cheaper than small ones.
    pays: bool,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    leader: u16,
    /// The last of the members, or the leader.
    last: u16,
    bytes: u64,
    /// Of all of them.
    count: usize,
    /// The leader's; only compared. The leader keeps it as long as the transfer takes, and all members' buffers are in it.
    memory: *const GuestMemory,
    /// Those of the members, until the leader takes them.
    pieces: Vec<iovec>,
}

impl Gather {
    /// `pays`: whether larger transfers are cheaper than small ones. If not, nothing is gathered.
    pub(super) fn new(pays: bool) -> Self {
        Self {
            next: Cell::new(u64::MAX),
            open: Cell::new(false),
            pays,
            state: RefCell::new(State {
                leader: 0,
                last: 0,
                bytes: 0,
                count: 0,
                memory: std::ptr::null(),
                pieces: Vec::with_capacity(MOST_PIECES),
            }),
        }
    }

    /// Notes a request that begins. True if it is a read or a write and goes on where the last one ended.
    #[inline]
    pub(super) fn follows(&self, command: &Command) -> bool {
        // Offsets and lengths are whole sectors, so the lowest bit is free to tell writes from reads.
        let (offset, len, kind) = match *command {
            Command::Read { offset, len } => (offset, len, 0),
            Command::Write { offset, len } => (offset, len, 1),
            _ => return false,
        };
        self.next.replace(offset + len + kind) == offset + kind
    }

    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.open.get()
    }

    /// Takes a request that goes on where the open gather ends.
    pub(super) fn join(&self, request: &Neighbour<'_>) -> Joined {
        let mut state = self.state.borrow_mut();
        let (bytes, count) = (
            state.bytes + request.len(),
            state.count + request.data.len(),
        );
        let fits = bytes <= LARGEST && count <= MOST_PIECES && request.is_fit();
        // Nothing replaces the memory within a batch.
        if !self.open.get() || !fits || !std::ptr::eq(state.memory, request.memory) {
            return Joined::Not;
        }
        state.pieces.extend_from_slice(request.data);
        (state.bytes, state.count) = (bytes, count);
        // The next one is likely to be like this one.
        let more = bytes + request.len() <= LARGEST && count + request.data.len() <= MOST_PIECES;
        Joined::In {
            after: std::mem::replace(&mut state.last, request.head),
            full: !more,
        }
    }

    /// Opens with this request as the leader, if it is fit for that. None is open.
    pub(super) fn open(&self, leader: &Neighbour<'_>) -> bool {
        if !self.pays || !leader.is_fit() {
            return false;
        }
        let mut state = self.state.borrow_mut();
        state.pieces.clear();
        (state.leader, state.last) = (leader.head, leader.head);
        (state.bytes, state.count) = (leader.len(), leader.data.len());
        state.memory = leader.memory;
        self.open.set(true);
        true
    }

    /// Closes; returns the leader's slot and what is to become of it. None: it was not open.
    pub(super) fn close(&self) -> Option<(u16, Verdict)> {
        if !self.open.replace(false) {
            return None;
        }
        let state = self.state.borrow();
        let verdict = match state.last == state.leader {
            true => Verdict::Alone,
            false => Verdict::Lead,
        };
        Some((state.leader, verdict))
    }

    /// The pieces of the members of the gather that was closed last.
    pub(super) fn pieces(&self) -> Ref<'_, [iovec]> {
        Ref::map(self.state.borrow(), |state| state.pieces.as_slice())
    }
}

#[cfg(test)]
mod tests;
