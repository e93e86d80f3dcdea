//! Admin and fabrics commands.

use std::sync::atomic::Ordering;

use crate::connection::{Connection, Flow};
use crate::status::Status;
use crate::sync::Locked;
use crate::wire::{SGL_IN_CAPSULE, SGL_TRANSPORT, Sqe, op};

/// What an admin queue remembers.
#[derive(Default)]
pub(crate) struct Admin {
    /// Asynchronous Event Requests that wait, oldest first.
    pub event_requests: Vec<u16>,
}

/// What an admin command ends in.
pub(crate) enum Reply {
    /// A status and dwords 0 and 1.
    Done(Status, u64),
    /// Data for the host.
    Data(Vec<u8>),
    /// It is answered later.
    Later,
}

impl From<Status> for Reply {
    fn from(status: Status) -> Self {
        Self::Done(status, 0)
    }
}

const OK: Reply = Reply::Done(Status::SUCCESS, 0);

impl Connection {
    pub fn on_admin_command(&mut self, sqe: Sqe, data: &[u8]) -> Flow {
        let reply = self.admin_command(&sqe, data);
        self.reply(&sqe, reply);
        Ok(())
    }

    /// Answers a command.
    pub fn reply(&mut self, sqe: &Sqe, reply: Reply) {
        match reply {
            Reply::Done(status, result) => self.complete(sqe.cid(), status, result),
            Reply::Data(mut data) => {
                // The data is as long as the descriptor says, whatever the structure holds.
                let (kind, len) = sqe.sgl();
                if kind != SGL_TRANSPORT {
                    return self.complete(sqe.cid(), Status::SGL_TYPE_INVALID.dnr(), 0);
                }
                data.resize(len as usize, 0);
                self.complete_with(sqe.cid(), &data, Status::SUCCESS, 0);
            }
            Reply::Later => {}
        }
    }

