//! The life cycle: listen, serve one VMM a disk, listen again, until a signal ends it.
//!
//! Every disk has its socket and a control thread of its own, so that a disk that drains (which may take
//! as long as its storage likes) keeps neither the other disks' VMMs nor the signals waiting. The thread
//! that calls [`Daemon::run`] waits for signals and for the end of the disks.
//!
//! What `main` does, in this order: [`Signals::block`] before any thread exists (threads inherit it), the
//! SIGBUS handler ([`crate::vhost_user::sigbus::install`]), the devices, [`Daemon::new`], which opens the
//! sockets, and [`Daemon::run`].

mod disk;
mod notify;
mod pid_file;
mod poller;
mod signals;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use log::{error, info, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vhost_user::{Device, Listen, ListenError};
use disk::Disk;
use pid_file::PidFile;
pub use pid_file::PidFileError;
use poller::Poller;
pub use signals::Signals;

/// One disk and where its VMM comes in.
pub struct DiskEndpoint {
    /// The disk's name, for the log and the name of its control thread.
    pub name: String,
    /// Its socket.
    pub listen: Listen,
    /// What is served there.
    pub device: Arc<dyn Device>,
}

/// How the daemon lives.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// End, with success, when each disk has served one VMM. A client that connects and leaves without
    /// a message does not count.
    pub once: bool,
    /// A file to hold our process id while we live.
    pub pid_file: Option<PathBuf>,
}

/// Why the daemon did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The socket of a disk cannot be had.
    #[error("disk {name}: {source}")]
    Listen {
        /// The disk.
        name: String,
        /// What is wrong.
        source: ListenError,
    },
    /// The pid file cannot be had.
    #[error(transparent)]
    PidFile(#[from] PidFileError),
    /// A system call failed.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The control thread of a disk failed; the others were served to their end.
    #[error("disk {name}: its control thread {why}")]
    Disk {
        /// The disk.
        name: String,
        /// How it ended.
        why: String,
    },
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::System { operation, source }
}

fn event() -> Result<EventFd, DaemonError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(system("eventfd"))
}

/// Ends the daemon as SIGTERM does; for whoever is told to, besides signals.
#[derive(Clone)]
pub struct Stopper {
    stops: Arc<Vec<EventFd>>,
}

impl Stopper {
    /// Asks every disk to drain and end; returns at once.
    pub fn stop(&self) {
        for stop in self.stops.iter() {
            if let Err(error) = stop.write(1) {
                // Only a counter that is full refuses, and that one is set.
                warn!("stop: {error}");
            }
        }
    }
}

/// Has every disk look whether its image has another size, as SIGHUP does.
#[derive(Clone)]
pub struct Refresher {
    events: Arc<Vec<EventFd>>,
}

impl Refresher {
    /// Asks every disk to look; returns at once.
    pub fn refresh(&self) {
        for event in self.events.iter() {
            if let Err(error) = event.write(1) {
                // Only a counter that is full refuses, and that one is set.
                warn!("refresh: {error}");
            }
        }
    }
}

/// The daemon, with its sockets open.
pub struct Daemon {
    disks: Vec<Disk>,
    stopper: Stopper,
    refresher: Refresher,
    // Released last: whoever waits for it finds the sockets gone.
    _pid_file: Option<PidFile>,
}

const TOKEN_SIGNAL: u64 = 0;
const TOKEN_DONE: u64 = 1;

impl Daemon {
    /// Takes the pid file and opens the sockets. From here on VMMs may connect: call it when everything
    /// else is ready, and [`run`](Daemon::run) soon after.
    ///
    /// # Errors
    /// Another instance holds the pid file, or a socket cannot be had. Nothing is left behind.
    pub fn new(endpoints: Vec<DiskEndpoint>, options: &Options) -> Result<Self, DaemonError> {
        let pid_file = options.pid_file.as_deref().map(PidFile::take).transpose()?;
        let mut disks = Vec::with_capacity(endpoints.len());
        let mut stops = Vec::with_capacity(endpoints.len());
        let mut refreshes = Vec::with_capacity(endpoints.len());
        for DiskEndpoint {
            name,
            listen,
            device,
        } in endpoints
        {
            let source = match listen.open() {
                Ok(source) => source,
                Err(source) => return Err(DaemonError::Listen { name, source }),
            };
            let stop = event()?;
            stops.push(stop.try_clone().map_err(system("eventfd"))?);
            let refresh = event()?;
            refreshes.push(refresh.try_clone().map_err(system("eventfd"))?);
            let changed = event()?;
            device.on_change(changed.try_clone().map_err(system("eventfd"))?);
            disks.push(Disk {
                name,
                source,
                device,
                once: options.once,
                stop,
                refresh,
                changed,
            });
        }
        Ok(Daemon {
            disks,
            stopper: Stopper {
                stops: Arc::new(stops),
            },
            refresher: Refresher {
                events: Arc::new(refreshes),
            },
            _pid_file: pid_file,
        })
    }

    /// What ends this daemon.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// What has this daemon's disks look at their sizes.
    pub fn refresher(&self) -> Refresher {
        self.refresher.clone()
    }

