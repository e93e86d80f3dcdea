//! Messages between a process and the one that is to take its place.
//!
//! A message is a header, then the descriptors in pieces of one byte each, then a payload of JSON. This much,
//! and the payload of a refusal, is the same in every version, so that any two can at least say no.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::vhost_user::handover::Incoming;

/// What the messages mean. To be counted up with every change to one of them.
const VERSION: u32 = 1;
const MAGIC: [u8; 4] = *b"VBup";
/// Magic, version, bytes of payload, descriptors.
const HEADER: usize = 16;
/// Far more than any message has: a region of memory takes some 120 bytes, a ring some 200.
const MAX_PAYLOAD: usize = 16 << 20;
const MAX_FDS: usize = 1 << 15;
/// Descriptors of a piece; the kernel passes 253 at most.
const PIECE: usize = 128;

/// Why there is no message, or none went out.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("{operation}: {source}")]
    System {
        operation: &'static str,
        source: io::Error,
    },
    #[error("the other process has ended")]
    Closed,
    #[error("the other process did not answer in time")]
    TimedOut,
    #[error("this process is to end")]
    Aborted,
    #[error("the other process sent what is no message: {0}")]
    Garbage(String),
    #[error(
        "the other process speaks version {theirs} of the upgrade's messages, this one version {ours}"
    )]
    Version { theirs: u32, ours: u32 },
    /// In the other process's words.
    #[error("{0}")]
    Refused(String),
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> ChannelError {
    move |source| ChannelError::System { operation, source }
}

#[derive(Serialize, Deserialize)]
enum Envelope<T> {
    Refused(String),
    Message(T),
}

/// One end of the socket between the two.
pub(super) struct Channel {
    sock: UnixStream,
    /// Readable when waiting has no purpose any more.
    abort: Option<EventFd>,
    version: u32,
}

impl Channel {
    pub(super) fn new(sock: UnixStream, abort: Option<EventFd>) -> io::Result<Self> {
        sock.set_nonblocking(true)?;
        Ok(Channel {
            sock,
            abort,
            version: VERSION,
        })
    }

    /// Speaks as another version would, if the environment says so; for tests.
    pub(super) fn pretend(&mut self) {
        if cfg!(debug_assertions) {
            let version = std::env::var("VIRTIOBLKD_UPGRADE_VERSION").ok();
            if let Some(version) = version.and_then(|version| version.parse().ok()) {
                self.version = version;
            }
        }
    }

