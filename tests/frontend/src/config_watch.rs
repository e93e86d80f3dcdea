//! A VMM that is told of changes of the configuration space, and what it makes of them.

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::blk::Config;
use crate::client::BackendChannel;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::protocol::{backend_request, flag};
use crate::sys;

/// The channel on which the backend says that the configuration space has changed.
#[derive(Debug)]
pub struct ConfigWatch {
    channel: BackendChannel,
    need_reply: bool,
}

impl ConfigWatch {
    /// Opens the channel of a device that is connected. `need_reply` says whether its messages are to ask for
    /// an acknowledgement.
    ///
    /// # Errors
    /// Those of the message.
    pub fn open(device: &Device, need_reply: bool) -> Result<Self> {
        let channel = device.client()?.open_backend_channel()?;
        Ok(Self {
            channel,
            need_reply,
        })
    }

    /// Waits for a change and does what QEMU does: reads the configuration over the main socket, then
    /// acknowledges.
    ///
    /// # Errors
    /// `Protocol` for any other message, and those of the sockets.
    pub fn wait(&self, device: &Device, timeout: Duration) -> Result<Config> {
        let message = self.channel.recv_only(timeout)?;
        let wanted = flag::VERSION | if self.need_reply { flag::NEED_REPLY } else { 0 };
        let is_change = message.request == backend_request::CONFIG_CHANGE_MSG
            && message.flags == wanted
            && message.payload.is_empty()
            && message.fds.is_empty();
        if !is_change {
            return Err(Error::Protocol(format!("on the channel: {message:?}")));
        }
        let config = device.read_config()?;
        self.channel.answer(&message, 0)?;
        Ok(config)
    }

    /// Whether nothing has been said that was not waited for. A message to the main socket that was answered
    /// before leaves no doubt about what came before it.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn is_silent(&self) -> Result<bool> {
        let readable = sys::wait_readable(self.channel.stream().as_raw_fd(), Duration::ZERO)?;
        Ok(!readable)
    }

    /// The channel.
    pub fn channel(&self) -> &BackendChannel {
        &self.channel
    }
}
