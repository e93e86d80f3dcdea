//! A virtio-blk device as the control plane sees it.
//!
//! The image is the device's only while a ring runs: it is taken (locks, metadata read afresh) when the
//! first ring starts and given back, with everything flushed, when the last one has stopped. A
//! migration's target may so have it open before the source lets it go.

mod handover;
mod size;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::Dataplane;
use super::mailbox::{Command, RingFile, RingKey, Start};
use super::stats::RingStats;
use crate::block::{self, ActiveDisk, Disk};
use crate::kill_point::kill_point;
use crate::reactor::{Io, IoConfig};
use crate::shared_memory::SharedPart;
use crate::virtio::blk::DeviceLimits;
use crate::virtio::blk::config::{ConfigError, DeviceConfig};
use crate::virtio::blk::features;
use crate::virtio::blk::request::DeviceId;
use crate::virtio::dirty::DirtyLog;
use crate::virtio::inflight::QueueRegion;
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::{RingConfig, RingError};

pub use handover::Paused;

/// How often a stop that waits for requests says so.
const PROGRESS_EVERY: Duration = Duration::from_secs(3);
/// How long a locked image is waited for, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_RETRY: Duration = Duration::from_millis(10);
/// Submission queue entries of the io_uring that takes and gives back an image.
const CONTROL_RING_ENTRIES: u32 = 64;

/// What the workers know of a device.
#[derive(Debug)]
pub(super) struct DeviceShared {
    /// For the log.
    pub(super) name: String,
    /// But for the capacity, which may change.
    limits: DeviceLimits,
    /// Bytes of the disk.
    capacity_bytes: AtomicU64,
    pub(super) id: DeviceId,
    /// Every write is flushed before it completes.
    pub(super) write_through: AtomicBool,
    /// Failed requests, for the log.
    pub(super) complaints: AtomicU64,
}

impl DeviceShared {
    /// Of a device that only a test has.
    #[cfg(test)]
    pub(super) fn made(limits: DeviceLimits) -> Arc<Self> {
        Arc::new(Self {
            name: "test".to_owned(),
            limits,
            capacity_bytes: AtomicU64::new(limits.capacity_bytes),
            id: DeviceId::default(),
            write_through: AtomicBool::new(false),
            complaints: AtomicU64::new(0),
        })
    }

    /// What a request is checked against.
    #[inline]
    pub(super) fn limits(&self) -> DeviceLimits {
        DeviceLimits {
            capacity_bytes: self.capacity_bytes.load(Ordering::Relaxed),
            ..self.limits
        }
    }
}

/// What the user chose for a device, beside its disk.
#[derive(Clone, Debug)]
pub struct DeviceSettings {
    /// Name in the log.
    pub name: String,
    /// The serial that GET_ID answers, 20 bytes at most.
    pub id: DeviceId,
    /// Number of request queues.
    pub num_queues: u16,
    /// Largest queue size, a power of two.
    pub queue_size: u16,
    /// Limits and geometry that the guest sees.
    pub limits: DeviceLimits,
    /// Writes are durable before they complete, whatever the guest chooses.
    pub force_write_through: bool,
}

/// Everything a ring starts with.
#[derive(Debug)]
pub struct RingStart {
    /// The guest's memory as it is now.
    pub memory: Arc<GuestMemory>,
    /// Size, guest addresses and first available index.
    pub config: RingConfig,
    /// The features that the driver accepted.
    pub features: u64,
    /// What the driver kicks; none: the ring is polled.
    pub kick: Option<File>,
    /// What tells the driver of used buffers; none: the driver polls.
    pub call: Option<File>,
    /// What tells the VMM of a broken ring.
    pub err: Option<File>,
    /// Whether requests are fetched at once.
    pub enabled: bool,
    /// Where requests in flight are kept, if the VMM keeps them: what an earlier process left there is done
    /// again.
    pub inflight: Option<QueueRegion>,
    /// Where the used ring is in the dirty log (`log_guest_addr`), if it is to be logged. Guest physical address.
    pub used_log: Option<u64>,
}

pub use size::Resized;

