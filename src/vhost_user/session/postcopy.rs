//! What the messages of a postcopy migration do to a session.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use log::info;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol};

use super::{PROTOCOL_FEATURES, Session};
use crate::vhost_user::memory;
use crate::vhost_user::postcopy::{self, Postcopy};

type Result<T> = std::result::Result<T, String>;

/// The protocol features that a session offers in this process.
pub(super) fn protocol_features() -> Protocol {
    if postcopy::is_available() {
        PROTOCOL_FEATURES | Protocol::PAGEFAULT
    } else {
        PROTOCOL_FEATURES
    }
}

impl Session {
    /// Whether the front-end negotiated the messages of postcopy.
    pub(in crate::vhost_user) fn pagefault_acked(&self) -> bool {
        self.protocol & Protocol::PAGEFAULT.bits() != 0
    }

    /// Whether memory that is shared now has pages missing.
    pub(in crate::vhost_user) fn is_listening(&self) -> bool {
        self.postcopy.as_ref().is_some_and(Postcopy::is_listening)
    }

    /// Whether a memory table waits for the front-end's acknowledgement.
    pub(in crate::vhost_user) fn has_pending_memory(&self) -> bool {
        let postcopy = self.postcopy.as_ref();
        postcopy.is_some_and(|postcopy| postcopy.pending.is_some())
    }

    /// `POSTCOPY_ADVISE`: the userfaultfd for the front-end. A second one replaces the first: a migration may fail
    /// before it comes to anything, and be tried again.
    pub(in crate::vhost_user) fn postcopy_advise(&mut self) -> Result<OwnedFd> {
        if self.is_listening() {
            return Err("a postcopy migration is under way".to_owned());
        }
        let opened = Postcopy::new().and_then(|postcopy| Ok((postcopy.descriptor()?, postcopy)));
        let (descriptor, postcopy) = opened.map_err(|error| {
            format!("userfaultfd: {error}; it takes CAP_SYS_PTRACE or access to /dev/userfaultfd")
        })?;
        self.postcopy = Some(postcopy);
        Ok(descriptor)
    }

    /// `POSTCOPY_LISTEN`: from now on memory comes with pages missing.
    pub(in crate::vhost_user) fn postcopy_listen(&mut self, sock: UnixStream) -> Result<()> {
        let Some(postcopy) = &mut self.postcopy else {
            return Err("POSTCOPY_ADVISE has not come before it".to_owned());
        };
        if postcopy.is_listening() {
            return Err("a postcopy migration is under way".to_owned());
        }
        // Of such memory pages may have been touched: that they are not the guest's yet would go unnoticed.
        if !self.memory.regions().is_empty() {
            return Err("guest memory is in use already".to_owned());
        }
        postcopy
            .listen(sock)
            .map_err(|error| format!("a thread to watch the connection: {error}"))?;
        info!("{}: postcopy: memory comes page by page", self.name);
        Ok(())
    }

    /// `SET_MEM_TABLE` (`replace`) or `ADD_MEM_REG` while listening: maps the regions and returns the address of
    /// each here, which is what the front-end is told of faults by. They are in use only when it has
    /// [acknowledged](Session::postcopy_ready) that.
    pub(in crate::vhost_user) fn postcopy_memory(
        &mut self,
        replace: bool,
        regions: &[VhostUserMemoryRegion],
        mut files: Vec<File>,
    ) -> Result<Vec<u64>> {
        let Some(postcopy) = &mut self.postcopy else {
            return Err("no postcopy migration is under way".to_owned());
        };
        let table = match (regions, files.pop()) {
            ([region], Some(file)) if !replace => {
                let before = postcopy.pending.as_ref().unwrap_or(&self.memory);
                memory::added(before, region, file)
            }
            (_, last) => {
                files.extend(last);
                memory::replaced(regions, files)
            }
        };
        let table = table.map_err(|error| error.to_string())?;
        let mut bases = Vec::with_capacity(regions.len());
        for asked in regions {
            let mapped = table.regions().iter();
            let mapped = mapped.filter(|region| region.guest_addr == asked.guest_phys_addr);
            for region in mapped {
                postcopy.register(region.mapping()).map_err(|error| {
                    format!(
                        "page faults of the region at guest address {:#x} cannot be caught: {error}",
                        region.guest_addr
                    )
                })?;
                bases.push(region.as_ptr() as u64);
            }
        }
        postcopy.pending = Some(table);
        Ok(bases)
    }

    /// `REM_MEM_REG` of a table that is not in use yet.
    pub(in crate::vhost_user) fn postcopy_remove(
        &mut self,
        region: &VhostUserMemoryRegion,
    ) -> Result<()> {
        let pending = self.postcopy.as_mut().map(|postcopy| &mut postcopy.pending);
        let Some(Some(pending)) = pending else {
            return Err("no memory table waits to be acknowledged".to_owned());
        };
        *pending = memory::removed(pending, region).map_err(|error| error.to_string())?;
        Ok(())
    }

    /// The front-end is ready for faults: the memory it shared is in use from now on. There may be none, when
    /// regions were only removed or nothing has changed.
    pub(in crate::vhost_user) fn postcopy_ready(&mut self, error: u64) -> Result<()> {
        if error != 0 {
            return Err(format!("the VMM cannot bring pages: it says {error}"));
        }
        let postcopy = self.postcopy.as_mut();
        match postcopy.and_then(|postcopy| postcopy.pending.take()) {
            Some(table) => self
                .use_memory(Arc::clone(&table))
                .map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    /// `POSTCOPY_END`: all pages have come.
    pub(in crate::vhost_user) fn postcopy_end(&mut self) -> Result<()> {
        if !self.is_listening() {
            return Err("no postcopy migration is under way".to_owned());
        }
        if let Some(postcopy) = self.postcopy.take() {
            postcopy.end();
            info!("{}: postcopy: all pages have come", self.name);
        }
        Ok(())
    }
}
