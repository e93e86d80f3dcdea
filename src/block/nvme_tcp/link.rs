//! What the threads of the paths and the workers know in common of a namespace, and how they talk.
//!
//! A worker reads atomics. All else goes through two kinds of mailbox: a path's, in which members (the threads
//! that do I/O) leave [`PathCommand`]s, and a member's, in which the paths leave [`MemberEvent`]s. Neither is
//! touched by a request that goes well.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::machine::QueueParams;
use super::spec::NvmeSpec;
use super::tls::TlsSession;
use crate::block::Limits;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a path can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PathState {
    /// Not connected; it is being tried. Requests wait for it.
    Connecting = 0,
    /// Connected.
    Live = 1,
    /// Not connected for longer than requests are held (`fast-io-fail-tmo`); it is being tried.
    FailingFast = 2,
    /// Given up (`ctrl-loss-tmo`, or the subsystem refused for good).
    Lost = 3,
}

/// Asymmetric namespace access (Base section 8.1): what a live path is worth for this namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// As good as it gets; also where the controller reports no ANA.
    Optimized = 0,
    /// Works, at a price.
    NonOptimized = 1,
    /// Does not work now.
    Inaccessible = 2,
    /// Will not work again.
    PersistentLoss = 3,
    /// Between two states.
    Change = 4,
}

/// What became of the namespace as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NamespaceState {
    /// It serves.
    Present = 0,
    /// It serves reads.
    WriteProtected = 1,
    /// The subsystem has it no more, or not as it was (another format, another identity).
    Removed = 2,
}

/// What does not change as long as a namespace is served.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes of a logical block: 512 or 4096, or another power of two.
    pub block: u32,
    /// Blocks, alignment and sizes that the namespace likes.
    pub limits: Limits,
    /// Requests should not cross multiples of this many bytes (NOIOB); 0: they may.
    pub boundary: u64,
    /// A Write Zeroes with DEAC leaves zeros (DLFEAT).
    pub deallocated_reads_zero: bool,
    /// Serial number of the subsystem and identity of the namespace, for a serial that stays the same.
    pub identity: [u8; 16],
}

/// What one controller takes.
#[derive(Clone, Copy, Debug)]
pub struct ControllerLimits {
    /// Largest transfer of one command, bytes (MDTS); at least 4096.
    pub max_transfer: u32,
    /// It knows Dataset Management.
    pub discards: bool,
    /// Ranges in one Dataset Management command, 1 to 256; and blocks in one range, and in all.
    pub max_discard_ranges: u16,
    /// Blocks in one range of a Dataset Management command.
    pub max_discard_range_blocks: u32,
    /// Blocks in all ranges of a Dataset Management command.
    pub max_discard_blocks: u64,
    /// It knows Write Zeroes; bytes in one such command, at most.
    pub max_write_zeroes: Option<u64>,
    /// It has a volatile write cache: what is written is durable only after a Flush.
    pub volatile_write_cache: bool,
    /// Delays that a status may ask for before a retry (CRDT1 to 3), in 100 ms.
    pub retry_delays: [u16; 3],
}

/// The transport under a queue.
#[derive(Debug)]
pub enum Wire {
    /// The connection's bytes are the PDUs.
    Plain(TcpStream),
    /// They go through a TLS session, whose handshake is done. Ciphertext that came behind the PDUs so far is in it.
    Tls(TcpStream, Box<TlsSession>),
}

/// A connected I/O queue: handshake, Connect and authentication are done, nothing else was sent.
#[derive(Debug)]
pub struct IoConnection {
    /// Which of [`Namespace::paths`].
    pub path: usize,
    /// Which association of that path; grows with every one.
    pub generation: u64,
    /// The queue's identifier.
    pub qid: u16,
    /// The connection.
    pub wire: Wire,
    /// What both sides agreed on.
    pub params: QueueParams,
    /// What the controller takes.
    pub limits: ControllerLimits,
    /// The namespace's number.
    pub nsid: u32,
}

/// What a path has to tell a member.
#[derive(Debug)]
pub enum MemberEvent {
    /// A queue to be used from now on, instead of an earlier one of this path.
    Connected(Box<IoConnection>),
    /// The association of this generation is over, and so are its queues: what is under way there is to be done
    /// again elsewhere. The queue's connection may still look alive.
    Lost {
        /// Which path.
        path: usize,
        /// Which association.
        generation: u64,
    },
    /// Something in the shared state has changed: requests that wait are to look again.
    Changed,
    /// A queue cannot be had, now or for good: requests of this member that find no other path fail with this.
    Refused {
        /// Which path.
        path: usize,
        /// Why, and what to do.
        why: String,
    },
}

