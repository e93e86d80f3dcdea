//! A path's life: connect, serve, connect again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::association::Association;
use super::backoff::Backoff;
use super::common::{Common, End, FOREVER};
use super::dial::Resolver;
use super::mailbox::Mailbox;
use super::members::Members;
use super::setup::pause;
use super::trouble::{Again, Failure, Result, Trouble};
use super::wait::{Waiter, Want};
use crate::block::nvme_tcp::link::{PathCommand, PathState, SharedPath};
use crate::block::nvme_tcp::spec::Address;

/// How long a namespace that is missing after a loss is looked for: a target that starts may listen before it has
/// all its namespaces.
const GONE_GRACE: Duration = Duration::from_secs(10);
/// A failure that is told already is told again after this time.
const TELL_AGAIN: Duration = Duration::from_secs(30);

/// When a time is over that began at `since`. One that the clock cannot tell is never over.
fn after(since: Instant, time: Option<Duration>) -> Option<Instant> {
    time.and_then(|time| since.checked_add(time))
}

/// One path's thread.
pub(crate) struct Path {
    index: usize,
    label: String,
    address: Address,
    common: Arc<Common>,
    shared: Arc<SharedPath>,
    mailbox: Mailbox,
    resolver: Resolver,
    members: Members,
    generation: u64,
    /// What was told last of failures, and when.
    told: Option<(String, Instant)>,
}

/// Whatever ends the thread, the path is over then.
struct Ended(Arc<SharedPath>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.set_state(PathState::Lost);
        self.0.set_ended();
    }
}

impl Path {
    pub(crate) fn new(common: Arc<Common>, index: usize) -> Self {
        let address = common.spec.addresses[index].clone();
        let label = format!("{} via {address}", common.spec.subsystem);
        Self {
            index,
            members: Members::new(index, label.clone()),
            label,
            address,
            shared: common.shared(index).clone(),
            mailbox: Mailbox::new(common.clone(), index),
            resolver: Resolver::default(),
            common,
            generation: 0,
            told: None,
        }
    }

    /// The thread.
    pub(crate) fn run(mut self) {
        let _ended = Ended(self.shared.clone());
        if let Err(Trouble::Failed(failure)) = self.live() {
            log::error!("{}: {}", self.label, failure.text);
        }
        self.shared.set_state(PathState::Lost);
        self.members.lost(self.generation);
        self.common.ended(self.index, End::Lost);
        self.common.tell_all();
        log::debug!("{}: closed", self.label);
    }

    /// Until somebody closes the path.
    fn live(&mut self) -> Result<()> {
        let options = self.common.spec.options.clone();
        let mut backoff = Backoff::new(options.reconnect_delay);
        let mut since = Instant::now();
        // To begin with, a path may take as long as any connecting may.
        let at_first = options
            .ctrl_loss
            .map(|time| time.max(options.connect_timeout));
        let mut given_up = after(since, at_first);
        // A path that never was connected does not make requests wait for longer than one that was lost.
        self.mailbox
            .fail_fast_at(after(since, options.fast_io_fail));
        loop {
            let delay = backoff.delay();
            self.wait_meanwhile(delay)?;
            let now = Instant::now();
            let deadline = now + options.connect_timeout;
            let deadline = given_up.map_or(deadline, |at| at.min(deadline));
            let failure = match self.establish(deadline) {
                Ok(mut association) => {
                    let up = Instant::now();
                    self.told = None;
                    let end = association.serve(&mut self.mailbox, &mut self.members);
                    let failure = self.lost(association, end)?;
                    backoff.lived(up.elapsed());
                    since = Instant::now();
                    given_up = after(since, options.ctrl_loss);
                    self.mailbox
                        .fail_fast_at(after(since, options.fast_io_fail));
                    match failure.again {
                        // The target has said so, and not while it was starting.
                        Again::Gone | Again::Replaced => return self.give_up(End::Gone, &failure),
                        // Whatever one command ended with, a new association may do better.
                        Again::Later | Again::Never => continue,
                    }
                }
                Err(Trouble::Closed) => return Err(Trouble::Closed),
                Err(Trouble::Failed(failure)) => {
                    self.common.failed(self.index, &failure);
                    self.tell(&failure);
                    failure
                }
            };
            let end = match failure.again {
                Again::Never => End::Lost,
                Again::Replaced => End::Gone,
                Again::Gone if since.elapsed() >= GONE_GRACE => End::Gone,
                _ if given_up.is_some_and(|at| Instant::now() >= at) => End::Lost,
                _ => continue,
            };
            return self.give_up(end, &failure);
        }
    }

