//! The reactor of one thread: its io_uring and the turn of its loop.

use std::any::Any;
use std::cell::{Cell, RefCell, RefMut};
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use libc::iovec;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::buf::{AlignedBuf, BufPool};
use super::epoch::{Epochs, Participant, Pin};
use super::executor::{Executor, ROOT, Remote, TaskId};
use super::file::{IoFile, Registered, SLOTS};
use super::op::OpTable;
use super::operations::Name;

/// `user_data` of the read that waits for the doorbell.
const DOORBELL: u64 = u64::MAX;
/// `user_data` of a cancellation; its own result says nothing that the cancelled operation's does not.
const CANCEL: u64 = u64::MAX - 1;
/// IORING_ENTER_GETEVENTS.
const GETEVENTS: u32 = 1;
/// So many operations at least are submitted together. The kernel shows a disk a whole batch at once, and takes
/// some microseconds an operation to get there: a disk that has run dry stands still meanwhile. Of two or fewer it
/// tells the disk one by one, and each time is an exit of a virtual machine.
const SMALLEST_GROUP: u32 = 4;
/// So many at most. Between the two it is half of what the kernel has in hand: see [`group`].
const LARGEST_GROUP: u32 = 16;
/// So many completions are taken in a turn, for the same reason: what follows from them goes out before the next.
const COMPLETIONS: usize = LARGEST_GROUP as usize;

/// How to make a reactor.
#[derive(Clone, Debug)]
pub struct IoConfig {
    /// Number of the thread among those that share images: 0 is the control thread's.
    pub worker: usize,
    /// Submission queue entries; the completion queue has four times as many.
    pub entries: u32,
    /// The domain of threads that share data structures.
    pub epochs: Arc<Epochs>,
}

/// A thread's handle to its reactor; a clone is another handle to the same one.
#[derive(Clone, Debug)]
pub struct Io {
    pub(super) inner: Rc<Inner>,
    /// None: of a task that the reactor's end shall end, too.
    _owner: Option<Rc<Owner>>,
}

/// Shared by the handles that keep a reactor in use.
#[derive(Debug)]
struct Owner(Rc<Inner>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[derive(Debug)]
pub(super) struct Inner {
    worker: usize,
    ring: RefCell<Ring>,
    ops: RefCell<OpTable>,
    exec: Executor,
    participant: Rc<Participant>,
    remote: Arc<Remote>,
    buffers: Rc<BufPool>,
    pub(super) iovecs: RefCell<Vec<Vec<iovec>>>,
    files: RefCell<Option<Registered>>,
    /// What storages keep for this thread, by [`super::LocalSlot`].
    pub(super) locals: RefCell<Vec<Option<Rc<dyn Any>>>>,
    epochs: Arc<Epochs>,
    /// Counted by `enter`: calls into the kernel.
    enters: Cell<u64>,
    /// See [`Io::inline_work`].
    pub(super) inline_work: Cell<usize>,
}

struct Ring {
    uring: IoUring,
    queued: u32,
    /// What the kernel writes when the doorbell rings.
    doorbell: Box<u64>,
    doorbell_armed: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("queued", &self.queued)
            .finish()
    }
}

/// Rings another thread's reactor, from any thread.
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<Remote>);

impl Doorbell {
    /// Makes the reactor's thread take a turn, now if it sleeps.
    pub fn ring(&self) {
        self.0.ring();
    }
}

impl Io {
    /// Makes the calling thread's reactor. Fails where the kernel refuses io_uring.
    pub fn new(config: &IoConfig) -> io::Result<Self> {
        let uring = build(config.entries)?;
        let files = uring
            .submitter()
            .register_files_sparse(SLOTS as u32)
            .is_ok()
            .then(Registered::new);
        let remote = Remote::new(EventFd::new(EFD_CLOEXEC)?);
        let inner = Rc::new(Inner {
            worker: config.worker,
            ring: RefCell::new(Ring {
                uring,
                queued: 0,
                doorbell: Box::new(0),
                doorbell_armed: false,
            }),
            ops: RefCell::new(OpTable::with_capacity(config.entries as usize)),
            exec: Executor::new(remote.clone()),
            participant: Participant::new(config.epochs.clone()),
            remote,
            buffers: Rc::new(BufPool::default()),
            iovecs: RefCell::new(Vec::with_capacity(64)),
            files: RefCell::new(files),
            locals: RefCell::new(Vec::new()),
            epochs: config.epochs.clone(),
            enters: Cell::new(0),
            inline_work: Cell::new(0),
        });
        inner.arm_doorbell();
        let _owner = Some(Rc::new(Owner(inner.clone())));
        Ok(Self { inner, _owner })
    }