    /// Serves the disks until they end by themselves (`once`, or a given connection that is over) or
    /// SIGTERM or SIGINT comes: then the rings are drained, the images flushed and released, and the
    /// socket files and the pid file removed. A second such signal ends the process at once, as failed.
    /// SIGHUP has the disks look at their sizes.
    ///
    /// # Errors
    /// A system call fails, or the control thread of a disk fails; the other disks are served to their
    /// end first.
    pub fn run(self, signals: &Signals) -> Result<(), DaemonError> {
        let Daemon {
            disks,
            stopper,
            refresher,
            _pid_file,
        } = self;
        let done = event()?;
        let poller = Poller::new().map_err(system("epoll_create"))?;
        poller
            .add(signals, poller::IN, TOKEN_SIGNAL)
            .map_err(system("epoll_ctl"))?;
        poller
            .add(&done, poller::IN, TOKEN_DONE)
            .map_err(system("epoll_ctl"))?;

        let (numbers, ended) = mpsc::channel();
        let mut threads = Threads {
            running: HashMap::with_capacity(disks.len()),
            first_error: None,
        };
        for (number, disk) in disks.into_iter().enumerate() {
            let started = done
                .try_clone()
                .map_err(system("eventfd"))
                .and_then(|done| {
                    let tell = TellWhenDone {
                        number,
                        numbers: numbers.clone(),
                        done,
                    };
                    threads.start(disk, tell)
                });
            if let Err(error) = started {
                // The disks that run are ended before the error is told.
                threads.first_error.get_or_insert(error);
                stopper.stop();
                break;
            }
        }

        if threads.first_error.is_none() {
            notify::notify(notify::READY);
        }
        if let Err(error) = threads.watch(&poller, signals, &done, &ended, (&stopper, &refresher)) {
            // Nobody could end the disks any more.
            stopper.stop();
            threads.reap_all();
            return Err(error);
        }
        threads.first_error.map_or(Ok(()), Err)
    }
}

/// The control threads of the disks.
struct Threads {
    running: HashMap<usize, (String, JoinHandle<io::Result<()>>)>,
    first_error: Option<DaemonError>,
}

impl Threads {
    fn start(&mut self, disk: Disk, tell: TellWhenDone) -> Result<(), DaemonError> {
        let name = disk.name.clone();
        let number = tell.number;
        let thread = std::thread::Builder::new()
            .name(format!("ctl-{name}"))
            .spawn(move || {
                let _tell = tell;
                disk.serve()
            })
            .map_err(system("start of a control thread"))?;
        self.running.insert(number, (name, thread));
        Ok(())
    }

    /// Waits for signals and for the threads until there are none left.
    fn watch(
        &mut self,
        poller: &Poller,
        signals: &Signals,
        done: &EventFd,
        ended: &Receiver<usize>,
        (stopper, refresher): (&Stopper, &Refresher),
    ) -> Result<(), DaemonError> {
        let mut stopping = false;
        while !self.running.is_empty() {
            let tokens = poller.wait(None).map_err(system("epoll_wait"))?;
            if tokens.contains(&TOKEN_SIGNAL) {
                while let Some(signal) = signals.next().map_err(system("read of the signalfd"))? {
                    match signal {
                        libc::SIGTERM | libc::SIGINT if stopping => {
                            error!(
                                "second signal {signal}: ending at once, with requests in flight"
                            );
                            // SAFETY: _exit takes a plain integer. No destructor may run: the workers
                            // still use what it would take away.
                            unsafe { libc::_exit(libc::EXIT_FAILURE) };
                        }
                        libc::SIGTERM | libc::SIGINT => {
                            info!("signal {signal}: draining; a second signal ends at once");
                            notify::notify(notify::STOPPING);
                            stopping = true;
                            stopper.stop();
                        }
                        libc::SIGHUP => {
                            info!("signal {signal}: looking at the sizes of the disks");
                            refresher.refresh();
                        }
                        _ => info!("signal {signal}: nothing to do"),
                    }
                }
            }
            if tokens.contains(&TOKEN_DONE) {
                let _ = done.read();
                ended.try_iter().for_each(|number| self.reap(number));
            }
        }
        Ok(())
    }

    fn reap_all(&mut self) {
        let numbers: Vec<usize> = self.running.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.reap(number));
    }

    /// Takes leave of a thread that has ended, or is about to.
    fn reap(&mut self, number: usize) {
        let Some((name, thread)) = self.running.remove(&number) else {
            return;
        };
        let why = match thread.join() {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("failed: {error}"),
            Err(_) => "panicked; this is a bug in virtioblkd".to_owned(),
        };
        error!("{name}: the control thread {why}");
        self.first_error
            .get_or_insert(DaemonError::Disk { name, why });
    }
}

/// Tells the number of a thread when it ends, however it ends.
struct TellWhenDone {
    number: usize,
    numbers: Sender<usize>,
    done: EventFd,
}

impl Drop for TellWhenDone {
    fn drop(&mut self) {
        // Nobody listens only if `run` has failed; and the counter cannot be full, for it counts threads.
        let _ = self.numbers.send(self.number);
        let _ = self.done.write(1);
    }
}

#[cfg(test)]
mod tests;