    fn admin_command(&mut self, sqe: &Sqe, data: &[u8]) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let controller = queue.controller.clone();
        if sqe.opcode() == op::KEEP_ALIVE || controller.options.traffic_based_keep_alive {
            controller.heard();
        }
        self.shared.counters.admin(sqe);
        // One SGL descriptor: a read's data is bounded here, once for all.
        const MOST: u32 = 4 << 20;
        if sqe.sgl().1 > MOST {
            return Status::INVALID_FIELD.dnr().into();
        }
        if sqe.opcode() == op::FABRICS {
            return self.fabrics_command(sqe);
        }
        if !controller.is_ready() {
            return Status::COMMAND_SEQUENCE_ERROR.dnr().into();
        }
        match sqe.opcode() {
            op::IDENTIFY => self.identify(sqe),
            op::GET_LOG_PAGE => self.get_log_page(sqe),
            op::SET_FEATURES => self.set_features(sqe, data),
            op::GET_FEATURES => self.get_features(sqe),
            op::KEEP_ALIVE => OK,
            op::ASYNC_EVENT => {
                if self.admin.event_requests.len() > usize::from(controller.options.aerl) {
                    return Status::AER_LIMIT.dnr().into();
                }
                self.admin.event_requests.push(sqe.cid());
                self.fire_events();
                Reply::Later
            }
            op::ABORT => self.abort(sqe),
            _ => Status::INVALID_OPCODE.dnr().into(),
        }
    }

    fn fabrics_command(&mut self, sqe: &Sqe) -> Reply {
        match sqe.fctype() {
            op::PROPERTY_GET => self.property_get(sqe),
            op::PROPERTY_SET => self.property_set(sqe),
            op::CONNECT => Status::COMMAND_SEQUENCE_ERROR.dnr().into(),
            _ => Status::INVALID_OPCODE.dnr().into(),
        }
    }

    /// Property Get (base specification, section 6.6).
    fn property_get(&self, sqe: &Sqe) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let c = &queue.controller;
        let eight = sqe.u8(40) & 7 == 1;
        let value = match (sqe.u32(44), eight) {
            (0x00, true) => c.cap(),
            (0x08, false) => u64::from(c.options.version),
            (0x14, false) => u64::from(c.registers.locked().cc),
            (0x1c, false) => u64::from(c.csts()),
            _ => return Status::INVALID_FIELD.dnr().into(),
        };
        Reply::Done(Status::SUCCESS, value)
    }

    /// Property Set (section 6.5).
    fn property_set(&self, sqe: &Sqe) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let (size, offset, value) = (sqe.u8(40) & 7, sqe.u32(44), sqe.u64(48));
        if (size, offset) != (0, 0x14) {
            return Status::INVALID_FIELD.dnr().into();
        }
        let cc = value as u32;
        let enabling = cc & 1 == 1;
        let (iosqes, iocqes, mps, css) =
            (cc >> 16 & 0xf, cc >> 20 & 0xf, cc >> 7 & 0xf, cc >> 4 & 7);
        if enabling && (iosqes, iocqes) != (6, 4) {
            let id = queue.controller.id;
            self.shared.violation(format_args!(
                "controller {id}: CC.IOSQES {iosqes}, CC.IOCQES {iocqes}"
            ));
        }
        if enabling && (mps != 0 || css != 0) {
            return Status::INVALID_FIELD.dnr().into();
        }
        queue.controller.set_cc(cc);
        OK
    }

    /// Abort (section 5.1): a command that is held is completed with Command Abort Requested.
    fn abort(&mut self, sqe: &Sqe) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let (sqid, cid) = (sqe.cdw(10) as u16, (sqe.cdw(10) >> 16) as u16);
        self.shared.counters.abort();
        let link = queue.controller.links.locked().get(&sqid).cloned();
        // Dword 0, bit 0: the command was not aborted.
        let aborted = link.is_some_and(|link| link.abort(cid));
        Reply::Done(Status::SUCCESS, u64::from(!aborted))
    }

    fn set_features(&mut self, sqe: &Sqe, data: &[u8]) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let c = &queue.controller;
        let value = sqe.cdw(11);
        match sqe.cdw(10) as u8 {
            // Number of Queues: both counts are zero-based (section 5.27.1.5).
            0x07 => {
                let (sq, cq) = (value & 0xffff, value >> 16);
                if sq == 0xffff || cq == 0xffff {
                    return Status::INVALID_FIELD.dnr().into();
                }
                let limit = c.subsystem.options().max_io_queues;
                if limit == 0 {
                    c.granted.store(0, Ordering::Relaxed);
                    return Status::INTERNAL_ERROR.dnr().into();
                }
                let granted = (sq.min(cq) + 1).min(u32::from(limit));
                c.granted.store(granted as u16, Ordering::Relaxed);
                Reply::Done(
                    Status::SUCCESS,
                    u64::from((granted - 1) | (granted - 1) << 16),
                )
            }
            0x0b => {
                c.features.locked().async_events = value;
                OK
            }
            0x0f => {
                if value != 0 && c.options.kas == 0 {
                    return Status::KATO_INVALID.dnr().into();
                }
                c.kato_ms.store(value, Ordering::Relaxed);
                c.heard();
                OK
            }
            0x06 => {
                c.features.locked().write_cache = value & 1;
                OK
            }
            0x16 => {
                let (kind, len) = sqe.sgl();
                if kind != SGL_IN_CAPSULE || len != 512 || data.len() != 512 {
                    return Status::DATA_SGL_LENGTH_INVALID.dnr().into();
                }
                c.features.locked().host_behavior.copy_from_slice(data);
                OK
            }
            0x81 => Status::COMMAND_SEQUENCE_ERROR.dnr().into(),
            fid @ (0x01 | 0x02 | 0x04 | 0x05 | 0x08 | 0x0a | 0x82 | 0x83) => {
                c.features.locked().plain.insert(fid, value);
                OK
            }
            _ => Status::INVALID_FIELD.dnr().into(),
        }
    }

    fn get_features(&mut self, sqe: &Sqe) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let c = &queue.controller;
        let features = c.features.locked();
        let value = match sqe.cdw(10) as u8 {
            0x07 => {
                let granted = u32::from(c.granted.load(Ordering::Relaxed)).max(1) - 1;
                granted | granted << 16
            }
            0x0b => features.async_events,
            0x0f => c.kato_ms.load(Ordering::Relaxed),
            0x06 => features.write_cache,
            0x16 => return Reply::Data(features.host_behavior.to_vec()),
            0x81 => return Reply::Data(c.host_id.to_vec()),
            fid @ (0x01 | 0x02 | 0x04 | 0x05 | 0x08 | 0x0a | 0x82 | 0x83) => {
                features.plain.get(&fid).copied().unwrap_or(0)
            }
            _ => return Status::INVALID_FIELD.dnr().into(),
        };
        Reply::Done(Status::SUCCESS, u64::from(value))
    }
}