    /// A handle for a task that serves others: it keeps the reactor from being freed, but not from being closed
    /// when the last of the others is dropped.
    pub(crate) fn for_service(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            _owner: None,
        }
    }

    /// The number given by [`IoConfig::worker`].
    pub fn worker(&self) -> usize {
        self.inner.worker
    }

    /// The epoch domain of this reactor.
    pub fn epochs(&self) -> &Arc<Epochs> {
        &self.inner.epochs
    }

    /// Marks a request as begun in the current epoch.
    #[inline]
    pub fn pin(&self) -> Pin {
        self.inner.participant.pin()
    }

    /// A handle by which other threads make this one take a turn.
    pub fn doorbell(&self) -> Doorbell {
        Doorbell(self.inner.remote.clone())
    }

    /// How often the thread has entered the kernel through this ring.
    pub fn enters(&self) -> u64 {
        self.inner.enters.get()
    }

    /// An aligned buffer of `len` bytes with arbitrary contents.
    pub fn buf(&self, len: usize) -> AlignedBuf {
        self.inner.buffers.get(len)
    }

    // ---- tasks ----

    /// Makes a task; it is first polled in the next turn.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) -> TaskId {
        self.inner.exec.spawn(Box::pin(future))
    }

    /// Marks a task of this reactor as ready.
    #[inline]
    pub fn wake(&self, task: TaskId) {
        self.inner.exec.enqueue(task);
    }

    /// Polls a task of this reactor at once. Not from inside that task.
    #[inline]
    pub fn poll_now(&self, task: TaskId) {
        self.inner.exec.poll(task);
    }

    /// Drops a task, after its operations have ended. Not from inside that task.
    pub fn remove(&self, task: TaskId) {
        self.inner.exec.remove(task);
    }

    /// Drops all tasks, after their operations have ended, and what storages keep for this thread. Tasks hold
    /// handles to the reactor, so a reactor with tasks is not freed before this, or before the last handle of
    /// another kind than those of [service tasks](Io::for_service) is dropped.
    pub fn close(&self) {
        self.inner.close();
    }

    pub(super) fn current_task(&self) -> TaskId {
        self.inner.exec.current()
    }

    // ---- the loop ----

    /// One turn: submit what is queued, take completions and wakes, run the tasks that became ready.
    /// Returns true if anything was done.
    #[inline]
    pub fn turn(&self) -> bool {
        let inner = &*self.inner;
        inner.participant.quiesce();
        inner.inline_work.set(0);
        let woken = inner.remote.pending.load(Ordering::Relaxed)
            && inner.remote.pending.swap(false, Ordering::SeqCst);
        if woken {
            inner.exec.accept_wakes();
        }
        let entered = inner.submit();
        let reaped = inner.reap();
        let ran = inner.exec.run_ready();
        woken | entered | (reaped + ran > 0)
    }

    /// Sleeps in the kernel until an operation ends, a wake or the doorbell comes, or `timeout` is over.
    /// Submits what is queued on the way. Returns at once if there is something to do.
    pub fn park(&self, timeout: Option<Duration>) {
        let inner = &*self.inner;
        if inner
            .files
            .borrow()
            .as_ref()
            .is_some_and(Registered::anything_closed)
        {
            inner.let_go_of_closed_files();
        }
        if inner.exec.has_ready() {
            return;
        }
        inner.participant.park();
        inner.remote.sleeping.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst); // pairs with the fence in `Remote::ring`
        if !inner.remote.pending.load(Ordering::SeqCst) {
            inner.enter(1, GETEVENTS, timeout);
        }
        inner.remote.sleeping.store(false, Ordering::SeqCst);
        inner.participant.quiesce();
    }

    /// Runs `future` on this reactor until it ends, sleeping when there is nothing to do. Not from
    /// inside a task.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let waker = self.inner.exec.waker(ROOT);
        let mut cx = Context::from_waker(&waker);
        self.inner.participant.quiesce();
        self.inner.exec.enqueue(ROOT);
        loop {
            if self.inner.exec.take_root_ready() {
                if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                    // What it queued and did not await is still submitted.
                    self.inner.submit();
                    self.inner.participant.park();
                    return output;
                }
            }
            if !self.turn() {
                self.park(None);
            }
        }
    }

    /// Lets a task make no more progress, and asks the kernel to give its operations up; those that a device
    /// has already go on. The task is to be removed when it [`is_quiet`](Io::is_quiet): earlier, the removal
    /// would wait, and all other tasks with it.
    #[cold]
    pub fn hold(&self, task: TaskId) {
        self.inner.exec.hold(task);
        let under_way: Vec<u32> = self.ops().of(task).collect();
        for index in under_way {
            let cancel = opcode::AsyncCancel::new(index.into()).build();
            self.inner.push(&cancel.user_data(CANCEL));
        }
    }

    /// True if no operation of this task is under way.
    #[cold]
    pub fn is_quiet(&self, task: TaskId) -> bool {
        !self.ops().has_any(task)
    }

    /// True if the task makes no more progress.
    #[cold]
    pub(super) fn is_held(&self, task: TaskId) -> bool {
        self.inner.exec.is_held(task)
    }

    /// Takes completions and polls `tasks`, and no others, until `done`, or for `patience`. Not from inside one of
    /// them. Returns whether it is done.
    #[cold]
    pub(crate) fn drive(
        &self,
        tasks: &[TaskId],
        done: impl Fn() -> bool,
        patience: Duration,
    ) -> bool {
        let end = Instant::now() + patience;
        loop {
            tasks.iter().for_each(|task| self.poll_now(*task));
            if done() {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.inner.enter(1, GETEVENTS, Some(left));
            self.inner.reap();
        }
    }

    /// Ends one operation without running tasks: it was dropped before its end. A poll or a timeout is
    /// cancelled; a transfer that the device already has is waited for.
    #[cold]
    pub(super) fn wait_for(&self, index: u32) {
        let cancel = opcode::AsyncCancel::new(index.into()).build();
        self.inner.push(&cancel.user_data(CANCEL));
        while !self.ops().is_done(index) {
            self.inner.enter(1, GETEVENTS, None);
            self.inner.reap();
        }
    }

    #[inline]
    pub(super) fn ops(&self) -> RefMut<'_, OpTable> {
        self.inner.ops.borrow_mut()
    }
}

