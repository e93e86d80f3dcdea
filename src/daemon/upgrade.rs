//! Hot upgrade: another process takes this one's place while the VMs run (`docs/architecture.md`, "Hot
//! upgrade").
//!
//! [`Upgrade`] is the side of the process that serves, [`Predecessor`] that of its successor, which finds the
//! socket between the two in its environment. Until the last message, `Go`, the old process has everything that
//! it needs to go on as if nothing had happened, and nothing that the new one does can be seen by a guest.

mod channel;
mod door;
mod messages;
mod program;
mod successor;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel as queue};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{error, info};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::notify;
use crate::kill_point::kill_point;
use crate::vhost_user::Device;
use crate::vhost_user::handover::Outgoing;
use channel::{Channel, ChannelError};
use door::{Answer, Invitation, Step};
pub(super) use door::{Door, Knocker, door};
use messages::{DiskHello, DiskState, FromNew, FromOld, Hello, Stopped};
use program::Child;
pub use program::Program;
pub(super) use successor::Inheritance;
pub use successor::Predecessor;

/// How long the new process may take to start, and for each step before the pause.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Another time limit, in milliseconds.
const TIME_LIMIT_VARIABLE: &str = "VIRTIOBLKD_UPGRADE_TIMEOUT_MS";
/// How long a guest is let wait, at most, before the old process goes on.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How often a wait for the control threads looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Why another process does not take over.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// A system call failed.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: String,
        /// What the system said.
        source: io::Error,
    },
    /// The two processes do not understand each other.
    #[error("{0}")]
    Channel(String),
    /// The new process describes something else, or a disk cannot be handed over.
    #[error("{0}")]
    Unfit(String),
}

impl From<ChannelError> for UpgradeError {
    fn from(error: ChannelError) -> Self {
        UpgradeError::Channel(error.to_string())
    }
}

fn system(operation: impl Into<String>) -> impl FnOnce(io::Error) -> UpgradeError {
    let operation = operation.into();
    move |source| UpgradeError::System { operation, source }
}

fn unfit(why: impl Into<String>) -> UpgradeError {
    UpgradeError::Unfit(why.into())
}

/// CLOCK_MONOTONIC, which is the same in all processes of the machine.
fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is writable; the clock exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A disk as the upgrade knows it.
pub(super) struct UpgradeDisk {
    pub name: String,
    pub device: Arc<dyn Device>,
    pub knocker: Knocker,
}

/// An upgrade under way.
pub(super) struct Upgrade {
    thread: JoinHandle<UpgradeError>,
    abort: EventFd,
}

impl Upgrade {
    /// Begins one. If it succeeds the process ends, with success; `done` is signalled if it fails.
    pub(super) fn begin(
        program: &Program,
        disks: &Arc<Vec<UpgradeDisk>>,
        done: EventFd,
    ) -> io::Result<Self> {
        let abort = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let attempt = Attempt {
            program: program.clone(),
            disks: disks.clone(),
            abort: abort.try_clone()?,
            limit: time_limit(),
        };
        let thread = std::thread::Builder::new()
            .name("upgrade".to_owned())
            .spawn(move || {
                let _tell = Tell(done);
                let Err(why) = attempt.run();
                why
            })?;
        Ok(Upgrade { thread, abort })
    }

    /// Has it fail as soon as it can.
    pub(super) fn abort(&self) {
        let _ = self.abort.write(1);
    }

    /// Waits until it has failed, and the disks go on here.
    pub(super) fn join(self) {
        let Upgrade { thread, abort } = self;
        let ended = thread.join();
        drop(abort);
        // Only now is there nothing left of it, and room for the next.
        match ended {
            Ok(why) => error!("the upgrade failed, and this process goes on: {why}"),
            Err(_) => error!("the upgrade panicked; this is a bug in virtioblkd"),
        }
    }
}

/// Signals the end of the thread, however it ends.
struct Tell(EventFd);

impl Drop for Tell {
    fn drop(&mut self) {
        // The counter cannot be full.
        let _ = self.0.write(1);
    }
}

