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
mod upgrade;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use log::{error, info, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vhost_user::{Connection, Device, Listen, ListenError, Source};
use disk::Disk;
use pid_file::PidFile;
pub use pid_file::PidFileError;
use poller::Poller;
pub use signals::Signals;
use upgrade::{Inheritance, Upgrade, UpgradeDisk, door};
pub use upgrade::{Predecessor, Program, UpgradeError};

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
    /// What SIGUSR2 starts to take this process's place; none: nothing.
    pub program: Option<Program>,
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
    /// The place of another process cannot be taken.
    #[error("taking over: {0}")]
    Upgrade(#[from] UpgradeError),
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
    upgradable: Upgradable,
    // Released last: whoever waits for it finds the sockets gone.
    _pid_file: Option<PidFile>,
}

/// What an upgrade needs.
struct Upgradable {
    program: Option<Program>,
    disks: Arc<Vec<UpgradeDisk>>,
}

const TOKEN_SIGNAL: u64 = 0;
const TOKEN_DONE: u64 = 1;
const TOKEN_UPGRADE: u64 = 2;

impl Daemon {
    /// Takes the pid file and opens the sockets. From here on VMMs may connect: call it when everything
    /// else is ready, and [`run`](Daemon::run) soon after.
    ///
    /// # Errors
    /// Another instance holds the pid file, or a socket cannot be had. Nothing is left behind.
    pub fn new(endpoints: Vec<DiskEndpoint>, options: &Options) -> Result<Self, DaemonError> {
        let pid_file = options.pid_file.as_deref().map(PidFile::take).transpose()?;
        let mut disks = Disks::new(options);
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
            disks.add(name, source, device, None)?;
        }
        Ok(disks.daemon(pid_file))
    }

    /// Takes the place of another process with all that it serves, instead of [`new`](Daemon::new). That process is
    /// out of it when this returns; after an error it goes on.
    ///
    /// # Errors
    /// What it serves is not what `endpoints` are, or it does not let go.
    pub fn take_over(
        predecessor: &Predecessor,
        endpoints: Vec<DiskEndpoint>,
        options: &Options,
    ) -> Result<Self, DaemonError> {
        let inherited = predecessor.take_over(endpoints)?;
        // It serves now: nothing of what follows may end it.
        let pid_file = options.pid_file.as_deref().and_then(|path| {
            PidFile::inherit(path)
                .inspect_err(|error| error!("{error}; the file still names the old process"))
                .ok()
        });
        let mut disks = Disks::new(options);
        for Inheritance {
            name,
            source,
            device,
            connection,
            ..
        } in inherited
        {
            disks.add(name, source, device, connection)?;
        }
        Ok(disks.daemon(pid_file))
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
            upgradable,
            _pid_file,
        } = self;
        let done = event()?;
        let upgrade_failed = event()?;
        let poller = Poller::new().map_err(system("epoll_create"))?;
        poller
            .add(signals, poller::IN, TOKEN_SIGNAL)
            .map_err(system("epoll_ctl"))?;
        poller
            .add(&done, poller::IN, TOKEN_DONE)
            .map_err(system("epoll_ctl"))?;
        poller
            .add(&upgrade_failed, poller::IN, TOKEN_UPGRADE)
            .map_err(system("epoll_ctl"))?;

        let (numbers, ended) = mpsc::channel();
        let mut threads = Threads {
            running: HashMap::with_capacity(disks.len()),
            first_error: None,
            upgradable,
            upgrade: None,
            upgrade_failed,
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
        let watched = threads.watch(&poller, signals, &done, &ended, (&stopper, &refresher));
        threads.end_upgrade();
        if let Err(error) = watched {
            // Nobody could end the disks any more.
            stopper.stop();
            threads.reap_all();
            return Err(error);
        }
        threads.first_error.map_or(Ok(()), Err)
    }
}

/// Disks being put together to a daemon.
struct Disks {
    once: bool,
    program: Option<Program>,
    disks: Vec<Disk>,
    stops: Vec<EventFd>,
    refreshes: Vec<EventFd>,
    doors: Vec<UpgradeDisk>,
}

impl Disks {
    fn new(options: &Options) -> Self {
        Disks {
            once: options.once,
            program: options.program.clone(),
            disks: Vec::new(),
            stops: Vec::new(),
            refreshes: Vec::new(),
            doors: Vec::new(),
        }
    }

    fn add(
        &mut self,
        name: String,
        source: Source,
        device: Arc<dyn Device>,
        inherited: Option<Connection>,
    ) -> Result<(), DaemonError> {
        let stop = event()?;
        self.stops
            .push(stop.try_clone().map_err(system("eventfd"))?);
        let refresh = event()?;
        self.refreshes
            .push(refresh.try_clone().map_err(system("eventfd"))?);
        device
            .on_outside_change(refresh.try_clone().map_err(system("eventfd"))?)
            .map_err(system("eventfd"))?;
        let changed = event()?;
        device.on_change(changed.try_clone().map_err(system("eventfd"))?);
        let (knocker, door) = door().map_err(system("eventfd"))?;
        self.doors.push(UpgradeDisk {
            name: name.clone(),
            device: device.clone(),
            knocker,
        });
        self.disks.push(Disk {
            name,
            source,
            device,
            once: self.once,
            stop,
            refresh,
            changed,
            door,
            inherited,
        });
        Ok(())
    }

    fn daemon(self, pid_file: Option<PidFile>) -> Daemon {
        Daemon {
            disks: self.disks,
            stopper: Stopper {
                stops: Arc::new(self.stops),
            },
            refresher: Refresher {
                events: Arc::new(self.refreshes),
            },
            upgradable: Upgradable {
                program: self.program,
                disks: Arc::new(self.doors),
            },
            _pid_file: pid_file,
        }
    }
}

/// The control threads of the disks.
struct Threads {
    running: HashMap<usize, (String, JoinHandle<io::Result<()>>)>,
    first_error: Option<DaemonError>,
    upgradable: Upgradable,
    /// The one that is under way.
    upgrade: Option<Upgrade>,
    upgrade_failed: EventFd,
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
            if tokens.contains(&TOKEN_UPGRADE) {
                let _ = self.upgrade_failed.read();
                self.end_upgrade();
            }
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
                            if let Some(upgrade) = &self.upgrade {
                                upgrade.abort();
                            }
                            stopper.stop();
                        }
                        libc::SIGHUP => {
                            info!("signal {signal}: looking at the sizes of the disks");
                            refresher.refresh();
                        }
                        libc::SIGUSR2 if stopping => {
                            info!("signal {signal}: no upgrade, since this process is ending");
                        }
                        libc::SIGUSR2 => self.begin_upgrade(),
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

    fn begin_upgrade(&mut self) {
        if self.upgrade.is_some() {
            info!("an upgrade was asked for, and one is under way already");
            return;
        }
        let Upgradable { program, disks } = &self.upgradable;
        let Some(program) = program else {
            warn!("an upgrade was asked for, and it is not known how this process was started");
            return;
        };
        let begun = self.upgrade_failed.try_clone();
        match begun.and_then(|failed| Upgrade::begin(program, disks, failed)) {
            Ok(upgrade) => self.upgrade = Some(upgrade),
            Err(error) => error!("the upgrade cannot begin: {error}"),
        }
    }

    /// Sees to it that none is under way.
    fn end_upgrade(&mut self) {
        if let Some(upgrade) = self.upgrade.take() {
            upgrade.abort();
            upgrade.join();
        }
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