/// Why a device can not do what the VMM asked.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The ring's layout was refused.
    #[error("ring {index}: {source}")]
    Ring {
        /// Queue index.
        index: u16,
        /// Why.
        source: RingError,
    },
    /// The image could not be taken, or not be given back in order.
    #[error(transparent)]
    Image(#[from] block::Error),
    /// No io_uring for the control thread.
    #[error("{0}")]
    Reactor(#[from] std::io::Error),
    /// The worker thread is gone.
    #[error("the worker of ring {0} has ended")]
    WorkerGone(u16),
    /// Asked of a ring that does not run.
    #[error("ring {0} does not run")]
    NotRunning(u16),
}

/// A virtio-blk device on a [`Dataplane`]. Its methods block; they are the control thread's.
#[derive(Debug)]
pub struct BlkDevice {
    plane: Arc<Dataplane>,
    number: u32,
    disk: Disk,
    settings: DeviceSettings,
    shared: Arc<DeviceShared>,
    config: Mutex<ConfigState>,
    control: Mutex<Control>,
    /// Signalled when the guest is to be told of another capacity.
    changed: Mutex<Option<EventFd>>,
}

#[derive(Debug)]
struct ConfigState {
    config: DeviceConfig,
    acked: u64,
}

#[derive(Debug, Default)]
struct Control {
    active: Option<Arc<ActiveDisk>>,
    /// Memory that outlives this process.
    journal: Option<SharedPart>,
    /// Where writes to guest memory are marked.
    log: Option<Arc<DirtyLog>>,
    rings: BTreeMap<u16, Arc<RingStats>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until a ring has stopped; `progress` is told now and then how many requests are still in flight. Where the
/// ring goes on; none: its worker has ended.
fn wait_for_stop(
    stopped: &Receiver<Option<u32>>,
    stats: &RingStats,
    progress: &mut dyn FnMut(u32),
) -> Option<u32> {
    loop {
        match stopped.recv_timeout(PROGRESS_EVERY) {
            Ok(base) => break base,
            Err(RecvTimeoutError::Timeout) => progress(stats.in_flight.load(Ordering::Relaxed)),
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    }
}

impl BlkDevice {
    /// A device that serves `disk`. `config` is the configuration space that fits `settings`.
    pub fn new(
        plane: Arc<Dataplane>,
        disk: Disk,
        settings: DeviceSettings,
        config: DeviceConfig,
    ) -> Self {
        let shared = Arc::new(DeviceShared {
            name: settings.name.clone(),
            limits: settings.limits,
            capacity_bytes: AtomicU64::new(settings.limits.capacity_bytes),
            id: settings.id,
            write_through: AtomicBool::new(settings.force_write_through),
            complaints: AtomicU64::new(0),
        });
        Self {
            number: plane.next_device(),
            plane,
            disk,
            shared,
            config: Mutex::new(ConfigState { config, acked: 0 }),
            control: Mutex::new(Control::default()),
            changed: Mutex::new(None),
            settings,
        }
    }

    /// Name in the log.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// The disk's description, for people.
    pub fn describe(&self) -> String {
        self.disk.describe()
    }

    /// The serial that the guest sees.
    pub fn serial(&self) -> String {
        let bytes = self.shared.id.as_bytes();
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    /// See [`Disk::remote_identity`].
    pub fn remote_identity(&self) -> Option<[u8; 16]> {
        self.disk.remote_identity()
    }

    /// The virtio features offered to the driver.
    pub fn features(&self) -> u64 {
        features::offered(&self.settings.limits)
    }

    /// Number of request queues.
    pub fn num_queues(&self) -> u16 {
        self.settings.num_queues
    }

    /// Largest queue size.
    pub fn max_queue_size(&self) -> u16 {
        self.settings.queue_size
    }

    /// Reads the configuration space.
    pub fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>, ConfigError> {
        lock(&self.config).config.read(offset, len)
    }

    /// Writes the configuration space on the driver's behalf: the write cache mode is all it may set.
    pub fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        let mut state = lock(&self.config);
        state.config.write(offset, data)?;
        self.apply_write_cache(&state);
        Ok(())
    }

    /// Takes the features that the driver accepted.
    pub fn set_acked_features(&self, acked: u64) {
        let mut state = lock(&self.config);
        state.acked = acked;
        state.config.negotiated(acked);
        self.apply_write_cache(&state);
    }

    fn apply_write_cache(&self, state: &ConfigState) {
        let through = self.settings.force_write_through
            || features::write_through(state.acked, state.config.write_cache());
        self.shared.write_through.store(through, Ordering::Relaxed);
    }

    /// Bytes of memory that a crash journal wants, which is to outlive this process.
    pub fn journal_bytes(&self) -> usize {
        block::JOURNAL_BYTES
    }

    /// Memory for the crash journal, from the next taking of the image on: what an earlier process left there is
    /// made good then.
    pub fn set_journal(&self, memory: Option<SharedPart>) {
        lock(&self.control).journal = memory;
    }

    /// Starts a ring; the first one takes the image.
    pub fn start_ring(&self, index: u16, start: RingStart) -> Result<(), DeviceError> {
        let mut control = lock(&self.control);
        if control.rings.is_empty() && control.active.is_some() {
            // It could not be flushed when the last ring stopped. Once it can, it is taken afresh, with the journal
            // that the VMM keeps now; until then it goes on as it is.
            if let Err(error) = self.give_back(&mut control) {
                warn!("{}: {error}", self.name());
            }
        }
        let disk = match &control.active {
            Some(disk) => disk.clone(),
            None => {
                let disk = self.take_image(control.journal.clone())?;
                // It may have been resized since somebody looked last.
                self.adopt_size(disk.size());
                control.active = Some(disk.clone());
                disk
            }
        };
        let stats = Arc::new(RingStats::default());
        let start = Box::new(Start {
            device: self.shared.clone(),
            disk,
            memory: start.memory,
            config: start.config,
            features: start.features,
            kick: start.kick,
            call: start.call,
            err: start.err,
            enabled: start.enabled,
            inflight: start.inflight,
            log: control.log.clone(),
            used_log: start.used_log,
            stats: stats.clone(),
        });
        let started = self.ask(index, |key, reply| Command::Start { key, start, reply });
        match started {
            Ok(Ok(())) => {
                control.rings.insert(index, stats);
                Ok(())
            }
            failed => {
                if control.rings.is_empty() {
                    self.give_back(&mut control)?;
                }
                match failed {
                    Err(error) => Err(error),
                    Ok(result) => result.map_err(|source| DeviceError::Ring { index, source }),
                }
            }
        }
    }

    /// Stops a ring: fetches nothing more, waits for what is under way (telling `progress` how much every
    /// few seconds), and returns where it would go on ([`RingConfig::base`]). After the last ring the image is given back.
    pub fn stop_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, DeviceError> {
        self.end_ring(index, progress, |key, reply| Command::Stop { key, reply })
    }

    /// As [`BlkDevice::stop_ring`], but what is under way is given up: it stays in the inflight region, to be done
    /// by whoever serves the ring next. Waited for is only what a device has already.
    pub fn suspend_ring(
        &self,
        index: u16,
        progress: &mut dyn FnMut(u32),
    ) -> Result<u32, DeviceError> {
        self.end_ring(index, progress, |key, reply| Command::Suspend {
            key,
            reply,
        })
    }

    fn end_ring(
        &self,
        index: u16,
        progress: &mut dyn FnMut(u32),
        command: impl FnOnce(RingKey, SyncSender<Option<u32>>) -> Command,
    ) -> Result<u32, DeviceError> {
        let mut control = lock(&self.control);
        let stats = control
            .rings
            .remove(&index)
            .ok_or(DeviceError::NotRunning(index))?;
        let receiver = self.send(index, command);
        let base = wait_for_stop(&receiver, &stats, progress);
        info!("{}: ring {index} stopped: {stats}", self.name());
        if control.rings.is_empty() {
            self.give_back(&mut control)?;
        }
        base.ok_or(DeviceError::WorkerGone(index))
    }

    /// Stops all rings and gives the image back; errors go to the log.
    pub fn reset(&self) {
        let rings: Vec<u16> = lock(&self.control).rings.keys().copied().collect();
        for index in rings {
            let mut progress = |in_flight| {
                info!(
                    "{}: ring {index}: waiting for {in_flight} requests",
                    self.name()
                );
            };
            if let Err(error) = self.stop_ring(index, &mut progress) {
                error!("{}: {error}", self.name());
            }
        }
        let mut control = lock(&self.control);
        if control.rings.is_empty() {
            // A stop may have failed to give it back.
            if let Err(error) = self.give_back(&mut control) {
                error!("{}: {error}", self.name());
            }
        }
    }

    /// Replaces guest memory under the running rings.
    pub fn set_memory(&self, memory: &Arc<GuestMemory>) -> Result<(), DeviceError> {
        let control = lock(&self.control);
        let workers = self.plane.workers() as u16;
        // One ring of each worker is enough to reach them all.
        for index in 0..workers.min(self.settings.num_queues) {
            let result = self.ask(index, |key, reply| Command::SetMemory {
                device: key.0,
                memory: memory.clone(),
                reply,
            })?;
            result.map_err(|source| DeviceError::Ring { index, source })?;
        }
        drop(control);
        Ok(())
    }

    /// Marks what is written to guest memory from now on, or no longer. In effect when this returns: whatever is
    /// completed later is marked there, and all marks before are in the log before. While there is a log, copying
    /// that an image puts off is done at once, so that little is left to do when the disk is handed over; it begins
    /// with what was put off, which this does not wait for.
    pub fn set_log(&self, log: Option<Arc<DirtyLog>>) -> Result<(), DeviceError> {
        let mut control = lock(&self.control);
        control.log.clone_from(&log);
        if control.rings.is_empty() {
            return Ok(());
        }
        let workers = self.plane.workers() as u16;
        // One ring of each worker is enough to reach them all.
        for index in 0..workers.min(self.settings.num_queues) {
            self.ask(index, |key, reply| Command::SetLog {
                device: key.0,
                log: log.clone(),
                reply,
            })?;
        }
        Ok(())
    }

    /// Replaces where a running ring's used ring is in the log.
    pub fn set_used_log(&self, index: u16, used_log: Option<u64>) -> Result<(), DeviceError> {
        self.ask(index, |key, reply| Command::SetUsedLog {
            key,
            used_log,
            reply,
        })
    }

    /// Replaces what the driver kicks.
    pub fn set_kick(&self, index: u16, kick: Option<File>) -> Result<(), DeviceError> {
        self.set_file(index, RingFile::Kick, kick)
    }

    /// Replaces what tells the driver of used buffers, and signals the new one once.
    pub fn set_call(&self, index: u16, call: Option<File>) -> Result<(), DeviceError> {
        self.set_file(index, RingFile::Call, call)
    }

    /// Replaces what tells the VMM of a broken ring.
    pub fn set_err(&self, index: u16, err: Option<File>) -> Result<(), DeviceError> {
        self.set_file(index, RingFile::Err, err)
    }

    fn set_file(&self, index: u16, which: RingFile, file: Option<File>) -> Result<(), DeviceError> {
        self.ask(index, |key, reply| Command::SetFile {
            key,
            which,
            file,
            reply,
        })
    }

    /// Lets a running ring fetch requests, or not.
    pub fn set_enabled(&self, index: u16, enabled: bool) -> Result<(), DeviceError> {
        self.ask(index, |key, reply| Command::SetEnabled {
            key,
            enabled,
            reply,
        })
    }

    /// Takes the image. Another process may be about to let it go: the source of a migration, or one that
    /// was killed, whose locks the kernel keeps until it has undone that process's io_uring.
    fn take_image(&self, journal: Option<SharedPart>) -> Result<Arc<ActiveDisk>, DeviceError> {
        let io = self.control_io()?;
        let start = Instant::now();
        let mut waits = false;
        let taken = loop {
            let activate = self
                .disk
                .activate_with(&io, self.plane.workers(), journal.clone());
            match io.block_on(activate) {
                Err(error)
                    if error.kind() == block::ErrorKind::Locked
                        && start.elapsed() < LOCK_PATIENCE =>
                {
                    if !std::mem::replace(&mut waits, true) {
                        let patience = LOCK_PATIENCE.as_secs();
                        info!("{}: waiting up to {patience} s: {error}", self.name());
                    }
                    std::thread::sleep(LOCK_RETRY);
                }
                other => break other,
            }
        };
        io.close();
        Ok(taken?)
    }

    /// Gives the image back, everything flushed. If that can not be flushed the image stays taken, and locked:
    /// nobody is to go on with what would be lost. The next ring that starts here goes on with all of it, and the
    /// next stop tries again.
    fn give_back(&self, control: &mut Control) -> Result<(), DeviceError> {
        let Some(disk) = &control.active else {
            return Ok(());
        };
        let io = self.control_io()?;
        let flushed = io.block_on(disk.flush(&io));
        kill_point!("stop-flushed");
        if let Some(disk) = control.active.take_if(|_| flushed.is_ok()) {
            if let Err(error) = io.block_on(disk.deactivate(&io)) {
                // All is durable, and the image consistent; space that was reserved may be lost to it.
                warn!("{}: giving reserved space back: {error}", self.name());
            }
            kill_point!("stop-released");
        }
        io.close();
        flushed.map_err(|error| {
            error!(
                "{}: the image could not be flushed and stays locked, with what was written in memory; it is \
                 tried again when a ring has run and stopped",
                self.name()
            );
            error.into()
        })
    }

    fn control_io(&self) -> std::io::Result<Io> {
        Io::new(&IoConfig {
            worker: 0,
            entries: CONTROL_RING_ENTRIES,
            epochs: self.plane.epochs().clone(),
        })
    }

    fn send<T>(
        &self,
        index: u16,
        command: impl FnOnce(RingKey, SyncSender<T>) -> Command,
    ) -> Receiver<T> {
        let (reply, receiver) = sync_channel(1);
        self.plane
            .mailbox_of(self.number, index)
            .send(command((self.number, index), reply));
        receiver
    }

    fn ask<T>(
        &self,
        index: u16,
        command: impl FnOnce(RingKey, SyncSender<T>) -> Command,
    ) -> Result<T, DeviceError> {
        self.send(index, command)
            .recv()
            .map_err(|_| DeviceError::WorkerGone(index))
    }
}

impl Drop for BlkDevice {
    fn drop(&mut self) {
        self.reset();
    }
}
