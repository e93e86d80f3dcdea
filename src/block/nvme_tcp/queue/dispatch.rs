//! From requests to commands and back: cutting, choosing, waiting.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use super::connection::{Queue, Why};
use super::table::{Extent, Kind, State, Table};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::nvme_tcp::link::ControllerLimits;
use crate::block::nvme_tcp::local::{Choice, Local};
use crate::block::nvme_tcp::machine::{Data, Ended};
use crate::block::nvme_tcp::wire::status::Class;
use crate::block::nvme_tcp::wire::{Nlb, Sqe};
use crate::reactor::Sg;

/// Most blocks that the commands have room for (NVM 3.2.4: NLB).
const MAX_BLOCKS: u64 = 1 << 16;
/// How long commands under way are waited for when their request is dropped, before the connection is given up.
const PATIENCE: Duration = Duration::from_millis(250);

/// A request under way. Dropped, it is cancelled: nothing touches its memory any more.
#[derive(Debug)]
pub(in super::super) struct Running {
    local: Rc<Local>,
    request: u32,
    over: bool,
}

impl Running {
    /// Begins a request, as far as there are paths and room in their queues; the rest waits.
    ///
    /// # Safety
    /// The memory of `data` must stay valid until the request was finished or dropped.
    #[inline]
    pub(in super::super) unsafe fn begin(
        local: Rc<Local>,
        kind: Kind,
        offset: u64,
        len: u64,
        data: Sg<'_>,
    ) -> Self {
        // SAFETY: only the lifetime changes, which the caller vouches for.
        let data = unsafe { std::mem::transmute::<Sg<'_>, Sg<'static>>(data) };
        let request = local.begin(kind, Extent { offset, len, data });
        Self {
            local,
            request,
            over: false,
        }
    }

