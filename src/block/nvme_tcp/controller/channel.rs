//! Commands over a transport: one at a time that is waited for, and others beside it whose ends are collected.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::transport::{MAX_DATA, Received, Transport};
use super::trouble::{Result, kind_of, later, never};
use super::wait::Waiter;
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::machine::QueueParams;
use crate::block::nvme_tcp::wire::command::Sgl;
use crate::block::nvme_tcp::wire::pdu::{
    ADMIN_IN_CAPSULE, DataHeader, FLAG_LAST_PDU, FLAG_SUCCESS, PduType, capsule_resp,
};
use crate::block::nvme_tcp::wire::{Cqe, ProtocolError, Sqe, Status, Violation};

/// A command that nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aside {
    /// Keep Alive.
    KeepAlive,
    /// Asynchronous Event Request.
    Event,
    /// Abort of a command of an I/O queue.
    Abort {
        /// The queue.
        qid: u16,
        /// The command.
        cid: u16,
    },
    /// Property Get of CSTS.
    ControllerStatus,
}

/// A queue while its commands are few and simple.
#[derive(Debug)]
pub(crate) struct Channel {
    transport: Transport,
    last_cid: u16,
    asides: Vec<(u16, Aside)>,
    ended: VecDeque<(Aside, Cqe)>,
    current: Option<Current>,
}

/// The command that is waited for.
#[derive(Debug)]
struct Current {
    cid: u16,
    /// Bytes that it brings, at most.
    want: usize,
    data: Vec<u8>,
    intact: bool,
    /// The controller said that no more data come.
    last: bool,
    end: Option<Cqe>,
}

impl Channel {
    pub(crate) fn new(transport: Transport) -> Self {
        Self {
            transport,
            last_cid: 0,
            asides: Vec::new(),
            ended: VecDeque::new(),
            current: None,
        }
    }

    /// See [`Transport::peer`].
    pub(crate) fn peer(&self) -> io::Result<SocketAddr> {
        self.transport.peer()
    }

