//! One association: an admin queue that is served, and the I/O queues that belong to it.

mod events;

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ana::Ana;
use super::channel::Aside;
use super::common::Common;
use super::mailbox::{Heart, Mailbox, WhileAlive, idle};
use super::members::{Held, Members};
use super::setup::{
    CC_SHN, CC_SHN_NORMAL, CSTS_CFS, CSTS_SHST, CSTS_SHST_COMPLETE, Ground, Ready, get, pause, set,
};
use super::talk::Talk;
use super::trouble::{Failure, Result, Trouble, later};
use super::wait::Patience;
use crate::block::nvme_tcp::link::{
    IoConnection, MemberEvent, Namespace, PathCommand, PathState, Wire,
};
use crate::block::nvme_tcp::wire::command::property;
use crate::block::nvme_tcp::wire::{Cqe, Sqe};

/// Asynchronous Event Requests kept outstanding, at most; the controller may take fewer (AERL).
const MAX_EVENTS: usize = 4;
/// Aborts that wait for others to end, at most: the commands of all that are dropped have other timeouts.
const MAX_ABORTS: usize = 256;
/// Commands of members that are looked at before anything else is.
const COMMANDS_A_TURN: usize = 64;
/// How long the kernel may take to take a small command.
const TO_SEND: Duration = Duration::from_secs(1);
/// How long the controller gets to shut down. A target that takes longer does so on its own.
const TO_SHUT_DOWN: Duration = Duration::from_secs(1);
/// I/O queues that are asked for; the controller grants what it has. One for each of the most workers that there
/// can be, and two for those that join a little before others leave.
const QUEUES: u16 = 258;

/// A connected controller.
#[derive(Debug)]
pub(crate) struct Association {
    common: Arc<Common>,
    namespace: Arc<Namespace>,
    path: usize,
    label: String,
    generation: u64,
    ready: Ready,
    ground: Ground,
    heart: Heart,
    ana: Option<Ana>,
    /// Identifiers of I/O queues that nobody has, the one that was free for the longest time first.
    free: VecDeque<u16>,
    aborts: VecDeque<(u16, u16)>,
    events: usize,
    talk: Talk,
}

impl Association {
    /// Sets a controller up that is ready, finds the namespace on it, and reads its access state.
    pub(crate) fn new(
        common: Arc<Common>,
        (path, label): (usize, String),
        generation: u64,
        mut ready: Ready,
        deadline: Instant,
        mailbox: &mut Mailbox,
    ) -> Result<Self> {
        let name = &common.spec.namespace;
        let ground = ready.ground(&common.target, name, QUEUES, deadline, mailbox)?;
        let namespace = common.found(path, &ground.facts)?;
        let kato = common.spec.options.keep_alive;
        let mut association = Self {
            namespace,
            path,
            label,
            generation,
            heart: Heart::new(kato),
            ana: Ana::of(&ready.controller),
            free: (1..=ground.granted).collect(),
            aborts: VecDeque::new(),
            events: (usize::from(ready.controller.aerl) + 1).min(MAX_EVENTS),
            talk: Talk::new(),
            ready,
            ground,
            common,
        };
        association.read_access(deadline, mailbox)?;
        association.apply_facts();
        Ok(association)
    }

    /// The deadline of one step of serving.
    fn step(&self) -> Instant {
        Instant::now() + self.common.spec.options.connect_timeout
    }

    /// The path can be used from now on.
    pub(crate) fn begin(&mut self, members: &Members) {
        let shared = self.common.shared(self.path);
        shared.set_state(PathState::Live);
        self.namespace.tell_all();
        let access = match &self.ana {
            Some(_) => format!(", access {:?}", shared.access()),
            None => String::new(),
        };
        log::info!(
            "{}: connected: controller {} ({} {}), namespace {} of {} bytes, {} queues granted, {} of them in use{access}",
            self.label,
            self.ready.cntlid,
            self.ready.controller.mn,
            self.ready.controller.sn,
            self.ground.facts.nsid,
            self.ground.facts.bytes,
            self.ground.granted,
            members.with_queue(),
        );
    }

