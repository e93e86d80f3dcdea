//! What faults do to a command and its answer.
//!
//! A faulty command is executed as any other, with its answer captured: the PDUs that a correct controller
//! sends. What is wrong about them is done to these bytes, with header digests made right again, so that
//! nothing but the fault is wrong.

use std::time::Duration;

use crate::build::Completion;
use crate::connection::{Connection, End, Flow};
use crate::faults::{Chosen, Fault};
use crate::status::Status;
use crate::sync::Locked;
use crate::wire::{Sqe, op, pdu, put, u32_at};

type Pdus = Vec<Vec<u8>>;

impl Connection {
    /// Executes a command with its fault.
    pub fn misbehave(&mut self, chosen: Chosen, sqe: Sqe, data: &[u8], intact: bool) -> Flow {
        let cid = sqe.cid();
        self.shared.note(format_args!(
            "connection {}: {:?} on command {cid} ({:#04x})",
            self.link.id,
            chosen.fault,
            sqe.opcode()
        ));
        match chosen.fault {
            Fault::Status(status) => {
                self.shared.faults.happened(&chosen);
                if self.queue.is_some() {
                    self.complete(cid, status, 0);
                } else {
                    self.shared.counters.connect();
                    self.shared.counters.connect_refused();
                    self.bare_completion(cid, status, 0);
                }
                return Ok(());
            }
            Fault::NoAnswer {
                execute: false,
                abortable,
            } => {
                self.shared.faults.happened(&chosen);
                self.hold(cid, abortable);
                return Ok(());
            }
            Fault::DropBefore => {
                self.shared.faults.happened(&chosen);
                return Err(End::Close);
            }
            Fault::Reset => {
                self.shared.faults.happened(&chosen);
                return Err(End::Reset);
            }
            Fault::Terminate(status) => {
                self.shared.faults.happened(&chosen);
                return Err(End::Fault(status));
            }
            Fault::Stall(time) => {
                self.shared.faults.happened(&chosen);
                self.late.stall(time);
                return self.dispatch(sqe, data, intact);
            }
            Fault::Fatal => {
                if let Some(queue) = &self.queue {
                    self.shared.faults.happened(&chosen);
                    queue.controller.registers.locked().fatal = true;
                    self.hold(cid, false);
                }
                return Ok(());
            }
            Fault::R2tForRead => {
                if self.queue.as_ref().is_some_and(|q| q.id != 0) && sqe.opcode() == op::READ {
                    self.shared.faults.happened(&chosen);
                    let len = sqe.sgl().1;
                    self.format.r2t(&mut self.out.buf, cid, 0x7e57, 0, len);
                }
                return self.dispatch(sqe, data, intact);
            }
            _ => {}
        }
        let (flow, captured) = self.capture(|connection| connection.dispatch(sqe, data, intact));
        flow?;
        if let Some(transfer) = self.transfers.get_mut(&cid) {
            let total = transfer.len();
            if !is_about_r2t(chosen.fault) {
                // The fault is the completion's, which is still far.
                transfer.fault = Some(chosen);
                self.out.buf.extend_from_slice(&captured);
                return Ok(());
            }
            return self.distort_r2t(&chosen, cid, split(&captured), total);
        }
        self.distort(chosen, cid, captured)
    }

    /// Runs `make` with all that it answers put aside.
    pub fn capture<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> (T, Vec<u8>) {
        let out = std::mem::take(&mut self.out.buf);
        self.late.capturing = true;
        let result = make(self);
        self.late.capturing = false;
        (result, std::mem::replace(&mut self.out.buf, out))
    }

    /// Sends R2Ts with a fault.
    fn distort_r2t(&mut self, chosen: &Chosen, cid: u16, mut pdus: Pdus, total: u32) -> Flow {
        self.shared.faults.happened(chosen);
        let wrong = self.unused_cid(cid);
        if let Some(first) = pdus.first_mut() {
            match chosen.fault {
                Fault::R2tUnknownTag => self.edit(first, |b| put(b, 8, &wrong.to_le_bytes())),
                Fault::R2tOutOfRange => self.edit(first, |b| put(b, 12, &total.to_le_bytes())),
                Fault::R2tEmpty => self.edit(first, |b| put(b, 16, &[0; 4])),
                _ => {
                    let again = first.clone();
                    pdus.insert(1, again);
                }
            }
        }
        self.out.buf.extend(pdus.into_iter().flatten());
        Ok(())
    }

    /// Sends a captured answer with a fault.
    pub fn distort(&mut self, chosen: Chosen, cid: u16, captured: Vec<u8>) -> Flow {
        if captured.is_empty() {
            return Ok(());
        }
        let happened = |c: &Self| c.shared.faults.happened(&chosen);
        match chosen.fault {
            Fault::Delay(time) => {
                happened(self);
                self.emit_after(cid, captured, time);
            }
            Fault::DelayUpTo(time) => {
                happened(self);
                let part = (chosen.random % 1_000_000) as f64 / 1e6;
                self.emit_after(
                    cid,
                    captured,
                    Duration::from_secs_f64(time.as_secs_f64() * part),
                );
            }
            Fault::Reorder(others) => {
                happened(self);
                self.emit_behind(cid, captured, others);
            }
            Fault::NoAnswer { abortable, .. } => {
                happened(self);
                self.hold(cid, abortable);
            }
            Fault::DropAfterExecution => {
                happened(self);
                return Err(End::Close);
            }
            Fault::DropMidAnswer(bytes) => {
                happened(self);
                self.out
                    .buf
                    .extend_from_slice(&captured[..bytes.min(captured.len() - 1)]);
                return Err(End::Close);
            }
            Fault::DropAfterAnswer => {
                happened(self);
                self.emit(cid, &captured);
                return Err(End::Close);
            }
            _ => {
                let mut pdus = split(&captured);
                if self.distort_pdus(&chosen, cid, &mut pdus) {
                    happened(self);
                }
                self.emit(cid, &pdus.concat());
            }
        }
        Ok(())
    }

