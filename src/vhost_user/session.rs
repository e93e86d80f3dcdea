//! The state of one connection with a VMM, and what each message does to it.

mod handover;
mod inflight;
mod log;
mod messages;
mod notices;
mod postcopy;
mod state;
mod stop;

use std::fs::File;
use std::io;
use std::sync::Arc;

use ::log::{info, warn};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::{Error, Result, VhostUserBackendReqHandlerMut, VhostUserVirtioFeatures};

use super::device::{Device, RingStart};
use super::postcopy::Postcopy;
use super::rings::{Kick, Ring, Running, signal_error};
use crate::mappings;
use crate::virtio::memory::GuestMemory;
pub(super) use stop::GET_VRING_BASE_SKIP_DRAIN;
use stop::Stop;

/// Bit 30: the front-end may negotiate protocol features.
pub(super) const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// `VHOST_F_LOG_ALL`: writes to guest memory are marked in the dirty log. The session's, as bit 30 is.
pub(super) const F_LOG_ALL: u64 = 1 << 26;
/// Features that are about the connection and not about the device.
const SESSION_FEATURES: u64 = F_PROTOCOL_FEATURES | F_LOG_ALL;

/// Features that change what lies in the guest's memory or what must be done with it:
/// `ACCESS_PLATFORM`, `RING_PACKED` and `IN_ORDER`. A driver that accepts one of them where the device has
/// not offered it cannot be served. Others are ignored: QEMU offers some of its own accord (`ANY_LAYOUT`, `RING_RESET`) and passes
/// on that the guest accepted them.
const BINDING_FEATURES: u64 = 1 << 33 | 1 << 34 | 1 << 35;

/// `FEATURES_OK` of the device status (virtio 1.2, section 2.1).
const STATUS_FEATURES_OK: u8 = 8;

/// The protocol features that a session offers.
pub(super) const PROTOCOL_FEATURES: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::STATUS)
    .union(Protocol::DEVICE_STATE)
    .union(Protocol::GET_VRING_BASE_INFLIGHT)
    .union(stop::SKIP_DRAIN);

/// One connection with a VMM.
///
/// The `vhost` crate reads the messages and calls the methods of [`VhostUserBackendReqHandlerMut`]; an
/// error of theirs is always [`Error::ReqHandlerError`], which tells a request that was refused from a
/// connection that is broken.
///
/// New state must be added to `handover.rs` too, or a VMM would lose it when another process goes on with the
/// session.
pub(super) struct Session {
    name: String,
    device: Arc<dyn Device>,
    memory: Arc<GuestMemory>,
    postcopy: Option<Postcopy>,
    rings: Vec<Ring>,
    /// What `SET_FEATURES` accepted, bit 30 included.
    features: u64,
    features_asked: bool,
    features_refused: bool,
    protocol: u64,
    status: u8,
    inflight: Option<inflight::Region>,
    log: log::Log,
    notices: notices::Notices,
    transfer: Option<state::Transfer>,
}

fn refuse(why: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::other(why.into()))
}

/// Another descriptor of the same open file, for the data plane to own.
fn copied(file: &Option<File>) -> io::Result<Option<File>> {
    file.as_ref().map(File::try_clone).transpose()
}

