//! What a controller tells of itself while it is used: asynchronous events, the namespace's data, the access to it.

use std::time::Instant;

use super::super::ana::Ana;
use super::super::channel::Aside;
use super::super::facts::Reader;
use super::super::mailbox::Mailbox;
use super::super::trouble::{Result, gone, later, replaced};
use super::super::wait::Patience;
use super::{Association, TO_SEND};
use crate::block::nvme_tcp::link::{Access, NamespaceState};
use crate::block::nvme_tcp::wire::command::log as log_page;
use crate::block::nvme_tcp::wire::identify::{AsyncEvent, AsyncEventKind, ChangedNamespaces};
use crate::block::nvme_tcp::wire::{Cqe, Sqe, Status};

impl Association {
    /// Keeps Asynchronous Event Requests outstanding (Base section 5.2).
    pub(super) fn ask_for_events(&mut self) -> Result<()> {
        let channel = &mut self.ready.channel;
        while channel.asides(|aside| *aside == Aside::Event) < self.events {
            let deadline = Instant::now() + TO_SEND;
            channel.send_aside(
                Sqe::async_event_request(),
                Aside::Event,
                deadline,
                &mut Patience,
            )?;
        }
        Ok(())
    }

    pub(super) fn event(&mut self, end: &Cqe, mailbox: &mut Mailbox) -> Result<()> {
        if !end.status.is_success() {
            // Not sent again, or it would go round and round.
            self.events = self.events.saturating_sub(1);
            let limit = Status::from_raw(end.status.code()) == Status::ASYNC_EVENT_LIMIT;
            if self.events == 0 || !limit {
                log::warn!("{}: an event request failed: {}", self.label, end.status);
            }
            return Ok(());
        }
        // The next ones are asked for first: until its log page is read an event is not told again.
        self.ask_for_events()?;
        let event = AsyncEvent::from_result(end.result);
        let deadline = self.step();
        match event.kind {
            AsyncEventKind::NamespaceChanged => self.namespaces_changed(deadline, mailbox),
            AsyncEventKind::AnaChanged => {
                self.read_access(deadline, mailbox)?;
                self.namespace.tell_all();
                Ok(())
            }
            AsyncEventKind::PersistentInternalError => {
                Err(later("the controller tells a persistent internal error"))
            }
            AsyncEventKind::DiscoveryChanged | AsyncEventKind::CommandSet(_) => Ok(()),
            AsyncEventKind::Other {
                event: kind,
                information,
            } => {
                if self.talk.may_say_more(&self.label) {
                    log::warn!(
                        "{}: the controller tells an event: {}; look at the target",
                        self.label,
                        event_text(kind, information)
                    );
                }
                // 0 and 1 are errors and health, whose log pages have 64 and 512 bytes.
                match event.log_page {
                    0 => Ok(()),
                    lid => {
                        let sqe = Sqe::get_log_page(lid, u32::MAX, 0, 512, false, 0);
                        self.ready
                            .channel
                            .run_for(sqe, 512, deadline, mailbox)
                            .map(|_| ())
                    }
                }
            }
        }
    }

    /// Some namespaces have changed (Base section 5.16.1.5): if this is one of them, looks at it again.
    fn namespaces_changed(&mut self, deadline: Instant, mailbox: &mut Mailbox) -> Result<()> {
        let sqe = Sqe::get_log_page(log_page::CHANGED_NAMESPACES, u32::MAX, 0, 4096, false, 0);
        let (end, data) = self.ready.channel.run_for(sqe, 4096, deadline, mailbox)?;
        let nsid = self.ground.facts.nsid;
        let ours = match end
            .status
            .is_success()
            .then(|| ChangedNamespaces::parse(&data))
        {
            Some(Ok(ChangedNamespaces::These(those))) => those.contains(&nsid),
            // It is not known which: this one may be among them.
            _ => true,
        };
        match ours {
            true => self.look_again(deadline, mailbox),
            false => Ok(()),
        }
    }