    /// Does a fault to the PDUs of an answer; false if they give no occasion for it.
    fn distort_pdus(&mut self, chosen: &Chosen, cid: u16, pdus: &mut Pdus) -> bool {
        let data_pdus = pdus.iter().take_while(|p| p[0] == pdu::C2H_DATA).count();
        let total: u32 = pdus[..data_pdus].iter().map(|p| u32_at(p, 16)).sum();
        let wrong = self.unused_cid(cid);
        match chosen.fault {
            Fault::CorruptHeaderDigest => {
                if self.format.hdgst {
                    let at = usize::from(pdus[0][2]);
                    pdus[0][at] ^= 0xff;
                }
                self.format.hdgst
            }
            Fault::WrongPlen(by) => {
                let plen = u32_at(&pdus[0], 4).wrapping_add_signed(by);
                self.edit(&mut pdus[0], |b| put(b, 4, &plen.to_le_bytes()));
                true
            }
            // The digest stays where it was: a length that is wrong cannot have a right place for it.
            Fault::WrongHlen(hlen) => {
                pdus[0][2] = hlen;
                true
            }
            Fault::WrongPdo(pdo) => {
                self.edit(&mut pdus[0], |b| b[3] = pdo);
                true
            }
            Fault::WrongType(kind) => {
                self.edit(&mut pdus[0], |b| b[0] = kind);
                true
            }
            Fault::ResponseUnknownCid => {
                self.explicit(pdus, data_pdus, cid);
                let last = pdus.len() - 1;
                self.edit(&mut pdus[last], |b| put(b, 20, &wrong.to_le_bytes()));
                self.hold(cid, false);
                true
            }
            Fault::ResponseTwice => {
                self.explicit(pdus, data_pdus, cid);
                pdus.extend(pdus.last().cloned());
                true
            }
            _ if data_pdus == 0 => false,
            Fault::ResponseBeforeData => {
                self.explicit(pdus, data_pdus, cid);
                pdus.rotate_right(1);
                true
            }
            Fault::CorruptDataDigest => {
                if self.format.ddgst {
                    let at = pdus[0].len() - 1;
                    pdus[0][at] ^= 0xff;
                }
                self.format.ddgst
            }
            Fault::CorruptData => {
                let at = usize::from(pdus[0][3]);
                pdus[0][at] ^= 0xff;
                true
            }
            Fault::DataOutOfRange => {
                self.edit(&mut pdus[0], |b| put(b, 12, &total.to_le_bytes()));
                true
            }
            Fault::DataUnknownTag => {
                self.edit(&mut pdus[0], |b| put(b, 8, &wrong.to_le_bytes()));
                true
            }
            Fault::DataTwice => {
                pdus.insert(1, pdus[0].clone());
                true
            }
            Fault::DataMissing => {
                self.explicit(pdus, data_pdus, cid);
                pdus.remove(0);
                true
            }
            Fault::DataAfterSuccess => {
                pdus.truncate(data_pdus);
                self.edit(&mut pdus[data_pdus - 1], |b| b[1] |= pdu::SUCCESS);
                pdus.extend(pdus.last().cloned());
                true
            }
            Fault::SuccessWithoutLast => {
                pdus.truncate(data_pdus);
                self.edit(&mut pdus[data_pdus - 1], |b| {
                    b[1] = (b[1] | pdu::SUCCESS) & !pdu::LAST
                });
                true
            }
            _ => false,
        }
    }

    /// Gives an answer that ends in SUCCESS a completion of its own.
    fn explicit(&self, pdus: &mut Pdus, data_pdus: usize, cid: u16) {
        if pdus.len() > data_pdus {
            return;
        }
        if let Some(last) = pdus.last_mut() {
            self.edit(last, |b| b[1] &= !pdu::SUCCESS);
        }
        let (qid, head) = self.queue.as_ref().map_or((0, None), |q| (q.id, q.head));
        let sqhd = head.unwrap_or(0xffff);
        let completion = Completion {
            cid,
            status: Status::SUCCESS,
            result: 0,
            sqhd,
        };
        let mut resp = Vec::new();
        self.format.capsule_resp(&mut resp, &completion, qid);
        pdus.push(resp);
    }

    /// Changes a PDU's header and makes its digest right again.
    fn edit(&self, pdu: &mut [u8], change: impl FnOnce(&mut [u8])) {
        let hlen = usize::from(pdu[2]);
        change(pdu);
        if self.format.hdgst {
            let digest = crc32c::crc32c(&pdu[..hlen]);
            put(pdu, hlen, &digest.to_le_bytes());
        }
    }
}

fn is_about_r2t(fault: Fault) -> bool {
    use Fault::{R2tEmpty, R2tOutOfRange, R2tTwice, R2tUnknownTag};
    matches!(fault, R2tEmpty | R2tOutOfRange | R2tTwice | R2tUnknownTag)
}

/// The PDUs of what the target itself has made.
fn split(mut bytes: &[u8]) -> Pdus {
    let mut pdus = Vec::new();
    while bytes.len() >= pdu::COMMON {
        let (first, rest) = bytes.split_at((u32_at(bytes, 4) as usize).clamp(1, bytes.len()));
        pdus.push(first.to_vec());
        bytes = rest;
    }
    pdus
}
