//! One ring with its request slots.
//!
//! A slot is a task that lives as long as the ring: it waits to be started, runs one request to its
//! end, and waits again. So the state of a request is a Rust future that was allocated once, and a slot
//! is named by what the ring popped: in a split ring the head descriptor of the request it runs. A driver that
//! makes a head available again before its request has ended breaks the ring.

mod ending;
mod files;
mod gathered;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::task::Poll;

use log::{error, info, warn};

use self::gathered::NOBODY;
use super::device::DeviceShared;
use super::dirty::{MarkError, Marks};
use super::gather::{Gather, Verdict};
use super::mailbox::{RingFile, RingKey, Start};
use super::notifier::Notifier;
use super::stats::RingStats;
use crate::block::{self, ActiveDisk};
use crate::kill_point::kill_point;
use crate::mappings;
use crate::reactor::{INLINE_SHARE, Io, Sg, TaskId};
use crate::virtio::blk::request::{self, Command, Outcome, Parsed, Reply, Status};
use crate::virtio::dirty::DirtyLog;
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::{ChainBuf, Ring, RingError};

/// Buffers of a chain that a fresh slot has room for: 1 MiB in 4 KiB pages would need 256, most
/// requests a handful. A slot grows to what its driver sends and stays so.
const SLOT_BUFFERS: usize = 16;

/// After so many requests of a batch those that have ended already are shown to the driver, which can work on them
/// meanwhile.
const SHARE: u16 = 8;

/// A ring as its worker holds it.
pub(super) struct Queue {
    pub(super) key: RingKey,
    io: Io,
    ring: RefCell<Ring>,
    /// Guest memory as new requests see it; a request keeps what it began with.
    memory: RefCell<Rc<Snapshot>>,
    disk: Arc<ActiveDisk>,
    /// Whether threads of the kernel do the work of the disk's storage; they may need our CPU.
    by_threads: bool,
    device: Arc<DeviceShared>,
    features: u64,
    slots: RefCell<Vec<Option<Rc<Slot>>>>,
    kick: RefCell<Option<TaskId>>,
    /// No kick file: the driver never notifies, so the ring is always polled.
    polled: Cell<bool>,
    call: RefCell<Option<Notifier>>,
    err: RefCell<Option<Notifier>>,
    in_flight: Cell<u32>,
    /// The driver was shown completions, and not yet asked whether it wants to be woken for them.
    unannounced: Cell<bool>,
    enabled: Cell<bool>,
    broken: Cell<bool>,
    /// Guest memory of a request or of the ring was lost: nothing is executed or published any more.
    lost: Cell<bool>,
    stopping: RefCell<Option<SyncSender<Option<u32>>>>,
    /// What is under way is given up.
    suspended: Cell<bool>,
    marks: Marks,
    gather: Gather,
    stats: Arc<RingStats>,
}

/// Guest memory between two changes of the table. Counted within the thread, so that a request's share
/// in it costs no atomic operation on a line that all workers write.
struct Snapshot(Arc<GuestMemory>);

struct Slot {
    head: u16,
    task: Cell<Option<TaskId>>,
    started: Cell<bool>,
    busy: Cell<bool>,
    /// For a request that waits in a gather.
    verdict: Cell<Option<Verdict>>,
    /// The next one in its gather.
    next_member: Cell<u16>,
    /// Where the data of the request itself end, of one that leads.
    own_end: Cell<u32>,
}

impl Slot {
    /// Takes a request. None: it has one already.
    #[inline]
    fn begin(&self) -> Option<TaskId> {
        if self.busy.replace(true) {
            return None;
        }
        self.started.set(true);
        self.task.get()
    }
}

