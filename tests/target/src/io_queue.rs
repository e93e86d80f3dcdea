//! I/O commands, and the transfer of their data.

use std::sync::Arc;

use crate::connection::{Connection, End, Flow};
use crate::faults::Chosen;
use crate::journal::{Execution, Journal};
use crate::reservation::Access;
use crate::status::Status;
use crate::subsystem::{AnaState, Namespace};
use crate::wire::{FatalErrorStatus, SGL_IN_CAPSULE, SGL_TRANSPORT, Sqe, op, pdu, u16_at, u32_at};

/// What an I/O queue remembers.
#[derive(Default)]
pub(crate) struct IoQueue {
    /// The subsystem's generation that `namespaces` is of.
    generation: u64,
    namespaces: Vec<Reach>,
    next_ttag: u16,
    /// Buffers of finished transfers.
    spare: Vec<Vec<u8>>,
}

/// A namespace as this path reaches it.
#[derive(Clone)]
pub(crate) struct Reach {
    pub namespace: Arc<Namespace>,
    ana: AnaState,
}

/// What is left to do for a command that did not fail.
pub(crate) enum Next {
    /// It is to be completed.
    Complete,
    /// It is answered, or will be.
    Answered,
}

/// A command whose data is on its way from the host.
pub(crate) struct Transfer {
    pub sqe: Sqe,
    buf: Vec<u8>,
    /// Bytes that were asked for.
    asked: u32,
    received: u32,
    r2ts: Vec<R2t>,
    /// False once a data digest did not match.
    intact: bool,
    /// What goes wrong with its completion.
    pub fault: Option<Chosen>,
}

impl Transfer {
    /// Bytes of the command's data.
    pub fn len(&self) -> u32 {
        self.buf.len() as u32
    }
}

/// An R2T that is not yet answered in full.
struct R2t {
    ttag: u16,
    offset: u32,
    len: u32,
    got: u32,
}

/// A command's range in bytes of the store.
pub(crate) struct Extent {
    pub namespace: Arc<Namespace>,
    pub offset: u64,
    pub len: usize,
}

impl Connection {
    pub fn on_io_command(&mut self, sqe: Sqe, data: &[u8]) -> Flow {
        self.shared.counters.io(sqe.opcode());
        if let Some(queue) = &self.queue {
            if queue.controller.options.traffic_based_keep_alive {
                queue.controller.heard();
            }
        }
        // ONCS: what is not offered is not taken.
        let oncs = self.queue.as_ref().map_or(0, |q| q.controller.options.oncs);
        let offered = match sqe.opcode() {
            op::DATASET_MANAGEMENT => oncs & 1 << 2 != 0,
            op::WRITE_ZEROES => oncs & 1 << 3 != 0,
            0x0d..=0x15 => oncs & 1 << 5 != 0,
            _ => true,
        };
        let result = match sqe.opcode() {
            _ if !offered => Err(Status::INVALID_OPCODE.dnr()),
            op::READ => self.read(&sqe),
            op::FLUSH => self.flush(&sqe),
            op::WRITE_ZEROES => self.write_zeroes(&sqe),
            op::RESERVATION_REPORT => self.reservation_report(&sqe),
            op::WRITE
            | op::DATASET_MANAGEMENT
            | op::RESERVATION_REGISTER
            | op::RESERVATION_ACQUIRE
            | op::RESERVATION_RELEASE => self.take_data(&sqe, data),
            _ => Err(Status::INVALID_OPCODE.dnr()),
        };
        match result {
            Ok(Next::Complete) => self.complete(sqe.cid(), Status::SUCCESS, 0),
            Ok(Next::Answered) => {}
            Err(status) => self.complete(sqe.cid(), status, 0),
        }
        Ok(())
    }