    /// Gives a queue to each member that has none.
    pub(crate) fn connect_members(
        &mut self,
        mailbox: &mut Mailbox,
        members: &mut Members,
    ) -> Result<()> {
        while let Some(number) = members.without_queue() {
            let granted = self.ground.granted;
            let free = match members.may_have_one(number, granted) {
                true => self.free.pop_front(),
                false => None,
            };
            let Some(qid) = free else {
                members.refuse(
                    number,
                    &format!(
                        "the controller grants only {granted} I/O queues, one more than workers are needed; use fewer \
                         workers, or let the target grant more"
                    ),
                );
                continue;
            };
            match self.connect_queue(qid, mailbox)? {
                Ok((connection, held)) => {
                    let Some(seat) = members.seat(number) else {
                        self.free.push_back(qid);
                        continue;
                    };
                    seat.queue = Some(held);
                    seat.member
                        .send(MemberEvent::Connected(Box::new(connection)));
                }
                Err(refusal) if refusal.for_good() => {
                    self.free.push_back(qid);
                    let why = match refusal.trouble {
                        Trouble::Failed(Failure { text, .. }) => text,
                        Trouble::Closed => return Err(Trouble::Closed),
                    };
                    members.refuse(
                        number,
                        &format!("the controller refuses queue {qid}: {why}"),
                    );
                }
                Err(refusal) => return Err(refusal.trouble.during(format!("I/O queue {qid}"))),
            }
        }
        Ok(())
    }

    fn connect_queue(
        &mut self,
        qid: u16,
        mailbox: &mut Mailbox,
    ) -> Result<std::result::Result<(IoConnection, Held), super::setup::Refusal>> {
        let deadline = self.step();
        let mut waiter = WhileAlive {
            mailbox,
            channel: &mut self.ready.channel,
            heart: &mut self.heart,
        };
        let ids = (qid, self.ready.cntlid);
        let target = &self.common.target;
        let connected = target.io_queue(
            self.ready.peer,
            ids,
            self.ground.entries,
            deadline,
            &mut waiter,
        );
        let channel =
            match connected.map_err(|trouble| trouble.during(format!("I/O queue {qid}")))? {
                Ok(channel) => channel,
                Err(refusal) => return Ok(Err(refusal)),
            };
        let depth = (self.ground.entries - 1) as u16;
        let params = channel.params(depth, self.ground.in_capsule);
        let wire = channel.into_wire()?;
        let second = second(&wire).map_err(|error| later(format!("I/O queue {qid}: {error}")))?;
        let connection = IoConnection {
            path: self.path,
            generation: self.generation,
            qid,
            wire,
            params,
            limits: self.ground.limits,
            nsid: self.ground.facts.nsid,
        };
        Ok(Ok((connection, Held::new(qid, second))))
    }

    /// Serves until something ends the association: what that was.
    pub(crate) fn serve(&mut self, mailbox: &mut Mailbox, members: &mut Members) -> Trouble {
        loop {
            if let Err(trouble) = self.turn(mailbox, members) {
                return trouble;
            }
        }
    }

    fn turn(&mut self, mailbox: &mut Mailbox, members: &mut Members) -> Result<()> {
        // Those that come meanwhile have to wait: the heart beats once a turn, however busy the members are.
        for _ in 0..COMMANDS_A_TURN {
            let Some(command) = mailbox.next() else {
                break;
            };
            // It waits for an answer.
            let is_slow = matches!(command, PathCommand::LookAtAccess { .. });
            self.command(command, mailbox, members)?;
            if is_slow {
                break;
            }
        }
        self.connect_members(mailbox, members)?;
        self.ask_for_events()?;
        self.send_aborts()?;
        self.heart.beat(&mut self.ready.channel)?;
        self.ana_timer(mailbox)?;
        // What came together with the end of another command is in memory already: the connection is not readable
        // for it.
        self.ready.channel.pump()?;
        self.heart.listen(&mut self.ready.channel)?;
        if mailbox.is_empty() && !self.ready.channel.has_ended() {
            let times = [self.heart.due(), self.ana.as_ref().and_then(Ana::deadline)];
            let until = times.into_iter().flatten().min();
            let until = until.unwrap_or_else(|| Instant::now() + super::common::FOREVER);
            idle(mailbox, &self.ready.channel, until)?;
        }
        self.ready.channel.pump()?;
        self.heart.listen(&mut self.ready.channel)?;
        while let Some((aside, end)) = self.ready.channel.ended() {
            self.ended(aside, &end, mailbox)?;
        }
        Ok(())
    }

    fn command(
        &mut self,
        command: PathCommand,
        mailbox: &mut Mailbox,
        members: &mut Members,
    ) -> Result<()> {
        match command {
            PathCommand::Join(member) => members.join(member),
            PathCommand::Leave { member } => {
                if let Some(qid) = members.leave(member) {
                    self.free.push_back(qid);
                    members.may_ask_again();
                }
            }
            PathCommand::QueueFailed {
                member,
                generation,
                why,
            } if generation == self.generation => {
                return self.remake(member, &why, mailbox, members);
            }
            PathCommand::Abort {
                generation,
                qid,
                cid,
            } if generation == self.generation => {
                if self.aborts.len() < MAX_ABORTS {
                    self.aborts.push_back((qid, cid));
                }
            }
            PathCommand::LookAtAccess { generation } if generation == self.generation => {
                let deadline = self.step();
                self.read_access(deadline, mailbox)?;
                self.namespace.tell_all();
            }
            PathCommand::Close => return Err(Trouble::Closed),
            // Of an earlier association, which is over.
            PathCommand::QueueFailed { .. }
            | PathCommand::Abort { .. }
            | PathCommand::LookAtAccess { .. } => {}
        }
        Ok(())
    }

