//! The inflight region (vhost-user.rst, "Inflight I/O tracking"): memory that this process makes and the VMM
//! keeps, so that requests in flight, and the disk's crash journal, outlive this process.
//!
//! QEMU asks for a region when the device starts and it holds none, hands it back at every start, also after
//! a reconnect, and lets go of it when the device is reset.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use log::{debug, info, warn};
use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserInflight;

use super::{Session, refuse};
use crate::shared_memory::SharedMemory;
use crate::vhost_user::handover::{Incoming, InflightState, Outgoing, SharedState};
use crate::vhost_user::rings::Ring;
use crate::virtio::inflight::{InflightLayout, QueueRegion};

/// The region in use.
#[derive(Debug)]
pub(super) struct Region {
    memory: Arc<SharedMemory>,
    layout: InflightLayout,
    /// Device and inode of its file: which memory it is, whatever the descriptor.
    identity: (u64, u64),
    has_journal: bool,
}

fn identity(file: &File) -> std::io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Region {
    /// Whether its memory was lost ([`crate::mappings`]).
    pub(super) fn is_lost(&self) -> bool {
        self.memory.is_lost()
    }

    /// What another process needs to go on with it.
    pub(super) fn export(&self, fds: &mut Outgoing) -> std::io::Result<InflightState> {
        Ok(InflightState {
            memory: shared(&self.memory, fds)?,
            queues: self.layout.queues,
            queue_size: self.layout.queue_size,
        })
    }

    fn is(&self, memory: &SharedMemory, layout: InflightLayout, identity: (u64, u64)) -> bool {
        self.identity == identity
            && self.layout == layout
            && (self.memory.offset(), self.memory.len()) == (memory.offset(), memory.len())
    }
}

/// Memory of the VMM's, for another process.
pub(super) fn shared(memory: &SharedMemory, fds: &mut Outgoing) -> std::io::Result<SharedState> {
    Ok(SharedState {
        offset: memory.offset(),
        len: memory.len() as u64,
        file: fds.add(memory.file())?,
    })
}

impl Session {
    /// Takes up the region of another process's session. No ring runs.
    pub(super) fn import_inflight(
        &mut self,
        state: &InflightState,
        fds: &mut Incoming,
    ) -> std::result::Result<(), String> {
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let (memory, queues) = (&state.memory, state.queues);
        let file = fds.take(memory.file).map_err(|error| words(&error))?;
        let asked = VhostUserInflight::new(memory.len, memory.offset, queues, state.queue_size);
        self.use_inflight(&asked, file.into())
            .map_err(|error| words(&error))
    }

    /// The shape that a message asks for, if it fits this device.
    fn inflight_layout(
        &self,
        asked: &VhostUserInflight,
    ) -> std::result::Result<InflightLayout, String> {
        let (queues, queue_size) = (asked.num_queues, asked.queue_size);
        let most = (self.device.num_queues(), self.device.max_queue_size());
        if queues == 0 || queue_size == 0 || queues > most.0 || queue_size > most.1 {
            return Err(format!(
                "an inflight region for {queues} queues of {queue_size} entries: this device has at most \
                 {} of {}",
                most.0, most.1
            ));
        }
        Ok(InflightLayout { queues, queue_size })
    }

    /// `GET_INFLIGHT_FD`: a fresh region. It is in use only once the VMM has sent it back.
    pub(super) fn make_inflight(
        &mut self,
        asked: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let layout = self.inflight_layout(asked).map_err(refuse)?;
        let size = (layout.rest_at() + self.device.journal_bytes()) as u64;
        let failed = |error| refuse(format!("no inflight region of {size} bytes: {error}"));
        let memory = SharedMemory::create(c"virtioblkd-inflight", size).map_err(failed)?;
        let file = memory.file().try_clone().map_err(failed)?;
        let answer = VhostUserInflight::new(size, 0, layout.queues, layout.queue_size);
        debug!(
            "{}: inflight region of {size} bytes for {} queues of {}",
            self.name, layout.queues, layout.queue_size
        );
        Ok((answer, file))
    }

    /// `SET_INFLIGHT_FD`: uses the VMM's region from the next start of a ring on.
    pub(super) fn use_inflight(&mut self, asked: &VhostUserInflight, file: File) -> Result<()> {
        let layout = self.inflight_layout(asked).map_err(refuse)?;
        let (offset, size) = (asked.mmap_offset, asked.mmap_size);
        let failed = |error| refuse(format!("the inflight region cannot be used: {error}"));
        let identity = identity(&file).map_err(failed)?;
        let memory = SharedMemory::map(file, offset, size).map_err(failed)?;
        if layout.queue(&memory, layout.queues - 1).is_none() {
            return Err(refuse(format!(
                "an inflight region of {size} bytes has no room for {} queues of {} entries",
                layout.queues, layout.queue_size
            )));
        }
        // Integers in it are accessed as such.
        if offset % 8 != 0 {
            return Err(refuse(format!(
                "an inflight region at offset {offset:#x} of its file is not aligned"
            )));
        }
        if let Some(index) = self.rings.iter().position(Ring::is_running) {
            return match &self.inflight {
                Some(region) if region.is(&memory, layout, identity) => Ok(()),
                _ => Err(refuse(format!(
                    "ring {index} is running: the inflight region stays"
                ))),
            };
        }
        let wanted = self.device.journal_bytes();
        let journal = layout
            .rest(&memory)
            .and_then(|rest| rest.part(0, wanted))
            .filter(|part| !part.is_empty());
        if journal.is_none() && wanted > 0 {
            warn!(
                "{}: the inflight region of {size} bytes has no room for the crash journal of {wanted} bytes: \
                 writes to new clusters may be lost if this process is killed",
                self.name
            );
        }
        info!(
            "{}: requests in flight are kept by the VMM, {} queues of {} entries",
            self.name, layout.queues, layout.queue_size
        );
        let has_journal = journal.is_some();
        if has_journal || self.inflight.as_ref().is_some_and(|old| old.has_journal) {
            self.device.set_journal(journal);
        }
        self.inflight = Some(Region {
            memory,
            layout,
            identity,
            has_journal,
        });
        Ok(())
    }

    /// Lets the region go: after a reset and at the end of the connection. No ring runs.
    pub(super) fn forget_inflight(&mut self) {
        if self.inflight.take().is_some_and(|old| old.has_journal) {
            self.device.set_journal(None);
        }
    }

    /// The part of a ring that is about to start; none if the VMM keeps no region, or none for this ring.
    pub(super) fn inflight_of(
        &self,
        index: usize,
        size: u16,
    ) -> std::result::Result<Option<QueueRegion>, String> {
        let Some(region) = &self.inflight else {
            return Ok(None);
        };
        let queue = region.layout.queue(&region.memory, index as u16);
        match &queue {
            None => warn!(
                "{}: ring {index} is not in the VMM's inflight region: what is in flight there does not \
                 survive this process",
                self.name
            ),
            Some(queue) if size > queue.queue_size => {
                return Err(format!(
                    "it has {size} entries, and the VMM's inflight region has room for {}",
                    queue.queue_size
                ));
            }
            Some(_) => {}
        }
        Ok(queue)
    }
}
