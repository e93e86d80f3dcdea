//! The door down: what a session needs from the disk it serves.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::shared_memory::SharedPart;
use crate::virtio::dirty::DirtyLog;
use crate::virtio::memory::GuestMemory;

pub use crate::dataplane::device::{Paused, Resized, RingStart};

/// What a session needs from the device it serves; implemented over the data plane.
///
/// Every method may be called from the control thread of the disk only, and may block it. Ring indices
/// are below [`num_queues`](Device::num_queues) and refer to rings in the state the method asks for:
/// the session has checked both. An error is a sentence: it goes to the log, and the VMM learns only
/// that the request failed.
pub trait Device: Send + Sync {
    /// The virtio features offered, without `VHOST_USER_F_PROTOCOL_FEATURES`, which is the session's.
    fn features(&self) -> u64;

    /// The number of request queues.
    fn num_queues(&self) -> u16;

    /// The largest queue size (number of descriptors), a power of two.
    fn max_queue_size(&self) -> u16;

    /// Reads `len` bytes of the device's configuration space from byte `offset`. An answer that ends
    /// early is padded with zeros by the session: a VMM may know a longer configuration than we do.
    fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>, String>;

    /// The capacity that the configuration space tells, in bytes. It may change at any time.
    fn capacity(&self) -> u64;

    /// From now on `event` is signalled whenever the capacity has changed.
    fn on_change(&self, event: EventFd);

    /// From now on `event` is signalled when the image tells of a change by itself: it is time for
    /// [`Device::refresh`].
    fn on_outside_change(&self, event: EventFd) -> io::Result<()>;

    /// Looks whether the image was given another size by somebody else, and takes it; [`Device::capacity`] is
    /// what it is then.
    fn refresh(&self) -> Result<Resized, String>;

    /// Writes to the device's configuration space at byte `offset`; refuses whatever a driver may not
    /// write.
    fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), String>;

    /// The features that the driver accepted: a subset of [`features`](Device::features).
    fn set_acked_features(&self, features: u64);

    /// Bytes of memory, behind the queues' parts of the inflight region, that the disk's crash journal wants.
    fn journal_bytes(&self) -> usize;

    /// The memory for the crash journal, which outlives this process; `None`: the VMM keeps none. Called while
    /// no ring runs. What an earlier process left there is made good when the first ring starts.
    fn set_journal(&self, memory: Option<SharedPart>);

    /// Starts a stopped ring. The first one takes the image (lock, metadata).
    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), String>;

    /// Drains a running ring, stops it, and returns where it would go on ([`RingConfig::base`]).
    ///
    /// [`RingConfig::base`]: crate::virtio::ring::RingConfig::base
    ///
    /// `progress` is called every few seconds with the number of requests in flight while it waits.
    /// When it was the last running ring, the image is flushed and its lock released, and the guest's
    /// memory let go, before this returns. The ring counts as stopped even after an error.
    fn stop_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, String>;

    /// As [`stop_ring`](Device::stop_ring), but what is in flight is not waited for: it is given up, and stays in the
    /// inflight region of the ring, which has one, for whoever serves the ring next. Guest memory is not written
    /// to any more when this returns.
    fn suspend_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, String>;

    /// Replaces the guest's memory under the running rings. Called only while a ring runs; the rings lie
    /// at the same guest addresses in the old and the new memory.
    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), String>;

    /// Marks what is written to guest memory from now on in this log, or nowhere; also for rings that start later.
    /// When this returns it is in effect on every worker, and all marks of what was completed before are in the log
    /// that was in use before.
    fn set_log(&self, log: Option<Arc<DirtyLog>>) -> Result<(), String>;

    /// Replaces where a running ring's used ring is in the log; `None`: it is not to be logged.
    fn set_used_log(&self, index: u16, used_log: Option<u64>) -> Result<(), String>;

    /// Replaces the kick descriptor of a running ring; `None` means that the ring is polled.
    fn set_kick(&self, index: u16, kick: Option<File>) -> Result<(), String>;

    /// Replaces the call descriptor of a running ring and signals the new one once, since the guest may
    /// have missed what the old one said; `None` means that the guest polls.
    fn set_call(&self, index: u16, call: Option<File>) -> Result<(), String>;

    /// Replaces the error descriptor of a running ring.
    fn set_err(&self, index: u16, err: Option<File>) -> Result<(), String>;

    /// Enables or disables a running ring. A disabled ring fetches nothing; when it is enabled the ring
    /// is looked at even if its kick came before.
    fn set_enabled(&self, index: u16, enabled: bool) -> Result<(), String>;

    /// Stops every ring without answering the guest any more, as after `RESET_DEVICE` or the end of the
    /// connection. Requests in flight are waited for, since they point into the guest's memory. The
    /// image is flushed, its lock released and the memory let go before this returns. Does nothing when
    /// no ring runs: QEMU also resets on every pause of the machine, so what the driver set (the write
    /// cache) has to stay.
    fn reset(&self);

    /// Descriptors of the image's files, with the locks that they have while a ring runs.
    fn image_files(&self) -> io::Result<Vec<File>>;

    /// Descriptors for the process that takes this one's place, each with the number that the configuration
    /// gives it.
    fn descriptors(&self) -> io::Result<Vec<(RawFd, File)>>;

    /// Writes while the rings run what would have to be written when they stop.
    fn write_ahead(&self) -> Result<(), String>;

    /// Stops all rings together, drained. The image is given back but stays locked: for the process that has
    /// its files, or until a ring starts again here. `progress` as in [`stop_ring`](Device::stop_ring).
    fn pause(&self, progress: &mut dyn FnMut(u32)) -> Paused<String>;

    /// The device was paused and is this process's again, with its rings started as far as they can be.
    fn resumed(&self);
}
