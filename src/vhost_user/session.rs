//! The state of one connection with a VMM, and what each message does to it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use log::{debug, info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserVirtioFeatures,
};

use super::device::{Device, RingStart};
use super::rings::{Addresses, Kick, Ring, Running, signal_error};
use super::{config, memory};
use crate::virtio::memory::GuestMemory;

/// Bit 30: the front-end may negotiate protocol features.
pub(super) const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Features that change what lies in the guest's memory or what must be done with it: `VHOST_F_LOG_ALL`,
/// `ACCESS_PLATFORM`, `RING_PACKED` and `IN_ORDER`. A driver that accepts one of them unoffered cannot be
/// served. Others are ignored: QEMU offers some of its own accord (`ANY_LAYOUT`, `RING_RESET`) and passes
/// on that the guest accepted them.
const BINDING_FEATURES: u64 = 1 << 26 | 1 << 33 | 1 << 34 | 1 << 35;

/// `FEATURES_OK` of the device status (virtio 1.2, section 2.1).
const STATUS_FEATURES_OK: u8 = 8;

/// The protocol features that a session offers.
pub(super) const PROTOCOL_FEATURES: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::STATUS);

/// One connection with a VMM.
///
/// The `vhost` crate reads the messages and calls the methods of [`VhostUserBackendReqHandlerMut`]; an
/// error of theirs is always [`Error::ReqHandlerError`], which tells a request that was refused from a
/// connection that is broken.
pub(super) struct Session {
    name: String,
    device: Arc<dyn Device>,
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    /// What `SET_FEATURES` accepted, bit 30 included.
    features: u64,
    features_asked: bool,
    features_refused: bool,
    protocol: u64,
    status: u8,
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
            rings,
            features: 0,
            features_asked: false,
            features_refused: false,
            protocol: 0,
            status: 0,
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
        self.device.reset();
        self.rings.clear();
        self.memory = Arc::new(GuestMemory::empty());
    }

    /// Stops every ring, with everything answered that the guest has asked for.
    pub(super) fn drain(&mut self) {
        for index in 0..self.rings.len() {
            if self.rings[index].is_running() {
                if let Err(error) = self.stop_ring(index) {
                    warn!("{}: {error}", self.name);
                }
            }
        }
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
        Ok(())
    }

    fn start(&mut self, index: usize) -> std::result::Result<(), String> {
        let enabled = self.is_enabled(index);
        let features = self.features & !F_PROTOCOL_FEATURES;
        let ring = &mut self.rings[index];
        let Some(config) = ring
            .config(&self.memory, features)
            .map_err(|error| error.to_string())?
        else {
            return Ok(());
        };
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
            },
        )?;
        info!(
            "{}: ring {index} started: {} entries from {}{}",
            self.name,
            config.size,
            config.next_avail,
            if enabled { "" } else { ", disabled" },
        );
        ring.running = Some(Running { config, enabled });
        Ok(())
    }

    /// Drains and stops a running ring.
    fn stop_ring(&mut self, index: usize) -> std::result::Result<u16, String> {
        let name = &self.name;
        let mut progress = |in_flight: u32| {
            info!("{name}: ring {index}: waiting for {in_flight} requests in flight");
        };
        let stopped = self.device.stop_ring(index as u16, &mut progress);
        self.rings[index].stopped(stopped.as_ref().ok().copied());
        match stopped {
            Ok(base) => {
                info!("{}: ring {index} stopped before entry {base}", self.name);
                Ok(base)
            }
            Err(why) => Err(format!("ring {index} did not stop cleanly: {why}")),
        }
    }

    /// Puts a new memory table in use: under the running rings, and for those that waited for it.
    fn use_memory(&mut self, table: Arc<GuestMemory>) -> Result<()> {
        let features = self.features & !F_PROTOCOL_FEATURES;
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
            let stopped = self.stop_ring(index);
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
        for ring in &mut self.rings {
            ring.reset();
        }
        self.status = 0;
        self.features_refused = false;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        self.features_asked = true;
        Ok(self.device.features() | F_PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.device.features() | F_PROTOCOL_FEATURES;
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
        let changed = (features ^ self.features) & !F_PROTOCOL_FEATURES;
        if changed != 0 {
            if let Some(index) = self.rings.iter().position(Ring::is_running) {
                return Err(refuse(format!(
                    "features {changed:#x} would change while ring {index} runs"
                )));
            }
        }
        self.features_refused = false;
        self.features = features;
        self.device
            .set_acked_features(features & !F_PROTOCOL_FEATURES);
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
        let size = u16::try_from(num)
            .ok()
            // Section 2.7 of virtio 1.2: the size of a split virtqueue is a power of two.
            .filter(|size| size.is_power_of_two() && *size <= max)
            .ok_or_else(|| {
                refuse(format!(
                    "size {num} of ring {index}: not a power of two up to {max}"
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
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
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
        self.start_if_complete(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = self.ring_index(index)?;
        let base = u16::try_from(base)
            .map_err(|_| refuse(format!("base {base} of ring {index} has more than 16 bits")))?;
        let ring = &mut self.rings[index];
        if ring.is_running() && ring.base != Some(base) {
            return Err(refuse(format!("ring {index} is running: its base stays")));
        }
        ring.base = Some(base);
        self.start_if_complete(index)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let number = index;
        let index = self.ring_index(index)?;
        let base = if self.rings[index].is_running() {
            self.stop_ring(index).map_err(refuse)?
        } else {
            // Never started, or stopped already: nothing to drain.
            let base = self.rings[index].base;
            self.rings[index].stopped(base);
            base.unwrap_or(0)
        };
        Ok(VhostUserVringState::new(number, u32::from(base)))
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
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !PROTOCOL_FEATURES.bits();
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
            ring.base.get_or_insert(0);
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
        config::read(&*self.device, offset, size).map_err(|why| {
            // The VMM gets an empty answer and says no more than that.
            warn!("{}: GET_CONFIG: {why}", self.name);
            refuse(why)
        })
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        config::write(&*self.device, offset, buf).map_err(refuse)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(refuse("a block device has no GPU socket"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("shared objects were not offered"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(refuse("INFLIGHT_SHMFD was not offered"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(refuse("INFLIGHT_SHMFD was not offered"))
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
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(refuse("DEVICE_STATE was not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(refuse("DEVICE_STATE was not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refuse("SHMEM was not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(refuse("LOG_SHMFD was not offered"))
    }
}
