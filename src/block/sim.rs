//! A storage in memory that tests can make slow, break, and cut the power of.
//!
//! Time passes only where an operation yields; all chance comes from one seed. A write takes effect when
//! it completes, in whole or (with [`Sim::pieces`]) piece by piece. A flush makes durable what had
//! completed when it began. [`SimStorage::crash`] gives an image as a power loss could leave it: of every
//! sector any version since the last flush, writes still under way included.

mod change;
mod losses;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::reactor::{Io, Sg};

use super::error::{Error, Result};
use super::storage::Limits;
use change::Change;

/// Grain at which a power loss keeps or loses a write.
pub const SECTOR: usize = 512;

/// What was asked of the storage. Reads are not recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Event {
    Write { offset: u64, len: u64 },
    Zeroes { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Allocate { offset: u64, len: u64 },
    SetLen { len: u64 },
    Flush,
}

/// Kinds of operations, for [`SimStorage::fail`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Read,
    Write,
    Zeroes,
    Discard,
    Allocate,
    SetLen,
    Flush,
    /// Any of them.
    Any,
}

/// How a simulated storage behaves.
#[derive(Clone, Debug)]
pub struct Sim {
    /// Of all chance.
    pub seed: u64,
    /// Operations yield up to this many times before they complete, so that they complete in any order.
    pub delay: u32,
    /// Transfers happen in pieces of whole sectors, with delays between them.
    pub pieces: bool,
    /// [`super::Storage::allocate`] gives zeros; else it says false, and what it gives is garbage.
    pub promises_zeros: bool,
    /// Discarded bytes read as garbage, not as zeros.
    pub discard_garbage: bool,
    /// A write that is made to fail may have written some of its sectors, a read have filled half of its
    /// memory.
    pub torn_failures: bool,
}

impl Default for Sim {
    fn default() -> Self {
        Self {
            seed: 1,
            delay: 0,
            pieces: false,
            promises_zeros: true,
            discard_garbage: false,
            torn_failures: false,
        }
    }
}

#[derive(Debug)]
struct Fault {
    kind: Kind,
    /// Fails when it comes down to zero.
    countdown: u64,
    errno: i32,
    /// Goes on failing.
    stays: bool,
}

#[derive(Debug)]
struct State {
    config: Sim,
    rng: u64,
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Completed and not flushed, in order of completion.
    completed: Vec<Change>,
    /// Changes that were completed and flushed so far.
    drained: u64,
    /// Begun and not completed, by number.
    under_way: BTreeMap<u64, Change>,
    next: u64,
    events: Vec<Event>,
    faults: Vec<Fault>,
    operations: u64,
    bytes_read: u64,
    /// Changing operations left before the power goes.
    power: Option<u64>,
    dead: bool,
    /// What would make the storage longer than this finds no space.
    full_at: Option<u64>,
}

/// The simulated storage. See the module.
#[derive(Debug)]
pub struct SimStorage {
    limits: Limits,
    read_only: bool,
    inode: u64,
    state: Mutex<State>,
}

impl SimStorage {
    /// A storage that holds `image`, all of it durable.
    pub fn new(image: Vec<u8>, config: Sim) -> Self {
        let rng = config.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self {
            limits: Limits::default(),
            read_only: false,
            inode: 1,
            state: Mutex::new(State {
                config,
                rng,
                durable: image.clone(),
                current: image,
                completed: Vec::new(),
                drained: 0,
                under_way: BTreeMap::new(),
                next: 0,
                events: Vec::new(),
                faults: Vec::new(),
                operations: 0,
                bytes_read: 0,
                power: None,
                dead: false,
                full_at: None,
            }),
        }
    }

    /// The same, refusing writes.
    #[must_use]
    pub fn read_only_too(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same, with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything asked for since the last call, in the order in which it began.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }

    /// Operations begun so far, reads included.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Bytes that reads asked for so far.
    pub fn bytes_read(&self) -> u64 {
        self.state().bytes_read
    }

    /// What reads see now.
    pub fn image(&self) -> Vec<u8> {
        self.state().current.clone()
    }

