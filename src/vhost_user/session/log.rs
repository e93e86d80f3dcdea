//! The dirty log (vhost-user.rst, "Migration"): where the VMM of a migration's source learns which pages of
//! guest memory this process has written to.
//!
//! The log is in effect from the moment that both are there, the memory of `SET_LOG_BASE` and the feature
//! `VHOST_F_LOG_ALL`, until one of them goes; both may come and go while rings run. Used rings are logged besides
//! where `SET_VRING_ADDR` says so.

use std::fs::File;
use std::sync::Arc;

use log::{info, warn};
use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserLog;

use super::inflight::shared;
use super::{F_LOG_ALL, Session, refuse};
use crate::shared_memory::SharedMemory;
use crate::vhost_user::handover::{Incoming, Outgoing, SharedState};
use crate::virtio::dirty::{DirtyLog, LOG_PAGE};
use crate::virtio::memory::GuestMemory;

/// What a session knows of the log.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// From `SET_LOG_BASE`.
    base: Option<Base>,
    /// The device has it.
    in_use: bool,
}

#[derive(Debug)]
struct Base {
    memory: Arc<SharedMemory>,
    log: Arc<DirtyLog>,
    /// Guest addresses below this have a bit.
    reaches: u64,
}

impl Log {
    /// What another process needs to go on with it.
    pub(super) fn export(&self, fds: &mut Outgoing) -> std::io::Result<Option<SharedState>> {
        let base = self.base.as_ref();
        base.map(|base| shared(&base.memory, fds)).transpose()
    }

    /// Whether its memory was lost ([`crate::mappings`]).
    pub(super) fn is_lost(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.memory.is_lost())
    }
}

/// Guest addresses below this have a bit in a log of `size` bytes.
fn reach_of(size: u64) -> u64 {
    size.saturating_mul(8).saturating_mul(LOG_PAGE)
}

/// The end of the highest region.
fn end_of(memory: &GuestMemory) -> u64 {
    let end = |last: &crate::virtio::memory::Region| last.guest_addr.saturating_add(last.len);
    memory.regions().last().map_or(0, end)
}

impl Session {
    /// Takes up the log of another process's session. No ring runs.
    pub(super) fn import_log(
        &mut self,
        state: &SharedState,
        fds: &mut Incoming,
    ) -> std::result::Result<(), String> {
        let file = fds.take(state.file).map_err(|error| error.to_string())?;
        let asked = VhostUserLog::new(state.len, state.offset);
        self.adopt_log(&asked, file.into())
            .map_err(|error| error.to_string())?;
        // It was long enough when the VMM sent it; memory that was plugged since needs a bit only while the log
        // is in use.
        self.check_log(&self.memory);
        Ok(())
    }

    /// `SET_LOG_BASE`. In effect before it is answered, if `LOG_ALL` is there already.
    pub(super) fn use_log(&mut self, asked: &VhostUserLog, file: File) -> Result<()> {
        let size = asked.mmap_size;
        let reaches = reach_of(size);
        let end = end_of(&self.memory);
        if reaches < end {
            return Err(refuse(format!(
                "a dirty log of {size} bytes reaches up to guest address {reaches:#x}, and guest memory to \
                 {end:#x}: the migration would lose what is written there"
            )));
        }
        self.adopt_log(asked, file)
    }

    fn adopt_log(&mut self, asked: &VhostUserLog, file: File) -> Result<()> {
        let (size, offset) = (asked.mmap_size, asked.mmap_offset);
        let failed = |error| refuse(format!("the dirty log cannot be used: {error}"));
        let memory = SharedMemory::map(file, offset, size).map_err(failed)?;
        let bits = memory.part(0, memory.len());
        let bits = bits.ok_or_else(|| refuse("the dirty log is not in its own memory"))?;
        let log = Arc::new(DirtyLog::new(bits));
        self.log.base = Some(Base {
            memory,
            log,
            reaches: reach_of(size),
        });
        self.log.in_use = false;
        self.update_log()
    }

    /// Gives the log to the device, or takes it away, as features and memory have it now.
    pub(super) fn update_log(&mut self) -> Result<()> {
        let wanted = self.features & F_LOG_ALL != 0;
        let log = self.log.base.as_ref().filter(|_| wanted);
        if log.is_some() == self.log.in_use {
            return Ok(());
        }
        let log = log.map(|base| base.log.clone());
        let on = log.is_some();
        self.device
            .set_log(log)
            .map_err(|why| refuse(format!("dirty logging: {why}")))?;
        self.log.in_use = on;
        let state = if on { "begins" } else { "ends" };
        info!("{}: logging of writes to guest memory {state}", self.name);
        Ok(())
    }

    /// A new memory table: a VMM makes its log longer before that, so a log that is too short is its error, and
    /// breaks the ring that writes there. Not before: it may come in time.
    pub(super) fn check_log(&self, memory: &GuestMemory) {
        let end = end_of(memory);
        if let Some(base) = self.log.base.as_ref().filter(|base| base.reaches < end) {
            if self.log.in_use {
                warn!(
                    "{}: the dirty log reaches up to guest address {:#x}, and guest memory to {end:#x}",
                    self.name, base.reaches
                );
            }
        }
    }

    /// `SET_VRING_ADDR`'s log address, of a ring that may run.
    pub(super) fn set_used_log(&mut self, index: usize, used_log: Option<u64>) -> Result<()> {
        let ring = &mut self.rings[index];
        if ring.is_running() && ring.used_log != used_log {
            self.device
                .set_used_log(index as u16, used_log)
                .map_err(refuse)?;
        }
        ring.used_log = used_log;
        Ok(())
    }

    /// Lets the log go: at the end of the connection. No ring runs.
    pub(super) fn forget_log(&mut self) {
        self.log.base = None;
        if std::mem::take(&mut self.log.in_use) {
            if let Err(error) = self.device.set_log(None) {
                warn!("{}: dirty logging: {error}", self.name);
            }
        }
    }
}
