//! Requests that are a part of one transfer: see [`gather`](crate::dataplane::gather).
//!
//! The leader of a gather has all that its transfer needs: the members' pieces are appended to its own chain, and the
//! snapshot of guest memory that it holds is that of all members, which were fetched in the same batch. A member waits,
//! and is remembered in a list that goes from slot to slot. So whatever ends a leader early ends the transfer as it would
//! end a single request, and members of a leader that was given up stay in flight with it.

use std::future::poll_fn;
use std::task::Poll;

use super::{Queue, Slot};
use crate::dataplane::gather::{Joined, Neighbour, Verdict};
use crate::kill_point::kill_point;
use crate::virtio::blk::request::Parsed;
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::ChainBuf;

/// The end of a list of members. No ring is as large.
pub(super) const NOBODY: u16 = u16::MAX;

impl Slot {
    /// Whether the request's transfer is that of others, too.
    #[inline]
    pub(super) fn leads(&self) -> bool {
        self.next_member.get() != NOBODY
    }
}

impl Queue {
    /// A request that goes on where the last one ended. True: it is in a gather, and waits for its verdict.
    #[cold]
    pub(super) fn gather(
        &self,
        slot: &Slot,
        memory: &GuestMemory,
        parsed: &Parsed,
        chain: &ChainBuf,
    ) -> bool {
        let request = Neighbour {
            head: slot.head,
            command: parsed.command,
            data: parsed.data(chain),
            memory,
        };
        if self.gather.is_open() {
            if let Joined::In { after, full } = self.gather.join(&request) {
                self.with_slot(after, |before| before.next_member.set(slot.head));
                if full {
                    self.close_gather();
                }
                return true;
            }
            self.close_gather();
        }
        // Alone it would only be held up.
        parsed.may_grow(chain) && self.ring.borrow().available() && self.gather.open(&request)
    }

    /// Waits for what becomes of a request in a gather. True: it was made. If it is to lead, its data are the members',
    /// too, from then on.
    pub(super) async fn verdict(
        &self,
        slot: &Slot,
        parsed: &mut Parsed,
        chain: &mut ChainBuf,
    ) -> bool {
        let verdict = poll_fn(|_| slot.verdict.take().map_or(Poll::Pending, Poll::Ready)).await;
        if matches!(verdict, Verdict::Lead) {
            slot.own_end.set(parsed.grow(chain, &self.gather.pieces()));
        }
        matches!(verdict, Verdict::Done)
    }

    /// Lets the leader begin with what there is. Not from inside its task.
    #[cold]
    pub(super) fn close_gather(&self) {
        if let Some((leader, verdict)) = self.gather.close() {
            kill_point!("gathered");
            self.tell(leader, verdict);
        }
    }

    /// Lets the members go when the leader's transfer has ended. If it failed they make their own, and so is the leader to
    /// do, for each to have the status that is its own.
    #[cold]
    pub(super) fn part(&self, slot: &Slot, parsed: &mut Parsed, chain: &mut ChainBuf, made: bool) {
        let mut next = slot.next_member.replace(NOBODY);
        if next == NOBODY {
            return;
        }
        kill_point!("gather-ended");
        parsed.shrink(chain, slot.own_end.get());
        let verdict = if made { Verdict::Done } else { Verdict::Alone };
        while next != NOBODY {
            let member = next;
            let after = self.with_slot(member, |slot| slot.next_member.replace(NOBODY));
            next = after.unwrap_or(NOBODY);
            self.tell(member, verdict);
        }
    }

    /// Lets a request that waits go on. One whose task is in the midst of a poll finds the verdict itself.
    fn tell(&self, head: u16, verdict: Verdict) {
        let task = self.with_slot(head, |slot| {
            slot.verdict.set(Some(verdict));
            slot.task.get()
        });
        if let Some(task) = task.flatten() {
            self.io.poll_now(task);
        }
    }

    fn with_slot<T>(&self, head: u16, then: impl FnOnce(&Slot) -> T) -> Option<T> {
        let slots = self.slots.borrow();
        slots.get(usize::from(head))?.as_deref().map(then)
    }
}
