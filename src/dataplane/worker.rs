//! A worker thread and its loop.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use super::mailbox::{Command, Mailbox};
use super::poll::{Idle, PollConfig, Poller, Waiting};
use super::queue::Queue;
use crate::block::ActiveDisk;
use crate::reactor::{Io, IoConfig, TaskId};
use crate::virtio::dirty::DirtyLog;

/// Starts a worker; returns once it runs, or with what kept it from running.
pub(super) fn spawn(
    index: usize,
    config: IoConfig,
    cpu: Option<usize>,
    poll: PollConfig,
) -> io::Result<(Arc<Mailbox>, JoinHandle<()>)> {
    let (ready, started) = sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let _abort = AbortOnPanic;
            let made = cpu.map_or(Ok(()), pin_to).and_then(|()| Io::new(&config));
            match made {
                Ok(io) => {
                    let mailbox = Arc::new(Mailbox::new(io.doorbell()));
                    if ready.send(Ok(mailbox.clone())).is_ok() {
                        Worker::new(io, mailbox, poll).run();
                    }
                }
                // Nobody listens only if the process is ending.
                Err(error) => drop(ready.send(Err(error))),
            }
        })?;
    match started.recv() {
        Ok(Ok(mailbox)) => Ok((mailbox, thread)),
        Ok(Err(error)) => Err(io::Error::new(
            error.kind(),
            format!("worker {index}: {error}"),
        )),
        Err(_) => Err(io::Error::other(format!("worker {index} did not start"))),
    }
}

/// A worker that panicked would leave its guests waiting for ever. The process ends instead: the VMM
/// reconnects to the next one.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!("a worker panicked; the process ends so that the VMM can reconnect to another");
            std::process::abort();
        }
    }
}

fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET checks the number against the set's size.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set lives through the call; 0 is the calling thread.
    let failed = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } != 0;
    if failed {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("pinning to CPU {cpu}: {error}"),
        ));
    }
    Ok(())
}

/// A worker without a thread of its own: whoever has it turns it, on the thread that made it. What it does depends on
/// nothing but what it is given, so that the instructions of a request can be counted.
pub struct HandWorker(Worker);

impl HandWorker {
    pub(super) fn new(config: &IoConfig, poll: PollConfig) -> io::Result<(Arc<Mailbox>, Self)> {
        let io = Io::new(config)?;
        let mailbox = Arc::new(Mailbox::new(io.doorbell()));
        Ok((mailbox.clone(), Self(Worker::new(io, mailbox, poll))))
    }

    /// One turn of a worker's loop. Returns true if anything was done.
    #[inline(always)]
    pub fn turn(&mut self) -> bool {
        self.0.turn()
    }

    /// Waits in the kernel until an operation ends or a command comes, or for as long as `timeout`.
    pub fn wait(&self, timeout: Duration) {
        self.0.io.park(Some(timeout));
    }
}

impl Drop for HandWorker {
    fn drop(&mut self) {
        self.0.io.close();
    }
}

struct Worker {
    io: Io,
    mailbox: Arc<Mailbox>,
    queues: Vec<Rc<Queue>>,
    /// By device: the task that keeps its disk from having too much unwritten.
    housekeepers: BTreeMap<u32, TaskId>,
    poller: Poller,
    /// The last turn that did something showed completions to a driver.
    answer_due: bool,
    shutdown: bool,
}

/// How often a disk is asked whether something has waited too long to be written.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

async fn keep_house(io: Io, disk: Arc<ActiveDisk>, eager: bool) {
    if let Err(error) = disk.set_eager(&io, eager).await {
        // The next flush tries again.
        warn!("completing clusters whose copying was put off: {error}");
    }
    loop {
        io.sleep(HOUSEKEEPING).await;
        if let Err(error) = disk.write_back_if_due(&io).await {
            // The guest learns of it by its next flush.
            warn!("writing back ahead of a flush: {error}");
        }
    }
}

impl Worker {
    fn new(io: Io, mailbox: Arc<Mailbox>, poll: PollConfig) -> Self {
        Self {
            io,
            mailbox,
            queues: Vec::new(),
            housekeepers: BTreeMap::new(),
            poller: Poller::new(poll),
            answer_due: false,
            shutdown: false,
        }
    }

    fn run(mut self) {
        while !self.shutdown {
            if self.turn() {
                continue;
            }
            if self.poller.idle(Instant::now(), self.waiting()) == Idle::Spin
                && !self.queues.is_empty()
            {
                std::hint::spin_loop();
            } else {
                self.sleep();
            }
        }
        self.io.close();
    }

    /// One turn of the loop. Returns true if anything was done.
    #[inline]
    fn turn(&mut self) -> bool {
        if self.mailbox.is_waiting() {
            self.obey();
        }
        let mut busy = false;
        for queue in &self.queues {
            busy |= queue.poll();
        }
        busy |= self.io.turn();
        let mut stopped = false;
        let mut published = false;
        for queue in &self.queues {
            published |= queue.publish();
            stopped |= queue.is_stopped();
        }
        if stopped {
            self.let_stopped_go();
        }
        if busy {
            self.poller.busy();
            self.answer_due = published;
        }
        busy
    }

