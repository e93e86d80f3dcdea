//! A namespace as one thread uses it: its membership, its queues, and its sense of time.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use super::link::{
    Access, IoConnection, Member, MemberEvent, Namespace, NamespaceState, PathCommand, PathState,
    SharedPath,
};
use super::queue::connection::Why;
use super::queue::table::Table;
use super::queue::{Kind, Queue};
use super::spec::IoPolicy;
use super::storage::DiscardLimits;
use crate::block::error::{Error, ErrorKind};
use crate::reactor::{Io, LocalSlot, TaskId};

/// What the threads' parts of a storage have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) namespace: Arc<Namespace>,
    slot: LocalSlot,
    closed: AtomicBool,
}

impl Shared {
    pub(super) fn new(namespace: Arc<Namespace>) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            slot: LocalSlot::new(),
            closed: AtomicBool::new(false),
        })
    }

    /// Ends all threads' parts, each when its reactor takes a turn.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.namespace.tell_all();
        self.namespace.close();
    }

    /// This thread's part.
    #[inline]
    pub(super) fn local(self: &Arc<Self>, io: &Io) -> Rc<Local> {
        match io.local(&self.slot) {
            Some(local) => local,
            None => Local::join(self, io),
        }
    }
}

/// What a thread has of one path.
#[derive(Debug, Default)]
struct Path {
    queue: Option<Rc<Queue>>,
    /// It failed alone, and is not connected again yet: until then the controller may still work at its commands.
    fence: Option<Rc<Queue>>,
    /// A status said that the path is not what it seems: it is let alone until its thread has looked, or for a
    /// tick.
    suspect: bool,
    /// Generation of the association that was heard of last.
    generation: u64,
    /// Why no queue is to be had.
    refused: Option<String>,
}

/// Which queue a command goes to.
pub(super) enum Choice {
    Queue(Rc<Queue>),
    /// All that could be used have as many commands as they take.
    Full,
    /// No path is usable now.
    NoPath,
}

/// One thread's part of a storage. Its tasks, and those of its queues, hold it; so does the reactor.
#[derive(Debug)]
pub(super) struct Local {
    io: Io,
    shared: Arc<Shared>,
    member: Arc<Member>,
    paths: RefCell<Vec<Path>>,
    pub(super) table: RefCell<Table>,
    policy: IoPolicy,
    /// Path that the next command takes, of those that are as good.
    turn: Cell<usize>,
    /// Length of a tick.
    pub(super) tick: Duration,
    /// Ticks that a command may take, and that one may be held.
    pub(super) patience: u32,
    pub(super) held_at_most: Option<u32>,
    /// Ticks so far, not counting idle times.
    pub(super) now: Cell<u32>,
    clock: Cell<Option<TaskId>>,
    clock_stands: Cell<bool>,
}

impl Drop for Local {
    fn drop(&mut self) {
        self.shared.namespace.leave(&self.member);
    }
}

impl Local {
    #[cold]
    fn join(shared: &Arc<Shared>, io: &Io) -> Rc<Self> {
        let namespace = &shared.namespace;
        let options = &namespace.spec().options;
        let tick = (options.io_timeout / 8).clamp(Duration::from_millis(5), Duration::from_secs(1));
        // Rounded up, and one more for the tick that has begun already.
        let ticks = |time: Duration| {
            let ticks = time.as_nanos().div_ceil(tick.as_nanos()) + 1;
            u32::try_from(ticks).unwrap_or(u32::MAX)
        };
        let paths = namespace.paths().iter().map(|_| Path::default());
        let local = Rc::new(Self {
            io: io.for_service(),
            shared: shared.clone(),
            // The control thread's memberships last as long as one operation (see `IoConfig::worker`).
            member: match io.worker() {
                0 => namespace.join_in_passing(),
                _ => namespace.join(),
            },
            paths: RefCell::new(paths.collect()),
            table: RefCell::new(Table::new()),
            policy: options.policy,
            turn: Cell::new(0),
            tick,
            patience: ticks(options.io_timeout),
            held_at_most: options.ctrl_loss.map(ticks),
            now: Cell::new(0),
            clock: Cell::new(None),
            clock_stands: Cell::new(false),
        });
        io.set_local(&shared.slot, local.clone());
        let _manager = io.spawn(manage(local.clone()));
        local.clock.set(Some(io.spawn(tell_time(local.clone()))));
        local
    }

