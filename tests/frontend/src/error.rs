//! What can go wrong between this client and a backend.

use std::fmt;
use std::io;

/// An error of the client, or of a request.
#[derive(Debug)]
pub enum Error {
    /// A system call failed.
    Io(io::Error),
    /// The backend closed the connection.
    Closed,
    /// The backend did not answer, or did not use a buffer, before the deadline.
    TimedOut(&'static str),
    /// The backend refused a message by a non-zero REPLY_ACK; the message and the value.
    Refused {
        /// The message id.
        request: u32,
        /// The value in the reply.
        value: u64,
    },
    /// The backend's answer breaks the protocol.
    Protocol(String),
    /// A buffer was used, and no notification came although one was asked for.
    LostNotification,
    /// A request completed with a status other than OK.
    Status(u8),
    /// The ring has no room for the request, or no free slot.
    Full,
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(e) => write!(f, "system call failed: {e}"),
            Self::Closed => write!(f, "the backend closed the connection"),
            Self::TimedOut(what) => write!(f, "timed out waiting for {what}"),
            Self::Refused { request, value } => {
                write!(f, "the backend refused message {request} with {value}")
            }
            Self::Protocol(what) => write!(f, "the backend broke the protocol: {what}"),
            Self::LostNotification => {
                write!(f, "a buffer was used and no notification was sent for it")
            }
            Self::Status(s) => write!(f, "request completed with status {s}"),
            Self::Full => write!(f, "no room in the ring or no free slot"),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Self::TimedOut("the backend's answer")
            }
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(e),
        }
    }
}

impl Error {
    /// True when the backend refused a message or closed the connection over it.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Closed)
    }
}