impl Queue {
    /// Takes a ring over. The driver is signalled once, since it may be waiting for what a predecessor
    /// completed and did not say.
    pub(super) fn start(key: RingKey, io: &Io, start: Start) -> Result<Rc<Self>, RingError> {
        let ring = Ring::new(&start.memory, &start.config, start.inflight)?;
        if ring.base() != start.config.base {
            info!(
                "{}: ring {} goes on at entry {}, where its inflight region says, and not at {}; requests of \
                 a predecessor that are served again: {}",
                start.device.name,
                key.1,
                ring.base(),
                start.config.base,
                ring.backlog(),
            );
        }
        let queue = Rc::new(Self {
            key,
            io: io.clone(),
            slots: RefCell::new(vec![None; usize::from(ring.size())]),
            ring: RefCell::new(ring),
            memory: RefCell::new(Rc::new(Snapshot(start.memory))),
            gather: Gather::new(start.disk.merging_pays()),
            by_threads: !start.disk.ends_by_interrupt(),
            disk: start.disk,
            device: start.device,
            features: start.features,
            kick: RefCell::new(None),
            polled: Cell::new(false),
            call: RefCell::new(None),
            err: RefCell::new(start.err.map(Notifier::new)),
            in_flight: Cell::new(0),
            unannounced: Cell::new(false),
            enabled: Cell::new(start.enabled),
            broken: Cell::new(false),
            lost: Cell::new(false),
            stopping: RefCell::new(None),
            suspended: Cell::new(false),
            marks: Marks::new(start.log, start.used_log, &start.config),
            stats: start.stats,
        });
        queue.set_file(RingFile::Kick, start.kick);
        queue.set_file(RingFile::Call, start.call);
        queue.ring.borrow_mut().disable_notification();
        queue.marked(queue.marks.whole_ring());
        Ok(queue)
    }

    /// Whether writes to guest memory are logged.
    pub(super) fn is_logged(&self) -> bool {
        self.marks.are_on()
    }

    /// The disk that it serves.
    pub(super) fn disk(&self) -> &Arc<ActiveDisk> {
        &self.disk
    }

    /// Marks what is written to guest memory from now on in this log.
    pub(super) fn set_log(&self, log: Option<Arc<DirtyLog>>) {
        self.marks.set_log(log);
        self.marked(self.marks.whole_ring());
    }

    /// Marks what is written to the used ring from now on there.
    pub(super) fn set_used_log(&self, used_log: Option<u64>) {
        self.marks.set_used(used_log);
        self.marked(self.marks.whole_ring());
    }

    /// A page that is not marked would be stale at the target of the migration: nothing more is written to guest
    /// memory than what is under way already.
    #[inline]
    fn marked(&self, done: Result<(), MarkError>) {
        if let Err(error) = done {
            self.break_ring(&error);
        }
    }

    #[inline]
    fn mark_request(&self, memory: &GuestMemory, chain: &ChainBuf, reply: &Reply) {
        if self.marks.are_on() {
            self.marked(self.marks.request(memory, chain, reply.status_ptr()));
            kill_point!("request-marked");
        }
    }

    #[inline]
    fn mark_notification(&self) {
        if self.marks.are_on() {
            self.marked(self.marks.notification());
        }
    }

    pub(super) fn set_enabled(&self, enabled: bool) {
        self.enabled.set(enabled);
    }

    /// Replaces guest memory. Requests under way keep the old mapping alive until they end.
    pub(super) fn set_memory(&self, memory: &Arc<GuestMemory>) -> Result<(), RingError> {
        let remapped = self.ring.borrow_mut().remap(memory);
        if let Err(error) = &remapped {
            self.break_ring(error);
        } else {
            self.memory.replace(Rc::new(Snapshot(memory.clone())));
        }
        remapped
    }

    fn fetches(&self) -> bool {
        self.enabled.get() && !self.broken.get() && self.stopping.borrow().is_none()
    }

    /// What a predecessor had in flight is served even while the ring stops: `base` is behind it.
    #[cold]
    fn finishes_backlog(&self) -> bool {
        let stops = self.stopping.borrow().is_some() && !self.suspended.get();
        stops && !self.broken.get() && self.ring.borrow().backlog() > 0
    }

    /// True if the worker must not sleep because of this ring.
    pub(super) fn is_polled(&self) -> bool {
        self.polled.get() && self.fetches()
    }

    /// Fetches what the driver made available and starts it. Returns true if there was anything.
    #[inline]
    pub(super) fn poll(self: &Rc<Self>) -> bool {
        let mut fetched = 0;
        let mut budget = self.ring.borrow().size();
        if !self.fetches() {
            if !self.finishes_backlog() {
                return false;
            }
            budget = self.ring.borrow().backlog();
        }
        let inline_work = self.io.inline_work();
        while fetched < budget {
            let popped = self.ring.borrow_mut().pop();
            match popped {
                Ok(Some(head)) => self.begin(head),
                Ok(None) => break,
                Err(error) => {
                    self.break_ring(&error);
                    break;
                }
            }
            fetched += 1;
            if fetched % SHARE == 0 {
                self.show();
            }
            // By the request, or by a mark that could not be set.
            if self.broken.get() {
                break;
            }
            // Requests that ended as they began are shown to the driver now and then.
            if self.io.inline_work() - inline_work >= INLINE_SHARE {
                break;
            }
        }
        // Nothing more is at hand.
        if self.gather.is_open() {
            self.close_gather();
        }
        if fetched > 0 {
            self.stats.requests.add(u64::from(fetched));
        }
        fetched > 0
    }