/// What a member has to tell a path.
#[derive(Debug)]
pub enum PathCommand {
    /// A member wants a queue, whenever the path is connected.
    Join(Arc<Member>),
    /// It wants none any more; the connection is closed or will be by its drop.
    Leave {
        /// [`Member::number`].
        member: u64,
    },
    /// A queue is of no use any more.
    QueueFailed {
        /// [`Member::number`].
        member: u64,
        /// Which association it was of.
        generation: u64,
        /// For the log.
        why: String,
    },
    /// A command takes too long: it is to be aborted. If it does not end then, `QueueFailed` follows.
    Abort {
        /// Which association.
        generation: u64,
        /// The queue.
        qid: u16,
        /// The command.
        cid: u16,
    },
    /// A status said that the path's access state is not what it seemed: it is to be read again.
    LookAtAccess {
        /// Which association.
        generation: u64,
    },
    /// The namespace is not needed any more: the association ends, and the thread.
    Close,
}

/// One path, as seen by all.
#[derive(Debug)]
pub struct SharedPath {
    state: AtomicU8,
    access: AtomicU8,
    commands: Mutex<VecDeque<PathCommand>>,
    wake: EventFd,
    /// The path's thread has ended.
    over: Mutex<bool>,
    ended: Condvar,
}

/// A thread that does I/O to the namespace.
#[derive(Debug)]
pub struct Member {
    number: u64,
    passing: bool,
    events: Mutex<VecDeque<MemberEvent>>,
    waiting: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

/// A namespace that is served, shared by its paths' threads and the workers.
#[derive(Debug)]
pub struct Namespace {
    spec: NvmeSpec,
    name: PathBuf,
    geometry: Geometry,
    bytes: AtomicU64,
    largest: AtomicU64,
    state: AtomicU8,
    write_cache: AtomicBool,
    paths: Box<[Arc<SharedPath>]>,
    members: Mutex<Vec<Weak<Member>>>,
    next_member: AtomicU64,
    changed: Mutex<Option<EventFd>>,
}

impl SharedPath {
    /// A path that is being tried.
    ///
    /// # Errors
    /// No eventfd from the kernel.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            state: AtomicU8::new(PathState::Connecting as u8),
            access: AtomicU8::new(Access::Inaccessible as u8),
            commands: Mutex::new(VecDeque::new()),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            over: Mutex::new(false),
            ended: Condvar::new(),
        })
    }

    /// Whether it is connected.
    #[inline]
    pub fn state(&self) -> PathState {
        match self.state.load(Ordering::Acquire) {
            0 => PathState::Connecting,
            1 => PathState::Live,
            2 => PathState::FailingFast,
            _ => PathState::Lost,
        }
    }

    /// What it is worth, if it is live.
    #[inline]
    pub fn access(&self) -> Access {
        match self.access.load(Ordering::Acquire) {
            0 => Access::Optimized,
            1 => Access::NonOptimized,
            2 => Access::Inaccessible,
            3 => Access::PersistentLoss,
            _ => Access::Change,
        }
    }

    /// The path's thread says so; [`Namespace::tell_all`] is to follow.
    pub fn set_state(&self, state: PathState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// As [`SharedPath::set_state`].
    pub fn set_access(&self, access: Access) {
        self.access.store(access as u8, Ordering::Release);
    }

    /// Leaves a command for the path's thread.
    pub fn send(&self, command: PathCommand) {
        lock(&self.commands).push_back(command);
        // Only a counter that is full refuses, and that one is set.
        let _ = self.wake.write(1);
    }

    /// What was left, for the path's thread.
    pub fn take_commands(&self) -> VecDeque<PathCommand> {
        let _ = self.wake.read();
        std::mem::take(&mut *lock(&self.commands))
    }

    /// The path's thread ends.
    pub fn set_ended(&self) {
        *lock(&self.over) = true;
        self.ended.notify_all();
    }

    /// Waits until the path's thread has ended, at most until `deadline`. True if it has.
    pub fn wait_ended(&self, deadline: Instant) -> bool {
        let mut over = lock(&self.over);
        while !*over {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.ended.wait_timeout(over, left);
            over = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *over
    }

    /// Readable when there are commands.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}

impl MemberEvent {
    /// True if an event that was not taken yet says nothing any more beside this one.
    fn supersedes(&self, before: &Self) -> bool {
        match (self, before) {
            (Self::Connected(now), Self::Connected(before)) => now.path == before.path,
            (Self::Lost { path, generation }, Self::Connected(before)) => {
                *path == before.path && before.generation <= *generation
            }
            (Self::Connected(now), Self::Refused { path, .. } | Self::Lost { path, .. }) => {
                now.path == *path
            }
            (Self::Lost { path: now, .. }, Self::Lost { path, .. }) => now == path,
            (Self::Refused { path: now, .. }, Self::Refused { path, .. }) => now == path,
            (Self::Changed, Self::Changed) => true,
            _ => false,
        }
    }
}

impl Member {
    /// Tells members apart, within a namespace.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// True if it is one of [`Namespace::join_in_passing`].
    pub fn is_passing(&self) -> bool {
        self.passing
    }

    /// Leaves an event, and wakes the task that waits for it.
    pub fn send(&self, event: MemberEvent) {
        let mut events = lock(&self.events);
        // A thread that takes no turn for long does not keep the connections of associations that are over.
        events.retain(|before| !event.supersedes(before));
        events.push_back(event);
        drop(events);
        self.waiting.store(true, Ordering::Release);
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake_by_ref();
        }
    }

    /// Whom to wake. To be set before looking for events.
    pub fn set_waker(&self, waker: &Waker) {
        lock(&self.waker).clone_from(&Some(waker.clone()));
    }

    /// What was left.
    pub fn take_events(&self) -> VecDeque<MemberEvent> {
        if !self.waiting.swap(false, Ordering::AcqRel) {
            return VecDeque::new();
        }
        std::mem::take(&mut *lock(&self.events))
    }
}

impl Namespace {
    /// A namespace that one of `paths` has found.
    pub fn new(
        spec: NvmeSpec,
        name: PathBuf,
        geometry: Geometry,
        bytes: u64,
        paths: Box<[Arc<SharedPath>]>,
    ) -> Self {
        Self {
            spec,
            name,
            geometry,
            bytes: AtomicU64::new(bytes),
            largest: AtomicU64::new(bytes),
            state: AtomicU8::new(NamespaceState::Present as u8),
            write_cache: AtomicBool::new(false),
            paths,
            members: Mutex::new(Vec::new()),
            next_member: AtomicU64::new(1),
            changed: Mutex::new(None),
        }
    }

    /// What the user asked for.
    pub fn spec(&self) -> &NvmeSpec {
        &self.spec
    }

    /// Name in messages: the URI without its options.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// What does not change.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Size, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Largest size since it was connected, bytes. What lies between [`Namespace::bytes`] and here has been lost, and
    /// does not read as zeros, as what never was there does. To be asked for after the size.
    pub fn largest_bytes(&self) -> u64 {
        self.largest.load(Ordering::Acquire)
    }

    /// Whether it serves.
    #[inline]
    pub fn state(&self) -> NamespaceState {
        match self.state.load(Ordering::Acquire) {
            0 => NamespaceState::Present,
            1 => NamespaceState::WriteProtected,
            _ => NamespaceState::Removed,
        }
    }

    /// True if the controller of any queue so far has a volatile write cache: what went through it may be in there,
    /// whichever path a flush takes.
    #[inline]
    pub fn has_write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// A controller has a volatile write cache. To be called before anything is sent to it.
    pub fn set_write_cache(&self) {
        self.write_cache.store(true, Ordering::Release);
    }

    /// Its paths, in the order of the addresses.
    #[inline]
    pub fn paths(&self) -> &[Arc<SharedPath>] {
        &self.paths
    }

    /// From now on `event` is signalled when size or state have changed.
    pub fn on_change(&self, event: EventFd) {
        *lock(&self.changed) = Some(event);
    }

    /// A path has found another size, bytes.
    pub fn set_bytes(&self, bytes: u64) {
        // Before the size: whoever knows that one finds this one.
        self.largest.fetch_max(bytes, Ordering::AcqRel);
        if self.bytes.swap(bytes, Ordering::AcqRel) != bytes {
            self.signal_change();
        }
    }

    /// A path has found another state.
    pub fn set_state(&self, state: NamespaceState) {
        if self.state.swap(state as u8, Ordering::AcqRel) != state as u8 {
            self.tell_all();
            self.signal_change();
        }
    }

    fn signal_change(&self) {
        if let Some(event) = &*lock(&self.changed) {
            // Only a counter that is full refuses, and that one is set.
            let _ = event.write(1);
        }
    }

    /// Makes the calling thread a member: every path is asked for a queue.
    pub fn join(&self) -> Arc<Member> {
        self.add(false)
    }

    /// As [`Namespace::join`], for a thread that leaves again soon: while it flushes or reads a header. Each path
    /// keeps a queue for those, which no other member gets.
    pub fn join_in_passing(&self) -> Arc<Member> {
        self.add(true)
    }

    fn add(&self, passing: bool) -> Arc<Member> {
        let member = Arc::new(Member {
            passing,
            number: self.next_member.fetch_add(1, Ordering::Relaxed),
            events: Mutex::new(VecDeque::new()),
            waiting: AtomicBool::new(false),
            waker: Mutex::new(None),
        });
        let mut members = lock(&self.members);
        members.retain(|member| member.strong_count() > 0);
        members.push(Arc::downgrade(&member));
        drop(members);
        for path in &self.paths {
            path.send(PathCommand::Join(member.clone()));
        }
        member
    }

    /// Ends a membership.
    pub fn leave(&self, member: &Member) {
        for path in &self.paths {
            path.send(PathCommand::Leave {
                member: member.number,
            });
        }
    }

    /// Tells all members that shared state has changed.
    pub fn tell_all(&self) {
        for member in lock(&self.members).iter().filter_map(Weak::upgrade) {
            member.send(MemberEvent::Changed);
        }
    }

    /// Ends all paths.
    pub fn close(&self) {
        for path in &self.paths {
            path.send(PathCommand::Close);
        }
    }

    /// Ends all paths, and waits until their threads have ended: the controllers are told, and the connections are
    /// closed. For `time` at most; true if all have.
    pub fn close_and_wait(&self, time: Duration) -> bool {
        self.close();
        let deadline = Instant::now() + time;
        // One that does not end does not make the others look late.
        let late = self.paths.iter().filter(|path| !path.wait_ended(deadline));
        late.count() == 0
    }
}
