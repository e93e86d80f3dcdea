//! What becomes of commands that failed, lost their connection, or take too long.

use std::rc::Rc;
use std::time::Duration;

use super::connection::{Queue, Why};
use super::table::{Command, State, Table};
use crate::block::error::{Error, ErrorKind};
use crate::block::nvme_tcp::link::PathCommand;
use crate::block::nvme_tcp::local::Local;
use crate::block::nvme_tcp::wire::Status;
use crate::block::nvme_tcp::wire::status::Class;

/// A command is sent this often again after failures of its own: as many as Linux's nvme_max_retries.
const RETRIES: u8 = 5;
/// Delays of commands that fail by their path's fault are doubled this often at most.
const MAX_DOUBLINGS: u32 = 4;
/// Unit of the controller's retry delays (Base, Identify Controller: CRDT1).
const DELAY_UNIT: Duration = Duration::from_millis(100);

impl Local {
    /// Decides what becomes of a command that the controller has failed: see Linux's nvme_decide_disposition.
    #[cold]
    pub(super) fn failed(
        self: &Rc<Self>,
        table: &mut Table,
        queue: &Rc<Queue>,
        index: u32,
        status: Status,
        class: Class,
    ) {
        let cancelled = {
            let request = table.commands[index as usize].request;
            table
                .request(request)
                .is_none_or(|r| r.cancelled || r.error.is_some())
        };
        let command = &mut table.commands[index as usize];
        let (kind, offset) = (command.kind, command.extent.offset);
        let fail = |table: &mut Table| {
            let what = format!("{} failed: {status}", kind.name());
            let name = self.namespace().name();
            let error = Error::image(status.kind(), name, offset, what);
            let error = match status.advice() {
                Some(advice) => error.hint(advice),
                None => error,
            };
            self.finish_command(table, index, Err(error));
        };
        let mut delay = Duration::ZERO;
        match class {
            // Another path may do, and this one when its thread has looked.
            Class::AnaChange | Class::PathError => {
                self.distrust(queue);
                match self.path_failed(command) {
                    Some(wait) => delay = wait,
                    None => command.failures = u8::MAX,
                }
            }
            Class::Authenticate => {
                command.failures = command.failures.saturating_add(1);
                queue.end(self, Why::Failed(status.to_string()));
            }
            Class::Retry { crd } => {
                command.failures = command.failures.saturating_add(1);
                let units = usize::from(crd)
                    .checked_sub(1)
                    .and_then(|at| queue.limits.retry_delays.get(at));
                delay = units.map_or(delay, |units| DELAY_UNIT * u32::from(*units));
            }
            Class::Ok | Class::Fail => command.failures = u8::MAX,
        }
        if cancelled || command.failures > RETRIES {
            return fail(table);
        }
        // A target may name hours.
        let longest = self.namespace().spec().options.io_timeout;
        match delay.is_zero() {
            true => table.wait_in_order(index),
            false => self.retry_later(table, index, delay.min(longest)),
        }
    }

    /// How long a command waits that has failed by its path's fault; none: it has done so for longer than a
    /// command is held. Once round the paths it goes on at once. Then it waits longer each time: paths that say
    /// that they are good, and are not, would be asked as fast as they answer.
    #[cold]
    fn path_failed(&self, command: &mut Command) -> Option<Duration> {
        if command.path_failures == 0 {
            command.path_failed_at = self.now.get();
        }
        command.path_failures = command.path_failures.saturating_add(1);
        let age = self.now.get().wrapping_sub(command.path_failed_at);
        if self.held_at_most.is_some_and(|at_most| age > at_most) {
            return None;
        }
        let paths = u32::try_from(self.namespace().paths().len()).unwrap_or(u32::MAX);
        let Some(rounds) = command.path_failures.checked_sub(paths) else {
            return Some(Duration::ZERO);
        };
        Some(DELAY_UNIT.min(self.tick) * (1 << rounds.min(MAX_DOUBLINGS)))
    }