fn time_limit() -> Duration {
    let chosen = std::env::var(TIME_LIMIT_VARIABLE).ok();
    let millis = chosen.and_then(|millis| millis.parse().ok());
    millis.map_or(TIME_LIMIT, Duration::from_millis)
}

struct Attempt {
    program: Program,
    disks: Arc<Vec<UpgradeDisk>>,
    abort: EventFd,
    limit: Duration,
}

/// The control threads, while they take part.
struct Guests {
    steps: Vec<Sender<Step>>,
    answers: Receiver<(usize, Answer)>,
}

impl Guests {
    fn step(&self, step: Step) {
        for steps in &self.steps {
            // A thread that has ended does not answer, which is seen then.
            let _ = steps.send(step);
        }
    }
}

impl Attempt {
    /// Returns only if it fails; then the new process is gone, and the disks go on here.
    fn run(&self) -> Result<Infallible, UpgradeError> {
        let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
        let abort = self.abort.try_clone().map_err(system("eventfd"))?;
        let channel = Channel::new(ours, Some(abort)).map_err(system("fcntl"))?;
        let mut extra: Vec<(RawFd, File)> = Vec::new();
        for disk in self.disks.iter() {
            let what = format!("handing over the keys of disk {}", disk.name);
            extra.extend(disk.device.descriptors().map_err(system(what))?);
        }
        let path = self.program.path().display();
        info!("upgrade: starting {path}");
        // Dropped after the child, whatever happens.
        let mut guests = None;
        let started = self.program.start(&theirs, &extra);
        let mut child = started.map_err(system(format!("starting {path}")))?;
        // Or its end could not be seen.
        drop((theirs, extra));
        let result = self.attempt(&channel, &child, &mut guests);
        // Not before it is gone may the disks go on: it might have an image open, or start a ring.
        child.end();
        drop(guests);
        result
    }

    fn attempt(
        &self,
        channel: &Channel,
        child: &Child,
        guests: &mut Option<Guests>,
    ) -> Result<Infallible, UpgradeError> {
        self.hello(channel)?;
        expect(channel, &FromNew::Ready, self.limit)?;

        let guests = guests.insert(self.invite()?);
        for (state, fds) in self.prepared(guests)? {
            let message = FromOld::Disk(state);
            channel.send(&message, &fds.raw(), self.deadline(self.limit))?;
        }
        expect(channel, &FromNew::Mapped, self.limit)?;

        guests.step(Step::WriteAhead);
        self.written_ahead(guests)?;

        kill_point!("upgrade-before-pause");
        guests.step(Step::Pause);
        let stopped = self.paused(guests)?;
        let stopped = FromOld::Stopped(stopped);
        channel.send(&stopped, &[], self.deadline(PAUSE_LIMIT))?;
        kill_point!("upgrade-stopped-sent");
        expect(channel, &FromNew::Taken, PAUSE_LIMIT)?;

        if self.is_aborted() {
            return Err(ChannelError::Aborted.into());
        }
        // Now, since systemd believes it of the main process only, and before that one ends.
        notify::main_pid(child.pid());
        if let Err(error) = channel.send(&FromOld::Go, &[], self.deadline(PAUSE_LIMIT)) {
            notify::main_pid(std::process::id() as libc::pid_t);
            return Err(error.into());
        }
        if self.is_aborted() {
            // Whoever asked this process to end meant the one that serves.
            child.signal(libc::SIGTERM);
        }
        info!(
            "upgrade: process {} goes on in this one's place",
            child.pid()
        );
        // SAFETY: _exit takes a plain integer. No destructor may run: the locks, the socket files and the pid
        // file that they would take away are the new process's.
        unsafe { libc::_exit(libc::EXIT_SUCCESS) };
    }

    fn deadline(&self, limit: Duration) -> Option<Instant> {
        Instant::now().checked_add(limit)
    }

    fn is_aborted(&self) -> bool {
        // Reading resets it; it is not waited for any more where this is asked.
        self.abort.read().is_ok()
    }

