//! A device whose disk changes its size, by us or by others, while a guest uses it or not.
//!
//! The workers check each request against one atomic, the image has a size of its own, and the guest reads the
//! configuration space: all of them change here. A disk that shrinks refuses requests beyond its new end before
//! anything else happens; one that grows serves them before the guest is told.

use std::io;
use std::sync::atomic::Ordering;

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::{BlkDevice, DeviceError, lock};

/// What a disk's size was and is, in bytes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Before.
    pub old: u64,
    /// Now; the same if nothing has changed.
    pub new: u64,
}

impl BlkDevice {
    /// The capacity that the guest sees, in bytes.
    pub fn capacity(&self) -> u64 {
        lock(&self.config).config.capacity_bytes()
    }

    /// From now on `event` is signalled whenever the capacity has changed, by whomever, so that the guest can
    /// be told.
    pub fn on_change(&self, event: EventFd) {
        *lock(&self.changed) = Some(event);
    }

    /// From now on `event` is signalled when something remote has changed that [`BlkDevice::refresh`] is to look at.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn on_outside_change(&self, event: EventFd) -> io::Result<()> {
        self.disk.on_outside_change(event)
    }

    /// Gives the disk another size, in bytes: whole sectors. What is new reads as zeros. Rings may run; the
    /// requests that end beyond a smaller size fail, and those under way are waited for. When no ring runs the
    /// image is taken (locked) for this and given back. May be called from any thread but a worker.
    ///
    /// # Errors
    /// Those of [`ActiveDisk::resize`](crate::block::ActiveDisk::resize), and of taking the image and giving it
    /// back.
    pub fn resize(&self, bytes: u64) -> Result<Resized, DeviceError> {
        let mut control = lock(&self.control);
        let idle = control.active.is_none();
        let disk = match &control.active {
            Some(disk) => disk.clone(),
            None => {
                let disk = self.take_image(control.journal.clone())?;
                control.active.insert(disk).clone()
            }
        };
        let resized = self.control_io().map(|io| {
            let resized = io.block_on(disk.resize(&io, bytes));
            io.close();
            resized
        });
        let told = self.adopt_size(disk.size());
        drop(disk);
        let given_back = match idle {
            true => self.give_back(&mut control),
            false => Ok(()),
        };
        resized??;
        given_back?;
        Ok(told)
    }

    /// Looks whether somebody else has given the image another size, and takes it: of a raw file, block
    /// device or remote namespace at any time, of a qcow2 image only while no ring runs, since it is locked otherwise.
    ///
    /// # Errors
    /// The image can not be looked at, or is there no more. Nothing has changed then.
    pub fn refresh(&self) -> Result<Resized, DeviceError> {
        let control = lock(&self.control);
        let io = self.control_io()?;
        let size = match &control.active {
            Some(disk) => io.block_on(disk.refresh(&io)),
            None => io.block_on(self.disk.refresh(&io)),
        };
        io.close();
        Ok(self.adopt_size(size?))
    }

    /// The disk has `bytes` bytes: limits and configuration space say so from here on.
    pub(super) fn adopt_size(&self, bytes: u64) -> Resized {
        let mut state = lock(&self.config);
        let old = state.config.capacity_bytes();
        self.disk.set_size(bytes);
        // A worker that sees the old value asks the image, which knows better. A guest that has read the new
        // capacity finds the new value: the lock, the VMM and its ring are in between.
        self.shared.capacity_bytes.store(bytes, Ordering::Relaxed);
        let changed = state.config.set_capacity(&self.shared.limits());
        let new = state.config.capacity_bytes();
        drop(state);
        if changed {
            self.signal_change();
        }
        Resized { old, new }
    }

    fn signal_change(&self) {
        if let Some(event) = &*lock(&self.changed) {
            if let Err(error) = event.write(1) {
                // Only a counter that is full refuses, and that one is set.
                warn!("{}: telling of another capacity: {error}", self.name());
            }
        }
    }
}
