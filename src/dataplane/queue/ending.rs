//! How a ring comes to its end.

use std::sync::mpsc::SyncSender;

use super::Queue;
use crate::kill_point::kill_point;

impl Queue {
    /// Begins to stop: nothing more is fetched. The answer goes out when all has ended.
    pub(in crate::dataplane) fn stop(&self, reply: SyncSender<Option<u32>>) {
        self.stopping.replace(Some(reply));
    }

    /// Begins to stop at once: nothing more is fetched, and what is under way is given up. It is neither completed
    /// nor taken out of the inflight region, so whoever serves the ring next does it again. The answer goes out when
    /// the kernel has let go of the guest's memory.
    ///
    /// A request that is dropped half-way leaves the image as a failed one does: claims, records and new clusters
    /// are guards.
    pub(in crate::dataplane) fn suspend(&self, reply: SyncSender<Option<u32>>) {
        self.stopping.replace(Some(reply));
        self.suspended.set(true);
        for slot in self.slots.borrow().iter().flatten() {
            if let Some(task) = slot.task.get().filter(|_| slot.busy.get()) {
                self.io.hold(task);
            }
        }
        kill_point!("suspended");
    }

    /// True if nothing that was given up is under way any more.
    #[cold]
    fn is_quiet(&self) -> bool {
        let slots = self.slots.borrow();
        let mut busy = slots.iter().flatten().filter(|slot| slot.busy.get());
        busy.all(|slot| slot.task.get().is_none_or(|task| self.io.is_quiet(task)))
    }

    /// How many requests are under way.
    #[inline]
    pub(in crate::dataplane) fn requests(&self) -> u32 {
        self.in_flight.get()
    }

    /// True while threads of the kernel have work of ours.
    #[inline]
    pub(in crate::dataplane) fn waits_for_threads(&self) -> bool {
        self.by_threads && self.requests() > 0
    }

    /// True once a stop was asked for and nothing is under way.
    pub(in crate::dataplane) fn is_stopped(&self) -> bool {
        let done = || self.in_flight.get() == 0 && !self.finishes_backlog();
        self.stopping.borrow().is_some() && (done() || (self.suspended.get() && self.is_quiet()))
    }

    /// Lets everything go and answers the stop. The last thing that happens to a queue.
    pub(in crate::dataplane) fn end(&self) {
        self.publish();
        // A successor must be notified, whatever we asked for last.
        if !self.broken.get() {
            self.ring.borrow_mut().enable_notification();
            self.mark_notification();
        }
        if let Some(task) = self.kick.take() {
            self.io.remove(task);
        }
        for slot in self.slots.take().into_iter().flatten() {
            if let Some(task) = slot.task.take() {
                self.io.remove(task);
            }
        }
    }

    /// What the stop is answered with, and to whom.
    pub(in crate::dataplane) fn take_stop(&self) -> Option<(SyncSender<Option<u32>>, u32)> {
        let reply = self.stopping.take()?;
        Some((reply, self.ring.borrow().base()))
    }
}
