//! What each message that the `vhost` crate carries does to a session.

use std::fs::File;

use log::{debug, info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::postcopy::protocol_features;
use super::{BINDING_FEATURES, SESSION_FEATURES, Session, copied, refuse};
use crate::vhost_user::rings::{Addresses, Kick, Ring};
use crate::vhost_user::{config, memory, rings};

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        // A second SET_OWNER changes nothing: the connection is the owner.
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated; the specification says to ignore it or to disable the rings, and some front-ends
        // do not expect the latter.
        warn!("{}: RESET_OWNER is deprecated and does nothing", self.name);
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        let running = self.rings.iter().filter(|ring| ring.is_running()).count();
        if running != 0 {
            info!("{}: device reset with {running} rings running", self.name);
        }
        self.device.reset();
        self.forget_inflight();
        for ring in &mut self.rings {
            ring.reset();
        }
        self.status = 0;
        // The driver negotiates anew (virtio 1.2, section 2.4); bit 30 and LOG_ALL are the VMM's, and stay as the
        // connection does.
        self.features &= SESSION_FEATURES;
        self.features_refused = false;
        self.device.set_acked_features(0);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        self.features_asked = true;
        Ok(self.device.features() | SESSION_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.device.features() | SESSION_FEATURES;
        let unknown = features & !offered;
        self.features_refused = true;
        if unknown & BINDING_FEATURES != 0 {
            return Err(refuse(format!(
                "features {:#x} were not offered",
                unknown & BINDING_FEATURES
            )));
        }
        if unknown != 0 {
            debug!("{}: features {unknown:#x} are not ours", self.name);
        }
        let features = features & offered;
        let changed = (features ^ self.features) & !SESSION_FEATURES;
        if changed != 0 {
            if let Some(index) = self.rings.iter().position(Ring::is_running) {
                return Err(refuse(format!(
                    "features {changed:#x} would change while ring {index} runs"
                )));
            }
        }
        self.features_refused = false;
        if rings::is_packed(features) != rings::is_packed(self.features) {
            // A base means nothing to the other layout.
            for ring in &mut self.rings {
                ring.base = None;
            }
        }
        self.features = features;
        self.device.set_acked_features(features & !SESSION_FEATURES);
        self.update_log()?;
        for index in 0..self.rings.len() {
            self.update_enabled(index)?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let table = memory::replaced(regions, files).map_err(|error| refuse(error.to_string()))?;
        self.use_memory(table)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let index = self.ring_index(index)?;
        let max = self.device.max_queue_size();
        // The size of a split virtqueue is a power of two (virtio 1.2, section 2.7), that of a packed one is not
        // bound to be.
        let packed = rings::is_packed(self.features);
        let size = u16::try_from(num)
            .ok()
            .filter(|size| (size.is_power_of_two() || packed && *size != 0) && *size <= max)
            .ok_or_else(|| {
                let kind = if packed { "from 1" } else { "a power of two" };
                refuse(format!(
                    "size {num} of ring {index}: not {kind} up to {max}"
                ))
            })?;
        let ring = &mut self.rings[index];
        if ring.is_running() && ring.size != Some(size) {
            return Err(refuse(format!("ring {index} is running: its size stays")));
        }
        ring.size = Some(size);
        self.start_if_complete(index)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let index = self.ring_index(index)?;
        let addresses = Addresses {
            desc_table: descriptor,
            avail_ring: available,
            used_ring: used,
        };
        let ring = &mut self.rings[index];
        if ring.is_running() && ring.addresses != Some(addresses) {
            return Err(refuse(format!(
                "ring {index} is running: its addresses stay"
            )));
        }
        ring.addresses = Some(addresses);
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        self.set_used_log(index, logged.then_some(log))?;
        self.start_if_complete(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = self.ring_index(index)?;
        // That of a packed ring is two places with their wrap counters.
        if base > u16::MAX.into() && !rings::is_packed(self.features) {
            return Err(refuse(format!(
                "base {base} of ring {index} has more than 16 bits"
            )));
        }
        let ring = &mut self.rings[index];
        if ring.is_running() && ring.base != Some(base) {
            return Err(refuse(format!("ring {index} is running: its base stays")));
        }
        ring.base = Some(base);
        self.start_if_complete(index)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.stop_for_base(index, self.usual_stop())?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.ring_index(index.into())?;
        if self.rings[index].is_running() {
            let copy = copied(&fd).map_err(Error::ReqHandlerError)?;
            self.device.set_kick(index as u16, copy).map_err(refuse)?;
        }
        // Never read here: what the driver kicked before the ring starts or is enabled stays in the
        // descriptor for the data plane.
        self.rings[index].kick = fd.map_or(Kick::Polled, Kick::Fd);
        self.start_if_complete(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.ring_index(index.into())?;
        if self.rings[index].is_running() {
            let copy = copied(&fd).map_err(Error::ReqHandlerError)?;
            self.device.set_call(index as u16, copy).map_err(refuse)?;
        }
        self.rings[index].call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.ring_index(index.into())?;
        if self.rings[index].is_running() {
            let copy = copied(&fd).map_err(Error::ReqHandlerError)?;
            self.device.set_err(index as u16, copy).map_err(refuse)?;
        }
        self.rings[index].err = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !protocol_features().bits();
        if unknown != 0 {
            return Err(refuse(format!(
                "protocol features {unknown:#x} were not offered"
            )));
        }
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = self.ring_index(index)?;
        debug!("{}: ring {index} enabled: {enable}", self.name);
        let ring = &mut self.rings[index];
        ring.enabled = Some(enable);
        if enable && !matches!(ring.kick, Kick::Missing) {
            // The last message of every front-end: one that never sent a base means the beginning.
            ring.base.get_or_insert(rings::first_base(self.features));
        }
        self.update_enabled(index)?;
        self.start_if_complete(index)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // Asked first: if it changes meanwhile, the VMM is told once too often.
        let capacity = self.device.capacity();
        let bytes = config::read(&*self.device, offset, size).map_err(|why| {
            // The VMM gets an empty answer and says no more than that.
            warn!("{}: GET_CONFIG: {why}", self.name);
            refuse(why)
        })?;
        if config::has_capacity(offset, size) {
            self.config_is_read(capacity);
        }
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        config::write(&*self.device, offset, flags.bits(), buf).map_err(refuse)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(refuse("a block device has no GPU socket"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("shared objects were not offered"))
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        self.make_inflight(inflight)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        self.use_inflight(inflight, file)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(memory::MAX_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let table =
            memory::added(&self.memory, region, fd).map_err(|error| refuse(error.to_string()))?;
        self.use_memory(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let table =
            memory::removed(&self.memory, region).map_err(|error| refuse(error.to_string()))?;
        self.use_memory(table)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        // The VMM's own descriptor does.
        self.transfer_state(direction, fd).map(|()| None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.check_state()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refuse("SHMEM was not offered"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.use_log(log, file)
    }
}
