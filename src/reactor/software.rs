//! Operations of which the kernel knows nothing: one task waits for them and another completes them.

use std::task::Poll;

use super::ring::Io;

/// A software operation. Whoever began it releases it, when it was completed or nobody will complete it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SoftwareOp(u32);

impl Io {
    /// Begins an operation for the current task. As long as it is [under way](Io::set_under_way), which it is at
    /// first, the task is not [quiet](Io::is_quiet).
    #[inline]
    pub(crate) fn begin_software(&self) -> SoftwareOp {
        let task = self.current_task();
        SoftwareOp(self.ops().begin_software(task))
    }

    /// Says whether dropping the operation now would have to wait for something.
    #[inline]
    pub(crate) fn set_under_way(&self, op: SoftwareOp, under_way: bool) {
        self.ops().set_under_way(op.0, under_way);
    }

    /// Ends an operation and wakes who waits for it.
    #[inline]
    pub(crate) fn complete(&self, op: SoftwareOp) {
        let waiter = self.ops().complete(op.0, 0);
        if let Some(task) = waiter {
            self.wake(task);
        }
    }

    /// Ready once the operation was completed; else the current task is the one to wake.
    #[inline]
    pub(crate) fn poll_software(&self, op: SoftwareOp) -> Poll<()> {
        let task = self.current_task();
        self.ops().poll(op.0, task).map(|_| ())
    }

    /// Gives an operation back.
    #[inline]
    pub(crate) fn release_software(&self, op: SoftwareOp) {
        self.ops().release(op.0);
    }

    /// True if the task that waits for the operation [makes no more progress](Io::hold).
    #[cold]
    pub(crate) fn waiter_is_held(&self, op: SoftwareOp) -> bool {
        let waiter = self.ops().waiter(op.0);
        waiter.is_some_and(|task| self.is_held(task))
    }
}
