//! The host's side of one connected queue as a state machine without I/O.
//!
//! Commands are begun ([`Machine::begin`]); bytes to send are listed and accounted for
//! ([`Machine::send_list`], [`Machine::sent`]), places for bytes to come likewise ([`Machine::recv_list`],
//! [`Machine::received`]); ends of commands come out of both. Whoever drives it owns the socket and the
//! time.
//!
//! **Order.** PDUs go out one after the other, whole. R2Ts of a command are answered in the order in which
//! they came (TCP 3.3.2.2). A receive may be accounted for before the send that it answers: what was
//! listed counts as known to the controller.
//!
//! **Ends.** A command ends when neither direction can touch its memory any more. A response that comes
//! while data of the command are on their way waits for them; what was not begun is not sent.
//!
//! **Flow control of the submission queue.** SQHD is not needed, with flow control or without. A command
//! that ended has left the submission queue, and no more than `depth` (entries less one) are under way, so
//! the queue is never full (Base 3.3.1.2). The SUCCESS flag, which carries no SQHD, changes nothing in
//! that.
//!
//! **Data digests.** The guest can change memory while it is on its way. With data digests on, data travel
//! through buffers of the machine's own, so that what is sent is what the digest covers, and the guest
//! sees only data whose digest was right. A wrong one is an error of the command, not of the connection
//! (TCP 3.5.2).

mod receive;
mod send;
mod slot;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::reactor::Sg;

use super::wire::command::Sgl;
use super::wire::digest::{self, DIGEST};
use super::wire::pdu::{
    Agreed, CAPSULE_CMD_HEADER, COMMON_HEADER, CapsuleCmd, MAX_ALIGNMENT, MIN_MAX_H2C_DATA,
};
use super::wire::{ProtocolError, Sqe, Status, TermReqBytes};
use receive::Receiver;
use send::Sender;
use slot::{Kind, NIL, Slots};

/// R2Ts that may be outstanding for a command, at most: what an ICReq announces must not be more.
pub const MAX_R2T: u32 = 64;
/// Commands of a queue, at most.
pub const MAX_DEPTH: u16 = 65534;
/// Entries of a list of memory: what one call of the kernel takes.
pub const MAX_IOVECS: usize = 1024;
/// Bytes of a list to send.
pub const MAX_SEND_BYTES: usize = 1 << 20;

/// What the transport's handshake agreed on, for one queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueParams {
    /// Commands that may be outstanding: the submission queue's entries less one, 1 to 65534.
    pub depth: u16,
    /// Header digests are used.
    pub header_digest: bool,
    /// Data digests are used.
    pub data_digest: bool,
    /// Data in PDUs that are sent begin at a multiple of this many bytes: what CPDA asks for, 4 to 128.
    pub host_pdu_alignment: u32,
    /// The same of PDUs that come: what HPDA asked for.
    pub controller_pdu_alignment: u32,
    /// MAXH2CDATA: most data of one H2CData, in bytes, at least 4096 and a multiple of 4.
    pub max_h2c_data: u32,
    /// Most in-capsule data, in bytes: IOCCSZ * 16 - 64, 8192 on an admin queue; 0: none.
    pub in_capsule: u32,
    /// R2Ts that may be outstanding for a command: MAXR2T of the ICReq and one more, 1 to [`MAX_R2T`].
    pub max_r2t: u32,
}