    /// Connects, and finds the namespace.
    fn establish(&mut self, deadline: Instant) -> Result<Association> {
        let addresses = self
            .resolver
            .resolve(&self.address, deadline, &mut self.mailbox)?;
        self.generation += 1;
        let addresses: &[SocketAddr] = &addresses;
        let target = &self.common.target;
        let kato = self.common.spec.options.keep_alive;
        let ready = target.admin(addresses, kato, deadline, &mut self.mailbox)?;
        let mut association = Association::new(
            self.common.clone(),
            (self.index, self.label.clone()),
            self.generation,
            ready,
            deadline,
            &mut self.mailbox,
        )?;
        self.take_commands();
        if let Err(trouble) = association.connect_members(&mut self.mailbox, &mut self.members) {
            // Those that got a queue before one failed have to know that it ends, or they were never given another.
            self.common.unsized_by(self.index);
            self.members.lost(self.generation);
            drop(association);
            self.common.tell_all();
            return Err(trouble);
        }
        self.mailbox.fail_fast_at(None);
        association.begin(&self.members);
        Ok(association)
    }

    /// An association has ended. What it failed with, unless the path is to be closed.
    fn lost(&mut self, association: Association, end: Trouble) -> Result<Failure> {
        match end {
            Trouble::Closed => {
                self.shared.set_state(PathState::Lost);
                self.members.lost(self.generation);
                association.shut_down();
                Err(Trouble::Closed)
            }
            Trouble::Failed(failure) => {
                self.common.unsized_by(self.index);
                self.shared.set_state(PathState::Connecting);
                self.members.lost(self.generation);
                drop(association);
                self.common.tell_all();
                log::warn!("{}: lost: {}", self.label, failure.text);
                Ok(failure)
            }
        }
    }

    /// The path is of no use any more: says so, and waits to be closed.
    fn give_up(&mut self, end: End, failure: &Failure) -> Result<()> {
        self.mailbox.fail_fast_at(None);
        self.shared.set_state(PathState::Lost);
        log::error!(
            "{}: given up: {}; it is not tried again: attach the disk anew, or start virtioblkd again, once the \
             target is well",
            self.label,
            failure.text
        );
        self.common.ended(self.index, end);
        self.members.give_up(&failure.text);
        self.common.tell_all();
        loop {
            self.mailbox.wait(Want::Time, Instant::now() + FOREVER)?;
            self.take_commands();
        }
    }

    /// Waits for a time, and takes what comes to the mailbox meanwhile.
    fn wait_meanwhile(&mut self, time: Duration) -> Result<()> {
        pause(time, &mut self.mailbox)?;
        self.take_commands();
        Ok(())
    }

    /// Commands while there is no association: only who wants queues counts.
    fn take_commands(&mut self) {
        while let Some(command) = self.mailbox.next() {
            match command {
                PathCommand::Join(member) => self.members.join(member),
                PathCommand::Leave { member } => drop(self.members.leave(member)),
                // They are about associations that are over.
                PathCommand::QueueFailed { .. }
                | PathCommand::Abort { .. }
                | PathCommand::LookAtAccess { .. }
                | PathCommand::Close => {}
            }
        }
    }

    /// Logs why an attempt failed, unless it was told just before.
    fn tell(&mut self, failure: &Failure) {
        let known = self
            .told
            .as_ref()
            .is_some_and(|(text, at)| *text == failure.text && at.elapsed() < TELL_AGAIN);
        if !known {
            log::warn!("{}: not connected: {}", self.label, failure.text);
            self.told = Some((failure.text.clone(), Instant::now()));
        }
    }
}
