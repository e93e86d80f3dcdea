//! The data plane: worker threads that own virtqueues and run requests to completion.
//!
//! A worker owns its rings, its io_uring and its request slots; nothing on the path of a request is
//! shared with another thread but the guest memory map and the image's metadata. The control thread
//! speaks to a worker through a [`mailbox`] and a doorbell, and every command is answered.
//!
//! - [`worker`]: the loop: fetch, start, turn the reactor, publish; sleep when there is nothing to do.
//! - [`queue`]: one ring with its request slots; a request is a future in the slot of its head
//!   descriptor, allocated once.
//! - [`gather`]: neighbouring requests of a batch that become one transfer.
//! - [`poll`]: how long an idle worker spins before it sleeps.
//! - [`device`]: a virtio-blk device as the control plane sees it; takes the image when its first ring
//!   starts, and gives it back when the last one has stopped.

pub mod device;
mod dirty;
mod gather;
mod mailbox;
mod notifier;
pub mod poll;
mod queue;
pub mod stats;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

pub use device::BlkDevice;
pub use poll::{PollConfig, PollMode};
pub use worker::HandWorker;

use crate::reactor::{Epochs, IoConfig};
use mailbox::{Command, Mailbox};

/// Submission queue entries of a worker's io_uring.
const RING_ENTRIES: u32 = 1024;

/// How many workers, where, and how they wait.
#[derive(Clone, Debug)]
pub struct DataplaneConfig {
    /// Number of worker threads, at least 1.
    pub workers: usize,
    /// CPU of each worker, in order; empty: the scheduler's choice.
    pub cpus: Vec<usize>,
    /// How an idle worker waits.
    pub poll: PollConfig,
}

/// The worker threads of this process. Dropping it ends them; no ring may run then.
#[derive(Debug)]
pub struct Dataplane {
    workers: Vec<WorkerHandle>,
    epochs: Arc<Epochs>,
    next_device: AtomicU32,
}

#[derive(Debug)]
struct WorkerHandle {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl Dataplane {
    /// Starts the workers. Fails if a thread, its io_uring or its pinning is refused.
    pub fn start(config: &DataplaneConfig) -> io::Result<Arc<Self>> {
        let epochs = Epochs::new();
        let mut workers = Vec::with_capacity(config.workers);
        for index in 0..config.workers {
            let io = IoConfig {
                // 0 is the control thread's.
                worker: index + 1,
                entries: RING_ENTRIES,
                epochs: epochs.clone(),
            };
            let cpu = config.cpus.get(index).copied();
            let (mailbox, thread) = worker::spawn(index, io, cpu, config.poll)?;
            workers.push(WorkerHandle {
                mailbox,
                thread: Some(thread),
            });
        }
        Ok(Arc::new(Self {
            workers,
            epochs,
            next_device: AtomicU32::new(0),
        }))
    }

    /// A data plane with one worker, which the calling thread turns itself: see [`HandWorker`]. A command to it, the
    /// start of a ring say, is answered only while it is turned, so another thread has to give it. Fails if an
    /// io_uring is refused.
    pub fn by_hand(poll: PollConfig) -> io::Result<(Arc<Self>, HandWorker)> {
        let epochs = Epochs::new();
        let io = IoConfig {
            worker: 1,
            entries: RING_ENTRIES,
            epochs: epochs.clone(),
        };
        let (mailbox, worker) = HandWorker::new(&io, poll)?;
        let handle = WorkerHandle {
            mailbox,
            thread: None,
        };
        let plane = Arc::new(Self {
            workers: vec![handle],
            epochs,
            next_device: AtomicU32::new(0),
        });
        Ok((plane, worker))
    }

    /// The epoch domain of the workers and of whoever opens images for them.
    pub fn epochs(&self) -> &Arc<Epochs> {
        &self.epochs
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    fn next_device(&self) -> u32 {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }

    /// The worker that owns a ring: rings go round, each device starting one further on.
    fn mailbox_of(&self, device: u32, ring: u16) -> &Mailbox {
        let index = (device as usize + usize::from(ring)) % self.workers.len();
        &self.workers[index].mailbox
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        for worker in &self.workers {
            worker.mailbox.send(Command::Shutdown);
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                // A worker that panicked has aborted the process before this could be reached.
                let _ = thread.join();
            }
        }
    }
}
