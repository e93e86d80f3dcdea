//! Connect (base specification, section 6.3): it makes a connection a queue of a controller.

use std::sync::Arc;

use crate::connection::{Connection, Flow, Queue};
use crate::controller::Controller;
use crate::status::Status;
use crate::subsystem::Subsystem;
use crate::sync::Locked;
use crate::wire::{SGL_IN_CAPSULE, Sqe, nqn_at, put, u16_at};

/// Bytes of Connect's data.
const DATA_LEN: usize = 1024;
/// Offsets into the submission queue entry.
const SQE_RECFMT: u16 = 40;
const SQE_QID: u16 = 42;
const SQE_SQSIZE: u16 = 44;
/// Offsets into the data.
const DATA_CNTLID: u16 = 16;
const DATA_SUBNQN: u16 = 256;
const DATA_HOSTNQN: u16 = 512;
/// IATTR: the parameter is in the data, not in the entry.
const IN_DATA: u64 = 1 << 16;
/// CNTLID that asks for any controller (dynamic controller model).
const ANY_CONTROLLER: u16 = 0xffff;

/// A refusal: the status, and the result that says which parameter is wrong.
type Refusal = (Status, u64);

fn in_sqe(at: u16) -> Refusal {
    (Status::CONNECT_INVALID_PARAMETERS.dnr(), u64::from(at))
}

fn in_data(at: u16) -> Refusal {
    (
        Status::CONNECT_INVALID_PARAMETERS.dnr(),
        IN_DATA | u64::from(at),
    )
}

impl Connection {
    pub fn on_connect(&mut self, sqe: Sqe, data: &[u8]) -> Flow {
        self.shared.counters.connect();
        match self.connect(&sqe, data) {
            Ok((queue, result)) => {
                let first = queue.id == 0;
                let controller = queue.controller.clone();
                self.queue = Some(queue);
                if let Some(head) = self.queue.as_mut().and_then(|q| q.head.as_mut()) {
                    *head = 1;
                }
                self.complete(sqe.cid(), Status::SUCCESS, result);
                if first {
                    self.shared.association_began();
                }
                controller.heard();
            }
            Err((status, result)) => {
                self.shared.counters.connect_refused();
                self.bare_completion(sqe.cid(), status, result);
            }
        }
        Ok(())
    }