    /// Behaves otherwise from now on. Chance goes on as it was.
    pub fn behave(&self, config: Sim) {
        self.state().config = config;
    }

    /// Makes the `nth` (from 1) operation of this kind from now on fail. Once, unless it `stays` so.
    pub fn fail(&self, kind: Kind, nth: u64, errno: i32, stays: bool) {
        self.state().faults.push(Fault {
            kind,
            countdown: nth.max(1),
            errno,
            stays,
        });
    }

    /// Lets the storage grow to `len` bytes and no more.
    pub fn full_at(&self, len: u64) {
        self.state().full_at = Some(len);
    }

    /// Forgets all faults that were ordered.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// As [`super::Storage::identity`].
    pub fn identity(&self) -> (u64, u64) {
        (1, self.inode)
    }

    /// The same, as another file.
    #[must_use]
    pub fn with_inode(mut self, inode: u64) -> Self {
        self.inode = inode;
        self
    }

    pub(super) fn path(&self) -> &Path {
        Path::new("sim")
    }

    pub(super) fn len(&self) -> u64 {
        self.state().current.len() as u64
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Notes that an operation begins; its fault, if it was ordered.
    fn begin(&self, kind: Kind, offset: u64, event: Option<Event>) -> (Result<()>, bool) {
        let mut state = self.state();
        state.operations += 1;
        if let Some(event) = event {
            match &mut state.power {
                Some(0) => state.dead = true,
                Some(left) => *left -= 1,
                None => {}
            }
            if !state.dead {
                state.events.push(event);
            }
        }
        if state.dead {
            return (Err(error(kind, offset, libc::EIO)), true);
        }
        let mut errno = None;
        state.faults.retain_mut(|fault| {
            if fault.kind != kind && fault.kind != Kind::Any {
                return true;
            }
            fault.countdown = fault.countdown.saturating_sub(1);
            if fault.countdown > 0 {
                return true;
            }
            errno = errno.or(Some(fault.errno));
            fault.stays
        });
        match errno {
            Some(errno) => (Err(error(kind, offset, errno)), false),
            None if self.read_only && event.is_some() && kind != Kind::Flush => {
                (Err(error(kind, offset, libc::EROFS)), true)
            }
            None => (Ok(()), false),
        }
    }

    async fn delay(&self, io: &Io) {
        let times = {
            let mut state = self.state();
            let most = u64::from(state.config.delay);
            random(&mut state.rng) % (most + 1)
        };
        for _ in 0..times {
            io.yield_now().await;
        }
    }

    /// Makes a change happen after a while.
    async fn change(&self, io: &Io, kind: Kind, event: Event, change: Change) -> Result<()> {
        let offset = change.range(0).start;
        let (begun, without_effect) = self.begin(kind, offset, Some(event));
        let (end, full_at) = (change.range(0).end, self.state().full_at);
        if full_at.is_some_and(|full| end > full && change.grows()) {
            return Err(error(kind, offset, libc::ENOSPC));
        }
        if without_effect {
            return begun;
        }
        let pieces = self.cut(change, begun.is_err());
        let numbers: Vec<u64> = {
            let mut state = self.state();
            let numbers: Vec<u64> = (0..pieces.len() as u64).map(|n| state.next + n).collect();
            state.next += pieces.len() as u64;
            for (number, piece) in numbers.iter().zip(&pieces) {
                state.under_way.insert(*number, piece.clone());
            }
            numbers
        };
        for number in numbers {
            self.delay(io).await;
            let mut state = self.state();
            if state.dead {
                return Err(error(kind, offset, libc::EIO));
            }
            if let Some(piece) = state.under_way.remove(&number) {
                piece.apply(&mut state.current);
                state.completed.push(piece);
            }
        }
        begun
    }

    /// The pieces in which a change happens; of a failing one, those that happen all the same.
    fn cut(&self, change: Change, fails: bool) -> Vec<Change> {
        let mut state = self.state();
        if fails && !state.config.torn_failures {
            return Vec::new();
        }
        let Change::Bytes { offset, data } = change else {
            return if fails { Vec::new() } else { vec![change] };
        };
        if !fails && !state.config.pieces {
            return vec![Change::Bytes { offset, data }];
        }
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let sectors = 1 + random(&mut state.rng) as usize % 8;
            let len = (sectors * SECTOR).min(data.len() - at);
            if !fails || random(&mut state.rng) % 2 == 0 {
                pieces.push(Change::Bytes {
                    offset: offset + at as u64,
                    data: data[at..at + len].to_vec(),
                });
            }
            at += len;
        }
        pieces
    }