    #[inline]
    pub(super) fn io(&self) -> &Io {
        &self.io
    }

    #[inline]
    pub(super) fn namespace(&self) -> &Namespace {
        &self.shared.namespace
    }

    // ---- paths ----

    /// What a queue is worth now; none: it cannot be used.
    #[inline]
    fn worth(queue: &Queue, path: &SharedPath) -> Option<Access> {
        if queue.is_ending() || path.state() != PathState::Live {
            return None;
        }
        let access = path.access();
        matches!(access, Access::Optimized | Access::NonOptimized).then_some(access)
    }

    /// The queue that a command is to take: of the paths that are optimized, or else of the others that work, by
    /// the policy.
    #[inline]
    pub(super) fn choose(&self) -> Choice {
        let namespace = self.namespace();
        if namespace.state() == NamespaceState::Removed {
            return Choice::NoPath;
        }
        let paths = self.paths.borrow();
        let count = paths.len();
        let mut turn = match self.policy {
            IoPolicy::RoundRobin => self.turn.get(),
            IoPolicy::QueueDepth => 0,
        };
        let mut best: Option<(bool, u32, &Rc<Queue>, usize)> = None;
        let mut usable = Access::Inaccessible;
        for _ in 0..count {
            let index = if turn < count { turn } else { 0 };
            turn = index + 1;
            let path = &paths[index];
            let Some(queue) = path.queue.as_ref().filter(|_| !path.suspect) else {
                continue;
            };
            let Some(access) = Self::worth(queue, &namespace.paths()[index]) else {
                continue;
            };
            if (access as u8) < usable as u8 {
                (usable, best) = (access, None);
            } else if access != usable {
                continue;
            }
            let rank = match self.policy {
                IoPolicy::RoundRobin => 0,
                IoPolicy::QueueDepth => queue.in_flight.get(),
            };
            let found = (queue.is_full(), rank, queue, turn);
            if best.is_none_or(|best| (found.0, found.1) < (best.0, best.1)) {
                best = Some(found);
            }
        }
        match best {
            Some((false, _, queue, next)) => {
                self.turn.set(next);
                Choice::Queue(queue.clone())
            }
            Some(_) => Choice::Full,
            None => Choice::NoPath,
        }
    }

    /// Why nothing can be done any more, if that is so: no path is usable, and none is going to be.
    #[cold]
    pub(super) fn hopeless(&self) -> Option<(ErrorKind, String)> {
        let namespace = self.namespace();
        if namespace.state() == NamespaceState::Removed {
            let what = "the namespace was removed, or is another one now; look at the target";
            return Some((ErrorKind::NotFound, what.into()));
        }
        let mut reasons = Vec::new();
        let paths = self.paths.borrow();
        let addresses = &namespace.spec().addresses;
        for (index, (path, shared)) in paths.iter().zip(namespace.paths()).enumerate() {
            let reason = match (shared.state(), &path.refused) {
                (PathState::FailingFast, _) => "not connected for too long",
                (PathState::Lost, _) => "given up",
                // It is of this association: with the next one there may be a queue.
                (PathState::Live, Some(why)) => why,
                _ => return None,
            };
            match addresses.get(index) {
                Some(address) => reasons.push(format!("{address}: {reason}")),
                None => reasons.push(format!("path {index}: {reason}")),
            }
        }
        let what = format!(
            "no path is left ({}); look at the target and at the network",
            reasons.join("; ")
        );
        Some((ErrorKind::Io, what))
    }

