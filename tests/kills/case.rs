//! The images that daemons are killed over, and how they are driven.

use std::path::Path;

use crate::common::SOON;
use crate::frontend::guest::Random;
use crate::frontend::guest::model::SECTOR;
use crate::frontend::{DeviceOptions, Disk, Notify, SlotOptions, qemu};

/// Sectors of the longest request.
pub const MAX_SECTORS: u64 = 128;

/// An image, and how it is driven.
#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub seed: u64,
    /// Out of a hundred kills of the whole test, how many this case gets.
    pub share: u64,
    pub format: &'static str,
    pub options: &'static str,
    pub size: u64,
    /// Sectors that requests like to sit around.
    pub grain: u64,
    /// Bytes of a base image below; none where it is 0.
    pub base: u64,
    pub queues: u16,
    pub workers: u16,
    pub queue_size: u16,
    pub packed: bool,
    /// Requests in flight a queue.
    pub depth: u16,
}

impl Case {
    pub fn disk(&self, dir: &Path) -> Disk {
        let mut disk = Disk::new(dir.join("disk"), self.format)
            .queues(self.queues)
            .workers(self.workers);
        if self.base > 0 {
            disk = disk.args(["--allow-path".as_ref(), dir.as_os_str()]);
        }
        disk
    }

    pub fn device(&self, notify: Notify) -> DeviceOptions {
        DeviceOptions {
            queues: self.queues,
            queue_size: self.queue_size,
            packed: self.packed,
            notify,
            slots: SlotOptions {
                count: self.depth,
                data_len: MAX_SECTORS as u32 * SECTOR as u32,
                indirect: self.seed % 2 == 0,
                ..SlotOptions::default()
            },
            timeout: SOON,
            ..DeviceOptions::default()
        }
    }

    /// Makes the image and what is below it; returns what it reads as.
    pub fn make_image(&self, dir: &Path) -> Vec<u8> {
        let image = dir.join("disk");
        let _ = std::fs::remove_file(&image);
        let mut contents = vec![0; self.size as usize];
        if self.base == 0 {
            qemu::create(&image, self.format, self.size, self.options);
            return contents;
        }
        let mut random = Random::new(self.seed ^ 0xba5e);
        let below = &mut contents[..self.base as usize];
        for stretch in below.chunks_mut(40 << 10).step_by(2) {
            random.fill(stretch);
        }
        let base = dir.join("base");
        if !base.exists() {
            std::fs::write(&base, &contents[..self.base as usize]).unwrap();
        }
        qemu::create_overlay(&image, self.size, &base, "raw", self.options);
        contents
    }
}
