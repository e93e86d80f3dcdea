//! What a process needs from a device whose guest goes on under another process.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use log::{info, warn};

use super::{BlkDevice, Command, Control, DeviceError, lock, wait_for_stop};

/// How a device stands that was paused.
#[derive(Debug)]
pub struct Paused<E> {
    /// The rings that ran, each with where it goes on ([`RingConfig::base`]); nothing of them is in flight. A
    /// ring whose worker has ended is missing.
    ///
    /// [`RingConfig::base`]: crate::virtio::ring::RingConfig::base
    pub bases: Vec<(u16, u32)>,
    /// Whether the image has everything that the guest was told of. If not, nobody else may go on with it.
    pub image: Result<(), E>,
}

impl BlkDevice {
    /// Descriptors of the image's files: those in use, with their locks, or those that would be.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn image_files(&self) -> io::Result<Vec<File>> {
        match &lock(&self.control).active {
            Some(disk) => disk.files(),
            None => self.disk.files(),
        }
    }

    /// Descriptors for a successor, each with the number that its configuration gives it.
    ///
    /// # Errors
    /// No more pipes are to be had.
    pub fn descriptors(&self) -> io::Result<Vec<(RawFd, File)>> {
        self.disk.descriptors()
    }

    /// Writes while the rings run what would have to be written when they stop.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn write_ahead(&self) -> Result<(), DeviceError> {
        let Some(disk) = lock(&self.control).active.clone() else {
            return Ok(());
        };
        let io = self.control_io()?;
        let flushed = io.block_on(disk.flush(&io));
        io.close();
        Ok(flushed?)
    }

    /// Stops all rings together, drained, and gives the image back, which stays locked: for the process that
    /// has its files ([`BlkDevice::image_files`]), or until a ring starts again here. The guest's memory is let
    /// go. `progress` as in [`BlkDevice::stop_ring`].
    pub fn pause(&self, progress: &mut dyn FnMut(u32)) -> Paused<DeviceError> {
        let began = Instant::now();
        let mut control = lock(&self.control);
        let rings = std::mem::take(&mut control.rings);
        // All are asked before one is waited for: they drain at the same time.
        let asked: Vec<_> = rings
            .into_iter()
            .map(|(index, stats)| {
                let receiver = self.send(index, |key, reply| Command::Stop { key, reply });
                (index, stats, receiver)
            })
            .collect();
        let mut bases = Vec::with_capacity(asked.len());
        let mut image = Ok(());
        for (index, stats, receiver) in asked {
            let base = wait_for_stop(&receiver, &stats, progress);
            info!("{}: ring {index} paused: {stats}", self.name());
            match base {
                Some(base) => bases.push((index, base)),
                None => image = Err(DeviceError::WorkerGone(index)),
            }
        }
        let drained = began.elapsed();
        image = image.and(self.give_back_locked(&mut control));
        info!(
            "{}: {:.3} ms to drain the rings, {:.3} ms to write the image's metadata",
            self.name(),
            drained.as_secs_f64() * 1e3,
            (began.elapsed() - drained).as_secs_f64() * 1e3
        );
        Paused { bases, image }
    }

    /// As [`BlkDevice::give_back`], but for the locks: an image that can not be flushed stays in use here, with
    /// what is in memory only.
    fn give_back_locked(&self, control: &mut Control) -> Result<(), DeviceError> {
        let Some(disk) = &control.active else {
            return Ok(());
        };
        let io = self.control_io()?;
        let flushed = io.block_on(disk.flush(&io));
        if let Some(disk) = control.active.take_if(|_| flushed.is_ok()) {
            if let Err(error) = io.block_on(disk.deactivate_locked(&io)) {
                // All is durable, and the image consistent; space that was reserved may be lost to it.
                warn!("{}: giving reserved space back: {error}", self.name());
            }
        }
        io.close();
        Ok(flushed?)
    }

    /// The device was paused and is this process's again: if no ring runs, its image is unlocked.
    pub fn resumed(&self) {
        if lock(&self.control).active.is_none() {
            self.disk.unlock_kept();
        }
    }
}