    /// Tells the thread of a path.
    #[cold]
    pub(super) fn tell(&self, path: usize, command: PathCommand) {
        if let Some(path) = self.namespace().paths().get(path) {
            path.send(command);
        }
    }

    /// A queue takes no more commands.
    #[cold]
    pub(super) fn queue_ends(&self, queue: &Queue, why: Why) {
        let mut paths = self.paths.borrow_mut();
        if let Some(path) = paths.get_mut(queue.path) {
            let is_it = |other: &Rc<Queue>| std::ptr::eq(Rc::as_ptr(other), queue);
            let ended = path.queue.take_if(|other| is_it(other));
            if matches!(why, Why::Failed(_)) && ended.is_some() {
                path.fence = ended;
            }
        }
        drop(paths);
        let name = self.namespace().name().display();
        if let Why::Failed(why) = why {
            log::warn!("{name}: path {}: queue {}: {why}", queue.path, queue.qid());
            let member = self.member.number();
            let generation = queue.generation;
            let failed = PathCommand::QueueFailed {
                member,
                generation,
                why,
            };
            self.tell(queue.path, failed);
        }
    }

    /// True if what changes data must not be done again yet that this queue had: its controller may still do it.
    #[cold]
    pub(super) fn is_fenced(&self, queue: &Rc<Queue>) -> bool {
        let paths = self.paths.borrow();
        let fence = paths.get(queue.path).and_then(|path| path.fence.as_ref());
        fence.is_some_and(|fence| Rc::ptr_eq(fence, queue))
    }

    /// Nothing of an earlier queue of this path is executed any more, or nobody can say more about it.
    #[cold]
    fn lift_fence(&self, path: usize) {
        let mut paths = self.paths.borrow_mut();
        let fence = paths.get_mut(path).and_then(|path| path.fence.take());
        drop(paths);
        if fence.is_some() {
            self.table.borrow_mut().lift_fence(path);
        }
    }

    /// A path that is not connected any more has no queue to wait for.
    #[cold]
    fn lift_fences_of_lost_paths(&self) {
        for (index, path) in self.namespace().paths().iter().enumerate() {
            if path.state() != PathState::Live {
                self.lift_fence(index);
            }
        }
    }

    /// A status of this path's controller said that the path is not what it seems.
    #[cold]
    pub(super) fn distrust(&self, queue: &Queue) {
        if let Some(path) = self.paths.borrow_mut().get_mut(queue.path) {
            // Its thread is asked once, not for each of the commands that were under way.
            if std::mem::replace(&mut path.suspect, true) {
                return;
            }
        }
        let generation = queue.generation;
        self.tell(queue.path, PathCommand::LookAtAccess { generation });
    }

    #[cold]
    fn trust_all_paths(&self) {
        let mut paths = self.paths.borrow_mut();
        paths.iter_mut().for_each(|path| path.suspect = false);
    }

    /// What fits into a Dataset Management command on every path that there is a queue of.
    #[cold]
    pub(super) fn discard_limits(&self) -> DiscardLimits {
        let mut least = DiscardLimits {
            ranges: u16::MAX,
            range_blocks: u32::MAX,
            blocks: u64::MAX,
        };
        let paths = self.paths.borrow();
        for queue in paths.iter().filter_map(|path| path.queue.as_ref()) {
            let limits = queue.limits();
            least.ranges = least.ranges.min(limits.max_discard_ranges);
            least.range_blocks = least.range_blocks.min(limits.max_discard_range_blocks);
            least.blocks = least.blocks.min(limits.max_discard_blocks);
        }
        least
    }

    // ---- events ----