    fn hello(&self, channel: &Channel) -> Result<(), UpgradeError> {
        let mut files = Vec::new();
        let mut disks = Vec::with_capacity(self.disks.len());
        for UpgradeDisk { name, device, .. } in self.disks.iter() {
            let what = format!("handing over the image of disk {name}");
            let images = device.image_files().map_err(system(what))?;
            disks.push(DiskHello::new(name, &**device, images.len()).map_err(unfit)?);
            files.extend(images);
        }
        let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let hello = FromOld::Hello(Hello { disks });
        channel.send(&hello, &raw, self.deadline(self.limit))?;
        Ok(())
    }

    fn invite(&self) -> Result<Guests, UpgradeError> {
        let (sender, answers) = queue();
        let mut steps = Vec::with_capacity(self.disks.len());
        for (number, disk) in self.disks.iter().enumerate() {
            let (step, received) = queue();
            steps.push(step);
            let invitation = Invitation {
                number,
                steps: received,
                answers: sender.clone(),
            };
            if !disk.knocker.invite(invitation) {
                return Err(unfit(format!("disk {} is not served any more", disk.name)));
            }
        }
        Ok(Guests { steps, answers })
    }

    /// What all control threads answer, in the order of the disks.
    fn gather<T>(
        &self,
        guests: &Guests,
        limit: Duration,
        what: &str,
        mut accept: impl FnMut(&str, Answer) -> Result<T, UpgradeError>,
    ) -> Result<Vec<T>, UpgradeError> {
        let end = Instant::now() + limit;
        let mut all: Vec<Option<T>> = self.disks.iter().map(|_| None).collect();
        while let Some(missing) = all.iter().position(Option::is_none) {
            match guests.answers.recv_timeout(LOOK_EVERY) {
                Ok((number, answer)) => {
                    all[number] = Some(accept(&self.disks[number].name, answer)?);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(unfit("a disk is not served any more"));
                }
                Err(RecvTimeoutError::Timeout) if self.is_aborted() => {
                    return Err(ChannelError::Aborted.into());
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= end => {
                    let name = &self.disks[missing].name;
                    return Err(unfit(format!("disk {name} {what} within {limit:?}")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Ok(all.into_iter().flatten().collect())
    }

    fn prepared(&self, guests: &Guests) -> Result<Vec<(Box<DiskState>, Outgoing)>, UpgradeError> {
        let what = "could not be written ahead, or its last message handled,";
        self.gather(guests, self.limit, what, |name, answer| match answer {
            Answer::Prepared(prepared) => {
                prepared.map_err(|why| unfit(format!("disk {name}: {why}")))
            }
            _ => Err(unfit(format!("disk {name} answered out of turn"))),
        })
    }

    /// A second time: the new process has taken a while, and the guest has gone on writing.
    fn written_ahead(&self, guests: &Guests) -> Result<(), UpgradeError> {
        let what = "could not be written ahead";
        self.gather(guests, self.limit, what, |name, answer| match answer {
            Answer::WrittenAhead => Ok(()),
            _ => Err(unfit(format!("disk {name} answered out of turn"))),
        })?;
        Ok(())
    }

    fn paused(&self, guests: &Guests) -> Result<Stopped, UpgradeError> {
        let paused = self.gather(
            guests,
            PAUSE_LIMIT,
            "did not drain",
            |name, answer| match answer {
                Answer::Paused(paused, since) => match paused.image {
                    Ok(()) => Ok((since, paused.bases)),
                    Err(why) => Err(unfit(format!("disk {name}: {why}"))),
                },
                _ => Err(unfit(format!("disk {name} answered out of turn"))),
            },
        )?;
        let since_ns = paused.iter().map(|(since, _)| *since).min();
        Ok(Stopped {
            since_ns: since_ns.unwrap_or_else(monotonic_ns),
            bases: paused.into_iter().map(|(_, bases)| bases).collect(),
        })
    }
}

fn expect(channel: &Channel, wanted: &FromNew, limit: Duration) -> Result<(), UpgradeError> {
    let (message, _): (FromNew, _) = channel.receive(Instant::now().checked_add(limit))?;
    if message != *wanted {
        let what = format!("the new process said {message:?} instead of {wanted:?}");
        return Err(UpgradeError::Channel(what));
    }
    Ok(())
}
