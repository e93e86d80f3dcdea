//! Commands from the control thread to a worker.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::DeviceShared;
use super::stats::RingStats;
use crate::block::ActiveDisk;
use crate::reactor::Doorbell;
use crate::virtio::dirty::DirtyLog;
use crate::virtio::inflight::QueueRegion;
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::{RingConfig, RingError};

/// Names a ring: the device's number in this process, and the queue index.
pub(super) type RingKey = (u32, u16);

/// What the control thread asks of a worker. Each command is answered on its `reply`, but `Shutdown`.
#[derive(Debug)]
pub(super) enum Command {
    /// Take a ring over and serve it.
    Start {
        key: RingKey,
        start: Box<Start>,
        reply: SyncSender<Result<(), RingError>>,
    },
    /// Fetch nothing more, finish what is under way, let the ring go; answers where it would go on ([`RingConfig::base`]).
    Stop {
        key: RingKey,
        reply: SyncSender<Option<u32>>,
    },
    /// Fetch nothing more, give up what is under way, let the ring go; answers as `Stop` does.
    Suspend {
        key: RingKey,
        reply: SyncSender<Option<u32>>,
    },
    /// From now on, this is the device's guest memory.
    SetMemory {
        device: u32,
        memory: Arc<GuestMemory>,
        reply: SyncSender<Result<(), RingError>>,
    },
    /// From now on, what the device writes to guest memory is marked there. None: nothing is.
    SetLog {
        device: u32,
        log: Option<Arc<DirtyLog>>,
        reply: SyncSender<()>,
    },
    /// From now on, this is where a used ring is in the log.
    SetUsedLog {
        key: RingKey,
        used_log: Option<u64>,
        reply: SyncSender<()>,
    },
    /// Replace a file of a ring.
    SetFile {
        key: RingKey,
        which: RingFile,
        file: Option<File>,
        reply: SyncSender<()>,
    },
    /// Fetch requests, or do not.
    SetEnabled {
        key: RingKey,
        enabled: bool,
        reply: SyncSender<()>,
    },
    /// End the thread.
    Shutdown,
}

/// Which of a ring's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RingFile {
    /// The driver's notifications; none: the ring is always polled.
    Kick,
    /// Ours to the driver; none: the driver polls.
    Call,
    /// Ours to the VMM about a broken ring.
    Err,
}

/// Everything a ring starts with.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) device: Arc<DeviceShared>,
    pub(super) disk: Arc<ActiveDisk>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) config: RingConfig,
    pub(super) features: u64,
    pub(super) kick: Option<File>,
    pub(super) call: Option<File>,
    pub(super) err: Option<File>,
    pub(super) enabled: bool,
    pub(super) inflight: Option<QueueRegion>,
    pub(super) log: Option<Arc<DirtyLog>>,
    pub(super) used_log: Option<u64>,
    pub(super) stats: Arc<RingStats>,
}

/// A worker's mailbox. The worker pays one relaxed load a turn for it.
#[derive(Debug)]
pub(super) struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    waiting: AtomicBool,
    doorbell: Doorbell,
}

impl Mailbox {
    pub(super) fn new(doorbell: Doorbell) -> Self {
        Self {
            commands: Mutex::new(VecDeque::new()),
            waiting: AtomicBool::new(false),
            doorbell,
        }
    }

    pub(super) fn send(&self, command: Command) {
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        commands.push_back(command);
        self.waiting.store(true, Ordering::Release);
        drop(commands);
        self.doorbell.ring();
    }

    #[inline]
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(super) fn take(&self) -> VecDeque<Command> {
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.store(false, Ordering::Relaxed);
        std::mem::take(&mut *commands)
    }
}
