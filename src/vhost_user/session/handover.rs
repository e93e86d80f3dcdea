//! A session that goes on under another process: as it is told, and as it is taken up there.

use std::fs::File;
use std::io;
use std::sync::Arc;

use log::{error, info};

use super::Session;
use super::notices::Notices;
use crate::vhost_user::channel::Channel;
use crate::vhost_user::config;
use crate::vhost_user::device::Paused;
use crate::vhost_user::handover::{
    Incoming, KickState, MissingFd, Outgoing, RegionState, RingState, SessionState,
};
use crate::vhost_user::rings::{Addresses, Kick, Ring};
use crate::virtio::memory::{GuestMemory, Region};

/// Offset of `wce` in the configuration space (virtio 1.2, section 5.2.4): all of it that a driver can write.
const WRITE_CACHE: u32 = 32;

impl Ring {
    fn export(&self, fds: &mut Outgoing) -> io::Result<RingState> {
        // Without `..`: what is new in a ring has to be told too.
        let Ring {
            size,
            addresses,
            used_log,
            base,
            kick,
            call,
            err,
            enabled,
            running,
        } = self;
        Ok(RingState {
            size: *size,
            addresses: addresses.map(|at| {
                let Addresses {
                    desc_table,
                    avail_ring,
                    used_ring,
                } = at;
                [desc_table, avail_ring, used_ring]
            }),
            used_log: *used_log,
            base: *base,
            kick: match kick {
                Kick::Missing => KickState::Missing,
                Kick::Polled => KickState::Polled,
                Kick::Fd(file) => KickState::Fd(fds.add(file)?),
            },
            call: fds.add_some(call.as_ref())?,
            err: fds.add_some(err.as_ref())?,
            enabled: *enabled,
            running: running.is_some(),
        })
    }

