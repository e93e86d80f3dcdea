//! What protects a path: TLS under its queues, authentication on them.

use std::net::TcpStream;
use std::time::Instant;

use super::channel::Channel;
use super::setup::Target;
use super::trouble::{Result, never};
use super::wait::Waiter;
use crate::block::Result as BlockResult;
use crate::block::error::ErrorKind;
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::spec::NvmeOptions;

/// The secrets of a namespace's paths, read once.
#[derive(Debug, Default)]
pub(crate) struct Security {}

impl Security {
    /// Reads the secrets.
    pub(crate) fn load(_options: &NvmeOptions) -> BlockResult<Self> {
        Ok(Self {})
    }

    /// The transport on a connection that was just made.
    pub(crate) fn wrap(
        &self,
        stream: TcpStream,
        _deadline: Instant,
        _waiter: &mut dyn Waiter,
    ) -> Result<Wire> {
        Ok(Wire::Plain(stream))
    }

    /// In-band authentication of a queue.
    pub(crate) fn authenticate(
        &self,
        _target: &Target,
        _channel: &mut Channel,
        _secure_channel: bool,
        _deadline: Instant,
        _waiter: &mut dyn Waiter,
    ) -> Result<()> {
        Err(never(
            ErrorKind::NotAllowed,
            "the controller requires authentication; give it a secret",
        ))
    }

    /// The controller requires no authentication.
    pub(crate) fn none_required(&self, _qid: u16) -> Result<()> {
        Ok(())
    }
}
