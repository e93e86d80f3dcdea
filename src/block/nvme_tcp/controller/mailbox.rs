//! A path's end of its mailbox: commands are taken whenever its thread waits, whatever it waits for.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Aside, Channel, succeeded};
use super::common::Common;
use super::trouble::{Result, Trouble, later};
use super::wait::{Patience, Waiter, Want, poll, pollfd};
use crate::block::nvme_tcp::link::{PathCommand, PathState, SharedPath};
use crate::block::nvme_tcp::wire::Sqe;
use crate::block::nvme_tcp::wire::command::property;

/// How long the kernel may take to take a Keep Alive.
const TO_SEND: Duration = Duration::from_secs(1);

/// Commands to a path.
#[derive(Debug)]
pub(crate) struct Mailbox {
    common: Arc<Common>,
    shared: Arc<SharedPath>,
    commands: VecDeque<PathCommand>,
    closing: bool,
    /// When requests are no longer held, unless the path is back by then.
    fail_fast_at: Option<Instant>,
}

impl Mailbox {
    pub(crate) fn new(common: Arc<Common>, path: usize) -> Self {
        Self {
            shared: common.shared(path).clone(),
            common,
            commands: VecDeque::new(),
            closing: false,
            fail_fast_at: None,
        }
    }

    /// The next command.
    pub(crate) fn next(&mut self) -> Option<PathCommand> {
        self.commands.pop_front()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    /// From `at` on the path is one that requests do not wait for.
    pub(crate) fn fail_fast_at(&mut self, at: Option<Instant>) {
        self.fail_fast_at = at;
    }

    /// Waits for `wants` as well as for commands. True for each that is there.
    fn wait_for<const N: usize>(
        &mut self,
        wants: [Want<'_>; N],
        deadline: Instant,
    ) -> Result<[bool; N]> {
        if self.closing {
            return Err(Trouble::Closed);
        }
        let deadline = self.fail_fast_at.map_or(deadline, |at| at.min(deadline));
        let wake = libc::pollfd {
            fd: self.shared.wake().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [wake; 3];
        for (fd, want) in fds[1..].iter_mut().zip(wants) {
            *fd = pollfd(want);
        }
        poll(&mut fds[..N + 1], Some(deadline)).map_err(|error| later(format!("poll: {error}")))?;
        if fds[0].revents != 0 {
            for command in self.shared.take_commands() {
                match command {
                    PathCommand::Close => self.closing = true,
                    command => self.commands.push_back(command),
                }
            }
        }
        if self.fail_fast_at.is_some_and(|at| Instant::now() >= at) {
            self.fail_fast_at = None;
            self.shared.set_state(PathState::FailingFast);
            self.common.tell_all();
        }
        match self.closing {
            true => Err(Trouble::Closed),
            false => Ok(std::array::from_fn(|at| fds[at + 1].revents != 0)),
        }
    }
}

impl Waiter for Mailbox {
    fn wait(&mut self, want: Want<'_>, deadline: Instant) -> Result<bool> {
        self.wait_for([want], deadline).map(|[there]| there)
    }
}

/// When Keep Alive commands are sent and answered (Base section 3.9). The controller's timer counts from one that
/// it got; so with one sent each half of it, one may be late.
///
/// A controller with traffic-based keep-alive (CTRATT.TBKAS) would do without those while there is traffic. They
/// are sent all the same: what the workers send is not visible here, and counting it would cost each request more
/// than two small commands in a few seconds cost a path.
#[derive(Debug)]
pub(crate) struct Heart {
    /// KATO; zero: there is no timer.
    kato: Duration,
    next: Instant,
    /// When the one that is under way was sent.
    waiting_since: Option<Instant>,
}

impl Heart {
    pub(crate) fn new(kato: Duration) -> Self {
        Self {
            kato,
            next: Instant::now(),
            waiting_since: None,
        }
    }

    /// When [`Heart::beat`] has something to do; none: never.
    pub(crate) fn due(&self) -> Option<Instant> {
        (!self.kato.is_zero()).then(|| match self.waiting_since {
            Some(since) => since + self.kato,
            None => self.next,
        })
    }

    /// Sends a Keep Alive if it is time for one. Beside it the controller is asked for its status: nothing else
    /// would tell that it has failed while the connection is well.
    pub(crate) fn beat(&mut self, channel: &mut Channel) -> Result<()> {
        let now = Instant::now();
        if self.due().is_none_or(|due| now < due) {
            return Ok(());
        }
        if self.waiting_since.is_some() {
            // The answer may have come while this thread, and not the controller, took its time.
            channel.pump()?;
            self.listen(channel)?;
        }
        if self.waiting_since.is_some() {
            return Err(later(format!(
                "no answer to a Keep Alive within {} ms",
                self.kato.as_millis()
            )));
        }
        self.waiting_since = Some(now);
        self.next = now + self.kato / 2;
        let deadline = now + TO_SEND.min(self.kato);
        channel.send_aside(Sqe::keep_alive(), Aside::KeepAlive, deadline, &mut Patience)?;
        if channel.asides(|aside| *aside == Aside::ControllerStatus) == 0 {
            let sqe = Sqe::property_get(property::CSTS, false);
            channel.send_aside(sqe, Aside::ControllerStatus, deadline, &mut Patience)?;
        }
        Ok(())
    }

    /// Looks whether the one under way was answered.
    pub(crate) fn listen(&mut self, channel: &mut Channel) -> Result<()> {
        if let Some(end) = channel.ended_of(Aside::KeepAlive) {
            succeeded(end, "Keep Alive")?;
            self.waiting_since = None;
        }
        Ok(())
    }
}

/// Waits for something of one queue while the admin queue is kept alive, and for what comes to it.
pub(crate) struct WhileAlive<'a> {
    pub(crate) mailbox: &'a mut Mailbox,
    pub(crate) channel: &'a mut Channel,
    pub(crate) heart: &'a mut Heart,
}

impl Waiter for WhileAlive<'_> {
    fn wait(&mut self, want: Want<'_>, deadline: Instant) -> Result<bool> {
        self.heart.beat(self.channel)?;
        let until = self.heart.due().map_or(deadline, |due| due.min(deadline));
        let wants = [want, Want::Read(self.channel.fd())];
        let [there, admin] = self.mailbox.wait_for(wants, until)?;
        if admin {
            self.channel.pump()?;
            self.heart.listen(self.channel)?;
        }
        Ok(there)
    }
}

/// Waits for commands, for the admin queue and for a time.
pub(crate) fn idle(mailbox: &mut Mailbox, channel: &Channel, until: Instant) -> Result<()> {
    mailbox
        .wait_for([Want::Read(channel.fd())], until)
        .map(|_| ())
}