    /// The ring of `state`, which does not run yet.
    fn import(state: &RingState, fds: &mut Incoming) -> Result<Self, MissingFd> {
        let RingState {
            size,
            addresses,
            used_log,
            base,
            kick,
            call,
            err,
            enabled,
            // The session starts it, with the memory.
            running: _,
        } = state;
        Ok(Ring {
            size: *size,
            addresses: addresses.map(|[desc_table, avail_ring, used_ring]| Addresses {
                desc_table,
                avail_ring,
                used_ring,
            }),
            used_log: *used_log,
            base: *base,
            kick: match kick {
                KickState::Missing => Kick::Missing,
                KickState::Polled => Kick::Polled,
                KickState::Fd(number) => Kick::Fd(File::from(fds.take(*number)?)),
            },
            call: fds.take_some(*call)?,
            err: fds.take_some(*err)?,
            enabled: *enabled,
            running: None,
        })
    }
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Session {
    /// What another process needs to know to go on with this session. The rings may run.
    pub(in crate::vhost_user) fn export(&self, fds: &mut Outgoing) -> Result<SessionState, String> {
        // Without `..`: what is new in a session has to be told too, or said to be told by somebody else.
        let Session {
            name: _,
            device,
            memory,
            postcopy,
            rings,
            features,
            features_asked,
            features_refused,
            protocol,
            status,
            inflight,
            log,
            notices,
            transfer,
        } = self;
        // What a VMM advises of before a migration that needs no postcopy in the end is never taken back. With
        // memory in use it has no effect any more.
        let waits = postcopy.is_some() && memory.regions().is_empty();
        if waits || self.is_listening() || transfer.is_some() {
            return Err("the VM is being migrated: try again when that is over".to_owned());
        }
        let regions = memory.regions().iter().map(|region| {
            let (file, offset) = region.file().ok_or("a memory region without a file")?;
            Ok(RegionState {
                guest_addr: region.guest_addr,
                user_addr: region.user_addr,
                len: region.len,
                offset,
                file: fds.add(file).map_err(words)?,
            })
        });
        let memory = regions.collect::<Result<_, String>>()?;
        let rings = rings.iter().map(|ring| ring.export(fds).map_err(words));
        let rings = rings.collect::<Result<_, String>>()?;
        let inflight = inflight.as_ref().map(|region| region.export(fds));
        let (capacity_read, capacity_told) = notices.capacities();
        Ok(SessionState {
            features: *features,
            features_asked: *features_asked,
            features_refused: *features_refused,
            protocol: *protocol,
            status: *status,
            write_cache: config::read(&**device, WRITE_CACHE, 1)?[0],
            memory,
            inflight: inflight.transpose().map_err(words)?,
            log: log.export(fds).map_err(words)?,
            channel: notices.export_channel(fds).map_err(words)?,
            capacity_read,
            capacity_told,
            rings,
        })
    }

    /// Takes up a session of another process, whose features have been negotiated here again. No ring runs
    /// afterwards.
    pub(in crate::vhost_user) fn import(
        &mut self,
        state: &SessionState,
        fds: &mut Incoming,
    ) -> Result<(), String> {
        let SessionState {
            features,
            features_asked,
            features_refused,
            protocol,
            status,
            write_cache,
            memory,
            inflight,
            log,
            channel,
            capacity_read,
            capacity_told,
            rings,
        } = state;
        if self.features != *features || self.protocol != *protocol {
            return Err(format!(
                "the VMM has features {features:#x} and protocol features {protocol:#x}, which are not all \
                 offered any more"
            ));
        }
        if rings.len() != self.rings.len() {
            let (theirs, ours) = (rings.len(), self.rings.len());
            return Err(format!("the VMM has {theirs} rings, and there are {ours}"));
        }
        self.features_asked = *features_asked;
        self.features_refused = *features_refused;
        self.status = *status;
        config::write(&*self.device, WRITE_CACHE, 0, &[*write_cache])?;
        let regions = memory.iter().map(|region| {
            let file = fds.take(region.file).map_err(words)?;
            let (offset, guest) = (region.offset, region.guest_addr);
            Region::map(file, offset, guest, region.user_addr, region.len).map_err(words)
        });
        let regions = regions.collect::<Result<_, String>>()?;
        self.memory = Arc::new(GuestMemory::new(regions).map_err(words)?);
        if let Some(inflight) = inflight {
            self.import_inflight(inflight, fds)?;
        }
        if let Some(log) = log {
            self.import_log(log, fds)?;
        }
        let channel = channel
            .as_ref()
            .map(|channel| Channel::import(channel, fds));
        self.notices = Notices::import(channel.transpose()?, *capacity_read, *capacity_told);
        let max = self.device.max_queue_size();
        for (ring, state) in self.rings.iter_mut().zip(rings) {
            if state.size.is_some_and(|size| size == 0 || size > max) {
                return Err(format!(
                    "a ring of {:?} entries; {max} are the most",
                    state.size
                ));
            }
            *ring = Ring::import(state, fds).map_err(words)?;
        }
        Ok(())
    }

    /// Stops all running rings, drained, for this process or another to go on with them. Where each goes on
    /// is in the answer, by its number; the image stays locked.
    pub(in crate::vhost_user) fn pause(&mut self) -> Paused<String> {
        let name = &self.name;
        let mut progress = |in_flight: u32| {
            info!("{name}: waiting for {in_flight} requests in flight, to hand the disk over");
        };
        let mut paused = self.device.pause(&mut progress);
        if let Some(what) = self.lost_memory() {
            // Requests may have ended without a word to the driver.
            paused.image = Err(format!("{what} has lost its pages"));
        }
        paused
            .bases
            .retain(|(index, _)| self.rings[usize::from(*index)].is_running());
        for ring in &mut self.rings {
            ring.running = None;
        }
        paused
    }

    /// Starts the rings of `bases` where they stopped. They fetch nothing before [`Session::go_on`].
    pub(in crate::vhost_user) fn start_paused(
        &mut self,
        bases: &[(u16, u32)],
    ) -> Result<(), String> {
        for (index, base) in bases {
            let index = usize::from(*index);
            let Some(ring) = self.rings.get_mut(index) else {
                return Err(format!("there is no ring {index}"));
            };
            if ring.is_running() || !ring.is_complete() {
                return Err(format!("ring {index} is not one that can be started"));
            }
            // What the VMM has said of it stays, for when it says it again.
            let said = (ring.base.replace(*base), ring.enabled.replace(false));
            let started = self.start(index);
            let ring = &mut self.rings[index];
            (ring.base, ring.enabled) = said;
            started.map_err(|why| format!("ring {index} cannot start: {why}"))?;
        }
        Ok(())
    }

    /// Lets the rings fetch requests that are enabled.
    pub(in crate::vhost_user) fn go_on(&mut self) -> Result<(), String> {
        for index in 0..self.rings.len() {
            self.update_enabled(index).map_err(words)?;
        }
        // Not before, and not of what it has been told: to the VMM no ring has started.
        if self.rings.iter().any(Ring::is_running) {
            self.tell_change();
        }
        Ok(())
    }

    /// Starts the rings again in the process that has paused them. False if that can not be done: the connection
    /// is to end then, so that the VMM begins anew.
    pub(in crate::vhost_user) fn resume(&mut self, bases: &[(u16, u32)]) -> bool {
        let started = self.start_paused(bases).and_then(|()| self.go_on());
        self.device.resumed();
        let Err(why) = started else {
            return true;
        };
        error!("{}: after an upgrade that failed, {why}", self.name);
        for (index, base) in bases {
            // Whoever asks where it stands hears where it stopped, not where it once began.
            match self.rings.get_mut(usize::from(*index)) {
                Some(ring) if !ring.is_running() => ring.base = Some(*base),
                _ => {}
            }
        }
        self.signal_errors();
        false
    }
}