    /// The namespace of a command, as this path reaches it.
    pub fn reach(&mut self, nsid: u32) -> Result<Reach, Status> {
        let Some(queue) = &self.queue else {
            return Err(Status::INTERNAL_ERROR);
        };
        let subsystem = &queue.controller.subsystem;
        let generation = subsystem.generation();
        if self.io.generation != generation {
            self.io.generation = generation;
            self.io.namespaces = subsystem
                .namespaces()
                .into_iter()
                .map(|namespace| {
                    let ana =
                        subsystem.ana_state(queue.controller.port, namespace.options().ana_group);
                    Reach { namespace, ana }
                })
                .collect();
        }
        let found = self
            .io
            .namespaces
            .iter()
            .find(|r| r.namespace.nsid() == nsid);
        let reach = found.ok_or(Status::INVALID_NAMESPACE.dnr())?;
        // Base specification, section 8.1.3: what a path that is not accessible answers.
        match reach.ana {
            AnaState::Optimized | AnaState::NonOptimized => Ok(reach.clone()),
            AnaState::Inaccessible => Err(Status::ANA_INACCESSIBLE),
            AnaState::PersistentLoss => Err(Status::ANA_PERSISTENT_LOSS),
            AnaState::Change => Err(Status::ANA_TRANSITION),
        }
    }

    /// The range of a command that names blocks; `transfers`: it moves them, so MDTS bounds it.
    pub fn extent(&mut self, sqe: &Sqe, access: Access, transfers: bool) -> Result<Extent, Status> {
        let reach = self.reach(sqe.nsid())?;
        self.allowed(&reach, access)?;
        let namespace = reach.namespace;
        let (slba, blocks) = (sqe.slba(), sqe.blocks());
        let end = slba
            .checked_add(blocks)
            .ok_or(Status::LBA_OUT_OF_RANGE.dnr())?;
        if end > namespace.blocks() {
            return Err(Status::LBA_OUT_OF_RANGE.dnr());
        }
        let len = (blocks << namespace.lba_shift()) as usize;
        let mdts = self.queue.as_ref().map_or(0, |q| q.controller.options.mdts);
        if transfers && mdts != 0 && len > 4096 << mdts {
            return Err(Status::INVALID_FIELD.dnr());
        }
        Ok(Extent {
            offset: slba << namespace.lba_shift(),
            len,
            namespace,
        })
    }

    /// What reservations and write protection have to say.
    pub fn allowed(&self, reach: &Reach, access: Access) -> Result<Next, Status> {
        let namespace = &reach.namespace;
        if let Some(queue) = &self.queue {
            if !namespace
                .reservations
                .allows(&queue.controller.host_id, access)
            {
                return Err(Status::RESERVATION_CONFLICT.dnr());
            }
        }
        Ok(Next::Complete)
    }

    fn flush(&mut self, sqe: &Sqe) -> Result<Next, Status> {
        let reach = self.reach(sqe.nsid())?;
        self.allowed(&reach, Access::Write)?;
        let place = self.execution(sqe).map(|e| {
            let (slba, blocks) = (0, 0);
            self.shared
                .journal
                .executed(Execution { slba, blocks, ..e })
        });
        self.journaled(sqe.cid(), place);
        Ok(Next::Complete)
    }

