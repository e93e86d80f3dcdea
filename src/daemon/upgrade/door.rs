//! What the control thread of a disk does for an upgrade: it lends itself until it is known how it ends.

use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use log::{debug, info};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::messages::{DiskState, ListenerState};
use super::monotonic_ns;
use crate::vhost_user::handover::Outgoing;
use crate::vhost_user::{Connection, Device, Listener, Paused};

/// What the upgrade asks of a control thread after it has prepared itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// Write what has gathered since it was prepared, so that little is left for the pause.
    WriteAhead,
    Pause,
}

/// What a control thread has done.
pub(super) enum Answer {
    /// It reads no more messages. Its rings still run.
    Prepared(Result<(Box<DiskState>, Outgoing), String>),
    /// Its rings still run.
    WrittenAhead,
    /// Its rings have stopped; when that began.
    Paused(Paused<String>, u64),
}

/// An invitation to take part. Once the steps come to an end without the end of the process, everything goes on
/// as before.
pub(super) struct Invitation {
    pub number: usize,
    pub steps: Receiver<Step>,
    pub answers: Sender<(usize, Answer)>,
}

/// The upgrade's side of a door.
pub(in crate::daemon) struct Knocker {
    invitations: Sender<Invitation>,
    wake: EventFd,
}

/// The control thread's side of a door.
pub(in crate::daemon) struct Door {
    invitations: Receiver<Invitation>,
    /// Readable when somebody has knocked.
    pub wake: EventFd,
}

/// A door to a control thread.
pub(in crate::daemon) fn door() -> io::Result<(Knocker, Door)> {
    let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (sender, invitations) = channel();
    let knocker = Knocker {
        invitations: sender,
        wake: wake.try_clone()?,
    };
    Ok((knocker, Door { invitations, wake }))
}

impl Knocker {
    /// False if the control thread has ended.
    pub(super) fn invite(&self, invitation: Invitation) -> bool {
        self.invitations.send(invitation).is_ok() && self.wake.write(1).is_ok()
    }
}

impl Door {
    /// Takes part in the upgrades that were asked for, each until it has failed: one that succeeds ends the
    /// process. To be called between messages.
    pub(in crate::daemon) fn answer(
        &self,
        name: &str,
        device: &dyn Device,
        listener: Option<&Listener>,
        connection: &mut Option<Connection>,
    ) {
        let _ = self.wake.read();
        while let Ok(invitation) = self.invitations.try_recv() {
            take_part(&invitation, name, device, listener, connection);
        }
    }
}

fn take_part(
    invitation: &Invitation,
    name: &str,
    device: &dyn Device,
    listener: Option<&Listener>,
    connection: &mut Option<Connection>,
) {
    let Invitation {
        number,
        steps,
        answers,
    } = invitation;
    // This thread may have been busy for so long that it is over.
    if matches!(steps.try_recv(), Err(TryRecvError::Disconnected)) {
        return;
    }
    let prepared = prepare(name, device, listener, connection.as_ref());
    let prepared = prepared.map(|(state, fds)| (Box::new(state), fds));
    if answers.send((*number, Answer::Prepared(prepared))).is_err() {
        return;
    }
    loop {
        match steps.recv() {
            Ok(Step::WriteAhead) => {
                // What cannot be written fails the pause.
                if let Err(why) = device.write_ahead() {
                    debug!("{name}: {why}");
                }
                if answers.send((*number, Answer::WrittenAhead)).is_err() {
                    return;
                }
            }
            Ok(Step::Pause) => break,
            Err(_) => return,
        }
    }
    let since = monotonic_ns();
    let paused = match connection {
        Some(connection) => connection.pause(),
        // An image that could not be flushed when its VMM left is still in use.
        None => device.pause(&mut |_| ()),
    };
    let bases = paused.bases.clone();
    // Nobody listens if it has failed meanwhile.
    let _ = answers.send((*number, Answer::Paused(paused, since)));
    while steps.recv().is_ok() {}
    if let Some(connection) = connection {
        connection.resume(&bases);
    } else {
        device.resumed();
    }
    info!("{name}: goes on here");
}

fn prepare(
    name: &str,
    device: &dyn Device,
    listener: Option<&Listener>,
    connection: Option<&Connection>,
) -> Result<(DiskState, Outgoing), String> {
    let mut fds = Outgoing::default();
    let listener = listener.map(|listener| {
        let sock = fds.add(listener).map_err(|error| error.to_string())?;
        Ok::<_, String>(ListenerState::new(sock, listener.path()))
    });
    let listener = listener.transpose()?;
    device.write_ahead()?;
    let connection = connection.map(|connection| connection.export(&mut fds));
    let state = DiskState {
        name: name.to_owned(),
        listener,
        connection: connection.transpose()?,
    };
    Ok((state, fds))
}