    /// Its descriptor, to wait for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.transport.fd()
    }

    /// See [`Transport::params`].
    pub(crate) fn params(&self, depth: u16, in_capsule: u32) -> QueueParams {
        self.transport.params(depth, in_capsule)
    }

    /// The connection, for somebody else to use.
    pub(crate) fn into_wire(self) -> Result<Wire> {
        self.transport.into_wire()
    }

    /// Runs a command without data to its end.
    pub(crate) fn run(
        &mut self,
        sqe: Sqe,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Cqe> {
        self.exchange(sqe, Sgl::None, &[], 0, deadline, waiter)
            .map(|(end, _)| end)
    }

    /// Runs a command that takes `data` with it.
    pub(crate) fn run_with(
        &mut self,
        sqe: Sqe,
        data: &[u8],
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Cqe> {
        let length = data.len() as u32;
        if length > ADMIN_IN_CAPSULE {
            return Err(later(format!(
                "{length} bytes of data do not fit a capsule"
            )));
        }
        let sgl = Sgl::InCapsule { length };
        self.exchange(sqe, sgl, data, 0, deadline, waiter)
            .map(|(end, _)| end)
    }

    /// Runs a command that brings at most `length` bytes. They count only if it succeeded, and may be fewer.
    pub(crate) fn run_for(
        &mut self,
        sqe: Sqe,
        length: u32,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<(Cqe, Vec<u8>)> {
        let length = length.min(MAX_DATA);
        let sgl = Sgl::Transport { length };
        self.exchange(sqe, sgl, &[], length as usize, deadline, waiter)
    }

    fn exchange(
        &mut self,
        sqe: Sqe,
        sgl: Sgl,
        data: &[u8],
        want: usize,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<(Cqe, Vec<u8>)> {
        let cid = self.free_cid();
        self.current = Some(Current {
            cid,
            want,
            data: Vec::new(),
            intact: true,
            last: false,
            end: None,
        });
        self.transport
            .send_command(sqe.cid(cid).sgl(sgl), data, deadline, waiter)?;
        loop {
            let received = self.transport.receive(deadline, waiter)?;
            self.take(received)?;
            if let Some(Current {
                end: Some(end),
                data,
                intact,
                ..
            }) = self.current.take_if(|current| current.end.is_some())
            {
                if !intact {
                    return Err(later(
                        "the data digest does not fit the data; the network damages them",
                    ));
                }
                return Ok((end, data));
            }
            // A controller that never stops to send is not waited for, and the waiter would not see the deadline.
            if Instant::now() >= deadline {
                return Err(later("no answer in time"));
            }
        }
    }

    /// Sends a command that nobody waits for; its end comes from [`Channel::ended`].
    pub(crate) fn send_aside(
        &mut self,
        sqe: Sqe,
        aside: Aside,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<()> {
        let cid = self.free_cid();
        self.asides.push((cid, aside));
        self.transport
            .send_command(sqe.cid(cid), &[], deadline, waiter)
    }

    /// How many commands of a kind are under way beside.
    pub(crate) fn asides(&self, kind: impl Fn(&Aside) -> bool) -> usize {
        self.asides.iter().filter(|(_, aside)| kind(aside)).count()
    }

    /// Takes what has come, without waiting.
    pub(crate) fn pump(&mut self) -> Result<()> {
        while let Some(received) = self.transport.receive_now()? {
            self.take(received)?;
        }
        Ok(())
    }

    /// The next command beside that has ended.
    pub(crate) fn ended(&mut self) -> Option<(Aside, Cqe)> {
        self.ended.pop_front()
    }

    /// True if there are ends that were not taken yet.
    pub(crate) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// The end of a command beside, if it was this one.
    pub(crate) fn ended_of(&mut self, kind: Aside) -> Option<Cqe> {
        let at = self.ended.iter().position(|(aside, _)| *aside == kind)?;
        self.ended.remove(at).map(|(_, end)| end)
    }

    fn free_cid(&mut self) -> u16 {
        loop {
            self.last_cid = self.last_cid.wrapping_add(1);
            // FFFFh is no command's (Base section 3.3.3.1: reserved for errors that belong to none).
            if self.last_cid != u16::MAX
                && !self.asides.iter().any(|(cid, _)| *cid == self.last_cid)
            {
                return self.last_cid;
            }
        }
    }

    fn take(&mut self, received: Received) -> Result<()> {
        let checked = match received.layout.pdu {
            PduType::CapsuleResp => self.take_end(&received),
            PduType::C2HData => self.take_data(&received),
            pdu => Err(Violation::UnexpectedType(pdu)),
        };
        checked.map_err(|violation| {
            let error = ProtocolError::new(violation, &received.header);
            self.transport.violated(&error)
        })
    }

    fn take_end(&mut self, received: &Received) -> std::result::Result<(), Violation> {
        let end = capsule_resp(&received.header);
        if let Some(current) = &mut self.current
            && current.cid == end.cid
        {
            current.end = Some(end);
            return Ok(());
        }
        match self.asides.iter().position(|(cid, _)| *cid == end.cid) {
            Some(at) => {
                let (_, aside) = self.asides.swap_remove(at);
                self.ended.push_back((aside, end));
                Ok(())
            }
            None => Err(Violation::UnknownCommand {
                pdu: PduType::CapsuleResp,
                cid: end.cid,
            }),
        }
    }

    fn take_data(&mut self, received: &Received) -> std::result::Result<(), Violation> {
        let pdu = PduType::C2HData;
        let header = DataHeader::decode(&received.header);
        let cid = header.cccid;
        let current = self
            .current
            .as_mut()
            .filter(|current| current.cid == cid && current.end.is_none());
        let Some(current) = current else {
            return Err(Violation::UnknownCommand { pdu, cid });
        };
        if current.last || current.want == 0 {
            let why = "more data than the command brings";
            return Err(Violation::Sequence { pdu, cid, why });
        }
        // It would be no progress: a controller could go on with those for ever.
        if header.datal == 0 {
            let why = "no data in it";
            return Err(Violation::Sequence { pdu, cid, why });
        }
        if received.data.len() != header.datal as usize {
            return Err(Violation::PduLength {
                pdu,
                plen: header.datal,
            });
        }
        let (have, want) = (current.data.len(), current.want);
        if u64::from(header.datao) + u64::from(header.datal) > want as u64 {
            return Err(Violation::OutOfRange {
                pdu,
                cid,
                offset: header.datao,
                length: header.datal,
                size: want as u32,
            });
        }
        if header.datao as usize != have {
            return Err(Violation::NotContiguous {
                pdu,
                cid,
                offset: header.datao,
                expected: have as u32,
            });
        }
        current.data.extend(&received.data);
        current.intact &= received.intact;
        current.last = received.flags & FLAG_LAST_PDU != 0;
        if received.flags & FLAG_SUCCESS != 0 {
            current.end = Some(Cqe {
                result: 0,
                sqhd: 0,
                sqid: 0,
                cid,
                status: Status::SUCCESS,
            });
        }
        Ok(())
    }
}

/// A command's result, if it succeeded; else a failure that says which command.
pub(crate) fn succeeded(end: Cqe, what: &str) -> Result<Cqe> {
    if end.status.is_success() {
        return Ok(end);
    }
    let advice = end
        .status
        .advice()
        .map_or(String::new(), |advice| format!("; {advice}"));
    let text = format!("{what}: {}{advice}", end.status);
    Err(match end.status.do_not_retry() {
        true => never(end.status.kind(), text),
        false => kind_of(end.status.kind(), text),
    })
}