/// A command's data, and where they are.
#[derive(Clone, Copy, Debug)]
pub enum Data {
    /// None.
    None,
    /// From the controller, into this memory.
    Read(Sg<'static>),
    /// From the controller, which may have less to say than this memory takes. The rest of it is left as it is.
    ReadAtMost(Sg<'static>),
    /// To the controller, from this memory.
    Write(Sg<'static>),
}

/// A command that is under way: its command identifier. The low bits are its slot; those above it tell one
/// user of a slot from the next, so that a late or doubled answer does not end another command. That costs
/// one comparison. FFFFh, which no command may have, does not come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(u16);

impl Tag {
    /// CID, for an Abort.
    pub fn cid(self) -> u16 {
        self.0
    }
}

/// A command that has ended: it was answered, and its memory is no longer in use here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which one.
    pub tag: Tag,
    /// What [`Machine::begin`] was given.
    pub user: u32,
    /// How it ended.
    pub status: Status,
    /// Dwords 0 and 1 of the completion queue entry.
    pub result: u64,
}

/// A command that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Which one.
    pub tag: Tag,
    /// What [`Machine::begin`] was given.
    pub user: u32,
    /// It was the how-manieth to be begun here.
    pub sequence: u64,
}

/// The state of one connected queue. Not for use from several threads: it holds addresses.
pub struct Machine {
    params: QueueParams,
    /// Layout of what is sent.
    host: Agreed,
    slots: Slots,
    send: Sender,
    receive: Receiver,
    /// The common header of a capsule without data.
    plain_capsule: [u8; COMMON_HEADER],
    /// Commands that were answered and wait for what they are still sending.
    concluded: u32,
    /// The connection is of no use any more.
    failed: Option<ProtocolError>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("params", &self.params)
            .field("in_flight", &self.slots.in_flight())
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// A queue on which nothing was sent yet. What `params` has beyond its limits is brought inside them;
    /// whoever decodes the handshake has refused it before.
    pub fn new(params: QueueParams) -> Self {
        let alignment = |bytes: u32| bytes.clamp(4, MAX_ALIGNMENT);
        let params = QueueParams {
            depth: params.depth.clamp(1, MAX_DEPTH),
            host_pdu_alignment: alignment(params.host_pdu_alignment),
            controller_pdu_alignment: alignment(params.controller_pdu_alignment),
            max_h2c_data: params.max_h2c_data.max(MIN_MAX_H2C_DATA) & !3,
            max_r2t: params.max_r2t.clamp(1, MAX_R2T),
            ..params
        };
        let agreed = |alignment| Agreed {
            header_digest: params.header_digest,
            data_digest: params.data_digest,
            alignment,
        };
        let host = agreed(params.host_pdu_alignment);
        Self {
            params,
            host,
            slots: Slots::new(params.depth, params.max_r2t),
            send: Sender::new(params.depth, &host),
            receive: Receiver::new(agreed(params.controller_pdu_alignment)),
            plain_capsule: CapsuleCmd::common_header(0, &host).encode(),
            concluded: 0,
            failed: None,
        }
    }

    /// What was agreed on.
    pub fn params(&self) -> &QueueParams {
        &self.params
    }

    /// Commands that can be begun now.
    #[inline]
    pub fn free(&self) -> u16 {
        if self.failed.is_some() {
            return 0;
        }
        self.slots.free()
    }

    /// Commands that have not ended.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.slots.in_flight()
    }

