//! The back-end's own channel to the VMM (`VHOST_USER_PROTOCOL_F_BACKEND_REQ`): what we say without being
//! asked.
//!
//! The `vhost` crate's `Backend` sends no `CONFIG_CHANGE_MSG`, and waits for its acknowledgements. Nobody waits
//! here. The answer to a message comes when the VMM has done what the message asks for, and for that it has to
//! be served on the main socket meanwhile: QEMU sends `GET_CONFIG` before it acknowledges a change of the
//! configuration. So answers are looked at when there is something else to do. A VMM that does not read, that
//! leaves too many messages unanswered, or that answers what was not asked, loses the channel, and nothing more.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::handover::{ChannelState, Incoming, Outgoing};
use super::listener::socket_option;
use super::peek::{FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, HEADER_SIZE, hung_up};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;

/// Bytes of an acknowledgement: a header and 64 bits.
const ANSWER_SIZE: usize = HEADER_SIZE + 8;

/// So many messages may be unanswered.
const MOST_UNANSWERED: u32 = 16;

/// Why a channel is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("descriptor for the back-end's channel: {0}")]
    NotASocket(String),
    #[error("{operation} on the back-end's channel: {source}")]
    Socket {
        operation: &'static str,
        source: io::Error,
    },
    #[error("the VMM has closed the back-end's channel")]
    Closed,
    #[error("the VMM leaves {0} messages on the back-end's channel unanswered")]
    Unanswered(u32),
    #[error("the VMM sent something on the back-end's channel that is no answer")]
    NoAnswer,
}

/// The channel that `SET_BACKEND_REQ_FD` opened.
#[derive(Debug)]
pub(super) struct Channel {
    sock: UnixStream,
    /// Messages whose acknowledgement is due.
    unanswered: u32,
    /// The beginning of an answer that has not all come.
    partial: [u8; ANSWER_SIZE],
    filled: usize,
}

impl Channel {
    /// Takes the descriptor that the VMM sent: its other end is the VMM's.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, ChannelError> {
        let refused = |why: String| Err(ChannelError::NotASocket(why));
        let option = |name| socket_option(fd.as_raw_fd(), name);
        match (option(libc::SO_DOMAIN), option(libc::SO_TYPE)) {
            (Ok(libc::AF_UNIX), Ok(libc::SOCK_STREAM)) => {}
            (Ok(_), Ok(_)) => return refused("it is no unix stream socket".to_owned()),
            (Err(error), _) | (_, Err(error)) => {
                return refused(format!("it is no socket: {error}"));
            }
        }
        let sock = UnixStream::from(fd);
        if let Err(error) = sock.peer_addr() {
            return refused(format!("it is not connected: {error}"));
        }
        if hung_up(&sock) {
            return refused("its other end is closed".to_owned());
        }
        Ok(Self {
            sock,
            unanswered: 0,
            partial: [0; ANSWER_SIZE],
            filled: 0,
        })
    }

    /// What another process needs to go on with it.
    pub(super) fn export(&self, fds: &mut Outgoing) -> io::Result<ChannelState> {
        Ok(ChannelState {
            sock: fds.add(&self.sock)?,
            unanswered: self.unanswered,
            partial: self.partial[..self.filled].to_vec(),
        })
    }

    /// Goes on with the channel of another process. A VMM that has closed it meanwhile is found out later.
    pub(super) fn import(state: &ChannelState, fds: &mut Incoming) -> Result<Self, String> {
        let sock = fds.take(state.sock).map_err(|error| error.to_string())?;
        let mut channel = Self {
            sock: UnixStream::from(sock),
            unanswered: state.unanswered,
            partial: [0; ANSWER_SIZE],
            filled: state.partial.len(),
        };
        let beginning = channel.partial.get_mut(..channel.filled);
        match beginning.filter(|_| state.partial.len() < ANSWER_SIZE) {
            Some(beginning) => beginning.copy_from_slice(&state.partial),
            None => return Err("more than an answer on the back-end's channel".to_owned()),
        }
        Ok(channel)
    }

    /// Says that the configuration space has changed. Does not wait for anything.
    ///
    /// # Errors
    /// The channel is to be given up.
    pub(super) fn config_changed(&mut self, need_reply: bool) -> Result<(), ChannelError> {
        if need_reply && self.unanswered >= MOST_UNANSWERED {
            return Err(ChannelError::Unanswered(self.unanswered));
        }
        let flags = FLAG_VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
        let mut message = [0; HEADER_SIZE];
        for (to, word) in message
            .chunks_exact_mut(4)
            .zip([CONFIG_CHANGE_MSG, flags, 0])
        {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the bytes of `message` are readable through the call.
        let sent = unsafe {
            let fd = self.sock.as_raw_fd();
            libc::send(fd, message.as_ptr().cast(), message.len(), flags)
        };
        let source = match usize::try_from(sent) {
            Ok(HEADER_SIZE) => {
                self.unanswered += u32::from(need_reply);
                return Ok(());
            }
            Ok(_) => io::ErrorKind::WriteZero.into(),
            Err(_) => io::Error::last_os_error(),
        };
        Err(match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ChannelError::Closed,
            _ => ChannelError::Socket {
                operation: "send",
                source,
            },
        })
    }

    /// Takes the acknowledgements that have come; `refused` hears of those that are not 0.
    ///
    /// # Errors
    /// The channel is to be given up.
    pub(super) fn take_answers(
        &mut self,
        refused: &mut dyn FnMut(u64),
    ) -> Result<(), ChannelError> {
        while self.unanswered > 0 {
            let rest = &mut self.partial[self.filled..];
            // SAFETY: `rest` is writable through the call. Descriptors are not received, and closed.
            let got = unsafe {
                let fd = self.sock.as_raw_fd();
                libc::recv(fd, rest.as_mut_ptr().cast(), rest.len(), libc::MSG_DONTWAIT)
            };
            match usize::try_from(got) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(len) => self.filled += len,
                Err(_) => {
                    let source = io::Error::last_os_error();
                    match source.kind() {
                        io::ErrorKind::WouldBlock => return Ok(()),
                        io::ErrorKind::Interrupted => continue,
                        io::ErrorKind::ConnectionReset => return Err(ChannelError::Closed),
                        _ => {
                            let operation = "recv";
                            return Err(ChannelError::Socket { operation, source });
                        }
                    }
                }
            }
            if self.filled == ANSWER_SIZE {
                self.filled = 0;
                match self.answer() {
                    Some(0) => {}
                    Some(value) => refused(value),
                    None => return Err(ChannelError::NoAnswer),
                }
                self.unanswered -= 1;
            }
        }
        Ok(())
    }

    /// What the answer says that has come; `None` if it is none.
    fn answer(&self) -> Option<u64> {
        let b = &self.partial;
        let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let is_answer = word(0) == CONFIG_CHANGE_MSG
            && word(4) & !FLAG_NEED_REPLY == FLAG_VERSION | FLAG_REPLY
            && word(8) == 8;
        let value = self.partial[HEADER_SIZE..].try_into().ok()?;
        is_answer.then(|| u64::from_ne_bytes(value))
    }
}