    /// Sends a message, before `deadline` if there is one.
    pub(super) fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[RawFd],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        self.send_envelope(&Envelope::Message(message), fds, deadline)
    }

    /// Tells the other process why it is not to count on this one.
    pub(super) fn refuse(&self, why: &str, deadline: Option<Instant>) -> Result<(), ChannelError> {
        self.send_envelope(&Envelope::<()>::Refused(why.to_owned()), &[], deadline)
    }

    fn send_envelope<T: Serialize>(
        &self,
        envelope: &Envelope<T>,
        fds: &[RawFd],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        let payload = serde_json::to_vec(envelope)
            .map_err(|error| ChannelError::Garbage(error.to_string()))?;
        if payload.len() > MAX_PAYLOAD || fds.len() > MAX_FDS {
            let (bytes, fds) = (payload.len(), fds.len());
            let what = format!("{bytes} bytes and {fds} descriptors are too many to be sent");
            return Err(ChannelError::Garbage(what));
        }
        let mut header = MAGIC.to_vec();
        for word in [self.version, payload.len() as u32, fds.len() as u32] {
            header.extend(word.to_le_bytes());
        }
        self.write(&header, deadline)?;
        for piece in fds.chunks(PIECE) {
            self.retry(libc::POLLOUT, "sendmsg", deadline, || {
                let sent = self.sock.send_with_fds(&[&[0u8][..]], piece);
                sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))
            })?;
        }
        self.write(&payload, deadline)
    }

    /// The next message with what came with it, before `deadline` if there is one.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
        deadline: Option<Instant>,
    ) -> Result<(T, Incoming), ChannelError> {
        let mut header = [0; HEADER];
        self.read(&mut header, deadline)?;
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if header[..4] != MAGIC {
            return Err(ChannelError::Garbage("a wrong header".to_owned()));
        }
        let (version, len, count) = (word(4), word(8) as usize, word(12) as usize);
        if len > MAX_PAYLOAD || count > MAX_FDS {
            let what = format!("{len} bytes and {count} descriptors are too many");
            return Err(ChannelError::Garbage(what));
        }
        let mut fds = Vec::with_capacity(count);
        while fds.len() < count {
            let piece = self.retry(libc::POLLIN, "recvmsg", deadline, || {
                receive_fds(&self.sock)
            })?;
            if piece.len() != PIECE.min(count - fds.len()) {
                let what = format!("{} descriptors of {count}", fds.len() + piece.len());
                return Err(ChannelError::Garbage(what));
            }
            fds.extend(piece);
        }
        let mut payload = vec![0; len];
        self.read(&mut payload, deadline)?;
        if version != self.version {
            return Err(match serde_json::from_slice(&payload) {
                Ok(Envelope::<IgnoredAny>::Refused(why)) => ChannelError::Refused(why),
                _ => ChannelError::Version {
                    theirs: version,
                    ours: self.version,
                },
            });
        }
        match serde_json::from_slice(&payload) {
            Ok(Envelope::Message(message)) => Ok((message, Incoming::new(fds))),
            Ok(Envelope::Refused(why)) => Err(ChannelError::Refused(why)),
            Err(error) => Err(ChannelError::Garbage(error.to_string())),
        }
    }

    fn write(&self, mut bytes: &[u8], deadline: Option<Instant>) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            let written = self.retry(libc::POLLOUT, "write", deadline, || {
                (&self.sock).write(bytes)
            })?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    fn read(&self, mut bytes: &mut [u8], deadline: Option<Instant>) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            match self.retry(libc::POLLIN, "read", deadline, || (&self.sock).read(bytes))? {
                0 => return Err(ChannelError::Closed),
                len => bytes = &mut bytes[len..],
            }
        }
        Ok(())
    }

    /// Does `operation` as soon as it can be done.
    fn retry<T>(
        &self,
        events: libc::c_short,
        name: &'static str,
        deadline: Option<Instant>,
        mut operation: impl FnMut() -> io::Result<T>,
    ) -> Result<T, ChannelError> {
        loop {
            match operation() {
                Ok(done) => return Ok(done),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => self.wait(events, deadline)?,
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::UnexpectedEof => return Err(ChannelError::Closed),
                    _ => return Err(system(name)(error)),
                },
            }
        }
    }

    fn wait(&self, events: libc::c_short, deadline: Option<Instant>) -> Result<(), ChannelError> {
        let millis = match deadline {
            None => -1,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ChannelError::TimedOut);
                }
                i32::try_from(left.as_millis()).map_or(i32::MAX, |millis| millis.saturating_add(1))
            }
        };
        let poll = |fd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let abort = self.abort.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // A negative descriptor is not looked at.
        let mut fds = [
            poll(self.sock.as_raw_fd(), events),
            poll(abort, libc::POLLIN),
        ];
        // SAFETY: `fds` are two valid pollfds.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, millis) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(system("poll")(error));
            }
        }
        if fds[1].revents != 0 {
            return Err(ChannelError::Aborted);
        }
        Ok(())
    }
}

/// Room for the control message of a piece, aligned as `cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; 16 + PIECE * size_of::<RawFd>()]);

/// One byte with its descriptors, which are closed when another program is started.
fn receive_fds(sock: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0u8];
    let mut control = Control([MaybeUninit::uninit(); 16 + PIECE * size_of::<RawFd>()]);
    let mut iov = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // SAFETY: an all-zero msghdr is a valid one: null pointers with zero lengths.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = size_of::<Control>();
    // SAFETY: `msg` points to `iov` over `byte` and to `control`, all alive and writable.
    let len = unsafe { libc::recvmsg(sock.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled `control` up to `msg_controllen`; the CMSG macros stay within it, and the
    // descriptors in it are new and nobody else's.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                let count = ((*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for i in 0..count {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&msg, cmsg);
        }
    }
    match len {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ if msg.msg_flags & libc::MSG_CTRUNC != 0 => Err(io::Error::other(
            "some descriptors were lost: too many files are open",
        )),
        _ => Ok(fds),
    }
}

#[cfg(test)]
mod tests;
