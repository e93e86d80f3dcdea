//! A place for each command that may be outstanding. All of them are allocated with the queue.

use crate::reactor::Sg;

use super::super::wire::Status;
use super::{CAPSULE_BYTES, Ended, InFlight, Tag};

/// No slot.
pub(super) const NIL: u16 = u16::MAX;
/// In [`Slot::active`]: no identifier is this.
const INACTIVE: u32 = u32::MAX;

/// Which way a command's data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// There are none.
    None,
    /// C2HData.
    Read,
    /// H2CData, by R2T.
    Write,
    /// In the capsule.
    InCapsule,
}

/// An R2T whose data were not queued yet, or not all of them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PendingR2t {
    pub(super) ttag: u16,
    /// Bytes that are still to be queued.
    pub(super) left: u32,
}

/// One command, or a place for one.
#[derive(Debug)]
pub(super) struct Slot {
    /// The command identifier while the controller may name it, else [`INACTIVE`].
    active: u32,
    pub(super) kind: Kind,
    /// Fewer data than its length are no violation.
    pub(super) may_be_short: bool,
    /// The capsule was not accounted for by `sent()`.
    pub(super) capsule_queued: bool,
    /// A C2HData with LAST_PDU has come.
    pub(super) last_seen: bool,
    /// The data digest of a C2HData was wrong.
    pub(super) digest_failed: bool,
    /// Answered, but something of it is still being sent.
    pub(super) concluded: bool,
    /// In the list of those that wait for a header of an H2CData. Outlives the command.
    pub(super) waits_for_header: bool,
    cid: u16,
    pub(super) user: u32,
    /// Bytes of data.
    pub(super) length: u32,
    /// Bytes that have come, or that R2Ts have asked for.
    pub(super) done: u32,
    /// Bytes that were queued as H2CData.
    pub(super) queued: u32,
    /// PDUs in the queue to send.
    pub(super) unsent: u32,
    /// Those of them that were in no list yet.
    pub(super) unlisted: u32,
    /// R2Ts whose data were not all listed: those that count against the limit.
    pub(super) r2ts_outstanding: u32,
    /// Where in the slot's ring the first pending R2T is, and how many there are.
    pub(super) r2t_first: u32,
    pub(super) r2t_count: u32,
    /// Memory of the data that have not come, or were not queued.
    pub(super) rest: Sg<'static>,
    previous: u16,
    next: u16,
    generation: u16,
    sequence: u64,
    pub(super) outcome: (Status, u64),
    /// The capsule's header, and its digest.
    pub(super) header: [u8; CAPSULE_BYTES],
    /// The digest of the data in the capsule.
    pub(super) digest: [u8; 4],
    /// With data digests: the copy that is sent. Allocated at the first use, and kept.
    pub(super) staged: Vec<u8>,
}

impl Slot {
    fn new() -> Self {
        Self {
            active: INACTIVE,
            kind: Kind::None,
            may_be_short: false,
            capsule_queued: false,
            last_seen: false,
            digest_failed: false,
            concluded: false,
            waits_for_header: false,
            cid: 0,
            user: 0,
            length: 0,
            done: 0,
            queued: 0,
            unsent: 0,
            unlisted: 0,
            r2ts_outstanding: 0,
            r2t_first: 0,
            r2t_count: 0,
            rest: Sg::empty(),
            previous: NIL,
            next: NIL,
            generation: 0,
            sequence: 0,
            outcome: (Status::SUCCESS, 0),
            header: [0; CAPSULE_BYTES],
            digest: [0; 4],
            staged: Vec::new(),
        }
    }

    pub(super) fn cid(&self) -> u16 {
        self.cid
    }

    /// From now on the controller may not name it; what it asked for and was not queued is forgotten.
    pub(super) fn conclude(&mut self, status: Status, result: u64) {
        self.active = INACTIVE;
        self.concluded = true;
        self.outcome = (status, result);
        self.r2t_count = 0;
    }
}

/// All slots, the free ones, and the order in which commands were begun.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// For each slot a ring of `max_r2t`.
    r2ts: Box<[PendingR2t]>,
    max_r2t: u32,
    index_bits: u32,
    oldest: u16,
    newest: u16,
    begun: u64,
}

impl Slots {
    pub(super) fn new(depth: u16, max_r2t: u32) -> Self {
        let count = usize::from(depth);
        Self {
            slots: (0..count).map(|_| Slot::new()).collect(),
            free: (0..depth).rev().collect(),
            r2ts: vec![PendingR2t::default(); count * max_r2t as usize].into(),
            max_r2t,
            // So many that an index is never all ones, and an identifier never FFFFh.
            index_bits: u16::BITS - depth.leading_zeros(),
            oldest: NIL,
            newest: NIL,
            begun: 0,
        }
    }

    #[inline]
    pub(super) fn free(&self) -> u16 {
        self.free.len() as u16
    }

    #[inline]
    pub(super) fn in_flight(&self) -> u16 {
        (self.slots.len() - self.free.len()) as u16
    }