    #[cold]
    fn take(self: &Rc<Self>, event: MemberEvent) {
        match event {
            MemberEvent::Connected(connection) => self.connected(*connection),
            MemberEvent::Lost { path, generation } => {
                let lost = {
                    let paths = self.paths.borrow();
                    let queue = paths.get(path).and_then(|path| path.queue.clone());
                    queue.filter(|queue| queue.generation <= generation)
                };
                if let Some(queue) = lost {
                    queue.end(self, Why::Told);
                }
                self.lift_fence(path);
            }
            MemberEvent::Changed => {
                self.lift_fences_of_lost_paths();
                self.trust_all_paths();
            }
            MemberEvent::Refused { path, why } => {
                self.lift_fence(path);
                if let Some(path) = self.paths.borrow_mut().get_mut(path) {
                    path.refused = Some(why);
                }
            }
        }
    }

    #[cold]
    fn connected(self: &Rc<Self>, connection: IoConnection) {
        let (path, generation) = (connection.path, connection.generation);
        if connection.limits.volatile_write_cache {
            self.namespace().set_write_cache();
        }
        let before = {
            let mut paths = self.paths.borrow_mut();
            let Some(path) = paths.get_mut(path).filter(|p| p.generation <= generation) else {
                return;
            };
            path.generation = generation;
            path.refused = None;
            path.suspect = false;
            path.queue.take()
        };
        if let Some(before) = before {
            before.end(self, Why::Told);
        }
        self.lift_fence(path);
        match Queue::start(self, connection) {
            Ok(queue) => {
                if let Some(path) = self.paths.borrow_mut().get_mut(path) {
                    path.queue = Some(queue);
                }
            }
            Err(error) => {
                let why = format!("taking over a connection: {error}");
                let member = self.member.number();
                let failed = PathCommand::QueueFailed {
                    member,
                    generation,
                    why,
                };
                self.tell(path, failed);
            }
        }
    }

    /// The storage is gone: so are its users, and there is nothing to be held.
    #[cold]
    fn close(&self) {
        let queues: Vec<Rc<Queue>> = {
            let paths = self.paths.borrow();
            paths.iter().filter_map(|path| path.queue.clone()).collect()
        };
        for queue in queues {
            queue.end(self, Why::Told);
        }
        if let Some(clock) = self.clock.take() {
            self.io.remove(clock);
        }
        self.io.clear_local(&self.shared.slot);
    }

    // ---- time ----

    /// To be called when there is a request: time passes as long as there is one.
    #[inline]
    pub(super) fn start_clock(&self) {
        if self.clock_stands.replace(false) {
            if let Some(clock) = self.clock.get() {
                self.io.wake(clock);
            }
        }
    }

    /// A tick is over.
    #[cold]
    fn tick(&self) {
        self.now.set(self.now.get().wrapping_add(1));
        self.look_after_slow_commands();
        if let (Some(at_most), Choice::NoPath) = (self.held_at_most, self.choose()) {
            self.look_after_held_commands(at_most);
        }
        self.trust_all_paths();
        self.pump();
    }

    pub(super) fn error(&self, kind: ErrorKind, what: Kind, offset: u64, why: &str) -> Error {
        let name = self.namespace().name();
        Error::image(kind, name, offset, format_args!("{}: {why}", what.name()))
    }
}

/// Takes the paths' events.
async fn manage(local: Rc<Local>) {
    poll_fn(|cx| {
        local.member.set_waker(cx.waker());
        loop {
            let events = local.member.take_events();
            if events.is_empty() {
                break;
            }
            events.into_iter().for_each(|event| local.take(event));
            local.pump();
        }
        match local.shared.closed.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    local.close();
}

/// Counts ticks while there are requests; costs nothing otherwise.
async fn tell_time(local: Rc<Local>) {
    loop {
        poll_fn(|_| match local.table.borrow().is_busy() {
            true => Poll::Ready(()),
            false => {
                local.clock_stands.set(true);
                Poll::Pending
            }
        })
        .await;
        local.io.sleep(local.tick).await;
        local.tick();
    }
}
