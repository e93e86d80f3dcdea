//! What other threads know of a connection: its socket to shut down, a letter box and a bell.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::status::Status;
use crate::sync::Locked;
use crate::wire::FatalErrorStatus;

/// What another thread asks of a connection.
#[derive(Debug)]
pub(crate) enum Mail {
    /// Complete a command that was held.
    Complete { cid: u16, status: Status },
    /// Look at the controller's events.
    Events,
    /// Leave the socket alone for a time.
    Stall(Duration),
    /// Send C2HTermReq.
    Terminate(FatalErrorStatus),
}

/// A connection as seen by other threads.
pub(crate) struct Link {
    pub id: u64,
    pub port: u16,
    socket: TcpStream,
    bell: File,
    rung: AtomicBool,
    mail: Mutex<Vec<Mail>>,
    /// Commands that are never answered on their own, and that an Abort may end.
    held: Mutex<Vec<u16>>,
}

impl Link {
    pub fn new(id: u64, port: u16, socket: TcpStream) -> io::Result<Self> {
        // SAFETY: creates a descriptor that is owned below.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is fresh and owned by nobody else.
        let bell = unsafe { File::from_raw_fd(fd) };
        let (mail, held) = (Mutex::default(), Mutex::default());
        Ok(Self {
            id,
            port,
            socket,
            bell,
            rung: AtomicBool::new(false),
            mail,
            held,
        })
    }

    pub fn bell_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    pub fn send(&self, mail: Mail) {
        self.mail.locked().push(mail);
        self.ring();
    }

    /// A command is not answered on its own.
    pub fn hold(&self, cid: u16, abortable: bool) {
        if abortable {
            self.held.locked().push(cid);
        }
    }

    /// Ends a command that is held; false if there is none that could be ended.
    pub fn abort(&self, cid: u16) -> bool {
        let mut held = self.held.locked();
        let Some(at) = held.iter().position(|&held| held == cid) else {
            return false;
        };
        held.swap_remove(at);
        drop(held);
        self.send(Mail::Complete {
            cid,
            status: Status::ABORT_REQUESTED,
        });
        true
    }

    /// Wakes the connection's thread.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // The counter cannot overflow: it is rung once until it was heard.
            let _ = (&self.bell).write(&1u64.to_ne_bytes());
        }
    }

    /// What was sent since the last call; none at all costs one load.
    pub fn collect(&self) -> Option<Vec<Mail>> {
        if !self.rung.load(Ordering::Relaxed) {
            return None;
        }
        let _ = (&self.bell).read(&mut [0; 8]);
        self.rung.store(false, Ordering::Release);
        Some(std::mem::take(&mut *self.mail.locked()))
    }

    /// Whether either side has ended the connection, whatever is still to be read from it.
    pub fn has_ended(&self) -> bool {
        let mut fd = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: libc::POLLRDHUP,
            revents: 0,
        };
        // SAFETY: one initialized entry; nothing is waited for.
        unsafe { libc::poll(&raw mut fd, 1, 0) };
        fd.revents != 0
    }

    /// Ends the connection: its thread sees the end of the stream.
    pub fn shut_down(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        self.ring();
    }
}