    /// Commands that have not ended, the one first that was begun first.
    pub fn commands(&self) -> impl Iterator<Item = InFlight> + '_ {
        self.slots.in_order()
    }

    /// The command with this tag, if it has not ended.
    pub fn command(&self, tag: Tag) -> Option<InFlight> {
        self.slots.by_tag(tag)
    }

    /// Begins a command: queues its capsule. The command identifier and the SGL descriptor are filled in
    /// here; data to the controller go in the capsule if they fit there, and else when they are asked for.
    /// `None` if no command can be begun now, or if there are 4 GiB of data or more.
    ///
    /// # Safety
    /// The memory of `data`, and the iovecs that describe it, must stay valid until the command has ended
    /// ([`Ended`]) or was abandoned ([`Machine::abandon_all`]), or the machine is dropped; and in the
    /// latter cases longer, while the kernel works on a list that it was given.
    #[inline]
    pub unsafe fn begin(&mut self, command: Sqe, data: Data, user: u32) -> Option<Tag> {
        if self.failed.is_some() {
            return None;
        }
        let (sg, mut kind) = match data {
            Data::None => (Sg::empty(), Kind::None),
            Data::Read(sg) | Data::ReadAtMost(sg) => (sg, Kind::Read),
            Data::Write(sg) => (sg, Kind::Write),
        };
        let length = u32::try_from(sg.len()).ok()?;
        let mut sgl = Sgl::Transport { length };
        let mut in_capsule = 0;
        if length == 0 {
            kind = Kind::None;
            sgl = Sgl::None;
        } else if kind == Kind::Write && length <= self.params.in_capsule {
            kind = Kind::InCapsule;
            sgl = Sgl::InCapsule { length };
            in_capsule = length;
        }
        let (index, cid) = self.slots.take(kind, length, user)?;
        let slot = self.slots.get_mut(index);
        let common = if in_capsule == 0 {
            self.plain_capsule
        } else {
            CapsuleCmd::common_header(in_capsule, &self.host).encode()
        };
        slot.header[..COMMON_HEADER].copy_from_slice(&common);
        slot.header[COMMON_HEADER..CAPSULE_CMD_HEADER].copy_from_slice(command.as_bytes());
        slot.header[COMMON_HEADER + 2..COMMON_HEADER + 4].copy_from_slice(&cid.to_le_bytes());
        slot.header[COMMON_HEADER + 24..COMMON_HEADER + 40].copy_from_slice(&sgl.encode());
        if self.host.header_digest {
            let crc = digest::digest(&slot.header[..CAPSULE_CMD_HEADER]);
            slot.header[CAPSULE_CMD_HEADER..].copy_from_slice(&crc);
        }
        slot.rest = sg;
        slot.may_be_short = matches!(data, Data::ReadAtMost(_));
        if self.host.data_digest && matches!(kind, Kind::InCapsule | Kind::Write) {
            // Its own copy: see the module's documentation.
            if slot.staged.len() < length as usize {
                slot.staged.resize(length as usize, 0);
            }
            if kind == Kind::InCapsule {
                let staged = &mut slot.staged[..length as usize];
                sg.copy_to(staged);
                slot.digest = digest::digest(staged);
            }
        }
        self.send.push_capsule(index, sg, in_capsule);
        Some(Tag(cid))
    }

    /// The H2CTermReq to send after a fatal error, before the connection is closed (TCP 3.5.1). Empty if
    /// none is to be sent. It can only be understood [between two PDUs](Machine::between_pdus).
    pub fn term_req(error: &ProtocolError) -> TermReqBytes {
        error.term_req()
    }

    /// True if what was sent so far ends with the end of a PDU.
    pub fn between_pdus(&self) -> bool {
        self.send.between_pdus()
    }

    /// The connection is gone: hands back every command that has not ended, in the order in which they
    /// were begun. No memory is referred to afterwards; the machine is as new.
    ///
    /// The kernel must be done with every list that it was given.
    pub fn abandon_all(&mut self, each: &mut impl FnMut(u32)) {
        for command in self.slots.in_order() {
            each(command.user);
        }
        self.slots.reset();
        self.send.reset();
        self.receive.reset();
        self.concluded = 0;
        self.failed = None;
    }

    /// The controller has answered a command: it ends, at once or when its memory is no longer being sent.
    #[inline]
    fn conclude(&mut self, index: u16, status: Status, result: u64, ended: &mut impl FnMut(Ended)) {
        let slot = self.slots.get_mut(index);
        let status = if slot.digest_failed && status.is_success() {
            // TCP 3.5.2: a success whose data were damaged on the way.
            Status::TRANSIENT_TRANSPORT_ERROR
        } else {
            status
        };
        if slot.unsent == 0 {
            ended(self.slots.release(index, status, result));
            return;
        }
        let is_under_way = slot.unlisted == 0 && self.send.is_listed();
        slot.conclude(status, result);
        self.concluded += 1;
        // The common case is an answer that overtakes the account of its send: then there is nothing to look for,
        // and what the kernel leaves of the list is looked at when that comes.
        if !is_under_way {
            self.cancel_unstarted(ended);
        }
    }

    /// Takes PDUs of answered commands out of the queue, unless they are on their way.
    #[cold]
    fn cancel_unstarted(&mut self, ended: &mut impl FnMut(Ended)) {
        let Self {
            slots,
            send,
            concluded,
            ..
        } = self;
        send.retain_unstarted(|pdu| {
            let slot = slots.get_mut(pdu.slot);
            if !slot.concluded {
                return true;
            }
            slot.unsent -= 1;
            if slot.unsent == 0 {
                *concluded -= 1;
                let (status, result) = slot.outcome;
                ended(slots.release(pdu.slot, status, result));
            }
            false
        });
        self.queue_waiting();
    }
}

/// Bytes of a capsule's header and the digest behind it.
const CAPSULE_BYTES: usize = CAPSULE_CMD_HEADER + DIGEST;