    #[inline]
    pub(super) fn get(&self, index: u16) -> &Slot {
        &self.slots[usize::from(index)]
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }

    fn index(&self, cid: u16) -> u16 {
        (u32::from(cid) & ((1 << self.index_bits) - 1)) as u16
    }

    /// The slot of the command that the controller calls `cid`.
    #[inline]
    pub(super) fn by_cid(&self, cid: u16) -> Option<u16> {
        let index = self.index(cid);
        let slot = self.slots.get(usize::from(index))?;
        (slot.active == u32::from(cid)).then_some(index)
    }

    pub(super) fn by_tag(&self, tag: Tag) -> Option<InFlight> {
        let slot = self.slots.get(usize::from(self.index(tag.0)))?;
        let in_flight = slot.active != INACTIVE || slot.concluded;
        (in_flight && slot.cid == tag.0).then_some(slot.in_flight())
    }

    pub(super) fn in_order(&self) -> impl Iterator<Item = InFlight> + '_ {
        let mut at = self.oldest;
        std::iter::from_fn(move || {
            let slot = self.slots.get(usize::from(at))?;
            at = slot.next;
            Some(slot.in_flight())
        })
    }

    /// A free slot for a command, and its identifier.
    #[inline]
    pub(super) fn take(&mut self, kind: Kind, length: u32, user: u32) -> Option<(u16, u16)> {
        let index = self.free.pop()?;
        self.begun += 1;
        let newest = std::mem::replace(&mut self.newest, index);
        if let Some(before) = self.slots.get_mut(usize::from(newest)) {
            before.next = index;
        } else {
            self.oldest = index;
        }
        let generation_shift = self.index_bits;
        let slot = &mut self.slots[usize::from(index)];
        slot.generation = slot.generation.wrapping_add(1);
        slot.cid = index | (u32::from(slot.generation) << generation_shift) as u16;
        slot.active = slot.cid.into();
        slot.kind = kind;
        slot.capsule_queued = true;
        slot.last_seen = false;
        slot.digest_failed = false;
        slot.concluded = false;
        slot.user = user;
        slot.length = length;
        slot.done = 0;
        slot.queued = 0;
        slot.unsent = 1;
        slot.unlisted = 1;
        slot.r2ts_outstanding = 0;
        slot.r2t_count = 0;
        slot.previous = newest;
        slot.next = NIL;
        slot.sequence = self.begun;
        Some((index, slot.cid))
    }

    /// Gives a slot back.
    #[inline]
    pub(super) fn release(&mut self, index: u16, status: Status, result: u64) -> Ended {
        let slot = &mut self.slots[usize::from(index)];
        slot.active = INACTIVE;
        slot.concluded = false;
        slot.rest = Sg::empty();
        let (previous, next) = (slot.previous, slot.next);
        let ended = Ended {
            tag: Tag(slot.cid),
            user: slot.user,
            status,
            result,
        };
        match self.slots.get_mut(usize::from(previous)) {
            Some(slot) => slot.next = next,
            None => self.oldest = next,
        }
        match self.slots.get_mut(usize::from(next)) {
            Some(slot) => slot.previous = previous,
            None => self.newest = previous,
        }
        self.free.push(index);
        ended
    }

    /// Remembers an R2T of a slot that has fewer than the limit.
    pub(super) fn push_r2t(&mut self, index: u16, r2t: PendingR2t) {
        let slot = &mut self.slots[usize::from(index)];
        let at = (slot.r2t_first + slot.r2t_count) % self.max_r2t;
        slot.r2t_count += 1;
        self.r2ts[usize::from(index) * self.max_r2t as usize + at as usize] = r2t;
    }

    /// The slot, and the first R2T of it that was not answered in full.
    pub(super) fn first_r2t(&mut self, index: u16) -> Option<(&mut Slot, &mut PendingR2t)> {
        let slot = &mut self.slots[usize::from(index)];
        if slot.r2t_count == 0 {
            return None;
        }
        let at = usize::from(index) * self.max_r2t as usize + slot.r2t_first as usize;
        Some((slot, &mut self.r2ts[at]))
    }

    pub(super) fn pop_r2t(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.r2t_first = (slot.r2t_first + 1) % self.max_r2t;
        slot.r2t_count -= 1;
    }

    /// All slots free again.
    pub(super) fn reset(&mut self) {
        for slot in &mut self.slots {
            slot.active = INACTIVE;
            slot.concluded = false;
            slot.waits_for_header = false;
            slot.r2t_count = 0;
            slot.rest = Sg::empty();
        }
        self.free.clear();
        self.free.extend((0..self.slots.len() as u16).rev());
        self.oldest = NIL;
        self.newest = NIL;
    }
}

impl Slot {
    fn in_flight(&self) -> InFlight {
        InFlight {
            tag: Tag(self.cid),
            user: self.user,
            sequence: self.sequence,
        }
    }
}
