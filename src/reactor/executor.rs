//! Tasks of one thread, and waking them from others.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};

use vmm_sys_util::eventfd::EventFd;

/// A task of one reactor. Numbers are used again after a task's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskId(pub(super) u32);

/// The future that [`super::Io::block_on`] runs.
pub(super) const ROOT: TaskId = TaskId(u32::MAX);

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    future: Option<BoxedTask>,
    waker: Waker,
    queued: bool,
    alive: bool,
    /// Makes no more progress until it is removed.
    held: bool,
}

/// The part of a reactor that other threads may touch.
#[derive(Debug)]
pub(super) struct Remote {
    woken: Mutex<Vec<TaskId>>,
    /// Something is in `woken`, or the doorbell was rung.
    pub(super) pending: AtomicBool,
    /// The thread sleeps in the kernel, or is about to.
    pub(super) sleeping: AtomicBool,
    pub(super) doorbell: EventFd,
}

impl Remote {
    pub(super) fn new(doorbell: EventFd) -> Arc<Self> {
        Arc::new(Self {
            woken: Mutex::new(Vec::with_capacity(64)),
            pending: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            doorbell,
        })
    }

    /// Makes the thread take another turn, now if it sleeps.
    pub(super) fn ring(&self) {
        self.pending.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst); // pairs with the fence in `Io::park`
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // An eventfd's counter can not overflow by one ring a sleep; nothing else fails here.
            let _ = self.doorbell.write(1);
        }
    }

    fn wake(&self, task: TaskId) {
        self.woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(task);
        self.ring();
    }

    fn take_woken(&self, into: &mut VecDeque<TaskId>) {
        into.extend(
            self.woken
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .drain(..),
        );
    }
}

struct TaskWaker {
    remote: Arc<Remote>,
    task: TaskId,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.remote.wake(self.task);
    }
}

/// The tasks and who is to run next.
pub(super) struct Executor {
    tasks: RefCell<Vec<Task>>,
    free: RefCell<Vec<u32>>,
    ready: RefCell<VecDeque<TaskId>>,
    current: Cell<TaskId>,
    root_ready: Cell<bool>,
    remote: Arc<Remote>,
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor")
            .field("tasks", &self.tasks.borrow().len())
            .finish_non_exhaustive()
    }
}

impl Executor {
    pub(super) fn new(remote: Arc<Remote>) -> Self {
        Self {
            tasks: RefCell::new(Vec::new()),
            free: RefCell::new(Vec::new()),
            ready: RefCell::new(VecDeque::with_capacity(1024)),
            current: Cell::new(ROOT),
            root_ready: Cell::new(false),
            remote,
        }
    }

    pub(super) fn waker(&self, task: TaskId) -> Waker {
        Waker::from(Arc::new(TaskWaker {
            remote: self.remote.clone(),
            task,
        }))
    }

    pub(super) fn spawn(&self, future: BoxedTask) -> TaskId {
        let mut tasks = self.tasks.borrow_mut();
        let task = match self.free.borrow_mut().pop() {
            Some(index) => TaskId(index),
            None => {
                let task = TaskId(tasks.len() as u32);
                tasks.push(Task {
                    future: None,
                    waker: self.waker(task),
                    queued: false,
                    alive: false,
                    held: false,
                });
                task
            }
        };
        let entry = &mut tasks[task.0 as usize];
        entry.future = Some(future);
        entry.alive = true;
        entry.held = false;
        drop(tasks);
        self.enqueue(task);
        task
    }

    /// Drops a task that is not running; the drop may wait for its operations.
    pub(super) fn remove(&self, task: TaskId) {
        let future = match self.tasks.borrow_mut().get_mut(task.0 as usize) {
            Some(entry) if entry.alive => {
                entry.alive = false;
                entry.future.take()
            }
            _ => return,
        };
        drop(future);
        self.free.borrow_mut().push(task.0);
    }

    /// Lets a task make no more progress; it is to be removed.
    pub(super) fn hold(&self, task: TaskId) {
        if let Some(entry) = self.tasks.borrow_mut().get_mut(task.0 as usize) {
            entry.held = true;
        }
    }

    /// True if the task makes no more progress.
    pub(super) fn is_held(&self, task: TaskId) -> bool {
        let tasks = self.tasks.borrow();
        tasks.get(task.0 as usize).is_some_and(|entry| entry.held)
    }

    pub(super) fn remove_all(&self) {
        // The end of a task may be the beginning of another.
        while self.tasks.borrow().iter().any(|task| task.alive) {
            let count = self.tasks.borrow().len() as u32;
            (0..count).for_each(|index| self.remove(TaskId(index)));
        }
    }

    #[inline]
    pub(super) fn enqueue(&self, task: TaskId) {
        if task == ROOT {
            self.root_ready.set(true);
            return;
        }
        if let Some(entry) = self.tasks.borrow_mut().get_mut(task.0 as usize) {
            if entry.alive && !entry.queued && !entry.held {
                entry.queued = true;
                self.ready.borrow_mut().push_back(task);
            }
        }
    }

    pub(super) fn take_root_ready(&self) -> bool {
        self.root_ready.replace(false)
    }

    pub(super) fn has_ready(&self) -> bool {
        self.root_ready.get() || !self.ready.borrow().is_empty()
    }

    #[inline]
    pub(super) fn current(&self) -> TaskId {
        self.current.get()
    }

    /// Takes what other threads woke.
    #[cold]
    pub(super) fn accept_wakes(&self) {
        let mut woken = VecDeque::new();
        self.remote.take_woken(&mut woken);
        woken.into_iter().for_each(|task| self.enqueue(task));
    }

    /// Polls every task that is ready now; what becomes ready meanwhile waits for the next call.
    pub(super) fn run_ready(&self) -> usize {
        let count = self.ready.borrow().len();
        for _ in 0..count {
            let next = self.ready.borrow_mut().pop_front();
            if let Some(task) = next {
                self.poll(task);
            }
        }
        count
    }

    /// Polls one task at once.
    #[inline]
    pub(super) fn poll(&self, task: TaskId) {
        let mut tasks = self.tasks.borrow_mut();
        let Some(entry) = tasks.get_mut(task.0 as usize) else {
            return;
        };
        entry.queued = false;
        if entry.held {
            return;
        }
        let Some(mut future) = entry.future.take() else {
            return;
        };
        // The waker's count is not touched: a bitwise copy, never dropped, of a waker that outlives the
        // poll, since entries are never removed from the table.
        // SAFETY: `ManuallyDrop` keeps the copy from giving back a reference it does not own.
        let waker = std::mem::ManuallyDrop::new(unsafe { std::ptr::read(&raw const entry.waker) });
        drop(tasks);
        let before = self.current.replace(task);
        let done = future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        self.current.set(before);
        let mut tasks = self.tasks.borrow_mut();
        let entry = &mut tasks[task.0 as usize];
        if done || !entry.alive {
            let ended = entry.alive;
            entry.alive = false;
            drop(tasks);
            drop(future);
            if ended {
                self.free.borrow_mut().push(task.0);
            }
        } else {
            entry.future = Some(future);
        }
    }
}
