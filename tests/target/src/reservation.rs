//! Persistent reservations (base specification, sections 7.2 to 7.5 and 8.19).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::connection::Connection;
use crate::io_queue::Next;
use crate::status::Status;
use crate::sync::Locked;
use crate::wire::{SGL_TRANSPORT, Sqe, op, put, u64_at};

/// What a command wants of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// A host's 128-bit identifier.
type HostId = [u8; 16];

struct Registrant {
    host: HostId,
    key: u64,
    cntlid: u16,
}

/// A reservation that is held. Of the all-registrants types every registrant is a holder.
#[derive(Clone, Copy)]
struct Held {
    kind: u8,
    by: HostId,
}

#[derive(Default)]
struct State {
    generation: u32,
    registrants: Vec<Registrant>,
    held: Option<Held>,
    persist: bool,
}

/// The reservations of a namespace.
#[derive(Default)]
pub(crate) struct Reservations {
    /// Whether there is one: what most commands need to know.
    held: AtomicBool,
    state: Mutex<State>,
}

/// Reservation types (figure 387): write exclusive 1, exclusive access 2, each for registrants only 3 and 4,
/// each for all registrants 5 and 6.
fn all_registrants(kind: u8) -> bool {
    kind >= 5
}
fn excludes_reads(kind: u8) -> bool {
    kind % 2 == 0
}

impl State {
    fn key_of(&self, host: &HostId) -> Option<u64> {
        self.registrants
            .iter()
            .find(|r| r.host == *host)
            .map(|r| r.key)
    }

    fn holds(&self, host: &HostId) -> bool {
        self.held.is_some_and(|h| {
            if all_registrants(h.kind) {
                self.key_of(host).is_some()
            } else {
                h.by == *host
            }
        })
    }

    /// Takes registrations away. A reservation goes with its holder, or with the last registrant.
    fn unregister(&mut self, gone: impl Fn(&Registrant) -> bool) {
        self.registrants.retain(|r| !gone(r));
        let Some(held) = self.held else { return };
        let stays = if all_registrants(held.kind) {
            !self.registrants.is_empty()
        } else {
            self.key_of(&held.by).is_some()
        };
        if !stays {
            self.held = None;
        }
    }
}

impl Reservations {
    /// Whether a host may read, or write (figure 388: command behavior in the presence of a reservation).
    pub fn allows(&self, host: &HostId, access: Access) -> bool {
        if !self.held.load(Ordering::Acquire) {
            return true;
        }
        let state = self.state.locked();
        let Some(held) = state.held else { return true };
        if access == Access::Read && !excludes_reads(held.kind) {
            return true;
        }
        // From type 3 on registrants are let in.
        state.holds(host) || (held.kind >= 3 && state.key_of(host).is_some())
    }

    fn change(&self, change: impl FnOnce(&mut State) -> Result<(), Status>) -> Result<(), Status> {
        let mut state = self.state.locked();
        let result = change(&mut state);
        self.held.store(state.held.is_some(), Ordering::Release);
        result
    }

    /// Reservation Register (section 7.3).
    fn register(
        &self,
        host: HostId,
        cntlid: u16,
        cdw10: u32,
        old: u64,
        new: u64,
    ) -> Result<(), Status> {
        let (action, ignore_key, cptpl) = (cdw10 & 7, cdw10 & 1 << 3 != 0, cdw10 >> 30);
        self.change(|s| {
            let current = s.key_of(&host);
            let matches = ignore_key || current == Some(old);
            match (action, current) {
                (0, Some(key)) if key != new => return Err(Status::RESERVATION_CONFLICT.dnr()),
                (0, Some(_)) => {}
                (0, None) => s.registrants.push(Registrant {
                    host,
                    key: new,
                    cntlid,
                }),
                (1, Some(_)) if matches => s.unregister(|r| r.host == host),
                (2, Some(_)) if matches => {
                    s.registrants
                        .iter_mut()
                        .filter(|r| r.host == host)
                        .for_each(|r| r.key = new);
                }
                (2, None) if ignore_key => s.registrants.push(Registrant {
                    host,
                    key: new,
                    cntlid,
                }),
                (1 | 2, _) => return Err(Status::RESERVATION_CONFLICT.dnr()),
                _ => return Err(Status::INVALID_FIELD.dnr()),
            }
            s.generation = s.generation.wrapping_add(1);
            // CPTPL: 10b and 11b switch persistence through power loss off and on.
            match cptpl {
                2 => s.persist = false,
                3 => s.persist = true,
                _ => {}
            }
            Ok(())
        })
    }