    pub(super) async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        let (begun, without_effect) = self.begin(Kind::Read, offset, None);
        let to = match begun {
            // What was read before the failure is there, and the rest is not what it was.
            Err(error) if self.state().config.torn_failures && !without_effect => {
                to.zero();
                let (half, _) = to.split_at(to.len() / 2);
                half.copy_from(
                    self.state()
                        .current
                        .get(offset as usize..)
                        .unwrap_or_default(),
                );
                return Err(error);
            }
            begun => begun.map(|()| to)?,
        };
        self.state().bytes_read += to.len() as u64;
        self.delay(io).await;
        let state = self.state();
        let start = (offset as usize).min(state.current.len());
        let done = to.copy_from(&state.current[start..]);
        to.split_at(done).1.zero();
        Ok(())
    }

    pub(super) async fn write(&self, io: &Io, offset: u64, from: Sg<'_>) -> Result<()> {
        let mut data = vec![0; from.len()];
        from.copy_to(&mut data);
        let len = data.len() as u64;
        let event = Event::Write { offset, len };
        let change = Change::Bytes { offset, data };
        self.change(io, Kind::Write, event, change).await
    }

    pub(super) async fn flush(&self, io: &Io) -> Result<()> {
        self.begin(Kind::Flush, 0, Some(Event::Flush)).0?;
        // What completes from here on is not covered.
        let covered = {
            let state = self.state();
            state.drained + state.completed.len() as u64
        };
        self.delay(io).await;
        let mut state = self.state();
        if state.dead {
            return Err(error(Kind::Flush, 0, libc::EIO));
        }
        let state = &mut *state;
        // A flush that began later may have ended before this one.
        let covered = covered.saturating_sub(state.drained);
        state.drained += covered;
        for change in state.completed.drain(..covered as usize) {
            change.apply(&mut state.durable);
        }
        Ok(())
    }

    pub(super) async fn discard(&self, io: &Io, offset: u64, len: u64) -> Result<()> {
        let byte = if self.state().config.discard_garbage {
            0xd5
        } else {
            0
        };
        let change = Change::Fill {
            offset,
            len,
            byte,
            grows: false,
        };
        let event = Event::Discard { offset, len };
        self.change(io, Kind::Discard, event, change).await
    }

    pub(super) async fn write_zeroes(
        &self,
        io: &Io,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        let change = Change::Fill {
            offset,
            len,
            byte: 0,
            grows: true,
        };
        let event = Event::Zeroes { offset, len, unmap };
        self.change(io, Kind::Zeroes, event, change).await
    }

    pub(super) async fn allocate(&self, io: &Io, offset: u64, len: u64) -> Result<bool> {
        let zeros = self.state().config.promises_zeros;
        let byte = if zeros { 0 } else { 0xa5 };
        let change = Change::Fill {
            offset,
            len,
            byte,
            grows: true,
        };
        let event = Event::Allocate { offset, len };
        self.change(io, Kind::Allocate, event, change).await?;
        Ok(zeros)
    }

    pub(super) async fn set_len(&self, io: &Io, len: u64) -> Result<()> {
        let event = Event::SetLen { len };
        self.change(io, Kind::SetLen, event, Change::SetLen(len))
            .await
    }
}

fn error(kind: Kind, offset: u64, errno: i32) -> Error {
    let what = match kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::Zeroes => "zero",
        Kind::Discard => "discard",
        Kind::Allocate => "allocate",
        Kind::SetLen => "resize",
        Kind::Flush => "flush",
        Kind::Any => "do anything",
    };
    Error::io("sim", what, offset, io::Error::from_raw_os_error(errno))
}

/// The next number of a xorshift64* generator.
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
}
