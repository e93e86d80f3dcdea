//! The requests of one thread and the commands that they are made of.
//!
//! A request is what a caller waits for: one transfer, of any length. A command is a part of it that one controller
//! takes at one go. How a request is cut depends on the controller, so it is done when a command is begun: the rest
//! becomes a command of its own. Entries are used again and again: in the steady state nothing is allocated.

use std::collections::VecDeque;
use std::rc::Rc;

use super::connection::Queue;
use crate::block::error::Error;
use crate::block::nvme_tcp::machine::Tag;
use crate::block::nvme_tcp::reservation::Action;
use crate::reactor::{Sg, SoftwareOp};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    Read,
    Write,
    /// Nothing: it has ended once a path is usable.
    Wait,
    /// Make durable what was completed.
    Flush,
    /// Deallocate; the data is the list of ranges.
    Discard {
        /// How many ranges are in the list.
        ranges: u16,
    },
    /// Make it read as zeros.
    WriteZeroes {
        /// Its space may be given back.
        deallocate: bool,
    },
    /// Something about reservations; the data is the command's.
    Reservation(Action),
}

impl Kind {
    /// True if it changes the namespace's data: done late, it undoes what came after it.
    pub(in super::super) fn changes_data(self) -> bool {
        matches!(
            self,
            Self::Write | Self::Discard { .. } | Self::WriteZeroes { .. }
        )
    }

    /// For messages.
    pub(in super::super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Wait => "wait for a path",
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::WriteZeroes { .. } => "write zeroes",
            Self::Reservation(action) => action.name(),
        }
    }
}

/// A range, in bytes, whole blocks; and the memory that is transferred.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Extent {
    pub(in super::super) offset: u64,
    pub(in super::super) len: u64,
    /// Whoever made the request keeps the memory until it has ended or was cancelled.
    pub(in super::super) data: Sg<'static>,
}

#[derive(Debug)]
pub(super) enum State {
    Free,
    /// In [`Table::waiting`]: for room in a queue, or for a path.
    Waiting,
    /// For the end of a delay, or for being cancelled.
    Put,
    /// For this path to be connected again: its controller may still execute it.
    Fenced {
        path: usize,
    },
    InFlight {
        queue: Rc<Queue>,
        tag: Tag,
    },
}

#[derive(Debug)]
pub(super) struct Command {
    pub(super) request: u32,
    pub(super) kind: Kind,
    pub(super) extent: Extent,
    pub(super) state: State,
    /// Order of arrival.
    pub(super) number: u64,
    /// Failures so far that are not the connections'.
    pub(super) failures: u8,
    /// Connections that ended by a violation of the protocol while it was under way.
    pub(super) violations: u8,
    /// Failures in a row that were the path's, and the tick of the first of them.
    pub(super) path_failures: u32,
    pub(super) path_failed_at: u32,
    /// Ticks that it has waited while no path was usable, since it was begun last.
    pub(super) held: u32,
    /// Tick at which it was begun last.
    pub(super) begun: u32,
    /// It took too long and was to be aborted.
    pub(super) aborted: bool,
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) op: SoftwareOp,
    /// Commands that have not ended.
    pub(super) commands: u32,
    /// Commands that a machine has.
    pub(super) in_flight: u32,
    pub(super) error: Option<Error>,
    /// Nobody wants its result any more.
    pub(super) cancelled: bool,
}

#[derive(Debug)]
pub(in super::super) struct Table {
    pub(super) requests: Vec<Option<Request>>,
    free_requests: Vec<u32>,
    pub(super) commands: Vec<Command>,
    free_commands: Vec<u32>,
    /// In order of arrival.
    pub(super) waiting: VecDeque<u32>,
    /// The command that is under way with no other beside it; none is begun until it has come back.
    pub(super) alone: Option<u32>,
    next_number: u64,
}

/// Entries made at first.
const CAPACITY: usize = 128;
/// So many violations of the protocol may be chance, or the doing of another command that was under way. From then
/// on a command is sent alone, and further ones are its own.
const SUSPECT: u8 = 2;