impl Inner {
    fn close(&self) {
        self.exec.remove_all();
        // Not within the borrow: what goes with them may look here.
        let locals = std::mem::take(&mut *self.locals.borrow_mut());
        drop(locals);
    }

    pub(super) fn name(&self, file: &IoFile) -> Name {
        let mut files = self.files.borrow_mut();
        let (Some(files), Some((slot, identity))) = (files.as_mut(), file.slot()) else {
            return Name::Descriptor(Fd(file.as_raw_fd()));
        };
        if !files.holds(slot, identity) {
            let update = [file.as_raw_fd()];
            let ring = self.ring.borrow();
            if ring
                .uring
                .submitter()
                .register_files_update(slot, &update)
                .is_err()
            {
                return Name::Descriptor(Fd(file.as_raw_fd()));
            }
            files.set(slot, identity);
        }
        Name::Registered(Fixed(slot))
    }

    #[cold]
    fn let_go_of_closed_files(&self) {
        if let Some(files) = self.files.borrow_mut().as_mut() {
            let ring = self.ring.borrow();
            for slot in files.stale() {
                // The slot stays held if this fails, until it is used again: nothing depends on it.
                let _ = ring.uring.submitter().register_files_update(slot, &[-1]);
            }
        }
    }

    #[inline]
    pub(super) fn push(&self, entry: &squeue::Entry) {
        loop {
            let mut ring = self.ring.borrow_mut();
            // SAFETY: everything the entry points to lives until its completion: buffers and iovecs by
            // the lifetimes and the drop of `Op`, timeouts in the operation table.
            if unsafe { ring.uring.submission().push(entry) }.is_ok() {
                ring.queued += 1;
                if ring.queued >= SMALLEST_GROUP
                    && ring.queued >= group(self.ops.borrow().pending().saturating_sub(ring.queued))
                {
                    drop(ring);
                    self.enter(0, 0, None);
                }
                return;
            }
            drop(ring);
            self.enter(0, GETEVENTS, None); // the queue is full: make room
        }
    }