    /// Connects one queue anew. The same identifier is used: the controller takes it again only when it has
    /// finished with all commands of the queue's earlier life, so none of them can be done after those that
    /// follow.
    fn remake(
        &mut self,
        number: u64,
        why: &str,
        mailbox: &mut Mailbox,
        members: &mut Members,
    ) -> Result<()> {
        let Some(seat) = members.seat(number) else {
            return Ok(());
        };
        let Some(held) = seat.queue.take() else {
            return Ok(());
        };
        let qid = held.qid;
        if held.fails_again() {
            // The path's own delays apply then.
            let text = format!("I/O queue {qid} fails again and again: {why}");
            return Err(later(text));
        }
        drop(held);
        // They are about commands that end with the connection; what follows may have their identifiers.
        self.aborts.retain(|(of, _)| *of != qid);
        log::warn!(
            "{}: I/O queue {qid} failed: {why}; connecting it again",
            self.label
        );
        let connected = self.connect_queue(qid, mailbox)?;
        let (connection, mut held) =
            connected.map_err(|refusal| refusal.trouble.during(format!("I/O queue {qid}")))?;
        held.remade = true;
        if let Some(seat) = members.seat(number) {
            seat.queue = Some(held);
            seat.member
                .send(MemberEvent::Connected(Box::new(connection)));
        }
        Ok(())
    }

    /// Sends Aborts, as many at a time as the controller takes (ACL).
    fn send_aborts(&mut self) -> Result<()> {
        let limit = usize::from(self.ready.controller.acl) + 1;
        let channel = &mut self.ready.channel;
        while channel.asides(|aside| matches!(aside, Aside::Abort { .. })) < limit {
            let Some((qid, cid)) = self.aborts.pop_front() else {
                break;
            };
            log::warn!(
                "{}: aborting command {cid} of I/O queue {qid}, which takes too long",
                self.label
            );
            let deadline = Instant::now() + TO_SEND;
            channel.send_aside(
                Sqe::abort(qid, cid),
                Aside::Abort { qid, cid },
                deadline,
                &mut Patience,
            )?;
        }
        Ok(())
    }

    /// A command that nobody waited for has ended.
    fn ended(&mut self, aside: Aside, end: &Cqe, mailbox: &mut Mailbox) -> Result<()> {
        match aside {
            // Taken before.
            Aside::KeepAlive => Ok(()),
            Aside::ControllerStatus => {
                match end.status.is_success() && end.result as u32 & CSTS_CFS != 0 {
                    true => Err(later("the controller has failed (CSTS.CFS)")),
                    false => Ok(()),
                }
            }
            Aside::Abort { qid, cid } => {
                // Bit 0 of the result: not aborted. The command has ended then, or goes on until its own timeout.
                let done = end.status.is_success() && end.result & 1 == 0;
                let what = if done {
                    "was aborted"
                } else {
                    "was not aborted"
                };
                log::warn!(
                    "{}: command {cid} of I/O queue {qid} {what} ({})",
                    self.label,
                    end.status
                );
                Ok(())
            }
            Aside::Event => self.event(end, mailbox),
        }
    }

    /// Tells the controller that it is not needed any more (Base section 3.6), and waits a little for its answer.
    pub(crate) fn shut_down(mut self) {
        let deadline = Instant::now() + TO_SHUT_DOWN;
        let cc = self.ready.cc & !CC_SHN | CC_SHN_NORMAL;
        let channel = &mut self.ready.channel;
        let mut shut = || -> Result<()> {
            set(channel, property::CC, cc, deadline, &mut Patience)?;
            while get(channel, property::CSTS, false, deadline, &mut Patience)? as u32 & CSTS_SHST
                != CSTS_SHST_COMPLETE
            {
                if Instant::now() >= deadline {
                    return Err(later("it takes too long"));
                }
                pause(Duration::from_millis(10), &mut Patience)?;
            }
            Ok(())
        };
        if let Err(trouble) = shut() {
            let Trouble::Failed(failure) = trouble.during("shutdown") else {
                return;
            };
            log::debug!("{}: {}", self.label, failure.text);
        }
    }
}

/// A second descriptor of a connection, which blocks from now on: who waits on it does so in the kernel.
fn second(wire: &Wire) -> std::io::Result<TcpStream> {
    let socket = wire.socket();
    socket.set_nonblocking(false)?;
    socket.try_clone()
}