    /// Waits for its end.
    #[inline]
    pub(in super::super) async fn finish(mut self) -> Result<()> {
        let op = match self.local.table.borrow_mut().request(self.request) {
            Some(request) => request.op,
            None => return Ok(()),
        };
        poll_fn(|_| self.local.io().poll_software(op)).await;
        self.over = true;
        match self.local.release(self.request) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Drop for Running {
    #[inline]
    fn drop(&mut self) {
        if !self.over {
            self.local.cancel(self.request);
        }
    }
}

/// What came of trying to begin a command.
enum Begun {
    All,
    /// This command is left, for want of room.
    Full(u32),
    /// This command is left, for want of a path.
    NoPath(u32),
}

impl Queue {
    #[inline]
    pub(in super::super) fn is_full(&self) -> bool {
        self.in_flight.get() >= self.depth
    }

    /// What its controller takes.
    pub(in super::super) fn limits(&self) -> &ControllerLimits {
        &self.limits
    }

    /// For messages.
    pub(in super::super) fn qid(&self) -> u16 {
        self.qid
    }
}

impl Local {
    #[inline]
    fn begin(&self, kind: Kind, extent: Extent) -> u32 {
        let op = self.io().begin_software();
        let mut table = self.table.borrow_mut();
        let request = table.new_request(op);
        let command = table.new_command(request, kind, extent);
        if table.waiting.is_empty() && table.alone.is_none() {
            match self.try_begin(&mut table, command) {
                Begun::All => {}
                Begun::Full(rest) => table.wait_in_order(rest),
                Begun::NoPath(rest) => {
                    table.wait_in_order(rest);
                    drop(table);
                    self.pump();
                    table = self.table.borrow_mut();
                }
            }
        } else {
            table.wait_in_order(command);
        }
        if let Some(request) = table.request(request) {
            if request.in_flight == 0 {
                self.io().set_under_way(request.op, false);
            }
        }
        drop(table);
        self.start_clock();
        request
    }

    /// Gives a command to queues, in as many parts as they want it.
    #[inline]
    fn try_begin(&self, table: &mut Table, mut index: u32) -> Begun {
        loop {
            let queue = match self.choose() {
                Choice::Queue(queue) => queue,
                Choice::Full => return Begun::Full(index),
                Choice::NoPath => return Begun::NoPath(index),
            };
            let command = &table.commands[index as usize];
            let (request, kind, extent) = (command.request, command.kind, command.extent);
            let Some((len, sqe)) = self.entry(&queue, kind, &extent) else {
                let done = self.without_command(&queue, kind, extent.offset);
                self.finish_command(table, index, done);
                return Begun::All;
            };
            let (first, rest) = match kind {
                Kind::Read | Kind::Write => extent.data.split_at(len as usize),
                _ => (extent.data, Sg::empty()),
            };
            let data = match kind {
                Kind::Read => Data::Read(first),
                Kind::Write | Kind::Discard { .. } => Data::Write(first),
                Kind::Reservation(action) if action.reads() => Data::ReadAtMost(first),
                Kind::Reservation(_) => Data::Write(first),
                Kind::Wait | Kind::Flush | Kind::WriteZeroes { .. } => Data::None,
            };
            // SAFETY: the memory outlives the command: a request's end waits for its commands', and a queue's end
            // gives them up only after the socket's operations.
            let tag = unsafe { queue.machine.borrow_mut().begin(sqe, data, index) };
            let Some(tag) = tag else {
                return Begun::Full(index);
            };
            queue.in_flight.set(queue.in_flight.get() + 1);
            if let Some(request) = table.request(request) {
                request.in_flight += 1;
                if request.in_flight == 1 {
                    self.io().set_under_way(request.op, true);
                }
            }
            queue.kick(self.io());
            let command = &mut table.commands[index as usize];
            command.extent.len = len;
            command.extent.data = first;
            command.begun = self.now.get();
            command.held = 0;
            command.aborted = false;
            let number = command.number;
            command.state = State::InFlight { queue, tag };
            if len == extent.len {
                return Begun::All;
            }
            let rest = Extent {
                offset: extent.offset + len,
                len: extent.len - len,
                data: rest,
            };
            index = table.new_command(request, kind, rest);
            table.commands[index as usize].number = number;
        }
    }

    /// The submission queue entry for as much of the extent as this queue's controller takes at one go, and how
    /// many bytes that is. None: there is nothing to send.
    #[inline]
    fn entry(&self, queue: &Queue, kind: Kind, extent: &Extent) -> Option<(u64, Sqe)> {
        let geometry = self.namespace().geometry();
        let block = u64::from(geometry.block);
        let slba = extent.offset / block;
        // NVM 5.8: I/O that crosses the Optimal I/O Boundary is slower.
        let within = match geometry.boundary {
            0 => u64::MAX,
            boundary => boundary - extent.offset % boundary,
        };
        let at_most = |limit: u64| {
            let limit = limit.min(MAX_BLOCKS * block);
            let len = extent.len.min(limit);
            // The end of a part is an end of a block; a limit below a block is none of a controller's.
            let len = if len < extent.len {
                len / block * block
            } else {
                len
            };
            let len = if len == 0 { extent.len.min(block) } else { len };
            Some((len, Nlb::new(len / block)?))
        };
        let (nsid, limits) = (queue.nsid, &queue.limits);
        match kind {
            Kind::Read => {
                let (len, blocks) = at_most(within.min(limits.max_transfer.into()))?;
                Some((len, Sqe::read(nsid, slba, blocks)))
            }
            Kind::Write => {
                let (len, blocks) = at_most(within.min(limits.max_transfer.into()))?;
                Some((len, Sqe::write(nsid, slba, blocks, false)))
            }
            Kind::Wait => None,
            // Base 7.1: it concerns the namespace, whichever controller wrote to it.
            Kind::Flush => self
                .namespace()
                .has_write_cache()
                .then(|| (extent.len, Sqe::flush(nsid))),
            Kind::Discard { ranges } => {
                let sqe = limits
                    .discards
                    .then(|| Sqe::deallocate(nsid, ranges.into()))?;
                Some((extent.len, sqe?))
            }
            Kind::WriteZeroes { deallocate } => {
                let (len, blocks) = at_most(limits.max_write_zeroes?)?;
                let sqe = Sqe::write_zeroes(nsid, slba, blocks, deallocate, false);
                Some((len, sqe))
            }
            Kind::Reservation(action) => Some((extent.len, action.entry(nsid, extent.len))),
        }
    }

    /// The result of a command for which there is nothing to send.
    #[cold]
    fn without_command(&self, queue: &Queue, kind: Kind, offset: u64) -> Result<()> {
        match kind {
            Kind::Wait => Ok(()),
            // Everything that completed is durable, and a discard is a hint.
            Kind::Flush if !self.namespace().has_write_cache() => Ok(()),
            Kind::Discard { .. } if !queue.limits.discards => Ok(()),
            kind => {
                let why = "the controller does not know the command";
                Err(self.error(ErrorKind::Unsupported, kind, offset, why))
            }
        }
    }

    /// A command is over for good.
    #[inline]
    pub(super) fn finish_command(&self, table: &mut Table, index: u32, result: Result<()>) {
        let number = table.commands[index as usize].request;
        table.free_command(index);
        let Some(request) = table.request(number) else {
            return;
        };
        request.commands -= 1;
        if let Err(error) = result {
            request.error.get_or_insert(error);
        }
        if request.commands == 0 {
            self.io().complete(request.op);
        }
    }

    /// A command is not its machine's any more.
    #[inline]
    pub(super) fn returned(&self, table: &mut Table, index: u32) {
        let command = &mut table.commands[index as usize];
        let number = command.request;
        if let State::InFlight { queue, .. } = std::mem::replace(&mut command.state, State::Put) {
            queue.in_flight.set(queue.in_flight.get() - 1);
            if table.alone == Some(index) {
                table.alone = None;
            }
            if let Some(request) = table.request(number) {
                request.in_flight -= 1;
                if request.in_flight == 0 {
                    self.io().set_under_way(request.op, false);
                }
            }
        }
    }

    /// Takes what a machine says has ended.
    #[inline]
    pub(super) fn commands_ended(self: &Rc<Self>, queue: &Rc<Queue>, ended: &mut Vec<Ended>) {
        let mut table = self.table.borrow_mut();
        for one in ended.drain(..) {
            let index = one.user;
            let is_its = |state: &State| matches!(state, State::InFlight { queue: q, tag } if Rc::ptr_eq(q, queue) && *tag == one.tag);
            let command = table.commands.get(index as usize);
            if !command.is_some_and(|command| is_its(&command.state)) {
                continue;
            }
            self.returned(&mut table, index);
            match one.status.class() {
                Class::Ok => self.finish_command(&mut table, index, Ok(())),
                class => self.failed(&mut table, queue, index, one.status, class),
            }
        }
        let waiting = !table.waiting.is_empty();
        drop(table);
        if waiting {
            self.pump();
        }
    }

    /// Begins what waits, in its order, as far as that is possible; fails what has no hope. A command that may make
    /// the controller break the protocol goes alone, so that it takes no other along again and again.
    #[cold]
    pub(in super::super) fn pump(&self) {
        let mut table = self.table.borrow_mut();
        while let (None, Some(&index)) = (table.alone, table.waiting.front()) {
            let suspect = table.commands[index as usize].is_suspect();
            if suspect && table.is_any_in_flight() {
                return;
            }
            table.waiting.pop_front();
            table.commands[index as usize].state = State::Put;
            let number = table.commands[index as usize].request;
            let Some(request) = table.request(number) else {
                continue;
            };
            if request.cancelled || request.error.is_some() {
                self.finish_command(&mut table, index, Ok(()));
                continue;
            }
            if self.io().waiter_is_held(request.op) {
                // Its task is to be removed, and takes it along.
                continue;
            }
            let begun = self.try_begin(&mut table, index);
            let state = &table.commands[index as usize].state;
            if suspect && matches!(state, State::InFlight { .. }) {
                table.alone = Some(index);
            }
            match begun {
                Begun::All => {}
                Begun::Full(rest) => {
                    table.wait_in_order(rest);
                    return;
                }
                Begun::NoPath(rest) => {
                    table.wait_in_order(rest);
                    let Some((kind, why)) = self.hopeless() else {
                        return;
                    };
                    self.fail_all_waiting(&mut table, kind, &why);
                    return;
                }
            }
        }
    }

    #[cold]
    fn fail_all_waiting(&self, table: &mut Table, kind: ErrorKind, why: &str) {
        while let Some(index) = table.waiting.pop_front() {
            let command = &table.commands[index as usize];
            let error = self.error(kind, command.kind, command.extent.offset, why);
            self.finish_command(table, index, Err(error));
        }
    }

    /// Gives a request back that has ended; returns its error.
    #[inline]
    fn release(&self, request: u32) -> Option<Error> {
        let request = self.table.borrow_mut().free_request(request)?;
        self.io().release_software(request.op);
        request.error
    }

    /// Gives a request up. Its memory is not touched any more when this returns.
    #[cold]
    fn cancel(&self, request: u32) {
        let mut table = self.table.borrow_mut();
        let Some(entry) = table.request(request) else {
            return;
        };
        entry.cancelled = true;
        let in_flight = |index: u32| match &table.commands[index as usize].state {
            State::InFlight { queue, .. } => Some(queue.clone()),
            _ => None,
        };
        let queues: Vec<Rc<Queue>> = table.of(request).filter_map(in_flight).collect();
        drop(table);
        let is_free = || {
            let mut table = self.table.borrow_mut();
            table
                .request(request)
                .is_none_or(|entry| entry.in_flight == 0)
        };
        let tasks: Vec<_> = queues.iter().flat_map(|queue| queue.tasks()).collect();
        if !is_free() && !self.io().drive(&tasks, is_free, PATIENCE) {
            let why = "a request was given up while it was under way";
            queues
                .iter()
                .for_each(|queue| queue.cut(self, Why::Failed(why.into())));
        }
        let mut table = self.table.borrow_mut();
        let left: Vec<u32> = table.of(request).collect();
        for index in left {
            table.waiting.retain(|other| *other != index);
            self.finish_command(&mut table, index, Ok(()));
        }
        drop(table);
        self.release(request);
    }
}
