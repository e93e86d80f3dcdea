//! What a session knows of each ring, and when a ring may start.
//!
//! A ring starts when its size, addresses, base and kick are known, in whatever order they came
//! (vhost-user.rst, "Ring states"), and stops with `GET_VRING_BASE`, after which it may start again.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::RingConfig;

/// `VIRTIO_RING_F_INDIRECT_DESC` (virtio 1.2, section 6).
const FEATURE_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX` (virtio 1.2, section 6).
const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// `VIRTIO_F_RING_PACKED` (virtio 1.2, section 6).
const FEATURE_PACKED: u64 = 1 << 34;

/// Whether rings are packed with these features.
pub(super) fn is_packed(features: u64) -> bool {
    features & FEATURE_PACKED != 0
}

/// Where a new ring begins ([`RingConfig::base`]): the wrap counters of a packed one begin at 1.
pub(super) fn first_base(features: u64) -> u32 {
    if is_packed(features) { 0x8000_8000 } else { 0 }
}

/// Addresses of a ring in the VMM's address space, as `SET_VRING_ADDR` gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
}

/// How the driver tells of new requests.
#[derive(Debug, Default)]
pub(super) enum Kick {
    /// `SET_VRING_KICK` has not come yet: the ring may not start.
    #[default]
    Missing,
    /// Without a descriptor: the ring is polled.
    Polled,
    Fd(File),
}

/// What a running ring was started with; a message that repeats it changes nothing.
#[derive(Clone, Debug)]
pub(super) struct Running {
    pub config: RingConfig,
    pub enabled: bool,
    /// It has a part in the inflight region.
    pub kept: bool,
}

/// The state of one ring. New state must be added to `session/handover.rs` too.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub size: Option<u16>,
    pub addresses: Option<Addresses>,
    /// Where its used ring is in the dirty log, if it is to be logged. Guest physical address.
    pub used_log: Option<u64>,
    /// Where it goes on ([`RingConfig::base`]): from `SET_VRING_BASE`, or where it stopped.
    pub base: Option<u32>,
    pub kick: Kick,
    /// Kept over a stop and a reset: VMMs set it once, when they make the device.
    pub call: Option<File>,
    pub err: Option<File>,
    /// What `SET_VRING_ENABLE` said last; `None` leaves it to the negotiated features.
    pub enabled: Option<bool>,
    pub running: Option<Running>,
}

/// Why a ring that has all its parts cannot start.
#[derive(Debug, thiserror::Error)]
#[error(
    "its {area} at user address {user_addr:#x} ({len} bytes) lies in no memory region of the VMM"
)]
pub(super) struct NotInMemory {
    area: &'static str,
    user_addr: u64,
    len: u64,
}

impl Ring {
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether it runs, and what it has in flight is in the inflight region.
    pub(super) fn is_kept(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.kept)
    }

    /// Whether size, addresses, base and kick are all there and the ring does not run yet.
    pub(super) fn is_complete(&self) -> bool {
        !self.is_running()
            && self.size.is_some()
            && self.addresses.is_some()
            && self.base.is_some()
            && !matches!(self.kick, Kick::Missing)
    }

    /// The ring in guest addresses; `None` if a part is missing.
    pub(super) fn config(
        &self,
        memory: &GuestMemory,
        features: u64,
    ) -> Result<Option<RingConfig>, NotInMemory> {
        let (Some(size), Some(addresses)) = (self.size, self.addresses) else {
            return Ok(None);
        };
        let translate = |area, user_addr, len| {
            memory.user_to_guest(user_addr, len).ok_or(NotInMemory {
                area,
                user_addr,
                len,
            })
        };
        // Split ring layout (virtio 1.2, section 2.7). The rings end in an event index of 2 bytes if it
        // was negotiated; without it, that room need not be there.
        let n = u64::from(size);
        let event_idx = features & FEATURE_EVENT_IDX != 0;
        let header = if event_idx { 6 } else { 4 };
        let packed = is_packed(features);
        let areas = match packed {
            false => [
                ("descriptor table", 16 * n),
                ("available ring", header + 2 * n),
                ("used ring", header + 8 * n),
            ],
            // Section 2.8.10.1.
            true => [
                ("descriptor ring", 16 * n),
                ("driver event suppression area", 4),
                ("device event suppression area", 4),
            ],
        };
        Ok(Some(RingConfig {
            size,
            desc_table: translate(areas[0].0, addresses.desc_table, areas[0].1)?,
            avail_ring: translate(areas[1].0, addresses.avail_ring, areas[1].1)?,
            used_ring: translate(areas[2].0, addresses.used_ring, areas[2].1)?,
            event_idx,
            indirect: features & FEATURE_INDIRECT != 0,
            packed,
            base: self.base.unwrap_or(first_base(features)),
        }))
    }

    /// The ring has stopped, and would go on at `base`. Its kick goes: the next one starts it again.
    pub(super) fn stopped(&mut self, base: Option<u32>) {
        self.running = None;
        self.kick = Kick::Missing;
        if base.is_some() {
            self.base = base;
        }
    }

    /// Back to how a ring begins, but for its call and error descriptors.
    pub(super) fn reset(&mut self) {
        *self = Ring {
            call: self.call.take(),
            err: self.err.take(),
            ..Ring::default()
        };
    }
}

/// Signals the error descriptor of a ring, if that can be done without blocking.
pub(super) fn signal_error(err: &File) {
    let mut poll = libc::pollfd {
        fd: err.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd; the call does not wait.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    if ready == 1 && poll.revents & libc::POLLOUT != 0 {
        let one = 1u64.to_ne_bytes();
        let mut file = err;
        // A VMM that gave us something unwritable learns of the error from the log.
        let _ = std::io::Write::write(&mut file, &one);
    }
}
