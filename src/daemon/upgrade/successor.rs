//! The side of the new process.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::channel::{Channel, ChannelError};
use super::messages::{DiskHello, DiskState, FromNew, FromOld, Hello, Stopped};
use super::program::FD_VARIABLE;
use super::{UpgradeError, monotonic_ns, system, unfit};
use crate::block::HandedFiles;
use crate::daemon::DiskEndpoint;
use crate::kill_point::kill_point;
use crate::vhost_user::handover::Incoming;
use crate::vhost_user::{Connection, Device, Listen, Listener, Source};

/// How long a refusal may take to be sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// The process whose place this one is to take.
pub struct Predecessor {
    channel: Channel,
    hello: Hello,
    images: HashMap<String, Arc<HandedFiles>>,
}

/// What is taken over of a disk.
pub(in crate::daemon) struct Inheritance {
    pub name: String,
    pub source: Source,
    pub device: Arc<dyn Device>,
    pub connection: Option<Connection>,
    /// The socket file, which is this process's from the end on.
    path: Option<PathBuf>,
}

impl Predecessor {
    /// The process that has started this one to take its place, if one has. It is listened to at once.
    ///
    /// # Errors
    /// It is gone, or is not understood; it is told so.
    pub fn of_this_process() -> Result<Option<Self>, UpgradeError> {
        let Some(number) = std::env::var_os(FD_VARIABLE) else {
            return Ok(None);
        };
        let number = number.to_str().and_then(|number| number.parse().ok());
        let fd = number.filter(|fd: &RawFd| *fd > 2).ok_or_else(|| {
            unfit(format!(
                "{FD_VARIABLE} is set, and is no descriptor of a predecessor; unset it"
            ))
        })?;
        // SAFETY: whoever set the variable passed the descriptor for this purpose, and nothing else uses it.
        let fd = unsafe {
            if libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) < 0 {
                let what = format!("the descriptor in {FD_VARIABLE}");
                return Err(system(what)(io::Error::last_os_error()));
            }
            OwnedFd::from_raw_fd(fd)
        };
        let mut channel = Channel::new(UnixStream::from(fd), None).map_err(system("fcntl"))?;
        channel.pretend();
        Self::listen(channel).map(Some)
    }

    fn listen(channel: Channel) -> Result<Self, UpgradeError> {
        let received = match channel.receive(None) {
            Ok((FromOld::Hello(hello), fds)) => images(&hello, fds).map(|images| (hello, images)),
            Ok((message, _)) => Err(unexpected(&message)),
            Err(error) => Err(error.into()),
        };
        match received {
            Ok((hello, images)) => Ok(Predecessor {
                channel,
                hello,
                images,
            }),
            Err(error) => {
                tell(&channel, &error.to_string());
                Err(error)
            }
        }
    }

    /// The open image files of a disk. They are the predecessor's until it is over.
    pub fn images_of(&self, disk: &str) -> Arc<HandedFiles> {
        self.images.get(disk).cloned().unwrap_or_default()
    }

    /// Tells the predecessor that it has to go on, and why.
    pub fn refuse(&self, why: &str) {
        tell(&self.channel, why);
    }

    /// Takes everything over; when this returns the predecessor is out of it. `endpoints` is what this process
    /// would serve by itself; the answer is in the same order.
    pub(in crate::daemon) fn take_over(
        &self,
        endpoints: Vec<DiskEndpoint>,
    ) -> Result<Vec<Inheritance>, UpgradeError> {
        self.compare(&endpoints)?;
        kill_point!("upgrade-ready");
        self.say(&FromNew::Ready)?;

        let mut states: HashMap<String, (Box<DiskState>, Incoming)> = HashMap::new();
        for _ in &self.hello.disks {
            match self.channel.receive(None)? {
                (FromOld::Disk(state), fds) => states.insert(state.name.clone(), (state, fds)),
                (message, _) => return Err(unexpected(&message)),
            };
        }
        let mut all = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let state = states.remove(&endpoint.name);
            let (state, fds) = state
                .ok_or_else(|| unfit(format!("disk {} was not handed over", endpoint.name)))?;
            all.push(inherit(endpoint, &state, fds)?);
        }
        kill_point!("upgrade-mapped");
        self.say(&FromNew::Mapped)?;

        let stopped = match self.channel.receive(None)? {
            (FromOld::Stopped(stopped), _) => stopped,
            (message, _) => return Err(unexpected(&message)),
        };
        let stopped_ns = monotonic_ns();
        kill_point!("upgrade-stopped");
        self.start_rings(&mut all, &stopped)?;
        kill_point!("upgrade-started");
        match self.channel.send(&FromNew::Taken, &[], None) {
            // As below, where it is found out.
            Ok(()) | Err(ChannelError::Closed) => {}
            Err(error) => return Err(error.into()),
        }
        match self.channel.receive(None) {
            Ok((FromOld::Go, _)) => {}
            Ok((message, _)) => return Err(unexpected(&message)),
            // It ends this process before it goes on itself: it was killed, after it had let go of all.
            Err(ChannelError::Closed) => warn!("the old process ended before it said good-bye"),
            Err(error) => return Err(error.into()),
        }
        for inheritance in &mut all {
            if let Some(connection) = &mut inheritance.connection {
                if let Err(why) = connection.go_on() {
                    warn!("{}: {why}", inheritance.name);
                }
            }
        }
        let pause = monotonic_ns().saturating_sub(stopped.since_ns);
        for images in self.images.values() {
            images.settle();
        }
        for inheritance in &mut all {
            if let (Source::Listening(listener), Some(path)) =
                (&mut inheritance.source, inheritance.path.take())
            {
                listener.own_file(path);
            }
        }
        let rings: usize = stopped.bases.iter().map(Vec::len).sum();
        info!(
            "upgraded: the disks paused for {:.3} ms, {:.3} of them to stop (disks: {}, rings: {rings})",
            pause as f64 / 1e6,
            stopped_ns.saturating_sub(stopped.since_ns) as f64 / 1e6,
            all.len()
        );
        Ok(all)
    }

    fn say(&self, message: &FromNew) -> Result<(), UpgradeError> {
        Ok(self.channel.send(message, &[], None)?)
    }

    /// Whether guests of the predecessor's disks can go on with these.
    fn compare(&self, endpoints: &[DiskEndpoint]) -> Result<(), UpgradeError> {
        for old in &self.hello.disks {
            let new = endpoints.iter().find(|endpoint| endpoint.name == old.name);
            let new = new.ok_or_else(|| {
                unfit(format!(
                    "disk {} is being served, and the configuration does not have it any more",
                    old.name
                ))
            })?;
            let new = DiskHello::new(&new.name, &*new.device, 0).map_err(unfit)?;
            old.check_successor(&new).map_err(unfit)?;
        }
        if endpoints.len() != self.hello.disks.len() {
            return Err(unfit(
                "the configuration has disks that are not being served; an upgrade takes what there is",
            ));
        }
        Ok(())
    }

    /// Takes the images and starts the rings, of all disks at the same time.
    fn start_rings(&self, all: &mut [Inheritance], stopped: &Stopped) -> Result<(), UpgradeError> {
        if stopped.bases.len() != self.hello.disks.len() {
            return Err(UpgradeError::Channel("a pause of other disks".to_owned()));
        }
        let names = self.hello.disks.iter().map(|disk| disk.name.as_str());
        let bases: HashMap<&str, &Vec<(u16, u32)>> = names.zip(&stopped.bases).collect();
        let mut work = Vec::new();
        for inheritance in all {
            let Inheritance {
                name, connection, ..
            } = inheritance;
            if let (Some(bases), Some(connection)) = (bases.get(name.as_str()), connection) {
                work.push((&*name, connection, *bases));
            }
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = work
                .into_iter()
                .map(|(name, connection, bases)| {
                    scope.spawn(move || {
                        let started = connection.start_paused(bases);
                        started.map_err(|why| unfit(format!("disk {name}: {why}")))
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| {
                let panicked = |_| Err(unfit("a thread panicked; this is a bug in virtioblkd"));
                thread.join().unwrap_or_else(panicked)
            })
        })
    }
}

fn unexpected(message: &FromOld) -> UpgradeError {
    let kind = match message {
        FromOld::Hello(_) => "Hello",
        FromOld::Disk(_) => "Disk",
        FromOld::Stopped(_) => "Stopped",
        FromOld::Go => "Go",
    };
    UpgradeError::Channel(format!("the old process said {kind} out of turn"))
}

fn tell(channel: &Channel, why: &str) {
    // It sees the end of this process all the same.
    let _ = channel.refuse(why, Instant::now().checked_add(PATIENCE));
}

fn images(
    hello: &Hello,
    mut fds: Incoming,
) -> Result<HashMap<String, Arc<HandedFiles>>, UpgradeError> {
    let mut next = 0;
    let mut images = HashMap::new();
    for disk in &hello.disks {
        let mut files = Vec::new();
        for _ in 0..disk.files {
            let file = fds
                .take(next)
                .map_err(|error| UpgradeError::Channel(error.to_string()))?;
            files.push(File::from(file));
            next += 1;
        }
        images.insert(disk.name.clone(), HandedFiles::new(files));
    }
    Ok(images)
}

/// The socket and the VMM of a disk.
fn inherit(
    endpoint: DiskEndpoint,
    state: &DiskState,
    mut fds: Incoming,
) -> Result<Inheritance, UpgradeError> {
    let DiskEndpoint {
        name,
        listen,
        device,
    } = endpoint;
    let wrong = |why: &dyn std::fmt::Display| unfit(format!("disk {name}: {why}"));
    let (source, path) = match listen {
        Listen::Path { path, .. } => {
            let handed = state.listener.as_ref();
            let handed = handed.filter(|state| state.path().as_ref() == Some(&path));
            let handed = handed.ok_or_else(|| {
                wrong(&format_args!(
                    "it would be served at {}, and its VMM knows it somewhere else",
                    path.display()
                ))
            })?;
            let sock = fds.take(handed.sock).map_err(|error| wrong(&error))?;
            let listener = Listener::inherited(UnixListener::from(sock));
            (Source::Listening(listener), Some(path))
        }
        // It was inherited with its number.
        Listen::Fd(_) => (listen.open().map_err(|error| wrong(&error))?, None),
    };
    let connection = state.connection.as_ref().map(|state| {
        Connection::import(&name, device.clone(), state, &mut fds).map_err(|why| wrong(&why))
    });
    let connection = connection.transpose()?;
    Ok(Inheritance {
        name,
        source,
        device,
        connection,
        path,
    })
}

#[cfg(test)]
mod tests;
