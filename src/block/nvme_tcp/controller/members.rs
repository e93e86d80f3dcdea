//! Who wants a queue of a path, and who has one.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use super::backoff::GOOD;
use crate::block::nvme_tcp::link::{Member, MemberEvent};

/// The members of a namespace, from one path's view.
#[derive(Debug)]
pub(crate) struct Members {
    path: usize,
    label: String,
    all: Vec<Seat>,
    /// The path was given up: why.
    over: Option<String>,
}

/// A member, with its queue if it has one.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) member: Arc<Member>,
    pub(crate) queue: Option<Held>,
    /// It was told that it does not get one.
    refused: bool,
}

/// A queue in a member's hands.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) qid: u16,
    /// A second descriptor of its connection, to end it from here: then the controller is done with the queue, and
    /// the worker with the guest's memory that is on its way.
    connection: TcpStream,
    since: Instant,
    /// It was connected in the place of one that had failed.
    pub(crate) remade: bool,
}

impl Held {
    pub(crate) fn new(qid: u16, connection: TcpStream) -> Self {
        Self {
            qid,
            connection,
            since: Instant::now(),
            remade: false,
        }
    }

    /// True if it has failed so soon after the one before that connecting it again at once would go round and
    /// round.
    pub(crate) fn fails_again(&self) -> bool {
        self.remade && self.since.elapsed() < GOOD
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

impl Members {
    pub(crate) fn new(path: usize, label: String) -> Self {
        Self {
            path,
            label,
            all: Vec::new(),
            over: None,
        }
    }

    /// A member wants a queue.
    pub(crate) fn join(&mut self, member: Arc<Member>) {
        if let Some(why) = &self.over {
            member.send(MemberEvent::Refused {
                path: self.path,
                why: why.clone(),
            });
        }
        self.all.push(Seat {
            member,
            queue: None,
            refused: false,
        });
    }

    /// A member wants none any more. The identifier of its queue, if it had one.
    pub(crate) fn leave(&mut self, number: u64) -> Option<u16> {
        let at = self
            .all
            .iter()
            .position(|seat| seat.member.number() == number)?;
        self.all.remove(at).queue.as_ref().map(|held| held.qid)
    }

    /// The seat of a member.
    pub(crate) fn seat(&mut self, number: u64) -> Option<&mut Seat> {
        self.all
            .iter_mut()
            .find(|seat| seat.member.number() == number)
    }

    /// The next member that has no queue, and was not refused one.
    pub(crate) fn without_queue(&self) -> Option<u64> {
        let seat = self
            .all
            .iter()
            .find(|seat| seat.queue.is_none() && !seat.refused);
        seat.map(|seat| seat.member.number())
    }

    /// True if a member may have one of `granted` queues, as far as the others go: one is kept for those that stay
    /// for one operation only, or a disk whose workers have them all could not be flushed and stopped.
    pub(crate) fn may_have_one(&self, number: u64, granted: u16) -> bool {
        let passing = |seat: &Seat| seat.member.is_passing();
        let is_it = |seat: &Seat| seat.member.number() == number;
        let lasting = self.all.iter().filter(|seat| !passing(seat));
        let taken = lasting.filter(|seat| seat.queue.is_some()).count();
        self.all.iter().any(|seat| is_it(seat) && passing(seat)) || taken + 1 < usize::from(granted)
    }

    /// How many have a queue.
    pub(crate) fn with_queue(&self) -> usize {
        self.all.iter().filter(|seat| seat.queue.is_some()).count()
    }

    /// A member gets no queue, for now.
    pub(crate) fn refuse(&mut self, number: u64, why: &str) {
        let path = self.path;
        log::warn!("{}: a worker gets no queue: {why}", self.label);
        if let Some(seat) = self.seat(number) {
            seat.refused = true;
            seat.member.send(MemberEvent::Refused {
                path,
                why: why.to_owned(),
            });
        }
    }

    /// A queue has become free: who was refused may ask again.
    pub(crate) fn may_ask_again(&mut self) {
        for seat in &mut self.all {
            seat.refused = false;
        }
    }

    /// The association is over, and all its queues.
    pub(crate) fn lost(&mut self, generation: u64) {
        for seat in &mut self.all {
            seat.refused = false;
            if seat.queue.take().is_some() {
                seat.member.send(MemberEvent::Lost {
                    path: self.path,
                    generation,
                });
            }
        }
    }

    /// The path is over.
    pub(crate) fn give_up(&mut self, why: &str) {
        self.over = Some(format!("{} was given up: {why}", self.label));
        for number in self
            .all
            .iter()
            .map(|seat| seat.member.number())
            .collect::<Vec<_>>()
        {
            let why = self.over.clone().unwrap_or_default();
            self.refuse(number, &why);
        }
    }
}