    fn read(&mut self, sqe: &Sqe) -> Result<Next, Status> {
        let extent = self.extent(sqe, Access::Read, true)?;
        let (kind, len) = sqe.sgl();
        if kind != SGL_TRANSPORT {
            return Err(Status::SGL_TYPE_INVALID.dnr());
        }
        if len as usize != extent.len {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        let cid = sqe.cid();
        // SUCCESS stands for a completion whose fields the host can do without: the head pointer it must know
        // (transport specification, section 3.6.2.11).
        let flow_controlled = self.queue.as_ref().is_some_and(|q| q.head.is_some());
        let success = self.transport.c2h_success && !flow_controlled;
        let size = (self.transport.c2h_size.max(4) & !3) as usize;
        let format = self.format;
        let execution = self.execution(sqe);
        let out = &mut self.out.buf;
        let shared = &self.shared;
        let place = extent
            .namespace
            .store
            .with(extent.offset, extent.len, |bytes| {
                let mut at = 0;
                for part in bytes.chunks(size) {
                    let last = at + part.len() == bytes.len();
                    let mut flags = if last { pdu::LAST } else { 0 };
                    if last && success {
                        flags |= pdu::SUCCESS;
                    }
                    format.c2h_data(out, cid, at as u32, part.len() as u32, flags);
                    out.extend_from_slice(part);
                    format.data_digest(out, part.len());
                    at += part.len();
                }
                execution.map(|e| {
                    shared.journal.executed(Execution {
                        crc: crc32c::crc32c(bytes),
                        ..e
                    })
                })
            });
        self.journaled(cid, place);
        if success {
            self.retire(cid);
            self.answered(cid);
            return Ok(Next::Answered);
        }
        Ok(Next::Complete)
    }

    /// A command that the host sends data with: in its capsule, or by R2T.
    fn take_data(&mut self, sqe: &Sqe, data: &[u8]) -> Result<Next, Status> {
        let (kind, len) = sqe.sgl();
        // What is known to fail does not need its data.
        self.check_data(sqe, len as usize)?;
        match kind {
            SGL_IN_CAPSULE => {
                if sqe.u64(24) != 0 {
                    return Err(Status::SGL_OFFSET_INVALID.dnr());
                }
                if data.len() != len as usize {
                    return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
                }
                self.execute_with(sqe, data)?;
                Ok(Next::Complete)
            }
            SGL_TRANSPORT => {
                self.begin_transfer(sqe, len);
                Ok(Next::Answered)
            }
            _ => Err(Status::SGL_TYPE_INVALID.dnr()),
        }
    }

    /// Checks a command that comes with `len` bytes of data.
    fn check_data(&mut self, sqe: &Sqe, len: usize) -> Result<(), Status> {
        let (needed, most) = match sqe.opcode() {
            op::WRITE => {
                let extent = self.writable(sqe, true)?;
                (extent.len, extent.len)
            }
            // A host may send more than the ranges that it names.
            op::DATASET_MANAGEMENT => ((usize::from(sqe.u8(40)) + 1) * 16, 4096),
            op::RESERVATION_RELEASE => (8, 4096),
            _ => (16, 4096),
        };
        if len < needed || len > most {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        Ok(())
    }

    /// The range of a command that changes blocks.
    pub fn writable(&mut self, sqe: &Sqe, transfers: bool) -> Result<Extent, Status> {
        let extent = self.extent(sqe, Access::Write, transfers)?;
        if extent.namespace.write_protected() {
            return Err(Status::WRITE_PROTECTED.dnr());
        }
        Ok(extent)
    }

    /// Executes a command whose data is there.
    fn execute_with(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        match sqe.opcode() {
            op::WRITE => {
                // The namespace may have changed since the command came.
                let extent = self.writable(sqe, true)?;
                if extent.len != data.len() {
                    return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
                }
                let execution = self.execution(sqe);
                let mut place = Err(Status::INTERNAL_ERROR);
                extent.namespace.store.write(extent.offset, data, || {
                    let crc = || crc32c::crc32c(data);
                    place = self.take_effect(|journal| {
                        execution.map(|e| journal.executed(Execution { crc: crc(), ..e }))
                    });
                    place.is_ok()
                });
                self.journaled(sqe.cid(), place?);
                Ok(())
            }
            op::FABRICS => self.auth_send(sqe, data),
            op::DATASET_MANAGEMENT => self.deallocate(sqe, data),
            _ => self.reservation_command(sqe, data),
        }
    }

    /// Whether a command that changes blocks may take effect, which `note` writes down then; called with these
    /// blocks locked. Nothing more is done for a host that has ended the connection: it may have sent the command
    /// again elsewhere and been answered, and what comes late would undo what followed (Linux's target destroys a
    /// queue on its socket's change of state for the same reason).
    pub fn take_effect<T>(&self, note: impl FnOnce(&Journal) -> T) -> Result<T, Status> {
        if self.link.has_ended() {
            // Nobody is told.
            return Err(Status::INTERNAL_ERROR);
        }
        Ok(note(&self.shared.journal))
    }

    /// What the journal says of a command, if one is kept.
    pub fn execution(&self, sqe: &Sqe) -> Option<Execution> {
        if !self.shared.journal.is_on() {
            return None;
        }
        let queue = self.queue.as_ref()?;
        Some(Execution {
            opcode: sqe.opcode(),
            port: self.port.id(),
            cntlid: queue.controller.id,
            qid: queue.id,
            cid: sqe.cid(),
            nsid: sqe.nsid(),
            slba: sqe.slba(),
            blocks: sqe.blocks(),
            crc: 0,
            answered: false,
        })
    }

    /// Asks the host for a command's data.
    pub fn begin_transfer(&mut self, sqe: &Sqe, len: u32) {
        let mut buf = self.io.spare.pop().unwrap_or_default();
        buf.clear();
        buf.resize(len as usize, 0);
        let transfer = Transfer {
            sqe: *sqe,
            buf,
            asked: 0,
            received: 0,
            r2ts: Vec::new(),
            intact: true,
            fault: None,
        };
        self.transfers.insert(sqe.cid(), transfer);
        self.ask(sqe.cid());
    }

    /// Sends as many R2Ts as may be outstanding.
    fn ask(&mut self, cid: u16) {
        let Some(transfer) = self.transfers.get_mut(&cid) else {
            return;
        };
        let total = transfer.buf.len() as u32;
        while transfer.asked < total && transfer.r2ts.len() < self.max_r2t as usize {
            let len = (self.transport.r2t_size.max(4) & !3).min(total - transfer.asked);
            self.io.next_ttag = self.io.next_ttag.wrapping_add(1);
            let r2t = R2t {
                ttag: self.io.next_ttag,
                offset: transfer.asked,
                len,
                got: 0,
            };
            self.format
                .r2t(&mut self.out.buf, cid, r2t.ttag, r2t.offset, r2t.len);
            transfer.asked += len;
            transfer.r2ts.push(r2t);
        }
    }

    /// H2CData (transport specification, section 3.6.2.9).
    pub fn on_h2c_data(&mut self, b: &[u8], data: &[u8], intact: bool) -> Flow {
        let bad = |at: u32| End::Terminate(FatalErrorStatus::InvalidHeaderField, at);
        let (cid, ttag, offset, len) = (u16_at(b, 8), u16_at(b, 10), u32_at(b, 12), u32_at(b, 16));
        let Some(transfer) = self.transfers.get_mut(&cid) else {
            return Err(bad(8));
        };
        let found = transfer.r2ts.iter().position(|r| r.ttag == ttag);
        let Some(r2t) = found else {
            return Err(bad(10));
        };
        if data.len() as u64 != u64::from(len) || len == 0 {
            return Err(bad(16));
        }
        if len > self.transport.max_h2c_data {
            return Err(End::Terminate(FatalErrorStatus::LimitExceeded, 0));
        }
        let r = &mut transfer.r2ts[r2t];
        if offset != r.offset + r.got || len > r.len - r.got {
            return Err(End::Terminate(FatalErrorStatus::DataOutOfRange, 0));
        }
        r.got += len;
        let done = r.got == r.len;
        if done != (b[1] & pdu::LAST != 0) {
            return Err(bad(1));
        }
        if done {
            transfer.r2ts.remove(r2t);
        }
        transfer.intact &= intact;
        transfer.received += len;
        let at = offset as usize;
        transfer.buf[at..at + data.len()].copy_from_slice(data);
        if (transfer.received as usize) < transfer.buf.len() {
            self.ask(cid);
            return Ok(());
        }
        let Some(transfer) = self.transfers.remove(&cid) else {
            return Ok(());
        };
        let result = if transfer.intact {
            self.execute_with(&transfer.sqe, &transfer.buf)
        } else {
            Err(Status::TRANSIENT_TRANSPORT_ERROR)
        };
        let status = result.err().unwrap_or(Status::SUCCESS);
        if self.io.spare.len() < 64 {
            self.io.spare.push(transfer.buf);
        }
        match transfer.fault {
            None => {
                self.complete(cid, status, 0);
                Ok(())
            }
            Some(chosen) => {
                let ((), captured) = self.capture(|connection| connection.complete(cid, status, 0));
                self.distort(chosen, cid, captured)
            }
        }
    }
}