impl Session {
    pub(super) fn new(name: String, device: Arc<dyn Device>) -> Self {
        let rings = (0..device.num_queues()).map(|_| Ring::default()).collect();
        Session {
            name,
            device,
            memory: Arc::new(GuestMemory::empty()),
            postcopy: None,
            rings,
            features: 0,
            features_asked: false,
            features_refused: false,
            protocol: 0,
            status: 0,
            inflight: None,
            log: log::Log::default(),
            notices: notices::Notices::default(),
            transfer: None,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether a message with `need_reply` is answered. It is the `vhost` crate's rule: whoever never
    /// asked for the features cannot know that bit 30 is there.
    pub(super) fn replies_acked(&self) -> bool {
        self.features_asked && self.protocol & Protocol::REPLY_ACK.bits() != 0
    }

    /// Whether `SET_FEATURES` accepted bit 30.
    pub(super) fn protocol_features_acked(&self) -> bool {
        self.features & F_PROTOCOL_FEATURES != 0
    }

    /// Whether the front-end negotiated the `STATUS` messages.
    pub(super) fn status_acked(&self) -> bool {
        self.protocol & Protocol::STATUS.bits() != 0
    }

    /// The device status for `GET_STATUS`.
    pub(super) fn status(&self) -> u64 {
        u64::from(self.status)
    }

    /// `SET_STATUS`. Zero resets the device (virtio 1.2, section 2.1); everything else is kept for
    /// `GET_STATUS`, without `FEATURES_OK` if the features were refused.
    pub(super) fn set_status(&mut self, status: u64) -> Result<()> {
        let status = u8::try_from(status)
            .map_err(|_| refuse(format!("device status {status:#x} has more than 8 bits")))?;
        if status == 0 {
            return self.reset_device();
        }
        self.status = if self.features_refused {
            status & !STATUS_FEATURES_OK
        } else {
            status
        };
        Ok(())
    }

    /// The end of the connection: everything is stopped, the memory let go.
    pub(super) fn disconnect(&mut self) {
        // Whoever waits for a page that nobody will bring any more goes on first.
        self.postcopy = None;
        self.device.reset();
        self.forget_inflight();
        self.forget_log();
        self.rings.clear();
        self.memory = Arc::new(GuestMemory::empty());
    }

    /// Stops every ring, with everything answered that the guest has asked for.
    pub(super) fn drain(&mut self) {
        for index in 0..self.rings.len() {
            if self.rings[index].is_running() {
                if let Err(error) = self.stop_ring(index, Stop::Drain) {
                    warn!("{}: {error}", self.name);
                }
            }
        }
    }

    /// What was lost of the memory that is shared with the VMM ([`crate::mappings`]), in words.
    pub(super) fn lost_memory(&self) -> Option<String> {
        if !mappings::any_lost() {
            return None;
        }
        if self
            .inflight
            .as_ref()
            .is_some_and(inflight::Region::is_lost)
        {
            return Some("the inflight region".to_owned());
        }
        if self.log.is_lost() {
            return Some("the dirty log".to_owned());
        }
        let lost = self.memory.lost()?;
        Some(format!(
            "the region of {:#x} bytes at guest address {:#x}",
            lost.len, lost.guest_addr
        ))
    }

    /// Tells the VMM on every ring that it will not go on.
    pub(super) fn signal_errors(&self) {
        let errors = self.rings.iter().filter_map(|ring| ring.err.as_ref());
        errors.for_each(signal_error);
    }

    fn ring_index(&self, index: u32) -> Result<usize> {
        let count = self.rings.len();
        usize::try_from(index)
            .ok()
            .filter(|index| *index < count)
            .ok_or_else(|| refuse(format!("ring {index} does not exist: there are {count}")))
    }

    /// Bit 30 decides whether a ring begins enabled (vhost-user.rst, "Ring states").
    fn is_enabled(&self, index: usize) -> bool {
        self.rings[index]
            .enabled
            .unwrap_or(!self.protocol_features_acked())
    }

    /// Starts a ring that has all its parts.
    fn start_if_complete(&mut self, index: usize) -> Result<()> {
        // A front-end may speak of rings before it shares any memory; then they start with the memory.
        if !self.rings[index].is_complete() || self.memory.regions().is_empty() {
            return Ok(());
        }
        if let Err(why) = self.start(index) {
            if let Some(err) = &self.rings[index].err {
                signal_error(err);
            }
            return Err(refuse(format!("ring {index} cannot start: {why}")));
        }
        // Whoever starts a ring has given up a transfer that was not checked.
        self.transfer = None;
        self.tell_at_start();
        Ok(())
    }

    fn start(&mut self, index: usize) -> std::result::Result<(), String> {
        let enabled = self.is_enabled(index);
        let features = self.features & !SESSION_FEATURES;
        let Some(config) = self.rings[index]
            .config(&self.memory, features)
            .map_err(|error| error.to_string())?
        else {
            return Ok(());
        };
        let inflight = self.inflight_of(index, config.size)?;
        let kept = inflight.is_some();
        let ring = &mut self.rings[index];
        let copy = |file: &Option<File>| {
            copied(file).map_err(|error| format!("cannot copy one of its descriptors: {error}"))
        };
        let call = copy(&ring.call)?;
        let err = copy(&ring.err)?;
        let kick = match &ring.kick {
            Kick::Fd(file) => Some(
                file.try_clone()
                    .map_err(|error| format!("cannot copy its kick descriptor: {error}"))?,
            ),
            Kick::Polled | Kick::Missing => None,
        };
        self.device.start_ring(
            index as u16,
            RingStart {
                memory: Arc::clone(&self.memory),
                config,
                features,
                kick,
                call,
                err,
                enabled,
                inflight,
                used_log: ring.used_log,
            },
        )?;
        info!(
            "{}: ring {index} started: {} entries{} from {}{}",
            self.name,
            config.size,
            if config.packed { ", packed," } else { "" },
            config.base,
            if enabled { "" } else { ", disabled" },
        );
        ring.running = Some(Running {
            config,
            enabled,
            kept,
        });
        Ok(())
    }

    /// Stops a running ring.
    fn stop_ring(&mut self, index: usize, how: Stop) -> std::result::Result<u32, String> {
        let name = &self.name;
        let mut progress = |in_flight: u32| {
            info!("{name}: ring {index}: waiting for {in_flight} requests in flight");
        };
        let stopped = match how {
            Stop::Drain => self.device.stop_ring(index as u16, &mut progress),
            Stop::Suspend => self.device.suspend_ring(index as u16, &mut progress),
        };
        self.rings[index].stopped(stopped.as_ref().ok().copied());
        match stopped {
            // The ring's place was read from memory that may not be the guest's any more.
            Ok(_) if self.lost_memory().is_some() => Err(format!(
                "ring {index} lost its memory: nobody can go on with it"
            )),
            Ok(base) => {
                info!("{}: ring {index} stopped before entry {base}", self.name);
                Ok(base)
            }
            Err(why) => Err(format!("ring {index} did not stop cleanly: {why}")),
        }
    }

    /// Puts a new memory table in use: under the running rings, and for those that waited for it.
    fn use_memory(&mut self, table: Arc<GuestMemory>) -> Result<()> {
        let features = self.features & !SESSION_FEATURES;
        let mut moved = Vec::new();
        for (index, ring) in self.rings.iter().enumerate() {
            let Some(running) = &ring.running else {
                continue;
            };
            let config = ring
                .config(&table, features)
                .map_err(|error| {
                    refuse(format!(
                        "ring {index} is running, and with the new memory table {error}"
                    ))
                })?
                .ok_or_else(|| refuse(format!("ring {index} runs without addresses")))?;
            let old = &running.config;
            if (config.desc_table, config.avail_ring, config.used_ring)
                != (old.desc_table, old.avail_ring, old.used_ring)
            {
                moved.push(index);
            }
        }

        // A ring whose guest addresses change under it is stopped and started again: no VMM is known to
        // do this, so it need not be fast.
        let mut kicks = Vec::with_capacity(moved.len());
        for &index in &moved {
            let kick = std::mem::take(&mut self.rings[index].kick);
            let stopped = self.stop_ring(index, Stop::Drain);
            self.rings[index].kick = kick;
            kicks.push(stopped);
        }
        for stopped in kicks {
            stopped.map_err(refuse)?;
        }
        if self.rings.iter().any(Ring::is_running) {
            self.device
                .set_memory(Arc::clone(&table))
                .map_err(|why| refuse(format!("the memory table cannot be replaced: {why}")))?;
        }
        self.check_log(&table);
        self.memory = table;
        for index in 0..self.rings.len() {
            // The table itself is in use: what keeps a ring from starting is not the VMM's error here.
            if let Err(error) = self.start_if_complete(index) {
                warn!("{}: {error}", self.name);
            }
        }
        Ok(())
    }

    /// Applies what the negotiated features say of rings that `SET_VRING_ENABLE` has not spoken of.
    fn update_enabled(&mut self, index: usize) -> Result<()> {
        let enabled = self.is_enabled(index);
        if let Some(running) = &mut self.rings[index].running {
            if running.enabled != enabled {
                self.device
                    .set_enabled(index as u16, enabled)
                    .map_err(refuse)?;
                running.enabled = enabled;
            }
        }
        Ok(())
    }
}