    /// Reservation Acquire (section 7.2).
    fn acquire(&self, host: HostId, cdw10: u32, key: u64, preempted: u64) -> Result<(), Status> {
        let (action, ignore_key, kind) = (cdw10 & 7, cdw10 & 1 << 3 != 0, (cdw10 >> 8) as u8);
        if ignore_key || !(1..=6).contains(&kind) || action > 2 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        self.change(|s| {
            if s.key_of(&host) != Some(key) {
                return Err(Status::RESERVATION_CONFLICT.dnr());
            }
            if action == 0 {
                return match s.held {
                    None => {
                        s.held = Some(Held { kind, by: host });
                        Ok(())
                    }
                    Some(held) if held.kind == kind && s.holds(&host) => Ok(()),
                    Some(_) => Err(Status::RESERVATION_CONFLICT.dnr()),
                };
            }
            s.preempt(host, kind, preempted)
        })
    }

    /// Reservation Release (section 7.4).
    fn release(&self, host: HostId, cdw10: u32, key: u64) -> Result<(), Status> {
        let (action, ignore_key, kind) = (cdw10 & 7, cdw10 & 1 << 3 != 0, (cdw10 >> 8) as u8);
        if ignore_key || action > 1 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        self.change(|s| {
            if s.key_of(&host) != Some(key) {
                return Err(Status::RESERVATION_CONFLICT.dnr());
            }
            if action == 1 {
                s.generation = s.generation.wrapping_add(1);
                s.registrants.clear();
                s.held = None;
                return Ok(());
            }
            match s.held {
                Some(held) if s.holds(&host) => {
                    if held.kind != kind {
                        return Err(Status::INVALID_FIELD.dnr());
                    }
                    s.held = None;
                    Ok(())
                }
                // Releasing what one does not hold changes nothing.
                _ => Ok(()),
            }
        })
    }

    /// The Reservation Status data structure, extended (figure 401).
    fn report(&self) -> Vec<u8> {
        let state = self.state.locked();
        let mut b = vec![0; 64];
        put(&mut b, 0, &state.generation.to_le_bytes());
        b[4] = state.held.map_or(0, |h| h.kind);
        put(&mut b, 5, &(state.registrants.len() as u16).to_le_bytes());
        b[9] = u8::from(state.persist);
        for r in &state.registrants {
            let mut entry = [0; 64];
            put(&mut entry, 0, &r.cntlid.to_le_bytes());
            entry[2] = u8::from(state.holds(&r.host));
            put(&mut entry, 8, &r.key.to_le_bytes());
            put(&mut entry, 16, &r.host);
            b.extend_from_slice(&entry);
        }
        b
    }
}

impl State {
    /// Preempt (section 8.19.7).
    fn preempt(&mut self, host: HostId, kind: u8, preempted: u64) -> Result<(), Status> {
        let known = self.registrants.iter().any(|r| r.key == preempted);
        let takes_over = match self.held {
            None => false,
            Some(held) if all_registrants(held.kind) => preempted == 0,
            Some(held) => self.key_of(&held.by) == Some(preempted),
        };
        if !takes_over && preempted == 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if !takes_over && !known {
            return Err(Status::RESERVATION_CONFLICT.dnr());
        }
        let all = takes_over && preempted == 0;
        self.generation = self.generation.wrapping_add(1);
        self.unregister(|r| r.host != host && (all || r.key == preempted));
        if takes_over {
            self.held = Some(Held { kind, by: host });
        }
        Ok(())
    }
}

impl Connection {
    /// Register, Acquire and Release.
    pub fn reservation_command(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        let namespace = self.reservable(sqe)?;
        let Some(queue) = &self.queue else {
            return Err(Status::INTERNAL_ERROR);
        };
        let (host, cntlid, cdw10) = (queue.controller.host_id, queue.controller.id, sqe.cdw(10));
        let r = &namespace.reservations;
        match sqe.opcode() {
            op::RESERVATION_REGISTER => {
                r.register(host, cntlid, cdw10, u64_at(data, 0), u64_at(data, 8))
            }
            op::RESERVATION_ACQUIRE => r.acquire(host, cdw10, u64_at(data, 0), u64_at(data, 8)),
            _ => r.release(host, cdw10, u64_at(data, 0)),
        }
    }

    /// Reservation Report (section 7.5).
    pub fn reservation_report(&mut self, sqe: &Sqe) -> Result<Next, Status> {
        let namespace = self.reservable(sqe)?;
        let len = (u64::from(sqe.cdw(10)) + 1) * 4;
        let (kind, told) = sqe.sgl();
        if kind != SGL_TRANSPORT || u64::from(told) != len || len > 1 << 20 {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        // EDS: hosts have identifiers of 128 bits here, which only the extended structure holds.
        if sqe.cdw(11) & 1 == 0 {
            return Err(Status::HOST_ID_FORMAT.dnr());
        }
        let mut data = namespace.reservations.report();
        data.resize(len as usize, 0);
        self.complete_with(sqe.cid(), &data, Status::SUCCESS, 0);
        Ok(Next::Answered)
    }

    fn reservable(
        &mut self,
        sqe: &Sqe,
    ) -> Result<std::sync::Arc<crate::subsystem::Namespace>, Status> {
        let namespace = self.reach(sqe.nsid())?.namespace;
        if namespace.options().rescap == 0 {
            return Err(Status::INVALID_OPCODE.dnr());
        }
        Ok(namespace)
    }
}