    fn connect(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(Queue, u64), Refusal> {
        let (kind, len) = sqe.sgl();
        if kind != SGL_IN_CAPSULE || len as usize != DATA_LEN || data.len() != DATA_LEN {
            return Err((Status::DATA_SGL_LENGTH_INVALID.dnr(), 0));
        }
        if sqe.u16(usize::from(SQE_RECFMT)) != 0 {
            return Err((Status::CONNECT_FORMAT.dnr(), 0));
        }
        let (qid, sqsize) = (
            sqe.u16(usize::from(SQE_QID)),
            sqe.u16(usize::from(SQE_SQSIZE)),
        );
        let (cattr, kato) = (sqe.u8(46), sqe.u32(48));
        let mut host_id = [0; 16];
        put(&mut host_id, 0, &data[..16]);
        let cntlid = u16_at(data, usize::from(DATA_CNTLID));
        let subnqn = nqn_at(data, usize::from(DATA_SUBNQN), 256).ok_or(in_data(DATA_SUBNQN))?;
        let hostnqn = nqn_at(data, usize::from(DATA_HOSTNQN), 256).ok_or(in_data(DATA_HOSTNQN))?;
        if !valid_nqn(&hostnqn) {
            return Err(in_data(DATA_HOSTNQN));
        }
        // What the PSK identity says is what Connect says (transport specification, section 3.6.1.4).
        if let Some(peer) = self.peer() {
            if peer.host_nqn != hostnqn || peer.subsystem_nqn != subnqn {
                return Err((Status::CONNECT_INVALID_HOST.dnr(), 0));
            }
        }
        let subsystem = self
            .shared
            .find_subsystem(&subnqn)
            .ok_or(in_data(DATA_SUBNQN))?;
        let options = subsystem.options();
        if options
            .allowed_hosts
            .as_ref()
            .is_some_and(|allowed| !allowed.contains(&hostnqn))
        {
            return Err((
                Status::CONNECT_INVALID_HOST.dnr(),
                IN_DATA | u64::from(DATA_HOSTNQN),
            ));
        }
        if sqsize == 0 || (qid != 0 && sqsize > options.mqes) {
            return Err(in_sqe(SQE_SQSIZE));
        }
        // At least 32 entries in an admin queue (base specification, section 6.3, SQSIZE).
        if qid == 0 && sqsize < 31 {
            return Err(in_sqe(SQE_SQSIZE));
        }
        let controller = if qid == 0 {
            if cntlid != ANY_CONTROLLER {
                return Err(in_data(DATA_CNTLID));
            }
            if kato != 0 && options.kas == 0 {
                return Err((Status::KATO_INVALID.dnr(), 0));
            }
            self.create(subsystem, hostnqn, host_id, kato)
        } else {
            self.attach(&subsystem, cntlid, qid, &hostnqn, &host_id)?
        };
        controller.links.locked().insert(qid, self.link.clone());
        let auth = controller.options.auth.as_ref();
        self.auth.required = auth.is_some_and(|auth| qid == 0 || auth.io_queues);
        // AUTHREQ, bits 31:16: an authentication transaction is required (ATR, bit 1).
        let authreq = u64::from(self.auth.required) << 17;
        let result = u64::from(controller.id) | authreq;
        // CATTR bit 2: the host switches submission queue flow control off.
        let head = (cattr & 1 << 2 == 0).then_some(0);
        let size = u32::from(sqsize) + 1;
        let outstanding = Box::new([0; 1024]);
        Ok((
            Queue {
                controller,
                id: qid,
                size,
                head,
                outstanding,
                outstanding_count: 0,
            },
            result,
        ))
    }

    fn create(
        &self,
        subsystem: Arc<Subsystem>,
        nqn: String,
        id: [u8; 16],
        kato: u32,
    ) -> Arc<Controller> {
        let controller = Arc::new(Controller::new(
            subsystem.clone(),
            self.port.id(),
            nqn,
            id,
            kato,
        ));
        let mut all = subsystem.controllers.locked();
        all.retain(|c| c.strong_count() > 0);
        all.push(Arc::downgrade(&controller));
        controller
    }

    fn attach(
        &self,
        subsystem: &Arc<Subsystem>,
        cntlid: u16,
        qid: u16,
        hostnqn: &str,
        host_id: &[u8; 16],
    ) -> Result<Arc<Controller>, Refusal> {
        let all = subsystem.live_controllers();
        let controller = all
            .into_iter()
            .find(|c| c.id == cntlid && c.links.locked().contains_key(&0));
        let controller = controller.ok_or(in_data(DATA_CNTLID))?;
        // The same host on the same port (base specification, section 6.3).
        if controller.host_nqn != hostnqn || controller.port != self.port.id() {
            return Err(in_data(DATA_HOSTNQN));
        }
        if controller.host_id != *host_id {
            return Err(in_data(0));
        }
        if !controller.is_ready() {
            return Err((Status::COMMAND_SEQUENCE_ERROR.dnr(), 0));
        }
        let granted = controller
            .granted
            .load(std::sync::atomic::Ordering::Relaxed);
        if subsystem.is_discovery() || (qid > granted && controller.options.enforce_queue_grant) {
            return Err(in_sqe(SQE_QID));
        }
        if controller.links.locked().contains_key(&qid) {
            return Err((Status::COMMAND_SEQUENCE_ERROR.dnr(), 0));
        }
        Ok(controller)
    }

    /// Completes Asynchronous Event Requests with what has happened.
    pub fn fire_events(&mut self) {
        let Some(queue) = &self.queue else { return };
        let controller = queue.controller.clone();
        while let Some(&cid) = self.admin.event_requests.first() {
            let Some(event) = controller.take_event() else {
                break;
            };
            self.admin.event_requests.remove(0);
            self.complete(cid, Status::SUCCESS, u64::from(event));
        }
    }
}

/// The form of an NQN (base specification, section 4.5), as far as hosts get it wrong.
fn valid_nqn(nqn: &str) -> bool {
    nqn.starts_with("nqn.") && nqn.len() >= 11 && nqn.len() <= 223
}
