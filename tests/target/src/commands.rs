//! The way of a command through a connection, and its completion.

use crate::admin::Reply;
use crate::build::Completion;
use crate::connection::{Connection, End, Flow};
use crate::status::Status;
use crate::wire::{SGL_IN_CAPSULE, SGL_TRANSPORT, Sqe, op, pdu};

/// Bytes of an authentication message at most.
const AUTH_MESSAGE: u32 = 16 << 10;

impl Connection {
    pub fn on_command(&mut self, sqe: Sqe, data: &[u8], intact: bool) -> Flow {
        let qid = match &self.queue {
            Some(queue) => queue.id,
            None if sqe.opcode() == op::FABRICS && sqe.fctype() == op::CONNECT => sqe.u16(42),
            None => {
                self.bare_completion(sqe.cid(), Status::COMMAND_SEQUENCE_ERROR.dnr(), 0);
                return Ok(());
            }
        };
        self.admit(&sqe);
        match self.shared.faults.choose(self.port.id(), qid, &sqe) {
            None => self.dispatch(sqe, data, intact),
            Some(chosen) => self.misbehave(chosen, sqe, data, intact),
        }
    }

    /// Puts a command on the queue, and looks at what a host must not do.
    fn admit(&mut self, sqe: &Sqe) {
        let Some(queue) = &mut self.queue else { return };
        if let Some(head) = &mut queue.head {
            *head = ((u32::from(*head) + 1) % queue.size) as u16;
        }
        let (word, bit) = place(sqe.cid());
        let mut wrong = None;
        if queue.outstanding[word] & bit != 0 {
            wrong = Some("a command identifier is used twice");
        } else {
            queue.outstanding[word] |= bit;
            queue.outstanding_count += 1;
            if queue.outstanding_count >= queue.size {
                wrong = Some("more commands than the queue has room for");
            }
        }
        // PSDT: fabrics use SGLs only (base specification, section 3.3.3.1).
        if sqe.u8(1) & 0xc3 != 0x40 {
            wrong = Some("PSDT is not 01b, or FUSE is not 0");
        }
        if let Some(wrong) = wrong {
            let (qid, cid, opcode) = (queue.id, sqe.cid(), sqe.opcode());
            self.shared.violation(format_args!(
                "connection {} queue {qid} command {cid} ({opcode:#04x}): {wrong}",
                self.link.id,
            ));
        }
    }

    /// Executes a command as it should be.
    pub fn dispatch(&mut self, sqe: Sqe, data: &[u8], intact: bool) -> Flow {
        let Some(queue) = &self.queue else {
            return self.on_connect(sqe, data);
        };
        let qid = queue.id;
        if !intact {
            self.complete(sqe.cid(), Status::TRANSIENT_TRANSPORT_ERROR, 0);
            return Ok(());
        }
        if sqe.opcode() == op::FABRICS && sqe.fctype() == op::AUTH_SEND {
            return self.on_auth_send(&sqe, data);
        }
        if sqe.opcode() == op::FABRICS && sqe.fctype() == op::AUTH_RECEIVE {
            self.shared.counters.admin(&sqe);
            let reply = self.auth_receive(&sqe).unwrap_or_else(Reply::from);
            self.reply(&sqe, reply);
            return Ok(());
        }
        if self.auth.is_pending() {
            self.complete(sqe.cid(), Status::AUTHENTICATION_REQUIRED.dnr(), 0);
            return Ok(());
        }
        if qid == 0 {
            self.on_admin_command(sqe, data)
        } else {
            self.on_io_command(sqe, data)
        }
    }

    /// Authentication Send, with its message in the capsule or by R2T.
    fn on_auth_send(&mut self, sqe: &Sqe, data: &[u8]) -> Flow {
        self.shared.counters.admin(sqe);
        let (kind, len) = sqe.sgl();
        let result = match kind {
            SGL_IN_CAPSULE if data.len() == len as usize => self.auth_send(sqe, data),
            SGL_TRANSPORT if (1..=AUTH_MESSAGE).contains(&len) => {
                self.begin_transfer(sqe, len);
                return Ok(());
            }
            _ => Err(Status::DATA_SGL_LENGTH_INVALID.dnr()),
        };
        if self.auth_closes(sqe) {
            return Err(End::Close);
        }
        self.complete(sqe.cid(), result.err().unwrap_or(Status::SUCCESS), 0);
        Ok(())
    }

    /// Answers a command with a status and dwords 0 and 1, and takes it off the queue.
    pub fn complete(&mut self, cid: u16, status: Status, result: u64) {
        let sqhd = self.retire(cid);
        let qid = self.queue.as_ref().map_or(0, |q| q.id);
        let completion = Completion {
            cid,
            status,
            result,
            sqhd,
        };
        self.format
            .capsule_resp(&mut self.out.buf, &completion, qid);
        self.answered(cid);
    }

    /// Takes a command off the queue: the head pointer that its completion tells.
    pub fn retire(&mut self, cid: u16) -> u16 {
        let Some(queue) = &mut self.queue else {
            return 0;
        };
        let (word, bit) = place(cid);
        if queue.outstanding[word] & bit != 0 {
            queue.outstanding[word] &= !bit;
            queue.outstanding_count -= 1;
        }
        // Reserved where the host has switched flow control off.
        queue.head.unwrap_or(0xffff)
    }

    /// Puts a command back on the queue, for good or until an Abort ends it.
    pub fn hold(&mut self, cid: u16, abortable: bool) {
        if let Some(queue) = &mut self.queue {
            let (word, bit) = place(cid);
            if queue.outstanding[word] & bit == 0 {
                queue.outstanding[word] |= bit;
                queue.outstanding_count += 1;
            }
        }
        self.link.hold(cid, abortable);
    }

    /// An identifier that no command has.
    pub fn unused_cid(&self, near: u16) -> u16 {
        let taken = |cid: u16| {
            let (word, bit) = place(cid);
            self.queue
                .as_ref()
                .is_some_and(|q| q.outstanding[word] & bit != 0)
        };
        (0x4000..=u16::MAX)
            .map(|step| near.wrapping_add(step))
            .find(|&c| !taken(c))
            .unwrap_or(near)
    }

    /// A completion outside of any queue.
    pub fn bare_completion(&mut self, cid: u16, status: Status, result: u64) {
        let completion = Completion {
            cid,
            status,
            result,
            sqhd: 0,
        };
        self.format.capsule_resp(&mut self.out.buf, &completion, 0);
    }

    /// Answers a command that reads with its data.
    pub fn complete_with(&mut self, cid: u16, data: &[u8], status: Status, result: u64) {
        let size = (self.transport.c2h_size.max(4) & !3) as usize;
        let mut offset = 0;
        for part in data.chunks(size) {
            let last = offset + part.len() == data.len();
            let flags = if last { pdu::LAST } else { 0 };
            let out = &mut self.out.buf;
            self.format
                .c2h_data(out, cid, offset as u32, part.len() as u32, flags);
            out.extend_from_slice(part);
            self.format.data_digest(out, part.len());
            offset += part.len();
        }
        self.complete(cid, status, result);
    }
}

/// The word and the bit of an identifier in the set of outstanding commands.
fn place(cid: u16) -> (usize, u64) {
    (usize::from(cid >> 6), 1 << (cid & 63))
}