impl Command {
    /// True if the controller's violations may be its doing.
    pub(super) fn is_suspect(&self) -> bool {
        self.violations >= SUSPECT
    }
}

impl Table {
    pub(in super::super) fn new() -> Self {
        Self {
            requests: Vec::with_capacity(CAPACITY),
            free_requests: Vec::with_capacity(CAPACITY),
            commands: Vec::with_capacity(CAPACITY),
            free_commands: Vec::with_capacity(CAPACITY),
            waiting: VecDeque::with_capacity(CAPACITY),
            alone: None,
            next_number: 0,
        }
    }

    #[inline]
    pub(super) fn new_request(&mut self, op: SoftwareOp) -> u32 {
        let request = Some(Request {
            op,
            commands: 0,
            in_flight: 0,
            error: None,
            cancelled: false,
        });
        match self.free_requests.pop() {
            Some(index) => {
                self.requests[index as usize] = request;
                index
            }
            None => {
                self.requests.push(request);
                (self.requests.len() - 1) as u32
            }
        }
    }

    #[inline]
    pub(super) fn free_request(&mut self, index: u32) -> Option<Request> {
        let request = self.requests.get_mut(index as usize)?.take();
        if request.is_some() {
            self.free_requests.push(index);
        }
        request
    }

    #[inline]
    pub(super) fn new_command(&mut self, request: u32, kind: Kind, extent: Extent) -> u32 {
        let number = self.next_number;
        self.next_number += 1;
        let command = Command {
            request,
            kind,
            extent,
            state: State::Put,
            number,
            failures: 0,
            violations: 0,
            path_failures: 0,
            path_failed_at: 0,
            held: 0,
            begun: 0,
            aborted: false,
        };
        if let Some(request) = self.request(request) {
            request.commands += 1;
        }
        match self.free_commands.pop() {
            Some(index) => {
                self.commands[index as usize] = command;
                index
            }
            None => {
                self.commands.push(command);
                (self.commands.len() - 1) as u32
            }
        }
    }

    #[inline]
    pub(super) fn free_command(&mut self, index: u32) {
        let command = &mut self.commands[index as usize];
        command.state = State::Free;
        command.extent.data = Sg::empty();
        self.free_commands.push(index);
    }

    #[inline]
    pub(super) fn request(&mut self, index: u32) -> Option<&mut Request> {
        self.requests.get_mut(index as usize)?.as_mut()
    }

    /// True if a machine has a command.
    pub(super) fn is_any_in_flight(&self) -> bool {
        let in_flight = |command: &Command| matches!(command.state, State::InFlight { .. });
        self.commands.iter().any(in_flight)
    }

    /// True if there is a request.
    pub(in super::super) fn is_busy(&self) -> bool {
        self.requests.len() > self.free_requests.len()
    }

    /// The commands of one request.
    pub(super) fn of(&self, request: u32) -> impl Iterator<Item = u32> + '_ {
        let all = (0u32..).zip(&self.commands);
        all.filter(move |(_, command)| {
            command.request == request && !matches!(command.state, State::Free)
        })
        .map(|(index, _)| index)
    }

    /// What waited for this path waits like everything else.
    pub(in super::super) fn lift_fence(&mut self, path: usize) {
        for index in 0..self.commands.len() as u32 {
            let state = &self.commands[index as usize].state;
            if matches!(state, State::Fenced { path: its } if *its == path) {
                self.wait_in_order(index);
            }
        }
    }

    /// Puts a command where it was by its arrival.
    pub(super) fn wait_in_order(&mut self, index: u32) {
        let number = self.commands[index as usize].number;
        let commands = &self.commands;
        let before = |other: &u32| commands[*other as usize].number < number;
        let place = self.waiting.partition_point(before);
        self.waiting.insert(place, index);
        self.commands[index as usize].state = State::Waiting;
    }
}
