//! The control thread of one disk: one VMM after another.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use log::{error, info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::poller::{self, Poller};
use super::upgrade::Door;
use crate::mappings;
use crate::vhost_user::{Connection, Device, Listener, Progress, Resized, Source};

/// A disk with its socket open.
pub(super) struct Disk {
    pub name: String,
    pub source: Source,
    pub device: Arc<dyn Device>,
    pub once: bool,
    /// Readable when the disk is to drain and end.
    pub stop: EventFd,
    /// Readable when the disk is to look whether its image has another size.
    pub refresh: EventFd,
    /// Readable when the disk's capacity has changed.
    pub changed: EventFd,
    /// Where upgrades come in.
    pub door: Door,
    /// The connection of a predecessor.
    pub inherited: Option<Connection>,
}

const TOKEN_STOP: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_CONNECTION: u64 = 2;
const TOKEN_REFRESH: u64 = 3;
const TOKEN_CHANGED: u64 = 4;
/// Some VM's memory was lost; the connection says whether it was its own.
const TOKEN_LOSS: u64 = 5;
const TOKEN_UPGRADE: u64 = 6;

/// How long nobody is accepted after that failed: an error such as too many open files does not go away
/// by asking again at once.
const PAUSE: Duration = Duration::from_secs(1);

/// What the control thread looks at.
struct Watch<'a> {
    poller: Poller,
    listener: Option<&'a Listener>,
    paused: bool,
}

impl Disk {
    /// Serves VMMs until it is stopped, the given connection is over, or `once` is fulfilled. The socket
    /// file is gone when this returns.
    pub(super) fn serve(mut self) -> io::Result<()> {
        let inherited = self.inherited.take();
        let (listener, connected) = match &self.source {
            Source::Listening(listener) => (Some(listener), None),
            Source::Connected(sock) => (None, Some(sock.try_clone()?)),
        };
        let mut watch = Watch {
            poller: Poller::new()?,
            listener,
            paused: false,
        };
        watch.poller.add(&self.stop, poller::IN, TOKEN_STOP)?;
        watch.poller.add(&self.refresh, poller::IN, TOKEN_REFRESH)?;
        watch.poller.add(&self.changed, poller::IN, TOKEN_CHANGED)?;
        let loss = mappings::loss_event()?;
        watch.poller.add(loss, poller::EDGE, TOKEN_LOSS)?;
        watch
            .poller
            .add(&self.door.wake, poller::IN, TOKEN_UPGRADE)?;
        if let Some(listener) = listener {
            watch.poller.add(listener, poller::IN, TOKEN_LISTENER)?;
            match listener.path() {
                Some(path) => info!("{}: listening on {}", self.name, path.display()),
                None => info!("{}: listening", self.name),
            }
        }
        let mut connection = match inherited {
            Some(inherited) => {
                watch
                    .poller
                    .add(&inherited, poller::CONNECTION, TOKEN_CONNECTION)?;
                Some(inherited)
            }
            None => connected
                .map(|sock| self.connect(sock, &watch.poller))
                .transpose()?,
        };
        let mut more = false;
        loop {
            let timeout = match (more, watch.paused) {
                (true, _) => Some(Duration::ZERO),
                (false, true) => Some(PAUSE),
                (false, false) => None,
            };
            let ready = watch.poller.wait(timeout)?;
            if ready.contains(&TOKEN_STOP) {
                if let Some(connection) = &mut connection {
                    info!("{}: draining", self.name);
                    connection.drain();
                }
                return Ok(());
            }
            if ready.contains(&TOKEN_UPGRADE) {
                self.door
                    .answer(&self.name, &*self.device, listener, &mut connection);
            }
            watch.resume(ready.is_empty() && !more)?;
            if ready.contains(&TOKEN_REFRESH) {
                let _ = self.refresh.read();
                self.look_at_size();
            }
            if ready.contains(&TOKEN_CHANGED) {
                let _ = self.changed.read();
                if let Some(connection) = &mut connection {
                    connection.tell_change();
                }
            }

            // The one that is here before the one that comes: its end must be seen first, or a VMM that
            // reconnects would be taken for a second one and refused, which QEMU 7.2 does not survive.
            more = false;
            if let Some(current) = &mut connection {
                let ended = match current.process() {
                    Ok(Progress::Idle) => false,
                    Ok(Progress::More) => {
                        more = true;
                        false
                    }
                    Ok(Progress::Closed) => true,
                    Err(error) if current.hung_up() => {
                        info!("{}: the VMM left: {error}", self.name);
                        true
                    }
                    Err(error) => {
                        error!("{}: the connection ends: {error}", self.name);
                        true
                    }
                };
                if ended {
                    let spoke = current.messages() > 0;
                    watch.poller.remove(current)?;
                    connection = None;
                    info!("{}: the VMM is gone; the disk is released", self.name);
                    if listener.is_none() || (self.once && spoke) {
                        return Ok(());
                    }
                }
            }
            if ready.contains(&TOKEN_LISTENER) {
                match &connection {
                    // Its last messages are still to be read; the listener will tell us again.
                    Some(current) if current.hung_up() => more = true,
                    Some(_) => self.refuse(&mut watch)?,
                    None => {
                        if let Some(sock) = watch.accept(&self.name)? {
                            match self.connect(sock, &watch.poller) {
                                Ok(accepted) => connection = Some(accepted),
                                Err(error) => error!("{}: a VMM was lost: {error}", self.name),
                            }
                        }
                    }
                }
            }
        }
    }

    /// Takes the size that somebody else has given the image; the change signals `changed`.
    fn look_at_size(&self) {
        match self.device.refresh() {
            Ok(Resized { old, new }) if old == new => {
                info!("{}: the size of {old} bytes has not changed", self.name);
            }
            Ok(Resized { old, new }) => {
                info!("{}: the size was {old} bytes and is {new} bytes", self.name);
            }
            Err(why) => error!("{}: looking at the size: {why}", self.name),
        }
    }

    fn connect(&self, sock: UnixStream, poller: &Poller) -> io::Result<Connection> {
        let connection = Connection::new(sock, &self.name, Arc::clone(&self.device))?;
        poller.add(&connection, poller::CONNECTION, TOKEN_CONNECTION)?;
        info!("{}: a VMM has connected", self.name);
        Ok(connection)
    }

    /// Turns away a second VMM at once, instead of leaving it to wait for an answer.
    fn refuse(&self, watch: &mut Watch) -> io::Result<()> {
        if let Some(sock) = watch.accept(&self.name)? {
            drop(sock);
            warn!(
                "{}: a second VMM was refused: this disk is being served to another",
                self.name
            );
        }
        Ok(())
    }
}

impl Watch<'_> {
    fn accept(&mut self, name: &str) -> io::Result<Option<UnixStream>> {
        let Some(listener) = self.listener else {
            return Ok(None);
        };
        match listener.accept() {
            Ok(sock) => Ok(sock),
            Err(error) => {
                error!("{name}: cannot accept a VMM, trying again in {PAUSE:?}: {error}");
                self.poller.remove(listener)?;
                self.paused = true;
                Ok(None)
            }
        }
    }

    /// Accepts again after a pause.
    fn resume(&mut self, pause_is_over: bool) -> io::Result<()> {
        if self.paused && pause_is_over {
            if let Some(listener) = self.listener {
                self.poller.add(listener, poller::IN, TOKEN_LISTENER)?;
            }
            self.paused = false;
        }
        Ok(())
    }
}