    fn arm_doorbell(&self) {
        let mut ring = self.ring.borrow_mut();
        if std::mem::replace(&mut ring.doorbell_armed, true) {
            return;
        }
        let to: *mut u64 = &raw mut *ring.doorbell;
        drop(ring);
        let fd = Fd(self.remote.doorbell.as_raw_fd());
        self.push(
            &opcode::Read::new(fd, to.cast(), 8)
                .build()
                .user_data(DOORBELL),
        );
    }

    /// Enters the kernel if something is queued, or if it has completions to post.
    #[inline]
    fn submit(&self) -> bool {
        let due = {
            let mut ring = self.ring.borrow_mut();
            if ring.queued > 0 {
                true
            } else {
                let submission = ring.uring.submission();
                submission.taskrun() || submission.cq_overflow()
            }
        };
        if due {
            self.enter(0, GETEVENTS, None);
        }
        due
    }

    /// Submits what is queued, and waits for `want` completions. Without `GETEVENTS` the kernel posts none.
    fn enter(&self, want: u32, flags: u32, timeout: Option<Duration>) {
        self.enters.set(self.enters.get() + 1);
        let mut ring = self.ring.borrow_mut();
        let timespec = timeout.map(Timespec::from);
        let queued = ring.queued;
        let submitter = ring.uring.submitter();
        let result = match (&timespec, want) {
            (Some(timespec), 1..) => {
                let args = SubmitArgs::new().timespec(timespec);
                submitter.submit_with_args(want as usize, &args)
            }
            // SAFETY: no argument is passed.
            _ => unsafe { submitter.enter::<libc::sigset_t>(queued, want, flags, None) },
        };
        if let Err(error) = &result {
            match error.raw_os_error() {
                // Interrupted, timed out, or the completion queue is full: the caller's loop goes on.
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => {}
                _ => log::error!("io_uring_enter: {error}"),
            }
        }
        let left = ring.uring.submission().len() as u32;
        ring.queued = left;
    }

    #[inline]
    fn reap(&self) -> usize {
        let mut ring = self.ring.borrow_mut();
        let mut ops = self.ops.borrow_mut();
        let mut count = 0;
        let mut rung = false;
        for cqe in ring.uring.completion().take(COMPLETIONS) {
            count += 1;
            match cqe.user_data() {
                DOORBELL => rung = true,
                CANCEL => {}
                index => {
                    if let Some(task) = ops.complete(index as u32, cqe.result()) {
                        self.exec.enqueue(task);
                    }
                }
            }
        }
        if rung {
            ring.doorbell_armed = false;
            drop((ring, ops));
            self.arm_doorbell();
        }
        count
    }
}

/// How many operations make a group while the kernel has `in_hand`. A disk that still has twice as many to do can
/// wait for a larger one, which costs fewer system calls; one that runs dry cannot.
#[inline]
fn group(in_hand: u32) -> u32 {
    (in_hand / 2).clamp(SMALLEST_GROUP, LARGEST_GROUP)
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The kernel must be done with the doorbell's memory, and with anything else, before it goes.
        if self.remote.doorbell.write(1).is_err() {
            return;
        }
        self.submit();
        while self.ring.borrow().doorbell_armed || self.ops.borrow().pending() > 0 {
            self.enter(1, GETEVENTS, None);
            let mut ring = self.ring.borrow_mut();
            let mut ops = self.ops.borrow_mut();
            let mut rung = false;
            for cqe in ring.uring.completion() {
                match cqe.user_data() {
                    DOORBELL => rung = true,
                    CANCEL => {}
                    index => {
                        ops.complete(index as u32, cqe.result());
                    }
                }
            }
            ring.doorbell_armed &= !rung;
        }
    }
}

/// Makes the ring with the best flags the kernel has: with DEFER_TASKRUN completions are processed when
/// we ask, not by interrupting us; the TASKRUN flag tells a polling loop that there is something to ask
/// for.
fn build(entries: u32) -> io::Result<IoUring> {
    let deferred = IoUring::builder()
        .setup_clamp()
        .setup_cqsize(entries * 4)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match deferred {
        // Before Linux 6.1.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .setup_clamp()
            .setup_cqsize(entries * 4)
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries),
        other => other,
    }
    .map_err(|error| {
        io::Error::new(
            error.kind(),
            format!(
                "io_uring_setup: {error}; io_uring must be allowed (sysctl kernel.io_uring_disabled=0, \
                 a container's seccomp filter) and the kernel be 5.19 or newer"
            ),
        )
    })
}
