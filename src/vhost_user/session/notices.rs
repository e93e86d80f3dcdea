//! What the VMM is told without having asked: that the disk has another capacity.
//!
//! A VMM keeps what it has read of the configuration space. It is told when the capacity changes; and again
//! when the first ring starts, if what it read on this connection is not what the disk is now: QEMU takes no
//! notice of changes while its device is stopped, and after a reconnect it does not read the configuration again,
//! though the image may have been resized while nobody served it.

use std::os::fd::OwnedFd;

use log::{info, warn};
use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::{Session, refuse};
use crate::vhost_user::channel::Channel;
use crate::vhost_user::handover::{ChannelState, Outgoing};

/// What the VMM knows, and how to tell it more.
#[derive(Debug, Default)]
pub(super) struct Notices {
    channel: Option<Channel>,
    /// The capacity that `GET_CONFIG` answered last on this connection.
    read: Option<u64>,
    /// The capacity that was read or told of last.
    told: Option<u64>,
}

impl Notices {
    /// The channel, for another process to go on with.
    pub(super) fn export_channel(
        &self,
        fds: &mut Outgoing,
    ) -> std::io::Result<Option<ChannelState>> {
        let channel = self.channel.as_ref();
        channel.map(|channel| channel.export(fds)).transpose()
    }

    /// The capacities that the VMM read, and was told of last.
    pub(super) fn capacities(&self) -> (Option<u64>, Option<u64>) {
        (self.read, self.told)
    }

    /// As another process has left them.
    pub(super) fn import(channel: Option<Channel>, read: Option<u64>, told: Option<u64>) -> Self {
        Self {
            channel,
            read,
            told,
        }
    }
}

impl Session {
    /// Whether the front-end negotiated a channel for the back-end.
    pub(in crate::vhost_user) fn channel_acked(&self) -> bool {
        self.protocol & Protocol::BACKEND_REQ.bits() != 0
    }

    /// `SET_BACKEND_REQ_FD`. A later one replaces the channel.
    pub(in crate::vhost_user) fn set_channel(&mut self, fd: OwnedFd) -> Result<()> {
        let channel = Channel::new(fd).map_err(|error| refuse(error.to_string()))?;
        self.notices.channel = Some(channel);
        Ok(())
    }

    /// The VMM is about to read the configuration space while the capacity is `capacity` bytes.
    pub(super) fn config_is_read(&mut self, capacity: u64) {
        self.notices.read = Some(capacity);
        self.notices.told = Some(capacity);
    }

    /// Tells the VMM of the capacity if it has not been told.
    pub(in crate::vhost_user) fn tell_change(&mut self) {
        if self.notices.told != Some(self.device.capacity()) {
            self.tell();
        }
    }

    /// A ring has started. If it is the first, the VMM is told of the capacity unless it has read it.
    pub(super) fn tell_at_start(&mut self) {
        let running = self.rings.iter().filter(|ring| ring.is_running()).count();
        if running == 1 && self.notices.read != Some(self.device.capacity()) {
            self.tell();
        }
    }

    fn tell(&mut self) {
        // What a change of the configuration means is part of the feature CONFIG (vhost-user.rst,
        // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
        if self.protocol & Protocol::CONFIG.bits() == 0 {
            return;
        }
        let need_reply = self.replies_acked();
        self.take_answers();
        let Some(channel) = &mut self.notices.channel else {
            return;
        };
        let capacity = self.device.capacity();
        match channel.config_changed(need_reply) {
            Ok(()) => {
                self.notices.told = Some(capacity);
                info!("{}: told the VMM of {capacity} bytes", self.name);
            }
            Err(error) => {
                self.notices.channel = None;
                warn!(
                    "{}: {error}; it will not be told of {capacity} bytes, nor of later changes",
                    self.name
                );
            }
        }
    }

    /// Takes what the VMM has answered on the back-end's channel.
    pub(in crate::vhost_user) fn take_answers(&mut self) {
        let Some(channel) = &mut self.notices.channel else {
            return;
        };
        let name = &self.name;
        let taken = channel.take_answers(&mut |value| {
            warn!("{name}: the VMM could not take the change of the configuration (error {value})");
        });
        if let Err(error) = taken {
            self.notices.channel = None;
            warn!("{name}: {error}; it will not be told of changes");
        }
    }
}