    #[cold]
    fn retry_later(self: &Rc<Self>, table: &mut Table, index: u32, delay: Duration) {
        let number = table.commands[index as usize].number;
        let local = self.clone();
        let _task = self.io().spawn(async move {
            local.io().sleep(delay).await;
            let mut table = local.table.borrow_mut();
            let command = &table.commands[index as usize];
            if command.number == number && matches!(command.state, State::Put) {
                table.wait_in_order(index);
                drop(table);
                local.pump();
            }
        });
    }

    /// A queue has ended, and nothing of it touches memory any more: its commands are done again elsewhere. They
    /// may have been executed; doing the same to the same place once more changes nothing, because their callers
    /// have not been told of any end.
    ///
    /// Executed late they do change something: what was written to the same place after the repetition was
    /// answered. So what changes data waits until the controller has granted the same queue again, which it does
    /// only when it is done with the old one, or until the association is lost.
    #[cold]
    pub(super) fn queue_is_over(&self, queue: &Rc<Queue>) {
        let fenced = self.is_fenced(queue);
        let violated = queue.violated.get();
        let mut table = self.table.borrow_mut();
        let alone = table.alone;
        let is_its = |state: &State| matches!(state, State::InFlight { queue: q, .. } if Rc::ptr_eq(q, queue));
        for index in 0..table.commands.len() as u32 {
            let command = &table.commands[index as usize];
            if !is_its(&command.state) {
                continue;
            }
            let (kind, offset) = (command.kind, command.extent.offset);
            let failures = command.failures;
            // One of them may be what the controller cannot answer, and would go round and round.
            let counts = violated && (alone == Some(index) || !command.is_suspect());
            let violations = command.violations.saturating_add(counts.into());
            self.returned(&mut table, index);
            table.commands[index as usize].violations = violations;
            let why = if violations > RETRIES {
                "the controller breaks the protocol again and again; look at the log, and at the target's version"
            } else if failures > RETRIES {
                "it got no answer in time, again and again; look at the target's storage"
            } else {
                ""
            };
            if !why.is_empty() {
                let error = self.error(ErrorKind::Io, kind, offset, why);
                self.finish_command(&mut table, index, Err(error));
            } else if fenced && kind.changes_data() {
                let path = queue.path;
                table.commands[index as usize].state = State::Fenced { path };
            } else {
                table.wait_in_order(index);
            }
        }
        drop(table);
        self.pump();
    }

    /// Commands that take too long are aborted; if that does not help, their connection is ended.
    #[cold]
    pub(in super::super) fn look_after_slow_commands(&self) {
        let now = self.now.get();
        let mut late: Vec<Rc<Queue>> = Vec::new();
        let mut table = self.table.borrow_mut();
        for command in &mut table.commands {
            let State::InFlight { queue, tag } = &command.state else {
                continue;
            };
            let (queue, tag) = (queue.clone(), *tag);
            let age = now.wrapping_sub(command.begun);
            if age > self.patience.saturating_mul(2) {
                command.failures = command.failures.saturating_add(1);
                if !late.iter().any(|other| Rc::ptr_eq(other, &queue)) {
                    late.push(queue);
                }
            } else if age > self.patience && !command.aborted {
                command.aborted = true;
                let abort = PathCommand::Abort {
                    generation: queue.generation,
                    qid: queue.qid,
                    cid: tag.cid(),
                };
                self.tell(queue.path, abort);
            }
        }
        drop(table);
        for queue in late {
            let seconds = self.namespace().spec().options.io_timeout.as_secs_f32() * 2.0;
            let why = format!("a command has got no answer for {seconds} s, nor has its abort");
            queue.end(self, Why::Failed(why));
        }
    }

    /// To be called once a tick while no path is usable.
    #[cold]
    pub(in super::super) fn look_after_held_commands(&self, at_most: u32) {
        let mut table = self.table.borrow_mut();
        let mut index = 0;
        while let Some(number) = table.waiting.get(index).copied() {
            let command = &mut table.commands[number as usize];
            command.held = command.held.saturating_add(1);
            if command.held <= at_most {
                index += 1;
                continue;
            }
            let (kind, offset) = (command.kind, command.extent.offset);
            table.waiting.remove(index);
            let why = "no path has been usable for longer than ctrl-loss-tmo; look at the target and at \
                       the network";
            let error = self.error(ErrorKind::Io, kind, offset, why);
            self.finish_command(&mut table, number, Err(error));
        }
    }
}
