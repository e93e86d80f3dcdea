//! One operation under way: its place in the reactor's table, and the future of its result.

use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use io_uring::types::Timespec;
use libc::iovec;

use super::executor::TaskId;
use super::ring::Io;

/// What became of an operation.
#[derive(Clone, Copy, Debug)]
enum State {
    Free { next: u32 },
    Pending { waiter: TaskId, by: By },
    Done { result: i32 },
}

/// Who completes an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The kernel.
    Kernel,
    /// A task of this reactor, which works at it.
    Task,
    /// A task of this reactor, which has not begun yet: nothing would notice if it were forgotten.
    TaskLater,
}

#[derive(Debug)]
struct Entry {
    state: State,
    timeout: Box<Timespec>,
}

/// The operations of one ring, by the index that travels as `user_data`.
#[derive(Debug)]
pub(super) struct OpTable {
    entries: Vec<Entry>,
    free: u32,
    pending: u32,
}

const NONE: u32 = u32::MAX;

impl OpTable {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        let mut table = Self {
            entries: Vec::with_capacity(capacity),
            free: NONE,
            pending: 0,
        };
        for _ in 0..capacity {
            table.grow();
        }
        table
    }

    fn grow(&mut self) {
        self.entries.push(Entry {
            state: State::Free { next: self.free },
            timeout: Box::new(Timespec::new()),
        });
        self.free = (self.entries.len() - 1) as u32;
    }

    pub(super) fn begin(&mut self, waiter: TaskId) -> u32 {
        self.pending += 1;
        self.take(waiter, By::Kernel)
    }

    /// An operation of which the kernel knows nothing.
    pub(super) fn begin_software(&mut self, waiter: TaskId) -> u32 {
        self.take(waiter, By::Task)
    }

    #[inline]
    fn take(&mut self, waiter: TaskId, by: By) -> u32 {
        if self.free == NONE {
            self.grow();
        }
        let index = self.free;
        let entry = &mut self.entries[index as usize];
        if let State::Free { next } = entry.state {
            self.free = next;
        }
        entry.state = State::Pending { waiter, by };
        index
    }

    /// Says whether anybody works at a software operation.
    pub(super) fn set_under_way(&mut self, index: u32, under_way: bool) {
        if let State::Pending { by, .. } = &mut self.entries[index as usize].state {
            *by = if under_way { By::Task } else { By::TaskLater };
        }
    }

    /// Who waits for an operation that has not ended.
    pub(super) fn waiter(&self, index: u32) -> Option<TaskId> {
        match self.entries[index as usize].state {
            State::Pending { waiter, .. } => Some(waiter),
            _ => None,
        }
    }

    /// Where a timeout's duration lives for as long as the kernel may read it.
    pub(super) fn timeout(&mut self, index: u32, value: Timespec) -> *const Timespec {
        let slot = &mut self.entries[index as usize].timeout;
        **slot = value;
        &raw const **slot
    }

    /// Notes a completion; returns the task to wake.
    pub(super) fn complete(&mut self, index: u32, result: i32) -> Option<TaskId> {
        let entry = self.entries.get_mut(index as usize)?;
        let State::Pending { waiter, by } = entry.state else {
            return None;
        };
        entry.state = State::Done { result };
        if by == By::Kernel {
            self.pending -= 1;
        }
        Some(waiter)
    }

    pub(super) fn poll(&mut self, index: u32, task: TaskId) -> Poll<i32> {
        match &mut self.entries[index as usize].state {
            State::Pending { waiter, .. } => {
                *waiter = task;
                Poll::Pending
            }
            State::Done { result } => Poll::Ready(*result),
            State::Free { .. } => Poll::Ready(-libc::ECANCELED),
        }
    }

    pub(super) fn is_done(&self, index: u32) -> bool {
        matches!(self.entries[index as usize].state, State::Done { .. })
    }

    /// The operations of the kernel that a task waits for.
    pub(super) fn of(&self, task: TaskId) -> impl Iterator<Item = u32> + '_ {
        let is_its = move |entry: &Entry| matches!(entry.state, State::Pending { waiter, by: By::Kernel } if waiter == task);
        (0..)
            .zip(&self.entries)
            .filter(move |(_, entry)| is_its(entry))
            .map(|(index, _)| index)
    }

    /// True if anything is under way that a task waits for.
    pub(super) fn has_any(&self, task: TaskId) -> bool {
        self.entries.iter().any(|entry| match entry.state {
            State::Pending { waiter, by } => waiter == task && by != By::TaskLater,
            _ => false,
        })
    }

    pub(super) fn release(&mut self, index: u32) {
        self.entries[index as usize].state = State::Free { next: self.free };
        self.free = index;
    }

    /// Operations that the kernel has.
    pub(super) fn pending(&self) -> u32 {
        self.pending
    }
}

/// The future of an operation that is already queued. Its output is the kernel's result: a count, or
/// the error. Dropped before its end, it waits for it: the kernel may still be writing to the memory.
#[derive(Debug)]
#[must_use = "an operation that nobody awaits is waited for when it is dropped"]
pub struct Op<'a> {
    io: &'a Io,
    stage: Stage,
    /// The iovecs that the kernel reads, where the caller's own could not be used.
    iovecs: Option<Vec<iovec>>,
    memory: PhantomData<&'a ()>,
}

/// How far an [`Op`] is.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The kernel has it, or will; this entry of the table is ours.
    Queued(u32),
    /// It was made when it was begun, with this result.
    Ended(i32),
    /// Its result was taken.
    Over,
}

impl<'a> Op<'a> {
    pub(super) fn queued(io: &'a Io, index: u32, iovecs: Option<Vec<iovec>>) -> Self {
        Self {
            io,
            stage: Stage::Queued(index),
            iovecs,
            memory: PhantomData,
        }
    }

    #[inline]
    pub(super) fn ended(io: &'a Io, result: i32) -> Self {
        Self {
            io,
            stage: Stage::Ended(result),
            iovecs: None,
            memory: PhantomData,
        }
    }

    /// True if it was left to the kernel and its result not taken.
    #[cfg(test)]
    pub(super) fn is_queued(&self) -> bool {
        matches!(self.stage, Stage::Queued(_))
    }

    fn finish(&mut self, index: u32) {
        self.stage = Stage::Over;
        self.io.ops().release(index);
        if let Some(iovecs) = self.iovecs.take() {
            self.io.give_iovecs(iovecs);
        }
    }
}

impl Future for Op<'_> {
    type Output = io::Result<u32>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let result = match self.stage {
            Stage::Queued(index) => {
                let polled = self.io.ops().poll(index, self.io.current_task());
                let Poll::Ready(result) = polled else {
                    return Poll::Pending;
                };
                self.finish(index);
                result
            }
            Stage::Ended(result) => {
                self.stage = Stage::Over;
                result
            }
            Stage::Over => -libc::ECANCELED,
        };
        Poll::Ready(if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok(result as u32)
        })
    }
}

impl Drop for Op<'_> {
    fn drop(&mut self) {
        if let Stage::Queued(index) = self.stage {
            self.io.wait_for(index);
            self.finish(index);
        }
    }
}