    fn waiting(&self) -> Waiting {
        let requests = self.queues.iter().map(|queue| queue.requests()).sum();
        let threads = self.queues.iter().any(|queue| queue.waits_for_threads());
        self.poller.waiting(requests, threads, self.answer_due)
    }

    /// Sleeps until a driver notifies, an operation ends or a command comes.
    #[cold]
    fn sleep(&mut self) {
        if self.queues.iter().any(|queue| queue.is_polled()) {
            return;
        }
        let mut waiting = false;
        for queue in &self.queues {
            waiting |= queue.before_sleep();
        }
        let sleeps = !waiting && !self.mailbox.is_waiting();
        if sleeps {
            self.io.park(None);
            self.poller.woke(Instant::now());
        }
        for queue in &self.queues {
            queue.after_sleep(sleeps);
            // A driver that woke us waits: its requests go before our own business with the kernel, such as
            // taking its notification and asking for the next one.
            if sleeps && queue.poll() {
                self.poller.busy();
                queue.publish();
            }
        }
    }

    #[cold]
    fn let_stopped_go(&mut self) {
        let (stopped, running) = std::mem::take(&mut self.queues)
            .into_iter()
            .partition(|queue| queue.is_stopped());
        self.queues = running;
        let (queues, io) = (&self.queues, &self.io);
        self.housekeepers.retain(|device, task| {
            let needed = queues.iter().any(|queue| queue.key.0 == *device);
            if !needed {
                io.remove(*task);
            }
            needed
        });
        let stopped: Vec<Rc<Queue>> = stopped;
        for queue in stopped {
            queue.end();
            let answer = queue.take_stop();
            // The disk is given back before the answer: who gets it may want the disk for itself.
            drop(queue);
            if let Some((reply, base)) = answer {
                let _ = reply.send(Some(base));
            }
        }
    }

    #[cold]
    fn obey(&mut self) {
        for command in self.mailbox.take() {
            // A reply that nobody waits for any more is no loss.
            match command {
                Command::Start { key, start, reply } => {
                    let (disk, eager) = (start.disk.clone(), start.log.is_some());
                    let enabled = start.enabled;
                    disk.join(&self.io);
                    let started = Queue::start(key, &self.io, *start);
                    let _ = reply.send(started.map(|queue| {
                        self.queues.push(queue);
                        if enabled {
                            self.begin_keeping_house(key.0, disk, eager);
                        }
                    }));
                }
                Command::Stop { key, reply } => match self.find(key) {
                    Some(queue) => queue.stop(reply),
                    None => drop(reply.send(None)),
                },
                Command::Suspend { key, reply } => match self.find(key) {
                    Some(queue) => queue.suspend(reply),
                    None => drop(reply.send(None)),
                },
                Command::SetMemory {
                    device,
                    memory,
                    reply,
                } => {
                    let mut result = Ok(());
                    for queue in self.queues.iter().filter(|q| q.key.0 == device) {
                        result = result.and(queue.set_memory(&memory));
                    }
                    let _ = reply.send(result);
                }
                Command::SetLog { device, log, reply } => {
                    self.set_log(device, log.as_ref());
                    let _ = reply.send(());
                }
                Command::SetUsedLog {
                    key,
                    used_log,
                    reply,
                } => {
                    if let Some(queue) = self.find(key) {
                        queue.set_used_log(used_log);
                    }
                    let _ = reply.send(());
                }
                Command::SetFile {
                    key,
                    which,
                    file,
                    reply,
                } => {
                    if let Some(queue) = self.find(key) {
                        queue.set_file(which, file);
                    }
                    let _ = reply.send(());
                }
                Command::SetEnabled {
                    key,
                    enabled,
                    reply,
                } => {
                    if let Some(queue) = self.find(key) {
                        queue.set_enabled(enabled);
                        let (disk, eager) = (queue.disk().clone(), queue.is_logged());
                        if enabled {
                            self.begin_keeping_house(key.0, disk, eager);
                        }
                    }
                    let _ = reply.send(());
                }
                Command::Shutdown => {
                    info!("worker ends");
                    self.shutdown = true;
                }
            }
        }
        // Whatever the commands changed, the rings are looked at before the next sleep.
        self.poller.busy();
    }

    /// All marks of what was completed before are in by now: they are set where a request completes. From here
    /// on those of this log are.
    fn set_log(&mut self, device: u32, log: Option<&Arc<DirtyLog>>) {
        let mut disk = None;
        for queue in self.queues.iter().filter(|q| q.key.0 == device) {
            queue.set_log(log.cloned());
            disk = Some(queue.disk().clone());
        }
        if let (Some(disk), Some(task)) = (disk, self.housekeepers.get_mut(&device)) {
            self.io.remove(*task);
            *task = self
                .io
                .spawn(keep_house(self.io.clone(), disk, log.is_some()));
        }
    }

    /// Not before a ring is enabled: until then another process may be about to go on with the image.
    fn begin_keeping_house(&mut self, device: u32, disk: Arc<ActiveDisk>, eager: bool) {
        self.housekeepers
            .entry(device)
            .or_insert_with(|| self.io.spawn(keep_house(self.io.clone(), disk, eager)));
    }

    fn find(&self, key: (u32, u16)) -> Option<&Rc<Queue>> {
        self.queues.iter().find(|queue| queue.key == key)
    }
}