    /// Reads the namespace's data again.
    fn look_again(&mut self, deadline: Instant, mailbox: &mut Mailbox) -> Result<()> {
        let nsid = self.ground.facts.nsid;
        let mut reader = Reader {
            channel: &mut self.ready.channel,
            waiter: mailbox,
            deadline,
        };
        let Some(facts) = reader.namespace(nsid, &self.ready.controller)? else {
            return Err(gone(format!("the target has removed namespace {nsid}")));
        };
        let before = &self.ground.facts;
        if let Some(difference) = before.identity.differs(&facts.identity) {
            return Err(replaced(format!(
                "the target has another namespace {nsid} now: {difference}"
            )));
        }
        let group = before.ana_group != facts.ana_group;
        self.ground.facts = facts;
        self.apply_facts();
        if group {
            self.read_access(deadline, mailbox)?;
            self.namespace.tell_all();
        }
        Ok(())
    }

    /// Tells the others what the namespace is like.
    pub(super) fn apply_facts(&mut self) {
        let facts = &self.ground.facts;
        let (here, nsid) = (facts.bytes, facts.nsid);
        let (before, now) = self.common.sized(self.path, here);
        let state = self.namespace.state();
        let next = match (facts.write_protected, state) {
            (true, NamespaceState::Present) => NamespaceState::WriteProtected,
            (false, NamespaceState::WriteProtected) => NamespaceState::Present,
            _ => state,
        };
        self.namespace.set_state(next);
        let changed = (now, next) != (before, state) || here < now;
        if !changed || !self.talk.may_say_more(&self.label) {
            return;
        }
        let label = &self.label;
        if now > before {
            log::info!("{label}: namespace {nsid} has grown from {before} to {now} bytes");
        } else if now < before {
            log::warn!(
                "{label}: namespace {nsid} has shrunk from {before} to {now} bytes; requests beyond that fail"
            );
        }
        if here < now {
            log::warn!(
                "{label}: namespace {nsid} has {here} bytes here and {now} on another path; requests beyond the \
                 smaller size fail on this one; look at the target"
            );
        }
        match (state, next) {
            (NamespaceState::Present, NamespaceState::WriteProtected) => {
                log::warn!("{label}: namespace {nsid} is write protected now");
            }
            (NamespaceState::WriteProtected, NamespaceState::Present) => {
                log::info!("{label}: namespace {nsid} can be written again");
            }
            _ => {}
        }
    }

    /// Reads the ANA log, and sets the path's access to what it says of the namespace.
    pub(super) fn read_access(&mut self, deadline: Instant, mailbox: &mut Mailbox) -> Result<()> {
        let shared = self.common.shared(self.path);
        let Some(ana) = &mut self.ana else {
            shared.set_access(Access::Optimized);
            return Ok(());
        };
        let facts = &self.ground.facts;
        let access = ana.read(&mut self.ready.channel, facts, deadline, mailbox)?;
        if shared.access() != access && self.talk.may_say_more(&self.label) {
            log::info!(
                "{}: access to namespace {} is {access:?}",
                self.label,
                facts.nsid
            );
        }
        shared.set_access(access);
        Ok(())
    }

    /// A change that takes longer than it may: the log is read once more, in case an event was lost.
    pub(super) fn ana_timer(&mut self, mailbox: &mut Mailbox) -> Result<()> {
        let due = self.ana.as_ref().and_then(Ana::deadline);
        if due.is_none_or(|due| Instant::now() < due) {
            return Ok(());
        }
        let deadline = self.step();
        self.read_access(deadline, mailbox)?;
        self.namespace.tell_all();
        match self.ana.as_ref().and_then(Ana::deadline) {
            None => Ok(()),
            Some(_) => Err(later(
                "the change of the access state takes longer than ANATT allows",
            )),
        }
    }
}

fn event_text(kind: u8, information: u8) -> String {
    match (kind, information) {
        (0, 4) => "a transient internal error".to_owned(),
        (1, 0) => "its reliability is degraded".to_owned(),
        (1, 1) => "a temperature threshold".to_owned(),
        (1, 2) => "its spare space is low".to_owned(),
        (2, 1) => "firmware is being activated".to_owned(),
        _ => format!("type {kind}, information {information:#04x}"),
    }
}
