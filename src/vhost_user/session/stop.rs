//! How a ring stops: with everything in flight completed, or with it left to whoever serves the ring next
//! (vhost-user.rst, `VHOST_USER_GET_VRING_BASE` and `VHOST_USER_GET_VRING_BASE_SKIP_DRAIN`).
//!
//! The protocol had it twice. First with `GET_VRING_BASE_INFLIGHT` (bit 20): a back-end that negotiated it may
//! suspend what is in flight at every `GET_VRING_BASE`. Then with `GET_VRING_BASE_SKIP_DRAIN` (bit 23), a message of its
//! own, so that the front-end says each time which of the two it wants; `GET_VRING_BASE` completes everything
//! again then. Either is for front-ends that keep the inflight region and take it along.

use log::debug;
use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::{Session, refuse};
use crate::vhost_user::rings;

/// `VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN`, which the `vhost` crate does not know yet.
pub(super) const SKIP_DRAIN: Protocol = Protocol::from_bits_retain(1 << 23);
/// The message `VHOST_USER_GET_VRING_BASE_SKIP_DRAIN`.
pub(in crate::vhost_user) const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;

/// What becomes of requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// They are completed.
    Drain,
    /// They stay in the inflight region.
    Suspend,
}

impl Session {
    fn has_negotiated(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }

    /// What `GET_VRING_BASE` is to do.
    pub(super) fn usual_stop(&self) -> Stop {
        let old = self.has_negotiated(Protocol::GET_VRING_BASE_INFLIGHT);
        match old && !self.has_negotiated(SKIP_DRAIN) {
            true => Stop::Suspend,
            false => Stop::Drain,
        }
    }

    /// `GET_VRING_BASE_SKIP_DRAIN`.
    pub(in crate::vhost_user) fn stop_undrained(&mut self, index: u32) -> Result<u32> {
        if !self.has_negotiated(SKIP_DRAIN) {
            return Err(refuse("GET_VRING_BASE_SKIP_DRAIN was not negotiated"));
        }
        self.stop_for_base(index, Stop::Suspend)
    }

    /// Stops a ring, and says where it would go on.
    pub(super) fn stop_for_base(&mut self, index: u32, how: Stop) -> Result<u32> {
        let index = self.ring_index(index)?;
        if !self.rings[index].is_running() {
            // Never started, or stopped already: nothing is in flight.
            let base = self.rings[index].base;
            self.rings[index].stopped(base);
            return Ok(base.unwrap_or(rings::first_base(self.features)));
        }
        // Without a region there is nothing to leave a request in: it is completed.
        let how = match self.rings[index].is_kept() {
            true => how,
            false => Stop::Drain,
        };
        debug!("{}: ring {index} stops: {how:?}", self.name);
        self.stop_ring(index, how).map_err(refuse)
    }
}
