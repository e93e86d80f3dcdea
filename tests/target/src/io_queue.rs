//! I/O commands, and the transfer of their data.

use std::sync::Arc;

use crate::connection::{Connection, End, Flow};
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
struct Reach {
    namespace: Arc<Namespace>,
    ana: AnaState,
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
}

/// An R2T that is not yet answered in full.
struct R2t {
    ttag: u16,
    offset: u32,
    len: u32,
    got: u32,
}

/// A command's range in bytes of the store.
struct Extent {
    namespace: Arc<Namespace>,
    offset: u64,
    len: usize,
}

impl Connection {
    pub fn on_io_command(&mut self, sqe: Sqe, data: &[u8]) -> Flow {
        self.shared.counters.io(sqe.opcode());
        if let Some(queue) = &self.queue {
            if queue.controller.options.traffic_based_keep_alive {
                queue.controller.heard();
            }
        }
        let result = match sqe.opcode() {
            op::READ => self.read(&sqe),
            op::WRITE => self.write(&sqe, data),
            op::FLUSH => self.flush(&sqe),
            _ => Err(Status::INVALID_OPCODE.dnr()),
        };
        if let Err(status) = result {
            self.complete(sqe.cid(), status, 0);
        }
        Ok(())
    }

    /// The namespace of a command, as this path reaches it.
    fn reach(&mut self, nsid: u32) -> Result<Reach, Status> {
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
    fn extent(&mut self, sqe: &Sqe, transfers: bool) -> Result<Extent, Status> {
        let namespace = self.reach(sqe.nsid())?.namespace;
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

    fn read(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let extent = self.extent(sqe, true)?;
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
        let out = &mut self.out.buf;
        let mut at = 0;
        while at < extent.len {
            let part = size.min(extent.len - at);
            let last = at + part == extent.len;
            let mut flags = if last { pdu::LAST } else { 0 };
            if last && success {
                flags |= pdu::SUCCESS;
            }
            format.c2h_data(out, cid, at as u32, part as u32, flags);
            extent
                .namespace
                .store
                .read_to(extent.offset + at as u64, part, out, || ());
            format.data_digest(out, part);
            at += part;
        }
        if success {
            self.retire(cid);
        } else {
            self.complete(cid, Status::SUCCESS, 0);
        }
        Ok(())
    }

    fn write(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        let extent = self.extent(sqe, true)?;
        if extent.namespace.write_protected() {
            return Err(Status::WRITE_PROTECTED.dnr());
        }
        let (kind, len) = sqe.sgl();
        if len as usize != extent.len {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        match kind {
            SGL_IN_CAPSULE => {
                if sqe.u64(24) != 0 {
                    return Err(Status::SGL_OFFSET_INVALID.dnr());
                }
                if data.len() != extent.len {
                    return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
                }
                extent.namespace.store.write(extent.offset, data, || ());
                self.complete(sqe.cid(), Status::SUCCESS, 0);
                Ok(())
            }
            SGL_TRANSPORT => {
                self.begin_transfer(sqe, len);
                Ok(())
            }
            _ => Err(Status::SGL_TYPE_INVALID.dnr()),
        }
    }

    fn flush(&mut self, sqe: &Sqe) -> Result<(), Status> {
        self.reach(sqe.nsid())?;
        self.complete(sqe.cid(), Status::SUCCESS, 0);
        Ok(())
    }

    /// Asks the host for a command's data.
    fn begin_transfer(&mut self, sqe: &Sqe, len: u32) {
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
        let status = self.finish_transfer(&transfer);
        if self.io.spare.len() < 64 {
            self.io.spare.push(transfer.buf);
        }
        self.complete(cid, status, 0);
        Ok(())
    }

    /// All data is there: the command is executed.
    fn finish_transfer(&mut self, transfer: &Transfer) -> Status {
        if !transfer.intact {
            return Status::TRANSIENT_TRANSPORT_ERROR;
        }
        // The namespace may have changed since the command came.
        let extent = match self.extent(&transfer.sqe, true) {
            Ok(extent) => extent,
            Err(status) => return status,
        };
        if extent.namespace.write_protected() {
            return Status::WRITE_PROTECTED.dnr();
        }
        extent
            .namespace
            .store
            .write(extent.offset, &transfer.buf, || ());
        Status::SUCCESS
    }
}
