//! The data plane's virtio-blk device, as a session sees it.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::device::{Device, Paused, Resized, RingStart};
use crate::dataplane::BlkDevice;
use crate::shared_memory::SharedPart;
use crate::virtio::dirty::DirtyLog;
use crate::virtio::memory::GuestMemory;

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Device for BlkDevice {
    fn features(&self) -> u64 {
        BlkDevice::features(self)
    }

    fn num_queues(&self) -> u16 {
        BlkDevice::num_queues(self)
    }

    fn max_queue_size(&self) -> u16 {
        BlkDevice::max_queue_size(self)
    }

    fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>, String> {
        BlkDevice::config(self, offset, len).map_err(words)
    }

    fn capacity(&self) -> u64 {
        BlkDevice::capacity(self)
    }

    fn on_change(&self, event: EventFd) {
        BlkDevice::on_change(self, event);
    }

    fn on_outside_change(&self, event: EventFd) -> io::Result<()> {
        BlkDevice::on_outside_change(self, event)
    }

    fn refresh(&self) -> Result<Resized, String> {
        BlkDevice::refresh(self).map_err(words)
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), String> {
        BlkDevice::set_config(self, offset, data).map_err(words)
    }

    fn set_acked_features(&self, features: u64) {
        BlkDevice::set_acked_features(self, features);
    }

    fn journal_bytes(&self) -> usize {
        BlkDevice::journal_bytes(self)
    }

    fn set_journal(&self, memory: Option<SharedPart>) {
        BlkDevice::set_journal(self, memory);
    }

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), String> {
        BlkDevice::start_ring(self, index, start).map_err(words)
    }

    fn stop_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, String> {
        BlkDevice::stop_ring(self, index, progress).map_err(words)
    }

    fn suspend_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, String> {
        BlkDevice::suspend_ring(self, index, progress).map_err(words)
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), String> {
        BlkDevice::set_memory(self, &memory).map_err(words)
    }

    fn set_log(&self, log: Option<Arc<DirtyLog>>) -> Result<(), String> {
        BlkDevice::set_log(self, log).map_err(words)
    }

    fn set_used_log(&self, index: u16, used_log: Option<u64>) -> Result<(), String> {
        BlkDevice::set_used_log(self, index, used_log).map_err(words)
    }

    fn set_kick(&self, index: u16, kick: Option<File>) -> Result<(), String> {
        BlkDevice::set_kick(self, index, kick).map_err(words)
    }

    fn set_call(&self, index: u16, call: Option<File>) -> Result<(), String> {
        BlkDevice::set_call(self, index, call).map_err(words)
    }

    fn set_err(&self, index: u16, err: Option<File>) -> Result<(), String> {
        BlkDevice::set_err(self, index, err).map_err(words)
    }

    fn set_enabled(&self, index: u16, enabled: bool) -> Result<(), String> {
        BlkDevice::set_enabled(self, index, enabled).map_err(words)
    }

    fn reset(&self) {
        BlkDevice::reset(self);
    }

    fn image_files(&self) -> io::Result<Vec<File>> {
        BlkDevice::image_files(self)
    }

    fn descriptors(&self) -> io::Result<Vec<(RawFd, File)>> {
        BlkDevice::descriptors(self)
    }

    fn write_ahead(&self) -> Result<(), String> {
        BlkDevice::write_ahead(self).map_err(words)
    }

    fn pause(&self, progress: &mut dyn FnMut(u32)) -> Paused<String> {
        let Paused { bases, image } = BlkDevice::pause(self, progress);
        Paused {
            bases,
            image: image.map_err(words),
        }
    }

    fn resumed(&self) {
        BlkDevice::resumed(self);
    }
}