    #[inline]
    fn begin(self: &Rc<Self>, head: u16) {
        kill_point!("fetched");
        let known = self.slots.borrow()[usize::from(head)]
            .as_ref()
            .map(|slot| slot.begin());
        let Some(task) = known.unwrap_or_else(|| self.new_slot(head).begin()) else {
            self.break_ring(&format_args!(
                "the driver made descriptor {head} available again before its request ended"
            ));
            return;
        };
        self.count_in_flight(self.in_flight.get() + 1);
        self.io.poll_now(task);
    }

    #[cold]
    fn new_slot(self: &Rc<Self>, head: u16) -> Rc<Slot> {
        let slot = Rc::new(Slot {
            head,
            task: Cell::new(None),
            started: Cell::new(false),
            busy: Cell::new(false),
            verdict: Cell::new(None),
            next_member: Cell::new(NOBODY),
            own_end: Cell::new(0),
        });
        let task = self.io.spawn(serve(self.clone(), slot.clone()));
        slot.task.set(Some(task));
        self.slots.borrow_mut()[usize::from(head)] = Some(slot.clone());
        slot
    }

    fn count_in_flight(&self, count: u32) {
        self.in_flight.set(count);
        self.stats.in_flight.store(count, Ordering::Relaxed);
    }

    /// Runs one request; returns how many bytes were written to the guest.
    #[inline]
    async fn run(&self, memory: &GuestMemory, slot: &Slot, chain: &mut ChainBuf) -> u32 {
        let head = slot.head;
        let collected = self.ring.borrow().read_chain(memory, head, chain);
        if let Err(error) = collected {
            self.complain(&format_args!("descriptor chain {head}: {error}"));
            return 0;
        }
        match request::parse(chain, &self.device.limits(), self.features) {
            // What was parsed may be zeros in place of the driver's words.
            Outcome::Execute(_) if self.lost(memory) => 0,
            Outcome::Execute(mut parsed) => {
                let status = 'status: {
                    if self.gather.follows(&parsed.command) {
                        if self.gather(slot, memory, &parsed, chain) {
                            let made = self.verdict(slot, &mut parsed, chain).await;
                            // As above: time has passed.
                            if self.lost(memory) {
                                self.part(slot, &mut parsed, chain, false);
                                return 0;
                            }
                            if made {
                                break 'status Status::Ok;
                            }
                        }
                    } else if self.gather.is_open() {
                        self.close_gather();
                    }
                    loop {
                        let done = self.execute(&parsed, chain).await;
                        if slot.leads() {
                            self.part(slot, &mut parsed, chain, done.is_ok());
                            if done.is_err() && !self.lost(memory) {
                                continue;
                            }
                        }
                        break match done {
                            Ok(()) => Status::Ok,
                            Err(error) => self.failed(&error),
                        };
                    }
                };
                let written = parsed.finish(status);
                self.mark_request(memory, chain, &parsed.reply);
                written
            }
            Outcome::Finish { status, reply } => {
                self.stats.errors.count();
                let written = reply.finish(status);
                self.mark_request(memory, chain, &reply);
                written
            }
            Outcome::Broken => {
                self.complain(&format_args!("request {head} has no room for a status"));
                0
            }
        }
    }

    #[inline]
    async fn execute(&self, parsed: &Parsed, chain: &ChainBuf) -> block::Result<()> {
        // SAFETY: the buffers lie in guest memory, which the caller keeps mapped until the request ends,
        // and to which no Rust reference exists. Those of a gather's members are in the same memory.
        let data = unsafe { Sg::new(parsed.data(chain)) };
        let io = &self.io;
        match parsed.command {
            Command::Read { offset, .. } => self.disk.read(io, offset, data).await,
            Command::Write { offset, .. } => match self.disk.write(io, offset, data).await {
                Ok(()) => self.write_through().await,
                error => error,
            },
            Command::Flush => self.disk.flush(io).await,
            Command::GetId => {
                request::fill_id(parsed, chain, &self.device.id);
                Ok(())
            }
            Command::Discard => {
                for segment in parsed.segments(chain) {
                    self.disk.discard(io, segment.offset, segment.len).await?;
                }
                Ok(())
            }
            Command::WriteZeroes => {
                for s in parsed.segments(chain) {
                    self.disk.write_zeroes(io, s.offset, s.len, s.unmap).await?;
                }
                self.write_through().await
            }
        }
    }

    /// Says so, and what the driver is told.
    #[cold]
    fn failed(&self, error: &block::Error) -> Status {
        self.stats.errors.count();
        self.complain(error);
        match error.kind() {
            block::ErrorKind::Unsupported => Status::Unsupp,
            _ => Status::IoErr,
        }
    }

    /// Without a write cache a write is durable before it completes (virtio 5.2.6.2).
    #[inline]
    async fn write_through(&self) -> block::Result<()> {
        if self.device.write_through.load(Ordering::Relaxed) {
            self.disk.flush(&self.io).await
        } else {
            Ok(())
        }
    }

    /// Whether this memory was lost ([`mappings`]): the ring is broken then, for good.
    #[inline]
    fn lost(&self, memory: &GuestMemory) -> bool {
        mappings::any_lost() && self.notice_loss(memory)
    }

    #[cold]
    fn notice_loss(&self, memory: &GuestMemory) -> bool {
        if !self.lost.get() && memory.lost().is_some() {
            self.lost.set(true);
            self.break_ring(&"the VM's memory has lost its pages");
        }
        self.lost.get()
    }

    /// Ends a request without a word to the driver.
    #[cold]
    fn forget(&self) {
        self.count_in_flight(self.in_flight.get() - 1);
    }

    #[inline]
    fn finish(&self, head: u16, written: u32) {
        kill_point!("executed");
        self.ring.borrow_mut().push_used(head, written);
        kill_point!("pushed");
        self.count_in_flight(self.in_flight.get() - 1);
    }

    /// Shows what was completed to a driver that looks. One that sleeps is woken by the next [`Queue::publish`].
    #[inline]
    fn show(&self) {
        let mut ring = self.ring.borrow_mut();
        let (old, new) = (ring.published_used(), ring.next_used());
        // The used ring itself may be what was lost.
        if old == new || self.lost(&self.memory.borrow().0) {
            return;
        }
        ring.show();
        drop(ring);
        self.unannounced.set(true);
        kill_point!("published");
        if self.marks.are_on() {
            self.marked(self.marks.completions(old, new));
            kill_point!("completions-marked");
        }
    }

    /// Shows the driver what was completed since the last call, and interrupts it if it asked. Returns
    /// true if there was anything.
    #[inline]
    pub(super) fn publish(&self) -> bool {
        self.show();
        let anything = self.unannounced.take();
        // What was pushed before its memory was lost is not to be shown after it.
        if anything && !self.lost.get() && self.ring.borrow_mut().publish() {
            self.interrupt();
        }
        anything
    }

    /// The ring can not be trusted any more: it is not looked at again, and the VMM is told.
    #[cold]
    fn break_ring(&self, why: &dyn std::fmt::Display) {
        if self.broken.replace(true) {
            return;
        }
        error!(
            "{}: ring {} is broken and stopped: {why}; the guest must reset the device",
            self.device.name, self.key.1
        );
        if let Some(err) = self.err.borrow().as_ref() {
            if let Err(error) = err.signal() {
                warn!(
                    "{}: ring {}: error file: {error}",
                    self.device.name, self.key.1
                );
            }
        }
    }

    /// Logs what went wrong with a request; a guest can cause it at will, so ever more rarely.
    #[cold]
    fn complain(&self, what: &dyn std::fmt::Display) {
        let count = self.device.complaints.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= 16 || count.is_power_of_two() {
            warn!(
                "{}: ring {}: {what} (failed requests so far: {count})",
                self.device.name, self.key.1
            );
        }
    }
}

/// The life of a slot.
async fn serve(queue: Rc<Queue>, slot: Rc<Slot>) {
    let mut chain = ChainBuf::with_capacity(SLOT_BUFFERS);
    loop {
        poll_fn(|_| {
            if slot.started.take() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        let memory = queue.memory.borrow().clone();
        let written = queue.run(&memory.0, &slot, &mut chain).await;
        slot.busy.set(false);
        if queue.lost(&memory.0) {
            queue.forget();
        } else {
            queue.finish(slot.head, written);
        }
    }
}
